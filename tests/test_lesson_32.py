"""Lesson 32: the maths of Stable Diffusion 3 against closed forms, and its network and times against diffusers."""

import json
import math
from pathlib import Path

import pytest
import torch

from conftest import ROOT, load
from utils import Arm, Run, Section, UserError, seeded

model, time_embedding = load("lesson_32", "model"), load("lesson_32", "earlier").time_embedding
RectifiedFlow, Times, MMDiT = model.RectifiedFlow, model.Times, model.MMDiT
FIXTURE = Path(__file__).parent / "fixtures" / "sd3_mmdit.json"
SMALL = dict(vocabulary=20, length=6, bags=(4, 6), context=8, dim=16, depth=2, heads=2, patch=4, grid=10)
KINDS = [("uniform", {}), ("logit-normal", {}), ("logit-normal", {"mean": -0.5, "std": 0.6}), ("mode", {}),
         ("mode", {"mode_scale": -0.8}), ("mode", {"mode_scale": 0.0}), ("cosmap", {})]


def times(density, **values):
    return Times(density, **values)


# ------------------------------------------------------------------ convention, path, loss
def test_log_snr_at_three_times():
    # The convention box: x_t = alpha x_0 + sigma n with alpha = 1 - t, sigma = t, read off from q_sample. Lesson 21's t
    # is this one turned round.
    flow, t = RectifiedFlow(), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    one, zero = torch.ones(3, 1, 1, 1), torch.zeros(3, 1, 1, 1)
    alpha, sigma = flow.q_sample(one, t, zero).flatten(), flow.q_sample(zero, t, one).flatten()
    assert (2 * (alpha.log() - sigma.log())).tolist() == pytest.approx([4.394449, 0.0, -4.394449], abs=1e-5)
    other = load("lesson_21", "model").RectifiedFlow()
    x0, n = torch.randn(2, 3, 1, 2, 2)
    assert torch.allclose(flow.q_sample(x0, t, n), other.interpolate(n, x0, 1 - t), atol=1e-6)


def recording(seen):
    return lambda x, t: seen.append((x, t)) or torch.zeros_like(x)


def test_loss_is_the_squared_error_of_noise_minus_data_at_1000_t():
    torch.manual_seed(0)
    flow, seen, x0, n = RectifiedFlow(), [], torch.rand(6, 1, 2, 2), torch.randn(6, 1, 2, 2)
    t = torch.linspace(0.05, 0.95, 6, dtype=torch.float64)
    loss = flow.loss_at(recording(seen), x0, t, n)
    assert torch.allclose(loss, (n - x0).square().flatten(1).mean(1)) and loss.shape == (6,)
    assert seen[0][1].tolist() == pytest.approx((1000 * t).tolist()) and seen[0][1].dtype == torch.float32
    assert flow.loss_at(lambda x, t: n - x0, x0, t, n).max() == 0                # not x_0 - n
    assert flow.loss_at(lambda x, t: x0 - n, x0, t, n).min() > 0.1


def test_training_draws_its_density_and_never_the_shift():
    for density, values in KINDS:
        torch.manual_seed(1)
        seen, flow = [], RectifiedFlow(density, **values)
        loss = flow.loss(recording(seen), torch.zeros(4000, 1, 1, 1))
        t = seen[0][1].double() / 1000
        assert loss.shape == () and 0 <= t.min() and t.max() <= 1
        mean = (flow.times.map(torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64))).mean()
        assert t.mean().item() == pytest.approx(mean.item(), abs=0.02), density  # shift=3 would move it by 0.2


# ------------------------------------------------------------------ densities of t
@pytest.mark.parametrize("density, values", KINDS)
def test_density_integrates_to_1_and_is_that_of_the_draws(density, values):
    one = times(density, **values)
    t = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    pdf = one.pdf(t)
    assert pdf.mean().item() == pytest.approx(1, abs=2e-3) and pdf.min() >= 0
    torch.manual_seed(0)
    share = torch.histc(one.draw(200_000), 20, 0, 1) / 200_000
    assert share.tolist() == pytest.approx(pdf.reshape(20, 200).mean(1).div(20).tolist(), abs=4e-3)
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    ends = one.map(u)
    assert ends.min() >= 0 and ends.max() <= 1 and (ends.diff().sign() == ends.diff().sign()[0]).all()


def test_densities_by_hand():
    t = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)
    cosmap = 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t ** 2)
    assert times("cosmap").pdf(t).tolist() == pytest.approx(cosmap.tolist())
    assert times("logit-normal").pdf(t)[1].item() == pytest.approx(4 / math.sqrt(2 * math.pi))
    assert times("mode", mode_scale=0.0).pdf(t).tolist() == pytest.approx([1, 1, 1])
    assert times("mode", mode_scale=1.29).pdf(t)[1] > 1 > times("mode", mode_scale=-0.5).pdf(t)[1]
    u = torch.tensor([0.1, 0.4, 0.8], dtype=torch.float64)                       # the log-SNR of a cosine schedule at u
    c = times("cosmap").map(u)
    assert (2 * ((1 - c) / c).log()).tolist() == pytest.approx((-2 * torch.tan(math.pi / 2 * u).log()).tolist())
    more_noise, more_data = (times("logit-normal", mean=mean).pdf(t) for mean in (0.5, -0.5))
    assert more_noise[2] > more_data[2] and more_noise[0] < more_data[0]         # mean > 0: towards noise


# ------------------------------------------------------------------ times of sampling
def test_shift():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.equal(model.shifted(t, 1.0), t)                                 # the identity
    moved = model.shifted(t, 3.0)
    assert moved[0] == 0 and moved[-1] == 1 and (moved[1:-1] > t[1:-1]).all()    # towards noise
    # sigma / (1 - sigma) grows shift times: an image of 9 times the pixels averages its noise away by 3.
    assert (moved / (1 - moved))[1:-1].tolist() == pytest.approx((3 * t / (1 - t))[1:-1].tolist())
    assert torch.allclose(model.shifted(model.shifted(t, 3.0), 1 / 3), t, atol=1e-12)


def test_last_time_above_0_of_the_official_table():
    flow = RectifiedFlow()
    official = flow.grid(28, 3.0, official=True)
    assert official[-2].item() == pytest.approx(0.00893, abs=5e-6) and len(official) == 29 and official[-1] == 0
    assert model.shifted(0.001, 3.0) == pytest.approx(0.00299, abs=5e-6)         # shifted once
    for steps in (5, 28):
        grid = flow.grid(steps, 3.0)
        assert grid[0] == 1 and grid[-1] == 0 and (grid.diff() < 0).all() and len(grid) == steps + 1
    assert flow.grid(4).tolist() == [1, 0.75, 0.5, 0.25, 0]


def test_network_can_tell_neighbouring_times():
    for grid in (RectifiedFlow().grid(100), RectifiedFlow().grid(100, 3.0), RectifiedFlow().grid(100, 1 / 3)):
        embedding = time_embedding(model.network_time(grid), 256)
        assert embedding.diff(dim=0).abs().amax(1).min() > 0.5
        assert time_embedding(grid, 256).diff(dim=0).abs().amax(1).min() < 1e-2               # without the factor


# ------------------------------------------------------------------ the sampler
class Gaussian(torch.nn.Module):
    """The exact velocity for data of N(mean, std^2): E[n - x_0 | x_t]."""

    mean, std = 1.5, 0.5

    def forward(self, x, time):
        t = (time / 1000)[:, None, None, None]
        variance = (1 - t) ** 2 * self.std ** 2 + t ** 2
        return -self.mean + (t - (1 - t) * self.std ** 2) / variance * (x - (1 - t) * self.mean)


def test_euler_carries_noise_to_data_at_first_order():
    n, flow, error = torch.randn(200, 1, 1, 1, generator=seeded(0)), RectifiedFlow(), []
    for steps in (20, 40, 80):
        x = flow.sample(Gaussian(), n, flow.grid(steps))
        error.append((x - (1.5 + 0.5 * n)).abs().max().item())
    assert math.log2(error[0] / error[1]) == pytest.approx(1, abs=0.2)
    assert math.log2(error[1] / error[2]) == pytest.approx(1, abs=0.2) and error[2] < 0.05


def test_reverse_asks_at_1000_t_and_ends_at_its_own_estimate():
    seen, flow, n = [], RectifiedFlow(), torch.randn(3, 1, 2, 2, generator=seeded(0))
    path = list(flow.reverse(lambda x, t: seen.append(t) or Gaussian()(x, t), n, flow.grid(4)))
    assert torch.stack(seen)[:, 0].tolist() == [1000, 750, 500, 250] and all(t.shape == (3,) for t in seen)
    assert [t for t, _, _ in path] == [1, 0.75, 0.5, 0.25]
    _, x, x0 = path[-1]
    assert torch.allclose(x, x0, atol=1e-6)
    x0, one = torch.rand(2, 3, 1, 2, 2)
    v = one - x0                                                                 # a straight path: one step is exact
    assert torch.allclose(flow.sample(lambda x, t: v, one, flow.grid(1)), x0, atol=1e-6)


# ------------------------------------------------------------------ condition and guidance
NULL = torch.tensor([1, 0, 0, 0, 0, 0])


def test_each_encoder_is_dropped_on_its_own():
    torch.manual_seed(0)
    c = torch.tensor([[1, 5, 6, 7, 0, 0]]).repeat(20_000, 1)
    each = model.for_encoders(c, NULL, 0.464)
    dropped = (each == NULL).all(2).float()
    assert each.shape == (20_000, 3, 6) and ((each == NULL).all(2) | (each == c[:, None]).all(2)).all()
    assert dropped.mean(0).tolist() == pytest.approx([0.464] * 3, abs=0.015)
    assert torch.corrcoef(dropped.T).triu(1).abs().max() < 0.03                  # independent of each other
    assert dropped.all(1).float().mean().item() == pytest.approx(0.1, abs=0.01)  # 0.464^3: no caption at all
    assert torch.equal(model.for_encoders(c, NULL), c[:, None].expand(-1, 3, -1))


def started(seed=0, **changes):
    """A small network with random weights also where it starts at zero."""
    torch.manual_seed(seed)
    net = MMDiT(**{**SMALL, **changes})
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net.eval()


def test_every_encoder_reaches_the_output_and_only_its_own_part():
    net, x, t = started(), torch.randn(1, 1, 8, 12), torch.tensor([300.0])
    full = torch.tensor([[[1, 5, 6, 7, 0, 0]] * 3])
    tokens, pooled = net.text(full)
    for i in range(3):
        part = full.clone()
        part[:, i] = NULL
        other_tokens, other_pooled = net.text(part)
        assert torch.equal(tokens, other_tokens) == (i < 2)                      # tokens: of the third alone
        assert torch.equal(pooled[:, :4], other_pooled[:, :4]) == (i != 0)
        assert torch.equal(pooled[:, 4:], other_pooled[:, 4:]) == (i != 1)
        assert (net(x, t, full) - net(x, t, part)).abs().max() > 1e-4


def test_guidance_is_linear_and_reaches_the_samples():
    net, flow, n = started(), RectifiedFlow(), torch.randn(2, 1, 8, 8, generator=seeded(0))
    c = model.for_encoders(torch.tensor([[1, 5, 6, 0, 0, 0], [1, 7, 8, 9, 0, 0]]), NULL)
    null = model.for_encoders(NULL.expand(2, -1), NULL)
    t, v = torch.full((2,), 400.0), {}
    for w in (0, 1, 2.5):
        v[w] = model.guided(net, c, null, w)(n, t)
    assert torch.equal(v[1], net(n, t, c)) and torch.equal(v[0], net(n, t, null))
    assert torch.allclose(v[2.5], v[0] + 2.5 * (v[1] - v[0]), atol=1e-3)
    x = {w: flow.sample(model.guided(net, c, null, w), n, flow.grid(3)) for w in (0.0, 1.0, 4.0)}
    assert min((x[a] - x[b]).abs().max() for a, b in ((0.0, 1.0), (1.0, 4.0), (0.0, 4.0))) > 1e-3


# ------------------------------------------------------------------ the network
def test_blocks_are_the_identity_and_the_output_is_0_at_the_start():
    torch.manual_seed(0)
    net = MMDiT(**SMALL)
    x, context, emb = torch.randn(2, 6, 16), torch.randn(2, 5, 16), torch.randn(2, 2, 16)
    after, words = net.blocks[0](x, context, emb)
    assert torch.equal(after, x) and torch.equal(words, context)
    after, words = net.blocks[-1](x, context, emb)
    assert torch.equal(after, x) and words is None
    c = model.for_encoders(NULL.expand(2, -1), NULL)
    assert net(torch.randn(2, 1, 8, 8), torch.ones(2), c).abs().max() == 0


def test_last_block_keeps_of_the_text_what_the_image_looks_at():
    net = MMDiT(**SMALL)
    names = {name.split(".")[0] for name, _ in net.blocks[-1].text.named_parameters()}
    assert names == {"adaln", "qkv", "norm_q", "norm_k"}                         # no projection, no MLP
    assert net.blocks[-1].text.adaln[1].out_features == 2 * 16 and net.blocks[0].text.adaln[1].out_features == 6 * 16
    assert {"out", "mlp"} <= {name.split(".")[0] for name, _ in net.blocks[0].text.named_parameters()}


def test_attention_is_over_text_then_image():
    net = started()
    x, context, emb = torch.randn(2, 6, 16), torch.randn(2, 5, 16), torch.randn(2, 2, 16)
    block = net.blocks[0]
    (q, k, v), _, _ = block.enter(x, context, emb)
    (text_q, text_k, _), _ = block.text.enter(context, emb)
    assert q.shape == (2, 2, 11, 8) and torch.equal(q[:, :, :5], text_q) and torch.equal(k[:, :, :5], text_k)
    # By hand, with the softmax written out.
    h = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(8), dim=3) @ v
    after, words = block(x, context, emb)
    for stream, tokens, part, got in ((block.text, context, h[:, :, :5], words), (block.image, x, h[:, :, 5:], after)):
        _, rest = stream.enter(tokens, emb)
        assert torch.allclose(got, stream.think(stream.attended(tokens, part, rest), rest), atol=1e-5)
    moved = x.clone()
    moved[:, 3] = torch.randn(16)
    assert (block(moved, context, emb)[1] - words).abs().max() > 1e-4            # the text learns of the image


def test_qk_norm_bounds_the_logits():
    net = MMDiT(**SMALL)
    x, context, emb = 1e3 * torch.randn(2, 6, 16), torch.randn(2, 5, 16), torch.randn(2, 2, 16)
    for scale in (1.0, 100.0):
        for stream in (net.blocks[0].text, net.blocks[0].image):
            stream.qkv.weight.data *= scale
        (q, k, _), _, _ = net.blocks[0].enter(x, context, emb)
        assert q.square().mean(3).sub(1).abs().max() < 1e-3 and k.square().mean(3).sub(1).abs().max() < 1e-3
    assert not list(MMDiT(**SMALL, qk_norm=False).blocks[0].image.norm_q.parameters())


def test_time_and_pooled_text_are_added():
    net, t = started(), torch.tensor([300.0, 700.0])
    seen = []
    net.blocks[0].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[2]))
    c = model.for_encoders(torch.tensor([[1, 5, 6, 0, 0, 0]] * 2), NULL)
    net(torch.randn(2, 1, 8, 8), t, c)
    assert torch.allclose(seen[0].sum(1), net.time(t) + net.pooled(net.text(c)[1]), atol=1e-6)


def test_positions_are_the_middle_of_the_grid():
    whole = model.cropped_sincos_2d(16, 10, 10, 10).reshape(10, 10, 16)
    for h, w in ((7, 7), (4, 7), (3, 2)):
        top, left = (10 - h) // 2, (10 - w) // 2
        assert torch.equal(model.cropped_sincos_2d(16, h, w, 10).reshape(h, w, 16), whole[top:top + h, left:left + w])
    assert torch.equal(whole, load("lesson_23", "model").sincos_2d(16, 10, 10).reshape(10, 10, 16))
    with pytest.raises(ValueError, match="grid=6"):
        model.cropped_sincos_2d(16, 7, 7, 6)


def test_two_passes_agree_and_a_gradient_reaches_every_weight():
    net, c = started(), model.for_encoders(torch.tensor([[1, 5, 6, 0, 0, 0]] * 2), NULL)
    x, t = torch.randn(2, 1, 12, 8), torch.tensor([300.0, 700.0])
    with torch.no_grad():
        assert torch.equal(net(x, t, c), net(x, t, c))
    net.train()(x, t, c).square().sum().backward()
    dead = [name for name, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert dead == ["blocks.1.text.norm_q.weight"]                               # the last block's text asks in vain


def test_one_batch_is_overfitted_to_0():
    # One image a caption and one noise: the velocity is known.
    torch.manual_seed(0)
    net, flow = MMDiT(**{**SMALL, "dim": 32, "depth": 1}), RectifiedFlow()
    x0, n = torch.rand(4, 1, 8, 8) * 2 - 1, torch.randn(4, 1, 8, 8)
    c = model.for_encoders(torch.tensor([[1, i, 0, 0, 0, 0] for i in range(5, 9)]), NULL)
    optimizer, t = torch.optim.Adam(net.parameters(), lr=1e-2), torch.full((4,), 0.5, dtype=torch.float64)
    for _ in range(150):
        loss = flow.loss_at(model.given(net, c), x0, t, n).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.01


@pytest.mark.parametrize("call, what", [
    (lambda: Times("normal"), "density"), (lambda: Times(std=0), "std"), (lambda: Times(mode_scale=2), "mode_scale"),
    (lambda: RectifiedFlow().grid(0), "steps"), (lambda: RectifiedFlow().grid(4, 0), "shift"),
    (lambda: MMDiT(**{**SMALL, "heads": 3}), "heads"), (lambda: MMDiT(**{**SMALL, "dim": 18}), "dim"),
    (lambda: started()(torch.zeros(1, 1, 9, 8), torch.ones(1), torch.zeros(1, 3, 6).long()), "patch"),
    (lambda: model.cropped_sincos_2d(16, 4, 7, 6), "grid=6"),
])
def test_what_it_does_not_know_is_refused(call, what):
    with pytest.raises(ValueError, match=what):
        call()


# ------------------------------------------------------------------ reproduce.py: the opponents
reproduce = load("lesson_32", "reproduce")
Baseline, BASELINES = reproduce.Baseline, ("eps-linear", "v-cosine", "edm")
LEVELS = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)


def test_paths_of_the_opponents():
    a, b = Baseline("eps-linear").coefficients(LEVELS)
    abar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)                # lesson 05's
    assert (a ** 2).log().tolist() == pytest.approx(abar[[99, 499, 899]].log().tolist(), rel=0.02)
    assert (a ** 2 + b ** 2).tolist() == pytest.approx([1, 1, 1])
    a, b = Baseline("v-cosine").coefficients(LEVELS)
    assert (2 * (a / b).log()).tolist() == pytest.approx((-2 * torch.tan(math.pi / 2 * LEVELS).log()).tolist())
    a, b = Baseline("edm").coefficients(LEVELS)
    assert a.tolist() == [1, 1, 1] and b[1].item() == pytest.approx(2 * math.exp(-1.2))
    assert (b[2] / b[1]).log().item() == pytest.approx(1.2 * 1.2815516, rel=1e-5)
    sigmas = Baseline("edm").coefficients(Baseline("edm").grid(5))[1]
    edm = load("lesson_20", "model").noise_levels("edm", 5, 0.004, 160.0)
    assert sigmas.tolist() == pytest.approx(edm.tolist(), rel=1e-6)


@pytest.mark.parametrize("form", BASELINES)
def test_targets_of_the_opponents(form):
    one, seen = Baseline(form), []
    x0, n, t = torch.rand(3, 1, 2, 2), torch.randn(3, 1, 2, 2, generator=seeded(0)), LEVELS
    a, b = (image.double()[:, None, None, None] for image in one.coefficients(t))
    scale = (1 + b ** 2).sqrt()
    edm = (x0 - (x0 + b * n) / scale ** 2) * scale / b                           # (x_0 - c_skip x) / c_out
    target = {"eps-linear": n, "v-cosine": a * n - b * x0, "edm": edm}[form]
    loss = one.loss_at(lambda x, t: seen.append((x, t)) or target.float(), x0, t, n)
    assert loss.max() < 1e-10 and loss.shape == (3,)
    x, clock = seen[0]
    assert torch.allclose(x, ((a * x0 + b * n) / (scale if form == "edm" else 1)).float(), atol=1e-6)
    wanted = 250 * b.flatten().log() if form == "edm" else 1000 * t
    assert clock.tolist() == pytest.approx(wanted.tolist(), rel=1e-5)


class Exact(torch.nn.Module):
    """The exact output of each formulation for data of N(mean, std^2): E[target | x_t]. Finds t from its clock."""

    def __init__(self, form, mean=0.5, std=0.5):
        super().__init__()
        self.one, self.mean, self.std = Baseline(form), mean, std

    def forward(self, x, clock):
        form, clock = self.one.form, clock.double()
        if form == "edm":
            b = (clock / 250).exp()
            a = torch.ones_like(b)
            x = x * (1 + b ** 2).sqrt()[:, None, None, None]
        else:
            a, b = self.one.coefficients(clock / 1000)
        a, b = a[:, None, None, None], b[:, None, None, None]
        x0 = self.mean + a * self.std ** 2 / (a ** 2 * self.std ** 2 + b ** 2) * (x.double() - a * self.mean)
        n = (x.double() - a * x0) / b
        if form == "edm":
            return (x0 - x / (1 + b ** 2)) * (1 + b ** 2).sqrt() / b
        return n if form == "eps-linear" else a * n - b * x0


@pytest.mark.parametrize("form", BASELINES)
def test_samplers_of_the_opponents(form):
    n, one, error = torch.randn(100, 1, 1, 1, generator=seeded(0)), Baseline(form), []
    for steps in (100, 200):
        error.append((one.sample(Exact(form), n, one.grid(steps)) - (0.5 + 0.5 * n)).abs().max().item())
    assert error[1] < 0.04 and math.log2(error[0] / error[1]) == pytest.approx(1, abs=0.3), error


def test_the_two_networks_have_as_many_parameters():
    sizes = dict(vocabulary=41, length=10, dim=32, depth=4, heads=2, patch=4, grid=14)
    ours, cross = MMDiT(**sizes), reproduce.CrossDiT(**sizes)
    count = lambda net: sum(p.numel() for p in net.parameters())
    assert abs(count(ours) / count(cross) - 1) < 0.03 and len(cross.blocks) == 6
    assert len(reproduce.ShallowCrossDiT(**sizes).blocks) == 4
    c = model.for_encoders(torch.tensor([[1, 5, 6] + [0] * 7] * 2), torch.tensor([1] + [0] * 9))
    x, t = torch.randn(2, 1, 28, 28), torch.tensor([300.0, 700.0])
    assert cross(x, t, c).abs().max() == 0
    torch.nn.init.normal_(cross.final.linear.weight)
    for parameter in cross.blocks.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    other = c.clone()
    other[:, 2, 1] = 9                                                           # the tokens alone
    assert (cross(x, t, c) - cross(x, t, other)).abs().max() > 1e-4


def test_held_out_triples_are_not_in_training(tmp_path):
    said = reproduce.wishes([(7, 2, 2)], 5, 0)
    assert all(reproduce.text.read_caption(one) == [{"digit": 7, "thickness": 2, "slant": 2}] for one in said)
    data = reproduce.text.captioned("train", 1, limit=2000)
    assert not reproduce.text.held_out(data.digit, data.levels["thickness"], data.levels["slant"]).any()


def test_encoders_left_out_and_wrong_ones(tmp_path):
    sample, net = load("lesson_32", "sample"), started(length=6)
    words = reproduce.text.Tokenizer(reproduce.text.WORDS[:20], 6)
    n = torch.randn(2, 1, 8, 8, generator=seeded(0))
    x = {e: sample.draw(RectifiedFlow(), net, words, ["1", "2"], n, RectifiedFlow().grid(2),
                        1.0, e) for e in ((1, 1, 1), (1, 1, 0), (0, 0, 0))}
    assert min((x[a] - x[b]).abs().max() for a in x for b in x if a != b) > 1e-4
    none = sample.draw(RectifiedFlow(), net, words, ["", ""], n, RectifiedFlow().grid(2), 1.0)
    assert torch.equal(x[(0, 0, 0)], none)
    for wrong in ((1, 1), (1, 1, 2)):
        with pytest.raises(UserError, match="encoders"):
            sample.conditioned(net, words, ["1"], 1.0, wrong, torch.device("cpu"))


# ------------------------------------------------------------------ diffusers
class AsGiven(torch.nn.Module):
    """Instead of the text encoders: tokens and pooled vector as they come."""

    def forward(self, c):
        return c


SIZES = dict(dim=16, depth=3, heads=2, patch=2, grid=6, bags=(7,), context=12, image_channels=3)
INPUTS = [(4, 4, 350.0), (8, 6, 20.0)]                                            # H, W (also not square), 1000 t


def values(n, k):
    """n numbers that any program can make: no generator's business."""
    return 0.7 * torch.sin(torch.arange(n, dtype=torch.float64) * (0.37 + 0.11 * k) + k)


def networks(qk_norm):
    """Ours, with weights that any program can make, and the inputs."""
    net = MMDiT(vocabulary=2, length=2, **SIZES, qk_norm=qk_norm).eval()
    net.text = AsGiven()
    for k, parameter in enumerate(net.parameters()):
        parameter.data = values(parameter.numel(), k).reshape(parameter.shape).float() * (0.35 + (parameter.dim() < 2))
    cases = []
    for k, (h, w, t) in enumerate(INPUTS):
        x = values(2 * 3 * h * w, k).reshape(2, 3, h, w).float()
        tokens, pooled = values(2 * 5 * 12, k + 3).reshape(2, 5, 12).float(), values(2 * 7, k + 5).reshape(2, 7).float()
        cases.append((x, torch.tensor([t, t / 2]), tokens, pooled))
    return net, cases


def ours(qk_norm):
    net, cases = networks(qk_norm)
    with torch.no_grad():
        return [net(x, t, (tokens, pooled)) for x, t, tokens, pooled in cases]


def ported(state):
    """Our weights under diffusers' names."""
    result = {}
    for name, value in state.items():
        name = name.replace("blocks.", "transformer_blocks.")
        if name.startswith("final.adaln") or "2.text.adaln" in name:             # there: scale, then shift
            shift, scale = value.chunk(2)
            value = torch.cat([scale, shift])
        if ".qkv." in name:
            for part, one in zip("qkv", value.chunk(3)):
                new = f"attn.to_{part}" if ".image." in name else f"attn.add_{part}_proj"
                result[name.replace("image.qkv", new).replace("text.qkv", new)] = one
            continue
        for old, new in (("stem.weight", "pos_embed.proj.weight"), ("stem.bias", "pos_embed.proj.bias"),
                         ("time.into", "time_text_embed.timestep_embedder.linear_1"),
                         ("time.out", "time_text_embed.timestep_embedder.linear_2"),
                         ("pooled.0", "time_text_embed.text_embedder.linear_1"),
                         ("pooled.2", "time_text_embed.text_embedder.linear_2"),
                         ("context.", "context_embedder."), ("final.adaln.1", "norm_out.linear"),
                         ("final.linear", "proj_out"), ("image.adaln.1", "norm1.linear"),
                         ("text.adaln.1", "norm1_context.linear"), ("image.out", "attn.to_out.0"),
                         ("text.out", "attn.to_add_out"), ("image.mlp.into", "ff.net.0.proj"),
                         ("image.mlp.out", "ff.net.2"), ("text.mlp.into", "ff_context.net.0.proj"),
                         ("text.mlp.out", "ff_context.net.2"), ("image.norm_", "attn.norm_"),
                         ("text.norm_", "attn.norm_added_")):
            name = name.replace(old, new)
        result[name] = value.reshape(-1, 3, 2, 2) if name == "pos_embed.proj.weight" else value
    return result


def make_fixture(diffusers):
    """The same by diffusers. `python tests/test_lesson_32.py` writes the fixture."""
    rows = {}
    for qk_norm in (False, True):
        theirs = diffusers.SD3Transformer2DModel(
            sample_size=12, patch_size=2, in_channels=3, out_channels=3, num_layers=3, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=7,
            pos_embed_max_size=6, qk_norm="rms_norm" if qk_norm else None).eval()
        net, cases = networks(qk_norm)
        missing, unexpected = theirs.load_state_dict(ported(net.state_dict()), strict=False)
        assert unexpected == [] and missing == ["pos_embed.pos_embed"], (missing, unexpected)     # all weights, no more
        with torch.no_grad():
            out = [theirs(x, tokens, pooled, t, return_dict=False)[0] for x, t, tokens, pooled in cases]
        rows[str(qk_norm)] = [one.flatten().tolist() for one in out]
    tables = {}
    for shift in (1.0, 3.0):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        for steps in (5, 28):
            scheduler.set_timesteps(steps)
            tables[f"{shift:g} {steps}"] = scheduler.sigmas.tolist()
            assert torch.allclose(scheduler.timesteps, 1000 * scheduler.sigmas[:-1])
    scheduler.set_timesteps(5)
    x, path = values(6, 1).float(), []
    for t in scheduler.timesteps:
        x = scheduler.step(torch.sin(3 * x) + t / 1000, t, x).prev_sample
        path.append(x.tolist())
    from diffusers import training_utils

    u = torch.rand(6, generator=seeded(0))
    draws = {"u": u.tolist(), "mode": training_utils.compute_density_for_timestep_sampling(
        "mode", 6, mode_scale=1.29, generator=seeded(0)).tolist()}
    draws["normal"] = torch.normal(0.3, 0.8, (6,), generator=seeded(0)).tolist()
    draws["logit-normal"] = training_utils.compute_density_for_timestep_sampling(
        "logit_normal", 6, 0.3, 0.8, generator=seeded(0)).tolist()
    draws["cosmap"] = training_utils.compute_loss_weighting_for_sd3("cosmap", u).tolist()
    return {"diffusers": diffusers.__version__, "networks": rows, "sigmas": tables, "path": path, "draws": draws}


def assert_equal_to(fixture):
    for qk_norm in (False, True):
        for got, expected in zip(ours(qk_norm), fixture["networks"][str(qk_norm)], strict=True):
            expected = torch.tensor(expected)
            assert torch.allclose(got.flatten(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
            assert expected.std() > 0.1
    assert fixture["networks"]["True"] != fixture["networks"]["False"]
    flow = RectifiedFlow()
    for key, expected in fixture["sigmas"].items():
        shift, steps = float(key.split()[0]), int(key.split()[1])
        assert flow.grid(steps, shift, official=True).tolist() == pytest.approx(expected, abs=1e-6)
    net = lambda x, t: torch.sin(3 * x) + t[:, None, None, None] / 1000
    path = flow.reverse(net, values(6, 1).float().reshape(1, 1, 2, 3), flow.grid(5, 3.0, official=True))
    for (_, x, _), expected in zip(path, fixture["path"], strict=True):
        assert x.flatten().tolist() == pytest.approx(expected, abs=1e-5)
    draws = {name: torch.tensor(one, dtype=torch.float64) for name, one in fixture["draws"].items()}
    assert torch.allclose(times("mode").map(draws["u"]), draws["mode"], atol=1e-6)
    assert torch.allclose(times("cosmap").pdf(draws["u"]), draws["cosmap"], rtol=1e-5)
    u = torch.special.ndtr((draws["normal"] - 0.3) / 0.8)
    assert torch.allclose(times("logit-normal", mean=0.3, std=0.8).map(u), draws["logit-normal"], atol=1e-6)


def test_equal_to_the_fixture_of_diffusers():
    assert_equal_to(json.loads(FIXTURE.read_text()))


def test_equal_to_diffusers():
    assert_equal_to(make_fixture(pytest.importorskip("diffusers", reason="pip install -e '.[reference]'")))


if __name__ == "__main__":
    import diffusers

    FIXTURE.write_text(json.dumps(make_fixture(diffusers)) + "\n")


def test_pooled_text_is_a_bag_without_padding():
    text, c = model.TextEncoders(12, 5, (4, 6), 8, 2), torch.tensor([[[1, 5, 3, 0, 0]] * 3])
    for bag, part in zip(text.bags, text(c)[1].split([4, 6], dim=1), strict=True):
        assert torch.allclose(part[0], bag.weight[[1, 5, 3]].mean(0), atol=1e-6)


# ------------------------------------------------------------------ train.py, sample.py
KEYS = ["smoke=true", "gpu=false", "device=cpu", "threads=1"]


def test_training_drops_at_the_configured_rate_and_previews_are_guided(tmp_path, monkeypatch):
    train, rates, weights = load("lesson_32", "train"), [], []
    drop, guide = train.for_encoders, train.guided
    monkeypatch.setattr(train, "for_encoders", lambda c, null, p=0.0: rates.append(p) or drop(c, null, p))
    monkeypatch.setattr(train, "guided", lambda net, c, null, w: weights.append((w, len(c))) or guide(net, c, null, w))
    train.main([*KEYS, "drop=0.3", f"runs={tmp_path}"])
    assert [p for p in rates if p] == [0.3] * 6 and weights == [(3.0, 40)] * 2           # six steps, two previews


def drawn(w, encoders=(1, 1, 1), **batch):
    """Three images of three captions by a small network, from the same noise."""
    sample, flow, words = load("lesson_32", "sample"), RectifiedFlow(), reproduce.text.Tokenizer(WORDS, 6)
    n = torch.randn(3, 1, 8, 8, generator=seeded(0))
    return sample.draw(flow, started(length=6), words, ["1", "2", "3"], n, flow.grid(2), w, encoders, **batch)


WORDS = reproduce.text.WORDS[:18]


def test_samples_are_guided_and_every_noise_has_its_caption():
    x = {w: drawn(w) for w in (0.0, 1.0, 3.0)}
    assert min((x[a] - x[b]).abs().max() for a, b in ((0.0, 1.0), (1.0, 3.0), (0.0, 3.0))) > 1e-2
    assert torch.allclose(x[0.0], drawn(1.0, (0, 0, 0)), atol=1e-5)
    for size in (1, 2):                                                          # batches take their own captions
        assert torch.allclose(drawn(3.0, batch=size), x[3.0], rtol=1e-3, atol=1e-3)


def test_sample_py_uses_its_shift_its_guidance_and_the_captions_of_test_images(tmp_path, monkeypatch):
    sample, seen = load("lesson_32", "sample"), []
    monkeypatch.setattr(sample, "draw", lambda flow, net, words, texts, n, grid, w, encoders, batch: seen.append(
        (texts, grid.tolist(), w, list(encoders))) or torch.zeros(len(n), 1, 28, 28))
    monkeypatch.setattr(sample, "score", lambda x, digit: {"fid": 0.0})
    monkeypatch.setattr(sample, "report", str)
    monkeypatch.setattr(sample.captions, "follow", lambda x, texts: {})
    sample.main(["device=cpu", "weights=published", "n=100", "steps=3", "shift=3", "official=true", "guidance=2.5",
                 "encoders=[1, 0, 1]", "metrics=true", f"runs={tmp_path}"])
    texts, grid, w, encoders = seen[0]
    assert grid == RectifiedFlow().grid(3, 3.0, official=True).tolist() and (w, encoders) == (2.5, [1, 0, 1])
    test = reproduce.text.captioned("test", limit=100, without_held_out=False).captions
    assert texts == [said[0] for said in test]


# ------------------------------------------------------------------ reproduce.py
def made(arm):
    """Process and network of an arm, as train.py makes them."""
    arm = reproduce.ARMS[arm] if isinstance(reproduce.ARMS[arm], Arm) else Arm(reproduce.ARMS[arm])
    flow = Run(ROOT / "lesson_32" / "train.py", arm.keys).config.flow
    return arm.names.get("RectifiedFlow", RectifiedFlow)(**flow), arm.names.get("MMDiT", MMDiT)


def test_arms_are_what_their_names_say():
    arms = {arm: made(arm) for arm in reproduce.ARMS}
    assert {arm: process.times.density for arm, (process, _) in arms.items()} == {
        "eps-linear": "uniform", "v-cosine": "uniform", "edm": "uniform", "rf-uniform": "uniform",
        "rf-lognormal": "logit-normal", "CrossDiT": "logit-normal", "CrossDiT, as many blocks": "logit-normal"}
    assert [arms[form][0].form for form in BASELINES] == list(BASELINES)
    assert {arm: network for arm, (_, network) in arms.items() if network is not MMDiT} == {
        "CrossDiT": reproduce.CrossDiT, "CrossDiT, as many blocks": reproduce.ShallowCrossDiT}
    assert all(type(process) is RectifiedFlow for arm, (process, _) in arms.items() if arm not in BASELINES)


def test_cross_blocks_look_at_image_and_text_and_leave_the_text_alone():
    torch.manual_seed(0)
    block, x = reproduce.CrossBlock(16, 2), torch.randn(2, 6, 16)
    context, emb = torch.randn(2, 5, 16), torch.randn(2, 2, 16)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    after, same = block(x, context, emb)
    assert same is context
    moved = x.clone()
    moved[:, 0] = torch.randn(16)
    assert (block(moved, context, emb)[0] - after)[:, 1:].abs().amax((0, 2)).min() > 1e-4          # the other tokens
    assert (block(x, torch.randn(2, 5, 16), emb)[0] - after).abs().amax((0, 2)).min() > 1e-4


class Zero(torch.nn.Module):
    """Says 0 and keeps the times it was asked at."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(1)), []

    def forward(self, x, t, c):
        self.seen.append(t[0].item())
        return 0 * x


def test_validation_is_at_evenly_spaced_times():
    net, words = Zero(), reproduce.text.Tokenizer(length=10)
    loss = reproduce.validation(net, words, Section(validation=16, levels=4))
    assert net.seen == [125, 375, 625, 875]
    x0 = reproduce.text.captioned("test", 1, limit=16, without_held_out=False).first(16)[0]
    assert loss.tolist() == pytest.approx([1 + x0.square().mean().item()] * 4, rel=0.05)


def test_fid_is_of_test_captions_without_guidance_from_the_same_noise(monkeypatch):
    seen = []
    monkeypatch.setattr(reproduce, "draw", lambda process, net, words, said, n, grid, w: seen.append((said, n, w)))
    monkeypatch.setattr(reproduce, "fid_to_test", lambda x: 0.0)
    for process in (Baseline("edm"), RectifiedFlow()):
        reproduce.fid(process, None, None, 5, 64)
    (said, n, w), (again, same, other) = seen
    assert said == again and torch.equal(n, same) and (w, other) == (1.0, 1.0) and len(said) == 64


def test_captions_are_asked_for_as_the_criterion_says(monkeypatch):
    monkeypatch.setattr(reproduce, "network", lambda run: (RectifiedFlow(), None, None))
    monkeypatch.setattr(reproduce, "draw", lambda flow, net, words, said, noise, grid, w, encoders: (
        w, encoders, noise[0, 0, 0, 0].item(), len(grid)))
    monkeypatch.setattr(reproduce.text, "follow", lambda how, said: (how, said))
    run = Section(config=Section(reproduce=Section(asked=40), sample=Section(guidance=3.0, steps=25)))
    asked = {captions: reproduce.ask(run, captions, 7) for captions in reproduce.ASKED}
    noise = torch.randn(40, 1, 28, 28, generator=seeded(7))
    for captions, (how, said) in asked.items():
        triples = [reproduce.text.read_caption(one)[0] for one in said]
        assert len(said) == 40 and all(bool(reproduce.text.held_out(
            one["digit"], one["thickness"], one["slant"])) == (captions != "seen") for one in triples)
        assert how[2:] == (noise[0, 0, 0, 0].item(), 26)                         # the same noise for all
    assert {captions: how[:2] for captions, (how, _) in asked.items()} == {
        "held out": (3.0, (1, 1, 1)), "held out, w = 1": (1.0, (1, 1, 1)), "seen": (3.0, (1, 1, 1)),
        "held out, no tokens": (3.0, (1, 1, 0)), "held out, tokens only": (3.0, (0, 0, 1))}


def test_what_is_measured_of_an_arm(monkeypatch, tmp_path):
    for step in (4, 12):
        (tmp_path / f"snapshot_{step:06d}.safetensors").touch()
    cfg = Section(sample_steps=[5, 20, 50], n=8)
    run = Section(config=Section(reproduce=cfg), read=lambda path: Section(path=path))
    weights = Section(path=tmp_path / "weights.safetensors")
    loaded = lambda run, weights, **names: (sorted(names), torch.nn.Linear(2, 2), weights.path.stem)
    monkeypatch.setattr(reproduce, "loaded", loaded)
    monkeypatch.setattr(reproduce, "fid", lambda process, net, words, steps, n: (process, words, steps, n))
    monkeypatch.setattr(reproduce, "validation", lambda net, words, cfg: torch.tensor([1.0, 2.0]))
    row = reproduce.measure(run, weights, "edm", 0)
    assert row == {"parameters": 6, "fid": {str(n): (["RectifiedFlow"], "weights", n, 8) for n in (5, 20, 50)}}
    row = reproduce.measure(run, weights, reproduce.OURS, 0)
    assert row["fid"]["50"] == ([], "weights", 50, 8) and row["validation"] == 1.5
    assert row["snapshot_fid"] == {step: ([], f"snapshot_{int(step):06d}", 20, 8) for step in ("4", "12")}
    assert row["snapshot_validation"] == {"4": 1.5, "12": 1.5}
    assert reproduce.measure(run, weights, reproduce.CROSS, 0) == {"parameters": 6, "validation": 1.5}
