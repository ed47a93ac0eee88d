"""One layer of one sequence, put together on the device while parts of it lie in host memory: how a prefill reads a long history.

Floor 2 beside the store. Every layer is brought into the same buffer, so a history takes one layer's room on the device, not all of
them. Knows nothing about who reads it.
"""

from collections.abc import Iterator, Sequence

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

    def keys(self, layer: int, stretches: Sequence[Stretch], num_tokens: int) -> Tensor:
        """The keys alone of the first `num_tokens` N of a sequence, [N, Hkv, D], in the order of their positions."""
        self._grow(num_tokens)
        for first, (keys, _) in self._parts(layer, stretches, num_tokens):
            self._keys[first : first + len(keys)].copy_(keys, non_blocking=True)
        return self._keys[:num_tokens]

    def keys_and_values(self, layer: int, stretches: Sequence[Stretch], num_tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values, shaped and ordered as `keys` gives them."""
        brought = self.keys(layer, stretches, num_tokens)
        for first, (_, values) in self._parts(layer, stretches, num_tokens):
            self._values[first : first + len(values)].copy_(values, non_blocking=True)
        return brought, self._values[:num_tokens]

    def _parts(
        self, layer: int, stretches: Sequence[Stretch], num_tokens: int
    ) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """Where each stretch begins, and its keys and values where they lie."""
        for stretch in stretches:
            length = min(stretch.num_tokens, num_tokens - stretch.first_token)
            if length > 0:
                yield stretch.first_token, self._store.slots(layer, stretch.first_slot, length)

    def _grow(self, num_tokens: int) -> None:
        if self._keys.shape[0] >= num_tokens:
            return
        room = -(-num_tokens // _ROOM_TOKENS) * _ROOM_TOKENS
        shape = self._keys.shape[1:]
        self._keys, self._values = (
            torch.empty((room, *shape), dtype=self._keys.dtype, device=self._keys.device) for _ in range(2)
        )
