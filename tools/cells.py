"""The cells of a lesson's notebook, from its README.md.

The text of README.md becomes text cells, split at `## ` headings. A picture that stands on a line of its own becomes
the cell `show("results/forward.png")`. Invisible markers become cells as well:

    <!-- cell: model.py imports -->          imports and constants of model.py; earlier.py is imported, not shown
    <!-- cell: model.py ResBlock UNet -->    these definitions, verbatim, in this order; also of train.py, sample.py and
                                             reproduce.py, and then with the imports that they need
    <!-- cell: train steps=300 -->           the body of `main` in train.py, run with these keys. (Where `main` returns
                                             on the way: the function and a call.) Its classes are the notebook's own
    <!-- cell: python                        the code as it stands. It may use what the first cell brings: `show`, and
    show(x, columns=9)                       RUNS, the keys with which every script is run: sample.main([..., *RUNS])
    -->
    <!-- cell: text                          a text that only the notebook has
    Now change something.
    -->
"""
import ast
import difflib
import hashlib
import json
import posixpath
import re
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from tools.frontpage import REPOSITORY

SETUP = '''\
# @title Set up: find the course, or fetch it and install what is missing
import os, subprocess, sys, tempfile, tomllib
from importlib import metadata
from pathlib import Path

lesson, repository = "{lesson}", "{repository}"
root = next((p for p in (Path.cwd(), *Path.cwd().parents) if (p / lesson / "model.py").exists()), None)
if root is None:                                     # not in a clone: on Colab, say
    from packaging.requirements import Requirement

    root = Path.cwd() / repository.split("/")[1]
    if not root.exists():
        subprocess.run(["git", "clone", "-q", "--depth=1", f"https://github.com/{{repository}}", str(root)], check=True)
    have = {{}}
    for package in metadata.distributions():
        have.setdefault((package.name or "").lower().replace("_", "-"), package.version)
    kept = {{name: have[name] for name in ("torch", "torchvision", "numpy") if name in have}}
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    missing = [str(need) for need in map(Requirement, project["dependencies"])
               if need.name not in kept and not need.specifier.contains(have.get(need.name, "0"))]
    if missing:                                      # torch, torchvision and numpy stay as this machine has them
        constraints = Path(tempfile.mkdtemp()) / "kept.txt"
        constraints.write_text("\\n".join(f"{{name}}=={{version}}" for name, version in kept.items()))
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-c", str(constraints), *missing], check=True)
os.chdir(root / lesson)
sys.path[:0] = [str(root / lesson), str(root)]

from utils import show

# Runs of this notebook have a folder of their own. SMOKE=1 in the environment makes them tiny: the tests use it.
RUNS = ["runs=runs/notebook"] if os.environ.get("SMOKE") != "1" else ["smoke=true", f"runs={{tempfile.mkdtemp()}}"]'''


class NotebookError(Exception):
    """A mistake in one line, with the file and line where there is one."""


@dataclass
class Cell:
    kind: str                                        # "markdown" or "code"
    key: str                                         # what its id is made from
    source: str
    line: int                                        # in README.md
    id: str = ""


# ---------------------------------------------------------------------- README.md -> cells
MARKER = re.compile(r"(?<!`)<!--\s*cell\b")
ALONE = re.compile(r"\s*(?:!\[[^\]]*\]\((?P<a>[^)\s:]+)(?: [^)]*)?\)|<img\b[^>]*?\bsrc=\"(?P<b>[^\":]+)\"[^>]*>)\s*")


def read_cells(root: Path, lesson: str) -> list[Cell]:
    """The cells that README.md asks for, in order, each with its id."""
    folder, readme = root / lesson, f"{lesson}/README.md"
    lines = unfolded((folder / "README.md").read_text(encoding="utf-8").splitlines())
    setup = SETUP.format(repository=REPOSITORY, lesson=lesson)
    cells, text, heading, fence, number, defined = [], [], "", "", 0, bound(setup)

    def end_text(last):
        source = "\n".join(text).rstrip()
        start = last - len(text) + 1 + len(source) - len(source.lstrip("\n"))
        source = source.lstrip("\n")
        if re.sub(r"<!--.*?-->", "", source, flags=re.DOTALL).strip():
            cells.append(Cell("markdown", f"text {heading}", rewrite_links(root, lesson, source, start), start))
        text.clear()

    while number < len(lines):
        line, number = lines[number], number + 1
        in_code, fence = fence, next_fence(fence, line)
        marker, picture = (None, None) if in_code or fence else (MARKER.search(line), ALONE.fullmatch(line))
        if marker or picture:
            end_text(number - 1)
            first = number
            while marker and "-->" not in line and number < len(lines):
                line, number = line + "\n" + lines[number], number + 1
            try:
                kind, source = code_of(folder, line, defined) if marker else shown(root, lesson, picture)
            except NotebookError as error:
                raise NotebookError(f"{readme}:{first}: {error}") from None
            if kind == "text":
                cells.append(Cell("markdown", f"note {heading}", rewrite_links(root, lesson, source, first + 1), first))
            else:
                cells.append(Cell("code", f"{kind} {heading}", source, first))
                defined |= bound(source) if ".py" in kind else set()
            continue
        if not (in_code or fence) and line.startswith("## "):
            end_text(number - 1)
            heading = line[3:].strip()
        text.append(line)
    end_text(number)

    if not any(cell.kind == "code" for cell in cells):
        raise NotebookError(f"{readme}: no marker <!-- cell: ... --> in it")
    cells.insert(int(cells[0].kind == "markdown"), Cell("code", "set up", setup, 1))
    seen = Counter()
    for cell in cells:
        cell.id = hashlib.sha256(f"{cell.key}\n{seen[cell.key]}".encode()).hexdigest()[:12]
        seen[cell.key] += 1
    return cells


def unfolded(lines: list[str]) -> list[str]:
    """The page with every fold open that holds a cell: a notebook cannot fold over several cells."""
    lines, begun = list(lines), []
    for number, line in enumerate(lines):
        if line.strip().startswith("<details"):
            begun.append(number)
        elif line.strip() == "</details>" and begun:
            first = begun.pop()
            if any(MARKER.search(one) or ALONE.fullmatch(one) for one in lines[first:number]):
                for i in range(first, number + 1):
                    lines[i] = re.sub(r"<summary>(.*?)</summary>", r"**\1**", lines[i], count=1)
                    lines[i] = re.sub(r"</?details[^>]*>", "", lines[i])
    return lines


def next_fence(fence: str, line: str) -> str:
    """The code fence that is open after this line; "" for none."""
    match = re.match(r"\s*(`{3,}(?=[^`]*$)|~{3,})(.*)", line)
    if not match or (fence and (match[2].strip() or not match[1].startswith(fence))):
        return fence
    return "" if fence else match[1]


def shown(root: Path, lesson: str, picture) -> tuple[str, str]:
    """Kind and source of the cell that shows a picture of the page."""
    target = unquote(picture["a"] or picture["b"])
    within(root, lesson, target)
    return "show", f"show({json.dumps(target)})"


def code_of(folder: Path, line: str, defined: set[str]) -> tuple[str, str]:
    """Kind and source of the cell that a marker asks for; `defined`: the names that cells of the lesson have bound."""
    match = re.fullmatch(r"<!--\s*cell:\s*((?:(?!-->|<!--).)*?)\s*-->\s*", line, re.DOTALL)
    if not match:
        raise NotebookError("a marker is <!-- cell: ... --> and stands alone")
    kind, rest = re.fullmatch(r"(\S*)(.*)", match[1], re.DOTALL).groups()
    if kind in ("python", "text"):
        if not rest.strip():
            raise NotebookError(f"a {kind} marker without anything in it")
        return kind, textwrap.dedent(rest.lstrip(" ")).strip()
    names = rest.split()
    if kind == "train":
        if wrong := [value for value in names if "=" not in value]:
            raise NotebookError(f"train takes key=value, not {wrong[0]!r}")
        return match[1], training(*parsed(folder, "train.py"), names, defined)
    if kind.endswith(".py") and names:
        return match[1], definitions(*parsed(folder, kind), names, defined)
    raise NotebookError(f"{match[1]!r} is not a cell: a file.py and names, python, text, train")


def parsed(folder: Path, name: str) -> tuple[str, str, ast.Module]:
    """Name, text and syntax tree of a file of the lesson."""
    if not (folder / name).is_file():
        raise NotebookError(f"no file {name} in {folder.name}")
    source = (folder / name).read_text(encoding="utf-8")
    try:
        return name, source, ast.parse(source)
    except SyntaxError as error:
        raise NotebookError(f"{name}, line {error.lineno}: {error.msg}") from None


# ---------------------------------------------------------------------- code of the lesson
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def stored(node) -> set[str]:
    """The names that an assignment, an import or a definition at the top level binds."""
    if isinstance(node, DEFINITIONS):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {alias.asname or alias.name.split(".")[0] for alias in node.names}
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}


def bound(source: str) -> set[str]:
    """The names that a cell leaves behind."""
    return set().union(*map(stored, ast.parse(source).body))


def definitions(name: str, source: str, tree: ast.Module, names: list[str], defined: set[str]) -> str:
    """The source of the named top-level definitions, verbatim; "imports" of model.py: see the top."""
    lines = source.splitlines()

    def span(node):
        """First and last line, with the decorators and the comment block directly above."""
        first = min(part.lineno for part in [node, *getattr(node, "decorator_list", [])])
        while first > 1 and lines[first - 2].startswith("#"):
            first -= 1
        return first, node.end_lineno

    known, imports, later = {}, [], set()            # later: names that need a definition of the file
    taken = {}                                       # imported name: where from
    for node in tree.body:
        if isinstance(node, DEFINITIONS):
            known[node.name] = node
            later.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            imports.append(span(node))
            taken.update(dict.fromkeys(stored(node), getattr(node, "module", None) or node.names[0].name))
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            known.update(dict.fromkeys(stored(node), node))
            if later.isdisjoint(used(node)):
                imports.append(span(node))
            else:
                later |= stored(node)

    pieces = []
    for one in names:
        if one == "imports" and name == "model.py":
            block, end = "", None
            for first, last in imports:
                block += "" if end is None else "\n" if first == end + 1 else "\n\n"
                block, end = block + "\n".join(lines[first - 1:last]), last
            pieces.append(block)
        elif one in known:
            first, last = span(known[one])
            pieces.append("\n".join(lines[first - 1:last]))
        elif one in taken:
            where = "stands in earlier.py now" if taken[one] == "earlier" else f"belongs to {taken[one]}"
            raise NotebookError(f"{name} only imports {one}: it {where}; leave it out, "
                                f"the cell `model.py imports` brings it")
        else:
            near = difflib.get_close_matches(one, known, 1)
            raise NotebookError(f"{name} defines no {one}" + (f"; did you mean {near[0]}?" if near else ""))
    if name != "model.py" and (needs := needed(name, tree, [known[one] for one in names], defined)):
        pieces.insert(0, needs)
    return "\n\n\n".join(pieces)


def used(*nodes) -> set[str]:
    """All names in these parts of a syntax tree."""
    return {part.id for node in nodes for part in ast.walk(node) if isinstance(part, ast.Name)}


def needed(name: str, tree: ast.Module, nodes: list, defined: set[str]) -> str:
    """The imports of a script that these parts of it need and no cell of the lesson's code has brought.

    What the script takes from model.py must stand in the notebook: only then does an edit there take effect.
    """
    found, wanted = [], used(*nodes) - defined
    for node in tree.body:
        if missing := sorted(wanted & stored(node) if node not in nodes else ()):
            home = getattr(node, "module", None) or name
            if isinstance(node, (ast.Import, ast.ImportFrom)) and home != "model":
                aliases = [alias for alias in node.names if {alias.asname, alias.name.split(".")[0]} & wanted]
                found.append(ast.unparse(ast.ImportFrom(node.module, aliases, node.level)
                                         if isinstance(node, ast.ImportFrom) else ast.Import(aliases)))
            else:
                home = home.removesuffix(".py") + ".py"
                raise NotebookError(f"{name} needs {missing[0]}, so a cell before must show it: {home} {missing[0]}")
    return "\n".join(found)


def training(name: str, source: str, tree: ast.Module, keys: list[str], defined: set[str]) -> str:
    """The body of `main` in train.py, run with these keys; where it returns on the way, the function and a call."""
    main = next((node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"), None)
    if main is None or "Run(__file__, argv)" not in source:
        raise NotebookError(f"{name} has no `main` with Run(__file__, argv) in it")
    arguments = "[" + "".join(f"{json.dumps(key)}, " for key in keys) + "*RUNS]"
    lines, returns = source.splitlines(), [node for node in ast.walk(main) if isinstance(node, ast.Return)]
    if returns == main.body[-1:]:
        lines[returns[0].lineno - 1] = lines[returns[0].lineno - 1].replace("return", "result =", 1)
        code = textwrap.dedent("\n".join(lines[main.body[0].lineno - 1:main.end_lineno]))
    else:
        code = "\n".join([*lines[main.lineno - 1:main.end_lineno], "", "", f"result = main({arguments})"])
        arguments = "argv"
    code = re.sub(r"Run\(__file__, argv\) *", f'Run("train.py", {arguments})  ', code)
    return "\n\n".join(filter(None, [needed(name, tree, [main], defined), code]))


# ---------------------------------------------------------------------- links and pictures
# Code blocks, inline code and maths hold no links; none of the last two runs over an empty line.
SKIP = (r"(?ms:^[ ]*(?P<fence>```+(?=[^`\n]*$)|~~~+).*?(?:^[ ]*(?P=fence)[`~]*[ ]*$|\Z))"
        r"|(?P<tick>`+)(?:(?!\n\n)[\s\S])+?(?<!`)(?P=tick)(?!`)"
        r"|\$\$(?:(?!\n\n)[\s\S])+?\$\$|(?<!\\)\$(?!\s)(?:(?!\n\n)[^$])+?(?<!\s)\$(?!\d)|")
PICTURE = re.compile(SKIP + r"(?P<head>!\[[^\]]*\]\()(?P<target>[^)\s]+)")
LINK = re.compile(SKIP + r"(?P<head>(?<!!)\[(?:!\[[^\]]*\]\([^)]*\)|[^\[\]])*\]\()(?P<target>[^)\s]+)")
SOURCE = re.compile(SKIP + r"(?P<head><img\b[^>]*?\bsrc=\")(?P<target>[^\"]+)")
ANCHOR = re.compile(SKIP + r"(?P<head><a\b[^>]*?\bhref=\")(?P<target>[^\"]+)")


def within(root: Path, lesson: str, target: str) -> str:
    """The path in the repository that a relative link of a page leads to; that of a picture must exist."""
    path = posixpath.normpath(posixpath.join(lesson, target.partition("#")[0] or "README.md"))
    if path.startswith(".."):
        raise NotebookError(f"{target} is outside the repository")
    if path.endswith((".png", ".gif", ".jpg")) and not (root / path).is_file():
        raise NotebookError(f"no picture {target}")
    return path


def rewrite_links(root: Path, lesson: str, text: str, start: int) -> str:
    """The text with every relative link as an address on GitHub; a picture must stand on a line of its own."""
    def picture(target, path):
        raise NotebookError(f"the picture {target} must stand on a line of its own: then it becomes a cell")

    def page(target, path):
        kind = "blob" if "." in posixpath.basename(path) else "tree"             # a file or a folder
        return f"https://github.com/{REPOSITORY}/{kind}/main/{path}{''.join(target.partition('#')[1:])}"

    def change(address):
        def one(match):
            target = match["target"]
            if target is None or re.match(r"[a-zA-Z][\w+.-]*:|/", target):
                return match[0]                      # no link, or an absolute one
            try:
                return match["head"] + address(target, within(root, lesson, unquote(target)))
            except NotebookError as error:
                line = start + match.string.count("\n", 0, match.start("target"))
                raise NotebookError(f"{lesson}/README.md:{line}: {error}") from None
        return one

    for pattern, address in ((PICTURE, picture), (LINK, page), (SOURCE, picture), (ANCHOR, page)):
        text = pattern.sub(change(address), text)
    return text
