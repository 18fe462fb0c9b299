#!/usr/bin/env python3
"""Ablations: the same training with one thing changed at a time, over the same seeds, compared seed by seed.

python bench/ablate.py --study report_d --seeds 0 1 2 --epochs 30
python bench/ablate.py --arch se_resnet18 --arms 'full:' 'no_se: --no-squeeze-excitation' 'plain: --cutout 0'

An arm is a name and flags of `python -m fastcifar.train`. The first is what all others are compared with: for the same seed
they share the draws of weights, order and augmentation. The same command again does what is left.
"""

import json
import re
import shlex
import sys
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from bench.results import Ablation, Arm
from bench.run import Common, current_names, finish, new_console, open_bench, resumable, training
from fastcifar.arguments import parse_arguments
from fastcifar.errors import InputError, require, run_command
from fastcifar.launch import Job
from fastcifar.models import architecture

PROGRAM = "python bench/ablate.py"


_TEXT_E = "--recipe mish_se_resnet18_text"
_PLAIN_E = f"{_TEXT_E} --weight-decay 5e-4 --head-dropout 0"
_NO_JITTER = "--brightness 0 --contrast 0 --saturation 0 --hue 0"
_NO_MIXUP = "--mixup-alpha 0 --mixup-alpha-end None --mixup-alpha-floor 0"

STUDIES: dict[str, Ablation] = {
    study.name: study
    for study in (
        # Report D's bar chart; it gives the order of the bars and 85.574 % (Kaggle) for its final model, which is the fourth.
        # The probability of grayscale is not stated.
        Ablation("report_d", "Report D: five models", "se_resnet18", arms=[
            Arm("1 everything", "--grayscale 0.1", "best of those with grayscale"),
            Arm("2 without mixup and cutout", f"--grayscale 0.1 {_NO_MIXUP} --cutout 0", "loses most"),
            Arm("3 without colour jitter", f"--grayscale 0.1 {_NO_JITTER}", "loses little"),
            Arm("4 without grayscale", "", "gains: grayscale hurts; 85.574 % Kaggle"),
            Arm("5 without squeeze-excitation", "--grayscale 0.1 --no-squeeze-excitation", "loses little"),
        ]),
        # Report C's table of configurations: parameters, stages N, blocks per stage B, channels C, validation accuracy.
        Ablation("report_c", "Report C: table of configurations", "light_resnet18", arms=[
            Arm("LightResNet18 (2.81 M, N 4, B 2, C 32)", "", "93.12 % validation"),
            Arm("LightResNet18_v2 (4.39 M, N 4, B 2, C 40)", "--arch light_resnet18_v2_40", "94.35 % validation"),
            Arm("LightResNet18_v2 (5.00 M, N 4, B 2, C 45)", "--arch light_resnet18_v2_45", "94.88 % validation"),
            Arm("RobustResNet64 (3.80 M, N 3, B 10, C 32)", "--arch robust_resnet64", "96.93 % test, without TTA"),
        ]),
        # Report E's comparison of optimizers, by its text's training, before dropout and more decay were added. Adam's rate is
        # not stated: PyTorch's default.
        Ablation("report_e", "Report E: optimizers", "mish_se_resnet18", arms=[
            Arm("SGD 0.05, dropout, decay 1e-3", _TEXT_E, "82.417 % Kaggle"),
            Arm("Adam", f"{_PLAIN_E} --optimizer adam --peak-lr 1e-3 --weight-decay 0", "74 % Kaggle"),
            Arm("SGD 0.1, decay 5e-4", f"{_PLAIN_E} --peak-lr 0.1", "77 % Kaggle"),
            Arm("SGD 0.05, decay 5e-4", _PLAIN_E, "78 % Kaggle"),
        ]),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Options(Common):
    """Train configurations of a recipe over the same seeds and compare them; the same command again goes on."""

    study: Literal["report_d", "report_c", "report_e"] | None = None  # one of the reports' own comparisons
    arms: tuple[str, ...] = ()  # instead: 'NAME: FLAGS' of `python -m fastcifar.train`, e.g. 'no_se: --no-squeeze-excitation'
    arch: str = "se_resnet18"  # architecture of --arms
    name: str = "ablation"  # what --arms is called in the results

    def __post_init__(self) -> None:
        super().__post_init__()
        architecture(self.arch)
        require(self, re.fullmatch(r"[\w.-]+", self.name) is not None, "name", "letters, digits, '_', '-' and '.'")


def main() -> None:
    """Parse, plan, train, compare."""
    options = parse_arguments(Options, PROGRAM, current_names(sys.argv[1:]))
    study, out = chosen_study(options), options.out or Path("runs") / "ablate"
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
    bench = open_bench(options, out, [study.arch], settings, console)
    groups = {arm.name: trainings_of(options, out, study, arm, bench.device) for arm in study.arms}
    bench.show_plan(groups, study.title, options.flags)
    arms = [replace(arm, runs=[job.name for job in groups[arm.name]]) for arm in study.arms]
    ablation = replace(study, epochs=options.epochs, seeds=seeds, arms=arms)
    bench.save(ablations=[*(other for other in bench.results.ablations if other.name != study.name), ablation])
    return bench.train(chain.from_iterable(groups.values()))


def trainings_of(options: Options, out: Path, study: Ablation, arm: Arm, device: torch.device) -> list[Job]:
    """An arm's trainings, one for each seed. Raises InputError for flags that training does not take."""
    flags, folder = shlex.split(arm.flags), f"{study.name}/{file_name(arm.name)}"
    seeds = dict.fromkeys(options.seeds)
    return [training(options, out, f"{folder}-seed{seed}", study.arch, seed, device, flags) for seed in seeds]


def file_name(name: str) -> str:
    """A configuration's name as a part of its run folder's."""
    return re.sub(r"[^\w.]+", "_", name).strip("_") or "_"


if __name__ == "__main__":
    run_command(main)
