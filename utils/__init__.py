"""What no paper talks about: data, captions, averages of weights, pictures, configuration, runs, scores."""

from .captions import (
    Tokenizer,
    attributes,
    caption,
    captioned,
    follow,
    held_out,
    measure,
    read_caption,
    scene_caption,
)
from .claims import deviation, pooled, save_json, seeded, verdict
from .config import Section
from .data import digits, to_float, to_uint8
from .ema import EMA
from .errors import UserError, cli
from .files import ROOT, atomic, write_json
from .images import figure, grid, save_figure, save_gif, save_grid, save_losses, save_npz, save_strip
from .parallel import parallel
from .run import Run, Weights, code_hash, ramp, save_weights, trained
from .scores import classify, fid_to_test, floor, report, score

__all__ = [
    "EMA", "ROOT", "Run", "Section", "Tokenizer", "UserError", "Weights", "atomic", "attributes", "caption",
    "captioned", "classify", "cli", "code_hash", "deviation", "digits", "fid_to_test", "figure", "floor", "follow",
    "grid", "held_out", "measure", "parallel", "pooled", "ramp", "read_caption", "report", "save_figure",
    "save_gif", "save_grid", "save_json", "save_losses", "save_npz", "save_strip", "save_weights", "scene_caption",
    "score", "seeded", "to_float", "to_uint8", "trained", "verdict", "write_json",
]
