"""Flux.1 (Black Forest Labs, August 2024): its network and guidance distillation, from announcement and inference code.

There is no paper. The announcement names a rectified flow, blocks of two streams and parallel ones, rotary positions,
and a model "dev" that was distilled from guidance. The inference code holds network and sampling times, and no
training. Addresses are therefore those of the papers that Flux builds on (SD3 is lesson 32's), or of the class or
function in that code: "official code: NAME".

Convention: x_t = (1 - t) x_0 + t n; t runs from data (0) to noise (1) and is fed to the network as it is, its embedding
multiplies by 1000; the network predicts n - x_0; a step goes from t to s < t. Guidance: v = v_u + w (v_c - v_u), so
w = 1 is plain conditional. The teacher needs two calls for it; the student is given w, whose embedding multiplies by
1000 as well. Images are (B, C, H, W) in [-1, 1]; t, w (B,); a caption c is (B, L) word numbers.
"""

import functools
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import earlier  # lesson 32: RectifiedFlow
from earlier import image, linear  # lesson 05
from earlier import drop  # lesson 05c
from earlier import FinalLayer, TimestepEmbedder, modulate, norm, patchify  # lesson 23
from earlier import JointBlock, Stream, cropped_sincos_on  # lesson 32


# ------------------------------------------------------------------ the process: announcement, sampling.py
class RectifiedFlow(earlier.RectifiedFlow):
    """Lesson 32's path and logit-normal times (SD3, Sec. 3); the network gets t itself, the shift follows the size.

    mean, std   of the normal whose sigmoid is a training time
    base, most  mu, which shifts the sampling times, for 256 and for 4096 image tokens
    """

    def __init__(self, mean=0.0, std=1.0, base=0.5, most=1.15):
        super().__init__("logit-normal", mean, std)
        self.base, self.most = base, most

    def loss_at(self, net, x0, t, n):
        """The squared error of n - x_0 at given times and noise (SD3, Sec. 3), the mean over each image's pixels. (B,).

        This is the teacher's; `loss` draws times and noise for it.
        """
        error = net(self.q_sample(x0, t, n), t.float()) - (n - x0)
        return error.square().flatten(1).mean(1)

    def distillation(self, net, teacher, x0):
        """The student's loss: what a teacher says at x_t, instead of n - x_0. x0 (B, C, H, W) -> scalar.

        Stage one of Meng et al. (2022), Sec. 3, in velocities. teacher: a function of x_t and t; `guided`, below, with
        the w that `net` is given.
        """
        t, n = self.times.draw(len(x0), x0.device), torch.randn_like(x0)
        xt = self.q_sample(x0, t, n)
        with torch.no_grad():
            target = teacher(xt, t.float())
        return F.mse_loss(net(xt, t.float()), target)

    def mu(self, tokens):
        """The shift of an image of so many tokens, on the line through `base` at 256 and `most` at 4096.

        official code: get_lin_function.
        """
        return self.base + (self.most - self.base) * (tokens - 256) / (4096 - 256)

    def grid(self, steps, tokens):
        """Falling times from 1 to 0 for `steps` calls, even, then shifted (official code: get_schedule). (steps + 1,).

        The code writes e^mu / (e^mu + 1 / t - 1), infinite inside at t = 0. Lesson 32's shift, with e^mu, is the same
        times t / t.
        """
        return super().grid(steps, math.exp(self.mu(tokens)))

    @torch.no_grad()
    def reverse(self, net, n, grid):
        """Euler's method from noise n (B, C, H, W) (official code: denoise): lesson 32's, asking at t itself.

        Yields (t, x_s, x_0 estimate) after every step.
        """
        x = n
        for t, s in zip(grid[:-1], grid[1:]):
            v = net(x, t.float().to(x.device).expand(len(x)))
            x, x0 = x + float(s - t) * v, x - float(t) * v
            yield float(t), x, x0


# ------------------------------------------------------------------ the condition: captions, guidance
def each(w, x):
    """The guidance weight of every sample of x, as official code: denoise has it. w: number or (B,) -> (B,) float32."""
    w = w.to(x.device, torch.float32) if torch.is_tensor(w) else torch.full((), w, dtype=torch.float32, device=x.device)
    return w.expand(len(x))


# Adapted from lesson_05/sublesson_c/model.py: given -- the guidance weight is an input, too
def given(net, c, w=1.0):
    """The network with caption and guidance weight, a number or (B,), filled in: a function of x_t and t, one call.

    The weight as an input: Meng et al. (2022), Sec. 3; official code: denoise.
    """
    return lambda xt, t: net(xt, t, c, each(w, xt))


# Adapted from lesson_32/model.py: guided -- a weight for every sample; the network's own input w stays at 1
def guided(net, c, null, w):
    """v = v_u + w (v_c - v_u) (Ho and Salimans (2022), Eq. (6), whose w is ours less 1), as a function of x_t and t.

    Two calls of a network that has learned with w = 1 only. c, null (B, L): the caption and its absence; w: number or
    (B,). w = 0: no caption; w = 1: plain conditional.
    """
    both = given(net, torch.cat([c, null]))

    def v(xt, t):
        v_c, v_u = both(torch.cat([xt, xt]), torch.cat([t, t])).chunk(2)
        return v_u + image(each(w, xt)) * (v_c - v_u)

    return v


# ------------------------------------------------------------------ rotary positions: RoFormer, on three axes
def positions(h, w):
    """(0, row, column) of each patch, row by row (official code: prepare). (h w, 3) int64."""
    row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=2).flatten(0, 1)


def rotations(ids, axes):
    """How far the pairs of a head's channels turn at each place. ids (N, A) -> e^(i angle), (N, sum(axes) / 2).

    Axis a has axes[a] channels; its pair j turns by the angle ids[:, a] 10000^(-2j / axes[a]), RoFormer, Sec. 3.2, for
    each axis on its own as in official code: EmbedND. Computed in float64.
    """
    angles = []
    for place, dim in zip(ids.double().unbind(1), axes):
        frequency = 10000 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append(place[:, None] * frequency)
    angle = torch.cat(angles, dim=1)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


@functools.cache
def rotations_on(device, axes, *size):
    """`rotations` of an image of so many patches, where they are used (RoFormer, Sec. 3.2): made once, not copied."""
    return rotations(positions(*size), axes).to(device)


def rotate(x, turn):
    """Turn the pairs (2j, 2j + 1) of channels of queries or keys, as complex numbers. x (B, heads, N, D) -> as before.

    RoFormer, Sec. 3.2; official code: apply_rope. turn: of the N places, (N, D / 2).
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2).type_as(x)


def attend(q, k, v, turn):
    """Attention of all tokens to all, queries and keys turned to their places, values not (official code: attention).

    q, k, v (B, heads, N, d) -> (B, heads, N, d).
    """
    return F.scaled_dot_product_attention(rotate(q, turn), rotate(k, turn), v)


# ------------------------------------------------------------------ the blocks: layers.py
class DoubleBlock(JointBlock):
    """Lesson 32's block: text and image with weights of their own, one attention over both (SD3, Sec. 4), turned here.

    The text goes on behind every block, also the last (official code: DoubleStreamBlock).
    """

    def forward(self, x, context, emb, turn):
        """x (B, N, D), context (B, L, D), emb (B, 3, D), turn of the L + N tokens [context; x] -> x, context."""
        qkv, rest_text, rest_image = self.enter(x, context, emb)
        of_text, of_image = attend(*qkv, turn).split([context.shape[1], x.shape[1]], dim=2)
        x = self.image.think(self.image.attended(x, of_image, rest_image), rest_image)
        return x, self.text.think(self.text.attended(context, of_text, rest_text), rest_text)


class SingleBlock(nn.Module):
    """Attention and MLP side by side on one stream: x + gate Linear2([attention | GELU(mlp)]), both of Linear1(h).

    The parallel layers of Dehghani et al. (2023), Sec. 2; official code: SingleStreamBlock.
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.parts = heads, [3 * dim, 4 * dim]
        self.adaln = nn.Sequential(nn.SiLU(), linear(dim, 3 * dim, zero=True))
        self.norm, self.linear1 = norm(dim, affine=False), linear(dim, sum(self.parts))
        self.norm_q, self.norm_k = (nn.RMSNorm(dim // heads, eps=1e-6) for _ in "qk")
        self.linear2 = linear(dim + 4 * dim, dim)

    def forward(self, x, emb, turn):
        """x (B, L + N, D), text before image; emb (B, 3, D); turn of the L + N tokens -> (B, L + N, D)."""
        shift, scale, gate = self.adaln(emb.sum(1, keepdim=True)).chunk(3, dim=2)
        qkv, h = self.linear1(modulate(self.norm(x), shift, scale)).split(self.parts, dim=2)
        q, k, v = rearrange(qkv, "b n (k h d) -> k b h n d", k=3, h=self.heads)
        found = rearrange(attend(self.norm_q(q), self.norm_k(k), v, turn), "b h n d -> b n (h d)")
        return x + gate * self.linear2(torch.cat([found, F.gelu(h, approximate="tanh")], dim=2))


# ------------------------------------------------------------------ the network: model.py of the official code
class ScaledEmbedder(TimestepEmbedder):
    """A vector for a time or a guidance weight: lesson 23's, of 1000 times it (official code: timestep_embedding)."""

    def forward(self, t):
        """(B,) -> (B, D)."""
        return super().forward(1000 * t)


class FluxTransformer(nn.Module):
    """Flux's transformer, from tokens to tokens: double blocks, then single blocks (official code: Flux).

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
        if frequencies % 2:
            raise ValueError(f"frequencies={frequencies} must be even: as many cosines as sines")
        self.axes = tuple(axes)
        self.stem, self.context = linear(channels, dim), linear(context, dim)
        self.time, self.guidance = ScaledEmbedder(dim, frequencies), ScaledEmbedder(dim, frequencies)
        nn.init.zeros_(self.guidance.out.weight)                            # says nothing until it is taught
        self.pooled = nn.Sequential(linear(pooled, dim), nn.SiLU(), linear(dim, dim))
        self.doubles = nn.ModuleList(DoubleBlock(dim, heads) for _ in range(doubles))
        self.singles = nn.ModuleList(SingleBlock(dim, heads) for _ in range(singles))
        self.final = FinalLayer(dim, channels)

    def forward(self, x, context, pooled, t, w, turn):
        """x (B, N, channels), context (B, L, ...), pooled (B, ...), t, w (B,), turn of the N -> (B, N, channels)."""
        x, context = self.stem(x), self.context(context)
        emb = torch.stack([self.time(t), self.guidance(w), self.pooled(pooled)], dim=1)
        turn = F.pad(turn, (0, 0, context.shape[1], 0), value=1)            # text is at (0, 0, 0): it is not turned
        for block in self.doubles:
            x, context = block(x, context, emb, turn)
        length, x = context.shape[1], torch.cat([context, x], dim=1)
        for block in self.singles:
            x = block(x, emb, turn)
        return self.final(x[:, length:], emb)


# Adapted from lesson_32/model.py: TextEncoders -- two instead of three, which read the same caption
class TextEncoders(nn.Module):
    """Instead of CLIP and T5 (official code: HFEmbedder): a bag of words (pooled vector), a small transformer (tokens).

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


# Adapted from lesson_32/model.py: MMDiT -- the transformer is a class of its own, with single blocks, turns, and w
class Flux(nn.Module):
    """Captions and pixels around the transformer (official code: prepare, unpack).

    vocabulary, length, bag, words   of the text encoders (words: numbers a token)
    patch   pixels along the side of a patch
    The other values are the transformer's.
    """

    def __init__(self, vocabulary, length, bag=64, words=64, patch=2, image_channels=1, **transformer):
        super().__init__()
        self.patch = patch
        self.text = TextEncoders(vocabulary, length, bag, words)
        self.transformer = FluxTransformer(image_channels * patch ** 2, words, bag, **transformer)

    def tokens(self, x):
        """The patches of an image and the turns of their places (official code: prepare). (B, N, ...), (N, d / 2)."""
        size = (side // self.patch for side in x.shape[2:])
        return patchify(x, self.patch), rotations_on(x.device, self.transformer.axes, *size)

    def forward(self, x, t, c, w):
        """x (B, C, H, W), t (B,) the time, c (B, L) int, w (B,) the guidance weight -> the velocity, (B, C, H, W)."""
        (tokens, turn), (context, pooled) = self.tokens(x), self.text(c)
        v = self.transformer(tokens, context, pooled, t, w, turn)            # (B, N, C patch^2)
        return rearrange(v, "b (h w) (c p q) -> b c (h p) (w q)", h=x.shape[2] // self.patch, p=self.patch,
                         q=self.patch)
