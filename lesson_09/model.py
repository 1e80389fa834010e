"""IDDPM: Improved Denoising Diffusion Probabilistic Models (Nichol, Dhariwal 2021, arXiv 2102.09672).

Convention: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps; t runs from data (0) to noise (T - 1), and the network
receives 1000 t / T. The paper counts t from 1 to T, the code from 0 to T - 1; t = -1 is the clean image. `v` is the
paper's interpolation of the variance (Sec. 3.1), not the velocity of later lessons.
Images are (B, C, H, W) in [-1, 1]; t and s are (B,) int64. A reverse step goes from t to s < t.

The network is lesson 05's with twice the channels at its end, `UNet(c_out=2)`: the noise, then v.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from earlier import noise_like  # lesson 01
from earlier import DDPM, UNet, discretized_log_likelihood, image  # lesson 05


# ------------------------------------------------------------------ what is set before training: Sections 3.2 and 3.3
def betas(schedule, timesteps):
    """The variance that each step adds, at most 0.999: Eq. (17), or lesson 05's line (Sec. 3.2). (T,) float64."""
    if schedule == "linear":                   # scaled, so that every T ends at about the same abar
        return (1000 / timesteps * torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64)).clamp(max=0.999)
    share = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps    # t / T as the paper counts, from 0 to 1
    abar = torch.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2            # f of Eq. (17)
    return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)                      # f(0) cancels


class ImportanceSampler(nn.Module):
    """Draws times with p_t ~ sqrt(E[L_t^2]), Eq. (18), from the last `memory` terms L_t seen at every t (Sec. 3.3).

    Uniform until every t has that many. A share `floor` of p stays uniform: the official code, to forget no time.
    """

    def __init__(self, timesteps, memory=10, floor=1e-3):
        super().__init__()
        self.floor = floor
        self.register_buffer("terms", torch.zeros(timesteps, memory, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(timesteps, dtype=torch.int64))                   # seen so far

    def probabilities(self):
        """p_t of Eq. (18), (T,) float64, sum 1."""
        timesteps, memory = self.terms.shape
        if (self.count < memory).any():
            return torch.full_like(self.terms[:, 0], 1 / timesteps)
        p = self.terms.square().mean(1).sqrt()                              # Eq. (18)
        return (1 - self.floor) * p / p.sum() + self.floor / timesteps

    def draw(self, n):
        """n times (n,) int64 and their weights 1 / (T p_t), (n,): Eq. (18), whose mean is that of uniform times."""
        p = self.probabilities()
        t = torch.multinomial(p, n, replacement=True)
        return t, (1 / (len(p) * p[t])).float()

    def update(self, t, terms):
        """Remember the terms L_t (B,) of these times (B,), as Sec. 3.3 does, and those of other processes, if any."""
        parts = [(t.tolist(), terms.tolist())]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts *= torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, parts[0])
        for i, term in (pair for part in parts for pair in zip(*part)):
            self.terms[i, self.count[i] % self.terms.shape[1]] = term
            self.count[i] += 1


# ------------------------------------------------------------------ the process: Sections 3.1 and 4
class IDDPM(DDPM):
    """Lesson 05's process with a learned variance, the losses that teach it, and fewer steps (Sec. 3 and 4).

    timesteps  T
    schedule   "cosine" (Eq. 17) or "linear" (lesson 05's)
    objective  "simple" (lesson 05's), "hybrid" (Eq. 16) or "vlb" (the variational bound alone)
    variance   of the reverse steps: "learned" (Eq. 15), or fixed: "large" (beta_t) or "small" (beta-tilde_t)
    lam        lambda of Eq. (16), the weight of the whole bound, a sum over T times
    """

    def __init__(self, timesteps=1000, schedule="cosine", objective="hybrid", variance="learned", lam=1e-3):
        super().__init__(timesteps)
        for value, known in ((schedule, ("cosine", "linear")), (objective, ("simple", "hybrid", "vlb")),
                             (variance, ("learned", "large", "small"))):
            if value not in known:
                raise ValueError(f"{value!r} is none of {', '.join(known)}")
        self.objective, self.variance, self.lam = objective, variance, lam
        self.abar[:-1] = torch.cumprod(1 - betas(schedule, timesteps), dim=0)      # the last entry stays 1: no noise

    # ------------------------------------------------------------------ a variance between two bounds: Section 3.1
    def predict(self, net, xt, t):
        """The network's two answers: the noise, and v of Eq. (15), not bounded, at first 1/2. Two (B, C, H, W)."""
        output = net(xt, t * (1000 / self.timesteps))                       # times 0..1000, whatever T is
        if output.shape[1] not in (xt.shape[1], 2 * xt.shape[1]):           # without v only a fixed variance can do
            raise ValueError(f"c_out={output.shape[1]} must be twice the image's channels, {xt.shape[1]}: noise and v")
        return output[:, :xt.shape[1]], (output[:, xt.shape[1]:] + 1) / 2

    def log_beta_tilde(self, t, s):
        """ln beta-tilde, Sec. 3.1; at t = 0, where it is -infinity, that of t = 1: the official code. (B,) float64."""
        one, zero = torch.ones_like(t), torch.zeros_like(t)
        return torch.where(t == 0, self.beta_tilde(one, zero), self.beta_tilde(t, s)).log()

    def log_variance(self, v, t, s):
        """ln sigma^2 of p(x_s | x_t): learned for every pixel, Eq. (15), (B, C, H, W), or fixed, (B, 1, 1, 1)."""
        if self.variance != "learned":
            return image(self.reverse_variance(t, s).log())                 # lesson 05's
        return v * image(self.beta(t, s).log()) + (1 - v) * image(self.log_beta_tilde(t, s))       # Eq. (15)

    def p_mean_variance(self, net, xt, t, s, clip=True):
        """Mean and log-variance of p(x_s | x_t), Sec. 2 and Eq. (15), and the x_0 that the mean aims at."""
        eps, v = self.predict(net, xt, t)
        mean, x0 = self.p_mean(lambda *_: eps, xt, t, s, clip)
        return mean, self.log_variance(v, t, s), x0

    def bound_term(self, x0, xt, t, mean, log_variance):
        """L_t of the bound (Sec. 2), or L_0 where t = 0, for a reverse step of this mean and variance. (B,) bits/dim.

        Unlike lesson 05's, for a variance of every pixel. mean, log_variance (B, C, H, W).
        """
        log_variance, log_true = log_variance.expand_as(mean), image(self.log_beta_tilde(t, t - 1))
        error = (self.q_posterior(x0, xt, t, t - 1) - mean) ** 2
        term = 0.5 * (log_variance - log_true - 1 + (log_true - log_variance).exp() + error * (-log_variance).exp())
        nll = -discretized_log_likelihood(x0, mean, (0.5 * log_variance).exp())
        return torch.where(image(t) == 0, nll, term).flatten(1).mean(1) / math.log(2)

    def loss(self, net, x0, sampler=None):
        """One draw of L_simple, L_hybrid (Eq. 16) or lambda L_vlb; t uniform, or Eq. (18) by an ImportanceSampler."""
        if sampler is not None and self.objective != "vlb":
            raise ValueError(f"importance sampling belongs to objective=vlb, not to {self.objective}")
        if sampler is None:
            t, weight = torch.randint(self.timesteps, (len(x0),), device=x0.device), 1.0
        else:
            t, weight = (part.to(x0.device) for part in sampler.draw(len(x0)))
        eps = torch.randn_like(x0)
        xt = self.q_sample(x0, t, eps)
        guess, v = self.predict(net, xt, t)
        simple = F.mse_loss(guess, eps)                                     # L_simple
        if self.objective == "simple":
            return simple
        if self.objective == "hybrid":
            guess = guess.detach()             # Sec. 3.1: the bound teaches the variance, and leaves the mean alone
        mean, _ = self.p_mean(lambda *_: guess, xt, t, t - 1, clip=False)
        terms = self.bound_term(x0, xt, t, mean, self.log_variance(v, t, t - 1))                   # L_t, (B,)
        if sampler is not None:
            sampler.update(t, terms.detach())
        # L_vlb is a sum over T times: T times the mean of its terms. Without this T it is a thousand times too weak.
        vlb = self.lam * self.timesteps * (weight * terms).mean()
        return simple + vlb if self.objective == "hybrid" else vlb          # Eq. (16)

    @torch.no_grad()
    def bound(self, net, x0, times=None, clip=True, generator=None):
        """L_T (B,) and the terms (B, K) of the bound (Sec. 2) at times (B, K), by default all T.

        bits/dim = L_T + the sum of all terms; `times` allows to estimate that sum from a part of them.
        """
        times = torch.arange(self.timesteps, device=x0.device).expand(len(x0), -1) if times is None else times
        terms = []
        for t in times.unbind(1):
            xt = self.q_sample(x0, t, noise_like(x0, generator))
            mean, log_variance, _ = self.p_mean_variance(net, xt, t, t - 1, clip)
            terms.append(self.bound_term(x0, xt, t, mean, log_variance))
        return self.prior_term(x0), torch.stack(terms, 1)

    # ------------------------------------------------------------------ fewer steps: Section 4
    def times(self, steps=None, skip=0.0):
        """The sub-sequence S of Sec. 4, evenly spaced from T - 1 down to 0; less the first `skip` (Sec. 3.2)."""
        steps = self.timesteps if steps is None else steps
        if not 1 < steps <= self.timesteps:
            raise ValueError(f"steps={steps} must be between 2 and {self.timesteps}")
        if not 0 <= skip < 1:
            raise ValueError(f"skip={skip} must be at least 0 and below 1")
        return torch.linspace(self.timesteps - 1, 0, steps).round().long().tolist()[int(skip * steps + 1e-9):]

    @torch.no_grad()
    def reverse(self, net, x, steps=None, clip=True, generator=None, skip=0.0):
        """From x = x_T along `times`. Yields (t, x_s, x_0 estimate) after every step; the last x_s is the sample.

        A jump is a step of the respaced process, Eq. (19): beta and beta-tilde follow from abar at its two ends. The
        network is told the time of the training (for which the official code keeps a map), not the place in S.
        """
        times = [*self.times(steps, skip), -1]
        for t, s in zip(times[:-1], times[1:]):
            t_, s_ = (torch.full((len(x),), i, device=x.device) for i in (t, s))
            mean, log_variance, x0 = self.p_mean_variance(net, x, t_, s_, clip)
            x = mean + (0.5 * log_variance).exp() * noise_like(x, generator) if s >= 0 else mean
            yield t, x, x0

    def sample(self, net, n, steps=None, shape=(1, 28, 28), clip=True, generator=None, skip=0.0):
        """n images (Sec. 4), see `reverse`; (n, C, H, W) in about [-1, 1]."""
        xT = noise_like(torch.empty(n, *shape, device=self.abar.device), generator)
        for _, x, _ in self.reverse(net, xT, steps, clip, generator, skip):
            pass
        return x
