"""Both official layouts are read into images of the right orientation; invalid data is refused by name."""

import hashlib
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CLASSES, write_cifar100, write_cifar_pickles

from data_prep.cifar_pickles import LAYOUTS, digests, find_pickles, is_official, read_split
from fastcifar.errors import InputError

CIFAR10, CIFAR100 = LAYOUTS["cifar10"], LAYOUTS["cifar100"]


@pytest.fixture
def folder(pickles: Path, tmp_path: Path) -> Path:
    """A copy of the pickles, to be changed."""
    return Path(shutil.copytree(pickles, tmp_path / "pickles"))


def change(path: Path, **entries: Any) -> None:
    """Write the pickle at `path` again with some entries changed, or left out where None."""
    batch = pickle.loads(path.read_bytes())  # noqa: S301  # this test wrote it
    batch |= {key.encode(): value for key, value in entries.items()}
    path.write_bytes(pickle.dumps({key: value for key, value in batch.items() if value is not None}, protocol=2))


def refusal(path: Path, split: str = "train") -> str:
    """The message with which the split is refused; it names the file at `path`."""
    with pytest.raises(InputError) as caught:
        read_split(path.parent, CIFAR100 if path.name in ("train", "test", "meta") else CIFAR10, split)
    assert str(path) in str(caught.value)
    return str(caught.value)


# What is read


def test_rows_become_images_with_channels_last(folder: Path) -> None:
    rows = np.zeros((40, 3072), np.uint8)
    rows[7, 1 * 32 + 2] = 10  # red of line 1, column 2
    rows[7, 1024 + 1 * 32 + 2] = 20  # green
    rows[7, 2048 + 1 * 32 + 2] = 30  # blue
    rows[7, 31 * 32] = 40  # red of the last line's first pixel
    rows[7, 3071] = 50  # blue of the last pixel
    change(folder / "data_batch_2", data=rows)
    image = read_split(folder, CIFAR10, "train").images[40 + 7]
    assert image[1, 2].tolist() == [10, 20, 30]
    assert image[31, 0].tolist() == [40, 0, 0]
    assert image[31, 31].tolist() == [0, 0, 50]
    assert image.sum(dtype=int) == 150


@pytest.mark.parametrize(("split", "names"), [("train", [f"data_batch_{i}" for i in range(1, 6)]), ("test", ["test_batch"])])
def test_batches_follow_in_order(pickles: Path, split: str, names: list[str]) -> None:
    read = read_split(pickles, CIFAR10, split)
    batches = [pickle.loads((pickles / name).read_bytes()) for name in names]  # noqa: S301
    rows = np.concatenate([batch[b"data"] for batch in batches])
    assert (read.images.dtype, read.labels.dtype) == (np.uint8, np.int64)
    assert read.images.shape == (len(rows), 32, 32, 3)
    assert read.images.flags.c_contiguous
    assert read.labels.tolist() == [label for batch in batches for label in batch[b"labels"]]
    np.testing.assert_array_equal(read.images[..., 1].reshape(len(rows), -1), rows[:, 1024:2048])
    assert read.class_names == CLASSES


def test_labels_may_be_numpy_numbers(folder: Path) -> None:
    labels = np.arange(40) % 10
    for form in (labels, labels.astype(np.uint8), list(labels)):
        change(folder / "data_batch_1", labels=form)
        assert read_split(folder, CIFAR10, "train").labels[:40].tolist() == labels.tolist()


def test_cifar_100_has_fine_labels_and_cifar_10_is_not_taken_for_it(tmp_path: Path, pickles: Path) -> None:
    folder = write_cifar100(tmp_path, images=20)
    split = read_split(folder, CIFAR100, "test")
    assert split.images.shape == (20, 32, 32, 3)
    assert split.labels.tolist() == list(range(99, 79, -1))
    assert split.class_names == [f"fine {i}" for i in range(100)]
    shutil.copy(pickles / "test_batch", folder / "test")
    assert "fine_labels" in refusal(folder / "test", "test")


# Which files


@pytest.mark.parametrize("below", ["", "cifar-10-batches-py"])
def test_the_folder_or_the_one_around_it_may_be_named_and_a_missing_file_is(tmp_path: Path, below: str) -> None:
    folder = write_cifar_pickles(tmp_path / below, per_batch=10, test=10)
    assert find_pickles(tmp_path, CIFAR10) == folder
    for name in ("data_batch_1", "data_batch_5", "test_batch", "batches.meta"):
        file = (folder / name).rename(tmp_path / "elsewhere")
        with pytest.raises(InputError) as caught:
            find_pickles(tmp_path, CIFAR10)
        assert f"{folder} has no file {name}" in str(caught.value)
        file.rename(folder / name)


def test_a_folder_that_is_missing_empty_or_a_file_is_named(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"")
    for name, remedy in (("absent", "cifar-10-batches-py"), ("empty", "data_batch_1"), ("file", "cifar-10-batches-py")):
        with pytest.raises(InputError, match=remedy) as caught:
            find_pickles(tmp_path / name, CIFAR10)
        assert str(tmp_path / name) in str(caught.value)
    (folder / "data_batch_3").unlink()  # after it was found
    refusal(folder / "data_batch_3")


# What is refused: the file, its entry, part of the message, and values with which it is refused; None: left out

ROWS = np.zeros((40, 3072), np.uint8)
OTHER_DTYPES = [ROWS.astype(np.int64), ROWS.astype(np.int8), ROWS.astype(np.float32)]
OTHER_SHAPES = [ROWS[:, :-1], ROWS.reshape(40, 32, 32, 3), ROWS.reshape(-1), np.array(0, np.uint8)]
WITH_NO_NUMBER = [[0] * 39 + [wrong] for wrong in (1.0, "1", None, [1])]
INVALID: list[tuple[str, str, str, list[Any]]] = [
    ("data_batch_4", "data", "no entry 'data'", [None]),
    ("data_batch_4", "data", "not uint8 [N, 3072]", [b"pixels", [[0] * 3072] * 40, *OTHER_DTYPES, *OTHER_SHAPES]),
    ("data_batch_4", "data", "images but 40 labels", [ROWS[:0], ROWS[:39], np.zeros((41, 3072), np.uint8)]),
    ("data_batch_4", "labels", "no entry 'labels'", [None]),
    ("data_batch_4", "labels", "is not a list of whole numbers", [b"labels", 3, np.array(3), {"0": 0}, *WITH_NO_NUMBER]),
    ("data_batch_4", "labels", "is not a list of whole numbers", [np.zeros(40), np.zeros((40, 1), np.int64)]),
    ("data_batch_4", "labels", "is not a list of whole numbers", [[True] * 40, np.ones(40, bool), [np.True_] * 40]),
    ("data_batch_4", "labels", "40 images but", [[], [0] * 39, [0] * 41]),
    ("data_batch_4", "labels", "label 17 is outside 0..9", [[3] * 20 + [17] + [3] * 19]),
    (
        "data_batch_4",
        "labels",
        "is outside 0..9",
        [[0] * 39 + [10], [0] * 39 + [-1], [0] * 39 + [2**70], [0] * 39 + [10**5000]],
    ),
    ("batches.meta", "label_names", "no entry 'label_names'", [None]),
    ("batches.meta", "label_names", "is not a list of class names", [[b"cat"] * 9 + [3], b"0123456789", 10]),
    ("batches.meta", "label_names", "names 3 classes, this layout has 10", [[b"cat"] * 3]),
    ("batches.meta", "label_names", "--dataset cifar100", [[], [b"cat"] * 9, [b"cat"] * 37, [b"cat"] * 100]),
]
CASES = [(name, key, problem, value) for name, key, problem, values in INVALID for value in values]


@pytest.mark.parametrize(("name", "key", "problem", "value"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_invalid_data_is_refused(folder: Path, name: str, key: str, problem: str, value: Any) -> None:
    change(folder / name, **{key: value})
    assert problem in refusal(folder / name)


def test_a_batch_without_images_is_refused(folder: Path) -> None:
    change(folder / "data_batch_2", data=ROWS[:0], labels=[])
    assert "0 images" in refusal(folder / "data_batch_2")


def test_a_damaged_batch_is_refused(folder: Path) -> None:
    os.truncate(folder / "data_batch_1", (folder / "data_batch_1").stat().st_size // 2)
    refusal(folder / "data_batch_1")


# Which data it is


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_the_official_md5_sums_are_torchvisions(dataset: str) -> None:
    from torchvision.datasets import CIFAR10, CIFAR100

    theirs = {"cifar10": CIFAR10, "cifar100": CIFAR100}[dataset]
    ours = LAYOUTS[dataset]
    assert ours.splits == {"train": dict(theirs.train_list), "test": dict(theirs.test_list)}
    assert ours.meta == {theirs.meta["filename"]: theirs.meta["md5"]}
    assert (ours.names_key, ours.folder) == (theirs.meta["key"], theirs.base_folder)


def test_data_is_official_only_when_each_of_its_splits_files_is(pickles: Path) -> None:
    expected = {name: hashlib.md5((pickles / name).read_bytes()).hexdigest() for name in ("test_batch", "batches.meta")}
    assert digests(pickles, CIFAR10, "test", "md5") == expected
    assert list(digests(pickles, CIFAR10, "train", "md5")) == [*(f"data_batch_{i}" for i in range(1, 6)), "batches.meta"]
    md5 = {**CIFAR10.splits["test"], **CIFAR10.meta}
    assert is_official(md5, CIFAR10)
    for name in md5:
        assert not is_official(md5 | {name: "0" * 32}, CIFAR10)
