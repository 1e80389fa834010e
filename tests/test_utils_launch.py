"""Two processes of one thread each: when a training starts them, and what a reader sees when one is gone."""

import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from conftest import ROOT
from utils import UserError, launch

TRAIN = ROOT / "lesson_05" / "train.py"


@pytest.fixture
def number(monkeypatch):
    """number(before=None, **settings): how many processes a training of so many cores starts."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(launch, "_commanded", TRAIN)

    def ask(before=None, cores=8, file=TRAIN, **settings):
        monkeypatch.setattr(launch, "cores", lambda: cores)
        usual = {"processes": "auto", "device": "auto", "batch_size": 96, "smoke": False, "threads": 0}
        return launch.number(file, SimpleNamespace(**(usual | settings)), before)

    return ask


def test_two_processes_where_the_command_line_a_cpu_and_the_batch_allow_them(number, monkeypatch):
    assert number() == 2 and number(cores=2) == 2      # not more on a larger machine: the numbers would be others
    assert number(cores=1) == number(batch_size=95) == number(smoke=True) == number(threads=4) == 1
    assert number(processes=1) == 1 and number(processes=4, smoke=True) == 4
    assert number(before=1) == 1 and number(before=4) == 4 and number(before=4, processes=2) == 2
    monkeypatch.setenv("WORLD_SIZE", "2")              # torchrun has started this one
    assert number() == number(processes=4) == 1


def test_a_notebook_stays_one_process(number, monkeypatch):
    monkeypatch.setattr(launch, "_commanded", None)
    assert number() == number(before=2) == 1
    with pytest.raises(UserError, match="from the command line only: python train.py processes=2"):
        number(processes=2)
    monkeypatch.setattr(launch, "_commanded", ROOT / "lesson_05" / "reproduce.py")                 # and so does an arm
    assert number() == 1


def test_processes_that_cannot_be(number, monkeypatch):
    with pytest.raises(UserError, match="batch_size=96 must be a multiple of processes=5"):
        number(processes=5)
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: False)
    assert number() == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert number() == 1 and number(device="cpu", processes=4) == 4
    with pytest.raises(UserError, match="torchrun --nproc_per_node 2 train.py"):
        number(processes=2)


def test_a_lost_partner_is_one_line(launch, tmp_path):
    runs = tmp_path / "runs"
    run = launch("lesson_05/train.py", "smoke=true", "processes=2", "steps=100000", "batch_size=2", f"runs={runs}",
                 "preview_every=0", "save_every=2", "log_every=2", "device=cpu")
    deadline = time.monotonic() + 300
    while not list(runs.glob("smoke/001/last.pt")):
        assert time.monotonic() < deadline and psutil.pid_exists(run.pid), run.err
        time.sleep(0.05)
    (partner,) = psutil.Process(run.pid).children()
    partner.kill()
    line = run.error()
    assert "another process of this training was ended by SIGKILL" in line and "processes=1" in line
    assert "`python train.py --resume`" in line
    assert run.out.count("training lesson_05") == 1 and not partner.is_running()
