"""DPM: Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al. 2015, arXiv 1503.03585).

Convention: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps; t runs from data (0) to noise (T - 1). The network is not
told t: it answers with the coefficients of a few bumps over time, and the process reads them out at t. The paper
counts t from 1 to T, the code from 0 to T - 1: t = 0 is the paper's x^(1), slightly noisy, and there a sample ends.
Data are standardised first: x_0 has mean 0 and variance 1. A batch x is (B, ...): points (B, 2), images
(B, 1, 28, 28) or bits (B, 20); t and s are (B,) int64, s earlier than t.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


# ------------------------------------------------------------------ the bound of any diffusion chain
class Chain(nn.Module):
    """The bound K on log p(x_0), for Gaussian and for binomial noise alike, estimated or summed over all times.

    A chain has timesteps, standardise, q_draw, kl and bits. t is never 0: q(x_{-1} | x_0, x_{-1}) has no width. That
    step is not learned; it is the forward kernel itself, and a sample ends before it.
    """

    def loss(self, net, x0):
        """Minus the bound, estimated at one time for each element. x0 (B, ...) as the data come -> scalar, bits."""
        x0 = self.standardise(x0)
        t = torch.randint(1, self.timesteps, (len(x0),), device=x0.device)
        kl = self.kl(net, x0, self.q_draw(x0, t), t)
        return -self.bits((self.timesteps - 1) * kl.mean())                 # a mean over T - 1 times, times T - 1

    @torch.no_grad()
    def bound(self, net, x0, generator=None):
        """The whole bound, every t evaluated once: (B,) bits, and its KL terms (B, T - 1), nats, t = 1 first."""
        x0, terms = self.standardise(x0, generator), []
        for i in range(1, self.timesteps):
            t = torch.full((len(x0),), i, device=x0.device)
            terms.append(self.kl(net, x0, self.q_draw(x0, t, generator), t))
        terms = torch.stack(terms, 1)
        return self.bits(terms.sum(1)), terms


# ------------------------------------------------------------------ Gaussian diffusion
# Adapted from lesson_01/model.py: Diffusion -- the reverse step has a learned mean and covariance and is trained with
#   the bound on the likelihood; the paper's schedule; a reverse step may be multiplied by r(x) (posteriors)
class DPM(Chain):
    """The forward process, the learned reverse step, the bound, the walk back. Holds the schedule and no weights.

    timesteps   T
    first       added to the variance of the first step, so that x^(1) hides the grey levels
    bumps       J, functions of time that the network's coefficients belong to
    mean, std   of the data, over all pixels; levels: grey levels from -1 to 1 (0: the data are continuous)
    """

    def __init__(self, timesteps=1000, first=1e-3, bumps=10, mean=0.0, std=1.0, levels=0):
        super().__init__()
        if timesteps < 3 or bumps < 2:
            raise ValueError(f"timesteps={timesteps} must be at least 3 and bumps={bumps} at least 2")
        self.timesteps, self.mean, self.std, self.levels = timesteps, mean, std, levels
        baseline = 1 / torch.linspace(timesteps, 2, timesteps, dtype=torch.float64)     # every step destroys the
        floor = torch.full_like(baseline, 1e-6)                                         # same part of x_0
        floor[0] += first
        # Differs from the paper: beta is fixed, as in the released code; the paper learns beta_2 to beta_T.
        beta = floor + baseline * (1 - floor - 1e-5)
        abar = torch.cumprod(1 - beta, dim=0)
        self.register_buffer("abar", torch.cat([abar, abar.new_ones(1)]), persistent=False)        # abar[-1] = 1
        self.register_buffer("basis", temporal_basis(timesteps, bumps), persistent=False)          # (T, J)

    def standardise(self, x0, generator=None):
        """Data for the chain: each grey level spread evenly over its width, then mean 0 and variance 1. (B, ...)."""
        if self.levels:                                     # without it the density of a flat background is infinite
            width = 2 / (self.levels - 1)
            x0 = x0 + width * (uniform_like(x0, generator) - 0.5)
        return (x0 - self.mean) / self.std

    def restore(self, x):
        """Back to the data's own units, [-1, 1] for images. (B, ...)."""
        return self.std * x + self.mean

    # ------------------------------------------------------------------ forward: data to noise
    # Copied from lesson_01/model.py: Diffusion.q_sample
    def q_sample(self, x0, t, eps):
        """x_t ~ q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I): all the steps from -1 to t in one jump."""
        return wide(self.abar[t].sqrt(), x0) * x0 + wide((1 - self.abar[t]).sqrt(), x0) * eps

    def q_draw(self, x0, t, generator=None):
        """x_t ~ q(x_t | x_0) with noise of its own. (B, ...)."""
        return self.q_sample(x0, t, noise_like(x0, generator))

    # Copied from lesson_01/model.py: Diffusion.beta
    def beta(self, t, s):
        """The variance that the steps from s to t add: beta_t for s = t - 1. (B,) float64."""
        return 1 - self.abar[t] / self.abar[s]

    # Copied from lesson_01/model.py: Diffusion.beta_tilde
    def beta_tilde(self, t, s):
        """The variance of q(x_s | x_t, x_0): 0 at s = -1, so no KL divergence can be taken there. (B,) float64."""
        return (1 - self.abar[s]) / (1 - self.abar[t]) * self.beta(t, s)

    # Adapted from lesson_01/model.py: Diffusion.q_posterior -- the two weights alone, to solve for x_0 as well
    def posterior_coefficients(self, t, s):
        """The mean of q(x_s | x_t, x_0) is a x_0 + b x_t. Two (B,) float64."""
        a = self.abar[s].sqrt() * self.beta(t, s) / (1 - self.abar[t])
        b = (1 - self.beta(t, s)).sqrt() * (1 - self.abar[s]) / (1 - self.abar[t])
        return a, b

    def q_posterior(self, x0, xt, t, s):
        """The mean of q(x_s | x_t, x_0), a point between x_t and x_0. (B, ...)."""
        a, b = self.posterior_coefficients(t, s)
        return wide(a, xt) * x0 + wide(b, xt) * xt

    # ------------------------------------------------------------------ reverse: the learned step
    def p_step(self, net, xt, t):
        """Mean and variance of p(x_{t-1} | x_t) for every pixel, by the temporal readout. Two (B, ...).

        Where z = 0 the step is the forward kernel, which leaves a unit Gaussian as it is.
        """
        z = torch.einsum("bkj...,bj->bk...", net(xt), self.basis[t].to(xt.dtype))                  # (B, 2, ...)
        beta = wide(self.beta(t, t - 1), xt)
        # Differs from the paper's readout of the mean: this is the form in the released code.
        mean = (1 - beta).sqrt() * xt + beta.sqrt() * z[:, 0]
        variance = torch.sigmoid(z[:, 1] / math.sqrt(self.timesteps) + torch.logit(beta))
        return mean, variance

    def p_jump(self, net, xt, t, s):
        """Mean and variance of p(x_s | x_t), and the x_0 that the mean aims at. Three (B, ...).

        For s = t - 1 this is p_step. Differs from the paper: an earlier s is allowed, for a quick look. Then x_0 is
        found from the mean of the short step and put into q(x_s | x_t, x_0); the variance grows in proportion.
        """
        mean, variance = self.p_step(net, xt, t)
        a, b = self.posterior_coefficients(t, t - 1)
        x0 = (mean - wide(b, xt) * xt) / wide(a, xt)
        growth = wide(self.beta_tilde(t, s) / self.beta_tilde(t, t - 1), xt)
        return self.q_posterior(x0, xt, t, s), growth * variance, x0

    # ------------------------------------------------------------------ the bound
    def kl(self, net, x0, xt, t):
        """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), two Gaussians, t >= 1. Mean over the pixels, (B,) nats."""
        mean, variance = self.p_step(net, xt, t)
        variance_q = wide(self.beta_tilde(t, t - 1), xt)
        error = (self.q_posterior(x0, xt, t, t - 1) - mean) ** 2
        kl = 0.5 * (variance / variance_q).log() + (variance_q + error) / (2 * variance) - 0.5
        return kl.flatten(1).mean(1)

    def entropies(self):
        """H_q(X_T | X_0) - H_q(X_1 | X_0) - H_p(X_T) a pixel, nats: the part of the bound without a network."""
        last, first = (1 - self.abar[t].item() for t in (self.timesteps - 1, 0))
        return gaussian_entropy(last) - gaussian_entropy(first) - gaussian_entropy(1)

    def bits(self, kl_sum):
        """The bound K from the sum of its KL divergences in nats: bits a pixel more than a unit Gaussian gives."""
        return (-kl_sum + self.entropies() + gaussian_entropy(1)) / math.log(2)

    def bits_per_dim(self, bits):
        """Bits a pixel that code the grey levels, by a bound of `bits` over a unit Gaussian. Less is better."""
        return gaussian_entropy(1) / math.log(2) - bits + math.log2(self.std * (self.levels - 1) / 2)

    # ------------------------------------------------------------------ the walk back
    @torch.no_grad()
    def reverse(self, net, xT, steps=None, r=None, generator=None):
        """Walk from noise to the paper's x^(1). Yields (t, x_s, x_0 estimate) after every step, standardised.

        The last step is left out: x^(1) is the sample, with noise of a few grey levels.

        xT     unit Gaussian noise
        steps  how many steps to take, evenly spaced (default: all T - 1)
        r      multiplies every reverse step, and p(x_T), by a function of x: inpaint, denoise or guide
        """
        steps = self.timesteps - 1 if steps is None else steps
        if not 1 <= steps < self.timesteps:
            raise ValueError(f"steps={steps} must be between 1 and {self.timesteps - 1}")
        r = r or (lambda mean, variance: (mean, variance))
        mean, variance = r(torch.zeros_like(xT), torch.ones_like(xT))
        x = mean + variance.sqrt() * xT
        times = torch.linspace(self.timesteps - 1, 0, steps + 1).round().long().tolist()
        for now, then in zip(times[:-1], times[1:]):
            t, s = (torch.full((len(x),), i, device=x.device) for i in (now, then))
            mean, variance, x0 = self.p_jump(net, x, t, s)
            mean, variance = r(mean, variance)
            x = mean + variance.sqrt() * noise_like(x, generator)
            yield now, x, x0

    def sample(self, net, n, steps=None, shape=(2,), generator=None, r=None):
        """n samples in the data's own units, (n, *shape): start from pure noise and walk back."""
        xT = noise_like(torch.empty(n, *shape, device=self.abar.device), generator)
        for _, x, _ in self.reverse(net, xT, steps, r, generator):
            pass
        return self.restore(x)


# ------------------------------------------------------------------ multiplying distributions: posteriors
def inpaint(known, mask):
    """r(x) is a delta function at the known pixels (mask True): they are set, the others drawn. Standardised."""
    return lambda mean, variance: (torch.where(mask, known, mean), variance.masked_fill(mask, 0))


def denoise(y, sigma):
    """r(x) = N(y; x, sigma^2 I), y the noisy observation, standardised: the product of two Gaussians is a Gaussian."""
    def r(mean, variance):
        precision = 1 / variance + 1 / sigma ** 2
        return (mean / variance + y / sigma ** 2) / precision, 1 / precision
    return r


def guide(gradient):
    """Any smooth r(x), by gradient = the gradient of log r: it moves the mean by variance * gradient."""
    return lambda mean, variance: (mean + variance * gradient(mean), variance)


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


def uniform_like(x, generator=None):
    """Numbers between 0 and 1. A CPU generator gives the same on every device."""
    if generator is None:
        return torch.rand_like(x)
    return torch.rand(x.shape, generator=generator).to(x.device)


def gaussian_entropy(variance):
    """The entropy of a Gaussian in one dimension, nats."""
    return 0.5 * (1 + math.log(2 * math.pi)) + 0.5 * math.log(variance)


def temporal_basis(timesteps, bumps):
    """Gaussian bumps over time, spread from -1 to 1, half their distance wide, normalised at every t. (T, J)."""
    time = torch.linspace(-1, 1, timesteps, dtype=torch.float64)[:, None]
    centre = torch.linspace(-1, 1, bumps, dtype=torch.float64)
    width = (centre[1] - centre[0]) / 2
    bump = torch.exp(-(time - centre) ** 2 / (2 * width ** 2))
    return bump / bump.sum(1, keepdim=True)


# ------------------------------------------------------------------ binomial diffusion
class Binomial(Chain):
    """The same for bits: every step sets some of them anew by the toss of a coin. Bits are 0.0 or 1.0, (B, D).

    timesteps  T; beta_t = 1 / (T - t + 1) in the paper's count, so that x_T is nothing but coins
    """

    def __init__(self, timesteps=2000):
        super().__init__()
        if timesteps < 3:
            raise ValueError(f"timesteps={timesteps} must be at least 3")
        self.timesteps = timesteps
        beta = 1 / (timesteps - torch.arange(timesteps, dtype=torch.float64))
        self.register_buffer("abar", torch.cat([torch.cumprod(1 - beta, 0), torch.ones(1).double()]), persistent=False)

    def standardise(self, x0, generator=None):
        """Bits need no preparation."""
        return x0

    # Copied from lesson_01/model.py: Diffusion.beta
    def beta(self, t, s):
        """The share of the bits that the steps from s to t set anew: beta_t for s = t - 1. (B,) float64."""
        return 1 - self.abar[t] / self.abar[s]

    def q_bit(self, x, t, s):
        """P(x_t = 1 | x_s) = x_s (1 - beta) + beta / 2; from the data with s = -1. (B, D) float64."""
        beta = self.beta(t, s)[:, None]
        return x * (1 - beta) + 0.5 * beta

    def q_posterior(self, x0, xt, t):
        """P(x_{t-1} = 1 | x_t, x_0), by Bayes' rule. (B, D) float64."""
        one, before = torch.ones_like(xt), self.q_bit(x0, t - 1, torch.full_like(t, -1))
        seen = [torch.where(xt == 1, p, 1 - p) for p in (self.q_bit(0 * one, t, t - 1), self.q_bit(one, t, t - 1))]
        return seen[1] * before / (seen[1] * before + seen[0] * (1 - before))

    def p_logit(self, net, xt, t):
        """log odds of x_{t-1} = 1 in p(x_{t-1} | x_t): those of the forward kernel, moved by the network. (B, D)."""
        kernel = (2 * xt - 1) * torch.log(2 / self.beta(t, t - 1) - 1)[:, None]
        return kernel + net(2 * xt - 1, t)

    def kl(self, net, x0, xt, t):
        """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), t >= 1. Mean over the bits, (B,) nats."""
        q, logit = self.q_posterior(x0, xt, t), self.p_logit(net, xt, t)
        kl = torch.xlogy(q, q) + torch.xlogy(1 - q, 1 - q) - q * F.logsigmoid(logit) - (1 - q) * F.logsigmoid(-logit)
        return kl.mean(1)

    def bits(self, kl_sum):
        """The bound K from the sum of its KL divergences in nats: log2 p of one bit of the data.

        x_T is coins in q and in p: H_q(X_T | X_0) and H_p(X_T) cancel. What is left is the entropy of the first step.
        """
        return -kl_sum / math.log(2) - bit_entropy((1 - self.abar[0].item()) / 2)

    def q_draw(self, x0, t, generator=None):
        """x_t ~ q(x_t | x_0). (B, D)."""
        return (uniform_like(x0, generator) < self.q_bit(x0, t, torch.full_like(t, -1))).to(x0.dtype)

    @torch.no_grad()
    def reverse(self, net, xT, generator=None):
        """Walk from coins to the paper's x^(1). Yields (t, x_{t-1}) after every step."""
        x = xT
        for i in range(self.timesteps - 1, 0, -1):
            t = torch.full((len(x),), i, device=x.device)
            x = (uniform_like(x, generator) < torch.sigmoid(self.p_logit(net, x, t))).to(x.dtype)
            yield i, x

    def sample(self, net, n, shape=(20,), generator=None):
        """n sequences, (n, *shape): start from coins and walk back."""
        xT = (uniform_like(torch.empty(n, *shape, device=self.abar.device), generator) < 0.5).float()
        for _, x in self.reverse(net, xT, generator):
            pass
        return x


def bit_entropy(p):
    """The entropy of a coin that shows heads with probability p, bits."""
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p)


# ------------------------------------------------------------------ networks
class PointNet(nn.Module):
    """`depth` hidden layers of `width` from a point to the coefficients of the bumps."""

    def __init__(self, size=2, width=128, depth=3, bumps=10):
        super().__init__()
        self.layers, self.bumps = dense(size, *[width] * depth, 2 * bumps * size), bumps
        zero(self.layers[-1])

    def forward(self, x):
        """x (B, D) -> coefficients for the mean and for the variance, (B, 2, J, D)."""
        return rearrange(self.layers(x), "b (k j d) -> b k j d", k=2, j=self.bumps)


class DigitNet(nn.Module):
    """A dense path that sees the whole digit, convolutions that see details and what the dense path says of the place.

    channels  maps of the convolutions; layers: how many of them, at one position for 2 x 2 pixels
    width     of the dense path's hidden layers; depth: how many of them; maps: its outputs a pixel
    bumps     J
    """

    def __init__(self, channels=64, layers=4, width=192, depth=3, maps=2, bumps=10, size=28):
        super().__init__()
        self.bumps, self.size = bumps, size
        self.dense = dense(size ** 2, *[width] * depth, maps * size ** 2)
        widths = [4 * (1 + maps), *[channels] * layers]
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths, widths[1:]))
        self.head = nn.Conv2d(channels, 4 * 2 * bumps, 1)
        zero(self.head)

    def forward(self, x):
        """x (B, 1, H, W) -> coefficients for the mean and for the variance, (B, 2, J, 1, H, W)."""
        whole = rearrange(self.dense(x.flatten(1)), "b (m h w) -> b m h w", h=self.size, w=self.size)
        h = F.pixel_unshuffle(torch.cat([x, whole], dim=1), 2)                                     # (B, 12, 14, 14)
        for layer in self.convolutions:
            h = F.leaky_relu(layer(h), SLOPE)
        return rearrange(F.pixel_shuffle(self.head(h), 2), "b (k j c) h w -> b k j c h w", k=2, j=self.bumps)


SLOPE = 0.05                                                # of the leaky ReLU, as in the released code


def dense(*sizes):
    """Linear layers of these sizes with leaky ReLUs in between."""
    layers = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.LeakyReLU(SLOPE))]
    return nn.Sequential(*layers[:-1])


def zero(layer):
    """A last layer that starts at 0, so that the model starts as a unit Gaussian."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


# Copied from lesson_01/model.py: MLP
class MLP(nn.Module):
    """Fully connected layers that are told t, for bits: their exact step changes too fast in t for ten bumps."""

    def __init__(self, shape=(2,), width=128, depth=3):
        super().__init__()
        size = math.prod(shape)
        self.stem, self.out = nn.Linear(size, width), nn.Linear(width, size)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.times = nn.ModuleList(nn.Linear(TIME, 2 * width) for _ in range(depth + 1))

    def forward(self, x, t):
        """x (B, ...), t (B,) int -> the prediction, (B, ...)."""
        emb = time_embedding(t, TIME)
        h = self.stem(x.flatten(1))                                                                # (B, width)
        for layer, time in zip(self.layers, self.times):
            h = h + layer(at_time(h, time(emb)))
        return self.out(at_time(h, self.times[-1](emb))).reshape(x.shape)


# Copied from lesson_01/model.py: at_time
def at_time(h, scale_and_shift):
    """Hidden values h (B, width), scaled and shifted as the time asks, through the nonlinearity."""
    scale, shift = scale_and_shift.chunk(2, dim=1)
    return F.silu(h * (1 + scale) + shift)


TIME = 32                                                   # numbers that tell the network the time


# Copied from lesson_01/model.py: time_embedding
def time_embedding(t, dim):
    """Sines, then cosines, of t at dim / 2 frequencies from 1 down to 1/10000. (B,) -> (B, dim)."""
    frequency = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2 - 1))
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)
