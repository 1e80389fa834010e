"""Lesson 07: the maths of the SDEs against closed forms, exact Gaussians, lesson 05, and diffusers' schedulers."""

import json
import math
from pathlib import Path

import pytest
import torch

from conftest import load

model = load("lesson_07", "model")
SDE, VP, SubVP, VE, EPS = model.SDE, model.VP, model.SubVP, model.VE, model.EPS
FIXTURE = Path(__file__).parent / "fixtures" / "score_sde_schedulers.json"
SMALL = dict(channels=8, mults=(1, 2), blocks=1, attention=(), dropout=0.0, groups=4, patch=2)
ALL = pytest.mark.parametrize("sde", [SDE("vp"), SDE("subvp"), SDE("ve")], ids=["vp", "subvp", "ve"])


def times(*values):
    return torch.tensor(values, dtype=torch.float64)


class Gaussian:
    """What an exact network predicts for data N(mean, cov), -std times the score; x (..., D)."""

    def __init__(self, sde, mean, cov):
        self.sde, self.mean, self.cov, self.seen = sde, mean, cov, []
        self.values, self.vectors = torch.linalg.eigh(cov)

    def __call__(self, x, label):
        t = label / 999
        self.seen.append(float(t.min()))
        m, std = (model.wide(one, x) for one in self.sde.noising.marginal(t))
        if isinstance(self.sde.noising, VE):
            x = x * (1 + std ** 2).sqrt()                                       # undo VE's scaling of the input
        y = (x - m * self.mean) @ self.vectors
        return std * (y / (m ** 2 * self.values + std ** 2)) @ self.vectors.T


def gaussian(sde, dim=3, seed=0):
    """An exact network for a correlated Gaussian, its mean and covariance."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(dim, dim, generator=generator, dtype=torch.float64) * 0.4
    cov = root @ root.T + 0.3 * torch.eye(dim, dtype=torch.float64)
    mean = 0.5 * torch.randn(dim, generator=generator, dtype=torch.float64)
    return Gaussian(sde, mean, cov), mean, cov


# ------------------------------------------------------------------ the three SDEs
@ALL
def test_marginals_solve_the_equations_of_the_moments(sde):
    # dm/dt = a m and dv/dt = 2 a v + g^2, from the smallest time on: `coefficients` and `marginal` tell the same SDE.
    t = torch.linspace(EPS, 1, 20_001, dtype=torch.float64)
    middle, dt = (t[1:] + t[:-1]) / 2, (t[1:] - t[:-1])
    a, g = sde.noising.coefficients(middle)
    m, std = sde.noising.marginal(t)
    integral = torch.cat([torch.zeros(1), (a * dt).cumsum(0)])
    assert torch.allclose(m, m[0] * integral.exp(), rtol=1e-6)
    decay, noise = ((2 * a * dt).exp().tolist(), (g ** 2 * dt * (a * dt).exp()).tolist())
    variance = std[0].item() ** 2
    for i in range(len(dt)):                                # exact for the drift, midpoint for the noise
        variance = variance * decay[i] + noise[i]
        if i % 5000 == 4999:
            assert variance == pytest.approx(std[i + 1].item() ** 2, rel=1e-5)


def test_reference_values():
    vp, sub, ve, one = VP(), SubVP(), VE(sigma_max=50.0), times(1.0)
    assert vp.marginal(one)[0].item() ** 2 == pytest.approx(math.exp(-10.05)) == pytest.approx(4.32e-5, rel=1e-3)
    assert load("lesson_05", "model").DDPM().abar[999].item() == pytest.approx(4.04e-5, rel=2e-3)  # the chain's
    t = times(0.5)
    log_m = -0.25 * 0.25 * 19.9 - 0.5 * 0.5 * 0.1
    assert vp.marginal(t)[1].item() == pytest.approx(math.sqrt(1 - math.exp(2 * log_m)))
    assert sub.marginal(t)[1].item() == pytest.approx(1 - math.exp(2 * log_m))
    assert sub.coefficients(t)[1].item() ** 2 == pytest.approx(10.05 * (1 - math.exp(-2 * 0.1 * 0.5 - 19.9 * 0.25)))
    assert ve.marginal(t)[1].item() == pytest.approx(math.sqrt(0.01 * 50)) and ve.prior_std == 50
    assert ve.coefficients(t)[1].item() == pytest.approx(math.sqrt(0.5) * math.sqrt(2 * math.log(5000)))
    assert vp.marginal(times(EPS))[1].item() == pytest.approx(1.0005e-3, rel=1e-3)
    single = vp.marginal(torch.tensor([EPS]))[1].item()     # float32 keeps the digits
    assert single == pytest.approx(vp.marginal(times(EPS))[1].item(), rel=1e-5)


def test_sub_vp_has_less_variance_and_ends_alike():
    t = torch.linspace(0.01, 1, 100, dtype=torch.float64)
    (m, vp), (n, sub) = VP().marginal(t), SubVP().marginal(t)
    assert torch.equal(m, n) and (sub < vp).all() and sub[-1].item() == pytest.approx(1, abs=1e-4)


@ALL
def test_log_snr_at_three_times(sde):
    # The convention box: signal and noise read off from q_sample.
    t, one, zero = times(0.1, 0.5, 0.9), torch.ones(3, 1, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
    signal, noise = sde.q_sample(one, t, zero).flatten(), sde.q_sample(zero, t, one).flatten()
    abar = (-0.5 * t ** 2 * 19.9 - 0.1 * t).exp()
    expected = {VP: (abar / (1 - abar)).log(), SubVP: (abar / (1 - abar) ** 2).log(),
                VE: -2 * (math.log(0.01) + t * math.log(3400))}[type(sde.noising)]
    assert torch.allclose(2 * (signal.log() - noise.log()), expected, atol=1e-9)


def test_chains_have_the_sdes_as_their_limit():
    # DDPM's and SMLD's chains, walked with all their steps, end at the marginal of the SDE.
    for sde, tolerance in ((VP(), 0.01), (VE(), 1e-9)):
        t = torch.linspace(EPS, 1, 1000, dtype=torch.float64)
        m, std = sde.marginal(t)
        mean, variance = m[0], std[0] ** 2
        for i in range(1, len(t)):
            f, G = sde.discretize(torch.ones(1, 1, dtype=torch.float64), t[i:i + 1], t[i - 1:i])
            mean, variance = mean * (1 + f.item()), variance * (1 + f.item()) ** 2 + G.item() ** 2
        assert variance.item() == pytest.approx(std[-1].item() ** 2, rel=tolerance)
        assert mean.item() == pytest.approx(m[-1].item(), rel=0.15)              # the root of 4.04e-5 / 4.32e-5
    t = torch.linspace(0, 1, 1000, dtype=torch.float64)
    beta = VP().step_beta(t, t - 1e-3)
    assert torch.allclose(beta, torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), rtol=1e-5)


# ------------------------------------------------------------------ network input, loss
def test_network_is_fed_999_t():
    asked, time_embedding = [], load("lesson_05", "model").time_embedding
    for kind in ("vp", "subvp", "ve"):
        SDE(kind).score(lambda x, t: asked.append(t) or x, torch.ones(3, 1, 2, 2), torch.tensor([EPS, 0.5, 1.0]))
    for label in asked:
        assert label.tolist() == pytest.approx([0.00999, 499.5, 999])
    steps = torch.linspace(1, 1e-3, 1000)
    embedding = time_embedding(999 * steps, 32)
    assert (embedding[1:] - embedding[:-1]).norm(dim=1).min() > 1e-2
    assert (time_embedding(steps, 32).diff(dim=0).norm(dim=1) < 1e-2).all()   # without the 999


def test_ve_scales_input_and_output():
    x, t = torch.full((1, 1, 2, 2), 34.0), torch.ones(1)
    score = SDE("ve").score(lambda x, t: x, x, t)
    assert torch.allclose(score, -x / math.sqrt(1 + 34.0 ** 2) / 34.0)
    net = model.UNet(**SMALL)
    assert not net(torch.ones(1, 1, 28, 28), t).any()       # starts at 0


@ALL
def test_loss_is_the_weighted_squared_error(sde, monkeypatch):
    torch.manual_seed(0)
    x0 = torch.randn(20_000, 1) * 0.5
    zero = sde.loss(lambda x, t: torch.zeros_like(x), x0)
    assert zero.item() == pytest.approx(1, abs=0.03)                            # |z|^2
    t = torch.full((20_000,), 0.3)
    monkeypatch.setattr(sde, "times", lambda n, device: t)
    net = Gaussian(sde, torch.zeros(1), torch.full((1, 1), 0.25))
    m, std = sde.noising.marginal(torch.tensor(0.3))
    least = (m ** 2 * 0.25 / (m ** 2 * 0.25 + std ** 2)).item()                 # Var[z | x_t]
    assert sde.loss(net, x0).item() == pytest.approx(least, rel=0.05)
    # the same as std^2 times the squared error of the score
    torch.manual_seed(1)
    mine = sde.loss(net, x0)
    torch.manual_seed(1)
    z = torch.randn_like(x0)
    score = sde.score(net, sde.q_sample(x0, t, z), t)
    assert mine.item() == pytest.approx((std ** 2 * (score + z / std) ** 2).mean().item(), rel=1e-4)


def test_training_times():
    torch.manual_seed(0)
    seen = []
    for share in (0.0, 0.25):
        SDE(log_share=share).loss(lambda x, t: seen.append(t / 999) or torch.zeros_like(x), torch.zeros(200_000, 1))
        t = seen[-1]
        assert EPS * 0.999 <= t.min() and t.max() <= 1.001
        below = share * math.log(1e-3 / EPS) / math.log(1 / EPS) + (1 - share) * 1e-3
        assert (t < 1e-3).float().mean().item() == pytest.approx(below, rel=0.1)
        assert (t > 0.5).float().mean().item() == pytest.approx(
            share * math.log(2) / math.log(1 / EPS) + (1 - share) / 2, rel=0.03)


# ------------------------------------------------------------------ predictors and corrector
def test_one_step_of_each_predictor():
    x, score = torch.tensor([[0.7]]).double(), torch.tensor([[-0.4]]).double()
    t, s = times(0.6), times(0.599)
    vp, beta = SDE("vp"), 0.1 + 0.6 * 19.9
    b = beta * 1e-3
    mean, std = vp.euler_maruyama(x, score, t, s)
    assert mean.item() == pytest.approx(0.7 + 0.5 * b * 0.7 - b * 0.4) and std.item() == pytest.approx(math.sqrt(b))
    mean, std = vp.reverse_diffusion(x, score, t, s)
    assert mean.item() == pytest.approx((2 - math.sqrt(1 - b)) * 0.7 - b * 0.4)
    assert std.item() == pytest.approx(b ** 0.5)
    mean, std = vp.noising.ancestral(x, score, t, s)
    assert mean.item() == pytest.approx((0.7 - b * 0.4) / math.sqrt(1 - b)) and std.item() == pytest.approx(b ** 0.5)
    ve = SDE("ve")
    a, c = (0.01 * 3400 ** time for time in (0.6, 0.599))
    mean, std = ve.reverse_diffusion(x, score, t, s)
    assert mean.item() == pytest.approx(0.7 - (a * a - c * c) * 0.4)
    assert std.item() == pytest.approx(math.sqrt(a * a - c * c))
    mean, std = ve.euler_maruyama(x, score, t, s)
    assert mean.item() == pytest.approx(0.7 - 2 * math.log(3400) * a * a * 1e-3 * 0.4)
    # of a sub-VP the reverse-diffusion step is Euler's
    assert [one.item() for one in SDE("subvp").reverse_diffusion(x, score, t, s)] == [
        one.item() for one in SDE("subvp").euler_maruyama(x, score, t, s)]


def test_ancestral_step_of_ve_is_the_posterior():
    # Bayes: q(x_s | x_t, x_0) of x_t = x_s + N(0, sigma_t^2 - sigma_s^2), with Tweedie's x_0 for this score.
    ve, t, s = SDE("ve"), times(0.4), times(0.3)
    x, score = torch.tensor([[0.7]]).double(), torch.tensor([[-0.4]]).double()
    a2, c2 = (ve.noising.marginal(one)[1].item() ** 2 for one in (t, s))
    x0 = ve.denoised(x, score, t).item()
    mean, std = ve.noising.ancestral(x, score, t, s)
    assert mean.item() == pytest.approx(c2 / a2 * 0.7 + (1 - c2 / a2) * x0)
    assert std.item() ** 2 == pytest.approx(c2 * (a2 - c2) / a2)


def test_ancestral_step_of_vp_is_lesson_05s():
    old = load("lesson_05", "model").DDPM(variance="large")
    eps, x, i = torch.tensor(0.3).reshape(1, 1, 1, 1), torch.tensor(0.8).reshape(1, 1, 1, 1), torch.tensor([600])
    mean, _ = old.p_mean(lambda *_: eps, x, i, i - 1, clip=False)
    # DDPM counts abar up to and with step i: that is t = (i + 1) / 1000
    t = (i + 1).double() / 1000
    score = -eps / (1 - old.abar[i]).sqrt().float()[:, None, None, None]
    mine, std = VP().ancestral(x, score, t, t - 1e-3)
    assert mine.item() == pytest.approx(mean.item(), abs=1e-4)
    assert std.item() == pytest.approx(old.reverse_variance(i, i - 1).sqrt().item(), rel=2e-3)


@ALL
def test_predictors_agree_for_small_steps(sde):
    torch.manual_seed(0)
    x, score = torch.randn(4, 3).double(), torch.randn(4, 3).double()
    gaps = []
    for dt in (1e-3, 1e-4):
        t, s = times(0.5).repeat(4), times(0.5 - dt).repeat(4)
        steps = [step for step in (sde.euler_maruyama, sde.reverse_diffusion, sde.noising.ancestral) if step]
        means = [step(x, score, t, s)[0] for step in steps]
        gaps.append(max(float((mean - means[0]).abs().max()) for mean in means[1:]))
    assert gaps[1] <= gaps[0] / 80 + 1e-12                                      # second order in the step


@ALL
@pytest.mark.parametrize("predictor", model.PREDICTORS)
@pytest.mark.parametrize("corrections", [0, 1])
def test_samplers_draw_the_gaussian(sde, predictor, corrections):
    if predictor == "ancestral" and isinstance(sde.noising, SubVP) or predictor == "none" and not corrections:
        with pytest.raises(ValueError, match="predictor"):
            list(sde.reverse(lambda x, t: x, torch.zeros(1, 1), 3, predictor, corrections))
        return
    net, mean, cov = gaussian(sde)
    generator = torch.Generator().manual_seed(0)
    x, snr = sde.prior((2000, 3), generator).double(), 0.3 if predictor == "none" else 0.16
    steps, corrections = (60, 12) if predictor == "none" else (200 if corrections else 400, corrections)
    *_, (t, x, _) = sde.reverse(net, x, steps, predictor, corrections, snr, generator)
    assert t == pytest.approx(sde.sampling_eps)
    assert torch.allclose(x.mean(0), mean, atol=0.08) and torch.allclose(torch.cov(x.T), cov, atol=0.15)


@ALL
def test_corrector_keeps_the_distribution(sde):
    # Langevin steps at one time, from q_t itself and from twice as wide a start.
    net, mean, cov = gaussian(sde)
    torch.manual_seed(0)
    t = times(0.4).repeat(4000)
    m, std = (float(one) for one in sde.noising.marginal(times(0.4)))
    wanted = m ** 2 * cov + std ** 2 * torch.eye(3)
    root = torch.linalg.cholesky(wanted)
    for wide, steps in ((1.0, 10), (2.0, 150)):
        x = m * mean + wide * torch.randn(4000, 3).double() @ root.T
        for _ in range(steps):
            x = sde.langevin(x, sde.score(net, x, t), t, t - 1e-3, 0.16, torch.randn_like(x))
        assert torch.allclose(torch.cov(x.T), wanted, rtol=0.1, atol=0.06 * float(wanted.max()))


def test_size_of_the_corrector_step():
    x, score, z = torch.zeros(2, 2).double(), times(3, 4).expand(2, 2), times(0, 1).expand(2, 2)
    for sde, alpha in ((SDE("ve"), 1), (SDE("subvp"), 1), (SDE("vp"), 1 - 20 * 1e-3)):
        step = 2 * alpha * (0.16 * 1 / 5) ** 2
        got = sde.langevin(x, score, times(1, 1), times(0.999, 0.999), 0.16, z)
        assert torch.allclose(got, step * score + math.sqrt(2 * step) * z)


def test_predictor_first_and_calls_are_counted():
    # The paper's order: predict from t to s, then correct at s.
    asked = []
    net = load("lesson_07", "sample").Counted(
        lambda x, t: asked.append(round(float(t[0]) / 999, 4)) or torch.zeros_like(x))
    list(SDE().reverse(net, torch.ones(2, 1), 3, corrections=1))
    assert asked == [1.0, 0.5005, 0.5005, 0.001, 0.001] and net.calls == 5 == 2 * (1 + 1) + 1
    list(SDE().reverse(net, torch.ones(2, 1), 4, "none", corrections=2))
    assert net.calls == 5 + 3 * 2 + 1


def test_last_step_adds_no_noise():
    for sde in (SDE("vp"), SDE("subvp"), SDE("ve")):
        x = torch.randn(2, 3).double()
        net, (m, _) = Gaussian(sde, times(0, 0, 0), torch.zeros(3, 3).double()), sde.noising.marginal(times(
            sde.sampling_eps))
        assert torch.allclose(sde.last_step(net, x), torch.zeros_like(x), atol=1e-9)    # the data are a single point
        assert torch.allclose(sde.last_step(lambda x, t: 0 * x, x), x / m)


def test_vp_and_ve_are_one_process_in_two_scales():
    # x_t / m of VP has the noise of VE at sigma = std / m: the same network gives the same score, up to the scale.
    vp, t = SDE("vp"), times(0.37)
    m, std = vp.noising.marginal(t)
    ve = SDE("ve", sigma_min=float(std / m), sigma_max=100.0)
    net, x = gaussian(vp)[0], torch.randn(1, 3).double()
    fed = []
    ve.score(lambda x, t: fed.append(x) or x, x / m, times(0.0))
    assert torch.allclose(fed[0], x)                        # m = 1 / sqrt(1 + sigma^2): VE's input is VP's x_t
    assert torch.allclose(vp.denoised(x, vp.score(net, x, t), t),
                          ve.denoised(x / m, ve.score(lambda x, _: net(x, 999 * t), x / m, times(0.0)), times(0.0)))


# ------------------------------------------------------------------ the ODE
@ALL
def test_ode_has_the_marginals_of_the_sde(sde):
    # Of a Gaussian the flow is known: each principal component is scaled by the ratio of its deviations.
    net, mean, cov = gaussian(sde)
    torch.manual_seed(0)
    x = mean + torch.randn(5, 3).double() @ torch.linalg.cholesky(cov).T
    x1 = sde.encode(net, x, 1e-8, 1e-8)
    (m0, s0), (m1, s1) = (sde.noising.marginal(times(t)) for t in (EPS, 1.0))
    scale = ((m1 ** 2 * net.values + s1 ** 2) / (m0 ** 2 * net.values + s0 ** 2)).sqrt()
    assert torch.allclose(x1, m1 * mean + ((x - m0 * mean) @ net.vectors * scale) @ net.vectors.T, rtol=1e-5, atol=1e-5)
    assert min(net.seen) >= EPS * 0.999                                         # never at t = 0, where std is 0
    assert torch.allclose(sde.solve(net, x1, 1.0, EPS, 1e-8, 1e-8), x, atol=1e-5)       # there and back
    few, many = ((sde.solve(net, x1, 1.0, EPS, tol, tol) - x).abs().max() for tol in (1e-3, 1e-6))
    assert many < few / 10


@ALL
def test_likelihood_of_a_gaussian(sde):
    # Claim (a): the exact score, the trace of the Jacobian from unit vectors, and Hutchinson's estimate of it.
    if isinstance(sde.noising, VE):
        sde = SDE("ve", sigma_min=1e-3, sigma_max=200.0)         # or the prior's and the data's own widths show
    net, _, cov = gaussian(sde, 4)
    net.mean = torch.zeros(4).double()                      # the prior's mean is 0, not m(1) times the data's
    torch.manual_seed(0)
    x = torch.randn(2, 4).double() @ torch.linalg.cholesky(cov).T
    exact = torch.distributions.MultivariateNormal(net.mean, cov).log_prob(x)
    basis = 2 * torch.eye(4).double()                       # sqrt(D) e_i: the mean of v^T J v over i is the trace
    logp = torch.stack([sde.log_likelihood(net, x, v.expand(2, 4), 1e-7, 1e-7)[0] for v in basis]).mean(0)
    assert torch.allclose(logp, exact, atol=1e-3)
    v = torch.randint(0, 2, (4000, 4)).double() * 2 - 1
    draws, _ = sde.log_likelihood(net, x[:1].expand(4000, 4), v, 1e-4, 1e-4)
    assert draws.std() > 0.01                               # correlated data: the estimate has a variance ...
    assert abs(draws.mean().item() - exact[0].item()) < 4 * draws.std().item() / math.sqrt(4000) + 2e-3      # no bias


@ALL
def test_likelihood_is_the_change_of_variables(sde):
    # Without a limit: log p(x) = log q_EPS(x) - log q_1(x_1) + log p_1(x_1), whatever the prior leaves out.
    net, mean, cov = gaussian(sde, 3)
    x, marginal = torch.ones(3, 3).double(), sde.noising.marginal
    (m, std), (m1, std1) = marginal(times(EPS)), marginal(times(1.0))
    logp, x1 = sde.log_likelihood(net, x, math.sqrt(3) * torch.eye(3).double(), 1e-8, 1e-8)     # one direction a row
    q = [torch.distributions.MultivariateNormal(a * mean, a ** 2 * cov + b ** 2 * torch.eye(3))
         for a, b in ((m, std), (m1, std1))]
    expected = q[0].log_prob(x) - q[1].log_prob(x1) + sde.prior_log_prob(x1)
    assert logp.mean().item() == pytest.approx(expected[0].item(), abs=1e-5)
    assert min(net.seen) >= EPS * 0.999 and max(net.seen) <= 1.001


def test_likelihood_in_float32_and_of_an_image():
    sde = SDE()
    net = Gaussian(sde, torch.zeros(28), 0.25 * torch.eye(28))                  # rows of an image, each pixel N(0, 1/4)
    torch.manual_seed(0)
    x = 0.5 * torch.randn(2, 1, 28, 28)
    logp, x1 = sde.log_likelihood(net, x, torch.ones_like(x), 1e-6, 1e-6)   # J is a multiple of I
    exact = torch.distributions.Normal(0, 0.5).log_prob(x).flatten(1).sum(1)
    assert logp.dtype == torch.float64 and x1.dtype == torch.float32
    assert torch.allclose(logp, exact.double(), rtol=2e-5, atol=1e-2)
    assert (model.bits_per_dim(logp, 784) - (7 - exact / 784 / math.log(2))).abs().max() < 1e-4


@ALL
def test_prior(sde):
    x = torch.randn(3, 1, 4, 4)
    expected = torch.distributions.Normal(0.0, sde.noising.prior_std).log_prob(x).flatten(1).sum(1)
    assert torch.allclose(sde.prior_log_prob(x), expected, rtol=1e-5)
    draw = sde.prior((5000, 4), torch.Generator().manual_seed(0))
    assert draw.std().item() == pytest.approx(float(sde.noising.marginal(torch.tensor(1.0))[1]), rel=0.02)


def test_offset_of_bits_per_dim():
    # All 256 grey levels alike cost 8 bits; a density with all its mass in one level's bin costs none.
    uniform = torch.distributions.Uniform(-1.0, 1.0).log_prob(torch.tensor([0.3])) * 784
    assert model.bits_per_dim(uniform, 784).item() == pytest.approx(8, abs=1e-5)
    sure = torch.distributions.Uniform(-1.0, -1 + 2 / 256).log_prob(torch.tensor([-0.999])) * 784
    assert model.bits_per_dim(sure, 784).item() == pytest.approx(0, abs=1e-5)


def test_dequantised_pixels_are_a_density_and_come_back():
    levels = (torch.arange(256).float() / 127.5 - 1).reshape(1, 1, 16, 16)
    x = model.dequantise(levels.expand(200, 1, 16, 16), torch.Generator().manual_seed(0))
    assert -1 <= x.min() < -0.999 and 0.999 < x.max() < 1
    assert torch.allclose(model.quantise(x[:1]), levels, atol=1e-6)
    assert model.quantise(torch.tensor([-1.3, 1.2])).tolist() == [-1, 1]
    position = (x + 1) * 128 - torch.arange(256).reshape(16, 16)
    assert position.min() >= 0 and position.max() <= 1 and position.mean().item() == pytest.approx(0.5, abs=0.01)
    assert position.var().item() == pytest.approx(1 / 12, rel=0.02)


# ------------------------------------------------------------------ the bound of claim (b)
def test_bound_of_a_gaussian_pixel():
    # Data that are one grey level: the exact network knows x_0, all divergences are 0, and what is left is L_T and L_0.
    reproduce, sde = load("lesson_07", "reproduce"), SDE()
    level = (40 + 0.5) / 128 - 1
    x0 = torch.full((2, 1, 2, 2), level, dtype=torch.float64)
    net = reproduce.exact_network(sde, lambda x, m, std: (m * level - x) / std ** 2)
    total, first = reproduce.bound(sde, net, x0, 50, torch.Generator().manual_seed(0))
    (m1, std1), (m2, std2), (mT, stdT) = (sde.noising.marginal(times(t)) for t in (0.02, 0.04, 1.0))
    width = std1 * (1 - (m2 * std1 / std2 / m1) ** 2).sqrt()
    inside = torch.erf(1 / 256 / width / math.sqrt(2))                          # the bin's mass around its centre
    prior = 0.5 * (mT ** 2 * level ** 2 - mT ** 2 - 2 * stdT.log())
    assert first[0].item() == pytest.approx(-inside.log2().item(), rel=1e-6)
    assert total[0].item() == pytest.approx((-inside.log2() + prior / math.log(2)).item(), rel=1e-6)


def test_bound_is_lesson_05s():
    # The divergence written with signal-to-noise ratios is that of the two Gaussians.
    reproduce, sde, x0 = load("lesson_07", "reproduce"), SDE(), torch.full((1, 1, 1, 1), 0.25, dtype=torch.float64)
    guess = 0.1
    net = reproduce.exact_network(sde, lambda x, m, std: (m * guess - x) / std ** 2)
    total, first = reproduce.bound(sde, net, x0, 2, torch.Generator().manual_seed(0))
    (m1, std1), (m2, std2) = (sde.noising.marginal(times(t)) for t in (0.5, 1.0))
    a1, a2 = m1 ** 2, m2 ** 2
    beta = 1 - a2 / a1
    tilde = (1 - a1) / (1 - a2) * beta
    shift = a1.sqrt() * beta / (1 - a2) * (0.25 - guess)                        # of the posterior's mean, lesson 05
    prior = 0.5 * (a2 * 0.25 ** 2 - a2 - 2 * std2.log())
    kl = shift ** 2 / (2 * tilde)
    assert (total - first)[0].item() == pytest.approx(((kl + prior) / math.log(2)).item(), rel=1e-9)


def test_discretised_likelihood_sums_to_one():
    reproduce = load("lesson_07", "reproduce")
    centres = (torch.arange(256, dtype=torch.float64) + 0.5) / 128 - 1
    for mean, sigma in ((0.3, 0.01), (-0.999, 0.2), (2.0, 1.0)):
        logp = reproduce.discretized_log_likelihood(centres, torch.full((256,), mean), torch.tensor(sigma).double())
        assert logp.exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_few_steps_stop_a_step_before_the_end():
    sample = load("lesson_07", "sample")
    for kind, steps, sampler, end in (("vp", 50, "pc", 0.02), ("subvp", 1000, "pc", 1e-3), ("vp", 50, "ode", 1e-3),
                                      ("ve", 50, "pc", EPS)):
        sde = SDE(kind)
        sample.stop_after(sde, steps, sampler)
        assert sde.sampling_eps == pytest.approx(end)


# ------------------------------------------------------------------ bad inputs
@pytest.mark.parametrize("call, what", [
    (lambda: SDE("vpsde"), "kind"), (lambda: VP(beta_min=0.0), "beta_min"),
    (lambda: VP(beta_min=3.0, beta_max=2.0), "beta_max"), (lambda: VE(sigma_max=0.001), "sigma_max"),
    (lambda: SDE(log_share=1.5), "log_share"),
    (lambda: list(SDE().reverse(None, torch.ones(1, 1), 1)), "steps"),
    (lambda: list(SDE().reverse(None, torch.ones(1, 1), 5, "heun")), "predictor"),
    (lambda: list(SDE().reverse(None, torch.ones(1, 1), 5, "none")), "corrections"),
    (lambda: list(SDE().reverse(None, torch.ones(1, 1), 5, corrections=-1)), "corrections"),
    (lambda: list(SDE().reverse(None, torch.ones(1, 1), 5, snr=0.0)), "snr"),
    (lambda: load("lesson_07", "sample").draw(SDE(), None, 4, 5, None, sampler="heun"), "sampler"),
])
def test_what_it_does_not_know_is_refused(call, what):
    with pytest.raises(ValueError, match=what):
        call()


# ------------------------------------------------------------------ diffusers
BASE = torch.linspace(-1, 1, 6).reshape(1, 1, 2, 3)
STEPS = (900, 500, 100, 1)                              # of 1000 times i / 999


def make_fixture(diffusers):
    """Steps by diffusers with noise of its own generator. `python tests/test_lesson_07.py` writes the fixture."""
    from diffusers.schedulers.deprecated import scheduling_sde_vp

    def seeded():
        return torch.Generator().manual_seed(3)

    rows = []
    for i in STEPS:
        x, score = 2 * BASE, torch.cos(5 * BASE + i)
        ve = diffusers.ScoreSdeVeScheduler(1000, snr=0.16, sigma_min=0.01, sigma_max=34.0)
        ve.set_timesteps(1000)
        ve.set_sigmas(1000)
        t = torch.tensor(i / 999)
        t = t if int(t * 999) == i else torch.nextafter(t, torch.tensor(2.0))    # it rounds the index down
        step = ve.step_pred(score, t, x, generator=seeded())
        corrected = ve.step_correct(score, x, generator=seeded()).prev_sample
        vp = scheduling_sde_vp.ScoreSdeVpScheduler(1000)
        vp.set_timesteps(1000)
        noise = torch.cos(3 * BASE + i)                     # here instead of a score: the network's output
        vp_x, vp_mean = vp.step_pred(noise, x, torch.tensor([i / 999]), generator=seeded())
        rows.append({"i": i, **{name: value.flatten().tolist() for name, value in {
            "ve_mean": step.prev_sample_mean, "ve": step.prev_sample, "ve_corrected": corrected, "vp_mean": vp_mean,
            "vp": vp_x}.items()}})
    sigmas = ve.discrete_sigmas[[0, 250, 750, 999]].tolist()
    return {"diffusers": diffusers.__version__, "rows": rows, "sigmas": sigmas}


def assert_equal_to(fixture):
    z = torch.randn(BASE.shape, generator=torch.Generator().manual_seed(3))
    ve, vp = SDE("ve"), SDE("vp")
    assert ve.noising.marginal(times(0, 250, 750, 999) / 999)[1].tolist() == pytest.approx(fixture["sigmas"], rel=1e-5)
    assert [row["i"] for row in fixture["rows"]] == list(STEPS)
    for row in fixture["rows"]:
        i = row["i"]
        x, score, t, s = 2 * BASE, torch.cos(5 * BASE + i), times(i) / 999, times(i - 1) / 999
        mean, std = ve.reverse_diffusion(x, score, t, s)
        got = {"ve_mean": mean, "ve": mean + std.float() * z, "ve_corrected": ve.langevin(x, score, t, s, 0.16, z)}
        noise = torch.cos(3 * BASE + i)
        mean, std = vp.euler_maruyama(x, vp.score(lambda x, label, noise=noise: noise, x, t), t, t - 1e-3)
        got |= {"vp_mean": mean, "vp": mean + std.float() * z}
        for name, value in got.items():
            expected = torch.tensor(row[name])
            assert torch.allclose(value.float().flatten(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max()), name


def test_equal_to_the_fixture_of_diffusers():
    assert_equal_to(json.loads(FIXTURE.read_text()))


def test_equal_to_diffusers():
    assert_equal_to(make_fixture(pytest.importorskip("diffusers", reason="pip install -e '.[reference]'")))


if __name__ == "__main__":
    import diffusers

    FIXTURE.write_text(json.dumps(make_fixture(diffusers)) + "\n")
