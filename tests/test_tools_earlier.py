"""earlier.py, written by tools/lineage.py with tools/earlier.py: on made-up lessons, whose files are really run."""

import subprocess
import sys

import pytest
from test_tools_lineage import LESSONS, entry, only, problems, write

from tools.lineage import check, main, sync

ONE, TWO, THREE, FOUR = (f"lesson_0{number}/model.py" for number in range(1, 5))
SIX = [*LESSONS[:3], entry("04", "03"), entry("05", "04")]

BASE = '''"""The first lesson."""

import math
import statistics as stats
from collections import (
    OrderedDict,
    defaultdict,
)
from pathlib import Path

# The largest size.
# Eq. (1)
LIMIT = 3  # of all
WIDE = (LIMIT,
        2 * LIMIT)
UNUSED = stats, OrderedDict, Path


# ------------------------------------------------------------ helpers
def helper(x):
    """Helps."""
    # Eq. (3)
    return min(x, LIMIT)


def plain():
    return 7


# Sec. 2
@staticmethod
def step(x, top=WIDE[1]):
    """One step, Eq. (2)."""
    size = math.sqrt(helper(x))                 # a comment

    return size + top


class Net(dict):
    """A network."""

    def size(self):
        """Its size."""
        return "base"

    def twice(self):
        return 2 * self.size()


Tree = defaultdict
'''
TAKES = "from earlier import Net, step  # lesson 01\n\nprint(Net().size(), step(9))\n"
WRITTEN = '''"""What lesson 02 takes from earlier lessons, word for word.

Written by `python -m tools.lineage sync` from the import lines of model.py. Do not edit it: change a definition
where it stands, in the file named above it, and run the command again.
"""

import math


# lesson_01/model.py
# The largest size.
# Eq. (1)
LIMIT = 3  # of all
WIDE = (LIMIT,
        2 * LIMIT)


# lesson_01/model.py
def helper(x):
    """Helps."""
    # Eq. (3)
    return min(x, LIMIT)


# lesson_01/model.py
# Sec. 2
@staticmethod
def step(x, top=WIDE[1]):
    """One step, Eq. (2)."""
    size = math.sqrt(helper(x))                 # a comment

    return size + top


# lesson_01/model.py
class Net(dict):
    """A network."""

    def size(self):
        """Its size."""
        return "base"

    def twice(self):
        return 2 * self.size()
'''
SUB = '''"""A later lesson."""

import earlier  # lesson 01: Net


class Net(earlier.Net):
    """A larger network."""

    def size(self):
        return f"sub of {super().size()}"
'''


def execute(root, folder):
    """What model.py of a lesson prints when it runs."""
    done = subprocess.run([sys.executable, "-B", "model.py"], cwd=root / folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


def text(root, folder, name="earlier.py"):
    return (root / folder / name).read_text()


# ------------------------------------------------------------------------------------------------ what is written
def test_earlier_py_holds_what_is_taken_and_all_that_it_needs_word_for_word(tmp_path):
    assert problems(tmp_path, {ONE: BASE, TWO: TAKES}) == []
    assert text(tmp_path, "lesson_02") == WRITTEN
    assert execute(tmp_path, "lesson_02") == ["base 7.732050807568877"]
    assert not (tmp_path / "lesson_01/earlier.py").exists()
    assert sync(tmp_path) == []


def test_a_constant_can_be_taken_and_a_lesson_can_be_left_alone(tmp_path):
    files = {ONE: BASE, TWO: "from earlier import WIDE, Tree  # lesson 01\nWIDE, Tree\n",
             THREE: "from earlier import plain  # lesson 01\nplain()\n"}
    write(tmp_path, files)
    done = sync(tmp_path, only=["lesson_02"])
    assert done == ["lesson_02/earlier.py: written", "lesson_02/README.md: table of what is new filled"]
    assert not (tmp_path / "lesson_03/earlier.py").exists()
    assert "LIMIT = 3" in text(tmp_path, "lesson_02") and "UNUSED" not in text(tmp_path, "lesson_02")
    assert text(tmp_path, "lesson_02").endswith("        2 * LIMIT)\n\nTree = defaultdict\n")
    assert "from collections import defaultdict\n" in text(tmp_path, "lesson_02")
    assert check(tmp_path, only=["lesson_02"]) == []
    assert any("there is no earlier.py beside it" in line for line in check(tmp_path, only=["lesson_03"]))


def test_what_is_needed_is_followed_through_the_origins_own_imports(tmp_path):
    middle = ("import re\nfrom earlier import helper  # lesson 01\n\n\n"
              "def middle(x):\n    return re.escape(str(helper(x)))\n")
    files = {ONE: BASE, TWO: middle,
             THREE: "from earlier import middle  # lesson 02\nprint(middle(8))\n"}
    assert problems(tmp_path, files) == []
    written = text(tmp_path, "lesson_03")
    assert written.index("LIMIT = 3") < written.index("def helper") < written.index("# lesson_02/model.py\ndef middle")
    assert "import re\n\n\n" in written and "math" not in written
    assert execute(tmp_path, "lesson_03") == ["3"]
    write(tmp_path, {ONE: BASE.replace("LIMIT = 3", "LIMIT = 4")})
    assert [line.partition(": ")[0] for line in check(tmp_path)] == [
        "lesson_02/earlier.py:11", "lesson_03/earlier.py:13"]
    sync(tmp_path)
    assert execute(tmp_path, "lesson_03") == ["4"]


def test_local_names_and_attributes_draw_nothing_in(tmp_path):
    base = ("x = 1\ny = 2\nz = 3\nw = 4\nv = 5\nimport math as u\n\n\n"
            "def f(x, *, u=0):\n    y = x.z\n    w = [v for v in y]\n    return {'z': w}, lambda z: z, u\n")
    write(tmp_path, {ONE: base, TWO: "from earlier import f  # lesson 01\nf\n"})
    sync(tmp_path)
    written = text(tmp_path, "lesson_02")
    assert written.split('"""\n')[-1] == "\n\n# lesson_01/model.py\n" + base[base.index("def f"):]


@pytest.mark.parametrize("use", ["def f(a: K): pass", "def f() -> K: pass", "@K\ndef f(): pass", "def f(a=K): pass",
                                 "def f():\n    return [K for _ in ()]", "class f(K): pass", "class f:\n    k = K",
                                 "class f:\n    def g(self):\n        return lambda: K", "f = K", "f: int = K + 1",
                                 "f = 1\nf += K", "for f in K: pass", "def f():\n    global K\n    K = K"])
def test_every_kind_of_use_is_followed(tmp_path, use):
    write(tmp_path, {ONE: f"K = object\n\n\n{use}\n",
                     TWO: "from earlier import f  # lesson 01\nf\n"})
    sync(tmp_path)
    assert "\nK = object\n" in text(tmp_path, "lesson_02")


def test_both_statements_that_make_a_constant_are_taken(tmp_path):
    base = "A, (B, *C) = 1, (2, 3)\n\nif B:\n    D = B\nelse:\n    D = 0\nD += A\n"
    files = {ONE: base, TWO: "from earlier import C, D  # lesson 01\nprint(C, D)\n"}
    assert problems(tmp_path, files) == []
    assert text(tmp_path, "lesson_02").endswith("# lesson_01/model.py\n" + base)
    assert execute(tmp_path, "lesson_02") == ["[3] 3"]


def test_constants_of_two_lessons_stand_under_their_own_lines(tmp_path):
    own = "from earlier import A, C  # lesson 01\nfrom earlier import D  # lesson 02\nA, C, D\n"
    assert problems(tmp_path, {ONE: "A = 1\nB = 2\nC = 3\n", TWO: "D = 4\n", "lesson_03/model.py": own}) == []
    assert text(tmp_path, "lesson_03").endswith(
        "# lesson_01/model.py\nA = 1\n\nC = 3\n\n\n# lesson_02/model.py\nD = 4\n")


def test_a_name_inside_an_expression_is_no_constant(tmp_path):
    base = "A = [q for q in (1, 2)], {r: 1 for r in ()}, {s for s in ()}, (t for t in ()), lambda u: (v := u)\n"
    files = {ONE: base, TWO: "from earlier import A  # lesson 01\nprint(A[0])\n"}
    assert problems(tmp_path, files) == []
    for name in "qrstuv":
        write(tmp_path, {TWO: f"from earlier import {name}  # lesson 01\n{name}\n"})
        assert any("but lesson_01/model.py does not define it" in line for line in check(tmp_path))


def test_the_older_lesson_comes_first_whatever_the_numbers_say(tmp_path):
    lessons = [entry("01", "03"), entry("02", "01"), entry("03")]
    files = {THREE: BASE, ONE: "from earlier import Net  # lesson 03\n\n\nclass One(Net):\n    one = 1\n",
             TWO: "from earlier import One  # lesson 01\nfrom earlier import plain  # lesson 03\n\n"
                  "print(One.one, plain())\n"}
    assert problems(tmp_path, files, lessons) == []
    heads = [line for line in text(tmp_path, "lesson_02").splitlines() if line.startswith("# lesson")]
    assert heads == ["# lesson_03/model.py"] * 2 + ["# lesson_01/model.py"]
    assert execute(tmp_path, "lesson_02") == ["1 7"]
    write(tmp_path, {ONE: "class One:\n    one = 1\n"}, lessons)                        # needs nothing of lesson 03
    sync(tmp_path)
    heads = [line for line in text(tmp_path, "lesson_02").splitlines() if line.startswith("# lesson")]
    assert heads == ["# lesson_03/model.py", "# lesson_01/model.py"]


def test_a_lesson_comes_after_those_it_takes_from_even_against_the_register(tmp_path):
    files = {ONE: "from earlier import Far  # lesson 02\n\n\nclass Near(Far):\n    near = 1\n",
             TWO: "class Far:\n    far = 2\n",
             THREE: "from earlier import Near  # lesson 01\nprint(Near.far)\n"}
    assert problems(tmp_path, files) == []
    assert execute(tmp_path, "lesson_03") == ["2"]
    files[TWO] += "\n\nfrom earlier import Near  # lesson 01\nNear\n"
    assert any("lesson_01 and lesson_02 take from each other" in line for line in problems(tmp_path, files))


def test_imports_stand_in_the_order_of_ruff(tmp_path):
    imports = ("import os.path\nimport torch\nimport numpy as np\nimport torch.nn.functional as F\n"
               "from torch import nn, Tensor\nfrom einops import rearrange\n"
               "import math\nfrom torch import optim as o\nfrom collections import abc\n"
               "from torch.nn import Module, functional, SiLU, Conv2d, GELU\nimport torchdiffeq\n")
    names = ["os", "torch", "np", "F", "nn", "Tensor", "rearrange", "math", "o", "abc", "Module", "functional", "SiLU",
             "Conv2d", "GELU", "torchdiffeq"]
    long = [f"a_rather_long_name_{i}" for i in range(6)]
    uses = "".join(f"    {name}\n" for name in names + long)
    base = f"{imports}from numpy import {', '.join(long)}\n\n\ndef f():\n{uses}"
    write(tmp_path, {ONE: base, TWO: "from earlier import f  # lesson 01\nf\n"})
    sync(tmp_path)
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--isolated", "--select", "E,F,I", "--line-length",
                           "120", str(tmp_path / "lesson_02/earlier.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert text(tmp_path, "lesson_02").split('"""')[2].split("\n\n\n")[0].strip() == """import math
import os.path
from collections import abc

import numpy as np
import torch
import torch.nn.functional as F
import torchdiffeq
from einops import rearrange
from numpy import (
    a_rather_long_name_0,
    a_rather_long_name_1,
    a_rather_long_name_2,
    a_rather_long_name_3,
    a_rather_long_name_4,
    a_rather_long_name_5,
)
from torch import Tensor, nn
from torch import optim as o
from torch.nn import GELU, Conv2d, Module, SiLU, functional"""


# ------------------------------------------------------------------------------------------------ subclasses
def test_a_subclass_of_the_same_name_runs_here_and_in_a_third_lesson(tmp_path):
    files = {ONE: BASE, TWO: SUB + "\n\nprint(Net().twice())\n",
             THREE: "from earlier import Net  # lesson 02\n\nprint(Net().twice(), len(Net.__mro__))\n"}
    assert problems(tmp_path, files) == []
    assert text(tmp_path, "lesson_02").endswith(WRITTEN[WRITTEN.index("class Net"):])
    assert "earlier = " not in text(tmp_path, "lesson_02")
    written = text(tmp_path, "lesson_03")
    assert written.index("import sys\n") < written.index("\nearlier = sys.modules[__name__]")
    first, second = "class Net(dict)", "# lesson_02/model.py\nclass Net(earlier.Net)"
    assert written.index("\nearlier =") < written.index(first) < written.index(second)
    assert execute(tmp_path, "lesson_02") == ["sub of basesub of base"]
    assert execute(tmp_path, "lesson_03") == ["sub of basesub of base 4"]


def test_subclasses_of_subclasses_run(tmp_path):
    third = SUB.replace("lesson 01: Net", "lesson 02: Net").replace("larger", "huge").replace("sub of", "third of")
    files = {ONE: BASE, TWO: SUB, THREE: third,
             FOUR: "from earlier import Net  # lesson 03\n\nprint(Net().size())\n"}
    assert problems(tmp_path, files, SIX) == []
    assert execute(tmp_path, "lesson_04") == ["third of sub of base"]


def test_several_bases_are_named_in_one_line(tmp_path):
    base = "class A:\n    a = 1\n\n\nclass B:\n    b = 2\n"
    own = ("import earlier  # lesson 01: A, B; lesson 02: Net\n\n\nclass A(earlier.A):\n    c = 3\n\n\n"
           "class B(earlier.B, A):\n    d = 4\n\n\n"
           "class Net(earlier.Net):\n    e = 5\n\n\n"
           "print(B.b, B.c, Net().size())\n")
    net = "class Net:\n    def size(self):\n        return 9\n"
    files = {ONE: base, TWO: net, THREE: own}
    assert problems(tmp_path, files) == []
    assert execute(tmp_path, "lesson_03") == ["2 3 9"]


def test_two_subclasses_of_one_class_with_equal_code_have_different_bases(tmp_path):
    other = SUB.replace("lesson 01: Net", "lesson 02: Net")
    write(tmp_path, {ONE: BASE, TWO: SUB, THREE: other})
    sync(tmp_path)
    assert not any("Net equals" in line for line in check(tmp_path))
    write(tmp_path, {THREE: SUB})
    sync(tmp_path)
    only([line for line in check(tmp_path) if "Net equals" in line],
         "lesson_03/model.py:6: Net equals lesson_02/model.py: Net",
         "take it, `from earlier import Net  # lesson 02`")


# ------------------------------------------------------------------------------------------------ the file itself
@pytest.mark.parametrize("old, new", [("# Eq. (3)", "# Eq. (4)"), ("Helps.", "Helps more."),
                                      ("return min", "return max"), ("import math\n", "import math\nimport cmath\n"),
                                      ("size + top", "size  + top"),
                                      ("# of all", "#of all"),
                                      ("word for word", "nearly")])
def test_an_edited_earlier_py_is_caught_and_written_anew(tmp_path, old, new):
    problems(tmp_path, {ONE: BASE, TWO: TAKES})
    line = WRITTEN[:WRITTEN.index(old)].count("\n") + 1 + (old == "import math\n")
    (tmp_path / "lesson_02/earlier.py").write_text(WRITTEN.replace(old, new))
    only(check(tmp_path), f"lesson_02/earlier.py:{line}: differs from what model.py takes: do not edit it, run `python")
    assert main(["sync", "02"], tmp_path) == 0 and text(tmp_path, "lesson_02") == WRITTEN


@pytest.mark.parametrize("old, new, stale", [
    ("# Eq. (3)", "# Eq. (4)", True), ("A network.", "Words.", True), ("# of all", "# of it all", True),
    ("return min(x", "return max(x", True), ("UNUSED = stats", "UNUSED = 6, stats", False),
    ("return 7", "return 8", False),
    ("-------- helpers", "-------- others", False), ("first lesson", "second lesson", False),
    ("import math\n", "import cmath as math\n", True), ("import statistics", "import string", False)])
def test_a_changed_origin_is_caught_where_it_was_taken(tmp_path, old, new, stale):
    problems(tmp_path, {ONE: BASE, TWO: TAKES})
    assert BASE.count(old) == 1
    write(tmp_path, {ONE: BASE.replace(old, new)})
    found = [line for line in check(tmp_path) if "earlier.py" in line]
    assert len(found) == stale
    sync(tmp_path)
    assert check(tmp_path, only=["lesson_02"]) == []
    assert (text(tmp_path, "lesson_02") != WRITTEN) == stale


def test_a_missing_and_a_stale_earlier_py_are_caught(tmp_path):
    problems(tmp_path, {ONE: BASE, TWO: TAKES})
    (tmp_path / "lesson_02/earlier.py").unlink()
    only(check(tmp_path), "lesson_02/model.py:1: there is no earlier.py beside it: run `python -m tools.lineage sync`")
    sync(tmp_path)
    write(tmp_path, {TWO: "x = 1\n"})
    assert any(line.startswith("lesson_02/earlier.py:1: model.py takes nothing from") for line in check(tmp_path))
    assert "lesson_02/earlier.py: removed" in sync(tmp_path)
    assert check(tmp_path) == [] and not (tmp_path / "lesson_02/earlier.py").exists()


def test_sync_leaves_earlier_py_alone_while_an_import_line_is_wrong(tmp_path):
    problems(tmp_path, {ONE: BASE, TWO: TAKES})
    for wrong in (TAKES.replace("step", "stop"), TAKES.replace("  # lesson 01", "")):
        write(tmp_path, {TWO: wrong})
        sync(tmp_path)
        assert text(tmp_path, "lesson_02") == WRITTEN
        assert any(line.startswith("lesson_02/model.py:1: ") for line in check(tmp_path))


# ------------------------------------------------------------------------------------------------ import lines
@pytest.mark.parametrize("line", [
    "from earlier import Net, step  # lesson 01", "from earlier import (Net,\n    step)  # lesson 01",
    "from earlier import (  # lesson 01\n    Net,\n    step,\n)", "from earlier import Net, step        # lesson 01",
    "from earlier import Net, step  # lesson 01  # noqa: F401"])
def test_the_comment_stands_in_the_first_or_last_row(tmp_path, line):
    assert problems(tmp_path, {ONE: BASE, TWO: f"{line}\nNet, step\n"}) == []
    assert text(tmp_path, "lesson_02") == WRITTEN


@pytest.mark.parametrize("line, message", [
    ("from earlier import Net", "the import from earlier does not name its origin: write `from earlier import X, Y  #"),
    ("from earlier import Net  # lesson 1", "does not name its origin"),
    ("from earlier import Net  # lesson 01: Net", "does not name its origin"),
    ("from earlier import Net  # from lesson 01", "does not name its origin"),
    ("from earlier import (  # lesson 01\n    Net,\n)  # lesson 02", "does not name its origin"),
    ("from earlier import Net as Big  # lesson 01\nBig", "under another name"),
    ("from earlier import *  # lesson 01", "imports from earlier as *"),
    ("from earlier import Net  # lesson 01\nfrom earlier import step  # lesson 01\nstep",
     "a second line for lesson 01: one line an origin"),
    ("from earlier import Net  # lesson 01\nfrom earlier import Net  # lesson 03", "imports Net from earlier twice"),
    ("from earlier import Net  # lesson 77", "takes Net from lesson 77, which is not in lessons.yaml"),
    ("from earlier import Net  # lesson 01a", "takes Net from lesson 01a, which is not written yet"),
    ("from earlier import Net  # lesson 02", "takes Net from lesson 02, which is this lesson"),
    ("from earlier import Nets, Net  # lesson 01\nNets",
     "takes Nets from lesson 01, but lesson_01/model.py does not define it"),
    ("from earlier import math, Net  # lesson 01\nmath",
     "takes math from lesson 01, but lesson_01/model.py does not define it"),
    ("from earlier import Net  # lesson 03", "takes Net from lesson 03, which took it from lesson 01: name that one"),
    ("from earlier import Net, plain  # lesson 01", "takes plain, which neither model.py nor a script uses: drop it"),
    ("from earlier import Net  # lesson 01\nNet = 3", "imports Net from earlier and gives that name to something"),
    ("from earlier import Net  # lesson 01\nimport json as Net", "gives that name to something else too"),
    ("import json\nfrom earlier import Net  # lesson 01", "imports json and does not use it: drop it"),
    ("def f():\n    from earlier import Net  # lesson 01", "imports earlier inside a block: write it at the top"),
    ("def f():\n    import earlier  # lesson 01: Net", "imports earlier inside a block: write it at the top"),
    ("import earlier\nclass Net(earlier.Net): pass", "does not say whose classes it builds on: write `import"),
    ("import earlier  # lesson 01\nclass Net(earlier.Net): pass", "does not say whose classes it builds on"),
    ("import earlier as e  # lesson 01: Net\nclass Net(e.Net): pass", "does not say whose classes it builds on"),
    ("import json, earlier  # lesson 01: Net\nclass Net(earlier.Net): json", "does not say whose classes it builds on"),
    ("import earlier  # lesson 01: Net, Net\nclass Net(earlier.Net): pass", "names Net twice"),
    ("import earlier  # lesson 01: Net", "names Net, but there is no `class Net(earlier.Net)`: drop it"),
    ("import earlier  # lesson 01: Net\nclass Big(earlier.Net): pass", "has a name of its own: import Net from"),
    ("import earlier  # lesson 01: Net\nclass Net(earlier.Net): pass\n\nclass Tree(earlier.Tree): pass",
     "earlier.Tree has no origin: write `import earlier  # lesson 05: Tree`"),
    ("import earlier  # lesson 01: Net\nclass Net(earlier.Net):\n    def f(self):\n        return earlier.Net.f(self)",
     "uses `earlier` other than as the base in `class X(earlier.X)`: write `super()`"),
    ("import earlier  # lesson 01: Net\nclass Net(earlier.Net): pass\n\nx = earlier.plain()", "uses `earlier` other"),
    ("import earlier  # lesson 01: Net\nclass Net(earlier.Net, metaclass=earlier.Tree): pass",
     "uses `earlier` other"),
])
def test_a_wrong_import_line_is_caught(tmp_path, line, message):
    own = "from earlier import Net  # lesson 01\nNet\n"
    use = "\nNet\n" if "from earlier" in line and "inside" not in message else "\n"
    found = problems(tmp_path, {ONE: BASE, THREE: own, TWO: line + use})
    assert [line for line in found if line.startswith("lesson_02/model.py:") and message in line], found
    assert not any(line.startswith(("lesson_01", "lesson_03")) for line in found)


def test_a_name_that_only_a_script_imports_from_model_is_used(tmp_path):
    files = {ONE: BASE, TWO: "from earlier import Net, plain  # lesson 01\n"}
    for script in ("from model import Net, plain\n", "from model import Net\nimport model\n\nmodel.plain()\n"):
        assert problems(tmp_path, files | {"lesson_02/train.py": script}) == []
    only(problems(tmp_path, files | {"lesson_02/train.py": "from model import Net\n\nplain = 3\n"}),
         "lesson_02/model.py:1: takes plain, which neither model.py nor a script uses: drop it")


def test_a_wrong_line_of_an_origin_is_told_to_those_who_need_it(tmp_path):
    files = {ONE: BASE, TWO: "from earlier import stop  # lesson 01\n\n\ndef f():\n    stop()\n",
             THREE: "from earlier import f  # lesson 02\nf\n"}
    found = problems(tmp_path, files)
    assert "lesson_02/model.py:1: takes stop from lesson 01, but lesson_01/model.py does not define it" in found
    assert any(line.startswith("lesson_03/model.py:1: lesson_02/model.py takes stop from lesson 01,") for line in found)


def test_a_copy_is_not_an_owner(tmp_path):
    files = {ONE: BASE, TWO: "# Copied from lesson_01/model.py: plain\ndef plain():\n    return 7\n",
             THREE: "from earlier import plain  # lesson 02\nplain()\n"}
    assert problems(tmp_path, files) == [
        "lesson_02/model.py:1: plain is a copy: import it, `from earlier import plain  # lesson 01`",
        "lesson_03/model.py:1: takes plain from lesson 02, where it is a copy: name its first owner, lesson 01"]


# ------------------------------------------------------------------------------------------------ one name, one meaning
def uses(name, number, *more):
    """A model.py whose function `name` calls `part`, which it takes from that lesson or defines."""
    line = f"from earlier import part  # lesson {number}\n\n\n" if number else ""
    return line + "".join(more) + f"def {name}():\n    return part(), '{name}'\n"


def test_two_meanings_of_one_name_are_caught(tmp_path):
    part = "def part():\n    return {}\n\n\n"
    files = {ONE: uses("one", "", part.format(1)), TWO: uses("two", "", part.format(2)),
             THREE: "from earlier import one  # lesson 01\nfrom earlier import two  # lesson 02\none, two\n"}
    found = problems(tmp_path, files)
    message = "needs part of lesson_01 and part of lesson_02: two meanings of one name, so rename one"
    assert f"lesson_03/model.py:2: {message}" in found
    write(tmp_path, {TWO: uses("two", "01")})
    sync(tmp_path)
    assert check(tmp_path) == []


def test_two_classes_of_one_name_are_told_of_the_subclass(tmp_path):
    files = {ONE: "class A:\n    a = 1\n", TWO: "class A:\n    a = 2\n\n\nclass B(A):\n    b = 1\n",
             THREE: "from earlier import A  # lesson 01\nfrom earlier import B  # lesson 02\nA, B\n"}
    assert any("or write `class A(earlier.A)`" in line for line in problems(tmp_path, files))


def test_a_name_that_a_later_subclass_would_change_is_caught(tmp_path):
    """earlier.py of lesson 03 would hold Net twice; whoever means the first would get the second."""
    build = BASE + "\n\ndef build():\n    return Net()\n"
    files = {ONE: build, TWO: SUB,
             THREE: "from earlier import build  # lesson 01\nfrom earlier import Net  # lesson 02\nbuild, Net\n"}
    wrong = " means Net of lesson_01, but in earlier.py it would find Net of lesson_02"
    only(problems(tmp_path, files), f"lesson_03/model.py:1: lesson_01's build{wrong}")
    thing = "\n\nclass Thing(Net):\n    thing = 1\n"
    write(tmp_path, {TWO: SUB + thing,
                     THREE: "from earlier import Net  # lesson 01\nfrom earlier import Thing  # lesson 02\n\n"
                            "Net, Thing\n"})
    sync(tmp_path)
    only(check(tmp_path), f"lesson_03/model.py:1: model.py{wrong}")
    write(tmp_path, {THREE: "import earlier  # lesson 01: Net\nfrom earlier import Thing  # lesson 02\n\n\n"
                                           "class Net(earlier.Net):\n    thing = Thing\n"})
    sync(tmp_path)
    only(check(tmp_path), f"lesson_03/model.py:1: model.py{wrong}")


def test_two_subclasses_beside_each_other_are_caught(tmp_path):
    other = SUB.replace("larger", "other").replace("sub of", "other of")
    things = [f"\n\nclass {name}(Net):\n    thing = '{name}'\n" for name in ("Thing", "Other")]
    files = {ONE: BASE, TWO: SUB + things[0], THREE: other + things[1],
             FOUR: "from earlier import Thing  # lesson 02\nfrom earlier import Other  # lesson 03\nThing, Other\n"}
    found = problems(tmp_path, files, SIX)
    assert any("needs Net of lesson_02 and Net of lesson_03: two meanings" in line for line in found)
    files[THREE] = other.replace("lesson 01: Net", "lesson 02: Net") + things[1]
    assert any("lesson_02's Thing means Net of lesson_02, but in earlier.py it would find Net of lesson_03" in line
               for line in problems(tmp_path, files, SIX))


def test_one_library_under_two_names_is_fine_and_two_under_one_is_caught(tmp_path):
    one = "import math\nimport json as j\n\n\ndef one():\n    return math.pi, j\n"
    two = "import math as m\nimport {} as j\n\n\ndef two():\n    return m.pi, j\n"
    own = "from earlier import one  # lesson 01\nfrom earlier import two  # lesson 02\nprint(one()[0] == two()[0])\n"
    assert problems(tmp_path, {ONE: one, TWO: two.format("json"), THREE: own}) == []
    assert execute(tmp_path, "lesson_03") == ["True"]
    only(problems(tmp_path, {TWO: two.format("csv")}), "lesson_03/model.py:2: lesson_02/model.py imports "
                                                                       "another j than the lessons before it")
    write(tmp_path, {TWO: "j = 3\n\n\ndef two():\n    return j\n"})
    only(problems(tmp_path, {}), "lesson_03/model.py:2: needs j of lesson_02 and the import j")


# ------------------------------------------------------------------------------------------------ command line
def test_named_lessons_are_synced_and_checked_alone(tmp_path, capsys):
    train = "# Adapted from lesson_01/train.py: f -- more\ndef f(x):\n    return x + {}\n"
    write(tmp_path, {ONE: BASE, "lesson_01/train.py": "def f(x):\n    return x\n",
                     TWO: TAKES, "lesson_02/train.py": train.format(2),
                     THREE: TAKES, "lesson_03/train.py": train.format(3)})
    assert main(["sync", "02"], tmp_path) == 0
    assert sorted(capsys.readouterr().out.splitlines()) == [
        "lesson_02/README.md: table of what is new filled", "lesson_02/earlier.py: written",
        "lineage.lock: lesson_02/train.py: f <- lesson_01/train.py: f pinned"]
    assert main(["check", "lesson_02", "01"], tmp_path) == 0 and main(["check", "3"], tmp_path) == 1
    out = capsys.readouterr().out
    assert out.startswith("lineage: all in order\nlesson_03/README.md:7: ") and "lesson_02" not in out
    assert not (tmp_path / "lesson_03/earlier.py").exists()
    assert main(["sync", "03"], tmp_path) == 0 and main(["check"], tmp_path) == 0

    write(tmp_path, {"lesson_01/train.py": "def f(x):\n    return -x\n",
                     "lesson_02/train.py": "def f(x):\n    return 2\n"})
    lock = (tmp_path / "lineage.lock").read_text()
    main(["sync", "03"], tmp_path)                                      # lesson 02 keeps its pin
    assert (tmp_path / "lineage.lock").read_text() == lock
    capsys.readouterr()
    main(["check", "03"], tmp_path)
    only(capsys.readouterr().out.splitlines(), "lesson_03/train.py:1: lesson_01/train.py: f changed after")
    main(["check", "02"], tmp_path)
    assert capsys.readouterr().out.startswith("lesson_02/README.md:7: ")
    assert main(["check", "01"], tmp_path) == 0
    copy = "# Copied from lesson_01/train.py: f\ndef f(x):\n    return x\n"
    write(tmp_path, {"lesson_02/sample.py": copy, "lesson_03/sample.py": copy})
    main(["sync", "03"], tmp_path)
    assert text(tmp_path, "lesson_02", "sample.py") == copy and "-x" in text(tmp_path, "lesson_03", "sample.py")
    assert any(line.startswith("lineage.lock:2: `lesson_02/") for line in check(tmp_path, only=["lesson_02"]))
