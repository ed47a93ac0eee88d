"""What Triton kernels share: products of tiles that are exact in their dtype, and sizes that compile. Knows no operation.

Everything here compiles for the device, or runs in Triton's interpreter on a CPU (`TRITON_INTERPRET=1`, set before Triton is imported).
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton import knobs

LOG2_E = 1.4426950408889634  # kernels take exp2, which is what the hardware has
DOT_TILE_MIN = 16  # `tl.dot` wants at least this many rows, columns and inner elements


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter. It multiplies the bits of bfloat16 as if they were integers: see `dot`."""
    return bool(knobs.runtime.interpret)


def tile_size(count: int, *, least: int = DOT_TILE_MIN) -> int:
    """The least power of two that holds `count`, and is at least `least`."""
    return max(least, int(triton.next_power_of_2(max(1, count))))


@triton.jit
def dot(a, b, UPCAST: tl.constexpr):
    """Product of tiles [M, K] and [K, N] in float32; float32 inputs are not rounded to TF32. UPCAST: `is_interpreted()`."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def cast(tile, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """Float32 `tile` in `dtype`, rounded to nearest. INTERPRETED: `is_interpreted()`; Triton's interpreter cuts bits off for bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = tile.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        tile = tl.where(tile == tile, bits.to(tl.float32, bitcast=True), tile)
    return tile.to(dtype)


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Of a CUDA device. Of a CPU, where nothing runs at once: enough that work is cut in the interpreter as it is on a device."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 4


class Tile(NamedTuple):
    """How a program walks over a list."""

    tokens: int  # of a block
    num_warps: int
    num_stages: int


class Cut(NamedTuple):
    """How lists are cut for a grid of one program a row and list: shapes alone say it, so a CUDA graph may hold the launch."""

    split_len: int  # tokens that a program reads, a multiple of a block's
    num_splits: int

    @classmethod
    def of(cls, tile: Tile, list_len: int, *, num_programs: int, programs_wanted: int) -> "Cut":
        """Into as many parts, of whole blocks, as give the grid `programs_wanted`, if blocks suffice; uncut it has `num_programs`."""
        num_blocks = int(triton.cdiv(list_len, tile.tokens))
        wanted = max(1, min(num_blocks, programs_wanted // num_programs))
        split_len = max(1, -(-num_blocks // wanted)) * tile.tokens
        return cls(split_len, max(1, int(triton.cdiv(list_len, split_len))))


def nearest(table: Mapping[int, Tile], size: int) -> Tile:
    """The row for a size; smaller and larger ones take the first and the last."""
    return table[min(max(size, min(table)), max(table))]


@triton.jit
def gather_rows(pool, slots, readable, pool_slot, HEAD_DIM: tl.constexpr, DIM_TILE: tl.constexpr):
    """One KV head's rows of `pool` at int64 `slots` [n]: [n, DIM_TILE]; zeros, and nothing read, where not `readable` [n]."""
    dims = tl.arange(0, DIM_TILE)
    inside = readable[:, None] & (dims < HEAD_DIM)[None, :]
    return tl.load(pool + slots[:, None] * pool_slot + dims[None, :], mask=inside, other=0.0)
