"""Train a denoiser: noise a batch, guess the clean data, take the squared error.

    python train.py                          MNIST, the values of config.yaml
    python train.py data=swiss_roll          points on a spiral; also data=eight and data=two
    python train.py data=../my_images        your own images; data=fashion: clothes
    python train.py steps=500 lr=1e-3        other values; --help lists them
    python train.py --resume                 go on after Ctrl-C or a crash
    torchrun --nproc_per_node 2 train.py     several processes, one model
"""

import torch

from model import MLP, Diffusion, eight_gaussians, swiss_roll, two_gaussians
from sample import picture
from utils import EMA, Run, cli, derive, ramp, save_grid


def main(argv=None):
    run = Run(__file__, argv)                           # configuration, device, precision, seed, processes
    cfg = run.config.train
    kind = "points" if cfg.data in ("swiss_roll", "eight", "two") else "digits"
    process = {**run.config.diffusion}
    if process["predict"] == "auto":
        process["predict"] = "x0" if kind == "digits" else "noise"
    diffusion, net = Diffusion(**process), MLP(**run.config[kind])
    data = Points(diffusion, cfg) if kind == "points" else run.images(run.config.digits, limit=cfg.limit or None)
    optimizer = torch.optim.Adam(net.parameters(), lr=cfg.lr, fused=True)
    diffusion, net, optimizer = run.prepare(diffusion, net, optimizer)
    ema = EMA(net, cfg.ema_decay)
    run.track(net=net, optimizer=optimizer, ema=ema)    # what a checkpoint holds; loads it on --resume

    for step, (x0, _) in run.steps(data):               # (B, C, H, W) in [-1, 1], or (B, 2)
        optimizer.param_groups[0]["lr"] = cfg.lr * ramp(step, cfg.warmup, cfg.steps)
        loss = diffusion.loss(net, x0)
        optimizer.zero_grad()
        run.backward(loss)
        optimizer.step()
        ema.update(net)                                 # samples come from the average of the weights
        run.log(loss=loss)
        if run.every(cfg.preview_every):
            n = 64 if kind == "digits" else 4000
            x = diffusion.sample(ema.module, n, run.config.sample.steps, tuple(run.config[kind].shape), run.generator())
            save_grid(picture(x), run.folder / f"preview_{step + 1:06d}.png")
    return run.finish(ema, diffusion=process, **{kind: run.config[kind]})                  # weights, curve, numbers


class Points:
    """Points in the plane, never the same twice; the step number decides which."""

    def __init__(self, diffusion, cfg):
        known = {"swiss_roll": swiss_roll, "eight": eight_gaussians(diffusion).draw,
                 "two": two_gaussians(diffusion).draw}
        self.draw, self.batch_size, self.seed = known[cfg.data], cfg.batch_size, cfg.seed

    def batch(self, step, rank=0, world=1):
        """The batch of step number `step`: points (B, 2), and zeros instead of labels."""
        generator = torch.Generator().manual_seed(derive(self.seed, step))
        x0 = self.draw(self.batch_size, generator)[rank::world]
        return x0, torch.zeros(len(x0))


if __name__ == "__main__":
    cli(main)
