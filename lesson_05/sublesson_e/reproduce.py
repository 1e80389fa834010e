"""Measure text-to-image: are captions followed, also those that never occurred, and does the order of words matter?

    python reproduce.py publish=true      the published network, and six trainings; writes results/claim.json and .png
    python reproduce.py quick=true        a look at it, no verdict
    python reproduce.py train.lr=2e-3     other values for all arms; without publish=true to runs/claim

There is no table of a paper to compare with: the mechanism is LDM's (Sec. 3.3), the targets are this course's.
Captions name the digit, the thickness and the slant in random paraphrases. The published network draws them with the
guidance of config.yaml; the same without guidance is printed beside it. Shares are means over three sampling seeds.

(a) Captions of triples (digit, thickness, slant) seen in training: the label judge reads the digit asked for in at
    least 95 % of the samples.
(b) The twenty held-out triples, of which training had neither images nor captions: the digit is right in at least
    80 % of the samples, the thickness in at least 80 %, and the slant in at least 80 %. Chance is printed beside:
    how often a test image of that digit has the level asked for.
(c) Word order does not matter for one digit. Networks that were trained and are asked with each caption's words in
    random order (a bag of words) follow seen captions as well as networks trained on sentences: the two means over
    three trainings of the share of right words (digit, thickness and slant together) differ by less than 0.05. Both
    begin with the published network's convolutions; text encoder and transformers begin with nothing learned.
"""

import random
import statistics
import time

import torch
from einops import rearrange

import train
from sample import conditioned, draw, loaded
from utils import Run, Weights, cli, digits, figure, parallel, save_figure, to_float, trained, write_json
from utils.captions import attributes, caption, follow, held_out, measure, placed, read_caption

PROMPT = "a thick seven leaning right"                 # a held-out triple
TRIPLES = [(digit, a, b) for digit in range(10) for a in range(3) for b in range(3)]
SEEN = [triple for triple in TRIPLES if not held_out(*triple)]
HELD_OUT = [triple for triple in TRIPLES if held_out(*triple)]


def main(argv=None):
    run = Run(__file__, argv)
    cfg = run.config.reproduce
    start = time.perf_counter()
    run.open_folder("claim")
    rows = []
    arms = [(run.argv, bag, seed) for seed in range(cfg.seeds) for bag in (False, True)]
    for row in parallel(arm, arms, cfg.workers):
        run.say("{arm:14} seed {seed}: right words {words:.3f}".format(**row))
        rows.append(row)
    asked = []
    for row in parallel(ask, [(run.argv, seed) for seed in range(cfg.seeds)], cfg.workers):
        run.say(f"published, seed {row['seed']}: held-out, guided: {row['held-out, guided']}")
        asked.append(row)
    claim = judged(rows, asked, cfg, chance(run.config.captions.images or None)) | {
        "n": cfg.n, "seeds": cfg.seeds, "sample_steps": cfg.sample_steps, "guidance": cfg.guidance,
        "train_steps_of_an_arm": cfg.steps, "rows": rows, "asked": asked,
        "minutes": round((time.perf_counter() - start) / 60, 1)}
    run.say(text(claim))
    run.output(save_json, claim, "claim.json")
    run.output(plot, claim, "claim.png")
    run.output(extremes, digits("train", limit=run.config.captions.images or 20_000), "extremes.png")
    run.output(looks, attention(run), "attention.png")
    run.record("claim", **{key: value for key, value in claim.items() if key not in ("rows", "asked")})
    return claim


def save_json(claim, path):
    """claim.json."""
    write_json(path, claim)
    return path


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


# ------------------------------------------------------------------ (a), (b): the published network
def ask(argv, seed):
    """How the published network follows seen and held-out captions; with guidance, without, words reordered."""
    run = Run(__file__, argv)
    cfg, _ = run.config.reproduce, run.open_folder("claim")
    ddpm, net, words = loaded(run, published(run))
    row = {"seed": seed}
    for name, triples in (("seen", SEEN), ("held-out", HELD_OUT)):
        texts = wishes(triples, cfg.n, seed)
        ways = {"guided": (texts, cfg.guidance), "w = 1": (texts, 1.0)}
        if name == "seen":
            ways["guided, words reordered"] = (reordered(texts, seed), cfg.guidance)
        for way, (said, w) in ways.items():            # the same noise for all
            x = draw(ddpm, net, words, said, cfg.sample_steps, w, torch.Generator().manual_seed(seed))
            row[f"{name}, {way}"] = follow(x, texts)
    return row


def published(run):
    """The lesson's published weights; in smoke mode, or where there are none, those of the first arm."""
    path = run.lesson / "results" / "weights.safetensors"
    if run.config.reproduce.smoke or not path.exists():
        path = max(run.folder.glob("sentences_0/**/weights.safetensors"))
        run.say(f"the network of (a) and (b) is {path.parent}")
    return Weights(path, run.name)


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


# ------------------------------------------------------------------ (c): sentences against bags of words
def arm(argv, bag, seed):
    """Train on sentences or on bags of words (or take it from an earlier call), and ask in the same manner."""
    run = Run(__file__, argv)
    cfg, folder = run.config.reproduce, run.open_folder("claim")
    name = "bags of words" if bag else "sentences"
    own = [a for a in argv if a.split("=")[0].split(".")[0] in ("unet", "ddpm", "train", "captions", "gpu", "device",
                                                                "smoke")]
    body = run.lesson / "results" / "weights.safetensors"
    start = "" if cfg.smoke or not body.exists() else "results/weights.safetensors"
    path = trained(train.main, folder / f"{name.replace(' ', '_')}_{seed}", [
        *own, f"start={start}", f"shuffle={str(bag).lower()}", f"seed={seed}", f"steps={cfg.steps}", "preview_every=0",
        f"threads={run.settings.threads}"], run.lesson)
    ddpm, net, words = loaded(run, Weights(path, run.name))
    texts = wishes(SEEN, cfg.n, seed)
    x = draw(ddpm, net, words, reordered(texts, seed) if bag else texts, cfg.sample_steps, cfg.guidance,
             torch.Generator().manual_seed(seed))
    found = follow(x, texts)
    return {"arm": name, "seed": seed, "words": mean_of(found), **found}


def mean_of(found):
    """Share of right words: digit, thickness and slant together."""
    return statistics.mean(found[name] for name in ("accuracy", "thickness", "slant"))


# ------------------------------------------------------------------ verdicts
def judged(rows, asked, cfg, blind):
    """The three parts of the claim, each with its verdict."""
    names = [name for name in asked[0] if name != "seed"]
    mean = {name: {key: round(statistics.mean(row[name][key] for row in asked), 4) for key in asked[0][name]}
            for name in names}
    spread = {name: {key: round(deviation([row[name][key] for row in asked]), 4) for key in asked[0][name]}
              for name in names}
    arms = {name: [row["words"] for row in rows if row["arm"] == name] for name in ("sentences", "bags of words")}
    difference = statistics.mean(arms["bags of words"]) - statistics.mean(arms["sentences"])
    held = mean["held-out, guided"]
    return {
        "followed": mean, "std": spread, "chance": {key: round(value, 4) for key, value in blind.items()},
        "seen": {"accuracy": mean["seen, guided"]["accuracy"], "wanted": 0.95,
                 "verdict": verdict(mean["seen, guided"]["accuracy"] >= 0.95, cfg)},
        "held_out": {**{key: held[key] for key in ("accuracy", "thickness", "slant", "attributes", "all")},
                     "wanted": 0.8,
                     "verdict": verdict(all(held[key] >= 0.8 for key in ("accuracy", "thickness", "slant")), cfg)},
        "word_order": {**{name: {"mean": statistics.mean(values), "std": deviation(values)}
                          for name, values in arms.items()},
                       "difference": difference, "wanted": 0.05, "verdict": verdict(abs(difference) < 0.05, cfg)},
    }


def deviation(values):
    """Standard deviation over the seeds; 0 for a single one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def verdict(holds, cfg):
    """One of the two verdicts, or none if there were too few seeds for one."""
    if cfg.quick or cfg.smoke or cfg.seeds < 3:
        return "no verdict from a quick look"
    return "reproduced" if holds else "not reproduced at this scale"


# ------------------------------------------------------------------ what is printed and drawn
COLUMNS = ("accuracy", "thickness", "slant", "attributes", "all")


def text(claim):
    """The table with the verdicts."""
    lines = ["", f"{'':34}" + "".join(f"{name:>12}" for name in ("digit", *COLUMNS[1:]))]
    for name, found in claim["followed"].items():
        lines.append(f"{name:34}" + "".join(f"{found[key]:12.3f}" for key in COLUMNS))
    lines.append(f"{'chance on the held-out triples':34}"
                 + "".join(f"{claim['chance'][key]:12.3f}" for key in COLUMNS if key in claim["chance"]))
    order = claim["word_order"]
    lines += [f"(a) seen captions: {claim['seen']['verdict']}",
              f"(b) held-out triples: {claim['held_out']['verdict']}",
              "(c) " + ", ".join(f"{name} {order[name]['mean']:.3f} +- {order[name]['std']:.3f}"
                                 for name in ("sentences", "bags of words"))
              + f", difference {order['difference']:+.3f}: {order['verdict']}",
              f"n = {claim['n']} a row and seed, {claim['seeds']} seeds, {claim['sample_steps']} steps, "
              f"guidance {claim['guidance']}; the arms of (c): {claim['train_steps_of_an_arm']} training steps"]
    return "\n".join(lines)


def plot(claim, path):
    """Which words are followed: seen and held-out triples, guided or not, beside chance; sentences and bags."""
    fig, (left, right) = figure(1, 2, width=5.5)
    rows = ["seen, guided", "seen, w = 1", "held-out, guided", "held-out, w = 1"]
    for i, name in enumerate(rows):
        place = [j + 0.2 * (i - 1.5) for j in range(len(COLUMNS))]
        left.bar(place, [claim["followed"][name][key] for key in COLUMNS], 0.19,
                 yerr=[claim["std"][name][key] for key in COLUMNS], color=f"C{i // 2}", alpha=1 - 0.5 * (i % 2),
                 label=name)
    for j, key in enumerate(COLUMNS):
        if key in claim["chance"]:
            left.plot([j - 0.4, j + 0.4], [claim["chance"][key]] * 2, "k:", lw=1)
    left.set(xticks=range(len(COLUMNS)), ylim=(0, 1), ylabel="share that is right (dotted: chance)",
             title="captions followed")
    left.set_xticklabels(["digit", "thickness", "slant", "both", "all three"])
    left.legend(fontsize=8, loc="lower left")
    for i, name in enumerate(("sentences", "bags of words")):
        right.plot([row["seed"] for row in claim["rows"] if row["arm"] == name],
                   [row["words"] for row in claim["rows"] if row["arm"] == name], "o", color=f"C{i}", label=name)
    right.set(xlabel="training seed", ylabel="right words", ylim=(0, 1), title="does the order of words matter?",
              xticks=range(claim["seeds"]))
    right.legend(fontsize=8)
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
    ddpm, net, words = loaded(run, published(run))
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
        line[0].set_ylabel(f"t = {t}", fontsize=8)
        for ax, name, weight in zip(line[1:], names, weights):
            ax.imshow(weight, cmap="magma", vmin=0, vmax=float(weights[:len(names)].max()))
            ax.set_xlabel(f"{float(weight.mean()):.2f}", fontsize=7)
            if i == 0:
                ax.set_title(name, fontsize=8)
        for ax in line:
            ax.set(xticks=[], yticks=[])
    return save_figure(fig, path)


if __name__ == "__main__":
    cli(main)
