"""Lesson 05e: what decides its claims, on made-up rows; and the published claim, judged and drawn again."""

import math

import pytest

from conftest import ROOT, load
from utils import Rows, saved

reproduce = load("lesson_05/sublesson_e", "reproduce")
SENTENCES, BAGS = reproduce.SENTENCES, reproduce.BAGS


def asked(seen=0.99, held=0.9, other=0.1, **changes):
    """Three sampling seeds; changes: of the guided held-out row alone."""
    share = {"seen, guided": seen, "held-out, guided": held}
    return Rows([{"captions": kind, "seed": seed, **{
        key: share.get(kind, other) + 0.01 * (seed - 1) for key in (*reproduce.WORDS, "attributes", "all")},
        **({key: value for key, value in changes.items()} if kind == "held-out, guided" else {})}
        for kind in reproduce.KINDS for seed in range(3)])


@pytest.mark.parametrize("seen, holds", [(0.951, True), (0.949, False)])
def test_digits_of_seen_captions(seen, holds):
    assert reproduce.right(asked(seen=seen), "seen, guided", ("accuracy",), 0.95) == holds


@pytest.mark.parametrize("change, holds", [
    ({"held": 0.801}, True), ({"held": 0.799}, False),
    ({"accuracy": 0.7}, False), ({"thickness": 0.7}, False), ({"slant": 0.7}, False),      # none of the three may fail
    ({"attributes": 0.6, "all": 0.5}, True),                                               # each word counts alone
    ({"seen": 0.1}, True),
])
def test_words_of_held_out_captions(change, holds):
    assert reproduce.right(asked(**change), "held-out, guided", reproduce.WORDS, 0.8) == holds


@pytest.mark.parametrize("sentences, bags, holds", [
    (0.8, 0.8, True), (0.8, 0.751, True), (0.8, 0.749, False), (0.8, 0.86, False),
    (0.8, math.inf, False), (math.inf, math.inf, False),                                   # an arm that diverged
])
def test_order_of_words(sentences, bags, holds):
    rows = Rows([{"arm": arm, "seed": seed, "words": share + 0.1 * (seed - 1)}
                 for arm, share in ((SENTENCES, sentences), (BAGS, bags)) for seed in range(3)])
    assert reproduce.as_good(rows) == holds


def test_kinds_of_captions():
    for name, (triples, guided, mixed) in reproduce.KINDS.items():
        assert triples is (reproduce.SEEN if name.startswith("seen") else reproduce.HELD_OUT)
        assert (guided, mixed) == ("guided" in name, "reordered" in name)


def test_the_published_rows_give_the_published_verdicts(tmp_path):
    claim = saved(ROOT / "lesson_05/sublesson_e/results/claim.json")
    assert {letter: one["verdict"] for letter, one in claim.claims.items()} == dict.fromkeys("abc", "reproduced")
    assert reproduce.right(claim.rows, "seen, guided", ("accuracy",), 0.95)
    assert reproduce.right(claim.rows, "held-out, guided", reproduce.WORDS, 0.8)
    assert not reproduce.right(claim.rows, "held-out, w = 1", reproduce.WORDS, 0.8)
    assert reproduce.as_good(claim.rows)
    assert reproduce.plot(claim, tmp_path / "claim.png").stat().st_size > 5_000
