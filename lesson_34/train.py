"""Train Flux on MNIST with captions: a teacher, then a student that its guidance is distilled into, all in one run.

    python train.py                          the values of config.yaml: the teacher, then the student
    python train.py stages="[1, 0]"          the teacher only; --help lists all keys
    python train.py flux.places=table         a table of positions in the place of the rotation
    python train.py --resume                 go on after Ctrl-C or a crash
    torchrun --nproc_per_node 2 train.py     several processes, one model
"""

import copy

import torch

from model import Flux, RectifiedFlow, drop, given, guided
from utils import EMA, Run, Section, UserError, Weights, cli, ramp, save_grid, save_weights
from utils.captions import Tokenizer, captioned, vocabulary

TEACHER = "weights_teacher.safetensors"


# Adapted from lesson_05/sublesson_e/train.py: main -- two trainings in a row: the second starts from the average of the
#   first, which it learns from
def main(argv=None):
    run = Run(__file__, argv)                           # configuration, device, precision, seed, processes
    cfg, said = run.config.train, run.config.captions
    words = Tokenizer(vocabulary(said.attributes, said.kind), said.length)
    data = captioned("train", cfg.batch_size, cfg.seed, said.images or None, said.kind, said.attributes,
                     tokenizer=words)
    sizes = Section(vocabulary=len(words), length=words.length, **run.config.flux)
    flow, net = RectifiedFlow(**run.config.flow), Flux(**sizes)
    optimizer = torch.optim.Adam(net.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)
    flow, net, optimizer = run.prepare(flow, net, optimizer)
    ema = EMA(net, cfg.ema_decay)
    run.track(net=net, optimizer=optimizer, ema=ema)    # what a checkpoint holds; loads it on --resume
    parts = dict(flux=sizes, flow=run.config.flow, captions=Section(vocabulary=" ".join(words.words), **said))
    null = words([""]).to(run.device)                   # (1, L): the start token and padding
    switch = first_stage(cfg)
    teacher = read_teacher(run, ema) if switch <= run.step < cfg.steps else None

    for step, (x0, c) in run.steps(data):               # x0 (B, 1, 28, 28), c (B, L) word numbers
        begin, end, lr = (0, switch, cfg.lr) if teacher is None else (switch, cfg.steps, cfg.lr_student)
        optimizer.param_groups[0]["lr"] = lr * ramp(step - begin, cfg.warmup, end - begin)
        c = drop(c, null, cfg.drop)                     # a coin for every sample
        if teacher is None:
            loss = flow.loss(given(net, c), x0)         # the guidance input is 1
        else:                                           # one pass with w as input shall say what two passes say
            w = cfg.guidance[0] + (cfg.guidance[1] - cfg.guidance[0]) * torch.rand(len(c), device=c.device)
            loss = flow.loss(given(net, c, w), x0, guided(teacher, c, null.expand_as(c), w))
        optimizer.zero_grad()
        run.backward(loss)
        run.clip_grad_norm(net.parameters(), cfg.clip)
        optimizer.step()
        ema.update(net)                                 # samples come from the average of the weights
        run.log(loss=loss)
        if run.every(cfg.preview_every):
            c = words(["a thin", "a thick"][i // 10 % 2] + f" {i % 10} leaning " + ["left", "right"][i // 20 % 2]
                      for i in range(40)).to(run.device)
            v = guided(ema.module, c, null.expand_as(c), 3.0) if teacher is None else given(ema.module, c, 3.0)
            xT = torch.randn(40, *x0.shape[1:], generator=run.generator()).to(run.device)
            save_grid(flow.sample(v, xT, flow.grid(run.config.sample.steps, 49)),
                      run.folder / f"preview_{step + 1:06d}.png", columns=10)
        if step + 1 == switch < cfg.steps:              # the teacher is ready
            if run.is_main:
                save_weights(ema.module, run.folder / TEACHER, run.name, **{k: vars(v) for k, v in parts.items()})
                if run.settings.publish:
                    run.publish(run.folder / TEACHER)
            run.accelerator.wait_for_everyone()
            teacher = read_teacher(run, ema)
            getattr(net, "module", net).load_state_dict(ema.module.state_dict())           # the student starts as it
            optimizer.state.clear()
            ema.n_averaged.zero_()
    return run.finish(ema, **parts)                     # weights, loss curve, numbers


def first_stage(cfg):
    """The step at which the teacher is ready, from the stages' shares."""
    low, high = cfg.guidance
    if len(cfg.stages) != 2 or cfg.stages[0] <= 0 or cfg.stages[1] < 0 or not low <= high:
        raise UserError(f"stages={cfg.stages} must be two shares, the first above 0; guidance={cfg.guidance} from low "
                        "to high")
    return max(1, round(cfg.steps * cfg.stages[0] / sum(cfg.stages)))


def read_teacher(run, ema):
    """The teacher as its file has it, so that a resumed run learns from the same."""
    return run.place(Weights(run.folder / TEACHER, run.name).load(copy.deepcopy(ema.module)))


if __name__ == "__main__":
    cli(main)
