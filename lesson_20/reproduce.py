"""Measure the claims of the EDM paper again: its sampler (Sec. 3), its training (Sec. 5), the loss by noise level.

    python reproduce.py publish=true      all of it, three seeds; writes results/claim.json and results/claim.png
    python reproduce.py quick=true        a look at it, no verdict
    python reproduce.py n=1024 seeds=5    other values; without publish=true to runs/claim

The samplers share one network, the published one, and all start from the same noise. "Euler, VP levels" is DDIM on
evenly spaced times. The three trainings share start, steps, learning rate and batches; they are sampled alike. The
criteria, in `main`, were written down before the numbers were seen.
"""

import math

import torch

import train
from model import EDM, SCHEDULES, UNet, ode_sampler, vp_sigma, vp_time
from sample import draw
from utils import (
    Arm,
    Claim,
    above,
    below,
    cli,
    digits,
    dots,
    fid_to_test,
    figure,
    floor,
    lines,
    published,
    save_figure,
    seeded,
    ticks,
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


# ------------------------------------------------------------------ the arms of (b): columns of Table 1
class VPLoss(EDM):
    """EDM's preconditioning with the training of the VP column: t uniform in (1e-5, 1), weight 1 / sigma^2."""

    def draw_sigma(self, n, device=None):
        """The noise levels of a training batch at uniform times. (n,)."""
        return vp_sigma(1e-5 + (1 - 1e-5) * torch.rand(n, device=device))

    def weight(self, sigma):
        """lambda(sigma) of the VP column. Like sigma."""
        return sigma ** -2


class NoisePrediction(VPLoss):
    """The VP column whole: the network predicts the noise, is told 999 t, and c_in assumes data of std 1."""

    def coefficients(self, sigma):
        """c_skip, c_out, c_in, c_noise of the VP column. Each like sigma."""
        return torch.ones_like(sigma), -sigma, (sigma ** 2 + 1).rsqrt(), 999 * vp_time(sigma)


OLD, OURS = "VP preconditioning, VP loss (noise prediction)", "EDM preconditioning, EDM loss"
PAPER = ["edm.p_mean=-1.2"]                             # the paper's; the published network has 0.1
ARMS = {OLD: Arm(PAPER, EDM=NoisePrediction), "EDM preconditioning, VP loss": Arm(PAPER, EDM=VPLoss), OURS: PAPER}


# ------------------------------------------------------------------ what is claimed
def main(argv=None):
    claim = Claim(__file__, argv, sections=("unet", "edm"))
    run, cfg = claim.run, claim.cfg
    arms = claim.arms(ARMS, train=train.main, load=load, measure=arm_fid, keys=[f"steps={cfg.arm_steps}"])
    claim.each(distances, seed=claim.seeds, keys=["precision=fp32"])        # an error of rounding would stand in it
    claim.each(sampler_fid, [{"sampler": HEUN, "calls": cfg.converged}], seed=claim.seeds)
    claim.each(sampler_fid, sampler=SCORED, calls=cfg.calls, seed=claim.seeds)
    table = loss_by_sigma(run)

    at = 35 if 35 in cfg.calls else max(cfg.calls)
    fid, distance = (rows.by("sampler", key, calls=at) for rows, key in (
        (claim.rows, "fid"), (by_sampler(claim.rows), "distance")))
    converged = claim.rows.values("fid", sampler=HEUN, calls=cfg.converged)
    claim.judge("a1", "With few calls Heun on the EDM levels has converged: its FID is within 5 % of that with many",
                paper="35 calls are its choice for CIFAR-10 (Table 2)", rule="in every seed",
                holds=within(fid[HEUN], converged, 0.05), few=at, many=cfg.converged)
    claim.judge("a2", "With as few calls DDIM has not: its FID is more than 5 % above that of Heun with many",
                paper="the original samplers need several times as many calls for the same FID (Fig. 2, CIFAR-10)",
                holds=above(fid[DDIM], converged, 1.05), few=at, many=cfg.converged)
    claim.judge("a3", "With few calls Heun is at least 5 times nearer to the exact image of its noise than DDIM",
                paper="Heun's error shrinks with a higher power of the step (Sec. 3); the factor is ours",
                holds=below(distance[HEUN], distance[DDIM], 1 / 5), few=at)
    claim.judge("b", "EDM's preconditioning and loss give a lower FID than noise prediction with the VP loss",
                paper="2.31 to 2.05 by both, at the same sampler (Table 2, C to E, CIFAR-10, VP)",
                holds=arms.below(OURS, OLD, "fid"))
    claim.judge("c1", "At the start EDM's loss is 1 at every noise level", rule="within 2 %, from 0.002 to 80",
                paper="what c_skip, c_out and c_in are made for (Sec. 5)", holds=starts_at_one(table))
    claim.judge("c2", "On images that are not standardised it is not: above 3 at sigma = 80", rule="one computation",
                holds=table[-1]["plain"] > 3, plain=table[-1]["plain"])
    claim.judge("c3", "After training the loss is lowest where the paper's log-normal trains most, and at least twice "
                "as high at both ends", rule="the lowest at 0.03 to 3.3; the ends are 0.002 and 80",
                paper="reduction is possible at intermediate noise levels only (Fig. 5a)", holds=dips(table))
    claim.note("floor", floor(cfg.n))
    claim.note("loss_by_sigma", table)
    claim.note("log_normal", {"p_mean": run.config.edm.p_mean, "p_std": run.config.edm.p_std})
    run.output(plot_paths, {}, "paths.png")
    return claim.finish(plot=plot, n=cfg.n)


def by_sampler(rows):
    """The distances of every seed's table as rows of their own."""
    return rows.unfold("distance", "sampler").unfold("distance", "calls")


def within(values, targets, share):
    """Whether every value is within this share of its target."""
    return all(abs(value / target - 1) <= share for value, target in zip(values, targets))


def starts_at_one(table):
    """(c1): the loss of a network that outputs 0 is 1 within 2 % at every level."""
    return all(abs(row["start"] - 1) <= 0.02 for row in table)


def dips(table):
    """(c3): the trained loss is lowest within two deviations of the paper's log-normal; twice as high at the ends."""
    lowest = min(table, key=lambda row: row["trained"])
    ends = (table[0]["trained"], table[-1]["trained"])
    return 0.03 <= lowest["sigma"] <= 3.3 and all(end >= 2 * lowest["trained"] for end in ends)


# ------------------------------------------------------------------ what is measured
def load(run, weights, EDM=EDM):
    """Process and network of a weights file."""
    return run.place(EDM(**weights.config["edm"]), weights.load(UNet(**weights.config["unet"])))


def arm_fid(run, edm, net, arm, seed):
    """FID of n images of one arm: Heun on 18 EDM levels, the noise of this seed."""
    cfg = run.config.reproduce
    return {"fid": fid_to_test(draw(edm, net, cfg.n, seeded(seed), cfg.batch, edm.levels(18)).nan_to_num())}


def way(edm, sampler, calls):
    """The noise levels of a sampler that makes so many network calls, and its solver and schedule."""
    solver, levels, schedule = SAMPLERS[sampler]
    steps = calls if solver == "euler" else (calls + 1) // 2
    return edm.levels(steps, levels), {"solver": solver, "schedule": schedule}


def sampler_fid(run, sampler, calls, seed):
    """FID of n images that the published network draws in this way."""
    cfg, (edm, net) = run.config.reproduce, load(run, published(run, OURS))
    sigmas, how = way(edm, sampler, calls)
    return {"fid": fid_to_test(draw(edm, net, cfg.n, seeded(seed), cfg.batch, sigmas, **how))}


def distances(run, seed):
    """RMS distance of each sampler's images, at each number of calls, to those of `long` Heun steps."""
    cfg, (edm, net) = run.config.reproduce, load(run, published(run, OURS))
    reference, table = draw(edm, net, cfg.paired, seeded(seed), cfg.batch, edm.levels(cfg.long)), {}
    for sampler in SAMPLERS:
        for calls in cfg.calls:
            sigmas, how = way(edm, sampler, calls)
            x = draw(edm, net, cfg.paired, seeded(seed), cfg.batch, sigmas, **how)
            table.setdefault(sampler, {})[str(calls)] = float((x - reference).square().mean().sqrt())
    return {"distance": table}


@torch.no_grad()
def loss_by_sigma(run):
    """The loss at levels from 0.002 to 80: of a network that outputs 0, the same on plain images, and the published."""
    cfg, (edm, net) = run.config.reproduce, load(run, published(run, OURS))
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


# ------------------------------------------------------------------ pictures
def plot(claim, path):
    """Four answers: how far from the exact image, how good, which training, and where there is something to learn."""
    fig, ((upper, right), (lower, last)) = figure(2, 2, width=4.2, height=4.2)
    for i, (sampler, row) in enumerate((s, by_sampler(claim.rows).where(sampler=s)) for s in SAMPLERS):
        scored, means = sampler in SCORED, {n: row.mean("distance", calls=n) for n in claim.cfg.calls}
        upper.loglog(list(means), list(means.values()), "o-" if scored else "x:", color=f"C{i}", label=sampler,
                     lw=1.5 if scored else 1)
    upper.set(xlabel="network calls", ylabel=f"RMS to {claim.cfg.long:,} Heun steps", title="(a) distance, same noise",
              ylim=(None, 2))
    upper.legend(fontsize=6.5, ncols=2, loc="upper center", bbox_to_anchor=(0.45, -0.2), frameon=False)
    upper.grid(alpha=0.3)
    lines(right, claim.rows, "calls", "fid", by="sampler")
    right.axhline(claim.notes["floor"], color="grey", ls=":", lw=1, label="floor: real digits")
    right.set(xscale="log", yscale="log", xlabel="network calls", ylabel=f"FID (n = {claim.cfg.n})", title="(a) FID")
    right.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.45, -0.2), frameon=False)
    ticks(upper.xaxis, claim.cfg.calls)
    ticks(upper.yaxis, (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2))
    ticks(right.xaxis, [*claim.cfg.calls, claim.cfg.converged])
    ticks(right.yaxis, (0.5, 1, 2, 3, 4, 6))
    dots(lower, claim.rows, "fid", names={arm: arm.replace(", ", ",\n").replace(" (", "\n(").replace(" prec", "\nprec")
                                          for arm in ARMS})
    lower.tick_params(axis="x", labelsize=8)
    lower.set(ylabel="FID, a dot a seed", title=f"(b) {claim.cfg.arm_steps} training steps")
    table, training = claim.notes["loss_by_sigma"], claim.notes["log_normal"]
    sigma = [row["sigma"] for row in table]
    for key, label, style in (("start", "at the start", "C0-"), ("plain", "at the start, on [-1, 1]", "C3--"),
                              ("trained", "trained, test images", "C2o-")):
        last.semilogx(sigma, [row[key] for row in table], style, ms=3, label=label)
    density = [math.exp(-0.5 * ((math.log(s) - training["p_mean"]) / training["p_std"]) ** 2) for s in sigma]
    last.fill_between(sigma, density, color="grey", alpha=0.2, label="how often it is trained")
    last.set(xlabel="noise level sigma", ylabel="loss", ylim=(0, 4), title="(c) loss by noise level")
    ticks(last.xaxis, (0.002, 0.02, 0.2, 2, 20, 80))
    last.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.45, -0.2), frameon=False)
    last.grid(alpha=0.3)
    return save_figure(fig, path)


def plot_paths(_, path, top=3.0, steps=400):
    """The exact paths to two points, -0.5 and 0.5, in 1-D: the state s (y + sigma eps) against the schedule's time."""
    def denoise(x, sigma):
        return 0.5 * torch.tanh(0.5 * x / sigma ** 2)   # E[y | x] of two points

    fig, axes = figure(1, 3, width=2.8)
    noise = torch.linspace(-2.2, 2.2, 12, dtype=torch.float64)
    sigmas = torch.cat([torch.linspace(top, 0.01, steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    for ax, (key, title) in zip(axes, (("vp", "VP: s below 1"), ("ve", "VE: sigma = sqrt(t)"),
                                       ("edm", "EDM: sigma = t"))):
        plan, t = SCHEDULES[key], SCHEDULES[key].time(sigmas)
        y = torch.stack([noise * top, *(x for _, x, _ in ode_sampler(denoise, noise, sigmas, key))])    # (N + 1, 12)
        ax.plot(t, y * plan.scale(t)[:, None], color="C0", lw=0.9)
        ax.set(xlabel="time t (0: data)", ylabel="state x" if key == "vp" else "", title=title)
        ax.grid(alpha=0.3)
    return save_figure(fig, path)


if __name__ == "__main__":
    cli(main)
