"""Train the score of an SDE on MNIST: Eq. (7) on continuous times.

    python train.py                          the VP network, from lesson 05's weights
    python train.py sde.kind=ve log_share=0  the VE network; also subvp
    python train.py start= steps=9000        from random weights; --help lists all keys
    python train.py data=../my_images        your own images; data=fashion: clothes
    python train.py --resume                 go on after Ctrl-C or a crash
    torchrun --nproc_per_node 2 train.py     several processes, one model
"""

import torch

from model import SDE, UNet, dequantise
from sample import draw
from utils import EMA, Run, Weights, cli, ramp, save_grid


# Adapted from lesson_05/train.py: main -- Adam; an SDE instead of DDPM, dequantised data, a start from trained weights
def main(argv=None):
    run = Run(__file__, argv)                           # configuration, device, precision, seed, processes
    cfg = run.config.train
    sde, net = SDE(**run.config.sde), UNet(**run.config.unet)
    if cfg.start:
        Weights(run.lesson / cfg.start, "lesson_05", run.name).load(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)
    sde, net, optimizer = run.prepare(sde, net, optimizer)
    ema = EMA(net, cfg.ema_decay)
    run.track(net=net, optimizer=optimizer, ema=ema)    # what a checkpoint holds; loads it on --resume

    for step, (x0, _) in run.steps(run.images(run.config.unet)):                    # (B, C, H, W) in [-1, 1]
        optimizer.param_groups[0]["lr"] = cfg.lr * ramp(step, cfg.warmup, cfg.steps)
        loss = sde.loss(net, dequantise(x0))            # a likelihood needs a density: grey levels are spread out
        optimizer.zero_grad()
        run.backward(loss)
        run.clip_grad_norm(net.parameters(), cfg.clip)
        optimizer.step()
        ema.update(net)                                 # samples come from the average of the weights
        run.log(loss=loss)
        if run.every(cfg.preview_every):
            x, _ = draw(sde, ema.module, 64, run.config.sample.steps, run.generator(), shape=x0.shape[1:])
            save_grid(x, run.folder / f"preview_{step + 1:06d}.png")
    return run.finish(ema, unet=run.config.unet, sde=run.config.sde)                # weights, loss curve, numbers


if __name__ == "__main__":
    cli(main)
