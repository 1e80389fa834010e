"""Lesson 15: what decides its claims, on made-up rows; and the published claim, drawn again."""

import pytest

from conftest import ROOT, load
from utils import Rows, saved

reproduce = load("lesson_15", "reproduce")


def sweep(weights=(1, 2, 5), **numbers):
    """Three seeds of each score at each weight, apart by a little."""
    return Rows([{"net": "published", "w": w, "clip": True, "seed": seed,
                  **{key: values[i] + 0.001 * seed + 0.0001 * i * seed ** 2 for key, values in numbers.items()}}
                 for i, w in enumerate(weights) for seed in range(3)])


SCORES = {"accuracy": (0.9, 0.99, 0.991), "precision": (0.7, 0.8, 0.9), "recall": (0.9, 0.8, 0.5)}


@pytest.mark.parametrize("change, wrong", [
    ({}, []),
    ({"accuracy": (0.9, 0.99, 0.95)}, [("accuracy", "monotonic")]),                       # back between two weights
    ({"accuracy": (0.9, 0.9995, 0.999)}, []),                                             # by less than the noise
    ({"precision": (0.7, 0.8, 0.7)}, [("precision", "monotonic"), ("precision", "clear")]),
    ({"recall": (0.9, 0.8, 0.85)}, [("recall", "monotonic")]),
    ({"recall": (0.9, 0.901, 0.902)}, [("recall", "monotonic"), ("recall", "clear")]),
])
def test_a_trade_goes_its_way_all_along(change, wrong):
    parts = reproduce.trade(sweep(**{**SCORES, **change}))
    assert [(key, what) for key, part in parts.items() for what, holds in part.items() if not holds] == wrong
    assert set(parts) == set(SCORES) and all(set(part) == {"monotonic", "clear"} for part in parts.values())


def test_a_trade_begins_at_plain_conditional_sampling():
    rows = sweep((0, 1, 5), **{key: (values[2], *values[:2]) for key, values in SCORES.items()})    # no class at w = 0
    assert all(part["monotonic"] and part["clear"] for part in reproduce.trade(rows).values())


@pytest.mark.parametrize("outside, holds", [((0.01, 0.02, 0.05), True), ((0.01, 0.02, 0.02), False),
                                            ((0.02, 0.01, 0.05), False), ((0.05, 0.02, 0.01), False)])
def test_saturation_grows_from_each_weight_to_the_next(outside, holds):
    rows = sweep(outside=outside)
    if outside == (0.01, 0.02, 0.02):
        rows[-1]["outside"] = 0.0199                                                      # in one seed it does not
    assert reproduce.grows(Rows(reversed(rows)), "outside") is holds


def test_the_lowest_fid_is_taken_seed_by_seed():
    rows = sweep(fid=(3.0, 2.0, 2.5))
    rows.where(w=5, seed=2)[0]["fid"] = 1.5
    assert reproduce.lowest_fid(rows, "published") == pytest.approx([2.0, 2.0011, 1.5])


def test_the_published_rows_give_the_published_verdicts(tmp_path):
    claim = saved(ROOT / "lesson_15" / "results" / "claim.json")
    holds = {letter: one["holds"] for letter, one in claim.claims.items()}
    assert holds == {"a1": False, "a2": True, "b": False, "c1": True, "c2": True, "d": False, "e": True}
    assert all((one["verdict"] == "reproduced") == one["holds"] for one in claim.claims.values())
    sweep, free = (claim.rows.where(net="published", clip=clip) for clip in (True, False))
    assert not any(sweep.below(w, 1, "fid", by="w") for w in (1.5, 2)) and sweep.above(9, 1, "fid", by="w")
    parts = reproduce.trade(sweep)
    assert [key for key, part in parts.items() if part["monotonic"] and part["clear"]] == ["accuracy", "recall"]
    assert reproduce.grows(free, "outside")
    assert reproduce.plot(claim, tmp_path / "claim.png").stat().st_size > 5_000
    assert reproduce.plot_difference(claim, tmp_path / "difference.png").stat().st_size > 3_000
