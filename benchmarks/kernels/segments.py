"""Sequences in a KV pool as an engine long in use has them: blocks scattered over the pool. Knows no operation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loopserve.config import BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Of one layer."""

    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128

    def kv_bytes(self, num_tokens: int, dtype: torch.dtype) -> int:
        """Of keys and values of this many tokens."""
        return 2 * num_tokens * self.num_kv_heads * self.head_dim * dtype.itemsize


LLAMA_8B = HeadShape()  # of Llama-3.1-8B, the defaults
TINY = HeadShape(4, 2, 32)


@dataclass(frozen=True, slots=True)
class Sequences:
    """Several sequences of one length in one layer's pools."""

    keys: Tensor  # [S, Hkv, D]
    values: Tensor
    slots: Tensor  # int64 [sequences, N]


def scattered(
    num_sequences: int, num_tokens: int, shape: HeadShape, *, dtype: torch.dtype, device: torch.device, seed: int
) -> Sequences:
    """Pools of random keys and values, just large enough, in which every sequence has blocks of its own at random places."""
    num_blocks = -(-num_tokens // BLOCK_TOKENS)
    generator = torch.Generator(device).manual_seed(seed)
    order = torch.randperm(num_sequences * num_blocks, generator=generator, device=device)
    slots = (order[:, None] * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS, device=device)).view(num_sequences, -1)
    size = (len(order) * BLOCK_TOKENS, shape.num_kv_heads, shape.head_dim)
    keys, values = (torch.randn(size, generator=generator, device=device, dtype=dtype) for _ in range(2))
    return Sequences(keys, values, slots[:, :num_tokens].contiguous())


def random_rows(size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Standard normal."""
    return torch.randn(size, generator=torch.Generator(device).manual_seed(seed), device=device, dtype=dtype)


def measured_dtype(device: torch.device) -> torch.dtype:
    """What kernels are measured in: bfloat16, and float32 where a CPU only tries the code out."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
