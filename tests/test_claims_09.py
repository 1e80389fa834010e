"""Lesson 09: what its claim measures, and what decides the verdicts."""

import math
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT, load
from utils import Rows, saved

reproduce = load("lesson_09", "reproduce")
CFG = SimpleNamespace(counts=[10, 25, 50], long=[100, 1000], skip=0.2)
BITS = {"L_simple": 2.0, "L_hybrid": 1.9, "L_vlb": 1.8, "L_vlb, importance": 1.7}
FID = {"L_simple": 3.0, "L_hybrid": 3.0, "L_vlb": 9.0, "L_vlb, importance": 5.0}
FEW = {("learned", 10): 6.0, ("learned", 25): 3.5, ("learned", 50): 3.1, ("large", 10): 20.0, ("large", 25): 7.0,
       ("large", 50): 4.0, ("learned", 100): 3.0, ("large", 100): 3.0, ("learned", 1000): 3.0, ("large", 1000): 3.0}
TRACE = {"uniform": 1000.0, "importance": 10.0}
SKIP = {("cosine", 0.0): 3.0, ("cosine", 0.2): 9.0, ("linear", 0.0): 3.0, ("linear", 0.2): 3.1}
WIGGLE = (0.0, 0.1, 0.05)                              # what the three seeds add: the same for all, so pairs agree


def broken(bits=(), fid=(), few=(), trace=(), skip=(), seed=None):
    """The letters whose criteria fail when these means are changed, in all seeds or in this one only."""
    def rows(table, change, key, *axes):
        return Rows([{**dict(zip(axes, name if isinstance(name, tuple) else (name,))), "seed": i,
                      key: (dict(change).get(name, mean) if seed in (None, i) else mean) + WIGGLE[i]}
                     for name, mean in table.items() for i in range(1 if name[1] in CFG.long else 3)])

    arms = Rows([{**a, **b} for a, b in zip(rows(BITS, bits, "bits", "arm"), rows(FID, fid, "fid", "arm"))])
    found = {}
    claim = SimpleNamespace(cfg=CFG, judge=lambda letter, sentence, holds, **_: found.update({letter: holds}))
    reproduce.judge(claim, arms, rows(FEW, few, "fid", "variance", "steps"), rows(TRACE, trace, "trace", "times"),
                    rows(SKIP, skip, "fid", "schedule", "skip"))
    assert list(found) == ["a1", "a2", "b1", "b2", "b3", "c", "d1", "d2", "d3"]
    return [letter for letter, holds in found.items() if not holds]


def test_all_hold_when_the_means_are_as_the_paper_says():
    assert broken() == []


@pytest.mark.parametrize("change, letters", [
    (dict(bits={"L_vlb, importance": 1.95}), ["a1"]),
    (dict(bits={"L_simple": 1.85}), ["a1"]),
    (dict(bits={"L_hybrid": 1.6}, seed=1), ["a1"]),                             # one seed the other way
    (dict(bits={"L_vlb": 0.5}), []),                                            # that arm decides nothing
    (dict(fid={"L_vlb, importance": 2.9}), ["a2"]),
    (dict(fid={"L_vlb, importance": 2.9}, seed=2), ["a2"]),
    (dict(few={("learned", 25): 4.6}), ["b1"]),
    (dict(few={("learned", 50): 4.6, ("large", 50): 5.5}), ["b1"]),
    (dict(few={("large", 1000): 3.6}), ["b2"]),
    (dict(few={("large", 50): 3.05}), ["b3"]),
    (dict(few={("large", 50): 3.05}, seed=0), ["b3"]),
    (dict(few={("learned", 10): 40.0, ("large", 100): 1.0}), []),               # 10 steps and 100 decide nothing
    (dict(trace={"uniform": 10.0, "importance": 1000.0}), ["c"]),
    (dict(trace={"uniform": 9.0}, seed=1), ["c"]),
    (dict(skip={("cosine", 0.2): 2.9}), ["d1", "d3"]),
    (dict(skip={("linear", 0.2): 4.0}), ["d2"]),
    (dict(skip={("linear", 0.2): 9.5}), ["d2", "d3"]),
])
def test_each_sentence_is_judged_by_its_own_criterion(change, letters):
    assert broken(**change) == letters


def test_the_better_of_the_fixed_variances_counts(monkeypatch, tmp_path):
    run = reproduce.Claim(reproduce.__file__, ["smoke=true", f"runs={tmp_path}"]).run
    monkeypatch.setattr(reproduce, "load", lambda run, weights, variance=None: (variance, None))
    of = {"small": [2.0, 2.1], "large": [2.2, 2.4], "learned": [1.0, 1.2]}
    monkeypatch.setattr(reproduce, "bits", lambda variance, *_: (torch.tensor(of[variance]),))
    monkeypatch.setattr(reproduce, "draw", lambda *_, **__: None)
    monkeypatch.setattr(reproduce, "fid_to_test", lambda x: 3.0)
    simple, hybrid = (reproduce.measure(run, None, arm, 0) for arm in ("L_simple", "L_hybrid"))
    assert simple["bits_of"] == pytest.approx({"small": 2.05, "large": 2.3}) and simple["fid"] == 3.0
    assert simple["bits"] == pytest.approx(2.05) and simple["bits_error"] == pytest.approx(0.05)
    assert hybrid["bits_of"] == pytest.approx({"learned": 1.1})


def test_gradient_noise_is_the_trace_of_one_images_covariance(tmp_path, monkeypatch):
    # Gradients of known noise: 3 numbers of mean 2 and deviation 5 an image, so trace 75 and |mean|^2 12.
    weight = torch.nn.Linear(3, 1, bias=False)

    def loss(net, x0, sampler):
        scale = 5.0 if sampler is None else 0.5
        return (net.weight[0] * (2 + scale * torch.randn(len(x0), 3)).mean(0)).sum()

    monkeypatch.setattr(reproduce, "network", lambda *_, **__: (SimpleNamespace(timesteps=5, loss=loss), weight))
    monkeypatch.setattr(reproduce.train, "fill", lambda *_: None)
    run = reproduce.Claim(reproduce.__file__, ["smoke=true", "device=cpu", "threads=1", "batches=800", "batch_size=16",
                                               f"runs={tmp_path}"]).run
    result = reproduce.gradient_noise(run, 0)
    assert result["trace"]["uniform"] == pytest.approx(75, rel=0.1)
    assert result["trace"]["importance"] == pytest.approx(0.75, rel=0.1)
    assert result["mean2"]["uniform"] == pytest.approx(12, rel=0.1)


def test_lesson_05s_network_walks_with_a_fixed_variance(tmp_path):
    run = reproduce.Claim(reproduce.__file__, ["device=cpu", f"runs={tmp_path}"]).run
    ddpm, net = reproduce.network(run, "linear", variance="small")
    x, t = torch.randn(2, 1, 28, 28), torch.tensor([3, 700])
    mean, log_variance, _ = ddpm.p_mean_variance(net, x, t, t - 1)
    old = load("lesson_05", "model").DDPM()
    assert torch.allclose(mean, old.p_mean(net, x, t, t - 1)[0], atol=1e-5)
    assert log_variance.flatten().tolist() == pytest.approx(
        [math.log(v) for v in old.reverse_variance(t, t - 1).tolist()], abs=1e-5)


def test_the_published_rows_give_the_published_verdicts():
    claim = saved(ROOT / "lesson_09" / "results" / "claim.json")
    published, found = {letter: one["holds"] for letter, one in claim.claims.items()}, {}
    skip, arms = (Rows([row for row in claim.rows if key in row]) for key in ("skip", "arm"))
    few = Rows([row for row in claim.rows if "variance" in row and "steps" in row])
    noise = Rows([row for row in claim.rows if "trace" in row]).unfold("trace", "times")
    judge = lambda letter, sentence, holds, **_: found.update({letter: bool(holds)})
    reproduce.judge(SimpleNamespace(cfg=claim.cfg, judge=judge), arms, few, noise, skip)
    assert found == published and found["a2"] and found["b3"]
