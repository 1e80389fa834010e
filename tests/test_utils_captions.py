"""Captions: every rule on strokes whose answer is known, the constants against the training set, words both ways."""

import math
import random

import pytest
import torch

from utils import UserError, digits, to_float
from utils import captions as rules
from utils.captions import (
    Tokenizer,
    attributes,
    caption,
    captioned,
    follow,
    held_out,
    measure,
    read_caption,
    scene_caption,
)


def bar(top, left, height, width, size=28, wide=28):
    """A white rectangle on black, (1, 1, size, wide) in [-1, 1]."""
    x = -torch.ones(1, 1, size, wide)
    x[:, :, top:top + height, left:left + width] = 1
    return x


def sheared(degrees, thickness=3, height=20):
    """A bar that leans right by this angle, with grey edges."""
    column, x = torch.arange(28.0), -torch.ones(1, 1, 28, 28)
    for row in range(height):
        middle = 13.5 - math.tan(math.radians(degrees)) * (row - (height - 1) / 2)
        x[0, 0, row + 4] = 2 * (0.5 + thickness / 2 - (column - middle).abs()).clamp(0, 1) - 1
    return x


def ring(radius, thickness):
    """A circle line, with grey edges."""
    row, column = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    off = ((row - 13.5) ** 2 + (column - 13.5) ** 2).sqrt() - radius
    return 2 * (0.5 + thickness / 2 - off.abs()).clamp(0, 1)[None, None] - 1


# ------------------------------------------------------------------ what the pixels say
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5])
def test_thickness_of_bars(width):
    upright, lying = bar(4, 12, 20, width), bar(12, 4, width, 20)
    for x in (upright, lying):
        assert float(measure(x)["thickness"]) == pytest.approx(width, abs=0.2 + 0.04 * width)


@pytest.mark.parametrize("width", [2, 3, 4])
def test_thickness_of_rings_and_slanted_bars(width):
    assert float(measure(ring(8, width))["thickness"]) == pytest.approx(width, abs=0.3)
    across = width / math.cos(math.radians(30))        # along a row
    assert float(measure(sheared(30, across))["thickness"]) == pytest.approx(width, rel=0.15)


def test_thickness_does_not_depend_on_length_or_place():
    values = [float(measure(bar(2, left, height, 3))["thickness"]) for left in (3, 14) for height in (12, 16, 24)]
    assert max(values) - min(values) < 0.15


@pytest.mark.parametrize("degrees", [-40, -20, -5, 0, 5, 20, 40])
def test_slant_of_sheared_bars(degrees):
    assert float(measure(sheared(degrees))["slant"]) == pytest.approx(degrees, abs=0.5)


def test_slant_has_a_sign_that_people_share():
    slash = bar(0, 0, 0, 0)
    slash[0, 0, torch.arange(4, 24), torch.arange(23, 3, -1)] = 1      # "/" leans right
    assert float(measure(slash)["slant"]) == pytest.approx(45, abs=0.5)
    assert int(attributes(slash)["slant"]) == 2 and int(attributes(slash.flip(3))["slant"]) == 0


@pytest.mark.parametrize("top, left, height, width", [(4, 10, 20, 6), (0, 0, 28, 28), (9, 3, 5, 20), (27, 27, 1, 1)])
def test_box_and_place(top, left, height, width):
    found = measure(bar(top, left, height, width))
    assert float(found["size"]) == max(height, width) and float(found["width"]) == pytest.approx(width / height)
    assert float(found["x"]) == pytest.approx(left + width / 2 - 14, abs=1e-4)
    assert float(found["y"]) == pytest.approx(top + height / 2 - 14, abs=1e-4)


def test_place_on_a_wide_canvas():
    found = measure(bar(4, 36, 20, 4, wide=56))
    assert float(found["x"]) == pytest.approx(10, abs=1e-4) and float(found["y"]) == pytest.approx(0, abs=1e-4)
    with pytest.raises(ValueError, match="61"):
        measure(bar(4, 4, 20, 4, wide=62))


def test_levels_go_up_with_the_measure():
    # A level is how many of the two thresholds lie below the measure.
    thin, regular, thick = bar(4, 12, 20, 1), sheared(0, 2.35), bar(4, 12, 20, 5)
    assert attributes(torch.cat([thin, regular, thick]))["thickness"].tolist() == [0, 1, 2]
    assert attributes(torch.cat([sheared(-10), sheared(6), sheared(20)]))["slant"].tolist() == [0, 1, 2]
    assert attributes(torch.cat([bar(4, 4, 20, w) for w in (5, 15, 20)]))["width"].tolist() == [0, 1, 2]
    assert attributes(torch.cat([bar(7, 12, h, 3) for h in (12, 16, 20)]))["size"].tolist() == [0, 1, 2]
    places = [(3, 3), (12, 12), (20, 20)]
    found = attributes(torch.cat([bar(y, x, 5, 5) for y, x in places]))
    assert found["x"].tolist() == found["y"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("x", [-torch.ones(2, 1, 28, 28), torch.ones(1, 1, 28, 28), torch.zeros(1, 1, 28, 28),
                               bar(5, 5, 2, 2), bar(5, 5, 1, 1), -0.9 * torch.ones(1, 1, 28, 28),
                               3 * torch.randn(5, 1, 28, 56, generator=torch.Generator().manual_seed(0)),
                               torch.zeros(0, 1, 28, 28)],
                         ids=["paper", "ink", "grey", "square", "dot", "noise below", "noise", "none"])
def test_odd_images_have_finite_measures(x):
    for name, value in measure(x).items():
        assert value.shape == (len(x),) and value.dtype == torch.float32 and bool(value.isfinite().all()), name
    if len(x) == 2:
        assert all(bool((value == 0).all()) for value in measure(x).values())


def test_faint_noise_is_paper():
    x, _ = digits("test").first(200)
    noisy = x + 0.15 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) * (x < -0.9)
    before, after = attributes(x), attributes(noisy)
    assert all(bool((before[name] == after[name]).float().mean() > 0.97) for name in before)


# ------------------------------------------------------------------ thinning
def thinned_by_the_book(image):
    """Zhang and Suen's algorithm pixel by pixel, (H, W) bool -> (H, W) bool."""
    pixels = {(y, x) for y, x in image.nonzero().tolist()}
    clockwise = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))
    changed = True
    while changed:
        changed = False
        for first in (True, False):
            gone = set()
            for y, x in pixels:
                p = [(y + dy, x + dx) in pixels for dy, dx in clockwise]
                turns = sum(not p[i] and p[(i + 1) % 8] for i in range(8))
                n, e, s, w = p[0], p[2], p[4], p[6]
                free = not (n and e and s) and not (e and s and w) if first else \
                    not (n and e and w) and not (n and s and w)
                if 2 <= sum(p) <= 6 and turns == 1 and free:
                    gone.add((y, x))
            pixels -= gone
            changed |= bool(gone)
    for k in (0, 2, 4, 6):                             # stairs become diagonals
        gone = set()
        for y, x in pixels:
            p = [(y + dy, x + dx) in pixels for dy, dx in clockwise]
            if p[k] and p[(k + 2) % 8] and not any(p[(k + i) % 8] for i in (4, 5, 6)):
                gone.add((y, x))
        pixels -= gone
    result = torch.zeros_like(image)
    for y, x in pixels:
        result[y, x] = True
    return result


def test_thinning_is_zhang_and_suens():
    x, _ = digits("test").first(12)
    shapes = torch.cat([x[:, 0] > 0, torch.rand(4, 28, 28, generator=torch.Generator().manual_seed(0)) > 0.4])
    for shape, thin in zip(shapes, rules.skeleton(shapes)):
        assert torch.equal(thin, thinned_by_the_book(shape))


def test_thinning_keeps_what_hangs_together():
    x, _ = digits("test").first(100)
    shapes = x[:, 0] > 0
    thin = rules.skeleton(shapes)
    assert bool((thin <= shapes).all()) and torch.equal(rules.skeleton(thin), thin)
    assert [pieces(a) for a in thin] == [pieces(a) for a in shapes]


def pieces(image):
    """How many parts (8-connected) the shape has."""
    left, count = {tuple(p) for p in image.nonzero().tolist()}, 0
    while left:
        count, border = count + 1, [left.pop()]
        while border:
            y, x = border.pop()
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            border.extend(near)
    return count


def test_length_and_ends_of_skeletons():
    line, corner, loop, dot = torch.zeros(4, 1, 9, 9, dtype=torch.bool)
    line[0, torch.arange(6), torch.arange(6)] = True                   # five diagonal steps
    corner[0, 2, 2:7] = corner[0, 2:6, 6] = True                       # 4 + 3 straight steps, no short cut
    loop[0, 2, 3:6] = loop[0, 6, 3:6] = loop[0, 3:6, 2] = loop[0, 3:6, 6] = True
    dot[0, 4, 4] = True
    length, ends = rules.skeleton_length(torch.cat([line, corner, loop, dot]))
    assert length.tolist() == pytest.approx([5 * 2 ** 0.5, 7, 8 + 4 * 2 ** 0.5, 0])
    assert ends.tolist() == [2, 2, 0, 2]


# ------------------------------------------------------------------ the constants
@pytest.fixture(scope="module")
def training():
    """All training digits and their measures."""
    data = digits("train")
    return data, measure(to_float(data.images))


def test_thresholds_are_the_terciles_of_the_training_set(training):
    data, plain = training
    moved = measure(to_float(rules.placed(data.images)[:10_000]))      # a sixth of them, to save time
    thirds = torch.tensor([1 / 3, 2 / 3], dtype=torch.float64)
    allowed = {"thickness": 0.0051, "slant": 0.0051, "width": 0.0101, "size": 0.51, "x": 0.1, "y": 0.1}
    for name, constants in rules.THRESHOLDS.items():
        value = (moved if name in ("size", "x", "y") else plain)[name].double()
        found = torch.quantile(value, thirds).tolist()
        assert all(abs(a - b) <= allowed[name] for a, b in zip(constants, found)), (name, found)
        share = torch.bincount(rules.levels(plain | {name: value})[name], minlength=3) / len(value)
        assert (share - 1 / 3).abs().max() < (0.12 if name in ("width", "size") else 0.01), (name, share)


def test_every_triple_has_images_and_held_out_ones_none(training):
    data, plain = training
    level = rules.levels(plain)
    number = 9 * data.labels + 3 * level["thickness"] + level["slant"]
    every, triple = torch.bincount(number, minlength=90).reshape(10, 9), torch.arange(9)
    out = torch.stack([held_out(digit, triple // 3, triple % 3) for digit in range(10)])
    assert out.sum(1).tolist() == [2] * 10 and every.min() >= 200
    for digit in range(10):                            # seen with every word, although not with every pair
        seen = (every[digit] * ~out[digit]).reshape(3, 3)
        assert seen.sum(0).min() > 400 and seen.sum(1).min() > 400
    assert bool(held_out(7, 2, 2)), "the prompt that the lessons show is a triple never seen"
    kept = captioned("train", limit=3000, variants=1)
    assert torch.equal(kept.images, data.images[:3000][~out.flatten()[number[:3000]]])
    assert len(captioned("train", limit=3000, variants=1, without_held_out=False)) == 3000


# ------------------------------------------------------------------ words
def test_usual_captions():
    assert caption(7, {"thickness": 2, "slant": 2}) == "a thick seven leaning right"
    assert caption(8) == "an eight" and caption(1) == "a one" and caption(3, {"slant": 1}) == "an upright three"
    assert caption(3, {"thickness": 0, "width": 2, "size": 0, "x": 0, "y": 0}) == \
        "a thin wide small three in the upper left"
    assert caption(3, {"x": 1, "y": 1}) == "a three in the middle"
    assert scene_caption((3, {}), (7, {})) == "a three left of a seven"


def test_paraphrases_mean_the_same():
    for text in ("three", "3", "a three", "the digit 3", "A THREE.", "handwritten three"):
        assert read_caption(text) == [{"digit": 3}], text
    for text in ("a thick seven leaning right", "bold 7, slanted right", "the digit 7, leaning right, thick"):
        assert read_caption(text) == [{"digit": 7, "thickness": 2, "slant": 2}], text
    for text in ("a three left of a seven", "7 right of the digit 3", "a seven right of a three"):
        assert read_caption(text) == [{"digit": 3}, {"digit": 7}], text
    assert read_caption("a three leaning left left of a thin seven") == [{"digit": 3, "slant": 0},
                                                                         {"digit": 7, "thickness": 0}]
    assert read_caption("a 3 in the upper left") == [{"digit": 3, "y": 0, "x": 0}]
    assert read_caption("a 3 in the middle") == [{"digit": 3, "y": 1, "x": 1}]
    assert read_caption("") == read_caption(" , ") == []
    for text in ("a", "a handwritten digit"):
        with pytest.raises(UserError, match="names no digit"):
            read_caption(text)


def random_wish(rng):
    wish = {name: rng.randrange(3) for name in rules.THRESHOLDS if name not in "xy" and rng.random() < 0.7}
    return wish | ({"x": rng.randrange(3), "y": rng.randrange(3)} if rng.random() < 0.5 else {})


def test_captions_are_read_as_they_were_written():
    rng, seen = random.Random(0), set()
    for _ in range(1000):
        left, right = ((rng.randrange(10), random_wish(rng)) for _ in range(2))
        assert read_caption(caption(*left)) == [{**dict(reversed(list(left[1].items()))), "digit": left[0]}]
        text = caption(*left, rng)
        (one,) = read_caption(text)
        assert one.items() <= {"digit": left[0], **left[1]}.items() and one["digit"] == left[0], text
        scene = scene_caption(left, right, rng)
        for one, (digit, wish) in zip(read_caption(scene), (left, right), strict=True):
            assert one["digit"] == digit and one.items() <= {"digit": digit, **wish}.items(), scene
        seen.update(rules.words_of(scene))
        Tokenizer()([text]), Tokenizer(length=32)([scene])
    assert seen == set(rules.WORDS[2:])                # no word is never used


@pytest.mark.parametrize("text, message", [
    ("a thick cat", "'cat'.*zero one two.*leaning"), ("<pad>", "'<pad>'"), ("thick", "no digit"),
    ("a thick thin three", "two different things"), ("three seven", "two different things"),
    ("a seven leaning", "leaning left or leaning right"), ("a left seven", "'left' mean"),
    ("a three left of", "no digit"), ("three left of four left of five", "'left' mean")])
def test_captions_that_cannot_be_read(text, message):
    with pytest.raises(UserError, match=message):
        read_caption(text)


# ------------------------------------------------------------------ the tokenizer
def test_tokens():
    tokenizer = Tokenizer(length=8)
    tokens = tokenizer(["a thick seven", ""])
    assert tokens.shape == (2, 8) and tokens.dtype == torch.int64
    assert tokens[1].tolist() == [1] + [0] * 7         # the null caption: the start token and padding
    assert tokens[0, 0] == 1 and (tokens[0] != 0).sum() == 4
    assert tokenizer.text(tokens[0]) == "a thick seven" and tokenizer.text(tokens[1]) == ""
    assert tokenizer([]).shape == (0, 8)
    assert torch.equal(tokenizer(["A THICK, seven."]), tokens[:1])
    assert len(tokenizer) == len(set(rules.WORDS)) == len(rules.WORDS) < 100
    assert Tokenizer((*rules.WORDS, "plus"))(["two plus one"])[0, 2] == len(rules.WORDS)


def test_a_word_that_is_not_known_is_an_error_with_the_words_that_are():
    with pytest.raises(UserError) as error:
        Tokenizer()(["a purple seven"])
    assert "'purple'" in str(error.value) and all(word in str(error.value).split() for word in rules.WORDS[2:])
    for word in ("<pad>", "<start>"):
        with pytest.raises(UserError, match=word):
            Tokenizer()([word])
    with pytest.raises(UserError, match="16 words; at most 15"):
        Tokenizer()(["a " * 16])


# ------------------------------------------------------------------ images with captions
@pytest.mark.parametrize("kind, width, length", [("single", 28, 16), ("placed", 28, 16), ("scene", 56, 24)])
def test_images_and_captions_agree(kind, width, length):
    words = ("thickness", "slant", "width") + (("size", "x", "y") if kind == "placed" else ())
    data = captioned("test", 8, limit=200, kind=kind, words=words, variants=2)
    d = 2 if kind == "scene" else 1
    assert data.images.shape[1:] == (1, 28, width) and data.images.dtype == torch.uint8 and len(data) > 100
    assert data.labels.shape == (len(data), 2, length) and data.digit.shape == (len(data), d)
    assert not held_out(data.digit, data.levels["thickness"], data.levels["slant"]).any()
    for texts, rows in zip(data.captions, data.labels):
        assert torch.equal(data.tokenizer(texts), rows)
    for k in range(2):                                 # the pixels do what the captions say
        share = follow(to_float(data.images), [texts[k] for texts in data.captions])
        assert all(share[name] == 1 for name in words) and share["attributes"] == 1
        assert share["all"] == share["accuracy"] > (0.6 if kind == "placed" else 0.97)     # not what the judge learned
    same = captioned("test", 8, limit=200, kind=kind, words=words, variants=2)
    assert same.captions == data.captions and torch.equal(same.images, data.images)


def test_batches_depend_on_the_step_alone():
    data, again = (captioned("test", 8, seed=1, limit=200, variants=4) for _ in range(2))
    steps = [data.batch(step) for step in range(60)]
    for step in (59, 3, 17):
        assert all(torch.equal(a, b) for a, b in zip(again.batch(step), steps[step]))
    x0, tokens = steps[0]
    assert x0.shape == (8, 1, 28, 28) and tokens.shape == (8, 16) and x0.min() == -1 and x0.max() == 1
    known = {bytes(image.numpy()): rows for image, rows in zip(data.images, data.labels)}
    variants = set()
    for x0, tokens in steps:
        for image, row in zip(((x0 + 1) * 127.5).round().to(torch.uint8), tokens):
            rows = known[bytes(image.numpy())]
            assert (rows == row).all(1).any()
            variants.update((rows == row).all(1).nonzero().flatten().tolist())
    assert variants == {0, 1, 2, 3}                    # each of the captions is used
    left, right = (data.batch(5, rank, 2)[0] for rank in (0, 1))
    assert torch.equal(torch.stack([left, right], 1).flatten(0, 1), data.batch(5)[0])


@pytest.mark.parametrize("kind", ["single", "placed", "scene"])
@pytest.mark.parametrize("words", [(), ("thickness",), ("slant", "width"), ("size", "x", "y"), tuple(rules.THRESHOLDS)])
def test_words_that_never_occur_are_not_known(kind, words):
    data = captioned("test", 1, limit=200, kind=kind, words=words, variants=8, tokenizer=Tokenizer(length=40))
    said = {word for texts in data.captions for text in texts for word in rules.words_of(text)}
    known = set(rules.vocabulary(words, kind)[2:])
    assert said == known if kind == "placed" or "x" not in words else said < known     # MNIST's own are in the middle
    own = captioned("test", 1, limit=10, kind=kind, words=words).tokenizer
    assert own.words == rules.vocabulary(words, kind) and own.words[:2] == ("<pad>", "<start>")


def test_bad_requests():
    with pytest.raises(UserError, match="kind=mosaic must be one of single, placed, scene"):
        captioned("test", limit=10, kind="mosaic")
    with pytest.raises(UserError, match="'colour' is not an attribute: choose of thickness"):
        captioned("test", limit=10, words=("colour",))


def test_placed_digits_stay_on_the_canvas():
    images = digits("test").images[:300]
    moved = rules.placed(images)
    assert moved.shape == images.shape and moved.dtype == torch.uint8 and torch.equal(moved, rules.placed(images))
    ink = moved.float().sum((1, 2, 3)) / images.float().sum((1, 2, 3))
    assert 0.3 < ink.min() and ink.max() < 1.05        # nothing is cut off: the ink shrinks by 0.36 to 1
    found = measure(to_float(moved))
    assert found["size"].min() < 13 and found["x"].std() > 2 and found["y"].std() > 2


def test_follow_counts_what_was_asked():
    x, labels = digits("test").first(50)
    found = attributes(x)
    names = [caption(int(label)) for label in labels]
    assert follow(x, names) == {"accuracy": 1.0, "attributes": 1.0, "all": 1.0}
    texts = [caption(int(label), {"thickness": int(level)}) for label, level in zip(labels, found["thickness"])]
    assert follow(x, texts)["thickness"] == 1.0
    wrong = [caption(int(label), {"thickness": (int(level) + (i < 10)) % 3})
             for i, (label, level) in enumerate(zip(labels, found["thickness"]))]
    assert follow(x, wrong) == {"accuracy": 1.0, "thickness": 0.8, "attributes": 0.8, "all": 0.8}
    assert follow(x, [caption((int(label) + 1) % 10) for label in labels])["accuracy"] == 0
    assert follow(x[:2], ["", ""]) == {}
    with pytest.raises(UserError, match="asks for 2 digits"):
        follow(x[:1], ["a three left of a seven"])
