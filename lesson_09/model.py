"""IDDPM: Improved Denoising Diffusion Probabilistic Models (Nichol, Dhariwal 2021, arXiv 2102.09672).

Convention: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps; t runs from data (0) to noise (T - 1), and the network
receives 1000 t / T. The paper counts t from 1 to T, the code from 0 to T - 1; t = -1 is the clean image. `v` is the
paper's interpolation of the variance (Sec. 3.1), not the velocity of later lessons.
Images are (B, C, H, W) in [-1, 1]; t and s are (B,) int64. A reverse step goes from t to s < t.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


# ------------------------------------------------------------------ the process: Sections 2 to 4 of the paper
# Adapted from lesson_05/model.py: DDPM -- the network also gives the variance of the reverse step, the loss is
#   L_simple, L_hybrid or L_vlb, the schedule may be the cosine; only the noise can be predicted
class IDDPM(nn.Module):
    """The forward process, its reversal with a learned variance, the losses, the sampler. Holds no weights.

    timesteps  T
    schedule   "cosine" (Eq. 17) or "linear" (lesson 05's)
    objective  "simple" (lesson 05's), "hybrid" (Eq. 16) or "vlb" (the variational bound alone)
    variance   of the reverse steps: "learned" (Eq. 15), or fixed: "large" (beta_t) or "small" (beta-tilde_t)
    lam        lambda of Eq. (16), the weight of the whole bound, a sum over T times
    """

    def __init__(self, timesteps=1000, schedule="cosine", objective="hybrid", variance="learned", lam=1e-3):
        super().__init__()
        for value, known in ((schedule, ("cosine", "linear")), (objective, ("simple", "hybrid", "vlb")),
                             (variance, ("learned", "large", "small"))):
            if value not in known:
                raise ValueError(f"{value!r} is none of {', '.join(known)}")
        if timesteps < 2:
            raise ValueError(f"timesteps={timesteps} must be at least 2")
        self.timesteps, self.objective, self.variance, self.lam = timesteps, objective, variance, lam
        abar = torch.cumprod(1 - betas(schedule, timesteps), dim=0)
        # float64: 1 - abar_0 = 4e-5 would keep three digits. The entry appended is abar_{-1} = 1: no noise.
        self.register_buffer("abar", torch.cat([abar, abar.new_ones(1)]), persistent=False)        # (T + 1,)

    # ------------------------------------------------------------------ forward process
    # Copied from lesson_05/model.py: DDPM.q_sample
    def q_sample(self, x0, t, eps):
        """x_t ~ q(x_t | x_0) with the given noise. x0, eps (B, C, H, W) -> (B, C, H, W)."""
        return image(self.abar[t].sqrt()) * x0 + image((1 - self.abar[t]).sqrt()) * eps

    # Copied from lesson_01/model.py: Diffusion.beta
    def beta(self, t, s):
        """The variance that the steps from s to t add: beta_{S_t} of Eq. (19), beta_t for s = t - 1. (B,) float64."""
        return 1 - self.abar[t] / self.abar[s]

    # Copied from lesson_01/model.py: Diffusion.beta_tilde
    def beta_tilde(self, t, s):
        """The variance of q(x_s | x_t, x_0): beta-tilde_{S_t} of Eq. (19), 0 at s = -1. (B,) float64."""
        return (1 - self.abar[s]) / (1 - self.abar[t]) * self.beta(t, s)

    # Copied from lesson_05/model.py: DDPM.posterior_coefficients
    def posterior_coefficients(self, t, s):
        """mu-tilde = a x_0 + b x_t, for any s < t. Two (B, 1, 1, 1)."""
        a = self.abar[s].sqrt() * self.beta(t, s) / (1 - self.abar[t])
        b = (1 - self.beta(t, s)).sqrt() * (1 - self.abar[s]) / (1 - self.abar[t])
        return image(a), image(b)

    # Copied from lesson_05/model.py: DDPM.q_posterior
    def q_posterior(self, x0, xt, t, s):
        """mu-tilde, the mean of q(x_s | x_t, x_0). (B, C, H, W)."""
        a, b = self.posterior_coefficients(t, s)
        return a * x0 + b * xt

    # ------------------------------------------------------------------ reverse process
    def predict(self, net, xt, t):
        """The network's two answers: the noise, and v of Eq. (15), not bounded, at first 1/2. Two (B, C, H, W)."""
        output = net(xt, t * (1000 / self.timesteps))                       # times 0..1000, whatever T is
        return output[:, :xt.shape[1]], (output[:, xt.shape[1]:] + 1) / 2

    # Adapted from lesson_05/model.py: DDPM.p_mean -- takes the noise, not the network: the gradient can be stopped
    def p_mean(self, eps, xt, t, s, clip=True):
        """mu_theta of p(x_s | x_t) for this noise, and the x_0 it aims at. Clipped: the division enlarges errors."""
        x0 = (xt - image((1 - self.abar[t]).sqrt()) * eps) / image(self.abar[t].sqrt())
        if clip:
            x0 = x0.clamp(-1, 1)
        return self.q_posterior(x0, xt, t, s), x0

    # Adapted from lesson_05/model.py: DDPM.reverse_variance -- its logarithm; the learned one, between the two fixed
    def log_variance(self, v, t, s):
        """ln sigma^2 of p(x_s | x_t): learned for every pixel, (B, C, H, W), or fixed, (B, 1, 1, 1)."""
        small, large = image(self.log_beta_tilde(t, s)), image(self.beta(t, s).log())
        if self.variance == "learned":
            return v * large + (1 - v) * small                              # Eq. (15)
        return small if self.variance == "small" else torch.where(image(t) == 0, small, large)     # as in lesson 05

    def log_beta_tilde(self, t, s):
        """ln beta-tilde; at t = 0, where beta-tilde is 0, that of t = 1, as in the official code. (B,) float64."""
        one, zero = torch.ones_like(t), torch.zeros_like(t)
        return torch.where(t == 0, self.beta_tilde(one, zero), self.beta_tilde(t, s)).log()

    def p_mean_variance(self, net, xt, t, s, clip=True):
        """Mean and log-variance of p(x_s | x_t), and the x_0 that the mean aims at."""
        eps, v = self.predict(net, xt, t)
        mean, x0 = self.p_mean(eps, xt, t, s, clip)
        return mean, self.log_variance(v, t, s), x0

    # ------------------------------------------------------------------ losses
    # Adapted from lesson_05/model.py: DDPM.loss -- L_hybrid with its gradient stop, L_vlb with t drawn by importance
    def loss(self, net, x0, sampler=None):
        """One draw of L_simple, L_hybrid (Eq. 16) or lambda L_vlb; t uniform or from an ImportanceSampler."""
        if sampler is not None and self.objective != "vlb":
            raise ValueError(f"importance sampling belongs to objective=vlb, not to {self.objective}")
        if sampler is None:
            t, weight = torch.randint(self.timesteps, (len(x0),), device=x0.device), 1.0
        else:
            t, weight = sampler.draw(len(x0))
        eps = torch.randn_like(x0)
        xt = self.q_sample(x0, t, eps)
        guess, v = self.predict(net, xt, t)
        simple = F.mse_loss(guess, eps)                                     # L_simple
        if self.objective == "simple":
            return simple
        if self.objective == "hybrid":
            guess = guess.detach()             # Sec. 3.1: the bound teaches the variance, and leaves the mean alone
        mean, _ = self.p_mean(guess, xt, t, t - 1, clip=False)
        terms = self.bound_term(x0, xt, t, mean, self.log_variance(v, t, t - 1))                   # L_t, (B,)
        if sampler is not None:
            sampler.update(t, terms.detach())
        # L_vlb is a sum over T times: T times the mean of its terms. Without this T it is a thousand times too weak.
        vlb = self.lam * self.timesteps * (weight * terms).mean()
        return simple + vlb if self.objective == "hybrid" else vlb          # Eq. (16)

    # Adapted from lesson_05/model.py: DDPM.bound_term -- a log-variance for every pixel; the decoder at t = 0 only
    def bound_term(self, x0, xt, t, mean, log_variance):
        """L_t of the bound, or L_0 where t = 0, for a reverse step of this mean and variance. (B,) bits/dim."""
        log_variance, log_true = log_variance.expand_as(mean), image(self.log_beta_tilde(t, t - 1))
        error = (self.q_posterior(x0, xt, t, t - 1) - mean) ** 2
        term = 0.5 * (log_variance - log_true - 1 + (log_true - log_variance).exp() + error * (-log_variance).exp())
        first = t == 0
        term[first] = -discretized_log_likelihood(x0[first], mean[first], (0.5 * log_variance[first]).exp())
        return term.flatten(1).mean(1) / math.log(2)

    # Copied from lesson_05/model.py: DDPM.prior_term
    def prior_term(self, x0):
        """L_T of Eq. (5): the divergence of q(x_T | x_0) from a unit Gaussian. (B,) bits per dimension."""
        abar = self.abar[self.timesteps - 1]
        kl = 0.5 * (abar * x0 ** 2 - abar - torch.log1p(-abar))
        return kl.flatten(1).mean(1) / math.log(2)

    # Adapted from lesson_05/model.py: DDPM.bound -- at given times, so that it can be estimated from a part of them
    @torch.no_grad()
    def bound(self, net, x0, times=None, clip=True, generator=None):
        """Prior (B,) and terms (B, K) of the bound at times (B, K), by default all T. bits/dim = prior + their sum."""
        times = torch.arange(self.timesteps, device=x0.device).expand(len(x0), -1) if times is None else times
        terms = []
        for t in times.unbind(1):
            xt = self.q_sample(x0, t, noise_like(x0, generator))
            mean, log_variance, _ = self.p_mean_variance(net, xt, t, t - 1, clip)
            terms.append(self.bound_term(x0, xt, t, mean, log_variance))
        return self.prior_term(x0), torch.stack(terms, 1)

    # ------------------------------------------------------------------ sampling: Section 4
    def times(self, steps=None, skip=0.0):
        """The sub-sequence S of Sec. 4, evenly spaced from T - 1 down to 0; less the first `skip` (Sec. 3.2)."""
        steps = self.timesteps if steps is None else steps
        if not 1 < steps <= self.timesteps:
            raise ValueError(f"steps={steps} must be between 2 and {self.timesteps}")
        if not 0 <= skip < 1:
            raise ValueError(f"skip={skip} must be at least 0 and below 1")
        return torch.linspace(self.timesteps - 1, 0, steps).round().long().tolist()[int(skip * steps + 1e-9):]

    # Adapted from lesson_05/model.py: DDPM.reverse -- the learned variance; the first steps can be skipped
    @torch.no_grad()
    def reverse(self, net, xT, steps=None, clip=True, generator=None, skip=0.0):
        """Yields (t, x_s, x_0 estimate) after every step along `times`; the last x_s is the sample.

        A jump is a step of the respaced process, Eq. (19): beta and beta-tilde follow from abar at its two ends. The
        network is told the time of the training (for which the official code keeps a map), not the place in S.
        """
        times = [*self.times(steps, skip), -1]
        x = xT
        for t, s in zip(times[:-1], times[1:]):
            t_, s_ = (torch.full((len(x),), i, device=x.device) for i in (t, s))
            mean, log_variance, x0 = self.p_mean_variance(net, x, t_, s_, clip)
            x = mean + (0.5 * log_variance).exp() * noise_like(x, generator) if s >= 0 else mean
            yield t, x, x0

    # Adapted from lesson_05/model.py: DDPM.sample -- hands `skip` on
    def sample(self, net, n, steps=None, shape=(1, 28, 28), clip=True, generator=None, skip=0.0):
        """n images, (n, C, H, W) in about [-1, 1]."""
        xT = noise_like(torch.empty(n, *shape, device=self.abar.device), generator)
        for _, x, _ in self.reverse(net, xT, steps, clip, generator, skip):
            pass
        return x


def betas(schedule, timesteps):
    """The variance that each step adds, (T,) float64, at most 0.999."""
    if schedule == "linear":                   # lesson 05's, scaled so that every T ends at about the same abar
        return (1000 / timesteps * torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64)).clamp(max=0.999)
    share = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps    # t / T as the paper counts, from 0 to 1
    abar = torch.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2            # f of Eq. (17)
    return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)                      # f(0) cancels


class ImportanceSampler(nn.Module):
    """Draws times with p_t ~ sqrt(E[L_t^2]), Eq. (18), from the last `memory` terms L_t seen at every t (Sec. 3.3).

    Uniform until every t has that many. A share `floor` of p stays uniform: the official code, to forget no time.
    """

    def __init__(self, timesteps, memory=10, floor=1e-3):
        super().__init__()
        self.floor = floor
        self.register_buffer("terms", torch.zeros(timesteps, memory, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(timesteps, dtype=torch.int64))                   # seen so far

    def probabilities(self):
        """p_t, (T,) float64, sum 1."""
        timesteps, memory = self.terms.shape
        if (self.count < memory).any():
            return torch.full_like(self.terms[:, 0], 1 / timesteps)
        p = self.terms.square().mean(1).sqrt()                              # Eq. (18)
        return (1 - self.floor) * p / p.sum() + self.floor / timesteps

    def draw(self, n):
        """n times (n,) int64 and the weights 1 / (T p_t) (n,): the weighted mean is that of uniform times."""
        p = self.probabilities()
        t = torch.multinomial(p, n, replacement=True)
        return t, (1 / (len(p) * p[t])).float()

    def update(self, t, terms):
        """Remember the terms L_t (B,) of these times (B,), and those of the other processes, if there are any."""
        parts = [(t.tolist(), terms.tolist())]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts *= torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, parts[0])
        for i, term in (pair for part in parts for pair in zip(*part)):
            self.terms[i, self.count[i] % self.terms.shape[1]] = term
            self.count[i] += 1


# Copied from lesson_05/model.py: image
def image(values):
    """(B,) -> (B, 1, 1, 1) float32, to multiply images with."""
    return values.float()[:, None, None, None]


# Copied from lesson_05/model.py: noise_like
def noise_like(x, generator=None):
    """Standard Gaussian noise. A CPU generator gives the same noise on every device."""
    if generator is None:
        return torch.randn_like(x)
    return torch.randn(x.shape, generator=generator).to(x.device)


# Copied from lesson_05/model.py: discretized_log_likelihood
def discretized_log_likelihood(x0, mean, sigma):
    """log p(x_0 | x_1): the mass of N(mean, sigma^2) in the bin, 2/255 wide, of each of 256 grey levels; in nats."""
    x0, mean, sigma = x0.double(), mean.double(), sigma.double()
    upper = torch.where(x0 > 0.999, torch.inf, (x0 + 1 / 255 - mean) / sigma)
    lower = torch.where(x0 < -0.999, -torch.inf, (x0 - 1 / 255 - mean) / sigma)
    flip = lower > 0
    upper, lower = torch.where(flip, -lower, upper), torch.where(flip, -upper, lower)
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return (log_upper + torch.log1p(-torch.exp(log_lower - log_upper))).float()


# ------------------------------------------------------------------ the network
# Adapted from lesson_05/model.py: UNet -- twice the channels come out: the noise and v
class UNet(nn.Module):
    """Lesson 05's U-Net. out_channels: two for every channel of the image, the noise and v (1: lesson 05's own)."""

    def __init__(self, channels=128, mults=(1, 2, 2), blocks=2, attention=(14,), dropout=0.1, groups=32, patch=1,
                 image_size=28, image_channels=1, out_channels=2):
        super().__init__()
        if image_size % (patch * 2 ** (len(mults) - 1)):
            raise ValueError(f"image_size={image_size} cannot be halved {len(mults) - 1} times "
                             f"after patches of {patch}")
        self.channels, self.patch = channels, patch
        width = 4 * channels
        self.time = nn.Sequential(linear(channels, width), nn.SiLU(), linear(width, width))
        size, c = image_size // patch, channels
        self.stem = conv(image_channels * patch ** 2, c)

        def level(c_in, c_out):
            attend = Attention(c_out, groups) if size in attention else nn.Identity()
            return nn.ModuleList([ResBlock(c_in, c_out, width, dropout, groups), attend])

        self.down, skips = nn.ModuleList(), [c]
        for i, mult in enumerate(mults):
            for _ in range(blocks):
                self.down.append(level(c, channels * mult))
                c = channels * mult
                skips.append(c)
            if i < len(mults) - 1:
                self.down.append(Downsample(c))
                skips.append(c)
                size //= 2
        self.middle = nn.ModuleList([ResBlock(c, c, width, dropout, groups), Attention(c, groups),
                                     ResBlock(c, c, width, dropout, groups)])
        self.up = nn.ModuleList()
        for i, mult in reversed(list(enumerate(mults))):
            for _ in range(blocks + 1):
                self.up.append(level(c + skips.pop(), channels * mult))
                c = channels * mult
            if i > 0:
                self.up.append(Upsample(c))
                size *= 2
        self.out = nn.Sequential(norm(c, groups), nn.SiLU(), conv(c, out_channels * patch ** 2, zero=True))

    def forward(self, x, t):
        """x (B, C, H, W), t (B,) -> noise and v, (B, 2 C, H, W)."""
        emb = self.time(time_embedding(t, self.channels))                   # (B, 4 channels)
        x = rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=self.patch, q=self.patch)
        h = self.stem(x)
        skips = [h]
        for layer in self.down:
            h = layer(h) if isinstance(layer, Downsample) else layer[1](layer[0](h, emb))
            skips.append(h)
        first, attend, second = self.middle
        h = second(attend(first(h, emb)), emb)
        for layer in self.up:
            if isinstance(layer, Upsample):
                h = layer(h)
            else:
                h = layer[1](layer[0](torch.cat([h, skips.pop()], dim=1), emb))
        return rearrange(self.out(h), "b (c p q) h w -> b c (h p) (w q)", p=self.patch, q=self.patch)


# Copied from lesson_05/model.py: ResBlock
class ResBlock(nn.Module):
    """GroupNorm, swish, convolution, twice; the time enters between the two. The last convolution starts at 0."""

    def __init__(self, c_in, c_out, width, dropout=0.0, groups=32):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in, groups), conv(c_in, c_out)
        self.time = linear(width, c_out)
        self.norm2, self.conv2 = norm(c_out, groups), conv(c_out, c_out, zero=True)
        self.dropout = nn.Dropout(dropout)
        self.skip = conv(c_in, c_out, kernel=1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(F.silu(emb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.skip(x) + h


# Copied from lesson_05/model.py: Attention
class Attention(nn.Module):
    """Self-attention over the positions, one head as wide as the block. The last projection starts at 0."""

    def __init__(self, channels, groups=32):
        super().__init__()
        self.norm = norm(channels, groups)
        self.qkv, self.out = linear(channels, 3 * channels), linear(channels, channels, zero=True)

    def forward(self, x):
        h = rearrange(self.norm(x), "b c h w -> b (h w) c")
        q, k, v = self.qkv(h).chunk(3, dim=2)                               # (B, H W, C) each
        weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(x.shape[1]), dim=2)                # (B, H W, H W)
        return x + rearrange(self.out(weights @ v), "b (h w) c -> b c h w", h=x.shape[2])


# Copied from lesson_05/model.py: Downsample
class Downsample(nn.Module):
    """Half the resolution. Padding on the right and bottom only, as TensorFlow's SAME does."""

    def __init__(self, channels):
        super().__init__()
        self.conv = conv(channels, channels, stride=2, padding=0)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


# Copied from lesson_05/model.py: Upsample
class Upsample(nn.Module):
    """Twice the resolution: nearest neighbour, then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


# Copied from lesson_05/model.py: time_embedding
def time_embedding(t, dim):
    """Sines, then cosines, of t at dim / 2 frequencies from 1 down to 1/10000. (B,) -> (B, dim)."""
    frequency = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2 - 1))
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


# Copied from lesson_05/model.py: norm
def norm(channels, groups):
    """GroupNorm with the epsilon of the official code."""
    return nn.GroupNorm(groups, channels, eps=1e-6)


# Copied from lesson_05/model.py: conv
def conv(c_in, c_out, kernel=3, stride=1, padding=None, zero=False):
    """A convolution that keeps the resolution (stride 1), started as the official code starts it."""
    padding = kernel // 2 if padding is None else padding
    return initialised(nn.Conv2d(c_in, c_out, kernel, stride, padding), zero)


# Copied from lesson_05/model.py: linear
def linear(c_in, c_out, zero=False):
    """A linear layer, started as the official code starts it."""
    return initialised(nn.Linear(c_in, c_out), zero)


# Copied from lesson_05/model.py: initialised
def initialised(layer, zero=False):
    """The official code's start: uniform with variance 2 / (fan in + fan out), or 0; biases 0."""
    nn.init.zeros_(layer.weight) if zero else nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
