"""Train a multimodal diffusion transformer with rectified flow on MNIST with captions.

    python train.py                          the values of config.yaml
    python train.py flow.density=uniform     other training times: uniform, logit-normal, mode, cosmap
    python train.py --resume                 go on after Ctrl-C or a crash
    torchrun --nproc_per_node 2 train.py     several processes, one model
"""

import torch

from model import MMDiT, RectifiedFlow, for_encoders, given, guided
from utils import EMA, Run, Section, cli, ramp, save_grid, save_weights
from utils.captions import Tokenizer, captioned, vocabulary


# Adapted from lesson_05/sublesson_e/train.py: main -- a flow, the caption once for each encoder; snapshots
def main(argv=None):
    run = Run(__file__, argv)                           # configuration, device, precision, seed, processes
    cfg, said = run.config.train, run.config.captions
    words = Tokenizer(vocabulary(said.attributes), run.config.mmdit.length)
    data = captioned("train", cfg.batch_size, cfg.seed, said.images or None, words=said.attributes, tokenizer=words,
                     data=cfg.data)
    sizes = Section(vocabulary=len(words), **run.config.mmdit)
    flow, net = RectifiedFlow(**run.config.flow), MMDiT(**sizes)
    optimizer = torch.optim.Adam(net.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)
    flow, net, optimizer = run.prepare(flow, net, optimizer)
    ema = EMA(net, cfg.ema_decay)
    run.track(net=net, optimizer=optimizer, ema=ema)    # what a checkpoint holds; loads it on --resume
    null = words([""])[0].to(run.device)                # (L,): the start token and padding
    kept = dict(mmdit=sizes, flow=run.config.flow, captions=Section(vocabulary=" ".join(words.words), **said))

    for step, (x0, c) in run.steps(data):               # x0 (B, 1, 28, 28), c (B, L) word numbers
        optimizer.param_groups[0]["lr"] = cfg.lr * ramp(step, cfg.warmup, cfg.steps)
        c = for_encoders(c, null, cfg.drop)             # (B, 3, L): a coin for every sample and encoder
        loss = flow.loss(given(net, c), x0)
        optimizer.zero_grad()
        run.backward(loss)
        run.clip_grad_norm(net.parameters(), cfg.clip)
        optimizer.step()
        ema.update(net)                                 # samples come from the average of the weights
        run.log(loss=loss)
        if run.every(cfg.preview_every):
            c = for_encoders(words(["a thin", "a thick"][i // 10 % 2] + f" {i % 10} leaning " +
                                   ["left", "right"][i // 20 % 2] for i in range(40)).to(run.device), null)
            v = guided(ema.module, c, for_encoders(null.expand(40, -1), null), run.config.sample.guidance)
            n = torch.randn(40, 1, 28, 28, generator=run.generator()).to(run.device)
            x = flow.sample(v, n, flow.grid(run.config.sample.steps))
            save_grid(x, run.folder / f"preview_{step + 1:06d}.png", columns=10)
        if run.every(cfg.snapshots):
            save_weights(ema.module, run.folder / f"snapshot_{step + 1:06d}.safetensors", run.name,
                         **{name: vars(section) for name, section in kept.items()})
    return run.finish(ema, **kept)                      # weights, loss curve, numbers


if __name__ == "__main__":
    cli(main)
