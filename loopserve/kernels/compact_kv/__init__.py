"""Contract of `compact_kv`: chosen tokens of each KV head are copied into places of another pool, or of the same one."""

import torch
from torch import Tensor

from loopserve.kernels.dispatch import implementation


def compact_kv(
    source_keys: Tensor, source_values: Tensor, slots: Tensor, key_pool: Tensor, value_pool: Tensor, places: Tensor
) -> None:
    """Copy head h of source token `slots[r, h, m]` into head h of slot `places[r, h, m]` of both pools. Mutates the pools.

    source_keys, source_values [Ss, Hkv, D] and key_pool, value_pool [S, Hkv, D], all of one dtype, any strides; slots int64
    [R, Hkv, M], each in [0, Ss), or -1: nothing is copied; places int64 [R, Hkv, M], each in [0, S), or anything where `slots` is -1.
    Nothing else in the pools changes, so one call may fill a working set of M tokens a KV head, or bring in only what is new to it.

    Where two copies of one head name one place, which of them stays is not defined. Source and pools may be the same tensors; where one
    call then reads and writes the same head of a slot, what it read is not defined.

    Pools, slots and places lie on one device, the source there or in host memory, which must be pinned where the device is CUDA: kernels
    read it where it lies, and Triton refuses other memory with a ValueError. They read it in their queue's order, after the call returned:
    until then the host neither frees nor writes these tokens. What a kernel launches follows from shapes and waits for nothing, so it may
    be captured; the reference waits for the device.
    """
    assert source_keys.shape == source_values.shape and key_pool.shape == value_pool.shape, (
        "keys and values come in pairs"
    )
    assert source_keys.dim() == key_pool.dim() == 3, "source and pools are [slots, Hkv, D]"
    assert source_keys.shape[1:] == key_pool.shape[1:], "source and pools differ in heads or head dim"
    assert source_keys.dtype == source_values.dtype == key_pool.dtype == value_pool.dtype, "copying never converts"
    assert slots.dtype == places.dtype == torch.int64, "slots and places are int64"
    assert slots.shape == places.shape, "one place a slot"
    assert slots.dim() == 3 and slots.shape[1] == key_pool.shape[1], "slots are [R, Hkv, M], a list a KV head"
    assert value_pool.device == slots.device == places.device == key_pool.device, "pools, slots and places lie apart"
    assert source_keys.device == source_values.device, "source keys and values lie apart"
    assert source_keys.device in (key_pool.device, torch.device("cpu")), (
        "the source lies beside the pools or on the host"
    )
    implementation("compact_kv", key_pool.device.type)(source_keys, source_values, slots, key_pool, value_pool, places)
