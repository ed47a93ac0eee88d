"""What a sketch of keys is: one sign a channel, packed, and one scale a token and head. Knows nothing about when it is written or read.

A key k [D] is kept as the bits of k >= 0 (channel d in bit d % 8 of byte d // 8) and as s = mean |k_d|, and stands for s * (+1 or -1) in
every channel: of all such vectors this is the nearest to k. In bytes that is (D / 8 + 2) of the 4 D that a key and its value take in
16 bits.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

SCALE_DTYPE = torch.bfloat16  # two bytes with the range of float32


@dataclass(frozen=True, slots=True)
class KeySketch:
    """The sketches of one layer's pool of keys [S, Hkv, D]."""

    signs: Tensor  # uint8 [S, Hkv, ceil(D / 8)]
    scales: Tensor  # SCALE_DTYPE [S, Hkv]

    @classmethod
    def empty(cls, num_slots: int, num_kv_heads: int, head_dim: int, device: torch.device | str) -> "KeySketch":
        """Of as many slots, zeroed."""
        return cls(
            torch.zeros((num_slots, num_kv_heads, sign_bytes(head_dim)), dtype=torch.uint8, device=device),
            torch.zeros((num_slots, num_kv_heads), dtype=SCALE_DTYPE, device=device),
        )


def sign_bytes(head_dim: int) -> int:
    """Bytes that the signs of one key take."""
    return -(-head_dim // 8)


def sketch_bytes(head_dim: int) -> int:
    """Bytes that the sketch of one key takes."""
    return sign_bytes(head_dim) + SCALE_DTYPE.itemsize


def check_sketch(query: Tensor, sketch: KeySketch) -> None:
    """Assert that rows [R, H, D] can be weighed by a sketch."""
    assert query.dim() == 3 and sketch.signs.dtype == torch.uint8, "queries [R, H, D], signs in bytes"
    assert sketch.signs.shape[2] == sign_bytes(query.shape[2]), "head dims differ"
    assert sketch.signs.shape[:2] == sketch.scales.shape, "a scale for every slot and head"
    assert query.shape[1] % sketch.signs.shape[1] == 0, "query heads are no multiple of KV heads"


def sketched_products(query: Tensor, sketch: KeySketch, keys: Tensor) -> Tensor:
    """Products of query rows and what sketches stand for, float32: query [L, G, D], keys int64 [L, N] -> [L, G, N].

    Key slot * Hkv + head is that of one slot and KV head. For the references: nothing is unpacked, a byte of signs picks its eight
    channels' part of a product from a table of the list's own.
    """
    num_lists, num_heads, head_dim = query.shape
    num_bytes = sketch.signs.shape[2]
    channels = functional.pad(query.float(), (0, 8 * num_bytes - head_dim)).view(num_lists, num_heads, num_bytes, 8)
    parts = (channels @ _signs_of_bytes(query.device).T).permute(0, 2, 3, 1)  # [L, bytes, 256, G]
    first = (
        torch.arange(num_lists * num_bytes, dtype=torch.int32, device=query.device).view(num_lists, 1, num_bytes) * 256
    )
    listed = keys.flatten()
    picked = sketch.signs.flatten(0, 1).index_select(0, listed).view(*keys.shape, num_bytes) + first
    products = functional.embedding_bag(picked.flatten(0, 1), parts.flatten(0, 2).contiguous(), mode="sum")  # [L N, G]
    scales = sketch.scales.flatten().index_select(0, listed).float().view(num_lists, 1, keys.shape[1])
    return products.view(*keys.shape, num_heads).transpose(1, 2).contiguous().mul_(scales)


@functools.cache
def _signs_of_bytes(device: torch.device) -> Tensor:
    """The eight signs that each byte stands for, float32 [256, 8]."""
    byte, bit = torch.arange(256, device=device), torch.arange(8, device=device)
    return ((byte[:, None] >> bit) & 1).float() * 2 - 1
