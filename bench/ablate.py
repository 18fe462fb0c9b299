#!/usr/bin/env python3
"""Ablations: the same training with one thing changed at a time, over the same seeds, compared seed by seed.

python bench/ablate.py --study report_d --seeds 0 1 2 --epochs 30
python bench/ablate.py --study speed_half --seeds 0 1 --arms-only '24 px|32 px for 2'
python bench/ablate.py --study speed_half --table docs/speedrun.md
python bench/ablate.py --arch se_resnet18 --arms 'full:' 'no_se: --no-squeeze-excitation' 'plain: --cutout 0'

An arm is a name and flags of `python -m fastcifar.train`. The first is what all others are compared with: for the same seed
they share the draws of weights, order and augmentation. The same command again does what is left.
"""

import json
import re
import shlex
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from bench.results import Ablation, Arm, read_results
from bench.run import Common, current_names, finish, new_console, open_bench, resumable, training
from bench.studies import STUDIES
from fastcifar import files
from fastcifar.arguments import parse_arguments, split_flags
from fastcifar.errors import InputError, require, run_command
from fastcifar.launch import Job
from fastcifar.models import architecture

PROGRAM = "python bench/ablate.py"


@dataclass(frozen=True)
class Options(Common):
    """Train configurations of a recipe over the same seeds and compare them; the same command again goes on."""

    study: Literal["report_d", "report_c", "report_e", "speed_half", "speed94_parts"] | None = None  # a row of bench/studies.py
    arms: tuple[str, ...] = ()  # instead: 'NAME: FLAGS' of `python -m fastcifar.train`, e.g. 'no_se: --no-squeeze-excitation'
    arch: str = "se_resnet18"  # architecture of --arms
    name: str = "ablation"  # what --arms is called in the results
    # Markdown file to write the study's table into, between the lines <!-- STUDY --> and <!-- /STUDY -->; nothing is trained
    table: Path | None = None
    arms_only: str = ""  # regular expression: train only arms whose names it finds; the others keep what they have

    def __post_init__(self) -> None:
        super().__post_init__()
        architecture(self.arch)
        require(self, re.fullmatch(r"[\w.-]+", self.name) is not None, "name", "letters, digits, '_', '-' and '.'")
        require(self, is_pattern(self.arms_only), "arms_only", "a regular expression")


def is_pattern(text: str) -> bool:
    with suppress(re.error):
        return bool(re.compile(text))
    return False


def main() -> None:
    """Parse, plan, train, compare."""
    options = parse_arguments(Options, PROGRAM, current_names(sys.argv[1:]))
    study, out = chosen_study(options), options.out or Path("runs") / "ablate"
    if options.table is not None:
        write_table(options.table, study.name, out)
        return
    with resumable(out):
        finish(out, ablate(options, study, out, new_console()))


def chosen_study(options: Options) -> Ablation:
    """The arms to train. Raises InputError unless exactly one of --study and --arms is given."""
    if (options.study is None) == (not options.arms):
        raise InputError(f"give either --study ({', '.join(STUDIES)}) or --arms, not {'both' if options.arms else 'neither'}")
    if options.study is not None:
        return STUDIES[options.study]
    arms = list(map(parse_arm, options.arms))
    if len({file_name(arm.name) for arm in arms}) < len(arms):
        names = ", ".join(arm.name for arm in arms)
        raise InputError(f"--arms has two of the same name ({names}): give each its own")
    return Ablation(options.name, options.name, options.arch, arms=arms)


def parse_arm(text: str) -> Arm:
    """`NAME: FLAGS`, or `NAME=FIELD=VALUE,FIELD=VALUE` as in the release before. Raises InputError for anything else."""
    name, colon, flags = text.partition(":")
    if colon and name.strip() and "=" not in name:
        return Arm(name.strip(), flags.strip())
    name, equals, rest = text.partition("=")
    pairs = [pair.partition("=") for pair in re.split(r",(?![^\[\]]*\])", rest) if pair]
    if not equals or not name or any(not field or not separator for field, separator, _ in pairs):
        raise InputError(f"--arms takes 'NAME: FLAGS', got {text!r}: for example 'no_se: --no-squeeze-excitation'")
    arm = Arm(name, " ".join(flag_of(field, value) for field, _, value in pairs))
    print(f"--arms {text!r} is now {f'{arm.name}: {arm.flags}'.strip()!r}", file=sys.stderr)
    return arm


def flag_of(field: str, value: str) -> str:
    """FIELD=VALUE of the release before (JSON, or words) as a flag of training."""
    flag = field.replace("_", "-")
    if value.lower() in ("true", "false"):
        return f"--{flag}" if value.lower() == "true" else f"--no-{flag}"
    if value in ("null", "None"):
        return f"--{flag} None"
    values = json.loads(value) if value.startswith("[") else [value]
    return shlex.join([f"--{flag}", *map(str, values)])


def ablate(options: Options, study: Ablation, out: Path, console: Console) -> list[str]:
    """Train what is left of a study; return the names of the trainings that failed. Raises InputError."""
    seeds = list(dict.fromkeys(options.seeds))
    settings = {f"ablation {study.name}": {"epochs": options.epochs, "seeds": seeds, "flags": options.flags}}
    chosen = [arm for arm in study.arms if re.search(options.arms_only, arm.name)]
    if not chosen:
        raise InputError(f"arms_only {options.arms_only!r} finds none of {', '.join(arm.name for arm in study.arms)}")
    bench = open_bench(options, out, [study.arch], settings, console)
    groups = {arm.name: trainings_of(options, out, study, arm, bench.device) for arm in chosen}
    bench.show_plan(groups, study.title, options.flags)
    others = [other for other in bench.results.ablations if other.name != study.name]
    before = [seed for other in bench.results.ablations if other.name == study.name for seed in other.seeds]
    seeds = sorted({*before, *seeds})
    arms = [replace(arm, runs=[run_name(study, arm, seed) for seed in seeds]) for arm in study.arms]
    bench.save(ablations=[*others, replace(study, epochs=options.epochs, seeds=seeds, arms=arms)])
    return bench.train(chain.from_iterable(groups.values()))


def trainings_of(options: Options, out: Path, study: Ablation, arm: Arm, device: torch.device) -> list[Job]:
    """An arm's trainings, one for each seed. Raises InputError for flags that training does not take."""
    flags, seeds = split_flags(f"{study.flags} {arm.flags}"), dict.fromkeys(options.seeds)
    return [training(options, out, run_name(study, arm, seed), study.arch, seed, device, flags) for seed in seeds]


def run_name(study: Ablation, arm: Arm, seed: int) -> str:
    """A training's folder within OUT/runs."""
    return f"{study.name}/{file_name(arm.name)}-seed{seed}"


def write_table(file: Path, name: str, out: Path) -> None:
    """Put the table of the study `name` in OUT into a Markdown file. Raises InputError where either has no place for it."""
    from bench import report  # here, since matplotlib takes a second to import

    path, results = read_results(out)
    trained = {run.name for run in results.runs if not run.error}
    studies = [
        replace(study, arms=[arm for arm in study.arms if trained & set(arm.runs)])
        for study in results.ablations
        if study.name == name
    ]
    section = report.ablation(studies[0], results) if studies and studies[0].arms else None
    if section is None:
        raise InputError(f"{path} has no finished training of {name}: train it first, or name its --out")
    text, marks = file.read_text(encoding="utf-8"), (f"<!-- {name} -->\n", f"<!-- /{name} -->")
    before, begun, rest = text.partition(marks[0])
    _, ended, after = rest.partition(marks[1])
    if not (begun and ended):
        raise InputError(f"{file} has no lines {marks[0].strip()} and {marks[1]}: add them where the table belongs")
    files.write_bytes(file, f"{before}{begun}{report.render_section(section)}\n{ended}{after}".encode())
    print(file)


def file_name(name: str) -> str:
    """A configuration's name as a part of its run folder's."""
    return re.sub(r"[^\w.]+", "_", name).strip("_") or "_"


if __name__ == "__main__":
    run_command(main)
