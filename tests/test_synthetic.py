"""The synthetic dataset is the same for the same seed, complete, and neither trivial nor mere noise."""

from pathlib import Path

import numpy as np
import pytest
from conftest import learnable_images

from data_prep import synthetic
from data_prep.cifar_pickles import LAYOUTS, digests, find_pickles, is_official, read_split

LAYOUT = LAYOUTS["cifar10"]
Drawn = tuple[np.ndarray, np.ndarray]


def draw(count: int, seed: int) -> Drawn:
    return synthetic.draw(count, np.random.Generator(np.random.Philox(key=seed)))


def write(folder: Path, train: int, test: int, seed: int = 0) -> dict[str, bytes]:
    """Content of every pickle, once written."""
    assert sum(synthetic.write_pickles(folder, train=train, test=test, seed=seed)) == train + test
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def drawn() -> Drawn:
    return draw(2500, 0)


def test_images_have_the_shape_range_and_class_frequencies_of_cifar(drawn: Drawn) -> None:
    images, labels = drawn
    assert (images.shape, images.dtype) == ((2500, 32, 32, 3), np.uint8)
    assert (labels.shape, labels.dtype) == ((2500,), np.int64)
    assert images.min() < 10
    assert images.max() > 245
    counts = np.bincount(labels, minlength=10)
    assert len(counts) == 10
    assert counts.min() > 180  # 250 expected, standard deviation 15
    assert counts.max() < 320


def test_the_same_seed_draws_the_same_and_another_seed_does_not() -> None:
    images, labels = draw(30, 5)
    again, other = draw(30, 5), draw(30, 6)
    np.testing.assert_array_equal(images, again[0])
    np.testing.assert_array_equal(labels, again[1])
    assert (images != other[0]).mean() > 0.9
    assert (labels != other[1]).any()


def test_pickles_are_the_same_for_a_seed_and_pass_the_normal_reader(tmp_path: Path) -> None:
    folder = tmp_path / "first"
    first, again, other = (
        write(folder, 1000, 300),
        write(tmp_path / "again", 1000, 300),
        write(tmp_path / "other", 1000, 300, 1),
    )
    assert first == again
    assert [name for name in first if first[name] == other[name]] == ["batches.meta"]
    assert find_pickles(folder, LAYOUT) == folder
    splits = {split: read_split(folder, LAYOUT, split) for split in ("train", "test")}
    for split, count in (("train", 1000), ("test", 300)):
        assert splits[split].images.shape == (count, 32, 32, 3)
        assert set(splits[split].labels.tolist()) == set(range(10))
        assert splits[split].class_names == list(synthetic.SHAPES)
        assert not is_official(digests(folder, LAYOUT, split, "md5"), LAYOUT)
    images = np.concatenate([split.images for split in splits.values()])
    assert len({image.tobytes() for image in images}) == 1300  # none twice, and none of the test in the training split


@pytest.mark.parametrize(("train", "test"), [(5, 1), (5005, 1001)])
def test_any_size_is_written_whole(tmp_path: Path, train: int, test: int) -> None:
    """Images are drawn a thousand at a time; 5005 leaves five batches with one image more."""
    write(tmp_path, train, test)
    assert len(read_split(tmp_path, LAYOUT, "train").labels) == train
    assert len(read_split(tmp_path, LAYOUT, "test").labels) == test


def accuracies_on_pixels(images: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """What nearest class mean and ridge regression learn from all but the last 500 images and reach on those."""
    pixels = images.reshape(len(images), -1) / np.float32(255) - np.float32(0.5)
    train, test = slice(0, -500), slice(-500, None)
    centroids = np.stack([pixels[train][labels[train] == label].mean(0) for label in range(10)])
    distance = np.square(centroids).sum(1) - 2 * pixels[test] @ centroids.T

    # Ridge regression to one-hot labels, in its dual form: as many unknowns as training images.
    kernel = pixels[train] @ pixels[train].T
    weights = np.linalg.solve(kernel + 500 * np.eye(len(kernel), dtype=np.float32), np.eye(10, dtype=np.float32)[labels[train]])
    scores = pixels[test] @ (pixels[train].T @ weights)
    return (distance.argmin(1) == labels[test]).mean(), (scores.argmax(1) == labels[test]).mean()


def test_pixels_alone_do_not_solve_it(drawn: Drawn) -> None:
    """Shapes move, turn and change colour: classifiers that solve fixed patterns stay below 60 %, though above chance."""
    labels = np.arange(1000) % 10
    assert min(accuracies_on_pixels(learnable_images(labels, np.random.default_rng(0)), labels)) > 0.95
    reached = accuracies_on_pixels(*drawn)
    assert max(reached) < 0.6
    assert min(reached) > 0.15  # of two thousand images something can be learned: labels belong to their images


def test_shapes_differ_where_colour_is_taken_away(drawn: Drawn) -> None:
    """Classes can be told apart at all: how much of an image the shape's edges fill depends on the class."""
    images, labels = drawn
    grey = images.mean(-1)
    edges = (np.abs(np.diff(grey, axis=1))[:, :, :-1] + np.abs(np.diff(grey, axis=2))[:, :-1] > 60).mean((1, 2))
    means = np.array([edges[labels == label].mean() for label in range(10)])
    spread = np.array([edges[labels == label].std() / np.sqrt((labels == label).sum()) for label in range(10)])
    assert np.ptp(means) > 10 * spread.max()
