"""Files that are either whole or not there: written aside, flushed to the disk, renamed."""

import contextlib
import errno
import functools
import json
import os
import sys
import threading
from pathlib import Path

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
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{threading.get_ident()}{path.suffix}")
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
        _warn_once(f"the disk of {folder} cannot flush a folder ({error.strerror}): files are written whole, but the "
                   "last ones may be lost if the power fails")
    finally:
        os.close(number)


@functools.cache
def _warn_once(text):
    print(f"warning: {text}", file=sys.stderr, flush=True)


def write_json(path, value):
    """Write `value` as indented JSON, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


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
        _warn_once(f"the disk of {path.parent} knows no locks: do not start the same run twice")
        yield True
        return
    try:
        yield True
    finally:
        mine.release()
