"""Pickles that Python 2 and 3 wrote are read; those that would run code, or are damaged, are refused by name."""

import builtins
import codecs
import contextlib
import functools
import operator
import os
import pickle
import resource
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run_cli
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastcifar.errors import InputError
from fastcifar.safe_pickle import load_pickle

ROWS = np.arange(3 * 3072, dtype=np.uint32).astype(np.uint8).reshape(3, 3072)
LABELS = [7, 0, 255]
FILE_NAMES = [b"cat_s_000000.png", b"cat_s_000001.png", b"cat_s_000002.png"]
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
Load = Callable[[bytes], dict[str, Any]]
U1 = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
OBJECT = b"cnumpy\ndtype\nU\x02O8K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tb"


def short(text: bytes) -> bytes:
    """A Python 2 str of under 256 bytes."""
    return b"U" + bytes([len(text)]) + text


def array(shape: bytes, dtype: bytes, content: bytes) -> bytes:
    """An array as Python 2 wrote it; `shape`, `dtype` and `content` are streams themselves."""
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    return empty + b"(K\x01" + shape + dtype + b"\x89" + content + b"tb"


def entry(value: bytes, key: bytes = b"data") -> bytes:
    """A protocol 2 stream of a dict with one entry."""
    return b"\x80\x02}" + short(key) + value + b"s."


def python_2_batch() -> bytes:
    """{batch_label, labels, data, filenames} byte for byte as in the official archive, with its memo numbers."""
    label_list = b"]q\x05(" + b"".join(b"K" + bytes([label]) for label in LABELS) + b"e"
    data = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87Rq\t(K\x01K\x03M\x00\x0c\x86"
        b"cnumpy\ndtype\nq\nU\x02u1K\x00K\x01\x87Rq\x0b(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"T" + struct.pack("<I", ROWS.size) + ROWS.tobytes() + b"tb"
    )
    file_names = b"]q\x0c(" + b"".join(map(short, FILE_NAMES)) + b"e"
    return (
        b"\x80\x02}q\x01("
        + short(b"batch_label") + b"q\x02" + short(b"training batch 1 of 5") + b"q\x03"
        + short(b"labels") + b"q\x04" + label_list
        + short(b"data") + b"q\x06" + data
        + short(b"filenames") + b"q\r" + file_names + b"u."
    )  # fmt: skip


def python_3_batch(protocol: int, as_text: bool = False) -> bytes:
    batch = {b"batch_label": b"training batch 1 of 5", b"labels": LABELS, b"data": ROWS, b"filenames": FILE_NAMES}
    if as_text:
        batch = {key.decode(): value for key, value in batch.items()}
    return pickle.dumps(batch, protocol=protocol)


VALID = {"python 2": python_2_batch()} | {f"python 3, protocol {number}": python_3_batch(number) for number in range(2, 6)}


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(content: bytes) -> dict[str, Any]:
        path = tmp_path / "file.pickle"
        path.write_bytes(content)
        return load_pickle(path)

    return load


def refused(path: Path, content: bytes) -> bool:
    """Whether `content` is refused in a message with its name; anything but that or a dict goes on as an exception."""
    path.write_bytes(content)
    try:
        assert isinstance(load_pickle(path), dict)
    except InputError as error:
        assert str(path) in str(error)  # noqa: PT017  # a dict is as good
        return True
    return False


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """At most 2 GB more address space: a stream that asks for it all must not take the machine down."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# Valid pickles


def assert_is_the_batch(batch: dict[str, Any]) -> None:
    assert list(batch) == ["batch_label", "labels", "data", "filenames"]
    assert batch["batch_label"] == b"training batch 1 of 5"
    assert batch["labels"] == LABELS
    assert batch["data"].dtype == np.uint8
    np.testing.assert_array_equal(batch["data"], ROWS)
    assert batch["filenames"] == FILE_NAMES


def test_a_batch_of_the_official_archive_is_read(load: Load) -> None:
    assert_is_the_batch(load(python_2_batch()))


def test_class_names_of_the_official_archive_are_read(load: Load) -> None:
    names = b"]q\x04(" + short(b"airplane") + b"q\x05" + short(b"automobile") + b"q\x06e"
    content = b"}q\x01(" + short(b"num_cases_per_batch") + b"q\x02M\x10'" + short(b"label_names") + b"q\x03" + names + b"u."
    assert load(b"\x80\x02" + content) == {"num_cases_per_batch": 10_000, "label_names": [b"airplane", b"automobile"]}


@pytest.mark.parametrize("as_text", [False, True], ids=["bytes keys", "str keys"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_python_3_writes_is_read(load: Load, protocol: int, as_text: bool) -> None:
    assert_is_the_batch(load(python_3_batch(protocol, as_text)))
    labels = [np.int64(3), np.uint8(200), np.int32(-1)]
    assert load(pickle.dumps({"labels": labels, "data": b""}, protocol=protocol)) == {"labels": [3, 200, -1], "data": b""}
    for dtype in ("u1", "<i8", ">i4", "<f4"):
        for layout in (np.ascontiguousarray, np.asfortranarray, lambda a: a[:, ::2], np.transpose):
            values = layout(np.arange(12).reshape(3, 4).astype(dtype))
            read = load(pickle.dumps({"data": values}, protocol=protocol))["data"]
            assert read.dtype.newbyteorder("=") == values.dtype.newbyteorder("=")  # NumPy may turn bytes round
            np.testing.assert_array_equal(read, values)


def test_arrays_of_numpy_1_are_read(load: Load) -> None:
    """NumPy 1 calls its inner package `core`, NumPy 2 `_core`; protocol 5 has a function of its own for arrays."""
    content = b"\x96" + struct.pack("<Q", 6) + b"abcdef"
    stream = b"\x80\x05}\x8c\x04datacnumpy.core.numeric\n_frombuffer\n(" + content + U1 + b"K\x02K\x03\x86\x8c\x01CtRs."
    read = load(stream)["data"]
    assert read.dtype == np.uint8
    assert read.tolist() == [[97, 98, 99], [100, 101, 102]]
    np.testing.assert_array_equal(load(entry(array(b"K\x02K\x03\x86", U1, short(b"abcdef"))))["data"], read)


# Pickles that would run code


class Call:
    """Unpickles as the result of calling `function`."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.parts = function, arguments

    def __reduce__(self) -> tuple[Callable, tuple[object, ...]]:
        return self.parts


PAYLOADS = {
    "os.system": lambda mark: Call(os.system, f"touch {mark}"),
    "eval": lambda mark: Call(builtins.eval, f"open({str(mark)!r}, 'w').close()"),
    "exec": lambda mark: Call(builtins.exec, f"open({str(mark)!r}, 'w').close()"),
    "open": lambda mark: Call(builtins.open, str(mark), "w"),
    "subprocess": lambda mark: Call(subprocess.call, ["touch", str(mark)]),
    "partial": lambda mark: Call(functools.partial(os.system, f"touch {mark}")),
    "methodcaller": lambda mark: Call(operator.methodcaller("touch"), Path(mark)),
    "numpy's file writer": lambda mark: Call(np.savetxt, str(mark), [1]),
    "a path's method": lambda mark: Call(Path.touch, Path(mark)),
}
PLACES = {
    "value": lambda payload: {"data": payload},
    "key": lambda payload: {payload: 1},
    "list": lambda payload: {"data": ROWS, "labels": [1, 2, payload]},
    "top": lambda payload: payload,
    "object array": lambda payload: {"data": np.array([payload, None], dtype=object)},
    "tuple": lambda payload: {"data": np.zeros(3), "extra": (payload, {"deep": payload})},
}


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(("payload", "place"), [(p, "value") for p in PAYLOADS] + [("os.system", place) for place in PLACES])
def test_code_is_not_run(tmp_path: Path, payload: str, place: str, protocol: int) -> None:
    mark = tmp_path / "mark"
    content = pickle.dumps(PLACES[place](PAYLOADS[payload](mark)), protocol=protocol)
    with contextlib.suppress(TypeError):
        pickle.loads(content)  # noqa: S301  # proves that this stream does run code
    mark.unlink()
    assert refused(tmp_path / "file.pickle", content)
    assert not mark.exists()


TOUCH = short(b"touch mark")
REFUSED = {
    "INST": b"(S'touch mark'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\n" + TOUCH + b"o.",
    "posix": b"cposix\nsystem\n" + TOUCH + b"\x85R.",
    "NEWOBJ": b"\x80\x02csubprocess\nPopen\n" + TOUCH + b"\x85\x81.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + TOUCH + b"\x85R.",
    "an attribute of an allowed name": b"\x80\x04\x8c\x07_codecs\x8c\x12encode.__globals__\x93.",
    "the class of an allowed name": b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__base__\x93.",
    "getattr": b"\x80\x04c__builtin__\ngetattr\n(cnumpy\ndtype\n" + short(b"__base__") + b"tR.",
    "persistent id": b"Pmark\n.",
    "binary persistent id": short(b"mark") + b"Q.",
    "extension": b"\x80\x02\x82\x01.",
    "out-of-band buffer": b"\x80\x05\x97.",
    "rot13": entry(b"c_codecs\nencode\nX\x04\x00\x00\x00markX\x06\x00\x00\x00rot_13\x86R"),
    "hex codec": entry(b"c_codecs\nencode\nX\x04\x00\x00\x00markX\x03\x00\x00\x00hex\x86R"),
    "utf-8": entry(b"c_codecs\nencode\nX\x04\x00\x00\x00markX\x05\x00\x00\x00utf-8\x86R"),
    "decode": entry(b"c_codecs\ndecode\n" + short(b"mark") + b"\x85R"),
    "ndarray of a huge shape": entry(b"cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85\x85R"),
    "ndarray over a buffer": entry(b"cnumpy\nndarray\nK\x01\x85" + U1 + short(b"a") + b"\x87R"),
    "reconstruct another class": entry(b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\ndtype\nK\x00\x85U\x01b\x87R"),
    "reconstruct a memmap": entry(b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nmemmap\nK\x00\x85U\x01b\x87R"),
    "numpy.load": entry(b"cnumpy\nload\n" + short(b"mark") + b"\x85R"),
    "shape larger than its bytes": entry(array(b"J\xff\xff\xff\x7fK\x01\x86", U1, short(b"abc"))),
    "negative shape": entry(array(b"J\xff\xff\xff\xffK\x01\x86", U1, short(b"abc"))),
    "a number as a key": b"\x80\x02}K\x01K\x01s.",
    "a number as a key, of several": b"\x80\x02}(K\x01K\x01u.",
    "a number as a key, of a whole dict": b"\x80\x02(K\x01K\x01d.",
    "scalar of no bytes": entry(b"cnumpy.core.multiarray\nscalar\n" + U1 + short(b"") + b"\x86R"),
}


NO_DICTS = {type(value).__name__: pickle.dumps(value) for value in ([1], b"bytes", "text", 3, None, ROWS, ({"data": 1},))}


@pytest.mark.parametrize("stream", REFUSED | NO_DICTS)
def test_a_stream_made_by_hand_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(tmp_path / "file.pickle", (REFUSED | NO_DICTS)[stream])
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.pickle"]


def test_codecs_encode_is_what_python_3_writes_for_bytes_and_only_with_latin1(load: Load) -> None:
    content = pickle.dumps({b"k\xe9y": codecs.latin_1_encode("\xff\x00")[0]}, protocol=2)
    assert b"_codecs\nencode" in content
    assert load(content) == {"k\xe9y": b"\xff\x00"}
    with pytest.raises(InputError, match="codec"):
        load(content.replace(b"latin1", b"base64"))


# NumPy trusts what it unpickles: a list shorter than its array, or a dtype that hides its objects, sends it to an address
# of the stream's choosing. Each of these runs in a process of its own, since the failure is the end of the process.
OBJECT_FIELD = b"(U\x01at}U\x01a(cnumpy\ndtype\nU\x02O8K\x00K\x01\x87RK\x00ts"  # names, {name: (dtype, offset)}
POINTER_DTYPE = b"cnumpy\ndtype\nU\x02V8K\x00K\x01\x87R(K\x03U\x01|N" + OBJECT_FIELD + b"K\x08K\x01K\x00tb"  # no flags
ENCODE = b"\x80\x02c_codecs\nencode\nq\x01X" + struct.pack("<I", 1 << 20) + b"x" * (1 << 20) + b"q\x02("
WIDE = b"x" * (32 << 20)
HOSTILE = {
    "object array with too short a list": entry(array(b"J\xa0\x86\x01\x00\x85", OBJECT, b"](K\x01e")),
    "object pointer as a scalar": entry(b"cnumpy.core.multiarray\nscalar\n" + POINTER_DTYPE + short(b"A" * 8) + b"\x86R"),
    "tuples so deep that their hash overflows the stack": b"\x80\x02}T"
    + struct.pack("<I", 32 << 20)
    + bytes(32 << 20)
    + b"0)"
    + b"\x85" * 200_000
    + b"K\x01s.",  # the bytes pay for the opcodes
    "bytes that the file does not have": b"\x80\x05}X\x04\x00\x00\x00data\x96" + struct.pack("<Q", 1 << 30) + b"xs.",
    "one text encoded many times": ENCODE + b"h\x01h\x02\x85R" * 800 + b"l.",
    "one text encoded many times, by another opcode": ENCODE + b"(h\x01h\x02o" * 800 + b"l.",
    # One character beyond latin1 makes Python keep all of a text's at two or four bytes each.
    "a long text with one wide character": entry(b"X" + struct.pack("<I", (32 << 20) + 4) + "\U0001f600".encode() + WIDE),
    "a long line with one wide character": entry(b"V\\U0001f600" + WIDE + b"\n"),
    "sets": b"\x80\x04(" + b"\x8f" * 3_000_000 + b"l.",
    "lists": b"\x80\x02(" + b"]" * 6_000_000 + b"l.",
    "a name of 20 MB": b"\x80\x02c" + b"os." * 7_000_000 + b"\nsystem\n.",
    # C's memo is a table as long as the largest number put into it: one flipped byte in `q` makes that a huge one.
    "memo number": b"\x80\x02}r" + struct.pack("<I", 1 << 26) + b"0K\x01.",
    # BUILD sets attributes of what is on the stack: here the defaults of the function behind an allowed name.
    "changes the reader": b"\x80\x02cnumpy.core.numeric\n_frombuffer\nN" + b"}X\x0c\x00\x00\x00__defaults__Ns\x86b0}.",
}
PROBE = """
import sys
from pathlib import Path
from fastcifar.errors import InputError
from fastcifar.safe_pickle import load_pickle
for path in sys.argv[1:]:
    try:
        print("read", *sorted(load_pickle(Path(path))))
    except InputError as error:
        print("refused", error)
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(int(peak.split()[1]) >> 10)  # not getrusage's, which remembers the parent's before exec
"""


@pytest.mark.parametrize("stream", HOSTILE)
def test_a_hostile_stream_neither_crashes_nor_fills_the_memory_nor_changes_what_is_read_next(
    tmp_path: Path, stream: str
) -> None:
    hostile, valid = tmp_path / "hostile", tmp_path / "valid"
    hostile.write_bytes(HOSTILE[stream])
    valid.write_bytes(python_3_batch(5))
    process = run_cli("-c", PROBE, hostile, valid)
    assert process.returncode == 0, f"exit code {process.returncode}: {process.stderr}"
    first, second, peak = process.stdout.splitlines()
    assert first.startswith("refused")
    assert len(first) < 500
    assert second == "read batch_label data filenames labels"
    assert int(peak) < 200  # MB; Python and NumPy take about 40


# Damaged pickles


@pytest.mark.parametrize("stream", VALID)
def test_a_truncated_pickle_is_refused(tmp_path: Path, stream: str) -> None:
    content, path = VALID[stream], tmp_path / "file.pickle"
    for length in {*range(400), *range(0, len(content), 97), *range(len(content) - 150, len(content))}:
        assert refused(path, content[:length]), length


@given(content=st.binary(max_size=200))
def test_random_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    with little_memory():
        assert refused(tmp_path_factory.getbasetemp() / "random.pickle", b"\x00" + content)  # no stream begins so


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid stream with other bytes in one to three places around its pixels, where a changed byte is no news."""
    content = bytearray(draw(st.sampled_from(list(VALID.values()))))
    for _ in range(draw(st.integers(1, 3))):
        pixels = content.find(ROWS[0, :100].tobytes())
        structure = len(content) - (ROWS.size if pixels > 0 else 0)
        place = draw(st.integers(0, structure - 1))
        place += ROWS.size if 0 < pixels <= place else 0
        content[place : place + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    return bytes(content)


short_streams = st.builds(
    lambda start, rest: start + rest + b".", st.sampled_from([b"\x80\x02}", b"\x80\x04}", b""]), st.binary(max_size=60)
)


@settings(max_examples=300)
@given(content=mutated() | short_streams)
@example(content=b"\x80\x02}\x8b" + struct.pack("<i", 3000) + b"\x7f" * 3000 + b"K\x01s.")  # a key of 7000 digits
@example(content=b"\x80\x02})" + b"\x85" * 20_000 + b"K\x01s.")  # a key of depth 20,000
def test_a_mutated_stream_gives_a_dict_or_an_input_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    with little_memory():
        refused(tmp_path_factory.getbasetemp() / "mutated.pickle", content)


def test_a_file_too_large_or_without_end_is_refused_unread(tmp_path: Path) -> None:
    large = tmp_path / "large.pickle"
    large.touch()
    os.truncate(large, (1 << 30) + 1)  # takes no room on the disk
    with pytest.raises(InputError, match=r"large\.pickle has 1,073,741,825 bytes"):
        load_pickle(large)
    with pytest.raises(InputError, match="/dev/zero is not a file"):
        load_pickle(Path("/dev/zero"))


@pytest.mark.parametrize("opcode", [pickle.EMPTY_SET, pickle.FROZENSET, pickle.EXT1, b"\xff"])
def test_opcodes_that_data_does_not_need_are_refused(load: Load, opcode: bytes) -> None:
    with pytest.raises(InputError, match=f"opcode {opcode[0]:#04x}"):
        load(b"\x80\x04(" + opcode + b".")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing") as caught:
        load_pickle(tmp_path / "absent.pickle")
    assert str(tmp_path / "absent.pickle") in str(caught.value)
