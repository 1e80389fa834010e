"""Shared by all tests: lessons imported without mixing them, and scripts run as processes without waiting for torch.

    from conftest import load          load("lesson_05", "model") is the module lesson_05/model.py
    def test_x(launch):                launch(script, *argv) runs a script in a process of its own
"""

import contextlib
import copy
import ctypes
import functools
import gc
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("earlier", "model", "train", "sample", "reproduce")
_loaded = {}                                           # lesson folder -> its modules

# An editable install may stand in another clone: the tests of this one must not test its `utils`.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
UTILS = importlib.util.find_spec("utils").origin
assert Path(UTILS).is_relative_to(ROOT), f"these are the tests of {ROOT}, but utils is {UTILS}"


# ------------------------------------------------------------------ pytest -n auto: who shares a process, and when
PROCESSES = ("test_utils_run", "test_utils_claims", "test_tools_bench")       # these start several at once


def group(nodeid):
    """All tests of one lesson, whatever their file, run one after the other in one process; so does any other file."""
    path, _, test = nodeid.partition("::")
    file = Path(path).stem
    if file in PROCESSES:
        return "processes"                             # early, and never beside each other
    of_lesson = (r"\[()(\d\d[a-z]?)[-\]]", test)
    pattern, where = {"test_lessons": of_lesson, "test_fakegpu": of_lesson,
                      "test_tools_notebook": (r"\[lesson_(\d\d)(?:/sublesson_)?([a-z]?)\]$", test),
                      }.get(file, (r"^test_(?:lesson|claims)_()(\d\d[a-z]?)$", file))
    match = re.search(pattern, where)
    return "lesson " + "".join(match.groups()) if match else file


def pytest_collectstart():
    """What is imported now stays: to look through it for garbage, again and again, would take a tenth of the time."""
    gc.disable()


def pytest_collection_modifyitems(items):
    """Groups stay together in the order of the run: first the longest, then the lessons, then what is short."""
    import torch  # not at the top: the process that hands out the groups needs none of it

    torch.set_num_threads(1)
    spare_time()
    gc.freeze()
    gc.enable()

    def place(item):
        name = group(item.nodeid)
        return name != "processes", not name.startswith("lesson"), name

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """One process a core, of one thread; four hold as much memory as a laptop can spare."""
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Whoever is done takes the next group. (The mark xdist_group does nothing under pytest 9.2 and xdist 3.8.)"""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        _split_scope = staticmethod(group)

    config.option.loadscopereorder = False
    return Groups(config, log)


# ------------------------------------------------------------------ what costs time, and few tests look at
def spare_time():
    """What a tiny training reads stays in memory, and that memory with this process; figures are drawn coarsely.

    MNIST's files are a fifth of such a training, config.yaml and its bounds are a tenth. They are fetched before any
    test begins: one that replaces a part of Python would break the download.
    """
    from matplotlib.figure import Figure

    import utils.config
    import utils.data
    from utils.errors import UserError

    with contextlib.suppress(AttributeError, OSError, TypeError):      # glibc: what is freed is not given back
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 28), mallopt(-1, 1 << 28)     # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD

    with contextlib.suppress(UserError):               # without them each test that needs them says so
        utils.data.mnist_folder()
    utils.data.read_idx = functools.cache(utils.data.read_idx)
    parsed = functools.lru_cache(1000)(utils.config.parse)
    utils.config.parse = lambda *text: copy.deepcopy(parsed(*text))
    utils.config.bounds.split = functools.cache(utils.config.bounds.split)
    Figure.savefig, Figure.savefig_finely = draw_coarsely, Figure.savefig


def draw_coarsely(figure, file, **_):
    """Figure.savefig in a tenth of the time: every line and word of ours is drawn, once, in few pixels and as they lie.

    Only ticks are left out that matplotlib has chosen, and titles stay where they are without a look at the ticks.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.ticker import FixedLocator, NullLocator
    from PIL import Image

    figure.set_layout_engine("none")
    figure.set_dpi(40)
    for ax in figure.axes:
        ax._autotitlepos = False
    for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)):
        axis.set_minor_locator(NullLocator())
        if not isinstance(axis.get_major_locator(), FixedLocator):
            axis.set_major_locator(NullLocator())
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).save(file, "PNG")


@pytest.fixture(scope="module")
def fine():
    """In this file figures are as a reader has them."""
    from matplotlib.figure import Figure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", Figure.savefig_finely)
        yield


# ------------------------------------------------------------------ modules of lessons
def load(lesson, name):
    """Import the script `name` of a lesson ("lesson_05", "lesson_05/sublesson_a" or a path), each once.

    The scripts of one lesson share their `model`; those of another lesson never see it.
    """
    folder = (ROOT / lesson).resolve()
    mine = _loaded.setdefault(folder, {})
    if name in mine:
        return mine[name]
    others = {script: sys.modules.pop(script) for script in SCRIPTS if script in sys.modules}
    sys.modules.update(mine)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(name)
        assert Path(module.__file__).parent == folder, f"{name} came from {module.__file__}"
        return module
    finally:
        sys.path.remove(str(folder))
        mine.update({script: sys.modules.pop(script) for script in SCRIPTS if script in sys.modules})
        sys.modules.update(others)


# ------------------------------------------------------------------ scripts as processes
class Process:
    """A script that was started: `.wait()` gives its exit code; then `.out` and `.err` hold what it printed."""

    def __init__(self, server, request):
        self.server, self.paths = server, (Path(request["out"]), Path(request["err"]))
        self.pid, self.code = server.ask(request), None

    def wait(self):
        if self.code is None:
            self.code = self.server.ask({"wait": self.pid})
        return self.code

    out = property(lambda self: self.paths[0].read_text())
    err = property(lambda self: self.paths[1].read_text())

    def signal(self, number):
        os.kill(self.pid, number)

    def error(self):
        """The one line on stderr of a script that ended with exit code 2."""
        assert self.wait() == 2, self.out + self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in self.err, self.err
        assert self.err.splitlines()[-1] == lines[0], self.err
        return lines[0]


class Server:
    """A process that has imported torch once and forks for every script: each starts in a blink."""

    def __init__(self):
        environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, cwd=ROOT, env=environment | {"OMP_NUM_THREADS": "1"})

    def ask(self, request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="session")
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def launch(server, tmp_path):
    """launch(script, *argv, before=code): start a script in a process of its own, after running some code in it."""
    started = []

    def start(script, *argv, before=""):
        name = tmp_path / f"process_{len(started)}"
        started.append(Process(server, {"script": str(ROOT / script), "argv": [str(a) for a in argv], "before": before,
                                        "out": f"{name}.out", "err": f"{name}.err"}))
        return started[-1]

    yield start
    for process in started:
        if process.code is None:
            process.signal(signal.SIGKILL)
            process.wait()


@pytest.fixture
def lesson(tmp_path):
    """A copy of lesson_05 without runs and results."""
    folder = tmp_path / "lesson_05"
    folder.mkdir()
    for name in ("config.yaml", "earlier.py", "model.py", "train.py", "sample.py"):
        if name != "earlier.py" or (ROOT / "lesson_05" / name).exists():
            shutil.copy(ROOT / "lesson_05" / name, folder)
    return folder


def serve():
    """The server's side: one JSON request a line; answers with a process id or an exit code."""
    gc.disable()
    import io
    import runpy

    import accelerate  # noqa: F401
    import IPython.core.interactiveshell  # noqa: F401   for the cells of notebooks
    import matplotlib.backends.backend_agg  # noqa: F401
    import nbformat.v4  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch
    import torch._dynamo  # noqa: F401                   the first optimizer of a process imports it
    import torchdiffeq  # noqa: F401
    from matplotlib.figure import Figure

    from utils import digits

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")                # whatever else is printed goes to stderr
    os.dup2(2, 1)
    spare_time()
    figure = Figure()
    figure.subplots().loglog()
    figure.savefig(io.BytesIO())                       # fonts and the signs of an axis are read once for all
    for split in ("train", "test"):                    # and MNIST, its checksums verified
        digits(split)
    gc.freeze()
    gc.enable()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        elif not (answer := os.fork()):
            code = 1
            try:
                for number, name in ((1, "out"), (2, "err")):
                    os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
                sys.stdin = open(os.devnull)
                folder = os.path.dirname(request["script"])
                os.chdir(folder)
                sys.path[0], sys.argv = folder, [request["script"], *request["argv"]]
                exec(request["before"], {})
                runpy.run_path(request["script"], run_name="__main__")
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)                                        # at once: tidying up takes longer than starting a script


if __name__ == "__main__":
    serve()
