"""`compact_kv` in Triton: one launch, a program a row, KV head and tile of its list, which copies the keys and the values of that tile.

The grid follows from shapes, so a CUDA graph may hold the launch: entries that copy nothing are masked, and a program that finds nothing
else ends after it read its slots. In most decode steps nothing is newly chosen, and the launch is then 8 bytes read an entry.

Bytes: each copied key and value is read once and written once; a slot, 8 bytes, is read for each entry, and a place, 8 bytes, for each
entry of a tile that copies something. A token of a head is one run of D * itemsize bytes (256 at D 128 in 16 bits) in source and pool:
two whole lines of 128 bytes, the largest request that goes over the bus where the source is in host memory. Such reads take a microsecond
or two each, so all keys and values of a tile are asked for before one is stored.

Rejected: a compaction of the entries that copy something, whose count the host would have to wait for; one program for all heads of a
token, since each head chose its own; asynchronous copies by the host, which would have to know the slots; a launch for keys and one for
values; a walk of each program over several tiles, which leaves a single row's few lists to few multiprocessors.
"""

import triton
import triton.language as tl
from torch import Tensor

from loopserve.kernels.tiles import tile_size

# From arithmetic and from what the compiler says, not measured yet: each of 128 threads asks for 4 times 16 bytes of keys and as many of
# values, in 48 registers for sm_90 (D 64 to 256, 16 or 32 bits; 56 at D 16), no spill, and no shared memory at D 128. Ten programs fit a
# multiprocessor, 160 KiB on their way; the bus, 64 GB/s at two microseconds, needs 128 KiB of the whole device.
TILE_BYTES = 8192  # of keys, and as many of values
NUM_WARPS = 4


def compact_kv(
    source_keys: Tensor, source_values: Tensor, slots: Tensor, key_pool: Tensor, value_pool: Tensor, places: Tensor
) -> None:
    """See the contract in `loopserve.kernels.compact_kv`.

    A source in pinned host memory is passed as it is: Triton's launcher asks the driver for the address that the device knows a pointer by
    (unified addressing), and refuses what has none. Not run on a device yet.
    """
    num_rows, num_kv_heads, num_places = slots.shape
    if slots.numel() == 0:
        return
    head_dim = key_pool.shape[2]
    dim_tile = tile_size(head_dim, least=1)
    tile = max(1, TILE_BYTES // (dim_tile * key_pool.element_size()))
    _copy_tile[(triton.cdiv(num_places, tile), num_kv_heads, num_rows)](
        source_keys,
        source_values,
        slots,
        key_pool,
        value_pool,
        places,
        num_places,
        *source_keys.stride(),
        *source_values.stride(),
        *slots.stride(),
        *key_pool.stride(),
        *value_pool.stride(),
        *places.stride(),
        TILE=tile,
        HEAD_DIM=head_dim,
        DIM_TILE=dim_tile,
        num_warps=NUM_WARPS,
    )


# Not specialised: how long lists are, and where slices of a step's index tensors begin.
@triton.jit(do_not_specialize=["slots", "places", "num_places", "slots_row", "slots_head", "places_row", "places_head"])
def _copy_tile(
    source_keys,
    source_values,
    slots,
    key_pool,
    value_pool,
    places,
    num_places,
    source_keys_slot,
    source_keys_head,
    source_keys_dim,
    source_values_slot,
    source_values_head,
    source_values_dim,
    slots_row,
    slots_head,
    slots_entry,
    key_pool_slot,
    key_pool_head,
    key_pool_dim,
    value_pool_slot,
    value_pool_head,
    value_pool_dim,
    places_row,
    places_head,
    places_entry,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
):
    """Copy one tile of one list. Arguments named `x_y` are the strides of x along y, in elements."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    entries = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    listed = entries < num_places
    slot = tl.load(slots + row * slots_row + head * slots_head + entries * slots_entry, mask=listed, other=-1)
    if tl.max(slot, axis=0) >= 0:
        place = tl.load(places + row * places_row + head * places_head + entries * places_entry, mask=listed, other=0)
        read, written = slot[:, None], place[:, None]
        dims = tl.arange(0, DIM_TILE)[None, :]
        inside = (read >= 0) & (dims < HEAD_DIM)  # [TILE, D]
        keys = tl.load(
            source_keys + read * source_keys_slot + head * source_keys_head + dims * source_keys_dim, mask=inside
        )
        values = tl.load(
            source_values + read * source_values_slot + head * source_values_head + dims * source_values_dim,
            mask=inside,
        )
        tl.store(key_pool + written * key_pool_slot + head * key_pool_head + dims * key_pool_dim, keys, mask=inside)
        tl.store(
            value_pool + written * value_pool_slot + head * value_pool_head + dims * value_pool_dim, values, mask=inside
        )
