"""CFG: Classifier-Free Diffusion Guidance (Ho, Salimans 2022, arXiv 2207.12598).

Convention: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps; t runs from data (0) to noise (T - 1) and is fed to the
network as that integer. Guidance: eps = eps_u + w (eps_c - eps_u): w = 0 is unconditional, w = 1 plain conditional.
The paper writes (1 + w) eps_c - w eps_u: its w is ours minus 1 (GLIDE and Stable Diffusion call ours the scale s).
The paper's z_lambda is x_t with the log-SNR lambda = ln(abar_t / (1 - abar_t)); its `v` interpolates a variance and is
not a velocity. Images are (B, C, H, W) in [-1, 1]; t and s are (B,) int64, a step goes from t to s < t; a condition c
is (B,) int64, a class or `classes` for none.

The paper's own lines are so few that lesson 05c could take them ahead, and they are used from there: `drop` is line 3
of Algorithm 1, with p for p_uncond, `guided` is Eq. (6), and `given` fills the condition in. Here stand the process
in log-SNR of Sec. 2, the mixture of Fig. 2, for which guidance can be computed exactly, and a network for classes.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

import earlier  # lesson 05: DDPM, UNet
from earlier import noise_like  # lesson 01
from earlier import ResBlock, image, linear  # lesson 05
from earlier import drop, given, guided  # lesson 05c


# ------------------------------------------------------------------ the process: Section 2 of the paper
def log_snr(u, low=-20.0, high=20.0):
    """lambda(u) = -2 ln tan(a u + b), Sec. 2: from `high` at u = 0 (data) down to `low` at u = 1 (noise).

    A cosine schedule: abar = sigmoid(lambda) = cos^2(a u + b). Uniform u is the paper's p(lambda). Elementwise.
    """
    b = math.atan(math.exp(-high / 2))
    a = math.atan(math.exp(-low / 2)) - b
    return -2 * torch.tan(a * u + b).log()


class DDPM(earlier.DDPM):
    """Lesson 05's process with times evenly spaced in the paper's u, and the sampler of Algorithm 2 (Sec. 2).

    It does not know of classes: a network comes with its condition filled in. `loss` is Algorithm 1 from line 4 on; its
    uniform t is the paper's lambda ~ p(lambda).

    timesteps  T, the values of u in training, evenly spaced (the paper draws u from [0, 1])
    low, high  the ends of the log-SNR
    v          of the steps back: their variance is beta-tilde^(1 - v) beta^v
    """

    def __init__(self, timesteps=1000, low=-20.0, high=20.0, v=0.3):
        super().__init__(timesteps)
        if not -60 <= low < high <= 30:                # beyond, 1 - abar has no digits left in float64
            raise ValueError(f"low={low}, high={high}: -60 <= low < high <= 30 is needed")
        if not 0 <= v <= 1:
            raise ValueError(f"v={v} must be between 0 and 1")
        self.v = v
        u = torch.linspace(0, 1, timesteps, dtype=torch.float64)
        self.abar[:-1] = log_snr(u, low, high).sigmoid()                    # the last entry stays 1: no noise

    def reverse_variance(self, t, s):
        """The variance of p(x_s | x_t), Sec. 2, between beta-tilde (v = 0) and beta (v = 1). (B,) float64.

        What lesson 09 learns for every pixel is one number v. 0 at the last step, where nothing is drawn.
        """
        return self.beta_tilde(t, s) ** (1 - self.v) * self.beta(t, s) ** self.v

    def times(self, steps=None, start=None):
        """The sequence of Algorithm 2: `steps` times (default: all) from high to low, evenly spaced in u; list of int.

        start: the log-SNR of the first (default: the lowest). Without clipping -20 is too low for few steps.
        """
        steps = self.timesteps if steps is None else steps
        lambdas = torch.logit(self.abar[:-1])
        first = self.timesteps - 1 if start is None else int((lambdas >= start - 1e-6).sum()) - 1
        if not 1 < steps <= first + 1:
            raise ValueError(f"steps={steps} must be between 2 and {max(first + 1, 2)}" + (
                "" if start is None else f", from log-SNR {start} on"))
        return torch.linspace(first, 0, steps).round().long().tolist()

    @torch.no_grad()
    def reverse(self, net, x, times, clip=True, generator=None):
        """Algorithm 2 from x = x_T on. Yields (t, x_s, x_0 estimate) after every step; the last x_s is the sample.

        net: eps(x_t, t), guided or not; see `guided`. times: as `times` gives them.
        Differs from Algorithm 2: x_0 is clipped to [-1, 1], because guidance pushes it out of the range of images and
        because an error of the network at the lowest log-SNR is divided by sqrt(abar) = 5e-5.
        """
        for t, s in zip(times, [*times[1:], -1]):                           # Alg. 2, line 2
            t_, s_ = (torch.full((len(x),), i, device=x.device) for i in (t, s))
            mean, x0 = self.p_mean(net, x, t_, s_, clip)                    # Alg. 2, lines 3 and 4
            sigma = image(self.reverse_variance(t_, s_).sqrt())
            x = mean + sigma * noise_like(x, generator) if s >= 0 else mean  # Alg. 2, line 5
            yield t, x, x0

    def sample(self, net, n, times=None, shape=(1, 28, 28), clip=True, generator=None):
        """n images drawn with Algorithm 2, (n, C, H, W) in about [-1, 1]."""
        xT = noise_like(torch.empty(n, *shape, device=self.abar.device), generator)                # Alg. 2, line 1
        for _, x, _ in self.reverse(net, xT, self.times() if times is None else times, clip, generator):
            pass
        return x


# ------------------------------------------------------------------ guidance, exactly: Figure 2 of the paper
class Mixture(nn.Module):
    """The exact network for Gaussians of deviation `std` around `means` (K, D), one for each class: Fig. 2's data.

    It is called as the U-Net is, with points as (B, D, 1, 1); c = K is "no class": all of them, equally likely.
    """

    def __init__(self, process, means, std):
        super().__init__()
        self.process, self.std = process, std
        self.register_buffer("means", torch.as_tensor(means).float(), persistent=False)

    def log_likelihoods(self, x, abar=1.0):
        """ln q_t(x | c) of every class of Fig. 2, less a constant that they share. x (B, D) -> (B, K)."""
        return -torch.cdist(x, self.means * abar ** 0.5) ** 2 / (2 * (abar * self.std ** 2 + 1 - abar))

    def log_guided(self, x, c, w, abar=1.0):
        """ln of q_t(x) (q_t(x | c) / q_t(x))^w, not normalised: the density that Fig. 2 shows. x (B, D) -> (B,)."""
        each = self.log_likelihoods(x, abar)
        marginal = each.logsumexp(1) - math.log(len(self.means))
        return marginal + w * (each[:, c] - marginal)

    def forward(self, xt, t, c):
        """eps = -sqrt(1 - abar) grad ln q_t(x_t | c), exact. xt (B, D, 1, 1), t, c (B,) -> (B, D, 1, 1)."""
        x, abar = xt.flatten(1).double(), self.process.abar[t][:, None]     # in float32 1 - abar would lose its digits
        centres = abar.sqrt()[:, :, None] * self.means                      # (B, K, D)
        variance = abar * self.std ** 2 + 1 - abar                          # of x_t around its centre, (B, 1)
        among = torch.softmax(-(x[:, None] - centres).square().sum(2) / (2 * variance), dim=1)     # p(c | x_t)
        asked = F.one_hot(c, len(self.means) + 1)[:, :-1].to(x)
        share = torch.where(c[:, None] == len(self.means), among, asked)                           # (B, K)
        eps = (1 - abar).sqrt() * (x - (share[:, :, None] * centres).sum(1)) / variance
        return eps.float().unflatten(1, xt.shape[1:])


# ------------------------------------------------------------------ the network: Section 4, as in guided-diffusion
class AdaResBlock(ResBlock):
    """A residual block whose second norm is scaled and shifted by time and class (adaptive group norm, Sec. 4).

    So it is in the networks that the paper takes over from guided-diffusion; lesson 05 adds the time only.
    """

    def __init__(self, c_in, c_out, width, dropout=0.0, groups=32):
        super().__init__(c_in, c_out, width, dropout, groups)
        self.time = linear(width, 2 * c_out)

    def forward(self, x, emb):
        """x (B, c_in, H, W), emb (B, width) -> (B, c_out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class UNet(earlier.UNet):
    """Lesson 05's U-Net over an image, a time and a class, or none: a learned vector for each (Sec. 4).

    classes  the condition is 0 ... classes - 1, or `classes` for none
    The other values are those of lesson 05.
    """

    def __init__(self, classes=10, **unet):
        super().__init__(**unet)
        self.label = nn.Embedding(classes + 1, self.width)                  # the last row is the null class

    def embed(self, t, c):
        """What every block is told (Sec. 4): the time's vector plus the class's. t, c (B,) -> (B, width)."""
        return super().embed(t) + self.label(c)

    def block(self, c_in, c_out):
        """A residual block with adaptive group norm (Sec. 4) from c_in to c_out channels."""
        return AdaResBlock(c_in, c_out, self.width, self.dropout, self.groups)

    def forward(self, x, t, c):
        """x (B, C, H, W), t (B,) int, c (B,) int -> the predicted noise, (B, C, H, W)."""
        return self.body(x, self.embed(t, c))
