"""A reader's own images: a folder of them, or a folder of class folders, as one uint8 tensor.

Nothing is ever written there. What is read is kept in memory, and only there.
"""

import functools
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import UserError, disk_error

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def read_folder(folder, shape):
    """(images (N, C, H, W) uint8, labels (N,), names of the classes) of what `files_of` finds.

    Each is cut and scaled to `shape`, (C, H, W). Those that cannot be read are left out, and that is said.
    """
    found, classes = files_of(folder)
    images, labels, bad = _read(tuple((path, label, *_stamp(path)) for path, label in found), tuple(shape))
    if bad:
        path, reason = bad[0]
        text = f"{len(bad)} of {len(found)} images in {folder} cannot be read, the first is {path} ({reason})"
        if len(bad) == len(found):
            raise UserError(f"{text}: choose another folder with data=FOLDER")
        print(f"warning: {text}: left out", file=sys.stderr, flush=True)
    return images, labels, classes


def files_of(folder):
    """([(path, label), ...], names of the classes): the images of a folder, in the order of their names.

    Images that lie in folders of their own have classes: label k is the k-th of these folders by name, and what lies
    deeper belongs to it. Images that lie in `folder` itself have none: label 0, no names. Other files, and what is
    hidden, are ignored.
    """
    try:
        inside = sorted(path for path in Path(folder).iterdir() if not _hidden(path.name))
    except OSError as error:
        raise UserError(str(disk_error(error) or error).replace("runs=", "data=")) from None
    flat = [path for path in inside if path.suffix.lower() in ENDINGS and not path.is_dir()]
    itself = [Path(folder).resolve(), *Path(folder).resolve().parents]     # where a link may lead back to
    groups = {path.name: _below(path) for path in inside if path.is_dir() and path.resolve() not in itself}
    full = [name for name, paths in groups.items() if paths]
    if flat and full:
        raise UserError(f"{folder} holds {len(flat)} images and also the folder {full[0]} with some: put every image "
                        "into a class folder, or none")
    if not flat and not full:
        raise UserError(f"{folder} holds no image: none of what is in it ({len(inside)}) ends in {' '.join(ENDINGS)}; "
                        "choose another folder with data=FOLDER")
    if flat:
        return [(path, 0) for path in flat], ()
    if empty := sorted(groups.keys() - set(full)):
        print(f"warning: the class folder {empty[0]} in {folder} holds no image: left out", file=sys.stderr, flush=True)
    return [(path, label) for label, name in enumerate(full) for path in groups[name]], tuple(full)


def _below(folder):
    """All images in a folder and in those below it; of these, links are not followed."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _hidden(name)]
        found += [Path(place) / name for name in names if name.lower().endswith(ENDINGS) and not _hidden(name)]
    return sorted(found)


def _hidden(name):
    return name.startswith(".") or name == "__MACOSX"


def _stamp(path):
    """What changes when a file does."""
    try:
        state = path.stat()
    except OSError:                                    # a link that leads nowhere
        return 0, 0
    return state.st_mtime_ns, state.st_size


@functools.lru_cache(maxsize=1)
def _read(stamped, shape):
    """(images, labels, [(path, why it cannot be read), ...]) of ((path, label, time, size), ...)."""
    from tqdm import tqdm

    images, labels, bad = [], [], []
    for path, label, *_ in tqdm(stamped, "reading images", delay=2, leave=False, disable=None):
        try:
            images.append(read_image(path, shape))
            labels.append(label)
        except Exception as error:                     # whatever a damaged file provokes
            bad.append((path, "it is no image" if isinstance(error, UnidentifiedImageError) else
                        getattr(error, "strerror", None) or " ".join(str(error).split())))
    return torch.stack(images) if images else torch.empty(0), torch.tensor(labels), bad


def read_image(path, shape):
    """One image file as (C, H, W) uint8: the largest part in its middle that has the shape's sides, scaled to them.

    It is turned as the camera says, and what is transparent becomes white. Of a moving picture it is the beginning.
    """
    channels, height, width = shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)    # from twice that size on it is an error
        with Image.open(path) as file:
            file.draft("RGB", (2 * width, 2 * height))                     # a large JPEG is quickly read at a fraction
            image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I"):                     # 16 bits a pixel
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (width, height))
    return torch.from_numpy(np.array(image)).reshape(height, width, channels).permute(2, 0, 1).contiguous()
