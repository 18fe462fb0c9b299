#!/usr/bin/env python3
"""A study or a list of overrides enters; one training of each configuration and seed runs; the ablation with its report leaves.

python bench/ablate.py --study report_d --seeds 0 1 2 --epochs 30
python bench/ablate.py --arch se_resnet18 --arms 'full=' 'no_se=squeeze_excitation=false' 'plain=cutout=0,mixup_alpha=0'

The first configuration is the one all others are compared with, seed by seed: for the same seed they share weights' draws,
order and augmentation. Every training is saved when it is finished; the same command again does what is left.
"""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console

from bench.cells import estimate, finished, run_jobs, settle
from bench.collect import collect, open_header
from bench.levers import chosen_levers
from bench.roofline import Rates
from bench.schema import Ablation, Arm
from bench.train_cell import Job
from fastcifar import files
from fastcifar.dataset import load_splits
from fastcifar.device import choose_device, device_name, set_up_process
from fastcifar.errors import InputError, require, run_command
from fastcifar.models import architecture
from fastcifar.progress import clock
from fastcifar.summary import warn_synthetic
from fastcifar.train import steps_per_epoch

PROGRAM = "python bench/ablate.py"


@dataclass(frozen=True)
class Configuration:
    """One row of a study."""

    name: str
    overrides: dict[str, Any] = field(default_factory=dict)  # of the recipe's fields; "arch" names another architecture
    claim: str = ""  # what the report gives for it


@dataclass(frozen=True)
class Study:
    """Configurations of one architecture; the first is what the others are compared with."""

    arch: str
    title: str
    rows: tuple[Configuration, ...]


_NO_JITTER = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
_GREY = {"grayscale": 0.1}  # probability: not stated
_PLAIN_E = {"weight_decay": 5e-4, "head_dropout": 0.0}  # before it added dropout and more decay

STUDIES: dict[str, Study] = {
    # Report D's bar chart; it gives the order of the bars and 85.574 % (Kaggle) for its final model, which is the fourth.
    "report_d": Study(
        "se_resnet18",
        "Report D: five models",
        (
            Configuration("1 everything", _GREY, "best of those with grayscale"),
            Configuration("2 without mixup and cutout", _GREY | {"mixup_alpha": 0.0, "cutout": 0}, "loses most"),
            Configuration("3 without colour jitter", _GREY | _NO_JITTER, "loses little"),
            Configuration("4 without grayscale", {}, "gains: grayscale hurts; 85.574 % Kaggle"),
            Configuration("5 without squeeze-excitation", _GREY | {"squeeze_excitation": False}, "loses little"),
        ),
    ),
    # Report C's table of configurations: parameters, stages N, blocks per stage B, channels C, validation accuracy.
    "report_c": Study(
        "light_resnet18",
        "Report C: table of configurations",
        (
            Configuration("LightResNet18 (2.81 M, N 4, B 2, C 32)", {}, "93.12 % validation"),
            Configuration("LightResNet18_v2 (4.39 M, N 4, B 2, C 40)", {"arch": "light_resnet18_v2_40"}, "94.35 % validation"),
            Configuration("LightResNet18_v2 (5.00 M, N 4, B 2, C 45)", {"arch": "light_resnet18_v2_45"}, "94.88 % validation"),
            Configuration("RobustResNet64 (3.80 M, N 3, B 10, C 32)", {"arch": "robust_resnet64"}, "96.93 % test, without TTA"),
        ),
    ),
    # Report E's comparison of optimizers, by its text's training. Adam's rate is not stated: PyTorch's default.
    "report_e": Study(
        "mish_se_resnet18",
        "Report E: optimizers",
        (
            Configuration("SGD 0.05, dropout, decay 1e-3", {}, "82.417 % Kaggle"),
            Configuration("Adam", {"optimizer": "adam", "peak_lr": 1e-3, **_PLAIN_E, "weight_decay": 0.0}, "74 % Kaggle"),
            Configuration("SGD 0.1, decay 5e-4", {"peak_lr": 0.1, **_PLAIN_E}, "77 % Kaggle"),
            Configuration("SGD 0.05, decay 5e-4", _PLAIN_E, "78 % Kaggle"),
        ),
    ),
}


@dataclass(frozen=True)
class Options:
    """Train configurations of a recipe over the same seeds and compare them; the same command again goes on."""

    study: Literal["report_d", "report_c", "report_e"] | None = None  # one of the reports' own comparisons
    arms: tuple[str, ...] = ()  # instead: NAME=FIELD=VALUE,FIELD=VALUE of a recipe's fields (null: none); 'full=': none of them
    arch: str = "se_resnet18"  # architecture of --arms
    name: str = "ablation"  # what --arms is called in the results
    epochs: int = 10  # of each training; every schedule is stretched to them
    seeds: tuple[int, ...] = (0, 1, 2)  # one training of each configuration for each seed
    levers: tuple[str, ...] | None = None  # what is switched on (bench/levers.py); default: all that pay on this device
    data: Path = Path("data/beton")  # folder with train.beton and test.beton
    out: Path | None = None  # folder of the results, may be bench/run.py's; default: runs/ablate
    limit_train: int = 0  # use only the first so many training images, 0 = all
    limit_test: int = 0  # use only the first so many test images, 0 = all
    batch_size: int = 0  # images per step, 0 = each recipe's own
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one

    def __post_init__(self) -> None:
        architecture(self.arch)
        require(self, bool(self.seeds) and all(0 <= seed < 2**63 for seed in self.seeds), "seeds", "at least one, 0..2^63-1")
        require(self, self.epochs >= 1, "epochs", "at least 1")
        require(self, self.batch_size == 0 or self.batch_size >= 2, "batch_size", "0 or at least 2")
        require(self, re.fullmatch(r"[\w.-]+", self.name) is not None, "name", "letters, digits, '_', '-' and '.'")
        for name in ("limit_train", "limit_test"):
            require(self, getattr(self, name) >= 0, name, "0 or more")


def main() -> None:
    """Parse, plan, train, compare."""
    options = tyro.cli(Options, prog=PROGRAM)
    name, study = chosen_study(options)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    out = options.out or Path("runs") / "ablate"
    try:
        failures = ablate(options, name, study, out, console)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what is finished is in {out}; the same command goes on") from None
    console.print(f"results and report: {out}")
    if failures:
        console.print(f"{failures} trainings failed, see above; the same command tries them again", style="yellow")
        raise SystemExit(1)


def chosen_study(options: Options) -> tuple[str, Study]:
    """The study's name and rows. Raises InputError unless exactly one of --study and --arms is given."""
    if (options.study is None) == (not options.arms):
        raise InputError(f"give either --study ({', '.join(STUDIES)}) or --arms, not {'both' if options.arms else 'neither'}")
    if options.study is not None:
        return options.study, STUDIES[options.study]
    rows = tuple(parse_arm(text) for text in options.arms)
    names = [row.name for row in rows]
    if len(set(map(file_name, names))) < len(names):
        raise InputError(f"--arms has two of the same name ({', '.join(names)}): give each its own")
    return options.name, Study(options.arch, options.name, rows)


def parse_arm(text: str) -> Configuration:
    """`NAME=FIELD=VALUE,FIELD=VALUE`; values are JSON, lists with commas too, or words. Raises InputError for anything else."""
    name, found, rest = text.partition("=")
    pairs = [pair.partition("=") for pair in re.split(r",(?![^\[\]]*\])", rest) if pair]
    if not found or not name or any(not key or not separator for key, separator, _ in pairs):
        raise InputError(f"--arms takes NAME=FIELD=VALUE,FIELD=VALUE, got {text!r}: for example no_se=squeeze_excitation=false")
    return Configuration(name, {key: _value(value) for key, _, value in pairs})


def _value(text: str) -> Any:
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except ValueError:
        return text


def ablate(options: Options, name: str, study: Study, out: Path, console: Console) -> int:
    """Train what is left of a study, write it and the reports; return how many trainings failed. Raises InputError."""
    device = choose_device(options.device)
    set_up_process(device, deterministic=True)
    data = load_splits(
        options.data,
        device,
        limit_train=options.limit_train,
        limit_test=options.limit_test,
        val_fraction=0.0,
        seed=0,
        verify=True,
    )
    warn_synthetic(console, data.manifest.synthetic, data.manifest.name)
    seeds = list(dict.fromkeys(options.seeds))
    jobs = {(row.name, seed): make_job(options, study, row, seed, device) for row in study.rows for seed in seeds}
    for job in jobs.values():
        steps_per_epoch(data, job.recipe.batch_size)
    folder = out / "ablations" / name
    given = {field: getattr(options, field) for field in ("epochs", "levers", "limit_train", "limit_test", "batch_size")}
    arms = {row.name: {"arch": study.arch} | row.overrides for row in study.rows}
    machine = {"hardware": device_name(device), "torch": torch.__version__, "data": list(data.sha256)}
    settle(folder / "settings.json", machine | given | {"arms": arms})
    archs = list(dict.fromkeys(job.arch for job in jobs.values()))
    header = open_header(out, device, data, archs, {f"ablation {name}": given | {"seeds": seeds, "title": study.title}})
    rates = Rates(**header.environment["rates"])
    seconds = {job.key: estimate(job, rates, device, len(data.train), len(data.test)) for job in jobs.values()}
    left = [job for job in jobs.values() if finished(folder, job, Console(quiet=True)) is None]
    total = clock(sum(seconds[job.key] for job in left))
    console.print(f"{study.title}: {len(study.rows)} configurations x {len(seeds)} seeds, {len(left)} trainings to do")
    console.print(f"in all about {total}, guessed from FLOPs, bytes and this device's rates; into {out}")

    def saved() -> None:
        files.write_json(folder / "ablation.json", asdict(compare(study, options.epochs, seeds, jobs, folder)))
        collect(out, console)

    cells = run_jobs(list(jobs.values()), folder, seconds, console, saved)
    saved()
    return sum(cell.error is not None for cell in cells)


def compare(study: Study, epochs: int, seeds: list[int], jobs: dict[tuple[str, int], Job], folder: Path) -> Ablation:
    """The study as far as its cells are finished; an accuracy is None where a training failed or has not run."""
    cells = {key: finished(folder, job, Console(quiet=True)) for key, job in jobs.items()}
    arms = []
    for row in study.rows:
        own = [cells[row.name, seed] for seed in seeds]
        arms.append(Arm(row.name, row.overrides, [cell.final_top1 if cell else None for cell in own], row.claim))
    images = max((cell.images_per_epoch for cell in cells.values() if cell), default=0)
    return Ablation(study.title, study.arch, epochs, images, seeds, arms)


def file_name(name: str) -> str:
    """A configuration's name as a part of its cell's key."""
    return re.sub(r"[^\w.]+", "_", name).strip("_") or "_"


def make_job(options: Options, study: Study, row: Configuration, seed: int, device: torch.device) -> Job:
    """The training of one configuration with one seed. Raises InputError for a field the recipe does not have."""
    overrides = dict(row.overrides)
    arch = str(overrides.pop("arch", study.arch))
    architecture(arch)
    if "epochs" in overrides:
        raise InputError(f"{row.name}: epochs are the same for all configurations: give --epochs instead")
    if options.batch_size:
        overrides.setdefault("batch_size", options.batch_size)
    return Job(
        key=f"{arch}-seed{seed}-{file_name(row.name)}",
        arch=arch,
        seed=seed,
        levers=chosen_levers(options.levers, arch, device),
        epochs=options.epochs,
        data=str(options.data.resolve()),
        limit_train=options.limit_train,
        limit_test=options.limit_test,
        device=device.type,
        overrides=overrides,
    )


if __name__ == "__main__":
    run_command(main)
