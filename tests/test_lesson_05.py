"""Lesson 05: the maths of DDPM against closed forms and against the numbers of diffusers' DDPMScheduler."""

import json
import math
from pathlib import Path

import pytest
import torch

from conftest import load
from utils.seeds import generators

model = load("lesson_05", "model")
DDPM, UNet = model.DDPM, model.UNet
FIXTURE = Path(__file__).parent / "fixtures" / "ddpm_scheduler.json"
SMALL = dict(channels=8, mults=(1, 2), blocks=1, attention=(7,), dropout=0.0, groups=4, patch=2)


def times(*values):
    return torch.tensor(values)


class Gaussian(torch.nn.Module):
    """The exact noise prediction for data N(mean, std^2): E[eps | x_t] in closed form. (B, 1, H, W)."""

    def __init__(self, ddpm, mean, std):
        super().__init__()
        self.ddpm, self.mean, self.std = ddpm, mean, std

    def forward(self, xt, t):
        abar = self.ddpm.abar[t].float()[:, None, None, None]
        variance = abar * self.std ** 2 + 1 - abar
        return (1 - abar).sqrt() * (xt - abar.sqrt() * self.mean) / variance


# ------------------------------------------------------------------ schedule and forward process
def test_reference_values_of_the_linear_schedule():
    ddpm = DDPM()
    assert ddpm.abar.dtype == torch.float64
    assert ddpm.abar[500].item() == pytest.approx(0.077797, rel=1e-4)
    assert ddpm.abar[999].item() == pytest.approx(4.036e-5, rel=1e-3)
    assert ddpm.beta_tilde(times(1), times(0)).item() == pytest.approx(5.4532e-5, rel=1e-4)
    ratio = (ddpm.beta(times(1, 100), times(0, 99)) / ddpm.beta_tilde(times(1, 100), times(0, 99))).tolist()
    assert ratio == pytest.approx([2.2, 1.02], rel=5e-3)
    assert ddpm.prior_term(torch.ones(1, 1, 4, 4)).item() == pytest.approx(2.91e-5, rel=2e-3)


def test_log_snr_at_three_times():
    # The convention box: x_t = alpha x_0 + sigma eps with alpha^2 = abar, sigma^2 = 1 - abar, read off from q_sample.
    ddpm, one, zero = DDPM(), torch.ones(3, 1, 1, 1), torch.zeros(3, 1, 1, 1)
    t = times(100, 500, 900)
    alpha, sigma = ddpm.q_sample(one, t, zero).flatten(), ddpm.q_sample(zero, t, one).flatten()
    abar = torch.stack([torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)[:i + 1].neg().log1p().sum().exp()
                        for i in t.tolist()])
    assert torch.allclose(2 * (alpha.log() - sigma.log()), (abar / (1 - abar)).log().float(), atol=1e-5)
    assert ((abar / (1 - abar)).log().tolist() == sorted((abar / (1 - abar)).log().tolist(), reverse=True))


def test_q_sample_equals_the_chain_of_single_steps():
    # x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps_t (Eq. 2): follow mean and variance, step by step.
    ddpm = DDPM(50)
    mean, variance = 1.0, 0.0
    for t in range(50):
        beta = ddpm.beta(times(t), times(t - 1)).item()
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        assert ddpm.abar[t].sqrt().item() == pytest.approx(mean, rel=1e-12)
        assert (1 - ddpm.abar[t]).item() == pytest.approx(variance, rel=1e-12)


def test_noising_is_composed_of_jumps():
    ddpm = DDPM()
    beta = ddpm.beta(times(700, 400), times(400, -1))
    assert (1 - beta).prod().item() == pytest.approx(ddpm.abar[700].item(), rel=1e-12)


# ------------------------------------------------------------------ posterior
@pytest.mark.parametrize("t, s", [(1, 0), (10, 9), (999, 998), (980, 960), (300, 20)])
def test_posterior_is_bayes_rule(t, s):
    # q(x_s | x_t, x_0) ~ q(x_t | x_s) q(x_s | x_0): add precisions, weigh means.
    ddpm = DDPM()
    x0, xt = torch.full((1, 1, 1, 1), 0.3), torch.full((1, 1, 1, 1), -0.8)
    abar_s, beta = ddpm.abar[s].item(), ddpm.beta(times(t), times(s)).item()
    alpha = 1 - beta
    precision = alpha / beta + 1 / (1 - abar_s)
    mean = (math.sqrt(alpha) / beta * -0.8 + math.sqrt(abar_s) * 0.3 / (1 - abar_s)) / precision
    assert ddpm.beta_tilde(times(t), times(s)).item() == pytest.approx(1 / precision, rel=1e-9)
    assert ddpm.q_posterior(x0, xt, times(t), times(s)).item() == pytest.approx(mean, rel=1e-5)


def test_posterior_at_the_last_step_is_x0():
    ddpm, x0, xt = DDPM(), torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    assert torch.allclose(ddpm.q_posterior(x0, xt, times(0, 0), times(-1, -1)), x0, atol=1e-6)
    assert ddpm.beta_tilde(times(0), times(-1)).item() == 0


def test_variances_of_the_reverse_step():
    t, s = times(0, 1, 500), times(-1, 0, 499)
    for variance, at_1 in (("large", "beta"), ("small", "beta_tilde")):
        ddpm = DDPM(variance=variance)
        got = ddpm.reverse_variance(t, s)
        assert got[0].item() == ddpm.beta_tilde(times(1), times(0)).item()      # log-variance at t = 0: beta-tilde_1
        assert torch.equal(got[1:], getattr(ddpm, at_1)(t, s)[1:])
    assert got.dtype == torch.float64


@pytest.mark.parametrize("t", [0, 1, 30, 500])
def test_round_trip_from_output_to_x0_and_mean(t):
    ddpm = DDPM()
    x0, eps = torch.rand(3, 1, 4, 4) * 2 - 1, torch.randn(3, 1, 4, 4)
    t = torch.full((3,), t)
    xt = ddpm.q_sample(x0, t, eps)
    true_mean = ddpm.q_posterior(x0, xt, t, t - 1)
    mean, got = ddpm.p_mean(lambda x, _: eps, xt, t, t - 1, clip=False)
    assert torch.allclose(got, x0, atol=2e-3)
    assert torch.allclose(mean, true_mean, atol=1e-5)


def test_mean_without_clipping_is_equation_11():
    ddpm, xt, eps = DDPM(), torch.randn(4, 1, 4, 4), torch.randn(4, 1, 4, 4)
    t = times(0, 5, 400, 999)
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)[t][:, None, None, None]
    abar = ddpm.abar[t][:, None, None, None]
    expected = (xt.double() - beta / (1 - abar).sqrt() * eps.double()) / (1 - beta).sqrt()
    mean, _ = ddpm.p_mean(lambda x, _: eps, xt, t, t - 1, clip=False)
    assert torch.allclose(mean, expected.float(), atol=2e-5)


def test_clipping_bounds_x0_and_reaches_the_mean():
    ddpm, xt = DDPM(), 3 * torch.randn(4, 1, 4, 4)
    t = torch.full((4,), 990)
    mean, x0 = ddpm.p_mean(lambda x, _: torch.zeros_like(x), xt, t, t - 1)
    assert x0.abs().max() == 1
    assert torch.equal(mean, ddpm.q_posterior(x0, xt, t, t - 1))


# ------------------------------------------------------------------ losses and the bound
def test_equation_12_weight():
    # bound_term of two noises differs by beta^2 / (2 sigma^2 alpha (1 - abar)) times the squared error.
    ddpm, x0, eps = DDPM(variance="large"), torch.rand(1, 1, 8, 8) * 2 - 1, torch.randn(1, 1, 8, 8)
    t = times(300)
    xt, error = ddpm.q_sample(x0, t, eps), 0.1 * torch.randn(1, 1, 8, 8)

    def term(output):
        return ddpm.bound_term(x0, xt, t, ddpm.p_mean(lambda x, _: output, xt, t, t - 1, clip=False)[0]).item()

    beta, abar = ddpm.beta(t, t - 1).item(), ddpm.abar[300].item()
    weight = beta ** 2 / (2 * beta * (1 - beta) * (1 - abar)) / math.log(2)
    assert term(eps + error) - term(eps) == pytest.approx(weight * error.square().mean().item(), rel=1e-3)


def test_bound_term_is_the_divergence_of_two_gaussians():
    ddpm = DDPM(variance="large")
    x0, xt, mean = torch.rand(1, 1, 4, 4), torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    t = times(37)
    q = torch.distributions.Normal(ddpm.q_posterior(x0, xt, t, t - 1), ddpm.beta_tilde(t, t - 1).sqrt().float())
    p = torch.distributions.Normal(mean, ddpm.beta(t, t - 1).sqrt().float())
    expected = torch.distributions.kl_divergence(q, p).mean().item() / math.log(2)
    assert ddpm.bound_term(x0, xt, t, mean).item() == pytest.approx(expected, rel=1e-4)


def test_discretised_decoder_sums_to_one_and_has_open_tails():
    levels = torch.arange(256) / 127.5 - 1
    for mean, sigma in ((0.1, 0.007), (-1.3, 0.2), (0.99, 3.0)):
        logp = model.discretized_log_likelihood(levels, torch.full((256,), mean), torch.full((256,), sigma))
        assert logp.double().exp().sum().item() == pytest.approx(1, abs=1e-5)
    far = model.discretized_log_likelihood(torch.tensor([1.0]), torch.tensor([-1.0]), torch.tensor([0.0074]))
    assert torch.isfinite(far).all() and far < -1000


def test_discretised_decoder_is_the_mass_of_the_bin():
    # Bins reach half a level to both sides; the first and the last are open. All against an ordinary normal cdf.
    phi = torch.distributions.Normal(0.0, 1.0).cdf
    level = lambda i: torch.tensor(i / 127.5 - 1, dtype=torch.float64)
    for i, mean, sigma in ((100, 100 / 127.5 - 1, 0.01), (100, -0.21, 0.01), (7, -0.9, 0.05), (254, 1.0, 0.02)):
        mass = phi((level(i) + 1 / 255 - mean) / sigma) - phi((level(i) - 1 / 255 - mean) / sigma)
        got = model.discretized_log_likelihood(level(i).float(), torch.tensor(mean), torch.tensor(sigma))
        assert got.item() == pytest.approx(mass.log().item(), rel=1e-3)
    for i, mean, side in ((0, -0.995, 1), (255, 0.99, -1)):
        mass = phi(side * (level(i) + side / 255 - mean) / 0.0074)
        got = model.discretized_log_likelihood(level(i).float(), torch.tensor(mean), torch.tensor(0.0074))
        assert got.item() == pytest.approx(mass.log().item(), rel=1e-3)


def test_discretised_decoder_has_gradients_far_away():
    mean = torch.tensor([-1.0, 0.5], requires_grad=True)
    model.discretized_log_likelihood(torch.tensor([1.0, -0.2]), mean, torch.tensor([0.0074, 0.0074])).sum().backward()
    assert torch.isfinite(mean.grad).all() and mean.grad[0] > 0 > mean.grad[1]


def test_loss_of_zero_prediction():
    torch.manual_seed(0)
    x0 = torch.rand(4096, 1, 2, 2) * 2 - 1
    ddpm = DDPM()
    assert ddpm.loss(lambda x, t: torch.zeros_like(x), x0).item() == pytest.approx(1, abs=0.03)     # E eps^2


def test_simple_loss_of_the_exact_network_is_known():
    # E |eps - E[eps | x_t]|^2 = abar std^2 / (abar std^2 + 1 - abar), mean over t.
    torch.manual_seed(0)
    ddpm, std = DDPM(20), 0.5
    x0 = std * torch.randn(60_000, 1, 1, 1)
    signal = ddpm.abar[:20] * std ** 2
    expected = (signal / (signal + 1 - ddpm.abar[:20])).mean().item()
    assert ddpm.loss(Gaussian(ddpm, 0.0, std), x0).item() == pytest.approx(expected, rel=0.01)


def test_network_is_told_the_time_that_the_image_was_noised_to():
    torch.manual_seed(0)
    ddpm, seen = DDPM(5, beta_1=0.05, beta_T=0.5), {}
    ddpm.loss(lambda x, t: seen.update(x=x, t=t) or torch.zeros_like(x), torch.zeros(50_000, 1, 1, 1))
    for t in range(5):                                 # x_0 = 0: x_t has the variance 1 - abar_t
        at_t = seen["x"][seen["t"] == t]
        assert len(at_t) == pytest.approx(10_000, rel=0.05)                     # t is uniform
        assert at_t.square().mean().item() == pytest.approx(1 - ddpm.abar[t].item(), rel=0.06)


@pytest.mark.parametrize("variance", ["large", "small"])
def test_bound_of_gaussian_data_has_a_closed_form(variance):
    # With the exact denoiser the error of mu is a^2 Var(x_0 | x_t), so every L_{t-1} is known. And the bound bounds.
    torch.manual_seed(0)
    ddpm, std = DDPM(100, beta_1=1e-3, variance=variance), 0.2
    x0 = ((std * torch.randn(400, 1, 6, 6)).clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1
    prior, terms, rmse = ddpm.bound(Gaussian(ddpm, 0.0, std), x0)
    assert terms.shape == rmse.shape == (400, 100)
    t = torch.arange(1, 100)
    sigma2, ratio = ddpm.reverse_variance(t, t - 1), ddpm.beta_tilde(t, t - 1) / ddpm.reverse_variance(t, t - 1)
    known = std ** 2 * (1 - ddpm.abar[t]) / (ddpm.abar[t] * std ** 2 + 1 - ddpm.abar[t])            # Var(x_0 | x_t)
    a = ddpm.abar[t - 1].sqrt() * ddpm.beta(t, t - 1) / (1 - ddpm.abar[t])
    expected = (0.5 * (ratio - 1 - ratio.log()) + a ** 2 * known / (2 * sigma2)) / math.log(2)
    assert torch.allclose(terms[:, 1:].mean(0).double(), expected, rtol=0.04)
    assert torch.allclose(rmse[:, 1:].square().mean(0).sqrt().double() / 127.5, known.sqrt(), rtol=0.03)
    entropy = 0.5 * math.log2(2 * math.pi * math.e * std ** 2) - math.log2(2 / 255)
    assert entropy - 0.02 < (prior + terms.sum(1)).mean().item() < entropy + 1.2


# ------------------------------------------------------------------ sampling
@pytest.mark.parametrize("variance", ["large", "small"])
@pytest.mark.parametrize("steps", [200, 20])
def test_sampler_on_gaussian_data(variance, steps):
    # With the exact network every step is linear, x_s = k x_t + ... + sigma z: follow the variance, then sample.
    torch.manual_seed(0)
    ddpm, std = DDPM(200, beta_1=5e-4, beta_T=0.1, variance=variance), 0.3
    ts = torch.linspace(199, 0, steps).round().long().tolist() + [-1]
    expected = 1.0
    for t, s in zip(ts[:-1], ts[1:]):
        one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)             # mu-tilde = a x_0 + b x_t
        a, b = (ddpm.q_posterior(x0, xt, times(t), times(s)).item() for x0, xt in ((one, zero), (zero, one)))
        abar = ddpm.abar[t].item()
        k = a * math.sqrt(abar) * std ** 2 / (abar * std ** 2 + 1 - abar) + b
        sigma2 = ddpm.reverse_variance(times(t), times(s)).item() if s >= 0 else 0
        expected = k ** 2 * expected + sigma2
    x = ddpm.sample(Gaussian(ddpm, 0.2, std), 20_000, steps, shape=(1, 2, 2), clip=False)
    assert x.mean().item() == pytest.approx(0.2, abs=0.005)
    assert x.std().item() == pytest.approx(math.sqrt(expected), rel=0.01)
    if steps == 200:                                   # many small steps bring the data back
        assert math.sqrt(expected) == pytest.approx(std, rel=0.06)


def test_no_noise_at_the_last_step():
    ddpm = DDPM(10)
    net = Gaussian(ddpm, 0.0, 0.5)
    path = list(ddpm.reverse(net, torch.randn(2, 1, 2, 2)))
    assert [t for t, _, _ in path] == list(range(9, -1, -1))
    _, x, x0 = path[-1]
    assert torch.allclose(x, x0, atol=1e-6)


def test_strided_times_hold_both_ends_and_bad_counts_are_refused():
    ddpm = DDPM()
    visited = [t for t, _, _ in ddpm.reverse(lambda x, t: torch.zeros_like(x), torch.zeros(1, 1, 2, 2), 50)]
    assert visited[0] == 999 and visited[-1] == 0 and len(visited) == 50 == len(set(visited))
    for steps in (0, 1, 1001):
        with pytest.raises(ValueError, match="steps"):
            list(ddpm.reverse(lambda x, t: x, torch.zeros(1, 1, 2, 2), steps))


def test_an_image_has_its_own_noise():
    # Image 3 of a seed is the same for any number of images and any batch.
    ddpm, net = DDPM(20), UNet(**SMALL).eval()
    torch.nn.init.normal_(net.out[2].weight)
    sample = load("lesson_05", "sample")
    a, b, c = (sample.draw(ddpm, net, n, 3, generators(0, n), batch=batch) for n, batch in ((5, 5), (5, 2), (4, 3)))
    assert torch.allclose(a, b, atol=1e-5) and torch.allclose(a[:4], c, atol=1e-5) and not torch.allclose(a[0], a[1])


def test_same_generator_same_samples():
    ddpm, net = DDPM(10), UNet(**SMALL).eval()
    a, b, c = (ddpm.sample(net, 2, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("values", [dict(variance="x"), dict(timesteps=1)])
def test_process_refuses_what_it_does_not_know(values):
    with pytest.raises(ValueError):
        DDPM(**values)


# ------------------------------------------------------------------ diffusers
def scheduler_cases():
    """The cases of the fixture: inputs by formula, so that nothing depends on a random generator."""
    base = torch.linspace(-1, 1, 4).reshape(1, 1, 2, 2)
    inputs = {"sample": 1.3 * base, "output": torch.sin(5 * base), "noise": torch.cos(7 * base)}
    for variance in ("small", "large"):
        for t, s in ((999, 998), (500, 499), (1, 0), (0, -1), (980, 960), (20, 0)):
            yield variance, t, s, inputs


def ours(variance, t, s, inputs):
    ddpm = DDPM(variance=variance)
    net = lambda x, _: inputs["output"]
    mean, x0 = ddpm.p_mean(net, inputs["sample"], times(t), times(s))
    sigma = ddpm.reverse_variance(times(t), times(s)).sqrt().float()[:, None, None, None]
    return (mean + sigma * inputs["noise"] if s >= 0 else mean), x0


def test_equal_to_the_fixture_of_diffusers():
    fixture = json.loads(FIXTURE.read_text())["cases"]
    cases = list(scheduler_cases())
    assert len(fixture) == len(cases) == 12
    for (variance, t, s, inputs), row in zip(cases, fixture):
        assert (row["variance"], row["t"], row["s"]) == (variance, t, s)
        x, x0 = ours(variance, t, s, inputs)
        assert torch.allclose(x.flatten(), torch.tensor(row["x"]), atol=2e-6), row
        assert torch.allclose(x0.flatten(), torch.tensor(row["x0"]), atol=2e-6), row


def test_fixture_is_what_diffusers_gives():
    diffusers = pytest.importorskip("diffusers", reason="dev reference: pip install -e '.[reference]'")
    assert json.loads(FIXTURE.read_text())["cases"] == make_fixture(diffusers)["cases"]


def make_fixture(diffusers):
    """One step of diffusers' DDPMScheduler for every case. `python tests/test_lesson_05.py` writes the fixture."""
    import diffusers.schedulers.scheduling_ddpm as module

    rows = []
    for variance, t, s, inputs in scheduler_cases():
        scheduler = diffusers.DDPMScheduler(beta_schedule="linear", variance_type=f"fixed_{variance}", clip_sample=True)
        # Its float32 schedule keeps three digits of 1 - abar at small t: give it the same one in float64.
        scheduler.betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        scheduler.alphas = 1 - scheduler.betas
        scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
        scheduler.one = torch.tensor(1.0, dtype=torch.float64)
        if t - s > 1:
            scheduler.set_timesteps(50)                # "leading": 980, 960, ..., 0
        original, module.randn_tensor = module.randn_tensor, lambda *a, noise=inputs["noise"], **k: noise
        try:
            step = scheduler.step(inputs["output"], t, inputs["sample"])
        finally:
            module.randn_tensor = original
        rows.append({"variance": variance, "t": t, "s": s, "x": step.prev_sample.flatten().tolist(),
                     "x0": step.pred_original_sample.flatten().tolist()})
    return {"diffusers": diffusers.__version__, "cases": rows}


# ------------------------------------------------------------------ network
@pytest.mark.parametrize("enters, c_out, leaves", [(1, None, 1), (3, None, 3), (1, 2, 2), (5, 1, 1)])
def test_channels_in_and_out(enters, c_out, leaves):
    net = UNet(**SMALL, image_channels=enters, c_out=c_out)
    assert net(torch.randn(2, enters, 28, 28), times(3, 900)).shape == (2, leaves, 28, 28)


def test_a_subclass_changes_one_part_and_keeps_the_others():
    class Two(UNet):
        """Told the time twice as loud, and nothing at the bottom but one block."""

        def embed(self, t):
            return 2 * super().embed(t)

        def bottom(self, c):
            return model.Level(self.block(c, c))

    torch.manual_seed(0)
    net, told = randomised(Two(**SMALL)).eval(), []
    for block in (m for m in net.modules() if isinstance(m, model.ResBlock)):
        block.register_forward_pre_hook(lambda _, inputs: told.append(inputs[1]))
    net(torch.randn(1, 1, 28, 28), times(7))
    expected = 2 * net.time(model.time_embedding(times(7), 8))
    assert len(net.middle) == 1 and len(told) == 7 and all(torch.equal(emb, expected) for emb in told)
    names = {name for name, _ in UNet(**SMALL).named_parameters()}
    assert {name for name, _ in net.named_parameters()} < names


def test_parameter_count_of_the_papers_cifar_network():
    with torch.device("meta"):
        net = UNet(channels=128, mults=(1, 2, 2, 2), blocks=2, attention=(16,), image_size=32, image_channels=3)
    assert sum(p.numel() for p in net.parameters()) == 35_746_307


@pytest.mark.parametrize("patch, attention", [(1, (7,)), (2, (7,)), (1, ())])
def test_shapes_and_zero_start(patch, attention):
    net = UNet(channels=8, mults=(1, 2, 2) if patch == 1 else (1, 2), blocks=1, attention=attention, dropout=0.0,
               groups=4, patch=patch)
    x = torch.randn(2, 1, 28, 28)
    assert net(x, times(3, 900)).shape == x.shape
    assert (net(x, times(3, 900)) == 0).all()                                   # the last convolution starts at zero


def test_zero_initialised_layers_are_the_papers():
    net = UNet(**SMALL)
    zero = {name for name, p in net.named_parameters() if name.endswith("weight") and (p == 0).all()}
    expected = {f"{name}.conv2.weight" for name, m in net.named_modules() if isinstance(m, model.ResBlock)}
    expected |= {f"{name}.out.weight" for name, m in net.named_modules() if isinstance(m, model.Attention)}
    assert zero == expected | {"out.2.weight"}
    block, attention = model.ResBlock(8, 8, 32, groups=4), model.Attention(8, groups=4)
    x = torch.randn(2, 8, 7, 7)
    assert torch.equal(block(x, torch.randn(2, 32)), x) and torch.equal(attention(x), x)
    assert all(m.eps == 1e-6 for m in net.modules() if isinstance(m, torch.nn.GroupNorm))


def test_downsampling_pads_right_and_bottom_only():
    down = model.Downsample(1)
    torch.nn.init.zeros_(down.conv.weight)
    down.conv.weight.data[0, 0, 0, 0] = 1                                       # picks the top left of each window
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert torch.equal(down(x), x[:, :, ::2, ::2])


def randomised(net):
    """The network with all weights away from zero."""
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net


def test_time_reaches_every_block():
    net, x = randomised(UNet(**SMALL)).eval(), torch.randn(1, 1, 28, 28)
    assert not torch.allclose(net(x, times(5)), net(x, times(6)), atol=1e-4)
    for block in (m for m in net.modules() if isinstance(m, model.ResBlock)):
        x = torch.randn(1, block.conv1.in_channels, 7, 7)
        assert not torch.allclose(block(x, torch.zeros(1, 32)), block(x, torch.ones(1, 32)), atol=1e-4)


def test_block_equals_its_formula():
    # Order of the official block: norm, swish, conv, + time, norm, swish, dropout, conv, + skip.
    block = randomised(model.ResBlock(8, 16, 32, dropout=0.5, groups=4))
    x, emb = torch.randn(2, 8, 7, 7), torch.randn(2, 32)
    silu, norm = torch.nn.functional.silu, torch.nn.functional.group_norm
    h = block.conv1(silu(norm(x, 4, block.norm1.weight, block.norm1.bias, 1e-6)))
    h = h + block.time(silu(emb))[:, :, None, None]
    h = silu(norm(h, 4, block.norm2.weight, block.norm2.bias, 1e-6))
    assert torch.allclose(block.eval()(x, emb), block.skip(x) + block.conv2(h), atol=1e-4)
    torch.manual_seed(3)
    dropped = torch.nn.functional.dropout(h, 0.5)
    torch.manual_seed(3)
    assert torch.allclose(block.train()(x, emb), block.skip(x) + block.conv2(dropped), atol=1e-4)


def test_dropout_acts_in_training_only():
    net = randomised(UNet(**SMALL | {"dropout": 0.5}))
    x, t = torch.randn(2, 1, 28, 28), times(5, 10)
    assert not torch.equal(net.train()(x, t), net(x, t))
    assert torch.equal(net.eval()(x, t), net(x, t))


def test_attention_equals_the_formula():
    layer = model.Attention(8, groups=4)
    torch.nn.init.normal_(layer.out.weight)
    x = torch.randn(2, 8, 3, 5)                                                 # not square on purpose
    q, k, v = layer.qkv(layer.norm(x).flatten(2).transpose(1, 2)).transpose(1, 2).chunk(3, dim=1)
    weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / math.sqrt(8), dim=2)
    expected = x + layer.out(torch.einsum("bij,bcj->bic", weights, v)).transpose(1, 2).reshape(x.shape)
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_time_embedding():
    e = model.time_embedding(torch.arange(1000), 32)
    assert e.shape == (1000, 32) and torch.equal(e[0], torch.cat([torch.zeros(16), torch.ones(16)]))
    assert torch.allclose(e[:, 0], torch.arange(1000.0).sin(), atol=1e-4)
    assert torch.allclose(e[:, 15], (torch.arange(1000.0) / 10000).sin(), atol=1e-6)
    assert (e[1:] - e[:-1]).norm(dim=1).min() > 1e-2                            # t, not t / T


def test_one_batch_can_be_overfitted():
    # A single image leaves nothing to guess: the loss can fall to 0. Predicting nothing gives 1.
    # Adam needs a few dozen steps for it; half of the way there shows that the gradients are right.
    torch.manual_seed(0)
    ddpm, net = DDPM(100), UNet(**SMALL)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    x0, losses = -torch.ones(8, 1, 28, 28), []
    for _ in range(50):
        loss = ddpm.loss(net, x0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.3 < 0.9 < losses[0]


TWIN = dict(channels=8, mults=(1, 2), blocks=1, attention=(4,), dropout=0.0, groups=4, image_size=8)


def twin():
    """A small network with weights by formula, its input and its output: what diffusers' UNet2DModel must give too."""
    net = UNet(**TWIN).eval()
    for i, p in enumerate(net.parameters()):
        wave = 0.3 * torch.sin(torch.arange(p.numel()) * (0.7 + 0.013 * i) + i)
        p.data = wave.reshape(p.shape) + 0.5 * (p.dim() == 1)
    x, t = torch.cos(torch.arange(128.0)).reshape(2, 1, 8, 8), times(3, 777)
    with torch.no_grad():
        return net, x, t, net(x, t)


def test_network_equals_the_fixture_of_diffusers():
    *_, y = twin()
    expected = torch.tensor(json.loads(FIXTURE.with_name("ddpm_unet.json").read_text())["output"])
    assert expected.std() > 0.1 and torch.allclose(y.flatten(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


def test_fixture_of_the_network_is_what_diffusers_gives():
    diffusers = pytest.importorskip("diffusers", reason="dev reference: pip install -e '.[reference]'")
    y = torch.tensor(make_unet_fixture(diffusers)["output"])
    expected = torch.tensor(json.loads(FIXTURE.with_name("ddpm_unet.json").read_text())["output"])
    assert torch.allclose(y, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


def make_unet_fixture(diffusers):
    """The output of diffusers' UNet2DModel, in the shape of DDPM's network, with the weights of `twin`."""
    net, x, t, _ = twin()
    theirs = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, freq_shift=1, flip_sin_to_cos=False, downsample_padding=0,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16), layers_per_block=1, attention_head_dim=None, norm_num_groups=4, norm_eps=1e-6)
    theirs.eval()
    pairs = [(net.stem, theirs.conv_in), (net.time[0], theirs.time_embedding.linear_1),
             (net.time[2], theirs.time_embedding.linear_2), (net.out[0], theirs.conv_norm_out),
             (net.out[2], theirs.conv_out)]

    def block(mine, other):
        names = {"norm1": "norm1", "conv1": "conv1", "time": "time_emb_proj", "norm2": "norm2", "conv2": "conv2"}
        names |= {"skip": "conv_shortcut"} if other.conv_shortcut is not None else {}
        pairs.extend((getattr(mine, a), getattr(other, b)) for a, b in names.items())

    def attention(mine, other):
        pairs.extend([(mine.norm, other.group_norm), (mine.out, other.to_out[0])])
        for i, layer in enumerate((other.to_q, other.to_k, other.to_v)):
            layer.weight.data, layer.bias.data = mine.qkv.weight.chunk(3)[i].clone(), mine.qkv.bias.chunk(3)[i].clone()

    for mine, others in ((iter(net.down), theirs.down_blocks), (iter(net.up), theirs.up_blocks)):
        for part in others:
            for i, other in enumerate(part.resnets):
                first, *rest = next(mine)
                block(first, other)
                assert len(rest) == hasattr(part, "attentions")
                if rest:
                    attention(rest[0], part.attentions[i])
            pairs.extend((next(mine).conv, change.conv) for change in (
                getattr(part, "downsamplers", None) or getattr(part, "upsamplers", None) or []))
    block(net.middle[0], theirs.mid_block.resnets[0])
    attention(net.middle[1], theirs.mid_block.attentions[0])
    block(net.middle[2], theirs.mid_block.resnets[1])
    for mine, other in pairs:
        other.load_state_dict(mine.state_dict())
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in net.parameters())
    with torch.no_grad():
        return {"diffusers": diffusers.__version__, "output": theirs(x, t).sample.flatten().tolist()}


# ------------------------------------------------------------------ configuration
def test_gpu_overlay_has_the_papers_shape():
    from utils.config import parse

    config = parse((Path(__file__).parent.parent / "lesson_05" / "config.yaml").read_text())
    net = UNet(**config["unet"] | config["gpu"]["unet"] | {"channels": 32})     # narrow: the shapes are the point
    x = torch.randn(1, 1, 28, 28)
    assert net(x, times(5)).shape == x.shape
    attending = [m for m in net.modules() if isinstance(m, model.Attention)]
    assert len(attending) == 2 + 3 + 1                                          # 14 x 14 down, up, and the middle
    with torch.device("meta"):
        paper = UNet(**config["unet"] | config["gpu"]["unet"])
        assert paper(torch.empty(2, 1, 28, 28), torch.zeros(2, dtype=torch.long)).shape == (2, 1, 28, 28)


if __name__ == "__main__":
    import diffusers

    FIXTURE.write_text(json.dumps(make_fixture(diffusers), indent=0) + "\n")
    FIXTURE.with_name("ddpm_unet.json").write_text(json.dumps(make_unet_fixture(diffusers), indent=0) + "\n")
