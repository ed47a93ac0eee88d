"""Hop 8: what one layer does with a step's rows, and the socket through which stock models call it.

`transformers` models hand every layer's queries, keys and values to `plan_attention`, with the step's `AttentionPlan` by keyword.
The plan is built once a step by the runner and read by every layer. Nothing here is kept between steps but what the plan's
`TurnSelection`s keep for their turns. Knows nothing about turns, sessions or scheduling.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from transformers import AttentionInterface

from loopserve.config import PrefillSparsity
from loopserve.dialogue import TurnId
from loopserve.kernels.paged_decode import paged_decode
from loopserve.kernels.store_kv import store_kv
from loopserve.kv.store import KVStore
from loopserve.plan import SegmentQuality, SparsePrefill
from loopserve.sparsity import PrefillMethod
from loopserve.sparsity.decode import TurnSelection
from loopserve.sparsity.prefill import attend

SOCKET_NAME = "loopserve"


@dataclass(slots=True)
class Measured:
    """What sparsity measured in one segment, over the layers so far. Stays on the device until the step is over."""

    coverage: list[torch.Tensor] = field(default_factory=list)  # a layer each: float32 [heads]
    cells_computed: list[torch.Tensor] = field(default_factory=list)  # a layer each: int64 []
    dense_heads: list[torch.Tensor] = field(default_factory=list)  # a layer each: int64 []
    cells_total: int = 0

    def summed(self, turn_id: TurnId) -> SegmentQuality:
        """Bring the sums to the host."""
        coverage = torch.cat(self.coverage).float() if self.coverage else torch.empty(0)
        return SegmentQuality(
            turn_id=turn_id,
            coverage_sum=float(coverage.sum()),
            coverage_count=coverage.numel(),
            coverage_worst=float(coverage.min()) if coverage.numel() else 1.0,
            cells_computed=int(torch.stack(self.cells_computed).sum()) if self.cells_computed else 0,
            cells_total=self.cells_total,
            dense_heads=int(torch.stack(self.dense_heads).sum()) if self.dense_heads else 0,
        )


@dataclass(frozen=True, slots=True)
class PrefillRows:
    """The rows of one prefill chunk. `slots` int64 [N]: where columns 0..N-1 lie, the chunk's own included."""

    turn_id: TurnId
    rows: slice
    slots: torch.Tensor
    start: int  # position of the first row
    order: SparsePrefill | None  # None: dense
    capture: TurnSelection | None  # keeps the last rows' queries for the decode that follows
    measured: Measured | None


@dataclass(frozen=True, slots=True)
class DenseDecodeRows:
    """Decode rows that read their whole context. Contexts in one group are of like length, so padding wastes little."""

    rows: torch.Tensor  # int64 [R]
    slots: torch.Tensor  # int64 [R, 1, M]
    valid: torch.Tensor | None  # bool [R, 1, M]; None: no padding


@dataclass(frozen=True, slots=True)
class SparseDecodeRow:
    """One decode row with a token selection."""

    turn_id: TurnId
    row: int
    slots: torch.Tensor  # int64 [N], the row's own token included
    selection: TurnSelection
    budget_tokens: int
    refresh: bool
    dense: bool  # keep the selection up, but read everything
    measured: Measured


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """All that a layer needs to know of one step; rows are those of the packed forward."""

    store: KVStore
    write_slots: torch.Tensor  # int64 [T]: where each row's key and value go
    prefills: Sequence[PrefillRows]
    dense_decodes: Sequence[DenseDecodeRows]
    sparse_decodes: Sequence[SparseDecodeRow]
    prefill_config: PrefillSparsity
    prefill_method: PrefillMethod
    dense_layers: frozenset[int]


def plan_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, H, T, D]
    key: torch.Tensor,  # [1, Hkv, T, D]
    value: torch.Tensor,  # [1, Hkv, T, D]
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    attention_plan: AttentionPlan,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Store the step's keys and values, then attend as planned. Returns `[1, T, H, D]`; mutates the plan's store."""
    assert attention_mask is None, "the plan says who reads what; a mask would be ignored"
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [T, heads, D]
    key_pool, value_pool = attention_plan.store.keys[layer], attention_plan.store.values[layer]
    store_kv(keys, values, key_pool, value_pool, attention_plan.write_slots)

    output = torch.empty_like(queries, memory_format=torch.contiguous_format)
    for group in attention_plan.dense_decodes:
        rows = queries.index_select(0, group.rows)
        output[group.rows] = paged_decode(rows, key_pool, value_pool, group.slots, group.valid, scale=scaling)
    for prefill in attention_plan.prefills:
        chunk = queries[prefill.rows]
        if prefill.order is None or layer in attention_plan.dense_layers:
            output[prefill.rows] = _dense_prefill(chunk, key_pool, value_pool, prefill, scale=scaling)
        else:
            output[prefill.rows] = _sparse_prefill(chunk, key_pool, value_pool, prefill, attention_plan, scale=scaling)
        if prefill.capture is not None:
            positions = torch.arange(prefill.start, prefill.start + chunk.shape[0], device=chunk.device)
            prefill.capture.record(layer, chunk, positions)
    for decode in attention_plan.sparse_decodes:
        row = queries[decode.row : decode.row + 1]
        is_dense = decode.dense or layer in attention_plan.dense_layers
        output[decode.row] = _sparse_decode(row, key_pool, value_pool, decode, layer, is_dense=is_dense, scale=scaling)[
            0
        ]
    return output.unsqueeze(0), None


def _dense_prefill(
    queries: torch.Tensor,  # [r, H, D]
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    prefill: PrefillRows,
    *,
    scale: float,
) -> torch.Tensor:
    num_rows, num_columns = queries.shape[0], prefill.slots.shape[0]
    keys = key_pool.index_select(0, prefill.slots).transpose(0, 1)  # [Hkv, N, D]
    values = value_pool.index_select(0, prefill.slots).transpose(0, 1)
    mask = None
    if prefill.start > 0 and num_rows > 1:
        mask = torch.ones(num_rows, num_columns, dtype=torch.bool, device=queries.device).tril(prefill.start)
    output = F.scaled_dot_product_attention(
        queries.transpose(0, 1).unsqueeze(0),
        keys.unsqueeze(0),
        values.unsqueeze(0),
        attn_mask=mask,
        is_causal=prefill.start == 0,
        scale=scale,
        enable_gqa=True,
    )
    return output[0].transpose(0, 1)  # [r, H, D]


def _sparse_prefill(
    queries: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    prefill: PrefillRows,
    plan: AttentionPlan,
    *,
    scale: float,
) -> torch.Tensor:
    assert prefill.order is not None and prefill.measured is not None, "a sparse chunk has an order and an account"
    outcome = attend(
        queries,
        key_pool,
        value_pool,
        prefill.slots,
        start=prefill.start,
        order=prefill.order,
        config=plan.prefill_config,
        method=plan.prefill_method,
        scale=scale,
    )
    if outcome.coverage is not None:
        prefill.measured.coverage.append(outcome.coverage)
    prefill.measured.cells_computed.append(outcome.cells_computed)
    prefill.measured.dense_heads.append(outcome.dense_heads)
    prefill.measured.cells_total += outcome.cells_total
    return outcome.output


def _sparse_decode(
    query: torch.Tensor,  # [1, H, D]
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    decode: SparseDecodeRow,
    layer: int,
    *,
    is_dense: bool,
    scale: float,
) -> torch.Tensor:
    num_tokens = decode.slots.shape[0]
    position = torch.tensor([num_tokens - 1], device=query.device)
    decode.selection.record(layer, query, position)
    if decode.refresh:
        coverage = decode.selection.refresh(
            layer, key_pool, decode.slots, budget_tokens=decode.budget_tokens, scale=scale
        )
        if coverage is not None:
            decode.measured.coverage.append(coverage)
    if is_dense:
        return paged_decode(query, key_pool, value_pool, decode.slots[None, None], None, scale=scale)
    columns, valid = decode.selection.kept_columns(layer, num_tokens)
    slots = decode.slots[columns].unsqueeze(0)  # [1, Hs, M]
    return paged_decode(query, key_pool, value_pool, slots, valid.unsqueeze(0), scale=scale)


def register_socket() -> None:
    """Make `attn_implementation="loopserve"` known to transformers. Idempotent; the registered function keeps no state."""
    AttentionInterface.register(SOCKET_NAME, plan_attention)
