"""Measure Section 4.4 of the DDPM paper again: interpolating through noise instead of between pixels.

    python reproduce.py publish=true      every depth and rule, three seeds; writes results/claim.json and claim.png
    python reproduce.py quick=true        a look at it, no verdict
    python reproduce.py n=1024            more pairs; without publish=true to runs/claim

All with lesson 05's published network, on pairs of test images of different digits. A seed chooses pairs and noise.
(a) The image in the middle (lam = 1/2), made the paper's way (two noises) at t = 500, looks more like a digit than the
    mean of the two images: its FID is lower and the label judge's confidence higher, in every seed and by more than
    3 pooled standard deviations.
(b) The deeper the mixing, the less is left of the sources: of digits that are encoded and decoded without a partner
    (lam = 0), the share that keeps its class, averaged over the seeds, is at least 0.95 at the smallest depth, falls
    with every depth, and is within 3 standard errors of chance at the largest. Chance is the share that the same
    images keep if they are handed out at random.
(c) A remark of this course, not of the paper: with two noises the mixture has only half the noise variance that the
    network expects. So at the largest depth, where nothing but noise is left, one shared noise and square-root weights
    both have the lower FID: in every seed and by more than 3 pooled standard deviations.
"""

import math
import statistics
import time

import torch

from model import RULES, Interpolation, UNet, noise_share
from sample import pairs
from utils import Run, classify, cli, fid_to_test, figure, floor, parallel, save_figure, write_json

CODE = "slerp of DDIM codes"


def main(argv=None):
    run = Run(__file__, argv)
    cfg = run.config.reproduce
    start = time.perf_counter()
    run.open_folder("claim")
    jobs = [(run.argv, what, t, seed) for seed in range(cfg.seeds) for what in (*RULES, "keep")
            for t in reversed(cfg.depths)]
    jobs += [(run.argv, CODE, 0, 0)] + [(run.argv, "blend", 0, seed) for seed in range(cfg.seeds)]
    rows = []
    for row in parallel(measure, jobs, cfg.workers):
        run.say("   ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
        rows.append(row)
    claim = {
        "middle": middle(rows), "retention": retention(rows, cfg), "rules": rules(rows, cfg),
        "n": cfg.n, "keep": cfg.keep, "sample_steps": cfg.sample_steps, "floor": floor(cfg.n), "table": table(rows),
        "noise_share_at_half": {rule: noise_share(0.5, rule) for rule in RULES}, "rows": rows,
        "minutes": round((time.perf_counter() - start) / 60, 1),
    }
    for name in ("middle", "retention", "rules"):
        claim[name]["verdict"] = verdict(claim[name]["holds"], cfg)
    run.say(text(claim))
    run.output(save_json, claim, "claim.json")
    run.output(plot, claim, "claim.png")
    run.record("claim", **{k: v for k, v in claim.items() if k != "rows"})
    return claim


def save_json(claim, path):
    """claim.json."""
    write_json(path, claim)
    return path


# Copied from lesson_05/reproduce.py: verdict
def verdict(holds, cfg):
    """One of the two verdicts, or none if there were too few seeds for one."""
    if cfg.quick or cfg.smoke or cfg.seeds < 3:
        return "no verdict from a quick look"
    return "reproduced" if holds else "not reproduced at this scale"


# ------------------------------------------------------------------ one cell of the table
def measure(argv, what, t, seed):
    """Images in the middle of n pairs under one rule at one depth, or what a digit keeps on its own ("keep")."""
    run = Run(__file__, argv)
    cfg, _ = run.config.reproduce, run.open_folder("claim")
    weights = run.read(run.published)
    ddpm = Interpolation(**weights.config["ddpm"])
    ddpm, net = run.place(ddpm, weights.load(UNet(**weights.config["unet"])))
    n = cfg.keep if what == "keep" else cfg.n
    x0, y0, x_label, y_label = pairs(n, seed)
    start, generator = time.perf_counter(), torch.Generator().manual_seed(seed)
    images = []
    for a, b in zip(x0.to(run.device).split(128), y0.to(run.device).split(128)):
        if what == "blend":
            images.append((a + b) / 2)
        elif what == CODE:
            images += list(ddpm.spherical(net, a, b, [0.5], cfg.sample_steps))
        else:
            rule, lam = ("independent", 0.0) if what == "keep" else (what, 0.5)
            images += list(ddpm.between(net, a, b, [lam], t, rule, cfg.sample_steps, generator=generator))
    x = torch.cat(images).cpu()
    digit, confidence = classify(x)
    row = {"what": what, "t": t, "seed": seed, "seconds": time.perf_counter() - start}
    if what == "keep":
        share = lambda labels: torch.bincount(labels, minlength=10) / n
        return row | {"kept": float((digit == x_label).float().mean()), "chance": float(share(digit) @ share(x_label))}
    either = (digit == x_label) | (digit == y_label)
    return row | {"fid": fid_to_test(x), "confidence": float(confidence.mean()), "kept": float(either.float().mean())}


def of(rows, what, key, t=0):
    """The values of one cell, one for each seed."""
    return [row[key] for row in rows if (row["what"], row["t"]) == (what, t)]


def table(rows):
    """Mean and deviation over the seeds of every cell, by rule and depth."""
    cells = {}
    for what, t in dict.fromkeys((row["what"], row["t"]) for row in rows):
        cells.setdefault(what, {})[str(t)] = {
            f"{key}_{name}": round(f(of(rows, what, key, t)), 4) for key in ("fid", "confidence", "kept", "chance")
            for name, f in (("mean", statistics.mean), ("std", deviation)) if key in of_cell(rows, what, t)}
    return cells


def of_cell(rows, what, t):
    """The first row of a cell."""
    return next(row for row in rows if (row["what"], row["t"]) == (what, t))


def deviation(values):
    """Standard deviation over the seeds; 0 for a single one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def larger(a, b):
    """Whether a is above b in every seed and by more than 3 pooled standard deviations; the gap; the deviation."""
    gap, spread = statistics.mean(a) - statistics.mean(b), math.hypot(deviation(a), deviation(b)) / 2 ** 0.5
    return all(x > y for x, y in zip(a, b)) and gap > 3 * spread, gap, spread


# ------------------------------------------------------------------ the three criteria
def middle(rows):
    """(a): the latent midpoint against the pixel blend, at t = 500 with two noises (the depth nearest to it)."""
    t = min({row["t"] for row in rows if row["what"] == "independent"}, key=lambda t: abs(t - 500))
    fid = larger(of(rows, "blend", "fid"), of(rows, "independent", "fid", t))
    sure = larger(of(rows, "independent", "confidence", t), of(rows, "blend", "confidence"))
    return {"t": t, "fid_gap": fid[1], "fid_pooled_std": fid[2], "confidence_gap": sure[1],
            "confidence_pooled_std": sure[2], "fid_holds": fid[0], "confidence_holds": sure[0],
            "holds": fid[0] and sure[0]}


def retention(rows, cfg):
    """(b): the share of digits that keep their class on their own, by depth."""
    depths = sorted(cfg.depths)
    kept = [statistics.mean(of(rows, "keep", "kept", t)) for t in depths]
    chance = statistics.mean(of(rows, "keep", "chance", depths[-1]))
    error = (chance * (1 - chance) / (cfg.keep * cfg.seeds)) ** 0.5
    falls = all(a > b for a, b in zip(kept, kept[1:]))
    return {"depths": depths, "kept": kept, "chance": chance, "standard_error": error, "falls": falls,
            "holds": kept[0] >= 0.95 and falls and abs(kept[-1] - chance) <= 3 * error}


def rules(rows, cfg):
    """(c): the three mixing rules at the largest depth."""
    t = max(cfg.depths)
    worse = {rule: larger(of(rows, "independent", "fid", t), of(rows, rule, "fid", t)) for rule in ("shared", "root")}
    return {"t": t, "gaps": {rule: w[1] for rule, w in worse.items()},
            "pooled_std": {rule: w[2] for rule, w in worse.items()}, "holds": all(w[0] for w in worse.values())}


# ------------------------------------------------------------------ what is printed and drawn
def text(claim):
    """The table with the three verdicts."""
    lines = ["", f"middle of two digits, n = {claim['n']}, FID floor {claim['floor']:.3f}",
             f"    {'':20} {'t':>4} {'FID':>16}  {'confidence':>14}  keeps one of its two classes"]
    for what, cells in claim["table"].items():
        lines += [f"    {what:20} {t:>4} {c['fid_mean']:8.3f} +- {c['fid_std']:.3f}  {c['confidence_mean']:.3f} +- "
                  f"{c['confidence_std']:.3f}  {c['kept_mean']:.3f}" for t, c in cells.items() if what != "keep"]
    r = claim["retention"]
    lines += [f"(a) better than the pixel blend at t = {claim['middle']['t']}: {claim['middle']['verdict']}",
              f"(b) class kept alone: {r['verdict']}; " + ", ".join(f"{k:.3f} at {t}" for t, k in
                                                                    zip(r["depths"], r["kept"]))
              + f"; chance {r['chance']:.3f} +- {r['standard_error']:.3f}",
              f"(c) two noises lose at t = {claim['rules']['t']}: {claim['rules']['verdict']}"]
    return "\n".join(lines)


def plot(claim, path):
    """FID, confidence and retention against the depth, one curve for each rule."""
    fig, axes = figure(1, 3, width=4.2)
    depths, cells = claim["retention"]["depths"], claim["table"]
    for ax, key, label in zip(axes, ("fid", "confidence", "kept"),
                              ("FID of the middle", "label judge's confidence", "share with a source's class")):
        for i, rule in enumerate(RULES):
            mean, std = ([cells[rule][str(t)][f"{key}_{part}"] for t in depths] for part in ("mean", "std"))
            ax.errorbar(depths, mean, std, fmt="o-", color=f"C{i}", label=rule, ms=4)
        ax.axhline(cells["blend"]["0"][f"{key}_mean"], color="black", ls="--", lw=1, label="pixel blend")
        ax.axhline(cells[CODE]["0"][f"{key}_mean"], color="C4", ls="-.", lw=1, label=CODE)
        ax.set(xlabel="depth t", ylabel=label)
        ax.grid(alpha=0.3)
    axes[0].axhline(claim["floor"], color="grey", ls=":", lw=1)
    axes[0].set(yscale="log", title=f"n = {claim['n']}; dotted: floor")
    axes[1].legend(fontsize=7)
    axes[2].plot(depths, claim["retention"]["kept"], "s-", color="C3", label="alone (lam = 0)")
    axes[2].axhline(claim["retention"]["chance"], color="C3", ls=":", lw=1, label="its chance")
    axes[2].legend(fontsize=7)
    return save_figure(fig, path)


if __name__ == "__main__":
    cli(main)
