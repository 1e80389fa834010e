"""Mistakes a reader can make end in one line that says what to do, and exit code 2."""

import contextlib
import errno
import os
import re
import stat
import sys
import traceback
from pathlib import Path

_FORBIDDEN = "it may not be written or read; change its permissions or choose another folder with runs=FOLDER"
_NO_FOLDER = "a file stands where a folder is needed; choose another folder with runs=FOLDER"
_FULL = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EFBIG: "the file would be larger than allowed (ulimit -f); raise that limit",
}
_DISK = _FULL | {
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.EROFS: "that disk is read-only; choose another folder with runs=FOLDER",
    errno.ENOTDIR: _NO_FOLDER,
    errno.EEXIST: _NO_FOLDER,
    errno.EISDIR: "it is a folder or a device, not a file; choose another name",
    errno.ENOENT: "there is no such file, and it cannot be made there; choose another place",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.EMFILE: "too many files are open; lower workers, or raise that limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine; lower workers, or close other programs",
    errno.ENOMEM: "out of memory; lower batch, batch_size, n or workers",
    errno.EIO: "the disk reports an error; choose another one with runs=FOLDER",
}


class UserError(Exception):
    """Something the reader can put right. The message says what is wrong and what to do, in one line."""


class Diverged(UserError):
    """A training ran away: a loss or weights that are not finite."""


def disk_error(error: OSError, full=False) -> UserError | None:
    """The one-line form of a full, read-only or forbidden disk or a wrong path; None for any other OSError.

    full: only where there is no more space.
    """
    if (reason := (_FULL if full else _DISK).get(error.errno)) is None:
        return None
    return UserError(f"cannot use {error.filename2 or error.filename or 'a file'}: {reason}")


def cli(main):
    """Run a script's `main()`. What a reader can put right becomes one line and exit code 2; debug=true shows the rest.

    That is a `UserError`, a disk that cannot be used, want of memory, a weights file or a config.yaml that does not fit
    the lesson, and a value that the lesson's own files refuse, or, if the reader gave it, that fails before the first
    training step. Ctrl-C is exit code 130, a closed pipe 141.
    """
    from . import launch

    launch.command(main.__globals__["__file__"])
    if hasattr(sys.stdout, "reconfigure"):             # a terminal that knows no umlauts gets a question mark
        sys.stdout.reconfigure(errors="replace")
    try:
        main()
        sys.stdout.flush()
        launch.close(wait=60)
    except BrokenPipeError:                            # as of `train.py | head -1`
        mute()
        sys.exit(141)
    except KeyboardInterrupt as error:
        print(str(error) or "stopped", file=sys.stderr)
        launch.close(wait=10)
        sys.exit(130)
    except Exception as error:
        if (line := explain(error)) is None:
            raise
        if {"--debug", "debug=true", "--debug=true"} & set(sys.argv):
            traceback.print_exc()
        fail(line)
    finally:
        launch.close()


def explain(error):
    """The one line, a text or an error, that tells a reader of an error; None where it is a defect of the code."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError):
        return disk_error(error)
    if type(error).__name__ == "SafetensorError":
        return f"a weights file cannot be read ({error}): choose another one, or train again"
    frames = [(frame, line, Path(frame.f_code.co_filename).name)
              for frame, line in traceback.walk_tb(error.__traceback__)]
    for kind in (_foreign, _partner, _memory, _config, _refused, _given):
        if line := kind(error, frames):
            return line
    return None


_OWN = ("model.py", "earlier.py", "train.py", "sample.py", "reproduce.py")           # a lesson's files
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|size calculation overflowed|"
                        r"can't start new thread|Overflow when unpacking|_ALLOC_FAILED", re.I)
_MISMADE = (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)


def _foreign(error, frames):
    """The line about a weights file from which a lesson cannot build its network.

    Another lesson, another version or another hand has made it: its sections lack a key, have one more, or hold a
    value that the constructor cannot take.
    """
    from .config import Section
    from .weights import Weights, misfit

    files = [item for frame, _, _ in frames for item in frame.f_locals.values()
             if isinstance(item, Weights) and not item.loaded]
    building = [f", {name}, line {line}" for frame, line, name in frames
                if name in ("model.py", "earlier.py") and frame.f_code.co_name == "__init__"]
    calling = frames[-1][2] in ("sample.py", "reproduce.py", "train.py") and isinstance(error, TypeError)
    absent = isinstance(error, AttributeError) and isinstance(error.obj, Section)
    if files and (absent or (building or calling) and isinstance(error, (MemoryError, *_MISMADE))):
        return misfit(files[0].path, f"{type(error).__name__}: {_first(error)}{''.join(building[-1:])}")


def _partner(error, frames):
    """The line about a training whose other process is gone."""
    from . import launch

    return launch.lost() if isinstance(error, _MISMADE) else None


def _memory(error, frames):
    """The line about memory that is not there. It names what is large."""
    if isinstance(error, MemoryError) or isinstance(error, _MISMADE) and _NO_MEMORY.search(str(error)):
        run, asked = _run(frames), re.search(r"allocate (\d+) bytes", str(error))
        sizes = [f"{key}={run.settings[key]}" for key in ("batch_size", "batch", "n", "workers")
                 if run and key in run.settings.keys()]
        given = [a for a in _typed(run) if re.search(r"=\W*\d", a) and not re.match(r"-*(\w+\.)?(steps|\w+_every)=", a)]
        lower = " or ".join(dict.fromkeys([*given, *sizes])) or "the batch or the number of images"
        return f"out of memory{f' ({int(asked[1]) / 2**30:.1f} GiB at once)' if asked else ''}: lower {lower}"


def _config(error, frames):
    """The line about a config.yaml that lacks a key or a section, or has one that the lesson's code does not take."""
    run, (_, line, name) = _run(frames), frames[-1]
    if run and isinstance(error, AttributeError) and any(
            error.obj is part for part in (run.config, *vars(run.config).values())):
        return f"config.yaml has no `{error.name}`, which {name} needs (line {line}): {_CONFIG}"
    if isinstance(error, TypeError) and name in _OWN and re.search(
            r"__init__\(\) (missing|got an unexpected keyword)", str(error)):
        return f"config.yaml does not fit ({error}; {name}, line {line}): {_CONFIG}"


_CONFIG = "put that right, or get the file back with `git checkout config.yaml`"


def _refused(error, frames):
    """The line about a value that a lesson's own file refuses, or a layer that its network is made of."""
    own = [(frame.f_code.co_name, line, name) for frame, line, name in frames if name in _OWN]
    building = any(function == "__init__" and name in ("model.py", "earlier.py") for function, _, name in own)
    if own and isinstance(error, ValueError) and (own[-1][1:] == frames[-1][1:] or building):
        return f"{_first(error)} ({own[-1][2]}, line {own[-1][1]}); change the value or leave it out"


def _given(error, frames):
    """The line about an error before the first training step, where the reader gave values that may be its reason."""
    run, own = _run(frames), [(line, name) for _, line, name in frames if name in _OWN]
    if isinstance(error, _MISMADE) and own and run and not run.step and (given := _typed(run)):
        return (f"{type(error).__name__}: {_first(error)} ({own[-1][1]}, line {own[-1][0]}): do the values fit that "
                f"were given ({', '.join(given)})? debug=true shows more")


def _first(error):
    return (str(error).splitlines() or ["no more is known"])[0]


def _run(frames):
    """The Run that the frames of a traceback know, or None."""
    from .run import Run

    values = [item for frame, _, _ in frames for item in frame.f_locals.values()]
    return next((one for item in values for one in (item, getattr(item, "run", None)) if isinstance(one, Run)), None)


def _typed(run):
    """The arguments of a run that say more than where and how it runs."""
    from .config import COMMON, QUICK, split

    return [a for a in (run.argv if run else ()) if split(a)[0].split(".")[-1] not in {*COMMON, *QUICK, "resume"}]


def mute(terminal=False):
    """From here on print into the void, not into a pipe that nobody reads or (terminal) a terminal that is gone."""
    with contextlib.suppress(OSError, ValueError):
        out = os.fstat(1)
        void = os.open(os.devnull, os.O_WRONLY)
        for number in (1, 2):
            kind = os.fstat(number)
            gone = stat.S_ISCHR(kind.st_mode) and not os.isatty(number)
            if gone if terminal else os.path.samestat(kind, out):
                os.dup2(void, number)
        os.close(void)


def fail(error):
    """Print an error as one line on stderr and end with exit code 2."""
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    sys.exit(2)
