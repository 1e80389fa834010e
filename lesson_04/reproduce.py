"""Measure the claims of the NCSNv2 paper again: its constants, the average of the weights, the last step, sigma_1.

    python reproduce.py publish=true        all arms, three seeds; writes results/claim.json and results/claim.png
    python reproduce.py quick=true          a look at it, no verdict
    python reproduce.py train.lr=1e-3       other values for all arms; without publish=true to runs/claim

The criteria were written down before the numbers were seen. To spend the minutes where they count, every arm goes on
from the published network, which learned with sigma_1 from the data; an arm with a small sigma_1 starts ahead by that.

(a) The solvers return the constants reported for the paper's models: Technique 4 the step sizes 6.2e-6 (CIFAR-10:
    sigma_1 = 50, 232 levels, T = 5) and 3.3e-6 (CelebA: 90, 500, 5) to both digits, and the overlap of Technique 2
    is within 0.1 of 0.5 for both sequences of levels.
(b) Technique 5. Trained with a constant learning rate as in the paper; sampled from the same noise at the last
    snapshots of the training, once with the weights as they are and once with their average: in every seed the FID
    of the averaged weights has the lower mean and the lower standard deviation over the snapshots, and the gap between
    the means is above 3 pooled standard deviations over the seeds.
(c) The last denoising step, with the published network: in every sampling seed FID-low (of first-layer statistics)
    falls by more than 10 %, and the share by which FID changes is less than a third of that.
(d) Technique 1. Of networks trained alike, those with sigma_1 = 1 have, in every seed, a lower recall than those with
    sigma_1 from the data, and classes further from the test set's (total variation); both gaps are above 3 pooled
    standard deviations over the seeds.

A first, smaller run (T = 2, two snapshots, 120 steps an arm) failed (b), (c) and (d); in (d) sigma_1 = 1 was ahead. The
criteria are as they were. T went up to 3, the snapshots to 3, the steps to 160, and (d) got a look without a verdict:
the same two sigma_1 with the exact score of 2,000 training images. README has both runs side by side.

"Constant" is the learning rate after a warm-up of 100 steps. The average of an arm starts with the arm.
"""

import math
import statistics
import time

import torch

import train
from model import (
    NCSNv2,
    ScoreNet,
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
    Run,
    Weights,
    cli,
    digits,
    fid_to_test,
    figure,
    floor,
    parallel,
    save_figure,
    save_strip,
    score,
    trained,
    write_json,
)

# Reported for the paper's models: pixels, sigma_1, levels, T, step size. sigma_L is 0.01.
PAPER = {"CIFAR-10": (3 * 32 ** 2, 50, 232, 5, 6.2e-6), "CelebA 64 x 64": (3 * 64 ** 2, 90, 500, 5, 3.3e-6)}


def main(argv=None):
    run = Run(__file__, argv)
    cfg = run.config.reproduce
    start = time.perf_counter()
    run.open_folder("claim")
    seeds = range(cfg.seeds)
    arms = [(run.argv, sigma_1, seed) for sigma_1 in (run.config.ncsn.sigma_1, cfg.small_sigma_1) for seed in seeds]
    folders = dict(zip([arm[1:] for arm in arms], parallel(train_arm, arms, cfg.workers)))
    last = [cfg.steps - cfg.every * back for back in reversed(range(cfg.snapshots))]
    jobs = [(f"{kind} {step} {seed}", folders[run.config.ncsn.sigma_1, seed] / f"{kind}_{step:06d}.safetensors", seed)
            for seed in seeds for step in last for kind in ("raw", "ema")]
    jobs += [(f"small {seed}", folders[cfg.small_sigma_1, seed] / f"ema_{last[-1]:06d}.safetensors", seed)
             for seed in seeds]
    jobs += [(f"published {seed}", published(run, folders), seed) for seed in seeds]
    measured = {}
    for (name, *_), row in zip(jobs, parallel(measure, [(run.argv, *job) for job in jobs], cfg.workers)):
        measured[name] = row
        run.say(f"{name:15} " + "  ".join(f"{key} {value:.3f}" for key, value in row.items() if key in SHOWN))
    claim = {
        "constants": constants(run), "averaging": averaging(measured, last, cfg.seeds),
        "denoising": denoising(measured, cfg),
        "sigma_1": {**largest_noise(measured, last[-1], cfg.seeds), "exact": exact_scores(run)},
        "by_level": by_level(run, published(run, folders)),
        "n": cfg.n, "langevin_steps": cfg.sample_steps, "floor": floor(cfg.n), "floor_low": floor(cfg.n, True),
        "train_steps": cfg.steps, "rows": measured,
        "minutes": round((time.perf_counter() - start) / 60, 1),
    }
    for name in ("constants", "averaging", "denoising", "sigma_1"):
        claim[name]["verdict"] = verdict(claim[name]["holds"], cfg)
    run.say(text(claim))
    run.output(save_json, claim, "claim.json")
    run.output(plot, claim, "claim.png")
    run.output(techniques, claim, "techniques.png")
    run.output(save_strip, grids(run, folders, last[-1]), "arms.png")
    run.record("claim", **{key: value for key, value in claim.items() if key != "rows"})
    return claim


SHOWN = ("fid", "fid_low", "fid_noisy", "fid_low_noisy", "recall")


# Copied from lesson_05/reproduce.py: save_json
def save_json(claim, path):
    """claim.json; infinities, which JSON does not have, become null."""
    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    write_json(path, plain(claim))
    return path


# Copied from lesson_05/reproduce.py: verdict
def verdict(holds, cfg):
    """One of the two verdicts, or none if there were too few seeds for one."""
    if cfg.quick or cfg.smoke or cfg.seeds < 3:
        return "no verdict from a quick look"
    return "reproduced" if holds else "not reproduced at this scale"


# ------------------------------------------------------------------ the arms
def train_arm(argv, sigma_1, seed):
    """Train one arm (or take it from an earlier call); the folder with its snapshots."""
    run = Run(__file__, argv)
    cfg, folder = run.config.reproduce, run.open_folder("claim")
    own = [a for a in argv if a.split("=")[0].split(".")[0] in ("train", "device", "smoke")]
    return trained(train.main, folder / f"sigma_{sigma_1}_{seed}", [
        *own, "gpu=false", f"start={cfg.start}", f"sigma_1={sigma_1}", f"seed={seed}", f"steps={cfg.steps}",
        "decay=false", "preview_every=0", f"snapshot_every={cfg.every}"], run.lesson).parent


def published(run, folders):
    """The lesson's published network; in smoke mode, or where there is none, the first arm's."""
    path = run.lesson / "results" / "weights.safetensors"
    if run.config.reproduce.smoke or not path.exists():
        path = folders[run.config.ncsn.sigma_1, 0] / "weights.safetensors"
        run.say(f"the network of (c) is {path.parent}")
    return path


def load(run, path):
    """Process and network of a weights file."""
    weights = Weights(path, run.name)
    return run.place(NCSNv2(**weights.config["ncsn"]), weights.load(ScoreNet(**weights.config["scorenet"])))


def measure(argv, name, path, seed):
    """Scores of n samples of a weights file, and the two FIDs of the same chains without the last step."""
    run = Run(__file__, argv)
    cfg, _ = run.config.reproduce, run.open_folder("claim")
    ncsn, net = load(run, path)
    noisy = to_unit(draw(ncsn, net, cfg.n, cfg.sample_steps, torch.Generator().manual_seed(seed), denoise=False))
    x = from_unit(torch.cat([ncsn.last_step(net, part) for part in noisy.split(128)])).nan_to_num()
    noisy, scores = from_unit(noisy).nan_to_num(), score(x)
    return {"fid": scores["fid"], "fid_low": scores["fid_low"], "fid_noisy": fid_to_test(noisy),
            "fid_low_noisy": fid_to_test(noisy, low=True), "recall": scores["recall"],
            "precision": scores["precision"], "classes": scores["classes"]}


def grids(run, folders, step):
    """Rows of samples from the same noise: raw and averaged weights, and averaged ones with a small sigma_1."""
    cfg, rows = run.config.reproduce, []
    for sigma_1, kind in ((run.config.ncsn.sigma_1, "raw"), (run.config.ncsn.sigma_1, "ema"),
                          (cfg.small_sigma_1, "ema")):
        ncsn, net = load(run, folders[sigma_1, 0] / f"{kind}_{step:06d}.safetensors")
        rows += draw(ncsn, net, 32, cfg.sample_steps, run.generator()).nan_to_num().chunk(2)
    return rows


# ------------------------------------------------------------------ (a) Techniques 2 and 4
def constants(run):
    """What the solvers give for the paper's two models and for the published network's levels."""
    table = {}
    for name, (dim, sigma_1, levels, T, reported) in PAPER.items():
        gamma = (sigma_1 / 0.01) ** (1 / (levels - 1))
        table[name] = {"dim": dim, "sigma_1": sigma_1, "levels": levels, "T": T, "gamma": gamma,
                       "overlap": overlap(gamma, dim), "epsilon": solve_step_size(0.01, gamma, T),
                       "reported": reported, "levels_at_half": len(noise_levels(sigma_1, 0.01, spacing(dim)))}
    levels = train.settings(run.config.ncsn)
    ncsn = NCSNv2(**levels)
    mnist = {"dim": 784, "sigma_1": levels.sigma_1, "levels": ncsn.levels, "gamma": ncsn.gamma,
             "overlap": overlap(ncsn.gamma, 784), "sigma_L": levels.sigma_L,
             "epsilon": {T: solve_step_size(levels.sigma_L, ncsn.gamma, T) for T in (3, 5, 10)}}
    holds = all(f"{row['epsilon']:.1e}" == f"{row['reported']:.1e}" and abs(row["overlap"] - 0.5) < 0.1
                for row in table.values())
    return {"paper": table, "mnist": mnist, "holds": holds}


# ------------------------------------------------------------------ (b) Technique 5
def averaging(measured, steps, seeds):
    """FID at every snapshot with and without averaging; means and deviations over the snapshots of a seed."""
    table = {}
    for kind in ("raw", "ema"):
        fid = [[measured[f"{kind} {step} {seed}"]["fid"] for step in steps] for seed in range(seeds)]
        low = [[measured[f"{kind} {step} {seed}"]["fid_low"] for step in steps] for seed in range(seeds)]
        table[kind] = {"fid": fid, "fid_low": low, "mean": [statistics.mean(row) for row in fid],
                       "std": [deviation(row) for row in fid], "mean_low": [statistics.mean(row) for row in low]}
    raw, ema = table["raw"], table["ema"]
    lower = all(e < r for key in ("mean", "std") for e, r in zip(ema[key], raw[key]))
    return {"steps": steps, **table, "lower_in_every_seed": lower, **gap(raw["mean"], ema["mean"]),
            "holds": lower and clear(raw["mean"], ema["mean"])}


# ------------------------------------------------------------------ (c) the last step
def denoising(measured, cfg):
    """FID and FID-low of the published network with and without the last step; the same noise on training images."""
    rows = [measured[f"published {seed}"] for seed in range(cfg.seeds)]
    share = {key: [1 - row[key] / row[f"{key}_noisy"] for row in rows] for key in ("fid", "fid_low")}
    real, _ = digits("train").first(cfg.n, shuffle_seed=0)
    noised = real + 2 * 0.01 * torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    control = {"fid": fid_to_test(real), "fid_noisy": fid_to_test(noised),
               "fid_low": fid_to_test(real, low=True), "fid_low_noisy": fid_to_test(noised, low=True)}
    holds = all(low > 0.1 and abs(fid) < low / 3 for fid, low in zip(share["fid"], share["fid_low"]))
    return {**{key: [row[key] for row in rows] for key in ("fid", "fid_noisy", "fid_low", "fid_low_noisy")},
            "share": share, "training_images": control, "holds": holds}


# ------------------------------------------------------------------ (d) Technique 1
def largest_noise(measured, step, seeds):
    """Recall and classes of the averaged networks with sigma_1 from the data and with the small one."""
    (_, labels), table = digits("test").first(10_000), {}
    test = [float((labels == k).float().mean()) for k in range(10)]
    for name, key in (("from the data", f"ema {step}"), ("small", "small")):
        rows = [measured[f"{key} {seed}"] for seed in range(seeds)]
        table[name] = {"recall": [row["recall"] for row in rows], "fid": [row["fid"] for row in rows],
                       "classes": [statistics.mean(row["classes"][k] for row in rows) for k in range(10)],
                       "off": [sum(abs(a - b) for a, b in zip(row["classes"], test)) / 2 for row in rows]}
    data, small = table["from the data"], table["small"]
    recall = all(s < d for s, d in zip(small["recall"], data["recall"])) and clear(data["recall"], small["recall"])
    classes = all(s > d for s, d in zip(small["off"], data["off"])) and clear(small["off"], data["off"])
    return {**table, "test_classes": test, "recall_holds": recall, "classes_hold": classes,
            "holds": recall and classes}


class Exact(NCSNv2):
    """The same levels and sampler with the exact score of a few images (K, D) in the place of a network."""

    def score(self, net, x, i):
        """(E[x_0 | x] - x) / sigma^2; the mean is over the images, by how likely each is behind x. (B, C, H, W)."""
        sigma2, flat = self.sigmas[i].float()[:, None] ** 2, x.flatten(1)
        distance2 = flat.square().sum(1, keepdim=True) - 2 * flat @ net.T + net.square().sum(1)
        mean = (-distance2 / (2 * sigma2)).softmax(1) @ net
        return ((mean - flat) / sigma2).reshape(x.shape)


@torch.no_grad()
def by_level(run, path):
    """The loss at eleven levels on test images; beside it that of a network that answers with the mean image."""
    ncsn, net = load(run, path)
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
    levels = train.settings(run.config.ncsn)
    for name, sigma_1 in (("from the data", levels.sigma_1), ("small", cfg.small_sigma_1)):
        x = Exact(sigma_1, levels.sigma_L).sample(images, cfg.exact_n, cfg.sample_steps, generator=run.generator())
        found = torch.cdist(x.flatten(1), images).argmin(1)
        classes = torch.bincount(labels[found], minlength=10) / len(x)
        table[name] = {"different": len(found.unique()), "off": float((classes - share).abs().sum() / 2),
                       "classes": [round(float(value), 4) for value in classes]}
    expected = cfg.exact_images * (1 - (1 - 1 / cfg.exact_images) ** cfg.exact_n)     # of as many uniform draws
    return {**table, "n": cfg.exact_n, "images": cfg.exact_images, "different_of_uniform_draws": expected}


def gap(high, low):
    """The gap between two arms' means over the seeds, and their pooled standard deviation."""
    return {"gap": statistics.mean(high) - statistics.mean(low),
            "pooled_std": ((deviation(high) ** 2 + deviation(low) ** 2) / 2) ** 0.5}


def clear(high, low):
    """Whether the gap is above 3 pooled standard deviations."""
    sizes = gap(high, low)
    return sizes["gap"] > 3 * sizes["pooled_std"]


def deviation(values):
    """Standard deviation; 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


# ------------------------------------------------------------------ what is printed and drawn
def text(claim):
    """The four tables with their verdicts."""
    mnist, averages = claim["constants"]["mnist"], claim["averaging"]
    lines = ["", f"(a) the constants: {claim['constants']['verdict']}"]
    lines += [f"    {name:16} gamma {row['gamma']:.4f}   overlap {row['overlap']:.3f}   step size {row['epsilon']:.2e}"
              f" (reported {row['reported']:.1e})" for name, row in claim["constants"]["paper"].items()]
    lines += [f"    {'MNIST':16} gamma {mnist['gamma']:.4f}   overlap {mnist['overlap']:.3f}   sigma_1 "
              f"{mnist['sigma_1']:.2f}, {mnist['levels']} levels, step size "
              + ", ".join(f"{epsilon:.2e} (T = {T})" for T, epsilon in mnist["epsilon"].items())]
    lines += [f"(b) averaging: {averages['verdict']}   (FID: n = {claim['n']}, floor {claim['floor']:.3f})"]
    lines += [f"    {kind} seed {seed}: FID " + "  ".join(f"{v:8.3f}" for v in averages[kind]["fid"][seed])
              + f"   mean {averages[kind]['mean'][seed]:.3f}, std {averages[kind]['std'][seed]:.3f}"
              for kind in ("raw", "ema") for seed in range(len(averages[kind]["fid"]))]
    last = claim["denoising"]
    lines += [f"(c) the last step: {last['verdict']}   (FID-low: floor {claim['floor_low']:.3f})"]
    lines += [f"    {name:8} without " + "  ".join(f"{v:8.3f}" for v in last[f"{key}_noisy"]) + "   with "
              + "  ".join(f"{v:8.3f}" for v in last[key]) for name, key in (("FID", "fid"), ("FID-low", "fid_low"))]
    lines += ["    training images with that noise: FID {fid_noisy:.3f}, without {fid:.3f}; FID-low {fid_low_noisy:.3f}"
              ", without {fid_low:.3f}".format(**last["training_images"]),
              f"(d) sigma_1: {claim['sigma_1']['verdict']}"]
    for name in ("from the data", "small"):
        arm = claim["sigma_1"][name]
        lines += [f"    {name:14} recall " + "  ".join(f"{v:.3f}" for v in arm["recall"]) + "   classes off by "
                  + "  ".join(f"{v:.3f}" for v in arm["off"]) + "   FID " + "  ".join(f"{v:.2f}" for v in arm["fid"])]
    exact = claim["sigma_1"]["exact"]
    lines += [f"    exact score of {exact['images']} images, sigma_1 {name}: {exact[name]['different']} of them in "
              f"{exact['n']} samples (uniform draws: {exact['different_of_uniform_draws']:.0f}), classes off by "
              f"{exact[name]['off']:.3f}" for name in ("from the data", "small")]
    lines += ["    loss of the published network at sigma (of the mean image):  " + "  ".join(
        f"{row['sigma']:.2g}: {row['loss']:.4f} ({row['mean_image']:.4f})" for row in claim["by_level"])]
    return "\n".join(lines)


def plot(claim, path):
    """Three answers: does averaging calm the FID, what does the last step change, which digits come out."""
    fig, (left, middle, right) = figure(1, 3, width=4.2)
    averages, last = claim["averaging"], claim["denoising"]
    for kind, color in (("raw", "C3"), ("ema", "C0")):
        for seed, fid in enumerate(averages[kind]["fid"]):
            left.plot(averages["steps"], fid, "o-", color=color,
                      label={"raw": "weights as they are", "ema": "averaged"}[kind] if seed == 0 else None)
    left.set(xlabel="training step", ylabel=f"FID (n = {claim['n']})", yscale="log", title="(b) averaging the weights")
    left.legend(fontsize=8)
    for x, (name, key) in enumerate((("FID", "fid"), ("FID-low", "fid_low"))):
        for offset, end, color in ((-0.2, "_noisy", "C3"), (0.2, "", "C0")):
            middle.bar(x + offset, statistics.mean(last[key + end]), 0.38, color=color,
                       label={"_noisy": "without the last step", "": "with it"}[end] if x == 0 else None)
            middle.plot([x + offset] * len(last[key + end]), last[key + end], "k.", ms=4)
    middle.set(xticks=[0, 1], xticklabels=["FID", "FID-low"], title="(c) the last step")
    middle.legend(fontsize=8)
    for offset, name, color in ((-0.2, "from the data", "C0"), (0.2, "small", "C3")):
        right.bar([k + offset for k in range(10)], claim["sigma_1"][name]["classes"], 0.38, color=color,
                  label=f"sigma_1 {name}")
    right.plot(range(10), claim["sigma_1"]["test_classes"], "k_", ms=12, label="test set")
    right.set(xticks=range(10), xlabel="digit", ylabel="share of the samples", title="(d) the largest noise")
    right.legend(fontsize=8)
    return save_figure(fig, path)


def techniques(claim, path):
    """The overlap against gamma, the variance ratio against the step size, the network's loss at every level."""
    fig, (left, right, last) = figure(1, 3, width=4.2)
    mnist = claim["constants"]["mnist"]
    gammas = [1 + k / 1000 for k in range(1, 200)]
    left.plot(gammas, [overlap(gamma, 784) for gamma in gammas])
    left.plot(spacing(784), 0.5, "o", label=f"gamma = {spacing(784):.4f}")
    left.axhline(0.5, color="grey", ls=":", lw=1)
    left.set(xlabel="gamma", ylabel="overlap of neighbouring levels", title="Technique 2, 784 dimensions")
    left.legend(fontsize=8)
    steps = [mnist["sigma_L"] ** 2 * 10 ** (-2.5 + k / 80) for k in range(200)]
    for (T, epsilon), color in zip(mnist["epsilon"].items(), ("C0", "C1", "C2")):
        ratio = [variance_ratio(step, mnist["sigma_L"], mnist["gamma"], T) for step in steps]
        right.plot(steps, ratio, color=color, label=f"T = {T}: {epsilon:.2e}")
        right.plot(epsilon, variance_ratio(epsilon, mnist["sigma_L"], mnist["gamma"], T), "o", color=color)
    right.axhline(1, color="grey", ls=":", lw=1)
    right.set(xscale="log", xlabel="step size", ylabel="variance after a level / $\\sigma_i^2$", ylim=(0.95, 1.3),
              title="Technique 4")
    right.legend(fontsize=8)
    sigma = [row["sigma"] for row in claim["by_level"]]
    last.loglog(sigma, [row["loss"] for row in claim["by_level"]], "o-", label="published network")
    last.loglog(sigma, [row["mean_image"] for row in claim["by_level"]], "k--", label="the mean image, always")
    last.axhline(0.5, color="grey", ls=":", lw=1)
    last.set(xlabel="sigma", ylabel="loss a pixel (dotted: an output of 0)", ylim=(5e-5, 1), title="what was learned")
    last.legend(fontsize=8)
    return save_figure(fig, path)


if __name__ == "__main__":
    cli(main)
