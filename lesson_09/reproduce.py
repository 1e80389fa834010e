"""Measure the claims of the improved DDPM paper again: likelihood, few steps, gradient noise, skipped steps.

    python reproduce.py publish=true      all of it, three seeds; writes results/claim.json, claim.png and more pictures
    python reproduce.py quick=true        a look at it, no verdict
    python reproduce.py n=1024 seeds=5    other values; without publish=true to runs/claim

The criteria were written down before the numbers were seen. "Above" and "below" mean: in every seed, and by more than
3 pooled standard deviations over the seeds.

(a) Likelihood against samples (Table 2). Arms start from lesson 05's published network (L_simple, linear schedule) and
    train on alike, with L_simple, L_hybrid, L_vlb, and L_vlb with importance sampling. bits/dim of L_vlb with
    importance sampling is below that of L_hybrid, and that below that of L_simple with the better of its two fixed
    variances; and the FID is reversed: that of L_vlb with importance sampling is above that of L_hybrid.
(b) Few steps (Sec. 4). The published network, one noise for all variances. With the learned variance the mean FID at 25
    and at 50 steps is at most 1.5 times that at 1,000 steps (one draw). With the fixed variance beta it is at least
    twice its own 1,000-step value at 25 steps, and above that of the learned variance at 25 and at 50.
(c) Gradient noise (Sec. 3.3). For the published network the trace of the covariance of L_vlb's gradient is lower with
    importance sampling than with uniform times: in every seed, and the gap of the logarithms is more than 3 pooled
    deviations of theirs. (Both have the same mean gradient, so the gradient noise scales have the same ratio.)
(d) Skipped steps (Sec. 3.2). Without the first fifth of 50 steps the FID of the cosine network rises (above, as
    defined); that of the linear network, lesson 05's, rises by less than a quarter of itself, and by less than the
    cosine network's in every seed. Both with the fixed variance beta-tilde.
"""

import math
import statistics
import time

import torch

import train
from model import IDDPM, ImportanceSampler, UNet
from sample import bits, draw
from utils import (
    Run,
    Weights,
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
    save_strip,
    seeded,
    trained,
    verdict,
)

ARMS = {"L_simple": ["simple", "small"], "L_hybrid": ["hybrid", "learned"], "L_vlb": ["vlb", "learned"],
        "L_vlb, importance": ["vlb", "learned"]}
VARIANCES = ("learned", "large", "small")


def main(argv=None):
    run = Run(__file__, argv)
    cfg = run.config.reproduce
    start = time.perf_counter()
    run.open_folder("claim")
    seeds = range(cfg.seeds)
    jobs = sampling_jobs(cfg)
    fids = {}
    for job, value in zip(jobs, parallel(sample_fid, [(run.argv, *job) for job in jobs], cfg.workers)):
        fids[job] = value
        run.say("{} network, {} variance, {} steps, skip {}, seed {}: FID {:.3f}".format(*job, value))
    noise = list(parallel(gradient_noise, [(run.argv, seed) for seed in seeds], cfg.workers))
    arms = [(arm, seed) for seed in seeds for arm in ARMS]
    rows = {}
    for job, row in zip(arms, parallel(train_arm, [(run.argv, *job) for job in arms], cfg.workers)):
        rows[job] = row
        run.say("{:18} seed {}: FID {:7.3f}   ".format(*job, row["fid"])
                + "   ".join(f"{name} {value:.3f} bits/dim" for name, value in row["bits"].items()))
    claim = {
        "likelihood": likelihood(rows, cfg), "few_steps": few_steps(fids, cfg), "gradient_noise": noise_scale(noise),
        "skipping": skipping(fids, cfg), "n": cfg.n, "floor": floor(cfg.n), "seeds": cfg.seeds,
        "train_steps": cfg.train_steps, "bound_images": cfg.bound_images, "sample_steps": cfg.sample_steps,
        "by_time": by_time(run), "minutes": round((time.perf_counter() - start) / 60, 1),
    }
    for name in CLAIMS:
        claim[name]["verdict"] = verdict(claim[name]["holds"], cfg)
    run.say(text(claim))
    run.output(save_json, claim, "claim.json")
    run.output(plot, claim, "claim.png")
    run.output(plot_by_time, claim["by_time"], "by_time.png")
    run.output(plot_schedules, run.config.ddpm.timesteps, "schedules.png")
    run.output(save_strip, noised(run), "noising.png")
    run.output(save_strip, few(run), "few_steps.png")
    run.record("claim", minutes=claim["minutes"], n=cfg.n, **{name: claim[name]["verdict"] for name in CLAIMS})
    return claim


CLAIMS = ("likelihood", "few_steps", "gradient_noise", "skipping")


def below(a, b):
    """Whether a is below b in every seed and by more than 3 pooled standard deviations."""
    return all(x < y for x, y in zip(a, b)) and statistics.mean(b) - statistics.mean(a) > 3 * pooled(a, b)


def load(run, path, lesson, **changes):
    """Process and network of a weights file, this lesson's or lesson 05's."""
    weights = Weights(path, lesson)
    if lesson != run.name:                             # one channel at the end, no v: a fixed variance
        net, config = UNet(**{**weights.config["unet"], "c_out": 1}), {
            "timesteps": weights.config["ddpm"].timesteps, "schedule": "linear"}
    else:
        net, config = UNet(**weights.config["unet"]), weights.config["ddpm"]
    return run.place(IDDPM(**{**config, **changes}), weights.load(net))


def network(run, which, **changes):
    """The published network ("cosine") or lesson 05's ("linear"); in smoke mode one that has learned nothing."""
    cfg = run.config.reproduce
    if cfg.smoke:
        ddpm = IDDPM(**{**run.config.ddpm, "schedule": which, **changes})
        return run.place(ddpm, UNet(**run.config.unet))
    if which == "cosine":
        return load(run, run.published, run.name, **changes)
    return load(run, run.lesson / cfg.start, "lesson_05", **changes)


# ------------------------------------------------------------------ (a) likelihood against samples
def train_arm(argv, arm, seed):
    """Train one arm (or take it from an earlier call); its bits/dim on test images and its FID."""
    run = Run(__file__, argv)
    cfg, folder = run.config.reproduce, run.open_folder("claim")
    objective, variance = ARMS[arm]
    own = [a for a in argv if a.split("=")[0].split(".")[0] in ("unet", "ddpm", "train", "gpu", "device", "smoke")]
    path = trained(train.main, folder / f"{arm.replace(', ', '_')}_{seed}", [
        *own, f"ddpm.objective={objective}", f"ddpm.variance={variance}", "ddpm.schedule=linear", f"lr={cfg.lr}",
        f"start={cfg.start}", f"importance={str('importance' in arm).lower()}", f"seed={seed}",
        f"steps={cfg.train_steps}", "preview_every=0", "threads=1"], run.lesson)
    x0 = digits("test").first(cfg.bound_images)[0].to(run.device)
    result = {"bits": {}, "errors": {}}
    for which in (("small", "large") if variance == "small" else ("learned",)):
        ddpm, net = load(run, path, run.name, variance=which)
        values, *_ = bits(ddpm, net, x0, seeded(0))    # the same times and noise for all arms
        result["bits"][which] = float(values.mean())
        result["errors"][which] = float(values.std() / len(values) ** 0.5)
    ddpm, net = load(run, path, run.name)
    return result | {"fid": fid_to_test(draw(ddpm, net, cfg.n, cfg.sample_steps, seeded(seed), batch=cfg.batch))}


def likelihood(rows, cfg):
    """(a): bits/dim and FID of every arm and seed, and whether the orders hold."""
    table = {}
    for arm in ARMS:
        of_arm = [rows[arm, seed] for seed in range(cfg.seeds)]
        table[arm] = {"bits": [min(row["bits"].values()) for row in of_arm], "fid": [row["fid"] for row in of_arm],
                      "standard_error": statistics.mean(min(row["errors"].values()) for row in of_arm),
                      "bits_of": {v: [row["bits"][v] for row in of_arm] for v in of_arm[0]["bits"]}}
    simple, hybrid, best = (table[arm] for arm in ("L_simple", "L_hybrid", "L_vlb, importance"))
    order = {"bits: importance < hybrid": below(best["bits"], hybrid["bits"]),
             "bits: hybrid < simple": below(hybrid["bits"], simple["bits"]),
             "FID: hybrid < importance": below(hybrid["fid"], best["fid"])}
    return {"arms": table, "order": order, "holds": all(order.values())}


# ------------------------------------------------------------------ (b) few steps, (d) skipped steps
def sampling_jobs(cfg):
    """(network, variance, steps, skip, seed) of everything that is drawn, once, the longest first."""
    jobs = [("cosine", v, max(cfg.long), 0.0, 0) for v in ("learned", "large")]
    jobs += [("cosine", v, steps, 0.0, 0) for steps in cfg.long[:-1] for v in VARIANCES]
    for seed in range(cfg.seeds):
        jobs += [("cosine", v, steps, 0.0, seed) for steps in cfg.counts for v in VARIANCES]
        jobs += [(net, "small", cfg.sample_steps, skip, seed) for net in ("cosine", "linear")
                 for skip in (0.0, cfg.skip)]
    return sorted(dict.fromkeys(jobs), key=lambda job: -job[2])


def sample_fid(argv, which, variance, steps, skip, seed):
    """FID of n samples; the noise is that of the seed, whatever the rest."""
    run = Run(__file__, argv)
    cfg, _ = run.config.reproduce, run.open_folder("claim")
    ddpm, net = network(run, which, variance=variance)
    return fid_to_test(draw(ddpm, net, cfg.n, steps, seeded(100 + seed), batch=cfg.batch, skip=skip))


def few_steps(fids, cfg):
    """(b): the FID by number of steps and variance, and whether the criterion holds."""
    table = {v: {str(steps): [fids["cosine", v, steps, 0.0, seed] for seed in range(cfg.seeds)
                              if ("cosine", v, steps, 0.0, seed) in fids]
                 for steps in sorted({*cfg.counts, *cfg.long}) if ("cosine", v, steps, 0.0, 0) in fids}
             for v in VARIANCES}
    learned, large = table["learned"], table["large"]
    end, some = str(max(cfg.long)), [str(steps) for steps in cfg.counts[-2:]]
    ratio = {v: {steps: statistics.mean(values) / table[v][end][0] for steps, values in table[v].items()}
             for v in ("learned", "large")}
    order = {"learned stays within 1.5 of its end": all(ratio["learned"][steps] <= 1.5 for steps in some),
             "beta at twice its end": ratio["large"][some[0]] >= 2,
             "beta above learned": all(below(learned[steps], large[steps]) for steps in some)}
    return {"fid": table, "ratio_to_the_end": ratio, "order": order, "holds": all(order.values())}


def skipping(fids, cfg):
    """(d): the FID with all steps and without the first ones, for both schedules."""
    table = {net: {what: [fids[net, "small", cfg.sample_steps, skip, seed] for seed in range(cfg.seeds)]
                   for what, skip in (("all", 0.0), ("skipped", cfg.skip))} for net in ("linear", "cosine")}
    rise = {net: [b - a for a, b in zip(row["all"], row["skipped"])] for net, row in table.items()}
    order = {"cosine rises": below(table["cosine"]["all"], table["cosine"]["skipped"]),
             "linear hardly rises": statistics.mean(rise["linear"]) < 0.25 * statistics.mean(table["linear"]["all"]),
             "linear rises less": all(a < b for a, b in zip(rise["linear"], rise["cosine"]))}
    return {"fid": table, "rise": rise, "order": order, "holds": all(order.values())}


# ------------------------------------------------------------------ (c) gradient noise
def gradient_noise(argv, seed):
    """Trace of the covariance of one image's gradient of L_vlb (bits/dim), and |mean|^2; uniform and by importance."""
    run = Run(__file__, argv)
    cfg, _ = run.config.reproduce, run.open_folder("claim")
    ddpm, net = network(run, "cosine", objective="vlb", lam=1.0, variance="learned")
    torch.manual_seed(1000 + seed)
    sampler = ImportanceSampler(ddpm.timesteps)
    train.fill(ddpm, net, sampler, run.device)
    parameters = [p for p in net.parameters() if p.requires_grad]
    result = {}
    for name, times in (("uniform", None), ("importance", sampler)):
        total, square = 0.0, 0.0
        data = digits("train", cfg.batch_size, seed)
        for k in range(cfg.batches):
            loss = ddpm.loss(net, data.batch(k)[0].to(run.device), times)
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
            total, square = total + gradient, square + float(gradient.double().square().sum())
        mean2 = float((total / cfg.batches).double().square().sum())
        trace = (square / cfg.batches - mean2) * cfg.batches / (cfg.batches - 1) * cfg.batch_size
        result[name] = {"trace": trace, "mean2": mean2 - trace / cfg.batches / cfg.batch_size}
    return result


def noise_scale(noise):
    """(c): the traces of every seed, and whether importance sampling lowers them."""
    table = {name: {key: [row[name][key] for row in noise] for key in ("trace", "mean2")} for name in noise[0]}
    logs = {name: [math.log(value) for value in row["trace"]] for name, row in table.items()}
    ratio = math.exp(statistics.mean(logs["uniform"]) - statistics.mean(logs["importance"]))
    return {"of": table, "ratio": ratio, "holds": below(logs["importance"], logs["uniform"])}


# ------------------------------------------------------------------ pictures of the published network
def by_time(run):
    """The mean of v, its spread over pixels and images, and the bound's terms for each variance; by t."""
    cfg = run.config.reproduce
    x0 = digits("test").first(cfg.bound_images)[0].to(run.device)
    result = {"terms": {}, "v": {"t": [], "mean": [], "low": [], "high": []}}
    for variance in VARIANCES:
        ddpm, net = network(run, "cosine", variance=variance)
        _, times, terms = bits(ddpm, net, x0, run.generator(1))
        result["terms"][variance] = {"t": times.float().mean(0).tolist(), "term": terms.mean(0).tolist()}
    with torch.no_grad():
        for t in torch.linspace(0, ddpm.timesteps - 1, 40).round().long().unique().tolist():
            at = torch.full((len(x0),), t, device=x0.device)
            eps = torch.randn(x0.shape, generator=run.generator(2)).to(x0.device)
            v = ddpm.predict(net, ddpm.q_sample(x0, at, eps), at)[1].flatten()
            low, high = torch.quantile(v, torch.tensor([0.1, 0.9], device=v.device)).tolist()
            for key, value in zip(result["v"], (t, float(v.mean()), low, high)):
                result["v"][key].append(value)
    return result


def noised(run, columns=13):
    """Two rows of one digit: noised with the linear and with the cosine schedule, at evenly spaced times."""
    x0 = digits("test").first(1)[0].expand(columns, -1, -1, -1)
    eps = torch.randn(x0.shape, generator=run.generator(3))
    processes = [IDDPM(run.config.ddpm.timesteps, schedule) for schedule in ("linear", "cosine")]
    times = torch.linspace(0, run.config.ddpm.timesteps - 1, columns).round().long()
    return [process.q_sample(x0, times, eps) for process in processes]


def few(run, columns=12):
    """Rows of samples in few steps from the same noise: the learned variance, beta, beta-tilde; fewest steps first."""
    rows = []
    for steps in run.config.reproduce.counts[:2]:
        for variance in VARIANCES:
            ddpm, net = network(run, "cosine", variance=variance)
            rows.append(ddpm.sample(net, columns, steps, generator=run.generator(4)).cpu())
    return rows


# ------------------------------------------------------------------ what is printed and drawn
def text(claim):
    """The tables with their verdicts."""
    def mean(values):
        return f"{statistics.mean(values):8.3f} +- {deviation(values):<6.3f}"

    def orders(name):
        return ["    " + ", ".join(f"{what}: {'yes' if ok else 'no'}" for what, ok in claim[name]["order"].items())]

    lines = ["", f"n = {claim['n']}; floor {claim['floor']:.3f}", f"(a) likelihood: {claim['likelihood']['verdict']}"]
    lines += [f"    {arm:18} {mean(row['bits'])} bits/dim (standard error over images {row['standard_error']:.3f})   "
              f"FID {mean(row['fid'])}" for arm, row in claim["likelihood"]["arms"].items()] + orders("likelihood")
    lines += [f"(b) few steps: {claim['few_steps']['verdict']}"]
    lines += [f"    {v:8} " + "   ".join(f"{steps}: {mean(values)}" for steps, values in row.items())
              for v, row in claim["few_steps"]["fid"].items()] + orders("few_steps")
    noise = claim["gradient_noise"]
    lines += [f"(c) gradient noise: {noise['verdict']}; uniform over importance: {noise['ratio']:.1f}"]
    lines += [f"    {name:10} trace " + "  ".join(f"{v:.4g}" for v in row["trace"]) + "   |mean|^2 "
              + "  ".join(f"{v:.3g}" for v in row["mean2"]) for name, row in noise["of"].items()]
    lines += [f"(d) skipped steps: {claim['skipping']['verdict']}"]
    lines += [f"    {net:8} all {mean(row['all'])}   skipped {mean(row['skipped'])}"
              for net, row in claim["skipping"]["fid"].items()] + orders("skipping")
    return "\n".join(lines)


def plot(claim, path):
    """Four answers: likelihood and FID of the arms, FID by steps, gradient noise, what skipping costs."""
    fig, (a, b, c, d) = figure(1, 4, width=3.6, height=3.4)
    for arm, row in claim["likelihood"]["arms"].items():
        a.plot(row["bits"], row["fid"], "o", label=arm, alpha=0.8)
    a.set(xlabel="bits/dim (bound)", ylabel=f"FID (n = {claim['n']})", title="(a) what each loss buys")
    for v, row in claim["few_steps"]["fid"].items():
        b.errorbar([int(s) for s in row], [statistics.mean(values) for values in row.values()],
                   [deviation(values) for values in row.values()], fmt="o-", ms=4, label=v)
    b.axhline(claim["floor"], color="grey", ls=":", lw=1)
    b.set(xscale="log", yscale="log", xlabel="network calls an image", ylabel="FID (dotted: floor)",
          title="(b) the variance at few steps")
    for i, (name, row) in enumerate(claim["gradient_noise"]["of"].items()):
        c.plot([i] * len(row["trace"]), row["trace"], "o", color=f"C{i}")
    c.set(xticks=[0, 1], xticklabels=list(claim["gradient_noise"]["of"]), xlim=(-0.5, 1.5), yscale="log",
          ylabel="trace of the covariance", title="(c) gradient noise of L_vlb")
    for i, (net, row) in enumerate(claim["skipping"]["fid"].items()):
        for values in zip(row["all"], row["skipped"]):
            d.plot([0, 1], values, "o-", color=f"C{i}", ms=4, label=net)
    d.set(xticks=[0, 1], xticklabels=["all steps", "first fifth skipped"], xlim=(-0.3, 1.3), ylabel="FID",
          title="(d) skipping the noisiest steps")
    for ax in (a, b, c, d):
        ax.grid(alpha=0.3)
    for ax in (a, b, d):
        handles = dict(zip(*ax.get_legend_handles_labels()[::-1]))
        ax.legend(handles.values(), handles.keys(), fontsize=7)
    return save_figure(fig, path)


def plot_by_time(result, path):
    """Two answers: where between beta-tilde and beta the learned variance lies, and where the bound is paid."""
    fig, (left, right) = figure(1, 2, width=4.4)
    v = result["v"]
    left.plot(v["t"], v["mean"], "o-", ms=3, label="mean")
    left.fill_between(v["t"], v["low"], v["high"], alpha=0.2, label="10 to 90 % of the pixels")
    left.set(xlabel="t", ylabel="v (0: beta-tilde, 1: beta)", title="the learned variance")
    left.legend(fontsize=8)
    for variance, row in result["terms"].items():
        right.plot([t + 1 for t in row["t"]], row["term"], label=variance, lw=1)
    right.set(xscale="log", yscale="log", xlabel="t + 1", ylabel="L_t, bits/dim", title="where the bound is paid")
    right.legend(fontsize=8)
    for ax in (left, right):
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
