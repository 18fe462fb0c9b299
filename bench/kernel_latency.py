#!/usr/bin/env python3
"""How long every fused kernel takes on this machine, beside eager and compiled PyTorch.

python bench/kernel_latency.py --out bench/results/h200/kernel_latency.json

A form that fails its check (against float64; of the augmentation against NumPy's pixels) is not timed. Each of the others is
captured as one CUDA graph of calls on several sets of inputs, as a captured training step would run it, so that the host's pace
does not enter. Cold: the sets are over 150 MB together, three times an H200's cache, and each call meets its own and writes to
memory of its own; hot: all calls meet the first set, and memory is used again. A round replays every form once, in an order
drawn anew; beside them a copy of one feature map, whose bandwidth is the ceiling of that round.

A win is claimed only where the 95 % interval of the ratio excludes 1 against every other form. Which form a run takes is
measured in its own step (docs/plans.md). Without a CUDA device what runs on the CPU is measured: augmentation and dropout.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, partial
from math import ceil, prod
from pathlib import Path
from statistics import median
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn

from bench.baselines import Loop, load_all, one_line, take_turns
from bench.input_pipelines import CPU, PIPELINES, time_rates
from bench.input_pipelines import measure as pipeline
from bench.results import environment
from bench.stats import Ratio, ratio
from fastcifar import augmentation, compiling
from fastcifar.arguments import parse_arguments
from fastcifar.augmentation import Augmentation
from fastcifar.dataset import CIFAR10_MEAN, CIFAR10_STD, ResidentSet, Splits
from fastcifar.device import choose_device, set_up_process
from fastcifar.errors import InputError, require, run_command, unknown
from fastcifar.files import write_json
from fastcifar.models import ARCHITECTURES, Architecture
from fastcifar.models.blocks import BasicBlock, PreActivationBlock
from kernels.augment import augment_fused
from kernels.augment.operations import SIDE
from kernels.augment.reference import augment_numpy, augment_torch
from kernels.backends import DTYPE_NAMES
from kernels.dropout import as_map, as_rows, dropout
from kernels.dropout import reference as eager_dropout
from kernels.mish import mish
from kernels.mish.reference import mish as eager_mish
from kernels.residual_tail import residual_tail, variant
from kernels.residual_tail.reference import residual_tail as eager_residual_tail
from kernels.squeeze_excite import squeeze_excite
from kernels.squeeze_excite.reference import squeeze_excite as eager_squeeze_excite

Shape = tuple[int, int, int]  # C, H, W
Inputs = list[Tensor | None]
Form = Callable[..., Tensor | tuple[Tensor, ...]]  # the first tensor of several is the feature map
Work = dict[str, list[Callable[[], object]]]  # a form's calls, one a set of inputs
DIRECTIONS = ("forward", "forward+backward")
CACHES = ("cold", "hot")

# ---- The kernels: adding one is adding a row.


@dataclass(frozen=True)
class KernelRow:
    """One kernel and what it is compared with. All forms take the inputs in their order and return the same tensors."""

    name: str  # as a mapping of `--kernels` names its kind
    shapes: tuple[Shape, ...]
    inputs: Callable[[Shape, int, torch.dtype, torch.Generator], Inputs]  # of shape, batch, dtype; on the generator's device
    ours: Form
    eager: Form  # PyTorch's own operations: compiled too; in float64, the oracle
    forward_passes: int  # reads and writes of a whole feature map by our kernels
    backward_passes: int  # 0: nothing has a gradient, only the forward pass is timed
    same_algebra: Form | None = None  # our formulas as operations for the compiler to fuse, where we have them
    exact: Form | None = None  # the oracle of a kernel without gradients: the very values, rounded once
    read_beside: int = 0  # bytes of a sample that are read and belong to no feature map


def maps(uses: Callable[[Architecture, int], bool]) -> tuple[Shape, ...]:
    """Every feature map [C, H, W] of the architectures' stages that `uses` (architecture, stage from 1) picks, once."""
    sides = (
        (row, stage, width, 32 >> (stage - 1)) for row in ARCHITECTURES.values() for stage, width in enumerate(row.widths, 1)
    )
    return tuple(dict.fromkeys((width, side, side) for row, stage, width, side in sides if uses(row, stage)))


def random_map(shape: Shape, batch: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A channels_last leaf [N, C, H, W] of normal draws."""
    x = torch.randn(batch, *shape, generator=generator, device=generator.device)
    return x.to(dtype, memory_format=torch.channels_last).requires_grad_()


def weight_of(*size: int, generator: torch.Generator) -> Tensor:
    """A float32 leaf, as weights are in training, of normal draws over the root of its inputs' number."""
    weight = torch.randn(size, generator=generator, device=generator.device)
    return (weight / size[1] ** 0.5 if len(size) > 1 else weight).requires_grad_()


def squeeze_excite_inputs(shape: Shape, batch: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """x and both weights; 16 channels a unit."""
    channels, units = shape[0], max(shape[0] // 16, 1)
    weights = (weight_of(*size, generator=generator) for size in ((units, channels), (channels, units)))
    return [random_map(shape, batch, dtype, generator), *weights]


def tail_row(
    activation: Literal["relu", "mish"], *, shortcut: bool, se: bool, se_bias: bool = False, se_last: bool = False
) -> KernelRow:
    """The residual tail of one kind, in training, on the maps of the architectures whose blocks have such a tail."""

    def uses(arch: Architecture, stage: int) -> bool:
        own = arch.activation is {"relu": nn.ReLU, "mish": nn.Mish}[activation]
        if se_last:
            return own and arch.block is PreActivationBlock and stage in arch.se_stages
        return own and (not shortcut or (arch.block is BasicBlock and (stage in arch.se_stages) is se))

    def inputs(shape: Shape, batch: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        """conv_out, shortcut, BN's weight, bias, running mean and variance, weights and biases of the squeeze-excitation."""
        vector = partial(weight_of, generator=generator)
        channels, units = shape[0], max(shape[0] // 16, 1)
        conv_out, *weights = squeeze_excite_inputs(shape, batch, dtype, generator)
        added = random_map(shape, batch, dtype, generator) if shortcut else None
        statistics = (create(channels, device=generator.device) for create in (torch.zeros, torch.ones))
        biases = [vector(units), vector(channels)] if se_bias else [None, None]
        excitation = [*weights, *biases] if se else [None] * 4
        return [conv_out, added, vector(channels), vector(channels), *statistics, *excitation]

    def form(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        given: dict[str, Any] = {"training": True, "momentum": 0.1, "eps": 1e-5, "se_last": se_last}
        given |= {"se_activation": activation, "activation": activation}
        return lambda *tensors: function(*tensors[:6], se=tensors[6:] if se else None, **given)

    return KernelRow(
        variant(None, None, activation) + "+squeeze_excite" if se_last else variant(shortcut or None, se or None, activation),
        maps(uses), inputs,
        form(partial(residual_tail, backend="triton")), form(eager_residual_tail),
        # Statistics 1 read; result 1 read, 1 write. Backward: 2 reads, then 2 reads, 1 write. With a shortcut: one more read
        # forward, one more read and one more write backward; with squeeze-excitation last, one more read forward, two backward.
        forward_passes=4 if shortcut or se_last else 3, backward_passes=7 if shortcut or se_last else 5,
        same_algebra=form(partial(residual_tail, backend="fusable")),
    )  # fmt: skip


AUGMENTATION: dict[str, Any] = {"padding": 4, "reflect": False, "cutout": 8, "flip": "random"}
IMAGES = 50_000  # of the resident set, as CIFAR-10's


@cache
def resident_set(count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [N, 32, 32, 3], labels, sample indices, permutation: random. One for all calls, as training has one."""
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randint(256, (count, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator, device=device)
    labels = torch.randint(10, (count,), generator=generator, device=device)
    return images, labels, torch.arange(count, device=device), torch.randperm(count, generator=generator, device=device)


def augment_inputs(shape: Shape, batch: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """The resident set, cursor, epoch and seed, mean and std, and an empty [B, 0] that says how many of which dtype to make.

    The generator's seed is the number of the batch in the set.
    """
    count, device = max(IMAGES, batch), generator.device
    scalars = (torch.tensor(value, device=device) for value in (generator.initial_seed() * batch % (count - batch + 1), 1, 0))
    constants = (torch.tensor(values, device=device) for values in (CIFAR10_MEAN, CIFAR10_STD))
    return [*resident_set(count, device), *scalars, *constants, torch.empty(batch, 0, dtype=dtype, device=device)]


def augment_ours(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    *given, like = tensors
    return augment_fused(*given, batch_size=len(like), dtype=like.dtype, **AUGMENTATION)


def augment_eager(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    images, labels, index, permutation, cursor, epoch, seed, mean, std, like = tensors
    positions = permutation[cursor + torch.arange(len(like), device=images.device)]
    return augment_torch(images, labels, index, positions, epoch, seed, mean=mean, std=std, dtype=like.dtype, **AUGMENTATION)


def augment_exact(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    """NumPy's pixels, on the inputs' device."""
    images, labels, index, permutation, cursor, epoch, seed, mean, std = (t.cpu().numpy() for t in tensors[:-1])
    positions, like = permutation[cursor : cursor + len(tensors[-1])], tensors[-1]
    x, own_labels = augment_numpy(images, labels, index, positions, int(epoch), int(seed), mean=mean, std=std, **AUGMENTATION)
    return torch.from_numpy(x).to(like), torch.from_numpy(own_labels).to(like.device)


KERNELS: dict[str, KernelRow] = {
    row.name: row
    for row in (
        KernelRow(
            "mish", maps(lambda arch, _: arch.activation is nn.Mish), lambda *of: [random_map(*of)],
            partial(mish, backend="triton"), eager_mish, forward_passes=2, backward_passes=3,
        ),
        KernelRow(  # forward: the squeeze reads, the scaling reads and writes; backward: g and x, then g and dx
            "squeeze_excite", maps(lambda arch, stage: stage in arch.se_stages), squeeze_excite_inputs,
            partial(squeeze_excite, backend="triton"), eager_squeeze_excite, forward_passes=3, backward_passes=4,
        ),
        tail_row("relu", shortcut=False, se=False),
        tail_row("mish", shortcut=False, se=False),
        tail_row("relu", shortcut=True, se=False),
        tail_row("relu", shortcut=True, se=True),
        tail_row("mish", shortcut=True, se=True, se_bias=True),
        tail_row("relu", shortcut=False, se=True, se_bias=True, se_last=True),
        KernelRow(  # the batch is written once; 3,072 bytes of an image are read
            "augment", ((3, SIDE, SIDE),), augment_inputs, augment_ours, augment_eager,
            forward_passes=1, backward_passes=0, exact=augment_exact, read_beside=3 * SIDE * SIDE,
        ),
    )
}  # fmt: skip

OURS, EAGER, COPY = "ours", "eager", "copy"


def forms_of(row: KernelRow) -> dict[str, Form]:
    """Every form of a kernel by name. Compiled ones are compiled at their first call; earlier shapes' are forgotten."""
    torch._dynamo.reset()
    compiled = partial(compiling.compiled, fullgraph=True)
    forms = {EAGER: row.eager, "compiled": compiled(row.eager), "compiled tuned": compiled(row.eager, "tuned")}
    if row.same_algebra is not None:
        forms["compiled same algebra"] = compiled(row.same_algebra)
    return forms | {OURS: row.ours}


# ---- What is checked before it is timed.

SLACK, FLOOR = 2.0, 4.0  # as tests/kernel_checks.py: times eager's error, and units in the last place forgiven
OTHERS_SLACK = 10.0  # of what PyTorch compiled: to see that it is no other function; one lost by chance would flatter ours
REORDERED = 1e-6  # a float32 gradient of few numbers, summed in another order
# Errors are pooled over up to so many sets of inputs. A gradient of few numbers, as of a small squeeze-excitation's weights, is
# off by what its few sums happen to round to: of 96 single draws 8 refused the tail with one, of 24 pools of four none.
DRAWS = 4


def check(row: KernelRow, name: str, form: Form, sets: Sequence[tuple[Inputs, Tensor]]) -> str | None:
    """Why a form is not to be timed, or None; ours is held to more than the others."""
    try:
        if row.exact is not None:
            return difference(form, row.exact, sets[0][0], equal=name == OURS)
        return disagreement(form, row.eager, sets[:DRAWS], SLACK if name == OURS else OTHERS_SLACK)
    except Exception as error:  # whatever a compiler or a kernel raises, the other forms are still worth timing
        return one_line(error)


def difference(form: Form, exact: Form, inputs: Inputs, *, equal: bool) -> str | None:
    """None when a form's results are the exact ones: equal, or within torch.testing's defaults; else where they are not.

    The second is for what PyTorch compiled, whose division is not rounded as IEEE's and which fuses products into sums.
    """
    tolerances: dict[str, Any] = {"rtol": 0, "atol": 0} if equal else {}
    for mine, expected in zip(tensors(form(*inputs)), tensors(exact(*inputs)), strict=True):
        try:
            torch.testing.assert_close(mine, expected, **tolerances)
        except AssertionError as error:  # its lines count and place the elements
            return one_line(error)
    return None


def disagreement(form: Form, eager: Form, sets: Sequence[tuple[Inputs, Tensor]], slack: float = SLACK) -> str | None:
    """None when result and gradients are over all the sets as near float64 as `slack` times eager's own error; else which."""

    def results(function: Form, inputs: Inputs, gradient: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
        leaves = clones(inputs, dtype)
        y = tensors(function(*leaves))[0]
        return [y.detach(), *torch.autograd.grad(y, wanting(leaves), gradient.to(y.dtype))]

    pooled: Tensor | float = 0.0  # [tensors, 3]: summed squares of our error, of eager's, and of what is exact
    for one in sets:
        ours, eagers, exacts = results(form, *one), results(eager, *one), results(eager, *one, torch.float64)
        triples = zip(ours, eagers, exacts, strict=True)
        rows = [torch.stack([(a.double() - c).norm(), (b.double() - c).norm(), c.norm()]) for a, b, c in triples]
        pooled = pooled + torch.stack(rows).square()
    assert isinstance(pooled, Tensor)
    for number, (mine, theirs, norms) in enumerate(zip(ours, eagers, pooled.sqrt().tolist(), strict=True)):
        off, eagers_off = (norm / max(norms[2], 1e-300) for norm in norms[:2])
        allowed = max(slack * eagers_off, FLOOR * torch.finfo(mine.dtype).eps / 2, REORDERED)
        if mine.dtype != theirs.dtype or not off <= allowed:
            what = f"gradient {number}" if number else "result"
            return f"{what}: error {off:.2g} against float64 in {mine.dtype}, eager's is {eagers_off:.2g} in {theirs.dtype}"
    return None


def tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A form's result, which may be one tensor or several."""
    return (result,) if isinstance(result, Tensor) else result


def wanting(inputs: Inputs) -> list[Tensor]:
    """The inputs that want a gradient."""
    return [t for t in inputs if t is not None and t.requires_grad]


def clones(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """Copies, since a form may move running statistics; in another dtype where one is given."""
    return [None if t is None else t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad) for t in inputs]


# ---- What is timed.

COLD_BYTES = 150e6


def captured(calls: Sequence[Callable[[], object]], *, keep: bool) -> Callable[[], float]:
    """A clock of all the calls at once, captured as one CUDA graph, between two events.

    keep: no call's results may take the memory of an earlier call's.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiling and autotuning must not first run in capture
            calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for call in calls:
            results = call()
            if keep:  # else the graph's pool gives the next call this memory, which is still in the cache
                kept.append(results)
            del results

    def seconds() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    return seconds


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes a call needs at its peak, beyond what was allocated before."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


def launches(call: Callable[[], object]) -> int | None:
    """Kernels, copies and fills of one call; None where nothing counts them."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profile.events() or ()) or None


@dataclass(frozen=True)
class Measurement:
    """One kernel on one feature map in one direction, cold or hot."""

    kernel: str
    shape: str  # CxHxW
    batch: int
    dtype: str
    direction: str  # of DIRECTIONS
    cache: str  # of CACHES
    seconds: dict[str, list[float]]  # of one call by each form, one entry a round, the same rounds for all
    bytes: int  # that our kernels read and write of whole feature maps
    copy_bytes: int  # that the copy reads and writes
    copy_seconds: list[float]
    refused: dict[str, str] = field(default_factory=dict)  # forms that failed their check, or did not run: why
    peak_memory: dict[str, int] = field(default_factory=dict)
    launches: dict[str, int | None] = field(default_factory=dict)

    @property
    def best_baseline(self) -> str | None:
        """The fastest form that is not ours, by its median."""
        others = {name: median(seconds) for name, seconds in self.seconds.items() if name != OURS}
        return min(others, key=lambda name: others[name]) if others else None

    @property
    def speedup(self) -> Ratio | None:
        """Time of the best baseline over ours."""
        if OURS not in self.seconds or self.best_baseline is None:
            return None
        return ratio(self.seconds[self.best_baseline], self.seconds[OURS])

    @property
    def won(self) -> bool:
        """Whether ours beat every form with an interval that excludes 1; over a form that did not run there is no win."""
        if self.refused or not self.seconds.keys() >= {OURS, EAGER}:
            return False
        lows = (ratio(seconds, self.seconds[OURS]).low for name, seconds in self.seconds.items() if name != OURS)
        return all(low is not None and low > 1 for low in lows)

    @property
    def share_of_copy(self) -> float | None:
        """Bytes over time, as a share of the copy's in the same rounds."""
        if OURS not in self.seconds:
            return None
        return (self.bytes / median(self.seconds[OURS])) / (self.copy_bytes / median(self.copy_seconds))

    def to_json(self) -> dict[str, Any]:
        """Every field, and the figures made of them."""
        spread = {name: [float(value) for value in np.percentile(times, [10, 50, 90])] for name, times in self.seconds.items()}
        made = {name: getattr(self, name) for name in ("best_baseline", "won", "share_of_copy")}
        return vars(self) | {"p10_p50_p90": spread, "speedup": self.speedup and vars(self.speedup)} | made


def measure(
    row: KernelRow, shape: Shape, forms: dict[str, Form], *, batch: int, dtype: torch.dtype, device: torch.device, rounds: int
) -> list[Measurement]:
    """Check and time a kernel on one map: each direction it has, cold and hot. What fails its check is not timed."""
    sets = input_sets(row, shape, batch, dtype, device)
    refused = {name: reason for name, form in forms.items() if (reason := check(row, name, form, sets))}
    copies: Work = {COPY: [partial(torch.empty_like(gradient).copy_, gradient) for _, gradient in sets]}
    map_bytes = sets[0][1].numel() * dtype.itemsize
    results = []
    for direction in DIRECTIONS if row.backward_passes else DIRECTIONS[:1]:
        calls: Work = {
            name: [partial(call, form, direction, *one) for one in sets] for name, form in forms.items() if name not in refused
        }
        costs = {"peak_memory": peak_memory, "launches": launches}
        counted: dict[str, Any] = {what: {name: cost(each[0]) for name, each in calls.items()} for what, cost in costs.items()}
        passes = row.forward_passes + (row.backward_passes if direction == "forward+backward" else 0)
        for state in CACHES:
            work = {name: each if state == "cold" else each[:1] * len(each) for name, each in (calls | copies).items()}
            seconds = timed(work, rounds, keep=state == "cold")
            results.append(
                Measurement(
                    row.name, shape_name(shape), batch, str(dtype).removeprefix("torch."), direction, state,
                    copy_seconds=seconds.pop(COPY), seconds=seconds, bytes=passes * map_bytes + batch * row.read_beside,
                    copy_bytes=2 * map_bytes, refused=refused, **counted,
                )
            )  # fmt: skip
    return results


def shape_name(shape: Shape) -> str:
    """CxHxW."""
    return "x".join(map(str, shape))


def input_sets(
    row: KernelRow, shape: Shape, batch: int, dtype: torch.dtype, device: torch.device
) -> list[tuple[Inputs, Tensor]]:
    """As many inputs, each with a gradient of the result, as their maps need to exceed COLD_BYTES together: 2 to 256."""
    map_bytes = batch * prod(shape) * dtype.itemsize
    sets = []
    for seed in range(min(max(ceil(COLD_BYTES / map_bytes) + 1, 2), 256)):
        # Not the process's generator, or a check would depend on what ran before.
        generator = torch.Generator(device).manual_seed(seed)
        inputs = row.inputs(shape, batch, dtype, generator)
        with torch.no_grad():
            y = tensors(row.eager(*clones(inputs)))[0]
        sets.append((inputs, torch.empty_like(y).normal_(generator=generator)))
    return sets


def call(form: Form, direction: str, inputs: Inputs, gradient: Tensor) -> object:
    """One forward pass without, or one with, the gradients of all inputs that want one: what a training step keeps of it."""
    if direction == "forward":
        with torch.no_grad():
            return form(*inputs)
    y = tensors(form(*inputs))[0]
    return y.detach(), *torch.autograd.grad(y, wanting(inputs), gradient)


def timed(work: Work, rounds: int, *, keep: bool) -> dict[str, list[float]]:
    """Seconds of one call by each form in each round, after two untimed rounds; keep: as `captured` says."""
    clocks = {name: captured(calls, keep=keep) for name, calls in work.items()}
    seconds, errors = take_turns(clocks, rounds=rounds, warmup=2)
    for error in errors.values():
        raise error
    return {name: [one / len(work[name]) for one in each] for name, each in seconds.items()}


# ---- The command.

CPU_PIPELINES = ("crop + flip (A, B, E)", "crop + flip + cutout 8")  # what the Triton kernel does
DROPOUT, PROBABILITY, DROPPED = (
    "dropout 0.17 (A) of 32x32x32, forward and backward",
    0.17,
    (32, 32, 32),
)  # its first stage's map
CHECKED = 512  # images compared with NumPy's before anything is timed


@dataclass(frozen=True)
class Options:
    """Time every fused kernel against eager and compiled PyTorch; on a machine without CUDA, the CPU's kernels."""

    kernels: tuple[str, ...] = tuple(KERNELS)  # which, by name
    shapes: tuple[str, ...] = ()  # which feature maps, as 48x32x32; default: all that the architectures have
    batch_size: int = 512  # images of a feature map, or of a batch on the CPU
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"  # of the feature maps; weights are float32
    rounds: int = 40  # timed turns of each form
    data: Path = Path("data/beton")  # folder with the betons, for the CPU's part
    out: Path | None = None  # JSON to write; default: print only

    def __post_init__(self) -> None:
        require(self, self.batch_size >= 1, "batch_size", "at least 1")
        require(self, self.rounds >= 30, "rounds", "at least 30")
        for name in self.kernels:
            if name not in KERNELS:
                raise unknown("kernel", name, KERNELS)
        known = {shape_name(shape) for name in self.kernels for shape in KERNELS[name].shapes}
        for shape in self.shapes:
            if shape not in known:
                raise unknown("map", shape, known)
        if not torch.cuda.is_available():
            given = {field.name for field in fields(self) if getattr(self, field.name) != field.default}
            if idle := sorted(given & {"kernels", "shapes", "dtype"}):
                raise InputError(f"{', '.join(idle)}: for the Triton kernels on a CUDA device, and there is none: leave it out")


def main() -> None:
    """Measure, print, write."""
    options = parse_arguments(Options, "python bench/kernel_latency.py")
    console = Console(soft_wrap=True, highlight=False)
    device = choose_device("auto")
    set_up_process(device, deterministic=False)
    facts = environment(device)
    if device.type == "cuda":
        measurements = gpu_part(options, device, console)
        results = {"kernels": [each.to_json() for each in measurements], "clocks_after": environment(device).get("clocks")}
    else:
        console.print("no CUDA device: the Triton kernels are not timed, what runs on the CPU follows")
        results = {"cpu": cpu_part(options, console)}
    if options.out is not None:
        write_json(options.out, results | facts)


def gpu_part(options: Options, device: torch.device, console: Console) -> list[Measurement]:
    """Measure the chosen kernels on the chosen feature maps, a table after each kernel."""
    settings: dict[str, Any] = {"batch": options.batch_size, "dtype": DTYPE_NAMES[options.dtype], "rounds": options.rounds}
    measurements = []
    for row in (KERNELS[name] for name in options.kernels):
        mine: list[Measurement] = []
        for shape in row.shapes:
            if not options.shapes or shape_name(shape) in options.shapes:
                mine += measure(row, shape, forms_of(row), device=device, **settings)
                torch.cuda.empty_cache()  # the graphs' pools
        refused = ((each.shape, form, reason) for each in mine for form, reason in each.refused.items())
        for name, form, reason in dict.fromkeys(refused):
            console.print(f"{row.name} {name}: {form} is not timed: {reason}", style="yellow")
        console.print(latency_table(mine))
        measurements += mine
    return measurements


def latency_table(measurements: list[Measurement]) -> Table:
    """A line for each map, direction and cache state; microseconds of one call, median and 10th to 90th percentile."""
    caption = (
        "one call, median of rounds (10-90 %); ratio: best baseline's time over ours, 95 % interval; green: beats every form"
    )
    left, right = ("kernel", "map", "direction", "cache"), ("ours us", "best baseline", "its us", "ratio", "of copy")
    columns = [Column(heading, no_wrap=True) for heading in left]
    columns += [Column(heading, justify="right", no_wrap=True) for heading in (*right, "launches", "peak MB")]
    table = Table(*columns, box=None, padding=(0, 1, 0, 0), pad_edge=False, caption=caption)

    def microseconds(seconds: list[float]) -> str:
        low, middle, high = np.percentile(seconds, [10, 50, 90]) * 1e6
        return f"{middle:.1f} ({low:.1f}-{high:.1f})"

    for each in measurements:
        pair = (OURS, each.best_baseline or "")
        ours, theirs = (microseconds(each.seconds[name]) if name in each.seconds else "-" for name in pair)
        share = "-" if each.share_of_copy is None else f"{each.share_of_copy:.0%}"
        launched = (str(each.launches.get(name) or "-") for name in pair)
        megabytes = (f"{each.peak_memory[name] / 1e6:.0f}" if name in each.peak_memory else "-" for name in pair)
        table.add_row(
            each.kernel, each.shape, each.direction, each.cache, ours, each.best_baseline or "-", theirs,
            str(each.speedup or "-"), share, " / ".join(launched), " / ".join(megabytes), style="green" if each.won else None,
        )  # fmt: skip
    return table


def cpu_part(options: Options, console: Console) -> dict[str, Any]:
    """Augmentation and dropout on the CPU: our loops beside those of others. Raises InputError where ours differ."""
    data = load_all(options.data, CPU)
    for name in CPU_PIPELINES:
        check_pixels(PIPELINES[name], data)
    sizes = options.batch_size, options.rounds
    rates = {name: pipeline(name, data, options.data, *sizes, console) for name in CPU_PIPELINES}
    return rates | {DROPOUT: dropout_rates(*sizes, console)}


def check_pixels(recipe: Augmentation, data: Splits) -> None:
    """Raise InputError unless both forms that are timed show NumPy's pixels and labels, into new memory and into used."""
    positions, mean, std = torch.arange(min(CHECKED, len(data.train))), data.mean, data.std
    train = data.train.subset(positions)
    assert isinstance(train, ResidentSet)
    images, labels, index = (tensor.numpy() for tensor in (train.images, train.labels, train.index))
    batch = None
    for epoch in range(2):  # the second overwrites the first
        expected = augment_numpy(
            images, labels, index, positions.numpy(), epoch, 0, mean=mean.numpy(), std=std.numpy(), flip=recipe.flip,
            padding=recipe.crop_padding, reflect=recipe.crop_mode == "reflect", cutout=recipe.cutout,
        )  # fmt: skip
        given = recipe, train, positions, augmentation.draw(recipe, train.index, 0, epoch), mean, std
        plain = augmentation.augment(*given, backend="torch")
        batch = augmentation.augment(*given, backend="numba", reuse=None if batch is None else batch[0])
        for name, found in (("PyTorch's form", plain), ("Numba's loop", batch)):
            if not all(torch.equal(ours, torch.from_numpy(theirs)) for ours, theirs in zip(found, expected, strict=True)):
                raise InputError(f"{name} does not show NumPy's pixels on this machine: not timed; please report it")


def dropout_rates(batch: int, rounds: int, console: Console) -> dict[str, Any]:
    """Time dropout's forms on a bfloat16 map, in turns. Raises InputError unless the loop's bits are the definition's."""
    generator = torch.Generator().manual_seed(0)
    x, gradient = (random_map(DROPPED, batch, torch.bfloat16, generator) for _ in range(2))
    keys = torch.arange(batch), torch.tensor(0)
    options: dict[str, Any] = {"probability": PROBABILITY, "layer": 0, "seed": 0}

    def definition(x: Tensor) -> Tensor:
        mask = eager_dropout.draw(*keys, prod(DROPPED), **options)
        return as_map(eager_dropout.apply(as_rows(x), mask, PROBABILITY), x)

    def row(name: str, note: str, form: Form) -> Loop:
        return Loop(name, name, note, batch, lambda _: partial(call, form, DIRECTIONS[1], [x], gradient.detach()))

    loops = [
        row("fastcifar", "drawn by sample; JIT not counted", lambda x: dropout(x, *keys, **options)),
        row("fastcifar in PyTorch", "the same bits, eager", definition),
        row("torch.nn.functional", "drawn by one generator, in one thread", partial(F.dropout, p=PROBABILITY)),
    ]
    ours, definitions = (cast(tuple[Tensor, ...], loop.build([])()) for loop in loops[:2])
    if not all(map(torch.equal, ours, definitions)):
        raise InputError("dropout's loop does not give its definition's bits on this machine: not timed; please report it")
    console.print(f"{DROPOUT}; batch {batch}, bfloat16")
    return time_rates(loops, rounds, console, {"times_pytorch": loops[-1].name})


if __name__ == "__main__":
    run_command(main)
