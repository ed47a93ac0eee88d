"""Random pools whose unread slots are poisoned: a kernel that touches one of them returns NaN.

The same tests hold references and kernels against plain mathematics: `LOOPSERVE_KERNELS=kernel TRITON_INTERPRET=1` runs the kernels here,
interpreted, and `LOOPSERVE_TEST_DEVICE=cuda` whatever that device runs.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

DEVICE = os.environ.get("LOOPSERVE_TEST_DEVICE", "cpu")
POOL_SLOTS = 512


@dataclass(frozen=True)
class Pool:
    """A layer's pools with `slots` filled at random and NaN everywhere else."""

    keys: Tensor  # [S, Hkv, D]
    values: Tensor
    slots: Tensor  # int64 [N], scattered


@pytest.fixture(autouse=True)
def fixed_seed_and_device() -> Iterator[None]:
    """A test draws the same numbers alone and among others, and what it makes lies on the device under test."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        yield


def random_numbers(shape: tuple[int, ...], *, seed: int) -> Tensor:
    """Standard normal float32, the same on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu").to(DEVICE)


@pytest.fixture
def make_pool() -> Callable[..., Pool]:
    def make(num_tokens: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> Pool:
        generator = torch.Generator("cpu").manual_seed(num_tokens)
        slots = torch.randperm(POOL_SLOTS, generator=generator, device="cpu")[:num_tokens].to(DEVICE)
        keys, values = (torch.full((POOL_SLOTS, num_kv_heads, head_dim), torch.nan, dtype=dtype) for _ in range(2))
        for seed, pool in enumerate((keys, values), num_tokens):
            pool[slots] = random_numbers((num_tokens, num_kv_heads, head_dim), seed=seed).to(dtype)
        return Pool(keys, values, slots)

    return make


@pytest.fixture
def random_query() -> Callable[..., Tensor]:
    """Queries [R, H, D]; strided ones are what a fused projection's transposed view looks like."""

    def make(
        num_rows: int, num_heads: int, head_dim: int, dtype: torch.dtype = torch.float32, *, strided: bool = False
    ) -> Tensor:
        if strided:
            rows = random_numbers((num_heads, num_rows, 2 * head_dim), seed=num_rows).to(dtype)
            return rows[:, :, :head_dim].transpose(0, 1)
        return random_numbers((num_rows, num_heads, head_dim), seed=num_rows).to(dtype)

    return make
