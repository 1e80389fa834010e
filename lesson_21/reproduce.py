"""Measure the claims of the rectified flow paper again: one step after reflow, straightness, transport cost.

    python reproduce.py publish=true      all of it; writes results/claim.json, results/claim.png and the pictures
    python reproduce.py quick=true        a look at it, no verdict
    python reproduce.py n=1024 seeds=5    other values; without publish=true to runs/claim

The networks are those of one training (the published ones); the seeds draw z_0, the same for every network. The
criteria were written down before the numbers were seen.

(a) One step. In every seed the FID of 2-rf in one step is at most a fifth of that of 1-rf in one step.
(b) In every seed the FID of 2-rf in one step is at most twice that of 1-rf in 100 Euler steps.
(c) In one step the distilled network has a lower FID than 2-rf in every seed, and the gap is above 3 pooled standard
    deviations.
(d) Straightness. In every seed S of 1-rf is at least 5 times S of 2-rf (100 Euler steps).
(e) Transport cost. In every seed E||Z1 - Z0||^2 does not rise from random pairs to 1-rf and from 1-rf to 2-rf. For the
    networks' errors 1 % is allowed.

Measured without a verdict: FID by network calls and with RK45, the fall of the cost against loss and S, noise on the
way, whether the pairs are memorised, the transfer from threes to eights, and two flows in the plane.
"""

import statistics
import time

import torch
from torch import nn

import train
from model import Coupling, RectifiedFlow, straightness, transport_cost
from sample import load, starts
from utils import (
    Run,
    classify,
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

MODELS = ("1-rf", "2-rf", "distilled")
CRITERIA = {"fifth": "(a) one step: 2-rf at most a fifth of 1-rf", "twice": "(b) 2-rf in 1 at most twice 1-rf in 100",
            "distilled": "(c) one step: distilled below 2-rf", "straight": "(d) S falls five times",
            "cost": "(e) transport cost does not rise"}


def main(argv=None):
    run = Run(__file__, argv)
    cfg, begin = run.config.reproduce, time.perf_counter()
    run.settings.publish &= not (cfg.quick or cfg.smoke)
    run.open_folder("claim")
    path = networks(run)
    jobs = [(run.argv, path, model, seed) for model in MODELS for seed in range(cfg.seeds)]
    rows = {}
    for (_, _, model, seed), row in zip(jobs, parallel(measure, jobs, cfg.workers)):
        rows.setdefault(model, []).append(row)
        run.say(f"{model} seed {seed}: " + "  ".join(f"{key} {value:.2f}" for key, value in row.items()))
    claim = {
        "criteria": judge(rows, cfg), "rows": rows, "memory": memory(run, path), "transfer": transfer(run),
        "plane": plane(run), "n": cfg.n, "floor": floor(cfg.n), "seeds": cfg.seeds, "calls": cfg.calls,
        "minutes": round((time.perf_counter() - begin) / 60, 1)}
    run.say(text(claim))
    pictures(run, path)
    run.output(save_json, claim, "claim.json")
    run.output(plot, claim, "claim.png")
    run.record("claim", minutes=claim["minutes"], n=cfg.n,
               **{name: one["verdict"] for name, one in claim["criteria"].items()})
    return claim


def networks(run):
    """The weights file of the distilled network, beside those of 1-rf and 2-rf: the published ones, or smoke ones."""
    if not run.config.reproduce.smoke:
        return run.published
    return trained(train.main, run.folder / "networks", [*own(run), "preview_every=0"], run.lesson)


def own(run):
    """The arguments that a training takes over from this script."""
    sections = ("unet", "flow", "train", "gpu", "device", "smoke")
    return [a for a in run.argv if a.split("=")[0].split(".")[0] in sections]


# ------------------------------------------------------------------ (a) to (e)
def measure(argv, path, model, seed):
    """Everything about one network from the same n starts: FID by calls, straightness, cost. A dict of numbers."""
    run = Run(__file__, argv)
    cfg = run.config.reproduce
    flow, net = load(run, path, model)
    z0, row = starts("noise", cfg.n, seed).to(run.device), {}
    few, many = cfg.calls[:-1], cfg.calls[-1]
    for steps in few:
        row[f"fid_{steps}"] = fid_to_test(carry(flow, net, z0, steps=steps)[0])
    x, row["calls_rk45"] = carry(flow, net, z0, solver="dopri5", tolerance=cfg.tolerance)
    row["fid_rk45"] = fid_to_test(x)
    if model == "distilled":                            # knows t_min only: its way has no meaning
        row["cost"] = float(transport_cost(z0, carry(flow, net, z0)[0]).mean())
        return row
    ways = [flow.path(net, part, many) for part in z0.split(64)]
    x = torch.cat([z[-1] for z, _ in ways])
    row[f"fid_{many}"], row["cost"] = fid_to_test(x), float(transport_cost(z0, x).mean())
    row["S"] = float(torch.cat([straightness(z, v) for z, v in ways]).mean())
    noisy = [flow.stochastic(net, part, few[-1], 1.0, seeded(seed + i)) for i, part in enumerate(z0.split(64))]
    row[f"fid_{few[-1]}_noise"] = fid_to_test(torch.cat(noisy))
    if model == "1-rf":                                 # what its training set out from: random pairs, here test images
        x1 = digits("test").first(cfg.n, seed)[0].to(run.device)
        row["cost_random"] = float(transport_cost(z0, x1).mean())
        torch.manual_seed(seed)
        with torch.no_grad():
            losses = [flow.loss(net, z0[torch.randperm(cfg.n)][:64], x1[torch.randperm(cfg.n)][:64]) for _ in range(40)]
        row["loss_of_pixels"] = float(torch.stack(losses).mean()) * z0[0].numel()
    return row


def carry(flow, net, z, batch=128, **how):
    """`flow.sample` in batches: the images, and the mean of the network calls."""
    parts = [flow.sample(net, part, **how) for part in z.split(batch)]
    return torch.cat([x for x, _ in parts]), statistics.mean(calls for _, calls in parts)


def judge(rows, cfg):
    """The five criteria, with what decides them."""
    first, second, distilled = (rows[model] for model in MODELS)
    many = f"fid_{cfg.calls[-1]}"
    one = {model: [row["fid_1"] for row in rows[model]] for model in MODELS}
    random, costs = [row["cost_random"] for row in first], [[row["cost"] for row in rows[m]] for m in MODELS[:2]]
    gap = statistics.mean(one["2-rf"]) - statistics.mean(one["distilled"])
    holds = {
        "fifth": all(5 * b <= a for a, b in zip(one["1-rf"], one["2-rf"])),
        "twice": all(b <= 2 * row[many] for row, b in zip(first, one["2-rf"])),
        "distilled": all(c < b for b, c in zip(one["2-rf"], one["distilled"]))
        and gap > 3 * pooled(one["2-rf"], one["distilled"]),
        "straight": all(a["S"] >= 5 * b["S"] for a, b in zip(first, second)),
        "cost": all(a <= 1.01 * r and b <= 1.01 * a for r, a, b in zip(random, *costs)),
    }
    return {name: {"holds": ok, "verdict": verdict(ok, cfg)} for name, ok in holds.items()}


# ------------------------------------------------------------------ are the pairs memorised?
def memory(run, path):
    """One step against the end that the teacher gives, from starts of the training's pairs and from fresh ones.

    Also how near fresh images are to the nearest pair: of a network that recites, nearer than the teacher's.
    """
    cfg, steps = run.config.reproduce, run.config.train.pair_steps
    seen = Coupling(None, None, 1, 0).starts(cfg.pairs).to(run.device)                    # of the published training
    fresh, result = starts("noise", cfg.pairs, cfg.seeds + 7).to(run.device), {}
    for teacher, student, n in (("1-rf", "2-rf", steps[0]), ("2-rf", "distilled", steps[1])):
        ends = [carry(*load(run, path, teacher), z, solver="midpoint", steps=n)[0] for z in (seen, fresh)]
        ones = [carry(*load(run, path, student), z)[0] for z in (seen, fresh)]
        result[student] = {"rms_seen": rms(ones[0], ends[0]), "rms_fresh": rms(ones[1], ends[1]),
                           "nearest_pair": nearest(ones[1], ends[0]),
                           "nearest_pair_of_teacher": nearest(ends[1], ends[0])}
    return {**result, "pairs": cfg.pairs}


def rms(a, b):
    return float((a - b).flatten(1).square().mean(1).sqrt().mean())


def nearest(x, pool):
    """Mean RMS distance of images to the nearest one of the pool."""
    return float(torch.cdist(x.flatten(1), pool.flatten(1)).min(1).values.mean()) / x[0].numel() ** 0.5


# ------------------------------------------------------------------ from threes to eights
def transfer(run):
    """Train from threes to eights (or take it from an earlier call), carry test threes; numbers and a picture."""
    cfg = run.config.reproduce
    path = trained(train.main, run.folder / "transfer", [*own(run), "source=3", "target=8", "preview_every=0",
                                                         f"steps={cfg.transfer_steps}"], run.lesson)
    threes, eights = (starts(digit, 500, 0).to(run.device) for digit in ("3", "8"))
    n, result = min(len(threes), len(eights)), {}
    result["random pairs"] = {"cost": float(transport_cost(threes[:n], eights[:n]).mean())}
    for model, steps in (("1-rf", 20), ("2-rf", 20), ("2-rf", 1), ("distilled", 1)):
        flow, net = load(run, path, model)
        x = carry(flow, net, threes, steps=steps)[0]
        result[f"{model}, {steps}"] = {"cost": float(transport_cost(threes, x).mean()),
                                       "eights": float((classify(x)[0] == 8).float().mean())}
        if (model, steps) == ("2-rf", 20):
            z = flow.path(net, threes[:12], 20)[0]
            back = flow.sample(net, eights[:12], steps=20, backward=True)[0]
            result["back, 2-rf, 20"] = {"threes": float((classify(
                carry(flow, net, eights, steps=20, backward=True)[0])[0] == 3).float().mean())}
    run.output(save_strip, [*z[::4].cpu(), x[:12].cpu(), eights[:12].cpu(), back.cpu()], "transfer.png")
    return result


# ------------------------------------------------------------------ two flows in the plane
class MLP(nn.Module):
    """A velocity in the plane. z (B, 1, 1, 2), time (B,) in 0 to 999 -> (B, 1, 1, 2)."""

    def __init__(self, width=64):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                                    nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, z, time):
        h = torch.cat([z.flatten(1), time[:, None] / 999], dim=1)
        return self.layers(h)[:, None, None]


def plane(run):
    """Two blobs on the left, two on the right: 1-rf, then 2-rf. The paths as a picture, S, and the cost."""
    cfg, flow, net = run.config.reproduce, RectifiedFlow(**run.config.flow), MLP()
    torch.manual_seed(0)

    def blobs(x, n):
        centre = torch.tensor([[x, 2.0], [x, -2.0]])[torch.randint(2, (n,))]
        return (centre + 0.4 * torch.randn(n, 2))[:, None, None]

    pairs, result, fig_axes = None, {}, figure(1, 2, width=4.2, height=3.4)
    z0, x1 = blobs(-3.0, 4096), blobs(3.0, 4096)
    for name, ax in zip(MODELS, fig_axes[1]):
        optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
        for _ in range(cfg.toy_steps):
            index = torch.randint(4096, (256,))
            batch = (blobs(-3.0, 256), blobs(3.0, 256)) if pairs is None else (pairs[0][index], pairs[1][index])
            loss = flow.loss(net, *batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        z, v = flow.path(net, z0, 100)
        pairs = pairs or (z0, z[-1])
        result[name] = {"S": float(straightness(z, v).mean()), "cost": float(transport_cost(z[0], z[-1]).mean())}
        one = flow.sample(net, z0[:60])[0].flatten(1)
        ax.plot(*z[:, :60].flatten(2).permute(2, 0, 1), color="grey", lw=0.6, alpha=0.7)
        for points, colour, label in ((z[0, :60], "C0", "start"), (z[-1, :60], "C3", "end, 100 steps")):
            ax.plot(*points.flatten(1).T, "o", ms=3, color=colour, label=label)
        ax.plot(*one.T, "x", ms=4, color="C2", label="end, 1 step")
        ax.set(title=f"{name}: S = {result[name]['S']:.2g}", ylim=(-4, 4))
    fig_axes[1][0].legend(fontsize=7, loc="lower center", ncols=3)
    run.output(save_figure, fig_axes[0], "plane.png")
    return {**result, "random pairs": {"cost": float(transport_cost(z0, x1).mean())}}


# ------------------------------------------------------------------ what is printed and drawn
def pictures(run, path):
    """Few steps of every network from the same noise; values of a pixel over t; one step and nearest training image."""
    z0, rows = starts("noise", 12, 100).to(run.device), []
    fig, axes = figure(1, 2, width=4.5)
    for model, ax in zip(MODELS, axes):
        flow, net = load(run, path, model)
        rows += [flow.sample(net, z0, steps=steps)[0].cpu() for steps in (1, 2, 5, 20)]
        z = flow.path(net, z0, 50)[0]
        ax.plot(torch.linspace(0, 1, 51), z[:, :, 0, 14, 14].cpu(), lw=1)
        ax.set(xlabel="t", ylabel="value of a pixel in the middle", title=model)
    run.output(save_figure, fig, "flow_lines.png")
    flow, net = load(run, path, "distilled")
    one, images = flow.sample(net, z0)[0].cpu(), digits("train").first(60_000)[0]
    run.output(save_strip, [*rows, one], "few_steps.png")
    run.output(save_strip, [one, images[torch.cdist(one.flatten(1), images.flatten(1)).argmin(1)]], "neighbours.png")


def text(claim):
    """The tables with their verdicts."""
    def mean(rows, key):
        values = [row[key] for row in rows]
        return f"{key} {statistics.mean(values):.2f} +- {deviation(values):.2f}"

    lines = ["", f"n = {claim['n']}, floor {claim['floor']:.2f}"]
    lines += [f"{model:10} " + "   ".join(mean(rows, key) for key in rows[0]) for model, rows in claim["rows"].items()]
    lines += [f"{CRITERIA[name]}: {one['verdict']}" for name, one in claim["criteria"].items()]
    return "\n".join(lines + [f"{name}: {claim[name]}" for name in ("memory", "transfer", "plane")])


def plot(claim, path):
    """Three answers: FID by calls, straightness, transport cost; a bar is the mean of the seeds, a dot a seed."""
    fig, (left, middle, right) = figure(1, 3, width=4.2)
    rows = claim["rows"]
    for i, model in enumerate(MODELS):
        calls = [c for c in claim["calls"] if f"fid_{c}" in rows[model][0]][:1 if model == "distilled" else None]
        values = [[row[f"fid_{c}"] for row in rows[model]] for c in calls]
        left.errorbar(calls, [statistics.mean(v) for v in values], [deviation(v) for v in values], fmt="o-", ms=4,
                      color=f"C{i}", label=model)
    left.axhline(claim["floor"], color="grey", ls=":", lw=1)
    left.set(xscale="log", yscale="log", xlabel="network calls (Euler)", title="how many calls?",
             ylabel=f"FID, n = {claim['n']} (dotted: floor)")
    left.legend(fontsize=8)
    bars(middle, {m: [row["S"] for row in rows[m]] for m in MODELS[:2]}, "S", "how straight?")
    cost = {"random pairs": [row["cost_random"] for row in rows["1-rf"]]}
    bars(right, cost | {m: [row["cost"] for row in rows[m]] for m in MODELS}, "mean of ||z1 - z0||^2", "how far?")
    return save_figure(fig, path)


def bars(ax, values, label, title):
    for i, (name, seeds) in enumerate(values.items()):
        ax.bar(i, statistics.mean(seeds), color=f"C{MODELS.index(name)}" if name in MODELS else "grey")
        ax.plot([i] * len(seeds), seeds, "k.", ms=4)
    ax.set(xticks=range(len(values)), xticklabels=list(values), ylabel=label, title=title)


if __name__ == "__main__":
    cli(main)
