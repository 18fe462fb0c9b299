"""Cases for the readers of data: pickles, betons, manifests, and what predict takes."""

import hashlib
import json
import pickle
import pickletools
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.cifar_pickles import LAYOUTS, _read_batch
from fastcifar.beton import IMAGE_BYTES, read_beton
from fastcifar.dataset import load_resident, load_splits, load_streamed
from fastcifar.errors import InputError
from fastcifar.predict import read_unlabelled
from fastcifar.safe_pickle import load_pickle
from tests.reliability.fuzz import Case
from tests.small_betons import COUNT, END, PIXELS, SIZE, START, TABLE, U64, VALID, Parts, manifest_of, small_beton

CPU = torch.device("cpu")
NUMBERS = (0, 1, 2, 3, 7, 9, 10, 31, 32, 255, 256, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, U64 - 1)


def damaged(rng: random.Random, content: bytes, times: int = 3) -> bytes:
    """Up to so many flipped bits, changed, inserted or deleted bytes, or a cut."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, times)):
        place = rng.randrange(max(1, len(changed)))
        match rng.choice(["flip", "flip", "set", "set", "insert", "delete", "copy", "cut"]):
            case "flip" if changed:
                changed[place] ^= 1 << rng.randrange(8)
            case "set" if changed:
                changed[place] = rng.randrange(256)
            case "insert":
                changed[place:place] = rng.randbytes(rng.randint(1, 8))
            case "delete":
                del changed[place : place + rng.randint(1, 8)]
            case "copy":
                start = rng.randrange(max(1, len(changed)))
                changed[place:place] = changed[start : start + rng.randint(1, 200)]
            case "cut":
                del changed[place:]
    return bytes(changed)


# Pickles


def short(text: bytes) -> bytes:
    """A Python 2 str of under 256 bytes."""
    return b"U" + bytes([len(text)]) + text


def number(rng: random.Random) -> int:
    return rng.choice(NUMBERS) if rng.random() < 0.7 else rng.randrange(1 << rng.randint(1, 70))


DTYPE = b"cnumpy\ndtype\nU\x02%sK\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
SNIPPETS: list[Callable[[random.Random], bytes]] = [
    lambda rng: bytes([rng.randrange(256)]),
    lambda rng: bytes([rng.choice(b"(012])}ltdaesuNRb")]),
    lambda rng: b"K" + rng.randbytes(1) + b"M" + rng.randbytes(2) + b"J" + rng.randbytes(4),
    lambda rng: (
        rng.choice([b"B", b"T", b"X", b"\x8b"]) + struct.pack("<I", number(rng) % 2**32) + rng.randbytes(rng.randint(0, 9))
    ),
    lambda rng: rng.choice([b"\x8d", b"\x8e", b"\x96", b"\x95"]) + struct.pack("<Q", number(rng) % U64) + rng.randbytes(9),
    lambda rng: rng.choice([b"r", b"j"]) + struct.pack("<I", number(rng) % 2**32),
    lambda rng: rng.choice([b"q", b"h", b"\x80", b"\x82", b"\x8a", b"C", b"U"]) + rng.randbytes(rng.randint(1, 6)),
    lambda rng: rng.choice([b"I", b"L", b"F", b"g", b"p", b"S", b"V"]) + b"%d\n" % number(rng),
    lambda rng: rng.choice([b"I", b"L", b"F", b"V", b"S'"]) + b"9" * rng.choice([10, 5000, 50_000]) + b"\n",
    lambda rng: rng.choice([b"\x8f", b"\x90", b"\x91", b"\x92", b"\x81", b"\x94", b"\x97", b"\x98", b"Q", b"o"]),
    lambda rng: (
        rng.choice([b"cos\nsystem\n", b"cposix\nsystem\n", b"c__builtin__\neval\n", b"cnumpy\nload\n", b"cnumpy\nmemmap\n"])
        + rng.choice([b"", short(b"touch mark") + b"\x85R"])
    ),
    lambda rng: b"(S'touch mark'\nios\nsystem\n",
    lambda rng: b"\x8c\x02os\x8c\x06system\x93" + short(b"touch mark") + b"\x85R",
    lambda rng: b"c_codecs\nencode\nX\x04\x00\x00\x00markX\x06\x00\x00\x00latin1\x86R" * rng.choice([1, 300]),
    lambda rng: DTYPE % rng.choice([b"u1", b"i8", b"f4", b"O8", b"V8", b"S3", b"b1", b"c8", b"M8"]),
    lambda rng: b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R",
    lambda rng: (
        b"cnumpy.core.multiarray\nscalar\n" + DTYPE % b"i8" + short(rng.randbytes(rng.choice([0, 7, 8, 16]))) + b"\x86R"
    ),
    lambda rng: (
        b"cnumpy.core.numeric\n_frombuffer\n("
        + short(rng.randbytes(6))
        + DTYPE % b"u1"
        + b"J"
        + struct.pack("<i", rng.choice([6, 0, -1, 2**31 - 1]))
        + b"\x85U\x01CtR"
    ),
    lambda rng: b"X" + struct.pack("<I", 70_003) + "\u20ac".encode() + b"x" * 70_000,
    lambda rng: rng.choice([b"(", b"]", b"}", b")\x85", b"0", b"2", b"N", b"\x94"]) * rng.choice([10, 5000, 60_000, 2_000_000]),
]


def honest_batch(rng: random.Random) -> tuple[bytes, np.ndarray, list[int]]:
    """A batch as some Python wrote it, its rows [N, 3072] and labels."""
    count = rng.randint(1, 3)
    rows = np.frombuffer(rng.randbytes(count * IMAGE_BYTES), np.uint8).reshape(count, IMAGE_BYTES)
    labels = [rng.randrange(10) for _ in range(count)]
    forms: list[Any] = [labels, np.array(labels), [np.int64(label) for label in labels], np.array(labels, np.uint8)]
    array = rng.choice([rows, np.asfortranarray(rows), np.repeat(rows, 2, 0)[::2]])
    batch = {"labels": rng.choice(forms), "data": array, "filenames": [f"{i}.png" for i in range(count)]}
    if rng.random() < 0.5:
        batch = {key.encode(): value for key, value in batch.items()}  # type: ignore[misc]
    return pickle.dumps(batch, protocol=rng.randint(0, 5)), rows, labels


WRONG_VALUES: list[Callable[[random.Random], Any]] = [
    lambda rng: number(rng),
    lambda rng: -number(rng),
    lambda rng: 10 ** rng.choice([30, 5000]),
    lambda rng: rng.choice(
        [None, True, 1.5, float("nan"), b"", "", "text", b"\xff\xfe", "\x1b[2J", [], {}, (), [[]], {"a": 1}]
    ),
    lambda rng: [rng.choice([0, True, 3.0, "1", b"1", None, -1, 10, 10**5000, np.float32(2), [1]]) for _ in range(2)],
    lambda rng: np.zeros(rng.choice([(0, 3072), (2, 3071), (2, 32, 32, 3), (2, 3, 32, 32), (2, 2), (), (6144,)]), np.uint8),
    lambda rng: np.zeros((2, 3072), rng.choice(["i1", "<i8", ">u2", "f4", "?", "O", "S1", "M8[s]", "c8", "V3"])),
    lambda rng: ["a" * rng.choice([1, 300]), rng.choice(["=1", "b", "\x07", "a", "-1"])],
]


def opcodes(content: bytes) -> list[bytes]:
    """A stream in pieces of one opcode each."""
    starts = [place for _, _, place in pickletools.genops(content)]
    return [content[start:stop] for start, stop in zip(starts, [*starts[1:], len(content)], strict=True)]


def make_pickle(rng: random.Random) -> Case:
    """A batch of CIFAR, honest or changed in its opcodes, bytes or values, or a stream of hostile opcodes."""
    content, rows, labels = honest_batch(rng)
    kind = rng.choice(["honest", "opcodes", "opcodes", "opcodes", "bytes", "bytes", "values", "stream"])
    if kind == "opcodes":
        pieces = opcodes(content)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(pieces))
            match rng.choice(["delete", "double", "swap", "insert", "insert", "replace"]):
                case "delete":
                    pieces[place : place + rng.randint(1, 3)] = [b""]
                case "double":
                    pieces[place:place] = pieces[place : place + rng.randint(1, 20)] * rng.choice([1, 2, 50])
                case "swap":
                    other = rng.randrange(len(pieces))
                    pieces[place], pieces[other] = pieces[other], pieces[place]
                case "insert":
                    pieces[place:place] = [rng.choice(SNIPPETS)(rng)]
                case "replace":
                    pieces[place] = rng.choice(SNIPPETS)(rng)
        content = b"".join(pieces)
    elif kind == "bytes":
        pixels = content.find(rows[0, :64].tobytes())
        split = rng.choice([0, max(0, pixels)])  # before the pixels every byte counts
        content = (
            content[:split] + damaged(rng, content[split:]) if rng.random() < 0.5 else damaged(rng, content[: split or None])
        )
    elif kind == "values":
        batch = {"data": rows, "labels": labels, "ids": list(range(len(rows)))}
        batch |= {rng.choice(["data", "labels", "ids", "fine_labels", "\x1b"]): rng.choice(WRONG_VALUES)(rng)}
        content = pickle.dumps(batch, protocol=rng.randint(2, 5))
    elif kind == "stream":
        parts = [rng.choice(SNIPPETS)(rng) for _ in range(rng.randint(1, 25))]
        content = rng.choice([b"\x80\x02}", b"\x80\x04}", b"", b"\x80\x05}" + short(b"data")]) + b"".join(parts) + b"s."

    def read(folder: Path) -> None:
        values = load_pickle(folder / "batch")  # where this refuses, the others would
        check_plain(values, content)
        assert_batch_readers(folder / "batch", content, (rows, labels) if kind == "honest" else None)

    return Case(kind, {"batch": content}, read)


def check_plain(values: dict[str, Any], content: bytes) -> None:
    """Every array has a number's dtype and shows bytes that the file holds."""
    assert all(isinstance(key, str) for key in values)
    for value in values.values():
        if isinstance(value, np.ndarray):
            assert value.dtype.kind in "uifb", value.dtype
            raw = value.tobytes("A")
            text = raw.decode("latin1")  # as protocols 1 and 2 have it, and 0 with escapes
            assert raw in content or text.encode() in content or text in content.decode("raw-unicode-escape", "replace")


def assert_batch_readers(path: Path, content: bytes, expected: tuple[np.ndarray, list[int]] | None) -> None:
    """What data_prep and predict make of it: both may refuse, an honest batch they must read."""
    for reader in (lambda: _read_batch(path, LAYOUTS["cifar10"]), lambda: read_unlabelled(path)):
        try:
            found = reader()
        except InputError:
            assert expected is None, "an honest batch was refused"
            continue
        if isinstance(found, tuple):
            rows, labels = found
            assert rows.shape == (len(labels), IMAGE_BYTES)
            assert rows.dtype == np.uint8
            assert labels.min() >= 0
            assert labels.max() < 10
            if expected is not None:
                np.testing.assert_array_equal(rows, expected[0])
                assert labels.tolist() == expected[1]
        else:
            assert found.images.shape == (len(found.ids), 32, 32, 3)
            assert len(set(found.ids)) == len(found.ids)
            assert all(name.isprintable() and name for name in found.ids)
            if expected is not None:
                np.testing.assert_array_equal(found.images.transpose(0, 3, 1, 2).reshape(-1, IMAGE_BYTES), expected[0])


# Betons

FIELDS = {
    "header": ("version", "num_fields", "page_size", "num_samples", "alloc_table_ptr"),
    "fields": ("type_id",),
    "image": ("mode", "width", "height", "data_ptr"),
    "samples": ("label", "index"),
    "table": ("sample_id", "ptr", "size"),
}
REGIONS = ((0, 24), (24, START), (START, END), (END, PIXELS), (PIXELS, TABLE), (TABLE, SIZE))


def change_beton(rng: random.Random, parts: Parts) -> str:
    """One change of a field, of a pointer in both of its places, of bytes in a region, or a reordering that is valid."""
    kind = rng.choice(["field", "field", "field", "pointer", "bytes", "bytes", "reorder"])
    if kind == "field":
        part = rng.choice(list(FIELDS))
        name, row = rng.choice(FIELDS[part]), rng.randrange({"header": 1, "fields": 3}.get(part, COUNT))
        parts.set(part, name, row, rng.choice([number(rng), rng.randrange(SIZE), rng.randrange(12), COUNT - 1, 2**59, 2**61]))
    elif kind == "pointer":
        parts.move(rng.randrange(COUNT), rng.choice([number(rng), rng.randrange(SIZE), END - 1, END, TABLE - IMAGE_BYTES]))
    elif kind == "bytes":
        start, stop = rng.choice(REGIONS)
        for _ in range(rng.randint(1, 8)):
            parts.content[rng.randrange(start, stop)] = rng.randrange(256)
    else:
        pointers = parts.image["data_ptr"].copy()
        for sample, place in enumerate(rng.sample(range(COUNT), COUNT)):
            parts.move(sample, int(pointers[place]))
    return kind


def make_beton(rng: random.Random) -> Case:
    """A small beton with changed fields, bytes or length; its manifest's hash agrees with that in three cases of four."""
    parts = Parts(VALID)
    what = [change_beton(rng, parts) for _ in range(rng.choice([0, 1, 1, 1, 2, 3]))]
    content = bytes(parts.content)
    if rng.random() < 0.15:
        what.append("length")
        content = content[: rng.randrange(SIZE)] if rng.random() < 0.6 else content + bytes(rng.choice([1, 24, 32, 3072]))
    agrees = rng.random() < 0.75
    manifest = manifest_of(VALID)
    if agrees:
        manifest = replace(manifest, sha256=hashlib.sha256(content).hexdigest())

    def read(folder: Path) -> None:
        path = folder / "train.beton"
        try:
            found = read_beton(path)
        except InputError:
            assert_refused(lambda: load_streamed(path, CPU))
            raise
        assert agrees or content == VALID, "a changed file was read"
        streamed, _ = load_streamed(path, CPU)
        pointers = parts.image["data_ptr"].tolist()
        assert found.images.tobytes() == b"".join(content[place : place + IMAGE_BYTES] for place in pointers)
        assert found.images.tobytes() == streamed.fetch(torch.arange(COUNT)).images.numpy().tobytes()
        assert found.labels.tolist() == streamed.labels.tolist() == parts.samples["label"].tolist()
        assert sorted(found.index.tolist()) == list(range(COUNT))
        assert 0 <= found.labels.min() <= found.labels.max() < 10

    return Case("+".join(what) or "honest", {"train.beton": content, "train.json": manifest.encoded()}, read)


def assert_refused(read: Callable[[], object]) -> None:
    try:
        read()
    except InputError:
        return
    raise AssertionError("one reader refuses what the other reads")


# Manifests

TEST = small_beton(1)
TRUTH = {"train": (VALID, manifest_of(VALID)), "test": (TEST, manifest_of(TEST, "test"))}
JSON_VALUES: list[Callable[[random.Random], Any]] = [
    lambda rng: number(rng),
    lambda rng: -number(rng),
    lambda rng: rng.choice(
        [None, True, False, 0.5, 1e308, -0.0, float("nan"), float("inf"), "", [], {}, "train", "test", "cifar100"]
    ),
    lambda rng: "".join(chr(rng.choice([7, 27, 65, 0x202E, 0xD800, 0x1F600, 0])) for _ in range(rng.choice([1, 5, 300]))),
    lambda rng: [rng.random() for _ in range(rng.choice([2, 3, 3, 4]))],
    lambda rng: [rng.choice(["a", 1, None, [], {}]) for _ in range(rng.choice([1, 3, 10]))],
    lambda rng: {rng.choice(["a", "\x1b"]): rng.choice(["b", 1, None, [], 10**30])},
]


def make_manifest(rng: random.Random) -> Case:
    """Two honest betons, one of whose manifests has other values, bytes or format."""
    split = rng.choice(["train", "test"])
    manifest = TRUTH[split][1]
    older = rng.random() < 0.4
    values = asdict(manifest) if older else json.loads(manifest.encoded())
    if older:
        del values["source_sha256"]
    kind = rng.choice(["honest", "value", "value", "value", "bytes", "bytes", "nested", "text", "split"])
    if kind == "value":
        for _ in range(rng.randint(1, 2)):
            name = rng.choice([*values, *values, "surprise"])
            match rng.choice(["set", "set", "element", "delete"]):
                case "element" if isinstance(values.get(name), list) and values[name]:
                    values[name][rng.randrange(len(values[name]))] = rng.choice(JSON_VALUES)(rng)
                case "delete":
                    values.pop(name, None)
                case _:
                    values[name] = rng.choice(JSON_VALUES)(rng)
    content = (json.dumps(values, indent=2) + "\n").encode()
    if kind == "bytes":
        content = damaged(rng, content, rng.choice([1, 1, 5]))
    elif kind == "nested":
        content = rng.choice([b"[", b'{"a":', b'[{"a":']) * rng.choice([10, 2000, 100_000])
    elif kind == "text":
        content = rng.choice(
            [b"", b"null", b"{}", b"3" * 5000, b'"x"', rng.randbytes(50), content * 2, b"\xef\xbb\xbf" + content]
        )
    files = {f"{name}.beton": beton_ for name, (beton_, _) in TRUTH.items()}
    files |= {f"{name}.json": manifest_.encoded() for name, (_, manifest_) in TRUTH.items()} | {f"{split}.json": content}
    if kind == "split":  # one split's beton, or both of its files, under the other's name
        other = "test" if split == "train" else "train"
        files = {
            name: TRUTH[item][1].encoded() if name.endswith("json") else files[name] for name in files for item in [name[:-5]]
        }
        for suffix in rng.choice([("beton",), ("beton", "json")]):
            files[f"{split}.{suffix}"] = files[f"{other}.{suffix}"]
    stream = rng.random() < 0.5

    def read(folder: Path) -> None:
        data = load_splits(folder, CPU, limit_train=0, limit_test=0, val_fraction=0.0, seed=0, verify=True, stream=stream)
        found = (load_streamed if stream else load_resident)(folder / "train.beton", CPU)[1]
        unsigned = older or "manifest_sha256" not in values  # then its statistics are computed again
        assert unsigned or content == manifest.encoded(), "a changed manifest was read"
        train, truth = TRUTH["train"]
        assert data.train.subset(torch.arange(COUNT)).index.tolist() == list(range(COUNT))
        assert load_resident(folder / "train.beton", CPU)[0].images.numpy().tobytes() == pixels_of(train)
        assert data.test.images.numpy().tobytes() == pixels_of(TEST)  # type: ignore[union-attr]
        np.testing.assert_allclose((data.mean, data.std), (truth.mean, truth.std), atol=1e-6)
        assert (data.classes, found.class_names, data.warnings) == (10, truth.class_names, [])
        assert found.name.isprintable()

    return Case(f"{split}.json: {kind}{', as version 0.2 wrote it' if older else ''}", files, read)


def pixels_of(content: bytes) -> bytes:
    return content[PIXELS : PIXELS + COUNT * IMAGE_BYTES]


# What predict takes

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # PNG's colour types: grey, RGB, palette, grey and alpha, RGB and alpha
Block = tuple[bytes, bytes]  # kind and content


def honest_png(rng: random.Random) -> tuple[list[Block], np.ndarray]:
    """Blocks of a PNG of at most 8 bits a channel, and its pixels [32, 32, 3], those that are transparent on white."""
    colour = rng.choice(list(CHANNELS))
    bits = rng.choice([1, 2, 4, 8]) if colour in (0, 3) else 8
    samples = np.array([rng.randrange(1 << bits) for _ in range(1024 * CHANNELS[colour])], np.uint8).reshape(32, 32, -1)
    packed = np.unpackbits(samples[..., None], axis=-1)[..., 8 - bits :].reshape(32, -1)
    lines = b"".join(b"\0" + line.tobytes() for line in np.packbits(packed, axis=1))
    palette = rng.randbytes(3 << bits)
    blocks = [(b"IHDR", struct.pack(">IIBBBBB", 32, 32, bits, colour, 0, 0, 0))]
    blocks += [(b"PLTE", palette)] if colour == 3 else []
    blocks += [(b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    if colour == 3:
        return blocks, np.frombuffer(palette, np.uint8).reshape(-1, 3)[samples[..., 0]]
    grey = samples[..., :1] * np.uint8(255 // ((1 << bits) - 1))
    pixels = samples[..., :3] if colour in (2, 6) else np.repeat(grey, 3, axis=-1)
    if colour in (4, 6):
        alpha = samples[..., -1:] / 255
        pixels = np.rint(alpha * pixels + (1 - alpha) * 255).astype(np.uint8)
    return blocks, pixels


def as_png(blocks: list[Block]) -> bytes:
    """The file: each block with its length and checksum."""
    parts = (len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4) for kind, content in blocks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


EXTRA: list[Callable[[random.Random], Block]] = [
    lambda rng: (b"tEXt", b"key\0" + rng.randbytes(20)),
    lambda rng: (b"zTXt", b"key\0\0" + zlib.compress(bytes(rng.choice([10, 30_000_000])))),
    lambda rng: (b"iCCP", b"icc\0\0" + zlib.compress(bytes(rng.choice([10, 30_000_000])))),
    lambda rng: (b"iTXt", b"key\0\1\0\0\0" + zlib.compress(bytes(rng.choice([10, 30_000_000])))),
    lambda rng: (
        rng.choice([b"PLTE", b"tRNS", b"gAMA", b"cHRM", b"pHYs", b"eXIf", b"acTL", b"fcTL", b"fdAT"]),
        rng.randbytes(rng.choice([0, 1, 4, 8, 26, 768])),
    ),
    lambda rng: (b"IDAT", zlib.compress(bytes(rng.choice([10, 3104, 20_000_000])))),
    lambda rng: (b"IDAT", rng.randbytes(30)),
    lambda rng: (rng.choice([b"IEND", b"IHDR", b"zzzz", b"\0\0\0\0", b"cgBI"]), rng.randbytes(rng.choice([0, 13]))),
    lambda rng: (
        b"IHDR",
        struct.pack(
            ">IIBBBBB",
            *(rng.choice([32, 1, 2**31 - 1]) for _ in "wh"),
            rng.choice([8, 16]),
            rng.choice([0, 2, 3, 4, 6]),
            0,
            0,
            1,
        ),
    ),
]


def change_png(rng: random.Random, blocks: list[Block]) -> tuple[bytes, str]:
    """The file after one change, and whether its "pixels" must still be the same or "any" that fit."""
    kind = rng.choice(["bytes", "bytes", "header", "extra", "order", "text"])
    if kind == "bytes":
        return damaged(rng, as_png(blocks)), "pixels"
    blocks = list(blocks)
    if kind == "text":
        blocks.insert(rng.randrange(1, len(blocks)), EXTRA[0](rng))
        return as_png(blocks), "pixels"
    if kind == "header":
        header = bytearray(blocks[0][1])
        header[rng.randrange(13)] = rng.choice([0, 1, 2, 3, 4, 6, 8, 16, 32, 33, 255])
        blocks[0] = (b"IHDR", bytes(header)[: rng.choice([13, 13, 13, 5])])
    elif kind == "extra":
        blocks.insert(rng.randrange(len(blocks) + 1), rng.choice(EXTRA)(rng))
    else:
        place = rng.randrange(len(blocks))
        block = blocks.pop(place)
        if rng.random() < 0.5:
            blocks.insert(rng.randrange(len(blocks) + 1), block)
    return as_png(blocks), "any"


NAMES = (
    "1.PNG",
    "=1+1.png",
    "-x.png",
    "-3.png",
    "\x1b[2J.png",
    "a\tb.png",
    "\udcff.png",
    "\u0663.png",
    "01.png",
    "x" * 200 + ".png",
)


def make_predict(rng: random.Random) -> Case:
    """A folder of PNGs of which one is changed or has a strange name, or a changed pickle or beton."""
    kind = rng.choice(["png", "png", "png", "name", "pickle", "beton"])
    if kind in ("pickle", "beton"):
        case = make_pickle(rng) if kind == "pickle" else make_beton(rng)
        renamed = {name.replace("train", "set"): content for name, content in case.files.items()}

        def read_file(folder: Path) -> None:
            found = read_unlabelled(folder / next(iter(renamed)))
            assert found.images.shape == (len(found.ids), 32, 32, 3)
            assert len(set(found.ids)) == len(found.ids)

        return Case(f"{kind}: {case.what}", renamed, read_file)
    images = [honest_png(rng) for _ in range(3)]
    files = {f"{name + 1}.png": as_png(blocks) for name, (blocks, _) in enumerate(images)}
    expect = "pixels"
    if kind == "png" and rng.random() < 0.9:
        files["2.png"], expect = change_png(rng, images[1][0])
    elif kind == "name":
        files[rng.choice(NAMES)] = files["3.png"]

    def read(folder: Path) -> None:
        found = read_unlabelled(folder)
        assert all(name.isprintable() and name[0] not in "=+@" for name in found.ids)
        assert len(set(found.ids)) == len(files) == len(found.images)
        for place, (_, pixels) in enumerate(images):
            if place != 1 or expect == "pixels":
                np.testing.assert_array_equal(found.images[found.ids.index(str(place + 1))], pixels)

    return Case(f"{kind}: {expect}", files, read)


TARGETS: dict[str, Callable[[random.Random], Case]] = {
    "pickle": make_pickle,
    "beton": make_beton,
    "manifest": make_manifest,
    "predict": make_predict,
}
