"""What no paper talks about: data, averages of weights, pictures, configuration, runs, claims, scores.

Captions are a room of their own: `from utils.captions import captioned`.
"""

from .claims import (
    OLD_RULE,
    Arm,
    Claim,
    Rows,
    above,
    arm_weights,
    below,
    deviation,
    mean_std,
    pooled,
    published,
    save_json,
    saved,
    seeded,
    verdict,
)
from .config import Section
from .data import digits, to_float, to_uint8
from .ema import EMA
from .errors import UserError, cli
from .files import ROOT, atomic, read_json, update_json, write_json
from .images import figure, grid, save_figure, save_gif, save_grid, save_losses, save_npz, save_strip
from .parallel import parallel
from .plots import dots, lines, ticks
from .run import Run, Weights, code_hash, ramp, save_weights, trained
from .scores import classify, fid_to_test, floor, report, score
from .seeds import derive

__all__ = [
    "Arm", "Claim", "EMA", "OLD_RULE", "ROOT", "Rows", "Run", "Section", "UserError", "Weights", "above",
    "arm_weights", "atomic", "below", "classify", "cli", "code_hash", "derive", "deviation", "digits", "dots",
    "fid_to_test", "figure", "floor", "grid", "lines", "mean_std", "parallel", "pooled", "published", "ramp",
    "read_json", "report", "save_figure", "save_gif", "save_grid", "save_json", "save_losses", "save_npz", "save_strip",
    "save_weights", "saved", "score", "seeded", "ticks", "to_float", "to_uint8", "trained", "update_json", "verdict",
    "write_json",
]
