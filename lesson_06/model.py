"""DDIM: Denoising Diffusion Implicit Models (Song, Meng, Ermon 2020, arXiv 2010.02502).

Convention: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps; t runs from data (0) to noise (T - 1) and is fed to
the network as that integer. The paper writes alpha_t for what is abar_t here (and in DDPM), and counts t from 1 to
T, the code from 0 to T - 1; t = -1 is the clean image, abar_{-1} = 1.
Images are (B, C, H, W) in [-1, 1]; t and s are (B,) int64. A step goes from t to s; s > t goes back to the noise.
"""

import math

import torch

from earlier import DDPM, UNet, image  # lesson 05
from earlier import noise_like  # lesson 01

SPACINGS = ("uniform", "quadratic", "ends", "trailing")
CLIPS = ("none", "stale", "fresh")


class DDIM(DDPM):
    """A trained DDPM with the samplers of Sec. 4, which share its loss. Holds the schedule and no weights.

    Schedule, noising q(x_t | x_0) and training loss are DDPM's: by Theorem 1 every member q_sigma of the family
    (Sec. 3) has that loss, up to the weights of the times. What differs is the way back: `reverse`, `sample`.
    """

    # ------------------------------------------------------------------ one step: Section 4.1
    def ddim_step(self, xt, eps, t, s, sigma=0.0, clip="none"):
        """Eq. (12) without its last term, sigma times noise; and the x_0 it aims at. Two (B, C, H, W).

        It is the mean of q_sigma(x_s | x_t, x_0), Eq. (7), at the predicted x_0. eps (B, C, H, W): the network's.
        sigma: (B,) float64, or 0. Differs from the paper where clip is not "none":
        stale   x_0 is clipped to [-1, 1], eps stays as the network gave it (diffusers' clip_sample)
        fresh   and eps is made anew, so that x_t is still made of the two (OpenAI's code; at eta = 1, lesson 05)
        """
        x0 = (xt - image((1 - self.abar[t]).sqrt()) * eps) / image(self.abar[t].sqrt())            # f_theta, Eq. (9)
        if clip != "none":
            x0 = x0.clamp(-1, 1)
        if clip == "fresh":
            eps = (xt - image(self.abar[t].sqrt()) * x0) / image((1 - self.abar[t]).sqrt())
        towards_xt = (1 - self.abar[s] - sigma ** 2).clamp(min=0).sqrt()    # not sigma: what it leaves
        return image(self.abar[s].sqrt()) * x0 + image(towards_xt) * eps, x0

    # ------------------------------------------------------------------ which times, how much noise: Sections 4.2 and 5
    def times(self, steps, spacing="uniform"):
        """The sub-sequence tau of Sec. 4.2: up to `steps` increasing times; the image is step -1 below the first.

        uniform    0, T/S, 2 T/S, ...: the official code's; the last is T - T/S, not T - 1. T/S is rounded down: where
                   S does not divide T they end lower, at 599 for S = 600, and x_T does not belong there
        quadratic  i^2, up to 0.8 T: the official code's for CIFAR-10; small times, where they coincide, once
        ends       evenly spaced from 0 to T - 1, both included (lesson 05's)
        trailing   T/S - 1, 2 T/S - 1, ..., T - 1
        """
        T = self.timesteps
        if spacing not in SPACINGS:
            raise ValueError(f"spacing={spacing!r} is none of {', '.join(SPACINGS)}")
        if not 1 < steps <= T:
            raise ValueError(f"steps={steps} must be between 2 and {T}")
        if spacing == "uniform":
            return [i * (T // steps) for i in range(steps)]
        if spacing == "quadratic":
            roots = torch.linspace(0, math.sqrt(0.8 * T), steps, dtype=torch.float64)
            return sorted({int(root ** 2 + 1e-9) for root in roots})
        if spacing == "ends":
            return torch.linspace(0, T - 1, steps).round().long().tolist()
        return [round((i + 1) * T / steps) - 1 for i in range(steps)]

    def sigma(self, t, s, eta):
        """sigma(eta) of a step from t to s, Eq. (16): 0 for DDIM, eta = 1 for DDPM's posterior. (B,) float64."""
        return eta * ((1 - self.abar[s]) / (1 - self.abar[t])).sqrt() * self.beta(t, s).sqrt()

    def sigma_hat(self, t, s):
        """sigma-hat (Sec. 5): the wider noise of DDPM's own CIFAR-10 samples, sqrt(beta) of the step. (B,) float64."""
        return self.beta(t, s).sqrt()

    # ------------------------------------------------------------------ sampling: Sections 4.1 and 4.2
    @torch.no_grad()
    def reverse(self, net, xT, times, eta=0.0, hat=False, clip="none", generator=None):
        """Eq. (12) along the sub-sequence `times` of Sec. 4.2, from xT (B, C, H, W) on.

        Yields (t, x_s, x_0 estimate) after every step; the last x_s is the sample.
        hat: the noise is sigma-hat, the mean that of eta = 1, as in the official code: in Eq. (12) as it stands,
        1 - abar_s - sigma-hat^2 would be negative on the last jumps.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta} must be between 0 and 1")
        if clip not in CLIPS:
            raise ValueError(f"clip={clip!r} is none of {', '.join(CLIPS)}")
        x = xT
        for t, s in zip(times[::-1], [*times[-2::-1], -1]):
            t_, s_ = (torch.full((len(x),), i, device=x.device) for i in (t, s))
            sigma = self.sigma(t_, s_, 1.0 if hat else eta)
            x, x0 = self.ddim_step(x, net(x, t_), t_, s_, sigma, clip)      # Eq. (12)
            if s >= 0 and (eta or hat):
                x = x + image(self.sigma_hat(t_, s_) if hat else sigma) * noise_like(x, generator)
            yield t, x, x0

    def sample(self, net, xT, times, eta=0.0, hat=False, clip="none", generator=None):
        """The images that start from the noise xT (Sec. 4.2; see `reverse`), (B, C, H, W) in about [-1, 1]."""
        for _, x, _ in self.reverse(net, xT, times, eta, hat, clip, generator):
            pass
        return x

    # ------------------------------------------------------------------ and back: Sections 4.3 and 5.4
    @torch.no_grad()
    def encode(self, net, x0, times):
        """The noise from which eta = 0 on the same times draws x_0: Eq. (13), an Euler step, with s > t. (B, C, H, W).

        The network is asked at the time that x stands at; for the clean image, at 0, the lowest that it knows.
        """
        x = x0
        for t, s in zip([-1, *times[:-1]], times):
            t_, s_ = (torch.full((len(x),), i, device=x.device) for i in (t, s))
            x, _ = self.ddim_step(x, net(x, t_.clamp(min=0)), t_, s_)
        return x


# ------------------------------------------------------------------ between two noises: Section 5.3
def slerp(a, b, w):
    """From a (w = 0) to b (w = 1) along the great circle between them (Sec. 5.3), sample by sample. (B, C, H, W).

    A mixture of two noises with weights 1 - w and w is shorter than either; a point on the circle is not.
    """
    flat_a, flat_b = a.flatten(1).double(), b.flatten(1).double()
    cosine = (flat_a * flat_b).sum(1) / (flat_a.norm(dim=1) * flat_b.norm(dim=1))
    angle = cosine.clamp(-1, 1).acos().clamp(1e-4, math.pi - 1e-4)         # parallel: what is left is the mixture
    return image(((1 - w) * angle).sin() / angle.sin()) * a + image((w * angle).sin() / angle.sin()) * b
