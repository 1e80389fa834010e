"""Lesson 05e, text-to-image: padding is never seen, the encoder against torch's own, captions that train and draw."""

import math

import pytest
import torch
from torch import nn

from conftest import load
from utils import UserError, Weights
from utils.captions import Tokenizer, caption, held_out, read_caption

LESSON = "lesson_05/sublesson_e"
model, train, sample, reproduce = (load(LESSON, name) for name in ("model", "train", "sample", "reproduce"))
KEYS = ["smoke=true", "gpu=false", "device=cpu", "threads=1"]


def small(seed=0, **sizes):
    """A tiny network whose zero-initialised layers are not zero, so that every part of it shows."""
    torch.manual_seed(seed)
    sizes = {"channels": 8, "mults": (1, 2), "blocks": 1, "attention": (7,), "groups": 4, "patch": 2, "dropout": 0.0,
             "context": 16, "heads": 2, "head_dim": 4, **sizes}
    net = model.UNet(30, 12, **sizes).eval()
    for p in net.parameters():
        if float(p.detach().abs().max()) == 0:
            nn.init.normal_(p, std=0.1)
    return net


def captions(*lengths, length=12, seed=0):
    """Random word numbers behind a start token, then padding."""
    c = torch.zeros(len(lengths), length, dtype=torch.int64)
    for row, n in zip(c, lengths):
        row[0], row[1:n] = 1, torch.randint(2, 30, (n - 1,), generator=torch.Generator().manual_seed(seed))
    return c


# ------------------------------------------------------------------ the mask
def test_what_stands_at_padding_changes_nothing():
    net = small()
    c, x, t = captions(1, 5, 9, 12), torch.randn(4, 1, 28, 28), torch.tensor([0, 30, 500, 999])
    mask = c != 0
    other = torch.where(mask, c, torch.randint(2, 30, c.shape))        # the same mask, other words at padding
    a, b = net.text(c, mask), net.text(other, mask)
    assert torch.equal(a[mask], b[mask]) and not torch.allclose(a[~mask], b[~mask])
    block = net.middle[1].blocks[0]
    h = torch.randn(4, 49, 8)
    assert torch.equal(block(h, (a, mask)), block(h, (b, mask)))       # nor in cross-attention
    assert not torch.allclose(block(h, (a, mask | True)), block(h, (b, mask | True)))  # without a mask it would
    before = net(x, t, c)
    with torch.no_grad():
        net.text.words.weight[0] = 100.0
    assert torch.equal(net(x, t, c), before)


def test_more_padding_changes_nothing():
    net, x, t = small(), torch.randn(2, 1, 28, 28), torch.tensor([3, 700])
    c = captions(4, 6)
    assert torch.allclose(net(x, t, c), net(x, t, c[:, :6]), atol=1e-6)
    assert torch.allclose(net(x, t, c)[:1], net(x[:1], t[:1], c[:1]), atol=1e-6)       # nor does the longer neighbour


def test_weights_of_attention():
    attend, x = model.MaskedAttention(8, 16, 2, 4), torch.randn(3, 5, 8)
    context, mask = torch.randn(3, 7, 16), torch.arange(7) < torch.tensor([[1], [4], [7]])
    weights = attend.weights(x, (context, mask))
    assert weights.shape == (3, 2, 5, 7) and torch.allclose(weights.sum(3), torch.ones(3, 2, 5))
    assert bool((weights.transpose(1, 3)[~mask] == 0).all()), "exactly zero"
    assert bool((weights[0, ..., 0] == 1).all())                       # the null caption: one token gets all
    q, k, v = (attend.split(part) for part in (attend.q(x), attend.k(context), attend.v(context)))
    h = nn.functional.scaled_dot_product_attention(q, k, v, mask[:, None, None])
    assert torch.allclose(attend(x, (context, mask)), attend.out(h.transpose(1, 2).flatten(2)), atol=1e-6)
    plain = model.CrossAttention(8, 16, 2, 4)          # lesson 05c's, which sees all
    plain.load_state_dict(attend.state_dict())
    assert torch.equal(plain(x, context), attend(x, (context, mask | True)))
    assert not torch.allclose(plain(x, context), attend(x, (context, mask)), atol=1e-4)


# ------------------------------------------------------------------ the text encoder
def test_encoder_is_torchs_with_the_same_weights():
    """Pre-norm nn.TransformerEncoder with a key padding mask; ported weights cover every parameter of ours."""
    torch.manual_seed(1)
    ours = model.TextEncoder(30, 12, dim=16, depth=2, heads=4).eval()
    for p in ours.parameters():
        nn.init.normal_(p, std=0.3)
    layer = nn.TransformerEncoderLayer(16, 4, 64, 0.0, "gelu", batch_first=True, norm_first=True)
    theirs = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16), enable_nested_tensor=False).eval()
    left = dict(ours.named_parameters())

    def port(parameter, *names):
        parameter.copy_(torch.cat([left.pop(name) for name in names]))

    with torch.no_grad():
        for i, layer in enumerate(theirs.layers):
            own = f"blocks.{i}."
            port(layer.self_attn.in_proj_weight, *(f"{own}attend.{name}.weight" for name in "qkv"))
            layer.self_attn.in_proj_bias.zero_()       # ours has none
            for part in ("weight", "bias"):
                port(getattr(layer.self_attn.out_proj, part), f"{own}attend.out.{part}")
                port(getattr(layer.linear1, part), f"{own}think.0.{part}")
                port(getattr(layer.linear2, part), f"{own}think.2.{part}")
                port(getattr(layer.norm1, part), f"{own}norm1.{part}")
                port(getattr(layer.norm2, part), f"{own}norm2.{part}")
        for part in ("weight", "bias"):
            port(getattr(theirs.norm, part), f"norm.{part}")
    assert set(left) == {"words.weight", "places.weight"}
    c = captions(1, 4, 12)
    mask = c != 0
    expected = theirs(ours.words(c) + ours.places(torch.arange(12)), src_key_padding_mask=~mask)
    assert torch.allclose(ours(c, mask)[mask], expected[mask], rtol=1e-5, atol=1e-5)


def test_places_make_the_order_matter():
    encoder = model.TextEncoder(30, 12, dim=16)
    c = torch.tensor([[1, 5, 9, 7, 0], [1, 9, 5, 7, 0]])
    h = encoder(c, c != 0)
    assert not torch.allclose(h[0, 1], h[1, 2], atol=1e-4)
    nn.init.zeros_(encoder.places.weight)
    h = encoder(c, c != 0)
    assert torch.allclose(h[0, 1], h[1, 2], atol=1e-6) and torch.allclose(h[0, 3], h[1, 3], atol=1e-6)


def test_words_learn_through_the_picture():
    """A gradient reaches the words of the caption, none those that are not in it, nor padding."""
    net = small()
    c = torch.tensor([[1, 4, 7, 0, 0]])
    net(torch.randn(1, 1, 28, 28), torch.tensor([10]), c).square().sum().backward()
    used = net.text.words.weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert used == [1, 4, 7]
    assert net.text.places.weight.grad.abs().sum(1).nonzero().flatten().tolist() == [0, 1, 2]


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="context=15"):
        model.TextEncoder(30, 12, dim=15, heads=2)


# ------------------------------------------------------------------ the network around it
def test_blocks_are_the_identity_at_the_start():
    torch.manual_seed(0)
    block = model.MaskedTransformer(8, 16, 2, 4, groups=4)
    x, c = torch.randn(2, 8, 7, 7), captions(3, 5)
    assert torch.equal(block(x, (torch.randn(2, 12, 16), c != 0)), x)
    with torch.no_grad():
        nn.init.normal_(block.leave.weight)
    assert not torch.allclose(block(x, (torch.randn(2, 12, 16), c != 0)), x, atol=1e-3)


def test_every_attention_to_a_caption_has_its_mask():
    for attention, count in (((), 1), ((7,), 4), ((14, 7), 7)):
        net = small(attention=attention)
        blocks = [m for m in net.modules() if type(m).__name__ == "TransformerBlock"]
        assert len(blocks) == count                    # down, bottom, twice up a level
        assert all(type(block.attn2) is model.MaskedAttention for block in blocks)
        assert all(type(block.attn1) is model.CrossAttention for block in blocks)      # an image has no padding


def test_convention():
    ddpm = model.DDPM()
    for t, expected in ((100, 0.895), (500, 0.078), (900, 0.00027)):
        signal, noise = (ddpm.q_sample(a, torch.tensor([t]), b) for a, b in (
            (torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)), (torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1))))
        assert float(signal ** 2 + noise ** 2) == pytest.approx(1, abs=1e-6)
        abar = math.exp(sum(math.log1p(-(1e-4 + (0.02 - 1e-4) * i / 999)) for i in range(t + 1)))
        assert float(torch.log(signal ** 2 / noise ** 2)) == pytest.approx(math.log(abar / (1 - abar)), abs=1e-4)
        assert abar == pytest.approx(expected, rel=0.02)


def test_captions_are_dropped_sample_by_sample():
    torch.manual_seed(0)
    words = Tokenizer()
    c, null = words(["a thick seven"]).expand(20_000, -1), words([""])[0]
    after = train.drop(c, null, 0.1)
    dropped = (after == null).all(1)
    assert abs(float(dropped.float().mean()) - 0.1) < 4 * math.sqrt(0.09 / 20_000)
    assert torch.equal(after[~dropped], c[~dropped]) and bool((train.drop(c, null, 1.0) == null).all())


def test_guidance():
    net, words = small(), Tokenizer(length=12)
    c = words(["a 3", "a 1"]).clamp(max=29)
    null, x, t = words([""]).expand_as(c), torch.randn(2, 1, 28, 28), torch.tensor([5, 600])
    with torch.no_grad():
        eps_c, eps_u = net(x, t, c), net(x, t, null)
        assert torch.equal(model.guided(net, c, null, 1.0)(x, t), eps_c)
        assert torch.equal(model.guided(net, c, null, 0.0)(x, t), eps_u)
        assert torch.allclose(model.guided(net, c, null, 3.0)(x, t), eps_u + 3 * (eps_c - eps_u), atol=1e-5)
    assert not torch.allclose(eps_c, eps_u, atol=1e-4)


# ------------------------------------------------------------------ training and asking
def test_shuffling_moves_words_only():
    torch.manual_seed(0)
    c = captions(1, 2, 6, 12)
    mixed = torch.stack([train.shuffled(c) for _ in range(200)])
    assert bool((mixed[:, :, 0] == 1).all()) and torch.equal(mixed != 0, (c != 0).expand_as(mixed))
    assert torch.equal(mixed.sort(2).values, c.sort(1).values.expand_as(mixed))
    assert len({tuple(row.tolist()) for row in mixed[:, 2]}) > 50


def test_begin_with_another_network(trained):
    """Its convolutions are taken over, text encoder and transformers are not."""
    _, result = trained
    weights = Weights(result.weights, "lesson_05/sublesson_e")
    torch.manual_seed(5)
    net = model.UNet(**weights.config["unet"])
    before, theirs = {k: v.clone() for k, v in net.state_dict().items()}, dict(weights.state)
    train.begin_with(net, weights)
    kept = {k for k, v in net.state_dict().items() if torch.equal(v, before[k])}
    taken = {k for k, v in net.state_dict().items() if torch.equal(v, theirs[k].float())}
    assert kept | taken == set(before)
    assert all(k in kept for k in before if k.startswith(("text.", "middle.1.")))
    assert all(k in taken for k in before if not k.startswith(("text.", "middle.1.")))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training in smoke size: the folder of its runs, and what it returns."""
    runs = tmp_path_factory.mktemp("runs")
    return runs, train.main([*KEYS, f"runs={runs}", "steps=2", "preview_every=0"])


def test_captions_are_tokenised_once(monkeypatch, tmp_path):
    calls, real = [], Tokenizer.__call__
    monkeypatch.setattr(Tokenizer, "__call__", lambda self, texts: calls.append(1) or real(self, texts))
    for steps in (1, 4):
        train.main([*KEYS, f"runs={tmp_path / str(steps)}", f"steps={steps}", "preview_every=0"])
    assert len(calls) == 4                             # the captions and the empty one, whatever the steps


def test_weights_carry_their_words(trained):
    runs, result = trained
    weights = Weights(result.weights, "lesson_05/sublesson_e")
    words = weights.config["captions"].vocabulary.split()
    assert set(words) < set(Tokenizer().words) and weights.config["unet"].vocabulary == len(words) == 41
    assert weights.state["text.words.weight"].shape == (len(words), 8)


def test_prompts(trained):
    runs, _ = trained
    x = sample.main([*KEYS, f"runs={runs}", "n=3", "prompt=a thick seven leaning right; ;3", "steps=2"])
    same = sample.main([*KEYS, f"runs={runs}", "n=3", "prompt=a thick seven leaning right; ;3", "steps=2"])
    other = sample.main([*KEYS, f"runs={runs}", "n=3", "prompt=a thin seven leaning right; ;3", "steps=2"])
    assert x.shape == (3, 1, 28, 28) and torch.equal(x, same)
    assert not torch.equal(x[0], other[0]) and torch.equal(x[1:], other[1:])


@pytest.mark.parametrize("prompt, message", [("a purple seven", "'purple'.*thin fine regular"), ("thick", "no digit"),
                                             ("a small seven", "'small'.*narrow normal wide leaning"),
                                             ("a thick thin 7", "two different"), ("a " * 20 + "7", "21 words"),
                                             ("leaning seven thick right a", "to which side")])
def test_prompts_that_cannot_be_drawn(trained, prompt, message):
    runs, _ = trained
    with pytest.raises(UserError, match=message):
        sample.main([*KEYS, f"runs={runs}", "n=1", f"prompt={prompt}", "steps=2"])


def test_grid_of_captions():
    read = [read_caption(text)[0] for text in sample.GRID]
    assert len({tuple(sorted(one.items())) for one in read}) == 90
    assert [one["digit"] for one in read[:10]] == list(range(10))
    for k in range(10):                                # the rows that README.md names as never seen
        assert [i for i in range(9) if held_out(k, *divmod(i, 3))] == sorted([(k + 1) % 9, (k + 5) % 9])


# ------------------------------------------------------------------ the claim
def test_wishes_name_every_word():
    for triples in (reproduce.SEEN, reproduce.HELD_OUT):
        texts = reproduce.wishes(triples, 100, seed=3)
        for text, triple in zip(texts, triples * 5):
            (one,) = read_caption(text)
            assert (one["digit"], one["thickness"], one["slant"]) == triple
            assert held_out(*triple) == (triples is reproduce.HELD_OUT)
        assert texts == reproduce.wishes(triples, 100, 3) != reproduce.wishes(triples, 100, 4)
    assert len(reproduce.SEEN) == 70 and len(reproduce.HELD_OUT) == 20
    assert reproduce.PROMPT == caption(7, {"thickness": 2, "slant": 2}) and held_out(7, 2, 2)
    bags = reproduce.reordered(texts, 0)
    assert [sorted(a.split()) for a in bags] == [sorted(b.replace(",", "").split()) for b in texts] and bags != texts
