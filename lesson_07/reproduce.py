"""Measure the claims of the Score SDE paper again: exact likelihoods, predictor-corrector, the ODE's economy, identity.

    python reproduce.py publish=true      all of it, three seeds; writes results/claim.json and the pictures
    python reproduce.py quick=true        a look at it, no verdict
    python reproduce.py calls=201         other values; without publish=true to runs/claim
    python reproduce.py only=bits         one of exact, bits, arms, ode, identity and tolerance

Each of these six functions measures, and says its sentences with their criteria, which were written down before the
numbers were seen. The networks are the published ones. Everything is fp32; the ODE's state is float64. Where no noise
is drawn, the "seeds" are disjoint sets of test images, dequantised once.

exact      correlated Gaussian data in 8 dimensions with mean 0, and the exact score; VE with sigma from 1e-3 to 200, so
           that neither its smallest noise nor its prior counts
bits       one probe an image. The bound is DDPM's (lesson 05) on a thousand steps of the VP process with sigma^2 =
           beta-tilde, once over all times, of the same network
arms       VE at equal network calls: 101 times with a reverse-diffusion step, 51 times with one and a correction
           (r = 0.16), 101 with a correction; without a verdict also at fewer and more calls, and for VP
ode        the ODE against a thousand steps of the reverse SDE, VP
identity   encoding and decoding test images, VP
tolerance  without a verdict: bits/dim and samples by the solver's tolerance
"""

import math

import torch

import train
from model import EPS, SDE, VE, UNet, bits_per_dim, dequantise, quantise, wide
from sample import Counted, draw, stop_after
from utils import (
    Claim,
    arm_weights,
    below,
    cli,
    deviation,
    digits,
    fid_to_test,
    figure,
    floor,
    pooled,
    save_figure,
    save_grid,
    seeded,
    ticks,
)

NETWORKS = {"vp": ("weights.safetensors", ["sde.kind=vp"]),
            "ve": ("weights_ve.safetensors", ["sde.kind=ve", "sde.log_share=0"])}    # no likelihood is asked of it
ARMS = {"predictor": dict(predictor="reverse_diffusion", corrections=0),
        "corrector": dict(predictor="none", corrections=1),
        "both": dict(predictor="reverse_diffusion", corrections=1)}
EVERY = "in every set of images"


def main(argv=None):
    claim = Claim(__file__, argv, sections=("unet", "sde"))
    run, cfg = claim.run, claim.cfg
    cfg.publish = cfg.publish and not cfg.only
    train_networks(claim)
    for part in (exact, bits, arms, ode, identity, tolerance):
        if cfg.only in ("", part.__name__):
            part(claim)
    if cfg.only:
        return claim.finish()
    claim.note("floor", {str(n): floor(n) for n in (cfg.n, cfg.long_n)})
    run.output(plot_flow, None, "flow.png")
    run.output(save_grid, interpolation(run), "interpolation.png", columns=11,
               across=["image", *(f"{i}/8" for i in range(9)), "image"])
    run.output(save_grid, inpainting(run), "inpainting.png", columns=10,
               down=["known", *(f"filled in, {i}" for i in ("first", "second", "third")), "the image"])
    return claim.finish(plot=plot, n=cfg.n)


# ------------------------------------------------------------------ the networks
def train_networks(claim):
    """Train the networks that are not published; in smoke mode both."""
    missing = {kind: keys for kind, (file, keys) in NETWORKS.items()
               if claim.cfg.smoke or not (claim.run.lesson / "results" / file).exists()}
    for (kind, _), path in claim.train(missing, train=train.main, seeds=[0]).items():
        if claim.cfg.publish:
            claim.run.publish(path, NETWORKS[kind][0])


def network(run, kind):
    """The SDE called vp or ve and its network, ready to sample."""
    path = run.lesson / "results" / NETWORKS[kind][0]
    weights = arm_weights(run, kind) if run.settings.smoke or not path.exists() else run.read(path)
    sde, net = run.place(SDE(**weights.config["sde"]), weights.load(UNet(**weights.config["unet"])))
    return sde, net.requires_grad_(False)


def exact_network(sde, score):
    """A network that is right: score(x, m, std) is the gradient of log q_t. It undoes what VE does to the input."""
    def net(x, label):
        m, std = (wide(one, x) for one in sde.noising.marginal(label / 999))
        return -std * score(x * (1 + std ** 2).sqrt() if isinstance(sde.noising, VE) else x, m, std)

    return net


# ------------------------------------------------------------------ (a) the exact likelihood
def exact(claim):
    """The largest error of log p with the exact trace, and the bias of Hutchinson's estimate, for the three SDEs."""
    cfg, dim, tol, errors, bias = claim.cfg, 8, 1e-7, {}, {}
    generator = seeded(0)
    root = 0.4 * torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    cov = root @ root.T + 0.3 * torch.eye(dim, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(cov)
    x = torch.randn(dim, dim, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(cov).T      # 8 points
    closed = torch.distributions.MultivariateNormal(torch.zeros(dim, dtype=torch.float64), cov).log_prob(x)
    for kind in ("vp", "subvp", "ve"):
        sde = SDE(kind, sigma_min=1e-3, sigma_max=200.0)
        net = exact_network(sde, lambda x, m, std: -(x @ vectors / (m ** 2 * values + std ** 2)) @ vectors.T)
        basis = math.sqrt(dim) * torch.eye(dim, dtype=torch.float64).repeat(dim, 1)   # the mean of v^T J v is the trace
        logp, _ = sde.log_likelihood(net, x.repeat_interleave(dim, 0), basis, tol, tol)
        errors[kind], bias[kind] = float((logp.reshape(dim, dim).mean(1) - closed).abs().max()), []
        for seed in claim.seeds:
            v = torch.randint(0, 2, (cfg.probes, dim), generator=seeded(seed)).double() * 2 - 1
            draws, _ = sde.log_likelihood(net, x[:1].expand(cfg.probes, dim), v, 1e-6, 1e-6)
            bias[kind].append({"difference": float(draws.mean() - closed[0]),
                               "standard_error": float(draws.std() / math.sqrt(cfg.probes))})
        claim.run.say(f"{kind}: largest error {errors[kind]:.1e} nats; Hutchinson " + "  ".join(
            "{difference:+.4f} (s.e. {standard_error:.4f})".format(**one) for one in bias[kind]))
    claim.exact("a1", "With the exact score and trace, log p of Gaussian data is the closed form to 1e-3 nats",
                paper="the likelihood is exact (Sec. 4.3)", holds=all(error < 1e-3 for error in errors.values()),
                errors=errors)
    claim.judge("a2", "Hutchinson's estimate of log p has no bias", paper="an unbiased estimate (Sec. 4.3)",
                rule="the mean over the probes is within 3 standard errors (+ 1e-4 nats), for each SDE and seed",
                holds=unbiased(bias), bias=bias)


def unbiased(bias):
    """(a2): whether all means are near the closed form."""
    return all(abs(one["difference"]) < 3 * one["standard_error"] + 1e-4 for kind in bias.values() for one in kind)


# ------------------------------------------------------------------ (b) bits per dimension: the ODE's, and a bound
def bits(claim):
    """Both numbers of every set of test images."""
    rows = claim.each(measure_bits, seed=claim.seeds)
    claim.judge("b", "The ODE's bits/dim of test images are below the bound's, for one and the same network",
                paper="3.28 by the ODE, at most 3.75 by the bound (Table 2, CIFAR-10)",
                holds=below(rows.values("ode"), rows.values("bound")))


def measure_bits(run, seed):
    """Bits/dim of one set of test images: means and standard errors; of every image; L_0; calls."""
    cfg, (sde, net) = run.config.reproduce, network(run, "vp")
    x0, net = test_images(run, seed, cfg.images), Counted(net)
    x = dequantise(x0, seeded(seed))
    logp, _ = sde.log_likelihood(net, x, probe(x, 100 + seed), cfg.likelihood_tol, cfg.likelihood_tol)
    calls, ode = net.calls, bits_per_dim(logp, x0[0].numel()).tolist()
    total, first = bound(sde, net, (x0 + 1) * 127.5 / 128 + 1 / 256 - 1, cfg.bound_steps, seeded(seed))
    images = {"ode": ode, "bound": total.tolist(), "gap": [b - o for b, o in zip(total.tolist(), ode)]}
    row = {"L_0": float(first.mean()), "calls": calls, "images": images}
    for name, values in images.items():
        row |= {name: sum(values) / len(values), f"{name}_error": deviation(values) / math.sqrt(len(values))}
    return row


def test_images(run, seed, n):
    """Set number `seed` of n test images."""
    return digits("test").first((seed + 1) * n)[0][seed * n:].to(run.device)


def probe(x, seed):
    """A Rademacher probe like x: E[v v^T] = I."""
    return torch.randint(0, 2, x.shape, generator=seeded(seed)).to(x) * 2 - 1


# Adapted from lesson_05/model.py: DDPM.bound -- any number of steps of the VP process, sigma^2 = beta-tilde only
@torch.no_grad()
def bound(sde, net, x0, steps=1000, generator=None):
    """DDPM's bound on -log2 P(x_0), every time once, and its part L_0; bits per dimension, (B,) each.

    x0: centres of the grey levels' bins. With sigma^2 = beta-tilde each divergence is half the difference of the two
    signal-to-noise ratios times the squared error of x_0.
    """
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)[1:]
    m, std = sde.noising.marginal(times)
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
def arms(claim):
    """The three arms at equal calls, all seeds; other numbers of calls, and VP, one seed."""
    cfg = claim.cfg
    jobs = [{"kind": "ve", "arm": arm, "calls": cfg.calls, "seed": seed} for seed in claim.seeds for arm in ARMS]
    jobs += [{"kind": "ve", "arm": arm, "calls": calls, "seed": 0} for calls in cfg.other_calls for arm in ARMS]
    jobs += [{"kind": "vp", "arm": arm, "calls": cfg.calls, "seed": 0} for arm in ARMS]
    rows = claim.each(measure_arm, jobs)
    same = {"kind": "ve", "calls": cfg.calls}
    claim.judge("c1", "At equal calls, predictor and corrector together have a lower FID than the predictor alone (VE)",
                paper="lower at equal calls (Table 1, CIFAR-10)", holds=rows.below("both", "predictor", "fid", **same))
    claim.judge("c2", "At equal calls, predictor and corrector together have a lower FID than the corrector alone (VE)",
                paper="lower at equal calls (Table 1, CIFAR-10)", holds=rows.below("both", "corrector", "fid", **same))
    claim.run.output(plot_arms, [rows.where(arm=arm, seed=0, **same)[0]["x"] for arm in ARMS], "arms.png")


def measure_arm(run, kind, arm, calls, seed):
    """FIDs of n samples of an arm, and the first 12 of them."""
    return fids(run, kind, run.config.reproduce.n, seed, (calls + 1) // 2 if arm == "both" else calls, ARMS[arm])


def fids(run, kind, n, seed, steps, way):
    """FIDs of n samples, the network calls that they took, and the first 12 images."""
    sde, net = network(run, kind)
    x, calls = draw(sde, net, n, steps, seeded(seed), run.config.reproduce.batch, **way)
    x = x.cpu()
    return {"fid": fid_to_test(x), "fid_low": fid_to_test(x, low=True), "nfe": calls, "x": x[:12].clone()}


def ode(claim):
    """The ODE against a thousand steps."""
    rows = claim.each(measure_ode, arm=["reverse SDE", "ODE"], seed=claim.seeds)
    claim.judge("d1", "The FID of the ODE is on par with that of a thousand steps of the reverse SDE (VP)",
                paper="close to the reverse SDE (Table 1, CIFAR-10)", holds=on_par(rows),
                rule="the means over the seeds: above by at most 3 pooled standard deviations")
    claim.judge("d2", "The ODE needs at most a fifth of the network calls of the reverse SDE (VP)",
                paper="over 90 % fewer calls without a visible loss (Fig. 3)",
                holds=rows.below("ODE", "reverse SDE", "nfe", factor=0.2))


def on_par(rows):
    """(d1): whether the ODE's mean FID is not clearly above that of the steps."""
    steps, ode = (rows.values("fid", arm=arm) for arm in ("reverse SDE", "ODE"))
    return sum(ode) / len(ode) - sum(steps) / len(steps) <= 3 * pooled(steps, ode)


def measure_ode(run, arm, seed):
    """FIDs of `long_n` samples of one of the two."""
    cfg = run.config.reproduce
    way = ARMS["predictor"] if arm == "reverse SDE" else dict(sampler="ode", rtol=cfg.ode_tol)
    return fids(run, "vp", cfg.long_n, seed, cfg.long, way)


# ------------------------------------------------------------------ (e) there and back; what a tolerance costs
def identity(claim):
    """RMS error of encoding and decoding by tolerance, for every set; and the share of equal grey levels."""
    rows, least = claim.each(measure_identity, seed=claim.seeds).unfold("rms", "tolerance"), min(claim.cfg.tolerances)
    claim.judge("e1", "Encoding and decoding at the smallest tolerance ends within half a grey level of the image",
                paper="the codes identify the images (Sec. 4.3)", rule=f"RMS below 1/256 {EVERY}",
                holds=all(rms < 1 / 256 for rms in rows.values("rms", tolerance=least)))
    claim.judge("e2", "The error of encoding and decoding falls with the solver's tolerance",
                paper="the ODE is invertible (Sec. 4.3)", rule=f"from each tolerance to the next, {EVERY}",
                holds=falls(rows))


def falls(rows):
    """(e2): whether the error falls from each tolerance to the next smaller one, in every set."""
    table = [values for _, values in sorted(rows.by("tolerance", "rms").items(), reverse=True)]
    return all(a > b for large, small in zip(table, table[1:]) for a, b in zip(large, small))


def measure_identity(run, seed):
    """One set there and back, at all tolerances."""
    cfg, (sde, net) = run.config.reproduce, network(run, "vp")
    x = dequantise(test_images(run, seed, cfg.back_images), seeded(seed))
    row = {"rms": {}, "calls": {}, "same_grey": {}}
    for tol in cfg.tolerances:
        counted = Counted(net)
        back = sde.solve(counted, sde.encode(counted, x, tol, tol), 1.0, EPS, tol, tol)
        row["rms"][str(tol)] = float((back - x).square().mean().sqrt())
        row["same_grey"][str(tol)] = float((quantise(back) == quantise(x)).float().mean())
        row["calls"][str(tol)] = counted.calls
    return row


def tolerance(claim):
    """Bits/dim of a few images and the distance of samples to those at the smallest tolerance, by tolerance."""
    rows = claim.each(measure_tolerance, tolerance=claim.cfg.tolerances)
    for row in rows:
        row["sample_rms"] = float((row["x"] - rows[-1]["x"]).square().mean().sqrt())


def measure_tolerance(run, tolerance):
    """Bits/dim with its calls, samples with theirs."""
    sde, net = network(run, "vp")
    counted, tol = Counted(net), tolerance
    x = dequantise(test_images(run, 0, run.config.reproduce.back_images), seeded(0))
    logp, _ = sde.log_likelihood(counted, x, probe(x, 0), tol, tol)
    calls, counted = counted.calls, Counted(net)
    samples = sde.ode_sample(counted, sde.prior(x.shape, seeded(0)).to(run.device), tol, tol)
    return {"bits": float(bits_per_dim(logp, x[0].numel()).mean()), "bits_calls": calls,
            "sample_calls": counted.calls, "x": samples}


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
    sde, net = network(run, "vp")
    x0, tol = test_images(run, 0, 8), run.config.reproduce.ode_tol
    z = sde.encode(net, dequantise(x0, seeded(0)), tol, tol)
    mixed = torch.stack([slerp(z[:4], z[4:], w) for w in torch.linspace(0, 1, 9).tolist()], 1)           # (4, 9, ...)
    x = quantise(sde.solve(net, mixed.flatten(0, 1), 1.0, EPS, tol, tol)).unflatten(0, (4, 9))
    return torch.cat([torch.cat([a[None], row, b[None]]) for a, row, b in zip(x0[:4], x, x0[4:])])


class Known:
    """A network that is shown the known pixels of an image wherever they belong: imputation, Sec. 5 and App. I.2.

    y      the image, (B, C, H, W); of its unknown pixels nothing is used
    known  which pixels are known, a mask (1, 1, H, W)
    """
    def __init__(self, sde, net, y, known, generator=None):
        self.sde, self.net, self.y, self.known, self.generator = sde, net, y, known, generator

    def __call__(self, x, label):
        t = label / 999
        z = torch.randn(self.y.shape, generator=self.generator).to(x)
        noised = self.sde.noising.network_input(self.sde.q_sample(self.y, t, z), t)
        return self.net(torch.where(self.known, noised, x), label)


def inpainting(run):
    """Ten test images of which the upper half is known: that half, three ways to go on from it, and the images."""
    sde, net = network(run, "vp")
    x0, steps = test_images(run, 0, 10), run.config.sample.steps
    stop_after(sde, steps)
    y, known = dequantise(x0, seeded(0)), (torch.arange(28) < 14)[None, None, :, None].to(run.device)
    rows = [torch.where(known, x0, -0.3)]
    for seed in range(3):
        shown, start = Known(sde, net, y, known, seeded(10 + seed)), sde.prior(y.shape, seeded(seed)).to(run.device)
        *_, (_, x, _) = sde.reverse(shown, start, steps, generator=seeded(20 + seed))
        rows.append(quantise(torch.where(known, y, x)))
    return torch.cat([*rows, x0])


def plot_arms(rows, path):
    """A row of samples for each arm, beside its name."""
    return save_grid(torch.cat(rows), path, columns=len(rows[0]), down=ARMS)


def plot_flow(_, path):
    """Data of three points' width in one dimension: do the SDE and the ODE fill the same densities?"""
    means, share, width = torch.tensor([-0.7, 0.1, 0.8]), torch.tensor([0.3, 0.5, 0.2]), 0.08
    fig, axes = figure(3, 2, width=4.2, height=2.4)
    grid, times = torch.linspace(-1, 1, 241), torch.linspace(EPS, 1, 200)
    for i, (kind, title) in enumerate({"vp": "VP", "subvp": "sub-VP", "ve": "VE"}.items()):
        sde = SDE(kind, sigma_max=2.0)             # a small sigma_max, or nothing of VE's data could be seen
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
        m, std = (one[:, None, None] for one in sde.noising.marginal(times))
        density = log_q((view * grid)[None, :, None], m, std)[..., 0].exp()
        density = (density / density.amax(1, keepdim=True)) ** 0.5
        x1 = sde.prior((10, 1), seeded(1))
        walk = [torch.cat([x for _, x, _ in sde.reverse(net, x1, 200, "euler_maruyama", generator=seeded(2))], 1)]
        flow, here, along = [x1], x1, torch.linspace(1, EPS, 50)
        for a, b in zip(along.tolist(), along.tolist()[1:]):
            here = sde.solve(net, here, a, b, 1e-5, 1e-5)
            flow.append(here)
        stops = torch.linspace(1, sde.sampling_eps, 200)
        for ax, (t, lines, name) in zip(axes[i], ((stops, torch.cat([x1, walk[0][:, :-1]], 1), "reverse SDE"),
                                                  (along, torch.cat(flow, 1), "probability-flow ODE"))):
            ax.contourf(times, view * grid, density.T, 12, cmap="Blues", vmax=1.4)
            for line in lines:
                ax.plot(t, line, lw=0.9)
            ax.set(ylim=(-view, view), xlim=(1, 0), xlabel="t" if i == 2 else None, title=f"{title}, {name}")
    return save_figure(fig, path)


def plot(claim, path):
    """Four answers: bits of every image; what a tolerance costs; FID by calls; the ODE against a thousand steps."""
    fig, ((bits_, tolerance_), (arms_, ode_)) = figure(2, 2, width=5.0)
    rows, cfg = claim.rows, claim.cfg
    images = [row["images"] for row in rows if "images" in row]
    for of_set in images:
        bits_.plot(of_set["bound"], of_set["ode"], "o", ms=3, alpha=0.6)
    every = [value for of_set in images for value in (*of_set["ode"], *of_set["bound"])]
    bits_.plot([min(every), max(every)], [min(every), max(every)], color="grey", lw=1)
    bits_.set(xlabel=f"bound of {cfg.bound_steps} steps, bits/dim", ylabel="ODE, bits/dim", title="(b) a dot an image")
    costs = [row for row in rows if "bits_calls" in row]
    tolerance_.plot([row["bits_calls"] for row in costs], [row["bits"] for row in costs], "o-")
    for row in costs:
        tolerance_.annotate(f"{row['tolerance']:.0e}", (row["bits_calls"], row["bits"]), xytext=(6, -4),
                            textcoords="offset points")
    tolerance_.margins(0.16)
    tolerance_.set(xlabel="calls, forward and back", ylabel="bits/dim", title="bits/dim by the solver's tolerance")
    for i, arm in enumerate(ARMS):
        for kind, style in (("ve", "o-"), ("vp", "s")):
            points = sorted((row["nfe"], row["fid"]) for row in rows.where(kind=kind, arm=arm, seed=0))
            arms_.plot(*zip(*points), style, color=f"C{i}", ms=5, label=f"{arm}, {kind.upper()}")
    arms_.axhline(claim.notes["floor"][str(cfg.n)], color="grey", ls=":", lw=1)
    arms_.set(xlabel="network calls", ylabel=f"FID (n = {cfg.n}; dotted: floor)", yscale="log",
              title="(c) FID at equal calls, one seed")
    ticks(arms_.yaxis, (1, 3, 10, 30, 100))
    arms_.legend(fontsize=7, ncols=3, loc="center", bbox_to_anchor=(0.5, 0.74))
    for i, arm in enumerate(("reverse SDE", "ODE")):
        ode_.plot(rows.values("nfe", arm=arm), rows.values("fid", arm=arm), "o", color=f"C{i}", label=arm)
    ode_.axhline(claim.notes["floor"][str(cfg.long_n)], color="grey", ls=":", lw=1)
    ode_.set(xscale="log", xlabel="network calls", ylabel=f"FID (n = {cfg.long_n}; dotted: floor)", ylim=(0, None),
             title="(d) a dot a seed, VP")
    ticks(ode_.xaxis, (100, 200, 500, 1000))
    ode_.legend(fontsize=8, loc="center")
    for ax in (bits_, tolerance_, arms_, ode_):
        ax.grid(alpha=0.3)
    return save_figure(fig, path)


if __name__ == "__main__":
    cli(main)
