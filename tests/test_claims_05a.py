"""Lesson 05a: what decides its claims, on made-up rows; and the published claim, judged and drawn again."""

import math

import pytest

from conftest import ROOT, load
from utils import Rows, saved

reproduce = load("lesson_05/sublesson_a", "reproduce")
DROPOUTS = [0.0, 0.1, 0.3]


def rows(gaps=(0.03, 0.02, 0.01), bug=0.028, errors=(0.05, 0.06, 0.07)):
    """Made-up rows of three seeds: gaps on few images by p, of the mistake, errors on all images."""
    found = Rows()
    for seed in range(3):
        shift = 0.001 * seed
        for i, (p, gap, error) in enumerate(zip(DROPOUTS, gaps, errors)):
            found.append({"arm": f"few, p = {p}", "seed": seed, "gap": gap + shift * (1 + 0.1 * i)})
            found.append({"arm": f"all, p = {p}", "seed": seed, "test": error + shift * (1 + 0.1 * i)})
        found.append({"arm": "forgotten, p = 0.3", "seed": seed, "gap": bug + shift})
    return found


def judged(made):
    return (reproduce.falls(made, "few", "gap", DROPOUTS), reproduce.falls(made, "all", "test", DROPOUTS[::-1]),
            reproduce.forgotten(made, 0.0, 0.3))


@pytest.mark.parametrize("change, holds", [
    ({}, (True, True, True)),
    ({"gaps": (0.02, 0.03, 0.01), "bug": 0.012}, (False, True, False)),
    ({"gaps": (0.03, 0.01, 0.02), "bug": 0.029}, (False, True, True)),
    ({"bug": 0.0195}, (True, True, False)),                                      # nearer to its own p
    ({"errors": (0.06, 0.05, 0.07)}, (True, False, True)),
    ({"errors": (0.05, 0.08, 0.07)}, (True, False, True)),
    ({"gaps": (0.03, 0.02, math.inf)}, (False, True, True)),                     # arms that diverged
    ({"bug": math.inf}, (True, True, False)),
])
def test_order_by_p(change, holds):
    assert judged(rows(**change)) == holds


def test_one_seed_of_three_decides():
    made = rows()
    made.where(arm="few, p = 0.0", seed=0)[0]["gap"] = 0.015                     # below that of p = 0.1
    assert judged(made) == (False, True, False)


def test_arms_are_what_they_are_called():
    run = reproduce.Claim(reproduce.__file__, ["smoke=true", "gpu=false", "device=cpu", "start="]).run
    few, bug = reproduce.keys(run, "few", 0.1), reproduce.keys(run, "forgotten", 0.3)
    assert "unet.dropout=0.1" in few and f"images={run.settings.few}" in few
    assert bug.names == {"preview": reproduce.careless} and {"strict=false", "unet.dropout=0.3"} < set(bug.keys)
    assert "images=60000" in reproduce.keys(run, "all", 0.0)
    assert f"images={run.settings.long}" in reproduce.keys(run, "long", 0.0)


def test_the_published_rows_give_the_published_verdicts(tmp_path):
    claim = saved(ROOT / "lesson_05/sublesson_a/results/claim.json")
    holds = {letter: one["holds"] for letter, one in claim.claims.items()}
    assert holds == {"a": True, "b": False, "c": False, "d": False}
    assert judged(claim.rows) == (holds["a"], holds["c"], holds["d"])
    assert claim.rows.below("few, p = 0.3", "few, p = 0.0", "copies") == holds["b"]
    assert claim.rows.mean("copies", arm="few, p = 0.3") < claim.rows.mean("copies", arm="few, p = 0.0")
    assert reproduce.plot(claim, tmp_path / "claim.png").stat().st_size > 5_000
