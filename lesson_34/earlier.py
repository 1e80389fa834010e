"""What lesson 34 takes from earlier lessons, word for word.

Written by `python -m tools.lineage sync` from the import lines of model.py. Do not edit it: change a definition
where it stands, in the file named above it, and run the command again.
"""

import functools
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


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


# lesson_05/sublesson_c/model.py
def drop(c, null, p):
    """Replace each sample's condition by `null` with probability p: a coin for every sample, not one for the batch.

    Line 3 of Ho and Salimans (2022), Alg. 1. c (B, ...), null the same shape or one that broadcasts to it -> (B, ...).
    """
    dropped = torch.rand(len(c), device=c.device) < p
    return torch.where(dropped.view(-1, *[1] * (c.dim() - 1)), null, c)


# lesson_23/model.py
def patchify(x, patch):
    """Sec. 3.2, Fig. 4: (B, C, H, W) -> (B, N, C patch^2). With `stem` it is a convolution of stride `patch`."""
    if x.shape[2] % patch or x.shape[3] % patch:
        raise ValueError(f"patch={patch} does not divide an image of {x.shape[2]} x {x.shape[3]}")
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)


# lesson_23/model.py
def sincos_2d(dim, h, w):
    """The place of each patch in a grid of h rows and w columns (Sec. 3.2), (h w, dim) float64; fixed, not learned.

    The first half of the channels tells the column, the second the row: dim / 4 sines, then dim / 4 cosines.
    """
    def sincos(place):
        angle = place[:, None] / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
        return torch.cat([angle.sin(), angle.cos()], dim=1)                 # (h w, dim / 2)

    row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return torch.cat([sincos(column.flatten()), sincos(row.flatten())], dim=1)


# lesson_23/model.py
# Adapted from lesson_01/model.py: time_embedding -- cosines first; the frequencies end just above 1/10000
def time_embedding(t, dim):
    """Cosines, then sines, of t at dim / 2 frequencies from 1 down towards 1/10000 (App. A). (B,) -> (B, dim)."""
    frequency = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


# lesson_23/model.py
class TimestepEmbedder(nn.Module):
    """A vector for a time (App. A): sines and cosines, then two layers, started with a deviation of 0.02."""

    def __init__(self, dim, frequencies=256):
        super().__init__()
        self.frequencies = frequencies
        self.into, self.out = linear(frequencies, dim), linear(dim, dim)
        for layer in (self.into, self.out):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, t):
        """(B,) -> (B, D)."""
        return self.out(F.silu(self.into(time_embedding(t, self.frequencies))))


# lesson_23/model.py
def norm(dim, affine):
    """LayerNorm over a token's channels (Sec. 3.2), without own scale and shift where the condition gives them."""
    return nn.LayerNorm(dim, eps=1e-6, elementwise_affine=affine)


# lesson_23/model.py
def modulate(x, shift, scale):
    """adaLN (Sec. 3.2): x (B, N, D), normalised, times 1 + scale, plus shift, both (B, 1, D). Zeros change nothing."""
    return x * (1 + scale) + shift


# lesson_23/model.py
class MLP(nn.Module):
    """The "pointwise feedforward" of Fig. 3: two linear layers, a tanh GELU (App. A) between, four times as wide."""

    def __init__(self, dim):
        super().__init__()
        self.into, self.out = linear(dim, 4 * dim), linear(4 * dim, dim)

    def forward(self, x):
        """(..., D) -> (..., D)."""
        return self.out(F.gelu(self.into(x), approximate="tanh"))


# lesson_23/model.py
class FinalLayer(nn.Module):
    """The decoder of Sec. 3.2: a last norm, adaptive if the blocks' are, and a linear map to the patch. Starts at 0."""

    def __init__(self, dim, out, adaptive=True):
        super().__init__()
        self.norm, self.linear = norm(dim, affine=not adaptive), linear(dim, out, zero=True)
        self.adaln = nn.Sequential(nn.SiLU(), linear(dim, 2 * dim, zero=True)) if adaptive else None

    def forward(self, x, emb):
        """x (B, N, D), emb (B, 2, D) -> (B, N, out)."""
        shift, scale = self.adaln(emb.sum(1, keepdim=True)).chunk(2, dim=2) if self.adaln else (0, 0)
        return self.linear(modulate(self.norm(x), shift, scale))


# lesson_39/model.py
def network_time(t):
    """What the network receives as the time of v_t (Sec. 3): 1000 t. (B,) -> (B,) float32.

    Differs from the paper, which feeds t: lesson 05's embedding is made for numbers from 0 to 999.
    """
    return (1000 * t).float()


# lesson_32/model.py
DENSITIES = ("uniform", "logit-normal", "mode", "cosmap")


# lesson_32/model.py
class Times:
    """A density of training times on [0, 1], Sec. 3.1.

    density     one of DENSITIES
    mean, std   of the normal whose sigmoid is the time: more weight to noise (mean > 0) or to data (mean < 0)
    mode_scale  of "mode": above 0 favours the middle, below 0 the ends; 0 is uniform
    """

    def __init__(self, density="logit-normal", mean=0.0, std=1.0, mode_scale=1.29):
        if density not in DENSITIES:
            raise ValueError(f"density={density!r} is none of {', '.join(DENSITIES)}")
        if std <= 0 or not -1 <= mode_scale <= 2 / (math.pi - 2):
            raise ValueError(f"std={std} must be above 0 and mode_scale={mode_scale} between -1 and 2 / (pi - 2)")
        self.density, self.mean, self.std, self.mode_scale = density, mean, std, mode_scale

    def map(self, u):
        """Uniform u to times of this density, Sec. 3.1. (B,) float64 in [0, 1] -> (B,)."""
        if self.density == "logit-normal":
            return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
        if self.density == "mode":
            return 1 - u - self.mode_scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
        return 1 - 1 / (torch.tan(math.pi / 2 * u) + 1) if self.density == "cosmap" else u

    def pdf(self, t):
        """The density itself, at t in (0, 1), Sec. 3.1. (B,) float64 -> (B,)."""
        if self.density == "logit-normal":
            z = (torch.logit(t) - self.mean) / self.std
            return torch.exp(-z ** 2 / 2) / (self.std * math.sqrt(2 * math.pi) * t * (1 - t))
        if self.density == "cosmap":                                        # that of v-prediction, cosine schedule
            return 2 / (math.pi * (1 - 2 * t + 2 * t ** 2))
        if self.density == "uniform":
            return torch.ones_like(t)
        u = torch.linspace(1, 0, 20_001, dtype=torch.float64)               # 1 / |map'(u)| where map(u) = t
        i = torch.searchsorted(self.map(u), t).clamp(1, len(u) - 1)
        slope = 1 + self.mode_scale * (1 - math.pi / 2 * torch.sin(math.pi * (u[i - 1] + u[i]) / 2))
        return 1 / slope

    def draw(self, n, device=None):
        """n times for training, Sec. 3.1. (n,) float64."""
        return self.map(torch.rand(n, dtype=torch.float64, device=device))


# lesson_32/model.py
def shifted(t, shift):
    """Move times towards noise, as a larger image needs (Sec. 5.3): shift = (m / n)^(1/2) for m pixels instead of n."""
    return shift * t / (1 + (shift - 1) * t)


# lesson_32/model.py
# Adapted from lesson_21/model.py: RectifiedFlow -- time runs from data to noise, and training draws it from a density
class RectifiedFlow(nn.Module):
    """The straight path between an image and noise (Sec. 2, 3), its loss, and Euler's method. Holds no weights.

    density, mean, std, mode_scale   of the training times, see `Times`. Sampling does not know of them
    """

    def __init__(self, density="logit-normal", mean=0.0, std=1.0, mode_scale=1.29):
        super().__init__()
        self.times = Times(density, mean, std, mode_scale)

    def q_sample(self, x0, t, n):
        """x_t of an image and a noise, the rectified flow of Sec. 3. x0, n (B, C, H, W), t (B,) -> (B, C, H, W)."""
        return image(1 - t) * x0 + image(t) * n

    def loss(self, net, x0):
        """One draw of the training loss (Sec. 3.1); the density of t is its only weight. x0 (B, C, H, W) -> scalar."""
        return self.loss_at(net, x0, self.times.draw(len(x0), x0.device), torch.randn_like(x0)).mean()

    def loss_at(self, net, x0, t, n):
        """The squared error of n - x_0 at given times and noise (Sec. 3), the mean over each image's pixels. (B,)."""
        error = net(self.q_sample(x0, t, n), network_time(t)) - (n - x0)
        return error.square().flatten(1).mean(1)

    def grid(self, steps, shift=1.0, official=False):
        """Falling times from 1 to 0 for `steps` calls, evenly spaced, then shifted (Sec. 5.3). (steps + 1,) float64.

        official: as in the code of SD3 and in diffusers. There the calls are spread evenly between the ends of an
        already shifted table of 1000 times, shifted again, and the 0 is appended.
        """
        if steps < 1 or shift <= 0:
            raise ValueError(f"steps={steps} must be at least 1 and shift={shift} above 0")
        if not official:
            return shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)
        last = shifted(1 / 1000, shift)
        return F.pad(shifted(torch.linspace(1, last, steps, dtype=torch.float64), shift), (0, 1))

    @torch.no_grad()
    def reverse(self, net, n, grid):
        """Euler's method from noise n (B, C, H, W), Sec. 2. Yields (t, x_s, x_0 estimate) after every step.

        net: v(x_t, 1000 t), guided or not; see `guided`.
        """
        x = n
        for t, s in zip(grid[:-1], grid[1:]):
            v = net(x, network_time(t).to(x.device).expand(len(x)))
            x, x0 = x + float(s - t) * v, x - float(t) * v
            yield float(t), x, x0

    def sample(self, net, n, grid):
        """Images in about [-1, 1] from noise, by `reverse` (Sec. 2). (B, C, H, W) -> (B, C, H, W)."""
        for _, x, _ in self.reverse(net, n, grid):
            pass
        return x


# lesson_32/model.py
# Adapted from lesson_23/model.py: Block -- adaLN-Zero in two halves: attention happens outside, between streams
class Stream(nn.Module):
    """The weights that one kind of token has in a block (Fig. 2b); as a whole the identity at the start.

    last  nothing follows: queries, keys and values only ("pre-only")
    """

    def __init__(self, dim, heads, qk_norm=True, last=False):
        super().__init__()
        self.heads, self.last = heads, last
        self.adaln = nn.Sequential(nn.SiLU(), linear(dim, (2 if last else 6) * dim, zero=True))
        self.norm1, self.qkv = norm(dim, affine=False), linear(dim, 3 * dim)
        self.norm_q, self.norm_k = (nn.RMSNorm(dim // heads, eps=1e-6) if qk_norm else nn.Identity() for _ in "qk")
        if not last:
            self.out, self.norm2, self.mlp = linear(dim, dim), norm(dim, affine=False), MLP(dim)

    def enter(self, x, emb):
        """Before attention (Fig. 2b): x (B, N, D), emb (B, 2, D) -> q, k, v (B, heads, N, D / heads), the rest."""
        shift, scale, *rest = self.adaln(emb.sum(1, keepdim=True)).chunk(2 if self.last else 6, dim=2)
        qkv = self.qkv(modulate(self.norm1(x), shift, scale))
        q, k, v = rearrange(qkv, "b n (k h d) -> k b h n d", k=3, h=self.heads)
        return (self.norm_q(q), self.norm_k(k), v), rest

    def attended(self, x, h, rest):
        """Add what attention found (Fig. 2b), h (B, heads, N, D / heads). rest: as `enter` left it. (B, N, D)."""
        return x + rest[0] * self.out(rearrange(h, "b h n d -> b n (h d)"))

    def think(self, x, rest):
        """Add the MLP (Fig. 2b). rest: as `enter` left it. (B, N, D)."""
        _, shift, scale, gate = rest
        return x + gate * self.mlp(modulate(self.norm2(x), shift, scale))


# lesson_32/model.py
class JointBlock(nn.Module):
    """Text and image have weights of their own and one attention over both (Sec. 4, Fig. 2)."""

    def __init__(self, dim, heads, qk_norm=True, last=False):
        super().__init__()
        self.text, self.image = Stream(dim, heads, qk_norm, last), Stream(dim, heads, qk_norm)

    def enter(self, x, context, emb):
        """q, k, v of [context; x] (Fig. 2b), each (B, heads, L + N, D / heads); what is left of both modulations."""
        (of_text, rest_text), (of_image, rest_image) = self.text.enter(context, emb), self.image.enter(x, emb)
        return [torch.cat(pair, dim=2) for pair in zip(of_text, of_image)], rest_text, rest_image

    def forward(self, x, context, emb):
        """x (B, N, D), context (B, L, D), emb (B, 2, D): time and pooled text -> x, context (None after the last)."""
        qkv, rest_text, rest_image = self.enter(x, context, emb)
        h = F.scaled_dot_product_attention(*qkv)
        of_text, of_image = h.split([context.shape[1], x.shape[1]], dim=2)
        x = self.image.think(self.image.attended(x, of_image, rest_image), rest_image)
        if self.text.last:
            return x, None
        return x, self.text.think(self.text.attended(context, of_text, rest_text), rest_text)


# lesson_32/model.py
def cropped_sincos_2d(dim, h, w, grid):
    """The place of each patch: h rows and w columns in the middle of lesson 23's grid x grid (Sec. 5.3). (h w, dim)."""
    if max(h, w) > grid:
        raise ValueError(f"an image of {h} x {w} patches does not fit into grid={grid}")
    rows, columns = (slice((grid - side) // 2, (grid - side) // 2 + side) for side in (h, w))
    return sincos_2d(dim, grid, grid).unflatten(0, (grid, grid))[rows, columns].flatten(0, 1)


# lesson_32/model.py
@functools.cache
def cropped_sincos_on(device, dtype, *size):
    """`cropped_sincos_2d` of this size where it is added (Sec. 5.3), made once: copies wait for a GPU."""
    return cropped_sincos_2d(*size).to(dtype).to(device)
