"""The table of Triton kernels that `python -m kernels.inspect` compiles, with the ceilings that continuous integration holds.

A new kernel is a new row. Its signature names every run-time argument in Triton's notation, `T` standing for the row's dtypes;
`constants` the compile-time ones, None for an absent tensor. Ceilings are the compiler's figures when the row was written
plus a tenth: raise one only with a reason in the commit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kernels import (
    augment_triton,
    mish_triton,
    residual_tail_backward_triton,
    residual_tail_tiles,
    residual_tail_triton,
    squeeze_excite_triton,
)


@dataclass(frozen=True)
class Row:
    """One specialisation of one kernel."""

    name: str
    kernel: Any  # the @triton.jit function
    signature: Mapping[str, str]  # run-time arguments, e.g. {"x": "*T", "size": "i32"}
    constants: Mapping[str, Any]  # tl.constexpr arguments
    warps: int  # of a program
    elements: int  # of the map that one program holds at once: what instructions are divided by
    registers: int  # ceiling, of a thread
    instructions: float  # ceiling, per element
    dtypes: tuple[str, ...] = ("bf16", "fp32")
    unaligned: tuple[str, ...] = ()  # arguments not known to be multiples of 16
    fuses: bool = True  # whether multiply and add may become one rounding, as in the launch


def _squeeze_excite(
    channels: int, side: int, reduced: int, activation: str, ceilings: tuple[int, int, int, int], contiguous: bool = False
) -> list[Row]:
    """Forward, with biases, and backward at one shape; ceilings: registers and instructions of the one, then of the other."""
    sizes: dict[str, Any] = squeeze_excite_triton.blocks(channels, side * side, reduced, 2, contiguous)
    warps = sizes.pop("num_warps")
    shape = f"{channels}x{side}x{side} {'NCHW' if contiguous else 'NHWC'}"
    small = dict.fromkeys(("w_reduce", "w_expand", "hidden", "scale"), "*fp32")
    forward = {"x": "*T", "y": "*T", "squeezed": "*fp32"} | small
    backward = {"gradient": "*T", "x": "*T", "x_gradient": "*T"} | small
    backward |= dict.fromkeys(("logit_gradient", "hidden_gradient", "unit_activated"), "*fp32")
    elements = sizes["block_rows"] * sizes["block_lanes"]
    constants = sizes | {"activation": activation}
    return [
        Row(
            f"squeeze_excite forward {shape}", squeeze_excite_triton.forward_kernel,
            forward | {"b_reduce": "*fp32", "b_expand": "*fp32"}, constants, warps, elements, *ceilings[:2], dtypes=("bf16",),
        ),
        Row(
            f"squeeze_excite backward {shape}", squeeze_excite_triton.backward_kernel, backward,
            constants, warps, elements, *ceilings[2:], dtypes=("bf16",),
        ),
    ]  # fmt: skip


MAPS = ("x", "shortcut", "out", "gradient", "dz_out")
INTEGERS = ("rows", "positions", "groups", "images")
FLOATS = ("eps", "momentum", "per_position", "per_row")


def _residual_tail(
    channels: int,
    side: int,
    units: int,
    activation: str,
    shortcut: bool,
    biases: bool,
    ceilings: Mapping[str, tuple[int, float]],
) -> list[Row]:
    """The kernels of a training step's tail at batch 512, with squeeze-excitation if it has units; ceilings by kernel."""
    tiles, backward = residual_tail_tiles, residual_tail_backward_triton
    images, positions = 512, side * side
    group = positions if units else tiles.group_rows(channels, images * positions)
    grid, chunks, _ = residual_tail_triton.map_grid(images, channels, positions, units > 0)
    rows, sums = tiles.row_tile(channels, group), tiles.sums_tile(channels, group)
    groups, image = tiles.channel_block(images), tiles.image_tile(channels, max(units, 1))
    own: dict[str, Any] = {"channels": channels, "activation": activation, "group": group, "chunks": chunks, "units": units}
    own |= {"training": True} | ({} if shortcut else {"shortcut": None, "dz_out": None})
    own |= {} if units else {"scale": None, "d_squeezed": None}
    own |= {} if biases else dict.fromkeys(("b_reduce", "b_expand", "d_b_reduce", "d_b_expand"))
    kernels: dict[str, tuple[Any, residual_tail_tiles.Tile, dict[str, Any]]] = {
        "statistics": (residual_tail_triton.statistics_kernel, rows, {"block_rows": rows.rows}),
        "batch": (residual_tail_triton.batch_kernel, groups, {"block_groups": groups.rows}),
        "tail": (residual_tail_triton.tail_kernel, grid, {"block_rows": grid.rows}),
        "sums": (backward.sums_kernel, sums, {"block_rows": sums.rows}),
        "map_gradient": (
            backward.map_gradient_kernel, grid, {"block_rows": grid.rows} | ({"activation": "none"} if shortcut else {}),
        ),
    }  # fmt: skip
    if units:
        of_units = tiles.IMAGES_TILE
        kernels |= {
            "excite": (residual_tail_triton.excite_kernel, image, {"block_units": image.rows}),
            "excite_gradient": (backward.excite_gradient_kernel, image, {"block_units": image.rows}),
            "parameter_gradient": (
                backward.parameter_gradient_kernel, of_units, {"block_images": of_units.rows, "block_units": 16},
            ),
        }  # fmt: skip
    else:
        kernels |= {"channel_gradient": (backward.channel_gradient_kernel, groups, {"block_groups": groups.rows})}
    found = []
    for name, (kernel, tile, sizes) in kernels.items():
        constants = own | sizes | {"block_channels": tile.channels}
        constants = {name: constants[name] for name in kernel.arg_names if name in constants}
        types = dict.fromkeys(MAPS, "*T") | dict.fromkeys(INTEGERS, "i32") | dict.fromkeys(FLOATS, "fp32")
        signature = {name: types.get(name, "*fp32") for name in kernel.arg_names if name not in constants}
        title = f"residual_tail {name} {channels}x{side}x{side}"
        size = tile.rows * tile.channels
        found.append(Row(title, kernel, signature, constants, tile.warps, size, *ceilings[name], dtypes=("bf16",)))
    return found


ROWS: tuple[Row, ...] = (
    Row(
        "mish forward", mish_triton.forward_kernel, {"x_pointer": "*T", "y_pointer": "*T", "size": "i64"},
        {"block": mish_triton.BLOCK}, mish_triton.WARPS, mish_triton.BLOCK, 36, 26,
    ),
    Row(
        "mish backward", mish_triton.backward_kernel,
        {"gradient_pointer": "*T", "x_pointer": "*T", "result_pointer": "*T", "size": "i64"},
        {"block": mish_triton.BLOCK}, mish_triton.WARPS, mish_triton.BLOCK, 40, 38,
    ),
    *_residual_tail(  # mish_se_resnet18
        256, 8, 16, "mish", True, True,
        {
            "statistics": (125, 29), "batch": (99, 45), "tail": (71, 33), "sums": (141, 66), "map_gradient": (102, 15),
            "excite": (79, 25), "excite_gradient": (62, 15), "parameter_gradient": (141, 181),
        },
    ),
    *_residual_tail(  # se_resnet18
        256, 4, 16, "relu", True, False,
        {
            "statistics": (106, 25), "batch": (99, 45), "tail": (70, 15), "sums": (71, 34), "map_gradient": (97, 15),
            "excite": (62, 19), "excite_gradient": (62, 11), "parameter_gradient": (122, 143),
        },
    ),
    *_residual_tail(  # the light_resnet18 family's widest maps and widest layers
        45, 32, 0, "relu", False, False,
        {
            "statistics": (172, 43), "batch": (141, 51), "tail": (71, 18), "sums": (124, 30), "map_gradient": (106, 25),
            "channel_gradient": (88, 30),
        },
    ),
    *_residual_tail(
        340, 4, 0, "relu", False, False,
        {
            "statistics": (116, 26), "batch": (99, 46), "tail": (53, 12), "sums": (99, 28), "map_gradient": (88, 18),
            "channel_gradient": (71, 23),
        },
    ),
    *_residual_tail(  # resnet18
        512, 4, 0, "relu", True, False,
        {
            "statistics": (125, 28), "batch": (99, 46), "tail": (73, 15), "sums": (132, 37), "map_gradient": (88, 14),
            "channel_gradient": (71, 23),
        },
    ),
    *_squeeze_excite(45, 32, 2, "relu", (44, 38, 60, 42)),  # light_resnet18_v2_45, its activated inputs
    *_squeeze_excite(90, 16, 5, "relu", (85, 69, 60, 47)),
    *_squeeze_excite(170, 8, 10, "relu", (51, 67, 70, 76)),
    *_squeeze_excite(340, 4, 21, "relu", (70, 60, 71, 59)),
    *_squeeze_excite(256, 8, 16, "mish", (55, 59, 64, 67)),  # mish_se_resnet18, where dropout keeps the tail apart
    *_squeeze_excite(48, 32, 3, "mish", (44, 26, 52, 30), contiguous=True),
    Row(
        "augment crop flip cutout", augment_triton.augment_kernel,
        dict.fromkeys(("labels", "index", "permutation", "cursor", "epoch", "seed", "out_labels"), "*i64")
        | {"images": "*u8", "mean": "*fp32", "std": "*fp32", "out": "*T"},
        {"padding": 4, "reflect": True, "flip": 1, "cutout": 8}, augment_triton.WARPS, 3072, 72, 62,
        fuses=False,
    ),
)  # fmt: skip
