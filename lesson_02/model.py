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

from earlier import MLP, Diffusion, noise_like, swiss_roll, wide  # lesson 01


# ------------------------------------------------------------------ Gaussian diffusion: Section 2 of the paper
def temporal_basis(timesteps, bumps):
    """Gaussian bumps over time (App. D.2.1), from -1 to 1, normalised at every t. (T, J)."""
    time, centre = (torch.linspace(-1, 1, n, dtype=torch.float64) for n in (timesteps, bumps))
    width = (centre[1] - centre[0]) / 2     # Differs from the paper, the whole distance: half, as in the released code.
    bump = torch.exp(-(time[:, None] - centre) ** 2 / (2 * width ** 2))
    return bump / bump.sum(1, keepdim=True)


def uniform_like(x, generator=None):
    """Numbers between 0 and 1, for grey levels and the coins of Sec. 2.1. A CPU generator gives the same everywhere."""
    if isinstance(generator, list):                         # one for each of the images, as in noise_like
        return torch.cat([uniform_like(x[:1], one) for one in generator])
    return torch.rand_like(x) if generator is None else torch.rand(x.shape, generator=generator).to(x.device)


class DPM(Diffusion):
    """Gaussian diffusion with a learned mean and covariance of every step back (Sec. 2). Holds no weights.

    As in lesson 01: q_sample, q_posterior, beta, beta_tilde. New: the schedule, the reverse step, the bound that trains
    it, and a walk back that may be multiplied by a function r(x).

    timesteps, first   T; what is added to the variance of the first step, so that x^(1) hides the grey levels
    bumps              J, functions of time that the network's coefficients belong to
    mean, std, levels  of the data, over all pixels; how many grey levels from -1 to 1 (0: the data are continuous)
    """
    def __init__(self, timesteps=1000, first=1e-3, bumps=10, mean=0.0, std=1.0, levels=0):
        if timesteps < 3 or bumps < 2:
            raise ValueError(f"timesteps={timesteps} must be at least 3 and bumps={bumps} at least 2")
        super().__init__(timesteps)
        self.mean, self.std, self.levels = mean, std, levels
        baseline = 1 / torch.linspace(timesteps, 2, timesteps, dtype=torch.float64)     # Sec. 2.4.1: every step
        floor = torch.full_like(baseline, 1e-6)                                         # destroys the same part of x_0
        floor[0] += first
        # Differs from the paper: beta is fixed, as in the released code; the paper learns beta_2 to beta_T.
        abar = torch.cumprod(1 - (floor + baseline * (1 - floor - 1e-5)), dim=0)
        self.abar = torch.cat([abar, abar.new_ones(1)])                                 # abar[-1] = 1: the clean data
        self.register_buffer("basis", temporal_basis(timesteps, bumps), persistent=False)          # (T, J), for p_step
        self.ends = 1 - abar[-1].item(), 1 - abar[0].item()     # variances of q(x^(T)|x^(0)) and q(x^(1)|x^(0))

    def standardise(self, x0, generator=None):
        """Data for the chain, which ends in a unit Gaussian (Sec. 2.1): mean 0 and variance 1. (B, ...)."""
        if self.levels:                                     # spread each evenly: a flat background has no density
            x0 = x0 + 2 / (self.levels - 1) * (uniform_like(x0, generator) - 0.5)
        return (x0 - self.mean) / self.std

    def restore(self, x):
        """Back from the chain of Sec. 2.1 to the data's own units, [-1, 1] for images. (B, ...)."""
        return self.std * x + self.mean

    def q_draw(self, x0, t, generator=None):
        """x_t ~ q(x_t | x_0), Sec. 2.1, with noise of its own. x0 standardised (B, ...) -> (B, ...)."""
        return self.q_sample(x0, t, noise_like(x0, generator))

    def p_step(self, net, xt, t):
        """Mean and variance of p(x_{t-1} | x_t), Sec. 2.2, for every pixel, by the readout of App. D.2.1. Two (B, ...).

        net(xt) gives the coefficients of the bumps, (B, 2, J, ...); their sums at t, z, move the mean and the variance.
        Where z = 0 the step is the forward kernel, which leaves a unit Gaussian as it is.
        """
        z = torch.einsum("bkj...,bj->bk...", net(xt), self.basis[t].to(xt.dtype))                  # (B, 2, ...)
        beta = wide(self.beta(t, t - 1), xt)
        # Differs from the paper's readout: this form of the mean and the square root of T are the released code's.
        mean = (1 - beta).sqrt() * xt + beta.sqrt() * z[:, 0]
        variance = torch.sigmoid(z[:, 1] / math.sqrt(self.timesteps) + torch.logit(beta))
        return mean, variance

    def kl(self, net, x0, xt, t):
        """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), Sec. 2.4, of two Gaussians. (B,) nats a pixel, t >= 1."""
        mean, variance = self.p_step(net, xt, t)
        variance_q = wide(self.beta_tilde(t, t - 1), xt)
        error = (self.q_posterior(x0, xt, t, t - 1) - mean) ** 2
        kl = 0.5 * (variance / variance_q).log() + (variance_q + error) / (2 * variance) - 0.5
        return kl.flatten(1).mean(1)

    def bits(self, kl_sum):
        """The bound K of Sec. 2.4 from the sum of its divergences in nats: bits a pixel above a unit Gaussian.

        K = -kl_sum + H_q(X_T | X_0) - H_q(X_1 | X_0) - H_p(X_T); a unit Gaussian gives -H_p(X_T).
        """
        last, first, prior = (0.5 * (1 + math.log(2 * math.pi)) + 0.5 * math.log(variance)         # each entropy H
                              for variance in (*self.ends, 1))
        return (-kl_sum + (last - first - prior) + prior) / math.log(2)

    def loss(self, net, x0):
        """Minus the bound K (Sec. 2.4), estimated at one time for each element. x0 as the data come -> scalar, bits.

        t is never 0: that step is not learned, it is the forward kernel itself (App. B), and a sample ends before it.
        """
        x0 = self.standardise(x0)
        t = torch.randint(1, self.timesteps, (len(x0),), device=x0.device)
        kl = self.kl(net, x0, self.q_draw(x0, t), t)
        return -self.bits((self.timesteps - 1) * kl.mean())                 # a mean over T - 1 times, times T - 1

    @torch.no_grad()
    def bound(self, net, x0, generator=None):
        """The whole bound K of Sec. 2.4, every t once: (B,) bits, and its divergences (B, T - 1), nats, t = 1 first."""
        x0, terms = self.standardise(x0, generator), []
        for i in range(1, self.timesteps):
            t = torch.full((len(x0),), i, device=x0.device)
            terms.append(self.kl(net, x0, self.q_draw(x0, t, generator), t))
        terms = torch.stack(terms, 1)
        return self.bits(terms.sum(1)), terms

    def p_jump(self, net, xt, t, s):
        """Mean and variance of p(x_s | x_t), Sec. 2.2, and the x_0 that the mean aims at. Three (B, ...).

        For s = t - 1 this is p_step. Differs from the paper: an earlier s is allowed, for a quick look. Then the x_0
        of the short step is put into q(x_s | x_t, x_0); the variance grows in proportion.
        """
        mean, variance = self.p_step(net, xt, t)
        one, nought = torch.ones_like(xt), torch.zeros_like(xt)             # mean = q_posterior(x0, xt), solved for x0
        x0 = (mean - self.q_posterior(nought, xt, t, t - 1)) / self.q_posterior(one, nought, t, t - 1)
        growth = wide(self.beta_tilde(t, s) / self.beta_tilde(t, t - 1), xt)
        return self.q_posterior(x0, xt, t, s), growth * variance, x0

    @torch.no_grad()
    def reverse(self, net, xT, steps=None, r=None, generator=None):
        """Walk from noise to the paper's x^(1), Sec. 2.2. Yields (t, x_s, x_0 estimate) after every step, standardised.

        The last step is left out: x^(1) is the sample, with noise of a few grey levels.
        steps: how many of the T - 1 to take, evenly spaced (default: all)
        r: multiplies every reverse step, and p(x_T), by a function of x (Sec. 2.5): inpaint, denoise or guide
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
        """n samples in the data's own units, (n, *shape): start from pure noise and walk back (Sec. 2.2)."""
        xT = noise_like(torch.empty(n, *shape, device=self.abar.device), generator)
        for _, x, _ in self.reverse(net, xT, steps, r, generator):
            pass
        return self.restore(x)


# ------------------------------------------------------------------ multiplying distributions: posteriors, Section 2.5
def inpaint(known, mask):
    """r(x) is a delta function at the known pixels (mask True), Sec. 2.5: these are set, the others drawn."""
    return lambda mean, variance: (torch.where(mask, known, mean), variance.masked_fill(mask, 0))


def denoise(y, sigma):
    """r(x) = N(y; x, sigma^2 I), y the noisy observation, standardised (Sec. 2.5): two Gaussians multiplied."""
    def r(mean, variance):
        precision = 1 / variance + 1 / sigma ** 2
        return (mean / variance + y / sigma ** 2) / precision, 1 / precision
    return r


def guide(gradient):
    """Any smooth r(x), by gradient = the gradient of log r (App. C): it moves the mean by variance * gradient."""
    return lambda mean, variance: (mean + variance * gradient(mean), variance)


# ------------------------------------------------------------------ the networks: Appendix D
SLOPE = 0.05                                                # of the leaky ReLU, as in the released code


def dense(*sizes):
    """Linear layers of these sizes with leaky ReLUs in between (App. D.2.1)."""
    layers = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.LeakyReLU(SLOPE))]
    return nn.Sequential(*layers[:-1])


class PointNet(nn.Module):
    """`depth` hidden layers of `width` from a point (App. D.1) to the coefficients of the bumps."""
    def __init__(self, size=2, width=128, depth=3, bumps=10):
        super().__init__()
        self.layers, self.bumps = dense(size, *[width] * depth, 2 * bumps * size), bumps
        for parameter in self.layers[-1].parameters():      # at 0, so that the model starts as a unit Gaussian
            nn.init.zeros_(parameter)

    def forward(self, x):
        """x (B, D) -> coefficients for the mean and for the variance, (B, 2, J, D)."""
        return rearrange(self.layers(x), "b (k j d) -> b k j d", k=2, j=self.bumps)


class DigitNet(nn.Module):
    """A dense path that sees the whole digit, convolutions that see details and its answer for the place (App. D.2.1).

    channels  maps of the convolutions; layers: how many of them, at one position for 2 x 2 pixels
    width     of the dense path's hidden layers; depth: how many of them; maps: its outputs a pixel; bumps: J
    """
    def __init__(self, channels=64, layers=4, width=192, depth=3, maps=2, bumps=10, image_size=28):
        super().__init__()
        self.bumps, self.size, pixels = bumps, image_size, image_size ** 2
        self.dense = dense(pixels, *[width] * depth, maps * pixels)
        widths = [4 * (1 + maps), *[channels] * layers]
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths, widths[1:]))
        self.head = nn.Conv2d(channels, 4 * 2 * bumps, 1)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x):
        """x (B, 1, H, W) -> coefficients for the mean and for the variance, (B, 2, J, 1, H, W)."""
        whole = rearrange(self.dense(x.flatten(1)), "b (m h w) -> b m h w", h=self.size, w=self.size)
        h = F.pixel_unshuffle(torch.cat([x, whole], dim=1), 2)                                     # (B, 12, 14, 14)
        for layer in self.convolutions:
            h = F.leaky_relu(layer(h), SLOPE)
        return rearrange(F.pixel_shuffle(self.head(h), 2), "b (k j c) h w -> b k j c h w", k=2, j=self.bumps)


# ------------------------------------------------------------------ binomial diffusion: bits
class Binomial(nn.Module):
    """The same chain for bits (Sec. 2.1): every step sets some anew by the toss of a coin. Bits are 0.0 or 1.0, (B, D).

    The network is lesson 01's MLP, which is told t: the exact step of bits changes too fast in t for ten bumps.
    timesteps: T; beta_t = 1 / (T - t + 1) in the paper's count, so that x_T is nothing but coins (Sec. 2.4.1)
    """
    beta, loss, bound = DPM.beta, DPM.loss, DPM.bound       # beta: the share of the bits that are set anew

    def __init__(self, timesteps=2000):
        super().__init__()
        if timesteps < 3:
            raise ValueError(f"timesteps={timesteps} must be at least 3")
        self.timesteps = timesteps
        beta = 1 / (timesteps - torch.arange(timesteps, dtype=torch.float64))
        self.register_buffer("abar", torch.cat([torch.cumprod(1 - beta, 0), torch.ones(1).double()]), persistent=False)
        self.flip = (1 - self.abar[0].item()) / 2           # that a bit of x^(1) is another than the data's

    def standardise(self, x0, generator=None):
        """Bits need no preparation for the chain of Sec. 2.1."""
        return x0

    def q_bit(self, x, t, s):
        """P(x_t = 1 | x_s) = x_s (1 - beta) + beta / 2 (Sec. 2.1); from the data with s = -1. (B, D) float64."""
        beta = self.beta(t, s)[:, None]
        return x * (1 - beta) + 0.5 * beta

    def q_draw(self, x0, t, generator=None):
        """x_t ~ q(x_t | x_0), Sec. 2.1. (B, D)."""
        return (uniform_like(x0, generator) < self.q_bit(x0, t, torch.full_like(t, -1))).to(x0.dtype)

    def q_posterior(self, x0, xt, t):
        """P(x_{t-1} = 1 | x_t, x_0), by Bayes' rule (App. B). (B, D) float64."""
        one, before = torch.ones_like(xt), self.q_bit(x0, t - 1, torch.full_like(t, -1))
        seen = [torch.where(xt == 1, p, 1 - p) for p in (self.q_bit(0 * one, t, t - 1), self.q_bit(one, t, t - 1))]
        return seen[1] * before / (seen[1] * before + seen[0] * (1 - before))

    def p_logit(self, net, xt, t):
        """log odds of x_{t-1} = 1 in p(x_{t-1} | x_t), Sec. 2.2: the forward kernel's, moved by the network. (B, D)."""
        kernel = (2 * xt - 1) * torch.log(2 / self.beta(t, t - 1) - 1)[:, None]
        return kernel + net(2 * xt - 1, t)

    def kl(self, net, x0, xt, t):
        """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), Sec. 2.4, t >= 1. Mean over the bits, (B,) nats."""
        q, logit = self.q_posterior(x0, xt, t), self.p_logit(net, xt, t)
        kl = torch.xlogy(q, q) + torch.xlogy(1 - q, 1 - q) - q * F.logsigmoid(logit) - (1 - q) * F.logsigmoid(-logit)
        return kl.mean(1)

    def bits(self, kl_sum):
        """The bound K of Sec. 2.4 from the sum of its divergences in nats: log2 p of one bit of the data."""
        first = -sum(p * math.log2(p) for p in (self.flip, 1 - self.flip))              # H_q(X_1 | X_0)
        return -kl_sum / math.log(2) - first                # x_T is coins in q and in p: the other two entropies cancel

    @torch.no_grad()
    def reverse(self, net, xT, generator=None):
        """Walk from coins to the paper's x^(1), Sec. 2.2. Yields (t, x_{t-1}) after every step."""
        x = xT
        for i in range(self.timesteps - 1, 0, -1):
            t = torch.full((len(x),), i, device=x.device)
            x = (uniform_like(x, generator) < torch.sigmoid(self.p_logit(net, x, t))).to(x.dtype)
            yield i, x

    def sample(self, net, n, shape=(20,), generator=None):
        """n sequences, (n, *shape): start from coins and walk back (Sec. 2.2)."""
        xT = (uniform_like(torch.empty(n, *shape, device=self.abar.device), generator) < 0.5).float()
        for _, x in self.reverse(net, xT, generator):
            pass
        return x
