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


def batches(n, batch, generator):
    """n images in batches: the size of each and its random numbers, a part of a list of generators or the only one."""
    for i in range(0, n, batch):
        yield min(batch, n - i), generator[i:i + batch] if isinstance(generator, list) else generator


def noise(n, shape, generator):
    """Standard Gaussian noise for n images, on the CPU, (n, *shape); of a list of generators each image has its own."""
    if isinstance(generator, list):
        return torch.stack([torch.randn(shape, generator=one) for one in generator[:n]])
    return torch.randn(n, *shape, generator=generator)
