"""Train DDPM on MNIST: Algorithm 1.

    python train.py                          the values of config.yaml
    python train.py steps=500 lr=1e-3        other values; --help lists them
    python train.py data=../my_images        your own images; data=fashion: clothes
    python train.py --resume                 go on after Ctrl-C or a crash
    torchrun --nproc_per_node 2 train.py     several GPUs, one model
"""

from model import DDPM, UNet
from utils import EMA, Run, cli, muon, ramp, save_grid


def main(argv=None):
    run = Run(__file__, argv)                           # configuration, device, precision, seed, processes
    cfg = run.config.train
    ddpm, net = DDPM(**run.config.ddpm), UNet(**run.config.unet)
    optimizer = muon(net, cfg.lr, cfg.adam_lr, cfg.beta2, outer=(net.stem, net.out))    # Adam alone: see README
    ddpm, net, optimizer = run.prepare(ddpm, net, optimizer)
    ema = EMA(net, share=cfg.ema_share)
    run.track(net=net, optimizer=optimizer, ema=ema)    # what a checkpoint holds; loads it on --resume

    for step, (x0, _) in run.steps(run.images(run.config.unet)):                    # (B, C, H, W) in [-1, 1]
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * ramp(step, cfg.warmup, cfg.steps)
        loss = ddpm.loss(net, x0)                       # Algorithm 1, lines 2 to 5
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


if __name__ == "__main__":
    cli(main)
