"""The end of every reproduce.py: a verdict in the course's words, a deviation over seeds, claim.json."""

import math
import statistics

import torch

from .files import write_json


def verdict(holds, cfg):
    """"reproduced" or "not reproduced at this scale"; or that there is none, of a quick look or too few seeds.

    holds: whether the criterion at the top of reproduce.py was met. cfg: the section `reproduce` of the configuration.
    """
    if cfg.quick or cfg.smoke or cfg.seeds < 3:
        return "no verdict from a quick look"
    return "reproduced" if holds else "not reproduced at this scale"


def deviation(values):
    """Standard deviation over the seeds; 0 for a single one, infinite if an arm diverged."""
    if not all(map(math.isfinite, values)):
        return math.inf
    return statistics.stdev(values) if len(values) > 1 else 0.0


def pooled(*arms):
    """The pooled standard deviation of arms of values: the root of the mean of their variances."""
    return math.sqrt(statistics.mean(deviation(arm) ** 2 for arm in arms))


def seeded(seed):
    """A CPU generator of random numbers: the same noise on every device."""
    return torch.Generator().manual_seed(seed)


def save_json(claim, path):
    """Write a claim as JSON, for `run.output`; infinity and NaN, which JSON lacks, become null. Returns the path."""
    def plain(value):
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    write_json(path, plain(claim))
    return path
