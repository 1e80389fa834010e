"""CFG: Classifier-Free Diffusion Guidance (Ho, Salimans 2022, arXiv 2207.12598).

Convention: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps; t runs from data (0) to noise (T - 1) and is fed to the
network as that integer. Guidance: eps = eps_u + w (eps_c - eps_u): w = 0 is unconditional, w = 1 plain conditional.
The paper writes (1 + w) eps_c - w eps_u: its w is ours minus 1 (GLIDE and Stable Diffusion call ours the scale s).
The paper's z_lambda is x_t with the log-SNR lambda = ln(abar_t / (1 - abar_t)); its `v` interpolates a variance and is
not a velocity. Images are (B, C, H, W) in [-1, 1]; t and s are (B,) int64, a step goes from t to s < t; a condition c
is (B,) int64, a class or `classes` for none.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


# ------------------------------------------------------------------ the process: Section 2 of the paper
def log_snr(u, low=-20.0, high=20.0):
    """lambda(u) = -2 ln tan(a u + b), Sec. 2: from `high` at u = 0 (data) down to `low` at u = 1 (noise).

    A cosine schedule: abar = sigmoid(lambda) = cos^2(a u + b). Uniform u is the paper's p(lambda). Elementwise.
    """
    b = math.atan(math.exp(-high / 2))
    a = math.atan(math.exp(-low / 2)) - b
    return -2 * torch.tan(a * u + b).log()


# Adapted from lesson_05/model.py: DDPM -- the parts that this lesson needs, on times evenly spaced in the paper's u;
#   the variance of a step back lies between lesson 05's two. The process does not know of classes
class DDPM(nn.Module):
    """Forward process, loss and the sampler of Algorithm 2. Holds the schedule and no weights.

    timesteps  T, the values of u in training, evenly spaced (the paper draws u from [0, 1])
    low, high  the ends of the log-SNR
    v          of the steps back: their variance is beta-tilde^(1 - v) beta^v
    """

    def __init__(self, timesteps=1000, low=-20.0, high=20.0, v=0.3):
        super().__init__()
        if timesteps < 2:
            raise ValueError(f"timesteps={timesteps} must be at least 2")
        if not -60 <= low < high <= 30:                # beyond, 1 - abar has no digits left in float64
            raise ValueError(f"low={low}, high={high}: -60 <= low < high <= 30 is needed")
        if not 0 <= v <= 1:
            raise ValueError(f"v={v} must be between 0 and 1")
        self.timesteps, self.v = timesteps, v
        abar = log_snr(torch.linspace(0, 1, timesteps, dtype=torch.float64), low, high).sigmoid()
        # The entry appended is abar_{-1} = 1: no noise.
        self.register_buffer("abar", torch.cat([abar, abar.new_ones(1)]), persistent=False)        # (T + 1,)

    # Copied from lesson_05/model.py: DDPM.q_sample
    def q_sample(self, x0, t, eps):
        """x_t ~ q(x_t | x_0) with the given noise. x0, eps (B, C, H, W) -> (B, C, H, W)."""
        return image(self.abar[t].sqrt()) * x0 + image((1 - self.abar[t]).sqrt()) * eps

    # Copied from lesson_01/model.py: Diffusion.beta
    def beta(self, t, s):
        """The variance that the steps from s to t add; in Sec. 2 sigma^2_{lambda|lambda'}. (B,) float64."""
        return 1 - self.abar[t] / self.abar[s]

    # Copied from lesson_01/model.py: Diffusion.beta_tilde
    def beta_tilde(self, t, s):
        """The variance of q(x_s | x_t, x_0); in Sec. 2 sigma-tilde^2_{lambda'|lambda}. 0 at s = -1. (B,) float64."""
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

    # Adapted from lesson_05/model.py: DDPM.p_mean -- noise prediction only, so predict_x0 is one line of it
    def p_mean(self, net, xt, t, s, clip=True):
        """mu_theta of p(x_s | x_t), and the x_0 that the predicted noise stands for.

        Differs from Algorithm 2: x_0 is clipped to [-1, 1], because guidance pushes it out of the range of images and
        because an error of the network at the lowest log-SNR is divided by sqrt(abar) = 5e-5.
        """
        x0 = (xt - image((1 - self.abar[t]).sqrt()) * net(xt, t)) / image(self.abar[t].sqrt())     # Alg. 2, line 4
        if clip:
            x0 = x0.clamp(-1, 1)
        return self.q_posterior(x0, xt, t, s), x0

    # Adapted from lesson_05/model.py: DDPM.reverse_variance -- between beta-tilde (v = 0) and beta (v = 1)
    def reverse_variance(self, t, s):
        """The variance of p(x_s | x_t), Sec. 2: what lesson 09 learns for every pixel is one number v. (B,) float64."""
        return self.beta_tilde(t, s) ** (1 - self.v) * self.beta(t, s) ** self.v

    # Adapted from lesson_05/model.py: DDPM.loss -- the simple loss of the noise only
    def loss(self, net, x0):
        """One draw of the training loss, Algorithm 1 after the label is dropped. x0 (B, C, H, W) -> scalar."""
        t = torch.randint(self.timesteps, (len(x0),), device=x0.device)     # uniform u: lambda ~ p(lambda)
        eps = torch.randn_like(x0)
        return F.mse_loss(net(self.q_sample(x0, t, eps), t), eps)

    def times(self, steps=None, start=None):
        """`steps` times from high to low, evenly spaced in u, both ends included (default: all); a list of int.

        start: the log-SNR of the first (default: the lowest). Without clipping -20 is too low for few steps.
        """
        steps = self.timesteps if steps is None else steps
        lambdas = torch.logit(self.abar[:-1])
        first = self.timesteps - 1 if start is None else int((lambdas >= start - 1e-6).sum()) - 1
        if not 1 < steps <= first + 1:
            raise ValueError(f"steps={steps} must be between 2 and {max(first + 1, 2)}" + (
                "" if start is None else f", from log-SNR {start} on"))
        return torch.linspace(first, 0, steps).round().long().tolist()

    # Adapted from lesson_05/model.py: DDPM.reverse -- the times are given, as in Algorithm 2
    @torch.no_grad()
    def reverse(self, net, xT, times, clip=True, generator=None):
        """Algorithm 2. Yields (t, x_s, x_0 estimate) after every step; the last x_s is the sample.

        net: eps(x_t, t), guided or not; see `guided`. times: as `times` gives them.
        """
        x = xT                                                              # Alg. 2, line 1
        for t, s in zip(times, [*times[1:], -1]):                           # Alg. 2, line 2
            t_, s_ = (torch.full((len(x),), i, device=x.device) for i in (t, s))
            mean, x0 = self.p_mean(net, x, t_, s_, clip)                    # lines 3 and 4
            sigma = image(self.reverse_variance(t_, s_).sqrt())
            x = mean + sigma * noise_like(x, generator) if s >= 0 else mean  # line 5
            yield t, x, x0

    # Adapted from lesson_05/model.py: DDPM.sample -- the times are given
    def sample(self, net, n, times=None, shape=(1, 28, 28), clip=True, generator=None):
        """n images drawn with Algorithm 2, (n, C, H, W) in about [-1, 1]."""
        xT = noise_like(torch.empty(n, *shape, device=self.abar.device), generator)
        for _, x, _ in self.reverse(net, xT, self.times() if times is None else times, clip, generator):
            pass
        return x


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


# ------------------------------------------------------------------ guidance: Section 3.2 of the paper
# Copied from lesson_05/sublesson_c/model.py: drop
def drop(c, null, p):
    """Algorithm 1, line 3: each sample's condition becomes `null` with probability p, a coin for every sample.

    c (B, ...), null the same shape or one that broadcasts to it -> (B, ...). The paper's p is p_uncond.
    """
    dropped = torch.rand(len(c), device=c.device) < p
    return torch.where(dropped.view(-1, *[1] * (c.dim() - 1)), null, c)


# Copied from lesson_05/sublesson_c/model.py: given
def given(net, c):
    """The network with its condition filled in: eps(x_t, t, c) as the function of x_t and t that DDPM calls."""
    return lambda xt, t: net(xt, t, c)


# Copied from lesson_05/sublesson_c/model.py: guided
def guided(net, c, null, w=1.0):
    """Eq. (6): eps = eps_u + w (eps_c - eps_u), a function of x_t and t. The paper's w is this one minus 1.

    One batch of twice the size: it costs two network calls, unless w is 0 (no condition) or 1 (plain conditional).
    c, null (B, ...): the condition and its absence.
    """
    if w in (0, 1):
        return given(net, c if w else null)

    def eps(xt, t):
        eps_c, eps_u = net(torch.cat([xt, xt]), torch.cat([t, t]), torch.cat([c, null])).chunk(2)
        return eps_u + w * (eps_c - eps_u)

    return eps


class Mixture(nn.Module):
    """The exact network for Gaussians of deviation `std` around `means` (K, D), one for each class: Fig. 2's data.

    It is called as the U-Net is, with points as (B, D, 1, 1); c = K is "no class": all of them, equally likely.
    """

    def __init__(self, process, means, std):
        super().__init__()
        self.process, self.std = process, std
        self.register_buffer("means", torch.as_tensor(means).float(), persistent=False)

    def log_likelihoods(self, x, abar=1.0):
        """ln q_t(x | c) of every class, less a constant that they share. x (B, D) -> (B, K)."""
        return -torch.cdist(x, self.means * abar ** 0.5) ** 2 / (2 * (abar * self.std ** 2 + 1 - abar))

    def log_guided(self, x, c, w, abar=1.0):
        """ln of q_t(x) (q_t(x | c) / q_t(x))^w, not normalised: the density that guidance is said to sample. (B,)."""
        each = self.log_likelihoods(x, abar)
        marginal = each.logsumexp(1) - math.log(len(self.means))
        return marginal + w * (each[:, c] - marginal)

    def forward(self, xt, t, c):
        """eps = -sqrt(1 - abar) grad ln q_t(x_t | c), exact. xt (B, D, 1, 1), t, c (B,) -> (B, D, 1, 1)."""
        x, abar = xt.flatten(1).double(), self.process.abar[t][:, None]     # in float32 1 - abar would lose its digits
        centres = abar.sqrt()[:, :, None] * self.means                      # (B, K, D)
        variance = abar * self.std ** 2 + 1 - abar                          # of x_t around its centre, (B, 1)
        among = torch.softmax(-(x[:, None] - centres).square().sum(2) / (2 * variance), dim=1)     # p(c | x_t)
        asked = F.one_hot(c, len(self.means) + 1)[:, :-1].to(x)
        share = torch.where(c[:, None] == len(self.means), among, asked)                           # (B, K)
        eps = (1 - abar).sqrt() * (x - (share[:, :, None] * centres).sum(1)) / variance
        return eps.float().unflatten(1, xt.shape[1:])


# ------------------------------------------------------------------ the network
# Adapted from lesson_05/model.py: UNet -- a class, or none: a learned vector for each, added to the time's
class UNet(nn.Module):
    """U-Net over an image, a time and a class.

    channels   width of the first level
    mults      width of every level as a multiple of `channels`; each further level halves the resolution
    blocks     residual blocks a level on the way down (one more on the way up)
    attention  resolutions that get self-attention after every block
    patch      the image enters as patch x patch pixels a position (1: one pixel)
    classes    the condition is 0 ... classes - 1, or `classes` for none
    """

    def __init__(self, channels=128, mults=(1, 2, 2), blocks=2, attention=(14,), dropout=0.1, groups=32, patch=1,
                 image_size=28, image_channels=1, classes=10):
        super().__init__()
        if image_size % (patch * 2 ** (len(mults) - 1)):
            raise ValueError(f"image_size={image_size} cannot be halved {len(mults) - 1} times "
                             f"after patches of {patch}")
        self.channels, self.patch = channels, patch
        width = 4 * channels
        self.time = nn.Sequential(linear(channels, width), nn.SiLU(), linear(width, width))
        self.label = nn.Embedding(classes + 1, width)                       # the last row is the null class
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

    def forward(self, x, t, c):
        """x (B, C, H, W), t (B,) int, c (B,) int -> the predicted noise, (B, C, H, W)."""
        emb = self.time(time_embedding(t, self.channels)) + self.label(c)   # (B, 4 channels)
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


# Adapted from lesson_05/model.py: ResBlock -- time and class also scale the normalised features (adaptive group norm),
#   as in the networks that the paper takes over from guided-diffusion; lesson 05 adds them
class ResBlock(nn.Module):
    """GroupNorm, swish, convolution, twice; time and class scale and shift the second norm. conv2 starts at 0."""

    def __init__(self, c_in, c_out, width, dropout=0.0, groups=32):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in, groups), conv(c_in, c_out)
        self.time = linear(width, 2 * c_out)
        self.norm2, self.conv2 = norm(c_out, groups), conv(c_out, c_out, zero=True)
        self.dropout = nn.Dropout(dropout)
        self.skip = conv(c_in, c_out, kernel=1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        """x (B, c_in, H, W), emb (B, width) -> (B, c_out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        h = self.conv2(self.dropout(F.silu(h)))
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
