"""A kernel's row and a map enter; checked, interleaved timings of its forms leave, with what is needed to believe them.

Each form is captured as one CUDA graph of calls on several sets of inputs, as a captured training step would run it, so that
the host's pace does not enter. Cold: the sets are over 150 MB together, three times an H200's cache, and each call meets its
own and writes to memory of its own; hot: all calls meet the first set, and memory is used again. A round replays every form
once, in an order drawn anew; beside them a copy of one map, whose bandwidth is the ceiling of that round.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import ceil, prod
from statistics import median
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from bench.kernel_rows import Form, Inputs, KernelRow, Shape
from bench.levers import TUNED
from bench.timing import Ratio, bootstrap_ratio

OURS, EAGER = "ours", "eager"
COPY = "copy"
Direction = Literal["forward", "forward+backward"]
Cache = Literal["cold", "hot"]
Work = dict[str, list[Callable[[], object]]]  # a form's calls, one a set of inputs
DIRECTIONS: tuple[Direction, ...] = ("forward", "forward+backward")
CACHES: tuple[Cache, ...] = ("cold", "hot")
COLD_BYTES = 150e6
SLACK, FLOOR = 2.0, 4.0  # as tests/kernel_checks.py: times eager's error, and units in the last place forgiven
PEERS_SLACK = 10.0  # of what PyTorch compiled: to see that it is no other function; a peer lost by chance would flatter ours
REORDERED = 1e-6  # a float32 gradient of few numbers, summed in another order: its ratio of errors is luck in the one draw here


class Stopwatch(Protocol):
    """How work is prepared and timed; a test has its own."""

    def prepare(self, name: str, calls: Sequence[Callable[[], object]], *, keep: bool) -> Callable[[], object]:
        """What does all the calls at once. keep: no call's results may take the memory of an earlier call's."""

    def seconds(self, name: str, replay: Callable[[], object]) -> float:
        """What one replay takes."""

    def peak_memory(self, call: Callable[[], object]) -> int:
        """Bytes a call needs at its peak, beyond what was there before."""

    def launches(self, call: Callable[[], object]) -> int | None:
        """Kernels, copies and fills of one call; None where nothing counts them."""


class CudaStopwatch:
    """Captured graphs between two CUDA events."""

    def prepare(self, name: str, calls: Sequence[Callable[[], object]], *, keep: bool) -> Callable[[], object]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiling and autotuning must not first run in capture
                calls[0]()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        kept = []
        with torch.cuda.graph(graph):
            for call in calls:
                results = call()
                if keep:  # else the graph's pool gives the next call this memory, which is still in the cache
                    kept.append(results)
                del results
        return graph.replay

    def seconds(self, name: str, replay: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def peak_memory(self, call: Callable[[], object]) -> int:
        call()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before

    def launches(self, call: Callable[[], object]) -> int | None:
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        return sum(event.device_type.name == "CUDA" for event in profile.events() or ()) or None


@dataclass(frozen=True)
class Measurement:
    """One kernel on one map in one direction, cold or hot."""

    kernel: str
    shape: str  # CxHxW
    batch: int
    dtype: str
    direction: Direction
    cache: Cache
    seconds: dict[str, list[float]]  # of one call by each form, one entry a round, the same rounds for all
    bytes: int  # that our kernels read and write of whole maps
    copy_bytes: int  # that the copy reads and writes
    copy_seconds: list[float]
    refused: dict[str, str] = field(default_factory=dict)  # forms that failed their check, or did not run: why
    peak_memory: dict[str, int] = field(default_factory=dict)
    launches: dict[str, int | None] = field(default_factory=dict)

    @property
    def best_peer(self) -> str | None:
        """The fastest form that is not ours, by its median."""
        peers = {name: median(seconds) for name, seconds in self.seconds.items() if name != OURS}
        return min(peers, key=lambda name: peers[name]) if peers else None

    @property
    def speedup(self) -> Ratio | None:
        """Time of the best peer over ours."""
        if OURS not in self.seconds or self.best_peer is None:
            return None
        return bootstrap_ratio(self.seconds[self.best_peer], self.seconds[OURS])

    @property
    def won(self) -> bool:
        """Whether ours beat every peer with an interval that excludes 1; over a peer that did not run there is no win."""
        if self.refused or OURS not in self.seconds or EAGER not in self.seconds:
            return False
        return all(bootstrap_ratio(peer, self.seconds[OURS]).low > 1 for name, peer in self.seconds.items() if name != OURS)

    @property
    def share_of_copy(self) -> float | None:
        """Bytes over time, as a share of the copy's in the same rounds."""
        if OURS not in self.seconds:
            return None
        return (self.bytes / median(self.seconds[OURS])) / (self.copy_bytes / median(self.copy_seconds))

    def to_json(self) -> dict[str, Any]:
        """Every field, and the figures made of them."""
        spread = {name: [float(value) for value in np.percentile(times, [10, 50, 90])] for name, times in self.seconds.items()}
        made = {
            "p10_p50_p90": spread,
            "best_peer": self.best_peer,
            "speedup": None if self.speedup is None else vars(self.speedup),
            "won": self.won,
            "share_of_copy": self.share_of_copy,
        }
        return vars(self) | made


def peers_of(row: KernelRow) -> dict[str, Form]:
    """Every form of a kernel by name. Compiled ones are compiled at their first call; earlier shapes' are forgotten."""
    torch._dynamo.reset()
    compiled = partial(torch.compile, fullgraph=True, dynamic=False)
    peers = {EAGER: row.eager, "compiled": compiled(row.eager), "compiled tuned": tuned(row.eager)}
    if row.same_algebra is not None:
        peers["compiled same algebra"] = compiled(row.same_algebra)
    return peers | {OURS: row.ours}


def tuned(function: Form) -> Form:
    """`function` compiled to fuse longer chains and to recompute more in the backward pass."""
    compiled = torch.compile(function, fullgraph=True, dynamic=False, options=dict(TUNED))

    def call(*inputs: Tensor | None) -> Tensor | tuple[Tensor, ...]:
        with torch._functorch.config.patch(ban_recompute_used_far_apart=False):  # read when the compiler runs
            return compiled(*inputs)

    return call


def measure(
    row: KernelRow,
    shape: Shape,
    peers: dict[str, Form],
    stopwatch: Stopwatch,
    *,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
) -> list[Measurement]:
    """Check and time a kernel on one map: each direction it has, cold and hot. What fails its check is not timed."""
    sets = input_sets(row, shape, batch, dtype, device)
    checked = {name: check(row, name, form, *sets[0]) for name, form in peers.items()}
    refused = {name: reason for name, reason in checked.items() if reason is not None}
    copies: Work = {COPY: [partial(torch.empty_like(gradient).copy_, gradient) for _, gradient in sets]}
    map_bytes = sets[0][1].numel() * dtype.itemsize
    common: dict[str, Any] = {"kernel": row.name, "shape": shape_name(shape), "batch": batch, "refused": refused}
    results = []
    for direction in DIRECTIONS if row.backward_passes else DIRECTIONS[:1]:
        calls: Work = {
            name: [partial(call, form, direction, *one) for one in sets] for name, form in peers.items() if name not in refused
        }
        common["peak_memory"] = {name: stopwatch.peak_memory(each[0]) for name, each in calls.items()}
        common["launches"] = {name: stopwatch.launches(each[0]) for name, each in calls.items()}
        passes = row.forward_passes + (row.backward_passes if direction == "forward+backward" else 0)
        for cache in CACHES:
            work = {name: each if cache == "cold" else each[:1] * len(each) for name, each in (calls | copies).items()}
            seconds = timed(work, stopwatch, rounds, keep=cache == "cold")
            results.append(
                Measurement(
                    **common,
                    dtype=str(dtype).removeprefix("torch."),
                    direction=direction,
                    cache=cache,
                    bytes=passes * map_bytes + batch * row.read_beside,
                    copy_bytes=2 * map_bytes,
                    copy_seconds=seconds.pop(COPY),
                    seconds=seconds,
                )
            )
    return results


def shape_name(shape: Shape) -> str:
    """CxHxW, as kernels/measured.json has it."""
    return "x".join(map(str, shape))


def input_sets(
    row: KernelRow, shape: Shape, batch: int, dtype: torch.dtype, device: torch.device
) -> list[tuple[Inputs, Tensor]]:
    """As many inputs, each with a gradient of the result, as it takes for their maps to exceed COLD_BYTES together."""
    map_bytes = batch * prod(shape) * dtype.itemsize
    sets = []
    for seed in range(min(max(ceil(COLD_BYTES / map_bytes) + 1, 2), 256)):
        inputs = row.inputs(shape, batch, dtype, device, seed)
        with torch.no_grad():
            y = tensors(row.eager(*clones(inputs, None)))[0]
        sets.append((inputs, torch.randn_like(y)))
    return sets


def call(form: Form, direction: Direction, inputs: Inputs, gradient: Tensor) -> object:
    """One forward pass without, or one with, the gradients of all inputs that want one: what a training step keeps of it."""
    if direction == "forward":
        with torch.no_grad():
            return form(*inputs)
    y = tensors(form(*inputs))[0]
    return y.detach(), *torch.autograd.grad(y, wanting(inputs), gradient)


def tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A form's result, which may be one tensor or several."""
    return (result,) if isinstance(result, Tensor) else result


def wanting(inputs: Inputs) -> list[Tensor]:
    """The inputs that want a gradient."""
    return [t for t in inputs if t is not None and t.requires_grad]


def clones(inputs: Inputs, dtype: torch.dtype | None) -> Inputs:
    """Copies, since a form may move running statistics; in another dtype where one is given."""
    return [None if t is None else t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad) for t in inputs]


def check(row: KernelRow, name: str, form: Form, inputs: Inputs, gradient: Tensor) -> str | None:
    """Why a form is not to be timed, or None; ours is held to more than its peers."""
    if row.exact is not None:
        return difference(form, row.exact, inputs, equal=name == OURS)
    return disagreement(form, row.eager, inputs, gradient, SLACK if name == OURS else PEERS_SLACK)


def difference(form: Form, exact: Form, inputs: Inputs, *, equal: bool) -> str | None:
    """Why a form is not to be timed; None when its results are the exact ones: equal, or within torch.testing's defaults.

    The second is for what PyTorch compiled, whose division is not rounded as IEEE's and which fuses products into sums.
    """
    tolerances: dict[str, Any] = {"rtol": 0, "atol": 0} if equal else {}
    try:
        for mine, expected in zip(tensors(form(*inputs)), tensors(exact(*inputs)), strict=True):
            torch.testing.assert_close(mine, expected, **tolerances)
    except Exception as error:  # as below; a difference is an AssertionError, whose lines count and place the elements
        return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
    return None


def disagreement(form: Form, eager: Form, inputs: Inputs, gradient: Tensor, slack: float = SLACK) -> str | None:
    """Why a form is not to be timed; None when result and gradients are as near float64 as `slack` times eager's own error."""

    def results(function: Form, dtype: torch.dtype | None) -> list[Tensor]:
        leaves = clones(inputs, dtype)
        y = tensors(function(*leaves))[0]
        return [y.detach(), *torch.autograd.grad(y, wanting(leaves), gradient.to(y.dtype))]

    try:
        triples = zip(results(form, None), results(eager, None), results(eager, torch.float64), strict=True)
    except Exception as error:  # whatever a compiler or a kernel throws, the other forms are still worth timing
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    for number, (mine, theirs, exact) in enumerate(triples):
        ours, eagers = (float((t.double() - exact).norm() / exact.norm().clamp(min=1e-300)) for t in (mine, theirs))
        allowed = max(slack * eagers, FLOOR * torch.finfo(mine.dtype).eps / 2, REORDERED)
        if mine.dtype != theirs.dtype or not ours <= allowed:
            what = f"gradient {number}" if number else "result"
            return f"{what}: error {ours:.2g} against float64 in {mine.dtype}, eager's is {eagers:.2g} in {theirs.dtype}"
    return None


def timed(work: Work, stopwatch: Stopwatch, rounds: int, *, keep: bool) -> dict[str, list[float]]:
    """Seconds of one call by each form in each round, after two untimed rounds; keep: as for a stopwatch."""
    replays = {name: stopwatch.prepare(name, calls, keep=keep) for name, calls in work.items()}
    seconds: dict[str, list[float]] = {name: [] for name in work}
    order, shuffle = sorted(work), random.Random(0)
    for number in range(2 + rounds):
        shuffle.shuffle(order)
        for name in order:
            taken = stopwatch.seconds(name, replays[name]) / len(work[name])
            if number >= 2:
                seconds[name].append(taken)
    return seconds
