"""Train Flux on MNIST with captions: a teacher, then a student that its guidance is distilled into, all in one run.

    python train.py                          the values of config.yaml: the teacher, then the student
    python train.py stages="[1, 0]"          the teacher only; --help lists all keys
    python train.py --resume                 go on after Ctrl-C or a crash
    torchrun --nproc_per_node 2 train.py     several processes, one model
"""

import torch

from model import Flux, RectifiedFlow, drop, given, guided
from utils import EMA, Run, Section, UserError, cli, ramp, save_grid, save_weights
from utils.captions import Tokenizer, captioned, vocabulary

TEACHER = "weights_teacher.safetensors"


# Adapted from lesson_05/sublesson_e/train.py: main -- two loops: a teacher, then the student it teaches
def main(argv=None):
    run = Run(__file__, argv)                           # configuration, device, precision, seed, processes
    cfg, said = run.config.train, run.config.captions
    switch = first_stage(cfg)
    words = Tokenizer(vocabulary(said.attributes, said.kind), said.length)
    data = captioned("train", cfg.batch_size, cfg.seed, said.images or None, said.kind, said.attributes,
                     tokenizer=words, data=cfg.data)
    sizes = Section(vocabulary=len(words), length=words.length, **run.config.flux)
    flow, net = RectifiedFlow(**run.config.flow), Flux(**sizes)
    optimizer = torch.optim.Adam(net.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)
    flow, net, optimizer = run.prepare(flow, net, optimizer)
    ema = EMA(net, cfg.ema_decay)
    run.track(net=net, optimizer=optimizer, ema=ema)    # what a checkpoint holds; loads it on --resume
    parts = dict(flux=sizes, flow=run.config.flow, captions=Section(vocabulary=" ".join(words.words), **said))
    null = words([""]).to(run.device)                   # (1, L): the start token and padding

    for step, (x0, c) in run.steps(data, until=switch):             # x0 (B, 1, 28, 28), c (B, L) word numbers
        optimizer.param_groups[0]["lr"] = cfg.lr * ramp(step, cfg.warmup, switch)
        loss = flow.loss(given(net, drop(c, null, cfg.drop)), x0)   # a coin for every sample; the guidance input is 1
        optimizer.zero_grad()
        run.backward(loss)
        run.clip_grad_norm(net.parameters(), cfg.clip)
        optimizer.step()
        ema.update(net)                                 # samples come from the average of the weights
        run.log(loss=loss)
        if run.every(cfg.preview_every):
            preview(run, flow, words, lambda c: guided(ema.module, c, null.expand_as(c), 3.0))
    if switch == cfg.steps:
        return run.finish(ema, **parts)                 # weights, loss curve, numbers

    teacher, net = ema.module, Flux(**sizes)
    net.load_state_dict(teacher.state_dict())           # the student starts as the teacher
    run.output(save_weights, teacher, TEACHER, lesson=run.name, **{name: vars(part) for name, part in parts.items()})
    optimizer = torch.optim.Adam(net.parameters(), lr=cfg.lr_student, betas=(0.9, cfg.beta2), fused=True)
    net, optimizer = run.prepare(net, optimizer)
    ema = EMA(net, cfg.ema_decay)
    run.track(student=net, student_optimizer=optimizer, student_ema=ema)

    for step, (x0, c) in run.steps(data):               # one pass with w as input shall say what two passes say
        optimizer.param_groups[0]["lr"] = cfg.lr_student * ramp(step - switch, cfg.warmup, cfg.steps - switch)
        c, w = drop(c, null, cfg.drop), torch.empty(len(c), device=c.device).uniform_(*cfg.guidance)
        loss = flow.distillation(given(net, c, w), guided(teacher, c, null.expand_as(c), w), x0)
        optimizer.zero_grad()
        run.backward(loss)
        run.clip_grad_norm(net.parameters(), cfg.clip)
        optimizer.step()
        ema.update(net)
        run.log(loss=loss)
        if run.every(cfg.preview_every):
            preview(run, flow, words, lambda c: given(ema.module, c, 3.0))
    return run.finish(ema, **parts)


def first_stage(cfg):
    """The step at which the teacher is ready, from the stages' shares."""
    if {len(cfg.stages), len(cfg.guidance)} != {2} or cfg.stages[0] <= 0 or cfg.guidance != sorted(cfg.guidance):
        raise UserError(f"stages={cfg.stages}: two shares, the first above 0; guidance={cfg.guidance}: low, then high")
    return max(1, round(cfg.steps * cfg.stages[0] / sum(cfg.stages)))


def preview(run, flow, words, velocity):
    """Forty digits: thin ones and thick ones that lean left, then right. velocity(c): a function of x_t and t."""
    c = words(f"a {'thick' if i // 10 % 2 else 'thin'} {i % 10} leaning {'right' if i // 20 else 'left'}"
              for i in range(40)).to(run.device)
    n = torch.randn(40, 1, 28, 28, generator=run.generator()).to(run.device)
    grid = flow.grid(run.config.sample.steps, (28 // run.config.flux.patch) ** 2)
    save_grid(flow.sample(velocity(c), n, grid), run.folder / f"preview_{run.step + 1:06d}.png", columns=10)


if __name__ == "__main__":
    cli(main)
