"""Class conditioning by cross-attention: the mechanism of LDM (Rombach et al. 2021, arXiv 2112.10752, Sec. 3.3).

Convention: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps; t runs from data (0) to noise (T - 1) and is fed to
the network as that integer. Guidance: eps = eps_u + w (eps_c - eps_u), so w = 1 is plain conditional.
Images are (B, C, H, W) in [-1, 1]; t and s are (B,) int64; a condition c is (B,) int64, a digit or `classes`
for none; the context is a few tokens for each image, (B, L, D).
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


# ------------------------------------------------------------------ the process of lesson 05, which knows no classes
# Adapted from lesson_05/model.py: DDPM -- the parts that this lesson needs: noise prediction, the simple loss, the
#   smaller variance, clipping. Nothing is added: a condition reaches the network through `given` and `guided`
class DDPM(nn.Module):
    """Forward process, loss and sampler of DDPM. Holds the schedule and no weights.

    timesteps       T
    beta_1, beta_T  ends of the linear schedule
    """

    def __init__(self, timesteps=1000, beta_1=1e-4, beta_T=0.02):
        super().__init__()
        if timesteps < 2:
            raise ValueError(f"timesteps={timesteps} must be at least 2")
        self.timesteps = timesteps
        beta = torch.linspace(beta_1, beta_T, timesteps, dtype=torch.float64)
        abar = torch.cumprod(1 - beta, dim=0)
        # The entry appended is abar_{-1} = 1: no noise.
        self.register_buffer("abar", torch.cat([abar, abar.new_ones(1)]), persistent=False)        # (T + 1,)

    def q_sample(self, x0, t, eps):
        """x_t ~ q(x_t | x_0) with the given noise. x0, eps (B, C, H, W) -> (B, C, H, W)."""
        return image(self.abar[t].sqrt()) * x0 + image((1 - self.abar[t]).sqrt()) * eps

    def beta(self, t, s):
        """The variance that the steps from s to t add: beta_t for s = t - 1. (B,) float64."""
        return 1 - self.abar[t] / self.abar[s]

    def beta_tilde(self, t, s):
        """The variance of q(x_s | x_t, x_0): 0 at s = -1. (B,) float64."""
        return (1 - self.abar[s]) / (1 - self.abar[t]) * self.beta(t, s)

    def q_posterior(self, x0, xt, t, s):
        """mu-tilde, the mean of q(x_s | x_t, x_0), for any s < t. (B, C, H, W)."""
        a = self.abar[s].sqrt() * self.beta(t, s) / (1 - self.abar[t])
        b = (1 - self.beta(t, s)).sqrt() * (1 - self.abar[s]) / (1 - self.abar[t])
        return image(a) * x0 + image(b) * xt

    def p_mean(self, net, xt, t, s):
        """mu_theta of p(x_s | x_t), and the x_0 that the predicted noise stands for, clipped to [-1, 1]."""
        x0 = (xt - image((1 - self.abar[t]).sqrt()) * net(xt, t)) / image(self.abar[t].sqrt())
        return self.q_posterior(x0.clamp(-1, 1), xt, t, s), x0.clamp(-1, 1)

    def loss(self, net, x0):
        """One draw of the training loss. x0 (B, C, H, W) -> scalar."""
        t = torch.randint(self.timesteps, (len(x0),), device=x0.device)
        eps = torch.randn_like(x0)
        return F.mse_loss(net(self.q_sample(x0, t, eps), t), eps)

    @torch.no_grad()
    def reverse(self, net, xT, steps=None, generator=None):
        """The sampler. Yields (t, x_s, x_0 estimate) after every step; the last x_s is the sample.

        steps: how many of the T times to visit, evenly spaced, ends included (default: all).
        """
        steps = self.timesteps if steps is None else steps
        if not 1 < steps <= self.timesteps:
            raise ValueError(f"steps={steps} must be between 2 and {self.timesteps}")
        times = torch.linspace(self.timesteps - 1, 0, steps).round().long().tolist() + [-1]
        x = xT
        for t, s in zip(times[:-1], times[1:]):
            t_, s_ = (torch.full((len(x),), i, device=x.device) for i in (t, s))
            mean, x0 = self.p_mean(net, x, t_, s_)
            sigma = image(self.beta_tilde(t_, s_).sqrt())
            x = mean + sigma * noise_like(x, generator) if s >= 0 else mean
            yield t, x, x0

    def sample(self, net, n, steps=None, shape=(1, 28, 28), generator=None):
        """n images, (n, C, H, W) in about [-1, 1]."""
        xT = noise_like(torch.empty(n, *shape, device=self.abar.device), generator)
        for _, x, _ in self.reverse(net, xT, steps, generator):
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


# ------------------------------------------------------------------ the condition, between process and network
def drop(c, null, p):
    """Replace each sample's condition by `null` with probability p: a coin for every sample, not one for the batch.

    c (B, ...), null the same shape or one that broadcasts to it -> (B, ...).
    """
    dropped = torch.rand(len(c), device=c.device) < p
    return torch.where(dropped.view(-1, *[1] * (c.dim() - 1)), null, c)


def given(net, c):
    """The network with its condition filled in: eps(x_t, t, c) as the function of x_t and t that DDPM calls."""
    return lambda xt, t: net(xt, t, c)


def guided(net, c, null, w=1.0):
    """eps = eps_u + w (eps_c - eps_u), as a function of x_t and t; two network calls unless w is 0 or 1.

    c, null (B, ...): the condition and its absence. w = 0: no condition; w = 1: the plain conditional network.
    """
    if w in (0, 1):
        return given(net, c if w else null)

    def eps(xt, t):
        eps_c, eps_u = net(torch.cat([xt, xt]), torch.cat([t, t]), torch.cat([c, null])).chunk(2)
        return eps_u + w * (eps_c - eps_u)

    return eps


class ClassTokens(nn.Module):
    """The context of a class: L learned tokens for each, and L for "no class", the last row of the table.

    A learned null is a context like any other. Zeros would leave W_O's bias alone, the same at every position.
    """

    def __init__(self, classes, tokens, dim):
        super().__init__()
        self.tokens, self.table = tokens, nn.Embedding(classes + 1, tokens * dim)

    def forward(self, c):
        """c (B,) int, 0 to classes -> (B, L, D)."""
        return rearrange(self.table(c), "b (l d) -> b l d", l=self.tokens)


class CrossAttention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V with Q = W_Q x, K = W_K c, V = W_V c (LDM, Sec. 3.3), in several heads, then W_O.

    Tokens x (B, N, C) ask, a context (B, L, D) answers. No biases but W_O's.
    """

    def __init__(self, channels, context, heads, head_dim):
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.q = nn.Linear(channels, inner, bias=False)
        self.k, self.v = nn.Linear(context, inner, bias=False), nn.Linear(context, inner, bias=False)
        self.out = nn.Linear(inner, channels)

    def split(self, x):
        """(B, N, heads d) -> (B, heads, N, d)."""
        return rearrange(x, "b n (h d) -> b h n d", h=self.heads)

    def weights(self, x, context):
        """How much each of the N tokens takes from each of the L: (B, heads, N, L), sums over L are 1."""
        q, k = self.split(self.q(x)), self.split(self.k(context))
        return torch.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[3]), dim=3)

    def forward(self, x, context):
        """x (B, N, C), context (B, L, D) -> (B, N, C)."""
        h = self.weights(x, context) @ self.split(self.v(context))          # (B, heads, N, d)
        return self.out(rearrange(h, "b h n d -> b n (h d)"))


class CrossBlock(nn.Module):
    """Every position of the image attends to the context. The projection W_O starts at 0: at first nothing changes."""

    def __init__(self, channels, context, heads, groups=32):
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels cannot be split into heads={heads}")
        self.norm = norm(channels, groups)
        self.attend = CrossAttention(channels, context, heads, channels // heads)
        initialised(self.attend.out, zero=True)

    def forward(self, x, context):
        """x (B, C, H, W), context (B, L, D) -> (B, C, H, W)."""
        h = self.attend(rearrange(self.norm(x), "b c h w -> b (h w) c"), context)
        return x + rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])


# ------------------------------------------------------------------ the network
# Adapted from lesson_05/model.py: UNet -- a condition c: its tokens are the context of a CrossBlock after every block
#   at the attention resolutions and in the middle (condition="attention"), or it is added to the time ("time")
class UNet(nn.Module):
    """U-Net over an image, a time and a condition.

    channels   width of the first level
    mults      width of every level as a multiple of `channels`; each further level halves the resolution
    blocks     residual blocks a level on the way down (one more on the way up)
    attention  resolutions at which every block is followed by cross-attention (the middle always is)
    patch      the image enters as patch x patch pixels a position (1: one pixel)
    classes    the condition is 0 ... classes - 1, or `classes` for none
    condition  "attention": the image attends to tokens of the class; "time": one token, projected, joins the time's
    tokens     tokens of a class, L; each has `context` numbers, D
    """

    def __init__(self, channels=128, mults=(1, 2, 2), blocks=2, attention=(14,), dropout=0.1, groups=32, patch=1,
                 image_size=28, image_channels=1, classes=10, condition="attention", tokens=4, context=64, heads=2):
        super().__init__()
        if condition not in ("attention", "time"):
            raise ValueError(f"{condition!r} is none of attention, time")
        if image_size % (patch * 2 ** (len(mults) - 1)):
            raise ValueError(f"image_size={image_size} cannot be halved {len(mults) - 1} times "
                             f"after patches of {patch}")
        self.channels, self.patch, self.condition = channels, patch, condition
        width = 4 * channels
        self.time = nn.Sequential(linear(channels, width), nn.SiLU(), linear(width, width))
        self.classes = ClassTokens(classes, tokens, context)
        if condition == "time":                                             # as W_O: at first nothing changes
            self.classes = nn.Sequential(ClassTokens(classes, 1, context), linear(context, width, zero=True))
        size, c = image_size // patch, channels
        self.stem = conv(image_channels * patch ** 2, c)

        def cross(channels):
            return [CrossBlock(channels, context, heads, groups)] if condition == "attention" else []

        def level(c_in, c_out):
            return Stage(ResBlock(c_in, c_out, width, dropout, groups), *(cross(c_out) if size in attention else []))

        self.down, skips = nn.ModuleList(), [c]
        for i, mult in enumerate(mults):
            for _ in range(blocks):
                self.down.append(level(c, channels * mult))
                c = channels * mult
                skips.append(c)
            if i < len(mults) - 1:
                self.down.append(Stage(Downsample(c)))
                skips.append(c)
                size //= 2
        self.middle = Stage(ResBlock(c, c, width, dropout, groups), Attention(c, groups), *cross(c),
                            ResBlock(c, c, width, dropout, groups))
        self.up = nn.ModuleList()
        for i, mult in reversed(list(enumerate(mults))):
            for j in range(blocks + 1):
                stage = level(c + skips.pop(), channels * mult)
                c = channels * mult
                if i > 0 and j == blocks:
                    stage.append(Upsample(c))
                self.up.append(stage)
            size *= 2
        self.out = nn.Sequential(norm(c, groups), nn.SiLU(), conv(c, image_channels * patch ** 2, zero=True))

    def forward(self, x, t, c):
        """x (B, C, H, W), t (B,) int, c (B,) int -> the predicted noise, (B, C, H, W)."""
        emb = self.time(time_embedding(t, self.channels))                   # (B, 4 channels)
        context = self.classes(c)                                           # (B, L, D), or (B, 1, 4 channels)
        if self.condition == "time":
            emb = emb + context[:, 0]
        x = rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=self.patch, q=self.patch)
        h = self.stem(x)
        skips = [h]
        for stage in self.down:
            h = stage(h, emb, context)
            skips.append(h)
        h = self.middle(h, emb, context)
        for stage in self.up:
            h = stage(torch.cat([h, skips.pop()], dim=1), emb, context)
        return rearrange(self.out(h), "b (c p q) h w -> b c (h p) (w q)", p=self.patch, q=self.patch)


class Stage(nn.Sequential):
    """Layers one after the other; each is handed what it needs besides the image: the time, the context, nothing."""

    def forward(self, h, emb, context):
        """h (B, C, H, W), emb (B, width), context (B, L, D) -> (B, C', H', W')."""
        for layer in self:
            if isinstance(layer, ResBlock):
                h = layer(h, emb)
            elif isinstance(layer, CrossBlock):
                h = layer(h, context)
            else:
                h = layer(h)
        return h


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
