"""Measure when dropout helps a small DDPM, and what it does when evaluation mode is never undone.

    python reproduce.py publish=true      all arms, three seeds; writes results/claim.json and results/claim.png
    python reproduce.py quick=true        a look at it, no verdict
    python reproduce.py few=1000          another number of images; without publish=true to runs/claim

The paper trains with dropout 0.1 on CIFAR-10 to prevent overfitting, and without dropout on the larger data sets.
All errors are those of Eq. (14) for the averaged weights in evaluation mode, mean over ten times, on images trained on
and on test images with the same noise; the gap is the second minus the first. (Some images are easier than others: a
network that knows neither has a gap too, the same for all arms.) A sample is called a copy if its distance to the
nearest training image, over that to the second nearest, is below that of 99 % of the test digits.

"few": 100 images, 96 epochs, starting from lesson 05's network. 2,000 images take far longer to overfit than three
seeds allow: before the criteria were written, 150 steps on them and 100 on 500 had moved the gap by 0.0001 or less.
"forgotten": the same with the largest p, and a preview that calls eval() and never train().
"all": 60,000 images, from nothing, 120 steps.
"long": 2,000 images from nothing, trained as train.py does, one seed, so no verdict. The arm with train.py's own p is
the published network.
"""

import json
import statistics

import torch

import train
from model import DDPM, UNet, error_by_time
from sample import draw
from utils import Arm, Claim, Weights, below, cli, digits, figure, save_figure, seeded, ticks


def main(argv=None):
    claim = Claim(__file__, argv, sections=("unet", "ddpm"))
    run, cfg = claim.run, claim.cfg
    first, last = cfg.dropouts[0], cfg.dropouts[-1]
    long = {name("long", p): keys(run, "long", p) for p in cfg.long_dropouts}
    made = name("long", run.config.unet.dropout)        # by train.py, with these very values
    if run.published.exists() and long.pop(made, None):
        claim.each(published_network, arm=made, seed=[0])
    claim.arms(long, train=train.main, measure=measure, seeds=[0])
    rows = claim.arms({name(what, p): keys(run, what, p) for what, p in [
        *(("few", p) for p in cfg.dropouts), ("forgotten", last), *(("all", p) for p in cfg.dropouts)]},
        train=train.main, measure=measure)
    claim.judge("a", "On few images, the gap between the errors on unseen and on seen images falls with p",
                paper="dropout 0.1 against overfitting on CIFAR-10 (App. B)",
                holds=falls(rows, "few", "gap", cfg.dropouts))
    claim.judge("b", "On few images, samples are copies less often with the largest p than without dropout",
                holds=rows.below(name("few", last), name("few", first), "copies"))
    claim.judge("c", "Trained briefly on all images, the error on unseen ones rises with p",
                paper="no dropout on the other data sets (App. B)",
                holds=falls(rows, "all", "test", cfg.dropouts[::-1]))
    claim.judge("d", "With evaluation mode never undone, the gap ends nearer to that of p = 0 than to its own p's",
                holds=forgotten(rows, first, last))
    return claim.finish(plot=plot)


def falls(rows, what, key, dropouts):
    """(a), (c): whether the value falls from each of these p to the next."""
    return all(rows.below(name(what, q), name(what, p), key) for p, q in zip(dropouts, dropouts[1:]))


def forgotten(rows, first, last):
    """(d): the distance of the gap to that of the first p, none, is below its distance to that of its own, the last."""
    bug, none, own = (rows.values("gap", arm=name(what, p)) for what, p in
                      (("forgotten", last), ("few", first), ("few", last)))
    return below([abs(b - n) for b, n in zip(bug, none)], [abs(b - o) for b, o in zip(bug, own)])


# ------------------------------------------------------------------ the arms
def careless(run, ddpm, net, ema, shape):
    """The mistake of other code, without its pictures: evaluation mode for the preview, and nobody calls train()."""
    net.eval()


def name(what, p):
    """What an arm is called."""
    return f"{what}, p = {p}"


def images(cfg, what):
    """How many images an arm is trained on."""
    return {"all": 60_000, "long": cfg.long}.get(what, cfg.few)


def keys(run, what, p):
    """An arm: the keys of train.py, and the preview that forgets."""
    cfg = run.config.reproduce
    steps = {"all": cfg.all_steps, "long": cfg.long_steps}.get(what, cfg.few_steps)
    found = [f"unet.dropout={p}", f"images={images(cfg, what)}", f"steps={steps}"]
    if what == "all":
        found += ["eval_every=0"]
    if what in ("few", "forgotten"):
        found += [f"start={cfg.start}", "warmup=20", f"eval_every={cfg.eval_every}", "log_every=10"]
        if cfg.start:                                   # the network as it was built then, also where there is a GPU
            shape = Weights(run.lesson / cfg.start, run.name, "lesson_05").config["unet"]
            found += [f"unet.{key}={shape[key]}" for key in shape.keys() if key != "dropout"]
    if what == "forgotten":
        return Arm([*found, f"preview_every={cfg.forget_after}", "strict=false"], preview=careless)
    return found


# ------------------------------------------------------------------ what is measured
def published_network(run, arm, seed):
    """The arm that need not be trained."""
    return measure(run, run.read(run.published), arm, seed)


def measure(run, weights, arm, seed):
    """An arm's errors on seen and unseen images, its curves and, for few images or long trainings, its copies."""
    cfg, (what, p) = run.config.reproduce, arm.split(", p = ")
    ddpm, net = run.place(DDPM(**weights.config["ddpm"]), weights.load(UNet(**weights.config["unet"])))
    n = images(cfg, what)
    seen, unseen = digits("train", 1, limit=n).first(n)[0], digits("test")
    times = [int((i + 0.5) * ddpm.timesteps / 10) for i in range(10)]
    few = min(cfg.eval_images, n)
    by_time = {key: error_by_time(ddpm, net, x.to(run.device), times, seeded(0)).tolist()
               for key, x in (("train", seen[:few]), ("test", unseen.first(few)[0]))}
    row = {"what": what, "p": float(p), **{key: statistics.mean(e) for key, e in by_time.items()}, "times": times,
           "by_time": by_time, "curve": curve(weights.path.parent / "metrics.jsonl")}
    row["gap"] = row["test"] - row["train"]
    if what in ("few", "long"):
        x = draw(ddpm, net, cfg.n, min(cfg.sample_steps, ddpm.timesteps), seeded(seed))
        ratios = {key: copy_ratio(pictures, seen) for key, pictures in
                  (("samples", x), ("digits", unseen.first(2000)[0]))}
        row["copies"] = float((ratios["samples"] < ratios["digits"].quantile(0.01)).float().mean())
        row["ratios"] = {key: (r.histc(40, 0, 1) / len(r)).tolist() for key, r in ratios.items()}
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


# ------------------------------------------------------------------ what is drawn
def plot(claim, path):
    """Errors and gap on few images; copies, and longer trainings; briefly on all images, and the mistake."""
    fig, axes = figure(3, 2, width=4.2, height=2.8)
    (few, by_t), (histogram, long), (brief, bug) = axes
    rows, seed = [row for row in claim.rows if not row.get("diverged")], claim.rows[0]["seed"]
    colour = {p: f"C{i}" for i, p in enumerate(sorted({row["p"] for row in rows}))}
    arm = lambda what, every=False: [row for row in rows if row["what"] == what and (every or row["seed"] == seed)]
    for p, line in colour.items():
        few.plot([], [], f"{line}-", label=f"p = {p}")
        gaps = [[b - a for a, b in zip(row["by_time"]["train"], row["by_time"]["test"])]
                for row in arm("few", every=True) if row["p"] == p]
        if gaps:
            by_t.plot(rows[0]["times"], [statistics.mean(g) for g in zip(*gaps)], f"{line}o-", ms=3)
        tests = [row["test"] for row in arm("all", every=True) if row["p"] == p]
        brief.plot([p] * len(tests), tests, f"{line}o", ms=5)
    few.plot([], [], "k--", lw=1, label="dashed: images trained on")
    for ax, what in ((few, "few"), (long, "long")):
        for row in arm(what):
            c, line = row["curve"], colour[row["p"]]
            if c["look"]:
                ax.plot(c["look"], c["test_error"], f"{line}-")
                ax.plot(c["look"], c["train_error"], f"{line}--", lw=1)
        ax.set(xlabel="training step", ylabel="error", yscale="log")
    edges = [k / 40 for k in range(41)]
    for row in arm("few"):
        histogram.stairs(row["ratios"]["samples"], edges, color=colour[row["p"]])
    histogram.stairs(arm("few")[0]["ratios"]["digits"], edges, color="grey", label="grey: test digits")
    for row in (arm("few")[0], arm("few")[-1], *arm("forgotten")):
        late = row["what"] == "forgotten"
        bug.plot(row["curve"]["step"], row["curve"]["loss"], "k-" if late else colour[row["p"]], lw=1,
                 label=f"black: p = {row['p']}, eval() never undone" if late else None)
    few.set(title=f"(a) {claim.cfg.few} images, one seed")
    by_t.set(xlabel="t", ylabel="error, unseen minus seen", title=f"(a) {claim.cfg.few} images, mean of the seeds")
    histogram.set(xlabel="nearest / second nearest distance", ylabel="share", title="(b) is a sample a copy? One seed")
    long.set(title=f"{claim.cfg.long:,} images from nothing, one seed")
    brief.set(xlabel="p", ylabel="error on test images", xticks=list(colour),
              title=f"(c) 60,000 images, {claim.cfg.all_steps} steps")
    bug.set(xlabel="training step", ylabel="training loss", yscale="log", title="(d) the mistake, one seed")
    for ax in axes.flat:
        ax.grid(alpha=0.3)
        if ax.get_yscale() == "log":
            ticks(ax.yaxis)
    fig.legend(loc="outside upper center", ncols=3, fontsize=9)
    return save_figure(fig, path)


if __name__ == "__main__":
    cli(main)
