"""Betons come back byte for byte, FFCV reads them alike, and no damaged one is read or crashes the reader."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_prep.cifar_pickles import LAYOUTS, read_split
from fastcifar import beton
from fastcifar.beton import Beton, Manifest, manifest_path, parse, read_beton
from fastcifar.errors import InputError

COUNT = 200  # images in the session's train.beton
REMEDY = "data_prep/write_beton.py"
START = 24 + 3 * 1041  # where metadata begins
END = START + 32 * COUNT  # where it ends; zeros follow up to the first page
PIXELS = 1 << 23  # where the first page begins
SIZE = 2 * PIXELS + 24 * COUNT  # header and metadata fill up the room of one page, pixels another, then the table
U64 = 2**64


class Parts:
    """The parts of a beton's bytes, as arrays that change the bytes."""

    def __init__(self, content: bytearray) -> None:
        self.content = content
        self.header = np.frombuffer(content, beton.HEADER, 1)[0:1]
        self.fields = np.frombuffer(content, beton.FIELD_DESCRIPTOR, 3, 24)
        self.samples = np.frombuffer(content, beton.SAMPLE_METADATA, COUNT, START)
        self.table = np.frombuffer(content, beton.ALLOCATION, COUNT, len(content) - 24 * COUNT)

    def move(self, sample: int, pointer: int) -> None:
        """Point sample and allocation table, consistently, to another place: only a check of bounds can notice."""
        self.samples["image"]["data_ptr"][sample] = pointer
        self.table["ptr"][sample] = pointer

    def rename(self, field: int, name: bytes) -> None:
        self.fields["name"][field] = np.frombuffer(name.ljust(16, b"\0"), np.uint8)


@pytest.fixture(scope="module")
def sound(betons: Path) -> bytes:
    content = (betons / "train.beton").read_bytes()
    assert len(content) == SIZE
    return content


def copy_pair(betons: Path, folder: Path) -> Path:
    for name in ("train.beton", "train.json"):
        shutil.copy(betons / name, folder)
    return folder / "train.beton"


@pytest.fixture
def pair(betons: Path, tmp_path: Path) -> Path:
    """train.beton with its manifest, to be changed by one test."""
    return copy_pair(betons, tmp_path)


@pytest.fixture(scope="module")
def copy(betons: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for many examples, each of which undoes its change."""
    return copy_pair(betons, tmp_path_factory.mktemp("copy"))


@pytest.fixture(scope="module")
def scratch(betons: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for tests that write the whole beton anew, each over the last one's."""
    return copy_pair(betons, tmp_path_factory.mktemp("scratch"))


@pytest.fixture(scope="module")
def write() -> Callable[[Path, np.ndarray, np.ndarray], bytes]:
    """FFCV's writer, imported here since that takes seconds."""
    from data_prep import ffcv_writer

    def write(path: Path, images: np.ndarray, labels: np.ndarray) -> bytes:
        ffcv_writer.write(path, images, labels, advance=lambda: None)
        return path.read_bytes()

    return write


def random_images(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, count)


def seal(path: Path, content: bytes) -> Path:
    """Write `content` with a manifest that has its sha256, so that nothing but a check of the content can refuse it."""
    path.write_bytes(content)
    change_manifest(path, sha256=hashlib.sha256(content).hexdigest())
    return path


def change_manifest(path: Path, **entries: Any) -> None:
    values = json.loads(manifest_path(path).read_text())
    manifest_path(path).write_text(json.dumps(values | entries))


def refusal(path: Path, *, verify: bool = True, named: Path | None = None) -> str:
    """The message with which `path` is refused; it names the file (or `named`) and what to do."""
    with pytest.raises(InputError) as caught:
        read_beton(path, verify=verify)
    assert str(named or path) in str(caught.value)
    assert REMEDY in str(caught.value)
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
    assert [(name, types.TYPE_ID_HANDLER[number]) for name, number in beton.FIELDS] == [
        ("image", RGBImageField),
        ("label", IntField),
        ("index", IntField),
    ]


@pytest.mark.parametrize("count", [1, 2, 101, 2730, 2731])  # 2730 images fill a page of 8 MiB
def test_images_come_back_byte_for_byte(tmp_path: Path, write: Callable, count: int) -> None:
    images, labels = random_images(count)
    content = write(tmp_path / "some.beton", images, labels)
    read, read_labels, index = parse(content, tmp_path / "some.beton")
    assert read.dtype == np.uint8
    assert read.shape == (count, 32, 32, 3)
    np.testing.assert_array_equal(read, images)
    assert read_labels.dtype == np.int64
    np.testing.assert_array_equal(read_labels, labels)
    assert index.dtype == np.int64
    np.testing.assert_array_equal(index, np.arange(count))


def test_images_over_several_pages_come_back_here_and_in_ffcv(tmp_path: Path, write: Callable) -> None:
    from ffcv.reader import Reader

    images, labels = random_images(6000)
    path = tmp_path / "large.beton"
    content = write(path, images, labels)
    read, read_labels, index = parse(content, path)
    np.testing.assert_array_equal(read, images)
    np.testing.assert_array_equal(read_labels, labels)
    np.testing.assert_array_equal(index, np.arange(6000))
    pointers = np.sort(Reader(str(path)).alloc_table["ptr"])
    assert (np.diff(pointers) > 3072).sum() == 2  # the gaps at the ends of the first two of three pages


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, write: Callable) -> None:
    images, labels = random_images(120)
    assert write(tmp_path / "a.beton", images, labels) == write(tmp_path / "b.beton", images, labels)


def test_images_that_are_not_contiguous_come_back(tmp_path: Path, write: Callable) -> None:
    images, labels = random_images(40)
    content = write(tmp_path / "some.beton", images[::2, :, ::-1], labels[::2])
    np.testing.assert_array_equal(parse(content, tmp_path)[0], images[::2, :, ::-1])


@pytest.mark.parametrize("split", ["train", "test"])
def test_what_was_in_the_pickles_is_in_the_beton(betons: Path, pickles: Path, split: str) -> None:
    source = read_split(pickles, LAYOUTS["cifar10"], split)
    read = read_beton(betons / f"{split}.beton")
    np.testing.assert_array_equal(read.images, source.images)
    np.testing.assert_array_equal(read.labels, source.labels)
    np.testing.assert_array_equal(read.index, np.arange(len(source.labels)))
    assert read.manifest.class_names == source.class_names
    assert read.manifest.split == split


def test_ffcvs_reader_agrees(betons: Path) -> None:
    from ffcv.reader import Reader

    path = betons / "train.beton"
    ours, theirs = read_beton(path), Reader(str(path))
    assert theirs.field_names == ["image", "label", "index"]
    assert theirs.num_samples == COUNT
    np.testing.assert_array_equal(theirs.metadata["f1"], ours.labels)
    np.testing.assert_array_equal(theirs.metadata["f2"], ours.index)
    content = np.fromfile(path, np.uint8)
    for sample in (0, 1, 99, COUNT - 1):
        pointer = int(theirs.metadata["f0"]["data_ptr"][sample])
        np.testing.assert_array_equal(content[pointer : pointer + 3072].reshape(32, 32, 3), ours.images[sample])


def test_ffcvs_loader_gives_the_same_in_order(betons: Path) -> None:
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import ToTensor

    ours = read_beton(betons / "train.beton")
    pipelines = {
        "image": [SimpleRGBImageDecoder(), ToTensor()],
        "label": [IntDecoder(), ToTensor()],
        "index": [IntDecoder(), ToTensor()],
    }
    loader = Loader(
        str(betons / "train.beton"),
        batch_size=64,
        num_workers=1,
        os_cache=True,
        order=OrderOption.SEQUENTIAL,
        drop_last=False,
        pipelines=pipelines,
    )
    batches = [tuple(part.numpy().copy() for part in batch) for batch in loader]  # the loader uses its buffers again
    images, labels, index = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    np.testing.assert_array_equal(images, ours.images)
    np.testing.assert_array_equal(labels.reshape(-1), ours.labels)
    np.testing.assert_array_equal(index.reshape(-1), ours.index)


def test_images_are_found_by_their_pointers_not_by_their_order(pair: Path, sound: bytes) -> None:
    """FFCV with several workers stores images out of order; nothing is wrong with that."""
    order = np.random.default_rng(0).permutation(COUNT)
    before = read_beton(pair)
    parts = Parts(bytearray(sound))
    pointers = parts.samples["image"]["data_ptr"].copy()
    for sample, place in enumerate(order):
        parts.move(sample, pointers[place])
    parts.table[:] = parts.table[np.random.default_rng(1).permutation(COUNT)]
    after = read_beton(seal(pair, bytes(parts.content)))
    np.testing.assert_array_equal(after.images, before.images[order])
    np.testing.assert_array_equal(after.labels, before.labels)


def test_sample_numbers_may_stand_in_any_order(pair: Path, sound: bytes) -> None:
    parts = Parts(bytearray(sound))
    parts.samples["index"] = np.arange(COUNT)[::-1]
    assert read_beton(seal(pair, bytes(parts.content))).index.tolist() == list(range(COUNT))[::-1]


# Damage. The manifest's sha256 fits the damaged file, or is not asked for, so that the checks of the structure stand alone.


def set_header(**values: int) -> Callable[[Parts], None]:
    def edit(parts: Parts) -> None:
        for name, value in values.items():
            parts.header[name] = value

    return edit


def set_sample(field: str, value: int, sample: int = 7) -> Callable[[Parts], None]:
    def edit(parts: Parts) -> None:
        target = parts.samples[field] if field in ("label", "index") else parts.samples["image"][field]
        target[sample] = value

    return edit


def set_table(field: str, value: int, sample: int = 7) -> Callable[[Parts], None]:
    def edit(parts: Parts) -> None:
        parts.table[field][sample] = value

    return edit


def fill(start: int, stop: int, byte: int) -> Callable[[Parts], None]:
    def edit(parts: Parts) -> None:
        np.frombuffer(parts.content, np.uint8)[start:stop] = byte

    return edit


def swap_fields(parts: Parts) -> None:
    parts.fields[[1, 2]] = parts.fields[[2, 1]]


TABLE = 2 * PIXELS  # where the allocation table begins
DAMAGE: dict[str, Callable[[Parts], None]] = {
    "header of zeros": fill(0, 24, 0),
    "header of ones": fill(0, 24, 255),
    "field descriptors of zeros": fill(24, START, 0),
    "metadata of zeros": fill(START, END, 0),
    "metadata of ones": fill(START, END, 255),
    "allocation table of zeros": fill(TABLE, SIZE, 0),
    "file of zeros": fill(0, SIZE, 0),
    "file of ones": fill(0, SIZE, 255),
    "version 0": set_header(version=0),
    "version 1": set_header(version=1),
    "version 3": set_header(version=3),
    "no fields": set_header(num_fields=0),
    "two fields": set_header(num_fields=2),
    "four fields": set_header(num_fields=4),
    "no samples": set_header(num_samples=0),
    "a sample fewer": set_header(num_samples=COUNT - 1),
    "a sample more": set_header(num_samples=COUNT + 1),
    "2^59 samples": set_header(num_samples=2**59),  # times 32 bytes wraps around to 0
    "2^61 samples": set_header(num_samples=2**61),  # times 24 bytes and 32 bytes, likewise
    "2^61 samples and no table": set_header(num_samples=2**61, alloc_table_ptr=SIZE),
    "2^64 - 1 samples": set_header(num_samples=U64 - 1),
    "table pointer 0": set_header(alloc_table_ptr=0),
    "table pointer into the metadata": set_header(alloc_table_ptr=END - 1),
    "table pointer a byte early": set_header(alloc_table_ptr=TABLE - 1),
    "table pointer a byte late": set_header(alloc_table_ptr=TABLE + 1),
    "table pointer an entry late": set_header(alloc_table_ptr=TABLE + 24),
    "table pointer at the end": set_header(alloc_table_ptr=SIZE),
    "table pointer past the end": set_header(alloc_table_ptr=SIZE + 24),
    "table pointer 2^63": set_header(alloc_table_ptr=2**63),
    "table pointer 2^64 - 1": set_header(alloc_table_ptr=U64 - 1),
    "field of another name": lambda parts: parts.rename(0, b"picture"),
    "field of a longer name": lambda parts: parts.rename(0, b"image\0\0x"),
    "field name that is not ASCII": lambda parts: parts.rename(2, b"\xff\n\x1b[2J"),
    "field of another type": lambda parts: parts.fields["type_id"].__setitem__(1, 0),
    "field of a type of its own": lambda parts: parts.fields["type_id"].__setitem__(0, 255),
    "fields in another order": swap_fields,
    "image stored as JPEG": set_sample("mode", 0),
    "image of an unknown mode": set_sample("mode", 2),
    "narrow image": set_sample("width", 31),
    "wide image": set_sample("width", 65535),
    "image without height": set_sample("height", 0),
    "high image": set_sample("height", 33),
    "image pointer 0": lambda parts: parts.move(7, 0),
    "image pointer into the metadata": lambda parts: parts.move(0, END - 1),
    "image pointer so that the image ends in the table": lambda parts: parts.move(COUNT - 1, TABLE - 3071),
    "image pointer to the table": lambda parts: parts.move(COUNT - 1, TABLE),
    "image pointer to the end": lambda parts: parts.move(COUNT - 1, SIZE),
    "image pointer past the end": lambda parts: parts.move(COUNT - 1, SIZE + PIXELS),
    "image pointer 2^63": lambda parts: parts.move(7, 2**63),
    "image pointer 2^64 - 3072": lambda parts: parts.move(7, U64 - 3072),  # its image would end at byte 0
    "image pointer 2^64 - 1": lambda parts: parts.move(7, U64 - 1),
    "all image pointers 0": lambda parts: [parts.move(sample, 0) for sample in range(COUNT)],
    "two images in the same place": lambda parts: parts.move(8, PIXELS + 7 * 3072),
    "two images that overlap by a byte": lambda parts: parts.move(8, PIXELS + 8 * 3072 - 1),
    "misaligned image pointer": lambda parts: parts.move(8, PIXELS + 8 * 3072 + 1),
    "pointer that the table does not confirm": set_sample("data_ptr", TABLE - 3072),
    "table with another pointer": set_table("ptr", TABLE - 3072),
    "table with a smaller image": set_table("size", 3071),
    "table with a larger image": set_table("size", 3073),
    "table with an endless image": set_table("size", U64 - 1),
    "table with a sample twice": set_table("sample_id", 8),
    "table with an unknown sample": set_table("sample_id", COUNT),
    "table with sample 2^64 - 1": set_table("sample_id", U64 - 1),
    "negative label": set_sample("label", -1),
    "label beyond the classes": set_sample("label", 10),
    "label 2^63 - 1": set_sample("label", 2**63 - 1),
    "label -2^63": set_sample("label", -(2**63)),
    "sample number twice": set_sample("index", 8),
    "negative sample number": set_sample("index", -1),
    "sample number too large": set_sample("index", COUNT),
    "sample number 2^63 - 1": set_sample("index", 2**63 - 1),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_structure_is_refused(scratch: Path, sound: bytes, damage: str) -> None:
    parts = Parts(bytearray(sound))
    DAMAGE[damage](parts)
    assert parts.content != sound
    scratch.write_bytes(parts.content)
    assert refusal(scratch, verify=False).isprintable()  # what a terminal shows of a strange file is one harmless line


@pytest.mark.parametrize("extra", [1, 24, 3072])
def test_an_extended_file_is_refused(pair: Path, sound: bytes, extra: int) -> None:
    assert "extended" in refusal(seal(pair, sound + bytes(extra)))


@pytest.mark.parametrize(
    "length", [0, 1, 23, 24, 24 + 1041, START - 1, START, START + 32, END, PIXELS, TABLE, SIZE - 24, SIZE - 1]
)
def test_a_truncated_file_is_refused(pair: Path, sound: bytes, length: int) -> None:
    assert "sha256" not in refusal(seal(pair, sound[:length]))


def test_a_beton_without_samples_is_refused(pair: Path, sound: bytes) -> None:
    """Consistent, as FFCV would write it of nothing, and still no data."""
    parts = Parts(bytearray(sound))
    set_header(num_samples=0, alloc_table_ptr=START)(parts)
    assert "no samples" in refusal(seal(pair, bytes(parts.content[:START])))


def test_an_allocation_table_over_the_metadata_is_refused(pair: Path, sound: bytes) -> None:
    parts = Parts(bytearray(sound))
    set_header(alloc_table_ptr=START)(parts)
    assert "table" in refusal(seal(pair, bytes(parts.content[: START + 24 * COUNT])))


@given(length=st.integers(0, SIZE - 1))
def test_a_file_truncated_anywhere_is_refused(sound: bytes, length: int) -> None:
    with pytest.raises(InputError, match=r"some\.beton.*write_beton\.py"):
        parse(sound[:length], Path("some.beton"))


# Where a byte may be wrong: any part as likely as the others, though zeros and pixels fill most of the file.
positions = st.one_of(
    st.integers(0, 23),
    st.integers(24, START - 1),
    st.integers(START, END - 1),
    st.integers(END, PIXELS - 1),
    st.integers(PIXELS, PIXELS + COUNT * 3072 - 1),
    st.integers(PIXELS + COUNT * 3072, TABLE - 1),
    st.integers(TABLE, SIZE - 1),
)


@given(position=positions, flip=st.integers(1, 255))
@example(position=4, flip=1)  # the page size, which only FFCV uses
@example(position=SIZE - 1, flip=128)
def test_one_wrong_byte_is_always_noticed(copy: Path, sound: bytes, position: int, flip: int) -> None:
    with open(copy, "rb+") as file:
        file.seek(position)
        file.write(bytes([sound[position] ^ flip]))
        file.flush()
        try:
            refusal(copy)
        finally:
            file.seek(position)
            file.write(sound[position : position + 1])
    assert copy.stat().st_size == SIZE


@given(position=positions, flip=st.integers(1, 255))
def test_one_wrong_byte_without_the_hash_is_refused_or_read(copy: Path, sound: bytes, position: int, flip: int) -> None:
    with open(copy, "rb+") as file:
        file.seek(position)
        file.write(bytes([sound[position] ^ flip]))
        file.flush()
        try:
            read = read_beton(copy, verify=False)
            assert isinstance(read, Beton)
            assert read.images.shape == (COUNT, 32, 32, 3)
        except InputError as error:
            assert str(copy) in str(error)  # noqa: PT017  # a successful read is as good
        finally:
            file.seek(position)
            file.write(sound[position : position + 1])


@given(sample=st.integers(0, COUNT - 1), pointer=st.one_of(st.integers(0, U64 - 1), st.integers(0, SIZE)))
@example(sample=COUNT - 1, pointer=TABLE - 3072)  # the last place that is allowed
@example(sample=0, pointer=END)  # the first
def test_a_consistent_pointer_is_refused_or_followed(sound: bytes, sample: int, pointer: int) -> None:
    parts = Parts(bytearray(sound))
    parts.move(sample, pointer)
    content = bytes(parts.content)
    try:
        images, _, _ = parse(content, Path("some.beton"))
    except InputError:
        others = [int(place) for place in parts.samples["image"]["data_ptr"][np.arange(COUNT) != sample]]
        overlaps = any(abs(place - pointer) < 3072 for place in others)
        assert overlaps or not END <= pointer <= TABLE - 3072  # refused for a reason
    else:
        assert images[sample].tobytes() == content[pointer : pointer + 3072]


def test_a_missing_beton_is_named(tmp_path: Path) -> None:
    assert "missing" in refusal(tmp_path / "train.beton")


# The manifest


def test_a_manifest_comes_back_equal(tmp_path: Path) -> None:
    manifest = Manifest(
        dataset="cifar100",
        split="test",
        name="a name with ünïcode",
        count=3,
        class_names=["a", "b"],
        mean=[0.1, 0.2, 0.3],
        std=[0.4, 0.5, 0.6],
        sha256="0" * 64,
        official=True,
        synthetic=False,
        source_md5={"train": "1" * 32},
        versions={"ffcv": "1.0.2", "numpy": None},
    )
    manifest.save(tmp_path / "test.beton")
    assert Manifest.load(tmp_path / "test.beton") == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["test.json"]


def test_a_missing_manifest_is_named(pair: Path) -> None:
    manifest_path(pair).unlink()
    assert "missing" in refusal(pair, named=manifest_path(pair))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"nothing"])
def test_a_manifest_that_is_not_json_is_named(pair: Path, content: bytes) -> None:
    manifest_path(pair).write_bytes(content)
    refusal(pair, named=manifest_path(pair))


@pytest.mark.parametrize("content", ["[]", "3", "null", '"text"', "{}", '{"sha256": "0"}'])
def test_a_manifest_of_another_kind_is_named(pair: Path, content: str) -> None:
    manifest_path(pair).write_text(content)
    refusal(pair, named=manifest_path(pair))


@pytest.mark.parametrize("name", list(Manifest.__dataclass_fields__))
def test_a_manifest_without_a_field_is_named(pair: Path, name: str) -> None:
    values = json.loads(manifest_path(pair).read_text())
    del values[name]
    manifest_path(pair).write_text(json.dumps(values))
    refusal(pair, named=manifest_path(pair))


def test_a_manifest_with_an_unknown_field_is_named(pair: Path) -> None:
    change_manifest(pair, surprise=1)
    refusal(pair, named=manifest_path(pair))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("count", "200"),
        ("count", 200.5),
        ("count", None),
        ("sha256", None),
        ("sha256", 0),
        ("class_names", "airplane"),
        ("class_names", None),
        ("class_names", list(range(10))),
        ("mean", [0.5, 0.5]),
        ("mean", 0.5),
        ("mean", None),
        ("mean", ["a", "b", "c"]),
        ("std", "abc"),
        ("std", [0.2, None, 0.2]),
    ],
    ids=str,
)
def test_a_manifest_with_a_field_of_the_wrong_type_is_named(pair: Path, name: str, value: object) -> None:
    change_manifest(pair, **{name: value})
    refusal(pair, named=manifest_path(pair))


def test_another_sha256_is_refused_unless_it_is_not_asked_for(pair: Path) -> None:
    change_manifest(pair, sha256="0" * 64)
    assert "sha256" in refusal(pair)
    assert len(read_beton(pair, verify=False).labels) == COUNT


@pytest.mark.parametrize("count", [0, COUNT - 1, COUNT + 1, -1])
@pytest.mark.parametrize("verify", [True, False])
def test_another_count_is_refused(pair: Path, count: int, verify: bool) -> None:
    change_manifest(pair, count=count)
    assert str(COUNT) in refusal(pair, verify=verify)


@pytest.mark.parametrize("classes", [0, 1, 9])
@pytest.mark.parametrize("verify", [True, False])
def test_fewer_classes_than_labels_are_refused(pair: Path, classes: int, verify: bool) -> None:
    change_manifest(pair, class_names=[f"class {number}" for number in range(classes)])
    refusal(pair, verify=verify)


def test_the_manifest_of_another_beton_is_refused(pair: Path, betons: Path) -> None:
    shutil.copy(betons / "test.json", manifest_path(pair))
    refusal(pair)
