"""Train a rectified flow on MNIST, straighten it by reflow, distil it to one step: Algorithm 1, all in one run.

    python train.py                          the values of config.yaml: 1-rf, then 2-rf, then the distilled network
    python train.py source=3 target=8        from threes to eights instead of from noise to digits
    python train.py stages="[1, 0, 0]"       the 1-rectified flow only; then `python sample.py steps=20`
    python train.py data=../my_images        your own images; data=fashion: clothes; source=3 is then their class 3
    python train.py steps=300 pairs=512      a short look; the pairs of the default take minutes by themselves
    python train.py --resume                 go on after Ctrl-C or a crash
    torchrun --nproc_per_node 2 train.py     several processes, one model
"""

import torch
from safetensors.torch import load_file, save_file

from model import Coupling, RectifiedFlow, UNet
from sample import subset
from utils import EMA, Run, UserError, cli, ramp, save_grid, save_weights

STAGES = ("1-rf", "2-rf", "distilled")


# Adapted from lesson_05/train.py: main -- Adam; three trainings in a row: the second and third start from the average
#   of the one before and learn from the pairs that it makes
def main(argv=None):
    run = Run(__file__, argv)                           # configuration, device, precision, seed, processes
    cfg, plan = run.config.train, stages(run.config.train)
    flow, net = RectifiedFlow(**run.config.flow), UNet(**run.config.unet)
    optimizer = torch.optim.Adam(net.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)
    flow, net, optimizer = run.prepare(flow, net, optimizer)
    ema = EMA(net, cfg.ema_decay)
    run.track(net=net, optimizer=optimizer, ema=ema)    # what a checkpoint holds; loads it on --resume
    data = run.images(run.config.unet)
    source, target = subset(cfg.source, data, cfg.seed + 1), subset(cfg.target, data, cfg.seed)
    coupling = Coupling(source, target, cfg.batch_size, cfg.seed)

    for name, begin, end in plan:                       # Algorithm 1, again on what the last one made
        for step, (z0, z1) in run.steps(coupling, until=end):               # (B, C, H, W) each
            optimizer.param_groups[0]["lr"] = cfg.lr * ramp(step - begin, cfg.warmup, end - begin)
            loss = flow.loss(net, z0, z1, distil=name == "distilled")       # Eq. (1)
            optimizer.zero_grad()
            run.backward(loss)
            run.clip_grad_norm(net.parameters(), cfg.clip)
            optimizer.step()
            ema.update(net)                             # samples and pairs come from the average of the weights
            run.log(loss=loss)
            if run.every(cfg.preview_every):            # the same starts in one step, then in twenty
                z = coupling.starts(32, data.shape).to(run.device)
                save_grid(torch.cat([flow.sample(ema.module, z, steps=steps)[0] for steps in (1, 20)]),
                          run.folder / f"preview_{step + 1:06d}.png")
        if end == cfg.steps:
            return run.finish(ema, unet=run.config.unet, flow=run.config.flow)              # weights, curve, numbers
        if run.step > end:                              # resumed further on: what follows is done
            coupling.pairs = load_file(run.folder / f"pairs_{name}.safetensors")
            continue
        keep(run, ema.module, f"{name}.safetensors")
        z0 = coupling.starts(cfg.pairs, data.shape)     # the flow's own pairs, made once, by the average
        z1 = [flow.sample(ema.module, part.to(run.device), "midpoint", cfg.pair_steps[STAGES.index(name)])[0].cpu()
              for part in z0.split(128)]
        coupling.pairs = {"z0": z0.half(), "z1": torch.cat(z1).half()}
        if run.is_main:
            save_file(coupling.pairs, run.folder / f"pairs_{name}.safetensors")
        getattr(net, "module", net).load_state_dict(ema.module.state_dict())               # the next starts from here
        optimizer.state.clear()
        ema.n_averaged.zero_()


def stages(cfg):
    """(name, first step, end) of every stage that has steps, from their shares."""
    if len(cfg.stages) != 3 or cfg.stages[0] <= 0:
        raise UserError(f"stages={cfg.stages} must be three shares, the first above 0")
    ends = [max(1, round(cfg.steps * sum(cfg.stages[:i + 1]) / sum(cfg.stages))) for i in range(3)]
    return [stage for stage in zip(STAGES, [0, *ends], ends) if stage[1] < stage[2]]


def keep(run, net, name):
    """Write (and publish) the network of a stage that is not the last."""
    if run.is_main:
        save_weights(net, run.folder / name, run.name, run.data, unet=vars(run.config.unet), flow=vars(run.config.flow))
        if run.settings.publish:
            run.publish(run.folder / name)


if __name__ == "__main__":
    cli(main)
