"""NCSN: Generative Modeling by Estimating Gradients of the Data Distribution (Song, Ermon 2019, arXiv 1907.05600).

Convention: x_i = x_0 + sigma_i z: noise is added and the data are not shrunk. The noise level i runs from the largest
noise (0) to the smallest (L - 1), the way sampling goes, and is fed to the network as that integer; the paper counts
from 1 to L. A network's output is the score, the gradient of log q_i(x), not the noise.
Images are (B, C, H, W) in [0, 1] in this lesson, as the noise levels and the step size of the paper ask; the loader
gives [-1, 1] and `dequantise` converts once, `from_unit` goes back. i is (B,) int64.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import earlier  # lesson 05: UNet
from earlier import MLP, noise_like, wide  # lesson 01


# ------------------------------------------------------------------ the process: Sections 2 to 4 of the paper
def langevin_step(x, score, alpha, z):
    """One step of Langevin dynamics, Eq. (4) and Alg. 1, line 6: x + alpha / 2 score + sqrt(alpha) z. (B, ...)."""
    return x + alpha / 2 * score + math.sqrt(alpha) * z


class NCSN(nn.Module):
    """The noise levels, denoising score matching, annealed Langevin dynamics (Sec. 4). Holds no weights.

    sigma_1, sigma_L: the largest and the smallest deviation of the noise; levels: L, a geometric sequence of them.
    """
    def __init__(self, sigma_1=1.0, sigma_L=0.01, levels=10):
        super().__init__()
        if levels < 1 or not 0 < sigma_L <= sigma_1 or levels == 1 and sigma_1 != sigma_L:
            raise ValueError(f"levels={levels} must be at least 1, and sigma_L={sigma_L} above 0 and not above sigma_1="
                             f"{sigma_1}; for a single level the two must be equal")
        self.levels = levels
        sigmas = torch.linspace(math.log(sigma_1), math.log(sigma_L), levels, dtype=torch.float64).exp()
        self.register_buffer("sigmas", sigmas, persistent=False)            # (L,), each ratio the same

    # ------------------------------------------------------------------ noise: Section 4.1
    def q_sample(self, x0, i, z):
        """x_i ~ N(x_0, sigma_i^2 I) with the given noise, Sec. 4.1. x0, z (B, ...) -> (B, ...)."""
        return x0 + wide(self.sigmas[i], x0) * z

    def score(self, net, x, i):
        """s_theta(x, sigma_i), Sec. 4.1, the network's estimate of the gradient of log q_i(x). (B, ...)."""
        return net(x, i)

    def denoised(self, x, score, i):
        """E[x_0 | x_i], if this is the score: Eq. (5) at its least, solved for x_0 (Tweedie's formula). (B, ...)."""
        return x + wide(self.sigmas[i] ** 2, x) * score

    # ------------------------------------------------------------------ training: Section 4.2
    def level_losses(self, net, x0, i, z):
        """lambda(sigma_i) l(theta; sigma_i), Eq. (5), with lambda = sigma_i^2. x0, z (B, ...) -> (B,).

        sigma^2 1/2 |s + z / sigma|^2 is 1/2 |sigma s + z|^2: alike in size at all levels.
        Differs from the paper: divided by the number of pixels, so that an output of 0 has the loss 1/2.
        """
        score = self.score(net, self.q_sample(x0, i, z), i)
        return 0.5 * (wide(self.sigmas[i], x0) * score + z).square().flatten(1).mean(1)

    def loss(self, net, x0):
        """One draw of the loss, Eq. (6): noise each example to a level of its own. x0 (B, ...) -> scalar."""
        i = torch.randint(self.levels, (len(x0),), device=x0.device)
        return self.level_losses(net, x0, i, torch.randn_like(x0)).mean()

    # ------------------------------------------------------------------ sampling: Section 4.3
    def start(self, n, shape, generator=None):
        """Where a chain begins, Alg. 1, line 1: uniform noise in [0, 1]. (n, *shape). generator as in `noise_like`."""
        if isinstance(generator, list):
            x = torch.stack([torch.rand(shape, generator=one) for one in generator])
        else:
            x = torch.rand(n, *shape, generator=generator)
        return x.to(self.sigmas.device)

    def step_size(self, i, epsilon):
        """alpha_i = epsilon sigma_i^2 / sigma_L^2, Alg. 1, line 3. A number."""
        return epsilon * (self.sigmas[i] / self.sigmas[-1]).item() ** 2

    @torch.no_grad()
    def anneal(self, net, x, steps=100, epsilon=2e-5, generator=None, known=None, mask=None):
        """Algorithm 1 from the start x. Yields (i, x, estimate of x_0) after every step; the last x is the sample.

        steps: T, Langevin steps at each of the L levels, L T network calls in all. epsilon: step size at the last level
        known, mask: inpainting (Sec. 5): where the mask is true, x is `known`, noised to the level (once a level)
        """
        if steps < 1:
            raise ValueError(f"steps={steps} must be at least 1")
        for level in range(self.levels):                                    # Alg. 1, line 2
            alpha = self.step_size(level, epsilon)                          # Alg. 1, line 3
            i = torch.full((len(x),), level, device=x.device)
            if mask is not None:
                noised = self.q_sample(known, i, noise_like(known, generator))
                x = torch.where(mask, noised, x)
            for _ in range(steps):                                          # Alg. 1, line 4
                score = self.score(net, x, i)
                x0 = self.denoised(x, score, i)
                x = langevin_step(x, score, alpha, noise_like(x, generator))
                if mask is not None:
                    x = torch.where(mask, noised, x)
                yield level, x, x0                                          # x is clipped nowhere on its way

    def sample(self, net, n, steps=100, epsilon=2e-5, shape=(1, 28, 28), generator=None):
        """n images drawn with Algorithm 1, (n, C, H, W) in about [0, 1]."""
        for _, x, _ in self.anneal(net, self.start(n, shape, generator), steps, epsilon, generator):
            pass
        return x

    def inpaint(self, net, known, mask, steps=100, epsilon=2e-5, generator=None):
        """Images (B, C, H, W) that agree with `known` where the mask (bool) is true (Sec. 5)."""
        start = self.start(len(known), known.shape[1:], generator)
        for _, x, _ in self.anneal(net, start, steps, epsilon, generator, known, mask):
            pass
        return torch.where(mask, known, x)


def dequantise(x0):
    """The loader's images in [-1, 1] -> [0, 1) (Sec. 5), each grey level spread over its 1/256: a density exists."""
    grey = (x0 + 1) * 127.5                                                 # 0, 1, ..., 255
    return (grey + torch.rand_like(grey)) / 256


def from_unit(x):
    """Images of this lesson, in [0, 1] (Sec. 5) -> [-1, 1], as the rest of the course has them."""
    return 2 * x - 1


# ------------------------------------------------------------------ the network: Appendix A of the paper
class InstanceNormPlus(nn.Module):
    """Conditional instance normalisation++ (App. A): every noise level i has gamma, alpha, beta for each channel.

    gamma (h + alpha m) + beta: h is the map less its mean, over its deviation; m is that mean, less the mean of all
    channels' means and over their deviation. Without m, normalising would lose how bright a map was.
    """
    def __init__(self, levels, channels):
        super().__init__()
        self.embed = nn.Embedding(levels, 3 * channels)
        nn.init.normal_(self.embed.weight[:, :2 * channels], 1, 0.02)       # gamma, alpha, as in the official code
        nn.init.zeros_(self.embed.weight[:, 2 * channels:])                 # beta

    def forward(self, x, i):
        """x (B, C, H, W), i (B,) int -> (B, C, H, W). Statistics of each image alone, in training as in sampling."""
        gamma, alpha, beta = self.embed(i)[:, :, None, None].chunk(3, dim=1)                       # (B, C, 1, 1) each
        mean = x.mean(dim=(2, 3), keepdim=True)                                                    # (B, C, 1, 1)
        m = (mean - mean.mean(1, keepdim=True)) / (mean.var(1, keepdim=True) + 1e-5).sqrt()
        return torch.addcmul(gamma * alpha * m + beta, gamma, F.instance_norm(x))


def conv(c_in, c_out, dilation=1):
    """A 3 x 3 convolution that keeps the resolution (App. A); its taps stand `dilation` positions apart."""
    return nn.Conv2d(c_in, c_out, 3, padding=dilation, dilation=dilation)


class ResBlock(nn.Module):
    """Normalisation, ELU, convolution, twice, beside a shortcut (App. A). down: means of 2 x 2 halve the resolution."""
    def __init__(self, norm, c_in, c_out, dilation=1, down=False):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), conv(c_in, c_in, dilation)
        self.norm2, self.conv2 = norm(c_in), conv(c_in, c_out, dilation)
        self.pool = nn.AvgPool2d(2) if down else nn.Identity()
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, i):
        """x (B, c_in, H, W), i (B,) int -> (B, c_out, H, W), or half as high and wide."""
        h = self.conv1(F.elu(self.norm1(x, i)))
        h = self.conv2(self.pool(F.elu(self.norm2(h, i))))
        return self.skip(self.pool(x)) + h


class Refine(nn.Module):
    """Fuse a stage's map with the refined map of the stage below it, maybe coarser; then a residual block (App. A)."""
    def __init__(self, norm, c_fine, c_coarse):
        super().__init__()
        self.norm_fine, self.fine = norm(c_fine), conv(c_fine, c_fine)
        self.norm_coarse, self.coarse = norm(c_coarse), conv(c_coarse, c_fine)
        self.block = ResBlock(norm, c_fine, c_fine)

    def forward(self, fine, coarse, i):
        """fine (B, c_fine, H, W), coarse (B, c_coarse, H', W'), i (B,) int -> (B, c_fine, H, W)."""
        h, up = self.fine(self.norm_fine(fine, i)), self.coarse(self.norm_coarse(coarse, i))
        if up.shape != h.shape:
            up = F.interpolate(up, h.shape[2:], mode="bilinear", align_corners=True)
        return self.block(h + up, i)


class ScoreNet(nn.Module):
    """A small dilated U-Net with the paper's normalisation: down, then each map refined by the one below (App. A).

    levels: rows of gamma, alpha, beta in every normalisation. channels, blocks: width and residual blocks of each stage
    dilations: of its convolutions; a stage with dilation 1, but for the first, halves the resolution
    patch: the image, image_size high, with image_channels, enters as patch x patch pixels a position (the paper: 1)
    """
    def __init__(self, levels=10, channels=(64, 128, 128, 128), dilations=(1, 1, 2, 4), blocks=2, patch=1,
                 image_size=28, image_channels=1):
        super().__init__()
        if len(channels) != len(dilations):
            raise ValueError(f"channels={channels} and dilations={dilations} must name the same stages")
        if image_size % patch:
            raise ValueError(f"image_size={image_size} cannot be split into patches of {patch}")
        self.levels, self.patch, c = levels, patch, channels[0]
        self.stem = conv(image_channels * patch ** 2, c)
        self.stages, self.refine = nn.ModuleList(), nn.ModuleList()
        for stage, (width, dilation) in enumerate(zip(channels, dilations)):
            down = stage > 0 and dilation == 1
            self.stages.append(nn.ModuleList([ResBlock(self.normalised, c, width, dilation, down)]))
            self.stages[-1].extend(ResBlock(self.normalised, width, width, dilation) for _ in range(blocks - 1))
            c = width
        for width in reversed(channels[:-1]):
            self.refine.append(Refine(self.normalised, width, c))
            c = width
        self.norm, self.out = self.normalised(c), conv(c, image_channels * patch ** 2)

    def normalised(self, channels):
        """The normalisation of a map with so many channels (App. A)."""
        return InstanceNormPlus(self.levels, channels)

    def forward(self, x, i):
        """x (B, C, H, W) in about [0, 1], i (B,) int -> the score, (B, C, H, W)."""
        x = rearrange(2 * x - 1, "b c (h p) (w q) -> b (c p q) h w", p=self.patch, q=self.patch)
        h, maps = self.stem(x), []
        for stage in self.stages:
            for block in stage:
                h = block(h, i)
            maps.append(h)
        h = maps.pop()
        for refine in self.refine:
            h = refine(maps.pop(), h, i)
        h = self.out(F.elu(self.norm(h, i)))
        return rearrange(h, "b (c p q) h w -> b c (h p) (w q)", p=self.patch, q=self.patch)


# ------------------------------------------------------------------ the network of this lesson's minutes
class UNet(earlier.UNet):
    """The score as -z / sigma_i, where z is a prediction of the noise in an image: the least of Eq. (5).

    Differs from the paper, whose network is `ScoreNet`: what predicts the noise, told the level, is the U-Net of a
    later paper, explained in lesson 05, because it learns more in minutes. Its output is about as large at all levels,
    where a score grows to 1 / sigma_L, and so is its input, once divided by its expected size.
    sigmas (L,): of the process; the other values are those of lesson 05.
    """
    def __init__(self, sigmas, **unet):
        super().__init__(**unet)
        self.register_buffer("sigmas", sigmas.float(), persistent=False)

    def forward(self, x, i):
        """x (B, C, H, W) in about [0, 1], i (B,) int -> the score, (B, C, H, W)."""
        sigma = self.sigmas[i]
        x = from_unit(x) / wide((1 + (2 * sigma) ** 2).sqrt(), x)          # images in [-1, 1]: twice the noise
        return -super().forward(x, 1000 * i / len(self.sigmas)) / wide(sigma, x)        # times that it can tell apart


def network(ncsn, sections):
    """The network that one of these sections of values describes: `unet`, or `scorenet`, the paper's (App. A)."""
    if "unet" in sections:
        return UNet(ncsn.sigmas, **sections["unet"])
    return ScoreNet(ncsn.levels, **sections["scorenet"])


# ------------------------------------------------------------------ points in the plane, of which everything is known
# Adapted from lesson_01/model.py: Mixture -- noise is added without shrinking the data, and the answer is the score
class Mixture(nn.Module):
    """K Gaussians N(mean_k, std^2 I), noised by `ncsn` (Sec. 3.2). Called like a network: the exact score of q_i."""
    def __init__(self, ncsn, means, weights, std=1.0):
        super().__init__()
        self.std = std
        self.register_buffer("sigmas", ncsn.sigmas, persistent=False)
        self.register_buffer("means", torch.as_tensor(means, dtype=torch.float64), persistent=False)
        self.register_buffer("weights", torch.as_tensor(weights, dtype=torch.float64), persistent=False)

    def draw(self, n, generator=None):
        """n data points of the mixture of Sec. 3.2, (n, D)."""
        means = self.means[torch.multinomial(self.weights, n, replacement=True, generator=generator)].float()
        return means + self.std * noise_like(means, generator)

    def variance(self, i):
        """Of each Gaussian at the level i (Sec. 4.1): the data's own and the noise. (B, 1)."""
        return (self.std ** 2 + self.sigmas[i] ** 2)[:, None]

    def log_joint(self, x, i):
        """log of w_k N(x; mean_k, variance), Sec. 4.1: x together with the Gaussian it came from. (B, K)."""
        distance2 = torch.cdist(x.double(), self.means, compute_mode="donot_use_mm_for_euclid_dist").square()
        normal = -distance2 / (2 * self.variance(i)) - x.shape[1] / 2 * (2 * math.pi * self.variance(i)).log()
        return self.weights.log() + normal

    def log_q(self, x, i):
        """log q_i(x), the density of the noised data (Sec. 4.1). (B,) float64."""
        return self.log_joint(x, i).logsumexp(1)

    def forward(self, x, i):
        """The gradient of log q_i(x): towards each mean, by the share of that Gaussian in x. (B, D)."""
        share = self.log_joint(x, i).softmax(1)                                                    # (B, K)
        return ((share @ self.means - x.double()) / self.variance(i)).to(x.dtype)


def two_clouds(ncsn, weight=0.8):
    """A large cloud at (5, 5), a small one at (-5, -5), deviation 1 (Sec. 3.2): between them lies almost nothing."""
    return Mixture(ncsn, [[5.0, 5.0], [-5.0, -5.0]], [weight, 1 - weight])
