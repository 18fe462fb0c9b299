"""How the kernels of the residual tail cut a map up: rows and channels of a tile, warps, groups of rows.

Chosen by arithmetic, not by autotuning, so that a captured step meets nothing new. A thread has 32 elements of a map, which
are four 16-byte loads of bf16 in flight.
"""

from dataclasses import dataclass, replace
from math import gcd

PROGRAMS = 1024  # enough to fill 132 multiprocessors with eight programs each
ACCESS = 16  # bytes of the widest


@dataclass(frozen=True)
class Tile:
    """What one program holds at a time."""

    rows: int
    channels: int
    per_thread: int = 32  # elements
    together: int = 1  # positions of a row

    @property
    def warps(self) -> int:
        return min(max(self.rows * self.channels // (32 * self.per_thread), 1), 8)

    def sizes(self, rows: str = "rows") -> dict[str, int]:
        """As kernels take them; `rows` is their name for what else a tile has than channels."""
        return {f"block_{rows}": self.rows, "block_channels": self.channels, "num_warps": self.warps}


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def row_tile(channels: int, rows: int, largest: int = 8192, per_thread: int = 32) -> Tile:
    """A tile of a map's rows [rows, channels] of at most `largest` elements.

    The channels' side is the widest of 128, 64 and 32 that leaves at most a fifth of its lanes idle; where each leaves more,
    whichever leaves fewest.
    """
    padded = {side: -(-channels // side) * side for side in (128, 64, 32)}
    fitting = [side for side in padded if padded[side] <= 1.2 * channels]
    side = min(fitting[0] if fitting else min(padded, key=lambda side: padded[side]), power_of_two(channels))
    return Tile(min(power_of_two(rows), largest // side), side, per_thread)


def together(channels: int, element_size: int, *rows: int, access: int = ACCESS) -> int:
    """How many positions to read as one row for wide accesses at any C: 8 at 45 in bf16; 1 where `rows` are no multiple."""
    found = access // gcd(access, channels * element_size)
    return found if all(each % found == 0 for each in rows) else 1


def folded(tile: Tile, channels: int, element_size: int, *rows: int) -> Tile:
    """The tile with several positions a row, for sums, where it holds all of one; half as many, for theirs are added up."""
    found = together(channels, element_size, *rows, access=ACCESS // 2)
    fits = tile.channels >= channels and tile.rows >= found
    return replace(tile, rows=tile.rows // found, channels=tile.channels * found, together=found) if fits else tile


def statistics_tile(channels: int, group: int) -> Tile:
    """For the statistics of groups: where one tile is a group, its three sums across threads weigh less with more in each."""
    tile = row_tile(channels, group)
    return tile if tile.rows < group else row_tile(channels, group, per_thread=64)


def sums_tile(channels: int, rows: int) -> Tile:
    """For the gradient's sums, which hold four maps and two sums at a time: half as many elements a thread."""
    return row_tile(channels, rows, largest=2048, per_thread=16)


def group_rows(channels: int, rows: int) -> int:
    """Rows of a group where groups need not be images: at least a tile, a power of two so that few kernels are compiled."""
    tile = row_tile(channels, rows)
    blocks = -(-channels // tile.channels)
    return max(tile.rows, power_of_two(-(-rows * blocks // PROGRAMS)))


def channel_block(groups: int) -> Tile:
    """For what merges [groups, C]: few channels a program, for there are few programs; 16 floats are a 64-byte access."""
    return Tile(min(power_of_two(groups), 256), 16, per_thread=16)


def image_tile(channels: int, units: int) -> Tile:
    """For an image's linear layers: all channels, and as many hidden units as fit."""
    side = power_of_two(channels)
    return Tile(min(power_of_two(units), max(8192 // side, 1)), side)


IMAGES_TILE = Tile(64, 16, per_thread=8)  # for sums over images of products [C, units], in which tl.dot wants 16 at least
