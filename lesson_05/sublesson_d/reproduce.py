"""Measure LDM's transformer block against lesson 05c's layers.

    python reproduce.py publish=true      all arms, three seeds; writes results/claim.json and results/claim.png
    python reproduce.py quick=true        a look at it, no verdict
    python reproduce.py unet.tokens=8     other values for all arms; without publish=true to runs/claim

No paper makes these claims; they are the lesson's own, written down before the numbers. The arms: the transformer
block; lesson 05c's layers (self-attention, cross-attention) in the same place; and lesson 05c's layers in as many
places as it takes to have as many parameters (the numbers are printed). All arms begin with lesson 05's convolutions
and with attention that has learned nothing; same steps, same batches.
"""

import math
import time

import torch
import torch.nn.functional as F

import train
from model import DDPM, CrossAttention, SpatialTransformer, UNet
from sample import draw
from utils import Arm, Claim, classify, cli, digits, dots, figure, published, save_figure, seeded


class CrossUNet(UNet):
    """The network with lesson 05c's layers: those that `UNet` inherits, and replaces by transformers."""

    def cross(self, channels):
        """Cross-attention alone."""
        return super(UNet, self).cross(channels)

    def bottom(self, c):
        """Self-attention, then cross-attention."""
        return super(UNet, self).bottom(c)


BLOCK, SAME_PLACE, EQUAL = "transformer", "05c's layers, same place", "05c's layers, as many parameters"


def main(argv=None):
    claim = Claim(__file__, argv, sections=("unet", "ddpm"))
    run, cfg = claim.run, claim.cfg
    arms = {BLOCK: [], SAME_PLACE: Arm(UNet=CrossUNet),
            EQUAL: Arm([f"unet.attention={cfg.equal_attention}"], UNet=CrossUNet)}
    rows = claim.arms(arms, train=train.main, load=load, measure=measure,
                      keys=[f"steps={cfg.steps}", f"precision={cfg.precision}"])
    change = identity(run)
    claim.exact("a", "In a fresh network every block returns its input, for random images and contexts",
                holds=change == 0, largest_difference=change)
    claim.judge("b", "The block's error on test images is below that of lesson 05c's layers with as many parameters",
                holds=rows.below(BLOCK, EQUAL, "error"))
    claim.judge("c", "With the block, the digit asked for is drawn at most 0.02 less often than with those layers",
                rule="by the means over the seeds", holds=as_accurate(rows),
                accuracy={arm: rows.mean("accuracy", arm=arm) for arm in (BLOCK, EQUAL)})
    network = load(run, published(run, BLOCK))
    run.output(block_diagram, network, "block.png")
    run.output(attention_maps, network, "attention.png")
    return claim.finish(plot=plot)


def as_accurate(rows):
    """(c): the block's mean accuracy is at most 0.02 below that of as many parameters; one that diverged has none."""
    return rows.mean("accuracy", arm=EQUAL) - 0.02 <= rows.mean("accuracy", arm=BLOCK) < math.inf


# ------------------------------------------------------------------ what is measured
# Copied from lesson_05/sublesson_c/reproduce.py: load
def load(run, weights, UNet=UNet):
    """Process and network of a weights file; the same network once more, in fp32 whatever the run's precision."""
    net, exact = (weights.load(UNet(**weights.config["unet"])) for _ in range(2))
    return *run.place(DDPM(**weights.config["ddpm"]), net), exact.to(run.device).eval()


# Copied from lesson_05/sublesson_c/reproduce.py: measure
def measure(run, ddpm, net, exact, arm, seed):
    """An arm's accuracy, and what `heldout` finds."""
    cfg, null = run.config.reproduce, 10                # MNIST has ten classes; the next number is none
    c = (torch.arange(cfg.n) % null).to(run.device)
    digit, _ = classify(draw(ddpm, net, c, null, cfg.sample_steps, 1.0, seeded(seed)))
    return {"accuracy": float((digit == c.cpu()).float().mean()),
            **heldout(ddpm, exact, null, cfg.heldout, run.device)}


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
    clock = time.process_time if xt.device.type == "cpu" else time.perf_counter         # `float` waits for a GPU
    start = clock()
    errors = [[float(F.mse_loss(net(xt, t, label), eps)) * len(xt) / n for label in (c, torch.full_like(c, null))]
              for xt, t, c, eps in parts]
    with_class, without = (sum(column) for column in zip(*errors))
    return {"error": with_class, "error_without_class": without, "parameters": sum(p.numel() for p in net.parameters()),
            "forward_ms": 1000 * (clock() - start) / (2 * n)}


@torch.no_grad()
def identity(run):
    """The largest change that any block of a fresh network makes to its input."""
    largest = 0.0
    for seed in range(3):
        torch.manual_seed(seed)
        for block in UNet(**{**run.config.unet, "classes": 10}).modules():
            if isinstance(block, SpatialTransformer):
                x = torch.randn(4, block.enter.in_channels, 7, 7)
                context = torch.randn(4, run.config.unet.tokens, run.config.unet.context)
                largest = max(largest, float((block(x, context) - x).abs().max()))
    return largest


# ------------------------------------------------------------------ what is drawn
def plot(claim, path):
    """Two answers: who predicts the noise of test images better, and who draws the digit asked for."""
    fig, axes = figure(1, 2, width=5)
    names = {row["arm"]: f"{row['arm'].replace(', ', ',' + chr(10))}\n{row['parameters']:,}" for row in claim.rows}
    for ax, key, title in zip(axes, ("error", "accuracy"), ("(b) held-out error of the noise", "(c) accuracy")):
        dots(ax, claim.rows, key, names=names)
        ax.set(title=title)
        ax.tick_params(axis="x", labelsize=8)
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
    ddpm, _, net = network
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
    """The block from top to bottom: arrows for what flows, arcs for the sums, and the shapes of a batch of ten."""
    _, block, inputs = example(network)
    context, seen = None, []
    for what, shape in steps_of(block, *inputs):
        context, seen = (shape, seen) if what == "context" else (context, [*seen, (what, shape)])
    fig, ax = figure(1, 1, 6.2, 0.52 * len(seen))
    arrow = {"arrowstyle": "-|>", "color": "0.3", "shrinkA": 0, "shrinkB": 0}
    before = {"self-attention, + x": 2, "cross-attention, + x": 2, "a gelu(b), back, + x": 3,
              "1 x 1 (starts at 0), + x": len(seen) - 1}
    for i, (what, shape) in enumerate(seen):
        colour = "C1" if "attention" in what else "C2" if "GEGLU" in what or "gelu" in what else "C0"
        ax.text(0.42, -i, what, ha="center", va="center", bbox={"boxstyle": "round", "fc": colour, "alpha": 0.25})
        ax.text(0.98, -i, str(shape), ha="right", va="center", family="monospace", fontsize=9)
        if i:
            ax.annotate("", (0.42, -i + 0.3), (0.42, -i + 0.7), arrowprops=arrow)
        if what in before:                              # from where the part began, past it, to the sum
            ends, bend = ((0.28, -i), (0.42, -i + before[what] - 0.5)), 0.1 if before[what] < 4 else 0.24
            left = ends[0][0] - bend
            ax.plot([ends[1][0], left, left], [ends[1][1], ends[1][1], -i], color="0.3", lw=1)
            ax.annotate("", ends[0], (left, -i), arrowprops=arrow)
        if "cross" in what:
            ax.text(0.72, -i + 0.9, f"context\n{context}", ha="center", va="center", fontsize=9,
                    bbox={"boxstyle": "round", "fc": "C1", "alpha": 0.1})
            ax.annotate("", (0.56, -i), (0.65, -i + 0.55), arrowprops=arrow)
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
    side, shown = round(own.shape[1] ** 0.5), (0, 1, 3, 7, 8)
    centre = side // 2
    fig, axes = figure(len(shown), 2 + cross.shape[2], 1.3, 1.35)
    for row, k in zip(axes, shown):
        row[0].imshow(xt[k, 0].cpu(), cmap="gray")
        row[0].set_ylabel(f"asked for {k}", fontsize=10)
        looks = row[1].imshow(own[k, centre * side + centre].view(side, side), cmap="viridis", vmin=0, vmax=0.06)
        row[1].plot(centre, centre, "x", color="white")
        for i, ax in enumerate(row[2:]):
            seen = ax.imshow(cross[k, :, i].view(side, side), cmap="magma", vmin=0, vmax=1)
    titles = "digit in noise", "middle looks at", *(f"token {i + 1}" for i in range(cross.shape[2]))
    for ax, title in zip(axes[0], titles):
        ax.set_title(title, fontsize=10)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    for drawn, columns, label, ticks in ((looks, axes[:, :2], "weight of a position", (0, 0.03, 0.06)),
                                         (seen, axes[:, 2:], "weight of the token", (0, 0.5, 1))):
        fig.colorbar(drawn, ax=columns, label=label, ticks=ticks, location="bottom", shrink=0.7)
    return save_figure(fig, path)


if __name__ == "__main__":
    cli(main)
