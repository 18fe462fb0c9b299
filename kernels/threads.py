"""Compiled loops on the threads PyTorch has: `run(loop, count, ...)` divides `count` turns of a Numba loop among them.

PyTorch's OpenMP threads spin for a while after every operation, on the cores that a second pool of threads would need. So a
loop is handed to their own pool, by the call that compilers make of `#pragma omp parallel`, and costs what an operation does.
"""

# mypy: disable-error-code="no-untyped-def"

import ctypes
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any
from uuid import uuid4

import llvmlite.binding as llvm
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import caching, cgutils
from numba.extending import intrinsic


def _can_cache() -> bool:
    """Whether Numba finds a place for compiled code: beside this file, or its folder in the home of the user."""
    places = [os.environ.get("NUMBA_CACHE_DIR"), Path(__file__).parent, os.path.expanduser("~")]
    return any(os.access(place, os.W_OK) for place in places if place)


def _spare_scipy() -> None:
    """Import Numba's mathematics without SciPy's: it takes a quarter of the time, and only np.cov in a loop would need it."""
    if "scipy.linalg" not in sys.modules:
        sys.modules["scipy.linalg"] = None  # type: ignore[assignment]  # Python's sign for what cannot be imported
        try:
            importlib.import_module("numba.np.arraymath")
        finally:
            del sys.modules["scipy.linalg"]


def _file_name(cache: Any, number: int) -> str:
    """Of compiled code on disk. By Numba's numbers, two processes that compile at once can each run what the other has kept."""
    return str(cache._data_name_pattern.format(number=uuid4().int))


_spare_scipy()
caching.IndexDataCacheFile._data_name = _file_name  # type: ignore[method-assign]
KEPT: dict[str, Any] = {"nogil": True, "cache": _can_cache(), "error_model": "numpy"}  # how our loops are compiled
PROCESS = os.getpid()
WORD, INT, BYTES = ir.IntType(64), ir.IntType(32), ir.IntType(8).as_pointer()
PART = ir.FunctionType(ir.VoidType(), [BYTES])
TEAM = ir.FunctionType(ir.VoidType(), [PART.as_pointer(), BYTES, INT, INT])  # GOMP_parallel(part, shared, threads, flags)
TURN, FAILED, COUNT, PARTS, ARGUMENTS = range(5)  # of what the threads share


def run(loop: Callable[..., None], count: int, *arguments: Any) -> None:
    """Run a compiled `loop(first, last, *arguments)` over 0..count - 1, divided among PyTorch's number of threads.

    loop: by `njit(**KEPT)`, at the top level of its file. arguments: arrays and numbers. A forked process, which has no threads
    of its parent, runs it alone. Raises RuntimeError when the loop has raised in a thread; alone, what it raised.
    """
    parts = min(torch.get_num_threads(), count) if os.getpid() == PROCESS else 1
    if parts > 1:
        _launcher(loop)(count, parts, *arguments)
    else:
        loop(0, count, *arguments)


@cache
def _launcher(loop: Any) -> Any:
    """`_launch` of `loop`, which Numba keeps beside the loop's file and compiles again when that has changed."""
    made_for = "".join(f"_{cell.cell_contents}" for cell in loop.py_func.__closure__ or ())  # or they would share a name
    file, name = inspect.getfile(loop.py_func), f"{loop.py_func.__name__}{made_for}_in_team"
    code = _launch.__code__.replace(co_filename=file, co_name=name, co_qualname=name)
    return njit(**KEPT)(FunctionType(code, {"__name__": loop.py_func.__module__, "in_team": in_team, "loop": loop}))


def _launch(count, parts, *arguments):
    if in_team(loop, count, parts, arguments):  # type: ignore  # noqa: F821  # `loop` is `_launcher`'s
        raise RuntimeError("a compiled loop failed in one of its threads")


@intrinsic
def in_team(typing: Any, loop: Any, count: Any, parts: Any, arguments: Any) -> Any:
    """Within a compiled function: `loop` in as many threads as parts; how many parts have failed."""
    called = typing.resolve_function_type(loop, (types.int64, types.int64, *arguments.types), {})

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        shared = cgutils.alloca_once(builder, ir.LiteralStructType([WORD] * 4 + [context.get_value_type(arguments)]))
        for place, value in enumerate([WORD(0), WORD(0), *values[1:]]):
            builder.store(value, cgutils.gep_inbounds(builder, shared, 0, place))
        part = ir.Function(builder.module, PART, f"{builder.function.name}.part")
        part.linkage = "internal"
        _build_part(context, part, shared.type, loop.dispatcher.get_compile_result(called), called)
        team = cgutils.get_or_insert_function(builder.module, TEAM, "fastcifar_team")
        builder.call(team, [part, builder.bitcast(shared, BYTES), builder.trunc(values[2], INT), INT(0)])
        return builder.load(cgutils.gep_inbounds(builder, shared, 0, FAILED))

    return types.int64(loop, types.int64, types.int64, arguments), build


def _build_part(context: Any, part: Any, kind: Any, compiled: Any, called: Any) -> None:
    """What every thread runs: the next part, until there is none. So a smaller team than was asked for does it all too."""
    builder = ir.IRBuilder(part.append_basic_block())
    shared = builder.bitcast(part.args[0], kind)
    count, parts, packed = (builder.load(cgutils.gep_inbounds(builder, shared, 0, at)) for at in (COUNT, PARTS, ARGUMENTS))
    take, work, leave = (part.append_basic_block() for _ in range(3))
    builder.branch(take)
    builder.position_at_end(take)
    turn = builder.atomic_rmw("add", cgutils.gep_inbounds(builder, shared, 0, TURN), WORD(1), "monotonic")
    builder.cbranch(builder.icmp_signed("<", turn, parts), work, leave)
    builder.position_at_end(work)
    first = builder.sdiv(builder.mul(count, turn), parts)
    last = builder.sdiv(builder.mul(count, builder.add(turn, WORD(1))), parts)
    context.add_linking_libs([compiled.library])
    function = context.declare_function(builder.module, compiled.fndesc)
    given = [first, last, *cgutils.unpack_tuple(builder, packed, len(called.args) - 2)]
    status, _ = context.call_conv.call_function(builder, function, called.return_type, called.args, given)
    failed = builder.zext(status.is_error, WORD)
    builder.atomic_rmw("add", cgutils.gep_inbounds(builder, shared, 0, FAILED), failed, "monotonic")
    builder.branch(take)
    builder.position_at_end(leave)
    builder.ret_void()


# Without OpenMP


@ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)  # type: ignore[untyped-decorator]
def _python_team(part: int, shared: int, parts: int, _flags: int) -> None:
    """GOMP_parallel by threads of our own, where PyTorch is built with another pool than GNU's."""
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(part)
    wait([_pool(parts).submit(call, shared) for _ in range(parts)])


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="kernels")


def _team() -> Any:
    """GOMP_parallel of the library that PyTorch itself has loaded."""
    return getattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel", _python_team)


llvm.add_symbol("fastcifar_team", ctypes.cast(_team(), ctypes.c_void_p).value)
