"""A run's folder: complete, readable, never half-written, held by one process at a time.

config.json   arch, recipe, options, versions, hardware, command      metrics.jsonl   one object an epoch
last.pt       the state training goes on from                         best.pt         the best by the selection split
summary.json  the figures of the whole run                            *.png, events.* plots and TensorBoard
wandb.id, mlflow.id  what --log's services call the run
"""

import fcntl
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastcifar import __version__, files
from fastcifar.arguments import require_typed
from fastcifar.checkpoint import Checkpoint, save_checkpoint
from fastcifar.device import device_name
from fastcifar.errors import InputError, shortened
from fastcifar.models import REVISED
from fastcifar.recipes import Recipe, RunOptions, recipe_from_dict, run_options_from_dict, to_dict
from fastcifar.versions import installed

Metrics = dict[str, Any]  # one epoch's record, plain JSON values

ENDLESS = 1 << 63  # no figure of a run comes near

METRIC_KEYS = {
    "epoch", "data_name", "train_loss", "train_accuracy", "eval_loss", "eval_accuracy", "eval_seconds", "eval_split",
    "best_accuracy", "learning_rates", "images_per_second", "train_seconds", "first_step_seconds",
}  # fmt: skip

CONFIG_FORMAT = 2  # of config.json; version 0.1 wrote none
NOT_A_RUN = "name a run folder that `python -m fastcifar.train` made"


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run's files, and how they are written."""

    path: Path

    @property
    def last(self) -> Path:
        return self.path / "last.pt"

    @property
    def best(self) -> Path:
        return self.path / "best.pt"

    @contextmanager
    def held(self, *, new: bool) -> Iterator[None]:
        """Hold the folder for this process alone, which ends with the process however it ends; `new` ones are made here.

        Raises InputError when another process holds it, or when a new one has something in it.
        """
        if new:
            self.path.mkdir(parents=True, exist_ok=True)
        elif not self.path.is_dir():
            raise InputError(f"{self.path} is not a folder: {NOT_A_RUN}")
        folder = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"{self.path} is in use: another process trains into it; wait for it, stop it, or choose another --out"
                ) from None
            except OSError:  # a file system without locks
                pass
            for partial in self.path.glob(f"*{files.PARTIAL}"):  # of a killed process, since nobody else holds the folder
                partial.unlink(missing_ok=True)
            if new and any(self.path.iterdir()):
                raise InputError(f"{self.path} exists: go on with it by --resume {self.path}, or choose another --out")
            yield
        finally:
            os.close(folder)

    def require_present(self) -> None:
        """Raise InputError when the folder was removed or emptied while its run went on."""
        if not (self.path / "config.json").is_file():
            raise InputError(f"{self.path} was removed or emptied while its run went on: start again, in a folder that stays")

    def write_config(self, arch: str, recipe_name: str, recipe: Recipe, run: RunOptions, facts: dict[str, Any]) -> None:
        config = {
            "format": CONFIG_FORMAT,
            "arch": arch,
            "recipe_name": recipe_name,
            "recipe": to_dict(recipe),
            "run": to_dict(run),
            **facts,
        }
        files.write_json(self.path / "config.json", config)

    def read_config(self, name: str = "config.json") -> tuple[str, str, Recipe, RunOptions]:
        """Return (arch, recipe name, recipe, options) as the run began. Raises InputError when there is no valid config."""
        values = files.read_json(self.path / name, remedy=NOT_A_RUN)
        if isinstance(values, dict) and str(values.get("arch")) in REVISED and "format" not in values:
            raise InputError(
                f"{self.path} is a run of version 0.1, whose {values['arch']} was not the report's network: "
                "train again, or use version 0.1"
            )
        try:
            recipe, run = recipe_from_dict(values["recipe"]), run_options_from_dict(values["run"])
            require_typed(recipe)
            require_typed(run)
            if not all(isinstance(values[entry], str) for entry in ("arch", "recipe_name")):
                raise TypeError("arch and recipe_name must be text")
            return values["arch"], values["recipe_name"], recipe, run
        except (KeyError, TypeError, AttributeError, ValueError, InputError) as error:
            raise InputError(f"{self.path / name} is not a run's config ({shortened(error, 200)}): {NOT_A_RUN}") from None

    def save_epoch(self, rows: list[Metrics], checkpoint: Checkpoint, best: Checkpoint | None = None) -> None:
        """Write an epoch: best.pt if it is the best, the metrics, and last.pt, in this order.

        best: the best of earlier epochs, where best.pt is older than that. A kill in between repeats the epoch, and the line of
        metrics that was too early is dropped then.
        """
        self.require_present()
        if checkpoint.best_epoch == checkpoint.epoch:
            best = checkpoint
        if best is not None:
            save_checkpoint(self.best, best)
        self.write_metrics(rows)
        if best is not checkpoint or not files.link(self.best, self.last):
            save_checkpoint(self.last, checkpoint)

    def save_within(self, checkpoint: Checkpoint) -> None:
        """Write the state inside an epoch as last.pt."""
        self.require_present()
        save_checkpoint(self.last, checkpoint)

    def write_metrics(self, rows: list[Metrics]) -> None:
        """Write all epochs so far; the whole file each time, since it is small and must never end in half a line."""
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        files.write_bytes(self.path / "metrics.jsonl", text.encode())

    def read_metrics(self) -> list[Metrics]:
        """Return one dict an epoch. Raises InputError naming the file and line that is not valid."""
        path = self.path / "metrics.jsonl"
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            raise InputError(f"{path} is missing: {NOT_A_RUN}") from None
        except UnicodeDecodeError:
            raise InputError(f"{path} is not text: {NOT_A_RUN}") from None
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                valid = isinstance(row, dict) and row.keys() >= METRIC_KEYS and row["epoch"] == number and _is_plottable(row)
            except (ValueError, RecursionError):
                valid = False
            if valid:
                rows.append(row)
            else:
                raise InputError(f"{path}, line {number} is not an epoch's metrics: {NOT_A_RUN}")
        return rows

    def write_summary(self, summary: dict[str, Any]) -> None:
        self.require_present()
        files.write_json(self.path / "summary.json", summary)

    def read_summary(self) -> dict[str, Any]:
        summary = files.read_json(self.path / "summary.json", remedy="the run has not finished: go on with it by --resume")
        try:
            valid = _is_square(summary["final"]["confusion"], len(summary["class_names"]))
        except (TypeError, KeyError):
            valid = False
        if not valid:
            raise InputError(f"{self.path / 'summary.json'} is not a run's summary: {NOT_A_RUN}")
        return summary


def _is_plottable(row: Metrics) -> bool:
    """Whether the figures of an epoch are finite numbers, None where they may be missing."""
    rates = row["learning_rates"]
    always = [
        row[name] for name in ("train_loss", "train_accuracy", "images_per_second", "train_seconds", "first_step_seconds")
    ]
    at_times = [row[name] for name in ("eval_loss", "eval_accuracy", "eval_seconds", "best_accuracy") if row[name] is not None]
    numbers = [*always, *at_times, *(rates if isinstance(rates, list) and rates else [None])]
    return all(type(number) in (int, float) and -ENDLESS < number < ENDLESS for number in numbers)  # NaN is not


def _is_square(confusion: Any, classes: int) -> bool:
    rows = confusion if isinstance(confusion, list) else []
    return len(rows) == classes and all(len(row) == classes and all(type(count) is int for count in row) for row in rows)


def environment_facts(device: torch.device) -> dict[str, Any]:
    """What a figure needs beside it: hardware, versions, commit and command."""
    return {
        "hardware": device_name(device),
        "versions": {
            "fastcifar": __version__,
            "python": platform.python_version(),
            **installed("torch", "torchvision", "triton", "numpy", "ffcv"),
        },
        "commit": _commit(),
        "command": _command(),
    }


def _command() -> str:
    """The command line as a person would type it again."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", spec.name.removesuffix(".__main__")] if spec else sys.argv[:1]
    return shlex.join(["python", *program, *sys.argv[1:]])


def _commit() -> str | None:
    """The commit of this source tree, with `-dirty` where it was changed; None outside a checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
