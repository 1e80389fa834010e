"""Seeds made from seeds: one for every epoch, step or process, that has nothing to do with its neighbours'."""

import hashlib

import torch


def derive(*numbers):
    """A seed below 2**63 for torch.manual_seed, made from whole numbers: `derive(seed, epoch)`.

    The first 8 bytes, big-endian, of the SHA-256 of the numbers in decimal with a space between them, without their
    topmost bit: derive(0, 1) hashes the three characters "0 1". The same on every machine and in every Python.
    """
    text = " ".join(str(int(number)) for number in numbers)
    return int.from_bytes(hashlib.sha256(text.encode("ascii")).digest()[:8], "big") % 2**63


def generators(seed, n):
    """A CPU generator for each of n images. Image i has the same noise for any n, batch size and device."""
    return [torch.Generator().manual_seed(derive(seed, image)) for image in range(n)]
