"""Lesson 39: what decides its claims, on made-up rows; and the published claim, drawn again."""

import pytest

from conftest import ROOT, load
from utils import Rows, saved

reproduce = load("lesson_39", "reproduce")


def fid(first=(60, 45, 30), last=(40, 22, 14)):
    """Three seeds of each arm, apart by a little: the FID after 160 and after 320 steps."""
    return Rows([{"arm": arm, "seed": seed, "steps": steps, "fid": of_step[i] + 0.1 * seed + 0.01 * i * seed ** 2}
                 for i, arm in enumerate(("SM", "FM-VP", "FM-OT")) for seed in range(3)
                 for steps, of_step in ((160, first), (320, last))])


@pytest.mark.parametrize("change, holds", [
    ({}, True),
    ({"first": (60, 29, 30)}, False),                                            # not the lowest after 160 steps
    ({"first": (60, 30.1, 30)}, True),                                           # there it need not be far ahead
    ({"last": (40, 14.05, 14)}, False),                                          # but at the end: t = 1.9
    ({"last": (14.05, 22, 14)}, False),                                          # of whichever arm
    ({"first": (30, 45, 60), "last": (14, 22, 40)}, False),
])
def test_lowest_all_along_wants_every_step_and_a_clear_end(change, holds):
    assert reproduce.lowest_all_along(fid(**change)) is holds


def test_one_seed_that_is_not_the_lowest_is_enough_to_fail():
    rows = fid()
    next(row for row in rows if row["arm"] == "FM-OT" and row["seed"] == 1)["fid"] = 46.0
    assert not reproduce.lowest_all_along(rows)


def test_an_arm_that_diverged_is_not_the_lowest():
    rows = fid()
    for row in rows:
        if row["arm"] == "FM-OT" and row["seed"] == 2:
            row["fid"] = float("inf")
    assert not reproduce.lowest_all_along(rows)


def test_the_published_rows_give_the_published_verdicts(tmp_path):
    claim = saved(ROOT / "lesson_39" / "results" / "claim.json")
    assert {letter: one["verdict"] for letter, one in claim.claims.items()} == dict.fromkeys("abc", "reproduced")
    assert max(claim.claims["a"]["ratio"]) <= 0.8 and claim.rows.below("FM-OT", "SM", "calls", factor=0.8)
    assert reproduce.lowest_all_along(claim.rows.unfold("fid", "steps"))
    assert reproduce.plot(claim, tmp_path / "claim.png").stat().st_size > 5_000
    assert reproduce.plot_calls(claim, tmp_path / "calls.png").stat().st_size > 5_000
