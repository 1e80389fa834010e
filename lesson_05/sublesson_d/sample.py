"""Draw the digits you ask for.

    python sample.py                                     six of each digit, from your newest weights or the published
    python sample.py labels=7 n=16 seed=3                sevens; labels=3,1,4 in turn; labels=none: no class
    python sample.py guidance=3                          more typical digits, for twice the network calls
    python sample.py gif=denoising.gif npz=samples.npz   the way there as an animation; images and labels as arrays
    python sample.py n=2000 metrics=true                 accuracy, FID and the other scores
"""

import torch

from model import DDPM, UNet, guided
from utils import Run, UserError, batches, by_class, cli, noise, report, save_gif, save_grid, save_npz, score


# Copied from lesson_05/sublesson_c/sample.py: main
def main(argv=None):
    run = Run(__file__, argv)
    cfg = run.config.sample
    weights = run.weights()                             # the file carries its network's configuration
    ddpm, net = run.place(DDPM(**weights.config["ddpm"]), weights.load(UNet(**weights.config["unet"])))
    null, shape = weights.config["unet"].classes, weights.data.shape
    c = wanted(cfg.labels, cfg.n, null).to(run.device)

    start = run.clock()
    x = draw(ddpm, net, c, null, cfg.steps, cfg.guidance, run.generators(cfg.n), cfg.batch, shape)
    seconds, calls = run.clock() - start, cfg.steps * (1 if cfg.guidance in (0, 1) else 2)
    run.output(save_grid, x[:60], cfg.out, **by_class(c[:60], null))
    print(f"{cfg.n} images, {calls} network calls each, in {seconds:.1f} s")
    if cfg.npz:
        run.output(save_npz, x, cfg.npz, labels=c)
    if cfg.gif:
        eps, own = guided(net, c[:10], torch.full_like(c[:10], null), cfg.guidance), run.generators(len(c[:10]))
        way = ddpm.reverse(eps, noise(len(own), shape, own).to(run.device), cfg.steps, generator=own)
        path = [torch.cat([x_s, x_0]).cpu() for _, x_s, x_0 in way]
        shown = sorted({round(i) for i in torch.linspace(0, len(path) - 1, 30).tolist()})
        run.output(save_gif, [path[i] for i in shown], cfg.gif, columns=len(c[:10]))
    if cfg.metrics:
        asked = cfg.guidance != 0 and bool((c != null).all())
        scores = score(x, c if asked else None)
        print(report(scores))
        name = f"sample_{cfg.steps}" + (f"_w{cfg.guidance:g}" if cfg.guidance != 1 else "")
        run.record(name, nfe=calls, seconds=round(seconds, 1), guidance=cfg.guidance, **scores)
    return x


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


# Copied from lesson_05/sublesson_c/sample.py: draw
def draw(ddpm, net, c, null, steps, guidance, generator, batch=128, shape=(1, 28, 28)):
    """An image of every class in c (n,), in batches: (n, C, H, W). generator: a list, one for each, or one for all."""
    parts = zip(c.split(batch), batches(len(c), batch, generator))
    return torch.cat([ddpm.sample(guided(net, part, torch.full_like(part, null), guidance), size, steps, shape,
                                  generator=own) for part, (size, own) in parts])


if __name__ == "__main__":
    cli(main)
