"""Measure the claims of the Stable Diffusion 3 paper again: which times to train at, what the loss tells, two streams.

    python reproduce.py publish=true      all arms, three seeds; writes results/claim.json and the pictures
    python reproduce.py quick=true        a look at it, no verdict
    python reproduce.py steps=3000        other values; without publish=true to runs/claim

The criteria, in `judge`, were written down before the numbers were seen. The arms are short trainings of one small
network (section `reproduce`), alike in everything that is not named; the learning rate was chosen with the logit-normal
one, for all. Samples are drawn with the captions of test images, without guidance, by Euler's method from the same
noise for all. The validation loss is of test images, at evenly spaced t in [0, 1]. CrossDiT, the opponent in (c), takes
text by cross-attention, and its tokens never change. It has blocks as many as make the parameters equal within 3 %; the
same steps favour it, for it computes more. (d) asks the published network, guided as in `sample`, for triples of digit,
thickness and slant; of twenty, training had no image and no caption.

Measured without a verdict: (d) with encoders left out, the loss by t, the attention between the streams; and, added
after a first run in which (c) failed, a CrossDiT of as many blocks as MMDiT, which tells depth from streams.
"""

import functools
import math
import random
import statistics

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import train
from model import DENSITIES, MMDiT, RectifiedFlow, Stream, Times, for_encoders, given, linear, norm
from sample import draw, loaded
from utils import (
    Arm,
    Claim,
    cli,
    device_of,
    dots,
    fid_to_test,
    figure,
    floor,
    lines,
    pooled,
    published,
    save_figure,
    seeded,
    ticks,
)
from utils import captions as text


# ------------------------------------------------------------------ the opponents
class Baseline(RectifiedFlow):
    """The formulations that rectified flow is compared with: x_t = a_t x_0 + b_t n at uniform t in [0, 1].

    form  "eps-linear": predicts n, variance-preserving, linear beta (lesson 05). "v-cosine": predicts a n - b x_0 on a
          cosine. "edm": preconditioned, ln b normal (lesson 20), with all levels twice as high, because the data have
          a deviation of about 1 instead of 0.5
    """

    LEVEL, SPREAD, ENDS = math.log(2) - 1.2, 1.2, (160.0, 0.004)

    def __init__(self, form, **flow):
        super().__init__(**flow)
        if form not in ("eps-linear", "v-cosine", "edm"):
            raise ValueError(f"form={form!r} is none of eps-linear, v-cosine, edm")
        self.form = form

    def coefficients(self, t):
        """a_t and b_t. (B,) float64 -> two (B,)."""
        if self.form == "eps-linear":
            integral = 0.1 * t + 0.5 * (20 - 0.1) * t ** 2                  # of beta, from 0 to t
            return torch.exp(-integral / 2), torch.sqrt(-torch.expm1(-integral))
        if self.form == "v-cosine":
            return torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
        return torch.ones_like(t), torch.exp(self.LEVEL + self.SPREAD * torch.special.ndtri(t))

    def predict(self, net, x, t):
        """The network's output F, and what x_0 = skip x + out F it stands for: F, skip, out, float64."""
        a, b = self.coefficients(t)
        scale, clock = torch.ones_like(t), 1000 * t
        if self.form == "eps-linear":
            skip, out = 1 / a, -b / a
        elif self.form == "v-cosine":
            skip, out = a, -b
        else:
            scale, clock = (1 + b ** 2).rsqrt(), 250 * b.log()              # a quantile would hide the ends
            skip, out = scale ** 2, b * scale
        return net((wide(scale) * x).float(), clock.float()).double(), wide(skip), wide(out)

    def q_sample(self, x0, t, n):
        """x_t, float64: near the data the target divides by a small b."""
        a, b = self.coefficients(t)
        return wide(a) * x0 + wide(b) * n

    def loss_at(self, net, x0, t, n):
        """The squared error of the output that would give x_0 exactly, per image. (B,)."""
        x = self.q_sample(x0, t, n)
        output, skip, out = self.predict(net, x, t)
        return (output - (x0 - skip * x) / out).square().flatten(1).mean(1).float()

    def grid(self, steps):
        """Falling times: even, or for "edm" the times of that paper's noise levels. (steps + 1,) float64."""
        if self.form != "edm":
            return torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        first, last = (end ** (1 / 7) for end in self.ENDS)
        b = torch.linspace(first, last, steps, dtype=torch.float64) ** 7
        return F.pad(torch.special.ndtr((b.log() - self.LEVEL) / self.SPREAD), (0, 1))

    @torch.no_grad()
    def reverse(self, net, n, grid):
        """x_s = a_s x_0 + b_s n with the network's x_0 and n: DDIM's step; Euler's for "edm", as for rectified flow."""
        x = wide(self.coefficients(grid[:1])[1]).to(n.device) * n
        for t, s in zip(grid[:-1], grid[1:]):
            t, s = (one.to(x.device).expand(len(x)) for one in (t, s))
            output, skip, out = self.predict(net, x, t)
            (a, b), (a_s, b_s) = self.coefficients(t), self.coefficients(s)
            x0 = skip * x + out * output
            noise = output if self.form == "eps-linear" else (x - wide(a) * x0) / wide(b)
            x = wide(a_s) * x0 + wide(b_s) * noise
            yield float(t[0]), x.float(), x0.float()


def wide(values):
    """(B,) -> (B, 1, 1, 1) float64."""
    return values.double()[:, None, None, None]


class CrossBlock(nn.Module):
    """The image attends to itself, then to the text, whose tokens never change; then the MLP."""

    def __init__(self, dim, heads, qk_norm=True):
        super().__init__()
        self.image, self.norm = Stream(dim, heads, qk_norm), norm(dim, affine=True)
        self.q, self.kv, self.out = linear(dim, dim), linear(dim, 2 * dim), linear(dim, dim, zero=True)
        self.norm_q, self.norm_k = (nn.RMSNorm(dim // heads, eps=1e-6) if qk_norm else nn.Identity() for _ in "qk")

    def forward(self, x, context, emb):
        """x (B, N, D), context (B, L, D), emb (B, 2, D) -> x, context."""
        qkv, rest = self.image.enter(x, emb)
        x = self.image.attended(x, F.scaled_dot_product_attention(*qkv), rest)
        q = rearrange(self.q(self.norm(x)), "b n (h d) -> b h n d", h=self.image.heads)
        k, v = rearrange(self.kv(context), "b n (k h d) -> k b h n d", k=2, h=self.image.heads)
        h = F.scaled_dot_product_attention(self.norm_q(q), self.norm_k(k), v)
        x = x + self.out(rearrange(h, "b h n d -> b n (h d)"))
        return self.image.think(x, rest), context


class CrossDiT(MMDiT):
    """The same network around other blocks, one and a half times as many: as many parameters."""

    more = 1.5

    def __init__(self, *args, dim, depth, heads, qk_norm=True, **kwargs):
        super().__init__(*args, dim=dim, depth=0, heads=heads, qk_norm=qk_norm, **kwargs)
        self.blocks = nn.ModuleList(CrossBlock(dim, heads, qk_norm) for _ in range(int(self.more * depth)))


class ShallowCrossDiT(CrossDiT):
    """As many blocks as MMDiT: two thirds of the parameters, and about as much computed."""

    more = 1


OURS, UNIFORM, CROSS, SHALLOW = "rf-lognormal", "rf-uniform", "CrossDiT", "CrossDiT, as many blocks"
ARMS = {**{form: Arm(["flow.density=uniform"], RectifiedFlow=functools.partial(Baseline, form))
           for form in ("eps-linear", "v-cosine", "edm")},
        UNIFORM: ["flow.density=uniform"], OURS: [], CROSS: Arm(MMDiT=CrossDiT), SHALLOW: Arm(MMDiT=ShallowCrossDiT)}
FORMS = ("eps-linear", "v-cosine", "edm", UNIFORM, OURS)
ALL = (1, 1, 1)                                        # encoders that see the caption
ASKED = {"held out": (True, ALL, True), "held out, w = 1": (True, ALL, False), "seen": (False, ALL, True),
         "held out, no tokens": (True, (1, 1, 0), True), "held out, tokens only": (True, (0, 0, 1), True)}
TRIPLES = [(digit, a, b) for digit in range(10) for a in range(3) for b in range(3)]


# ------------------------------------------------------------------ the whole of it
def main(argv=None):
    claim = Claim(__file__, argv, sections=("mmdit", "captions"))
    run, cfg = claim.run, claim.cfg
    size = [] if cfg.smoke else [f"mmdit.dim={cfg.dim}", f"mmdit.heads={cfg.heads}"]
    rows = claim.arms({**ARMS, OURS: [f"snapshots={cfg.steps // cfg.snapshots}"]}, train=train.main, measure=measure,
                      keys=[*size, f"steps={cfg.steps}", f"batch_size={cfg.batch_size}"])
    asked = claim.each(ask, captions=list(ASKED), seed=claim.seeds)
    judge(claim, rows, asked)
    claim.note("by_t", by_t(run))
    claim.note("floor", floor(cfg.n))
    run.output(plot_times, claim.notes["by_t"], "times.png")
    run.output(plot_attention, run, "attention.png")
    return claim.finish(plot=plot, n=cfg.n)


def judge(claim, rows, asked):
    """What is claimed. rows, asked: what was measured for (a) to (c), and for (d)."""
    fid, rank = rows.unfold("fid", "steps"), ranks(rows.unfold("fid", "steps"))
    counts, best = sorted({row["steps"] for row in fid}), wins_or_ties(fid)
    claim.judge("a1", "With logit-normal times rectified flow has the lowest FID of five formulations, or ties with "
                "it, at three of four step counts", paper="best of 61 formulations (Table 1)",
                rule="the means over the trainings; a tie is a gap of at most one pooled standard deviation",
                holds=4 * len(best) >= 3 * len(counts), wins_or_ties=best)
    claim.judge("a2", "No other formulation has a better mean rank over the step counts",
                paper="best of 61 formulations by its rank (Table 1)", rule="ranks of the means over the trainings",
                holds=rank[OURS] == min(rank.values()), rank=rank)
    told = {row["seed"]: spearman(row) for row in rows.where(arm=OURS)}
    claim.judge("b", "Over the snapshots of a training the rank correlation of validation loss and FID is at least 0.7",
                paper="a lower validation loss goes with better images (abstract)", rule="in every training",
                holds=all(value >= 0.7 for value in told.values()), spearman=list(told.values()))
    claim.judge("c", "At equal parameters MMDiT has a lower validation loss than CrossDiT",
                paper="a lower loss than DiT, CrossDiT and UViT (Fig. 4)",
                holds=as_large(rows) and rows.below(OURS, CROSS, "validation"))
    claim.judge("d1", "Of combinations that training never had, at least 95 % of the samples have the digit asked for",
                rule="by the mean over the sampling seeds", holds=right(asked, ("accuracy",), 0.95))
    claim.judge("d2", "Of such combinations, thickness and slant are each right in at least 80 % of the samples",
                rule="by the means over the sampling seeds", holds=right(asked, ("thickness", "slant"), 0.8))


def wins_or_ties(fid):
    """(a1): the step counts at which our arm is the lowest, or above the lowest by at most one pooled deviation."""
    found = []
    for steps, ours in fid.by("steps", "fid", arm=OURS).items():
        lowest = min((fid.values("fid", arm=arm, steps=steps) for arm in FORMS), key=statistics.mean)
        gap = statistics.mean(ours) - statistics.mean(lowest)               # 0 if it is ours
        if math.isfinite(gap) and gap <= pooled(ours, lowest):
            found.append(steps)
    return found


def ranks(fid):
    """(a2): the mean over the step counts of every formulation's rank, 1 for the lowest mean FID."""
    counts = sorted({row["steps"] for row in fid})
    mean = {arm: [fid.mean("fid", arm=arm, steps=steps) for steps in counts] for arm in FORMS}
    return {arm: statistics.mean(1 + sum(other[i] < ours[i] for other in mean.values()) for i in range(len(counts)))
            for arm, ours in mean.items()}


def spearman(row):
    """(b): the rank correlation of validation loss and FID over the snapshots of a training."""
    if row.get("diverged"):
        return math.nan
    order = [torch.tensor(list(row[key].values())).argsort().argsort().double()
             for key in ("snapshot_validation", "snapshot_fid")]
    return float(torch.corrcoef(torch.stack(order))[0, 1])


def as_large(rows):
    """(c): both networks have as many parameters, within 3 %."""
    return abs(rows.mean("parameters", arm=OURS) / rows.mean("parameters", arm=CROSS) - 1) < 0.03


def right(asked, keys, share):
    """(d1), (d2): of the samples of held-out captions at least this share is right, for each of the keys."""
    return all(asked.mean(key, captions="held out") >= share for key in keys)


# ------------------------------------------------------------------ (a) to (c): an arm
def measure(run, weights, arm, seed):
    """An arm's FIDs by steps, its validation loss, and of the logit-normal one the same of its snapshots."""
    cfg, names = run.config.reproduce, getattr(ARMS[arm], "names", {})
    process, net, words = loaded(run, weights, **names)
    row = {"parameters": sum(p.numel() for p in net.parameters())}
    if arm in FORMS:
        row["fid"] = {str(steps): fid(process, net, words, steps, cfg.n) for steps in cfg.sample_steps}
    if arm in (OURS, CROSS, SHALLOW):
        row["validation"] = float(validation(net, words, cfg).mean())
    if arm == OURS:
        few, row["snapshot_fid"], row["snapshot_validation"] = min(cfg.sample_steps, key=lambda n: abs(n - 25)), {}, {}
        for one in sorted(weights.path.parent.glob("snapshot_*.safetensors")):
            process, net, words = loaded(run, run.read(one))
            step = str(int(one.stem.split("_")[1]))
            row["snapshot_fid"][step] = fid(process, net, words, few, cfg.n)
            row["snapshot_validation"][step] = float(validation(net, words, cfg).mean())
    return row


def fid(process, net, words, steps, n):
    """FID of n samples of the captions of test images, without guidance; always from the same noise."""
    said = text.captioned("test", limit=n, without_held_out=False).captions
    noise = torch.randn(n, 1, 28, 28, generator=seeded(1))
    return fid_to_test(draw(process, net, words, [one[0] for one in said], noise, process.grid(steps), 1.0))


@torch.no_grad()
def validation(net, words, cfg, levels=None):
    """The loss of rectified flow on test images under their captions at evenly spaced times: (levels,), same noise."""
    data, flow = text.captioned("test", 1, limit=cfg.validation, without_held_out=False), RectifiedFlow()
    x0, generator, losses = data.first(len(data))[0], seeded(2), []
    c = for_encoders(words([one[0] for one in data.captions]), words([""])[0])
    for t in (torch.arange(levels or cfg.levels, dtype=torch.float64) + 0.5) / (levels or cfg.levels):
        n = torch.randn(x0.shape, generator=generator)
        parts = zip(*(one.to(device_of(net)).split(250) for one in (x0, n, c)))
        losses.append(torch.cat([flow.loss_at(given(net, one), x, t.to(x.device).expand(len(x)), eps)
                                 for x, eps, one in parts]).mean().cpu())
    return torch.stack(losses)


# ------------------------------------------------------------------ (d): captions
def network(run):
    """Process, network and words of the published weights; in smoke mode of the first arm."""
    return loaded(run, published(run, OURS))


def ask(run, captions, seed):
    """How the published network follows captions of one of the kinds in ASKED; a seed's noise is the same for all."""
    cfg, how, (kept, encoders, guided) = run.config.reproduce, run.config.sample, ASKED[captions]
    flow, net, words = network(run)
    said = wishes([triple for triple in TRIPLES if bool(text.held_out(*triple)) == kept], cfg.asked, seed)
    noise, w = torch.randn(len(said), 1, 28, 28, generator=seeded(seed)), how.guidance if guided else 1.0
    return text.follow(draw(flow, net, words, said, noise, flow.grid(how.steps), w, encoders), said)


def wishes(triples, n, seed):
    """n captions in random paraphrases that name digit, thickness and slant, the triples taken in turn."""
    rng, texts = random.Random(seed), []
    for digit, thickness, slant in (triples * -(-n // len(triples)))[:n]:
        while len(text.read_caption(one := text.caption(digit, {"thickness": thickness, "slant": slant}, rng))[0]) < 3:
            pass                                       # a paraphrase that leaves a word out
        texts.append(one)
    return texts


# ------------------------------------------------------------------ pictures
def by_t(run):
    """The published network's loss on test images at 20 times."""
    _, net, words = network(run)
    levels = 2 if run.config.reproduce.smoke else 20
    return {"t": [(i + 0.5) / levels for i in range(levels)],
            "loss": validation(net, words, run.config.reproduce, levels).tolist()}


def plot(claim, path):
    """Four answers: FID by steps, FID by validation loss, the validation loss of the networks, captions followed."""
    fig, ((left, middle), (right, last)) = figure(2, 2, width=4.0, height=3.3)
    fid = claim.rows.unfold("fid", "steps")
    lines(left, fid, "steps", "fid")
    left.set(xscale="log", xlabel="steps = network calls", title="(a) which formulation?",
             ylabel=f"FID (n = {claim.cfg.n}; floor {claim.notes['floor']:.2f})")
    ticks(left.xaxis, sorted({row["steps"] for row in fid}))
    for row in claim.rows.where(arm=OURS):
        middle.plot(list(row["snapshot_validation"].values()), list(row["snapshot_fid"].values()), "o-", ms=4, lw=0.7,
                    label=f"training {row['seed'] + 1}")
    middle.set(xlabel="validation loss", ylabel="FID", xscale="log", title="(b) does the loss tell the FID?")
    ticks(middle.xaxis, (0.3, 0.4, 0.6, 1.0))
    middle.legend(fontsize=8)
    middle.grid(alpha=0.3)
    dots(right, claim.rows, "validation", names={OURS: "MMDiT", SHALLOW: f"{CROSS},\nas many blocks"})
    right.set(ylabel="validation loss", title="(c) two streams or one?")
    asked = {"held out": "held out", "seen": "seen", "held out, w = 1": "held out,\nw = 1"}
    for i, key in enumerate(("accuracy", "thickness", "slant")):
        for k, kind in enumerate(asked):
            values = claim.rows.values(key, captions=kind)
            last.plot([k + 0.2 * (i - 1)] * len(values), values, "o", color=f"C{i}", ms=5,
                      label=None if k else {"accuracy": "digit"}.get(key, key))
    last.set_xticks(range(len(asked)), asked.values())
    last.set(ylabel="share right", ylim=(0, 1.04), title="(d) are captions followed?")
    last.legend(fontsize=8, loc="lower left")
    last.grid(alpha=0.3)
    return save_figure(fig, path)


def plot_times(curve, path):
    """Where training looks and where the loss is: densities of t, and the published network's loss."""
    fig, (left, right) = figure(1, 2, width=4.4)
    t = torch.linspace(0.003, 0.997, 400, dtype=torch.float64)
    for density in DENSITIES:
        left.plot(t, Times(density).pdf(t), label=density)
    left.plot(t, Times("logit-normal", mean=0.5).pdf(t), "C1--", lw=1, label="logit-normal(0.5, 1)")
    left.set(xlabel="t (0: data, 1: noise)", ylabel="density", title="which times are trained?")
    left.legend(fontsize=8)
    right.plot(curve["t"], curve["loss"], "o-", ms=3)
    right.set(xlabel="t (0: data, 1: noise)", ylabel="loss on test images", title="where is the loss?", ylim=(0, None))
    for ax in (left, right):
        ax.grid(alpha=0.3)
    return save_figure(fig, path)


@torch.no_grad()
def plot_attention(run, path):
    """The joint attention of every block, mean over heads and 64 test images at t = 0.5; a row shows where it looks."""
    _, net, words = network(run)
    x0 = text.digits("test").first(64)[0].to(run.device)
    said = ["a thick seven leaning right"] * len(x0)
    c = for_encoders(words(said), words([""])[0]).to(run.device)
    half, n = torch.full((len(x0),), 0.5, device=x0.device), torch.randn(x0.shape, generator=seeded(3)).to(x0)
    maps = []

    def look(block, inputs):
        q, k, _ = block.enter(*inputs)[0]
        maps.append(torch.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[3]), dim=3).mean((0, 1)).cpu())

    hooks = [block.register_forward_pre_hook(look) for block in net.blocks]
    net(RectifiedFlow().q_sample(x0, half, n), 1000 * half, c)
    for hook in hooks:
        hook.remove()
    fig, axes = figure(math.ceil(len(maps) / 2), 2, width=4.2, height=4.3)
    length = c.shape[2]
    names = ["start", *said[0].split()]
    for i, (ax, one) in enumerate(zip(axes.flat, maps)):
        ax.imshow(one.clamp(min=1e-4).log10(), vmin=-3.5, vmax=-0.5, cmap="viridis")
        ax.axhline(length - 0.5, color="white", lw=1)
        ax.axvline(length - 0.5, color="white", lw=1)
        share = one[length:, :length].sum(1).mean()
        ax.set_title(f"block {i + 1}: image gives text {100 * share:.0f} %", fontsize=11)
        places = [(length - 1) / 2, (length + len(one) - 1) / 2]
        ax.set_xticks(places, [f"text\n{len(names)} words, padding", "image, 49 patches"], fontsize=9)
        ax.set_yticks(places, ["text", "image"], rotation=90, va="center", fontsize=9)
        ax.set(xlabel="is seen" if i >= len(maps) - 2 else None, ylabel=None if i % 2 else "looks")
    return save_figure(fig, path)


if __name__ == "__main__":
    cli(main)
