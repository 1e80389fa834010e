"""Draw digits: annealed Langevin dynamics with the step size of Technique 4, and the denoising step at the end.

    python sample.py                                     64 digits from your newest weights, else the published
    python sample.py n=16 steps=10 seed=3                fewer digits, more steps at each level, other noise
    python sample.py gif=denoising.gif npz=samples.npz   the way there as an animation; the images as an array
    python sample.py n=1024 metrics=true                 FID and the other scores
    python sample.py figures=true                        the way through the levels, the nearest training images
"""

import torch

from model import NCSNv2, UNet, from_unit
from utils import Run, batches, cli, report, save_gif, save_grid, save_npz, score


# Adapted from lesson_03/sample.py: main -- the step size follows from T; a last denoising step
def main(argv=None):
    run = Run(__file__, argv)
    cfg = run.config.sample
    weights = run.weights()                             # the file carries its network's configuration
    ncsn, net = run.place(NCSNv2(**weights.config["ncsn"]), weights.load(UNet(**weights.config["unet"])))

    shape, start = weights.data.shape, run.clock()
    x = draw(ncsn, net, cfg.n, cfg.steps, run.generators(cfg.n), cfg.denoise, cfg.batch, shape)
    seconds = run.clock() - start
    run.output(save_grid, x[:64], cfg.out)
    calls = ncsn.levels * cfg.steps + cfg.denoise
    print(f"{cfg.n} images, {calls} network calls each, in {seconds:.1f} s")
    if cfg.npz:
        run.output(save_npz, x, cfg.npz)
    if cfg.gif:
        run.output(save_gif, path(ncsn, net, cfg.steps, run.generators(6), shape=shape), cfg.gif, columns=6)
    if cfg.figures:
        figures(run, ncsn, net, x)
    if cfg.metrics:
        scores = score(x)
        print(report(scores))
        run.record(f"sample_{calls}", nfe=calls, seconds=round(seconds, 1), **scores)
    return x


# Adapted from lesson_03/sample.py: draw -- the last step instead of a step size
def draw(ncsn, net, n, steps, generator, denoise=True, batch=128, shape=(1, 28, 28)):
    """n samples in batches, (n, C, H, W) in about [-1, 1]. generator: a list, one for each of them, or one for all."""
    parts = batches(n, batch, generator)
    return torch.cat([from_unit(ncsn.sample(net, size, steps, shape, denoise, part)) for size, part in parts])


def path(ncsn, net, steps, generators, frames=30, shape=(1, 28, 28)):
    """Pictures of some chains on their way: each x after a level, and beside it the x_0 estimated from it."""
    ends = {}                                           # the last step of every level
    for level, *images in ncsn.anneal(net, ncsn.start(len(generators), shape, generators), steps, generators):
        ends[level] = images
    x, _ = ends[ncsn.levels - 1]
    shown = [ends[i] for i in sorted({round(i) for i in torch.linspace(0, ncsn.levels - 1, frames).tolist()})]
    shown.append([ncsn.last_step(net, x)] * 2)
    return [from_unit(torch.stack(pair, dim=1).flatten(0, 1)).cpu() for pair in shown]


def figures(run, ncsn, net, x):
    """Two more pictures: chains level by level, and samples above their nearest training images."""
    steps = run.config.sample.steps
    frames = torch.stack(path(ncsn, net, steps, run.generators(4), 14, x.shape[1:])[-12:])          # (12, 8, C, H, W)
    sigmas = ncsn.sigmas[torch.linspace(0, ncsn.levels - 1, 14).round().long()].tolist()
    run.output(save_grid, frames.transpose(0, 1).flatten(0, 1), "levels.png", columns=len(frames),
               across=[*[f"{sigma:.2g}" for sigma in sigmas[-11:]], "end"], down=["chain", "expected"] * 4)
    few, train = x[:12].cpu(), run.images().all()
    near = train[torch.cdist(few.flatten(1), train.flatten(1)).argmin(1)]
    run.output(save_grid, torch.cat([few, near]), "neighbours.png", columns=len(few), down=["sample", "nearest"])


if __name__ == "__main__":
    cli(main)
