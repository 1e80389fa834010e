"""Train NCSNv2 on MNIST: denoising score matching over noise levels that the data and formulas set.

    python train.py                          the values of config.yaml
    python train.py steps=500 lr=1e-3        other values; --help lists them
    python train.py data=../my_images        your own images; data=fashion: clothes
    python train.py sigma_1=1                without Technique 1: the largest noise of lesson 03
    python train.py --resume                 go on after Ctrl-C or a crash
    torchrun --nproc_per_node 2 train.py     several processes, one model
"""

import math

from model import NCSNv2, UNet, dequantise, from_unit, max_distance, to_unit
from utils import EMA, Run, Section, Weights, cli, muon, ramp, save_grid, save_weights


# Adapted from lesson_03/train.py: main -- sigma_1 from the data; an average of the weights; snapshots for the claim
def main(argv=None):
    run = Run(__file__, argv)                           # configuration, device, precision, seed, processes
    cfg = run.config.train
    data = run.images(run.config.unet)
    levels = settings(run.config.ncsn, data)
    ncsn, net = NCSNv2(**levels), UNet(**run.config.unet)
    if cfg.start:
        Weights(run.lesson / cfg.start, run.name).load(net)
    optimizer = muon(net, cfg.lr, cfg.adam_lr, cfg.beta2, outer=(net.stem, net.gain, net.out))     # see lesson 05
    ncsn, net, optimizer = run.prepare(ncsn, net, optimizer)
    ema = EMA(net, share=cfg.ema_share)                       # Technique 5
    run.track(net=net, optimizer=optimizer, ema=ema)    # what a checkpoint holds; loads it on --resume
    run.say(f"sigma_1 = {levels.sigma_1:.2f}, {ncsn.levels} levels, {ncsn.gamma:.4f} between neighbours")

    for step, (x0, _) in run.steps(data):               # (B, C, H, W) in [-1, 1]
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * (ramp(step, cfg.warmup, cfg.steps) if cfg.decay else
                                    min((step + 1) / max(cfg.warmup, 1), 1))
        loss = ncsn.loss(net, dequantise(x0))           # 1 / 2 |sigma s + z|^2 at a random level for each image
        optimizer.zero_grad()
        run.backward(loss)
        run.clip_grad_norm(net.parameters(), cfg.clip)
        optimizer.step()
        ema.update(net)                                 # samples come from the average of the weights
        run.log(loss=loss)
        if run.every(cfg.preview_every):
            x = ncsn.sample(ema.module, 64, run.config.sample.steps, x0.shape[1:], generator=run.generator())
            save_grid(from_unit(x), run.folder / f"preview_{step + 1:06d}.png")
        if run.every(cfg.snapshot_every):               # reproduce.py compares the two
            for name, weights in (("raw", getattr(net, "module", net)), ("ema", ema.module)):
                save_weights(weights, run.folder / f"{name}_{step + 1:06d}.safetensors", run.name,
                             ncsn=vars(levels), unet=vars(run.config.unet))
    return run.finish(ema, ncsn=levels, unet=run.config.unet)                       # weights, loss curve, numbers


def settings(ncsn, data):
    """The section `ncsn` with a number for sigma_1 (auto: Technique 1) and the numbers in an image (Technique 2)."""
    sigma_1 = max_distance(to_unit(data.all())) if ncsn.sigma_1 == "auto" else ncsn.sigma_1
    return Section(**{**ncsn, "sigma_1": sigma_1, "dim": math.prod(data.shape)})


if __name__ == "__main__":
    cli(main)
