"""What lesson 23 takes from earlier lessons, word for word.

Written by `python -m tools.lineage sync` from the import lines of model.py. Do not edit it: change a definition
where it stands, in the file named above it, and run the command again.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


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


# lesson_05/model.py
def image(values):
    """The scalars of Eq. (4), one for each image, to multiply images with: (B,) -> (B, 1, 1, 1) float32."""
    return values.float()[:, None, None, None]


# lesson_05/model.py
def discretized_log_likelihood(x0, mean, sigma):
    """log p(x_0 | x_1), Eq. (13): nats of N(mean, sigma^2) in the bin of x_0, 2/255 wide, the outer ones open."""
    x0, mean, sigma = x0.double(), mean.double(), sigma.double()
    upper = torch.where(x0 > 0.999, torch.inf, (x0 + 1 / 255 - mean) / sigma)
    lower = torch.where(x0 < -0.999, -torch.inf, (x0 - 1 / 255 - mean) / sigma)
    # Phi(u) - Phi(l) = Phi(-l) - Phi(-u): on the side where both are small, their logarithms keep the digits.
    flip = lower > 0
    upper, lower = torch.where(flip, -lower, upper), torch.where(flip, -upper, lower)
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return (log_upper + torch.log1p(-torch.exp(log_lower - log_upper))).float()


# lesson_05/model.py
# Adapted from lesson_02/model.py: DPM -- a network of the noise, a plain squared error, a fixed covariance, grey levels
class DDPM(nn.Module):
    """The process of Sec. 2 and 3: forward, reverse, loss, bound. Holds the schedule and no weights.

    timesteps: T. beta_1, beta_T: ends of the schedule (Sec. 4). variance: "large" (beta_t) or "small" (beta-tilde_t).
    """
    def __init__(self, timesteps=1000, beta_1=1e-4, beta_T=0.02, variance="small"):
        super().__init__()
        if variance not in ("large", "small") or timesteps < 2:
            raise ValueError(f"variance={variance!r} must be large or small, timesteps={timesteps} at least 2")
        self.timesteps, self.variance = timesteps, variance
        beta = torch.linspace(beta_1, beta_T, timesteps, dtype=torch.float64)
        abar = torch.cumprod(1 - beta, dim=0)                               # Sec. 2, before Eq. (4)
        # In float32, 1 - abar_0 = 1e-4 would keep three digits. The entry appended is abar_{-1} = 1: no noise.
        self.register_buffer("abar", torch.cat([abar, abar.new_ones(1)]), persistent=False)        # (T + 1,)

    def q_sample(self, x0, t, eps):
        """x_t ~ q(x_t | x_0) with the given noise, Eq. (4). x0, eps (B, C, H, W) -> (B, C, H, W)."""
        return image(self.abar[t].sqrt()) * x0 + image((1 - self.abar[t]).sqrt()) * eps

    # Copied from lesson_01/model.py: Diffusion.beta
    def beta(self, t, s):
        """The variance that the steps from s to t add, Eq. (2): beta_t for s = t - 1. (B,) float64."""
        return 1 - self.abar[t] / self.abar[s]

    # Copied from lesson_01/model.py: Diffusion.beta_tilde
    def beta_tilde(self, t, s):
        """The variance of q(x_s | x_t, x_0), Eq. (7): 0 at s = -1. (B,) float64."""
        return (1 - self.abar[s]) / (1 - self.abar[t]) * self.beta(t, s)

    def q_posterior(self, x0, xt, t, s):
        """mu-tilde, the mean of q(x_s | x_t, x_0), Eq. (6) and (7) with any s < t instead of t - 1. (B, C, H, W)."""
        a = self.abar[s].sqrt() * self.beta(t, s) / (1 - self.abar[t])
        b = (1 - self.beta(t, s)).sqrt() * (1 - self.abar[s]) / (1 - self.abar[t])
        return image(a) * x0 + image(b) * xt

    def predict_x0(self, net, xt, t):
        """The x_0 that the predicted noise stands for, Eq. (15). (B, C, H, W)."""
        return (xt - image((1 - self.abar[t]).sqrt()) * net(xt, t)) / image(self.abar[t].sqrt())

    def p_mean(self, net, xt, t, s, clip=True):
        """mu_theta of p(x_s | x_t), Eq. (11) for s = t - 1 and without clipping, and the x_0 it aims at.

        Differs from the paper: x_0 is clipped to [-1, 1] first, as in the official code, because an error of the
        network at t = 999 is divided by sqrt(abar) = 0.006 on its way to x_0.
        """
        x0 = self.predict_x0(net, xt, t)
        x0 = x0.clamp(-1, 1) if clip else x0
        return self.q_posterior(x0, xt, t, s), x0

    def reverse_variance(self, t, s):
        """sigma_t^2 of p(x_s | x_t), Sec. 3.2: beta or beta-tilde. (B,) float64.

        At t = 0 Eq. (13) needs a width, but beta-tilde is 0: that of the next step, as in the official code.
        """
        variance = self.beta(t, s) if self.variance == "large" else self.beta_tilde(t, s)
        return torch.where(t == 0, self.beta_tilde(torch.ones_like(t), torch.zeros_like(t)), variance)

    def loss(self, net, x0):
        """One draw of L_simple, Eq. (14): Algorithm 1, lines 2 to 5. x0 (B, C, H, W) -> scalar."""
        t = torch.randint(self.timesteps, (len(x0),), device=x0.device)     # Alg. 1, line 3
        eps = torch.randn_like(x0)                                          # Alg. 1, line 4
        return F.mse_loss(net(self.q_sample(x0, t, eps), t), eps)           # Alg. 1, line 5

    @torch.no_grad()
    def reverse(self, net, x, steps=None, clip=True, generator=None):
        """Algorithm 2 from x = x_T on. Yields (t, x_s, x_0 estimate) after every step; the last x_s is the sample.

        Differs from Algorithm 2 where `steps` is given: of the T times it visits so many, evenly spaced, ends
        included. A jump from t to s uses Eq. (7) with abar_s instead of abar_{t-1}.
        """
        steps = self.timesteps if steps is None else steps
        if not 1 < steps <= self.timesteps:
            raise ValueError(f"steps={steps} must be between 2 and {self.timesteps}")
        times = torch.linspace(self.timesteps - 1, 0, steps).round().long().tolist() + [-1]
        for t, s in zip(times[:-1], times[1:]):                             # Alg. 2, line 2
            t_, s_ = (torch.full((len(x),), i, device=x.device) for i in (t, s))
            mean, x0 = self.p_mean(net, x, t_, s_, clip)
            sigma = image(self.reverse_variance(t_, s_).sqrt())
            x = mean + sigma * noise_like(x, generator) if s >= 0 else mean  # Alg. 2, lines 3 and 4
            yield t, x, x0

    def sample(self, net, n, steps=None, shape=(1, 28, 28), clip=True, generator=None):
        """n images drawn with Algorithm 2 (see `reverse` for `steps`), (n, C, H, W) in about [-1, 1]."""
        xT = noise_like(torch.empty(n, *shape, device=self.abar.device), generator)                # Alg. 2, line 1
        for _, x, _ in self.reverse(net, xT, steps, clip, generator):
            pass
        return x

    def bound_term(self, x0, xt, t, mean):
        """L_{t-1} of Eq. (5), or L_0 where t = 0, for a reverse step with this mean. (B,) bits per dimension."""
        variance = self.reverse_variance(t, t - 1)
        ratio = image(self.beta_tilde(t, t - 1) / variance)                 # 0 at t = 0, where it is not used
        error = (self.q_posterior(x0, xt, t, t - 1) - mean) ** 2
        kl = 0.5 * (ratio - 1 - ratio.clamp(min=1e-20).log() + error / image(variance))            # of two Gaussians
        nll = -discretized_log_likelihood(x0, mean, image(variance.sqrt()))
        return torch.where(image(t) == 0, nll, kl).flatten(1).mean(1) / math.log(2)

    def prior_term(self, x0):
        """L_T of Eq. (5): the divergence of q(x_T | x_0) from a unit Gaussian. (B,) bits per dimension."""
        abar = self.abar[-2]
        return 0.5 * (abar * x0 ** 2 - abar - torch.log1p(-abar)).flatten(1).mean(1) / math.log(2)

    @torch.no_grad()
    def bound(self, net, x0, generator=None):
        """The whole of Eq. (5), every t once: prior (B,) and terms (B, T), L_0 first, whose sum is the bits/dim.

        The third is what Sec. 4.3 plots: the RMSE (B, T) of the x_0 estimated from x_t, on the scale 0..255.
        """
        terms, errors = [], []
        for i in range(self.timesteps):
            t = torch.full((len(x0),), i, device=x0.device)
            xt = self.q_sample(x0, t, noise_like(x0, generator))
            mean, x0_hat = self.p_mean(net, xt, t, t - 1)
            terms.append(self.bound_term(x0, xt, t, mean))
            errors.append(127.5 * (x0_hat - x0).flatten(1).square().mean(1).sqrt())
        return self.prior_term(x0), torch.stack(terms, 1), torch.stack(errors, 1)


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


# lesson_09/model.py
def betas(schedule, timesteps):
    """The variance that each step adds, at most 0.999: Eq. (17), or lesson 05's line (Sec. 3.2). (T,) float64."""
    if schedule == "linear":                   # scaled, so that every T ends at about the same abar
        return (1000 / timesteps * torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64)).clamp(max=0.999)
    share = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps    # t / T as the paper counts, from 0 to 1
    abar = torch.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2            # f of Eq. (17)
    return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)                      # f(0) cancels


# lesson_09/model.py
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
