"""Captions for digits, and the judge that reads what they ask for back from the pixels.

    measure(x)             thickness, slant, width, size and place of the ink in images, as numbers
    attributes(x)          the same as levels 0, 1, 2: the judge of generated images
    caption(7, {"thickness": 2, "slant": 2})          "a thick seven leaning right"
    read_caption("a bold 7 slanted right")            [{"digit": 7, "thickness": 2, "slant": 2}]
    Tokenizer()(["a thick seven", ""])                word numbers, (2, 16); "" is the start token and padding
    captioned("train")     MNIST with token rows instead of labels: single, placed, or two digits in a scene
    follow(x, texts)       how often images do what their captions ask for, word by word

The rules for attributes look at pixels only, never at a label or a network.
"""

import functools
import random

import torch
import torch.nn.functional as F

from .data import Images, digits, to_float, to_uint8
from .errors import UserError
from .scores import classify
from .seeds import derive

# Terciles over MNIST's training images, rounded (size, x and y: over the same images as `placed` moves them; width
# and size take few values: the numbers lie behind the tercile). A measure is on level 0 up to the first number, on
# level 1 up to the second, else on level 2.
THRESHOLDS = {
    "thickness": (2.17, 2.76),                         # pixels
    "slant": (-0.57, 12.62),                           # degrees to the right of upright
    "width": (0.66, 0.86),                             # of the bounding box, in parts of its height
    "size": (14.5, 17.5),                              # pixels, the longer side of the bounding box
    "x": (-1.49, 2.37),                                # pixels to the right of the middle of the canvas
    "y": (-1.50, 2.39),                                # pixels below it
}
# The words for levels 0, 1, 2; the first of each is the usual one.
ADJECTIVES = {
    "thickness": (("thin", "fine"), ("regular",), ("thick", "bold")),
    "width": (("narrow",), ("normal",), ("wide",)),
    "size": (("small", "little"), ("medium",), ("large", "big")),
}
SLANT = (("leaning left", "slanted left"), ("upright", "straight"), ("leaning right", "slanted right"))
# Every thickness with every slant, in words: the rows of a grid whose columns are the digits.
STYLES = [f"{words[0]}, {slant}" for words in ADJECTIVES["thickness"] for slant in ("left", "upright", "right")]
ROWS, COLUMNS = ("upper", "middle", "lower"), ("left", "middle", "right")
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PAD, START = "<pad>", "<start>"                        # numbers 0 and 1
WORDS = (PAD, START, *NAMES, *"0123456789", "a", "an", "the", "digit", "handwritten",
         *(word for levels in ADJECTIVES.values() for words in levels for word in words),
         "leaning", "slanted", "upright", "straight", "in", "upper", "middle", "lower", "left", "right", "of")
# What words mean that need no other word beside them.
MEANING = {
    **{word: ("digit", i % 10) for i, word in enumerate((*NAMES, *"0123456789"))},
    **{word: (name, i) for name, entry in ADJECTIVES.items() for i, words in enumerate(entry) for word in words},
    **{word: ("slant", 1) for word in SLANT[1]},
}


def held_out(digit, thickness, slant):
    """Whether a triple is kept out of all training captions and images: two of the nine of every digit.

    The two share neither thickness nor slant, so each digit is seen with every word. digit: 0..9, levels: 0..2;
    numbers or tensors.
    """
    number = 3 * thickness + slant
    return (number == (digit + 1) % 9) | (number == (digit + 5) % 9)


# ------------------------------------------------------------------ what the pixels say
def measure(x):
    """The attributes of images x (N, 1, H, W) in [-1, 1], each (N,) float32, under the names of THRESHOLDS.

    thickness: ink = thickness (length + ends thickness / 2), length and ends those of the skeleton, because a
    stroke goes on for half its thickness beyond an end of its skeleton. slant: the angle of the line of regression
    of column on row, from the image's moments. An image without ink has zeros.
    """
    parts = [_measure(part[:, 0].cpu().float()) for part in x.split(500)]              # 500 stay in the cache
    return {name: torch.cat([part[name] for part in parts]) for name in THRESHOLDS}


def _measure(x):
    grey = ((x.clamp(-1, 1) + 1) / 2)
    grey = torch.where(grey < 0.1, 0, grey)            # faint noise of a sampler is paper
    shape = grey > 0.5
    ink = grey.sum((1, 2))
    length, ends = skeleton_length(skeleton(shape))
    thickness = 2 * ink / (length + (length ** 2 + 2 * ends * ink).sqrt()).clamp(min=1)

    h, w = grey.shape[1:]
    row, column = torch.arange(h) - (h - 1) / 2, torch.arange(w) - (w - 1) / 2         # from the middle
    mass = ink.clamp(min=1e-6)
    x_mean, y_mean = (grey.sum(1) * column).sum(1) / mass, (grey.sum(2) * row).sum(1) / mass
    dx, dy = column - x_mean[:, None], row - y_mean[:, None]
    covariance = (grey * dy[:, :, None] * dx[:, None, :]).sum((1, 2))
    variance = (grey.sum(2) * dy ** 2).sum(1)          # of the rows
    slant = torch.rad2deg(torch.atan2(-covariance, variance))                          # rows count downwards

    box_width, box_height = extent(shape.any(1)), extent(shape.any(2))
    return {"thickness": thickness, "slant": slant, "width": box_width / box_height.clamp(min=1),
            "size": torch.maximum(box_width, box_height), "x": x_mean, "y": y_mean}


def extent(used):
    """From the first to the last used row or column, both included. (N, L) bool -> (N,) float, 0 where none is."""
    place = torch.arange(1, used.shape[1] + 1)
    first, last = (used * place.flip(0)).amax(1), (used * place).amax(1)
    return (first + last - used.shape[1]).clamp(min=0).float()


def skeleton(shape):
    """Thin shapes to lines one pixel wide, by the algorithm of Zhang and Suen (1984). (N, H, W) bool -> the same.

    Then the corners of its stairs are cut, which leaves diagonals. Every row is one integer with a bit for each
    pixel, so W is at most 61 and all pixels of a row go at once.
    """
    if shape.shape[2] > 61:
        raise ValueError(f"images are {shape.shape[2]} pixels wide; at most 61 fit")
    bit = torch.arange(1, shape.shape[2] + 1)
    rows = F.pad((shape.long() << bit).sum(2), (1, 1))                                 # (N, H + 2)
    while True:
        before = rows
        for first in (True, False):
            around = n, _, e, _, s, _, w, _ = neighbours(rows)
            once = twice = pair = gap = torch.zeros_like(rows)
            for a, b in zip(around, around[1:] + around[:1]):
                begins = ~a & b                        # a run of neighbours begins here, going round
                twice, once = twice | once & begins, once | begins
                pair, gap = pair | a & b, gap | ~(a | b)
            # One run of two to six neighbours: without this pixel the shape hangs together, and no end is lost.
            keep = n & e & s | e & s & w if first else n & e & w | n & s & w
            rows = rows & ~(once & ~twice & pair & gap & ~keep)
        if torch.equal(rows, before):
            break
    for k in (0, 2, 4, 6):                             # a corner between neighbours k and k + 2
        around = neighbours(rows)
        others = around[k - 4] | around[k - 3] | around[k - 2]
        rows = rows & ~(around[k] & around[(k + 2) % 8] & ~others)
    return (rows[:, 1:-1, None] >> bit & 1).bool()


def neighbours(rows):
    """The eight neighbours of every pixel, clockwise from the one above; a row of pixels is one integer."""
    up, down = rows.roll(1, 1), rows.roll(-1, 1)       # the row above each, the row below
    return up, up >> 1, rows >> 1, down >> 1, down, down << 1, rows << 1, up << 1


def skeleton_length(s):
    """Length of skeletons and how many ends they have. (N, H, W) bool -> (N,) and (N,) float.

    A step to a neighbour counts 1, along a diagonal 2 ** 0.5 unless a corner between the two is used as well. A
    pixel that is alone counts as two ends.
    """
    s = F.pad(s, (1, 1, 1, 1))
    straight = (s[:, 1:] & s[:, :-1]).sum((1, 2)) + (s[:, :, 1:] & s[:, :, :-1]).sum((1, 2))
    a, b, c, d = s[:, :-1, :-1], s[:, :-1, 1:], s[:, 1:, :-1], s[:, 1:, 1:]
    diagonal = ((a & d & ~(b | c)) | (b & c & ~(a | d))).sum((1, 2))
    neighbours = F.avg_pool2d(s[:, None].float(), 3, 1, 1, divisor_override=1)[:, 0].round() - 1
    ends = (2 - neighbours).clamp(min=0) * s
    return straight + 2 ** 0.5 * diagonal, ends.sum((1, 2))


def levels(measures):
    """Measures -> levels 0, 1, 2, each (N,) int64."""
    return {name: (measures[name] > low).long() + (measures[name] > high)
            for name, (low, high) in THRESHOLDS.items()}


def attributes(x):
    """The level 0, 1 or 2 of every attribute of images x (N, 1, H, W) in [-1, 1]: {name: (N,) int64}.

    A scene is judged half by half: attributes(x[..., :28]) and attributes(x[..., 28:]).
    """
    return levels(measure(x))


def follow(x, texts):
    """How images x (N, 1, H, W) follow their captions (a list of N), as shares of what was asked for.

    accuracy: of the digits, read by the label judge; thickness, slant, ...: of the attributes asked for, each absent
    if nobody asked; attributes: of the digits with every attribute asked for; all: of those that are also right.
    Scenes (W = 56) are judged half by half.
    """
    asked = [read_caption(text) for text in texts]
    if len(x) != len(texts):
        raise ValueError(f"{len(x)} images, {len(texts)} captions")
    halves = x.split(28, dim=3)
    seen = [attributes(half) | {"digit": classify(half)[0]} for half in halves]
    right, both = {}, []                               # name -> a list of bool
    for i, ones in enumerate(asked):
        if ones and len(ones) != len(halves):
            raise UserError(f"{texts[i]!r} asks for {len(ones)} digits, the images have {len(halves)}")
        for one, found in zip(ones, seen):
            good = {name: int(found[name][i]) == level for name, level in one.items()}
            for name, value in good.items():
                right.setdefault(name, []).append(value)
            good_digit = good.pop("digit")
            both.append((all(good.values()), good_digit and all(good.values())))
    share = {"accuracy" if name == "digit" else name: sum(right[name]) / len(right[name])
             for name in ("digit", *THRESHOLDS) if name in right}
    for name, column in zip(("attributes", "all"), zip(*both)):
        share[name] = sum(column) / len(column)
    return share


# ------------------------------------------------------------------ captions
def caption(digit, wanted=None, rng=None):
    """A caption of one digit with the levels that `wanted` holds: {"thickness": 2, "slant": 2}; x and y go together.

    rng, a random.Random: a paraphrase at random, with the words in another order and some of them left out.
    """
    wanted = dict(wanted or {})
    pick = rng.choice if rng else lambda options: options[0]
    if rng:
        wanted = {name: level for name, level in wanted.items() if name in "xy" or rng.random() < 0.75}
        if rng.random() < 0.5:
            wanted.pop("x", None)
    before = [pick(words[wanted[name]]) for name, words in ADJECTIVES.items() if name in wanted]
    after = [pick(SLANT[wanted["slant"]])] if "slant" in wanted else []
    if rng:
        rng.shuffle(before)
        if rng.random() < 0.15:
            before.append("handwritten")
    if after and after[0] in ("upright", "straight") and pick((True, False)):
        before, after = [*before, after[0]], []
    noun = pick((NAMES[digit], str(digit), f"the digit {digit}"))
    if before and rng and rng.random() < 0.25:         # "three, thick, leaning right"
        after, before = [*after, *before], []
        rng.shuffle(after)
    following = (before or [noun])[0]
    article = "the" if noun.startswith("the") else "an" if following in ("eight", "8", "upright") else "a"
    if article != "the" and rng and rng.random() < 0.3:
        article = ""
    words = [article, *before, noun.removeprefix("the ")]
    text = " ".join(word for word in words if word) + (" " if len(after) == 1 else ", ") * bool(after)
    text += ", ".join(after)
    if "x" in wanted and "y" in wanted:
        place = f"{ROWS[wanted['y']]} {COLUMNS[wanted['x']]}"
        text += " in the " + ("middle" if place == "middle middle" else place)
    return text


def scene_caption(left, right, rng=None):
    """A caption of two digits side by side, each (digit, wanted levels): "a three left of a seven"."""
    if rng and rng.random() < 0.5:
        return f"{caption(*right, rng)} right of {caption(*left, rng)}"
    return f"{caption(*left, rng)} left of {caption(*right, rng)}"


def vocabulary(attributes=tuple(THRESHOLDS), kind="single"):
    """Those of WORDS that captions of this kind use when they name these attributes, padding and start included."""
    known = {PAD, START, *NAMES, *"0123456789", "a", "an", "the", "digit", "handwritten"}
    known |= {word for name in attributes for words in ADJECTIVES.get(name, ()) for word in words}
    known |= {word for text in sum(SLANT, ()) for word in text.split() if "slant" in attributes}
    known |= {"in", *ROWS, *COLUMNS} if "x" in attributes else set()
    known |= {"left", "right", "of"} if kind == "scene" else set()
    return tuple(word for word in WORDS if word in known)


def words_of(text):
    """The words of a text: lower case, without commas and full stops."""
    return text.lower().replace(",", " ").replace(".", " ").split()


def read_caption(text):
    """What a caption asks for: a dict for each digit, from left to right, with the levels of `attributes`.

    "" asks for nothing: []. A caption that names no digit or contradicts itself is a UserError.
    """
    Tokenizer().numbers(text)                          # every word is known
    if not words_of(text):
        return []
    found, turned, words = [{}], False, words_of(text)
    while words:
        word, following = words.pop(0), words[0] if words else ""
        entries = [MEANING[word]] if word in MEANING else []
        if word in ("leaning", "slanted"):
            if following not in ("left", "right"):
                raise UserError(f"{text!r}: {word} to which side? Say {word} left or {word} right")
            entries = [("slant", 2 * (words.pop(0) == "right"))]
        elif word in ("left", "right") and following == "of" and len(found) == 1:
            turned, found = word == "right", [*found, {}]
            words.pop(0)
        elif word in ROWS:
            own = following in COLUMNS and words[1:2] != ["of"]        # "in the middle left of a six"
            column = words.pop(0) if own else "middle"
            entries = [("y", ROWS.index(word)), ("x", COLUMNS.index(column))]
        elif word in ("left", "right", "of"):
            raise UserError(f"{text!r}: what does {word!r} mean here? Say leaning left, in the upper left, or left of")
        for name, level in entries:
            if found[-1].setdefault(name, level) != level:
                raise UserError(f"{text!r} asks for two different things: {name} {found[-1][name]} and {level}")
    if any("digit" not in one for one in found):
        raise UserError(f"{text!r} names no digit: say which, as in 'a thick seven leaning right'")
    return found[::-1] if turned else found


class Tokenizer:
    """Words -> numbers: the start token, the words, then padding (0) up to `length`.

    words: the vocabulary in its order; `WORDS + ("plus",)` adds to it without moving the others.
    """

    def __init__(self, words=WORDS, length=16):
        self.words, self.length = tuple(words), length
        self.number = {word: i for i, word in enumerate(self.words)}

    def __len__(self):
        return len(self.words)

    def __call__(self, texts):
        """A list of N captions -> (N, length) int64. The null caption "" is the start token alone."""
        rows = []
        for text in texts:
            numbers = self.numbers(text)
            if len(numbers) >= self.length:
                raise UserError(f"the caption {text!r} has {len(numbers)} words; at most {self.length - 1} fit")
            rows.append([1, *numbers] + [0] * (self.length - 1 - len(numbers)))
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, self.length)

    def numbers(self, text):
        """A text as the numbers of its words, a list. A word that is not known is a UserError."""
        words = words_of(text)
        if unknown := [word for word in words if self.number.get(word, 0) < 2]:
            raise UserError(f"{unknown[0]!r} is not a word that these captions know: " + " ".join(self.words[2:]))
        return [self.number[word] for word in words]

    def text(self, row):
        """One row of numbers as the words it stands for, without start and padding."""
        return " ".join(self.words[i] for i in torch.as_tensor(row).tolist() if i > 1)


# ------------------------------------------------------------------ images with captions
class Captioned(Images):
    """Images with `variants` captions each, tokenised once; a batch takes one of them at random.

    images (N, 1, H, W) uint8; labels (N, variants, length) token numbers; digit (N, D) and levels {name: (N, D)},
    D = 1, or 2 in a scene (left, right); captions: a list of `variants` texts for every image.
    """

    def __init__(self, images, digit, found, captions, tokenizer, batch_size=64, seed=0):
        tokens = tokenizer([text for texts in captions for text in texts])
        super().__init__(images, tokens.reshape(len(images), -1, tokenizer.length), batch_size, seed)
        self.digit, self.levels, self.captions, self.tokenizer = digit, found, captions, tokenizer

    def batch(self, step, rank=0, world=1):
        """The batch of step number `step`: x0 (B, 1, H, W) in [-1, 1] and token numbers (B, length)."""
        x0, tokens = super().batch(step, rank, world)
        generator = torch.Generator().manual_seed(derive(self.seed, step, rank))
        return x0, tokens[torch.arange(len(x0)), torch.randint(tokens.shape[1], (len(x0),), generator=generator)]


def captioned(split="train", batch_size=64, seed=0, limit=None, kind="single", words=("thickness", "slant", "width"),
              without_held_out=True, variants=4, tokenizer=None, data="mnist"):
    """MNIST (its first `limit` images) with captions, as `Captioned`.

    kind              single: 28 x 28 as it is; placed: shrunk and moved on its canvas; scene: two digits, 28 x 56
    words             the attributes that captions may name, of THRESHOLDS; x and y only together
    tokenizer         default: one that knows the words of these captions and no others
    without_held_out  leave out the images of held-out triples (a scene: if one of its digits has one)
    data              a reader's wish for other images, which have no such captions
    """
    if data != "mnist":
        raise UserError(f"data={data}: the captions of this lesson name digits and their strokes, so its images are "
                        "MNIST's; leave data out, or take your images to a lesson without captions")
    if kind not in KINDS:
        raise UserError(f"kind={kind} must be one of {', '.join(KINDS)}")
    if unknown := set(words) - set(THRESHOLDS):
        raise UserError(f"{min(unknown)!r} is not an attribute: choose of {', '.join(THRESHOLDS)}")
    images, digit, found = _measured(split, limit, kind)
    if without_held_out:
        kept = ~held_out(digit, found["thickness"], found["slant"]).any(1)
        images, digit, found = images[kept], digit[kept], {name: level[kept] for name, level in found.items()}
    rng = random.Random(0)                             # the captions of an image are the same in every run
    rows = zip(digit.tolist(), *(found[name].tolist() for name in words))
    captions = []
    for numbers, *each in rows:
        ones = [(number, dict(zip(words, level))) for number, *level in zip(numbers, *each)]
        write = scene_caption if len(ones) == 2 else lambda one, rng: caption(*one, rng)
        captions.append([write(*ones, rng) for _ in range(variants)])
    tokenizer = tokenizer or Tokenizer(vocabulary(words, kind), 24 if kind == "scene" else 16)
    return Captioned(images, digit, found, captions, tokenizer, batch_size, seed)


KINDS = ("single", "placed", "scene")


@functools.lru_cache(maxsize=4)
def _measured(split, limit, kind):
    """Images uint8 (N, 1, H, W), digits (N, D) and levels {name: (N, D)}."""
    data = digits(split, 1, limit=limit)
    images, digit = data.images, data.labels[:, None]
    if kind == "placed":
        images = placed(images)
    found = {name: level[:, None] for name, level in attributes(to_float(images)).items()}
    if kind == "scene":
        other = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        pair = lambda value: torch.cat([value, value[other]], dim=1)
        images = torch.cat([images, images[other]], dim=3)
        digit, found = pair(digit), {name: pair(level) for name, level in found.items()}
    return images, digit, found


def placed(images, seed=0):
    """Digits shrunk to between 0.6 and all of their size and moved to anywhere on the canvas. uint8 in and out."""
    generator = torch.Generator().manual_seed(seed)
    scale = 0.6 + 0.4 * torch.rand(len(images), 1, generator=generator)
    room = 1 - scale * 20 / 28                         # a digit of MNIST fills 20 of 28 pixels
    shift = (2 * torch.rand(len(images), 2, generator=generator) - 1) * room           # as parts of half the canvas
    theta = torch.cat([torch.diag_embed((1 / scale).expand(-1, 2)), (-shift / scale)[:, :, None]], dim=2)
    out = []
    for part, matrix in zip(images.split(500), theta.split(500)):
        where = F.affine_grid(matrix, list(part.shape), align_corners=False)
        out.append(to_uint8(2 * F.grid_sample(part.float() / 255, where, align_corners=False) - 1))
    return torch.cat(out)
