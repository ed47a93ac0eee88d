"""Reads from a KV pool by slot, for the references. Knows nothing about which slots are worth reading."""

from torch import Tensor


def gather_head(pool: Tensor, slots: Tensor, *, head: int) -> Tensor:
    """One KV head of the given slots, copied: pool [S, Hkv, D], slots int64 [N] -> [N, D]."""
    return pool[:, head].index_select(0, slots)
