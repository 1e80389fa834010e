"""Rectified Flow: Flow Straight and Fast (Liu, Gong, Liu 2022, arXiv 2209.03003).

Convention: z_t = t z_1 + (1 - t) z_0; t runs from the start (0: noise, or another data set) to the data (1), from
t_min = 0.001 on, and is fed to the network as 999 t. The paper writes X for the pairs that a flow learns from and Z for
the pairs that it makes; both are z_0, z_1 here, because the second are what the next flow learns from. The course's
x_0, the data, is z_1. Images are (B, C, H, W) in [-1, 1]; t is (B,) in [0, 1].
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torchdiffeq import odeint

SOLVERS = ("euler", "midpoint", "dopri5")                                   # the last chooses its steps


# ------------------------------------------------------------------ the process: Section 2 of the paper
# Adapted from lesson_39/model.py: FlowMatching -- the straight path only, between two given ends instead of from noise
#   drawn in the loss: what the ends are paired with is the method
class RectifiedFlow(nn.Module):
    """Straight lines between pairs, the loss, and the flow: Euler, other solvers, a stochastic one. Holds no weights.

    t_min   the first time the network is asked at, as in the official code
    """

    def __init__(self, t_min=1e-3):
        super().__init__()
        if not 0 <= t_min < 1:
            raise ValueError(f"t_min={t_min} must be at least 0 and below 1")
        self.t_min = t_min

    # ------------------------------------------------------------------ lines and loss
    def interpolate(self, z0, z1, t):
        """The point of the line from z0 to z1 at time t. (B, C, H, W)."""
        return image(t) * z1 + image(1 - t) * z0

    def clock(self, s):
        """The time that the network is asked at when the share s of the way is done: t_min to 1. (B,) float64."""
        return self.t_min + (1 - self.t_min) * s

    def loss(self, net, z0, z1, distil=False):
        """The squared error of the velocity on lines from z0 to z1, Eq. (1). Both (B, C, H, W) -> scalar.

        The pairs decide what is learned. Drawn independently of each other: 1-rectified flow. (z0, what the 1-rectified
        flow carries z0 to): 2-rectified flow. With distil only the start of each line is shown: the network learns the
        whole way as one step.
        """
        s = torch.rand(len(z0), dtype=torch.float64, device=z0.device)
        t = self.clock(s * (not distil))
        return F.mse_loss(net(self.interpolate(z0, z1, t), network_time(t)), z1 - z0)

    # ------------------------------------------------------------------ the flow
    def velocity(self, net, z, s):
        """dZ/ds = v(Z, t) after the share s of the way. z (B, C, H, W), s a number -> (B, C, H, W)."""
        s = torch.as_tensor(s, dtype=torch.float64, device=z.device)
        return net(z, network_time(self.clock(s)).expand(len(z)))

    # Adapted from lesson_39/model.py: FlowMatching.sample -- fewer solvers, and either way along the flow
    @torch.no_grad()
    def sample(self, net, z, solver="euler", steps=1, tolerance=1e-5, backward=False):
        """Carry z0 to z1 (backward: z1 to z0). (B, C, H, W) -> the other end and the network calls.

        "euler" takes `steps` steps of one call, "midpoint" of two; "dopri5" (RK45) chooses its steps so that the error
        of each stays below `tolerance` (rtol = atol), for the batch as one.
        """
        if solver not in SOLVERS:
            raise ValueError(f"solver={solver!r} is none of {', '.join(SOLVERS)}")
        if steps < 1 or tolerance <= 0:
            raise ValueError(f"steps={steps} must be at least 1 and tolerance={tolerance} above 0")
        calls = 0

        def field(s, z):
            nonlocal calls
            calls += 1
            return self.velocity(net, z.float(), s).double()

        times = torch.linspace(0, 1, 2 if solver == "dopri5" else steps + 1, dtype=torch.float64, device=z.device)
        times = times.flip(0) if backward else times
        options = {"step_t": times[-1:]} if solver == "dopri5" else {}      # no step beyond the end
        path = odeint(field, z.double(), times, method=solver, rtol=tolerance, atol=tolerance, options=options)
        return path[-1].float(), calls

    @torch.no_grad()
    def path(self, net, z0, steps):
        """The whole way in Euler steps: z (steps + 1, B, C, H, W) and the velocities v (steps, B, C, H, W)."""
        z, v = [z0], []
        for i in range(steps):
            v.append(self.velocity(net, z[-1], i / steps))
            z.append(z[-1] + v[-1] / steps)
        return torch.stack(z), torch.stack(v)

    # ------------------------------------------------------------------ with noise on the way
    def predict_z1(self, z, v, t):
        """Where the line through z with the velocity v ends: E[z_1 | z_t] if v is the exact field. t a number."""
        return z + (1 - t) * v

    def score(self, z, v, t):
        """grad log p_t(z) of a flow that starts from unit Gaussian noise drawn independently of the data. t < 1.

        The line began at z - t v; the score is minus that, over (1 - t). Not for reflowed pairs: there z_0 is known
        from z_1, and the formula does not hold.
        """
        return (t * v - z) / (1 - t)

    @torch.no_grad()
    def stochastic(self, net, z0, steps, noise=1.0, generator=None):
        """Like Euler, with new noise in every step but the last, of deviation s = noise (1 - t) a unit of time.

        dZ = (v + s^2 / 2 score) dt + s dW keeps every marginal p_t of the flow.
        Differs from the official code, whose drift has other factors and does not keep them.
        """
        z = z0
        for i in range(steps):
            t, s = i / steps, noise * (1 - i / steps)
            v = self.velocity(net, z, t)
            z = z + (v + 0.5 * s ** 2 * self.score(z, v, t)) / steps
            if i < steps - 1:
                z = z + s / math.sqrt(steps) * noise_like(z, generator)
        return z


# ------------------------------------------------------------------ what is paired with what: Algorithm 1
class Coupling:
    """Batches of pairs (z0, z1), the input of Algorithm 1: independent draws first, later the pairs that a flow made.

    source, target  data sets with batch(step, rank, world) -> images and labels; source None: Gaussian noise
    pairs           None, or {"z0", "z1"}: (N, C, H, W) each, what reflow puts in the place of the two data sets
    """

    def __init__(self, source, target, batch_size, seed=0):
        self.source, self.target, self.batch_size, self.seed, self.pairs = source, target, batch_size, seed, None

    def batch(self, step, rank=0, world=1):
        """This process's slice of the batch of step number `step`. Two (B, C, H, W)."""
        if self.pairs is None:
            z1, _ = self.target.batch(step, rank, world)
            return torch.randn_like(z1) if self.source is None else self.source.batch(step, rank, world)[0], z1
        generator = torch.Generator().manual_seed(self.seed + step)
        index = torch.randint(len(self.pairs["z0"]), (self.batch_size,), generator=generator)[rank::world]
        return self.pairs["z0"][index].float(), self.pairs["z1"][index].float()      # one index: z0 stays with its z1

    def starts(self, n, shape=(1, 28, 28)):
        """n starts, the same at every call; at most as many as the source has images. (n, C, H, W)."""
        if self.source is None:
            return torch.randn(n, *shape, generator=torch.Generator().manual_seed(self.seed))
        return self.source.first(min(n, len(self.source)))[0]


# ------------------------------------------------------------------ what reflow improves: Section 2.2
def transport_cost(z0, z1):
    """||z_1 - z_0||^2 of every pair. (B, C, H, W) twice -> (B,). Its mean over the pairs must not rise by reflow."""
    return (z1 - z0).flatten(1).square().sum(1)


def straightness(z, v):
    """The integral over t of ||(z_1 - z_0) - v_t||^2 of every path: 0 if it is straight at constant speed.

    z (S + 1, B, C, H, W), v (S, B, C, H, W) of `RectifiedFlow.path` -> (B,); its mean is the paper's S.
    """
    return (z[-1] - z[0] - v).flatten(2).square().sum(2).mean(0)


# Adapted from lesson_39/model.py: network_time -- 999, as in the official code
def network_time(t):
    """What the network receives as time: lesson 05's embedding is made for 0 to 999. (B,) -> (B,) float32."""
    return (999 * t).float()


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
