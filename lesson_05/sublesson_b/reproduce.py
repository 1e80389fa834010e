"""Measure Section 4.4 of the DDPM paper again: interpolating through noise instead of between pixels.

    python reproduce.py publish=true      every depth and rule, three seeds; writes results/claim.json and claim.png
    python reproduce.py quick=true        a look at it, no verdict
    python reproduce.py n=1024            more pairs; without publish=true to runs/claim

All with lesson 05's published network, on pairs of test images of different digits. A seed chooses pairs and noise.
(a) is about the middle (lam = 1/2) made the paper's way, with two noises, at t = 500: does it look more like a digit
than the mean of the two images? (b) is about digits that are encoded and decoded without a partner (lam = 0): how many
keep their class? Chance is the share that the same images keep if they are handed out at random. (c) is a remark of
this course, not of the paper: with two noises the mixture has only half the noise variance that the network expects,
which should do harm at the largest depth, where nothing but noise is left.
"""

import math
import statistics

import torch

from model import RULES, Interpolation, UNet, noise_share
from sample import pairs
from utils import Claim, above, below, classify, cli, deviation, fid_to_test, figure, floor, save_figure, seeded, ticks

CODE, BLEND, ALONE = "slerp of DDIM codes", "blend", "keep"


def main(argv=None):
    claim = Claim(__file__, argv)
    cfg = claim.cfg
    rows = claim.each(measure, [
        *({"what": what, "t": t, "seed": seed} for seed in claim.seeds for what in (*RULES, ALONE)
          for t in reversed(cfg.depths)),
        {"what": CODE, "t": 0, "seed": 0}, *({"what": BLEND, "t": 0, "seed": seed} for seed in claim.seeds)])
    fid, confidence = middle(rows, cfg)
    paper = "plausible interpolations at t = 500 (Sec. 4.4, Fig. 8, CelebA-HQ)"
    claim.judge("a1", "The middle of two latents has a lower FID than the mean of the two images",
                holds=fid, paper=paper)
    claim.judge("a2", "The label judge is surer of the middle of two latents than of the mean of the two images",
                holds=confidence, paper=paper)
    (much, less, chance), numbers = retention(rows, cfg)
    paper = "coarser and more varied interpolations for larger t, novel samples at t = 1000 (Sec. 4.4)"
    claim.judge("b1", "At the smallest depth, at least 95 % of the digits keep their class", holds=much, paper=paper,
                rule="by the mean over the seeds", **numbers)
    claim.judge("b2", "At every depth, fewer digits keep their class than at the one before", holds=less, paper=paper,
                rule="by the means over the seeds")
    claim.judge("b3", "At the largest depth, digits keep their class as often as by chance", holds=chance,
                paper=paper, rule="the mean over the seeds is within 3 standard errors of chance")
    for letter, rule, what in (("c1", "shared", "one noise for both gives"),
                               ("c2", "root", "square-root weights give")):
        claim.judge(letter, f"At the largest depth, {what} the middle a lower FID than two noises do",
                    holds=rows.below(rule, "independent", "fid", by="what", t=max(cfg.depths)))
    claim.note("floor", floor(cfg.n))
    claim.note("noise_share_at_half", {rule: noise_share(0.5, rule) for rule in RULES})
    return claim.finish(plot=plot)


def middle(rows, cfg):
    """(a): at the depth nearest to 500, is the FID below that of the blend, and the confidence above it?"""
    t = min(cfg.depths, key=lambda t: abs(t - 500))
    ours, blend = ({key: rows.values(key, **axes) for key in ("fid", "confidence")}
                   for axes in ({"what": "independent", "t": t}, {"what": BLEND}))
    return below(ours["fid"], blend["fid"]), above(ours["confidence"], blend["confidence"])


def retention(rows, cfg):
    """(b): is nearly all kept at the smallest depth, less with each, and chance at the largest? And the numbers."""
    depths = sorted(cfg.depths)
    kept = [rows.mean("kept", what=ALONE, t=t) for t in depths]
    chance = rows.mean("chance", what=ALONE, t=depths[-1])
    error = math.sqrt(chance * (1 - chance) / (cfg.keep * cfg.seeds))
    holds = kept[0] >= 0.95, all(a > b for a, b in zip(kept, kept[1:])), abs(kept[-1] - chance) <= 3 * error
    return holds, {"depths": depths, "kept": kept, "chance": chance, "standard_error": error}


# ------------------------------------------------------------------ one cell of the table
def measure(run, what, t, seed):
    """Images in the middle of n pairs under one rule at one depth, or what a digit keeps on its own ("keep")."""
    cfg, weights = run.config.reproduce, run.read(run.published)
    ddpm, net = run.place(Interpolation(**weights.config["ddpm"]), weights.load(UNet(**weights.config["unet"])))
    n = cfg.keep if what == ALONE else cfg.n
    x0, y0, x_label, y_label = pairs(n, seed)
    start, generator = run.clock(), seeded(seed)
    images = []
    for a, b in zip(x0.to(run.device).split(128), y0.to(run.device).split(128)):
        if what == BLEND:
            images.append((a + b) / 2)
        elif what == CODE:
            images += list(ddpm.spherical(net, a, b, [0.5], cfg.sample_steps))
        else:
            rule, lam = ("independent", 0.0) if what == ALONE else (what, 0.5)
            images += list(ddpm.between(net, a, b, [lam], t, rule, cfg.sample_steps, generator=generator))
    x = torch.cat(images).cpu()
    digit, confidence = classify(x)
    row = {"seconds": run.clock() - start}
    if what == ALONE:
        share = lambda labels: torch.bincount(labels, minlength=10) / n
        return row | {"kept": float((digit == x_label).float().mean()), "chance": float(share(digit) @ share(x_label))}
    either = (digit == x_label) | (digit == y_label)
    return row | {"fid": fid_to_test(x), "confidence": float(confidence.mean()), "kept": float(either.float().mean())}


# ------------------------------------------------------------------ what is drawn
def plot(claim, path):
    """Against the depth: FID, confidence and classes of the middle, a curve for each rule; classes of a digit alone."""
    fig, axes = figure(2, 2, width=4.2, height=2.9)
    rows, depths = claim.rows, sorted(claim.cfg.depths)
    for ax, key, label in zip(axes.flat, ("fid", "confidence", "kept"),
                              (f"FID (n = {claim.cfg.n})", "label judge's confidence", "share with a source's class")):
        for i, rule in enumerate(RULES):
            table = [rows.values(key, what=rule, t=t) for t in depths]
            ax.errorbar(depths, [statistics.mean(v) for v in table], [deviation(v) for v in table], fmt="o-",
                        color=f"C{i}", label=rule, ms=4)
        ax.axhline(rows.mean(key, what=BLEND), color="black", ls="--", lw=1, label="mean of the pixels")
        ax.axhline(rows.mean(key, what=CODE), color="C4", ls="-.", lw=1, label=CODE)
        ax.set(ylabel=label)
    (fid, confidence), (middle, alone) = axes
    handles = fid.get_legend_handles_labels()
    fid.axhline(claim.notes["floor"], color="grey", ls=":", lw=1)
    fid.set(yscale="log", title="(a), (c) the middle: FID; dotted: floor")
    ticks(fid.yaxis)
    confidence.set(title="(a) the middle: confidence")
    middle.axhline(0.2, color="grey", ls=":", lw=1)
    middle.set(title="the middle: classes; dotted: chance", ylim=(0, 1.05))
    alone.plot(depths, [rows.mean("kept", what=ALONE, t=t) for t in depths], "s-", color="C3", ms=4)
    alone.axhline(rows.mean("chance", what=ALONE, t=depths[-1]), color="grey", ls=":", lw=1)
    alone.set(ylabel="share with its own class", title="(b) a digit alone; dotted: chance", ylim=(0, 1.05))
    for ax in axes.flat:
        ax.set(xlabel="depth t", xticks=depths)
        ax.grid(alpha=0.3)
    fig.legend(*handles, loc="outside upper center", ncols=3, fontsize=9)
    return save_figure(fig, path)


if __name__ == "__main__":
    cli(main)
