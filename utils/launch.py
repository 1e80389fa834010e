"""Several processes of one thread each: how `python train.py` uses the cores of a CPU.

The threads of one process wait for each other after every layer, processes only once a step, when they average their
gradients. So a training that is started from the command line on a CPU and asked for `processes` starts partners of
its own process, with the same command; what torchrun or `accelerate launch` has started, and a notebook that calls
`main`, stay as they are.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from .errors import UserError
from .parallel import cores

_commanded = None                                      # the script that this process was started for, by `cli`
_partners = []                                         # (process, file with what it says)


def command(file):
    """Say that this process was started for this script, from the command line."""
    global _commanded
    _commanded = Path(file).resolve()


def number(file, settings, before=None):
    """How many processes this training should have.

    settings: those of train.py, of which `processes` decides if it is a number. auto: two, where a CPU has the cores
    and the batch can be halved. before: of the run that goes on, how many it had.
    """
    asked, own = settings.processes, Path(file).resolve() == _commanded
    if "WORLD_SIZE" in os.environ or settings.device == "cpu" and asked == 1:
        return 1
    if settings.device != "cpu" and (torch.cuda.is_available() or torch.backends.mps.is_available()):
        if asked not in ("auto", 1):
            raise UserError(f"processes={asked} is for a CPU: start with `torchrun --nproc_per_node {asked} train.py` "
                            "to use several GPUs, or leave processes out")
        return 1
    if asked != "auto":
        if asked > 1 and not own:
            raise UserError(f"processes={asked} works from the command line only: python train.py processes={asked}")
        if settings.batch_size % asked:
            raise UserError(f"batch_size={settings.batch_size} must be a multiple of processes={asked}")
        return asked
    if before:
        return before if own else 1
    few = settings.smoke or settings.threads or cores() < 2 or settings.batch_size % 2
    return 1 if few or not own or not torch.distributed.is_gloo_available() else 2


def start(many):
    """Start the others of `many` processes with the command of this one, which becomes the first of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(many),
              "LOCAL_WORLD_SIZE": str(many), "OMP_NUM_THREADS": "1"}
    for rank in range(1, many):
        said = tempfile.TemporaryFile()
        _partners.append((subprocess.Popen(
            [sys.executable, str(_commanded), *sys.argv[1:]], stdout=subprocess.DEVNULL, stderr=said,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}), said))
    os.environ.update(shared, RANK="0", LOCAL_RANK="0")
    torch.set_num_threads(1)


def started():
    """Whether this process has started partners."""
    return bool(_partners)


def lost(wait=5.0):
    """Why a training cannot go on whose partner is gone; None while all are there."""
    for process, said in _partners:
        try:
            code = process.wait(wait)
        except subprocess.TimeoutExpired:
            continue
        if code:
            said.seek(0)
            lines = said.read().decode(errors="replace").split("\n")
            last = ([line for line in lines if line.strip()] or ["no more is known"])[-1]
            if last.startswith("error: "):             # its own clear line
                return last.removeprefix("error: ")
            how = f"was ended by {signal.Signals(-code).name}, perhaps for want of memory" if code < 0 else last
            return (f"another process of this training {how}: go on with `python {_commanded.name} --resume`, or "
                    "train in a single process with processes=1")
    return None


def close(wait=0.0):
    """End the partners; those that are about to end by themselves get `wait` seconds for it."""
    for process, said in _partners:
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        said.close()
    _partners.clear()
