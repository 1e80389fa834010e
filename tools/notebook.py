"""Make a lesson's notebook.ipynb from its README.md, run it, and check that it is up to date.

    python -m tools.notebook build lesson_05            write the cells; keep the outputs of unchanged ones
    python -m tools.notebook execute lesson_05a         build, run every cell, save the outputs
    python -m tools.notebook execute --smoke lesson_05  run it tiny in a scratch copy; save nothing; with --here
                                                        in this process, which spares the start of a kernel
    python -m tools.notebook check --all                exit 1 when a notebook is stale, failed or too big

The text of README.md becomes text cells, split at `## ` headings. Invisible markers become code cells:

    <!-- cell: model.py imports -->                  imports and module-level constants of model.py; what stands
                                                     in earlier.py is imported like this, not shown
    <!-- cell: model.py ResBlock UNet -->            these definitions, verbatim, in this order
    <!-- cell: model.py -->                          the whole file without its `if __name__` block
    <!-- cell: train steps=300 -->                   result = train.main(["steps=300"]); also sample, reproduce
    <!-- cell: python                                the code as it stands
    grid(result)
    -->
"""
import argparse
import ast
import base64
import difflib
import hashlib
import json
import mimetypes
import os
import posixpath
import re
import shutil
import sys
import tempfile
import textwrap
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tools.frontpage import REPOSITORY

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("train", "sample", "reproduce")
MAX_PICTURE, MAX_NOTEBOOK = 150_000, 1_000_000       # bytes
METADATA = {
    "accelerator": "GPU",                            # Colab offers a GPU at once
    "colab": {"gpuType": "T4"},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}

SETUP = '''\
# @title Set up: on Colab, fetch the course and what it needs; elsewhere, do nothing
import os, re, subprocess, sys, tempfile
from importlib import metadata
from pathlib import Path

if "google.colab" in sys.modules:
    root = Path("/content") / "{name}"
    if not root.exists():
        subprocess.run(["git", "clone", "-q", "--depth=1", "https://github.com/{repository}", str(root)], check=True)
    os.chdir(root / "{lesson}")
    sys.path[:0] = [str(root / "{lesson}"), str(root)]
    tidy = lambda name: re.sub(r"[-_.]+", "-", name).lower()
    have = {{tidy(package.metadata["Name"]): package.version for package in metadata.distributions()}}
    lines = [line.split("#")[0].strip() for line in (root / "requirements.txt").read_text().splitlines()]
    missing = [line for line in lines if line[:1].isalnum() and tidy(re.match(r"[\\w.-]+", line)[0]) not in have]
    if missing:                                      # what Colab has stays as it is, above all its torch
        keep = Path(tempfile.mkdtemp()) / "keep.txt"
        keep.write_text("".join(f"{{p}}=={{have[p]}}\\n" for p in ("torch", "torchvision", "numpy") if p in have))
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-c", str(keep), *missing], check=True)

# SMOKE=1 in the environment makes every run tiny and keeps it out of this folder: the tests use it.
SMOKE = ["smoke=true", f"runs={{tempfile.mkdtemp()}}"] if os.environ.get("SMOKE") == "1" else []'''


class NotebookError(Exception):
    """A mistake in one line, with the file and line where there is one."""


@dataclass
class Cell:
    kind: str                                        # "markdown" or "code"
    key: str                                         # what its id is made from
    source: str
    line: int                                        # in README.md
    attachments: dict = field(default_factory=dict)
    id: str = ""


# ---------------------------------------------------------------------- README.md -> cells
def read_cells(root: Path, lesson: str) -> list[Cell]:
    """The cells that README.md asks for, in order, each with its id."""
    folder, readme = root / lesson, f"{lesson}/README.md"
    lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    cells, text, heading, fence, number = [], [], "", "", 0

    def end_text(last):
        source = "\n".join(text).rstrip()
        start = last - len(text) + 1 + len(source) - len(source.lstrip("\n"))
        source, attachments = source.lstrip("\n"), {}
        if re.sub(r"<!--.*?-->", "", source, flags=re.DOTALL).strip():
            source = rewrite_links(root, lesson, source, start, attachments)
            cells.append(Cell("markdown", f"text {heading}", source, start, attachments))
        text.clear()

    while number < len(lines):
        line, number = lines[number], number + 1
        in_code, fence = fence, next_fence(fence, line)
        if not (in_code or fence) and re.search(r"(?<!`)<!--\s*cell\b", line):
            end_text(number - 1)
            first = number
            while "-->" not in line and number < len(lines):
                line, number = line + "\n" + lines[number], number + 1
            try:
                match = re.fullmatch(r"<!--\s*cell:\s*((?:(?!-->|<!--).)*?)\s*-->\s*", line, re.DOTALL)
                if not match:
                    raise NotebookError("a marker is <!-- cell: ... --> and stands alone")
                kind, source = code_of(folder, match[1])
            except NotebookError as error:
                raise NotebookError(f"{readme}:{first}: {error}") from None
            cells.append(Cell("code", f"python {heading}" if kind == "python" else match[1], source, first))
            continue
        if not (in_code or fence) and line.startswith("## "):
            end_text(number - 1)
            heading = line[3:].strip()
        text.append(line)
    end_text(number)

    if not any(cell.kind == "code" for cell in cells):
        raise NotebookError(f"{readme}: no marker <!-- cell: ... --> in it")
    setup = SETUP.format(name=REPOSITORY.split("/")[1], repository=REPOSITORY, lesson=lesson)
    cells.insert(int(cells[0].kind == "markdown"), Cell("code", "set up", setup, 1))
    seen = Counter()
    for cell in cells:
        cell.id = hashlib.sha256(f"{cell.key}\n{seen[cell.key]}".encode()).hexdigest()[:12]
        seen[cell.key] += 1
    return cells


def next_fence(fence: str, line: str) -> str:
    """The code fence that is open after this line; "" for none."""
    match = re.match(r"\s*(`{3,}(?=[^`]*$)|~{3,})(.*)", line)
    if not match or (fence and (match[2].strip() or not match[1].startswith(fence))):
        return fence
    return "" if fence else match[1]


def code_of(folder: Path, marker: str) -> tuple[str, str]:
    """Kind and source of the code cell that a marker asks for."""
    kind, rest = re.fullmatch(r"(\S*)(.*)", marker, re.DOTALL).groups()
    if kind == "python":
        if not rest.strip():
            raise NotebookError("a python marker without code")
        return kind, textwrap.dedent(rest.lstrip(" ")).strip()
    if kind in SCRIPTS:
        find_file(folder, f"{kind}.py")
        for value in rest.split():
            if "=" not in value:
                raise NotebookError(f"{kind} takes key=value, not {value!r}")
        arguments = "".join(f"{json.dumps(value)}, " for value in rest.split())
        return kind, f"import {kind}\n\nresult = {kind}.main([{arguments}*SMOKE])"
    if kind.endswith(".py"):
        return kind, definitions(find_file(folder, kind), rest.split())
    raise NotebookError(f"{kind!r} is not a kind of cell: a file.py, python, {', '.join(SCRIPTS)}")


def find_file(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise NotebookError(f"no file {name} in {folder.name}")
    return folder / name


# ---------------------------------------------------------------------- definitions, verbatim
def definitions(path: Path, names: list[str]) -> str:
    """The source of the named top-level definitions; no names: the whole file; "imports": see the top."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    try:
        body = ast.parse(source).body
    except SyntaxError as error:
        raise NotebookError(f"{path.name}, line {error.lineno}: {error.msg}") from None

    def span(node):
        """First and last line, with the decorators and the comment block directly above."""
        first = min(part.lineno for part in [node, *getattr(node, "decorator_list", [])])
        while first > 1 and lines[first - 2].startswith("#"):
            first -= 1
        return first, node.end_lineno

    def text(first, last):
        return "\n".join(lines[first - 1:last])

    if not names:
        for node in reversed(body):
            if isinstance(node, ast.If) and "__name__" in ast.dump(node.test):
                first, last = span(node)
                del lines[first - 1:last]
        return "\n".join(lines).strip("\n")

    known, imports, later = {}, [], set()            # later: names that need a definition of the file
    taken = {}                                       # imported name: where from
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            known[node.name] = span(node)
            later.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            imports.append(span(node))
            taken.update({alias.asname or alias.name: getattr(node, "module", alias.name) for alias in node.names})
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            used = [part for part in ast.walk(node) if isinstance(part, ast.Name)]
            targets = {part.id for part in used if isinstance(part.ctx, ast.Store)}
            known.update(dict.fromkeys(targets, span(node)))
            if later.isdisjoint(part.id for part in used):
                imports.append(span(node))
            else:
                later |= targets

    pieces = []
    for name in names:
        if name == "imports":
            block, end = "", None
            for first, last in dict.fromkeys(imports):
                block += "" if end is None else "\n" if first == end + 1 else "\n\n"
                block, end = block + text(first, last), last
            pieces.append(block)
        elif name in known:
            pieces.append(text(*known[name]))
        elif name in taken:
            where = "stands in earlier.py now" if taken[name] == "earlier" else f"belongs to {taken[name]}"
            raise NotebookError(f"{path.name} only imports {name}: it {where}; leave it out, "
                                f"the cell `{path.name} imports` brings it")
        else:
            near = difflib.get_close_matches(name, known, 1)
            raise NotebookError(f"{path.name} defines no {name}" + (f"; did you mean {near[0]}?" if near else ""))
    return "\n\n\n".join(pieces)


# ---------------------------------------------------------------------- links and pictures
# Code blocks, inline code and maths hold no links; none of the last two runs over an empty line.
SKIP = (r"(?ms:^[ ]*(?P<fence>```+(?=[^`\n]*$)|~~~+).*?(?:^[ ]*(?P=fence)[`~]*[ ]*$|\Z))"
        r"|(?P<tick>`+)(?:(?!\n\n)[\s\S])+?(?<!`)(?P=tick)(?!`)"
        r"|\$\$(?:(?!\n\n)[\s\S])+?\$\$|(?<!\\)\$(?!\s)(?:(?!\n\n)[^$])+?(?<!\s)\$(?!\d)|")
PICTURE = re.compile(SKIP + r"(?P<head>!\[[^\]]*\]\()(?P<target>[^)\s]+)")
LINK = re.compile(SKIP + r"(?P<head>(?<!!)\[(?:!\[[^\]]*\]\([^)]*\)|[^\[\]])*\]\()(?P<target>[^)\s]+)")
SOURCE = re.compile(SKIP + r"(?P<head><img\b[^>]*?\bsrc=\")(?P<target>[^\"]+)")
ANCHOR = re.compile(SKIP + r"(?P<head><a\b[^>]*?\bhref=\")(?P<target>[^\"]+)")


def rewrite_links(root: Path, lesson: str, text: str, start: int, attachments: dict) -> str:
    """The text with small pictures as attachments and every other relative link as an address on GitHub."""
    def raw(target, path):
        if not (root / path).is_file():
            raise NotebookError(f"no picture {target}")
        return f"https://raw.githubusercontent.com/{REPOSITORY}/main/{path}"

    def attach(target, path):
        url, mime = raw(target, path), mimetypes.guess_type(path)[0]
        data = (root / path).read_bytes()
        if len(data) >= MAX_PICTURE or mime not in ("image/png", "image/jpeg", "image/gif"):
            return url
        name = re.sub(r"[^\w.-]+", "_", posixpath.relpath(path, lesson))
        attachments[name] = {mime: base64.b64encode(data).decode()}
        return f"attachment:{name}"

    def page(target, path):
        kind = "blob" if "." in posixpath.basename(path) else "tree"             # a file or a folder
        return f"https://github.com/{REPOSITORY}/{kind}/main/{path}{''.join(target.partition('#')[1:])}"

    def change(address):
        def one(match):
            target = match["target"]
            if target is None or re.match(r"[a-zA-Z][\w+.-]*:|/", target):
                return match[0]                      # no link, or an absolute one
            path = posixpath.normpath(posixpath.join(lesson, unquote(target.partition("#")[0]) or "README.md"))
            try:
                if path.startswith(".."):
                    raise NotebookError(f"{target} is outside the repository")
                return match["head"] + address(target, path)
            except NotebookError as error:
                line = start + match.string.count("\n", 0, match.start("target"))
                raise NotebookError(f"{lesson}/README.md:{line}: {error}") from None
        return one

    for pattern, address in ((PICTURE, attach), (LINK, page), (SOURCE, raw), (ANCHOR, page)):
        text = pattern.sub(change(address), text)
    return text


# ---------------------------------------------------------------------- build
def make(root: Path, lesson: str):
    """The notebook that README.md asks for, without outputs, and the line in README.md of each of its cells."""
    cells = read_cells(root, lesson)
    made = []
    for cell in cells:
        made.append((new_code_cell if cell.kind == "code" else new_markdown_cell)(cell.source, id=cell.id))
        if cell.attachments:
            made[-1].attachments = cell.attachments
        if cell.key == "set up":
            made[-1].metadata = {"cellView": "form"}                             # Colab shows its title only
    notebook = nbformat.from_dict(new_notebook(metadata=METADATA, cells=made) | {"nbformat_minor": 5})
    return notebook, {cell.id: cell.line for cell in cells}


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def errors(cell) -> list:
    return [output for output in cell.outputs if output.output_type == "error"]


def load(path: Path):
    """The notebook on disk."""
    try:
        notebook = nbformat.v4.reads(path.read_text(encoding="utf-8"))
        nbformat.validate(notebook)
    except FileNotFoundError:
        raise NotebookError("missing; build it") from None
    except (ValueError, LookupError, TypeError, AttributeError, nbformat.ValidationError) as error:
        raise NotebookError(f"not a valid notebook: {str(error).splitlines()[0]}") from None
    return notebook


def save(notebook, path: Path):
    """Write with sorted keys: the same notebook gives the same bytes."""
    path.write_text(nbformat.writes(notebook).rstrip("\n") + "\n", encoding="utf-8")


def build(root: Path, lesson: str) -> Path:
    """Write notebook.ipynb; code cells whose source did not change keep their outputs."""
    path, (notebook, _) = root / lesson / "notebook.ipynb", make(root, lesson)
    try:
        old = code_cells(load(path))
    except NotebookError:
        old = []
    ids = {cell.id for cell in notebook.cells}
    same_id = {(cell.id, cell.source): cell for cell in old}
    moved = {cell.source: cell for cell in old if cell.id not in ids}
    for cell in code_cells(notebook):
        if was := same_id.get((cell.id, cell.source)) or moved.pop(cell.source, None):
            cell.outputs, cell.execution_count = was.outputs, was.execution_count
    save(notebook, path)
    return path


# ---------------------------------------------------------------------- execute
def execute(root: Path, lesson: str, smoke: bool = False, here: bool = False) -> Path:
    """Run the notebook that README.md asks for in a fresh kernel of this Python, and save it.

    smoke: with SMOKE=1, in a scratch copy of the lesson; nothing is saved. here: in this process, not in a kernel.
    """
    path, (notebook, lines) = root / lesson / "notebook.ipynb", make(root, lesson)
    with tempfile.TemporaryDirectory() as scratch:
        environment = {name: value for name, value in os.environ.items() if name not in ("SMOKE", "MPLBACKEND")}
        environment |= {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "IPYTHONDIR": f"{scratch}/ipython",
                        "PYDEVD_DISABLE_FILE_VALIDATION": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}
        folder = root / lesson
        if smoke:
            mirror(root, lesson, Path(scratch, "copy"))
            Path(scratch, "tmp").mkdir()
            folder = Path(scratch, "copy", lesson)
            # One thread: tiny runs beside other processes wait for threads longer than they compute.
            environment |= {"SMOKE": "1", "TMPDIR": f"{scratch}/tmp", "OMP_NUM_THREADS": "1"}
        run = run_cells_here if here else run_cells
        run(notebook, folder, environment, lambda cell: f"{lesson}/README.md:{lines[cell.id]}")
    if not smoke:
        clean(notebook, root)
        save(notebook, path)
    return path


def run_cells(notebook, folder: Path, environment: dict, place):
    """Run every cell in a kernel of this very Python; no kernelspec needs to be installed."""
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    class ThisPython(KernelSpecManager):
        def get_kernel_spec(self, kernel_name):
            command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=40"]
            return KernelSpec(argv=command, display_name="Python 3", language="python")

    client = NotebookClient(notebook, km=AsyncKernelManager(kernel_spec_manager=ThisPython()),
                            timeout=600 if "SMOKE" in environment else None,
                            record_timing=False, store_widget_state=False,
                            resources={"metadata": {"path": str(folder)}})
    try:
        client.execute(env=environment)
    except CellExecutionError as error:
        failed, output = next((cell, output) for cell in code_cells(notebook) for output in errors(cell))
        print(plain("\n".join(output.traceback)), file=sys.stderr)
        raise NotebookError(f"{place(failed)}: {error.ename}: {' '.join(error.evalue.split())}") from None
    except (CellTimeoutError, DeadKernelError) as error:
        raise NotebookError(f"{folder.name}: {str(error).splitlines()[0]}") from None


def run_cells_here(notebook, folder: Path, environment: dict, place):
    """Run every cell as a kernel would, in this process, which is of no further use: its folder and path change."""
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    os.environ.update(environment, MPLBACKEND="agg")
    tempfile.tempdir = None                          # TMPDIR has changed
    os.chdir(folder)
    sys.path[:1] = [str(folder), environment["PYTHONPATH"]]
    shell = InteractiveShell(config=Config(HistoryManager={"enabled": False}), ipython_dir=environment["IPYTHONDIR"])
    for cell in code_cells(notebook):
        done = shell.run_cell(cell.source)           # prints the traceback of an error
        if error := done.error_before_exec or done.error_in_exec:
            raise NotebookError(f"{place(cell)}: {type(error).__name__}: {' '.join(str(error).split())}")


def mirror(root: Path, lesson: str, copy: Path):
    """A repository at `copy` in which the lesson's folder is real and everything else a symbolic link."""
    here, there = root, copy
    for part in Path(lesson).parts:
        there.mkdir()
        for entry in here.iterdir():
            if entry.name != part and not entry.name.startswith("."):
                (there / entry.name).symlink_to(entry.resolve())
        here, there = here / part, there / part
    shutil.copytree(here, there, ignore=shutil.ignore_patterns("runs", "__pycache__", ".*", "sublesson_*"))


def plain(text: str) -> str:
    """Without the colours and cursor movements of a terminal."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def last_state(text: str) -> str:
    """What a terminal shows in the end: of a line that was overwritten, the last writing."""
    return "\n".join(line.rstrip("\r").rpartition("\r")[2].rstrip() for line in plain(text).split("\n"))


def clean(notebook, root: Path):
    """Outputs as they are committed: no widgets, timestamps or paths of this machine; bars in their last state."""
    notebook.metadata = nbformat.from_dict(METADATA)
    places = [(str(Path.home()), "~/"), *((place, "") for place in
              (str(root), str(root.resolve()), sys.prefix, sys.base_prefix, tempfile.gettempdir()))]
    places = sorted((pair for pair in places if len(pair[0]) > 1), key=lambda pair: -len(pair[0]))

    def normalise(value):
        if isinstance(value, str):
            value = re.sub(r"[^\s\"'(<]*ipykernel_\d+[/\\]\d+\.py", "cell", value)
            for place, short in places:
                value = re.sub(rf"(?<![\w.~-]){re.escape(place)}(?:[/\\]|(?![\w.-]))", short, value)
            return value
        if isinstance(value, list):
            return [normalise(one) for one in value]
        if isinstance(value, dict):
            return {name: one if name.startswith("image/") else normalise(one) for name, one in value.items()}
        return value

    for cell in code_cells(notebook):
        kept, streams = [], {}
        for output in cell.outputs:
            if output.output_type == "stream":       # one stdout and one stderr, each where it began
                if output.name in streams:
                    streams[output.name].text += output.text
                    continue
                streams[output.name] = output
            if not any("widget" in mime for mime in output.get("data", {})):
                kept.append(output)
        for output in streams.values():
            output.text = last_state(output.text)
        cell.outputs = [nbformat.from_dict(normalise(output)) for output in kept if output.get("text", "-").strip()]


# ---------------------------------------------------------------------- check
# An absolute path of two parts or more. Not /content (Colab), not the slashes of an address.
MACHINE_PATH = re.compile(r"(?<![\w./:~<\\-])(?:/(?!content/|dev/null)[A-Za-z][\w.-]*/[\w.-]+|[A-Z]:\\\w[^\s\"']*)")


def check(root: Path, lesson: str) -> list[str]:
    """What is wrong with the committed notebook, one line each."""
    path = root / lesson / "notebook.ipynb"
    name, again = f"{lesson}/notebook.ipynb", f"run python -m tools.notebook execute {lesson}"
    try:
        wanted, lines = make(root, lesson)
    except NotebookError as error:
        return [str(error)]
    try:
        notebook = load(path)
    except NotebookError as error:
        return [f"{name}: {error}"]

    problems = []
    if (size := path.stat().st_size) >= MAX_NOTEBOOK:
        problems.append(f"{name}: {size / 1e6:.2f} MB, must be under {MAX_NOTEBOOK / 1e6:g} MB")
    if notebook.metadata != wanted.metadata:
        problems.append(f"{name}: the notebook's metadata is not what build makes (widget state?); {again}")

    def content(cell):
        return cell.id, cell.cell_type, cell.source, cell.metadata, cell.get("attachments")

    for index, (have, want) in enumerate(zip(notebook.cells, wanted.cells)):
        if content(have) != content(want):
            problems.append(f"{name}: cell {index + 1} is not what README.md:{lines[want.id]} asks for; {again}")
            break
    else:
        if len(notebook.cells) != len(wanted.cells):
            problems.append(f"{name}: {len(notebook.cells)} cells, README.md asks for {len(wanted.cells)}; {again}")

    for count, cell in enumerate(code_cells(notebook), 1):
        where = f"{name}: code cell {count}"
        if cell.execution_count != count:
            problems.append(f"{where} was not run, or not in order; {again}")
        for error in errors(cell):
            problems.append(f"{where} ended in {error.ename}: {' '.join(error.evalue.split())}")
        if found := machine_path(cell.outputs):
            problems.append(f"{where} prints the machine's path {found}; {again}")
    return problems


def machine_path(value) -> str | None:
    """The first absolute path in an output, pictures aside."""
    if isinstance(value, dict):
        value = [one for name, one in value.items() if not name.startswith("image/")]
    if isinstance(value, list):
        return next((found for one in value if (found := machine_path(one))), None)
    match = MACHINE_PATH.search(re.sub(r"base64,[\w+/=]+", "", value)) if isinstance(value, str) else None
    return match[0] if match else None


# ---------------------------------------------------------------------- command line
def lessons(root: Path) -> list[str]:
    """Every folder whose README.md holds a cell marker."""
    readmes = [*root.glob("lesson_*/README.md"), *root.glob("lesson_*/sublesson_*/README.md")]
    return sorted(readme.parent.relative_to(root).as_posix() for readme in readmes
                  if re.search(r"^<!--\s*cell\b", readme.read_text(encoding="utf-8"), re.MULTILINE))


def folder_of(root: Path, name: str) -> str | None:
    """lesson_05, 05, 05a, lesson_05a or lesson_05/sublesson_a as the folder's name; None: no such lesson."""
    lesson = name.rstrip("/")
    if match := re.fullmatch(r"(?:lesson_)?(\d+)([a-z]?)", lesson):
        lesson = f"lesson_{int(match[1]):02d}" + (f"/sublesson_{match[2]}" if match[2] else "")
    is_lesson = re.fullmatch(r"lesson_\w+(/sublesson_\w+)?", lesson) and (root / lesson / "README.md").is_file()
    return lesson if is_lesson else None


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message}\n")


def main(argv=None, root: Path = ROOT) -> int:
    parser = Parser(prog="python -m tools.notebook", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["build", "execute", "check"])
    parser.add_argument("lessons", nargs="*", metavar="lesson", help="lesson_05, 05a or lesson_05/sublesson_a")
    parser.add_argument("--all", action="store_true", help="every lesson whose README.md holds a cell marker")
    parser.add_argument("--smoke", action="store_true", help="execute with SMOKE=1 in a scratch copy; save nothing")
    parser.add_argument("--here", action="store_true", help="with --smoke: in this process; one lesson only")
    args = parser.parse_intermixed_args(argv)
    if args.all == bool(args.lessons):
        parser.error("name lessons, or --all")
    if args.smoke and args.action != "execute":
        parser.error("--smoke goes with execute")
    if args.here and not (args.smoke and len(args.lessons) == 1):
        parser.error("--here goes with --smoke and one lesson")
    for name in args.lessons:
        if folder_of(root, name) is None:
            parser.error(f"no lesson {name} with a README.md")

    failed = False
    for lesson in lessons(root) if args.all else [folder_of(root, name) for name in args.lessons]:
        try:
            if args.action == "check":
                problems, done = check(root, lesson), "is up to date"
            elif args.action == "build":
                problems, done = [], f"written, {build(root, lesson).stat().st_size / 1e3:.0f} kB"
            else:
                problems, done = [], "ran in a scratch copy" if args.smoke else "executed and saved"
                execute(root, lesson, args.smoke, args.here)
        except NotebookError as error:
            problems = [str(error)]
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        failed |= bool(problems)
        if not problems:
            print(f"{lesson}/notebook.ipynb: {done}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
