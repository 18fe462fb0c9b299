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
from hypothesis import given
from hypothesis import strategies as st

from fastcifar.errors import InputError
from fastcifar.safe_pickle import load_pickle

ROWS = np.arange(3 * 3072, dtype=np.uint32).astype(np.uint8).reshape(3, 3072)
LABELS = [7, 0, 255]
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
    file_names = b"]q\x0c(" + b"".join(short(b"cat_s_%06d.png" % number) for number in range(3)) + b"e"
    return (
        b"\x80\x02}q\x01("
        + short(b"batch_label") + b"q\x02" + short(b"training batch 1 of 5") + b"q\x03"
        + short(b"labels") + b"q\x04" + label_list
        + short(b"data") + b"q\x06" + data
        + short(b"filenames") + b"q\r" + file_names + b"u."
    )  # fmt: skip


def python_3_batch(protocol: int, as_text: bool = False) -> bytes:
    batch = {b"batch_label": b"training batch 1 of 5", b"labels": LABELS, b"data": ROWS, b"filenames": [b"a.png", b"b.png"]}
    if as_text:
        batch = {key.decode(): value for key, value in batch.items()}
    return pickle.dumps(batch, protocol=protocol)


SOUND = {"python 2": python_2_batch()} | {f"python 3, protocol {number}": python_3_batch(number) for number in range(2, 6)}


@pytest.fixture
def load(tmp_path: Path) -> Callable[[bytes], dict[str, Any]]:
    def load(content: bytes) -> dict[str, Any]:
        path = tmp_path / "file.pickle"
        path.write_bytes(content)
        return load_pickle(path)

    return load


def outcome(path: Path, content: bytes) -> dict[str, Any] | InputError:
    """What becomes of `content`: anything but a dict or an InputError naming the file goes on as an exception."""
    path.write_bytes(content)
    result: dict[str, Any] | InputError
    try:
        result = load_pickle(path)
    except InputError as error:
        result = error
    assert isinstance(result, dict) or str(path) in str(result)
    return result


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


# Sound pickles


def test_a_batch_of_the_official_archive_is_read(load: Callable) -> None:
    batch = load(python_2_batch())
    assert list(batch) == ["batch_label", "labels", "data", "filenames"]
    assert batch["batch_label"] == b"training batch 1 of 5"
    assert batch["labels"] == LABELS
    assert batch["data"].dtype == np.uint8
    np.testing.assert_array_equal(batch["data"], ROWS)
    assert batch["filenames"] == [b"cat_s_000000.png", b"cat_s_000001.png", b"cat_s_000002.png"]


def test_class_names_of_the_official_archive_are_read(load: Callable) -> None:
    names = b"]q\x04(" + short(b"airplane") + b"q\x05" + short(b"automobile") + b"q\x06e"
    content = (
        b"\x80\x02}q\x01(" + short(b"num_cases_per_batch") + b"q\x02M\x10'" + short(b"label_names") + b"q\x03" + names + b"u."
    )
    assert load(content) == {"num_cases_per_batch": 10_000, "label_names": [b"airplane", b"automobile"]}


@pytest.mark.parametrize("as_text", [False, True], ids=["bytes keys", "str keys"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_python_3_writes_is_read(load: Callable, protocol: int, as_text: bool) -> None:
    batch = load(python_3_batch(protocol, as_text))
    assert list(batch) == ["batch_label", "labels", "data", "filenames"]
    assert batch["batch_label"] == b"training batch 1 of 5"
    assert batch["labels"] == LABELS
    assert batch["data"].dtype == np.uint8
    np.testing.assert_array_equal(batch["data"], ROWS)
    assert batch["filenames"] == [b"a.png", b"b.png"]


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("dtype", ["u1", "<i8", ">i4", "<f4"])
@pytest.mark.parametrize("layout", [np.ascontiguousarray, np.asfortranarray, lambda a: a[:, ::2], np.transpose])
def test_arrays_of_numbers_are_read(load: Callable, protocol: int, dtype: str, layout: Callable) -> None:
    values = layout(np.arange(12).reshape(3, 4).astype(dtype))
    read = load(pickle.dumps({"data": values}, protocol=protocol))["data"]
    assert read.dtype.newbyteorder("=") == values.dtype.newbyteorder("=")  # NumPy may turn bytes into this machine's order
    np.testing.assert_array_equal(read, values)


def test_arrays_of_numpy_1_are_read(load: Callable) -> None:
    """NumPy 1 calls its inner package `core`, NumPy 2 `_core`; protocol 5 has a function of its own for arrays."""
    content = b"\x96" + struct.pack("<Q", 6) + b"abcdef"
    stream = b"\x80\x05}\x8c\x04datacnumpy.core.numeric\n_frombuffer\n(" + content + U1 + b"K\x02K\x03\x86\x8c\x01CtRs."
    read = load(stream)["data"]
    assert read.dtype == np.uint8
    assert read.tolist() == [[97, 98, 99], [100, 101, 102]]
    np.testing.assert_array_equal(load(entry(array(b"K\x02K\x03\x86", U1, short(b"abcdef"))))["data"], read)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_labels_that_are_numpy_numbers_are_read(load: Callable, protocol: int) -> None:
    labels = [np.int64(3), np.uint8(200), np.int32(-1)]
    assert load(pickle.dumps({"labels": labels}, protocol=protocol)) == {"labels": [3, 200, -1]}


def test_empty_bytes_are_read(load: Callable) -> None:
    """Python 3 writes b"" for protocol 2 as a call of `__builtin__.bytes`."""
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert load(pickle.dumps({"data": b""}, protocol=protocol)) == {"data": b""}, protocol


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
    "array of its own": lambda payload: {"data": np.zeros(3), "extra": (payload, {"deep": payload})},
}


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_code_is_not_run(load: Callable, tmp_path: Path, payload: str, protocol: int) -> None:
    mark = tmp_path / "mark"
    content = pickle.dumps({"data": PAYLOADS[payload](mark)}, protocol=protocol)
    with contextlib.suppress(TypeError):
        pickle.loads(content)  # noqa: S301  # proves that this stream does run code
    assert mark.exists()
    mark.unlink()
    with pytest.raises(InputError, match=r"file\.pickle"):
        load(content)
    assert not mark.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("place", PLACES)
def test_code_is_not_run_wherever_it_stands(load: Callable, tmp_path: Path, place: str, protocol: int) -> None:
    mark = tmp_path / "mark"
    with pytest.raises(InputError, match=r"file\.pickle"):
        load(pickle.dumps(PLACES[place](PAYLOADS["os.system"](mark)), protocol=protocol))
    assert not mark.exists()


TOUCH = short(b"touch mark")
REFUSED_STREAMS = {
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
    "scalar of no bytes": entry(b"cnumpy.core.multiarray\nscalar\n" + U1 + short(b"") + b"\x86R"),
}


@pytest.mark.parametrize("stream", REFUSED_STREAMS)
def test_a_stream_made_by_hand_is_refused(load: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"file\.pickle"):
        load(REFUSED_STREAMS[stream])
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.pickle"]


def test_codecs_encode_is_what_python_3_writes_for_bytes_and_only_with_latin1(load: Callable) -> None:
    content = pickle.dumps({b"k\xe9y": codecs.latin_1_encode("\xff\x00")[0]}, protocol=2)
    assert b"_codecs\nencode" in content
    assert load(content) == {"k\xe9y": b"\xff\x00"}
    with pytest.raises(InputError, match="codec"):
        load(content.replace(b"latin1", b"base64"))


# NumPy trusts what it unpickles: a list shorter than its array, or a dtype that hides its objects, sends it to an address
# of the stream's choosing. Each of these runs in a process of its own, since the failure is the end of the process.
OBJECT_FIELD = b"(U\x01at}U\x01a(cnumpy\ndtype\nU\x02O8K\x00K\x01\x87RK\x00ts"  # names, {name: (dtype, offset)}
POINTER_DTYPE = b"cnumpy\ndtype\nU\x02V8K\x00K\x01\x87R(K\x03U\x01|N" + OBJECT_FIELD + b"K\x08K\x01K\x00tb"  # no flags
HOSTILE = {
    "object array with too short a list": entry(array(b"J\xa0\x86\x01\x00\x85", OBJECT, b"](K\x01e")),
    "object pointer as a scalar": entry(b"cnumpy.core.multiarray\nscalar\n" + POINTER_DTYPE + short(b"A" * 8) + b"\x86R"),
    "tuples so deep that their hash overflows the stack": b"\x80\x02})" + b"\x85" * 3_000_000 + b"K\x01s.",
}
PROBE = """
import sys
from pathlib import Path
from fastcifar.errors import InputError
from fastcifar.safe_pickle import load_pickle
for path in sys.argv[1:]:
    try:
        print(sorted(load_pickle(Path(path))))
    except InputError as error:
        print("refused", error)
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(int(peak.split()[1]) >> 10)  # not getrusage's, which remembers the parent's before exec
"""


@pytest.mark.parametrize("stream", HOSTILE)
def test_a_stream_that_would_crash_the_process_is_refused(tmp_path: Path, stream: str) -> None:
    path = tmp_path / "file.pickle"
    path.write_bytes(HOSTILE[stream])
    process = run_cli("-c", PROBE, path)
    assert process.returncode == 0, f"exit code {process.returncode}: {process.stderr}"
    assert process.stdout.startswith("refused")


def test_a_few_bytes_cannot_claim_a_gigabyte(tmp_path: Path) -> None:
    """The memo is a table as long as the largest number put into it: one flipped byte in `q` makes that a huge one."""
    path = tmp_path / "file.pickle"
    path.write_bytes(b"\x80\x02}r" + struct.pack("<I", 1 << 26) + b".")
    process = run_cli("-c", PROBE, path)
    assert process.returncode == 0, process.stderr
    assert int(process.stdout.split()[-1]) < 500  # MB; Python and NumPy take about 40


def test_a_stream_cannot_change_how_the_next_file_is_read(tmp_path: Path) -> None:
    """BUILD sets attributes of what is on the stack: here the default arguments of the function behind an allowed name."""
    first, second = tmp_path / "first", tmp_path / "second"
    defaults = b"}X\x0c\x00\x00\x00__defaults__Ns"
    first.write_bytes(b"\x80\x02cnumpy.core.numeric\n_frombuffer\nN" + defaults + b"\x86b0}.")
    second.write_bytes(python_3_batch(5))
    process = run_cli("-c", PROBE, first, second)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[1] == "['batch_label', 'data', 'filenames', 'labels']"


# Damaged pickles


@pytest.mark.parametrize("stream", SOUND)
def test_a_truncated_pickle_is_refused(tmp_path: Path, stream: str) -> None:
    content, path = SOUND[stream], tmp_path / "file.pickle"
    for length in {*range(400), *range(0, len(content), 97), *range(len(content) - 150, len(content))}:
        assert isinstance(outcome(path, content[:length]), InputError), length


@given(content=st.binary(max_size=200))
def test_random_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    with little_memory():
        result = outcome(tmp_path_factory.getbasetemp() / "random.pickle", b"\x00" + content)  # no stream begins so
    assert isinstance(result, InputError)


@given(start=st.sampled_from([b"\x80\x02}", b"\x80\x04}", b"\x80\x02}U\x04data", b""]), content=st.binary(max_size=60))
def test_random_opcodes_give_a_dict_or_an_input_error(
    tmp_path_factory: pytest.TempPathFactory, start: bytes, content: bytes
) -> None:
    with little_memory():
        outcome(tmp_path_factory.getbasetemp() / "random.pickle", start + content + b".")


@pytest.mark.parametrize("stream", ["python 2", "python 3, protocol 4"])
@given(data=st.data())
def test_a_changed_byte_gives_a_dict_or_an_input_error(
    tmp_path_factory: pytest.TempPathFactory, stream: str, data: st.DataObject
) -> None:
    content = bytearray(SOUND[stream])
    pixels = content.find(ROWS[:, :100].tobytes()[:100])  # a changed pixel is no news: aim at what stands around them
    structure = [*range(pixels), *range(pixels + ROWS.size, len(content))]
    content[data.draw(st.sampled_from(structure))] = data.draw(st.integers(0, 255))
    with little_memory():
        outcome(tmp_path_factory.getbasetemp() / "changed.pickle", bytes(content))


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02}\x8b" + struct.pack("<i", 3000) + b"\x7f" * 3000 + b"K\x01s.",
        b"\x80\x02})" + b"\x85" * 20_000 + b"K\x01s.",
    ],
    ids=["number of 7000 digits", "tuple of depth 20000"],
)
def test_a_strange_key_gives_a_dict_or_an_input_error(tmp_path: Path, content: bytes) -> None:
    outcome(tmp_path / "file.pickle", content)


@pytest.mark.parametrize("value", [[1, 2], b"bytes", "text", 3, None, ROWS, ({"data": 1},)], ids=lambda v: type(v).__name__)
def test_what_is_no_dict_is_refused(load: Callable, value: object) -> None:
    with pytest.raises(InputError, match=r"file\.pickle"):
        load(pickle.dumps(value))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_pickle(tmp_path / "absent.pickle")
    assert str(tmp_path / "absent.pickle") in str(caught.value)
    assert "missing" in str(caught.value)
