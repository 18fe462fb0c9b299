"""A pickle file enters; byte strings, strings, numbers, lists, dicts and NumPy arrays leave. It cannot run code.

Pickle runs code through one door, `find_class`: every other opcode builds plain containers. Here the door knows a few
names, and each leads to a function of ours or to `numpy.dtype`, so that not even `numpy.ndarray` can be called with a shape
of its choosing.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from fastcifar.errors import InputError


class _NdarrayType:
    """Stands where the stream says `numpy.ndarray`: an inert argument of `_reconstruct`."""


def _reconstruct(array_type: object, shape: object, type_code: object) -> np.ndarray:
    """NumPy's own first step of unpickling an array: an empty one, which the stream's state then fills."""
    if array_type is not _NdarrayType:
        raise pickle.UnpicklingError("only plain NumPy arrays are allowed")
    return np.ndarray((0,), np.uint8)


def _frombuffer(buffer: Any, dtype: Any, shape: Any, order: Any, axis_order: Any = None) -> np.ndarray:
    """Protocol 5's arrays: a view of bytes in the stream; a shape that does not fit raises ValueError."""
    return np.frombuffer(buffer, np.dtype(dtype)).reshape(shape, order=order)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How Python 3 writes bytes for protocol 2: `_codecs.encode(text, 'latin1')`; other codecs do more than that."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"codec {encoding!r} is not allowed")
    return text.encode("latin1")


def _scalar(dtype: np.dtype[Any], value: bytes) -> Any:
    return np.frombuffer(value, dtype)[0].item()


ALLOWED = {
    ("_codecs", "encode"): _encode,
    ("numpy", "ndarray"): _NdarrayType,
    ("numpy", "dtype"): np.dtype,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
}


class SafeUnpickler(pickle.Unpickler):
    """An unpickler that refuses every global outside `ALLOWED`."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it wants to use {module}.{name}, which data has no need of") from None


def load_pickle(path: Path) -> dict[str, Any]:
    """Read a pickled dict; keys come back as str whether Python 2 or 3 wrote them, byte strings as bytes.

    Raises InputError naming the file when it is missing, truncated, would run code, or is no dict of plain data.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} is missing: name the folder that holds the pickles") from None
    try:
        value = SafeUnpickler(io.BytesIO(content), encoding="bytes").load()
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} is refused: {error}; get the file again from a source you trust") from None
    except Exception as error:  # a malformed stream can raise almost anything: all of it means "not a sound pickle"
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error}): get the file again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, not a dict: it is not a CIFAR pickle")
    return {_text(key): entry for key, entry in value.items()}


def _text(key: object) -> str:
    return key.decode("latin1") if isinstance(key, bytes) else str(key)
