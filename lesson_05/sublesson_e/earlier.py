"""What lesson 05e takes from earlier lessons, word for word.

Written by `python -m tools.lineage sync` from the import lines of model.py. Do not edit it: change a definition
where it stands, in the file named above it, and run the command again.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


# lesson_01/model.py
def noise_like(x, generator=None):
    """Standard Gaussian noise, the eps of DDPM, Eq. (4), as large as x. A CPU generator gives the same everywhere.

    A list of them, one for each of the images, gives every image the same noise whatever their number is.
    """
    if generator is None:
        return torch.randn_like(x)
    if isinstance(generator, list):
        return torch.stack([torch.randn(x.shape[1:], generator=one) for one in generator]).to(x.device)
    return torch.randn(x.shape, generator=generator).to(x.device)


# lesson_01/model.py
def time_embedding(t, dim):
    """Sines, then cosines, of t at dim / 2 frequencies from 1 down to 1/10000 (DDPM, App. B). (B,) -> (B, dim)."""
    frequency = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2 - 1))
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


# lesson_05/model.py
def image(values):
    """The scalars of Eq. (4), one for each image, to multiply images with: (B,) -> (B, 1, 1, 1) float32."""
    return values.float()[:, None, None, None]


# lesson_05/model.py
def discretized_log_likelihood(x0, mean, sigma):
    """log p(x_0 | x_1), Eq. (13): nats of N(mean, sigma^2) in the bin of x_0, 2/255 wide, the outer ones open."""
    x0, mean, sigma = x0.double(), mean.double(), sigma.double()
    upper = torch.where(x0 > 0.999, torch.inf, (x0 + 1 / 255 - mean) / sigma)
    lower = torch.where(x0 < -0.999, -torch.inf, (x0 - 1 / 255 - mean) / sigma)
    # Phi(u) - Phi(l) = Phi(-l) - Phi(-u): on the side where both are small, their logarithms keep the digits.
    flip = lower > 0
    upper, lower = torch.where(flip, -lower, upper), torch.where(flip, -upper, lower)
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return (log_upper + torch.log1p(-torch.exp(log_lower - log_upper))).float()


# lesson_05/model.py
# Adapted from lesson_02/model.py: DPM -- a network of the noise, a plain squared error, a fixed covariance, grey levels
class DDPM(nn.Module):
    """The process of Sec. 2 and 3: forward, reverse, loss, bound. Holds the schedule and no weights.

    timesteps: T. beta_1, beta_T: ends of the schedule (Sec. 4). variance: "large" (beta_t) or "small" (beta-tilde_t).
    """
    def __init__(self, timesteps=1000, beta_1=1e-4, beta_T=0.02, variance="small"):
        super().__init__()
        if variance not in ("large", "small") or timesteps < 2:
            raise ValueError(f"variance={variance!r} must be large or small, timesteps={timesteps} at least 2")
        self.timesteps, self.variance = timesteps, variance
        beta = torch.linspace(beta_1, beta_T, timesteps, dtype=torch.float64)
        abar = torch.cumprod(1 - beta, dim=0)                               # Sec. 2, before Eq. (4)
        # In float32, 1 - abar_0 = 1e-4 would keep three digits. The entry appended is abar_{-1} = 1: no noise.
        self.register_buffer("abar", torch.cat([abar, abar.new_ones(1)]), persistent=False)        # (T + 1,)

    def q_sample(self, x0, t, eps):
        """x_t ~ q(x_t | x_0) with the given noise, Eq. (4). x0, eps (B, C, H, W) -> (B, C, H, W)."""
        return image(self.abar[t].sqrt()) * x0 + image((1 - self.abar[t]).sqrt()) * eps

    # Copied from lesson_01/model.py: Diffusion.beta
    def beta(self, t, s):
        """The variance that the steps from s to t add, Eq. (2): beta_t for s = t - 1. (B,) float64."""
        return 1 - self.abar[t] / self.abar[s]

    # Copied from lesson_01/model.py: Diffusion.beta_tilde
    def beta_tilde(self, t, s):
        """The variance of q(x_s | x_t, x_0), Eq. (7): 0 at s = -1. (B,) float64."""
        return (1 - self.abar[s]) / (1 - self.abar[t]) * self.beta(t, s)

    def q_posterior(self, x0, xt, t, s):
        """mu-tilde, the mean of q(x_s | x_t, x_0), Eq. (6) and (7) with any s < t instead of t - 1. (B, C, H, W)."""
        a = self.abar[s].sqrt() * self.beta(t, s) / (1 - self.abar[t])
        b = (1 - self.beta(t, s)).sqrt() * (1 - self.abar[s]) / (1 - self.abar[t])
        return image(a) * x0 + image(b) * xt

    def predict_x0(self, net, xt, t):
        """The x_0 that the predicted noise stands for, Eq. (15). (B, C, H, W)."""
        return (xt - image((1 - self.abar[t]).sqrt()) * net(xt, t)) / image(self.abar[t].sqrt())

    def p_mean(self, net, xt, t, s, clip=True):
        """mu_theta of p(x_s | x_t), Eq. (11) for s = t - 1 and without clipping, and the x_0 it aims at.

        Differs from the paper: x_0 is clipped to [-1, 1] first, as in the official code, because an error of the
        network at t = 999 is divided by sqrt(abar) = 0.006 on its way to x_0.
        """
        x0 = self.predict_x0(net, xt, t)
        x0 = x0.clamp(-1, 1) if clip else x0
        return self.q_posterior(x0, xt, t, s), x0

    def reverse_variance(self, t, s):
        """sigma_t^2 of p(x_s | x_t), Sec. 3.2: beta or beta-tilde. (B,) float64.

        At t = 0 Eq. (13) needs a width, but beta-tilde is 0: that of the next step, as in the official code.
        """
        variance = self.beta(t, s) if self.variance == "large" else self.beta_tilde(t, s)
        return torch.where(t == 0, self.beta_tilde(torch.ones_like(t), torch.zeros_like(t)), variance)

    def loss(self, net, x0):
        """One draw of L_simple, Eq. (14): Algorithm 1, lines 2 to 5. x0 (B, C, H, W) -> scalar."""
        t = torch.randint(self.timesteps, (len(x0),), device=x0.device)     # Alg. 1, line 3
        eps = torch.randn_like(x0)                                          # Alg. 1, line 4
        return F.mse_loss(net(self.q_sample(x0, t, eps), t), eps)           # Alg. 1, line 5

    @torch.no_grad()
    def reverse(self, net, x, steps=None, clip=True, generator=None):
        """Algorithm 2 from x = x_T on. Yields (t, x_s, x_0 estimate) after every step; the last x_s is the sample.

        Differs from Algorithm 2 where `steps` is given: of the T times it visits so many, evenly spaced, ends
        included. A jump from t to s uses Eq. (7) with abar_s instead of abar_{t-1}.
        """
        steps = self.timesteps if steps is None else steps
        if not 1 < steps <= self.timesteps:
            raise ValueError(f"steps={steps} must be between 2 and {self.timesteps}")
        times = torch.linspace(self.timesteps - 1, 0, steps).round().long().tolist() + [-1]
        for t, s in zip(times[:-1], times[1:]):                             # Alg. 2, line 2
            t_, s_ = (torch.full((len(x),), i, device=x.device) for i in (t, s))
            mean, x0 = self.p_mean(net, x, t_, s_, clip)
            sigma = image(self.reverse_variance(t_, s_).sqrt())
            x = mean + sigma * noise_like(x, generator) if s >= 0 else mean  # Alg. 2, lines 3 and 4
            yield t, x, x0

    def sample(self, net, n, steps=None, shape=(1, 28, 28), clip=True, generator=None):
        """n images drawn with Algorithm 2 (see `reverse` for `steps`), (n, C, H, W) in about [-1, 1]."""
        xT = noise_like(torch.empty(n, *shape, device=self.abar.device), generator)                # Alg. 2, line 1
        for _, x, _ in self.reverse(net, xT, steps, clip, generator):
            pass
        return x

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
        abar = self.abar[-2]
        return 0.5 * (abar * x0 ** 2 - abar - torch.log1p(-abar)).flatten(1).mean(1) / math.log(2)

    @torch.no_grad()
    def bound(self, net, x0, generator=None):
        """The whole of Eq. (5), every t once: prior (B,) and terms (B, T), L_0 first, whose sum is the bits/dim.

        The third is what Sec. 4.3 plots: the RMSE (B, T) of the x_0 estimated from x_t, on the scale 0..255.
        """
        terms, errors = [], []
        for i in range(self.timesteps):
            t = torch.full((len(x0),), i, device=x0.device)
            xt = self.q_sample(x0, t, noise_like(x0, generator))
            mean, x0_hat = self.p_mean(net, xt, t, t - 1)
            terms.append(self.bound_term(x0, xt, t, mean))
            errors.append(127.5 * (x0_hat - x0).flatten(1).square().mean(1).sqrt())
        return self.prior_term(x0), torch.stack(terms, 1), torch.stack(errors, 1)


# lesson_05/model.py
def initialised(layer, zero=False):
    """The start of a layer of App. B in the official code: uniform, variance 2 / (fan in + fan out), or 0; biases 0."""
    nn.init.zeros_(layer.weight) if zero else nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


# lesson_05/model.py
def linear(c_in, c_out, zero=False):
    """A linear layer (App. B), started as the official code starts it."""
    return initialised(nn.Linear(c_in, c_out), zero)


# lesson_05/model.py
def conv(c_in, c_out, kernel=3, zero=False):
    """A convolution (App. B) that keeps the resolution, started as the official code starts it."""
    return initialised(nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2), zero)


# lesson_05/model.py
class Downsample(nn.Module):
    """Half the resolution (App. B). Padding on the right and bottom only, as TensorFlow's SAME does."""
    def __init__(self, channels):
        super().__init__()
        self.conv = initialised(nn.Conv2d(channels, channels, kernel_size=3, stride=2))

    def forward(self, x):                               # -> (B, C, H / 2, W / 2)
        return self.conv(F.pad(x, (0, 1, 0, 1)))


# lesson_05/model.py
class Upsample(nn.Module):
    """Twice the resolution (App. B): nearest neighbour, then a convolution."""
    def __init__(self, channels):
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(self, x):                               # -> (B, C, 2 H, 2 W)
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


# lesson_05/model.py
class Attention(nn.Module):
    """Self-attention over the positions (App. B), one head as wide as the block. The last projection starts at 0."""
    def __init__(self, channels, groups=32):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.qkv, self.out = linear(channels, 3 * channels), linear(channels, channels, zero=True)

    def forward(self, x):                               # -> (B, C, H, W)
        h = rearrange(self.norm(x), "b c h w -> b (h w) c")
        q, k, v = self.qkv(h).chunk(3, dim=2)          # (B, H W, C) each; q / 8: q k^T may be too large for fp16
        weights = torch.softmax(q / 8 @ k.transpose(1, 2) / (math.sqrt(x.shape[1]) / 8), dim=2)      # (B, H W, H W)
        return x + rearrange(self.out(weights @ v), "b (h w) c -> b c h w", h=x.shape[2])


# lesson_05/model.py
class ResBlock(nn.Module):
    """GroupNorm, swish, convolution, twice; the time enters between the two (App. B). conv2 starts at 0."""
    def __init__(self, c_in, c_out, width, dropout=0.0, groups=32):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, c_in, eps=1e-6), conv(c_in, c_out)
        self.time = linear(width, c_out)
        self.norm2, self.conv2 = nn.GroupNorm(groups, c_out, eps=1e-6), conv(c_out, c_out, zero=True)
        self.dropout = nn.Dropout(dropout)
        self.skip = conv(c_in, c_out, kernel=1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):                          # (B, c_in, H, W), (B, width) -> (B, c_out, H, W)
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(emb))[:, :, None, None]
        return self.skip(x) + self.conv2(self.dropout(F.silu(self.norm2(h))))


# lesson_05/model.py
class Level(nn.Sequential):
    """Layers one after the other at one resolution (App. B); a residual block is also told the time."""
    def forward(self, h, emb):                          # (B, C, H, W), (B, width) -> (B, C', H, W)
        for layer in self:
            h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
        return h


# lesson_05/model.py
class UNet(nn.Module):
    """U-Net over an image and a time (App. B). Lessons that change a part override `embed`, `block`, `level`, `bottom`.

    channels, mults  width of the first level; of every level as a multiple, each at half the resolution
    blocks           residual blocks a level on the way down; one more on the way up
    attention        resolutions that get self-attention after every block
    patch            the image enters as patch x patch pixels a position (1: as in the paper)
    image_channels   of the images that enter; c_out: of those that leave, by default as many
    """
    def __init__(self, channels=128, mults=(1, 2, 2), blocks=2, attention=(14,), dropout=0.1, groups=32, patch=1,
                 image_size=28, image_channels=1, c_out=None):
        super().__init__()
        if image_size % (patch * 2 ** (len(mults) - 1)):
            raise ValueError(f"image_size={image_size} cannot be split into patches of {patch} and halved for {mults}")
        if channels < 4 or channels % 2:
            raise ValueError(f"channels={channels} must be even and at least 4: sines and cosines of the time")
        self.channels, self.width, self.dropout, self.groups = channels, 4 * channels, dropout, groups
        self.patch, size, c = patch, image_size // patch, channels
        self.time = nn.Sequential(linear(c, self.width), nn.SiLU(), linear(self.width, self.width))
        self.stem = conv(image_channels * patch ** 2, c)
        self.down, skips = nn.ModuleList(), [c]
        for i, mult in enumerate(mults):
            for _ in range(blocks):
                self.down.append(self.level(c, channels * mult, size in attention))
                skips.append(c := channels * mult)
            if i < len(mults) - 1:
                self.down.append(Downsample(c))
                skips.append(c)
                size //= 2
        self.middle, self.up = self.bottom(c), nn.ModuleList()
        for i, mult in reversed(list(enumerate(mults))):
            for _ in range(blocks + 1):
                self.up.append(self.level(c + skips.pop(), channels * mult, size in attention))
                c = channels * mult
            if i > 0:
                self.up.append(Upsample(c))
                size *= 2
        self.out = nn.Sequential(nn.GroupNorm(groups, c, eps=1e-6), nn.SiLU(),
                                 conv(c, (c_out or image_channels) * patch ** 2, zero=True))

    def embed(self, t):
        """What every level is told: the time, as a vector (App. B). t (B,) -> (B, width)."""
        return self.time(time_embedding(t, self.channels))

    def block(self, c_in, c_out):
        """A residual block (App. B) from c_in to c_out channels."""
        return ResBlock(c_in, c_out, self.width, self.dropout, self.groups)

    def level(self, c_in, c_out, attend):
        """A residual block and, if `attend`, self-attention (App. B)."""
        return Level(self.block(c_in, c_out), *([Attention(c_out, self.groups)] if attend else []))

    def bottom(self, c):
        """What stands between the way down and the way up (App. B)."""
        return Level(self.block(c, c), Attention(c, self.groups), self.block(c, c))

    def body(self, x, told):
        """Down, along the bottom, up with the shortcuts (App. B); every level gets `told`, from `embed`, as it is."""
        h = self.stem(rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=self.patch, q=self.patch))
        skips = [h]
        for layer in self.down:
            h = layer(h) if isinstance(layer, Downsample) else layer(h, told)
            skips.append(h)
        h = self.middle(h, told)
        for layer in self.up:
            h = layer(h) if isinstance(layer, Upsample) else layer(torch.cat([h, skips.pop()], dim=1), told)
        return rearrange(self.out(h), "b (c p q) h w -> b c (h p) (w q)", p=self.patch, q=self.patch)

    def forward(self, x, t):
        """x (B, c_in, H, W), t (B,) -> the prediction, (B, c_out, H, W)."""
        return self.body(x, self.embed(t))


# lesson_05/sublesson_c/model.py
def drop(c, null, p):
    """Replace each sample's condition by `null` with probability p: a coin for every sample, not one for the batch.

    Line 3 of Ho and Salimans (2022), Alg. 1. c (B, ...), null the same shape or one that broadcasts to it -> (B, ...).
    """
    dropped = torch.rand(len(c), device=c.device) < p
    return torch.where(dropped.view(-1, *[1] * (c.dim() - 1)), null, c)


# lesson_05/sublesson_c/model.py
def given(net, c):
    """The network of Eq. (3) with its condition filled in: eps(x_t, t, c) as the function of x_t and t that DDPM calls.

    net(x_t, t, c), c (B, ...) -> a function of x_t (B, C, H, W) and t (B,).
    """
    return lambda xt, t: net(xt, t, c)


# lesson_05/sublesson_c/model.py
def guided(net, c, null, w=1.0):
    """eps = eps_u + w (eps_c - eps_u), as a function of x_t and t; two network calls unless w is 0 or 1.

    Ho and Salimans (2022), Eq. (6), whose w is ours less 1. c, null (B, ...): the condition and its absence.
    w = 0: no condition; w = 1: the plain conditional network.
    """
    if w in (0, 1):
        return given(net, c if w else null)

    def eps(xt, t):
        eps_c, eps_u = net(torch.cat([xt, xt]), torch.cat([t, t]), torch.cat([c, null])).chunk(2)
        return eps_u + w * (eps_c - eps_u)

    return eps


# lesson_05/sublesson_c/model.py
class CrossAttention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V with Q = W_Q x, K = W_K c, V = W_V c (Sec. 3.3), in several heads, then W_O.

    Tokens x (B, N, C) ask, a context (B, L, D) answers. No biases but W_O's.
    """

    def __init__(self, channels, context, heads, head_dim):
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.q = nn.Linear(channels, inner, bias=False)
        self.k, self.v = nn.Linear(context, inner, bias=False), nn.Linear(context, inner, bias=False)
        self.out = nn.Linear(inner, channels)

    def split(self, x):
        """The heads of Sec. 3.3 side by side: (B, N, heads d) -> (B, heads, N, d)."""
        return rearrange(x, "b n (h d) -> b h n d", h=self.heads)

    def weights(self, x, context):
        """How much each of the N tokens takes from each of the L, the softmax of Sec. 3.3.

        x (B, N, C), context (B, L, D) -> (B, heads, N, L), whose sums over L are 1.
        """
        q, k = self.split(self.q(x)), self.split(self.k(context))           # q / 8: q k^T may be too large for fp16
        return torch.softmax(q / 8 @ k.transpose(2, 3) / (math.sqrt(q.shape[3]) / 8), dim=3)

    def forward(self, x, context):
        """x (B, N, C), context (B, L, D) -> (B, N, C)."""
        h = self.weights(x, context) @ self.split(self.v(context))          # (B, heads, N, d)
        return self.out(rearrange(h, "b h n d -> b n (h d)"))


# lesson_05/sublesson_c/model.py
class CrossLevel(Level):
    """The layers of a level (Fig. 3); a residual block is told the time, self-attention nothing, others the context."""

    def forward(self, h, told):
        """h (B, C, H, W), told: the time's embedding (B, width) and the context (B, L, D) -> (B, C', H, W)."""
        emb, context = told
        for layer in self:
            if isinstance(layer, ResBlock):
                h = layer(h, emb)
            elif isinstance(layer, Attention):
                h = layer(h)
            else:
                h = layer(h, context)
        return h


# lesson_05/sublesson_d/model.py
class FeedForward(nn.Module):
    """The MLP of App. E.2.1, in the official code a GEGLU: a * gelu(b), with a and b two linear maps of x, then back.

    a and b are `mult` times as wide as x. Nothing passes from position to position.
    """

    def __init__(self, dim, mult=4, dropout=0.0):
        super().__init__()
        self.enter, self.leave = nn.Linear(dim, 2 * mult * dim), nn.Linear(mult * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        """(B, N, C) -> (B, N, C)."""
        a, b = self.enter(x).chunk(2, dim=2)
        return self.leave(self.dropout(a * F.gelu(b)))


# lesson_05/sublesson_d/model.py
class TransformerBlock(nn.Module):
    """Positions attend to each other, then to the context, then each thinks for itself (App. E.2.1).

    LayerNorm before each of the three, and a sum with what went in after it. dim: C, which is heads * head_dim.
    """

    def __init__(self, dim, context, heads, head_dim, dropout=0.0):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.attn1 = CrossAttention(dim, dim, heads, head_dim)              # self-attention: the context is x
        self.attn2 = CrossAttention(dim, context, heads, head_dim)
        self.ff = FeedForward(dim, dropout=dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, context):
        """x (B, N, C), context (B, L, D) -> (B, N, C)."""
        # Differs from the paper: App. E.2.1 names the MLP before cross-attention; this is the official code's order.
        h = self.norm1(x)
        x = x + self.dropout(self.attn1(h, h))
        x = x + self.dropout(self.attn2(self.norm2(x), context))
        return x + self.ff(self.norm3(x))


# lesson_05/sublesson_d/model.py
class SpatialTransformer(nn.Module):
    """GroupNorm, 1 x 1 into the blocks' width, transformer blocks over the positions, 1 x 1 back, + x (App. E.2.1).

    channels    of the image that enters and leaves
    context     numbers of a token of the context, D
    heads       of every attention, each `head_dim` wide; their product is the blocks' width
    depth       transformer blocks in a row
    The last 1 x 1 starts at 0: at first nothing changes.
    """

    def __init__(self, channels, context, heads, head_dim, depth=1, dropout=0.0, groups=32):
        super().__init__()
        inner = heads * head_dim
        self.norm, self.enter = nn.GroupNorm(groups, channels, eps=1e-6), conv(channels, inner, kernel=1)
        self.blocks = nn.ModuleList(TransformerBlock(inner, context, heads, head_dim, dropout) for _ in range(depth))
        self.leave = conv(inner, channels, kernel=1, zero=True)

    def forward(self, x, context):
        """x (B, C, H, W), context (B, L, D) -> (B, C, H, W)."""
        h = rearrange(self.enter(self.norm(x)), "b c h w -> b (h w) c")     # (B, H W, heads d)
        for block in self.blocks:
            h = block(h, context)
        return x + self.leave(rearrange(h, "b (h w) c -> b c h w", h=x.shape[2]))
