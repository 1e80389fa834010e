"""Lesson 23: what its claim counts, and what decides its verdicts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import ROOT, load
from utils import Rows
from utils.claims import saved

model, reproduce = load("lesson_23", "model"), load("lesson_23", "reproduce")
DiT, KINDS = model.DiT, model.KINDS


def times(*values):
    return torch.tensor(values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim, depth, patch", [(16, 2, 4), (32, 3, 7)])
def test_gflops_are_those_of_torchs_counter(kind, dim, depth, patch):
    net = DiT(dim, depth, 2, patch, kind)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, 1, 28, 28), times(1), times(2))
    expected = reproduce.gflops(dim, depth, patch, kind)
    assert counter.get_total_flops() / 2e9 == pytest.approx(expected, rel=1e-9)           # it counts both operations


@pytest.mark.parametrize("dim, depth, expected", [
    (384, 12, (0.36, 1.41, 6.06)), (768, 12, (1.42, 5.56, 23.01)), (1024, 24, (5.01, 19.70, 80.71)),
    (1152, 28, (7.39, 29.05, 118.64))])
def test_gflops_of_the_papers_sizes(dim, depth, expected):
    # S, B, L and XL with patches of 8, 4 and 2 on 32 x 32 x 4 latents, reported as: a multiply-add counts as one.
    gflops = reproduce.gflops
    found = [gflops(dim, depth, patch, side=32, channels=4) for patch in (8, 4, 2)]
    assert found == pytest.approx(expected, abs=0.006, rel=5e-4)


def test_spearman():
    spearman = reproduce.spearman
    assert spearman([1.0, 2.0, 3.0, 4.0], [9.0, 7.0, 5.0, 1.0]) == pytest.approx(-1)
    x, y = [0.3, 5.0, 1.0, 2.0, 4.0], [3.0, 1.0, 2.0, 9.0, 5.0]                           # ranks 0 4 1 2 3, 2 0 1 4 3
    assert spearman(x, y) == pytest.approx(1 - 6 * (4 + 16 + 0 + 4 + 0) / (5 * 24))


@pytest.mark.parametrize("fids, holds", [
    ([(1, 1.1, 1.2), (2, 2.1, 2.2), (3, 3.1, 3.2), (4, 4.1, 4.2)], True),
    ([(1, 1.1, 1.2), (3, 3.1, 3.2), (2, 2.1, 2.2), (4, 4.1, 4.2)], False),                # another order
    ([(1, 1.1, 1.2), (2, 2.1, 2.2), (2.2, 2.0, 2.3), (4, 4.1, 4.2)], False),              # not in one seed
    ([(1, 1.1, 1.2), (2, 2.1, 2.2), (2.01, 2.9, 2.25), (4, 4.1, 4.2)], False)])           # by chance, perhaps
def test_kinds_are_judged_as_the_sentence_says(fids, holds):
    rows = Rows([{"arm": kind, "seed": seed, "fid": fid} for kind, of_kind in zip(KINDS, fids)
                 for seed, fid in enumerate(of_kind)], ("arm", "seed"))
    assert reproduce.ordered(rows) == holds


def test_arms_are_of_the_size_that_their_name_says():
    assert reproduce.of_size("7/96") == ["dit.patch=7", "dit.dim=96"]


def test_published_claim_can_be_judged_and_drawn_again(tmp_path):
    claim = saved(ROOT / "lesson_23" / "results" / "claim.json")
    sizes = Rows([row for row in claim.rows if row.get("arm") in claim.cfg.sizes], ("arm", "seed"))
    rank = [reproduce.spearman([row["gflops"] for row in rows], [row["fid"] for row in rows])
            for rows in (sizes.where(seed=seed) for seed in claim.seeds)]
    assert rank == pytest.approx(claim.claims["a"]["spearman"]) and len(sizes) == 3 * len(claim.cfg.sizes)
    assert reproduce.ordered(claim.rows) == claim.claims["b"]["holds"]
    assert claim.rows.below("published", reproduce.LONG, "fid", by="net") == claim.claims["c"]["holds"]
    assert reproduce.plot(claim, tmp_path / "claim.png").stat().st_size > 5_000
