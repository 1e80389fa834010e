"""Flow Matching for Generative Modeling (Lipman, Chen, Ben-Hamu, Nickel, Le 2022, arXiv 2210.02747).

Convention: x_t = a_t x_0 + s_t eps, on the optimal-transport path t x_0 + (1 - (1 - s_min) t) eps; t runs from noise
(0) to data (1) and is fed to the network as 1000 t. The paper calls the data x_1 and the noise x_0: here, as in the
whole course, x_0 is the data and eps the noise. Images are (B, C, H, W) in [-1, 1]; t is (B,) in [0, 1].
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torchdiffeq import odeint

SOLVERS = ("dopri5", "euler", "midpoint", "rk4")                            # the first chooses its steps


# ------------------------------------------------------------------ conditional paths: Section 4 of the paper
class OT:
    """The optimal-transport path, Eq. (20): noise is carried to an image in a straight line, at constant speed.

    It is optimal between the noise and ONE image. It does not pair noises with images: that is another method.
    """

    end = 1.0                                                               # where sampling ends

    def __init__(self, s_min=1e-5):
        if not 0 <= s_min < 1:
            raise ValueError(f"s_min={s_min} must be at least 0 and below 1")
        self.s_min = s_min

    def __call__(self, t):
        """a_t, s_t of p_t(x | x_0) = N(a_t x_0, s_t^2 I) and their derivatives by t. (B,) float64 -> four (B,)."""
        one = torch.ones_like(t)
        return t, 1 - (1 - self.s_min) * t, one, -(1 - self.s_min) * one


# Adapted from lesson_07/model.py: VP -- its marginals and their slopes as functions of the reversed time, no SDE
class VP:
    """The variance-preserving diffusion of lesson 07 as a path: a^2 + s^2 = 1, its time reversed (Sec. 4.1).

    Diffusion time is 1 - t, with the linear beta from beta_min (data) to beta_max (noise).
    Differs from the paper's formula: it ends 1e-5 before the data, because the field is infinite at t = 1.
    """

    end = 1 - 1e-5

    def __init__(self, beta_min=0.1, beta_max=20.0):
        if not 0 < beta_min <= beta_max:
            raise ValueError(f"beta_min={beta_min} must be above 0 and not above beta_max={beta_max}")
        self.beta_min, self.beta_max = beta_min, beta_max

    def __call__(self, t):
        """a_t, s_t of p_t(x | x_0) = N(a_t x_0, s_t^2 I) and their derivatives by t. (B,) float64 -> four (B,)."""
        tau = 1 - t
        beta = self.beta_min + tau * (self.beta_max - self.beta_min)
        integral = self.beta_min * tau + 0.5 * tau ** 2 * (self.beta_max - self.beta_min)          # of beta, 0 to tau
        a, s = torch.exp(-0.5 * integral), torch.sqrt(-torch.expm1(-integral))
        return a, s, 0.5 * beta * a, -0.5 * beta * a ** 2 / s


# ------------------------------------------------------------------ the process: Sections 2 and 3
# Adapted from lesson_07/model.py: SDE -- a path and the field that makes it in the place of drift, diffusion and score
class FlowMatching(nn.Module):
    """Paths from noise to data, the loss, and the flow: sampling and likelihood. Holds no weights.

    path                "ot" or "vp"
    objective           "flow": the network is the vector field; "score": it predicts the noise, and with it the
                        score, as in lesson 07 (the paper's baseline; on the VP path)
    s_min               of the OT path; beta_min, beta_max: of the VP path
    """

    def __init__(self, path="ot", objective="flow", s_min=1e-5, beta_min=0.1, beta_max=20.0):
        super().__init__()
        if path not in ("ot", "vp"):
            raise ValueError(f"path={path!r} is none of ot, vp")
        if objective not in ("flow", "score"):
            raise ValueError(f"objective={objective!r} is none of flow, score")
        if (path, objective) == ("ot", "score"):
            raise ValueError("objective=score needs path=vp: the OT path begins with a = 0, which it divides by")
        self.path = OT(s_min) if path == "ot" else VP(beta_min, beta_max)
        self.objective = objective

    def coefficients(self, t):
        """a_t, s_t, a'_t, s'_t to multiply images with: four (B, 1, 1, 1)."""
        return tuple(image(value) for value in self.path(t.double()))

    # ------------------------------------------------------------------ conditional path and field
    def q_sample(self, x0, t, eps):
        """The conditional flow psi_t: carries the noise eps to x_t ~ p_t(x | x_0). (B, C, H, W), Eq. (22) for OT."""
        a, s, _, _ = self.coefficients(t)
        return a * x0 + s * eps

    def u(self, x, x0, t):
        """The field u_t(x | x_0) that makes the conditional path, Theorem 3; Eq. (21) for OT. (B, C, H, W)."""
        a, s, da, ds = self.coefficients(t)
        return ds / s * (x - a * x0) + da * x0

    def target(self, x0, t, eps):
        """u_t at x_t: the time derivative of psi_t(eps). Eq. (23) for OT: x_0 - (1 - s_min) eps. (B, C, H, W)."""
        _, _, da, ds = self.coefficients(t)
        return da * x0 + ds * eps

    # ------------------------------------------------------------------ loss
    def loss(self, net, x0):
        """Conditional flow matching (Theorem 2: the gradient of flow matching). x0 (B, C, H, W) -> scalar.

        The noise is drawn without a look at the data. objective "score" is the baseline: denoising score matching,
        weighted with s_t^2, which makes it the squared error of the noise.
        """
        t = self.path.end * torch.rand(len(x0), dtype=torch.float64, device=x0.device)
        eps = torch.randn_like(x0)
        target = self.target(x0, t, eps) if self.objective == "flow" else eps
        return F.mse_loss(net(self.q_sample(x0, t, eps), network_time(t)), target)                 # Eq. (23) for OT

    # ------------------------------------------------------------------ the flow
    def velocity(self, net, x, t):
        """The vector field v_t(x) of the flow. x (B, C, H, W), t (B,) -> (B, C, H, W)."""
        output = net(x, network_time(t))
        if self.objective == "flow":
            return output
        a, s, _, _ = self.coefficients(t)
        return self.target((x - s * output) / a, t, output)      # beta / 2 (x + score): the probability-flow ODE

    def predict_x0(self, x, v, t):
        """The x_0 with u_t(x | x_0) = v: the mean of the data behind x, if v is the field. (B, C, H, W)."""
        a, s, da, ds = self.coefficients(t)
        return (s * v - ds * x) / (s * da - a * ds)

    @torch.no_grad()
    def sample(self, net, eps, solver="dopri5", steps=50, tolerance=1e-5, times=None):
        """Carry noise (B, C, H, W) to data. Returns x at `times` (default: the end only) and the network calls.

        solver: "dopri5" chooses its steps so that the error of each stays below `tolerance` (rtol = atol), for the
        batch as one; "euler", "midpoint" and "rk4" take `steps` equal ones. times: (S,) float64, first 0.
        State and time of the solver are float64: in float32, 1 - t = 1e-5 would keep two digits.
        """
        if solver not in SOLVERS:
            raise ValueError(f"solver={solver!r} is none of {', '.join(SOLVERS)}")
        if steps < 1 or tolerance <= 0:
            raise ValueError(f"steps={steps} must be at least 1 and tolerance={tolerance} above 0")
        calls = 0

        def field(t, x):
            nonlocal calls
            calls += 1
            return self.velocity(net, x.float(), t.expand(len(x))).double()

        grid = torch.linspace(0, self.path.end, 2 if solver == "dopri5" else steps + 1, dtype=torch.float64)
        times, whole = (grid, False) if times is None else (times, True)
        path = integrate(field, eps.double(), times.to(eps.device), solver, tolerance).float()
        return path if whole else path[-1], calls

    # Adapted from lesson_07/model.py: SDE.log_likelihood -- of any field; time runs the other way; exact or estimated
    def log_likelihood(self, net, x, probes, tolerance=1e-5):
        """log p_1(x), by the flow back to the noise and the change of variables along it (Sec. 2).

        x (B, C, H, W); probes (P, B, C, H, W): see `divergence`. Returns (B,) in nats, the noise that x came from
        (B, C, H, W) and the network calls (each with P vector-Jacobian products).
        """
        calls = 0

        def field(t, state):
            nonlocal calls
            calls += 1
            with torch.enable_grad():
                x = state[0].float().requires_grad_()
                v = self.velocity(net, x, t.expand(len(x)))
                return v.detach().double(), divergence(v, x, probes).double()

        times = torch.tensor([self.path.end, 0.0], dtype=torch.float64, device=x.device)
        with torch.no_grad():
            state = x.double(), x.new_zeros(len(x), dtype=torch.float64)
            noise, change = integrate(field, state, times, "dopri5", tolerance)
        log_p0 = -0.5 * (noise[-1] ** 2 + math.log(2 * math.pi)).flatten(1).sum(1)
        return (log_p0 + change[-1]).float(), noise[-1].float(), calls      # change: the integral of div v, 1 to 0


def integrate(field, state, times, solver, tolerance):
    """The solution of d state / dt = field(t, state) at `times`. dopri5 must not step beyond the last of them."""
    options = {"step_t": times[-1:]} if solver == "dopri5" else {}
    return odeint(field, state, times, method=solver, rtol=tolerance, atol=tolerance, options=options)


def network_time(t):
    """What the network receives as time: lesson 05's embedding is made for 0 to 999. (B,) -> (B,) float32."""
    return (1000 * t).float()


def divergence(v, x, probes):
    """The sum over probes z of z' (dv/dx) z. (B,).

    With one z of random signs: the unbiased estimate of the trace by Hutchinson. With all unit vectors: the trace.
    """
    total = 0
    for z in probes:
        product, = torch.autograd.grad((v * z).sum(), x, retain_graph=True)
        total = total + (product * z).flatten(1).sum(1)
    return total


def signs(x, generator=None):
    """One probe of random signs for Hutchinson's estimate. (1, B, C, H, W)."""
    return (torch.randint(2, x.shape, generator=generator) * 2.0 - 1)[None].to(x.device)


# ------------------------------------------------------------------ 8-bit images as densities
def dequantise(x0, generator=None):
    """Grey levels k in [-1, 1] become (k + u) / 128 - 1 with u uniform in [0, 1): a density that can be compared."""
    level = ((x0 + 1) * 127.5).round()
    u = torch.rand(x0.shape, generator=generator).to(x0.device)
    return (level + u) / 128 - 1


def quantise(x):
    """The grey level whose bin x lies in, back in [-1, 1]: undoes `dequantise`."""
    return ((x + 1) * 128).floor().clamp(0, 255) / 127.5 - 1


def bits_per_dim(log_p, dims):
    """Bits per dimension of 8-bit images, from the log-density of the dequantised ones in nats. (B,).

    A bin is 1/128 wide: 7 bits. This is a bound on the bits of the grey levels, because of the dequantisation.
    """
    return -log_p / (dims * math.log(2)) + 7


# Copied from lesson_05/model.py: image
def image(values):
    """(B,) -> (B, 1, 1, 1) float32, to multiply images with."""
    return values.float()[:, None, None, None]


# ------------------------------------------------------------------ the network: that of lesson 05
# Copied from lesson_05/model.py: UNet
class UNet(nn.Module):
    """U-Net over an image and a time: residual blocks with the time added in, attention at the low resolutions.

    channels   width of the first level
    mults      width of every level as a multiple of `channels`; each further level halves the resolution
    blocks     residual blocks a level on the way down (one more on the way up)
    attention  resolutions that get self-attention after every block
    patch      the image enters as patch x patch pixels a position (1: as in the paper)
    """

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
        """x (B, C, H, W), t (B,) int -> the prediction, (B, C, H, W)."""
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
    """GroupNorm, swish, convolution, twice; the time enters between the two. The last convolution starts at 0."""

    def __init__(self, c_in, c_out, width, dropout=0.0, groups=32):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in, groups), conv(c_in, c_out)
        self.time = linear(width, c_out)
        self.norm2, self.conv2 = norm(c_out, groups), conv(c_out, c_out, zero=True)
        self.dropout = nn.Dropout(dropout)
        self.skip = conv(c_in, c_out, kernel=1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        """x (B, c_in, H, W), emb (B, width) -> (B, c_out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(F.silu(emb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.skip(x) + h


# Copied from lesson_05/model.py: Attention
class Attention(nn.Module):
    """Self-attention over the positions, one head as wide as the block. The last projection starts at 0."""

    def __init__(self, channels, groups=32):
        super().__init__()
        self.norm = norm(channels, groups)
        self.qkv, self.out = linear(channels, 3 * channels), linear(channels, channels, zero=True)

    def forward(self, x):
        """(B, C, H, W) -> (B, C, H, W)."""
        h = rearrange(self.norm(x), "b c h w -> b (h w) c")
        q, k, v = self.qkv(h).chunk(3, dim=2)                               # (B, H W, C) each
        weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(x.shape[1]), dim=2)                # (B, H W, H W)
        return x + rearrange(self.out(weights @ v), "b (h w) c -> b c h w", h=x.shape[2])


# Copied from lesson_05/model.py: Downsample
class Downsample(nn.Module):
    """Half the resolution. Padding on the right and bottom only, as TensorFlow's SAME does."""

    def __init__(self, channels):
        super().__init__()
        self.conv = conv(channels, channels, stride=2, padding=0)

    def forward(self, x):
        """(B, C, H, W) -> (B, C, H / 2, W / 2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


# Copied from lesson_05/model.py: Upsample
class Upsample(nn.Module):
    """Twice the resolution: nearest neighbour, then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(self, x):
        """(B, C, H, W) -> (B, C, 2 H, 2 W)."""
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
    """A convolution that keeps the resolution (stride 1), started as the official code starts it."""
    padding = kernel // 2 if padding is None else padding
    return initialised(nn.Conv2d(c_in, c_out, kernel, stride, padding), zero)


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
