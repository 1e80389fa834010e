"""Lesson 13: the maths of VDM against closed forms, autograd and integrals; one sampling step against diffusers."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import load
from utils import digits, to_uint8

model = load("lesson_13", "model")
VDM, Network, Schedule, UNet = model.VDM, model.Network, model.Schedule, model.UNet
FIXTURE = Path(__file__).parent / "fixtures" / "vdm_step.json"
SMALL = dict(channels=8, mults=(1, 2), blocks=1, attention=(), dropout=0.0, groups=4, patch=2)
ENDS = (-13.3, 5.0)


def real(*values):
    return torch.tensor(values, dtype=torch.float64)


def bent(units=16, **keys):
    """A learned schedule whose interior is far from a straight line."""
    torch.manual_seed(0)
    schedule = Schedule(units=units, **keys)
    with torch.no_grad():
        schedule.l1.fill_(-0.1)                                              # a negative weight counts as its size
        schedule.l3.copy_(torch.linspace(1, 0.05, units) ** 3 * torch.randn(units).sign() * 5)
    return schedule


class Gaussian(torch.nn.Module):
    """The exact noise prediction for pixels N(mean, std^2), with a schedule beside it."""

    def __init__(self, schedule, mean=0.1, std=0.5):
        super().__init__()
        self.schedule, self.mean, self.std = schedule, mean, std

    def forward(self, z=None, gamma=None, t=None):
        if z is None:
            return self.schedule(t)
        alpha2, sigma2 = (torch.sigmoid(s * gamma)[:, None, None, None].float() for s in (-1, 1))
        return sigma2.sqrt() * (z - alpha2.sqrt() * self.mean) / (alpha2 * self.std ** 2 + sigma2)

    def diffusion(self, low, high):
        """The diffusion loss in bits/dim, in closed form: half the integral over gamma of the least error of eps.

        That error is v / (v + exp(gamma)) with v = std^2: its integral is gamma - log(v + exp(gamma)).
        """
        F = lambda g: g - math.log(self.std ** 2 + math.exp(g))
        return 0.5 * (F(high) - F(low)) / math.log(2)


class Toy(torch.nn.Module):
    """A small network with weights of its own, smooth in gamma, in float64."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule, self.w = schedule, torch.nn.Parameter(real(0.3, -0.2, 0.5))

    def forward(self, z=None, gamma=None, t=None):
        if z is None:
            return self.schedule(t)
        g = gamma[:, None, None, None]
        return self.w[0] * z + self.w[1] * torch.sin(0.3 * g + self.w[2] * z)


# ------------------------------------------------------------------ gamma
@pytest.mark.parametrize("schedule", [bent(), Schedule(), *(Schedule(interior=name) for name in model.INTERIORS[1:])],
                         ids=["bent", *model.INTERIORS])
def test_gamma_rises_between_exact_ends_and_its_slope_is_its_derivative(schedule):
    t = torch.linspace(0, 1, 101, dtype=torch.float64, requires_grad=True)
    u, slope, low, high = schedule(t)
    assert (low.item(), high.item()) == pytest.approx(ENDS, abs=1e-5)
    assert u[0].item() == 0 and u[-1].item() == 1
    assert (u.diff() > 0).all() and (slope >= 0).all()                       # more noise with more time: gamma' > 0
    derivative, = torch.autograd.grad(u.sum(), t)
    assert torch.allclose(slope, derivative, rtol=1e-9, atol=1e-12)
    _, jvp = torch.func.jvp(lambda t: schedule(t)[0], (t.detach(),), (torch.ones_like(t),))
    assert torch.allclose(slope, jvp, rtol=1e-9, atol=1e-12)


def test_interiors_are_what_they_are_called():
    t = real(0.0, 0.25, 0.5, 0.9, 1.0)
    low, high = ENDS
    gamma = {name: low + (high - low) * Schedule(interior=name)(t)[0] for name in model.INTERIORS[1:]}
    assert torch.allclose(gamma["linear"], low + (high - low) * t, atol=1e-5)
    alpha = torch.sigmoid(-gamma["cosine"]).sqrt()
    assert torch.allclose(torch.acos(alpha).diff() / t.diff(), torch.acos(alpha).diff()[0] / t.diff()[0], rtol=1e-3)
    ddpm = load("lesson_05", "model").DDPM().abar[:1000]                      # its own ends, then stretched to ours
    linear_beta = torch.log((1 - ddpm) / ddpm)
    stretched = low + (high - low) * (linear_beta - linear_beta[0]) / (linear_beta[-1] - linear_beta[0])
    assert torch.allclose(gamma["ddpm"][1:4], stretched[[249, 499, 899]], atol=0.25)
    assert not torch.allclose(gamma["ddpm"], gamma["linear"], atol=1)


def test_learned_interior_starts_nearly_straight_and_bends():
    t = torch.linspace(0, 1, 50, dtype=torch.float64)
    assert (Schedule()(t)[0] - t).abs().max() < 0.05 < (bent()(t)[0] - t).abs().max()


def test_log_snr_at_three_times():
    # The convention box: z_t = alpha x + sigma eps, alpha^2 + sigma^2 = 1, log SNR = -gamma.
    vdm, one, zero = VDM(), torch.ones(3, 1, 1, 1), torch.zeros(3, 1, 1, 1)
    gamma = vdm.gamma(lambda t: Schedule(interior="linear")(t), real(0.1, 0.5, 0.9))
    alpha, sigma = vdm.q_sample(one, gamma, zero).flatten(), vdm.q_sample(zero, gamma, one).flatten()
    assert torch.allclose(alpha ** 2 + sigma ** 2, torch.ones(3), atol=1e-6)
    assert torch.allclose(2 * (alpha.log() - sigma.log()), torch.tensor([11.47, 4.15, -3.17]), atol=1e-3)


def test_time_embedding_of_neighbouring_steps_differs():
    gamma = -13.3 + 18.3 * torch.linspace(0, 1, 101)
    embedding = load("lesson_01", "model").time_embedding(1000 * (gamma + 13.3) / 18.3, 32)
    assert embedding.diff(dim=0).norm(dim=1).min() > 1e-2
    net = UNet(**SMALL)
    torch.nn.init.normal_(net.out[2].weight)
    torch.nn.init.normal_(net.middle[0].conv2.weight)
    z = torch.randn(1, 1, 28, 28)
    assert (net(z, real(-13.3)) - net(z, real(-13.1))).abs().max() > 1e-4


# ------------------------------------------------------------------ encoder and decoder
def test_levels_are_exact_and_lie_in_the_middle_of_256_bins():
    vdm, k = VDM(), torch.arange(256)
    loader = (k.float() / 127.5 - 1).reshape(1, 1, 16, 16)
    assert torch.equal(vdm.levels(loader).flatten(), k)
    assert torch.allclose(vdm.encode(loader).flatten().double(), 2 * (k.double() + 0.5) / 256 - 1, atol=1e-7)
    x0, _ = digits("test").first(20)
    assert torch.equal(vdm.levels(x0), to_uint8(x0).long())
    assert vdm.values.diff().min() > 0 and vdm.values.abs().max() == 1 - 1 / 256           # not 1 / 255 scaling


@pytest.mark.parametrize("gamma_0", [-13.3, -9.2, -5.0])
def test_decoder_is_a_distribution_over_256_values(gamma_0):
    vdm = VDM()
    z = torch.linspace(-1.1, 1.1, 7)
    log_p = vdm.decode(z, real(gamma_0)[0])
    assert log_p.shape == (7, 256) and torch.allclose(log_p.exp().sum(-1), torch.ones(7), atol=1e-5)
    expected = (-0.5 * ((z.double()[:, None] - vdm.values.double()) * math.exp(-gamma_0 / 2)) ** 2).log_softmax(-1)
    assert torch.allclose(log_p.double(), expected, rtol=1e-4, atol=1e-3)


def test_reconstruction_is_the_decoder_at_z_0():
    torch.manual_seed(0)
    vdm = VDM()
    x0, eps = digits("test").first(3)[0], torch.randn(3, 1, 28, 28)
    for gamma_0 in real(-13.3, -9.2, -6.0):
        z = vdm.q_sample(vdm.encode(x0).double(), gamma_0.expand(3), eps.double())
        log_p = vdm.decode(z / torch.sigmoid(-gamma_0).sqrt(), gamma_0)
        expected = -log_p.gather(-1, vdm.levels(x0)[..., None]).flatten(1).mean(1) / math.log(2)
        assert torch.allclose(vdm.reconstruction(x0, gamma_0, eps), expected.float(), rtol=2e-3, atol=1e-5)


def test_reconstruction_has_the_size_that_the_noise_leaves():
    # Without noise nothing is left to say, with much of it every level is alike: log2 256 = 8 bits.
    vdm, eps = VDM(), torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    x0 = to_grey(2, 100)
    at = [vdm.reconstruction(x0, g, eps).mean().item() for g in real(-18.0, -13.3, -9.0, 8.0)]
    assert at[0] < 1e-6 and at[1] < 0.05 and at[3] == pytest.approx(8, abs=0.1)
    sigma = math.exp(-4.5) * 128                                             # in levels: the entropy of a Gaussian bin
    assert at[2] == pytest.approx(math.log2(sigma * math.sqrt(2 * math.pi * math.e)), abs=0.05)


def to_grey(n, level):
    return torch.full((n, 1, 28, 28), level / 127.5 - 1)


def test_prior_is_the_kl_of_a_gaussian():
    vdm, x = VDM(), torch.rand(2, 1, 4, 4) * 2 - 1
    for gamma in real(-1.0, 5.0, 12.0):
        q = torch.distributions.Normal(torch.sigmoid(-gamma).sqrt() * x.double(), torch.sigmoid(gamma).sqrt())
        kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(real(0.0)[0], real(1.0)[0]))
        assert torch.allclose(vdm.prior(x, gamma), kl.flatten(1).mean(1) / math.log(2), rtol=1e-6, atol=1e-12)


# ------------------------------------------------------------------ the diffusion loss
def draw_gaussian(n, mean=0.1, std=0.5):
    """n "images" of 64 pixels N(mean, std^2), as floats."""
    return mean + std * torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("schedule", [bent(), *(Schedule(interior=name) for name in model.INTERIORS[1:])],
                         ids=["bent", *model.INTERIORS[1:]])
def test_interior_does_not_change_the_continuous_loss(schedule):
    # Claim (a) in closed form: every interior gives the same integral.
    torch.manual_seed(0)
    vdm, net, x = VDM(), Gaussian(schedule), draw_gaussian(4000)
    exact = net.diffusion(*ENDS)
    with torch.no_grad():
        loss = vdm.diffusion(net, x, vdm.times(len(x)), torch.randn_like(x))
    assert loss.mean().item() == pytest.approx(exact, abs=0.01 + 3 * loss.std().item() / math.sqrt(len(x)) / 2)
    assert loss.mean().item() == pytest.approx(exact, rel=0.03)


def test_ends_do_change_the_loss_and_bits_are_bits():
    vdm, x = VDM(), draw_gaussian(4000)
    torch.manual_seed(0)
    near = Gaussian(Schedule(gamma_0=-10.0, interior="linear"))
    with torch.no_grad():
        loss = vdm.diffusion(near, x, vdm.times(len(x)), torch.randn_like(x)).mean().item()
    assert loss == pytest.approx(near.diffusion(-10.0, 5.0), rel=0.02)
    assert abs(near.diffusion(-10.0, 5.0) - near.diffusion(*ENDS)) > 2


def test_discrete_loss_falls_to_the_continuous_one():
    x, schedule = draw_gaussian(3000), Schedule(interior="linear")
    net, losses = Gaussian(schedule), []
    for T in (3, 10, 30, 300, 100_000):
        torch.manual_seed(0)
        vdm = VDM(T)
        with torch.no_grad():
            losses.append(vdm.diffusion(net, x, vdm.times(len(x)), torch.randn_like(x)).mean().item())
    assert losses == sorted(losses, reverse=True)
    torch.manual_seed(0)
    with torch.no_grad():                                                    # the same times and the same noise
        continuous = VDM().diffusion(net, x, VDM().times(len(x)), torch.randn_like(x)).mean().item()
    assert losses[-1] == pytest.approx(continuous, rel=1e-3)
    assert continuous == pytest.approx(net.diffusion(*ENDS), rel=0.06)
    assert losses[-1] == pytest.approx(losses[-2], rel=0.05) and losses[0] > 1.5 * losses[-1]


def test_discrete_loss_is_the_kl_of_its_steps():
    # T = 2, one pixel: T / 2 expm1(gamma_t - gamma_s) |eps - eps_hat|^2 is T times KL(q(z_s | z_t, x) || p(z_s | z_t)).
    vdm, schedule = VDM(2), Schedule(interior="linear", gamma_0=-4.0, gamma_1=2.0)
    net = Gaussian(schedule)
    x, eps = torch.tensor([0.4]).reshape(1, 1, 1, 1), torch.tensor([-0.7]).reshape(1, 1, 1, 1)
    for t, s in ((0.5, 0.0), (1.0, 0.5)):
        loss = vdm.diffusion(net, x, real(t - 0.2), eps).item()
        gamma_t, gamma_s = vdm.gamma(net, real(t, s)).tolist()
        z = vdm.q_sample(x, real(gamma_t), eps)
        mean, expected = vdm.step(net, z, *vdm.gamma(net, real(t, s)).split(1), torch.zeros(1))
        c = -math.expm1(gamma_s - gamma_t)
        variance = c / (1 + math.exp(-gamma_s))
        sig = lambda g: 1 / (1 + math.exp(-g))
        a = math.sqrt(sig(-gamma_t) / sig(-gamma_s))                          # alpha_{t|s}
        posterior = (a * sig(gamma_s) * z.item() + math.sqrt(sig(-gamma_s)) * sig(gamma_t) * c * 0.4) / sig(gamma_t)
        kl = (posterior - mean.item()) ** 2 / (2 * variance)
        assert loss == pytest.approx(2 * kl / math.log(2), rel=1e-4)
        assert expected.item() == pytest.approx((z.item() - math.sqrt(sig(gamma_t)) * net(z, real(gamma_t)).item())
                                                / math.sqrt(sig(-gamma_t)), rel=1e-5)


def test_weight_of_a_short_step_keeps_its_digits():
    # float32 would lose expm1(gamma_t - gamma_s) at gamma = -13: the difference is 2e-7.
    net, eps, x = Gaussian(Schedule(interior="linear")), torch.ones(1, 1, 8, 8), draw_gaussian(1)
    fine, exact = VDM(10 ** 8), VDM()
    t = real(1e-4)
    assert fine.diffusion(net, x, t, eps).item() == pytest.approx(exact.diffusion(net, x, t, eps).item(), rel=1e-4)


def test_times_are_antithetic():
    torch.manual_seed(0)
    t = torch.stack([VDM().times(8) for _ in range(2000)])
    assert t.dtype == torch.float64 and 0 <= t.min() and t.max() < 1
    gaps = t.sort(1).values.diff(dim=1)
    assert torch.allclose(gaps, torch.full_like(gaps, 1 / 8), atol=1e-12)
    assert t[:, 3].mean().item() == pytest.approx(0.5, abs=0.02)
    assert t[:, 3].var().item() == pytest.approx(1 / 12, rel=0.1)


def test_bound_adds_up_and_its_draws_are_spread():
    torch.manual_seed(0)
    vdm, x0 = VDM(), digits("test").first(3)[0]
    net = Gaussian(bent())
    reconstruction, prior, terms, times = vdm.bound(net, x0, 5, torch.Generator().manual_seed(0))
    assert reconstruction.shape == prior.shape == (3,) and terms.shape == times.shape == (3, 5)
    assert torch.allclose(times.sort(1).values.diff(dim=1), torch.full((3, 4), 0.2, dtype=torch.float64))
    assert not torch.allclose(times[0], times[1])
    again = vdm.bound(net, x0, 5, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(again, (reconstruction, prior, terms, times)))


def test_loss_is_the_bound_of_the_batch():
    # The mean of many draws of the loss is the mean of the bound; its diffusion part has a closed form here.
    torch.manual_seed(0)
    vdm, net = VDM(), Gaussian(bent())
    x = 0.1 + 0.5 * torch.randn(64, 1, 28, 28)
    vdm.encode = lambda x0: x0                                               # the network's Gaussian data, as they are
    vdm.levels = lambda x0: VDM.levels(vdm, x0.clamp(-1, 1))
    draws = torch.stack([torch.stack(vdm.loss(net, x)) for _ in range(20)]).double()
    reconstruction, prior, terms, _ = vdm.bound(net, x, 8)
    assert draws[:, 2].mean().item() == pytest.approx(net.diffusion(*ENDS), rel=0.02)
    assert draws[:, 2].mean().item() == pytest.approx(terms.mean().item(), rel=0.02)
    assert draws[:, 1].mean().item() == pytest.approx(prior.mean().item(), rel=1e-6)
    assert draws[:, 0].mean().item() == pytest.approx(reconstruction[::8].mean().item(), rel=0.05)


def test_measure_is_the_bound_in_batches():
    vdm, net, x0 = VDM(), Gaussian(bent()), digits("test").first(5)[0]
    found = load("lesson_13", "sample").measure(vdm, net, x0, 4, torch.Generator().manual_seed(3), batch=2)
    noise = torch.Generator().manual_seed(3)
    parts = [vdm.bound(net, part, 4, noise) for part in x0.split(2)]
    expected = [torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]),
                torch.cat([part[2] for part in parts]).mean(1)]
    for key, value in zip(("reconstruction", "prior", "diffusion"), expected):
        assert found[key].shape == (5,) and torch.allclose(found[key], value.double(), rtol=1e-6)
    assert torch.allclose(found["bits_per_dim"], sum(expected).double(), rtol=1e-6)


# ------------------------------------------------------------------ the gradient of gamma
def gradients(loss, parameters):
    return [g.clone() for g in torch.autograd.grad(loss, parameters, retain_graph=True)]


def test_interior_descends_the_squared_loss_and_the_rest_the_bound():
    # One backward pass of L gives d(mean L^2) to the interior, dL to ends and network. The reference: plain autograd.
    net = Toy(bent(gamma_0=-3.0, gamma_1=2.0)).double()
    vdm, x, eps = VDM(), draw_gaussian(6).double(), torch.randn(6, 1, 8, 8, dtype=torch.float64)
    t = real(0.05, 0.2, 0.4, 0.55, 0.7, 0.95)
    names, parameters = zip(*net.named_parameters())
    u, slope, low, high = net(t=t)                                           # L written out, without hooks
    gamma = low + (high - low) * u
    g = gamma[:, None, None, None]
    z = torch.sigmoid(-g).sqrt() * x + torch.sigmoid(g).sqrt() * eps
    L = 0.5 * (high - low) * slope * (eps - net(z, gamma)).square().flatten(1).mean(1) / math.log(2)
    of_bound, of_square = gradients(L.mean(), parameters), gradients(L.square().mean(), parameters)
    got = vdm_float64(vdm).diffusion(net, x, t, eps)
    assert torch.allclose(got, L)
    got.mean().backward()
    interior = {"schedule.l1", "schedule.l2", "schedule.b2", "schedule.l3"}
    for name, p, bound, square in zip(names, parameters, of_bound, of_square):
        expected, other = (square, bound) if name in interior else (bound, square)
        assert torch.allclose(p.grad, expected, rtol=1e-6, atol=1e-10), name
        assert not torch.allclose(p.grad, other, rtol=1e-2), name
    assert interior < set(names)


def vdm_float64(vdm):
    """image() rounds to float32, as it should for networks; here the gradient is compared to more digits."""
    vdm.q_sample = lambda x, gamma, eps: (torch.sigmoid(-gamma).sqrt()[:, None, None, None] * x
                                          + torch.sigmoid(gamma).sqrt()[:, None, None, None] * eps)
    return vdm


def test_with_a_finite_T_all_of_gamma_descends_the_bound():
    net = Toy(bent(gamma_0=-3.0, gamma_1=2.0)).double()
    vdm, x, eps = vdm_float64(VDM(4)), draw_gaussian(2).double(), torch.randn(2, 1, 8, 8, dtype=torch.float64)
    names, parameters = zip(*net.named_parameters())
    u, _, low, high = net(t=real(0.5, 1.0, 0.25, 0.75))                     # 0.3 and 0.8 end their steps at 2/4 and 4/4
    gamma, gamma_s = (low + (high - low) * u).chunk(2)                       # L written out, without hooks
    error = (eps - net(vdm.q_sample(x, gamma, eps), gamma)).square().flatten(1).mean(1) / math.log(2)
    L = 0.5 * 4 * torch.expm1(gamma - gamma_s) * error
    got = vdm.diffusion(net, x, real(0.3, 0.8), eps)
    assert torch.allclose(got, L)
    for name, ours, expected in zip(names, gradients(got.mean(), parameters), gradients(L.mean(), parameters)):
        assert torch.allclose(ours, expected, rtol=1e-6, atol=1e-10), name


def test_descending_the_square_lowers_the_variance_and_keeps_the_mean():
    torch.manual_seed(0)
    vdm, x, schedule = VDM(), draw_gaussian(512), Schedule(units=32, learn_ends=False)
    net = Gaussian(schedule)
    optimizer = torch.optim.Adam([p for p in schedule.parameters() if p.requires_grad], lr=0.05)
    with torch.no_grad():
        before = vdm.diffusion(net, x, vdm.times(512), torch.randn_like(x))
    for _ in range(150):
        loss = vdm.diffusion(net, x[:64], vdm.times(64), torch.randn_like(x[:64])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        after = vdm.diffusion(net, x, vdm.times(512), torch.randn_like(x))
    assert after.var() < 0.5 * before.var()
    assert after.mean().item() == pytest.approx(net.diffusion(*ENDS), rel=0.03)


def test_ends_move_towards_a_lower_bound():
    # gamma_0 = -6 leaves two levels of noise: the decoder pays. The bound's gradient lowers gamma_0.
    torch.manual_seed(0)
    vdm, net = VDM(), Network(dict(gamma_0=-6.0, gamma_1=2.0), {**SMALL, "gamma_min": -6.0, "gamma_max": 2.0})
    x0 = digits("train").first(16)[0]
    reconstruction, prior, _ = vdm.loss(net, x0)
    gradient = torch.autograd.grad(reconstruction + prior, [net.schedule.low, net.schedule.span])
    assert gradient[0] > 0                                                   # descent lowers gamma_0
    assert gradient[1] < 0                                                   # and moves gamma_1 up: less of x is left
    fixed = Network(dict(learn_ends=False, interior="linear"), SMALL)
    assert not any(p.requires_grad for p in fixed.schedule.parameters())
    sum(vdm.loss(fixed, x0)).backward()


# ------------------------------------------------------------------ the weighted loss
def test_weighted_loss_is_the_bound_with_another_weight():
    # Image by image |eps - eps_hat|^2 is w times Eq. (17): w = 2 / gamma'(t) of the clock, alpha sigma / its angles.
    net, vdm = Toy(bent(gamma_0=-3.0, gamma_1=2.0)).double(), vdm_float64(VDM())
    vdm.encode, vdm.times, x = lambda x0: x0, lambda n, device: t, draw_gaussian(4).double()
    t, clock = real(0.1, 0.35, 0.6, 0.85), Schedule(-3.0, 2.0, False, "cosine").double()
    u, slope, low, high = clock(t)
    torch.manual_seed(3)
    eps = torch.randn_like(x)
    weight = 2 * math.log(2) / ((high - low) * slope)
    gamma = low + (high - low) * u
    alpha_sigma = (torch.sigmoid(gamma) * torch.sigmoid(-gamma)).sqrt()
    angles = torch.atan(torch.exp(torch.stack([low, high]) / 2))
    assert torch.allclose(weight / math.log(2), alpha_sigma / (angles[1] - angles[0]))
    expected = (weight.detach() * vdm.diffusion(lambda z=None, gamma=None, t=None: clock(t) if z is None
                                                else net(z, gamma), x, t, eps)).mean()
    torch.manual_seed(3)
    got = vdm.weighted(net, x)
    assert got.item() == pytest.approx(expected.item(), rel=1e-9)
    assert torch.allclose(*(torch.autograd.grad(loss, net.w)[0] for loss in (got, expected)), rtol=1e-8)


def test_weighted_loss_is_the_mean_error_along_the_angle():
    # The least error of eps at gamma is v / (v + exp(gamma)); the mean of it over even angles, whatever the interior.
    vdm, x = VDM(), draw_gaussian(4000)
    vdm.encode = lambda x0: x0
    first, last = torch.atan(torch.exp(real(*ENDS) / 2))
    angle = first + (last - first) * (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    exact = (0.25 / (0.25 + torch.tan(angle) ** 2)).mean().item()
    for schedule in (bent(), Schedule(interior="linear")):
        torch.manual_seed(0)
        with torch.no_grad():
            assert vdm.weighted(Gaussian(schedule), x).item() == pytest.approx(exact, rel=0.01)


def test_second_training_moves_the_network_and_not_the_schedule(tmp_path):
    keys = ["smoke=true", "gpu=false", "device=cpu", "threads=1", f"runs={tmp_path}"]
    train, moved = load("lesson_13", "train"), {}
    for stages in ("[1,1]", "[1,0]"):
        path = train.main([*keys, f"stages={stages}"]).weights
        bound, last = (load_file(path.with_name(name)) for name in ("bound.safetensors", path.name))
        moved[stages] = [name for name in bound if not torch.equal(bound[name], last[name])]
    assert moved["[1,1]"] and not any(name.startswith("schedule") for name in moved["[1,1]"])
    assert moved["[1,0]"] == []


# ------------------------------------------------------------------ network
def test_network_starts_as_the_identity_and_sees_fourier_features():
    net, z = UNet(**SMALL), torch.randn(2, 1, 28, 28)
    assert torch.equal(net(z, real(0.0, -5.0)), z)                           # eps_hat = z + out, and out = 0
    features = model.fourier_features(z, (6, 7))
    assert features.shape == (2, 5, 28, 28) and torch.equal(features[:, :1], z)
    angle = 2 * math.pi * z.double() * 128
    assert torch.allclose(features[:, 3:].double(), torch.cat([angle.sin(), angle.cos()], 1), atol=5e-4)
    assert torch.allclose(features[:, 1].double(), (angle[:, 0] / 2).sin(), atol=5e-4)
    plain = UNet(**SMALL, fourier=[])
    assert net.stem.weight.shape[1] == 5 * plain.stem.weight.shape[1]


def test_fourier_feature_shows_the_noise_within_a_grey_level():
    # At gamma = -13.3 the phase of the finer pair is the noise, whatever the level: sin = -sin(2 pi 128 sigma eps).
    vdm, eps = VDM(), torch.linspace(-1, 1, 256).reshape(1, 1, 16, 16)
    z = vdm.q_sample(vdm.values.reshape(1, 1, 16, 16), real(-13.3), eps)
    sigma = math.sqrt(1 / (1 + math.exp(13.3)))
    fine = model.fourier_features(z, (6, 7))[:, 3]
    assert torch.allclose(fine, -torch.sin(2 * math.pi * 128 * sigma * eps)[:, 0], atol=2e-3)


def test_small_batch_can_be_overfitted():
    # Two known images: the noise can be told exactly, and the diffusion loss has no floor but 0.
    torch.manual_seed(0)
    vdm, x0 = VDM(), digits("train").first(2)[0].repeat(4, 1, 1, 1)
    net = Network(dict(gamma_0=-3.0, gamma_1=2.0), {**SMALL, "gamma_min": -3.0, "gamma_max": 2.0})
    optimizer = torch.optim.Adam(net.unet.parameters(), lr=6e-3)
    losses = []
    for _ in range(100):
        loss = vdm.loss(net, x0)[2]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:2]) * 5


# ------------------------------------------------------------------ sampling
@pytest.mark.parametrize("grid", model.GRIDS)
def test_sampling_gives_back_the_data_and_whole_grey_levels(grid):
    torch.manual_seed(0)
    net = Gaussian(Schedule(interior="linear"), 0.1, 0.3)
    x = VDM().sample(net, 30, 200, shape=(1, 8, 8), generator=torch.Generator().manual_seed(0), grid=grid)
    assert x.mean().item() == pytest.approx(0.1, abs=0.03) and x.std().item() == pytest.approx(0.3, rel=0.05)
    k = (x + 1) * 127.5
    assert torch.allclose(k, k.round(), atol=1e-3)
    again = VDM().sample(net, 30, 200, shape=(1, 8, 8), generator=torch.Generator().manual_seed(0), grid=grid)
    assert torch.equal(x, again)


def test_step_keeps_the_marginal():
    # From z_t of variance alpha_t^2 v + sigma_t^2 to that at s, exactly when the network is exact and the step small.
    torch.manual_seed(0)
    vdm, net, x = VDM(), Gaussian(Schedule(interior="linear"), 0.0, 0.5), draw_gaussian(400, 0.0)
    t, s = 0.7, 0.69
    gamma_t, gamma_s = vdm.gamma(net, real(t, s)).split(1)
    z, _ = vdm.step(net, vdm.q_sample(x, gamma_t.expand(400), torch.randn_like(x)), gamma_t, gamma_s,
                    torch.randn_like(x))
    assert z.var().item() == pytest.approx((torch.sigmoid(-gamma_s) * 0.25 + torch.sigmoid(gamma_s)).item(), rel=0.03)


def test_step_does_not_depend_on_the_course_of_gamma():
    # Sampling knows gamma at t and s only: two schedules with the same values there make the same step.
    z, noise = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    nets = [Gaussian(Schedule(interior="linear")), Gaussian(Schedule(interior="linear", gamma_0=-4.15, gamma_1=5.0))]
    times = real(1.0, 0.75), real(1.0, 0.5)
    steps = [VDM().step(net, z, *VDM().gamma(net, t).split(1), noise)[0] for net, t in zip(nets, times)]
    assert torch.allclose(*steps, atol=1e-6)


def test_grids_run_between_the_ends_evenly_in_t_or_in_the_angle():
    vdm, nets = VDM(), [Gaussian(bent()), Gaussian(Schedule(interior="linear"))]
    even, cosine = ([vdm.grid(net, 10, kind) for net in nets] for kind in ("even", "cosine"))
    for gamma in (*even, *cosine):
        assert gamma.shape == (11,) and gamma.dtype == torch.float64 and (gamma.diff() < 0).all()
        assert gamma[[0, -1]].tolist() == pytest.approx(ENDS[::-1], abs=1e-5)
    assert torch.allclose(even[0], vdm.gamma(nets[0], torch.linspace(1, 0, 11, dtype=torch.float64)))
    assert torch.allclose(even[1].diff(), even[1].diff().mean()) and not torch.allclose(*even, atol=0.5)
    angle = torch.acos(torch.sigmoid(-cosine[0]).sqrt()).diff()
    assert torch.allclose(angle, angle.mean(), rtol=1e-6)
    assert torch.allclose(*cosine, atol=1e-5)                                # the course between the ends has no say


def test_cosine_clock_is_the_inverse_of_the_angle():
    t, (low, high) = torch.linspace(0, 1, 21, dtype=torch.float64, requires_grad=True), real(*ENDS)
    gamma, slope = model.cosine_clock(t, low, high)
    angle = torch.atan(torch.exp(real(*ENDS) / 2))
    assert torch.allclose((torch.atan(torch.exp(gamma / 2)) - angle[0]) / (angle[1] - angle[0]), t, atol=1e-12)
    assert gamma[[0, -1]].tolist() == pytest.approx(ENDS)
    derivative, = torch.autograd.grad(gamma.sum(), t)
    assert torch.allclose(slope, derivative, rtol=1e-9)


def linear_network(z, gamma):
    return 0.6 * z + 0.1 * torch.sin(gamma.float())[:, None, None, None]


def ours():
    """z after each of eight steps with fixed noise, lesson 05's 1000 times as gamma. (8, 6)."""
    abar = load("lesson_05", "model").DDPM().abar[:1000]
    grid = torch.log((1 - abar) / abar)
    vdm, z, path = VDM(), 1.5 * torch.linspace(-1, 1, 6).reshape(1, 1, 2, 3), []

    class Table(torch.nn.Module):
        def forward(self, z=None, gamma=None, t=None):
            if z is not None:
                return linear_network(z, gamma)
            value = grid[(t * 999).round().long()]
            return (value - grid[0]) / (grid[-1] - grid[0]), None, grid[0], grid[-1]

    for i in range(8):
        t, s = 990 - 100 * i, 890 - 100 * i
        now = vdm.gamma(Table(), real(t / 999, s / 999)).split(1)
        z, _ = vdm.step(Table(), z, *now, torch.cos(7 * torch.linspace(-1, 1, 6) + i).reshape(1, 1, 2, 3))
        path.append(z.flatten())
    return torch.stack(path)


def make_fixture(diffusers):
    """The same steps by diffusers' DDIM scheduler with eta = 1, which is ancestral sampling in VP notation."""
    scheduler = diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False)
    abar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    scheduler.alphas_cumprod, scheduler.num_inference_steps = abar, 10       # steps of 100
    z, path = 1.5 * torch.linspace(-1, 1, 6).reshape(1, 1, 2, 3), []
    for i in range(8):
        t = 990 - 100 * i
        eps = linear_network(z, torch.log((1 - abar[t]) / abar[t])[None])
        noise = torch.cos(7 * torch.linspace(-1, 1, 6) + i).reshape(1, 1, 2, 3)
        z = scheduler.step(eps, t, z, eta=1.0, variance_noise=noise).prev_sample.float()
        path.append(z.flatten().tolist())
    return {"diffusers": diffusers.__version__, "path": path}


def test_steps_equal_the_fixture_of_diffusers():
    assert torch.allclose(ours(), torch.tensor(json.loads(FIXTURE.read_text())["path"]), rtol=1e-5, atol=1e-5)


def test_steps_equal_diffusers():
    made = make_fixture(pytest.importorskip("diffusers", reason="pip install -e '.[reference]'"))
    assert torch.allclose(ours(), torch.tensor(made["path"]), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------ bad values
@pytest.mark.parametrize("call, what", [
    (lambda: VDM(-1), "T="), (lambda: VDM(2.5), "T="), (lambda: Schedule(interior="sqrt"), "interior"),
    (lambda: Schedule(gamma_0=5.0, gamma_1=-5.0), "gamma_0"), (lambda: VDM().sample(None, 1, 0), "steps"),
    (lambda: VDM().sample(None, 1, 1, grid="odd"), "grid"),
    (lambda: UNet(**{**SMALL, "patch": 3}), "image_size"),
])
def test_what_it_does_not_know_is_refused(call, what):
    with pytest.raises(ValueError, match=what):
        call()


if __name__ == "__main__":
    import diffusers

    FIXTURE.write_text(json.dumps(make_fixture(diffusers)) + "\n")
