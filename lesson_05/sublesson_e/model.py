"""Text-to-image: the condition is the token sequence of a text encoder (Rombach et al. 2021, arXiv 2112.10752).

Convention: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps; t runs from data (0) to noise (T - 1) and is fed to
the network as that integer. Guidance: eps = eps_u + w (eps_c - eps_u), so w = 1 is plain conditional.
Images are (B, C, H, W) in [-1, 1]; t and s are (B,) int64; a condition c is a caption, (B, L) int64: the number of
its start token, of its words, then 0 for padding. The empty caption, the start token alone, stands for "no caption".

Captions have different lengths, so a context is a pair here: tokens (B, L, D) and a mask (B, L), False at padding.
The layers of lessons 05c and 05d hand it on as it is; only attention looks into it.
"""

import math

import torch
from einops import rearrange
from torch import nn

import earlier  # lesson 05: UNet
from earlier import DDPM  # lesson 05
from earlier import CrossAttention, CrossLevel, drop, given, guided  # lesson 05c
from earlier import SpatialTransformer  # lesson 05d


# ------------------------------------------------------------------ the text encoder tau_theta: Sec. 3.3, App. E.2.1
class MaskedAttention(CrossAttention):
    """Lesson 05c's attention (Sec. 3.3), which does not see the padding of its context."""

    def weights(self, x, context):
        """How much each of the N tokens takes from each of the L, exactly 0 at padding; Sec. 3.3 with a mask.

        x (B, N, C), context: tokens (B, L, D) and mask (B, L) bool, with one True at least in every row
        -> (B, heads, N, L), whose sums over L are 1.
        """
        tokens, mask = context
        q, k = self.split(self.q(x)), self.split(self.k(tokens))
        logits = q / 8 @ k.transpose(2, 3) / (math.sqrt(q.shape[3]) / 8)    # q / 8: q k^T may be too large for fp16
        return torch.softmax(logits.masked_fill(~mask[:, None, None, :], -torch.inf), dim=3)

    def forward(self, x, context):
        """x (B, N, C), context: tokens (B, L, D) and mask (B, L) -> (B, N, C)."""
        h = self.weights(x, context) @ self.split(self.v(context[0]))       # (B, heads, N, d)
        return self.out(rearrange(h, "b h n d -> b n (h d)"))


class TextBlock(nn.Module):
    """Words attend to each other in both directions, then each thinks for itself (App. E.2.1).

    LayerNorm before both.
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attend = MaskedAttention(dim, dim, heads, dim // heads)        # self-attention: the context is h
        self.think = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, h, mask):
        """h (B, L, D), mask (B, L) -> (B, L, D)."""
        a = self.norm1(h)
        h = h + self.attend(a, (a, mask))
        return h + self.think(self.norm2(h))


class TextEncoder(nn.Module):
    """tau_theta (Sec. 3.3, App. E.2.1): a transformer over a caption's words; every position knows its place.

    It learns together with the U-Net.

    vocabulary  words, start token and padding included
    length      longest caption, start token included
    dim         numbers of a token, D
    depth       blocks in a row
    heads       of every attention
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


# ------------------------------------------------------------------ the network
class MaskedTransformer(SpatialTransformer):
    """Lesson 05d's transformer (App. E.2.1), in which no position of the image sees the padding of the context."""

    def __init__(self, channels, context, heads, head_dim, depth=1, dropout=0.0, groups=32):
        super().__init__(channels, context, heads, head_dim, depth, dropout, groups)
        for block in self.blocks:
            block.attn2 = MaskedAttention(heads * head_dim, context, heads, head_dim)


class UNet(earlier.UNet):
    """Lesson 05's U-Net with transformers, as in lesson 05d, whose context is a caption (Sec. 3.3).

    vocabulary, length  of the captions, as for `TextEncoder`
    context, layers     the text encoder's width D and how many blocks it has
    attention           resolutions at which every block is followed by a transformer (the bottom always has one)
    heads, head_dim     of every attention over the image; their product is the transformer's width
    depth               transformer blocks in a row
    The other values, `dropout` for the transformers as well, are those of lesson 05.
    """

    def __init__(self, vocabulary, length, context=64, layers=2, heads=2, head_dim=32, depth=1, **unet):
        self.shape = context, heads, head_dim, depth    # `cross` reads it, so it comes first
        super().__init__(**unet)
        self.text = TextEncoder(vocabulary, length, context, layers)

    def cross(self, channels):
        """A transformer for a level of this width (App. E.2.1)."""
        return MaskedTransformer(channels, *self.shape, self.dropout, self.groups)

    def level(self, c_in, c_out, attend):
        """A residual block and, if `attend`, a transformer (App. E.2.1)."""
        return CrossLevel(self.block(c_in, c_out), *([self.cross(c_out)] if attend else []))

    def bottom(self, c):
        """Between the way down and the way up: a transformer (App. E.2.1) between two residual blocks."""
        return CrossLevel(self.block(c, c), self.cross(c), self.block(c, c))

    def forward(self, x, t, c):
        """eps_theta(x_t, t, tau_theta(c)): x (B, C, H, W), t (B,) int, c (B, L) int -> the noise, (B, C, H, W)."""
        mask = c != 0                                                       # (B, L), False at padding
        return self.body(x, (self.embed(t), (self.text(c, mask), mask)))
