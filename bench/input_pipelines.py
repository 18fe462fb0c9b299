"""A folder of betons and a recipe enter; peers leave that each deliver augmented, normalised batches, ready to be timed.

Each peer is a function that delivers `images` training images in batches and returns when the last one is there. All
normalise to float32 but FFCV's own, which stops at uint8.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms as v1
from PIL import Image
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from bench.timing import Timings, interleaved
from fastcifar.augmentation import Augmentation, Backend, augment, draw
from fastcifar.dataset import CIFAR10_MEAN, CIFAR10_STD, ResidentSet, epoch_order, load_resident
from fastcifar.recipes import reported
from kernels.augment import augment as kernels_augment

WORKERS = 2
LOADER, FFCV = "torchvision DataLoader", "FFCV"

# What is measured: the reports' augmentations, and what FFCV's own pipeline can do.
PIPELINES: dict[str, Augmentation] = {
    "crop + flip (A, B, E)": reported("dropout_resnet24").recipe.augmentation,
    "crop + flip + cutout 8": Augmentation(cutout=8),
    "report D": reported("se_resnet18").recipe.augmentation,
    "report C": reported("robust_resnet64").recipe.augmentation,
}


@dataclass(frozen=True)
class Peer:
    """One way of delivering batches."""

    run: Callable[[], None]
    images: int  # delivered by a call
    note: str  # what a reader must know of it


def measure(name: str, folder: Path, batch_size: int, rounds: int, console: Console) -> dict[str, Any]:
    """Time one of `PIPELINES` against its peers, in turns, on the CPU; print and return the figures of each."""
    recipe = PIPELINES[name]
    many, few = (40, 8) if recipe.recolours else (80, 20)  # batches of a call: tenths of a second for the fast and the slow
    peers = peers_of(recipe, folder, batch_size, images=many * batch_size, slow_images=few * batch_size)
    timings = interleaved({peer: entry.run for peer, entry in peers.items()}, rounds=rounds, warmup=2)
    each = Timings({peer: [s / peers[peer].images for s in seconds] for peer, seconds in timings.seconds.items()})
    console.print(f"input pipeline: {name}; batch {batch_size}, mixing left out")
    results = {}
    for peer, entry in peers.items():
        rate, speedup = each.rate(peer, 1), each.speedup(peer, LOADER)
        results[peer] = {"images_per_second": rate, "times_dataloader": vars(speedup), "note": entry.note}
        line = f"{peer:>26}: {rate['median']:9,.0f} img/s (10-90 %: {rate['p10']:,.0f}-{rate['p90']:,.0f})"
        if peer != LOADER:
            line += f", {speedup} the DataLoader"
        if FFCV in peers and peer != FFCV:
            results[peer]["times_ffcv"] = vars(each.speedup(peer, FFCV))
            line += f", {each.speedup(peer, FFCV)} FFCV"
        console.print(f"{line}; {entry.note}")
    return results


def peers_of(recipe: Augmentation, folder: Path, batch_size: int, images: int, slow_images: int) -> dict[str, Peer]:
    """All peers that can do what `recipe` asks for (mixing left out, which all would do alike on the batch).

    images, slow_images: how many images a call delivers, of the fast peers and of those that work image by image; every peer
    has a set of just that size. Raises InputError when the beton holds fewer.
    """
    data, _ = load_resident(folder / "train.beton", torch.device("cpu"), limit=images)
    peers = {
        "fastcifar": Peer(_ours(recipe, data, batch_size, "numba"), images, "Numba, as training uses; JIT not counted"),
        "fastcifar in PyTorch": Peer(_ours(recipe, data, batch_size, "torch"), images, "the same pixels, eager"),
    }
    if not (recipe.recolours or recipe.random_erasing):
        peers["kernels.augment"] = Peer(_fused(recipe, data, batch_size), images, "Numba, draws for itself, bf16")
    peers[LOADER] = Peer(
        _torchvision_loader(recipe, data, batch_size, slow_images), slow_images, f"PIL transforms, {WORKERS} workers"
    )
    peers["torchvision v2 on batches"] = Peer(
        _torchvision_batches(recipe, data, batch_size, images), images, "wrong: draws once for the whole batch"
    )
    if find_spec("kornia") is not None and recipe.policy == "none":
        peers["kornia"] = Peer(_kornia(recipe, data, batch_size, images), images, "each image its own parameters")
    if not recipe.recolours:
        peers[FFCV] = Peer(_ffcv(recipe, folder, batch_size, images), images, "Numba, uint8, no normalisation; JIT not counted")
    return peers


def _ours(recipe: Augmentation, data: ResidentSet, batch_size: int, backend: Backend) -> Callable[[], None]:
    """The real path: drawing an epoch's parameters, gathering, augmenting, normalising."""
    mean, std = torch.tensor(CIFAR10_MEAN), torch.tensor(CIFAR10_STD)
    epoch = iter(range(1_000_000))

    def run() -> None:
        number, batch = next(epoch), None
        order, drawn = epoch_order(data.index, 0, number), draw(recipe, data.index, 0, number)
        for positions in order.split(batch_size):
            batch = augment(recipe, data.images, positions, drawn, mean, std, backend, batch)

    return run


def _fused(recipe: Augmentation, data: ResidentSet, batch_size: int) -> Callable[[], None]:
    """The kernel that draws, gathers, augments, normalises and labels in one call, to bf16 channels_last."""
    mean, std = torch.tensor(CIFAR10_MEAN), torch.tensor(CIFAR10_STD)
    epoch = iter(range(1_000_000))

    def run() -> None:
        number, batch = next(epoch), None
        order = epoch_order(data.index, 0, number)
        for cursor in range(0, len(order) - batch_size + 1, batch_size):
            batch = kernels_augment(
                data.images, data.labels, order, cursor, number, 0, batch_size=batch_size, index=data.index, mean=mean, std=std,
                padding=recipe.crop_padding, flip=recipe.flip, reflect=recipe.crop_mode == "reflect", cutout=recipe.cutout,
                out=batch,
            )  # fmt: skip

    return run


class Pictures(Dataset[tuple[Tensor, int]]):
    """What an ordinary script has: PIL images and a chain of transforms."""

    def __init__(self, data: ResidentSet, count: int, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images, self.labels, self.transform = data.images[:count].numpy(), data.labels[:count].tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[number])), self.labels[number]


def transforms_of(recipe: Augmentation, package: Any) -> tuple[list[Any], list[Any]]:
    """The recipe as torchvision transforms, before and after normalisation; `package` is transforms or transforms.v2."""
    before = [package.RandomCrop(32, padding=recipe.crop_padding), package.RandomHorizontalFlip()]
    if any(recipe.jitter):
        before.append(package.ColorJitter(*recipe.jitter))
    if recipe.policy == "rand_augment":
        before.append(package.RandAugment(recipe.policy_operations, recipe.policy_magnitude))
    if recipe.rotation:
        before.append(package.RandomRotation(recipe.rotation))
    after = [package.RandomErasing(recipe.random_erasing)] if recipe.random_erasing else []
    if recipe.cutout:
        after.append(_Cutout(recipe.cutout))
    return before, after


class _Cutout:
    """Cutout as scripts write it, since torchvision has none: one square on a tensor [..., 32, 32]."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, x: Tensor) -> Tensor:
        row, column = np.random.randint(32, size=2)  # noqa: NPY002  # as scripts do
        top, left = max(row - self.side // 2, 0), max(column - self.side // 2, 0)
        x[..., top : row + self.side // 2, left : column + self.side // 2] = 0
        return x


def _torchvision_loader(recipe: Augmentation, data: ResidentSet, batch_size: int, images: int) -> Callable[[], None]:
    before, after = transforms_of(recipe, v1)
    chain = v1.Compose([*before, v1.ToTensor(), v1.Normalize(CIFAR10_MEAN, CIFAR10_STD), *after])
    loader = DataLoader(
        Pictures(data, images, chain), batch_size, shuffle=True, num_workers=WORKERS, persistent_workers=True, drop_last=True
    )
    return partial(_exhaust, loader)


def _torchvision_batches(recipe: Augmentation, data: ResidentSet, batch_size: int, images: int) -> Callable[[], None]:
    before, after = transforms_of(recipe, v2)
    scale = v2.ToDtype(torch.float32, scale=True)
    chain = v2.Compose([*before, scale, v2.Normalize(CIFAR10_MEAN, CIFAR10_STD), *after])
    planes = data.images[:images].permute(0, 3, 1, 2).contiguous()

    def run() -> None:
        for positions in torch.randperm(images).split(batch_size):
            chain(planes[positions])

    return run


def _kornia(recipe: Augmentation, data: ResidentSet, batch_size: int, images: int) -> Callable[[], None]:
    from kornia import augmentation as K  # as kornia's own documentation does

    steps = [K.RandomCrop((32, 32), padding=recipe.crop_padding), K.RandomHorizontalFlip()]
    if any(recipe.jitter):
        steps.append(K.ColorJitter(*recipe.jitter, p=1.0))
    if recipe.cutout:
        area = recipe.cutout**2 / 32**2
        steps.append(K.RandomErasing(scale=(area, area), ratio=(1.0, 1.0), p=1.0))
    chain = torch.nn.Sequential(*steps, K.Normalize(CIFAR10_MEAN, CIFAR10_STD))
    planes = data.images[:images].permute(0, 3, 1, 2).contiguous()

    def run() -> None:
        for positions in torch.randperm(images).split(batch_size):
            chain(planes[positions].float() / 255)

    return run


def _ffcv(recipe: Augmentation, folder: Path, batch_size: int, images: int) -> Callable[[], None]:
    with own_threads():
        from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.transforms import Cutout, RandomHorizontalFlip, RandomTranslate, ToTensor

        steps = [SimpleRGBImageDecoder(), RandomHorizontalFlip(), RandomTranslate(padding=recipe.crop_padding)]
        steps += [Cutout(recipe.cutout, tuple(int(255 * mean) for mean in CIFAR10_MEAN))] if recipe.cutout else []
        loader = Loader(
            str(folder / "train.beton"),
            batch_size=batch_size,
            num_workers=WORKERS,
            order=OrderOption.RANDOM,
            os_cache=True,
            drop_last=True,
            indices=range(images),
            pipelines={"image": [*steps, ToTensor()], "label": [IntDecoder(), ToTensor()], "index": None},
        )

    def run() -> None:
        with own_threads():
            _exhaust(loader)

    return run


@contextmanager
def own_threads() -> Iterator[Callable[[], None]]:
    """Restore PyTorch's and Numba's numbers of threads, which FFCV sets for the whole process; what it yields does so too."""
    import numba  # here, since only FFCV's peer needs it

    threads, numba_threads = torch.get_num_threads(), numba.get_num_threads()

    def restore() -> None:
        torch.set_num_threads(threads)
        numba.set_num_threads(numba_threads)

    try:
        yield restore
    finally:
        restore()


def _exhaust(loader: Any) -> None:
    for _ in loader:
        pass
