"""Pictures of one's own: what becomes of every kind of file, how a test split comes about, and a training on them."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep import own_pictures, write_beton
from fastcifar import evaluate, pictures, predict, train
from fastcifar.beton import Manifest, read_beton
from fastcifar.errors import InputError

rng = np.random.default_rng(0)
START = rng.bit_generator.state


@pytest.fixture(autouse=True)
def same_pictures():
    """In every test, whichever ran before it."""
    rng.bit_generator.state = START


def noise(height=20, width=30, channels=3):
    return rng.integers(0, 256, (height, width, channels) if channels > 1 else (height, width), dtype=np.uint8)


def make_folder(folder, classes=("cat", "dog"), count=5, size=(20, 30), channels=3):
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for place in range(count):
            image = noise(*size, channels)
            image[..., :] //= 2
            image += np.uint8(40 * number)  # so that classes differ
            Image.fromarray(image).save(folder / name / f"{place}.png")
    return folder


def save(image, path, **options):
    image.save(path, **options)
    return path


def test_every_kind_of_picture_becomes_rgb_or_grey(tmp_path):
    colour, grey = Image.fromarray(noise()), Image.fromarray(noise(channels=1))
    for name, image, mode in (
        ("a.png", colour, "RGB"), ("b.jpg", colour, "RGB"), ("c.bmp", colour, "RGB"), ("d.png", grey, "L"),
        ("e.webp", colour, "RGB"), ("f.png", colour.quantize(16), "RGB"), ("g.jpg", colour.convert("CMYK"), "RGB"),
        ("h.gif", colour, "RGB"), ("i.tif", colour, "RGB"), ("j.png", grey.convert("1"), "L"),
        ("k.png", grey.convert("LA"), "L"),
    ):  # fmt: skip
        found = pictures.decode(save(image, tmp_path / name))
        assert (found.mode, found.size) == (mode, (30, 20)), name
    assert np.array_equal(np.asarray(pictures.decode(tmp_path / "a.png")), np.asarray(colour))


def test_transparent_pixels_are_white_and_rotated_pictures_upright(tmp_path):
    clear = Image.new("RGBA", (30, 20), (10, 20, 30, 255))
    clear.paste((0, 0, 0, 0), (0, 0, 10, 20))
    found = np.asarray(pictures.decode(save(clear, tmp_path / "a.png")))
    assert (found[:, :10] == 255).all()
    assert (found[:, 10:] == [10, 20, 30]).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    assert pictures.decode(save(clear.convert("RGB"), tmp_path / "b.jpg", exif=exif)).size == (20, 30)


def bad_files(folder):
    """What cannot be used, with what is said of it."""
    colour = Image.fromarray(noise())
    frames = {"save_all": True, "append_images": [Image.fromarray(noise())]}
    whole = save(colour, folder / "whole.jpg").read_bytes()
    (folder / "whole.jpg").unlink()
    cut, text, empty, link = (folder / name for name in ("cut.jpg", "text.png", "empty.png", "link.png"))
    link.symlink_to("nowhere.png")
    cut.write_bytes(whole[: len(whole) // 2])
    text.write_text("no picture")
    empty.touch()
    return {
        cut: "(?i)truncated",
        text: "no picture of a known kind",
        empty: "no picture of a known kind",
        link: "not a file",
        save(Image.fromarray(noise(channels=1).astype(np.uint16) * 257), folder / "deep.png"): "16 bits",
        save(Image.fromarray(noise(channels=1).astype(np.float32)), folder / "deep.tif"): "16 bits",
        save(colour, folder / "moves.gif", **frames): "2 frames",
        save(colour, folder / "moves.png", **frames): "2 frames",
        save(colour, folder / "pages.tif", **frames): "2 frames or pages",
    }


def test_bad_pictures_are_named_and_counted_and_may_be_left_out(tmp_path):
    folder = make_folder(tmp_path / "data")
    bad = bad_files(folder / "dog")
    for file, problem in bad.items():
        with pytest.raises(Exception, match=r".*") as raised:
            pictures.decode(file)
        assert re.search(problem, pictures.why(raised.value))
    with pytest.raises(InputError, match=r"9 of 19 pictures cannot be used: .*dog/cut\.jpg: .*--skip-bad"):
        pictures.read_folder(folder)
    found = pictures.read_folder(folder, skip_bad=True)
    assert len(found.images) == 10
    assert [line.split(": ")[0] for line in found.bad] == sorted(map(str, bad))
    (folder / "dog" / "link.png").unlink()
    for file in folder.rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(InputError, match="18 of 18 pictures cannot be used"):
        pictures.read_folder(folder, skip_bad=True)


def test_mixed_sizes_are_brought_to_one_only_when_asked(tmp_path):
    folder = make_folder(tmp_path)
    odd = save(Image.fromarray(noise(40, 40)), folder / "dog" / "odd.png")
    with pytest.raises(InputError, match=rf"{odd} has 40x40 pixels, others 30x20: .*--size"):
        pictures.read_folder(folder)
    assert pictures.read_folder(folder, (16, 24)).images.shape == (11, 16, 24, 3)
    huge = save(Image.new("RGB", (300, 20)), folder / "cat" / "0.png")
    with pytest.raises(InputError, match=rf"{huge} has 300x20 pixels, not 8\.\.256 a side: .*--size"):
        pictures.read_folder(folder)


def test_folders_that_hold_no_classes_are_refused(tmp_path):
    folder = make_folder(tmp_path / "some", classes=("cat",))
    with pytest.raises(InputError, match="two classes or more, it has only one, cat"):
        pictures.read_folder(folder)
    (folder / "dog").mkdir()
    with pytest.raises(InputError, match=r"dog holds no picture .*: remove it, or fill it"):
        pictures.read_folder(folder)
    with pytest.raises(InputError, match="it has none"):
        pictures.read_folder(folder / "dog")
    with pytest.raises(InputError, match="is not a folder"):
        pictures.read_folder(tmp_path / "nowhere")
    (tmp_path / "test" / "dog").mkdir(parents=True)
    with pytest.raises(InputError, match="test holds no picture in its class folders: fill them"):
        pictures.read_folder(tmp_path / "test", class_names=["cat", "dog"])


def test_too_many_classes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MOST_CLASSES", 3)
    with pytest.raises(InputError, match="holds 4 class folders, more than 3"):
        pictures.read_folder(make_folder(tmp_path, classes="abcd", count=1))


def test_the_pictures_held_out_are_the_same_whatever_else_there_is(tmp_path):
    folder = make_folder(tmp_path, count=20)
    parts = own_pictures.read_splits(folder, None, 0.25, False, lambda total: None)
    assert [np.bincount(part.labels).tolist() for part in parts.values()] == [[15, 15], [5, 5]]
    assert not set(parts["train"].names) & set(parts["test"].names)
    for file in (folder / "cat").iterdir():
        file.unlink()
    Image.fromarray(noise()).save(folder / "cat" / "one.png")
    Image.fromarray(noise()).save(folder / "cat" / "two.png")
    again = own_pictures.read_splits(folder, None, 0.25, False, lambda total: None)
    dogs = [[name for name in some["test"].names if name.startswith("dog")] for some in (parts, again)]
    assert dogs[0] == dogs[1]
    (folder / "cat" / "two.png").unlink()
    with pytest.raises(InputError, match="class cat has 1 pictures, too few to hold one out"):
        own_pictures.read_splits(folder, None, 0.25, False, lambda total: None)


@pytest.mark.parametrize("name", ["test", "val"])
def test_a_test_split_of_the_folders_own_is_taken(tmp_path, name):
    make_folder(tmp_path / "train", count=4)
    make_folder(tmp_path / name, classes=("dog",), count=3)
    parts = own_pictures.read_splits(tmp_path, None, 0.1, False, lambda total: None)
    assert parts["test"].class_names == parts["train"].class_names == ["cat", "dog"]
    assert parts["test"].labels.tolist() == [1] * 3
    make_folder(tmp_path / name / "sub", classes=("bird",))
    (tmp_path / name / "sub").rename(tmp_path / name / "zebra")
    with pytest.raises(InputError, match="zebra is a class that the training pictures do not have"):
        own_pictures.read_splits(tmp_path, None, 0.1, False, lambda total: None)


GREY, NUMBERS = rng.integers(0, 256, (30, 28, 28), dtype=np.uint8), np.arange(30) % 3


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "must have entries x_train and y_train, or images and labels, it has none"),
        ({"images": GREY, "labels": NUMBERS[:9]}, "30 images but 9 labels"),
        ({"images": GREY.astype(float), "labels": NUMBERS}, r"images must be uint8 \[N, H, W\].*got float64 \[30, 28, 28\]"),
        ({"images": GREY, "labels": NUMBERS - 1}, "labels must be class numbers from 0 on"),
        ({"images": GREY, "labels": NUMBERS * 0}, r"labels have 1 classes.*2\.\.65,535"),
        ({"images": GREY, "labels": NUMBERS, "class_names": np.array(["a", "b"])}, "labels have 3 classes, 2 are named"),
        ({"images": GREY, "labels": NUMBERS + 65_535}, "labels have 65,538 classes"),
        ({"images": GREY[:, :5], "labels": NUMBERS}, r"images have 28x5 pixels, not 8\.\.256 a side: .*--size"),
        ({"images": GREY, "labels": np.array([None] * 30)}, "is no NumPy archive of plain arrays"),
    ],
)
def test_archives_that_do_not_fit_are_refused(tmp_path, entries, message):
    np.savez(tmp_path / "a.npz", **entries)
    with pytest.raises(InputError, match=message):
        own_pictures.read_splits(tmp_path / "a.npz", None, 0.1, False, lambda total: None)


def test_sizes_are_width_by_height():
    assert own_pictures.parse_size("64") == (64, 64)
    assert own_pictures.parse_size("96x64") == (64, 96)
    for text in ("", "7", "64x", "64x257", "1x2x3", "-64", "64.0"):
        with pytest.raises(InputError, match="size must be 64 or WIDTHxHEIGHT"):
            own_pictures.parse_size(text)


def test_a_grey_archive_becomes_betons_once(tmp_path, call, refused):
    np.savez(tmp_path / "digits.npz", x_train=GREY, y_train=NUMBERS[:, None], x_test=GREY[:9], y_test=NUMBERS[:9])
    options = ("--source", tmp_path / "digits.npz", "--out", tmp_path / "out")
    assert "30 images, digits.npz, read back byte for byte" in call(write_beton.main, *options)
    beton = read_beton(tmp_path / "out" / "train.beton")
    assert np.array_equal(beton.images, np.repeat(GREY[..., None], 3, 3))
    manifest = beton.manifest
    assert (manifest.dataset, manifest.size, manifest.channels, manifest.class_names) == ("own", (28, 28), 1, ["0", "1", "2"])
    assert call(write_beton.main, *options).count("intact, left alone") == 2
    assert call(write_beton.main, "--check", "--out", tmp_path / "out").count("hash and statistics right") == 2
    assert "holds other data" in refused(write_beton.main, *options, "--size", "32")
    assert "test_fraction must be above 0" in refused(write_beton.main, *options, "--test-fraction", "1")
    assert "--size is for pictures" in refused(write_beton.main, "--synthetic", "--size", "64", "--out", tmp_path / "other")


def test_pictures_outside_class_folders_are_not_taken_for_pickles(tmp_path, refused):
    save(Image.fromarray(noise()), tmp_path / "a.png")
    told = refused(write_beton.main, "--source", tmp_path, "--out", tmp_path / "out")
    assert "must hold a folder of pictures for each of two classes or more, it has none" in told


def test_what_was_left_out_is_said(tmp_path, call):
    folder = make_folder(tmp_path / "data")
    (folder / "dog" / "bad.png").write_text("no picture")
    printed = call(write_beton.main, "--source", folder, "--out", tmp_path / "out", "--size", "24x16", "--skip-bad")
    assert "left out: " in printed
    assert "1 pictures left out" in printed
    assert Manifest.load(tmp_path / "out" / "test.beton").size == (16, 24)


def test_images_too_small_for_a_network_are_refused_before_anything_is_measured(tmp_path, call, refused):
    images, labels = np.zeros((40, 8, 8, 3), np.uint8), np.arange(40) % 2
    np.savez(tmp_path / "small.npz", images=images + np.arange(40, dtype=np.uint8)[:, None, None, None], labels=labels)
    call(write_beton.main, "--source", tmp_path / "small.npz", "--out", tmp_path / "betons", "--test-fraction", "0.2")
    options = ("--arch", "speed94_half", "--batch-size", "10", "--data", tmp_path / "betons", "--out", tmp_path / "run")
    assert "speed94_half needs images of at least 16 pixels a side" in refused(train.main, *options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "channels", "arch"),
    [((64, 64), 3, "se_resnet18"), ((28, 28), 1, "speed94_half"), ((64, 96), 3, "robust_resnet64")],
)
def test_own_pictures_are_trained_on_evaluated_and_predicted(tmp_path, call, refused, size, channels, arch):
    source = make_folder(tmp_path / "data", classes=("cat", "dog", "owl"), count=20, size=size, channels=channels)
    call(write_beton.main, "--source", source, "--out", tmp_path / "betons", "--test-fraction", "0.2")
    options = (
        "--data",
        tmp_path / "betons",
        "--out",
        tmp_path / "run",
        "--epochs",
        "1",
        "--batch-size",
        "16",
        "--peak-lr",
        "0.01",
    )
    call(train.main, "--arch", arch, *options, "--device", "cpu", "--plan", "default", "--no-plots")
    best = tmp_path / "run" / "best.pt"
    measured = json.loads(call(evaluate.main, "--checkpoint", best, "--data", tmp_path / "betons", "--json"))
    assert measured["images"] == 12
    assert "60 predictions" not in call(
        predict.main, "--checkpoint", best, "--input", source / "cat", "--out", tmp_path / "a.csv", "--tta", "flip_translate"
    )
    Image.fromarray(noise(40, 50)).save(source / "cat" / "odd.png")
    ask = ("--checkpoint", best, "--input", source / "cat", "--out", tmp_path / "b.csv")
    assert "(50x40 pixels)" in refused(predict.main, *ask)
    assert "21 predictions" in call(predict.main, *ask, "--resize")


@pytest.mark.slow
def test_ffcvs_own_loader_reads_other_sizes(tmp_path, call):
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import ToTensor

    source = make_folder(tmp_path / "data", size=(64, 96))
    call(write_beton.main, "--source", source, "--out", tmp_path)
    pipelines = {"image": [SimpleRGBImageDecoder(), ToTensor()], "label": [IntDecoder(), ToTensor()]}
    path = tmp_path / "train.beton"
    loader = Loader(str(path), 4, num_workers=1, order=OrderOption.SEQUENTIAL, pipelines=pipelines, drop_last=False)
    images = torch.cat([batch[0].clone() for batch in loader])
    assert np.array_equal(images.numpy(), read_beton(path).images)
