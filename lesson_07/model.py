"""Score SDE: Score-Based Generative Modeling through Stochastic Differential Equations (Song et al. 2020, 2011.13456).

Convention: x_t = m(t) x_0 + std(t) z with a real t from data (0) to noise (1); `marginal` gives m and std. The network
is fed 999 t, so that lesson 05's embedding tells times apart, and predicts z: the score is -network / std.
Batches x are (B, ...), images (B, C, H, W) in [-1, 1); t and s are (B,) in the precision of x, s earlier than t.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torchdiffeq import odeint

EPS = 1e-5                                             # the smallest time of training and likelihood


# ------------------------------------------------------------------ the process
# Adapted from lesson_05/model.py: DDPM -- an SDE in the place of the T steps, the score in the place of the posterior;
#   predictors, corrector, ODE and likelihood
class SDE(nn.Module):
    """dx = f(x, t) dt + g(t) dw (Eq. 5) with f = a(t) x, and all that follows from it. Holds no weights.

    A subclass adds `marginal` (m and std of q(x_t | x_0)), `coefficients` (a and g), and the chain that it came from.
    """
    sampling_eps, ancestral = 1e-3, None               # the time where sampling stops; a predictor, if there is one

    def __init__(self, beta_min=0.1, beta_max=20.0, sigma_min=0.01, sigma_max=34.0, log_share=0.0):
        super().__init__()
        if not (0 < beta_min <= beta_max and 0 < sigma_min < sigma_max and 0 <= log_share <= 1):
            raise ValueError(f"beta_min={beta_min} must be above 0 and not above beta_max={beta_max}, sigma_min="
                             f"{sigma_min} above 0 and below sigma_max={sigma_max}, log_share={log_share} in [0, 1]")
        self.beta_min, self.beta_max, self.log_share = beta_min, beta_max, log_share
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.prior_std = sigma_max if isinstance(self, VE) else 1.0

    # ------------------------------------------------------------------ noising, score, loss
    def q_sample(self, x0, t, z):
        """x_t ~ q(x_t | x_0) with the given noise. x0, z (B, ...) -> (B, ...)."""
        m, std = self.marginal(t)
        return wide(m, x0) * x0 + wide(std, x0) * z

    def score(self, net, x, t):
        """s_theta(x, t), the estimate of the gradient of log q_t(x): the network's noise over -std. (B, ...)."""
        return -net(x, 999 * t) / wide(self.marginal(t)[1], x)

    def denoised(self, x, score, t):
        """E[x_0 | x_t] by Tweedie's formula, if this is the score. (B, ...)."""
        m, std = self.marginal(t)
        return (x + wide(std ** 2, x) * score) / wide(m, x)

    def loss(self, net, x0, t=None):
        """One draw of Eq. (7) with the weight std^2, at random times or at these (B,). x0 (B, ...) -> scalar."""
        # Differs from the paper, where all t are uniform: a share of them is log-uniform, because a short run would see
        # too little of t < 1e-3, where the likelihood is decided.
        u, coin = torch.rand(2, len(x0), device=x0.device)
        t = torch.where(coin < self.log_share, EPS ** u, EPS + (1 - EPS) * u) if t is None else t
        z = torch.randn_like(x0)
        score = self.score(net, self.q_sample(x0, t, z), t)                 # grad log q(x_t | x_0) is -z / std
        return (wide(self.marginal(t)[1], x0) * score + z).square().mean()

    # ------------------------------------------------------------------ predictors: a step of the reverse SDE, Eq. (6)
    def euler(self, x, t, s):
        """x_t = x_s + f_i(x_s) + G_i z by Euler's method: f_i (B, ...) and G_i (B,)."""
        a, g = self.coefficients(t)
        return wide(a * (t - s), x) * x, g * (t - s).sqrt()

    discretize = euler                                 # the same by the chain that the SDE came from, if there was one

    def reverse_diffusion(self, x, score, t, s, chain=None):
        """From t to s, discretised as the forward chain is: the mean (B, ...), the deviation of the noise (B,)."""
        f, G = (chain or self.discretize)(x, t, s)
        return x - f + wide(G ** 2, x) * score, G

    def euler_maruyama(self, x, score, t, s):
        """The same by Euler's method: dx = (f - g^2 s) dt + g dw."""
        return self.reverse_diffusion(x, score, t, s, self.euler)

    def alpha(self, t, s):
        """A factor of the corrector's step size. (B,)."""
        return torch.ones_like(t)

    def langevin(self, x, score, t, s, snr, z):
        """The corrector, Algorithms 4 and 5: a Langevin step at s. Norms are means over the batch, as in the code."""
        z_norm, score_norm = (one.flatten(1).norm(dim=1).mean() for one in (z, score))
        step = 2 * self.alpha(t, s) * (snr * z_norm / score_norm) ** 2
        return x + wide(step, x) * score + wide((2 * step).sqrt(), x) * z

    @torch.no_grad()
    def reverse(self, net, x, steps=1000, predictor="reverse_diffusion", corrections=0, snr=0.16, generator=None):
        """Algorithm 1 from x_1 = x. Yields (t, x_s, x_0 estimate) after every step; the last x_s is the sample.

        The times go evenly from 1 to sampling_eps, where Tweedie's formula, without noise, ends it. Corrections follow
        a prediction, at the time it arrived at, as in the paper; the official code corrects first. Predictor none: they
        are alone. Network calls: (steps - 1) (predictions + corrections) + 1.
        """
        if predictor not in PREDICTORS or predictor != "none" and getattr(self, predictor) is None:
            raise ValueError(f"predictor={predictor}: {type(self).__name__} has no such one of {', '.join(PREDICTORS)}")
        if steps < 2 or corrections < (predictor == "none") or snr <= 0:
            raise ValueError(f"steps={steps} must be at least 2, snr={snr} above 0, and with predictor={predictor} "
                             f"corrections={corrections} at least {int(predictor == 'none')}")
        times = torch.linspace(1, self.sampling_eps, steps, dtype=torch.float64).tolist()
        for now, then in zip(times, times[1:]):
            t, s = (torch.full((len(x),), time, dtype=x.dtype, device=x.device) for time in (now, then))
            if predictor != "none":
                score = self.score(net, x, t)
                mean, std = getattr(self, predictor)(x, score, t, s)
                x0, z = self.denoised(x, score, t), torch.randn(x.shape, generator=generator).to(x)
                x = mean + wide(std, x) * z
            for _ in range(corrections):
                score = self.score(net, x, s)
                x0 = self.denoised(x, score, s)
                x = self.langevin(x, score, t, s, snr, torch.randn(x.shape, generator=generator).to(x))
            yield now, x, x0
        yield then, *[self.last_step(net, x)] * 2

    @torch.no_grad()
    def last_step(self, net, x):
        """The noise-free mean at the end: E[x_0 | x_t] at sampling_eps. (B, ...)."""
        t = torch.full((len(x),), self.sampling_eps, dtype=x.dtype, device=x.device)
        return self.denoised(x, self.score(net, x, t), t)

    # ------------------------------------------------------------------ the prior, the probability-flow ODE, likelihood
    def prior(self, shape, generator=None):
        """x_1 ~ N(0, prior_std^2 I), on the CPU: a seed gives the same for every device."""
        return self.prior_std * torch.randn(shape, generator=generator)

    def prior_log_prob(self, x):
        """log p_1(x) in nats, (B, ...) -> (B,)."""
        log_p = -0.5 * (x / self.prior_std) ** 2 - math.log(self.prior_std) - 0.5 * math.log(2 * math.pi)
        return log_p.flatten(1).sum(1)

    def ode(self, net, x, t):
        """dx/dt = f - g^2 s / 2: no noise, and the marginals of the SDE (Eq. 13). (B, ...)."""
        a, g = self.coefficients(t)
        return wide(a, x) * x - 0.5 * wide(g ** 2, x) * self.score(net, x, t)

    @torch.no_grad()
    def solve(self, net, x, start, end, rtol=1e-5, atol=1e-5):
        """x carried along the ODE by Dormand and Prince's adaptive method, in float64, never past the end. (B, ...)."""
        def slope(t, state):
            return self.ode(net, state.to(x.dtype), t.clamp(EPS, 1).to(x.dtype).expand(len(x))).double()

        ends = x.new_tensor([start, end], dtype=torch.float64)
        return odeint(slope, x.double(), ends, rtol=rtol, atol=atol, options={"step_t": ends})[-1].to(x.dtype)

    def ode_sample(self, net, x, rtol=1e-5, atol=1e-5):
        """Samples from x_1 = x: the ODE down to sampling_eps, then the last step. (B, ...)."""
        return self.last_step(net, self.solve(net, x, 1.0, self.sampling_eps, rtol, atol))

    def encode(self, net, x, rtol=1e-5, atol=1e-5):
        """The x_1 from which the ODE ends at these data; `solve` from 1 to EPS undoes it. (B, ...)."""
        return self.solve(net, x, EPS, 1.0, rtol, atol)

    @torch.no_grad()
    def log_likelihood(self, net, x, v, rtol=1e-5, atol=1e-5):
        """log p(x) = log p_1(x_1) + the integral of the divergence of `ode` along the way, in nats (B,); and x_1.

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


class VP(SDE):
    """Variance preserving, Eq. (11): f = -beta x / 2 and g^2 = beta, the limit of DDPM's chain."""
    def schedule(self, t):
        """beta(t), a straight line, and log m(t), minus half its integral from 0. Two (B,)."""
        rise = self.beta_max - self.beta_min
        return self.beta_min + t * rise, -0.25 * t ** 2 * rise - 0.5 * t * self.beta_min

    def marginal(self, t):
        """m and std, m^2 + std^2 = 1. Two (B,)."""
        _, log_m = self.schedule(t)
        return log_m.exp(), (-torch.expm1(2 * log_m)).sqrt()                # expm1: std^2 is 1e-6 at EPS

    def coefficients(self, t):
        """a and g. Two (B,)."""
        beta, _ = self.schedule(t)
        return -0.5 * beta, beta.sqrt()

    def step_beta(self, t, s):
        """beta_i of DDPM's step from s to t: beta(t) times its length; a very long one adds 0.999 of all. (B,)."""
        return (self.schedule(t)[0] * (t - s)).clamp(max=0.999)

    def discretize(self, x, t, s):
        """DDPM's chain, Eq. (10): x_t = sqrt(1 - beta_i) x_s + sqrt(beta_i) z."""
        return wide((1 - self.step_beta(t, s)).sqrt() - 1, x) * x, self.step_beta(t, s).sqrt()

    def ancestral(self, x, score, t, s):
        """DDPM's step back with sigma^2 = beta_i, Eq. (4)."""
        beta = self.step_beta(t, s)
        return (x + wide(beta, x) * score) / wide((1 - beta).sqrt(), x), beta.sqrt()

    def alpha(self, t, s):
        """alpha_i = 1 - beta_i, as in the official code. (The paper's text can be read as the product of them.)"""
        return 1 - self.step_beta(t, s)


class SubVP(VP):
    """Sub-VP, Eq. (12): the drift of VP and less noise; its variance stays below that of VP. The limit of no chain."""
    discretize, ancestral, alpha = SDE.euler, None, SDE.alpha      # (Official: asks for a chain's alphas, and stops.)

    def marginal(self, t):
        """m of VP, and VP's std squared. Two (B,)."""
        m, std = super().marginal(t)
        return m, std ** 2

    def coefficients(self, t):
        """a of VP, and g^2 = beta (1 - m^4). Two (B,)."""
        beta, log_m = self.schedule(t)
        return -0.5 * beta, (-beta * torch.expm1(4 * log_m)).sqrt()


class VE(SDE):
    """Variance exploding, Eq. (9): f = 0 and g^2 = d sigma^2 / dt, the limit of the levels of lessons 03 and 04."""
    sampling_eps = EPS

    def marginal(self, t):
        """m = 1, and sigma(t), geometric from sigma_min to sigma_max. Two (B,)."""
        return torch.ones_like(t), self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def coefficients(self, t):
        """a = 0, and g. Two (B,)."""
        return torch.zeros_like(t), self.marginal(t)[1] * math.sqrt(2 * math.log(self.sigma_max / self.sigma_min))

    def score(self, net, x, t):
        """Differs from the paper: x enters as x / sqrt(1 + sigma^2), the size that lesson 05's network knows."""
        size = wide((1 + self.marginal(t)[1] ** 2).sqrt(), x)
        return super().score(lambda x, label: net(x / size, label), x, t)

    def discretize(self, x, t, s):
        """SMLD's chain, Eq. (8): x_t = x_s + sqrt(sigma_t^2 - sigma_s^2) z."""
        return torch.zeros_like(x), (self.marginal(t)[1] ** 2 - self.marginal(s)[1] ** 2).sqrt()

    def ancestral(self, x, score, t, s):
        """The posterior of SMLD's chain, with Tweedie's formula in the place of x_0, Eq. (47)."""
        mean, G = self.reverse_diffusion(x, score, t, s)
        return mean, G * self.marginal(s)[1] / self.marginal(t)[1]


SDES = {"vp": VP, "subvp": SubVP, "ve": VE}
PREDICTORS = "euler_maruyama", "reverse_diffusion", "ancestral", "none"


def make_sde(kind="vp", **numbers):
    """The SDE called vp, subvp or ve."""
    if kind not in SDES:
        raise ValueError(f"kind={kind} is none of {', '.join(SDES)}")
    return SDES[kind](**numbers)


# Adapted from lesson_03/model.py: dequantise -- to [-1, 1), the range of this lesson's data
def dequantise(x0, generator=None):
    """The loader's images in [-1, 1] -> [-1, 1), every grey level spread evenly over its 2/256: a density exists."""
    return ((x0 + 1) * 127.5 + torch.rand(x0.shape, generator=generator).to(x0)) / 128 - 1


def bits_per_dim(log_p, dim):
    """log p in nats of such data -> bits per dimension of grey levels, which are 2/256 = 2^-7 wide. (B,)."""
    return -log_p / (dim * math.log(2)) + 7


# Copied from lesson_01/model.py: wide
def wide(values, x):
    """(B,) -> (B, 1, ...) in the precision of x, to multiply a batch x with."""
    return values.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


# ------------------------------------------------------------------ the network: lesson 05's, where its docstrings are
# Copied from lesson_05/model.py: UNet
class UNet(nn.Module):
    """U-Net over an image and a time; x (B, C, H, W), t (B,) -> (B, C, H, W)."""
    def __init__(self, channels=128, mults=(1, 2, 2), blocks=2, attention=(14,), dropout=0.1, groups=32, patch=1,
                 image_size=28, image_channels=1):
        super().__init__()
        if image_size % (patch * 2 ** (len(mults) - 1)):
            raise ValueError(f"image_size={image_size} cannot be halved {len(mults) - 1} times "
                             f"after patches of {patch}")
        self.channels, self.patch = channels, patch
        width = 4 * channels
        self.time = nn.Sequential(linear(channels, width), nn.SiLU(), linear(width, width))
        size, c = image_size // patch, channels
        self.stem = conv(image_channels * patch ** 2, c)

        def level(c_in, c_out):
            attend = Attention(c_out, groups) if size in attention else nn.Identity()
            return nn.ModuleList([ResBlock(c_in, c_out, width, dropout, groups), attend])
        self.down, skips = nn.ModuleList(), [c]
        for i, mult in enumerate(mults):
            for _ in range(blocks):
                self.down.append(level(c, channels * mult))
                c = channels * mult
                skips.append(c)
            if i < len(mults) - 1:
                self.down.append(Downsample(c))
                skips.append(c)
                size //= 2
        self.middle = nn.ModuleList([ResBlock(c, c, width, dropout, groups), Attention(c, groups),
                                     ResBlock(c, c, width, dropout, groups)])
        self.up = nn.ModuleList()
        for i, mult in reversed(list(enumerate(mults))):
            for _ in range(blocks + 1):
                self.up.append(level(c + skips.pop(), channels * mult))
                c = channels * mult
            if i > 0:
                self.up.append(Upsample(c))
                size *= 2
        self.out = nn.Sequential(norm(c, groups), nn.SiLU(), conv(c, image_channels * patch ** 2, zero=True))
    def forward(self, x, t):
        emb = self.time(time_embedding(t, self.channels))                   # (B, 4 channels)
        x = rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=self.patch, q=self.patch)
        h = self.stem(x)
        skips = [h]
        for layer in self.down:
            h = layer(h) if isinstance(layer, Downsample) else layer[1](layer[0](h, emb))
            skips.append(h)
        first, attend, second = self.middle
        h = second(attend(first(h, emb)), emb)
        for layer in self.up:
            if isinstance(layer, Upsample):
                h = layer(h)
            else:
                h = layer[1](layer[0](torch.cat([h, skips.pop()], dim=1), emb))
        return rearrange(self.out(h), "b (c p q) h w -> b c (h p) (w q)", p=self.patch, q=self.patch)


# Copied from lesson_05/model.py: ResBlock
class ResBlock(nn.Module):
    """GroupNorm, swish, convolution, twice; x (B, c_in, H, W), emb (B, width) -> (B, c_out, H, W)."""
    def __init__(self, c_in, c_out, width, dropout=0.0, groups=32):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in, groups), conv(c_in, c_out)
        self.time = linear(width, c_out)
        self.norm2, self.conv2 = norm(c_out, groups), conv(c_out, c_out, zero=True)
        self.dropout = nn.Dropout(dropout)
        self.skip = conv(c_in, c_out, kernel=1) if c_in != c_out else nn.Identity()
    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(F.silu(emb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.skip(x) + h


# Copied from lesson_05/model.py: Attention
class Attention(nn.Module):
    """Self-attention over the positions. (B, C, H, W) -> (B, C, H, W)."""
    def __init__(self, channels, groups=32):
        super().__init__()
        self.norm = norm(channels, groups)
        self.qkv, self.out = linear(channels, 3 * channels), linear(channels, channels, zero=True)
    def forward(self, x):
        h = rearrange(self.norm(x), "b c h w -> b (h w) c")
        q, k, v = self.qkv(h).chunk(3, dim=2)                               # (B, H W, C) each
        weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(x.shape[1]), dim=2)                # (B, H W, H W)
        return x + rearrange(self.out(weights @ v), "b (h w) c -> b c h w", h=x.shape[2])


# Copied from lesson_05/model.py: Downsample
class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H / 2, W / 2)."""
    def __init__(self, channels):
        super().__init__()
        self.conv = conv(channels, channels, stride=2, padding=0)
    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


# Copied from lesson_05/model.py: Upsample
class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2 H, 2 W)."""
    def __init__(self, channels):
        super().__init__()
        self.conv = conv(channels, channels)
    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


# Copied from lesson_05/model.py: time_embedding
def time_embedding(t, dim):
    """Sines, then cosines, of t at dim / 2 frequencies from 1 down to 1/10000. (B,) -> (B, dim)."""
    frequency = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2 - 1))
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


# Copied from lesson_05/model.py: norm
def norm(channels, groups):
    """GroupNorm with the epsilon of the official code."""
    return nn.GroupNorm(groups, channels, eps=1e-6)


# Copied from lesson_05/model.py: conv
def conv(c_in, c_out, kernel=3, stride=1, padding=None, zero=False):
    """A convolution that keeps the resolution (stride 1)."""
    padding = kernel // 2 if padding is None else padding
    return initialised(nn.Conv2d(c_in, c_out, kernel, stride, padding), zero)


# Copied from lesson_05/model.py: linear
def linear(c_in, c_out, zero=False):
    """A linear layer."""
    return initialised(nn.Linear(c_in, c_out), zero)


# Copied from lesson_05/model.py: initialised
def initialised(layer, zero=False):
    """Uniform with variance 2 / (fan in + fan out), or 0; biases 0."""
    nn.init.zeros_(layer.weight) if zero else nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
