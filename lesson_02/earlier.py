"""What lesson 02 takes from earlier lessons, word for word.

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
class Diffusion(nn.Module):
    """The noising of data, the three targets, the loss, and the walk back (DDPM, Sec. 2). Holds no weights.

    timesteps       T
    beta_1, beta_T  variance of the noise that the first and the last step add; in between a straight line
    predict         what the network outputs: "x0" (the clean data), "noise" (eps) or "score"
    """

    def __init__(self, timesteps=1000, beta_1=1e-4, beta_T=0.02, predict="x0"):
        super().__init__()
        if predict not in ("x0", "noise", "score"):
            raise ValueError(f"{predict!r} is none of x0, noise, score")
        if timesteps < 2:
            raise ValueError(f"timesteps={timesteps} must be at least 2")
        self.timesteps, self.predict = timesteps, predict
        beta = torch.linspace(beta_1, beta_T, timesteps, dtype=torch.float64)
        abar = torch.cumprod(1 - beta, dim=0)               # in float32 a thousand factors would lose digits
        self.register_buffer("abar", torch.cat([abar, abar.new_ones(1)]), persistent=False)        # abar[-1] = 1

    # ------------------------------------------------------------------ forward: data to noise
    def beta(self, t, s):
        """The variance that the steps from s to t add: beta_t for s = t - 1 (DDPM, Eq. (2)). (B,) float64."""
        return 1 - self.abar[t] / self.abar[s]

    def q_step(self, x, t, eps):
        """x_t ~ q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I): one step of noise (DDPM, Eq. (2)). (B, ...).

        The data shrink a little and get a little noise, so that a variance of 1 stays 1.
        """
        beta = self.beta(t, t - 1)
        return wide((1 - beta).sqrt(), x) * x + wide(beta.sqrt(), x) * eps

    def q_sample(self, x0, t, eps):
        """x_t ~ q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I) (DDPM, Eq. (4)), all the steps in one jump.

        x0 (B, ...), and eps standard Gaussian noise of that shape -> (B, ...).
        """
        return wide(self.abar[t].sqrt(), x0) * x0 + wide((1 - self.abar[t]).sqrt(), x0) * eps

    # ------------------------------------------------------------------ one guess, three names
    def x0_from_eps(self, eps, xt, t):
        """The clean data, if this was the noise: the jump to x_t solved for x_0 (DDPM, Eq. (15)). (B, ...)."""
        return (xt - wide((1 - self.abar[t]).sqrt(), xt) * eps) / wide(self.abar[t].sqrt(), xt)

    def eps_from_x0(self, x0, xt, t):
        """The noise, if this was the clean data: the jump to x_t (DDPM, Eq. (4)) solved for eps. (B, ...)."""
        return (xt - wide(self.abar[t].sqrt(), xt) * x0) / wide((1 - self.abar[t]).sqrt(), xt)

    def score_from_x0(self, x0, xt, t):
        """Tweedie's formula (EDM, Eq. (3), there without the shrinking): the score of x_t. (B, ...).

        With x_0 = E[x_0 | x_t] it is the gradient of log q_t at x_t: the direction in which q_t rises.
        """
        return (wide(self.abar[t].sqrt(), xt) * x0 - xt) / wide(1 - self.abar[t], xt)

    def x0_from_score(self, score, xt, t):
        """Tweedie's formula (EDM, Eq. (3)) solved for E[x_0 | x_t]. (B, ...)."""
        return (xt + wide(1 - self.abar[t], xt) * score) / wide(self.abar[t].sqrt(), xt)

    def predict_x0(self, net, xt, t):
        """The clean data that the network's output stands for (DDPM, Sec. 3.2, names the choices). (B, ...)."""
        output = net(xt, t)
        if self.predict == "noise":
            return self.x0_from_eps(output, xt, t)
        return self.x0_from_score(output, xt, t) if self.predict == "score" else output

    # ------------------------------------------------------------------ learning
    def loss(self, net, x0):
        """Noise a batch, each element to a time of its own, and ask for what was lost (DDPM, Alg. 1). x0 -> scalar.

        The least squared error is reached by the conditional mean, whichever of the three is asked for. With "noise"
        this is DDPM, Eq. (14).
        """
        t = torch.randint(self.timesteps, (len(x0),), device=x0.device)
        eps = torch.randn_like(x0)
        output = net(self.q_sample(x0, t, eps), t)
        if self.predict == "score":                         # its target is -eps / sqrt(1 - abar_t): 100 eps at t = 0,
            return F.mse_loss(wide((1 - self.abar[t]).sqrt(), x0) * output, -eps)       # so both sides are scaled
        return F.mse_loss(output, eps if self.predict == "noise" else x0)

    # ------------------------------------------------------------------ reverse: noise to data
    def q_posterior(self, x0, xt, t, s):
        """The mean of q(x_s | x_t, x_0), a point between x_t and x_0 (DDPM, Eq. (7), for s = t - 1). (B, ...)."""
        a = self.abar[s].sqrt() * self.beta(t, s) / (1 - self.abar[t])
        b = (1 - self.beta(t, s)).sqrt() * (1 - self.abar[s]) / (1 - self.abar[t])
        return wide(a, xt) * x0 + wide(b, xt) * xt

    def beta_tilde(self, t, s):
        """The variance of q(x_s | x_t, x_0) (DDPM, Eq. (7)): 0 at s = -1, the last step adds no noise. (B,) float64."""
        return (1 - self.abar[s]) / (1 - self.abar[t]) * self.beta(t, s)

    @torch.no_grad()
    def reverse(self, net, xT, steps=100, generator=None):
        """Walk from noise to data. Yields (t, x_s, x_0 estimate) after every step; the last x_s is the sample.

        Each step takes the network's guess for x_0 and draws x_s from q(x_s | x_t, x_0): DDPM, Alg. 2, with the
        variance of DDPM, Eq. (7).
        steps: how many of the T times to visit, evenly spaced, both ends included; DDPM visits all.
        """
        if not 1 < steps <= self.timesteps:
            raise ValueError(f"steps={steps} must be between 2 and {self.timesteps}")
        times = torch.linspace(self.timesteps - 1, 0, steps).round().long().tolist() + [-1]
        x = xT
        for now, then in zip(times[:-1], times[1:]):
            t, s = (torch.full((len(x),), i, device=x.device) for i in (now, then))
            x0 = self.predict_x0(net, x, t)
            noise = wide(self.beta_tilde(t, s).sqrt(), x) * noise_like(x, generator)
            x = self.q_posterior(x0, x, t, s) + noise
            yield now, x, x0

    def sample(self, net, n, steps=100, shape=(2,), generator=None):
        """n samples, (n, *shape): start from pure noise and walk back (DDPM, Alg. 2)."""
        xT = noise_like(torch.empty(n, *shape, device=self.abar.device), generator)
        for _, x, _ in self.reverse(net, xT, steps, generator):
            pass
        return x


# lesson_01/model.py
def swiss_roll(n, generator=None, width=0.04):
    """Points on a spiral of one and a half turns, with a little noise across it, as in DPM, Fig. 1. (n, 2)."""
    angle = math.pi * (1.5 + 3 * torch.rand(n, generator=generator))
    spiral = torch.stack([angle.cos(), angle.sin()], dim=1) * angle[:, None] / (4.5 * math.pi)
    return 1.8 * spiral + width * noise_like(spiral, generator)


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
