"""Weights files: a network in fp16 with all that is needed to build it again, and which of them a script takes.

They also say what the network learned from: the data's name, the shape of an image, the names of the classes, how many
images there were. One that does not is of MNIST.
"""

import json
import os
from pathlib import Path

import torch

from .config import Section, within
from .data import CLASSES, shape_of
from .errors import Diverged, UserError
from .files import atomic, numbered


def misfit(path, reason):
    """The one line about a weights file that is whole and yet not one of this lesson as it is now."""
    return f"{path} does not fit this lesson ({reason}): choose another file with weights=FILE, or train again"


class Sections(dict):
    """The sections of a weights file; one that it does not have is the reader's to hear of."""

    def __init__(self, path, sections):
        super().__init__(sections)
        self.path = path

    def __missing__(self, name):
        raise UserError(misfit(self.path, f"it has no section {name}"))


MNIST = {"name": "mnist", "shape": [1, 28, 28], "classes": list(CLASSES["mnist"]), "images": 60_000}


class Weights:
    """A weights file: `.config` holds the sections its objects were made from, `.load(net)` fills a network.

    lessons: names of the lessons that it may be of. bounds: {(section, key): Bound} that its values are held to.
    `.data` says what it learned from: name, shape (None if that is no images), classes, images.
    """

    def __init__(self, path, *lessons, bounds=()):
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        self.loaded = False                            # until then an error is taken for one of the file: errors.cli
        if not self.path.is_file():
            raise UserError(f"{path} is a folder or a device, not a weights file" if self.path.exists() else
                            f"there is no weights file {path}")
        try:
            with safe_open(self.path, "pt") as file:
                meta = file.metadata() or {}
                self.state = {key: file.get_tensor(key) for key in file.keys()}
        except SafetensorError as error:
            raise UserError(f"{path} is not a readable safetensors file ({error}): choose another file "
                            "with weights=FILE, or train again") from None
        if bad := not_finite(self.state):
            raise UserError(f"{path} holds numbers that are not finite, the first in {bad[0]}: train again, or choose "
                            "another file with weights=FILE")
        if meta.get("lesson") not in lessons:
            raise UserError(f"{path} holds weights of {meta.get('lesson', 'something else')}, not of "
                            f"{' or '.join(dict.fromkeys(lessons))}: choose another file with weights=FILE")
        try:
            self.config = Sections(path, {
                name: Section(**values) for name, values in json.loads(meta["config"]).items()})
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{path} does not say how its network is built: train again") from None
        for section, key in bounds:
            if (values := self.config.get(section)) and key in values.keys():
                try:
                    within(f"{section}.{key}", values[key], bounds[section, key], "its configuration")
                except UserError as error:
                    raise UserError(misfit(path, error)) from None
        self.data = _learned(path, meta.get("data"))
        for section in self.config.values():
            if self.data.shape and hasattr(section, "image_size") and shape_of(section) != tuple(self.data.shape):
                raise UserError(misfit(path, f"its network takes images of {shape_of(section)}, and it learned from "
                                             f"{tuple(self.data.shape)}"))

    def load(self, net):
        """Copy the weights into `net` (float32). Every parameter must be there with its shape."""
        try:
            fill(net, {key: value.float() if value.is_floating_point() else value for key, value in self.state.items()})
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise UserError(misfit(self.path, reason)) from None
        self.loaded = True
        return net


def _learned(path, text):
    """What a weights file says about its data, as a Section."""
    try:
        said = json.loads(text) if text else MNIST
        usual = MNIST if said["name"] == "mnist" else {"shape": None, "classes": [], "images": 0}
        found = Section(**{**usual, **said})
        sizes = found.shape or [1, 1, 1]
        good = len(sizes) == 3 and all(type(size) is int and 0 < size <= 4096 for size in sizes)
        if not good or not all(isinstance(name, str) for name in [found.name, *found.classes]):
            raise ValueError
        return found
    except (KeyError, ValueError, TypeError, RecursionError):
        raise UserError(misfit(path, "what it says about its data is no data set")) from None


def not_finite(state):
    """The names of those tensors of a state that hold NaN or infinity."""
    return [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]


def save_weights(net, path, lesson, data=None, **config):
    """Write a network's weights in fp16, with its lesson and the configuration to rebuild it from. Returns the path.

    data: what it learned from, `Run.data` (default: MNIST); of that the name, shape, classes and number of images.
    """
    from safetensors.torch import save

    state = {key: (value.half() if value.is_floating_point() else value).contiguous().cpu()
             for key, value in state_of(net).items()}
    if bad := not_finite(state):
        raise Diverged(f"the weights are not finite ({bad[0]}): not written. Try a smaller lr or precision=fp32")
    with atomic(path) as temporary:
        told = {key: value for key, value in (data or MNIST).items() if key in MNIST}      # not where a folder is
        meta = {"lesson": lesson, "config": json.dumps(config), "data": json.dumps(told)}
        temporary.write_bytes(_ordered(save(state, meta)))
    return path


def _ordered(content):
    """A safetensors file with its metadata in a fixed order: safetensors' own is another in every process."""
    start = 8 + int.from_bytes(content[:8], "little")  # eight bytes, the length of the header; the header; tensors
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)                    # the tensors begin at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text + content[start:]


COMPILED = "_orig_mod."                                # what torch.compile puts into the names of a network's parts


def bare(module):
    """A network without the wrappers of several processes and of torch.compile."""
    while True:
        if isinstance(module, torch.nn.parallel.DistributedDataParallel):
            module = module.module
        elif hasattr(module, "_orig_mod"):
            module = module._orig_mod
        else:
            return module


def state_of(item):
    """The state of a network, an average or an optimizer, under the names that it has without such wrappers."""
    state = bare(item).state_dict()
    return {key.replace(COMPILED, ""): v for key, v in state.items()} if isinstance(item, torch.nn.Module) else state


def fill(item, state):
    """Give a network, an average or an optimizer, wrapped or not, a state that `state_of` took, wrapped or not."""
    item = bare(item)
    if isinstance(item, torch.nn.Module):
        names = {key.replace(COMPILED, ""): key for key in item.state_dict()}
        state = {names.get(plain := key.replace(COMPILED, ""), plain): value for key, value in state.items()}
    item.load_state_dict(state)


def choose(given, runs, published):
    """(path, what it is) of the weights that a script takes.

    given: config's `weights`, a path, "published" or "". runs: the folder of trainings, of which the newest counts.
    published: the published file, the last resort.
    """
    trained = [p / "weights.safetensors" for p in numbered(runs) if (p / "weights.safetensors").exists()]
    if given == "published" or not given and not trained and published.exists():
        return published, "published weights"
    if given:
        return Path(os.path.expanduser(given)), "given weights"
    if trained:
        return trained[-1], f"weights of your training run {trained[-1].parent.name}"
    raise UserError(f"no weights in {runs} and none published in {published.parent}: run `python train.py` first")
