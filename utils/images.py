"""Pictures: grids, strips, animations, curves. Images are (N, C, H, W) in [-1, 1], C = 1 or 3."""

import io
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence

from .data import to_uint8
from .errors import Diverged
from .files import atomic
from .plots import ticks


def check_finite(x):
    """Diverged, with where it began, if images, or a list of batches of them (an animation), are not finite."""
    if isinstance(x, (list, tuple)):
        frames = [i for i, part in enumerate(x) if torch.is_tensor(part) and not part.isfinite().all()]
        if frames:
            raise Diverged(f"the images are not finite from batch {frames[0] + 1} of {len(x)} on: {_RAN_AWAY}")
    elif bad := [i for i, good in enumerate(x.isfinite().flatten(1).all(1).tolist()) if not good]:
        raise Diverged(f"{len(bad)} of {len(x)} images are not finite, the first is number {bad[0] + 1}: {_RAN_AWAY}")


_RAN_AWAY = "the sampler ran away and nothing of this is written; try less guidance, other steps or precision=fp32"


def _write(path, save):
    """Call `save(file)` on a file in memory and write that: whole or not at all, whatever the path's ending."""
    content = io.BytesIO()
    save(content)
    with atomic(path) as temporary:
        temporary.write_bytes(content.getvalue())
    return path


def grid(x, columns=None, scale=2, gap=1, across=(), down=()):
    """One picture of many: (N, C, H, W) in [-1, 1] -> PIL image, row by row, each pixel `scale` wide.

    across, down: what to write above the columns and to the left of the rows, if anything.
    """
    n, c, h, w = x.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    canvas = torch.full((c, rows * (h + gap) + gap, columns * (w + gap) + gap), 60, dtype=torch.uint8)
    for i, tile in enumerate(to_uint8(x.detach().cpu().float())):
        top, left = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        canvas[:, top:top + h, left:left + w] = tile
    array = canvas.permute(1, 2, 0).numpy()
    picture = Image.fromarray(array[..., 0] if c == 1 else array)
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    if not (across or down):
        return picture
    return _labelled(picture, columns, rows, list(map(str, across)), list(map(str, down)))


def _labelled(picture, columns, rows, across, down, size=14):
    """A grid in a white frame, with a text above every column and to the left of every row."""
    import matplotlib
    from PIL import ImageDraw, ImageFont

    font = ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size)
    left, top = math.ceil(max([font.getlength(text) + size for text in down], default=0)), 2 * size if across else 0
    framed = Image.new(picture.mode, (left + picture.width, top + picture.height), "white")
    framed.paste(picture, (left, top))
    draw, w, h = ImageDraw.Draw(framed), picture.width / columns, picture.height / rows
    for i, text in enumerate(across):
        draw.text((left + (i + 0.5) * w, top / 2), text, "black", font, anchor="mm")
    for i, text in enumerate(down):
        draw.text((left - size / 2, top + (i + 0.5) * h), text, "black", font, anchor="rm")
    return framed


def columns(classes):
    """How wide a grid is, ten images at most, in which each of so many classes, drawn in turn, has its columns."""
    return 10 // classes * classes or 10


def by_class(c, classes):
    """The layout of a grid of images of the classes c (n,): its columns and, where each holds one class, which."""
    wide = columns(classes)
    kinds = [set(c[i::wide].tolist()) for i in range(wide)]
    one = all(len(kind) <= 1 for kind in kinds) and int(c.max()) < classes      # the class `classes` is none
    return {"columns": wide, "across": ["".join(map(str, kind)) for kind in kinds] if one else ()}


def save_grid(x, path, columns=None, scale=2, across=(), down=()):
    """Write a grid of images as a PNG, `across` above its columns and `down` beside its rows. Returns the path."""
    picture = grid(x, columns, scale, across=across, down=down)
    return _write(path, lambda file: picture.save(file, "PNG"))


def save_strip(rows, path, scale=2, across=(), down=()):
    """Write a list of rows, each (N, C, H, W), under each other as a PNG, labelled as in `grid`. Returns the path."""
    return save_grid(torch.cat(list(rows)), path, columns=len(rows[0]), scale=scale, across=across, down=down)


GIF_FRAMES, GIF_BYTES = 24, 250_000                     # at most; every version of a picture stays in git for ever


def save_gif(frames, path, columns=None, scale=2, seconds=4.0, hold=1.5):
    """Write a list of batches (N, C, H, W) as an animation of grids that rests on the last. Returns the path.

    It has 16 greys and at most GIF_FRAMES of the frames, evenly chosen, the first and the last among them; fewer, but
    not below 8, where it would have GIF_BYTES or more.
    """
    count = min(len(frames), GIF_FRAMES)
    while len(content := _gif([grid(frames[i], columns, scale) for i in evenly(len(frames), count)],
                              seconds, hold)) >= GIF_BYTES and count > 8:
        count = max(8, min(count - 1, count * GIF_BYTES // len(content)))
    return _write(path, lambda file: file.write(content))


def evenly(n, count):
    """`count` of the numbers 0 to n - 1, evenly spaced, both ends included."""
    return [round(i * (n - 1) / max(count - 1, 1)) for i in range(count)]


def _gif(pictures, seconds, hold):
    """PIL images as an animated GIF of 16 colours, in bytes."""
    if pictures[0].mode == "L":
        palette = [17 * level for level in range(16) for _ in "RGB"]
        pictures = [Image.fromarray(((np.asarray(picture).astype(int) + 8) // 17).astype(np.uint8))
                    for picture in pictures]
        for picture in pictures:
            picture.putpalette(palette)
    else:
        pictures = [picture.quantize(16, dither=Image.Dither.NONE) for picture in pictures]
    duration = [int(1000 * seconds / len(pictures))] * (len(pictures) - 1) + [int(1000 * hold)]
    content = io.BytesIO()
    pictures[0].save(content, "GIF", save_all=True, append_images=pictures[1:], duration=duration, loop=0)
    return content.getvalue()


def frames(picture):
    """The frames of a PIL image and how long each is shown: ([image], [milliseconds])."""
    parts = [(part.convert("RGB"), part.info.get("duration", 0)) for part in ImageSequence.Iterator(picture)]
    return [part for part, _ in parts], [duration for _, duration in parts]


def animated_png(parts, durations, colours=256):
    """Images of one size, each shown for its milliseconds, as a PNG of at most so many colours, in bytes."""
    width, height = parts[0].size
    strip = Image.new("RGB", (width, height * len(parts)))              # one palette for all of them
    for i, part in enumerate(parts):
        strip.paste(part, (0, i * height))
    strip = strip.quantize(colours, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)      # keeps thin lines
    first, *rest = (strip.crop((0, i * height, width, (i + 1) * height)) for i in range(len(parts)))
    content = io.BytesIO()
    first.save(content, "PNG", optimize=True,
               **({"save_all": True, "append_images": rest, "duration": durations, "loop": 0} if rest else {}))
    return content.getvalue()


def show(picture, columns=None, scale=2, across=(), down=()):
    """Draw in a notebook: the file of a picture, or images (N, C, H, W) in [-1, 1] as a grid with labels, if given.

    An animation becomes an animated PNG: neither GitHub nor nbconvert draws the GIFs that a notebook holds.
    """
    from IPython.display import Image as Output
    from IPython.display import display

    picture = grid(picture, columns, scale, 1, across, down) if torch.is_tensor(picture) else Image.open(picture)
    display(Output(animated_png(*frames(picture)), format="png"))


def save_npz(x, path, labels=None):
    """Write images in the field's evaluation format: arr_0 uint8 (N, H, W, C), arr_1 the labels. Returns the path."""
    arrays = [to_uint8(x.detach().cpu().float()).permute(0, 2, 3, 1).numpy()]
    if labels is not None:
        arrays.append(torch.as_tensor(labels).cpu().numpy())
    return _write(path, lambda file: np.savez_compressed(file, *arrays))


PICTURES = (save_grid, save_strip, save_gif, save_npz)  # what takes images


def figure(rows=1, columns=1, width=5.0, height=3.2):
    """A matplotlib figure without a window, and its axes (one, or an array)."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return fig, fig.subplots(rows, columns)


def save_figure(fig, path):
    """Write a figure as a PNG. Returns the path."""
    return _write(path, lambda file: fig.savefig(file, format="png", dpi=110, metadata={"Software": None}))


def save_losses(records, path, smooth=20):
    """Plot the loss of metrics.jsonl's records (dicts with step and loss) over the steps, raw and smoothed."""
    fig, ax = figure()
    step, loss = np.array([r["step"] for r in records]), np.array([r["loss"] for r in records])
    ax.plot(step, loss, alpha=0.3, lw=0.8)
    k = min(smooth, len(loss))
    if k > 1:
        ax.plot(step[k - 1:], np.convolve(loss, np.ones(k) / k, mode="valid"), color="C0")
    ax.set(xlabel="training step", ylabel="loss")
    if (loss > 0).all():
        ax.set_yscale("log")
        ticks(ax.yaxis)
    ax.grid(alpha=0.3)
    return save_figure(fig, path)
