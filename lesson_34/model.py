"""Flux.1 (Black Forest Labs, August 2024): its network and guidance distillation, from announcement and inference code.

Convention: x_t = (1 - t) x_0 + t n; t runs from data (0) to noise (1) and is fed to the network as it is, its embedding
multiplies by 1000; the network predicts n - x_0; a step goes from t to s < t. Guidance: v = v_u + w (v_c - v_u), so
w = 1 is plain conditional. The teacher needs two calls for it; the student is given w, and multiplies that by 1000 as
well. There is no paper: network and sampling times are those of the published inference code, which holds no
training; the rest is this lesson's. Images are (B, C, H, W) in [-1, 1]; t, w (B,); a caption c is (B, L) word numbers.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


# ------------------------------------------------------------------ the process
# Adapted from lesson_32/model.py: RectifiedFlow -- the logit-normal density alone; a teacher's answer as target; a
#   shift that depends on the image's size
class RectifiedFlow(nn.Module):
    """The straight path between an image and noise, its loss, and Euler's method. Holds no weights.

    mean, std   of the normal whose sigmoid is a training time
    base, most  mu, which shifts the sampling times, for 256 and for 4096 image tokens
    """

    def __init__(self, mean=0.0, std=1.0, base=0.5, most=1.15):
        super().__init__()
        if std <= 0:
            raise ValueError(f"std={std} must be above 0")
        self.mean, self.std, self.base, self.most = mean, std, base, most

    # Copied from lesson_32/model.py: RectifiedFlow.q_sample
    def q_sample(self, x0, t, n):
        """x_t of an image and a noise. x0, n (B, C, H, W), t (B,) -> (B, C, H, W)."""
        return image(1 - t) * x0 + image(t) * n

    def draw(self, n, device=None):
        """n times for training, most of them in the middle. (n,) float64."""
        return torch.sigmoid(self.mean + self.std * torch.randn(n, dtype=torch.float64, device=device))

    def loss(self, net, x0, teacher=None):
        """One draw of the training loss. x0 (B, C, H, W) -> scalar.

        The target is n - x_0; with a teacher, what it says at x_t. If that is `guided` with the w that `net` is given,
        this is guidance distillation.
        """
        t, n = self.draw(len(x0), x0.device), torch.randn_like(x0)
        xt, target = self.q_sample(x0, t, n), n - x0
        if teacher is not None:
            with torch.no_grad():
                target = teacher(xt, t.float())
        return F.mse_loss(net(xt, t.float()), target)

    # ------------------------------------------------------------------ sampling
    def mu(self, tokens):
        """The shift of an image of so many tokens: on the line through `base` at 256 and `most` at 4096."""
        return self.base + (self.most - self.base) * (tokens - 256) / (4096 - 256)

    def grid(self, steps, tokens):
        """Falling times from 1 to 0 for `steps` calls, evenly spaced and then shifted. (steps + 1,) float64.

        The code writes e^mu / (e^mu + 1 / t - 1), infinite inside at t = 0; `shifted` is the same times t / t.
        """
        if steps < 1:
            raise ValueError(f"steps={steps} must be at least 1")
        return shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), math.exp(self.mu(tokens)))

    # Adapted from lesson_32/model.py: RectifiedFlow.reverse -- the network receives t itself
    @torch.no_grad()
    def reverse(self, net, n, grid):
        """Euler's method from noise n (B, C, H, W). Yields (t, x_s, x_0 estimate) after every step."""
        x = n
        for t, s in zip(grid[:-1], grid[1:]):
            v = net(x, t.float().to(x.device).expand(len(x)))
            x, x0 = x + float(s - t) * v, x - float(t) * v
            yield float(t), x, x0

    # Copied from lesson_32/model.py: RectifiedFlow.sample
    def sample(self, net, n, grid):
        """Images in about [-1, 1] from noise. (B, C, H, W) -> (B, C, H, W)."""
        for _, x, _ in self.reverse(net, n, grid):
            pass
        return x


# Copied from lesson_32/model.py: shifted
def shifted(t, shift):
    """Move times towards noise, as a larger image needs: shift is e^mu here."""
    return shift * t / (1 + (shift - 1) * t)


# Copied from lesson_05/model.py: image
def image(values):
    """(B,) -> (B, 1, 1, 1) float32, to multiply images with."""
    return values.float()[:, None, None, None]


# ------------------------------------------------------------------ the condition: captions, guidance
# Copied from lesson_05/sublesson_c/model.py: drop
def drop(c, null, p):
    """Replace each sample's condition by `null` with probability p: a coin for every sample, not one for the batch.

    c (B, ...), null the same shape or one that broadcasts to it -> (B, ...).
    """
    dropped = torch.rand(len(c), device=c.device) < p
    return torch.where(dropped.view(-1, *[1] * (c.dim() - 1)), null, c)


# Adapted from lesson_05/sublesson_c/model.py: given -- the guidance weight is an input, too
def given(net, c, w=1.0):
    """The network with caption and guidance weight, a number or (B,), filled in: a function of x_t and t, one call."""
    return lambda xt, t: net(xt, t, c, torch.as_tensor(w, dtype=torch.float32, device=xt.device).expand(len(xt)))


# Adapted from lesson_05/sublesson_c/model.py: guided -- a weight for every sample; the network's own input w stays at 1
def guided(net, c, null, w):
    """v = v_u + w (v_c - v_u), as a function of x_t and t: two calls of a network that has learned with w = 1 only.

    c, null (B, L): the caption and its absence; w: number or (B,). w = 0: no caption; w = 1: plain conditional.
    """
    both = given(net, torch.cat([c, null]))

    def v(xt, t):
        v_c, v_u = both(torch.cat([xt, xt]), torch.cat([t, t])).chunk(2)
        return v_u + image(torch.as_tensor(w, device=xt.device).expand(len(xt))) * (v_c - v_u)

    return v


# Adapted from lesson_32/model.py: TextEncoders -- two in the place of three, which read the same caption
class TextEncoders(nn.Module):
    """In the place of CLIP and T5: a bag of words for the pooled vector, a small transformer for the tokens.

    vocabulary  words, start token and padding included
    length      longest caption, start token included
    """

    def __init__(self, vocabulary, length, bag=64, dim=64, heads=4):
        super().__init__()
        self.bag = nn.EmbeddingBag(vocabulary, bag, mode="mean", padding_idx=0)
        self.words, self.places = nn.Embedding(vocabulary, dim), nn.Embedding(length, dim)
        self.block = nn.TransformerEncoderLayer(dim, heads, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)

    def forward(self, c):
        """c (B, L) int -> tokens (B, L, dim) and a pooled vector (B, bag). Padding is not masked, here as in Flux."""
        return self.block(self.words(c) + self.places.weight), self.bag(c)


# ------------------------------------------------------------------ rotary positions
def positions(h, w):
    """(0, row, column) of each patch, row by row. (h w, 3) int64."""
    row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=2).flatten(0, 1)


def rotations(ids, axes, theta=10000):
    """How far the pairs of a head's channels turn at each place. ids (N, A) -> e^(i angle), (N, sum(axes) / 2).

    Axis a has axes[a] channels; its pair j turns by the angle ids[:, a] theta^(-2j / axes[a]). Computed in float64.
    """
    angles = []
    for place, dim in zip(ids.double().unbind(1), axes):
        frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim)
        angles.append(place[:, None] * frequency)
    angle = torch.cat(angles, dim=1)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def rotate(x, turn):
    """Turn the pairs (2j, 2j + 1) of channels of queries or keys, as complex numbers. x (B, heads, N, D)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2).type_as(x)


def attend(q, k, v, turn):
    """Attention of all tokens to all, queries and keys turned to their places. (B, heads, N, d) -> (B, N, heads d)."""
    h = F.scaled_dot_product_attention(rotate(q, turn), rotate(k, turn), v)
    return rearrange(h, "b h n d -> b n (h d)")


# ------------------------------------------------------------------ the blocks
# Adapted from lesson_32/model.py: Stream -- queries and keys are always normalised, and no block is the text's last
class Stream(nn.Module):
    """The weights that one kind of token has in a double block; as a whole the identity at the start."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.adaln = nn.Sequential(nn.SiLU(), linear(dim, 6 * dim, zero=True))
        self.norm1, self.qkv = norm(dim, affine=False), linear(dim, 3 * dim)
        self.norm_q, self.norm_k = (nn.RMSNorm(dim // heads, eps=1e-6) for _ in "qk")
        self.out, self.norm2, self.mlp = linear(dim, dim), norm(dim, affine=False), MLP(dim)

    def enter(self, x, emb):
        """x (B, N, D), emb (B, 3, D) -> q, k, v, each (B, heads, N, D / heads), and what `leave` needs."""
        shift, scale, *rest = self.adaln(emb.sum(1, keepdim=True)).chunk(6, dim=2)
        qkv = self.qkv(modulate(self.norm1(x), shift, scale))
        q, k, v = rearrange(qkv, "b n (k h d) -> k b h n d", k=3, h=self.heads)
        return (self.norm_q(q), self.norm_k(k), v), rest

    def leave(self, x, h, rest):
        """Add what attention found, h (B, N, D), then the MLP."""
        gate, shift, scale, gate_mlp = rest
        x = x + gate * self.out(h)
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift, scale))


# Adapted from lesson_32/model.py: JointBlock -- queries and keys are turned
class DoubleBlock(nn.Module):
    """Text and image have weights of their own and one attention over both."""

    def __init__(self, dim, heads):
        super().__init__()
        self.text, self.image = Stream(dim, heads), Stream(dim, heads)

    def forward(self, x, context, emb, turn):
        """x (B, N, D), context (B, L, D), emb (B, 3, D), turn of the L + N tokens [context; x] -> x, context."""
        (of_text, rest_text), (of_image, rest_image) = self.text.enter(context, emb), self.image.enter(x, emb)
        h = attend(*(torch.cat(pair, dim=2) for pair in zip(of_text, of_image)), turn)
        of_text, of_image = h.split([context.shape[1], x.shape[1]], dim=1)
        return self.image.leave(x, of_image, rest_image), self.text.leave(context, of_text, rest_text)


class SingleBlock(nn.Module):
    """Attention and MLP side by side on one stream: x + gate Linear2([attention | GELU(mlp)]), both of Linear1(h).

    ratio  the MLP's width, in widths of a token
    """

    def __init__(self, dim, heads, ratio=4):
        super().__init__()
        self.heads, self.parts = heads, [3 * dim, ratio * dim]
        self.adaln = nn.Sequential(nn.SiLU(), linear(dim, 3 * dim, zero=True))
        self.norm, self.linear1 = norm(dim, affine=False), linear(dim, sum(self.parts))
        self.norm_q, self.norm_k = (nn.RMSNorm(dim // heads, eps=1e-6) for _ in "qk")
        self.linear2 = linear(dim + ratio * dim, dim)

    def forward(self, x, emb, turn):
        """x (B, L + N, D), text before image; emb (B, 3, D); turn of the L + N tokens -> (B, L + N, D)."""
        shift, scale, gate = self.adaln(emb.sum(1, keepdim=True)).chunk(3, dim=2)
        qkv, h = self.linear1(modulate(self.norm(x), shift, scale)).split(self.parts, dim=2)
        q, k, v = rearrange(qkv, "b n (k h d) -> k b h n d", k=3, h=self.heads)
        found = attend(self.norm_q(q), self.norm_k(k), v, turn)
        return x + gate * self.linear2(torch.cat([found, F.gelu(h, approximate="tanh")], dim=2))


# ------------------------------------------------------------------ the network
class FluxTransformer(nn.Module):
    """Flux's transformer, from tokens to tokens: double blocks, then single blocks.

    channels, context, pooled  numbers of an image token, of a text token, and of the vector of the whole text
    dim, heads   width of a token, heads of every attention
    doubles, singles  how many blocks of each kind
    axes         channels of a head that tell each axis of a position; together dim / heads
    frequencies  numbers that time and guidance weight are embedded in
    """

    def __init__(self, channels, context, pooled, dim=3072, heads=24, doubles=19, singles=38, axes=(16, 56, 56),
                 frequencies=256):
        super().__init__()
        if dim % heads or sum(axes) != dim // heads or any(size % 2 for size in axes):
            raise ValueError(f"axes={list(axes)} must be even and sum to dim / heads = {dim} / {heads}")
        self.axes = axes
        self.stem, self.context = linear(channels, dim), linear(context, dim)
        self.time, self.guidance = TimestepEmbedder(dim, frequencies), TimestepEmbedder(dim, frequencies)
        nn.init.zeros_(self.guidance.out.weight)                            # says nothing until it is taught
        self.pooled = nn.Sequential(linear(pooled, dim), nn.SiLU(), linear(dim, dim))
        self.doubles = nn.ModuleList(DoubleBlock(dim, heads) for _ in range(doubles))
        self.singles = nn.ModuleList(SingleBlock(dim, heads) for _ in range(singles))
        self.final = FinalLayer(dim, channels)

    def forward(self, x, context, pooled, t, w, ids, places=0.0):
        """x (B, N, channels), context (B, L, ...), pooled (B, ...), t, w (B,), ids (N, 3) -> (B, N, channels).

        places (N, D): added to the image tokens. Flux adds nothing.
        """
        x, context = self.stem(x) + places, self.context(context)
        emb = torch.stack([self.time(t), self.guidance(w), self.pooled(pooled)], dim=1)
        turn = rotations(F.pad(ids, (0, 0, context.shape[1], 0)), self.axes)             # text is at (0, 0, 0)
        for block in self.doubles:
            x, context = block(x, context, emb, turn)
        length, x = context.shape[1], torch.cat([context, x], dim=1)
        for block in self.singles:
            x = block(x, emb, turn)
        return self.final(x[:, length:], emb)


# Adapted from lesson_32/model.py: MMDiT -- the transformer is a class of its own, with single blocks, turns, and w
class Flux(nn.Module):
    """Captions and pixels around the transformer.

    vocabulary, length, bag, words   of the text encoders (words: numbers a token)
    patch   pixels along the side of a patch
    places  "rotary", or "table": patches are not turned, a table of sines is added to them, as in lesson 32
    """

    def __init__(self, vocabulary, length, bag=64, words=64, patch=2, places="rotary", image_channels=1, **transformer):
        super().__init__()
        if places not in ("rotary", "table"):
            raise ValueError(f"places={places!r} is none of rotary, table")
        self.patch, self.places = patch, places
        self.text = TextEncoders(vocabulary, length, bag, words)
        self.transformer = FluxTransformer(image_channels * patch ** 2, words, bag, **transformer)

    def forward(self, x, t, c, w):
        """x (B, C, H, W), t (B,) the time, c (B, L) int, w (B,) the guidance weight -> the velocity, (B, C, H, W)."""
        h, width = (side // self.patch for side in x.shape[2:])
        tokens, (context, pooled) = patchify(x, self.patch), self.text(c)
        ids, places = positions(h, width).to(x.device), 0.0
        if self.places == "table":                                          # all at (0, 0, 0), which is no turn
            ids, places = 0 * ids, sincos_2d(self.transformer.stem.out_features, h, width, 64).to(tokens)
        v = self.transformer(tokens, context, pooled, t, w, ids, places)     # (B, N, C patch^2)
        return rearrange(v, "b (h w) (c p q) -> b c (h p) (w q)", h=h, p=self.patch, q=self.patch)


# Copied from lesson_23/model.py: FinalLayer
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


# Copied from lesson_23/model.py: MLP
class MLP(nn.Module):
    """Two linear layers with a GELU (its tanh form) between, four times as wide."""

    def __init__(self, dim):
        super().__init__()
        self.into, self.out = linear(dim, 4 * dim), linear(4 * dim, dim)

    def forward(self, x):
        """(..., D) -> (..., D)."""
        return self.out(F.gelu(self.into(x), approximate="tanh"))


# Adapted from lesson_23/model.py: TimestepEmbedder -- multiplies by 1000 itself; for the guidance weight as well
class TimestepEmbedder(nn.Module):
    """A vector for a time or a guidance weight: sines and cosines of 1000 times it, then two layers."""

    def __init__(self, dim, frequencies=256):
        super().__init__()
        self.frequencies = frequencies
        self.into, self.out = linear(frequencies, dim), linear(dim, dim)
        for layer in (self.into, self.out):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, t):
        """(B,) -> (B, D)."""
        return self.out(F.silu(self.into(time_embedding(1000 * t, self.frequencies))))


# Copied from lesson_23/model.py: modulate
def modulate(x, shift, scale):
    """x (B, N, D), normalised, scaled by 1 + scale and shifted; both (B, 1, D). A scale of 0 changes nothing."""
    return x * (1 + scale) + shift


# Copied from lesson_23/model.py: norm
def norm(dim, affine):
    """LayerNorm over the channels of a token; its own scale and shift are left out where the condition gives them."""
    return nn.LayerNorm(dim, eps=1e-6, elementwise_affine=affine)


# Copied from lesson_23/model.py: time_embedding
def time_embedding(t, dim):
    """Cosines, then sines, of t at dim / 2 frequencies from 1 down towards 1/10000. (B,) -> (B, dim)."""
    frequency = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


# Copied from lesson_23/model.py: patchify
def patchify(x, patch):
    """(B, C, H, W) -> (B, N, C patch^2): one row for each patch. With `stem` a convolution of stride `patch`."""
    if x.shape[2] % patch or x.shape[3] % patch:
        raise ValueError(f"patch={patch} does not divide an image of {x.shape[2]} x {x.shape[3]}")
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)


# Copied from lesson_32/model.py: sincos_2d
def sincos_2d(dim, h, w, grid):
    """The place of each patch: h rows and w columns from the middle of grid x grid. (h w, dim) float64; not learned.

    The first half of the channels tells the column, the second the row: dim / 4 sines, then dim / 4 cosines.
    """
    if max(h, w) > grid:
        raise ValueError(f"an image of {h} x {w} patches does not fit into grid={grid}")

    def sincos(place):
        angle = place[:, None] / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
        return torch.cat([angle.sin(), angle.cos()], dim=1)                 # (h w, dim / 2)

    row, column = torch.meshgrid((grid - h) // 2 + torch.arange(h), (grid - w) // 2 + torch.arange(w), indexing="ij")
    return torch.cat([sincos(column.flatten()), sincos(row.flatten())], dim=1)


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
