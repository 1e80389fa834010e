"""Lesson 05b: what decides its claims, on made-up rows; and the published claim, judged and drawn again."""

import math

import pytest

from conftest import ROOT, load
from utils import Rows, Section, pooled, saved

reproduce = load("lesson_05/sublesson_b", "reproduce")
CFG = Section(depths=[125, 500, 999], keep=200, seeds=3)


def rows(fid=(5.0, 5.1, 5.2), blend=(9.0, 9.1, 9.3), kept=(0.98, 0.7, 0.12), sure=0.9):
    """Made-up rows: FID of the independent rule at 500 and of the blend, what is kept alone, the judge's confidence."""
    found = Rows()
    for seed in range(3):
        found.append({"what": "blend", "t": 0, "seed": seed, "fid": blend[seed], "confidence": 0.6})
        found += [{"what": "independent", "t": t, "seed": seed, "fid": fid[seed] if t == 500 else 99.0,
                   "confidence": sure - 0.01 * seed if t == 500 else 0.0} for t in CFG.depths]
        found += [{"what": "keep", "t": t, "seed": seed, "kept": k + 0.01 * (seed - 1), "chance": 0.1}
                  for t, k in zip(CFG.depths, kept)]
    return found


@pytest.mark.parametrize("change, holds", [
    ({}, (True, True)),
    ({"fid": (5.0, 9.3, 5.2)}, (False, True)),                                  # one seed loses
    ({"fid": (8.9, 9.0, 8.0)}, (False, True)),                                  # too uneven for three seeds
    ({"fid": (5.0, 5.1, math.inf)}, (False, True)),
    ({"sure": 0.6}, (True, False)),                                             # FID alone is another claim
])
def test_middle_against_the_blend(change, holds):
    assert reproduce.middle(rows(**change), CFG) == holds


@pytest.mark.parametrize("kept, holds", [
    ((0.98, 0.7, 0.12), (True, True, True)),
    ((0.94, 0.7, 0.12), (False, True, True)),
    ((0.98, 0.98, 0.1), (True, False, True)),                                   # no fall
    ((0.98, 0.7, 0.17), (True, True, False)),                                   # far from chance, above ...
    ((0.98, 0.7, 0.03), (True, True, False)),                                   # ... or below
])
def test_what_is_kept_by_depth(kept, holds):
    assert reproduce.retention(rows(kept=kept), CFG)[0] == holds


def test_standard_error_is_that_of_all_digits_of_all_seeds():
    numbers = reproduce.retention(rows(), CFG)[1]
    assert numbers["standard_error"] == pytest.approx(math.sqrt(0.1 * 0.9 / 600))
    assert numbers["depths"] == CFG.depths and numbers["kept"] == pytest.approx([0.98, 0.7, 0.12])


def test_the_published_rows_give_the_published_verdicts(tmp_path):
    claim = saved(ROOT / "lesson_05/sublesson_b/results/claim.json")
    holds = {letter: one["holds"] for letter, one in claim.claims.items()}
    assert holds == {**dict.fromkeys(("a1", "a2", "b1", "b3"), True), **dict.fromkeys(("b2", "c1", "c2"), False)}
    assert reproduce.middle(claim.rows, claim.cfg) == (True, True)
    assert reproduce.retention(claim.rows, claim.cfg)[0] == (True, False, True)
    for rule in ("shared", "root"):                                             # by the old rule and by the new
        ours, theirs = (claim.rows.values("fid", what=what, t=999) for what in (rule, "independent"))
        assert sum(theirs) / 3 - sum(ours) / 3 < 3 * pooled(ours, theirs)
        assert not claim.rows.below(rule, "independent", "fid", by="what", t=999)
    assert reproduce.plot(claim, tmp_path / "claim.png").stat().st_size > 5_000
