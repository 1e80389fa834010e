"""What lesson 05 takes from earlier lessons, word for word.

Written by `python -m tools.lineage sync` from the import lines of model.py. Do not edit it: change a definition
where it stands, in the file named above it, and run the command again.
"""

import math

import torch


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
