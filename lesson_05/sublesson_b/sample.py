"""Interpolate between digits of the test set: noise two to the same time, mix, denoise.

    python sample.py                                64 pairs: an image in the middle of each, a strip for the first 8
    python sample.py t=250 rule=shared              less noise; one noise for both digits
    python sample.py gif=denoising.gif              the way from digit to digit as an animation, above a cross-fade
    python sample.py n=2048 metrics=true            FID and the other scores of the images in the middle
    python sample.py figures=true                   a pair at every depth, a pair under every rule
"""

import torch

from model import RULES, Interpolation, UNet
from utils import Run, UserError, batches, cli, digits, report, save_gif, save_grid, save_npz, score


def main(argv=None):
    run = Run(__file__, argv)
    cfg = run.config.sample
    weights = run.weights()                             # your own, else those that lesson 05 publishes
    ddpm = Interpolation(**{**weights.config["ddpm"], **({"variance": cfg.variance} if cfg.variance else {})})
    net = weights.load(UNet(**weights.config["unet"]))
    ddpm, net = run.place(ddpm, net)
    t, steps = min(cfg.t, ddpm.timesteps - 1), min(cfg.steps, ddpm.timesteps)
    for key, most in (("t", t), ("steps", steps)):
        if most < cfg[key]:
            run.refuse(key, f"the process of these weights knows at most {most}")
    x0, y0, _, _ = pairs(cfg.n, cfg.seed, run.images(split="test"))

    def way(x0, y0, lams, t=t, rule=cfg.rule, generators=None):              # default: the noise of the first pairs
        return ddpm.between(net, x0.to(run.device), y0.to(run.device), lams, t, rule, steps, cfg.clip,
                            generators or run.generators(len(x0))).cpu()

    start = run.clock()
    parts = zip(x0.split(cfg.batch), y0.split(cfg.batch), batches(cfg.n, cfg.batch, run.generators(cfg.n)))
    x = torch.cat([way(a, b, [0.5], generators=own)[0] for a, b, (_, own) in parts])
    seconds, calls = run.clock() - start, len(ddpm.times(t, steps)) - 1
    print(f"{cfg.n} pairs mixed at t = {t}, {calls} network calls each, in {seconds:.1f} s")
    lams, a, b = [i / 8 for i in range(9)], x0[:8], y0[:8]
    rows = torch.cat([a[None], way(a, b, lams), b[None]]).transpose(0, 1).flatten(0, 1)         # one for each pair
    run.output(save_grid, rows, cfg.out, columns=11, across=("image", *(f"{lam:g}" for lam in lams), "image"))
    if cfg.npz:
        run.output(save_npz, x, cfg.npz)
    if cfg.gif:
        lams, a, b = [i / 24 for i in range(25)], x0[:10], y0[:10]
        frames = [torch.cat([mixed, (1 - lam) * a + lam * b]) for lam, mixed in zip(lams, way(a, b, lams))]
        run.output(save_gif, frames, cfg.gif, columns=len(a))
    if cfg.figures:
        figures(run, ddpm, net, way, x0, y0, steps)
    if cfg.metrics:
        scores = score(x)
        print(report(scores))
        run.record(f"sample_{cfg.rule}_{t}", nfe=calls, t=t, rule=cfg.rule, seconds=round(seconds, 1), **scores)
    return x


def pairs(n, seed, data=None):
    """n pairs of test images of different classes, if they have any: x0, y0 (n, C, H, W) and their labels."""
    data = data or digits("test")
    if 2 * n > len(data):
        raise UserError(f"n={n} pairs need {2 * n} test images, and there are {len(data)}: choose a smaller n")
    x, label = data.first(len(data) // 2 * 2, shuffle_seed=seed)
    x, label = x.unflatten(0, (2, -1)), label.unflatten(0, (2, -1))
    different = (label[0] != label[1]).logical_or(torch.tensor(len(data.classes) < 2)).nonzero()[:n, 0]
    if len(different) < n:
        raise UserError(f"n={n}: the test set gives {len(different)} pairs of different digits; choose a smaller n")
    return x[0][different], x[1][different], label[0][different], label[1][different]


def figures(run, ddpm, net, way, x0, y0, steps):
    """Two pairs at every depth between a cross-fade and the codes of lesson 06; the same under the three rules."""
    a, b, lams = x0[:2], y0[:2], [i / 6 for i in range(7)]
    depths = [min(t, ddpm.timesteps - 1) for t in run.config.reproduce.depths]
    rows = [torch.stack([(1 - lam) * a + lam * b for lam in lams]), *(way(a, b, lams, t) for t in depths),
            ddpm.spherical(net, a.to(run.device), b.to(run.device), lams, steps).cpu()]
    across = [f"{lam:.2g}" for lam in lams] * len(a)
    save = lambda rows, name, down: run.output(save_grid, torch.stack(rows).transpose(1, 2).flatten(0, 2), name,
                                               columns=len(across), across=across, down=down)
    save(rows, "depths.png", ["pixels", *(f"t = {t}" for t in depths), "codes"])
    ways = [(t, rule) for t in (depths[len(depths) // 2], depths[-1]) for rule in RULES]
    save([way(a, b, lams, *one) for one in ways], "rules.png", [f"{rule}, {t}" for t, rule in ways])


if __name__ == "__main__":
    cli(main)
