"""What lesson 03 takes from earlier lessons, word for word.

Written by `python -m tools.lineage sync` from the import lines of model.py. Do not edit it: change a definition
where it stands, in the file named above it, and run the command again.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


# lesson_01/model.py
def wide(values, x):
    """One number for each element of a batch x, to multiply it with, as in DDPM, Eq. (4). (B,) -> (B, 1, ...).

    The schedule is kept in float64; what comes out has the precision of x.
    """
    return values.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


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
TIME = 32                                                   # numbers that tell the network the time


# lesson_01/model.py
def time_embedding(t, dim):
    """Sines, then cosines, of t at dim / 2 frequencies from 1 down to 1/10000 (DDPM, App. B). (B,) -> (B, dim)."""
    frequency = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2 - 1))
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


# lesson_01/model.py
def at_time(h, scale_and_shift):
    """h (B, width), scaled and shifted as the time asks (IDDPM, App. A), through the nonlinearity. (B, width)."""
    scale, shift = scale_and_shift.chunk(2, dim=1)
    return F.silu(h * (1 + scale) + shift)


# lesson_01/model.py
class MLP(nn.Module):
    """Fully connected layers with shortcuts; the time scales and shifts what enters each.

    No convolution, no U-Net: that of DDPM, App. B, comes in lesson 05.

    shape  of one data point: (2,) or (1, 28, 28)
    width  of the hidden layers; depth: how many of them
    """

    def __init__(self, shape=(2,), width=128, depth=3):
        super().__init__()
        size = math.prod(shape)
        self.stem, self.out = nn.Linear(size, width), nn.Linear(width, size)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.times = nn.ModuleList(nn.Linear(TIME, 2 * width) for _ in range(depth + 1))

    def forward(self, x, t):
        """x (B, ...), t (B,) int -> the prediction, (B, ...)."""
        emb = time_embedding(t, TIME)
        h = self.stem(x.flatten(1))                                                                # (B, width)
        for layer, time in zip(self.layers, self.times):
            h = h + layer(at_time(h, time(emb)))
        return self.out(at_time(h, self.times[-1](emb))).reshape(x.shape)
