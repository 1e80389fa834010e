"""A value that a reader gives to any key of any lesson's training is taken or refused in one line: no traceback."""

import itertools
import sys

import pytest

from conftest import ROOT, load
from tools import lineage
from utils.config import OVERLAYS, read
from utils.errors import explain
from utils.run import Run

READY = {one["number"]: one["folder"] for one in lineage.load_lessons(ROOT) if one["state"] == "ready"}
VALUES = ("0", "-1", "1", "3", "7", "0.5", "1.0", "1e-12", "1e12", "nan", "[]", "[0]", "[1]", "[7]", "[3, 5]",
          "[1, 1, 1, 1, 1, 1]", "text", "true", '""')
OF_THE_MACHINE = ("data", "resume", "processes")       # tested where they are read


class FirstStep(BaseException):
    """Everything is built, the first step would come."""


@pytest.mark.parametrize("number", READY)
def test_any_value_is_taken_or_refused_in_one_line(number, tmp_path, monkeypatch, capsys):
    """Each key is given three of the values, each value to every sixth key: other pairs in every lesson."""
    def stop(*_, **__):
        raise FirstStep

    train, taken, refused = load(READY[number], "train"), 0, 0
    sections = {name: keys for name, keys in read(ROOT / READY[number] / "config.yaml").items()
                if name not in (*OVERLAYS, "sample", "reproduce")}
    monkeypatch.setattr(Run, "steps", stop)
    values = itertools.islice(itertools.cycle(VALUES), int(number[:2]), None)
    for section, keys in sections.items():
        for key in keys:
            for value in itertools.islice(values, 3 if key not in OF_THE_MACHINE else 0):
                if value == "1e12" and not isinstance(keys[key], float):
                    continue                           # memory is another matter
                given = f"{section}.{key}={value}"
                argv = ["smoke=true", "gpu=false", "device=cpu", "threads=1", f"runs={tmp_path}", given]
                monkeypatch.setattr(sys, "argv", ["train.py", *argv])
                try:
                    train.main(argv)
                except FirstStep:
                    taken += 1
                except Exception as error:
                    line = explain(error)
                    assert line is not None, f"{given} is a traceback: {type(error).__name__}: {error}"
                    assert str(line).strip() and "\n" not in str(line), f"{given}: {line}"
                    refused += 1
                else:
                    pytest.fail(f"{given}: no training")
    assert taken > 3 and refused > 10, (taken, refused)
