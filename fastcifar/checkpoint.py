"""Checkpoints: whole, hashed, of checked types and finite weights; loading one never runs code.

A checkpoint is PyTorch's zip archive, which `torch.load` reads; the archive's comment is the SHA-256 of all bytes before it.
"""

import hashlib
import io
import math
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcifar import files
from fastcifar.beton import SMALLEST
from fastcifar.errors import InputError
from fastcifar.models import ARCHITECTURES, REVISED, build_model, count_parameters, place
from fastcifar.models.layers import Kernels
from fastcifar.models.resnet import PixelClassifier, ResNet
from kernels.augment.operations import CIFAR

FORMAT = 2  # 1, version 0.1's, had neither hash nor `within`
REMEDY = "use another checkpoint, or train again"
END = b"PK\5\6"  # a zip archive's last record: 22 bytes, the last two of them the comment's length
END_BYTES = 22
DIGEST_BYTES = 64


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
    average: dict[str, Any] | None  # the averaged weights' state_dict
    optimizer: dict[str, Any]
    best_accuracy: float  # 0..1
    best_epoch: int
    within: dict[str, Any] | None = None  # an interrupted epoch's EpochState; None: between two epochs
    size: list[int] = field(default_factory=lambda: list(CIFAR))  # height and width of the data's images
    stem_stride: int = 1  # of the network; like `size` not written where it is CIFAR's


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def _channels(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(isinstance(v, float) and math.isfinite(v) for v in value)


def _is_plain(value: Any) -> bool:
    return type(value) is Tensor and value.layout == torch.strided and not (value.is_meta or value.is_complex())


def _weights(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) and _is_plain(tensor) for name, tensor in value.items())


VALID: dict[str, Callable[[Any], bool]] = {
    "arch": lambda value: isinstance(value, str),
    "squeeze_excitation": lambda value: isinstance(value, bool),
    "class_names": lambda value: _texts(value) and len(value) > 0,
    "mean": _channels,
    "std": lambda value: _channels(value) and min(value) > 0,
    "data_name": lambda value: isinstance(value, str),
    "data_sha256": _texts,
    "epoch": lambda value: type(value) is int and value >= 0,
    "model": _weights,
    "average": lambda value: value is None or _weights(value),
    "optimizer": lambda value: isinstance(value, dict),
    "best_accuracy": lambda value: isinstance(value, float) and -1 <= value <= 1,
    "best_epoch": lambda value: type(value) is int and value >= 0,
    "within": lambda value: value is None or isinstance(value, dict),
    "size": lambda value: isinstance(value, list) and len(value) == 2 and all(type(v) is int and v >= SMALLEST for v in value),
    "stem_stride": lambda value: value in (1, 2, 4),
}


USUAL = (("size", list(CIFAR)), ("stem_stride", 1))  # what checkpoints of CIFAR do not write, so that version 0.2 reads them


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write atomically: a full disk or a kill leaves the previous file as it was. Raises OSError."""
    values = {name: value for name, value in vars(checkpoint).items() if (name, value) not in USUAL}
    files.write_bytes(path, sealed(serialised({"format": FORMAT, **values})))


def serialised(values: dict[str, Any]) -> bytes:
    """PyTorch's archive of plain values and tensors, made in memory: its own writer turns a full disk into a RuntimeError."""
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return buffer.getvalue()


def sealed(archive: bytes) -> bytes:
    """A zip archive without a comment, with the hash of it as its comment."""
    content = archive[:-2] + DIGEST_BYTES.to_bytes(2, "little")
    return content + hashlib.sha256(content).hexdigest().encode()


def load_checkpoint(path: Path, device: torch.device, *, arch: str | None = None) -> Checkpoint:
    """Read a checkpoint's tensors onto `device`.

    arch: the architecture it must be of. Raises InputError when it is missing, damaged in any byte, no checkpoint of ours,
    unsafe, not finite, or of another arch.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing: name a checkpoint (last.pt or best.pt in a run folder)")
    content = path.read_bytes()
    hashed = content[-DIGEST_BYTES - END_BYTES :].startswith(END)
    if hashed and hashlib.sha256(content[:-DIGEST_BYTES]).hexdigest().encode() != content[-DIGEST_BYTES:]:
        raise InputError(f"{path} is damaged (its SHA-256 is not the one it was written with): {REMEDY}")
    try:
        _require_stored(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols: what is refused is said in one line
            values = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except torch.OutOfMemoryError:  # no fault of the file
        raise
    except Exception as error:  # whatever a damaged or hostile file makes the reader raise, it is not a valid checkpoint
        unsafe = "weights_only" in str(error) or "Weights only" in str(error)
        problem = "holds objects that could run code" if unsafe else f"is damaged ({type(error).__name__})"
        raise InputError(f"{path} {problem}: {REMEDY}") from None
    version = values.pop("format", None) if isinstance(values, dict) else None
    if version == FORMAT and not hashed:
        raise InputError(f"{path} is damaged (its end is missing): {REMEDY}")
    if version not in (1, FORMAT):
        raise InputError(f"{path} is not a checkpoint of this version: {REMEDY}")
    try:
        checkpoint = Checkpoint(**values)
    except TypeError:
        raise InputError(f"{path} lacks fields of a checkpoint: {REMEDY}") from None
    wrong = [name for name, valid in VALID.items() if not valid(getattr(checkpoint, name))]
    if wrong:
        raise InputError(f"{path} has fields that are not valid ({', '.join(wrong)}): {REMEDY}")
    _require_finite(path, checkpoint, len(content))
    if arch is not None and checkpoint.arch != arch:
        raise InputError(f"{path} is of arch {checkpoint.arch}, not {arch}: use a checkpoint of {arch}")
    return checkpoint


def _require_stored(content: bytes) -> None:
    """Refuse an archive that unpacks to more than its own size. Raises ValueError, zipfile.BadZipFile."""
    if content.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("an entry is compressed")


def _require_finite(path: Path, checkpoint: Checkpoint, size: int) -> None:
    """Refuse weights that are not finite, or that claim more elements than the file of `size` bytes can hold."""
    for tensors in (checkpoint.model, checkpoint.average or {}):
        if any(tensor.numel() * tensor.element_size() > size for tensor in tensors.values()):
            raise InputError(f"{path} is damaged (a tensor larger than the file): {REMEDY}")
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise InputError(f"{path} holds weights that are not finite: {REMEDY}")


@dataclass(frozen=True)
class Preprocessing:
    """What a network wants of its images; a model from `load` does it itself."""

    mean: tuple[float, ...]  # R, G, B in 0..1: subtracted from pixel / 255
    std: tuple[float, ...]  # then divided by
    size: tuple[int, int]  # height and width in pixels, as trained


class Trained(PixelClassifier):
    """A checkpoint's network in eval mode: uint8 images [N, H, W, 3] to logits [N, classes]."""

    def __init__(self, network: ResNet, checkpoint: Checkpoint, device: torch.device) -> None:
        mean, std = (torch.tensor(values, device=device) for values in (checkpoint.mean, checkpoint.std))
        super().__init__(network, mean, std)
        self.arch, self.squeeze_excitation, self.epoch = checkpoint.arch, checkpoint.squeeze_excitation, checkpoint.epoch
        self.stem_stride = checkpoint.stem_stride
        self.class_names = checkpoint.class_names  # in the order of the logits
        height, width = checkpoint.size
        self.preprocessing = Preprocessing(tuple(checkpoint.mean), tuple(checkpoint.std), (height, width))


def load(path: str | Path, device: str | torch.device = "cpu", *, kernels: Kernels = "auto") -> Trained:
    """Return the model of a checkpoint (`best.pt` or `last.pt` of a run folder), its averaged weights where it has them.

    It takes uint8 images [N, H, W, 3], R G B as Pillow and NumPy have them, and gives logits [N, classes]; it is in eval mode
    and has `class_names` and `preprocessing`. Loading runs no code from the file. Raises InputError when the file is missing,
    damaged or not ours.

        model = fastcifar.load("runs/se_resnet18-seed0/best.pt")
        name = model.class_names[model(torch.from_numpy(np.asarray(picture))[None]).argmax()]

    Args:
        kernels: as in `fastcifar.create_model`; torch, PyTorch's operations alone, is what tracing needs.
    """
    path, device = Path(path), torch.device(device)
    checkpoint = load_checkpoint(path, device)
    model = build_model(
        checkpoint.arch,
        len(checkpoint.class_names),
        squeeze_excitation=checkpoint.squeeze_excitation,
        stem_stride=checkpoint.stem_stride,
        kernels=kernels,
    )
    try:
        require_fits(path, checkpoint, model)
        model.load_state_dict(checkpoint.average or checkpoint.model)
    except RuntimeError:
        raise InputError(f"{path} does not fit arch {checkpoint.arch}: use another checkpoint, or train again") from None
    return Trained(place(model, device).eval(), checkpoint, device)


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
