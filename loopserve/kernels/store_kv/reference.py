"""`store_kv` in plain torch."""

from torch import Tensor


def store_kv(key: Tensor, value: Tensor, key_pool: Tensor, value_pool: Tensor, slots: Tensor) -> None:
    """See the contract in `loopserve.kernels.store_kv`."""
    key_pool.index_copy_(0, slots, key)
    value_pool.index_copy_(0, slots, value)
