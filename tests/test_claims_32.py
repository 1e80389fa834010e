"""Lesson 32: what decides its claims, on made-up rows; and the published claim, judged and drawn again."""

import math
from types import SimpleNamespace

import pytest

from conftest import ROOT, load
from utils import Rows, saved

reproduce = load("lesson_32", "reproduce")
OURS, CROSS, SHALLOW = reproduce.OURS, reproduce.CROSS, reproduce.SHALLOW
COUNTS = (5, 10, 25, 50)


def broken(fid=(), cross=(0.12, 0.121, 0.122), parameters=1010, order=range(8), held=(), diverged=None):
    """The letters whose criteria fail. fid: {(arm, steps): three FIDs}, order: of the FIDs of seed 0's snapshots."""
    rows = []
    for seed in range(3):
        for arm in reproduce.FORMS:
            base = 10.0 if arm == OURS else 20.0
            rows.append({"arm": arm, "seed": seed, "parameters": 1000, "fid": {
                str(steps): dict(fid).get((arm, steps), [base + 0.1 * i for i in range(3)])[seed] for steps in COUNTS}})
            if arm == OURS:
                told = order if seed == 0 else range(8)
                rows[-1] |= {"validation": 0.10 + seed / 1000,
                             "snapshot_validation": {str(i): 0.5 + i / 100 for i in range(8)},
                             "snapshot_fid": {str(i): 50.0 + one for i, one in enumerate(told)}}
                if seed == diverged:
                    rows[-1] = {"arm": arm, "seed": seed, "diverged": True, **{
                        key: {k: math.inf for k in value} if isinstance(value, dict) else math.inf
                        for key, value in rows[-1].items() if key not in ("arm", "seed")}}
        rows.append({"arm": CROSS, "seed": seed, "parameters": parameters, "validation": cross[seed]})
        rows.append({"arm": SHALLOW, "seed": seed, "parameters": 700, "validation": 0.05 * seed})
    asked = Rows([{"captions": captions, "seed": seed, **{
        key: dict(held).get(key, 0.96) if captions == "held out" else 0.1
        for key in ("accuracy", "thickness", "slant", "attributes", "all")}}
        for captions in reproduce.ASKED for seed in range(3)])
    found = {}
    claim = SimpleNamespace(judge=lambda letter, sentence, holds, **_: found.update({letter: holds}))
    reproduce.judge(claim, Rows(rows, ("arm", "seed")), asked)
    assert list(found) == ["a1", "a2", "b", "c", "d1", "d2"]
    return [letter for letter, holds in found.items() if not holds]


LOST = {("edm", 50): [9.0, 9.1, 9.2]}


@pytest.mark.parametrize("change, letters", [
    ({}, []),
    (dict(fid=LOST), []),                                                   # one count lost of four
    (dict(fid={**LOST, ("edm", 25): [9.95, 10.05, 10.15]}), []),            # a tie: 0.05 above, deviation 0.1
    (dict(fid={**LOST, ("edm", 25): [9.8, 9.9, 10.0]}), ["a1"]),            # two counts lost
    (dict(fid={("v-cosine", steps): [9.95, 10.05, 10.15] for steps in COUNTS}), ["a2"]),           # ties, a worse rank
    (dict(fid={("v-cosine", steps): [8.0, 8.1, 8.2] for steps in COUNTS}), ["a1", "a2"]),
    (dict(order=(0, 2, 1, 4, 3, 5, 7, 6)), []),                             # Spearman 0.93
    (dict(order=(1, 5, 2, 6, 3, 7, 4, 0)), ["b"]),                          # in one training of three
    (dict(order=range(8, 0, -1)), ["b"]),
    (dict(cross=(0.09, 0.121, 0.2)), ["c"]),                                # lost in one training
    (dict(cross=(0.1005, 0.1005, 0.1305)), ["c"]),                          # lost in another
    (dict(cross=(0.1001, 0.1011, 0.14)), ["c"]),                            # the gap is noise
    (dict(parameters=1100), ["c"]), (dict(parameters=900), ["c"]),
    (dict(held={"accuracy": 0.94}), ["d1"]), (dict(held={"accuracy": 0.951}), []),
    (dict(held={"thickness": 0.79}), ["d2"]), (dict(held={"slant": 0.79}), ["d2"]), (dict(held={"slant": 0.81}), []),
    (dict(held={"attributes": 0.1, "all": 0.1}), []),                       # each word counts alone
    (dict(diverged=1), ["a1", "a2", "b", "c"]),
])
def test_verdicts(change, letters):
    assert broken(**change) == letters


def test_rank_correlation_by_hand():
    row = {"snapshot_validation": dict(zip("abcd", (1, 2, 3, 4))), "snapshot_fid": dict(zip("abcd", (1, 3, 2, 9)))}
    assert reproduce.spearman(row) == pytest.approx(1 - 6 * 2 / (4 * 15))


def test_the_published_rows_give_the_published_verdicts(tmp_path):
    claim = saved(ROOT / "lesson_32/results/claim.json")
    holds = {letter: one["verdict"] == "reproduced" for letter, one in claim.claims.items()}
    assert holds == {"a1": True, "a2": True, "b": True, "c": False, "d1": True, "d2": True}
    found = {}
    asked = Rows(row for row in claim.rows if "captions" in row)
    judged = SimpleNamespace(judge=lambda letter, sentence, holds, **_: found.update({letter: holds}))
    reproduce.judge(judged, Rows(row for row in claim.rows if "arm" in row), asked)
    assert found == holds
    assert reproduce.plot(claim, tmp_path / "claim.png").stat().st_size > 5_000
