"""Measure Flux's two ideas: guidance as an input of one pass, and rotary positions on a canvas of another size.

    python reproduce.py publish=true      the published networks, and six trainings; writes results/claim.json and .png
    python reproduce.py quick=true        a look at it, no verdict
    python reproduce.py train.lr=1e-3     other values for the arms of (b); without publish=true to runs/claim

There is no paper and no table: the announcement says that guidance was distilled, the inference code how it is used.
The criteria, in `main`, were written down before the numbers were seen.

(a) compares the student's one pass with the teacher's two: the same captions of test images and the same noise for
both, a draw of noise a seed. A control must fail: if the teacher's single pass at w = 1 cannot be told from its two
passes at the largest w, nothing is shown. (b) trains two arms, equal but for the positions, on digits that are shrunk
and moved on 28 x 28, and asks them for the velocity there and on 28 x 44: the same test images with 16 columns of paper
added left and right, at random. Its measure is the squared error on the wide canvas over that on 28 x 28, with the same
times and noise for both arms. (c) asks the student for the twenty triples (digit, thickness, slant) of lesson 05e that
training never had, with the guidance of the section `sample`.

Measured without a verdict: how much of the guidance the student has learned (`goes`), where on the wide canvas the
error of (b) is, the shift of the times with few steps, and the time of a parallel block against the same in sequence.
"""

import statistics

import torch
import torch.nn.functional as F
from torch import nn

import train
from model import Flux, RectifiedFlow, SingleBlock, Stream, attend, cropped_sincos_on, given, positions, rotations
from sample import draw, loaded, passes, velocity
from utils import (
    Arm,
    Claim,
    Section,
    arm_weights,
    cli,
    dots,
    fid_to_test,
    figure,
    floor,
    lines,
    pooled,
    published,
    save_figure,
    save_grid,
    seeded,
    to_float,
)
from utils.captions import caption, captioned, follow, held_out

TIMES = torch.linspace(0.05, 0.95, 10)                 # at which (b) compares
SLIDER = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0)
TRIPLES = [(digit, a, b) for digit in range(10) for a in range(3) for b in range(3)]
NOISE = "the means over the draws differ by at most 3 pooled standard deviations, and those of the control by more"
MEANS = "by the means over the draws"


class TableFlux(Flux):
    """Lesson 32's positions: no patch is turned; a table of sines, of which 28 x 28 is the middle, is added to them."""

    def __init__(self, *args, **flux):
        super().__init__(*args, **flux)
        self.stem, self.transformer.stem = self.transformer.stem, nn.Identity()

    def tokens(self, x):
        """The patches behind the stem, table added, all at (0, 0, 0), which is no turn. (B, N, D), (N, d / 2)."""
        h, w = (side // self.patch for side in x.shape[2:])
        tokens, turn = super().tokens(x)
        table = cropped_sincos_on(x.device, x.dtype, self.stem.out_features, h, w, 64)
        return self.stem(tokens) + table, torch.ones_like(turn)


ARMS = {"rotary": [], "table": Arm(Flux=TableFlux)}


def main(argv=None):
    claim = Claim(__file__, argv, sections=("flux", "flow", "captions"))
    run, cfg, ws = claim.run, claim.cfg, sorted({1.0, *claim.cfg.guidance})
    if cfg.smoke or not run.published.exists():        # the tests' stand-in for the published networks
        claim.train({"student": []}, train=train.main, seeds=[0])
    wide = claim.arms(ARMS, train=train.main, load=loaded, measure=extrapolate,
                      keys=["kind=placed", "stages=[1, 0]", f"steps={cfg.steps}"])
    drawn = claim.each(compare, model=["student", "teacher"], w=ws, seed=claim.seeds)
    error = claim.each(velocity_error, w=ws)
    asked = claim.each(ask, captions=["held-out", "seen"], seed=claim.seeds)
    flow = RectifiedFlow(**vars(run.config.flow))
    claim.each(few_steps, mu=[0.0, flow.mu(49), flow.mu(4096)], steps=[4, 8])
    judge(claim, wide, drawn, error, asked)
    claim.note("blocks", block_times(run))
    claim.note("pixels", pixels(run, ws[-1]))
    claim.note("floor", floor(cfg.n))
    pictures(run)
    return claim.finish(plot=plot, n=cfg.n)


def judge(claim, wide, drawn, error, asked):
    """What is claimed. wide, drawn, error, asked: what was measured for (b), (a1) and (a2), (a3), (c)."""
    told = "guidance-distilled, without a number (announcement)"
    claim.judge("a1", "At every w one pass with w as input has the FID of the teacher's two passes", paper=told,
                rule=NOISE, holds=as_good(drawn, "fid"), **compared(drawn, "fid"))
    claim.judge("a2", "At every w one pass with w as input draws the digit asked for as often as two passes",
                paper=told, rule=f"{NOISE}; means within 0.01 count as equal", holds=as_good(drawn, "accuracy", 0.01),
                **compared(drawn, "accuracy", 0.01))
    claim.judge("a3", "The velocity of one pass is that of two: its squared error is below 5 % of their variance",
                paper=told, rule="of one draw of times and noise at test images, at every w",
                holds=all(row["of_variance"] < 0.05 for row in error))
    claim.judge("b", "On a canvas wider than any in training the error grows less with rotary positions than with a "
                "table", paper="rotary positions, without a number (announcement)",
                holds=wide.below("rotary", "table", "ratio"))
    claim.judge("c1", "Of combinations that training never had, at least 95 % of the samples have the digit asked for",
                rule=MEANS, holds=right(asked, ("accuracy",), 0.95), **means(asked))
    claim.judge("c2", "Of such combinations, thickness and slant are each right in at least 80 % of the samples",
                rule=MEANS, holds=right(asked, ("thickness", "slant"), 0.8))


def compared(drawn, key, least=0.0):
    """How far the means of student and teacher are apart at each w, beside what noise may do; and of the control."""
    def gap(one, other, least):
        a, b = (drawn.values(key, model=model, w=w) for model, w in (one, other))
        return {"gap": abs(statistics.mean(a) - statistics.mean(b)), "noise": max(3 * pooled(a, b), least)}

    ws = sorted({row["w"] for row in drawn if "model" in row})
    return {"by_w": {f"{w:g}": gap(("student", w), ("teacher", w), least) for w in ws},
            "control": gap(("teacher", ws[-1]), ("teacher", 1.0), 0.0)}


def as_good(drawn, key, least=0.0):
    """(a1), (a2): at every w the gap is within noise, and that of the control is not."""
    found = compared(drawn, key, least)
    return all(one["gap"] <= one["noise"] for one in found["by_w"].values()) and (
        found["control"]["gap"] > found["control"]["noise"])


def means(asked, keys=("accuracy", "thickness", "slant", "attributes", "all")):
    """The share of each that is right under held-out captions, the mean over the draws."""
    return {key: asked.mean(key, captions="held-out") for key in keys}


def right(asked, keys, share):
    """(c1), (c2): whether at least this share is right, for each of the keys."""
    return all(mean >= share for mean in means(asked, keys).values())


# ------------------------------------------------------------------ (a), (c): the published networks
def way(run, model, w, steps=0):
    """What `draw` wants to know."""
    return Section(model=model, guidance=w, steps=steps or run.config.reproduce.sample_steps,
                   batch=run.config.sample.batch)


def network(run, model="student"):
    """Process, network and tokenizer of the published student, or of the teacher beside it."""
    return loaded(run, published(run, "student"), model)


def captions_of_test(n):
    """The captions of the first n test images."""
    return [said[0] for said in captioned("test", 1, limit=n, without_held_out=False).captions]


def compare(run, model, w, seed):
    """(a): FID of a network's samples and what of their captions is right; the noise is the seed's."""
    texts, how, start = captions_of_test(run.config.reproduce.n), way(run, model, w), run.clock()
    x = draw(*network(run, model), texts, how, seeded(seed))
    return {"seconds": run.clock() - start, "fid": fid_to_test(x), "calls": how.steps * passes(how), **follow(x, texts)}


def few_steps(run, mu, steps):
    """FID of the student at w = 2 in few steps whose times are shifted by mu."""
    texts, (flow, net, words) = captions_of_test(run.config.reproduce.n), network(run)
    flow.base = flow.most = mu
    return {"fid": fid_to_test(draw(flow, net, words, texts, way(run, "student", 2.0, steps), seeded(0)))}


def ask(run, captions, seed):
    """(c): how the student follows the captions of held-out or of seen triples."""
    said = [caption(d, {"thickness": a, "slant": b}) for d, a, b in TRIPLES
            if bool(held_out(d, a, b)) == (captions == "held-out")]
    n = run.config.reproduce.held_out
    said = (said * -(-n // len(said)))[:n]
    return follow(draw(*network(run), said, way(run, "student", run.config.sample.guidance), seeded(seed)), said)


@torch.no_grad()
def answers(run, w):
    """v_c and v_u of the teacher and v of the student at w, at the same noisy test images: three of (N, 1, 28, 28)."""
    (flow, student, words), (_, teacher, _) = network(run), network(run, "teacher")
    data = captioned("test", 1, limit=run.config.reproduce.velocities, without_held_out=False)
    torch.manual_seed(0)
    x0, c, null = to_float(data.images), words([said[0] for said in data.captions]), words([""]).to(run.device)
    t, n = flow.times.draw(len(x0)), torch.randn_like(x0)
    batches = zip(*(part.to(run.device).split(128) for part in (flow.q_sample(x0, t, n), t.float(), c)))
    parts = [[v(xt, t).cpu() for v in (given(teacher, c), given(teacher, null.expand_as(c)), given(student, c, w))]
             for xt, t, c in batches]
    return [torch.cat(part) for part in zip(*parts)]


def velocity_error(run, w):
    """(a3): the student's error as a share of the variance of the teacher's velocity, at each pixel.

    goes: how many times v_c - v_u the student goes from v_u in that direction; w, if it did as it was told.
    """
    v_c, v_u, student = answers(run, w)
    two, step = v_u + w * (v_c - v_u), v_c - v_u
    error, variance, added = (student - two).square().mean(), two.var(0).mean(), (v_c - two).square().mean()
    return {"error": float(error), "of_variance": float(error / variance),
            "guidance_of_variance": float(added / variance),
            "goes": float(((student - v_u) * step).sum() / step.square().sum())}


def pixels(run, w, n=500):
    """n pixels of the velocity at w: of the teacher's two passes, the student's one, the teacher's without guidance."""
    v_c, v_u, student = answers(run, w)
    index = torch.randperm(v_c.numel(), generator=seeded(0))[:n]
    return {name: [round(value, 3) for value in part.flatten()[index].tolist()] for name, part in (
        ("teacher", v_u + w * (v_c - v_u)), ("student", student), ("plain", v_c))}


# ------------------------------------------------------------------ (b): a canvas of another size
def extrapolate(run, flow, net, words, arm, seed):
    """The error of an arm on 28 x 28 and on a wider canvas, and where it is there."""
    cfg = run.config.reproduce
    data = captioned("test", 1, limit=cfg.velocities, kind="placed", without_held_out=False)
    x0, c = to_float(data.images), words([said[0] for said in data.captions])
    left = torch.randint(cfg.width - 28 + 1, (len(x0),), generator=seeded(0))
    native, wide = (errors(flow, net, x, c, seed, run.device) for x in (x0, widened(x0, left, cfg.width)))
    row = {"native": float(native.mean()), "wide": float(wide.mean()), "ratio": float(wide.mean() / native.mean())}
    column = torch.arange(cfg.width) - left[:, None]    # counted from the digit's own canvas, (N, W)
    for name, low, high in (("left", 0, 4), ("middle", 6, 10), ("right", 12, 16)):
        chosen, canvas = ((low <= left) & (left <= high))[:, None], (column >= 0) & (column < 28)
        row[name] = {"own": float(wide[chosen & canvas].mean()), "paper": float(wide[chosen & ~canvas].mean())}
    return row


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


# ------------------------------------------------------------------ parallel and in sequence
class Sequential(Stream):
    """What SingleBlock puts side by side, one after the other: lesson 32's stream, looking at itself."""

    def forward(self, x, emb, turn):
        """x (B, N, D), emb (B, 3, D), turn of the N tokens -> (B, N, D)."""
        qkv, rest = self.enter(x, emb)
        return self.think(self.attended(x, attend(*qkv, turn), rest), rest)


def block_times(run, batch=32, times=15):
    """Milliseconds forward and backward of a block, parallel and in sequence, and parameters; the least of `times`."""
    rows = {}
    for dim in (64, 256):
        turn = rotations(F.pad(positions(7, 7), (0, 0, 10, 0)), (dim // 8, dim * 3 // 16, dim * 3 // 16))
        x, emb = torch.randn(batch, 59, dim, requires_grad=True), torch.randn(batch, 3, dim)
        for name, kind in (("parallel", SingleBlock), ("sequence", Sequential)):
            block, spent = kind(dim, 2), []
            for _ in range(times if not run.config.reproduce.smoke else 1):
                start = run.clock()
                block(x, emb, turn).sum().backward()
                spent.append(run.clock() - start)
            rows[f"{name}, {dim}"] = {"ms": 1000 * min(spent), "parameters": sum(p.numel() for p in block.parameters())}
    return rows


# ------------------------------------------------------------------ pictures
def plot(claim, path):
    """Four answers: FID and accuracy over w, pixels of teacher and student, the error on the wide canvas."""
    fig, ((left, middle), (pixel, last)) = figure(2, 2, width=4.4, height=3.4)
    names = {"teacher": "teacher, two passes", "student": "student, one pass"}
    for ax, key, title in ((left, "fid", "(a1) are the samples as good?"), (middle, "accuracy", "(a2) the digit?")):
        lines(ax, claim.rows, "w", key, by="model", names=names)
        ax.set(xlabel="w", ylabel=key, title=title)
    left.axhline(claim.notes["floor"], color="grey", ls=":", lw=1)
    left.set_ylabel(f"FID (n = {claim.cfg.n}; dotted: floor)")
    parts = claim.notes["pixels"]
    for name, label, colour in (("plain", "teacher without guidance", "C3"), ("student", "student, one pass", "C0")):
        pixel.plot(parts["teacher"], parts[name], ".", ms=3, color=colour, alpha=0.5, label=label)
    pixel.plot([-3, 3], [-3, 3], "k-", lw=0.5)
    pixel.set(xlim=(-3, 3), ylim=(-3, 3), xlabel="teacher, two passes",
              title=f"(a3) pixels of the velocity at w = {max(claim.cfg.guidance):g}")
    pixel.legend(fontsize=8, markerscale=3)
    dots(last, claim.rows, "ratio")
    last.set(ylabel=f"error, 28 x {claim.cfg.width} over 28 x 28", title="(b) an unseen size")
    return save_figure(fig, path)


@torch.no_grad()
def pictures(run):
    """The slider of w, one network beside two passes; wide canvases of both arms; what a turn does to a score."""
    n, rows = torch.randn(2, 1, 28, 28, generator=seeded(3)), []
    for model in ("student", "teacher"):
        flow, net, words = network(run, model)
        for noise, said in zip(n.to(run.device).split(1), ("a thick seven leaning right", "a thin 2 leaning left")):
            hows = [way(run, model, w) for w in SLIDER]
            rows.append(torch.cat([flow.sample(velocity(net, words, [said], how), noise, flow.grid(how.steps, 49))
                                   for how in hows]).cpu())
    run.output(save_grid, torch.cat(rows), "slider.png", columns=len(SLIDER),
               across=[f"w = {w:g}" for w in SLIDER], down=["student, 1 pass", "", "teacher, 2 passes", ""])
    said, w, rows = ["a thick 7", "a wide 0", "a thin 3", "a 5", "a thick 4", "a 2"], run.config.reproduce.width, []
    for arm, network_class in {"rotary": Flux, "table": TableFlux}.items():
        flow, net, words = loaded(run, arm_weights(run, arm), Flux=network_class)
        rows.append(draw(flow, net, words, said, way(run, "teacher", 3.0), seeded(1), width=w).cpu())
    run.output(save_grid, torch.cat(rows), "wide.png", columns=len(said), across=said, down=["rotary", "table"])
    run.output(turns, network(run)[1].transformer.axes, "rope.png")


def turns(axes, path):
    """Left: the first pairs of two axes, turned patch by patch. Right: the score of equal vectors, by their offset."""
    fig, (left, middle, right) = figure(1, 3, width=2.9, height=2.9)
    for ax, axis, name in ((left, 1, "row"), (middle, 2, "column")):
        start = sum(axes[:axis]) // 2
        for pair in range(min(2, axes[axis] // 2)):
            ids = torch.zeros(7, 3).long()
            ids[:, axis] = torch.arange(7)
            z = (1 - 0.25 * pair) * rotations(ids, axes)[:, start + pair]
            ax.plot(z.real, z.imag, "o-", ms=4, lw=0.7, label=f"pair {pair}")
            for i, point in enumerate(z):
                ax.annotate(str(i), (point.real, point.imag), fontsize=7, xytext=(3, 3), textcoords="offset points")
        ax.set(title=f"turned by the {name}", xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal")
        ax.legend(fontsize=7, loc="center", bbox_to_anchor=(0.42, 0.42))
    score = rotations(positions(13, 13) - torch.tensor([0, 6, 6]), axes).real.mean(1).reshape(13, 13)
    shown = right.imshow(score, extent=(-6.5, 6.5, 6.5, -6.5), cmap="magma")
    right.set(xlabel="columns between them", ylabel="rows", title="score of two equal vectors")
    fig.colorbar(shown, ax=right, fraction=0.046)
    return save_figure(fig, path)


if __name__ == "__main__":
    cli(main)
