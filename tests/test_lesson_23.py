"""Lesson 23: DiT against closed forms, lessons 09 and 15, and the numbers of diffusers' DiTTransformer2DModel."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from conftest import ROOT, load
from utils import Weights
from utils.config import parse

model, parent, iddpm = load("lesson_23", "model"), load("lesson_15", "model"), load("lesson_09", "model")
DiT, Block, KINDS, guided, given, drop = (
    model.DiT, model.Block, model.KINDS, model.guided, model.given, model.drop)
PROCESS = parse((ROOT / "lesson_23" / "config.yaml").read_text(encoding="utf-8"))["ddpm"]
FIXTURE = Path(__file__).parent / "fixtures" / "lesson_23.json"
SMALL = dict(dim=16, depth=2, heads=2, patch=4)


def DDPM(timesteps=1000, **changes):
    """Lesson 09's process as this lesson configures it."""
    return model.IDDPM(**{**PROCESS, "timesteps": timesteps, **changes})


def times(*values):
    return torch.tensor(values)


def numbers(*shape, seed=0.0):
    """A tensor by formula, the same everywhere, within 1."""
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 0.7 + seed).float().reshape(shape)


def filled(net, size=0.2):
    """The network with weights by formula instead of its start: nothing in it is 0."""
    for i, p in enumerate(net.parameters()):
        p.data = size * numbers(*p.shape, seed=i)
    return net


# ------------------------------------------------------------------ the start: every zero where the paper has it
@pytest.mark.parametrize("kind", KINDS)
def test_output_is_exactly_zero_at_the_start(kind):
    torch.manual_seed(0)
    net, x = DiT(**SMALL, conditioning=kind), torch.randn(3, 1, 28, 28)
    assert torch.equal(net(x, times(0, 500, 999), times(0, 9, 10)), torch.zeros(3, 2, 28, 28))


def test_blocks_of_adaln_zero_are_the_identity_at_the_start_and_the_others_are_not():
    torch.manual_seed(0)
    x, emb = torch.randn(2, 5, 16), torch.randn(2, 2, 16)
    same = {kind: torch.equal(Block(16, 2, kind)(x, emb), x) for kind in KINDS}
    assert same == {"adaln-zero": True, "adaln": False, "cross-attention": False, "in-context": False}


def test_what_starts_at_zero_and_how_the_rest_starts():
    torch.manual_seed(0)
    net = DiT(dim=64, depth=2, heads=4)
    zero = {name for name, p in net.named_parameters() if name.endswith("weight") and (p == 0).all()}
    assert zero == {"blocks.0.adaln.1.weight", "blocks.1.adaln.1.weight", "final.adaln.1.weight",
                    "final.linear.weight"}
    assert all((p == 0).all() for name, p in net.named_parameters() if name.endswith("bias"))
    small = {"time.into.weight", "time.out.weight", "label.table.weight"}                 # not overwritten by Xavier
    for name, p in net.named_parameters():
        if name in small:
            assert p.std().item() == pytest.approx(0.02, rel=0.12), name
        elif name.endswith("weight") and name not in zero:
            bound = math.sqrt(6 / (p.shape[0] + p.shape[1]))                              # Xavier, uniform
            assert 0.9 * bound < p.abs().max() <= bound * (1 + 1e-6) and p.std().item() == pytest.approx(
                bound / math.sqrt(3), rel=0.12), name


def test_a_first_step_leaves_the_start():
    # Zero gates do not stop the learning: the last layer moves first, then the gates, then what is behind them.
    torch.manual_seed(0)
    net, x = DiT(**SMALL), torch.randn(4, 1, 28, 28)
    optimizer, moved = torch.optim.Adam(net.parameters(), 1e-2), []
    for _ in range(3):
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        optimizer.zero_grad()
        (net(x, times(1, 2, 3, 4), times(0, 1, 2, 10)) - 1).square().mean().backward()
        optimizer.step()
        moved.append({name for name, p in net.named_parameters() if not torch.equal(p, before[name])})
    assert moved[0] == {"final.linear.weight", "final.linear.bias"}
    assert {"final.adaln.1.bias", "blocks.0.adaln.1.bias"} <= moved[1] and "blocks.0.mlp.into.weight" not in moved[1]
    assert moved[2] == set(before)


# ------------------------------------------------------------------ tokens
def test_patches_with_the_stem_are_a_convolution_of_that_stride():
    torch.manual_seed(0)
    x, stem = torch.randn(2, 3, 8, 12), load("lesson_23", "earlier").linear(3 * 16, 5)
    conv = F.conv2d(x, stem.weight.view(5, 3, 4, 4), stem.bias, stride=4)
    assert torch.allclose(stem(model.patchify(x, 4)), conv.flatten(2).transpose(1, 2), atol=1e-5)
    with pytest.raises(ValueError, match="patch=5"):
        model.patchify(x, 5)


def test_unpatchify_is_the_einsum_of_the_paper_and_the_inverse_of_patchify():
    y = torch.randn(2, 2 * 3, 4 * 4 * 6)               # 2 rows, 3 columns, 6 channels
    ours = model.unpatchify(y, 4, 2)
    theirs = torch.einsum("nhwpqc->nchpwq", y.reshape(2, 2, 3, 4, 4, 6)).reshape(2, 6, 8, 12)
    assert torch.equal(ours, theirs)
    x = torch.randn(2, 1, 8, 12)                       # one channel: the two orders are the same
    assert torch.equal(model.unpatchify(model.patchify(x, 4), 4, 2), x)


def test_positions_of_a_grid_that_is_not_square():
    # (h, w) = (2, 3): the tokens run along the rows; the first half of the channels tells the column.
    table = model.sincos_2d(8, 2, 3)
    assert table.shape == (6, 8) and table.dtype == torch.float64
    for n in range(6):
        row, column = divmod(n, 3)
        half = [[f(place * w) for f in (math.sin, math.cos) for w in (1, 0.01)] for place in (column, row)]
        assert table[n].tolist() == pytest.approx(half[0] + half[1], abs=1e-12)
    assert torch.equal(table.view(2, 3, 8)[0, :, :4], table.view(2, 3, 8)[1, :, :4])      # rows agree on columns
    assert len({tuple(row) for row in table.tolist()}) == 6
    assert not torch.equal(model.sincos_2d(8, 2, 3), model.sincos_2d(8, 3, 2))


def test_positions_are_fixed():
    assert not any("pos" in name for name in DiT(**SMALL).state_dict()) and model.sincos_2d(16, 7, 7).grad_fn is None


def test_network_takes_an_image_that_is_not_square(monkeypatch):
    # Turning the image over, and with it what the table says of rows and columns, turns the output over.
    torch.manual_seed(0)
    net, x = filled(DiT(**{**SMALL, "patch": 1})).eval(), torch.randn(2, 1, 4, 6)
    y = net(x, times(3, 700), times(1, 10))
    table = model.sincos_on
    asked = []
    monkeypatch.setattr(model, "sincos_on", lambda *kind: asked.append(kind[3:]) or table(*kind).roll(kind[2] // 2, 1))
    tall = net(x.transpose(2, 3), times(3, 700), times(1, 10))
    assert y.shape == (2, 2, 4, 6) and asked == [(6, 4)] and torch.allclose(tall.transpose(2, 3), y, atol=1e-4)
    assert not torch.allclose(net(x.flip(3), times(3, 700), times(1, 10)).flip(3), y, atol=1e-3)   # places matter


def test_times_are_told_apart():
    emb = model.time_embedding(torch.tensor(DDPM().times(50)), 256)
    assert emb.diff(dim=0).norm(dim=1).min() > 0.1
    i = torch.arange(128, dtype=torch.float64)
    angle = 37 * torch.exp(-math.log(10000) * i / 128)                                    # cosines first, over half
    assert torch.allclose(model.time_embedding(times(37), 256)[0].double(), torch.cat([angle.cos(), angle.sin()]),
                          atol=2e-5)


# ------------------------------------------------------------------ the blocks
def test_adaln_order_is_shift_scale_gate():
    torch.manual_seed(0)
    block, x, emb = filled(Block(16, 2)), torch.randn(2, 5, 16), torch.randn(2, 2, 16)
    shift1, scale1, gate1, shift2, scale2, gate2 = block.adaln[1](F.silu(emb[:, 0] + emb[:, 1])).chunk(6, dim=1)
    plain = lambda a: (a - a.mean(2, keepdim=True)) / (a.var(2, correction=0, keepdim=True) + 1e-6).sqrt()  # noqa: E731
    y = x + gate1[:, None] * block.attention(plain(x) * (1 + scale1[:, None]) + shift1[:, None])
    y = y + gate2[:, None] * block.mlp(plain(y) * (1 + scale2[:, None]) + shift2[:, None])
    assert torch.allclose(block(x, emb), y, atol=1e-5)


def test_attention_equals_torchs():
    torch.manual_seed(0)
    ours, x, source = model.Attention(16, 4), torch.randn(2, 7, 16), torch.randn(2, 3, 16)
    theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.load_state_dict({"in_proj_weight": ours.qkv.weight, "in_proj_bias": ours.qkv.bias,
                            "out_proj.weight": ours.out.weight, "out_proj.bias": ours.out.bias})
    for s in (None, source):
        expected, maps = theirs(x, x if s is None else s, x if s is None else s, average_attn_weights=False)
        assert torch.allclose(ours(x, s), expected, atol=1e-5)
        assert torch.allclose(ours.weights(x, s)[0], maps, atol=1e-6)
    assert torch.allclose(ours(x, x), ours(x), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_time_and_class_reach_every_pixel_and_the_null_class_is_learned(kind):
    torch.manual_seed(0)
    net, x = filled(DiT(**SMALL, conditioning=kind)).eval(), torch.randn(1, 1, 28, 28).expand(4, -1, -1, -1)
    y = net(x, times(3, 3, 3, 800), times(0, 1, 10, 0))
    for i, j in ((0, 1), (0, 2), (1, 2), (0, 3)):
        assert ((y[i] - y[j]).abs() > 1e-6).float().mean() > 0.9, (i, j)
    y.square().mean().backward()
    moved = net.label.table.weight.grad.abs().sum(1) > 0
    assert moved.tolist() == [True, True] + [False] * 8 + [True]                          # the last row is "no class"
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_kinds_differ_in_their_parameters_as_they_should():
    d, count = 16, {}
    for kind in KINDS:
        count[kind] = sum(p.numel() for p in Block(d, 2, kind).parameters())
    plain = 12 * d * d + 9 * d                                                            # attention 4, MLP 8, biases
    assert count == {"adaln-zero": plain + 6 * d * d + 6 * d, "adaln": plain + 4 * d * d + 4 * d,
                     "cross-attention": plain + 4 * d + 4 * d * d + 4 * d + 2 * d, "in-context": plain + 4 * d}


@pytest.mark.parametrize("name, dim, depth, heads, millions", [
    ("S", 384, 12, 6, 33), ("B", 768, 12, 12, 130), ("L", 1024, 24, 16, 458), ("XL", 1152, 28, 16, 675)])
def test_parameters_of_the_papers_sizes(name, dim, depth, heads, millions):
    # With 4 latent channels, patch 2, 1000 classes: Table 1 is reported to say 33, 130, 458 and 675 million.
    with torch.device("meta"):
        net = DiT(dim, depth, heads, patch=2, classes=1000, image_channels=4)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.6)


def test_parameters_by_formula():
    for dim, depth, patch in ((16, 2, 4), (32, 3, 7)):
        net = DiT(dim, depth, 2, patch)
        block = 18 * dim ** 2 + 15 * dim
        rest = (patch ** 2 + 1) * dim + 257 * dim + dim ** 2 + dim + 11 * dim + 2 * dim ** 2 + 2 * dim
        assert sum(p.numel() for p in net.parameters()) == depth * block + rest + (dim + 1) * 2 * patch ** 2


@pytest.mark.parametrize("values, word", [(dict(conditioning="film"), "film"), (dict(dim=18, heads=2), "dim=18"),
                                          (dict(dim=16, heads=3), "heads=3")])
def test_network_refuses_what_it_cannot_do(values, word):
    with pytest.raises(ValueError, match=word):
        DiT(**{**SMALL, **values})


# ------------------------------------------------------------------ the process
def test_log_snr_at_three_times():
    # The convention box: x_t = alpha x_0 + sigma eps, read off from q_sample; linear betas from 1e-4 to 0.02.
    ddpm, one, zero = DDPM(), torch.ones(3, 1, 1, 1), torch.zeros(3, 1, 1, 1)
    t = times(100, 500, 900)
    alpha, sigma = ddpm.q_sample(one, t, zero).flatten(), ddpm.q_sample(zero, t, one).flatten()
    expected = []
    for i in t.tolist():
        abar = math.exp(sum(math.log1p(-(1e-4 + (0.02 - 1e-4) * j / 999)) for j in range(i + 1)))
        expected.append(math.log(abar / (1 - abar)))
    assert (2 * (alpha.log() - sigma.log())).tolist() == pytest.approx(expected, abs=1e-4)
    assert torch.allclose(alpha ** 2 + sigma ** 2, torch.ones(3), atol=1e-6)


def test_process_is_lesson_09s_with_linear_betas():
    # Sec. 3.1 of DiT: ADM's process. The published weights say so as well.
    ours, theirs = DDPM(), iddpm.IDDPM(schedule="linear")
    assert (ours.objective, ours.variance, ours.lam) == ("hybrid", "learned", 1e-3)
    assert torch.equal(ours.abar, theirs.abar)
    published = Weights(ROOT / "lesson_23" / "results" / "weights.safetensors", "lesson_23")
    assert torch.equal(model.IDDPM(**published.config["ddpm"]).abar, theirs.abar)
    seen = []
    ours.predict(lambda x, t: seen.append(t) or torch.cat([x, x], 1), torch.zeros(3, 1, 2, 2), times(0, 7, 999))
    assert seen[0].tolist() == [0, 7, 999]                                                # with T = 1000, t as it is


def test_loss_terms_on_fixed_inputs():
    # With v = 1 the variance is beta, with v = 0 it is beta-tilde; the error of the mean is that of the noise, scaled.
    ddpm, t = DDPM(), times(300)
    beta, tilde, abar = ddpm.beta(t, t - 1).item(), ddpm.beta_tilde(t, t - 1).item(), ddpm.abar[300].item()
    x0, eps, guess = numbers(1, 1, 4, 4), numbers(1, 1, 4, 4, seed=1.0), numbers(1, 1, 4, 4, seed=2.0)
    xt = ddpm.q_sample(x0, t, eps)
    for v, variance in ((1.0, beta), (0.0, tilde)):
        output = torch.cat([guess, torch.full_like(guess, 2 * v - 1)], dim=1)
        mean, log_variance, _ = ddpm.p_mean_variance(lambda x, t, y=output: y, xt, t, t - 1, clip=False)
        assert log_variance.exp().mean().item() == pytest.approx(variance, rel=1e-4)
        error = beta ** 2 / ((1 - beta) * (1 - abar)) * F.mse_loss(guess, eps).item()
        expected = 0.5 * (math.log(variance / tilde) - 1 + (tilde + error) / variance) / math.log(2)
        assert ddpm.bound_term(x0, xt, t, mean, log_variance).item() == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_bound_teaches_the_variance_alone():
    torch.manual_seed(0)
    x0, grads = torch.rand(64, 1, 4, 4) * 2 - 1, {}
    for lam in (0.0, 1e-3):
        output = torch.zeros(64, 2, 4, 4, requires_grad=True)
        torch.manual_seed(1)
        DDPM(lam=lam).loss(lambda x, t, y=output: y, x0).backward()
        grads[lam] = output.grad
    assert torch.equal(grads[0.0][:, :1], grads[1e-3][:, :1]) and (grads[0.0][:, 1:] == 0).all()
    assert (grads[1e-3][:, 1:] != 0).all()


def test_at_the_start_the_variance_is_half_way():
    ddpm, t, s = DDPM(), times(500), times(480)
    _, log_variance, _ = ddpm.p_mean_variance(lambda x, t: torch.zeros(1, 2, 2, 2), torch.ones(1, 1, 2, 2), t, s)
    expected = 0.5 * (ddpm.beta(t, s).log() + ddpm.beta_tilde(t, s).log()).item()
    assert log_variance.flatten().tolist() == pytest.approx([expected] * 4, rel=1e-5)


def test_times():
    assert DDPM().times() == list(range(999, -1, -1)) and DDPM().times(50) == iddpm.IDDPM().times(50)
    assert DDPM(21).times(5) == [20, 15, 10, 5, 0]
    for steps in (0, 1, 1001):
        with pytest.raises(ValueError, match="steps"):
            DDPM().times(steps)
    with pytest.raises(ValueError, match="timesteps"):
        DDPM(1)


def test_sampler_on_gaussian_data():
    # With the exact network for N(m, std^2) every step is linear, x_s = k x_t + ... + sigma z: follow the variance.
    torch.manual_seed(0)
    ddpm, m, std = DDPM(200), 0.2, 0.3

    def exact(x, t):
        abar = ddpm.abar[(t / 5).round().long()].float()[:, None, None, None]             # it is told 1000 t / T
        eps = (1 - abar).sqrt() * (x - abar.sqrt() * m) / (abar * std ** 2 + 1 - abar)
        return torch.cat([eps, torch.zeros_like(eps)], dim=1)                             # v = 1/2

    for steps in (200, 20):
        ts, expected = ddpm.times(steps), 1.0
        for t, s in zip(ts, [*ts[1:], -1]):
            one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)                   # mu-tilde = a x_0 + b x_t
            a, b = (ddpm.q_posterior(x0, xt, times(t), times(s)).item() for x0, xt in ((one, zero), (zero, one)))
            abar = ddpm.abar[t].item()
            k = a * math.sqrt(abar) * std ** 2 / (abar * std ** 2 + 1 - abar) + b
            variance = (ddpm.beta(times(t), times(s)) * ddpm.beta_tilde(times(t), times(s))).sqrt().item()
            expected = k ** 2 * expected + (variance if s >= 0 else 0)
        x = ddpm.sample(exact, 10_000, steps, shape=(1, 1, 1), clip=False)
        assert x.mean().item() == pytest.approx(m, abs=0.015)
        assert x.std().item() == pytest.approx(math.sqrt(expected), rel=0.025)
        assert math.sqrt(expected) == pytest.approx(std, rel=0.15)


def test_last_step_adds_no_noise_and_seeds_decide():
    ddpm, x = DDPM(20), torch.randn(2, 1, 2, 2)
    net = lambda x, t: torch.cat([0.9 * x, torch.ones_like(x)], dim=1)  # noqa: E731
    paths = [list(ddpm.reverse(net, x, 5, True, torch.Generator().manual_seed(s))) for s in (0, 0, 1)]
    assert torch.equal(paths[0][-1][1], paths[0][-1][2])
    assert torch.equal(paths[0][-1][1], paths[1][-1][1]) and not torch.equal(paths[0][0][1], paths[2][0][1])


def test_two_evaluations_agree():
    net, x = filled(DiT(**SMALL)).eval(), numbers(2, 1, 28, 28)
    assert torch.equal(net(x, times(1, 2), times(1, 10)), net(x, times(1, 2), times(1, 10)))


# ------------------------------------------------------------------ classes and guidance
def test_labels_are_dropped_one_by_one():
    torch.manual_seed(0)
    c = torch.arange(10).repeat(2000)
    dropped = drop(c, torch.full_like(c, 10), 0.1)
    rate = float((dropped == 10).float().mean())
    assert abs(rate - 0.1) < 4 * math.sqrt(0.09 / len(c)) and torch.equal(dropped[dropped != 10], c[dropped != 10])
    batches = (dropped.view(-1, 50) == 10).float().mean(1)
    assert 0.8 < float(batches.var() / (0.09 / 50)) < 1.2


@pytest.mark.parametrize("channels", [1, 4])
def test_guidance_moves_all_channels_of_the_noise_and_no_variance(channels):
    torch.manual_seed(0)
    net = filled(DiT(**SMALL, image_channels=channels)).eval()
    x, t, c, null = torch.randn(2, channels, 28, 28), times(5, 700), times(3, 4), times(10, 10)
    with_c, without = net(x, t, c), net(x, t, null)
    assert torch.equal(guided(net, c, null, 1)(x, t), with_c) and torch.equal(guided(net, c, null, 0)(x, t), without)
    y = guided(net, c, null, 3.0)(x, t)
    expected = without[:, :channels] + 3 * (with_c - without)[:, :channels]
    assert torch.allclose(y[:, :channels], expected, atol=1e-5)
    assert torch.allclose(y[:, channels:], with_c[:, channels:], atol=1e-6)
    assert all((y[:, i] - with_c[:, i]).abs().max() > 1e-4 for i in range(channels))      # the last channel as well


def test_two_images_can_be_learned_by_their_class():
    # The least error is 0, and only the class tells which of the two images is behind the noise for sure.
    torch.manual_seed(0)
    net, ddpm = DiT(dim=32, depth=2, heads=2, patch=4), DDPM()
    x0 = torch.stack([numbers(1, 8, 8), numbers(1, 8, 8, seed=2.0)]).repeat(16, 1, 1, 1)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2, betas=(0.9, 0.99))
    c, t, g = times(0, 1).repeat(16), torch.full((32,), 400), torch.Generator().manual_seed(0)
    for _ in range(300):
        eps = torch.randn(32, 1, 8, 8, generator=g)
        xt = ddpm.q_sample(x0, t, eps)
        loss = F.mse_loss(net(xt, t, c)[:, :1], eps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02 and F.mse_loss(net(xt, t, 1 - c)[:, :1], eps) > 10 * loss


# ------------------------------------------------------------------ diffusers
def port(net, dit):
    """Our weights under the names of DiTTransformer2DModel: every parameter of both, none left over.

    diffusers keeps an embedder of time and class in every block and uses the first one's for the final layer: they are
    duplicated. Its blocks and its final layer chunk shift, scale (, gate), as ours do.
    """
    own, state, d = dict(net.state_dict()), {}, net.stem.out_features
    for i in range(len(net.blocks)):
        at, to = f"blocks.{i}.", f"transformer_blocks.{i}."
        for part in ("weight", "bias"):
            for name, rows in zip("qkv", own.pop(f"{at}attention.qkv.{part}").split(d)):
                state[f"{to}attn1.to_{name}.{part}"] = rows
            for ours, theirs in (("attention.out", "attn1.to_out.0"), ("mlp.into", "ff.net.0.proj"),
                                 ("mlp.out", "ff.net.2"), ("adaln.1", "norm1.linear")):
                state[f"{to}{theirs}.{part}"] = own.pop(f"{at}{ours}.{part}")
            for ours, theirs in (("into", "linear_1"), ("out", "linear_2")):
                state[f"{to}norm1.emb.timestep_embedder.{theirs}.{part}"] = own[f"time.{ours}.{part}"]
        state[f"{to}norm1.emb.class_embedder.embedding_table.weight"] = own["label.table.weight"]
    for part in ("weight", "bias"):
        for ours, theirs in (("stem", "pos_embed.proj"), ("final.adaln.1", "proj_out_1"),
                             ("final.linear", "proj_out_2")):
            state[f"{theirs}.{part}"] = own.pop(f"{ours}.{part}")
        own.pop(f"time.into.{part}"), own.pop(f"time.out.{part}")
    own.pop("label.table.weight")
    state["pos_embed.proj.weight"] = state["pos_embed.proj.weight"].view(d, -1, net.patch, net.patch)
    assert not own
    dit.load_state_dict(state)                         # strict: all of theirs are there as well


SHAPE = dict(dim=8, depth=2, heads=2, patch=2, classes=5, image_channels=3)
LABELS, TIMES = times(2, 5), times(17, 900)


def twin():
    """The network with weights by formula and a square input."""
    return filled(DiT(**SHAPE), 0.25).eval(), numbers(2, 3, 4, 4, seed=3.0)


@torch.no_grad()
def blocks_of(net, tokens):
    """What comes out of each block for 2 x 3 tokens: an input that is not square."""
    emb, found = torch.stack([net.time(TIMES), net.label(LABELS)], dim=1), []
    for block in net.blocks:
        tokens = block(tokens, emb)
        found.append(tokens)
    return found


def test_equal_to_the_fixture_of_diffusers():
    kept, (net, x) = json.loads(FIXTURE.read_text()), twin()
    with torch.no_grad():
        y = net(x, TIMES, LABELS)
    assert y.flatten().tolist() == pytest.approx(kept["output"], rel=1e-5, abs=1e-5)
    tokens = net.stem(model.patchify(numbers(2, 3, 4, 6, seed=4.0), 2)) + model.sincos_2d(8, 2, 3).float()
    for ours, theirs in zip(blocks_of(net, tokens), kept["blocks"], strict=True):
        assert ours.flatten().tolist() == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    assert model.sincos_2d(8, 2, 2).flatten().tolist() == pytest.approx(kept["positions"], abs=1e-6)


def test_fixture_is_what_diffusers_gives():
    diffusers = pytest.importorskip("diffusers", reason="dev reference: pip install -e '.[reference]'")
    made, kept = make_fixture(diffusers), json.loads(FIXTURE.read_text())
    for key in ("output", "positions"):
        assert made[key] == pytest.approx(kept[key], rel=1e-5, abs=1e-5)
    for one, other in zip(made["blocks"], kept["blocks"], strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-5)


@torch.no_grad()
def make_fixture(diffusers):
    """Outputs of diffusers' network with our weights. `python tests/test_lesson_23.py` writes the fixture."""
    from diffusers.models.embeddings import Timesteps

    net, x = twin()
    dit = diffusers.DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=4, in_channels=3, out_channels=6,
                                          num_layers=2, sample_size=4, patch_size=2, num_embeds_ada_norm=5,
                                          norm_eps=1e-6).eval()
    for block in dit.transformer_blocks:               # its frequencies end at 1/10000: i / (half - 1), not i / half
        block.norm1.emb.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    port(net, dit)
    tokens = dit.pos_embed.proj(numbers(2, 3, 4, 6, seed=4.0)).flatten(2).transpose(1, 2)  # its table is square only
    tokens, rows = tokens + model.sincos_2d(8, 2, 3).float(), []
    for block in dit.transformer_blocks:
        tokens = block(tokens, timestep=TIMES, class_labels=LABELS)
        rows.append(tokens.flatten().tolist())
    return {"diffusers": diffusers.__version__, "output": dit(x, TIMES, LABELS).sample.flatten().tolist(),
            "blocks": rows, "positions": dit.pos_embed.pos_embed.flatten().tolist()}


if __name__ == "__main__":
    import diffusers

    FIXTURE.write_text(json.dumps(make_fixture(diffusers), indent=0) + "\n")


def test_samples_and_their_animation_are_guided(tmp_path, monkeypatch):
    sample, asked = load("lesson_23", "sample"), []
    guide = sample.guided
    monkeypatch.setattr(sample, "guided", lambda net, c, null, w: (
        asked.append((c.tolist(), null.tolist(), w)) or guide(net, c, null, w)))
    sample.main(["device=cpu", "threads=1", "weights=published", "n=3", "steps=2", "guidance=2.5", "labels=3,1",
                 "gif=way.gif", f"runs={tmp_path}"])
    assert asked == [([3, 1, 3], [10, 10, 10], 2.5)] * 2


def test_training_drops_labels_to_the_null_class(tmp_path, monkeypatch):
    train, asked = load("lesson_23", "train"), []
    monkeypatch.setattr(train, "drop", lambda c, null, p: asked.append((null.tolist(), p)) or drop(c, null, p))
    train.main(["smoke=true", "gpu=false", "device=cpu", "threads=1", "preview_every=0", "drop=0.3",
                f"runs={tmp_path}"])
    assert asked == [([10] * 8, 0.3)] * 6


def test_gates_are_the_third_and_the_sixth():
    block_names, net = ("gate_attention_0", "gate_mlp_0"), filled(DiT(**SMALL))
    with torch.no_grad():
        net.blocks[0].adaln[1].weight.zero_()
        net.blocks[0].adaln[1].bias.copy_(torch.tensor([1.0, 2, -3, 4, 5, -6]).repeat_interleave(16))
    found = load("lesson_23", "train").gates(net)
    assert [found[name].item() for name in block_names] == pytest.approx([3, 6])
