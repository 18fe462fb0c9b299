"""`python -m kernels.inspect`: registers, spills and instructions of every Triton kernel, compiled for sm_90. No GPU needed.

Each operation of the table runs once on tensors without data, and its launches are recorded instead of launched: what is
inspected is what training launches. Triton compiles them for a target it does not have (H100, H200), its own ptxas reports
registers and spills, and its cuobjdump the machine code. Instructions are counted as they stand in the code, loops once, and
divided by the elements a program holds at once: what a straight kernel executes per element, and for one with loops a figure to
watch. Where there is no cuobjdump the instructions are PTX's. The command fails when a kernel spills or passes its ceiling, so
that CI shows it; where nothing can be compiled, or no kernel has the name asked for, one line says so.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

CAPABILITY = 90
BATCH = 512
META = torch.device("meta")  # tensors without data
DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int64: "i64", torch.uint8: "u8"}
SASS_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[\dT]\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
PTX_LINE = re.compile(r"^\s+(?:@!?%p\d+\s+)?([a-z][a-z0-9]*\.[a-z0-9_.:]+|ret|bra)\b.*;", re.MULTILINE)


# Operations: a training step's launches, forward and backward, at one shape


def mish(dtype: torch.dtype) -> None:
    from kernels.mish import triton

    x = torch.empty(BATCH, 256, 8, 8, dtype=dtype, device=META)
    triton.forward(x, torch.empty_like(x))
    triton.backward(x, x, torch.empty_like(x))


def squeeze_excite(dtype: torch.dtype, channels: int, side: int, units: int, activation: str, layout: str = "NHWC") -> None:
    """With biases, and two gradients of the result."""
    from kernels.squeeze_excite import triton

    memory_format = torch.contiguous_format if layout == "NCHW" else torch.channels_last
    x = torch.empty(BATCH, channels, side, side, dtype=dtype, device=META).contiguous(memory_format=memory_format)
    w_reduce, w_expand, b_reduce, b_expand = linear_layers(channels, units)
    _, _, hidden, scale = triton.forward(x, w_reduce, w_expand, b_reduce, b_expand, activation)
    triton.backward(x, x, hidden, scale, w_reduce, w_expand, activation, x)


def residual_tail(
    dtype: torch.dtype,
    channels: int,
    side: int,
    units: int,
    activation: str,
    shortcut: bool,
    biases: bool,
    *,
    alone: bool = True,
    se_last: bool = False,
) -> None:
    """With squeeze-excitation if it has units; its activation is the tail's own. alone: without what may stand next to it."""
    from kernels.residual_tail import triton
    from kernels.residual_tail.fusable import ALONE, Settings, Tensors

    x = torch.empty(BATCH, channels, side, side, dtype=dtype, device=META).contiguous(memory_format=torch.channels_last)
    weight = torch.empty(channels, device=META)
    addend, total, factor = (None, None, None) if alone else (x, torch.empty_like(x), torch.empty(BATCH, 1, 1, 1, device=META))
    image_mean, mean, variance = triton.statistics(x, weight, weight, 0.1, units > 0 and not se_last, addend, total, factor)
    w_reduce, w_expand, b_reduce, b_expand = linear_layers(channels, units)
    tensors = Tensors(x, x if shortcut else None, weight, weight, None, None, None, None, None, mean, variance)
    if units:
        tensors = tensors._replace(w_reduce=w_reduce, w_expand=w_expand, image_mean=image_mean)
    if biases:
        tensors = tensors._replace(b_reduce=b_reduce, b_expand=b_expand)
    settings = Settings(True, 1e-5, activation, activation, se_last)
    neighbours = ALONE if alone else neighbours_of(x, weight if shortcut else None)
    neighbours = neighbours._replace(second=x, elsewhere=x) if se_last else neighbours
    _, scale, hidden = triton.apply(tensors, settings, neighbours)
    triton.gradients(x, tensors._replace(scale=scale, hidden=hidden), settings, neighbours)


def neighbours_of(x: torch.Tensor, vector: torch.Tensor | None) -> Any:
    """All of a tail's; vector: of the shortcut's own BN."""
    from kernels.residual_tail.fusable import Neighbours

    return Neighbours(torch.empty_like(x, dtype=torch.bool), 0.9, *(vector,) * 4, x, x)


def residual_tail_and_neighbours(dtype: torch.dtype, *arguments: Any) -> None:
    """Of a sum with stochastic depth that is used elsewhere, and behind it dropout and two uses of the result."""
    residual_tail(dtype, *arguments, alone=False)


def residual_tail_se_last(dtype: torch.dtype, channels: int, side: int, units: int, activation: str) -> None:
    """BN, activation, squeeze-excitation with biases; two gradients of the result, and one of BN's input from elsewhere."""
    residual_tail(dtype, channels, side, units, activation, shortcut=False, biases=True, se_last=True)


def linear_layers(channels: int, units: int) -> list[torch.Tensor]:
    """Weights and biases of a squeeze-excitation."""
    return [torch.empty(shape, device=META) for shape in ((units, channels), (channels, units), (units,), (channels,))]


def augment(dtype: torch.dtype) -> None:
    """The usual crop, reflected, with flip and cutout."""
    from kernels.augment.triton import launch

    images = torch.empty(50_000, 32, 32, 3, dtype=torch.uint8, device=META)
    numbers, scalar = (torch.empty(shape, dtype=torch.int64, device=META) for shape in ((50_000,), ()))
    constants, out = torch.empty(3, device=META), torch.empty(BATCH, 32, 32, 3, dtype=dtype, device=META)
    tensors = (images, numbers, numbers, numbers, scalar, scalar, scalar, constants, constants, out, numbers[:BATCH])
    launch(*tensors, padding=4, reflect=True, flip=1, cutout=8)


@dataclass(frozen=True)
class Row:
    """An operation at a shape, and for each kernel it launches the ceilings: registers of a thread, instructions an element.

    A new kernel is a new row. Ceilings are the compiler's figures when the row was written plus a tenth: raise one only with
    a reason in the commit.
    """

    operation: Callable[..., None]
    arguments: tuple[Any, ...]  # behind the dtype: channels, side, and what else the operation takes
    ceilings: Mapping[str, tuple[int, float]]
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    elements: int = 0  # that a program holds at once; 0: the product of its first two block sizes

    @property
    def shape(self) -> str:
        """For names: ` 45x32x32 NHWC`."""
        if not self.arguments:
            return ""
        channels, side, *_, last = self.arguments
        layout = "" if isinstance(last, bool) else " NCHW" if last == "NCHW" else " NHWC"
        return f" {channels}x{side}x{side}{layout}"


ROWS = (
    Row(mish, (), {"forward": (36, 26), "backward": (40, 38)}, (torch.bfloat16, torch.float32)),
    Row(residual_tail, (256, 8, 16, "mish", True, True), {  # mish_se_resnet18
        "statistics": (106, 14), "batch": (99, 45), "tail": (71, 33), "sums": (141, 66), "map_gradient": (102, 15),
        "excite": (79, 25), "excite_gradient": (62, 15), "parameter_gradient": (141, 181),
    }),
    Row(residual_tail, (256, 4, 16, "relu", True, False), {  # se_resnet18
        "statistics": (71, 12), "batch": (99, 45), "tail": (70, 15), "sums": (71, 34), "map_gradient": (97, 15),
        "excite": (62, 19), "excite_gradient": (62, 11), "parameter_gradient": (122, 143),
    }),
    Row(residual_tail, (45, 32, 0, "relu", False, False), {  # light_resnet18_v2_45: its widest maps, then its widest layers
        "statistics": (106, 22), "batch": (141, 51), "tail": (61, 12), "sums": (124, 32), "map_gradient": (106, 16),
        "channel_gradient": (88, 30),
    }),
    Row(residual_tail, (340, 4, 0, "relu", False, False), {
        "statistics": (105, 13), "batch": (99, 46), "tail": (61, 12), "sums": (99, 28), "map_gradient": (106, 16),
        "channel_gradient": (71, 23),
    }),
    Row(residual_tail, (512, 4, 0, "relu", True, False), {  # resnet18
        "statistics": (106, 14), "batch": (99, 46), "tail": (73, 15), "sums": (132, 37), "map_gradient": (106, 14),
        "channel_gradient": (71, 23),
    }),
    Row(residual_tail_and_neighbours, (32, 32, 0, "relu", False, False), {  # robust_resnet64
        "statistics": (135, 42), "batch": (99, 45), "tail": (99, 20), "sums": (141, 61), "map_gradient": (156, 36),
        "channel_gradient": (71, 23),
    }),
    Row(residual_tail_and_neighbours, (256, 8, 16, "mish", True, True), {
        "statistics": (137, 21), "batch": (99, 45), "tail": (143, 43), "sums": (267, 100), "map_gradient": (148, 83),
        "excite": (79, 25), "excite_gradient": (62, 15), "parameter_gradient": (141, 181), "channel_gradient": (71, 23),
    }),
    # light_resnet18_v2_45: its activated inputs, and squeeze-excitation apart from them; then mish_se_resnet18, where dropout
    # keeps BN apart
    Row(residual_tail_se_last, (45, 32, 2, "relu"), {
        "statistics": (106, 22), "batch": (141, 51), "forward": (79, 54), "backward": (138, 101), "map_gradient": (139, 25),
        "parameter_gradient": (106, 163),
    }),
    Row(residual_tail_se_last, (340, 4, 21, "relu"), {
        "statistics": (105, 13), "batch": (99, 46), "forward": (105, 81), "backward": (131, 111), "map_gradient": (140, 31),
        "parameter_gradient": (141, 218),
    }),
    Row(squeeze_excite, (45, 32, 2, "relu"), {"forward": (44, 38), "backward": (71, 50)}),
    Row(squeeze_excite, (90, 16, 5, "relu"), {"forward": (85, 69), "backward": (71, 55)}),
    Row(squeeze_excite, (170, 8, 10, "relu"), {"forward": (51, 67), "backward": (70, 76)}),
    Row(squeeze_excite, (340, 4, 21, "relu"), {"forward": (70, 60), "backward": (82, 73)}),
    Row(squeeze_excite, (256, 8, 16, "mish"), {"forward": (55, 59), "backward": (115, 90)}),
    Row(squeeze_excite, (48, 32, 3, "mish", "NCHW"), {"forward": (44, 26), "backward": (68, 38)}),
    Row(augment, (), {"augment": (72, 62)}, (torch.bfloat16, torch.float32), elements=3 * 32 * 32),
)  # fmt: skip


# Recording, compiling, counting


@dataclass(frozen=True)
class Launch:
    """One specialisation of one kernel."""

    name: str
    dtype: str
    kernel: Any  # the @triton.jit function
    arguments: dict[str, Any]  # as launched: tensors, numbers, None, and the compile-time ones
    options: dict[str, Any]  # num_warps and what else the compiler is told
    elements: int  # that a program holds at once
    ceilings: tuple[int, float]


@dataclass(frozen=True)
class Options:
    """Compile every kernel for sm_90 and report what became of it."""

    json: bool = False  # print a list of objects instead of a table
    only: str = ""  # kernels whose name contains this


@dataclass(frozen=True)
class Report:
    """What the compiler made of one row in one dtype."""

    name: str
    dtype: str
    registers: int  # of a thread
    spilled_bytes: int  # stored and loaded again, of a thread
    shared_bytes: int  # of a program
    instructions: int
    per_element: float
    counted: str  # SASS or PTX
    registers_ceiling: int
    per_element_ceiling: float

    @property
    def regressed(self) -> bool:
        """Whether it spills or passes a ceiling; PTX is no measure of the ceiling on SASS."""
        dearer = self.counted == "SASS" and self.per_element > self.per_element_ceiling
        return self.spilled_bytes > 0 or self.registers > self.registers_ceiling or dearer


def main() -> None:
    """Print what was asked for; exit code 1 when a kernel regressed, 2 where none can be compiled or none was chosen."""
    options = parse(sys.argv[1:])
    every = launches()
    chosen = [launch for launch in every if options.only in launch.name]
    if not chosen:
        operations = ", ".join(dict.fromkeys(launch.name.split()[0] for launch in every))
        fail(f"only: no kernel has {options.only!r} in its name; they are of {operations}")
    reports = [inspect(launch) for launch in chosen]
    if options.json:
        print(json.dumps([asdict(report) for report in reports], indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else 120).print(table(reports))  # a log has no width of its own
    sys.exit(any(report.regressed for report in reports))


def parse(arguments: list[str]) -> Options:
    """The options; a mistake is one line and exit code 2, as everywhere. (kernels/ knows nothing of fastcifar's reader.)"""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            fail(f"{message[:400]}; python -m kernels.inspect --help lists all options")

    parser = Parser(prog="python -m kernels.inspect", description=Options.__doc__, allow_abbrev=False)
    parser.add_argument("--json", action=argparse.BooleanOptionalAction, default=False, help="print a list of objects")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    return Options(**vars(parser.parse_args(arguments)))


def fail(message: str) -> NoReturn:
    """Say what the user can do; exit code 2, for 1 means a regression."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def launches() -> list[Launch]:
    """Every launch of the table; one line and exit code 2 where nothing can be compiled."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        fail("TRITON_INTERPRET=1 leaves no kernel to compile: unset it")
    try:  # here, since Triton takes a while to import: not for --help
        from triton import knobs

        _ = knobs.nvidia.ptxas.path  # RuntimeError where there is none
    except (ImportError, RuntimeError) as error:
        fail(f"no kernel can be compiled here: {' '.join(str(error).split())}; install Triton with its ptxas (Linux)")
    return [launch for row in ROWS for dtype in row.dtypes for launch in recorded(row, dtype)]


def recorded(row: Row, dtype: torch.dtype) -> list[Launch]:
    """What the operation of `row` launches, in order."""
    from triton.runtime.jit import JITFunction

    found: list[Launch] = []

    def record(kernel: Any, *values: Any, grid: Any, warmup: bool, **named: Any) -> None:
        options = {name: named.pop(name) for name in list(named) if name not in kernel.arg_names}
        arguments = dict(zip(kernel.arg_names, values, strict=False)) | named
        blocks = [arguments[name] for name in kernel.arg_names if name.startswith("block")]
        kind = kernel.__name__.removesuffix("_kernel")
        name = row.operation.__name__ + (f" {kind}" if kind != row.operation.__name__ else "") + row.shape
        size = row.elements or prod(blocks[:2])
        found.append(Launch(name, DTYPES[dtype], kernel, arguments, options, size, row.ceilings[kind]))

    with mock.patch.object(JITFunction, "run", record):
        row.operation(dtype, *row.arguments)
    return found


def inspect(launch: Launch) -> Report:
    """Compile one launch and count."""
    compiled = compile_launch(launch)
    registers, spilled_bytes = resources(compiled.asm["ptx"])
    instructions, counted = count_instructions(compiled)
    per_element = round(instructions * launch.options["num_warps"] * 32 / launch.elements, 2)
    return Report(
        launch.name, launch.dtype, registers, spilled_bytes, compiled.metadata.shared, instructions, per_element, counted,
        *launch.ceilings,
    )  # fmt: skip


def compile_launch(launch: Launch) -> Any:
    """Triton's compiled kernel, specialised as its launch with aligned tensors would be."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: dict[tuple[int], list[list[object]]] = {}
    for position, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        whole = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
        aligned |= {(position,): [["tt.divisibility", 16]]} if whole else {}
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + DTYPES[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"
    source = ASTSource(launch.kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=launch.options)


def resources(ptx: str) -> tuple[int, int]:
    """Registers and spilled bytes of a thread, as ptxas states them."""
    from triton import knobs

    target = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={target[1]}", str(source), "-o", str(source) + ".cubin"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", text)
    assert registers is not None, text
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", text)
    return int(registers[1]), sum(map(int, spills))


def count_instructions(compiled: Any) -> tuple[int, str]:
    """Instructions of the machine code without its padding, or of PTX where nothing here can disassemble."""
    sass = disassemble(compiled.asm["cubin"])
    if sass is None:
        return len(PTX_LINE.findall(compiled.asm["ptx"])), "PTX"
    return sum(name != "NOP" for name in SASS_LINE.findall(sass)), "SASS"


def disassemble(cubin: bytes) -> str | None:
    """SASS, or None where Triton came without a working cuobjdump."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        try:
            command = [knobs.nvidia.cuobjdump.path, "--dump-sass", str(path)]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, RuntimeError, subprocess.SubprocessError):
            return None
    return text if SASS_LINE.search(text) else None


def table(reports: list[Report]) -> Table:
    """For people: a line for each kernel and dtype, what regressed in red."""
    result = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, caption=f"sm_{CAPABILITY}; in brackets: the ceiling")
    result.add_column("kernel", no_wrap=True)
    result.add_column("dtype", no_wrap=True)
    for heading in ("registers", "spilled B", "shared B", "instructions", "per element"):
        result.add_column(heading, justify="right", no_wrap=True)
    for report in reports:
        result.add_row(
            report.name, report.dtype, f"{report.registers} ({report.registers_ceiling})", str(report.spilled_bytes),
            str(report.shared_bytes), f"{report.instructions} {report.counted}",
            f"{report.per_element:.1f} ({report.per_element_ceiling:g})", style="red" if report.regressed else None,
        )  # fmt: skip
    return result


if __name__ == "__main__":
    main()
