"""Lesson 06: what decides its claims, on made-up rows; and the published claim, judged and drawn again."""

import pytest

from conftest import ROOT, load
from utils import Rows, Section, saved

reproduce = load("lesson_06", "reproduce")
CFG = Section(seeds=3, few=20, long=1000, counts=[10, 20], reconstruct=[10, 20])
FEW = {"eta 0": [4.0, 4.1, 4.2], "eta 1": [8.0, 8.2, 8.1], "sigma-hat": [80.0, 81.0, 80.5]}
LONG = {"eta 0": 3.0, "sigma-hat": 2.9}


def made_up(few=FEW, long=LONG, few_low=None, long_low=None):
    """Rows as reproduce.py draws them. few_low, long_low: the low-level FID, where it differs."""
    rows = [{"arm": arm, "steps": 20, "seed": seed, "change": reproduce.CLAIM, "fid": few[arm][seed],
             "fid_low": (few_low or few)[arm][seed]} for arm in few for seed in range(3)]
    rows += [{"arm": arm, "steps": 1000, "seed": 0, "change": reproduce.CLAIM, "fid": long[arm],
              "fid_low": (long_low or long)[arm]} for arm in long]
    rows += [{"arm": "eta 0", "steps": 20, "seed": 0, "change": reproduce.FRESH, "fid": 99.0, "fid_low": 99.0}]
    return Rows(rows)


@pytest.mark.parametrize("rows, expected", [
    (made_up(), (True, True, True)),
    (made_up(few={**FEW, "eta 0": [4.0, 8.25, 4.2]}), (False, True, True)),     # (a1) loses in one seed
    (made_up(few={**FEW, "eta 1": [3.0, 3.2, 3.1]}), (False, True, True)),      # eta = 1 wins
    (made_up(few={**FEW, "sigma-hat": [5.0, 5.1, 5.3]}), (True, False, True)),  # (a2) above eta = 0 only
    (made_up(few_low={**FEW, "eta 0": [9.0, 9.2, 9.1]}), (False, True, True)),  # the low-level FID alone
    (made_up(few_low={**FEW, "sigma-hat": [6.0, 6.2, 6.1]}), (True, False, True)),
    (made_up(long={**LONG, "sigma-hat": 3.2}), (True, True, True)),             # (b) on par: within 3 deviations, 0.3
    (made_up(long={**LONG, "sigma-hat": 3.4}), (True, True, False)),
    (made_up(long_low={**LONG, "sigma-hat": 3.4}), (True, True, False)),
])
def test_table_1_and_its_turn(rows, expected):
    first = reproduce.in_both_fids(rows, CFG, ("eta 0", "eta 1"))
    second = reproduce.in_both_fids(rows, CFG, ("eta 0", "sigma-hat"), ("eta 1", "sigma-hat"))
    assert (first, second, reproduce.on_par(rows, CFG)) == expected


def errors(table):
    """The error of each set by steps."""
    return Rows({"steps": steps, "seed": i, "error": value} for steps, row in table.items()
                for i, value in enumerate(row))


def test_error_has_to_fall_from_each_to_the_next_in_every_set():
    assert reproduce.falls(errors({20: [0.2, 0.3], 10: [0.3, 0.4], 100: [0.1, 0.1]}))
    assert not reproduce.falls(errors({10: [0.3, 0.4], 20: [0.2, 0.4]}))
    assert not reproduce.falls(errors({10: [0.3], 20: [0.1], 50: [0.2]}))


def test_a_factor_favours_the_arm_that_is_below():
    rows = made_up(few_low={**FEW, "eta 0": [8.1, 8.2, 8.0]})
    assert reproduce.favours(rows, CFG, reproduce.CLAIM, "fid") == "eta 0"
    assert reproduce.favours(rows, CFG, reproduce.CLAIM, "fid_low") == "neither"
    turned = made_up(few={**FEW, "eta 1": [3.0, 3.2, 3.1]})
    assert reproduce.favours(turned, CFG, reproduce.CLAIM, "fid") == "eta 1"


def test_every_row_is_drawn_once_the_longest_first():
    jobs = reproduce.jobs(CFG)
    steps = [job["steps"] for job in jobs]
    assert len({tuple(job.values()) for job in jobs}) == len(jobs) and steps == sorted(steps, reverse=True)
    few = [job for job in jobs if job["steps"] == 20]
    assert len(few) == 3 * (len(reproduce.ETAS) + 2 * (len(reproduce.FACTORS) - 1) + 1)
    assert [job["arm"] for job in jobs if job["steps"] == 1000] == ["eta 0", "sigma-hat"]


def test_the_published_rows_give_the_published_verdicts(tmp_path):
    claim = saved(ROOT / "lesson_06" / "results" / "claim.json")
    rows, sets = claim.rows, claim.rows.unfold("error", "seed")
    assert {letter: one["holds"] for letter, one in claim.claims.items()} == {
        "a1": reproduce.in_both_fids(rows, claim.cfg, ("eta 0", "eta 1")),
        "a2": reproduce.in_both_fids(rows, claim.cfg, ("eta 0", "sigma-hat"), ("eta 1", "sigma-hat")),
        "b": reproduce.on_par(rows, claim.cfg), "c": reproduce.falls(sets)}
    assert set(claim.notes["favours"]) == set(reproduce.FACTORS)
    assert reproduce.plot(claim, tmp_path / "claim.png").stat().st_size > 5_000
    assert reproduce.plot_factors(claim, tmp_path / "factors.png").stat().st_size > 5_000
