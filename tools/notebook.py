"""Make a lesson's notebook.ipynb from its README.md, run it, and check that it is up to date.

    python -m tools.notebook build lesson_05            write the cells; keep the outputs of unchanged ones, but show
                                                        pictures of results/ as they are now
    python -m tools.notebook execute lesson_05a         build, run every cell, save the outputs
    python -m tools.notebook execute --smoke lesson_05  run it tiny in a scratch copy; save nothing; with --here
                                                        in this process, which spares the start of a kernel
    python -m tools.notebook check --all                exit 1 when a notebook is stale, failed or too big

Which cells README.md asks for, and how: tools/cells.py.
"""
import argparse
import base64
import hashlib
import io
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools.cells import NotebookError, read_cells

ROOT = Path(__file__).resolve().parent.parent
MAX_NOTEBOOK = 500_000                               # bytes
SIZES = ((838, 32, 24), (838, 16, 16), (720, 12, 12), (600, 8, 8))   # of a stored picture: width, colours, frames
METADATA = {
    "accelerator": "GPU",                            # Colab offers a GPU at once
    "colab": {"gpuType": "T4"},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


# ---------------------------------------------------------------------- build
def make(root: Path, lesson: str):
    """The notebook that README.md asks for, without outputs, and the line in README.md of each of its cells."""
    cells = read_cells(root, lesson)
    made = []
    for cell in cells:
        made.append((new_code_cell if cell.kind == "code" else new_markdown_cell)(cell.source, id=cell.id))
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
    """Write notebook.ipynb; code cells whose source did not change keep their outputs.

    A cell that only shows a file, and has been run, shows the file as it is now: that needs no kernel.
    """
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
    stale = [cell for cell in code_cells(notebook) if cell.outputs and not shows_its_file(path.parent, cell)]
    for cell in stale:
        cell.outputs = [shown(path.parent, cell)]
    fit(notebook, stale)
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
        fit(notebook, code_cells(notebook))
        for cell in code_cells(notebook):
            if (found := digest(path.parent, cell)) and cell.outputs:
                cell.outputs[0].metadata["shows"] = found
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
        for name, value in shell.user_ns.items():
            if type(value).__module__ == "model":
                raise NotebookError(f"{place(cell)}: {name} is made by model.py: an edit of the notebook's "
                                    f"{type(value).__name__} would not change it")


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


def fit(notebook, cells):
    """Make the stored pictures of these cells smaller, the largest first, until the notebook is below MAX_NOTEBOOK."""
    from PIL import Image

    from utils.images import animated_png, evenly, frames

    def stored(content, width, colours, most):
        parts, times = frames(Image.open(io.BytesIO(content)))
        chosen = evenly(len(parts), min(len(parts), most))
        times = [sum(times[i:j]) for i, j in zip(chosen, [*chosen[1:], None])]
        size = (width, round(parts[0].height * width / parts[0].width)) if parts[0].width > width else parts[0].size
        return base64.b64encode(animated_png([parts[i].resize(size) for i in chosen], times, colours)).decode()

    pictures = [(output.data, base64.b64decode(output.data["image/png"]), list(SIZES)) for cell in cells
                for output in cell.outputs if "image/png" in output.get("data", {})]
    for data, content, sizes in pictures:
        data["image/png"] = stored(content, *sizes.pop(0))
    while len(nbformat.writes(notebook)) > 0.96 * MAX_NOTEBOOK and any(sizes for *_, sizes in pictures):
        data, content, sizes = max((one for one in pictures if one[2]), key=lambda one: len(one[0]["image/png"]))
        data["image/png"] = stored(content, *sizes.pop(0))


def file_of(folder: Path, cell) -> Path | None:
    """The file that a cell shows; None for other cells."""
    match = re.fullmatch(r'show\("(.+)"\)', cell.source)
    return folder / match[1] if match else None


def digest(folder: Path, cell) -> str | None:
    """Of the file that a cell shows; None for other cells."""
    file = file_of(folder, cell)
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12] if file else None


def shows_its_file(folder: Path, cell) -> bool:
    """Whether the output of a cell that shows a file is that file as it is now; true for other cells."""
    return file_of(folder, cell) is None or cell.outputs[0].get("metadata", {}).get("shows") == digest(folder, cell)


def shown(folder: Path, cell):
    """What the kernel would answer to a cell that shows a file."""
    from PIL import Image

    from utils.images import animated_png, frames

    content = base64.b64encode(animated_png(*frames(Image.open(file_of(folder, cell))))).decode()
    return new_output("display_data", {"image/png": content, "text/plain": "<IPython.core.display.Image object>"},
                      metadata={"shows": digest(folder, cell)})


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
        problems.append(f"{name}: {size / 1e3:.0f} kB, must be under {MAX_NOTEBOOK / 1e3:g} kB")
    if notebook.metadata != wanted.metadata:
        problems.append(f"{name}: the notebook's metadata is not what build makes (widget state?); {again}")

    def content(cell):
        return cell.id, cell.cell_type, cell.source, cell.metadata

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
        if cell.outputs and not shows_its_file(path.parent, cell):
            problems.append(f"{where} does not show the picture as it is now; {again.replace('execute', 'build')}")
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
