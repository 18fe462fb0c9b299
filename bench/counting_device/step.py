"""Counts what one training step asks of the counting device.

Kernels are not compiled but counted where they would be launched, unless the host's time is wanted. Convolutions, which cuDNN
would do, are a launch each. Bytes are those of forward pass, loss and backward pass but for convolutions and matrix products:
by Inductor's own count of each kernel's reads and writes; of our kernels, and of PyTorch's operations uncompiled, all tensors
they are given and all they return, batch norm's as often as its kernels read them.
"""

import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.graph import GraphLowering
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.baselines import Task, fastcifar_loop
from bench.counting_device import launch, record
from fastcifar.beton import Manifest
from fastcifar.dataset import CIFAR10_CLASSES, CIFAR10_MEAN, CIFAR10_STD, ResidentSet, Splits
from fastcifar.recipes import RunOptions, reported
from fastcifar.step import TrainStep

STEPS = 5  # of an epoch, of which the last is counted: warm-up and capture are over
TIMED = 20  # steps of which the fastest is the host's time
# Casts and copies as PyTorch's kernels are called; and what Inductor's do that only move.
CAST = re.compile(r"float16_copy_kernel|direct_copy_kernel.*LoadWithCast|LoadWithCast.*direct_copy_kernel")
COPY = re.compile(r"direct_copy_kernel")
MOVES = {"load", "to_dtype", "store", "output"}
VIEWS = {
    "view", "expand", "permute", "t", "detach", "as_strided", "_unsafe_view", "unsqueeze", "squeeze", "alias", "slice",
    "select", "transpose", "reshape", "_reshape_alias", "unbind", "split", "lift_fresh",
}  # fmt: skip
PRODUCTS = {"convolution", "convolution_backward", "mm", "addmm", "bmm"}
# Passes over the feature map beside one of each argument and result.
MORE_PASSES = {"native_batch_norm": 1, "cudnn_batch_norm": 1, "native_batch_norm_backward": 2, "cudnn_batch_norm_backward": 2}

Kernels = list[tuple[str, int]]  # name, bytes


def channels_last(*tensors: Tensor) -> torch.memory_format:
    """What a convolution of `tensors` computes in."""
    last = torch.channels_last
    nhwc = any(x.is_contiguous(memory_format=last) and not x.is_contiguous() for x in tensors)
    return last if nhwc else torch.contiguous_format


def convolve(copies: list[str], x: Tensor, weight: Tensor, bias: Any, stride: list[int], padding: list[int], *_: Any) -> Tensor:
    """The result's place for a launch; `copies` gets what a convolution would have to copy first."""
    layout = channels_last(x, weight)
    copies += [f"convolution: {list(t.shape)}" for t in (x, weight) if not t.is_contiguous(memory_format=layout)]
    launch("convolution")
    sides = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(x.shape[2:], padding, weight.shape[2:], stride, strict=True)]
    return torch.empty((len(x), len(weight), *sides), dtype=x.dtype, device=x.device, memory_format=layout)


def convolve_backward(copies: list[str], gradient: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    layout, wanted = channels_last(x, weight), rest[-1]
    copies += [
        f"convolution's gradient: {list(t.shape)}" for t in (gradient, x, weight) if not t.is_contiguous(memory_format=layout)
    ]
    results: list[Tensor | None] = []
    for tensor, each in zip((x, weight), wanted, strict=False):
        if each:
            launch("convolution's gradient")
        results.append(torch.empty_like(tensor, memory_format=layout) if each else None)
    return *results, gradient.sum((0, 2, 3)) if wanted[2] else None


class Count(TorchDispatchMode):
    """Bytes of PyTorch's operations, uncompiled."""

    def __init__(self, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = operator(*arguments, **(keywords or {}))
        name = operator._schema.name.split("::")[1]
        if name not in VIEWS | PRODUCTS and not name.startswith(("empty", "new_empty")):
            given = [x for x in tree_leaves((arguments, keywords)) if isinstance(x, Tensor) and x.is_cuda]
            places = {x.data_ptr() for x in given}
            written = [
                x for x in tree_leaves(result) if isinstance(x, Tensor) and (name.endswith("_") or x.data_ptr() not in places)
            ]
            again = MORE_PASSES.get(name, 0) * size(given[0]) if given else 0
            self.kernels.append((name, sum(map(size, given)) + sum(map(size, written)) + again))
        return result


def size(x: Tensor) -> int:
    """Bytes of a tensor's elements in memory: one expanded is read once."""
    return (
        x.element_size() * (1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)))
        if x.numel()
        else 0
    )


def label(node: Any) -> str:
    """What one of Inductor's kernels computes: the operations it was made of."""
    origins = {origin for each in node.get_nodes() if each.node is not None for origin in each.node.origins}
    names = {getattr(origin.meta.get("original_aten"), "_opname", "") for origin in origins}
    return "+".join(sorted(names - {""})) or type(node).__name__


def move(node: Any) -> Literal["cast", "layout copy"] | None:
    """What one of Inductor's kernels is where it computes nothing: a cast, or a copy from one layout to another."""
    found = set[Literal["cast", "layout copy"] | None]()
    for each in node.get_nodes():
        body, edges = getattr(each, "_body", None), each.read_writes
        if body is None or set(body.op_counts) - MOVES or len(edges.reads) != 1 or len(edges.writes) != 1:
            return None
        (read,), (write,) = edges.reads, edges.writes
        relaid = getattr(read, "index", None) != getattr(write, "index", None)
        found.add("layout copy" if relaid else "cast" if "to_dtype" in body.op_counts else None)
    return found.pop() if len(found) == 1 else None


class Observed:
    """What the compiler, the convolutions and our kernels do; the last two since `clear`."""

    def __init__(self, *, dry: bool) -> None:
        """dry: kernels are counted, not compiled."""
        self.dry = dry
        self.inductor: Kernels = []  # kernels of the graphs that hold the network
        self.ours: Kernels = []
        self.moves = Counter[str]()  # of those graphs
        self.convolved: list[str] = []  # by convolutions

    def clear(self) -> None:
        self.ours.clear()
        self.convolved.clear()

    @contextmanager
    def convolving(self) -> Iterator[None]:
        """Put our convolutions in the place of cuDNN's."""
        with torch.library._scoped_library("aten", "IMPL") as library:
            library.impl("convolution", partial(convolve, self.convolved), "CUDA")
            library.impl("convolution_backward", partial(convolve_backward, self.convolved), "CUDA")
            yield

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Put our eyes where compilers and launchers pass."""
        codegen, run = GraphLowering.codegen, triton.runtime.jit.JITFunction.run
        observed = self

        def count_graph(graph: Any) -> Any:
            code = codegen(graph)
            if any("convolution" in str(node.target) for node in graph.graph.nodes):
                nodes = [node for node in graph.scheduler.nodes if "Extern" not in type(node).__name__]
                observed.inductor += [(label(node), node.get_read_write_buffers_sizes()) for node in nodes]
                observed.moves.update(kind for kind in map(move, nodes) if kind)
            return code

        def count_ours(kernel: Any, *arguments: Any, **keywords: Any) -> Any:
            tensors = {x.data_ptr(): x for x in (*arguments, *keywords.values()) if isinstance(x, Tensor)}
            if not kernel.fn.__module__.startswith("kernels.augment"):
                observed.ours.append((kernel.fn.__name__, sum(map(size, tensors.values()))))
            return launch(kernel.fn.__name__) if observed.dry else run(kernel, *arguments, **keywords)

        with (
            patch.object(GraphLowering, "codegen", count_graph),
            patch.object(triton.runtime.jit.JITFunction, "run", count_ours),
            patch.object(AsyncCompile, "triton", Uncompiled) if self.dry else nullcontext(),
        ):
            yield


class Uncompiled:
    """One of Inductor's kernels, which counts where it would run."""

    def __init__(self, name: str, *_: Any, **__: Any) -> None:
        self.run = lambda *_, **__: launch(name)


def images(count: int) -> Splits:
    """Black images of one class on the device."""
    device = torch.device("cuda")
    data = ResidentSet(
        torch.zeros(count, 32, 32, 3, dtype=torch.uint8, device=device), torch.zeros(count, dtype=torch.int64, device=device),
        torch.arange(count, device=device),
    )  # fmt: skip
    manifest = Manifest("cifar10", "train", "black", count, list(CIFAR10_CLASSES), [0.5] * 3, [0.5] * 3, "", False, True)
    mean, std = (torch.tensor(values, device=device) for values in (CIFAR10_MEAN, CIFAR10_STD))
    return Splits(data, data, "test", data, manifest, ("", ""), mean, std)


def count(arch: str, batch_size: int, options: dict[str, Any], *, host_time: bool) -> dict[str, Any]:
    """Train `STEPS` steps of an architecture by its recipe; return what the last of them took.

    options: of the run, as kernels and compile.
    """
    recipe = replace(reported(arch).recipe, batch_size=batch_size)
    run = RunOptions(device="cuda", max_parameters=0, **options)
    torch._dynamo.reset()
    counters.clear()
    observed, trained = Observed(dry=not host_time), list[TrainStep]()
    events: list[str] = []
    first, seconds = list[float](), list[float]()
    call = TrainStep.__call__

    def counted(step: TrainStep, *arguments: Any, **keywords: Any) -> None:
        observed.clear()
        events.clear()
        trained[:] = [step]
        began = time.process_time()
        with record(events):
            call(step, *arguments, **keywords)
        first.append(time.process_time() - began)

    def timed(*arguments: Any, **keywords: Any) -> None:
        began = time.process_time()
        call(*arguments, **keywords)
        seconds.append(time.process_time() - began)

    with observed.convolving():
        with observed.watching(), torch._inductor.config.patch(force_disable_caches=True, compile_threads=1):
            loop = fastcifar_loop(Task(arch, recipe, images(STEPS * batch_size), Path(), STEPS), run)
            with patch.object(TrainStep, "__call__", counted):
                loop()
            convolved = list(observed.convolved)
            kernels = [*observed.inductor, *observed.ours] if run.compile else count_eager(trained[0], batch_size)
            with Count(kernels):
                trained[0].rounded.widen()
                trained[0].rounded.round()
        with patch.object(TrainStep, "__call__", timed):
            for _ in range(TIMED // STEPS if host_time else 0):
                loop()
    names = [event.removeprefix("launch ") for event in events if event.startswith("launch ")]
    copies = [event for event in events if event.startswith("copy ")]
    largest = Counter[str]()
    for name, moved in kernels:
        largest[name] += moved
    copied = [name for name in names if COPY.search(name) and not CAST.search(name)]
    return {
        "launches": len(names),
        "first_step_seconds": first[0] if host_time else None,
        "host_ms": 1e3 * min(seconds) if host_time else None,
        "pointwise_bytes": sum(moved for _, moved in kernels),
        "graph_breaks": sum(counters["graph_break"].values()),
        "layout_copies": observed.moves["layout copy"] + len(convolved) + len(copied),
        "casts": observed.moves["cast"] + sum(bool(CAST.search(name)) for name in names),
        "syncs": sum(event.startswith("sync ") for event in events) + sum("waiting" in copy for copy in copies),
        "pageable_copies": sum("pageable" in copy for copy in copies),
        "largest": [{"kernel": name, "bytes": moved} for name, moved in largest.most_common(10)],
        "launched": dict(Counter(name[:160] for name in names).most_common()),
        "copied": dict(Counter([*convolved, *(name[:160] for name in copied)])),
    }


def count_eager(step: TrainStep, batch_size: int) -> Kernels:
    """Operations of forward pass, loss and backward pass."""
    kernels: Kernels = []
    pixels = torch.zeros(batch_size, 3, 32, 32, device="cuda").to(memory_format=torch.channels_last)
    labels = torch.zeros(batch_size, dtype=torch.int64, device="cuda")
    step.optimizer.zero_grad(set_to_none=True)  # gradients that lie there would be added to
    step.rounded.round()
    with Count(kernels):
        step.loss(pixels, labels, labels, torch.ones((), device="cuda"))[0].backward()
    return kernels
