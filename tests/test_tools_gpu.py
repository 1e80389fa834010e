"""tools/gpu_budget.py, and every lesson's `gpu` overlay by it; tools/gpu_check.py on a GPU that is not there.

FAKEGPU=all lets the second measure every lesson, instead of two.
"""

import json
import math
import os
import re
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from conftest import ROOT, load
from fakegpu import FakeGPU
from tools import gpu_budget, gpu_check
from tools.gpu_budget import RATE, START, TRAFFIC, Autocast, Numberless, Phase, Work
from utils import UserError, config


def counted(do, rate=1e12):
    """The phase of what a function does with tensors on "meta"."""
    work = Work(rate)
    with Numberless(), work:
        do()
    phase, = work.phases
    return phase


def meta(*shape, **kind):
    return torch.empty(*shape, device="meta", **kind)


# ------------------------------------------------------------------ what is counted
def test_what_is_computed():
    """As the library counts it, forward and backward, also when the second of two equal calls is remembered."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.SiLU(), torch.nn.Conv2d(8, 8, 3), torch.nn.Flatten(),
                              torch.nn.Linear(8 * 24 * 24, 5)).to("meta")

    def step():
        net(meta(2, 3, 28, 28)).sum().backward()

    with FlopCounterMode(display=False) as library:
        step()
    once, twice = counted(step), counted(lambda: (step(), step()))
    assert once.flops == library.get_total_flops() > 0 and twice.flops == 2 * once.flops
    assert counted(lambda: meta(7, 3) @ meta(3, 5)).flops == 2 * 7 * 3 * 5
    q = meta(2, 4, 196, 64)
    assert counted(lambda: F.scaled_dot_product_attention(q, q, q)).flops == 2 * (2 * 2 * 4 * 196 * 196 * 64)


def test_what_is_moved():
    """Tensors that are read or written, in their types; views are free; the longer of computing and moving counts."""
    x, half = meta(10, 1000), meta(10, 1000, dtype=torch.float16)
    for _ in range(2):                                 # the second is remembered
        assert counted(lambda: x + 1).seconds == pytest.approx(2 * 40_000 / TRAFFIC)
        assert counted(lambda: x * half).seconds == pytest.approx(100_000 / TRAFFIC)
        assert counted(lambda: half.mul_(2)).seconds == pytest.approx(2 * 20_000 / TRAFFIC)
    assert counted(lambda: x.view(100, 100).T[3:]) == Phase()
    product = counted(lambda: meta(10, 1000) @ meta(1000, 10), rate=1e6)
    assert product.seconds == pytest.approx(2e5 / 1e6) and product.kernels == 1
    assert Phase(times=3, seconds=0.5, kernels=7).total() == 1.5
    assert Phase(times=3, seconds=0.5, kernels=70_000).total() == pytest.approx(3 * 70_000 * START)


def test_autocasts_types():
    x, weight = meta(2, 8, 8, 8, requires_grad=True), meta(8, 8, 3, 3)
    with Autocast():
        assert F.conv2d(x, weight).dtype == torch.float16
        assert torch.nn.GroupNorm(2, 8).to("meta")(x.half()).dtype == torch.float32
        assert (x.half() * 2).dtype == torch.float16 and torch.softmax(x.half(), 1).dtype == torch.float32
        assert (x @ x).dtype == torch.float16 and torch.exp(x.double()).dtype == torch.float64


# ------------------------------------------------------------------ the lessons
def test_every_overlay_keeps_its_budget():
    """At most 20 minutes and 12 GB by this estimate, which the comment repeats; more images than on the CPU."""
    for row in gpu_budget.rows():
        path = ROOT / row["lesson"] / "config.yaml"
        said = re.search(r"about (\d+) minutes? on a T4 \(an estimate by tools/gpu_budget\.py, not measured\)",
                         re.sub(r"\s*\n\s*# ", " ", path.read_text(encoding="utf-8")))
        assert row["minutes"] <= gpu_budget.MINUTES and row["memory"] <= gpu_budget.MEMORY, row
        assert said and abs(int(said[1]) - row["minutes"]) < 1, (row, said)
        cpu = config.load(path, "train").train
        assert row["steps"] * row["batch"] > 1.5 * cpu.steps * cpu.batch_size, row
        assert row["gflop"] > 0 and row["parameters"] > 5e5, row


def test_all_loops_and_what_stands_between_them():
    """Two loops of half the steps cost what one costs, and the pairs that lesson 21 makes between them."""
    def minutes(*keys):
        row, = gpu_budget.rows(["21", "steps=200", "unet.channels=32", "unet.blocks=1", "pair_steps=[1, 1]", *keys])
        return row["minutes"]

    alone = minutes("stages=[1, 0, 0]")
    both, more = (minutes("stages=[0.5, 0.5, 0]", f"pairs={pairs}") for pairs in (10_000, 30_000))
    assert (more - both) / 2 == pytest.approx(both - alone, rel=1e-6) and both - alone > 0.01


def test_fp32_is_slower():
    half, full = (next(gpu_budget.rows(["05", f"precision={kind}"])) for kind in ("auto", "fp32"))
    assert half["precision"] == "fp16" and full["ms"] > 1.5 * half["ms"] and RATE["fp32"] < RATE["fp16"]


def test_names_and_the_table(capsys):
    gpu_budget.main(["lesson_01/"])
    out = capsys.readouterr().out
    assert "Estimates for a T4, not measured" in out and out.count("lesson_01") == 1 and "667,408" in out
    for name in ("lesson_98", "lesson_08"):
        with pytest.raises(UserError, match=f"{name} is no ready lesson"):
            next(gpu_budget.rows([name]))


# ------------------------------------------------------------------ tools/gpu_check.py
READY = [lesson["number"] for lesson in gpu_budget.chosen([])]


@pytest.mark.parametrize("number", READY if os.environ.get("FAKEGPU") == "all" else ["07", "34"])
def test_a_lesson_is_measured(launch, tmp_path, number):
    """In its own process, in smoke size; of lesson 34 both loops."""
    process = launch("tools/gpu_check.py", f"measure={number}", f"until={time.time() + 99}", "smoke=true",
                     f"out={tmp_path / 'row.json'}", before=f"import sys; sys.path.append({str(ROOT / 'tests')!r}); "
                     "import fakegpu; fakegpu.install(); fakegpu.cheap()")
    assert process.wait() == 0, process.err
    row = json.loads((tmp_path / "row.json").read_text())
    assert row["lesson"] == number and row["device"] == "Tesla T4"
    assert row["precision"] == ("fp32" if number == "01" else "fp16")
    assert row["images_per_second"] > 0 < row["minutes"] and all(map(math.isfinite, row["loss"]))
    assert len(row["loss"]) == 2 and row["samples"] == 4 and row["sample_seconds"] > 0


def test_what_lies_elsewhere_is_found():
    with FakeGPU():
        gpu_check.Watched.on_device(None, [torch.zeros(2, device="cuda")])
        with pytest.raises(RuntimeError, match=r"shape \(2, 3\) is on the cpu"):
            gpu_check.Watched.on_device(None, [torch.zeros(1, device="cuda"), torch.zeros(2, 3)])


def test_a_loop_ends_with_its_time(tmp_path, monkeypatch):
    """And the run as if it were done; here on a CPU."""
    monkeypatch.setattr(gpu_check.Watched, "on_device", lambda self, tensors: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
    monkeypatch.setattr(gpu_check.Watched, "until", 0)
    train = load("lesson_05", "train")
    monkeypatch.setattr(train, "Run", gpu_check.Watched)
    result = train.main(["gpu=false", "device=cpu", "smoke=true", "steps=1000", "threads=1", f"runs={tmp_path}"])
    run = gpu_check.Watched.newest
    assert len(run.losses[0]) == gpu_check.WARM + gpu_check.LEAST and result.weights.exists()
    assert run.total > 0 and run.stamps[-1] - run.stamps[0] < run.total / 10     # of a thousand steps


@pytest.fixture
def faked(monkeypatch, tmp_path):
    """A CUDA device by its name, and rows that the processes of lessons would have brought."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "device_name", lambda device: "Tesla T4")
    asked = []

    def start(lesson, seconds, smoke):
        asked.append(seconds)
        if lesson["number"] == "05a":
            return {"lesson": "05a", "error": "failed: so it is"}
        return {"lesson": lesson["number"], "precision": "fp16", "images_per_second": 900.0, "minutes": 16.0,
                "memory_gb": 2.4, "loss": [1.0, 1.5 if lesson["number"] == "05b" else 0.1], "samples": 512,
                "sample_seconds": 5.0}

    monkeypatch.setattr(gpu_check, "start", start)
    return asked


def test_all_lessons_share_the_time_and_a_failure_stops_none(faked, tmp_path, capsys):
    out = tmp_path / "gpu.json"
    with pytest.raises(SystemExit) as stop:
        gpu_check.main(["05", "lesson_05/sublesson_a", "05b", "minutes=3", f"out={out}"])
    assert stop.value.code == 1 and faked == pytest.approx([60, 90, 180], rel=1e-2)        # nothing takes time here
    said = capsys.readouterr()
    assert "failed: 05a" in said.err and "the loss of 05b did not fall" in said.out
    assert "| 05 | fp16 | 900 | 16 | 2.4 GB | 1 to 0.1 | about 20 |" in said.out and "05a, failed: so it is" in said.out
    first = json.loads(out.read_text())
    assert [row["lesson"] for row in first["Tesla T4"]["rows"]] == ["05", "05a", "05b"]
    out.write_text(json.dumps(first | {"NVIDIA L4": {"torch": "2.1", "rows": []}}))
    assert len(gpu_check.main(["lesson_02", f"out={out}"])) == 1                           # what was there stays
    both = json.loads(out.read_text())
    assert [row["lesson"] for row in both["Tesla T4"]["rows"]] == ["02", "05", "05a", "05b"] and "NVIDIA L4" in both


def test_a_lesson_that_breaks_or_hangs(launch, monkeypatch):
    """Here there is no GPU, which is how its process breaks. That process has torch already."""
    lesson, = gpu_budget.chosen(["05"])
    assert gpu_check.start(lesson, 0.01, True) == {"lesson": "05", "error": "not done after 0 s"}

    def run(command, cwd, timeout, **_):
        assert command[:3] == [sys.executable, "-m", "tools.gpu_check"] and cwd == ROOT and timeout == 60
        process = launch("tools/gpu_check.py", *command[3:])
        return SimpleNamespace(returncode=process.wait(), stderr=process.err)

    monkeypatch.setattr(gpu_check, "subprocess", SimpleNamespace(run=run))
    assert gpu_check.start(lesson, 60, True) == {
        "lesson": "05", "error": "failed: tools.gpu_check measures on an NVIDIA GPU, and no CUDA device was found"}


@pytest.mark.parametrize("argv, message", [
    ([], "no CUDA device was found"), (["minute=5"], "unknown key minute: the keys are minutes, out, smoke"),
    (["minutes=0"], "minutes=0: write a number above 0"), (["smoke=1"], "smoke=1: write true or false"),
])
def test_one_line(argv, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        gpu_check.main(argv)
