"""Measure the claims of the Flow Matching paper again: calls of the adaptive solver, bits/dim, FID by training steps.

    python reproduce.py publish=true      nine short trainings; writes results/claim.json and the pictures
    python reproduce.py quick=true        a look at it, no verdict
    python reproduce.py seeds=5 n=1024    other values; without publish=true to runs/claim

Three arms: score matching on the VP path (SM), flow matching on the VP path (FM-VP) and on the OT path (FM-OT); the
same network, batches, steps, learning rate and seeds. Calls are those of dopri5 (rtol = atol = `tolerance`) for one
batch of noise a seed; bits/dim are of the same test images, with the same dequantisation and the same probes. The
criteria, in `main`, were written down before the numbers were seen.

Measured without a verdict: calls by tolerance; the error of few calls; the calls that exact fields need, those of a
set of training images without a network; and the published network's calls by tolerance.
"""

import torch
import torch.nn.functional as F
from torch import nn

import train
from model import FlowMatching, UNet, network_time, quantise
from sample import draw, likelihood
from utils import (
    Arm,
    Claim,
    Weights,
    cli,
    digits,
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

TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
FEW = (4, 8, 16, 32, 64)                               # network calls of the midpoint method


class ScoreMatching(FlowMatching):
    """The paper's baseline on the VP path: the network predicts the noise, and with it the score, as in lesson 07."""

    def loss(self, net, x0):
        """Denoising score matching, weighted with s_t^2, which makes it the squared error of the noise. -> scalar."""
        t = self.path.end * torch.rand(len(x0), dtype=torch.float64, device=x0.device)
        eps = torch.randn_like(x0)
        return F.mse_loss(net(self.q_sample(x0, t, eps), network_time(t)), eps)

    def velocity(self, net, x, t):
        """beta / 2 (x + score), the probability-flow ODE: u_t at the x_0 that the predicted noise stands for."""
        eps = net(x, network_time(t))
        a, s, _, _ = self.coefficients(t)
        return self.target((x - s * eps) / a, t, eps)


ARMS = {"SM": Arm(["flow.path=vp"], FlowMatching=ScoreMatching), "FM-VP": ["flow.path=vp"], "FM-OT": ["flow.path=ot"]}


def main(argv=None):
    claim = Claim(__file__, argv, sections=("unet", "flow"))
    run, cfg = claim.run, claim.cfg
    rows = claim.arms(ARMS, train=train.main, measure=measure, keys=[
        f"steps={cfg.steps}", f"snapshot_every={cfg.snapshot_every}", f"precision={cfg.precision}"])
    claim.judge("a", "FM-OT needs at most 0.8 times the network calls of SM",
                paper="142 against 242 calls (Table 1, CIFAR-10)",
                holds=rows.below("FM-OT", "SM", "calls", factor=0.8))
    claim.judge("b", "FM-OT has fewer bits/dim than FM-VP and than SM",
                paper="2.99 against 3.10 and 3.16 bits/dim (Table 1, CIFAR-10)",
                holds=all(rows.below("FM-OT", other, "bits") for other in ("FM-VP", "SM")))
    claim.judge("c", "FM-OT has the lowest FID after every number of training steps, and at the last one clearly",
                paper="the lowest of the three all along the training (Fig. 5, ImageNet 64)",
                holds=lowest_all_along(rows.unfold("fid", "steps")))
    error = rows.unfold("error", "calls")
    claim.note("few", {arm: {n: error.mean("error", arm=arm, calls=n) for n in FEW} for arm in ARMS})
    claim.note("exact", exact(run))
    claim.note("published", few(run, *load(run, published(run, "FM-OT")), 0))
    claim.note("floor", floor(cfg.n))
    run.output(plot_calls, claim, "tolerance.png")
    run.output(save_grid, torch.cat([row for arm in ARMS for row in rows.where(arm=arm, seed=0)[0]["x"]]), "few.png",
               columns=12, down=[f"{arm}, {how}" for arm in ARMS for how in ("8 calls", "16 calls", "dopri5")])
    run.output(plot_paths, None, "paths.png")
    run.output(plot_densities, None, "densities.png")
    return claim.finish(plot=plot, n=cfg.n)


def lowest_all_along(fid):
    """(c): FM-OT is the lowest in every seed after every number of steps, and below both others after the last."""
    last, others = max(row["steps"] for row in fid), ("SM", "FM-VP")
    below = [a < b for other in others for steps, of_ours in fid.by("steps", "fid", arm="FM-OT").items()
             for a, b in zip(of_ours, fid.values("fid", arm=other, steps=steps))]
    return all(below) and all(fid.below("FM-OT", other, "fid", steps=last) for other in others)


# ------------------------------------------------------------------ one arm
def measure(run, weights, arm, seed):
    """The calls, bits and FIDs of a trained arm, the error of few calls, and some images."""
    cfg, fid = run.config.reproduce, {}
    for snapshot in sorted(weights.path.parent.glob("step_*.safetensors")):
        flow, net = load(run, Weights(snapshot, run.name), arm)
        eps = torch.randn(cfg.n, 1, 28, 28, generator=seeded(seed)).to(run.device)
        x, _ = draw(flow, net, eps, 100, "dopri5", 1, cfg.fid_tolerance)
        fid[str(int(snapshot.stem.removeprefix("step_")))] = fid_to_test(x)
    flow, net = load(run, weights, arm)
    x0 = digits("test").first(cfg.bits_images)[0].to(run.device)
    bits, bits_calls = likelihood(flow, net, x0, cfg.bits_tolerance)
    return {"fid": fid, "bits": float(bits.mean()), "bits_error": float(bits.std() / len(bits) ** 0.5),
            "bits_calls": bits_calls, **few(run, flow, net, 1000 + seed)}


def few(run, flow, net, seed):
    """Calls by tolerance, the error of few calls, and rows of images: 8 calls, 16 calls, dopri5."""
    cfg = run.config.reproduce
    eps = torch.randn(cfg.calls_images, 1, 28, 28, generator=seeded(seed)).to(run.device)
    solved = {tol: flow.sample(net, eps, tolerance=tol) for tol in TOLERANCES if tol >= cfg.tolerance}
    reference, calls = solved[cfg.tolerance]
    midpoint = {n: flow.sample(net, eps, "midpoint", n // 2)[0] for n in FEW}
    return {"calls": calls, "calls_by_tolerance": {str(tol): calls for tol, (_, calls) in solved.items()},
            "error_by_tolerance": {str(tol): distance(x, reference) for tol, (x, _) in solved.items()},
            "error": {str(n): distance(x, reference) for n, x in midpoint.items()},
            "x": [quantise(x[:12]).cpu() for x in (midpoint[8], midpoint[16], reference)]}


def distance(x, reference):
    """Root mean square of the difference, over pixels in [-1, 1]."""
    return float((x - reference).square().mean().sqrt())


def load(run, weights, arm="FM-OT"):
    """Process and network of an arm's weights file."""
    process = ScoreMatching if arm == "SM" else FlowMatching
    return run.place(process(**weights.config["flow"]), weights.load(UNet(**weights.config["unet"])))


# ------------------------------------------------------------------ the field without a network
class Exact(nn.Module):
    """The field that the best possible network has for these images: u_t at the mean of x_0 given x. (B, 1, 28, 28)."""

    def __init__(self, flow, images):
        super().__init__()
        self.flow = flow
        self.register_buffer("images", images.flatten(1).double(), persistent=False)               # (N, 784)

    def forward(self, x, time):
        """x (B, 1, 28, 28), time (B,), 1000 t -> the field."""
        a, s, da, ds = self.flow.path((time.double() / 1000).clamp(max=self.flow.path.end)[:, None])
        x = x.flatten(1).double()
        distance = (a ** 2 * self.images.square().sum(1) - 2 * a * (x @ self.images.T)) / s ** 2   # less |x|^2
        x0 = torch.softmax(-distance / 2, dim=1) @ self.images                                     # E[x_0 | x]
        return (ds / s * (x - a * x0) + da * x0).float().reshape(-1, 1, 28, 28)


def exact(run):
    """`few` with the exact fields of some training images: no error of a network is in them."""
    images = digits("train").first(run.config.reproduce.exact_images)[0]
    flows = {path: FlowMatching(path) for path in ("vp", "ot")}
    return {path: few(run, flow, run.place(Exact(flow, images)), 0) for path, flow in flows.items()}


# ------------------------------------------------------------------ pictures
def plot(claim, path):
    """Three answers: calls by tolerance, bits/dim, FID by training steps. Every dot is a seed."""
    fig, ((left, right), (below, rest)) = figure(2, 2, width=4.2)
    lines(left, claim.rows.unfold("calls_by_tolerance", "tolerance"), "tolerance", "calls_by_tolerance")
    left.set(xscale="log", yscale="log", xlabel="tolerance of dopri5", ylabel="network calls",
             title="(a) calls: fewer is better")
    for i, arm in enumerate(ARMS):
        values, error = (claim.rows.values(key, arm=arm) for key in ("bits", "bits_error"))
        places = [i + 0.1 * seed for seed in range(len(values))]
        right.errorbar(places, values, error, fmt="o", color=f"C{i}", ms=4, capsize=3)
    right.set(xticks=[0.1, 1.1, 2.1], xticklabels=list(ARMS), ylabel="bits/dim", title="(b) bits: fewer is better")
    right.grid(alpha=0.3)
    lines(below, claim.rows.unfold("fid", "steps"), "steps", "fid")
    below.axhline(claim.notes["floor"], color="grey", ls=":", lw=1, label="floor: real digits")
    below.set(yscale="log", xlabel="training steps", ylabel=f"FID (n = {claim.cfg.n})", title="(c) FID: less is better",
              xticks=sorted({int(steps) for row in claim.rows for steps in row["fid"]}))
    ticks(left.xaxis, TOLERANCES)
    ticks(left.yaxis, (20, 50, 100, 200, 500))
    ticks(below.yaxis, (0.5, 1, 2, 5, 10, 20, 50))
    rest.axis("off")
    rest.legend(*below.get_legend_handles_labels(), loc="center", fontsize=11, frameon=False)
    for ax in (left, below):
        ax.get_legend().remove()
    return save_figure(fig, path)


def plot_calls(claim, path):
    """Where do the calls go? Exact fields by tolerance; the error of few calls."""
    fig, (left, right) = figure(1, 2, width=4.2, height=3.6)
    exact, network = claim.notes["exact"], claim.notes["published"]
    for name, row, style in (("exact field, VP", exact["vp"], "o-C0"), ("exact field, OT", exact["ot"], "o-C2"),
                             ("published network", network, "s--C3")):
        table = row["calls_by_tolerance"]
        left.loglog([float(tol) for tol in table], list(table.values()), style, label=name)
    for name, error in [*claim.notes["few"].items(), ("published", network["error"])]:
        right.loglog(FEW, list(error.values()), "o-", label=name)
    left.set(xlabel="tolerance of dopri5", ylabel="network calls")
    right.set(xlabel="network calls of the midpoint method", ylabel="distance to dopri5 (RMS)")
    ticks(left.xaxis, TOLERANCES)
    ticks(left.yaxis, (20, 50, 100, 200, 500))
    ticks(right.xaxis, FEW)
    ticks(right.yaxis, (0.01, 0.02, 0.05, 0.1, 0.2, 0.3))
    for ax in (left, right):
        ax.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
        ax.grid(alpha=0.3)
    return save_figure(fig, path)


def plot_paths(_, path):
    """How does each path carry noise to ONE image? Twelve noises in two dimensions; dots at ten equal times."""
    fig, axes = figure(1, 2, width=4.2, height=3.3)
    eps, x0 = torch.randn(12, 1, 1, 2, generator=seeded(4)), torch.tensor([2.5, 1.5]).expand(12, 1, 1, 2)
    for ax, name in zip(axes, ("vp", "ot")):
        flow = FlowMatching(name)
        times = torch.linspace(0, flow.path.end, 201, dtype=torch.float64)
        way = torch.stack([flow.q_sample(x0, t.expand(12), eps) for t in times])[:, :, 0, 0]       # (201, 12, 2)
        for i, line in enumerate(way.unbind(1)):
            ax.plot(*line.T, color=f"C{i % 10}", lw=0.8)
            ax.plot(*line[::20].T, ".", color=f"C{i % 10}", ms=5)
        noise, = ax.plot(*eps[:, 0, 0].T, "o", color="black", mfc="none", ms=7)
        image, = ax.plot(*x0[0, 0, 0], "*", color="black", ms=13, zorder=3)
        ax.set(title=f"{name.upper()} path", aspect="equal", xlim=(-3, 3.7), ylim=(-1.8, 2.4),
               xlabel="first coordinate")
    axes[0].set_ylabel("second coordinate")
    fig.legend([noise, image], ["noise, t = 0", "image, t = 1"], loc="outside lower center", ncols=2, frameon=False)
    return save_figure(fig, path)


def plot_densities(_, path):
    """What do both paths do to a whole distribution? Density of x_t by time for data at two points, and flow lines."""
    fig, axes = figure(1, 2, width=4.2, height=3.4)
    centres, x = torch.tensor([-1.0, 0.8]), torch.linspace(-3, 3, 400, dtype=torch.float64)
    for ax, name in zip(axes, ("vp", "ot")):
        flow = FlowMatching(name, **({"s_min": 0.1} if name == "ot" else {}))
        times = torch.linspace(0, flow.path.end, 300, dtype=torch.float64)
        a, s, _, _ = flow.path(times)
        s = s.clamp(min=0.05)                          # wide enough to be seen
        normal = torch.distributions.Normal(a[:, None, None] * centres.double(), s[:, None, None])
        density = normal.log_prob(x[:, None]).exp().mean(2).T                                      # (400, 300)
        ax.pcolormesh(times, x, density.clamp(max=1.2), cmap="Blues", rasterized=True)

        def field(z, time, flow=flow):
            a, s, da, ds = flow.coefficients(time.double() / 1000)
            weight = torch.softmax(-((z - a * centres) / s).square() / 2, dim=3)
            x0 = (weight * centres).sum(3, keepdim=True)
            return ds / s * (z - a * x0) + da * x0

        eps = torch.linspace(-2.2, 2.2, 12).reshape(12, 1, 1, 1)
        way, _ = flow.sample(field, eps, tolerance=1e-5, times=times)
        ax.plot(times, way.flatten(1), color="C1", lw=0.8)
        ax.set(title=f"{name.upper()} path", xlabel="time t, from noise (0) to data (1)", ylabel="x", ylim=(-2.5, 2.5))
    return save_figure(fig, path)


if __name__ == "__main__":
    cli(main)
