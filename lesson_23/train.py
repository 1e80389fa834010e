"""Train a class-conditional diffusion transformer on MNIST, some of its labels dropped.

    python train.py                          the values of config.yaml
    python train.py dit.patch=7 steps=2000   larger patches, fewer tokens; --help lists all keys
    python train.py dit.conditioning=in-context       adaln-zero, adaln, cross-attention or in-context
    python train.py data=../my_images        your own images, in a folder for each class; data=fashion: clothes
    python train.py --resume                 go on after Ctrl-C or a crash
    torchrun --nproc_per_node 2 train.py     several processes, one model
"""

import torch

from model import IDDPM, DiT, drop, given
from utils import EMA, Run, UserError, cli, columns, ramp, save_grid


# Adapted from lesson_15/train.py: main -- the network is a transformer, whose gates are logged
def main(argv=None):
    run = Run(__file__, argv)                           # configuration, device, precision, seed, processes
    cfg = run.config.train
    if cfg.drop > 1:
        raise UserError(f"drop={cfg.drop} is a share of the samples: from 0 to 1")
    data = run.images(run.config.dit)
    dit = data.with_classes(run.config.dit)             # auto: as many as the data have
    ddpm, net, null = IDDPM(**run.config.ddpm), DiT(**dit), dit.classes
    optimizer = torch.optim.Adam(net.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)
    ddpm, net, optimizer = run.prepare(ddpm, net, optimizer)
    ema = EMA(net, cfg.ema_decay)
    run.track(net=net, optimizer=optimizer, ema=ema)    # what a checkpoint holds; loads it on --resume

    for step, (x0, labels) in run.steps(data):          # x0 (B, C, H, W) in [-1, 1]
        optimizer.param_groups[0]["lr"] = cfg.lr * ramp(step, cfg.warmup, cfg.steps)
        c = drop(labels, torch.full_like(labels, null), cfg.drop)
        loss = ddpm.loss(given(net, c), x0)
        optimizer.zero_grad()
        run.backward(loss)
        run.clip_grad_norm(net.parameters(), cfg.clip)
        optimizer.step()
        ema.update(net)                                 # samples come from the average of the weights
        run.log(loss=loss, **(gates(ema.module) if run.every(cfg.log_every) else {}))
        if run.every(cfg.preview_every):
            c = torch.arange(60, device=run.device) % null
            x = ddpm.sample(given(ema.module, c), len(c), min(run.config.sample.steps, ddpm.timesteps), x0.shape[1:],
                            generator=run.generator())
            save_grid(x, run.folder / f"preview_{step + 1:06d}.png", columns(null))
    return run.finish(ema, dit=dit, ddpm=run.config.ddpm)                               # weights, loss curve, numbers


@torch.no_grad()
def gates(net, t=500):
    """Mean |gate| of each block, of its attention and of its MLP, over the classes at one time; {} if it has none."""
    if net.conditioning != "adaln-zero":
        return {}
    table = net.label.table.weight
    c = torch.arange(len(table), device=table.device)
    emb, found = torch.stack([net.time(torch.full_like(c, t)), net.label(c)], dim=1), {}
    for i, block in enumerate(net.blocks):
        _, _, gate1, _, _, gate2 = block.modulation(emb)
        found |= {f"gate_attention_{i}": gate1.abs().mean(), f"gate_mlp_{i}": gate2.abs().mean()}
    return found


if __name__ == "__main__":
    cli(main)
