"""DDPM: Denoising Diffusion Probabilistic Models (Ho, Jain, Abbeel 2020, arXiv 2006.11239).

Convention: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps; t runs from data (0) to noise (T - 1) and is fed to
the network as that integer. The paper counts t from 1 to T, the code from 0 to T - 1; t = -1 is the clean image.
Images are (B, C, H, W) in [-1, 1]; t and s are (B,) int64.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


# ------------------------------------------------------------------ the process: Sections 2 and 3 of the paper
# Adapted from lesson_02/model.py: DPM -- the network predicts the noise and is trained with a plain squared error, the
#   covariance is fixed, and the last step decodes grey levels
class DDPM(nn.Module):
    """The forward process, its reversal, the losses, Algorithms 1 and 2. Holds the schedule and no weights.

    timesteps       T
    beta_1, beta_T  ends of the linear schedule (Sec. 4)
    predict         what the network outputs: "noise" (eps, Eq. 11) or "mean" (mu-tilde, Eq. 8)
    objective       "simple" (squared error, Eq. 14) or "bound" (the variational bound L, Eq. 5)
    variance        sigma_t^2 of the reverse steps (Sec. 3.2): "large" (beta_t) or "small" (beta-tilde_t)
    """

    def __init__(self, timesteps=1000, beta_1=1e-4, beta_T=0.02, predict="noise", objective="simple",
                 variance="small"):
        super().__init__()
        for value, known in ((predict, ("noise", "mean")), (objective, ("simple", "bound")),
                             (variance, ("large", "small"))):
            if value not in known:
                raise ValueError(f"{value!r} is none of {', '.join(known)}")
        if timesteps < 2:
            raise ValueError(f"timesteps={timesteps} must be at least 2")
        self.timesteps, self.predict, self.objective, self.variance = timesteps, predict, objective, variance
        beta = torch.linspace(beta_1, beta_T, timesteps, dtype=torch.float64)
        abar = torch.cumprod(1 - beta, dim=0)                               # Sec. 2, before Eq. (4)
        # In float32, 1 - abar_0 = 1e-4 would keep three digits. The entry appended is abar_{-1} = 1: no noise.
        self.register_buffer("abar", torch.cat([abar, abar.new_ones(1)]), persistent=False)        # (T + 1,)

    # ------------------------------------------------------------------ forward process
    def q_sample(self, x0, t, eps):
        """x_t ~ q(x_t | x_0) with the given noise, Eq. (4). x0, eps (B, C, H, W) -> (B, C, H, W)."""
        return image(self.abar[t].sqrt()) * x0 + image((1 - self.abar[t]).sqrt()) * eps

    def beta(self, t, s):
        """The variance that the steps from s to t add: beta_t for s = t - 1. (B,) float64."""
        return 1 - self.abar[t] / self.abar[s]

    def beta_tilde(self, t, s):
        """The variance of q(x_s | x_t, x_0), Eq. (7): 0 at s = -1. (B,) float64."""
        return (1 - self.abar[s]) / (1 - self.abar[t]) * self.beta(t, s)

    def posterior_coefficients(self, t, s):
        """mu-tilde = a x_0 + b x_t, Eq. (7) with any s < t in the place of t - 1. Two (B, 1, 1, 1)."""
        a = self.abar[s].sqrt() * self.beta(t, s) / (1 - self.abar[t])
        b = (1 - self.beta(t, s)).sqrt() * (1 - self.abar[s]) / (1 - self.abar[t])
        return image(a), image(b)

    def q_posterior(self, x0, xt, t, s):
        """mu-tilde, the mean of q(x_s | x_t, x_0), Eq. (6) and (7). (B, C, H, W)."""
        a, b = self.posterior_coefficients(t, s)
        return a * x0 + b * xt

    # ------------------------------------------------------------------ reverse process
    def predict_x0(self, net, xt, t):
        """The x_0 that the network's output stands for: Eq. (15), or Eq. (7) solved for x_0. (B, C, H, W)."""
        output = net(xt, t)
        if self.predict == "noise":
            return (xt - image((1 - self.abar[t]).sqrt()) * output) / image(self.abar[t].sqrt())   # Eq. (15)
        a, b = self.posterior_coefficients(t, t - 1)
        return (output - b * xt) / a

    def p_mean(self, net, xt, t, s, clip=True):
        """mu_theta of p(x_s | x_t), and the x_0 it aims at.

        Without clipping, and for s = t - 1, this is Eq. (11) or, where the network predicts the mean, its output.
        Differs from Algorithm 2: x_0 is clipped to [-1, 1] first, as in the official code, because an error of
        the network at t = 999 is divided by sqrt(abar) = 0.006 on its way to x_0. (The official code clips noise
        predictions only; here both kinds are treated alike.)
        """
        x0 = self.predict_x0(net, xt, t)
        if clip:
            x0 = x0.clamp(-1, 1)
        return self.q_posterior(x0, xt, t, s), x0

    def reverse_variance(self, t, s):
        """sigma_t^2 of p(x_s | x_t), Sec. 3.2: beta or beta-tilde. (B,) float64.

        At t = 0 beta-tilde is 0, but Eq. (13) needs a width: both choices take beta-tilde of the next step,
        as the official code does. The sampler adds no noise there.
        """
        variance = self.beta(t, s) if self.variance == "large" else self.beta_tilde(t, s)
        one, zero = torch.ones_like(t), torch.zeros_like(t)
        return torch.where(t == 0, self.beta_tilde(one, zero), variance)

    # ------------------------------------------------------------------ losses
    def loss(self, net, x0):
        """One draw of the training loss, Algorithm 1, lines 2 to 5. x0 (B, C, H, W) -> scalar."""
        t = torch.randint(self.timesteps, (len(x0),), device=x0.device)     # Alg. 1, line 3
        eps = torch.randn_like(x0)                                          # Alg. 1, line 4
        xt = self.q_sample(x0, t, eps)
        if self.objective == "bound":                                       # Eq. (5), divided by T
            mean, _ = self.p_mean(net, xt, t, t - 1, clip=False)
            return self.bound_term(x0, xt, t, mean).mean()
        target = eps if self.predict == "noise" else self.q_posterior(x0, xt, t, t - 1)
        return F.mse_loss(net(xt, t), target)                               # Eq. (14)

    def bound_term(self, x0, xt, t, mean):
        """L_{t-1} of Eq. (5), or L_0 where t = 0, for a reverse step with this mean. (B,) bits per dimension."""
        variance = self.reverse_variance(t, t - 1)
        ratio = image(self.beta_tilde(t, t - 1) / variance)                 # 0 at t = 0, where it is not used
        error = (self.q_posterior(x0, xt, t, t - 1) - mean) ** 2
        kl = 0.5 * (ratio - 1 - ratio.clamp(min=1e-20).log() + error / image(variance))            # of two Gaussians
        nll = -discretized_log_likelihood(x0, mean, image(variance.sqrt()))
        return torch.where(image(t) == 0, nll, kl).flatten(1).mean(1) / math.log(2)

    def prior_term(self, x0):
        """L_T of Eq. (5): the divergence of q(x_T | x_0) from a unit Gaussian. (B,) bits per dimension."""
        abar = self.abar[self.timesteps - 1]
        kl = 0.5 * (abar * x0 ** 2 - abar - torch.log1p(-abar))
        return kl.flatten(1).mean(1) / math.log(2)

    @torch.no_grad()
    def bound(self, net, x0, generator=None):
        """The whole of Eq. (5), every t evaluated once. Also what Sec. 4.3 plots.

        Returns prior (B,), terms (B, T) with terms[:, 0] = L_0, both in bits per dimension, and rmse (B, T):
        the error of the x_0 estimated from x_t, on the scale 0..255. bits/dim = prior + terms.sum(1).
        """
        terms, errors = [], []
        for i in range(self.timesteps):
            t = torch.full((len(x0),), i, device=x0.device)
            xt = self.q_sample(x0, t, noise_like(x0, generator))
            mean, x0_hat = self.p_mean(net, xt, t, t - 1)
            terms.append(self.bound_term(x0, xt, t, mean))
            errors.append(127.5 * (x0_hat - x0).flatten(1).square().mean(1).sqrt())
        return self.prior_term(x0), torch.stack(terms, 1), torch.stack(errors, 1)

    # ------------------------------------------------------------------ sampling
    @torch.no_grad()
    def reverse(self, net, xT, steps=None, clip=True, generator=None):
        """Algorithm 2. Yields (t, x_s, x_0 estimate) after every step; the last x_s is the sample.

        steps: how many of the T times to visit, evenly spaced, ends included (default: all). A jump from t to s
        uses Eq. (7) with abar_s in the place of abar_{t-1}.
        """
        steps = self.timesteps if steps is None else steps
        if not 1 < steps <= self.timesteps:
            raise ValueError(f"steps={steps} must be between 2 and {self.timesteps}")
        times = torch.linspace(self.timesteps - 1, 0, steps).round().long().tolist() + [-1]
        x = xT                                                              # Alg. 2, line 1
        for t, s in zip(times[:-1], times[1:]):                             # Alg. 2, line 2
            t_, s_ = (torch.full((len(x),), i, device=x.device) for i in (t, s))
            mean, x0 = self.p_mean(net, x, t_, s_, clip)
            sigma = image(self.reverse_variance(t_, s_).sqrt())
            x = mean + sigma * noise_like(x, generator) if s >= 0 else mean  # Alg. 2, lines 3 and 4
            yield t, x, x0

    def sample(self, net, n, steps=None, shape=(1, 28, 28), clip=True, generator=None):
        """n images drawn with Algorithm 2, (n, C, H, W) in about [-1, 1]."""
        xT = noise_like(torch.empty(n, *shape, device=self.abar.device), generator)
        for _, x, _ in self.reverse(net, xT, steps, clip, generator):
            pass
        return x


def image(values):
    """(B,) -> (B, 1, 1, 1) float32, to multiply images with."""
    return values.float()[:, None, None, None]


def noise_like(x, generator=None):
    """Standard Gaussian noise. A CPU generator gives the same noise on every device."""
    if generator is None:
        return torch.randn_like(x)
    return torch.randn(x.shape, generator=generator).to(x.device)


def discretized_log_likelihood(x0, mean, sigma):
    """log p(x_0 | x_1), Eq. (13): the mass of N(mean, sigma^2) in the bin of each of the 256 grey levels.

    The bins are 2/255 wide, the first and the last open to the side. Elementwise, in nats; float32 in and out.
    """
    x0, mean, sigma = x0.double(), mean.double(), sigma.double()
    upper = torch.where(x0 > 0.999, torch.inf, (x0 + 1 / 255 - mean) / sigma)
    lower = torch.where(x0 < -0.999, -torch.inf, (x0 - 1 / 255 - mean) / sigma)
    # Phi(u) - Phi(l) = Phi(-l) - Phi(-u): on the side where both are small, their logarithms keep the digits.
    flip = lower > 0
    upper, lower = torch.where(flip, -lower, upper), torch.where(flip, -upper, lower)
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return (log_upper + torch.log1p(-torch.exp(log_lower - log_upper))).float()


# ------------------------------------------------------------------ the network: Appendix B of the paper
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


class Downsample(nn.Module):
    """Half the resolution. Padding on the right and bottom only, as TensorFlow's SAME does."""

    def __init__(self, channels):
        super().__init__()
        self.conv = conv(channels, channels, stride=2, padding=0)

    def forward(self, x):
        """(B, C, H, W) -> (B, C, H / 2, W / 2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the resolution: nearest neighbour, then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(self, x):
        """(B, C, H, W) -> (B, C, 2 H, 2 W)."""
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def time_embedding(t, dim):
    """Sines, then cosines, of t at dim / 2 frequencies from 1 down to 1/10000. (B,) -> (B, dim)."""
    frequency = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2 - 1))
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def norm(channels, groups):
    """GroupNorm with the epsilon of the official code."""
    return nn.GroupNorm(groups, channels, eps=1e-6)


def conv(c_in, c_out, kernel=3, stride=1, padding=None, zero=False):
    """A convolution that keeps the resolution (stride 1), started as the official code starts it."""
    padding = kernel // 2 if padding is None else padding
    return initialised(nn.Conv2d(c_in, c_out, kernel, stride, padding), zero)


def linear(c_in, c_out, zero=False):
    """A linear layer, started as the official code starts it."""
    return initialised(nn.Linear(c_in, c_out), zero)


def initialised(layer, zero=False):
    """The official code's start: uniform with variance 2 / (fan in + fan out), or 0; biases 0."""
    nn.init.zeros_(layer.weight) if zero else nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
