"""Train a class-conditional DDPM with a transformer block on MNIST.

    python train.py                          the values of config.yaml
    python train.py unet.block=attention     lesson 05c's layers; --help lists all keys
    python train.py start= steps=5000        from random weights
    python train.py --resume                 go on after Ctrl-C or a crash
    torchrun --nproc_per_node 2 train.py     several processes, one model
"""

import torch

from model import DDPM, Attention, ClassTokens, CrossBlock, SpatialTransformer, UNet, drop, given
from utils import EMA, Run, UserError, Weights, cli, digits, ramp, save_grid


# Copied from lesson_05/sublesson_c/train.py: main
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


# Adapted from lesson_05/sublesson_c/train.py: begin_with -- without lesson 05's self-attention, for either block
def begin_with(net, path):
    """Copy lesson 05's weights into all layers but attention, transformers and classes, which keep their own start.

    Sorted by name, these layers stand in the same order in both networks. Attention in the middle is left behind, so
    that both kinds of block begin alike: with nothing learned.
    """
    fresh = Attention, ClassTokens, CrossBlock, SpatialTransformer
    new = {p for m in net.modules() if isinstance(m, fresh) for p in m.parameters()}
    own = [p for _, p in sorted(net.named_parameters()) if p not in new]
    theirs = [value for name, value in sorted(Weights(path, "lesson_05").state.items())
              if not name.startswith("middle.1.")]
    if [p.shape for p in own] != [value.shape for value in theirs]:
        raise UserError(f"start={path}: this network has other layers than that of lesson 05; train.start= trains anew")
    with torch.no_grad():
        for p, value in zip(own, theirs):
            p.copy_(value)


if __name__ == "__main__":
    cli(main)
