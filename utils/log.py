"""What a training says while it runs: a progress bar, and metrics.jsonl with a line of scalars every few steps."""

import json
import math
import sys
from contextlib import contextmanager

import torch

from .checkpoint import kept
from .errors import Diverged
from .files import atomic


class Log:
    """The scalars of a run. They are read every few steps only, because reading one waits for the device.

    records: (number of steps done, {name: scalar}) that are not in metrics.jsonl yet.
    """

    def __init__(self):
        self.path, self.records = None, []

    def open(self, folder, step, write):
        """Begin or go on with metrics.jsonl, without what was logged after this step or cut off. write: whether to."""
        self.path, self.write = folder / "metrics.jsonl", write
        if not write:
            return
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        with atomic(self.path) as temporary:
            temporary.write_text("".join(line + "\n" for line in lines if _step(line) <= step), encoding="utf-8")

    def add(self, step, values):
        """Remember scalars of one step."""
        self.records.append((step, {k: v.detach() if torch.is_tensor(v) else v for k, v in values.items()}))

    def read(self):
        """Turn the remembered scalars into numbers; stops at a NaN."""
        self.records = [(step, {k: float(v) for k, v in values.items()}) for step, values in self.records]
        for step, values in self.records:
            for name, value in values.items():
                if not math.isfinite(value):
                    raise Diverged(f"{name} is {value} at step {step}: stopped; {kept(self.path.parent)}. "
                                   "Try a smaller lr or precision=fp32")
        return self.records

    def flush(self, seconds):
        """Append the mean of the remembered scalars to metrics.jsonl. Returns it, {name: number}."""
        rows, self.records = self.read(), []
        columns = {}
        for _, values in rows:
            for name, value in values.items():
                columns.setdefault(name, []).append(value)
        mean = {name: sum(column) / len(column) for name, column in columns.items()}
        if rows and self.write:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": rows[-1][0], **mean, "seconds": round(seconds, 2)}) + "\n")
        return mean

    def lines(self):
        """The lines of metrics.jsonl, as dicts."""
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]


@contextmanager
def progress(step, end, shown):
    """A bar in text from `step` to `end`, drawn once a second where it is shown; yields tqdm's bar.

    miniters: it looks at the clock at every step, else quick steps before a slow one would make it wait for more.
    """
    from tqdm import tqdm

    with tqdm(total=end, initial=step, disable=not shown, mininterval=1.0, miniters=1, unit="step", file=sys.stdout,
              ascii=True, ncols=90) as bar:
        yield bar


def _step(line):
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf                                # the line that a crash cut off
