"""Users' mistakes: one line on stderr that says what is wrong, where and what to do, and exit code 2."""

import errno
import os
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches


class InputError(Exception):
    """Something the user can fix. The message is one line: what is wrong, where, what to do.

    Not a ValueError: the parser of the command line would catch one raised by a field's check and frame it its own way.
    """


# What the operating system may refuse through no fault of the program, and what the user can do about it.
REMEDIES = {
    errno.ENOSPC: "free some space or choose another folder, then run the same command again",
    errno.EDQUOT: "your quota is used up: free some space or choose another folder",
    errno.EFBIG: "the file size limit is reached: raise it (ulimit -f) or choose another folder",
    errno.EACCES: "check the permissions, or choose another folder",
    errno.EPERM: "check the permissions, or choose another folder",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EIO: "the disk reports an error: check it, or choose another one",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file, not a folder: check the path",
    errno.EISDIR: "a folder stands where a file is expected: check the path",
}


def require(settings: object, condition: bool, field: str, allowed: str) -> None:
    """Raise InputError naming `field`, its value in `settings` and what is allowed, unless `condition` holds."""
    if not condition:
        raise InputError(f"{field} must be {allowed}, got {getattr(settings, field)}")


def unknown(kind: str, given: str, known: Iterable[str]) -> InputError:
    """The error for a name that is in no table: it suggests the nearest one and lists the rest."""
    known = sorted(known)
    nearest = get_close_matches(given, known, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    return InputError(f"unknown {kind} {given!r}: {hint}known are {', '.join(known)}")


def shortened(value: object, limit: int = 80) -> str:
    """Text of at most about `limit` characters, for messages that quote what a file says."""
    if isinstance(value, int) and value.bit_length() > 64:  # Python refuses to write thousands of digits
        return f"a number of {value.bit_length()} bits"
    text = str(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def run_command(main: Callable[[], None]) -> None:
    """Run a command line's `main`; turn what the user can fix into one line and exit code 2, Ctrl-C into exit code 130.

    FASTCIFAR_TRACEBACK=1 in the environment shows the traceback instead, for those who work on the code.
    """
    try:
        main()
    except (InputError, OSError, KeyboardInterrupt) as error:
        if os.environ.get("FASTCIFAR_TRACEBACK") == "1":
            raise
        if isinstance(error, KeyboardInterrupt):
            print("\ninterrupted", *error.args, sep=": ", file=sys.stderr)
            sys.exit(130)
        if isinstance(error, BrokenPipeError):  # the reader of our output went away, as `| head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in REMEDIES:
        text = f"{error.filename or 'writing'}: {error.strerror}; {REMEDIES[error.errno]}"
    else:
        text = " ".join(str(error).split())
    # A strange file's own words may stand in it: control characters would steer the terminal.
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
