"""Train VDM on MNIST: the whole bound, noise schedule included; then a copy of its network for the pictures.

    python train.py                          the values of config.yaml: the bound, then the pictures
    python train.py steps=500 lr=1e-3        other values; --help lists them
    python train.py stages="[1, 0]"          the bound only
    python train.py data=../my_images        your own images; data=fashion: clothes
    python train.py schedule.interior=linear another interior of gamma; also schedule.learn_ends=false
    python train.py --resume                 go on after Ctrl-C or a crash
    torchrun --nproc_per_node 2 train.py     several GPUs, one model
"""

from model import VDM, Network
from utils import EMA, Run, UserError, cli, muon, ramp, save_grid, save_weights


# Adapted from lesson_05/train.py: main -- two loops: the bound is the loss, and the schedule learns beside the U-Net;
#   then the U-Net alone goes on with a weighted loss
def main(argv=None):
    run = Run(__file__, argv)                           # configuration, device, precision, seed, processes
    cfg, switch = run.config.train, first_stage(run.config.train)
    vdm, net = VDM(**run.config.vdm), Network(run.config.schedule, run.config.unet)
    unet, schedule = net.unet, net.schedule
    optimizer = muon(net, cfg.lr, cfg.adam_lr, cfg.beta2, outer=(unet.stem, unet.out), apart={schedule: cfg.lr_gamma})
    vdm, net, optimizer = run.prepare(vdm, net, optimizer)
    ema = EMA(net, share=cfg.ema_share)
    run.track(net=net, optimizer=optimizer, ema=ema)    # what a checkpoint holds; loads it on --resume
    parts, data = {name: run.config[name] for name in ("unet", "schedule", "vdm")}, run.images(run.config.unet)

    for step, (x0, _) in run.steps(data, until=switch):             # (B, C, H, W) in [-1, 1]
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * ramp(step, cfg.warmup, switch)
        reconstruction, prior, diffusion = vdm.loss(net, x0)        # bits/dim: their sum bounds -log2 p(x) / D
        loss = reconstruction + prior + diffusion
        optimizer.zero_grad()
        run.backward(loss)                              # at gamma's interior this is the gradient of diffusion squared
        run.clip_grad_norm(unet.parameters(), cfg.clip)
        optimizer.step()
        ema.update(net)                                 # the average of the weights is what is kept
        run.log(loss=loss, reconstruction=reconstruction, prior=prior,
                gamma_0=schedule.low, gamma_1=schedule.low + schedule.span.abs())
        if run.every(cfg.preview_every):
            preview(run, vdm, ema.module)
    run.output(save_weights, ema.module, "bound.safetensors", lesson=run.name, data=run.data,
               **{name: vars(part) for name, part in parts.items()})
    if switch == cfg.steps:
        return run.finish(ema, **parts)                 # weights, loss curve, numbers

    bound, net = ema.module, Network(run.config.schedule, run.config.unet)
    net.load_state_dict(bound.state_dict())             # the second starts as the first
    unet = net.unet
    net.schedule.requires_grad_(False)                  # and keeps its schedule
    optimizer = muon(unet, cfg.lr, cfg.adam_lr, cfg.beta2, outer=(unet.stem, unet.out))
    net, optimizer = run.prepare(net, optimizer)
    ema = EMA(net, share=cfg.ema_share)
    run.track(pictures=net, pictures_optimizer=optimizer, pictures_ema=ema)

    for step, (x0, _) in run.steps(data):
        for group in optimizer.param_groups:
            group["lr"] = cfg.picture_rate * cfg.lr * ramp(step - switch, cfg.warmup, cfg.steps - switch)
        loss = vdm.weighted(net, x0)                    # Sec. 5.2: no more bits, a squared error of eps
        optimizer.zero_grad()
        run.backward(loss)
        run.clip_grad_norm(unet.parameters(), cfg.clip)
        optimizer.step()
        ema.update(net)
        run.log(loss=loss)
        if run.every(cfg.preview_every):
            preview(run, vdm, ema.module)
    return run.finish(ema, **parts)


def first_stage(cfg):
    """The step at which the bound's network is ready, from the stages' shares."""
    if len(cfg.stages) != 2 or cfg.stages[0] <= 0:
        raise UserError(f"stages={cfg.stages}: two shares, the first above 0")
    return max(1, round(cfg.steps * cfg.stages[0] / sum(cfg.stages)))


def preview(run, vdm, net):
    """Sixty-four digits from the same noise as at every preview."""
    cfg, unet = run.config.sample, run.config.unet
    x = vdm.sample(net, 64, cfg.steps, (unet.image_channels, unet.image_size, unet.image_size), run.generator(),
                   cfg.grid)
    save_grid(x, run.folder / f"preview_{run.step + 1:06d}.png")


if __name__ == "__main__":
    cli(main)
