"""The stand-in is the same for the same seed, complete, and neither trivial nor mere noise."""

from pathlib import Path

import numpy as np
import pytest
from conftest import learnable_images

from data_prep import synthetic
from data_prep.cifar_pickles import LAYOUTS, find_pickles, is_official, read_split, source_md5

LAYOUT = LAYOUTS["cifar10"]


def rng(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray]:
    return synthetic.draw(2500, rng(0))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stand-in")
    for _ in synthetic.write_pickles(folder, train=1000, test=300, seed=0):
        pass
    return folder


def test_images_have_the_shape_and_range_of_cifar(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = drawn
    assert images.shape == (2500, 32, 32, 3)
    assert images.dtype == np.uint8
    assert labels.shape == (2500,)
    assert labels.dtype == np.int64
    assert images.min() < 10
    assert images.max() > 245


def test_all_classes_are_about_equally_frequent(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    counts = np.bincount(drawn[1], minlength=10)
    assert len(counts) == 10
    assert counts.min() > 180  # 250 expected, standard deviation 15
    assert counts.max() < 320


def test_the_same_seed_draws_the_same_and_another_seed_does_not() -> None:
    images, labels = synthetic.draw(30, rng(5))
    again, labels_again = synthetic.draw(30, rng(5))
    np.testing.assert_array_equal(images, again)
    np.testing.assert_array_equal(labels, labels_again)
    other, other_labels = synthetic.draw(30, rng(6))
    assert (images != other).mean() > 0.9
    assert (labels != other_labels).any()


def test_pickles_are_byte_for_byte_the_same_for_a_seed(written: Path, tmp_path: Path) -> None:
    assert sum(synthetic.write_pickles(tmp_path / "same", train=1000, test=300, seed=0)) == 1300
    assert contents(tmp_path / "same") == contents(written)
    assert sum(synthetic.write_pickles(tmp_path / "other", train=1000, test=300, seed=1)) == 1300
    other, first = contents(tmp_path / "other"), contents(written)
    assert [name for name in first if first[name] == other[name]] == ["batches.meta"]


def test_pickles_pass_the_normal_reader(written: Path) -> None:
    assert find_pickles(written, LAYOUT) == written
    for split, count in (("train", 1000), ("test", 300)):
        data = read_split(written, LAYOUT, split)
        assert data.images.shape == (count, 32, 32, 3)
        assert set(data.labels.tolist()) == set(range(10))
        assert data.class_names == list(synthetic.SHAPES)
        assert not is_official(source_md5(written, LAYOUT, split), LAYOUT)


def test_no_image_occurs_twice_and_none_of_the_test_in_the_training_split(written: Path) -> None:
    images = np.concatenate([read_split(written, LAYOUT, split).images for split in ("train", "test")])
    assert len({image.tobytes() for image in images}) == 1300


@pytest.mark.parametrize(("train", "test"), [(5, 1), (5005, 1001)])
def test_any_size_is_written_whole(tmp_path: Path, train: int, test: int) -> None:
    """Drawing goes in parts of a thousand; 5005 leaves five batches with one image more."""
    assert sum(synthetic.write_pickles(tmp_path, train=train, test=test)) == train + test
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


def test_pixels_alone_do_not_solve_it(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    """Shapes move, turn and change colour: classifiers that solve fixed patterns stay below 60 %, though above chance."""
    labels = np.arange(1000) % 10
    assert min(accuracies_on_pixels(learnable_images(labels, np.random.default_rng(0)), labels)) > 0.95
    reached = accuracies_on_pixels(*drawn)
    assert max(reached) < 0.6
    assert min(reached) > 0.15  # of two thousand images something can be learned: labels belong to their images


def test_shapes_differ_where_colour_is_taken_away(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    """Classes can be told apart at all: how much of an image the shape's edges fill depends on the class."""
    images, labels = drawn
    grey = images.mean(-1)
    edges = (np.abs(np.diff(grey, axis=1))[:, :, :-1] + np.abs(np.diff(grey, axis=2))[:, :-1] > 60).mean((1, 2))
    means = np.array([edges[labels == label].mean() for label in range(10)])
    spread = np.array([edges[labels == label].std() / np.sqrt((labels == label).sum()) for label in range(10)])
    assert np.ptp(means) > 10 * spread.max()
