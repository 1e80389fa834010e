"""Train text-to-image on MNIST with captions.

    python train.py                          the values of config.yaml
    python train.py unet.layers=1            one block of the text encoder instead of two; --help lists all keys
    python train.py --resume                 go on after Ctrl-C or a crash
    torchrun --nproc_per_node 2 train.py     several processes, one model
"""

import torch

from model import DDPM, SpatialTransformer, TextEncoder, UNet, drop, given
from utils import EMA, Run, Section, Weights, cli, ramp, save_grid
from utils.captions import captioned


# Adapted from lesson_05/sublesson_c/train.py: main -- captions, tokenised once, instead of labels
def main(argv=None):
    run = Run(__file__, argv)                           # configuration, device, precision, seed, processes
    cfg, said = run.config.train, run.config.captions
    data = captioned("train", cfg.batch_size, cfg.seed, said.images or None, words=said.attributes,
                     data=cfg.data)
    words = data.tokenizer
    sizes = Section(vocabulary=len(words), length=words.length, **run.config.unet)
    ddpm, net = DDPM(**run.config.ddpm), UNet(**sizes)
    if cfg.start:
        begin_with(net, Weights(run.lesson / cfg.start, run.name))
    optimizer = torch.optim.Adam(net.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)
    ddpm, net, optimizer = run.prepare(ddpm, net, optimizer)
    ema = EMA(net, cfg.ema_decay)
    run.track(net=net, optimizer=optimizer, ema=ema)    # what a checkpoint holds; loads it on --resume
    null = words([""])[0].to(run.device)                # (L,): the start token and padding

    for step, (x0, c) in run.steps(data):               # x0 (B, 1, 28, 28), c (B, L) word numbers
        optimizer.param_groups[0]["lr"] = cfg.lr * ramp(step, cfg.warmup, cfg.steps)
        if cfg.shuffle:                                 # the baseline: a bag of words behind the start token
            c = shuffled(c)
        c = drop(c, null, cfg.drop)                     # a coin for every sample
        loss = ddpm.loss(given(net, c), x0)             # LDM's Eq. (3), without the autoencoder
        optimizer.zero_grad()
        run.backward(loss)
        run.clip_grad_norm(net.parameters(), cfg.clip)
        optimizer.step()
        ema.update(net)                                 # samples come from the average of the weights
        run.log(loss=loss)
        if run.every(cfg.preview_every):
            c = words(["a thin", "a thick"][i // 10 % 2] + f" {i % 10} leaning " + ["left", "right"][i // 20 % 2]
                      for i in range(40)).to(run.device)
            x = ddpm.sample(given(ema.module, c), len(c), min(run.config.sample.steps, ddpm.timesteps),
                            generator=run.generator())
            save_grid(x, run.folder / f"preview_{step + 1:06d}.png", columns=10)
    said = Section(vocabulary=" ".join(words.words), **said)                       # the file carries its words
    return run.finish(ema, unet=sizes, ddpm=run.config.ddpm, captions=said)         # weights, loss curve, numbers


def begin_with(net, weights):
    """Take over a trained network of this lesson, but for its text encoder and transformers: they learn anew."""
    new = TextEncoder, SpatialTransformer
    fresh = tuple(f"{name}." for name, part in net.named_modules() if isinstance(part, new))
    weights.state |= {key: value for key, value in net.state_dict().items() if key.startswith(fresh)}
    weights.load(net)


def shuffled(c):
    """Every caption's words in a random order; start token and padding stay. (B, L) -> (B, L)."""
    rank = torch.rand(c.shape, device=c.device)
    rank[:, 0] = -1
    return c.gather(1, (rank + 2 * (c == 0)).argsort(dim=1))


if __name__ == "__main__":
    cli(main)
