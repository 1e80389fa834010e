"""tools/lines.py: the links from equations to lines of code, and whether they are fresh."""
import re

import pytest

from tools import lineage, lines

MODEL = '''"""A lesson."""
import earlier  # lesson 01: Base
from earlier import helper  # lesson 01

SCALE = 2.0


@decorated
def step(x):
    return x


class Net(earlier.Base):
    width: int = 3

    def __init__(self):
        self.table = [1]
        self.register_buffer("abar", 0)

    def forward(self, x):
        return x
'''
EARLIER = "class Base:\n    def loss(self):\n        pass\n\n\ndef helper():\n    pass\n"
TRAIN = "def main():\n    pass\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "lessons.yaml").write_text("lessons: [{number: '02', folder: lesson_02, state: ready}]\n")
    folder = tmp_path / "lesson_02"
    folder.mkdir()
    for name, text in (("model.py", MODEL), ("earlier.py", EARLIER), ("train.py", TRAIN)):
        (folder / name).write_text(text)
    return folder


def page(cell, heading="From equation to line"):
    return f"# Title\n\n## {heading}\n\n| paper | `model.py` |\n|---|---|\n| Eq. (1) | {cell} |\n\n`step`\n\n## Next\n"


@pytest.mark.parametrize("cell, wanted", [
    ("`SCALE`", "[`SCALE`](model.py#L5)"),
    ("`step`, `Net`", "[`step`](model.py#L8-L10), [`Net`](model.py#L13-L21)"),
    ("`Net.forward`", "[`Net.forward`](model.py#L20-L21)"),
    ("`Net.width`", "[`Net.width`](model.py#L14)"),
    ("`Net.table`, `Net.abar`", "[`Net.table`](model.py#L17), [`Net.abar`](model.py#L18)"),
    ("`Net.loss`", "[`Net.loss`](earlier.py#L2-L3)"),                   # inherited
    ("`helper`", "[`helper`](earlier.py#L6-L7)"),
    ("`Net(..., deep=True)`", "[`Net(..., deep=True)`](model.py#L13-L21)"),
    ("`main` in `train.py`", "[`main`](train.py#L1-L2) in [`train.py`](train.py)"),
    ("`main`, `x`, `sample.py`", "`main`, `x`, `sample.py`"),           # nowhere, or not in this folder
    ("[`step`](model.py#L1-L2)", "[`step`](model.py#L8-L10)"),          # stale
    ("[`main`](train.py#L9) in [`train.py`](train.py)", "[`main`](train.py#L1-L2) in [`train.py`](train.py)"),
    ("[`step`](https://example.org)", "[`step`](https://example.org)"),
])
def test_names_become_links(folder, cell, wanted):
    mistakes = []
    new = lines.linked(page(cell), folder, mistakes)
    assert new == page(wanted).replace("| `model.py` |", "| [`model.py`](model.py) |") and mistakes == []
    assert lines.linked(new, folder) == new                             # twice changes nothing
    assert lines.linked(page(cell, "Other"), folder) == page(cell, "Other")


@pytest.mark.parametrize("cell, mistake", [
    ("[`gone`](model.py#L3)", "gone is not in model.py"),               # a link that has lost its name
    ("[`main2`](train.py#L3) in `train.py`", "main2 is not in train.py"),
    ("`Net.gone`", "Net.gone is not in model.py"),
])
def test_a_name_that_is_not_there_is_a_mistake(folder, capsys, cell, mistake):
    (folder / "README.md").write_text(page(cell))
    assert lines.main([], folder.parent) == 1
    assert capsys.readouterr().err == f"error: lesson_02/README.md: {mistake}\n"


def test_a_link_is_stale_when_lines_move(folder, capsys):
    (folder / "README.md").write_text(page("`step`"))
    assert lines.main(["--check"], folder.parent) == 1 and "python -m tools.lines" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == page("`step`")         # --check writes nothing
    assert lines.main(["02"], folder.parent) == 0 and lines.main(["--check"], folder.parent) == 0
    (folder / "model.py").write_text("# one more line\n" + MODEL)
    assert lines.main(["--check"], folder.parent) == 1
    assert lines.main([], folder.parent) == 0
    assert "[`step`](model.py#L9-L11)" in (folder / "README.md").read_text()
    assert lines.main(["07"], folder.parent) == 2 and lines.main(["--what"], folder.parent) == 2


def test_links_of_the_pages_are_fresh():
    assert lines.write(check=True) == ([], [])


def test_every_page_has_links_to_its_lines():
    for lesson in lineage.load_lessons(lines.ROOT):
        if lesson["state"] == "ready":
            text = (lines.ROOT / lesson["folder"] / "README.md").read_text(encoding="utf-8")
            assert len(re.findall(r"\]\(model\.py#L\d+", lines.SECTION.search(text)[0])) >= 3, lesson["folder"]
