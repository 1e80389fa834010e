"""Lesson 09: the maths of IDDPM against closed forms, lesson 05, and the numbers of diffusers' DDPMScheduler."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import load

model = load("lesson_09", "model")
IDDPM, ImportanceSampler, UNet = model.IDDPM, model.ImportanceSampler, model.UNet
FIXTURE = Path(__file__).parent / "fixtures" / "iddpm_scheduler.json"
SMALL = dict(channels=8, mults=(1, 2), blocks=1, attention=(), dropout=0.0, groups=4, patch=2)    # lesson 05's
TWO = SMALL | {"c_out": 2}                             # the noise and v


def times(*values):
    return torch.tensor(values)


def column(values):
    return values.float()[:, None, None, None]


class Gaussian(torch.nn.Module):
    """The exact noise for data N(0, std^2), and the v of Eq. (15) that gives the exact variance of the step.

    v: "exact", or a number. The network's output is 2 v - 1. (B, 1, H, W) -> (B, 2, H, W).
    """

    def __init__(self, ddpm, std, v="exact"):
        super().__init__()
        self.ddpm, self.std, self.v = ddpm, std, v

    def exact_v(self, t):
        s, one = t - 1, torch.ones_like(t)
        small = torch.where(t == 0, self.ddpm.beta_tilde(one, one - 1), self.ddpm.beta_tilde(t, s))
        large, abar = self.ddpm.beta(t, s), self.ddpm.abar[t]
        known = self.std ** 2 * (1 - abar) / (abar * self.std ** 2 + 1 - abar)                     # Var(x_0 | x_t)
        a = self.ddpm.abar[s].sqrt() * large / (1 - abar)
        sigma2 = self.ddpm.beta_tilde(t, s) + a ** 2 * known                                       # Var(x_s | x_t)
        return (sigma2.log() - small.log()) / (large.log() - small.log()), sigma2

    def forward(self, xt, t):
        t = (t * self.ddpm.timesteps / 1000).round().long()
        abar = column(self.ddpm.abar[t])
        eps = (1 - abar).sqrt() * xt / (abar * self.std ** 2 + 1 - abar)
        v = column(self.exact_v(t)[0]) if self.v == "exact" else self.v
        return torch.cat([eps, (2 * v - 1) * torch.ones_like(eps)], dim=1)


def grey(x):
    """Rounded to the 256 levels that the decoder expects."""
    return (x.clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1


# ------------------------------------------------------------------ schedules, times
def test_reference_values_of_the_cosine_schedule():
    ddpm = IDDPM()
    assert ddpm.abar.dtype == torch.float64 and ddpm.abar[-1] == 1
    assert ddpm.abar[[500, 999]].tolist() == pytest.approx([0.4923, 2.428e-9], rel=1e-3)
    beta = ddpm.beta(times(0, 999), times(-1, 998))
    assert beta.tolist() == pytest.approx([4.1284e-5, 0.999], rel=1e-4)
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (0, 1, 501, 999)]
    assert ddpm.abar[[0, 500, 998]].tolist() == pytest.approx([f[i] / f[0] for i in (1, 2, 3)], rel=1e-9)
    assert (model.betas("cosine", 4000) <= 0.999).all() and (ddpm.abar[:1000].diff() < 0).all()


def test_linear_schedule_is_lesson_05s():
    assert torch.allclose(IDDPM(schedule="linear").abar, load("lesson_05", "model").DDPM().abar, rtol=1e-12, atol=0)
    for timesteps in (500, 4000):                      # scaled: about the same abar at the same share of the way
        scaled = IDDPM(timesteps, "linear").abar
        assert scaled[timesteps // 2].item() == pytest.approx(0.0778, rel=0.05)


def test_log_snr_at_three_times():
    # The convention box: x_t = alpha x_0 + sigma eps with alpha^2 = abar, sigma^2 = 1 - abar, read off from q_sample.
    # For the cosine schedule alpha^2 = cos^2(angle) / f(0).
    ddpm, one, zero = IDDPM(), torch.ones(3, 1, 1, 1), torch.zeros(3, 1, 1, 1)
    t = times(100, 500, 900)
    alpha, sigma = ddpm.q_sample(one, t, zero).flatten(), ddpm.q_sample(zero, t, one).flatten()
    angle = ((t + 1) / 1000 + 0.008) / 1.008 * math.pi / 2
    abar = angle.double().cos() ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert torch.allclose(2 * (alpha.log() - sigma.log()), (abar / (1 - abar)).log().float(), atol=1e-4)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("steps", [2, 7, 50, 1000])
def test_respaced_betas_reproduce_abar_at_the_kept_times(schedule, steps):
    # Eq. (19): the chain over S with beta_{S_t} = 1 - abar_{S_t} / abar_{S_{t-1}} has the same marginals at S.
    ddpm = IDDPM(schedule=schedule)
    kept = ddpm.times(steps)[::-1]
    assert len(kept) == steps and kept[0] == 0 and kept[-1] == 999 and kept == sorted(set(kept))
    t, s = torch.tensor(kept), torch.tensor([-1, *kept[:-1]])
    beta = ddpm.beta(t, s)
    assert torch.allclose((1 - beta).cumprod(0), ddpm.abar[t], rtol=1e-6, atol=0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)[:-1]])
    assert torch.allclose(ddpm.beta_tilde(t, s), (1 - before) / (1 - (1 - beta).cumprod(0)) * beta, rtol=1e-6, atol=0)


def test_times_and_what_is_skipped():
    ddpm = IDDPM()
    assert ddpm.times() == list(range(999, -1, -1))
    old = [t for t, _, _ in load("lesson_05", "model").DDPM().reverse(lambda x, t: x, torch.zeros(1, 1, 1, 1), 17)]
    assert ddpm.times(17) == old
    assert ddpm.times(1000, 0.2) == list(range(799, -1, -1)) and ddpm.times(50, 0.2) == ddpm.times(50)[10:]
    for steps, skip in ((1, 0), (1001, 0), (10, 1.0), (10, -0.1)):
        with pytest.raises(ValueError, match="steps=|skip="):
            ddpm.times(steps, skip)


@pytest.mark.parametrize("timesteps", [1000, 4000, 50])
def test_network_is_told_the_scaled_time_of_the_training(timesteps):
    ddpm, told = IDDPM(timesteps), []
    net = lambda x, t: told.append(t[0].item()) or torch.zeros(len(x), 2, *x.shape[2:])
    ddpm.sample(net, 1, 5, shape=(1, 2, 2))
    assert told == pytest.approx([t * 1000 / timesteps for t in ddpm.times(5)], abs=1e-3) and told[-1] == 0
    e = load("lesson_01", "model").time_embedding(torch.arange(timesteps) * (1000 / timesteps), 32)
    assert (e[1:] - e[:-1]).norm(dim=1).min() > 1e-2                            # neighbours differ: not t / T


# ------------------------------------------------------------------ the learned variance
@pytest.mark.parametrize("t, s", [(1, 0), (500, 499), (999, 998), (980, 960), (20, 0)])
def test_v_interpolates_logarithms_between_the_two_fixed_variances(t, s):
    ddpm, t, s = IDDPM(), times(t), times(s)
    one = torch.ones(1, 1, 2, 2)
    log = lambda v: ddpm.log_variance(v * one, t, s).double()
    assert torch.allclose(log(1.0), ddpm.beta(t, s).log().expand(1, 1, 2, 2), atol=1e-5)
    assert torch.allclose(log(0.0), ddpm.beta_tilde(t, s).log().expand(1, 1, 2, 2), atol=1e-5)
    assert torch.allclose(log(0.5), (log(0.0) + log(1.0)) / 2, atol=1e-5)                   # geometric, not arithmetic
    assert torch.allclose(log(3.0), log(0.0) + 3 * (log(1.0) - log(0.0)), atol=1e-4)        # v is not bounded
    for variance, v in (("large", 1.0), ("small", 0.0)):
        assert torch.allclose(IDDPM(variance=variance).log_variance(None, t, s).double(), log(v)[:, :, :1, :1])


def test_variance_at_the_last_time():
    # beta-tilde_0 = 0 has no logarithm: that of the next time takes its place, at the lower end of the interpolation.
    ddpm, old = IDDPM(schedule="linear"), load("lesson_05", "model").DDPM
    t, s, one = times(0), times(-1), torch.ones(1, 1, 1, 1)
    assert ddpm.log_variance(0 * one, t, s).item() == pytest.approx(math.log(5.4532e-5), rel=1e-5)
    assert ddpm.log_variance(one, t, s).item() == pytest.approx(math.log(1e-4), rel=1e-5)
    for variance in ("small", "large"):
        ours = IDDPM(schedule="linear", variance=variance).log_variance(None, times(0, 1, 700), times(-1, 0, 699))
        expected = old(variance=variance).reverse_variance(times(0, 1, 700), times(-1, 0, 699)).log()
        assert torch.allclose(ours.flatten().double(), expected, atol=1e-6)


def test_network_output_becomes_noise_and_v():
    ddpm, x = IDDPM(), torch.randn(3, 2, 4, 4)
    output = torch.randn(3, 4, 4, 4)
    eps, v = ddpm.predict(lambda *_: output, x, times(1, 2, 3))
    assert torch.equal(eps, output[:, :2]) and torch.equal(v, (output[:, 2:] + 1) / 2)
    assert ddpm.predict(lambda *_: output[:, :2], x, times(1, 2, 3))[1].shape[1] == 0
    with pytest.raises(ValueError, match="c_out=3 must be twice the image's channels, 2"):
        ddpm.predict(lambda *_: output[:, :3], x, times(1, 2, 3))


# ------------------------------------------------------------------ losses
def both(net):
    """A network of lesson 05's kind out of one with two answers."""
    return lambda x, t: net(x, t)[:, :1]


def randomised(net, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data = 0.1 * torch.randn(p.shape, generator=generator)
    return net


@pytest.mark.parametrize("values", [dict(objective="simple"), dict(objective="hybrid", lam=0.0)])
def test_without_the_bound_it_is_lesson_05s_loss(values):
    net, x0 = randomised(UNet(**TWO)), torch.rand(4, 1, 28, 28) * 2 - 1
    torch.manual_seed(0)
    ours = IDDPM(schedule="linear", **values).loss(net, x0)
    torch.manual_seed(0)
    assert torch.allclose(ours, load("lesson_05", "model").DDPM().loss(both(net), x0), rtol=1e-6, atol=0)


def test_bound_term_is_the_divergence_of_two_gaussians():
    torch.manual_seed(0)
    ddpm, t = IDDPM(), times(1, 37, 600)
    x0, xt, mean = (torch.randn(3, 1, 4, 4) for _ in range(3))
    log_variance = ddpm.log_variance(torch.rand(3, 1, 4, 4), t, t - 1)
    q = torch.distributions.Normal(ddpm.q_posterior(x0, xt, t, t - 1), column(ddpm.beta_tilde(t, t - 1).sqrt()))
    p = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(q, p).flatten(1).mean(1) / math.log(2)
    assert torch.allclose(ddpm.bound_term(x0, xt, t, mean, log_variance), expected, rtol=1e-4)


def test_bound_term_at_t_0_is_the_decoder_and_of_these_rows_only():
    ddpm, t = IDDPM(), times(5, 0, 0)
    x0, mean = grey(torch.rand(3, 1, 4, 4) * 2 - 1), torch.rand(3, 1, 4, 4)
    log_variance = torch.full((3, 1, 4, 4), -4.0)
    terms = ddpm.bound_term(x0, x0, t, mean, log_variance)
    nll = -model.discretized_log_likelihood(x0, mean, torch.tensor(math.exp(-2.0))).flatten(1).mean(1) / math.log(2)
    assert torch.allclose(terms[1:], nll[1:], rtol=1e-5) and not torch.allclose(terms[0], nll[0], rtol=0.01)


@pytest.mark.parametrize("variance", ["large", "small"])
def test_fixed_variances_have_lesson_05s_bound(variance):
    old, ddpm = load("lesson_05", "model").DDPM(variance=variance), IDDPM(schedule="linear", variance=variance)
    net, x0 = randomised(UNet(**TWO)).eval(), grey(torch.rand(2, 1, 28, 28) * 2 - 1)
    t = times(0, 400)
    xt = ddpm.q_sample(x0, t, torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)))
    mean, _ = old.p_mean(both(net), xt, t, t - 1)
    generator = torch.Generator().manual_seed(0)
    prior, terms = ddpm.bound(net, x0, t[:, None], generator=generator)
    assert torch.allclose(terms[:, 0], old.bound_term(x0, xt, t, mean), rtol=1e-4)
    assert torch.allclose(prior, old.prior_term(x0), rtol=1e-5)


@pytest.mark.parametrize("timesteps", [20, 1000])
def test_scale_of_the_bound(timesteps):
    # lambda multiplies the whole bound, a sum over T times: not its mean (a factor of T), nor T / 1000 of it twice.
    torch.manual_seed(0)
    ddpm, std = IDDPM(timesteps, objective="vlb"), 0.5
    net, x0 = Gaussian(ddpm, std, 0.7), grey(std * torch.randn(200_000, 1, 2, 2))
    _, terms = ddpm.bound(net, x0[:100], clip=False)
    assert ddpm.loss(net, x0).item() == pytest.approx(1e-3 * terms.sum(1).mean().item(), rel=0.1)
    simple, hybrid = IDDPM(timesteps, objective="simple"), IDDPM(timesteps)
    draws = []
    for process in (simple, ddpm, hybrid):
        torch.manual_seed(1)
        draws.append(process.loss(net, x0).item())
    assert draws[2] == pytest.approx(draws[0] + draws[1], rel=1e-4)             # Eq. (16)


@pytest.mark.parametrize("objective", ["simple", "hybrid", "vlb"])
def test_gradient_stop(objective):
    # The noise learns from L_simple alone in the hybrid, and from the bound alone in L_vlb; v learns from the bound.
    torch.manual_seed(0)
    ddpm, x0 = IDDPM(100, objective=objective), grey(torch.rand(16, 1, 4, 4) * 2 - 1)
    output = torch.randn(16, 2, 4, 4, requires_grad=True)
    torch.manual_seed(1)
    ddpm.loss(lambda x, t: output, x0).backward()
    torch.manual_seed(1)
    torch.randint(100, (16,))
    eps = torch.randn_like(x0)
    of_simple = 2 * (output[:, :1].detach() - eps) / eps.numel()
    noise, v = output.grad[:, :1], output.grad[:, 1:]
    assert torch.allclose(noise, of_simple, atol=1e-7) == (objective != "vlb")
    assert bool(v.any()) == (objective != "simple")
    if objective == "vlb":
        assert noise.all()                             # x_0 is not clipped in training: that would stop gradients


def test_hybrid_loss_pulls_v_to_the_true_variance():
    # Gaussian data, the exact noise, one free v for every time: the bound is lowest at Var(x_s | x_t), from both sides.
    ddpm = IDDPM(12)
    exact = Gaussian(ddpm, 0.5)
    expected, _ = exact.exact_v(torch.arange(12))
    pull = []
    for offset in (-0.3, 0.0, 0.3):
        torch.manual_seed(0)
        free = (expected + offset).float().requires_grad_()

        def net(x, t, free=free):
            at = (t * 12 / 1000).round().long()
            return torch.cat([exact(x, t)[:, :1], column(2 * free[at] - 1).expand_as(x)], dim=1)

        ddpm.loss(net, 0.5 * torch.randn(60_000, 1, 3, 3)).backward()
        pull.append(free.grad[1:8])
    assert (pull[0] < 0).all() and (pull[2] > 0).all()
    assert (pull[1].abs() < 0.1 * torch.minimum(-pull[0], pull[2])).all()
    assert expected[1:8].max() - expected[1:8].min() > 0.4


def test_bound_is_tight_with_the_exact_variance():
    # For Gaussian data the exact reverse step is Gaussian: nothing is lost, and bits/dim is the entropy.
    torch.manual_seed(0)
    bits, std = {}, 0.2
    x0 = grey(std * torch.randn(600, 1, 6, 6))
    for v in ("exact", 0.0, 1.0):
        ddpm = IDDPM(60)
        prior, terms = ddpm.bound(Gaussian(ddpm, std, v), x0, clip=False)
        bits[v] = (prior + terms.sum(1)).mean().item()
    entropy = 0.5 * math.log2(2 * math.pi * math.e * std ** 2) - math.log2(2 / 255)
    assert bits["exact"] == pytest.approx(entropy, abs=0.02)
    assert bits["exact"] + 0.05 < min(bits[0.0], bits[1.0])


def test_terms_at_chosen_times():
    ddpm = IDDPM(30)
    net, x0 = Gaussian(ddpm, 0.5), grey(0.5 * torch.randn(500, 1, 4, 4))
    _, every = ddpm.bound(net, x0)
    chosen = torch.stack([torch.randperm(30)[:3] for _ in range(500)])
    _, some = ddpm.bound(net, x0, chosen)
    mean = every.mean(0)
    for k in range(3):
        assert some[:, k].mean().item() == pytest.approx(mean[chosen[:, k]].mean().item(), rel=0.15)
    first = torch.zeros(500, 1, dtype=torch.int64)
    assert ddpm.bound(net, x0, first)[1].mean().item() == pytest.approx(mean[0].item(), rel=0.03)


@pytest.mark.parametrize("timesteps", [20, 50, 300])
def test_bits_from_a_part_of_the_times(timesteps):
    torch.manual_seed(0)
    ddpm, generator = IDDPM(timesteps), torch.Generator().manual_seed(0)
    net, x0 = Gaussian(ddpm, 0.3, 0.2), grey(0.3 * torch.randn(1500, 1, 4, 4))
    prior, terms = ddpm.bound(net, x0[:300])
    values, times, some = load("lesson_09", "sample").bits(ddpm, net, x0, generator)
    assert values.shape == (1500,) and times.shape == some.shape and times.shape[1] < timesteps
    assert times.max() < timesteps and (times.diff(dim=1) > 0).all()
    assert torch.equal(times.unique(), torch.arange(timesteps))                 # every time may be drawn
    spread = terms.sum(1).std().item()
    assert values.mean().item() == pytest.approx((prior + terms.sum(1)).mean().item(), abs=0.3 * spread)
    later = terms.mean(0)[min(32, timesteps // 2):].sum().item()                # what is estimated, not counted
    assert (values - some[:, :min(32, timesteps // 2)].sum(1)).mean().item() == pytest.approx(later, rel=0.05, abs=0.01)


# ------------------------------------------------------------------ importance sampling
def filled(terms, memory=10):
    """A sampler that has seen these terms (T,) at every time, `memory` times."""
    sampler = ImportanceSampler(len(terms), memory)
    for _ in range(memory):
        sampler.update(torch.arange(len(terms)), terms)
    return sampler


def test_importance_sampler_is_uniform_until_every_time_was_seen_ten_times():
    sampler = ImportanceSampler(4)
    for i in range(10):
        assert torch.equal(sampler.probabilities(), torch.full((4,), 0.25, dtype=torch.float64))
        sampler.update(times(0, 1, 2), torch.tensor([1.0, 2.0, 3.0]))
    for i in range(10):
        assert torch.equal(sampler.draw(5)[1], torch.ones(5))
        sampler.update(times(3), torch.tensor([4.0]))
    p = torch.tensor([1.0, 2.0, 3.0, 4.0]).double() / 10
    assert torch.allclose(sampler.probabilities(), 0.999 * p + 0.001 / 4, rtol=1e-12)


def test_importance_sampler_takes_the_root_mean_square_of_the_last_ten():
    sampler = filled(torch.tensor([1.0, 1.0]))
    for term in [50.0] * 3 + [3.0, 4.0] * 5:                                    # the older ones are forgotten
        sampler.update(times(0), torch.tensor([term]))
    rms = math.sqrt((9 + 16) / 2)
    assert sampler.probabilities()[0].item() == pytest.approx(0.999 * rms / (rms + 1) + 0.0005, rel=1e-9)


def test_importance_weights_keep_the_mean_and_lower_the_variance():
    torch.manual_seed(0)
    terms = torch.logspace(0, -4, 50)
    sampler = filled(terms)
    p = sampler.probabilities()
    assert p.sum().item() == pytest.approx(1) and p.min() > 0.001 / 50
    t, weight = sampler.draw(20_000)
    assert torch.allclose(weight.double(), 1 / (50 * p[t]), rtol=1e-6)
    assert torch.allclose(torch.bincount(t, minlength=50) / 20_000, p.float(), atol=0.012)
    assert (weight * terms[t]).mean().item() == pytest.approx(terms.mean().item(), rel=0.01)
    uniform = terms[torch.randint(50, (20_000,))]
    assert (weight * terms[t]).std() < 0.05 * uniform.std()


def test_importance_sampling_belongs_to_the_bound_alone():
    ddpm, x0 = IDDPM(30, objective="vlb"), grey(0.5 * torch.randn(4000, 1, 2, 2))
    net, sampler = Gaussian(ddpm, 0.5), ImportanceSampler(30)
    torch.manual_seed(0)
    uniform = ddpm.loss(net, x0).item()
    ddpm.loss(net, x0, sampler)
    assert sampler.count.sum() == 4000 and sampler.count.min() > 50     # the loss shows its terms to the sampler
    assert ddpm.loss(net, x0, sampler).item() == pytest.approx(uniform, rel=0.1)
    assert sampler.probabilities()[0] > 5 / 30
    for objective in ("simple", "hybrid"):
        with pytest.raises(ValueError, match="vlb"):
            IDDPM(30, objective=objective).loss(net, x0, sampler)


def test_sampler_state_goes_through_a_checkpoint(tmp_path):
    a, b = filled(torch.rand(5)), ImportanceSampler(5)
    torch.save(a.state_dict(), tmp_path / "state.pt")
    a.update(times(0), torch.tensor([9.0]))
    b.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert not torch.equal(a.probabilities(), b.probabilities())
    b.update(times(0), torch.tensor([9.0]))
    assert torch.equal(a.probabilities(), b.probabilities()) and torch.equal(a.count, b.count)


def test_training_with_importance_resumes_exactly(tmp_path, capsys):
    train = load("lesson_09", "train")
    keys = ["smoke=true", "device=cpu", "threads=1", "ddpm.objective=vlb", "importance=true", "preview_every=0",
            "ddpm.timesteps=10"]
    whole = train.main([*keys, f"runs={tmp_path / 'a'}"])
    after = iter(range(100))

    class Cut(Exception):
        pass

    def cut(*_, original=train.ramp):
        if next(after) == 4:                           # after the checkpoint of step 3
            raise Cut
        return original(*_)

    original, train.ramp = train.ramp, cut
    try:
        with pytest.raises(Cut):
            train.main([*keys, f"runs={tmp_path / 'b'}"])
    finally:
        train.ramp = original
    again = train.main([*keys, f"runs={tmp_path / 'b'}", "--resume"])
    assert "after step 3" in capsys.readouterr().out
    a, b = load_file(whole.weights), load_file(again.weights)
    assert set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


def test_start_from_lesson_05():
    train, SmallOld = load("lesson_09", "train"), load("lesson_05", "model").UNet
    old, net = randomised(SmallOld(**SMALL)), UNet(**TWO)
    train.widen(net, old.state_dict())
    x, t = torch.randn(2, 1, 28, 28), times(3, 700)
    assert torch.allclose(net.eval()(x, t)[:, :1], old.eval()(x, t), atol=1e-6) and not net(x, t)[:, 1:].any()
    with pytest.raises(ValueError, match="shape"):
        train.widen(UNet(**TWO | {"channels": 16}), old.state_dict())


# ------------------------------------------------------------------ sampling
def test_chain_of_lesson_05_with_a_fixed_variance():
    old, net = load("lesson_05", "model").DDPM(), randomised(UNet(**TWO)).eval()
    a = IDDPM(schedule="linear", variance="small").sample(net, 2, 6, generator=torch.Generator().manual_seed(3))
    b = old.sample(both(net), 2, 6, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("steps", [100, 10])
def test_sampler_with_the_exact_variance_on_gaussian_data(steps):
    # At every number of steps the exact mean and variance of each jump give back the data exactly.
    torch.manual_seed(0)
    ddpm, std = IDDPM(100), 0.3
    kept = [*ddpm.times(steps), -1]
    jump = dict(zip(kept, kept[1:]))

    class Jump(Gaussian):
        def forward(self, xt, t):
            out, t = super().forward(xt, t), (t * 100 / 1000).round().long()
            s = torch.full_like(t, jump[int(t[0])])
            small, large, abar = self.ddpm.log_beta_tilde(t, s), self.ddpm.beta(t, s).log(), self.ddpm.abar[t]
            one = torch.ones(len(t), 1, 1, 1)
            a = self.ddpm.q_posterior(one, 0 * one, t, s).flatten().double()
            known = self.std ** 2 * (1 - abar) / (abar * self.std ** 2 + 1 - abar)
            v = ((self.ddpm.beta_tilde(t, s) + a ** 2 * known).log() - small) / (large - small)
            return torch.cat([out[:, :1], column(2 * v - 1).expand_as(xt)], dim=1)

    x = ddpm.sample(Jump(ddpm, std), 6_000, steps, shape=(1, 2, 2), clip=False)
    missing = ddpm.beta_tilde(times(0), times(-1)).item()                       # no noise at the last step
    assert missing == 0 and x.std().item() == pytest.approx(std, rel=0.02)
    fixed = IDDPM(100, variance="small").sample(Jump(ddpm, std), 6_000, steps, shape=(1, 2, 2), clip=False)
    if steps == 10:
        assert fixed.std().item() < 0.95 * std                                  # too little noise on long jumps


def test_last_step_adds_no_noise_and_a_seed_gives_the_same_images():
    ddpm, net = IDDPM(30), randomised(UNet(**TWO)).eval()
    path = list(ddpm.reverse(net, torch.randn(2, 1, 28, 28), 5))
    assert torch.allclose(path[-1][1], path[-1][2], atol=1e-6) and path[-1][2].abs().max() <= 1
    a, b, c = (ddpm.sample(net, 2, 5, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_network_is_lesson_05s_with_another_end():
    old, net = load("lesson_05", "model").UNet(**SMALL), UNet(**TWO)
    shapes = {name: p.shape for name, p in old.named_parameters()}
    changed = {name for name, p in net.named_parameters() if p.shape != shapes[name]}
    assert changed == {"out.2.weight", "out.2.bias"} and net.out[2].out_channels == 2 * old.out[2].out_channels
    x = torch.randn(2, 1, 28, 28)
    assert net(x, times(3, 900)).shape == (2, 2, 28, 28) and not net(x, times(3, 900)).any()       # v starts half-way


@pytest.mark.parametrize("values", [dict(schedule="x"), dict(objective="x"), dict(variance="x"), dict(timesteps=1)])
def test_process_refuses_what_it_does_not_know(values):
    with pytest.raises(ValueError):
        IDDPM(**values)


# ------------------------------------------------------------------ diffusers
def scheduler_cases():
    """The cases of the fixture: inputs by formula, so that nothing depends on a random generator."""
    base = torch.linspace(-1, 1, 4).reshape(1, 1, 2, 2)
    output = torch.cat([torch.sin(5 * base), 1.5 * torch.cos(3 * base)], dim=1)     # noise, and v beyond [-1, 1]
    inputs = {"sample": 1.3 * base, "output": output, "noise": torch.cos(7 * base)}
    for t, s in ((999, 998), (500, 499), (1, 0), (0, -1), (979, 958), (20, 0)):
        yield t, s, inputs


def test_equal_to_the_fixture_of_diffusers():
    fixture, ddpm = json.loads(FIXTURE.read_text()), IDDPM()
    betas = ddpm.beta(torch.arange(1000), torch.arange(-1, 999))
    assert torch.allclose(betas[::37], torch.tensor(fixture["betas"], dtype=torch.float64), rtol=1e-5, atol=0)
    assert ddpm.times(50) == fixture["times_50"]
    cases = list(scheduler_cases())
    assert len(fixture["cases"]) == len(cases) == 6 and len(fixture["betas"]) == 28
    for (t, s, inputs), row in zip(cases, fixture["cases"]):
        assert (row["t"], row["s"]) == (t, s)
        net = lambda *_, output=inputs["output"]: output
        mean, log_variance, x0 = ddpm.p_mean_variance(net, inputs["sample"], times(t), times(s))
        x = mean + (0.5 * log_variance).exp() * inputs["noise"] if s >= 0 else mean
        assert torch.allclose(x.flatten(), torch.tensor(row["x"]), atol=2e-6), row
        assert torch.allclose(x0.flatten(), torch.tensor(row["x0"]), atol=2e-6), row


def test_fixture_is_what_diffusers_gives():
    diffusers = pytest.importorskip("diffusers", reason="dev reference: pip install -e '.[reference]'")
    made, kept = make_fixture(diffusers), json.loads(FIXTURE.read_text())
    assert {**made, "diffusers": 0} == {**kept, "diffusers": 0}


def make_fixture(diffusers):
    """One step of diffusers' DDPMScheduler for every case. `python tests/test_lesson_09.py` writes the fixture."""
    import diffusers.schedulers.scheduling_ddpm as module

    make = lambda: diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range")
    betas, rows = make().betas, []
    grid = torch.linspace(999, 0, 50).round().long().tolist()
    for t, s, inputs in scheduler_cases():
        scheduler = make()
        # Its float32 schedule keeps few digits of 1 - abar at small t: the same formula again, in float64.
        level = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
        scheduler.betas = torch.tensor([min(1 - b / a, 0.999) for a, b in zip(level, level[1:])], dtype=torch.float64)
        scheduler.alphas = 1 - scheduler.betas
        scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
        scheduler.one = torch.tensor(1.0, dtype=torch.float64)
        if t - s > 1:
            scheduler.set_timesteps(timesteps=grid)
        original, module.randn_tensor = module.randn_tensor, lambda *a, noise=inputs["noise"], **k: noise
        try:
            step = scheduler.step(inputs["output"], t, inputs["sample"])
        finally:
            module.randn_tensor = original
        rows.append({"t": t, "s": s, "x": step.prev_sample.flatten().tolist(),
                     "x0": step.pred_original_sample.flatten().tolist()})
    return {"diffusers": diffusers.__version__, "betas": betas[::37].tolist(), "times_50": grid, "cases": rows}


if __name__ == "__main__":
    import diffusers

    FIXTURE.write_text(json.dumps(make_fixture(diffusers), indent=0))
