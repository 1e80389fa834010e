"""Draw what a caption says.

    python sample.py                                        every digit in every thickness and slant
    python sample.py prompt="a thick seven leaning right"   what you like; ";" between several captions
    python sample.py encoders="[1, 1, 0]"                   the third encoder's caption dropped
    python sample.py gif=way.gif npz=samples.npz            the way there as an animation; images and digits as arrays
    python sample.py n=2048 metrics=true                    how the captions of test images are followed; FID
"""

import torch

from model import MMDiT, RectifiedFlow, for_encoders, guided
from utils import Run, UserError, captions, cli, device_of, noise, report, save_gif, save_grid, save_npz, score

GRID = [captions.caption(digit, {"thickness": a, "slant": b})
        for a in range(3) for b in range(3) for digit in range(10)]


def main(argv=None):
    run = Run(__file__, argv)
    cfg = run.config.sample
    flow, net, words = loaded(run, run.weights())       # the file carries its network's configuration and its words
    texts = [text.strip() for text in cfg.prompt.split(";")] if cfg.prompt else GRID
    if cfg.metrics and not cfg.prompt:
        texts = [said[0] for said in captions.captioned("test", limit=cfg.n, without_held_out=False).captions]
    texts = (texts * -(-cfg.n // len(texts)))[:cfg.n]
    digit = torch.tensor([captions.read_caption(text)[0]["digit"] if text else -1 for text in texts])    # -1: none
    grid, n = flow.grid(cfg.steps, cfg.shift, cfg.official), noise(cfg.n, (1, 28, 28), run.generators(cfg.n))

    start = run.clock()
    x = draw(flow, net, words, texts, n, grid, cfg.guidance, cfg.encoders, cfg.batch)
    seconds, calls = run.clock() - start, cfg.steps * (1 if cfg.guidance in (0, 1) else 2)
    labels = {} if cfg.prompt or cfg.metrics else {"across": range(10), "down": captions.STYLES[:-(-len(x) // 10)]}
    run.output(save_grid, x[:90], cfg.out, columns=10, **labels)
    print(f"{cfg.n} digits, {calls} network calls each, in {seconds:.1f} s; the first: {texts[0]!r}")
    if cfg.npz:
        run.output(save_npz, x, cfg.npz, labels=digit)
    if cfg.gif:                                         # at most fifty frames: x_t above, the x_0 it aims at below
        v = conditioned(net, words, texts[:90:11], cfg.guidance, cfg.encoders, run.device)
        path = [torch.cat([x_s, x_0]).cpu() for _, x_s, x_0 in flow.reverse(v, n[:90:11].to(run.device), grid)]
        run.output(save_gif, path[::-(len(path) // 50 + 1)][::-1], cfg.gif, columns=len(path[0]) // 2)
    if cfg.metrics:
        scores = score(x, digit) | {"followed": captions.follow(x, texts)}
        print(report(scores), *(f"{name:10} {share:.3f}" for name, share in scores["followed"].items()), sep="\n")
        name = f"_shift{cfg.shift:g}" * (cfg.shift != 1) + "_official" * cfg.official
        name += f"_encoders{''.join(map(str, cfg.encoders))}" * (0 in cfg.encoders)
        run.record(f"sample_{cfg.steps}_w{cfg.guidance:g}{name}", nfe=calls, seconds=round(seconds, 1),
                   guidance=cfg.guidance, shift=cfg.shift, **scores)
    return x


def loaded(run, weights, RectifiedFlow=RectifiedFlow, MMDiT=MMDiT):
    """Process, network and tokenizer of a weights file."""
    config = weights.config
    flow, net = run.place(RectifiedFlow(**config["flow"]), weights.load(MMDiT(**config["mmdit"])))
    return flow, net, captions.Tokenizer(config["captions"].vocabulary.split(), config["mmdit"].length)


def conditioned(net, words, texts, guidance, encoders, device):
    """The guided velocity under these captions, a function of x_t and 1000 t; encoders: which of the three see them."""
    if len(encoders) != 3 or not set(encoders) <= {0, 1}:
        raise UserError(f"encoders={list(encoders)} must be three numbers, each 0 or 1, as in encoders=[1, 1, 0]")
    c, null = words(texts).to(device), words([""]).to(device)
    full, empty = for_encoders(c, null[0]), for_encoders(null.expand_as(c), null[0])
    return guided(net, torch.where(torch.tensor(encoders, device=device)[:, None] == 1, full, empty), empty, guidance)


def draw(flow, net, words, texts, n, grid, guidance, encoders=(1, 1, 1), batch=128):
    """An image of every caption from its noise n, in batches: (N, 1, 28, 28)."""
    parts = zip(n.to(device_of(net)).split(batch), range(0, len(n), batch))
    return torch.cat([flow.sample(conditioned(net, words, texts[i:i + batch], guidance, encoders, part.device),
                                  part, grid) for part, i in parts])


if __name__ == "__main__":
    cli(main)
