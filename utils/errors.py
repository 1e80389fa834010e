"""Mistakes a reader can make end in one line that says what to do, and exit code 2."""

import contextlib
import errno
import os
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
    """Run a script's `main()`. A `UserError` becomes one line and exit code 2, Ctrl-C exit code 130, a closed pipe 141.

    So do a disk that cannot be used, and a ValueError that a lesson's model.py (or its earlier.py) raises, or that a
    layer raises while model.py builds its network: both are about a value of the configuration.
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
    except UserError as error:
        fail(error)
    except OSError as error:
        if (user_error := disk_error(error)) is None:
            raise
        fail(user_error)
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        if line := _foreign(error) or launch.lost():
            fail(line)
        if not isinstance(error, ValueError):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if Path(frame.filename).name in ("model.py", "earlier.py")]
        if not own or own[-1] is not frames[-1] and "__init__" not in [frame.name for frame in own]:
            raise
        fail(f"{error} ({Path(own[-1].filename).name}, line {own[-1].lineno}); change the value or leave it out")
    except KeyboardInterrupt as error:
        print(str(error) or "stopped", file=sys.stderr)
        launch.close(wait=10)
        sys.exit(130)
    finally:
        launch.close()


def _foreign(error):
    """The one line about a weights file from which a lesson cannot build its network; None for any other error.

    Another lesson, another version or another hand has made it: its sections lack a key, have one more, or hold a
    value that the constructor cannot take.
    """
    from .config import Section
    from .weights import Weights, misfit

    frames = [(frame, line, Path(frame.f_code.co_filename).name)
              for frame, line in traceback.walk_tb(error.__traceback__)]
    files = [item for frame, _, _ in frames for item in frame.f_locals.values()
             if isinstance(item, Weights) and not item.loaded]
    building = [f", {name}, line {line}" for frame, line, name in frames
                if name in ("model.py", "earlier.py") and frame.f_code.co_name == "__init__"]
    calling = frames[-1][2] in ("sample.py", "reproduce.py", "train.py") and isinstance(error, TypeError)
    absent = isinstance(error, AttributeError) and isinstance(error.obj, Section)
    if not files or not (building or calling or absent) or isinstance(error, AttributeError) and not absent:
        return None
    reason = (str(error).splitlines() or ["no more is known"])[0]
    return misfit(files[0].path, f"{type(error).__name__}: {reason}{''.join(building[-1:])}")


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
