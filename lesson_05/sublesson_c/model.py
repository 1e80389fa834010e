"""Class conditioning by cross-attention: the mechanism of LDM (Rombach et al. 2021, arXiv 2112.10752, Sec. 3.3).

Convention: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps; t runs from data (0) to noise (T - 1) and is fed to
the network as that integer. Guidance: eps = eps_u + w (eps_c - eps_u), so w = 1 is plain conditional.
Images are (B, C, H, W) in [-1, 1]; t and s are (B,) int64; a condition c is (B,) int64, a digit or `classes`
for none; the context is a few tokens for each image, (B, L, D).

The process is lesson 05's: it knows no classes. A condition reaches the network through `given` and `guided`.
"""

import math

import torch
from einops import rearrange
from torch import nn

import earlier  # lesson 05: UNet
from earlier import DDPM, Attention, Level, ResBlock, initialised  # lesson 05


# ------------------------------------------------------------------ the condition, between process and network
def drop(c, null, p):
    """Replace each sample's condition by `null` with probability p: a coin for every sample, not one for the batch.

    Line 3 of Ho and Salimans (2022), Alg. 1. c (B, ...), null the same shape or one that broadcasts to it -> (B, ...).
    """
    dropped = torch.rand(len(c), device=c.device) < p
    return torch.where(dropped.view(-1, *[1] * (c.dim() - 1)), null, c)


def given(net, c):
    """The network of Eq. (3) with its condition filled in: eps(x_t, t, c) as the function of x_t and t that DDPM calls.

    net(x_t, t, c), c (B, ...) -> a function of x_t (B, C, H, W) and t (B,).
    """
    return lambda xt, t: net(xt, t, c)


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


class ClassTokens(nn.Module):
    """The context of a class, tau_theta(y) of Sec. 3.3: L learned tokens, and L for "no class", the table's last row.

    A learned null is a context like any other. Zeros would leave W_O's bias alone, the same at every position.
    """

    def __init__(self, classes, tokens, dim):
        super().__init__()
        self.tokens, self.table = tokens, nn.Embedding(classes + 1, tokens * dim)

    def forward(self, c):
        """c (B,) int, 0 to classes -> (B, L, D)."""
        return rearrange(self.table(c), "b (l d) -> b l d", l=self.tokens)


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


class CrossBlock(nn.Module):
    """Every position of the image attends to the context (Sec. 3.3).

    W_O starts at 0, so that at first nothing changes.
    """

    def __init__(self, channels, context, heads, groups=32):
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels cannot be split into heads={heads}")
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.attend = CrossAttention(channels, context, heads, channels // heads)
        initialised(self.attend.out, zero=True)

    def forward(self, x, context):
        """x (B, C, H, W), context (B, L, D) -> (B, C, H, W)."""
        h = self.attend(rearrange(self.norm(x), "b c h w -> b (h w) c"), context)
        return x + rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])


# ------------------------------------------------------------------ the network
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


class UNet(earlier.UNet):
    """Lesson 05's U-Net, whose positions also attend to the tokens of a class (Sec. 3.3 and Fig. 3).

    attention  resolutions at which every block is followed by cross-attention (the bottom always is)
    classes    the condition is 0 ... classes - 1, or `classes` for none
    tokens     tokens of a class, L; each has `context` numbers, D
    heads      of the cross-attention
    The other values are those of lesson 05.
    """

    def __init__(self, classes=10, tokens=4, context=64, heads=2, **unet):
        self.context, self.heads = context, heads       # `level` and `bottom` read them, so they come first
        super().__init__(**unet)
        self.classes = ClassTokens(classes, tokens, context)

    def cross(self, channels):
        """What a level of this width has to meet the context with (Sec. 3.3)."""
        return CrossBlock(channels, self.context, self.heads, self.groups)

    def level(self, c_in, c_out, attend):
        """A residual block and, if `attend`, cross-attention (Sec. 3.3) where lesson 05 has self-attention."""
        return CrossLevel(self.block(c_in, c_out), *([self.cross(c_out)] if attend else []))

    def bottom(self, c):
        """Between the way down and the way up: self-attention, then cross-attention (Sec. 3.3)."""
        return CrossLevel(self.block(c, c), Attention(c, self.groups), self.cross(c), self.block(c, c))

    def forward(self, x, t, c):
        """eps_theta(x_t, t, tau_theta(c)): x (B, C, H, W), t (B,) int, c (B,) int -> the noise, (B, C, H, W)."""
        return self.body(x, (self.embed(t), self.classes(c)))
