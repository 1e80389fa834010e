"""DDIM: Denoising Diffusion Implicit Models (Song, Meng, Ermon 2020, arXiv 2010.02502).

Convention: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps; t runs from data (0) to noise (T - 1) and is fed to
the network as that integer. The paper writes alpha_t for what is abar_t here (and in DDPM), and counts t from 1 to
T, the code from 0 to T - 1; t = -1 is the clean image, abar_{-1} = 1.
Images are (B, C, H, W) in [-1, 1]; t and s are (B,) int64. A step goes from t to s; s > t goes back to the noise.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

SPACINGS = ("uniform", "quadratic", "ends", "trailing")
CLIPS = ("none", "stale", "fresh")


# ------------------------------------------------------------------ the family q_sigma: Sections 3 and 4 of the paper
# Adapted from lesson_05/model.py: DDPM -- the same schedule, noising and loss; the steps back are those of the family
#   q_sigma on any sub-sequence of the times, and they can be walked towards the noise
class DDIM(nn.Module):
    """A trained DDPM's schedule and loss, and the samplers that share them. Holds no weights.

    timesteps       T of the training
    beta_1, beta_T  ends of the linear schedule
    schedule        "linear", or "cosine" (that of lesson 09), to compare
    """

    def __init__(self, timesteps=1000, beta_1=1e-4, beta_T=0.02, schedule="linear"):
        super().__init__()
        if timesteps < 2:
            raise ValueError(f"timesteps={timesteps} must be at least 2")
        if schedule not in ("linear", "cosine"):
            raise ValueError(f"schedule={schedule!r} is none of linear, cosine")
        self.timesteps = timesteps
        if schedule == "linear":
            beta = torch.linspace(beta_1, beta_T, timesteps, dtype=torch.float64)
        else:
            share = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
            level = torch.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2
            beta = (1 - level[1:] / level[:-1]).clamp(max=0.999)
        abar = torch.cumprod(1 - beta, dim=0)
        # In float32, 1 - abar_0 = 1e-4 would keep three digits. The entry appended is abar_{-1} = 1: no noise.
        self.register_buffer("abar", torch.cat([abar, abar.new_ones(1)]), persistent=False)        # (T + 1,)

    # Copied from lesson_05/model.py: DDPM.q_sample
    def q_sample(self, x0, t, eps):
        """x_t ~ q(x_t | x_0) with the given noise: the marginal that all members of the family share. (B, C, H, W)."""
        return image(self.abar[t].sqrt()) * x0 + image((1 - self.abar[t]).sqrt()) * eps

    # Adapted from lesson_05/model.py: DDPM.loss -- its default only, the squared error of the noise: by Theorem 1 every
    #   q_sigma has this loss, up to the weights of the times
    def loss(self, net, x0):
        """One draw of the training loss, which is DDPM's. x0 (B, C, H, W) -> scalar."""
        t = torch.randint(self.timesteps, (len(x0),), device=x0.device)
        eps = torch.randn_like(x0)
        return F.mse_loss(net(self.q_sample(x0, t, eps), t), eps)

    # ------------------------------------------------------------------ which times, how much noise
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
        return eta * ((1 - self.abar[s]) / (1 - self.abar[t])).sqrt() * (1 - self.abar[t] / self.abar[s]).sqrt()

    def sigma_hat(self, t, s):
        """The wider noise of DDPM's own CIFAR-10 samples, sqrt(beta) of the step (Sec. 5, sigma-hat). (B,) float64."""
        return (1 - self.abar[t] / self.abar[s]).sqrt()

    # ------------------------------------------------------------------ one step
    def predict_x0(self, xt, eps, t):
        """f_theta: the x_0 that the predicted noise stands for, Eq. (9). (B, C, H, W)."""
        return (xt - image((1 - self.abar[t]).sqrt()) * eps) / image(self.abar[t].sqrt())

    def ddim_step(self, xt, eps, t, s, sigma=0.0, clip="none"):
        """Eq. (12) without its last term, sigma times noise; and the x_0 it aims at. Two (B, C, H, W).

        It is the mean of q_sigma(x_s | x_t, x_0), Eq. (7), at the predicted x_0. sigma: (B,) float64, or 0.
        Differs from the paper where clip is not "none":
        stale   x_0 is clipped to [-1, 1], eps stays as the network gave it (diffusers' clip_sample)
        fresh   and eps is made anew, so that x_t is still made of the two (OpenAI's code; at eta = 1, lesson 05)
        """
        x0 = self.predict_x0(xt, eps, t)                                    # Eq. (9)
        if clip != "none":
            x0 = x0.clamp(-1, 1)
        if clip == "fresh":
            eps = (xt - image(self.abar[t].sqrt()) * x0) / image((1 - self.abar[t]).sqrt())
        towards_xt = (1 - self.abar[s] - sigma ** 2).clamp(min=0).sqrt()    # not sigma: what it leaves
        return image(self.abar[s].sqrt()) * x0 + image(towards_xt) * eps, x0

    # ------------------------------------------------------------------ sampling: Sections 4.1 and 4.2
    # Adapted from lesson_05/model.py: DDPM.reverse -- Eq. (12) on a sub-sequence, with any eta or with sigma-hat
    @torch.no_grad()
    def reverse(self, net, xT, times, eta=0.0, hat=False, clip="none", generator=None):
        """Yields (t, x_s, x_0 estimate) after every step of the sub-sequence `times`; the last x_s is the sample.

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
        """The images that start from the noise xT, (B, C, H, W) in about [-1, 1]."""
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


def slerp(a, b, w):
    """From a (w = 0) to b (w = 1) along the great circle between them, sample by sample. (B, C, H, W).

    A mixture of two noises with weights 1 - w and w is shorter than either; a point on the circle is not.
    """
    flat_a, flat_b = a.flatten(1).double(), b.flatten(1).double()
    cosine = (flat_a * flat_b).sum(1) / (flat_a.norm(dim=1) * flat_b.norm(dim=1))
    angle = cosine.clamp(-1, 1).acos().clamp(1e-4, math.pi - 1e-4)         # parallel: what is left is the mixture
    return image(((1 - w) * angle).sin() / angle.sin()) * a + image((w * angle).sin() / angle.sin()) * b


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


# ------------------------------------------------------------------ the network, lesson 05's as it is
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
