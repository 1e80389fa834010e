"""Images a second of a training on one core, two threads and two processes, alone and beside a process that computes.

Called by `python -m tools.bench lesson_05 scaling=true`.
"""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

WAYS = {"1 thread": ["processes=1", "threads=1"], "2 threads": ["processes=1", "threads=2"],
        "2 processes of 1 thread": ["processes=2"]}
BUSY = "import torch; torch.set_num_threads(1); a = torch.randn(512, 512)\nwhile True: a @ a"


def images_per_second(folder, argv):
    """Of one training, in processes of its own."""
    with TemporaryDirectory() as runs:
        command = [sys.executable, folder / "train.py", "preview_every=0", "save_every=0", f"runs={runs}", *argv]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        results = next(Path(runs).glob("**/results.json")).read_text(encoding="utf-8")
    return json.loads(results)["train"]["images_per_second"]


def measure(folder, argv=()):
    """{way: {"idle": images a second, "busy": beside a process that keeps one core busy}}."""
    found = {name: {"idle": images_per_second(folder, [*argv, *way])} for name, way in WAYS.items()}
    busy = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        for name, way in WAYS.items():
            found[name]["busy"] = images_per_second(folder, [*argv, *way])
    finally:
        busy.kill()
        busy.wait()
    return found


def table(found):
    """The numbers as text."""
    return "\n".join([f"{'images a second':28} {'idle':>8} {'one core busy':>14}"] + [
        f"{name:28} {row['idle']:8} {row['busy']:14}" for name, row in found.items()])
