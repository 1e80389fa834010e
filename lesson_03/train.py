"""Train NCSN on MNIST: denoising score matching at ten noise levels.

    python train.py                          the values of config.yaml
    python train.py steps=500 lr=1e-3        other values; --help lists them
    python train.py network=scorenet         the paper's network, which needs longer
    python train.py data=../my_images        your own images; data=fashion: clothes
    python train.py --resume                 go on after Ctrl-C or a crash
    torchrun --nproc_per_node 2 train.py     several GPUs, one model
"""

from model import NCSN, dequantise, from_unit, network
from utils import EMA, Run, cli, muon, ramp, save_grid


# Adapted from lesson_05/train.py: main -- scores at many noise levels, on images in [0, 1]; a choice of two networks
def main(argv=None):
    run = Run(__file__, argv)                           # configuration, device, precision, seed, processes
    cfg, sample = run.config.train, run.config.sample
    run.check_given(("images", "ncsn", cfg.network))    # a value of the other network would do nothing
    sections = {"ncsn": run.config.ncsn, cfg.network: {**run.config.images, **run.config[cfg.network]}}
    ncsn = NCSN(**run.config.ncsn)
    net = network(ncsn, sections)
    optimizer = muon(net, cfg.lr, cfg.adam_lr, cfg.beta2, outer=(net.stem, net.out))    # Adam alone: see lesson 05
    ncsn, net, optimizer = run.prepare(ncsn, net, optimizer)
    ema = EMA(net, share=cfg.ema_share)
    run.track(net=net, optimizer=optimizer, ema=ema)    # what a checkpoint holds; loads it on --resume

    for step, (x0, _) in run.steps(run.images(run.config.images)):                  # (B, C, H, W) in [-1, 1]
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * ramp(step, cfg.warmup, cfg.steps)
        loss = ncsn.loss(net, dequantise(x0))           # Eq. (6), on images in [0, 1]
        optimizer.zero_grad()
        run.backward(loss)
        run.clip_grad_norm(net.parameters(), cfg.clip)
        optimizer.step()
        ema.update(net)                                 # samples come from the average of the weights
        run.log(loss=loss)
        if run.every(cfg.preview_every):
            x = ncsn.sample(ema.module, 36, sample.steps, sample.epsilon, x0.shape[1:], run.generator())
            save_grid(from_unit(x), run.folder / f"preview_{step + 1:06d}.png")
    return run.finish(ema, **sections)                  # weights, loss curve, numbers


if __name__ == "__main__":
    cli(main)
