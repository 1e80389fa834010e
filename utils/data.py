"""Images as one uint8 tensor: MNIST, FashionMNIST (downloads.py), or a folder of the reader's (folder.py)."""

import difflib
from pathlib import Path

import torch
import torch.nn.functional as F

from .config import Section
from .downloads import fashion_folder, mnist_folder, read_idx
from .errors import UserError
from .files import read_json
from .folder import read_folder
from .seeds import derive

CLASSES = {
    "mnist": tuple("0123456789"),
    "fashion": ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
}


class Images:
    """Images in memory, served in an order that the step number alone determines.

    images: (N, C, H, W) uint8; labels: (N,) int64. Every epoch is a new permutation, seeded by
    (seed, epoch); the last incomplete batch of an epoch is dropped.
    name: of the data set; a folder's ends in "/". classes: the names of the labels; none: they mean nothing.
    """

    def __init__(self, images, labels, batch_size=64, seed=0, name="mnist", classes=CLASSES["mnist"]):
        if not 0 < batch_size <= len(images):
            raise UserError(f"batch_size={batch_size} must be between 1 and {len(images)}, the number of images")
        self.images, self.labels, self.batch_size, self.seed = images, labels, batch_size, seed
        self.name, self.classes = name, tuple(classes)
        self.steps_per_epoch = len(images) // batch_size
        self._epoch, self._order = None, None

    def __len__(self):
        return len(self.images)

    @property
    def is_own(self):
        """Whether these are a folder of the reader's."""
        return self.name.endswith("/")

    @property
    def shape(self):
        """(C, H, W) of an image."""
        return tuple(self.images.shape[1:])

    @property
    def about(self):
        """What weights say of the data that they learned from: name, shape, classes, how many images."""
        return {"name": self.name, "shape": list(self.shape), "classes": list(self.classes), "images": len(self)}

    def batch(self, step, rank=0, world=1):
        """The batch of step number `step` (from 0): x0 (B, C, H, W) in [-1, 1], labels (B,).

        With several processes each gets its own slice of the batch, B = batch_size / world.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derive(self.seed, epoch))
            self._epoch, self._order = epoch, torch.randperm(len(self), generator=generator)
        index = self._order[position * self.batch_size:(position + 1) * self.batch_size][rank::world]
        return to_float(self.images[index]), self.labels[index]

    def first(self, n, shuffle_seed=None):
        """n images as floats in [-1, 1] and their labels: the first n, or n drawn without repetition."""
        if not 0 < n <= len(self):
            raise UserError(f"n={n} must be between 1 and {len(self)}, the size of this data set")
        index = torch.arange(n)
        if shuffle_seed is not None:
            index = torch.randperm(len(self), generator=torch.Generator().manual_seed(shuffle_seed))[:n]
        return to_float(self.images[index]), self.labels[index]

    def all(self):
        """All images as floats in [-1, 1]."""
        return to_float(self.images)

    def ordered(self, seed, label=None):
        """These images, or those of one class, in the order of another seed."""
        mine = slice(None) if label is None else self.labels == label
        if label is not None and not mine.any():
            raise UserError(f"there is no class {label} in {self.name}: {told(self.classes)}")
        return Images(self.images[mine], self.labels[mine], self.batch_size, seed, self.name, self.classes)

    def with_classes(self, section):
        """A network's section of the configuration in which `classes: auto` has become the number of classes."""
        if not self.classes:
            raise UserError(f"this lesson learns classes, and the images in {self.name} have none: sort them into one "
                            "folder for each class, or choose a lesson without classes")
        count = len(self.classes) if section.classes == "auto" else section.classes
        if count < len(self.classes):
            raise UserError(f"classes={count} are too few for {self.name}: {told(self.classes)}; leave classes out")
        return Section(**{**section, "classes": count})

    def mean_std(self):
        """Mean and standard deviation of all values in [0, 1], rounded to four digits."""
        x = self.images.float() / 255
        return round(x.mean().item(), 4), round(x.std().item(), 4)


def told(classes, most=12):
    """The classes with their numbers, as in "0 circle, 1 square"."""
    shown = [name if name == str(k) else f"{k} {name}" for k, name in enumerate(classes[:most])]
    return ", ".join(shown) + f" and {len(classes) - most} more" * (len(classes) > most) or "it has no classes"


def digits(split="train", batch_size=64, seed=0, limit=None):
    """MNIST's "train" (60,000) or "test" (10,000) images, or the first `limit` of them, as `Images`."""
    return load_images("mnist", split=split, batch_size=batch_size, seed=seed, limit=limit)


def load_images(data, shape=(1, 28, 28), split="train", batch_size=64, seed=0, limit=None):
    """`Images` of a data set, "mnist", "fashion" or the path of a folder, scaled to `shape`, (C, H, W).

    Of a folder every tenth image of each class, by a fixed order, is for testing. limit: the first so many of a split.
    """
    if shape[0] not in (1, 3):
        raise UserError(f"image_channels={shape[0]} must be 1 (grey) or 3 (red, green, blue)")
    if data in CLASSES:
        folder, end = (mnist_folder(), "") if data == "mnist" else (fashion_folder(), ".gz")
        part, name, classes = {"train": "train", "test": "t10k"}[split], data, CLASSES[data]
        images = fit(read_idx(folder / f"{part}-images-idx3-ubyte{end}").unsqueeze(1)[:limit], shape)
        labels = read_idx(folder / f"{part}-labels-idx1-ubyte{end}").long()[:limit]
    else:
        folder = find_folder(data)
        images, labels, classes = read_folder(folder, shape)
        if len(images) < 2:
            raise UserError(f"{folder} holds a single image: there is nothing to learn from fewer than two")
        index, name = parts(labels)[split][:limit], f"{folder.resolve().name}/"
        images, labels = images[index], labels[index]
    return Images(images, labels, batch_size, seed, name, classes)


def shape_of(section):
    """(C, H, W) of the images that a network takes, from its section: image_channels and image_size, or shape."""
    if hasattr(section, "shape"):
        if len(section.shape) != 3:
            raise UserError(f"shape={section.shape} must be three numbers, as in [1, 28, 28]: channels, height, width")
        return tuple(section.shape)
    return getattr(section, "image_channels", 1), section.image_size, section.image_size


def source_of(about):
    """What `data` was in the run whose weights say this `about` themselves; "run": that run's run.json."""
    if not about["name"].endswith("/"):
        return about["name"]
    source = (read_json(about["run"]).get("data") or {}).get("source")
    if not source:
        raise UserError(f"these weights learned from {about['name']}, but no {about['run'].name} beside them knows "
                        "where that folder is: leave out what needs its images")
    return source


def find_folder(data):
    """The folder that `data` names; UserError if there is none."""
    folder = Path(data).expanduser()
    if not data or not folder.is_dir():
        near = difflib.get_close_matches(data, CLASSES, 1)
        what = "is a file" if data and folder.exists() else "is no folder here"
        raise UserError(f"data={data} {what}, and none of the names that --help gives: " + (
            f"did you mean {near[0]}?" if near else "name a folder of images, or one with a folder for each class"))
    return folder


def parts(labels):
    """The numbers of the images for training and for testing: every tenth of each class is for testing."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    tested = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        tested[order[labels[order] == label][9::10]] = True
    if len(labels) > 1 and not tested.any():
        tested[order[-1]] = True
    return {"train": order[~tested[order]], "test": order[tested[order]]}


def fit(images, shape):
    """Grey images (N, 1, H, W) uint8 as (N, *shape): scaled, and with all channels alike."""
    channels, *size = shape
    if list(images.shape[2:]) != size:
        scaled = [F.interpolate(part.float(), size=size, mode="bilinear", antialias=True).round().to(torch.uint8)
                  for part in images.split(5000)]
        images = torch.cat(scaled)
    return images.expand(-1, channels, -1, -1)


def to_float(images):
    """uint8 in 0..255 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x):
    """Floats in [-1, 1] (clipped) -> uint8 in 0..255, rounded to the nearest."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
