"""Lesson 05c: cross-attention to a class; the trap of a single token; dropping labels; guidance."""

import json
import math
from pathlib import Path
from types import SimpleNamespace as Space

import pytest
import torch

from conftest import ROOT, load
from utils import UserError, Weights
from utils.config import parse

LESSON = "lesson_05/sublesson_c"
model, reproduce, parent = load(LESSON, "model"), load(LESSON, "reproduce"), load("lesson_05", "model")
DDPM, UNet = model.DDPM, model.UNet
FIXTURE = Path(__file__).parent / "fixtures" / "ldm_attention.json"
SMALL = dict(channels=8, mults=(1, 2), blocks=1, attention=(7,), dropout=0.0, groups=4, patch=2, context=6)


def times(*values):
    return torch.tensor(values)


def randomised(net):
    """The network with all weights away from zero."""
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net


def cross_attentions(net):
    return [m for m in net.modules() if isinstance(m, model.CrossAttention)]


# ------------------------------------------------------------------ the process is lesson 05's
def test_process_equals_lesson_05():
    ours, theirs = DDPM(), parent.DDPM(variance="small")
    assert torch.equal(ours.abar, theirs.abar) and ours.abar.dtype == torch.float64
    net = lambda xt, t: torch.sin(3 * xt) * (t / 1000)[:, None, None, None]  # noqa: E731
    x0 = torch.rand(3, 1, 4, 4) * 2 - 1
    losses, samples = [], []
    for process in (ours, theirs):
        torch.manual_seed(0)
        losses.append(process.loss(net, x0))
        samples.append(process.sample(net, 2, steps=9, shape=(1, 4, 4), generator=torch.Generator().manual_seed(1)))
    assert torch.equal(*losses)
    assert torch.equal(*samples) and samples[0].std() > 0.1


def test_log_snr_at_three_times():
    # The convention box: alpha^2 = abar, sigma^2 = 1 - abar, read off from q_sample.
    ddpm, one, zero, t = DDPM(), torch.ones(3, 1, 1, 1), torch.zeros(3, 1, 1, 1), times(100, 500, 900)
    alpha, sigma = ddpm.q_sample(one, t, zero).flatten(), ddpm.q_sample(zero, t, one).flatten()
    assert torch.allclose(2 * (alpha / sigma).log(), (ddpm.abar[t] / (1 - ddpm.abar[t])).log().float(), atol=1e-5)
    assert ddpm.abar[500].item() == pytest.approx(0.077797, rel=1e-4)


def test_last_step_adds_no_noise_and_bad_numbers_of_steps_are_refused():
    ddpm, net, x = DDPM(20), lambda xt, t: 0.1 * xt, torch.randn(2, 1, 4, 4)
    paths = [list(ddpm.reverse(net, x, 5, generator=torch.Generator().manual_seed(s))) for s in (0, 0, 1)]
    assert torch.equal(paths[0][-1][1], paths[0][-1][2])                        # x_{-1} is the estimate of x_0
    assert torch.equal(paths[0][-1][1], paths[1][-1][1]) and not torch.equal(paths[0][-1][1], paths[2][-1][1])
    for steps in (1, 21):
        with pytest.raises(ValueError, match="between 2 and 20"):
            list(ddpm.reverse(net, x, steps))
    with pytest.raises(ValueError, match="timesteps=1"):
        DDPM(1)


# ------------------------------------------------------------------ attention
def test_attention_equals_the_formula():
    layer, x, context = model.CrossAttention(6, 5, heads=2, head_dim=4), torch.randn(3, 7, 6), torch.randn(3, 4, 5)
    expected = []
    for head in (slice(0, 4), slice(4, 8)):
        q, k, v = (x @ layer.q.weight[head].T, context @ layer.k.weight[head].T, context @ layer.v.weight[head].T)
        expected.append(torch.softmax(torch.einsum("bnd,bld->bnl", q, k) / math.sqrt(4), dim=2) @ v)
    assert torch.allclose(layer(x, context), layer.out(torch.cat(expected, dim=2)), atol=1e-6)
    weights = layer.weights(x, context)
    assert weights.shape == (3, 2, 7, 4) and torch.allclose(weights.sum(3), torch.ones(3, 2, 7), atol=1e-6)
    assert [name for name, _ in layer.named_parameters() if "bias" in name] == ["out.bias"]


def test_positions_are_read_row_by_row():
    # An attention that returns what it reads at each position must give the image back, square or not.
    block = model.CrossBlock(4, 5, heads=2, groups=2)
    block.attend = Pass()
    x = torch.randn(2, 4, 3, 5)
    assert torch.allclose(block(x, torch.zeros(2, 1, 5)), x + block.norm(x), atol=1e-6)


class Pass(torch.nn.Module):
    def forward(self, x, context):
        return x


def test_order_of_context_tokens_does_not_matter():
    layer, x, context = model.CrossAttention(6, 5, 2, 4), torch.randn(2, 7, 6), torch.randn(2, 4, 5)
    assert torch.allclose(layer(x, context), layer(x, context.flip(1)), atol=1e-6)


def twin():
    """A small attention with weights by formula, its inputs and its output: diffusers' `Attention` must give it too."""
    layer = model.CrossAttention(6, 5, heads=2, head_dim=4)
    for i, p in enumerate(layer.parameters()):
        p.data = torch.sin(torch.arange(p.numel()) * (0.7 + 0.013 * i) + i).reshape(p.shape)
    x, context = torch.cos(torch.arange(42.0)).reshape(1, 7, 6), torch.sin(torch.arange(20.0)).reshape(1, 4, 5)
    with torch.no_grad():
        return layer, x, context, layer(x, context)


def test_attention_equals_the_fixture_of_diffusers():
    *_, y = twin()
    expected = torch.tensor(json.loads(FIXTURE.read_text())["output"])
    assert expected.std() > 0.1 and torch.allclose(y.flatten(), expected, rtol=1e-6, atol=1e-6)


def test_fixture_is_what_diffusers_gives():
    diffusers = pytest.importorskip("diffusers", reason="dev reference: pip install -e '.[reference]'")
    expected = torch.tensor(json.loads(FIXTURE.read_text())["output"])
    assert torch.allclose(torch.tensor(make_fixture(diffusers)["output"]), expected, rtol=1e-6, atol=1e-6)


def make_fixture(diffusers):
    """The output of diffusers' Attention with the weights of `twin`. `python tests/test_lesson_05c.py` writes it."""
    from diffusers.models.attention_processor import Attention

    layer, x, context, _ = twin()
    theirs = Attention(query_dim=6, cross_attention_dim=5, heads=2, dim_head=4)
    pairs = {theirs.to_q: layer.q, theirs.to_k: layer.k, theirs.to_v: layer.v, theirs.to_out[0]: layer.out}
    for other, mine in pairs.items():
        other.load_state_dict(mine.state_dict())
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in layer.parameters())
    with torch.no_grad():
        return {"diffusers": diffusers.__version__, "output": theirs(x, context).flatten().tolist()}


# ------------------------------------------------------------------ the trap: one token
def gradients(tokens, dtype=torch.float32):
    """max |gradient| of W_Q, W_K, W_V of every cross-attention of a network with this many tokens a class."""
    torch.manual_seed(0)
    net, ddpm = randomised(UNet(**SMALL, tokens=tokens)), DDPM(20)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = ddpm.loss(model.given(net, times(3, 7, 10)), torch.randn(3, 1, 28, 28))
    loss.backward()
    return [[float(w.weight.grad.abs().max()) for w in (m.q, m.k, m.v)] for m in cross_attentions(net)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_gives_queries_and_keys_no_gradient(dtype):
    one, four = gradients(1, dtype), gradients(4, dtype)
    assert len(one) == len(four) == 4                                           # down, middle, two on the way up
    assert all(q == 0 and k == 0 and v > 0 for q, k, v in one)                  # exactly
    assert all(q > 0 and k > 0 and v > 0 for q, k, v in four)


def test_one_token_gives_the_same_vector_at_every_position():
    layer, context = model.CrossAttention(6, 5, 2, 4), torch.randn(2, 1, 5)
    y = layer(torch.randn(2, 7, 6), context)
    assert torch.allclose(y, layer.out(layer.v(context)).expand(2, 7, 6), atol=1e-6)
    assert (layer.weights(torch.randn(2, 7, 6), context) == 1).all()
    y = layer(torch.randn(2, 7, 6), torch.randn(2, 4, 5))
    assert not torch.allclose(y, y[:, :1].expand_as(y), atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 4])
def test_training_leaves_queries_and_keys_of_one_token_where_they_were(tokens):
    torch.manual_seed(0)
    net, ddpm = UNet(**SMALL, tokens=tokens), DDPM(20)
    before = {name: p.detach().clone() for name, p in net.named_parameters() if ".attend." in name}
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(4):
        optimizer.zero_grad()
        ddpm.loss(model.given(net, times(0, 3, 9, 10)), torch.randn(4, 1, 28, 28)).backward()
        optimizer.step()
    for name, p in net.named_parameters():
        if name in before:
            stays = tokens == 1 and name.split(".")[-2] in "qk"
            assert torch.equal(p, before[name]) == stays, name


# ------------------------------------------------------------------ classes
def test_class_tokens():
    table = model.ClassTokens(10, 4, 6)
    context = table(times(3, 10, 3))
    assert context.shape == (3, 4, 6) and table.table.weight.shape == (11, 24)  # the last row: no class
    assert torch.equal(context[0], context[2]) and not torch.equal(context[0], context[1])
    assert torch.equal(context[0].flatten(), table.table.weight[3])
    with pytest.raises(IndexError):
        table(times(11))


def test_no_class_is_learned():
    torch.manual_seed(0)
    net = randomised(UNet(**SMALL))
    DDPM(20).loss(model.given(net, times(10, 2)), torch.randn(2, 1, 28, 28)).backward()
    rows = net.classes.table.weight.grad.abs().sum(1) > 0
    assert rows.tolist() == [False, False, True, *[False] * 7, True]


def test_zeros_as_null_give_nothing_but_the_bias():
    # Keys and values have no bias: a null of zeros would leave W_O's bias, the same for all.
    layer = model.CrossAttention(6, 5, 2, 4)
    y = layer(torch.randn(2, 7, 6), torch.zeros(2, 4, 5))
    assert torch.allclose(y, layer.out.bias.expand_as(y), atol=1e-7)


def test_labels_are_dropped_one_by_one():
    torch.manual_seed(0)
    c = torch.arange(10).repeat(2000)
    dropped = model.drop(c, torch.full_like(c, 10), 0.1)
    rate = float((dropped == 10).float().mean())
    assert abs(rate - 0.1) < 4 * math.sqrt(0.1 * 0.9 / len(c))                  # binomial error
    assert torch.equal(dropped[dropped != 10], c[dropped != 10])
    batches = (dropped.view(-1, 50) == 10).float().mean(1)
    assert 0.8 < float(batches.var() / (0.1 * 0.9 / 50)) < 1.2                  # a coin for a batch: 50
    assert torch.equal(model.drop(c, torch.full_like(c, 10), 0.0), c)
    assert (model.drop(c, torch.full_like(c, 10), 1.0) == 10).all()


def test_conditions_of_any_shape_can_be_dropped():
    torch.manual_seed(0)
    c, null = torch.ones(1000, 5, dtype=torch.long), torch.zeros(1, 5, dtype=torch.long)
    dropped = model.drop(c, null, 0.3)
    assert dropped.shape == c.shape and set(dropped.sum(1).tolist()) == {0, 5}  # whole samples, never parts of one


# ------------------------------------------------------------------ guidance
def linear_net(xt, t, c):
    return xt * (c.float() + 1)[:, None, None, None]


def test_guidance_follows_the_formula():
    x, t, c, null = torch.randn(2, 1, 3, 3), times(1, 2), times(3, 5), times(10, 10)
    eps_c, eps_u = linear_net(x, t, c), linear_net(x, t, null)
    for w in (0, 0.0, 0.5, 1, 1.0, 2, 4.5):
        eps = model.guided(linear_net, c, null, w)(x, t)
        assert torch.allclose(eps, eps_u + w * (eps_c - eps_u), atol=1e-5)
    assert torch.equal(model.guided(linear_net, c, null, 1)(x, t), eps_c)
    assert torch.equal(model.guided(linear_net, c, null, 0)(x, t), eps_u)


@pytest.mark.parametrize("w, calls", [(0.0, 2), (1.0, 2), (3.0, 4)])
def test_guidance_costs_a_second_image_in_each_call(w, calls):
    seen = []
    net = lambda xt, t, c: seen.append(len(xt)) or xt  # noqa: E731
    model.guided(net, times(3, 5), times(10, 10), w)(torch.randn(2, 1, 3, 3), times(1, 2))
    assert seen == [calls]


# ------------------------------------------------------------------ network
def test_network_is_lesson_05s_at_the_start():
    # W_O = 0: whatever the class, the network is lesson 05's with the same weights.
    torch.manual_seed(0)
    shape = {**SMALL, "attention": ()}
    shape.pop("context")
    ours, theirs = UNet(**SMALL).eval(), randomised(parent.UNet(**shape)).eval()
    layers = ("ResBlock", "Attention", "Downsample", "Upsample")

    def parts(net):
        found = [m for m in net.modules() if type(m).__name__ in layers]
        return [net.time, net.stem, net.out, *found]

    mine, others = parts(ours), parts(theirs)
    assert [type(m).__name__ for m in mine] == [type(m).__name__ for m in others]
    for a, b in zip(mine, others):
        a.load_state_dict(b.state_dict())
    x, t = torch.randn(2, 1, 28, 28), times(3, 900)
    assert torch.equal(ours(x, t, times(3, 10)), theirs(x, t))
    assert torch.equal(ours(x, t, times(1, 2)), theirs(x, t))


@pytest.mark.parametrize("network", [UNet, reproduce.TimeUNet])
def test_training_starts_as_lesson_05s_published_network(network):
    weights = Weights(ROOT / "lesson_05" / "results" / "weights.safetensors", "lesson_05")
    theirs = weights.load(parent.UNet(**weights.config["unet"])).eval()
    shape = parse((ROOT / LESSON / "config.yaml").read_text())["unet"] | {"classes": 10}
    ours = network(**shape).eval()
    load(LESSON, "train").begin_with(ours, weights.path)
    x, t = torch.randn(2, 1, 28, 28), times(3, 900)
    with torch.no_grad():
        assert torch.equal(ours(x, t, times(3, 10)), theirs(x, t))
    with pytest.raises(UserError, match="train.start="):
        load(LESSON, "train").begin_with(network(**shape | {"channels": 24}), weights.path)


def test_block_is_the_identity_at_the_start():
    block, x = model.CrossBlock(8, 6, heads=2, groups=4), torch.randn(2, 8, 7, 7)
    assert torch.equal(block(x, torch.randn(2, 4, 6)), x)
    assert block.norm.eps == 1e-6


@pytest.mark.parametrize("patch, attention, count", [(1, (7,), 4), (2, (7,), 4), (2, (14, 7), 7), (2, (), 1)])
def test_shapes_and_places(patch, attention, count):
    shape = SMALL | {"patch": patch, "attention": attention, "mults": (1, 2, 2) if patch == 1 else (1, 2)}
    net, x = UNet(**shape), torch.randn(2, 1, 28, 28)
    y = net(x, times(3, 900), times(0, 10))
    assert y.shape == x.shape and (y == 0).all() and len(cross_attentions(net)) == count


@pytest.mark.parametrize("network", [UNet, reproduce.TimeUNet])
def test_class_and_time_reach_the_output(network):
    net = randomised(network(**SMALL)).eval()
    x, t = torch.randn(1, 1, 28, 28), times(5)
    with torch.no_grad():
        outputs = [net(x, t, times(c)) for c in range(11)]
        assert not torch.allclose(net(x, times(6), times(0)), outputs[0], atol=1e-4)
    for i in range(11):
        for j in range(i):
            assert not torch.allclose(outputs[i], outputs[j], atol=1e-4)
    assert bool(cross_attentions(net)) == (network is UNet)


def test_bad_shapes_are_refused():
    for wrong, match in ((dict(heads=3), "heads=3"), (dict(image_size=30), "image_size=30")):
        with pytest.raises(ValueError, match=match):
            UNet(**SMALL | wrong)


def test_dropout_acts_in_training_only():
    net, x = randomised(UNet(**SMALL | {"dropout": 0.5})), torch.randn(2, 1, 28, 28)
    t, c = times(5, 10), times(1, 2)
    assert not torch.equal(net.train()(x, t, c), net(x, t, c))
    assert torch.equal(net.eval()(x, t, c), net(x, t, c))


def test_shape_of_the_gpus_overlay_works():
    config = parse((ROOT / LESSON / "config.yaml").read_text())
    with torch.device("meta"):
        net = UNet(**config["unet"] | config["gpu"]["unet"] | {"classes": 10})
        y = net(torch.empty(2, 1, 28, 28), torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long))
    assert y.shape == (2, 1, 28, 28) and config["gpu"]["train"]["start"] == ""


# ------------------------------------------------------------------ scripts
def test_labels_are_read():
    sample = load(LESSON, "sample")
    assert sample.wanted("", 12, 10).tolist() == [*range(10), 0, 1]
    assert sample.wanted("7", 3, 10).tolist() == [7, 7, 7] and sample.wanted("3,1", 3, 10).tolist() == [3, 1, 3]
    assert sample.wanted("none", 2, 10).tolist() == [10, 10]
    for wrong in ("10", "-1", "x", "3,", "3;1", "1.5"):
        with pytest.raises(UserError, match="classes from 0 to 9"):
            sample.wanted(wrong, 3, 10)


def test_samples_follow_seed_and_class():
    net = randomised(UNet(**SMALL)).eval()
    draw = lambda seed, c, batch: load(LESSON, "sample").draw(
        DDPM(20), net, times(*c), 10, 3, 1.0, torch.Generator().manual_seed(seed), batch)
    x = draw(0, (3, 5), 2)
    assert torch.equal(x, draw(0, (3, 5), 2))
    assert not torch.equal(x, draw(1, (3, 5), 2)) and not torch.equal(x, draw(0, (4, 5), 2))
    assert draw(0, (3, 5, 7), 2).shape == (3, 1, 28, 28)


def test_held_out_measurement():
    net = randomised(UNet(**SMALL, tokens=1)).eval()
    got = reproduce.heldout(DDPM(20), net, 10, 4, torch.device("cpu"))
    assert got == reproduce.heldout(DDPM(20), net, 10, 4, torch.device("cpu"))  # the same times and noise
    assert got["entropy"] == [0.0] * 4 and len(got["gradients"]) == 4
    assert got["error"] != got["error_without_class"]
    assert all(0 < e <= 1 for e in reproduce.heldout(DDPM(20), randomised(UNet(**SMALL)), 10, 4, "cpu")["entropy"])


@pytest.mark.parametrize("w, calls", [(0.0, 50), (1.0, 50), (2.0, 100)])
def test_asking_counts_hits_and_calls(monkeypatch, w, calls):
    # Twenty images of 0 to 9 in turn, of which the judge reads the sevens as eights.
    monkeypatch.setattr(reproduce, "published", lambda run, arm: Space(config={"unet": Space(classes=10)}))
    monkeypatch.setattr(reproduce, "load", lambda run, weights: (None, None, None))
    monkeypatch.setattr(reproduce, "draw", lambda ddpm, net, c, null, steps, w, generator: c)
    monkeypatch.setattr(reproduce, "classify", lambda c: (torch.where(c == 7, 8, c), None))
    monkeypatch.setattr(reproduce, "fid_to_test", lambda c: 0.5)
    run = Space(config=Space(sample=Space(steps=50), reproduce=Space(full_n=20)), device="cpu")
    got = reproduce.ask(run, w, 0)
    assert got["accuracy"] == pytest.approx(0.9) and got["by_digit"] == [1.0] * 7 + [0.0, 1.0, 1.0]
    assert got["network_calls"] == calls


def test_entropy_of_equal_weights_is_one():
    net = UNet(**SMALL).eval()
    for layer in cross_attentions(net):
        torch.nn.init.zeros_(layer.q.weight)
    assert reproduce.heldout(DDPM(20), net, 10, 4, "cpu")["entropy"] == [1.0] * 4


def test_training_withholds_the_class(monkeypatch, tmp_path):
    train, seen = load(LESSON, "train"), []
    monkeypatch.setattr(train, "given", lambda net, c: seen.append(c.clone()) or model.given(net, c))
    train.main(["smoke=true", "drop=1.0", "preview_every=0", f"runs={tmp_path}"])
    assert len(seen) == 6 and all((c == 10).all() for c in seen)


if __name__ == "__main__":
    import diffusers

    FIXTURE.write_text(json.dumps(make_fixture(diffusers), indent=0) + "\n")
