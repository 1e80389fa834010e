"""Draw digits or points: start from noise and walk back, on some or all of the T steps.

    python sample.py                                     64 digits from your newest weights, else the published
    python sample.py n=16 steps=1000 seed=3              fewer digits, all the steps, other noise
    python sample.py gif=denoising.gif npz=samples.npz   the way there as an animation; the images as an array
    python sample.py n=2048 metrics=true                 FID and the other scores
    python train.py data=swiss_roll && python sample.py n=10000      points in the plane
"""

import torch

from model import MLP, Diffusion
from utils import Run, UserError, batches, cli, noise, report, save_gif, save_grid, save_npz, score


def main(argv=None):
    run = Run(__file__, argv)
    cfg = run.config.sample
    weights = run.weights()                             # the file carries its network's configuration
    kind = "digits" if "digits" in weights.config else "points"
    if kind == "points" and (cfg.npz or cfg.metrics):
        raise UserError("npz and metrics are for digits, and these weights draw points: leave them out")
    shape = tuple(weights.config[kind]["shape"])
    diffusion, net = Diffusion(**weights.config["diffusion"]), weights.load(MLP(**weights.config[kind]))
    diffusion, net = run.place(diffusion, net)

    start = run.clock()
    parts = batches(cfg.n, cfg.batch, run.generators(cfg.n))                   # every sample has its own noise
    x = torch.cat([diffusion.sample(net, size, cfg.steps, shape, part) for size, part in parts])
    seconds = run.clock() - start
    run.output(save_grid, picture(x), cfg.out)
    print(f"{cfg.n} {kind}, {cfg.steps} network calls each, in {seconds:.1f} s")
    if cfg.npz:
        run.output(save_npz, x, cfg.npz)
    if cfg.gif:
        generators = run.generators(9 if kind == "digits" else 4000)
        run.output(save_gif, denoising(diffusion, net, cfg.steps, generators, shape), cfg.gif,
                   columns=6 if kind == "digits" else 2)
    if cfg.metrics:
        scores = score(x)
        print(report(scores))
        run.record(f"sample_{cfg.steps}", nfe=cfg.steps, seconds=round(seconds, 1), **scores)
    return x


def denoising(diffusion, net, steps, generators, shape, frames=40):
    """Pictures of some samples on their way: each x_t, and beside it the x_0 estimated from it."""
    xT = noise(len(generators), shape, generators).to(diffusion.abar.device)
    path = list(diffusion.reverse(net, xT, steps, generators))
    path = path[::max(1, len(path) // frames)] + path[-1:]
    return [torch.stack([picture(x), picture(x0)], dim=1).flatten(0, 1) for _, x, x0 in path]


def picture(x, colour=None, size=140, reach=2.6):
    """Images as they are, the first 64; points (N, 2) as one image (1, 3, size, size), each a pixel of its colour."""
    x = x.cpu()
    if x.ndim == 4:
        return x[:64]
    place = ((x / reach + 1) * size / 2).long()         # (N, 2): column, and row from below
    inside = ((place >= 0) & (place < size)).all(1)
    canvas = -torch.ones(3, size, size)
    canvas[:, size - 1 - place[inside, 1], place[inside, 0]] = 1.0 if colour is None else colour[inside].T
    return canvas[None]


if __name__ == "__main__":
    cli(main)
