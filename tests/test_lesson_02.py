"""Lesson 02: the maths of DPM against closed forms, lesson 05 and diffusers' DDPMScheduler with the same beta."""

import json
import math
from pathlib import Path

import pytest
import torch

from conftest import load
from utils import UserError
from utils.config import Section
from utils.seeds import generators

model = load("lesson_02", "model")
DPM, Binomial = model.DPM, model.Binomial
FIXTURE = Path(__file__).parent / "fixtures" / "dpm_posterior.json"


def times(*values):
    return torch.tensor(values)


def zero(coefficients=(2, 10)):
    """A network that answers zero for points or images."""
    return lambda x: torch.zeros(len(x), *coefficients, *x.shape[1:], dtype=x.dtype)


def unread(dpm):
    """The same process with a bump of its own for every t, so that a network may answer freely at every t."""
    dpm.basis = torch.eye(dpm.timesteps, dtype=torch.float64)
    return dpm


class Exact:
    """The exact reverse step for independent pixels N(0, v), as coefficients of an `unread` process. x (B, D)."""

    def __init__(self, dpm, v):
        t = torch.arange(1, dpm.timesteps)
        beta, abar = dpm.beta(t, t - 1)[:, None], dpm.abar[t - 1][:, None]
        before = abar * v + 1 - abar                        # variance of x_{t-1}, (T - 1, D)
        self.variance = 1 / (1 / before + (1 - beta) / beta)
        self.slope = ((1 - beta).sqrt() / beta * self.variance - (1 - beta).sqrt()) / beta.sqrt()
        self.z = math.sqrt(dpm.timesteps) * (torch.logit(self.variance) - torch.logit(beta))

    def __call__(self, x):
        mean = torch.cat([torch.zeros_like(self.slope[:1]), self.slope]) * x.double()[:, None]      # (B, T, D)
        z = torch.cat([torch.zeros_like(self.z[:1]), self.z]).expand_as(mean)
        return torch.stack([mean, z], dim=1).to(x.dtype)


# ------------------------------------------------------------------ schedule, basis, forward process
def test_reference_values_of_the_schedule():
    dpm = DPM()
    beta = dpm.beta(torch.arange(1000), torch.arange(1000) - 1)
    assert dpm.abar.dtype == torch.float64 and dpm.abar[-1] == 1
    assert beta[0].item() == pytest.approx(2.0e-3, rel=1e-3) and beta[999].item() == pytest.approx(0.5, rel=1e-4)
    assert dpm.abar[999].item() == pytest.approx(9.9e-4, rel=1e-2)
    logit = torch.logit(1 / torch.linspace(1000, 2, 1000, dtype=torch.float64))         # as the released code writes it
    lowest = 1e-6 + 1e-3 * (torch.arange(1000) == 0).double()
    assert torch.allclose(beta, lowest + torch.sigmoid(logit) * (1 - lowest - 1e-5), atol=1e-7)


def test_bumps():
    basis = model.temporal_basis(1000, 10)
    assert basis.shape == (1000, 10) and torch.allclose(basis.sum(1), torch.ones(1000).double())
    assert torch.allclose(basis, basis.flip(0, 1))
    time = -1 + 2 * 300 / 999
    bump = [math.exp(-(time - (-1 + 2 * j / 9)) ** 2 / (2 * (1 / 9) ** 2)) for j in range(10)]
    assert basis[300].tolist() == pytest.approx([b / sum(bump) for b in bump], abs=1e-12)
    assert ((basis[1:] - basis[:-1]).abs().amax(1) > 1e-3).all()                        # neighbouring times differ


def test_log_snr_at_three_times():
    dpm, one, nothing = DPM(), torch.ones(3, 1), torch.zeros(3, 1)
    t = times(100, 500, 900)
    signal, noise = dpm.q_sample(one, t, nothing)[:, 0], dpm.q_sample(nothing, t, one)[:, 0]
    expected = (dpm.abar[t] / (1 - dpm.abar[t])).log()
    assert torch.allclose((signal ** 2 / noise ** 2).log().double(), expected, atol=1e-4)
    share = 1 - t / 1000                                    # with beta = 1 / (T - t) the signal falls in a line
    assert dpm.abar[t].tolist() == pytest.approx(share.tolist(), abs=3e-3)


@pytest.mark.parametrize("values", [dict(timesteps=2), dict(bumps=1)])
def test_process_refuses(values):
    with pytest.raises(ValueError):
        DPM(**values)


# ------------------------------------------------------------------ data
def test_dequantisation_is_as_wide_as_a_grey_level_of_the_standardised_data():
    dpm = DPM(mean=-0.74, std=0.62, levels=256)
    x = dpm.standardise(torch.full((1, 1, 200, 200), -1.0), torch.Generator().manual_seed(0))
    width = 2 / 255 / 0.62                                  # times 1 / std, not divided by it
    assert (x.max() - x.min()).item() == pytest.approx(width, rel=1e-2)
    assert x.std().item() == pytest.approx(width / math.sqrt(12), rel=2e-2)
    assert x.mean().item() == pytest.approx((-1 + 0.74) / 0.62, abs=1e-4)
    levels = (torch.arange(256) / 127.5 - 1)[:, None].expand(256, 50)
    back = dpm.restore(dpm.standardise(levels, torch.Generator().manual_seed(1)))
    assert (back - levels).abs().max() < 1 / 255 + 1e-6     # no grey level is lost
    assert torch.equal(DPM().standardise(levels), levels)                               # continuous data stay


def test_a_background_without_width_has_no_bound():
    # All pixels alike: the steps can be exact, and the bound grows without end as the first step shrinks.
    limits = [DPM(first=first).bits(0.0) for first in (1e-2, 1e-3, 1e-4)]
    assert limits == sorted(limits) and limits[2] - limits[1] > 0.4
    assert DPM().bits(0.0) == pytest.approx(0.5 * math.log2((1 - DPM().abar[999].item()) / 2.0e-3), abs=2e-3)


# ------------------------------------------------------------------ posterior q(x_{t-1} | x_t, x_0)
@pytest.mark.parametrize("t", [1, 2, 30, 500, 999])
def test_posterior_adds_precisions(t):
    dpm = DPM()
    x0, xt = torch.full((1, 2), 0.3, dtype=torch.float64), torch.full((1, 2), -0.8, dtype=torch.float64)
    beta, abar = dpm.beta(times(t), times(t - 1)).item(), dpm.abar[t - 1].item()
    cov1, cov2 = 1 - abar, beta / (1 - beta)
    precision = 1 / cov1 + 1 / cov2
    mean = (math.sqrt(abar) * 0.3 / cov1 - 0.8 / (math.sqrt(1 - beta) * cov2)) / precision
    assert dpm.beta_tilde(times(t), times(t - 1)).item() == pytest.approx(1 / precision, rel=1e-9)
    assert dpm.q_posterior(x0, xt, times(t), times(t - 1))[0, 0].item() == pytest.approx(mean, rel=1e-9)


def test_posterior_equals_that_of_lesson_05():
    dpm, ddpm = DPM(), load("lesson_05", "model").DDPM()
    ddpm.abar = dpm.abar
    x0, xt = torch.rand(6, 1, 4, 4) * 2 - 1, torch.randn(6, 1, 4, 4)
    t = times(1, 5, 100, 500, 900, 999)
    assert torch.allclose(dpm.q_posterior(x0, xt, t, t - 1), ddpm.q_posterior(x0, xt, t, t - 1), atol=1e-6)
    assert torch.equal(dpm.beta_tilde(t, t - 1), ddpm.beta_tilde(t, t - 1))
    assert torch.allclose(dpm.q_sample(x0, t, xt), ddpm.q_sample(x0, t, xt), atol=1e-6)


# ------------------------------------------------------------------ the readout and the learned step
def test_readout_by_hand():
    dpm, coefficients = DPM(), torch.randn(2, 2, 10, 3, generator=torch.Generator().manual_seed(0))
    xt, t = torch.randn(2, 3), times(7, 640)
    mean, variance = dpm.p_step(lambda x: coefficients, xt, t)
    for i in range(2):
        beta = dpm.beta(t[i:i + 1], t[i:i + 1] - 1).item()
        for d in range(3):
            z = [sum(coefficients[i, k, j, d].item() * dpm.basis[t[i], j].item() for j in range(10)) for k in (0, 1)]
            assert mean[i, d].item() == pytest.approx(math.sqrt(1 - beta) * xt[i, d].item() + math.sqrt(beta) * z[0],
                                                      abs=1e-5)
            logit = z[1] / math.sqrt(1000) + math.log(beta / (1 - beta))
            assert variance[i, d].item() == pytest.approx(1 / (1 + math.exp(-logit)), rel=1e-4)


def test_jump_of_one_step_is_the_step():
    dpm, net = DPM(), model.PointNet(2, 16, 1)
    torch.nn.init.normal_(net.layers[-1].weight)
    xt, t = torch.randn(4, 2), times(1, 30, 500, 999)
    mean, variance, x0 = dpm.p_jump(net, xt, t, t - 1)
    short = dpm.p_step(net, xt, t)
    assert torch.allclose(mean, short[0], atol=1e-5) and torch.allclose(variance, short[1], rtol=1e-5)
    assert torch.allclose(dpm.q_posterior(x0, xt, t, t - 1), mean, atol=1e-5)


# ------------------------------------------------------------------ the bound
def test_bound_of_a_network_that_answers_zero_is_that_of_a_unit_gaussian():
    # The forward kernel leaves N(0, 1) as it is. Any data with second moment 1 then have the bound of a unit Gaussian.
    dpm, generator = DPM(60, 1e-2), torch.Generator().manual_seed(0)
    for x0 in (torch.randn(3000, 8, generator=generator), (torch.rand(3000, 8, generator=generator) < 0.5) * 2.0 - 1):
        bits, terms = dpm.bound(zero(), x0, generator)
        assert terms.shape == (3000, 59)
        assert bits.mean().item() == pytest.approx(0, abs=4 * bits.std().item() / 3000 ** 0.5 + 2e-3)
        assert bits.std().item() / 3000 ** 0.5 < 0.01


def test_bound_of_the_exact_steps():
    # Independent pixels of variances 1.9 and 0.1. With exact steps the bound is minus the entropy of x^(1), but for
    # p(x_T), which is a unit Gaussian and not quite q(x_T).
    v = torch.tensor([1.9, 0.1], dtype=torch.float64)
    dpm = unread(DPM(50, 1e-2))
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(4000, 2, generator=generator, dtype=torch.float64) * v.sqrt()
    bits, _ = dpm.bound(Exact(dpm, v), x0.float(), generator)
    first, last = (dpm.abar[t] * v + 1 - dpm.abar[t] for t in (0, 49))
    exact = -0.5 * first.log2() - 0.5 * (last - 1 - last.log()) / math.log(2)
    assert bits.mean().item() == pytest.approx(exact.mean().item(), abs=4 * bits.std().item() / 4000 ** 0.5)
    assert bits.std().item() / 4000 ** 0.5 < 0.015 and exact.mean() > 0.4


def test_kl_of_two_gaussians():
    dpm, net = DPM(), model.PointNet(2, 16, 1)
    torch.nn.init.normal_(net.layers[-1].weight)
    x0, xt, t = torch.randn(5, 2), torch.randn(5, 2), times(1, 2, 70, 500, 999)
    mean, variance = dpm.p_step(net, xt, t)
    q = torch.distributions.Normal(dpm.q_posterior(x0, xt, t, t - 1), dpm.beta_tilde(t, t - 1).sqrt()[:, None].float())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(mean, variance.sqrt())).mean(1)
    assert torch.allclose(dpm.kl(net, x0, xt, t), kl, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chain, x0", [(DPM(20, 0.05), torch.randn(20_000, 2)),
                                       (Binomial(20), (torch.rand(20_000, 2) < 0.3).float())])
def test_loss_is_minus_the_bound(chain, x0):
    # One time each, times T - 1: on average the sum over all times.
    torch.manual_seed(0)
    net = zero() if isinstance(chain, DPM) else lambda x, t: torch.zeros_like(x)
    losses = torch.stack([chain.loss(net, x0) for _ in range(30)])
    bound = chain.bound(net, x0, torch.Generator().manual_seed(1))[0].mean()
    assert -losses.mean().item() == pytest.approx(bound.item(), abs=4 * losses.std().item() / 30 ** 0.5 + 5e-3)


@pytest.mark.parametrize("chain", [DPM(4, 0.05), Binomial(4)])
def test_time_0_is_never_asked_for(chain, monkeypatch):
    seen, real = [], chain.kl
    monkeypatch.setattr(chain, "kl", lambda net, x0, xt, t: (seen.extend(t.tolist()), real(net, x0, xt, t))[1])
    net = zero() if isinstance(chain, DPM) else lambda x, t: torch.zeros_like(x)
    assert chain.loss(net, torch.ones(500, 2)).isfinite()
    assert sorted(set(seen)) == [1, 2, 3]
    assert chain.bound(net, torch.ones(5, 2))[0].isfinite().all() and 0 not in seen


def test_one_point_can_be_overfitted():
    # A single point leaves nothing to guess: no step diverges, and the bound comes near bits(0). It starts near 0.
    torch.manual_seed(0)
    dpm, net, x0 = DPM(20, 0.05, bumps=5), model.PointNet(2, 32, 2, bumps=5), torch.tensor([[1.0, -1.0]]).expand(128, 2)
    assert dpm.bound(net, x0[:64])[0].mean().abs() < 0.2
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 150)
        loss = dpm.loss(net, x0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert dpm.bits(0.0) - 0.2 < dpm.bound(net, x0)[0].mean().item() < dpm.bits(0.0)


# ------------------------------------------------------------------ the walk back
def test_walk_back_with_exact_steps():
    v = torch.tensor([1.9, 0.1], dtype=torch.float64)
    dpm = unread(DPM(50, 1e-2, mean=0.5, std=2.0))
    x = dpm.sample(Exact(dpm, v), 8000, generator=torch.Generator().manual_seed(0))
    end = dpm.abar[0] * v + 1 - dpm.abar[0]                 # of x^(1); p(x_T) costs a little
    assert x.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.1)
    assert (x.var(0) / 4).tolist() == pytest.approx(end.tolist(), rel=0.06)


def test_visited_times():
    dpm = DPM()
    visited = [t for t, _, _ in dpm.reverse(zero(), torch.zeros(2, 2), 50)]
    assert visited[0] == 999 and visited[-1] > 0 and len(set(visited)) == 50
    assert [t for t, _, _ in DPM(5).reverse(zero(), torch.zeros(2, 2))] == [4, 3, 2, 1]     # ends at t = 0: x^(1)
    for steps in (0, 1000):
        with pytest.raises(ValueError, match="steps"):
            list(dpm.reverse(zero(), torch.zeros(2, 2), steps))


def test_same_generator_same_samples():
    torch.manual_seed(0)
    dpm, net = DPM(10, 0.05), model.PointNet(2, 8, 1).eval()
    a, b, c = (dpm.sample(net, 3, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    bits, net = Binomial(10), model.MLP((20,), 8, 1).eval()
    a, b, c = (bits.sample(net, 3, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and set(a.unique().tolist()) <= {0.0, 1.0}


# ------------------------------------------------------------------ posteriors
def test_denoise_is_the_product_of_two_gaussians():
    grid = torch.linspace(-6, 6, 20001, dtype=torch.float64)
    normal = torch.distributions.Normal
    product = (normal(0.4, 0.3).log_prob(grid) + normal(grid, 0.5).log_prob(torch.tensor(1.1))).softmax(0)
    mean = (product * grid).sum()
    variance = (product * (grid - mean) ** 2).sum()
    got = model.denoise(torch.tensor(1.1), 0.5)(torch.tensor(0.4), torch.tensor(0.09))
    assert [g.item() for g in got] == pytest.approx([mean.item(), variance.item()], rel=1e-4)


def test_denoise_is_guide_where_the_steps_are_small():
    mean, variance, y = torch.randn(50), torch.full((50,), 1e-3), torch.randn(50)
    exact = model.denoise(y, 1.0)(mean, variance)
    guided = model.guide(lambda x: y - x)(mean, variance)   # the gradient of log N(y; x, 1)
    assert torch.allclose(exact[0], guided[0], atol=1e-5) and torch.allclose(exact[1], guided[1], rtol=2e-3)


def test_the_same_observation_at_every_step_counts_too_often():
    # README: unit Gaussian data, y = 1, sigma = 1. The posterior has 0.5 and 0.5; the walk ends near 2 / 3 and 1 / 3.
    dpm, r = DPM(), model.denoise(torch.tensor(1.0).double(), 1.0)
    mean, variance = r(torch.zeros(1).double(), torch.ones(1).double())                 # r p(x_T)
    beta = dpm.beta(torch.arange(1000), torch.arange(1000) - 1)
    for t in range(999, 0, -1):
        scale, step = (1 - beta[t]).sqrt(), r(torch.zeros(1).double(), beta[t])
        gain = r(torch.ones(1).double(), beta[t])[0] - step[0]                          # r is linear in the mean
        mean, variance = step[0] + gain * scale * mean, (gain * scale) ** 2 * variance + step[1]
    assert mean.item() == pytest.approx(0.667, abs=1e-3) and variance.item() == pytest.approx(0.334, abs=1e-3)


def test_inpaint_keeps_what_is_known():
    known, mask = torch.randn(4, 2), torch.tensor([[True, False]]).expand(4, 2)
    path = list(DPM(20, 0.05).reverse(zero(), torch.randn(4, 2), r=model.inpaint(known, mask)))
    for _, x, _ in path:
        assert torch.equal(x[:, 0], known[:, 0]) and not torch.equal(x[:, 1], known[:, 1])


def test_guide_moves_the_mean_of_a_gaussian():
    # Unit Gaussian data and r = exp(a x): every step shrinks by sqrt(1 - beta) and moves by beta a.
    dpm, a = DPM(50, 1e-2), 0.3
    x = dpm.sample(zero(), 20_000, generator=torch.Generator().manual_seed(0), r=model.guide(lambda x: a))
    mean = a                                                # p(x_T) exp(a x)
    for t in range(49, 0, -1):
        beta = dpm.beta(times(t), times(t - 1)).item()
        mean = math.sqrt(1 - beta) * mean + beta * a
    assert x.mean(0).tolist() == pytest.approx([mean, mean], abs=0.03)


# ------------------------------------------------------------------ binomial diffusion
def test_schedule_of_the_binomial_chain():
    chain = Binomial(100)
    t = torch.arange(100)
    assert torch.allclose(chain.beta(t, t - 1)[:-1], 1 / (100 - t[:-1].double()), rtol=1e-9)
    assert torch.allclose(chain.abar[:-1], 1 - (t + 1).double() / 100, atol=1e-12) and chain.abar[-1] == 1
    p = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    for i in range(60):                                     # step by step as in one jump
        p = chain.q_bit(p, times(i), times(i - 1))
        assert torch.allclose(p, chain.q_bit(torch.tensor([[1.0, 0.0]]), times(i), times(-1)))


def test_posterior_of_bits_is_bayes_rule():
    chain = Binomial(12)
    for t in (1, 5, 10, 11):
        for a in (0.0, 1.0):
            for b in (0.0, 1.0):
                before = chain.q_bit(torch.tensor([[a]]), times(t - 1), times(-1)).item()
                seen = [chain.q_bit(torch.tensor([[x]]), times(t), times(t - 1)).item() for x in (0.0, 1.0)]
                seen = [s if b else 1 - s for s in seen]
                expected = seen[1] * before / (seen[1] * before + seen[0] * (1 - before))
                got = chain.q_posterior(torch.tensor([[a]]), torch.tensor([[b]]), times(t)).item()
                assert got == pytest.approx(expected, rel=1e-9)


def test_bits_are_drawn_with_their_probability_and_end_as_coins():
    chain, ones = Binomial(50), torch.ones(40_000, 1)
    for t in (0, 20, 49):
        share = chain.q_draw(ones, torch.full((40_000,), t), torch.Generator().manual_seed(t)).mean().item()
        assert share == pytest.approx(0.5 + 0.5 * chain.abar[t].item(), abs=0.01)
    assert chain.abar[49].item() == pytest.approx(0, abs=1e-12)


def test_every_sequence_of_bits_has_its_own_coins():
    chain, net = Binomial(30), lambda x, t: 0.7 * x
    few, more = (chain.sample(net, n, (16,), generators(0, n)) for n in (3, 5))
    assert torch.equal(few, more[:3]) and len(more.unique(dim=0)) == 5


def test_kl_of_two_coins():
    torch.manual_seed(0)
    chain, net = Binomial(30), lambda x, t: 0.7 * x
    x0, xt, t = (torch.rand(6, 5) < 0.5).float(), (torch.rand(6, 5) < 0.5).float(), times(1, 2, 10, 20, 28, 29)
    q = torch.distributions.Bernoulli(chain.q_posterior(x0, xt, t))
    p = torch.distributions.Bernoulli(logits=chain.p_logit(net, xt, t))
    kl = torch.distributions.kl_divergence(q, p).mean(1)
    assert torch.allclose(chain.kl(net, x0, xt, t), kl, rtol=1e-6, atol=1e-9)
    kernel = torch.sigmoid(chain.p_logit(lambda x, t: 0, xt, t))                        # z = 0: the forward kernel
    assert torch.allclose(kernel, chain.q_bit(xt, t, t - 1))


def test_bound_of_coins_is_minus_one_bit():
    # Coins stay coins: with z = 0 every sequence costs one bit a bit, whatever the data.
    chain, generator = Binomial(50), torch.Generator().manual_seed(0)
    x0 = (torch.rand(3000, 10, generator=generator) < 0.2).float()
    bits, terms = chain.bound(lambda x, t: torch.zeros_like(x), x0, generator)
    assert terms.shape == (3000, 49) and (terms >= -1e-12).all()
    assert bits.mean().item() == pytest.approx(-1, abs=4 * bits.std().item() / 3000 ** 0.5)
    assert bits.std().item() / 3000 ** 0.5 < 0.01


# ------------------------------------------------------------------ networks
def test_networks_answer_zero_at_the_start_and_have_the_right_shape():
    for net, shape in ((model.PointNet(2, 8, 1, 10), (2,)), (model.DigitNet(8, 2, 16, 1), (1, 28, 28))):
        x = torch.randn(3, *shape)
        assert net(x).shape == (3, 2, 10, *shape) and torch.equal(net(x), torch.zeros(3, 2, 10, *shape))


def test_digit_net_sees_the_whole_digit_and_keeps_places():
    torch.manual_seed(0)
    net = model.DigitNet(8, 2, 16, 1, bumps=3)
    torch.nn.init.normal_(net.head.weight)
    x = torch.randn(1, 1, 28, 28, requires_grad=True)
    net(x)[0, 0, 0, 0, 3, 3].backward()
    assert (x.grad[0, 0, 20:] != 0).any()                   # by the dense path
    torch.nn.init.zeros_(net.dense[-1].weight)
    x.grad = None
    net(x)[0, 0, 0, 0, 3, 3].backward()
    assert (x.grad[0, 0, :10, :10] != 0).any() and (x.grad[0, 0, 12:] == 0).all()


# ------------------------------------------------------------------ the scripts
def test_drawn_data():
    train = load("lesson_02", "train")
    beats = train.heartbeat(500, torch.Generator().manual_seed(0))
    assert (beats.sum(1) == 4).all() and len(beats.unique(dim=0)) == 5
    assert torch.equal(beats[:, :15], beats[:, 5:])
    drawn = train.Drawn(Section(data="swiss_roll", batch_size=8, seed=0))
    a = drawn.batch(3)[0]
    assert torch.equal(a, drawn.batch(3)[0]) and not torch.equal(a, drawn.batch(4)[0])
    assert torch.equal(torch.cat([drawn.batch(3, rank, 2)[0] for rank in (0, 1)]), torch.cat([a[::2], a[1::2]]))
    with pytest.raises(UserError, match="data=moons"):
        train.main(["data=moons", "smoke=true", "device=cpu", "gpu=false"])


def test_scale_gives_second_moment_one():
    train = load("lesson_02", "train")
    drawn = train.Drawn(Section(data="swiss_roll", batch_size=8, seed=0))
    x = DPM(**train.scale(drawn)).standardise(drawn.draw(20_000, torch.Generator().manual_seed(1)))
    assert x.mean().item() == pytest.approx(0, abs=0.02) and x.square().mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("data, shape", [("swiss_roll", (30, 2)), ("heartbeat", (30, 20))])
def test_points_and_bits_can_be_trained_and_drawn(data, shape, tmp_path):
    keys = ["smoke=true", "device=cpu", "gpu=false", "threads=1", f"runs={tmp_path}"]
    result = load("lesson_02", "train").main([*keys, f"data={data}"])
    assert len([record for record in result.records if "bound" in record]) == 2
    x = load("lesson_02", "sample").main([*keys, "n=30"])
    assert x.shape == shape and x.isfinite().all()
    with pytest.raises(UserError, match="gif"):
        load("lesson_02", "sample").main([*keys, "n=30", "gif=way.gif"])
    why = "steps=99: of 19 steps, " + ("all are taken" if data == "heartbeat" else "no more can be taken")
    with pytest.raises(UserError, match=why):          # 19 is T - 1 in smoke mode
        load("lesson_02", "sample").main([*keys, "n=30", "steps=99"])


# ------------------------------------------------------------------ diffusers
def test_posterior_equals_the_fixture_of_diffusers():
    dpm = DPM()
    for case in json.loads(FIXTURE.read_text())["cases"]:
        x0, xt = (torch.tensor([case[key]], dtype=torch.float64) for key in ("x0", "x"))
        t = times(case["t"])
        assert dpm.q_posterior(x0, xt, t, t - 1)[0].tolist() == pytest.approx(case["mean"], abs=5e-5)
        assert dpm.beta_tilde(t, t - 1).item() == pytest.approx(case["variance"], rel=2e-3)     # diffusers: float32


def test_fixture_is_what_diffusers_gives():
    diffusers = pytest.importorskip("diffusers", reason="dev reference: pip install -e '.[reference]'")
    assert json.loads(FIXTURE.read_text())["cases"] == make_fixture(diffusers)["cases"]


def make_fixture(diffusers):
    """A step of diffusers' DDPMScheduler with this lesson's beta. `python tests/test_lesson_02.py` writes it."""
    import diffusers.schedulers.scheduling_ddpm as scheduling

    steps = torch.arange(1000)
    beta = DPM().beta(steps, steps - 1).float().numpy()
    scheduler = diffusers.DDPMScheduler(1000, trained_betas=beta, prediction_type="sample", variance_type="fixed_small",
                                        clip_sample=False)
    no_noise, real, cases = (lambda shape, **_: torch.zeros(shape)), scheduling.randn_tensor, []
    scheduling.randn_tensor = no_noise
    try:
        for t in (1, 20, 500, 998):
            x, x0 = torch.tensor([-1.2, -0.3, 0.4, 1.5]), torch.tensor([-0.42, 2.8, 0.1, -0.42])
            mean = scheduler.step(x0[None], t, x[None]).prev_sample[0]
            cases.append({"t": t, "x": x.tolist(), "x0": x0.tolist(), "mean": mean.tolist(),
                          "variance": scheduler._get_variance(t).item()})
    finally:
        scheduling.randn_tensor = real
    return {"diffusers": diffusers.__version__, "cases": cases}


if __name__ == "__main__":
    import diffusers

    FIXTURE.write_text(json.dumps(make_fixture(diffusers), indent=0) + "\n")
