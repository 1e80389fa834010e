"""Measure the claims of the DDIM paper again: Table 1, its turn at 1,000 steps, Table 2; and find out what decides.

    python reproduce.py publish=true      all of it, three seeds; writes results/claim.json and the pictures
    python reproduce.py quick=true        a look at it, no verdict
    python reproduce.py n=1024 seeds=5    other values; without publish=true to runs/claim

The network is lesson 05's published one. A row is a way to draw n images: an arm (eta, or sigma-hat), a number of
steps, and what is changed against the claim, where the times are the uniform sub-sequence and x_0 is not clipped. All
rows of a seed start from the same x_T. Table 2 encodes test images and draws them again; its "seeds" are disjoint sets
of images. The criteria, in `main`, were written down before the numbers were seen.

Measured without a verdict: what decides between eta = 0 and eta = 1, one factor at a time; how much the start decides
of the image; and what is drawn half-way between two noises.
"""

import math

import torch
from torch import nn

import train
from model import DDIM, UNet, slerp
from sample import draw
from utils import (
    Arm,
    Claim,
    arm_weights,
    classify,
    cli,
    deviation,
    digits,
    fid_to_test,
    figure,
    floor,
    lines,
    noise,
    published,
    save_figure,
    save_strip,
    seeded,
    ticks,
)


class Cosine(DDIM):
    """DDIM on the cosine schedule of lesson 09, for the factor that is the schedule."""

    def __init__(self, **ddpm):
        super().__init__(**ddpm)
        share = torch.arange(self.timesteps + 1, dtype=torch.float64) / self.timesteps
        level = torch.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2
        self.abar[:-1] = torch.cumprod(1 - (1 - level[1:] / level[:-1]).clamp(max=0.999), dim=0)


ETAS = {"eta 0": {"eta": 0.0}, "eta 0.2": {"eta": 0.2}, "eta 0.5": {"eta": 0.5}, "eta 1": {"eta": 1.0},
        "sigma-hat": {"hat": True}}
CLAIM, FRESH = "as in the claim", "x_0 clipped, noise made anew (fresh)"
FACTORS = {                                             # what differs from the row of the claim
    CLAIM: {},
    "x_0 clipped, noise kept (stale)": {"clip": "stale"},
    FRESH: {"clip": "fresh"},
    "times: quadratic, 0 to 0.8 T": {"spacing": "quadratic"},
    "times: both ends, 0 to T - 1": {"spacing": "ends"},
    "times: trailing, T/S - 1 to T - 1": {"spacing": "trailing"},
    "training: short": {"net": "short"},
    "training: medium": {"net": "medium"},
    "training: the exact denoiser": {"net": "exact"},
    "schedule: cosine, medium training": {"net": "cosine"},
    "cosine, medium, fresh, both ends": {"net": "cosine", "clip": "fresh", "spacing": "ends"},
    "linear, medium, fresh, both ends": {"net": "medium", "clip": "fresh", "spacing": "ends"},
}
FIDS = {"fid": "FID", "fid_low": "low-level FID"}


def main(argv=None):
    claim = Claim(__file__, argv, sections=("unet", "ddpm"))
    run, cfg = claim.run, claim.cfg
    short, medium = ([f"steps={steps}"] for steps in cfg.train_steps)
    claim.train({"short": short, "medium": medium, "cosine": Arm(medium, DDIM=Cosine)}, train=train.main, seeds=[0])
    rows = claim.each(measure, jobs(cfg))
    sets = claim.each(reconstruct, steps=cfg.reconstruct, keys=["precision=fp32"]).unfold("error", "seed")
    claim.judge("a1", "With few steps, eta = 0 has a lower FID than eta = 1, and a lower low-level FID",
                paper="FID 6.84 against 18.36 with 20 steps (Table 1, CIFAR-10)",
                holds=in_both_fids(rows, cfg, ("eta 0", "eta 1")))
    claim.judge("a2", "With few steps, sigma-hat is behind eta = 0 and eta = 1 in FID and in low-level FID",
                paper="FID 133.37 against 6.84 and 18.36 with 20 steps (Table 1, CIFAR-10)",
                holds=in_both_fids(rows, cfg, ("eta 0", "sigma-hat"), ("eta 1", "sigma-hat")))
    claim.judge("b", "With all steps, sigma-hat is at least on par with eta = 0, in FID and low-level FID",
                paper="FID 3.17 against 4.04 with 1,000 steps (Table 1, CIFAR-10)", holds=on_par(rows, cfg),
                rule="one seed: above by at most 3 standard deviations of eta = 0 over the seeds at few steps")
    claim.judge("c", "The error of encoding test images and drawing them again falls with the number of steps",
                paper="from 0.014 with 10 steps to 0.0001 with 1,000 (Table 2)", holds=falls(sets),
                rule="from each number of steps to the next, in each of the disjoint sets of images")
    claim.note("favours", {name: {key: favours(rows, cfg, name, key) for key in FIDS} for name in FACTORS})
    claim.note("consistency", consistency(rows, cfg))
    claim.note("interpolation", interpolation(run))
    claim.note("floor", {"fid": floor(cfg.n), "fid_low": floor(cfg.n, low=True)})
    run.output(plot_factors, claim, "factors.png")
    run.output(save_strip, [of(rows, arm, cfg.few)["x"][:12] for arm in ETAS], "eta.png", down=ETAS)
    return claim.finish(plot=plot, n=cfg.n)


def in_both_fids(rows, cfg, *pairs):
    """(a): whether the first of each pair is below the second, in both distances, at few steps."""
    return all(rows.below(a, b, key, steps=cfg.few, change=CLAIM) for a, b in pairs for key in FIDS)


def on_par(rows, cfg):
    """(b): whether sigma-hat is not clearly above eta = 0 at all steps, in both distances."""
    margin = {key: 3 * deviation(rows.values(key, arm="eta 0", steps=cfg.few, change=CLAIM)) for key in FIDS}
    zero, hat = (of(rows, arm, cfg.long) for arm in ("eta 0", "sigma-hat"))
    return all(hat[key] - zero[key] <= margin[key] for key in FIDS)


def falls(sets):
    """(c): whether the error falls from each number of steps to the next, in every set."""
    table = [values for _, values in sorted(sets.by("steps", "error").items())]
    return all(a > b for few, more in zip(table, table[1:]) for a, b in zip(few, more))


def favours(rows, cfg, name, key):
    """Which of eta = 0 and eta = 1 is below the other with this factor, if one is."""
    for a, b in (("eta 0", "eta 1"), ("eta 1", "eta 0")):
        if rows.below(a, b, key, steps=cfg.few, change=name):
            return a
    return "neither"


def of(rows, arm, steps):
    """The claim's row of an arm with the first seed."""
    return rows.where(arm=arm, steps=steps, seed=0, change=CLAIM)[0]


# ------------------------------------------------------------------ the networks
class Exact(nn.Module):
    """The noise that the best possible network predicts for these training images: E[eps | x_t]. (B, 1, 28, 28)."""

    def __init__(self, ddim, images):
        super().__init__()
        self.ddim, self.shape = ddim, images.shape[1:]
        self.register_buffer("images", images.flatten(1), persistent=False)                        # (N, 784)

    def forward(self, x, t):
        """x (B, 1, 28, 28), t (B,) -> the noise."""
        abar = self.ddim.abar[t].float()[:, None]
        x = x.flatten(1)
        distance = abar * self.images.square().sum(1) - 2 * abar.sqrt() * (x @ self.images.T)      # less |x|^2
        x0 = torch.softmax(-distance / (2 * (1 - abar)), dim=1) @ self.images                      # E[x_0 | x_t]
        return ((x - abar.sqrt() * x0) / (1 - abar).sqrt()).unflatten(1, self.shape)


def network(run, name="published"):
    """Sampler and network called `name`; in smoke mode the published one is that of the longer training."""
    if name == "exact":
        ddim = DDIM(**run.config.ddpm)
        return run.place(ddim, Exact(ddim, digits("train").first(run.config.reproduce.exact_images)[0]))
    weights = published(run, "medium") if name == "published" else arm_weights(run, name)
    process = Cosine if name == "cosine" else DDIM
    return run.place(process(**weights.config["ddpm"]), weights.load(UNet(**weights.config["unet"])))


# ------------------------------------------------------------------ drawing and scoring
def jobs(cfg):
    """Every row that is drawn, once, the longest first."""
    few = [(arm, cfg.few, seed, CLAIM) for seed in range(cfg.seeds) for arm in ETAS]
    few += [(arm, cfg.few, seed, name) for name in FACTORS for seed in range(cfg.seeds) for arm in ("eta 0", "eta 1")]
    few += [("sigma-hat", cfg.few, seed, FRESH) for seed in range(cfg.seeds)]             # as in the official code
    more = [(arm, steps, 0, CLAIM) for steps in cfg.counts for arm in ETAS]
    more += [(arm, cfg.long, 0, CLAIM) for arm in ("eta 0", "sigma-hat")]
    wanted = sorted(dict.fromkeys(more + few), key=lambda job: -job[1])
    return [dict(zip(("arm", "steps", "seed", "change"), job)) for job in wanted]


def measure(run, arm, steps, seed, change):
    """Draw n images in one way; their two FIDs, and the images."""
    cfg, way = run.config.reproduce, {"net": "published", "spacing": "uniform", "clip": "none", **FACTORS[change]}
    ddim, net = network(run, way["net"])
    xT = noise(cfg.n, (1, 28, 28), seeded(seed))        # the same start for every arm
    x = draw(ddim, net, xT, seeded(seed + 10**6), cfg.batch, times=ddim.times(steps, way["spacing"]), clip=way["clip"],
             **ETAS[arm]).cpu()
    return {"fid": fid_to_test(x), "fid_low": fid_to_test(x, low=True), "x": x}


# ------------------------------------------------------------------ one noise, one image: Sections 5.2 to 5.4
def reconstruct(run, steps):
    """Table 2: test images encoded and drawn again; the squared error of [0, 1] pixels, for each set of images."""
    cfg, (ddim, net) = run.config.reproduce, network(run)
    x0, tau = digits("test").first(cfg.images)[0].to(run.device), ddim.times(steps)
    x = ddim.sample(net, ddim.encode(net, x0, tau), tau)
    error = ((x - x0) / 2).square().flatten(1).mean(1)
    return {"error": {str(i): float(part.mean()) for i, part in enumerate(error.chunk(cfg.seeds))}}


def consistency(rows, cfg):
    """How far images are from those of eta = 0, `long` steps and the same x_T; and whether the digit is the same."""
    table, reference = {}, of(rows, "eta 0", cfg.long)["x"]
    for arm in ("eta 0", "eta 1"):
        for steps in sorted({*cfg.counts, cfg.few}):
            x = of(rows, arm, steps)["x"]
            same = (classify(x)[0] == classify(reference)[0]).float().mean()
            table.setdefault(arm, {})[str(steps)] = {
                "rms": float((x - reference).flatten(1).square().mean(1).sqrt().mean()), "same_digit": float(same)}
    return table


def interpolation(run):
    """FID of what is drawn half-way between two noises: along the circle, and in a straight line."""
    cfg, (ddim, net) = run.config.reproduce, network(run)
    a, b = (torch.randn(cfg.n, 1, 28, 28, generator=run.generator(i)).to(run.device) for i in (1, 2))
    mixed, result = {"from noise": a, "slerp": slerp(a, b, 0.5), "straight": (a + b) / 2}, {}
    for name, xT in mixed.items():
        x = torch.cat([ddim.sample(net, part, ddim.times(cfg.few)) for part in xT.split(cfg.batch)])
        result[name] = {"fid": fid_to_test(x), "fid_low": fid_to_test(x, low=True)}
    return result


# ------------------------------------------------------------------ pictures
def plot(claim, path):
    """Three answers: how both distances fall with the number of steps, and the error of there and back."""
    fig, axes = figure(2, 2, width=4.4)
    calls = sorted({*claim.cfg.counts, claim.cfg.long})
    for ax, (key, name) in zip(axes[0], FIDS.items()):
        lines(ax, claim.rows, "steps", key, seed=0, change=CLAIM)
        ax.axhline(claim.notes["floor"][key], color="grey", ls=":", lw=1)
        ax.set(xscale="log", yscale="log", xlabel="network calls an image", title=f"(a), (b) {name}, n = {claim.cfg.n}",
               ylabel=f"{name} (dotted: floor)")
        ticks(ax.xaxis, calls)
        ticks(ax.yaxis)
    back, empty = axes[1]
    sets = claim.rows.unfold("error", "seed")
    for i, of_set in enumerate(sets.by("seed", "error", steps=claim.cfg.reconstruct[0])):
        error = [(row["steps"], row["error"]) for row in sets.where(seed=of_set)]
        back.plot(*zip(*sorted(error)), "o-", ms=4, label=f"set of images {i + 1}")
    back.set(xscale="log", yscale="log", xlabel="steps each way", ylabel="squared error, pixels in [0, 1]",
             title="(c) there and back")
    ticks(back.xaxis, claim.cfg.reconstruct)
    back.grid(alpha=0.3)
    back.legend(fontsize=8)
    empty.set_axis_off()
    return save_figure(fig, path)


def plot_factors(claim, path):
    """What decides: the FID of eta = 0 as a multiple of that of eta = 1, each seed a dot; left of 1, 0 is better."""
    fig, ax = figure(width=8.0, height=0.8 + 0.36 * len(FACTORS))
    for k, (key, name) in enumerate(FIDS.items()):
        for i, change in enumerate(FACTORS):
            zero, one = (claim.rows.values(key, arm=arm, steps=claim.cfg.few, change=change)
                         for arm in ("eta 0", "eta 1"))
            ax.plot([a / b for a, b in zip(zero, one)], [i + 0.24 * k - 0.12] * len(zero), "os"[k], color=f"C{k}",
                    ms=5, alpha=0.7, label=None if i else name)
    ax.axvline(1, color="grey", lw=1)
    ax.set(xscale="log", yticks=range(len(FACTORS)), yticklabels=list(FACTORS),
           xlabel=f"eta = 0 over eta = 1, {claim.cfg.few} steps (left: eta = 0 is better)")
    ticks(ax.xaxis, (0.2, 0.5, 1, 2, 4))
    ax.invert_yaxis()
    ax.grid(alpha=0.3, axis="x", which="both")
    ax.legend(fontsize=8, loc="lower left")
    return save_figure(fig, path)


if __name__ == "__main__":
    cli(main)
