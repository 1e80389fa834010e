"""Lesson 06: the maths of DDIM against closed forms, lesson 05, and trajectories of diffusers' schedulers."""

import json
import math
from pathlib import Path

import pytest
import torch

from conftest import ROOT, load
from utils import noise as start
from utils import seeded
from utils.seeds import generators

model = load("lesson_06", "model")
DDIM, UNet, slerp = model.DDIM, model.UNet, model.slerp
FIXTURE = Path(__file__).parent / "fixtures" / "ddim_scheduler.json"
SMALL = dict(channels=8, mults=(1, 2), blocks=1, attention=(), dropout=0.0, groups=4, patch=2)


def times(*values):
    return torch.tensor(values)


class Gaussian(torch.nn.Module):
    """The exact noise prediction for data N(mean, std^2): E[eps | x_t] in closed form. (B, 1, H, W)."""

    def __init__(self, ddim, mean, std):
        super().__init__()
        self.ddim, self.mean, self.std = ddim, mean, std

    def forward(self, xt, t):
        abar = self.ddim.abar[t].float()[:, None, None, None]
        return (1 - abar).sqrt() * (xt - abar.sqrt() * self.mean) / (abar * self.std ** 2 + 1 - abar)


def spread(ddim, std, t):
    """Standard deviation of x_t for data of deviation std."""
    return math.sqrt(ddim.abar[t].item() * std ** 2 + 1 - ddim.abar[t].item())


# ------------------------------------------------------------------ schedule, sub-sequences, sigma
def test_schedules():
    linear, cosine = DDIM(), load("lesson_06", "reproduce").Cosine()             # lesson 09's, for one of the factors
    assert linear.abar.dtype == torch.float64 and linear.abar[-1] == 1 == cosine.abar[-1]
    assert torch.equal(linear.abar, load("lesson_05", "model").DDPM().abar)
    assert linear.abar[[500, 999]].tolist() == pytest.approx([0.077797, 4.036e-5], rel=1e-3)
    level = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (0, 1, 501, 999)]
    expected = [level[i] / level[0] for i in (1, 2, 3)]
    assert cosine.abar[[0, 500, 998]].tolist() == pytest.approx(expected, rel=1e-9)
    assert (1 - cosine.abar[999] / cosine.abar[998]).item() == pytest.approx(0.999)          # beta is bounded
    assert (linear.abar[:1000].diff() < 0).all() and (cosine.abar[:1000].diff() < 0).all()


def test_log_snr_at_three_times():
    # The convention box: x_t = alpha x_0 + sigma eps with alpha^2 = abar, sigma^2 = 1 - abar, read off from q_sample.
    ddim, one, zero = DDIM(), torch.ones(3, 1, 1, 1), torch.zeros(3, 1, 1, 1)
    t = times(100, 500, 900)
    alpha, sigma = ddim.q_sample(one, t, zero).flatten(), ddim.q_sample(zero, t, one).flatten()
    abar = torch.stack([torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)[:i + 1].neg().log1p().sum().exp()
                        for i in t.tolist()])
    assert torch.allclose(2 * (alpha.log() - sigma.log()), (abar / (1 - abar)).log().float(), atol=1e-5)


def test_sub_sequences():
    ddim = DDIM()
    assert ddim.times(20) == list(range(0, 1000, 50))
    assert ddim.times(30)[-1] == 29 * 33 and len(ddim.times(30)) == 30           # 1000 is not a multiple of 30
    assert ddim.times(600)[-1] == 599                                            # as the docstring warns
    assert ddim.times(1000) == list(range(1000)) == ddim.times(1000, "ends") == ddim.times(1000, "trailing")
    assert ddim.times(20, "ends")[::19] == [0, 999] and ddim.times(20, "trailing") == list(range(49, 1000, 50))
    root = math.sqrt(800) / 9
    assert ddim.times(10, "quadratic") == [int((i * root) ** 2 + 1e-9) for i in range(10)]
    assert ddim.times(10, "quadratic")[-1] == 800
    for spacing in model.SPACINGS:
        for steps in (2, 3, 7, 50, 999):
            tau = ddim.times(steps, spacing)
            assert tau == sorted(set(tau)) and 0 <= tau[0] and tau[-1] <= 999
            assert len(tau) == steps or spacing == "quadratic" and len(tau) < steps >= 50
    old = [t for t, _, _ in load("lesson_05", "model").DDPM().reverse(lambda x, t: x, torch.zeros(1, 1, 1, 1), 17)]
    assert ddim.times(17, "ends") == old[::-1]


def test_noise_of_the_last_jump_of_20_steps():
    # Why sigma-hat explodes: the step to t = 0 adds 17 times the noise that is left there.
    ddim = DDIM()
    assert ddim.sigma(times(50), times(0), 1.0).item() == pytest.approx(0.010, abs=1e-4)
    assert ddim.sigma_hat(times(50), times(0)).item() == pytest.approx(0.173, abs=5e-4)
    assert ddim.sigma_hat(times(50), times(0)).item() ** 2 > 1 - ddim.abar[0].item()        # Eq. (12) has no root there


def test_sigma_is_equation_16():
    ddim, t, s = DDIM(), times(1, 500, 999, 950), times(0, 499, 0, 900)
    old = load("lesson_05", "model").DDPM()
    assert torch.allclose(ddim.sigma(t, s, 1.0) ** 2, old.beta_tilde(t, s), rtol=1e-12, atol=0)
    assert torch.allclose(ddim.sigma_hat(t, s) ** 2, old.beta(t, s), rtol=1e-12, atol=0)
    assert torch.allclose(ddim.sigma(t, s, 0.3), 0.3 * ddim.sigma(t, s, 1.0)) and not ddim.sigma(t, s, 0.0).any()
    assert ddim.sigma(times(0), times(-1), 1.0).item() == 0


# ------------------------------------------------------------------ one step
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("t, s", [(1, 0), (500, 499), (950, 900), (50, 0), (0, -1)])
def test_every_member_has_the_same_marginals(t, s, eta):
    # Lemma 1: x_s = sqrt(abar_s) x_0 + sqrt(1 - abar_s - sigma^2) eps + sigma z has the variance 1 - abar_s again.
    ddim, x0, eps = DDIM(), torch.full((1, 1, 1, 1), 0.3), torch.full((1, 1, 1, 1), 0.7)
    t, s = times(t), times(s)
    sigma = ddim.sigma(t, s, eta)
    mean, got = ddim.ddim_step(ddim.q_sample(x0, t, eps), eps, t, s, sigma)
    towards = (mean.item() - ddim.abar[s].sqrt().item() * 0.3) / 0.7
    assert got.item() == pytest.approx(0.3, abs=1e-4)
    assert towards ** 2 + sigma.item() ** 2 == pytest.approx(1 - ddim.abar[s].item(), abs=1e-5)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("t, s", [(1, 0), (999, 998), (300, 299), (950, 900), (50, 0), (0, -1)])
def test_eta_1_is_ddpm(t, s, clip):
    # With eps made anew from the clipped x_0 also where x_0 is clipped; with the stale one it is another sampler.
    torch.manual_seed(0)
    ddim, old = DDIM(), load("lesson_05", "model").DDPM()
    x, eps, t, s = torch.randn(4, 1, 3, 3), torch.randn(4, 1, 3, 3), times(t).repeat(4), times(s).repeat(4)
    mean, x0 = old.p_mean(lambda *_: eps, x, t, s, clip)
    got, got_x0 = ddim.ddim_step(x, eps, t, s, ddim.sigma(t, s, 1.0), "fresh" if clip else "none")
    assert torch.allclose(got, mean, atol=2e-5) and torch.allclose(got_x0, x0, rtol=1e-5, atol=1e-5)
    if clip and s[0] >= 0 and x0.abs().max() == 1:
        assert not torch.allclose(ddim.ddim_step(x, eps, t, s, ddim.sigma(t, s, 1.0), "stale")[0], mean, atol=1e-3)


def test_step_is_an_euler_step_of_equation_13():
    # In xbar = x / sqrt(abar) and sbar = sqrt((1 - abar) / abar): d xbar = eps d sbar, to either side.
    torch.manual_seed(0)
    ddim, x, eps = DDIM(), torch.randn(5, 1, 2, 2), torch.randn(5, 1, 2, 2)
    t, s = times(10, 500, 900, 0, -1), times(0, 480, 950, 7, 0)
    bar = lambda i: ((1 - ddim.abar[i]) / ddim.abar[i]).sqrt()[:, None, None, None]
    scale = lambda i: ddim.abar[i].sqrt()[:, None, None, None]
    expected = scale(s) * (x / scale(t) + (bar(s) - bar(t)) * eps)
    assert torch.allclose(ddim.ddim_step(x, eps, t, s)[0], expected.float(), atol=1e-4)


def test_what_the_clipping_choices_keep():
    ddim, x, eps, t, s = DDIM(), 3 * torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), times(500), times(450)
    root = lambda i: (ddim.abar[i].sqrt().item(), (1 - ddim.abar[i]).sqrt().item())
    (a, b), (c, d) = root(500), root(450)
    stale, x0 = ddim.ddim_step(x, eps, t, s, clip="stale")
    fresh, _ = ddim.ddim_step(x, eps, t, s, clip="fresh")
    assert x0.item() == 1 and stale.item() == pytest.approx(c, rel=1e-5)         # what was clipped off is lost
    assert fresh.item() == pytest.approx(c + d * (3 - a) / b, rel=1e-5)          # x_t = a x_0 + b eps still holds
    assert ddim.ddim_step(x, eps, t, s)[0].item() == pytest.approx(c * 3 / a, rel=1e-5)


# ------------------------------------------------------------------ trajectories
@pytest.mark.parametrize("eta, hat", [(0.0, False), (0.5, False), (1.0, False), (0.0, True)])
@pytest.mark.parametrize("steps", [10, 100])
def test_sampler_on_gaussian_data(steps, eta, hat):
    # With the exact network every step is linear: follow the variance, then sample.
    torch.manual_seed(0)
    ddim, std = DDIM(200, beta_1=5e-4, beta_T=0.1), 0.3
    tau, variance = ddim.times(steps), 1.0
    for t, s in zip(tau[::-1], [*tau[-2::-1], -1]):
        a, b = ddim.abar[t].item(), ddim.abar[s].item()
        sigma = math.sqrt((1 - b) / (1 - a) * (1 - a / b)) * (1 if hat else eta)
        slope = math.sqrt(1 - a) / (a * std ** 2 + 1 - a)                        # of eps in x
        k = math.sqrt(b) * (1 - math.sqrt(1 - a) * slope) / math.sqrt(a) + math.sqrt(1 - b - sigma ** 2) * slope
        noise = (1 - a / b if hat else sigma ** 2) if s >= 0 else 0
        variance = k ** 2 * variance + noise
    x = ddim.sample(Gaussian(ddim, 0.0, std), torch.randn(8000, 1, 2, 2), tau, eta, hat)
    assert x.std().item() == pytest.approx(math.sqrt(variance), rel=0.02)
    if steps == 100:
        assert math.sqrt(variance) == pytest.approx(std, rel=0.1)
    elif hat:
        assert math.sqrt(variance) > 1.15 * std                                  # too much noise on the last jumps


def test_exact_network_favours_eta_0():
    # The sanity arm of Table 1: with no error of the network, less noise ends nearer to the data at few steps.
    torch.manual_seed(0)
    ddim, std = DDIM(200, beta_1=5e-4, beta_T=0.1), 0.3
    xT = torch.randn(8000, 1, 2, 2)
    share = [ddim.sample(Gaussian(ddim, 0.0, std), xT, ddim.times(10), eta).std().item() / std for eta in (0, 0.5, 1)]
    assert share == pytest.approx([0.655, 0.642, 0.572], rel=0.02) and share == sorted(share, reverse=True)


def test_error_falls_with_the_order_of_euler():
    # The exact flow of Gaussian data scales x_t like the deviation of x_t: half the step, half the error.
    ddim, std, xT = DDIM(1000), 0.5, torch.ones(1, 1, 1, 1)
    net, error = Gaussian(ddim, 0.0, std), []
    for steps in (50, 100, 200):
        tau = ddim.times(steps)
        exact = std / spread(ddim, std, tau[-1])
        error.append(abs(ddim.sample(net, xT, tau).item() - exact))
    assert error[0] / error[1] == pytest.approx(2, rel=0.15) and error[1] / error[2] == pytest.approx(2, rel=0.15)


def test_there_and_back():
    torch.manual_seed(0)
    ddim, std, x0 = DDIM(), 0.5, torch.rand(4, 1, 3, 3) - 0.5
    net, error = Gaussian(ddim, 0.0, std), []
    for steps in (20, 40, 80):
        tau = ddim.times(steps)
        xT = ddim.encode(net, x0, tau)
        error.append((ddim.sample(net, xT, tau) - x0).abs().max().item())
    assert xT.shape == x0.shape and error[0] > 1.8 * error[1] > 3.2 * error[2]
    exact = x0 * spread(ddim, std, 999) / std
    assert torch.allclose(ddim.encode(net, x0, ddim.times(1000)), exact, rtol=0.01, atol=1e-3)


def test_encoding_asks_for_the_time_of_the_image_it_hands_over():
    ddim, asked = DDIM(), []
    net = lambda x, t: asked.append(int(t[0])) or torch.zeros_like(x)
    x = ddim.encode(net, torch.ones(1, 1, 1, 1), ddim.times(4))
    assert asked == [0, 0, 250, 500] and x.item() == pytest.approx(ddim.abar[750].sqrt().item(), rel=1e-5)
    asked.clear()
    ddim.sample(net, x, ddim.times(4))
    assert asked == [750, 500, 250, 0]                                           # times, not their places in the list


@pytest.mark.parametrize("eta, hat", [(0.0, False), (1.0, False), (0.0, True)])
def test_last_step_goes_to_the_clean_image_and_adds_no_noise(eta, hat):
    ddim, net = DDIM(50), Gaussian(DDIM(50), 0.0, 0.5)
    path = list(ddim.reverse(net, torch.randn(2, 1, 2, 2), ddim.times(10), eta, hat))
    assert [t for t, _, _ in path] == list(range(45, -1, -5))
    _, x, x0 = path[-1]
    assert torch.allclose(x, x0, atol=1e-6)


def test_eta_0_draws_no_noise_and_a_seed_gives_the_same_start():
    sample, ddim, net = load("lesson_06", "sample"), DDIM(20), Gaussian(DDIM(20), 0.0, 0.5)
    tau = ddim.times(5)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a = ddim.sample(net, torch.ones(2, 1, 2, 2), tau)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(a, ddim.sample(net, torch.ones(2, 1, 2, 2), tau))
    draw = lambda seed, batch=128, **way: sample.draw(ddim, net, start(6, (1, 28, 28), own := generators(seed, 6)), own,
                                                      batch, times=tau, **way)
    assert torch.equal(draw(3, 2), draw(3, 6))
    b, c = (draw(3, eta=eta) for eta in (0.0, 1.0))
    assert not torch.equal(b, c) and torch.equal(c, draw(3, eta=1.0)) and torch.allclose(c, draw(3, 2, eta=1.0))
    assert not torch.equal(b, draw(4))
    xT = start(6, (1, 28, 28), seeded(3))                  # as reproduce.py: one generator for all images
    a, b = (sample.draw(ddim, net, xT, seeded(4), times=tau, eta=eta) for eta in (0.0, 1.0))
    assert torch.equal(a, ddim.sample(net, xT, tau)) and not torch.equal(a, b)


def test_more_steps_end_at_the_same_image():
    # Sec. 5.2: the start decides. With eta = 1 it does not.
    torch.manual_seed(0)
    ddim, xT = DDIM(), torch.randn(500, 1, 1, 1)
    net, x = Gaussian(ddim, 0.0, 0.5), {}
    for eta in (0.0, 1.0):
        few, many = (ddim.sample(net, xT, ddim.times(steps), eta) for steps in (50, 250))
        x[eta] = torch.corrcoef(torch.stack([few.flatten(), many.flatten()]))[0, 1].item()
    assert x[0.0] > 0.999 and abs(x[1.0]) < 0.2


# ------------------------------------------------------------------ slerp
def test_slerp_follows_the_circle():
    torch.manual_seed(0)
    a, b = torch.randn(3, 1, 28, 28), torch.randn(3, 1, 28, 28)
    assert torch.allclose(slerp(a, b, 0.0), a, atol=1e-5) and torch.allclose(slerp(a, b, 1.0), b, atol=1e-5)
    a, b = (x / x.flatten(1).norm(dim=1)[:, None, None, None] for x in (a, b))
    dot = lambda x, y: (x * y).flatten(1).sum(1).clamp(-1, 1)
    for w in (0.25, 0.5):
        mixed = slerp(a, b, w)
        assert torch.allclose(dot(mixed, mixed), torch.ones(3), atol=1e-5)       # the length stays
        assert torch.allclose(dot(a, mixed).acos(), w * dot(a, b).acos(), atol=1e-4)
        straight = (1 - w) * a + w * b
        assert (dot(straight, straight) < 0.7).all()
    assert torch.allclose(slerp(a, a, 0.5), a, atol=1e-5)


# ------------------------------------------------------------------ training, bad inputs, weights of lesson 05
def test_loss_is_lesson_05s():
    ddim, old, net = DDIM(), load("lesson_05", "model").DDPM(), UNet(**SMALL)
    torch.nn.init.normal_(net.out[2].weight)
    x0 = torch.rand(8, 1, 28, 28) * 2 - 1
    torch.manual_seed(1)
    mine = ddim.loss(net, x0)
    torch.manual_seed(1)
    assert torch.equal(mine, old.loss(net, x0)) and mine > 0


@pytest.mark.parametrize("call, what", [
    (lambda d: DDIM(1), "timesteps"), (lambda d: d.times(0), "steps"), (lambda d: d.times(1), "steps"),
    (lambda d: d.times(1001), "steps"),
    (lambda d: d.times(10, "log"), "spacing"),
    (lambda d: d.sample(lambda x, t: x, torch.ones(1, 1, 1, 1), [0, 1], eta=1.5), "eta"),
    (lambda d: d.sample(lambda x, t: x, torch.ones(1, 1, 1, 1), [0, 1], eta=-0.1), "eta"),
    (lambda d: d.sample(lambda x, t: x, torch.ones(1, 1, 1, 1), [0, 1], clip="yes"), "clip"),
])
def test_what_it_does_not_know_is_refused(call, what):
    with pytest.raises(ValueError, match=what):
        call(DDIM())


def test_network_and_schedule_of_lesson_05_are_taken_whole(tmp_path):
    sample = load("lesson_06", "sample")
    run = sample.Run(ROOT / "lesson_06" / "sample.py", [f"runs={tmp_path}", "threads=1", "ddpm.beta_T=0.5"])
    assert run.published == ROOT / "lesson_05" / "results" / "weights.safetensors"
    weights = run.read(run.published)
    ddim, net = sample.load(run, weights)
    assert ddim.abar[999].item() == pytest.approx(4.036e-5, rel=1e-3)            # the file's, not config's
    assert all(torch.equal(net.state_dict()[key], value.float()) for key, value in weights.state.items())


# ------------------------------------------------------------------ diffusers
def linear_network(x, t):
    """A "network" that is linear in the image, with the time added: deterministic, and large enough to be clipped."""
    n = x[0].numel()
    i, j = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    matrix = 0.7 * torch.eye(n) + 0.3 * torch.sin(1.7 * i + 3.1 * j + 0.5)
    return (x.flatten(1) @ matrix.T).reshape(x.shape) * (0.8 + 0.2 * math.cos(t / 300)) + 0.1 * math.sin(t / 50)


BASE = torch.linspace(-1, 1, 6).reshape(1, 1, 2, 3)


def noise(t):
    return torch.cos(7 * BASE + t)


def cases():
    """(inverse, spacing, eta, clip) of every trajectory; ten steps each."""
    for spacing in ("uniform", "trailing"):
        yield from ((False, spacing, eta, clip) for eta in (0.0, 0.4, 1.0) for clip in model.CLIPS)
        yield from ((True, spacing, 0.0, clip) for clip in ("none", "stale"))


def ours(inverse, spacing, eta, clip):
    """x after each of ten steps, (10, 6)."""
    ddim, x, path = DDIM(), 1.5 * BASE, []
    tau = ddim.times(10, spacing)
    jumps = zip([-1, *tau[:-1]], tau) if inverse else zip(tau[::-1], [*tau[-2::-1], -1])
    for t, s in jumps:
        sigma = ddim.sigma(times(t), times(s), eta) if eta else 0.0
        x, _ = ddim.ddim_step(x, linear_network(x, max(t, 0)), times(t), times(s), sigma, clip)
        if eta and s >= 0:
            x = x + sigma.float() * noise(t)
        path.append(x.flatten())
    return torch.stack(path)


def make_fixture(diffusers):
    """The same trajectories by diffusers. `python tests/test_lesson_06.py` writes the fixture."""
    rows = []
    for inverse, spacing, eta, clip in cases():
        kind = diffusers.DDIMInverseScheduler if inverse else diffusers.DDIMScheduler
        scheduler = kind(beta_schedule="linear", clip_sample=clip != "none", set_alpha_to_one=True,
                         timestep_spacing={"uniform": "leading"}.get(spacing, spacing))
        # Its float32 schedule keeps three digits of 1 - abar at small t: give it the same one in float64.
        scheduler.alphas_cumprod = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
        scheduler.set_timesteps(10)
        x, path = 1.5 * BASE, []
        for t in scheduler.timesteps.tolist():
            if inverse:                                # t is where the step goes; the network is asked where it starts
                x = scheduler.step(linear_network(x, max(t - 100, 0)), t, x).prev_sample
            else:
                last = t == scheduler.timesteps[-1]    # eta's noise is 0 there: abar is 1
                x = scheduler.step(linear_network(x, t), t, x, eta=eta, use_clipped_model_output=clip == "fresh",
                                   variance_noise=torch.zeros_like(x) if last else noise(t)).prev_sample
            path.append(x.float().flatten().tolist())
        rows.append({"inverse": inverse, "spacing": spacing, "eta": eta, "clip": clip, "x": path})
    cosine = diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    return {"diffusers": diffusers.__version__, "cases": rows, "cosine": cosine[[0, 300, 700, 990]].tolist()}


def assert_equal_to(fixture):
    assert len(fixture["cases"]) == len(list(cases())) == 22
    different = set()
    for case, row in zip(cases(), fixture["cases"]):
        assert (row["inverse"], row["spacing"], row["eta"], row["clip"]) == case
        got, expected = ours(*case), torch.tensor(row["x"])
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5 * expected.abs().max()), row
        different.add(tuple(round(v, 3) for v in row["x"][-1]))
    assert len(different) == 22                        # clipping, eta and spacing all matter in these
    abar = load("lesson_06", "reproduce").Cosine().abar[[0, 300, 700, 990]]
    assert torch.allclose(abar, torch.tensor(fixture["cosine"], dtype=torch.float64), rtol=1e-4)


def test_equal_to_the_fixture_of_diffusers():
    assert_equal_to(json.loads(FIXTURE.read_text()))


def test_equal_to_diffusers():
    assert_equal_to(make_fixture(pytest.importorskip("diffusers", reason="pip install -e '.[reference]'")))


def test_sampler_walks_the_same_way_as_the_steps_of_the_fixture():
    # reverse() and encode() are the loops over these steps.
    ddim, net = DDIM(), lambda x, t: linear_network(x, int(t[0]))
    for clip in model.CLIPS:
        x = ddim.sample(net, 1.5 * BASE, ddim.times(10), clip=clip)
        assert torch.allclose(x.flatten(), ours(False, "uniform", 0.0, clip)[-1], atol=1e-6)
    xT = ddim.encode(net, 1.5 * BASE, ddim.times(10))
    assert torch.allclose(xT.flatten(), ours(True, "uniform", 0.0, "none")[-1], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------ the network of one of the factors
def test_exact_denoiser_is_bayes_rule():
    ddim, images = DDIM(), torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]]).reshape(3, 1, 1, 2)
    net = load("lesson_06", "reproduce").Exact(ddim, images)
    x, t = torch.tensor([[0.3, -0.2], [0.9, 0.1]]).reshape(2, 1, 1, 2), times(700, 100)
    abar = ddim.abar[t].float()[:, None, None, None]
    likely = torch.stack([-(x - abar.sqrt() * image).square().sum((1, 2, 3)) / 2 / (1 - abar[:, 0, 0, 0])
                          for image in images], 1).softmax(1)
    x0 = torch.einsum("bn,nchw->bchw", likely, images)
    assert torch.allclose(ddim.predict_x0(net, x, t), x0, atol=1e-4)


if __name__ == "__main__":
    import diffusers

    FIXTURE.write_text(json.dumps(make_fixture(diffusers)) + "\n")
