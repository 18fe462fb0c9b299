"""Writes files whole or not at all, and reads JSON with errors that name the file and the remedy."""

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastcifar.errors import InputError, shortened

PARTIAL = ".partial"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path` to write to; rename it to `path` when the block ends, remove it when that fails.

    Its name is its writer's own, so two processes never share one. A killed process leaves a `.partial` file, which the next
    writer of `path` removes.
    """
    partial, file = None, -1
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial, file = _create(path)
        yield partial
        with open(partial, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)  # the new name is on the disk too
    except OSError as error:
        error.filename = str(path)  # the user knows the final name, not the temporary one
        raise
    finally:
        if partial is not None:
            with suppress(OSError):  # its own error would hide the one that matters, and name the temporary file
                partial.unlink()
            os.close(file)


def _create(path: Path) -> tuple[Path, int]:
    """A new temporary file beside `path`, locked as long as its descriptor is open: it dies with its owner."""
    remove_partials(path)
    while True:
        file, name = tempfile.mkstemp(prefix=f"{path.name}.", suffix=PARTIAL, dir=path.parent)  # never follows a link
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file).st_nlink:  # else another writer took it for a dead one's in between
            umask = os.umask(0)
            os.umask(umask)
            os.fchmod(file, 0o666 & ~umask)  # as open() would have made it; mkstemp is stricter
            return Path(name), file
        os.close(file)


def remove_partials(path: Path) -> None:
    """Remove what killed writers of `path` left."""
    for partial in path.parent.iterdir():
        if partial.name.startswith(f"{path.name}.") and partial.name.endswith(PARTIAL) and not partial.is_symlink():
            with suppress(OSError), partial.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while its writer lives
                partial.unlink()


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems cannot
            os.fsync(file)
    finally:
        os.close(file)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically. Raises OSError (full disk, permissions) with nothing changed."""
    with atomic_path(path) as partial:
        partial.write_bytes(content)


def link(source: Path, path: Path) -> bool:
    """Make `path` a second name of the file `source`, atomically; False, and nothing changed, where that is not possible."""
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        remove_partials(path)
        os.link(source, partial)
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError:  # a file system without links: the caller writes the file again
        return False
    finally:
        with suppress(OSError):
            partial.unlink()
    return True


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN and infinity are refused, since JSON has none."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path, remedy: str) -> Any:
    """Read a JSON file. Raises InputError naming the file and `remedy` when it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: {remedy}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, endless numbers or nesting
        raise InputError(f"{path} is not valid JSON ({shortened(error)}): {remedy}") from None
