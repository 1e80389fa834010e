"""DiT: Scalable Diffusion Models with Transformers (Peebles, Xie 2022, arXiv 2212.09748).

Convention: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps; t runs from data (0) to noise (T - 1) and is fed to the
network as that integer. Guidance: eps = eps_u + w (eps_c - eps_u): w = 0 is unconditional, w = 1 plain conditional.
Only the noise is guided; of the two variances the conditional one is taken. The paper works on the latents of an
autoencoder, here on pixels. Images are (B, C, H, W) in [-1, 1]; t and s are (B,) int64, a step goes from t to s < t;
a class c is (B,) int64, `classes` for none. Tokens are (B, N, D), patches in reading order.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


# ------------------------------------------------------------------ the process: Section 3.1 of the paper
# Adapted from lesson_09/model.py: IDDPM -- its linear schedule, its L_hybrid and its learned variance, nothing else
class DDPM(nn.Module):
    """Forward process, loss and sampler with a learned variance; the process does not know of classes. No weights.

    timesteps  T
    lam        weight of the whole bound, a sum over T times, beside the error of the noise
    """

    def __init__(self, timesteps=1000, lam=1e-3):
        super().__init__()
        if timesteps < 2:
            raise ValueError(f"timesteps={timesteps} must be at least 2")
        self.timesteps, self.lam = timesteps, lam
        beta = (1000 / timesteps * torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64)).clamp(max=0.999)
        abar = torch.cumprod(1 - beta, dim=0)
        # The entry appended is abar_{-1} = 1: no noise.
        self.register_buffer("abar", torch.cat([abar, abar.new_ones(1)]), persistent=False)        # (T + 1,)

    # Copied from lesson_05/model.py: DDPM.q_sample
    def q_sample(self, x0, t, eps):
        """x_t ~ q(x_t | x_0) with the given noise, Eq. (4). x0, eps (B, C, H, W) -> (B, C, H, W)."""
        return image(self.abar[t].sqrt()) * x0 + image((1 - self.abar[t]).sqrt()) * eps

    # Copied from lesson_01/model.py: Diffusion.beta
    def beta(self, t, s):
        """The variance that the steps from s to t add: beta_t for s = t - 1. (B,) float64."""
        return 1 - self.abar[t] / self.abar[s]

    # Copied from lesson_01/model.py: Diffusion.beta_tilde
    def beta_tilde(self, t, s):
        """The variance of q(x_s | x_t, x_0): 0 at s = -1, so the last step adds no noise. (B,) float64."""
        return (1 - self.abar[s]) / (1 - self.abar[t]) * self.beta(t, s)

    # Copied from lesson_05/model.py: DDPM.posterior_coefficients
    def posterior_coefficients(self, t, s):
        """mu-tilde = a x_0 + b x_t, Eq. (7) with any s < t in the place of t - 1. Two (B, 1, 1, 1)."""
        a = self.abar[s].sqrt() * self.beta(t, s) / (1 - self.abar[t])
        b = (1 - self.beta(t, s)).sqrt() * (1 - self.abar[s]) / (1 - self.abar[t])
        return image(a), image(b)

    # Copied from lesson_05/model.py: DDPM.q_posterior
    def q_posterior(self, x0, xt, t, s):
        """mu-tilde, the mean of q(x_s | x_t, x_0), Eq. (6) and (7). (B, C, H, W)."""
        a, b = self.posterior_coefficients(t, s)
        return a * x0 + b * xt

    # Adapted from lesson_09/model.py: IDDPM.predict -- t as it is, whatever T
    def predict(self, net, xt, t):
        """The network's two answers: the noise, and the place v of the log-variance, at first 1/2. Two (B, C, H, W)."""
        output = net(xt, t)
        return output[:, :xt.shape[1]], (output[:, xt.shape[1]:] + 1) / 2

    # Copied from lesson_09/model.py: IDDPM.p_mean
    def p_mean(self, eps, xt, t, s, clip=True):
        """mu_theta of p(x_s | x_t) for this noise, and the x_0 it aims at. Clipped: the division enlarges errors."""
        x0 = (xt - image((1 - self.abar[t]).sqrt()) * eps) / image(self.abar[t].sqrt())
        if clip:
            x0 = x0.clamp(-1, 1)
        return self.q_posterior(x0, xt, t, s), x0

    # Adapted from lesson_09/model.py: IDDPM.log_variance -- the learned one only
    def log_variance(self, v, t, s):
        """ln sigma^2 of p(x_s | x_t): that of beta where v = 1, of beta-tilde where v = 0. (B, C, H, W)."""
        return v * image(self.beta(t, s).log()) + (1 - v) * image(self.log_beta_tilde(t, s))

    # Copied from lesson_09/model.py: IDDPM.log_beta_tilde
    def log_beta_tilde(self, t, s):
        """ln beta-tilde; at t = 0, where beta-tilde is 0, that of t = 1, as in the official code. (B,) float64."""
        one, zero = torch.ones_like(t), torch.zeros_like(t)
        return torch.where(t == 0, self.beta_tilde(one, zero), self.beta_tilde(t, s)).log()

    # Copied from lesson_09/model.py: IDDPM.p_mean_variance
    def p_mean_variance(self, net, xt, t, s, clip=True):
        """Mean and log-variance of p(x_s | x_t), and the x_0 that the mean aims at."""
        eps, v = self.predict(net, xt, t)
        mean, x0 = self.p_mean(eps, xt, t, s, clip)
        return mean, self.log_variance(v, t, s), x0

    # Adapted from lesson_09/model.py: IDDPM.loss -- L_hybrid with uniform times only
    def loss(self, net, x0):
        """One draw of the squared error of the noise plus lam times the bound. x0 (B, C, H, W) -> scalar."""
        t = torch.randint(self.timesteps, (len(x0),), device=x0.device)
        eps = torch.randn_like(x0)
        xt = self.q_sample(x0, t, eps)
        guess, v = self.predict(net, xt, t)
        mean, _ = self.p_mean(guess.detach(), xt, t, t - 1, clip=False)     # the bound teaches the variance alone
        terms = self.bound_term(x0, xt, t, mean, self.log_variance(v, t, t - 1))                   # (B,)
        return F.mse_loss(guess, eps) + self.lam * self.timesteps * terms.mean()

    # Copied from lesson_09/model.py: IDDPM.bound_term
    def bound_term(self, x0, xt, t, mean, log_variance):
        """L_t of the bound, or L_0 where t = 0, for a reverse step of this mean and variance. (B,) bits/dim."""
        log_variance, log_true = log_variance.expand_as(mean), image(self.log_beta_tilde(t, t - 1))
        error = (self.q_posterior(x0, xt, t, t - 1) - mean) ** 2
        term = 0.5 * (log_variance - log_true - 1 + (log_true - log_variance).exp() + error * (-log_variance).exp())
        first = t == 0
        term[first] = -discretized_log_likelihood(x0[first], mean[first], (0.5 * log_variance[first]).exp())
        return term.flatten(1).mean(1) / math.log(2)

    # Adapted from lesson_09/model.py: IDDPM.times -- none is skipped
    def times(self, steps=None):
        """`steps` times evenly spaced from T - 1 down to 0, both included (default: all); a list of int."""
        steps = self.timesteps if steps is None else steps
        if not 1 < steps <= self.timesteps:
            raise ValueError(f"steps={steps} must be between 2 and {self.timesteps}")
        return torch.linspace(self.timesteps - 1, 0, steps).round().long().tolist()

    # Adapted from lesson_15/model.py: DDPM.reverse -- the variance is the network's
    @torch.no_grad()
    def reverse(self, net, xT, times, clip=True, generator=None):
        """Yields (t, x_s, x_0 estimate) after every step along `times`; the last x_s is the sample."""
        x = xT
        for t, s in zip(times, [*times[1:], -1]):
            t_, s_ = (torch.full((len(x),), i, device=x.device) for i in (t, s))
            mean, log_variance, x0 = self.p_mean_variance(net, x, t_, s_, clip)
            x = mean + (0.5 * log_variance).exp() * noise_like(x, generator) if s >= 0 else mean
            yield t, x, x0

    # Copied from lesson_15/model.py: DDPM.sample
    def sample(self, net, n, times=None, shape=(1, 28, 28), clip=True, generator=None):
        """n images drawn with Algorithm 2, (n, C, H, W) in about [-1, 1]."""
        xT = noise_like(torch.empty(n, *shape, device=self.abar.device), generator)
        for _, x, _ in self.reverse(net, xT, self.times() if times is None else times, clip, generator):
            pass
        return x


# Copied from lesson_05/model.py: image
def image(values):
    """(B,) -> (B, 1, 1, 1) float32, to multiply images with."""
    return values.float()[:, None, None, None]


# Copied from lesson_05/model.py: noise_like
def noise_like(x, generator=None):
    """Standard Gaussian noise. A CPU generator gives the same noise on every device."""
    if generator is None:
        return torch.randn_like(x)
    return torch.randn(x.shape, generator=generator).to(x.device)


# Copied from lesson_05/model.py: discretized_log_likelihood
def discretized_log_likelihood(x0, mean, sigma):
    """log p(x_0 | x_1), Eq. (13): the mass of N(mean, sigma^2) in the bin of each of the 256 grey levels.

    The bins are 2/255 wide, the first and the last open to the side. Elementwise, in nats; float32 in and out.
    """
    x0, mean, sigma = x0.double(), mean.double(), sigma.double()
    upper = torch.where(x0 > 0.999, torch.inf, (x0 + 1 / 255 - mean) / sigma)
    lower = torch.where(x0 < -0.999, -torch.inf, (x0 - 1 / 255 - mean) / sigma)
    # Phi(u) - Phi(l) = Phi(-l) - Phi(-u): on the side where both are small, their logarithms keep the digits.
    flip = lower > 0
    upper, lower = torch.where(flip, -lower, upper), torch.where(flip, -upper, lower)
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return (log_upper + torch.log1p(-torch.exp(log_lower - log_upper))).float()


# ------------------------------------------------------------------ guidance: Section 3.1
# Copied from lesson_05/sublesson_c/model.py: drop
def drop(c, null, p):
    """Replace each sample's condition by `null` with probability p: a coin for every sample, not one for the batch.

    c (B, ...), null the same shape or one that broadcasts to it -> (B, ...).
    """
    dropped = torch.rand(len(c), device=c.device) < p
    return torch.where(dropped.view(-1, *[1] * (c.dim() - 1)), null, c)


# Copied from lesson_05/sublesson_c/model.py: given
def given(net, c):
    """The network with its condition filled in: eps(x_t, t, c) as the function of x_t and t that DDPM calls."""
    return lambda xt, t: net(xt, t, c)


# Adapted from lesson_05/sublesson_c/model.py: guided -- of the network's two answers the noise alone is guided
def guided(net, c, null, w=1.0):
    """eps = eps_u + w (eps_c - eps_u) with the v of c, a function of x_t and t. All channels of the image are guided.

    One batch of twice the size: it costs two network calls, unless w is 0 (no condition) or 1 (plain conditional).
    c, null (B,): the class and its absence.
    """
    if w in (0, 1):
        return given(net, c if w else null)

    def both(xt, t):
        of_c, of_null = net(torch.cat([xt, xt]), torch.cat([t, t]), torch.cat([c, null])).chunk(2)
        (eps_c, v), (eps_u, _) = of_c.chunk(2, dim=1), of_null.chunk(2, dim=1)
        return torch.cat([eps_u + w * (eps_c - eps_u), v], dim=1)

    return both


# ------------------------------------------------------------------ the network: Section 3.2 of the paper
KINDS = ("adaln-zero", "adaln", "cross-attention", "in-context")


class DiT(nn.Module):
    """A plain transformer over patches of the image.

    dim, depth, heads  width of a token, number of blocks, heads of their attention
    patch              pixels along the side of a patch; a 28 x 28 image is (28 / patch)^2 tokens
    conditioning       how time and class enter the blocks: one of KINDS
    classes            the condition is 0 ... classes - 1, or `classes` for none
    """

    def __init__(self, dim=384, depth=12, heads=6, patch=2, conditioning="adaln-zero", classes=10, image_channels=1):
        super().__init__()
        if conditioning not in KINDS:
            raise ValueError(f"conditioning={conditioning!r} is none of {', '.join(KINDS)}")
        if dim % 4 or dim % heads:
            raise ValueError(f"dim={dim} must be a multiple of 4 (two sines, two cosines) and of heads={heads}")
        self.patch, self.conditioning = patch, conditioning
        self.stem = linear(image_channels * patch ** 2, dim)
        self.time, self.label = TimestepEmbedder(dim), LabelEmbedder(classes, dim)
        self.blocks = nn.ModuleList([Block(dim, heads, conditioning) for _ in range(depth)])
        self.final = FinalLayer(dim, 2 * image_channels * patch ** 2, adaptive=conditioning.startswith("adaln"))

    def forward(self, x, t, c):
        """x (B, C, H, W), t (B,) int, c (B,) int -> the noise and v, (B, 2 C, H, W). H and W may differ."""
        h, w = (side // self.patch for side in x.shape[2:])
        x = self.stem(patchify(x, self.patch))                              # (B, N, D)
        x = x + sincos_2d(x.shape[2], h, w).to(x)
        emb = torch.stack([self.time(t), self.label(c)], dim=1)             # (B, 2, D)
        if self.conditioning == "in-context":
            x = torch.cat([x, emb], dim=1)                                  # two more tokens, like all others
        for block in self.blocks:
            x = block(x, emb)
        return unpatchify(self.final(x[:, :h * w], emb), self.patch, h)


class Block(nn.Module):
    """Attention over the tokens, then an MLP at each; `conditioning` says how time and class come in."""

    def __init__(self, dim, heads, conditioning="adaln-zero"):
        super().__init__()
        self.conditioning = conditioning
        adaptive = conditioning.startswith("adaln")
        self.norm1, self.attention = norm(dim, affine=not adaptive), Attention(dim, heads)
        self.norm2, self.mlp = norm(dim, affine=not adaptive), MLP(dim)
        if conditioning == "adaln-zero":
            self.adaln = nn.Sequential(nn.SiLU(), linear(dim, 6 * dim, zero=True))
        elif conditioning == "adaln":
            self.adaln = nn.Sequential(nn.SiLU(), linear(dim, 4 * dim))
        elif conditioning == "cross-attention":
            self.norm_cross, self.cross = norm(dim, affine=True), Attention(dim, heads)

    def modulation(self, emb):
        """shift, scale and gate of the attention, then of the MLP, each (B, 1, D) or a constant. emb (B, 2, D)."""
        if self.conditioning == "adaln-zero":
            return self.adaln(emb.sum(1, keepdim=True)).chunk(6, dim=2)
        if self.conditioning == "adaln":
            shift1, scale1, shift2, scale2 = self.adaln(emb.sum(1, keepdim=True)).chunk(4, dim=2)
            return shift1, scale1, 1, shift2, scale2, 1
        return 0, 0, 1, 0, 0, 1

    def forward(self, x, emb):
        """x (B, N, D), emb (B, 2, D): the vectors of time and class -> (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(emb)
        x = x + gate1 * self.attention(modulate(self.norm1(x), shift1, scale1))
        if self.conditioning == "cross-attention":
            x = x + self.cross(self.norm_cross(x), emb)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """A last norm, adaptive if the blocks' are, and a linear decoder from a token to its patch. All starts at 0."""

    def __init__(self, dim, out, adaptive=True):
        super().__init__()
        self.norm, self.linear = norm(dim, affine=not adaptive), linear(dim, out, zero=True)
        self.adaln = nn.Sequential(nn.SiLU(), linear(dim, 2 * dim, zero=True)) if adaptive else None

    def forward(self, x, emb):
        """x (B, N, D), emb (B, 2, D) -> (B, N, out)."""
        shift, scale = self.adaln(emb.sum(1, keepdim=True)).chunk(2, dim=2) if self.adaln else (0, 0)
        return self.linear(modulate(self.norm(x), shift, scale))


def modulate(x, shift, scale):
    """x (B, N, D), normalised, scaled by 1 + scale and shifted; both (B, 1, D). A scale of 0 changes nothing."""
    return x * (1 + scale) + shift


class Attention(nn.Module):
    """Attention of several heads: the tokens look at themselves, or at `source`."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = linear(dim, 3 * dim), linear(dim, dim)

    def weights(self, x, source=None):
        """How much each token looks at each, (B, heads, N, M), and the values, (B, heads, M, D / heads)."""
        if source is None:
            q, k, v = self.qkv(x).chunk(3, dim=2)
        else:
            (of_q, of_kv), (bias_q, bias_kv) = (p.tensor_split([x.shape[2]]) for p in self.qkv.parameters())
            q, (k, v) = F.linear(x, of_q, bias_q), F.linear(source, of_kv, bias_kv).chunk(2, dim=2)
        q, k, v = (rearrange(a, "b n (h d) -> b h n d", h=self.heads) for a in (q, k, v))
        return torch.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[3]), dim=3), v

    def forward(self, x, source=None):
        """x (B, N, D), source (B, M, D) -> (B, N, D)."""
        weights, v = self.weights(x, source)
        return self.out(rearrange(weights @ v, "b h n d -> b n (h d)"))


class MLP(nn.Module):
    """Two linear layers with a GELU (its tanh form) between, four times as wide."""

    def __init__(self, dim):
        super().__init__()
        self.into, self.out = linear(dim, 4 * dim), linear(4 * dim, dim)

    def forward(self, x):
        """(..., D) -> (..., D)."""
        return self.out(F.gelu(self.into(x), approximate="tanh"))


class TimestepEmbedder(nn.Module):
    """A vector for a time: sines and cosines, then two layers, started with a deviation of 0.02."""

    def __init__(self, dim, frequencies=256):
        super().__init__()
        self.frequencies = frequencies
        self.into, self.out = linear(frequencies, dim), linear(dim, dim)
        for layer in (self.into, self.out):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, t):
        """(B,) -> (B, D)."""
        return self.out(F.silu(self.into(time_embedding(t, self.frequencies))))


class LabelEmbedder(nn.Module):
    """A learned vector for each class and, in the last row, for none; started with a deviation of 0.02."""

    def __init__(self, classes, dim):
        super().__init__()
        self.table = nn.Embedding(classes + 1, dim)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, c):
        """(B,) int -> (B, D)."""
        return self.table(c)


# Adapted from lesson_05/model.py: time_embedding -- cosines first; the frequencies end just above 1/10000
def time_embedding(t, dim):
    """Cosines, then sines, of t at dim / 2 frequencies from 1 down towards 1/10000. (B,) -> (B, dim)."""
    frequency = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def patchify(x, patch):
    """(B, C, H, W) -> (B, N, C patch^2): one row for each patch. With `stem` a convolution of stride `patch`."""
    if x.shape[2] % patch or x.shape[3] % patch:
        raise ValueError(f"patch={patch} does not divide an image of {x.shape[2]} x {x.shape[3]}")
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)


def unpatchify(x, patch, h):
    """(B, N, patch^2 C) -> (B, C, H, W) for h rows of patches. Channels are the innermost here, the outermost above."""
    return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=h, p=patch, q=patch)


def sincos_2d(dim, h, w):
    """The place of each patch in a grid of h rows and w columns, (h w, dim) float64; fixed, not learned.

    The first half of the channels tells the column, the second the row: dim / 4 sines, then dim / 4 cosines.
    """
    def sincos(place):
        angle = place[:, None] / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
        return torch.cat([angle.sin(), angle.cos()], dim=1)                 # (h w, dim / 2)

    row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return torch.cat([sincos(column.flatten()), sincos(row.flatten())], dim=1)


def norm(dim, affine):
    """LayerNorm over the channels of a token; its own scale and shift are left out where the condition gives them."""
    return nn.LayerNorm(dim, eps=1e-6, elementwise_affine=affine)


# Copied from lesson_05/model.py: linear
def linear(c_in, c_out, zero=False):
    """A linear layer, started as the official code starts it."""
    return initialised(nn.Linear(c_in, c_out), zero)


# Copied from lesson_05/model.py: initialised
def initialised(layer, zero=False):
    """The official code's start: uniform with variance 2 / (fan in + fan out), or 0; biases 0."""
    nn.init.zeros_(layer.weight) if zero else nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
