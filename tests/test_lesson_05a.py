"""Lesson 05a: dropout against its definition and torch's, evaluation mode against lesson 05, the mistake."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import load
from utils import UserError

LESSON = "lesson_05/sublesson_a"
model, train, reproduce = load(LESSON, "model"), load(LESSON, "train"), load(LESSON, "reproduce")
parent = load("lesson_05", "model")
Dropout, UNet = model.Dropout, model.UNet
SMALL = dict(channels=8, mults=(1, 2), blocks=1, attention=(7,), groups=4, patch=2)
TINY = ["smoke=true", "threads=1", "gpu=false", "device=cpu"]


def randomised(net):
    """The network with all weights away from zero, the same for the same shapes."""
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.data = 0.2 * torch.randn(p.shape, generator=generator)
    return net


# ------------------------------------------------------------------ the layer
@pytest.mark.parametrize("p", [0.1, 0.3, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mask_statistics(p, dtype):
    # Kept with probability 1 - p, within 5 binomial deviations; what is kept grows by 1 / (1 - p).
    torch.manual_seed(0)
    n, layer = 200_000, Dropout(p).train()
    y = layer(torch.ones(n, dtype=dtype))
    kept = y != 0
    assert abs(kept.float().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
    assert (y[kept].float() * (1 - p) - 1).abs().max() < (1e-6 if dtype == torch.float32 else 1e-2)
    assert y.dtype == dtype


def test_moments_are_those_of_torchs_layer():
    # E = x, Var = x^2 p / (1 - p); the gradient has the mask and the scale of the output.
    torch.manual_seed(0)
    for layer in (Dropout(0.3), torch.nn.Dropout(0.3)):
        x = torch.full((200_000,), 2.0, requires_grad=True)
        y = layer.train()(x)
        assert y.mean().item() == pytest.approx(2, abs=0.02)
        assert y.var().item() == pytest.approx(4 * 0.3 / 0.7, rel=0.02)
        y.sum().backward()
        assert torch.allclose(x.grad, y.detach() / 2)


def test_every_position_and_image_has_its_own_mask_and_every_pass_a_new_one():
    torch.manual_seed(0)
    layer, x = Dropout(0.5).train(), torch.ones(4, 8, 14, 14)
    a, b = layer(x), layer(x)
    assert not torch.equal(a, b)
    assert not torch.equal(a[0], a[1]) and not torch.equal(a[:, 0], a[:, 1]) and not torch.equal(a[..., 0], a[..., 1])


def test_evaluation_mode_and_p_zero_are_the_identity():
    x = torch.randn(2, 3, 4, 4)
    assert Dropout(0.9).eval()(x) is x and Dropout(0.0).train()(x) is x
    for p in (-0.1, 1.0, 1.5):
        with pytest.raises(ValueError, match="dropout"):
            Dropout(p)


# ------------------------------------------------------------------ block and network
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_in_evaluation_mode_the_block_is_lesson_05s(p):
    mine, theirs = randomised(model.DropoutBlock(8, 16, 32, p, groups=4)), parent.ResBlock(8, 16, 32, 0.0, groups=4)
    theirs.load_state_dict(mine.state_dict())
    x, emb = torch.randn(2, 8, 7, 7), torch.randn(2, 32)
    assert torch.equal(mine.eval()(x, emb), theirs.eval()(x, emb))
    assert torch.equal(mine.train()(x, emb), theirs.train()(x, emb)) == (p == 0)


def test_dropout_stands_after_the_second_norm_and_before_the_last_convolution():
    # h = conv2(drop(silu(norm2(conv1(...) + time)))): with the identity as last convolution the zeros show.
    torch.manual_seed(0)
    block = randomised(model.DropoutBlock(8, 8, 32, 0.4, groups=4)).train()
    torch.nn.init.dirac_(block.conv2.weight)
    torch.nn.init.zeros_(block.conv2.bias)
    x, emb = torch.randn(40, 8, 7, 7), torch.randn(40, 32)
    h = block(x, emb) - x
    assert (h.abs() < 1e-6).float().mean().item() == pytest.approx(0.4, abs=0.02)
    silu, norm = torch.nn.functional.silu, torch.nn.functional.group_norm
    full = block.conv1(silu(block.norm1(x))) + block.time(silu(emb))[:, :, None, None]
    full = silu(norm(full, 4, block.norm2.weight, block.norm2.bias, 1e-6))
    kept = h.abs() > 1e-6
    assert torch.allclose(h[kept], full[kept] / 0.6, atol=1e-4)


def test_network_in_both_modes():
    net, x, t = randomised(UNet(**SMALL, dropout=0.3)), torch.randn(2, 1, 28, 28), torch.tensor([5, 900])
    theirs = parent.UNet(**SMALL, dropout=0.0)
    theirs.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert not torch.equal(net.train()(x, t), net(x, t))
        assert torch.equal(net.eval()(x, t), net(x, t)) and torch.equal(net(x, t), theirs.eval()(x, t))
    assert len([m for m in net.modules() if isinstance(m, Dropout)]) == len(
        [m for m in net.modules() if isinstance(m, model.ResBlock)])


# ------------------------------------------------------------------ the error on seen and unseen images
def test_error_by_time_in_closed_form():
    # For data N(0, 0.5^2) the exact network errs by abar 0.25 / (abar 0.25 + 1 - abar); one that says 0 by 1.
    torch.manual_seed(0)
    ddpm, x0 = model.DDPM(), 0.5 * torch.randn(4000, 1, 2, 2)

    def exact(xt, t):
        abar = ddpm.abar[t].float()[:, None, None, None]
        return (1 - abar).sqrt() * xt / (0.25 * abar + 1 - abar)

    times = [50, 300, 700]
    abar = ddpm.abar[times]
    expected = (0.25 * abar / (0.25 * abar + 1 - abar)).float()
    assert torch.allclose(model.error_by_time(ddpm, exact, x0, times), expected, rtol=0.05)
    assert torch.allclose(model.error_by_time(ddpm, lambda x, t: 0 * x, x0, times), torch.ones(3), rtol=0.05)


def test_error_meets_the_same_noise_and_leaves_the_training_alone():
    ddpm, net, x0 = model.DDPM(), randomised(UNet(**SMALL, dropout=0.3)).eval(), torch.randn(3, 1, 28, 28)
    before = torch.get_rng_state()
    a, b, c = (model.error_by_time(ddpm, net, x0, [100, 500], torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(before, torch.get_rng_state())
    assert not a.requires_grad


# ------------------------------------------------------------------ training: the mode is asserted
def test_the_mistake_is_caught_and_only_allowed_when_asked(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "preview", reproduce.careless)
    with pytest.raises(AssertionError, match="never undone"):
        train.main([*TINY, f"runs={tmp_path}/a"])
    allowed = train.main([*TINY, f"runs={tmp_path}/b", "strict=false", "eval_every=0"])
    assert allowed.steps == 6


def test_the_mistake_is_dropout_0_from_the_first_preview_on(monkeypatch, tmp_path):
    # Up to the preview after step 3 the careless run is that of its own p; after it no mask is drawn any more.
    seen = {}
    for name, preview in (("own", train.preview), ("careless", reproduce.careless)):
        monkeypatch.setattr(train, "preview", preview)
        result = train.main([*TINY, f"runs={tmp_path}/{name}", "dropout=0.5", "strict=false", "log_every=1",
                             "eval_every=0"])
        seen[name] = [row["loss"] for row in result.records]
    assert seen["own"][:3] == seen["careless"][:3] and seen["own"][3:] != seen["careless"][3:]


def test_looks_at_the_error_do_not_change_the_training(tmp_path):
    a, b = (train.main([*TINY, f"runs={tmp_path}/{i}", f"eval_every={i}"]) for i in (0, 2))
    ours, theirs = load_file(a.weights), load_file(b.weights)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    looks = [row for row in b.records if "test_error" in row]
    assert [row["step"] for row in looks] == [2, 4, 6] and all(0 < row["train_error"] < 5 for row in looks)


def test_start_takes_over_lesson_05s_weights(tmp_path):
    start = Path(train.__file__).parent.parent / "results" / "weights.safetensors"
    keys = ["unet.channels=32", "unet.mults=[1, 2]", "unet.blocks=1", "unet.patch=2", "unet.groups=8", "steps=1",
            "lr=1e-12", "preview_every=0", "eval_every=0"]
    result = train.main([*TINY, f"runs={tmp_path}", "start=../results/weights.safetensors", *keys])
    ours, theirs = load_file(result.weights), load_file(start)
    assert all(torch.allclose(ours[key].float(), theirs[key].float(), atol=1e-3) for key in theirs)
    with pytest.raises(UserError, match="there is no weights file"):
        train.main([*TINY, f"runs={tmp_path}", "start=nowhere.safetensors"])


# ------------------------------------------------------------------ copies
def test_copy_ratio():
    seen = torch.zeros(3, 1, 28, 28)
    seen[1] += 0.5
    seen[2] -= 0.5
    x = torch.stack([seen[0], 0.5 * (seen[0] + seen[1]), seen[1] + 0.1])
    assert torch.allclose(reproduce.copy_ratio(x, seen), torch.tensor([0.0, 1.0, 0.1 / 0.6]), atol=1e-3)
