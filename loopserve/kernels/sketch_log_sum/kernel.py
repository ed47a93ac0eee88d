"""`sketch_log_sum` in Triton, and what `sketch_scores` shares with it: the logits of a tile of sketches, and their running log-sum.

How the work is cut: a program has one row, the query heads that read one list of one KV head (a KV head's G, or one), and one split of
the list, as in `paged_decode`; a second kernel adds the splits up, where there are several. How often lists are cut follows from shapes.

A block of signs is loaded as bytes, 16 a token at D 128. Plane p, the bits p of all bytes, becomes a tile of +1 and -1 in the query's
dtype, in which both are exact, and meets the queries' channels 8 c + p; the sum of these 8 products is the logit but for the scale, which
is multiplied in once a token. With queries in 16 bits they run on tensor cores; float32 queries are not rounded for it.

Bytes: D / 8 + 2 for each listed token, and 8 for its slot, 1 for `valid`, once a list. The sketches of a token's KV heads are one run in
memory, 128 bytes at Hkv 8, D 128, and a program uses its head's part of it; the grid puts the heads of a row side by side, so that the
line is still in L2 when they ask for theirs.

Rejected: one tile [tokens, D] of all signs, which the compiler takes through shared memory (823 instructions a warp for 64 tokens of D
128, where planes take 473), since planes alone are unpacked in the registers that the product reads; keys times scale in the tile, a
product a channel and a rounding that the contract does not have; a load for each channel's byte, which asks for each byte 8 times; a
table of each byte's 256 partial sums, which needs a gather within shared memory for each head; one program for all KV heads of a token,
which loads whole lines but leaves a row to few programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loopserve.kernels.sketch import KeySketch
from loopserve.kernels.tiles import (
    DOT_TILE_MIN,
    LOG2_E,
    Cut,
    Tile,
    dot,
    is_interpreted,
    nearest,
    num_multiprocessors,
    tile_size,
)

# By the head dim, padded to a power of two; smaller and larger ones take the nearest row. From arithmetic and from what the compiler says,
# no time measured yet. At D 128 the unpacking is what costs: 16,384 signs of a block of 128 tokens are 128 a thread. Triton 3.7 compiles
# the block for sm_90 to 735 instructions a warp, 72 to 91 registers a thread and no spill; blocks of 64 tokens take 473 each, of 256 tokens
# 147 registers. Slots are loaded before the sketches that they name, so it takes five stages to have the next block's sketches on their
# way while one is unpacked: two blocks of them, 10 KiB with all else, are in shared memory. Below D 128, where columns share a byte, the
# compiler does not load sketches ahead; other programs fill the wait.
TILES = {
    64: Tile(128, 4, 5),
    128: Tile(128, 4, 5),
    256: Tile(64, 4, 5),
}
PROGRAMS_PER_MULTIPROCESSOR = 5  # at 96 registers for each of 128 threads, 5 share the 65,536 registers

_LN_2: tl.constexpr = tl.constexpr(1 / LOG2_E)
_MERGE_TILE: tl.constexpr = tl.constexpr(128)  # splits that the merge reads at once


def cut_lists(query: Tensor, num_programs: int, list_len: int) -> tuple[Tile, Cut]:
    """How a program walks, and how lists are cut, for rows [R, H, D] whose uncut grid has `num_programs`."""
    tile = nearest(TILES, tile_size(query.shape[2]))
    programs_wanted = PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors(query.device)
    return tile, Cut.of(tile, list_len, num_programs=num_programs, programs_wanted=programs_wanted)


def plane_sizes(head_dim: int) -> dict[str, int]:
    """Bytes of signs are the columns of a tile, and its PLANES are their bits; where bytes are too few for `tl.dot`, columns share one."""
    columns = max(DOT_TILE_MIN, tile_size(head_dim) // 8)
    return {"COLUMNS": columns, "PLANES": tile_size(head_dim) // columns}


def sketch_log_sum(query: Tensor, sketch: KeySketch, slots: Tensor, valid: Tensor | None, *, scale: float) -> Tensor:
    """See the contract in `loopserve.kernels.sketch_log_sum`."""
    return log_sums(query, sketch, slots, valid, None, scale=scale)


def log_sums(
    query: Tensor, sketch: KeySketch, slots: Tensor, valid: Tensor | None, lengths: Tensor | None, *, scale: float
) -> Tensor:
    """As the contract of `sketch_log_sum`, where lists may also be 1 for all heads, and end after `lengths` int64 [R]."""
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads, num_lists, num_listed = sketch.signs.shape[1], slots.shape[1], slots.shape[2]
    assert query.stride(2) == sketch.signs.stride(2) == 1, "channels follow each other"
    output = torch.empty((num_rows, num_heads), dtype=torch.float32, device=query.device)
    if num_rows == 0:
        return output

    group = num_heads // num_kv_heads
    heads_per_program = 1 if num_lists == num_heads else group
    num_groups = num_heads // heads_per_program
    tile, cut = cut_lists(query, num_rows * num_groups, num_listed)
    is_cut = cut.num_splits > 1
    partial = torch.empty((num_rows, num_heads, cut.num_splits), device=query.device) if is_cut else output
    # Where something is absent, some other tensor stands in for its pointer, which the kernel does not use then.
    masks = slots if valid is None else valid.view(torch.uint8)
    _log_sum_of_split[(num_rows * num_groups, cut.num_splits)](
        query,
        sketch.signs,
        sketch.scales,
        slots,
        masks,
        slots if lengths is None else lengths,
        partial,
        scale * LOG2_E,
        num_listed,
        cut.split_len,
        *query.stride()[:2],
        *sketch.signs.stride()[:2],
        *sketch.scales.stride(),
        slots.stride(0),
        slots.stride(1) if num_lists > 1 else 0,  # one list serves all
        slots.stride(2),
        masks.stride(0),
        masks.stride(1) if num_lists > 1 else 0,
        masks.stride(2),
        1 if lengths is None else lengths.stride(0),
        NUM_HEADS=num_heads,
        GROUP=group,
        HEADS=heads_per_program,
        HEADS_TILE=tile_size(heads_per_program),
        BLOCK=tile.tokens,
        HAS_VALID=valid is not None,
        HAS_LENGTHS=lengths is not None,
        HEAD_DIM=head_dim,
        **plane_sizes(head_dim),
        INTERPRETED=is_interpreted(),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if is_cut:
        _log_sum_of_splits[(num_rows * num_heads,)](partial, output, cut.num_splits, num_warps=1)
    return output


# Not specialised: what changes as conversations grow, and where slices of a step's index tensors begin.
@triton.jit(
    do_not_specialize=[
        *("slots", "masks", "lengths", "num_listed", "split_len"),
        *("slots_row", "slots_list", "masks_row", "masks_list"),
    ],
)
def _log_sum_of_split(
    query,
    signs,
    scales,
    slots,
    masks,
    lengths,
    log_sums,
    scale_log2,
    num_listed,
    split_len,
    query_row,
    query_head,
    signs_slot,
    signs_head,
    scales_slot,
    scales_head,
    slots_row,
    slots_list,
    slots_entry,
    masks_row,
    masks_list,
    masks_entry,
    lengths_row,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    PLANES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One split of one list, for the HEADS heads of one row that read it. Arguments `x_y` are the strides of x along y, in elements."""
    row = (tl.program_id(0) // (NUM_HEADS // HEADS)).to(tl.int64)
    group = (tl.program_id(0) % (NUM_HEADS // HEADS)).to(tl.int64)
    split = tl.program_id(1)
    members = tl.arange(0, HEADS_TILE)
    heads = group * HEADS + members
    kv_head = group * HEADS // GROUP
    planes = load_planes(query + row * query_row + heads * query_head, members < HEADS, HEAD_DIM, COLUMNS, PLANES)
    largest = tl.full((HEADS_TILE,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS_TILE,), tl.float32)

    first = split * split_len
    end = tl.minimum(first + split_len, num_listed)
    if HAS_LENGTHS:
        end = tl.minimum(end, tl.load(lengths + row * lengths_row).to(tl.int32))
    for start in range(first, end, BLOCK):
        entries = start + tl.arange(0, BLOCK)
        is_read = entries < end
        entries = entries.to(tl.int64)
        if HAS_VALID:
            mask = tl.load(masks + row * masks_row + group * masks_list + entries * masks_entry, mask=is_read, other=0)
            is_read = is_read & (mask != 0)
        slot = tl.load(slots + row * slots_row + group * slots_list + entries * slots_entry, mask=is_read, other=0)
        logits = sketch_logits(
            planes,
            signs + slot * signs_slot + kv_head * signs_head,
            scales + slot * scales_slot + kv_head * scales_head,
            is_read,
            scale_log2,
            HEAD_DIM,
            COLUMNS,
            PLANES,
            INTERPRETED,
        )
        # The maximum may or may not ignore NaN; a NaN among the logits makes the sum NaN either way.
        new_largest = tl.maximum(largest, tl.max(logits, axis=1))
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        total = total * tl.exp2(largest - shift) + tl.sum(tl.exp2(logits - shift[:, None]), axis=1)
        largest = new_largest

    place = (row * NUM_HEADS + heads) * tl.num_programs(1) + split
    tl.store(log_sums + place, (largest + tl.log2(total)) * _LN_2, mask=members < HEADS)


@triton.jit(do_not_specialize=["num_splits"])
def _log_sum_of_splits(partial, output, num_splits):
    """One row and head: the logarithm of what its splits add up to."""
    place = tl.program_id(0).to(tl.int64)
    largest = tl.full((_MERGE_TILE,), float("-inf"), tl.float32)  # of every _MERGE_TILE-th split
    total = tl.zeros((_MERGE_TILE,), tl.float32)
    for start in range(0, num_splits, _MERGE_TILE):
        splits = start + tl.arange(0, _MERGE_TILE)
        log_sum = tl.load(partial + place * num_splits + splits, mask=splits < num_splits, other=float("-inf"))
        new_largest = tl.maximum(largest, log_sum)
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        total = total * tl.exp(largest - shift) + tl.exp(log_sum - shift)
        largest = new_largest
    top = tl.max(largest, axis=0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    tl.store(output + place, top + tl.log(tl.sum(total * tl.exp(largest - shift), axis=0)))


@triton.jit
def load_planes(heads, is_head, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, PLANES: tl.constexpr):
    """The queries at the pointers `heads`, as PLANES tiles [HEADS_TILE, COLUMNS]: column c of tile p is channel c * PLANES + p."""
    columns = tl.arange(0, COLUMNS)
    planes = ()
    for plane in tl.static_range(PLANES):
        channels = columns * PLANES + plane
        inside = is_head[:, None] & (channels < HEAD_DIM)[None, :]
        tile = tl.load(heads[:, None] + channels[None, :], mask=inside, other=0.0)
        planes = planes + (tile,)  # type: ignore[assignment]  # noqa: RUF005 - Triton compiles no unpacking
    return planes


@triton.jit
def sketch_logits(
    planes,
    signs,
    scales,
    is_read,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    PLANES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Logits to base 2, [HEADS_TILE, BLOCK], of `load_planes`' queries over the sketches at the pointers `signs` and `scales` [BLOCK].

    -inf where `is_read` is False. Bits beyond HEAD_DIM meet zeros in the queries.
    """
    columns = tl.arange(0, COLUMNS)
    packed = tl.load(
        signs[:, None] + (columns // (8 // PLANES))[None, :],
        mask=is_read[:, None] & (columns < (HEAD_DIM + PLANES - 1) // PLANES)[None, :],
        other=0,
    ).to(tl.uint16)  # [BLOCK, COLUMNS]
    if PLANES < 8:
        packed = packed >> (columns * PLANES % 8).to(tl.uint16)[None, :]
    logits = dot(planes[0], tl.trans(_plane_of_signs(packed, 0, planes[0].dtype)), INTERPRETED)
    for plane in tl.static_range(1, PLANES):
        logits += dot(planes[plane], tl.trans(_plane_of_signs(packed, plane, planes[0].dtype)), INTERPRETED)
    scale = tl.load(scales, mask=is_read, other=0.0).to(tl.float32) * scale_log2
    return tl.where(is_read[None, :], logits * scale[None, :], float("-inf"))


@triton.jit
def _plane_of_signs(packed, plane: tl.constexpr, dtype: tl.constexpr):
    """+1 where bit `plane` of a uint16 is set, else -1. In 16 bits: the bit, moved to where the sign is, turns -1 into +1."""
    # Not by returning early: what stands behind a return is compiled as well.
    if dtype == tl.float32:
        signs = tl.where((packed >> plane) & 1 != 0, 1.0, -1.0)
    else:
        minus_one: tl.constexpr = 0xBF80 if dtype == tl.bfloat16 else 0xBC00
        signs = (((packed << (15 - plane)) & 0x8000) ^ minus_one).to(dtype, bitcast=True)
    return signs
