"""Draw the digits you ask for, with guidance: Algorithm 2.

    python sample.py                                     six of each digit, from your newest weights or the published
    python sample.py labels=7 guidance=3                 sevens, guided; labels=3,1,4 in turn; labels=none: no class
    python sample.py gif=denoising.gif npz=samples.npz   the way there as an animation; images and labels as arrays
    python sample.py n=2048 metrics=true                 accuracy, FID and the other scores
    python sample.py clip=false start=-10                x_0 not clipped, from a log-SNR from which that is possible
"""

import torch

from model import DDPM, UNet, guided
from utils import Run, UserError, batches, by_class, cli, noise, report, save_gif, save_grid, save_npz, score


def main(argv=None):
    run = Run(__file__, argv)
    cfg = run.config.sample
    ddpm, net, null = load(run, weights := run.weights())
    shape = weights.data.shape
    c, times = wanted(cfg.labels, cfg.n, null).to(run.device), ddpm.times(cfg.steps, cfg.start)

    start = run.clock()
    x = draw(ddpm, net, c, null, times, cfg.guidance, run.generators(cfg.n), cfg.clip, cfg.batch, shape)
    seconds, calls = run.clock() - start, cfg.steps * (1 if cfg.guidance in (0, 1) else 2)
    run.output(save_grid, x[:60], cfg.out, **by_class(c[:60], null))
    print(f"{cfg.n} images, {calls} network calls each, in {seconds:.1f} s")
    if cfg.npz:
        run.output(save_npz, x, cfg.npz, labels=c)
    if cfg.gif:
        eps, own = guided(net, c[:10], torch.full_like(c[:10], null), cfg.guidance), run.generators(len(c[:10]))
        way = ddpm.reverse(eps, noise(len(own), shape, own).to(run.device), times, cfg.clip, own)
        path = [torch.cat([x_s, x_0]).cpu() for _, x_s, x_0 in way]
        shown = sorted({round(i) for i in torch.linspace(0, len(path) - 1, 30).tolist()})
        run.output(save_gif, [path[i] for i in shown], cfg.gif, columns=len(c[:10]))
    if cfg.metrics:
        asked = cfg.guidance != 0 and bool((c != null).all())
        scores = score(x, c if asked else None)
        print(report(scores))
        name = f"sample_{cfg.steps}" + f"_w{cfg.guidance:g}" * (cfg.guidance != 1) + f"_v{cfg.v:g}" * (cfg.v != 0.3)
        run.record(name, nfe=calls, seconds=round(seconds, 1), guidance=cfg.guidance, v=cfg.v, **scores)
    return x


def load(run, weights):
    """Process, network and the number of "no class" of a weights file, which carries their configuration."""
    unet, ddpm = weights.config["unet"], DDPM(**{**weights.config["ddpm"], "v": run.config.sample.v})
    return *run.place(ddpm, weights.load(UNet(**unet))), unet["classes"]


# Copied from lesson_05/sublesson_c/sample.py: wanted
def wanted(labels, n, null):
    """The key `labels` as n classes, (n,): "7", "3,1,4" in turn, "" all in turn, "none" the class `null`."""
    if labels == "none":
        return torch.full((n,), null)
    try:
        asked = [int(label) for label in labels.split(",")] if labels else list(range(null))
    except ValueError:
        asked = [-1]
    if not all(0 <= label < null for label in asked):
        raise UserError(f"labels={labels} must be classes from 0 to {null - 1}, as in labels=3,1,4, or none")
    return torch.tensor(asked).repeat(-(-n // len(asked)))[:n]


def draw(ddpm, net, c, null, times, w, generator, clip=True, batch=128, shape=(1, 28, 28)):
    """An image of every class in c (n,), in batches: (n, C, H, W). generator: a list, one for each, or one for all."""
    parts = zip(c.split(batch), batches(len(c), batch, generator))
    return torch.cat([ddpm.sample(guided(net, part, torch.full_like(part, null), w), size, times, shape, clip, own)
                      for part, (size, own) in parts])


if __name__ == "__main__":
    cli(main)
