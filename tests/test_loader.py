"""`fastcifar.Loader` and `fastcifar.augment` in a loop of one's own: training's batches, and nothing that does not fit."""

import doctest
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import fastcifar
from fastcifar import loader as module
from fastcifar.augmentation import Augmentation
from fastcifar.command import load_data, parse_command
from fastcifar.dataset import CIFAR10_MEAN, CIFAR10_STD
from fastcifar.models import ARCHITECTURES
from fastcifar.recipes import RECIPES
from fastcifar.state import build_state, build_step

rng = np.random.default_rng(0)
IMAGES, LABELS = rng.integers(0, 256, (50, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, 50)
MIXING = RECIPES["se_resnet18"].recipe.augmentation


def loader_of(**options):
    return fastcifar.Loader.from_arrays(IMAGES, LABELS, **{"batch_size": 16, "augmentation": Augmentation(), **options})


def same(some, others):
    some, others = list(some), list(others)
    return len(some) == len(others) and all(
        all(torch.equal(a, b) for a, b in zip(x, y, strict=True)) for x, y in zip(some, others, strict=True)
    )


def test_the_docstrings_examples_run():
    failed, attempted = doctest.testmod(module)
    assert failed == 0
    assert attempted >= 5


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "more", [(), ("--crop-mode", "reflect", "--cutout", "5", "--mixup-alpha", "0", "--flip", "alternating")]
)
def test_the_loaders_pixels_are_trainings(betons, monkeypatch, stream, more):
    """Those that the network of a training run is given, with mixing and without, resident and streamed."""
    row = replace(ARCHITECTURES["se_resnet18"], widths=(4, 8, 8, 16), blocks=(1, 1, 1, 1))
    monkeypatch.setitem(ARCHITECTURES, "se_resnet18", row)
    command = parse_command(["--data", str(betons), "--batch-size", "48", "--device", "cpu", "--seed", "5", *more])
    recipe, data = replace(command.settings, epochs=4), load_data(command, torch.device("cpu"))
    step = build_step(build_state(command.arch, recipe, command.run, data, torch.device("cpu")), recipe, command.run, data)
    seen, prepare = [], step.prepare
    monkeypatch.setattr(step, "_prepare", lambda *arguments: seen.append(prepare(*arguments)) or seen[-1])
    monkeypatch.setattr(step, "reuses", False)
    step.begin(1, [0.0] * 4, progress=0.25)
    for _ in range(4):
        step()
    loader = fastcifar.Loader(
        betons / "train.beton", 48, recipe.augmentation, device="cpu", seed=5, std=recipe.std, epochs=4, stream=stream
    )
    loader.set_epoch(1)
    if recipe.augmentation.mixes:
        assert torch.equal(torch.stack([batch[3] for batch in loader]), step.tables.scalars[:, 1].float())
        loader.set_epoch(1)
    assert same((batch[:3] for batch in loader), seen if recipe.augmentation.mixes else [batch[:2] for batch in seen])


def test_epochs_count_up_and_can_be_set():
    loader = loader_of()
    first, second = list(loader), list(loader)
    assert not same(first, second)
    assert same(loader_of(), first)
    again = loader_of()
    again.set_epoch(1)
    assert same(again, second)
    assert not same(loader_of(seed=1), first)


def test_an_epoch_goes_on_where_its_state_was_taken():
    whole, loader = list(loader_of()), loader_of()
    assert same([batch for _, batch in zip(range(2), loader, strict=False)], whole[:2])
    state, resumed = loader.state_dict(), loader_of()
    resumed.load_state_dict(state)
    assert same(resumed, whole[2:])
    assert resumed.state_dict() | {"epoch": 0, "batch": 2} == state
    assert (resumed.state_dict()["epoch"], resumed.state_dict()["batch"]) == (1, 0)
    for other in (loader_of(seed=3), loader_of(batch_size=8), fastcifar.Loader.from_arrays(IMAGES[:40], LABELS[:40], 16)):
        with pytest.raises(ValueError, match=r"the state's (seed|batch_size|samples) must be this loader's"):
            other.load_state_dict(state)


def test_the_last_batch_may_be_smaller():
    assert len(loader_of()) == len(list(loader_of())) == 3
    whole = loader_of(drop_last=False)
    sizes = [len(labels) for _, labels in whole]
    assert sizes == [16, 16, 16, 2]
    assert len(whole) == 4
    assert same(list(loader_of(drop_last=False))[:3], loader_of())


@pytest.mark.parametrize(("drop_last", "alpha"), [(True, 0.0), (False, 0.0), (True, 0.4)])
def test_ranks_share_every_batch(drop_last, alpha):
    options = {"drop_last": drop_last, "augmentation": Augmentation(mixup_alpha=alpha)}
    ranks = [loader_of(batch_size=8, rank=rank, world_size=2, **options) for rank in range(2)]
    parts = [list(loader) for loader in ranks]
    assert [len(loader) for loader in ranks] == [len(part) for part in parts] == [3 + (not drop_last)] * 2
    joined = [tuple(map(torch.cat, zip(*(batch[:3] for batch in some), strict=True))) for some in zip(*parts, strict=True)]
    assert same(joined, (batch[:3] for batch in loader_of(**options)))


def test_an_evaluation_sees_every_image_once_and_unchanged():
    loader = fastcifar.Loader.from_arrays(
        IMAGES, LABELS, 16, shuffle=False, drop_last=False, mean=CIFAR10_MEAN, std=CIFAR10_STD
    )
    images, labels = (torch.cat(part) for part in zip(*loader, strict=True))
    mean, std = (255 * torch.tensor(values)[:, None, None] for values in (CIFAR10_MEAN, CIFAR10_STD))
    assert np.array_equal((images * std + mean).round().permute(0, 2, 3, 1).numpy(), IMAGES)
    assert torch.equal(labels, torch.from_numpy(LABELS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_are_channels_last_and_of_the_dtype(dtype):
    for images, labels in loader_of(dtype=dtype):
        assert images.dtype == dtype
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == torch.int64
    assert len({images.data_ptr() for images, _ in list(loader_of())}) == 3  # a batch given out is not overwritten


def test_arrays_are_normalised_by_their_own_statistics():
    loader = loader_of(augmentation=None)
    np.testing.assert_allclose(loader.mean, IMAGES.mean((0, 1, 2)) / 255)
    np.testing.assert_allclose(loader.std, IMAGES.std((0, 1, 2)) / 255)
    assert loader.class_names == [str(number) for number in range(10)]


def test_datasets_and_folders_are_loaded_as_arrays(tmp_path):
    samples = [(Image.fromarray(image), int(label)) for image, label in zip(IMAGES, LABELS, strict=True)]
    dataset = type("Dataset", (list,), {"classes": list("abcdefghij")})(samples)
    loader = fastcifar.Loader.from_dataset(dataset, 16, Augmentation())
    assert same(loader, loader_of())
    assert loader.class_names == dataset.classes
    for number, (picture, label) in enumerate(samples):
        (tmp_path / f"class {label}").mkdir(exist_ok=True)
        picture.save(tmp_path / f"class {label}" / f"{number:03}.png")
    order = np.argsort(LABELS, kind="stable")
    folder = fastcifar.Loader.from_folder(tmp_path, 16, shuffle=False, drop_last=False)
    assert torch.equal(torch.cat([labels for _, labels in folder]), torch.from_numpy(LABELS[order]))
    assert folder.class_names == [f"class {number}" for number in range(10)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 51}, "batch_size must be at most 50 for 50 images, got 51"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, r"seed must be 0\.\.2\^63-1, got -1"),
        ({"dtype": torch.float64}, r"dtype must be one of .*float64"),
        ({"rank": 2, "world_size": 2}, r"rank must be 0\.\.world_size - 1 \(1\), got 2"),
        ({"std": (0.0, 1.0, 1.0)}, "std must be above 0"),
        ({"mean": (125.3, 123.0, 113.9)}, r"mean must be three numbers in 0\.\.1"),
        ({"augmentation": MIXING}, "epochs must be at least 1 where mixup_alpha_end is set, got 0"),
        ({"stream": True}, "stream must be None or False for images that are in memory already"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        loader_of(**options)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            IMAGES.astype(np.float32),
            LABELS,
            r"images must be uint8 \[N, H, W, 3\] or \[N, H, W\].*got \[50, 32, 32, 3\] float32",
        ),
        (IMAGES.transpose(0, 3, 1, 2), LABELS, r"images must be .*got \[50, 3, 32, 32\]"),
        (IMAGES[:, :7], LABELS, r"H and W 8\.\.256, got \[50, 7, 32, 3\]"),
        (IMAGES[:0], LABELS[:0], r"images must be"),
        (IMAGES, LABELS[:49], r"labels must be whole numbers \[50\], got \[49\]"),
        (IMAGES, LABELS.astype(float), r"labels must be whole numbers"),
        (IMAGES, LABELS - 1, r"labels must be 0\.\.65534"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(images, labels, message):
    with pytest.raises(ValueError, match=message):
        fastcifar.Loader.from_arrays(images, labels, 8)


def test_a_batch_at_hand_is_augmented_as_the_loader_would():
    settings, number = Augmentation(cutout=8), torch.arange(50)
    loader = loader_of(augmentation=settings, batch_size=50, shuffle=False)
    (expected, _), options = next(iter(loader)), {"mean": loader.mean, "std": loader.std}
    assert torch.equal(fastcifar.augment(torch.from_numpy(IMAGES), settings, samples=number, **options), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(4, 32, 32, 3)}, r"images must be contiguous \[4, 32, 32, 3\] uint8"),
        ({"images": torch.zeros(4, 3, 32, 32, dtype=torch.uint8)}, r"images must be uint8 \[B, H, W, 3\]"),
        ({"images": torch.zeros(4, 64, 32, 3, dtype=torch.uint8)[:, ::2]}, "images must be contiguous"),
        ({"images": torch.zeros(4, 32, 32, 4, dtype=torch.uint8)}, r"images must be contiguous \[4, 32, 32, 3\]"),
        ({"samples": torch.arange(5)}, r"samples must be int64 \[4\], got \[5\]"),
        ({"samples": torch.arange(4.0)}, r"samples must be int64 \[4\], got \[4\] float32"),
        ({"augmentation": Augmentation(mixup_alpha=1)}, "augmentation must be one without mixup"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(change, message):
    given = {"images": torch.zeros(4, 32, 32, 3, dtype=torch.uint8), "augmentation": Augmentation(), "samples": torch.arange(4)}
    with pytest.raises(ValueError, match=message):
        fastcifar.augment(**given | change)


@pytest.mark.slow
def test_importing_the_package_imports_no_torch():
    code = "import sys, fastcifar; print('torch' in sys.modules, sorted(fastcifar.__all__)); fastcifar.nothing"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.stdout.startswith("False ['Augmentation', 'Loader', 'augment'")
    assert "has no attribute 'nothing'" in process.stderr


def test_a_set_too_large_for_the_memory_is_streamed(betons, monkeypatch):
    for available, expected in ((10**12, "ResidentSet"), (200 * 3072, "StreamedSet")):
        monkeypatch.setattr(module.psutil, "virtual_memory", lambda available=available: SimpleNamespace(available=available))
        loader = fastcifar.Loader(betons / "train.beton", 48, device="cpu")
        assert type(loader._batches.data).__name__ == expected
