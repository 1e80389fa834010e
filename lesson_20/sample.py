"""Draw digits with EDM's denoiser: Heun's method on 18 noise levels, and everything it is compared with.

    python sample.py                                     64 digits, 35 calls: your newest weights, else the published
    python sample.py solver=euler levels=vp steps=50     DDIM's way; churn=20 steps=40: Algorithm 2, noise on the way
    python sample.py n=2048 metrics=true figures=true    FID; the denoiser by sigma, the same start with more churn
"""

import torch

from model import EDM, UNet
from utils import Run, UserError, batches, cli, device_of, noise, report, save_gif, save_grid, save_npz, score


def main(argv=None):
    run = Run(__file__, argv)
    cfg = run.config.sample
    edm, net = load(run, weights := run.weights())      # the file carries its network's configuration
    sigmas = edm.levels(cfg.steps, cfg.levels)
    shape = weights.data.shape
    how = {key: cfg[key] for key in ("schedule", "solver", "churn", "s_min", "s_max", "s_noise")}
    if cfg.churn and (cfg.solver, cfg.schedule) != ("heun", "edm"):
        raise UserError(f"churn={cfg.churn:g} is Algorithm 2, which needs solver=heun schedule=edm")
    calls = cfg.steps if cfg.solver == "euler" else 2 * cfg.steps - 1
    start = run.clock()
    x = draw(edm, net, cfg.n, run.generators(cfg.n), cfg.batch, sigmas, shape, **how)
    seconds = run.clock() - start
    run.output(save_grid, x[:64], cfg.out)
    print(f"{cfg.n} images, {calls} network calls each, in {seconds:.1f} s")
    if cfg.npz:
        run.output(save_npz, x, cfg.npz)
    if cfg.gif:
        run.output(save_gif, denoising(edm, net, run.generators(6), sigmas, shape=shape, **how), cfg.gif, columns=6)
    if cfg.figures:
        figures(run, edm, net, shape)
    if cfg.metrics:
        print(report(scores := score(x)))
        name = f"sample_{calls}" + f"_churn_{cfg.churn:g}" * bool(cfg.churn)
        name += "".join(f"_{value}" for value in (cfg.solver, cfg.levels, cfg.schedule) if value not in ("heun", "edm"))
        run.record(name, nfe=calls, seconds=round(seconds, 1), levels=cfg.levels, **how, **scores)
    return x


def load(run, weights):
    """Process and network of a weights file."""
    return run.place(EDM(**weights.config["edm"]), weights.load(UNet(**weights.config["unet"])))


def draw(edm, net, n, generator, batch, sigmas, shape=(1, 28, 28), **how):
    """n samples in batches, (n, C, H, W). generator: a list, one for each, or one for all: first for the starts."""
    parts = zip(noise(n, shape, generator).to(device_of(net)).split(batch), batches(n, batch, generator))
    return torch.cat([edm.sample(net, start, sigmas, generator=own, **how) for start, (_, own) in parts])


def scaled(edm, y, sigma):
    """y + sigma eps, standardised, scaled to the std of the data: an image to look at."""
    return edm.to_image(y * edm.sigma_data / (sigma ** 2 + edm.sigma_data ** 2) ** 0.5)


def denoising(edm, net, generators, sigmas, frames=30, shape=(1, 28, 28), **how):
    """Pictures of some images on their way: each x, scaled, and beside it the image D(x; sigma) that is expected."""
    start = noise(len(generators), shape, generators).to(device_of(net))
    path, y = [], start * sigmas[0]
    for sigma, x, clean in edm.reverse(net, start, sigmas, generator=generators, **how):
        path.append(torch.stack([scaled(edm, y, sigma).float(), clean], dim=1).flatten(0, 1).cpu())
        y = edm.standardise(x)
    path.append(torch.stack([x, x], dim=1).flatten(0, 1).cpu())
    return [path[i] for i in sorted({round(i) for i in torch.linspace(0, len(path) - 1, frames).tolist()})]


@torch.no_grad()
def figures(run, edm, net, shape):
    """Two more pictures: what the denoiser sees and gives by sigma, and the same start with more and more churn."""
    y = edm.standardise(run.images(split="test", limit=5).all()[-1:].to(run.device).expand(9, -1, -1, -1))
    sigma = torch.tensor(levels := [0.02, 0.1, 0.2, 0.5, 1, 2, 5, 20, 80], device=run.device)
    y = y + sigma[:, None, None, None] * torch.randn(y.shape, generator=run.generator(2)).to(run.device)
    pairs = torch.cat([scaled(edm, y, sigma[:, None, None, None]), edm.to_image(edm.denoise(net, y, sigma))])
    run.output(save_grid, pairs, "denoised.png", columns=9, scale=3, across=levels, down=["x, scaled", "D(x)"])
    row = lambda churn: draw(edm, net, 12, run.generators(12), 12, edm.levels(40), shape, churn=churn)
    rows = {f"churn={churn:g}": row(churn) for churn in (0.0, 1.0, 4.0, 16.0)}
    run.output(save_grid, torch.cat(list(rows.values())), "churn.png", columns=12, down=rows)


if __name__ == "__main__":
    cli(main)
