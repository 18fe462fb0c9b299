"""Reads a command line into a dataclass by tyro; whatever is wrong with it is one line that names the option and the remedy."""

import contextlib
import io
import math
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from fastcifar.errors import InputError, shortened

Options = TypeVar("Options")

LARGEST = 1 << 63  # of a whole number: what tensors and seeds hold
WIDE = "100000"  # columns: tyro must not wrap what becomes one line

# What tyro (and int() below it) says, and what a user is told.
PLAINER = (
    (r"Error parsing (--\S+): invalid literal for int\(\) with base 10: (.*)", r"\1 \2 is not a whole number"),
    (r"Error parsing (--\S+): could not convert string to float: (.*)", r"\1 \2 is not a number"),
    (r"Error parsing (--\S+): no type matching (.*) could be instantiated from \[(.*?)\]\..*", r"\1 \3 is not of the form \2"),
    (r"Error parsing (--\S+): Could not find valid parse for arguments: \[(.*)\]", r"\1 \2 is not of its form"),
    (r"Error parsing (--\S+): Exceeds the limit \(\d+ digits\).*", r"\1 has too many digits"),
    (r"Missing value for argument '([^']*)'\. Expected (\d+) values?\.", r"\1 needs \2 value(s)"),
    (r"invalid choice (.*) for argument '([^']*)'\. Expected one of \((.*)\)\.", r"\2 \1 is none of its choices: \3"),
    (r"Unrecognized options?: (-.*?)(, .*)?$", r"unknown option \1"),
    (r"Unrecognized options?: (.*?)(, .*)?$", r"'\1' belongs to no option"),
    (r"Error parsing (--\S+): (.*)", r"\1: \2"),
)


def parse_arguments(
    kind: type[Options], program: str, arguments: Sequence[str] | None = None, *, default: Any = None, repeatable: str = ""
) -> Options:
    """Return `kind` filled from `arguments` (default: this process's); `--help` prints and exits as usual.

    default: an instance to start from. repeatable: the option that may be given more than once. Raises InputError for options
    that are unknown, repeated, empty, out of range or not of their type.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    _require_plain(given, repeatable)
    extra: dict[str, Any] = {"default": default} if default is not None else {}
    if {"-h", "--help"} & set(given):
        return tyro.cli(kind, prog=program, args=given, **extra)
    complaint, columns = io.StringIO(), os.environ.get("COLUMNS")
    try:
        os.environ["COLUMNS"] = WIDE
        with contextlib.redirect_stderr(complaint):
            options = tyro.cli(kind, prog=program, args=given, **extra)
    except SystemExit as end:
        if not end.code:  # a shell's completion was asked for
            raise
        raise InputError(f"{_one_line(complaint.getvalue())}; {program} --help lists all options") from None
    finally:
        if columns is None:
            os.environ.pop("COLUMNS", None)
        else:
            os.environ["COLUMNS"] = columns
    require_typed(options)
    return options


def split_flags(text: str) -> list[str]:
    """The words of flags given as one text, as a shell splits them. Raises InputError where a quotation is not closed."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise InputError(f"flags {text!r}: {str(error).lower()}: close the quotation") from None


def _require_plain(arguments: list[str], repeatable: str) -> None:
    """Refuse what tyro would take without a word: an option given twice, an empty value, a name that is not UTF-8."""
    seen: set[str] = set()
    for argument in arguments:
        name, _, value = argument.partition("=")
        if any("\ud800" <= character <= "\udfff" for character in argument):
            raise InputError(f"{argument!a} is not UTF-8: rename it")
        if not argument or (name.startswith("--") and argument.endswith("=") and not value):
            raise InputError(f"the value after {name or _before_empty(arguments)} is empty: give one, or leave the option out")
        if not name.startswith("--"):
            continue
        option = name.replace("_", "-").replace("--no-", "--", 1)
        if option in seen and option != repeatable:
            raise InputError(f"{option} is given more than once: keep one of them")
        seen.add(option)


def _before_empty(arguments: list[str]) -> str:
    place = arguments.index("")
    return arguments[place - 1] if place else "the command's name"


def _one_line(box: str) -> str:
    """The message in tyro's frame, with what it thinks was meant."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    rows = [row.strip("│╭╮╰╯ ").strip() for row in text.splitlines() if not row.startswith(("╭", "╰"))]
    rules = [number for number, row in enumerate(rows) if row and not row.strip("─-")]
    if "╭" not in text and rules[:1] == [1]:  # where the output is ASCII, a title and a rule stand in place of the frame
        rows, rules = rows[2:], [number - 2 for number in rules[1:]]
    message = " ".join(" ".join(rows[: rules[0] if rules else None]).split())
    if message.startswith("Missing from"):
        return f"needed: {' '.join(name for name in message.split() if name.startswith('--'))}"
    for pattern, plain in PLAINER:
        message, found = re.subn(pattern, plain, message, count=1)
        if found:
            break
    meant = [row.split()[0].rstrip(",") for row in rows if row.startswith("--")]
    if "Perhaps you meant:" in rows and meant:
        message += f": did you mean {meant[0]}?"
    return shortened(message, 400)


def require_typed(options: Any) -> None:
    """Raise InputError for a dataclass' field that is not of its type, infinite, or endless; nested ones included."""
    hints = get_type_hints(type(options))
    for entry in fields(options):
        value = getattr(options, entry.name)
        if not _matches(value, hints[entry.name]):
            raise InputError(f"{entry.name} must be {_name(hints[entry.name])}, got {shortened(repr(value))}")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise InputError(f"{entry.name} must be a finite number, got {number}")
            if isinstance(number, int) and abs(number) >= LARGEST:
                raise InputError(f"{entry.name} must be below 2^63, got {shortened(number)}")
        if is_dataclass(value):
            require_typed(value)


def _matches(value: Any, hint: Any) -> bool:
    """Whether a value is of a type as our dataclasses declare them."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if kind in (Union, UnionType):
        return any(_matches(value, part) for part in parts)
    if kind is tuple and isinstance(value, tuple):
        wanted = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        return len(value) == len(wanted) and all(map(_matches, value, wanted))
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, kind or hint)


def _name(hint: Any) -> str:
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path", type(None): "null"}
    parts = get_args(hint)
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if get_origin(hint) is tuple:
        if get_origin(parts[0]) is Literal:
            return f"a list of {', '.join(map(str, get_args(parts[0])))}"
        kind = "numbers" if {int, float} & set(parts) else "names"
        return f"a list of {kind}" if parts[-1] is Ellipsis else f"{len(parts)} {kind}"
    return " or ".join(map(_name, parts)) if parts else plain.get(hint, str(hint))
