"""Gives every command hundreds of wrong command lines: each must end in one line, exit code 2, and nothing left behind.

python -m tests.reliability.mistakes --count 500 --seed 0 --out mistakes.json
"""

import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

os.environ.setdefault("OMP_NUM_THREADS", "1")

from bench import ablate, compare, input_pipelines, kernel_latency, report, reports, roofline, run
from bench.results import write_results
from data_prep import write_beton
from fastcifar import demo, evaluate, export, plots, predict, train, tune
from fastcifar.arguments import parse_arguments
from fastcifar.augmentation import __main__ as contact_sheet
from fastcifar.command import Command
from fastcifar.models import __main__ as models
from tests.bench_results import make_results
from tests.conftest import write_cifar_pickles
from tests.reliability.processes import start

LIMIT = 30.0  # seconds a refusal may take on a busy machine


@dataclass(frozen=True)
class Options:
    """Try mistakes on every command."""

    count: int = 500  # command lines
    seed: int = 0  # of the mistakes
    out: Path | None = None  # JSON with the figures


@dataclass(frozen=True)
class Target:
    """A command, its options, and a command line of it that is right but for what is added; {x} are paths."""

    main: Callable[[], None]
    options: type
    line: str


TARGETS = {
    "train": Target(train.main, Command, "--data {betons} --out {new} --epochs 1 --no-plots"),
    "resume": Target(train.main, Command, "--resume {run}"),
    "tune": Target(tune.main, tune.Options, "--archs se_resnet18 --data {betons} --seconds 0.001 --out {new}"),
    "evaluate": Target(evaluate.main, evaluate.Options, "--checkpoint {checkpoint} --data {betons}"),
    "export": Target(
        export.main, export.Options, "--checkpoint {checkpoint} --data {betons} --to torchscript --out {new} --limit-test 5"
    ),
    "predict": Target(predict.main, predict.Options, "--checkpoint {checkpoint} --input {betons}/test.beton --out {new}"),
    "plots": Target(plots.main, plots.Options, "--out {new} {run}"),
    "demo": Target(demo.main, demo.Options, "--data {betons} --out {new}"),
    "models": Target(models.main, models.Options, ""),
    "augmentation": Target(contact_sheet.main, contact_sheet.Options, "--data {betons} --out {new}"),
    "write_beton": Target(write_beton.main, write_beton.Options, "--source {pickles} --out {new}"),
    "bench/run": Target(run.main, run.Options, "--data {betons} --out {new}"),
    "bench/ablate": Target(ablate.main, ablate.Options, "--data {betons} --out {new} --study report_d"),
    "bench/reports": Target(reports.main, reports.Options, "--data {betons} --out {new}"),
    "bench/compare": Target(compare.main, compare.Options, "{results} {results}"),
    "bench/report": Target(report.main, report.Options, "{results}"),
    "bench/roofline": Target(roofline.main, roofline.Options, ""),
    "bench/input_pipelines": Target(input_pipelines.main, input_pipelines.Options, "--data {betons} --out {new}"),
    "bench/kernel_latency": Target(kernel_latency.main, kernel_latency.Options, "--data {betons} --out {new}"),
}

# Replacements of an input by something else: (what it is called, how it is made at a path).
DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "missing": lambda path, rng: None,
    "empty": lambda path, rng: path.write_bytes(b""),
    "noise": lambda path, rng: path.write_bytes(rng.randbytes(rng.randrange(1, 5000))),
    "folder": lambda path, rng: path.mkdir(),
    "loop": lambda path, rng: path.symlink_to(path.name),
    "dangling link": lambda path, rng: path.symlink_to("nowhere"),
}


def main() -> None:
    """Run the trial; exit 1 when a mistake was not refused as it should be."""
    options = parse_arguments(Options, "python -m tests.reliability.mistakes")
    folder = Path(tempfile.mkdtemp(prefix="mistakes-"))
    figures = trial(folder, options.count, random.Random(options.seed))
    print(json.dumps(figures, indent=2))
    if options.out:
        options.out.write_text(json.dumps(figures, indent=2) + "\n")
    shutil.rmtree(folder)
    sys.exit(bool(figures["failures"]))


def trial(folder: Path, count: int, rng: random.Random, targets: dict[str, Target] = TARGETS) -> dict[str, Any]:
    """Try `count` mistakes, the commands in turn. Returns the figures and every line that was not refused as it should be."""
    places = prepare(folder)
    before, tried, failures = listing(folder), Counter[str](), []
    for number in range(count):
        name = list(targets)[number % len(targets)]
        kind = rng.choice(list(MISTAKES))
        arguments = MISTAKES[kind](targets[name], places, rng)
        if arguments is None:  # this command has no such option
            continue
        tried[kind] += 1
        began = time.monotonic()
        output = folder.with_suffix(".txt")
        _, status = os.waitpid(start(targets[name].main, arguments, output), 0)
        lines = output.read_text(errors="replace").splitlines()
        said = [line for line in lines if line.startswith("error: ")]
        problem = {
            "exit code": os.waitstatus_to_exitcode(status) != 2,
            "one line": len(said) != 1 or said[0] != lines[-1],
            "traceback": any("Traceback" in line for line in lines),
            "frame": any("╭" in line for line in lines),
            "long": len(said[0]) > 1000 if said else False,
            "slow": time.monotonic() - began > LIMIT,
            "left behind": listing(folder) != before and places["input"] not in arguments,
        }
        if any(problem.values()):
            reasons = ", ".join(reason for reason, wrong in problem.items() if wrong)
            failures.append(f"{name}, {kind}: {reasons}: {[a[:80] for a in arguments]}: {' | '.join(lines[-4:])[:600]}")
        _clear(Path(places["new"]))
        _clear(Path(places["input"]))
    folder.with_suffix(".txt").unlink(missing_ok=True)
    return {"tried": sum(tried.values()), "kinds": dict(tried), "failures": failures}


def prepare(folder: Path) -> dict[str, str]:
    """Data, a finished run and paths that do not exist yet."""
    pickles, betons, trained = write_cifar_pickles(folder / "pickles"), folder / "betons", folder / "run"
    train_line = f"--data {betons} --out {trained} --epochs 1 --limit-train 40 --limit-test 20 --batch-size 20 --no-plots"
    for main, line in ((write_beton.main, f"--source {pickles} --out {betons}"), (train.main, train_line)):
        _, status = os.waitpid(start(main, line.split()), 0)
        assert status == 0, line
    write_results(folder / "results", make_results(seeds=1, epochs=2))
    paths = {"pickles": pickles, "betons": betons, "run": trained, "checkpoint": trained / "last.pt"}
    paths["results"] = folder / "results"
    return {name: str(path) for name, path in (paths | {"new": folder / "new", "input": folder / "input"}).items()}


def listing(folder: Path) -> list[str]:
    """Every file and folder below."""
    return sorted(str(path) for path in folder.rglob("*"))


def _clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def option_types(kind: type) -> dict[str, Any]:
    """{option: type} of a command, nested dataclasses included."""
    found: dict[str, Any] = {}
    for entry, hint in zip(fields(kind), get_type_hints(kind).values(), strict=True):
        found |= option_types(hint) if is_dataclass(hint) else {f"--{entry.name.replace('_', '-')}": hint}
    return found


def line_of(target: Target, places: dict[str, str], without: str = "") -> list[str]:
    """The right command line; without an option and its value where one is named."""
    parts = target.line.format_map(places).split()
    if without in parts:
        at = parts.index(without)
        del parts[at : at + 2]
    return parts


def _with(
    target: Target, places: dict[str, str], rng: random.Random, kinds: tuple[Any, ...], values: list[str]
) -> list[str] | None:
    """The command line with a value for one of its options of a type among `kinds`."""
    names = [name for name, hint in option_types(target.options).items() if hint in kinds or get_origin(hint) in kinds]
    if not names:
        return None
    name = rng.choice(names)
    return [*line_of(target, places, name), name, rng.choice(values)]


def _without_value(line: list[str] | None) -> list[str] | None:
    return line and line[:-1]


def _misspelt(target: Target, places: dict[str, str], rng: random.Random) -> list[str]:
    known = option_types(target.options)
    while True:
        name = list(rng.choice([*known, "--data"]))
        at = rng.randrange(2, len(name))
        name[at : at + rng.randrange(2)] = rng.choice("abcxyz")
        if (word := "".join(name)) not in known and f"--no-{word[2:]}" not in known:
            return [*line_of(target, places), word, *rng.choice([[], ["1"]])]


def _twice(target: Target, places: dict[str, str], rng: random.Random) -> list[str]:
    name, hint = rng.choice(list(option_types(target.options).items()))
    value = [] if hint is bool else [get_args(hint)[0] if get_origin(hint) is Literal else "1"]
    return [*line_of(target, places, name), name, *value, name, *value]


def _damaged(target: Target, places: dict[str, str], rng: random.Random) -> list[str] | None:
    """One of its inputs is no such thing. The inputs of `plots` stand at the end, without a name."""
    parts = line_of(target, places)
    inputs = [
        at
        for at, part in enumerate(parts)
        if any(part.startswith(places[name]) for name in ("pickles", "betons", "run", "results"))
    ]
    if not inputs:
        return None
    DAMAGES[rng.choice(list(DAMAGES))](Path(places["input"]), rng)
    parts[rng.choice(inputs)] = places["input"]
    return parts


def _out_of_range(target: Target, places: dict[str, str], rng: random.Random) -> list[str] | None:
    """Below what any whole number here may be; for training, chosen fields."""
    if target.options is Command and "--resume" not in target.line:
        line = rng.choice([
            "--momentum 1", "--cutout 33", "--crop-padding -1", "--label-smoothing 1.5", "--mixup-alpha -1", "--held-out 1",
            "--val-fraction 2", "--batch-size 1", "--batch-size 100000", "--limit-train 10000000", "--peak-lr 0",
            "--max-parameters 5", "--lr-factor 0", "--std 0 0 0", "--eval-every 0", "--stop-after 9", "--final-lr 5",
            "--ema-decay 1",
        ]).split()  # fmt: skip
        return [*line_of(target, places, line[0]), *line]
    return _with(target, places, rng, (int,), ["-1", "-999999"])


Mistake = Callable[[Target, dict[str, str], random.Random], list[str] | None]
MISTAKES: dict[str, Mistake] = {
    "misspelt option": _misspelt,
    "repeated option": _twice,
    "input of another kind": _damaged,
    "out of range": _out_of_range,
    "not a number": lambda t, p, r: _with(t, p, r, (int, float), ["x", "1,5", "--", "0x10", "1e", "½", "None", "1 2", "true"]),
    "endless number": lambda t, p, r: _with(t, p, r, (int,), ["1" + "0" * 30, "9" * 5000, "-" + "9" * 40]),
    "infinite number": lambda t, p, r: _with(t, p, r, (float,), ["inf", "-inf", "nan", "1e999"]),
    "no such choice": lambda t, p, r: _with(t, p, r, (Literal,), ["gpu", "best", "$(date)", "\x1b[31mred", "ä" * 300]),
    "empty value": lambda t, p, r: _with(t, p, r, (int, float, str, Path, Literal), [""]),
    "not UTF-8": lambda t, p, r: _with(t, p, r, (str, Path), [os.fsdecode(b"\xff\xfe"), os.fsdecode(b"a\x80")]),
    "value for a switch": lambda t, p, r: _with(t, p, r, (bool,), ["maybe", "2", "yes please"]),
    "missing value": lambda t, p, r: _without_value(_with(t, p, r, (int, float, str, Path, Literal), [""])),
    "stray word": lambda t, p, r: [*line_of(t, p), *(["--json"] if t.options is models.Options else []), "--", "stray"],
    "too long a path": lambda t, p, r: _with(t, p, r, (Path,), ["n" * 300, "x/" * 3000]),
}

if __name__ == "__main__":
    main()
