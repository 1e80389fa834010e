"""Lesson 05c: what decides its claims, on made-up rows; and the published claim, judged and drawn again."""

import math

import pytest

from conftest import ROOT, load
from utils import Rows, saved

reproduce = load("lesson_05/sublesson_c", "reproduce")
FOUR, ONE, TIME = reproduce.FOUR, reproduce.ONE, reproduce.TIME


def rows(**changes):
    """Three seeds of each arm, as good as can be; changes: {key: {arm: value}}."""
    found = Rows()
    for seed in range(3):
        for arm in reproduce.ARMS:
            q = 0.0 if arm == ONE else 0.1
            row = {"arm": arm, "seed": seed, "accuracy": 0.97 + 0.001 * seed,
                   "gradients": [] if arm == TIME else [[q, q, 0.2]] * 4}
            found.append(row | {key: value[arm] for key, value in changes.items() if arm in value})
    return found


@pytest.mark.parametrize("change, trapped, learning", [
    ({}, True, True),
    ({ONE: [[1e-30, 0.0, 0.2]]}, False, True),                                   # exactly zero
    ({ONE: [[0.0, 0.0, 0.0]]}, False, True),                                     # nothing learned at all
    ({FOUR: [[0.1, 0.1, 0.2], [0.1, 0.0, 0.2]]}, True, False),                   # in every layer
    ({ONE: None}, False, True),                                                  # an arm that diverged
    ({FOUR: None}, True, False),
])
def test_gradients(change, trapped, learning):
    made = rows(gradients=change)
    assert (reproduce.trapped(made), reproduce.learning(made)) == (trapped, learning)


def test_one_seed_with_a_gradient_is_enough_to_fail():
    made = rows()
    made.where(arm=ONE, seed=2)[0]["gradients"][3] = [0.0, 1e-9, 0.2]
    assert not reproduce.trapped(made)


def test_largest_gradient_is_over_layers_and_seeds():
    made = rows(gradients={FOUR: [[0.1, 0.5, 0.2], [0.3, 0.1, 0.1]]})
    made.where(arm=FOUR, seed=1)[0]["gradients"] = [[0.2, 0.2, 0.9]]
    assert reproduce.largest(made, FOUR) == {"W_Q": 0.3, "W_K": 0.5, "W_V": 0.9}


@pytest.mark.parametrize("wrong, holds", [((4, 4, 4), True), ((0, 0, 6), False), ((6, 0, 0), False)])
def test_accuracy_is_wanted_in_every_seed_and_without_guidance(wrong, holds):
    asked = Rows([{"w": 1.0, "seed": seed, "accuracy": 1 - k / 100} for seed, k in enumerate(wrong)]
                 + [{"w": w, "seed": 0, "accuracy": 0.1} for w in (0.0, 2.0, 4.0)])
    assert reproduce.draws_it(asked) == holds


@pytest.mark.parametrize("accuracy, time, one", [
    ({}, True, True),
    ({TIME: 0.96}, True, True),
    ({TIME: 0.94}, False, True),
    ({ONE: 0.94}, True, False),
    ({FOUR: 0.5}, True, True),                                                   # the baseline may be better
    ({TIME: math.inf}, False, True),                                             # an arm that diverged
    ({FOUR: math.inf}, False, False),
])
def test_the_plain_alternative_may_lose_two_hundredths(accuracy, time, one):
    made = rows(accuracy=accuracy)
    assert (reproduce.as_accurate(made, TIME), reproduce.as_accurate(made, ONE)) == (time, one)


def test_the_published_rows_give_the_published_verdicts(tmp_path):
    claim = saved(ROOT / "lesson_05/sublesson_c/results/claim.json")
    assert [one["verdict"] for one in claim.claims.values()] == [
        "exact", "reproduced", "reproduced", *["not reproduced at this scale"] * 2]
    judged = (reproduce.trapped(claim.rows), reproduce.learning(claim.rows), reproduce.draws_it(claim.rows),
              reproduce.as_accurate(claim.rows, TIME), reproduce.as_accurate(claim.rows, ONE))
    assert judged == tuple(one["holds"] for one in claim.claims.values()) == (True, True, True, False, False)
    assert reproduce.plot(claim, tmp_path / "claim.png").stat().st_size > 5_000
