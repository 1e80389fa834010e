"""Measure the claim of the Flow Matching paper again: calls of the adaptive solver, bits/dim, FID by training steps.

    python reproduce.py publish=true      nine short trainings; writes results/claim.json and the pictures
    python reproduce.py quick=true        a look at it, no verdict
    python reproduce.py seeds=5 n=1024    other values; without publish=true to runs/claim

The criteria were written down before the numbers were seen. Three arms: score matching on the VP path (SM), flow
matching on the VP path (FM-VP) and on the OT path (FM-OT); the same network, batches, steps, learning rate and seeds.

(a) Calls. dopri5 (rtol = atol = `tolerance`), one batch of noise a seed: FM-OT needs at most 0.8 times the network
    calls of SM in every seed, and the gap of the means is above 3 pooled standard deviations over the seeds.
(b) Bits/dim of the same test images, with the same dequantisation and the same probes: FM-OT is below FM-VP and below
    SM in every seed, and both gaps of the means are above 3 pooled standard deviations.
(c) FID against training steps: FM-OT is the lowest of the three after every number of steps in every seed, and at the
    last one its gap to the second lowest is above 3 pooled standard deviations.

Measured without a verdict: calls by tolerance; the error of few calls; the calls that exact fields need, those of a
set of training images without a network; and the published network's calls by tolerance.
"""

import statistics
import time

import torch
from torch import nn

import train
from model import FlowMatching, UNet, quantise
from sample import draw, likelihood
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

ARMS = {"SM": ("vp", "score"), "FM-VP": ("vp", "flow"), "FM-OT": ("ot", "flow")}
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
FEW = (4, 8, 16, 32, 64)                               # network calls of the midpoint method


def main(argv=None):
    run = Run(__file__, argv)
    cfg = run.config.reproduce
    start = time.perf_counter()
    run.open_folder("claim")
    jobs, rows = [(run.argv, arm, seed) for seed in range(cfg.seeds) for arm in ARMS], {arm: [] for arm in ARMS}
    for (_, arm, seed), row in zip(jobs, parallel(measure, jobs, cfg.workers)):
        rows[arm].append(row)
        run.say(f"{arm:6} seed {seed}: {row['calls']} calls, {row['bits']:.3f} +- {row['bits_error']:.3f} bits/dim, "
                "FID " + ", ".join(f"{fid:.2f} after {step}" for step, fid in row["fid"].items()))
    claim = {
        "calls": calls_table(rows), "bits": bits_table(rows), "fid": fid_table(rows), "few": few_table(rows),
        "exact": exact(run), "published": published(run), "n": cfg.n, "floor": floor(cfg.n), "seeds": cfg.seeds,
        "train_steps": cfg.steps, "tolerance": cfg.tolerance, "fid_tolerance": cfg.fid_tolerance,
        "bits_tolerance": cfg.bits_tolerance, "calls_images": cfg.calls_images, "bits_images": cfg.bits_images,
        "minutes": round((time.perf_counter() - start) / 60, 1),
    }
    for name in ("calls", "bits", "fid"):
        claim[name]["verdict"] = verdict(claim[name]["holds"], cfg)
    run.say(text(claim))
    run.output(save_json, claim, "claim.json")
    run.output(plot, claim, "claim.png")
    run.output(plot_calls, claim, "tolerance.png")
    run.output(save_strip, [row for arm in ARMS for row in rows[arm][0]["x"]], "few.png")
    run.output(plot_paths, None, "paths.png")
    run.output(plot_densities, None, "densities.png")
    run.record("claim", minutes=claim["minutes"], n=cfg.n, verdicts={
        name: claim[name]["verdict"] for name in ("calls", "bits", "fid")})
    return claim


# ------------------------------------------------------------------ one arm
def measure(argv, arm, seed):
    """Train one arm (or take it from an earlier call); its calls, bits, FIDs, the error of few calls, some images."""
    run = Run(__file__, argv)
    cfg, folder = run.config.reproduce, run.open_folder("claim")
    path, objective = ARMS[arm]
    own = [a for a in argv if a.split("=")[0].split(".")[0] in ("unet", "flow", "train", "gpu", "device", "smoke")]
    weights = trained(train.main, folder / f"{arm}_{seed}", [
        *own, f"flow.path={path}", f"flow.objective={objective}", f"seed={seed}", f"steps={cfg.steps}",
        f"snapshot_every={cfg.snapshot_every}", "preview_every=0", f"precision={cfg.precision}"], run.lesson)
    fid = {}
    for snapshot in sorted(weights.parent.glob("step_*.safetensors")):
        flow, net = load(run, snapshot)
        eps = torch.randn(cfg.n, 1, 28, 28, generator=seeded(seed)).to(run.device)
        x, _ = draw(flow, net, eps, 100, "dopri5", 1, cfg.fid_tolerance)
        fid[str(int(snapshot.stem.removeprefix("step_")))] = fid_to_test(x)
    flow, net = load(run, weights)
    x0 = digits("test").first(cfg.bits_images)[0].to(run.device)
    bits, bits_calls = likelihood(flow, net, x0, cfg.bits_tolerance)
    return {"fid": fid, "bits": float(bits.mean()), "bits_error": float(bits.std() / len(bits) ** 0.5),
            "bits_calls": bits_calls, **count(run, flow, net, 1000 + seed)}


def count(run, flow, net, seed):
    """Calls by tolerance, the error of few calls, and rows of images: 8 calls, 16 calls, dopri5."""
    cfg = run.config.reproduce
    eps = torch.randn(cfg.calls_images, 1, 28, 28, generator=seeded(seed)).to(run.device)
    solved = {tol: flow.sample(net, eps, tolerance=tol) for tol in TOLERANCES if tol >= cfg.tolerance}
    reference, calls = solved[cfg.tolerance]
    few = {n: flow.sample(net, eps, "midpoint", n // 2)[0] for n in FEW}
    return {"calls": calls, "calls_by_tolerance": {str(tol): calls for tol, (_, calls) in solved.items()},
            "error_by_tolerance": {str(tol): distance(x, reference) for tol, (x, _) in solved.items()},
            "error": {str(n): distance(x, reference) for n, x in few.items()},
            "x": [quantise(x[:12]).cpu() for x in (few[8], few[16], reference)]}


def distance(x, reference):
    """Root mean square of the difference, over pixels in [-1, 1]."""
    return float((x - reference).square().mean().sqrt())


def load(run, path):
    """Process and network of a weights file."""
    weights = Weights(path, run.name)
    return run.place(FlowMatching(**weights.config["flow"]), weights.load(UNet(**weights.config["unet"])))


# ------------------------------------------------------------------ without a short training
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
    """Calls by tolerance of the exact fields of some training images: no error of a network is in them."""
    images, result = digits("train").first(run.config.reproduce.exact_images)[0], {}
    for path in ("vp", "ot"):
        flow = FlowMatching(path)
        row = count(run, flow, run.place(Exact(flow, images)), 0)
        result[path] = {name: row[name] for name in ("calls", "calls_by_tolerance", "error")}
    return result


def published(run):
    """The same of the published network, or, where there is none, of nothing."""
    path = run.lesson / "results" / "weights.safetensors"
    if run.config.reproduce.smoke or not path.exists():
        return {}
    row = count(run, *load(run, path), 0)
    return {name: row[name] for name in ("calls", "calls_by_tolerance", "error_by_tolerance", "error")}


# ------------------------------------------------------------------ tables and verdicts
def below(a, b):
    """Whether a is below b in every seed, and the means by more than 3 pooled standard deviations."""
    return all(x < y for x, y in zip(a, b)) and statistics.mean(b) - statistics.mean(a) > 3 * pooled(a, b)


def calls_table(rows):
    """(a)"""
    calls = {arm: [row["calls"] for row in of_arm] for arm, of_arm in rows.items()}
    ratio = [ot / sm for ot, sm in zip(calls["FM-OT"], calls["SM"])]
    by_tolerance = {arm: {tol: [row["calls_by_tolerance"][tol] for row in of_arm]
                          for tol in of_arm[0]["calls_by_tolerance"]} for arm, of_arm in rows.items()}
    return {"calls": calls, "ratio": ratio, "by_tolerance": by_tolerance,
            "holds": max(ratio) <= 0.8 and below(calls["FM-OT"], calls["SM"])}


def bits_table(rows):
    """(b)"""
    bits, error, calls = ({arm: [row[what] for row in of_arm] for arm, of_arm in rows.items()}
                          for what in ("bits", "bits_error", "bits_calls"))
    return {"bits": bits, "standard_error": error, "calls": calls,
            "holds": all(below(bits["FM-OT"], bits[arm]) for arm in ("FM-VP", "SM"))}


def fid_table(rows):
    """(c)"""
    fid = {arm: {step: [row["fid"][step] for row in of_arm] for step in of_arm[0]["fid"]}
           for arm, of_arm in rows.items()}
    others = [fid["SM"], fid["FM-VP"]]
    lowest = all(a < b for other in others for step, of_step in fid["FM-OT"].items()
                 for a, b in zip(of_step, other[step]))
    last = list(fid["FM-OT"])[-1]
    second = min((other[last] for other in others), key=statistics.mean)
    return {"fid": fid, "lowest_everywhere": lowest, "holds": lowest and below(fid["FM-OT"][last], second)}


def few_table(rows):
    """The error of the midpoint method with few calls, the mean of the seeds."""
    return {arm: {n: statistics.mean(row["error"][n] for row in of_arm) for n in of_arm[0]["error"]}
            for arm, of_arm in rows.items()}


def text(claim):
    """The three tables with their verdicts."""
    def mean(values, digits=2):
        return f"{statistics.mean(values):.{digits}f} +- {deviation(values):.{digits}f}"

    lines = ["", f"(a) calls of dopri5 at {claim['tolerance']:g}: {claim['calls']['verdict']}"]
    lines += [f"    {arm:6} {mean(values, 1):16} by tolerance: " + "   ".join(
        f"{tol} {statistics.mean(v):.0f}" for tol, v in claim["calls"]["by_tolerance"][arm].items())
        for arm, values in claim["calls"]["calls"].items()]
    lines += ["    FM-OT / SM: " + ", ".join(f"{r:.2f}" for r in claim["calls"]["ratio"])]
    lines += [f"    exact field, {path}: {row['calls_by_tolerance']}" for path, row in claim["exact"].items()]
    lines += [f"    published network: {claim['published'].get('calls_by_tolerance', 'none')}"]
    lines += [f"(b) bits/dim, {claim['bits_images']} test images: {claim['bits']['verdict']}"]
    lines += [f"    {arm:6} {mean(values, 3)}" for arm, values in claim["bits"]["bits"].items()]
    lines += [f"(c) FID, n = {claim['n']}, floor {claim['floor']:.2f}: {claim['fid']['verdict']}"]
    lines += [f"    {arm:6} " + "   ".join(f"{step}: {mean(values)}" for step, values in of_arm.items())
              for arm, of_arm in claim["fid"]["fid"].items()]
    lines += ["error of the midpoint method by calls:"]
    lines += [f"    {arm:6} " + "   ".join(f"{n}: {e:.3f}" for n, e in row.items())
              for arm, row in claim["few"].items()]
    return "\n".join(lines)


# ------------------------------------------------------------------ pictures
def plot(claim, path):
    """Three answers: calls by tolerance, bits/dim, FID by training steps. Every dot is a seed."""
    fig, (left, middle, right) = figure(1, 3, width=4.2)
    for i, arm in enumerate(ARMS):
        by_tolerance, fid = claim["calls"]["by_tolerance"][arm], claim["fid"]["fid"][arm]
        for ax, table in ((left, by_tolerance), (right, fid)):
            x = [float(key) for key in table]
            ax.plot(x, [statistics.mean(v) for v in table.values()], color=f"C{i}", label=arm)
            for values in zip(*table.values()):
                ax.plot(x, values, "o", color=f"C{i}", ms=3)
        values = claim["bits"]["bits"][arm]
        middle.errorbar([i + 0.1 * k for k in range(len(values))], values, claim["bits"]["standard_error"][arm],
                        fmt="o", color=f"C{i}", ms=4, capsize=3)
    left.set(xscale="log", yscale="log", xlabel="tolerance of dopri5", ylabel="network calls", title="(a) calls")
    middle.set(xticks=[0.1, 1.1, 2.1], xticklabels=list(ARMS), ylabel="bits/dim", title="(b) likelihood")
    right.axhline(claim["floor"], color="grey", ls=":", lw=1)
    right.set(yscale="log", xlabel="training steps", ylabel=f"FID (n = {claim['n']}; dotted: floor)", title="(c) FID")
    ticks(left.yaxis, (20, 50, 100, 200, 500))
    ticks(right.yaxis, (0.5, 1, 2, 5, 10, 20, 50))
    left.legend()
    for ax in (left, middle, right):
        ax.grid(alpha=0.3)
    return save_figure(fig, path)


def ticks(axis, places):
    """Plain numbers on a logarithmic axis."""
    axis.set_ticks(places, [f"{place:g}" for place in places])
    axis.set_ticks([], minor=True)


def plot_calls(claim, path):
    """Where do the calls go? Exact fields by tolerance; the error of few calls."""
    fig, (left, right) = figure(1, 2)
    for i, (name, row) in enumerate(claim["exact"].items()):
        table = row["calls_by_tolerance"]
        left.loglog([float(tol) for tol in table], list(table.values()), "o-", color=f"C{2 * i}",
                    label=f"exact field, {name.upper()}")
    curves = dict(claim["few"])
    if claim["published"]:
        table = claim["published"]["calls_by_tolerance"]
        left.loglog([float(tol) for tol in table], list(table.values()), "s--", color="C3", label="published network")
        curves["published"] = claim["published"]["error"]
    for i, (name, row) in enumerate(curves.items()):
        right.loglog([int(n) for n in row], list(row.values()), "o-", color=f"C{i}", label=name)
    left.set(xlabel="tolerance of dopri5", ylabel="network calls")
    right.set(xlabel="network calls of the midpoint method", ylabel="distance to dopri5 (RMS)")
    ticks(left.yaxis, (20, 50, 100, 200, 500))
    ticks(right.xaxis, FEW)
    for ax in (left, right):
        ax.legend(fontsize=8)
        ax.grid(alpha=0.3)
    return save_figure(fig, path)


def plot_paths(_, path):
    """How does each path carry noise to ONE image? Twelve noises in two dimensions; dots at ten equal times."""
    fig, axes = figure(1, 2, width=4.0, height=4.0)
    eps, x0 = torch.randn(12, 1, 1, 2, generator=seeded(4)), torch.tensor([2.5, 1.5]).expand(12, 1, 1, 2)
    for ax, name in zip(axes, ("vp", "ot")):
        flow = FlowMatching(name)
        times = torch.linspace(0, flow.path.end, 201, dtype=torch.float64)
        way = torch.stack([flow.q_sample(x0, t.expand(12), eps) for t in times])[:, :, 0, 0]       # (201, 12, 2)
        for line in way.unbind(1):
            ax.plot(*line.T, color="C0", lw=0.8)
            ax.plot(*line[::20].T, ".", color="C0", ms=4)
        ax.plot(*eps[:, 0, 0].T, "o", color="grey", ms=4, label="noise")
        ax.plot(*x0[0, 0, 0], "*", color="C3", ms=12, label="image", zorder=3)
        ax.set(title=f"{name.upper()} path", aspect="equal", xlim=(-3, 3.7), ylim=(-1.8, 2.4))
    axes[0].legend()
    return save_figure(fig, path)


def plot_densities(_, path):
    """What do both paths do to a whole distribution? Density of x_t by time for data at two points, and flow lines."""
    fig, axes = figure(1, 2, width=4.5)
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
        ax.set(title=f"{name.upper()} path", xlabel="t", ylabel="x", ylim=(-2.5, 2.5))
    return save_figure(fig, path)


if __name__ == "__main__":
    cli(main)
