"""Draw digits: Algorithm 2, on all T steps or an evenly spaced part of them.

    python sample.py                                     64 digits from your newest weights, else the published
    python sample.py n=16 steps=1000 seed=3              fewer digits, all the paper's steps, other noise
    python sample.py gif=denoising.gif npz=samples.npz   the way there as an animation; the images as an array
    python sample.py n=2048 metrics=true                 FID and the other scores
    python sample.py figures=true                        noising, the loss by time, the nearest training images
"""


import torch

from model import DDPM, UNet, noise_like
from utils import Run, batches, cli, figure, report, save_figure, save_gif, save_grid, save_npz, save_strip, score


def main(argv=None):
    run = Run(__file__, argv)
    cfg = run.config.sample
    weights = run.weights()                             # the file carries its network's configuration
    ddpm = DDPM(**{**weights.config["ddpm"], **({"variance": cfg.variance} if cfg.variance else {})})
    net = weights.load(UNet(**weights.config["unet"]))
    ddpm, net = run.place(ddpm, net)

    start = run.clock()
    x = draw(ddpm, net, cfg.n, cfg.steps, run.generators(cfg.n), cfg.clip, cfg.batch, weights.data.shape)
    seconds = run.clock() - start
    run.output(save_grid, x[:64], cfg.out)
    print(f"{cfg.n} images, {cfg.steps} network calls each, in {seconds:.1f} s")
    if cfg.npz:
        run.output(save_npz, x, cfg.npz)
    if cfg.gif:
        frames = denoising(ddpm, net, cfg.steps, run.generators(6), cfg.clip, shape=weights.data.shape)
        run.output(save_gif, frames, cfg.gif, columns=6)
    if cfg.figures:
        figures(run, ddpm, net, x)
    if cfg.metrics:
        scores = score(x)
        print(report(scores))
        run.record(f"sample_{cfg.steps}", nfe=cfg.steps, seconds=round(seconds, 1), variance=ddpm.variance, **scores)
    return x


def draw(ddpm, net, n, steps, generator, clip=True, batch=128, shape=(1, 28, 28)):
    """n samples in batches, (n, C, H, W). generator: a list of one for each image, or one for all of them."""
    parts = batches(n, batch, generator)
    return torch.cat([ddpm.sample(net, size, steps, shape, clip, part) for size, part in parts])


def denoising(ddpm, net, steps, generators, clip=True, frames=24, shape=(1, 28, 28)):
    """Pictures of some images on their way: each x_t, and beside it the x_0 estimated from it."""
    x, path = noise_like(torch.empty(len(generators), *shape, device=ddpm.abar.device), generators), []
    for _, x_next, x0 in ddpm.reverse(net, x, steps, clip, generators):
        path.append(torch.stack([x, x0], dim=1).flatten(0, 1).cpu())
        x = x_next
    path.append(torch.stack([x, x], dim=1).flatten(0, 1).cpu())
    return [path[i] for i in sorted({round(i) for i in torch.linspace(0, len(path) - 1, frames).tolist()})]


def figures(run, ddpm, net, x):
    """Three more pictures: images dissolving, samples above their nearest training images, the error by time."""
    train, test = run.images().all(), run.images(split="test", limit=128).all().to(run.device)
    eps = torch.randn(128, *test.shape[1:], generator=run.generator(2)).to(run.device)
    times = torch.linspace(0, ddpm.timesteps - 1, 13, device=run.device).round().long()
    run.output(save_strip, [ddpm.q_sample(x0.expand_as(eps[:13]), times, eps[:13]) for x0 in test[:3]], "forward.png",
               across=[f"t = {t}" for t in times.tolist()])
    few = x[:12].cpu()
    run.output(save_strip, [few, train[torch.cdist(few.flatten(1), train.flatten(1)).argmin(1)]], "neighbours.png",
               down=["sample", "nearest"])
    error = []
    with torch.no_grad():
        for t in times[:, None].expand(-1, len(test)):
            noise = eps[:len(test)]
            error.append(float((net(ddpm.q_sample(test, t, noise), t) - noise).square().mean()))
    fig, ax = figure()
    ax.semilogy(times.cpu(), error, "o-")
    ax.set(xlabel="t", ylabel="squared error of the predicted noise")
    run.output(save_figure, fig, "loss_by_t.png")


if __name__ == "__main__":
    cli(main)
