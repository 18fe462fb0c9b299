"""Commands in child processes that have this one's imports, so that hundreds of them take minutes."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from fastcifar.errors import run_command


def start(command: Callable[[], None], arguments: list[str], output: Path | None = None) -> int:
    """Run a command's `main` in a child process; returns its number. Both its outputs go to the file `output`, or nowhere."""
    child = os.fork()
    if child:
        return child
    sys.argv = ["command", *arguments]
    file = os.open(output or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w") for stream in (1, 2))  # pytest has put its own there
    code = 1
    try:
        run_command(command)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
