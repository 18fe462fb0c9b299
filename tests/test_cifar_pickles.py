"""Both official layouts are read into images of the right orientation; data that is not sound is refused by name."""

import hashlib
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CLASSES, write_cifar_pickles

from data_prep.cifar_pickles import LAYOUTS, find_pickles, is_official, read_split, source_md5
from fastcifar.errors import InputError

CIFAR10, CIFAR100 = LAYOUTS["cifar10"], LAYOUTS["cifar100"]


def write_cifar100(folder: Path, images: int = 20) -> Path:
    """A small CIFAR-100 as Python 3 would write it, with text keys; labels run down from 99."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    for name in ("train", "test"):
        fine = [99 - number % 100 for number in range(images)]
        batch = {"data": rng.integers(0, 256, (images, 3072), dtype=np.uint8), "fine_labels": fine}
        batch |= {"coarse_labels": [label // 5 for label in fine], "filenames": [f"{number}.png" for number in range(images)]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=4))
    meta = {"fine_label_names": [f"fine {i}" for i in range(100)], "coarse_label_names": [f"coarse {i}" for i in range(20)]}
    (folder / "meta").write_bytes(pickle.dumps(meta, protocol=4))
    return folder


@pytest.fixture
def folder(pickles: Path, tmp_path: Path) -> Path:
    """A copy of the pickles, to be changed."""
    return Path(shutil.copytree(pickles, tmp_path / "pickles"))


def change(path: Path, **entries: Any) -> None:
    """Write the pickle at `path` again with some entries changed, or left out where None."""
    batch = pickle.loads(path.read_bytes())  # noqa: S301  # this test wrote it
    batch |= {key.encode(): value for key, value in entries.items()}
    path.write_bytes(pickle.dumps({key: value for key, value in batch.items() if value is not None}, protocol=2))


def refusal(folder: Path, split: str = "train") -> str:
    with pytest.raises(InputError) as caught:
        read_split(folder, CIFAR10, split)
    return str(caught.value)


# What is read


def test_rows_become_images_with_channels_last(folder: Path) -> None:
    row = np.zeros(3072, np.uint8)
    row[1 * 32 + 2] = 10  # red of line 1, column 2
    row[1024 + 1 * 32 + 2] = 20  # green
    row[2048 + 1 * 32 + 2] = 30  # blue
    row[31 * 32] = 40  # red of the last line's first pixel
    row[3071] = 50  # blue of the last pixel
    rows = np.zeros((40, 3072), np.uint8)
    rows[7] = row
    change(folder / "data_batch_2", data=rows)
    image = read_split(folder, CIFAR10, "train").images[40 + 7]
    assert image.shape == (32, 32, 3)
    assert image[1, 2].tolist() == [10, 20, 30]
    assert image[31, 0].tolist() == [40, 0, 0]
    assert image[31, 31].tolist() == [0, 0, 50]
    assert image.sum(dtype=int) == 150


def test_batches_follow_in_order(pickles: Path) -> None:
    split = read_split(pickles, CIFAR10, "train")
    batches = [pickle.loads((pickles / f"data_batch_{i}").read_bytes()) for i in range(1, 6)]  # noqa: S301
    assert split.images.dtype == np.uint8
    assert split.images.shape == (200, 32, 32, 3)
    assert split.images.flags.c_contiguous
    assert split.labels.dtype == np.int64
    assert split.labels.tolist() == [label for batch in batches for label in batch[b"labels"]]
    np.testing.assert_array_equal(
        split.images[..., 1].reshape(200, -1), np.concatenate([b[b"data"] for b in batches])[:, 1024:2048]
    )
    assert split.class_names == CLASSES


def test_the_test_split_is_the_test_batch(pickles: Path) -> None:
    split = read_split(pickles, CIFAR10, "test")
    batch = pickle.loads((pickles / "test_batch").read_bytes())  # noqa: S301
    assert split.images.shape == (50, 32, 32, 3)
    assert split.labels.tolist() == batch[b"labels"]


@pytest.mark.parametrize("labels", [np.arange(40) % 10, np.arange(40, dtype=np.uint8) % 10, list(np.arange(40) % 10)])
def test_labels_may_be_numpy_numbers(folder: Path, labels: Any) -> None:
    change(folder / "data_batch_1", labels=labels)
    assert read_split(folder, CIFAR10, "train").labels[:40].tolist() == [number % 10 for number in range(40)]


def test_cifar_100_has_fine_labels(tmp_path: Path) -> None:
    folder = write_cifar100(tmp_path, images=20)
    split = read_split(folder, CIFAR100, "test")
    assert split.images.shape == (20, 32, 32, 3)
    assert split.labels.tolist() == list(range(99, 79, -1))
    assert split.class_names == [f"fine {i}" for i in range(100)]


def test_cifar_10_is_not_taken_for_cifar_100(tmp_path: Path) -> None:
    folder = write_cifar100(tmp_path)
    pickled = write_cifar_pickles(tmp_path / "ten", per_batch=10, test=10)
    shutil.copy(pickled / "test_batch", folder / "test")
    with pytest.raises(InputError) as caught:
        read_split(folder, CIFAR100, "test")
    assert str(folder / "test") in str(caught.value)
    assert "fine_labels" in str(caught.value)


# Which files


@pytest.mark.parametrize("below", ["", "cifar-10-batches-py"])
def test_the_folder_or_the_one_around_it_may_be_named(tmp_path: Path, below: str) -> None:
    write_cifar_pickles(tmp_path / below, per_batch=10, test=10)
    assert find_pickles(tmp_path, CIFAR10) == tmp_path / below


@pytest.mark.parametrize("missing", ["data_batch_1", "data_batch_5", "test_batch", "batches.meta"])
@pytest.mark.parametrize("below", ["", "cifar-10-batches-py"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str, below: str) -> None:
    write_cifar_pickles(tmp_path / below, per_batch=10, test=10)
    (tmp_path / below / missing).unlink()
    with pytest.raises(InputError) as caught:
        find_pickles(tmp_path, CIFAR10)
    assert f"{tmp_path / below} has no file {missing}" in str(caught.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        find_pickles(tmp_path / "absent", CIFAR10)
    assert str(tmp_path / "absent") in str(caught.value)
    assert "cifar-10-batches-py" in str(caught.value)


def test_a_file_instead_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError) as caught:
        find_pickles(tmp_path / "file", CIFAR10)
    assert str(tmp_path / "file") in str(caught.value)


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        find_pickles(tmp_path, CIFAR10)
    assert str(tmp_path) in str(caught.value)


def test_a_file_that_vanished_is_named(folder: Path) -> None:
    (folder / "data_batch_3").unlink()
    assert str(folder / "data_batch_3") in refusal(folder)


# What is refused


@pytest.mark.parametrize(
    "data",
    [
        None,
        b"pixels",
        [[0] * 3072] * 40,
        np.zeros((40, 3072), np.int64),
        np.zeros((40, 3072), np.int8),
        np.zeros((40, 3072), np.float32),
        np.zeros((40, 3071), np.uint8),
        np.zeros((40, 32, 32, 3), np.uint8),
        np.zeros(40 * 3072, np.uint8),
        np.zeros((0, 3072), np.uint8),
        np.array(0, np.uint8),
        np.zeros((39, 3072), np.uint8),
        np.zeros((41, 3072), np.uint8),
    ],
    ids=lambda data: f"{data.dtype}{list(data.shape)}" if isinstance(data, np.ndarray) else type(data).__name__,
)
def test_unsound_pixels_are_refused(folder: Path, data: Any) -> None:
    change(folder / "data_batch_4", data=data)
    assert str(folder / "data_batch_4") in refusal(folder)


@pytest.mark.parametrize(
    "labels",
    [
        None,
        b"labels",
        3,
        [],
        [0] * 39,
        [0] * 41,
        [0] * 39 + [10],
        [0] * 39 + [-1],
        [0] * 39 + [2**70],
        [0] * 39 + [1.0],
        [0] * 39 + ["1"],
        [0] * 39 + [None],
        [0] * 39 + [[1]],
        np.zeros(40),
        np.zeros((40, 1), np.int64),
        np.array(3),
        dict.fromkeys(range(40), 0),
    ],
    ids=lambda labels: f"{type(labels).__name__} {str(labels)[-12:]}",
)
def test_unsound_labels_are_refused(folder: Path, labels: Any) -> None:
    change(folder / "data_batch_4", labels=labels)
    assert str(folder / "data_batch_4") in refusal(folder)


def test_a_batch_without_images_is_refused(folder: Path) -> None:
    change(folder / "data_batch_2", data=np.zeros((0, 3072), np.uint8), labels=[])
    assert str(folder / "data_batch_2") in refusal(folder)


def test_the_wrong_label_is_shown(folder: Path) -> None:
    change(folder / "data_batch_5", labels=[3] * 20 + [17] + [3] * 19)
    message = refusal(folder)
    assert "17" in message
    assert "0..9" in message


@pytest.mark.parametrize(
    "names",
    [None, [], [b"cat"] * 9, [b"cat"] * 11, [b"cat"] * 9 + [3], b"0123456789", 10],
    ids=["missing", "none", "nine", "eleven", "a number", "bytes", "no list"],
)
def test_unsound_class_names_are_refused(folder: Path, names: Any) -> None:
    change(folder / "batches.meta", label_names=names)
    assert str(folder / "batches.meta") in refusal(folder)


def test_a_damaged_batch_is_refused(folder: Path) -> None:
    path = folder / "data_batch_1"
    os.truncate(path, path.stat().st_size // 2)
    assert str(path) in refusal(folder)


# Which data it is


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_the_official_md5_sums_are_torchvisions(dataset: str) -> None:
    from torchvision.datasets import CIFAR10, CIFAR100

    theirs = {"cifar10": CIFAR10, "cifar100": CIFAR100}[dataset]
    ours = LAYOUTS[dataset]
    assert ours.splits["train"] == dict(theirs.train_list)
    assert ours.splits["test"] == dict(theirs.test_list)
    assert ours.meta == {theirs.meta["filename"]: theirs.meta["md5"]}
    assert ours.names_key == theirs.meta["key"]
    assert ours.folder == theirs.base_folder


def test_md5_sums_are_of_the_splits_own_files(pickles: Path) -> None:
    expected = {name: hashlib.md5((pickles / name).read_bytes()).hexdigest() for name in ("test_batch", "batches.meta")}
    assert source_md5(pickles, CIFAR10, "test") == expected
    assert list(source_md5(pickles, CIFAR10, "train")) == [*(f"data_batch_{i}" for i in range(1, 6)), "batches.meta"]


def test_data_is_official_only_when_every_file_is() -> None:
    md5 = {**CIFAR10.splits["test"], **CIFAR10.meta}
    assert is_official(md5, CIFAR10)
    for name in md5:
        assert not is_official(md5 | {name: "0" * 32}, CIFAR10)
