"""Measure the claims of DiT again: quality follows Gflops, and adaLN-Zero is the best way to let the condition in.

    python reproduce.py publish=true      all of it, three seeds; writes results/claim.json and the pictures
    python reproduce.py quick=true        a look at it, no verdict
    python reproduce.py n=2048 steps=2000 other values; without publish=true to runs/claim

The criteria were written down before any number was seen. The arms of (a), and those of (b), have the same depth,
learning rate, batches and number of steps, and three training seeds. FID of n samples drawn with plain conditional
sampling. Steps and batches were set after short trainings of adaLN-Zero alone. They showed that for its first 100,000
images a DiT with patches of 4 hardly looks beyond the patch: the arms are shorter than that, hence (c).

(a) At equal steps the FID falls with the Gflops of a network call. Sizes "patch/width" with patches of 14, 7, 4 and 2
    pixels and widths 32, 64 and 96, less the dearest (patch 2 at 64 and 96) and 14/96: Spearman's rank correlation of
    Gflops and FID over all sizes is -0.8 or less in every seed.
(b) At one size the FIDs are ordered adaLN-Zero < adaLN < cross-attention < in-context: each is below the next in every
    seed, and by more than 3 pooled standard deviations over the seeds. The paper compares them at equal steps, not at
    equal Gflops; so does this.
(c) (a) at the length of the default training, for one step of it: at the published network's width and steps, the
    published FID (patch 4) is below that of patches of 7, in each of three sampling seeds and by more than 3 pooled
    standard deviations over them. One training each.
"""

import json
import statistics
import time

import torch

import train
from model import KINDS, Block, patchify, sincos_2d
from sample import draw, load, wanted
from utils import (
    Run,
    Weights,
    cli,
    deviation,
    digits,
    figure,
    floor,
    parallel,
    pooled,
    save_figure,
    save_grid,
    save_json,
    score,
    seeded,
    trained,
    verdict,
)

KEYS = ("fid", "accuracy", "precision", "recall")


def main(argv=None):
    run = Run(__file__, argv)
    cfg, start = run.config.reproduce, time.perf_counter()
    run.open_folder("claim")
    sizes = {size: (size, KINDS[0], cfg.steps) for size in cfg.sizes}
    kinds = {kind: (cfg.kinds_size, kind, cfg.kinds_steps) for kind in KINDS}
    arms = [(*arm, seed) for seed in range(cfg.seeds) for arm in dict.fromkeys((*kinds.values(), *sizes.values()))]
    rows = {}
    for arm, row in zip(arms, parallel(measure, [(run.argv, *arm) for arm in arms], cfg.workers)):
        rows[arm] = row
        run.say("{1} {0}, {2} steps, seed {3}: ".format(*arm) + "  ".join(f"{k} {v:.4f}" for k, v in row.items()))
    claim = {"gflops": scaling({size: collect(rows, arm, cfg.seeds) for size, arm in sizes.items()}),
             "kinds": order({kind: collect(rows, arm, cfg.seeds) for kind, arm in kinds.items()}),
             "long": longer(run)}
    for part in claim.values():
        part["verdict"] = verdict(part["holds"], cfg)
    claim |= {"n": cfg.n, "steps": cfg.steps, "kinds_steps": cfg.kinds_steps, "batch_size": cfg.batch_size,
              "sample_steps": cfg.sample_steps, "kinds_size": cfg.kinds_size, "floor": floor(cfg.n),
              "change_at_the_start": change_at_the_start(run), "minutes": round((time.perf_counter() - start) / 60, 1)}
    run.say(text(claim))
    run.output(save_json, claim, "claim.json")
    run.output(plot, claim, "claim.png")
    run.output(plot_start, claim["change_at_the_start"], "start.png")
    run.output(plot_gates, gates_over_training(run), "gates.png")
    run.output(plot_attention, attention_maps(run), "attention.png")
    run.output(save_grid, same_noise(run), "sizes.png", columns=10)
    run.record("claim", minutes=claim["minutes"], n=cfg.n, **{
        name: claim[name]["verdict"] for name in ("gflops", "kinds", "long")})
    return claim


# ------------------------------------------------------------------ arms
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


def parts(size):
    """Patch and width of a size such as "4/64"."""
    patch, dim = size.split("/")
    return int(patch), int(dim)


def train_arm(argv, size, kind, steps, seed):
    """The weights of an arm: trained, or taken from an earlier call. steps 0: as the published network."""
    run = Run(__file__, argv)
    cfg, folder, (patch, dim) = run.config.reproduce, run.open_folder("claim"), parts(size)
    own = [a for a in argv if a.split("=")[0].split(".")[0] in ("dit", "ddpm", "train", "gpu", "device", "smoke")]
    length = [f"steps={steps}", f"batch_size={cfg.batch_size}", f"warmup={cfg.warmup}", "save_every=0"] if steps else [
        f"steps={cfg.long_steps}"]
    return trained(train.main, folder / f"{kind}_{patch}_{dim}_{steps}_{seed}", [
        *own, f"dit.patch={patch}", f"dit.dim={dim}", f"dit.conditioning={kind}", f"seed={seed}", *length,
        "preview_every=0"], run.lesson)


def measure(argv, size, kind, steps, seed):
    """Train an arm, draw with it: its scores, Gflops and parameters."""
    path = train_arm(argv, size, kind, steps, seed)
    run = Run(__file__, argv)
    weights = Weights(path, run.name)
    process, dit = load(run, weights), weights.config["dit"]
    return {**scores(run, process, seed), "gflops": gflops(dit.dim, dit.depth, dit.patch, dit.conditioning),
            "parameters": sum(p.numel() for p in process[1].parameters())}


def scores(run, process, seed):
    """The scores of the ten digits drawn in turn. process: as `load` gives it."""
    (ddpm, net, null), cfg = process, run.config.reproduce
    c = wanted("", cfg.n, null).to(run.device)
    found = score(draw(ddpm, net, c, null, ddpm.times(cfg.sample_steps), 1.0, seeded(seed)).cpu(), c.cpu())
    return {key: found[key] for key in KEYS if key in found}


def collect(rows, arm, seeds):
    """The scores of an arm as lists over its seeds; its Gflops and parameters as they are."""
    arm = [rows[*arm, seed] for seed in range(seeds)]
    return {key: [row[key] for row in arm] if key in KEYS else arm[0][key] for key in arm[0]}


# ------------------------------------------------------------------ verdicts
def spearman(x, y):
    """Rank correlation of two lists without ties."""
    ranks = [[sorted(values).index(value) for value in values] for values in (x, y)]
    return statistics.correlation(*map(list, ranks)) if len(x) > 1 else 0.0


def scaling(sizes):
    """(a): Spearman of Gflops and FID for every seed."""
    flops = [row["gflops"] for row in sizes.values()]
    rank = [spearman(flops, list(fids)) for fids in zip(*(row["fid"] for row in sizes.values()))]
    return {"spearman": rank, "sizes": sizes, "holds": all(r <= -0.8 for r in rank)}


def clearly(low, high):
    """Whether `high` is above `low` in every seed, and by more than three pooled standard deviations."""
    gaps = [b - a for a, b in zip(low, high)]
    return min(gaps) > 0 and statistics.mean(gaps) > 3 * pooled(low, high)


def order(kinds):
    """(b): is the FID of each kind clearly below that of the next?"""
    fids = {kind: row["fid"] for kind, row in kinds.items()}
    steps = {f"{a} < {b}": clearly(fids[a], fids[b]) for a, b in zip(KINDS, KINDS[1:])}
    return {"arms": kinds, "steps": steps, f"{KINDS[0]} < {KINDS[-1]}": clearly(fids[KINDS[0]], fids[KINDS[-1]]),
            "holds": all(steps.values())}


def longer(run):
    """(c): the published network and one with larger patches, trained alike; the scores of three sampling seeds."""
    size = run.config.reproduce.long_size
    larger = load(run, Weights(train_arm(run.argv, size, KINDS[0], 0, 0), run.name))
    arms = {"published": published(run), size: larger}
    rows = {name: [scores(run, process, seed) for seed in range(run.config.reproduce.seeds)]
            for name, process in arms.items()}
    rows = {name: {key: [one[key] for one in found] for key in found[0]} for name, found in rows.items()}
    return {"arms": rows, "holds": clearly(*(row["fid"] for row in rows.values()))}


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


def gates_over_training(run):
    """The lines of metrics.jsonl that hold gates, of the long training of (c)."""
    path = train_arm(run.argv, run.config.reproduce.long_size, KINDS[0], 0, 0)
    lines = (path.parent / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "gate_mlp_0" in line]


def published(run):
    """Process, network and null class of the published network, for want of one of an arm."""
    path = run.lesson / "results" / "weights.safetensors"
    if run.config.reproduce.smoke or not path.exists():
        path = train_arm(run.argv, run.config.reproduce.long_size, KINDS[0], 0, 0)
    return load(run, Weights(path, run.name))


@torch.no_grad()
def attention_maps(run, t=300):
    """A noised test digit and, for each block and head, how much its middle token looks at each patch."""
    ddpm, net, _ = published(run)
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
        ddpm, net, null = load(run, Weights(train_arm(run.argv, size, KINDS[0], cfg.steps, 0), run.name))
        c = wanted("", 10, null).to(run.device)
        rows.append(draw(ddpm, net, c, null, ddpm.times(cfg.sample_steps), 1.0, seeded(7)).cpu())
    return torch.cat(rows)


# ------------------------------------------------------------------ what is printed and drawn
def text(claim):
    """The tables with their verdicts."""
    def line(name, row):
        cost = f"{row['gflops']:.4f} Gflops {row['parameters']:>7} parameters   " if "gflops" in row else ""
        return f"    {name:<16} {cost}" + "   ".join(
            f"{key} {statistics.mean(row[key]):.3f} +- {deviation(row[key]):.3f}" for key in KEYS if key in row)

    lines = ["", f"n = {claim['n']}, {claim['sample_steps']} sampling steps, floor {claim['floor']:.3f}",
             f"(a) Gflops, {claim['steps']} training steps: {claim['gflops']['verdict']}",
             f"    Spearman {claim['gflops']['spearman']}"]
    lines += [line(size, row) for size, row in claim["gflops"]["sizes"].items()]
    lines += [f"(b) kinds at {claim['kinds_size']}, {claim['kinds_steps']} training steps: {claim['kinds']['verdict']}",
              f"    {claim['kinds']['steps']}"]
    lines += [line(kind, row) for kind, row in claim["kinds"]["arms"].items()]
    lines += [f"(c) the default training: {claim['long']['verdict']}"]
    lines += [line(name, row) for name, row in claim["long"]["arms"].items()]
    return "\n".join(lines)


def plot(claim, path):
    """Does the FID follow the Gflops, and which conditioning is best?"""
    fig, (left, right) = figure(1, 2, width=5.2, height=3.8)
    patches = sorted({parts(size)[0] for size in claim["gflops"]["sizes"]})
    for i, patch in enumerate(patches):
        rows = [row for size, row in claim["gflops"]["sizes"].items() if parts(size)[0] == patch]
        left.plot([row["gflops"] for row in rows], [statistics.mean(row["fid"]) for row in rows], "-", color=f"C{i}",
                  lw=1, label=f"patch {patch}")
        for row in rows:
            left.plot([row["gflops"]] * len(row["fid"]), row["fid"], "o", color=f"C{i}", ms=4)
    left.set(xscale="log", yscale="log", xlabel="Gflops of a network call", ylabel=f"FID (n = {claim['n']})",
             title=f"(a) after {claim['steps']} steps; on a line: width 32, 64, 96")
    left.legend(fontsize=8)
    for i, (kind, row) in enumerate(claim["kinds"]["arms"].items()):
        right.plot([i] * len(row["fid"]), row["fid"], "o", ms=5, color=f"C{i}")
    right.set(xticks=range(len(KINDS)), xticklabels=KINDS, ylabel=f"FID (n = {claim['n']})", yscale="log",
              title=f"(b) after {claim['kinds_steps']} steps, patch/width {claim['kinds_size']}")
    for ax in (left, right):
        ax.grid(alpha=0.3, which="both")
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
