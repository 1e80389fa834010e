"""Train a flow on MNIST: regress the vector field of the conditional paths.

    python train.py                       the values of config.yaml: flow matching on the OT path
    python train.py flow.path=vp          on the diffusion path; score matching on it is an arm of reproduce.py
    python train.py data=../my_images     your own images; data=fashion: clothes
    python train.py --resume              go on after Ctrl-C or a crash
    torchrun --nproc_per_node 2 train.py  several processes, one model
"""

import torch

from model import FlowMatching, UNet, dequantise, quantise
from utils import EMA, Run, cli, muon, ramp, save_grid, save_weights


# Adapted from lesson_05/train.py: main -- pixels become densities before the loss, and averages of the weights
#   may be kept on the way
def main(argv=None):
    run = Run(__file__, argv)                           # configuration, device, precision, seed, processes
    cfg = run.config.train
    flow, net = FlowMatching(**run.config.flow), UNet(**run.config.unet)
    optimizer = muon(net, cfg.lr, cfg.adam_lr, cfg.beta2, outer=(net.stem, net.out))    # Adam alone: see README
    flow, net, optimizer = run.prepare(flow, net, optimizer)
    ema = EMA(net, share=cfg.ema_share)
    run.track(net=net, optimizer=optimizer, ema=ema)    # what a checkpoint holds; loads it on --resume

    for step, (x0, _) in run.steps(run.images(run.config.unet)):                    # (B, C, H, W) in [-1, 1]
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * ramp(step, cfg.warmup, cfg.steps)
        loss = flow.loss(net, dequantise(x0))           # Eq. (23)
        optimizer.zero_grad()
        run.backward(loss)
        run.clip_grad_norm(net.parameters(), cfg.clip)
        optimizer.step()
        ema.update(net)                                 # samples come from the average of the weights
        run.log(loss=loss)
        if run.every(cfg.preview_every):
            eps = torch.randn(64, *x0.shape[1:], generator=run.generator()).to(run.device)
            x, _ = flow.sample(ema.module, eps, run.config.sample.solver, run.config.sample.steps)
            save_grid(quantise(x), run.folder / f"preview_{step + 1:06d}.png")
        if run.every(cfg.snapshot_every):
            save_weights(ema.module, run.folder / f"step_{step + 1:06d}.safetensors", run.name,
                         **{name: dict(vars(run.config[name])) for name in ("unet", "flow")})
    return run.finish(ema, unet=run.config.unet, flow=run.config.flow)              # weights, loss curve, numbers


if __name__ == "__main__":
    cli(main)
