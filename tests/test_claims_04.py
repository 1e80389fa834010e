"""Lesson 04: what decides its claims, on made-up rows; what they are measured with; the published claim."""

import statistics

import pytest
import torch

from conftest import ROOT, load
from utils import Rows, Section, below, deviation, saved

reproduce = load("lesson_04", "reproduce")


# ------------------------------------------------------------------ the rules
def rows(raw, ema):
    """FIDs of the snapshots at steps 10 and 20 of three seeds, for the weights as they are and averaged."""
    return Rows([{"arm": reproduce.DATA, "kind": kind, "step": step, "seed": seed, "fid": table[seed][k]}
                 for k, step in enumerate((10, 20)) for kind, table in (("raw", raw), ("ema", ema))
                 for seed in range(3)])


RAW, EMA = [[20, 30], [21, 30], [20, 31]], [[10, 11], [10, 12], [10, 11]]


@pytest.mark.parametrize("raw, ema, lower, calmer", [
    (RAW, EMA, True, True),
    (RAW, [[10, 11], [10, 25], [10, 11]], True, False),                         # one seed varies more than the raw one
    (RAW, [[24, 25], [25, 26], [27, 28]], False, True),                         # one seed has a higher mean
    (EMA, RAW, False, False),
    ([[20, 30], [90, 30], [20, 31]], EMA, False, False),                        # lower in every seed, but by chance
])
def test_averaging_is_judged_by_mean_and_by_deviation(raw, ema, lower, calmer):
    table = rows(raw, ema)
    assert reproduce.of_each_seed(table, "raw") == raw
    assert (reproduce.calmer(table, statistics.mean), reproduce.calmer(table, deviation)) == (lower, calmer)


def test_the_published_rows_give_the_published_verdicts(tmp_path):
    claim = saved(ROOT / "lesson_04" / "results" / "claim.json")
    no = "not reproduced at this scale"
    assert {letter: one["verdict"] for letter, one in claim.claims.items()} == {
        "a1": "exact", "a2": "reproduced", "b1": no, "b2": "reproduced", "c1": "reproduced", "c2": "reproduced",
        "d1": no, "d2": no}
    assert not reproduce.calmer(claim.rows, statistics.mean) and reproduce.calmer(claim.rows, deviation)
    low, high = (reproduce.shares(claim.rows, key) for key in ("fid_low", "fid"))
    assert min(low) > 0.1 and below(high, low, 1 / 3)
    averaged = claim.rows.where(kind="ema", step=160)
    assert not averaged.above(reproduce.DATA, reproduce.SMALL, "recall")
    assert not averaged.above(reproduce.SMALL, reproduce.DATA, "off")
    assert reproduce.plot(claim, tmp_path / "claim.png").stat().st_size > 5_000
    assert reproduce.techniques(claim, tmp_path / "techniques.png").stat().st_size > 5_000


# ------------------------------------------------------------------ what is measured
def test_constants_of_the_papers_models():
    table = reproduce.constants(Section(sigma_1=17.0, sigma_L=0.01))
    assert [f"{row['epsilon']:.1e}" for row in table["paper"].values()] == ["6.2e-06", "3.3e-06"]
    assert all(abs(row["overlap"] - 0.5) < 0.1 for row in table["paper"].values())
    assert table["mnist"]["levels"] == 95 and table["mnist"]["epsilon"]["10"] == pytest.approx(8.6e-6, rel=0.01)


def test_exact_score_of_a_few_images():
    # The gradient of the log of the density by automatic differentiation, at a large and at a small noise.
    torch.manual_seed(0)
    process, images = reproduce.Exact(2.0, 0.1, dim=100), torch.rand(7, 16, dtype=torch.float64)
    for i in (0, process.levels - 1):
        x = torch.rand(3, 1, 4, 4, dtype=torch.float64, requires_grad=True)
        distance2 = (x.flatten(1)[:, None] - images).square().sum(2)
        (-distance2 / (2 * process.sigmas[i] ** 2)).logsumexp(1).sum().backward()
        score = process.score(images, x.detach(), torch.full((3,), i))
        assert torch.allclose(score, x.grad, rtol=1e-4, atol=1e-4)


def test_chains_with_the_exact_score_end_at_images():
    torch.manual_seed(0)
    images = (torch.rand(5, 784) > 0.8).float()
    x = reproduce.Exact(17.0).sample(images, 40, 2, generator=torch.Generator().manual_seed(0)).flatten(1)
    assert torch.cdist(x, images).min(1).values.max() < 1e-3 and len(torch.cdist(x, images).argmin(1).unique()) == 5
