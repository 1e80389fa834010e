"""How good are the digits? FID, KID, precision, recall and label accuracy, by two small frozen classifiers.

One judge gives the features that distances are measured in; the other one, of another width and seed, judges
labels, so that no score is graded by the network it was tuned on. `tools/judges.py` trains both; their weights
are `judges.safetensors`, beside this file. Never train or guide a model with a judge.

These distances are in the judges' own feature space: they compare models of this course at equal n and say
nothing beside the Inception FID of a paper.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from .data import digits
from .errors import UserError
from .files import ROOT
from .images import check_finite

JUDGES = ROOT / "utils" / "judges.safetensors"
WIDTHS = {"features": 24, "labels": 20}                # two judges, told apart by width and seed


class Judge(nn.Module):
    """A digit classifier on 28 x 28 images in [-1, 1]: five convolutions, 64 features, 10 logits."""

    def __init__(self, width):
        super().__init__()

        def block(c_in, c_out):
            return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())

        self.first = nn.Sequential(nn.PixelUnshuffle(2), block(4, width))                     # (B, w, 14, 14)
        self.body = nn.Sequential(block(width, 2 * width), nn.MaxPool2d(2),                   # (B, 2w, 7, 7)
                                  block(2 * width, 2 * width), block(2 * width, 4 * width),   # (B, 4w, 7, 7)
                                  nn.MaxPool2d(2), block(4 * width, 4 * width))               # (B, 4w, 3, 3)
        self.embed = nn.Linear(4 * width * 9, 64)
        self.classify = nn.Linear(64, 10)

    def features(self, x):
        """(B, 1, 28, 28) -> (B, 64): what FID, KID, precision and recall are measured in."""
        return self.embed(self.body(self.first(x)).flatten(1))

    def low_features(self, x):
        """(B, 1, 28, 28) -> (B, 2 w): mean and deviation of each map of the first layer; sees faint noise."""
        maps = self.first(x).flatten(2)
        return torch.cat([maps.mean(2), maps.std(2)], dim=1)

    def forward(self, x):
        """(B, 1, 28, 28) -> logits (B, 10)."""
        return self.classify(F.relu(self.features(x)))


@functools.cache
def judge(name):
    """The frozen judge "features" or "labels", on the CPU, in evaluation mode."""
    from safetensors.torch import load_file

    if not JUDGES.is_file():
        raise UserError(f"{JUDGES} is missing: get it back with `git checkout utils/judges.safetensors`, "
                        "or train it anew with `python -m tools.judges`")
    weights = {key.removeprefix(name + "."): value.float() for key, value in load_file(JUDGES).items()
               if key.startswith(name + ".")}
    model = Judge(WIDTHS[name])
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def features(x, low=False):
    """Features of images x (N, 1, 28, 28) in [-1, 1], clipped first: (N, 64) float32 on the CPU.

    In units in which the variance over the test set is 1: on the mean of the 64, so that their geometry stays; for
    each one with low=True (first-layer statistics, (N, 48)).
    """
    return _raw_features(x, low) / _unit(low)


@torch.no_grad()
def _raw_features(x, low, batch_size=500):
    model = judge("features")
    function = model.low_features if low else model.features
    return torch.cat([function(part.cpu().float().clamp(-1, 1)) for part in x.split(batch_size)])


@functools.cache
def _raw_test_features(low):
    return _raw_features(digits("test").first(10_000)[0], low)


@functools.cache
def _unit(low):
    variance = _raw_test_features(low).var(0)
    return variance.sqrt() if low else variance.mean().sqrt()


@torch.no_grad()
def classify(x, batch_size=500):
    """The digit that the label judge reads in each image, (N,) int64, and its probability, (N,)."""
    model = judge("labels")
    probability = torch.cat([model(part.cpu().float().clamp(-1, 1)).softmax(1) for part in x.split(batch_size)])
    confidence, digit = probability.max(1)
    return digit, confidence


def statistics(feature):
    """Mean (D,) and covariance (D, D) of features (N, D), float64, in the form that `fid` takes."""
    feature = feature.double()
    return {"mu": feature.mean(0).numpy(), "sigma": torch.cov(feature.T).numpy()}


def fid(feature, reference):
    """Frechet distance between Gaussians fitted to two sets of features, by torch-fidelity."""
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    result = fid_statistics_to_metric(statistics(feature), statistics(reference), verbose=False)
    return float(result["frechet_inception_distance"])


@functools.cache
def _test_features(low=False):
    return _raw_test_features(low) / _unit(low)


def fid_to_test(x, low=False):
    """FID of images x (N, 1, 28, 28) against the 10,000 test images; low=True: of first-layer statistics."""
    check_finite(x)
    return fid(features(x, low), _test_features(low))


@functools.cache
def floor(n, low=False, seeds=3):
    """The FID of n random training images against the test set, mean over `seeds` draws: nothing does better."""
    train = digits("train")
    return sum(fid_to_test(train.first(n, shuffle_seed=seed)[0], low) for seed in range(seeds)) / seeds


def check_number(n):
    """UserError if n images are too few to score, or more than there are images to compare them with."""
    if not 100 <= n <= 60_000:
        raise UserError(f"scores (metrics=true) need 100 to 60000 images, not n={n}")


def score(x, labels=None):
    """All scores of images x (N, 1, 28, 28) against MNIST's test set, as a dict of plain numbers.

    fid, fid_low, kid, precision, recall, each with n and the FID's floor at that n; `confidence`, the label
    judge's mean probability; `classes`, the share of each digit; `accuracy`, if labels (N,) were asked for.
    """
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    n = len(x)
    check_finite(x)
    check_number(n)
    feature, reference = features(x), _test_features()
    kid = kid_features_to_metric(feature, reference, kid_subsets=50, kid_subset_size=min(1000, n), verbose=False,
                                 rng_seed=0)
    sample = reference[:n]                             # the manifolds of precision and recall at equal n
    prc = prc_features_to_metric(feature, sample, verbose=False)       # generated images first
    digit, confidence = classify(x)
    result = {
        "n": n,
        "fid": fid(feature, reference), "fid_floor": floor(n),
        "fid_low": fid_to_test(x, low=True), "fid_low_floor": floor(n, low=True),
        "kid": float(kid["kernel_inception_distance_mean"]),
        "precision": float(prc["precision"]), "recall": float(prc["recall"]),
        "confidence": float(confidence.mean()),
        "classes": [round(float((digit == k).float().mean()), 4) for k in range(10)],
    }
    if labels is not None:
        result["accuracy"] = float((digit == labels.cpu()).float().mean())
    return result


def report(scores):
    """The scores of `score` as lines to print: every number beside what makes it readable."""
    lines = [f"FID        {scores['fid']:.3f}   (n = {scores['n']}; floor at this n {scores['fid_floor']:.3f}; "
             "features of this course's judge, not Inception)",
             f"FID-low    {scores['fid_low']:.3f}   (first-layer statistics; floor {scores['fid_low_floor']:.3f})",
             f"KID        {scores['kid']:.5f}",
             f"precision  {scores['precision']:.3f}   recall {scores['recall']:.3f}   (k = 3)",
             f"confidence {scores['confidence']:.3f}   of the label judge"]
    if "accuracy" in scores:
        lines.append(f"accuracy   {scores['accuracy']:.3f}   of the labels asked for")
    return "\n".join(lines)
