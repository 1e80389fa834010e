"""Measure the paper's claims again: the bound is close to the truth, learning raises it, posteriors come for free.

    python reproduce.py publish=true      all arms, three seeds; writes results/claim.json and the pictures
    python reproduce.py quick=true        a look at it, no verdict
    python reproduce.py steps=3000        other values; without publish=true to runs/claim

The posteriors are those of the published network, which was trained for neither task; the estimate is the mean of a
few posterior samples, and every seed has other test images. The criteria, in `main`, were written down before the
numbers were seen.

Measured without a verdict: the bound of the published network and where it is paid, the exact reverse steps of the
heartbeat chain, the PSNR of single posterior samples, and the bound of the swiss roll.
"""

import itertools
import json
import math

import torch

import train
from model import denoise, inpaint
from sample import build
from utils import Claim, above, arm_weights, cli, digits, figure, published, save_figure, save_grid, seeded

TRUTH = -math.log2(5)                                  # log2 p of a heartbeat: five starts, all alike


def main(argv=None):
    claim = Claim(__file__, argv, sections=("dpm", "binomial", "digits", "points", "bits"))
    run, cfg = claim.run, claim.cfg
    small = [f"batch_size={cfg.bit_batch}", "precision=fp32"]
    arms = {"digits": arm("mnist", cfg.steps, cfg.bound_n),
            "heartbeat": arm("heartbeat", cfg.bit_steps, cfg.bit_n, *small)}
    rows = claim.arms(arms, train=train.main, measure=measure)
    roll = claim.arms({"swiss_roll": arm("swiss_roll", cfg.point_steps, cfg.bit_n, *small)}, train=train.main,
                      measure=measure, seeds=[0])
    tasks = claim.each(posterior, task=list(POSTERIORS), seed=claim.seeds)
    network = learned_steps(run)

    claim.judge("a", "The bound of bits comes within 0.28 bits of the truth, -2.32 bits a sequence, and not above it",
                paper="reported as about -2.41 bits (Table 1)", rule="in every seed",
                holds=all(-2.6 <= bits <= TRUTH for bits in rows.values("bits", arm="heartbeat")))
    last = [bound[-1] for bound in histories(rows)]
    claim.judge("b1", "The bound of test digits is more than 2 bits a pixel above an isotropic Gaussian",
                paper="reported to be bits a pixel above a Gaussian, on other sets of images (Table 1)",
                holds=above(last, [2] * len(last)))
    claim.judge("b2", "The bound of test digits rises from each of six looks at a training to the next",
                rule="in every seed", holds=rises(histories(rows)))
    for letter, task, sentence in (
            ("c1", "inpainting", "The posterior finds a missing lower half better than the training images' mean does"),
            ("c2", "denoising", "The posterior takes noise off better than the Wiener filter, the best linear way")):
        claim.judge(letter, sentence, paper="shown as pictures (Sec. 3.2)", holds=above(
            tasks.values("mean_of_samples", task=task), tasks.values("baseline", task=task)))

    claim.note("published", {key: value for key, value in network.items() if not isinstance(value, list)})
    claim.note("swiss_roll_bits", histories(roll, "swiss_roll")[0][-1])
    run.output(plot_readout, network, "readout.png")
    run.output(plot_swiss_roll, load(run, arm_weights(run, "swiss_roll")), "swiss_roll.png")
    run.output(plot_heartbeat, load(run, arm_weights(run, "heartbeat")), "heartbeat.png")
    for task, name in (("inpainting", "inpainting.png"), ("denoising", "denoised.png")):
        rows = [row[:10] for row in tasks.where(task=task, seed=0)[0]["x"]]
        run.output(save_grid, torch.cat(rows), name, columns=len(rows[0]), down=ROWS[task])
    return claim.finish(plot=plot, headline=f"bound {network['bits']:.2f} bits a pixel above a Gaussian",
                        bits_over_gaussian=network["bits"])


def histories(rows, arm="digits"):
    """The bounds of every seed's training, in the order of the steps."""
    return [list(row["history"].values()) for row in rows.where(arm=arm)]


def rises(bounds):
    """(b2): every bound is above the one before, in every seed."""
    return all(a < b for values in bounds for a, b in itertools.pairwise(values))


# ------------------------------------------------------------------ the arms
def arm(data, steps, n, *more):
    """The keys of train.py: the bound of n test data is taken six times."""
    return [f"data={data}", f"steps={steps}", f"bound_every={max(1, steps // 6)}", f"bound_n={n}",
            f"log_every={max(1, steps // 60)}", *more]


def load(run, weights):
    """Chain and network of a weights file."""
    chain, net = build(weights.config)
    return run.place(chain, weights.load(net))


def measure(run, weights, arm, seed):
    """The bounds of the training; of a heartbeat also the bound with more sequences, learned and with exact steps."""
    found = {"history": dict(bounds(weights.path))}
    if arm == "heartbeat":
        (chain, net), generator = load(run, weights), seeded(seed)
        x0 = train.heartbeat(run.config.reproduce.bit_n, generator).to(run.device)
        bits = chain.bound(net, x0, generator)[0] * x0.shape[1]
        exact = chain.bound(ExactHeartbeat(chain), x0, generator)[0] * x0.shape[1]
        found |= {"bits": bits.mean().item(), "bits_error": standard_error(bits), "exact_steps": exact.mean().item()}
    return found


def bounds(path):
    """The (step, bound) that a training wrote down."""
    rows = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(row["step"], row["bound"]) for row in rows if "bound" in row]


def standard_error(values):
    """Of the mean."""
    return (values.std() / math.sqrt(len(values))).item()


class ExactHeartbeat:
    """Called like a network, it moves the log odds of every bit to those of the exact q(x_{t-1} | x_t).

    Given x_t the bits of p are independent of each other and those of q are not: this is the best such a p can do.
    """

    def __init__(self, chain, size=20, period=5):
        self.chain = chain
        data = torch.arange(size) % period == torch.arange(period)[:, None]                   # all there is, (5, 20)
        self.data = data.double().to(chain.abar.device)

    def __call__(self, x, t):
        xt, chain = ((x + 1) / 2).double(), self.chain
        likelihood, q = [], []
        for x0 in self.data:
            p = chain.q_bit(x0, t, torch.full_like(t, -1))
            likelihood.append(torch.where(xt == 1, p, 1 - p).log().sum(1))
            q.append(chain.q_posterior(x0.expand_as(xt), xt, t))
        share = torch.stack(likelihood).softmax(0)                         # of each start, (5, B)
        z = torch.logit((share[:, :, None] * torch.stack(q)).sum(0))
        return z - chain.p_logit(lambda *_: 0, xt, t)


@torch.no_grad()
def learned_steps(run):
    """The published network's bound, where it is paid, and what it makes of the variance."""
    dpm, net = load(run, published(run, "digits"))
    x0, _ = digits("test").first(4 * run.config.reproduce.bound_n)
    generator = seeded(0)
    bits, terms = dpm.bound(net, x0.to(run.device), generator)
    times, ratio, small = list(range(1, dpm.timesteps, max(1, dpm.timesteps // 60))), [], []
    x = dpm.standardise(x0[:8].to(run.device), generator)
    for i in times:
        t = torch.full((len(x),), i, device=x.device)
        _, variance = dpm.p_step(net, dpm.q_draw(x, t, generator), t)
        beta = dpm.beta(t, t - 1)
        ratio.append((variance.flatten(1).mean(1) / beta).mean().item())
        small.append((dpm.beta_tilde(t, t - 1) / beta)[0].item())
    return {"bits": bits.mean().item(), "error": standard_error(bits), "n": len(x0), "limit": dpm.bits(0.0),
            "bits_per_dim": bits_per_dim(dpm, bits.mean().item()), "terms": terms.mean(0).tolist(),
            "basis": dpm.basis.tolist(), "times": times, "variance_over_beta": ratio, "beta_tilde_over_beta": small}


def bits_per_dim(dpm, bits):
    """Bits a pixel that code the grey levels, by a bound of `bits` above a unit Gaussian. Less is better."""
    return 0.5 * math.log2(2 * math.pi * math.e) - bits + math.log2(dpm.std * (dpm.levels - 1) / 2)


# ------------------------------------------------------------------ (c) posteriors
def posterior(run, task, seed):
    """The PSNR of both estimates and of the baseline for this seed's test digits, and the pictures."""
    dpm, net = load(run, published(run, "digits"))
    images = run.config.reproduce.images
    x0, _ = digits("test").first(images * (seed + 1))
    return POSTERIORS[task](run, dpm, net, x0[-images:].to(run.device), seeded(seed))


def samples(run, dpm, net, x0, r, generator):
    """Posterior samples (K, B, 1, 28, 28) in [-1, 1] of images x0 (B, 1, 28, 28); r takes a batch of K B."""
    cfg = run.config.reproduce
    xT = torch.randn(cfg.samples * len(x0), *x0.shape[1:], generator=generator).to(x0.device)
    for _, x, _ in dpm.reverse(net, xT, min(cfg.sample_steps, dpm.timesteps - 1), r, generator):
        pass
    return dpm.restore(x).reshape(cfg.samples, *x0.shape).clamp(-1, 1)


def inpainting(run, dpm, net, x0, generator):
    """The lower half from the upper one, beside the mean of the training images."""
    k = run.config.reproduce.samples
    missing = torch.zeros_like(x0, dtype=torch.bool)
    missing[:, :, 14:] = True
    known, mask = dpm.standardise(x0, generator).repeat(k, 1, 1, 1), ~missing.repeat(k, 1, 1, 1)
    x = samples(run, dpm, net, x0, inpaint(known, mask), generator)
    train_mean = train_images(run).mean(0).to(x0.device).clamp(-1, 1).expand_as(x0)
    return {**scores(x, train_mean, x0, missing),
            "x": [row.cpu() for row in (x0, x0.masked_fill(missing, 0), x[0], x[1], x.mean(0))]}


def denoising(run, dpm, net, x0, generator):
    """The digit behind noise of the data's own variance, beside the Wiener filter's answer."""
    k, sigma = run.config.reproduce.samples, 1.0
    clean = dpm.standardise(x0, generator)
    y = clean + sigma * torch.randn(clean.shape, generator=generator).to(x0.device)
    x = samples(run, dpm, net, x0, denoise(y.repeat(k, 1, 1, 1), sigma), generator)
    wiener = dpm.restore(wiener_filter(dpm.standardise(train_images(run), generator), y, sigma)).clamp(-1, 1)
    return {**scores(x, wiener, x0, torch.ones_like(x0, dtype=torch.bool)),
            "x": [row.cpu() for row in (x0, dpm.restore(y), x[0], x.mean(0), wiener)]}


POSTERIORS = {"inpainting": inpainting, "denoising": denoising}
ROWS = {"inpainting": ["test digit", "what is known", "one sample", "another one", "mean of eight"],
        "denoising": ["test digit", "with noise", "one sample", "mean of eight", "Wiener filter"]}


def scores(x, baseline, x0, where):
    """PSNR of the mean of samples x (K, B, ...), of one of them, and of the baseline (B, ...)."""
    return {"mean_of_samples": psnr(x.mean(0), x0, where), "one_sample": psnr(x[0], x0, where),
            "baseline": psnr(baseline, x0, where)}


def train_images(run):
    """Training images for mean and covariance."""
    return digits("train").first(500 if run.config.reproduce.smoke else 20_000)[0]


def wiener_filter(data, y, sigma):
    """The best linear estimate of x from y = x + sigma eps: m + C (C + sigma^2 I)^-1 (y - m)."""
    data = data.flatten(1).double()
    mean, covariance = data.mean(0), torch.cov(data.T)
    noisy = covariance + sigma ** 2 * torch.eye(len(covariance), dtype=torch.float64)
    weights = torch.linalg.solve(noisy, covariance)
    return (mean + (y.flatten(1).double().cpu() - mean) @ weights).to(y).reshape(y.shape)


def psnr(x, x0, where):
    """Peak signal-to-noise ratio over some pixels of all images, in dB; the range of [-1, 1] is 2."""
    return (10 * torch.log10(4 / (x - x0)[where].square().mean())).item()


# ------------------------------------------------------------------ pictures
def plot(claim, path):
    """The three claims, a dot a seed."""
    fig, ((left, right), (below, corner)) = figure(2, 2, width=4.2, height=3.2)
    corner.remove()
    below.set_subplotspec(below.get_gridspec()[1, :])
    beats, known = claim.rows.where(arm="heartbeat"), claim.notes["published"]
    left.axhspan(-2.6, TRUTH, color="grey", alpha=0.15, label="where the claim wants it")
    left.axhline(TRUTH, color="k", ls=":", lw=1, label="the truth: -2.322")
    left.plot([row["exact_steps"] for row in beats], "_", ms=16, color="k", label="bound, exact steps")
    left.errorbar(range(len(beats)), [row["bits"] for row in beats], [row["bits_error"] for row in beats], fmt="o",
                  label="bound, learned steps")
    left.set(xlabel="seed", xticks=range(len(beats)), ylabel="bits a sequence", title="(a) heartbeat",
             xlim=(-0.5, len(beats) - 0.5))
    for row in claim.rows.where(arm="digits"):
        right.plot([0, *map(int, row["history"])], [0, *row["history"].values()], "o-", ms=3)
    right.axhline(known["bits"], color="grey", lw=1, label="published network")
    right.axhline(known["limit"], color="k", ls=":", lw=1, label="no divergence at any t")
    right.set(xlabel="training step", ylabel="bits a pixel above a Gaussian", title="(b) bound of test digits")
    for i, task in enumerate(POSTERIORS):
        for j, (key, name) in enumerate({"mean_of_samples": "mean of eight samples", "one_sample": "one sample",
                                         "baseline": "mean image (left), Wiener filter (right)"}.items()):
            values = claim.rows.values(key, task=task)
            below.plot([i + 0.22 * (j - 1)] * len(values), values, "o", color=f"C{j}", label=name if i == 0 else None)
    below.set_xticks(range(2), list(POSTERIORS))
    below.set(ylabel="PSNR, dB", title="(c) posteriors", xlim=(-0.5, 1.5))
    for ax, free in ((left, "center"), (right, "lower right"), (below, "center")):
        ax.legend(fontsize=8, loc=free)
        ax.grid(alpha=0.3)
    return save_figure(fig, path)


def plot_readout(published, path):
    """The bumps; below them the learned variance by time and where the bound is paid."""
    fig, ((above, corner), (left, right)) = figure(2, 2, width=4.2, height=3.0)
    corner.remove()
    above.set_subplotspec(above.get_gridspec()[0, :])
    above.plot(published["basis"])
    above.set(xlabel="t", ylabel="weight of a bump", title="the ten bumps of the readout")
    left.plot(published["times"], published["variance_over_beta"], "o-", ms=3, label="learned, mean over pixels")
    left.plot(published["times"], published["beta_tilde_over_beta"], "k:", label="if $x_0$ were known")
    left.axhline(1, color="grey", lw=1, label="if nothing is known of $x_0$")
    left.set(xlabel="t", xscale="log", ylabel=r"variance of a step back / $\beta_t$", title="the learned variance")
    left.legend(fontsize=8)
    terms = [term / math.log(2) for term in published["terms"]]
    right.plot(range(1, 1 + len(terms)), terms)
    right.set(xlabel="t", xscale="log", yscale="log", ylabel="divergence, bits a pixel", title="where bits are lost")
    for ax in (left, right):
        ax.set_xticks([1, 10, 100, 999], ["1", "10", "100", "999"])
    right.set_yticks([0.1, 0.01, 0.001], ["0.1", "0.01", "0.001"])
    for ax in (above, left, right):
        ax.grid(alpha=0.3)
    return save_figure(fig, path)


@torch.no_grad()
def plot_swiss_roll(arm, path, n=3000):
    """Data on the way to noise, noise on the way to data, and the drift of the learned steps, at three times."""
    (dpm, net), generator = arm, seeded(0)
    device, last = dpm.abar.device, dpm.timesteps - 1
    times = (0, last // 2, last)
    x0 = dpm.standardise(train.swiss_roll(n, generator).to(device))
    xT = torch.randn(n, 2, generator=generator).to(device)
    path_back = {last: xT, **{t - 1: x for t, x, _ in dpm.reverse(net, xT, generator=generator)}}
    side = torch.linspace(-2.2, 2.2, 16)
    at = torch.cartesian_prod(side, side).to(device)
    fig, axes = figure(3, 3, width=2.6, height=2.6)
    for column, t in zip(axes.T, times):
        there = dpm.q_draw(x0, torch.full((n,), t, device=device), generator)
        for ax, x in zip(column, (there, path_back[t])):
            ax.plot(*x.cpu().T, ".", ms=1)
        time = torch.full((len(at),), max(t, 1), device=device)
        drift = (dpm.p_step(net, at, time)[0] - at) / dpm.beta(time, time - 1)[:, None].float()
        column[2].quiver(*at.cpu().T, *(drift / (1 + drift.norm(dim=1, keepdim=True))).cpu().T, scale=12, width=0.006)
        column[0].set_title(f"t = {t}", fontsize=10)
        for ax in column:
            ax.set(xticks=[], yticks=[], xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), aspect="equal")
    for ax, name in zip(axes[:, 0], ("data to noise", "noise to data", "drift")):
        ax.set_ylabel(name)
    return save_figure(fig, path)


def plot_heartbeat(arm, path, n=40):
    """Sequences on the way to coins, and coins on the way to sequences: a row each, dark is 1."""
    (chain, net), generator = arm, seeded(0)
    device, last = chain.abar.device, chain.timesteps - 1
    x0 = train.heartbeat(n, generator).to(device)
    times = [0, last // 4, last // 2, 3 * last // 4, last]
    xT = (torch.rand(x0.shape, generator=generator) < 0.5).float().to(device)
    back = {last: xT, **{t - 1: x for t, x in chain.reverse(net, xT, generator)}}
    fig, axes = figure(2, 5, width=1.9, height=2.6)
    for column, t in zip(axes.T, times):
        there = chain.q_draw(x0, torch.full((n,), t, device=device), generator)
        for ax, x in zip(column, (there, back[t])):
            ax.imshow(x.cpu(), cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            ax.set(xticks=[], yticks=[])
        column[0].set_title(f"t = {t}", fontsize=10)
    axes[0, 0].set_ylabel("data to coins")
    axes[1, 0].set_ylabel("coins to data")
    return save_figure(fig, path)


if __name__ == "__main__":
    cli(main)
