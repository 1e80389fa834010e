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
from einops import rearrange
from torch import nn


# ------------------------------------------------------------------ Techniques 1, 2 and 4: each number computed
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


def overlap(gamma, dim):
    """What Technique 2 sets to 0.5: how much of level i lies where level i - 1 has its samples.

    In `dim` dimensions the radius of N(0, sigma^2 I) is close to N(sqrt(dim) sigma, sigma^2 / 2): a thin shell. This
    is the mass of shell i within three deviations of shell i - 1, for gamma = sigma_{i-1} / sigma_i.
    """
    distance = math.sqrt(2 * dim) * (gamma - 1)
    return normal_cdf(distance + 3 * gamma) - normal_cdf(distance - 3 * gamma)


def spacing(dim, mass=0.5):
    """Technique 2: the gamma whose overlap is `mass`. Falls from 0.997 at gamma = 1, so bisection finds it."""
    if math.sqrt(2 * dim) <= 6:
        raise ValueError(f"dim={dim}: in so few dimensions there is no shell and the overlap need not fall")
    return bisect(lambda gamma: overlap(gamma, dim) - mass, 1.0, 3.0)


def noise_levels(sigma_1, sigma_L, gamma):
    """The geometric sequence from sigma_1 to sigma_L whose ratio comes closest to gamma. (L,) float64."""
    if not 0 < sigma_L < sigma_1:
        raise ValueError(f"sigma_L={sigma_L} must be above 0 and below sigma_1={sigma_1}")
    count = max(2, round(1 + math.log(sigma_1 / sigma_L) / math.log(gamma)))
    return torch.logspace(math.log10(sigma_1), math.log10(sigma_L), count, dtype=torch.float64)


def variance_ratio(epsilon, sigma_L, gamma, T):
    """Variance after T Langevin steps at level i, in units of sigma_i^2, if it was sigma_{i-1}^2 before them.

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


def normal_cdf(x):
    """Phi(x)."""
    return math.erfc(-x / math.sqrt(2)) / 2


def bisect(function, low, high):
    """The zero of a function that falls from above to below 0 between low and high."""
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return low


# ------------------------------------------------------------------ the process
# Adapted from lesson_03/model.py: NCSN -- levels and step size follow from sigma_1 (Techniques 1, 2, 4); the score is
#   the output over sigma (Technique 3); a last denoising step; no inpainting
class NCSNv2(nn.Module):
    """The noise levels, denoising score matching, annealed Langevin dynamics. Holds no weights.

    sigma_1  the largest noise: `max_distance` of the training images (Technique 1)
    sigma_L  the smallest, which the eye does not see
    dim      numbers in an image: with the two above it decides how many levels there are (Technique 2)
    """

    def __init__(self, sigma_1, sigma_L=0.01, dim=784):
        super().__init__()
        self.register_buffer("sigmas", noise_levels(sigma_1, sigma_L, spacing(dim)), persistent=False)         # (L,)
        self.levels, self.gamma = len(self.sigmas), float(self.sigmas[0] / self.sigmas[1])

    # ------------------------------------------------------------------ noise
    # Copied from lesson_03/model.py: NCSN.q_sample
    def q_sample(self, x0, i, z):
        """x_i ~ N(x_0, sigma_i^2 I) with the given noise. x0, z (B, ...) -> (B, ...)."""
        return x0 + wide(self.sigmas[i], x0) * z

    # Adapted from lesson_03/model.py: NCSN.score -- Technique 3: the network does not see i, the division tells it
    def score(self, net, x, i):
        """s_theta(x, sigma_i) = s_theta(x) / sigma_i, the estimate of the gradient of log q_i(x). (B, ...)."""
        return net(x) / wide(self.sigmas[i], x)

    # Copied from lesson_03/model.py: NCSN.denoised
    def denoised(self, x, score, i):
        """E[x_0 | x_i] by Tweedie's formula, if this is the score. (B, ...)."""
        return x + wide(self.sigmas[i] ** 2, x) * score

    # ------------------------------------------------------------------ training
    # Copied from lesson_03/model.py: NCSN.loss
    def loss(self, net, x0):
        """One draw of the loss: noise each example to a level of its own. x0 (B, ...) -> scalar."""
        i = torch.randint(self.levels, (len(x0),), device=x0.device)
        return self.level_losses(net, x0, i, torch.randn_like(x0)).mean()

    # Copied from lesson_03/model.py: NCSN.level_losses
    def level_losses(self, net, x0, i, z):
        """1/2 |sigma s + z|^2, the same at every level for an output of 0: 1/2 a pixel. (B,)."""
        score = self.score(net, self.q_sample(x0, i, z), i)
        return 0.5 * (wide(self.sigmas[i], x0) * score + z).square().flatten(1).mean(1)

    # ------------------------------------------------------------------ sampling
    # Adapted from lesson_03/model.py: NCSN.anneal -- the step size is solved for; no inpainting
    @torch.no_grad()
    def anneal(self, net, x, steps=3, generator=None):
        """Annealed Langevin dynamics from the start x. Yields (i, x, estimate of x_0) after every step.

        steps  T, Langevin steps at each of the L levels; Technique 4 finds the step size that goes with it
        """
        if steps < 1:
            raise ValueError(f"steps={steps} must be at least 1")
        sigma_L = self.sigmas[-1].item()
        epsilon = solve_step_size(sigma_L, self.gamma, steps)
        for level in range(self.levels):
            alpha = epsilon * (self.sigmas[level].item() / sigma_L) ** 2
            i = torch.full((len(x),), level, device=x.device)
            for _ in range(steps):
                score = self.score(net, x, i)
                x0 = self.denoised(x, score, i)
                x = langevin_step(x, score, alpha, noise_like(x, generator))
                yield level, x, x0

    # Adapted from lesson_03/model.py: NCSN.sample -- a last denoising step
    @torch.no_grad()
    def sample(self, net, n, steps=3, shape=(1, 28, 28), denoise=True, generator=None):
        """n images from noise of the largest level, (n, C, H, W) in about [0, 1]: L T network calls, one to denoise."""
        for _, x, _ in self.anneal(net, self.start(n, shape, generator), steps, generator):
            pass
        return self.last_step(net, x) if denoise else x

    @torch.no_grad()
    def last_step(self, net, x):
        """x + sigma_L^2 s(x, sigma_L): takes off the noise of the last level, which Langevin dynamics leaves in."""
        i = torch.full((len(x),), self.levels - 1, device=x.device)
        return self.denoised(x, self.score(net, x, i), i)

    # Copied from lesson_03/model.py: NCSN.start
    def start(self, n, shape, generator=None):
        """Where a chain begins, Alg. 1, line 1: noise of the largest level. (n, *shape).

        Differs from the paper, which starts from uniform noise in [0, 1]. With sigma_1 from the data either start is
        forgotten; noise of sigma_1 = 1 does not hide a mean of 0.5, and that of digits is 0.13.
        """
        return self.sigmas[0].item() * torch.randn(n, *shape, generator=generator).to(self.sigmas.device)


# Adapted from lesson_03/model.py: langevin_step -- alpha and sqrt(2 alpha): what Technique 4 is solved for
def langevin_step(x, score, alpha, z):
    """One step of Langevin dynamics: x + alpha score + sqrt(2 alpha) z. Lesson 03's alpha is twice this one."""
    return x + alpha * score + math.sqrt(2 * alpha) * z


# Copied from lesson_01/model.py: wide
def wide(values, x):
    """(B,) -> (B, 1, ...) in the precision of x, to multiply a batch x with."""
    return values.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


# Copied from lesson_01/model.py: noise_like
def noise_like(x, generator=None):
    """Standard Gaussian noise. A CPU generator gives the same noise on every device."""
    if generator is None:
        return torch.randn_like(x)
    return torch.randn(x.shape, generator=generator).to(x.device)


# Copied from lesson_03/model.py: dequantise
def dequantise(x0):
    """The loader's images in [-1, 1] -> [0, 1), every grey level spread evenly over its 1/256: a density exists."""
    grey = (x0 + 1) * 127.5                                                 # 0, 1, ..., 255
    return (grey + torch.rand_like(grey)) / 256


def to_unit(x):
    """Images in [-1, 1] -> [0, 1], as they are: for measurements, where `dequantise` would add chance."""
    return (x + 1) / 2


# Copied from lesson_03/model.py: from_unit
def from_unit(x):
    """Images of this lesson, in [0, 1] -> [-1, 1], as the rest of the course has them."""
    return 2 * x - 1


# ------------------------------------------------------------------ the network
# Adapted from lesson_03/model.py: ScoreNet -- unconditional: the network is not told the noise level (Technique 3)
class ScoreNet(nn.Module):
    """A small dilated U-Net with instance normalisation++: stages down, then each map refined by the one below it.

    channels   width of each stage
    dilations  of each stage's convolutions; a stage with dilation 1, but for the first, halves the resolution
    blocks     residual blocks a stage
    patch      the image enters as patch x patch pixels a position (1: as in the paper)
    """

    def __init__(self, channels=(64, 128, 128, 128), dilations=(1, 1, 2, 4), blocks=2, patch=1, image_channels=1):
        super().__init__()
        if len(channels) != len(dilations):
            raise ValueError(f"channels={channels} and dilations={dilations} must name the same stages")
        self.patch, c = patch, channels[0]
        self.stem = conv(image_channels * patch ** 2, c)
        self.stages, self.refine = nn.ModuleList(), nn.ModuleList()
        for stage, (width, dilation) in enumerate(zip(channels, dilations)):
            down = stage > 0 and dilation == 1
            self.stages.append(nn.Sequential(ResBlock(c, width, dilation, down)))
            self.stages[-1].extend(ResBlock(width, width, dilation) for _ in range(blocks - 1))
            c = width
        for width in reversed(channels[:-1]):
            self.refine.append(Refine(width, c))
            c = width
        self.norm, self.out = InstanceNormPlus(c), conv(c, image_channels * patch ** 2)

    def forward(self, x):
        """x (B, C, H, W), in [0, 1] before the noise -> the score times sigma, (B, C, H, W)."""
        x = rearrange(2 * x - 1, "b c (h p) (w q) -> b (c p q) h w", p=self.patch, q=self.patch)
        h, maps = self.stem(x), []
        for stage in self.stages:
            h = stage(h)
            maps.append(h)
        h = maps.pop()
        for refine in self.refine:
            h = refine(maps.pop(), h)
        h = self.out(F.elu(self.norm(h)))
        return rearrange(h, "b (c p q) h w -> b c (h p) (w q)", p=self.patch, q=self.patch)


# Adapted from lesson_03/model.py: InstanceNormPlus -- unconditional, and m is measured by the deviation of the maps
class InstanceNormPlus(nn.Module):
    """Instance normalisation++: gamma (h + alpha m) + beta, with gamma, alpha, beta of its own for each channel.

    h is the map less its mean, over its deviation; m is that mean, less the mean of all channels' means. Without m,
    normalising would lose how bright a map was.
    Differs from the paper: m is divided by the deviation of the maps, not by that of the means. A network that is not
    told sigma has to see how large a mean is beside the noise, or the brightness of the samples drifts.
    """

    def __init__(self, channels):
        super().__init__()
        self.embed = nn.Parameter(torch.empty(3, channels, 1, 1))
        nn.init.normal_(self.embed[:2], 1, 0.02)                            # gamma, alpha, as in the official code
        nn.init.zeros_(self.embed[2:])                                      # beta

    def forward(self, x):
        """(B, C, H, W) -> (B, C, H, W). Statistics of each image alone, in training as in sampling."""
        gamma, alpha, beta = self.embed                                                            # (C, 1, 1) each
        mean = x.mean(dim=(2, 3), keepdim=True)                                                    # (B, C, 1, 1)
        variance = x.square().mean(dim=(1, 2, 3), keepdim=True) - mean.square().mean(1, keepdim=True)
        m = (mean - mean.mean(1, keepdim=True)) / (variance + 1e-5).sqrt()                         # (B, C, 1, 1)
        return torch.addcmul(gamma * alpha * m + beta, gamma, F.instance_norm(x))


# Adapted from lesson_03/model.py: ResBlock -- unconditional
class ResBlock(nn.Module):
    """Normalisation, ELU, convolution, twice, beside a shortcut. down: half the resolution, by averaging 2 x 2."""

    def __init__(self, c_in, c_out, dilation=1, down=False):
        super().__init__()
        self.norm1, self.conv1 = InstanceNormPlus(c_in), conv(c_in, c_in, dilation)
        self.norm2, self.conv2 = InstanceNormPlus(c_in), conv(c_in, c_out, dilation)
        self.pool = nn.AvgPool2d(2) if down else nn.Identity()
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        """(B, c_in, H, W) -> (B, c_out, H, W), or half as high and wide."""
        h = self.conv1(F.elu(self.norm1(x)))
        h = self.conv2(self.pool(F.elu(self.norm2(h))))
        return self.skip(self.pool(x)) + h


# Adapted from lesson_03/model.py: Refine -- unconditional
class Refine(nn.Module):
    """Fuse a stage's map with the refined map of the stage below it, which may be coarser; then a residual block."""

    def __init__(self, c_fine, c_coarse):
        super().__init__()
        self.norm_fine, self.fine = InstanceNormPlus(c_fine), conv(c_fine, c_fine)
        self.norm_coarse, self.coarse = InstanceNormPlus(c_coarse), conv(c_coarse, c_fine)
        self.block = ResBlock(c_fine, c_fine)

    def forward(self, fine, coarse):
        """fine (B, c_fine, H, W), coarse (B, c_coarse, H', W') -> (B, c_fine, H, W)."""
        h, up = self.fine(self.norm_fine(fine)), self.coarse(self.norm_coarse(coarse))
        if up.shape != h.shape:
            up = F.interpolate(up, h.shape[2:], mode="bilinear", align_corners=True)
        return self.block(h + up)


# Copied from lesson_03/model.py: conv
def conv(c_in, c_out, dilation=1):
    """A 3 x 3 convolution that keeps the resolution."""
    return nn.Conv2d(c_in, c_out, 3, padding=dilation, dilation=dilation)
