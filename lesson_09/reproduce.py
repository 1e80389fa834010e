"""Measure the claims of the improved DDPM paper again: likelihood, few steps, gradient noise, skipped steps.

    python reproduce.py publish=true      all of it, three seeds; writes results/claim.json, claim.png and more pictures
    python reproduce.py quick=true        a look at it, no verdict
    python reproduce.py n=1024 seeds=5    other values; without publish=true to runs/claim

(a) trains four arms on from lesson 05's network (L_simple, linear schedule): with L_simple, L_hybrid, L_vlb, and L_vlb
with importance sampling. (b) and (c) use the published network, (d) also lesson 05's. The noise of a seed is the same
for all that is compared. The criteria, in `judge`, were written down before the numbers were seen.
"""

import math
import statistics

import torch

import train
from model import IDDPM, ImportanceSampler, UNet
from sample import bits, draw
from utils import (
    Claim,
    Rows,
    Weights,
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
    save_grid,
    seeded,
    ticks,
)

ARMS = {"L_simple": ["ddpm.objective=simple", "ddpm.variance=small"],
        "L_hybrid": ["ddpm.objective=hybrid", "ddpm.variance=learned"],
        "L_vlb": ["ddpm.objective=vlb", "ddpm.variance=learned"],
        "L_vlb, importance": ["ddpm.objective=vlb", "ddpm.variance=learned", "importance=true"]}
BEST, NAMES = "L_vlb, importance", {"learned": "learned", "large": "beta", "small": "beta-tilde"}
VARIANCES = tuple(NAMES)
MEANS = "the means over the seeds; of the longest sampling one draw"


def main(argv=None):
    claim = Claim(__file__, argv, sections=("unet", "ddpm"))
    run, cfg, end = claim.run, claim.cfg, max(claim.cfg.long)
    arms = claim.arms(ARMS, train=train.main, measure=measure, keys=[
        "ddpm.schedule=linear", f"start={cfg.start}", f"lr={cfg.lr}", f"steps={cfg.train_steps}", "threads=1"])
    few = Rows([*claim.each(few_steps, steps=cfg.counts, variance=VARIANCES, seed=claim.seeds),
                *claim.each(few_steps, steps=[n for n in cfg.long if n < end], variance=VARIANCES, seed=0),
                *claim.each(few_steps, steps=end, variance=["learned", "large"], seed=0)])
    noise = claim.each(gradient_noise, seed=claim.seeds).unfold("trace", "times")
    skip = claim.each(skipping, schedule=["linear", "cosine"], skip=[0.0, cfg.skip], seed=claim.seeds)
    judge(claim, arms, few, noise, skip)
    claim.note("floor", floor(cfg.n))
    claim.note("by_time", by_time(run))
    run.output(plot_by_time, claim, "by_time.png")
    run.output(plot_schedules, run.config.ddpm.timesteps, "schedules.png")
    times = torch.linspace(0, run.config.ddpm.timesteps - 1, 13).round().long()
    run.output(save_grid, noised(run, times), "noising.png", columns=13, across=times.tolist(),
               down=["linear", "cosine"])
    few = [f"{steps} calls, {name}" for steps in cfg.counts[:2] for name in NAMES.values()]
    run.output(save_grid, same_noise(run), "few_steps.png", columns=12, down=few)
    return claim.finish(plot=plot, n=cfg.n)


def judge(claim, arms, few, noise, skip):
    """What is claimed. arms, few, noise, skip: what was measured for (a), (b), (c) and (d)."""
    end, some, left_out = max(claim.cfg.long), claim.cfg.counts[-2:], claim.cfg.skip
    claim.judge("a1", "The more a loss sees of the bound, the fewer bits/dim: L_vlb with importance sampling, then "
                      "L_hybrid, then L_simple with the better of its fixed variances",
                paper="this order (Table 2)",
                holds=arms.below(BEST, "L_hybrid", "bits") and arms.below("L_hybrid", "L_simple", "bits"))
    claim.judge("a2", "The FID is reversed: L_hybrid draws better than L_vlb with importance sampling",
                paper="the loss with the best bits/dim has the worse FID (Table 2)",
                holds=arms.below("L_hybrid", BEST, "fid"))
    claim.judge("b1", "With the learned variance the FID at few steps is at most 1.5 times that at all steps",
                paper="nearly as good with few steps (Sec. 4)", rule=MEANS, steps=[*some, end],
                holds=all(ratio(few, "learned", n, end) <= 1.5 for n in some))
    claim.judge("b2", "With the fixed variance beta the FID at few steps is at least twice that at all steps",
                paper="much worse with few steps (Sec. 4)", rule=MEANS, steps=[some[0], end],
                holds=ratio(few, "large", some[0], end) >= 2)
    claim.judge("b3", "At few steps the learned variance has a lower FID than beta",
                paper="the learned variance is better with few steps (Sec. 4)", steps=some,
                holds=all(few.below("learned", "large", "fid", by="variance", steps=n) for n in some))
    uniform, importance = ([math.log(one) for one in noise.values("trace", times=t)] for t in ("uniform", "importance"))
    claim.judge("c", "Importance sampling lowers the noise of L_vlb's gradient (the logarithm of its trace)",
                paper="the gradient of L_vlb is much noisier with uniform times (Sec. 3.3)",
                holds=below(importance, uniform),
                ratio=math.exp(statistics.mean(uniform) - statistics.mean(importance)))
    rise = {schedule: rises(skip, schedule, left_out) for schedule in ("linear", "cosine")}
    claim.judge("d1", "Without the noisiest fifth of the steps the FID of the cosine network rises",
                paper="the cosine schedule has few steps to spare (Sec. 3.2)",
                holds=skip.below(0.0, left_out, "fid", by="skip", schedule="cosine"))
    claim.judge("d2", "Without that fifth the FID of the linear network rises by less than a quarter of itself",
                rule=MEANS, paper="up to a fifth of the steps can be left out (Sec. 3.2)",
                holds=statistics.mean(rise["linear"]) < 0.25 * skip.mean("fid", schedule="linear", skip=0.0))
    claim.judge("d3", "Without that fifth the FID of the linear network rises by less than that of the cosine network",
                paper="the linear schedule wastes more steps (Sec. 3.2)",
                holds=below(rise["linear"], rise["cosine"]), rise=rise)


def ratio(few, variance, steps, end):
    """(b): the mean FID at so many network calls, over that at the most."""
    return few.mean("fid", variance=variance, steps=steps) / few.mean("fid", variance=variance, steps=end)


def rises(rows, schedule, skip):
    """(d): by how much the FID rises when the first steps are skipped, one number a seed."""
    before, after = (rows.values("fid", schedule=schedule, skip=one) for one in (0.0, skip))
    return [b - a for a, b in zip(before, after)]


# ------------------------------------------------------------------ what is measured
def load(run, weights, **changes):
    """Process and network of a weights file of this lesson."""
    ddpm = IDDPM(**{**weights.config["ddpm"], **changes})
    return run.place(ddpm, weights.load(UNet(**weights.config["unet"])))


def network(run, schedule="cosine", **changes):
    """The published network, or lesson 05's for the linear schedule, which gives no v: its variance is fixed."""
    start = run.config.reproduce.start
    if schedule == "cosine" or not start:              # in smoke mode an arm stands for both
        return load(run, published(run, "L_hybrid"), schedule=schedule, **changes)
    weights = Weights(run.lesson / start, "lesson_05")
    ddpm = IDDPM(weights.config["ddpm"].timesteps, schedule, **changes)
    return run.place(ddpm, weights.load(UNet(**weights.config["unet"])))


def measure(run, weights, arm, seed):
    """(a): bits/dim of an arm on test images, with the better variance if it learned none; FID of its samples."""
    cfg, of = run.config.reproduce, {}
    x0 = digits("test").first(cfg.bound_images)[0].to(run.device)
    for variance in (("small", "large") if arm == "L_simple" else ("learned",)):
        of[variance], *_ = bits(*load(run, weights, variance=variance), x0, seeded(0))     # the same for all arms
    best = min(of.values(), key=torch.mean)
    x = draw(*load(run, weights), cfg.n, cfg.sample_steps, seeded(seed), batch=cfg.batch)
    return {"bits": float(best.mean()), "bits_error": float(best.std() / len(best) ** 0.5), "fid": fid_to_test(x),
            "bits_of": {variance: float(values.mean()) for variance, values in of.items()}}


def few_steps(run, variance, steps, seed, schedule="cosine", skip=0.0):
    """(b): FID of samples in so many steps; the noise is the seed's."""
    cfg = run.config.reproduce
    x = draw(*network(run, schedule, variance=variance), cfg.n, steps, seeded(100 + seed), batch=cfg.batch, skip=skip)
    return {"fid": fid_to_test(x)}


def skipping(run, schedule, skip, seed):
    """(d): FID of samples without that share of the first steps, with the fixed variance beta-tilde."""
    return few_steps(run, "small", run.config.reproduce.sample_steps, seed, schedule, skip)


def gradient_noise(run, seed):
    """(c): trace of the covariance of one image's gradient of L_vlb (bits/dim), and |mean|^2; by how times are drawn.

    Both ways have the same mean gradient, so the gradient noise scales of Sec. 3.3 have the same ratio as the traces.
    """
    cfg, (ddpm, net) = run.config.reproduce, network(run, objective="vlb", lam=1.0, variance="learned")
    torch.manual_seed(1000 + seed)
    sampler = ImportanceSampler(ddpm.timesteps)
    train.fill(ddpm, net, sampler, digits("train"), run.device)
    parameters, result = [p for p in net.parameters() if p.requires_grad], {"trace": {}, "mean2": {}}
    for name, times in (("uniform", None), ("importance", sampler)):
        total, square, data = 0.0, 0.0, digits("train", cfg.batch_size, seed)
        for k in range(cfg.batches):
            loss = ddpm.loss(net, data.batch(k)[0].to(run.device), times)
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).cpu()
            total, square = total + gradient, square + float(gradient.double().square().sum())
        mean2 = float((total / cfg.batches).double().square().sum())
        trace = (square / cfg.batches - mean2) * cfg.batches / (cfg.batches - 1) * cfg.batch_size
        result["trace"][name], result["mean2"][name] = trace, mean2 - trace / cfg.batches / cfg.batch_size
    return result


@torch.no_grad()
def by_time(run):
    """The mean of v, its spread over pixels and images, and the bound's terms for each variance; by t."""
    x0, result = digits("test").first(run.config.reproduce.bound_images)[0].to(run.device), {"terms": {}, "v": []}
    for variance in VARIANCES:
        ddpm, net = network(run, variance=variance)
        _, times, terms = bits(ddpm, net, x0, run.generator(1))
        result["terms"][variance] = {"t": times.float().mean(0).tolist(), "term": terms.mean(0).tolist()}
    for t in torch.linspace(0, ddpm.timesteps - 1, 40).round().long().unique().tolist():
        at, eps = torch.full((len(x0),), t, device=x0.device), torch.randn(x0.shape, generator=run.generator(2))
        v = ddpm.predict(net, ddpm.q_sample(x0, at, eps.to(x0.device)), at)[1].flatten()
        low, high = torch.quantile(v, torch.tensor([0.1, 0.9], device=v.device)).tolist()
        result["v"].append({"t": t, "mean": float(v.mean()), "low": low, "high": high})
    return result


# ------------------------------------------------------------------ pictures
def noised(run, times):
    """Two rows of one digit: noised with the linear and with the cosine schedule, at these times."""
    x0, timesteps = digits("test").first(1)[0].expand(len(times), -1, -1, -1), run.config.ddpm.timesteps
    eps = torch.randn(x0.shape, generator=run.generator(3))
    return torch.cat([IDDPM(timesteps, schedule).q_sample(x0, times, eps) for schedule in ("linear", "cosine")])


def same_noise(run, columns=12):
    """Rows of samples in few steps from the same noise: the learned variance, beta, beta-tilde; fewest steps first."""
    networks = [network(run, variance=variance) for variance in VARIANCES]
    return torch.cat([ddpm.sample(net, columns, steps, generator=run.generator(4)).cpu()
                      for steps in run.config.reproduce.counts[:2] for ddpm, net in networks])


def plot(claim, path):
    """Four answers: likelihood and FID of the arms, FID by steps, gradient noise, what skipping costs."""
    fig, axes = figure(2, 2, width=4.4, height=3.4)
    (a, b), (c, d) = axes
    for arm in ARMS:
        a.plot(claim.rows.values("bits", arm=arm), claim.rows.values("fid", arm=arm), "o", label=arm, alpha=0.8)
    a.set(xlabel="bits/dim (bound)", ylabel=f"FID (n = {claim.cfg.n})", title="(a) what each loss buys")
    a.legend(fontsize=7)
    lines(b, claim.rows, "steps", "fid", by="variance", names=NAMES)
    b.axhline(claim.notes["floor"], color="grey", ls=":", lw=1)
    b.set(xscale="log", yscale="log", xlabel="network calls an image", ylabel="FID (dotted: floor)",
          title="(b) the variance at few steps")
    ticks(b.xaxis, sorted({*claim.cfg.counts, *claim.cfg.long}))
    ticks(b.yaxis, (1, 2, 5, 10, 20, 50))
    dots(c, claim.rows.unfold("trace", "times"), "trace", by="times")
    c.set(yscale="log", ylabel="trace of the covariance, millions", title="(c) gradient noise of L_vlb")
    c.set_yticks([1e4, 1e5, 1e6], ["0.01", "0.1", "1"])
    c.set_yticks([], minor=True)
    lines(d, claim.rows, "skip", "fid", by="schedule")
    d.set(xticks=[0, claim.cfg.skip], xticklabels=["all steps", "first fifth skipped"], ylabel="FID",
          title="(d) skipping the noisiest steps", xlim=(-0.25 * claim.cfg.skip, 1.25 * claim.cfg.skip))
    return save_figure(fig, path)


def plot_by_time(claim, path):
    """Two answers: where between beta-tilde and beta the learned variance lies, and where the bound is paid."""
    fig, (left, right) = figure(1, 2, width=4.4)
    t, mean, low, high = ([row[key] for row in claim.notes["by_time"]["v"]] for key in ("t", "mean", "low", "high"))
    left.plot(t, mean, "o-", ms=3, label="mean")
    left.fill_between(t, low, high, alpha=0.2, label="10 to 90 % of the pixels")
    left.set(xlabel="t", ylabel="v (0: beta-tilde, 1: beta)", title="the learned variance")
    for variance, row in claim.notes["by_time"]["terms"].items():
        right.plot([t + 1 for t in row["t"]], row["term"], label=NAMES[variance], lw=1)
    right.set(xscale="log", yscale="log", xlabel="t + 1", ylabel="L_t, bits/dim", title="where the bound is paid")
    ticks(right.xaxis, (1, 10, 100, 1000))
    ticks(right.yaxis, (0.0001, 0.001, 0.01, 0.1, 1))
    for ax in (left, right):
        ax.legend(fontsize=8)
        ax.grid(alpha=0.3)
    return save_figure(fig, path)


def plot_schedules(timesteps, path):
    """How much of the image's variance is left at every time."""
    fig, ax = figure()
    for schedule in ("linear", "cosine"):
        ax.plot(torch.arange(timesteps) / timesteps, IDDPM(timesteps, schedule).abar[:-1], label=schedule)
    ax.set(xlabel="t / T", ylabel="abar: share of the image's variance")
    ax.legend()
    ax.grid(alpha=0.3)
    return save_figure(fig, path)


if __name__ == "__main__":
    cli(main)
