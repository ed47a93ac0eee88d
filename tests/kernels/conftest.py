"""Random pools whose unread slots are poisoned: a kernel that touches one of them returns NaN."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

POOL_SLOTS = 512


@dataclass(frozen=True)
class Pool:
    """A layer's pools with `slots` filled at random and NaN everywhere else."""

    keys: Tensor  # [S, Hkv, D]
    values: Tensor
    slots: Tensor  # int64 [N], scattered


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """A test draws the same numbers alone and among others."""
    torch.manual_seed(0)


@pytest.fixture
def make_pool() -> Callable[..., Pool]:
    def make(num_tokens: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> Pool:
        generator = torch.Generator().manual_seed(num_tokens)
        slots = torch.randperm(POOL_SLOTS, generator=generator)[:num_tokens]
        keys, values = (torch.full((POOL_SLOTS, num_kv_heads, head_dim), torch.nan, dtype=dtype) for _ in range(2))
        for pool in (keys, values):
            pool[slots] = torch.randn((num_tokens, num_kv_heads, head_dim), generator=generator).to(dtype)
        return Pool(keys, values, slots)

    return make


@pytest.fixture
def random_query() -> Callable[..., Tensor]:
    """Queries [R, H, D]; strided ones are what a fused projection's transposed view looks like."""

    def make(
        num_rows: int, num_heads: int, head_dim: int, dtype: torch.dtype = torch.float32, *, strided: bool = False
    ) -> Tensor:
        generator = torch.Generator().manual_seed(num_rows)
        if strided:
            return (
                torch.randn((num_heads, num_rows, 2 * head_dim), generator=generator)
                .to(dtype)[:, :, :head_dim]
                .transpose(0, 1)
            )
        return torch.randn((num_rows, num_heads, head_dim), generator=generator).to(dtype)

    return make
