#!/usr/bin/env python3
"""Writes CIFAR's official pickles, or pictures, as `train.beton` and `test.beton` with manifests, and reads every byte back.

python data_prep/write_beton.py                          # finds the data, or downloads it, or draws a synthetic dataset
python data_prep/write_beton.py --source DIR --out data/beton
python data_prep/write_beton.py --dataset cifar100
python data_prep/write_beton.py --source FOLDER --size 64  # your own pictures: a folder for each class, or a NumPy archive
python data_prep/write_beton.py --synthetic              # a synthetic dataset: ten drawn shapes
python data_prep/write_beton.py --check                  # writes nothing: do the betons still hold what was in their pickles?
"""

import hashlib
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.error import URLError

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from data_prep import beton_writer, cifar_pickles, own_pictures, synthetic
from data_prep.beton_writer import PAGE
from data_prep.cifar_pickles import LAYOUTS, Layout
from fastcifar import __version__
from fastcifar.arguments import parse_arguments
from fastcifar.beton import Beton, Manifest, channel_statistics, check_statistics, in_parts, parse, printable, read_beton
from fastcifar.errors import InputError, run_command
from fastcifar.files import atomic_path
from fastcifar.versions import installed

TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
DATA = Path("data")  # where pickles are looked for and downloaded to


@dataclass(frozen=True)
class Options:
    """Write CIFAR's pickles, or pictures, as FFCV .beton files with manifests; an intact, matching beton is left alone."""

    # folder with the official pickles; default: $CIFAR_DIR, then data/, then a download. For other data a folder with a folder
    # of pictures for each class, which may stand in train/ and test/ (or val/), or a NumPy archive (.npz)
    source: Path | None = None
    size: str | None = None  # pictures: cropped about their centre and resized to so many pixels, 64 or WIDTHxHEIGHT, 96x64
    test_fraction: float = 0.1  # pictures without test/ or val/: share of each class held out for testing, above 0, below 1
    skip_bad: bool = False  # pictures: leave out and name those that cannot be used, instead of stopping
    out: Path = Path("data/beton")  # folder for train.beton, test.beton and their manifests
    dataset: Literal["cifar10", "cifar100"] = "cifar10"  # which official layout the pickles have
    name: str | None = None  # what reports call this data; default: the dataset's name, and whether it is the official archive
    synthetic: bool = False  # write a synthetic dataset instead of CIFAR: accuracy means nothing
    train_images: int = 50_000  # size of the synthetic training split, a multiple of 5
    test_images: int = 10_000  # size of the synthetic test split
    check: bool = False  # only compare the betons in --out with their manifests, and with their pickles where those are found
    force: bool = False  # write again even when an intact beton is there, and replace one made from other data

    def __post_init__(self) -> None:
        if self.check and self.force:
            raise InputError("--check writes nothing and --force writes all again: choose one")
        if self.synthetic and self.dataset != "cifar10":
            raise InputError("the synthetic dataset has ten classes: use --synthetic without --dataset cifar100")
        if not 0 < self.test_fraction < 1:
            raise InputError(f"test_fraction must be above 0 and below 1, got {self.test_fraction}")
        if self.train_images < 5 or self.train_images % 5:
            raise InputError(f"train_images must be a positive multiple of 5 (five pickles), got {self.train_images}")
        if self.test_images < 1:
            raise InputError(f"test_images must be at least 1, got {self.test_images}")


@dataclass(frozen=True)
class Source:
    """A folder with a complete set of pickles."""

    folder: Path
    synthetic: bool = False


def main() -> None:
    """Find the pickles, then write both splits."""
    options = parse_arguments(Options, "python data_prep/write_beton.py")
    console = Console(soft_wrap=True, highlight=False, markup=False)  # a name or path may hold brackets
    if options.check:
        check(options, console)
        return
    layout = LAYOUTS[options.dataset]
    if options.source is not None and not cifar_pickles.has_any(options.source, layout) and own_pictures.is_own(options.source):
        write_own(options, options.source, console)
        return
    if options.size is not None:
        raise InputError("--size is for pictures: name their folder with --source")
    source = find_source(options, layout, console)
    if source is None:
        console.print(f"{options.out} holds intact betons and no source was named: left alone")
        return
    for split in ("train", "test"):
        write_split(options, split, part_of_pickles(options, layout, source, split), console)


def find_source(options: Options, layout: Layout, console: Console) -> Source | None:
    """Return the pickles by order of preference; None when intact betons are there and nothing else is at hand."""
    if options.synthetic:
        return make_synthetic(options, console)
    named = options.source or (Path(os.environ["CIFAR_DIR"]) if os.environ.get("CIFAR_DIR") else None)
    if named is not None:
        return Source(cifar_pickles.find_pickles(named, layout))
    if cifar_pickles.is_complete(DATA / layout.folder, layout):
        return Source(DATA / layout.folder)
    if not options.force and all(existing(options.out / f"{split}.beton", options.dataset) for split in layout.splits):
        return None
    incomplete = (DATA / layout.folder).is_dir()  # an interrupted unpacking, which a download completes, or a mistake
    if download(options.dataset, console) or incomplete:
        return Source(cifar_pickles.find_pickles(DATA, layout))
    if options.dataset != "cifar10":
        raise InputError(f"{TITLES[options.dataset]} cannot be downloaded here: name its folder with --source")
    return make_synthetic(options, console)


def download(dataset: str, console: Console) -> bool:
    """Fetch and unpack the official archive into data/; False when there is no network.

    torchvision checks the md5 of the archive and of each file, and unpacks again what an interrupted attempt left incomplete.
    Raises InputError for an archive that is not the official one, OSError when the disk refuses.
    """
    import torchvision.datasets  # here, since it takes seconds and only a download needs it

    console.print(f"downloading {TITLES[dataset]} into {DATA}/ (170 MB)")
    socket.setdefaulttimeout(20)  # seconds without a byte; a dropped connection must not hang the command
    try:
        kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[dataset]
        kind(root=str(DATA), download=True)
    except RuntimeError as error:  # torchvision's word for a wrong md5
        raise InputError(f"{DATA}: {error}; delete the archive there and try again, or name the data with --source") from None
    except (URLError, TimeoutError, ConnectionError) as error:  # no network, or a proxy's refusal
        console.print(f"no download: {' '.join(str(error).split())}")
        return False
    return True


def make_synthetic(options: Options, console: Console) -> Source:
    """Draw the synthetic dataset's pickles under data/synthetic-*/ unless they are there already."""
    console.print(synthetic.NAME, style="bold yellow")
    sizes = {"train": options.train_images, "test": options.test_images}
    folder = DATA / f"synthetic-{sizes['train']}-{sizes['test']}"
    if options.force or not (folder / "batches.meta").is_file():  # it is written last
        with progress(console) as bar:
            task = bar.add_task("drawing the synthetic dataset", total=sum(sizes.values()))
            for drawn in synthetic.write_pickles(folder, train=sizes["train"], test=sizes["test"]):
                bar.advance(task, drawn)
    return Source(folder, synthetic=True)


def check(options: Options, console: Console) -> None:
    """Compare both betons with their manifests, and with their pickles where those are found. Raises InputError."""
    betons = {split: read_beton(options.out / f"{split}.beton") for split in ("train", "test")}
    manifest = betons["train"].manifest
    if manifest.dataset == "own":
        for split, beton in betons.items():
            check_statistics(options.out / f"{split}.beton", beton.manifest, in_parts(beton.images))
            console.print(f"{options.out / split}.beton: {beton.manifest.count:,} images, hash and statistics right")
        return
    layout = LAYOUTS[manifest.dataset]
    named = options.source or (Path(os.environ["CIFAR_DIR"]) if os.environ.get("CIFAR_DIR") else None)
    if named is not None:
        folder: Path | None = cifar_pickles.find_pickles(named, layout)
    else:
        train, test = (beton.manifest.count for beton in betons.values())
        usual = DATA / (f"synthetic-{train}-{test}" if manifest.synthetic else layout.folder)
        folder = usual if cifar_pickles.is_complete(usual, layout) else None
    for split, beton in betons.items():
        path = options.out / f"{split}.beton"
        check_statistics(path, beton.manifest, in_parts(beton.images))
        compared = "no pickles at hand to compare with"
        if folder is not None:
            compare(path, beton, folder, layout)
            compared = f"byte for byte as in {folder}"
        console.print(f"{path}: {beton.manifest.count:,} images, {beton.manifest.name}, hash and statistics right, {compared}")


def compare(path: Path, beton: Beton, folder: Path, layout: Layout) -> None:
    """Raise InputError unless the pickles in `folder` are those the beton was made of, and hold what it holds."""
    manifest = beton.manifest
    expected, algorithm = (manifest.source_sha256, "sha256") if manifest.source_sha256 else (manifest.source_md5, "md5")
    found = cifar_pickles.digests(folder, layout, manifest.split, algorithm)
    changed = [name for name in found if found[name] != expected.get(name)]
    if changed:
        raise InputError(
            f"{folder / changed[0]} does not have the {algorithm} of what {path} was made of: "
            "name the right folder with --source, or get the file again"
        )
    data = cifar_pickles.read_split(folder, layout, manifest.split)
    same = np.array_equal(beton.images, data.images) and np.array_equal(beton.labels, data.labels)
    if not same or beton.manifest.class_names != data.class_names:
        raise InputError(f"{path} does not hold what is in {folder}: write it again with --force")


def existing(path: Path, dataset: str | None = None) -> Manifest | None:
    """The manifest of an intact beton (of `dataset`), None when there is none."""
    try:
        manifest = read_beton(path).manifest
    except InputError:
        return None
    return manifest if dataset in (None, manifest.dataset) else None


@dataclass(frozen=True)
class Part:
    """What becomes one split's beton."""

    source: Path
    dataset: str
    name: str
    md5: dict[str, str]  # of what it is made of
    sha256: dict[str, str]
    read: Callable[[], cifar_pickles.Split]
    official: bool = False
    synthetic: bool = False
    channels: int = 3


def write_own(options: Options, source: Path, console: Console) -> None:
    """Write both splits of pictures or of an archive. Raises InputError."""
    size = None if options.size is None else own_pictures.parse_size(options.size)
    with progress(console) as bar:
        task = bar.add_task(f"reading {source.name}")
        advance: Callable[[int], None] = lambda total: bar.update(task, total=total, advance=1)  # noqa: E731
        found = own_pictures.read_splits(source, size, options.test_fraction, options.skip_bad, advance)
    bad = list(dict.fromkeys(line for part in found.values() for line in part.bad))
    for line in bad:
        console.print(f"left out: {printable(line)}", style="yellow")
    if bad:
        console.print(f"{len(bad):,} pictures left out", style="yellow")
    name = printable(options.name or source.resolve().name)
    for split, part in found.items():
        content = [part.images.data, part.labels.data, "\n".join(part.class_names).encode()]
        md5, sha256 = ({printable(source.name): _digest(algorithm, content)} for algorithm in ("md5", "sha256"))
        made = Part(
            source,
            "own",
            name,
            md5,
            sha256,
            partial(cifar_pickles.Split, part.images, part.labels, part.class_names),
            channels=part.channels,
        )
        write_split(options, split, made, console)


def _digest(algorithm: str, content: list[Any]) -> str:
    digest = hashlib.new(algorithm, usedforsecurity=False)
    for part in content:
        digest.update(part)
    return digest.hexdigest()


def part_of_pickles(options: Options, layout: Layout, source: Source, split: str) -> Part:
    """One split of the pickles, not read yet."""
    md5, sha256 = (cifar_pickles.digests(source.folder, layout, split, algorithm) for algorithm in ("md5", "sha256"))
    official = cifar_pickles.is_official(md5, layout)
    name = printable(options.name) if options.name else _default_name(options.dataset, official, source.synthetic)
    read = partial(cifar_pickles.read_split, source.folder, layout, split)
    return Part(source.folder, options.dataset, name, md5, sha256, read, official, source.synthetic)


def write_split(options: Options, split: str, part: Part, console: Console) -> None:
    """Write one split's beton and manifest, unless an intact one of the same source is there.

    Raises InputError when the file there is intact, was made from other data and is not synthetic, since that would be lost.
    """
    path = options.out / f"{split}.beton"
    old = existing(path)
    if old is not None and not options.force:
        if old.source_md5 == part.md5 and old.dataset == part.dataset and old.name == part.name:
            console.print(f"{path}: intact, left alone ({old.count:,} images, {old.name})")
            return
        if old.source_md5 != part.md5 and not old.synthetic:
            raise InputError(f"{path} holds other data ({old.name}): choose another --out, or --force to replace it")
    if not part.official and not part.synthetic and part.dataset != "own":
        console.print(f"{part.source}: not the official archive (md5 differs); going on", style="yellow")
    data = part.read()
    mean, std = channel_statistics(in_parts(data.images))
    _require_space(options.out, data.images.nbytes)

    with atomic_path(path) as partial_path:
        with progress(console) as bar:
            task = bar.add_task(f"writing {path.name}", total=len(data.images))
            beton_writer.write(partial_path, data.images, data.labels, lambda written: bar.advance(task, written))
        written = verify(partial_path, data)
        manifest = Manifest(
            dataset=part.dataset,
            split=split,
            name=part.name,
            count=len(data.images),
            class_names=data.class_names,
            mean=mean,
            std=std,
            sha256=written,
            official=part.official,
            synthetic=part.synthetic,
            source_md5=part.md5,
            source_sha256=part.sha256,
            versions={"fastcifar": __version__, **installed("numpy")},
            height=data.images.shape[1],
            width=data.images.shape[2],
            channels=part.channels,
        )
    manifest.save(path)
    console.print(f"{path}: {manifest.count:,} images, {manifest.name}, read back byte for byte")


def verify(path: Path, data: cifar_pickles.Split) -> str:
    """Read the file just written, compare every byte with the source, return its sha256."""
    content = path.read_bytes()
    images, labels, index = parse(content, path)
    same = np.array_equal(images, data.images) and np.array_equal(labels, data.labels)
    if not same or not np.array_equal(index, np.arange(len(labels))):
        raise InputError(f"{path} does not read back as it was written: check the disk, then run again")
    return hashlib.sha256(content).hexdigest()


def progress(console: Console) -> Progress:
    """A bar with counts and time; on anything but a terminal it stays silent."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _default_name(dataset: str, official: bool, is_synthetic: bool) -> str:
    if is_synthetic:
        return synthetic.NAME
    return TITLES[dataset] if official else f"{TITLES[dataset]} (not the official archive)"


def _require_space(folder: Path, pixels: int) -> None:
    """Raise InputError when the disk has no room for `pixels` bytes of images with tables and page padding."""
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = pixels + pixels // 40 + 2 * PAGE, shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{folder}: {needed >> 20} MB are needed and {free >> 20} MB are free: free some space or choose another --out"
        )


if __name__ == "__main__":
    run_command(main)
