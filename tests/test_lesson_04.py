"""Lesson 04: the techniques of NCSNv2 against closed forms, brute force, and the constants of the paper's models."""

import math

import pytest
import torch

from conftest import load
from utils import EMA, Section, digits

model = load("lesson_04", "model")
train = load("lesson_04", "train")
NCSNv2, UNet = model.NCSNv2, model.UNet
SMALL = dict(channels=8, mults=(1, 2), blocks=1, attention=(), dropout=0.0, groups=4, patch=2)


class Point(torch.nn.Module):
    """Exact for data that is one point: net(x) = sigma s = -(x - point) / sigma, if told the level."""

    def __init__(self, point=0.0):
        super().__init__()
        self.point, self.sigma = point, None

    def forward(self, x):
        return -(x - self.point) / self.sigma


class Pair(Point):
    """Exact for data that are two points: all pixels 0, or all 1."""

    def forward(self, x):
        distance2 = torch.stack([(x - k).flatten(1).square().sum(1) for k in (0, 1)], 1)           # (B, 2)
        weight = (-distance2 / (2 * self.sigma.flatten()[:, None] ** 2)).softmax(1)
        return -(x - weight[:, 1, None, None, None]) / self.sigma


class Levels(NCSNv2):
    """NCSNv2 that tells a Point which level it is at."""

    def score(self, net, x, i):
        if isinstance(net, Point):
            net.sigma = self.sigmas[i].float()[:, None, None, None]
        return super().score(net, x, i)


# ------------------------------------------------------------------ Technique 1
@pytest.mark.parametrize("n, block", [(60, 7), (61, 1000), (33, 1)])
def test_largest_distance_is_that_of_all_pairs(n, block):
    torch.manual_seed(n)
    x = torch.rand(n, 1, 5, 6) * torch.rand(n, 1, 1, 1)
    assert model.max_distance(x, block) == pytest.approx(torch.cdist(x.flatten(1), x.flatten(1)).max().item(), rel=1e-5)


def test_largest_distance_needs_the_unit_interval():
    with pytest.raises(ValueError, match="negative"):
        model.max_distance(torch.full((2, 1, 4, 4), -1.0))


def test_settings_compute_sigma_1_from_the_data():
    # Two cheap facts about the real data: the value is the distance of a pair, and it bounds a random sample's.
    found = train.settings(Section(sigma_1="auto", sigma_L=0.01), digits("train"))
    assert found.dim == 784 and found.sigma_1 == pytest.approx(16.8758, abs=1e-3) and found.sigma_L == 0.01
    x = model.to_unit(digits("train").first(1000, shuffle_seed=0)[0]).flatten(1)
    assert torch.cdist(x, x).max().item() < found.sigma_1
    assert train.settings(Section(sigma_1=2.0, sigma_L=0.5), digits("test")).sigma_1 == 2.0


def test_why_the_largest_distance_counts():
    # Two Gaussians at distance r: a point of one is taken for the other's with a mean probability of at most
    # 1/2 exp(-r^2 / 8 sigma^2), by quadrature over the line through both. At r = sigma it is not small, at 17 it is.
    grid = torch.linspace(-60, 60, 200_001, dtype=torch.float64)
    for r in (1.0, 4.0, 17.0):
        a, b = (-(grid - m) ** 2 / 2 for m in (0, r))
        taken = ((a.exp() / math.sqrt(2 * math.pi)) * torch.sigmoid(b - a)).sum().item() * (120 / 200_000)
        assert taken <= 0.5 * math.exp(-r ** 2 / 8) and taken > 0.02 * math.exp(-r ** 2 / 8)


# ------------------------------------------------------------------ Technique 2
def test_normal_cdf():
    assert model.normal_cdf(0) == 0.5 and model.normal_cdf(1.959963985) == pytest.approx(0.975, abs=1e-9)


def test_overlap_is_that_of_the_shells():
    # The radius of N(0, sigma^2 I) drawn, not approximated: the mass of level i within the shell of level i - 1.
    torch.manual_seed(0)
    dim, gamma = 784, 1.06
    radius = torch.distributions.Chi2(torch.tensor(float(dim))).sample((400_000,)).sqrt()          # sigma_i = 1
    low, high = (math.sqrt(dim) * gamma + side * 3 * gamma / math.sqrt(2) for side in (-1, 1))
    inside = ((radius > low) & (radius < high)).float().mean().item()
    assert model.overlap(gamma, dim) == pytest.approx(inside, abs=0.01)
    assert model.overlap(1, dim) == pytest.approx(0.9973, abs=1e-4)


@pytest.mark.parametrize("dim", [30, 784, 3072, 49152])
def test_spacing_solves_technique_2(dim):
    gamma = model.spacing(dim)
    assert model.overlap(gamma, dim) == pytest.approx(0.5, abs=1e-9)
    assert model.overlap(gamma - 1e-3 * (gamma - 1), dim) > 0.5 > model.overlap(gamma + 1e-3 * (gamma - 1), dim)


def test_spacing_for_mnist():
    assert model.spacing(784) == pytest.approx(1.0820, abs=5e-5)
    assert len(model.noise_levels(17, 0.01, model.spacing(784))) == 95
    with pytest.raises(ValueError, match="no shell"):
        model.spacing(4)


def test_noise_levels_are_geometric():
    process = NCSNv2(17.0)
    ratio = process.sigmas[:-1] / process.sigmas[1:]
    assert process.sigmas.dtype == torch.float64 and process.levels == 95
    assert process.sigmas[[0, -1]].tolist() == pytest.approx([17, 0.01], rel=1e-12)
    assert torch.allclose(ratio, ratio[0], rtol=1e-12) and process.gamma == pytest.approx(1.0823, abs=5e-5)
    closest = [abs((17 / 0.01) ** (1 / (count - 1)) - model.spacing(784)) for count in (94, 95, 96)]
    assert closest[1] == min(closest)


@pytest.mark.parametrize("sigma_1, sigma_L", [(1, 1), (0.01, 1), (1, 0), (1, -1), (-1, 0.01)])
def test_bad_levels_are_refused(sigma_1, sigma_L):
    with pytest.raises(ValueError, match="sigma_L"):
        NCSNv2(sigma_1, sigma_L)


# ------------------------------------------------------------------ Technique 4
@pytest.mark.parametrize("sigma_1, levels, T, reported, dim",
                         [(50, 232, 5, "6.2e-06", 3072), (90, 500, 5, "3.3e-06", 12288)])
def test_reported_constants_are_recovered(sigma_1, levels, T, reported, dim):
    gamma = (sigma_1 / 0.01) ** (1 / (levels - 1))
    assert f"{model.solve_step_size(0.01, gamma, T):.1e}" == reported
    assert model.overlap(gamma, dim) == pytest.approx(0.567, abs=5e-4)


@pytest.mark.parametrize("levels, T, expected", [(95, 5, 1.1e-5), (95, 10, 8.6e-6), (96, 11, 8.2e-6)])
def test_step_sizes_for_mnist(levels, T, expected):
    gamma = (17 / 0.01) ** (1 / (levels - 1))
    assert model.solve_step_size(0.01, gamma, T) == pytest.approx(expected, rel=0.015)


@pytest.mark.parametrize("gamma, T", [(1.0823, 1), (1.0823, 3), (1.0376, 5), (1.5, 20), (1.0823, 200)])
def test_step_size_is_the_best_on_a_grid(gamma, T):
    grid = torch.linspace(1e-4, 1.99, 20_000, dtype=torch.float64).tolist()
    best = min(grid, key=lambda u: abs(model.variance_ratio(u * 0.25, 0.5, gamma, T) - 1))
    assert model.solve_step_size(0.5, gamma, T) / 0.25 == pytest.approx(best, abs=2e-4)


def test_step_size_scales_with_the_smallest_noise():
    # alpha_i / sigma_i^2 is what counts: epsilon / sigma_L^2 does not depend on sigma_L.
    ratios = [model.solve_step_size(sigma, 1.08, 5) / sigma ** 2 for sigma in (0.01, 0.3, 2.0)]
    assert ratios == pytest.approx([ratios[0]] * 3, rel=1e-6)


def test_variance_ratio_is_that_of_the_chain():
    # Follow the variance of x through the linear steps, level by level; then draw the chain itself.
    torch.manual_seed(0)
    process, T = Levels(0.2, 0.05, dim=100), 4
    epsilon = model.solve_step_size(0.05, process.gamma, T)
    for i in (1, process.levels - 1):
        sigma2, before = process.sigmas[i].item() ** 2, process.sigmas[i - 1].item() ** 2
        alpha, variance = epsilon * sigma2 / 0.05 ** 2, before
        for _ in range(T):
            variance = (1 - alpha / sigma2) ** 2 * variance + 2 * alpha
        assert model.variance_ratio(epsilon, 0.05, process.gamma, T) == pytest.approx(variance / sigma2, rel=1e-9)
    start, variance = 0.2 * torch.randn(4000, 1, 4, 4), 0.2 ** 2
    for level, x, _ in process.anneal(Point(), start, T):
        alpha = epsilon * process.sigmas[level].item() ** 2 / 0.05 ** 2
        variance = (1 - alpha / process.sigmas[level].item() ** 2) ** 2 * variance + 2 * alpha
    assert x.var().item() == pytest.approx(variance, rel=0.02)


# ------------------------------------------------------------------ Technique 3 and the loss
def test_log_snr_at_three_levels():
    # The convention box: x_i = x_0 + sigma_i z, so alpha = 1 and log SNR = -2 log sigma.
    process, one, zero = NCSNv2(17.0), torch.ones(3, 1, 1, 1), torch.zeros(3, 1, 1, 1)
    i = torch.tensor([0, 47, 94])
    alpha, sigma = process.q_sample(one, i, zero).flatten(), process.q_sample(zero, i, one).flatten()
    assert torch.equal(alpha, torch.ones(3))
    expected = [-2 * math.log(17), -math.log(17 * 0.01), 4 * math.log(10)]
    assert (-2 * sigma.log()).tolist() == pytest.approx(expected, rel=1e-5)


def test_score_is_the_output_over_sigma():
    process, x = NCSNv2(17.0), torch.randn(3, 1, 4, 4)
    i = torch.tensor([0, 30, 94])
    score = process.score(lambda x: torch.ones_like(x), x, i)
    assert torch.allclose(score[:, 0, 0, 0].double(), 1 / process.sigmas[i], rtol=1e-6)


def test_loss_of_an_output_of_zero_and_of_the_truth():
    torch.manual_seed(0)
    process, x0 = Levels(17.0), torch.zeros(512, 1, 8, 8)
    assert process.loss(lambda x: torch.zeros_like(x), x0).item() == pytest.approx(0.5, abs=0.01)
    assert process.loss(Point(), x0).item() < 1e-9                  # net(x) = -z: the target is reached at every level


def test_loss_divides_by_sigma():
    # A network that outputs -z has no loss; one that outputs the score -z / sigma has a large one at small sigma.
    process, x0, z = NCSNv2(17.0), torch.rand(4, 1, 4, 4), torch.randn(4, 1, 4, 4)
    i = torch.tensor([0, 20, 60, 94])
    assert process.level_losses(lambda x: -z, x0, i, z).abs().max() < 1e-9
    wrong = process.level_losses(lambda x: -z / process.sigmas[i].float()[:, None, None, None], x0, i, z)
    assert wrong[-1] > 1000 and wrong[0] > 0.1


def test_loss_of_gaussian_data_has_a_closed_form():
    # x_0 ~ N(0, c^2): the best output is -sigma x / (c^2 + sigma^2), its loss 1/2 c^2 / (c^2 + sigma^2).
    torch.manual_seed(0)
    process, c, i = NCSNv2(17.0), 0.3, torch.full((20_000,), 40)
    sigma = process.sigmas[40].item()
    x0, z = c * torch.randn(20_000, 1, 2, 2), torch.randn(20_000, 1, 2, 2)
    loss = process.level_losses(lambda x: -sigma * x / (c ** 2 + sigma ** 2), x0, i, z).mean().item()
    assert loss == pytest.approx(0.5 * c ** 2 / (c ** 2 + sigma ** 2), rel=0.02)


def test_network_is_told_no_level():
    # The same input gives the same output whatever the level; only the division differs.
    net, process = trained(), NCSNv2(17.0)
    x = torch.randn(2, 1, 28, 28)
    a, b = (process.score(net, x, torch.full((2,), i)) * float(process.sigmas[i]) for i in (3, 90))
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ Technique 5
def test_average_of_the_weights_in_float64():
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    ema, expected = EMA(net, share=0.1), None
    for n in range(30):
        torch.nn.init.normal_(net.weight)
        ema.update(net)
        decay = 1 - 1 / (1 + 0.1 * n)
        new = net.weight.detach().double()
        expected = new if expected is None else decay * expected + (1 - decay) * new
    assert torch.allclose(ema.module.weight.double(), expected, atol=1e-6)


def test_there_are_no_buffers_to_average():
    assert not list(UNet(**SMALL).buffers())


# ------------------------------------------------------------------ sampling
def test_one_level_with_fixed_noise():
    # Two steps and the last one by hand: x += alpha s + sqrt(2 alpha) z, then x += sigma_L^2 s.
    process, net = NCSNv2(0.02, 0.01, dim=2000), lambda x: 0.3 - x
    x = expected = torch.full((1, 1, 2, 2), 0.7)
    steps = list(process.anneal(net, x, 2, torch.Generator().manual_seed(5)))
    epsilon, generator = model.solve_step_size(0.01, process.gamma, 2), torch.Generator().manual_seed(5)
    for level in range(process.levels):
        sigma = process.sigmas[level].item()
        alpha = epsilon * sigma ** 2 / 0.01 ** 2
        for _ in range(2):
            noise = torch.randn(1, 1, 2, 2, generator=generator)
            expected = expected + alpha * (0.3 - expected) / sigma + math.sqrt(2 * alpha) * noise
    assert len(steps) == 2 * process.levels and [s[0] for s in steps[:3]] == [0, 0, 1]
    assert torch.allclose(steps[-1][1], expected, atol=1e-5)
    last = process.last_step(net, steps[-1][1])
    assert torch.allclose(last, expected + 0.01 ** 2 * (0.3 - expected) / 0.01, atol=1e-6)


def test_chain_reaches_its_point_and_the_last_step_takes_off_the_noise():
    # One point at 0.4: Langevin dynamics leaves noise of variance_ratio sigma_L^2 or a little more, the last step none.
    torch.manual_seed(0)
    process = Levels(17.0)
    x = process.sample(Point(0.4), 64, 5, shape=(1, 8, 8), denoise=False, generator=torch.Generator().manual_seed(0))
    assert x.mean().item() == pytest.approx(0.4, abs=0.001)
    assert 1 < x.var().item() / 0.01 ** 2 < 1.25
    clean = process.sample(Point(0.4), 64, 5, shape=(1, 8, 8), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(clean, torch.full_like(clean, 0.4), atol=1e-5)


def test_a_network_that_is_told_no_level_needs_three_steps():
    # One point at 0 and the answer -z, of a size that is always 1: a step takes noise of v sigma to (v - a)^2 + 2 a.
    # As the page says, it settles with three steps a level and grows with two; told the level, 1.24 and 1.37.
    torch.manual_seed(0)
    process = NCSNv2(17.0)
    for T, settled in ((1, 1e5), (2, 100), (3, 2.18)):
        *_, (_, x, _) = process.anneal(lambda x: -x / x.square().mean((1, 2, 3), keepdim=True).sqrt(),
                                       17 * torch.randn(4, 1, 28, 28), T)
        ratio = x.square().mean().item() / 0.01 ** 2
        assert ratio > settled if T < 3 else ratio == pytest.approx(settled, rel=0.1)


def test_a_large_sigma_forgets_the_start_and_a_small_one_does_not():
    # Two points, 10 apart, and a start nearer to one of them. The exact score of the pair is known.
    torch.manual_seed(0)
    shares = []
    for sigma_1 in (17.0, 1.0):
        process = Levels(sigma_1, 0.2, dim=200)
        start = 0.35 + 0.2 * torch.rand(400, 1, 10, 10)                     # mean 0.45: nearer to the first
        for _, x, _ in process.anneal(Pair(), start, 3):
            pass
        shares.append((x.flatten(1).mean(1) > 0.5).float().mean().item())
    assert shares[0] == pytest.approx(0.5, abs=0.1) and shares[1] < 0.25


def test_same_seed_same_samples_and_bad_steps():
    process, net = NCSNv2(0.5, 0.1, dim=100), trained()
    a, b, c = (process.sample(net, 2, 1, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert a.shape == (2, 1, 28, 28) and torch.equal(a, b) and not torch.equal(a, c)
    with pytest.raises(ValueError, match="at least 1"):
        process.sample(net, 2, 0)


def test_unit_interval_and_back():
    x0 = torch.tensor([-1.0, -0.2, 1.0])
    assert torch.allclose(model.from_unit(model.to_unit(x0)), x0)
    assert model.to_unit(x0).min() == 0 and model.to_unit(x0).max() == 1
    torch.manual_seed(0)
    grey = torch.arange(256).repeat(2000, 1) / 127.5 - 1
    x = model.dequantise(grey)
    within = x * 256 - torch.arange(256)                                        # every grey level fills its own 1/256
    assert -1e-3 < within.min() and within.max() < 1 + 1e-3 and within.mean(0).sub(0.5).abs().max() < 0.03


# ------------------------------------------------------------------ the network
def trained(**unet):
    """A small network none of whose parameters is zero, as after a training."""
    torch.manual_seed(0)
    net = UNet(**{**SMALL, **unet})
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net.eval()


def test_network_shapes_and_parameters():
    net = trained()
    assert net(torch.randn(3, 1, 28, 28)).shape == (3, 1, 28, 28)
    net(torch.randn(2, 1, 28, 28)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    assert not UNet(**SMALL)(torch.randn(2, 1, 28, 28)).any()                   # at the start of a training it says 0


def test_network_sees_the_direction_and_the_size_of_its_input():
    # Technique 3: nothing but x goes in. Lesson 05's network, on x over its root mean square, with its logarithm as the
    # time; and beside it a share of x itself that depends on the size alone.
    net, x = trained(), torch.rand(2, 1, 28, 28)
    x[1] = 0.5 + 20 * torch.randn(1, 28, 28)
    centred = 2 * x.double() - 1
    size = centred.square().mean((1, 2, 3)).sqrt().float()
    unit = centred.float() / size[:, None, None, None]
    assert size[1] > 35 and torch.allclose(unit.square().mean((1, 2, 3)), torch.ones(2), atol=1e-5)
    told = net.embed(250 * size.log())
    share = net.gain(torch.nn.functional.silu(told))[:, :, None, None]
    expected = net.body(unit, told) - share * unit
    assert torch.allclose(net(x), expected, rtol=1e-3, atol=1e-3)
    assert share.shape == (2, 1, 1, 1) and (share[0] - share[1]).abs() > 1e-3


def test_large_noise_is_handed_through():
    # With a share of 1 and a body that says 0 the answer to pure noise is -z, as exactly as 784 numbers tell sigma.
    net, z = UNet(**SMALL), torch.randn(64, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    net.gain.bias.data.fill_(1)
    error = (net(0.5 + 17 * z) + z).square().mean().item()
    assert error == pytest.approx(1 / (2 * 784), rel=0.5)


def test_an_image_of_grey_is_no_division_by_zero():
    assert trained()(torch.full((1, 1, 28, 28), 0.5)).isfinite().all()


def test_each_image_is_seen_alone():
    net, x = trained(), torch.randn(4, 1, 28, 28)
    assert torch.allclose(net(x)[:1], net(x[:1]), rtol=1e-3, atol=1e-3)
