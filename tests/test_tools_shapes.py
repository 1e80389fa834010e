"""tools/shapes.py: a folder of drawn shapes, which utils reads as images in four classes."""

import random

import numpy as np
import pytest
import torch

from tools import shapes
from utils.folder import read_folder


def test_a_folder_of_shapes_is_a_data_set(tmp_path, capsys):
    folder = tmp_path / "mine"
    assert shapes.main([str(folder), "6"]) == 0
    images, labels, names = read_folder(folder, (1, 28, 28))
    assert names == ("circle", "square", "star", "triangle") and torch.bincount(labels).tolist() == [6] * 4
    assert images.amax((1, 2, 3)).min() > 240 and images[:, :, [0, -1]].max() == 0     # white, and inside the picture
    assert len(images.flatten(1).unique(dim=0)) == 24  # each is another
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    assert shapes.main([str(folder), "9"]) == 2 and "exists already" in capsys.readouterr().err
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before


@pytest.mark.parametrize("name, area", [("circle", np.pi), ("square", 2.0), ("star", 5 * 0.45 * np.sin(np.pi / 5)),
                                        ("triangle", 3 * 3 ** 0.5 / 4)])
def test_areas(name, area):
    class Fixed(random.Random):
        def uniform(self, low, high):                  # the largest radius, no turn, in the middle
            return high if low > 0 else 0.0

    x = np.asarray(shapes.draw(name, Fixed()), float) / 255
    assert x.sum() == pytest.approx(area * (0.44 * 28) ** 2, rel=0.03)


def test_wrong_arguments_print_how_it_is_called(tmp_path, capsys):
    for argv, code in (([], 2), (["--help"], 0), ([str(tmp_path / "x"), "many"], 2), (["a", "1", "2"], 2)):
        assert shapes.main(argv) == code and "python -m tools.shapes" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
