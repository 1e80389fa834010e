"""tools/new_lesson.py, on made-up lessons of a few lines, and once on lesson 05, whose child is trained and sampled."""

import ast
import re
import shutil
from pathlib import Path

import pytest
import test_lessons
import yaml
from test_tools_lineage import entry, write

import conftest
from tools import lineage
from tools.new_lesson import main

ROOT = Path(__file__).resolve().parent.parent
PARENT = {
    "lesson_01/model.py": "def far(x):\n    return x\n",
    "lesson_02/model.py": '"""Two."""\n\nimport math\n\nfrom earlier import far  # lesson 01\n\nLIMIT = math.pi\n\n\n'
                          "class Net:\n    net = far\n\n\ndef idle(x):\n    return -x\n\n\n"
                          f"def {'long_' * 15}name():\n    return 1\n\n\ndef {'very_' * 15}long():\n    return 2\n",
    "lesson_02/config.yaml": "train:\n  start: ../lesson_01/model.py   # ../lesson_01/model.py: not ../none.py\n",
    "lesson_02/train.py": '"""Train."""\n\nimport math\n\nfrom model import LIMIT, Net, far\n\nHALF = LIMIT / 2\n\n\n'
                          "# Sec. 2\n# Adapted from lesson_01/train.py: main -- with\n#   a limit\n# Eq. (1)\n"
                          "@math.cos\ndef main(argv=None):\n    return Net, far, HALF\n\n\ndef own():\n    return 1\n",
    "lesson_01/train.py": "def main():\n    return 0\n\n\ndef first():\n    return 1\n",
    "lesson_02/sample.py": f"from model import Net, {'long_' * 15}name, {'very_' * 15}long\n\n\n"
                           "# Copied from lesson_01/train.py: first\ndef first():\n    return 1\n",
    "lesson_02/reproduce.py": "class A:\n    # Copied from lesson_01/train.py: first\n    def first():\n"
                              "        return 1\n",
}
LESSONS = [entry("01"), entry("02", "01"), entry("02b", "02", state="planned"), entry("03", "02", state="planned"),
           entry("04", "03", state="planned"), entry("05", state="planned")]


@pytest.fixture
def root(tmp_path):
    write(tmp_path, PARENT, LESSONS)
    lineage.sync(tmp_path)
    assert lineage.check(tmp_path) == []
    return tmp_path


def files(root):
    return {path.relative_to(root).as_posix(): path.read_text() for path in root.rglob("*") if path.is_file()}


def test_the_folder_is_made_from_the_parent(root, capsys):
    before = files(root)
    assert main(["03"], root) == 0
    out, after = capsys.readouterr().out, files(root)
    names = "README.md", "config.yaml", "model.py", "earlier.py", "train.py", "sample.py", "reproduce.py"
    made = {f"lesson_03/{name}" for name in names} | {"tests/test_lesson_03.py"}
    assert after.keys() - before.keys() == made and all(f"{path}: written" in out for path in made)
    assert {path for path in before if before[path] != after[path]} == set()    # no other lesson, and not the lock
    assert lineage.check(root) == []

    first, second = f"{'long_' * 15}name", f"{'very_' * 15}long"
    assert after["lesson_03/model.py"] == (
        '"""Name03: A title (TODO: authors 2020).\n\nConvention: TODO: what t and x_t mean here, where t = 0 is, what '
        'the network receives and predicts.\n"""\n\nfrom earlier import far  # lesson 01\n'
        f"from earlier import (  # lesson 02\n    LIMIT,\n    Net,\n    {first},\n    {second},\n)\n")
    assert "idle" not in after["lesson_03/earlier.py"] and "class Net" in after["lesson_03/earlier.py"]
    train = PARENT["lesson_02/train.py"].replace("def own", "# Copied from lesson_02/train.py: own\ndef own")
    assert after["lesson_03/train.py"] == train.replace(
        "# Adapted from lesson_01/train.py: main -- with\n#   a limit\n", "# Copied from lesson_02/train.py: main\n")
    assert after["lesson_03/sample.py"] == PARENT["lesson_02/sample.py"]                # it names the first owner
    reproduce = "# Copied from lesson_02/reproduce.py: A\n" + PARENT["lesson_02/reproduce.py"]
    assert after["lesson_03/reproduce.py"] == reproduce
    assert after["lesson_03/config.yaml"] == PARENT["lesson_02/config.yaml"]
    page = after["lesson_03/README.md"]
    assert re.findall("^## (.*)$", page, re.MULTILINE) == [
        "What is new since lesson 02" if "new since" in title else title for title in test_lessons.HEADINGS]
    assert page.startswith("# Lesson 03: Name03\n") and "/lesson_03/notebook.ipynb)" in page and "June 2020" in page
    assert "| copied | `train.py` | `main`, `own` | from [lesson_02](../lesson_02/train.py) |" in page


def test_a_long_title_takes_two_lines(root):
    register = yaml.safe_load((root / "lessons.yaml").read_text())
    register["lessons"][3]["title"] = "A title " * 20
    (root / "lessons.yaml").write_text(yaml.safe_dump(register))
    assert main(["03"], root) == 0
    first, second, empty, *_ = (root / "lesson_03/model.py").read_text().split("\n")
    assert first.startswith('"""Name03: A title') and second.endswith("(TODO: authors 2020).") and not empty
    assert max(len(first), len(second)) <= 120


def test_paths_of_a_sublesson_lead_one_folder_up(root):
    assert main(["2b"], root) == 0
    after = files(root)
    assert after["lesson_02/sublesson_b/config.yaml"] == (
        "train:\n  start: ../../lesson_01/model.py   # ../../lesson_01/model.py: not ../none.py\n")
    assert 'LESSON = "lesson_02/sublesson_b"' in after["tests/test_lesson_02b.py"]
    assert "from [lesson_02](../train.py)" in after["lesson_02/sublesson_b/README.md"]
    assert lineage.check(root) == []


@pytest.mark.parametrize("argv, message", [
    (["07"], "there is no lesson '07' in lessons.yaml"), (["x"], "there is no lesson 'x' in lessons.yaml"),
    (["02"], "lesson_02 exists already"), (["05"], "lesson 05 has no parent in lessons.yaml"),
    (["04"], "lesson 03, the parent, is not written: there is no lesson_03/model.py"),
    ([], "name one lesson"), (["03", "04"], "name one lesson"), (["--force"], "name one lesson"),
])
def test_what_cannot_be_made_is_refused_in_one_line(root, capsys, argv, message):
    before = files(root)
    assert main(argv, root) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {message}") and err.count("\n") == 1
    assert files(root) == before


@pytest.mark.parametrize("path, text, message", [
    ("tests/test_lesson_03.py", "", "tests/test_lesson_03.py exists already"),
    ("lesson_03/note", "", "lesson_03 exists already"),
    ("lesson_01/train.py", "def", "lesson_01/train.py:1: is not Python"),
])
def test_nothing_is_written_over_or_half_read(root, capsys, path, text, message):
    (root / path).parent.mkdir(exist_ok=True)
    (root / path).write_text(text)
    before = files(root)
    assert main(["03"], root) == 2 and files(root) == before
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_what_is_amiss_with_the_parent_is_told(root, capsys):
    write(root, {"lesson_01/train.py": "def main():\n    return 5\n\n\ndef first():\n    return 9\n"}, LESSONS)
    assert main(["03"], root) == 0
    assert "lesson_03/sample.py:5: first rewritten from lesson_01/train.py: first" in capsys.readouterr().out


def test_a_child_of_lesson_05_trains_and_draws(tmp_path, monkeypatch, capsys):
    register = yaml.safe_load((ROOT / "lessons.yaml").read_text(encoding="utf-8"))
    child = {**entry("98", "05", state="planned"), "paper": "https://arxiv.org/abs/2405.01234v2", "date": "2024-05"}
    register["lessons"].append(child)
    (tmp_path / "lessons.yaml").write_text(yaml.safe_dump(register))
    for folder in ("lesson_01", "lesson_02", "lesson_05"):
        shutil.copytree(ROOT / folder, tmp_path / folder,
                        ignore=shutil.ignore_patterns("results", "runs", "sublesson_*", "__pycache__", "*.ipynb"))
    assert main(["98"], tmp_path) == 0, capsys.readouterr().out
    written = (tmp_path / "tests/test_lesson_98.py").read_text()
    assert "(TODO: authors 2024, arXiv 2405.01234v2)" in (tmp_path / "lesson_98/model.py").read_text()
    house = lineage.load(tmp_path)
    assert lineage.new_lines(house, "lesson_98") == 0

    monkeypatch.setattr(conftest, "ROOT", tmp_path)
    names = {}
    exec(compile(ast.parse(written), "test_lesson_98.py", "exec"), names)
    names["test_two_steps_of_training_give_weights_that_draw"](tmp_path / "runs")
