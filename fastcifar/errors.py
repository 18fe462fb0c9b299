"""Users' mistakes: one line on stderr that says what is wrong, where and what to do, and exit code 2."""

import errno
import gc
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches


class InputError(Exception):
    """Something the user can fix. The message is one line: what is wrong, where, what to do.

    Not a ValueError: the parser of the command line would catch one raised by a field's check and frame it its own way.
    """


# What the operating system may refuse through no fault of the program, and what the user can do about it.
REMEDIES = {
    errno.ENOSPC: "free some space, or choose another folder",
    errno.EDQUOT: "your quota is used up: free some space or choose another folder",
    errno.EFBIG: "the file size limit is reached: raise it (ulimit -f) or choose another folder",
    errno.EACCES: "check the permissions, or choose another folder",
    errno.EPERM: "check the permissions, or choose another folder",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EIO: "the disk reports an error: check it, or choose another one",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file, not a folder: check the path",
    errno.EISDIR: "a folder stands where a file is expected: check the path",
    errno.EEXIST: "a file stands where a folder is expected: check the path",
    errno.ENAMETOOLONG: "shorten the name",
    errno.ELOOP: "symbolic links lead in a circle: check the path",
    errno.ENOMEM: "the memory is used up: close other programs, or lower --batch-size",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n)",
}
LONGEST = 800  # characters of a message
OUT_OF_MEMORY = "the memory is used up: lower --batch-size or --eval-batch-size, use --stream, or close other programs"


class Stopped(KeyboardInterrupt):
    """A signal ended the command in good order. The message says how to go on."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


def require(settings: object, condition: bool, field: str, allowed: str) -> None:
    """Raise InputError naming `field`, its value in `settings` and what is allowed, unless `condition` holds."""
    if not condition:
        raise InputError(f"{field} must be {allowed}, got {getattr(settings, field)}")


def require_installed(what: str, libraries: Iterable[str], extra: str) -> None:
    """Raise InputError naming those of `libraries` that are not installed, and the extra of this package that has them."""
    # A folder of a library's name is a package without a loader.
    missing = [name for name in libraries if getattr(importlib.util.find_spec(name), "loader", None) is None]
    if missing:
        remedy = f"uv sync --extra {extra}, or pip install 'fastcifar[{extra}]'"
        raise InputError(f"{what} needs {', '.join(missing)}, not installed: {remedy}")


def unknown(kind: str, given: str, known: Iterable[str]) -> InputError:
    """The error for a name that is in no table: it suggests the nearest one and lists the rest."""
    known = sorted(known)
    nearest = get_close_matches(given, known, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    return InputError(f"unknown {kind} {shortened(repr(given))}: {hint}known are {', '.join(known)}")


def shortened(value: object, limit: int = 80) -> str:
    """Text of at most about `limit` characters, for messages that quote what a file says."""
    if isinstance(value, int) and value.bit_length() > 64:  # Python refuses to write thousands of digits
        return f"a number of {value.bit_length()} bits"
    text = str(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def run_command(main: Callable[[], None]) -> None:
    """Run a command line's `main`; turn what the user can fix into one line and exit code 2, a signal into 128 + its number.

    FASTCIFAR_TRACEBACK=1 in the environment shows the traceback instead, for those who work on the code.
    """
    if signal.getsignal(signal.SIGINT) is interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a name that is not UTF-8 must not end the command
    try:
        main()
        sys.stdout.flush()
    except (InputError, OSError, KeyboardInterrupt, MemoryError, RuntimeError, SystemExit) as error:
        if os.environ.get("FASTCIFAR_TRACEBACK") == "1" and not isinstance(error, SystemExit):
            raise
        if is_broken_pipe(error):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        if isinstance(error, SystemExit) or (isinstance(error, RuntimeError) and not is_out_of_memory(error)):
            raise
        if isinstance(error, KeyboardInterrupt):
            print("\ninterrupted", *error.args, sep=": ", file=sys.stderr)
            sys.exit(128 + getattr(error, "number", signal.SIGINT))
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)


def importing() -> None:
    """Prepare the seconds in which a command imports its libraries; `run_command` undoes this."""
    signal.signal(signal.SIGINT, interrupted)
    gc.disable()  # what is imported stays: looking for garbage in it takes a sixth of the time


def interrupted(number: int, frame: object) -> None:
    """Ctrl-C while a command still imports its libraries, whose own handling of it cannot be trusted."""
    os.write(2, b"\ninterrupted\n")
    os._exit(128 + number)


def is_broken_pipe(error: BaseException) -> bool:
    """Whether the reader of our output went away, as `| head` does; rich makes SystemExit(1) of that."""
    made = isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError)
    return made or isinstance(error, BrokenPipeError)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, PyTorch or CUDA ran out of memory."""
    words = ("can't allocate memory", "out of memory", "bad_alloc", "Cannot allocate memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))


def _one_line(error: BaseException) -> str:
    if is_out_of_memory(error):
        text = OUT_OF_MEMORY
    elif isinstance(error, OSError) and error.errno in REMEDIES:
        text = f"{error.filename or 'writing'}: {error.strerror}; {REMEDIES[error.errno]}"
    else:
        text = " ".join(str(error).split())
    if len(text) > LONGEST:  # an endless path: what is wrong stands at its end
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    # A strange file's own words may stand in it: control characters would steer the terminal.
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
