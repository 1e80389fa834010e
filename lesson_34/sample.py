"""Draw what a caption says, in one pass a step.

    python sample.py                                        every digit in every thickness and slant
    python sample.py prompt="a thick seven leaning right"   what you like; ";" between several captions
    python sample.py guidance=1 model=teacher               other weights (1 to 6); before distillation, two passes
    python sample.py gif=denoising.gif npz=samples.npz      the way there; images and digits as arrays
    python sample.py n=2048 metrics=true                    FID; how the captions of test images are followed
"""

import torch

from model import Flux, RectifiedFlow, given, guided
from utils import Run, UserError, cli, device_of, noise, report, save_gif, save_grid, save_npz, score
from utils.captions import STYLES, Tokenizer, caption, captioned, follow, read_caption

TEACHER = "weights_teacher.safetensors"                 # what train.py calls it
GRID = [caption(digit, {"thickness": a, "slant": b}) for a in range(3) for b in range(3) for digit in range(10)]


# Adapted from lesson_05/sublesson_e/sample.py: main -- the student in one pass or the teacher in two
def main(argv=None):
    run = Run(__file__, argv)
    cfg = run.config.sample
    flow, net, words = loaded(run, run.weights(), cfg.model)
    texts = [text.strip() for text in cfg.prompt.split(";")] if cfg.prompt else GRID
    if cfg.metrics and not cfg.prompt:
        texts = [said[0] for said in captioned("test", 1, limit=cfg.n, without_held_out=False).captions]
    texts = (texts * -(-cfg.n // len(texts)))[:cfg.n]
    digit = torch.tensor([read_caption(text)[0]["digit"] if text else -1 for text in texts])        # -1: none

    start = run.clock()
    x = draw(flow, net, words, texts, cfg, run.generators(cfg.n))
    seconds, calls = run.clock() - start, cfg.steps * passes(cfg)
    labels = {} if cfg.prompt or cfg.metrics else {"across": range(10), "down": STYLES[:-(-len(x) // 10)]}
    run.output(save_grid, x[:90], cfg.out, columns=10, **labels)
    print(f"{cfg.n} digits of the {cfg.model}, {calls} network calls each, in {seconds:.1f} s; the first: {texts[0]!r}")
    if cfg.npz:
        run.output(save_npz, x, cfg.npz, labels=digit)
    if cfg.gif:                                         # above x_t, below the image that the network expects
        n = noise(cfg.n, (1, 28, 28), run.generators(cfg.n))[:90:11].to(run.device)
        way = flow.reverse(velocity(net, words, texts[:90:11], cfg), n, flow.grid(cfg.steps, tokens(net)))
        run.output(save_gif, [torch.cat([x_s, x_0]).cpu() for _, x_s, x_0 in way], cfg.gif, columns=len(n))
    if cfg.metrics:
        scores = score(x, digit) | {"followed": follow(x, texts)}
        print(report(scores), *(f"{name:10} {share:.3f}" for name, share in scores["followed"].items()), sep="\n")
        run.record(f"sample_{cfg.model}_{cfg.steps}_w{cfg.guidance:g}", nfe=calls, seconds=round(seconds, 1), **scores)
    return x


def loaded(run, weights, model="student", Flux=Flux):
    """Process, network and tokenizer of the student's weights file, or of the teacher's, which lies beside it."""
    if model not in ("student", "teacher"):
        raise UserError(f"model={model} is none of student, teacher")
    weights = weights if model == "student" else run.read(weights.path.with_name(TEACHER))
    flow, net = run.place(RectifiedFlow(**weights.config["flow"]), weights.load(Flux(**weights.config["flux"])))
    return flow, net, Tokenizer(weights.config["captions"].vocabulary.split(), weights.config["flux"].length)


def passes(cfg):
    """Network calls a step: the teacher needs two, unless w is 1."""
    return 1 + (cfg.model == "teacher" and cfg.guidance != 1)


def velocity(net, words, texts, cfg):
    """v under these captions, a function of x_t and t: one pass with w as input, or two that w combines."""
    c, null = (words(said).to(device_of(net)) for said in (texts, [""]))
    return given(net, c, cfg.guidance) if passes(cfg) == 1 else guided(net, c, null.expand_as(c), cfg.guidance)


def tokens(net, width=28):
    """Image tokens of a canvas 28 pixels high, which the sampling times depend on."""
    return 28 // net.patch * (width // net.patch)


def draw(flow, net, words, texts, cfg, generator, width=28):
    """An image of every caption, in batches: (n, 1, 28, width). generator: a list of one for each, or one for all."""
    n = noise(len(texts), (1, 28, width), generator).to(device_of(net))
    grid, batches = flow.grid(cfg.steps, tokens(net, width)), range(0, len(n), cfg.batch)
    batches = [slice(i, i + cfg.batch) for i in batches]
    return torch.cat([flow.sample(velocity(net, words, texts[part], cfg), n[part], grid) for part in batches])


if __name__ == "__main__":
    cli(main)
