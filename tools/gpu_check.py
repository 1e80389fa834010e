"""How fast every lesson trains and samples on this machine's NVIDIA GPU, all of them in ten minutes.

    python -m tools.gpu_check                     all ready lessons
    python -m tools.gpu_check lesson_05 05c       these lessons
    python -m tools.gpu_check minutes=20          in this time altogether

Each lesson trains for some seconds with the section `gpu` of its config.yaml, in a process of its own, and draws digits
from what it has learned. Measured are images a second, the memory, the loss of the first and the last steps, and the
seconds for 2,048 samples, or for as many as there is time for. Everything must lie on the GPU and the loss must be
finite. A lesson that fails or takes too long is a line of the table, the others go on, and the exit code is 1.

The numbers go to tools/gpu.json, from which `python -m tools.frontpage` makes the table of the front page; those of
another GPU, and of lessons that were not asked for, stay. More keys: out=FILE instead, smoke=true (tiny sizes).
"""

import math
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tools import frontpage
from tools.gpu_budget import QUICKER, chosen
from utils import Run, UserError, cli, config, read_json, write_json
from utils.device import device_name
from utils.files import ROOT

OPTIONS = {"minutes": 10.0, "out": str(ROOT / frontpage.GPU), "smoke": False}
CHILD = {"measure": "", "until": 0.0}                  # what it tells the process of a lesson; until: time.time()
WARM, LEAST = 5, 5                                     # steps that are not timed, steps that are at least
FEW, MANY = 64, (2048, 1024, 512, 256)                 # samples: of the first drawing, of the second


# ------------------------------------------------------------------ one lesson, in its own process
class Watched(Run):
    """A run that is timed, ends when its time is over, and looks where everything lies.

    until: the moment (time.monotonic) at which training ends. minutes, steps_timed: of what.
    """

    until, newest = math.inf, None

    def __init__(self, file, argv=None):
        super().__init__(file, argv)
        Watched.newest = self
        self.seen, self.losses, self.total, self.stamps, self.peak = [], [], 0.0, [], 0

    def prepare(self, *objects):
        self.seen += objects
        return super().prepare(*objects)

    def steps(self, data, until=None):
        """As ever, but a loop takes at most half of the time that is left for training."""
        first, end = self.step, self.settings.steps if until is None else until
        stop, done, start = (time.monotonic() + min(self.until, 1e9)) / 2, 0, None
        loop = super().steps(data, until)
        self.losses.append([])
        for step, batch in loop:
            self.on_device(batch)
            yield step, batch
            done += 1
            if start is None and done == min(WARM, (end - first + 1) // 2):
                start, timed = self.clock(), done
            if time.monotonic() > stop and done >= WARM + LEAST:
                break
        if done:
            self.total += (self.clock() - start) / max(done - timed, 1) * (end - first)
        if done < end - first:
            loop.close()
            self._log.flush(self._elapsed())
            self.step, self.seconds = end, self._elapsed()

    def log(self, **values):
        super().log(**values)
        self.losses[-1].append(values["loss"].detach())

    def clock(self):
        self.stamps.append(super().clock())
        return self.stamps[-1]

    def finish(self, ema, **networks):
        for item in [*self.seen, ema.module]:
            if isinstance(item, torch.nn.Module):
                self.on_device([*item.parameters(), *item.buffers()])
            else:
                self.on_device(value for state in item.state.values() for value in state.values()
                               if torch.is_tensor(value) and value.dim())
        self.peak = torch.cuda.max_memory_allocated(self.device)
        return super().finish(ema, **networks)

    def on_device(self, tensors):
        """RuntimeError if one of them is not on the GPU."""
        for one in tensors:
            if one.device.type != "cuda":
                raise RuntimeError(f"a tensor of shape {tuple(one.shape)} is on the {one.device}, not on the GPU")


def measure(lesson, seconds, smoke=False):
    """One row of the table: a dict. lesson: its entry in lessons.yaml; seconds: that are left for it."""
    begin, folder = time.monotonic(), ROOT / lesson["folder"]
    sys.path.insert(0, str(folder))                    # as `python train.py` does
    train, sample = import_module("train"), import_module("sample")
    train.Run = sample.Run = Watched
    Watched.until = begin + 0.6 * seconds
    laid = ["gpu=true", "device=cuda", *["smoke=true"] * smoke]
    cfg = config.load(folder / "config.yaml", "train", laid).train
    with TemporaryDirectory() as runs:
        keys = [*laid, f"runs={runs}"]
        quiet = [f"{key}=0" for key in cfg.keys() if key.endswith("_every") and key != "log_every"]
        early = ["warmup=10"] if hasattr(cfg, "warmup") and not smoke else []       # or nothing moves in this time
        own = [f"{key}={value}" for key, value in QUICKER.get(lesson["number"], {}).items()]
        trained = train.main([*keys, "log_every=10", *quiet, *early, *own])
        run, losses = Watched.newest, torch.stack(Watched.newest.losses[0]).float().tolist()
        row = {"lesson": lesson["number"], "device": device_name(run.device), "precision": run.precision,
               "images_per_second": round(cfg.steps * cfg.batch_size / run.total, 1), "minutes": run.total / 60,
               "memory_gb": run.peak / 1e9, "loss": [sum(part) / len(part) for part in (losses[:5], losses[-5:])]}

        def draw(n):
            sample.main([*keys, f"weights={trained.weights}", f"n={n}"])
            first, last = Watched.newest.stamps[:2]
            return {"samples": n, "sample_seconds": last - first}

        row |= draw(FEW if not smoke else 4)
        if not smoke:                                  # the first drawing also looked for the fastest kernels
            left, each = begin + 0.9 * seconds - time.monotonic(), row["sample_seconds"] / FEW
            row |= next((draw(n) for n in MANY if n * each < left), {})
    return row


# ------------------------------------------------------------------ all of them
def start(lesson, seconds, smoke=False):
    """`measure` in a process of its own, which ends in this time whatever happens. The row; of a failure with why."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        command = [sys.executable, "-m", "tools.gpu_check", f"measure={lesson['number']}", f"out={out}",
                   f"until={time.time() + seconds}", f"smoke={str(smoke).lower()}"]
        try:
            process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"lesson": lesson["number"], "error": f"not done after {seconds:.0f} s"}
        if process.returncode == 0 and out.exists():
            return read_json(out)
        last = ([line for line in process.stderr.splitlines() if line.strip()] or ["no message"])[-1]
        return {"lesson": lesson["number"], "error": f"failed: {last.removeprefix('error: ')[:150]}"}


def options(argv):
    """(names of lessons, the other arguments by name)."""
    known, given = OPTIONS | CHILD, {}
    for argument in (a for a in argv if "=" in a):
        key, _, text = argument.partition("=")
        if key not in known:
            raise UserError(f"unknown key {key}: the keys are {', '.join(OPTIONS)}")
        value = text if isinstance(known[key], str) else config.parse(text, argument)
        if type(known[key]) is float and type(value) in (int, float) and 0 < value < 1e12:
            value = float(value)
        if type(value) is not type(known[key]):
            raise UserError(f"{argument}: write " + ("true or false" if known[key] is False else "a number above 0"))
        given[key] = value
    return [a for a in argv if "=" not in a], known | given


def keep(path, row):
    """Put a row where the others of its GPU are, in place of the lesson's old one."""
    measured = read_json(path) or {}
    device = measured.setdefault(row["device"], {"rows": []})
    rows = {one["lesson"]: one for one in device["rows"]}
    rows[row["lesson"]] = {key: value for key, value in row.items() if key != "device"}
    device |= {"torch": torch.__version__, "rows": [rows[name] for name in sorted(rows, key=frontpage.number_key)]}
    write_json(path, measured)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        return print(__doc__)
    names, o = options(argv)
    if not torch.cuda.is_available():
        raise UserError("tools.gpu_check measures on an NVIDIA GPU, and no CUDA device was found")
    if o["measure"]:
        lesson, = chosen([o["measure"]])
        return write_json(Path(o["out"]), measure(lesson, o["until"] - time.time(), o["smoke"]))
    lessons, end, device = chosen(names), time.monotonic() + 60 * o["minutes"], device_name("cuda")
    print(f"{len(lessons)} lessons on one {device}, in {o['minutes']:g} minutes", flush=True)
    rows = []
    for i, lesson in enumerate(lessons):
        rows.append({"device": device} | start(lesson, max(1, end - time.monotonic()) / (len(lessons) - i), o["smoke"]))
        keep(Path(o["out"]), rows[-1])                 # at once: it may be stopped
        print(*frontpage.gpu_cells(rows[-1]), sep=", ", flush=True)
    failed = [row["lesson"] for row in rows if "error" in row]
    flat = [row["lesson"] for row in rows if "error" not in row and not row["loss"][1] < row["loss"][0]]
    print(f"\n{frontpage.gpu_rows(rows)}\n\nwrote {o['out']}; `python -m tools.frontpage` shows it on the front page")
    if flat:
        print(f"the loss of {', '.join(flat)} did not fall in this time")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)
    return rows


if __name__ == "__main__":
    cli(main)
