"""Checkpoints: the state of a run as one file of tensors and plain values, whose loading is checked and never runs code."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastcifar import files
from fastcifar.errors import InputError
from fastcifar.models import ARCHITECTURES, REVISED, build_model, count_parameters, place
from fastcifar.models.resnet import ResNet

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
    except Exception as error:  # whatever a damaged or hostile file makes the reader raise, it is not a sound checkpoint
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


def load_model(path: Path, device: torch.device) -> tuple[ResNet, Checkpoint]:
    """Rebuild the model a checkpoint holds, its averaged weights where it has them, in eval mode and channels_last."""
    checkpoint = load_checkpoint(path, device)
    model = build_model(checkpoint.arch, len(checkpoint.class_names), squeeze_excitation=checkpoint.squeeze_excitation)
    try:
        require_fits(path, checkpoint, model)
        model.load_state_dict(checkpoint.average or checkpoint.model)
    except RuntimeError:
        raise InputError(f"{path} does not fit arch {checkpoint.arch}: use another checkpoint, or train again") from None
    return place(model, device).eval(), checkpoint


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
