"""Stable Diffusion 3: Scaling Rectified Flow Transformers for High-Resolution Image Synthesis (Esser et al. 2024,
arXiv 2403.03206).

Convention: x_t = (1 - t) x_0 + t n; t runs from data (0) to noise (1), against lesson 21; the network receives 1000 t
and predicts n - x_0; a step goes from t to s < t. Guidance: v = v_u + w (v_c - v_u), so w = 1 is plain conditional.
Images are (B, C, H, W) in [-1, 1]; t is (B,) in [0, 1]; a condition c is (B, 3, L) int64: a caption's word numbers,
once for each of three text encoders. The empty caption, the start token alone, stands for "dropped".
"""

import functools
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from earlier import image, linear  # lesson 05
from earlier import drop, given  # lesson 05c
from earlier import (  # lesson 23
    MLP,
    FinalLayer,
    TimestepEmbedder,
    modulate,
    norm,
    patchify,
    sincos_2d,
    unpatchify,
)
from earlier import network_time  # lesson 39

DENSITIES = ("uniform", "logit-normal", "mode", "cosmap")


# ------------------------------------------------------------------ times: which to train at, Sec. 3.1
class Times:
    """A density of training times on [0, 1], Sec. 3.1.

    density     one of DENSITIES
    mean, std   of the normal whose sigmoid is the time: more weight to noise (mean > 0) or to data (mean < 0)
    mode_scale  of "mode": above 0 favours the middle, below 0 the ends; 0 is uniform
    """

    def __init__(self, density="logit-normal", mean=0.0, std=1.0, mode_scale=1.29):
        if density not in DENSITIES:
            raise ValueError(f"density={density!r} is none of {', '.join(DENSITIES)}")
        if std <= 0 or not -1 <= mode_scale <= 2 / (math.pi - 2):
            raise ValueError(f"std={std} must be above 0 and mode_scale={mode_scale} between -1 and 2 / (pi - 2)")
        self.density, self.mean, self.std, self.mode_scale = density, mean, std, mode_scale

    def map(self, u):
        """Uniform u to times of this density, Sec. 3.1. (B,) float64 in [0, 1] -> (B,)."""
        if self.density == "logit-normal":
            return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
        if self.density == "mode":
            return 1 - u - self.mode_scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
        return 1 - 1 / (torch.tan(math.pi / 2 * u) + 1) if self.density == "cosmap" else u

    def pdf(self, t):
        """The density itself, at t in (0, 1), Sec. 3.1. (B,) float64 -> (B,)."""
        if self.density == "logit-normal":
            z = (torch.logit(t) - self.mean) / self.std
            return torch.exp(-z ** 2 / 2) / (self.std * math.sqrt(2 * math.pi) * t * (1 - t))
        if self.density == "cosmap":                                        # that of v-prediction, cosine schedule
            return 2 / (math.pi * (1 - 2 * t + 2 * t ** 2))
        if self.density == "uniform":
            return torch.ones_like(t)
        u = torch.linspace(1, 0, 20_001, dtype=torch.float64)               # 1 / |map'(u)| where map(u) = t
        i = torch.searchsorted(self.map(u), t).clamp(1, len(u) - 1)
        slope = 1 + self.mode_scale * (1 - math.pi / 2 * torch.sin(math.pi * (u[i - 1] + u[i]) / 2))
        return 1 / slope

    def draw(self, n, device=None):
        """n times for training, Sec. 3.1. (n,) float64."""
        return self.map(torch.rand(n, dtype=torch.float64, device=device))


def shifted(t, shift):
    """Move times towards noise, as a larger image needs (Sec. 5.3): shift = (m / n)^(1/2) for m pixels instead of n."""
    return shift * t / (1 + (shift - 1) * t)


# ------------------------------------------------------------------ the process: Sections 2 and 3
# Adapted from lesson_21/model.py: RectifiedFlow -- time runs from data to noise, and training draws it from a density
class RectifiedFlow(nn.Module):
    """The straight path between an image and noise (Sec. 2, 3), its loss, and Euler's method. Holds no weights.

    density, mean, std, mode_scale   of the training times, see `Times`. Sampling does not know of them
    """

    def __init__(self, density="logit-normal", mean=0.0, std=1.0, mode_scale=1.29):
        super().__init__()
        self.times = Times(density, mean, std, mode_scale)

    def q_sample(self, x0, t, n):
        """x_t of an image and a noise, the rectified flow of Sec. 3. x0, n (B, C, H, W), t (B,) -> (B, C, H, W)."""
        return image(1 - t) * x0 + image(t) * n

    def loss(self, net, x0):
        """One draw of the training loss (Sec. 3.1); the density of t is its only weight. x0 (B, C, H, W) -> scalar."""
        return self.loss_at(net, x0, self.times.draw(len(x0), x0.device), torch.randn_like(x0)).mean()

    def loss_at(self, net, x0, t, n):
        """The squared error of n - x_0 at given times and noise (Sec. 3), the mean over each image's pixels. (B,)."""
        error = net(self.q_sample(x0, t, n), network_time(t)) - (n - x0)
        return error.square().flatten(1).mean(1)

    def grid(self, steps, shift=1.0, official=False):
        """Falling times from 1 to 0 for `steps` calls, evenly spaced, then shifted (Sec. 5.3). (steps + 1,) float64.

        official: as in the code of SD3 and in diffusers. There the calls are spread evenly between the ends of an
        already shifted table of 1000 times, shifted again, and the 0 is appended.
        """
        if steps < 1 or shift <= 0:
            raise ValueError(f"steps={steps} must be at least 1 and shift={shift} above 0")
        if not official:
            return shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)
        last = shifted(1 / 1000, shift)
        return F.pad(shifted(torch.linspace(1, last, steps, dtype=torch.float64), shift), (0, 1))

    @torch.no_grad()
    def reverse(self, net, n, grid):
        """Euler's method from noise n (B, C, H, W), Sec. 2. Yields (t, x_s, x_0 estimate) after every step.

        net: v(x_t, 1000 t), guided or not; see `guided`.
        """
        x = n
        for t, s in zip(grid[:-1], grid[1:]):
            v = net(x, network_time(t).to(x.device).expand(len(x)))
            x, x0 = x + float(s - t) * v, x - float(t) * v
            yield float(t), x, x0

    def sample(self, net, n, grid):
        """Images in about [-1, 1] from noise, by `reverse` (Sec. 2). (B, C, H, W) -> (B, C, H, W)."""
        for _, x, _ in self.reverse(net, n, grid):
            pass
        return x


# ------------------------------------------------------------------ the condition: three encoders, guidance
def for_encoders(c, null, p=0.0):
    """A caption for each of the three encoders, each dropped with probability p by a coin of its own (App. B.3).

    c (B, L), null (L,) -> (B, 3, L). All three are dropped in a share p^3 of the samples: they learn "no caption".
    """
    return drop(c.repeat_interleave(3, dim=0), null, p).unflatten(0, (len(c), 3))


# Adapted from lesson_05/sublesson_c/model.py: guided -- the network's answers are velocities
def guided(net, c, null, w=1.0):
    """v = v_u + w (v_c - v_u) (CFG, Eq. 6), as a function of x_t and 1000 t; two network calls unless w is 0 or 1.

    c, null (B, ...): the condition and its absence. w = 0: no condition; w = 1: the plain conditional network.
    """
    if w in (0, 1):
        return given(net, c if w else null)

    def velocity(xt, t):
        v_c, v_u = net(torch.cat([xt, xt]), torch.cat([t, t]), torch.cat([c, null])).chunk(2)
        return v_u + w * (v_c - v_u)

    return velocity


class TextEncoders(nn.Module):
    """Instead of CLIP-L, CLIP-G, T5 (App. B.2): two bags of words (a pooled vector), a small transformer (tokens).

    vocabulary  words, start token and padding included
    length      longest caption, start token included
    """

    def __init__(self, vocabulary, length, bags=(24, 40), dim=64, heads=4):
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(vocabulary, width, mode="mean", padding_idx=0) for width in bags)
        self.words, self.places = nn.Embedding(vocabulary, dim), nn.Embedding(length, dim)
        self.block = nn.TransformerEncoderLayer(dim, heads, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)

    def forward(self, c):
        """c (B, 3, L) int -> tokens (B, L, dim) and a pooled vector (B, sum of bags). Padding is not masked."""
        pooled = torch.cat([bag(c[:, i]) for i, bag in enumerate(self.bags)], dim=1)
        return self.block(self.words(c[:, 2]) + self.places.weight), pooled


# ------------------------------------------------------------------ the network: Section 4
# Adapted from lesson_23/model.py: Block -- adaLN-Zero in two halves: attention happens outside, between streams
class Stream(nn.Module):
    """The weights that one kind of token has in a block (Fig. 2b); as a whole the identity at the start.

    last  nothing follows: queries, keys and values only ("pre-only")
    """

    def __init__(self, dim, heads, qk_norm=True, last=False):
        super().__init__()
        self.heads, self.last = heads, last
        self.adaln = nn.Sequential(nn.SiLU(), linear(dim, (2 if last else 6) * dim, zero=True))
        self.norm1, self.qkv = norm(dim, affine=False), linear(dim, 3 * dim)
        self.norm_q, self.norm_k = (nn.RMSNorm(dim // heads, eps=1e-6) if qk_norm else nn.Identity() for _ in "qk")
        if not last:
            self.out, self.norm2, self.mlp = linear(dim, dim), norm(dim, affine=False), MLP(dim)

    def enter(self, x, emb):
        """Before attention (Fig. 2b): x (B, N, D), emb (B, 2, D) -> q, k, v (B, heads, N, D / heads), the rest."""
        shift, scale, *rest = self.adaln(emb.sum(1, keepdim=True)).chunk(2 if self.last else 6, dim=2)
        qkv = self.qkv(modulate(self.norm1(x), shift, scale))
        q, k, v = rearrange(qkv, "b n (k h d) -> k b h n d", k=3, h=self.heads)
        return (self.norm_q(q), self.norm_k(k), v), rest

    def attended(self, x, h, rest):
        """Add what attention found (Fig. 2b), h (B, heads, N, D / heads). rest: as `enter` left it. (B, N, D)."""
        return x + rest[0] * self.out(rearrange(h, "b h n d -> b n (h d)"))

    def think(self, x, rest):
        """Add the MLP (Fig. 2b). rest: as `enter` left it. (B, N, D)."""
        _, shift, scale, gate = rest
        return x + gate * self.mlp(modulate(self.norm2(x), shift, scale))


class JointBlock(nn.Module):
    """Text and image have weights of their own and one attention over both (Sec. 4, Fig. 2)."""

    def __init__(self, dim, heads, qk_norm=True, last=False):
        super().__init__()
        self.text, self.image = Stream(dim, heads, qk_norm, last), Stream(dim, heads, qk_norm)

    def enter(self, x, context, emb):
        """q, k, v of [context; x] (Fig. 2b), each (B, heads, L + N, D / heads); what is left of both modulations."""
        (of_text, rest_text), (of_image, rest_image) = self.text.enter(context, emb), self.image.enter(x, emb)
        return [torch.cat(pair, dim=2) for pair in zip(of_text, of_image)], rest_text, rest_image

    def forward(self, x, context, emb):
        """x (B, N, D), context (B, L, D), emb (B, 2, D): time and pooled text -> x, context (None after the last)."""
        qkv, rest_text, rest_image = self.enter(x, context, emb)
        h = F.scaled_dot_product_attention(*qkv)
        of_text, of_image = h.split([context.shape[1], x.shape[1]], dim=2)
        x = self.image.think(self.image.attended(x, of_image, rest_image), rest_image)
        if self.text.last:
            return x, None
        return x, self.text.think(self.text.attended(context, of_text, rest_text), rest_text)


def cropped_sincos_2d(dim, h, w, grid):
    """The place of each patch: h rows and w columns in the middle of lesson 23's grid x grid (Sec. 5.3). (h w, dim)."""
    if max(h, w) > grid:
        raise ValueError(f"an image of {h} x {w} patches does not fit into grid={grid}")
    rows, columns = (slice((grid - side) // 2, (grid - side) // 2 + side) for side in (h, w))
    return sincos_2d(dim, grid, grid).unflatten(0, (grid, grid))[rows, columns].flatten(0, 1)


@functools.cache
def cropped_sincos_on(device, dtype, *size):
    """`cropped_sincos_2d` of this size where it is added (Sec. 5.3), made once: copies wait for a GPU."""
    return cropped_sincos_2d(*size).to(dtype).to(device)


class MMDiT(nn.Module):
    """A transformer over two streams of tokens, text and image patches (Sec. 4, Fig. 2a).

    vocabulary, length, bags, context   of the text encoders (context: numbers a token)
    dim, depth, heads  width of a token, number of blocks, heads of their attention (the paper: 64 depth, depth, depth)
    patch, grid        pixels along the side of a patch; patches along the side of the largest image
    qk_norm            RMSNorm on queries and keys
    """

    def __init__(self, vocabulary, length, bags=(24, 40), context=64, dim=1536, depth=24, heads=24, patch=2, grid=192,
                 qk_norm=True, image_channels=1):
        super().__init__()
        if dim % 4 or dim % heads:
            raise ValueError(f"dim={dim} must be a multiple of 4 (two sines, two cosines) and of heads={heads}")
        self.patch, self.grid = patch, grid
        self.text = TextEncoders(vocabulary, length, bags, context)
        self.stem, self.context = linear(image_channels * patch ** 2, dim), linear(context, dim)
        self.time = TimestepEmbedder(dim)
        self.pooled = nn.Sequential(linear(sum(bags), dim), nn.SiLU(), linear(dim, dim))
        self.blocks = nn.ModuleList(JointBlock(dim, heads, qk_norm, last=i == depth - 1) for i in range(depth))
        self.final = FinalLayer(dim, image_channels * patch ** 2)

    def forward(self, x, t, c):
        """x (B, C, H, W), t (B,) 1000 times the time, c (B, 3, L) int -> the velocity, (B, C, H, W)."""
        h, w = (side // self.patch for side in x.shape[2:])
        x = self.stem(patchify(x, self.patch))                              # (B, N, D)
        x = x + cropped_sincos_on(x.device, x.dtype, x.shape[2], h, w, self.grid)
        tokens, pooled = self.text(c)
        context, emb = self.context(tokens), torch.stack([self.time(t), self.pooled(pooled)], dim=1)
        for block in self.blocks:
            x, context = block(x, context, emb)
        return unpatchify(self.final(x, emb), self.patch, h)
