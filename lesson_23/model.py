"""DiT: Scalable Diffusion Models with Transformers (Peebles, Xie 2022, arXiv 2212.09748).

Convention: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps; t runs from data (0) to noise (T - 1) and is fed to the
network as that integer. Guidance: eps = eps_u + w (eps_c - eps_u): w = 0 is unconditional, w = 1 plain conditional.
Only the noise is guided; of the two variances the conditional one is taken. The paper works on the latents of an
autoencoder, here on pixels. Images are (B, C, H, W) in [-1, 1]; t and s are (B,) int64, a step goes from t to s < t;
a class c is (B,) int64, `classes` for none. Tokens are (B, N, D), patches in reading order.

The process (Sec. 3.1) is lesson 09's, unchanged: `IDDPM` with the linear schedule, L_hybrid and the learned variance.
"""

import functools
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from earlier import linear  # lesson 05
from earlier import drop, given  # lesson 05c
from earlier import IDDPM  # lesson 09


# ------------------------------------------------------------------ guidance: Section 3.1
# Adapted from lesson_05/sublesson_c/model.py: guided -- of the network's two answers the noise alone is guided
def guided(net, c, null, w=1.0):
    """eps = eps_u + w (eps_c - eps_u), Sec. 3.1, with the v of c, a function of x_t and t. All channels are guided.

    One batch of twice the size: it costs two network calls, unless w is 0 (no condition) or 1 (plain conditional).
    c, null (B,): the class and its absence.
    """
    if w in (0, 1):
        return given(net, c if w else null)

    def both(xt, t):
        of_c, of_null = net(torch.cat([xt, xt]), torch.cat([t, t]), torch.cat([c, null])).chunk(2)
        (eps_c, v), (eps_u, _) = of_c.chunk(2, dim=1), of_null.chunk(2, dim=1)
        return torch.cat([eps_u + w * (eps_c - eps_u), v], dim=1)

    return both


# ------------------------------------------------------------------ the network: Section 3.2 of the paper
KINDS = ("adaln-zero", "adaln", "cross-attention", "in-context")


def patchify(x, patch):
    """Sec. 3.2, Fig. 4: (B, C, H, W) -> (B, N, C patch^2). With `stem` it is a convolution of stride `patch`."""
    if x.shape[2] % patch or x.shape[3] % patch:
        raise ValueError(f"patch={patch} does not divide an image of {x.shape[2]} x {x.shape[3]}")
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)


def sincos_2d(dim, h, w):
    """The place of each patch in a grid of h rows and w columns (Sec. 3.2), (h w, dim) float64; fixed, not learned.

    The first half of the channels tells the column, the second the row: dim / 4 sines, then dim / 4 cosines.
    """
    def sincos(place):
        angle = place[:, None] / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
        return torch.cat([angle.sin(), angle.cos()], dim=1)                 # (h w, dim / 2)

    row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return torch.cat([sincos(column.flatten()), sincos(row.flatten())], dim=1)


@functools.cache
def sincos_on(device, dtype, *size):
    """`sincos_2d` of this size where it is added (Sec. 3.2), made once: a copy at every call would wait for a GPU."""
    return sincos_2d(*size).to(dtype).to(device)


# Adapted from lesson_01/model.py: time_embedding -- cosines first; the frequencies end just above 1/10000
def time_embedding(t, dim):
    """Cosines, then sines, of t at dim / 2 frequencies from 1 down towards 1/10000 (App. A). (B,) -> (B, dim)."""
    frequency = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class TimestepEmbedder(nn.Module):
    """A vector for a time (App. A): sines and cosines, then two layers, started with a deviation of 0.02."""

    def __init__(self, dim, frequencies=256):
        super().__init__()
        self.frequencies = frequencies
        self.into, self.out = linear(frequencies, dim), linear(dim, dim)
        for layer in (self.into, self.out):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, t):
        """(B,) -> (B, D)."""
        return self.out(F.silu(self.into(time_embedding(t, self.frequencies))))


class LabelEmbedder(nn.Module):
    """A learned vector for each class and, in the last row, for none (Sec. 3.1); started with a deviation of 0.02."""

    def __init__(self, classes, dim):
        super().__init__()
        self.table = nn.Embedding(classes + 1, dim)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, c):
        """(B,) int -> (B, D)."""
        return self.table(c)


def norm(dim, affine):
    """LayerNorm over a token's channels (Sec. 3.2), without own scale and shift where the condition gives them."""
    return nn.LayerNorm(dim, eps=1e-6, elementwise_affine=affine)


def modulate(x, shift, scale):
    """adaLN (Sec. 3.2): x (B, N, D), normalised, times 1 + scale, plus shift, both (B, 1, D). Zeros change nothing."""
    return x * (1 + scale) + shift


class Attention(nn.Module):
    """Attention of several heads (Sec. 3.2): the tokens look at themselves, or at `source`."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = linear(dim, 3 * dim), linear(dim, dim)

    def weights(self, x, source=None):
        """How much each token looks at each (Sec. 3.2), (B, heads, N, M), and the values, (B, heads, M, D / heads)."""
        if source is None:
            q, k, v = self.qkv(x).chunk(3, dim=2)
        else:
            (of_q, of_kv), (bias_q, bias_kv) = (p.tensor_split([x.shape[2]]) for p in self.qkv.parameters())
            q, (k, v) = F.linear(x, of_q, bias_q), F.linear(source, of_kv, bias_kv).chunk(2, dim=2)
        q, k, v = (rearrange(a, "b n (h d) -> b h n d", h=self.heads) for a in (q, k, v))
        # q / 8, because q k^T alone may be too large for fp16.
        return torch.softmax(q / 8 @ k.transpose(2, 3) / (math.sqrt(q.shape[3]) / 8), dim=3), v

    def forward(self, x, source=None):
        """x (B, N, D), source (B, M, D) -> (B, N, D)."""
        weights, v = self.weights(x, source)
        return self.out(rearrange(weights @ v, "b h n d -> b n (h d)"))


class MLP(nn.Module):
    """The "pointwise feedforward" of Fig. 3: two linear layers, a tanh GELU (App. A) between, four times as wide."""

    def __init__(self, dim):
        super().__init__()
        self.into, self.out = linear(dim, 4 * dim), linear(4 * dim, dim)

    def forward(self, x):
        """(..., D) -> (..., D)."""
        return self.out(F.gelu(self.into(x), approximate="tanh"))


class Block(nn.Module):
    """Attention over the tokens, then an MLP at each; `conditioning`: how time and class come in (Sec. 3.2, Fig. 3)."""

    def __init__(self, dim, heads, conditioning="adaln-zero"):
        super().__init__()
        self.conditioning = conditioning
        adaptive = conditioning.startswith("adaln")
        self.norm1, self.attention = norm(dim, affine=not adaptive), Attention(dim, heads)
        self.norm2, self.mlp = norm(dim, affine=not adaptive), MLP(dim)
        if conditioning == "adaln-zero":
            self.adaln = nn.Sequential(nn.SiLU(), linear(dim, 6 * dim, zero=True))
        elif conditioning == "adaln":
            self.adaln = nn.Sequential(nn.SiLU(), linear(dim, 4 * dim))
        elif conditioning == "cross-attention":
            self.norm_cross, self.cross = norm(dim, affine=True), Attention(dim, heads)

    def modulation(self, emb):
        """shift, scale, gate (Fig. 3) of the attention, then of the MLP: (B, 1, D) or constants. emb (B, 2, D)."""
        if self.conditioning == "adaln-zero":
            return self.adaln(emb.sum(1, keepdim=True)).chunk(6, dim=2)
        if self.conditioning == "adaln":
            shift1, scale1, shift2, scale2 = self.adaln(emb.sum(1, keepdim=True)).chunk(4, dim=2)
            return shift1, scale1, 1, shift2, scale2, 1
        return 0, 0, 1, 0, 0, 1

    def forward(self, x, emb):
        """x (B, N, D), emb (B, 2, D): the vectors of time and class -> (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(emb)
        x = x + gate1 * self.attention(modulate(self.norm1(x), shift1, scale1))
        if self.conditioning == "cross-attention":
            x = x + self.cross(self.norm_cross(x), emb)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """The decoder of Sec. 3.2: a last norm, adaptive if the blocks' are, and a linear map to the patch. Starts at 0."""

    def __init__(self, dim, out, adaptive=True):
        super().__init__()
        self.norm, self.linear = norm(dim, affine=not adaptive), linear(dim, out, zero=True)
        self.adaln = nn.Sequential(nn.SiLU(), linear(dim, 2 * dim, zero=True)) if adaptive else None

    def forward(self, x, emb):
        """x (B, N, D), emb (B, 2, D) -> (B, N, out)."""
        shift, scale = self.adaln(emb.sum(1, keepdim=True)).chunk(2, dim=2) if self.adaln else (0, 0)
        return self.linear(modulate(self.norm(x), shift, scale))


def unpatchify(x, patch, h):
    """Sec. 3.2: (B, N, patch^2 C) -> (B, C, H, W) for h rows of patches. Channels are the innermost here, not above."""
    return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=h, p=patch, q=patch)


class DiT(nn.Module):
    """A plain transformer over patches of the image (Sec. 3.2 and Fig. 3).

    dim, depth, heads  width of a token, number of blocks, heads of their attention
    patch              pixels along the side of a patch; a 28 x 28 image is (28 / patch)^2 tokens
    conditioning       how time and class enter the blocks: one of KINDS
    classes            the condition is 0 ... classes - 1, or `classes` for none
    image_size, image_channels   of the images in training
    """

    def __init__(self, dim=384, depth=12, heads=6, patch=2, conditioning="adaln-zero", classes=10, image_size=28,
                 image_channels=1):
        super().__init__()
        if conditioning not in KINDS:
            raise ValueError(f"conditioning={conditioning!r} is none of {', '.join(KINDS)}")
        if dim % 4 or dim % heads:
            raise ValueError(f"dim={dim} must be a multiple of 4 (two sines, two cosines) and of heads={heads}")
        if image_size % patch:
            raise ValueError(f"image_size={image_size} cannot be split into patches of {patch}")
        self.patch, self.conditioning = patch, conditioning
        self.stem = linear(image_channels * patch ** 2, dim)
        self.time, self.label = TimestepEmbedder(dim), LabelEmbedder(classes, dim)
        self.blocks = nn.ModuleList([Block(dim, heads, conditioning) for _ in range(depth)])
        self.final = FinalLayer(dim, 2 * image_channels * patch ** 2, adaptive=conditioning.startswith("adaln"))

    def forward(self, x, t, c):
        """x (B, C, H, W), t (B,) int, c (B,) int -> the noise and v, (B, 2 C, H, W). H and W may differ."""
        h, w = (side // self.patch for side in x.shape[2:])
        x = self.stem(patchify(x, self.patch))                              # (B, N, D)
        x = x + sincos_on(x.device, x.dtype, x.shape[2], h, w)
        emb = torch.stack([self.time(t), self.label(c)], dim=1)             # (B, 2, D)
        if self.conditioning == "in-context":
            x = torch.cat([x, emb], dim=1)                                  # two more tokens, like all others
        for block in self.blocks:
            x = block(x, emb)
        return unpatchify(self.final(x[:, :h * w], emb), self.patch, h)
