"""Lesson 01: the closed forms of noising, the exact denoiser of a mixture, the three targets, the walk back."""

import math

import pytest
import torch

from conftest import load

model = load("lesson_01", "model")
Diffusion, Mixture, MLP = model.Diffusion, model.Mixture, model.MLP


def times(*values):
    return torch.tensor(values)


def mixture(diffusion, std=0.3):
    """Three Gaussians in the plane, all different."""
    means = torch.tensor([[0.5, 0.1], [-0.6, 0.4], [0.0, -0.9]])
    return Mixture(diffusion, means, [0.5, 0.3, 0.2], std)


# ------------------------------------------------------------------ schedule and forward process
def test_reference_values_of_the_linear_schedule():
    diffusion = Diffusion()
    assert diffusion.abar.dtype == torch.float64 and len(diffusion.abar) == 1001
    assert diffusion.abar[0].item() == pytest.approx(1 - 1e-4, rel=1e-12)               # index 0: one step of noise
    assert diffusion.abar[500].item() == pytest.approx(0.077797, rel=1e-4)
    assert diffusion.abar[999].item() == pytest.approx(4.036e-5, rel=1e-3)
    assert diffusion.abar[-1].item() == 1
    assert diffusion.beta_tilde(times(1), times(0)).item() == pytest.approx(5.4532e-5, rel=1e-4)
    beta = diffusion.beta(torch.arange(1000), torch.arange(-1, 999))
    assert torch.allclose(beta, torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), rtol=1e-10)


def test_schedule_and_noising_equal_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="dev reference: pip install -e '.[reference]'")
    scheduler, diffusion = diffusers.DDPMScheduler(beta_schedule="linear"), Diffusion()
    assert torch.allclose(scheduler.alphas_cumprod.double(), diffusion.abar[:-1], rtol=1e-4)       # theirs: float32
    torch.manual_seed(0)
    x0, eps, t = torch.rand(4, 1, 4, 4) * 2 - 1, torch.randn(4, 1, 4, 4), times(0, 10, 500, 999)
    assert torch.allclose(scheduler.add_noise(x0, eps, t), diffusion.q_sample(x0, t, eps), atol=2e-5)


def test_log_snr_at_three_times():
    # The convention box: x_t = alpha x_0 + sigma eps with alpha^2 = abar, sigma^2 = 1 - abar, read off from q_sample.
    diffusion, one, zero, t = Diffusion(), torch.ones(3, 2), torch.zeros(3, 2), times(100, 500, 900)
    alpha, sigma = diffusion.q_sample(one, t, zero)[:, 0], diffusion.q_sample(zero, t, one)[:, 0]
    abar = torch.stack([torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)[:i + 1].neg().log1p().sum().exp()
                        for i in t.tolist()])
    assert torch.allclose(2 * (alpha.log() - sigma.log()), (abar / (1 - abar)).log().float(), atol=1e-5)
    assert alpha[0] > alpha[1] > alpha[2]                                               # larger t is noisier


def test_closed_form_equals_the_chain_exactly():
    # q_step with eps = 0 multiplies the mean, with x = 0 it shows the noise it adds: follow both through all steps.
    diffusion = Diffusion(50, 1e-3, 0.2)
    mean, variance = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for i in range(50):
        t = times(i)
        kept, added = diffusion.q_step(one, t, zero), diffusion.q_step(zero, t, one)
        mean, variance = kept * mean, kept ** 2 * variance + added ** 2
        assert torch.allclose(diffusion.q_sample(one, t, zero), mean, rtol=1e-12)
        assert torch.allclose(diffusion.q_sample(zero, t, one) ** 2, variance, rtol=1e-12)


@pytest.mark.parametrize("values", [dict(predict="x"), dict(timesteps=1)])
def test_process_refuses_what_it_does_not_know(values):
    with pytest.raises(ValueError):
        Diffusion(**values)


# ------------------------------------------------------------------ posterior
@pytest.mark.parametrize("t, s", [(1, 0), (10, 9), (999, 998), (980, 960), (300, 20)])
def test_posterior_is_bayes_rule(t, s):
    # q(x_s | x_t, x_0) ~ q(x_t | x_s) q(x_s | x_0): add precisions, weigh means.
    diffusion = Diffusion()
    abar_s, beta = diffusion.abar[s].item(), diffusion.beta(times(t), times(s)).item()
    precision = (1 - beta) / beta + 1 / (1 - abar_s)
    mean = (math.sqrt(1 - beta) / beta * -0.8 + math.sqrt(abar_s) * 0.3 / (1 - abar_s)) / precision
    x0, xt = torch.full((1, 2), 0.3, dtype=torch.float64), torch.full((1, 2), -0.8, dtype=torch.float64)
    assert diffusion.beta_tilde(times(t), times(s)).item() == pytest.approx(1 / precision, rel=1e-9)
    assert diffusion.q_posterior(x0, xt, times(t), times(s))[0, 0].item() == pytest.approx(mean, rel=1e-9)


def test_posterior_at_the_last_step_is_x0():
    diffusion, x0, xt = Diffusion(), torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    assert torch.allclose(diffusion.q_posterior(x0, xt, times(0, 300), times(-1, -1)), x0, atol=1e-6)
    assert diffusion.beta_tilde(times(0, 300), times(-1, -1)).tolist() == [0, 0]


# ------------------------------------------------------------------ one guess, three names
@pytest.mark.parametrize("t", [0, 1, 30, 500, 999])
def test_round_trips(t):
    torch.manual_seed(0)
    diffusion, t = Diffusion(), torch.full((3,), t)
    x0, eps = torch.rand(3, 2, dtype=torch.float64) * 2 - 1, torch.randn(3, 2, dtype=torch.float64)
    xt = diffusion.q_sample(x0, t, eps)
    score = diffusion.score_from_x0(x0, xt, t)
    assert torch.allclose(diffusion.x0_from_eps(eps, xt, t), x0, atol=1e-9)
    assert torch.allclose(diffusion.eps_from_x0(x0, xt, t), eps, atol=1e-9)
    assert torch.allclose(diffusion.x0_from_score(score, xt, t), x0, atol=1e-9)
    sigma = (1 - diffusion.abar[t]).sqrt()[:, None]
    assert torch.allclose(eps, -sigma * score, atol=1e-9)                               # eps = -sqrt(1 - abar) score
    for predict, output in (("x0", x0), ("noise", eps), ("score", score)):
        net = lambda x, _, output=output: output
        assert torch.allclose(Diffusion(predict=predict).predict_x0(net, xt, t), x0, atol=1e-9)


@pytest.mark.parametrize("predict", ["x0", "noise", "score"])
def test_the_exact_answer_has_the_lowest_loss(predict):
    # E[target | x_t] minimises the squared error, so every change of it costs; and its score is Tweedie's.
    diffusion = Diffusion(100, 1e-3, 0.2, predict)
    data = mixture(diffusion)
    x0 = data.draw(20_000, torch.Generator().manual_seed(0))

    def answer(shift, factor):
        def net(xt, t):
            guess = factor * data(xt, t) + shift
            return {"x0": guess, "noise": diffusion.eps_from_x0(guess, xt, t),
                    "score": diffusion.score_from_x0(guess, xt, t)}[predict]
        return net

    def loss(shift, factor):
        torch.manual_seed(1)
        return diffusion.loss(answer(shift, factor), x0).item()

    best = loss(0.0, 1.0)
    assert all(loss(shift, factor) > best for shift, factor in ((0.1, 1.0), (-0.1, 1.0), (0.0, 1.2), (0.0, 0.8)))


def test_loss_of_a_network_that_answers_zero():
    torch.manual_seed(0)
    x0 = torch.rand(4096, 1, 2, 2) * 2 - 1
    zero = lambda x, t: torch.zeros_like(x)
    assert Diffusion(predict="noise").loss(zero, x0).item() == pytest.approx(1, abs=0.03)          # E eps^2
    assert Diffusion(predict="score").loss(zero, x0).item() == pytest.approx(1, abs=0.03)
    assert Diffusion().loss(zero, x0).item() == pytest.approx(x0.square().mean().item(), rel=1e-6)


# ------------------------------------------------------------------ the mixture, exactly
@pytest.mark.parametrize("t", [0, 20, 60, 99])
def test_density_of_the_noised_mixture(t):
    diffusion = Diffusion(100, 1e-3, 0.2)
    data, x = mixture(diffusion), torch.randn(7, 2, dtype=torch.float64)
    abar = diffusion.abar[t]
    parts = torch.distributions.MultivariateNormal(abar.sqrt() * data.means,
                                                   (abar * 0.3 ** 2 + 1 - abar) * torch.eye(2, dtype=torch.float64))
    family = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(data.weights), parts)
    assert torch.allclose(data.log_q(x, torch.full((7,), t)), family.log_prob(x), atol=1e-9)


@pytest.mark.parametrize("t", [0, 20, 60, 99])
@pytest.mark.parametrize("std", [0.3, 0.0])
def test_tweedie(t, std):
    # The score from E[x_0 | x_t] is the gradient of log q_t, by automatic differentiation.
    diffusion = Diffusion(100, 1e-2, 0.2)
    data, t = mixture(diffusion, std), torch.full((9,), t)
    x = torch.randn(9, 2, dtype=torch.float64, requires_grad=True)
    gradient, = torch.autograd.grad(data.log_q(x, t).sum(), x)
    assert torch.allclose(diffusion.score_from_x0(data(x, t), x, t), gradient, rtol=1e-6, atol=1e-8)


def test_exact_denoiser_is_the_mean_of_what_was_noised():
    # Among many noised points, those that land near x have x_0 of mean E[x_0 | x_t = x].
    diffusion = Diffusion(100, 1e-3, 0.2)
    data, t = mixture(diffusion), torch.full((400_000,), 40)
    x0 = data.draw(400_000, torch.Generator().manual_seed(0))
    xt = diffusion.q_sample(x0, t, torch.randn(x0.shape, generator=torch.Generator().manual_seed(1)))
    for place in ([0.2, 0.0], [-0.5, -0.5]):
        near = (xt - torch.tensor(place)).norm(dim=1) < 0.05
        error = x0[near].mean(0) - data(torch.tensor([place]), t[:1])[0]
        assert near.sum() > 400 and (error.abs() < 4 * x0[near].std(0) / near.sum().sqrt() + 0.01).all()


def test_empirical_denoiser_is_a_softmax_over_the_training_points():
    # The formula of the lesson, written out: logits -||x - sqrt(abar) x_i||^2 / (2 (1 - abar)).
    diffusion, torch_t = Diffusion(), times(300, 300, 600)
    images = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    abar = diffusion.abar[torch_t].float()
    distance2 = (x[:, None] - abar.sqrt()[:, None, None, None, None] * images).flatten(2).square().sum(2)
    weights = torch.softmax(-distance2 / (2 * (1 - abar))[:, None], dim=1)
    expected = torch.einsum("bk,kchw->bchw", weights, images)
    assert torch.allclose(Mixture(diffusion, images)(x, torch_t), expected, atol=1e-5)


def test_draws_have_the_weights_and_the_spread():
    data = model.two_gaussians(Diffusion(10), 0.8, 0.15)
    x = data.draw(50_000, torch.Generator().manual_seed(0))
    large = x.sum(1) > 0
    assert large.double().mean().item() == pytest.approx(0.8, abs=0.01)
    assert x[large].std(0).tolist() == pytest.approx([0.15, 0.15], abs=0.003)
    assert x[large].mean(0).tolist() == pytest.approx([0.7, 0.7], abs=0.005)


def test_swiss_roll_and_eight_gaussians_are_as_large_as_the_noise():
    for x in (model.swiss_roll(5000, torch.Generator().manual_seed(0)),
              model.eight_gaussians(Diffusion(10)).draw(5000, torch.Generator().manual_seed(0))):
        assert x.shape == (5000, 2) and x.dtype == torch.float32 and x.abs().max() < 2.1
        assert 0.5 < x.square().mean() < 2
    radius = model.swiss_roll(5000, torch.Generator().manual_seed(0), width=0.0).norm(dim=1)
    assert 0.6 <= radius.min() < 0.61 and 1.79 < radius.max() <= 1.8


# ------------------------------------------------------------------ the reverse step
def test_reverse_density_is_normalised_and_tends_to_a_gaussian():
    diffusion = Diffusion()
    data = Mixture(diffusion, torch.tensor([[0.7], [-0.7]]), std=0.1)
    grid = torch.linspace(-4, 4, 8001, dtype=torch.float64)
    width, distance = 8 / 8000, []
    for s in (299, 200, 50):
        t_, s_ = torch.full((8001,), 300), torch.full((8001,), s)
        density = data.reverse_log_density(grid[:, None], torch.full((8001, 1), 0.1).double(), t_, s_).exp()
        assert (density.sum() * width).item() == pytest.approx(1, abs=1e-4)
        mean = (density * grid).sum() * width
        variance = (density * (grid - mean) ** 2).sum() * width
        gauss = torch.exp(-(grid - mean) ** 2 / (2 * variance)) / (2 * math.pi * variance).sqrt()
        distance.append(((density - gauss).abs().sum() * width).item())
        if s == 299:                                       # its mean is that of the sampler's step, its variance beta
            t, last, x = times(300), times(299), torch.tensor([[0.1]]).double()
            assert mean.item() == pytest.approx(diffusion.q_posterior(data(x, t), x, t, last).item(), abs=1e-6)
            assert variance.item() == pytest.approx(diffusion.beta(t, last).item(), rel=0.02)
    assert distance[0] < 1e-3 < distance[1] < distance[2] > 0.1


# ------------------------------------------------------------------ the walk back
@pytest.mark.parametrize("steps", [100, 1000])
def test_walk_back_to_a_gaussian(steps):
    diffusion = Diffusion()
    data = Mixture(diffusion, torch.tensor([[0.2, -0.4]]), std=0.3)
    x = diffusion.sample(data, 2000, steps, generator=torch.Generator().manual_seed(0))
    assert x.mean(0).tolist() == pytest.approx([0.2, -0.4], abs=0.02)
    assert x.std(0).tolist() == pytest.approx([0.3, 0.3], abs=0.02 if steps == 1000 else 0.04)


@pytest.mark.parametrize("predict", ["x0", "noise", "score"])
def test_the_target_does_not_change_the_walk(predict):
    diffusion = Diffusion(100, 1e-3, 0.2, predict)
    data = mixture(diffusion)
    convert = {"x0": lambda x0, xt, t: x0, "noise": diffusion.eps_from_x0, "score": diffusion.score_from_x0}[predict]
    x = diffusion.sample(lambda xt, t: convert(data(xt, t), xt, t), 50, 100, generator=torch.Generator().manual_seed(0))
    y = Diffusion(100, 1e-3, 0.2).sample(data, 50, 100, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(x, y, atol=2e-3)


def test_exact_empirical_denoiser_returns_training_images():
    diffusion = Diffusion()
    images = torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x = diffusion.sample(Mixture(diffusion, images), 40, 100, (1, 8, 8), torch.Generator().manual_seed(1))
    nearest = torch.cdist(x.flatten(1).double(), images.flatten(1).double()).min(1)
    assert nearest.values.max() < 1e-3 and len(nearest.indices.unique()) > 10


def test_visited_times_and_the_last_step():
    diffusion, zero = Diffusion(), lambda x, t: torch.zeros_like(x)
    path = list(diffusion.reverse(zero, torch.zeros(3, 2), 50))
    visited = [t for t, _, _ in path]
    assert visited[0] == 999 and visited[-1] == 0 and len(visited) == 50 == len(set(visited))
    assert torch.equal(path[-1][1], path[-1][2])                                        # no noise in the last step
    for steps in (0, 1, 1001):
        with pytest.raises(ValueError, match="steps"):
            list(diffusion.reverse(zero, torch.zeros(1, 2), steps))


def test_same_generator_same_samples():
    diffusion, net = Diffusion(10, 1e-2, 0.5), MLP((1, 4, 4), 8, 1).eval()
    a, b, c = (diffusion.sample(net, 2, 10, (1, 4, 4), torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


# ------------------------------------------------------------------ the network
@pytest.mark.parametrize("shape", [(2,), (1, 28, 28)])
def test_shapes_and_that_the_time_matters(shape):
    torch.manual_seed(0)
    net = MLP(shape, 16, 2)
    x = torch.randn(2, *shape)
    assert net(x, times(3, 900)).shape == x.shape
    assert torch.equal(net(x, times(3, 900)), net(x, times(3, 900)))
    assert not torch.allclose(net(x, times(3, 900)), net(x, times(4, 900)), atol=1e-6)


def test_time_embedding():
    e = model.time_embedding(torch.arange(1000), 32)
    assert e.shape == (1000, 32) and torch.equal(e[0], torch.cat([torch.zeros(16), torch.ones(16)]))
    assert (e[1:] - e[:-1]).norm(dim=1).min() > 1e-2                                    # t, not t / T


def test_one_point_can_be_overfitted():
    # A single point leaves nothing to guess: the loss falls towards 0. Answering 0 gives 0.25.
    torch.manual_seed(0)
    diffusion, net, x0 = Diffusion(100, 1e-3, 0.2), MLP((2,), 32, 2), torch.full((64, 2), 0.5)
    optimizer, losses = torch.optim.Adam(net.parameters(), 1e-2), []
    for _ in range(200):
        loss = diffusion.loss(net, x0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.005 < 0.05 < losses[0]


# ------------------------------------------------------------------ the measurements of reproduce.py
def test_kl_of_the_reverse_step_vanishes_for_one_gaussian():
    # One cloud: the step back is a Gaussian at every size, with the mean of the sampler's step.
    reproduce, diffusion = load("lesson_01", "reproduce"), Diffusion()
    data, grid = Mixture(diffusion, torch.tensor([[0.4]]), std=0.1), torch.linspace(-4, 4, 8001, dtype=torch.float64)
    for s in (299, 90, 0):
        exact, gauss = reproduce.reverse_density(diffusion, data, torch.tensor([0.1]).double(), 300, s, grid)
        assert torch.allclose(exact, gauss, atol=1e-6 * gauss.max().item())


def test_nearest_image():
    images = torch.stack([torch.full((1, 2, 2), value) for value in (-1.0, 0.0, 1.0)])
    distance, index = load("lesson_01", "reproduce").nearest_image(images[[2, 0]] * 0.75, images)
    assert index.tolist() == [2, 0] and distance.tolist() == pytest.approx([0.25, 0.25])


# ------------------------------------------------------------------ the scripts
def test_points_depend_on_the_step_only():
    train = load("lesson_01", "train")
    from utils import UserError
    from utils.config import Section

    for data in ("swiss_roll", "eight", "two"):
        points = train.Points(Diffusion(10), Section(data=data, batch_size=8, seed=0))
        a, b = points.batch(3)[0], points.batch(4)[0]
        assert a.shape == (8, 2) and torch.equal(a, points.batch(3)[0]) and not torch.equal(a, b)
        assert torch.equal(torch.cat([points.batch(3, rank, 2)[0] for rank in (0, 1)]), torch.cat([a[::2], a[1::2]]))
    with pytest.raises(UserError, match="data=moons is no folder here"):
        train.main(["data=moons"])


def test_points_can_be_trained_and_drawn(tmp_path):
    keys = ["smoke=true", "device=cpu", "gpu=false", f"runs={tmp_path}"]
    load("lesson_01", "train").main([*keys, "data=swiss_roll"])
    x = load("lesson_01", "sample").main([*keys, "n=50", "gif=way.gif"])
    assert x.shape == (50, 2) and x.isfinite().all()
    assert {"samples.png", "way.gif"} <= {path.name for path in (tmp_path / "smoke" / "001").iterdir()}


def test_picture_puts_points_in_their_place():
    picture = load("lesson_01", "sample").picture
    image = picture(torch.tensor([[0.0, 0.0], [1.4, 1.4], [9.0, 0.0]]), size=30, reach=1.5)
    assert image.shape == (1, 3, 30, 30) and (image[0, 0] == 1).nonzero().tolist() == [[0, 29], [14, 15]]
