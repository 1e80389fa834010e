"""Measure the claims of the rectified flow paper again: one step after reflow, straightness, transport cost.

    python reproduce.py publish=true      all of it; writes results/claim.json, results/claim.png and the pictures
    python reproduce.py quick=true        a look at it, no verdict
    python reproduce.py n=1024 seeds=5    other values; without publish=true to runs/claim

The networks are those of one training (the published ones); the seeds draw z_0, the same for every network. The
criteria, in `judge`, were written down before the numbers were seen.

Measured without a verdict: FID by network calls and with RK45, the fall of the cost against loss and S, noise on the
way, whether the pairs are memorised, the transfer from threes to eights, and two flows in the plane.
"""

import statistics

import torch
from torch import nn

import train
from model import Coupling, RectifiedFlow, straightness, transport_cost
from sample import load, starts
from utils import (
    Claim,
    Rows,
    arm_weights,
    below,
    classify,
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

MODELS = ("1-rf", "2-rf", "distilled")


def main(argv=None):
    claim = Claim(__file__, argv, sections=("unet", "flow"))
    run, cfg = claim.run, claim.cfg
    trainings = {"transfer": ["source=3", "target=8", f"steps={cfg.transfer_steps}"]}
    if cfg.smoke or not run.published.exists():
        trainings["networks"] = []
    claim.train(trainings, train=train.main, seeds=[0])
    rows = claim.each(measure, arm=MODELS, seed=claim.seeds)
    judge(claim, rows)
    claim.note("memory", memory(run))
    claim.note("transfer", transfer(run))
    claim.note("plane", plane(run))
    claim.note("floor", floor(cfg.n))
    pictures(run)
    return claim.finish(plot=plot, n=cfg.n)


def judge(claim, rows):
    """The sentences and their criteria."""
    fid, many = rows.unfold("fid", "calls"), claim.cfg.calls[-1]
    claim.judge("a", "In one step, the FID of the 2-rectified flow is at most a fifth of that of the 1-rectified flow",
                paper="12.2 against 378 (Table 1, CIFAR-10)", holds=fid.below("2-rf", "1-rf", "fid", 0.2, calls=1))
    claim.judge("b", "2-rectified flow in one step has at most twice the FID of 1-rectified flow in a hundred",
                paper="12.2 in one step; 2.58 with RK45 in 127 calls (Table 1, CIFAR-10)",
                holds=below(fid.values("fid", arm="2-rf", calls=1), fid.values("fid", arm="1-rf", calls=many), 2))
    claim.judge("c", "In one step, the distilled network has a lower FID than the 2-rectified flow that taught it",
                paper="4.85 against 12.2 (Table 1, CIFAR-10)", holds=fid.below("distilled", "2-rf", "fid", calls=1))
    claim.judge("d", "Reflow makes the paths straighter: S falls to a fifth or less",
                paper="S falls with every reflow (Sec. 5)", holds=rows.below("2-rf", "1-rf", "S", factor=0.2))
    claim.judge("e1", "The transport cost does not rise from random pairs to 1-rectified flow, up to 1 %",
                paper="no convex cost rises (Theorem 3.5)",
                holds=below(rows.values("cost", arm="1-rf"), rows.values("cost_random", arm="1-rf"), 1.01))
    claim.judge("e2", "The transport cost does not rise from 1-rectified to 2-rectified flow, up to 1 %",
                paper="no convex cost rises (Theorem 3.5)", holds=rows.below("2-rf", "1-rf", "cost", factor=1.01))


def network(run, model):
    """Process and network of a stage: of the published training, in smoke mode of one here."""
    return load(run, published(run, "networks").path, model)


# ------------------------------------------------------------------ (a) to (e)
def measure(run, arm, seed):
    """Everything about one network from the same n starts: FID by calls, straightness, cost. A dict of numbers."""
    cfg, (flow, net) = run.config.reproduce, network(run, arm)
    z0, row = starts("noise", cfg.n, seed).to(run.device), {}
    few, many = cfg.calls[:-1], cfg.calls[-1]
    row["fid"] = {str(steps): fid_to_test(carry(flow, net, z0, steps=steps)[0]) for steps in few}
    x, row["calls_rk45"] = carry(flow, net, z0, solver="dopri5", tolerance=cfg.tolerance)
    row["fid_rk45"] = fid_to_test(x)
    if arm == "distilled":                              # knows t_min only: its way has no meaning
        row["cost"] = float(transport_cost(z0, carry(flow, net, z0)[0]).mean())
        return row
    ways = [flow.path(net, part, many) for part in z0.split(64)]
    x = torch.cat([z[-1] for z, _ in ways])
    row["fid"][str(many)], row["cost"] = fid_to_test(x), float(transport_cost(z0, x).mean())
    row["S"] = float(torch.cat([straightness(z, v) for z, v in ways]).mean())
    noisy = [flow.stochastic(net, part, few[-1], 1.0, seeded(seed + i)) for i, part in enumerate(z0.split(64))]
    row["fid_noise"] = fid_to_test(torch.cat(noisy))    # in as many steps as the last but one of `calls`
    if arm == "1-rf":                                   # what its training set out from: random pairs, here test images
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


# ------------------------------------------------------------------ are the pairs memorised?
def memory(run):
    """One step against the end that the teacher gives, from starts of the training's pairs and from fresh ones.

    Also how near fresh images are to the nearest pair: of a network that recites, nearer than the teacher's.
    """
    cfg, steps = run.config.reproduce, run.config.train.pair_steps
    seen = Coupling(None, None, 1, 0).starts(cfg.pairs).to(run.device)                    # of the published training
    fresh, result = starts("noise", cfg.pairs, cfg.seeds + 7).to(run.device), {}
    for teacher, student, n in (("1-rf", "2-rf", steps[0]), ("2-rf", "distilled", steps[1])):
        ends = [carry(*network(run, teacher), z, solver="midpoint", steps=n)[0] for z in (seen, fresh)]
        ones = [carry(*network(run, student), z)[0] for z in (seen, fresh)]
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
    """Carry test threes with the networks that were trained from threes to eights; numbers and a picture."""
    path = arm_weights(run, "transfer").path
    most = min(500, run.config.reproduce.n)
    threes, eights = (starts(digit, most, 0).to(run.device) for digit in ("3", "8"))
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
    run.output(save_grid, torch.cat([*z[::4].cpu(), x[:12].cpu(), eights[:12].cpu(), back.cpu()]), "transfer.png",
               columns=12, down=["threes", *(f"2-rf, step {i} of 20" for i in (4, 8, 12, 16, 20)), "distilled, 1 step",
                                 "eights", "2-rf, backwards"])
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


# ------------------------------------------------------------------ pictures
def pictures(run):
    """Few steps of every network from the same noise; values of a pixel over t; one step and nearest training image."""
    z0, rows = starts("noise", 12, 100).to(run.device), []
    fig, axes = figure(1, 2, width=4.5)
    for model, ax in zip(MODELS, axes):
        flow, net = network(run, model)
        rows += [flow.sample(net, z0, steps=steps)[0].cpu() for steps in (1, 2, 5, 20)]
        z = flow.path(net, z0, 50)[0]
        ax.plot(torch.linspace(0, 1, 51), z[:, :, 0, 14, 14].cpu(), lw=1)
        ax.set(xlabel="time t, from noise (0) to data (1)", ylabel="value of a pixel in the middle", title=model)
    run.output(save_figure, fig, "flow_lines.png")
    flow, net = network(run, "distilled")
    one, images = flow.sample(net, z0)[0].cpu(), digits("train").first(60_000)[0]
    near = images[torch.cdist(one.flatten(1), images.flatten(1)).argmin(1)]
    run.output(save_grid, torch.cat([*rows, one]), "few_steps.png", columns=12, down=[
        *(f"{model}, {steps} step{'s' * (steps > 1)}" for model in MODELS[:2] for steps in (1, 2, 5, 20)),
        "distilled, 1 step"])
    run.output(save_grid, torch.cat([one, near]), "neighbours.png", columns=12, down=["distilled", "nearest of 60,000"])


def plot(claim, path):
    """Three answers: FID by calls, straightness, transport cost; a dot is a seed."""
    fig, ((left, right), (lower, rest)) = figure(2, 2, width=4.2, height=3.4)
    fid = [row for row in claim.rows.unfold("fid", "calls") if row["arm"] != "distilled" or row["calls"] == 1]
    lines(left, Rows(fid), "calls", "fid")
    left.axhline(claim.notes["floor"], color="grey", ls=":", lw=1, label="floor: real digits")
    left.set(xscale="log", yscale="log", xlabel="network calls (Euler)", title="(a) to (c): how many calls?",
             ylabel=f"FID (n = {claim.cfg.n})")
    ticks(left.xaxis, claim.cfg.calls)
    ticks(left.yaxis, (0.5, 1, 2, 5, 10, 20, 50, 100))
    dots(right, claim.rows, "S")
    right.set(ylim=(0, None), ylabel="straightness S", title="(d) how straight? 0 is straight")
    random = [{"arm": "random pairs", "seed": row["seed"], "cost": row["cost_random"]}
              for row in claim.rows.where(arm="1-rf")]
    cost = Rows([*random, *claim.rows])
    for i, (name, values) in enumerate(cost.by("arm", "cost").items()):     # the colours of the other panels
        lower.plot([i] * len(values), values, "o", ms=5, color=f"C{i - 1}" if i else "grey")
    lower.set(xticks=range(i + 1), xticklabels=list(cost.by("arm", "cost")), xlim=(-0.5, i + 0.5),
              ylim=(0, 1.1 * max(row["cost"] for row in cost)), ylabel="mean of ||z1 - z0||^2", title="(e) how far?")
    lower.grid(alpha=0.3)
    rest.axis("off")
    rest.legend(*left.get_legend_handles_labels(), loc="center", fontsize=11, frameon=False)
    left.get_legend().remove()
    return save_figure(fig, path)


if __name__ == "__main__":
    cli(main)
