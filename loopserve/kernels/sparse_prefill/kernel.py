"""`sparse_prefill` in Triton: lists of what each tile of rows reads, made on the device, then attention along those lists.

    count, list lines     chosen tile-diagonals, then chosen verticals of each head, ascending; how many exist for each query tile
    attend on lines       a program a (tile of rows, query head, split of its list): blocks of slash tiles, then of gathered verticals
    attend on all         the chunk's dense last rows: a program a (tile of rows of G heads, KV head, split of the context)
    merge splits          of either; not launched where no list can be split

Read: queries once. Keys and values once for each query head and tile of rows that reads them: 32 KiB a block of 64 columns of 128 in
16 bits, for 64 * 64 * 4 * 128 operations, which is 64 operations a byte, so most of it has to come from the L2 cache. Therefore programs
of neighbouring tiles and of the heads that share a KV head stand next to each other in the grid: on the same diagonals they read the same
keys a moment apart. The dense rows read the context once for 64 packed rows, here for all 16 rows of all G = 4 heads.
The flags of lines are read twice, a byte each; a list entry is 4 bytes, written and read once a query tile.

A list is split evenly into as many parts as make the grid large, each of at least `_SPLIT_BLOCKS` blocks: else a dense head beside sparse
ones would still run when all others are done. What the host knows bounds the number of parts, what the device counted sets it;
programs past it exit at once. Parts meet in float32 by their log-sums, in ascending order, so the same call gives the same bits.

A vertical inside a chosen tile of this query tile was read there: it is masked in its list, and not loaded.

Rejected: one list of columns a query tile, slash and vertical alike, which costs a sort and 4 bytes for every column read; query heads of
a KV head packed into one tile of rows, since each chooses its own lines; one part a list, for its tail; parts of a fixed length, whose
number, and the room for their results, the host could bound only by that of a dense head for every head; persistent programs fed from a
queue, which an even split makes needless; atomics for the merge, which would not repeat their bits.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from loopserve.kernels.tiles import LOG2_E, cast, dot, gather_rows, is_interpreted, tile_size


@dataclass(frozen=True, slots=True)
class _Sizes:
    """How attention is cut."""

    rows: int  # queries that a program holds
    keys: int  # of a block
    num_warps: int
    num_stages: int  # of the pipeline that loads blocks


# By head dim and bytes of an element. From arithmetic and from what the compiler (Triton 3.7 for sm_90) reports; not measured yet. Rows are
# 64 because a tile is 64 tokens unless it is set otherwise, and one warp group multiplies 64 rows at a time. Shared memory, for D 128 in
# 16 bits: queries 16 KiB and 3 blocks of keys and values of 32 KiB, so that 2 programs just fit the 228 KiB of a Hopper multiprocessor.
# Stages are 5, because two of them go to the slots that keys are loaded by: with 3 or 4 the compiler asks for a block just before it
# waits for it. Registers: the output is rows * D float32 and the logits rows * keys, 64 and 32 a thread of 128; 254 in all, and 16 bits
# spill none at any head dim here. float32 is multiplied outside the tensor cores, whose operands lie in registers: small tiles.
_SIZES = {
    (64, 2): _Sizes(rows=64, keys=64, num_warps=4, num_stages=5),
    (128, 2): _Sizes(rows=64, keys=64, num_warps=4, num_stages=5),
    (256, 2): _Sizes(rows=64, keys=32, num_warps=8, num_stages=5),
    (64, 4): _Sizes(rows=32, keys=32, num_warps=4, num_stages=1),
    (128, 4): _Sizes(rows=16, keys=32, num_warps=4, num_stages=1),
    (256, 4): _Sizes(rows=16, keys=16, num_warps=4, num_stages=1),
}
# Programs that parts of lists may make. 264 run at once on 132 multiprocessors: 8192 are enough to even out what lists differ in, and
# their results, 64 * 128 float32 each, take 0.25 GiB. The dense rows cost the same everywhere: 2 waves are enough.
_LINE_PROGRAMS, _DENSE_PROGRAMS = 8192, 528
_SPLIT_BLOCKS = 16  # at least: 16 blocks read 512 KiB of keys and values, their result is 32 KiB written and read again
_FLAG_TILE = 4096  # flags that a program counts or lists: 16 a thread of 8 warps
_MERGE_ROWS, _MERGE_SPLITS = 16, 4  # with D 128 8192 float32, 32 registers a thread of 8 warps


def sparse_prefill(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    slots: Tensor,
    *,
    start: int,
    tiles: Tensor,
    verticals: Tensor,
    tile_tokens: int,
    dense_last_rows: int,
    scale: float,
) -> Tensor:
    """See the contract in `loopserve.kernels.sparse_prefill`; the last dimension of query, keys and values is contiguous."""
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads = key_pool.shape[1]
    assert query.stride(2) == key_pool.stride(2) == value_pool.stride(2) == 1, "the last dimension is contiguous"
    output = torch.empty((num_rows, num_heads, head_dim), dtype=query.dtype, device=query.device)
    num_dense = min(dense_last_rows, num_rows)
    num_sparse = num_rows - num_dense
    dim_tile = tile_size(head_dim)
    sizes = _SIZES[min(max(dim_tile, 64), 256), query.element_size()]
    strides = (
        query.stride(0),
        query.stride(1),
        key_pool.stride(0),
        key_pool.stride(1),
        value_pool.stride(0),
        value_pool.stride(1),
        slots.stride(0),
    )
    shape = {
        "NUM_HEADS": num_heads,
        "GQA": num_heads // num_kv_heads,
        "HEAD_DIM": head_dim,
        "DIM_TILE": dim_tile,
        "SPLIT_BLOCKS": _SPLIT_BLOCKS,
        "INTERPRETED": is_interpreted(),
        "num_warps": sizes.num_warps,
        "num_stages": sizes.num_stages,
    }
    if num_sparse > 0:
        tile_flags, vertical_flags = (flags.contiguous().view(torch.uint8) for flags in (tiles, verticals))
        lines, counts = _list_lines(tile_flags, vertical_flags, start, num_sparse, tile_tokens)
        row_tile, key_tile = (min(size, tile_size(tile_tokens)) for size in (sizes.rows, sizes.keys))
        row_parts, key_parts = -(-tile_tokens // row_tile), -(-tile_tokens // key_tile)
        num_tiles = -(-num_sparse // tile_tokens) * row_parts
        blocks_max = tiles.shape[1] * key_parts + -(-slots.shape[0] // sizes.keys)
        splits = _Splits.room(num_tiles, num_heads, row_tile, dim_tile, blocks_max, _LINE_PROGRAMS, query.device)
        _attend_on_lines[(num_tiles, num_heads, splits.num)](
            query,
            key_pool,
            value_pool,
            slots,
            tile_flags,
            lines,
            counts,
            output,
            splits.outputs,
            splits.log_sums,
            splits.used,
            splits.num,
            start,
            num_rows,
            num_sparse,
            scale * LOG2_E,
            *strides,
            TILE=tile_tokens,
            ROW_TILE=row_tile,
            ROW_PARTS=row_parts,
            KEY_TILE=key_tile,
            KEY_PARTS=key_parts,
            LISTED_TILE=sizes.keys,
            **shape,
        )
        splits.merge(output, 0, num_sparse, gqa=1, tile=tile_tokens, row_tile=row_tile, row_parts=row_parts)
    if num_dense > 0:
        num_packed = num_dense * (num_heads // num_kv_heads)
        row_tile = min(sizes.rows, tile_size(num_packed))
        num_tiles = -(-num_packed // row_tile)
        blocks_max = -(-slots.shape[0] // sizes.keys)
        splits = _Splits.room(num_tiles, num_kv_heads, row_tile, dim_tile, blocks_max, _DENSE_PROGRAMS, query.device)
        _attend_on_all[(num_tiles, num_kv_heads, splits.num)](
            query,
            key_pool,
            value_pool,
            slots,
            output,
            splits.outputs,
            splits.log_sums,
            splits.used,
            splits.num,
            start,
            num_sparse,
            num_packed,
            scale * LOG2_E,
            *strides,
            ROW_TILE=row_tile,
            KEY_TILE=sizes.keys,
            **shape,
        )
        gqa = num_heads // num_kv_heads
        splits.merge(output, num_sparse, num_packed, gqa=gqa, tile=row_tile, row_tile=row_tile, row_parts=1)
    return output


def _list_lines(
    tiles: Tensor, verticals: Tensor, start: int, num_sparse: int, tile_tokens: int
) -> tuple[Tensor, Tensor]:
    """Chosen lines of each head, int32 [H, T + N], and how many a query tile can reach, int32 [H, Q, 2]; from contiguous uint8 flags.

    Lines are numbered: t < T is a tile-diagonal, T + c the vertical c. A head's list ascends, so its diagonals come first, and what query
    tile q can reach comes first among either: the first `counts[h, q, 0]` entries are its diagonals; its verticals follow all diagonals,
    of which there are `counts[h, Q - 1, 0]`, and end at `counts[h, q, 1]`.
    """
    num_heads, num_diagonals = tiles.shape
    num_columns = verticals.shape[1]
    num_query_tiles = -(-(num_columns - start) // tile_tokens)
    num_blocks = -(-(num_diagonals + num_columns) // _FLAG_TILE)
    lines = torch.empty((num_heads, num_diagonals + num_columns), dtype=torch.int32, device=tiles.device)
    counts = torch.empty((num_heads, num_query_tiles, 2), dtype=torch.int32, device=tiles.device)
    of_blocks = torch.empty((num_heads, num_blocks), dtype=torch.int32, device=tiles.device)
    grid = (num_blocks, num_heads)
    _count_flags[grid](tiles, verticals, of_blocks, num_diagonals, num_columns, FLAG_TILE=_FLAG_TILE, num_warps=8)
    _list_flags[grid](
        tiles,
        verticals,
        of_blocks,
        lines,
        counts,
        num_diagonals,
        num_columns,
        start,
        num_sparse,
        TILE=tile_tokens,
        FLAG_TILE=_FLAG_TILE,
        num_warps=8,
    )
    return lines, counts


@dataclass(frozen=True, slots=True)
class _Splits:
    """Room for what the parts of each list come to; none where lists are not split."""

    num: int  # parts of a list at most
    outputs: Tensor  # float32 [heads, tiles, num, rows, D]
    log_sums: Tensor  # float32 [heads, tiles, num, rows], of base 2
    used: Tensor  # int32 [heads, tiles]: parts of this list; a single one writes the output itself

    @classmethod
    def room(
        cls,
        num_tiles: int,
        num_heads: int,
        row_tile: int,
        dim_tile: int,
        blocks_max: int,
        programs_wanted: int,
        device: torch.device,
    ) -> "_Splits":
        """For lists of at most `blocks_max` blocks: as many parts as make up to `programs_wanted` programs, of `_SPLIT_BLOCKS` or more."""
        num = max(1, min(programs_wanted // (num_tiles * num_heads), -(-blocks_max // _SPLIT_BLOCKS)))
        parts = (num_heads, num_tiles, num if num > 1 else 0, row_tile)
        return cls(
            num,
            torch.empty((*parts, dim_tile), dtype=torch.float32, device=device),
            torch.empty(parts, dtype=torch.float32, device=device),
            torch.empty((num_heads, num_tiles), dtype=torch.int32, device=device),
        )

    def merge(
        self, output: Tensor, first_row: int, num_packed: int, *, gqa: int, tile: int, row_tile: int, row_parts: int
    ) -> None:
        """Write the rows of all lists that were split into `output`."""
        if self.num == 1:
            return
        num_heads, num_tiles = self.used.shape
        _merge_splits[(num_tiles, num_heads, row_tile // _MERGE_ROWS)](
            output,
            self.outputs,
            self.log_sums,
            self.used,
            self.num,
            first_row,
            num_packed,
            NUM_HEADS=output.shape[1],
            GQA=gqa,
            HEAD_DIM=output.shape[2],
            DIM_TILE=self.outputs.shape[4],
            TILE=tile,
            ROW_TILE=row_tile,
            ROW_PARTS=row_parts,
            MERGE_ROWS=_MERGE_ROWS,
            MERGE_SPLITS=_MERGE_SPLITS,
            INTERPRETED=is_interpreted(),
            num_warps=8,
        )


@triton.jit(do_not_specialize=["num_diagonals", "num_columns"])
def _count_flags(tiles, verticals, of_blocks, num_diagonals, num_columns, FLAG_TILE: tl.constexpr):
    """How many lines of one block one head chose."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    _, flags = _block_of_flags(tiles, verticals, block, head, num_diagonals, num_columns, FLAG_TILE)
    tl.store(of_blocks + head * tl.num_programs(0) + block, tl.sum(flags, axis=0))


@triton.jit(do_not_specialize=["num_diagonals", "num_columns", "start", "num_sparse"])
def _list_flags(
    tiles,
    verticals,
    of_blocks,
    lines,
    counts,
    num_diagonals,
    num_columns,
    start,
    num_sparse,
    TILE: tl.constexpr,
    FLAG_TILE: tl.constexpr,
):
    """Write the chosen lines of one block to their places, and the counts of the query tiles whose reach ends in it."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    num_blocks = tl.num_programs(0)
    before = tl.zeros((FLAG_TILE,), tl.int32)
    for first in range(0, block, FLAG_TILE):
        blocks = first + tl.arange(0, FLAG_TILE)
        before += tl.load(of_blocks + head * num_blocks + blocks, mask=blocks < block, other=0)
    line, flags = _block_of_flags(tiles, verticals, block, head, num_diagonals, num_columns, FLAG_TILE)
    count = tl.sum(before, axis=0) + tl.cumsum(flags, axis=0)  # chosen lines up to each
    num_lines = num_diagonals + num_columns
    tl.store(lines + head.to(tl.int64) * num_lines + count - 1, line, mask=flags != 0)
    # Query tile q reaches the diagonals up to q + P, and the columns up to the last one that its last sparse row sees.
    num_past_tiles = tl.cdiv(start, TILE)
    is_diagonal = line < num_diagonals
    row = line - num_diagonals - start
    last_row = tl.minimum(row // TILE * TILE + TILE, num_sparse) - 1
    query_tile = tl.where(is_diagonal, line - num_past_tiles, row // TILE)
    is_reach = tl.where(is_diagonal, line >= num_past_tiles, (row >= 0) & (row == last_row)) & (line < num_lines)
    num_query_tiles = num_diagonals - num_past_tiles
    place = (head * num_query_tiles + query_tile) * 2 + tl.where(is_diagonal, 0, 1)
    tl.store(counts + place, count, mask=is_reach)


@triton.jit
def _block_of_flags(tiles, verticals, block, head, num_diagonals, num_columns, FLAG_TILE: tl.constexpr):
    """Numbers of one block's lines and whether the head chose them, int32 [FLAG_TILE] each; 0 past the last line."""
    line = block * FLAG_TILE + tl.arange(0, FLAG_TILE)
    is_diagonal = line < num_diagonals
    column = line - num_diagonals
    is_column = (column >= 0) & (column < num_columns)
    of_tiles = tl.load(tiles + head.to(tl.int64) * num_diagonals + line, mask=is_diagonal, other=0)
    of_columns = tl.load(verticals + head.to(tl.int64) * num_columns + column, mask=is_column, other=0)
    return line, ((of_tiles | of_columns) != 0).to(tl.int32)


@triton.jit(do_not_specialize=["num_splits", "start", "num_rows", "num_sparse"])
def _attend_on_lines(
    query,
    key_pool,
    value_pool,
    slots,
    tiles,
    lines,
    counts,
    output,
    split_outputs,
    split_log_sums,
    splits_used,
    num_splits,
    start,
    num_rows,
    num_sparse,
    scale_log2,
    query_row,
    query_head,
    key_pool_slot,
    key_pool_head,
    value_pool_slot,
    value_pool_head,
    slots_column,
    NUM_HEADS: tl.constexpr,
    GQA: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    ROW_PARTS: tl.constexpr,
    KEY_TILE: tl.constexpr,
    KEY_PARTS: tl.constexpr,
    LISTED_TILE: tl.constexpr,
    SPLIT_BLOCKS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One part of what one head reads for one tile of rows: a query tile, or one of the ROW_PARTS parts of a larger one.

    Arguments named `x_y` are the strides of x along y, in elements; so in all that follow.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the last tiles read the most, so they start first
    head = tl.program_id(1)
    split = tl.program_id(2)
    first_row, last_row = _rows_of_tile(tile, num_sparse, TILE, ROW_TILE, ROW_PARTS)
    query_tile = tile // ROW_PARTS
    num_past_tiles = tl.cdiv(start, TILE)
    num_query_tiles = tl.cdiv(num_rows, TILE)
    num_diagonals = num_past_tiles + num_query_tiles
    head_counts = counts + head * num_query_tiles * 2
    first_vertical = tl.load(head_counts + (num_query_tiles - 1) * 2)
    num_tile_blocks = tl.load(head_counts + query_tile * 2) * KEY_PARTS
    num_verticals = tl.load(head_counts + query_tile * 2 + 1) - first_vertical
    num_blocks = num_tile_blocks + tl.cdiv(num_verticals, LISTED_TILE)
    num_blocks = tl.where(first_row < last_row, num_blocks, 0)
    num_used = tl.minimum(tl.maximum(tl.cdiv(num_blocks, SPLIT_BLOCKS), 1), num_splits)
    if split >= num_used:
        return
    first_block = split * tl.cdiv(num_blocks, num_used)
    last_block = tl.minimum(first_block + tl.cdiv(num_blocks, num_used), num_blocks)

    head_tiles = tiles + head.to(tl.int64) * num_diagonals
    head_lines = lines + head.to(tl.int64) * (num_diagonals + start + num_rows)
    kv_head = head // GQA
    head_keys = key_pool + kv_head.to(tl.int64) * key_pool_head
    head_values = value_pool + kv_head.to(tl.int64) * value_pool_head
    rows = first_row + tl.arange(0, ROW_TILE)
    exists = rows < last_row
    row_offsets = rows.to(tl.int64) * query_row + head.to(tl.int64) * query_head
    queries = _load_queries(query, row_offsets, exists, HEAD_DIM, DIM_TILE)
    seen_until = start + rows
    end = start + last_row  # columns from here on lie in the future of every row of this tile
    front = num_past_tiles * TILE - start  # columns that the oldest key tile lacks
    attended, peak, total = _nothing_attended(ROW_TILE, DIM_TILE)
    for block in range(first_block, tl.minimum(last_block, num_tile_blocks)):
        diagonal = tl.load(head_lines + block // KEY_PARTS)
        in_tile = block % KEY_PARTS * KEY_TILE + tl.arange(0, KEY_TILE)
        columns = (query_tile + num_past_tiles - diagonal) * TILE - front + in_tile
        readable = (in_tile < TILE) & (columns >= 0) & (columns < end)
        block_slots = tl.load(slots + columns.to(tl.int64) * slots_column, mask=readable, other=0)
        keys = gather_rows(head_keys, block_slots, readable, key_pool_slot, HEAD_DIM, DIM_TILE)
        values = gather_rows(head_values, block_slots, readable, value_pool_slot, HEAD_DIM, DIM_TILE)
        visible = readable[None, :] & (columns[None, :] <= seen_until[:, None])
        attended, peak, total = _attend(attended, peak, total, queries, keys, values, visible, scale_log2, INTERPRETED)
    for block in range(tl.maximum(first_block - num_tile_blocks, 0), last_block - num_tile_blocks):
        listed = block * LISTED_TILE + tl.arange(0, LISTED_TILE)
        columns = tl.load(head_lines + first_vertical + listed, mask=listed < num_verticals, other=0) - num_diagonals
        readable = (listed < num_verticals) & (columns < end)
        diagonals = query_tile + num_past_tiles - (columns + front) // TILE
        crossed = tl.load(head_tiles + diagonals, mask=readable, other=0)
        readable = readable & (crossed == 0)
        block_slots = tl.load(slots + columns.to(tl.int64) * slots_column, mask=readable, other=0)
        keys = gather_rows(head_keys, block_slots, readable, key_pool_slot, HEAD_DIM, DIM_TILE)
        values = gather_rows(head_values, block_slots, readable, value_pool_slot, HEAD_DIM, DIM_TILE)
        visible = readable[None, :] & (columns[None, :] <= seen_until[:, None])
        attended, peak, total = _attend(attended, peak, total, queries, keys, values, visible, scale_log2, INTERPRETED)
    list_index = head * tl.num_programs(0) + tile
    row_targets = (rows.to(tl.int64) * NUM_HEADS + head) * HEAD_DIM
    _store_part(
        attended,
        peak,
        total,
        output,
        row_targets,
        exists,
        split_outputs,
        split_log_sums,
        splits_used,
        list_index,
        split,
        num_used,
        num_splits,
        HEAD_DIM,
        DIM_TILE,
        ROW_TILE,
        INTERPRETED,
    )


@triton.jit(do_not_specialize=["num_splits", "start", "num_sparse", "num_packed"])
def _attend_on_all(
    query,
    key_pool,
    value_pool,
    slots,
    output,
    split_outputs,
    split_log_sums,
    splits_used,
    num_splits,
    start,
    num_sparse,
    num_packed,
    scale_log2,
    query_row,
    query_head,
    key_pool_slot,
    key_pool_head,
    value_pool_slot,
    value_pool_head,
    slots_column,
    NUM_HEADS: tl.constexpr,
    GQA: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    SPLIT_BLOCKS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One part of the context for one tile of the dense rows, which are packed: a row's G heads of one KV head follow each other."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    first_packed, last_packed = _rows_of_tile(tile, num_packed, ROW_TILE, ROW_TILE, 1)
    end = start + num_sparse + (last_packed - 1) // GQA + 1
    num_blocks = tl.cdiv(end, KEY_TILE)
    num_used = tl.minimum(tl.cdiv(num_blocks, SPLIT_BLOCKS), num_splits)
    if split >= num_used:
        return
    first_block = split * tl.cdiv(num_blocks, num_used)
    last_block = tl.minimum(first_block + tl.cdiv(num_blocks, num_used), num_blocks)

    head_keys = key_pool + kv_head.to(tl.int64) * key_pool_head
    head_values = value_pool + kv_head.to(tl.int64) * value_pool_head
    packed = first_packed + tl.arange(0, ROW_TILE)
    exists = packed < last_packed
    rows = num_sparse + packed // GQA
    heads = kv_head * GQA + packed % GQA
    row_offsets = rows.to(tl.int64) * query_row + heads.to(tl.int64) * query_head
    queries = _load_queries(query, row_offsets, exists, HEAD_DIM, DIM_TILE)
    seen_until = start + rows
    attended, peak, total = _nothing_attended(ROW_TILE, DIM_TILE)
    for block in range(first_block, last_block):
        columns = block * KEY_TILE + tl.arange(0, KEY_TILE)
        readable = columns < end
        block_slots = tl.load(slots + columns.to(tl.int64) * slots_column, mask=readable, other=0)
        keys = gather_rows(head_keys, block_slots, readable, key_pool_slot, HEAD_DIM, DIM_TILE)
        values = gather_rows(head_values, block_slots, readable, value_pool_slot, HEAD_DIM, DIM_TILE)
        visible = columns[None, :] <= seen_until[:, None]
        attended, peak, total = _attend(attended, peak, total, queries, keys, values, visible, scale_log2, INTERPRETED)
    list_index = kv_head * tl.num_programs(0) + tile
    row_targets = (rows.to(tl.int64) * NUM_HEADS + heads) * HEAD_DIM
    _store_part(
        attended,
        peak,
        total,
        output,
        row_targets,
        exists,
        split_outputs,
        split_log_sums,
        splits_used,
        list_index,
        split,
        num_used,
        num_splits,
        HEAD_DIM,
        DIM_TILE,
        ROW_TILE,
        INTERPRETED,
    )


@triton.jit(do_not_specialize=["num_splits", "first_row", "num_packed"])
def _merge_splits(
    output,
    split_outputs,
    split_log_sums,
    splits_used,
    num_splits,
    first_row,
    num_packed,
    NUM_HEADS: tl.constexpr,
    GQA: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    ROW_PARTS: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
    MERGE_SPLITS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Weigh the parts of one list by their sums of exponentials: some rows of one tile."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    list_index = head * tl.num_programs(0) + tile
    num_used = tl.load(splits_used + list_index)
    if num_used <= 1:
        return
    first_packed, last_packed = _rows_of_tile(tile, num_packed, TILE, ROW_TILE, ROW_PARTS)
    places = tl.program_id(2) * MERGE_ROWS + tl.arange(0, MERGE_ROWS)
    packed = first_packed + places
    dims = tl.arange(0, DIM_TILE)
    merged = tl.zeros((MERGE_ROWS, DIM_TILE), tl.float32)
    peak = tl.full((MERGE_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((MERGE_ROWS,), tl.float32)
    for first in range(0, num_used, MERGE_SPLITS):
        splits = first + tl.arange(0, MERGE_SPLITS)
        is_used = splits < num_used
        cells = (list_index.to(tl.int64) * num_splits + splits)[:, None] * ROW_TILE + places[None, :]  # [splits, rows]
        log_sums = tl.load(split_log_sums + cells, mask=is_used[:, None], other=float("-inf"))
        parts = tl.load(
            split_outputs + cells[:, :, None] * DIM_TILE + dims[None, None, :], mask=is_used[:, None, None], other=0.0
        )
        new_peak = tl.maximum(peak, tl.max(log_sums, axis=0))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        shares = tl.exp2(log_sums - shift[None, :])
        kept = tl.exp2(peak - shift)
        total = total * kept + tl.sum(shares, axis=0)
        merged = merged * kept[:, None] + tl.sum(parts * shares[:, :, None], axis=0)
        peak = new_peak
    merged = merged / tl.where(total == 0.0, 1.0, total)[:, None]
    heads = head * GQA + packed % GQA
    targets = ((first_row + packed // GQA).to(tl.int64) * NUM_HEADS + heads) * HEAD_DIM
    tl.store(
        output + targets[:, None] + dims[None, :],
        cast(merged, output.dtype.element_ty, INTERPRETED),
        mask=(packed < last_packed)[:, None] & (dims < HEAD_DIM)[None, :],
    )


@triton.jit
def _rows_of_tile(tile, num_rows, TILE: tl.constexpr, ROW_TILE: tl.constexpr, ROW_PARTS: tl.constexpr):
    """First and past-the-last row of one tile, or of one of the ROW_PARTS parts of a larger one; the last parts may be empty."""
    first = tile // ROW_PARTS * TILE + tile % ROW_PARTS * ROW_TILE
    last = tl.minimum(tl.minimum(first + ROW_TILE, tile // ROW_PARTS * TILE + TILE), num_rows)
    return first, last


@triton.jit
def _load_queries(query, row_offsets, exists, HEAD_DIM: tl.constexpr, DIM_TILE: tl.constexpr):
    """Queries [rows, DIM_TILE] at int64 offsets [rows]; zeros where none exists."""
    dims = tl.arange(0, DIM_TILE)
    return tl.load(
        query + row_offsets[:, None] + dims[None, :], mask=exists[:, None] & (dims < HEAD_DIM)[None, :], other=0.0
    )


@triton.jit
def _nothing_attended(ROW_TILE: tl.constexpr, DIM_TILE: tl.constexpr):
    """Output so far, not divided yet, the largest logit and the sum of exponentials of rows that have read nothing."""
    attended = tl.zeros((ROW_TILE, DIM_TILE), tl.float32)
    peak = tl.full((ROW_TILE,), float("-inf"), tl.float32)
    return attended, peak, tl.zeros((ROW_TILE,), tl.float32)


@triton.jit
def _attend(attended, peak, total, queries, keys, values, visible, scale_log2, INTERPRETED: tl.constexpr):
    """Rows attend on one more block where `visible` bool [rows, keys]; a row that has seen nothing yet keeps a peak of -inf."""
    logits = dot(queries, tl.trans(keys), INTERPRETED) * scale_log2
    logits = tl.where(visible, logits, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(logits, axis=1))
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(logits - shift[:, None])
    kept = tl.exp2(peak - shift)
    total = total * kept + tl.sum(weights, axis=1)
    attended = attended * kept[:, None]
    attended += dot(cast(weights, values.dtype, INTERPRETED), values, INTERPRETED)
    return attended, new_peak, total


@triton.jit
def _store_part(
    attended,
    peak,
    total,
    output,
    row_targets,
    exists,
    split_outputs,
    split_log_sums,
    splits_used,
    list_index,
    split,
    num_used,
    num_splits,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Write the rows of the only part to the output, those of one part of several to its room. Nothing read gives zeros."""
    divisor = tl.where(total == 0.0, 1.0, total)
    attended = attended / divisor[:, None]
    dims = tl.arange(0, DIM_TILE)
    if split == 0:
        tl.store(splits_used + list_index, num_used)
    if num_used == 1:
        tl.store(
            output + row_targets[:, None] + dims[None, :],
            cast(attended, output.dtype.element_ty, INTERPRETED),
            mask=exists[:, None] & (dims < HEAD_DIM)[None, :],
        )
    else:
        cells = (list_index.to(tl.int64) * num_splits + split) * ROW_TILE + tl.arange(0, ROW_TILE)
        tl.store(split_log_sums + cells, peak + tl.log2(divisor))  # -inf where nothing was read
        tl.store(split_outputs + cells[:, None] * DIM_TILE + dims[None, :], attended)
