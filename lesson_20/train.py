"""Train the EDM denoiser on MNIST: log-normal noise levels, a preconditioned network.

    python train.py                          the values of config.yaml
    python train.py steps=500 lr=1e-3        other values; --help lists them
    python train.py --resume                 go on after Ctrl-C or a crash
    torchrun --nproc_per_node 2 train.py     several processes, one model
"""

import torch

from model import EDM, UNet
from utils import EMA, Run, cli, digits, ramp, save_grid


# Adapted from lesson_05/train.py: main -- the loss and the previews are EDM's
def main(argv=None):
    run = Run(__file__, argv)                           # configuration, device, precision, seed, processes
    cfg = run.config.train
    edm, net = EDM(**run.config.edm), UNet(**run.config.unet)
    optimizer = torch.optim.Adam(net.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)
    edm, net, optimizer = run.prepare(edm, net, optimizer)
    ema = EMA(net, cfg.ema_decay)
    run.track(net=net, optimizer=optimizer, ema=ema)    # what a checkpoint holds; loads it on --resume

    for step, (x0, _) in run.steps(digits("train", cfg.batch_size, cfg.seed)):      # (B, 1, 28, 28) in [-1, 1]
        optimizer.param_groups[0]["lr"] = cfg.lr * ramp(step, cfg.warmup, cfg.steps)
        loss = edm.loss(net, x0)                        # Sec. 5: 1 at the start, whatever sigma is drawn
        optimizer.zero_grad()
        run.backward(loss)
        run.clip_grad_norm(net.parameters(), cfg.clip)
        optimizer.step()
        ema.update(net)                                 # samples come from the average of the weights
        run.log(loss=loss)
        if run.every(cfg.preview_every):
            noise = torch.randn(64, 1, 28, 28, generator=run.generator()).to(run.device)   # the same every time
            x = edm.sample(ema.module, noise, edm.levels(run.config.sample.steps))
            save_grid(x, run.folder / f"preview_{step + 1:06d}.png")
    return run.finish(ema, unet=run.config.unet, edm=run.config.edm)                # weights, loss curve, numbers


if __name__ == "__main__":
    cli(main)
