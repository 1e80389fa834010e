"""tools/bench.py: the measurements in smoke size, the table, the plot, and mistakes on the command line."""

import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from conftest import SCRIPTS, Process
from tools import bench, scaling
from utils import UserError, cli

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = ("seconds", "steps", "parameters", "images_per_second", "sample_steps", "sample_seconds_per_1000", "fid")


@pytest.fixture(scope="module")
def apart():
    """The tool imports `train` and `sample` as a script does; here they must not stay for the other tests."""
    path, modules = list(sys.path), {name: sys.modules.pop(name) for name in SCRIPTS if name in sys.modules}
    yield
    sys.path[:] = path
    for name in SCRIPTS:
        sys.modules.pop(name, None)
    sys.modules.update(modules)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def measured(apart, out, server, fine):
    """One benchmark in smoke size, publish=true included: smoke numbers must not be published.

    The process of its own, in which memory is measured, comes from conftest's server: it has torch already.
    """
    results = ROOT / "lesson_05" / "results"
    before = {p: p.stat().st_mtime_ns for p in results.glob("*")}

    def run(command, cwd, **_):
        python, script, *argv = map(str, command)
        assert python == sys.executable and cwd == Path(script).parent
        assert Process(server, {"script": script, "argv": argv, "before": "", "out": f"{out}/out",
                                "err": f"{out}/err"}).wait() == 0, (out / "err").read_text()

    with pytest.MonkeyPatch.context() as patch:
        # Its own name only: the course's other users of this module, a download for one, keep theirs.
        patch.setattr(bench, "subprocess", SimpleNamespace(run=run, DEVNULL=None))
        made = bench.main(["lesson_05", "smoke=true", "publish=true", f"runs={out}"])
    assert {p: p.stat().st_mtime_ns for p in results.glob("bench.*")} == {
        p: t for p, t in before.items() if p.name.startswith("bench.")}
    return made


def options(**changes):
    o = bench.parse(["lesson_05", "smoke=true"])
    for key, value in changes.items():
        setattr(o, key, value)
    return o


# ------------------------------------------------------------------ the measurements
def test_json_holds_what_was_measured(measured, out):
    assert json.loads((out / "bench.json").read_text()) == measured
    assert measured["lesson"] == "lesson_05" and measured["n"] == 100 and measured["floor"] > 0
    assert measured["command"].startswith("python -m tools.bench lesson_05 smoke=true")
    for key in ("seed", "device", "precision", "torch", "code"):
        assert measured[key] is not None, key


def test_speed_fits_together(measured):
    s = measured["speed"]
    assert s["images_per_second"] * s["seconds_per_step"] == pytest.approx(s["batch_size"])
    assert 0 <= s["data_share"] < 1 and s["batch_size"] == 8 and s["sample_steps"] == 5
    assert 100 < s["peak_memory_mb"] < 5000            # of a process of its own, torch included


def test_one_row_for_each_budget(measured):
    rows, s = measured["rows"], measured["speed"]
    assert [row["name"] for row in rows] == ["lesson_05"] * 2
    for row, budget in zip(rows, (0.1, 0.4)):
        assert row["steps"] == max(2, round(budget / s["seconds_per_step"]))
        assert row["parameters"] == s["parameters"] and row["sample_steps"] == 5
        assert all(math.isfinite(row[key]) and row[key] > 0 for key in NUMBERS)
        assert row["fid"] > measured["floor"]


def test_nothing_but_training_is_timed():
    # Steps of 10 ms of CPU after a set-up of 100 ms: the set-up is not counted, a sleeping step costs nothing.
    parameter = torch.nn.Parameter(torch.zeros(1))
    seen = []

    def work(seconds):
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    def main(argv):
        seen.extend(argv)
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        work(0.1)
        for _ in range(8):
            time.sleep(0.02)
            work(0.01)
            optimizer.step()
        work(0.1)
        return "result"

    result, seconds = bench.timed(SimpleNamespace(main=main), options(), "somewhere", 8)
    assert result == "result" and 0.08 <= seconds < 0.16
    assert {"steps=8", "preview_every=0", "save_every=0", "runs=somewhere", "device=cpu", "threads=1"} <= set(seen)
    count = len(seen)
    torch.optim.SGD([parameter], lr=0.1).step()        # the hook is gone
    assert len(seen) == count


def test_two_threads_halve_the_seconds():
    one, two = options(threads=1), bench.parse(["lesson_05", "smoke=true", "threads=2"])
    assert one.clock() == pytest.approx(2 * two.clock(), rel=0.05)
    assert "threads=2" in bench.keys(two, "runs")


# ------------------------------------------------------------------ the table and the plot
def test_table(measured):
    text = bench.table(measured)
    lines = text.splitlines()
    assert f"{measured['speed']['peak_memory_mb']} MB" in text
    assert f"n = 100 samples; floor at this n {measured['floor']:.3f}" in lines[-1]
    for row, line in zip(measured["rows"], lines[-3:-1]):
        assert line.split()[0] == "lesson_05" and line.split()[1] == f"{row['seconds']:.1f}"
        assert line.split()[-1] == f"{row['fid']:.2f}" and "(5 steps)" in line
    assert len({len(line) for line in lines[-4:-1]}) == 1          # columns stand under their titles


def test_plot(measured, out, monkeypatch):
    picture = Image.open(out / "bench.png").convert("L")
    assert picture.width > 400 and picture.getextrema()[0] < 60    # lines and labels, not a white page
    drawn = []
    monkeypatch.setattr(bench, "save_figure", lambda fig, path: drawn.append(fig.axes[0]) or path)
    other = dict(measured["rows"][0], name="other", fid=7.0, seconds=3.0)
    bench.plot({**measured, "rows": [*measured["rows"], other]}, "nowhere.png")
    lines = {line.get_label(): line for line in drawn[0].get_lines()}
    assert list(lines) == ["lesson_05", "other", "floor"]
    assert list(lines["lesson_05"].get_xdata()) == [row["seconds"] for row in measured["rows"]]
    assert list(lines["lesson_05"].get_ydata()) == [row["fid"] for row in measured["rows"]]
    assert list(lines["floor"].get_ydata()) == [measured["floor"]] * 2


# ------------------------------------------------------------------ other packages
@pytest.mark.parametrize("name", list(bench.OTHERS))
def test_other_package(name):
    """Where it is installed: it trains through both budgets, and its samples and scores are what they should be."""
    pytest.importorskip(name.replace("-", "_"))
    o = options(budgets=[1e-6, 0.2], n=20)
    state = torch.is_autocast_enabled("cpu")
    first, second = bench.other_rows(name, o)
    assert torch.is_autocast_enabled("cpu") == state and torch.is_grad_enabled()
    assert first["name"] == name and first["steps"] == 1 <= second["steps"] and second["seconds"] >= 0.2
    assert all(math.isfinite(row[key]) and row[key] > 0 for row in (first, second) for key in NUMBERS)
    torch.manual_seed(0)
    other = bench.OTHERS[name](2, True)
    assert any(p.requires_grad for p in other.net.parameters())
    other.loss(torch.rand(2, 1, 28, 28) * 2 - 1).backward()
    other.optimizer.step()
    other.average()
    with torch.no_grad():
        x = other.sample(3)
    assert x.shape == (3, 1, 28, 28) and x.dtype == torch.float32 and -1.01 <= x.min() and x.max() <= 1.01


def test_scores_are_not_taken_in_low_precision(monkeypatch):
    """Training and sampling run under autocast; the judge must not."""
    seen = []

    def note(value):
        seen.append(torch.is_autocast_enabled("cpu"))
        return value

    def fake(steps, small):
        net = torch.nn.Linear(1, 1)
        return SimpleNamespace(net=net, optimizer=torch.optim.SGD(net.parameters(), 0.1), clip=1.0,
                               average=lambda: None, loss=lambda x0: note(net(x0[:, 0, :1, :1])).mean(),
                               sample=lambda n: note(torch.zeros(n, 1, 28, 28)))

    monkeypatch.setitem(bench.OTHERS, "fake", fake)
    monkeypatch.setattr(bench, "auto_precision", lambda device: "bf16")
    monkeypatch.setattr(bench, "fid_to_test", lambda x: 1.0 + torch.is_autocast_enabled("cpu"))
    rows = list(bench.other_rows("fake", options(n=300)))
    assert [row["fid"] for row in rows] == [1.0, 1.0] and seen and all(seen)


# ------------------------------------------------------------------ mistakes
@pytest.mark.parametrize("argv, message", [
    ([], "name one lesson"),
    (["n=100"], "name one lesson"),
    (["lesson_05", "lesson_06"], "name one lesson"),
    (["lesson_77"], "lesson_77"),
    (["tools"], "train.py"),
    (["lesson_05", "stepz=3"], "unknown key stepz: the keys are budgets"),
    (["lesson_05", "n=many"], "n=many"),
    (["lesson_05", "n=50"], "100 or more"),
    (["lesson_05", "n=2048.5"], "n=2048.5"),
    (["lesson_05", "threads=0"], "1 or more"),
    (["lesson_05", "seed=-1"], "seed=-1"),
    (["lesson_05", "smoke=perhaps"], "true or false"),
    (["lesson_05", "budgets=soon"], "60,120,300"),
    (["lesson_05", "budgets=60,0"], "60,120,300"),
    (["lesson_05", "budgets=.nan"], "60,120,300"),
    (["lesson_05", "budgets="], "60,120,300"),
    (["lesson_05", "budgets=["], "budgets"),
    (["lesson_05", "against=imagen"], "diffusers"),
])
def test_mistakes_end_in_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli(lambda: bench.main(argv))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_a_package_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(bench.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"against=diffusers.*pip install -e '\.\[reference\]'"):
        bench.main(["lesson_05", "against=diffusers"])


def test_names_and_numbers_of_the_command_line(tmp_path, monkeypatch):
    o = bench.parse(["lesson_05/", "budgets=300,60", "n=500", "seed=3"])
    assert (o.lesson, o.budgets, o.n, o.seed, o.threads, o.against) == ("lesson_05", [60, 300], 500, 3, 1, [])
    (tmp_path / "lesson_05" / "sublesson_a").mkdir(parents=True)
    (tmp_path / "lesson_05" / "sublesson_a" / "train.py").touch()
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    assert bench.parse(["lesson_05a"]).folder == tmp_path / "lesson_05" / "sublesson_a"


def test_help_names_every_key(capsys):
    bench.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"{key}=" in text for key in bench.OPTIONS), text


def test_as_a_command(launch):
    assert launch("tools/bench.py", "lesson_05", "n=1").error() == "error: n=1: write 100 or more"


# ------------------------------------------------------------------ scaling
def test_scaling_measures_every_way_idle_and_beside_a_busy_process(monkeypatch, capsys):
    asked, busy = [], []
    popen = SimpleNamespace(Popen=lambda command: busy.append(Busy()) or busy[0])
    monkeypatch.setattr(scaling, "subprocess", popen)
    monkeypatch.setattr(scaling, "images_per_second",
                        lambda folder, argv: asked.append(argv) or 10 * len(asked) - 5 * len(busy))
    bench.main(["lesson_05", "scaling=true", "smoke=true"])
    assert [argv[-1] for argv in asked] == ["threads=1", "threads=2", "processes=2"] * 2
    assert all({"device=cpu", "smoke=true", "steps=12"} <= set(argv) for argv in asked) and busy[0].ended == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["1", "thread", "10", "35"] and lines[3].split()[-2:] == ["30", "55"]


class Busy:
    ended = 0

    def kill(self):
        self.ended += 1

    wait = kill
