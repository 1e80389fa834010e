"""Train a class-conditional diffusion model on MNIST that also learns "no class": Algorithm 1.

    python train.py                          the values of config.yaml
    python train.py drop=0.5 steps=2000      half of the labels are dropped; --help lists all keys
    python train.py data=../my_images        your own images, in a folder for each class; data=fashion: clothes
    python train.py --resume                 go on after Ctrl-C or a crash
    torchrun --nproc_per_node 2 train.py     several processes, one model
"""

import torch

from model import DDPM, UNet, drop, given
from utils import EMA, Run, UserError, cli, columns, ramp, save_grid


# Adapted from lesson_05/train.py: main -- Adam; labels, some of them dropped, go into the network
def main(argv=None):
    run = Run(__file__, argv)                           # configuration, device, precision, seed, processes
    cfg = run.config.train
    if cfg.drop > 1:
        raise UserError(f"drop={cfg.drop} is a share of the samples: from 0 to 1")
    data = run.images(run.config.unet)
    unet = data.with_classes(run.config.unet)           # auto: as many as the data have
    ddpm, net, null = DDPM(**run.config.ddpm), UNet(**unet), unet.classes
    optimizer = torch.optim.Adam(net.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)
    ddpm, net, optimizer = run.prepare(ddpm, net, optimizer)
    ema = EMA(net, cfg.ema_decay)
    run.track(net=net, optimizer=optimizer, ema=ema)    # what a checkpoint holds; loads it on --resume

    for step, (x0, labels) in run.steps(data):          # x0 (B, C, H, W) in [-1, 1]
        optimizer.param_groups[0]["lr"] = cfg.lr * ramp(step, cfg.warmup, cfg.steps)
        c = drop(labels, torch.full_like(labels, null), cfg.drop)                       # Algorithm 1, line 3
        loss = ddpm.loss(given(net, c), x0)             # Algorithm 1, lines 4 to 7
        optimizer.zero_grad()
        run.backward(loss)
        run.clip_grad_norm(net.parameters(), cfg.clip)
        optimizer.step()
        ema.update(net)                                 # samples come from the average of the weights
        run.log(loss=loss)
        if run.every(cfg.preview_every):
            c = torch.arange(60, device=run.device) % null
            times = ddpm.times(min(run.config.sample.steps, ddpm.timesteps))
            x = ddpm.sample(given(ema.module, c), len(c), times, x0.shape[1:], generator=run.generator())
            save_grid(x, run.folder / f"preview_{step + 1:06d}.png", columns(null))
    return run.finish(ema, unet=unet, ddpm=run.config.ddpm)                             # weights, loss curve, numbers


if __name__ == "__main__":
    cli(main)
