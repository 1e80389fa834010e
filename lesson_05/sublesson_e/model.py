"""Text-to-image: the condition is the token sequence of a text encoder (Rombach et al. 2021, arXiv 2112.10752).

Convention: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps; t runs from data (0) to noise (T - 1) and is fed to
the network as that integer. Guidance: eps = eps_u + w (eps_c - eps_u), so w = 1 is plain conditional.
Images are (B, C, H, W) in [-1, 1]; t and s are (B,) int64; a condition c is a caption, (B, L) int64: the number of
its start token, of its words, then 0 for padding. The empty caption, the start token alone, stands for "no caption".
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


# ------------------------------------------------------------------ the process of lesson 05, which knows no classes
# Copied from lesson_05/sublesson_c/model.py: DDPM
class DDPM(nn.Module):
    """Forward process, loss and sampler of DDPM with T timesteps and a linear schedule. Holds no weights."""

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
        """Yields (t, x_s, x_0 estimate) after each of `steps` evenly spaced steps; the last x_s is the sample."""
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
# Copied from lesson_05/sublesson_c/model.py: drop
def drop(c, null, p):
    """Replace each sample's condition c (B, ...) by `null` with probability p."""
    dropped = torch.rand(len(c), device=c.device) < p
    return torch.where(dropped.view(-1, *[1] * (c.dim() - 1)), null, c)


# Copied from lesson_05/sublesson_c/model.py: given
def given(net, c):
    """The network with its condition filled in: eps(x_t, t, c) as the function of x_t and t that DDPM calls."""
    return lambda xt, t: net(xt, t, c)


# Copied from lesson_05/sublesson_c/model.py: guided
def guided(net, c, null, w=1.0):
    """eps = eps_u + w (eps_c - eps_u), as a function of x_t and t; two network calls unless w is 0 or 1."""
    if w in (0, 1):
        return given(net, c if w else null)

    def eps(xt, t):
        eps_c, eps_u = net(torch.cat([xt, xt]), torch.cat([t, t]), torch.cat([c, null])).chunk(2)
        return eps_u + w * (eps_c - eps_u)

    return eps


# Adapted from lesson_05/sublesson_c/model.py: CrossAttention -- a mask hides the context's padding
class CrossAttention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V with Q = W_Q x, K = W_K c, V = W_V c (LDM, Sec. 3.3), in several heads, then W_O."""

    def __init__(self, channels, context, heads, head_dim):
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.q = nn.Linear(channels, inner, bias=False)
        self.k, self.v = nn.Linear(context, inner, bias=False), nn.Linear(context, inner, bias=False)
        self.out = nn.Linear(inner, channels)

    def split(self, x):
        """(B, N, heads d) -> (B, heads, N, d)."""
        return rearrange(x, "b n (h d) -> b h n d", h=self.heads)

    def weights(self, x, context, mask=None):
        """How much each of the N tokens takes from each of the L: (B, heads, N, L), sums over L are 1.

        mask (B, L) bool: the tokens that may be looked at; at least one in every row. None: all of them.
        """
        q, k = self.split(self.q(x)), self.split(self.k(context))
        logits = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None, :], -torch.inf)                       # exactly 0 after
        return torch.softmax(logits, dim=3)

    def forward(self, x, context, mask=None):
        """x (B, N, C), context (B, L, D), mask (B, L) -> (B, N, C)."""
        h = self.weights(x, context, mask) @ self.split(self.v(context))    # (B, heads, N, d)
        return self.out(rearrange(h, "b h n d -> b n (h d)"))


# ------------------------------------------------------------------ the text encoder tau_theta of LDM, Sec. 3.3
class TextEncoder(nn.Module):
    """A transformer over a caption's words; every position knows its place. It learns together with the U-Net.

    vocabulary  words, start token and padding included
    length      longest caption, start token included
    """

    def __init__(self, vocabulary, length, dim=64, depth=2, heads=2):
        super().__init__()
        if dim % heads:
            raise ValueError(f"context={dim} numbers a token cannot be split into heads={heads}")
        self.words, self.places = nn.Embedding(vocabulary, dim), nn.Embedding(length, dim)
        self.blocks = nn.ModuleList(TextBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, c, mask):
        """c (B, L) int, mask (B, L) bool, False at padding -> (B, L, D). What stands at padding is never used."""
        h = self.words(c) + self.places.weight[:c.shape[1]]
        for block in self.blocks:
            h = block(h, mask)
        return self.norm(h)


class TextBlock(nn.Module):
    """Words attend to each other in both directions, then each thinks for itself. LayerNorm before both."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attend = CrossAttention(dim, dim, heads, dim // heads)         # self-attention: the context is h
        self.think = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, h, mask):
        """h (B, L, D), mask (B, L) -> (B, L, D)."""
        a = self.norm1(h)
        h = h + self.attend(a, a, mask)
        return h + self.think(self.norm2(h))


# ------------------------------------------------------------------ the transformer block of LDM
# Adapted from lesson_05/sublesson_d/model.py: SpatialTransformer -- hands on the mask
class SpatialTransformer(nn.Module):
    """GroupNorm, 1 x 1 into the blocks' width, transformer blocks over the positions, 1 x 1 back (0 at first), + x."""

    def __init__(self, channels, context, heads, head_dim, depth=1, dropout=0.0, groups=32):
        super().__init__()
        inner = heads * head_dim
        self.norm, self.enter = norm(channels, groups), conv(channels, inner, kernel=1)
        self.blocks = nn.ModuleList(TransformerBlock(inner, context, heads, head_dim, dropout) for _ in range(depth))
        self.leave = conv(inner, channels, kernel=1, zero=True)

    def forward(self, x, context, mask):
        """x (B, C, H, W), context (B, L, D), mask (B, L) -> (B, C, H, W)."""
        h = rearrange(self.enter(self.norm(x)), "b c h w -> b (h w) c")     # (B, H W, heads d)
        for block in self.blocks:
            h = block(h, context, mask)
        return x + self.leave(rearrange(h, "b (h w) c -> b c h w", h=x.shape[2]))


# Adapted from lesson_05/sublesson_d/model.py: TransformerBlock -- the context has a mask
class TransformerBlock(nn.Module):
    """Positions attend to each other, then to the context, then each thinks for itself. LayerNorm before all three."""

    def __init__(self, dim, context, heads, head_dim, dropout=0.0):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.attn1 = CrossAttention(dim, dim, heads, head_dim)              # self-attention: the context is x
        self.attn2 = CrossAttention(dim, context, heads, head_dim)
        self.ff = FeedForward(dim, dropout=dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, context, mask):
        """x (B, N, C), context (B, L, D), mask (B, L) -> (B, N, C)."""
        h = self.norm1(x)
        x = x + self.dropout(self.attn1(h, h))
        x = x + self.dropout(self.attn2(self.norm2(x), context, mask))
        return x + self.ff(self.norm3(x))


# Copied from lesson_05/sublesson_d/model.py: FeedForward
class FeedForward(nn.Module):
    """GEGLU: a * gelu(b), with a and b two linear maps of x to `mult` times its width, then back."""

    def __init__(self, dim, mult=4, dropout=0.0):
        super().__init__()
        self.enter, self.leave = nn.Linear(dim, 2 * mult * dim), nn.Linear(mult * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        """(B, N, C) -> (B, N, C)."""
        a, b = self.enter(x).chunk(2, dim=2)
        return self.leave(self.dropout(a * F.gelu(b)))


# ------------------------------------------------------------------ the network
# Adapted from lesson_05/sublesson_d/model.py: UNet -- a TextEncoder in the place of the class's tokens (LDM, Sec. 3.3)
class UNet(nn.Module):
    """U-Net over an image, a time and a caption.

    attention        resolutions at which every block is followed by a transformer (the middle always has one)
    context, layers  the text encoder's width D and how many blocks it has
    heads, head_dim  of every attention over the image; their product is the transformer's width
    """

    def __init__(self, vocabulary, length, channels=128, mults=(1, 2, 2), blocks=2, attention=(14,), dropout=0.1,
                 groups=32, patch=1, image_size=28, image_channels=1, context=64, layers=2, heads=2, head_dim=32,
                 depth=1):
        super().__init__()
        if image_size % (patch * 2 ** (len(mults) - 1)):
            raise ValueError(f"image_size={image_size} cannot be halved {len(mults) - 1} times "
                             f"after patches of {patch}")
        self.channels, self.patch = channels, patch
        width = 4 * channels
        self.time = nn.Sequential(linear(channels, width), nn.SiLU(), linear(width, width))
        self.text = TextEncoder(vocabulary, length, context, layers)
        size, c = image_size // patch, channels
        self.stem = conv(image_channels * patch ** 2, c)

        def look(channels):
            return SpatialTransformer(channels, context, heads, head_dim, depth, dropout, groups)

        def level(c_in, c_out):
            return Stage(ResBlock(c_in, c_out, width, dropout, groups), *([look(c_out)] if size in attention else []))

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
        self.middle = Stage(ResBlock(c, c, width, dropout, groups), look(c), ResBlock(c, c, width, dropout, groups))
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
        """x (B, C, H, W), t (B,) int, c (B, L) int -> the predicted noise, (B, C, H, W)."""
        emb = self.time(time_embedding(t, self.channels))                   # (B, 4 channels)
        mask = c != 0                                                       # (B, L), False at padding
        context = self.text(c, mask)                                        # (B, L, D)
        x = rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=self.patch, q=self.patch)
        h = self.stem(x)
        skips = [h]
        for stage in self.down:
            h = stage(h, emb, context, mask)
            skips.append(h)
        h = self.middle(h, emb, context, mask)
        for stage in self.up:
            h = stage(torch.cat([h, skips.pop()], dim=1), emb, context, mask)
        return rearrange(self.out(h), "b (c p q) h w -> b c (h p) (w q)", p=self.patch, q=self.patch)


# Adapted from lesson_05/sublesson_d/model.py: Stage -- hands on the mask
class Stage(nn.Sequential):
    """Layers one after the other; each is handed what it needs besides the image: the time, the context, nothing."""

    def forward(self, h, emb, context, mask):
        """h (B, C, H, W), emb (B, width), context (B, L, D), mask (B, L) -> (B, C', H', W')."""
        for layer in self:
            if isinstance(layer, ResBlock):
                h = layer(h, emb)
            elif isinstance(layer, SpatialTransformer):
                h = layer(h, context, mask)
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
