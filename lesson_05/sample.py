"""Draw digits: Algorithm 2, on all T steps or an evenly spaced part of them.

    python sample.py                                     64 digits from your newest weights, else the published
    python sample.py n=16 steps=1000 seed=3              fewer digits, all the paper's steps, other noise
    python sample.py gif=denoising.gif npz=samples.npz   the way there as an animation; the images as an array
    python sample.py n=2048 metrics=true                 FID and the other scores
"""

import time

import torch

from model import DDPM, UNet
from utils import Run, cli, report, save_gif, save_grid, save_npz, score


def main(argv=None):
    run = Run(__file__, argv)
    cfg = run.config.sample
    weights = run.weights()                             # the file carries its network's configuration
    ddpm = DDPM(**{**weights.config["ddpm"], "variance": cfg.variance})
    net = weights.load(UNet(**weights.config["unet"]))
    ddpm, net = run.place(ddpm, net)
    generator = run.generator()

    start = time.perf_counter()
    x = draw(ddpm, net, cfg.n, cfg.steps, generator, cfg.clip, cfg.batch)
    seconds = time.perf_counter() - start
    run.output(save_grid, x[:64], "samples.png")
    print(f"{cfg.n} digits, {cfg.steps} network calls each, in {seconds:.1f} s")
    if cfg.npz:
        run.output(save_npz, x, cfg.npz)
    if cfg.gif:
        frames = denoising(ddpm, net, 12, cfg.steps, run.generator(1))
        run.output(save_gif, frames, cfg.gif, columns=6)
    if cfg.metrics:
        scores = score(x)
        print(report(scores))
        run.record(f"sample_{cfg.steps}", nfe=cfg.steps, seconds=round(seconds, 1), variance=cfg.variance, **scores)
    return x


def draw(ddpm, net, n, steps, generator, clip=True, batch=128):
    """n samples in batches, (n, 1, 28, 28)."""
    sizes = [min(batch, n - i) for i in range(0, n, batch)]
    return torch.cat([ddpm.sample(net, size, steps, clip=clip, generator=generator) for size in sizes])


def denoising(ddpm, net, n, steps, generator, frames=30):
    """Pictures of one batch on its way: x_t and beside it the x_0 estimated from it, n / 2 of each."""
    xT = torch.randn(n // 2, 1, 28, 28, generator=generator).to(ddpm.abar.device)
    path = [torch.stack([x, x0], dim=1).flatten(0, 1).cpu() for _, x, x0 in
            ddpm.reverse(net, xT, steps, generator=generator)]
    return path[::max(1, len(path) // frames)] + path[-1:]


if __name__ == "__main__":
    cli(main)
