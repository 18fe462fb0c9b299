"""Writes files whole or not at all, and reads JSON with errors that name the file and the remedy."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastcifar.errors import InputError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield `<path>.partial` to write to; rename it to `path` when the block ends, remove it when the block fails.

    What a killed process leaves is the one `.partial` file, which the next attempt overwrites.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        error.filename = str(path)  # the user knows the final name, not the temporary one
        raise
    finally:
        with suppress(OSError):  # its own error would hide the one that matters, and name the temporary file
            partial.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically. Raises OSError (full disk, permissions) with nothing changed."""
    with atomic_path(path) as partial:
        partial.write_bytes(content)


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
        raise InputError(f"{path} is not valid JSON ({error}): {remedy}") from None
