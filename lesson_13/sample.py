"""Draw digits by ancestral sampling along the learned schedule, and measure the bound on the likelihood.

    python sample.py                                     64 digits from your newest weights, else the published
    python sample.py model=bound grid=even bound=512     the network of the bound; bits/dim of 512 test images
    python sample.py gif=denoising.gif npz=samples.npz   the way there as an animation; the images as an array
    python sample.py n=2048 metrics=true figures=true    FID and the other scores; two more pictures
"""

import torch

from model import VDM, Network
from utils import Run, batches, cli, noise, report, save_gif, save_grid, save_npz, score


def main(argv=None):
    run = Run(__file__, argv)
    cfg = run.config.sample
    vdm, net = load(run, weights := run.weights(), cfg.model)       # the file carries its network's configuration
    start = run.clock()
    x = draw(vdm, net, cfg.n, cfg.steps, run.generators(cfg.n), cfg.batch, weights.data.shape, cfg.grid)
    print(f"{cfg.n} images ({cfg.model}), {cfg.steps} network calls each, in {(seconds := run.clock() - start):.1f} s")
    run.output(save_grid, x[:64], cfg.out)
    if cfg.npz:
        run.output(save_npz, x, cfg.npz)
    if cfg.gif:
        way = denoising(vdm, net, cfg.steps, run.generators(6), weights.data.shape, cfg.grid)
        run.output(save_gif, way, cfg.gif, columns=6)
    if cfg.figures:
        figures(run, vdm, net, x)
    if cfg.bound:
        test, _ = run.images(split="test").first(cfg.bound)
        terms = measure(vdm, net, test.to(run.device), cfg.draws, run.generator(2))
        bits = {name: round(float(value.mean()), 4) for name, value in terms.items()}
        bits["standard_error"] = round(float(terms["bits_per_dim"].std()) / cfg.bound ** 0.5, 4)
        print(f"bits/dim, a bound, over {cfg.bound} test images: {bits}")
        run.record(f"bound_{cfg.model}", images=cfg.bound, draws=cfg.draws, **bits)
    if cfg.metrics:
        print(report(scores := score(x)))
        run.record(f"sample_{cfg.model}_{cfg.grid}_{cfg.steps}", nfe=cfg.steps, seconds=round(seconds, 1), **scores)
    return x


def load(run, weights, model="pictures", **process):
    """Process and network of a weights file, or of bound.safetensors beside it; process: other values for VDM."""
    weights = weights if model == "pictures" else run.read(weights.path.with_name(f"{model}.safetensors"))
    vdm = VDM(**{**weights.config["vdm"], **process})
    return run.place(vdm, weights.load(Network(weights.config["schedule"], weights.config["unet"])))


def draw(vdm, net, n, steps, generator, batch=128, shape=(1, 28, 28), grid="cosine"):
    """n samples in batches, (n, C, H, W). generator: a list of one for each image, or one for all of them."""
    return torch.cat([vdm.sample(net, size, steps, shape, part, grid) for size, part in batches(n, batch, generator)])


def measure(vdm, net, x0, draws, generator, batch=128):
    """The terms of the bound and their sum for every image, bits/dim: a dict of (N,)."""
    parts = [vdm.bound(net, part, draws, generator)[:3] for part in x0.split(batch)]
    reconstruction, prior, diffusion = (torch.cat([value.cpu().double() for value in one]) for one in zip(*parts))
    terms = {"reconstruction": reconstruction, "prior": prior, "diffusion": diffusion.mean(1)}
    return {**terms, "bits_per_dim": sum(terms.values())}


def denoising(vdm, net, steps, generators, shape=(1, 28, 28), grid="cosine", frames=30):
    """Pictures of some images on their way: each z_t, and beside it the x that the network expects."""
    z, path = noise(len(generators), shape, generators).to(vdm.values.device), []
    for _, after, x in vdm.reverse(net, z, steps, generators, grid):
        path.append(torch.stack([z, x], dim=1).flatten(0, 1).cpu())
        z = after
    path.append(torch.stack([z, z], dim=1).flatten(0, 1).cpu())
    return [path[i] for i in sorted({round(i) for i in torch.linspace(0, len(path) - 1, frames).tolist()})]


def figures(run, vdm, net, x):
    """Two more pictures: three images at 13 times, under their gamma; samples above their nearest training images."""
    train, eps = run.images().all(), torch.randn(13, *x.shape[1:], generator=run.generator(3)).to(run.device)
    gamma = vdm.gamma(net, torch.linspace(0, 1, 13, dtype=torch.float64, device=run.device)).detach()
    test, few = vdm.encode(run.images(split="test", limit=3).all().to(run.device)), x[:12].cpu()
    noised = torch.cat([vdm.q_sample(one.expand_as(eps), gamma, eps) for one in test])
    run.output(save_grid, noised, "forward.png", columns=13, across=[f"{value:.1f}" for value in gamma.tolist()])
    pairs = torch.cat([few, train[torch.cdist(few.flatten(1), train.flatten(1)).argmin(1)]])
    run.output(save_grid, pairs, "neighbours.png", columns=12, down=["sample", "nearest"])


if __name__ == "__main__":
    cli(main)
