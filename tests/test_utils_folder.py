"""A reader's own images, FashionMNIST, other sizes and colours: utils/folder.py, utils/data.py, and what a run says."""

import gzip
import hashlib
import json
import os
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, load
from utils import Run, UserError, Weights, digits, save_weights
from utils import downloads as module
from utils.config import Section
from utils.data import load_images, parts, shape_of, told
from utils.downloads import idx_bytes
from utils.folder import files_of, read_folder, read_image

GREY, COLOUR = (1, 28, 28), (3, 20, 20)


def picture(path, colour=(200, 10, 90), size=(28, 28), **options):
    """Write an image of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


@pytest.fixture
def classes(tmp_path):
    """my/b, my/a and my/c with 20, 10 and 5 images; image k of class c is of the grey level 10 c + k."""
    for c, (name, count) in enumerate({"a": 10, "b": 20, "c": 5}.items()):
        for k in range(count):
            picture(tmp_path / "my" / name / f"{k:02d}.png", (10 * c + k,) * 3)
    return tmp_path / "my"


def snapshot(folder):
    return {path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in [folder, *folder.rglob("*")]}


# ------------------------------------------------------------------ which files
def test_a_folder_of_images_has_no_classes(tmp_path):
    for name in ("b.PNG", "a.jpg", "c.webp", ".hidden.png"):
        picture(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "labels").mkdir()                      # without an image in it
    found, names = files_of(tmp_path)
    assert [(path.name, label) for path, label in found] == [("a.jpg", 0), ("b.PNG", 0), ("c.webp", 0)] and names == ()


def test_classes_are_folders_in_the_order_of_their_names(classes, capsys):
    picture(classes / "b" / "deeper" / "x.png")
    picture(classes / "b" / ".thumbnails" / "x.png")
    (classes / "b" / "readme.md").write_text("no image")
    (classes / "nothing").mkdir()
    (classes / "b" / "back").symlink_to(classes)       # links that lead back to where they are
    (classes / "again").symlink_to(classes)
    found, names = files_of(classes)
    assert names == ("a", "b", "c") and [label for _, label in found] == [0] * 10 + [1] * 21 + [2] * 5
    assert all(names[label] in path.parts for path, label in found)
    warned = capsys.readouterr().err
    assert warned.count("\n") == 1 and "the class folder nothing in" in warned and "holds no image: left out" in warned


def test_a_link_to_a_class_folder_or_an_image_is_followed(tmp_path):
    target = picture(tmp_path / "elsewhere" / "one.png")
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "linked").symlink_to(target.parent)
    assert [path.name for path, _ in files_of(tmp_path / "my")[0]] == ["one.png"]
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "link.png").symlink_to(target)
    assert read_folder(tmp_path / "flat", GREY)[0].shape == (1, *GREY)


def test_what_is_no_folder_of_images_is_one_line(tmp_path, classes):
    (tmp_path / "empty").mkdir()
    picture(tmp_path / "mixed" / "x.png")
    picture(tmp_path / "mixed" / "sub" / "y.png")
    picture(tmp_path / "single" / "x.png")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo.heic").write_text("?")
    lines = {tmp_path / "empty": r"holds no image: none of what is in it \(0\) ends in .png",
             tmp_path / "other": r"holds no image: none of what is in it \(1\) ends in .png",
             tmp_path / "mixed": "holds 1 images and also the folder sub with some: put every image into a class",
             tmp_path / "single": "holds a single image", tmp_path / "absent": "is no folder here, and none of the",
             classes / "a" / "00.png": "is a file", "fasion": "did you mean fashion", "": "is no folder here"}
    for folder, line in lines.items():
        with pytest.raises(UserError, match=line) as info:
            load_images(str(folder))
        assert "\n" not in str(info.value)


# ------------------------------------------------------------------ what is in a file
def test_an_image_is_cut_to_its_middle_and_scaled(tmp_path):
    wide = np.zeros((40, 100), np.uint8)
    wide[:, 30:70] = 255                               # the square in the middle, and black on both sides
    Image.fromarray(wide).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png", GREY).min() > 240
    Image.fromarray(np.ascontiguousarray(wide.T)).save(tmp_path / "y.png")
    assert read_image(tmp_path / "y.png", GREY).min() > 240
    exact = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
    Image.fromarray(exact).save(tmp_path / "z.png")
    assert np.array_equal(read_image(tmp_path / "z.png", GREY)[0], exact)              # nothing to do, nothing done


def test_grey_and_colour(tmp_path):
    picture(tmp_path / "x.png", (200, 10, 90), size=(64, 50))
    x = read_image(tmp_path / "x.png", COLOUR)
    assert x.shape == COLOUR and x.dtype == torch.uint8 and x[:, 3, 4].tolist() == [200, 10, 90]
    assert read_image(tmp_path / "x.png", GREY).unique().tolist() == [76]              # 0.299 R + 0.587 G + 0.114 B
    exact = np.random.default_rng(1).integers(0, 256, (20, 20, 3), np.uint8)
    Image.fromarray(exact).save(tmp_path / "y.png")
    assert np.array_equal(read_image(tmp_path / "y.png", COLOUR).permute(1, 2, 0), exact)


def test_transparent_is_white_and_sixteen_bits_keep_their_levels(tmp_path):
    Image.new("RGBA", (28, 28), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("LA", (28, 28), (0, 0)).save(tmp_path / "clear2.png")
    Image.new("P", (28, 28)).save(tmp_path / "clear3.png", transparency=0)
    for name in ("clear.png", "clear2.png", "clear3.png"):
        assert read_image(tmp_path / name, GREY).unique().tolist() == [255]
    Image.fromarray(np.full((28, 28), 257 * 99, np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png", GREY).unique().tolist() == [99]


def test_a_photo_is_turned_as_the_camera_says_and_read_at_a_fraction(tmp_path):
    x = np.zeros((1600, 800), np.uint8)
    x[:1000] = 255                                     # of the square in the middle the upper three quarters
    exif = Image.Exif()
    exif[0x0112] = 6                                   # turn by 90 degrees, clockwise
    Image.fromarray(x).save(tmp_path / "x.jpg", exif=exif, quality=95)
    turned = read_image(tmp_path / "x.jpg", GREY)[0].float()
    assert turned[:, 9:].min() > 250 and turned[:, :5].max() < 5           # what was above is now on the right


def header_only(path, width, height):
    """A PNG that promises a size and holds nothing."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
                     + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


def test_what_cannot_be_read_is_left_out_and_said(classes, capsys):
    whole = (classes / "b" / "03.png").read_bytes()
    (classes / "b" / "03.png").write_bytes(whole[:len(whole) // 2])
    (classes / "a" / "text.png").write_text("no image")
    (classes / "c" / "broken.png").symlink_to("nowhere.png")
    header_only(classes / "a" / "huge.png", 40_000, 40_000)
    before = snapshot(classes)
    images, labels, names = read_folder(classes, GREY)
    assert images.shape == (34, *GREY) and torch.bincount(labels).tolist() == [10, 19, 5] and names == ("a", "b", "c")
    assert [int(x.unique()) for x in images] == [*range(10), *(10 + k for k in range(20) if k != 3), *range(20, 25)]
    warned = capsys.readouterr().err
    assert warned.startswith(f"warning: 4 of 38 images in {classes} cannot be read, the first is {classes}/a/huge.png")
    assert "exceeds limit" in warned and warned.count("\n") == 1 and snapshot(classes) == before
    for path in classes.rglob("*.png"):
        path.unlink()
        path.write_text("no image")
    with pytest.raises(UserError, match="38 of 38 images .* cannot be read, the first is .* .it is no image."):
        read_folder(classes, GREY)


def test_images_are_read_once_until_a_file_changes(classes, monkeypatch):
    read_folder(classes, COLOUR)
    monkeypatch.setattr("utils.folder.read_image", lambda *_: pytest.fail("read again"))
    assert len(read_folder(classes, COLOUR)[0]) == 35
    monkeypatch.undo()
    picture(classes / "a" / "00.png", (99, 99, 99), size=(30, 30))
    assert int(read_folder(classes, COLOUR)[0][0].unique()) == 99


# ------------------------------------------------------------------ a data set of them
def test_every_tenth_of_a_class_is_for_testing(classes):
    train, test = (load_images(str(classes), split=split, batch_size=1) for split in ("train", "test"))
    assert torch.bincount(train.labels).tolist() == [9, 18, 5] and torch.bincount(test.labels).tolist() == [1, 2]
    levels = [int(x.unique()) for x in torch.cat([train.images, test.images])]
    assert sorted(levels) == sorted([*range(10), *range(10, 30), *range(20, 25)])      # each image is in one of them
    assert train.name == test.name == "my/" and train.classes == ("a", "b", "c") and train.is_own
    few = load_images(str(classes), batch_size=8, limit=12)
    assert torch.equal(few.images, train.images[:12]) and (few.labels.diff() < 0).any()          # mixed, not by name
    assert [len(part) for part in parts(torch.zeros(3)).values()] == [2, 1]            # one at least
    with pytest.raises(UserError, match="batch_size=33 must be between 1 and 32"):
        load_images(str(classes), batch_size=33)


def test_classes_follow_the_data(classes):
    data = load_images(str(classes), batch_size=1)
    assert data.with_classes(Section(dim=3, classes="auto")) == Section(dim=3, classes=3)
    assert data.with_classes(Section(classes=5)).classes == 5
    with pytest.raises(UserError, match="classes=2 are too few for my/: 0 a, 1 b, 2 c; leave classes out"):
        data.with_classes(Section(classes=2))
    with pytest.raises(UserError, match="the images in a/ have none: sort them into one folder for each class"):
        load_images(str(classes / "a"), batch_size=1).with_classes(Section(classes="auto"))
    assert digits("test").with_classes(Section(classes="auto")).classes == 10
    assert told(data.classes) == "0 a, 1 b, 2 c" and told("0123456789") == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert told(()) == "it has no classes" and told(["x"] * 14, 2) == "0 x, 1 x and 12 more"


def test_mnist_in_other_sizes_and_colours():
    x = digits("test", 1, limit=20)
    large, small = (load_images("mnist", shape, "test", 1, limit=20) for shape in ((1, 32, 32), COLOUR))
    assert large.images.shape == (20, 1, 32, 32) and small.images.shape == (20, *COLOUR)
    assert (small.images[:, 0] == small.images[:, 2]).all() and torch.equal(x.labels, small.labels)
    back = torch.nn.functional.interpolate(large.images.float(), size=(28, 28), mode="bilinear", antialias=True)
    assert (back - x.images).abs().mean() < 8 and small.shape == COLOUR and large.about["shape"] == [1, 32, 32]
    for channels in (2, 4):
        with pytest.raises(UserError, match=f"image_channels={channels} must be 1"):
            load_images("mnist", (channels, 28, 28))


def test_shape_of_a_networks_section():
    assert shape_of(Section(image_size=20, image_channels=3)) == COLOUR and shape_of(Section(image_size=28)) == GREY
    assert shape_of(Section(shape=[3, 20, 20])) == COLOUR
    with pytest.raises(UserError, match=r"shape=\[28, 28\] must be three numbers"):
        shape_of(Section(shape=[28, 28]))


def test_mean_and_deviation_of_mnist_are_the_known_ones():
    assert digits("train").mean_std() == (0.1307, 0.3081)


# ------------------------------------------------------------------ FashionMNIST
@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """Tiny files in the place of FashionMNIST's, an empty MNIST_DIR, and a list of addresses that are asked."""
    from torchvision.datasets import FashionMNIST

    images = np.arange(2 * 784, dtype=np.uint32).astype(np.uint8).reshape(2, 28, 28)
    files = {f"{part}-{kind}-ubyte.gz": gzip.compress(idx_bytes(array), mtime=0) for part in ("train", "t10k")
             for kind, array in (("images-idx3", images), ("labels-idx1", np.uint8([9, 1])))}
    asked = []
    monkeypatch.setenv("MNIST_DIR", str(tmp_path))
    monkeypatch.setattr(module, "_seen", set())
    monkeypatch.setattr(FashionMNIST, "resources", [(k, hashlib.md5(v).hexdigest()) for k, v in files.items()])
    monkeypatch.setattr(module, "_download", lambda url, end: asked.append(url) or files[url.rpartition("/")[2]])
    return asked


def test_fashion_is_fetched_once_and_verified(fashion, tmp_path, monkeypatch):
    data = load_images("fashion", split="test", batch_size=1)
    assert data.labels.tolist() == [9, 1] and data.images[0, 0, 0, :3].tolist() == [0, 1, 2] and len(fashion) == 4
    assert data.name == "fashion" and data.classes[9] == "ankle boot" and not data.is_own
    monkeypatch.setattr(module, "_seen", set())
    assert len(load_images("fashion", batch_size=2)) == 2 and len(fashion) == 4        # nothing is asked again
    path = tmp_path / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(b"mine")
    monkeypatch.setattr(module, "_seen", set())
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte.gz is not FashionMNIST's file of that name"):
        load_images("fashion")
    assert path.read_bytes() == b"mine"


def test_fashion_without_a_network_is_one_line(fashion, tmp_path, monkeypatch):
    def unreachable(url, end):
        raise OSError(f"{url} cannot\nbe reached")

    monkeypatch.setattr(module, "_download", unreachable)
    with pytest.raises(UserError) as info:
        load_images("fashion")
    text = str(info.value)
    assert text.startswith("no FashionMNIST: tried the folder") and "\n" not in text and "cannot be reached" in text
    assert "put the files train-images-idx3-ubyte.gz, " in text and str(tmp_path / "FashionMNIST" / "raw") in text
    assert [name for name in os.listdir(tmp_path / "FashionMNIST" / "raw") if name != ".lock"] == []


# ------------------------------------------------------------------ a training on them, and what its weights know
KEYS = "smoke=true", "gpu=false", "device=cpu", "threads=1"
SIZE = "image_size=20", "image_channels=3"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """lesson_05, trained for some steps on 20 x 20 colour images of two classes."""
    place = tmp_path_factory.mktemp("own")
    for c, name in enumerate(("dots", "lines")):
        for k in range(10):
            picture(place / "my images" / name / f"{k}.png", (20 * k, 99 * c, 255 - 20 * k), size=(30, 24))
    data, runs = place / "my images", place / "runs"
    argv, before = [*KEYS, *SIZE, f"data={data}", f"runs={runs}"], snapshot(data)
    return SimpleNamespace(place=place, data=data, argv=argv, before=before,
                           **vars(load("lesson_05", "train").main(argv)))


def test_weights_say_what_they_learned_from(trained):
    weights = Weights(trained.weights, "lesson_05")
    assert dict(weights.data) == {"name": "my images/", "shape": [3, 20, 20], "classes": ["dots", "lines"],
                                  "images": 18}
    assert weights.config["unet"].image_channels == 3 and str(trained.place) not in str(trained.weights.read_bytes())
    assert json.loads((trained.folder / "run.json").read_text())["data"]["source"] == str(trained.data)
    with Image.open(trained.folder / "preview_000003.png") as preview:     # 8 x 8 images, each pixel 2 x 2
        assert preview.size == (2 * (8 * 21 + 1),) * 2 and preview.mode == "RGB"
    assert snapshot(trained.data) == trained.before
    assert Weights(ROOT / "lesson_05/results/weights.safetensors", "lesson_05").data.name == "mnist"


def test_sampling_in_another_process_knows_the_shape(trained, launch):
    keys = [*KEYS, f"runs={trained.place / 'runs'}", "n=4", "npz=x.npz", "gif=x.gif", "figures=true"]
    script = launch("lesson_05/sample.py", *keys)
    assert script.wait() == 0, script.err
    assert "(trained on my images/: 0 dots, 1 lines)" in script.out and "4 images, 5 network calls each" in script.out
    assert np.load(trained.folder / "x.npz")["arr_0"].shape == (4, 20, 20, 3)
    with Image.open(trained.folder / "neighbours.png") as picture:         # samples above the nearest of the folder
        labels = picture.width - 2 * (4 * 21 + 1)      # beside the rows
        assert 0 < labels < 100 and picture.height == 2 * (2 * 21 + 1)


def test_what_only_mnist_has_is_refused_before_sampling(trained, monkeypatch, capsys):
    keys, model = [*KEYS, f"runs={trained.place / 'runs'}"], load("lesson_05", "model")
    monkeypatch.setattr(model.DDPM, "reverse", lambda *_: pytest.fail("sampled"))
    for wrong, line in (("metrics=true", "metrics=true: the scores compare with MNIST's digits of 28 x 28 pixels, and "
                         "these weights draw my images/ of 20 x 20: leave metrics out"),
                        ("publish=true", "publish=true is for what a lesson says of MNIST, and this is my images/")):
        with pytest.raises(UserError) as info:
            load("lesson_05", "sample").main([*keys, "n=100", wrong])
        assert str(info.value).startswith(line)
    with pytest.raises(UserError, match="publish=true is for what a lesson says of MNIST"):
        load("lesson_05", "train").main([*trained.argv, "publish=true"])
    for wrong in ("data=fashion", "train.data=fashion", "--data=my_images"):
        with pytest.raises(UserError, match=f"^{wrong}: what reproduce.py judges are claims about MNIST"):
            load("lesson_05", "reproduce").main([*keys, wrong])


def test_a_folder_that_is_gone_or_unknown_is_one_line(trained, tmp_path):
    net = load("lesson_05", "model").UNet(channels=8, mults=(1, 2), blocks=1, attention=(), groups=4, patch=2)
    made, out = json.loads((trained.folder / "run.json").read_text()), tmp_path / "weights.safetensors"
    save_weights(net, out, "lesson_05", {**made["data"], "name": "gone/"})
    run = Run(ROOT / "lesson_05" / "sample.py", [*KEYS, f"runs={tmp_path}", f"weights={out}"])
    assert run.weights().data.name == "gone/"
    with pytest.raises(UserError, match="learned from gone/, but no run.json beside them knows where that folder is"):
        run.images()
    (tmp_path / "run.json").write_text(json.dumps({"data": made["data"] | {"source": str(tmp_path / "gone")}}))
    with pytest.raises(UserError, match="data=.*gone is no folder here"):
        run.images()


@pytest.mark.parametrize("wrong", [
    {"name": 3}, {}, {"name": "x/", "shape": [1, 28]}, {"name": "x/", "shape": [1, 28, 0]}, [], "text",
    {"name": "x/", "shape": [1, 28, 9**9]}, {"name": "x/", "classes": [1]}])
def test_weights_of_another_hand_that_say_nonsense_of_their_data(wrong, tmp_path):
    from safetensors.torch import save_file

    meta = {"lesson": "lesson_05", "config": "{}", "data": json.dumps(wrong)}
    save_file({"x": torch.zeros(1)}, tmp_path / "w.safetensors", meta)
    with pytest.raises(UserError, match="does not fit this lesson .what it says about its data is no data set"):
        Weights(tmp_path / "w.safetensors", "lesson_05")
    meta = meta | {"data": '{"name": "mnist"}', "config": '{"unet": {"image_size": 20, "image_channels": 1}}'}
    save_file({"x": torch.zeros(1)}, tmp_path / "w.safetensors", meta)
    with pytest.raises(UserError, match=r"takes images of \(1, 20, 20\), and it learned from \(1, 28, 28\)"):
        Weights(tmp_path / "w.safetensors", "lesson_05")


def test_a_resumed_run_learns_from_the_same_images(trained, tmp_path):
    argv = [key if not key.startswith("runs=") else f"runs={tmp_path}" for key in trained.argv]
    folder = tmp_path / "smoke" / "001"
    load("lesson_05", "train").main(argv)
    (folder / "weights.safetensors").unlink()          # as if it had been stopped after its last checkpoint, step 3
    extra = picture(trained.data / "lines" / "more.png")
    try:
        with pytest.raises(UserError, match="cannot resume 001: its data my images/ had images=18, now 19; put that"):
            load("lesson_05", "train").main([*KEYS, f"runs={tmp_path}", "--resume"])
    finally:
        extra.unlink()
    assert load("lesson_05", "train").main([*KEYS, f"runs={tmp_path}", "--resume"]).steps == 6
