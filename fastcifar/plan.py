"""How a training step runs (compiled, by which kernels, captured, in how many threads), and who chooses it.

`PLANS` has the built-in ones. What `fastcifar.tune` measured on this machine is kept in a file in the user's cache, and a run
takes it from there; docs/plans.md says when.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

import kernels
from fastcifar.arguments import require_typed
from fastcifar.beton import printable
from fastcifar.command import Command
from fastcifar.compiling import CompileMode
from fastcifar.device import choose_precision, hardware_name
from fastcifar.errors import InputError, shortened, unknown
from fastcifar.files import read_json, write_json
from fastcifar.models import suited_stride
from fastcifar.models.layers import Kernels
from fastcifar.models.summary import training_flops
from fastcifar.recipes import PLANNED, RunOptions, given, to_dict
from fastcifar.versions import installed
from kernels.augment.operations import CIFAR, Size

FORMAT = 1  # of plan files and of the cache
Record = dict[str, Any]  # of a chosen plan: name, chosen, device, plan; where measured, key and timings too
Say = Callable[[str], object]


@dataclass(frozen=True)
class Plan:
    """Values for the options of the same name that a run leaves open."""

    compile: bool = False
    compile_mode: CompileMode = "default"
    kernels: Kernels = "auto"
    capture: Literal["auto", "off"] = "auto"
    threads: int = 0  # 0: PyTorch's own number

    @classmethod
    def of(cls, run: RunOptions) -> "Plan":
        """The plan of a run that leaves nothing open."""
        return cls(**{name: getattr(run, name) for name in PLANNED})


# The first is the default; the rest as they are measured, those of the fewest bytes first (docs/step-cost.md). Adding one is
# adding a row.
PLANS: dict[str, dict[str, Plan]] = {
    "cuda": {
        "compiled": Plan(compile=True, kernels="torch"),
        "triton": Plan(compile=True, kernels="triton"),
        "fusable-tuned": Plan(compile=True, compile_mode="tuned", kernels="fusable"),
        "tuned": Plan(compile=True, compile_mode="tuned", kernels="torch"),
        "combo": Plan(compile=True, compile_mode="combo", kernels="torch"),
        "fusable": Plan(compile=True, kernels="fusable"),
        "triton-tuned": Plan(compile=True, compile_mode="tuned", kernels="triton"),
        "eager": Plan(kernels="torch"),
    },
    "cpu": {
        "eager": Plan(),
        "numba": Plan(kernels="numba"),
        "torch": Plan(kernels="torch"),
        "fusable": Plan(compile=True, kernels="fusable"),
        "compiled": Plan(compile=True),
    },
}

# Floating-point operations a second, more than training reaches, so that a run is not taken for longer than it is: two Zen 4
# cores train se_resnet18 at 145e9 each.
RATES = {"cpu": 200e9, "cuda": 200e12}
SHARE, LONGEST = 0.05, 60.0  # of a run's estimated seconds, and in seconds: what measuring may take
# Less time than this decides nothing, so nothing is begun: a CUDA plan alone compiles for half a minute.
SHORTEST = {"cpu": 5.0, "cuda": 45.0}
BUSY = 0.5  # load average from which the machine is looked at more closely


@dataclass(frozen=True)
class Choice:
    """A run that leaves nothing open, what config.json says of its plan, and the seconds in which to measure a better one."""

    run: RunOptions
    record: Record
    seconds: float = 0.0  # 0: it is decided


def settled(run: RunOptions, device: torch.device, plan: Plan | None = None) -> RunOptions:
    """The run with what it leaves open as `plan` says; without one, as the device's default does."""
    plan = plan or next(iter(PLANS[device.type].values()))
    if run.sync_bn:  # the compiler does not follow collectives
        plan = replace(plan, compile=False, compile_mode="default")
    return replace(run, **{**vars(plan), **given(run)})


def candidates(run: RunOptions, device: torch.device, threads: int = 0) -> dict[str, Plan]:
    """All plans that agree with what the run says itself, by name, its default first. threads: of each; 0: PyTorch's number."""
    asked = given(run)
    loose = {"threads": threads} | {name: asked[name] for name in ("capture", "threads") if name in asked}
    rows = {name: replace(plan, **loose) for name, plan in PLANS[device.type].items()}
    default = replace(next(iter(rows.values())), **asked)
    name = next((name for name, plan in rows.items() if plan == default), "as given")
    limits = [1 << power for power in range(10) if 1 << power < (threads or torch.get_num_threads())]
    fewer = {f"{name}, threads: {limit}": replace(default, threads=limit) for limit in limits}
    return {
        name: default,
        **(fewer if _leaves_threads_open(run, device) else {}),
        **{name: plan for name, plan in rows.items() if plan == replace(plan, **asked)},
    }


def choose(
    command: Command, images: int, device: torch.device, say: Say, *, size: Size = CIFAR, measures: bool = True
) -> Choice:
    """Choose how a new run's steps run, or take up what its folder has. Raises InputError.

    images: in an epoch. size: theirs, height and width. say: told in a line what the user could not expect. measures: whether
    auto may take what was or will be measured; else it is the default.
    """
    run = command.run
    if run.resume is not None:
        return Choice(settled(run, device), {})
    if run.threads > (os.cpu_count() or 1):
        raise InputError(f"threads must be 0..{os.cpu_count()} on this machine, got {run.threads}")
    if run.plan == "auto" and measures:
        return _automatic(command, images, size, device, say)
    record = _named(command, device)
    plan = Plan(**record["plan"])
    for name in ("compile", "compile_mode", "kernels"):  # which make a plan what it is
        value, its = given(run).get(name, getattr(plan, name)), getattr(plan, name)
        if run.plan not in ("auto", "default") and value != its:
            raise InputError(f"plan {run.plan} has {name} {its}, {value} was given: leave one of the two out")
    return decided(run, record, device)


def decided(run: RunOptions, record: Record, device: torch.device) -> Choice:
    """The run by the plan of a record; what the run says itself stands in the record too."""
    chosen = settled(run, device, Plan(**record["plan"]))
    return Choice(chosen, record | {"plan": asdict(Plan.of(chosen))})


def _named(command: Command, device: torch.device) -> Record:
    """The record of the plan that --plan names: a built-in one, or a file's."""
    wanted, known = command.run.plan, PLANS[device.type]
    name = next(iter(known)) if wanted in ("auto", "default") else wanted
    if name in known:
        return record_of(name, "given" if wanted == name else "default", known[name], device)
    path = Path(wanted)
    if path.suffix != ".json" and not path.exists():
        raise unknown(f"plan for {device.type}", wanted, ["auto", "default", *known])
    return read_plan(path, command.arch, device) | {"chosen": "file"}


def _automatic(command: Command, images: int, size: Size, device: torch.device, say: Say) -> Choice:
    """What was measured before, or the default, with the time to measure where that pays."""
    choice = default_choice(command, device, say, size)
    known = read_cached(choice.record["key"], say)
    if known is not None:
        say(f"plan {known['name']}, measured before ({cache_path()})")
        return decided(command.run, known | {"chosen": "cached"}, device)
    seconds = command.run.plan_seconds
    if seconds is None:
        seconds = min(LONGEST, SHARE * least_seconds(command, images, device, size))
        seconds = seconds if seconds >= SHORTEST[device.type] else 0.0
    return replace(choice, seconds=seconds)


def default_choice(command: Command, device: torch.device, say: Say, size: Size = CIFAR) -> Choice:
    """The default plan, on a CPU in as many threads as find an idle core, with the key of what may be measured."""
    run = command.run
    threads = spare_threads(say) if _leaves_threads_open(run, device) else 0
    name, plan = next(iter(candidates(run, device, threads).items()))
    return decided(run, record_of(name, "default", plan, device) | {"key": key_of(command, device, threads, size)}, device)


def record_of(name: str, chosen: str, plan: Plan, device: torch.device) -> Record:
    """What is written of a plan."""
    return {"format": FORMAT, "name": name, "chosen": chosen, "device": hardware_name(device), "plan": asdict(plan)}


def least_seconds(command: Command, images: int, device: torch.device, size: Size = CIFAR) -> float:
    """What a run takes at least, by the arithmetic of its network; nothing is timed. images: in an epoch, each of `size`."""
    epochs = command.run.stop_after or command.settings.epochs
    return (
        training_flops(command.arch, size, suited_stride(size, command.settings.stem_stride))
        * images
        * epochs
        / (RATES[device.type] * (torch.get_num_threads() if device.type == "cpu" else 1))
    )


def _leaves_threads_open(run: RunOptions, device: torch.device) -> bool:
    """Whether a plan may choose the number of threads."""
    return device.type == "cpu" and not run.threads and "OMP_NUM_THREADS" not in os.environ


def spare_threads(say: Say) -> int:
    """How many threads find an idle core; 0 where that is no limit."""
    threads, spare = torch.get_num_threads(), spare_cores()
    if spare >= threads:
        return 0
    say(f"threads limited to {spare} of {threads}: other programs use the rest (--threads N or --plan default overrides)")
    return spare


def spare_cores() -> int:
    """Cores on which nothing else runs now, at least one; all where the load average says that the machine is idle."""
    cores = os.cpu_count() or 1
    if os.getloadavg()[0] < BUSY:
        return cores
    # The load average also remembers what has ended since.
    return max(1, round(cores * (1 - psutil.cpu_percent(interval=0.1) / 100)))


# What was measured is kept.


def cache_path() -> Path:
    """Where measured plans are kept."""
    home = os.path.expanduser("~/.cache")
    if home.startswith("~"):  # a user without a home, for whom nothing can be kept
        home = os.devnull
    return Path(os.environ.get("XDG_CACHE_HOME") or home) / "fastcifar" / "plans.json"


def key_of(command: Command, device: torch.device, threads: int = 0, size: Size = CIFAR) -> Record:
    """All that a measurement holds for. threads: to which they are limited, 0 = not. size: of the images."""
    recipe, run = command.settings, command.run
    stem_stride = suited_stride(size, recipe.stem_stride)
    # CIFAR's are not written, as in manifests, so that what was kept before there were others is found.
    other = {} if (size, stem_stride) == (CIFAR, 1) else {"size": list(size), "stem_stride": stem_stride}
    return {
        "device": hardware_name(device),
        "driver": _driver() if device.type == "cuda" else None,
        "threads": threads or run.threads or torch.get_num_threads(),
        "threads_open": _leaves_threads_open(run, device),
        **installed("torch", "triton"),
        "kernels": _kernels_hash(),
        "arch": command.arch,
        "batch_size": recipe.batch_size,
        "precision": str(choose_precision(run.precision, device) or torch.float32).removeprefix("torch."),
        "recipe": _switches(to_dict(recipe)),
        "options": {name: getattr(run, name) for name in ("deterministic", "stream", "skip_nonfinite")},
        "given": given(run),
        **other,
    }


def _switches(values: dict[str, Any]) -> dict[str, Any]:
    """What a recipe turns on, and its words: both change a step's operations, amounts do not."""
    parts = {name: _switches(value) if isinstance(value, dict) else value for name, value in values.items()}
    return {name: bool(value) if isinstance(value, int | float | list | tuple) else value for name, value in parts.items()}


@cache
def _kernels_hash() -> str:
    """Of the kernels' source."""
    folder = Path(kernels.__file__).parent
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.rglob("*.py")))).hexdigest()[:16]


def _driver() -> str | None:
    try:
        import pynvml  # here: only a GPU has a use for it

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # no NVML: the versions of torch and Triton remain
        return None


def _digest(key: Record) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def read_cached(key: Record, say: Say) -> Record | None:
    """The record kept for `key`; None without one. A file that is not ours, or damaged, is ignored with a line."""
    record = _read_cache(say).get(_digest(key))
    try:
        return None if record is None or record["key"] != key else _checked(record)
    except (KeyError, TypeError, InputError) as error:
        say(f"{cache_path()} is ignored: damaged ({shortened(error, 100)})")
        return None


def _read_cache(say: Say) -> dict[str, Any]:
    path = cache_path()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] == FORMAT and isinstance(values["plans"], dict):
            return values["plans"]
        why = f"format {shortened(repr(values['format']))}, not {FORMAT}"
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        why = shortened(error, 100)
    say(f"{path} is ignored: {why}")
    return {}


def keep(record: Record, say: Say) -> None:
    """Add a measured record to the cache; where that cannot be written, a line says so."""
    try:
        with _alone(cache_path().parent):
            plans = _read_cache(say) | {_digest(record["key"]): record}
            write_json(cache_path(), {"format": FORMAT, "plans": plans})
    except OSError as error:
        say(f"the measured plan is not kept: {cache_path()}: {error.strerror or error}")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a folder, waiting for whoever has it: what is read in this block is still so when it is written."""
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def read_plan(path: Path, arch: str, device: torch.device) -> Record:
    """The plan in a file: a record, records by architecture, or a run's config.json. Raises InputError."""
    remedy = "--plan takes a file that fastcifar.tune wrote, or the config.json of a run"
    values = read_json(path, remedy)
    try:
        record = values.get("plans", {}).get(arch) if "plans" in values else values["plan"] if "run" in values else values
        if record is None:
            raise InputError(f"no plan for {arch}: {remedy}")
        _checked(record)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} holds no plan ({type(error).__name__}: {shortened(error, 100)}): {remedy}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if record["device"] != hardware_name(device):
        raise InputError(f"{path} was chosen on {record['device']}, this is {hardware_name(device)}: leave --plan out")
    return record


def _checked(record: Record) -> Record:
    """A record as `record_of` makes it. Raises InputError, KeyError or TypeError for anything else."""
    if record["format"] != FORMAT:
        raise InputError(f"a plan of format {shortened(repr(record['format']))}, this version reads {FORMAT}: measure again")
    plan = Plan(**record["plan"])
    require_typed(plan)
    replace(RunOptions(), **asdict(plan))  # which checks their values
    if not all(isinstance(text := record[name], str) and text == printable(text) for name in ("name", "chosen", "device")):
        raise TypeError("name, chosen and device must be short text")
    return record
