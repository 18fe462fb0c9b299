"""The format of a benchmark's `results.json`: what `bench/run.py` measures and `report.py` and `compare.py` read.

Rates are images per second, times seconds, accuracies shares 0..1, memory bytes. Every figure that varies is kept as the list
of its repetitions; medians, means and intervals are made when it is shown. A cell is one training (arch, seed, levers) and is
also a file of its own, `cells/KEY.json`, so that a restart repeats none.
"""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from fastcifar import files
from fastcifar.errors import InputError

VERSION = 1  # of the format; raise it when a field changes its meaning
REMEDY = "run the benchmark again"


@dataclass(frozen=True)
class Epoch:
    """One epoch of a cell."""

    train_seconds: float
    eval_seconds: float
    train_loss: float
    train_top1: float  # on augmented images
    test_loss: float
    test_top1: float


@dataclass(frozen=True)
class Cell:
    """One training of one architecture with one seed, or why there is none."""

    key: str  # ARCH-seedN-LEVERS: unique in its results
    arch: str
    seed: int
    levers: list[str]  # those that were on; the names of bench/levers.py
    epochs: list[Epoch] = field(default_factory=list)
    batch_size: int = 0
    images_per_epoch: int = 0  # trained on
    test_images: int = 0
    final_top1: float = 0.0
    final_flip_top1: float = 0.0  # with the mirror image
    best_top1: float = 0.0  # over the epochs, on the test set: optimistic
    first_step_seconds: float = 0.0  # from the cell's start to its first step's end, compiling included
    compile_seconds: float = 0.0  # first step minus the median later step
    peak_memory: int | None = None  # bytes of the device; resident set of the process on a CPU
    energy_joules: float | None = None  # of the training epochs, where NVML counts it
    error: str | None = None  # the one line a crashed cell left


@dataclass(frozen=True)
class Variant:
    """What an architecture costs and what its report claimed."""

    arch: str
    report: str  # A to E, "-" for the field's baseline
    parameters: int
    flops_per_image: int  # forward and backward, 2 per multiply-add
    bytes_per_image: int  # forward and backward, fewest bytes of activations (bench/roofline.py)
    claim: str
    roofline_images_per_second: float | None = None  # the device's ceiling for it: measured rates, additive


@dataclass(frozen=True)
class Rung:
    """One step of the ladder: a lever added to all those before it, timed in turns with the other rungs."""

    name: str
    images_per_second: list[float] = field(default_factory=list)  # one a round, the same rounds for all rungs
    note: str = ""
    error: str | None = None


@dataclass(frozen=True)
class Ladder:
    """The levers one after the other."""

    arch: str
    batch_size: int
    rungs: list[Rung]


@dataclass(frozen=True)
class Peer:
    """Another way to train the same model on the same data, timed in turns with ours (the first entry)."""

    name: str
    images_per_second: list[float] = field(default_factory=list)
    note: str = ""
    error: str | None = None
    apart: bool = False  # timed in a process of its own: its rates are no rounds of ours


@dataclass(frozen=True)
class Peers:
    """Whole training loops side by side."""

    arch: str
    batch_size: int
    entries: list[Peer]


@dataclass(frozen=True)
class Arm:
    """One configuration of an ablation: accuracies in the order of the ablation's seeds, None where a run failed."""

    name: str
    overrides: dict[str, Any]
    top1: list[float | None]
    claim: str = ""  # what the report gives for it


@dataclass(frozen=True)
class Ablation:
    """Configurations of one architecture over the same seeds; the first arm is the full recipe all others are compared with."""

    name: str
    arch: str
    epochs: int
    images_per_epoch: int
    seeds: list[int]
    arms: list[Arm]


@dataclass(frozen=True)
class Results:
    """A whole `results.json`."""

    environment: dict[str, Any]  # hardware, versions, commit, command, clocks, load
    data: dict[str, Any]  # name, official, synthetic, sha256 of both files
    settings: dict[str, Any]  # the options of the command
    variants: list[Variant] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    ladder: Ladder | None = None
    peers: Peers | None = None
    ablations: list[Ablation] = field(default_factory=list)
    schema: int = VERSION


Row = TypeVar("Row")


def write_results(path: Path, results: Results) -> None:
    """Write `results.json` atomically."""
    files.write_json(path, asdict(results))


def read_results(path: Path) -> Results:
    """Read `results.json`. Raises InputError when it is missing, broken, or of another version."""
    values = files.read_json(path, remedy=REMEDY)
    if not isinstance(values, dict) or values.get("schema") != VERSION:
        found = values.get("schema") if isinstance(values, dict) else None
        raise InputError(f"{path} is not results of schema {VERSION} (found {found}): {REMEDY}")
    return from_json(Results, values, str(path))


def write_cell(folder: Path, cell: Cell) -> None:
    """Write a finished cell into `folder`/cells."""
    files.write_json(folder / "cells" / f"{cell.key}.json", asdict(cell))


def read_cell(path: Path) -> Cell:
    """Read a cell. Raises InputError when it is broken."""
    return from_json(Cell, files.read_json(path, remedy="delete it to run the cell again"), str(path))


def from_json(kind: type[Row], values: Any, where: str) -> Row:
    """Rebuild a dataclass, nested ones included, checking names and types. Raises InputError naming the field."""
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected an object, found {type(values).__name__}: {REMEDY}")
    hints = get_type_hints(kind)
    unknown = values.keys() - hints.keys()
    if unknown:
        raise InputError(f"{where}: unknown field {sorted(unknown)[0]!r}: {REMEDY}")
    parsed = {name: _value(hints[name], entry, f"{where}: {name}") for name, entry in values.items()}
    try:
        return kind(**parsed)
    except TypeError:
        needed = sorted({entry.name for entry in fields(kind)} - values.keys())  # type: ignore[arg-type]
        raise InputError(f"{where}: a field is missing (one of {', '.join(needed)}): {REMEDY}") from None


def _value(hint: Any, value: Any, where: str) -> Any:
    options = get_args(hint)
    if get_origin(hint) is list:
        if not isinstance(value, list):
            raise InputError(f"{where}: expected a list, found {type(value).__name__}: {REMEDY}")
        return [_value(options[0], entry, where) for entry in value]
    if type(None) in options:
        return None if value is None else _value(next(option for option in options if option is not type(None)), value, where)
    if hasattr(hint, "__dataclass_fields__"):
        return from_json(hint, value, where)
    kind = get_origin(hint) or hint
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is not Any and (not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool)):
        raise InputError(f"{where}: expected {kind.__name__}, found {type(value).__name__}: {REMEDY}")
    return value
