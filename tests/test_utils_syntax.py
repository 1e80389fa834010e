"""utils/syntax.py: what counts as the same code."""

import ast

import pytest

from utils.syntax import canonical, code_hash, docstring

SOURCE = '''"""A module."""
import math


class A:
    """A class."""

    def f(self, x: int = 2, *rest, **more) -> "y":
        """A method."""
        # a comment
        return [math.sin(x) for x in rest if x], {**more}, f"{x!r:>3}"


async def g():
    """A coroutine."""
    await A()
'''


@pytest.mark.parametrize("old, new", [
    ('"""A module."""\n', ""), ('"""A class."""', '"""Other\n    words."""'), ('        """A method."""\n', ""),
    ("# a comment", "# another"), ("(x) for", "( x )\n for"), ('"y"', "u'y'"), ("import math\n", "import math\n\n\n"),
    ('    """A coroutine."""\n', ""),
])
def test_docstrings_comments_and_layout_do_not_count(old, new):
    assert SOURCE.count(old) == 1
    assert canonical(SOURCE.replace(old, new)) == canonical(SOURCE)


@pytest.mark.parametrize("old, new", [
    ("class A", "class B"), ("= 2", "= 2.0"), ("*rest", "*, rest"), ("sin", "cos"), (" if x", ""), ("!r", "!s"),
    ("import math", "import math as m"), ("await A()", "A()"), ("async def g():", "async def g(x):"),
    ('"""A class."""', '1'), ("# a comment", '"a string that is no docstring"'), (">3", ">4"),
])
def test_everything_else_counts(old, new):
    changed = SOURCE.replace(old, new)
    assert changed != SOURCE and canonical(changed) != canonical(SOURCE)


def test_the_text_is_written_out_the_same_on_every_python():
    assert canonical("def f(a, b=1):\n    '''Words.'''\n    return None\n") == (
        "Module(body=[FunctionDef(name='f', args=arguments(args=[arg(arg='a'), arg(arg='b')], "
        "defaults=[Constant(value=1)]), body=[Return(value=Constant())])])")


def test_a_docstring_is_found_where_one_can_be():
    tree = ast.parse(SOURCE)
    assert docstring(tree).value.value == "A module." and docstring(tree.body[1]) is None
    assert docstring(tree.body[2]).value.value == "A class." and docstring(tree.body[2].body[1]).lineno == 9
    assert docstring(ast.parse("1")) is None and docstring(ast.parse("def f(): pass").body[0]) is None


def test_code_hash_covers_the_model_what_it_takes_and_the_script(tmp_path):
    for name in ("model", "earlier", "train", "sample", "other"):
        (tmp_path / f"{name}.py").write_text(f"'''Words.'''\n{name} = 1\n")
    train, sample = code_hash(tmp_path), code_hash(tmp_path, "sample")
    assert train == code_hash(tmp_path, "train") != sample and len(train) == 12

    for name in ("model", "earlier", "train", "sample", "other"):
        path = tmp_path / f"{name}.py"
        text = path.read_text()
        path.write_text("# a comment\n" + text.replace("Words", "Other words"))
        assert (code_hash(tmp_path), code_hash(tmp_path, "sample")) == (train, sample)
        path.write_text(text.replace("1", "2"))
        assert (code_hash(tmp_path) != train) == (name in ("model", "earlier", "train"))
        assert (code_hash(tmp_path, "sample") != sample) == (name in ("model", "earlier", "sample"))
        path.write_text(text)
    (tmp_path / "earlier.py").unlink()
    assert code_hash(tmp_path) != train
    (tmp_path / "model.py").write_text("x = 1\n")
    assert code_hash(tmp_path, "model") == "039874806879"       # written out: the same on every machine
