"""Lesson 20: the arms and samplers of its claim, and what decides its verdicts."""

import pytest
import torch

from conftest import load
from utils import Rows
from utils.claims import RULE, saved

model, reproduce = load("lesson_20", "model"), load("lesson_20", "reproduce")


@pytest.mark.parametrize("calls", [9, 19, 35])
def test_every_sampler_makes_the_calls_of_its_column(calls):
    for sampler in reproduce.SAMPLERS:
        asked = []
        sigmas, how = reproduce.way(model.EDM(), sampler, calls)
        for _ in model.ode_sampler(lambda x, _, asked=asked: asked.append(0) or 0.5 * x, torch.ones(1, 1, 1, 1), sigmas,
                                   **how):
            pass
        assert len(asked) == calls, sampler


def test_arms_of_the_training_differ_in_what_their_names_say():
    # All arms have the paper's log-normal, whatever config.yaml has, and nothing else of their own but the class.
    keys = [arm if isinstance(arm, list) else arm.keys for arm in reproduce.ARMS.values()]
    assert keys == [["edm.p_mean=-1.2"]] * 3
    classes = [{"EDM": reproduce.NoisePrediction}, {"EDM": reproduce.VPLoss}]
    assert [arm.names for arm in list(reproduce.ARMS.values())[:2]] == classes
    sigma = torch.tensor([0.01, 0.5, 20.0])
    edm, vp_loss, old = model.EDM(), reproduce.VPLoss(), reproduce.NoisePrediction()
    assert all(torch.equal(a, b) for a, b in zip(edm.coefficients(sigma), vp_loss.coefficients(sigma)))
    assert torch.equal(vp_loss.weight(sigma), old.weight(sigma)) and torch.equal(old.weight(sigma), sigma ** -2)


def test_distances_of_every_seed_become_rows():
    rows = reproduce.by_sampler(Rows([{"seed": seed, "distance": {"a": {"9": 1.0 + seed, "35": 0.5}, "b": {"9": 2.0}}}
                                      for seed in range(2)], ("seed",)))
    assert rows.values("distance", sampler="a", calls=9) == [1.0, 2.0]
    assert rows.by("sampler", "distance", calls=9) == {"a": [1.0, 2.0], "b": [2.0, 2.0]}


@pytest.mark.parametrize("values, holds", [([2.09, 2.0, 1.91], True), ([2.11, 2.0, 2.0], False),
                                           ([1.89, 2.0, 2.0], False)])
def test_near_means_to_either_side_and_in_every_seed(values, holds):
    assert reproduce.within(values, [2.0, 2.0, 2.0], 0.05) == holds


def row(sigma, trained, start=1.0):
    return {"sigma": sigma, "trained": trained, "start": start, "plain": 3.7}


TABLE = [row(0.002, 0.9), row(0.3, 0.2), row(80.0, 0.7)]


def test_loss_by_level_is_judged_as_its_sentences_say():
    assert reproduce.starts_at_one(TABLE) and reproduce.dips(TABLE)
    for start in (0.97, 1.03):
        assert not reproduce.starts_at_one([*TABLE[:2], row(80.0, 0.7, start)])
    for bad in ([row(0.002, 0.3), *TABLE[1:]], [*TABLE[:2], row(80.0, 0.3)],      # an end is less than twice as high
                [row(0.002, 0.9), row(0.01, 0.2), row(80.0, 0.7)], [row(0.002, 0.9), row(4.0, 0.2), row(80.0, 0.7)]):
        assert not reproduce.dips(bad)


def test_published_claim_can_be_drawn_again_and_says_its_rules(tmp_path):
    claim = saved(reproduce.__file__.replace("reproduce.py", "results/claim.json"))
    assert list(claim.claims) == ["a1", "a2", "a3", "b", "c1", "c2", "c3"]
    assert claim.claims["b"]["rule"] == RULE
    at_9, at_35 = (claim.rows.mean("fid", sampler=reproduce.HEUN, calls=calls) for calls in (9, 35))
    assert at_35 < at_9
    assert reproduce.plot(claim, tmp_path / "claim.png").stat().st_size > 5_000
