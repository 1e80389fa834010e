"""tools/lineage.py, on made-up lessons of a few lines, and once on the lessons of this repository."""
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tools import lineage
from tools.lineage import check, main, mermaid, sync

ROOT = Path(__file__).resolve().parent.parent

BLOCK = '''class Block:
    """A block."""

    def __init__(self, width=8):
        self.width = width
        self.depth = 2

    @staticmethod
    def forward(x):
        # add one
        return x + 1
'''
NET = '''def net(x, width=4):
    """A network."""
    x = x * width
    return x
'''
COPY = "# Copied from lesson_01/train.py: Block\n"
ADAPTED = "# Adapted from lesson_01/model.py: net -- one more input (Sec. 2)\n"
WIDER = "def net(x, y, width=4):\n    x = x * width + y\n    return x\n"


def entry(number, *parents, state="ready"):
    folder = f"lesson_{number[:2]}" + (f"/sublesson_{number[2]}" if number[2:] else "")
    return {"number": number, "folder": folder, "name": f"Name{number}", "title": "A title", "date": "2020-06",
            "paper": None, "parents": list(parents), "state": state}


LESSONS = [entry("01"), entry("02", "01"), entry("03", "02", "01"), entry("01a", "01", state="planned")]


def write(root, files, lessons=LESSONS):
    """Write lessons; a lesson with a parent gets a README with an empty table."""
    (root / "lessons.yaml").write_text(yaml.safe_dump({"lessons": lessons}))
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for lesson in lessons:
        readme = root / lesson["folder"] / "README.md"
        if lesson["parents"] and readme.parent.is_dir() and not readme.exists():
            readme.write_text(
                f"# A lesson\n\n## What is new since lesson {lesson['parents'][0]}\n\nText.\n\n"
                f"{lineage.START}\n{lineage.END}\n\n## After\n")


def problems(root, files, lessons=LESSONS):
    """What check finds, the tables and pins being in order."""
    write(root, files, lessons)
    sync(root)
    return check(root)


def only(found, *parts):
    """The one line found, which holds all `parts`."""
    assert len(found) == 1, found
    for part in parts:
        assert part in found[0]


# ------------------------------------------------------------------------------------------------ copies
def test_a_faithful_copy_passes(tmp_path):
    assert problems(tmp_path, {"lesson_01/train.py": BLOCK, "lesson_02/train.py": COPY + BLOCK}) == []


def test_docstrings_and_comments_of_a_copy_are_free(tmp_path):
    other = BLOCK.replace('"""A block."""', '"""Other\n\n    words."""').replace("# add one", "# Eq. (3)")
    assert other != BLOCK
    assert problems(tmp_path, {"lesson_01/train.py": BLOCK, "lesson_02/train.py": COPY + "# Sec. 2\n" + other}) == []


@pytest.mark.parametrize("old, new", [("width=8", "width=9"), ("@staticmethod", "@classmethod"), ("x + 1", "x - 1"),
                                      ("class Block:", "@final\nclass Block:"), ("depth = 2", "depth = 2.0")])
def test_a_changed_copy_is_caught(tmp_path, old, new):
    changed = BLOCK.replace(old, new)
    assert changed != BLOCK
    write(tmp_path, {"lesson_01/train.py": BLOCK, "lesson_02/train.py": "import math\n\n\n" + COPY + changed})
    assert any(line.startswith("lesson_02/train.py:4: Block differs from lesson_01/train.py: Block: run `python")
               for line in check(tmp_path))


def test_a_copy_of_a_copy_names_the_first_owner(tmp_path):
    files = {"lesson_01/train.py": BLOCK, "lesson_02/train.py": COPY + BLOCK,
             "lesson_03/train.py": COPY.replace("01", "02") + BLOCK}
    only(problems(tmp_path, files), "lesson_03/train.py:1:", "a copy: name its first owner, lesson_01/train.py: Block")


def test_a_method_of_a_copied_class_is_a_copy_too(tmp_path):
    other = ("class Other:\n    # Copied from lesson_02/train.py: Block.forward\n"
             "    @staticmethod\n    def forward(x):\n        return x + 1\n")
    files = {"lesson_01/train.py": BLOCK, "lesson_02/train.py": COPY + BLOCK, "lesson_03/train.py": other}
    only(problems(tmp_path, files), "lesson_03/train.py:2:", "first owner, lesson_01/train.py: Block.forward")
    (tmp_path / "lesson_03/train.py").write_text(other.replace("lesson_02", "lesson_01"))
    sync(tmp_path)
    assert check(tmp_path) == []


def test_two_copies_of_each_other_are_caught(tmp_path):
    files = {"lesson_01/train.py": COPY.replace("01", "02") + BLOCK, "lesson_02/train.py": COPY + BLOCK}
    assert len(problems(tmp_path, files)) == 2


@pytest.mark.parametrize("marker, message", [
    ("# Copied from lesson_01/train.py: Blok", "there is no lesson_01/train.py: Blok"),
    ("# Copied from lesson_07/train.py: Block", "there is no lesson_07/train.py: Block"),
    ("# Copied from lesson_02/sample.py: Block", "is in the same lesson: import it"),
    ("# Copied from lesson_01/train.py: net", "under another name: call it net"),
    ("# Copied from lesson_01/train.py: Block -- smaller", "gives a reason"),
    ("# Adapted from lesson_01/train.py: Block -- smaller", "Block equals lesson_01/train.py: Block: write `# Copied"),
    ("# copied from lesson_01/train.py: Block", "this marker cannot be used"),
    ("# Copied from lesson_01/train.py", "this marker cannot be used"),
    (COPY + COPY.strip(), "this marker cannot be used"),
    (COPY + "\nwidth = 3\n\n", "this marker cannot be used"),
])
def test_a_marker_that_means_nothing_is_caught(tmp_path, marker, message):
    files = {"lesson_01/train.py": BLOCK + "\n\n" + NET, "lesson_02/sample.py": "class Block:\n    pass\n",
             "lesson_02/train.py": f"{marker}\n{BLOCK}"}
    assert any("lesson_02/train.py:" in line and message in line for line in problems(tmp_path, files))


def test_a_credit_to_others_is_no_marker(tmp_path):
    assert problems(tmp_path, {"lesson_01/train.py": "# Adapted from the authors' code.\n" + BLOCK}) == []


def test_sync_rewrites_copies_after_the_origin_improved(tmp_path):
    method = ("class Other:\n    a = 1\n\n    # Sec. 3\n    # Copied from lesson_01/train.py: Block.forward\n"
              "    @staticmethod\n    def forward(x):\n        return x + 1\n\n    b = 2\n")
    files = {"lesson_01/train.py": BLOCK, "lesson_02/train.py": f"import math\n\n{COPY}{BLOCK}\n\nz = math.pi\n",
             "lesson_03/train.py": method}
    assert problems(tmp_path, files) == []
    better = BLOCK.replace("return x + 1", "x = x + 1\n        return 2 * x").replace("A block", "A better block")
    write(tmp_path, {"lesson_01/train.py": better})
    assert len([line for line in check(tmp_path) if "differs from" in line]) == 2
    done = sync(tmp_path)
    assert "lesson_02/train.py:4: Block rewritten from lesson_01/train.py: Block" in done
    assert (tmp_path / "lesson_02/train.py").read_text() == f"import math\n\n{COPY}{better}\n\nz = math.pi\n"
    assert (tmp_path / "lesson_03/train.py").read_text() == method.replace(
        "        return x + 1\n", "        # add one\n        x = x + 1\n        return 2 * x\n")
    assert check(tmp_path) == []
    assert sync(tmp_path) == []


def test_sync_rewrites_a_file_that_is_origin_and_copy_at_once(tmp_path):
    other = "def other(x):\n    return x\n"
    files = {"lesson_01/train.py": BLOCK, "lesson_02/train.py": f"{COPY}{BLOCK}\n\n{other}",
             "lesson_03/train.py": "# Copied from lesson_02/train.py: other\n" + other}
    assert problems(tmp_path, files) == []
    write(tmp_path, {"lesson_01/train.py": BLOCK.replace("depth = 2", "depth = 2\n        self.more = 3"),
                     "lesson_02/train.py": f"{COPY}{BLOCK}\n\n{other}".replace("return x\n", "return -x\n")})
    sync(tmp_path)
    assert check(tmp_path) == []
    assert "return -x" in (tmp_path / "lesson_03/train.py").read_text()


def test_sync_rewrites_several_copies_in_one_file(tmp_path):
    first, second = function(5, "a"), function(5, "b")
    copies = f"# Copied from lesson_01/train.py: a\n{first}\n\n# Copied from lesson_01/train.py: b\n{second}"
    write(tmp_path, {"lesson_01/train.py": function(9, "a") + function(3, "b"), "lesson_02/train.py": copies})
    sync(tmp_path)
    assert check(tmp_path) == []
    assert (tmp_path / "lesson_02/train.py").read_text() == copies.replace(first, function(9, "a")).replace(
        second, function(3, "b"))


def test_sync_leaves_a_copy_of_a_copy_alone(tmp_path):
    other = COPY.replace("01", "02") + BLOCK.replace("depth = 2", "depth = 3")
    problems(tmp_path, {"lesson_01/train.py": BLOCK, "lesson_02/train.py": COPY + BLOCK, "lesson_03/train.py": other})
    assert (tmp_path / "lesson_03/train.py").read_text() == other


def test_markers_inside_a_copied_class_came_with_it(tmp_path):
    own = "class A:\n    # Adapted from lesson_01/train.py: net -- a method\n    def net(self):\n        return self\n"
    files = {"lesson_01/train.py": NET, "lesson_02/train.py": own,
             "lesson_03/train.py": "# Copied from lesson_02/train.py: A\n" + own}
    assert problems(tmp_path, files) == []
    lock = (tmp_path / "lineage.lock").read_text()
    assert "lesson_02/train.py: A.net <- lesson_01/train.py: net " in lock and "lesson_03" not in lock


def test_sync_changes_nothing_while_a_file_cannot_be_read(tmp_path, capsys):
    write(tmp_path, {"lesson_01/model.py": NET, "lesson_02/model.py": ADAPTED + WIDER})
    sync(tmp_path)
    lock = (tmp_path / "lineage.lock").read_text()
    write(tmp_path, {"lesson_02/model.py": "def broken(:\n"})
    assert main(["sync"], tmp_path) == 1
    assert "lesson_02/model.py:1: is not Python" in capsys.readouterr().out
    assert (tmp_path / "lineage.lock").read_text() == lock


# ------------------------------------------------------------------------------------------------ adaptations
def test_a_missing_reason_is_caught(tmp_path):
    files = {"lesson_01/model.py": NET, "lesson_02/model.py": ADAPTED.partition(" --")[0] + "\n" + WIDER}
    only(problems(tmp_path, files), "lesson_02/model.py:1: net does not say what was adapted: add ` -- REASON`")


def test_a_new_adaptation_is_pinned_and_a_stale_one_asks_for_a_look(tmp_path, capsys):
    write(tmp_path, {"lesson_01/model.py": NET, "lesson_02/model.py": ADAPTED + WIDER})
    assert any("net is not pinned" in line for line in check(tmp_path))
    assert main(["sync"], tmp_path) == 0
    assert check(tmp_path) == []

    write(tmp_path, {"lesson_01/model.py": NET.replace("A network", "Words")})      # a docstring is no change
    assert check(tmp_path) == []
    write(tmp_path, {"lesson_01/model.py": NET.replace("x * width", "x / width")})
    only(check(tmp_path), "lesson_02/model.py:1: lesson_01/model.py: net changed",
         "sync --accept lesson_02/model.py:net`")
    assert main(["sync"], tmp_path) == 1                               # a plain sync does not pin it
    assert main(["sync", "--accept", "lesson_02/model.py:net"], tmp_path) == 0
    assert check(tmp_path) == []
    capsys.readouterr()


def test_a_pin_without_its_marker_is_dropped(tmp_path):
    assert problems(tmp_path, {"lesson_01/model.py": NET, "lesson_02/model.py": ADAPTED + WIDER}) == []
    write(tmp_path, {"lesson_02/model.py": WIDER})
    assert any(line.startswith("lineage.lock:2:") and "belongs to no marker" in line for line in check(tmp_path))
    sync(tmp_path)
    assert check(tmp_path) == []


def test_a_long_reason_goes_on_in_the_next_line(tmp_path):
    marker = "# Adapted from lesson_01/model.py: net -- one more\n#   input (Sec. 2)\n# Eq. (3)\n"
    assert problems(tmp_path, {"lesson_01/model.py": NET, "lesson_02/model.py": marker + WIDER}) == []
    assert ": one more input (Sec. 2) |" in (tmp_path / "lesson_02/README.md").read_text()


# ------------------------------------------------------------------------------------------------ twins
def function(lines, name="f", indent=""):
    """A function of that many lines of code, with some that do not count."""
    body = ["    # a comment", ""] + [f"    x = x + {i}" for i in range(lines - 2)] + ["    return x"]
    lines = [f"def {name}(x):", '    """Words.', '    """', *body]
    return "\n".join(indent + line if line else "" for line in lines) + "\n"


@pytest.mark.parametrize("here", ["model.py", "sample.py"])
def test_an_unmarked_twin_of_eight_lines_in_a_script_is_caught_and_one_of_seven_is_not(tmp_path, here):
    assert problems(tmp_path, {f"lesson_01/{here}": function(7), "lesson_02/train.py": function(7)}) == []
    only(problems(tmp_path, {f"lesson_01/{here}": function(8), "lesson_02/train.py": "\n" + function(8)}),
         f"lesson_02/train.py:2: f equals lesson_01/{here}: f (8 lines): write `# Copied from lesson_01/{here}: f`")


@pytest.mark.parametrize("text", ["def f(x):\n    return x\n", "def f(x): return x\n", function(8),
                                  "class F(Exception):\n    pass\n"])
def test_a_function_or_class_of_a_model_has_one_owner_however_short(tmp_path, text):
    other = text.replace("return x", "return x  # comment").replace("def f", "def g").replace("class F", "class G")
    name, twin = ("F", "G") if "class" in text else ("f", "g")
    only(problems(tmp_path, {"lesson_01/model.py": text, "lesson_02/model.py": "\n" + text}),
         f"lesson_02/model.py:2: {name} equals lesson_01/model.py: {name} ",
         f"take it, `from earlier import {name}  # lesson 01`")
    only(problems(tmp_path, {"lesson_02/model.py": other}), f"lesson_02/model.py:1: {twin} equals lesson_01/model.py: ")


def test_the_older_lesson_owns_a_twin_whatever_the_numbers_say(tmp_path):
    lessons = [entry("01", "02"), entry("02")]
    only(problems(tmp_path, {"lesson_01/model.py": NET, "lesson_02/model.py": NET}, lessons),
         "lesson_01/model.py:1: net equals", "`from earlier import net  # lesson 02`")


def method(name="step", body="        x = 2 * x\n        return x\n", of="A"):
    return f"class {of}:\n    of = '{of}'\n\n    def {name}(self, x):\n{body}"


def test_a_method_of_two_lines_has_one_owner_too(tmp_path):
    files = {"lesson_01/model.py": method(), "lesson_02/model.py": method(of="B")}
    only(problems(tmp_path, files), "lesson_02/model.py:4: B.step equals lesson_01/model.py: A.step (3 lines): write "
         "`# Copied from lesson_01/model.py: A.step` above it, or inherit it")
    marked = method(of="B").replace("    def", "    # Copied from lesson_01/model.py: A.step\n    def")
    assert problems(tmp_path, {"lesson_02/model.py": marked}) == []
    write(tmp_path, {"lesson_01/model.py": method().replace("2", "3")})
    assert any("B.step differs from lesson_01/model.py: A.step" in line for line in check(tmp_path))
    only(problems(tmp_path, {"lesson_02/model.py": method(of="B", name="walk"), "lesson_01/model.py": method()}),
         "B.walk equals lesson_01/model.py: A.step (3 lines): call it step and write")


@pytest.mark.parametrize("name, lines, caught", [("step", 2, False), ("step", 3, True), ("forward", 3, True),
                                                 ("__init__", 3, True), ("_private", 3, True), ("forward", 2, False)])
def test_a_method_of_one_line_needs_no_owner(tmp_path, name, lines, caught):
    body = "        x = x + 1\n" * (lines - 2) + "        return x\n"
    files = {"lesson_01/model.py": method(name, body), "lesson_02/model.py": method(name, body, "B")}
    assert len(problems(tmp_path, files)) == caught


@pytest.mark.parametrize("first, second, message", [
    (function(8), "class B:\n" + function(8, indent="    "), "B.f equals lesson_01/model.py: f "),
    ("class A:\n    a = 1\n" + function(8, indent="    "), "class B:\n" + function(8, indent="    "), "B.f equals"),
    ("class A:\n" + function(8, indent="    "), "class A:\n" + function(8, indent="    "), "A equals"),
    (function(8), "# Adapted from lesson_01/model.py: h -- more\n" + function(8), "f equals lesson_01/model.py: f "),
])
def test_twins_among_methods_and_under_other_names_are_caught(tmp_path, first, second, message):
    files = {"lesson_01/model.py": first + "\n\ndef h(x):\n    return x\n", "lesson_02/model.py": second}
    only(problems(tmp_path, files), message)


def test_an_adaptation_that_equals_its_origin_is_reported_once(tmp_path):
    marker = "# Adapted from lesson_01/model.py: f -- more\n"
    files = {"lesson_01/model.py": function(8), "lesson_02/model.py": marker + function(8)}
    only(problems(tmp_path, files), "lesson_02/model.py:1: f equals")


def test_twins_in_scripts_and_sublessons_are_caught_and_in_one_lesson_are_not(tmp_path):
    files = {"lesson_01/train.py": function(8, "main"), "lesson_01/sample.py": function(8, "main")}
    assert problems(tmp_path, files) == []
    files["lesson_01/sublesson_a/train.py"] = function(8, "main")
    only(problems(tmp_path, files), "lesson_01/sublesson_a/train.py:1: main equals lesson_01/")


def test_what_an_adapted_class_keeps_needs_no_marker(tmp_path):
    first = "class A:\n    a = 1\n\n" + function(9, indent="    ")
    files = {"lesson_01/model.py": first,
             "lesson_02/model.py": "# Adapted from lesson_01/model.py: A -- a\n" + first.replace("a = 1", "a = 2"),
             "lesson_03/model.py": "# Adapted from lesson_02/model.py: A -- a\n" + first.replace("a = 1", "a = 3")}
    assert problems(tmp_path, files) == []


@pytest.mark.parametrize("marker, advice", [
    ("lesson_02/model.py: Block", "name its owner, lesson_01/model.py: Block"),
    ("lesson_02/model.py: Block.forward", "name its owner, lesson_01/model.py: Block.forward"),
    ("lesson_02/model.py: Wide.forward", "name its owner, lesson_01/model.py: Block.forward"),
    ("lesson_02/model.py: Wider.forward", "name its owner, lesson_01/model.py: Block.forward"),
    ("lesson_02/model.py: Net.step", "name its owner, lesson_01/model.py: Net.step"),
    ("lesson_02/model.py: Net.walk", "correct the marker of f"),
    ("lesson_02/model.py: Nets", "correct the marker of f"),
    ("lesson_02/train.py: Block", "correct the marker of f"), ("lesson_02/model.py: A.step", "correct the marker of f"),
])
def test_a_marker_that_names_a_taker_is_told_the_owner(tmp_path, marker, advice):
    classes = "Wide(Block)", "Wider(dict, Wide)", "Net(earlier.Net)", "A(B)", "B(A)"
    taker = "import earlier  # lesson 01: Net\nfrom earlier import Block  # lesson 01\n"
    taker += "".join(f"\n\nclass {name}:\n    number = {number}\n" for number, name in enumerate(classes))
    files = {"lesson_01/model.py": BLOCK + "\n\n" + method(of="Net"), "lesson_02/model.py": taker,
             "lesson_03/train.py": f"# Adapted from {marker} -- more\ndef f(x):\n    return x\n"}
    only(problems(tmp_path, files), f"lesson_03/train.py:1: there is no {marker}: {advice}")


# ------------------------------------------------------------------------------------------------ imports
@pytest.mark.parametrize("path, line, message", [
    ("lesson_01/model.py", "from utils import EMA; EMA", "imports utils: model.py may import"),
    ("lesson_01/model.py", "import torchvision; torchvision", "imports torchvision: model.py may import"),
    ("lesson_01/model.py", "from lesson_02.model import Block; Block", "imports lesson_02: model.py may import"),
    ("lesson_01/model.py", "def f():\n    import scipy.linalg", "imports scipy: model.py may import"),
    ("lesson_01/train.py", "from lesson_02.model import Block", "imports lesson_02: copy what you need"),
    ("lesson_01/sample.py", "import tools.lineage", "only tools and tests may"),
    ("lesson_01/reproduce.py", "from ..lesson_02 import model", "relative import"),
    ("lesson_01/extra.py", "import sys\nsys.path.insert(0, '..')", "touches sys.path"),
    ("lesson_01/sublesson_a/train.py", "from sys import path", "touches sys.path"),
    ("lesson_01/train.py", "from earlier import Block", "imports earlier: write `from model import ...`"),
    ("lesson_01/reproduce.py", "def f():\n    import earlier", "imports earlier: write `from model import ...`"),
    ("utils/run.py", "from earlier import Block", "a lesson's code"),
    ("utils/run.py", "import sys\nsys.path += ['..']", "touches sys.path"),
    ("utils/run.py", "import lesson_01.model", "a lesson's code"),
    ("utils/deep/run.py", "from model import DDPM", "a lesson's code"),
    ("utils/run.py", "from tools import lineage", "only tools and tests may"),
])
def test_forbidden_imports_are_caught(tmp_path, path, line, message):
    found = problems(tmp_path, {"lesson_01/model.py": "", path: line + "\n"})
    only(found, f"{path}:{line.count(chr(10)) + 1}: ", message)


@pytest.mark.parametrize("line, message", [
    ("import torchvision", "imports torchvision: earlier.py may import torch, einops, numpy, torchdiffeq and"),
    ("from utils import EMA", "imports utils: earlier.py may import"),
    ("from earlier import f", "imports earlier: earlier.py stands alone"),
    ("from lesson_01.model import f", "imports lesson_01: earlier.py may import"),
])
def test_earlier_py_imports_libraries_only(tmp_path, line, message):
    write(tmp_path, {"lesson_01/model.py": "", "lesson_02/earlier.py": f'"""Words."""\n{line}\n'})
    assert any(found.startswith(f"lesson_02/earlier.py:2: {message}") for found in check(tmp_path))


def test_allowed_imports_pass(tmp_path):
    files = {"lesson_01/model.py": "import math\nimport numpy as np\nimport torch.nn.functional as F\n"
                                   "from einops import rearrange\nfrom torch import nn\n"
                                   "from torchdiffeq import odeint\n\nmath, np, F, rearrange, nn, odeint\n",
             "lesson_01/train.py": "import sys\nimport matplotlib\nfrom model import net\nfrom utils import EMA\n",
             "utils/__init__.py": "import os.path\nfrom .run import Run\nfrom .model import x\n",
             "tools/a.py": "import utils\nfrom tools import b\nimport sys\nsys.path\n"}
    assert problems(tmp_path, files) == []


# ------------------------------------------------------------------------------------------------ README
def test_the_table_is_filled_and_a_stale_one_is_caught(tmp_path):
    new = 'def step(x):\n    """x_s | x_t, Eq. (12),\n    in one step.\n\n    More.\n    """\n    return x\n'
    wide = 'class Wide(Block):\n    """A wide block."""\n\n    wide = Other, limit\n'
    more = 'class More(earlier.More):\n    """More."""\n\n    more = 2\n'
    imports = ("import earlier  # lesson 01a: More\nfrom earlier import Block, Other  # lesson 01\n"
               "from earlier import limit  # lesson 01a\n")
    write(tmp_path, {"lesson_01/model.py": f"{BLOCK}\n\n{NET}\n\nclass Other:\n    pass\n",
                     "lesson_01/train.py": NET,
                     "lesson_01/sublesson_a/model.py": "class More:\n    more = 1\n\n\nlimit = 3\n",
                     "lesson_02/model.py": f"{imports}\n\n{ADAPTED}{WIDER}\n\n{new}\n\n{wide}\n\n{more}",
                     "lesson_02/train.py": f"# Copied from lesson_01/train.py: net\n{NET}",
                     "lesson_02/sublesson_b/model.py": "from earlier import Block  # lesson 01\nBlock()\n"},
          [*LESSONS, entry("02b", "02")])
    assert any(line.startswith("lesson_02/README.md:7: the table of what is new is stale") for line in check(tmp_path))
    sync(tmp_path)
    assert check(tmp_path) == []
    readme = (tmp_path / "lesson_02/README.md").read_text()
    assert readme == f"""# A lesson

## What is new since lesson 01

Text.

{lineage.START}
| | file | definition | |
|---|---|---|---|
| **new** | `model.py` | `step` | x_s \\| x_t, Eq. (12), in one step. |
| **new** | `model.py` | `Wide` | A wide block. Extends `Block` of [lesson_01](../lesson_01/model.py). |
| **new** | `model.py` | `More` | More. Extends `More` of [lesson_01/sublesson_a](../lesson_01/sublesson_a/model.py). |
| adapted | `model.py` | `net` | from [lesson_01](../lesson_01/model.py): one more input (Sec. 2) |
| taken | `model.py` | `Block`, `Other` | from [lesson_01](../lesson_01/model.py) |
| taken | `model.py` | `limit` | from [lesson_01/sublesson_a](../lesson_01/sublesson_a/model.py) |
| copied | `train.py` | `net` | from [lesson_01](../lesson_01/train.py) |
{lineage.END}

## After
"""
    (tmp_path / "lesson_02/README.md").write_text(readme.replace("one more", "two more"))
    only(check(tmp_path), "stale")
    assert "| taken | `model.py` | `Block` | from [lesson_01](../../lesson_01/model.py) |" in (
        tmp_path / "lesson_02/sublesson_b/README.md").read_text()


def test_a_lesson_with_a_parent_needs_the_section_and_a_root_lesson_does_not(tmp_path):
    write(tmp_path, {"lesson_01/model.py": NET, "lesson_01/README.md": "# One\n",
                     "lesson_02/model.py": WIDER, "lesson_02/README.md": "# Two\n"})
    only(check(tmp_path), "lesson_02/README.md:1: needs a section `## What is new since lesson 01`")
    (tmp_path / "lesson_02/README.md").write_text(f"## What is new since lesson 01a\n{lineage.START}\n{lineage.END}\n")
    only(check(tmp_path), "lesson_02/README.md:2:", "call it `## What is new since lesson 01`")


def test_a_lesson_whose_parent_is_planned_is_all_new(tmp_path):
    lessons = [entry("01", state="planned"), entry("02", "01")]
    assert problems(tmp_path, {"lesson_02/model.py": NET + "\n\n" + BLOCK}, lessons) == []
    readme = (tmp_path / "lesson_02/README.md").read_text()
    assert "Lesson 01 is not written yet" in readme
    assert "| **new** | `model.py` | `net` | A network. |" in readme and "`Block` | A block. |" in readme
    write(tmp_path, {}, [entry("01"), entry("02", "01")])
    only(check(tmp_path), "stale")


def test_an_unregistered_folder_is_caught(tmp_path):
    only(problems(tmp_path, {"lesson_09/model.py": NET}), "lesson_09 is not in the register")


# ------------------------------------------------------------------------------------------------ diff, tree
PAIR = {"lesson_01/model.py": f"LIMIT = 3\n\n\n{BLOCK}\n\n{NET}\n\ndef old(x):\n    return x * LIMIT\n",
        "lesson_01/train.py": BLOCK,
        "lesson_02/model.py": '"""Words."""\nfrom earlier import (\n    LIMIT,\n    Block,\n)  # lesson 01\n\n'
                              f"SIZE = (LIMIT,  # three\n\n        Block)\n\n\n{ADAPTED}{WIDER}\n\nclass New:\n"
                              '    """A class."""\n\n    # Copied from lesson_01/model.py: Block.forward\n'
                              "    @staticmethod\n    def forward(x):\n        # Eq. (1)\n        return x + 1\n\n"
                              "    # Adapted from lesson_01/model.py: net -- a method\n    def net(self, x, width=4):\n"
                              "        x = x * width  # wider\n        return -x\n",
        "lesson_02/train.py": f"{COPY}{BLOCK}\n\ndef main():\n    print(1)\n"}
DIFF = """lesson_02, Name02: what is new since lesson_01, Name01

lesson_02/model.py: 7 new lines of code
  = LIMIT, Block   from lesson_01
  + constants: 2 new lines of code
    + SIZE = (LIMIT,
    +         Block)
  ~ net: 2 new lines of code, from lesson_01/model.py: net: one more input (Sec. 2)
    - def net(x, width=4):
    -     x = x * width
    + def net(x, y, width=4):
    +     x = x * width + y
          return x
  + New: 3 new lines of code
    + class New:
    +     = forward   as in lesson_01/model.py: Block.forward
    +     def net(self, x, width=4):
    +         x = x * width
    +         return -x
  - old   left out

lesson_02/train.py: 2 new lines of code
  = Block   as in lesson_01/train.py
  + main: 2 new lines of code
    + def main():
    +     print(1)
"""


@pytest.mark.parametrize("name", ["02", "2", "lesson_02", "lesson_02/", "./lesson_02"])
def test_diff_of_a_small_pair(tmp_path, capsys, name):
    write(tmp_path, PAIR)
    assert main(["diff", name], tmp_path) == 0
    assert capsys.readouterr().out == DIFF


def test_diff_is_coloured_on_a_terminal_only(tmp_path, capsys, monkeypatch):
    write(tmp_path, PAIR)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    main(["diff", "02"], tmp_path)
    out = capsys.readouterr().out
    assert "\033[31m    -     x = x * width\033[0m\n" in out and "\033[32m    +     x = x * width + y\033[0m\n" in out


def test_diff_names_the_function_around_a_hunk(tmp_path, capsys):
    long = "class A:\n" + function(12, "f", "    ") + "\n" + function(12, "g", "    ")
    write(tmp_path, {"lesson_01/model.py": long, "lesson_02/model.py":
                     "# Adapted from lesson_01/model.py: A -- more\n" + long.replace("x + 9", "x + 99")})
    main(["diff", "02"], tmp_path)
    out = capsys.readouterr().out
    assert "    ... def f(x):" in out and "    ... def g(x):" in out and "@@" not in out
    assert out.count("\n    +") == 2


@pytest.mark.parametrize("name", ["01a", "1a", "lesson_01a", "lesson_01/sublesson_a"])
def test_diff_accepts_every_name_of_a_sublesson(tmp_path, capsys, name):
    write(tmp_path, {"lesson_01/model.py": NET, "lesson_01/sublesson_a/model.py": NET})
    assert main(["diff", name], tmp_path) == 0
    assert "  = net   as in lesson_01/model.py" in capsys.readouterr().out


def test_diff_follows_what_comes_through_earlier_and_names_what_is_left_out(tmp_path, capsys):
    far = "def far(x):\n    return net(x)\n\n\ndef gone(x):\n    return -x\n"
    write(tmp_path, {"lesson_01/model.py": f"{NET}\n\n{far}",
                     "lesson_02/model.py": "from earlier import far, gone  # lesson 01\nfar, gone\n",
                     "lesson_03/model.py": "from earlier import far  # lesson 01\n\nNEAR = far\n"})
    sync(tmp_path)
    main(["diff", "02"], tmp_path)
    assert "left out" not in capsys.readouterr().out                    # net: far needs it
    main(["diff", "03"], tmp_path)
    assert capsys.readouterr().out.endswith("  = far   from lesson_01\n  + constants: 1 new line of code\n"
                                            "    + NEAR = far\n  - gone   left out\n")


# ------------------------------------------------------------------------------------------------ sizes
@pytest.mark.parametrize("text, count", [
    ("", 0), ('"""Words."""\n\n# a comment\nimport math\nfrom torch import (\n    nn,\n)\n', 0),
    ("from earlier import net  # lesson 01\nimport earlier  # lesson 01: Block\n", 0),
    (function(6), 6), ("A = 1\n\nB = (2,  # two\n     # and\n\n     3)\n", 3), ("A = \"\"\"a\n\nb\"\"\"\n", 2),
    ("@property\n\ndef f(x):\n    'Words.'\n    return x\n", 3),
    ("class Wide(Block):\n" + function(6, indent="    "), 7),
    (ADAPTED + NET, 0), (ADAPTED + WIDER, 2), (ADAPTED + NET.replace("    return x", "    x = -x\n    return x"), 1),
    ("# Copied from lesson_01/model.py: gone\n" + NET, 0),
    (ADAPTED + "\n# apart\n" + WIDER, 3), (ADAPTED.replace("net", "no") + WIDER, 3),
    ("class A:\n    # Copied from lesson_01/model.py: Block.forward\n    @staticmethod\n    def forward(x):\n"
     "        return x + 1\n", 1),
    ("# Adapted from lesson_01/model.py: Block -- less\nclass Less:\n    def __init__(self, width=8):\n"
     "        self.width = width\n\n    # Adapted from lesson_01/model.py: net -- a method\n    def net(x, width=4):\n"
     "        return x\n", 1),
])
def test_new_lines_of_code_are_counted(tmp_path, text, count):
    write(tmp_path, {"lesson_01/model.py": f"{BLOCK}\n\n{NET}", "lesson_02/model.py": text})
    house = lineage.load(tmp_path)
    assert lineage.new_lines(house, "lesson_02") == count
    assert lineage.sizes(house, "lesson_02") == (text.count("\n"), count)


def test_diff_without_the_parent_says_so(tmp_path, capsys):
    write(tmp_path, {"lesson_01/model.py": NET, "lesson_03/model.py": NET})
    main(["diff", "03"], tmp_path)
    assert capsys.readouterr().out.splitlines()[:2] == [
        "lesson_03, Name03: what is new since lesson_02, Name02",
        "Its parent, lesson 02, is not written yet: compared with an empty file."]
    main(["diff", "01"], tmp_path)
    assert capsys.readouterr().out.splitlines()[:6] == [
        "lesson_01, Name01", "It has no parent: compared with an empty file.", "",
        "lesson_01/model.py: 3 new lines of code", "  + net: 3 new lines of code", "    + def net(x, width=4):"]


def test_diff_counts_a_renamed_adaptation_as_kept(tmp_path, capsys):
    write(tmp_path, {"lesson_01/model.py": NET, "lesson_02/model.py": ADAPTED + WIDER.replace("net", "wide")})
    main(["diff", "02"], tmp_path)
    assert "left out" not in capsys.readouterr().out


def test_tree(tmp_path, capsys):
    write(tmp_path, {})
    assert main(["tree"], tmp_path) == 0
    assert capsys.readouterr().out == """01 Name01, 2020-06  [ready]
├─ 02 Name02, 2020-06  [ready]
│  └─ 03 Name03, 2020-06  [ready]  (also from 01)
└─ 01a Name01a, 2020-06
"""


def test_mermaid(tmp_path, capsys):
    graph = mermaid([*LESSONS[:3], {**LESSONS[3], "name": 'A "b" of Interpolation 3'}, entry("04", "77")],
                    "https://example.org/tree/main/")
    assert graph.splitlines()[1:] == [
        "graph TD", '  L01["01<br>Name01"]', '  L02["02<br>Name02"]', '  L03["03<br>Name03"]',
        '  L01a["01a<br>A #quot;b#quot; of<br>Interpolation<br>3"]', '  L04["04<br>Name04"]',
        "  L01 --> L02", "  L02 --> L03", "  L01 -.-> L03", "  L01 --> L01a",
        '  click L01 "https://example.org/tree/main/lesson_01"', '  click L02 "https://example.org/tree/main/lesson_02"',
        '  click L03 "https://example.org/tree/main/lesson_03"', '  click L04 "https://example.org/tree/main/lesson_04"',
        "  classDef ready fill:#cdeac0,stroke:#2f6b2f,color:#102a10", "  class L01,L02,L03,L04 ready"]
    write(tmp_path, {})
    main(["tree", "--mermaid"], tmp_path)
    assert capsys.readouterr().out == mermaid(LESSONS) + "\n"
    assert "class" not in mermaid([entry("01", state="planned")])


# ------------------------------------------------------------------------------------------------ command line
@pytest.mark.parametrize("argv", [[], ["nothing"], ["diff"], ["diff", "77"], ["diff", "02"], ["diff", "x"],
                                  ["check", "x"], ["sync", "--accept", "lesson_01/model.py:net"]])
def test_bad_usage_is_one_line_and_exit_code_2(tmp_path, capsys, argv):
    write(tmp_path, {"lesson_01/model.py": NET})
    assert main(argv, tmp_path) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("register", [None, "lessons: [\n", "- number: 1\n", "repository: a/b\n"])
def test_a_missing_or_broken_register_is_one_line(tmp_path, capsys, register):
    if register:
        (tmp_path / "lessons.yaml").write_text(register)
    assert main(["tree"], tmp_path) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_check_fails_with_exit_code_1(tmp_path, capsys):
    write(tmp_path, {"lesson_01/model.py": "import utils\n"})
    assert main(["check"], tmp_path) == 1
    assert capsys.readouterr().out.startswith("lesson_01/model.py:1: imports utils")


def test_this_repository_is_in_order():
    assert check(ROOT) == []


def test_the_command_runs():
    done = subprocess.run([sys.executable, "-m", "tools.lineage", "tree"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "05 DDPM" in done.stdout
