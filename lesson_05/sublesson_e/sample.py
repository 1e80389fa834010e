"""Draw what a caption says.

    python sample.py                                        every digit in every thickness and slant
    python sample.py prompt="a thick seven leaning right"   what you like; ";" between several captions
    python sample.py gif=denoising.gif npz=samples.npz      the way there as an animation; images and digits as arrays
    python sample.py n=2000 metrics=true                    how the captions of test images are followed; FID
"""

import torch

from model import DDPM, UNet, guided
from utils import Run, batches, cli, noise, report, save_gif, save_grid, save_npz, score
from utils.captions import STYLES, Tokenizer, caption, captioned, follow, read_caption

GRID = [caption(digit, {"thickness": a, "slant": b}) for a in range(3) for b in range(3) for digit in range(10)]


def main(argv=None):
    run = Run(__file__, argv)
    cfg = run.config.sample
    ddpm, net, words = loaded(run, run.weights())       # the file carries its network's configuration and its words
    texts = [text.strip() for text in cfg.prompt.split(";")] if cfg.prompt else GRID
    if cfg.metrics and not cfg.prompt:
        texts = [said[0] for said in captioned("test", limit=cfg.n, without_held_out=False).captions]
    texts = (texts * -(-cfg.n // len(texts)))[:cfg.n]
    words(texts)                                        # an error if there is one that the network has not learned
    digit = torch.tensor([read_caption(text)[0]["digit"] if text else -1 for text in texts])        # -1: none

    start = run.clock()
    x = draw(ddpm, net, words, texts, cfg.steps, cfg.guidance, run.generators(cfg.n), cfg.batch)
    seconds, calls = run.clock() - start, cfg.steps * (1 if cfg.guidance in (0, 1) else 2)
    labels = {} if cfg.prompt or cfg.metrics else {"across": range(10), "down": STYLES[:-(-len(x) // 10)]}
    run.output(save_grid, x[:90], cfg.out, columns=10, **labels)
    print(f"{cfg.n} digits, {calls} network calls each, in {seconds:.1f} s; the first: {texts[0]!r}")
    if cfg.npz:
        run.output(save_npz, x, cfg.npz, labels=digit)
    if cfg.gif:
        eps, c = conditioned(net, words, texts[:90:11], cfg.guidance, run.device)
        own = run.generators(cfg.n)[:90:11]
        way = ddpm.reverse(eps, noise(len(own), (1, 28, 28), own).to(run.device), cfg.steps, generator=own)
        path = [torch.cat([x_s, x_0]).cpu() for _, x_s, x_0 in way]
        shown = sorted({round(i) for i in torch.linspace(0, len(path) - 1, 30).tolist()})
        run.output(save_gif, [path[i] for i in shown], cfg.gif, columns=len(c))
    if cfg.metrics:
        scores = score(x, digit) | {"followed": follow(x, texts)}
        print(report(scores), *(f"{name:10} {share:.3f}" for name, share in scores["followed"].items()), sep="\n")
        name = f"sample_{cfg.steps}_w{cfg.guidance:g}"
        run.record(name, nfe=calls, seconds=round(seconds, 1), guidance=cfg.guidance, **scores)
    return x


def loaded(run, weights):
    """Process, network and tokenizer of a weights file."""
    config = weights.config
    ddpm, net = run.place(DDPM(**config["ddpm"]), weights.load(UNet(**config["unet"])))
    return ddpm, net, Tokenizer(config["captions"].vocabulary.split(), config["unet"].length)


def conditioned(net, words, texts, guidance, device):
    """The noise predicted under these captions, as a function of x_t and t; and their word numbers."""
    c = words(texts).to(device)
    return guided(net, c, words([""]).to(device).expand_as(c), guidance), c


def draw(ddpm, net, words, texts, steps, guidance, generator, batch=128):
    """An image of every caption, in batches: (n, 1, 28, 28). generator: a list of one for each, or one for all."""
    parts = zip(range(0, len(texts), batch), batches(len(texts), batch, generator))
    return torch.cat([ddpm.sample(conditioned(net, words, texts[i:i + batch], guidance, ddpm.abar.device)[0], size,
                                  steps, generator=own) for i, (size, own) in parts])


if __name__ == "__main__":
    cli(main)
