"""Interpolation between two images with DDPM (Ho, Jain, Abbeel 2020, arXiv 2006.11239, Section 4.4).

Convention: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps; t runs from data (0) to noise (T - 1) and is fed to
the network as that integer. The paper counts t from 1 to T, the code from 0 to T - 1; t = -1 is the clean image.
Images are (B, C, H, W) in [-1, 1]; x0 and y0 are two of them, lam in [0, 1] is the way from x0 to y0.

The process and the network are lesson 05's.
"""

import torch
import torch.nn.functional as F

from earlier import noise_like  # lesson 01
from earlier import DDPM, UNet, image  # lesson 05

# ------------------------------------------------------------------ the mixture: Section 4.4 of the paper
RULES = ("independent", "shared", "root")


def mixing_weights(lam, rule):
    """What x_t and x'_t are multiplied with, Sec. 4.4: 1 - lam and lam; or, under the rule "root", their roots."""
    if rule not in RULES:
        raise ValueError(f"rule={rule} is none of {', '.join(RULES)}")
    return ((1 - lam) ** 0.5, lam ** 0.5) if rule == "root" else (1 - lam, lam)


def mix(xt, yt, lam, rule="independent"):
    """x-bar_t = (1 - lam) x_t + lam x'_t, Sec. 4.4, or the same with square roots. (B, C, H, W)."""
    a, b = mixing_weights(lam, rule)
    return a * xt + b * yt


def noise_share(lam, rule):
    """The variance of the noise in the mixture of Sec. 4.4, as a share of the 1 - abar_t that the network expects.

    Two independent noises: a^2 + b^2, which is 1/2 in the middle. One noise for both: (a + b)^2.
    """
    a, b = mixing_weights(lam, rule)
    return (a + b) ** 2 if rule == "shared" else a ** 2 + b ** 2


# ------------------------------------------------------------------ a look ahead: codes without noise, lesson 06
def slerp(a, b, lam):
    """From a to b on the great circle of each pair (DDIM, Sec. 5.3): keeps the length that noise has. (B, C, H, W)."""
    cosine = F.cosine_similarity(a.flatten(1), b.flatten(1)).clamp(-0.9999, 0.9999)
    angle = image(torch.arccos(cosine))
    return (torch.sin((1 - lam) * angle) * a + torch.sin(lam * angle) * b) / torch.sin(angle)


# ------------------------------------------------------------------ between two images: Section 4.4 of the paper
class Interpolation(DDPM):
    """Noise two images to the same time t, mix the two x_t, denoise the mixture from that very t (Sec. 4.4).

    rule   "independent": a noise for each image, the paper's way; "shared": one noise for both;
           "root": a noise for each, mixed with square roots as weights
    steps  network calls that the whole chain would take; from t on, the same stride takes fewer
    """

    def times(self, t, steps):
        """The times of Algorithm 2 from t on, evenly spaced: t itself first, -1 (the clean image) last."""
        if not (0 <= t < self.timesteps and 1 < steps <= self.timesteps):
            raise ValueError(f"t={t} must be between 0 and {self.timesteps - 1}, steps={steps} between 2 and "
                             f"{self.timesteps}")
        calls = max(1, round(steps * (t + 1) / self.timesteps))
        return torch.linspace(t, 0, calls).round().long().tolist() + [-1]

    def decode(self, net, x, times, noise, clip=True):
        """x-bar_0 ~ p(x_0 | x-bar_t), Sec. 4.4: Algorithm 2 from times[0] on, with the noise of its steps given.

        x (B, C, H, W); noise: one (B, C, H, W) for every step but the last, which adds none -> (B, C, H, W).
        """
        for t, s, z in zip(times[:-1], times[1:], [*noise, 0]):
            t, s = (torch.full((len(x),), i, device=x.device) for i in (t, s))
            mean, _ = self.p_mean(net, x, t, s, clip)
            x = mean + image(self.reverse_variance(t, s).sqrt()) * z
        return x

    @torch.no_grad()
    def between(self, net, x0, y0, lams, t, rule="independent", steps=1000, clip=True, generator=None):
        """Sec. 4.4, all of it: from x0 (lam = 0) to y0 (lam = 1), an image for each of lams.

        x0, y0 (B, C, H, W) -> (len(lams), B, C, H, W). All lams share their noises, encoder's and decoder's.
        """
        at, times = torch.full((len(x0),), t, device=x0.device), self.times(t, steps)
        eps = noise_like(x0, generator)
        eps_y = eps if rule == "shared" else noise_like(x0, generator)
        xt, yt = self.q_sample(x0, at, eps), self.q_sample(y0, at, eps_y)           # x_t, x'_t ~ q(x_t | .), Eq. (4)
        noise = [noise_like(x0, generator) for _ in times[1:-1]]
        return torch.stack([self.decode(net, mix(xt, yt, lam, rule), times, noise, clip) for lam in lams])

    def ddim(self, net, x, times):
        """Follow the deterministic path (DDIM, Eq. (12) with sigma = 0) through these times, up or down. (B, C, H, W).

        Up it leads to a code, down to an image.
        """
        for t, s in zip(times[:-1], times[1:]):
            t, s = (torch.full((len(x),), i, device=x.device) for i in (t, s))
            x0 = self.predict_x0(net, x, t)
            eps = (x - image(self.abar[t].sqrt()) * x0) / image((1 - self.abar[t]).sqrt())
            x = self.q_sample(x0, s, eps)
        return x

    @torch.no_grad()
    def spherical(self, net, x0, y0, lams, steps=1000):
        """`between` without noise (DDIM, Sec. 5.3): images and codes x_T are one to one, codes are mixed on a sphere.

        x0, y0 (B, C, H, W) -> (len(lams), B, C, H, W).
        """
        down = self.times(self.timesteps - 1, steps)
        xT, yT = (self.ddim(net, x, down[-2::-1]) for x in (x0, y0))                # the image stands for x at t = 0
        return torch.stack([self.ddim(net, slerp(xT, yT, lam), down) for lam in lams])
