"""The small parts of utils: averages of weights, pictures, files, scores, the device; and what `import utils` costs."""

import ast
import copy
import errno
import io
import json
import os
import re
import stat
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import utils
from conftest import ROOT, load
from utils import (
    EMA,
    Run,
    UserError,
    atomic,
    classify,
    digits,
    fid_to_test,
    floor,
    plots,
    report,
    score,
    to_uint8,
    write_json,
)
from utils import images as pictures
from utils import scores as judging
from utils.device import auto_precision, check_processes, device_name, fast_bf16, peak_memory_mb
from utils.errors import Diverged, cli, disk_error
from utils.files import lock, read_json, update_json
from utils.seeds import generators


# ------------------------------------------------------------------ averages of weights
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        return self.norm(self.linear(x))


def test_ema_is_the_closed_form_of_its_warm_up():
    # weights(k) = w_k; the first update copies; with n updates done the decay is min(decay, (1 + n) / (10 + n)).
    net = Net().double()
    ema = EMA(net, decay=0.9)
    values = torch.linspace(-1, 1, 200, dtype=torch.float64).sin() * 3
    shares = torch.zeros(200, dtype=torch.float64)     # of each w_k in the average
    for n, value in enumerate(values):
        nn.init.constant_(net.linear.weight, value)
        ema.update(net)
        decay = min(0.9, (1 + n) / (10 + n)) if n else 0.0
        shares *= decay
        shares[n] += 1 - decay
        expected = (shares * values).sum().item()
        assert ema.module.linear.weight[0, 0].item() == pytest.approx(expected, abs=1e-13)
    assert shares.sum().item() == pytest.approx(1) and int(ema.n_averaged) == 200
    assert (1 + 79) / (10 + 79) < 0.9 < (1 + 82) / (10 + 82)          # both branches were seen


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_ema_of_a_share_is_as_long_as_its_run(share):
    # Weights that count the updates, w_k = k: with k^(1 / share - 1) as the weight of each, the mean of k / n is
    # 1 / (1 + share).
    net = nn.Linear(1, 1).double()
    ema, age = EMA(net, share=share), {}
    for n in range(1, 4001):
        nn.init.constant_(net.weight, float(n))
        ema.update(net)
        age[n] = ema.module.weight.item() / n
    assert age[4000] == pytest.approx(1 / (1 + share), abs=2e-3) and age[2000] == pytest.approx(age[4000], abs=2e-3)


def test_generators_of_images_and_their_batches():
    few, more = (utils.noise(n, (2, 3), generators(7, n)) for n in (3, 5))
    assert torch.equal(few, more[:3]) and len(more.flatten(1).unique(dim=0)) == 5
    assert not torch.equal(few, utils.noise(3, (2, 3), generators(8, 3)))
    assert torch.equal(utils.noise(3, (2, 3), utils.seeded(1)), torch.randn(3, 2, 3, generator=utils.seeded(1)))
    own, one = generators(0, 5), utils.seeded(0)
    assert list(utils.batches(5, 2, own)) == [(2, own[:2]), (2, own[2:4]), (1, own[4:])]
    assert list(utils.batches(5, 2, one)) == [(2, one), (2, one), (1, one)]


def test_ema_moves_and_ends_near_the_weights():
    net = Net()
    ema = EMA(net, 0.9)
    before = ema.module.linear.weight.clone()
    nn.init.constant_(net.linear.weight, 5.0)
    ema.update(net)
    assert torch.equal(ema.module.linear.weight, net.linear.weight)
    nn.init.constant_(net.linear.weight, 7.0)
    ema.update(net)
    assert 5 < ema.module.linear.weight[0, 0] < 7 and not torch.equal(ema.module.linear.weight, before)
    for _ in range(300):
        ema.update(net)
    assert torch.allclose(ema.module.linear.weight, net.linear.weight)
    assert net.linear.weight.requires_grad and net.training            # the network itself is left alone
    assert not ema.module.training and not any(p.requires_grad for p in ema.module.parameters())


def test_ema_copies_buffers_and_survives_a_checkpoint():
    net = Net()
    ema = EMA(net)
    for _ in range(3):
        net(torch.randn(8, 3))
        net.count += 1
        ema.update(net)
    assert torch.equal(ema.module.norm.running_mean, net.norm.running_mean) and int(ema.module.count) == 3
    other = EMA(Net())
    other.load_state_dict(copy.deepcopy(ema.state_dict()))
    nn.init.constant_(net.linear.weight, 2.0)
    for average in (ema, other):
        average.update(net)
    assert torch.equal(ema.module.linear.weight, other.module.linear.weight)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ema_of_a_prepared_network_is_a_network_of_its_own(tmp_path, precision):
    run = Run(ROOT / "lesson_05" / "train.py", ["smoke=true", f"runs={tmp_path}", f"precision={precision}",
                                                "device=cpu", "threads=1"])
    net = run.prepare(nn.Linear(3, 3))
    ema, x = EMA(net), torch.randn(5, 3)
    start = ema.module(x)
    assert start.dtype == torch.float32 and torch.equal(start, net(x))
    nn.init.constant_(net.weight, 1.0)
    assert torch.equal(ema.module(x), start) and not torch.equal(net(x), start)
    ema.update(net)
    assert torch.equal(ema.module(x), net(x))
    exact = nn.functional.linear(x, net.weight, net.bias)
    assert torch.equal(ema.module(x), exact) == (precision == "fp32")  # the average computes as the network does


# ------------------------------------------------------------------ pictures
@pytest.mark.parametrize("n, columns, size", [(64, None, (8, 8)), (5, None, (3, 2)), (1, None, (1, 1)), (6, 6, (6, 1)),
                                              (7, 3, (3, 3))])
def test_sizes_of_grids(tmp_path, n, columns, size):
    x = torch.rand(n, 1, 28, 28) * 2 - 1
    path = pictures.save_grid(x, tmp_path / "deep" / "grid.png", columns)
    with Image.open(path) as picture:
        assert picture.size == tuple(2 * (29 * count + 1) for count in size) and picture.mode == "L"
        array = np.asarray(picture)
    assert np.array_equal(array[2:58:2, 2:58:2], to_uint8(x[0, 0]).numpy())
    assert pictures.grid(torch.zeros(2, 3, 8, 8), scale=1).mode == "RGB"


def test_labels_stand_above_columns_and_beside_rows(tmp_path):
    x = torch.full((6, 1, 28, 28), -1.0)
    plain = pictures.grid(x, 3)
    with Image.open(pictures.save_grid(x, tmp_path / "grid.png", 3, across="abc", down=["w = 1", 2.5])) as picture:
        left, top = picture.width - plain.width, picture.height - plain.height
        assert left > 40 and top == 28 and picture.mode == "L"
        assert np.array_equal(np.asarray(picture)[top:, left:], np.asarray(plain))      # the images as before
        ink = np.asarray(picture) < 128
        parts = *np.array_split(ink[:top, left:], 3, axis=1), *np.array_split(ink[top:, :left], 2)
        assert all(part.any() for part in parts) and not ink[:top, :left].any()
    assert pictures.grid(x, 3, across="abc").size == (plain.width, plain.height + 28)


@pytest.mark.parametrize("c, classes, wide, across", [
    ([*range(10)] * 3, 10, 10, "0123456789"),           # in turn: a column for each
    ([7] * 12, 10, 10, "7777777777"),
    ([3, 1, 4] * 10, 10, 10, ""),                       # a column holds several
    ([10] * 12, 10, 10, ""),                            # no class
    ([*range(3)] * 5, 3, 9, "012012012"),
    ([*range(12)] * 2, 12, 10, ""),
    ([0, 1], 10, 10, ["0", "1"] + [""] * 8)])
def test_a_column_of_one_class_is_named(c, classes, wide, across):
    laid = pictures.by_class(torch.tensor(c), classes)
    assert laid["columns"] == wide and list(laid["across"]) == list(across)
    assert pictures.grid(torch.zeros(len(c), 1, 8, 8), **laid)


def test_few_colours_are_those_of_the_lines():
    # A chart is nearly all white; its lines must keep their hues when it is stored with twelve colours.
    shades = torch.arange(256).repeat(200, 1).to(torch.uint8)              # soft greys, as of text, take most of it
    array = torch.stack([shades, shades, shades], 2).numpy().copy()
    array[::40], array[20::40] = (31, 119, 180), (255, 127, 14)            # thin lines, blue and orange
    stored = Image.open(io.BytesIO(pictures.animated_png([Image.fromarray(array)], [0], 12))).convert("RGB")
    for line, colour in ((0, (31, 119, 180)), (20, (255, 127, 14))):
        assert max(abs(a - b) for a, b in zip(stored.getpixel((128, line)), colour)) < 40
    grey = pictures.animated_png([Image.fromarray(shades.numpy())], [0], 12)
    assert len(Image.open(io.BytesIO(grey)).convert("RGB").getcolors()) >= 8


def test_images_that_are_not_finite_are_none(tmp_path):
    good, bad = torch.zeros(5, 1, 28, 28), torch.zeros(5, 1, 28, 28)
    bad[3, 0, 1, 1], bad[4, 0, 2, 2] = float("nan"), float("-inf")
    for fine in (good, [good, good], (), [], {"x": 1}.values(), good.to(torch.uint8)):
        pictures.check_finite(list(fine) if not torch.is_tensor(fine) else fine)
    for x, part in ((bad, "2 of 5 images are not finite, the first is number 4"),
                    ([good, bad, bad], "not finite from batch 2 of 3 on")):
        with pytest.raises(Diverged, match=part) as info:
            pictures.check_finite(x)
        assert "the sampler ran away" in str(info.value) and "\n" not in str(info.value)
    for count in (fid_to_test, score):
        with pytest.raises(Diverged, match="2 of 5 images are not finite"):
            count(bad)


def test_strips_put_rows_under_each_other(tmp_path):
    rows = [torch.full((3, 1, 28, 28), value) for value in (-1.0, 1.0)]
    with Image.open(pictures.save_strip(rows, tmp_path / "strip.png", scale=1)) as picture:
        assert picture.size == (88, 59) and picture.getpixel((5, 5)) == 0 and picture.getpixel((80, 50)) == 255


@pytest.mark.parametrize("channels", [1, 3])
def test_frames_of_animations(tmp_path, channels):
    frames = [torch.full((4, channels, 28, 28), value) for value in torch.linspace(-1, 1, 7).tolist()]
    with Image.open(pictures.save_gif(frames, tmp_path / "no_ending", columns=2, seconds=2.1, hold=1.5)) as picture:
        assert picture.format == "GIF" and picture.n_frames == 7 and picture.size == (118, 118)
        durations = []
        for i in range(7):
            picture.seek(i)
            durations.append(picture.info["duration"])
        assert durations == [300] * 6 + [1500] and picture.info["loop"] == 0


def shown(path):
    """The frames of an animation as arrays, and how many milliseconds each is seen."""
    with Image.open(path) as picture:
        found = []
        for i in range(picture.n_frames):
            picture.seek(i)
            found.append((np.asarray(picture.convert("L")), picture.info["duration"]))
    return zip(*found)


def test_animations_have_sixteen_greys_and_at_most_24_frames(tmp_path):
    levels = torch.linspace(-1, 1, 100)
    path = pictures.save_gif([torch.full((1, 1, 28, 28), level) for level in levels.tolist()], tmp_path / "a.gif",
                             scale=1, seconds=4.8, hold=2)
    arrays, milliseconds = shown(path)
    centres = [int(array[9, 9]) for array in arrays]
    assert centres[0] == 0 and centres[-1] == 255 and centres == sorted(centres)
    assert all(centre % 17 == 0 for centre in centres) and len(centres) == 16           # equal ones become one
    assert sum(milliseconds) == 23 * 200 + 2000 and milliseconds[-1] >= 2000
    noise = [torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in range(50)]
    arrays, milliseconds = shown(pictures.save_gif(noise, tmp_path / "b.gif", columns=2, scale=1))
    assert len(arrays) == 24 and milliseconds == (160,) * 23 + (1500,)
    levels = [to_uint8(noise[i][0, 0]) for i in (0, 2, 49)]            # the first, 2.1 rounded, the last
    for array, level in zip((arrays[0], arrays[1], arrays[-1]), levels):
        assert np.abs(array[1:29, 1:29].astype(int) - level.numpy()).max() <= 8
        assert len(np.unique(array)) == 16


def test_animations_have_fewer_frames_where_they_would_be_large(tmp_path):
    noise = [torch.rand(16, 1, 28, 28, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in range(30)]
    path = pictures.save_gif(noise, tmp_path / "a.gif")
    arrays, milliseconds = shown(path)
    assert path.stat().st_size < 250_000 and 8 < len(arrays) < 20
    assert 3900 <= sum(milliseconds) - 1500 + milliseconds[0] <= 4000
    arrays, _ = shown(pictures.save_gif([frame.repeat(8, 1, 1, 1) for frame in noise[:9]], tmp_path / "b.gif"))
    assert len(arrays) == 8                            # not fewer, whatever their size


GIFS = sorted(ROOT.glob("lesson_*/**/results/*.gif"))


@pytest.mark.parametrize("path", GIFS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_published_animations_are_light(path):
    with Image.open(path) as picture:
        assert 8 <= picture.n_frames <= pictures.GIF_FRAMES == 24
        for i in range(picture.n_frames):
            picture.seek(i)
            assert len(picture.convert("RGB").getcolors()) <= 16
    assert path.stat().st_size < pictures.GIF_BYTES == 250_000


def test_arrays_in_the_evaluation_format(tmp_path):
    x, labels = digits("test").first(10)
    with np.load(pictures.save_npz(x, tmp_path / "x.npz", labels)) as file:
        assert sorted(file) == ["arr_0", "arr_1"]
        assert file["arr_0"].dtype == np.uint8 and file["arr_0"].shape == (10, 28, 28, 1)
        assert np.array_equal(file["arr_0"][..., 0], digits("test").images[:10, 0].numpy())
        assert file["arr_1"].dtype == np.int64 and file["arr_1"].tolist() == labels.tolist()
    with np.load(pictures.save_npz(x.requires_grad_(), tmp_path / "y", [1] * 10)) as file:
        assert file["arr_1"].tolist() == [1] * 10
    with np.load(pictures.save_npz(x, tmp_path / "z.npz")) as file:
        assert list(file) == ["arr_0"]


@pytest.mark.parametrize("losses", [[1.0], [1.0, 0.5, 0.25], [0.5, -0.5] * 30])
def test_loss_curves(tmp_path, fine, losses):
    records = [{"step": 10 * i, "loss": loss} for i, loss in enumerate(losses)]
    with Image.open(pictures.save_losses(records, tmp_path / "loss.png")) as picture:
        assert picture.size == (550, 352)
    assert "Software" not in picture.info              # equal bytes from equal numbers


@pytest.mark.parametrize("limits, places", [
    ((0.11, 0.43), [0.15, 0.2, 0.25, 0.3, 0.35, 0.4]), ((0.12, 0.126), [0.12 + i / 1000 for i in range(7)]),
    ((12.8, 17.0), [13, 14, 15, 16, 17]),
    ((0.9, 8.9), [1, 2, 3, 4, 5, 6, 7, 8]), ((0.04, 0.45), [0.05, 0.1, 0.2]), ((0.9, 101), [1, 2, 5, 10, 20, 50, 100])])
def test_round_numbers_on_a_logarithmic_axis(limits, places):
    assert plots.plain_places(*limits) == pytest.approx(places)


# ------------------------------------------------------------------ files
def test_an_exception_leaves_the_old_content(tmp_path):
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"a": 1})
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), atomic(path) as temporary:
            temporary.write_text("half of the new conte")
            raise error
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert [p.name for p in path.parent.iterdir()] == ["file.json"] and json.loads(path.read_text()) == {"a": 1}


def test_two_writers_of_one_file_leave_one_of_the_two(tmp_path):
    path, texts = tmp_path / "file", ["a" * 100_000, "b" * 100_000]

    def write(text):
        for _ in range(20):
            with atomic(path) as temporary:
                for start in range(0, len(text), 50_000):
                    with open(temporary, "a") as file:
                        file.write(text[start:start + 50_000])

    child = os.fork()
    if not child:
        write(texts[0])
        os._exit(0)
    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    [thread.start() for thread in threads]
    while any(thread.is_alive() for thread in threads):
        assert not path.exists() or path.read_text() in texts
    assert os.waitpid(child, 0)[1] == 0
    assert path.read_text() in texts and [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("text, part", [
    ("", " is empty: "), (" \n", " is empty: "), ("[]", " must hold an object of names, {...}, not a list: "),
    ("3", "not a int"), ('{"a":\n 1', " is no JSON at line 2 (Expecting ',' delimiter): "),
    ("[" * 100_000, " is no JSON at line 1 (too deep): "), ("<<<<<<< HEAD\n{}\n", " holds a merge conflict: "),
    (b"\xff\xfe", " is not UTF-8 text: ")])
def test_json_that_is_none_is_one_line(tmp_path, text, part):
    path = tmp_path / "results.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as info:
        read_json(path)
    assert f"{path}{part}" in str(info.value) or part in str(info.value) and "int" in part
    assert str(info.value).endswith("mend it, or move it away and start again") and "\n" not in str(info.value)
    with pytest.raises(UserError), update_json(path):
        pytest.fail("not reached")
    write_json(path, {"a": [1]})
    assert read_json(path) == {"a": [1]} and read_json(tmp_path / "absent.json") == {}


def test_processes_that_record_at_once_keep_each_others_numbers(tmp_path):
    path, pids = tmp_path / "results.json", []
    for child in range(3):
        if not (pid := os.fork()):
            for i in range(15):
                with update_json(path) as content:
                    content[f"{child}_{i}"] = i
            os._exit(0)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 3
    assert len(read_json(path)) == 45


def test_atomic_replaces_regular_files_only(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(IsADirectoryError), atomic(tmp_path / name):
            pytest.fail("not reached")
    assert (tmp_path / "folder").is_dir() and (tmp_path / "pipe").is_fifo()


def test_locks(tmp_path):
    with lock(tmp_path / "deep" / "lock", wait=False) as mine:
        assert mine
        with lock(tmp_path / "deep" / "lock", wait=False) as second:
            assert not second
    with lock(tmp_path / "deep" / "lock", wait=False) as again:
        assert again


ODD = [errno.EINVAL, errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP]


@pytest.mark.parametrize("number", ODD)
def test_a_disk_that_cannot_flush_a_folder_keeps_the_file_and_says_so_once(tmp_path, monkeypatch, capsys, number):
    flush = os.fsync

    def fsync(file):
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(number, os.strerror(number))
        flush(file)

    monkeypatch.setattr(os, "fsync", fsync)
    for text in ("one", "two"):
        with atomic(tmp_path / "file") as temporary:
            temporary.write_text(text, encoding="utf-8")
        assert (tmp_path / "file").read_text(encoding="utf-8") == text
    assert capsys.readouterr().err.count("warning: the disk of") == 1
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"), atomic(tmp_path / "file") as temporary:
        temporary.write_text("three", encoding="utf-8")


@pytest.mark.parametrize("error", [NotImplementedError("flock"), *(OSError(number, "no locks") for number in ODD)])
def test_a_disk_without_locks_goes_on_and_says_so_once(tmp_path, monkeypatch, capsys, error):
    import filelock

    def acquire(self, *args, **kwargs):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    for _ in range(2):
        with lock(tmp_path / "lock", wait=False) as mine:
            assert mine
    assert capsys.readouterr().err.count("knows no locks") == 1
    error = OSError(errno.EACCES, "not yours")
    with pytest.raises(OSError, match="not yours"), lock(tmp_path / "lock"):
        pytest.fail("not reached")


def test_windows_has_neither_fcntl_nor_resource_and_opens_no_folders(launch, tmp_path):
    """Trained, sampled and measured with these modules hidden, and folders that do not open."""
    hide = """if True:
        import os, pathlib, sys, types
        import psutil
        from utils import files

        for name in ("fcntl", "resource"):
            sys.modules[name] = None                   # import fcntl is an ImportError
        opened = os.open
        files.os = types.SimpleNamespace(**{**vars(os), "name": "nt"})
        files.os.open = lambda path, *rest: (_ for _ in ()).throw(PermissionError(13, "a folder", path)) \\
            if os.path.isdir(path) else opened(path, *rest)
        psutil.Process = lambda: types.SimpleNamespace(memory_info=lambda: types.SimpleNamespace(peak_wset=123 * 2**20))
    """
    process = launch("lesson_05/train.py", "smoke=true", "steps=2", "device=cpu", f"runs={tmp_path}", before=hide)
    assert process.wait() == 0, process.err
    entry = json.loads((tmp_path / "smoke" / "001" / "results.json").read_text(encoding="utf-8"))["train"]
    assert entry["peak_memory_mb"] == 123


def unsaid(tree):
    """Calls in a module that open a text file and do not say its encoding: their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and "encoding" not in [keyword.arg for keyword in node.keywords]:
            name = ast.unparse(node.func)
            mode = "".join(ast.unparse(argument) for argument in node.args[1:2])
            if name == "open" and "b" not in mode or name.endswith((".read_text", ".write_text")):
                yield node.lineno


def test_every_text_file_is_opened_as_utf_8():
    files = [*ROOT.glob("utils/*.py"), *ROOT.glob("tools/*.py")]
    assert len(files) > 20
    assert [(path.name, line) for path in files for line in unsaid(ast.parse(path.read_text(encoding="utf-8")))] == []
    bad = ("open(p)", "p.read_text()", "open(p, 'w')", "p.write_text(x)", "open(p, 'rb')", "open(p, encoding='utf-8')")
    assert list(unsaid(ast.parse("\n".join(bad)))) == [1, 2, 3, 4]


# ------------------------------------------------------------------ errors
@pytest.mark.parametrize("number, part", [
    (28, "the disk is full"), (122, "quota"), (27, "larger than allowed"), (13, "may not be written"),
    (30, "read-only"), (20, "stands where a folder"), (17, "stands where a folder"), (21, "not a file"),
    (2, "no such file"), (36, "too long"), (5, "reports an error")])
def test_errors_of_disks_are_one_line(capsys, number, part):
    def main():
        raise OSError(number, "reason", "a/path")

    with pytest.raises(SystemExit) as stop:
        cli(main)
    text = capsys.readouterr().err
    assert stop.value.code == 2 and part in text and "a/path" in text and text.count("\n") == 1
    assert disk_error(ConnectionRefusedError(111, "refused")) is None


def test_defects_keep_their_traceback(capsys):
    for error in (ValueError("a defect"), KeyError("x"), RuntimeError("y"), OSError(111, "refused")):
        def main():
            raise error  # noqa: B023
        with pytest.raises(type(error)):
            cli(main)
    with pytest.raises(SystemExit) as stop:
        cli(lambda: (_ for _ in ()).throw(UserError("two\n  lines")))
    assert stop.value.code == 2 and capsys.readouterr().err == "error: two lines\n"


def test_values_that_model_py_rejects_are_one_line(capsys):
    model = load("lesson_05", "model")
    for call, part in ((lambda: model.DDPM(timesteps=1), "timesteps=1 at least 2 (model.py, line"),
                       (lambda: model.UNet(channels=6, groups=4), "divisible by num_groups (4) (model.py, line")):
        with pytest.raises(SystemExit) as stop:
            cli(call)
        assert stop.value.code == 2 and part in capsys.readouterr().err


def test_values_that_earlier_py_rejects_are_one_line(capsys, tmp_path):
    for name, code in (("earlier.py", 2), ("train.py", 2), ("utils.py", None)):
        (tmp_path / name).write_text("def check(steps):\n    raise ValueError(f'steps={steps} is too small')\n")
        space = {}
        exec(compile((tmp_path / name).read_text(), str(tmp_path / name), "exec"), space)
        with pytest.raises(SystemExit if code else ValueError) as stop:
            cli(lambda: space["check"](0))  # noqa: B023
        assert getattr(stop.value, "code", None) == code
    assert "steps=0 is too small (earlier.py, line 2)" in capsys.readouterr().err


def said(capsys, main):
    """The one line in which a script ends that runs this main, with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        cli(main)
    text = capsys.readouterr().err
    assert stop.value.code == 2 and text.startswith("error: ") and text.count("\n") == 1, text
    return text


def in_lesson(code, name="train.py", **names):
    """A function `main` as if a lesson's file held it."""
    space = {"__file__": f"/lesson/{name}", **names}
    exec(compile(f"def main():\n    {code}", f"/lesson/{name}", "exec"), space)
    return space["main"]


CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to " \
      "allocate 3221225472 bytes. Error code 12 (Cannot allocate memory)"
LOWER = "out of memory: lower batch_size=8 or unet.channels=9"


@pytest.mark.parametrize("error, part", [
    (RuntimeError(CPU), "out of memory (3.0 GiB at once): lower batch_size=8 or unet.channels=9"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), LOWER),
    (RuntimeError("Storage size calculation overflowed with sizes=[4, 999]"), LOWER), (MemoryError(), LOWER),
    (OSError(24, "Too many open files"), "too many files are open; lower workers, or raise that limit (ulimit -n)"),
    (OSError(12, "Cannot allocate memory"), "out of memory; lower batch, batch_size, n or workers")])
def test_want_of_memory_names_the_keys_to_lower(capsys, tmp_path, error, part):
    argv = [f"runs={tmp_path}", "device=cpu", "steps=99", "batch_size=8", "unet.channels=9"]

    def main():
        run = Run(ROOT / "lesson_05" / "train.py", argv)
        raise error from (run and None)

    assert part in said(capsys, main)


def test_memory_that_is_not_there(capsys):
    assert "out of memory (931322.6 GiB at once): lower the batch" in said(capsys, lambda: torch.empty(25 * 10**13))


def test_a_config_yaml_that_lacks_a_key_or_has_one_too_many_is_one_line(capsys, launch, lesson):
    text = (lesson / "config.yaml").read_text(encoding="utf-8")
    for change, part in ((text.replace("\n  clip: 1.0", "\n  clap: 1.0"), "has no `clip`, which train.py needs (line "),
                         (text.replace("  beta_T:", "  beta_U:"), "does not fit (DDPM.__init__() got an unexpected "
                                                                  "keyword argument 'beta_U'; train.py, line "),
                         (text[text.index("train:"):], "has no `ddpm`, which train.py needs (line ")):
        (lesson / "config.yaml").write_text(change, encoding="utf-8")
        error = launch(lesson / "train.py", "device=cpu", "threads=1", "steps=1", "batch_size=2").error()
        assert f"error: config.yaml {part}" in error and "git checkout config.yaml" in error


def test_errors_before_the_first_step_name_the_values_that_were_given(capsys, tmp_path, monkeypatch):
    run = Run(ROOT / "lesson_05" / "train.py", [f"runs={tmp_path}", "device=cpu", "batch_size=8", "unet.channels=9"])
    fails = in_lesson("run.step; torch.zeros(2) @ torch.zeros(3)", "model.py", run=run, torch=torch)

    def main(run=run):
        return fails(), run

    assert said(capsys, main) == (
        "error: RuntimeError: inconsistent tensor size, expected tensor [2] and src [3] to have the same number of "
        "elements, but got 2 and 3 elements respectively (model.py, line 2): do the values fit that were given "
        "(batch_size=8, unet.channels=9)? debug=true shows more\n")
    for run.argv, run.step in ((["steps=1"], 1), (["smoke=true", "device=cpu"], 0)):     # then it is a defect
        with pytest.raises(RuntimeError):
            cli(main)
    run.argv, run.step = ["steps=1"], 0
    with pytest.raises(NameError):                     # never the reader's value
        cli(lambda run=run: (in_lesson("nowhere")(), run))
    monkeypatch.setattr(sys, "argv", ["train.py", "debug=true"])
    with pytest.raises(SystemExit):
        cli(main)
    text = capsys.readouterr().err
    assert text.startswith("Traceback") and text.splitlines()[-1].startswith("error: RuntimeError: inconsistent")
    with pytest.raises(SystemExit):
        cli(in_lesson("raise UserError('put it right')", UserError=UserError))
    assert re.fullmatch(r"Traceback.*UserError: put it right\nerror: put it right\n", capsys.readouterr().err, re.S)


# ------------------------------------------------------------------ the device
@pytest.mark.parametrize("environment, part", [
    ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 promises 4 processes, but RANK is not set"),
    ({"WORLD_SIZE": "4", "RANK": "1"}, "MASTER_ADDR is not set: start them with `torchrun --nproc_per_node 4`"),
    ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a"}, "MASTER_PORT is not set"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two must be a whole number"), ({"RANK": "-1"}, "RANK=-1 must be"),
    ({"OMPI_COMM_WORLD_SIZE": "8"}, "OMPI_COMM_WORLD_SIZE=8 promises 8 processes"),
    ({"PMI_SIZE": "2"}, "PMI_SIZE=2 promises"), ({"MV2_COMM_WORLD_SIZE": ""}, "MV2_COMM_WORLD_SIZE= must be")])
def test_variables_of_a_cluster_are_one_line(monkeypatch, environment, part):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as info:
        Run(ROOT / "lesson_05" / "train.py", ["device=cpu"])
    assert part in str(info.value) and list(environment)[0] in str(info.value) and "\n" not in str(info.value)


def test_variables_of_torchrun_and_of_one_process_are_none():
    for environment in ({}, {"WORLD_SIZE": "1"}, {"OMPI_COMM_WORLD_SIZE": "1"}, {
            "WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "PMI_SIZE": "2"}):
        check_processes(environment)


def test_make_in_a_folder_with_a_space(tmp_path):
    here = tmp_path / "Bob's course"
    (here / "lesson_05").mkdir(parents=True)
    (here / ".venv" / "bin").mkdir(parents=True)
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        (here / name).write_bytes((ROOT / name).read_bytes())
    (here / "lesson_05" / "train.py").touch()
    (here / ".venv" / ".reader").touch()
    python = here / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\necho "$PWD: $@"\n')
    python.chmod(0o755)
    done = subprocess.run(["make", "-s", "lesson_05"], cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{here / 'lesson_05'}: {call}" for call in (
        "sample.py weights=published", "train.py", "sample.py n=2048 metrics=true")]


def test_device(monkeypatch, tmp_path):
    assert auto_precision("cpu") == ("bf16" if fast_bf16() else "fp32")
    for capability, precision in (((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert auto_precision("cuda") == precision
    monkeypatch.setattr(Path, "read_text", lambda path, encoding: "flags : sse avx2\n")
    assert not fast_bf16()
    monkeypatch.undo()
    assert device_name().startswith("1 CPU core (")
    assert 50 < peak_memory_mb() < 100_000


def cuda(monkeypatch, works, gpus, built="13.0"):
    """A machine with so many NVIDIA GPUs, which torch can use or not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: works)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    utils.device.warn.cache_clear()


def test_a_gpu_that_cannot_be_used_is_said_once(monkeypatch, capsys, tmp_path):
    """As with a driver that is too old: torch then says no more than that there is no CUDA."""
    cuda(monkeypatch, works=False, gpus=1)
    for _ in range(2):
        utils.device.start("auto", "fp32")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("warning: an NVIDIA GPU is there") and "CUDA 13.0" in said
    with pytest.raises(UserError, match="device=cuda: an NVIDIA GPU is there, .* driver"):
        utils.device.start("cuda", "fp32")
    utils.device.warn.cache_clear()
    utils.device.start("cpu", "fp32")                        # as asked for
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")     # hidden by the reader
    utils.device.start("auto", "fp32")
    cuda(monkeypatch, works=False, gpus=0)             # none
    utils.device.start("auto", "fp32")
    with pytest.raises(UserError, match="device=cuda: no CUDA GPU was found; leave device out"):
        utils.device.start("cuda", "fp32")
    cuda(monkeypatch, works=True, gpus=1)
    assert capsys.readouterr().err == "" and utils.device.unused_gpu() is None
    cuda(monkeypatch, works=False, gpus=0, built=None)                 # a torch for CPUs, on a machine with a GPU
    monkeypatch.setattr(utils.device, "KNOWN_GPUS", tmp_path / "gpus")
    assert utils.device.unused_gpu() is None
    (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
    assert "was built without CUDA" in utils.device.unused_gpu()
    monkeypatch.setenv("RANK", "1")
    utils.device.warn("of another process")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("gpus, environment, message", [
    (1, {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "2 processes were started here, .* are 1, .*node 1`"),
    (2, {"LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "3"}, "4 processes were started here, .* are 2, .*node 2`"),
    (2, {"LOCAL_RANK": "2"}, "3 processes"), (2, {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}, None), (1, {}, None),
])
def test_more_processes_than_gpus(monkeypatch, gpus, environment, message):
    cuda(monkeypatch, works=True, gpus=gpus)
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: pytest.fail("NCCL would be asked") if message else
                        SimpleNamespace(num_processes=1))
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if message:
        with pytest.raises(UserError, match=message):
            utils.device.start("auto", "fp32")
    else:
        assert utils.device.start("cuda", "fp32")[1] == "fp32"


# ------------------------------------------------------------------ scores
def gaussians(n=500, d=8):
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(d, d, generator=generator)
    return torch.randn(n, d, generator=generator) @ mix, 0.5 * torch.randn(n, d, generator=generator) + 0.3


def frechet(mean1, cov1, mean2, cov2):
    """A second implementation: tr sqrt(cov1 cov2) by symmetric matrices only."""
    values, vectors = np.linalg.eigh(cov1)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ cov2 @ root).clip(0)).sum()
    return ((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * trace


def test_fid_against_two_other_implementations():
    a, b = gaussians()
    ours = judging.fid(a, b)
    x, y = a.double().numpy(), b.double().numpy()
    assert ours == pytest.approx(frechet(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T)), rel=1e-9)
    assert judging.fid(a, a) == pytest.approx(0, abs=1e-6) and judging.fid(b, a) == pytest.approx(ours)
    torchmetrics = pytest.importorskip("torchmetrics.image.fid")
    theirs = torchmetrics._compute_fid(a.double().mean(0), a.double().T.cov(), b.double().mean(0), b.double().T.cov())
    assert ours == pytest.approx(theirs.item(), rel=1e-9)


def test_fid_of_two_gaussians_in_closed_form():
    # Features with exactly these means and variances: |m1 - m2|^2 + sum (s1 - s2)^2 for commuting covariances.
    n = 400
    raw = torch.randn(n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    raw = raw - raw.mean(0)
    white = raw @ torch.linalg.inv(torch.linalg.cholesky(raw.T.cov())).T
    s1, s2 = torch.tensor([1.0, 2.0, 0.5, 3.0]).double(), torch.tensor([2.0, 2.0, 1.0, 0.1]).double()
    m = torch.tensor([0.3, 0.0, -1.0, 2.0]).double()
    assert judging.fid(white * s1, white * s2 + m) == pytest.approx(float((m ** 2 + (s1 - s2) ** 2).sum()), rel=1e-9)


def test_kid_and_precision_and_recall_against_their_definitions(monkeypatch):
    x, y = (digits(split).first(200)[0] for split in ("train", "test"))
    x = torch.cat([x[:150], torch.rand(50, 1, 28, 28) * 2 - 1])
    reference = judging.features(y)
    monkeypatch.setattr(judging, "_test_features", lambda low=False: judging.features(y, low))
    monkeypatch.setattr(judging, "floor", lambda *arguments, **options: 0.0)
    result, a, b = judging.score(x), judging.features(x).double(), reference.double()
    def kernel(u, v):
        return (u @ v.T / 64 + 1) ** 3
    n = 200
    kid = ((kernel(a, a).sum() - kernel(a, a).trace()) / (n * (n - 1)) - 2 * kernel(a, b).mean()
           + (kernel(b, b).sum() - kernel(b, b).trace()) / (n * (n - 1)))
    assert result["kid"] == pytest.approx(kid.item(), rel=1e-4)
    radius = [torch.cdist(f, f).sort(dim=1).values[:, 3] for f in (a, b)]      # to the third neighbour
    distance = torch.cdist(a, b)
    assert result["precision"] == pytest.approx((distance <= radius[1]).any(1).double().mean().item(), abs=0.006)
    assert result["recall"] == pytest.approx((distance.T <= radius[0]).any(1).double().mean().item(), abs=0.006)
    assert result["precision"] < 0.9 and result["n"] == 200


def test_judges_read_the_test_set():
    assert judging.JUDGES.is_file() and judging.JUDGES.stat().st_size < 1e6
    x, y = digits("test").first(10_000)
    assert (classify(x)[0] == y).float().mean() >= 0.994               # the judge of labels
    judge = judging.judge("features")
    feature = judging._test_features()
    assert feature.var(0).mean().item() == pytest.approx(1, rel=1e-3)  # their unit
    logits = judge.classify((feature * judging._unit(False)).relu())   # the judge of features can classify as well
    assert (logits.argmax(1) == y).float().mean() >= 0.994
    assert torch.allclose(logits[:20], judge(x[:20]), atol=1e-3)
    assert not judge.training and not any(p.requires_grad for p in judge.parameters())


def test_scores_tell_digits_from_noise():
    x, labels = digits("train").first(300, shuffle_seed=7)
    noise = torch.rand(300, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    lowest = floor(300)
    assert 0 < lowest < 20 and floor(1000, seeds=1) < lowest
    assert fid_to_test(x) < 2 * lowest and fid_to_test(noise) > 100 * lowest
    result = score(x, labels)
    assert result["fid"] == fid_to_test(x) and result["fid_floor"] == lowest and result["n"] == 300
    assert result["accuracy"] > 0.98 and result["confidence"] > 0.98
    assert result["precision"] > 0.8 and result["recall"] > 0.8
    bad = score(noise, labels)
    assert bad["precision"] < 0.1 and bad["recall"] < 0.1 and bad["accuracy"] < 0.3
    assert bad["kid"] > 50 * abs(result["kid"])
    assert sum(result["classes"]) == pytest.approx(1, abs=1e-3) and len(result["classes"]) == 10
    assert json.loads(json.dumps(result)) == result    # plain numbers
    text = report(result)
    for part in ("FID", "n = 300", "floor at this n", "not Inception", "FID-low", "accuracy"):
        assert part in text
    assert bad["fid_low"] > 100 * bad["fid_low_floor"]
    assert "accuracy" not in report({k: v for k, v in result.items() if k != "accuracy"})


def test_the_low_score_sees_faint_noise():
    # A residue of std 0.03, invisible on a screen, moves the first-layer score far from its floor.
    x, _ = digits("train").first(600, shuffle_seed=7)
    noisy = x + 0.03 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    clean, low = fid_to_test(x, low=True), fid_to_test(noisy, low=True)
    assert low > 5 * clean and low > 5 * floor(600, low=True)
    assert fid_to_test(noisy) < 2 * fid_to_test(x)     # which the high features overlook
    assert fid_to_test(3 * x) == fid_to_test((3 * x).clamp(-1, 1))     # images are clipped first


def test_scores_need_a_hundred_images(monkeypatch, tmp_path):
    for n in (1, 99):
        with pytest.raises(UserError, match=f"need 100 to 60000 images, not n={n}"):
            score(torch.zeros(n, 1, 28, 28))
    with pytest.raises(UserError, match="between 1 and 60000"):
        floor(60_001)
    judging.judge.cache_clear()
    monkeypatch.setattr(judging, "JUDGES", tmp_path / "judges.safetensors")
    with pytest.raises(UserError, match="git checkout utils/judges.safetensors"):
        classify(torch.zeros(1, 1, 28, 28))


# ------------------------------------------------------------------ what importing costs, and what unpickling may do
def test_importing_utils_is_cheap():
    code = "import sys, time, torch; t = time.perf_counter(); import utils; " \
           "print(time.perf_counter() - t, *sorted(m for m in sys.modules if '.' not in m))"
    for attempt in range(3):                           # the machine may be busy
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
        seconds, *modules = done.stdout.split()
        for name in ("torchvision", "matplotlib", "accelerate", "torch_fidelity", "scipy", "pandas"):
            assert name not in modules
        if float(seconds) < 1:
            break
    assert float(seconds) < 1, attempt


def test_all_names_of_utils_are_there():
    assert all(hasattr(utils, name) for name in utils.__all__) and len(set(utils.__all__)) == len(utils.__all__)


def loads(tree):
    """Calls in a module that could run code from a file: (line, what)."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name.endswith("torch.load") and given.get("weights_only") != "True":
            yield node.lineno, name
        if name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.jit.load", "joblib.load", "dill.load",
                    "marshal.loads", "yaml.unsafe_load", "yaml.full_load", "shelve.open", "torch.hub.load"):
            yield node.lineno, name
        if name == "yaml.load" and ast.unparse(node.args[-1]) not in (
                "_Loader", "yaml.SafeLoader", "getattr(yaml, 'CSafeLoader', yaml.SafeLoader)"):
            yield node.lineno, name
        if given.get("allow_pickle", "False") != "False":
            yield node.lineno, name


def test_nothing_is_unpickled_that_could_run_code():
    files = [p for pattern in ("utils/*.py", "tools/**/*.py", "lesson_*/**/*.py") for p in ROOT.glob(pattern)]
    assert len(files) > 15
    for path in files:
        assert not list(loads(ast.parse(path.read_text()))), path
    bad = ("torch.load(f)", "torch.load(f, weights_only=False)", "pickle.load(f)", "np.load(f, allow_pickle=True)",
           "yaml.load(f, yaml.Loader)")
    assert [line for line, _ in loads(ast.parse("\n".join(bad)))] == [1, 2, 3, 4, 5]
