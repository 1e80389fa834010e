"""Measure the claims of the Stable Diffusion 3 paper again: which times to train at, what the loss tells, two streams.

    python reproduce.py publish=true      all arms, three seeds; writes results/claim.json and the pictures
    python reproduce.py quick=true        a look at it, no verdict
    python reproduce.py steps=3000        other values; without publish=true to runs/claim

The criteria were written down before the numbers were seen. The arms are short trainings of one small network (section
`reproduce`), alike in everything that is not named; the learning rate was chosen with the logit-normal one, for all.
Samples are drawn with the captions of test images, without guidance, by Euler's method from the same noise for all.

(a) Formulations: noise prediction on a linear schedule, v on a cosine, EDM, rectified flow with uniform and with
    logit-normal(0, 1) times; FID at 5, 10, 25 and 50 steps, mean over three trainings. At three or four of the step
    counts the logit-normal arm has the lowest FID, or one that is above the lowest by at most one pooled standard
    deviation of the two; and no arm has a better mean rank over the step counts.
(b) The validation loss tells the FID: over the eight snapshots of a training of the logit-normal arm, Spearman's rank
    correlation of the loss on test images (t evenly spaced in [0, 1]) and the FID at 25 steps is at least 0.7, in each
    of the three trainings.
(c) Two streams: MMDiT has a lower validation loss than CrossDiT (text by cross-attention, its tokens never changed) in
    each of three trainings, and the gap of the means is above 3 pooled standard deviations. Blocks as many as make the
    parameters equal within 3 %; the same steps, which favours CrossDiT: it computes more.
(d) Captions are followed: the published network, guided as in `sample`, draws the twenty held-out triples of digit,
    thickness and slant (of which training had no image and no caption): the digit is right in at least 95 %, the
    thickness in at least 80 % and the slant in at least 80 % of the samples, means over three sampling seeds.

Measured without a verdict: (d) with encoders left out, the loss by t, the attention between the streams; and, added
after a first run in which (c) failed, a CrossDiT of as many blocks as MMDiT, which tells depth from streams.
"""

import functools
import json
import math
import random
import statistics
import time

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import train
from model import DENSITIES, MMDiT, RectifiedFlow, Stream, Times, for_encoders, given, linear, norm
from sample import draw, loaded
from utils import (
    Run,
    Weights,
    cli,
    deviation,
    fid_to_test,
    figure,
    floor,
    parallel,
    pooled,
    save_figure,
    save_json,
    seeded,
    trained,
    verdict,
    write_json,
)
from utils import captions as text

FORMS = ("eps-linear", "v-cosine", "edm", "rf-uniform", "rf-lognormal")
OURS, CROSS, SHALLOW = "rf-lognormal", "CrossDiT", "CrossDiT, as many blocks"


# ------------------------------------------------------------------ the opponents
class Baseline(RectifiedFlow):
    """The formulations that rectified flow is compared with: x_t = a_t x_0 + b_t n at uniform t in [0, 1].

    form  "eps-linear": predicts n, variance-preserving, linear beta (lesson 05). "v-cosine": predicts a n - b x_0 on a
          cosine. "edm": preconditioned, ln b normal (lesson 20), with all levels twice as high, because the data have
          a deviation of about 1 in the place of 0.5
    """

    LEVEL, SPREAD, ENDS = math.log(2) - 1.2, 1.2, (160.0, 0.004)

    def __init__(self, form):
        super().__init__("uniform")
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


# ------------------------------------------------------------------ the whole of it
def main(argv=None):
    run = Run(__file__, argv)
    cfg, begin = run.config.reproduce, time.perf_counter()
    run.settings.publish &= not (cfg.quick or cfg.smoke)
    run.open_folder("claim")
    jobs = [(run.argv, arm, seed) for seed in range(cfg.seeds) for arm in (*FORMS, CROSS, SHALLOW)]
    rows = []
    for row in parallel(measure, jobs, cfg.workers):
        run.say("{arm:13} seed {seed}: ".format(**row) + "  ".join(
            f"{key} {value:.4f}" for key, value in row.items() if isinstance(value, float)))
        rows.append(row)
    asked = list(parallel(ask, [(run.argv, seed) for seed in range(cfg.seeds)], cfg.workers))
    claim = {"formulations": formulations(rows, cfg), "loss_tells": loss_tells(rows), "streams": streams(rows),
             "captions": followed(asked)}
    for one in claim.values():
        one["verdict"] = verdict(one["holds"], cfg)
    claim |= {"rows": rows, "asked": asked, "n": cfg.n, "floor": floor(cfg.n), "seeds": cfg.seeds, "steps": cfg.steps,
              "by_t": by_t(run), "minutes": round((time.perf_counter() - begin) / 60, 1)}
    run.say(printed(claim))
    run.output(save_json, claim, "claim.json")
    run.output(plot, claim, "claim.png")
    run.output(plot_times, claim["by_t"], "times.png")
    run.output(plot_attention, run, "attention.png")
    run.record("claim_verdicts", minutes=claim["minutes"], samples=cfg.n, **{
        name: claim[name]["verdict"] for name in ("formulations", "loss_tells", "streams", "captions")})
    return claim


def make(arm):
    """Process and network class of an arm."""
    if arm in ("rf-uniform", OURS, CROSS, SHALLOW):
        network = {CROSS: CrossDiT, SHALLOW: ShallowCrossDiT}.get(arm, MMDiT)
        return RectifiedFlow("uniform" if arm == "rf-uniform" else "logit-normal"), network
    return Baseline(arm), MMDiT


def train_arm(run, arm, seed):
    """The weights file of an arm, trained or taken from an earlier call; beside it its snapshots."""
    cfg, (process, network) = run.config.reproduce, make(arm)
    sections = ("mmdit", "captions", "train", "gpu", "device", "smoke")
    own = [a for a in run.argv if a.split("=")[0].split(".")[0] in sections]
    folder = run.folder / f"{arm.replace(', as many blocks', '-shallow')}_{seed}"
    size = [] if cfg.smoke else [f"mmdit.dim={cfg.dim}", f"mmdit.heads={cfg.heads}"]
    return trained(functools.partial(train.main, process=process, network=network), folder, [
        *own, *size, f"steps={cfg.steps}", f"batch_size={cfg.batch_size}", f"seed={seed}", "preview_every=0",
        f"snapshots={cfg.steps // cfg.snapshots if arm == OURS else 0}"], run.lesson)


def measure(argv, arm, seed):
    """`measured`, or what an earlier call with the same code and values wrote beside the arm's weights."""
    run = Run(__file__, argv)
    cfg, _ = run.config.reproduce, run.open_folder("claim")
    path = train_arm(run, arm, seed)
    file, now = path.parent / "measured.json", [run.code, cfg.n, list(cfg.sample_steps), cfg.validation, cfg.levels]
    before = json.loads(file.read_text()) if file.exists() else {}
    if before.get("now") != now:
        before = {"now": now, "row": measured(run, path, arm, seed)}
        write_json(file, before)
    return before["row"]


def measured(run, path, arm, seed):
    """An arm's FIDs by steps, its validation loss, and of the logit-normal one the same of its snapshots."""
    cfg, (process, network) = run.config.reproduce, make(arm)
    _, net, words = loaded(run, Weights(path, run.name), network)
    row = {"arm": arm, "seed": seed, "parameters": sum(p.numel() for p in net.parameters())}
    if arm in FORMS:
        for steps in cfg.sample_steps:
            row[f"fid_{steps}"] = fid(process, net, words, steps, cfg.n)
    if arm in (OURS, CROSS, SHALLOW):
        row["validation"] = float(validation(net, words, cfg).mean())
    if arm == OURS:
        few = min(cfg.sample_steps, key=lambda steps: abs(steps - 25))
        row["snapshots"] = []
        for one in sorted(path.parent.glob("snapshot_*.safetensors")):
            _, net, words = loaded(run, Weights(one, run.name))
            row["snapshots"].append({"step": int(one.stem.split("_")[1]), "fid": fid(process, net, words, few, cfg.n),
                                     "validation": float(validation(net, words, cfg).mean())})
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
        parts = zip(*(one.to(next(net.parameters()).device).split(250) for one in (x0, n, c)))
        losses.append(torch.cat([flow.loss_at(given(net, one), x, t.to(x.device).expand(len(x)), eps)
                                 for x, eps, one in parts]).mean().cpu())
    return torch.stack(losses)


# ------------------------------------------------------------------ (a) to (c)
def formulations(rows, cfg):
    """FIDs of the arms over the seeds, ranks, and whether (a) holds."""
    fids = {arm: {steps: [row[f"fid_{steps}"] for row in rows if row["arm"] == arm] for steps in cfg.sample_steps}
            for arm in FORMS}
    mean = {arm: {steps: statistics.mean(values) for steps, values in one.items()} for arm, one in fids.items()}
    wins = []
    for steps in cfg.sample_steps:
        best = min(FORMS, key=lambda arm: mean[arm][steps])
        gap = mean[OURS][steps] - mean[best][steps]
        if gap <= pooled(fids[OURS][steps], fids[best][steps]):            # 0 <= 0 where it is the best itself
            wins.append(steps)
    rank = {arm: statistics.mean(1 + sum(mean[other][steps] < mean[arm][steps] for other in FORMS)
                                 for steps in cfg.sample_steps) for arm in FORMS}
    return {"fid": fids, "wins_or_ties": wins, "rank": rank,
            "holds": 4 * len(wins) >= 3 * len(cfg.sample_steps) and rank[OURS] == min(rank.values())}


def loss_tells(rows):
    """Spearman's correlation of validation loss and FID over the snapshots of each training."""
    result = []
    for row in rows:
        if row["arm"] == OURS:
            ranks = [torch.tensor([one[key] for one in row["snapshots"]]).argsort().argsort().double()
                     for key in ("validation", "fid")]
            result.append(float(torch.corrcoef(torch.stack(ranks))[0, 1]))
    return {"spearman": result, "holds": all(value >= 0.7 for value in result)}


def streams(rows):
    """Validation losses and parameters of the two networks."""
    loss = {arm: [row["validation"] for row in rows if row["arm"] == arm] for arm in (OURS, CROSS, SHALLOW)}
    parameters = {arm: next(row["parameters"] for row in rows if row["arm"] == arm) for arm in loss}
    gap, spread = statistics.mean(loss[CROSS]) - statistics.mean(loss[OURS]), pooled(loss[OURS], loss[CROSS])
    equal = abs(parameters[OURS] / parameters[CROSS] - 1) < 0.03
    return {"validation": loss, "parameters": parameters, "gap": gap, "pooled_std": spread,
            "holds": equal and all(a < b for a, b in zip(loss[OURS], loss[CROSS])) and gap > 3 * spread}


# ------------------------------------------------------------------ (d) captions
def published(run):
    """Process, network and words of the published weights; in smoke mode of the first arm."""
    path = train_arm(run, OURS, 0) if run.config.reproduce.smoke else run.published
    return loaded(run, Weights(path, run.name))


def ask(argv, seed):
    """How the published network follows captions of held-out and of seen triples, with encoders left out as well."""
    run = Run(__file__, argv)
    cfg, how, _ = run.config.reproduce, run.config.sample, run.open_folder("claim")
    flow, net, words = published(run)
    triples = [(digit, a, b) for digit in range(10) for a in range(3) for b in range(3)]
    row = {}
    for name, kept, encoders, w in (
            ("held out", True, (1, 1, 1), how.guidance), ("held out, w = 1", True, (1, 1, 1), 1.0),
            ("seen", False, (1, 1, 1), how.guidance), ("held out, no tokens", True, (1, 1, 0), how.guidance),
            ("held out, tokens only", True, (0, 0, 1), how.guidance)):
        said = wishes([triple for triple in triples if bool(text.held_out(*triple)) == kept], cfg.asked, seed)
        noise = torch.randn(len(said), 1, 28, 28, generator=seeded(seed))
        row[name] = text.follow(draw(flow, net, words, said, noise, flow.grid(how.steps), w, encoders), said)
    return row


def wishes(triples, n, seed):
    """n captions in random paraphrases that name digit, thickness and slant, the triples taken in turn."""
    rng, texts = random.Random(seed), []
    for digit, thickness, slant in (triples * -(-n // len(triples)))[:n]:
        while len(text.read_caption(one := text.caption(digit, {"thickness": thickness, "slant": slant}, rng))[0]) < 3:
            pass                                       # a paraphrase that leaves a word out
        texts.append(one)
    return texts


def followed(asked):
    """Means over the seeds, and whether (d) holds."""
    mean = {name: {key: statistics.mean(row[name][key] for row in asked) for key in one}
            for name, one in asked[0].items()}
    ours = mean["held out"]
    return {"mean": mean, "holds": ours["accuracy"] >= 0.95 and ours["thickness"] >= 0.8 and ours["slant"] >= 0.8}


# ------------------------------------------------------------------ what is printed and drawn
def by_t(run):
    """The published network's loss on test images at 20 times."""
    _, net, words = published(run)
    levels = 2 if run.config.reproduce.smoke else 20
    return {"t": [(i + 0.5) / levels for i in range(levels)],
            "loss": validation(net, words, run.config.reproduce, levels).tolist()}


def printed(claim):
    """The tables with their verdicts."""
    a, b, c, d = (claim[name] for name in ("formulations", "loss_tells", "streams", "captions"))
    lines = ["", f"(a) {a['verdict']}; wins or ties at {a['wins_or_ties']}; FID, n = {claim['n']}, floor "
             f"{claim['floor']:.2f}"]
    lines += [f"    {arm:13} " + "   ".join(f"{steps}: {statistics.mean(v):6.2f} +- {deviation(v):.2f}" for steps, v in
                                            one.items()) + f"   rank {a['rank'][arm]:.2f}"
              for arm, one in a["fid"].items()]
    lines += [f"(b) {b['verdict']}; Spearman " + ", ".join(f"{value:.3f}" for value in b["spearman"])]
    lines += [f"(c) {c['verdict']}"]
    lines += [f"    {arm:24} {c['parameters'][arm]} parameters, validation loss " + ", ".join(f"{v:.5f}" for v in one)
              for arm, one in c["validation"].items()]
    lines += [f"(d) {d['verdict']}"] + [f"    {name:22} " + "  ".join(f"{key} {v:.3f}" for key, v in one.items())
                                        for name, one in d["mean"].items()]
    return "\n".join(lines)


def plot(claim, path):
    """Three answers: FID by steps, FID by validation loss, the validation loss of the two networks."""
    fig, (left, middle, right) = figure(1, 3, width=4.2)
    for i, (arm, one) in enumerate(claim["formulations"]["fid"].items()):
        left.errorbar(list(one), [statistics.mean(v) for v in one.values()], [deviation(v) for v in one.values()],
                      fmt="o-", ms=4, color=f"C{i}", label=arm)
    left.set(xscale="log", xlabel="steps = network calls", title="(a) which formulation?",
             ylabel=f"FID, n = {claim['n']}; floor {claim['floor']:.2f}")
    left.set_xticks(list(one), [str(steps) for steps in one])
    left.minorticks_off()
    left.legend(fontsize=8)
    for row in (row for row in claim["rows"] if row["arm"] == OURS):
        middle.plot([s["validation"] for s in row["snapshots"]], [s["fid"] for s in row["snapshots"]], "o-", ms=4,
                    lw=0.7, label=f"training {row['seed'] + 1}")
    middle.set(xlabel="validation loss", ylabel="FID", xscale="log", title="(b) does the loss tell the FID?")
    middle.set_xticks([0.3, 0.4, 0.6, 1.0], ["0.3", "0.4", "0.6", "1"])
    middle.minorticks_off()
    middle.legend(fontsize=8)
    for i, (arm, values) in enumerate(claim["streams"]["validation"].items()):
        right.plot([i] * len(values), values, "o", color=f"C{4 - i}")
    right.set(xlim=(-0.5, 2.5), ylabel="validation loss", title="(c) two streams or one?")
    right.set_xticks([0, 1, 2], ["MMDiT", CROSS, f"{CROSS},\nas many blocks"])
    for ax in (left, middle, right):
        ax.grid(alpha=0.3)
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
    _, net, words = published(run)
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
    fig, axes = figure(1, len(maps), width=4.0, height=4.6)
    length = c.shape[2]
    names = ["start", *said[0].split()]
    for i, (ax, one) in enumerate(zip(axes, maps)):
        ax.imshow(one.clamp(min=1e-4).log10(), vmin=-3.5, vmax=-0.5, cmap="viridis")
        ax.axhline(length - 0.5, color="white", lw=1)
        ax.axvline(length - 0.5, color="white", lw=1)
        share = one[length:, :length].sum(1).mean()
        ax.set_title(f"block {i + 1}: image gives text {100 * share:.0f} %", fontsize=9)
        ax.set_xticks(range(len(names)), names, rotation=90, fontsize=5)
        ax.set_yticks(range(len(names)), names, fontsize=5)
    return save_figure(fig, path)


if __name__ == "__main__":
    cli(main)
