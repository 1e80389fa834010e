"""Train NCSN on MNIST: denoising score matching at ten noise levels.

    python train.py                          the values of config.yaml
    python train.py steps=500 lr=1e-3        other values; --help lists them
    python train.py data=../my_images        your own images; data=fashion: clothes
    python train.py --resume                 go on after Ctrl-C or a crash
    torchrun --nproc_per_node 2 train.py     several processes, one model
"""

import torch

from model import NCSN, ScoreNet, dequantise, from_unit
from utils import EMA, Run, cli, ramp, save_grid


# Adapted from lesson_01/train.py: main -- scores at many noise levels, on images in [0, 1]; no points
def main(argv=None):
    run = Run(__file__, argv)                           # configuration, device, precision, seed, processes
    cfg, sample = run.config.train, run.config.sample
    ncsn = NCSN(**run.config.ncsn)
    net = ScoreNet(ncsn.levels, **run.config.scorenet)
    optimizer = torch.optim.Adam(net.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)
    ncsn, net, optimizer = run.prepare(ncsn, net, optimizer)
    ema = EMA(net, cfg.ema_decay)
    run.track(net=net, optimizer=optimizer, ema=ema)    # what a checkpoint holds; loads it on --resume

    for step, (x0, _) in run.steps(run.images(run.config.scorenet)):                # (B, C, H, W) in [-1, 1]
        optimizer.param_groups[0]["lr"] = cfg.lr * ramp(step, cfg.warmup, cfg.steps)
        loss = ncsn.loss(net, dequantise(x0))           # Eq. (6), on images in [0, 1]
        optimizer.zero_grad()
        run.backward(loss)
        optimizer.step()
        ema.update(net)
        run.log(loss=loss)
        if run.every(cfg.preview_every):
            x = ncsn.sample(ema.module, 36, sample.steps, sample.epsilon, x0.shape[1:], run.generator())
            save_grid(from_unit(x), run.folder / f"preview_{step + 1:06d}.png")
    return run.finish(ema, scorenet=run.config.scorenet, ncsn=run.config.ncsn)      # weights, loss curve, numbers


if __name__ == "__main__":
    cli(main)
