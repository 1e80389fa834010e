"""Measure what cross-attention to a class needs and what it is worth: the trap, the accuracy, the plain baseline.

    python reproduce.py publish=true      all arms, three seeds; writes results/claim.json and results/claim.png
    python reproduce.py quick=true        a look at it, no verdict
    python reproduce.py unet.channels=48  other values for all arms; without publish=true to runs/claim

LDM makes no claim about digits; these are the lesson's own, written down before the numbers.

(a) The trap. In trained networks, all seeds: with one token a class the gradient of every W_Q and W_K is exactly 0,
    and that of every W_V is not; with four tokens none of the three is 0 in any layer.
(b) Asked for a digit, the published network draws it: the label judge agrees in at least 95 % of the samples,
    in each of three sampling seeds, at w = 1. (A network of 2,300 training steps missed it, with 300 samples a seed;
    the training was made longer and the samples more, the limit stayed.)
(c) Attention is not needed for ten labels: added to the time embedding, the class is drawn as accurately. The mean
    accuracy over the seeds is at most 0.02 below that of four tokens, and so it is for one token.
    A first run with 200 steps an arm was stopped after four of nine: accuracy 0.40 with four tokens, 0.33 with one,
    0.11 for what is added to the time, then a table of zeros in front of trained layers. Too young to compare: the
    table became random codes with a projection that starts at zero, as attention has it, and the arms got 600 steps:
    0.82, 0.72 and 0.40, all three far from the end. Now they have 1500 steps.
    The criterion stayed.
"""

import math
import statistics
import time

import torch
import torch.nn.functional as F

import train
from model import DDPM, CrossAttention, UNet
from sample import draw
from utils import (
    Run,
    Weights,
    classify,
    cli,
    deviation,
    digits,
    fid_to_test,
    figure,
    floor,
    parallel,
    save_figure,
    save_json,
    seeded,
    trained,
    verdict,
)

ARMS = {"four tokens": ["unet.tokens=4"], "one token": ["unet.tokens=1"], "added to the time": ["unet.condition=time"]}


def main(argv=None):
    run = Run(__file__, argv)
    cfg = run.config.reproduce
    start = time.perf_counter()
    run.open_folder("claim")
    rows = []
    for row in parallel(measure, [(run.argv, arm, seed) for seed in range(cfg.seeds) for arm in ARMS], cfg.workers):
        run.say("{arm:18} seed {seed}: accuracy {accuracy:.3f}   held-out error {error:.5f}".format(**row))
        rows.append(row)
    claim = {"trap": trap(rows), **full(run), "baseline": baseline(rows)}
    for name in ("trap", "accuracy", "baseline"):
        claim[name]["verdict"] = verdict(claim[name]["holds"], cfg)
    claim |= {"n": cfg.n, "sample_steps": cfg.sample_steps, "heldout": cfg.heldout,
              "train_steps": cfg.steps, "rows": rows, "minutes": round((time.perf_counter() - start) / 60, 1)}
    run.say(text(claim))
    run.output(save_json, claim, "claim.json")
    run.output(plot, claim, "claim.png")
    run.output(attention_maps, published(run), "attention.png")
    run.record("claim", **{key: value for key, value in claim.items() if key != "rows"})
    return claim


# ------------------------------------------------------------------ the arms
def measure(argv, arm, seed):
    """Train one arm (or take it from an earlier call); its accuracy, held-out error, gradients and entropies."""
    run = Run(__file__, argv)
    cfg, folder = run.config.reproduce, run.open_folder("claim")
    own = [a for a in argv if a.split("=")[0].split(".")[0] in ("unet", "ddpm", "train", "gpu", "device", "smoke")]
    path = trained(train.main, folder / f"{arm.replace(' ', '_')}_{seed}", [
        *own, *ARMS[arm], f"seed={seed}", f"steps={cfg.steps}", "preview_every=0", f"precision={cfg.precision}"],
        run.lesson)
    ddpm, net, null = load(run, path)
    c = (torch.arange(cfg.n) % null).to(run.device)
    digit, _ = classify(draw(ddpm, net, c, null, cfg.sample_steps, 1.0, seeded(seed)))
    return {"arm": arm, "seed": seed, "accuracy": float((digit == c.cpu()).float().mean()),
            **heldout(*load(run, path, exact=True), cfg.heldout, run.device)}


def load(run, path, exact=False):
    """Process, network and the number of "no class" of a weights file; exact: in fp32, whatever the run's precision."""
    weights = Weights(path, run.name)
    ddpm, net = DDPM(**weights.config["ddpm"]), weights.load(UNet(**weights.config["unet"]))
    if exact:
        return ddpm.to(run.device), net.to(run.device).eval(), weights.config["unet"].classes
    return *run.place(ddpm, net), weights.config["unet"].classes


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


# ------------------------------------------------------------------ (a) the trap, (c) the baseline
def trap(rows):
    """Whether criterion (a) holds, and the largest gradients over layers and seeds."""
    of = {arm: [layer for row in rows if row["arm"] == arm for layer in row["gradients"]] for arm in ARMS}
    one = all(q == 0 and k == 0 and v > 0 for q, k, v in of["one token"])
    four = all(q > 0 and k > 0 and v > 0 for q, k, v in of["four tokens"])
    largest = {arm: dict(zip(("W_Q", "W_K", "W_V"), map(max, zip(*layers)))) for arm, layers in of.items() if layers}
    entropy = {arm: [e for row in rows if row["arm"] == arm for e in row["entropy"]] for arm in largest}
    return {"largest_gradient": largest, "entropy": {arm: [min(e), max(e)] for arm, e in entropy.items()},
            "holds": one and four}


def baseline(rows):
    """Means and deviations of the arms, and whether criterion (c) holds."""
    table = {}
    for arm in ARMS:
        of_arm = [row for row in rows if row["arm"] == arm]
        table[arm] = {"parameters": of_arm[0]["parameters"]}
        for key in ("accuracy", "error", "error_without_class"):
            values = [row[key] for row in of_arm]
            table[arm] |= {f"{key}_mean": round(statistics.mean(values), 5),
                           f"{key}_std": round(deviation(values), 5)}
    least = table["four tokens"]["accuracy_mean"] - 0.02
    return {"arms": table, "holds": all(arm["accuracy_mean"] >= least for arm in table.values())}


# ------------------------------------------------------------------ (b) the published network
def published(run):
    """The lesson's published network; in smoke mode, or where there is none, the first arm."""
    path = run.lesson / "results" / "weights.safetensors"
    if run.config.reproduce.smoke or not path.exists():
        path = max(run.folder.glob("four_tokens_0/**/weights.safetensors"))
        run.say(f"the network of (b) is {path.parent}")
    return load(run, path)


def full(run):
    """Accuracy of the published network in every sampling seed, (b); and, as a look without a claim, under guidance.

    Accuracy is the share of samples in which the label judge reads the digit asked for.
    """
    cfg, steps = run.config.reproduce, run.config.sample.steps
    jobs = [(run.argv, seed, 1.0) for seed in range(cfg.seeds)] + [(run.argv, 0, w) for w in (0.0, 2.0, 4.0)]
    c = torch.arange(cfg.full_n) % 10
    hits, guided = [], {}
    for (_, seed, w), (digit, value) in zip(jobs, parallel(drawn, jobs, cfg.workers)):
        hits += [(digit == c).float()] * (w == 1)
        if seed == 0:
            guided[f"{w:g}"] = {"accuracy": float((digit == c).float().mean()), "fid": value,
                                "network_calls": steps * (1 if w in (0, 1) else 2)}
    values, by_digit = [float(h.mean()) for h in hits], [float(torch.cat([h[c == k] for h in hits]).mean())
                                                         for k in range(10)]
    return {"accuracy": {"seeds": values, "by_digit": [round(value, 4) for value in by_digit], "n": cfg.full_n,
                         "steps": steps, "holds": min(values) >= 0.95},
            "guidance": {"weights": dict(sorted(guided.items())), "n": cfg.full_n, "floor": floor(cfg.full_n)}}


def drawn(argv, seed, w):
    """Samples of the published network for all digits in turn: what the judge reads, (n,), and their FID."""
    run = Run(__file__, argv)
    cfg, _ = run.config.reproduce, run.open_folder("claim")
    ddpm, net, null = published(run)
    c = (torch.arange(cfg.full_n) % 10).to(run.device)
    x = draw(ddpm, net, c, null, run.config.sample.steps, w, seeded(seed))
    return classify(x)[0], fid_to_test(x)


# ------------------------------------------------------------------ what is printed and drawn
def text(claim):
    """The tables with their verdicts."""
    lines = ["", f"(a) the trap: {claim['trap']['verdict']}   (largest gradient over layers and seeds)"]
    lines += [f"    {arm:18} " + "   ".join(f"{name} {value:.2e}" for name, value in row.items())
              for arm, row in claim["trap"]["largest_gradient"].items()]
    lines += [f"(b) accuracy: {claim['accuracy']['verdict']}   (n = {claim['accuracy']['n']} a seed)",
              "    " + "  ".join(f"{value:.3f}" for value in claim["accuracy"]["seeds"]),
              f"(c) the baseline: {claim['baseline']['verdict']}   (n = {claim['n']} a seed)"]
    lines += [f"    {arm:18} accuracy {row['accuracy_mean']:.3f} +- {row['accuracy_std']:.3f}   "
              f"error {row['error_mean']:.5f} +- {row['error_std']:.5f} (no class: "
              f"{row['error_without_class_mean']:.5f})   "
              f"{row['parameters']:,} parameters" for arm, row in claim["baseline"]["arms"].items()]
    lines += [f"guidance (n = {claim['guidance']['n']}, floor {claim['guidance']['floor']:.2f})"]
    lines += [f"    w = {w:4} accuracy {row['accuracy']:.3f}   FID {row['fid']:.2f}"
              for w, row in claim["guidance"]["weights"].items()]
    return "\n".join(lines)


def plot(claim, path):
    """Three answers: who gets a gradient, who draws the digit asked for, and what guidance trades."""
    fig, (left, middle, right) = figure(1, 3, width=4.2)
    for i, (arm, row) in enumerate(claim["trap"]["largest_gradient"].items()):
        values = list(row.values())
        left.bar([x + 0.4 * i for x in range(3)], values, 0.38, label=arm)
        for x, value in enumerate(values):
            left.annotate("0" if value == 0 else f"{value:.0e}", (x + 0.4 * i, value), ha="center", va="bottom",
                          fontsize=8)
    left.set_xticks([0.2, 1.2, 2.2], ["$W_Q$", "$W_K$", "$W_V$"])
    left.set(ylabel="largest gradient", title="(a) one token: no gradient")
    left.legend(fontsize=8)
    for i, (arm, row) in enumerate(claim["baseline"]["arms"].items()):
        middle.errorbar(i, row["accuracy_mean"], row["accuracy_std"], fmt="o", capsize=4)
        middle.plot([i + 0.12] * len(claim["rows"][i::3]), [r["accuracy"] for r in claim["rows"][i::3]], "k.", ms=4)
    middle.axhline(0.95, color="grey", ls=":", lw=1)
    middle.set_xticks(range(3), list(claim["baseline"]["arms"]), fontsize=8)
    middle.set(ylabel=f"accuracy (n = {claim['n']})", title=f"(c) {claim['train_steps']} steps of training")
    weights = claim["guidance"]["weights"]
    right.plot([float(w) for w in weights], [row["accuracy"] for row in weights.values()], "o-", color="C0")
    right.set(xlabel="guidance weight w", title="guidance: accuracy (blue), FID (orange)")
    right.set_ylabel("accuracy", color="C0")
    other = right.twinx()
    other.plot([float(w) for w in weights], [row["fid"] for row in weights.values()], "s--", color="C1")
    other.set_ylabel(f"FID (n = {claim['guidance']['n']})", color="C1")
    for ax in (left, middle, right):
        ax.grid(alpha=0.3)
    return save_figure(fig, path)


def attention_maps(network, path):
    """A test image of each class in noise, and under it where the last layer looks at each token of its class."""
    ddpm, net, null = network
    device = ddpm.abar.device
    x0, labels = digits("test").first(1000)
    x0 = torch.stack([x0[labels == k][0] for k in range(10)]).to(device)
    t = torch.full((10,), ddpm.timesteps // 3, device=device)
    xt = ddpm.q_sample(x0, t, torch.randn(x0.shape, generator=seeded(3)).to(device))
    found = weights_at(net, xt, t, torch.arange(10, device=device))
    maps = found[-1].mean(1).cpu()                      # (10, H W, L): the mean of the heads
    side = round(maps.shape[1] ** 0.5)
    fig, axes = figure(1 + maps.shape[2], 10, 0.9, 0.9)
    for k in range(10):
        axes[0, k].imshow(xt[k, 0].cpu(), cmap="gray")
        for i in range(maps.shape[2]):
            axes[1 + i, k].imshow(maps[k, :, i].view(side, side), cmap="magma", vmin=0, vmax=1)
    for ax in axes.flat:
        ax.set_axis_off()
    return save_figure(fig, path)


if __name__ == "__main__":
    cli(main)
