"""Draw digits from the reverse SDE, with or without corrections, or from the probability-flow ODE.

    python sample.py                                     64 digits from your newest weights, else the published
    python sample.py predictor=ancestral steps=100       another predictor; none: the corrector alone
    python sample.py corrections=1                       predictor-corrector: twice the calls
    python sample.py sampler=ode rtol=1e-4 n=16 seed=3   the ODE; its solver decides how many calls that are
    python sample.py weights=results/weights_ve.safetensors      the VE network
    python sample.py gif=denoising.gif npz=samples.npz   the way there as an animation; the images as an array
    python sample.py n=2048 metrics=true                 FID and the other scores
"""

import time

import torch

from model import UNet, make_sde
from utils import Run, cli, report, save_gif, save_grid, save_npz, score


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
    sde, net = load(run, run.weights())                 # the file carries its network's configuration
    way = {"predictor": cfg.predictor, "corrections": cfg.corrections, "snr": cfg.snr, "sampler": cfg.sampler,
           "rtol": cfg.rtol}

    start = time.perf_counter()
    x, calls = draw(sde, net, cfg.n, cfg.steps, run.generator(), cfg.batch, **way)
    seconds = time.perf_counter() - start
    run.output(save_grid, x[:64], "samples.png")
    print(f"{cfg.n} digits, {calls} network calls each, in {seconds:.1f} s")
    if cfg.npz:
        run.output(save_npz, x, cfg.npz)
    if cfg.gif:
        run.output(save_gif, denoising(sde, net, 6, cfg, run.generator(1)), cfg.gif, columns=6)
    if cfg.metrics:
        scores = score(x)
        print(report(scores))
        how = {"sde": type(sde).__name__, "sampler": cfg.sampler} | ({"rtol": cfg.rtol} if cfg.sampler == "ode" else {
            "predictor": cfg.predictor, "corrections": cfg.corrections})
        name = f"{how['sde']}_{cfg.sampler}".lower()
        run.record(f"sample_{name}_{cfg.rtol if cfg.sampler == 'ode' else calls}", nfe=calls, seconds=round(seconds, 1),
                   **how, **scores)
    return x


def load(run, weights):
    """Process and network of a weights file, ready to sample."""
    return run.place(make_sde(**weights.config["sde"]), weights.load(UNet(**weights.config["unet"])))


def quantise(x):
    """`dequantise` undone: [-1, 1) -> grey levels, in [-1, 1] as the loader gives them."""
    return ((x + 1) * 128).floor().clamp(0, 255) / 127.5 - 1


def draw(sde, net, n, steps, generator, batch=128, sampler="pc", rtol=1e-4, **way):
    """n samples in batches, (n, 1, 28, 28), and the network calls that an image took (ode: a batch's mean)."""
    if sampler not in ("pc", "ode"):
        raise ValueError(f"sampler={sampler} is none of pc, ode")
    net, device, parts = Counted(net), next(net.parameters()).device, []
    for size in [min(batch, n - i) for i in range(0, n, batch)]:
        x = sde.prior((size, 1, 28, 28), generator).to(device)
        if sampler == "ode":
            parts.append(sde.ode_sample(net, x, rtol, rtol))
        else:
            *_, (_, x, _) = sde.reverse(net, x, steps, generator=generator, **way)
            parts.append(x)
    return quantise(torch.cat(parts)), round(net.calls / len(parts))


def denoising(sde, net, n, cfg, generator, frames=30):
    """Pictures of one batch on its way: x_t, at the size of the data, and beside it the x_0 estimated from it."""
    x = sde.prior((n, 1, 28, 28), generator).to(next(net.parameters()).device)
    path, start = [], torch.ones(n, device=x.device)
    size = sde.prior_std
    for t, x_next, x0 in sde.reverse(net, x, cfg.steps, cfg.predictor, cfg.corrections, cfg.snr, generator):
        path.append(torch.stack([x / size, x0], dim=1).flatten(0, 1).cpu())
        x, size = x_next, max(1.0, float(sde.marginal(t * start)[1][0]))
    path.append(torch.stack([x, x], dim=1).flatten(0, 1).cpu())
    return [path[i] for i in sorted({round(i) for i in torch.linspace(0, len(path) - 1, frames).tolist()})]


if __name__ == "__main__":
    cli(main)
