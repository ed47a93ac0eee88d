"""Contract of `store_kv`: new keys and values enter their slots."""

import torch
from torch import Tensor

from loopserve.kernels.dispatch import implementation


def store_kv(key: Tensor, value: Tensor, key_pool: Tensor, value_pool: Tensor, slots: Tensor) -> None:
    """Write token t's key and value into slot `slots[t]` of both pools. Mutates the pools.

    key, value [T, Hkv, D] in the pools' dtype, any strides; key_pool, value_pool [S, Hkv, D]; slots int64 [T], each in [0, S).
    Where two tokens name one slot (padding does), which of them stays is not defined.
    """
    assert key.shape == value.shape and key_pool.shape == value_pool.shape, "keys and values come in pairs"
    assert key.shape[1:] == key_pool.shape[1:], "new tokens and pool differ in heads or head dim"
    assert key.dtype == value.dtype == key_pool.dtype == value_pool.dtype, "storing never converts"
    assert slots.dtype == torch.int64 and slots.shape == key.shape[:1], "one int64 slot a token"
    implementation("store_kv", key_pool.device.type)(key, value, key_pool, value_pool, slots)
