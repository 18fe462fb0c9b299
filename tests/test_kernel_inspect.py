"""What the compiler makes of every Triton kernel for sm_90: no spill, registers and instructions within the ceilings."""

import json
import re
import sys
from dataclasses import replace

import pytest

from kernels.inspect import SASS_LINE, Report, launches, table
from tests.conftest import assert_user_error, run_cli

COMPILING = {"TRITON_INTERPRET": "0"}
EVERY_TAIL = {"statistics", "batch", "tail", "sums", "map_gradient"}
EXCITING, PLAIN = {"excite", "excite_gradient", "parameter_gradient"}, {"channel_gradient"}  # with squeeze-excitation, without

GOOD = Report("k", "bf16", 32, 0, 0, 100, 12.5, "SASS", registers_ceiling=32, per_element_ceiling=12.5)


@pytest.mark.slow
def test_every_kernel_keeps_its_ceilings():
    process = run_cli("-m", "kernels.inspect", "--json", env=COMPILING)
    reports = [Report(**fields) for fields in json.loads(process.stdout)]
    assert {report.name.split()[0] for report in reports} >= {"mish", "residual_tail", "squeeze_excite", "augment"}
    tails = {tuple(report.name.split()[1:]) for report in reports if report.name.startswith("residual_tail ")}
    for shape, own in (
        ("256x8x8", EXCITING),
        ("256x4x4", EXCITING),
        ("45x32x32", PLAIN),
        ("340x4x4", PLAIN),
        ("512x4x4", PLAIN),
    ):
        assert {kernel for kernel, its_shape in tails if its_shape == shape} == EVERY_TAIL | own
    assert [report for report in reports if report.regressed] == []
    assert process.returncode == 0, process.stderr
    for report in reports:
        assert report.spilled_bytes == 0
        assert 8 <= report.registers <= 255
        assert report.instructions > 30
        assert report.per_element > 0


@pytest.mark.slow
def test_the_table_is_readable():
    process = run_cli("-m", "kernels.inspect", "--only", "mish forward", env=COMPILING)
    assert process.returncode == 0, process.stderr
    assert re.search(r"^mish forward +bf16 +\d+ \(\d+\) +0 ", process.stdout, re.MULTILINE), process.stdout
    assert "squeeze" not in process.stdout


@pytest.mark.slow
def test_an_unknown_name_is_refused_with_the_names_there_are():
    process = run_cli("-m", "kernels.inspect", "--only", "nosuchkernel", env=COMPILING)
    assert_user_error(process, "no kernel has 'nosuchkernel' in its name; they are of mish, residual_tail")


@pytest.mark.parametrize(
    ("interpret", "message"),
    [
        ("1", "TRITON_INTERPRET=1 leaves no kernel to compile: unset it"),
        ("0", "no kernel can be compiled here: import of triton halted"),
    ],
)
def test_where_nothing_is_compiled_one_line_says_so_and_it_is_no_regression(interpret, message, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(SystemExit, match="2"):
        launches()
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize("change", [{"registers": 33}, {"spilled_bytes": 4}, {"per_element": 12.6}])
def test_a_regression_is_seen(change):
    assert not GOOD.regressed
    assert replace(GOOD, **change).regressed
    assert table([replace(GOOD, **change)]).rows[0].style == "red"


def test_counts_in_ptx_are_not_held_against_ceilings_in_sass():
    assert not replace(GOOD, counted="PTX", per_element=20.0).regressed


def test_lines_of_machine_code():
    text = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                       /* 0x00000a00ff017b82 */
                                                                                /* 0x000e220000000800 */
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;             /* 0x0000000402048981 */
        /*0020*/             @UP1 ULDC.64 UR4, c[0x0][0x208] ;                  /* 0x0000820000047ab9 */
        /*0030*/                   NOP;                                         /* 0x0000000000007918 */
    """
    assert SASS_LINE.findall(text) == ["LDC", "LDG.E.128", "ULDC.64", "NOP"]
