"""Train a rectified flow on MNIST, straighten it by reflow, distil it to one step: Algorithm 1, all in one run.

    python train.py                          the values of config.yaml: 1-rf, then 2-rf, then the distilled network
    python train.py source=3 target=8        from threes to eights in the place of from noise to digits
    python train.py stages="[1, 0, 0]"       the 1-rectified flow only; then `python sample.py steps=20`
    python train.py steps=300 pairs=512      a short look; the pairs of the default take minutes by themselves
    python train.py --resume                 go on after Ctrl-C or a crash
    torchrun --nproc_per_node 2 train.py     several processes, one model
"""

import torch
from safetensors.torch import load_file, save_file

from model import Coupling, RectifiedFlow, UNet
from utils import EMA, Run, UserError, cli, digits, ramp, save_grid, save_weights
from utils.data import Digits


# Adapted from lesson_05/train.py: main -- three trainings in a row: the second and third start from the average of the
#   one before and learn from the pairs that it makes
def main(argv=None):
    run = Run(__file__, argv)                           # configuration, device, precision, seed, processes
    cfg, ends = run.config.train, stage_ends(run.config.train)
    flow, net = RectifiedFlow(**run.config.flow), UNet(**run.config.unet)
    optimizer = torch.optim.Adam(net.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)
    flow, net, optimizer = run.prepare(flow, net, optimizer)
    ema = EMA(net, cfg.ema_decay)
    run.track(net=net, optimizer=optimizer, ema=ema)    # what a checkpoint holds; loads it on --resume
    coupling = Coupling(subset(cfg.source, cfg.batch_size, cfg.seed + 1), subset(cfg.target, cfg.batch_size, cfg.seed),
                        cfg.batch_size, cfg.seed)
    if ends[0] <= run.step < cfg.steps:                 # resumed after the first stage
        coupling.pairs = load_file(run.folder / f"pairs_{sum(run.step >= end for end in ends)}.safetensors")

    for step, (z0, z1) in run.steps(coupling):          # (B, 1, 28, 28) each
        stage = sum(step >= end for end in ends)        # 0: 1-rf, 1: 2-rf, 2: distilled
        begin, end = ([0] + ends)[stage], ends[stage]
        optimizer.param_groups[0]["lr"] = cfg.lr * ramp(step - begin, cfg.warmup, end - begin)
        loss = flow.loss(net, z0, z1, distil=stage == 2)                    # Eq. (1)
        optimizer.zero_grad()
        run.backward(loss)
        run.clip_grad_norm(net.parameters(), cfg.clip)
        optimizer.step()
        ema.update(net)                                 # samples and pairs come from the average of the weights
        run.log(loss=loss)
        if run.every(cfg.preview_every):                # the same starts in one step, then in twenty
            z = coupling.starts(32).to(run.device)
            save_grid(torch.cat([flow.sample(ema.module, z, steps=steps)[0] for steps in (1, 20)]),
                      run.folder / f"preview_{step + 1:06d}.png")
        if step + 1 == end < cfg.steps:                 # the end of 1-rf or 2-rf, and another stage follows
            keep(run, ema.module, ("1-rf.safetensors", "2-rf.safetensors")[stage])
            z0 = coupling.starts(cfg.pairs)             # Algorithm 1: the flow's own pairs, made once, by the average
            z1 = [flow.sample(ema.module, part.to(run.device), "midpoint", cfg.pair_steps[stage])[0].cpu()
                  for part in z0.split(128)]
            coupling.pairs = {"z0": z0.half(), "z1": torch.cat(z1).half()}
            if run.is_main:
                save_file(coupling.pairs, run.folder / f"pairs_{sum(step + 1 >= end for end in ends)}.safetensors")
            getattr(net, "module", net).load_state_dict(ema.module.state_dict())           # the next starts from here
            optimizer.state.clear()
            ema.n_averaged.zero_()
    return run.finish(ema, unet=run.config.unet, flow=run.config.flow)      # weights, loss curve, numbers


def subset(name, batch_size=1, seed=0, split="train"):
    """The images that `source` or `target` names; None for noise."""
    if name not in ("noise", "digits", *map(str, range(10))):
        raise UserError(f"{name} is none of noise, digits, 0 to 9: choose one of these for source and target")
    if name == "noise":
        return None
    data = digits(split)
    mine = data.labels == int(name) if name != "digits" else slice(None)
    return Digits(data.images[mine], data.labels[mine], batch_size, seed)


def stage_ends(cfg):
    """The step at which each stage ends, from their shares."""
    if len(cfg.stages) != 3 or min(cfg.stages) < 0 or cfg.stages[0] <= 0 or cfg.target == "noise":
        raise UserError(f"stages={cfg.stages} must be three shares, the first above 0; target={cfg.target} not noise")
    return [max(1, round(cfg.steps * sum(cfg.stages[:i + 1]) / sum(cfg.stages))) for i in range(3)]


def keep(run, net, name):
    """Write (and publish) the network of a stage that is not the last."""
    if run.is_main:
        save_weights(net, run.folder / name, run.name, unet=vars(run.config.unet), flow=vars(run.config.flow))
        if run.settings.publish:
            run.publish(run.folder / name)


if __name__ == "__main__":
    cli(main)
