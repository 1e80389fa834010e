"""Lesson 21: the maths of rectified flow against closed forms, lesson 39 and diffusers' Euler scheduler."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from conftest import load
from utils import Section, UserError, Weights, digits, seeded

model = load("lesson_21", "model")
RectifiedFlow, Coupling = model.RectifiedFlow, model.Coupling
FIXTURE = Path(__file__).parent / "fixtures" / "rectified_flow_euler.json"
TIMES = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
MEAN, STD = 1.5, 0.5


class Gaussian(torch.nn.Module):
    """The exact velocity from N(0, 1) to N(mean, std^2), independent pairs: E[z1 - z0 | z_t]. (B, 1, H, W)."""

    def __init__(self, mean=MEAN, std=STD):
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, z, time):
        t = (time / 999)[:, None, None, None]
        variance = t ** 2 * self.std ** 2 + (1 - t) ** 2
        return self.mean + (t * self.std ** 2 - (1 - t)) / variance * (z - t * self.mean)


class Reflowed(torch.nn.Module):
    """The exact velocity of the pairs (z0, mean + std z0), which the flow of `Gaussian` makes."""

    def forward(self, z, time):
        t = (time / 999)[:, None, None, None]
        return MEAN + (STD - 1) * (z - t * MEAN) / (t * STD + 1 - t)


def constant(z, time):
    return torch.full_like(z, 0.7)


def noise(n=20_000, seed=0):
    return torch.randn(n, 1, 1, 1, generator=seeded(seed))


# ------------------------------------------------------------------ lines, clock, loss
def test_log_snr_at_three_times():
    # The convention box: z_t = alpha z_1 + sigma z_0 with alpha = t, sigma = 1 - t, read off from interpolate.
    flow, one, zero = RectifiedFlow(), torch.ones(3, 1, 1, 1), torch.zeros(3, 1, 1, 1)
    alpha, sigma = flow.interpolate(zero, one, TIMES).flatten(), flow.interpolate(one, zero, TIMES).flatten()
    assert (2 * (alpha.log() - sigma.log())).tolist() == pytest.approx([-4.394449, 0.0, 4.394449], abs=1e-5)
    assert load("lesson_39", "model").OT(0.0)(TIMES)[0].tolist() == TIMES.tolist()               # lesson 39's path


def test_clock_begins_at_t_min_and_network_sees_999_t():
    seen, flow = [], RectifiedFlow()
    flow.sample(lambda z, t: seen.append(t) or torch.zeros_like(z), torch.zeros(2, 1, 1, 1), steps=4)
    assert torch.stack(seen)[:, 0].tolist() == pytest.approx([0.999, 250.49925, 499.9995, 749.49975])
    assert all(t.shape == (2,) and t.dtype == torch.float32 for t in seen)
    assert flow.clock(1.0) == 1 and flow.clock(0.0) == 1e-3
    fine = torch.linspace(0, 1, 101, dtype=torch.float64)
    time_embedding = load("lesson_05", "model").time_embedding
    embedding = time_embedding(model.network_time(flow.clock(fine)), 32)
    assert embedding.diff(dim=0).abs().amax(1).min() > 1e-2
    assert time_embedding(flow.clock(fine), 32).diff(dim=0).norm(dim=1).max() < 0.05        # without the factor


def recording(seen):
    return lambda z, t: seen.append((z, t)) or torch.zeros_like(z)


def test_loss_is_the_squared_error_of_the_difference():
    torch.manual_seed(0)
    flow, seen, z0, z1 = RectifiedFlow(), [], torch.randn(2000, 1, 2, 2), torch.rand(2000, 1, 2, 2)
    loss = flow.loss(recording(seen), z0, z1)
    assert loss.item() == pytest.approx((z1 - z0).square().mean().item(), rel=1e-6)
    (z, time), = seen
    t = time.double() / 999
    assert torch.allclose(z, flow.interpolate(z0, z1, t), atol=1e-6)
    assert 1e-3 <= t.min() < 3e-3 and 0.998 < t.max() < 1 and abs(t.mean() - 0.5) < 0.02
    right = flow.loss(lambda z, t: z1 - z0, z0, z1)                             # the sign: from the start to the end
    assert right == 0


def test_distillation_sees_the_start_of_each_line_only():
    flow, seen, z0, z1 = RectifiedFlow(), [], torch.randn(50, 1, 2, 2), torch.rand(50, 1, 2, 2)
    loss = flow.loss(recording(seen), z0, z1, distil=True)
    (z, time), = seen
    assert time.tolist() == pytest.approx([0.999] * 50) and torch.allclose(z, z0, atol=5e-3)
    assert loss.item() == pytest.approx((z1 - z0).square().mean().item(), rel=1e-6)
    z, calls = flow.sample(lambda z, t: z1 - z0, z0, steps=1)                    # what it learns is one whole step
    assert torch.allclose(z, z1, atol=1e-5) and calls == 1


def test_minimum_of_the_loss_is_the_conditional_mean():
    torch.manual_seed(0)
    z0, z1, net = torch.randn(400_000), MEAN + STD * torch.randn(400_000), Gaussian()
    for t in (0.2, 0.8):
        z = t * z1 + (1 - t) * z0
        slope = torch.cov(torch.stack([z, z1 - z0]))[0, 1] / z.var()
        at = net(torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1), torch.full((2,), 999 * t)).flatten()
        assert slope.item() == pytest.approx((at[1] - at[0]).item(), abs=0.01)


# ------------------------------------------------------------------ the flow
def test_flow_of_gaussian_data_and_its_way_back():
    flow, z0 = RectifiedFlow(0.0), noise(200)
    z1, calls = flow.sample(Gaussian(), z0, "dopri5", tolerance=1e-6)
    assert torch.allclose(z1, MEAN + STD * z0, atol=1e-4) and calls > 10
    back, _ = flow.sample(Gaussian(), z1, "dopri5", tolerance=1e-6, backward=True)
    assert torch.allclose(back, z0, atol=1e-4)
    with_t_min, _ = RectifiedFlow().sample(Gaussian(), z0, "dopri5", tolerance=1e-6)              # costs little
    assert torch.allclose(with_t_min, z1, atol=5e-3)


@pytest.mark.parametrize("solver, order, a_step", [("euler", 1, 1), ("midpoint", 2, 2)])
def test_order_and_calls(solver, order, a_step):
    # The field -z^2 (1 + t) carries 2 to 1 / (1/2 + 1 + 1/2).
    error, field = [], lambda z, t: -z ** 2 * (1 + t[:, None, None, None] / 999)
    for steps in (40, 80):
        z1, calls = RectifiedFlow(0.0).sample(field, torch.full((1, 1, 1, 1), 2.0), solver, steps)
        assert calls == steps * a_step
        error.append(abs(z1.item() - 0.5))
    assert math.log2(error[0] / error[1]) == pytest.approx(order, abs=0.25)


def test_reflowed_pairs_need_one_step():
    z0 = noise(100)
    one, _ = RectifiedFlow(0.0).sample(Reflowed(), z0, steps=1)
    assert torch.allclose(one, MEAN + STD * z0, atol=1e-5)
    first, _ = RectifiedFlow(0.0).sample(Gaussian(), z0, steps=1)
    assert torch.allclose(first, torch.full_like(z0, MEAN), atol=1e-5)           # 1-rf in one step: the mean


def test_path_is_sample_step_by_step():
    flow, z0 = RectifiedFlow(), noise(30)
    z, v = flow.path(Gaussian(), z0, 7)
    assert z.shape == (8, 30, 1, 1, 1) and v.shape == (7, 30, 1, 1, 1)
    assert torch.allclose(z[-1], flow.sample(Gaussian(), z0, steps=7)[0], atol=1e-5)
    assert torch.allclose(z.diff(dim=0) * 7, v, atol=1e-5)


# ------------------------------------------------------------------ straightness and transport cost
def test_straightness_is_0_for_constant_speed_only():
    flow, z0 = RectifiedFlow(0.0), torch.randn(5, 1, 3, 3, generator=seeded(0))
    assert model.straightness(*flow.path(constant, z0, 10)).max() < 1e-9
    swing = lambda z, t: torch.cos(2 * math.pi * t / 999)[:, None, None, None] * torch.ones_like(z)
    assert model.straightness(*flow.path(swing, z0, 200)).tolist() == pytest.approx([9 * 0.5] * 5, rel=1e-3)
    uneven = lambda z, t: 2 * (t / 999)[:, None, None, None] * torch.ones_like(z)                # straight, not steady
    assert model.straightness(*flow.path(uneven, z0, 500)).tolist() == pytest.approx([9 / 3] * 5, rel=1e-2)
    straight, curved = (model.straightness(*flow.path(net, noise(500), 50)).mean() for net in (Reflowed(), Gaussian()))
    assert straight < 1e-9 and curved > 0.1


def test_transport_cost_of_gaussians():
    z0, z1 = noise(200_000), MEAN + STD * noise(200_000, 1)
    assert model.transport_cost(z0, z1).mean().item() == pytest.approx(MEAN ** 2 + STD ** 2 + 1, rel=0.01)
    flowed, _ = RectifiedFlow(0.0).sample(Gaussian(), z0, "midpoint", 50)
    assert model.transport_cost(z0, flowed).mean().item() == pytest.approx(MEAN ** 2 + (1 - STD) ** 2, rel=0.01)
    assert model.transport_cost(torch.zeros(3, 1, 2, 2), torch.ones(3, 1, 2, 2)).tolist() == [4, 4, 4]


def test_cost_falls_by_what_the_paths_cross_and_bend():
    # E||X1 - X0||^2 - E||Z1 - Z0||^2 = (the least loss, summed over pixels) + S. The README derives it.
    flow, net, z0, z1 = RectifiedFlow(0.0), Gaussian(), noise(60_000), MEAN + STD * noise(60_000, 1)
    torch.manual_seed(0)
    least = flow.loss(net, z0, z1).item()
    z, v = flow.path(net, z0, 200)
    bend = model.straightness(z, v).mean().item()
    fall = (model.transport_cost(z0, z1) - model.transport_cost(z[0], z[-1])).mean().item()
    assert fall == pytest.approx(2 * STD, rel=0.03) and least + bend == pytest.approx(fall, rel=0.02) and bend > 0.1
    torch.manual_seed(0)
    pairs = z0, MEAN + STD * z0
    assert flow.loss(Reflowed(), *pairs) < 1e-10                                 # reflowed pairs do not cross


# ------------------------------------------------------------------ pairs
class Images:
    """Stands for a data set: image number i is the number i everywhere."""

    def __init__(self, n=40):
        self.n = n

    def __len__(self):
        return self.n

    def batch(self, step, rank=0, world=1):
        index = torch.randperm(self.n, generator=seeded(step))[:8][rank::world]
        return index.float()[:, None, None, None].expand(-1, 1, 2, 2), index

    def first(self, n):
        return torch.arange(n).float()[:, None, None, None].expand(-1, 1, 2, 2), None


def test_pairs_stay_together():
    coupling = Coupling(None, Images(), 8, seed=3)
    z0 = torch.randn(100, 1, 2, 2)
    coupling.pairs = {"z0": z0.half(), "z1": 2 * z0.half() + 1}
    seen = []
    for step in range(20):
        a, b = coupling.batch(step)
        assert a.dtype == torch.float32 and torch.allclose(b, 2 * a + 1, atol=5e-3)
        seen.append(a[:, 0, 0, 0])
    assert len(torch.cat(seen).unique()) > 60                                    # and the batches differ
    again = coupling.batch(4)
    assert torch.equal(again[0], coupling.batch(4)[0]) and not torch.equal(again[0], coupling.batch(5)[0])
    parts = [coupling.batch(4, rank, 2) for rank in (0, 1)]
    assert torch.equal(torch.stack([parts[0][1], parts[1][1]], 1).flatten(0, 1), again[1])


def test_first_coupling_is_independent():
    torch.manual_seed(0)
    coupling, target = Coupling(None, Images(), 8), Images()
    (a, b), (c, d) = coupling.batch(0), coupling.batch(0)
    assert torch.equal(b, target.batch(0)[0]) and torch.equal(b, d) and not torch.equal(a, c)    # fresh noise each time
    transfer = Coupling(Images(30), Images(), 8)
    assert transfer.batch(1)[0].shape == (8, 1, 2, 2) and transfer.batch(1)[0].max() < 30
    assert torch.equal(coupling.starts(5), coupling.starts(5)) and coupling.starts(5).shape == (5, 1, 28, 28)
    assert torch.equal(coupling.starts(5), coupling.starts(9)[:5]) and len(transfer.starts(1000)) == 30


def trained_pairs(tmp_path, *keys):
    """A smoke training, and the pairs that 1-rf and 2-rf made in it."""
    train = load("lesson_21", "train")
    result = train.main(["smoke=true", "threads=1", "device=cpu", "precision=fp32", f"runs={tmp_path}", *keys])
    return result, *(train.load_file(result.folder / f"pairs_{stage}.safetensors") for stage in ("1-rf", "2-rf"))


def network(path):
    weights = Weights(path, "lesson_21")
    return weights.load(model.UNet(**weights.config["unet"])).eval()


def test_pairs_are_made_by_the_average_of_the_stage_before(tmp_path):
    result, *both = trained_pairs(tmp_path, "pairs=12", "preview_every=0")
    nets = [network(result.folder / f"{name}.safetensors") for name in ("1-rf", "2-rf")]
    for pairs, net in zip(both, nets):                                           # what is kept is the average
        assert torch.equal(pairs["z0"], torch.randn(12, 1, 28, 28, generator=seeded(0)).half())
        z1, _ = RectifiedFlow().sample(net, pairs["z0"].float(), "midpoint", 1)
        assert torch.allclose(pairs["z1"].float(), z1, atol=0.01)
    assert (both[0]["z1"].float() - both[1]["z1"].float()).abs().max() > 0.02    # training went on


def test_each_stage_starts_where_the_last_ended(tmp_path):
    # lr = tiny: nothing moves, so all three stages must hold the same network, the one of the start.
    result, *_ = trained_pairs(tmp_path, "lr=1e-12")
    nets = [network(result.folder / f"{name}.safetensors") for name in ("1-rf", "2-rf", "weights")]
    for one in nets[1:]:
        for a, b in zip(nets[0].parameters(), one.parameters()):
            assert torch.equal(a, b)


def test_each_stage_has_its_own_loss_ramp_and_average(tmp_path, monkeypatch):
    # Six steps in three stages of 3, 1 and 2: only the last distils, and ramp and average begin anew with each.
    train, distil, starts, ramps, averaged, moments = load("lesson_21", "train"), [], [], [], [], []
    loss, ramp, update, step = train.RectifiedFlow.loss, train.ramp, train.EMA.update, torch.optim.Adam.step
    def spied(self, net, *pair, **how):
        distil.append(how["distil"])
        starts.append(net.state_dict()["out.2.weight"].clone())
        return loss(self, net, *pair, **how)
    monkeypatch.setattr(train.RectifiedFlow, "loss", spied)
    monkeypatch.setattr(train, "ramp", lambda *args: ramps.append(args) or ramp(*args))
    monkeypatch.setattr(train.EMA, "update", lambda self, net: averaged.append(int(self.n_averaged)) or update(
        self, net))
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *args, **how: moments.append(len(self.state)) or step(
        self, *args, **how))
    result, *_ = trained_pairs(tmp_path, "pairs=8", "stages=[3, 1, 2]", "preview_every=0", "save_every=0")
    for name, at in (("1-rf", 3), ("2-rf", 4)):                                  # each begins with the average, in fp16
        assert torch.allclose(starts[at], network(result.folder / f"{name}.safetensors").out[2].weight, atol=1e-5)
    assert distil == [False] * 4 + [True] * 2
    assert ramps == [(0, 2, 3), (1, 2, 3), (2, 2, 3), (0, 2, 1), (0, 2, 2), (1, 2, 2)]
    assert averaged == [0, 1, 2, 0, 0, 1]
    assert [n == 0 for n in moments] == [True, False, False, True, True, False]   # Adam forgets the stage before


def test_two_data_sets_are_paired_at_random(tmp_path, monkeypatch):
    # With the same digits at both ends an image must not meet itself, or all lines would be points.
    train, seen = load("lesson_21", "train"), []
    loss = train.RectifiedFlow.loss
    monkeypatch.setattr(train.RectifiedFlow, "loss", lambda self, net, z0, z1, **how: seen.append((z0, z1)) or loss(
        self, net, z0, z1, **how))
    train.main(["smoke=true", "steps=2", "stages=[1, 0, 0]", "source=digits", "target=digits", "threads=1",
                "device=cpu", "preview_every=0", f"runs={tmp_path}"])
    for z0, z1 in seen:
        assert (z0 - z1).flatten(1).norm(dim=1).min() > 1


def test_resume_gives_the_same_weights(tmp_path, monkeypatch):
    # Stages of 3, 1 and 2 steps. Stopped in step 3 or 4, the last checkpoint is the end of a stage, before its pairs.
    train, keys = load("lesson_21", "train"), ["smoke=true", "threads=1", "device=cpu", "save_every=1",
                                               "stages=[3, 1, 2]", "preview_every=0"]
    whole, loss = train.main([*keys, f"runs={tmp_path}/whole"]), train.RectifiedFlow.loss
    for stop in (2, 3, 4, 5):
        calls = itertools.count()

        def interrupted(*args, calls=calls, stop=stop, **kwargs):
            if next(calls) == stop:
                raise KeyboardInterrupt
            return loss(*args, **kwargs)

        monkeypatch.setattr(train.RectifiedFlow, "loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.main([*keys, f"runs={tmp_path}/{stop}"])
        monkeypatch.undo()
        resumed = train.main([*keys, f"runs={tmp_path}/{stop}", "--resume"])
        for a, b in zip(network(resumed.weights).parameters(), network(whole.weights).parameters(), strict=True):
            assert torch.equal(a, b)


def test_shares_of_the_stages(tmp_path):
    train = load("lesson_21", "train")
    plan = lambda steps, *stages: train.stages(Section(steps=steps, stages=list(stages)))
    assert plan(6000, 0.5, 0.3, 0.2) == [("1-rf", 0, 3000), ("2-rf", 3000, 4800), ("distilled", 4800, 6000)]
    assert plan(10, 1.0, 0.0, 0.0) == [("1-rf", 0, 10)] and plan(1, 0.5, 0.3, 0.2) == [("1-rf", 0, 1)]
    assert plan(10, 1.0, 0.0, 1.0) == [("1-rf", 0, 5), ("distilled", 5, 10)]
    for key in ("stages=[0.0, 1.0, 1.0]", "stages=[1.0, 1.0]", "stages=[1.0, -1.0, 1.0]", "target=noise"):
        with pytest.raises(UserError, match=key.partition("=")[0]):
            train.main(["smoke=true", key, f"runs={tmp_path}"])
    assert not list(tmp_path.iterdir())


def test_source_and_target_by_name(tmp_path):
    subset, data = load("lesson_21", "sample").subset, digits("train", 8)
    assert subset("noise", data) is None and len(subset("digits", data)) == 60_000
    threes = subset("3", data, seed=5)
    assert len(threes) == 6131 and set(threes.batch(0)[1].tolist()) == {3}
    assert not torch.equal(threes.batch(0)[0], subset("3", data, seed=6).batch(0)[0])
    with pytest.raises(UserError, match="there is no class 3 in mnist: 0, 1, 2, 3"):
        subset("3", digits("test", 1, limit=2))
    with pytest.raises(UserError, match="three"):
        load("lesson_21", "train").main(["smoke=true", "source=three", f"runs={tmp_path}"])


def test_noise_and_a_solver_exclude_each_other(tmp_path):
    with pytest.raises(UserError, match="solver=midpoint"):
        load("lesson_21", "sample").main(["noise=1", "solver=midpoint", "model=1-rf", f"runs={tmp_path}"])


# ------------------------------------------------------------------ noise on the way
def test_score_is_the_gradient_of_the_log_density():
    flow, z = RectifiedFlow(0.0), torch.linspace(-2, 3, 11).reshape(-1, 1, 1, 1)
    for t in (0.0, 0.3, 0.9):
        v = Gaussian()(z, torch.full((11,), 999 * t))
        exact = -(z - t * MEAN) / (t ** 2 * STD ** 2 + (1 - t) ** 2)
        assert torch.allclose(flow.score(z, v, t), exact, atol=1e-4)
        assert torch.allclose(flow.predict_z1(z, v, t) - v, z - t * v, atol=1e-5)                # the line's two ends
    t = 0.5
    wrong = flow.score(z, Reflowed()(z, torch.full((11,), 999 * t)), t)          # of reflowed pairs it is another
    assert (wrong + (z - t * MEAN) / (t * STD + 1 - t) ** 2).abs().max() > 0.1


def moments(z):
    return z.mean().item(), z.std().item()


def uncorrected(net, z, steps, s):
    """The stochastic step with the official code's drift."""
    generator = seeded(1)
    for i in range(steps):
        t = i / steps
        v, sigma = net(z, torch.full((len(z),), 999 * t)), s * (1 - t)
        drift = v + sigma ** 2 / (2 * (1 - t) ** 2) * (0.5 * t * (1 - t) * v - 0.5 * (2 - t) * z)
        z = z + drift / steps + sigma / steps ** 0.5 * torch.randn(z.shape, generator=generator)
    return z


def test_stochastic_sampler_keeps_the_marginals():
    flow, z0 = RectifiedFlow(0.0), noise(100_000)
    for strength in (0.0, 1.0):
        mean, std = moments(flow.stochastic(Gaussian(), z0, 200, strength, seeded(1)))
        assert mean == pytest.approx(1.500, abs=0.01) and std == pytest.approx(0.500, abs=0.01)
    mean, std = moments(uncorrected(Gaussian(), z0, 200, 1.0))
    assert mean == pytest.approx(1.33, abs=0.02) and std == pytest.approx(0.459, abs=0.01)


def test_noise_0_is_euler_and_the_last_step_adds_none():
    flow, z0 = RectifiedFlow(), noise(20)
    assert torch.allclose(flow.stochastic(Gaussian(), z0, 5, 0.0), flow.sample(Gaussian(), z0, steps=5)[0], atol=1e-5)
    one = flow.stochastic(Gaussian(), z0, 1, 1.0)
    assert torch.equal(one, flow.stochastic(Gaussian(), z0, 1, 1.0))
    a, b = (flow.stochastic(Gaussian(), z0, 5, 1.0, seeded(i)) for i in (0, 1))
    assert not torch.equal(a, b) and torch.equal(a, flow.stochastic(Gaussian(), z0, 5, 1.0, seeded(0)))


# ------------------------------------------------------------------ refusals, network
@pytest.mark.parametrize("call, what", [
    (lambda: RectifiedFlow(-0.1), "t_min"), (lambda: RectifiedFlow(1.0), "t_min"),
    (lambda: RectifiedFlow().sample(constant, noise(1), "rk45"), "solver"),
    (lambda: RectifiedFlow().sample(constant, noise(1), steps=0), "steps"),
    (lambda: RectifiedFlow().sample(constant, noise(1), tolerance=0.0), "tolerance"),
])
def test_what_it_does_not_know_is_refused(call, what):
    with pytest.raises(ValueError, match=what):
        call()


def test_loss_trains_the_network():
    torch.manual_seed(0)
    net = model.UNet(channels=8, mults=(1, 2), blocks=1, attention=(), dropout=0.0, groups=4, patch=2, image_size=8)
    z0, z1 = torch.randn(4, 1, 8, 8), torch.rand(4, 1, 8, 8)
    loss = RectifiedFlow().loss(net, z0, z1)
    loss.backward()
    assert loss.item() == pytest.approx((z1 - z0).square().mean().item(), rel=1e-5)               # it starts at zero
    assert net.out[2].weight.grad.abs().max() > 0


# ------------------------------------------------------------------ what the claim is measured with
def test_fresh_noise_is_not_the_noise_of_the_pairs():
    starts, coupling = load("lesson_21", "sample").starts, Coupling(None, None, 1, 0)
    fresh, seen = starts("noise", 4, 0), coupling.starts(4)
    assert torch.cdist(fresh.flatten(1), seen.flatten(1)).min() > 20
    assert torch.equal(fresh, starts("noise", 6, 0)[:4]) and not torch.equal(fresh, starts("noise", 4, 1))
    assert starts("3", 5, 0).shape == (5, 1, 28, 28)


def test_distances():
    reproduce = load("lesson_21", "reproduce")
    pool = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)])
    assert reproduce.nearest(torch.full((1, 1, 2, 2), 0.9), pool) == pytest.approx(0.1, abs=1e-6)
    assert reproduce.rms(torch.zeros(3, 1, 2, 2), torch.full((3, 1, 2, 2), 0.5)) == 0.5
    flow = RectifiedFlow()
    x, calls = reproduce.carry(flow, constant, noise(5), batch=2, solver="midpoint", steps=3)
    assert x.shape == (5, 1, 1, 1) and calls == 6


# ------------------------------------------------------------------ diffusers, after t -> 1 - t
def toy(z, t):
    """A velocity that is neither linear nor constant; t (B,) in [0, 1]."""
    return torch.sin(3 * z) + (1 - 2 * t[:, None, None, None]) * z + 0.5


def ours(steps):
    z, _ = RectifiedFlow(0.0).path(lambda z, t: toy(z, t / 999), torch.linspace(-2, 2, 5).reshape(5, 1, 1, 1), steps)
    return z.flatten(1).tolist()


def theirs(steps):
    """The same trajectory of diffusers: its sigma is 1 - t, its velocity points to the noise."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    z = torch.linspace(-2, 2, 5).reshape(5, 1, 1, 1)
    path = [z]
    for t in scheduler.timesteps:
        z = scheduler.step(-toy(z, (1 - t / 1000).expand(5)), t, z).prev_sample
        path.append(z)
    return torch.stack(path).flatten(1).tolist()


def test_euler_is_that_of_diffusers():
    for steps, path in json.loads(FIXTURE.read_text()).items():
        for mine, reference in zip(ours(int(steps)), path, strict=True):
            assert mine == pytest.approx(reference, abs=1e-5)


def test_fixture_is_what_diffusers_says():
    pytest.importorskip("diffusers")
    for steps, path in json.loads(FIXTURE.read_text()).items():
        for again, reference in zip(theirs(int(steps)), path, strict=True):
            assert again == pytest.approx(reference, abs=1e-6)


if __name__ == "__main__":
    FIXTURE.write_text(json.dumps({str(steps): theirs(steps) for steps in (1, 4, 10)}) + "\n")
