"""Train an improved DDPM on MNIST: lesson 05's loop, with the hybrid loss.

    python train.py                          the values of config.yaml
    python train.py steps=500 lr=1e-3        other values; --help lists them
    python train.py data=../my_images        your own images; data=fashion: clothes
    python train.py ddpm.objective=vlb importance=true          the bound alone, its times drawn by importance
    python train.py --resume                 go on after Ctrl-C or a crash
    torchrun --nproc_per_node 2 train.py     several processes, one model
"""

import torch

from model import IDDPM, ImportanceSampler, UNet
from utils import EMA, Run, Weights, cli, ramp, save_grid


# Adapted from lesson_05/train.py: main -- Adam; the times may be drawn by importance; may start from lesson 05's
#   weights
def main(argv=None):
    run = Run(__file__, argv)                           # configuration, device, precision, seed, processes
    cfg = run.config.train
    ddpm, net = IDDPM(**run.config.ddpm), UNet(**run.config.unet)
    if cfg.start:
        widen(net, Weights(run.lesson / cfg.start, "lesson_05").state)
    data = run.images(run.config.unet)
    sampler = ImportanceSampler(ddpm.timesteps) if cfg.importance else None
    optimizer = torch.optim.Adam(net.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)
    ddpm, net, optimizer = run.prepare(ddpm, net, optimizer)
    ema = EMA(net, cfg.ema_decay)
    run.track(net=net, optimizer=optimizer, ema=ema, sampler=sampler)      # what a checkpoint holds
    if sampler is not None and run.step == 0:
        fill(ddpm, net, sampler, data, run.device)

    for step, (x0, _) in run.steps(data):               # (B, C, H, W) in [-1, 1]
        optimizer.param_groups[0]["lr"] = cfg.lr * ramp(step, cfg.warmup, cfg.steps)
        loss = ddpm.loss(net, x0, sampler)              # Eq. (16), (18)
        optimizer.zero_grad()
        run.backward(loss)
        run.clip_grad_norm(net.parameters(), cfg.clip)
        optimizer.step()
        ema.update(net)                                 # samples come from the average of the weights
        run.log(loss=loss)
        if run.every(cfg.preview_every):
            x = ddpm.sample(ema.module, 64, min(run.config.sample.steps, ddpm.timesteps), x0.shape[1:],
                            generator=run.generator())
            save_grid(x, run.folder / f"preview_{step + 1:06d}.png")
    return run.finish(ema, unet=run.config.unet, ddpm=run.config.ddpm)              # weights, loss curve, numbers


def widen(net, state):
    """Copy lesson 05's weights into a network with twice the channels at its end; what gives v stays at 0."""
    own = net.state_dict()
    if set(own) != set(state) or any(own[key].shape[1:] != value.shape[1:] for key, value in state.items()):
        raise ValueError("train.start holds a network of another shape than the section unet")
    for key, value in state.items():
        own[key][:len(value)].copy_(value)


@torch.no_grad()
def fill(ddpm, net, sampler, data, device, batch=500):
    """See every time as often as the sampler remembers, before the first step.

    Differs from the paper, whose sampler is uniform until the training has drawn every t ten times. With T = 1000 that
    takes about 25,000 images: nothing in a run of days, much of a run of minutes.
    """
    t = torch.arange(ddpm.timesteps).repeat(sampler.terms.shape[1])
    images, _ = data.first(min(len(t), len(data)))
    for at, x0 in zip(t.split(batch), images[torch.arange(len(t)) % len(images)].split(batch)):
        at, x0 = at.to(device), x0.to(device)
        sampler.update(at, ddpm.bound(net, x0, at[:, None], clip=False)[1][:, 0])


if __name__ == "__main__":
    cli(main)
