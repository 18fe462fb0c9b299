"""Sets on the device and streamed hold the same samples, refuse the same, and notice a file that changes under them."""

import os
import shutil
from dataclasses import replace

import pytest
import torch
from small_betons import VALID, Parts, manifest_of, small_beton

from fastcifar.beton import Manifest
from fastcifar.dataset import epoch_order, hold_out, load_resident, load_splits, load_streamed
from fastcifar.errors import InputError

CPU = torch.device("cpu")


@pytest.fixture
def train_beton(betons, tmp_path):
    """A beton of this test's own, to be damaged."""
    for name in ("train.beton", "train.json"):
        shutil.copy(betons / name, tmp_path / name)
    return tmp_path / "train.beton"


def test_batches_are_the_resident_sets(train_beton):
    (resident, _), (streamed, _) = (load(train_beton, CPU) for load in (load_resident, load_streamed))
    assert len(streamed) == len(resident) == 200
    for positions in epoch_order(resident.index, 0, 3).split(64):
        batch, expected = streamed.fetch(positions), resident.subset(positions)
        for name in ("images", "labels", "index"):
            assert torch.equal(getattr(batch, name), getattr(expected, name))


def test_limit_and_held_out_part_are_the_resident_sets(betons):
    splits = [
        load_splits(betons, CPU, limit_train=120, limit_test=10, val_fraction=0.25, seed=3, verify=True, stream=stream)
        for stream in (False, True)
    ]
    assert len(splits[1].train) == 90
    assert torch.equal(splits[0].train.index, splits[1].train.index)
    assert torch.equal(splits[0].select.images, splits[1].select.images)
    streamed, _ = load_streamed(betons / "train.beton", CPU)
    assert len(hold_out(streamed, 0.5, 0)[1].fetch(torch.arange(100))) == 100


@pytest.mark.parametrize("damage", ["flipped byte", "truncated", "empty", "no manifest", "missing", "too few"])
def test_a_damaged_file_is_refused_by_name(train_beton, damage):
    content, limit = bytearray(train_beton.read_bytes()), 0
    if damage == "flipped byte":
        content[len(content) // 2] ^= 1
        train_beton.write_bytes(content)
    elif damage in ("truncated", "empty"):
        train_beton.write_bytes(content[: len(content) // 2 if damage == "truncated" else 0])
    elif damage == "no manifest":
        train_beton.with_suffix(".json").unlink()
    elif damage == "missing":
        train_beton.unlink()
    else:
        limit = 201
    with pytest.raises(InputError, match="train"):
        load_streamed(train_beton, CPU, limit=limit)


def overwrite(path, content):
    with path.open("rb+") as file:
        file.write(content)


CHANGES = {
    "overwritten": lambda path: overwrite(path, small_beton(1)),
    "truncated": lambda path: os.truncate(path, len(VALID) // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "extended": lambda path: os.truncate(path, len(VALID) + 1),
}


@pytest.fixture
def small(tmp_path):
    """Two small betons."""
    for split, content in (("train", VALID), ("test", small_beton(1))):
        (tmp_path / f"{split}.beton").write_bytes(content)
        manifest_of(content, split).save(tmp_path / f"{split}.beton")
        os.utime(tmp_path / f"{split}.beton", (0, 0))  # some file systems' clocks tick only every few milliseconds
    return tmp_path


def splits(folder, stream=False, limit_train=0, **options):
    return load_splits(
        folder, CPU, limit_train=limit_train, limit_test=0, val_fraction=0.0, seed=0, verify=True, stream=stream, **options
    )


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_while_it_is_streamed_is_refused(small, change):
    streamed, _ = load_streamed(small / "train.beton", CPU)
    before = streamed.fetch(torch.arange(20))
    CHANGES[change](small / "train.beton")
    with pytest.raises(InputError, match=r"train\.beton changed while it was read"):
        streamed.subset(torch.arange(10)).fetch(torch.tensor([3]))
    assert torch.equal(before.labels, streamed.labels)


def test_a_file_replaced_by_another_is_streamed_on(small):
    streamed, _ = load_streamed(small / "train.beton", CPU)
    before = streamed.fetch(torch.arange(20)).images
    (small / "test.beton").replace(small / "train.beton")
    assert torch.equal(streamed.fetch(torch.arange(20)).images, before)
    (small / "train.beton").unlink()
    assert torch.equal(streamed.fetch(torch.arange(20)).images, before)


@pytest.mark.parametrize("stream", [False, True])
def test_a_split_under_the_others_name_is_refused(small, stream):
    for name in ("test.beton", "test.json"):
        shutil.copy(small / name, small / name.replace("test", "train"))
    with pytest.raises(InputError, match=r"train\.beton is the test split under another name"):
        splits(small, stream)
    replace(Manifest.load(small / "train.beton"), split="train").save(small / "train.beton")
    with pytest.raises(InputError, match=r"train\.beton and test\.beton are the same file"):
        splits(small, stream)


@pytest.mark.parametrize("stream", [False, True])
def test_test_images_that_are_training_images_are_counted(small, stream):
    assert splits(small, stream).warnings == []
    parts, others = Parts(small_beton(1)), Parts(VALID)
    images = [part.content[part.image["data_ptr"][0] :][: 20 * 3072] for part in (parts, others)]
    start = int(parts.image["data_ptr"][0])
    parts.content[start + 3072 : start + 4 * 3072] = images[1][15 * 3072 : 18 * 3072]  # three images, at other places
    parts.content[start + 10 * 3072 : start + 11 * 3072 - 1] = images[1][: 3072 - 1]  # all but its last byte
    (small / "test.beton").write_bytes(parts.content)
    manifest_of(bytes(parts.content), "test").save(small / "test.beton")
    assert splits(small, stream).warnings == ["3 of 20 test images are also training images: accuracy is too high"]
    assert splits(small, stream, limit_train=16).warnings[0].startswith("1 of 20")  # of those that are used


@pytest.mark.parametrize("stream", [False, True])
def test_images_without_variance_are_refused_unless_the_recipe_has_its_own_deviation(small, stream):
    for split, value in (("train", 7), ("test", 8)):
        parts = Parts(VALID)
        start = int(parts.image["data_ptr"][0])
        parts.content[start : start + 20 * 3072] = bytes([value]) * 20 * 3072
        (small / f"{split}.beton").write_bytes(parts.content)
        manifest_of(bytes(parts.content), split).save(small / f"{split}.beton")
    with pytest.raises(InputError, match="a channel is the same in every pixel, which cannot be normalised"):
        splits(small, stream)
    assert splits(small, stream, std=(0.2, 0.2, 0.2), std_everywhere=True).mean.tolist() == pytest.approx([7 / 255] * 3)


@pytest.mark.parametrize("stream", [False, True])
def test_one_image_is_too_few(small, stream):
    with pytest.raises(InputError, match="one image is too few to train on"):
        splits(small, stream, limit_train=1)
    assert len(splits(small, stream, limit_train=2).train) == 2
