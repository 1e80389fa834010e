"""tests/conftest.py: tests of one clone never run another's code, nor one lesson's tests another lesson's modules."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import ROOT, group, load, pytest_xdist_make_scheduler


def test_processes_take_utils_from_this_checkout(tmp_path):
    """A `utils` that is installed elsewhere, from another clone, must not be the one that is tested."""
    (tmp_path / "elsewhere" / "utils").mkdir(parents=True)
    (tmp_path / "elsewhere" / "utils" / "__init__.py").touch()
    installed = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(tmp_path / "elsewhere"))))
    done = subprocess.run([sys.executable, "-c", "import importlib.util as u; print(u.find_spec('utils').origin)"],
                          capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": installed})
    assert Path(done.stdout.strip()) == ROOT / "utils" / "__init__.py", done.stderr


def test_scripts_take_utils_from_this_checkout(launch, tmp_path):
    (tmp_path / "where.py").write_text("import os, utils\nprint(utils.__file__, os.environ['PYTHONPATH'])\n")
    process = launch(tmp_path / "where.py")
    assert process.wait() == 0, process.err
    file, path = process.out.split()
    assert Path(file).is_relative_to(ROOT / "utils") and path.split(os.pathsep)[0] == str(ROOT)


def test_the_process_that_hands_out_the_groups_has_no_torch():
    code = "import sys, conftest; print(conftest.pytest_xdist_auto_num_workers(), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "tests")
    number, torch = done.stdout.split()
    assert 1 <= int(number) <= 4 and torch == "False", done.stderr


def made_up(folder, text):
    folder.mkdir()
    (folder / "earlier.py").write_text(f"WHO = {text!r}\n")
    (folder / "model.py").write_text("import earlier\nfrom earlier import WHO\n")
    (folder / "train.py").write_text("import model\n")
    return folder


def test_lessons_do_not_see_each_others_modules(tmp_path):
    """Every lesson has modules of the same names; each must get its own, earlier.py too."""
    one, two = made_up(tmp_path / "one", "1"), made_up(tmp_path / "two", "2")
    first, second = load(one, "train"), load(two, "train")
    assert (first.model.WHO, second.model.WHO) == ("1", "2")
    assert first.model.earlier is not second.model.earlier and load(one, "earlier") is first.model.earlier
    assert load(one, "model") is first.model and not {"earlier", "model", "train"} & set(sys.modules)


# ------------------------------------------------------------------ pytest -n auto
@pytest.mark.parametrize("nodeid, name", [
    ("tests/test_lesson_05.py::test_a[x]", "lesson 05"), ("tests/test_claims_05a.py::test_b", "lesson 05a"),
    ("tests/test_lessons.py::test_c[05a-model.py]", "lesson 05a"), ("tests/test_lessons.py::test_c[05]", "lesson 05"),
    ("tests/test_fakegpu.py::test_g[05a]", "lesson 05a"), ("tests/test_fakegpu.py::test_h", "test_fakegpu"),
    ("tests/test_lessons.py::test_d[config.py]", "test_lessons"), ("tests/test_lessons.py::test_e", "test_lessons"),
    ("tests/test_tools_notebook.py::test_f[lesson_05/sublesson_a]", "lesson 05a"),
    ("tests/test_tools_notebook.py::test_f[lesson_05]", "lesson 05"),
    ("tests/test_tools_notebook.py::test_g[lesson_05 x]", "test_tools_notebook"),
    ("tests/test_utils_run.py::test_h[lesson_05]", "processes"), ("tests/test_tools_bench.py::test_i", "processes"),
    ("tests/test_utils_config.py::test_j[lesson_05]", "test_utils_config"),
])
def test_who_shares_a_process(nodeid, name):
    assert group(nodeid) == name


class Node:
    """What the scheduler sees of a process of xdist."""

    shutting_down = False

    def __init__(self, name):
        self.gateway, self.sent = SimpleNamespace(id=name), []

    def send_runtest_some(self, indices):
        self.sent += indices

    def shutdown(self):
        self.shutting_down = True


def test_scheduler_hands_out_groups():
    """Two lessons with tests in three files, two processes: each gets a whole lesson, not every second test."""
    log = pytest.importorskip("xdist.remote").Producer("test", enabled=False)
    config = SimpleNamespace(option=SimpleNamespace(), getvalue=lambda name: ["popen"] * 2)
    scheduler = pytest_xdist_make_scheduler(config, log)
    tests = [f"tests/{file}" for number in ("01", "02") for file in (
        f"test_lesson_{number}.py::a", f"test_lesson_{number}.py::b", f"test_lessons.py::c[{number}]",
        f"test_claims_{number}.py::d")]
    nodes = [Node("gw0"), Node("gw1")]
    for node in nodes:
        scheduler.add_node(node)
        scheduler.add_node_collection(node, tests)
    scheduler.schedule()
    assert [node.sent for node in nodes] == [[0, 1, 2, 3], [4, 5, 6, 7]]
