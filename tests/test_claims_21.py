"""Lesson 21: what decides its claims, on made-up rows; and the published claim, judged and drawn again."""

from types import SimpleNamespace

import pytest

from conftest import ROOT, load
from utils import Rows, saved

reproduce = load("lesson_21", "reproduce")


def judged(rows, calls=(1, 20, 100)):
    """{letter: whether its criterion holds}."""
    found = {}
    reproduce.judge(SimpleNamespace(cfg=SimpleNamespace(calls=list(calls)), judge=lambda letter, sentence, holds, paper:
                                    found.update({letter: bool(holds)})), rows)
    return found


def made_up(one=(200.0, 20.0, 10.0), many=12.0, S=(100.0, 15.0), cost=(1000.0, 700.0, 690.0)):
    """Three seeds, apart by a little. cost: of random pairs, of 1-rf, of 2-rf."""
    rows = []
    for i, model in enumerate(reproduce.MODELS):
        for seed in range(3):
            more = 1 + 0.001 * seed + 0.0001 * i * seed ** 2
            row = {"arm": model, "seed": seed, "fid": {"1": one[i] * more, "20": 5.0}}
            if i < 2:
                row |= {"S": S[i] * more, "cost": cost[1 + i] * more}
                row["fid"]["100"] = many * more
            rows.append(row | ({"cost_random": cost[0] * (1 + 0.001 * seed)} if i == 0 else {}))
    return Rows(rows)


@pytest.mark.parametrize("rows, failing", [
    (made_up(), set()),
    (made_up(one=(95.0, 20.0, 10.0)), {"a"}),
    (made_up(many=9.9), {"b"}),
    (made_up(one=(200.0, 20.0, 21.0)), {"c"}),
    (made_up(S=(100.0, 21.0)), {"d"}),
    (made_up(cost=(1000.0, 700.0, 706.0)), set()),                              # within the allowed 1 %
    (made_up(cost=(1000.0, 700.0, 708.0)), {"e2"}),
    (made_up(cost=(690.0, 700.0, 680.0)), {"e1"}),
])
def test_each_sentence_has_its_criterion(rows, failing):
    assert {letter for letter, holds in judged(rows).items() if not holds} == failing


def test_one_seed_is_enough_to_fail():
    for letter, model, change in (("a", "2-rf", {"fid": {"1": 41.0}}), ("c", "distilled", {"fid": {"1": 21.0}}),
                                  ("d", "2-rf", {"S": 21.0}), ("e2", "2-rf", {"cost": 710.0})):
        rows = made_up()
        rows.where(arm=model, seed=1)[0].update(change)
        assert not judged(rows)[letter]


def test_the_published_rows_tell_of_the_published_claims(tmp_path):
    claim = saved(ROOT / "lesson_21" / "results" / "claim.json")
    now = judged(claim.rows, claim.cfg.calls)
    assert now == {letter: one["holds"] for letter, one in claim.claims.items()} and now["c"]
    assert reproduce.plot(claim, tmp_path / "claim.png").stat().st_size > 5_000
