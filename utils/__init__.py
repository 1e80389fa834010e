"""What no paper talks about: data, averages of weights, pictures, configuration, runs, claims, scores.

Captions are a room of their own: `from utils.captions import captioned`.
"""

from .claims import (
    Arm,
    Claim,
    Rows,
    above,
    arm_weights,
    below,
    deviation,
    pooled,
    published,
    saved,
    seeded,
)
from .config import Section
from .data import digits, to_float, to_uint8
from .device import device_of
from .ema import EMA
from .errors import UserError, cli
from .files import atomic, read_json, update_json, write_json
from .images import by_class, columns, figure, grid, save_figure, save_gif, save_grid, save_npz, save_strip, show
from .optim import muon
from .plots import dots, lines, ticks
from .run import Run, Weights, code_hash, ramp, save_weights, trained
from .scores import classify, fid_to_test, floor, report, score
from .seeds import batches, derive, noise

__all__ = [
    "Arm", "Claim", "EMA", "Rows", "Run", "Section", "UserError", "Weights", "above", "arm_weights", "atomic",
    "batches", "below", "by_class", "classify", "cli", "code_hash", "columns", "derive", "deviation", "device_of",
    "digits", "dots", "fid_to_test", "figure", "floor", "grid", "lines", "muon", "noise", "pooled", "published", "ramp",
    "read_json", "report", "save_figure", "save_gif", "save_grid", "save_npz", "save_strip", "save_weights", "saved",
    "score", "seeded", "show", "ticks", "to_float", "to_uint8", "trained", "update_json", "write_json",
]
