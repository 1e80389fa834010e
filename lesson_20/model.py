"""EDM: Elucidating the Design Space of Diffusion-Based Generative Models (Karras, Aittala, Aila, Laine 2022,
arXiv 2206.00364).

Convention: x = y + sigma eps, where y is the image, shifted and scaled to mean 0 and std 0.5; sampling lowers sigma
from 80 to 0.002 and then to 0; the network, lesson 05's U-Net, receives c_in x and, as its time t, c_noise, which is
ln(sigma) / 4. With a scaling s(t) the state is s (y + sigma eps). The paper's i counts the steps from 0 (noise) to
N - 1; t_N = 0 is the image.
Images are (B, C, H, W): in [-1, 1] outside, standardised inside. sigma is (B,), or () for a whole batch.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from earlier import UNet  # lesson 05
from earlier import noise_like  # lesson 01

LEVELS = ("edm", "vp", "ve", "iddpm")
SOLVERS = ("heun", "euler")


# ------------------------------------------------------------------ schedules: Table 1, sigma(t) and s(t)
class Schedule(NamedTuple):
    """Table 1: how noise level and scaling of the state, x = s(t) (y + sigma(t) eps), run with time. Elementwise."""

    sigma: Callable                                    # t -> sigma
    time: Callable                                     # sigma -> t
    sigma_dot: Callable                                # t -> d sigma / dt; not asked at t = 0
    scale: Callable = torch.ones_like                  # t -> s
    scale_dot: Callable = torch.zeros_like             # t -> ds / dt


def vp_sigma(t, beta_d=19.9, beta_min=0.1):
    """sigma(t) of the VP SDE with beta(t) = beta_min + beta_d t, t in [0, 1]; Table 1. s^2 is DDPM's abar."""
    return torch.expm1(0.5 * beta_d * t ** 2 + beta_min * t).sqrt()


def vp_time(sigma, beta_d=19.9, beta_min=0.1):
    """The inverse of `vp_sigma`; Table 1, "time steps" and c_noise of the VP column."""
    return ((beta_min ** 2 + 2 * beta_d * torch.log1p(sigma ** 2)).sqrt() - beta_min) / beta_d


SCHEDULES = {
    "edm": Schedule(sigma=lambda t: t, time=lambda sigma: sigma, sigma_dot=torch.ones_like),
    "ve": Schedule(sigma=torch.sqrt, time=torch.square, sigma_dot=lambda t: 0.5 / t.sqrt()),
    "vp": Schedule(sigma=vp_sigma, time=vp_time,
                   sigma_dot=lambda t: 0.5 * (0.1 + 19.9 * t) * (vp_sigma(t) + 1 / vp_sigma(t)),
                   scale=lambda t: (1 + vp_sigma(t) ** 2).rsqrt(),
                   scale_dot=lambda t: -0.5 * (0.1 + 19.9 * t) * (1 + vp_sigma(t) ** 2).rsqrt()),
}


def iddpm_ladder(M=1000, C_1=0.001, C_2=0.008):
    """u_0, ..., u_{M-1} of Table 1: the noise levels of the cosine schedule, beta at most 1 - C_1. Falling."""
    abar = torch.sin(math.pi / 2 * torch.arange(M + 1, dtype=torch.float64) / M / (C_2 + 1)) ** 2
    ratio = (abar[:-1] / abar[1:]).clamp(min=C_1)                           # of step j - 1 to j
    return (1 / ratio.flip(0).cumprod(0).flip(0) - 1).sqrt()                # u_j^2 + 1 is the product from j on


def noise_levels(name, steps, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """N = `steps` falling noise levels, then 0: (N + 1,) float64. Table 1, "time steps", as levels of noise.

    edm    sigma^(1/rho) in a straight line, Eq. (5)
    vp     evenly spaced in the time of the VP schedule: DDPM's and DDIM's
    ve     a geometric series
    iddpm  evenly spaced places of the cosine schedule's ladder of 1000 levels, from the one nearest to sigma_max
           (80.2) to the one nearest to sigma_min (0.0064)
    Differs from the paper: all run between the same ends, so that they start from the same x.
    """
    if name not in LEVELS:
        raise ValueError(f"levels={name!r} is none of {', '.join(LEVELS)}")
    if steps < 2:
        raise ValueError(f"steps={steps} must be at least 2")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"sigma_min={sigma_min} and sigma_max={sigma_max} must be positive and rise")
    way = torch.linspace(0, 1, steps, dtype=torch.float64)                  # i / (N - 1)
    high, low = (torch.tensor(end, dtype=torch.float64) for end in (sigma_max, sigma_min))
    if name == "edm":
        sigma = (high ** (1 / rho) + way * (low ** (1 / rho) - high ** (1 / rho))) ** rho          # Eq. (5)
    elif name == "vp":
        sigma = vp_sigma(vp_time(high) + way * (vp_time(low) - vp_time(high)))
    elif name == "ve":
        sigma = high * (low / high) ** way
    else:
        ladder = iddpm_ladder()
        first, last = ((ladder / end).log().abs().argmin() for end in (high, low))
        if steps > last - first + 1:
            raise ValueError(f"steps={steps}: there are {last - first + 1} levels from {sigma_max} to {sigma_min}")
        sigma = ladder[(first + way * (last - first) + 0.5).floor().long()]
    return torch.cat([sigma, sigma.new_zeros(1)])                           # sigma_N = 0


# ------------------------------------------------------------------ sampling: Sections 3, 4
def ode_sampler(denoise, noise, sigmas, schedule="edm", solver="heun"):
    """Algorithm 1: the probability flow ODE with Heun's or Euler's method. Any schedule on any noise levels.

    denoise  D(x, sigma); noise (B, C, H, W) of variance 1; sigmas (N + 1,), the last one 0
    Yields (sigma_i, x / s, D) after every step. The state is float64: the sum of many small steps keeps its digits.
    Network calls: N with "euler", 2 N - 1 with "heun". Euler with schedule "edm" is DDIM.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is none of {', '.join(SCHEDULES)}")
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} is none of {', '.join(SOLVERS)}")
    plan = SCHEDULES[schedule]
    times = plan.time(sigmas.to(noise.device))                              # t_i with sigma(t_i) = sigma_i

    def slope(x, t):
        sigma, s = plan.sigma(t), plan.scale(t)
        clean = denoise(x / s, sigma)
        growth = plan.sigma_dot(t) / sigma
        return (growth + plan.scale_dot(t) / s) * x - growth * s * clean, clean                    # dx/dt

    x = noise.double() * plan.sigma(times[0]) * plan.scale(times[0])        # Alg. 1: x_0 ~ N(0, s^2 sigma^2)
    for sigma, t, t_next in zip(sigmas, times[:-1], times[1:]):
        d, clean = slope(x, t)
        x_next = x + (t_next - t) * d                                       # Euler step
        if solver == "heun" and plan.sigma(t_next) > 0:                     # at sigma = 0 there is no slope
            d_next, _ = slope(x_next, t_next)
            x_next = x + (t_next - t) * (d + d_next) / 2                    # the trapezoidal rule
        x = x_next
        yield sigma, x / plan.scale(t_next), clean


def stochastic_sampler(denoise, noise, sigmas, churn, s_min=0.05, s_max=50.0, s_noise=1.003, generator=None):
    """Algorithm 2: before each Heun step noise is added, up to sigma-hat. For sigma(t) = t, s(t) = 1.

    churn, s_min, s_max, s_noise: S_churn, S_tmin, S_tmax, S_noise. Yields (sigma_i, x, D) after every step.
    """
    if churn < 0:
        raise ValueError(f"churn={churn} must not be negative")
    steps = len(sigmas) - 1
    x = noise.double() * sigmas[0].to(noise.device)
    for sigma, sigma_next in zip(sigmas.to(noise.device)[:-1], sigmas.to(noise.device)[1:]):
        gamma = min(churn / steps, math.sqrt(2) - 1) if s_min <= sigma <= s_max else 0.0
        sigma_hat = sigma * (1 + gamma)
        x_hat = x
        if gamma:
            x_hat = x + (sigma_hat ** 2 - sigma ** 2).sqrt() * s_noise * noise_like(x, generator)
        clean = denoise(x_hat, sigma_hat)
        d = (x_hat - clean) / sigma_hat
        x = x_hat + (sigma_next - sigma_hat) * d                            # Euler step
        if sigma_next > 0:
            d_next = (x - denoise(x, sigma_next)) / sigma_next
            x = x_hat + (sigma_next - sigma_hat) * (d + d_next) / 2         # 2nd order
        yield sigma, x, clean


# ------------------------------------------------------------------ preconditioning and training: Section 5
# Adapted from lesson_07/model.py: SDE -- a denoiser for every noise level instead of the score at every time; loss and
#   preconditioning that suit the level; the ODE apart, solved in steps of our choice
class EDM(nn.Module):
    """The denoiser around a network (Sec. 5, Eq. 7), its training loss, and sampling with it. Holds no weights.

    sigma_data      std of the standardised data, for which c_skip, c_out, c_in are made
    mean, std       of the pixels in [0, 1]
    p_mean, p_std   of ln(sigma) in training (Table 1)
    sigma_min, sigma_max, rho  ends and bend of the sampler's noise levels (Eq. 5)
    """

    def __init__(self, sigma_data=0.5, mean=0.1307, std=0.3081, p_mean=-1.2, p_std=1.2, sigma_min=0.002, sigma_max=80.0,
                 rho=7.0):
        super().__init__()
        self.sigma_data, self.mean, self.std, self.p_mean, self.p_std = sigma_data, mean, std, p_mean, p_std
        self.ends = {"sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho}

    def standardise(self, x0):
        """Images in [-1, 1] -> y with mean 0 and, over the training set, std sigma_data, which Sec. 5 asks for."""
        return ((x0 + 1) / 2 - self.mean) / self.std * self.sigma_data

    def to_image(self, y):
        """The inverse of `standardise` (Sec. 5): y -> images in [-1, 1]."""
        return (y / self.sigma_data * self.std + self.mean) * 2 - 1

    def coefficients(self, sigma):
        """c_skip, c_out, c_in, c_noise of Table 1 for noise levels sigma. Each like sigma."""
        total = sigma ** 2 + self.sigma_data ** 2                           # variance of x
        return (self.sigma_data ** 2 / total, sigma * self.sigma_data * total.rsqrt(), total.rsqrt(),
                sigma.log() / 4)

    def denoise(self, net, x, sigma):
        """D(x; sigma), Eq. (7): the mean of the clean image, not clipped. x (B, C, H, W), in its dtype."""
        sigma = sigma.to(x.dtype).expand(len(x))[:, None, None, None]
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)             # (B, 1, 1, 1)
        output = net((c_in * x).float(), c_noise.float().flatten())         # F; its t is c_noise
        return c_skip * x + c_out * output                                  # Eq. (7)

    def draw_sigma(self, n, device=None):
        """The noise levels of a training batch, log-normal (Sec. 5, Table 1). (n,)."""
        return (self.p_mean + self.p_std * torch.randn(n, device=device)).exp()

    def weight(self, sigma):
        """lambda(sigma) of the loss, Table 1: 1 / c_out^2. Like sigma."""
        return self.coefficients(sigma)[1] ** -2

    def loss_at(self, net, y, sigma, eps):
        """lambda |D(y + sigma eps) - y|^2 of Eq. (2) and Sec. 5, the mean over the pixels of each image. (B,)."""
        error = self.denoise(net, y + sigma[:, None, None, None] * eps, sigma) - y
        return self.weight(sigma) * error.square().flatten(1).mean(1)

    def loss(self, net, x0):
        """One draw of the training loss, Sec. 5. x0 (B, C, H, W) in [-1, 1] -> scalar."""
        return self.loss_at(net, self.standardise(x0), self.draw_sigma(len(x0), x0.device), torch.randn_like(x0)).mean()

    def levels(self, steps, name="edm"):
        """The noise levels of `noise_levels` (Eq. 5, Table 1) between this process's ends. (N + 1,)."""
        return noise_levels(name, steps, **self.ends)

    @torch.no_grad()
    def reverse(self, net, noise, sigmas, schedule="edm", solver="heun", churn=0.0, generator=None, **limits):
        """Algorithm 1, or with churn Algorithm 2. Yields (sigma, image, denoised image) after every step.

        Algorithm 2 is Heun's method for the schedule "edm": with churn, any other is refused.
        """
        denoise = lambda x, sigma: self.denoise(net, x, sigma)
        if churn:
            if (schedule, solver) != ("edm", "heun"):
                raise ValueError(f"churn={churn} is Algorithm 2, which needs schedule=edm solver=heun, "
                                 f"not schedule={schedule} solver={solver}")
            path = stochastic_sampler(denoise, noise, sigmas, churn, generator=generator, **limits)
        else:
            path = ode_sampler(denoise, noise, sigmas, schedule, solver)
        for sigma, x, clean in path:
            yield sigma, self.to_image(x).float(), self.to_image(clean).float()

    def sample(self, net, noise, sigmas, **how):
        """Images in about [-1, 1] from standard Gaussian noise, (B, C, H, W), by `reverse` (Alg. 1 or 2)."""
        for _, x, _ in self.reverse(net, noise, sigmas, **how):
            pass
        return x
