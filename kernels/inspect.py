"""`python -m kernels.inspect`: the table of kernels enters; registers, spills and instructions of each leave. No GPU needed.

Triton compiles for a target it does not have (sm_90: H100, H200), its own ptxas reports registers and spills, and its
cuobjdump the machine code. Instructions are counted as they stand in the code, loops once, and divided by the elements a
thread holds at once: what a straight kernel executes per element, and for one with loops a figure to watch. Where there is no
cuobjdump the instructions are PTX's. The command fails when a kernel spills or passes its ceiling, so that CI shows it; where
nothing can be compiled, or no row has the name asked for, one line says so.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import tyro
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from kernels.inspected import Row

CAPABILITY = 90
SASS_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[\dT]\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
PTX_LINE = re.compile(r"^\s+(?:@!?%p\d+\s+)?([a-z][a-z0-9]*\.[a-z0-9_.:]+|ret|bra)\b.*;", re.MULTILINE)


@dataclass(frozen=True)
class Options:
    """Compile every kernel for sm_90 and report what became of it."""

    json: bool = False  # print a list of objects instead of a table
    only: str = ""  # rows whose name contains this


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
    options = tyro.cli(Options, prog="python -m kernels.inspect")
    rows = compilable()
    chosen = [row for row in rows if options.only in row.name]
    if not chosen:
        kernels = ", ".join(dict.fromkeys(row.name.split()[0] for row in rows))
        fail(f"only: no row has {options.only!r} in its name; they are of {kernels}")
    reports = inspected(chosen)
    if options.json:
        print(json.dumps([asdict(report) for report in reports], indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else 120).print(table(reports))  # a log has no width of its own
    sys.exit(any(report.regressed for report in reports))


def compilable() -> "tuple[Row, ...]":
    """The table of kernels; one line and exit code 2 where they cannot be compiled."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        fail("TRITON_INTERPRET=1 leaves no kernel to compile: unset it")
    try:  # here, since Triton takes a while to import: not for --help
        from triton import knobs

        from kernels.inspected import ROWS

        _ = knobs.nvidia.ptxas.path  # RuntimeError where there is none
    except (ImportError, RuntimeError) as error:
        fail(f"no kernel can be compiled here: {' '.join(str(error).split())}; install Triton with its ptxas (Linux)")
    return ROWS


def fail(message: str) -> NoReturn:
    """Say what the user can mend; exit code 2, for 1 means a regression."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def inspected(rows: "Iterable[Row]") -> list[Report]:
    """Compile each row in each of its dtypes."""
    return [inspect(row, dtype) for row in rows for dtype in row.dtypes]


def inspect(row: "Row", dtype: str) -> Report:
    """Compile one row in one dtype."""
    compiled = compile_row(row, dtype)
    usage = resources(compiled.asm["ptx"])
    instructions, counted = count_instructions(compiled)
    return Report(
        name=row.name,
        dtype=dtype,
        registers=usage["registers"],
        spilled_bytes=usage["spilled_bytes"],
        shared_bytes=compiled.metadata.shared,
        instructions=instructions,
        per_element=round(instructions * row.warps * 32 / row.elements, 2),
        counted=counted,
        registers_ceiling=row.registers,
        per_element_ceiling=row.instructions,
    )


def compile_row(row: "Row", dtype: str) -> Any:
    """Triton's compiled kernel, specialised as a launch with aligned tensors would be."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = row.kernel.arg_names
    unknown = (row.signature.keys() | row.constants.keys()) ^ set(names)
    if unknown:
        raise ValueError(f"{row.name}: signature and constants must name each argument of the kernel; check {sorted(unknown)}")
    signature = {name: row.signature.get(name, "constexpr").replace("T", dtype) for name in names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if name in row.signature and name not in row.unaligned and not row.signature[name].startswith("fp")
    }
    source = ASTSource(row.kernel, signature, dict(row.constants), aligned)
    options = {"num_warps": row.warps, "enable_fp_fusion": row.fuses}
    return triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=options)


def resources(ptx: str) -> dict[str, int]:
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
    return {"registers": int(registers[1]), "spilled_bytes": sum(map(int, spills))}


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
            report.name,
            report.dtype,
            f"{report.registers} ({report.registers_ceiling})",
            str(report.spilled_bytes),
            str(report.shared_bytes),
            f"{report.instructions} {report.counted}",
            f"{report.per_element:.1f} ({report.per_element_ceiling:g})",
            style="red" if report.regressed else None,
        )
    return result


if __name__ == "__main__":
    main()
