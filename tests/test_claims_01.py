"""Lesson 01: what decides its claims; and the published claim, drawn again."""

import math

import pytest
import torch

from conftest import ROOT, load
from utils import Rows, saved

reproduce = load("lesson_01", "reproduce")
Diffusion = load("lesson_01", "model").Diffusion


def test_the_closed_form_is_exact():
    assert reproduce.recursion_error(Diffusion()) < 1e-12                        # a thousand steps, rounding only
    assert reproduce.recursion_error(Diffusion(50, 1e-4, 0.3)) < 1e-12


def test_a_wrong_closed_form_is_not_exact():
    right, wrong = Diffusion(20, 1e-2, 0.2), Diffusion(20, 1e-2, 0.2)
    wrong.abar[:-1] *= 1 + 1e-9                                                  # in the closed form only:
    wrong.beta = right.beta                                                      # the chain keeps the right betas
    assert reproduce.recursion_error(right) < 1e-12 and reproduce.recursion_error(wrong) > 2e-10
    wrong.abar[:-1] = right.abar[:-1].sqrt()
    assert reproduce.recursion_error(wrong) > 0.01


def test_drawn_points_tell_a_wrong_formula_too():
    right, wrong = Diffusion(20, 1e-2, 0.2), Diffusion(20, 1e-2, 0.2)
    wrong.abar[:-1] = wrong.abar[:-1].sqrt()
    wrong.beta = right.beta
    worst = [max(max(abs(row["mean_z"]), abs(row["variance_z"])) for row in reproduce.noised(one, 10_000, 0))
             for one in (right, wrong)]
    assert worst[0] < 4 and worst[1] > 10


def test_the_comparison_at_3_94_is_the_error_of_the_random_numbers():
    # Third seed, one step: x_0 is the same for all points, so the variance is beta_0 times that of eps.
    rows = reproduce.noised(Diffusion(2), 100_000, seed=2)
    eps = torch.randn(100_000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    drawn = (eps.var().item() - 1) / math.sqrt(2 / 99_999)
    assert rows[0]["variance_z"] == pytest.approx(drawn, abs=1e-6) == pytest.approx(-3.94, abs=0.01)


def shares(five=0.89, hundred=0.807, many=0.799):
    """The large cloud's share by steps and seed."""
    return Rows([{"steps": steps, "seed": seed, "share": share + 0.001 * seed} for seed in range(3)
                 for steps, share in ((5, five), (20, 0.83), (100, hundred), (500, many))])


@pytest.mark.parametrize("change, suffice, miss", [
    ({}, True, True), ({"five": 0.71}, True, True),                              # a miss on either side
    ({"many": 0.776}, False, True), ({"hundred": 0.819}, False, True),           # one seed of these is off by 0.021
    ({"five": 0.817}, True, False), ({"five": 0.829, "hundred": 0.84}, False, False),
])
def test_small_steps_are_judged_in_every_seed(change, suffice, miss):
    rows = shares(**change)
    assert (reproduce.many_steps_suffice(rows), reproduce.few_steps_miss(rows)) == (suffice, miss)


def test_no_long_walk_is_no_proof():
    assert not reproduce.many_steps_suffice(Rows(row for row in shares() if row["steps"] < 100))


def test_the_published_rows_give_the_published_verdicts(tmp_path):
    claim = saved(ROOT / "lesson_01" / "results" / "claim.json")
    assert {letter: one["verdict"] for letter, one in claim.claims.items()} == {
        "a": "exact", **dict.fromkeys(("b1", "b2", "c1", "c2"), "reproduced")}
    rows = Rows(row for row in claim.rows if "share" in row)
    assert reproduce.many_steps_suffice(rows) and reproduce.few_steps_miss(rows)
    test = claim.notes["test_images"]
    assert max(claim.rows.values("distance", of="exact denoiser")) < 0.01 * test
    assert min(claim.rows.values("distance", of="network")) > 0.1 * test
    assert claim.claims["a"]["relative_error"] == pytest.approx(reproduce.recursion_error(Diffusion()), abs=1e-12)
    assert reproduce.plot(claim, tmp_path / "claim.png").stat().st_size > 5_000
