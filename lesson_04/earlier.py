"""What lesson 04 takes from earlier lessons, word for word.

Written by `python -m tools.lineage sync` from the import lines of model.py. Do not edit it: change a definition
where it stands, in the file named above it, and run the command again.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
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
def time_embedding(t, dim):
    """Sines, then cosines, of t at dim / 2 frequencies from 1 down to 1/10000 (DDPM, App. B). (B,) -> (B, dim)."""
    frequency = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2 - 1))
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


# lesson_05/model.py
def image(values):
    """The scalars of Eq. (4), one for each image, to multiply images with: (B,) -> (B, 1, 1, 1) float32."""
    return values.float()[:, None, None, None]


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


# lesson_05/model.py
def conv(c_in, c_out, kernel=3, zero=False):
    """A convolution (App. B) that keeps the resolution, started as the official code starts it."""
    return initialised(nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2), zero)


# lesson_05/model.py
class Downsample(nn.Module):
    """Half the resolution (App. B). Padding on the right and bottom only, as TensorFlow's SAME does."""
    def __init__(self, channels):
        super().__init__()
        self.conv = initialised(nn.Conv2d(channels, channels, kernel_size=3, stride=2))

    def forward(self, x):                               # -> (B, C, H / 2, W / 2)
        return self.conv(F.pad(x, (0, 1, 0, 1)))


# lesson_05/model.py
class Upsample(nn.Module):
    """Twice the resolution (App. B): nearest neighbour, then a convolution."""
    def __init__(self, channels):
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(self, x):                               # -> (B, C, 2 H, 2 W)
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


# lesson_05/model.py
class Attention(nn.Module):
    """Self-attention over the positions (App. B), one head as wide as the block. The last projection starts at 0."""
    def __init__(self, channels, groups=32):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.qkv, self.out = linear(channels, 3 * channels), linear(channels, channels, zero=True)

    def forward(self, x):                               # -> (B, C, H, W)
        h = rearrange(self.norm(x), "b c h w -> b (h w) c")
        q, k, v = self.qkv(h).chunk(3, dim=2)          # (B, H W, C) each; q / 8: q k^T may be too large for fp16
        weights = torch.softmax(q / 8 @ k.transpose(1, 2) / (math.sqrt(x.shape[1]) / 8), dim=2)      # (B, H W, H W)
        return x + rearrange(self.out(weights @ v), "b (h w) c -> b c h w", h=x.shape[2])


# lesson_05/model.py
class ResBlock(nn.Module):
    """GroupNorm, swish, convolution, twice; the time enters between the two (App. B). conv2 starts at 0."""
    def __init__(self, c_in, c_out, width, dropout=0.0, groups=32):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, c_in, eps=1e-6), conv(c_in, c_out)
        self.time = linear(width, c_out)
        self.norm2, self.conv2 = nn.GroupNorm(groups, c_out, eps=1e-6), conv(c_out, c_out, zero=True)
        self.dropout = nn.Dropout(dropout)
        self.skip = conv(c_in, c_out, kernel=1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):                          # (B, c_in, H, W), (B, width) -> (B, c_out, H, W)
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(emb))[:, :, None, None]
        return self.skip(x) + self.conv2(self.dropout(F.silu(self.norm2(h))))


# lesson_05/model.py
class Level(nn.Sequential):
    """Layers one after the other at one resolution (App. B); a residual block is also told the time."""
    def forward(self, h, emb):                          # (B, C, H, W), (B, width) -> (B, C', H, W)
        for layer in self:
            h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
        return h


# lesson_05/model.py
class UNet(nn.Module):
    """U-Net over an image and a time (App. B). Lessons that change a part override `embed`, `block`, `level`, `bottom`.

    channels, mults  width of the first level; of every level as a multiple, each at half the resolution
    blocks           residual blocks a level on the way down; one more on the way up
    attention        resolutions that get self-attention after every block
    patch            the image enters as patch x patch pixels a position (1: as in the paper)
    image_channels   of the images that enter; c_out: of those that leave, by default as many
    """
    def __init__(self, channels=128, mults=(1, 2, 2), blocks=2, attention=(14,), dropout=0.1, groups=32, patch=1,
                 image_size=28, image_channels=1, c_out=None):
        super().__init__()
        if image_size % (patch * 2 ** (len(mults) - 1)):
            raise ValueError(f"image_size={image_size} cannot be split into patches of {patch} and halved for {mults}")
        if channels < 4 or channels % 2:
            raise ValueError(f"channels={channels} must be even and at least 4: sines and cosines of the time")
        self.channels, self.width, self.dropout, self.groups = channels, 4 * channels, dropout, groups
        self.patch, size, c = patch, image_size // patch, channels
        self.time = nn.Sequential(linear(c, self.width), nn.SiLU(), linear(self.width, self.width))
        self.stem = conv(image_channels * patch ** 2, c)
        self.down, skips = nn.ModuleList(), [c]
        for i, mult in enumerate(mults):
            for _ in range(blocks):
                self.down.append(self.level(c, channels * mult, size in attention))
                skips.append(c := channels * mult)
            if i < len(mults) - 1:
                self.down.append(Downsample(c))
                skips.append(c)
                size //= 2
        self.middle, self.up = self.bottom(c), nn.ModuleList()
        for i, mult in reversed(list(enumerate(mults))):
            for _ in range(blocks + 1):
                self.up.append(self.level(c + skips.pop(), channels * mult, size in attention))
                c = channels * mult
            if i > 0:
                self.up.append(Upsample(c))
                size *= 2
        self.out = nn.Sequential(nn.GroupNorm(groups, c, eps=1e-6), nn.SiLU(),
                                 conv(c, (c_out or image_channels) * patch ** 2, zero=True))

    def embed(self, t):
        """What every level is told: the time, as a vector (App. B). t (B,) -> (B, width)."""
        return self.time(time_embedding(t, self.channels))

    def block(self, c_in, c_out):
        """A residual block (App. B) from c_in to c_out channels."""
        return ResBlock(c_in, c_out, self.width, self.dropout, self.groups)

    def level(self, c_in, c_out, attend):
        """A residual block and, if `attend`, self-attention (App. B)."""
        return Level(self.block(c_in, c_out), *([Attention(c_out, self.groups)] if attend else []))

    def bottom(self, c):
        """What stands between the way down and the way up (App. B)."""
        return Level(self.block(c, c), Attention(c, self.groups), self.block(c, c))

    def body(self, x, told):
        """Down, along the bottom, up with the shortcuts (App. B); every level gets `told`, from `embed`, as it is."""
        h = self.stem(rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=self.patch, q=self.patch))
        skips = [h]
        for layer in self.down:
            h = layer(h) if isinstance(layer, Downsample) else layer(h, told)
            skips.append(h)
        h = self.middle(h, told)
        for layer in self.up:
            h = layer(h) if isinstance(layer, Upsample) else layer(torch.cat([h, skips.pop()], dim=1), told)
        return rearrange(self.out(h), "b (c p q) h w -> b c (h p) (w q)", p=self.patch, q=self.patch)

    def forward(self, x, t):
        """x (B, c_in, H, W), t (B,) -> the prediction, (B, c_out, H, W)."""
        return self.body(x, self.embed(t))


# lesson_03/model.py
def langevin_step(x, score, alpha, z):
    """One step of Langevin dynamics, Eq. (4) and Alg. 1, line 6: x + alpha / 2 score + sqrt(alpha) z. (B, ...)."""
    return x + alpha / 2 * score + math.sqrt(alpha) * z


# lesson_03/model.py
class NCSN(nn.Module):
    """The noise levels, denoising score matching, annealed Langevin dynamics (Sec. 4). Holds no weights.

    sigma_1, sigma_L: the largest and the smallest deviation of the noise; levels: L, a geometric sequence of them.
    """
    def __init__(self, sigma_1=1.0, sigma_L=0.01, levels=10):
        super().__init__()
        if levels < 1 or not 0 < sigma_L <= sigma_1 or levels == 1 and sigma_1 != sigma_L:
            raise ValueError(f"levels={levels} must be at least 1, and sigma_L={sigma_L} above 0 and not above sigma_1="
                             f"{sigma_1}; for a single level the two must be equal")
        self.levels = levels
        sigmas = torch.linspace(math.log(sigma_1), math.log(sigma_L), levels, dtype=torch.float64).exp()
        self.register_buffer("sigmas", sigmas, persistent=False)            # (L,), each ratio the same

    # ------------------------------------------------------------------ noise: Section 4.1
    def q_sample(self, x0, i, z):
        """x_i ~ N(x_0, sigma_i^2 I) with the given noise, Sec. 4.1. x0, z (B, ...) -> (B, ...)."""
        return x0 + wide(self.sigmas[i], x0) * z

    def score(self, net, x, i):
        """s_theta(x, sigma_i), Sec. 4.1, the network's estimate of the gradient of log q_i(x). (B, ...)."""
        return net(x, i)

    def denoised(self, x, score, i):
        """E[x_0 | x_i], if this is the score: Eq. (5) at its least, solved for x_0 (Tweedie's formula). (B, ...)."""
        return x + wide(self.sigmas[i] ** 2, x) * score

    # ------------------------------------------------------------------ training: Section 4.2
    def level_losses(self, net, x0, i, z):
        """lambda(sigma_i) l(theta; sigma_i), Eq. (5), with lambda = sigma_i^2. x0, z (B, ...) -> (B,).

        sigma^2 1/2 |s + z / sigma|^2 is 1/2 |sigma s + z|^2: alike in size at all levels.
        Differs from the paper: divided by the number of pixels, so that an output of 0 has the loss 1/2.
        """
        score = self.score(net, self.q_sample(x0, i, z), i)
        return 0.5 * (wide(self.sigmas[i], x0) * score + z).square().flatten(1).mean(1)

    def loss(self, net, x0):
        """One draw of the loss, Eq. (6): noise each example to a level of its own. x0 (B, ...) -> scalar."""
        i = torch.randint(self.levels, (len(x0),), device=x0.device)
        return self.level_losses(net, x0, i, torch.randn_like(x0)).mean()

    # ------------------------------------------------------------------ sampling: Section 4.3
    def start(self, n, shape, generator=None):
        """Where a chain begins, Alg. 1, line 1: uniform noise in [0, 1]. (n, *shape). generator as in `noise_like`."""
        if isinstance(generator, list):
            x = torch.stack([torch.rand(shape, generator=one) for one in generator])
        else:
            x = torch.rand(n, *shape, generator=generator)
        return x.to(self.sigmas.device)

    def step_size(self, i, epsilon):
        """alpha_i = epsilon sigma_i^2 / sigma_L^2, Alg. 1, line 3. A number."""
        return epsilon * (self.sigmas[i] / self.sigmas[-1]).item() ** 2

    @torch.no_grad()
    def anneal(self, net, x, steps=100, epsilon=2e-5, generator=None, known=None, mask=None):
        """Algorithm 1 from the start x. Yields (i, x, estimate of x_0) after every step; the last x is the sample.

        steps: T, Langevin steps at each of the L levels, L T network calls in all. epsilon: step size at the last level
        known, mask: inpainting (Sec. 5): where the mask is true, x is `known`, noised to the level (once a level)
        """
        if steps < 1:
            raise ValueError(f"steps={steps} must be at least 1")
        for level in range(self.levels):                                    # Alg. 1, line 2
            alpha = self.step_size(level, epsilon)                          # Alg. 1, line 3
            i = torch.full((len(x),), level, device=x.device)
            if mask is not None:
                noised = self.q_sample(known, i, noise_like(known, generator))
                x = torch.where(mask, noised, x)
            for _ in range(steps):                                          # Alg. 1, line 4
                score = self.score(net, x, i)
                x0 = self.denoised(x, score, i)
                x = langevin_step(x, score, alpha, noise_like(x, generator))
                if mask is not None:
                    x = torch.where(mask, noised, x)
                yield level, x, x0                                          # x is clipped nowhere on its way

    def sample(self, net, n, steps=100, epsilon=2e-5, shape=(1, 28, 28), generator=None):
        """n images drawn with Algorithm 1, (n, C, H, W) in about [0, 1]."""
        for _, x, _ in self.anneal(net, self.start(n, shape, generator), steps, epsilon, generator):
            pass
        return x

    def inpaint(self, net, known, mask, steps=100, epsilon=2e-5, generator=None):
        """Images (B, C, H, W) that agree with `known` where the mask (bool) is true (Sec. 5)."""
        start = self.start(len(known), known.shape[1:], generator)
        for _, x, _ in self.anneal(net, start, steps, epsilon, generator, known, mask):
            pass
        return torch.where(mask, known, x)


# lesson_03/model.py
def dequantise(x0):
    """The loader's images in [-1, 1] -> [0, 1) (Sec. 5), each grey level spread over its 1/256: a density exists."""
    grey = (x0 + 1) * 127.5                                                 # 0, 1, ..., 255
    return (grey + torch.rand_like(grey)) / 256


# lesson_03/model.py
def from_unit(x):
    """Images of this lesson, in [0, 1] (Sec. 5) -> [-1, 1], as the rest of the course has them."""
    return 2 * x - 1
