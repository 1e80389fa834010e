"""The spatial transformer of LDM (Rombach et al. 2021, arXiv 2112.10752), in a U-Net that is asked for a class.

Convention: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps; t runs from data (0) to noise (T - 1) and is fed to
the network as that integer. Guidance: eps = eps_u + w (eps_c - eps_u), so w = 1 is plain conditional.
Images are (B, C, H, W) in [-1, 1]; t and s are (B,) int64; a condition c is (B,) int64, a digit or `classes`
for none; the context is a few tokens for each image, (B, L, D).

The process is lesson 05's; the tokens of a class, attention to them and guidance are lesson 05c's. New is the block.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import nn

import earlier  # lesson 05c: UNet
from earlier import DDPM, conv  # lesson 05
from earlier import CrossAttention, CrossLevel, drop, given, guided  # lesson 05c


# ------------------------------------------------------------------ the transformer block: Appendix E.2.1 of the paper
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


# ------------------------------------------------------------------ the network
class UNet(earlier.UNet):
    """Lesson 05c's U-Net with transformers instead of its attention (App. E.2.1).

    attention        resolutions at which every block is followed by a transformer (the bottom always has one)
    heads, head_dim  of every attention; their product is the transformer's width
    depth            transformer blocks in a row
    The other values, `dropout` for the transformers as well, are those of lessons 05 and 05c.
    """

    def __init__(self, head_dim=32, depth=1, **unet):
        self.head_dim, self.depth = head_dim, depth     # `cross` reads them, so they come first
        super().__init__(**unet)

    def cross(self, channels):
        """A transformer for a level of this width (App. E.2.1)."""
        return SpatialTransformer(channels, self.context, self.heads, self.head_dim, self.depth, self.dropout,
                                  self.groups)

    def bottom(self, c):
        """Between the way down and the way up; self-attention is now within the transformer (App. E.2.1)."""
        return CrossLevel(self.block(c, c), self.cross(c), self.block(c, c))
