"""Owns what an engine keeps on its device beside the model, to the byte, before any of it is allocated.

The engine's own rooms are built on torch's `meta` device, where tensors have sizes and no memory, so nothing here repeats their arithmetic.
Only what a turn's selection keeps is written down again; a test and every measured run hold it against the real one. What a step
needs on its way and gives back is not kept, and not counted here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from loopserve.config import DecodeSparsity, EngineConfig
from loopserve.kv.stage import Stage
from loopserve.kv.store import block_bytes
from loopserve.loading import LoadedModel
from loopserve.reads import num_places
from loopserve.runner import ModelRunner, bytes_a_block
from loopserve.sparsity import DECODE_METHODS
from loopserve.sparsity.decode import TurnSelection

_META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes on the device, by what they are for."""

    pool: int  # keys, values and sketches of device blocks
    host_sketches: int  # of what lies in host memory
    tables: int  # slots, value sums and places of all turns
    stage: int  # one layer of the longest conversation
    selections: int  # of all turns: newest queries, and what was chosen at the prefill's end

    @property
    def total(self) -> int:
        """All of it."""
        return self.pool + self.host_sketches + self.tables + self.stage + self.selections


def kept(loaded: LoadedModel, config: EngineConfig, *, sparse: bool, longest_tokens: int) -> Kept:
    """What `config.max_running_turns` turns in decode and their engine keep; `kv_blocks` and `host_blocks` must be set.

    `sparse`: all turns decode on a selection. `longest_tokens`: of any conversation whose history is read from host memory.
    """
    assert config.kv_blocks is not None and config.host_blocks is not None, "sizes are given, not found"
    on_meta = replace(loaded, device=_META)
    with _META:  # the host's tensors, too
        runner = ModelRunner(on_meta, config, num_blocks=config.kv_blocks, num_host_blocks=config.host_blocks)
        stage = 0
        if config.host_blocks:
            grown = Stage(runner.store)
            grown.keys_and_values(0, (), longest_tokens)
            stage = grown.device_bytes
    pool = config.kv_blocks * bytes_a_block(loaded, config)
    host_sketches = runner.store.device_bytes - pool
    turns = config.max_running_turns if sparse else 0
    return Kept(
        pool=pool,
        host_sketches=host_sketches,
        tables=runner.device_bytes - runner.store.device_bytes,
        stage=stage,
        selections=turns * planned_selection_bytes(loaded, config.decode),
    )


def planned_selection_bytes(loaded: LoadedModel, decode: DecodeSparsity) -> int:
    """What one turn's selection will keep while it decodes on a context that is longer than its budget.

    The rings of its newest queries, and sinks and tokens that it chose at the prefill's end, int64 for each layer and list.
    """
    fresh = TurnSelection(
        loaded.num_layers,
        loaded.num_heads,
        loaded.num_kv_heads,
        loaded.head_dim,
        decode,
        DECODE_METHODS[decode.method],
        device="cpu",
        dtype=loaded.dtype,
    )
    num_lists = loaded.num_kv_heads if decode.select_per == "kv_head" else loaded.num_heads
    num_layers = loaded.num_layers - len(set(decode.dense_layers))
    return fresh.device_bytes + num_layers * num_lists * num_places(decode) * 8


def host_block_bytes(loaded: LoadedModel) -> int:
    """Bytes of one block in host memory: its keys and values; what sketches there are of them lies on the device."""
    return block_bytes(
        num_layers=loaded.num_layers,
        num_kv_heads=loaded.num_kv_heads,
        head_dim=loaded.head_dim,
        dtype=loaded.dtype,
    )


def most_blocks(
    loaded: LoadedModel, config: EngineConfig, *, sparse: bool, longest_tokens: int, bytes_max: int
) -> int | None:
    """The largest `kv_blocks` with which all that is kept fits into `bytes_max`; None where not even two blocks do."""

    def total(num_blocks: int) -> int:
        sized = replace(config, kv_blocks=num_blocks)
        return kept(loaded, sized, sparse=sparse, longest_tokens=longest_tokens).total

    low, high = 2, max(2, bytes_max // bytes_a_block(loaded, config))
    if total(low) > bytes_max:
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if total(middle) <= bytes_max else (low, middle - 1)
    return low
