"""Check on known data what every later lesson relies on, and draw the lesson's pictures.

    python reproduce.py publish=true   all measurements, three seeds; writes results/claim.json and the pictures
    python reproduce.py quick=true     a look in half a minute, no verdict
    python reproduce.py n=100000       other values; without publish=true to runs/claim

The criteria stand in `main`; those of (b) and (c) were written down before the numbers were seen. (a) is an identity,
so it is computed and not drawn: asked of draws, "all within 3 standard errors" is broken by chance once in thirteen
times, and was (thirty comparisons, one of 3.94).

Measured without a verdict: the same chain with points that are drawn; how far the exact reverse step is from a
Gaussian, for longer and longer steps; and how close networks that predict x_0, the noise or the score come to the
exact score.
"""

import colorsys
import math
import statistics

import torch

import train
from model import MLP, Diffusion, Mixture, eight_gaussians, swiss_roll, two_gaussians
from sample import picture
from utils import (
    Claim,
    arm_weights,
    cli,
    digits,
    figure,
    save_figure,
    save_gif,
    save_grid,
    seeded,
    ticks,
)

TARGETS = ("x0", "noise", "score")
STEPS = (5, 10, 20, 50, 100, 200, 500, 1000)
SHARE = 0.8                                            # of the large cloud
VISITED = (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)           # shares of T at which a digit dissolves
SEEN = ["noised digit", "exact guess", "network's guess"]                      # the rows of that picture
COPIES = ["exact denoiser", "nearest image", "network", "nearest image"]       # the rows of memorisation.png


def main(argv=None):
    claim = Claim(__file__, argv)
    run, cfg, diffusion = claim.run, claim.cfg, process(claim.run)
    points = [f"steps={cfg.point_steps}", f"precision={cfg.precision}"]
    claim.train({target: ["data=eight", f"diffusion.predict={target}"] for target in TARGETS}, train.main, points)
    claim.train({"swiss_roll": ["data=swiss_roll"]}, train.main, points, seeds=[0])
    claim.train({"digits": [f"limit={cfg.images}"]}, train.main, [f"steps={cfg.steps}", f"precision={cfg.precision}"])
    shares = claim.each(mixture_share, steps=[i for i in STEPS if i <= diffusion.timesteps], seed=claim.seeds)
    copies = claim.each(nearest, of=["exact denoiser", "network"], seed=claim.seeds)
    claim.each(target_error, target=TARGETS, seed=claim.seeds)
    test = nearest_image(*(digits(part).first(n)[0] for part, n in (("test", cfg.samples), ("train", cfg.images))))
    test, error = test[0].median().item(), recursion_error(diffusion)

    claim.exact("a", "Mean and variance, followed through all the steps of the chain, are those of the closed form",
                holds=error < 1e-10, relative_error=error)
    claim.judge("b1", "100 or more steps with a mixture's exact denoiser give the large cloud its share, 0.80 +- 0.02",
                rule="in every seed", holds=many_steps_suffice(shares))
    claim.judge("b2", "5 steps miss that share by more than 0.02, and by more than 100 steps do",
                rule="in every seed", holds=few_steps_miss(shares))
    share = {of: [value / test for value in copies.values("distance", of=of)] for of in ("exact denoiser", "network")}
    claim.judge("c1", "The exact denoiser of training images draws copies: their distance to the nearest of these is "
                "below 1 % of that of test images", rule="medians, in every seed",
                holds=max(share["exact denoiser"]) < 0.01, share_of_test=share["exact denoiser"])
    claim.judge("c2", "A network that learned from the same images does not: the distance is above 10 %",
                rule="medians, in every seed",
                holds=min(share["network"]) > 0.1, share_of_test=share["network"])
    claim.note("test_images", test)
    claim.note("drawn", [row for seed in claim.seeds for row in noised(diffusion, cfg.chain, seed)])
    claim.note("small_steps", small_steps(diffusion))
    strips = [strip for of in ("exact denoiser", "network") for strip in copies.where(of=of, seed=0)[0]["strips"]]
    noise, roll = (load(arm_weights(run, arm)) for arm in ("noise", "swiss_roll"))
    run.output(save_grid, torch.cat(strips), "memorisation.png", columns=12, down=COPIES)
    run.output(save_grid, torch.cat(dissolving(run)), "dissolving.png", columns=len(VISITED), down=SEEN,
               across=["t = 0", *spread(diffusion, *VISITED)[1:]])
    run.output(plot_small_steps, claim, "small_steps.png")
    run.output(plot_score_field, (diffusion, noise), "score_field.png")
    run.output(save_gif, particles(diffusion, roll), "particles.gif", columns=2, seconds=8)
    many, few = (shares.mean("share", steps=steps) for steps in (min(100, max(row["steps"] for row in shares)), 5))
    return claim.finish(plot=plot, headline=f"share of a 0.8 cloud: {many:.3f} in 100 exact steps, {few:.3f} in 5")


def process(run):
    """The process for an exact denoiser, which answers with x_0."""
    return Diffusion(**{**run.config.diffusion, "predict": "x0"})


def load(weights):
    """Process and network of a weights file, on the CPU: all that follows is small."""
    kind = "digits" if "digits" in weights.config else "points"
    return Diffusion(**weights.config["diffusion"]), weights.load(MLP(**weights.config[kind])).eval()


def at(t, x):
    """The time t for every element of a batch x."""
    return torch.full((len(x),), t)


def spread(diffusion, *shares):
    """Times at these shares of T."""
    return [round(share * (diffusion.timesteps - 1)) for share in shares]


# ------------------------------------------------------------------ (a) the chain and its closed form
def recursion_error(diffusion):
    """Follow mean and variance through all steps: the largest relative difference from the closed form."""
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    mean, variance, worst = one, zero, 0.0
    for i in range(diffusion.timesteps):
        t = torch.tensor([i])
        kept, added = diffusion.q_step(one, t, zero), diffusion.q_step(zero, t, one)
        mean, variance = kept * mean, kept ** 2 * variance + added ** 2
        abar = diffusion.abar[i]
        worst = max(worst, (mean / abar.sqrt() - 1).abs().item(), (variance / (1 - abar) - 1).abs().item())
    return worst


def noised(diffusion, n, seed):
    """Mean and variance of n points on their way, against the closed form, at some t."""
    generator, x, rows = seeded(seed), torch.ones(n, dtype=torch.float64), []
    for t in range(diffusion.timesteps):
        x = diffusion.q_step(x, torch.tensor([t]), torch.randn(n, generator=generator, dtype=torch.float64))
        if t in (0, 9, 99, 499, 999):
            abar, mean, variance = diffusion.abar[t].item(), x.mean().item(), x.var().item()
            rows.append({"seed": seed, "t": t, "mean": mean, "mean_exact": abar ** 0.5, "variance": variance,
                         "variance_exact": 1 - abar, "mean_z": (mean - abar ** 0.5) / ((1 - abar) / n) ** 0.5,
                         "variance_z": (variance / (1 - abar) - 1) / (2 / (n - 1)) ** 0.5})
    return rows


# ------------------------------------------------------------------ (b) the weights of a mixture
def mixture_share(run, steps, seed):
    """The large cloud's share among samples drawn with the exact denoiser."""
    diffusion = process(run)
    data = two_gaussians(diffusion, SHARE)
    x = diffusion.sample(data, run.config.reproduce.n, steps, generator=seeded(seed))
    return {"share": (torch.cdist(x.double(), data.means).argmin(1) == 0).double().mean().item()}


def many_steps_suffice(shares):
    """(b1)"""
    off = [abs(row["share"] - SHARE) for row in shares if row["steps"] >= 100]
    return bool(off) and max(off) <= 0.02


def few_steps_miss(shares):
    """(b2)"""
    five, hundred = ([abs(share - SHARE) for share in shares.values("share", steps=steps)]
                     for steps in (5, min(100, max(row["steps"] for row in shares))))
    return all(a > max(0.02, b) for a, b in zip(five, hundred))


# ------------------------------------------------------------------ (c) memorisation
def denoiser(run, of, seed):
    """Process and denoiser: exact for the training images, or a network that learned from them."""
    if of == "network":
        return load(arm_weights(run, "digits", seed))
    diffusion = process(run)
    return diffusion, Mixture(diffusion, digits("train").first(run.config.reproduce.images)[0])


def nearest(run, of, seed):
    """Median distance of samples to the nearest training image; some samples, and those images under them."""
    cfg, (diffusion, net) = run.config.reproduce, denoiser(run, of, seed)
    images, _ = digits("train").first(cfg.images)
    x = diffusion.sample(net, cfg.samples, cfg.sample_steps, (1, 28, 28), seeded(seed))
    distance, index = nearest_image(x, images)
    return {"distance": distance.median().item(), "strips": [x[:12], images[index[:12]]]}


def nearest_image(x, images):
    """Distance (root mean square over pixels) of each of x to the nearest of `images`, and which one it is."""
    distance, index = torch.cdist(x.flatten(1).double(), images.flatten(1).double()).min(1)
    return distance / math.sqrt(x[0].numel()), index


def dissolving(run):
    """A test digit at more and more noise, and under it what the exact denoiser and the network expect behind it."""
    x0, (diffusion, _) = digits("test").first(1)[0], denoiser(run, "exact denoiser", 0)
    eps = torch.randn(x0.shape, generator=seeded(1))
    times = spread(diffusion, *VISITED)
    noisy = [diffusion.q_sample(x0, at(t, x0), eps) for t in times]
    rows = [torch.cat(noisy)]
    for of in ("exact denoiser", "network"):
        process, net = denoiser(run, of, 0)
        with torch.no_grad():
            rows.append(torch.cat([process.predict_x0(net, x, at(t, x)) for x, t in zip(noisy, times)]))
    return rows


# ------------------------------------------------------------------ the three targets against the exact score
def target_error(run, target, seed):
    """Error of the learned score, as a share of the exact score's size, by noise level."""
    diffusion, errors = process(run), {}
    data, learned = eight_gaussians(diffusion), load(arm_weights(run, target, seed))
    for t in spread(diffusion, 0.02, 0.1, 0.3, 0.6):
        x0 = data.draw(5000, seeded(t))
        xt = diffusion.q_sample(x0, at(t, x0), torch.randn(x0.shape, generator=seeded(t + 1)))
        exact = diffusion.score_from_x0(data(xt, at(t, xt)), xt, at(t, xt))
        score = learned_score(*learned, xt, t)
        errors[str(t)] = ((score - exact).square().mean() / exact.square().mean()).sqrt().item()
    return {"error": errors}


@torch.no_grad()
def learned_score(diffusion, net, xt, t):
    return diffusion.score_from_x0(diffusion.predict_x0(net, xt, at(t, xt)), xt, at(t, xt))


# ------------------------------------------------------------------ why small steps
def two_spikes(diffusion):
    """Two equal clouds on a line."""
    return Mixture(diffusion, torch.tensor([[0.7], [-0.7]]), std=0.1)


def reverse_density(diffusion, data, xt, t, s, grid):
    """The exact q(x_s | x_t) on a grid, and the Gaussian with its mean and variance. Two (N,)."""
    exact = data.reverse_log_density(grid[:, None], xt.expand(len(grid), 1), at(t, grid), at(s, grid)).exp()
    width = grid[1] - grid[0]
    exact = exact / (exact.sum() * width)
    mean = (exact * grid).sum() * width
    variance = (exact * (grid - mean) ** 2).sum() * width
    return exact, torch.exp(-(grid - mean) ** 2 / (2 * variance)) / (2 * math.pi * variance).sqrt()


def small_steps(diffusion):
    """KL divergence of the exact reverse step from a Gaussian, mean over x_t ~ q_t, by the variance of the step."""
    data, grid = two_spikes(diffusion), torch.linspace(-4, 4, 16001, dtype=torch.float64)
    t = spread(diffusion, 0.3)[0]
    x0 = data.draw(100, seeded(0))
    xt = diffusion.q_sample(x0, at(t, x0), torch.randn(x0.shape, generator=seeded(1))).double()
    rows = []
    for jump in sorted({max(1, round(share * t)) for share in (0, 0.004, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1)}):
        kl = []
        for x in xt:
            exact, gauss = reverse_density(diffusion, data, x, t, t - jump, grid)
            ratio = (exact.clamp(min=1e-300) / gauss.clamp(min=1e-300)).log()
            kl.append(((exact * ratio).sum() * (grid[1] - grid[0])).item())
        beta = diffusion.beta(torch.tensor([t]), torch.tensor([t - jump])).item()
        rows.append({"t": t, "s": t - jump, "beta": beta, "kl": statistics.mean(kl)})
    return rows


# ------------------------------------------------------------------ pictures
def plot(claim, path):
    """The three claims."""
    fig, ((left, right), (below, corner)) = figure(2, 2, width=4.2, height=3.2)
    corner.remove()
    below.set_subplotspec(below.get_gridspec()[1, :])
    for key, mark in (("mean", "o"), ("variance", "x")):
        drawn = claim.notes["drawn"]
        left.plot([row["t"] + 1 for row in drawn], [row[f"{key}_z"] for row in drawn], mark, label=key)
    left.set(xscale="log", ylim=(-5, 5), xlabel="steps of noise", ylabel="error, standard errors",
             title="(a) the chain, drawn, against its closed form")
    left.legend(fontsize=8, loc="upper center")
    shares = claim.rows.by("steps", "share")
    for steps, values in shares.items():
        right.plot([steps] * len(values), values, "o", color="C0", ms=4, label="a seed" if steps == 5 else None)
    right.plot(list(shares), [statistics.mean(values) for values in shares.values()], color="C0", label="their mean")
    right.axhspan(SHARE - 0.02, SHARE + 0.02, color="grey", alpha=0.15, label="0.80 $\\pm$ 0.02")
    right.set(xscale="log", xlabel="steps of the walk back", ylabel="share of the large cloud",
              title="(b) exact denoiser, weight 0.8")
    right.legend(fontsize=8, loc="upper right")
    distances = {"test images": [claim.notes["test_images"]], **claim.rows.by("of", "distance")}
    for i, values in enumerate(distances.values()):
        below.plot(values, [i] * len(values), "o", color=f"C{i}", ms=6)
    below.set_yticks(range(3), ["test images", "samples of the\nexact denoiser", "samples of\na network"])
    below.set(xscale="log", xlabel="distance to the nearest training image, RMS over pixels", ylim=(2.5, -0.5),
              title="(c) copies?")
    ticks(left.xaxis, (1, 10, 100, 1000))
    ticks(right.xaxis, (5, 10, 20, 50, 100, 200, 500, 1000))
    ticks(below.xaxis, (1e-7, 1e-6, 1e-5, 0.0001, 0.001, 0.01, 0.1, 1))
    for ax in (left, right, below):
        ax.grid(alpha=0.3)
    return save_figure(fig, path)


def plot_small_steps(claim, path):
    """The exact reverse step at one x_t for a short, two longer and the longest step; and the KL over beta."""
    diffusion, rows = process(claim.run), claim.notes["small_steps"]
    data, grid = two_spikes(diffusion), torch.linspace(-1.6, 1.6, 1601, dtype=torch.float64)
    fig, axes = figure(2, 3, width=2.8, height=2.6)
    bells, last = axes.flatten()[:4], axes[1, 1]
    axes[1, 2].remove()
    last.set_subplotspec(last.get_gridspec()[1, 1:])
    t, xt = rows[0]["t"], torch.tensor([0.1], dtype=torch.float64)
    for ax, row in zip(bells, [rows[0], rows[len(rows) // 2], rows[-2], rows[-1]]):
        exact, gauss = reverse_density(diffusion, data, xt, t, row["s"], grid)
        ax.fill_between(grid, exact, color="C0", alpha=0.4, lw=0, label="exact")
        ax.plot(grid, gauss, "k--", lw=1, label="Gaussian")
        ax.set(title=f"{t} $\\to$ {row['s']}, $\\beta$ = {row['beta']:.3f}", xlabel="$x_s$", yticks=[], ylim=(0, None))
    bells[0].legend(fontsize=8, loc="upper left")
    for ax in axes[:, 0]:
        ax.set_ylabel(f"$q(x_s | x_t = {xt.item()})$")
    last.loglog([row["beta"] for row in rows], [row["kl"] for row in rows], "o-")
    last.set(xlabel="$\\beta$ of the step", ylabel="KL divergence", title="how far from a Gaussian?")
    ticks(last.xaxis, (0.01, 0.02, 0.05, 0.1, 0.2, 0.5))
    ticks(last.yaxis, (1e-8, 1e-6, 0.0001, 0.01, 1))
    last.grid(alpha=0.3)
    return save_figure(fig, path)


def plot_score_field(networks, path):
    """Exact and learned score of eight clouds at four noise levels, over log q_t in one range of colours."""
    diffusion, learned = networks
    data, reach, fine = eight_gaussians(diffusion), 2.6, torch.linspace(-2.6, 2.6, 150)
    points = torch.cartesian_prod(*[torch.linspace(-2.4, 2.4, 15)] * 2)
    pixels, levels = torch.cartesian_prod(fine, fine), torch.linspace(-10, 2, 13)
    fig, axes = figure(2, 4, width=2.9, height=2.9)
    for column, t in enumerate(spread(diffusion, 0.02, 0.08, 0.2, 0.5)):
        log_q = data.log_q(pixels, at(t, pixels)).reshape(150, 150).T
        exact = diffusion.score_from_x0(data(points, at(t, points)), points, at(t, points))
        for ax, score in zip(axes[:, column], (exact, learned_score(*learned, points, t))):
            ax.contourf(fine, fine, log_q, levels, cmap="Blues", extend="both")
            arrow = (1 - diffusion.abar[t]).sqrt().item() * score          # the size of the noise ...
            arrow = arrow / (1 + arrow.norm(dim=1, keepdim=True))          # ... or, far out, not longer than 1
            ax.quiver(*points.T, *arrow.T, angles="xy", scale_units="xy", scale=2.4, width=0.006)
            ax.set(xticks=[], yticks=[], xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
        axes[0, column].set_title(f"t = {t}, $\\bar\\alpha_t$ = {diffusion.abar[t]:.3f}", fontsize=10)
    axes[0, 0].set_ylabel("exact")
    axes[1, 0].set_ylabel("learned")
    return save_figure(fig, path)


def particles(diffusion, learned, n=2000, steps=100):
    """Data dissolve and form again: eight clouds by the exact denoiser, the swiss roll by a learned one."""
    columns, steps = [], min(steps, diffusion.timesteps)
    data = eight_gaussians(diffusion)
    for start, process, net in ((data.draw(n, seeded(0)), diffusion, data), (swiss_roll(n, seeded(0)), *learned)):
        eps = torch.randn(n, 2, generator=seeded(1))
        times = spread(diffusion, *[(i / 15) ** 2 * 0.6 for i in range(16)])
        noised = [start] * 3 + [process.q_sample(start, at(t, start), eps) for t in times]
        xT = torch.randn(n, 2, generator=seeded(2))
        path = [x for _, x, _ in process.reverse(net, xT, steps, seeded(3))]
        columns.append([picture(x, hue(start)) for x in noised]
                       + [picture(x, hue(path[-1])) for x in [xT, *path[::4], path[-1]]])
    return [torch.cat(pair) for pair in zip(*columns)]


def hue(x):
    """A colour for every point by its direction from the middle, (N, 3) in [-1, 1]."""
    angle = torch.atan2(x[:, 1], x[:, 0]) / (2 * math.pi) % 1
    return torch.tensor([colorsys.hsv_to_rgb(a, 0.7, 1.0) for a in angle.tolist()]) * 2 - 1


if __name__ == "__main__":
    cli(main)
