"""Reads pickles of plain data (strings, numbers, lists, dicts, NumPy arrays) without running any code that stands in them.

A pickle leaves plain containers by two opcodes, and both are restricted. `find_class` knows a few names, each mapped to
a class or function of this module: NumPy trusts the state it unpickles (a forged dtype or a short list of objects sends it
to any address), so the stream never gets hold of a real dtype or array. BUILD, which sets attributes, works only on those
classes.
The unpickler is Python's own in Python: the one in C hashes keys of any depth and makes room for any memo number.
What a stream can take of memory and time is bounded by its file's size: how many opcodes it has, what `encode` makes, and
how wide the characters of a long text are. The peak is about three times the file, that of an honest file twice.
"""

import io
import pickle
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastcifar.errors import InputError, shortened

MAX_BYTES = 1 << 30  # of a file; CIFAR-100's training split, the largest, has 155 MB
# An image has 3072 bytes and needs three opcodes (label, file name, memo), ten where labels are NumPy's numbers.
FREE_OPCODES = 100_000
BYTES_PER_OPCODE = 256
LONG_TEXT = 1 << 16  # bytes; a longer text is pixels as Python 3 writes them for protocols 0 to 2: characters of one byte
NUMBERS = {f"{kind}{size}" for kind, sizes in (("u", "1248"), ("i", "1248"), ("f", "248")) for size in sizes} | {"b1"}
LATIN1_IN_UTF8 = bytes(range(0xC4))


class _NdarrayType:
    """Replaces `numpy.ndarray` in a stream: an inert argument of `_reconstruct`."""


class _Dtype:
    """Replaces `numpy.dtype` in a stream: whole numbers, floats and booleans only."""

    def __init__(self, code: Any, align: object = False, copy: object = False) -> None:
        name = _text(code).lstrip("|=<>")
        if name not in NUMBERS:
            raise pickle.UnpicklingError(f"arrays of dtype {shortened(name)!r} are not allowed")
        self.dtype: np.dtype[Any] = np.dtype(_text(code))

    def __setstate__(self, state: Any) -> None:
        order: Any = _text(state[1])
        self.dtype = self.dtype.newbyteorder(order)  # the rest describes fields and flags, which numbers lack


class _Array:
    """Replaces an array in a stream until its state makes it."""

    array: np.ndarray

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        self.array = _frombuffer(content, dtype, shape, "F" if fortran else "C")


def _reconstruct(array_type: object, shape: object, type_code: object) -> _Array:
    """NumPy's own first step of unpickling an array."""
    if array_type is not _NdarrayType:
        raise pickle.UnpicklingError("only plain NumPy arrays are allowed")
    return _Array()


def _frombuffer(buffer: Any, dtype: _Dtype, shape: Any, order: Any, axis_order: Any = None) -> np.ndarray:
    """Protocol 5's arrays: a view of bytes in the stream; a shape that does not fit raises ValueError."""
    if any(length < 0 for length in shape):
        raise ValueError(f"shape {shape}")
    return np.frombuffer(buffer, dtype.dtype).reshape(shape, order=order)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How Python 3 writes bytes for protocol 2: `_codecs.encode(text, 'latin1')`; other codecs do more than that."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"codec {shortened(encoding)!r} is not allowed")
    return text.encode("latin1")


def _bytes() -> bytes:
    return b""


def _scalar(dtype: _Dtype, value: bytes) -> Any:
    return np.frombuffer(value, dtype.dtype)[0].item()


ALLOWED: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _bytes,  # how Python 3 writes b"" for protocol 2
    ("builtins", "bytes"): _bytes,
    ("numpy", "ndarray"): _NdarrayType,
    ("numpy", "dtype"): _Dtype,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
}


PythonUnpickler: Any = pickle._Unpickler  # Any, since typeshed does not know its opcode methods


class _Opcodes(dict[int, Callable[..., None]]):
    """Opcode -> method, for as many look-ups as a stream may have opcodes."""

    left = 0

    def __getitem__(self, opcode: int) -> Callable[..., None]:
        self.left -= 1
        if self.left < 0:
            raise pickle.UnpicklingError("it has far more opcodes than images of its size need")
        return super().__getitem__(opcode)

    def __missing__(self, opcode: int) -> Callable[..., None]:
        raise pickle.UnpicklingError(f"it has opcode {opcode:#04x}, which data has no need of")


class SafeUnpickler(PythonUnpickler):  # type: ignore[misc]
    """An unpickler that refuses every global outside `ALLOWED`, state for anything but arrays, and keys that are not plain."""

    dispatch = _Opcodes(PythonUnpickler.dispatch)

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")
        self.dispatch = _Opcodes(type(self).dispatch)
        self.dispatch.left = FREE_OPCODES + len(content) // BYTES_PER_OPCODE
        self.encodable = len(content)  # characters: each stands in the file once, however often the stream refers to it

    def find_class(self, module: str, name: str) -> Any:
        try:
            found = ALLOWED[module, name]
        except KeyError:
            name = shortened(f"{module}.{name}")
            raise pickle.UnpicklingError(f"it wants to use {name}, which data has no need of") from None
        return self.encode if found is _encode else found

    def encode(self, text: str, encoding: str = "latin1") -> bytes:
        """`_encode`, for no more characters than the file can hold."""
        self.encodable -= len(text)
        if self.encodable < 0:
            raise pickle.UnpicklingError("it encodes more text than it holds")
        return _encode(text, encoding)

    def load_unicode(self) -> None:
        """One character beyond latin1 makes Python store the whole text with two or four bytes a character."""
        line = self.readline()[:-1]
        if len(line) > LONG_TEXT and b"\\U" in line:
            raise pickle.UnpicklingError("it has a long text of wide characters")
        self.append(str(line, "raw-unicode-escape"))

    def load_binunicode(self, length: str = "<I") -> None:
        content = self.read(struct.unpack(length, self.read(struct.calcsize(length)))[0])
        if len(content) > LONG_TEXT and content.translate(None, LATIN1_IN_UTF8):
            raise pickle.UnpicklingError("it has a long text of wide characters")
        self.append(str(content, "utf-8", "surrogatepass"))

    def load_binunicode8(self) -> None:
        self.load_binunicode("<Q")

    def load_bytearray8(self) -> None:
        """Python's own makes room for as many bytes as are announced, before it looks whether the file has them."""
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(length))

    def load_build(self) -> None:
        if not isinstance(self.stack[-2], _Dtype | _Array):
            raise pickle.UnpicklingError(f"it wants to change a {type(self.stack[-2]).__name__}")
        super().load_build()

    def load_setitem(self) -> None:
        _require_plain(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        _require_plain(self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        _require_plain(self.stack[::2])
        super().load_dict()

    for opcode, method in (
        (pickle.BUILD, load_build),
        (pickle.SETITEM, load_setitem),
        (pickle.SETITEMS, load_setitems),
        (pickle.DICT, load_dict),
        (pickle.UNICODE, load_unicode),
        (pickle.BINUNICODE, load_binunicode),
        (pickle.BINUNICODE8, load_binunicode8),
        (pickle.BYTEARRAY8, load_bytearray8),
    ):
        dispatch[opcode[0]] = method
    for opcode in (
        *(pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET),  # sets hash what they hold
        *(pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX),
        *(pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.PERSID, pickle.BINPERSID, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
    ):
        del dispatch[opcode[0]]


def _require_plain(keys: list[Any]) -> None:
    for key in keys:
        if not isinstance(key, bytes | str):
            raise pickle.UnpicklingError(f"a key is a {type(key).__name__}, not text")


def load_pickle(path: Path) -> dict[str, Any]:
    """Read a pickled dict; keys come back as str whether Python 2 or 3 wrote them, byte strings as bytes.

    Raises InputError naming the file when it is missing, too large, truncated, would run code, or is no dict of plain data.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise InputError(f"{path} is missing: name the folder that holds the pickles") from None
    if not stat.S_ISREG(status.st_mode):  # a device or pipe may have no end
        raise InputError(f"{path} is not a file: name a pickle")
    if status.st_size > MAX_BYTES:
        raise InputError(f"{path} has {status.st_size:,} bytes, at most {MAX_BYTES:,} are read: is it the right file?")
    content = path.read_bytes()
    try:
        value = SafeUnpickler(content).load()
        if isinstance(value, dict):
            return {_text(key): entry.array if isinstance(entry, _Array) else entry for key, entry in value.items()}
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} is refused: {error}; get the file again from a source you trust") from None
    except MemoryError:
        raise InputError(f"{path}: its {len(content):,} bytes need more memory than there is: close other programs") from None
    except Exception as error:  # a malformed stream can raise almost anything: all of it means "not a valid pickle"
        raise InputError(f"{path} is damaged ({type(error).__name__}: {shortened(error)}): get the file again") from None
    raise InputError(f"{path} holds a {type(value).__name__}, not a dict: it is not a CIFAR pickle")


def decode_name(name: bytes | str) -> str:
    """A name as text: Python 2 stored bytes, in UTF-8 or, as a fallback, latin1."""
    if isinstance(name, str):
        return name
    try:
        return name.decode()
    except UnicodeDecodeError:
        return name.decode("latin1")


def _text(key: bytes | str) -> str:
    return key.decode("latin1") if isinstance(key, bytes) else key
