"""Lesson 05: the arms of its claim, which are not in model.py, and what decides its verdicts."""

import math

import pytest
import torch

from conftest import load
from utils import Rows

model, reproduce = load("lesson_05", "model"), load("lesson_05", "reproduce")
DDPM, Mean, Bound, MeanBound = model.DDPM, reproduce.Mean, reproduce.Bound, reproduce.MeanBound


def times(*values):
    return torch.tensor(values)


# ------------------------------------------------------------------ the arms
@pytest.mark.parametrize("t", [0, 1, 30, 500])
def test_round_trip_from_a_predicted_mean(t):
    ddpm, x0, eps = Mean(), torch.rand(3, 1, 4, 4) * 2 - 1, torch.randn(3, 1, 4, 4)
    t = torch.full((3,), t)
    xt = ddpm.q_sample(x0, t, eps)
    true_mean = ddpm.q_posterior(x0, xt, t, t - 1)
    mean, got = ddpm.p_mean(lambda x, _: true_mean, xt, t, t - 1)
    assert torch.allclose(got, x0, atol=2e-3)
    assert torch.allclose(mean, true_mean, atol=1e-5)


def test_a_predicted_mean_is_not_clipped_and_a_predicted_noise_is():
    # As in the official code: what a network says of the mean is taken as it is, also where x_0 leaves the range.
    xt, t = 3 * torch.ones(2, 1, 4, 4), times(20, 500)
    said = 2.5 * torch.ones_like(xt)
    mean, x0 = Mean().p_mean(lambda x, _: said, xt, t, t - 1)
    assert torch.allclose(mean, said, atol=1e-5) and x0.abs().max() > 1
    _, x0 = DDPM().p_mean(lambda x, _: said, xt, t, t - 1)
    assert x0.abs().max() <= 1
    terms = {}
    for ddpm in (Mean(20), MeanBound(20)):             # so the bound sees the whole error of a bad network
        _, terms[ddpm], _ = ddpm.bound(lambda x, _: 2 * x, torch.zeros(2, 1, 4, 4), torch.Generator().manual_seed(0))
    assert all(bool((one[:, 1:] > 1).all()) for one in terms.values())


def test_loss_of_a_predicted_mean():
    torch.manual_seed(0)
    x0 = torch.rand(4096, 1, 2, 2) * 2 - 1
    assert Mean().loss(lambda x, t: x, x0).item() < 0.05                        # mu-tilde is close to x_t


@pytest.mark.parametrize("process", [Mean, MeanBound])
def test_losses_of_an_oracle_that_predicts_the_mean(process):
    torch.manual_seed(0)
    ddpm, x0 = process(50), torch.zeros(4000, 1, 1, 1)
    loss = ddpm.loss(lambda x, t: ddpm.q_posterior(torch.zeros_like(x), x, t, t - 1), x0).item()
    if process is Mean:
        assert loss == 0
    else:                                              # with the small variance only L_0 is left: x_0 is not certain
        sigma = ddpm.reverse_variance(times(0), times(-1)).sqrt().float()
        nll = -model.discretized_log_likelihood(torch.zeros(1), torch.zeros(1), sigma).item() / math.log(2) / 50
        assert loss == pytest.approx(nll, rel=0.35, abs=1e-4)


def test_bf16_cannot_hold_the_mean():
    # Why reproduce.py computes in fp32: rounding mu-tilde to bf16 ruins x_0, rounding eps does not.
    torch.manual_seed(0)
    x0, eps = torch.rand(64, 1, 8, 8) * 2 - 1, torch.randn(64, 1, 8, 8)
    t, error = torch.full((64,), 300), {}
    for ddpm in (Mean(), DDPM()):
        xt = ddpm.q_sample(x0, t, eps)
        exact = eps if type(ddpm) is DDPM else ddpm.q_posterior(x0, xt, t, t - 1)
        got = ddpm.predict_x0(lambda x, _, exact=exact: exact.bfloat16().float(), xt, t)
        error[type(ddpm)] = (got - x0).square().mean().sqrt().item()
    assert error[DDPM] < 0.01 and error[Mean] > 0.1


class Gaussian(torch.nn.Module):
    """The exact noise prediction for data N(0, std^2): E[eps | x_t] in closed form. (B, 1, H, W)."""

    def __init__(self, ddpm, std):
        super().__init__()
        self.ddpm, self.std = ddpm, std

    def forward(self, xt, t):
        abar = self.ddpm.abar[t].float()[:, None, None, None]
        return (1 - abar).sqrt() * xt / (abar * self.std ** 2 + 1 - abar)


def test_bound_loss_is_the_bound():
    # The mean over random t is 1 / T of the sum over all t, clipping aside.
    torch.manual_seed(0)
    ddpm = Bound(20)
    net, x0 = Gaussian(ddpm, 0.5), (0.5 * torch.randn(4000, 1, 2, 2)).clamp(-1, 1)
    x0 = ((x0 + 1) * 127.5).round() / 127.5 - 1
    _, terms, _ = ddpm.bound(net, x0)
    assert 20 * ddpm.loss(net, x0).item() == pytest.approx(terms.sum(1).mean().item(), rel=0.1)


# ------------------------------------------------------------------ the rules, on made-up rows
def rows(fids, bits):
    """Rows of reproduce.py: values of three seeds for every arm, in the order of ARMS."""
    return Rows([{"arm": name, "seed": i, "fid": f, "bits": b} for name, fs, bs in zip(reproduce.ARMS, fids, bits)
                 for i, (f, b) in enumerate(zip(fs, bs))], ("arm", "seed"))


GOOD = [10.0, 11.0, 10.5], [20.0, 21.0, 22.0], [40.0, 41.0, 42.0], [30.0, 29.0, 31.0]
BITS = [3.0, 3.1, 3.0], [2.9, 3.01, 2.88], [9.0, 9.0, 9.0], [9.0, 9.0, 9.0]


@pytest.mark.parametrize("fids, bits, best, shorter", [
    (GOOD, BITS, True, True),
    (([10.0, 23.0, 10.5], *GOOD[1:]), BITS, False, True),                       # loses to one arm in one seed
    (([19.0, 11.0, 21.5], *GOOD[1:]), BITS, False, True),                       # wins in every seed, by chance perhaps
    (GOOD, ([3.0, 2.9, 3.0], *BITS[1:]), True, False),                          # another arm wins two seeds of three
    (GOOD, ([2.5, 3.1, 3.0], *BITS[1:]), True, False),                          # no arm is better in every seed
    ((GOOD[0], GOOD[1], [math.inf] * 3, GOOD[3]), BITS, True, True),            # an arm diverged
    ((GOOD[0], *[[math.inf] * 3] * 3), (BITS[0], *[[math.inf] * 3] * 3), True, False),
    (([math.inf, 10.0, 10.0], *GOOD[1:]), BITS, False, True),
])
def test_table_2_is_judged_as_its_sentences_say(fids, bits, best, shorter):
    table = rows(fids, bits)
    assert (reproduce.draws_best(table), reproduce.another_is_shorter(table)) == (best, shorter)


def test_rate_distortion_curve():
    code = reproduce.code
    # t = 0..3: L_0 costs 2 bits, the others 1 + 0.5 + 0.25; the estimate of x_0 gets better towards t = 0.
    got = code(torch.tensor(0.25), torch.tensor([2.0, 1.0, 0.5, 0.25]), torch.tensor([1.0, 5.0, 50.0, 99.0]))
    assert got["bits_per_dim"] == 4 and got["share_of_L_0"] == 0.5
    assert got["rmse"] == [99.0, 50.0, 5.0, 1.0]
    assert got["rate"] == [0.25, 0.5, 1.0, 2.0]                                 # before the estimates above
    assert got["share_after_5_percent"] == (4 - 1.0) / 4
    never = code(torch.tensor(0.25), torch.tensor([2.0, 1.0]), torch.tensor([99.0, 99.0]))
    assert never["share_after_5_percent"] == 0
