"""`store_sketch` in Triton: one launch, a program a token, which packs the signs and averages the sizes of all its heads.

A key lies in the program as bytes of 8 channels, `[Hkv, D / 8, 8]`: signs become a byte by a weighted sum along the last dimension, a
scale by a sum over both. Bytes: each key is read once, its sketch of D / 8 + 2 bytes written once.
Rejected: atomics or shuffles to gather bits, which the sum compiles to anyway where 8 channels lie in one thread, as they do where the
key's last dimension is contiguous; sketching inside `store_kv`, since a pool may be without sketches.
"""

import triton
import triton.language as tl
from torch import Tensor

from loopserve.kernels.sketch import KeySketch
from loopserve.kernels.tiles import cast, is_interpreted, tile_size

# From arithmetic, not measured yet: with 4 warps a thread holds 8 channels of a token of Hkv 8, D 128: one byte of signs.
NUM_WARPS = 4


def store_sketch(key: Tensor, sketch: KeySketch, slots: Tensor) -> None:
    """See the contract in `loopserve.kernels.store_sketch`."""
    num_tokens, num_kv_heads, head_dim = key.shape
    num_bytes = sketch.signs.shape[2]
    if num_tokens == 0:
        return
    _store_token[(num_tokens,)](
        key,
        sketch.signs,
        sketch.scales,
        slots,
        slots.stride(0),
        *key.stride(),
        *sketch.signs.stride(),
        *sketch.scales.stride(),
        NUM_HEADS=num_kv_heads,
        HEADS_TILE=tile_size(num_kv_heads, least=1),
        HEAD_DIM=head_dim,
        NUM_BYTES=num_bytes,
        BYTES_TILE=tile_size(num_bytes, least=1),
        INTERPRETED=is_interpreted(),
        num_warps=NUM_WARPS,
    )


@triton.jit(do_not_specialize=["slots", "slots_token"])
def _store_token(
    key,
    signs,
    scales,
    slots,
    slots_token,
    key_token,
    key_head,
    key_dim,
    signs_slot,
    signs_head,
    signs_byte,
    scales_slot,
    scales_head,
    NUM_HEADS: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_BYTES: tl.constexpr,
    BYTES_TILE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Sketch one token. Arguments named `x_y` are the strides of x along y, in elements."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token * slots_token)
    heads = tl.arange(0, HEADS_TILE).to(tl.int64)
    bytes = tl.arange(0, BYTES_TILE)
    places = tl.arange(0, 8)[None, None, :]
    dims = bytes[None, :, None] * 8 + places
    inside = (heads[:, None, None] < NUM_HEADS) & (dims < HEAD_DIM)  # [Hkv, D / 8, 8]
    channels = tl.load(
        key + token * key_token + heads[:, None, None] * key_head + dims * key_dim, mask=inside, other=0.0
    ).to(tl.float32)
    bits = ((channels >= 0) & inside).to(tl.int32)
    packed = tl.sum(bits << places, axis=2).to(tl.uint8)  # [Hkv, D / 8]
    tl.store(
        signs + slot * signs_slot + heads[:, None] * signs_head + bytes[None, :] * signs_byte,
        packed,
        mask=(heads[:, None] < NUM_HEADS) & (bytes[None, :] < NUM_BYTES),
    )
    total = tl.sum(tl.sum(tl.abs(channels), axis=2), axis=1)  # [Hkv]
    mean = tl.div_rn(total, HEAD_DIM * 1.0)  # a plain quotient may be off by a bit, and then round to another bfloat16
    tl.store(
        scales + slot * scales_slot + heads * scales_head,
        cast(mean, scales.dtype.element_ty, INTERPRETED),
        mask=heads < NUM_HEADS,
    )
