"""Files that are either whole or not there: written aside, flushed to the disk, renamed."""

import contextlib
import errno
import functools
import json
import os
import platform
import re
import shlex
import sys
import threading
from pathlib import Path

from .errors import UserError

ROOT = Path(__file__).resolve().parent.parent          # the checkout


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary path beside `path`; on a clean exit it is fsynced and renamed to `path`.

    After a crash at any moment `path` holds its old content or its new one, never a part.
    """
    path = Path(path)
    if path.exists() and not path.is_file():           # renaming over a device would replace it
        raise IsADirectoryError(errno.EISDIR, "not a regular file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{_HOST}.{os.getpid()}.{threading.get_ident()}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)                      # the rename itself must reach the disk too
    except OSError as error:
        if error.filename is None:                     # a full disk does not say where
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


_HOST = re.sub(r"[^\w-]", "_", platform.node()) or "host"             # who may look whether a process still lives


def sweep(folder):
    """Remove the temporary files of `atomic` that killed processes of this machine have left in a folder."""
    import psutil  # accelerate depends on it

    for path in folder.glob(f".*.{_HOST}.*"):
        match = re.search(rf"\.{_HOST}\.(\d+)\.\d+(\.\w+)?$", path.name)
        if match and not psutil.pid_exists(int(match[1])):
            path.unlink(missing_ok=True)


# What a disk answers that cannot do what was asked, such as a network's or a cluster's.
CANNOT = {getattr(errno, name) for name in ("EINVAL", "ENOSYS", "ENOLCK", "ENOTSUP", "EOPNOTSUPP")}


def _sync_folder(folder):
    """Flush a folder's list of files to the disk, where system and disk can: Windows opens no folders."""
    if os.name == "nt":
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in CANNOT:
            raise
        warn_once(f"the disk of {folder} cannot flush a folder ({error.strerror}): files are written whole, but the "
                   "last ones may be lost if the power fails")
    finally:
        os.close(number)


@functools.cache
def warn_once(text):
    """Print a warning, and never again in this process."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def write_json(path, value):
    """Write `value` as indented JSON, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_json(path):
    """What a JSON file holds: a dict, empty where there is no such file. UserError that says what is wrong with it."""
    path = Path(path)
    if not path.exists():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except UnicodeDecodeError:
        raise UserError(f"{short(path)} is not UTF-8 text: {_MEND}") from None
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        reason = "holds a merge conflict" if any(row.startswith("<<<<<<<") for row in text.splitlines()) else (
            f"is no JSON at line {line} ({getattr(error, 'msg', 'too deep')})" if text.strip() else "is empty")
        raise UserError(f"{short(path)} {reason}: {_MEND}") from None
    if not isinstance(content, dict):
        raise UserError(f"{short(path)} must hold an object of names, {{...}}, not a {type(content).__name__}: {_MEND}")
    return content


_MEND = "mend it, or move it away and start again"


@contextlib.contextmanager
def update_json(path):
    """Yield the dict that a JSON file holds, to be changed, and write it: nobody else changes it in between."""
    path = Path(path)
    with lock(path.with_name(f".{path.stem}.lock")):
        content = read_json(path)
        yield content
        write_json(path, content)


ENDINGS = {"out": ".png", "gif": ".gif", "npz": ".npz"}    # keys by which a reader names a file of the run's folder
_TAKEN = re.compile(r"loss\.png|claim\.png|preview_\d+\.png")         # what training and claims leave there


def check_names(settings, lesson):
    """UserError if a name that the reader gave is no plain file name with its ending, or `runs` is no folder apart."""
    for key, ending in ENDINGS.items():
        name = str(getattr(settings, key, ""))
        stem, beyond = name.removesuffix(ending), set(name) & set('/\\:*?"<>|') or not name.isprintable()
        if name and (not name.endswith(ending) or stem.strip(". ") != stem or not stem or beyond) or (
                key == "out" and hasattr(settings, key) and (not name or _TAKEN.fullmatch(name))):
            raise UserError(f"{key}={name} must be a plain file name that ends in {ending}, such as mine{ending}; the "
                            "file goes to the run's folder (runs=FOLDER chooses another)")
    if not settings.runs.strip() or (lesson / os.path.expanduser(settings.runs)).resolve() == lesson:
        raise UserError(f'runs={settings.runs or chr(34) * 2} must name a folder of its own, such as runs=runs')


def check_checkout(lesson):
    """UserError if the lesson stands in one checkout and this `utils` in another, which an environment may mix."""
    for folder in lesson.parents:
        if (folder / "utils" / "run.py").is_file():
            if not os.path.samefile(folder / "utils", ROOT / "utils"):      # a link to it will do
                raise UserError(f"{lesson.name} stands in {folder}, but `utils` comes from {ROOT}: use the Python of "
                                f"{folder / '.venv'}, or `python -m pip install -e {shlex.quote(str(folder))}` first")
            return


def lesson_name(folder):
    """lesson_05 or lesson_05/sublesson_a: what checkpoints and weights say they belong to."""
    folder = Path(folder)
    return f"{folder.parent.name}/{folder.name}" if folder.name.startswith("sublesson") else folder.name


def numbered(folder):
    """The folders in `folder` that are called by a number, in its order."""
    found = [p for p in folder.iterdir() if p.name.isdecimal() and p.is_dir()] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name))


def short(path):
    """A path as a reader would type it."""
    for base in (Path.cwd(), ROOT):
        if Path(path).resolve().is_relative_to(base):
            return str(Path(path).resolve().relative_to(base))
    return str(path)


@contextlib.contextmanager
def lock(path, wait=True):
    """Hold an exclusive lock on the file `path` (made if absent). Yields False if `wait` is off and it is taken.

    The operating system lets go of it when the process ends, however it ends. On a disk that knows no locks it goes on
    without one and says so.
    """
    from filelock import FileLock, Timeout

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = FileLock(path, timeout=-1 if wait else 0, thread_local=False)
    try:
        mine.acquire()
    except Timeout:
        yield False
        return
    except (NotImplementedError, OSError) as error:    # filelock's word for ENOSYS is NotImplementedError
        if isinstance(error, OSError) and error.errno not in CANNOT:
            raise
        warn_once(f"the disk of {path.parent} knows no locks: do not start the same run twice")
        yield True
        return
    try:
        yield True
    finally:
        mine.release()
