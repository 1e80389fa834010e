"""Measure Flux's two ideas: guidance as an input of one pass, and rotary positions on a canvas of another size.

    python reproduce.py publish=true      the published networks, and six trainings; writes results/claim.json and .png
    python reproduce.py quick=true        a look at it, no verdict
    python reproduce.py train.lr=1e-3     other values for the arms of (b); without publish=true to runs/claim

There is no paper and no table: the announcement says that guidance was distilled, the inference code how it is used.
Criteria, written before the numbers:

(a) One pass with w as input equals two passes of the teacher. The same captions of test images and the same noise for
    both, three draws of noise, w = 1, 2, 4. At each w: the mean FIDs differ by at most three pooled standard deviations
    over the draws; so do the accuracies of the digit, or they differ by less than 0.01; the squared error of the
    velocity, at the training's times, is below 5 % of the variance of the teacher's velocity (over images, times and
    noise, at each pixel); and the student makes half of the network calls (at w = 1 as many, two passes are one there).
    A control must fail where it counts: at w = 4 the teacher's single pass, without guidance, is outside three pooled
    deviations in FID or in accuracy. If it is not, nothing is shown and (a) is not reproduced.
(b) Rotary positions carry over to a size that training has not seen. Two arms, equal but for the positions: rotary, or
    lesson 32's table of sines. Both learn digits that are shrunk and moved on 28 x 28, and are asked for the velocity
    on 28 x 28 and on 28 x 44: the same test images with 16 columns of paper added left and right, at random.
    The measure is the squared error on the wide canvas over that on 28 x 28, the same times and noise for both arms. It
    is lower for rotary positions in every seed, and the gap is above three pooled standard deviations.
(c) Captions, published network, one pass, w of the section `sample`: on the twenty held-out triples (digit, thickness,
    slant) of lesson 05e the digit is right in at least 95 % and thickness and slant each in at least 80 % of the
    samples, means over three draws.

Printed without a verdict: how much of the guidance the student has learned, the shift of the times with few steps, and
the time of a parallel block against the same in sequence. After a first run had answered (a) and (b), two more numbers
were added, also without a verdict: how far the student goes (`goes`), and where on the wide canvas the error of (b) is.
"""

import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

import train
from model import SingleBlock, attend, given, guided, modulate, positions, rotations
from sample import draw, loaded, velocity
from utils import (
    Run,
    Section,
    cli,
    deviation,
    fid_to_test,
    figure,
    floor,
    parallel,
    pooled,
    save_figure,
    save_json,
    save_strip,
    seeded,
    to_float,
    trained,
    verdict,
)
from utils.captions import caption, captioned, follow, held_out

ARMS = ("rotary", "table")
TIMES = torch.linspace(0.05, 0.95, 10)                 # at which (b) compares
SLIDER = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0)


def main(argv=None):
    run = Run(__file__, argv)
    cfg, begin = run.config.reproduce, time.perf_counter()
    run.settings.publish &= not (cfg.quick or cfg.smoke)
    run.open_folder("claim")
    path = networks(run)
    rows, arms = [], {arm: [] for arm in ARMS}
    for row in parallel(compare, [(run.argv, path, seed) for seed in range(cfg.seeds)], cfg.workers):
        rows.append(row)
        run.say(f"seed {row['seed']}: " + "  ".join(f"{name} {one['fid']:.2f}" for name, one in row["arms"].items()))
    jobs = [(run.argv, arm, seed) for seed in range(cfg.seeds) for arm in ARMS]
    for (_, arm, seed), row in zip(jobs, parallel(extrapolate, jobs, cfg.workers)):
        arms[arm].append(row)
        run.say(f"{arm} seed {seed}: error {row['native']:.4f}, wide {row['wide']:.4f}, ratio {row['ratio']:.3f}")
    speed = velocities(run, path)
    claim = {**judge(rows, speed, arms, cfg), "rows": rows, "velocity": speed, "arms": arms, "blocks": block_times(run),
             "shift": shifts(run, path), "n": cfg.n, "floor": floor(cfg.n), "seeds": cfg.seeds,
             "sample_steps": cfg.sample_steps, "train_steps_of_an_arm": cfg.steps, "width": cfg.width,
             "minutes": round((time.perf_counter() - begin) / 60, 1)}
    run.say(text(claim))
    run.output(save_json, claim, "claim.json")
    run.output(plot, claim | {"pixels": pixels(run, path)}, "claim.png")
    pictures(run, path)
    run.record("claim", minutes=claim["minutes"], n=cfg.n,
               **{name: claim[name]["verdict"] for name in ("one_pass", "extrapolates", "captions")})
    return claim


def networks(run):
    """The student's weights file, beside which the teacher's lies: the published ones, or smoke ones."""
    if not run.config.reproduce.smoke:
        return run.published
    return trained(train.main, run.folder / "networks", [*own(run), "preview_every=0"], run.lesson)


def own(run):
    """The arguments that a training takes over from this script."""
    sections = ("flux", "flow", "captions", "train", "gpu", "device", "smoke", "threads")
    return [a for a in run.argv if a.split("=")[0].split(".")[0] in sections]


def way(run, model, w, steps=0):
    """What `draw` wants to know: student in one pass; teacher in two, or, of model "plain", in one at w = 1."""
    return Section(model="student" if model == "student" else "teacher", guidance=1.0 if model == "plain" else w,
                   steps=steps or run.config.reproduce.sample_steps, batch=run.config.sample.batch)


# ------------------------------------------------------------------ (a): one pass against two, and (c): captions
def compare(argv, path, seed):
    """FID and accuracy of the arms, and how held-out captions are followed, with one draw of noise."""
    run = Run(__file__, argv)
    cfg, row = run.config.reproduce, {"seed": seed, "arms": {}}
    texts = [said[0] for said in captioned("test", 1, limit=cfg.n, without_held_out=False).captions]
    jobs = [(model, w) for w in cfg.guidance for model in ("student", "teacher")] + [("plain", 1.0)] * (
        1.0 not in cfg.guidance)
    for model, w in jobs:
        flow, net, words = loaded(run, path, "student" if model == "student" else "teacher")
        start = time.perf_counter()
        x = draw(flow, net, words, texts, way(run, model, w), seeded(seed))
        row["arms"][f"{model} {w:g}"] = {"fid": fid_to_test(x), "seconds": time.perf_counter() - start,
                                         **follow(x, texts)}
    flow, net, words = loaded(run, path)
    w = run.config.sample.guidance
    for name, wanted in (("held-out", True), ("seen", False)):
        triples = [(d, a, b) for d in range(10) for a in range(3) for b in range(3) if held_out(d, a, b) == wanted]
        said = [caption(d, {"thickness": a, "slant": b}) for d, a, b in triples]
        said = (said * -(-cfg.held_out // len(said)))[:cfg.held_out]
        row[name] = follow(draw(flow, net, words, said, way(run, "student", w), seeded(seed)), said)
    return row


# ------------------------------------------------------------------ (a): velocities
@torch.no_grad()
def answers(run, path, w):
    """What teacher in two passes, student, and teacher in one say at the same noisy test images: three velocities."""
    (flow, student, words), (_, teacher, _) = loaded(run, path), loaded(run, path, "teacher")
    data = captioned("test", 1, limit=run.config.reproduce.velocities, without_held_out=False)
    torch.manual_seed(0)
    x0, c, null = to_float(data.images), words([said[0] for said in data.captions]), words([""])
    t, n = flow.draw(len(x0)), torch.randn_like(x0)
    batches = zip(*(part.to(run.device).split(128) for part in (flow.q_sample(x0, t, n), t.float(), c)))
    parts = [(guided(teacher, c, null.to(c.device).expand_as(c), w)(xt, t), given(student, c, w)(xt, t),
              given(teacher, c)(xt, t)) for xt, t, c in batches]
    return [torch.cat(part).cpu() for part in zip(*parts)]


def velocities(run, path):
    """The student's error at each w, as a share of the variance of the teacher's velocity and of what guidance adds.

    goes: how many times v_c - v_u the student goes from v_u in that direction; w, if it did as it was told.
    """
    rows, (two, _, plain) = {}, answers(run, path, 2.0)
    step = two - plain                                  # v_c - v_u
    for w in run.config.reproduce.guidance:
        teacher, student, plain = answers(run, path, w)
        error, variance = (student - teacher).square().mean(), teacher.var(0).mean()
        added = (plain - teacher).square().mean()
        rows[f"{w:g}"] = {"error": float(error), "of_variance": float(error / variance),
                          "guidance_of_variance": float(added / variance),
                          "of_guidance": float(error / added) if w != 1 else None,
                          "goes": 1 + float(((student - plain) * step).sum() / step.square().sum())}
    return rows


# ------------------------------------------------------------------ (b): a canvas of another size
def extrapolate(argv, arm, seed):
    """Train an arm on 28 x 28 (or take it from an earlier call): its error there, and on a wider canvas."""
    run = Run(__file__, argv)
    cfg, folder = run.config.reproduce, run.open_folder("claim")
    path = trained(train.main, folder / f"{arm}_{seed}", [
        *own(run), f"places={arm}", "kind=placed", "stages=[1, 0]", f"seed={seed}", f"steps={cfg.steps}",
        "preview_every=0"], run.lesson)
    flow, net, words = loaded(run, path)
    data = captioned("test", 1, limit=cfg.velocities, kind="placed", without_held_out=False)
    x0, c = to_float(data.images), words([said[0] for said in data.captions])
    left = torch.randint(cfg.width - 28 + 1, (len(x0),), generator=seeded(0))
    native, wide = (errors(flow, net, x, c, seed, run.device) for x in (x0, widened(x0, left, cfg.width)))
    row = {"seed": seed, "native": float(native.mean()), "wide": float(wide.mean())}
    column = torch.arange(cfg.width) - left[:, None]    # counted from the digit's own canvas, (N, W)
    for name, low, high in (("left", 0, 4), ("middle", 6, 10), ("right", 12, 16)):
        chosen = ((low <= left) & (left <= high))[:, None]
        canvas = (column >= 0) & (column < 28)
        row[name] = {"own": float(wide[chosen & canvas].mean()), "paper": float(wide[chosen & ~canvas].mean())}
    return {**row, "ratio": row["wide"] / row["native"]}


def widened(x, left, width):
    """Paper added left (that many columns) and right of each image. (N, 1, 28, 28) -> (N, 1, 28, width)."""
    return torch.cat([F.pad(one[None], (i, width - 28 - i, 0, 0), value=-1.0) for one, i in zip(x, left.tolist())])


@torch.no_grad()
def errors(flow, net, x0, c, seed, device):
    """The squared error of n - x_0, mean over TIMES and rows. x0 (N, 1, H, W) -> (N, W)."""
    total, generator = torch.zeros(len(x0), x0.shape[3]), seeded(seed)
    for one in TIMES:
        n, t = torch.randn(x0.shape, generator=generator), one.expand(len(x0))
        for i in range(0, len(x0), 128):
            xt, *rest = (part[i:i + 128].to(device) for part in (flow.q_sample(x0, t, n), t, c))
            v = given(net, rest[1])(xt, rest[0]).cpu()
            total[i:i + 128] += (v - (n - x0)[i:i + 128]).square().mean((1, 2)) / len(TIMES)
    return total


# ------------------------------------------------------------------ without a verdict
def shifts(run, path):
    """FID of the student with few steps, with no shift, the line's at 49 tokens, and that of 4096 tokens."""
    cfg, (flow, net, words) = run.config.reproduce, loaded(run, path)
    texts = [said[0] for said in captioned("test", 1, limit=cfg.n, without_held_out=False).captions]
    rows, base, most = {}, flow.base, flow.most
    for steps in (4, 8):
        for name, mu in (("0", 0.0), ("of 49 tokens", flow.mu(49)), ("of 4096 tokens", most)):
            flow.base = flow.most = mu
            x = draw(flow, net, words, texts, way(run, "student", 2.0, steps), seeded(0))
            rows[f"mu {name}, {steps} steps"] = {"mu": mu, "fid": fid_to_test(x)}
            flow.base, flow.most = base, most
    return rows


class Sequential(nn.Module):
    """What SingleBlock puts side by side, one after the other: attention, then the MLP, each with its modulation."""

    def __init__(self, dim, heads, ratio=4):
        super().__init__()
        self.heads, self.adaln = heads, nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.norm_q, self.norm_k = (nn.RMSNorm(dim // heads, eps=1e-6) for _ in "qk")
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.into, self.leave = nn.Linear(dim, ratio * dim), nn.Linear(ratio * dim, dim)

    def forward(self, x, emb, turn):
        """x (B, N, D), emb (B, 3, D), turn of the N tokens -> (B, N, D)."""
        shift, scale, gate, shift2, scale2, gate2 = self.adaln(emb.sum(1, keepdim=True)).chunk(6, dim=2)
        qkv = self.qkv(modulate(self.norm1(x), shift, scale)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = x + gate * self.out(attend(self.norm_q(q), self.norm_k(k), v, turn))
        return x + gate2 * self.leave(F.gelu(self.into(modulate(self.norm2(x), shift2, scale2)), approximate="tanh"))


def block_times(run, batch=32, times=15):
    """Milliseconds forward and backward of a block, parallel and in sequence, and parameters; the least of `times`."""
    rows = {}
    for dim in (64, 256):
        axes, kinds = (dim // 8, dim * 3 // 16, dim * 3 // 16), {"parallel": SingleBlock, "sequence": Sequential}
        turn = rotations(F.pad(positions(7, 7), (0, 0, 10, 0)), axes)
        x, emb = torch.randn(batch, 59, dim, requires_grad=True), torch.randn(batch, 3, dim)
        for name, kind in kinds.items():
            block, spent = kind(dim, 2), []
            for _ in range(times if not run.config.reproduce.smoke else 1):
                start = time.perf_counter()
                block(x, emb, turn).sum().backward()
                spent.append(time.perf_counter() - start)
            rows[f"{name}, {dim}"] = {"ms": 1000 * min(spent), "parameters": sum(p.numel() for p in block.parameters())}
    return rows


# ------------------------------------------------------------------ verdicts
def judge(rows, speed, arms, cfg):
    """The three parts of the claim with what decides them."""
    def seeds(name, key):
        return [row["arms"][name][key] for row in rows]

    def near(w, one, other, slack):
        """FID and accuracy: do the means of two arms differ by no more than noise?"""
        a, b = f"{one} {w:g}", f"{other} {w:g}" if other != "plain" else "plain 1"
        a, b = (name if name in rows[0]["arms"] else name.replace("plain", "teacher") for name in (a, b))
        gaps = {}
        for key, least in (("fid", 0.0), ("accuracy", slack)):
            gap = abs(statistics.mean(seeds(a, key)) - statistics.mean(seeds(b, key)))
            gaps[key] = {"gap": gap, "noise": max(3 * pooled(seeds(a, key), seeds(b, key)), least)}
        return gaps

    table, holds = {}, True
    for w in cfg.guidance:
        gaps = near(w, "student", "teacher", 0.01)
        ok = all(one["gap"] <= one["noise"] for one in gaps.values()) and speed[f"{w:g}"]["of_variance"] < 0.05
        table[f"{w:g}"] = {**gaps, "velocity": speed[f"{w:g}"]["of_variance"], "holds": ok,
                           "calls": {"student": cfg.sample_steps, "teacher": cfg.sample_steps * (1 + (w != 1))}}
        holds &= ok
    control = near(cfg.guidance[-1], "teacher", "plain", 0.0)
    control["fails"] = any(one["gap"] > one["noise"] for one in control.values())
    ratios = {arm: [row["ratio"] for row in arms[arm]] for arm in ARMS}
    gap = statistics.mean(ratios["table"]) - statistics.mean(ratios["rotary"])
    better = all(a < b for a, b in zip(*ratios.values())) and gap > 3 * pooled(*ratios.values())
    said = {kind: {key: statistics.mean(row[kind][key] for row in rows) for key in rows[0][kind]}
            for kind in ("held-out", "seen")}
    good = said["held-out"]["accuracy"] >= 0.95 and min(said["held-out"][key] for key in ("thickness", "slant")) >= 0.8
    return {"one_pass": {"by_w": table, "control": control, "verdict": verdict(holds and control["fails"], cfg)},
            "extrapolates": {"ratios": ratios, "gap": gap, "verdict": verdict(better, cfg)},
            "captions": {**said, "verdict": verdict(good, cfg)}}


# ------------------------------------------------------------------ what is printed and drawn
def text(claim):
    """The tables with their verdicts."""
    rows, lines = claim["rows"], ["", f"n = {claim['n']}, floor {claim['floor']:.2f}, {claim['sample_steps']} steps"]
    for name in rows[0]["arms"]:
        cells = [f"{key} {statistics.mean(v):.3f} +- {deviation(v):.3f}" for key in ("fid", "accuracy", "attributes")
                 for v in [[row["arms"][name][key] for row in rows]]]
        lines.append(f"{name:12} " + "   ".join(cells))
    for w, one in claim["velocity"].items():
        lines.append(f"w = {w}: error of the velocity {one['of_variance']:.2%} of its variance; without guidance "
                     f"{one['guidance_of_variance']:.2%}; goes {one['goes']:.2f} times v_c - v_u")
    lines.append(f"control: {claim['one_pass']['control']}")
    lines.append(f"(a) one pass equals two: {claim['one_pass']['verdict']}")
    lines += [f"{arm}: error 28 x 28 and wide " + ", ".join(f"{r['native']:.4f} {r['wide']:.4f}" for r in arms)
              for arm, arms in claim["arms"].items()]
    lines += [f"{arm}, digit on the {where}: own columns and paper " + ", ".join(
        f"{row[where]['own']:.4f} {row[where]['paper']:.4f}" for row in arms)
        for arm, arms in claim["arms"].items() for where in ("left", "middle", "right")]
    lines.append(f"(b) ratios {claim['extrapolates']['ratios']}: {claim['extrapolates']['verdict']}")
    for kind in ("held-out", "seen"):
        lines.append(f"{kind}: " + "  ".join(f"{key} {value:.3f}" for key, value in claim["captions"][kind].items()))
    lines.append(f"(c) captions: {claim['captions']['verdict']}")
    return "\n".join(lines + [f"{name}: {claim[name]}" for name in ("shift", "blocks")])


@torch.no_grad()
def pixels(run, path, n=2000):
    """Pixels of the velocity at the largest w, n of them: the teacher's two passes, the student's one, plain."""
    parts = answers(run, path, run.config.reproduce.guidance[-1])
    index = torch.randperm(parts[0].numel(), generator=seeded(0))[:n]
    return [part.flatten()[index] for part in parts]


def plot(claim, path):
    """Four answers: FID and accuracy over w, pixels of teacher and student, the error on the wide canvas."""
    fig, (left, middle, right, last) = figure(1, 4, width=3.6)
    rows, cs = claim["rows"], {"student": "C0", "teacher": "C1"}
    ws = [float(w) for w in claim["velocity"]]
    for ax, key, title in ((left, "fid", "are the samples as good?"), (middle, "accuracy", "is the digit right?")):
        for name, label in (("teacher", "teacher, two passes"), ("student", "student, one pass")):
            values = [[row["arms"][f"{name} {w:g}"][key] for row in rows] for w in ws]
            ax.errorbar(ws, [statistics.mean(v) for v in values], [deviation(v) for v in values], marker="o", ms=4,
                        color=cs[name], ls="-" if name == "teacher" else "--", label=label, capsize=3)
        ax.set(xlabel="w", ylabel=f"FID, n = {claim['n']}" if key == "fid" else "accuracy", title=title, xticks=ws)
    left.axhline(claim["floor"], color="grey", ls=":", lw=1, label="floor")
    left.legend(fontsize=8)
    teacher, student, plain = claim["pixels"]
    right.plot(teacher, plain, ".", ms=2, color="C3", alpha=0.5, label="teacher without guidance")
    right.plot(teacher, student, ".", ms=2, color="C0", alpha=0.5, label="student, one pass")
    right.plot([-3, 3], [-3, 3], "k-", lw=0.5)
    right.set(xlim=(-3, 3), ylim=(-3, 3), xlabel="teacher, two passes", title=f"pixels of v at w = {ws[-1]:g}")
    right.legend(fontsize=8, markerscale=5)
    for i, arm in enumerate(ARMS):
        last.bar(i, statistics.mean(claim["extrapolates"]["ratios"][arm]), color=f"C{i + 2}")
        last.plot([i] * len(rows), claim["extrapolates"]["ratios"][arm], "k.", ms=5)
    last.set(xticks=range(2), xticklabels=ARMS, title="an unseen size",
             ylabel=f"error, 28 x {claim['width']} over 28 x 28")
    return save_figure(fig, path)


@torch.no_grad()
def pictures(run, path):
    """The slider of w, one network beside two passes; wide canvases of both arms; what a turn does to a score."""
    words_of, noise = ("a thick seven leaning right", "a thin 2 leaning left"), seeded(3)
    n, lines = torch.randn(2, 1, 28, 28, generator=noise), []
    for model in ("student", "teacher"):
        flow, net, words = loaded(run, path, model)
        for i, said in enumerate(words_of):
            lines.append(torch.cat([draw_from(flow, net, words, said, n[i:i + 1], way(run, model, w)) for w in SLIDER]))
    run.output(save_strip, [line.cpu() for line in lines], "slider.png")
    fig, axes = figure(2, 1, width=7, height=1.6)
    for ax, arm in zip(axes, ARMS):
        flow, net, words = loaded(run, max((run.folder / f"{arm}_0").glob("**/weights.safetensors")))
        said, w = ["a thick 7", "a wide 0", "a thin 3", "a 5", "a thick 4", "a 2"], run.config.reproduce.width
        x = draw(flow, net, words, said, way(run, "teacher", 3.0), seeded(1), width=w)
        ax.imshow(torch.cat(list(F.pad(x[:, 0], (1, 1), value=1.0)), dim=1).cpu(), cmap="gray", vmin=-1, vmax=1)
        ax.set(xticks=[], yticks=[], ylabel=arm)
    run.output(save_figure, fig, "wide.png")
    run.output(turns, loaded(run, path)[1].transformer.axes, "rope.png")


def draw_from(flow, net, words, said, n, how):
    """The image of one caption from this noise."""
    return flow.sample(velocity(net, words, [said], how), n.to(next(net.parameters()).device), flow.grid(how.steps, 49))


def turns(axes, path):
    """Left: the first pairs of two axes, turned patch by patch. Right: the score of equal vectors, by their offset."""
    fig, (left, middle, right) = figure(1, 3, width=3.6, height=3.2)
    for ax, axis, name in ((left, 1, "row"), (middle, 2, "column")):
        start = sum(axes[:axis]) // 2
        for pair in range(min(2, axes[axis] // 2)):
            ids = torch.zeros(7, 3).long()
            ids[:, axis] = torch.arange(7)
            z = (1 - 0.25 * pair) * rotations(ids, axes)[:, start + pair]
            ax.plot(z.real, z.imag, "o-", ms=4, lw=0.7, label=f"pair {pair}")
            for i, point in enumerate(z):
                ax.annotate(str(i), (point.real, point.imag), fontsize=7, xytext=(3, 3), textcoords="offset points")
        ax.set(title=f"turned by the {name}", xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal")
        ax.legend(fontsize=7, loc="lower right")
    score = rotations(positions(13, 13) - torch.tensor([0, 6, 6]), axes).real.mean(1).reshape(13, 13)
    shown = right.imshow(score, extent=(-6.5, 6.5, 6.5, -6.5), cmap="magma")
    right.set(xlabel="columns between them", ylabel="rows", title="score of two equal vectors")
    fig.colorbar(shown, ax=right, fraction=0.046)
    return save_figure(fig, path)


if __name__ == "__main__":
    cli(main)
