"""What a sketch of keys is: one sign a channel, packed, and one scale a token and head. Knows nothing about when it is written or read.

A key k [D] is kept as the bits of k >= 0 (channel d in bit d % 8 of byte d // 8) and as s = mean |k_d|, and stands for s * (+1 or -1) in
every channel: of all such vectors this is the nearest to k. In bytes that is (D / 8 + 2) of the 4 D that a key and its value take in
16 bits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

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


def sketched_keys(sketch: KeySketch, slots: Tensor, *, head: int, head_dim: int) -> Tensor:
    """What the sketches of one KV head stand for, float32: slots int64 [N] -> [N, D]. For the references: signs through a table."""
    byte = torch.arange(256, device=slots.device)[:, None]
    table = ((byte >> torch.arange(8, device=slots.device)) & 1).float() * 2 - 1  # [256, 8]
    signs = table[sketch.signs[:, head].index_select(0, slots).long()].flatten(1)[:, :head_dim]
    return signs * sketch.scales[:, head].index_select(0, slots).float()[:, None]
