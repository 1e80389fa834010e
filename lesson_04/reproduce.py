"""Measure the claims of the NCSNv2 paper again: its constants, the average of the weights, the last step, sigma_1.

    python reproduce.py publish=true        all arms, three seeds; writes results/claim.json and results/claim.png
    python reproduce.py quick=true          a look at it, no verdict
    python reproduce.py train.lr=1e-3       other values for all arms; without publish=true to runs/claim

To spend the minutes where they count, every arm goes on from the published network, which learned with sigma_1 from
the data; an arm with a small sigma_1 starts ahead by that. The learning rate is constant after a warm-up of 100 steps,
as in the paper, and the average of an arm starts with the arm. The criteria, in `main`, were written down before the
numbers were seen. A first, smaller run failed (b), (c) and (d): README has both side by side.

Measured without a verdict: the same two sigma_1 with the exact score of 2,000 training images; the noise of the last
level on training images; the published network's loss by level.
"""

import statistics

import torch

import train
from model import (
    NCSNv2,
    UNet,
    from_unit,
    noise_levels,
    overlap,
    solve_step_size,
    spacing,
    to_unit,
    variance_ratio,
)
from sample import draw
from utils import (
    Claim,
    arm_weights,
    below,
    cli,
    deviation,
    digits,
    fid_to_test,
    figure,
    floor,
    published,
    save_figure,
    save_grid,
    score,
    seeded,
    ticks,
)

# Reported for the paper's models: pixels, sigma_1, levels, T, step size. sigma_L is 0.01.
PAPER = {"CIFAR-10": (3 * 32 ** 2, 50, 232, 5, 6.2e-6), "CelebA 64 x 64": (3 * 64 ** 2, 90, 500, 5, 3.3e-6)}
DATA, SMALL = "from the data", "small"                 # the two arms, by their sigma_1
KINDS = ("raw", "ema")                                 # weights as they are, and averaged
GRIDS = ["as they are", "", "averaged", "", "averaged, σ₁ = 1", ""]           # what stands beside the rows of arms.png


def main(argv=None):
    claim = Claim(__file__, argv)
    run, cfg = claim.run, claim.cfg
    last = [cfg.steps - cfg.every * back for back in reversed(range(cfg.snapshots))]
    arms = {DATA: [f"sigma_1={run.config.ncsn.sigma_1}"], SMALL: [f"sigma_1={cfg.small_sigma_1}"]}
    claim.train(arms, train=train.main, keys=["gpu=false", f"start={cfg.start}", f"steps={cfg.steps}", "decay=false",
                                              f"snapshot_every={cfg.every}"])
    rows = claim.each(snapshot, [*({"arm": DATA, "kind": kind, "step": step} for step in last for kind in KINDS),
                                 {"arm": SMALL, "kind": "ema", "step": last[-1]}], seed=claim.seeds)
    ends = claim.each(last_step, network="published", seed=claim.seeds)

    known = constants(train.settings(run.config.ncsn, digits("train")))
    claim.exact("a1", "Technique 4 gives the step sizes reported for the paper's two models, to both digits",
                paper="6.2e-6 for CIFAR-10, 3.3e-6 for CelebA",
                holds=all(f"{row['epsilon']:.1e}" == f"{row['reported']:.1e}" for row in known["paper"].values()))
    claim.judge("a2", "The levels reported for these models overlap by the 0.5 of Technique 2, to within 0.1",
                paper="about 0.5", rule="computed, not drawn",
                holds=all(abs(row["overlap"] - 0.5) < 0.1 for row in known["paper"].values()))
    claim.judge("b1", "Averaged weights have a lower mean FID over the last snapshots of a training",
                paper="lower FIDs with the average (Technique 5)", holds=calmer(rows, statistics.mean))
    claim.judge("b2", "The FID of averaged weights varies less from snapshot to snapshot",
                paper="the average holds FIDs still (Technique 5)", holds=calmer(rows, deviation))
    low, high = (shares(ends, key) for key in ("fid_low", "fid"))
    claim.judge("c1", "The last denoising step takes more than a tenth off FID-low, the FID of first-layer statistics",
                holds=below(*(ends.values(key, network="published") for key in ("fid_low", "fid_low_noisy")), 0.9))
    claim.judge("c2", "The last step changes FID by less than a third of the share by which FID-low falls",
                holds=below([abs(share) for share in high], low, 1 / 3))
    averaged = rows.where(kind="ema", step=last[-1])
    claim.judge("d1", "With sigma_1 = 1 the samples have a lower recall than with sigma_1 from the data",
                paper="a small sigma_1 gives less diverse samples (Sec. 3.1)",
                holds=averaged.above(DATA, SMALL, "recall"))
    claim.judge("d2", "With sigma_1 = 1 their classes are further from those of the test set",
                paper="a small sigma_1 gives less diverse samples (Sec. 3.1)",
                holds=averaged.above(SMALL, DATA, "off"))

    claim.note("constants", known)
    claim.note("training_images", noised_training_images(cfg.n))
    claim.note("exact_score", exact_scores(run))
    claim.note("by_level", by_level(run))
    claim.note("floor", {"fid": floor(cfg.n), "fid_low": floor(cfg.n, True)})
    run.output(techniques, claim, "techniques.png")
    run.output(save_grid, torch.cat(grids(run, last[-1])), "arms.png", columns=12, down=GRIDS)
    return claim.finish(plot=plot, n=cfg.n)


def calmer(rows, statistic):
    """(b): of the FIDs of a training's snapshots, this statistic is lower for the averaged weights."""
    raw, ema = ([statistic(row) for row in of_each_seed(rows, kind)] for kind in KINDS)
    return below(ema, raw)


def of_each_seed(rows, kind, key="fid"):
    """One list a seed: the values of its snapshots, in the order of the steps."""
    return [list(values) for values in zip(*rows.by("step", key, arm=DATA, kind=kind).values())]


def shares(rows, key):
    """The share by which the last step lowers a number, of every seed."""
    return [1 - row[key] / row[f"{key}_noisy"] for row in rows.where(network="published")]


# ------------------------------------------------------------------ what is measured
def load(run, weights):
    """Process and network of a weights file."""
    return run.place(NCSNv2(**weights.config["ncsn"]), weights.load(UNet(**weights.config["unet"])))


def saved_at(run, arm, kind, step, seed):
    """Process and network of a snapshot of an arm."""
    return load(run, run.read(arm_weights(run, arm, seed).path.parent / f"{kind}_{step:06d}.safetensors"))


def snapshot(run, arm, kind, step, seed):
    """Scores of n samples of a snapshot."""
    return measure(run, *saved_at(run, arm, kind, step, seed), seed)


def last_step(run, network, seed):
    """The same of the published network."""
    return measure(run, *load(run, published(run, DATA)), seed)


def measure(run, ncsn, net, seed):
    """Scores of n samples, and the two FIDs of the same chains without the last step."""
    cfg = run.config.reproduce
    noisy = to_unit(draw(ncsn, net, cfg.n, cfg.sample_steps, seeded(seed), denoise=False))
    x = from_unit(torch.cat([ncsn.last_step(net, part) for part in noisy.split(128)])).nan_to_num()
    noisy, scores = from_unit(noisy).nan_to_num(), score(x)
    off = sum(abs(a - b) for a, b in zip(scores["classes"], of_the_test_set())) / 2               # total variation
    return {"fid": scores["fid"], "fid_low": scores["fid_low"], "fid_noisy": fid_to_test(noisy),
            "fid_low_noisy": fid_to_test(noisy, low=True), "recall": scores["recall"],
            "precision": scores["precision"], "classes": scores["classes"], "off": off}


def of_the_test_set():
    """The shares of the ten digits among the test images."""
    return (torch.bincount(digits("test").first(10_000)[1], minlength=10) / 10_000).tolist()


def grids(run, step):
    """Rows of samples from the same noise: raw and averaged weights, and averaged ones with a small sigma_1."""
    rows = []
    for arm, kind in ((DATA, "raw"), (DATA, "ema"), (SMALL, "ema")):
        ncsn, net = saved_at(run, arm, kind, step, 0)
        x = draw(ncsn, net, 32, run.config.reproduce.sample_steps, run.generator()).nan_to_num()
        rows += [part[:12] for part in x.chunk(2)]
    return rows


# ------------------------------------------------------------------ (a) Techniques 2 and 4
def constants(levels):
    """What the solvers give for the paper's two models and for these levels of MNIST: sigma_1 and sigma_L."""
    table = {}
    for name, (dim, sigma_1, count, T, reported) in PAPER.items():
        gamma = (sigma_1 / 0.01) ** (1 / (count - 1))
        table[name] = {"dim": dim, "sigma_1": sigma_1, "levels": count, "T": T, "gamma": gamma,
                       "overlap": overlap(gamma, dim), "epsilon": solve_step_size(0.01, gamma, T),
                       "reported": reported, "levels_at_half": len(noise_levels(sigma_1, 0.01, spacing(dim)))}
    ncsn = NCSNv2(**levels)
    return {"paper": table, "mnist": {
        "dim": 784, "sigma_1": levels.sigma_1, "levels": ncsn.levels, "gamma": ncsn.gamma,
        "overlap": overlap(ncsn.gamma, 784), "sigma_L": levels.sigma_L,
        "epsilon": {str(T): solve_step_size(levels.sigma_L, ncsn.gamma, T) for T in (3, 5, 10)}}}


# ------------------------------------------------------------------ (c) and (d) without a network's error
def noised_training_images(n):
    """FID and FID-low of training images, and with the noise of the last level on them."""
    real, _ = digits("train").first(n, shuffle_seed=0)
    noised = real + 2 * 0.01 * torch.randn(real.shape, generator=seeded(0))
    return {"fid": fid_to_test(real), "fid_noisy": fid_to_test(noised),
            "fid_low": fid_to_test(real, low=True), "fid_low_noisy": fid_to_test(noised, low=True)}


class Exact(NCSNv2):
    """The same levels and sampler with the exact score of a few images (K, D) instead of a network."""

    def score(self, net, x, i):
        """(E[x_0 | x] - x) / sigma^2; the mean is over the images, by how likely each is behind x. (B, C, H, W)."""
        sigma2, flat = self.sigmas[i].float()[:, None] ** 2, x.flatten(1)
        distance2 = flat.square().sum(1, keepdim=True) - 2 * flat @ net.T + net.square().sum(1)
        mean = (-distance2 / (2 * sigma2)).softmax(1) @ net
        return ((mean - flat) / sigma2).reshape(x.shape)


@torch.no_grad()
def by_level(run):
    """The loss at eleven levels on test images; beside it that of a network that answers with the mean image."""
    ncsn, net = load(run, published(run, DATA))
    x0, mean = (to_unit(x) for x in (digits("test").first(256)[0], digits("train").first(10_000)[0].mean(0)))
    z, rows = torch.randn(x0.shape, generator=run.generator()), []
    for level in torch.linspace(0, ncsn.levels - 1, 11).round().long().tolist():
        sigma = ncsn.sigmas[level].item()
        i = torch.full((len(x0),), level, device=run.device)
        loss = ncsn.level_losses(net, x0.to(run.device), i, z.to(run.device)).mean()
        blind = ((x0 - mean) / sigma).square().mean() / 2      # of the output -(x - mean) / sigma
        rows.append({"sigma": sigma, "loss": float(loss), "mean_image": float(blind)})
    return rows


def exact_scores(run):
    """Chains with the exact score end at one of the images: how many different ones, and how far off the classes."""
    cfg, table = run.config.reproduce, {}
    images, labels = digits("train").first(cfg.exact_images)
    images, share = to_unit(images).flatten(1), torch.bincount(labels, minlength=10) / len(labels)
    levels = train.settings(run.config.ncsn, digits("train"))
    for name, sigma_1 in ((DATA, levels.sigma_1), (SMALL, cfg.small_sigma_1)):
        x = Exact(sigma_1, levels.sigma_L).sample(images, cfg.exact_n, cfg.sample_steps, generator=run.generator())
        found = torch.cdist(x.flatten(1), images).argmin(1)
        classes = torch.bincount(labels[found], minlength=10) / len(x)
        table[name] = {"different": len(found.unique()), "off": float((classes - share).abs().sum() / 2),
                       "classes": [round(float(value), 4) for value in classes]}
    expected = cfg.exact_images * (1 - (1 - 1 / cfg.exact_images) ** cfg.exact_n)     # of as many uniform draws
    return {**table, "n": cfg.exact_n, "images": cfg.exact_images, "different_of_uniform_draws": expected}


# ------------------------------------------------------------------ pictures
def plot(claim, path):
    """Three answers: does averaging calm the FID, what does the last step change, which digits come out."""
    fig, ((left, right), (below, corner)) = figure(2, 2, width=4.2, height=3.2)
    corner.remove()
    below.set_subplotspec(below.get_gridspec()[1, :])
    rows, steps = claim.rows, list(claim.rows.by("step", "fid", arm=DATA, kind="raw"))
    for kind, color, label in (("raw", "C3", "weights as they are"), ("ema", "C0", "averaged")):
        left.plot(steps, list(zip(*of_each_seed(rows, kind))), "o-", color=color, label=label)
    left.set(xlabel="training step", xticks=steps, ylabel=f"FID (n = {claim.cfg.n})", title="(b) averaging the weights")
    left.margins(y=0.35)
    left.legend(*(some[::claim.cfg.seeds] for some in left.get_legend_handles_labels()), fontsize=8, loc="upper right")
    for x, key in enumerate(("fid", "fid_low")):
        for offset, end, color in ((-0.2, "_noisy", "C3"), (0.2, "", "C0")):
            values = rows.values(key + end, network="published")
            right.bar(x + offset, statistics.mean(values), 0.38, color=color,
                      label={"_noisy": "without the last step", "": "with it"}[end] if x == 0 else None)
            right.plot([x + offset] * len(values), values, "k.", ms=4)
    right.set(xticks=[0, 1], xticklabels=["FID", "FID-low"], title="(c) the last step", ylim=(0, 36))
    right.legend(fontsize=8, loc="upper right")
    names = {DATA: "$\\sigma_1$ from the data", SMALL: "$\\sigma_1 = 1$"}
    for offset, arm, color in ((-0.2, DATA, "C0"), (0.2, SMALL, "C3")):
        classes = zip(*[row["classes"] for row in rows.where(arm=arm, kind="ema", step=steps[-1])])
        below.bar([k + offset for k in range(10)], [statistics.mean(share) for share in classes], 0.38, color=color,
                  label=names[arm])
    below.plot(range(10), of_the_test_set(), "k_", ms=16, label="test set")
    below.set(xticks=range(10), xlabel="digit", ylabel="share of the samples", title="(d) the largest noise")
    below.legend(fontsize=8, loc="upper right")
    return save_figure(fig, path)


def techniques(claim, path):
    """The overlap against gamma, the variance ratio against the step size, the network's loss at every level."""
    fig, ((left, right), (below, corner)) = figure(2, 2, width=4.2, height=3.2)
    corner.remove()
    below.set_subplotspec(below.get_gridspec()[1, :])
    mnist = claim.notes["constants"]["mnist"]
    gammas = [1 + k / 1000 for k in range(1, 200)]
    left.plot(gammas, [overlap(gamma, 784) for gamma in gammas])
    left.plot(spacing(784), 0.5, "o", label=f"$\\gamma$ = {spacing(784):.4f}")
    left.axhline(0.5, color="grey", ls=":", lw=1)
    left.set(xlabel="ratio $\\gamma$ of two levels", ylabel="overlap of neighbouring levels",
             title="Technique 2, 784 dimensions")
    left.legend(fontsize=8)
    steps = [mnist["sigma_L"] ** 2 * 10 ** (-2.5 + k / 80) for k in range(200)]
    for (T, epsilon), color in zip(mnist["epsilon"].items(), ("C0", "C1", "C2")):
        ratio = [variance_ratio(step, mnist["sigma_L"], mnist["gamma"], int(T)) for step in steps]
        right.plot(steps, ratio, color=color, label=f"T = {T}: $\\epsilon$ = {epsilon:.2e}")
        right.plot(epsilon, variance_ratio(epsilon, mnist["sigma_L"], mnist["gamma"], int(T)), "o", color=color)
    right.axhline(1, color="grey", ls=":", lw=1)
    right.set(xscale="log", xlabel="step size $\\epsilon$", ylabel="variance after a level / $\\sigma_i^2$",
              ylim=(0.95, 1.3), title="Technique 4")
    ticks(right.xaxis, (1e-6, 1e-5, 1e-4))
    right.legend(fontsize=8)
    sigma = [row["sigma"] for row in claim.notes["by_level"]]
    below.loglog(sigma, [row["loss"] for row in claim.notes["by_level"]], "o-", label="published network")
    below.loglog(sigma, [row["mean_image"] for row in claim.notes["by_level"]], "k--", label="the mean image, always")
    below.axhline(0.5, color="grey", ls=":", lw=1, label="an output of 0")
    below.set(xlabel="noise $\\sigma$", ylabel="loss a pixel", ylim=(5e-5, 1), title="what was learned")
    ticks(below.xaxis, (0.01, 0.1, 1, 10))
    ticks(below.yaxis, (0.0001, 0.001, 0.01, 0.1, 1))
    below.legend(fontsize=8)
    return save_figure(fig, path)


if __name__ == "__main__":
    cli(main)
