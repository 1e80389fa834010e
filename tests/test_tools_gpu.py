"""tools/gpu_budget.py: what it counts, and that every lesson's `gpu` overlay is worth its minutes of a T4."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from conftest import ROOT
from tools import gpu_budget
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
