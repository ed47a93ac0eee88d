"""`sketch_scores` in Triton, in two passes over the sketches: the log-sum of each row and head, then the weights.

The first pass is `sketch_log_sum` of one list that all heads of a row share and that ends at the row's length. The second has a program for
each row, KV head and split of the columns: it computes the logits again, takes the log-sum off, adds up the heads of a list, and writes.
Nothing is read past a row's length: a block wholly beyond it costs a store of zeros, and no more.

Bytes: (D / 8 + 2) * Hkv of each token's sketches twice, 36 in place of 512 bytes of a key and value a KV head at D 128 in 16 bits; a slot,
8 bytes, twice a KV head, from L2 for all heads but the first; 4 * Hs of weights a column, written once, zeros beyond a length included.

Rejected: keeping the logits of the first pass, float32 [R, H, N], which writes and reads 8 bytes a query head and column, 256 at H 32, in
place of 144 of sketches at Hkv 8, and at R 64, N 131,072 takes 1 GiB that a CUDA graph holds for good; one pass with a running maximum that
leaves the weights unscaled, since the consumer would have to scale them; zeroing the output beforehand, which writes most of it twice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loopserve.kernels.sketch import KeySketch
from loopserve.kernels.sketch_log_sum.kernel import cut_lists, load_planes, log_sums, plane_sizes, sketch_logits
from loopserve.kernels.sketch_scores import SketchScores
from loopserve.kernels.tiles import LOG2_E, is_interpreted, tile_size

# Tile sizes are those of `sketch_log_sum.kernel`, for the same reason: unpacking signs is what costs.

_LOG2_E: tl.constexpr = tl.constexpr(LOG2_E)


def sketch_scores(
    query: Tensor, sketch: KeySketch, slots: Tensor, lengths: Tensor, *, num_lists: int, scale: float
) -> SketchScores:
    """See the contract in `loopserve.kernels.sketch_scores`."""
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads, num_columns = sketch.signs.shape[1], slots.shape[1]
    log_sum = log_sums(query, sketch, slots[:, None], None, lengths, scale=scale)
    weights = torch.empty((num_rows, num_lists, num_columns), dtype=torch.float32, device=query.device)
    if weights.numel() == 0:
        return SketchScores(weights, log_sum)

    group = num_heads // num_kv_heads
    tile, cut = cut_lists(query, num_rows * num_kv_heads, num_columns)
    _weigh_split[(num_rows * num_kv_heads, cut.num_splits)](
        query,
        sketch.signs,
        sketch.scales,
        slots,
        lengths,
        log_sum,
        weights,
        scale * LOG2_E,
        num_columns,
        cut.split_len,
        *query.stride()[:2],
        *sketch.signs.stride()[:2],
        *sketch.scales.stride(),
        *slots.stride(),
        lengths.stride(0),
        NUM_HEADS=num_heads,
        GROUP=group,
        LISTS=num_lists // num_kv_heads,
        HEADS_TILE=tile_size(group),
        BLOCK=tile.tokens,
        HEAD_DIM=head_dim,
        **plane_sizes(head_dim),
        INTERPRETED=is_interpreted(),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return SketchScores(weights, log_sum)


# Not specialised: what changes as conversations grow, and where slices of a step's index tensors begin.
@triton.jit(do_not_specialize=["slots", "lengths", "num_columns", "split_len", "slots_row"])
def _weigh_split(
    query,
    signs,
    scales,
    slots,
    lengths,
    log_sums,
    weights,
    scale_log2,
    num_columns,
    split_len,
    query_row,
    query_head,
    signs_slot,
    signs_head,
    scales_slot,
    scales_head,
    slots_row,
    slots_column,
    lengths_row,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    LISTS: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    PLANES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One split of one row's columns, for the GROUP heads of one KV head: LISTS is 1, their sum, or GROUP, each for itself.

    Arguments named `x_y` are the strides of x along y, in elements; `weights` and `log_sums` are contiguous.
    """
    row = (tl.program_id(0) // (NUM_HEADS // GROUP)).to(tl.int64)
    kv_head = (tl.program_id(0) % (NUM_HEADS // GROUP)).to(tl.int64)
    members = tl.arange(0, HEADS_TILE)
    is_head = members < GROUP
    heads = kv_head * GROUP + members
    planes = load_planes(query + row * query_row + heads * query_head, is_head, HEAD_DIM, COLUMNS, PLANES)
    log_sum = tl.load(log_sums + row * NUM_HEADS + heads, mask=is_head, other=0.0) * _LOG2_E
    # Rows of the tile are the query heads; the lists of this KV head are one row of `weights`, or as many as it has heads.
    lists = weights + (row * (NUM_HEADS // GROUP) + kv_head) * LISTS * num_columns

    first = tl.program_id(1) * split_len
    end = tl.minimum(first + split_len, num_columns)
    length = tl.load(lengths + row * lengths_row).to(tl.int32)
    num_blocks = tl.cdiv(tl.maximum(tl.minimum(end, length) - first, 0), BLOCK)  # that hold a column of the row's
    for start in range(first, first + num_blocks * BLOCK, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        is_read = columns < length
        slot = tl.load(slots + row * slots_row + columns.to(tl.int64) * slots_column, mask=is_read, other=0)
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
        of_heads = tl.where(is_head[:, None] & is_read[None, :], tl.exp2(logits - log_sum[:, None]), 0.0)
        if LISTS == 1:
            tl.store(lists + columns, tl.sum(of_heads, axis=0), mask=columns < end)
        else:
            tl.store(
                lists + members.to(tl.int64)[:, None] * num_columns + columns[None, :],
                of_heads,
                mask=is_head[:, None] & (columns < end)[None, :],
            )

    for start in range(first + num_blocks * BLOCK, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        tl.store(
            lists + members.to(tl.int64)[:, None] * num_columns + columns[None, :],
            tl.zeros((HEADS_TILE, BLOCK), tl.float32),
            mask=(members < LISTS)[:, None] & (columns < end)[None, :],
        )
