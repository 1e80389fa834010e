"""Measure text-to-image: are captions followed, also those that never occurred, and does the order of words matter?

    python reproduce.py publish=true      the published network, and six trainings; writes results/claim.json and .png
    python reproduce.py quick=true        a look at it, no verdict
    python reproduce.py train.lr=2e-3     other values for all arms; without publish=true to runs/claim

There is no table of a paper to compare with: the mechanism is LDM's (Sec. 3.3), the targets are this course's, written
down before the numbers. Captions name the digit, the thickness and the slant in random paraphrases. (a) and (b) ask the
published network with the guidance of config.yaml; what it does without guidance, and with the words in random order,
is measured without a verdict, and so is chance: how often a test image of the digit has the level asked for. Of the
twenty held-out triples (digit, thickness, slant) training had neither images nor captions.
(c) compares networks that were trained on, and are asked in, sentences with networks that only ever see each caption's
words in random order, a bag of words. Both begin with the published network's convolutions; text encoder and
transformers begin with nothing learned. "Right words": the share of digits, thicknesses and slants that are as asked.
"""

import random
import statistics

import torch
from einops import rearrange

import train
from sample import conditioned, draw, loaded
from utils import Claim, cli, deviation, digits, figure, published, save_figure, seeded, to_float
from utils.captions import attributes, caption, follow, held_out, measure, placed, read_caption

PROMPT = "a thick seven leaning right"                 # a held-out triple
TRIPLES = [(digit, a, b) for digit in range(10) for a in range(3) for b in range(3)]
SEEN = [triple for triple in TRIPLES if not held_out(*triple)]
HELD_OUT = [triple for triple in TRIPLES if held_out(*triple)]
KINDS = {"seen, guided": (SEEN, True, False),          # of captions: triples, guided or not, words reordered or not
         "seen, w = 1": (SEEN, False, False), "seen, guided, words reordered": (SEEN, True, True),
         "held-out, guided": (HELD_OUT, True, False), "held-out, w = 1": (HELD_OUT, False, False)}
SENTENCES, BAGS = "sentences", "bags of words"
ARMS = {SENTENCES: ["shuffle=false"], BAGS: ["shuffle=true"]}
WORDS = ("accuracy", "thickness", "slant")             # accuracy: the digit


def main(argv=None):
    claim = Claim(__file__, argv, sections=("unet", "ddpm", "captions"))
    run, cfg, limit = claim.run, claim.cfg, claim.run.config.captions.images or None
    start = "" if cfg.smoke or not run.published.exists() else "results/weights.safetensors"
    rows = claim.arms(ARMS, train=train.main, load=loaded, measure=asked_alike,
                      keys=[f"start={start}", f"steps={cfg.steps}"])
    asked = claim.each(ask, captions=list(KINDS), seed=claim.seeds)
    claim.judge("a", "Asked with captions as in training, the published network draws at least 95 % of digits right",
                rule="by the mean over the sampling seeds",
                holds=right(asked, "seen, guided", ("accuracy",), 0.95), **means(asked, "seen, guided"))
    claim.judge("b", "Asked for triples that training never had, it draws at least 80 % of digits, thicknesses and "
                "slants right, each counted alone", rule="by the means over the sampling seeds",
                holds=right(asked, "held-out, guided", WORDS, 0.8), **means(asked, "held-out, guided"))
    claim.judge("c", "Trained on bags of words, networks get as many words right as on sentences, within 0.05",
                rule="by the means over the seeds", holds=as_good(rows),
                words={arm: rows.mean("words", arm=arm) for arm in ARMS})
    claim.note("chance", chance(limit))
    run.output(extremes, digits("train", limit=limit or 20_000), "extremes.png")
    run.output(looks, attention(run), "attention.png")
    return claim.finish(plot=plot)


def means(asked, captions, keys=(*WORDS, "attributes", "all")):
    """The mean over the seeds of the share that is right, for each of the keys."""
    return {key: asked.mean(key, captions=captions) for key in keys}


def right(asked, captions, keys, share):
    """(a), (b): whether that mean is at least `share` for all of them."""
    return all(mean >= share for mean in means(asked, captions, keys).values())


def as_good(rows):
    """(c): the means of both arms differ by less than 0.05."""
    return abs(rows.mean("words", arm=BAGS) - rows.mean("words", arm=SENTENCES)) < 0.05


# ------------------------------------------------------------------ what is asked for
def wishes(triples, n, seed):
    """n captions in random paraphrases that name all three words of the triples, taken in turn."""
    rng, texts = random.Random(seed), []
    for digit, thickness, slant in (triples * -(-n // len(triples)))[:n]:
        while len(read_caption(one := caption(digit, {"thickness": thickness, "slant": slant}, rng))[0]) < 3:
            pass                                       # a paraphrase that leaves a word out
        texts.append(one)
    return texts


def reordered(texts, seed):
    """The same captions, words in random order."""
    rng = random.Random(seed)
    words = [text.replace(",", "").split() for text in texts]
    return [" ".join(rng.sample(one, len(one))) for one in words]


# ------------------------------------------------------------------ what is measured
def ask(run, captions, seed):
    """How the published network follows captions of one of the KINDS; a seed's noise is the same for all kinds."""
    cfg, (triples, guided, mixed) = run.config.reproduce, KINDS[captions]
    texts = wishes(triples, cfg.n, seed)
    x = draw(*loaded(run, published(run, SENTENCES)), reordered(texts, seed) if mixed else texts, cfg.sample_steps,
             cfg.guidance if guided else 1.0, seeded(seed))
    return follow(x, texts)


def asked_alike(run, ddpm, net, words, arm, seed):
    """How an arm follows seen captions, asked in the manner in which it was trained."""
    cfg = run.config.reproduce
    texts = wishes(SEEN, cfg.n, seed)
    said = reordered(texts, seed) if arm == BAGS else texts
    found = follow(draw(ddpm, net, words, said, cfg.sample_steps, cfg.guidance, seeded(seed)), texts)
    return {"words": statistics.mean(found[key] for key in WORDS), **found}


def chance(limit=None):
    """How often a test image of the digit has the levels of a held-out triple: mean over the triples."""
    data = digits("test", limit=limit)
    level = attributes(to_float(data.images))
    rows = []
    for digit, thickness, slant in HELD_OUT:
        of_digit = data.labels == digit
        thick, lean = (level["thickness"] == thickness)[of_digit], (level["slant"] == slant)[of_digit]
        rows.append([float(right.float().mean()) for right in (thick, lean, thick & lean)])
    return {"accuracy": 0.1, **dict(zip(("thickness", "slant", "attributes"), map(statistics.mean, zip(*rows))))}


# ------------------------------------------------------------------ what is drawn
def plot(claim, path):
    """Which words are followed: seen and held-out triples, guided or not, beside chance; sentences and bags."""
    fig, (left, right) = figure(1, 2, width=5.5)
    columns = (*WORDS, "attributes", "all")
    for i, kind in enumerate(("seen, guided", "seen, w = 1", "held-out, guided", "held-out, w = 1")):
        place = [j + 0.2 * (i - 1.5) for j in range(len(columns))]
        spread = [deviation(claim.rows.values(key, captions=kind)) for key in columns]
        left.bar(place, list(means(claim.rows, kind).values()), 0.19, yerr=spread, color=f"C{i // 2}",
                 alpha=1 - 0.5 * (i % 2), label=kind)
    for j, key in enumerate(columns):
        if key in claim.notes["chance"]:
            left.plot([j - 0.4, j + 0.4], [claim.notes["chance"][key]] * 2, "k:", lw=1)
    left.set(xticks=range(len(columns)), ylim=(0, 1.3), yticks=[0, 0.2, 0.4, 0.6, 0.8, 1],
             ylabel="share that is right (dotted: chance)", title="(a), (b): captions followed")
    left.set_xticklabels(["digit", "thickness", "slant", "both", "all three"])
    left.legend(fontsize=8, loc="upper center", ncols=2)
    for i, arm in enumerate(ARMS):                     # side by side, for some are equal
        values = claim.rows.values("words", arm=arm)
        right.plot([j + 0.1 * (2 * i - 1) for j in range(len(values))], values, "o", color=f"C{i + 2}", label=arm)
    right.set(xlabel="training seed", ylabel="share of right words", ylim=(0, 1), xlim=(-0.5, len(values) - 0.5),
              title="(c): does the order of words matter?", xticks=list(claim.seeds))
    right.legend(fontsize=8, loc="upper center", ncols=2)
    right.grid(alpha=0.3)
    return save_figure(fig, path)


def extremes(data, path, columns=13):
    """Training images from the lowest to the highest of each attribute: what the words of captions mean."""
    fig, axes = figure(6, 1, width=9, height=0.85)
    plain, moved = ((images, measure(to_float(images))) for images in (data.images, placed(data.images)))
    for ax, (name, unit) in zip(axes, (("thickness", "pixels"), ("slant", "degrees"), ("width", "of height"),
                                       ("size", "pixels"), ("x", "pixels"), ("y", "pixels")), strict=True):
        images, found = plain if name in ("thickness", "slant", "width") else moved
        value = found[name]
        index = value.argsort()[torch.linspace(0.002, 0.998, columns).mul(len(value)).long()]
        ax.imshow(rearrange(images[index], "n 1 h w -> h (n w)"), cmap="gray")
        ax.set(yticks=[], xticks=[28 * i + 14 for i in range(columns)], ylabel=f"{name}\n{unit}")
        ax.set_xticklabels([f"{float(value[i]):.3g}" for i in index], fontsize=7)
        ax.tick_params(length=0)
    return save_figure(fig, path)


@torch.no_grad()
def attention(run, shown=(40, 25, 15, 8, 0)):
    """What the image looks at while it is drawn: for some steps the estimate of x_0, and (words, 7, 7) of weights.

    The mean over the heads and over all transformers at 7 x 7; only one caption is drawn, without guidance.
    """
    ddpm, net, words = loaded(run, published(run, SENTENCES))
    eps, c = conditioned(net, words, [PROMPT], 1.0, run.device)
    maps, hooks = [], []
    for module in net.modules():
        if type(module).__name__ == "TransformerBlock":
            hooks.append(module.attn2.register_forward_hook(lambda attn, args, _: maps.append(attn.weights(*args))))
    xT = torch.randn(1, 1, 28, 28, generator=run.generator(3)).to(run.device)
    steps, rows = min(50, ddpm.timesteps), []
    for i, (t, _, x0) in enumerate(ddpm.reverse(eps, xT, steps, run.generator(4))):
        if steps - 1 - i in shown:
            side = min(weights.shape[2] for weights in maps)
            mean = torch.stack([weights[0].float().mean(0) for weights in maps if weights.shape[2] == side]).mean(0)
            rows.append((t, x0[0, 0].cpu(), rearrange(mean, "(h w) l -> l h w", h=round(side ** 0.5)).cpu()))
        maps.clear()
    for hook in hooks:
        hook.remove()
    return ["<start>", *PROMPT.split()], rows


def looks(found, path):
    """The pictures of `attention`: a row a time, a column a word; the number is the share that the word gets."""
    names, rows = found
    fig, axes = figure(len(rows), 1 + len(names), width=1.1, height=1.15)
    for i, (line, (t, x0, weights)) in enumerate(zip(axes, rows)):
        line[0].imshow(x0, cmap="gray", vmin=-1, vmax=1)
        line[0].set_ylabel(f"t = {t}", fontsize=9)
        for ax, name, weight in zip(line[1:], names, weights):
            ax.imshow(weight, cmap="magma", vmin=0, vmax=float(weights[:len(names)].max()))
            ax.set_xlabel(f"{float(weight.mean()):.2f}", fontsize=9)
            if i == 0:
                ax.set_title(name, fontsize=10)
        for ax in line:
            ax.set(xticks=[], yticks=[])
    axes[0, 0].set_title("digit expected", fontsize=10)
    return save_figure(fig, path)


if __name__ == "__main__":
    cli(main)
