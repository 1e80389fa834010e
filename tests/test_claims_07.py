"""Lesson 07: what decides its claims, on made-up measurements; and the published claim, judged and drawn again."""

from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT, load
from utils import Rows, saved, seeded

reproduce = load("lesson_07", "reproduce")


class Made:
    """A claim whose measurements are these rows; `.holds` keeps what its sentences were found to be."""

    def __init__(self, rows=(), **values):
        self.rows, self.holds, self.seeds = Rows(rows), {}, range(values.get("seeds", 3))
        self.cfg = SimpleNamespace(**{"calls": 3, "other_calls": [5], "long": 9, "tolerances": [0.1, 0.01],
                                      "probes": 20, **values})
        self.run = SimpleNamespace(say=lambda text: None, output=lambda *what: None)

    def each(self, function, jobs=None, **axes):
        return self.rows

    def judge(self, letter, sentence, holds, **more):
        self.holds[letter] = bool(holds)

    exact = judge


def found(part, rows=(), **values):
    """What the function called `part` says of these rows."""
    claim = Made(rows, **values)
    getattr(reproduce, part)(claim)
    return claim.holds


def test_a_needs_the_exact_value_and_no_bias(monkeypatch):
    # The likelihoods of the three SDEs are measured once; then errors are added to what was measured.
    real, cache = reproduce.SDE.log_likelihood, {}
    off = {"trace": 0.0, "probes": 0.0, "kind": "VE"}

    def likelihood(self, net, x, v, rtol, atol):
        key = type(self.noising).__name__, len(x)
        if key not in cache:
            cache[key] = real(self, net, x, v, rtol, atol)[0]
        return cache[key] + off["trace" if len(x) == 64 else "probes"] * (key[0] == off["kind"]), None

    monkeypatch.setattr(reproduce.SDE, "log_likelihood", likelihood)
    for trace, probes, closed, no_bias in ((0, 0, True, True), (2e-3, 0, False, True), (-2e-3, 0, False, True),
                                           (0, 50, True, False), (0, -50, True, False)):
        off |= {"trace": trace, "probes": probes}
        assert found("exact", seeds=1) == {"a1": closed, "a2": no_bias}


def test_b_needs_every_set():
    def sets(*gaps):
        return [{"seed": i, "ode": 1.0, "bound": 1 + gap} for i, gap in enumerate(gaps)]

    assert found("bits", sets(0.15, 0.17, 0.16)) == {"b": True}
    assert not found("bits", sets(0.15, 0.17, -0.01))["b"] and not found("bits", sets(-0.15, -0.17, -0.16))["b"]
    assert not found("bits", sets(0.5, 0.01, 0.02))["b"]                         # in every set, but t = 1.1


@pytest.mark.parametrize("fids, first, second", [((3.0, 9.0, 1.0), True, True), ((1.0, 9.0, 3.0), False, True),
                                                 ((3.0, 1.0, 2.0), True, False)])
def test_c_has_two_verdicts_and_only_ve_at_equal_calls_decides(fids, first, second):
    arms = dict(zip(("predictor", "corrector", "both"), fids))
    rows = [{"kind": "ve", "arm": arm, "calls": 3, "seed": seed, "fid": fid + 0.1 * seed + 0.01 * seed ** 2 * fid,
             "x": None} for arm, fid in arms.items() for seed in range(3)]
    rows += [{"kind": kind, "arm": arm, "calls": calls, "seed": 0, "fid": 10 - fid}
             for arm, fid in arms.items() for kind, calls in (("ve", 5), ("vp", 3))]
    assert found("arms", rows) == {"c1": first, "c2": second}


def test_d_needs_a_near_fid_and_few_calls():
    def rows(shift, calls):
        steps = [(3.0, 1000), (3.1, 1000), (3.2, 1000)]                          # a deviation of 0.1
        return [{"arm": arm, "seed": i, "fid": fid + add, "nfe": n} for arm, add, numbers in (
            ("reverse SDE", 0, steps), ("ODE", shift, [(fid, n) for (fid, _), n in zip(steps, calls)]))
            for i, (fid, n) in enumerate(numbers)]

    assert found("ode", rows(0.25, (100, 110, 150))) == {"d1": True, "d2": True}
    assert found("ode", rows(-1.0, (100, 110, 120)))["d1"]
    assert found("ode", rows(0.35, (100, 110, 120))) == {"d1": False, "d2": True}
    assert found("ode", rows(0.0, (100, 110, 201))) == {"d1": True, "d2": False}


@pytest.mark.parametrize("rms, within, falling", [((0.1, 0.0038), True, True), ((0.1, 0.0040), False, True),
                                                  ((0.001, 0.0038), True, False)])
def test_e_needs_an_error_below_half_a_grey_level_that_falls(rms, within, falling):
    sets = [(0.1, 0.001), (0.1, 0.001), rms]
    rows = [{"seed": i, "rms": {"0.1": large, "0.01": small}} for i, (large, small) in enumerate(sets)]
    assert found("identity", rows) == {"e1": within, "e2": falling}


def test_the_published_rows_give_the_published_verdicts(tmp_path):
    claim = saved(ROOT / "lesson_07" / "results" / "claim.json")
    rows, seen = claim.rows, {}
    parts = {"bits": [row for row in rows if "images" in row], "ode": [row for row in rows if "kind" not in row],
             "arms": [{**row, "x": None} for row in rows if "kind" in row], "identity": [r for r in rows if "rms" in r]}
    for part, of_part in parts.items():
        seen |= found(part, of_part, **vars(claim.cfg))
    assert reproduce.unbiased(claim.claims["a2"]["bias"]) and max(claim.claims["a1"]["errors"].values()) < 1e-3
    assert {letter: one["holds"] for letter, one in claim.claims.items()} == {"a1": True, "a2": True, **seen}
    assert reproduce.plot(claim, tmp_path / "claim.png").stat().st_size > 5_000


@pytest.mark.parametrize("kind", ["vp", "subvp", "ve"])
def test_known_pixels_are_shown_as_noisy_as_the_rest(kind):
    sde, seen = reproduce.SDE(kind), []
    y, x = torch.randn(2, 3, 1, 4, 4, generator=seeded(0))
    known, t = (torch.arange(4) < 2)[None, None, :, None].expand(1, 1, 4, 4), torch.tensor([0.1, 0.5, 0.9])
    for image in (y, torch.where(known, y, 7.0)):                                # of unknown pixels nothing is used
        shown = reproduce.Known(sde, lambda z, label: seen.append((z, label)) or z, image, known, seeded(1))
        shown(x, 999 * t)
    m, std = sde.noising.marginal(t)
    noised = m[:, None, None, None] * y + std[:, None, None, None] * torch.randn(y.shape, generator=seeded(1))
    if kind == "ve":                                                             # x comes in scaled, see network_input
        noised = noised / (1 + std ** 2).sqrt()[:, None, None, None]
    for z, label in seen:
        assert torch.allclose(z[:, :, :2], noised[:, :, :2], atol=1e-5) and torch.equal(z[:, :, 2:], x[:, :, 2:])
        assert torch.equal(label, 999 * t)
