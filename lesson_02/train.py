"""Train the reverse chain on the bound.

    python train.py                          MNIST, the values of config.yaml
    python train.py data=swiss_roll          points on a spiral; data=heartbeat: bits, with the binomial chain
    python train.py data=../my_images        your own images; data=fashion: clothes
    python train.py steps=500 lr=1e-3        other values; --help lists them
    python train.py --resume                 go on after Ctrl-C or a crash
    torchrun --nproc_per_node 2 train.py     several processes, one model
"""

import torch

from model import swiss_roll
from sample import build, draw, picture
from utils import EMA, Run, UserError, cli, derive, ramp, save_grid


# Adapted from lesson_01/train.py: main -- minus the bound is the loss, and the whole bound of test data is logged
def main(argv=None):
    run = Run(__file__, argv)                           # configuration, device, precision, seed, processes
    cfg = run.config.train
    kind = {"swiss_roll": "points", "heartbeat": "bits"}.get(cfg.data, "digits")
    if kind == "digits" and run.config.digits.image_size % 2:
        raise UserError(f"image_size={run.config.digits.image_size} must be even: a position has 2 x 2 pixels")
    data = run.images(run.config.digits) if kind == "digits" else Drawn(cfg)
    config = {"binomial": {**run.config.binomial}} if kind == "bits" else {"dpm": {**run.config.dpm, **scale(data)}}
    config[kind] = {**run.config[kind]}
    chain, net = build(config)
    optimizer = torch.optim.Adam(net.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)
    chain, net, optimizer = run.prepare(chain, net, optimizer)
    ema = EMA(net, cfg.ema_decay)
    run.track(net=net, optimizer=optimizer, ema=ema)    # what a checkpoint holds; loads it on --resume
    test = (run.images(run.config.digits, "test", limit=cfg.bound_n).all() if kind == "digits" else
            data.draw(cfg.bound_n, run.generator(-1)))

    for step, (x0, _) in run.steps(data):               # (B, 1, H, W) in [-1, 1], points (B, 2) or bits (B, 20)
        optimizer.param_groups[0]["lr"] = cfg.lr * ramp(step, cfg.warmup, cfg.steps)
        loss = chain.loss(net, x0)                      # minus the bound, bits a pixel
        optimizer.zero_grad()
        run.backward(loss)
        run.clip_grad_norm(net.parameters(), cfg.clip)
        optimizer.step()
        ema.update(net)                                 # samples come from the average of the weights
        run.log(loss=loss)
        if run.every(cfg.bound_every):                  # the whole bound of test data, all times, the same noise
            run.log(bound=chain.bound(ema.module, test.to(run.device), run.generator(1))[0].mean())
        if run.every(cfg.preview_every):
            n = {"digits": 36, "points": 2000, "bits": 64}[kind]
            x = draw(chain, ema.module, n, cfg.preview_steps, x0.shape[1:], run.generator())
            save_grid(picture(x), run.folder / f"preview_{step + 1:06d}.png")
    return run.finish(ema, **config)                    # weights, curve, numbers


def scale(data):
    """Mean and standard deviation of the data over all values, and the number of their grey levels."""
    drawn = isinstance(data, Drawn)
    x = data.draw(100_000, torch.Generator().manual_seed(0)) if drawn else data.all()
    return {"mean": x.mean().item(), "std": x.std().item(), "levels": 0 if drawn else 256}


# Adapted from lesson_01/train.py: Points -- the swiss roll and the heartbeat
class Drawn:
    """Points in the plane or sequences of bits, never the same twice; the step number decides which."""

    def __init__(self, cfg):
        self.draw = swiss_roll if cfg.data == "swiss_roll" else heartbeat
        self.batch_size, self.seed = cfg.batch_size, cfg.seed

    def batch(self, step, rank=0, world=1):
        """The batch of step number `step`: (B, D), and zeros instead of labels."""
        generator = torch.Generator().manual_seed(derive(self.seed, step))
        x0 = self.draw(self.batch_size, generator)[rank::world]
        return x0, torch.zeros(len(x0))


def heartbeat(n, generator=None, size=20, period=5):
    """Bits that are 1 at every `period`-th place from a random start on: log2 p = -log2(period). (n, size)."""
    return (torch.arange(size) % period == torch.randint(period, (n, 1), generator=generator)).float()


if __name__ == "__main__":
    cli(main)
