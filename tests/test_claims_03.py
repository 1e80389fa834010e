"""Lesson 03: what decides its claims, on made-up rows; what they are measured with; the published claim."""

import math

import pytest
import torch

from conftest import ROOT, load
from utils import Rows, saved, seeded

reproduce = load("lesson_03", "reproduce")


@pytest.mark.parametrize("plain, basin, holds", [
    ([0.51, 0.50, 0.50], [0.51, 0.50, 0.52], True),
    ([0.51, 0.60, 0.50], [0.51, 0.50, 0.52], False),                            # one seed leaves its basin
    ([0.61, 0.50, 0.50], [0.60, 0.50, 0.52], False),                            # starts that are not even
    ([math.inf, 0.50, 0.50], [0.51, 0.50, 0.52], False),
])
def test_plain_dynamics_keeps_the_share_of_even_starts(plain, basin, holds):
    assert reproduce.keeps_the_basin(plain, basin) is holds


def test_where_points_end_is_counted_for_the_first_seed():
    clouds = Rows([{"sampler": "plain", "seed": 1, "ends": [torch.zeros(9)]},
                   {"sampler": "plain", "seed": 0, "ends": [torch.tensor([-15.9, 10.1, 10.2])]}])
    counts = reproduce.along(clouds, "plain")
    assert len(counts) == 64 and counts[0] == 1 and counts[52] == 2 and sum(counts) == 3


def test_the_published_rows_give_the_published_verdicts(tmp_path):
    claim = saved(ROOT / "lesson_03" / "results" / "claim.json")
    assert {letter: one["verdict"] for letter, one in claim.claims.items()} == dict.fromkeys(("a1", "a2", "b"),
                                                                                            "reproduced")
    basin, plain, annealed = (claim.rows.values("share", sampler=name) for name in (
        "basin", "plain", reproduce.from_sigma(20)))
    assert reproduce.keeps_the_basin(plain, basin) and all(abs(share - 0.8) <= 0.03 for share in annealed)
    assert claim.rows.below("annealed", "plain", "best", factor=0.5)
    large = claim.notes["along"]["annealed from 20"]
    assert sum(large[32:]) / sum(large) == pytest.approx(annealed[0], abs=0.01)
    assert reproduce.plot(claim, tmp_path / "claim.png").stat().st_size > 5_000


def test_one_level_asks_for_that_level():
    table = torch.nn.Module()
    table.forward = lambda x, i: i
    one = reproduce.OneLevel(table, 4)
    assert one(torch.zeros(3, 1, 2, 2), torch.tensor([0, 0, 0])).tolist() == [4, 4, 4]


def test_basins_are_the_halves_of_the_plane():
    x = 16 * torch.rand(500, 2, generator=seeded(0)) - 8
    end = reproduce.downhill(x)
    clear = (x.sum(1).abs() > 0.5)                                              # the border is near x + y = 0
    assert ((end.sum(1) > 0) == (x.sum(1) > 0))[clear].all()
    assert torch.allclose(end.abs(), torch.full_like(end, 5.0), atol=0.1)
