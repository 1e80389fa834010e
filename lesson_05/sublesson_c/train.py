"""Train a class-conditional DDPM on MNIST.

    python train.py                          the values of config.yaml
    python train.py unet.tokens=1            the trap: one token a class; --help lists all keys
    python train.py start= steps=5000        from random weights
    python train.py data=../../my_images     your own images, in a folder for each class; data=fashion: clothes
    python train.py --resume                 go on after Ctrl-C or a crash
    torchrun --nproc_per_node 2 train.py     several processes, one model
"""

import torch

from model import DDPM, UNet, drop, given
from utils import EMA, Run, UserError, Weights, cli, columns, ramp, save_grid


# Adapted from lesson_05/train.py: main -- Adam; labels, some of them dropped, go into a network that can start as
#   lesson 05's
def main(argv=None):
    run = Run(__file__, argv)                           # configuration, device, precision, seed, processes
    cfg = run.config.train
    data = run.images(run.config.unet)
    unet = data.with_classes(run.config.unet)           # auto: as many as the data have
    ddpm, net = DDPM(**run.config.ddpm), UNet(**unet)
    if cfg.start:
        begin_with(net, run.lesson / cfg.start)
    optimizer = torch.optim.Adam(net.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)
    ddpm, net, optimizer = run.prepare(ddpm, net, optimizer)
    ema = EMA(net, cfg.ema_decay)
    run.track(net=net, optimizer=optimizer, ema=ema)    # what a checkpoint holds; loads it on --resume

    for step, (x0, labels) in run.steps(data):          # x0 (B, C, H, W) in [-1, 1]
        optimizer.param_groups[0]["lr"] = cfg.lr * ramp(step, cfg.warmup, cfg.steps)
        c = drop(labels, torch.full_like(labels, unet.classes), cfg.drop)    # a coin for every sample
        loss = ddpm.loss(given(net, c), x0)             # LDM's Eq. (3), without the autoencoder
        optimizer.zero_grad()
        run.backward(loss)
        run.clip_grad_norm(net.parameters(), cfg.clip)
        optimizer.step()
        ema.update(net)                                 # samples come from the average of the weights
        run.log(loss=loss)
        if run.every(cfg.preview_every):
            c = torch.arange(60, device=run.device) % unet.classes
            x = ddpm.sample(given(ema.module, c), len(c), min(run.config.sample.steps, ddpm.timesteps), x0.shape[1:],
                            generator=run.generator())
            save_grid(x, run.folder / f"preview_{step + 1:06d}.png", columns(unet.classes))
    return run.finish(ema, unet=unet, ddpm=run.config.ddpm)                         # weights, loss curve, numbers


def begin_with(net, path):
    """Take over lesson 05's weights by their names; the new layers keep their start, which changes nothing."""
    own, last = net.state_dict(), f"middle.{len(net.middle) - 1}."
    known = {name.replace("middle.2.", last): value for name, value in Weights(path, "lesson_05").state.items()}
    if any(name not in own or own[name].shape != value.shape for name, value in known.items()):
        raise UserError(f"start={path}: this network has other layers than that of lesson 05; train.start= trains anew")
    net.load_state_dict(own | known)                    # the bottom's second block stands behind what is new


if __name__ == "__main__":
    cli(main)
