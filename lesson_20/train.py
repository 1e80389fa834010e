"""Train the EDM denoiser on MNIST: log-normal noise levels, a preconditioned network.

    python train.py                          the values of config.yaml
    python train.py steps=500 lr=1e-3        other values; --help lists them
    python train.py data=../my_images        your own images; data=fashion: clothes
    python train.py --resume                 go on after Ctrl-C or a crash
    torchrun --nproc_per_node 2 train.py     several processes, one model
"""

import torch

from model import EDM, UNet
from utils import EMA, Run, Section, cli, muon, ramp, save_grid


# Adapted from lesson_05/train.py: main -- the loss and the previews are EDM's
def main(argv=None):
    run = Run(__file__, argv)                           # configuration, device, precision, seed, processes
    cfg = run.config.train
    data = run.images(run.config.unet)
    process = standardised(run.config.edm, data)        # auto: the mean and the deviation of these images
    edm, net = EDM(**process), UNet(**run.config.unet)
    optimizer = muon(net, cfg.lr, cfg.adam_lr, cfg.beta2, outer=(net.stem, net.out))    # Adam alone: see README
    edm, net, optimizer = run.prepare(edm, net, optimizer)
    ema = EMA(net, share=cfg.ema_share)
    run.track(net=net, optimizer=optimizer, ema=ema)    # what a checkpoint holds; loads it on --resume

    for step, (x0, _) in run.steps(data):               # (B, C, H, W) in [-1, 1]
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * ramp(step, cfg.warmup, cfg.steps)
        loss = edm.loss(net, x0)                        # Sec. 5: 1 at the start, whatever sigma is drawn
        optimizer.zero_grad()
        run.backward(loss)
        run.clip_grad_norm(net.parameters(), cfg.clip)
        optimizer.step()
        ema.update(net)                                 # samples come from the average of the weights
        run.log(loss=loss)
        if run.every(cfg.preview_every):
            noise = torch.randn(64, *x0.shape[1:], generator=run.generator()).to(run.device)   # the same always
            x = edm.sample(ema.module, noise, edm.levels(run.config.sample.steps))
            save_grid(x, run.folder / f"preview_{step + 1:06d}.png")
    return run.finish(ema, unet=run.config.unet, edm=process)                       # weights, loss curve, numbers


def standardised(edm, data):
    """The section `edm` with numbers for mean and std, of the pixels in [0, 1], to four digits."""
    found = dict(zip(("mean", "std"), data.mean_std()))
    return Section(**{key: found[key] if value == "auto" else value for key, value in vars(edm).items()})


if __name__ == "__main__":
    cli(main)
