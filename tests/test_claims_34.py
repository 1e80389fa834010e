"""Lesson 34: what decides its claims, on made-up rows; and the published claim, judged and drawn again."""

from types import SimpleNamespace

import pytest

from conftest import ROOT, load
from utils import Rows, saved

reproduce = load("lesson_34", "reproduce")
WIGGLE = (-0.1, 0.0, 0.1)                              # of three draws of noise


def broken(fid=(), accuracy=(), velocity=(), rotary=(1.0, 1.02, 1.04), held=()):
    """The letters whose criteria fail; fid, accuracy: {(model, w): mean}, velocity: {w: share}, held: {key: share}."""
    drawn = Rows([{"model": model, "w": w, "seed": seed,
                   "fid": dict(fid).get((model, w), 3.0 if w == 1 else 1.0) + noise,
                   "accuracy": dict(accuracy).get((model, w), 0.90 if w == 1 else 0.98) + noise / 50}
                  for model in ("student", "teacher") for w in (1.0, 2.0, 4.0) for seed, noise in enumerate(WIGGLE)])
    error = Rows([{"w": w, "of_variance": dict(velocity).get(w, 0.01)} for w in (1.0, 2.0, 4.0)])
    wide = Rows([{"arm": arm, "seed": seed, "ratio": ratio} for arm, ratios in (
        ("rotary", rotary), ("table", (1.5, 1.52, 1.54))) for seed, ratio in enumerate(ratios)])
    asked = Rows([{"captions": captions, "seed": seed, **{
        key: dict(held).get(key, 0.97) if captions == "held-out" else 0.1
        for key in ("accuracy", "thickness", "slant", "attributes", "all")}}
        for captions in ("held-out", "seen") for seed in range(3)])
    found = {}
    claim = SimpleNamespace(judge=lambda letter, sentence, holds, **_: found.update({letter: holds}))
    reproduce.judge(claim, wide, drawn, error, asked)
    assert list(found) == ["a1", "a2", "a3", "b", "c1", "c2"]
    return [letter for letter, holds in found.items() if not holds]


@pytest.mark.parametrize("change, letters", [
    ({}, []),
    (dict(fid={("student", 2.0): 1.25}), []),                               # 0.25 < 3 x 0.1
    (dict(fid={("student", 2.0): 1.35}), ["a1"]),
    (dict(fid={("student", 4.0): 0.6}), ["a1"]),                            # better is not equal either
    (dict(fid={("student", 1.0): 3.35}), ["a1"]),
    (dict(accuracy={("student", 1.0): 0.909}), []),                         # below 0.01
    (dict(accuracy={("student", 1.0): 0.88}), ["a2"]),
    (dict(accuracy={("student", 4.0): 0.99}), ["a2"]),
    (dict(velocity={4.0: 0.051}), ["a3"]), (dict(velocity={1.0: 0.051}), ["a3"]), (dict(velocity={2.0: 0.049}), []),
    # The control: a teacher whose single pass is as good as its two passes shows nothing.
    (dict(fid={("teacher", 1.0): 1.0, ("student", 1.0): 1.0}), ["a1"]),
    (dict(accuracy={("teacher", 1.0): 0.976, ("student", 1.0): 0.976}), ["a2"]),
    (dict(accuracy={("teacher", 1.0): 0.972, ("student", 1.0): 0.972}), []),               # 0.008: noise is 0.006
    (dict(rotary=(1.0, 1.02, 1.6)), ["b"]),                                 # loses in one seed
    (dict(rotary=(1.0, 1.2, 1.5)), ["b"]),                                  # the gap is noise
    (dict(rotary=(1.6, 1.62, 1.64)), ["b"]),
    (dict(held={"accuracy": 0.949}), ["c1"]), (dict(held={"accuracy": 0.951}), []),
    (dict(held={"slant": 0.79}), ["c2"]), (dict(held={"thickness": 0.79}), ["c2"]), (dict(held={"slant": 0.81}), []),
    (dict(held={"attributes": 0.1, "all": 0.1}), []),                       # each word counts alone
])
def test_verdicts(change, letters):
    assert broken(**change) == letters


def test_the_published_rows_give_the_published_verdicts(tmp_path):
    claim = saved(ROOT / "lesson_34/results/claim.json")
    holds = {letter: one["verdict"] == "reproduced" for letter, one in claim.claims.items()}
    assert holds == {"a1": False, "a2": True, "a3": True, "b": False, "c1": True, "c2": True}
    drawn = Rows(row for row in claim.rows if "model" in row)
    assert reproduce.as_good(drawn, "fid") == holds["a1"] and reproduce.as_good(drawn, "accuracy", 0.01) == holds["a2"]
    assert reproduce.right(claim.rows, ("accuracy",), 0.95) and reproduce.right(claim.rows, ("thickness", "slant"), 0.8)
    assert claim.rows.below("rotary", "table", "ratio") == holds["b"]
    assert reproduce.plot(claim, tmp_path / "claim.png").stat().st_size > 5_000
