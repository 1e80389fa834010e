"""Lesson 02: what decides its claims, and what they are measured with, against closed forms."""

import math

import pytest
import torch

from conftest import ROOT, load
from utils import Rows, above, saved

model, reproduce = load("lesson_02", "model"), load("lesson_02", "reproduce")
DPM, Binomial = model.DPM, model.Binomial


def times(*values):
    return torch.tensor(values)


# ------------------------------------------------------------------ the rules
def test_a_bound_rises_only_if_it_does_at_every_look_in_every_seed():
    rows = Rows([{"arm": "digits", "seed": 0, "history": {"1": 0.5, "2": 0.7}},
                 {"arm": "heartbeat", "seed": 0, "bits": -2.5},
                 {"arm": "digits", "seed": 1, "history": {"1": 1, "2": 2}}])
    bounds = reproduce.histories(rows)
    assert bounds == [[0.5, 0.7], [1, 2]] and reproduce.rises(bounds)
    assert not reproduce.rises([[0.5, 0.7], [2, 1]]) and not reproduce.rises([[1, 1]])
    assert not reproduce.rises([[math.inf, math.inf]])                                  # an arm that diverged


def test_the_published_rows_give_the_published_verdicts(tmp_path):
    claim = saved(ROOT / "lesson_02" / "results" / "claim.json")
    assert {letter: one["verdict"] for letter, one in claim.claims.items()} == {
        **dict.fromkeys(("a", "b1", "b2", "c2"), "reproduced"), "c1": "not reproduced at this scale"}
    assert all(-2.6 <= bits <= reproduce.TRUTH for bits in claim.rows.values("bits", arm="heartbeat"))
    bounds = reproduce.histories(claim.rows)
    assert reproduce.rises(bounds) and above([values[-1] for values in bounds], [2] * 3)
    for task in reproduce.POSTERIORS:
        ours, other = (claim.rows.values(key, task=task) for key in ("mean_of_samples", "baseline"))
        assert all(a > b for a, b in zip(ours, other)) and above(ours, other) is (task == "denoising")
    assert reproduce.plot(claim, tmp_path / "claim.png").stat().st_size > 5_000


# ------------------------------------------------------------------ what is measured
def test_bits_per_dim_of_a_gaussian():
    # Coding N(0, 1) data whose grey levels are 2 / 255 / std wide: the density's entropy less the log of the width.
    dpm = DPM(mean=-0.74, std=0.62, levels=256)
    entropy = torch.distributions.Normal(0.0, 1.0).entropy().item() / math.log(2)
    assert reproduce.bits_per_dim(dpm, 0.0) == pytest.approx(entropy - math.log2(2 / 255 / 0.62))
    assert reproduce.bits_per_dim(dpm, 3.0) == pytest.approx(reproduce.bits_per_dim(dpm, 0.0) - 3)


def test_wiener_filter_is_the_best_linear_estimate():
    generator = torch.Generator().manual_seed(0)
    mix = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    x = torch.randn(50_000, 2, generator=generator) @ mix.T
    y = x + torch.randn(x.shape, generator=generator)
    estimate = reproduce.wiener_filter(x, y, 1.0)
    design = torch.cat([y, torch.ones(len(y), 1)], dim=1)
    fitted = design @ torch.linalg.lstsq(design, x).solution
    assert (estimate - fitted).abs().max() < 0.05
    assert (estimate - x).square().mean() < 0.5 * (y - x).square().mean()
    everywhere = torch.ones_like(x, dtype=torch.bool)
    assert reproduce.psnr(x + 0.2, x, everywhere) == pytest.approx(20, abs=1e-3)                # 10 log10(4 / 0.04)


# ------------------------------------------------------------------ the exact steps of a heartbeat
def test_exact_heartbeat_steps():
    # Against the joint distribution of x_0, x_{t-1} and x_t, added up over all of them.
    chain, size = Binomial(8), 4
    exact = reproduce.ExactHeartbeat(chain, size, 2)
    every = torch.tensor([[(i >> k) & 1 for k in range(size)] for i in range(2 ** size)]).float()
    for i in (1, 4, 7):
        t, data = torch.full((len(every),), i), [torch.tensor([[1.0, 0, 1, 0]]), torch.tensor([[0.0, 1, 0, 1]])]
        weight = sum(of(every, chain.q_bit(x0, t - 1, torch.full_like(t, -1))) for x0 in data)          # of x_{t-1}
        for xt in every[[0, 5, 7]]:
            joint = weight * of(xt, chain.q_bit(every, t, t - 1))
            expected = (joint[:, None] * every).sum(0) / joint.sum()
            one = xt[None].double()
            got = torch.sigmoid(chain.p_logit(exact, one, t[:1]))[0]
            assert got.tolist() == pytest.approx(expected.tolist(), rel=1e-6)


def of(x, p):
    """The probability of bits x, given the probability of each to be 1; (B,)."""
    return torch.where(x == 1, p, 1 - p).prod(1)


def test_bound_of_the_exact_heartbeat_steps():
    # Nothing factorised does better; it stays below log2(1 / 5) and comes nearer with more steps.
    x0, bounds = load("lesson_02", "train").heartbeat(100, torch.Generator().manual_seed(0)), []
    for timesteps in (50, 250):
        chain = Binomial(timesteps)
        bits, _ = chain.bound(reproduce.ExactHeartbeat(chain), x0, torch.Generator().manual_seed(1))
        bounds.append(20 * bits.mean().item())
    assert bounds[0] < bounds[1] - 0.3 and -3 < bounds[1] < -math.log2(5)
