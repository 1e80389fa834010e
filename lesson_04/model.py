"""NCSNv2: Improved Techniques for Training Score-Based Generative Models (Song, Ermon 2020, arXiv 2006.09011).

Convention: x_i = x_0 + sigma_i z: noise is added and the data are not shrunk. The noise level i runs from the largest
noise (0) to the smallest (L - 1), the way sampling goes; the paper counts from 1 to L. The network is not told i: its
output is the score times sigma_i, and nothing else depends on the level.
Images are (B, C, H, W) in [0, 1] in this lesson, as the largest distance and the step size ask; the loader gives
[-1, 1] and `dequantise` converts once, `from_unit` goes back. i is (B,) int64.
"""

import math

import torch
import torch.nn.functional as F

import earlier  # lesson 05: UNet
from earlier import NCSN, dequantise, from_unit  # lesson 03
from earlier import image, linear  # lesson 05
from earlier import wide  # lesson 01


# ------------------------------------------------------------------ Techniques 1, 2 and 4: each number computed
def to_unit(x):
    """Images in [-1, 1] -> [0, 1], the range of Technique 1, as they are: `dequantise` would add chance."""
    return (x + 1) / 2


def max_distance(x, block=1000):
    """Technique 1: sigma_1 is the largest Euclidean distance between two images. x (N, C, H, W) in [0, 1] -> float.

    Exact, but few of the N^2 pairs are looked at: pixels are not negative, so |x - y|^2 <= |x|^2 + |y|^2, and a
    pair whose bound is below what was found is passed over. Sorted by norm, those are whole blocks.
    """
    x = x.flatten(1)
    if x.min() < 0:
        raise ValueError("pixels must not be negative: the bound needs images in [0, 1]")
    x = x[x.square().sum(1).argsort(descending=True)]
    norm2, best = x.square().sum(1), x.new_zeros(())                        # (N,), the largest square so far
    for i in range(0, len(x), block):
        for j in range(i, len(x), block):
            if norm2[i] + norm2[j] <= best:
                break                                                       # and so are all that follow
            a, b = slice(i, i + block), slice(j, j + block)
            best = torch.maximum(best, (norm2[a, None] + norm2[b] - 2 * x[a] @ x[b].T).max())
    return float(best.sqrt())


def normal_cdf(x):
    """Phi(x), the mass of a unit Gaussian below x, for Technique 2. A number."""
    return math.erfc(-x / math.sqrt(2)) / 2


def overlap(gamma, dim):
    """What Technique 2 sets to 0.5: how much of level i lies where level i - 1 has its samples. A number.

    In `dim` dimensions the radius of N(0, sigma^2 I) is close to N(sqrt(dim) sigma, sigma^2 / 2): a thin shell. This
    is the mass of shell i within three deviations of shell i - 1, for gamma = sigma_{i-1} / sigma_i.
    """
    distance = math.sqrt(2 * dim) * (gamma - 1)
    return normal_cdf(distance + 3 * gamma) - normal_cdf(distance - 3 * gamma)


def bisect(function, low, high):
    """The zero of a function that falls from above to below 0 between low and high, to solve Technique 2 with."""
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return low


def spacing(dim, mass=0.5):
    """Technique 2: the gamma whose overlap is `mass`. Falls from 0.997 at gamma = 1, so bisection finds it."""
    if math.sqrt(2 * dim) <= 6:
        raise ValueError(f"dim={dim}: in so few dimensions there is no shell and the overlap need not fall")
    return bisect(lambda gamma: overlap(gamma, dim) - mass, 1.0, 3.0)


def noise_levels(sigma_1, sigma_L, gamma):
    """Technique 2: the geometric sequence from sigma_1 to sigma_L whose ratio comes closest to gamma. (L,) float64."""
    if not 0 < sigma_L < sigma_1:
        raise ValueError(f"sigma_L={sigma_L} must be above 0 and below sigma_1={sigma_1}")
    count = max(2, round(1 + math.log(sigma_1 / sigma_L) / math.log(gamma)))
    return torch.logspace(math.log10(sigma_1), math.log10(sigma_L), count, dtype=torch.float64)


def variance_ratio(epsilon, sigma_L, gamma, T):
    """Variance after T Langevin steps at level i, in units of sigma_i^2, if it was sigma_{i-1}^2 before (Technique 4).

    For data that is a single point, so that the score is -x / sigma_i^2. It does not depend on i.
    """
    decay = 1 - epsilon / sigma_L ** 2                                      # of x in one step
    kappa = 2 * epsilon / (sigma_L ** 2 - sigma_L ** 2 * decay ** 2)        # the ratio after infinitely many steps
    return decay ** (2 * T) * (gamma ** 2 - kappa) + kappa


def solve_step_size(sigma_L, gamma, T):
    """Technique 4: the epsilon whose variance ratio is closest to 1. Too small: noise of level i - 1 is left.

    Too large: the steps overshoot. In between the ratio has one minimum, above 1; golden-section search finds it.
    """
    low, high, golden = 0.0, sigma_L ** 2, (math.sqrt(5) - 1) / 2
    for _ in range(100):
        a, b = high - golden * (high - low), low + golden * (high - low)
        if abs(variance_ratio(a, sigma_L, gamma, T) - 1) < abs(variance_ratio(b, sigma_L, gamma, T) - 1):
            high = b
        else:
            low = a
    return (low + high) / 2


# ------------------------------------------------------------------ the process
class NCSNv2(NCSN):
    """The noise levels, denoising score matching, annealed Langevin dynamics (Sec. 3 and 4). Holds no weights.

    Lesson 03's process, whose levels and step size follow from sigma_1 (Techniques 1, 2, 4), with a network that is
    not told the level (Technique 3) and a last denoising step.

    sigma_1  the largest noise: `max_distance` of the training images (Technique 1)
    sigma_L  the smallest, which the eye does not see
    dim      numbers in an image: with the two above it decides how many levels there are (Technique 2)
    """

    def __init__(self, sigma_1, sigma_L=0.01, dim=784):
        sigmas = noise_levels(sigma_1, sigma_L, spacing(dim))               # (L,)
        super().__init__(sigma_1, sigma_L, len(sigmas))
        self.sigmas, self.gamma = sigmas, float(sigmas[0] / sigmas[1])

    def score(self, net, x, i):
        """Technique 3: s_theta(x, sigma_i) = s_theta(x) / sigma_i, the estimate of the score of level i. (B, ...).

        The network does not see i: the division tells it. In the loss it cancels: 1/2 |sigma s + z|^2 is
        1/2 |s_theta(x) + z|^2.
        """
        return net(x) / wide(self.sigmas[i], x)

    def anneal(self, net, x, steps=3, generator=None):
        """Algorithm 1 from the start x. Yields (i, x, estimate of x_0) after every step.

        Its step is x + alpha score + sqrt(2 alpha) z, which is lesson 03's with an alpha twice as large.
        steps: T, Langevin steps at each of the L levels; Technique 4 finds the step size that goes with it
        """
        epsilon = solve_step_size(self.sigmas[-1].item(), self.gamma, steps)
        return super().anneal(net, x, steps, 2 * epsilon, generator)

    @torch.no_grad()
    def last_step(self, net, x):
        """x + sigma_L^2 s(x, sigma_L), the end of Alg. 1: takes off the noise of the last level. (B, ...).

        Langevin dynamics leaves that noise in.
        """
        i = torch.full((len(x),), self.levels - 1, device=x.device)
        return self.denoised(x, self.score(net, x, i), i)

    def sample(self, net, n, steps=3, shape=(1, 28, 28), denoise=True, generator=None):
        """n images drawn with Algorithm 1, (n, C, H, W) in about [0, 1]: L T network calls, and one to denoise.

        The start is lesson 03's, uniform noise in [0, 1], as in the paper; with sigma_1 from the data it is forgotten.
        """
        for _, x, _ in self.anneal(net, self.start(n, shape, generator), steps, generator):
            pass
        return self.last_step(net, x) if denoise else x


# ------------------------------------------------------------------ the network
class UNet(earlier.UNet):
    """Lesson 05's U-Net as s_theta(x) of Technique 3: it sees x and is told no level.

    Where the noise is large, -x over its root mean square is nearly the answer; where it is small, nothing of it. So
    the network is told how large x is, as lesson 05's is told the time, and learns from that how much of it to hand on.
    Differs from the paper, whose network is much like lesson 03's `ScoreNet`, with one row of normalisation weights for
    all levels, because this one learns more in minutes. The keys are those of lesson 05.
    """

    def __init__(self, **unet):
        super().__init__(**unet)
        self.gain = linear(self.width, 1, zero=True)

    def forward(self, x):
        """x (B, C, H, W), in [0, 1] before the noise -> the score times sigma (Technique 3), (B, C, H, W)."""
        x = 2 * x - 1
        size = x.float().square().flatten(1).mean(1).sqrt().clamp(min=1e-3)                        # (B,), about 1 to 40
        x, told = x / image(size), self.embed(250 * size.log())                                    # -50 to 920
        return self.body(x, told) - self.gain(F.silu(told))[:, :, None, None] * x
