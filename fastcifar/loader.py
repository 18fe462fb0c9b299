"""`fastcifar.Loader` and `fastcifar.augment`: training's batches, for a training loop of your own.

What is drawn and computed is `fastcifar.batches`, which training itself runs: the same seed gives the same pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
from torch import Tensor

from fastcifar.augmentation import Augmentation, draw
from fastcifar.augmentation import augment as augment_set
from fastcifar.batches import Batches, choose_augmentation
from fastcifar.beton import LARGEST, MOST_CLASSES, SMALLEST, channel_statistics, in_parts, load_manifest
from fastcifar.dataset import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    AnySet,
    ResidentSet,
    StreamedSet,
    load_resident,
    load_streamed,
    normalisation,
)
from fastcifar.device import choose_device
from fastcifar.distributed import World
from fastcifar.epoch_tables import EpochPlan
from fastcifar.pictures import read_folder
from fastcifar.streaming import BatchRing
from kernels.backends import FLOATS, describe

Batch = tuple[Tensor, ...]
UNCHANGED = Augmentation(crop_padding=0, flip="off")
SHARE = 0.5  # of the free memory that a resident set may take


class Loader:
    """Batches of augmented, normalised images, made where the images are: (images, labels).

    images: [B, 3, H, W] of `dtype`, channels_last. labels: [B] int64. With mixup or CutMix: (images, labels, partner_labels,
    lam), where image i is mixed with the next of its batch and the loss is lam loss(labels) + (1 - lam) loss(partner_labels).

    Raises ValueError for what does not fit, InputError for a file or an augmentation that does not.

    Args:
        source: a `.beton` file that data_prep/write_beton.py or FFCV wrote, with its manifest. Images from elsewhere:
            `from_arrays`, `from_folder`, `from_dataset`.
        batch_size: images of a batch, in this process.
        augmentation: what happens to an image, in pixels of the data; None: nothing but normalisation.
        device: where the images live and the batches are made: "auto", "cpu" or "cuda".
        seed: of order and augmentation, 0..2^63-1. A sample's pixels depend on (seed, epoch, its number) alone.
        dtype: torch.float32, torch.bfloat16 or torch.float16.
        shuffle: a new order every epoch; False: the data's.
        drop_last: leave out the last, smaller batch of an epoch.
        stream: True leaves the images in their file; None does where they would take more than half of the free memory.
        mean: of normalisation, R, G, B in 0..1; None: CIFAR-10's own for CIFAR-10, else that of the data. A loader of test
            images should be given that of the training images: `mean=train.mean, std=train.std`.
        std: likewise.
        class_names: in the order of the labels; None: those of the file, else numbers.
        epochs: of the whole training, over which `mixup_alpha_end` is reached; else not needed.
        rank: of this process, which has its own part of every batch of `batch_size * world_size`.
        world_size: how many processes there are.
        verify: compare the file's sha256 with its manifest's.

    Examples:
        >>> import fastcifar, torch
        >>> images, labels = torch.randint(256, (100, 32, 32, 3), dtype=torch.uint8), torch.arange(100) % 10
        >>> loader = fastcifar.Loader.from_arrays(images, labels, batch_size=32, augmentation=fastcifar.Augmentation(cutout=8))
        >>> for images, labels in loader:
        ...     print(list(images.shape), images.dtype, list(labels.shape))
        [32, 3, 32, 32] torch.float32 [32]
        [32, 3, 32, 32] torch.float32 [32]
        [32, 3, 32, 32] torch.float32 [32]
    """

    def __init__(
        self,
        source: str | Path | ResidentSet,
        batch_size: int = 128,
        augmentation: Augmentation | None = None,
        *,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        shuffle: bool = True,
        drop_last: bool = True,
        stream: bool | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        class_names: Sequence[str] | None = None,
        epochs: int = 0,
        rank: int = 0,
        world_size: int = 1,
        verify: bool = True,
    ) -> None:
        where, settings = choose_device(device), augmentation or UNCHANGED
        _require(dtype in FLOATS, "dtype", f"one of {FLOATS}", dtype)
        _require(0 <= seed < 2**63, "seed", "0..2^63-1", seed)
        _require(batch_size >= 1, "batch_size", "at least 1", batch_size)
        _require(0 <= rank < world_size, "rank", f"0..world_size - 1 ({world_size - 1})", rank)
        moves = settings.mixup_alpha > 0 and settings.mixup_alpha_end is not None
        _require(epochs >= 0 and not (moves and epochs == 0), "epochs", "at least 1 where mixup_alpha_end is set", epochs)
        data, names, own = _loaded(source, where, stream, verify)
        self.class_names = list(class_names or names)
        measured = own() if mean is None or std is None else (mean, std)
        self.mean, self.std = tuple(mean or measured[0]), tuple(std or measured[1])
        for name, values in (("mean", self.mean), ("std", self.std)):
            _require(len(values) == 3 and all(0 <= v <= 1 for v in values), name, "three numbers in 0..1", values)
        _require(min(self.std) > 0, "std", "above 0: a channel that is the same everywhere cannot be normalised", self.std)
        statistics = (torch.tensor(values, dtype=torch.float32, device=where) for values in (self.mean, self.std))
        kernels: Literal["triton", "auto"] = "triton" if where.type == "cuda" else "auto"
        self._batches = Batches(data, settings, *statistics, seed=seed, dtype=dtype, kernels=kernels)
        self.batch_size, self.shuffle, self.drop_last, self.epochs = batch_size, shuffle, drop_last, epochs
        self.rank, self.world_size = rank, world_size
        _require(len(self) > 0, "batch_size", f"at most {len(data) // world_size} for {len(data)} images", batch_size)
        self._next = (0, 0)  # epoch and batch with which the next iteration begins
        self._reached = (0, 0)

    @classmethod
    def from_arrays(cls, images: Any, labels: Any, batch_size: int = 128, *arguments: Any, **options: Any) -> "Loader":
        """Images [N, H, W, 3] or, grey, [N, H, W] uint8 and labels [N] integers, of NumPy or PyTorch; the rest as for `Loader`.

        Raises ValueError naming what does not fit.
        """
        pixels, numbers = torch.as_tensor(images), torch.as_tensor(labels)
        if pixels.ndim == 3:
            pixels = pixels[..., None].expand(-1, -1, -1, 3)
        sides = pixels.ndim == 4 and all(SMALLEST <= side <= LARGEST for side in pixels.shape[1:3])
        fits = sides and len(pixels) > 0 and pixels.shape[3] == 3 and pixels.dtype == torch.uint8
        _require(fits, "images", f"uint8 [N, H, W, 3] or [N, H, W], H and W {SMALLEST}..{LARGEST}", describe(pixels))
        whole = not numbers.is_floating_point() and list(numbers.shape) == [len(pixels)]
        _require(whole, "labels", f"whole numbers [{len(pixels)}]", describe(numbers))
        _require(0 <= int(numbers.min()) <= int(numbers.max()) < MOST_CLASSES, "labels", f"0..{MOST_CLASSES - 1}", numbers)
        data = ResidentSet(pixels.contiguous(), numbers.to(torch.int64), torch.arange(len(pixels)))
        return cls(data, batch_size, *arguments, **options)

    @classmethod
    def from_folder(
        cls, folder: str | Path, batch_size: int = 128, *arguments: Any, size: tuple[int, int] | None = None, **options: Any
    ) -> "Loader":
        """Pictures in a folder for each class, all decoded into memory; the rest as for `Loader`.

        size: (height, width) to which pictures are cropped about their centre and resized; None: all must have one size.
        Raises InputError naming the picture that cannot be used.
        """
        found = read_folder(Path(folder), size)
        return cls.from_arrays(found.images, found.labels, batch_size, *arguments, class_names=found.class_names, **options)

    @classmethod
    def from_dataset(cls, dataset: Any, batch_size: int = 128, *arguments: Any, **options: Any) -> "Loader":
        """A map-style dataset, as torchvision's, of (picture, label), all of one size; the rest as for `Loader`.

        Its `transform` must leave pictures as they are: PIL pictures or uint8 arrays [H, W, 3] or [H, W].
        """
        samples = [dataset[number] for number in range(len(dataset))]
        pictures = [np.asarray(picture.convert("RGB") if hasattr(picture, "convert") else picture) for picture, _ in samples]
        kinds = sorted({f"{picture.dtype} {list(picture.shape)}" for picture in pictures})
        _require(len(kinds) == 1, "dataset", "pictures of one size", ", ".join(kinds[:3]) or "none")
        options.setdefault("class_names", getattr(dataset, "classes", None))
        return cls.from_arrays(np.stack(pictures), [int(label) for _, label in samples], batch_size, *arguments, **options)

    def __len__(self) -> int:
        """Batches of an epoch, in this process."""
        count, together = len(self._batches.data), self.batch_size * self.world_size
        return count // together + (not self.drop_last and count % together > self.rank)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of an epoch: the one after the last begun, that of `set_epoch`, or the rest of the one loaded."""
        (epoch, first), batches = self._next, self._batches
        self._next, self._reached = (epoch + 1, 0), (epoch, first)
        data, settings = batches.data, batches.augmentation
        order = batches.order(epoch) if self.shuffle else torch.arange(len(data), device=batches.mean.device)
        rows = self._own(order)
        plan = batches.plan(epoch, len(rows), min(1.0, epoch / self.epochs) if self.epochs else 0.0)
        streams = isinstance(data, StreamedSet)
        made = self._streamed(rows, first, plan) if streams else self._resident(rows, first, plan)
        for number, prepared in enumerate(made, start=first):
            images, labels, partner_labels = (values[: self.batch_size] for values in prepared)
            self._reached = (epoch, number + 1) if number + 1 < len(rows) else (epoch + 1, 0)
            yield (images, labels, partner_labels, plan.mixing.lam[number]) if settings.mixes else (images, labels)

    def _own(self, order: Tensor) -> list[Tensor]:
        """The positions of this process's batches; where images are mixed with others', one more than it gives out."""
        together = self.batch_size * self.world_size
        whole = len(order) // together
        batches, successor = order[: whole * together].view(whole, together), self.world_size > 1
        rows = World(self.rank, size=self.world_size).share(batches, successor=successor and self._batches.augmentation.mixes)
        rest = order[whole * together :].tensor_split(self.world_size)[self.rank]
        return [*rows, *([rest] if len(rest) and not self.drop_last else [])]

    def _resident(self, rows: list[Tensor], first: int, plan: EpochPlan) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        data = self._batches.data
        assert isinstance(data, ResidentSet)
        for number in range(first, len(rows)):
            yield self._batches.prepare(data, rows[number], plan, plan.mixing.blend[number], plan.mixing.box[number])

    def _streamed(self, rows: list[Tensor], first: int, plan: EpochPlan) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The next batch is read while this one is in use."""
        data, whole = self._batches.data, sum(len(row) >= self.batch_size for row in rows)
        assert isinstance(data, StreamedSet)
        ring = BatchRing(data, len(rows[0]))
        if first < whole:
            ring.begin(torch.stack(rows[:whole]), first)
        for number in range(first, len(rows)):
            positions, mixing = rows[number], plan.mixing
            drawn = replace(plan, draws=plan.draws.at(positions))
            places = torch.arange(len(positions), device=positions.device)
            if number < whole:
                cursor = torch.full((1,), number, device=positions.device)
                with ring.turn(number):
                    batch = self._batches.prepare(
                        ring.batch(cursor, positions), places, drawn, mixing.blend[number], mixing.box[number]
                    )
            else:
                batch = self._batches.prepare(data.fetch(positions), places, drawn, mixing.blend[number], mixing.box[number])
            yield batch

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be epoch `epoch`, from 0; otherwise they count up by themselves."""
        _require(epoch >= 0, "epoch", "0 or more", epoch)
        self._next = self._reached = (epoch, 0)

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, also within an epoch: after the batch that was given out last."""
        epoch, batch = self._reached
        return {"epoch": epoch, "batch": batch, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on where `state` was taken. Raises ValueError for that of another loader."""
        for name, value in self._identity().items():
            _require(state.get(name) == value, f"the state's {name}", f"this loader's ({value})", state.get(name))
        self._next = self._reached = (int(state["epoch"]), int(state["batch"]))

    def _identity(self) -> dict[str, Any]:
        names = ("batch_size", "shuffle", "drop_last", "world_size")
        return {"seed": self._batches.seed, "samples": len(self._batches.data), **{name: getattr(self, name) for name in names}}


def augment(
    images: Tensor,
    augmentation: Augmentation,
    *,
    samples: Tensor,
    epoch: int = 0,
    seed: int = 0,
    mean: Sequence[float] = CIFAR10_MEAN,
    std: Sequence[float] = CIFAR10_STD,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Augment and normalise a batch you already have: uint8 [B, H, W, 3] to `dtype` [B, 3, H, W], channels_last.

    Mixing needs labels and is the `Loader`'s. Raises ValueError for what does not fit.

    Args:
        samples: [B] int64, each image's own number, by which its augmentation is drawn.
        epoch: likewise, from 0.
        seed: likewise, 0..2^63-1.
        mean: of normalisation, R, G, B in 0..1.
        std: likewise.

    Examples:
        >>> import fastcifar, torch
        >>> images = torch.randint(256, (16, 32, 32, 3), dtype=torch.uint8)
        >>> fastcifar.augment(images, fastcifar.Augmentation(cutout=8), samples=torch.arange(16), epoch=3).shape
        torch.Size([16, 3, 32, 32])
    """
    fits = images.ndim == 4 and all(SMALLEST <= side <= LARGEST for side in images.shape[1:3])
    _require(fits, "images", f"uint8 [B, H, W, 3], H and W {SMALLEST}..{LARGEST}", describe(images))
    numbered = samples.shape == images.shape[:1] and samples.dtype == torch.int64
    _require(numbered, "samples", f"int64 [{len(images)}]", describe(samples))
    _require(not augmentation.mixes, "augmentation", "one without mixup and CutMix, which the Loader has", augmentation)
    size, device = (images.shape[1], images.shape[2]), images.device
    augmentation.require_fits(size)
    drawn = draw(augmentation, samples, seed, epoch, size)
    data = ResidentSet(images, torch.zeros(len(images), dtype=torch.int64, device=device), samples)
    statistics = (torch.tensor(values, dtype=torch.float32, device=device) for values in (mean, std))
    backend = choose_augmentation(augmentation, "triton" if device.type == "cuda" else "auto", device)
    positions = torch.arange(len(images), device=device)
    return augment_set(augmentation, data, positions, drawn, *statistics, backend=backend, dtype=dtype)[0]


def _loaded(
    source: str | Path | ResidentSet, device: torch.device, stream: bool | None, verify: bool
) -> tuple[AnySet, list[str], Callable[[], Sequence[Sequence[float]]]]:
    """The set on its device, its classes' names, and what finds its mean and deviation."""
    if isinstance(source, ResidentSet):
        _require(not stream, "stream", "None or False for images that are in memory already", stream)
        names = [str(number) for number in range(int(source.labels.max()) + 1)]
        on_device = (values.to(device) for values in (source.images, source.labels, source.index))
        return ResidentSet(*on_device), names, lambda: channel_statistics(in_parts(source.images.cpu().numpy()))
    path = Path(source)
    manifest = load_manifest(path)
    if stream is None:
        stream = 3 * manifest.height * manifest.width * manifest.count > SHARE * _free_memory(device)
    data, _ = (load_streamed if stream else load_resident)(path, device, verify=verify)
    return data, manifest.class_names, partial(normalisation, manifest)


def _free_memory(device: torch.device) -> int:
    """Bytes."""
    return int(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available)


def _require(condition: bool, name: str, allowed: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {allowed}, got {value}")
