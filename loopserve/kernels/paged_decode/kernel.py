"""`paged_decode` in Triton: lists are cut into splits, and what the splits found is merged.

How the work is cut: a program has one row, the query heads that read one list of one KV head, and one split of that list. These heads
are the rows of its tiles, padded to what `tl.dot` takes: a KV head's G where they share a list (Hs 1 or Hkv), else one (Hs H). A program
walks over its split block by block with a running softmax, float32. Where lists are not cut, it writes the output; else it writes its
share's output and the logarithm of its share's weight, and a second kernel weighs the shares. How often lists are cut follows from shapes,
so the launches are the same whatever the lists hold, and a CUDA graph may hold them.

Bytes: each listed key and value is read once for each list that names it, so once where heads share a list. Slots, 8 bytes, and
`valid`, 1 byte, are read once a list; where one list serves all heads (Hs 1), once a KV head, 9 bytes beside 512 of a key and a value at
D 128 in 16 bits. Padding reads no key and no value. Splits write and read (D + 1) * 4 bytes a query head once.

Rejected: a tile for each query head, which reads a shared list G times; one program for all KV heads of a token, which reads whole tokens
but leaves one row to a handful of programs; merging by atomics in the first kernel, whose sums depend on the order of arrival; the number
of splits from each row's valid slots, which the host does not know without waiting for the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loopserve.kernels.paged_decode import LeftOut
from loopserve.kernels.tiles import (
    LOG2_E,
    Cut,
    Tile,
    cast,
    dot,
    is_interpreted,
    nearest,
    num_multiprocessors,
    tile_size,
)

# By the bytes of a key, padded to a power of two; smaller and larger keys take the nearest row. From arithmetic and from what the compiler
# says, no time measured yet. A block of keys and values is 32 KiB. Slots are loaded before the keys that they name, so it takes five
# stages to have the next block on its way while one is multiplied (with three, Triton 3.7 keeps one block and waits for it): two blocks
# are in shared memory, 71 of 227 KiB with all else, room for 3 programs a multiprocessor. Registers do not bind: 110 to 151 a thread at D
# 128 in 16 bits for sm_90, no spill, where 3 programs leave 168 each. Keys in 32 bits use no tensor cores, and at D 128 they spill some.
TILES = {
    128: Tile(128, 4, 5),
    256: Tile(64, 4, 5),
    512: Tile(32, 4, 5),
    1024: Tile(16, 4, 5),
}
PROGRAMS_PER_MULTIPROCESSOR = 3  # as many as fit at once: more splits would wait, and give the merge more to read
MERGE_TILE = 16  # splits that the merge reads at once: [16, 128] float32 over 4 warps are 16 registers a thread

_LOG2_E: tl.constexpr = tl.constexpr(LOG2_E)


def paged_decode(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    slots: Tensor,
    valid: Tensor | None,
    *,
    scale: float,
    left_out: LeftOut | None = None,
) -> Tensor:
    """See the contract in `loopserve.kernels.paged_decode`."""
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads, num_lists, num_listed = key_pool.shape[1], slots.shape[1], slots.shape[2]
    assert query.stride(2) == key_pool.stride(2) == value_pool.stride(2) == 1, "channels follow each other"
    output = torch.empty((num_rows, num_heads, head_dim), dtype=query.dtype, device=query.device)
    if num_rows == 0:
        return output

    group = num_heads // num_kv_heads
    heads_per_program = 1 if num_lists == num_heads else group
    num_groups = num_heads // heads_per_program
    tile = nearest(TILES, tile_size(head_dim) * query.element_size())
    split_len, num_splits = Cut.of(
        tile,
        num_listed,
        num_programs=num_rows * num_groups,
        programs_wanted=PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors(query.device),
    )
    is_cut = num_splits > 1
    # Where something is absent, some other tensor stands in for its pointer, which the kernel does not use then.
    shares = query.new_empty((num_rows, num_heads, num_splits, head_dim), dtype=torch.float32) if is_cut else output
    log_weights = query.new_empty((num_rows, num_heads, num_splits), dtype=torch.float32) if is_cut else output
    masks = slots if valid is None else valid.view(torch.uint8)
    log_weight, value = (output, output) if left_out is None else (left_out.log_weight, left_out.value)
    left_out_strides = (*log_weight.stride()[:2], *value.stride())
    sizes = {"HEAD_DIM": head_dim, "DIM_TILE": tile_size(head_dim), "INTERPRETED": is_interpreted()}
    _attend_split[(num_rows * num_groups, num_splits)](
        query,
        key_pool,
        value_pool,
        slots,
        masks,
        log_weight,
        value,
        output,
        shares,
        log_weights,
        scale * LOG2_E,
        num_listed,
        split_len,
        *query.stride()[:2],
        *key_pool.stride()[:2],
        *value_pool.stride()[:2],
        slots.stride(0),
        slots.stride(1) if num_lists > 1 else 0,  # one list serves all
        slots.stride(2),
        masks.stride(0),
        masks.stride(1) if num_lists > 1 else 0,
        masks.stride(2),
        *left_out_strides,
        NUM_HEADS=num_heads,
        GROUP=group,
        HEADS=heads_per_program,
        HEADS_TILE=tile_size(heads_per_program),
        BLOCK=tile.tokens,
        HAS_VALID=valid is not None,
        HAS_LEFT_OUT=left_out is not None and not is_cut,
        IS_CUT=is_cut,
        **sizes,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if is_cut:
        _merge_splits[(num_rows * num_heads,)](
            shares,
            log_weights,
            log_weight,
            value,
            output,
            num_splits,
            *left_out_strides,
            NUM_HEADS=num_heads,
            GROUP=group,
            BLOCK=MERGE_TILE,
            HAS_LEFT_OUT=left_out is not None,
            **sizes,
        )
    return output


# Not specialised: what changes as conversations grow, and where slices of a step's index tensors begin.
@triton.jit(
    do_not_specialize=[
        *("slots", "masks", "num_listed", "split_len"),
        *("slots_row", "slots_list", "masks_row", "masks_list"),
    ],
)
def _attend_split(
    query,
    key_pool,
    value_pool,
    slots,
    masks,
    left_out_log_weight,
    left_out_value,
    output,
    shares,
    log_weights,
    scale_log2,
    num_listed,
    split_len,
    query_row,
    query_head,
    keys_slot,
    keys_head,
    values_slot,
    values_head,
    slots_row,
    slots_list,
    slots_entry,
    masks_row,
    masks_list,
    masks_entry,
    log_weight_row,
    log_weight_head,
    value_row,
    value_head,
    value_dim,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_LEFT_OUT: tl.constexpr,
    IS_CUT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One split of one list, for the HEADS heads of one row that read it. Arguments named `x_y` are the strides of x along y, in elements.

    Logits are kept in powers of two: what is stored in `log_weights` is a logarithm to base 2.
    """
    row = (tl.program_id(0) // (NUM_HEADS // HEADS)).to(tl.int64)
    group = (tl.program_id(0) % (NUM_HEADS // HEADS)).to(
        tl.int64
    )  # neighbours in the grid share their tokens' lines in L2
    split = tl.program_id(1)
    members = tl.arange(0, HEADS_TILE)
    heads = group * HEADS + members
    kv_head = group * HEADS // GROUP
    dims = tl.arange(0, DIM_TILE)
    inside = dims < HEAD_DIM
    tile_inside = (members < HEADS)[:, None] & inside[None, :]

    rows = tl.load(
        query + row * query_row + heads[:, None] * query_head + dims[None, :], mask=tile_inside, other=0.0
    )  # [HEADS_TILE, D]
    if HAS_LEFT_OUT:
        largest = (
            tl.load(
                left_out_log_weight + row * log_weight_row + heads * log_weight_head,
                mask=members < HEADS,
                other=float("-inf"),
            ).to(tl.float32)
            * _LOG2_E
        )
        total = tl.exp2(largest - _finite(largest))  # 1, or 0 for nothing, or NaN
        left_out = tl.load(
            left_out_value + row * value_row + kv_head * value_head + dims * value_dim, mask=inside, other=0.0
        ).to(tl.float32)
        read = tl.where((total == 0.0)[:, None], 0.0, total[:, None] * left_out[None, :])
    else:
        largest = tl.full((HEADS_TILE,), float("-inf"), tl.float32)
        total = tl.zeros((HEADS_TILE,), tl.float32)
        read = tl.zeros((HEADS_TILE, DIM_TILE), tl.float32)

    first = split * split_len
    for start in range(first, tl.minimum(first + split_len, num_listed), BLOCK):
        entries = start + tl.arange(0, BLOCK)
        is_read = entries < num_listed
        entries = entries.to(tl.int64)
        if HAS_VALID:
            mask = tl.load(masks + row * masks_row + group * masks_list + entries * masks_entry, mask=is_read, other=0)
            is_read = is_read & (mask != 0)
        slot = tl.load(slots + row * slots_row + group * slots_list + entries * slots_entry, mask=is_read, other=0)
        block_inside = is_read[:, None] & inside[None, :]
        keys = tl.load(
            key_pool + slot[:, None] * keys_slot + kv_head * keys_head + dims[None, :], mask=block_inside, other=0.0
        )  # [BLOCK, D]
        logits = dot(rows, tl.trans(keys), INTERPRETED) * scale_log2  # [HEADS_TILE, BLOCK]
        logits = tl.where(is_read[None, :], logits, float("-inf"))
        # The maximum may or may not ignore NaN; a NaN among the logits makes `weights`, so `total`, NaN either way.
        new_largest = tl.maximum(largest, tl.max(logits, axis=1))
        shift = _finite(new_largest)
        weights = tl.exp2(logits - shift[:, None])
        shrink = tl.exp2(largest - shift)
        largest = new_largest
        total = total * shrink + tl.sum(weights, axis=1)
        values = tl.load(
            value_pool + slot[:, None] * values_slot + kv_head * values_head + dims[None, :],
            mask=block_inside,
            other=0.0,
        )  # [BLOCK, D]
        weights = cast(weights, values.dtype, INTERPRETED)
        read = read * shrink[:, None] + dot(weights, values, INTERPRETED)

    read = read / tl.where(total == 0.0, 1.0, total)[:, None]  # zeros where nothing was read
    place = row * NUM_HEADS + heads
    if IS_CUT:
        place = place * tl.num_programs(1) + split
        tl.store(shares + place[:, None] * HEAD_DIM + dims[None, :], read, mask=tile_inside)
        tl.store(log_weights + place, largest + tl.log2(total), mask=members < HEADS)
    else:
        tl.store(
            output + place[:, None] * HEAD_DIM + dims[None, :],
            cast(read, output.dtype.element_ty, INTERPRETED),
            mask=tile_inside,
        )


@triton.jit(do_not_specialize=["num_splits"])
def _merge_splits(
    shares,
    log_weights,
    left_out_log_weight,
    left_out_value,
    output,
    num_splits,
    log_weight_row,
    log_weight_head,
    value_row,
    value_head,
    value_dim,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_LEFT_OUT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One row and head: the mean of its splits' outputs and of what is left out, by their weights."""
    place = tl.program_id(0).to(tl.int64)
    row = place // NUM_HEADS
    head = place % NUM_HEADS
    dims = tl.arange(0, DIM_TILE)
    inside = dims < HEAD_DIM
    first = place * num_splits

    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, num_splits, BLOCK):
        splits = start + tl.arange(0, BLOCK)
        largest = tl.maximum(
            largest, tl.load(log_weights + first + splits, mask=splits < num_splits, other=float("-inf"))
        )
    top = tl.max(largest, axis=0)
    if HAS_LEFT_OUT:
        left_out_log2 = tl.load(left_out_log_weight + row * log_weight_row + head * log_weight_head) * _LOG2_E
        top = tl.maximum(top, left_out_log2)
    shift = _finite(top)

    totals = tl.zeros((BLOCK,), tl.float32)
    read = tl.zeros((DIM_TILE,), tl.float32)
    for start in range(0, num_splits, BLOCK):
        splits = start + tl.arange(0, BLOCK)
        is_split = splits < num_splits
        weights = tl.exp2(tl.load(log_weights + first + splits, mask=is_split, other=float("-inf")) - shift)
        share = tl.load(
            shares + (first + splits)[:, None] * HEAD_DIM + dims[None, :],
            mask=is_split[:, None] & inside[None, :],
            other=0.0,
        )
        totals += weights
        read += tl.sum(weights[:, None] * share, axis=0)
    total = tl.sum(totals, axis=0)
    if HAS_LEFT_OUT:
        weight = tl.exp2(left_out_log2 - shift)
        left_out = tl.load(
            left_out_value + row * value_row + head // GROUP * value_head + dims * value_dim, mask=inside, other=0.0
        ).to(tl.float32)
        total += weight
        read += tl.where(weight == 0.0, 0.0, weight * left_out)
    read = read / tl.where(total == 0.0, 1.0, total)
    tl.store(output + place * HEAD_DIM + dims, cast(read, output.dtype.element_ty, INTERPRETED), mask=inside)


@triton.jit
def _finite(largest):
    """What to take off logits: the largest, or 0 where there is none, since -inf less -inf is NaN."""
    return tl.where(largest == float("-inf"), 0.0, largest)
