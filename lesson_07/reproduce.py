"""Measure the claims of the Score SDE paper again: exact likelihoods, predictor-corrector, the ODE's economy, identity.

    python reproduce.py publish=true      all of it, three seeds; writes results/claim.json and the pictures
    python reproduce.py quick=true        a look at it, no verdict
    python reproduce.py calls=201         other values; without publish=true to runs/claim
    python reproduce.py only=ode          one of the measurements; a later call without `only` finds it done

The criteria were written down before the numbers were seen. Everything is fp32; the ODE's state is float64.

(a) The likelihood is exact. Correlated Gaussian data in 8 dimensions with mean 0, and the exact score. For VP, sub-VP
    and VE (sigma from 1e-3 to 200, so that neither its smallest noise nor its prior counts), at tolerance 1e-7: with
    the exact trace log p of each of 8 points is within 1e-3 nats of the closed form; and for each of three seeds the
    mean over 2,000 Rademacher probes is within 3 standard errors (+ 1e-4 nats) of it.
(b) The ODE's bits/dim are at most the bound's, for one and the same published VP network. 192 test images in three
    disjoint sets, dequantised once, one probe an image, tolerance 1e-3; the bound is DDPM's (lesson 05) on a thousand
    steps of the VP process with sigma^2 = beta-tilde, once over all times. In every set the mean of the images'
    differences, bound less ODE, is positive and above 3 of its standard errors.
(c) VE at an equal number of network calls: the FID of predictor and corrector together is below that of the predictor
    alone and below that of the corrector alone, in every seed and by more than 3 pooled standard deviations. 101 calls:
    101 times with a reverse-diffusion step, 51 times with one and a correction (r = 0.16), 101 with a correction.
(d) The ODE reaches the FID of a thousand steps of the reverse SDE (VP, reverse diffusion) with far fewer calls: at
    tolerance 1e-4 its mean FID is not above that of the thousand steps by more than 3 pooled standard deviations, and
    no batch takes more than 200 calls.
(e) Encoding and decoding is the identity. At tolerance 1e-5 the RMS error of 24 dequantised test images, in three
    disjoint sets, is below half a grey level (1/256) in each set, and in each it falls with the tolerance: 1e-2, 1e-3,
    1e-4, 1e-5.

Measured without a verdict: (c) at fewer and at more calls and for VP; bits/dim by tolerance.
"""

import hashlib
import json
import math
import statistics
import time

import torch

import train
from model import EPS, VE, bits_per_dim, dequantise, make_sde, wide
from sample import Counted, draw, load, quantise
from utils import (
    Run,
    UserError,
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
from utils.files import atomic

ARMS = {"predictor": dict(predictor="reverse_diffusion", corrections=0),
        "corrector": dict(predictor="none", corrections=1),
        "both": dict(predictor="reverse_diffusion", corrections=1)}
OWN = ("seeds", "probes", "images", "likelihood_tol", "bound_steps", "n", "calls", "other_calls", "long", "long_n",
       "ode_tol", "back_images", "tolerances", "batch", "precision")       # what a measurement depends on
CLAIMS = {"exact": "(a) exact likelihood", "bits": "(b) bits/dim", "arms": "(c) predictor and corrector",
          "ode": "(d) the ODE's calls", "identity": "(e) there and back"}


def main(argv=None):
    run = Run(__file__, argv)
    cfg = run.config.reproduce
    parts = {"exact": exact, "bits": bits, "arms": arms, "ode": ode, "identity": identity, "tolerance": tolerance}
    if cfg.only not in ("", *parts):
        raise UserError(f"only={cfg.only} is none of {', '.join(parts)}")
    run.settings.publish &= not (cfg.quick or cfg.smoke)
    run.open_folder("claim")
    for kind in ("vp", "ve"):
        run.say(f"the {kind} network is {weights(run, kind)}")
    claim = {name: measured(run, name, function) for name, function in parts.items() if cfg.only in ("", name)}
    if cfg.only:
        return claim
    strip = claim["arms"].pop("strip")
    claim |= {"n": cfg.n, "long_n": cfg.long_n, "long": cfg.long, "seeds": cfg.seeds,
              "floor": floor(cfg.n), "long_floor": floor(cfg.long_n),
              "minutes": round(sum(claim[name]["minutes"] for name in parts), 1)}
    for name in CLAIMS:
        claim[name]["verdict"] = verdict(claim[name]["holds"], cfg)
    run.say(text(claim))
    run.output(save_json, claim, "claim.json")
    run.output(plot, claim, "claim.png")
    run.output(plot_flow, None, "flow.png")
    run.output(save_strip, strip, "arms.png")
    run.output(save_strip, interpolation(run), "interpolation.png")
    run.record("claim", minutes=claim["minutes"], n=cfg.n, **{name: claim[name]["verdict"] for name in CLAIMS})
    return claim


def measured(run, name, function):
    """What function(run) measures, with its minutes; or what an earlier call of the same code and values found."""
    path, values = run.folder / f"{name}.pt", {k: v for k, v in vars(run.config.reproduce).items() if k in OWN}
    same = json.dumps([run.code, values, [hashlib.sha256(weights(run, kind).read_bytes()).hexdigest()
                                          for kind in ("vp", "ve")]])
    if path.exists() and (found := torch.load(path, weights_only=True))["same"] == same:
        return found["result"]
    start = time.perf_counter()
    result = function(run)
    result["minutes"] = (time.perf_counter() - start) / 60
    with atomic(path) as temporary:
        torch.save({"same": same, "result": result}, temporary)
    return result


# ------------------------------------------------------------------ the networks
def weights(run, kind):
    """The published weights of this SDE; in smoke mode, or where there are none, those of a training here."""
    path = run.lesson / "results" / ("weights.safetensors" if kind == "vp" else f"weights_{kind}.safetensors")
    if run.config.reproduce.smoke or not path.exists():
        own = [a for a in run.argv if a.split("=")[0].split(".")[0] in ("unet", "train", "gpu", "device", "smoke")]
        share = [] if kind == "vp" else ["sde.log_share=0"]          # no likelihood is asked of it
        path = trained(train.main, run.folder / kind, [*own, f"sde.kind={kind}", *share], run.lesson)
        if run.settings.publish:
            run.publish(path, f"weights_{kind}.safetensors")
    return path


def network(argv, kind):
    """The run of a job, the SDE and its network."""
    run = Run(__file__, argv)
    run.open_folder("claim")
    sde, net = load(run, run.read(weights(run, kind)))
    return run, sde, net.requires_grad_(False)


def exact_network(sde, score):
    """A network that is right: score(x, m, std) is the gradient of log q_t. It undoes what VE does to the input."""
    def net(x, label):
        m, std = (wide(one, x) for one in sde.marginal(label / 999))
        return -std * score(x * (1 + std ** 2).sqrt() if isinstance(sde, VE) else x, m, std)

    return net


# ------------------------------------------------------------------ (a) the exact likelihood
def exact(run):
    """The largest error of log p with the exact trace, and the bias of Hutchinson's estimate, for the three SDEs."""
    cfg, dim, tol, table = run.config.reproduce, 8, 1e-7, {}
    generator = seeded(0)
    root = 0.4 * torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    cov = root @ root.T + 0.3 * torch.eye(dim, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(cov)
    x = torch.randn(dim, dim, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(cov).T      # 8 points
    closed = torch.distributions.MultivariateNormal(torch.zeros(dim, dtype=torch.float64), cov).log_prob(x)
    for kind in ("vp", "subvp", "ve"):
        sde = make_sde(kind, sigma_min=1e-3, sigma_max=200.0)
        net = exact_network(sde, lambda x, m, std: -(x @ vectors / (m ** 2 * values + std ** 2)) @ vectors.T)
        basis = math.sqrt(dim) * torch.eye(dim, dtype=torch.float64).repeat(dim, 1)   # the mean of v^T J v is the trace
        logp, _ = sde.log_likelihood(net, x.repeat_interleave(dim, 0), basis, tol, tol)
        error = float((logp.reshape(dim, dim).mean(1) - closed).abs().max())
        bias = []
        for seed in range(cfg.seeds):
            v = torch.randint(0, 2, (cfg.probes, dim), generator=seeded(seed)).double() * 2 - 1
            draws, _ = sde.log_likelihood(net, x[:1].expand(cfg.probes, dim), v, 1e-6, 1e-6)
            bias.append({"difference": float(draws.mean() - closed[0]),
                         "standard_error": float(draws.std() / math.sqrt(cfg.probes))})
        table[kind] = {"error": error, "hutchinson": bias}
    holds = all(row["error"] < 1e-3 and all(abs(b["difference"]) < 3 * b["standard_error"] + 1e-4
                                            for b in row["hutchinson"]) for row in table.values())
    return {"sdes": table, "holds": holds}


# ------------------------------------------------------------------ (b) bits per dimension: the ODE's, and a bound
def bits(run):
    """Both numbers of every test image of every set."""
    cfg = run.config.reproduce
    rows, table = list(parallel(measure_bits, [(run.argv, seed) for seed in range(cfg.seeds)], cfg.workers)), []
    for row in rows:
        gap = [b - o for b, o in zip(row["bound"], row["ode"])]
        error = [deviation(one) / math.sqrt(len(one)) for one in (row["ode"], row["bound"], gap)]
        table.append({"ode": statistics.mean(row["ode"]), "ode_error": error[0],
                      "bound": statistics.mean(row["bound"]), "bound_error": error[1],
                      "gap": statistics.mean(gap), "gap_error": error[2], "calls": row["calls"], "L_0": row["L_0"]})
    every = [[v for row in rows for v in row[key]] for key in ("ode", "bound")]
    return {"sets": table, "images": len(every[0]), "tolerance": cfg.likelihood_tol, "rows": rows,
            **{key: {"mean": statistics.mean(one), "standard_error": deviation(one) / math.sqrt(len(one))}
               for key, one in zip(("ode", "bound"), every)},
            "holds": all(row["gap"] > 3 * row["gap_error"] for row in table)}


def test_images(run, seed, n):
    """Set number `seed` of n test images."""
    return digits("test").first((seed + 1) * n)[0][seed * n:].to(run.device)


def probe(x, seed):
    """A Rademacher probe like x: E[v v^T] = I."""
    return torch.randint(0, 2, x.shape, generator=seeded(seed)).to(x) * 2 - 1


def measure_bits(argv, seed):
    """Bits/dim of one set of test images."""
    run, sde, net = network(argv, "vp")
    cfg = run.config.reproduce
    x0, net = test_images(run, seed, cfg.images), Counted(net)
    x = dequantise(x0, seeded(seed))
    logp, _ = sde.log_likelihood(net, x, probe(x, 100 + seed), cfg.likelihood_tol, cfg.likelihood_tol)
    calls = net.calls
    total, first = bound(sde, net, (x0 + 1) * 127.5 / 128 + 1 / 256 - 1, cfg.bound_steps, seeded(seed))
    return {"ode": bits_per_dim(logp, x0[0].numel()).tolist(), "calls": calls, "bound": total.tolist(),
            "L_0": float(first.mean())}


# Adapted from lesson_05/model.py: DDPM.bound -- any number of steps of the VP process, sigma^2 = beta-tilde only
@torch.no_grad()
def bound(sde, net, x0, steps=1000, generator=None):
    """DDPM's bound on -log2 P(x_0), every time once, and its part L_0; bits per dimension, (B,) each.

    x0: centres of the grey levels' bins. With sigma^2 = beta-tilde each divergence is half the difference of the two
    signal-to-noise ratios times the squared error of x_0.
    """
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)[1:]
    m, std = sde.marginal(times)
    snr = (m / std) ** 2
    terms = [0.5 * (m[-1] ** 2 * x0.double() ** 2 - m[-1] ** 2 - 2 * std[-1].log())]       # L_T
    for i, time_ in enumerate(times.tolist()):
        t = torch.full((len(x0),), time_, dtype=x0.dtype, device=x0.device)
        xt = sde.q_sample(x0, t, torch.randn(x0.shape, generator=generator).to(x0))
        mean = sde.denoised(xt, sde.score(net, xt, t), t).clamp(-1, 1)
        if i:
            terms.append((snr[i - 1] - snr[i]) / 2 * (x0 - mean).double().square())
        else:                                           # L_0: the width is beta-tilde of the next step, as in lesson 05
            terms.append(-discretized_log_likelihood(x0, mean, std[0] * (1 - snr[1] / snr[0]).sqrt()))
    parts = [term.flatten(1).mean(1) / math.log(2) for term in terms]
    return torch.stack(parts).sum(0), parts[1]


# Adapted from lesson_05/model.py: discretized_log_likelihood -- bins of 2/256 around their centres, one width for all
def discretized_log_likelihood(x0, mean, sigma):
    """The mass of N(mean, sigma^2) in the bin of each of 256 grey levels, the outer ones open. Elementwise, nats."""
    x0, mean = x0.double(), mean.double()
    upper = torch.where(x0 > 1 - 1 / 128, torch.inf, (x0 + 1 / 256 - mean) / sigma)
    lower = torch.where(x0 < 1 / 128 - 1, -torch.inf, (x0 - 1 / 256 - mean) / sigma)
    flip = lower > 0                                    # to the side where both logarithms keep their digits
    upper, lower = torch.where(flip, -lower, upper), torch.where(flip, -upper, lower)
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return log_upper + torch.log1p(-torch.exp(log_lower - log_upper))


# ------------------------------------------------------------------ (c), (d) samplers at equal and at fewer calls
def measure(argv, kind, n, seed, steps, way):
    """FIDs of n samples, the calls, and the first 12 images."""
    run, sde, net = network(argv, kind)
    x, calls = draw(sde, net, n, steps, seeded(seed), run.config.reproduce.batch, **way)
    x = x.cpu()
    return {"fid": fid_to_test(x), "fid_low": fid_to_test(x, low=True), "calls": calls, "x": x[:12].clone()}


def arms(run):
    """(c): the three arms at equal calls, all seeds; other numbers of calls, and VP, one seed."""
    cfg = run.config.reproduce
    jobs = [("ve", name, cfg.calls, seed) for seed in range(cfg.seeds) for name in ARMS]
    jobs += [("ve", name, calls, 0) for calls in cfg.other_calls for name in ARMS]
    jobs += [("vp", name, cfg.calls, 0) for name in ARMS]
    arguments = [(run.argv, kind, cfg.n, seed, (calls + 1) // 2 if name == "both" else calls, ARMS[name])
                 for kind, name, calls, seed in jobs]
    rows = {}
    for job, row in zip(jobs, parallel(measure, arguments, cfg.workers)):
        rows[job] = row
        run.say("{}, {}, seed {}: FID {:.3f}   low {:.3f}   {} calls".format(
            job[0], job[1], job[3], row["fid"], row["fid_low"], row["calls"]))
    table = {name: {key: [rows["ve", name, cfg.calls, seed][key] for seed in range(cfg.seeds)]
                    for key in ("fid", "fid_low", "calls")} for name in ARMS}
    others = {kind: {name: {str(rows[job]["calls"]): {key: rows[job][key] for key in ("fid", "fid_low")}
                            for job in jobs if job[0] == kind and job[1] == name and job[3] == 0} for name in ARMS}
              for kind in ("ve", "vp")}
    return {"table": table, "by_calls": others, "strip": [rows["ve", name, cfg.calls, 0]["x"] for name in ARMS],
            "holds": all(below(table["both"]["fid"], table[name]["fid"]) for name in ("predictor", "corrector"))}


def below(a, b):
    """Whether a is below b in every seed and by more than 3 pooled standard deviations."""
    return all(x < y for x, y in zip(a, b)) and statistics.mean(b) - statistics.mean(a) > 3 * pooled(a, b)


def ode(run):
    """(d): the ODE against a thousand steps."""
    cfg = run.config.reproduce
    ways = {"steps": dict(ARMS["predictor"]), "ode": dict(sampler="ode", rtol=cfg.ode_tol)}
    jobs = [(name, seed) for name in ways for seed in range(cfg.seeds)]
    arguments = [(run.argv, "vp", cfg.long_n, seed, cfg.long, ways[name]) for name, seed in jobs]
    table = {}
    for (name, seed), row in zip(jobs, parallel(measure, arguments, cfg.workers)):
        run.say(f"vp, {name}, seed {seed}: FID {row['fid']:.3f}   low {row['fid_low']:.3f}   {row['calls']} calls")
        for key in ("fid", "fid_low", "calls"):
            table.setdefault(name, {}).setdefault(key, []).append(row[key])
    margin = 3 * pooled(table["steps"]["fid"], table["ode"]["fid"])
    gap = statistics.mean(table["ode"]["fid"]) - statistics.mean(table["steps"]["fid"])
    return {**table, "gap": gap, "margin": margin, "tolerance": cfg.ode_tol,
            "holds": gap <= margin and max(table["ode"]["calls"]) <= 200}


# ------------------------------------------------------------------ (e) there and back; what a tolerance costs
def identity(run):
    """(e): RMS error of encoding and decoding by tolerance, for every set; and the share of equal grey levels."""
    cfg = run.config.reproduce
    rows = list(parallel(measure_identity, [(run.argv, seed) for seed in range(cfg.seeds)], cfg.workers))
    falls = all(a > b for row in rows for a, b in zip(row["rms"], row["rms"][1:]))
    return {"tolerances": cfg.tolerances, "sets": rows, "falls": falls,
            "holds": falls and all(row["rms"][-1] < 1 / 256 for row in rows)}


def measure_identity(argv, seed):
    """One set there and back, at all tolerances."""
    run, sde, net = network(argv, "vp")
    cfg, row = run.config.reproduce, {"rms": [], "calls": [], "same_grey": []}
    x = dequantise(test_images(run, seed, cfg.back_images), seeded(seed))
    for tol in cfg.tolerances:
        counted = Counted(net)
        back = sde.solve(counted, sde.encode(counted, x, tol, tol), 1.0, EPS, tol, tol)
        row["rms"].append(float((back - x).square().mean().sqrt()))
        row["same_grey"].append(float((quantise(back) == quantise(x)).float().mean()))
        row["calls"].append(counted.calls)
    return row


def tolerance(run):
    """Bits/dim of a few images and the distance of samples to those at the smallest tolerance, by tolerance."""
    cfg = run.config.reproduce
    rows = list(parallel(measure_tolerance, [(run.argv, tol) for tol in cfg.tolerances], cfg.workers))
    samples = [row.pop("x") for row in rows]
    return {"rows": [{"tolerance": tol, **row, "rms": float((x - samples[-1]).square().mean().sqrt())}
                     for tol, row, x in zip(cfg.tolerances, rows, samples)]}


def measure_tolerance(argv, tol):
    """Bits/dim with its calls, samples with theirs."""
    run, sde, net = network(argv, "vp")
    cfg, counted = run.config.reproduce, Counted(net)
    x = dequantise(test_images(run, 0, cfg.back_images), seeded(0))
    logp, _ = sde.log_likelihood(counted, x, probe(x, 0), tol, tol)
    calls, counted = counted.calls, Counted(net)
    samples = sde.ode_sample(counted, sde.prior(x.shape, seeded(0)).to(run.device), tol, tol)
    return {"bits": float(bits_per_dim(logp, x[0].numel()).mean()), "calls": calls, "x": samples,
            "sample_calls": counted.calls}


# ------------------------------------------------------------------ pictures
# Copied from lesson_06/model.py: slerp
def slerp(a, b, w):
    """From a (w = 0) to b (w = 1) along the great circle between them, sample by sample. (B, C, H, W).

    A mixture of two noises with weights 1 - w and w is shorter than either; a point on the circle is not.
    """
    flat_a, flat_b = a.flatten(1).double(), b.flatten(1).double()
    cosine = (flat_a * flat_b).sum(1) / (flat_a.norm(dim=1) * flat_b.norm(dim=1))
    angle = cosine.clamp(-1, 1).acos().clamp(1e-4, math.pi - 1e-4)         # parallel: what is left is the mixture
    return image(((1 - w) * angle).sin() / angle.sin()) * a + image((w * angle).sin() / angle.sin()) * b


# Copied from lesson_05/model.py: image
def image(values):
    """(B,) -> (B, 1, 1, 1) float32, to multiply images with."""
    return values.float()[:, None, None, None]


def interpolation(run):
    """Rows of images between two test digits, which stand at the ends: encoded, mixed along the circle, decoded."""
    run, sde, net = network(run.argv, "vp")
    x0, tol = test_images(run, 0, 8), run.config.reproduce.ode_tol
    z = sde.encode(net, dequantise(x0, seeded(0)), tol, tol)
    mixed = torch.stack([slerp(z[:4], z[4:], w) for w in torch.linspace(0, 1, 9).tolist()], 1)           # (4, 9, ...)
    x = quantise(sde.solve(net, mixed.flatten(0, 1), 1.0, EPS, tol, tol)).unflatten(0, (4, 9))
    return [torch.cat([a[None], row, b[None]]) for a, row, b in zip(x0[:4], x, x0[4:])]


def plot_flow(_, path):
    """Data of three points' width in one dimension: do the SDE and the ODE fill the same densities?"""
    means, share, width = torch.tensor([-0.7, 0.1, 0.8]), torch.tensor([0.3, 0.5, 0.2]), 0.08
    fig, axes = figure(2, 3, width=4.4, height=2.6)
    grid, times = torch.linspace(-1, 1, 241), torch.linspace(EPS, 1, 200)
    for column, kind in zip(range(3), ("vp", "subvp", "ve")):
        sde = make_sde(kind, sigma_max=2.0)             # a small sigma_max, or nothing of VE's data could be seen
        view = {"ve": 5.0}.get(kind, 2.6)

        def log_q(x, m, std, view=None):
            variance = m ** 2 * width ** 2 + std ** 2
            return torch.logsumexp(share.log() - (x - m * means) ** 2 / (2 * variance) - 0.5 * variance.log(), -1,
                                   keepdim=True)

        def score(x, m, std, log_q=log_q):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                return torch.autograd.grad(log_q(x, m, std).sum(), x)[0]

        net = exact_network(sde, score)
        m, std = (one[:, None, None] for one in sde.marginal(times))
        density = log_q((view * grid)[None, :, None], m, std)[..., 0].exp()
        density = (density / density.amax(1, keepdim=True)) ** 0.5
        x1 = sde.prior((10, 1), seeded(1))
        walk = [torch.cat([x for _, x, _ in sde.reverse(net, x1, 200, "euler_maruyama", generator=seeded(2))], 1)]
        flow, here = [x1], x1
        for a, b in zip(times.flip(0).tolist(), times.flip(0).tolist()[1:]):
            here = sde.solve(net, here, a, b, 1e-5, 1e-5)
            flow.append(here)
        stops = torch.linspace(1, sde.sampling_eps, 200)
        for row, (t, lines, name) in enumerate(((stops, torch.cat([x1, walk[0][:, :-1]], 1), "reverse SDE"),
                                                (times.flip(0), torch.cat(flow, 1), "probability-flow ODE"))):
            ax = axes[row][column]
            ax.imshow(density.T, extent=(0, 1, -view, view), origin="lower", aspect="auto", cmap="Blues", vmax=1.4)
            for line in lines:
                ax.plot(t, line, lw=0.9)
            ax.set(ylim=(-view, view), xlim=(1, 0), xlabel="t" if row else None, title=f"{kind}, {name}")
    return save_figure(fig, path)


def plot(claim, path):
    """Four answers: bits of every image; what a tolerance costs; FID by calls; the ODE against a thousand steps."""
    fig, ((bits_, tolerance_), (arms_, ode_)) = figure(2, 2, width=5.0)
    for row in claim["bits"]["rows"]:
        bits_.plot(row["bound"], row["ode"], "o", ms=3, alpha=0.6)
    ends = [min(min(r["ode"] + r["bound"]) for r in claim["bits"]["rows"]),
            max(max(r["ode"] + r["bound"]) for r in claim["bits"]["rows"])]
    bits_.plot(ends, ends, color="grey", lw=1)
    bits_.set(xlabel="bound of 1000 steps, bits/dim", ylabel="ODE, bits/dim", title="(b) a dot an image")
    rows = claim["tolerance"]["rows"]
    tolerance_.plot([row["calls"] for row in rows], [row["bits"] for row in rows], "o-")
    for row in rows:
        tolerance_.annotate(f"{row['tolerance']:.0e}", (row["calls"], row["bits"]), xytext=(4, 4),
                            textcoords="offset points")
    tolerance_.set(xlabel="calls, forward and back", ylabel="bits/dim", title="bits/dim by the solver's tolerance")
    for i, name in enumerate(ARMS):
        for kind, style in (("ve", "o-"), ("vp", "s")):
            points = sorted((int(calls), row["fid"]) for calls, row in claim["arms"]["by_calls"][kind][name].items())
            arms_.plot(*zip(*points), style, color=f"C{i}", ms=5, label=f"{name}, {kind}")
    arms_.axhline(claim["floor"], color="grey", ls=":", lw=1)
    arms_.set(xlabel="network calls", ylabel=f"FID (n = {claim['n']}; dotted: floor)", yscale="log",
              title="(c) FID at equal calls, one seed")
    arms_.legend(fontsize=7)
    for i, name in enumerate(("steps", "ode")):
        ode_.plot(claim["ode"][name]["calls"], claim["ode"][name]["fid"], "o", color=f"C{i}",
                  label={"steps": "reverse SDE", "ode": "ODE"}[name])
    ode_.axhline(claim["long_floor"], color="grey", ls=":", lw=1)
    ode_.set(xscale="log", xlabel="network calls", ylabel=f"FID (n = {claim['long_n']}; dotted: floor)", ylim=(0, None),
             title="(d) a dot a seed, VP")
    ode_.legend(fontsize=8)
    for ax in (bits_, tolerance_, arms_, ode_):
        ax.grid(alpha=0.3)
    return save_figure(fig, path)


def text(claim):
    """The tables with their verdicts."""
    def mean(values):
        return f"{statistics.mean(values):8.3f} +- {deviation(values):<7.3f}"

    lines = [f"{name}: {claim[key]['verdict']}" for key, name in CLAIMS.items()]
    for kind, row in claim["exact"]["sdes"].items():
        lines += [f"(a) {kind:6} largest error {row['error']:.1e} nats; Hutchinson: " + "  ".join(
            f"{b['difference']:+.4f} (s.e. {b['standard_error']:.4f})" for b in row["hutchinson"])]
    for row in claim["bits"]["sets"]:
        lines += ["(b) ODE {ode:.3f} (s.e. {ode_error:.3f})   bound {bound:.3f} ({bound_error:.3f}), L_0 {L_0:.3f}   "
                  "difference {gap:.3f} ({gap_error:.4f})   {calls} calls".format(**row)]
    lines += [f"(c) {name:10} FID {mean(row['fid'])}   low {mean(row['fid_low'])}   {row['calls'][0]} calls"
              for name, row in claim["arms"]["table"].items()]
    for kind, table in claim["arms"]["by_calls"].items():
        lines += [f"    {kind} {name:10} " + "   ".join(f"{calls}: {v['fid']:.2f} / {v['fid_low']:.1f}"
                                                        for calls, v in row.items()) for name, row in table.items()]
    lines += [f"(d) {name:6} FID {mean(claim['ode'][name]['fid'])}   low {mean(claim['ode'][name]['fid_low'])}   calls "
              f"{claim['ode'][name]['calls']}" for name in ("steps", "ode")]
    for row in claim["identity"]["sets"]:
        lines += ["(e) " + "   ".join(
            f"{tol:.0e}: {rms:.6f}, {100 * same:.1f} % of grey levels, {calls} calls" for tol, rms, same, calls in zip(
                claim["identity"]["tolerances"], row["rms"], row["same_grey"], row["calls"]))]
    lines += ["    tolerance {tolerance:.0e}: {bits:.4f} bits/dim, {calls} calls; samples {rms:.4f} from the last row,"
              " {sample_calls} calls".format(**row) for row in claim["tolerance"]["rows"]]
    return "\n".join(lines)


if __name__ == "__main__":
    cli(main)
