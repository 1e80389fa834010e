"""Lesson 20: the maths of EDM against closed forms, lessons 05 and 06, and diffusers' EDM and Heun schedulers."""

import json
import math
from pathlib import Path

import pytest
import torch

from conftest import load
from utils import UserError, digits
from utils.seeds import generators

model = load("lesson_20", "model")
EDM, UNet, SCHEDULES = model.EDM, model.UNet, model.SCHEDULES
time_embedding, reproduce = load("lesson_20", "earlier").time_embedding, load("lesson_20", "reproduce")
NoisePrediction = reproduce.NoisePrediction            # the VP column of Table 1 as a training: an arm of the claim
noise_levels, ode_sampler, stochastic_sampler = model.noise_levels, model.ode_sampler, model.stochastic_sampler
FIXTURE = Path(__file__).parent / "fixtures" / "edm_scheduler.json"
SMALL = dict(channels=8, mults=(1, 2), blocks=1, attention=(), dropout=0.0, groups=4, patch=2)
F64 = torch.float64


def f64(*values):
    return torch.tensor(values, dtype=F64)


def zero(x, t):
    """A network that predicts nothing, as at the start of training."""
    return torch.zeros_like(x)


def gaussian(mean, std):
    """The exact denoiser of data N(mean, std^2)."""
    return lambda x, sigma: mean + std ** 2 / (std ** 2 + sigma ** 2) * (x - mean)


def last(path):
    for _, x, _ in path:
        pass
    return x


# ------------------------------------------------------------------ the data are standardised
def test_data_have_mean_0_and_std_sigma_data():
    x0, _ = digits("train").first(60_000)
    y = EDM().standardise(x0)
    assert abs(y.mean().item()) < 1e-3 and y.std().item() == pytest.approx(0.5, abs=1e-3)
    assert y.square().mean().sqrt().item() == pytest.approx(0.5, abs=1e-3)       # what the identity of the loss needs
    assert x0.square().mean().sqrt().item() == pytest.approx(0.962, abs=1e-3)    # what [-1, 1] would give it
    assert torch.allclose(EDM().to_image(y[:5000]), x0[:5000], atol=1e-6)


def test_sampler_returns_images_in_minus_1_to_1():
    # A network whose D is one and the same digit.
    edm, (x0, _) = EDM(), digits("test").first(3)
    y = edm.standardise(x0)
    def net(x, c_noise):
        c_skip, c_out, c_in, _ = (c[:, None, None, None] for c in edm.coefficients((4 * c_noise).exp()))
        return (y - c_skip * x / c_in) / c_out
    x = edm.sample(net, torch.randn(3, 1, 28, 28), edm.levels(8))
    assert x.dtype == torch.float32 and torch.allclose(x, x0, atol=1e-3)


# ------------------------------------------------------------------ preconditioning: Eq. (7), Table 1
@pytest.mark.parametrize("sigma", [0.002, 0.01, 0.1, 0.5, 1.0, 5.0, 80.0])
def test_initial_loss_is_1_at_every_sigma(sigma):
    edm, (x0, _) = EDM(), digits("train").first(4000)
    torch.manual_seed(0)
    levels, eps = torch.full((4000,), sigma), torch.randn_like(x0)
    assert edm.loss_at(zero, edm.standardise(x0), levels, eps).mean().item() == pytest.approx(1.0, abs=0.01)


def test_initial_loss_of_plain_images_is_not():
    # sigma_data = 0.5 on [-1, 1], a common mistake: 3.7 instead of 1 where the noise is strong.
    (x0, _), loss = digits("train").first(4000), []
    torch.manual_seed(0)
    for sigma in (0.01, 0.1, 0.5, 1.0, 5.0, 80.0):
        levels = torch.full((4000,), sigma)
        loss.append(EDM().loss_at(zero, x0, levels, torch.randn_like(x0)).mean().item())
    assert loss == pytest.approx([1.0, 1.1, 2.35, 3.16, 3.67, 3.70], rel=0.02)
    right = EDM(sigma_data=0.962).loss_at(zero, x0, levels, torch.randn_like(x0)).mean().item()
    assert right == pytest.approx(1.0, abs=0.01)                                 # sigma_d fitted to the RMS also does


def test_initial_loss_of_a_new_network_is_1():
    torch.manual_seed(0)
    edm, net, (x0, _) = EDM(), UNet(**SMALL), digits("train").first(256)
    assert edm.loss(net, x0).item() == pytest.approx(1.0, abs=0.05)


def test_coefficients_are_derived_from_unit_variance():
    # Input and target of the network have variance 1, and c_skip makes c_out as small as it can be.
    edm, sigma, s2 = EDM(), f64(0.002, 0.1, 0.5, 3.0, 80.0), 0.25
    c_skip, c_out, c_in, c_noise = edm.coefficients(sigma)
    assert torch.allclose(c_in ** 2 * (s2 + sigma ** 2), torch.ones(5, dtype=F64))
    target = lambda skip: (1 - skip) ** 2 * s2 + skip ** 2 * sigma ** 2          # Var[y - c_skip (y + n)]
    assert torch.allclose(c_out ** 2, target(c_skip))
    assert (target(c_skip + 1e-3) > c_out ** 2).all() and (target(c_skip - 1e-3) > c_out ** 2).all()
    assert torch.allclose(c_noise, sigma.log() / 4)
    assert torch.allclose(edm.weight(sigma), (sigma ** 2 + s2) / (sigma * 0.5) ** 2)


def test_vp_arm_is_noise_prediction():
    # weight 1 / sigma^2 and D = x - sigma F: the squared error of the noise, at x / sqrt(1 + sigma^2), as in lesson 05.
    edm, ddpm = NoisePrediction(), load("lesson_05", "model").DDPM()
    torch.manual_seed(0)
    y, eps, t = torch.randn(6, 1, 4, 4), torch.randn(6, 1, 4, 4), torch.tensor([5, 50, 200, 400, 700, 990])
    abar = ddpm.abar[t]
    seen = {}
    def net(x, time):
        seen.update(x=x, time=time)
        return torch.sin(3 * x)
    loss = edm.loss_at(net, y, ((1 - abar) / abar).sqrt().float(), eps)
    assert torch.allclose(seen["x"], ddpm.q_sample(y, t, eps), atol=1e-5)
    assert torch.allclose(loss, (torch.sin(3 * seen["x"]) - eps).square().flatten(1).mean(1), rtol=1e-4)
    assert (seen["time"] - t).abs().max() < 4                                    # of 1000: DDPM's steps are finite


def test_denoiser_is_not_clipped():
    edm, x = EDM(), torch.full((2, 1, 2, 2), 50.0)
    assert torch.allclose(edm.denoise(zero, x, torch.tensor(0.1)), x * 0.25 / 0.26)


# ------------------------------------------------------------------ what the network receives
def test_network_receives_a_quarter_of_the_logarithm():
    edm, seen = EDM(), []
    def net(x, t):
        seen.append((x, t))
        return torch.zeros_like(x)
    x = torch.ones(3, 1, 2, 2, dtype=F64)
    D = edm.denoise(net, x, f64(0.5))
    assert D.dtype == F64 and seen[0][0].dtype == seen[0][1].dtype == torch.float32
    assert torch.allclose(seen[0][1], torch.full((3,), math.log(0.5) / 4))       # not sigma, not times 1000
    assert torch.allclose(seen[0][0], torch.full((3, 1, 2, 2), 2 ** 0.5))


@pytest.mark.parametrize("steps", [18, 40])
def test_neighbouring_levels_have_distinct_embeddings(steps):
    edm = EDM()
    c_noise = edm.coefficients(edm.levels(steps)[:-1])[3]
    emb = time_embedding(c_noise.float(), 32)
    assert (emb.diff(dim=0).norm(dim=1) > 1e-2).all()
    emb = time_embedding(NoisePrediction().coefficients(edm.levels(steps, "vp")[:-1])[3].float(), 32)
    assert (emb.diff(dim=0).norm(dim=1) > 1e-2).all()


# ------------------------------------------------------------------ the convention box: schedules
@pytest.mark.parametrize("name", list(SCHEDULES))
def test_log_snr_at_three_times(name):
    # The state is s (y + sigma eps): read (alpha, sigma) off the sampler's own start, D = 0 and no step.
    plan, t = SCHEDULES[name], f64(0.1, 0.5, 0.9)
    alpha, noise = plan.scale(t), plan.scale(t) * plan.sigma(t)
    integral = 0.1 * t + 19.9 / 2 * t ** 2                                       # of beta
    expected = {"edm": -2 * t.log(), "ve": -t.log(), "vp": -integral - (-(-integral).expm1()).log()}[name]
    assert torch.allclose(2 * (alpha / noise).log(), expected, rtol=1e-10)
    if name == "vp":
        assert torch.allclose(alpha ** 2 + noise ** 2, torch.ones(3, dtype=F64))


def test_vp_is_ddpms_schedule():
    abar = load("lesson_05", "model").DDPM().abar[[99, 499, 999]]
    s = SCHEDULES["vp"].scale(f64(0.1, 0.5, 1.0))
    assert torch.allclose(s ** 2, abar, rtol=0.1)


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_schedules_are_consistent(name):
    plan, t = SCHEDULES[name], torch.linspace(0.05, 1, 7, dtype=F64).requires_grad_()
    for function, dot in ((plan.sigma, plan.sigma_dot), (plan.scale, plan.scale_dot)):
        value = function(t)
        slope = torch.autograd.grad(value.sum(), t)[0] if value.requires_grad else torch.zeros_like(t)
        assert torch.allclose(slope, dot(t), rtol=1e-9)
    sigma = f64(0.002, 0.3, 4.0, 80.0)
    assert torch.allclose(plan.sigma(plan.time(sigma)), sigma, rtol=1e-9)
    assert plan.time(f64(0.0)).item() == 0 and plan.scale(f64(0.0)).item() == 1


# ------------------------------------------------------------------ noise levels: Eq. (5), Table 1
def test_edm_levels():
    sigma = noise_levels("edm", 18)
    assert sigma.dtype == F64 and len(sigma) == 19                               # N levels and 0, not N + 1 and 0
    assert sigma[[0, 17, 18]].tolist() == pytest.approx([80, 0.002, 0], rel=1e-12)
    a, b = 80 ** (1 / 7), 0.002 ** (1 / 7)
    assert sigma[:18].tolist() == pytest.approx([(a + i / 17 * (b - a)) ** 7 for i in range(18)], rel=1e-12)


def test_other_levels():
    for name in model.LEVELS:
        sigma = noise_levels(name, 18)
        assert len(sigma) == 19 and (sigma.diff() < 0).all() and sigma[-1] == 0
        assert sigma[0].item() == pytest.approx(80, rel=3e-3)
        assert sigma[17].item() == pytest.approx(0.0064 if name == "iddpm" else 0.002, rel=0.01)
    assert torch.allclose(SCHEDULES["vp"].time(noise_levels("vp", 9)[:-1]).diff().diff(), torch.zeros(7, dtype=F64),
                          atol=1e-12)
    ratio = noise_levels("ve", 9)[:-1]
    assert torch.allclose(ratio[1:] / ratio[:-1], ratio[1] / ratio[0])
    # The ladder by its recursion: u_{j-1}^2 + 1 = (u_j^2 + 1) / max(abar_{j-1} / abar_j, C_1) from u_M = 0.
    abar, u, ladder = [math.sin(math.pi / 2 * j / 1000 / 1.008) ** 2 for j in range(1001)], 0.0, []
    for j in range(1000, 0, -1):
        u = math.sqrt((u * u + 1) / max(abar[j - 1] / abar[j], 0.001) - 1)
        ladder.append(u)
    assert model.iddpm_ladder().flip(0).tolist() == pytest.approx(ladder, rel=1e-9)
    assert ladder[-9] == pytest.approx(80.2, abs=0.05)
    assert set(noise_levels("iddpm", 20)[:-1].tolist()) <= set(model.iddpm_ladder().tolist())


# ------------------------------------------------------------------ Algorithm 1
@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_order_of_convergence(solver, order, schedule):
    # The exact flow of Gaussian data: x - mean shrinks like sqrt(sigma^2 + std^2).
    mean, std, error = 0.3, 0.5, []
    for steps in (64, 128, 256):
        sigmas = noise_levels("edm", steps, 0.05, 5.0)[:-1]                      # ends above 0: Heun to the last
        x = last(ode_sampler(gaussian(mean, std), f64(2.0).reshape(1, 1, 1, 1), sigmas, schedule, solver))
        exact = mean + (10.0 - mean) * math.sqrt((0.05 ** 2 + std ** 2) / (5 ** 2 + std ** 2))
        error.append(abs(x.item() - exact))
    assert math.log2(error[0] / error[1]) == pytest.approx(order, abs=0.25)
    assert math.log2(error[1] / error[2]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("levels", model.LEVELS)
@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_any_schedule_on_any_levels_ends_at_the_same_image(schedule, levels):
    noise = torch.linspace(-2, 2, 5, dtype=F64).reshape(5, 1, 1, 1)
    exact = 0.3 + (80 * noise - 0.3) * math.sqrt(0.25 / (80 ** 2 + 0.25))
    sigmas = noise_levels(levels, 400)
    x = last(ode_sampler(gaussian(0.3, 0.5), noise * 80 / sigmas[0], sigmas, schedule))
    assert torch.allclose(x, exact, atol=0.05)


def test_calls_and_last_step():
    for solver, calls in (("heun", 35), ("euler", 18)):
        asked = []
        def denoise(x, sigma, asked=asked):
            asked.append(float(sigma))
            return torch.zeros_like(x)
        path = list(ode_sampler(denoise, torch.ones(1, 1, 1, 1), noise_levels("edm", 18), solver=solver))
        assert len(asked) == calls and min(asked) > 0 and len(path) == 18        # never asked at sigma = 0
        assert asked[-1] == pytest.approx(0.002) and path[-1][1].isfinite().all()
    # From sigma_{N-1} to 0 an Euler step along sigma(t) = t lands on D.
    _, x, clean = list(ode_sampler(gaussian(0.3, 0.5), torch.ones(1, 1, 1, 1), noise_levels("edm", 5)))[-1]
    assert torch.allclose(x, clean, atol=1e-12)
    # Along sigma(t) = sqrt(t) it goes half the way only: the VE schedule leaves noise.
    path = list(ode_sampler(gaussian(0.3, 0.5), torch.ones(1, 1, 1, 1), noise_levels("edm", 5), "ve"))
    assert torch.allclose(path[-1][1], (path[-2][1] + path[-1][2]) / 2, atol=1e-12)


def test_one_euler_and_one_heun_step():
    D, x, sigmas = f64(0.2).reshape(1, 1, 1, 1), f64(1.5).reshape(1, 1, 1, 1), f64(2.0, 1.0, 0.0)
    fixed = lambda x, sigma: D
    euler = list(ode_sampler(fixed, x / 2, sigmas, solver="euler"))[0][1].item()
    assert euler == pytest.approx(1.5 - (1.5 - 0.2) / 2)
    bent = lambda x, sigma: 0.1 * x * sigma                                      # D(1.5; 2) = 0.3
    d = (1.5 - 0.3) / 2
    predicted = 1.5 - d
    d_next = (predicted - 0.1 * predicted) / 1
    assert list(ode_sampler(bent, x / 2, sigmas))[0][1].item() == pytest.approx(1.5 - (d + d_next) / 2)


def test_euler_is_ddim():
    # Lesson 06's ddim_step with the same network, on the levels of its own times.
    six = load("lesson_06", "model")
    ddim, edm, xT = six.DDIM(), NoisePrediction(mean=0.5, std=0.25), torch.randn(2, 1, 3, 3, dtype=F64)
    tau = ddim.times(20, "ends")
    sigmas = torch.cat([((1 - ddim.abar[tau]) / ddim.abar[tau]).sqrt().flip(0), f64(0.0)])
    assert edm.standardise(xT).sub(xT).abs().max() < 1e-12                       # lesson 06 knows no standardising
    net = lambda x, t: torch.sin(2 * x)
    start = ddim.abar[999].sqrt() * sigmas[0]
    expected = ddim.sample(net, xT * start, tau)
    x = edm.sample(net, xT, sigmas, solver="euler")
    assert torch.allclose(x, expected.float(), atol=1e-4)


def test_state_is_float64():
    path = ode_sampler(gaussian(0.0, 0.5), torch.ones(1, 1, 1, 1), noise_levels("edm", 1000))
    assert {x.dtype for _, x, _ in path} == {F64}
    # In float32 the last thousandth of a long way is lost in rounding.
    exact = 80 * math.sqrt(0.25 / (80 ** 2 + 0.25))
    x = last(ode_sampler(gaussian(0.0, 0.5), torch.ones(1, 1, 1, 1), noise_levels("edm", 1000))).item()
    assert x == pytest.approx(exact, rel=1e-5)


# ------------------------------------------------------------------ Algorithm 2
def test_without_churn_algorithm_2_is_algorithm_1():
    noise, sigmas = torch.randn(3, 1, 2, 2), noise_levels("edm", 12)
    a = last(ode_sampler(gaussian(0.1, 0.5), noise, sigmas))
    b = last(stochastic_sampler(gaussian(0.1, 0.5), noise, sigmas, churn=0.0))
    assert torch.allclose(a, b, atol=1e-12)
    c = last(stochastic_sampler(gaussian(0.1, 0.5), noise, sigmas, churn=30.0, s_min=100.0, s_max=200.0))
    assert torch.allclose(a, c, atol=1e-12)                                      # no level between the limits


def test_churn_adds_the_noise_it_should():
    # With D = x nothing is removed: the variance of x is what was added, sum of s_noise^2 (sigma_hat^2 - sigma^2).
    torch.manual_seed(0)
    sigmas = noise_levels("edm", 10)
    asked = []
    def keep(x, sigma):
        asked.append(float(sigma))
        return x
    start = torch.zeros(4000, 1, 2, 2)
    x = last(stochastic_sampler(keep, start, sigmas, churn=3.0, s_min=0.05, s_max=50.0, s_noise=1.5))
    inside = [s for s in sigmas.tolist() if 0.05 <= s <= 50]
    expected = sum((1.5 * s) ** 2 * (1.3 ** 2 - 1) for s in inside)
    assert x.var().item() == pytest.approx(expected, rel=0.05)
    assert all(any(abs(a - 1.3 * s) < 1e-9 for a in asked) for s in inside) and 80.0 in asked
    asked.clear()
    last(stochastic_sampler(keep, start[:1], sigmas, churn=1e6))                 # gamma is bounded
    assert max(asked) <= max(80, max(inside) * math.sqrt(2) + 1e-9)


def test_churn_keeps_the_marginals():
    torch.manual_seed(0)
    x = last(stochastic_sampler(gaussian(0.0, 0.5), torch.randn(8000, 1, 2, 2), noise_levels("edm", 60), churn=20.0,
                                s_noise=1.0))
    assert x.std().item() == pytest.approx(0.5, rel=0.03)


def test_same_generator_same_image():
    edm, net, noise = EDM(), lambda x, t: 0.1 * x, torch.randn(2, 1, 4, 4)
    draw = lambda seed: edm.sample(net, noise, edm.levels(6), churn=10.0, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


# ------------------------------------------------------------------ training
def test_noise_levels_of_training():
    torch.manual_seed(0)
    ln = EDM().draw_sigma(20_000).log()
    assert ln.mean().item() == pytest.approx(-1.2, abs=0.03) and ln.std().item() == pytest.approx(1.2, abs=0.03)
    t = SCHEDULES["vp"].time(reproduce.VPLoss().draw_sigma(20_000).double())
    assert t.mean().item() == pytest.approx(0.5, abs=0.02) and 0 < t.min() < 1e-3 and 0.999 < t.max() <= 1 + 1e-6


def test_loss_on_a_fixed_batch():
    edm, net = EDM(), lambda x, t: torch.tanh(x) + t[:, None, None, None]
    y, eps, sigma = torch.full((1, 1, 2, 2), 0.4), torch.full((1, 1, 2, 2), -0.7), torch.tensor([0.3])
    x, total = 0.4 - 0.21, 0.09 + 0.25
    D = 0.25 / total * x + 0.15 / math.sqrt(total) * (math.tanh(x / math.sqrt(total)) + math.log(0.3) / 4)
    assert edm.loss_at(net, y, sigma, eps).item() == pytest.approx(total / 0.15 ** 2 * (D - 0.4) ** 2, rel=1e-5)


@pytest.mark.parametrize("call, what", [
    (lambda: noise_levels("cosine", 10), "levels"), (lambda: noise_levels("edm", 1), "steps"),
    (lambda: noise_levels("iddpm", 1000), "steps"), (lambda: noise_levels("edm", 5, 2.0, 1.0), "sigma_min"),
    (lambda: list(ode_sampler(zero, torch.ones(1), f64(1, 0), "cosine")), "schedule"),
    (lambda: list(ode_sampler(zero, torch.ones(1), f64(1, 0), solver="rk4")), "solver"),
    (lambda: list(stochastic_sampler(zero, torch.ones(1), f64(1, 0), -1.0)), "churn"),
    (lambda: list(EDM().reverse(zero, torch.ones(1, 1, 2, 2), f64(1, 0), churn=4.0, solver="euler")), "solver=euler"),
    (lambda: list(EDM().reverse(zero, torch.ones(1, 1, 2, 2), f64(1, 0), churn=4.0, schedule="vp")), "schedule=vp"),
])
def test_what_it_does_not_know_is_refused(call, what):
    with pytest.raises(ValueError, match=what):
        call()


# ------------------------------------------------------------------ lesson 07: the same equation in another dress
def test_equation_is_the_probability_flow_of_lesson_07():
    # dx/dt by sigma(t), s(t) and D against f x - g^2 score / 2, on the VP SDE; one small Euler step of each.
    vp, plan = load("lesson_07", "model").VP(), SCHEDULES["vp"]
    x, t = f64(-1.0, 0.2, 1.5, 0.7), f64(0.7, 0.7, 0.7, 0.7)
    sigma, s = plan.sigma(t), plan.scale(t)
    assert torch.allclose(s, vp.marginal(t)[0]) and torch.allclose(s * sigma, vp.marginal(t)[1])
    D = gaussian(0.3, 0.5)(x / s, sigma)
    a, g = vp.coefficients(t)
    expected = a * x - 0.5 * g ** 2 * (s * D - x) / (s * sigma) ** 2             # score of x = s (y + sigma eps)
    sigmas = torch.cat([sigma[:1], plan.sigma(t[:1] - 1e-6)])
    (_, moved, _), = ode_sampler(gaussian(0.3, 0.5), x / (s * sigma), sigmas, "vp", "euler")
    assert torch.allclose((moved * plan.scale(t - 1e-6) - x) / -1e-6, expected, rtol=1e-4)


# ------------------------------------------------------------------ diffusers
X = torch.linspace(-1, 1, 6).reshape(1, 1, 2, 3)


def fixed_network(x, c_noise):
    """A "network" F: deterministic, mixes the pixels, knows the noise level."""
    i, j = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    matrix = torch.sin(1.7 * i + 3.1 * j + 0.5).to(x) / 2
    return torch.tanh((x.flatten(1) @ matrix.T).reshape(x.shape)) + 0.3 * c_noise.reshape(-1, 1, 1, 1)


def fixed_noise(x, sigma):
    """The noise that a denoiser sees, for a scheduler that is given noise predictions."""
    return (x - gaussian(0.2, 0.6)(x, sigma) + 0.1 * torch.sin(3 * x)) / sigma


def make_fixture(diffusers):
    """Numbers of EDMEulerScheduler and HeunDiscreteScheduler. `python tests/test_lesson_20.py` writes the fixture."""
    euler = diffusers.EDMEulerScheduler()                                        # sigma_data 0.5, 0.002 to 80, rho 7
    euler.set_timesteps(18)
    parts = [{"sigma": s, "c_noise": euler.precondition_noise(s).item(),
              "input": euler.precondition_inputs(X, s).flatten().tolist(),
              "D": euler.precondition_outputs(X, fixed_network(X, torch.tensor([0.1])), s).flatten().tolist()}
             for s in (0.002, 0.3, 5.0, 80.0)]
    x, path = 80 * X, []
    for t in euler.timesteps:
        output = fixed_network(euler.scale_model_input(x, t), t.reshape(1))
        x = euler.step(output, t, x).prev_sample
        path.append(x.flatten().tolist())
    heun = diffusers.HeunDiscreteScheduler(use_karras_sigmas=True, beta_schedule="linear", beta_start=1e-4,
                                           beta_end=0.02)
    heun.set_timesteps(10)
    y, asked = heun.sigmas[0] * X, []
    for t in heun.timesteps:
        sigma = heun.sigmas[heun.step_index or 0]                                # where the network is asked
        y = heun.step(fixed_noise(y, sigma), t, y).prev_sample
        asked.append(sigma.item())
    return {"diffusers": diffusers.__version__, "sigmas": euler.sigmas.tolist(), "parts": parts, "euler": path,
            "heun_sigmas": heun.sigmas.tolist(), "heun_calls": len(asked), "heun": y.flatten().tolist()}


def assert_equal_to(fixture):
    edm, net = EDM(), lambda x, c_noise: fixed_network(x, c_noise)
    near = lambda value: pytest.approx(value, rel=1e-4, abs=1e-4)
    assert edm.levels(18).tolist() == pytest.approx(fixture["sigmas"], rel=1e-5)
    for part in fixture["parts"]:
        c_skip, c_out, c_in, c_noise = edm.coefficients(torch.tensor([part["sigma"]]))
        assert c_noise.item() == near(part["c_noise"]) and (c_in * X).flatten().tolist() == near(part["input"])
        D = edm.denoise(lambda x, t: fixed_network(X, torch.tensor([0.1])), X, torch.tensor(part["sigma"]))
        assert D.flatten().tolist() == near(part["D"])
    path = list(ode_sampler(lambda x, sigma: edm.denoise(net, x, sigma), X, edm.levels(18), solver="euler"))
    for (_, x, _), expected in zip(path, fixture["euler"], strict=True):
        assert x.flatten().tolist() == near(expected)
    sigmas = f64(*dict.fromkeys(fixture["heun_sigmas"]))                         # each once
    assert sigmas[:-1].tolist() == pytest.approx(
        noise_levels("edm", 10, sigmas[-2].item(), sigmas[0].item())[:-1].tolist(), rel=1e-5)
    x = last(ode_sampler(lambda x, sigma: x - sigma * fixed_noise(x, sigma), X, sigmas))
    assert x.flatten().tolist() == near(fixture["heun"]) and fixture["heun_calls"] == 19


def test_equal_to_the_fixture_of_diffusers():
    assert_equal_to(json.loads(FIXTURE.read_text()))


def test_equal_to_diffusers():
    assert_equal_to(make_fixture(pytest.importorskip("diffusers", reason="pip install -e '.[reference]'")))


# ------------------------------------------------------------------ the scripts: calls, pictures, arms
def test_what_a_call_is_in_sample(capsys, tmp_path, monkeypatch):
    # The number that is printed and recorded is the number of times that the network is asked.
    sample, asked = load("lesson_20", "sample"), []
    load_ = sample.load
    def counted(run, weights):
        edm, net = load_(run, weights)
        return edm, lambda x, t: asked.append(0) or net(x, t)
    monkeypatch.setattr(sample, "load", counted)
    monkeypatch.setattr(sample, "draw", lambda edm, net, n, seed, batch, sigmas, shape, **how: edm.sample(
        net, torch.randn(n, *shape), sigmas, **how))
    for keys in (["steps=3"], ["steps=3", "solver=euler"], ["steps=3", "churn=1"]):
        asked.clear()
        sample.main(["n=1", "weights=published", "threads=1", "device=cpu", f"runs={tmp_path}", *keys])
        assert f" {len(asked)} network calls each" in capsys.readouterr().out


@pytest.mark.parametrize("keys", [["solver=euler"], ["schedule=vp"]])
def test_churn_is_refused_where_algorithm_2_does_not_say_how(keys, tmp_path):
    with pytest.raises(UserError, match="churn=2 is Algorithm 2"):
        load("lesson_20", "sample").main(["n=1", "steps=3", "weights=published", "device=cpu", "churn=2",
                                          f"runs={tmp_path}", *keys])


def test_scores_of_other_ways_have_names_of_their_own(tmp_path, monkeypatch):
    sample, names = load("lesson_20", "sample"), []
    monkeypatch.setattr("utils.run.check_number", lambda n: None)
    monkeypatch.setattr(sample, "score", lambda x: {})
    monkeypatch.setattr(sample, "report", str)
    monkeypatch.setattr(sample.Run, "record", lambda run, name, **entry: names.append(name))
    for keys in ([], ["solver=euler", "levels=vp", "steps=5"], ["schedule=ve"], ["churn=1"]):
        sample.main(["n=1", "steps=3", "metrics=true", "weights=published", "threads=1", "device=cpu",
                     f"runs={tmp_path}", *keys])
    assert names == ["sample_5", "sample_5_euler_vp", "sample_5_ve", "sample_5_churn_1"]


def test_every_way_starts_from_the_same_noise():
    class Silent(torch.nn.Linear):
        def forward(self, x, t):
            seen.append(x)
            return torch.zeros_like(x)
    edm, first = EDM(), []
    for levels, how in (("edm", {}), ("vp", {"solver": "euler"}), ("ve", {"schedule": "vp"}), ("edm", {"churn": 5.0})):
        seen = []
        load("lesson_20", "sample").draw(edm, Silent(1, 1), 3, generators(7, 3), 2, edm.levels(4, levels),
                                         **how)
        first.append(torch.cat([seen[0], seen[len(seen) // 2]]))                 # two batches: of 2 and of 1
    assert first[0].shape == (3, 1, 28, 28) and first[0].std().item() == pytest.approx(1, abs=0.05)
    assert all(torch.allclose(one, first[0], atol=1e-5) for one in first[1:])


def test_pictures_of_noised_digits_have_the_contrast_of_digits():
    edm, sigma = EDM(), 3.0
    y = 0.5 * torch.randn(200_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    noised = y + sigma * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    seen = edm.standardise(load("lesson_20", "sample").scaled(edm, noised, sigma))
    assert seen.std().item() == pytest.approx(0.5, rel=0.01)


if __name__ == "__main__":
    import diffusers

    FIXTURE.write_text(json.dumps(make_fixture(diffusers)) + "\n")
