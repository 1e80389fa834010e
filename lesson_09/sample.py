"""Draw digits with the learned variance, in all T steps or in a few; estimate bits per dimension.

    python sample.py                                     64 digits from your newest weights, else the published
    python sample.py steps=10 variance=large             ten steps, the wider fixed variance
    python sample.py gif=denoising.gif npz=samples.npz   the way there as an animation; the images as an array
    python sample.py n=2048 metrics=true bound=256       FID and the other scores; bits/dim on 256 test images
"""

import torch

from model import IDDPM, UNet, noise_like
from utils import Run, batches, cli, report, save_gif, save_grid, save_npz, score


# Adapted from lesson_05/sample.py: main -- a learned variance, skipped steps, bits/dim
def main(argv=None):
    run = Run(__file__, argv)
    cfg = run.config.sample
    weights = run.weights()                             # the file carries its network's configuration
    ddpm = IDDPM(**{**weights.config["ddpm"], **({"variance": cfg.variance} if cfg.variance else {})})
    net = weights.load(UNet(**weights.config["unet"]))
    ddpm, net = run.place(ddpm, net)

    start = run.clock()
    x = draw(ddpm, net, cfg.n, cfg.steps, run.generators(cfg.n), cfg.clip, cfg.batch, cfg.skip, weights.data.shape)
    seconds, calls = run.clock() - start, len(ddpm.times(cfg.steps, cfg.skip))
    run.output(save_grid, x[:64], cfg.out)
    print(f"{cfg.n} images, {calls} network calls each, in {seconds:.1f} s")
    if cfg.npz:
        run.output(save_npz, x, cfg.npz)
    if cfg.gif:
        frames = denoising(ddpm, net, cfg.steps, run.generators(6), cfg.clip, shape=weights.data.shape)
        run.output(save_gif, frames, cfg.gif, columns=6)
    if cfg.bound:
        x0 = run.images(split="test").first(cfg.bound)[0].to(run.device)
        values, *_ = bits(ddpm, net, x0, run.generator(2))
        mean, error = float(values.mean()), float(values.std() / len(values) ** 0.5)
        print(f"{mean:.3f} +- {error:.3f} bits/dim (bound, {ddpm.variance} variance, {len(x0)} test images)")
        run.record(f"bound_{ddpm.variance}", bits=mean, standard_error=error, images=len(x0))
    if cfg.metrics:
        scores = score(x)
        print(report(scores))
        run.record(f"sample_{cfg.steps}", nfe=calls, seconds=round(seconds, 1), variance=ddpm.variance, **scores)
    return x


# Adapted from lesson_05/sample.py: draw -- steps can be skipped
def draw(ddpm, net, n, steps, generator, clip=True, batch=128, skip=0.0, shape=(1, 28, 28)):
    """n samples in batches, (n, C, H, W). generator: a list of one for each image, or one for all of them."""
    parts = batches(n, batch, generator)
    return torch.cat([ddpm.sample(net, size, steps, shape, clip, part, skip) for size, part in parts])


# Copied from lesson_05/sample.py: denoising
def denoising(ddpm, net, steps, generators, clip=True, frames=24, shape=(1, 28, 28)):
    """Pictures of some images on their way: each x_t, and beside it the x_0 estimated from it."""
    x, path = noise_like(torch.empty(len(generators), *shape, device=ddpm.abar.device), generators), []
    for _, x_next, x0 in ddpm.reverse(net, x, steps, clip, generators):
        path.append(torch.stack([x, x0], dim=1).flatten(0, 1).cpu())
        x = x_next
    path.append(torch.stack([x, x], dim=1).flatten(0, 1).cpu())
    return [path[i] for i in sorted({round(i) for i in torch.linspace(0, len(path) - 1, frames).tolist()})]


def bits(ddpm, net, x0, generator, exact=32, width=8):
    """Bits per dimension of every image, an unbiased estimate of the bound at a sixth of its price.

    All t below `exact`, where the terms are large; of every further stretch of about `width` one random t, weighted.
    Returns bits/dim (N,), the times (N, K) and their terms (N, K).
    """
    exact = min(exact, ddpm.timesteps // 2)
    edges = torch.linspace(exact, ddpm.timesteps, max(1, (ddpm.timesteps - exact) // width) + 1).round().long()
    share = torch.rand(len(x0), len(edges) - 1, generator=generator)
    times = torch.cat([torch.arange(exact).expand(len(x0), -1), edges[:-1] + (share * edges.diff()).long()], dim=1)
    weight = torch.cat([torch.ones(exact), edges.diff().float()]).to(x0.device)
    prior, terms = ddpm.bound(net, x0, times.to(x0.device), generator=generator)
    return prior + terms @ weight, times, terms


if __name__ == "__main__":
    cli(main)
