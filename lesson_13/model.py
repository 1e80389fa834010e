"""VDM: Variational Diffusion Models (Kingma, Salimans, Poole, Ho 2021, arXiv 2107.00630).

Convention: z_t = alpha_t x + sigma_t eps with sigma_t^2 = sigmoid(gamma(t)), alpha_t^2 = sigmoid(-gamma(t)). Time is a
real number and runs from data (0) to noise (1); the network receives gamma(t), scaled to 0..1000. x is the centre of
a pixel's grey level k = 0..255: 2 (k + 1/2) / 256 - 1, and not k / 127.5 - 1, which is what the loader gives.
Images x0 (B, C, H, W) are in the loader's [-1, 1]; t, u and gamma are (B,) float64. All losses are in bits/dim.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

INTERIORS = ("learned", "linear", "cosine", "ddpm")


# ------------------------------------------------------------------ the process and the bound: Sections 3 and 4
class VDM(nn.Module):
    """The forward process, the bound on the likelihood and the sampler. Has no weights: gamma belongs to the network.

    T  number of steps of the diffusion loss; 0: continuous time, T = infinity
    """

    def __init__(self, T=0):
        super().__init__()
        if T < 0 or T != int(T):
            raise ValueError(f"T={T} must be a whole number of steps, or 0 for continuous time")
        self.T = int(T)
        self.register_buffer("values", 2 * (torch.arange(256) + 0.5) / 256 - 1, persistent=False)           # (256,)

    # ------------------------------------------------------------------ encoder and decoder
    def levels(self, x0):
        """The grey levels of images in the loader's [-1, 1]: (B, C, H, W) int64 in 0..255."""
        return ((x0 + 1) * 127.5).round().long().clamp(0, 255)

    def encode(self, x0):
        """x, the centres of the grey levels: 256 bins of width 2/256 tile [-1, 1]. (B, C, H, W)."""
        return self.values[self.levels(x0)]

    def decode(self, scaled, gamma_0):
        """log p(level | z_0) for every level. scaled: z_0 / alpha_0, (...) -> (..., 256).

        p is proportional to the density of z_0 given that level: no network, and every pixel for itself.
        """
        away = (scaled[..., None] - self.values) * torch.exp(-gamma_0 / 2).float()     # in standard deviations
        return (-0.5 * away.square()).log_softmax(-1)

    # ------------------------------------------------------------------ forward process
    def q_sample(self, x, gamma, eps):
        """z_t ~ q(z_t | x) with the given noise. x, eps (B, C, H, W), gamma (B,) -> (B, C, H, W)."""
        return image(torch.sigmoid(-gamma).sqrt()) * x + image(torch.sigmoid(gamma).sqrt()) * eps

    def gamma(self, net, t):
        """gamma(t) = -log SNR(t). t (B,) float64 -> (B,) float64."""
        u, _, low, high = net(t=t)
        return low + (high - low) * u

    def times(self, n, device=None):
        """n times, each uniform in [0, 1), together evenly spaced: t_i = (u + i / n) mod 1. (n,) float64."""
        return (torch.rand((), dtype=torch.float64) + torch.arange(n, dtype=torch.float64) / n).remainder(1).to(device)

    # ------------------------------------------------------------------ the three terms of the bound
    def prior(self, x, gamma_1):
        """KL of q(z_1 | x) from a unit Gaussian. (B,) bits/dim."""
        variance, signal = torch.sigmoid(gamma_1), torch.sigmoid(-gamma_1) * x.double() ** 2
        kl = 0.5 * (variance + signal + F.softplus(-gamma_1) - 1)           # -log variance, without cancellation
        return bits(kl)

    def reconstruction(self, x0, gamma_0, eps):
        """-log p(x | z_0) with z_0 made from eps. (B,) bits/dim."""
        scaled = self.encode(x0) + torch.exp(gamma_0 / 2).float() * eps     # z_0 / alpha_0: sigma/alpha = exp(gamma/2)
        return bits(-self.decode(scaled, gamma_0).gather(-1, self.levels(x0)[..., None])[..., 0])

    def diffusion(self, net, x, t, eps):
        """One draw of the diffusion loss of every image, each at its t. x, eps (B, C, H, W), t (B,) -> (B,) bits/dim.

        Its gradient is that of the bound, except where it reaches the interior of gamma: there it is that of the
        squared loss (Sec. 5 of the paper: the interior changes the variance only). Each image has its own u, so
        d(L_i^2) = 2 L_i dL_i: the gradient that arrives at u is scaled, and the network is walked back once.
        """
        T = self.T
        t = t if T == 0 else torch.cat([(t * T).ceil() / T, ((t * T).ceil() - 1) / T])         # t, and s = t - 1 / T
        u, slope, low, high = net(t=t)
        scale = []                                                          # 2 L_i, known when the gradient comes
        for value in (u, slope):
            if value.requires_grad and T == 0:                              # with a finite T the bound depends on u
                value.register_hook(lambda gradient: gradient * scale[0])
        gamma = low + (high - low) * u
        if T == 0:
            weight = 0.5 * (high - low) * slope                             # gamma'(t) / 2
        else:
            gamma, gamma_s = gamma.chunk(2)
            weight = 0.5 * T * torch.expm1(gamma - gamma_s)                 # T / 2 (SNR(s) / SNR(t) - 1)
        error = (eps - net(self.q_sample(x, gamma, eps), gamma)).square()
        loss = weight * bits(error)
        scale.append(2 * loss.detach())
        return loss

    def loss(self, net, x0):
        """One draw of the whole bound, averaged over the batch. x0 (B, C, H, W) -> reconstruction, prior, diffusion.

        Differs from the paper: the reconstruction is that of every eighth image, because 256 logits a pixel would
        cost as much as the network. Its mean is the same.
        """
        x, (_, _, low, high) = self.encode(x0), net(t=torch.zeros(1, dtype=torch.float64, device=x0.device))
        part = x0[::8]
        return (self.reconstruction(part, low, torch.randn_like(part)).mean(), self.prior(x, high).mean(),
                self.diffusion(net, x, self.times(len(x), x.device), torch.randn_like(x)).mean())

    @torch.no_grad()
    def bound(self, net, x0, draws=16, generator=None):
        """The bound on -log2 p(x) for images: reconstruction (B,), prior (B,), and `draws` values of the diffusion loss
        with their times, both (B, draws). The draws of an image lie 1 / draws apart; images are independent."""
        x = self.encode(x0)
        _, _, low, high = net(t=torch.zeros(1, dtype=torch.float64, device=x.device))
        u = torch.rand(len(x), dtype=torch.float64, generator=generator).to(x.device)
        times, terms = [], []
        for k in range(draws):
            times.append((u + k / draws).remainder(1))
            terms.append(self.diffusion(net, x, times[-1], noise_like(x, generator)))
        return (self.reconstruction(x0, low, noise_like(x, generator)), self.prior(x, high),
                torch.stack(terms, 1), torch.stack(times, 1))

    # ------------------------------------------------------------------ sampling
    def step(self, net, z, t, s, noise):
        """z_s ~ p(z_s | z_t) for s < t, floats, with the given noise; and the x that the network expects."""
        gamma, gamma_s = self.gamma(net, torch.tensor([t, s], dtype=torch.float64, device=z.device)).split(1)
        eps = net(z, gamma.expand(len(z)))
        c = -torch.expm1(gamma_s - gamma)
        alpha, alpha_s = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(-gamma_s).sqrt()
        sigma, sigma_s = torch.sigmoid(gamma).sqrt(), torch.sigmoid(gamma_s).sqrt()
        mean = image(alpha_s / alpha) * (z - image(sigma * c) * eps)
        return mean + image(sigma_s * c.sqrt()) * noise, (z - image(sigma) * eps) / image(alpha)

    @torch.no_grad()
    def reverse(self, net, z1, steps=100, generator=None):
        """Ancestral sampling on evenly spaced times. Yields (t, z_s, x estimate) after every step, from t = 1 to 0."""
        if steps < 1:
            raise ValueError(f"steps={steps} must be at least 1")
        z = z1
        for i in range(steps, 0, -1):
            z, x = self.step(net, z, i / steps, (i - 1) / steps, noise_like(z, generator))
            yield i / steps, z, x

    @torch.no_grad()
    def sample(self, net, n, steps=100, shape=(1, 28, 28), generator=None):
        """n images, (n, C, H, W), in the loader's [-1, 1]: the most likely grey level of every z_0."""
        z1 = noise_like(torch.empty(n, *shape, device=self.values.device), generator)
        for _, z, _ in self.reverse(net, z1, steps, generator):
            pass
        gamma_0 = self.gamma(net, torch.zeros(1, dtype=torch.float64, device=z.device))
        scaled = z / image(torch.sigmoid(-gamma_0).sqrt())
        return torch.stack([self.decode(one, gamma_0).argmax(-1) for one in scaled]) / 127.5 - 1


def bits(nats):
    """Nats of every pixel (B, ...) -> their mean in bits, (B,): bits per dimension."""
    return nats.flatten(1).mean(1) / math.log(2)


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


# ------------------------------------------------------------------ the noise schedule: Section 3
class Schedule(nn.Module):
    """gamma(t) = gamma_0 + (gamma_1 - gamma_0) u(t), with u increasing from u(0) = 0 to u(1) = 1.

    gamma_0, gamma_1  the ends; learned by the bound if learn_ends
    interior          of u: "learned" (a monotone network) or fixed: "linear", "cosine", "ddpm" (linear beta)
    units             of the monotone network
    """

    def __init__(self, gamma_0=-13.3, gamma_1=5.0, learn_ends=True, interior="learned", units=1024):
        super().__init__()
        if interior not in INTERIORS:
            raise ValueError(f"interior={interior!r} is none of {', '.join(INTERIORS)}")
        if not gamma_0 < gamma_1:
            raise ValueError(f"gamma_0={gamma_0} must be below gamma_1={gamma_1}: noise grows with time")
        self.interior = interior
        self.low = nn.Parameter(torch.tensor(float(gamma_0)), requires_grad=learn_ends)
        self.span = nn.Parameter(torch.tensor(float(gamma_1 - gamma_0)), requires_grad=learn_ends)
        if interior == "learned":
            # Differs from the paper: the units start as steps of width 1 / 10, spread evenly, so that a short run
            # can bend the curve anywhere. u starts as a nearly straight line.
            self.l1, self.l2 = nn.Parameter(torch.ones(1)), nn.Parameter(torch.full((units,), 10.0))
            self.b2 = nn.Parameter(-10 * (torch.arange(units) + 0.5) / units)
            self.l3 = nn.Parameter(torch.ones(units))

    def monotone(self, t):
        """l1 t + l3 sigmoid(l2 t + b2), the weights l taken as positive, and its derivative. (B,) -> two (B,)."""
        l1, l2, b2, l3 = (p.double() for p in (self.l1.abs(), self.l2.abs(), self.b2, self.l3.abs()))
        step = torch.sigmoid(l2 * t[:, None] + b2)                          # (B, units)
        return l1 * t + (l3 * step).mean(1), l1 + (l3 * step * (1 - step) * l2).mean(1)

    def fixed(self, t, low, high):
        """The curve of an interior without weights, and its derivative. (B,) -> two (B,)."""
        if self.interior == "linear":
            return t, torch.ones_like(t)
        if self.interior == "cosine":                                       # alpha = cos, sigma = sin of an even angle
            first, last = torch.atan(torch.exp(low / 2)), torch.atan(torch.exp(high / 2))
            angle = first + (last - first) * t
            return 2 * torch.log(torch.tan(angle)), 4 * (last - first) / torch.sin(2 * angle)
        spent = 1e-4 + 10 * t ** 2                                          # "ddpm": the integral of a linear beta
        return torch.log(torch.expm1(spent)), -20 * t / torch.expm1(-spent)

    def forward(self, t):
        """t (B,) float64 -> u, du/dt (B,), gamma_0, gamma_1 (), all float64."""
        low, high = self.low.double(), self.low.double() + self.span.double().abs()
        all_t = torch.cat([t, t.new_tensor([0.0, 1.0])])
        curve, slope = (self.monotone(all_t) if self.interior == "learned"
                        else self.fixed(all_t, low.detach(), high.detach()))
        rise = curve[-1] - curve[-2]                                        # renormalised: the ends are exact
        return (curve[:-2] - curve[-2]) / rise, slope[:-2] / rise, low, high


# ------------------------------------------------------------------ the network
class Network(nn.Module):
    """All that is learned, in one module, so that it is averaged, distributed and saved as one.

    net(z, gamma) predicts the noise; net(t=t) is the schedule.
    """

    def __init__(self, schedule, unet):
        super().__init__()
        self.schedule, self.unet = Schedule(**schedule), UNet(**unet)

    def forward(self, z=None, gamma=None, t=None):
        return self.schedule(t) if z is None else self.unet(z, gamma)


def fourier_features(z, exponents):
    """z, and sin and cos of 2^n 2 pi z for every exponent n. (B, C, H, W) -> (B, C (1 + 2 exponents), H, W)."""
    angle = [2 ** n * 2 * math.pi * z for n in exponents]
    return torch.cat([z, *(f(a) for a in angle for f in (torch.sin, torch.cos))], dim=1)


# Adapted from lesson_05/model.py: UNet -- the input is z with its Fourier features and gamma, the output is z + out
class UNet(nn.Module):
    """The noise in z_t from z_t and gamma(t): lesson 05's U-Net, with another input and another output.

    channels   width of the first level
    mults      width of every level as a multiple of `channels`; each further level halves the resolution
    blocks     residual blocks a level on the way down (one more on the way up)
    attention  resolutions that get self-attention after every block
    patch      the image enters as patch x patch pixels a position
    fourier    exponents n of the Fourier features of z; the period of n = 7 is one grey level
    gamma_min, gamma_max  what becomes 0 and 1000 in the time embedding; fixed, so that a schedule may move
    """

    def __init__(self, channels=128, mults=(1, 2, 2), blocks=2, attention=(14,), dropout=0.1, groups=32, patch=1,
                 image_size=28, image_channels=1, fourier=(6, 7), gamma_min=-13.3, gamma_max=5.0):
        super().__init__()
        if image_size % (patch * 2 ** (len(mults) - 1)):
            raise ValueError(f"image_size={image_size} cannot be halved {len(mults) - 1} times "
                             f"after patches of {patch}")
        self.channels, self.patch, self.fourier = channels, patch, fourier
        self.gamma_min, self.gamma_max = gamma_min, gamma_max
        width = 4 * channels
        self.time = nn.Sequential(linear(channels, width), nn.SiLU(), linear(width, width))
        size, c = image_size // patch, channels
        self.stem = conv(image_channels * patch ** 2 * (1 + 2 * len(fourier)), c)

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

    def forward(self, z, gamma):
        """z (B, C, H, W), gamma (B,) -> the prediction of eps, (B, C, H, W)."""
        t = 1000 * (gamma - self.gamma_min) / (self.gamma_max - self.gamma_min)
        emb = self.time(time_embedding(t, self.channels))                   # (B, 4 channels)
        x = fourier_features(z, self.fourier)
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
        out = rearrange(self.out(h), "b (c p q) h w -> b c (h p) (w q)", p=self.patch, q=self.patch)
        return z + out                                                      # at gamma_1 z is nearly the noise


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
