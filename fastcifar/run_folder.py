"""A run's folder: complete, readable, never half-written; and its checkpoints, whose loading never runs code.

config.json   arch, recipe, options, versions, hardware, command      metrics.jsonl   one object an epoch
last.pt       the state after the last finished epoch                 best.pt         the best by the selection split
summary.json  the figures of the whole run                            *.png, events.* plots and TensorBoard
"""

import io
import json
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastcifar import __version__, files
from fastcifar.device import device_name
from fastcifar.errors import InputError
from fastcifar.models import ARCHITECTURES, REVISED, build_model, count_parameters, place
from fastcifar.models.resnet import PixelClassifier, ResNet
from fastcifar.recipes import Recipe, RunOptions, recipe_from_dict, run_options_from_dict, to_dict
from fastcifar.versions import installed

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """Everything needed to go on with a run, or to use its model."""

    arch: str
    squeeze_excitation: bool
    class_names: list[str]
    mean: list[float]  # normalisation per channel, 0..1
    std: list[float]
    data_name: str  # what the training data is called
    data_sha256: list[str]  # of train.beton and test.beton
    epoch: int  # epochs completed
    model: dict[str, Any]  # state_dict
    average: dict[str, Any] | None  # the EMA's state_dict
    optimizer: dict[str, Any]
    best_accuracy: float  # 0..1
    best_epoch: int


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write atomically: a full disk or a kill leaves the previous file as it was. Raises OSError."""
    buffer = io.BytesIO()  # PyTorch's own writer turns a full disk into a RuntimeError without the path
    torch.save({"format": FORMAT, **vars(checkpoint)}, buffer)
    files.write_bytes(path, buffer.getvalue())


def load_checkpoint(path: Path, device: torch.device, *, arch: str | None = None) -> Checkpoint:
    """Read a checkpoint's tensors onto `device`.

    arch: the architecture it must be of. Raises InputError when it is missing, truncated, no checkpoint of ours, unsafe, or
    of another arch.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing: name a checkpoint (last.pt or best.pt in a run folder)")
    remedy = "use another checkpoint, or train again"
    try:
        values = torch.load(path, map_location=device, weights_only=True)
    except (OSError, torch.OutOfMemoryError):  # no fault of the file
        raise
    except Exception as error:  # whatever a damaged or hostile file makes the reader raise, it is not a valid checkpoint
        unsafe = "weights_only" in str(error) or "Weights only" in str(error)
        problem = "holds objects that could run code" if unsafe else f"is damaged ({type(error).__name__})"
        raise InputError(f"{path} {problem}: {remedy}") from None
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise InputError(f"{path} is not a checkpoint of this version: {remedy}")
    try:
        checkpoint = Checkpoint(**values)
    except TypeError:
        raise InputError(f"{path} lacks fields of a checkpoint: {remedy}") from None
    if arch is not None and checkpoint.arch != arch:
        raise InputError(f"{path} is of arch {checkpoint.arch}, not {arch}: use a checkpoint of {arch}")
    return checkpoint


def load_model(path: Path, device: torch.device) -> tuple[PixelClassifier, Checkpoint]:
    """Rebuild the model of a checkpoint, its averaged weights where it has them, in eval mode: uint8 images in, logits out."""
    checkpoint = load_checkpoint(path, device)
    model = build_model(checkpoint.arch, len(checkpoint.class_names), squeeze_excitation=checkpoint.squeeze_excitation)
    try:
        require_fits(path, checkpoint, model)
        model.load_state_dict(checkpoint.average or checkpoint.model)
    except RuntimeError:
        raise InputError(f"{path} does not fit arch {checkpoint.arch}: use another checkpoint, or train again") from None
    mean, std = (torch.tensor(values, device=device) for values in (checkpoint.mean, checkpoint.std))
    return PixelClassifier(place(model, device).eval(), mean, std), checkpoint


def require_fits(path: Path, checkpoint: Checkpoint, model: ResNet) -> None:
    """Raise InputError for a checkpoint of a row that was another network when it was written."""
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    held = sum(tensor.numel() for name, tensor in checkpoint.model.items() if not name.endswith(buffers))
    arch, wanted = checkpoint.arch, count_parameters(model)
    if arch in REVISED and wanted - held == ARCHITECTURES[arch].parameters - REVISED[arch]:
        raise InputError(
            f"{path} holds {arch} as version 0.1 had it ({held:,} parameters), which is not the report's network ({wanted:,}): "
            "train again, or use version 0.1"
        )


Metrics = dict[str, Any]  # one epoch's record, plain JSON values

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

    def create(self) -> None:
        """Make the folder. Raises InputError when it exists with something in it."""
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise InputError(f"{self.path} exists: go on with it by --resume {self.path}, or choose another --out")
        self.path.mkdir(parents=True, exist_ok=True)

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

    def read_config(self) -> tuple[str, str, Recipe, RunOptions]:
        """Return (arch, recipe name, recipe, options) as the run began. Raises InputError when there is no valid config."""
        values = files.read_json(self.path / "config.json", remedy=NOT_A_RUN)
        try:
            if values["arch"] in REVISED and "format" not in values:
                raise InputError(
                    f"{self.path} is a run of version 0.1, whose {values['arch']} was not the report's network: "
                    "train again, or use version 0.1"
                )
            recipe, run = recipe_from_dict(values["recipe"]), run_options_from_dict(values["run"])
            return values["arch"], values["recipe_name"], recipe, run
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"{self.path / 'config.json'} is not a run's config ({error}): {NOT_A_RUN}") from None

    def save_epoch(self, rows: list[Metrics], checkpoint: Checkpoint) -> None:
        """Write an epoch: best.pt if it is the best, the metrics, and last.pt, in this order.

        A kill in between repeats the epoch, and the line of metrics that was too early is dropped then.
        """
        if checkpoint.best_epoch == checkpoint.epoch:
            save_checkpoint(self.best, checkpoint)
        self.write_metrics(rows)
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
                valid = isinstance(row, dict) and row.keys() >= METRIC_KEYS and isinstance(row["epoch"], int)
            except ValueError:
                valid = False
            if valid:
                rows.append(row)
            else:
                raise InputError(f"{path}, line {number} is not an epoch's metrics: {NOT_A_RUN}")
        return rows

    def write_summary(self, summary: dict[str, Any]) -> None:
        files.write_json(self.path / "summary.json", summary)

    def read_summary(self) -> dict[str, Any]:
        summary = files.read_json(self.path / "summary.json", remedy="the run has not finished: go on with it by --resume")
        if not isinstance(summary, dict):
            raise InputError(f"{self.path / 'summary.json'} is not a run's summary: {NOT_A_RUN}")
        return summary


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
