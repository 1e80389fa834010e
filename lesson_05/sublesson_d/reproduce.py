"""Measure LDM's transformer block against lesson 05c's layers.

    python reproduce.py publish=true      all arms, three seeds; writes results/claim.json and results/claim.png
    python reproduce.py quick=true        a look at it, no verdict
    python reproduce.py unet.tokens=8     other values for all arms; without publish=true to runs/claim

No paper makes these claims; they are the lesson's own, written down before the numbers. The arms: the transformer
block; lesson 05c's layers (self-attention, cross-attention) in the same place; and lesson 05c's layers in as many
places as it takes to have as many parameters (the numbers are printed). All arms begin with lesson 05's convolutions
and with attention that has learned nothing; same steps, same batches.

(a) Identity. In a fresh network, for random images and contexts and three seeds, every block returns its input:
    the largest difference is exactly 0.
(b) The block lowers the error of the predicted noise on test images: against as many parameters it is lower in every
    seed, and the gap of the means is above 3 pooled standard deviations over the seeds.
(c) It costs no accuracy: the mean share of samples in which the label judge reads the digit asked for is at most
    0.02 below that of as many parameters.
"""

import statistics
import time

import torch
import torch.nn.functional as F

import train
from model import DDPM, CrossAttention, SpatialTransformer, UNet
from sample import draw
from utils import (
    Run,
    Weights,
    classify,
    cli,
    deviation,
    digits,
    figure,
    parallel,
    pooled,
    save_figure,
    save_json,
    seeded,
    trained,
    verdict,
)

ARMS = BLOCK, SAME_PLACE, EQUAL = "transformer", "05c's layers, same place", "05c's layers, as many parameters"


def main(argv=None):
    run = Run(__file__, argv)
    cfg = run.config.reproduce
    start = time.perf_counter()
    run.open_folder("claim")
    rows = []
    arms = [(run.argv, arm, seed) for seed in range(cfg.seeds) for arm in ARMS]
    for row in parallel(measure, arms, cfg.workers):
        run.say("{arm:34} seed {seed}: held-out error {error:.5f}   accuracy {accuracy:.3f}".format(**row))
        rows.append(row)
    claim = {"identity": identity(run), **compare(rows)}
    for part in claim.values():
        part["verdict"] = verdict(part["holds"], cfg)
    claim |= {"arms": table(rows), "n": cfg.n, "sample_steps": cfg.sample_steps, "heldout": cfg.heldout,
              "train_steps": cfg.steps, "rows": rows, "minutes": round((time.perf_counter() - start) / 60, 1)}
    run.say(text(claim))
    run.output(save_json, claim, "claim.json")
    run.output(plot, claim, "claim.png")
    network = published(run)
    run.output(block_diagram, network, "block.png")
    run.output(attention_maps, network, "attention.png")
    run.record("claim", **{key: value for key, value in claim.items() if key != "rows"})
    return claim


# ------------------------------------------------------------------ (a) the start
@torch.no_grad()
def identity(run):
    """The largest change that any block of a fresh network makes to its input."""
    largest = 0.0
    for seed in range(3):
        torch.manual_seed(seed)
        for block in UNet(**run.config.unet).modules():
            if isinstance(block, SpatialTransformer):
                x = torch.randn(4, block.enter.in_channels, 7, 7)
                context = torch.randn(4, run.config.unet.tokens, run.config.unet.context)
                largest = max(largest, float((block(x, context) - x).abs().max()))
    return {"largest_difference": largest, "holds": largest == 0}


# ------------------------------------------------------------------ (b), (c) the arms
def measure(argv, arm, seed):
    """Train one arm (or take it from an earlier call); its held-out errors, accuracy, size and speed."""
    run = Run(__file__, argv)
    cfg, folder = run.config.reproduce, run.open_folder("claim")
    own = [a for a in argv if a.split("=")[0].split(".")[0] in ("unet", "ddpm", "train", "gpu", "device", "smoke")]
    layers = [] if arm == BLOCK else ["unet.block=attention"]
    layers += [f"unet.attention={cfg.equal_attention}"] if arm == EQUAL else []
    path = trained(train.main, folder / f"arm{ARMS.index(arm)}_{seed}", [
        *own, *layers, f"seed={seed}", f"steps={cfg.steps}", "preview_every=0", f"precision={cfg.precision}"],
        run.lesson)
    ddpm, net, null = load(run, path)
    c = (torch.arange(cfg.n) % null).to(run.device)
    digit, _ = classify(draw(ddpm, net, c, null, cfg.sample_steps, 1.0, seeded(seed)))
    return {"arm": arm, "seed": seed, "accuracy": float((digit == c.cpu()).float().mean()),
            **heldout(*load(run, path, exact=True), cfg.heldout, run.device)}


# Copied from lesson_05/sublesson_c/reproduce.py: load
def load(run, path, exact=False):
    """Process, network and the number of "no class" of a weights file; exact: in fp32, whatever the run's precision."""
    weights = Weights(path, run.name)
    ddpm, net = DDPM(**weights.config["ddpm"]), weights.load(UNet(**weights.config["unet"]))
    if exact:
        return ddpm.to(run.device), net.to(run.device).eval(), weights.config["unet"].classes
    return *run.place(ddpm, net), weights.config["unet"].classes


# Adapted from lesson_05/sublesson_c/reproduce.py: heldout -- errors only, and the time of a call
@torch.no_grad()
def heldout(ddpm, net, null, n, device, batch=100):
    """The error of the predicted noise on n test images, with the class and without; milliseconds an image.

    Times are spread evenly, and times and noise are the same for every network.
    """
    generator = seeded(0)
    x0, c = digits("test").first(n)
    t = torch.linspace(0, ddpm.timesteps - 1, n).round().long()[torch.randperm(n, generator=generator)]
    xt = ddpm.q_sample(x0.to(device), t.to(device), eps := torch.randn(x0.shape, generator=generator).to(device))
    parts = list(zip(xt.split(batch), t.to(device).split(batch), c.to(device).split(batch), eps.split(batch)))
    start = time.process_time()
    errors = [[float(F.mse_loss(net(xt, t, label), eps)) * len(xt) / n for label in (c, torch.full_like(c, null))]
              for xt, t, c, eps in parts]
    with_class, without = (sum(column) for column in zip(*errors))
    return {"error": with_class, "error_without_class": without, "parameters": sum(p.numel() for p in net.parameters()),
            "forward_ms": 1000 * (time.process_time() - start) / (2 * n)}


def table(rows):
    """Means and deviations of every arm."""
    arms = {}
    for arm in ARMS:
        of_arm = [row for row in rows if row["arm"] == arm]
        arms[arm] = {"parameters": of_arm[0]["parameters"], "forward_ms": min(row["forward_ms"] for row in of_arm)}
        for key in ("error", "error_without_class", "accuracy"):
            values = [row[key] for row in of_arm]
            arms[arm] |= {f"{key}_mean": round(statistics.mean(values), 6), f"{key}_std": round(deviation(values), 6)}
    return arms


def compare(rows):
    """Criteria (b) and (c): the transformer against lesson 05c's layers with as many parameters."""
    ours, theirs = ({key: [row[key] for row in rows if row["arm"] == arm] for key in ("error", "accuracy")}
                    for arm in (BLOCK, EQUAL))
    gap = statistics.mean(theirs["error"]) - statistics.mean(ours["error"])
    spread = pooled(ours["error"], theirs["error"])
    every = all(a < b for a, b in zip(ours["error"], theirs["error"]))
    lost = statistics.mean(theirs["accuracy"]) - statistics.mean(ours["accuracy"])
    return {"error": {"gap": gap, "pooled_std": spread, "lower_in_every_seed": every,
                      "holds": every and gap > 3 * spread},
            "accuracy": {"lost": lost, "holds": lost <= 0.02}}


def published(run):
    """The lesson's published network; in smoke mode, or where there is none, the first arm."""
    path = run.lesson / "results" / "weights.safetensors"
    if run.config.reproduce.smoke or not path.exists():
        path = max(run.folder.glob("arm0_0/**/weights.safetensors"))
        run.say(f"the network of the pictures is {path.parent}")
    return load(run, path, exact=True)


# ------------------------------------------------------------------ what is printed and drawn
def text(claim):
    """The tables with their verdicts."""
    lines = ["", f"(a) identity at the start: {claim['identity']['verdict']}   "
                 f"largest difference {claim['identity']['largest_difference']:g}",
             f"(b) held-out error: {claim['error']['verdict']}   gap {claim['error']['gap']:.6f}, pooled deviation "
             f"{claim['error']['pooled_std']:.6f}, lower in every seed: {claim['error']['lower_in_every_seed']}",
             f"(c) accuracy: {claim['accuracy']['verdict']}   (n = {claim['n']} a seed)"]
    lines += [f"    {arm:34} error {row['error_mean']:.5f} +- {row['error_std']:.5f}   accuracy "
              f"{row['accuracy_mean']:.3f} +- {row['accuracy_std']:.3f}   {row['parameters']:,} parameters   "
              f"{row['forward_ms']:.2f} ms an image" for arm, row in claim["arms"].items()]
    return "\n".join(lines)


def plot(claim, path):
    """Two answers: who predicts the noise of test images better, and who draws the digit asked for."""
    fig, axes = figure(1, 2, width=5)
    labels = [f"{arm.replace(', ', ',' + chr(10))}\n{row['parameters']:,}" for arm, row in claim["arms"].items()]
    for ax, key, title in zip(axes, ("error", "accuracy"), ("(b) held-out error of the noise", "(c) accuracy")):
        for i, (arm, row) in enumerate(claim["arms"].items()):
            ax.errorbar(i, row[f"{key}_mean"], row[f"{key}_std"], fmt="o", capsize=4)
            values = [r[key] for r in claim["rows"] if r["arm"] == arm]
            ax.plot([i + 0.12] * len(values), values, "k.", ms=4)
        ax.set_xticks(range(3), labels, fontsize=8)
        ax.set_xlim(-0.4, 2.5)
        ax.set_title(title)
        ax.grid(alpha=0.3)
    return save_figure(fig, path)


def steps_of(block, x, context):
    """(what, shape of its output) of every layer of a spatial transformer as it runs, in order."""
    seen, hooks = [("x", tuple(x.shape)), ("context", tuple(context.shape))], []
    names = {"norm": "GroupNorm", "enter": "1 x 1", "norm1": "LayerNorm", "attn1": "self-attention, + x",
             "norm2": "LayerNorm", "attn2": "cross-attention, + x", "norm3": "LayerNorm",
             "enter ff": "a and b of GEGLU", "leave ff": "a gelu(b), back, + x", "leave": "1 x 1 (starts at 0), + x"}
    for name, layer in block.named_modules():
        key = name.split(".")[-1] + (" ff" if ".ff." in name else "")
        if key in names:
            hooks.append(layer.register_forward_hook(
                lambda layer, inputs, y, key=key: seen.append((names[key], tuple(y.shape)))))
    block(x, context)
    for hook in hooks:
        hook.remove()
    return seen


def example(network):
    """A test image of each class in noise a third of the way up, and what the last transformer is called with."""
    ddpm, net, _ = network
    device = ddpm.abar.device
    x0, labels = digits("test").first(1000)
    x0 = torch.stack([x0[labels == k][0] for k in range(10)]).to(device)
    t = torch.full((10,), ddpm.timesteps // 3, device=device)
    xt = ddpm.q_sample(x0, t, torch.randn(x0.shape, generator=seeded(3)).to(device))
    block = [m for m in net.modules() if isinstance(m, SpatialTransformer)][-1]
    called = []
    hook = block.register_forward_pre_hook(lambda block, inputs: called.append(inputs))
    with torch.no_grad():
        net(xt, t, torch.arange(10, device=device))
    hook.remove()
    return xt, block, called[0]


@torch.no_grad()
def block_diagram(network, path):
    """The block from top to bottom, with the shapes that a batch of ten has on its way."""
    _, block, inputs = example(network)
    seen = steps_of(block, *inputs)
    fig, ax = figure(1, 1, 5, 0.36 * len(seen))
    for i, (what, shape) in enumerate(seen):
        colour = "C1" if "attention" in what else "C2" if "GEGLU" in what or "gelu" in what else "C0"
        ax.text(0.3, -i, what, ha="center", va="center", bbox={"boxstyle": "round", "fc": colour, "alpha": 0.25})
        ax.text(0.75, -i, str(shape), ha="center", va="center", family="monospace")
    ax.set(xlim=(0, 1), ylim=(-len(seen) + 0.4, 0.6))
    ax.set_axis_off()
    return save_figure(fig, path)


@torch.no_grad()
def attention_maps(network, path):
    """Where a position in the middle looks (self-attention), and where each token of the class is looked at (cross)."""
    xt, block, inputs = example(network)
    called = {}
    layer = block.blocks[-1]
    hooks = [m.register_forward_pre_hook(lambda m, given: called.__setitem__(m, m.weights(*given).mean(1).cpu()))
             for m in layer.modules() if isinstance(m, CrossAttention)]
    block(*inputs)
    for hook in hooks:
        hook.remove()
    own, cross = called[layer.attn1], called[layer.attn2]                       # (10, H W, H W) and (10, H W, L)
    side = round(own.shape[1] ** 0.5)
    centre = (side // 2) * side + side // 2
    fig, axes = figure(2 + cross.shape[2], 10, 0.9, 0.9)
    for k in range(10):
        axes[0, k].imshow(xt[k, 0].cpu(), cmap="gray")
        axes[1, k].imshow(own[k, centre].view(side, side), cmap="viridis", vmin=0)
        for i in range(cross.shape[2]):
            axes[2 + i, k].imshow(cross[k, :, i].view(side, side), cmap="magma", vmin=0, vmax=1)
    for ax in axes.flat:
        ax.set_axis_off()
    return save_figure(fig, path)


if __name__ == "__main__":
    cli(main)
