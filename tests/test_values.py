"""A value that a reader gives to any key of any lesson is taken or refused in one line: no traceback."""

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
# Tested where they are read; or what is looked at besides the samples, and costs time.
ELSEWHERE = ("data", "resume", "processes", "weights", "out", "gif", "npz", "metrics", "figures", "n", "bits", "bound")
# What a training must also be given, so that the values of a section have an effect.
CHOSEN = {("03", "scorenet"): ["network=scorenet"]}


class FirstStep(BaseException):
    """Everything is built, the first step would come."""


def given(number, sections):
    """Two values for each key, in every lesson other ones."""
    values = itertools.islice(itertools.cycle(VALUES), int(number[:2]), None)
    for section, keys in sections.items():
        for key in keys:
            for value in itertools.islice(values, 0 if key in ELSEWHERE else 2):
                if value != "1e12" or isinstance(keys[key], float):    # memory is another matter
                    yield f"{section}.{key}={value}", key


def outcome(main, argv, monkeypatch):
    """Whether the values were taken. What refuses them is one line."""
    monkeypatch.setattr(sys, "argv", ["script.py", *argv])
    try:
        main(argv)
    except FirstStep:
        return True
    except Exception as error:
        line = explain(error)
        assert line is not None, f"{argv[-1]} is a traceback: {type(error).__name__}: {error}"
        assert str(line).strip() and "\n" not in str(line), f"{argv[-1]}: {line}"
        return False
    return True


@pytest.mark.parametrize("number", READY)
def test_a_training_takes_any_value_or_refuses_it_in_one_line(number, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise FirstStep

    sections = {name: keys for name, keys in read(ROOT / READY[number] / "config.yaml").items()
                if name not in (*OVERLAYS, "sample", "reproduce")}
    monkeypatch.setattr(Run, "steps", stop)
    train = load(READY[number], "train")
    taken = [outcome(train.main, ["smoke=true", "gpu=false", "device=cpu", "threads=1", f"runs={tmp_path}",
                                  *CHOSEN.get((number, one.partition(".")[0]), ()), one], monkeypatch)
             for one, _ in given(number, sections)]
    assert sum(taken) > 2 and taken.count(False) > 5


@pytest.mark.parametrize("number", READY)
def test_a_sampling_takes_any_value_or_refuses_it_in_one_line(number, tmp_path, monkeypatch):
    keys = read(ROOT / READY[number] / "config.yaml")["sample"]
    few = ["sample.steps=1" if number in ("03", "04") else "sample.steps=3"] if "steps" in keys else []
    sample = load(READY[number], "sample")
    taken = [outcome(sample.main, ["n=2", "weights=published", "gpu=false", "device=cpu", "threads=1",
                                   f"runs={tmp_path}", *(few if key != "steps" else []), one], monkeypatch)
             for one, key in given(number, {"sample": keys})]
    assert False in taken
