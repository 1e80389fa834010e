"""Measure what cross-attention to a class needs and what it is worth: the trap, the accuracy, the plain baseline.

    python reproduce.py publish=true      all arms, three seeds; writes results/claim.json and results/claim.png
    python reproduce.py quick=true        a look at it, no verdict
    python reproduce.py unet.channels=48  other values for all arms; without publish=true to runs/claim

LDM makes no claim about digits; these are the lesson's own, written down before the numbers. Two notes on how they
came about. (b): a network of 2,300 training steps missed it, with 300 samples a seed; the training was made longer and
the samples more, the limit stayed. (c): a first run with 200 steps an arm was stopped after four of nine: accuracy 0.40
with four tokens, 0.33 with one, 0.11 for what is added to the time, then a table of zeros in front of trained layers.
The table became random codes with a projection that starts at zero, as attention has it, and the arms got 600 steps:
0.82, 0.72 and 0.40, all three far from the end. Now they have 1500 steps. The criterion stayed.

Measured without a verdict: held-out errors, the entropy of the attention weights, and what guidance trades.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

import train
from model import DDPM, Attention, CrossAttention, Level, UNet, initialised
from sample import draw
from utils import (
    Arm,
    Claim,
    classify,
    cli,
    digits,
    dots,
    fid_to_test,
    figure,
    floor,
    published,
    save_figure,
    seeded,
)


class TimeUNet(UNet):
    """The plain alternative: the class is one vector, added to the time's embedding; nothing attends to anything.

    As W_O does, its projection starts at 0: at first nothing changes.
    """

    def __init__(self, classes=10, tokens=1, context=64, **unet):
        super().__init__(classes, 1, context, **unet)
        self.classes = nn.Sequential(self.classes, initialised(nn.Linear(context, self.width), zero=True))

    def level(self, c_in, c_out, attend):
        """A residual block alone."""
        return Level(self.block(c_in, c_out))

    def bottom(self, c):
        """Lesson 05's."""
        return Level(self.block(c, c), Attention(c, self.groups), self.block(c, c))

    def forward(self, x, t, c):
        """x (B, C, H, W), t (B,) int, c (B,) int -> the predicted noise, (B, C, H, W)."""
        return self.body(x, self.embed(t) + self.classes(c)[:, 0])


FOUR, ONE, TIME = "four tokens", "one token", "added to the time"
ARMS = {FOUR: ["unet.tokens=4"], ONE: ["unet.tokens=1"], TIME: Arm(UNet=TimeUNet)}


def main(argv=None):
    claim = Claim(__file__, argv, sections=("unet", "ddpm"))
    run, cfg = claim.run, claim.cfg
    rows = claim.arms(ARMS, train=train.main, load=load, measure=measure,
                      keys=[f"steps={cfg.steps}", f"precision={cfg.precision}"])
    asked = claim.each(ask, [{"w": 1.0, "seed": seed} for seed in claim.seeds]
                       + [{"w": w, "seed": 0} for w in (0.0, 2.0, 4.0)])
    claim.exact("a1", "With one token a class, no W_Q and no W_K of a trained network gets a gradient; every W_V does",
                holds=trapped(rows), largest_gradient=largest(rows, ONE))
    claim.judge("a2", "With four tokens a class, every W_Q, W_K and W_V of a trained network gets a gradient",
                rule="in every layer of every seed", holds=learning(rows), largest_gradient=largest(rows, FOUR))
    claim.judge("b", "Asked for a digit, the published network draws it in at least 95 % of the samples",
                rule="in every sampling seed", holds=draws_it(asked), accuracy=asked.values("accuracy", w=1.0))
    for letter, arm, what in (("c1", TIME, "the class added to the time"), ("c2", ONE, "one token a class")):
        claim.judge(letter, f"With {what}, the digit asked for is drawn at most 0.02 less often than with four tokens",
                    rule="by the means over the seeds", holds=as_accurate(rows, arm),
                    accuracy={name: rows.mean("accuracy", arm=name) for name in (FOUR, arm)})
    claim.note("floor", floor(cfg.full_n))
    run.output(attention_maps, load(run, published(run, FOUR)), "attention.png")
    return claim.finish(plot=plot)


def gradients(rows, arm):
    """The largest gradient of W_Q, W_K and W_V of every cross-attention, in all seeds: a list of threes."""
    return [layer for row in rows.where(arm=arm) for layer in row["gradients"] or [[math.nan] * 3]]     # it diverged


def largest(rows, arm):
    """The same over all layers and seeds."""
    return dict(zip(("W_Q", "W_K", "W_V"), map(max, zip(*gradients(rows, arm)))))


def trapped(rows):
    """(a1): exactly zero for queries and keys in every layer and seed, and not for values."""
    return all(q == 0 and k == 0 and v > 0 for q, k, v in gradients(rows, ONE))


def learning(rows):
    """(a2): nowhere zero."""
    return all(q > 0 and k > 0 and v > 0 for q, k, v in gradients(rows, FOUR))


def draws_it(asked):
    """(b): without guidance, in every sampling seed."""
    return min(asked.values("accuracy", w=1.0)) >= 0.95


def as_accurate(rows, arm):
    """(c1), (c2): an arm's mean accuracy is at most 0.02 below that of four tokens; one that diverged has none."""
    return rows.mean("accuracy", arm=FOUR) - 0.02 <= rows.mean("accuracy", arm=arm) < math.inf


# ------------------------------------------------------------------ what is measured
def load(run, weights, UNet=UNet):
    """Process and network of a weights file; the same network once more, in fp32 whatever the run's precision."""
    net, exact = (weights.load(UNet(**weights.config["unet"])) for _ in range(2))
    return *run.place(DDPM(**weights.config["ddpm"]), net), exact.to(run.device).eval()


def measure(run, ddpm, net, exact, arm, seed):
    """An arm's accuracy, and what `heldout` finds."""
    cfg, null = run.config.reproduce, 10                # MNIST has ten classes; the next number is none
    c = (torch.arange(cfg.n) % null).to(run.device)
    digit, _ = classify(draw(ddpm, net, c, null, cfg.sample_steps, 1.0, seeded(seed)))
    return {"accuracy": float((digit == c.cpu()).float().mean()),
            **heldout(ddpm, exact, null, cfg.heldout, run.device)}


def ask(run, w, seed):
    """The published network, asked for all digits in turn with guidance w: accuracy, FID, network calls an image.

    Accuracy is the share of samples in which the label judge reads the digit asked for.
    """
    weights, steps = published(run, FOUR), run.config.sample.steps
    ddpm, net, _ = load(run, weights)
    c = torch.arange(run.config.reproduce.full_n) % 10
    x = draw(ddpm, net, c.to(run.device), weights.config["unet"].classes, steps, w, seeded(seed))
    hit = (classify(x)[0] == c).float()
    return {"accuracy": float(hit.mean()), "fid": fid_to_test(x), "network_calls": steps * (1 if w in (0, 1) else 2),
            "by_digit": [float(hit[c == k].mean()) for k in range(10)]}


def heldout(ddpm, net, null, n, device, batch=100):
    """The error of the predicted noise on n test images, and what their gradients and attention weights look like.

    Times are spread evenly, and times and noise are the same for every network. Returns the errors with the class and
    without, the largest gradient of W_Q, W_K and W_V of every cross-attention, and the mean entropy of its weights in
    units of log L (1: all tokens alike; one token: 0).
    """
    generator = seeded(0)
    x0, c = digits("test").first(n)
    t = torch.linspace(0, ddpm.timesteps - 1, n).round().long()[torch.randperm(n, generator=generator)]
    xt = ddpm.q_sample(x0.to(device), t.to(device), eps := torch.randn(x0.shape, generator=generator).to(device))
    parts = list(zip(xt.split(batch), t.to(device).split(batch), c.to(device).split(batch), eps.split(batch)))
    with torch.no_grad():
        errors = [[float(F.mse_loss(net(xt, t, label), eps)) * len(xt) / n for label in (c, torch.full_like(c, null))]
                  for xt, t, c, eps in parts]
    xt, t, c, eps = parts[0]
    layers, entropy = [layer for layer in net.modules() if isinstance(layer, CrossAttention)], []
    for weights in weights_at(net, xt, t, c):
        of_all = -(weights * weights.clamp(min=1e-12).log()).sum(3).mean()
        entropy.append(round(float(of_all) / math.log(max(weights.shape[3], 2)), 4) + 0.0)
    net.zero_grad()
    F.mse_loss(net(xt, t, c), eps).backward()
    gradients = [[float(w.weight.grad.abs().max()) for w in (m.q, m.k, m.v)] for m in layers]
    with_class, without = (sum(column) for column in zip(*errors))
    return {"error": with_class, "error_without_class": without, "gradients": gradients, "entropy": entropy,
            "parameters": sum(p.numel() for p in net.parameters())}


@torch.no_grad()
def weights_at(net, xt, t, c):
    """The attention weights of every cross-attention in one call of the network: a list of (B, heads, H W, L)."""
    found, layers = [], [layer for layer in net.modules() if isinstance(layer, CrossAttention)]
    hooks = [layer.register_forward_pre_hook(lambda layer, inputs: found.append(layer.weights(*inputs).float()))
             for layer in layers]
    net(xt, t, c)
    for hook in hooks:
        hook.remove()
    return found


# ------------------------------------------------------------------ what is drawn
def plot(claim, path):
    """Who gets a gradient, who draws the digit asked for; below, what guidance gives and what it takes."""
    fig, ((left, right), below) = figure(2, 2, width=4.4)
    for i, arm in enumerate((FOUR, ONE)):
        values = [1e5 * value for value in largest(claim.rows, arm).values()]
        left.bar([x + 0.4 * i for x in range(3)], values, 0.38, label=arm)
        for x, value in enumerate(values):
            left.annotate("0" if value == 0 else f"{value:.1f}", (x + 0.4 * i, value), ha="center", va="bottom",
                          fontsize=8)
    left.set_xticks([0.2, 1.2, 2.2], ["$W_Q$", "$W_K$", "$W_V$"])
    left.set(ylabel="largest gradient, in 1/100,000", title="(a) one token: no gradient")
    left.margins(y=0.1)
    left.legend(fontsize=8)
    dots(right, claim.rows, "accuracy")
    four = claim.rows.mean("accuracy", arm=FOUR)
    if four < math.inf:
        right.axhspan(four - 0.02, four, color="grey", alpha=0.15, lw=0)
    right.set(ylabel=f"accuracy (n = {claim.cfg.n})", title=f"(c) after {claim.cfg.steps:,} steps of training")
    weights = sorted(claim.rows.by("w", "accuracy", seed=0))
    for ax, key, name in zip(below, ("accuracy", "fid"), ("accuracy", "FID")):
        ax.plot(weights, [claim.rows.mean(key, w=w, seed=0) for w in weights], "o-")
        ax.set(xlabel="guidance weight w", ylabel=f"{name} (n = {claim.cfg.full_n:,})", title=f"guidance: {name}",
               xticks=weights, ylim=(0, None))
        ax.grid(alpha=0.3)
    left.grid(alpha=0.3)
    return save_figure(fig, path)


def attention_maps(network, path):
    """Test images of five classes in noise, and beside each where the last layer looks at each token of its class."""
    ddpm, _, net = network
    device = ddpm.abar.device
    x0, labels = digits("test").first(1000)
    x0 = torch.stack([x0[labels == k][0] for k in range(10)]).to(device)
    t = torch.full((10,), ddpm.timesteps // 3, device=device)
    xt = ddpm.q_sample(x0, t, torch.randn(x0.shape, generator=seeded(3)).to(device))
    found = weights_at(net, xt, t, torch.arange(10, device=device))
    maps = found[-1].mean(1).cpu()                      # (10, H W, L): the mean of the heads
    side, shown = round(maps.shape[1] ** 0.5), (0, 1, 3, 7, 8)
    fig, axes = figure(len(shown), 1 + maps.shape[2], 1.4, 1.4)
    for row, k in zip(axes, shown):
        row[0].imshow(xt[k, 0].cpu(), cmap="gray")
        row[0].set_ylabel(f"asked for {k}", fontsize=10)
        for i, ax in enumerate(row[1:]):
            drawn = ax.imshow(maps[k, :, i].view(side, side), cmap="magma", vmin=0, vmax=1)
    for ax, title in zip(axes[0], ("digit in noise", *(f"token {i + 1}" for i in range(maps.shape[2])))):
        ax.set_title(title, fontsize=10)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    fig.colorbar(drawn, ax=axes, label="weight of the token", shrink=0.6, ticks=(0, 0.5, 1))
    return save_figure(fig, path)


if __name__ == "__main__":
    cli(main)
