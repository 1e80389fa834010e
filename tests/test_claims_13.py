"""Lesson 13: what its claim measures, and what decides the verdicts."""

from types import SimpleNamespace

import pytest
import torch

from conftest import load
from utils import Rows, digits

reproduce, model = load("lesson_13", "reproduce"), load("lesson_13", "model")
VDM, Schedule = model.VDM, model.Schedule
ENDS = (-13.3, 5.0)


def course(t):
    """t (B,) -> u, du/dt of a curve that no interior has, and ends."""
    return t ** 2, 2 * t, *torch.tensor(ENDS, dtype=torch.float64)


class Net(torch.nn.Module):
    """A network that answers by a formula, with a schedule of its own; that of the pictures by another one."""

    def __init__(self, model="bound"):
        super().__init__()
        self.slope = {"bound": 0.3, "pictures": 0.2}[model]

    def forward(self, z=None, gamma=None, t=None):
        return course(t) if z is None else self.slope * z + 0.01 * gamma.float()[:, None, None, None]


def run(**keys):
    """As much of a run as the claim's measurements ask for."""
    return SimpleNamespace(device=torch.device("cpu"), config=SimpleNamespace(reproduce=SimpleNamespace(**keys)))


@pytest.fixture
def small(monkeypatch):
    """The published network is `Net`, the test images are four."""
    monkeypatch.setattr(reproduce, "published", lambda run, arm: None)
    monkeypatch.setattr(reproduce, "load", lambda run, weights, model, **process: (VDM(**process), Net(model)))
    monkeypatch.setattr(reproduce, "images", lambda run: digits("test").first(4)[0])


# ------------------------------------------------------------------ what is measured
def test_bent_network_answers_alike_on_another_course():
    net, t = Net(), torch.linspace(0, 1, 5, dtype=torch.float64)
    other = reproduce.Bent(net, "cosine", -10.0, 4.0)
    z, gamma = torch.randn(5, 1, 2, 2), torch.linspace(-5, 5, 5, dtype=torch.float64)
    assert torch.equal(other(z, gamma), net(z, gamma))
    low, high = torch.tensor((-10.0, 4.0), dtype=torch.float64)
    u, *_ = Schedule(-10.0, 4.0, False, "cosine")(t)
    assert torch.allclose(VDM().gamma(other, t), low + (high - low) * u, atol=1e-6)
    assert not torch.allclose(VDM().gamma(other, t), VDM().gamma(net, t), atol=0.1)


@pytest.mark.parametrize("interior", ["learned", *reproduce.OTHERS, "control"])
def test_interiors_are_measured_between_the_ends_of_the_network(small, interior):
    row = reproduce.by_interior(run(draws=3), interior, seed=1)
    first = ENDS[0] + (interior == "control")
    assert row["curve"][[0, -1]].tolist() == pytest.approx([first, ENDS[1]], abs=1e-5)
    assert (row["gamma_0"], row["gamma_1"]) == pytest.approx(ENDS)
    net = Net() if interior == "learned" else reproduce.Bent(
        Net(), "linear" if interior == "control" else interior, first, ENDS[1])
    with torch.no_grad():
        _, _, terms, times = VDM().bound(net, digits("test").first(4)[0], 3, torch.Generator().manual_seed(1))
    assert torch.allclose(row["draws"], terms.double(), rtol=1e-6) and torch.allclose(row["times"], times)
    assert row["draws"].shape == (4, 3) and row["loss"] == pytest.approx(float(terms.mean()), rel=1e-5)
    assert row["variance"] == pytest.approx(float(terms.double().var()), rel=1e-5)


@pytest.mark.parametrize("T", [2, 4, 0])
def test_bound_by_steps_is_that_of_each_number_of_steps(small, T):
    row = reproduce.by_steps(run(draws=5), T, seed=1)
    x0 = digits("test").first(4)[0]
    reconstruction, prior, terms, _ = VDM(T).bound(Net(), x0, 5, torch.Generator().manual_seed(1))
    each = reconstruction.double() + prior + terms.double().mean(1)
    assert torch.allclose(row["each"], each, rtol=1e-6) and row["bits_per_dim"] == pytest.approx(float(each.mean()))
    assert row["standard_error"] == pytest.approx(float(each.std()) / 2)
    assert sum(row[key] for key in reproduce.TERMS) == pytest.approx(row["bits_per_dim"])


@pytest.mark.parametrize("model, grid", [("bound", "even"), ("pictures", "cosine")])
def test_bits_and_pictures_are_those_of_the_same_network(small, monkeypatch, model, grid):
    monkeypatch.setattr(reproduce, "fid_to_test", lambda x: x)
    row = reproduce.by_network(run(draws=3, n=2, sample_steps=4), model, grid)
    assert row["fid"].shape == (2, 1, 28, 28)
    own = reproduce.draw(VDM(), Net(model), 2, 4, reproduce.seeded(0, 2), grid=grid)
    other = reproduce.draw(VDM(), Net(model), 2, 4, reproduce.seeded(0, 2), grid={"even": "cosine"}.get(grid, "even"))
    assert torch.equal(row["fid"], own) and not torch.equal(own, other)
    bits = reproduce.measure(VDM(), Net(model), digits("test").first(4)[0], 3, reproduce.seeded(0))["bits_per_dim"]
    assert row["bits_per_dim"] == pytest.approx(float(bits.mean()))
    assert row["standard_error"] == pytest.approx(float(bits.std()) / 2)


# ------------------------------------------------------------------ the rules, on made-up rows
def interiors(shift=0.0, control=1.0, wide=(3.0, 2.0, 2.0), grain=0.02, one_seed=False):
    """Rows of draws (100 images, 16 draws): the same mean 1, other variances; the images are paired."""
    generator = torch.Generator().manual_seed(0)
    noise = lambda: torch.randn(3, 100, 16, generator=generator, dtype=torch.float64)
    image = 0.2 * torch.randn(1, 100, 1, generator=generator, dtype=torch.float64)
    terms = {"learned": 1 + image + grain * noise()}
    for name, size in zip(reproduce.OTHERS, wide):
        terms[name] = 1 + image + grain * size * 10 * noise()
    if one_seed:                                       # in one of them an interior varies less than the learned one
        terms["cosine"][1] = 1 + 0.1 * (terms["cosine"][1] - 1)
        terms["learned"][1] = 1 + 3 * (terms["learned"][1] - 1)
    terms["linear"] = terms["linear"] + shift
    terms["control"] = 1 + control + image + grain * noise()
    return Rows([{"interior": name, "seed": seed, "draws": draws, "loss": float(draws.mean()),
                  "variance": float(draws.var())} for name, value in terms.items() for seed, draws in enumerate(value)])


def steps(rise=0.0, seed=None, scatter=0.001):
    """Rows of bits (50 images) that fall with T, but for `rise` at infinity, in all seeds or in one."""
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(3, 50, generator=generator, dtype=torch.float64)
    rows = []
    for T, level in ((10, 2.0), (100, 1.1), (1000, 1.05), (0, 1.0)):
        each = base + level + scatter * torch.randn(3, 50, generator=generator, dtype=torch.float64)
        if T == 0:
            each[slice(None) if seed is None else seed] += rise
        rows += [{"T": T, "seed": i, "each": one, "bits_per_dim": float(one.mean())} for i, one in enumerate(each)]
    return Rows(rows)


def arms(**change):
    """Rows of the short trainings; each seed adds the same to all arms."""
    bits = {"learned ends": 3.0, "DDPM's ends": 4.0, "fixed ends": 3.1, "n = 6, 7": 3.2, "no features": 3.7}
    return Rows([{"arm": arm, "seed": seed, "bits_per_dim": level + (0.0, 0.3, 0.2)[seed]}
                 for arm, level in (bits | change).items() for seed in range(3)])


@pytest.mark.parametrize("change, letters", [
    ({}, []),
    (dict(interiors=interiors(shift=0.1)), ["a1"]),                          # another mean
    (dict(interiors=interiors(control=0.0)), ["a1"]),                        # the test could not tell
    (dict(interiors=interiors(wide=(30.0, 2.0, 2.0), grain=1.0)), ["a1"]),   # too noisy to say anything
    (dict(interiors=interiors(wide=(0.1, 0.1, 0.1))), ["a2"]),               # all variances alike
    (dict(interiors=interiors(one_seed=True)), ["a2"]),
    (dict(arms=arms(**{"learned ends": 4.1})), ["b"]),
    (dict(arms=arms(**{"fixed ends": 0.5})), []),                            # that arm decides nothing
    (dict(steps=steps(rise=0.2)), ["c"]),
    (dict(steps=steps(rise=0.2, seed=1)), ["c"]),                            # not in every seed
    (dict(steps=steps(scatter=1.0)), ["c"]),                                 # by less than 3 standard errors
    (dict(arms=arms(**{"n = 6, 7": 3.8})), ["d"]),
])
def test_each_sentence_is_judged_by_its_own_criterion(change, letters):
    found, given = {}, dict(arms=arms(), interiors=interiors(), steps=steps()) | change
    claim = SimpleNamespace(cfg=SimpleNamespace(T=[10, 100, 1000]),
                            judge=lambda letter, sentence, holds, **_: found.update({letter: holds}))
    reproduce.judge(claim, **given)
    assert list(found) == ["a1", "a2", "b", "c", "d"]
    assert [letter for letter, holds in found.items() if not holds] == letters


def test_differences_are_paired_by_image():
    image = torch.linspace(0, 100, 50, dtype=torch.float64)                  # images differ by far more than interiors
    rows = Rows([{"interior": name, "seed": seed, "draws": (image + shift + 0.1 * seed)[:, None].expand(-1, 4)}
                 for name, shift in (("learned", 0.0), ("linear", 0.5)) for seed in range(3)])
    mean, error = reproduce.difference(rows, "linear")
    assert mean == pytest.approx(0.5) and error == pytest.approx(0, abs=1e-9)
    rows = Rows([{"T": T, "seed": seed, "each": image + 1 / T + 0.1 * seed} for T in (1, 2) for seed in range(3)])
    mean, error = reproduce.drop(rows, 1, 2)
    assert mean == pytest.approx(0.5) and error == pytest.approx(0, abs=1e-9)
