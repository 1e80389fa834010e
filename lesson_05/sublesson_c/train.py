"""Train a class-conditional DDPM on MNIST.

    python train.py                          the values of config.yaml
    python train.py unet.tokens=1            the trap: one token a class; --help lists all keys
    python train.py start= steps=5000        from random weights
    python train.py --resume                 go on after Ctrl-C or a crash
    torchrun --nproc_per_node 2 train.py     several processes, one model
"""

import torch

from model import DDPM, CrossBlock, UNet, drop, given
from utils import EMA, Run, UserError, Weights, cli, digits, ramp, save_grid


# Adapted from lesson_05/train.py: main -- labels, some of them dropped, go into a network that can start as lesson 05's
def main(argv=None):
    run = Run(__file__, argv)                           # configuration, device, precision, seed, processes
    cfg = run.config.train
    ddpm, net = DDPM(**run.config.ddpm), UNet(**run.config.unet)
    if cfg.start:
        begin_with(net, run.lesson / cfg.start)
    optimizer = torch.optim.Adam(net.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)
    ddpm, net, optimizer = run.prepare(ddpm, net, optimizer)
    ema = EMA(net, cfg.ema_decay)
    run.track(net=net, optimizer=optimizer, ema=ema)    # what a checkpoint holds; loads it on --resume

    for step, (x0, labels) in run.steps(digits("train", cfg.batch_size, cfg.seed)):     # x0 (B, 1, 28, 28)
        optimizer.param_groups[0]["lr"] = cfg.lr * ramp(step, cfg.warmup, cfg.steps)
        c = drop(labels, torch.full_like(labels, run.config.unet.classes), cfg.drop)    # a coin for every sample
        loss = ddpm.loss(given(net, c), x0)             # LDM's Eq. (3), without the autoencoder
        optimizer.zero_grad()
        run.backward(loss)
        run.clip_grad_norm(net.parameters(), cfg.clip)
        optimizer.step()
        ema.update(net)                                 # samples come from the average of the weights
        run.log(loss=loss)
        if run.every(cfg.preview_every):
            c = torch.arange(60, device=run.device) % run.config.unet.classes
            x = ddpm.sample(given(ema.module, c), len(c), min(run.config.sample.steps, ddpm.timesteps),
                            generator=run.generator())
            save_grid(x, run.folder / f"preview_{step + 1:06d}.png", columns=10)
    return run.finish(ema, unet=run.config.unet, ddpm=run.config.ddpm)              # weights, loss curve, numbers


def begin_with(net, path):
    """Copy lesson 05's weights into the layers that it has, too; the new ones keep their start, which changes nothing.

    Sorted by name, these layers stand in the same order in both networks.
    """
    new = {p for m in net.modules() if m is net.classes or isinstance(m, CrossBlock) for p in m.parameters()}
    own = [p for _, p in sorted(net.named_parameters()) if p not in new]
    theirs = [value for _, value in sorted(Weights(path, "lesson_05").state.items())]
    if [p.shape for p in own] != [value.shape for value in theirs]:
        raise UserError(f"start={path}: this network has other layers than that of lesson 05; train.start= trains anew")
    with torch.no_grad():
        for p, value in zip(own, theirs):
            p.copy_(value)


if __name__ == "__main__":
    cli(main)
