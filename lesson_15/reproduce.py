"""Measure the claims of classifier-free guidance again: what it trades, and how often to drop the label.

    python reproduce.py publish=true      all of it, three seeds; writes results/claim.json and the pictures
    python reproduce.py quick=true        a look at it, no verdict
    python reproduce.py n=2048 seeds=5    other values; without publish=true to runs/claim

All weights w are the course's: 1 is plain conditional, and the paper's w is one less. The criteria were written down
before any number was seen. (a) to (c) use the published network and three sampling seeds; all weights of a seed start
from the same noise. "Clearly" means: in every seed, and by more than 3 pooled standard deviations over the seeds.

(a) FID against w, for w >= 1: the weight with the lowest mean FID is at most 2 (the paper's w at most 1), and the FID
    of the last weight is clearly above that of this one. So it falls and rises, or is flat and rises.
(b) Quality for variety, for w >= 1. From the first weight to the last, accuracy and precision rise clearly and recall
    falls clearly; and from each weight to the next, the mean accuracy and precision do not fall, and the mean recall
    does not rise, by more than one pooled standard deviation.
(c) Saturation. Where x_0 is not clipped, the share of pixels outside [-1.05, 1.05] grows from each weight to the next
    in every seed; and where it is clipped, the mean ink of the last weight is clearly above that of w = 1.
(d) Dropping half of the labels is worse than a tenth. Two arms trained alike, three training seeds: the lowest FID over
    the weights is clearly lower for 0.1 than for 0.5.
(e) The exact guided score does not sample p(x) (p(x | c) / p(x))^w. For a mixture of three Gaussians, the distance in
    total variation between histograms of samples and that density is at most 1.5 times that of samples drawn from the
    density itself at w = 1, and more than 3 times at each larger weight.
"""

import statistics
import time

import torch

import train
from model import DDPM, Mixture, guided
from sample import draw, load, wanted
from utils import (
    Run,
    Weights,
    cli,
    deviation,
    digits,
    figure,
    floor,
    parallel,
    pooled,
    save_figure,
    save_grid,
    save_json,
    score,
    seeded,
    trained,
    verdict,
)

KEYS = ("fid", "accuracy", "precision", "recall", "ink", "grey")
TRIANGLE, STD = [[0.0, 1.0], [-0.866, -0.5], [0.866, -0.5]], 0.5        # the mixture of (e)
EDGES = torch.linspace(-3.0, 3.0, 31)                                   # its histograms: cells of 0.2


def main(argv=None):
    run = Run(__file__, argv)
    cfg, start = run.config.reproduce, time.perf_counter()
    run.open_folder("claim")
    arms = [(run.argv, drop, seed) for seed in range(cfg.seeds) for drop in cfg.drops]
    paths = dict(zip([job[1:] for job in arms], parallel(train_arm, arms, cfg.workers)))
    jobs = [("published", seed, w, True) for seed in range(cfg.seeds) for w in cfg.weights]
    jobs += [("published", seed, w, False) for seed in range(cfg.seeds) for w in cfg.free]
    jobs += [(drop, seed, w, True) for drop, seed in paths for w in cfg.arm_weights]
    rows = []
    for (name, seed, w, clip), row in zip(jobs, parallel(measure, [(run.argv, *job) for job in jobs], cfg.workers)):
        rows.append({"net": name, "seed": seed, "w": w, "clip": clip, **row})
        run.say(f"{name} seed {seed} w {w:g}{'' if clip else ' not clipped'}: " + "  ".join(
            f"{key} {value:.4f}" for key, value in row.items()))
    sweep, free = table(rows, "published", True), table(rows, "published", False)
    claim = {"fid": fid_claim(sweep), "trade": trade(sweep), "saturation": saturation(sweep, free),
             "dropping": dropping({drop: table(rows, drop, True) for drop in cfg.drops}), "mixture": mixture(run),
             "sweep": sweep, "not_clipped": free, "difference": difference(run)}
    for name in ("fid", "trade", "saturation", "dropping", "mixture"):
        claim[name]["verdict"] = verdict(claim[name]["holds"], cfg)
    claim |= {"n": cfg.n, "free_n": cfg.free_n, "arm_n": cfg.arm_n, "sample_steps": cfg.sample_steps,
              "train_steps": cfg.train_steps, "free_start": cfg.free_start,
              "floor": {str(n): floor(n) for n in (cfg.n, cfg.arm_n)},
              "minutes": round((time.perf_counter() - start) / 60, 1)}
    run.say(text(claim))
    run.output(save_json, claim, "claim.json")
    run.output(plot, claim, "claim.png")
    run.output(plot_difference, claim, "difference.png")
    run.output(plot_mixture, run, "mixture.png")
    run.output(save_grid, same_noise(run), "weights.png", columns=10)
    run.record("claim", minutes=claim["minutes"], n=cfg.n, verdicts={
        name: claim[name]["verdict"] for name in ("fid", "trade", "saturation", "dropping", "mixture")})
    return claim


# ------------------------------------------------------------------ networks and samples
def train_arm(argv, drop, seed):
    """Train with this share of dropped labels, or take it from an earlier call."""
    run = Run(__file__, argv)
    cfg, folder = run.config.reproduce, run.open_folder("claim")
    own = [a for a in argv if a.split("=")[0].split(".")[0] in ("unet", "ddpm", "train", "gpu", "device", "smoke")]
    return trained(train.main, folder / f"drop_{drop}_{seed}", [
        *own, f"drop={drop}", f"seed={seed}", f"steps={cfg.train_steps}", "preview_every=0"], run.lesson)


def network(run, name, seed=0):
    """Process, network and null class: the published network, or an arm by its share of dropped labels."""
    path = run.lesson / "results" / "weights.safetensors"
    if name == "published" and (run.config.reproduce.smoke or not path.exists()):
        name = run.config.reproduce.drops[0]
        run.say(f"for want of a published network: the arm {name}")
    if name != "published":
        path = max((run.folder / f"drop_{name}_{seed}").glob("**/weights.safetensors"))
    return load(run, Weights(path, run.name))


def measure(argv, name, seed, w, clip):
    """Draw the ten digits in turn at one weight: the scores, how much ink, how much grey, how much out of range."""
    run = Run(__file__, argv)
    cfg, _ = run.config.reproduce, run.open_folder("claim")
    ddpm, net, null = network(run, name, seed)
    n = (cfg.n if name == "published" else cfg.arm_n) if clip else cfg.free_n
    c = wanted("", n, null).to(run.device)
    times = ddpm.times(cfg.sample_steps, None if clip else cfg.free_start)
    x = draw(ddpm, net, c, null, times, w, seeded(seed), clip).cpu()
    if not clip:
        return {"outside": float((x.abs() > 1.05).float().mean()), **brightness(x)}
    scores = score(x, c)
    return {**{key: scores[key] for key in KEYS if key in scores}, **brightness(x)}


def brightness(x):
    """Mean ink (0: black, 1: white) and the share of pixels that are neither black nor white."""
    x = x.clamp(-1, 1)
    return {"ink": float((x + 1).mean() / 2), "grey": float((x.abs() < 0.8).float().mean())}


def table(rows, name, clip):
    """{w: {score: the values of all seeds}} of one network."""
    rows = [row for row in rows if row["net"] == name and row["clip"] == clip]
    return {w: {key: [row[key] for row in rows if row["w"] == w] for key in rows[0]
                if key not in ("net", "seed", "w", "clip")} for w in dict.fromkeys(row["w"] for row in rows)}


def clearly(low, high):
    """Whether low is below high in every seed and by more than 3 pooled standard deviations."""
    return all(a < b for a, b in zip(low, high)) and (
        statistics.mean(high) - statistics.mean(low) > 3 * pooled(low, high))


# ------------------------------------------------------------------ (a) to (d)
def fid_claim(sweep):
    """(a): the weight of the lowest mean FID among w >= 1, and whether the FID has clearly risen at the last."""
    fids = {w: row["fid"] for w, row in sweep.items() if w >= 1}
    best, last = min(fids, key=lambda w: statistics.mean(fids[w])), max(fids)
    return {"best_w": best, "falls_clearly_from_1": clearly(fids[best], fids[min(fids)]),
            "holds": best <= 2 and clearly(fids[best], fids[last])}


def trade(sweep):
    """(b): accuracy and precision against recall along w >= 1."""
    rows = [row for w, row in sorted(sweep.items()) if w >= 1]
    result = {}
    for key, sign in (("accuracy", 1), ("precision", 1), ("recall", -1)):
        values = [[sign * v for v in row[key]] for row in rows]
        steps = all(statistics.mean(b) - statistics.mean(a) >= -pooled(a, b) for a, b in zip(values, values[1:]))
        result[key] = {"monotonic": steps, "clear": clearly(values[0], values[-1])}
    return {**result, "holds": all(all(one.values()) for one in result.values())}


def saturation(sweep, free):
    """(c): pixels out of range where nothing is clipped, ink where it is."""
    outside = [row["outside"] for _, row in sorted(free.items())]
    grows = all(a < b for low, high in zip(outside, outside[1:]) for a, b in zip(low, high))
    ink = clearly(sweep[1]["ink"], sweep[max(sweep)]["ink"])
    return {"outside_grows": grows, "ink_grows": ink, "holds": grows and ink}


def dropping(arms):
    """(d): the arms' scores at every weight, and the lowest FID over the weights of every seed."""
    lowest = {drop: [min(values) for values in zip(*(row["fid"] for row in rows.values()))]
              for drop, rows in arms.items()}
    tenth, half = lowest.values()
    return {"arms": arms, "lowest_fid": lowest, "holds": clearly(tenth, half)}


# ------------------------------------------------------------------ (e) the exact mixture
def cells(x):
    """Share of points x (N, 2) in each cell of the histogram."""
    return torch.histogramdd(x.double(), [EDGES.double(), EDGES.double()])[0] / len(x)


def sharpened(exact, c, w, fine=8):
    """The mass of p(x) (p(x | c) / p(x))^w in each cell, by quadrature."""
    side = (len(EDGES) - 1) * fine
    centres = EDGES[0] + (EDGES[-1] - EDGES[0]) * (torch.arange(side) + 0.5) / side
    mass = exact.log_guided(torch.cartesian_prod(centres, centres), c, w).double().exp()
    mass = mass.view(side // fine, fine, side // fine, fine).sum((1, 3))
    return mass / mass.sum()


def points(run, exact, c, w):
    """Samples of one class with the exact guided score, (N, 2)."""
    cfg = run.config.reproduce
    labels = torch.full((cfg.points,), c)
    eps = guided(exact, labels, torch.full_like(labels, len(exact.means)), w)
    times = exact.process.times(min(cfg.point_steps, exact.process.timesteps))
    return exact.process.sample(eps, cfg.points, times, (2, 1, 1), clip=False, generator=seeded(c)).flatten(1)


def exact_network(run):
    """The mixture as a network, with a process on the CPU; v = 0 suits a distribution this simple."""
    return Mixture(DDPM(**{**run.config.ddpm, "v": 0.0}), TRIANGLE, STD)


def mixture(run):
    """(e): the distance between samples of the guided score and the sharpened density, and what chance alone gives."""
    cfg, exact, result = run.config.reproduce, exact_network(run), {}
    for w in (1, 2, 4):
        target, x = sharpened(exact, 0, w), points(run, exact, 0, w)
        drawn = torch.multinomial(target.flatten(), cfg.points, replacement=True, generator=seeded(w))
        control = torch.bincount(drawn, minlength=target.numel()).view_as(target) / cfg.points
        middle = (EDGES[:-1] + EDGES[1:]) / 2
        result[w] = {"distance": float((cells(x) - target).abs().sum() / 2),
                     "by_chance": float((control - target).abs().sum() / 2),
                     "mean": float(x[:, 1].mean()), "mean_of_density": float((target.sum(0) * middle).sum())}
    ratio = {w: row["distance"] / row["by_chance"] for w, row in result.items()}
    return {"weights": result, "ratio": ratio, "holds": ratio[1] <= 1.5 and ratio[2] > 3 and ratio[4] > 3}


# ------------------------------------------------------------------ eps_c - eps_u, and the same noise at all weights
@torch.no_grad()
def difference(run):
    """Root mean square of eps_c - eps_u at test images noised to 25 times, and the log-SNR of those."""
    ddpm, net, null = network(run, "published")
    x0, c = (part.to(run.device) for part in digits("test").first(run.config.reproduce.images))
    eps, result = torch.randn(x0.shape, generator=seeded(0)).to(run.device), {"t": [], "log_snr": [], "rms": []}
    for i in torch.linspace(0, ddpm.timesteps - 1, min(25, ddpm.timesteps)).round().long().tolist():
        t = torch.full_like(c, i)
        eps_c, eps_u = net(*(torch.cat([a, a]) for a in (ddpm.q_sample(x0, t, eps), t)),
                           torch.cat([c, torch.full_like(c, null)])).float().chunk(2)
        for key, value in (("t", i), ("log_snr", round(float(torch.logit(ddpm.abar[i])), 3)),
                           ("rms", round(float((eps_c - eps_u).square().mean().sqrt()), 5))):
            result[key].append(value)
    return result


def same_noise(run):
    """Ten digits from the same noise, a row for each weight."""
    ddpm, net, null = network(run, "published")
    cfg, c = run.config.reproduce, wanted("", 10, null).to(run.device)
    return torch.cat([draw(ddpm, net, c, null, ddpm.times(cfg.sample_steps), w, seeded(7)).cpu() for w in cfg.weights])


# ------------------------------------------------------------------ what is printed and drawn
def text(claim):
    """The tables with their verdicts."""
    def mean(values, digits=3):
        return f"{statistics.mean(values):.{digits}f} +- {deviation(values):.{digits}f}"

    lines = ["", f"n = {claim['n']}, {claim['sample_steps']} steps, floor {claim['floor'][str(claim['n'])]:.3f}"]
    lines += [f"    w = {w:<4g} " + "   ".join(f"{key} {mean(values)}" for key, values in row.items())
              for w, row in claim["sweep"].items()]
    lines += [f"(a) FID: {claim['fid']['verdict']}   (lowest at w = {claim['fid']['best_w']:g})",
              f"(b) trade: {claim['trade']['verdict']}   {claim['trade']}",
              f"(c) saturation: {claim['saturation']['verdict']}"]
    lines += [f"    not clipped, w = {w:<4g} " + "   ".join(f"{key} {mean(values, 4)}" for key, values in row.items())
              for w, row in claim["not_clipped"].items()]
    lines += [f"(d) dropping: {claim['dropping']['verdict']}   (lowest FID {claim['dropping']['lowest_fid']})"]
    lines += [f"    drop {drop:g}, w = {w:g}: " + "   ".join(f"{key} {mean(values)}" for key, values in row.items())
              for drop, rows in claim["dropping"]["arms"].items() for w, row in rows.items()]
    lines += [f"(e) mixture: {claim['mixture']['verdict']}   (distance over chance: {claim['mixture']['ratio']})"]
    return "\n".join(lines)


def plot(claim, path):
    """Three answers: what each weight scores, which FID a recall costs, and how often to drop the label."""
    fig, (left, middle, right) = figure(1, 3, width=4.4, height=3.6)
    sweep = {w: {key: statistics.mean(values) for key, values in row.items()} for w, row in claim["sweep"].items()}
    for key in ("accuracy", "precision", "recall"):
        left.plot(list(sweep), [row.get(key) for row in sweep.values()], "o-", ms=4, label=key)
    left.set(xlabel="guidance weight w (the paper's: w - 1)", title="(b) quality for variety")
    left.legend(fontsize=8)
    middle.plot([row["recall"] for row in sweep.values()], [row["fid"] for row in sweep.values()], "o-", ms=4)
    for w, row in sweep.items():
        middle.annotate(f"w={w:g}", (row["recall"], row["fid"]), textcoords="offset points", xytext=(4, 4), fontsize=8)
    middle.axhline(claim["floor"][str(claim["n"])], color="grey", ls=":", lw=1)
    middle.set(xlabel="recall", ylabel=f"FID (n = {claim['n']}; dotted: floor)", yscale="log",
               title="(a) FID and recall")
    for i, (drop, rows) in enumerate(claim["dropping"]["arms"].items()):
        for seed in range(len(next(iter(rows.values()))["fid"])):
            right.plot([row["accuracy"][seed] for row in rows.values()], [row["fid"][seed] for row in rows.values()],
                       "o-", ms=3, lw=0.8, color=f"C{i}", label=f"p = {drop:g}" if seed == 0 else None)
    right.set(xlabel="accuracy", ylabel=f"FID (n = {claim['arm_n']})", title="(d) share of dropped labels, w = " + (
        ", ".join(f"{w:g}" for w in next(iter(claim["dropping"]["arms"].values())))))
    right.legend(fontsize=8)
    for ax in (left, middle, right):
        ax.grid(alpha=0.3)
    return save_figure(fig, path)


def plot_difference(claim, path):
    """Where does the class matter? The size of eps_c - eps_u by time."""
    fig, ax = figure(width=5.6)
    ax.plot(claim["difference"]["t"], claim["difference"]["rms"], "o-", ms=4)
    ax.set(xlabel="t (0: data)", ylabel="RMS of eps_c - eps_u")
    ax.grid(alpha=0.3)
    return save_figure(fig, path)


def plot_mixture(run, path):
    """Above the sharpened densities of three classes together, below samples of the exact guided score; by weight."""
    exact, weights = exact_network(run), (1, 2, 4)
    fig, axes = figure(2, len(weights), width=2.6, height=2.6)
    for column, w in zip(axes.T, weights):
        above = sum(sharpened(exact, c, w) for c in range(3)) / 3
        below = sum(cells(points(run, exact, c, w)) for c in range(3)) / 3
        for ax, mass, what in zip(column, (above, below), ("density", "samples")):
            ax.imshow(mass.T, origin="lower", extent=[-3, 3, -3, 3], cmap="magma")
            ax.set_title(f"{what}, w = {w}", fontsize=9)
            ax.plot(*exact.means.T, "c+", ms=6)
    return save_figure(fig, path)


if __name__ == "__main__":
    cli(main)
