"""Draw digits with DDIM from a trained DDPM: few steps, no noise on the way unless eta asks for it.

    python sample.py                                     64 digits, 50 steps: your newest weights, else lesson 05's
    python sample.py n=16 steps=20 eta=1 seed=3          20 steps of DDPM; sigma_hat=true for its wider noise
    python sample.py spacing=quadratic clip_x0=fresh      another sub-sequence, clipping as in OpenAI's code
    python sample.py gif=denoising.gif npz=samples.npz   the way there as an animation; the images as an array
    python sample.py n=2048 metrics=true                 FID and the other scores
    python sample.py figures=true                        same noise with more steps, slerp, there and back
"""

import torch

from model import DDIM, UNet, slerp
from utils import Run, batches, cli, noise, report, save_gif, save_grid, save_npz, save_strip, score


def main(argv=None):
    run = Run(__file__, argv)
    cfg = run.config.sample
    ddim, net = load(run, weights := run.weights())     # the file carries its network's configuration
    shape = weights.data.shape
    way = {"times": ddim.times(cfg.steps, cfg.spacing), "eta": cfg.eta, "hat": cfg.sigma_hat, "clip": cfg.clip_x0}

    start = run.clock()
    generators = run.generators(cfg.n)                  # one for each image: its x_T comes first, whatever eta is
    x = draw(ddim, net, noise(cfg.n, shape, generators), generators, cfg.batch, **way)
    seconds = run.clock() - start
    run.output(save_grid, x[:64], cfg.out)
    print(f"{cfg.n} images, {len(way['times'])} network calls each, in {seconds:.1f} s")
    if cfg.npz:
        run.output(save_npz, x, cfg.npz)
    if cfg.gif:
        run.output(save_gif, denoising(ddim, net, run.generators(6), shape=shape, **way), cfg.gif, columns=6)
    if cfg.figures:
        figures(run, ddim, net, **way)
    if cfg.metrics:
        scores = score(x)
        print(report(scores))
        how = {"eta": cfg.eta, "sigma_hat": cfg.sigma_hat, "spacing": cfg.spacing, "clip_x0": cfg.clip_x0}
        run.record(f"sample_{cfg.steps}", nfe=len(way["times"]), seconds=round(seconds, 1), **how, **scores)
    return x


def load(run, weights):
    """Sampler and network of a weights file, of this lesson or of lesson 05."""
    return run.place(DDIM(**weights.config["ddpm"]), weights.load(UNet(**weights.config["unet"])))


def draw(ddim, net, xT, generator, batch=128, **way):
    """The images that start from xT, in batches. generator: of the steps; a list of one for each, or one for all."""
    parts = zip(xT.to(ddim.abar.device).split(batch), batches(len(xT), batch, generator))
    return torch.cat([ddim.sample(net, part, generator=own, **way) for part, (_, own) in parts])


def denoising(ddim, net, generators, frames=30, shape=(1, 28, 28), **way):
    """Pictures of some images on their way: each x_t, and beside it the x_0 estimated from it."""
    x, path = noise(len(generators), shape, generators).to(ddim.abar.device), []
    for _, x_next, x0 in ddim.reverse(net, x, generator=generators, **way):
        path.append(torch.stack([x, x0], dim=1).flatten(0, 1).cpu())
        x = x_next
    path.append(torch.stack([x, x], dim=1).flatten(0, 1).cpu())
    return [path[i] for i in sorted({round(i) for i in torch.linspace(0, len(path) - 1, frames).tolist()})]


def figures(run, ddim, net, times, **way):
    """Three more pictures: the same noise with more and more steps, slerp between noises, images there and back."""
    cfg, T = run.config.sample, ddim.timesteps
    x0 = run.images(split="test", limit=12).all().to(run.device)
    xT = noise(12, x0.shape[1:], run.generators(12)).to(run.device)
    counts = [steps for steps in (5, 10, 20, 50, 100, 200) if steps <= T]
    run.output(save_strip, [ddim.sample(net, xT, ddim.times(steps, cfg.spacing)) for steps in counts], "steps.png",
               down=[f"{steps} steps" for steps in counts])
    ws = torch.linspace(0, 1, 11).tolist()
    ways = [slerp(xT[:4], xT[4:8], w) for w in ws]                          # 11 of (4, C, H, W)
    x = ddim.sample(net, torch.stack(ways, dim=1).flatten(0, 1), times)
    run.output(save_strip, x.split(len(ways)), "slerp.png", across=[f"w = {w:.1f}" for w in ws])
    back = [ddim.sample(net, ddim.encode(net, x0, tau), tau) for tau in (ddim.times(s) for s in counts[1:5:2])]
    run.output(save_strip, [x0, ddim.encode(net, x0, times), *back], "reconstruction.png",
               down=["test", "x_T", *(f"{steps} steps" for steps in counts[1:5:2])])


if __name__ == "__main__":
    cli(main)
