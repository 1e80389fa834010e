"""What lesson 32 takes from earlier lessons, word for word.

Written by `python -m tools.lineage sync` from the import lines of model.py. Do not edit it: change a definition
where it stands, in the file named above it, and run the command again.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


# lesson_05/model.py
def image(values):
    """The scalars of Eq. (4), one for each image, to multiply images with: (B,) -> (B, 1, 1, 1) float32."""
    return values.float()[:, None, None, None]


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


# lesson_23/model.py
def patchify(x, patch):
    """Sec. 3.2, Fig. 4: (B, C, H, W) -> (B, N, C patch^2). With `stem` it is a convolution of stride `patch`."""
    if x.shape[2] % patch or x.shape[3] % patch:
        raise ValueError(f"patch={patch} does not divide an image of {x.shape[2]} x {x.shape[3]}")
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)


# lesson_23/model.py
def sincos_2d(dim, h, w):
    """The place of each patch in a grid of h rows and w columns (Sec. 3.2), (h w, dim) float64; fixed, not learned.

    The first half of the channels tells the column, the second the row: dim / 4 sines, then dim / 4 cosines.
    """
    def sincos(place):
        angle = place[:, None] / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
        return torch.cat([angle.sin(), angle.cos()], dim=1)                 # (h w, dim / 2)

    row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return torch.cat([sincos(column.flatten()), sincos(row.flatten())], dim=1)


# lesson_23/model.py
# Adapted from lesson_01/model.py: time_embedding -- cosines first; the frequencies end just above 1/10000
def time_embedding(t, dim):
    """Cosines, then sines, of t at dim / 2 frequencies from 1 down towards 1/10000 (App. A). (B,) -> (B, dim)."""
    frequency = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


# lesson_23/model.py
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


# lesson_23/model.py
def norm(dim, affine):
    """LayerNorm over a token's channels (Sec. 3.2), without own scale and shift where the condition gives them."""
    return nn.LayerNorm(dim, eps=1e-6, elementwise_affine=affine)


# lesson_23/model.py
def modulate(x, shift, scale):
    """adaLN (Sec. 3.2): x (B, N, D), normalised, times 1 + scale, plus shift, both (B, 1, D). Zeros change nothing."""
    return x * (1 + scale) + shift


# lesson_23/model.py
class MLP(nn.Module):
    """The "pointwise feedforward" of Fig. 3: two linear layers, a tanh GELU (App. A) between, four times as wide."""

    def __init__(self, dim):
        super().__init__()
        self.into, self.out = linear(dim, 4 * dim), linear(4 * dim, dim)

    def forward(self, x):
        """(..., D) -> (..., D)."""
        return self.out(F.gelu(self.into(x), approximate="tanh"))


# lesson_23/model.py
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


# lesson_23/model.py
def unpatchify(x, patch, h):
    """Sec. 3.2: (B, N, patch^2 C) -> (B, C, H, W) for h rows of patches. Channels are the innermost here, not above."""
    return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=h, p=patch, q=patch)


# lesson_39/model.py
def network_time(t):
    """What the network receives as the time of v_t (Sec. 3): 1000 t. (B,) -> (B,) float32.

    Differs from the paper, which feeds t: lesson 05's embedding is made for numbers from 0 to 999.
    """
    return (1000 * t).float()
