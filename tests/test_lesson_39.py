"""Lesson 39: the maths of flow matching against closed forms, lesson 05's network, torchcfm and flow_matching."""

import json
import math
from pathlib import Path

import pytest
import torch

from conftest import load

model = load("lesson_39", "model")
FlowMatching, OT, VP = model.FlowMatching, model.OT, model.VP
FIXTURE = Path(__file__).parent / "fixtures" / "flow_matching_paths.json"
TIMES = (0.1, 0.5, 0.9)
ScoreMatching = load("lesson_39", "reproduce").ScoreMatching                     # of the VP path: the paper's baseline
ARMS = pytest.mark.parametrize("flow", [FlowMatching("ot"), FlowMatching("vp"), ScoreMatching("vp")],
                               ids=["FM-OT", "FM-VP", "SM"])


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


class Gaussian(torch.nn.Module):
    """What the best network predicts for data N(mean, std^2), in closed form. (B, 1, H, W)."""

    def __init__(self, flow, mean=0.3, std=0.5):
        super().__init__()
        self.flow, self.mean, self.std = flow, mean, std

    def forward(self, x, time):
        a, s, da, ds = self.flow.coefficients(time.double() / 1000)
        spread = a ** 2 * self.std ** 2 + s ** 2
        if isinstance(self.flow, ScoreMatching):
            return s * (x - a * self.mean) / spread                              # E[eps | x]
        return da * self.mean + (a * da * self.std ** 2 + s * ds) / spread * (x - a * self.mean)


class Points(torch.nn.Module):
    """The exact field for data that are a few points: E[u_t(x | x_0) | x], a softmax over the points. (B, 1, 1, D)."""

    def __init__(self, flow, points):
        super().__init__()
        self.flow, self.points = flow, points

    def forward(self, x, time):
        a, s, da, ds = self.flow.coefficients(time.double() / 1000)
        distance = ((x[:, None] - a[:, None] * self.points) / s[:, None]).square().flatten(2).sum(2)
        x0 = (torch.softmax(-distance / 2, 1)[:, :, None, None, None] * self.points).sum(1)
        return ds / s * (x - a * x0) + da * x0


# ------------------------------------------------------------------ conditional paths
def test_mean_and_deviation_at_three_times():
    a, s, da, ds = OT(1e-5)(double(*TIMES))
    assert a.tolist() == pytest.approx(TIMES, abs=1e-12)
    assert s.tolist() == pytest.approx([0.900001, 0.500005, 0.100009], abs=1e-12)
    assert da.tolist() == [1, 1, 1] and ds.tolist() == pytest.approx([-0.99999] * 3, abs=1e-12)
    a, s, _, _ = VP()(double(*TIMES))
    integral = [0.1 * (1 - t) + 19.9 * (1 - t) ** 2 / 2 for t in TIMES]          # of beta, from the data
    assert a.tolist() == pytest.approx([math.exp(-0.5 * i) for i in integral], abs=1e-12)
    assert (a ** 2 + s ** 2).tolist() == pytest.approx([1, 1, 1], abs=1e-12)


def test_time_runs_from_noise_to_data():
    for path in (OT(), VP()):
        a, s, da, ds = path(double(0, 0.25, 0.5, 0.75, path.end))
        assert a[0] < 0.01 and s[0] > 0.9999 and a[-1] > 0.9999 and s[-1] < 0.0011
        assert (a.diff() > 0).all() and (s.diff() < 0).all() and (da > 0).all() and (ds[1:] < 0).all()
    assert VP()(double(0))[0].item() ** 2 == pytest.approx(4.32e-5, rel=1e-3)    # abar of lesson 07 at diffusion time 1


def test_log_snr_at_three_times():
    # The convention box: x_t = a x_0 + s eps, read off from q_sample, against the log-SNR of each path.
    one, zero, t = torch.ones(3, 1, 1, 1), torch.zeros(3, 1, 1, 1), double(*TIMES)
    integral = 0.1 * (1 - t) + 9.95 * (1 - t) ** 2
    expected = {"ot": 2 * (t / (1 - (1 - 1e-5) * t)).log(), "vp": -torch.expm1(integral).log()}
    for path, log_snr in expected.items():
        flow = FlowMatching(path)
        a, s = flow.q_sample(one, t, zero).flatten(), flow.q_sample(zero, t, one).flatten()
        assert torch.allclose(2 * (a.log() - s.log()), log_snr.float(), atol=1e-5)


@pytest.mark.parametrize("path", [OT(), OT(0.1), OT(0.0), VP(), VP(0.5, 5.0)])
def test_derivatives(path):
    t = double(0.05, 0.3, 0.6, 0.95).requires_grad_()
    a, s, da, ds = path(t)
    assert torch.allclose(torch.autograd.grad(a.sum(), t, retain_graph=True)[0], da, rtol=1e-10)
    assert torch.allclose(torch.autograd.grad(s.sum(), t)[0], ds, rtol=1e-10)


@pytest.mark.parametrize("path", ["ot", "vp"])
def test_u_is_the_derivative_of_psi(path):
    # Theorem 3: d psi_t(eps) / dt = u_t(psi_t(eps) | x_0), and `target` is the same without a division by s.
    torch.manual_seed(0)
    flow, t, h = FlowMatching(path), double(0.1, 0.5, 0.9, 0.97), 1e-5
    x0, eps = torch.randn(2, 4, 1, 2, 2, dtype=torch.float64)
    psi = lambda t: sum(c[:, None, None, None] * x for c, x in zip(flow.path(t), (x0, eps)))
    slope = (psi(t + h) - psi(t - h)) / (2 * h)
    assert torch.allclose(flow.target(x0, t, eps), slope, rtol=1e-5, atol=1e-5)
    assert torch.allclose(flow.u(flow.q_sample(x0, t, eps), x0, t), slope, rtol=1e-4, atol=1e-4)


def test_ot_is_equations_20_to_23():
    torch.manual_seed(0)
    flow, t, s_min = FlowMatching(s_min=0.1), double(0.2, 0.7), 0.1
    x, x0, eps = torch.randn(3, 2, 1, 2, 2)
    T = t.float()[:, None, None, None]
    assert torch.allclose(flow.u(x, x0, t), (x0 - (1 - s_min) * x) / (1 - (1 - s_min) * T), rtol=1e-5)
    assert torch.allclose(flow.q_sample(x0, t, eps), (1 - (1 - s_min) * T) * eps + T * x0, rtol=1e-5)
    assert torch.allclose(flow.target(x0, t, eps), x0 - (1 - s_min) * eps, rtol=1e-5)


def test_ot_goes_straight_and_vp_does_not():
    t, x0, eps = torch.linspace(0, 0.999, 50, dtype=torch.float64), double(1, 0.5), double(-1, 1)
    for path, straight in (("ot", True), ("vp", False)):
        a, s, _, _ = FlowMatching(path).path(t)
        x = a[:, None] * x0 + s[:, None] * eps
        length, chord = x.diff(dim=0).norm(dim=1).sum(), (x[-1] - x[0]).norm()
        assert (length / chord < 1 + 1e-9) == straight and (straight or length / chord > 1.03)
        assert straight or x[:, 1].max() > 1.02                                  # it overshoots, and comes back


def test_vp_field_is_the_probability_flow_of_lesson_07():
    # dx = [f - g^2 score / 2] dt of the VP-SDE with f = -beta x / 2, g^2 = beta, its time reversed.
    torch.manual_seed(0)
    flow, t, x = ScoreMatching("vp"), double(0.0, 0.3, 0.9), torch.randn(3, 1, 2, 2)
    net = Gaussian(flow)
    a, s, _, _ = flow.coefficients(t)
    score = -(x - a * 0.3) / (a ** 2 * 0.25 + s ** 2)
    beta = (0.1 + 19.9 * (1 - t)).float()[:, None, None, None]
    assert torch.allclose(flow.velocity(net, x, t), 0.5 * beta * (x + score), rtol=1e-3, atol=1e-4)
    other = FlowMatching("vp")
    assert torch.allclose(other.velocity(Gaussian(other), x, t), 0.5 * beta * (x + score), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("path", ["ot", "vp"])
def test_predict_x0_undoes_the_field(path):
    torch.manual_seed(0)
    flow, t = FlowMatching(path), double(0.05, 0.5, 0.95)
    x0, eps = torch.randn(2, 3, 1, 2, 2)
    xt = flow.q_sample(x0, t, eps)
    assert torch.allclose(flow.predict_x0(xt, flow.target(x0, t, eps), t), x0, atol=1e-4)


# ------------------------------------------------------------------ the loss
@ARMS
def test_loss_is_a_plain_squared_error(flow):
    x0 = torch.rand(64, 1, 2, 2) * 2 - 1
    torch.manual_seed(3)
    loss = flow.loss(lambda x, t: 0.5 * x, x0)
    torch.manual_seed(3)
    t = flow.path.end * torch.rand(64, dtype=torch.float64)
    eps = torch.randn_like(x0)
    target = eps if isinstance(flow, ScoreMatching) else flow.target(x0, t, eps)
    xt = flow.q_sample(x0, t, eps)
    assert loss.item() == pytest.approx((0.5 * xt - target).square().mean().item(), rel=1e-6)


@pytest.mark.parametrize("path", ["ot", "vp"])
def test_minimum_of_the_loss_is_the_marginal_field(path):
    # Theorem 2: regression on the conditional fields of single images finds the field of all of them.
    torch.manual_seed(0)
    flow, n = FlowMatching(path), 400_000
    x0 = 0.3 + 0.5 * torch.randn(n, 1, 1, 1)
    for t in (0.2, 0.8):
        time = torch.full((n,), t, dtype=torch.float64)
        eps = torch.randn_like(x0)
        x, y = flow.q_sample(x0, time, eps).flatten().double(), flow.target(x0, time, eps).flatten().double()
        slope, intercept = torch.linalg.lstsq(torch.stack([x, torch.ones_like(x)], 1), y[:, None]).solution.flatten()
        at = flow.velocity(Gaussian(flow), torch.tensor([0.0, 1.0])[:, None, None, None], time[:2]).flatten()
        assert intercept.item() == pytest.approx(at[0].item(), abs=0.02)
        assert (slope + intercept).item() == pytest.approx(at[1].item(), abs=0.02)


@pytest.mark.parametrize("path", ["ot", "vp"])
def test_flow_matching_is_score_matching_with_another_weight(path):
    # An error d of the noise is an error -(beta / 2 s) d of the field on the VP path, -d / t on the OT path.
    torch.manual_seed(0)
    flow, t = FlowMatching(path), double(0.1, 0.5, 0.9)
    x, eps, wrong = torch.randn(3, 3, 1, 2, 2)
    a, s, _, _ = flow.coefficients(t)
    field = lambda noise: flow.target((x - s * noise) / a, t, noise)
    T = t.float()[:, None, None, None]
    factor = (0.1 + 19.9 * (1 - T)) / (2 * s) if path == "vp" else 1 / T
    assert torch.allclose(field(eps) - field(wrong), -factor * (eps - wrong), rtol=1e-3, atol=1e-4)


def test_noise_is_not_paired_with_the_data():
    # "OT path" is not "minibatch OT": what the loss draws does not depend on which images it sees.
    flow, seen = FlowMatching(), []
    net = lambda x, time: seen.append((x, time)) or torch.zeros_like(x)
    x0 = torch.rand(8, 1, 2, 2)
    for data in (x0, x0.flip(0)):
        torch.manual_seed(0)
        flow.loss(net, data)
    noises = [x - flow.coefficients(time.double() / 1000)[0] * data for (x, time), data in zip(seen, (x0, x0.flip(0)))]
    assert torch.equal(seen[0][1], seen[1][1]) and torch.allclose(noises[0], noises[1], atol=1e-5)


def test_loss_trains_the_network():
    torch.manual_seed(0)
    flow, x0 = FlowMatching(), torch.rand(4, 1, 8, 8) * 2 - 1
    net = model.UNet(channels=8, mults=(1, 2), blocks=1, attention=(), dropout=0.0, groups=4, patch=2, image_size=8)
    first = flow.loss(net, x0)
    first.backward()
    assert first.item() == pytest.approx(1 + 1 / 3, rel=0.2)                     # the network starts at zero
    assert net.out[2].weight.grad.abs().max() > 0


# ------------------------------------------------------------------ the flow: solver, calls
@ARMS
def test_flow_on_gaussian_data(flow):
    # The flow of Gaussian data is linear: psi_t(eps) = a m + sqrt(a^2 std^2 + s^2) / S_0 (eps - a_0 m).
    torch.manual_seed(0)
    eps = torch.randn(4, 1, 2, 2)
    x, calls = flow.sample(Gaussian(flow), eps, tolerance=1e-6)
    a, s, _, _ = flow.path(double(0, flow.path.end))
    S = (a ** 2 * 0.25 + s ** 2).sqrt()
    expected = a[1] * 0.3 + S[1] / S[0] * (eps - a[0] * 0.3)
    assert torch.allclose(x, expected.float(), atol=2e-4) and calls > 10


@pytest.mark.parametrize("solver, order, a_step", [("euler", 1, 1), ("midpoint", 2, 2), ("rk4", 4, 4)])
def test_order_and_calls_of_the_fixed_solvers(solver, order, a_step):
    # The field -x^2 (1 + t) carries 2 to 1 / (1/2 + 1 + 1/2).
    error = []
    for steps in {1: (64, 128), 2: (32, 64), 4: (4, 8)}[order]:
        x, calls = FlowMatching().sample(lambda x, t: -x ** 2 * (1 + t[:, None, None, None] / 1000),
                                         torch.tensor([[[[2.0]]]]), solver, steps)
        assert calls == steps * a_step
        error.append(abs(x.item() - 0.5))
    assert math.log2(error[0] / error[1]) == pytest.approx(order, abs=0.4)


def test_calls_are_calls_of_the_network():
    flow, asked = FlowMatching(), []
    net = Gaussian(flow)
    for solver in model.SOLVERS:
        asked.clear()
        _, calls = flow.sample(lambda x, t: asked.append(t) or net(x, t), torch.randn(3, 1, 2, 2), solver, 5, 1e-3)
        assert calls == len(asked) and all(t.shape == (3,) for t in asked)
    asked.clear()
    x = torch.randn(3, 1, 2, 2)
    _, _, calls = flow.log_likelihood(lambda x, t: asked.append(t) or net(x, t), x, model.signs(x), 1e-3)
    assert calls == len(asked)
    loose, tight = (flow.sample(net, torch.randn(3, 1, 2, 2), tolerance=tol)[1] for tol in (1e-2, 1e-5))
    assert tight > loose


def test_exact_field_on_the_ot_path_needs_fewer_calls():
    # The sanity arm of the claim: with no error of a network, the OT path is cheaper, and ends on the data.
    torch.manual_seed(0)
    points, eps = torch.randn(20, 1, 1, 2), torch.randn(64, 1, 1, 2)
    calls = {}
    for path in ("ot", "vp"):
        flow = FlowMatching(path)
        x, calls[path] = flow.sample(Points(flow, points), eps, tolerance=1e-4)
        assert torch.cdist(x.flatten(1), points.flatten(1)).min(1).values.max() < 0.02
    assert calls["ot"] < 0.8 * calls["vp"]


def test_times_give_the_way():
    flow, eps = FlowMatching(), torch.randn(3, 1, 2, 2)
    times = torch.linspace(0, 1, 5, dtype=torch.float64)
    for solver in ("dopri5", "midpoint"):
        way, _ = flow.sample(Gaussian(flow), eps, solver, times=times)
        assert way.shape == (5, 3, 1, 2, 2) and torch.equal(way[0], eps)
        assert torch.allclose(way[-1], flow.sample(Gaussian(flow), eps, solver, 4)[0], atol=1e-4)


def test_state_and_time_of_the_solver_are_float64():
    # In float32 the last time of the VP path, 1 - 1e-5, would be known to two digits of what is left.
    flow, seen = FlowMatching("vp"), []
    velocity = flow.velocity
    flow.velocity = lambda net, x, t: seen.append(t) or velocity(net, x, t)
    eps = torch.randn(2, 1, 2, 2)
    flow.sample(Gaussian(flow), eps, tolerance=1e-3)
    flow.log_likelihood(Gaussian(flow), eps, model.signs(eps), 1e-3)
    assert {t.dtype for t in seen} == {torch.float64}
    assert min((1 - t).min().item() for t in seen) == pytest.approx(1e-5, rel=1e-6)


# ------------------------------------------------------------------ likelihood and bits
@ARMS
def test_likelihood_of_gaussian_data(flow):
    torch.manual_seed(0)
    x = 0.3 + 0.5 * torch.randn(4, 1, 2, 2)
    units = torch.eye(4).reshape(4, 1, 1, 2, 2).expand(4, 4, 1, 2, 2)
    exact, noise, calls = flow.log_likelihood(Gaussian(flow), x, units, 1e-6)
    a, s, _, _ = (c.float() for c in flow.path(double(0, flow.path.end)))
    S = (a ** 2 * 0.25 + s ** 2).sqrt()
    start = a[0] * 0.3 + S[0] / S[1] * (x - a[1] * 0.3)                          # the flow's noise, in closed form
    density = torch.distributions.Normal(0, 1).log_prob(start) + (S[0] / S[1]).log()
    assert torch.allclose(exact, density.flatten(1).sum(1), atol=1e-3) and calls > 10
    assert torch.allclose(noise, start, atol=1e-3)
    normal = torch.distributions.Normal(0.3, 0.5).log_prob(x).flatten(1).sum(1)
    assert torch.allclose(exact, normal, atol=1e-3 if isinstance(flow.path, OT) else 1e-2)  # VP: a = 0.0066
    estimated, again, _ = flow.log_likelihood(Gaussian(flow), x, model.signs(x), 1e-6)
    assert torch.allclose(estimated, exact, atol=1e-3)                           # a diagonal Jacobian: no spread
    assert torch.allclose(noise, again, atol=1e-4)
    assert torch.allclose(flow.sample(Gaussian(flow), noise, tolerance=1e-6)[0], x, atol=1e-3)     # there and back


def test_likelihood_is_a_density():
    # Data at two points, s_min 0.3: the field is not linear, and exp(log p) must sum to 1 over the line.
    flow = FlowMatching(s_min=0.3)
    net = Points(flow, torch.tensor([-1.0, 0.7]).reshape(2, 1, 1, 1))
    x = torch.linspace(-3, 3, 241).reshape(-1, 1, 1, 1)
    log_p, _, _ = flow.log_likelihood(net, x, torch.ones(1, 241, 1, 1, 1), 1e-6)
    assert torch.trapezoid(log_p.exp(), x.flatten()).item() == pytest.approx(1, abs=1e-3)
    normal = torch.distributions.Normal(torch.tensor([-1.0, 0.7]), 0.3)
    exact = normal.log_prob(x.reshape(-1, 1)).exp().mean(1)
    assert torch.allclose(log_p.exp(), exact, atol=2e-3)


def test_hutchinson_is_unbiased():
    torch.manual_seed(0)
    matrix, x = torch.randn(4, 4), torch.randn(5, 1, 2, 2, requires_grad=True)
    v = ((x.flatten(1) ** 2) @ matrix.T).reshape(x.shape)
    trace = (2 * x.flatten(1) * matrix.diagonal()).sum(1)
    units = torch.eye(4).reshape(4, 1, 1, 2, 2)
    assert torch.allclose(model.divergence(v, x, units), trace, atol=1e-5)
    probes = torch.cat([model.signs(x) for _ in range(4000)])
    assert set(probes.unique().tolist()) == {-1, 1}
    assert torch.allclose(model.divergence(v, x, probes) / 4000, trace, atol=0.25)


def test_bits_of_known_densities():
    # A uniform density on [-1, 1] tells nothing of 256 grey levels: 8 bits.
    assert model.bits_per_dim(torch.tensor([784 * math.log(0.5)]), 784).item() == pytest.approx(8, abs=1e-5)
    # With all mass on the right bin of width 1/128 nothing is left to say.
    assert model.bits_per_dim(torch.tensor([784 * math.log(128.0)]), 784).item() == pytest.approx(0, abs=1e-5)
    # A flow that stands still has the density of the noise.
    flow, x = FlowMatching(), torch.rand(2, 1, 28, 28) * 2 - 1
    log_p, _, _ = flow.log_likelihood(lambda x, t: 0 * x, x, model.signs(x))
    expected = x.square().flatten(1).mean(1) / (2 * math.log(2)) + 0.5 * math.log2(2 * math.pi) + 7
    assert torch.allclose(model.bits_per_dim(log_p, 784), expected, atol=1e-4)


def test_dequantise_fills_the_bins_of_the_grey_levels():
    k = torch.arange(256.0).reshape(1, 1, 16, 16)
    x0, generator = k / 127.5 - 1, torch.Generator().manual_seed(0)
    draws = torch.stack([model.dequantise(x0, generator) for _ in range(400)])
    assert draws.min() >= -1 and draws.max() < 1
    assert (draws >= k / 128 - 1).all() and (draws <= (k + 1) / 128 - 1).all()
    assert torch.allclose(draws.mean(0), (k + 0.5) / 128 - 1, atol=1e-3)
    assert all(torch.allclose(model.quantise(x), x0, atol=1e-6) for x in draws)
    assert model.quantise(torch.tensor([-1.3, 1.0, 1.7])).tolist() == [-1, 1, 1]


# ------------------------------------------------------------------ the network's time, refusals
def test_network_time_tells_neighbours_apart():
    seen, time_embedding = [], load("lesson_05", "model").time_embedding
    flow = FlowMatching()
    flow.sample(lambda x, t: seen.append(t) or torch.zeros_like(x), torch.zeros(1, 1, 1, 1), "euler", 100)
    assert torch.cat(seen).tolist() == pytest.approx([10 * i for i in range(100)], abs=1e-3)
    embedding = time_embedding(torch.cat(seen), 32)
    assert embedding.diff(dim=0).abs().amax(1).min() > 1e-2
    assert time_embedding(torch.cat(seen) / 1000, 32).diff(dim=0).norm(dim=1).max() < 0.05   # without the factor


@pytest.mark.parametrize("call, what", [
    (lambda: FlowMatching("ve"), "path"), (lambda: FlowMatching(s_min=1.0), "s_min"),
    (lambda: FlowMatching("vp", beta_min=30.0), "beta_min"),
    (lambda: FlowMatching().sample(None, torch.zeros(1, 1, 1, 1), "heun"), "solver"),
    (lambda: FlowMatching().sample(None, torch.zeros(1, 1, 1, 1), steps=0), "steps"),
    (lambda: FlowMatching().sample(None, torch.zeros(1, 1, 1, 1), tolerance=0.0), "tolerance"),
    (lambda: FlowMatching().sample(None, torch.zeros(1, 1, 1, 1), "euler", 4, times=double(0, 1)), "steps=4"),
])
def test_what_it_does_not_know_is_refused(call, what):
    with pytest.raises(ValueError, match=what):
        call()


# ------------------------------------------------------------------ the scripts: what they train on, draw and measure
def test_training_images_are_densities(tmp_path, monkeypatch):
    # On grey levels the likelihood has no bound: every batch must be spread over the bins before the loss sees it.
    train, seen = load("lesson_39", "train"), []
    loss = train.FlowMatching.loss
    monkeypatch.setattr(train.FlowMatching, "loss", lambda self, net, x0: seen.append(x0) or loss(self, net, x0))
    train.main(["smoke=true", "steps=2", "threads=1", "device=cpu", "preview_every=0", f"runs={tmp_path}"])
    for x0 in seen:
        bins = (x0 + 1) * 128
        assert bins.min() >= 0 and bins.max() < 256
        assert (bins - bins.floor()).mean().item() == pytest.approx(0.5, abs=0.02)
    assert len(seen) == 2


def test_samples_are_grey_levels_and_keep_their_order():
    sample, flow, eps = load("lesson_39", "sample"), FlowMatching(), torch.randn(5, 1, 2, 2)
    x, calls = sample.draw(flow, lambda x, t: 0 * x, eps, 2, "euler", 3, 1e-3)
    assert torch.equal(x, model.quantise(eps)) and calls == 3


def test_bits_of_test_images_with_the_same_noise_every_time():
    # A flow that stands still: the bits are those of the dequantised images under the unit Gaussian.
    likelihood, flow = load("lesson_39", "sample").likelihood, FlowMatching()
    x0 = (torch.arange(3 * 784.0) % 256 / 127.5 - 1).reshape(3, 1, 28, 28)
    bits, _ = likelihood(flow, lambda x, t: 0 * x, x0, 1e-3)
    x = model.dequantise(x0, torch.Generator().manual_seed(0))
    expected = x.square().flatten(1).mean(1) / (2 * math.log(2)) + 0.5 * math.log2(2 * math.pi) + 7
    assert torch.allclose(bits, expected, atol=1e-4)
    assert torch.equal(bits, likelihood(flow, lambda x, t: 0 * x, x0, 1e-3)[0])


@pytest.mark.parametrize("path", ["ot", "vp"])
def test_exact_field_of_images_is_that_of_points(path):
    torch.manual_seed(0)
    flow, images = FlowMatching(path), torch.randn(5, 1, 28, 28)
    x, time = 0.3 * torch.randn(4, 1, 28, 28), 1000 * double(0.05, 0.2, 0.5, 0.8)
    exact = load("lesson_39", "reproduce").Exact(flow, images)
    assert torch.allclose(exact(x, time), Points(flow, images)(x, time), rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------ torchcfm and flow_matching
def cases():
    """x0 (the data), eps and x for the comparison: (3, 1, 1, 4) each, made without a random number."""
    base = torch.arange(12.0).reshape(3, 1, 1, 4)
    return torch.sin(base), torch.cos(3 * base), torch.sin(2 * base + 1)


def ours():
    """Path statistics and fields of both paths at TIMES."""
    x0, eps, x = cases()
    t, result = double(*TIMES), {}
    flows = {"ot": FlowMatching(s_min=0.1), "cond_ot": FlowMatching(s_min=0.0), "vp": FlowMatching("vp")}
    for name, flow in flows.items():
        a, s, da, ds = flow.path(t)
        result[name] = {"a": a.tolist(), "s": s.tolist(), "da": da.tolist(), "ds": ds.tolist(),
                        "xt": flow.q_sample(x0, t, eps).flatten().tolist(), "u": flow.u(x, x0, t).flatten().tolist(),
                        "target": flow.target(x0, t, eps).flatten().tolist()}
    return result


def theirs():
    """The same of torchcfm 1.0.7 (ot) and flow_matching 1.0.10 (cond_ot, vp)."""
    from flow_matching.path import AffineProbPath
    from flow_matching.path.scheduler import CondOTScheduler, VPScheduler
    from torchcfm.conditional_flow_matching import TargetConditionalFlowMatcher

    x0, eps, x = cases()
    t, matcher = torch.tensor(TIMES), TargetConditionalFlowMatcher(sigma=0.1)
    result = {"ot": {"a": (matcher.compute_mu_t(None, torch.ones(3), t)).tolist(),
                     "s": matcher.compute_sigma_t(t).tolist(),
                     "u": matcher.compute_conditional_flow(None, x0, t, x).flatten().tolist(),
                     "xt": (matcher.compute_mu_t(None, x0, t)
                            + matcher.compute_sigma_t(t)[:, None, None, None] * eps).flatten().tolist()}}
    for name, scheduler in (("cond_ot", CondOTScheduler()), ("vp", VPScheduler(0.1, 20.0))):
        made, sample = scheduler(t), AffineProbPath(scheduler).sample(x_0=eps, x_1=x0, t=t)
        result[name] = {"a": made.alpha_t.tolist(), "s": made.sigma_t.tolist(),
                        "da": torch.as_tensor(made.d_alpha_t).expand(3).tolist(),
                        "ds": torch.as_tensor(made.d_sigma_t).expand(3).tolist(),
                        "xt": sample.x_t.flatten().tolist(), "target": sample.dx_t.flatten().tolist()}
    return result


def test_paths_are_those_of_torchcfm_and_flow_matching():
    mine, reference = ours(), json.loads(FIXTURE.read_text())
    for name, numbers in reference.items():
        for key, values in numbers.items():
            assert mine[name][key] == pytest.approx(values, rel=1e-4, abs=2e-6), f"{name}.{key}"


def test_fixture_is_what_they_say():
    pytest.importorskip("torchcfm")
    pytest.importorskip("flow_matching")
    for name, numbers in theirs().items():
        for key, values in json.loads(FIXTURE.read_text())[name].items():
            assert numbers[key] == pytest.approx(values, rel=1e-5, abs=1e-6)
