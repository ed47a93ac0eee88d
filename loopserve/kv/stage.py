"""One layer of one sequence, put together on the device while parts of it lie in host memory: how a prefill reads a long history.

Floor 2 beside the store. Every layer is brought into the same buffer, so a history takes one layer's room on the device, not all of
them. Knows nothing about who reads it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from loopserve.kv.store import KVStore, Stretch

_ROOM_TOKENS = 1024  # the buffer grows by so many


class Stage:
    """The buffer, as long as the longest sequence that needed it. What it gives is overwritten by the next call."""

    def __init__(self, store: KVStore) -> None:
        self._store = store
        shape = store.keys[0].shape[1:]
        self._keys, self._values = (store.keys[0].new_empty((0, *shape)) for _ in range(2))

    @property
    def device_bytes(self) -> int:
        """What the buffer takes now."""
        return self._keys.nbytes + self._values.nbytes

    def keys_and_values(self, layer: int, stretches: Sequence[Stretch], num_tokens: int) -> tuple[Tensor, Tensor]:
        """The first `num_tokens` N of a sequence, keys and values [N, Hkv, D] each, in the order of their positions."""
        self._grow(num_tokens)
        for stretch in stretches:
            first = stretch.first_token
            length = min(stretch.num_tokens, num_tokens - first)
            if length <= 0:
                continue
            keys, values = self._store.slots(layer, stretch.first_slot, length)
            self._keys[first : first + length].copy_(keys, non_blocking=True)
            self._values[first : first + length].copy_(values, non_blocking=True)
        return self._keys[:num_tokens], self._values[:num_tokens]

    def _grow(self, num_tokens: int) -> None:
        if self._keys.shape[0] >= num_tokens:
            return
        room = -(-num_tokens // _ROOM_TOKENS) * _ROOM_TOKENS
        shape = self._keys.shape[1:]
        self._keys, self._values = (
            torch.empty((room, *shape), dtype=self._keys.dtype, device=self._keys.device) for _ in range(2)
        )
