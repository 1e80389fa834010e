"""Train VDM on MNIST: the whole bound, noise schedule included.

    python train.py                          the values of config.yaml
    python train.py steps=500 lr=1e-3        other values; --help lists them
    python train.py data=../my_images        your own images; data=fashion: clothes
    python train.py schedule.interior=linear another interior of gamma; also schedule.learn_ends=false
    python train.py --resume                 go on after Ctrl-C or a crash
    torchrun --nproc_per_node 2 train.py     several processes, one model
"""

import torch

from model import VDM, Network
from utils import EMA, Run, cli, ramp, save_grid


# Adapted from lesson_05/train.py: main -- Adam; the whole bound is the loss; the schedule learns beside the U-Net
def main(argv=None):
    run = Run(__file__, argv)                           # configuration, device, precision, seed, processes
    cfg = run.config.train
    vdm, net = VDM(**run.config.vdm), Network(run.config.schedule, run.config.unet)
    weights, gamma = list(net.unet.parameters()), list(net.schedule.parameters())
    optimizer = torch.optim.AdamW([{"params": weights, "rate": cfg.lr, "weight_decay": cfg.weight_decay},
                                   {"params": gamma, "rate": cfg.lr_gamma, "weight_decay": 0.0}],
                                  betas=(0.9, cfg.beta2), fused=True)
    vdm, net, optimizer = run.prepare(vdm, net, optimizer)
    ema = EMA(net, cfg.ema_decay)
    run.track(net=net, optimizer=optimizer, ema=ema)    # what a checkpoint holds; loads it on --resume

    for step, (x0, _) in run.steps(run.images(run.config.unet)):                    # (B, C, H, W) in [-1, 1]
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * ramp(step, cfg.warmup, cfg.steps)
        reconstruction, prior, diffusion = vdm.loss(net, x0)        # bits/dim: their sum bounds -log2 p(x) / D
        loss = reconstruction + prior + diffusion
        optimizer.zero_grad()
        run.backward(loss)                              # at gamma's interior this is the gradient of diffusion squared
        run.clip_grad_norm(weights, cfg.clip)
        optimizer.step()
        ema.update(net)                                 # samples come from the average of the weights
        run.log(loss=loss, reconstruction=reconstruction, prior=prior,
                gamma_0=gamma[0], gamma_1=gamma[0] + gamma[1].abs())
        if run.every(cfg.preview_every):
            x = vdm.sample(ema.module, 64, run.config.sample.steps, x0.shape[1:], generator=run.generator())
            save_grid(x, run.folder / f"preview_{step + 1:06d}.png")
    return run.finish(ema, unet=run.config.unet, schedule=run.config.schedule, vdm=run.config.vdm)


if __name__ == "__main__":
    cli(main)
