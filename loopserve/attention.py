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
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface

from loopserve.config import DecodeSparsity, PrefillSparsity
from loopserve.dialogue import TurnId
from loopserve.kernels.paged_decode import paged_decode
from loopserve.kernels.store_kv import store_kv
from loopserve.kernels.store_sketch import store_sketch
from loopserve.kv.stage import Stage
from loopserve.kv.store import KVStore, Stretch
from loopserve.kv.working_set import WorkingSets
from loopserve.methods import DECODE_RULES
from loopserve.plan import CaptureOrder, SegmentQuality, SparseDecode, SparsePrefill
from loopserve.sparsity import PREFILL_METHODS
from loopserve.sparsity.by_sketch import RankedRows, attend_ranked
from loopserve.sparsity.decode import TurnSelection
from loopserve.sparsity.prefill import attend
from loopserve.transfer import on_device

SOCKET_NAME = "loopserve"


@dataclass(slots=True)
class Measured:
    """What sparsity measured in one segment, over the layers so far. Stays on the device until the step is over."""

    coverage: list[torch.Tensor] = field(default_factory=list)  # a layer each: float32 [heads]
    cells_computed: list[torch.Tensor] = field(default_factory=list)  # a layer each: int64 []
    dense_heads: list[torch.Tensor] = field(default_factory=list)  # a layer each: int64 []
    cells_total: int = 0

    def reduced(self) -> torch.Tensor | None:
        """The sums on the device, float64 [4]: coverage, its least, cells, dense heads; None where nothing was measured."""
        if not self.coverage and not self.cells_computed:
            return None
        device = (self.coverage or self.cells_computed)[0].device
        coverage = torch.cat(self.coverage) if self.coverage else torch.ones(1, device=device)
        cells = torch.stack(self.cells_computed).sum() if self.cells_computed else coverage.new_zeros(())
        dense = torch.stack(self.dense_heads).sum() if self.dense_heads else coverage.new_zeros(())
        return torch.stack([part.double() for part in (coverage.double().sum(), coverage.min(), cells, dense)])

    def quality(self, turn_id: TurnId, reduced: Sequence[float] | None) -> SegmentQuality:
        """What `reduced` is as a record, once it is on the host."""
        if reduced is None:
            return SegmentQuality(turn_id)
        count = sum(part.numel() for part in self.coverage)
        total, least, cells, dense = reduced
        return SegmentQuality(
            turn_id=turn_id,
            coverage_sum=total if count else 0.0,
            coverage_count=count,
            coverage_worst=least,
            cells_computed=int(cells),
            cells_total=self.cells_total,
            dense_heads=int(dense),
        )


@dataclass(frozen=True, slots=True)
class LayerView:
    """One layer's keys and values of columns 0..N-1 of one sequence: pools, and where in them the columns lie."""

    keys: torch.Tensor  # [S, Hkv, D]
    values: torch.Tensor
    slots: torch.Tensor  # int64 [N]
    run_start: int | None

    def by_head(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as [1, Hkv, N, D]: views of a run, else gathered copies."""
        keys, values = (self._read(pool) for pool in (self.keys, self.values))
        return keys, values

    def _read(self, pool: torch.Tensor) -> torch.Tensor:
        run, tokens = self.run_start, self.slots.shape[0]
        # Gathered, whole tokens are read: longer contiguous reads.
        by_token = pool.index_select(0, self.slots) if run is None else pool.narrow(0, run, tokens)
        return by_token.transpose(0, 1).unsqueeze(0)


@dataclass(frozen=True, slots=True)
class Context:
    """Where columns 0..N-1 of one sequence lie, the step's own tokens included."""

    slots: torch.Tensor  # int64 [N], on either tier
    run_start: int | None  # the first slot, where the slots follow each other and a view is worth having
    stretches: tuple[Stretch, ...] = ()  # of a context that lies partly in host memory

    @property
    def is_far(self) -> bool:
        """Whether some of it lies in host memory."""
        return bool(self.stretches)

    def view(self, plan: "AttentionPlan", layer: int) -> LayerView:
        """What a layer reads of all columns; of a far context until the next one is read."""
        if not self.is_far:
            return LayerView(plan.store.keys[layer], plan.store.values[layer], self.slots, self.run_start)
        assert plan.stage is not None, "a far context is read through the stage"
        keys, values = plan.stage.keys_and_values(layer, self.stretches, self.slots.shape[0])
        return LayerView(keys, values, torch.arange(len(keys), device=keys.device), 0)

    def keys(self, plan: "AttentionPlan", layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys for scoring, [S, Hkv, D], and where in them the columns lie, int64 [N]; see `view`."""
        if not self.is_far:
            return plan.store.keys[layer], self.slots
        assert plan.stage is not None, "a far context is read through the stage"
        keys = plan.stage.keys(layer, self.stretches, self.slots.shape[0])
        return keys, torch.arange(len(keys), device=keys.device)


@dataclass(frozen=True, slots=True)
class RunGroup:
    """Decode rows that read their whole contexts, which are runs at equal distances: one strided view holds them all.

    The view is as long as the longest context; what shorter ones do not own is masked by `bias`. It may hold other sequences' keys and
    values, so the store keeps finite numbers only: a weight of 0 times a number is 0, times NaN it is not.
    """

    first_slot: int
    spacing_slots: int
    num_rows: int
    num_tokens: int  # M, of the longest context
    bias: torch.Tensor | None  # [R, 1, 1, M], 0 or -inf; None: all contexts are as long

    def read(self, pool: torch.Tensor) -> torch.Tensor:
        """The contexts' rows of a pool `[S, Hkv, D]`, as a view `[R, Hkv, M, D]`."""
        _, num_kv_heads, head_dim = pool.shape
        token = num_kv_heads * head_dim
        return pool.as_strided(
            (self.num_rows, num_kv_heads, self.num_tokens, head_dim),
            (self.spacing_slots * token, head_dim, token, 1),
            self.first_slot * token,
        )


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Decode rows that read their whole context through slots. Like lengths are grouped, so padding wastes little."""

    rows: slice
    slots: torch.Tensor  # int64 [R, 1, M]
    valid: torch.Tensor | None  # bool [R, 1, M]; None: no padding


@dataclass(frozen=True, slots=True)
class FarRows:
    """Decode rows whose turns are compact."""

    working_sets: WorkingSets
    turn_rows: torch.Tensor  # int64 [R], of the turn table
    contexts: Sequence[Context]  # of each row
    recalls_late: bool


@dataclass(frozen=True, slots=True)
class RankedGroup:
    """Decode rows that rank all tokens by sketches, each for itself; what they read is never known to the host."""

    rows: slice
    ranked: RankedRows
    turn_rows: torch.Tensor  # int64 [R], of the turn table
    config: DecodeSparsity
    measured: Sequence[Measured]  # of the first rows
    far: FarRows | None = None  # None: all contexts are on the device


@dataclass(frozen=True, slots=True)
class SparseDecodeRow:
    """One decode row with a token selection."""

    row: int
    context: Context
    selection: TurnSelection
    order: SparseDecode
    measured: Measured
    far: FarRows | None = None  # this row alone; None: the context is on the device


@dataclass(frozen=True, slots=True)
class SummedRows:
    """Decode rows whose values are added to their turns' sums when they are stored."""

    rows: slice
    turn_rows: torch.Tensor  # int64 [R]
    sums: torch.Tensor  # float32 [turn rows, L, Hkv, D]


@dataclass(frozen=True, slots=True)
class PrefillRows:
    """The rows of one prefill chunk."""

    rows: slice
    context: Context
    start: int  # position of the first row
    order: SparsePrefill | None  # None: dense
    capture: CaptureOrder | None
    selection: TurnSelection | None  # of a captured chunk: keeps the rows' queries, and chooses
    measured: Measured | None
    causal_bias: torch.Tensor | None  # of a dense chunk, see `causal_bias`


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """All that a layer needs to know of one step. The packed rows are laid out in this order, without gaps:

    |<- run_groups ->|<- decode_groups ->|<- ranked_groups ->|<- sparse_decodes, a row each ->|<- prefills ->|
                                         |<------------------- summed ------------------------>|
    """

    store: KVStore
    write_slots: torch.Tensor  # int64 [T]: where each row's key and value go
    run_groups: Sequence[RunGroup]
    decode_groups: Sequence[DecodeGroup]
    ranked_groups: Sequence[RankedGroup]
    sparse_decodes: Sequence[SparseDecodeRow]
    prefills: Sequence[PrefillRows]
    summed: SummedRows | None
    prefill_config: PrefillSparsity
    dense_layers: frozenset[int]
    stage: Stage | None = None  # where there is a host tier


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
    plan, layer = attention_plan, int(module.layer_idx)  # type: ignore[arg-type]
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [T, heads, D]
    key_pool, value_pool = plan.store.keys[layer], plan.store.values[layer]
    keys, values = keys.nan_to_num(), values.nan_to_num()  # finite: see RunGroup
    store_kv(keys, values, key_pool, value_pool, plan.write_slots)
    if plan.store.sketches:
        store_sketch(keys, plan.store.sketches[layer], plan.write_slots)
    if plan.summed is not None:
        new = values[plan.summed.rows].float()
        plan.summed.sums[:, layer].index_add_(0, plan.summed.turn_rows, new)

    pieces = _run_decodes(queries, plan, key_pool, value_pool, scale=scaling)
    for group in plan.decode_groups:
        rows = queries[group.rows]
        pieces.append(paged_decode(rows, key_pool, value_pool, group.slots, group.valid, scale=scaling))
    pieces.extend(_ranked_decode(queries, plan, group, layer, scale=scaling) for group in plan.ranked_groups)
    pieces.extend(_sparse_decode(queries, plan, decode, layer, scale=scaling) for decode in plan.sparse_decodes)
    pieces.extend(_prefill(queries[prefill.rows], plan, prefill, layer, scale=scaling) for prefill in plan.prefills)
    output = pieces[0] if len(pieces) == 1 else torch.cat(pieces)  # [T, H, D]
    return output.unsqueeze(0), None


def causal_bias(num_rows: int, start: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """What to add to the scores of `num_rows` rows from position `start` on: 0, or -inf to the right of the diagonal.

    None where no bias is needed. Additive, because torch would make it so from a boolean mask again in every layer; on CUDA it only says
    where the diagonal lies, which flash attention knows without reading a mask.
    """
    if start == 0 or num_rows == 1:
        return None
    if device.type == "cuda":
        lower_right: torch.Tensor = causal_lower_right(num_rows, start + num_rows)
        return lower_right
    bias = torch.full((num_rows, start + num_rows), float("-inf"), dtype=dtype, device=device)
    return bias.triu_(start + 1)  # [r, N]


def _run_decodes(
    queries: torch.Tensor, plan: AttentionPlan, key_pool: torch.Tensor, value_pool: torch.Tensor, *, scale: float
) -> list[torch.Tensor]:
    _, num_heads, head_dim = queries.shape
    pieces = []
    first_row = 0
    for group in plan.run_groups:
        rows = queries[first_row : first_row + group.num_rows]
        # The G query heads of a group are query rows over its one KV head: nothing is repeated.
        grouped = rows.reshape(group.num_rows, key_pool.shape[1], -1, head_dim)  # [R, Hkv, G, D]
        attended = F.scaled_dot_product_attention(
            grouped, group.read(key_pool), group.read(value_pool), attn_mask=group.bias, scale=scale
        )
        pieces.append(attended.reshape(group.num_rows, num_heads, head_dim))
        first_row += group.num_rows
    return pieces


def _ranked_decode(
    queries: torch.Tensor, plan: AttentionPlan, group: RankedGroup, layer: int, *, scale: float
) -> torch.Tensor:
    query, ranked = queries[group.rows], group.ranked
    key_pool, value_pool = plan.store.keys[layer], plan.store.values[layer]
    if layer in plan.dense_layers:
        valid = torch.arange(ranked.slots.shape[1], device=query.device) < ranked.lengths[:, None]
        return paged_decode(query, key_pool, value_pool, ranked.slots[:, None], valid[:, None], scale=scale)
    mean_value = None
    if plan.summed is not None and DECODE_RULES[group.config.method].estimates_left_out(group.config):
        mean_value = plan.summed.sums[group.turn_rows, layer] / ranked.lengths[:, None, None]
    output, coverage = attend_ranked(
        query,
        key_pool,
        value_pool,
        plan.store.sketches[layer],
        ranked,
        reach=None if group.far is None else _FarReach(plan, group, group.far, layer),
        mean_value=mean_value,
        config=group.config,
        scale=scale,
    )
    for account, of_row in zip(group.measured, coverage, strict=True):
        account.coverage.append(of_row)
    return output


@dataclass(frozen=True, slots=True)
class _FarReach:
    """One layer of a group of compact turns, see `loopserve.sparsity.by_sketch.Reach`."""

    plan: AttentionPlan
    group: RankedGroup
    far: FarRows
    layer: int

    def locate(self, columns: torch.Tensor, valid: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """In the turns' places, where they lie in host memory."""
        far, slots = self.far, self.group.ranked.slots
        return far.working_sets.locate(self.layer, far.turn_rows, slots, columns, valid, late=far.recalls_late)

    def keys(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """By way of the stage."""
        return self.far.contexts[row].keys(self.plan, self.layer)


def _sparse_decode(
    queries: torch.Tensor, plan: AttentionPlan, decode: SparseDecodeRow, layer: int, *, scale: float
) -> torch.Tensor:
    query = queries[decode.row : decode.row + 1]  # [1, H, D]
    key_pool, value_pool = plan.store.keys[layer], plan.store.values[layer]
    slots = decode.context.slots
    num_tokens = slots.shape[0]
    order, selection = decode.order, decode.selection
    if layer in plan.dense_layers:
        return paged_decode(query, key_pool, value_pool, slots[None, None], None, scale=scale)
    selection.record(layer, query, on_device([num_tokens - 1], query.device))
    if order.measure or order.choose:
        by_sketch = plan.store.sketches[layer] if plan.store.sketches else None
        reads_keys = order.measure or by_sketch is None or selection.config.scoring == "exact"
        keys, columns_at = decode.context.keys(plan, layer) if reads_keys else (key_pool, slots)
        coverage = selection.refresh(
            layer,
            keys,
            columns_at,
            budget_tokens=order.budget_tokens,
            scale=scale,
            measure=order.measure,
            choose=order.choose,
            sketch=by_sketch,
            sketch_slots=slots,
        )
        if coverage is not None:
            decode.measured.coverage.append(coverage)
    if order.dense:
        return paged_decode(query, key_pool, value_pool, slots[None, None], None, scale=scale)
    selection.note_read(layer, query, key_pool, slots, scale=scale)
    columns, valid = selection.kept_columns(layer, num_tokens)
    kept, readable = columns[None], None if valid is None else valid[None]  # [1, Hs, M]
    left_out = selection.left_out(layer, num_tokens)
    far = decode.far
    if far is None:
        kept_slots = slots[kept]
    else:
        late = far.recalls_late and left_out is None  # what is left out was weighed: nothing else may be missing
        kept_slots, readable = far.working_sets.locate(layer, far.turn_rows, slots[None], kept, readable, late=late)
    return paged_decode(query, key_pool, value_pool, kept_slots, readable, scale=scale, left_out=left_out)


def _prefill(
    queries: torch.Tensor, plan: AttentionPlan, prefill: PrefillRows, layer: int, *, scale: float
) -> torch.Tensor:
    view = prefill.context.view(plan, layer)
    if prefill.capture is not None and layer not in plan.dense_layers:
        _capture(queries, view, prefill, prefill.capture, layer, scale=scale)
    if prefill.order is not None and layer not in plan.dense_layers:
        return _sparse_prefill(queries, plan, view, prefill, prefill.order, layer, scale=scale)
    keys, values = view.by_head()
    output = F.scaled_dot_product_attention(
        queries.transpose(0, 1).unsqueeze(0),
        keys,
        values,
        attn_mask=prefill.causal_bias,
        is_causal=prefill.start == 0,
        scale=scale,
        enable_gqa=True,
    )
    return output[0].transpose(0, 1)  # [r, H, D]


def _capture(
    queries: torch.Tensor, view: LayerView, prefill: PrefillRows, order: CaptureOrder, layer: int, *, scale: float
) -> None:
    selection = prefill.selection
    assert selection is not None, "a captured chunk has a selection"
    positions = torch.arange(prefill.start, prefill.start + queries.shape[0], device=queries.device)
    selection.observe(layer, queries, positions, view.keys, view.slots, scale=scale)
    if order.choose:
        selection.choose(layer, view.keys, view.values, view.slots, budget_tokens=order.budget_tokens, scale=scale)


def _sparse_prefill(
    queries: torch.Tensor,
    plan: AttentionPlan,
    view: LayerView,
    prefill: PrefillRows,
    order: SparsePrefill,
    layer: int,
    *,
    scale: float,
) -> torch.Tensor:
    outcome = attend(
        queries,
        view.keys,
        view.values,
        view.slots,
        start=prefill.start,
        order=order,
        config=plan.prefill_config,
        method=PREFILL_METHODS[order.method],
        scale=scale,
    )
    measured = prefill.measured
    assert measured is not None, "a sparse chunk has an account"
    if outcome.coverage is not None:
        measured.coverage.append(outcome.coverage)
    measured.cells_computed.append(outcome.cells_computed)
    measured.dense_heads.append(outcome.dense_heads)
    measured.cells_total += outcome.cells_total
    return outcome.output


def register_socket() -> None:
    """Make `attn_implementation="loopserve"` known to transformers. Idempotent; the registered function keeps no state."""
    AttentionInterface.register(SOCKET_NAME, plan_attention)
