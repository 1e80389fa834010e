"""Lesson 05d: LDM's spatial transformer against its formula, its start as the identity, and diffusers' block."""

import json
import math
from pathlib import Path
from types import SimpleNamespace as Space

import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT, load
from utils import UserError, Weights
from utils.config import parse

LESSON = "lesson_05/sublesson_d"
model, earlier, reproduce = load(LESSON, "model"), load(LESSON, "earlier"), load(LESSON, "reproduce")
parent, origin = load("lesson_05/sublesson_c", "model"), load("lesson_05", "model")
UNet, SpatialTransformer = model.UNet, model.SpatialTransformer
FIXTURE = Path(__file__).parent / "fixtures" / "ldm_transformer.json"
SMALL = dict(channels=8, mults=(1, 2), blocks=1, attention=(7,), dropout=0.0, groups=4, patch=2, context=6, heads=2,
             head_dim=4)


def times(*values):
    return torch.tensor(values)


def randomised(net):
    """The network with all weights away from zero."""
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net


def transformers(net):
    return [m for m in net.modules() if isinstance(m, SpatialTransformer)]


# ------------------------------------------------------------------ the start
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_block_is_the_identity_at_the_start(dropout):
    block = SpatialTransformer(8, 6, heads=2, head_dim=5, depth=2, dropout=dropout, groups=4)
    x = torch.randn(2, 8, 3, 5)
    assert (block(x, torch.randn(2, 4, 6)) - x).abs().max() == 0
    assert [name for name, p in block.named_parameters() if (p == 0).all() and "weight" in name] == ["leave.weight"]


def test_network_at_the_start_does_not_know_its_class():
    net, x, t = UNet(**SMALL), torch.randn(2, 1, 28, 28), times(3, 900)
    assert (net(x, t, times(0, 10)) == 0).all()                                 # the last convolution starts at 0
    torch.nn.init.normal_(net.out[2].weight)
    assert torch.equal(net(x, t, times(0, 10)), net(x, t, times(4, 5)))         # and so do the transformers'
    for block in transformers(net):
        torch.nn.init.normal_(block.leave.weight)
    assert not torch.allclose(net(x, t, times(0, 10)), net(x, t, times(4, 5)), atol=1e-4)


# ------------------------------------------------------------------ the formula
def by_hand(block, x, context):
    """The card's equations, head by head, without the layers' own code."""
    w = dict(block.named_parameters())
    h = F.group_norm(x, block.norm.num_groups, w["norm.weight"], w["norm.bias"], 1e-6)
    h = torch.einsum("oc,bchw->bhwo", w["enter.weight"][:, :, 0, 0], h) + w["enter.bias"]
    h = h.flatten(1, 2)                                                         # position h W + w, channels last

    def attention(i, which, q_in, kv_in, heads=2):
        name = f"blocks.{i}.{which}"
        q, k, v = q_in @ w[f"{name}.q.weight"].T, kv_in @ w[f"{name}.k.weight"].T, kv_in @ w[f"{name}.v.weight"].T
        d = q.shape[2] // heads
        out = []
        for j in range(heads):
            part = slice(j * d, (j + 1) * d)
            scores = torch.einsum("bnd,bmd->bnm", q[..., part], k[..., part]) * d ** -0.5
            out.append(scores.softmax(2) @ v[..., part])
        return torch.cat(out, 2) @ w[f"{name}.out.weight"].T + w[f"{name}.out.bias"]

    def layer_norm(i, j, h):                                                    # over the channels of each position
        mean, variance = h.mean(2, keepdim=True), h.var(2, unbiased=False, keepdim=True)
        name = f"blocks.{i}.norm{j}"
        return (h - mean) / (variance + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    for i in range(len(block.blocks)):
        n = layer_norm(i, 1, h)
        h = h + attention(i, "attn1", n, n)
        h = h + attention(i, "attn2", layer_norm(i, 2, h), context)
        ab = layer_norm(i, 3, h) @ w[f"blocks.{i}.ff.enter.weight"].T + w[f"blocks.{i}.ff.enter.bias"]
        a, b = ab[..., :ab.shape[2] // 2], ab[..., ab.shape[2] // 2:]
        gelu = 0.5 * b * (1 + torch.erf(b / math.sqrt(2)))
        h = h + (a * gelu) @ w[f"blocks.{i}.ff.leave.weight"].T + w[f"blocks.{i}.ff.leave.bias"]
    h = h.reshape(len(x), *x.shape[2:], -1)
    return x + torch.einsum("oc,bhwc->bohw", w["leave.weight"][:, :, 0, 0], h) + w["leave.bias"][:, None, None]


def test_block_equals_its_formula():
    torch.manual_seed(0)
    block = randomised(SpatialTransformer(8, 6, heads=2, head_dim=5, depth=2, groups=4)).double()
    x, context = torch.randn(2, 8, 3, 5).double(), torch.randn(2, 4, 6).double()
    assert torch.allclose(block(x, context), by_hand(block, x, context), rtol=1e-10, atol=1e-10)


def test_epsilons_biases_and_widths():
    block = SpatialTransformer(8, 6, heads=2, head_dim=5, groups=4)
    inner = block.blocks[0]
    assert block.norm.eps == 1e-6 and all(n.eps == 1e-5 for n in (inner.norm1, inner.norm2, inner.norm3))
    biases = {name for name, _ in inner.named_parameters() if name.endswith("bias") and "norm" not in name}
    assert biases == {"attn1.out.bias", "attn2.out.bias", "ff.enter.bias", "ff.leave.bias"}
    assert inner.ff.enter.weight.shape == (2 * 4 * 10, 10) and inner.ff.leave.weight.shape == (10, 4 * 10)
    assert inner.attn1.k.weight.shape == (10, 10) and inner.attn2.k.weight.shape == (10, 6)


def test_geglu_is_gated():
    ff = model.FeedForward(3, mult=2)
    torch.nn.init.zeros_(ff.enter.weight)
    with torch.no_grad():                                                       # a = 2, b = 1: the gate passes gelu(1)
        ff.enter.bias.copy_(torch.cat([2 * torch.ones(6), torch.ones(6)]))
    gate = 0.5 * (1 + math.erf(1 / math.sqrt(2)))
    expected = F.linear(torch.full((1, 1, 6), 2 * gate), ff.leave.weight, ff.leave.bias)
    assert torch.allclose(ff(torch.randn(1, 1, 3)), expected, atol=1e-6)


def test_positions_have_no_order():
    # Attention and the layers after it know no position: shuffle the positions, and the output is shuffled alike.
    torch.manual_seed(0)
    block = randomised(SpatialTransformer(8, 6, heads=2, head_dim=4, groups=4))
    x, context, order = torch.randn(2, 8, 3, 5), torch.randn(2, 4, 6), torch.randperm(15)
    y = block(x, context).flatten(2)[:, :, order]
    shuffled = block(x.flatten(2)[:, :, order].view_as(x), context).flatten(2)
    assert torch.allclose(y, shuffled, atol=1e-4)


def test_positions_talk_to_each_other_and_to_the_context():
    torch.manual_seed(0)
    block = randomised(SpatialTransformer(8, 6, heads=2, head_dim=4, groups=4))
    x, context = torch.randn(1, 8, 3, 3), torch.randn(1, 4, 6)
    assert not torch.allclose(block(x, context), block(x, torch.randn(1, 4, 6)), atol=1e-3)
    silent = randomised(SpatialTransformer(8, 6, heads=2, head_dim=4, groups=4))
    torch.nn.init.zeros_(silent.blocks[0].attn1.out.weight)                     # without self-attention ...
    inner, other = silent.blocks[0], torch.randn(1, 9, 8)
    changed = other.clone()
    changed[0, 0, 0] += 3                                                       # LayerNorm would undo a common shift
    assert torch.allclose(inner(other, context)[0, 1:], inner(changed, context)[0, 1:], atol=1e-6)  # ... alone
    torch.nn.init.normal_(inner.attn1.out.weight)
    assert not torch.allclose(inner(other, context)[0, 1:], inner(changed, context)[0, 1:], atol=1e-4)


def test_dropout_comes_after_the_projections():
    torch.manual_seed(0)
    block, x, context = model.TransformerBlock(8, 6, 2, 4, dropout=0.5), torch.randn(2, 5, 8), torch.randn(2, 4, 6)
    h = block.norm1(x)
    torch.manual_seed(1)
    got = block(x, context)
    torch.manual_seed(1)
    y = x + F.dropout(block.attn1(h, h), 0.5)
    y = y + F.dropout(block.attn2(block.norm2(y), context), 0.5)
    a, b = block.ff.enter(block.norm3(y)).chunk(2, dim=2)
    y = y + block.ff.leave(F.dropout(a * F.gelu(b), 0.5))
    assert torch.allclose(got, y, atol=1e-6)
    assert torch.equal(block.eval()(x, context), block(x, context)) and not torch.allclose(block(x, context), got)


# ------------------------------------------------------------------ diffusers
def twin():
    """A spatial transformer with weights by formula, inputs and output: Transformer2DModel must give it too."""
    block = SpatialTransformer(8, 6, heads=2, head_dim=5, depth=2, groups=4).eval()
    for i, p in enumerate(block.parameters()):
        wave = 0.5 * torch.sin(torch.arange(p.numel()) * (0.7 + 0.013 * i) + i)
        p.data = wave.reshape(p.shape) + 0.5 * (p.dim() == 1)
    x, context = torch.cos(torch.arange(240.0)).reshape(2, 8, 3, 5), torch.sin(torch.arange(48.0)).reshape(2, 4, 6)
    with torch.no_grad():
        return block, x, context, block(x, context)


def test_block_equals_the_fixture_of_diffusers():
    _, x, _, y = twin()
    expected = torch.tensor(json.loads(FIXTURE.read_text())["output"])
    assert (expected - x.flatten()).std() > 0.1                                 # the block does something
    assert torch.allclose(y.flatten(), expected, rtol=1e-5, atol=1e-5)


def test_fixture_is_what_diffusers_gives():
    diffusers = pytest.importorskip("diffusers", reason="dev reference: pip install -e '.[reference]'")
    expected = torch.tensor(json.loads(FIXTURE.read_text())["output"])
    assert torch.allclose(torch.tensor(make_fixture(diffusers)["output"]), expected, rtol=1e-5, atol=1e-5)


def make_fixture(diffusers):
    """The output of diffusers' Transformer2DModel with the weights of `twin`; running this file writes the fixture."""
    block, x, context, _ = twin()
    theirs = diffusers.Transformer2DModel(
        num_attention_heads=2, attention_head_dim=5, in_channels=8, num_layers=2, norm_num_groups=4,
        cross_attention_dim=6, norm_type="layer_norm").eval()
    pairs = [(block.norm, theirs.norm), (block.enter, theirs.proj_in), (block.leave, theirs.proj_out)]
    for mine, other in zip(block.blocks, theirs.transformer_blocks):
        pairs += [(mine.norm1, other.norm1), (mine.norm2, other.norm2), (mine.norm3, other.norm3),
                  (mine.ff.enter, other.ff.net[0].proj), (mine.ff.leave, other.ff.net[2])]
        for a, b in ((mine.attn1, other.attn1), (mine.attn2, other.attn2)):
            pairs += [(a.q, b.to_q), (a.k, b.to_k), (a.v, b.to_v), (a.out, b.to_out[0])]
    for mine, other in pairs:
        other.load_state_dict(mine.state_dict())
    ported = sum(p.numel() for mine, _ in pairs for p in mine.parameters())     # every parameter, none left over
    assert ported == sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in block.parameters())
    with torch.no_grad():
        y = theirs(x, encoder_hidden_states=context).sample
    return {"diffusers": diffusers.__version__, "output": y.flatten().tolist()}


# ------------------------------------------------------------------ network
def test_the_other_arm_is_lesson_05cs_network():
    shape = {key: value for key, value in SMALL.items() if key != "head_dim"}
    torch.manual_seed(0)
    theirs = randomised(parent.UNet(**shape)).eval()
    ours = reproduce.CrossUNet(**SMALL).eval()
    ours.load_state_dict(theirs.state_dict())                                   # the same names, every one
    x, t, c = torch.randn(2, 1, 28, 28), times(3, 900), times(3, 10)
    assert torch.equal(ours(x, t, c), theirs(x, t, c))
    assert not transformers(ours)


@pytest.mark.parametrize("patch, attention, count", [(1, (14, 7), 7), (2, (14, 7), 7), (2, (7,), 4), (2, (), 1)])
def test_shapes_and_places(patch, attention, count):
    shape = SMALL | {"patch": patch, "attention": attention, "mults": (1, 2, 2) if patch == 1 else (1, 2)}
    net, x = UNet(**shape), torch.randn(2, 1, 28, 28)
    assert net(x, times(3, 900), times(0, 10)).shape == x.shape
    assert len(transformers(net)) == count                                      # down, middle, twice up a level
    assert not any(isinstance(m, (earlier.Attention, earlier.CrossBlock)) for m in net.modules())


def test_class_and_time_reach_the_output():
    net = randomised(UNet(**SMALL)).eval()
    x, t = torch.randn(1, 1, 28, 28), times(5)
    with torch.no_grad():
        outputs = [net(x, t, times(c)) for c in range(11)]
        assert not torch.allclose(net(x, times(6), times(0)), outputs[0], atol=1e-4)
    assert all(not torch.allclose(outputs[i], outputs[j], atol=1e-4) for i in range(11) for j in range(i))


def test_one_token_is_a_trap_here_too():
    # Self-attention still learns; the queries and keys of the cross-attention cannot.
    torch.manual_seed(0)
    net = randomised(UNet(**SMALL, tokens=1))
    model.DDPM(20).loss(model.given(net, times(3, 7, 10)), torch.randn(3, 1, 28, 28)).backward()
    for block in transformers(net):
        for layer in block.blocks:
            assert (layer.attn2.q.weight.grad == 0).all() and (layer.attn2.k.weight.grad == 0).all()
            assert (layer.attn1.q.weight.grad != 0).any() and (layer.attn2.v.weight.grad != 0).any()


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="image_size=30"):
        UNet(**SMALL | dict(image_size=30))
    with pytest.raises(ValueError, match="heads=3"):
        reproduce.CrossUNet(**SMALL | dict(heads=3))


def test_training_moves_every_part_of_the_block():
    torch.manual_seed(0)
    net, ddpm = UNet(**SMALL), model.DDPM(20)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(4):
        optimizer.zero_grad()
        ddpm.loss(model.given(net, times(0, 3, 9, 10)), torch.randn(4, 1, 28, 28)).backward()
        optimizer.step()
    assert [name for name, p in net.named_parameters() if torch.equal(p, before[name])] == []


@pytest.mark.parametrize("network", [UNet, reproduce.CrossUNet])
def test_training_starts_with_lesson_05s_convolutions(network):
    weights = Weights(ROOT / "lesson_05" / "results" / "weights.safetensors", "lesson_05")
    theirs = weights.load(origin.UNet(**weights.config["unet"])).eval()
    theirs.middle[1].out.weight.data.zero_()                                    # its self-attention is left behind
    theirs.middle[1].out.bias.data.zero_()
    shape = parse((ROOT / LESSON / "config.yaml").read_text())["unet"] | {"classes": 10}
    ours = network(**shape).eval()
    load(LESSON, "train").begin_with(ours, weights.path)
    x, t = torch.randn(2, 1, 28, 28), times(3, 900)
    with torch.no_grad():
        assert torch.equal(ours(x, t, times(3, 10)), theirs(x, t))
    with pytest.raises(UserError, match="train.start="):
        load(LESSON, "train").begin_with(network(**shape | {"channels": 24}), weights.path)


def test_arms_have_as_many_parameters():
    config = parse((ROOT / LESSON / "config.yaml").read_text())
    places = config["reproduce"]["equal_attention"]
    shape, cross = config["unet"] | {"classes": 10}, reproduce.CrossUNet
    nets = UNet(**shape), cross(**shape | {"attention": places}), cross(**shape)
    sizes = [sum(p.numel() for p in net.parameters()) for net in nets]
    assert sizes[2] < sizes[1] < sizes[0] < 1.02 * sizes[1]


def test_shape_of_the_gpus_overlay_works():
    config = parse((ROOT / LESSON / "config.yaml").read_text())
    with torch.device("meta"):
        net = UNet(**config["unet"] | config["gpu"]["unet"] | {"classes": 10})
        y = net(torch.empty(2, 1, 28, 28), torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long))
    assert y.shape == (2, 1, 28, 28) and config["gpu"]["train"]["start"] == ""


# ------------------------------------------------------------------ what reproduce.py measures and draws
def test_diagram_shows_the_layers_in_order():
    block = SpatialTransformer(8, 6, heads=2, head_dim=5, groups=4)
    seen = reproduce.steps_of(block, torch.randn(2, 8, 3, 5), torch.randn(2, 4, 6))
    assert [what.split(",")[0] for what, _ in seen] == [
        "x", "context", "GroupNorm", "1 x 1", "LayerNorm", "self-attention", "LayerNorm", "cross-attention",
        "LayerNorm", "a and b of GEGLU", "a gelu(b)", "1 x 1 (starts at 0)"]
    shapes = [shape for _, shape in seen]
    assert shapes[3] == (2, 10, 3, 5) and shapes[5] == (2, 15, 10) and shapes[9] == (2, 15, 80)
    assert shapes[0] == shapes[-1] == (2, 8, 3, 5) and len(seen) == 12


class Keys(dict):
    __getattr__ = dict.__getitem__


@pytest.mark.parametrize("shift", [0.0, 1e-6])
def test_identity_is_measured(monkeypatch, shift):
    def moved(**shape):
        net = UNet(**shape)
        transformers(net)[0].leave.bias.data += shift
        return net

    monkeypatch.setattr(reproduce, "UNet", moved)
    got = reproduce.identity(Space(config=Space(unet=Keys(SMALL | {"tokens": 4}))))
    assert (got > 0) == (shift > 0)


def test_held_out_error_is_with_the_class_and_without():
    # A network that knows the noise if it is told the class, and answers 0 if not.
    ddpm, image = model.DDPM(20), origin.image
    x0, labels = reproduce.digits("test").first(4)

    class Net(torch.nn.Module):
        def forward(self, xt, t, c):
            a, s = image(ddpm.abar[t].sqrt()), image((1 - ddpm.abar[t]).sqrt())
            return (xt - a * x0) / s * image((c == labels).float())

    got = reproduce.heldout(ddpm, Net(), 10, 4, "cpu")
    assert got["error"] < 1e-4 and got["error_without_class"] == pytest.approx(1, abs=0.1)


if __name__ == "__main__":
    import diffusers

    FIXTURE.write_text(json.dumps(make_fixture(diffusers), indent=0) + "\n")
