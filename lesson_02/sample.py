"""Draw digits, points or bits: start from noise and take the learned steps back, all T - 1 or some of them.

    python sample.py                                     64 digits from your newest weights, else the published
    python sample.py n=16 steps=100 seed=3               fewer digits, longer steps, other noise
    python sample.py gif=denoising.gif npz=samples.npz   the way there as an animation; the images as an array
    python sample.py n=1024 steps=100 metrics=true       FID and the other scores
    python train.py data=swiss_roll && python sample.py n=5000       points; data=heartbeat: bits
"""

import torch

from model import DPM, MLP, Binomial, DigitNet, PointNet
from utils import Run, UserError, batches, cli, noise, report, save_gif, save_grid, save_npz, score


# Adapted from lesson_01/sample.py: main -- digits, points or bits
def main(argv=None):
    run = Run(__file__, argv)
    cfg = run.config.sample
    weights = run.weights()                             # the file carries its network's configuration
    chain, net = build(weights.config)
    if "digits" not in weights.config and (cfg.npz or cfg.metrics or cfg.gif):
        raise UserError("npz, metrics and gif are for digits, and these weights draw something else: leave them out")
    chain, net = run.place(chain, weights.load(net))
    steps = chain.timesteps - 1 if "bits" in weights.config else min(cfg.steps, chain.timesteps - 1)
    if steps != cfg.steps:
        run.refuse("steps", f"of {steps} steps, {'all are' if 'bits' in weights.config else 'no more can be'} taken")
    shape, start = shape_of(weights.config), run.clock()
    parts = batches(cfg.n, cfg.batch, run.generators(cfg.n))                   # every sample has its own noise
    x = torch.cat([draw(chain, net, size, steps, shape, part) for size, part in parts])
    seconds = run.clock() - start
    run.output(save_grid, picture(x), cfg.out)
    print(f"{cfg.n} samples, {steps} network calls each, in {seconds:.1f} s")
    if cfg.npz:
        run.output(save_npz, x, cfg.npz)
    if cfg.gif:
        run.output(save_gif, denoising(chain, net, steps, run.generators(6), shape), cfg.gif, columns=6)
    if cfg.metrics:
        scores = score(x)
        print(report(scores))
        run.record(f"sample_{steps}", nfe=steps, seconds=round(seconds, 1), **scores)
    return x


def build(config):
    """Chain and network for digits, points or bits, from the sections of a configuration."""
    if "bits" in config:
        return Binomial(**config["binomial"]), MLP(**config["bits"])
    bumps = config["dpm"]["bumps"]
    kind, network = ("digits", DigitNet) if "digits" in config else ("points", PointNet)
    return DPM(**config["dpm"]), network(**config[kind], bumps=bumps)


def shape_of(config):
    if "bits" in config:
        return tuple(config["bits"]["shape"])
    return (2,) if "points" in config else (1, *[getattr(config["digits"], "image_size", 28)] * 2)


def draw(chain, net, n, steps, shape, generator):
    """n samples in so many network calls, at most T - 1; bits always take all of them."""
    fewer = {"steps": min(steps, chain.timesteps - 1)} if isinstance(chain, DPM) else {}
    return chain.sample(net, n, shape=shape, generator=generator, **fewer)


def denoising(chain, net, steps, generators, shape=(1, 28, 28), frames=30):
    """Pictures of some digits on their way: x_t, and below it the x_0 that the step aims at."""
    xT = noise(len(generators), shape, generators).to(chain.abar.device)
    path = [chain.restore(torch.cat([x, x0])).cpu() for _, x, x0 in chain.reverse(net, xT, steps, generator=generators)]
    return [path[round(i)] for i in torch.linspace(0, len(path) - 1, min(frames, len(path))).tolist()]


# Adapted from lesson_01/sample.py: picture -- and bits
def picture(x, size=140, reach=2.6):
    """Images as they are, the first 64; bits (N, D) as rows of one image; points (N, 2) as pixels of one image."""
    if x.ndim == 4 or x.shape[1] > 2:
        return x[:64].cpu() if x.ndim == 4 else 2 * x[None, None, :64].cpu() - 1
    column, row = ((x.cpu() / reach + 1) * size / 2).long().clamp(0, size - 1).T
    canvas = -torch.ones(1, 1, size, size)
    canvas[0, 0, size - 1 - row, column] = 1.0
    return canvas


if __name__ == "__main__":
    cli(main)
