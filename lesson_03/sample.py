"""Draw digits: annealed Langevin dynamics, Algorithm 1.

    python sample.py                                     64 digits from your newest weights, else the published
    python sample.py n=16 steps=100 epsilon=2e-5 seed=3  fewer digits, the paper's steps and their size, other noise
    python sample.py gif=denoising.gif npz=samples.npz   the way there as an animation; the images as an array
    python sample.py n=1024 metrics=true                 FID and the other scores
    python sample.py figures=true                        level by level, inpainting, the nearest training images
"""

import torch

from model import NCSN, dequantise, from_unit, network
from utils import Run, batches, cli, report, save_gif, save_grid, save_npz, score


# Adapted from lesson_01/sample.py: main -- Langevin steps at each level; pictures of levels and of inpainting
def main(argv=None):
    run = Run(__file__, argv)
    cfg = run.config.sample
    weights = run.weights()                             # the file carries its network's configuration
    ncsn = NCSN(**weights.config["ncsn"])
    net = weights.load(network(ncsn, weights.config))
    ncsn, net = run.place(ncsn, net)
    calls, shape = ncsn.levels * cfg.steps, weights.data.shape

    start = run.clock()
    x = draw(ncsn, net, cfg.n, cfg.steps, cfg.epsilon, run.generators(cfg.n), cfg.batch, shape)
    seconds = run.clock() - start
    run.output(save_grid, x[:64], cfg.out)
    print(f"{cfg.n} images, {calls} network calls each, in {seconds:.1f} s")
    if cfg.npz:
        run.output(save_npz, x, cfg.npz)
    if cfg.gif:
        run.output(save_gif, denoising(ncsn, net, cfg, run.generators(6), shape=shape), cfg.gif, columns=6)
    if cfg.figures:
        figures(run, ncsn, net, x)
    if cfg.metrics:
        scores = score(x)
        print(report(scores))
        run.record(f"sample_{calls}", nfe=calls, seconds=round(seconds, 1), epsilon=cfg.epsilon, **scores)
    return x


def draw(ncsn, net, n, steps, epsilon, generator, batch=128, shape=(1, 28, 28)):
    """n samples in batches, (n, C, H, W) in about [-1, 1]. generator: a list, one for each of them, or one for all."""
    parts = batches(n, batch, generator)
    return from_unit(torch.cat([ncsn.sample(net, size, steps, epsilon, shape, part) for size, part in parts]))


def denoising(ncsn, net, cfg, generators, frames=40, shape=(1, 28, 28)):
    """Pictures of some images on their way: each x, and beside it the x_0 estimated from it."""
    start = ncsn.start(len(generators), shape, generators)
    path = [torch.stack([x, x0], dim=1).flatten(0, 1).cpu()
            for _, x, x0 in ncsn.anneal(net, start, cfg.steps, cfg.epsilon, generators)]
    return [from_unit(path[i]) for i in sorted({round(i) for i in torch.linspace(0, len(path) - 1, frames).tolist()})]


def figures(run, ncsn, net, x):
    """Three more pictures: chains level by level, right halves made up anew, samples and nearest training images."""
    cfg, generators = run.config.sample, run.generators(12)
    rows = [ncsn.start(8, x.shape[1:], generators[:8])]
    for k, (_, state, _) in enumerate(ncsn.anneal(net, rows[0], cfg.steps, cfg.epsilon, generators[:8])):
        rows += [state] if (k + 1) % cfg.steps == 0 else []                # the end of each level
    run.output(save_grid, from_unit(torch.stack(rows, dim=1).flatten(0, 1)), "levels.png", columns=len(rows),
               across=["start", *[f"{sigma:.2g}" for sigma in ncsn.sigmas.tolist()]])

    known = dequantise(run.images(split="test", limit=12).all()).to(run.device)
    left = torch.zeros_like(known, dtype=torch.bool)
    left[..., :known.shape[3] // 2] = True
    filled = [ncsn.inpaint(net, known, left, cfg.steps, cfg.epsilon, generators) for _ in range(4)]
    rows = [known, torch.where(left, known, 0.25), *filled]
    run.output(save_grid, from_unit(torch.cat(rows)), "inpainting.png", columns=12,
               down=["test digit", "left half", "completed", "again", "again", "again"])

    train = run.images().all()
    few = x[:12].cpu()
    near = train[torch.cdist(few.flatten(1), train.flatten(1)).argmin(1)]
    run.output(save_grid, torch.cat([few, near]), "neighbours.png", columns=len(few), down=["sample", "nearest"])


if __name__ == "__main__":
    cli(main)
