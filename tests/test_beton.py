"""Betons come back byte for byte, FFCV reads them alike, and no damaged one is read or crashes the reader."""

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from small_betons import COUNT, END, PIXELS, SIZE, START, TABLE, U64, VALID, Parts, manifest_of

from data_prep import beton_writer
from data_prep.cifar_pickles import LAYOUTS, read_split
from fastcifar import beton
from fastcifar.beton import IMAGE_BYTES, Manifest, manifest_path, parse, read_beton
from fastcifar.dataset import load_streamed
from fastcifar.errors import InputError

MANIFEST = manifest_of(VALID)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The small beton with its manifest."""
    path = tmp_path / "train.beton"
    path.write_bytes(VALID)
    MANIFEST.save(path)
    return path


def written(path: Path, images: np.ndarray, labels: np.ndarray) -> bytes:
    counted: list[int] = []
    beton_writer.write(path, images, labels, advance=counted.append)
    assert sum(counted) == len(images)
    return path.read_bytes()


def random_images(count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, count)


def change_manifest(path: Path, **entries: Any) -> None:
    """Write other entries, with a hash that agrees with them."""
    replace(Manifest.load(path), **entries).save(path)


def refusal(path: Path, *, verify: bool = True, named: Path | None = None) -> str:
    """The message with which `path` is refused; it names the file (or `named`) and what to do."""
    with pytest.raises(InputError) as caught:
        read_beton(path, verify=verify)
    assert str(named or path) in str(caught.value)
    assert "data_prep/write_beton.py" in str(caught.value)
    return str(caught.value)


# The format


def test_our_layout_is_ffcvs() -> None:
    from ffcv import types
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES

    assert types.CURRENT_VERSION == beton.VERSION
    assert types.HeaderType == beton.HEADER
    assert types.FieldDescType == beton.FIELD_DESCRIPTOR
    assert types.ALLOC_TABLE_TYPE == beton.ALLOCATION
    assert RGBImageField().metadata_type == beton.IMAGE_METADATA
    assert IMAGE_MODES["raw"] == beton.MODE_RAW
    theirs = types.get_metadata_type([RGBImageField(), IntField(), IntField()])
    ours = beton.SAMPLE_METADATA
    assert theirs.itemsize == ours.itemsize
    assert list(theirs.fields.values()) == list(ours.fields.values())  # types and offsets; FFCV gives no names
    kinds = [(name, types.TYPE_ID_HANDLER[number]) for name, number in beton.FIELDS]
    assert kinds == [("image", RGBImageField), ("label", IntField), ("index", IntField)]


@pytest.mark.parametrize("count", [1, 2730, 2731, 6000])  # 2730 images fill a page of 8 MiB
def test_images_come_back_byte_for_byte(tmp_path: Path, count: int) -> None:
    images, labels = random_images(count)
    content = written(tmp_path / "some.beton", images, labels)
    read, read_labels, index = parse(content, tmp_path / "some.beton")
    assert (read.dtype, read_labels.dtype, index.dtype) == (np.uint8, np.int64, np.int64)
    np.testing.assert_array_equal(read, images)
    np.testing.assert_array_equal(read_labels, labels)
    np.testing.assert_array_equal(index, np.arange(count))


@pytest.mark.parametrize("shape", [(3, 32, 32), (2731, 32, 32), (90, 64, 96)])  # 2730 images of 32x32 fill a page
def test_we_write_ffcvs_bytes(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (*shape, 3), dtype=np.uint8), rng.integers(0, 10, shape[0])
    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField(), "index": IntField()}
    samples = [(image, int(label), number) for number, (image, label) in enumerate(zip(images, labels, strict=True))]
    DatasetWriter(str(tmp_path / "ffcv.beton"), fields, num_workers=1).from_indexed_dataset(samples)
    assert written(tmp_path / "ours.beton", images, labels) == (tmp_path / "ffcv.beton").read_bytes()


def test_the_same_input_gives_the_same_bytes_contiguous_or_not(tmp_path: Path) -> None:
    images, labels = random_images(40)
    strided = images[::2, :, ::-1], labels[::2]
    content = written(tmp_path / "a.beton", *strided)
    assert content == written(tmp_path / "b.beton", *map(np.ascontiguousarray, strided))
    np.testing.assert_array_equal(parse(content, tmp_path)[0], strided[0])


@pytest.mark.parametrize("split", ["train", "test"])
def test_what_was_in_the_pickles_is_in_the_beton(betons: Path, pickles: Path, split: str) -> None:
    source = read_split(pickles, LAYOUTS["cifar10"], split)
    read = read_beton(betons / f"{split}.beton")
    np.testing.assert_array_equal(read.images, source.images)
    np.testing.assert_array_equal(read.labels, source.labels)
    np.testing.assert_array_equal(read.index, np.arange(len(source.labels)))
    assert (read.manifest.class_names, read.manifest.split) == (source.class_names, split)


def test_ffcvs_loader_reads_the_same_in_order(betons: Path) -> None:
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import ToTensor

    ours = read_beton(betons / "train.beton")
    decoders = {"image": SimpleRGBImageDecoder, "label": IntDecoder, "index": IntDecoder}
    loader = Loader(
        str(betons / "train.beton"),
        batch_size=64,
        num_workers=1,
        os_cache=True,
        order=OrderOption.SEQUENTIAL,
        drop_last=False,
        pipelines={name: [decoder(), ToTensor()] for name, decoder in decoders.items()},
    )
    assert loader.reader.field_names == ["image", "label", "index"]
    batches = [tuple(part.numpy().copy() for part in batch) for batch in loader]  # the loader uses its buffers again
    images, labels, index = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    np.testing.assert_array_equal(images, ours.images)
    np.testing.assert_array_equal(labels.reshape(-1), ours.labels)
    np.testing.assert_array_equal(index.reshape(-1), ours.index)


def test_images_are_found_by_their_pointers_not_by_their_order() -> None:
    """FFCV with several workers stores images, table and indices out of order; nothing is wrong with that."""
    order = np.random.default_rng(0).permutation(COUNT)
    before, labels, _ = parse(VALID, Path("some.beton"))
    parts = Parts(VALID)
    pointers = parts.image["data_ptr"].copy()
    for sample, place in enumerate(order):
        parts.move(sample, pointers[place])
    parts.table[:] = parts.table[np.random.default_rng(1).permutation(COUNT)]
    parts.samples["index"] = np.arange(COUNT)[::-1]
    images, labels_after, index = parse(bytes(parts.content), Path("some.beton"))
    np.testing.assert_array_equal(images, before[order])
    np.testing.assert_array_equal(labels_after, labels)
    assert index.tolist() == list(range(COUNT))[::-1]


# Damage. The manifest's sha256 is not asked for, so that the checks of the structure stand alone.

Edit = Callable[[Parts], object]


def fill(parts: Parts, start: int, stop: int, byte: int) -> None:
    parts.content[start:stop] = bytes([byte]) * (stop - start)


def rename(field: int, name: bytes) -> Edit:
    return lambda parts: parts.fields["name"].__setitem__(field, list(name.ljust(16, b"\0")))


REGIONS = {"header": (0, 24), "fields": (24, START), "metadata": (START, END), "table": (TABLE, SIZE)}
# Values that no valid beton has at this place; sample 7's, where there are many.
WRONG_VALUES: list[tuple[str, str, list[int]]] = [
    ("header", "version", [0, 1, 3]),
    ("header", "num_fields", [0, 2, 4]),
    # 2^59 samples of 32 bytes wrap around to 0, 2^61 samples of 24 and 32 bytes too
    ("header", "num_samples", [0, COUNT - 1, COUNT + 1, 2**59, 2**61, U64 - 1]),
    ("header", "alloc_table_ptr", [0, END - 1, TABLE - 1, TABLE + 1, TABLE + 24, SIZE, SIZE + 24, 2**63, U64 - 1]),
    ("image", "mode", [0, 2]),  # 0: JPEG
    ("image", "width", [31, 65535]),
    ("image", "height", [0, 33]),
    ("image", "data_ptr", [TABLE - IMAGE_BYTES]),  # the table says otherwise
    ("samples", "label", [-1, 10, 2**63 - 1, -(2**63)]),
    ("samples", "index", [8, -1, COUNT, 2**63 - 1]),
    ("table", "sample_id", [8, COUNT, U64 - 1]),
    ("table", "ptr", [TABLE - IMAGE_BYTES]),
    ("table", "size", [IMAGE_BYTES - 1, IMAGE_BYTES + 1, U64 - 1]),
]
# Places where image 7 may not lie although metadata and table agree on them.
WRONG_POINTERS = {
    "start of the file": 0,
    "into the metadata": END - 1,
    "over the start of the table": TABLE - IMAGE_BYTES + 1,
    "table": TABLE,
    "end": SIZE,
    "past the end": SIZE + 1000,
    "2^63": 2**63,
    "so high that the image would end at byte 0": U64 - IMAGE_BYTES,
    "2^64 - 1": U64 - 1,
    "place of another image": PIXELS,
    "over the last byte of another image": PIXELS + 7 * IMAGE_BYTES - 1,
    "over the first byte of another image": PIXELS + 7 * IMAGE_BYTES + 1,
}
DAMAGE: dict[str, Edit] = {
    **{
        f"{name} of bytes {byte}": lambda parts, slot=slot, byte=byte: fill(parts, *slot, byte)
        for name, slot in {**REGIONS, "file": (0, SIZE)}.items()
        for byte in (0, 255)
    },
    "field of another name": rename(0, b"picture"),
    "field of a longer name": rename(0, b"image\0\0x"),
    "field name that is not ASCII": rename(2, b"\xff\n\x1b[2J"),
    "field of another type": lambda parts: parts.set("fields", "type_id", 1, 0),
    "field of an unknown type": lambda parts: parts.set("fields", "type_id", 0, 255),
    "fields in another order": lambda parts: parts.fields.__setitem__([1, 2], parts.fields[[2, 1]]),
    "2^61 samples and no table": lambda parts: parts.header.__setitem__(0, (2, 3, 1 << 23, 2**61, SIZE)),
    "all image pointers 0": lambda parts: [parts.move(sample, 0) for sample in range(COUNT)],
    "last image past the pixels": lambda parts: parts.move(COUNT - 1, TABLE - IMAGE_BYTES + 1),
    "first image before the pixels": lambda parts: parts.move(0, END - 1),
    **{f"image at the {name}": lambda parts, to=to: parts.move(7, to) for name, to in WRONG_POINTERS.items()},
}


for part, field, values in WRONG_VALUES:
    for value in values:
        numbers = (part, field, 0 if part == "header" else 7, value)
        DAMAGE[f"{part} {field} {value}"] = lambda parts, numbers=numbers: parts.set(*numbers)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_structure_is_refused(small: Path, damage: str) -> None:
    parts = Parts(VALID)
    DAMAGE[damage](parts)
    assert parts.content != VALID
    small.write_bytes(parts.content)
    assert refusal(small, verify=False).isprintable()  # what a terminal shows of a strange file is one harmless line


def test_a_truncated_or_extended_file_is_refused() -> None:
    path = Path("some.beton")
    lengths = {*range(0, SIZE, 500), 23, 24, 24 + 1041, START - 1, START, START + 32, END, PIXELS, TABLE, SIZE - 24, SIZE - 1}
    for content in [*(VALID[:length] for length in lengths), *(VALID + bytes(extra) for extra in (1, 24, 32, IMAGE_BYTES))]:
        with pytest.raises(InputError, match=r"some\.beton is damaged .*write_beton\.py"):
            parse(content, path)


@pytest.mark.parametrize(("samples", "size", "problem"), [(0, START, "no samples"), (COUNT, START + 24 * COUNT, "table")])
def test_a_table_over_the_metadata_is_refused(samples: int, size: int, problem: str) -> None:
    """Of no samples this is what FFCV writes: consistent, and still no data."""
    parts = Parts(VALID)
    parts.header["num_samples"], parts.header["alloc_table_ptr"] = samples, START
    with pytest.raises(InputError, match=problem):
        parse(bytes(parts.content[:size]), Path("some.beton"))


POINTERS = ("image and table", "pointer")
# A wrong byte, any part as likely as the others though pixels fill most of the file; or a wrong number in any field.
positions = st.sampled_from([*REGIONS.values(), (END, TABLE)]).flatmap(lambda region: st.integers(region[0], region[1] - 1))
wrong_bytes = st.tuples(positions, st.integers(1, 255))
wrong_fields = st.tuples(
    st.sampled_from([*((part, field) for part, field, _ in WRONG_VALUES), POINTERS]),
    st.integers(0, COUNT - 1),
    st.integers(0, SIZE) | st.integers(0, U64 - 1),
)


@given(mutation=wrong_bytes | wrong_fields)
@example(mutation=(POINTERS, COUNT - 1, TABLE - IMAGE_BYTES))  # the last place that is allowed
@example(mutation=(POINTERS, 0, END))  # the first
@example(mutation=(4, 1))  # the page size, which only FFCV uses
def test_a_mutation_is_refused_or_read_as_it_stands(tmp_path_factory: pytest.TempPathFactory, mutation: Any) -> None:
    """With the hash every change is refused. Without it, what is read is what the pointers say, and valid."""
    parts, path = Parts(VALID), tmp_path_factory.getbasetemp() / "mutated.beton"
    match mutation:
        case int(position), flip:
            parts.content[position] ^= flip
        case where, row, value if where == POINTERS:
            parts.move(row, value)
        case (part, field), row, value:
            parts.set(part, field, 0 if part == "header" else row, value)
    path.write_bytes(parts.content)
    MANIFEST.save(path)
    if parts.content != VALID:
        refusal(path)
    pointers = parts.image["data_ptr"].tolist()
    try:
        read = read_beton(path, verify=False)
    except InputError as error:
        assert str(path) in str(error)  # noqa: PT017  # a successful read is as good
        places = sorted(pointers)
        overlap = min(after - before for before, after in itertools.pairwise(places)) < IMAGE_BYTES
        if mutation[0] == POINTERS:  # which must then be the reason
            assert overlap or not END <= places[0] <= places[-1] <= TABLE - IMAGE_BYTES
    else:
        assert read.images.tobytes() == b"".join(parts.content[place : place + IMAGE_BYTES] for place in pointers)
        for name, values in (("label", read.labels), ("index", read.index)):
            assert values.tolist() == parts.samples[name].tolist()
        assert 0 <= read.labels.min() <= read.labels.max() < 10
        assert sorted(read.index.tolist()) == list(range(COUNT))


# The manifest


def test_a_manifest_comes_back_equal(small: Path) -> None:
    assert Manifest.load(small) == MANIFEST
    assert sorted(path.name for path in small.parent.iterdir()) == ["train.beton", "train.json"]


def test_a_missing_beton_or_manifest_is_named(small: Path) -> None:
    manifest_path(small).unlink()
    assert "missing" in refusal(small, named=manifest_path(small))
    small.unlink()
    assert "missing" in refusal(small)


NOT_MANIFESTS = [b"", b"{", b"\xff\xfe\x00", b"nothing", b"[]", b"3", b"null", b'"text"', b"{}", b'{"sha256": "0"}']
WRONG_TYPES: dict[str, list[object]] = {
    "dataset": ["mnist", None, []],
    "split": ["trein", 0],
    "name": [None, "\x1b[2J", "a\u202eb", "a\nb", "x" * 201],
    "count": ["200", 200.5, None, True, 0, -1],
    "class_names": ["airplane", None, [], list(range(10)), ["\x1b]0;title\x07"], ["x" * 201]],
    "mean": [[0.5, 0.5], 0.5, None, ["a", "b", "c"], [0.5, 0.5, 1.5], [True] * 3, [float("nan")] * 3],
    "std": ["abc", [0.2, None, 0.2], [0.2, 0.2, -0.1]],
    "sha256": [None, 0],
    "official": [0, "yes"],
    "synthetic": [None, 1],
    "source_md5": [None, [], {"train": 1}],
    "source_sha256": [3, {"\x07": "1"}],
    "versions": [[], {"numpy": 2}],
}


def test_what_is_no_manifest_is_named(small: Path) -> None:
    path = manifest_path(small)
    values = json.loads(path.read_text())
    incomplete = [{name: value for name, value in values.items() if name != left_out} for left_out in values]
    contents = [*NOT_MANIFESTS, *(json.dumps(value).encode() for value in [*incomplete, values | {"surprise": 1}])]
    for content in [*contents, b" " * (2 << 20)]:
        path.write_bytes(content)
        refusal(small, named=path)
    for name, wrong in WRONG_TYPES.items():
        for value in wrong:
            path.write_text(json.dumps(values | {name: value}))
            assert f": {name} cannot be" in refusal(small, named=path)


@pytest.mark.parametrize("bits", [[0], pytest.param(range(1, 8), marks=pytest.mark.slow)])
def test_a_manifest_with_a_flipped_bit_is_refused(small: Path, bits: Iterable[int]) -> None:
    """First one bit of each byte, from byte to byte another one; then the other seven."""
    path = manifest_path(small)
    content = path.read_bytes()
    for place, bit in itertools.product(range(len(content)), bits):
        flipped = bytearray(content)
        flipped[place] ^= 1 << (place + bit) % 8
        path.write_bytes(flipped)
        refusal(small, named=path)


def write_older_manifest(path: Path, **entries: Any) -> None:
    """As version 0.2 and before: without sha256 of the sources and of itself."""
    values = asdict(MANIFEST) | entries
    del values["source_sha256"]
    manifest_path(path).write_text(json.dumps(values, indent=2) + "\n")


def test_an_older_manifest_is_read_and_its_statistics_are_computed_again(small: Path) -> None:
    write_older_manifest(small)
    assert read_beton(small).manifest == replace(MANIFEST, source_sha256={})
    assert load_streamed(small, torch.device("cpu"))[1].mean == MANIFEST.mean
    for name in ("mean", "std"):
        values = getattr(MANIFEST, name)
        write_older_manifest(small, **{name: [values[0], values[1] + 1e-6, values[2]]})
        for read in (read_beton, lambda path: load_streamed(path, torch.device("cpu"))):
            with pytest.raises(InputError, match=r"train\.json has another mean or std than the images"):
                read(small)


def test_what_is_no_file_or_far_too_large_is_refused_unread(small: Path) -> None:
    os.truncate(small, 1 << 33)  # takes no room on the disk
    assert "8,589,934,592 bytes" in refusal(small)
    for path in (small, manifest_path(small)):
        path.unlink()
        os.mkfifo(path)  # opening it would wait for ever
        assert "is not a file" in refusal(small, named=path)
        path.unlink()
        path.write_bytes(MANIFEST.encoded())


def test_another_sha256_is_refused_unless_it_is_not_asked_for(small: Path) -> None:
    change_manifest(small, sha256="0" * 64)
    assert "sha256" in refusal(small)
    assert len(read_beton(small, verify=False).labels) == COUNT


@pytest.mark.parametrize("verify", [True, False])
def test_another_count_or_too_few_classes_are_refused(small: Path, verify: bool) -> None:
    for count in (COUNT - 1, COUNT + 1):
        change_manifest(small, count=count)
        assert f"{COUNT} images, its manifest says {count}" in refusal(small, verify=verify)
    for classes in (1, 9):
        change_manifest(small, count=COUNT, class_names=["name"] * classes)
        assert f"label 9 for {classes} classes" in refusal(small, verify=verify)


def test_the_manifest_of_another_beton_is_refused(betons: Path, tmp_path: Path) -> None:
    shutil.copy(betons / "train.beton", tmp_path)
    shutil.copy(betons / "test.json", tmp_path / "train.json")
    refusal(tmp_path / "train.beton")
