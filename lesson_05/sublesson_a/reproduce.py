"""Measure when dropout helps a small DDPM, and what it does when evaluation mode is never undone.

    python reproduce.py publish=true      all arms, three seeds; writes results/claim.json and results/claim.png
    python reproduce.py quick=true        a look at it, no verdict
    python reproduce.py few=1000          another number of images; without publish=true to runs/claim

The paper trains with dropout 0.1 on CIFAR-10 to prevent overfitting, and without dropout on the larger data sets.
All errors are those of Eq. (14) for the averaged weights in evaluation mode, mean over ten times, on images trained on
and on test images with the same noise; the gap is the second minus the first. (Some images are easier than others: a
network that knows neither has a gap too, the same for all arms.)
"few": 100 images, 96 epochs, starting from lesson 05's network. 2,000 images take far longer to overfit than three
seeds allow: before the criteria were written, 150 steps on them and 100 on 500 had moved the gap by 0.0001 or less.
(a) In every seed the gap is largest with p = 0 and smallest with the largest p.
(b) The same arms: copies are rarer with the largest p than with p = 0, in the mean over the seeds. A sample is called a
    copy if its distance to the nearest training image, over that to the second nearest, is below that of 99 % of the
    test digits.
"all" 60,000 images, from nothing, 120 steps:
(c) In every seed p = 0 has the lowest error on test images, and the largest p the highest.
"forgotten": the largest p on few images, with a preview that calls eval() and never train():
(d) In every seed its gap is nearer to that of p = 0 than to that of its own p.
"long": 2,000 images from nothing, trained as train.py does, one seed, so no verdict. The arm with train.py's own p is
the published network.
"""

import functools
import json
import statistics
import time

import torch

import train
from model import DDPM, UNet, error_by_time
from sample import draw
from utils import (
    Run,
    Weights,
    cli,
    deviation,
    digits,
    figure,
    parallel,
    save_figure,
    save_json,
    seeded,
    trained,
    verdict,
)


def main(argv=None):
    run = Run(__file__, argv)
    cfg = run.config.reproduce
    start = time.perf_counter()
    run.open_folder("claim")
    arms = [("few", p) for p in cfg.dropouts] + [("forgotten", cfg.dropouts[-1])] + [("all", p) for p in cfg.dropouts]
    jobs = [(run.argv, "long", p, 0) for p in cfg.long_dropouts]
    jobs += [(run.argv, *arm, seed) for seed in range(cfg.seeds) for arm in arms]
    rows = []
    for row in parallel(measure, jobs, cfg.workers):
        copied = f", copies {row['copies']:.3f}" if "copies" in row else ""
        run.say("{what:9} p {p:.1f} seed {seed}: error {train:.5f} seen, {test:.5f} unseen, gap {gap:+.5f}".format(
            **row) + copied)
        rows.append(row)
    claim = {
        "gap": gap(rows, cfg), "copies": copies(rows, cfg), "brief": brief(rows, cfg),
        "forgotten": forgotten(rows, cfg), "table": table(rows),
        "images": {"few": cfg.few, "all": 60_000, "long": cfg.long}, "batch_size": run.config.train.batch_size,
        "steps": {"few": cfg.few_steps, "all": cfg.all_steps, "long": cfg.long_steps}, "n": cfg.n,
        "sample_steps": cfg.sample_steps, "eval_images": cfg.eval_images, "rows": rows,
        "minutes": round((time.perf_counter() - start) / 60, 1),
    }
    for name in ("gap", "copies", "brief", "forgotten"):
        claim[name]["verdict"] = verdict(claim[name]["holds"], cfg)
    run.say(text(claim))
    run.output(save_json, claim, "claim.json")
    run.output(plot, claim, "claim.png")
    run.record("claim", **{k: v for k, v in claim.items() if k != "rows"})
    return claim


# ------------------------------------------------------------------ one arm
def careless(run, ddpm, net, ema):
    """The mistake of other code, without its pictures: evaluation mode for the preview, and nobody calls train()."""
    net.eval()


def measure(argv, what, p, seed):
    """Train one arm (or take it from an earlier call); its errors on seen and unseen images; its copies."""
    run = Run(__file__, argv)
    cfg, folder = run.config.reproduce, run.open_folder("claim")
    sizes = {"all": (60_000, cfg.all_steps), "long": (cfg.long, cfg.long_steps)}
    images, steps = sizes.get(what, (cfg.few, cfg.few_steps))
    own = [a for a in argv if a.split("=")[0].split(".")[0] in ("unet", "ddpm", "train", "gpu", "device", "smoke")]
    own += [f"unet.dropout={p}", f"images={images}", f"steps={steps}", f"seed={seed}", "preview_every=0"]
    learn = train.main
    if what == "all":
        own += ["eval_every=0"]
    if what in ("few", "forgotten"):
        own += [f"start={cfg.start}", "warmup=20", f"eval_every={cfg.eval_every}", "log_every=10"]
        if cfg.start:                                   # the network as it was built then, also where there is a GPU
            shape = Weights(run.lesson / cfg.start, run.name, "lesson_05").config["unet"]
            own += [f"unet.{key}={shape[key]}" for key in shape.keys() if key != "dropout"]
    if what == "forgotten":
        learn = functools.partial(train.main, preview=careless)
        own += [f"preview_every={cfg.forget_after}", "strict=false"]
    if what == "long" and p == run.config.unet.dropout and run.published.exists():
        path = run.published                            # made by train.py with these very values
    else:
        path = trained(learn, folder / f"{what}_{p}_{seed}", own, run.lesson)
    weights = run.read(path)
    ddpm, net = run.place(DDPM(**weights.config["ddpm"]), weights.load(UNet(**weights.config["unet"])))
    seen, times = digits("train", 1, limit=images), [int((i + 0.5) * ddpm.timesteps / 10) for i in range(10)]
    n = min(cfg.eval_images, images)
    by_time = {name: error_by_time(ddpm, net, x.to(run.device), times, seeded(0)).tolist()
               for name, x in (("train", seen.first(n)[0]), ("test", digits("test").first(n)[0]))}
    row = {"what": what, "p": p, "seed": seed, **{name: statistics.mean(e) for name, e in by_time.items()},
           "times": times, "by_time": by_time, "curve": curve(path.parent / "metrics.jsonl")}
    row["gap"] = row["test"] - row["train"]
    if what in ("few", "long"):
        x = draw(ddpm, net, cfg.n, min(cfg.sample_steps, ddpm.timesteps), seeded(seed))
        ratios = {name: copy_ratio(pictures, seen.first(images)[0]) for name, pictures in
                  (("samples", x), ("digits", digits("test").first(2000)[0]))}
        row["copies"] = float((ratios["samples"] < ratios["digits"].quantile(0.01)).float().mean())
        row["ratios"] = {name: (r.histc(40, 0, 1) / len(r)).tolist() for name, r in ratios.items()}
    return row


def curve(path):
    """The lines of metrics.jsonl as columns: the loss over the steps, the errors over the steps of their looks."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []   # not published
    looks = [row for row in rows if "test_error" in row]
    return {"step": [row["step"] for row in rows], "loss": [round(row["loss"], 5) for row in rows],
            "look": [row["step"] for row in looks],
            **{key: [round(row[key], 6) for row in looks] for key in ("train_error", "test_error")}}


def copy_ratio(x, seen):
    """Distance to the nearest of the images `seen`, over that to the second nearest. (N, 1, 28, 28) -> (N,) in [0, 1].

    1 is a digit like many others, 0 a copy of one of them.
    """
    first, second = torch.cdist(x.cpu().clamp(-1, 1).flatten(1), seen.flatten(1)).topk(2, largest=False).values.T
    return first / second


# ------------------------------------------------------------------ the four criteria
def of(rows, what, key, p):
    """The values of one arm, one for each seed."""
    return [row[key] for row in rows if (row["what"], row["p"]) == (what, p)]


def ordered(rows, what, key, dropouts, falls):
    """Whether in every seed the value falls (or rises) from each p to the next; means and deviations by p."""
    by_p = [of(rows, what, key, p) for p in dropouts]
    holds = all((a > b) if falls else (a < b) for one, other in zip(by_p, by_p[1:]) for a, b in zip(one, other))
    return holds, {str(p): {"mean": statistics.mean(v), "std": deviation(v)} for p, v in zip(dropouts, by_p)}


def gap(rows, cfg):
    """(a): the gap between unseen and seen images falls with p."""
    holds, by_p = ordered(rows, "few", "gap", cfg.dropouts, falls=True)
    return {"by_p": by_p, "holds": holds}


def copies(rows, cfg):
    """(b): the share of copies, of which test digits have 1 %."""
    _, by_p = ordered(rows, "few", "copies", cfg.dropouts, falls=True)
    return {"by_p": by_p, "holds": by_p[str(cfg.dropouts[-1])]["mean"] < by_p[str(cfg.dropouts[0])]["mean"]}


def brief(rows, cfg):
    """(c): a short training on all images: p = 0 has the lowest error on unseen ones, the largest p the highest."""
    first, *between, last = (of(rows, "all", "test", p) for p in cfg.dropouts)
    holds = all(a < min([c, *b]) and c > max([a, *b]) for a, c, *b in zip(first, last, *between))
    return {"by_p": ordered(rows, "all", "test", cfg.dropouts, falls=False)[1], "holds": holds}


def forgotten(rows, cfg):
    """(d): the gap of the arm that stays in evaluation mode, beside that of its own p and that of p = 0."""
    off, on = (of(rows, "few", "gap", p) for p in (cfg.dropouts[0], cfg.dropouts[-1]))
    bug = of(rows, "forgotten", "gap", cfg.dropouts[-1])
    return {"gap": {"p = 0": off, f"p = {cfg.dropouts[-1]}": on, "forgotten": bug},
            "holds": all(abs(b - a) < abs(b - c) for b, a, c in zip(bug, off, on))}


def table(rows):
    """Mean and deviation over the seeds of every arm."""
    return {f"{what}, p = {p}": {
        f"{key}_{name}": round(f(of(rows, what, key, p)), 6) for key in ("train", "test", "gap")
        for name, f in (("mean", statistics.mean), ("std", deviation))}
        for what, p in dict.fromkeys((row["what"], row["p"]) for row in rows)}


# ------------------------------------------------------------------ what is printed and drawn
def text(claim):
    """The table with the four verdicts."""
    lines = ["", *(f"{what}: {images:,} images, {claim['steps'][what] * claim['batch_size'] / images:.2g} epochs"
                   for what, images in claim["images"].items())]
    lines += [f"    {name:18} error {a['train_mean']:.5f} seen   {a['test_mean']:.5f} +- {a['test_std']:.5f} unseen   "
              f"gap {a['gap_mean']:+.5f} +- {a['gap_std']:.5f}" for name, a in claim["table"].items()]
    lines += [f"(a) the gap falls with p: {claim['gap']['verdict']}",
              f"(b) copies: {claim['copies']['verdict']}; " + ", ".join(
                  f"{c['mean']:.3f} at p = {p}" for p, c in claim["copies"]["by_p"].items()) + " (test digits 0.010)",
              "    on the long runs: " + ", ".join(f"{row['copies']:.3f} at p = {row['p']}" for row in claim["rows"]
                                               if row["what"] == "long"),
              f"(c) without dropout is best in a short training: {claim['brief']['verdict']}",
              f"(d) evaluation mode never undone is p = 0: {claim['forgotten']['verdict']}"]
    return "\n".join(lines)


def plot(claim, path):
    """Errors by step on few images, long and short; the gap by time; copies; the loss with the mistake; all images."""
    fig, ((long, few, by_t), (histogram, bug, brief)) = figure(2, 3, width=4.2)
    rows, seed = claim["rows"], claim["rows"][0]["seed"]
    colour = {p: f"C{i}" for i, p in enumerate(sorted({row["p"] for row in rows}))}
    arm = lambda what, every=False: [row for row in rows if row["what"] == what and (every or row["seed"] == seed)]
    for ax, what in ((long, "long"), (few, "few")):
        for row in arm(what):
            c, line = row["curve"], colour[row["p"]]
            if c["look"]:
                ax.plot(c["look"], c["test_error"], f"{line}-", label=f"p = {row['p']}, test images")
                ax.plot(c["look"], c["train_error"], f"{line}--", label="images trained on", lw=1)
        ax.set(xlabel="training step", ylabel="error", yscale="log",
               title=f"{claim['images'][what]:,} images, one seed")
    for p, line in colour.items():
        gaps = [[b - a for a, b in zip(row["by_time"]["train"], row["by_time"]["test"])]
                for row in arm("few", every=True) if row["p"] == p]
        if gaps:
            by_t.plot(rows[0]["times"], [statistics.mean(g) for g in zip(*gaps)], f"{line}o-", ms=3, label=f"p = {p}")
        tests = [row["test"] for row in arm("all", every=True) if row["p"] == p]
        brief.plot([p] * len(tests), tests, f"{line}o")
    edges = [k / 40 for k in range(41)]
    for row in arm("few"):
        histogram.stairs(row["ratios"]["samples"], edges, color=colour[row["p"]], label=f"p = {row['p']}")
    histogram.stairs(arm("few")[0]["ratios"]["digits"], edges, color="grey", label="test digits")
    for row in (arm("few")[0], arm("few")[-1], *arm("forgotten")):
        late = row["what"] == "forgotten"
        bug.plot(row["curve"]["step"], row["curve"]["loss"], "k-" if late else colour[row["p"]], lw=1,
                 label=f"p = {row['p']}" + (", eval() never undone" if late else ""))
    by_t.set(xlabel="t", ylabel="error, unseen minus seen", title=f"{claim['images']['few']} images, mean of the seeds")
    histogram.set(xlabel="nearest / second nearest distance", ylabel="share", title="copies, one seed")
    bug.set(xlabel="training step", ylabel="training loss", yscale="log", title="the mistake")
    brief.set(xlabel="p", ylabel="error on test images", title=f"60,000 images, {claim['steps']['all']} steps")
    for ax in (long, few, by_t, histogram, bug, brief):
        ax.grid(alpha=0.3)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=7)
    return save_figure(fig, path)


if __name__ == "__main__":
    cli(main)
