"""Draw digits from the reverse SDE, with or without corrections, or from the probability-flow ODE.

    python sample.py                                     64 digits from your newest weights, else the published
    python sample.py predictor=ancestral corrections=1   another predictor; every step corrected: twice the calls
    python sample.py sampler=ode rtol=1e-4 n=16 seed=3   the ODE; its solver decides how many calls that are
    python sample.py gif=denoising.gif npz=samples.npz   the way there as an animation; the images as an array
    python sample.py n=2048 metrics=true                 FID and the other scores
"""
import torch

from model import SDE, VE, UNet, quantise
from utils import Run, batches, cli, device_of, report, save_gif, save_grid, save_npz, score


class Counted:
    """A network that counts its calls; all images of a batch share one."""
    def __init__(self, net):
        self.net, self.calls = net, 0
    def __call__(self, x, t):
        self.calls += 1
        return self.net(x, t)


def main(argv=None):
    run = Run(__file__, argv)
    cfg = run.config.sample
    sde, net = load(run, weights := run.weights())      # the file carries its network's configuration
    shape = weights.data.shape
    way, start = {"predictor": cfg.predictor, "corrections": cfg.corrections, "snr": cfg.snr}, run.clock()
    x, calls = draw(sde, net, cfg.n, cfg.steps, run.generators(cfg.n), cfg.batch, cfg.sampler, cfg.rtol, shape, **way)
    print(f"{cfg.n} images, {calls} network calls each, in {(seconds := run.clock() - start):.1f} s")
    run.output(save_grid, x[:64], cfg.out)
    if cfg.npz:
        run.output(save_npz, x, cfg.npz)
    if cfg.gif:
        frames = denoising(sde, net, cfg.steps, run.generators(6), shape=shape, **way)
        run.output(save_gif, frames, cfg.gif, columns=6)
    if cfg.metrics:
        scores = score(x)
        print(report(scores))
        name = f"sample_{type(sde.noising).__name__}_{'ode' if cfg.sampler == 'ode' else cfg.predictor}_{calls}".lower()
        run.record(name, nfe=calls, seconds=round(seconds, 1), sampler=cfg.sampler, rtol=cfg.rtol, **way, **scores)
    return x


def load(run, weights):
    """Process and network of a weights file, ready to sample."""
    return run.place(SDE(**weights.config["sde"]), weights.load(UNet(**weights.config["unet"])))


def draw(sde, net, n, steps, generator, batch=128, sampler="pc", rtol=1e-4, shape=(1, 28, 28), **way):
    """n samples in batches, (n, C, H, W), and the network calls that an image took (ode: a batch's mean)."""
    if sampler not in ("pc", "ode"):
        raise ValueError(f"sampler={sampler} is none of pc, ode")
    stop_after(sde, steps, sampler)
    net, device, parts = Counted(net), device_of(net), []
    for size, part in batches(n, batch, generator):     # of a list of generators, one for each image, its part
        x = sde.prior((size, *shape), part).to(device)
        parts.append(sde.ode_sample(net, x, rtol, rtol) if sampler == "ode" else
                     [x for _, x, _ in sde.reverse(net, x, steps, generator=part, **way)][-1])
    return quantise(torch.cat(parts)), round(net.calls / len(parts))


def stop_after(sde, steps, sampler="pc"):
    """Let VP and sub-VP stop at 1 / steps, a step's length; of 1000 steps that is the paper's 1e-3 (README: grain)."""
    keep = isinstance(sde.noising, VE) or sampler == "ode"
    sde.sampling_eps = sde.noising.sampling_eps if keep else 1 / max(steps, 2)


def denoising(sde, net, steps, generators, frames=30, shape=(1, 28, 28), **way):
    """Pictures of some images on their way: x_t, at the size of the data, and beside it the x_0 estimated from it."""
    path, size, x = [], sde.noising.prior_std, sde.prior((len(generators), *shape), generators).to(device_of(net))
    stop_after(sde, steps)
    for t, x_next, x0 in sde.reverse(net, x, steps, generator=generators, **way):
        path.append(torch.stack([x / size, x0], dim=1).flatten(0, 1).cpu())
        std = float(sde.noising.marginal(torch.tensor(t))[1])
        x, size = x_next, (1 + std ** 2) ** 0.5 if sde.noising.prior_std > 1 else 1.0
    return [path[i] for i in sorted({round(i) for i in torch.linspace(0, len(path) - 1, frames).tolist()})]


if __name__ == "__main__":
    cli(main)
