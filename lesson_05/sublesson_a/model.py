"""DDPM with dropout (Ho, Jain, Abbeel 2020, arXiv 2006.11239, Appendix B).

Convention: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps; t runs from data (0) to noise (T - 1) and is fed to
the network as that integer. The paper counts t from 1 to T, the code from 0 to T - 1; t = -1 is the clean image.
Images are (B, C, H, W) in [-1, 1]; t is (B,) int64.

Process and loss are lesson 05's. Lesson 05's network has a place for dropout; here stands what happens in it.
"""

import torch
from torch import nn

import earlier  # lesson 05: UNet
from earlier import noise_like  # lesson 01
from earlier import DDPM, ResBlock  # lesson 05


# ------------------------------------------------------------------ the network: Appendix B of the paper
class Dropout(nn.Module):
    """In training, each value is 0 with probability p and the others grow by 1 / (1 - p); in evaluation, the identity.

    The mean over the masks is the input. What `net.train()` and `net.eval()` set is `self.training`, nothing else.
    App. B gives p: 0.1 on CIFAR-10, 0 on the other data sets.
    """

    def __init__(self, p):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout={p} must be at least 0 and below 1")
        self.p = p

    def forward(self, x):
        """(B, C, H, W) -> (B, C, H, W)."""
        if not self.training or self.p == 0:
            return x
        keep = torch.rand(x.shape, device=x.device) >= self.p     # float32: bf16 has too few values for a rate of 0.1
        return x * keep / (1 - self.p)


class DropoutBlock(ResBlock):
    """Lesson 05's residual block (App. B), with this dropout after the second norm, before the last convolution.

    skip(x) + conv2(dropout(silu(norm2(h)))): before the norm, dropout would also change what the norm divides by.
    """

    def __init__(self, c_in, c_out, width, dropout=0.0, groups=32):
        super().__init__(c_in, c_out, width, groups=groups)
        self.dropout = Dropout(dropout)                 # `ResBlock.forward` calls it


class UNet(earlier.UNet):
    """Lesson 05's U-Net, with dropout in every residual block (App. B)."""

    def block(self, c_in, c_out):
        """A residual block with dropout (App. B) from c_in to c_out channels."""
        return DropoutBlock(c_in, c_out, self.width, self.dropout, self.groups)


# ------------------------------------------------------------------ does it overfit?
@torch.no_grad()
def error_by_time(ddpm, net, x0, times, generator=None):
    """The squared error of Eq. (14) at each of these times, over images x0 (B, C, H, W): (len(times),).

    With a generator of the same seed, two networks, or two sets of images, meet the same noise.
    """
    errors = []
    for i in times:
        t, eps = torch.full((len(x0),), i, device=x0.device), noise_like(x0, generator)
        errors.append((net(ddpm.q_sample(x0, t, eps), t).float() - eps).square().mean())
    return torch.stack(errors).cpu()
