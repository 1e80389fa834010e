"""Measure the claims of the EDM paper again: its sampler (Sec. 3), its training (Sec. 5), the loss by noise level.

    python reproduce.py publish=true      all of it, three seeds; writes results/claim.json and results/claim.png
    python reproduce.py quick=true        a look at it, no verdict
    python reproduce.py n=1024 seeds=5    other values; without publish=true to runs/claim

The criteria were written down before the numbers were seen.

(a) One network, the published one; every sampler starts from the same noise and makes the same number of network calls.
    "Euler, VP levels" is DDIM on evenly spaced times. Both must hold in every one of three seeds:
    - at 35 calls Heun on the EDM levels has a FID within 5 % of its own FID at 159 calls (the same noise), and
      Euler on the VP levels, at 35 calls, has one that is more than 5 % above it;
    - at 35 calls the RMS distance to the image of 1,000 Heun steps from the same noise is at least 5 times larger for
      Euler on the VP levels than for Heun on the EDM levels.
(b) Trained alike from the same start for the same number of steps and sampled alike (Heun, 35 calls), the FID of EDM's
    preconditioning and loss (with the paper's ln sigma ~ N(-1.2, 1.2^2)) is below that of noise prediction (the VP
    column of Table 1) in every seed and by more than 3 pooled standard deviations. The arm between the two, EDM's
    preconditioning with the VP loss, has no criterion.
(c) At the start the loss is 1 within 2 % at every noise level from 0.002 to 80, and for images in [-1, 1] it is above 3
    at sigma = 80. After training it is lowest at a level within two deviations of the paper's log-normal, 0.03 to 3.3,
    and at least twice as high at both ends, 0.002 and 80.
"""

import math
import statistics
import time

import torch

import train
from model import SCHEDULES, ode_sampler
from sample import draw, load
from utils import (
    Run,
    cli,
    deviation,
    digits,
    fid_to_test,
    figure,
    floor,
    parallel,
    pooled,
    save_figure,
    save_json,
    seeded,
    trained,
    verdict,
)

HEUN, EULER, DDIM = "Heun, EDM levels", "Euler, EDM levels", "Euler, VP levels"
SAMPLERS = {                                            # name: solver, levels, schedule
    DDIM: ("euler", "vp", "edm"),
    EULER: ("euler", "edm", "edm"),
    HEUN: ("heun", "edm", "edm"),
    "Heun, VP levels": ("heun", "vp", "edm"),           # from here on without a criterion, distance only
    "Heun, VE levels": ("heun", "ve", "edm"),
    "Heun, iDDPM levels": ("heun", "iddpm", "edm"),
    "Euler, VP levels, VP schedule": ("euler", "vp", "vp"),
    "Heun, EDM levels, VP schedule": ("heun", "edm", "vp"),
    "Heun, EDM levels, VE schedule": ("heun", "edm", "ve"),
}
SCORED = (DDIM, EULER, HEUN)                            # those whose FID is measured
ARMS = [("vp", "vp"), ("edm", "vp"), ("edm", "edm")]    # precondition, objective


def main(argv=None):
    run = Run(__file__, argv)
    cfg, start = run.config.reproduce, time.perf_counter()
    run.settings.publish &= not (cfg.quick or cfg.smoke)
    run.open_folder("claim")
    arms = {}
    for arm, seed, value in parallel(measure_arm, [(run.argv, arm, seed) for seed in range(cfg.seeds) for arm in ARMS],
                                     cfg.workers):
        arms.setdefault(name(arm), []).append(value)
        run.say(f"{name(arm)}, seed {seed}: FID {value:.3f}")
    middle = time.perf_counter()
    distance = merge(parallel(measure_distance, [(run.argv, seed) for seed in range(cfg.seeds)], cfg.workers))
    jobs = [(run.argv, sampler, calls, seed) for sampler in SCORED for calls in counts(cfg, sampler)
            for seed in range(cfg.seeds)]
    fids = {}
    for (_, sampler, calls, seed), value in zip(jobs, parallel(measure_fid, jobs, cfg.workers)):
        fids.setdefault(sampler, {}).setdefault(str(calls), []).append(value)
        run.say(f"{sampler}, {calls} calls, seed {seed}: FID {value:.3f}")
    claim = {
        "sampler": sampler_claim(fids, distance, cfg), "training": training_claim(arms),
        "loss": loss_claim(loss_by_sigma(run)), "n": cfg.n, "floor": floor(cfg.n), "seeds": cfg.seeds,
        "paired": cfg.paired, "long": cfg.long, "arm_steps": cfg.arm_steps,
        "p_mean": run.config.edm.p_mean, "p_std": run.config.edm.p_std,
        "training_minutes": round((middle - start) / 60, 1), "minutes": round((time.perf_counter() - start) / 60, 1),
    }
    for part in ("sampler", "training", "loss"):
        claim[part]["verdict"] = verdict(claim[part]["holds"], cfg)
    run.say(text(claim))
    run.output(save_json, claim, "claim.json")
    run.output(plot, claim, "claim.png")
    run.output(plot_paths, {}, "paths.png")
    run.record("claim", minutes=claim["minutes"], training_minutes=claim["training_minutes"], n=cfg.n,
               **{part: claim[part]["verdict"] for part in ("sampler", "training", "loss")})
    return claim


# ------------------------------------------------------------------ networks
def name(arm):
    """What the tables call an arm of (b)."""
    return f"{arm[0].upper()} preconditioning, {arm[1].upper()} loss" + " (noise prediction)" * (arm == ("vp", "vp"))


def arm_weights(run, arm, seed):
    """Train one arm of (b), or take it from an earlier call."""
    cfg = run.config.reproduce
    own = [a for a in run.argv if a.split("=")[0].split(".")[0] in ("unet", "edm", "train", "gpu", "device", "smoke")]
    return trained(train.main, run.folder / f"{arm[0]}_{arm[1]}_{seed}", [
        *own, f"edm.precondition={arm[0]}", f"edm.objective={arm[1]}", "edm.p_mean=-1.2", f"seed={seed}",
        f"steps={cfg.arm_steps}", "preview_every=0"], run.lesson)


def published(run):
    """The lesson's published network; in smoke mode, or where there is none, the first arm with EDM's training."""
    path = run.published
    if run.config.reproduce.smoke or not path.exists():
        path = arm_weights(run, ("edm", "edm"), 0)
    return load(run, run.read(path))


def open_run(argv):
    run = Run(__file__, argv)
    run.open_folder("claim")
    return run, run.config.reproduce


# ------------------------------------------------------------------ (a) the sampler
def steps_of(solver, calls):
    return calls if solver == "euler" else (calls + 1) // 2


def counts(cfg, sampler):
    return [*cfg.calls, cfg.converged] if sampler == HEUN else cfg.calls


def measure_fid(argv, sampler, calls, seed):
    """FID of n images that the published network draws in this way."""
    run, cfg = open_run(argv)
    edm, net = published(run)
    solver, levels, schedule = SAMPLERS[sampler]
    sigmas = edm.levels(steps_of(solver, calls), levels)
    return fid_to_test(draw(edm, net, cfg.n, seed, cfg.batch, sigmas, solver=solver, schedule=schedule))


def measure_distance(argv, seed):
    """RMS distance of each sampler's images, at each number of calls, to those of `long` Heun steps. fp32."""
    run, cfg = open_run([*argv, "precision=fp32"])      # an error of rounding would stand in the table
    edm, net = published(run)
    reference = draw(edm, net, cfg.paired, seed, cfg.batch, edm.levels(cfg.long))
    table = {}
    for sampler, (solver, levels, schedule) in SAMPLERS.items():
        for calls in cfg.calls:
            sigmas = edm.levels(steps_of(solver, calls), levels)
            x = draw(edm, net, cfg.paired, seed, cfg.batch, sigmas, solver=solver, schedule=schedule)
            table.setdefault(sampler, {})[str(calls)] = float((x - reference).square().mean().sqrt())
    return table


def merge(tables):
    """Tables of one seed each -> one with a list for each entry."""
    tables = list(tables)
    return {row: {column: [table[row][column] for table in tables] for column in tables[0][row]} for row in tables[0]}


def sampler_claim(fids, distance, cfg):
    """(a) by its criterion. fids, distance: {sampler: {calls: [value of each seed]}}."""
    at = str(35 if 35 in cfg.calls else max(cfg.calls))
    converged = fids[HEUN][str(cfg.converged)]
    ratio = {sampler: {calls: [a / b for a, b in zip(values, converged)] for calls, values in row.items()}
             for sampler, row in fids.items()}
    factor = [a / b for a, b in zip(distance[DDIM][at], distance[HEUN][at])]
    near = all(abs(r - 1) <= 0.05 for r in ratio[HEUN][at])
    far = all(r > 1.05 for r in ratio[DDIM][at])
    return {"fid": fids, "ratio_to_converged": ratio, "distance": distance, "distance_factor": factor, "at_calls": at,
            "heun_near": near, "ddim_far": far, "distance_holds": min(factor) >= 5,
            "holds": near and far and min(factor) >= 5}


# ------------------------------------------------------------------ (b) the training
def measure_arm(argv, arm, seed):
    """FID of n images of one arm: Heun on 18 EDM levels, the noise of this seed."""
    run, cfg = open_run(argv)
    edm, net = load(run, run.read(arm_weights(run, arm, seed)))
    return arm, seed, fid_to_test(draw(edm, net, cfg.n, seed, cfg.batch, edm.levels(18)).nan_to_num())


def training_claim(arms):
    """(b) by its criterion. arms: {name: [FID of each seed]}."""
    old, ours = arms[name(("vp", "vp"))], arms[name(("edm", "edm"))]
    gap, spread = statistics.mean(old) - statistics.mean(ours), pooled(old, ours)
    lower = all(a < b for a, b in zip(ours, old))
    return {"fid": arms, "gap": gap, "pooled_std": spread, "lower_in_every_seed": lower,
            "holds": lower and gap > 3 * spread}


# ------------------------------------------------------------------ (c) the loss by noise level
@torch.no_grad()
def loss_by_sigma(run):
    """The loss at levels from 0.002 to 80: of a network that outputs 0, the same on plain images, and the published."""
    cfg = run.config.reproduce
    edm, net = published(run)
    x0, _ = digits("train").first(10 * cfg.images, shuffle_seed=0)      # the start is measured on many
    test = edm.standardise(digits("test").first(cfg.images)[0].to(run.device))
    zero = lambda x, t: torch.zeros_like(x)
    levels, table = torch.logspace(math.log10(0.002), math.log10(80), 24, dtype=torch.float64).tolist(), []
    for sigma in levels:
        start, plain = (float(edm.loss_at(zero, y, torch.full((len(y),), sigma),
                                          torch.randn(y.shape, generator=seeded(0))).mean())
                        for y in (edm.standardise(x0), x0))
        eps = torch.randn(test.shape, generator=seeded(1)).to(run.device)
        after = [edm.loss_at(net, y, torch.full((len(y),), sigma, device=run.device), e).mean() * len(y)
                 for y, e in zip(test.split(cfg.batch), eps.split(cfg.batch))]
        table.append({"sigma": sigma, "start": start, "plain": plain, "trained": float(sum(after)) / len(test)})
    return table


def loss_claim(table):
    """(c) by its criterion."""
    lowest = min(table, key=lambda row: row["trained"])
    start = all(abs(row["start"] - 1) <= 0.02 for row in table)
    shape = 0.03 <= lowest["sigma"] <= 3.3 and all(end["trained"] >= 2 * lowest["trained"]
                                                   for end in (table[0], table[-1]))
    return {"table": table, "lowest": lowest, "start_holds": start, "plain_holds": table[-1]["plain"] > 3,
            "shape_holds": shape, "holds": start and table[-1]["plain"] > 3 and shape}


# ------------------------------------------------------------------ what is printed and drawn
def text(claim):
    """The tables with their verdicts."""
    def mean(values, digits=3):
        return f"{statistics.mean(values):.{digits}f} +- {deviation(values):.{digits}f}"

    part = claim["sampler"]
    lines = ["", f"(a) the sampler: {part['verdict']}   (FID: n = {claim['n']}, floor {claim['floor']:.3f})"]
    lines += [f"    {s:30} FID " + "   ".join(f"{c}: {mean(v)}" for c, v in row.items())
              for s, row in part["fid"].items()]
    lines += [f"    {s:30} FID over converged " + "   ".join(f"{c}: {mean(v)}" for c, v in row.items())
              for s, row in part["ratio_to_converged"].items()]
    lines += [f"    {s:30} RMS " + "   ".join(f"{c}: {mean(v, 4)}" for c, v in row.items())
              for s, row in part["distance"].items()]
    lines += [f"    distance at {part['at_calls']} calls: {', '.join(f'{f:.1f}' for f in part['distance_factor'])} "
              f"times smaller with Heun; FID near {part['heun_near']}, DDIM's far {part['ddim_far']}"]
    part = claim["training"]
    lines += [f"(b) the training, {claim['arm_steps']} steps: {part['verdict']}"]
    lines += [f"    {arm:48} FID {mean(values)}" for arm, values in part["fid"].items()]
    part = claim["loss"]
    lines += [f"(c) the loss by sigma: {part['verdict']}"]
    lines += ["    sigma {sigma:7.3f}   start {start:.3f}   on [-1, 1] {plain:.3f}  trained {trained:.3f}".format(**row)
              for row in part["table"]]
    return "\n".join(lines)


def plot(claim, path):
    """Four answers: how far from the exact image, how good, which training, and where there is something to learn."""
    fig, ((upper, right), (lower, last)) = figure(2, 2, width=5.2)
    for i, (sampler, row) in enumerate(claim["sampler"]["distance"].items()):
        scored = sampler in SCORED
        upper.loglog([int(c) for c in row], [statistics.mean(v) for v in row.values()], "o-" if scored else "x:",
                     color=f"C{i}", label=sampler, lw=1.5 if scored else 1)
    upper.set(xlabel="network calls", ylabel=f"RMS to {claim['long']:,} Heun steps", title="(a) distance, same noise",
              ylim=(None, 2))
    upper.legend(fontsize=6)
    for i, (sampler, row) in enumerate(claim["sampler"]["fid"].items()):
        right.errorbar([int(c) for c in row], [statistics.mean(v) for v in row.values()],
                       [deviation(v) for v in row.values()], fmt="o-", color=f"C{i}", label=sampler)
    right.axhline(claim["floor"], color="grey", ls=":", lw=1)
    right.set(xscale="log", yscale="log", xlabel="network calls", ylabel=f"FID (n = {claim['n']}; dotted: floor)",
              title="(a) FID")
    right.legend(fontsize=7)
    for i, (arm, values) in enumerate(claim["training"]["fid"].items()):
        lower.plot(values, [i] * len(values), "o", color=f"C{i}")
    names = [arm.replace(", ", ",\n").replace(" (", "\n(") for arm in claim["training"]["fid"]]
    lower.set_yticks(range(len(names)), names, fontsize=7)
    lower.set(xlabel="FID, a dot a seed", title=f"(b) {claim['arm_steps']} training steps", ylim=(-0.5, 2.5))
    table = claim["loss"]["table"]
    sigma = [row["sigma"] for row in table]
    for key, label, style in (("start", "at the start", "C0-"), ("plain", "at the start, on [-1, 1]", "C3--"),
                              ("trained", "trained, test images", "C2o-")):
        last.semilogx(sigma, [row[key] for row in table], style, ms=3, label=label)
    density = [math.exp(-0.5 * ((math.log(s) - claim["p_mean"]) / claim["p_std"]) ** 2) for s in sigma]
    last.fill_between(sigma, density, color="grey", alpha=0.2, label="how often it is trained")
    last.set(xlabel="sigma", ylabel="loss", ylim=(0, 4), title="(c) loss by noise level")
    last.legend(fontsize=7)
    for ax in (upper, right, lower, last):
        ax.grid(alpha=0.3)
    return save_figure(fig, path)


def plot_paths(_, path, top=3.0, steps=400):
    """The exact paths to two points, -0.5 and 0.5, in 1-D: the state s (y + sigma eps) against the schedule's time."""
    def denoise(x, sigma):
        return 0.5 * torch.tanh(0.5 * x / sigma ** 2)   # E[y | x] of two points

    fig, axes = figure(1, 3, width=3.6)
    noise = torch.linspace(-2.2, 2.2, 12, dtype=torch.float64)
    sigmas = torch.cat([torch.linspace(top, 0.01, steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    for ax, (key, title) in zip(axes, (("vp", "VP: sigma from DDPM, s < 1"), ("ve", "VE: sigma = sqrt(t)"),
                                       ("edm", "EDM: sigma = t"))):
        plan, t = SCHEDULES[key], SCHEDULES[key].time(sigmas)
        y = torch.stack([noise * top, *(x for _, x, _ in ode_sampler(denoise, noise, sigmas, key))])    # (N + 1, 12)
        ax.plot(t, y * plan.scale(t)[:, None], color="C0", lw=0.9)
        ax.set(xlabel="t", ylabel="x" if key == "vp" else "", title=title)
        ax.grid(alpha=0.3)
    return save_figure(fig, path)


if __name__ == "__main__":
    cli(main)
