"""Measure the claims of DiT again: quality follows Gflops, and adaLN-Zero is the best way to let the condition in.

    python reproduce.py publish=true      all of it, three seeds; writes results/claim.json and the pictures
    python reproduce.py quick=true        a look at it, no verdict
    python reproduce.py n=2048 steps=2000 other values; without publish=true to runs/claim

The criteria, in `main`, were written down before any number was seen. The arms of (a), and those of (b), have the same
depth, learning rate, batches and number of steps, and three training seeds. FID of n samples drawn with plain
conditional sampling. Steps and batches were set after short trainings of adaLN-Zero alone. They showed that for its
first 100,000 images a DiT with patches of 4 hardly looks beyond the patch: the arms are shorter than that, hence (c).
"""

import json
import statistics

import torch

import train
from model import KINDS, Block, patchify, sincos_2d
from sample import draw, load, wanted
from utils import (
    Claim,
    arm_weights,
    cli,
    digits,
    dots,
    figure,
    floor,
    published,
    save_figure,
    save_grid,
    score,
    seeded,
    ticks,
)

KEYS = ("fid", "accuracy", "precision", "recall")


def main(argv=None):
    claim = Claim(__file__, argv, sections=("dit", "ddpm"))
    run, cfg = claim.run, claim.cfg
    short = [f"batch_size={cfg.batch_size}", f"warmup={cfg.warmup}", "save_every=0"]
    kinds = claim.arms({kind: [*of_size(cfg.kinds_size), f"dit.conditioning={kind}"] for kind in KINDS},
                       train=train.main, measure=measure, keys=[*short, f"steps={cfg.kinds_steps}"])
    sizes = claim.arms({size: of_size(size) for size in cfg.sizes}, train=train.main, measure=measure,
                       keys=[*short, f"steps={cfg.steps}"])
    path, = claim.train({LONG: of_size(cfg.long_size)}, train.main, [f"steps={cfg.long_steps}"], seeds=[0]).values()
    long = claim.each(draw_long, net=["published", LONG], seed=claim.seeds)
    rank = [spearman([row["gflops"] for row in rows], [row["fid"] for row in rows])
            for rows in (sizes.where(seed=seed) for seed in claim.seeds)]
    claim.judge("a", "At equal steps the FID falls with the Gflops of a network call, over all patches and widths",
                paper="Gflops and FID of its twelve models are strongly correlated (Fig. 8)",
                rule="Spearman's rank correlation is -0.8 or less in every seed",
                holds=all(r <= -0.8 for r in rank), spearman=rank)
    claim.judge("b", "At equal steps the FIDs are ordered adaLN-Zero < adaLN < cross-attention < in-context",
                paper="the same order (Fig. 5)", holds=ordered(kinds))
    claim.judge("c", "At the length of the default training, patches of 4 have a lower FID than patches of 7",
                paper="smaller patches are better at every size (Fig. 6)",
                holds=long.below("published", LONG, "fid", by="net"))
    claim.note("floor", floor(cfg.n))
    claim.note("change_at_the_start", change_at_the_start(run))
    run.output(plot_start, claim.notes["change_at_the_start"], "start.png")
    run.output(plot_gates, gates_over_training(path), "gates.png")
    run.output(plot_attention, attention_maps(run), "attention.png")
    run.output(save_grid, same_noise(run), "sizes.png", columns=10, across=range(10), down=cfg.sizes)
    return claim.finish(plot=plot, n=cfg.n)


LONG = "patch 7, as long"                              # the arm of (c): the published network but for its patches


def ordered(kinds):
    """(b): the FID of every kind is below that of the next."""
    return all(kinds.below(a, b, "fid") for a, b in zip(KINDS, KINDS[1:]))


def spearman(x, y):
    """Rank correlation of two lists without ties."""
    ranks = [[sorted(values).index(value) for value in values] for values in (x, y)]
    return statistics.correlation(*map(list, ranks)) if len(x) > 1 else 0.0


# ------------------------------------------------------------------ what is measured
def parts(size):
    """Patch and width of a size such as "4/64"."""
    patch, dim = size.split("/")
    return int(patch), int(dim)


def of_size(size):
    """The keys of train.py for a size such as "4/64"."""
    patch, dim = parts(size)
    return [f"dit.patch={patch}", f"dit.dim={dim}"]


def measure(run, weights, arm, seed):
    """The scores of an arm, its Gflops and parameters."""
    process, dit = load(run, weights), weights.config["dit"]
    return {**scores(run, process, seed), "gflops": gflops(dit.dim, dit.depth, dit.patch, dit.conditioning),
            "parameters": sum(p.numel() for p in process[1].parameters())}


def draw_long(run, net, seed):
    """The scores of one of the two networks of (c)."""
    return scores(run, load(run, published(run, LONG) if net == "published" else arm_weights(run, LONG)), seed)


def scores(run, process, seed):
    """The scores of the ten digits drawn in turn. process: as `load` gives it."""
    (ddpm, net, null), cfg = process, run.config.reproduce
    c = wanted("", cfg.n, null).to(run.device)
    found = score(draw(ddpm, net, c, null, cfg.sample_steps, 1.0, seeded(seed)).cpu(), c.cpu())
    return {key: found[key] for key in KEYS if key in found}


def gflops(dim, depth, patch, conditioning="adaln-zero", side=28, channels=1):
    """Gflops of one network call for one image. A multiplication with its addition counts as one, as in the paper."""
    n, d = (side // patch) ** 2, dim
    m = n + 2 * (conditioning == "in-context")         # tokens in a block
    block = 12 * m * d ** 2 + 2 * m ** 2 * d           # four and eight matrices a token; tokens with tokens, twice
    block += {"adaln-zero": 6, "adaln": 4}.get(conditioning, 0) * d ** 2
    if conditioning == "cross-attention":
        block += 2 * m * d ** 2 + 4 * d ** 2 + 4 * m * d            # q and out; k and v of two tokens; the maps
    ends = 3 * n * d * channels * patch ** 2 + 256 * d + d ** 2 + 2 * d ** 2 * conditioning.startswith("adaln")
    return (depth * block + ends) / 1e9


# ------------------------------------------------------------------ what is behind it
@torch.no_grad()
def change_at_the_start(run, depth=12):
    """How much the tokens are changed by 1, 2, ... blocks that have learned nothing: |x_i - x_0| / |x_0| by kind."""
    torch.manual_seed(0)
    patch, dim = parts(run.config.reproduce.kinds_size)
    x = patchify(digits("test").first(16)[0], patch) @ torch.randn(patch ** 2, dim) / patch
    x, emb = x + sincos_2d(dim, 28 // patch, 28 // patch).float(), 0.02 * torch.randn(16, 2, dim)
    result = {}
    for kind in KINDS:
        tokens, result[kind] = torch.cat([x, emb], 1) if kind == "in-context" else x, []
        for _ in range(depth):
            tokens = Block(dim, run.config.dit.heads, kind)(tokens, emb)
            result[kind].append(float((tokens[:, :x.shape[1]] - x).norm() / x.norm()))
    return result


def gates_over_training(path):
    """The lines of metrics.jsonl that hold gates, of the long training of (c)."""
    lines = (path.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "gate_mlp_0" in line]


@torch.no_grad()
def attention_maps(run, t=300):
    """A noised test digit and, for each block and head, how much its middle token looks at each patch."""
    ddpm, net, _ = load(run, published(run, LONG))
    x0, c = (part[:1].to(run.device) for part in digits("test").first(1))
    t = torch.full_like(c, t * ddpm.timesteps // 1000)
    x, maps = ddpm.q_sample(x0, t, torch.randn(x0.shape, generator=seeded(0)).to(x0)), []
    hooks = [block.attention.register_forward_pre_hook(lambda layer, args: maps.append(layer.weights(*args)[0][0]))
             for block in net.blocks]
    net(x, t, c)
    for hook in hooks:
        hook.remove()
    side = int(maps[0].shape[1] ** 0.5)
    return x[0, 0].cpu(), [m[:, m.shape[1] // 2].float().cpu().unflatten(1, (side, side)) for m in maps]


def same_noise(run):
    """Ten digits from the same noise, a row for each size."""
    cfg, rows = run.config.reproduce, []
    for size in cfg.sizes:
        ddpm, net, null = load(run, arm_weights(run, size))
        c = wanted("", 10, null).to(run.device)
        rows.append(draw(ddpm, net, c, null, cfg.sample_steps, 1.0, seeded(7)).cpu())
    return torch.cat(rows)


# ------------------------------------------------------------------ pictures
def plot(claim, path):
    """Does the FID follow the Gflops, and which conditioning is best?"""
    fig, (left, right) = figure(1, 2, width=4.3, height=3.5)
    for i, patch in enumerate(sorted({parts(size)[0] for size in claim.cfg.sizes})):
        rows = [claim.rows.where(arm=size) for size in claim.cfg.sizes if parts(size)[0] == patch]
        left.plot([one[0]["gflops"] for one in rows], [one.mean("fid") for one in rows], "-", color=f"C{i}", lw=1,
                  label=f"patch {patch}")
        for row in (row for one in rows for row in one):
            left.plot(row["gflops"], row["fid"], "o", color=f"C{i}", ms=4)
    left.set(xscale="log", xlabel="Gflops of a network call", ylabel=f"FID (n = {claim.cfg.n})", ylim=(0, None),
             title=f"(a) after {claim.cfg.steps} steps; on a line: width 32, 64, 96")
    ticks(left.xaxis, [0.0003, 0.001, 0.003, 0.01, 0.03])
    left.legend(fontsize=8, loc="lower left")
    left.grid(alpha=0.3)
    dots(right, type(claim.rows)(row for row in claim.rows if row.get("arm") in KINDS), "fid")
    right.tick_params("x", labelsize=8)
    right.margins(y=0.15)
    right.set(ylabel=f"FID (n = {claim.cfg.n})", ylim=(0, None),
              title=f"(b) after {claim.cfg.kinds_steps} steps, patch/width {claim.cfg.kinds_size}")
    return save_figure(fig, path)


def plot_start(change, path):
    """What do blocks do that have learned nothing?"""
    fig, ax = figure(width=5.6)
    for kind, values in change.items():
        ax.plot(range(1, len(values) + 1), values, "o-", ms=3, label=kind)
    ax.set(xlabel="blocks", ylabel="change of the tokens")
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3)
    return save_figure(fig, path)


def plot_gates(lines, path):
    """Which blocks open their gates, and when?"""
    fig, axes = figure(1, 2, width=4.2)
    for ax, part in zip(axes, ("attention", "mlp")):
        for i in range(sum(key.startswith(f"gate_{part}_") for key in lines[-1])):
            ax.plot([line["step"] for line in lines], [line[f"gate_{part}_{i}"] for line in lines], label=f"block {i}")
        ax.set(xlabel="training step", ylabel="mean |gate|", title=part)
        ax.locator_params("x", nbins=5)
        ax.legend(fontsize=8)
        ax.grid(alpha=0.3)
    return save_figure(fig, path)


def plot_attention(found, path):
    """What does the middle token look at? Left the input, then the heads; blocks from top to bottom."""
    x, maps = found
    fig, axes = figure(len(maps), 1 + len(maps[0]), width=1.3, height=1.4)
    for i, (row, heads) in enumerate(zip(axes, maps)):
        row[0].imshow(x, cmap="gray")
        row[0].set_ylabel(f"block {i}", fontsize=8)
        for j, (ax, head) in enumerate(zip(row[1:], heads)):
            ax.imshow(head, cmap="magma", vmin=0)
            ax.plot(head.shape[1] // 2, head.shape[0] // 2, "c+", ms=6)
            ax.set_title(f"head {j}", fontsize=8)
        for ax in row:
            ax.set(xticks=[], yticks=[])
    return save_figure(fig, path)


if __name__ == "__main__":
    cli(main)
