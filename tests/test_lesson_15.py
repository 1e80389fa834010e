"""Lesson 15: classifier-free guidance against closed forms, exact mixtures and diffusers' DDIMScheduler."""

import json
import math
from pathlib import Path

import pytest
import torch

from conftest import load
from utils import UserError

model, parent = load("lesson_15", "model"), load("lesson_05", "model")
DDPM, UNet, Mixture, drop, guided, given = (
    model.DDPM, model.UNet, model.Mixture, model.drop, model.guided, model.given)
FIXTURE = Path(__file__).parent / "fixtures" / "cfg_ddim.json"
SMALL = dict(channels=8, mults=(1, 2), blocks=1, attention=(), dropout=0.0, groups=4, patch=2)
TRIANGLE = [[0.0, 1.0], [-0.866, -0.5], [0.866, -0.5]]


def times(*values):
    return torch.tensor(values)


def coefficients(ddpm, t, s):
    """a and b of the posterior mean a x_0 + b x_t, two (1, 1, 1, 1)."""
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    return ddpm.q_posterior(one, zero, t, s), ddpm.q_posterior(zero, one, t, s)


# ------------------------------------------------------------------ log-SNR, Section 2
def test_log_snr_ends_and_middle():
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    lam = model.log_snr(u)
    assert lam[[0, 50, 100]].tolist() == pytest.approx([20, 0, -20], abs=1e-8)
    assert (lam.diff() < 0).all() and torch.allclose(lam, -lam.flip(0), atol=1e-8)
    assert model.log_snr(u, -3.0, 7.0)[[0, 100]].tolist() == pytest.approx([7, -3], abs=1e-9)
    b = math.atan(math.exp(-10))
    a = math.atan(math.exp(10)) - b
    assert torch.allclose(lam.sigmoid(), torch.cos(a * u + b) ** 2, atol=1e-12)           # a cosine schedule


def test_uniform_u_is_a_hyperbolic_secant_in_lambda():
    u = torch.linspace(0.001, 0.999, 2001, dtype=torch.float64)
    lam = model.log_snr(u)
    density = -1 / torch.gradient(lam, spacing=(u,))[0]
    middle = lam.abs() < 8
    assert torch.allclose(density[middle], 1 / (2 * math.pi * torch.cosh(lam[middle] / 2)), rtol=2e-3)


def test_log_snr_at_three_times():
    # The convention box: x_t = alpha x_0 + sigma eps, read off from q_sample; u = t / (T - 1).
    ddpm, one, zero = DDPM(), torch.ones(3, 1, 1, 1), torch.zeros(3, 1, 1, 1)
    t = times(100, 500, 900)
    alpha, sigma = ddpm.q_sample(one, t, zero).flatten(), ddpm.q_sample(zero, t, one).flatten()
    expected = [-2 * math.log(math.tan(math.pi / 2 * i / 999)) for i in t.tolist()]      # b = 5e-5 left out
    assert (2 * (alpha.log() - sigma.log())).tolist() == pytest.approx(expected, abs=2e-3)
    assert torch.allclose(alpha ** 2 + sigma ** 2, torch.ones(3), atol=1e-6)


@pytest.mark.parametrize("t, s", [(1, 0), (999, 998), (500, 499), (700, 300), (20, 0)])
def test_step_in_log_snr_is_the_papers(t, s):
    # Sec. 2 writes the step from lambda to lambda' > lambda with e^(lambda - lambda'); the code with abar.
    ddpm, t, s = DDPM(), times(t), times(s)
    lam, lam_ = torch.logit(ddpm.abar[t]), torch.logit(ddpm.abar[s])
    alpha, alpha_, var, var_ = lam.sigmoid().sqrt(), lam_.sigmoid().sqrt(), (-lam).sigmoid(), (-lam_).sigmoid()
    r = (lam - lam_).exp()
    assert torch.allclose(ddpm.beta(t, s), (1 - r) * var, rtol=1e-5, atol=0)
    assert torch.allclose(ddpm.beta_tilde(t, s), (1 - r) * var_, rtol=1e-5, atol=0)
    for v in (0.0, 0.3, 1.0):
        expected = ((1 - r) * var_) ** (1 - v) * ((1 - r) * var) ** v
        assert torch.allclose(DDPM(v=v).reverse_variance(t, s), expected, rtol=1e-5, atol=0)
    x0, xt = torch.randn(1, 1, 2, 2), torch.randn(1, 1, 2, 2)
    expected = (r * alpha_ / alpha).item() * xt + ((1 - r) * alpha_).item() * x0
    assert torch.allclose(ddpm.q_posterior(x0, xt, t, s), expected, atol=2e-6)


def test_variance_lies_between_lesson_05s_two():
    # v = 0 is "small", v = 1 is "large"; in between, logarithms are mixed, as lesson 09 does it for every pixel.
    t, s, small, large = times(300, 999, 40), times(280, 500, 0), parent.DDPM(variance="small"), parent.DDPM(
        variance="large")
    small.abar = large.abar = DDPM().abar
    low, high = small.reverse_variance(t, s), large.reverse_variance(t, s)
    assert torch.allclose(DDPM(v=0.0).reverse_variance(t, s), low) and (low < high).all()
    assert torch.allclose(DDPM(v=1.0).reverse_variance(t, s), high)
    assert torch.allclose(DDPM(v=0.3).reverse_variance(t, s).log(), 0.3 * high.log() + 0.7 * low.log())


def test_process_is_lesson_05s_but_for_its_schedule():
    torch.manual_seed(0)
    ours, theirs, t, s = DDPM(v=0.0), parent.DDPM(), times(999, 500, 7), times(900, 499, 0)
    theirs.abar = ours.abar
    x, eps = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    assert torch.equal(ours.q_sample(x, t, eps), theirs.q_sample(x, t, eps))
    for clip in (True, False):
        pairs = zip(*(process.p_mean(lambda *_: eps, x, t, s, clip) for process in (ours, theirs)))
        for mine, other in pairs:
            assert torch.allclose(mine, other, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------ Algorithm 1
def test_labels_are_dropped_one_by_one():
    torch.manual_seed(0)
    c = torch.arange(10).repeat(2000)
    null = torch.full_like(c, 10)
    for p in (0.1, 0.5):
        dropped = drop(c, null, p)
        rate = float((dropped == 10).float().mean())
        assert abs(rate - p) < 4 * math.sqrt(p * (1 - p) / len(c))                        # binomial error
        assert torch.equal(dropped[dropped != 10], c[dropped != 10])
        batches = (dropped.view(-1, 50) == 10).float().mean(1)
        assert 0.8 < float(batches.var() / (p * (1 - p) / 50)) < 1.2                      # a coin for a batch: 50
    assert torch.equal(drop(c, null, 0.0), c) and torch.equal(drop(c, null, 1.0), null)


def test_loss_of_the_exact_network_is_known():
    # E |eps - E[eps | x_t]|^2 = abar std^2 / (abar std^2 + 1 - abar), mean over the times.
    torch.manual_seed(0)
    ddpm, std = DDPM(20), 0.5
    x0 = std * torch.randn(40_000, 1, 1, 1)
    signal = ddpm.abar[:20] * std ** 2
    expected = (signal / (signal + 1 - ddpm.abar[:20])).mean().item()
    exact, c = Mixture(ddpm, [[0.0]], std), torch.zeros(len(x0), dtype=torch.long)
    assert ddpm.loss(given(exact, c), x0).item() == pytest.approx(expected, rel=0.015)
    assert ddpm.loss(lambda x, t: torch.zeros_like(x), x0).item() == pytest.approx(1, abs=0.02)


def test_network_is_told_the_time_that_the_image_was_noised_to():
    torch.manual_seed(0)
    ddpm, seen = DDPM(5, low=-4.0, high=4.0), {}
    ddpm.loss(lambda x, t: seen.update(x=x, t=t) or torch.zeros_like(x), torch.zeros(50_000, 1, 1, 1))
    for t in range(5):                                 # x_0 = 0: x_t has the variance 1 - abar_t
        at_t = seen["x"][seen["t"] == t]
        assert len(at_t) == pytest.approx(10_000, rel=0.05)
        assert at_t.square().mean().item() == pytest.approx(1 - ddpm.abar[t].item(), rel=0.06)


# ------------------------------------------------------------------ guidance, Section 3.2
def linear_net(xt, t, c):
    return xt * (c.float() + 1)[:, None, None, None] + t[:, None, None, None]


@pytest.mark.parametrize("w", [0, 0.0, 0.5, 1, 1.0, 2, 4.5])
def test_guidance_is_equation_6(w):
    torch.manual_seed(0)
    x, t, c, null = torch.randn(2, 1, 3, 3), times(1, 2), times(3, 5), times(10, 10)
    eps_c, eps_u = linear_net(x, t, c), linear_net(x, t, null)
    eps, papers = guided(linear_net, c, null, w)(x, t), w - 1
    assert torch.allclose(eps, eps_u + w * (eps_c - eps_u), atol=1e-4)                    # the course, GLIDE, diffusers
    assert torch.allclose(eps, (1 + papers) * eps_c - papers * eps_u, atol=1e-4)          # the paper
    if w in (0, 1):
        assert torch.equal(eps, eps_c if w else eps_u)


def test_guidance_is_linear_in_w():
    x, t, c, null = torch.randn(2, 1, 3, 3), times(1, 2), times(3, 5), times(10, 10)
    at = {w: guided(linear_net, c, null, w)(x, t) for w in (0, 1, 2, 3, 6)}
    assert torch.allclose(at[3] - at[2], at[2] - at[1], atol=1e-4) and not torch.allclose(at[3], at[2], atol=1e-2)
    assert torch.allclose(at[6] - at[0], 6 * (at[1] - at[0]), atol=1e-4)


@pytest.mark.parametrize("w, images", [(0.0, 2), (1.0, 2), (0.5, 4), (3.0, 4)])
def test_two_halves_in_one_call(w, images):
    calls = []
    net = lambda xt, t, c: calls.append(c.tolist()) or xt  # noqa: E731
    guided(net, times(3, 5), times(10, 10), w)(torch.randn(2, 1, 3, 3), times(1, 2))
    assert [len(c) for c in calls] == [images]
    assert w in (0, 1) or calls == [[3, 5, 10, 10]]


def test_guidance_moves_the_mean_and_not_the_variance():
    # The same noise at two weights: a step differs by a (x_0 - x_0') and by nothing else.
    ddpm, x, c, null = DDPM(50), torch.randn(2, 1, 3, 3), times(3, 5), times(10, 10)
    net = lambda xt, t, c: 0.1 * (c.float() + 1)[:, None, None, None] * xt  # noqa: E731
    path = [next(iter(ddpm.reverse(guided(net, c, null, w), x, [30, 20], False, torch.Generator().manual_seed(1))))
            for w in (1.0, 3.0)]
    a, _ = coefficients(ddpm, times(30), times(20))
    assert torch.allclose(path[0][1] - path[1][1], a * (path[0][2] - path[1][2]), atol=1e-5)
    assert (path[0][1] - path[1][1]).abs().max() > 0.01


# ------------------------------------------------------------------ the exact mixture, Figure 2
def gradient(function, x):
    x = x.clone().requires_grad_(True)
    return torch.autograd.grad(function(x).sum(), x)[0]


@pytest.mark.parametrize("t", [100, 500, 900])
def test_mixture_gives_the_exact_score(t):
    torch.manual_seed(0)
    ddpm = DDPM()
    mixture, x, t = Mixture(ddpm, TRIANGLE, 0.4), torch.randn(6, 2, 1, 1), torch.full((6,), t)
    abar = ddpm.abar[t[0]].item()
    for c in (0, 2, 3):
        components = torch.distributions.MultivariateNormal(
            mixture.means * abar ** 0.5, (abar * 0.16 + 1 - abar) * torch.eye(2))
        log_q = lambda x, k=c, q=components: (  # noqa: E731
            q.log_prob(x[:, None, :]).logsumexp(1) if k == 3 else q.log_prob(x[:, None, :])[:, k])
        expected = -(1 - abar) ** 0.5 * gradient(log_q, x.flatten(1))
        assert torch.allclose(mixture(x, t, torch.full((6,), c)).flatten(1), expected, atol=1e-4)


@pytest.mark.parametrize("w", [0.0, 1.0, 2.5, 6.0])
def test_guided_score_is_that_of_the_sharpened_density_at_each_time(w):
    # eps = -sigma grad ln [q_t(x) (q_t(x | c) / q_t(x))^w]; eps_c - eps_u = -sigma grad ln p(c | x_t).
    torch.manual_seed(0)
    ddpm, t = DDPM(), torch.full((6,), 450)
    mixture, x, c, null = Mixture(ddpm, TRIANGLE, 0.4), torch.randn(6, 2, 1, 1), torch.ones(6).long(), 3 * torch.ones(6)
    abar = ddpm.abar[450].item()
    eps = guided(mixture, c, null.long(), w)(x, t).flatten(1)
    expected = -(1 - abar) ** 0.5 * gradient(lambda x: mixture.log_guided(x, 1, w, abar), x.flatten(1))
    assert torch.allclose(eps, expected, atol=2e-4)
    classifier = lambda x: mixture.log_likelihoods(x, abar).log_softmax(1)[:, 1]  # noqa: E731
    implicit = (mixture(x, t, c) - mixture(x, t, null.long())).flatten(1)
    assert torch.allclose(implicit, -(1 - abar) ** 0.5 * gradient(classifier, x.flatten(1)), atol=2e-4)


def noised_score(mixture, w, abar, at):
    """Score at the points `at` of the noised sharpened density, by quadrature in one dimension."""
    grid = torch.linspace(-6, 6, 60001, dtype=torch.float64)[:, None]
    mass = mixture.log_guided(grid.float(), 1, w).double().exp()
    kernel = torch.exp(-(at[:, None] - abar ** 0.5 * grid.T) ** 2 / (2 * (1 - abar))) * mass
    mean = (kernel @ grid).flatten() / kernel.sum(1)                                      # E[x_0 | x_t]
    return (abar ** 0.5 * mean - at) / (1 - abar)


def test_guidance_does_not_follow_the_noised_sharpened_density():
    # Sharpening and noising do not commute, except at w = 0 and 1: CFG does not sample p(x) (p(x | c) / p(x))^w.
    ddpm, at = DDPM(), torch.linspace(-2, 2, 9, dtype=torch.float64)
    mixture = Mixture(ddpm, [[-1.0], [1.0]], 0.5)
    gap = {}
    for w in (0.0, 1.0, 3.0):
        for t in (3, 500):
            abar = ddpm.abar[t].item()
            eps = guided(mixture, torch.ones(9).long(), 2 * torch.ones(9).long(), w)(
                at.float()[:, None, None, None], torch.full((9,), t)).flatten()
            score = -eps.double() / (1 - abar) ** 0.5
            gap[w, t] = float((score - noised_score(mixture, w, abar, at)).abs().max())
    assert max(gap[0.0, 500], gap[1.0, 500], gap[1.0, 3]) < 1e-3                         # nothing but quadrature
    assert gap[3.0, 500] > 0.3 and gap[3.0, 3] < 0.1                                      # it closes towards the data


def test_samples_of_the_exact_guided_score_are_not_the_sharpened_density():
    torch.manual_seed(0)
    ddpm, n = DDPM(200, v=0.0), 4000
    mixture, one, grid = Mixture(ddpm, [[-1.0], [1.0]], 0.5), torch.ones(n).long(), torch.linspace(-6, 8, 4001)[:, None]
    for w, agree in ((1.0, True), (4.0, False)):
        mass = mixture.log_guided(grid, 1, w).exp()
        mean = float((grid[:, 0] * mass).sum() / mass.sum())
        x = ddpm.sample(guided(mixture, one, 2 * one, w), n, ddpm.times(), (1, 1, 1), clip=False).flatten()
        error = abs(float(x.mean()) - mean) / (float(x.std()) / math.sqrt(n))
        assert error < 5 if agree else error > 15, (w, error)


# ------------------------------------------------------------------ Algorithm 2
def test_sampler_on_gaussian_data():
    # With the exact network every step is linear, x_s = k x_t + ... + sigma z: follow the variance, then sample.
    torch.manual_seed(0)
    ddpm, std = DDPM(200), 0.3
    exact, c = Mixture(ddpm, [[0.2, 0.2]], std), torch.zeros(10_000).long()
    for steps in (200, 25):
        ts, expected = ddpm.times(steps), 1.0
        for t, s in zip(ts, [*ts[1:], -1]):
            abar, a, b = ddpm.abar[t].item(), *(i.item() for i in coefficients(ddpm, times(t), times(s)))
            k = a * math.sqrt(abar) * std ** 2 / (abar * std ** 2 + 1 - abar) + b
            expected = k ** 2 * expected + (ddpm.reverse_variance(times(t), times(s)).item() if s >= 0 else 0)
        x = ddpm.sample(given(exact, c), len(c), ts, shape=(2, 1, 1), clip=False)
        assert x.mean().item() == pytest.approx(0.2, abs=0.01)
        assert x.std().item() == pytest.approx(math.sqrt(expected), rel=0.02)
    assert math.sqrt(expected) == pytest.approx(std, rel=0.15)


def test_times():
    ddpm = DDPM()
    assert ddpm.times() == list(range(999, -1, -1)) and ddpm.times(50) == [
        t for t, _, _ in parent.DDPM().reverse(lambda x, t: x, torch.zeros(1, 1, 1, 1), 50)]
    late = ddpm.times(50, -10.0)
    assert late[-1] == 0 and len(late) == 50 and late == sorted(set(late))[::-1]
    assert torch.logit(ddpm.abar[late[0]]) >= -10 > torch.logit(ddpm.abar[late[0] + 1])
    assert ddpm.times(50, -20.0) == ddpm.times(50)
    for steps in (0, 1, 1001):
        with pytest.raises(ValueError, match="steps"):
            ddpm.times(steps)
    with pytest.raises(ValueError, match="log-SNR 30"):
        ddpm.times(50, 30.0)


def test_first_jump_enlarges_an_error_of_the_network():
    # Why samples without clipping start at -10: at -20 the first of 50 steps multiplies an error in eps by hundreds.
    ddpm, gain = DDPM(), {}
    for start in (-20.0, -10.0):
        t, s = (times(i) for i in ddpm.times(50, start)[:2])
        a, _ = coefficients(ddpm, t, s)
        gain[start] = a.item() * ((1 - ddpm.abar[t]) / ddpm.abar[t]).sqrt().item()
    assert gain[-20.0] > 500 and gain[-10.0] < 10


def test_last_step_adds_no_noise_and_seeds_decide():
    ddpm, x = DDPM(20, v=1.0), torch.randn(2, 1, 2, 2)         # v = 1: the variance is not 0 by itself
    paths = [list(ddpm.reverse(lambda x, t: 0.9 * x, x, ddpm.times(5), True, torch.Generator().manual_seed(s)))
             for s in (0, 0, 1)]
    assert torch.equal(paths[0][-1][1], paths[0][-1][2])                # x_{-1} is the estimate of x_0
    assert torch.equal(paths[0][-1][1], paths[1][-1][1]) and not torch.equal(paths[0][-1][1], paths[2][-1][1])
    assert all(x0.abs().max() <= 1 for _, _, x0 in paths[0])
    free = list(ddpm.reverse(lambda x, t: 0.9 * x, x, ddpm.times(5), False, torch.Generator().manual_seed(0)))
    assert max(x0.abs().max() for _, _, x0 in free) > 1


@pytest.mark.parametrize("values", [dict(timesteps=1), dict(low=3.0, high=-3.0), dict(high=40.0), dict(low=-80.0),
                                    dict(v=1.5)])
def test_process_refuses_what_it_cannot_do(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        DDPM(**values)


# ------------------------------------------------------------------ diffusers
def cases():
    """Inputs by formula: x_t, the two predicted noises, the noise of the step; with time, weight and clipping."""
    base = torch.linspace(-1, 1, 4).reshape(1, 1, 2, 2)
    for t, s in ((979, 959), (500, 480), (100, 80), (20, 0), (0, -1)):
        for w in (1.0, 3.0):
            for clip in (True, False):
                yield t, s, w, clip, 1.3 * base, torch.sin(5 * base), torch.cos(3 * base), torch.cos(7 * base)


def ours(t, s, w, clip, x, eps_c, eps_u, noise):
    ddpm = DDPM(v=0.0)
    net = lambda xt, t, c: torch.where((c == 0)[:, None, None, None], eps_c, eps_u)  # noqa: E731
    mean, _ = ddpm.p_mean(guided(net, times(0), times(1), w), x, times(t), times(s), clip)
    sigma = ddpm.reverse_variance(times(t), times(s)).sqrt().float()[:, None, None, None]
    return mean + sigma * noise if s >= 0 else mean


def test_step_equals_the_fixture_of_diffusers():
    rows = json.loads(FIXTURE.read_text())["steps"]
    assert len(rows) == 20
    for case, row in zip(cases(), rows):
        assert ours(*case).flatten().tolist() == pytest.approx(row, abs=3e-6, rel=1e-5), case[:4]


def test_fixture_is_what_diffusers_gives():
    diffusers = pytest.importorskip("diffusers", reason="dev reference: pip install -e '.[reference]'")
    made, kept = make_fixture(diffusers), json.loads(FIXTURE.read_text())
    assert made["block"] == pytest.approx(kept["block"], rel=1e-5, abs=1e-6)
    for one, other in zip(made["steps"], kept["steps"], strict=True):
        assert one == pytest.approx(other, rel=1e-6)


def make_fixture(diffusers):
    """A guided step of diffusers' DDIMScheduler (eta = 1, v = 0) for each case. `python tests/test_lesson_15.py`."""
    rows = []
    for t, s, w, clip, x, eps_c, eps_u, noise in cases():
        scheduler = diffusers.DDIMScheduler(num_train_timesteps=1000, clip_sample=clip)
        scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = DDPM().abar[:-1].clone(), torch.tensor(1.0).double()
        scheduler.num_inference_steps = 1000 // (t - s)                                   # the step is 1000 / this
        eps = eps_u.double() + w * (eps_c.double() - eps_u.double())         # guidance_scale of its pipelines
        step = scheduler.step(eps, t, x.double(), eta=float(s >= 0), use_clipped_model_output=True,
                              variance_noise=noise.double())
        rows.append(step.prev_sample.flatten().tolist())
    from diffusers.models.resnet import ResnetBlock2D

    block, x, emb, _ = twin()
    theirs = ResnetBlock2D(in_channels=4, out_channels=6, temb_channels=5, groups=2, time_embedding_norm="scale_shift")
    names = {"time": "time_emb_proj", "skip": "conv_shortcut"}
    theirs.load_state_dict({".".join([names.get(k.split(".")[0], k.split(".")[0]), k.split(".")[1]]): p
                            for k, p in block.state_dict().items()})                      # every parameter, none left
    with torch.no_grad():
        y = theirs(x, emb)
    return {"diffusers": diffusers.__version__, "steps": rows, "block": y.flatten().tolist()}


# ------------------------------------------------------------------ the network
def test_network_is_lesson_05s_with_a_vector_for_the_class():
    # The same layers, one table more, and twice as many outputs of each block's linear layer: a scale and a shift.
    net, old = dict(UNet(**SMALL).named_parameters()), dict(parent.UNet(**SMALL).named_parameters())
    assert set(net) - set(old) == {"label.weight"} and net["label.weight"].shape == (11, 32)
    changed = {name for name in old if net[name].shape != old[name].shape}
    blocks = {name for name, m in UNet(**SMALL).named_modules() if isinstance(m, model.AdaResBlock)}
    assert changed == {f"{name}.time.{part}" for name in blocks for part in ("weight", "bias")}
    assert all(net[name].shape[0] == 2 * old[name].shape[0] for name in changed)
    zero = {name for name, p in net.items() if name.endswith("weight") and (p == 0).all()}
    assert zero == {name for name, p in old.items() if name.endswith("weight") and (p == 0).all()}


def twin():
    """A residual block with weights by formula, its inputs and its output."""
    block = model.AdaResBlock(4, 6, 5, groups=2)
    for i, p in enumerate(block.parameters()):
        p.data = torch.sin(torch.arange(p.numel()) * (0.7 + 0.013 * i) + i).reshape(p.shape)
    x, emb = torch.cos(torch.arange(36.0)).reshape(1, 4, 3, 3), torch.sin(torch.arange(5.0)).reshape(1, 5)
    with torch.no_grad():
        return block, x, emb, block(x, emb)


def test_block_equals_the_fixture_of_diffusers():
    *_, y = twin()
    assert y.flatten().tolist() == pytest.approx(json.loads(FIXTURE.read_text())["block"], rel=1e-5, abs=1e-5)


def test_block_is_the_identity_at_the_start():
    block, x = model.AdaResBlock(8, 8, 32, groups=4), torch.randn(2, 8, 7, 7)
    assert torch.equal(block(x, torch.randn(2, 32)), x)


def test_class_and_time_reach_the_output_and_the_null_class_is_learned():
    torch.manual_seed(0)
    net, x = UNet(**SMALL).eval(), torch.randn(1, 1, 28, 28).expand(3, -1, -1, -1)
    assert (net(x, times(3, 3, 3), times(0, 1, 10)) == 0).all()          # the last layer starts at zero
    for p in net.parameters():
        p.data = 0.1 * torch.randn(p.shape)
    y = net(x, times(3, 3, 3), times(0, 1, 10))
    assert min((y[i] - y[j]).abs().max() for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-3
    assert (net(x[:2], times(3, 4), times(1, 1)).diff(dim=0)).abs().max() > 1e-5
    net(x, times(3, 3, 3), times(0, 1, 10)).square().mean().backward()
    moved = net.label.weight.grad.abs().sum(1) > 0
    assert moved.tolist() == [True, True] + [False] * 8 + [True]
    with pytest.raises(ValueError, match="image_size=30"):
        UNet(**{**SMALL, "image_size": 30})


def test_times_are_told_apart():
    emb = load("lesson_01", "model").time_embedding(torch.tensor(DDPM().times(50)), 32)
    assert emb.diff(dim=0).norm(dim=1).min() > 0.1


# ------------------------------------------------------------------ the scripts: labels in, images out
def test_training_drops_the_stated_share_and_reaches_the_network(tmp_path, monkeypatch):
    train, asked, seen = load("lesson_15", "train"), [], []
    given_, drop_ = train.given, train.drop
    monkeypatch.setattr(train, "drop", lambda c, null, p: asked.append((null, p)) or drop_(c, null, p))
    monkeypatch.setattr(train, "given", lambda net, c: seen.append(c) or given_(net, c))
    for share, expected in ((1.0, {10}), (0.0, set(range(10)))):
        asked.clear(), seen.clear()
        train.main(["smoke=true", f"drop={share}", "batch_size=64", "threads=1", "device=cpu", "preview_every=0",
                    "steps=2", f"runs={tmp_path}"])
        assert [p for _, p in asked] == [share] * 2 and all((null == 10).all() for null, _ in asked)
        assert set(torch.cat(seen).tolist()) == expected           # what is dropped is what the network is given


def test_labels_by_name_and_images_in_their_order():
    sample = load("lesson_15", "sample")
    assert sample.wanted("", 12, 10).tolist() == [*range(10), 0, 1]
    assert sample.wanted("none", 2, 10).tolist() == [10, 10]
    assert sample.wanted("3,1,4", 4, 10).tolist() == [3, 1, 4, 3]
    for labels in ("10", "-1", "three", "1,"):
        with pytest.raises(UserError, match="labels"):
            sample.wanted(labels, 4, 10)
    # A network that knows the image of each class: every batch has the images that were asked for, guided or not.
    ddpm, c = DDPM(20), torch.tensor([3, 1, 4, 1, 5])
    def net(xt, t, c):
        abar = ddpm.abar[t][:, None, None, None]
        return ((xt - abar.sqrt() * (c / 10 - 0.5)[:, None, None, None]) / (1 - abar).sqrt()).float()
    for w in (0.0, 1.0):
        x = sample.draw(ddpm, net, c, 10, ddpm.times(5, -10.0), w, torch.Generator().manual_seed(0), batch=2)
        assert torch.allclose(x.mean((1, 2, 3)), c / 10 - 0.5 if w else torch.full((5,), 0.5), atol=1e-3)


def test_variance_of_a_step_is_that_of_the_key(tmp_path):
    # The weights file carries a process too; what decides is `sample.v`.
    sample = load("lesson_15", "sample")
    for v in (0.0, 0.7):
        run = sample.Run(sample.__file__, [f"v={v}", "weights=published", "device=cpu", f"runs={tmp_path}"])
        ddpm, net, null = sample.load(run, run.weights())
        assert ddpm.v == v and null == 10 and not net.training


def test_ink_and_grey():
    brightness = load("lesson_15", "reproduce").brightness
    x = torch.tensor([-1.0, -1.0, 1.0, 0.0, 3.0]).reshape(5, 1, 1, 1)                     # 3 is seen as white
    assert brightness(x) == pytest.approx({"ink": 0.5, "grey": 0.2})


def test_sharpened_density_in_cells():
    reproduce = load("lesson_15", "reproduce")
    exact = Mixture(DDPM(20), TRIANGLE, 0.5)
    mass = reproduce.sharpened(exact, 0, 1)
    assert mass.sum().item() == pytest.approx(1) and mass.shape == (30, 30)
    middle = ((reproduce.EDGES[:-1] + reproduce.EDGES[1:]) / 2).double()
    assert (mass.sum(0) @ middle).item() == pytest.approx(1, abs=2e-3)                    # w = 1: class 0, mean (0, 1)
    assert (mass.sum(0) @ (middle - 1) ** 2).item() == pytest.approx(0.25 + 0.2 ** 2 / 12, abs=5e-3)
    assert (reproduce.sharpened(exact, 0, 4).sum(0) @ middle).item() > 1.1                # away from the others
    torch.manual_seed(0)
    x = torch.tensor([0.0, 1.0]) + 0.5 * torch.randn(20_000, 2)
    assert (reproduce.cells(x) - mass).abs().sum() / 2 < 0.06


if __name__ == "__main__":
    import diffusers

    FIXTURE.write_text(json.dumps(make_fixture(diffusers), indent=0) + "\n")
