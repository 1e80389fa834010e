"""tools/notebook.py: from README.md to an executed notebook.ipynb, on a made-up lesson and on the real ones."""
import base64
import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import nbformat
import pytest
import torch
from PIL import Image

from tools import cells as cells_of
from tools import lineage, notebook
from tools.cells import NotebookError
from tools.frontpage import REPOSITORY
from tools.notebook import ROOT, build, check, execute, main
from utils import images

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

<!-- cell: train.py Points -->
<!-- cell: text
Change [something](model.py).
-->
<!-- cell: train steps=3 name=a -->

<details><summary>More</summary>

<img src="results/small.png" width="9">

</details>

<!-- cell: python
print(Block().value, double(4), WIDTH, Block.name)
result["args"]
-->
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
import math
import sys
from pathlib import Path

from model import Block, double
from plumbing import Run, cli


def main(argv=None):
    run = Run(__file__, argv)                           # the plumbing
    for step in range(3):
        print(f"\\r{step}/2", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print("wrote", run.folder / "runs" / "1")
    Path("trace.txt").write_text(str(run.argv))
    return {"args": run.argv, "four": double(2), "points": Points().n,
            "block": Block.__module__}


class Points:
    n = math.floor(half(9))


if __name__ == "__main__":
    cli(main)
'''

PLUMBING = '''\
from pathlib import Path


class Run:
    def __init__(self, file, argv):
        self.folder, self.argv = Path(file).resolve().parent, argv


def cli(main):
    main()
'''

UTILS = '''\
def show(picture):
    from IPython.display import Image, display

    display(Image(picture))
'''


@pytest.fixture
def root(tmp_path):
    """A repository with one lesson."""
    lesson = tmp_path / "course" / "lesson_05"
    (lesson / "results").mkdir(parents=True)
    for name, text in (("README.md", README), ("model.py", MODEL), ("earlier.py", EARLIER), ("train.py", TRAIN),
                       ("plumbing.py", PLUMBING), ("../utils.py", UTILS)):
        (lesson / name).write_text(text)
    Image.new("L", (9, 9)).save(lesson / "results" / "small.png")
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
        cell.outputs = [nbformat.v4.new_output("display_data", data={"text/plain": f"output {count}"})]
        if shown := notebook.digest(path.parent, cell):
            cell.outputs[0].metadata["shows"] = shown
    notebook.save(made, path)
    return path


# ---------------------------------------------------------------------- build
def test_build_makes_the_cells_in_order(root):
    build(root, "lesson_05")
    kinds = [cell.cell_type[0] for cell in cells(root)]
    assert "".join(kinds) == "mccmccmmcmcmcc"          # title, set-up, picture, heading, 2 cells, fence, heading, ...
    setup, first, imports, names, points, train, second, python = (cell.source for cell in cells(root, "code"))
    assert "lesson_05" in setup and REPOSITORY in setup
    assert imports == ("import math\nfrom functools import wraps\n\n"
                       "import earlier                                       # lesson 04: Block\n"
                       "from earlier import half                             # lesson 04\n# the width\nWIDTH = 3")
    assert names == ("def same(function):\n    return wraps(function)(lambda *args: function(*args))\n\n\n"
                     "class Block(earlier.Block):\n    value = math.floor(half(5))\n\n\n"
                     "# Copied from lesson_04/model.py: double\n# (Eq. 2)\n"
                     "@same\ndef double(x):\n    return 2 * x                                     # Eq. (2)")
    assert points == "class Points:\n    n = math.floor(half(9))"            # math is there already
    assert train.startswith("from plumbing import Run\n\n"                   # sys and Path are, too; double is above
                            'run = Run("train.py", ["steps=3", "name=a", *RUNS])  # the plumbing\nfor step in range')
    assert train.endswith('result = {"args": run.argv, "four": double(2), "points": Points().n,\n'
                          '        "block": Block.__module__}')
    assert python == 'print(Block().value, double(4), WIDTH, Block.name)\nresult["args"]'
    assert first == second == 'show("results/small.png")'
    texts = [cell.source for cell in cells(root, "markdown")]
    assert "## not a heading, [not a link](model.py)\n<!-- cell: python not a marker -->" in texts[2]
    assert texts[4] == f"Change [something](https://github.com/{REPOSITORY}/blob/main/lesson_05/model.py)."
    assert texts[5] == "**More**" and not any("cell: train" in text or "details" in text for text in texts)


def test_a_main_that_returns_on_the_way_stays_a_function(root):
    edit(root, "    print(file=sys.stderr)\n", "    if argv:\n        return {}\n", "train.py")
    build(root, "lesson_05")
    train = cells(root, "code")[5].source
    assert train.startswith("from plumbing import Run\n\ndef main(argv=None):\n"
                            '    run = Run("train.py", argv)  # the plumbing\n')
    assert train.endswith('\n\n\nresult = main(["steps=3", "name=a", *RUNS])')


def test_links_work_away_from_the_folder(root):
    build(root, "lesson_05")
    title = cells(root, "markdown")[0].source
    page = f"https://github.com/{REPOSITORY}/blob/main"
    assert f"[`model.py`]({page}/lesson_05/model.py#L3)" in title
    assert f"[the\nparent]({page}/lesson_04/README.md)" in title
    assert f"[above]({page}/lesson_05/README.md#the-idea)" in title
    assert "`[code](model.py)`" in title and "$a[i](t)$" in title
    edit(root, "a[i](t)$.", "a[i](t)$. [![badge](https://x.org/a.svg)](results) [a](https://x.org/b)")
    build(root, "lesson_05")
    assert (f"[![badge](https://x.org/a.svg)](https://github.com/{REPOSITORY}/tree/main/lesson_05/results) "
            "[a](https://x.org/b)") in cells(root)[0].source


def test_a_fold_without_a_cell_stays_a_fold(root):
    edit(root, '<img src="results/small.png" width="9">', "words")
    build(root, "lesson_05")
    assert "<details><summary>More</summary>\n\nwords\n\n</details>" in cells(root, "markdown")[5].source


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
    edit(root, "2 * x  ", "x + x  ", "model.py")       # changes one cell
    build(root, "lesson_05")
    kept = [cell.outputs[0].data["text/plain"] if cell.outputs else None for cell in cells(root, "code")]
    assert kept == [f"output {i}" if i != 4 else None for i in range(1, 9)]
    assert [cell.execution_count for cell in cells(root, "code")] == [1, 2, 3, None, 5, 6, 7, 8]


@pytest.mark.parametrize("old, new, line, message", [
    ("Block double", "Blok double", 11, "model.py defines no Blok; did you mean Block?"),
    ("Block double", "Block half", 11, "model.py only imports half: it stands in earlier.py now; leave it out"),
    ("Block double", "Block wraps", 11, "model.py only imports wraps: it belongs to functools; leave it out"),
    ("model.py same", "modle.py same", 11, "no file modle.py in lesson_05"),
    ("cell: train.py", "cell: sample.py", 20, "no file sample.py"),
    ("train steps=3", "train steps", 24, "train takes key=value, not 'steps'"),
    ("cell: train s", "cell: tran s", 24, "'tran steps=3 name=a' is not a cell"),
    ("<!-- cell: train s", "Now <!-- cell: train s", 24, "stands alone"),
    ("cell: train s", "cell train s", 24, "a marker is"),
    ("double -->", "double", 11, "a marker is"),
    ("<!-- cell: train.py Points -->\n", "", 23, "train.py needs Points, so a cell before must show it: train.py P"),
    ("model.py same Block", "model.py same", 24, "train.py needs Block, so a cell before must show it: model.py B"),
    ("results/small.png \"", "results/none.png \"", 6, "no picture results/none.png"),
    ('<img src="results/small.png', '<img src="../../big.png', 28, "outside the repository"),
    ("![digits](results/small.png", "Here: ![digits](results/small.png", 6, "must stand on a line of its own"),
    ('width="9">', 'width="9"> and this', 28, "must stand on a line of its own"),
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
    model = cells_of.parsed(path.parent, "model.py")
    assert cells_of.definitions(*model, ["imports"], set()) == "import math\nA = 1\n\nD: int = 4"
    assert cells_of.definitions(*model, ["C", "f"], set()) == "C = B + 1\n\n\ndef f():\n    return A"


# From Colab's published list of its image, August 2026: what of the course's dependencies it has.
COLAB = {"torch": "2.11.0+cu128", "torchvision": "0.26.0+cu128", "numpy": "2.1.3", "einops": "0.8.2",
         "matplotlib": "3.10.0", "pillow": "11.3.0", "tqdm": "4.67.3", "PyYAML": "6.0.3", "accelerate": "1.14.0",
         "filelock": "3.32.3", "safetensors": "0.8.0", "psutil": "5.9.5", "scipy": "1.16.3", "timm": "1.0.28"}


@pytest.fixture
def elsewhere(root, monkeypatch):
    """set_up(**versions): run the first cell in an empty folder of a machine with Colab's packages; its commands."""
    build(root, "lesson_05")
    source, content, calls = cells(root, "code")[0].source, root.parent / "content", []
    clone = content / REPOSITORY.split("/")[1]
    content.mkdir()

    def run(command, check):
        calls.append(command)
        if command[0] == "git":
            shutil.copytree(root, clone)
            shutil.copy(ROOT / "pyproject.toml", clone)

    def set_up(**versions):
        have = [types.SimpleNamespace(name=name, version=version) for name, version in (COLAB | versions).items()]
        monkeypatch.setattr(importlib.metadata, "distributions", lambda: have)
        monkeypatch.chdir(content)
        names, before = {}, len(calls)
        exec(source, names)  # noqa: S102
        assert sys.path[:2] == [str(clone / "lesson_05"), str(clone)] and os.getcwd() == str(clone / "lesson_05")
        assert names["RUNS"] == ["runs=runs/notebook"] and "show" in names
        return calls[before:]

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(tempfile, "tempdir", str(root))
    monkeypatch.delenv("SMOKE", raising=False)
    return set_up


def test_set_up_on_colab(elsewhere):
    """Clones, installs what Colab lacks and nothing else, holds torch fast. A second time there is nothing to clone."""
    git, pip = elsewhere()
    assert git == ["git", "clone", "-q", "--depth=1", f"https://github.com/{REPOSITORY}", git[-1]]
    assert pip[1:6] == ["-m", "pip", "install", "-q", "-c"] and {re.split("[<>=]", need)[0] for need in pip[7:]} == {
        "torch-fidelity", "torchdiffeq"}
    assert Path(pip[6]).read_text() == "torch==2.11.0+cu128\ntorchvision==0.26.0+cu128\nnumpy==2.1.3"
    assert elsewhere(**{"torch_fidelity": "0.4.0", "torchdiffeq": "0.2.5"}) == []


def test_set_up_mends_what_is_too_old_but_never_torch(elsewhere):
    _, pip = elsewhere(torch="2.4.0", numpy="1.26", einops="0.3", **{"torch-fidelity": "0.4", "torchdiffeq": "0.2.5"})
    assert [re.split("[<>=]", need)[0] for need in pip[7:]] == ["einops"]


def test_set_up_in_a_clone_does_nothing_but_smoke_makes_runs_tiny(root, monkeypatch):
    build(root, "lesson_05")
    monkeypatch.setattr(subprocess, "run", None)
    monkeypatch.setattr(tempfile, "tempdir", str(root))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("SMOKE", "1")
    for place in (root / "lesson_05", root, root / "lesson_05" / "results"):
        monkeypatch.chdir(place)
        names = {}
        exec(cells(root, "code")[0].source, names)  # noqa: S102
        smoke, runs = names["RUNS"]
        assert smoke == "smoke=true" and runs.startswith("runs=") and os.getcwd() == str(root / "lesson_05")


# ---------------------------------------------------------------------- execute and check
def test_execute_saves_clean_outputs_that_check_accepts(root, monkeypatch):
    monkeypatch.setenv("SMOKE", "1")                   # must not leak into what is committed
    path = execute(root, "lesson_05")
    assert check(root, "lesson_05") == []
    shown, *_, train, _, python = cells(root, "code")[1:]
    assert shown.outputs[0].metadata == {"shows": notebook.digest(path.parent, shown)}
    streams = {output.name: output.text for output in train.outputs}
    assert streams == {"stderr": "2/2\n", "stdout": "wrote lesson_05/runs/1\n"}
    assert python.outputs[0].text == "2 8 3 from earlier\n"
    assert python.outputs[1].data["text/plain"] == "['steps=3', 'name=a', 'runs=runs/notebook']"
    assert [cell.execution_count for cell in cells(root, "code")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert str(root) not in path.read_text() and "iopub" not in path.read_text()
    assert build(root, "lesson_05").read_bytes() == path.read_bytes()


def test_what_a_notebook_shows_is_a_png(tmp_path, monkeypatch):
    """Images and files as they are; an animation keeps its frames, its colours and its times."""
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda output: shown.append(output._repr_mimebundle_()[0]))
    x = torch.linspace(-1, 1, 12 * 784).reshape(12, 1, 28, 28)
    images.show(x, columns=6)
    images.show(images.save_grid(x, tmp_path / "grid.png", columns=6))
    images.show(images.save_gif([x[:6], x[6:], x[3:9]], tmp_path / "moving.gif"))
    assert all(list(bundle) == ["image/png"] for bundle in shown)
    whole, file, moving = (Image.open(io.BytesIO(base64.b64decode(bundle["image/png"]))) for bundle in shown)
    assert whole.convert("L").tobytes() == file.convert("L").tobytes() == images.grid(x, 6).tobytes()
    (parts, times), (wanted, durations) = map(images.frames, (moving, Image.open(tmp_path / "moving.gif")))
    assert [part.tobytes() for part in parts] == [part.tobytes() for part in wanted] and len(parts) == 3
    assert times == durations and times[-1] > times[0] > 0


def test_a_picture_that_has_changed_is_shown_anew_without_a_kernel(root):
    pretend_executed(root)
    before = cells(root, "code")
    Image.new("L", (9, 9), 200).save(root / "lesson_05" / "results" / "small.png")
    stale = check(root, "lesson_05")
    assert len(stale) == 2 and all("does not show the picture as it is now" in problem for problem in stale)
    build(root, "lesson_05")
    assert check(root, "lesson_05") == []
    after = cells(root, "code")
    assert [was.outputs != now.outputs for was, now in zip(before, after)] == [
        cell.source.startswith("show(") for cell in before]
    picture, = next(cell for cell in after if cell.source.startswith("show(")).outputs
    assert Image.open(io.BytesIO(base64.b64decode(picture.data["image/png"]))).convert("L").getpixel((4, 4)) == 200
    assert [cell.execution_count for cell in after] == [cell.execution_count for cell in before]


def test_pictures_are_stored_as_small_as_it_takes():
    """The largest first; figures keep their size and an animation its motion and its length as long as that fits."""
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x") for _ in range(5)])
    noise = lambda seed, size=(900, 300): Image.effect_noise(size, 20 + seed).convert("RGB")
    parts = [*([noise(seed)] for seed in range(3)), [noise(seed, (300, 150)) for seed in range(20)],
             [Image.new("RGB", (99, 50))]]
    for cell, part in zip(made.cells, parts):
        png = base64.b64encode(images.animated_png(part, [100] * 19 + [900] if part[1:] else [0])).decode()
        cell.outputs = [nbformat.v4.new_output("display_data", data={"image/png": png})]
    assert len(nbformat.writes(made)) > 1_500_000
    notebook.fit(made, made.cells)
    assert 200_000 < len(nbformat.writes(made)) < 500_000
    *stills, moving, small = (Image.open(io.BytesIO(base64.b64decode(cell.outputs[0].data["image/png"])))
                              for cell in made.cells)
    assert small.size == (99, 50) and all(600 <= still.width <= 838 and still.n_frames == 1 for still in stills)
    durations = images.frames(moving)[1]
    assert 8 <= len(durations) < 20 and durations[-1] == 900 and sum(durations) == 2800


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
    assert capsys.readouterr().err.endswith("error: lesson_05/README.md:32: KeyError: 'arms'\n")
    process = here(root, launch)
    assert process.wait() == 1 and process.err.endswith("error: lesson_05/README.md:32: KeyError: 'arms'\n")
    assert not (root / "lesson_05" / "notebook.ipynb").exists()


def test_a_sublesson_runs_and_finds_its_parent(root):
    folder = root / "lesson_05" / "sublesson_a"
    folder.mkdir()
    (folder / "model.py").write_text("")
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
    (lambda raw: raw["cells"][4].update(source="import math"), "cell 5 is not what README.md:10 asks for"),
    (lambda raw: raw["cells"][4].update(id="other"), "cell 5 is not what README.md:10 asks for"),
    (lambda raw: raw["cells"].pop(), "13 cells, README.md asks for 14"),
    (lambda raw: raw["cells"][4].update(execution_count=None), "code cell 3 was not run"),
    (lambda raw: raw["cells"][4].update(execution_count=9), "code cell 3 was not run, or not in order"),
    (lambda raw: raw["cells"][2]["outputs"][0]["metadata"].update(shows="another"), "cell 2 does not show the picture"),
    (lambda raw: raw["cells"][2]["outputs"][0].update(metadata={}), "cell 2 does not show the picture"),
    (lambda raw: raw["metadata"].update(widgets={}), "widget state"),
    (lambda raw: raw.update(cells=3), "not a valid notebook"),
    (lambda raw: output(raw, output_type="error", ename="KeyError", evalue="x", traceback=[]),
     "code cell 1 ended in KeyError: x"),
    (lambda raw: output(raw, output_type="stream", name="stdout", text="x" * 500_000), "must be under 500 kB"),
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


EDIT = '''
import re, tempfile
from pathlib import Path
from tools import cells, notebook

lesson = {!r}
made, _ = notebook.make(notebook.ROOT, lesson)
keys = {{cell.id: cell.key for cell in cells.read_cells(notebook.ROOT, lesson)}}
made.cells = [cell for cell in made.cells if re.match(r"set up|model.py|(train|sample).py|train", keys[cell.id])]
for cell in made.cells:
    cell.source = re.sub(r"(?<=def loss)(.*:\\n +)", r"\\1raise KeyError('an edit')\\n        ", cell.source)
with tempfile.TemporaryDirectory() as scratch:
    notebook.mirror(notebook.ROOT, lesson, Path(scratch, "copy"))
    notebook.run_cells_here(made, Path(scratch, "copy", lesson), dict(
        SMOKE="1", PYTHONPATH=str(notebook.ROOT), TMPDIR=scratch, IPYTHONDIR=scratch), lambda cell: keys[cell.id])
'''


@pytest.mark.parametrize("lesson", ["lesson_02", "lesson_05", "lesson_21"])       # 21: `main` stays a function
def test_the_training_is_that_of_the_definitions_above_it(lesson, launch, tmp_path):
    (tmp_path / "edit.py").write_text(EDIT.format(lesson))
    process = launch(tmp_path / "edit.py")
    assert process.wait() == 1
    assert re.search(r"NotebookError: train .*: KeyError: 'an edit'$", process.err.strip()), process.err


QUICKLY = """
import io, utils.images
from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver as Adaptive

solver = Adaptive.__init__
Adaptive.__init__ = lambda self, **how: solver(self, **{**how, "rtol": 1.0, "atol": 1.0})

def first(parts, durations, colours=256):
    content = io.BytesIO()
    parts[0].save(content, "PNG")
    return content.getvalue()

utils.images.animated_png = first
"""


@pytest.mark.parametrize("lesson", [name for name in notebook.lessons(ROOT) if name in READY])
def test_notebook_of_a_ready_lesson_runs(lesson, launch):
    """Every cell, tiny; in a process that need not import torch first. The way through a kernel is tested above.

    Solvers with a step size of their own take large steps, and what is shown is not made small: those are tested, too.
    """
    process = launch("tools/notebook.py", "execute", "--smoke", "--here", lesson, before=QUICKLY)
    assert process.wait() == 0, process.out + process.err
    assert process.out.endswith(f"{lesson}/notebook.ipynb: ran in a scratch copy\n")
