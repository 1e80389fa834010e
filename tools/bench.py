"""How fast a lesson is, and how good its samples are after so many seconds of training on a CPU.

    python -m tools.bench lesson_05                       speed, memory, and the FID after 60, 120 and 300 s
    python -m tools.bench lesson_05 scaling=true        images a second: one thread, two, two processes; a busy core
    python -m tools.bench lesson_05 against=diffusers,denoising-diffusion-pytorch    pip install -e '.[reference]'

More keys: budgets=60,120,300 (seconds), n=2048 (samples of a FID), threads=1, seed=0, speed_steps=40 (the speed is
measured on so many), runs=runs/bench (folder in the lesson), publish=true (also to results/), smoke=true (for tests).

- Seconds are CPU seconds of this process divided by the threads: what the clock shows on an idle machine. Only
  training steps count: no set-up, warm-up, previews, checkpoints or sampling.
- The lesson is trained anew for every budget, because its learning rate's course depends on the number of steps:
  that is the budget divided by the time of a step, measured first. It samples with the steps of its config.yaml.
- The other packages keep a constant learning rate, so one training passes through all budgets. Networks, optimizers
  and rates are those of their own pages, not tuned for MNIST or for minutes: a network that was meant for a GPU gets
  few steps here, and that is the result. Same images, threads and precision; batches of 64, 50 sampling steps.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from importlib import import_module, metadata, util
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from tools import scaling
from utils import UserError, cli, code_hash, config, digits, fid_to_test, figure, floor, save_figure, write_json
from utils.device import auto_precision, device_name
from utils.files import ROOT

OPTIONS = {"budgets": "60,120,300", "n": 2048, "threads": 1, "seed": 0, "against": "", "speed_steps": 40,
           "runs": "runs/bench", "publish": False, "smoke": False, "scaling": False}
SMOKE = {"budgets": "0.1,0.4", "n": 100, "speed_steps": 3}
LEAST = {"n": 100, "threads": 1, "speed_steps": 2, "seed": 0}


def keys(o, runs, steps=None):
    """Arguments for the lesson's sample.py or, with steps, for a train.py that does nothing but train. o: options."""
    common = [*["smoke=true"] * o.smoke, *["processes=1"] * bool(steps), "gpu=false", "device=cpu",
              f"precision={auto_precision('cpu')}", f"threads={o.threads}", f"seed={o.seed}", f"runs={runs}"]
    known = config.load(o.folder / "config.yaml", "train").train.keys() if steps else ()
    return common + [f"{k}={v}" for k, v in dict(steps=steps, preview_every=0, save_every=0).items() if k in known]


def timed(train, o, runs, steps):
    """Train the lesson. Returns its result and the seconds of these steps, read at the optimizer's steps."""
    stamps = []
    hook = register_optimizer_step_post_hook(lambda *_: stamps.append(o.clock()))
    result = train.main(keys(o, runs, steps))
    hook.remove()
    return result, (stamps[-1] - stamps[0]) * steps / (steps - 1)       # the first stamp comes after the warm-up


def speed(train, o, runs):
    """What a training step of the lesson costs. Peak memory: of a short training in a process of its own."""
    command = [sys.executable, o.folder / "train.py", *keys(o, f"{runs}/memory", min(20, o.speed_steps))]
    subprocess.run(command, cwd=o.folder, check=True, stdout=subprocess.DEVNULL)
    results = next(Path(runs).glob("memory/**/results.json")).read_text(encoding="utf-8")
    memory = json.loads(results)["train"]["peak_memory_mb"]
    cfg = config.load(o.folder / "config.yaml", "train", keys(o, runs))
    result, seconds = timed(train, o, f"{runs}/speed", o.speed_steps)
    return {"steps": o.speed_steps, "seconds_per_step": seconds / o.speed_steps, "batch_size": cfg.train.batch_size,
            "images_per_second": cfg.train.batch_size * o.speed_steps / seconds, "data_share": result.data_share,
            "peak_memory_mb": memory, "parameters": result.parameters, "sample_steps": cfg.sample.steps}


def lesson_rows(train, sample, o, runs, cost):
    """For every budget: train the lesson, draw n samples with its sample.py. Yields rows of the table."""
    for budget in o.budgets:
        steps = max(2, round(budget / cost["seconds_per_step"]))
        result, seconds = timed(train, o, f"{runs}/{budget:g}", steps)
        argv = keys(o, f"{runs}/{budget:g}") + [f"weights={result.weights}", f"n={o.n}"]
        yield row(o, o.lesson, cost, steps, seconds, lambda argv=argv: sample.main(argv))


def row(o, name, cost, steps, seconds, draw):
    """One row of the table. draw(): the samples, (n, 1, 28, 28) in [-1, 1]."""
    start = o.clock()
    x = draw()
    return {"name": name, "seconds": round(seconds, 2), "steps": steps, "parameters": cost["parameters"],
            "images_per_second": round(steps * cost["batch_size"] / seconds, 1), "sample_steps": cost["sample_steps"],
            "sample_seconds_per_1000": round(1000 * (o.clock() - start) / len(x), 2), "fid": fid_to_test(x)}


def from_diffusers(steps, small):
    """The network of Hugging Face's beginner course, unit 1, for 28 x 28 digits; steps: of the sampler.

    Assumed from that course: (32, 64, 64) channels, two blocks a level, attention in the two lower levels, Adam with
    a learning rate of 1e-3, no average of the weights. DDPMScheduler with its default values.
    """
    from diffusers import DDPMScheduler, UNet2DModel

    net = UNet2DModel(28, 1, 1, layers_per_block=1 if small else 2, block_out_channels=(32, 64, 64),
                      down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
                      up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"))
    process = DDPMScheduler()
    process.set_timesteps(steps)

    def loss(x0):
        eps, t = torch.randn_like(x0), torch.randint(len(process), (len(x0),))
        return F.mse_loss(net(process.add_noise(x0, eps, t), t).sample.float(), eps)

    def sample(n):
        x = torch.randn(n, 1, 28, 28)
        for t in process.timesteps:
            x = process.step(net(x, t).sample.float(), t, x).prev_sample
        return x
    return SimpleNamespace(net=net, optimizer=torch.optim.Adam(net.parameters(), 1e-3), loss=loss, sample=sample,
                           clip=float("inf"), average=lambda: None)


def from_denoising_diffusion_pytorch(steps, small):
    """Network, process and trainer as in the package's README, on one channel.

    Unet(dim=64, dim_mults=(1, 2, 4, 8)); Adam 8e-5 with its Trainer's betas (0.9, 0.99), gradients clipped at 1, EMA
    0.995 every 10 steps; otherwise the defaults (v prediction, sigmoid schedule, DDIM with eta 0). The README's batch
    is 32 accumulated twice, here 64 at once. Digits are padded to 32 x 32, as the network halves them three times.
    """
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    net = Unet(dim=8 if small else 64, dim_mults=(1, 2, 4, 8), channels=1, flash_attn=True)
    process = GaussianDiffusion(net, image_size=32, timesteps=1000, sampling_timesteps=steps)
    ema = EMA(process, beta=0.995, update_every=10)
    return SimpleNamespace(
        net=net, optimizer=torch.optim.Adam(net.parameters(), 8e-5, (0.9, 0.99)), clip=1.0, average=ema.update,
        loss=lambda x0: process((F.pad(x0, (2, 2, 2, 2), value=-1.0) + 1) / 2),
        sample=lambda n: ema.ema_model.eval().sample(batch_size=n)[:, :, 2:-2, 2:-2].float() * 2 - 1)


OTHERS = {"diffusers": from_diffusers, "denoising-diffusion-pytorch": from_denoising_diffusion_pytorch}


def other_rows(name, o):
    """Train another package on through all budgets and draw n samples at each. Yields rows of the table."""
    torch.manual_seed(o.seed)
    other = OTHERS[name](2 if o.smoke else 50, o.smoke)
    data, steps, seconds = digits("train", 8 if o.smoke else 64, o.seed), 0, 0.0
    cost = {"batch_size": data.batch_size, "parameters": sum(p.numel() for p in other.net.parameters()),
            "sample_steps": 2 if o.smoke else 50}
    precision = torch.autocast("cpu", torch.bfloat16, enabled=auto_precision("cpu") == "bf16")

    def draw():
        with torch.no_grad(), precision:
            return torch.cat([other.sample(min(128, o.n - i)) for i in range(0, o.n, 128)])
    def step():
        with precision:
            loss = other.loss(data.batch(steps)[0])
        other.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(other.net.parameters(), other.clip)
        other.optimizer.step()
        other.average()

    step()                                             # the warm-up: one step that is not counted
    for budget in o.budgets:
        while seconds < budget:
            start = o.clock()
            step()
            steps, seconds = steps + 1, seconds + o.clock() - start
        other.net.eval()
        yield row(o, name, cost, steps, seconds, draw)
        other.net.train()


def table(bench):
    """The numbers as text."""
    s = bench["speed"]
    lines = [f"{bench['lesson']} on {bench['device']}, {bench['precision']}",
             f"training     {s['images_per_second']:.0f} images/s, {1000 * s['seconds_per_step']:.1f} ms a step of "
             f"{s['batch_size']}, {100 * s['data_share']:.1f} % of it loading data",
             f"peak memory  {s['peak_memory_mb']} MB", "",
             "                             seconds   steps  images/s  parameters  s/1,000 samples        FID"]
    lines += ["{name:28} {seconds:7.1f} {steps:7} {images_per_second:9.1f} {parameters:11,} "
              "{sample_seconds_per_1000:8.1f} ({sample_steps} steps) {fid:8.2f}".format(**r) for r in bench["rows"]]
    return "\n".join([*lines, f"FID of n = {bench['n']} samples; floor at this n {bench['floor']:.3f}"])


def plot(bench, path):
    """FID over seconds of training, one line for each name, the floor dotted."""
    fig, ax = figure(width=6.0, height=3.8)
    for name in dict.fromkeys(r["name"] for r in bench["rows"]):
        ax.plot(*zip(*((r["seconds"], r["fid"]) for r in bench["rows"] if r["name"] == name)), marker="o", label=name)
    ax.axhline(bench["floor"], color="grey", ls=":", lw=1, label="floor")
    ax.set(xscale="log", yscale="log", xlabel=f"seconds of training, {bench['device']}", ylabel=f"FID, n={bench['n']}")
    ax.legend(fontsize=8)
    return save_figure(fig, path)


def parse(argv):
    """The options of the command line, with the lesson's name and folder."""
    lessons, given = [a.rstrip("/") for a in argv if "=" not in a], {}
    lesson = re.sub(r"^(lesson_\d+)([a-z])$", r"\1/sublesson_\2", " ".join(lessons))
    if not lesson or not (ROOT / lesson / "train.py").is_file():
        raise UserError(f"name one lesson that has a train.py, such as lesson_05, not {lesson or 'none'}")
    for key, _, text in (a.partition("=") for a in argv if "=" in a):
        if key not in OPTIONS:
            raise UserError(f"unknown key {key}: the keys are {', '.join(OPTIONS)}")
        given[key] = text if isinstance(OPTIONS[key], str) else config.parse(text, f"{key}={text}")
        if type(given[key]) is not type(OPTIONS[key]) or key in LEAST and given[key] < LEAST[key]:
            raise UserError(f"{key}={text}: write " + (f"{LEAST[key]} or more" if key in LEAST else "true or false"))
    options = OPTIONS | (SMOKE if given.get("smoke") else {}) | given
    budgets = config.parse(f"[{options['budgets']}]", "budgets")
    if not budgets or not all(type(budget) in (int, float) and 0 < budget < 1e9 for budget in budgets):
        raise UserError(f"budgets={options['budgets']}: write seconds with commas between, such as 60,120,300")
    against = [name for name in options["against"].split(",") if name]
    for name in against:
        if name not in OTHERS or not util.find_spec(name.replace("-", "_")):
            raise UserError(f"against={name}: takes {','.join(OTHERS)}; pip install -e '.[reference]' installs them")
    options |= {"budgets": sorted(budgets), "against": against, "publish": options["publish"] and not options["smoke"]}
    clock = lambda: time.process_time() / options["threads"]
    return SimpleNamespace(lesson=lesson, folder=ROOT / lesson, clock=clock, **options)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        return print(__doc__)
    o = parse(argv)
    if o.scaling:
        argv = ["device=cpu", f"seed={o.seed}", f"steps={4 * o.speed_steps}", *["smoke=true"] * o.smoke]
        return print(scaling.table(scaling.measure(o.folder, argv)))
    torch.set_num_threads(o.threads)
    sys.path.insert(0, str(o.folder))                  # as `python train.py` does
    train, sample = import_module("train"), import_module("sample")
    out = o.folder / o.runs
    bench = {"lesson": o.lesson, "command": " ".join(["python -m tools.bench", *argv]), "seed": o.seed,
             "device": device_name(), "precision": auto_precision("cpu"), "torch": torch.__version__,
             "code": code_hash(o.folder), "n": o.n, "floor": floor(o.n),
             "against": {name: metadata.version(name) for name in o.against}, "rows": []}
    with TemporaryDirectory() as runs:
        bench["speed"] = speed(train, o, runs)
        others = (other_rows(name, o) for name in o.against)
        for new in chain(lesson_rows(train, sample, o, runs, bench["speed"]), *others):
            bench["rows"].append(new)
            write_json(out / "bench.json", bench)      # after every row: a long benchmark may be stopped
            print("{name}: FID {fid:.2f} after {seconds:.1f} s of training".format(**new), flush=True)
    plot(bench, out / "bench.png")
    print(f"\n{table(bench)}\nwrote bench.json and bench.png in {out}" + " and in results/" * o.publish)
    for name in ("bench.json", "bench.png") * o.publish:
        shutil.copy(out / name, o.folder / "results")
    return bench


if __name__ == "__main__":
    cli(main)
