"""Train DDPM with dropout on few images, and watch the error on images that it has not seen.

    python train.py                            2,000 images, dropout 0.1
    python train.py dropout=0 images=60000     no dropout; all of MNIST; --help lists the values
    python train.py data=../../my_images       your own images; data=fashion: clothes
    python train.py --resume                   go on after Ctrl-C or a crash
    torchrun --nproc_per_node 2 train.py       several processes, one model
"""

import torch

from model import DDPM, UNet, error_by_time
from utils import EMA, Run, Weights, cli, figure, ramp, save_figure, save_grid, ticks


def preview(run, ddpm, net, ema, shape):
    """A grid of samples. They come from the average, which is in evaluation mode for good; `net` is left alone."""
    x = ddpm.sample(ema.module, 64, min(run.config.sample.steps, ddpm.timesteps), shape, generator=run.generator())
    save_grid(x, run.folder / f"preview_{run.step + 1:06d}.png")


# Adapted from lesson_05/train.py: main -- Adam; few images, their error beside that of unseen ones, in
#   training mode
def main(argv=None):
    run = Run(__file__, argv)                           # configuration, device, precision, seed, processes
    cfg = run.config.train
    ddpm, net = DDPM(**run.config.ddpm), UNet(**run.config.unet)
    if cfg.start:                                       # lesson 05's network, or one of this lesson's
        Weights(run.lesson / cfg.start, run.name, "lesson_05").load(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)
    ddpm, net, optimizer = run.prepare(ddpm, net, optimizer)
    ema = EMA(net, cfg.ema_decay)                       # in evaluation mode from the start: judged without dropout
    run.track(net=net, optimizer=optimizer, ema=ema)    # what a checkpoint holds; loads it on --resume
    data, test = run.images(run.config.unet, limit=cfg.images), run.images(run.config.unet, "test")
    seen, unseen = (part.first(min(cfg.eval_images, len(part)))[0].to(run.device) for part in (data, test))

    for step, (x0, _) in run.steps(data):               # (B, C, H, W) in [-1, 1]
        optimizer.param_groups[0]["lr"] = cfg.lr * ramp(step, cfg.warmup, cfg.steps)
        assert all(part.training for part in net.modules()) or not cfg.strict, "eval() was called and never undone"
        loss = ddpm.loss(net, x0)                       # Algorithm 1, lines 2 to 5
        optimizer.zero_grad()
        run.backward(loss)
        run.clip_grad_norm(net.parameters(), cfg.clip)
        optimizer.step()
        ema.update(net)                                 # samples come from the average of the weights
        run.log(loss=loss)
        if run.every(cfg.preview_every):
            preview(run, ddpm, net, ema, x0.shape[1:])
        if run.every(cfg.eval_every):                   # the same noise every time, and for both
            times = [int((i + 0.5) * ddpm.timesteps / 10) for i in range(10)]
            train_error, test_error = (error_by_time(ddpm, ema.module, x, times, run.generator()).mean()
                                       for x in (seen, unseen))
            run.log(train_error=train_error, test_error=test_error)
    result = run.finish(ema, unet=run.config.unet, ddpm=run.config.ddpm)            # weights, loss curve, numbers
    run.output(curves, result and result.records, "errors.png")
    return result


def curves(records, path):
    """The error on seen and unseen images by training step."""
    fig, ax = figure()
    for key, label in (("test_error", "test images"), ("train_error", "images trained on")):
        rows = [row for row in records if key in row]
        ax.plot([row["step"] for row in rows], [row[key] for row in rows], label=label)
    ax.set(xlabel="training step", ylabel="squared error of the noise, EMA", yscale="log")
    ticks(ax.yaxis)
    ax.grid(alpha=0.3)
    ax.legend()
    return save_figure(fig, path)


if __name__ == "__main__":
    cli(main)
