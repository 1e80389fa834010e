"""Lesson 34: rotary positions, the blocks against loops and against diffusers, the schedule, guidance as an input."""

import ast
import copy
import json
import math
from pathlib import Path

import pytest
import torch

from conftest import ROOT, load
from utils import Run, Section, UserError
from utils.captions import caption, follow, held_out

model, reproduce = load("lesson_34", "model"), load("lesson_34", "reproduce")
time_embedding = load("lesson_34", "earlier").time_embedding
RectifiedFlow, Flux, FluxTransformer = model.RectifiedFlow, model.Flux, model.FluxTransformer
FIXTURE = ROOT / "tests" / "fixtures" / "flux_transformer.json"
SMALL = dict(vocabulary=12, length=5, bag=6, words=8, patch=4, dim=16, heads=2, doubles=1, singles=2, axes=(4, 2, 2),
             frequencies=8)
CORE = dict(channels=12, context=20, pooled=10, dim=32, heads=2, doubles=2, singles=3, axes=(4, 6, 6))


def stirred(net, std=0.3, seed=0):
    """A network whose zeros are gone, so that every part says something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(std * torch.randn(p.shape, generator=generator))
    return net.eval()


def batch(n=3, height=28, width=28):
    generator = torch.Generator().manual_seed(1)
    c = torch.tensor([[1, 5, 3, 0, 0], [1, 2, 7, 9, 0], [1, 11, 0, 0, 0]])[:n]
    return torch.randn(n, 1, height, width, generator=generator), torch.tensor([0.2, 0.5, 0.9])[:n], c


NULL = torch.tensor([[1, 0, 0, 0, 0]])


# ------------------------------------------------------------------ the convention
def test_signal_and_noise_at_three_times():
    flow, t = RectifiedFlow(), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    one, zero = torch.ones(3, 1, 1, 1), torch.zeros(3, 1, 1, 1)
    signal, noise = flow.q_sample(one, t, zero).flatten(), flow.q_sample(zero, t, one).flatten()
    assert torch.allclose(signal, 1 - t.float()) and torch.allclose(noise, t.float())
    log_snr = 2 * (signal / noise).log()
    assert torch.allclose(log_snr, torch.tensor([4.3944, 0.0, -4.3944]), atol=1e-4)


def test_the_embedding_multiplies_by_1000_once():
    embedder = stirred(model.ScaledEmbedder(16, 32))
    t = torch.tensor([0.3, 0.31])
    wave = time_embedding(torch.tensor([300.0, 310.0]), 32)
    by_hand = embedder.out(torch.nn.functional.silu(embedder.into(wave)))
    assert torch.allclose(embedder(t), by_hand, atol=1e-4)
    frequency = [10000 ** (-i / 16) for i in range(16)]
    assert torch.allclose(wave[0], torch.tensor([math.cos(300 * f) for f in frequency]
                                                + [math.sin(300 * f) for f in frequency]), atol=1e-4)


def test_embeddings_of_neighbouring_times_and_weights_differ():
    grid = RectifiedFlow().grid(50, 49).float()
    waves = time_embedding(1000 * grid, 256)
    assert (waves[1:] - waves[:-1]).abs().amax(1).min() > 1e-2
    forgotten = time_embedding(grid, 256)
    assert (forgotten[1:] - forgotten[:-1]).abs().mean() < 0.1 * (waves[1:] - waves[:-1]).abs().mean()
    waves = time_embedding(1000 * torch.linspace(1, 6, 51), 256)
    assert (waves[1:] - waves[:-1]).abs().amax(1).min() > 1e-2


# ------------------------------------------------------------------ rotary positions
def places(*ids):
    return model.rotations(torch.tensor(ids), (4, 6, 6))


def test_rotation_preserves_norms_of_every_pair():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 2, 16)
    pairs = lambda x: x.unflatten(-1, (8, 2)).norm(dim=-1)
    turned = model.rotate(x, places([5, 3, 11], [0, 250, 1]))
    assert torch.allclose(pairs(turned), pairs(x), atol=1e-5) and (turned - x).abs().max() > 1


def test_text_at_zero_is_not_turned():
    x = torch.randn(1, 2, 1, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.rotate(x, places([0, 0, 0])), x)


def test_scores_depend_on_relative_positions_only():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    score = lambda a, b: float((model.rotate(q, places(a)) * model.rotate(k, places(b))).sum())
    base = score([0, 2, 5], [1, 4, 1])
    for shift in ((0, 3, 0), (0, 0, 7), (2, 0, 0), (1, 20, -1)):
        moved = [[i + s for i, s in zip(ids, shift)] for ids in ([0, 2, 5], [1, 4, 1])]
        assert score(*moved) == pytest.approx(base, abs=1e-4)
    for axis in range(3):                              # and on each of the three axes
        other = [1, 4, 1]
        other[axis] += 1
        assert abs(score([0, 2, 5], other) - base) > 1e-3


def test_pairs_are_interleaved_and_each_axis_has_its_channels():
    torch.manual_seed(0)
    x, ids, axes = torch.randn(16, dtype=torch.float64), (2, 3, 7), (4, 6, 6)
    expected, at = [], 0
    for place, dim in zip(ids, axes):
        for j in range(dim // 2):
            angle = place * 10000 ** (-2 * j / dim)
            a, b = x[at], x[at + 1]
            expected += [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
            at += 2
    got = model.rotate(x.float().reshape(1, 1, 1, 16), places(ids)).flatten()
    assert torch.allclose(got, torch.tensor(expected).float(), atol=1e-5)
    cos, sin = places(ids)[0].real, places(ids)[0].imag                    # the other convention: halves, as in NeoX
    a, b = x.float()[:8], x.float()[8:]
    assert (torch.cat([a * cos - b * sin, a * sin + b * cos]) - got).abs().max() > 0.1


def test_values_are_not_turned():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 1, 16) for _ in range(3))
    assert torch.allclose(model.attend(q, k, v, places([0, 6, 9])), v, atol=1e-6)


def test_positions_of_a_canvas_that_is_not_square():
    ids = model.positions(2, 3)
    assert ids.tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]]


# ------------------------------------------------------------------ the blocks
def by_hand(block, x, vec, ids):
    """SingleBlock for one image in loops: x (N, D), vec (D,) the sum of the embeddings."""
    d, heads = x.shape[1], block.heads
    size = d // heads
    shift, scale, gate = block.adaln[1](torch.nn.functional.silu(vec)).split(d)
    h = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift
    everything = block.linear1(h)
    q, k, v = (everything[:, i * d:(i + 1) * d] for i in range(3))
    inner = everything[:, 3 * d:]
    inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner ** 3)))
    rms = lambda x, scale: x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt() * scale
    out = torch.zeros_like(x)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        turn = model.rotations(ids, (4, 2, 2))
        a = model.rotate(rms(q[:, part], block.norm_q.weight)[None, None], turn)[0, 0]           # norm, then turn
        b = model.rotate(rms(k[:, part], block.norm_k.weight)[None, None], turn)[0, 0]
        out[:, part] = torch.softmax(a @ b.T / math.sqrt(size), dim=1) @ v[:, part]
    return x + gate * block.linear2(torch.cat([out, inner], dim=1))


@torch.no_grad()
def test_single_block_is_parallel():
    block, torch_seed = stirred(model.SingleBlock(16, 2)), torch.manual_seed(0)
    x, emb, ids = torch.randn(2, 6, 16), torch.randn(2, 3, 16), torch.randint(0, 5, (6, 3), generator=torch_seed)
    got = block(x, emb, model.rotations(ids, (4, 2, 2)))
    for i in range(2):
        assert torch.allclose(got[i], by_hand(block, x[i], emb[i].sum(0), ids), atol=1e-4)


def test_blocks_are_the_identity_at_the_start_and_the_output_is_zero():
    torch.manual_seed(0)
    x, context, emb = torch.randn(2, 6, 16), torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    turn = model.rotations(torch.randint(0, 5, (9, 3)), (4, 2, 2))
    a, b = model.DoubleBlock(16, 2)(x, context, emb, turn)
    assert torch.equal(a, x) and torch.equal(b, context)
    assert torch.equal(model.SingleBlock(16, 2)(torch.cat([context, x], 1), emb, turn), torch.cat([context, x], 1))
    xt, t, c = batch()
    assert torch.equal(Flux(**SMALL)(xt, t, c, torch.ones(3)), torch.zeros_like(xt))


def test_layer_norms_have_no_weights_and_queries_and_keys_have_a_norm():
    for net in (model.DoubleBlock(16, 2), model.SingleBlock(16, 2), model.FinalLayer(16, 4)):
        norms = [name for name, part in net.named_modules() if isinstance(part, torch.nn.LayerNorm)]
        assert norms and not [name for name, _ in net.named_parameters() if name.rsplit(".", 1)[0] in norms]
    names = [name for name, part in Flux(**SMALL).named_modules() if isinstance(part, torch.nn.RMSNorm)]
    assert len(names) == 2 * 2 + 2 * 2                 # q and k of two streams, and of two single blocks


@torch.no_grad()
def test_text_comes_before_the_image_in_both_kinds_of_block():
    net = stirred(FluxTransformer(**CORE))
    places, seen = model.rotations(model.positions(3, 5), (4, 6, 6)), {}
    for name in ("doubles", "singles"):
        getattr(net, name)[0].register_forward_hook(
            lambda part, args, out, name=name: seen.update({name: (args, out)}))
    net(torch.randn(2, 15, 12), torch.randn(2, 4, 20), torch.randn(2, 10), torch.rand(2), torch.ones(2), places)
    turn = seen["doubles"][0][3]
    assert torch.equal(turn, seen["singles"][0][2]) and turn.shape == (19, 8)
    assert torch.equal(turn[:4], torch.ones(4, 8, dtype=torch.complex64))                # the text's four: no turn
    assert torch.equal(turn[4:], places)
    args, first = seen["doubles"]
    last = net.doubles[1](*first, *args[2:])
    assert torch.equal(seen["singles"][0][0], torch.cat([last[1], last[0]], dim=1))
    assert net.doubles[1].text.mlp.into.weight.shape == (128, 32)                        # unlike SD3's last block


@torch.no_grad()
def test_tokens_are_rows_of_patches_and_come_back_to_their_place():
    net = stirred(Flux(**SMALL))
    net.transformer = Echo()
    x, t, c = batch(2, 28, 44)
    assert torch.equal(net(x, t, c, torch.ones(2)), x)
    x = torch.arange(28 * 44.0).reshape(1, 1, 28, 44)
    net(x, t[:1], c[:1], torch.ones(1))
    assert torch.equal(net.transformer.seen[0, 12], x[0, 0, 4:8, 4:8].flatten())         # row 1, column 1 of 7 x 11
    with pytest.raises(ValueError, match="patch=4"):
        net(torch.zeros(1, 1, 28, 42), t[:1], c[:1], torch.ones(1))


class Echo(torch.nn.Module):
    axes = SMALL["axes"]

    def forward(self, x, *rest):
        self.seen = x
        return x


@torch.no_grad()
def test_a_network_with_rotary_positions_knows_no_place_but_the_texts():
    # All ids moved by the same amount: between image tokens nothing changes; towards the text, at 0, it does.
    net, ids = stirred(FluxTransformer(**CORE)), model.positions(3, 5)
    turn = lambda ids: model.rotations(ids, net.axes)
    inputs = torch.randn(2, 15, 12), torch.randn(2, 4, 20), torch.randn(2, 10), torch.rand(2), torch.ones(2)
    moved = ids + torch.tensor([0, 5, 9])
    no_text = inputs[0], inputs[1][:, :0], *inputs[2:]
    assert torch.allclose(net(*no_text, turn(ids)), net(*no_text, turn(moved)), atol=1e-4)
    assert (net(*inputs, turn(ids)) - net(*inputs, turn(moved))).abs().max() > 1e-2


@torch.no_grad()
def test_the_table_is_that_of_lesson_32_and_turns_nothing():
    net = stirred(reproduce.TableFlux(**SMALL))
    seen = {}
    net.transformer.register_forward_pre_hook(lambda part, args: seen.setdefault("args", args))
    x, t, c = batch(1, 28, 44)
    net(x, t, c, torch.ones(1))
    tokens, turn = seen["args"][0], seen["args"][5]
    cropped_sincos_2d = load("lesson_32", "model").cropped_sincos_2d
    table = cropped_sincos_2d(16, 7, 11, 64).float()
    assert torch.equal(turn, torch.ones(77, 4, dtype=torch.complex64))
    assert torch.allclose(tokens, net.stem(model.patchify(x, 4)) + table, atol=1e-6)
    small = cropped_sincos_2d(16, 7, 7, 64).float().reshape(7, 7, 16)
    assert torch.equal(small, table.reshape(7, 11, 16)[:, 2:9])             # the middle is what training has seen
    count = lambda net: sum(p.numel() for p in net.parameters())
    assert count(net) == count(Flux(**SMALL))


@torch.no_grad()
def test_the_arms_differ_in_their_positions_alone():
    torch.manual_seed(0)
    ours = stirred(Flux(**SMALL))
    torch.manual_seed(0)
    table = stirred(reproduce.TableFlux(**SMALL))
    weights = {name.replace("transformer.stem", "stem"): p for name, p in ours.state_dict().items()}
    assert weights.keys() == table.state_dict().keys()
    table.load_state_dict(weights)
    x, t, c = batch()
    w, turn = torch.ones(3), model.rotations(model.positions(7, 7), SMALL["axes"])
    tokens = lambda x: (table.stem(model.patchify(x, 4)), turn)
    assert (ours(x, t, c, w) - table(x, t, c, w)).abs().max() > 1e-3
    table.tokens = tokens                              # without the table, and turned: the same network
    assert torch.equal(ours(x, t, c, w), table(x, t, c, w))


# ------------------------------------------------------------------ schedule and sampler
def test_mu_is_linear_in_the_tokens():
    flow = RectifiedFlow()
    assert flow.mu(256) == pytest.approx(0.5) and flow.mu(4096) == pytest.approx(1.15)
    assert flow.mu(2176) == pytest.approx((0.5 + 1.15) / 2) and flow.mu(49) == pytest.approx(0.46496, abs=1e-5)


def test_times_end_at_1_and_0_and_are_shifted():
    flow = RectifiedFlow()
    grid = flow.grid(10, 4096)
    assert grid[0] == 1 and grid[-1] == 0 and (grid.diff() < 0).all() and grid.dtype == torch.float64
    t, e = torch.linspace(1, 0, 11, dtype=torch.float64)[:-1], math.exp(1.15)
    assert torch.allclose(grid[:-1], e / (e + (1 / t - 1)), rtol=1e-12)
    assert (flow.grid(10, 4096)[1:-1] > flow.grid(10, 256)[1:-1]).all()     # more tokens: more time at much noise
    assert torch.allclose(RectifiedFlow(base=0, most=0).grid(4, 49), torch.tensor([1, 0.75, 0.5, 0.25, 0.0]).double())


def test_training_times_are_logit_normal_and_not_shifted():
    torch.manual_seed(0)
    t = RectifiedFlow(mean=0.3, std=0.5).times.draw(20_000)
    logit = torch.logit(t)
    assert logit.mean() == pytest.approx(0.3, abs=0.02) and logit.std() == pytest.approx(0.5, abs=0.02)
    assert t.min() > 0 and t.max() < 1


def test_euler_is_exact_on_straight_paths_and_of_first_order_on_others():
    flow, n = RectifiedFlow(), torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    x0 = torch.full_like(n, 0.3)
    assert torch.allclose(flow.sample(lambda x, t: n - x0, n, flow.grid(3, 49)), x0, atol=1e-6)
    std, error = 0.5, []                               # data N(0, std^2): v is linear in x, and x at 0 is std n
    def v(x, t):
        t = t[:, None, None, None]
        return x * (t - (1 - t) * std ** 2) / ((1 - t) ** 2 * std ** 2 + t ** 2)
    for steps in (50, 100, 200):
        error.append(float((flow.sample(v, n, flow.grid(steps, 49)) - std * n).abs().max()))
    assert error[0] / error[1] == pytest.approx(2, rel=0.15) and error[1] / error[2] == pytest.approx(2, rel=0.1)


def test_sampler_asks_at_the_times_of_the_grid_and_gives_the_image_behind():
    flow, asked = RectifiedFlow(), []
    net = lambda x, t: asked.append(float(t[0])) or torch.ones_like(x)
    path = list(flow.reverse(net, torch.ones(1, 1, 1, 1), flow.grid(4, 49)))
    assert asked == pytest.approx(flow.grid(4, 49)[:-1].tolist()) and [t for t, _, _ in path] == pytest.approx(asked)
    assert all(x0.item() == pytest.approx(0, abs=1e-6) for _, _, x0 in path)             # the line ends at 0
    assert torch.allclose(path[-1][1], path[-1][2], atol=1e-6) and path[-1][1].item() == pytest.approx(0, abs=1e-6)


# ------------------------------------------------------------------ loss, guidance, distillation
def test_the_target_is_noise_minus_data():
    flow, x0 = RectifiedFlow(), torch.rand(64, 1, 3, 3)
    torch.manual_seed(0)
    oracle = lambda xt, t: (xt - x0) / t[:, None, None, None]               # the only velocity if x_0 is known
    assert flow.loss(oracle, x0) < 1e-6
    torch.manual_seed(0)
    assert flow.loss(lambda xt, t: -oracle(xt, t), x0) > 1                  # x_0 - n
    loss = flow.loss(lambda xt, t: torch.zeros_like(xt), torch.full((4000, 1, 3, 3), 0.5))
    assert float(loss) == pytest.approx(1 + 0.25, rel=0.05)


def test_network_is_asked_at_the_time_itself():
    seen, net = [], lambda xt, t: seen.append(t) or xt
    RectifiedFlow().loss(net, torch.zeros(100, 1, 2, 2))
    RectifiedFlow().distillation(net, net, torch.zeros(100, 1, 2, 2))
    assert len(seen) == 3 and torch.equal(seen[1], seen[2])                 # teacher and student at the same times
    assert all(0 < t.min() and t.max() < 1 and t.dtype == torch.float32 for t in seen)


@torch.no_grad()
def test_guidance_is_linear_in_w_and_1_is_plain_conditional():
    net, (x, t, c) = stirred(Flux(**SMALL)), batch()
    null = NULL.expand_as(c)
    v = {w: model.guided(net, c, null, w)(x, t) for w in (0.0, 1.0, 3.0)}
    assert torch.allclose(v[1.0], net(x, t, c, torch.ones(3)), atol=1e-5)
    assert torch.allclose(v[0.0], net(x, t, null, torch.ones(3)), atol=1e-5)
    assert torch.allclose(v[3.0], v[0.0] + 3 * (v[1.0] - v[0.0]), atol=1e-4)
    assert (v[3.0] - v[1.0]).abs().max() > 1e-2
    each = model.guided(net, c, null, torch.tensor([0.0, 1.0, 3.0]))(x, t)  # a weight for every sample
    assert torch.allclose(each, torch.stack([v[w][i] for i, w in enumerate((0.0, 1.0, 3.0))]), atol=1e-5)


def test_two_passes_keep_the_networks_own_input_at_1_also_without_caption():
    seen = []
    net = lambda x, t, c, w: seen.append((w, c)) or x
    x, t, c = batch()
    model.guided(net, c, NULL.expand_as(c), 4.0)(x, t)
    assert torch.equal(seen[0][0], torch.ones(6)) and torch.equal(seen[0][1], torch.cat([c, NULL.expand_as(c)]))
    model.given(net, c, 4.0)(x, t)
    assert torch.equal(seen[1][0], torch.full((3,), 4.0))


@torch.no_grad()
def test_guidance_input_says_nothing_at_first_then_something_to_every_caption():
    net, (x, t, c) = Flux(**SMALL), batch()
    assert torch.equal(net.transformer.guidance(torch.tensor([1.0, 4.0])), torch.zeros(2, 16))
    stirred(net)
    null = NULL.expand_as(c)
    for said in (c, null):                             # the empty caption has the input, too
        low, high = (model.given(net, said, w)(x, t) for w in (1.0, 4.0))
        assert (low - high).abs().amax((1, 2, 3)).min() > 1e-3


def test_distillation_learns_from_the_guided_teacher_without_changing_it():
    torch.manual_seed(0)
    flow, (x, _, c) = RectifiedFlow(), batch()
    teacher, w = stirred(Flux(**SMALL)), torch.tensor([1.0, 1.0, 1.0])
    student = copy.deepcopy(teacher)
    target = model.guided(teacher, c, NULL.expand_as(c), w)
    assert flow.distillation(model.given(student, c, w), target, x) < 1e-10   # at w = 1 the teacher is its own student
    w = torch.tensor([2.0, 4.0, 6.0])
    loss = flow.distillation(model.given(student, c, w), model.guided(teacher, c, NULL.expand_as(c), w), x)
    loss.backward()
    assert loss > 1e-3 and all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_distillation_reaches_zero_where_the_student_can_say_it():
    # Teacher a_c x, guided (a_0 + w (a_c - a_0)) x; student (p_c + w q_c) x: the minimum is p = a_0, q = a_c - a_0.
    torch.manual_seed(0)
    flow, a = RectifiedFlow(), torch.tensor([0.5, 2.0, -1.0])
    weights = torch.zeros(2, 3, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.05)
    teacher = lambda x, t, c, w: a[c[:, 0]][:, None, None, None] * x
    student = lambda x, t, c, w: (weights[0, c[:, 0]] + w * weights[1, c[:, 0]])[:, None, None, None] * x
    for _ in range(700):
        x0, c, w = torch.randn(64, 1, 2, 2), torch.randint(1, 3, (64, 1)), 1 + 5 * torch.rand(64)
        loss = flow.distillation(model.given(student, c, w), model.guided(teacher, c, 0 * c, w), x0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1e-3
    assert torch.allclose(weights[:, 1:], torch.stack([a[0].expand(2), a[1:] - a[0]]), atol=0.05)


def test_captions_are_dropped_per_sample():
    torch.manual_seed(0)
    c = model.drop(torch.full((4000, 5), 7), NULL, 0.1)
    gone = (c == NULL).all(1)
    assert float(gone.float().mean()) == pytest.approx(0.1, abs=0.015) and (c[~gone] == 7).all()


@torch.no_grad()
def test_pooled_text_is_a_bag_and_the_tokens_know_the_order():
    text = model.TextEncoders(12, 5, 6, 8, 2).eval()
    c = torch.tensor([[1, 5, 3, 0, 0], [1, 3, 5, 0, 0]])
    tokens, pooled = text(c)
    assert torch.allclose(pooled[0], text.bag.weight[[1, 5, 3]].mean(0), atol=1e-6)      # padding is not counted
    assert torch.allclose(pooled[0], pooled[1], atol=1e-6) and (tokens[0] - tokens[1]).abs().max() > 1e-2


@torch.no_grad()
def test_two_passes_of_a_network_agree():
    net, (x, t, c) = stirred(Flux(**SMALL)), batch()
    assert torch.equal(net(x, t, c, torch.ones(3)), net(x, t, c, torch.ones(3)))


@pytest.mark.parametrize("call, what", [
    (lambda: RectifiedFlow(std=0.0), "std"), (lambda: RectifiedFlow().grid(0, 49), "steps"),
    (lambda: Flux(**{**SMALL, "axes": (4, 4, 4)}), "axes"), (lambda: Flux(**{**SMALL, "axes": (3, 3, 2)}), "axes"),
    (lambda: Flux(**{**SMALL, "heads": 3}), "axes"),
])
def test_what_it_does_not_know_is_refused(call, what):
    with pytest.raises(ValueError, match=what):
        call()


# ------------------------------------------------------------------ diffusers
def numbers(shape, k):
    """Numbers in (-0.4, 0.4) that need no file and look random, different for every k."""
    wave = 43758.5453 * torch.sin(12.9898 * torch.arange(1, 1 + math.prod(shape), dtype=torch.float64) + 78.233 * k)
    return (0.8 * (wave - wave.floor()) - 0.4).float().reshape(shape)


def inputs():
    """x (2, 15, 12) of a canvas of 3 x 5 patches, context, pooled, t, w."""
    return (*(3 * numbers(shape, 100 + i) for i, shape in enumerate([(2, 15, 12), (2, 4, 20), (2, 10)])),
            torch.tensor([0.3, 0.91]), torch.tensor([3.5, 1.0]))


def names():
    """Our parameters -> those of FluxTransformer2DModel, to be put one below the other."""
    layers = {"stem": ["x_embedder"], "context": ["context_embedder"], "final.linear": ["proj_out"],
              "final.adaln.1": ["norm_out.linear"]}
    scales = {}
    for mine, theirs, parts in (("time", "timestep", ("into", "out")), ("guidance", "guidance", ("into", "out")),
                                ("pooled", "text", ("0", "2"))):
        layers |= {f"{mine}.{part}": [f"time_text_embed.{theirs}_embedder.linear_{i}"]
                   for i, part in enumerate(parts, 1)}
    for i in range(CORE["doubles"]):
        there = f"transformer_blocks.{i}"
        for stream, norm, qkv, out, ff, q in (("image", "norm1", "to_{}", "to_out.0", "ff", "norm_{}"),
                                              ("text", "norm1_context", "add_{}_proj", "to_add_out", "ff_context",
                                               "norm_added_{}")):
            here = f"doubles.{i}.{stream}"
            layers |= {f"{here}.adaln.1": [f"{there}.{norm}.linear"], f"{here}.out": [f"{there}.attn.{out}"],
                       f"{here}.qkv": [f"{there}.attn.{qkv.format(part)}" for part in "qkv"],
                       f"{here}.mlp.into": [f"{there}.{ff}.net.0.proj"], f"{here}.mlp.out": [f"{there}.{ff}.net.2"]}
            scales |= {f"{here}.norm_{part}": [f"{there}.attn.{q.format(part)}"] for part in "qk"}
    for i in range(CORE["singles"]):
        here, there = f"singles.{i}", f"single_transformer_blocks.{i}"
        layers |= {f"{here}.adaln.1": [f"{there}.norm.linear"], f"{here}.linear2": [f"{there}.proj_out"],
                   f"{here}.linear1": [*(f"{there}.attn.to_{part}" for part in "qkv"), f"{there}.proj_mlp"]}
        scales |= {f"{here}.norm_{part}": [f"{there}.attn.norm_{part}"] for part in "qk"}
    result = {f"{mine}.{kind}": [f"{one}.{kind}" for one in theirs] for mine, theirs in layers.items()
              for kind in ("weight", "bias")}
    return result | {f"{mine}.weight": [f"{one}.weight" for one in theirs] for mine, theirs in scales.items()}


def ported(shapes):
    """Our network with the weights that `numbers` gives to theirs: all of theirs are used, and all of ours set."""
    theirs = {name: numbers(shape, k) for k, (name, shape) in enumerate(sorted(shapes.items()))}
    assert sorted(one for parts in names().values() for one in parts) == sorted(theirs)
    state = {mine: torch.cat([theirs[one] for one in parts]) for mine, parts in names().items()}
    for kind in ("weight", "bias"):                    # theirs: scale, then shift
        scale, shift = state[f"final.adaln.1.{kind}"].chunk(2)
        state[f"final.adaln.1.{kind}"] = torch.cat([shift, scale])
    net = FluxTransformer(**CORE)
    net.load_state_dict(state)
    return net.eval()


def theirs_small(diffusers, **other):
    return diffusers.FluxTransformer2DModel(**dict(
        in_channels=12, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=20, pooled_projection_dim=10, guidance_embeds=True, axes_dims_rope=(4, 6, 6)) | other)


@torch.no_grad()
def make_fixture(diffusers):
    """Outputs and schedules by diffusers. `python tests/test_lesson_34.py` writes the fixture."""
    source = (Path(diffusers.__file__).parent / "pipelines/flux/pipeline_flux.py").read_text()   # needs transformers
    shift, found = next(n for n in ast.parse(source).body if getattr(n, "name", "") == "calculate_shift"), {}
    exec(compile(ast.Module([shift], []), "calculate_shift", "exec"), found)
    calculate_shift = found["calculate_shift"]
    net = theirs_small(diffusers).eval()
    shapes = {name: list(p.shape) for name, p in net.state_dict().items()}
    net.load_state_dict({name: numbers(shape, k) for k, (name, shape) in enumerate(sorted(shapes.items()))})
    x, context, pooled, t, w = inputs()
    out = net(hidden_states=x, encoder_hidden_states=context, pooled_projections=pooled, timestep=t, guidance=w,
              img_ids=model.positions(3, 5), txt_ids=torch.zeros(4, 3)).sample
    with torch.device("meta"):
        full = sum(p.numel() for p in diffusers.FluxTransformer2DModel(guidance_embeds=True).parameters())
    grids = []
    for tokens in (49, 256, 1024, 4096):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        mu = calculate_shift(tokens)
        scheduler.set_timesteps(sigmas=[1 - i / 8 for i in range(8)], mu=mu)
        x, path = numbers((1, 1, 2, 3), 5), []
        for i, time in enumerate(scheduler.timesteps):                      # steps, with a network that is linear in x
            x = scheduler.step(0.7 * x + 0.1 * (time / 1000), time, x).prev_sample
            path.append(x.flatten().tolist())
        grids.append({"tokens": tokens, "mu": mu, "times": scheduler.sigmas.tolist(), "x": path})
    return {"diffusers": diffusers.__version__, "shapes": shapes, "output": out.flatten().tolist(), "parameters": full,
            "grids": grids}


@torch.no_grad()
def assert_equal_to(fixture):
    net, (x, context, pooled, t, w) = ported(fixture["shapes"]), inputs()
    wide, tall = (model.rotations(model.positions(*size), net.axes) for size in ((3, 5), (5, 3)))
    got = net(x, context, pooled, t, w, wide)
    expected = torch.tensor(fixture["output"]).reshape(2, 15, 12)
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())) and expected.std() > 0.1
    for other in ((t, w + 1), (t / 2, w)):             # both inputs matter in it
        assert (net(x, context, pooled, *other, wide) - expected).abs().max() > 1e-2
    assert (net(x, context, pooled, t, w, tall) - expected).abs().max() > 1e-2
    flow = RectifiedFlow()
    for row in fixture["grids"]:
        assert flow.mu(row["tokens"]) == pytest.approx(row["mu"], rel=1e-12)
        grid = flow.grid(8, row["tokens"])
        assert torch.allclose(grid, torch.tensor(row["times"], dtype=torch.float64), atol=1e-6)
        path = flow.reverse(lambda x, t: 0.7 * x + 0.1 * t[:, None, None, None], numbers((1, 1, 2, 3), 5), grid)
        assert torch.allclose(torch.stack([x.flatten() for _, x, _ in path]), torch.tensor(row["x"]), atol=1e-6)


def test_equal_to_the_fixture_of_diffusers():
    assert_equal_to(json.loads(FIXTURE.read_text()))


def test_equal_to_diffusers():
    assert_equal_to(make_fixture(pytest.importorskip("diffusers", reason="pip install -e '.[reference]'")))


def test_defaults_are_flux_1s():
    with torch.device("meta"):                         # shapes without numbers
        net = FluxTransformer(channels=64, context=4096, pooled=768)
    assert sum(p.numel() for p in net.parameters()) == json.loads(FIXTURE.read_text())["parameters"] == 11_901_408_320


# ------------------------------------------------------------------ training and sampling
KEYS = ["smoke=true", "gpu=false", "device=cpu", "threads=1", "preview_every=0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A teacher and a student in smoke size: the folder of their run."""
    runs = tmp_path_factory.mktemp("runs")
    return load("lesson_34", "train").main([*KEYS, f"runs={runs}"]).folder


def weights(path):
    from safetensors.torch import load_file

    return load_file(path)


def test_student_starts_as_the_teacher_and_learns_the_weight(trained, tmp_path):
    train = load("lesson_34", "train")
    teacher, student = (weights(trained / name) for name in (train.TEACHER, "weights.safetensors"))
    assert teacher.keys() == student.keys() and any(not torch.equal(teacher[k], student[k]) for k in teacher)
    frozen = train.main([*KEYS, f"runs={tmp_path}", "lr_student=1e-30"]).folder           # it learns nothing more
    frozen = weights(frozen / "weights.safetensors")
    assert all(torch.equal(teacher[k], frozen[k]) for k in teacher)
    alone = train.main([*KEYS, f"runs={tmp_path / 'alone'}", "stages=[1, 0]", "steps=3"]).folder
    assert not (alone / train.TEACHER).exists()
    alone = weights(alone / "weights.safetensors")
    assert all(torch.equal(teacher[k], alone[k]) for k in teacher)          # the same three steps


def test_training_is_resumed_in_either_stage(trained, tmp_path, monkeypatch):
    train = load("lesson_34", "train")
    for stop in (2, 3, 5):                             # of six steps; the teacher is ready after three
        runs = tmp_path / str(stop)
        with monkeypatch.context() as patch:
            patch.setattr(Run, "_stop_wanted", lambda run, every, stop=stop: run.step == stop)
            with pytest.raises(KeyboardInterrupt):
                train.main([*KEYS, f"runs={runs}"])
        resumed = train.main([*KEYS, f"runs={runs}", "--resume"]).folder
        for name in (train.TEACHER, "weights.safetensors"):
            one, other = weights(resumed / name), weights(trained / name)
            assert all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("keys", [["stages=[1]"], ["stages=[0, 1]"], ["stages=[1, -1]"], ["guidance=[3, 1]"]])
def test_stages_that_make_no_sense_are_refused(keys, tmp_path):
    with pytest.raises(UserError, match="stages"):
        load("lesson_34", "train").main([*KEYS, *keys, f"runs={tmp_path}"])


def test_calls_of_student_and_teacher(trained):
    sample, run = load("lesson_34", "sample"), Run(ROOT / "lesson_34" / "sample.py", KEYS[:-1])
    flow, net, words = sample.loaded(run, run.read(trained / "weights.safetensors"), "teacher")
    how = lambda model, w, **other: Section(**dict(model=model, guidance=w, steps=3, batch=2) | other)
    assert [sample.passes(how(*one)) for one in (("student", 3.0), ("teacher", 3.0), ("teacher", 1.0))] == [1, 2, 1]
    rows = []
    net.register_forward_pre_hook(lambda part, args: rows.append(len(args[0])))
    draw = lambda seed, **other: sample.draw(flow, net, words, ["a thick 3"] * 4, how("teacher", 3.0, **other),
                                             torch.Generator().manual_seed(seed))
    x = draw(0)
    assert rows == [4] * 6                             # two batches, three steps, pairs of rows
    assert torch.allclose(x, draw(0, batch=4), atol=1e-5) and not torch.equal(x, draw(1))
    assert (draw(0, guidance=1.0) - x).abs().max() > 0 and sample.tokens(net, 44) == 77
    with pytest.raises(UserError, match="model=dev"):
        sample.loaded(run, run.read(trained / "weights.safetensors"), "dev")


def test_published_student_draws_captions_that_never_occurred_in_one_pass():
    sample, run = load("lesson_34", "sample"), Run(ROOT / "lesson_34" / "sample.py", KEYS[1:-1])
    flow, net, words = sample.loaded(run, run.read(run.published))
    texts = [caption(d, {"thickness": a, "slant": b}) for d in range(10) for a in range(3) for b in range(3)
             if held_out(d, a, b)]
    how = Section(model="student", guidance=3.0, steps=10, batch=20)
    found = follow(sample.draw(flow, net, words, texts, how, torch.Generator().manual_seed(0)), texts)
    assert found["accuracy"] >= 0.9 and min(found["thickness"], found["slant"]) >= 0.6
    teacher = sample.loaded(run, run.read(run.published), "teacher")[1]     # and says what the teacher's two passes say
    x, t = torch.randn(20, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.full((20,), 0.9)
    c = words(texts)
    with torch.no_grad():
        one, two = model.given(net, c, 3.0)(x, t), model.guided(teacher, c, words([""]).expand_as(c), 3.0)(x, t)
        plain = model.given(teacher, c)(x, t)
    assert (one - two).square().mean() < 0.5 * (plain - two).square().mean()


# ------------------------------------------------------------------ reproduce.py
def test_wide_canvases_hold_the_same_digits():
    x = torch.rand(40, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    left = torch.randint(17, (40,), generator=torch.Generator().manual_seed(0))
    wide = reproduce.widened(x, left, 44)
    assert wide.shape == (40, 1, 28, 44) and (wide == -1).sum((1, 2, 3)).min() == 28 * 16
    assert all(torch.equal(one[..., i:i + 28], image) for one, i, image in zip(wide, left.tolist(), x))


def test_error_on_a_canvas_is_that_of_the_velocity():
    flow = RectifiedFlow()
    x0, c = torch.rand(200, 1, 28, 28) * 2 - 1, torch.zeros(200, 5).long()
    net = lambda x, t, c, w: torch.zeros_like(x)
    errors = reproduce.errors(flow, net, x0, c, 0, "cpu")
    assert errors.shape == (200, 28) and float(errors.mean()) == pytest.approx(1 + float(x0.square().mean()), rel=0.01)
    exact = lambda x, t, c, w: (x - 0.5) / t[:, None, None, None]
    assert reproduce.errors(flow, exact, torch.full_like(x0, 0.5), c, 0, "cpu").max() < 1e-7


@torch.no_grad()
def test_a_block_in_sequence_is_a_double_block_without_text():
    block, torch_seed = stirred(reproduce.Sequential(16, 2)), torch.manual_seed(0)
    x, emb = torch.randn(2, 6, 16), torch.randn(2, 3, 16)
    turn = model.rotations(torch.randint(0, 5, (6, 3), generator=torch_seed), (4, 2, 2))
    double = model.DoubleBlock(16, 2)
    double.image.load_state_dict(block.state_dict())
    assert torch.allclose(block(x, emb, turn), double(x, x[:, :0], emb, turn)[0], atol=1e-5)
    count = lambda kind: sum(p.numel() for p in kind(64, 2).parameters())
    assert (count(model.SingleBlock), count(reproduce.Sequential)) == (62_208, 74_752)             # as the page says


if __name__ == "__main__":
    import diffusers

    FIXTURE.write_text(json.dumps(make_fixture(diffusers)) + "\n")


def test_training_drops_captions_and_draws_a_weight_for_every_sample(tmp_path, monkeypatch):
    train, rates, asked, made, fresh, teachers = load("lesson_34", "train"), [], [], {}, [], []
    drop, guide, average, adam = train.drop, train.guided, train.EMA, torch.optim.Adam

    def spy(net, c, null, w):
        fresh.append((len(made["adam"].state), int(made["ema"].n_averaged)))
        asked.append((c, null, w))
        teachers.append(net)
        return guide(net, c, null, w)

    monkeypatch.setattr(train, "drop", lambda c, null, p: rates.append(p) or drop(c, null, p))
    monkeypatch.setattr(train, "guided", spy)
    monkeypatch.setattr(train, "EMA", lambda *args: made.update(ema=average(*args)) or made["ema"])
    monkeypatch.setattr(torch.optim, "Adam",
                        lambda *args, **keys: made.update(adam=adam(*args, **keys)) or made["adam"])
    train.main([*KEYS, "drop=0.3", "guidance=[2, 5]", f"runs={tmp_path}"])
    assert rates == [0.3] * 6 and len(asked) == 3       # three steps of the teacher, three of the student
    w = torch.cat([w for _, _, w in asked])
    assert len(set(w.tolist())) == 24 and w.min() >= 2 and w.max() <= 5 and w.std() > 0.5
    assert all(null.shape == c.shape and not null[:, 1:].any() for c, null, _ in asked)  # the empty caption
    assert fresh[0] == (0, 0)                          # the student's optimizer and average begin anew
    assert len(set(map(id, teachers))) == 1 and not any(p.requires_grad for p in teachers[0].parameters())
    assert teachers[0] is not made["ema"].module       # which moves, and the teacher does not


@torch.no_grad()
def test_velocity_is_one_pass_at_w_or_two_that_w_combines():
    sample, net, (x, t, _) = load("lesson_34", "sample"), stirred(Flux(**SMALL)), batch()
    words = sample.Tokenizer(("<pad>", "<start>", "0", "1", "2", "3"), 5)
    c, null = words(["1", "2", "3"]), words([""]).expand(3, -1)
    how = lambda model, w: Section(model=model, guidance=w)
    once = sample.velocity(net, words, ["1", "2", "3"], how("student", 4.0))
    assert torch.equal(once(x, t), net(x, t, c, torch.full((3,), 4.0)))
    ones = torch.ones(3)
    expected = net(x, t, null, ones) + 4 * (net(x, t, c, ones) - net(x, t, null, ones))
    assert torch.allclose(sample.velocity(net, words, ["1", "2", "3"], how("teacher", 4.0))(x, t), expected, atol=1e-3)


def test_one_pass_and_two_draw_the_same_captions_from_the_same_noise(monkeypatch):
    seen, cfg = [], Section(n=100, sample_steps=20, held_out=160)
    run = Section(clock=lambda: 0.0, config=Section(reproduce=cfg, sample=Section(batch=128, guidance=3.0)))
    monkeypatch.setattr(reproduce, "network", lambda run, model="student": (None, model, None))
    monkeypatch.setattr(reproduce, "draw", lambda flow, net, words, said, how, generator: seen.append(
        (net, how.model, how.guidance, how.steps, generator.initial_seed(), said)) or torch.zeros(len(said), 1, 28, 28))
    monkeypatch.setattr(reproduce, "fid_to_test", lambda x: 0.0)
    monkeypatch.setattr(reproduce, "follow", lambda x, said: {})
    calls = [reproduce.compare(run, model, w, 7)["calls"] for model, w in (("student", 2.0), ("teacher", 2.0),
                                                                          ("teacher", 1.0))]
    assert calls == [20, 40, 20]                       # half of the calls; at w = 1 two passes are one
    assert [one[:5] for one in seen] == [("student", "student", 2.0, 20, 7), ("teacher", "teacher", 2.0, 20, 7),
                                         ("teacher", "teacher", 1.0, 20, 7)]
    assert all(one[5] == seen[0][5] for one in seen) and len(seen[0][5]) == 100
    for captions, kept in (("held-out", True), ("seen", False)):            # held-out triples, then seen ones
        reproduce.ask(run, captions, 5)
        *how, said = seen[-1]
        assert how == ["student", "student", 3.0, 20, 5] and len(said) == 160
        assert all(held_out(*triple(one)) == kept for one in said)


def triple(text):
    from utils.captions import read_caption

    one = read_caption(text)[0]
    return one["digit"], one["thickness"], one["slant"]


def test_error_of_the_velocity_is_a_share_of_its_variance(monkeypatch):
    noise = torch.randn(4000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    v_u = 2 * noise + 50 + 10 * torch.arange(2.0)
    v_c, step = v_u + 1, 1.0                           # the two passes: v_u + w
    monkeypatch.setattr(reproduce, "answers", lambda run, w: (v_c, v_u, v_u + w * step + 0.2))
    row = reproduce.velocity_error(None, 4.0)
    assert row["of_variance"] == pytest.approx(0.04 / 4, rel=0.05)          # at each pixel, not over the pixels
    assert row["guidance_of_variance"] == pytest.approx(9 / 4, rel=0.05) and row["goes"] == pytest.approx(4.2, rel=1e-4)
    assert reproduce.velocity_error(None, 1.0)["guidance_of_variance"] == pytest.approx(0, abs=1e-9)


@torch.no_grad()
def test_answers_are_those_of_teacher_and_student_at_test_images(monkeypatch):
    run = Run(ROOT / "lesson_34" / "reproduce.py", [*KEYS[1:-1], "velocities=4"])
    v_c, v_u, student = reproduce.answers(run, 3.0)
    (flow, one, words), (_, two, _) = reproduce.network(run), reproduce.network(run, "teacher")
    torch.manual_seed(0)
    data = reproduce.captioned("test", 1, limit=4, without_held_out=False)
    x0, c = reproduce.to_float(data.images), words([said[0] for said in data.captions])
    t, n = flow.times.draw(4), torch.randn(4, 1, 28, 28)
    xt, null = flow.q_sample(x0, t, n), words([""]).expand_as(c)
    for got, net, said, w in ((v_c, two, c, 1.0), (v_u, two, null, 1.0), (student, one, c, 3.0)):
        assert torch.allclose(got, net(xt, t.float(), said, torch.full((4,), w)), atol=1e-5)


def test_few_steps_are_shifted_by_the_mu_that_is_given(monkeypatch):
    run = Section(config=Section(reproduce=Section(n=8), sample=Section(batch=8)))
    seen, flow = [], RectifiedFlow()
    monkeypatch.setattr(reproduce, "network", lambda run: (flow, None, None))
    monkeypatch.setattr(reproduce, "draw", lambda flow, net, words, said, how, generator: seen.append(
        (flow.mu(49), flow.mu(4096), how.steps)))
    monkeypatch.setattr(reproduce, "fid_to_test", lambda x: 0.0)
    reproduce.few_steps(run, 0.3, 4)
    assert seen == [(0.3, 0.3, 4)]


def test_arms_of_the_canvas_learn_moved_digits_without_a_student(monkeypatch):
    seen = {}

    class Seen(Exception):
        pass

    def arms(self, arms, **how):
        seen.update(arms=arms, **how)
        raise Seen

    monkeypatch.setattr(reproduce.Claim, "arms", arms)
    monkeypatch.setattr(reproduce.Claim, "train", lambda self, *args, **how: None)
    with pytest.raises(Seen):
        reproduce.main(["smoke=true", "device=cpu", "threads=1"])
    assert {"kind=placed", "stages=[1, 0]", "steps=4"} == set(seen["keys"]) and seen["measure"] is reproduce.extrapolate
    table = seen["arms"]["table"]                      # nothing but the network's positions differs
    assert seen["arms"]["rotary"] == [] and table.keys == [] and table.names == {"Flux": reproduce.TableFlux}
