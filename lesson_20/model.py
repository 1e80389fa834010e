"""EDM: Elucidating the Design Space of Diffusion-Based Generative Models (Karras, Aittala, Aila, Laine 2022,
arXiv 2206.00364).

Convention: x = y + sigma eps, where y is the image, shifted and scaled to mean 0 and std 0.5; sampling lowers sigma
from 80 to 0.002 and then to 0; the network receives c_in x and, as its time, ln(sigma) / 4. With a scaling s(t) the
state is s (y + sigma eps). The paper's i counts the steps from 0 (noise) to N - 1; t_N = 0 is the image.
Images are (B, C, H, W): in [-1, 1] outside, standardised inside. sigma is (B,), or () for a whole batch.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

LEVELS = ("edm", "vp", "ve", "iddpm")
SOLVERS = ("heun", "euler")


# ------------------------------------------------------------------ schedules: Table 1, sigma(t) and s(t)
class Schedule(NamedTuple):
    """How the noise level and the scaling of the state, x = s(t) (y + sigma(t) eps), run with time. Elementwise."""

    sigma: Callable                                    # t -> sigma
    time: Callable                                     # sigma -> t
    sigma_dot: Callable                                # t -> d sigma / dt; not asked at t = 0
    scale: Callable = torch.ones_like                  # t -> s
    scale_dot: Callable = torch.zeros_like             # t -> ds / dt


def vp_sigma(t, beta_d=19.9, beta_min=0.1):
    """sigma(t) of the variance-preserving SDE with beta(t) = beta_min + beta_d t, t in [0, 1]. s^2 is DDPM's abar."""
    return torch.expm1(0.5 * beta_d * t ** 2 + beta_min * t).sqrt()


def vp_time(sigma, beta_d=19.9, beta_min=0.1):
    """The inverse of vp_sigma."""
    return ((beta_min ** 2 + 2 * beta_d * torch.log1p(sigma ** 2)).sqrt() - beta_min) / beta_d


SCHEDULES = {
    "edm": Schedule(sigma=lambda t: t, time=lambda sigma: sigma, sigma_dot=torch.ones_like),
    "ve": Schedule(sigma=torch.sqrt, time=torch.square, sigma_dot=lambda t: 0.5 / t.sqrt()),
    "vp": Schedule(sigma=vp_sigma, time=vp_time,
                   sigma_dot=lambda t: 0.5 * (0.1 + 19.9 * t) * (vp_sigma(t) + 1 / vp_sigma(t)),
                   scale=lambda t: (1 + vp_sigma(t) ** 2).rsqrt(),
                   scale_dot=lambda t: -0.5 * (0.1 + 19.9 * t) * (1 + vp_sigma(t) ** 2).rsqrt()),
}


def noise_levels(name, steps, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """N = `steps` falling noise levels, then 0: (N + 1,) float64. Table 1, "time steps", as levels of noise.

    edm    sigma^(1/rho) in a straight line, Eq. (5)
    vp     evenly spaced in the time of the VP schedule: DDPM's and DDIM's
    ve     a geometric series
    iddpm  evenly spaced places of the cosine schedule's ladder of 1000 levels, from the one nearest to sigma_max
           (80.2) to the one nearest to sigma_min (0.0064)
    Differs from the paper: all run between the same ends, so that they start from the same x.
    """
    if name not in LEVELS:
        raise ValueError(f"levels={name!r} is none of {', '.join(LEVELS)}")
    if steps < 2:
        raise ValueError(f"steps={steps} must be at least 2")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"sigma_min={sigma_min} and sigma_max={sigma_max} must be positive and rise")
    way = torch.linspace(0, 1, steps, dtype=torch.float64)                  # i / (N - 1)
    high, low = (torch.tensor(end, dtype=torch.float64) for end in (sigma_max, sigma_min))
    if name == "edm":
        sigma = (high ** (1 / rho) + way * (low ** (1 / rho) - high ** (1 / rho))) ** rho          # Eq. (5)
    elif name == "vp":
        sigma = vp_sigma(vp_time(high) + way * (vp_time(low) - vp_time(high)))
    elif name == "ve":
        sigma = high * (low / high) ** way
    else:
        ladder = iddpm_ladder()
        first, last = ((ladder / end).log().abs().argmin() for end in (high, low))
        if steps > last - first + 1:
            raise ValueError(f"steps={steps}: there are {last - first + 1} levels from {sigma_max} to {sigma_min}")
        sigma = ladder[(first + way * (last - first) + 0.5).floor().long()]
    return torch.cat([sigma, sigma.new_zeros(1)])                           # sigma_N = 0


def iddpm_ladder(M=1000, C_1=0.001, C_2=0.008):
    """u_0, ..., u_{M-1} of Table 1: the noise levels of the cosine schedule, beta at most 1 - C_1. Falling."""
    abar = torch.sin(math.pi / 2 * torch.arange(M + 1, dtype=torch.float64) / M / (C_2 + 1)) ** 2
    ratio = (abar[:-1] / abar[1:]).clamp(min=C_1)                           # of step j - 1 to j
    return (1 / ratio.flip(0).cumprod(0).flip(0) - 1).sqrt()                # u_j^2 + 1 is the product from j on


# ------------------------------------------------------------------ preconditioning and training: Sections 4, 5
# Adapted from lesson_07/model.py: SDE -- a denoiser for every noise level in the place of the score at every time; loss
#   and preconditioning that suit the level; the ODE apart, solved in steps of our choice
class EDM(nn.Module):
    """The denoiser around a network, its training loss, and sampling with it. Holds no weights.

    sigma_data    std of the standardised data, for which c_skip, c_out, c_in are made
    mean, std     of the pixels in [0, 1]
    precondition  "edm" (Eq. 7) or "vp": the network predicts the noise, is fed 999 t, and c_in assumes data of std 1
    objective     "edm" (log-normal sigma, weight 1 / c_out^2) or "vp" (t uniform, weight 1 / sigma^2)
    p_mean, p_std of ln(sigma) in training
    sigma_min, sigma_max, rho  ends and bend of the sampler's noise levels
    """

    def __init__(self, sigma_data=0.5, mean=0.1307, std=0.3081, precondition="edm", objective="edm", p_mean=-1.2,
                 p_std=1.2, sigma_min=0.002, sigma_max=80.0, rho=7.0):
        super().__init__()
        for value in (precondition, objective):
            if value not in ("edm", "vp"):
                raise ValueError(f"{value!r} is none of edm, vp")
        self.sigma_data, self.mean, self.std = sigma_data, mean, std
        self.precondition, self.objective, self.p_mean, self.p_std = precondition, objective, p_mean, p_std
        self.ends = {"sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho}

    def standardise(self, x0):
        """Images in [-1, 1] -> y with mean 0 and std sigma_data over the training set."""
        return ((x0 + 1) / 2 - self.mean) / self.std * self.sigma_data

    def to_image(self, y):
        """The inverse of `standardise`."""
        return (y / self.sigma_data * self.std + self.mean) * 2 - 1

    def coefficients(self, sigma):
        """c_skip, c_out, c_in, c_noise of Table 1 for noise levels sigma. Each like sigma."""
        if self.precondition == "vp":                                       # D = x - sigma F: F is the noise
            return torch.ones_like(sigma), -sigma, (sigma ** 2 + 1).rsqrt(), 999 * vp_time(sigma)
        total = sigma ** 2 + self.sigma_data ** 2                           # variance of x
        return (self.sigma_data ** 2 / total, sigma * self.sigma_data * total.rsqrt(), total.rsqrt(),
                sigma.log() / 4)

    def denoise(self, net, x, sigma):
        """D(x; sigma), Eq. (7): the mean of the clean image, not clipped. x (B, C, H, W), in its dtype."""
        sigma = sigma.to(x.dtype).expand(len(x))[:, None, None, None]
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)             # (B, 1, 1, 1)
        output = net((c_in * x).float(), c_noise.float().flatten())
        return c_skip * x + c_out * output                                  # Eq. (7)

    def draw_sigma(self, n, device=None):
        """The noise levels of a training batch, (n,)."""
        if self.objective == "vp":
            return vp_sigma(1e-5 + (1 - 1e-5) * torch.rand(n, device=device))         # t ~ U(1e-5, 1)
        return (self.p_mean + self.p_std * torch.randn(n, device=device)).exp()                    # Sec. 5

    def weight(self, sigma):
        """lambda(sigma) of the loss, Table 1. Like sigma."""
        return sigma ** -2 if self.objective == "vp" else self.coefficients(sigma)[1] ** -2

    def loss_at(self, net, y, sigma, eps):
        """lambda |D(y + sigma eps) - y|^2, the mean over the pixels of each image. (B,)."""
        error = self.denoise(net, y + sigma[:, None, None, None] * eps, sigma) - y
        return self.weight(sigma) * error.square().flatten(1).mean(1)

    def loss(self, net, x0):
        """One draw of the training loss, Sec. 5. x0 (B, C, H, W) in [-1, 1] -> scalar."""
        return self.loss_at(net, self.standardise(x0), self.draw_sigma(len(x0), x0.device), torch.randn_like(x0)).mean()

    def levels(self, steps, name="edm"):
        """The noise levels of `noise_levels` between this process's ends. (N + 1,)."""
        return noise_levels(name, steps, **self.ends)

    @torch.no_grad()
    def reverse(self, net, noise, sigmas, schedule="edm", solver="heun", churn=0.0, generator=None, **limits):
        """Algorithm 1, or with churn Algorithm 2. Yields (sigma, image, denoised image) after every step."""
        denoise = lambda x, sigma: self.denoise(net, x, sigma)
        if churn:
            path = stochastic_sampler(denoise, noise, sigmas, churn, generator=generator, **limits)
        else:
            path = ode_sampler(denoise, noise, sigmas, schedule, solver)
        for sigma, x, clean in path:
            yield sigma, self.to_image(x).float(), self.to_image(clean).float()

    def sample(self, net, noise, sigmas, **how):
        """Images in about [-1, 1] that start from standard Gaussian noise, (B, C, H, W)."""
        for _, x, _ in self.reverse(net, noise, sigmas, **how):
            pass
        return x


# ------------------------------------------------------------------ sampling: Sections 3, 4
def ode_sampler(denoise, noise, sigmas, schedule="edm", solver="heun"):
    """Algorithm 1: the probability flow ODE with Heun's or Euler's method. Any schedule on any noise levels.

    denoise  D(x, sigma); noise (B, C, H, W) of variance 1; sigmas (N + 1,), the last one 0
    Yields (sigma_i, x / s, D) after every step. The state is float64: the sum of many small steps keeps its digits.
    Network calls: N with "euler", 2 N - 1 with "heun". Euler with schedule "edm" is DDIM.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is none of {', '.join(SCHEDULES)}")
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} is none of {', '.join(SOLVERS)}")
    plan = SCHEDULES[schedule]
    times = plan.time(sigmas.to(noise.device))                              # t_i with sigma(t_i) = sigma_i

    def slope(x, t):
        sigma, s = plan.sigma(t), plan.scale(t)
        clean = denoise(x / s, sigma)
        growth = plan.sigma_dot(t) / sigma
        return (growth + plan.scale_dot(t) / s) * x - growth * s * clean, clean                    # dx/dt

    x = noise.double() * plan.sigma(times[0]) * plan.scale(times[0])        # Alg. 1: x_0 ~ N(0, s^2 sigma^2)
    for sigma, t, t_next in zip(sigmas, times[:-1], times[1:]):
        d, clean = slope(x, t)
        x_next = x + (t_next - t) * d                                       # Euler step
        if solver == "heun" and plan.sigma(t_next) > 0:                     # at sigma = 0 there is no slope
            d_next, _ = slope(x_next, t_next)
            x_next = x + (t_next - t) * (d + d_next) / 2                    # the trapezoidal rule
        x = x_next
        yield sigma, x / plan.scale(t_next), clean


def stochastic_sampler(denoise, noise, sigmas, churn, s_min=0.05, s_max=50.0, s_noise=1.003, generator=None):
    """Algorithm 2: before each Heun step noise is added, up to sigma-hat. For sigma(t) = t, s(t) = 1.

    churn, s_min, s_max, s_noise: S_churn, S_tmin, S_tmax, S_noise. Yields (sigma_i, x, D) after every step.
    """
    if churn < 0:
        raise ValueError(f"churn={churn} must not be negative")
    steps = len(sigmas) - 1
    x = noise.double() * sigmas[0].to(noise.device)
    for sigma, sigma_next in zip(sigmas.to(noise.device)[:-1], sigmas.to(noise.device)[1:]):
        gamma = min(churn / steps, math.sqrt(2) - 1) if s_min <= sigma <= s_max else 0.0
        sigma_hat = sigma * (1 + gamma)
        x_hat = x
        if gamma:
            x_hat = x + (sigma_hat ** 2 - sigma ** 2).sqrt() * s_noise * noise_like(x, generator)
        clean = denoise(x_hat, sigma_hat)
        d = (x_hat - clean) / sigma_hat
        x = x_hat + (sigma_next - sigma_hat) * d                            # Euler step
        if sigma_next > 0:
            d_next = (x - denoise(x, sigma_next)) / sigma_next
            x = x_hat + (sigma_next - sigma_hat) * (d + d_next) / 2         # 2nd order
        yield sigma, x, clean


# Copied from lesson_05/model.py: noise_like
def noise_like(x, generator=None):
    """Standard Gaussian noise. A CPU generator gives the same noise on every device."""
    if generator is None:
        return torch.randn_like(x)
    return torch.randn(x.shape, generator=generator).to(x.device)


# ------------------------------------------------------------------ the network F, lesson 05's as it is
# Copied from lesson_05/model.py: UNet
class UNet(nn.Module):
    """U-Net over an image and a time: residual blocks with the time added in, attention at the low resolutions.

    channels   width of the first level
    mults      width of every level as a multiple of `channels`; each further level halves the resolution
    blocks     residual blocks a level on the way down (one more on the way up)
    attention  resolutions that get self-attention after every block
    patch      the image enters as patch x patch pixels a position (1: as in the paper)
    """

    def __init__(self, channels=128, mults=(1, 2, 2), blocks=2, attention=(14,), dropout=0.1, groups=32, patch=1,
                 image_size=28, image_channels=1):
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
        self.out = nn.Sequential(norm(c, groups), nn.SiLU(), conv(c, image_channels * patch ** 2, zero=True))

    def forward(self, x, t):
        """x (B, C, H, W), t (B,) int -> the prediction, (B, C, H, W)."""
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
        """x (B, c_in, H, W), emb (B, width) -> (B, c_out, H, W)."""
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
        """(B, C, H, W) -> (B, C, H, W)."""
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
        """(B, C, H, W) -> (B, C, H / 2, W / 2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


# Copied from lesson_05/model.py: Upsample
class Upsample(nn.Module):
    """Twice the resolution: nearest neighbour, then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(self, x):
        """(B, C, H, W) -> (B, C, 2 H, 2 W)."""
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
