"""Claims: what they decide, whom they train, what they write."""

import functools
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import utils
from utils import Arm, Claim, Rows, UserError, above, below, claims

INF, NAN = math.inf, math.nan


# ------------------------------------------------------------------ below
@pytest.mark.parametrize("a, b, factor, holds", [
    ([1.0, 1.1, 1.2], [2.0, 2.3, 2.1], 1, True),
    ([2.0, 2.3, 2.1], [1.0, 1.1, 1.2], 1, False),                                # the wrong way
    ([1.0, 1.1, 2.2], [2.0, 2.3, 2.1], 1, False),                                # one seed disagrees
    ([1.0, 1.0, 1.0], [1.01, 1.5, 3.0], 1, False),                               # every seed, but t = 1.4
    ([1.0, 5.0, 9.0], [1.1, 5.15, 9.1], 1, True),                                # seeds differ, pairs do not: t = 7
    ([1.0, 5.0, 9.0], [1.1, 5.2, 9.1], 1, False),                                # t = 4.0; three seeds need 4.30
    ([1.0, 1.1, 1.2], [2.0, 2.3, 2.1], 0.5, False),                              # a size that is claimed too
    ([0.7, 0.8, 0.7], [2.0, 2.3, 2.1], 0.5, True),
    ([1.0, 2.0, 3.0], [2.0, 3.0, 4.0], 1, True), ([0.1, 0.2, 0.3], [0.2, 0.3, 0.4], 1, True),      # no variance
    ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], 1, False), ([2.0, 3.0, 4.0], [1.0, 2.0, 3.0], 1, False),
    ([1.0, 1.0], [2.0, 2.0], 1, False), ([1.0], [2.0], 1, False), ([], [], 1, False),              # too few seeds
    ([1.0, 1.1, 1.2], [INF, INF, INF], 1, True), ([1.0, 1.1, 1.2], [2.0, NAN, 2.1], 1, True),      # b diverged
    ([1.0, 1.1, 2.2], [INF, 2.0, 2.1], 1, False),                                # it did, but where it did not it won
    ([INF, 1.0, 1.1], [2.0, 2.0, 2.1], 1, False), ([1.0, 1.0, NAN], [INF, INF, INF], 1, False),    # a diverged
    ([INF] * 3, [INF] * 3, 1, False),
])
def test_below_wants_every_seed_and_a_paired_test(a, b, factor, holds):
    assert below(a, b, factor) is holds
    negative = ([-x for x in a], [-x for x in b])
    assert above(*negative, factor) is holds                                     # whoever diverged loses here too


def test_p_is_that_of_the_paired_t_test():
    a, b = [1.0, 5.0, 9.0, 2.0], [1.1, 5.3, 9.1, 2.2]
    gaps = [x - y for x, y in zip(a, b)]
    t = 0.175 / (torch.tensor(gaps).double().std() / 2).item()
    assert t == pytest.approx(3.6556, abs=1e-3)
    assert claims.p_value(gaps) == pytest.approx(0.0354, abs=2e-4)               # of a table, 3 degrees of freedom


def test_below_of_other_seeds_is_a_mistake():
    with pytest.raises(ValueError, match="seeds"):
        below([1.0, 2.0, 3.0], [2.0, 3.0])
