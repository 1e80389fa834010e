"""tools/notebook.py: from README.md to an executed notebook.ipynb, on a made-up lesson and on the real ones."""
import json
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import nbformat
import pytest

from tools import lineage, notebook
from tools.frontpage import REPOSITORY
from tools.notebook import ROOT, NotebookError, build, check, execute, main

README = """\
# Lesson five

See [`model.py`](model.py#L3), [the
parent](../lesson_04/README.md) and [above](#the-idea). Not `[code](model.py)`, not $a[i](t)$.

![digits](results/small.png "a title")

## The idea

<!-- cell: model.py imports -->
<!-- cell: model.py same Block double -->

```python
## not a heading, [not a link](model.py)
<!-- cell: python not a marker -->
```

## Run it

<!-- cell: train steps=3 name=a -->

<img src="results/small.png" width="9"> and ![big](results/big.png)

<!-- cell: python
print(Block().value, double(4), WIDTH, Block.name)
result["args"]
-->
<!-- cell: model.py -->
"""

MODEL = '''\
"""A tiny model."""
import math
from functools import wraps

import earlier                                       # lesson 04: Block
from earlier import half                             # lesson 04
# the width
WIDTH = 3


def same(function):
    return wraps(function)(lambda *args: function(*args))


# Copied from lesson_04/model.py: double
# (Eq. 2)
@same
def double(x):
    return 2 * x                                     # Eq. (2)


class Block(earlier.Block):
    value = math.floor(half(5))


TABLE = {"block": Block}

if __name__ == "__main__":
    print(double(WIDTH))
'''

EARLIER = '''\
"""What the lesson takes from earlier ones."""


# lesson_04/model.py
def half(x):
    return x / 2


class Block:
    name = "from earlier"
'''

TRAIN = '''\
import sys
import time
from pathlib import Path

from model import double


def main(argv=None):
    for step in range(3):
        print(f"\\r{step}/2", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print("wrote", Path(__file__).resolve().parent / "runs" / "1")
    Path("trace.txt").write_text(str(argv))
    return {"args": argv, "four": double(2)}
'''

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def root(tmp_path):
    """A repository with one lesson."""
    lesson = tmp_path / "course" / "lesson_05"
    (lesson / "results").mkdir(parents=True)
    for name, text in (("README.md", README), ("model.py", MODEL), ("earlier.py", EARLIER), ("train.py", TRAIN)):
        (lesson / name).write_text(text)
    (lesson / "results" / "small.png").write_bytes(PNG + bytes(100))
    (lesson / "results" / "big.png").write_bytes(PNG + bytes(notebook.MAX_PICTURE))
    return tmp_path / "course"


def edit(root, old, new, name="README.md"):
    path = root / "lesson_05" / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def cells(root, kind=None):
    made = nbformat.read(root / "lesson_05" / "notebook.ipynb", as_version=4)
    nbformat.validate(made)
    return [cell for cell in made.cells if kind in (None, cell.cell_type)]


def pretend_executed(root):
    """Give every code cell the output of a run without running it."""
    path = build(root, "lesson_05")
    made = nbformat.read(path, as_version=4)
    for count, cell in enumerate((cell for cell in made.cells if cell.cell_type == "code"), 1):
        cell.execution_count = count
        cell.outputs = [nbformat.v4.new_output("stream", text=f"output {count}\n")]
    notebook.save(made, path)
    return path


# ---------------------------------------------------------------------- build
def test_build_makes_the_cells_in_order(root):
    build(root, "lesson_05")
    kinds = [cell.cell_type[0] for cell in cells(root)]
    assert "".join(kinds) == "mcmccmmcmcc"             # title, set-up, heading, 2 cells, fence, heading, ...
    setup, imports, names, train, python, whole = (cell.source for cell in cells(root, "code"))
    assert "google.colab" in setup and "lesson_05" in setup
    assert imports == ("import math\nfrom functools import wraps\n\n"
                       "import earlier                                       # lesson 04: Block\n"
                       "from earlier import half                             # lesson 04\n# the width\nWIDTH = 3")
    assert names == ("def same(function):\n    return wraps(function)(lambda *args: function(*args))\n\n\n"
                     "class Block(earlier.Block):\n    value = math.floor(half(5))\n\n\n"
                     "# Copied from lesson_04/model.py: double\n# (Eq. 2)\n"
                     "@same\ndef double(x):\n    return 2 * x                                     # Eq. (2)")
    assert train == 'import train\n\nresult = train.main(["steps=3", "name=a", *SMOKE])'
    assert python == 'print(Block().value, double(4), WIDTH, Block.name)\nresult["args"]'
    assert whole.startswith('"""A tiny model."""') and whole.endswith('TABLE = {"block": Block}')
    texts = [cell.source for cell in cells(root, "markdown")]
    assert "## not a heading, [not a link](model.py)\n<!-- cell: python not a marker -->" in texts[2]
    assert not any("cell: train" in text for text in texts)


def test_links_and_pictures_work_away_from_the_folder(root):
    build(root, "lesson_05")
    title, *_, last = cells(root, "markdown")
    page = f"https://github.com/{REPOSITORY}/blob/main"
    assert f"[`model.py`]({page}/lesson_05/model.py#L3)" in title.source
    assert f"[the\nparent]({page}/lesson_04/README.md)" in title.source
    assert f"[above]({page}/lesson_05/README.md#the-idea)" in title.source
    assert "`[code](model.py)`" in title.source and "$a[i](t)$" in title.source
    assert '![digits](attachment:results_small.png "a title")' in title.source
    assert list(title.attachments) == ["results_small.png"] and "image/png" in title.attachments["results_small.png"]
    raw = f"https://raw.githubusercontent.com/{REPOSITORY}/main/lesson_05/results"
    assert f'<img src="{raw}/small.png" width="9">' in last.source and f"![big]({raw}/big.png)" in last.source


def test_a_picture_inside_a_link(root):
    edit(root, '![digits](results/small.png "a title")',
         "[![digits](results/small.png)](results) [a](https://x.org/b)")
    build(root, "lesson_05")
    assert (f"[![digits](attachment:results_small.png)](https://github.com/{REPOSITORY}/tree/main/lesson_05/results) "
            "[a](https://x.org/b)") in cells(root)[0].source


def test_building_twice_gives_the_same_bytes(root):
    first = build(root, "lesson_05").read_bytes()
    assert build(root, "lesson_05").read_bytes() == first
    executed = pretend_executed(root).read_bytes()
    assert build(root, "lesson_05").read_bytes() == executed != first


def test_ids_are_stable_when_cells_come_and_go(root):
    build(root, "lesson_05")
    before = {cell.source: cell.id for cell in cells(root)}
    assert len(set(before.values())) == len(before)
    edit(root, "## Run it\n", "## Between\n\nMore.\n\n<!-- cell: model.py Block -->\n\n## Run it\n")
    build(root, "lesson_05")
    after = {cell.source: cell.id for cell in cells(root)}
    assert len(after) == len(before) + 2 and before.items() <= after.items()


def test_outputs_of_unchanged_cells_are_kept(root):
    pretend_executed(root)
    edit(root, "## Run it", "## Run this")             # changes the ids, not the code
    edit(root, "2 * x  ", "x + x  ", "model.py")       # changes two cells
    build(root, "lesson_05")
    kept = [cell.outputs[0].text if cell.outputs else None for cell in cells(root, "code")]
    assert kept == ["output 1\n", "output 2\n", None, "output 4\n", "output 5\n", None]
    assert [cell.execution_count for cell in cells(root, "code")] == [1, 2, None, 4, 5, None]


@pytest.mark.parametrize("old, new, line, message", [
    ("Block double", "Blok double", 11, "model.py defines no Blok; did you mean Block?"),
    ("Block double", "Block half", 11, "model.py only imports half: it stands in earlier.py now; leave it out"),
    ("Block double", "Block wraps", 11, "model.py only imports wraps: it belongs to functools; leave it out"),
    ("model.py same", "modle.py same", 11, "no file modle.py in lesson_05"),
    ("cell: train", "cell: sample", 20, "no file sample.py"),
    ("train steps=3", "train steps", 20, "train takes key=value, not 'steps'"),
    ("cell: train", "cell: tran", 20, "'tran' is not a kind of cell"),
    ("<!-- cell: train", "Now <!-- cell: train", 20, "stands alone"),
    ("cell: train", "cell train", 20, "a marker is"),
    ("double -->", "double", 11, "a marker is"),
    ("results/small.png \"", "results/none.png \"", 6, "no picture results/none.png"),
    ("results/big.png", "../../big.png", 22, "outside the repository"),
    ("../lesson_04", "../../x", 4, "outside the repository"),
])
def test_a_mistake_is_one_line_with_its_place(root, capsys, old, new, line, message):
    edit(root, old, new)
    assert main(["build", "lesson_05"], root) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: lesson_05/README.md:{line}: ") and message in error and error.count("\n") == 1
    assert not (root / "lesson_05" / "notebook.ipynb").exists()


def test_constants_that_need_a_definition_stay_out_of_the_imports(root):
    path = root / "lesson_05" / "model.py"
    path.write_text("import math\nA = 1\n\ndef f():\n    return A\n\nB = f()\nC = B + 1\nD: int = 4\n")
    assert notebook.definitions(path, ["imports"]) == "import math\nA = 1\n\nD: int = 4"
    assert notebook.definitions(path, ["C", "f"]) == "C = B + 1\n\n\ndef f():\n    return A"


def test_set_up_on_colab(root, monkeypatch):
    """Clones into /content, installs what is missing only, holds torch fast, goes to the lesson."""
    build(root, "lesson_05")
    content = root.parent / "content"
    clone = content / REPOSITORY.split("/")[1]
    calls = []

    def run(command, check):
        calls.append(command)
        if command[0] == "git":
            (clone / "lesson_05").mkdir(parents=True)
            (clone / "requirements.txt").write_text("# a comment\nPyYAML\nnot_there>=2  # why\ntorch>=2.2\n-e .\n")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(tempfile, "tempdir", str(root))
    monkeypatch.chdir(root)
    monkeypatch.delenv("SMOKE", raising=False)
    source = cells(root, "code")[0].source.replace('"/content"', repr(str(content)))
    names = {}
    exec(source, names)  # noqa: S102
    git, pip = calls
    assert git[-2:] == [f"https://github.com/{REPOSITORY}", str(clone)]
    assert pip[-1] == "not_there>=2" and "PyYAML" not in pip and not any(part.startswith("torch") for part in pip)
    assert re.search(r"^torch==", Path(pip[pip.index("-c") + 1]).read_text(), re.MULTILINE)
    assert sys.path[:2] == [str(clone / "lesson_05"), str(clone)]
    assert names["os"].getcwd() == str(clone / "lesson_05") and names["SMOKE"] == []
    exec(source, {})  # noqa: S102 -- a second time: no second clone
    assert [call[0] == "git" for call in calls] == [True, False, False]


def test_set_up_elsewhere_does_nothing_but_smoke_makes_runs_tiny(root, monkeypatch):
    build(root, "lesson_05")
    monkeypatch.setattr(subprocess, "run", None)
    monkeypatch.setattr(tempfile, "tempdir", str(root))
    monkeypatch.setenv("SMOKE", "1")
    path, names = list(sys.path), {}
    exec(cells(root, "code")[0].source, names)  # noqa: S102
    smoke, runs = names["SMOKE"]
    assert smoke == "smoke=true" and runs.startswith("runs=") and sys.path == path


# ---------------------------------------------------------------------- execute and check
def test_execute_saves_clean_outputs_that_check_accepts(root, monkeypatch):
    monkeypatch.setenv("SMOKE", "1")                   # must not leak into what is committed
    path = execute(root, "lesson_05")
    assert check(root, "lesson_05") == []
    train, python = cells(root, "code")[3:5]
    streams = {output.name: output.text for output in train.outputs}
    assert streams == {"stderr": "2/2\n", "stdout": "wrote lesson_05/runs/1\n"}
    assert python.outputs[0].text == "2 8 3 from earlier\n"
    assert python.outputs[1].data["text/plain"] == "['steps=3', 'name=a']"
    assert [cell.execution_count for cell in cells(root, "code")] == [1, 2, 3, 4, 5, 6]
    assert str(root) not in path.read_text() and "iopub" not in path.read_text()
    assert build(root, "lesson_05").read_bytes() == path.read_bytes()


def here(root, launch):
    """The lesson's notebook, tiny, in a process that becomes the kernel."""
    script = root.parent / "here.py"
    script.write_text("import sys\nfrom pathlib import Path\nfrom tools.notebook import main\n"
                      f"sys.exit(main(['execute', '--smoke', '--here', '05'], Path({str(root)!r})))\n")
    return launch(script)


def test_smoke_runs_in_a_scratch_copy_and_saves_nothing(root, capsys, launch):
    edit(root, 'result["args"]', 'result["args"]; import os; assert result["args"][2] == "smoke=true", result\n'
         'assert result["args"][3].startswith("runs=") and os.path.isdir(result["args"][3][5:])\n'
         'assert os.path.exists("../lessons.yaml") and not os.path.exists("runs")')
    (root / "lessons.yaml").touch()
    (root / "lesson_05" / "runs").mkdir()
    before = sorted(root.rglob("*"))
    assert main(["execute", "--smoke", "05"], root) == 0, capsys.readouterr().err
    process = here(root, launch)
    assert process.wait() == 0, process.err
    assert "2 8 3 from earlier\n" in process.out and sorted(root.rglob("*")) == before


def test_an_error_in_a_cell_names_its_line_and_saves_nothing(root, capsys, launch):
    edit(root, 'result["args"]', 'result["arms"]')
    assert main(["execute", "lesson_05"], root) == 1
    assert capsys.readouterr().err.endswith("error: lesson_05/README.md:24: KeyError: 'arms'\n")
    process = here(root, launch)
    assert process.wait() == 1 and process.err.endswith("error: lesson_05/README.md:24: KeyError: 'arms'\n")
    assert not (root / "lesson_05" / "notebook.ipynb").exists()


def test_a_sublesson_runs_and_finds_its_parent(root):
    folder = root / "lesson_05" / "sublesson_a"
    folder.mkdir()
    (folder / "README.md").write_text(
        "# a\n<!-- cell: python\nfrom pathlib import Path\n"
        "assert Path.cwd().name == 'sublesson_a'\nassert Path('../train.py').exists()\n-->\n")
    assert notebook.lessons(root) == ["lesson_05", "lesson_05/sublesson_a"]
    for name in ("05a", "lesson_05a", "lesson_05/sublesson_a/"):
        assert notebook.folder_of(root, name) == "lesson_05/sublesson_a"
    execute(root, "lesson_05/sublesson_a", smoke=True)
    execute(root, "lesson_05/sublesson_a")
    assert check(root, "lesson_05/sublesson_a") == []


def spoil(root, change):
    """The problems that check finds after a change to the notebook on disk."""
    path = pretend_executed(root)
    assert check(root, "lesson_05") == []
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    return check(root, "lesson_05")


def output(raw, **values):
    raw["cells"][1]["outputs"] = [values]


@pytest.mark.parametrize("change, message", [
    (lambda raw: raw["cells"][3].update(source="import math"), "cell 4 is not what README.md:10 asks for"),
    (lambda raw: raw["cells"][3].update(id="other"), "cell 4 is not what README.md:10 asks for"),
    (lambda raw: raw["cells"].pop(), "10 cells, README.md asks for 11"),
    (lambda raw: raw["cells"][3].update(execution_count=None), "code cell 2 was not run"),
    (lambda raw: raw["cells"][3].update(execution_count=9), "code cell 2 was not run, or not in order"),
    (lambda raw: raw["metadata"].update(widgets={}), "widget state"),
    (lambda raw: raw.update(cells=3), "not a valid notebook"),
    (lambda raw: output(raw, output_type="error", ename="KeyError", evalue="x", traceback=[]),
     "code cell 1 ended in KeyError: x"),
    (lambda raw: output(raw, output_type="stream", name="stdout", text="x" * 1_000_000), "must be under 1 MB"),
    (lambda raw: output(raw, output_type="stream", name="stdout", text="in /srv/me/a.py"), "machine's path /srv/me"),
    (lambda raw: output(raw, output_type="display_data", metadata={}, data={"text/html": "C:\\Users\\me"}),
     "machine's path C:"),
])
def test_check_finds(root, change, message):
    (problem,) = spoil(root, change)
    assert message in problem and "\n" not in problem and problem.startswith("lesson_05/notebook.ipynb: ")


def test_check_leaves_harmless_outputs_alone(root):
    def harmless(raw):
        output(raw, output_type="display_data", metadata={}, data={
            "image/png": "/home/abc/def",
            "text/html": '<b>1</b></td></tr><img src="data:x;base64,/ab/cd/e"> https://a.org/b/c',
            "text/plain": "420 img/s, and/or, train/test/val, /content/x/y, ~/x/y, lesson_05/runs/1, -1/2/3"})
    assert spoil(root, harmless) == []


def test_check_without_a_notebook(root, capsys):
    assert main(["check", "--all"], root) == 1
    assert capsys.readouterr().err == "error: lesson_05/notebook.ipynb: missing; build it\n"


def test_bars_end_in_their_last_state():
    assert notebook.last_state("a\r 50%\r100%  \nnext\n") == "100%\nnext\n"
    assert notebook.last_state("50%\r   \r") == "" and notebook.last_state("\x1b[31mred\x1b[0m\r\n") == "red\n"


def test_clean_drops_widgets_and_joins_streams(root):
    made = nbformat.v4.new_notebook(metadata={"widgets": {"state": 1}}, cells=[nbformat.v4.new_code_cell("x")])
    stream = nbformat.v4.new_output
    made.cells[0].outputs = [
        stream("stream", name="stderr", text=" 1%"), stream("stream", name="stdout", text=f"{root}/a.py:1 {root}2/b\n"),
        stream("stream", name="stderr", text="\r 2%"), stream("stream", name="stdout", text=f"{sys.prefix}/lib/x\n"),
        stream("display_data", data={"application/vnd.jupyter.widget-view+json": {}, "text/plain": "bar"})]
    notebook.clean(made, root)
    assert "widgets" not in made.metadata
    err, out = made.cells[0].outputs
    assert err.text == " 2%" and out.text.splitlines()[0].startswith("a.py:1 ") and out.text.endswith("\nlib/x\n")


@pytest.mark.parametrize("argv", [[], ["build"], ["biuld", "05"], ["build", "lesson_99"], ["build", "--all", "05"],
                                  ["check", "--smoke", "05"], ["execute", "--here", "05"], ["build", "../x"],
                                  ["execute", "--smoke", "--here", "--all"], ["build", "05", "--wrong"]])
def test_bad_usage_is_one_line_and_exit_code_2(root, capsys, argv):
    with pytest.raises(SystemExit) as stop:
        main(argv, root)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith("error: ")


def test_a_readme_without_markers(root):
    (root / "lesson_05" / "README.md").write_text("# Only text\n")
    assert notebook.lessons(root) == []
    with pytest.raises(NotebookError, match="no marker"):
        build(root, "lesson_05")


# ---------------------------------------------------------------------- the real lessons
READY = {lesson["folder"] for lesson in lineage.load_lessons(ROOT) if lesson["state"] == "ready"}


BUILT = [name for name in notebook.lessons(ROOT) if (ROOT / name / "notebook.ipynb").exists()]


@pytest.mark.parametrize("lesson", BUILT)
def test_committed_notebook_is_up_to_date(lesson):
    assert check(ROOT, lesson) == []


@pytest.mark.parametrize("lesson", [name for name in notebook.lessons(ROOT) if name in READY])
def test_notebook_of_a_ready_lesson_runs(lesson, launch):
    """Every cell, tiny; in a process that need not import torch first. The way through a kernel is tested above."""
    process = launch("tools/notebook.py", "execute", "--smoke", "--here", lesson)
    assert process.wait() == 0, process.out + process.err
    assert process.out.endswith(f"{lesson}/notebook.ipynb: ran in a scratch copy\n")
