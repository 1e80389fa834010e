"""Lesson 05b: mixing latents and decoding from the same time, against closed forms and diffusers' DDPMScheduler."""

import json
import math
from pathlib import Path

import pytest
import torch

from conftest import load
from utils import Run, UserError

LESSON = "lesson_05/sublesson_b"
model, sample, reproduce = load(LESSON, "model"), load(LESSON, "sample"), load(LESSON, "reproduce")
Interpolation, RULES = model.Interpolation, model.RULES
FIXTURE = Path(__file__).parent / "fixtures" / "ddpm_interpolation.json"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Gaussian(torch.nn.Module):
    """The exact noise prediction for data N(0, std^2): E[eps | x_t] in closed form. (B, 1, H, W)."""

    def __init__(self, ddpm, std):
        super().__init__()
        self.ddpm, self.std = ddpm, std

    def forward(self, xt, t):
        abar = self.ddpm.abar[t].float()[:, None, None, None]
        return (1 - abar).sqrt() * xt / (abar * self.std ** 2 + 1 - abar)


def seen_by(ddpm, *args, **kwargs):
    """(t, x) of every network call of `ddpm.between`; the network says 0."""
    calls = []
    ddpm.between(lambda x, t: calls.append((int(t[0]), x.clone())) or torch.zeros_like(x), *args, **kwargs)
    return calls


# ------------------------------------------------------------------ the mixture
def test_noise_share_in_closed_form():
    # Independent noises: (1 - lam)^2 + lam^2 = 1 - 2 lam + 2 lam^2, half at lam = 1/2. The others keep 1.
    for lam in (0.0, 0.2, 0.5, 0.9, 1.0):
        assert model.noise_share(lam, "independent") == pytest.approx(1 - 2 * lam + 2 * lam ** 2)
        assert model.noise_share(lam, "shared") == pytest.approx(1)
        assert model.noise_share(lam, "root") == pytest.approx(1)
    assert model.noise_share(0.5, "independent") == 0.5


@pytest.mark.parametrize("rule", RULES)
def test_what_the_network_first_sees_has_that_share_of_noise(rule):
    # x0 = y0 = 0: the mixture is noise alone, with variance share * (1 - abar_t); at this t and no other.
    ddpm, zero = Interpolation(), torch.zeros(400, 1, 8, 8)
    (t, x), *_ = seen_by(ddpm, zero, zero, [0.3], 250, rule, steps=4, generator=generator())
    assert t == 250
    expected = model.noise_share(0.3, rule) * (1 - ddpm.abar[250]).item()
    assert x.square().mean().item() == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("rule, signal", [("independent", 0.0), ("shared", 0.0), ("root", math.sqrt(0.5) - 1)])
def test_the_signal_of_the_mixture(rule, signal):
    # Halfway between -1 and 1 the weights cancel; halfway between 0 and -1 the roots add up to 1.41 times the mean.
    ddpm, one = Interpolation(), torch.ones(600, 1, 8, 8)
    (_, x), *_ = seen_by(ddpm, one, -one, [0.5], 125, rule, steps=8, generator=generator())
    assert x.mean().item() == pytest.approx(0, abs=0.02)
    (_, x), *_ = seen_by(ddpm, 0 * one, -one, [0.5], 125, rule, steps=8, generator=generator())
    expected = -(0.5 if rule != "root" else math.sqrt(0.5)) * ddpm.abar[125].sqrt().item()
    assert x.mean().item() == pytest.approx(expected, abs=0.02)


def test_unknown_rule_and_times_are_refused():
    ddpm, x = Interpolation(), torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="rule=linear"):
        ddpm.between(torch.zeros_like, x, x, [0.5], 10, "linear")
    for t, steps in ((-1, 50), (1000, 50), (10, 1), (10, 1001)):
        with pytest.raises(ValueError, match="steps"):
            ddpm.times(t, steps)


# ------------------------------------------------------------------ the same time on both sides
@pytest.mark.parametrize("t", [0, 1, 125, 250, 500, 999])
@pytest.mark.parametrize("steps", [2, 50, 1000])
def test_decoding_starts_at_the_time_of_encoding(t, steps):
    # Seen elsewhere: noised to 250, denoised from 249.
    times = Interpolation().times(t, steps)
    assert times[0] == t and times[-1] == -1 and len(set(times)) == len(times)
    assert times == sorted(times, reverse=True)
    assert len(times) - 1 == max(1, round(steps * (t + 1) / 1000))
    if steps == 1000:
        assert times == list(range(t, -2, -1))


def test_the_network_is_told_the_times_in_order():
    calls = seen_by(Interpolation(), torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), [0.5], 500, steps=50)
    assert [t for t, _ in calls] == Interpolation().times(500, 50)[:-1]
    assert calls[0][0] == 500 and calls[-1][0] == 0


# ------------------------------------------------------------------ the ends, and the noise that stays
@pytest.mark.parametrize("rule", RULES)
def test_ends_are_each_image_encoded_and_decoded_alone(rule):
    # lam = 0 forgets y0, lam = 1 forgets x0; and each equals noising and decoding the one image by hand.
    ddpm, net = Interpolation(60), Gaussian(Interpolation(60), 0.5)
    x0, y0, other = (0.5 * torch.randn(3, 1, 4, 4, generator=generator(i)) for i in range(3))
    start, end = ddpm.between(net, x0, y0, [0.0, 1.0], 40, rule, 60, generator=generator(7))
    start_again, _ = ddpm.between(net, x0, other, [0.0, 1.0], 40, rule, 60, generator=generator(7))
    _, end_again = ddpm.between(net, other, y0, [0.0, 1.0], 40, rule, 60, generator=generator(7))
    assert torch.equal(start, start_again) and torch.equal(end, end_again)
    g, t = generator(7), torch.full((3,), 40)
    eps = torch.randn(x0.shape, generator=g)
    eps_y = eps if rule == "shared" else torch.randn(x0.shape, generator=g)
    noise = [torch.randn(x0.shape, generator=g) for _ in range(40)]
    for image, e, got in ((x0, eps, start), (y0, eps_y, end)):
        x = ddpm.q_sample(image, t, e)
        assert torch.equal(ddpm.decode(net, x, list(range(40, -2, -1)), noise), got)


def test_the_decoders_noise_is_the_same_for_every_lam():
    ddpm, net = Interpolation(60), Gaussian(Interpolation(60), 0.5)
    x0, y0 = torch.randn(2, 2, 1, 4, 4, generator=generator())
    a, b, c = ddpm.between(net, x0, y0, [0.5, 0.5, 0.51], 40, steps=60, generator=generator(1))
    assert torch.equal(a, b) and 0 < (a - c).abs().max() < 0.1                  # new noise would move it by far more
    new = ddpm.between(net, x0, y0, [0.5], 40, steps=60, generator=generator(2))[0]
    assert (a - new).abs().max() > 0.3
    assert torch.equal(a, ddpm.between(net, x0, y0, [0.5], 40, steps=60, generator=generator(1))[0])


def test_decoding_from_the_last_time_is_the_sampler_of_lesson_05():
    ddpm, net = Interpolation(30), Gaussian(Interpolation(30), 0.5)
    g = generator()
    xT = torch.randn(2, 1, 4, 4, generator=g)
    noise = [torch.randn(2, 1, 4, 4, generator=g) for _ in range(29)]
    mine = ddpm.decode(net, xT, ddpm.times(29, 30), noise)
    assert torch.equal(mine, ddpm.sample(net, 2, 30, shape=(1, 4, 4), generator=generator()))


def test_mixing_exact_data_decodes_to_the_datas_width():
    # For Gaussian data and the exact network, decoding x_t ~ q(x_t) gives data back; a mixture of two with too little
    # noise gives too narrow images, one with shared noise has too narrow a signal only.
    ddpm, net = Interpolation(200, 5e-4, 0.1), Gaussian(Interpolation(200, 5e-4, 0.1), 0.4)
    x0, y0 = 0.4 * torch.randn(2, 6000, 1, 2, 2, generator=generator())
    alone, half = ddpm.between(net, x0, y0, [0.0, 0.5], 60, steps=200, clip=False, generator=generator(1))
    assert alone.std().item() == pytest.approx(0.4, rel=0.06)
    abar = ddpm.abar[60].item()
    total = abar * 0.16 + 1 - abar
    k = math.sqrt(abar) * 0.16 / total                                          # E[x_0 | x_t] = k x_t
    narrow = k ** 2 * total / 2 + 0.16 * (1 - abar) / total                     # half the variance comes in
    assert half.std().item() == pytest.approx(math.sqrt(narrow), rel=0.06)


def test_what_the_decoder_lets_through():
    # README (c): with x_0 = 0 predicted, a step multiplies x by sqrt(abar_t / abar_s) (1 - abar_s) / (1 - abar_t).
    ddpm, x = Interpolation(), torch.ones(1, 1, 1, 1)
    net = lambda x, t: x / (1 - ddpm.abar[t].item()) ** 0.5
    for times, share in ((range(999, 898, -1), 0.383), (range(999, 498, -1), 0.0209), ((999, 899), 0.383)):
        assert ddpm.decode(net, x, times, [0] * (len(times) - 2)).item() == pytest.approx(share, rel=0.01)


# ------------------------------------------------------------------ DDIM's codes (a look ahead)
def test_slerp_keeps_its_ends_and_the_length_of_noise():
    a, b = torch.nn.functional.normalize(torch.randn(2, 4, 1, 28, 28, generator=generator()), dim=(3, 4)) * 28
    assert torch.allclose(model.slerp(a, b, 0.0), a, atol=1e-6) and torch.allclose(model.slerp(a, b, 1.0), b, atol=1e-6)
    middle, straight = model.slerp(a, b, 0.5), (a + b) / 2
    assert middle.std().item() == pytest.approx(1, abs=0.01) and straight.std().item() == pytest.approx(0.71, abs=0.03)
    assert torch.allclose((a * middle).sum((1, 2, 3)), (middle * b).sum((1, 2, 3)), rtol=1e-4)      # half the angle
    assert torch.allclose(model.slerp(a, a, 0.3), a, atol=1e-3)                 # no division by a zero angle


def test_ddim_up_and_down_brings_the_image_back():
    ddpm, x0 = Interpolation(), 0.5 * torch.randn(2, 1, 4, 4, generator=generator())
    net = Gaussian(ddpm, 0.5)
    down = ddpm.times(999, 1000)
    code = ddpm.ddim(net, x0, down[-2::-1])
    assert code.std().item() == pytest.approx(x0.std().item() / 0.5, rel=0.05)  # the data's N(0, 0.5^2) -> N(0, 1)
    assert torch.allclose(ddpm.ddim(net, code, down), x0, atol=0.02)
    ends = ddpm.spherical(net, x0, x0.flip(0), [0.0, 1.0], 200)
    assert torch.allclose(ends[0], x0, atol=0.06) and torch.allclose(ends[1], x0.flip(0), atol=0.06)


def test_network_calls_that_the_page_names():
    ddpm, x, calls = Interpolation(), torch.zeros(1, 1, 1, 1), []
    ddpm.spherical(lambda x, t: calls.append(t) or x, x, x, [0.5], 50)
    assert len(calls) == 49 + 49 + 50 and len(ddpm.times(500, 50)) - 1 == 25


def test_one_ddim_step_is_its_formula():
    # x_s = sqrt(abar_s) x0 + sqrt(1 - abar_s) eps with x0 and eps read off x_t: no noise is added.
    ddpm, x, eps = Interpolation(), torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    a, b = ddpm.abar[400].item(), ddpm.abar[380].item()
    expected = math.sqrt(b) * (x - math.sqrt(1 - a) * eps) / math.sqrt(a) + math.sqrt(1 - b) * eps
    assert torch.allclose(ddpm.ddim(lambda x, t: eps, x, [400, 380]), expected, atol=1e-5)


# ------------------------------------------------------------------ diffusers
def trajectory():
    """Inputs by formula: two images, two noises, the decoder's noises, and a network without weights."""
    base = torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4)
    x0, y0 = torch.sin(4 * base), torch.cos(9 * base)
    eps, eps_y = torch.sin(31 * base + 1), torch.cos(23 * base)
    noise = [torch.sin((3 + i) * base + i) for i in range(250)]
    return x0, y0, eps, eps_y, noise, lambda x, t: 0.9 * x + 0.1 * torch.sin(t.float())[:, None, None, None]


def ours():
    x0, y0, eps, eps_y, noise, net = trajectory()
    ddpm, t = Interpolation(), torch.tensor([250])
    xt, yt = ddpm.q_sample(x0, t, eps), ddpm.q_sample(y0, t, eps_y)
    return [ddpm.decode(net, model.mix(xt, yt, lam), ddpm.times(250, 1000), noise).flatten() for lam in (0.0, 0.4, 1.0)]


def make_fixture(diffusers):
    """diffusers' DDPMScheduler over the same way: add_noise to 250, mix, step from 250 to 0."""
    import diffusers.schedulers.scheduling_ddpm as module

    x0, y0, eps, eps_y, noise, net = trajectory()
    scheduler = diffusers.DDPMScheduler(beta_schedule="linear", variance_type="fixed_small", clip_sample=True)
    scheduler.betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)     # in float64, as ours
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    scheduler.one, at = torch.tensor(1.0, dtype=torch.float64), torch.tensor([250])
    rows, original = [], module.randn_tensor
    for lam in (0.0, 0.4, 1.0):
        xt = scheduler.add_noise(x0.double(), eps.double(), at)
        yt = scheduler.add_noise(y0.double(), eps_y.double(), at)
        x = (1 - lam) * xt + lam * yt
        for i, t in enumerate(range(250, -1, -1)):
            module.randn_tensor = lambda *a, i=i, **k: noise[i].double()
            try:
                x = scheduler.step(net(x, torch.tensor([t])), t, x).prev_sample
            finally:
                module.randn_tensor = original
        rows.append(x.flatten().tolist())
    return {"diffusers": diffusers.__version__, "rows": rows}


def test_equal_to_diffusers_over_the_whole_way():
    for mine, theirs in zip(ours(), json.loads(FIXTURE.read_text())["rows"], strict=True):
        assert torch.allclose(mine, torch.tensor(theirs), atol=1e-4)


def test_fixture_is_what_diffusers_gives():
    diffusers = pytest.importorskip("diffusers", reason="dev reference: pip install -e '.[reference]'")
    made, kept = make_fixture(diffusers)["rows"], json.loads(FIXTURE.read_text())["rows"]
    assert torch.allclose(torch.tensor(made), torch.tensor(kept), atol=1e-9)


# ------------------------------------------------------------------ pairs and weights
def test_pairs_show_different_digits():
    x0, y0, a, b = sample.pairs(500, seed=3)
    assert x0.shape == y0.shape == (500, 1, 28, 28) and (a != b).all() and x0.min() == -1
    again = sample.pairs(20, seed=3)
    assert torch.equal(again[0], x0[:20]) and not torch.equal(sample.pairs(20, seed=4)[0], again[0])
    assert len(torch.unique(torch.cat([x0, y0]).flatten(1), dim=0)) == 1000     # no image twice
    with pytest.raises(UserError, match="smaller n"):
        sample.pairs(5000, seed=0)


def test_weights_of_lesson_05_are_found_and_fit():
    run = Run(reproduce.__file__, ["smoke=true", "gpu=false"])
    weights = run.read(run.published)
    assert weights.path.parent.parent.name == "lesson_05"
    weights.load(model.UNet(**weights.config["unet"]))
    Interpolation(**weights.config["ddpm"])


if __name__ == "__main__":
    import diffusers

    FIXTURE.write_text(json.dumps(make_fixture(diffusers)) + "\n")
