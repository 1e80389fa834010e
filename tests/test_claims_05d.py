"""Lesson 05d: what decides its claims, on made-up rows; and the published claim, judged and drawn again."""

import math

import pytest

from conftest import ROOT, load
from utils import Rows, saved

reproduce = load("lesson_05/sublesson_d", "reproduce")
BLOCK, EQUAL = reproduce.BLOCK, reproduce.EQUAL


def rows(**values):
    """Three seeds of the two arms that are compared: rows(accuracy=(of the block, of as many parameters))."""
    return Rows([{"arm": arm, "seed": seed, **{key: pair[i] + 0.001 * seed for key, pair in values.items()}}
                 for i, arm in enumerate((BLOCK, EQUAL)) for seed in range(3)])


@pytest.mark.parametrize("accuracy, holds", [
    ((0.97, 0.97), True), ((0.955, 0.97), True), ((0.99, 0.5), True), ((0.94, 0.97), False),
    ((math.inf, 0.97), False), ((0.97, math.inf), False),                        # an arm that diverged
])
def test_the_block_may_lose_two_hundredths_of_accuracy(accuracy, holds):
    assert reproduce.as_accurate(rows(accuracy=accuracy)) == holds


def test_the_published_rows_give_the_published_verdicts(tmp_path):
    claim = saved(ROOT / "lesson_05/sublesson_d/results/claim.json")
    verdicts = {letter: one["verdict"] for letter, one in claim.claims.items()}
    assert verdicts == {"a": "exact", "b": "not reproduced at this scale", "c": "reproduced"}
    assert claim.claims["a"]["largest_difference"] == 0
    assert not claim.rows.below(BLOCK, EQUAL, "error") and reproduce.as_accurate(claim.rows)
    assert reproduce.plot(claim, tmp_path / "claim.png").stat().st_size > 5_000
