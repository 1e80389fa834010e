"""Score SDE: Score-Based Generative Modeling through Stochastic Differential Equations (Song et al. 2020, 2011.13456).

Convention: x_t = m(t) x_0 + std(t) z with a real t from data (0) to noise (1); `marginal` gives m and std.
Batches x are (B, ...), images (B, C, H, W) in [-1, 1); t and s are (B,) in the precision of x, s earlier than t.

The network is lesson 05's U-Net, asked as net(x, 999 t): what its `forward` calls t is 999 t, a real number, so that
lesson 05's embedding tells times apart. It predicts z, and the score is -network / std.
"""

import math

import torch
from torch import nn
from torchdiffeq import odeint

# The t of UNet.forward is 999 times the time of this lesson, see SDE.score.
from earlier import UNet  # lesson 05
from earlier import noise_like, wide  # lesson 01

EPS = 1e-5                                             # the smallest time of training and likelihood
PREDICTORS = "euler_maruyama", "reverse_diffusion", "ancestral", "none"


# ------------------------------------------------------------------ three SDEs with a linear drift: Section 3.4
class VP:
    """Variance preserving, Eq. (11): dx = -beta x / 2 dt + sqrt(beta) dw, the limit of DDPM's chain.

    beta_min, beta_max: ends of beta(t), a straight line.
    """
    sampling_eps, prior_std = 1e-3, 1.0                # the time where sampling stops; of x_1

    def __init__(self, beta_min=0.1, beta_max=20.0):
        if not 0 < beta_min <= beta_max:
            raise ValueError(f"beta_min={beta_min} must be above 0 and not above beta_max={beta_max}")
        self.beta_min, self.beta_max = beta_min, beta_max

    def schedule(self, t):
        """beta(t) of Eq. (11), and log m(t), minus half its integral from 0. Two (B,)."""
        rise = self.beta_max - self.beta_min
        return self.beta_min + t * rise, -0.25 * t ** 2 * rise - 0.5 * t * self.beta_min

    def marginal(self, t):
        """m and std of q(x_t | x_0), m^2 + std^2 = 1 (App. B). Two (B,)."""
        _, log_m = self.schedule(t)
        return log_m.exp(), (-torch.expm1(2 * log_m)).sqrt()                # expm1: std^2 is 1e-6 at EPS

    def coefficients(self, t):
        """a and g of Eq. (5) with the drift f = a x. Two (B,)."""
        beta, _ = self.schedule(t)
        return -0.5 * beta, beta.sqrt()

    def step_beta(self, t, s):
        """beta_i of Eq. (10) for the step from s to t: beta(t) times its length; a very long one adds 0.999. (B,)."""
        return (self.schedule(t)[0] * (t - s)).clamp(max=0.999)

    def discretize(self, x, t, s):
        """DDPM's chain, Eq. (10): x_t = x_s + f_i + G_i z = sqrt(1 - beta_i) x_s + sqrt(beta_i) z. f_i, G_i (B,)."""
        return wide((1 - self.step_beta(t, s)).sqrt() - 1, x) * x, self.step_beta(t, s).sqrt()

    def ancestral(self, x, score, t, s):
        """DDPM's step back with sigma^2 = beta_i, Eq. (4): the mean (B, ...), the deviation of the noise (B,)."""
        beta = self.step_beta(t, s)
        return (x + wide(beta, x) * score) / wide((1 - beta).sqrt(), x), beta.sqrt()

    def alpha(self, t, s):
        """alpha_i = 1 - beta_i of Alg. 5, as in the official code. (The text can be read as their product.) (B,)."""
        return 1 - self.step_beta(t, s)

    def network_input(self, x, t):
        """What the network of the score (Eq. (7)) is given for x. (B, ...)."""
        return x


class SubVP(VP):
    """Sub-VP, Eq. (12): the drift of VP and less noise; its variance stays below that of VP. The limit of no chain."""
    discretize = ancestral = alpha = None              # of a chain. (The official code's corrector stops here.)

    def marginal(self, t):
        """m of VP, and VP's std squared (App. B). Two (B,)."""
        m, std = super().marginal(t)
        return m, std ** 2

    def coefficients(self, t):
        """a of VP, and g with g^2 = beta (1 - m^4), Eq. (12). Two (B,)."""
        beta, log_m = self.schedule(t)
        return -0.5 * beta, (-beta * torch.expm1(4 * log_m)).sqrt()


class VE:
    """Variance exploding, Eq. (9): dx = sqrt(d sigma^2 / dt) dw, the limit of the levels of lessons 03 and 04.

    sigma_min, sigma_max: ends of sigma(t), which is geometric.
    """
    sampling_eps, alpha = EPS, None                    # Alg. 4 has no such factor

    def __init__(self, sigma_min=0.01, sigma_max=34.0):
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"sigma_min={sigma_min} must be above 0 and below sigma_max={sigma_max}")
        self.sigma_min, self.sigma_max, self.prior_std = sigma_min, sigma_max, sigma_max

    def marginal(self, t):
        """m = 1, and std = sigma(t), Eq. (9) and App. C. Two (B,)."""
        return torch.ones_like(t), self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def coefficients(self, t):
        """a = 0, and g of Eq. (9). Two (B,)."""
        return torch.zeros_like(t), self.marginal(t)[1] * math.sqrt(2 * math.log(self.sigma_max / self.sigma_min))

    def discretize(self, x, t, s):
        """SMLD's chain, Eq. (8): x_t = x_s + sqrt(sigma_t^2 - sigma_s^2) z. f_i = 0 (B, ...), G_i (B,)."""
        return torch.zeros_like(x), (self.marginal(t)[1] ** 2 - self.marginal(s)[1] ** 2).sqrt()

    def ancestral(self, x, score, t, s):
        """The posterior of SMLD's chain, Eq. (47), with Tweedie's formula for x_0. (B, ...), (B,)."""
        _, G = self.discretize(x, t, s)
        return x + wide(G ** 2, x) * score, G * self.marginal(s)[1] / self.marginal(t)[1]

    def network_input(self, x, t):
        """Differs from the paper: x / sqrt(1 + sigma^2), the size that lesson 05's network knows, for Eq. (7)."""
        return x / wide((1 + self.marginal(t)[1] ** 2).sqrt(), x)


# ------------------------------------------------------------------ what follows from any of them
# Adapted from lesson_05/model.py: DDPM -- an SDE instead of the T steps, the score instead of the posterior;
#   predictors, corrector, ODE and likelihood
class SDE(nn.Module):
    """dx = f(x, t) dt + g(t) dw (Eq. (5)) and all that follows from it. Holds no weights.

    kind        vp, subvp or ve: the class above that says what f, g and q(x_t | x_0) are; the next four are its numbers
    log_share   share of the training times that are log-uniform, see `times`
    """
    def __init__(self, kind="vp", beta_min=0.1, beta_max=20.0, sigma_min=0.01, sigma_max=34.0, log_share=0.0):
        super().__init__()
        if kind not in ("vp", "subvp", "ve") or not 0 <= log_share <= 1:
            raise ValueError(f"kind={kind} must be vp, subvp or ve, and log_share={log_share} in [0, 1]")
        beta, sigma = (beta_min, beta_max), (sigma_min, sigma_max)
        self.noising = VP(*beta) if kind == "vp" else SubVP(*beta) if kind == "subvp" else VE(*sigma)
        self.log_share, self.sampling_eps = log_share, self.noising.sampling_eps

    # ------------------------------------------------------------------ noising, score, loss: Section 3.3
    def q_sample(self, x0, t, z):
        """x_t ~ q(x_t | x_0) of Eq. (7) with the given noise. x0, z (B, ...) -> (B, ...)."""
        m, std = self.noising.marginal(t)
        return wide(m, x0) * x0 + wide(std, x0) * z

    def score(self, net, x, t):
        """s_theta(x, t) of Eq. (7), for the gradient of log q_t(x): the network's noise over -std. (B, ...)."""
        return -net(self.noising.network_input(x, t), 999 * t) / wide(self.noising.marginal(t)[1], x)

    def denoised(self, x, score, t):
        """E[x_0 | x_t] by Tweedie's formula (App. G), if this is the score. (B, ...)."""
        m, std = self.noising.marginal(t)
        return (x + wide(std ** 2, x) * score) / wide(m, x)

    def times(self, n, device=None):
        """Training times of Eq. (7). (n,).

        Differs from the paper, where all t are uniform: a share of them is log-uniform, because a short run would see
        too little of t < 1e-3, where the likelihood is decided.
        """
        u, coin = torch.rand(2, n, device=device)
        return torch.where(coin < self.log_share, EPS ** u, EPS + (1 - EPS) * u)

    def loss(self, net, x0):
        """One draw of Eq. (7) with the weight std^2, which makes it |std s_theta + z|^2. x0 (B, ...) -> scalar."""
        t = self.times(len(x0), x0.device)
        z = torch.randn_like(x0)
        score = self.score(net, self.q_sample(x0, t, z), t)                 # grad log q(x_t | x_0) is -z / std
        return (wide(self.noising.marginal(t)[1], x0) * score + z).square().mean()

    # ------------------------------------------------------------------ a step of the reverse SDE, Eq. (6): Section 4.1
    def euler_maruyama(self, x, score, t, s):
        """From t to s by Euler's method (Sec. 4.1): dx = (f - g^2 s) dt + g dw.

        Returns the mean (B, ...) and the deviation of the noise (B,).
        """
        a, g = self.noising.coefficients(t)
        f, G = wide(a * (t - s), x) * x, g * (t - s).sqrt()
        return x - f + wide(G ** 2, x) * score, G

    def reverse_diffusion(self, x, score, t, s):
        """The same, discretised as the forward chain is (App. E); where there was none, by Euler's method."""
        if self.noising.discretize is None:
            return self.euler_maruyama(x, score, t, s)
        f, G = self.noising.discretize(x, t, s)
        return x - f + wide(G ** 2, x) * score, G

    # ------------------------------------------------------------------ predictor and corrector: Section 4.2
    def langevin(self, x, score, t, s, snr, z):
        """The corrector, Alg. 4 and 5: a Langevin step at s. x, score, z (B, ...), snr the paper's r -> (B, ...).

        Norms are means over the batch, as in the code.
        """
        z_norm, score_norm = (one.flatten(1).norm(dim=1).mean() for one in (z, score))
        alpha = self.noising.alpha(t, s) if self.noising.alpha else torch.ones_like(t)
        step = 2 * alpha * (snr * z_norm / score_norm) ** 2
        return x + wide(step, x) * score + wide((2 * step).sqrt(), x) * z

    @torch.no_grad()
    def reverse(self, net, x, steps=1000, predictor="reverse_diffusion", corrections=0, snr=0.16, generator=None):
        """Alg. 1 from x_1 = x. Yields (t, x_s, x_0 estimate) after every step; the last x_s is the sample.

        The times go evenly from 1 to sampling_eps, where Tweedie's formula, without noise, ends it. Corrections follow
        a prediction, at the time it arrived at, as in the paper; the official code corrects first. Predictor none: they
        are alone. Network calls: (steps - 1) (predictions + corrections) + 1.
        """
        predict = self.noising.ancestral if predictor == "ancestral" else getattr(self, predictor, None)
        if predictor not in PREDICTORS or predictor == "ancestral" and predict is None:
            raise ValueError(f"predictor={predictor}: {type(self.noising).__name__} has no such one of "
                             f"{', '.join(PREDICTORS)}")
        if steps < 2 or corrections < (predictor == "none") or snr <= 0:
            raise ValueError(f"steps={steps} must be at least 2, snr={snr} above 0, and with predictor={predictor} "
                             f"corrections={corrections} at least {int(predictor == 'none')}")
        times = torch.linspace(1, self.sampling_eps, steps, dtype=torch.float64).tolist()
        for now, then in zip(times, times[1:]):
            t, s = (torch.full((len(x),), time, dtype=x.dtype, device=x.device) for time in (now, then))
            if predictor != "none":
                score = self.score(net, x, t)
                mean, std = predict(x, score, t, s)
                x0, z = self.denoised(x, score, t), noise_like(x, generator).to(x)
                x = mean + wide(std, x) * z
            for _ in range(corrections):
                score = self.score(net, x, s)
                x0 = self.denoised(x, score, s)
                x = self.langevin(x, score, t, s, snr, noise_like(x, generator).to(x))
            yield now, x, x0
        yield then, *[self.last_step(net, x)] * 2

    @torch.no_grad()
    def last_step(self, net, x):
        """The noise-free mean at the end: E[x_0 | x_t] at sampling_eps (App. G). (B, ...)."""
        t = torch.full((len(x),), self.sampling_eps, dtype=x.dtype, device=x.device)
        return self.denoised(x, self.score(net, x, t), t)

    # ------------------------------------------------------------------ probability-flow ODE, likelihood: Section 4.3
    def prior(self, shape, generator=None):
        """x_1 ~ N(0, prior_std^2 I) (Sec. 3.1), on the CPU: a seed gives the same for every device."""
        return self.noising.prior_std * noise_like(torch.empty(shape), generator)

    def prior_log_prob(self, x):
        """log p_1(x) in nats (Sec. 4.3), (B, ...) -> (B,)."""
        std = self.noising.prior_std
        return (-0.5 * (x / std) ** 2 - math.log(std) - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)

    def ode(self, net, x, t):
        """dx/dt = f - g^2 s / 2: no noise, and the marginals of the SDE, Eq. (13). (B, ...)."""
        a, g = self.noising.coefficients(t)
        return wide(a, x) * x - 0.5 * wide(g ** 2, x) * self.score(net, x, t)

    @torch.no_grad()
    def solve(self, net, x, start, end, rtol=1e-5, atol=1e-5):
        """x carried along Eq. (13) by Dormand and Prince's adaptive method, in float64, not past the end. (B, ...)."""
        def slope(t, state):
            return self.ode(net, state.to(x.dtype), t.clamp(EPS, 1).to(x.dtype).expand(len(x))).double()

        ends = x.new_tensor([start, end], dtype=torch.float64)
        return odeint(slope, x.double(), ends, rtol=rtol, atol=atol, options={"step_t": ends})[-1].to(x.dtype)

    def ode_sample(self, net, x, rtol=1e-5, atol=1e-5):
        """Samples from x_1 = x (Sec. 4.3): the ODE down to sampling_eps, then the last step. (B, ...)."""
        return self.last_step(net, self.solve(net, x, 1.0, self.sampling_eps, rtol, atol))

    def encode(self, net, x, rtol=1e-5, atol=1e-5):
        """The x_1 from which the ODE ends at these data (Sec. 4.3); `solve` from 1 to EPS undoes it. (B, ...)."""
        return self.solve(net, x, EPS, 1.0, rtol, atol)

    @torch.no_grad()
    def log_likelihood(self, net, x, v, rtol=1e-5, atol=1e-5):
        """log p(x) = log p_1(x_1) + the integral of the divergence of `ode` (Sec. 4.3), in nats (B,); and x_1.

        The divergence is estimated by v^T J v with the probe v (B, ...): each call is a pass forward and one back.
        """
        def slope(t, state):
            with torch.enable_grad():
                here = state[0].to(x.dtype).detach().requires_grad_()
                dx = self.ode(net, here, t.clamp(EPS, 1).to(x.dtype).expand(len(x)))
                vJ, = torch.autograd.grad((dx * v).sum(), here)
            return dx.detach().double(), (vJ * v).flatten(1).sum(1).double()

        state, ends = (x.double(), x.new_zeros(len(x)).double()), x.new_tensor([EPS, 1], dtype=torch.float64)
        x1, divergence = odeint(slope, state, ends, rtol=rtol, atol=atol, options={"step_t": ends})
        return self.prior_log_prob(x1[-1]) + divergence[-1], x1[-1].to(x.dtype)


# ------------------------------------------------------------------ 8-bit images as densities: Section 4.3
# Adapted from lesson_03/model.py: dequantise -- to [-1, 1), the range of this lesson's data
def dequantise(x0, generator=None):
    """Grey levels in [-1, 1] -> [-1, 1), each spread evenly over its 2/256: a density exists (Sec. 4.3). (B, ...)."""
    u = torch.rand_like(x0) if generator is None else torch.rand(x0.shape, generator=generator).to(x0)
    return ((x0 + 1) * 127.5 + u) / 128 - 1


def quantise(x):
    """The grey level in whose 2/256 x lies, back in [-1, 1]: undoes `dequantise` (Sec. 4.3). (B, ...)."""
    return ((x + 1) * 128).floor().clamp(0, 255) / 127.5 - 1


def bits_per_dim(log_p, dim):
    """log p in nats of such data -> bits per dimension of grey levels, which are 2^-7 wide (Sec. 4.3). (B,)."""
    return -log_p / (dim * math.log(2)) + 7
