"""One text for a syntax tree: what the course compares and hashes when it asks whether two pieces of code are equal.

Docstrings, comments, line breaks and positions are left out, and the text is the same on every version of Python
(`ast.dump` and `ast.unparse` are not). `tools.lineage` compares definitions by it, `code_hash` says which code made
a result.
"""

import ast
import functools
import hashlib
from pathlib import Path

KINDS = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef           # a definition


def docstring(node):
    """The statement that is the docstring of a module or definition, or None."""
    documented = isinstance(node, (ast.Module, *KINDS)) and ast.get_docstring(node, clean=False) is not None
    return node.body[0] if documented else None


def dump(node):
    """A syntax tree, or a list of them, as text."""
    if isinstance(node, list):
        return "[" + ", ".join(map(dump, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node), **({"body": node.body[1:]} if docstring(node) else {}))
    # Fields that are empty do not exist in an older Python; `kind` is the u of u"text".
    inside = (f"{name}={dump(value)}" for name, value in fields.items() if value not in (None, []) and name != "kind")
    return f"{type(node).__name__}({', '.join(inside)})"


@functools.lru_cache(maxsize=64)
def canonical(text):
    """The one text of a piece of Python source; a SyntaxError where it is not Python."""
    return dump(ast.parse(text))


def code_hash(lesson, script=None):
    """12 hex digits of a lesson's model.py, earlier.py (if it has one) and `script`.py (None: train.py)."""
    paths = [Path(lesson) / f"{name}.py" for name in dict.fromkeys(("model", "earlier", script or "train"))]
    trees = (canonical(path.read_text(encoding="utf-8")) for path in paths if path.exists())
    return hashlib.sha256("".join(trees).encode()).hexdigest()[:12]
