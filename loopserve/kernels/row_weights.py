"""Dense causal attention weights of a few rows over very many columns, summed by group of rows, in Triton.

The core of `line_scores` and `token_scores`. Columns are cut into blocks; a program holds the keys of one block of one KV head and meets
it with all rows of its G query heads.

    sort rows         rows by group, so that a tile of groups has its rows side by side                    (not for a single group)
    pass 1            logits of a block -> log of its sum of exponentials, per row and head
    merge             over the blocks -> log-sum per row and head
    pass 2            logits again -> exp(logit - log-sum), added up per group -> the result, each cell written once

Read: the keys once a pass, for all G heads; the rows' queries once a block and pass, from the L2 cache: 80 rows of 4 heads of 128 in 16
bits are 80 KiB, 2.5 times a block of 128 keys. Written: the result; between the passes 4 bytes for each block, row and head, 1/26 of the
keys' bytes for 80 rows. Nothing is added atomically, so the same call gives the same bits. Nothing waits for the device.

A row's group is found by a product with a matrix of ones, not by addressing: rows of a group meet in the accumulator of one program.
The matrix of ones is exact in bfloat16, and three bfloat16 hold the 24 bits of a float32 weight, so three products on tensor cores add
float32 weights in float32.

Rejected: writing the weights of pass 1 and scaling them later, [H, R, N] in float32, 5 times the keys' bytes for 80 rows; queries in
place and keys streaming by, which reads the keys once per tile of rows; a program a row and group, which cannot use tensor cores for
groups of a few rows; a float32 product for the groups, which runs outside the tensor cores; prefix sums along the rows, which cancel.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from loopserve.kernels.tiles import LOG2_E, dot, gather_rows, is_interpreted, tile_size


@dataclass(frozen=True, slots=True)
class _Sizes:
    """How one launch is cut."""

    columns: int  # keys that a program holds
    rows: int  # of a tile of queries in pass 1; pass 2 takes half as many
    num_warps: int
    num_stages: int  # tiles of queries under way


# By head dim and bytes of an element. From arithmetic and from what the compiler (Triton 3.7 for sm_90) reports; not measured yet. Shared
# memory: (columns + rows * stages) * D * bytes, for D 128 in 16 bits 32 + 2 * 16 = 64 KiB, so that 3 programs fit the 227 KiB of a Hopper
# multiprocessor. Registers: a tile of logits is columns * rows float32, here 64 a thread of 128, and pass 1 takes 122 in all. Adding up by
# group holds weights, their three parts and up to 32 groups: 246 with 4 warps, 122 with twice as many, which it has. float32 is
# multiplied outside the tensor cores, whose operands lie in registers: small tiles.
_SIZES = {
    (64, 2): _Sizes(columns=128, rows=64, num_warps=4, num_stages=3),
    (128, 2): _Sizes(columns=128, rows=64, num_warps=4, num_stages=2),
    (256, 2): _Sizes(columns=64, rows=64, num_warps=4, num_stages=2),
    (64, 4): _Sizes(columns=64, rows=32, num_warps=4, num_stages=1),
    (128, 4): _Sizes(columns=32, rows=32, num_warps=4, num_stages=1),
    (256, 4): _Sizes(columns=32, rows=32, num_warps=4, num_stages=1),
}
_GROUPS = 32  # that a program of pass 2 adds up at once, at most: the accumulator's other side
_SORT_TILE = 256  # rows that a program of the sort looks at, or elements that it copies, at a time
_MERGE_ROWS = 32  # a warp reads 128 bytes of a block's results
_MERGE_BLOCKS = 64  # times 32 rows are 16 registers a thread of 4 warps


def row_weights(
    query: Tensor,
    key_pool: Tensor,
    slots: Tensor,
    positions: Tensor,
    *,
    groups: Tensor | None,
    num_groups: int,
    scale: float,
) -> Tensor:
    """Softmax each row over its causal columns and add up the rows of each group: float32 [H, num_groups, N].

    Arguments as in `loopserve.kernels.line_scores`; the last dimension of query and keys is contiguous. `groups` None: all rows are of
    one group, and `num_groups` is 1.
    """
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads, num_columns = key_pool.shape[1], slots.shape[0]
    assert query.stride(2) == 1 and key_pool.stride(2) == 1, "the last dimension is contiguous"
    if num_rows == 0 or num_columns == 0 or num_groups == 0:
        return torch.zeros((num_heads, num_groups, num_columns), dtype=torch.float32, device=query.device)
    dim_tile = tile_size(head_dim)
    sizes = _SIZES[min(max(dim_tile, 64), 256), query.element_size()]
    heads_per_kv = num_heads // num_kv_heads
    rows_and_heads = num_rows * num_heads
    num_blocks = -(-num_columns // sizes.columns)
    group_tile = min(_GROUPS, tile_size(num_groups))
    if groups is None:
        positions = positions.contiguous()
    else:
        query, positions, row_groups, tile_starts = _sorted_rows(query, positions, groups, num_groups, group_tile)
    of_blocks = torch.empty((num_blocks, rows_and_heads), dtype=torch.float32, device=query.device)
    log_sums = torch.empty(rows_and_heads, dtype=torch.float32, device=query.device)  # [Hkv, R, G]
    weights = torch.empty((num_heads, num_groups, num_columns), dtype=torch.float32, device=query.device)
    keys_and_rows = (query, key_pool, slots, positions, log_sums)
    lengths = (num_rows, num_columns, scale * LOG2_E)
    strides = (query.stride(0), query.stride(1), key_pool.stride(0), key_pool.stride(1), slots.stride(0))
    shape = {
        "GQA": heads_per_kv,
        "HEAD_DIM": head_dim,
        "DIM_TILE": dim_tile,
        "COLUMN_TILE": sizes.columns,
        "INTERPRETED": is_interpreted(),
        "num_warps": sizes.num_warps,
        "num_stages": sizes.num_stages,
    }
    grid = (num_blocks, num_kv_heads)
    row_tile = min(sizes.rows, tile_size(num_rows * heads_per_kv))
    _log_sums_of_blocks[grid](
        query, key_pool, slots, positions, of_blocks, *lengths, *strides, ROW_TILE=row_tile, **shape
    )
    _merge_blocks[(-(-rows_and_heads // _MERGE_ROWS),)](
        of_blocks, log_sums, num_blocks, rows_and_heads, ROW_TILE=_MERGE_ROWS, BLOCK_TILE=_MERGE_BLOCKS, num_warps=4
    )
    row_tile = min(max(sizes.rows // 2, 16), tile_size(num_rows))
    if groups is None:
        _add_rows[grid](*keys_and_rows, weights, *lengths, *strides, ROW_TILE=row_tile, **shape)
    else:
        _add_groups[grid](
            *keys_and_rows,
            weights,
            row_groups,
            tile_starts,
            num_groups,
            *lengths,
            *strides,
            ROW_TILE=row_tile,
            GROUP_TILE=group_tile,
            **(shape | {"num_warps": 2 * sizes.num_warps}),
        )
    return weights


def _sorted_rows(
    query: Tensor, positions: Tensor, groups: Tensor, num_groups: int, group_tile: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows by ascending group: query [R, H, D], position and group int32 [R]; and where each tile of groups begins, int32 [tiles + 1]."""
    num_rows, num_heads, head_dim = query.shape
    num_tiles = -(-num_groups // group_tile)
    sorted_query = torch.empty((num_rows, num_heads, head_dim), dtype=query.dtype, device=query.device)
    sorted_positions, sorted_groups = torch.empty((2, num_rows), dtype=torch.int32, device=query.device)
    tile_starts = torch.empty(num_tiles + 1, dtype=torch.int32, device=query.device)
    _sort_rows[(max(num_rows, num_tiles + 1),)](
        query,
        positions,
        groups,
        sorted_query,
        sorted_positions,
        sorted_groups,
        tile_starts,
        num_rows,
        num_tiles,
        query.stride(0),
        query.stride(1),
        positions.stride(0),
        groups.stride(0),
        HEAD_DIM=head_dim,
        ROW_ELEMENTS=num_heads * head_dim,
        GROUP_TILE=group_tile,
        TILE=_SORT_TILE,
        num_warps=4,
    )
    return sorted_query, sorted_positions, sorted_groups, tile_starts


@triton.jit(do_not_specialize=["num_rows", "num_tiles"])
def _sort_rows(
    query,
    positions,
    groups,
    sorted_query,
    sorted_positions,
    sorted_groups,
    tile_starts,
    num_rows,
    num_tiles,
    query_row,
    query_head,
    positions_row,
    groups_row,
    HEAD_DIM: tl.constexpr,
    ROW_ELEMENTS: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Copy one row to its place, which is the number of rows before it; count the rows before one tile of groups.

    Arguments named `x_y` are the strides of x along y, in elements; so in all that follow.
    """
    index = tl.program_id(0)
    group = tl.load(groups + index.to(tl.int64) * groups_row, mask=index < num_rows, other=0)
    before_row = tl.zeros((TILE,), tl.int32)
    before_tile = tl.zeros((TILE,), tl.int32)
    for first in range(0, num_rows, TILE):
        others = first + tl.arange(0, TILE)
        exists = others < num_rows
        other_groups = tl.load(groups + others.to(tl.int64) * groups_row, mask=exists, other=0)
        is_before = (other_groups < group) | ((other_groups == group) & (others < index))
        before_row += (exists & is_before).to(tl.int32)
        before_tile += (exists & (other_groups < index * GROUP_TILE)).to(tl.int32)
    if index <= num_tiles:
        tl.store(tile_starts + index, tl.sum(before_tile, axis=0))
    if index < num_rows:
        place = tl.sum(before_row, axis=0)
        position = tl.load(positions + index.to(tl.int64) * positions_row)
        tl.store(sorted_positions + place, position.to(tl.int32))
        tl.store(sorted_groups + place, group.to(tl.int32))
        source = query + index.to(tl.int64) * query_row
        target = sorted_query + place.to(tl.int64) * ROW_ELEMENTS
        for first in range(0, ROW_ELEMENTS, TILE):
            elements = first + tl.arange(0, TILE)
            inside = elements < ROW_ELEMENTS
            heads = (elements // HEAD_DIM).to(tl.int64)
            numbers = tl.load(source + heads * query_head + elements % HEAD_DIM, mask=inside)
            tl.store(target + elements, numbers, mask=inside)


@triton.jit(do_not_specialize=["num_rows", "num_columns"])
def _log_sums_of_blocks(
    query,
    key_pool,
    slots,
    positions,
    of_blocks,
    num_rows,
    num_columns,
    scale_log2,
    query_row,
    query_head,
    key_pool_slot,
    key_pool_head,
    slots_column,
    GQA: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    COLUMN_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Pass 1: log2 of the sum of 2 ** logit over one block of columns, for all rows and heads of one KV head; -inf where it is hidden."""
    block = tl.program_id(0)
    kv_head = tl.program_id(1)
    columns, keys = _block_of_keys(
        key_pool,
        slots,
        block,
        kv_head,
        num_columns,
        key_pool_slot,
        key_pool_head,
        slots_column,
        HEAD_DIM,
        DIM_TILE,
        COLUMN_TILE,
    )
    keys = tl.trans(keys)  # [D, columns]
    dims = tl.arange(0, DIM_TILE)
    num_packed = num_rows * GQA  # a row's G heads follow each other
    results = of_blocks + (block.to(tl.int64) * tl.num_programs(1) + kv_head) * num_packed
    for first in range(0, num_packed, ROW_TILE):
        packed = first + tl.arange(0, ROW_TILE)
        exists = packed < num_packed
        rows = packed // GQA
        offsets = rows.to(tl.int64) * query_row + (kv_head * GQA + packed % GQA).to(tl.int64) * query_head
        tile = tl.load(
            query + offsets[:, None] + dims[None, :], mask=exists[:, None] & (dims < HEAD_DIM)[None, :], other=0.0
        )
        seen_until = tl.load(positions + rows, mask=exists, other=-1).to(tl.int32)
        logits = dot(tile, keys, INTERPRETED) * scale_log2  # [rows, columns]
        logits = tl.where(columns[None, :] <= seen_until[:, None], logits, float("-inf"))
        peak = tl.max(logits, axis=1)
        shift = tl.where(peak == float("-inf"), 0.0, peak)
        total = tl.sum(tl.exp2(logits - shift[:, None]), axis=1)
        log_sum = shift + tl.log2(tl.where(total == 0.0, 1.0, total))
        tl.store(results + packed, tl.where(total == 0.0, float("-inf"), log_sum), mask=exists)


@triton.jit(do_not_specialize=["num_blocks", "num_results"])
def _merge_blocks(of_blocks, log_sums, num_blocks, num_results, ROW_TILE: tl.constexpr, BLOCK_TILE: tl.constexpr):
    """Log2 of the sum of 2 ** `of_blocks` [blocks, results] over the blocks, in ascending order."""
    results = tl.program_id(0) * ROW_TILE + tl.arange(0, ROW_TILE)
    peak = tl.full((ROW_TILE,), float("-inf"), tl.float32)
    total = tl.zeros((ROW_TILE,), tl.float32)
    for first in range(0, num_blocks, BLOCK_TILE):
        blocks = first + tl.arange(0, BLOCK_TILE)
        exists = (blocks < num_blocks)[:, None] & (results < num_results)[None, :]
        offsets = blocks.to(tl.int64)[:, None] * num_results + results[None, :]
        logs = tl.load(of_blocks + offsets, mask=exists, other=float("-inf"))
        new_peak = tl.maximum(peak, tl.max(logs, axis=0))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total = total * tl.exp2(peak - shift) + tl.sum(tl.exp2(logs - shift[None, :]), axis=0)
        peak = new_peak
    log_sum = peak + tl.log2(tl.where(total == 0.0, 1.0, total))
    tl.store(log_sums + results, log_sum, mask=results < num_results)


@triton.jit(do_not_specialize=["num_rows", "num_columns"])
def _add_rows(
    query,
    key_pool,
    slots,
    positions,
    log_sums,
    weights,
    num_rows,
    num_columns,
    scale_log2,
    query_row,
    query_head,
    key_pool_slot,
    key_pool_head,
    slots_column,
    GQA: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    COLUMN_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Pass 2 for a single group: one block of columns of one KV head, added up over all rows, [H, N]."""
    kv_head = tl.program_id(1)
    columns, keys = _block_of_keys(
        key_pool,
        slots,
        tl.program_id(0),
        kv_head,
        num_columns,
        key_pool_slot,
        key_pool_head,
        slots_column,
        HEAD_DIM,
        DIM_TILE,
        COLUMN_TILE,
    )
    for sharer in range(GQA):
        head = kv_head * GQA + sharer
        sums = tl.zeros((COLUMN_TILE,), tl.float32)
        for first in range(0, num_rows, ROW_TILE):
            of_rows, _ = _weights(
                keys,
                columns,
                query + head.to(tl.int64) * query_head,
                positions,
                log_sums + kv_head.to(tl.int64) * num_rows * GQA + sharer,
                first,
                num_rows,
                scale_log2,
                query_row,
                GQA,
                HEAD_DIM,
                DIM_TILE,
                ROW_TILE,
                INTERPRETED,
            )
            sums += tl.sum(of_rows, axis=1)
        tl.store(weights + head.to(tl.int64) * num_columns + columns, sums, mask=columns < num_columns)


@triton.jit(do_not_specialize=["num_groups", "num_rows", "num_columns"])
def _add_groups(
    query,
    key_pool,
    slots,
    positions,
    log_sums,
    weights,
    row_groups,
    tile_starts,
    num_groups,
    num_rows,
    num_columns,
    scale_log2,
    query_row,
    query_head,
    key_pool_slot,
    key_pool_head,
    slots_column,
    GQA: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    COLUMN_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Pass 2: one block of columns of one KV head, added up by group over sorted rows, [H, num_groups, N]."""
    kv_head = tl.program_id(1)
    columns, keys = _block_of_keys(
        key_pool,
        slots,
        tl.program_id(0),
        kv_head,
        num_columns,
        key_pool_slot,
        key_pool_head,
        slots_column,
        HEAD_DIM,
        DIM_TILE,
        COLUMN_TILE,
    )
    for sharer in range(GQA):
        head = kv_head * GQA + sharer
        for group_block in range(0, tl.cdiv(num_groups, GROUP_TILE)):
            groups = group_block * GROUP_TILE + tl.arange(0, GROUP_TILE)
            sums = tl.zeros((COLUMN_TILE, GROUP_TILE), tl.float32)
            num_broken = tl.zeros((GROUP_TILE,), tl.int32)
            last = tl.load(tile_starts + group_block + 1)
            for first in range(tl.load(tile_starts + group_block), last, ROW_TILE):
                of_rows, finite = _weights(
                    keys,
                    columns,
                    query + head.to(tl.int64) * query_head,
                    positions,
                    log_sums + kv_head.to(tl.int64) * num_rows * GQA + sharer,
                    first,
                    last,
                    scale_log2,
                    query_row,
                    GQA,
                    HEAD_DIM,
                    DIM_TILE,
                    ROW_TILE,
                    INTERPRETED,
                )
                rows = first + tl.arange(0, ROW_TILE)
                of_group = tl.load(row_groups + rows, mask=rows < last, other=-1)
                is_member = of_group[:, None] == groups[None, :]  # [rows, groups]
                # 0 times NaN is NaN: a row without finite weights stays out of the product, and spoils its own group below.
                of_rows = tl.where(finite[None, :], of_rows, 0.0)
                num_broken += tl.sum((is_member & (finite == 0)[:, None]).to(tl.int32), axis=0)
                ones = is_member.to(tl.float32).to(tl.bfloat16)  # the interpreter would take an integer for the bits
                high = of_rows.to(tl.bfloat16)
                rest = of_rows - high.to(tl.float32)
                middle = rest.to(tl.bfloat16)
                low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
                sums += dot(low, ones, INTERPRETED)
                sums += dot(middle, ones, INTERPRETED)
                sums += dot(high, ones, INTERPRETED)
            sums = tl.where(num_broken[None, :] > 0, float("nan"), sums)
            offsets = (head.to(tl.int64) * num_groups + groups) * num_columns
            tl.store(
                weights + offsets[None, :] + columns[:, None],
                sums,
                mask=(columns < num_columns)[:, None] & (groups < num_groups)[None, :],
            )


@triton.jit
def _block_of_keys(
    key_pool,
    slots,
    block,
    kv_head,
    num_columns,
    key_pool_slot,
    key_pool_head,
    slots_column,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    COLUMN_TILE: tl.constexpr,
):
    """Column numbers int32 [columns] of one block, and their keys [columns, D] in one KV head; zeros past the last column."""
    columns = block * COLUMN_TILE + tl.arange(0, COLUMN_TILE)
    exists = columns < num_columns
    block_slots = tl.load(slots + columns.to(tl.int64) * slots_column, mask=exists, other=0)
    of_head = key_pool + kv_head.to(tl.int64) * key_pool_head
    return columns, gather_rows(of_head, block_slots, exists, key_pool_slot, HEAD_DIM, DIM_TILE)


@triton.jit
def _weights(
    keys,
    columns,
    query,
    positions,
    log_sums,
    first,
    last,
    scale_log2,
    query_row,
    GQA: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Weights [columns, rows] of one head's rows from `first` on, zeros from row `last` on; and whether a row's are finite, bool [rows].

    Columns come first, because there are enough of them to fill the larger side of a tensor core's product.
    """
    rows = first + tl.arange(0, ROW_TILE)
    exists = rows < last
    dims = tl.arange(0, DIM_TILE)
    offsets = rows.to(tl.int64)[:, None] * query_row + dims[None, :]
    tile = tl.load(query + offsets, mask=exists[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    seen_until = tl.load(positions + rows, mask=exists, other=-1).to(tl.int32)
    log_sum = tl.load(log_sums + rows.to(tl.int64) * GQA, mask=exists, other=0.0)
    logits = dot(keys, tl.trans(tile), INTERPRETED) * scale_log2
    logits = tl.where(columns[:, None] <= seen_until[None, :], logits, float("-inf"))
    return tl.exp2(logits - log_sum[None, :]), tl.abs(log_sum) < float("inf")
