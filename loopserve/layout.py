"""How the segments of a step become rows: who is read as one view, who shares a launch, and the plan that every layer reads.

Floor 4 beside attention, whose records it fills; used by the runner in every step. Knows nothing about models or scheduling.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loopserve.attention import (
    AttentionPlan,
    Context,
    DecodeGroup,
    FarRows,
    Measured,
    PrefillRows,
    RankedGroup,
    RunGroup,
    SparseDecodeRow,
    SummedRows,
    causal_bias,
)
from loopserve.config import BLOCK_TOKENS, DecodeSparsity, EngineConfig
from loopserve.dialogue import TurnId
from loopserve.kv.stage import Stage
from loopserve.kv.store import KVStore
from loopserve.loading import LoadedModel
from loopserve.methods import DECODE_RULES
from loopserve.plan import NULL_BLOCK, Segment
from loopserve.sparsity import DECODE_METHODS
from loopserve.sparsity.by_sketch import RankedRows
from loopserve.sparsity.decode import TurnSelection
from loopserve.transfer import on_device
from loopserve.turn_table import TurnRow, TurnTable

_PADDING_RATIO_MAX = (
    1.25  # read slots over needed slots in one group of decode rows; beyond it a second launch is cheaper
)


@dataclass(frozen=True, slots=True)
class Placed:
    """A segment, its turn's row, and where its tokens lie."""

    segment: Segment
    row: TurnRow
    context: Context

    @property
    def num_tokens(self) -> int:
        """Tokens of the context, the segment's own included."""
        return self.context.slots.shape[0]


@dataclass(frozen=True, slots=True)
class Layout:
    """The segments in the order of their rows, what attention needs to know of them, and where it reports."""

    segments: tuple[Segment, ...]
    plan: AttentionPlan
    measured: dict[TurnId, Measured]


@dataclass(frozen=True, slots=True)
class Forward:
    """What the model gave for a step."""

    logits: torch.Tensor  # [R, V], of the rows that are sampled
    sampled: tuple[Segment, ...]  # theirs, in that order
    turn_rows: torch.Tensor  # int64 [R], of the turn table
    measured: dict[TurnId, Measured]


class LayoutBuilder:
    """Writes the layout of every step over one store and one turn table."""

    def __init__(
        self, loaded: LoadedModel, config: EngineConfig, store: KVStore, table: TurnTable, stage: Stage | None = None
    ) -> None:
        self._loaded = loaded
        self._config = config
        self._store = store
        self._table = table
        self._stage = stage

    def place(self, segment: Segment) -> Placed:
        """Bring the turn's row up to date with a segment, and say where it lies. Mutates the turn table."""
        row = self._table.row(segment)
        is_view = row.is_run and self._loaded.device.type == "cpu"  # elsewhere kernels read through the slots anyway
        run_start = row.first_slot if is_view else None
        slots = self._table.slots_of(row, end_of(segment))
        if segment.capture is not None and row.selection is None:
            row.selection = self._new_selection(row, segment.capture.decode)
        stretches = tuple(row.stretches) if row.is_far else ()
        return Placed(segment, row, Context(slots=slots, run_start=run_start, stretches=stretches))

    def build(self, placed: Sequence[Placed]) -> Layout:
        """Order the segments as an AttentionPlan wants its rows, and write that plan."""
        ranked = [p for p in placed if is_ranked(p)]
        sparse = [p for p in placed if p.segment.decode is not None and not is_ranked(p)]
        single = [p for p in placed if is_plain_row(p)]
        runs = self._runs_at_equal_distances([p for p in single if p.context.run_start is not None])
        groups = _groups_of_like_length([p for p in single if p.context.run_start is None])
        ranked_groups = _ranked_alike(ranked)
        chunks = [p for p in placed if p.segment.decode is None and not is_plain_row(p)]
        ordered = [*itertools.chain.from_iterable((*runs, *groups, *ranked_groups)), *sparse, *chunks]

        lengths = [len(p.segment.token_ids) for p in ordered]
        starts = itertools.accumulate(lengths, initial=0)
        first_row = {p.segment.turn_id: row for p, row in zip(ordered, starts, strict=False)}
        measured = {
            p.segment.turn_id: Measured()
            for p in ordered
            if p.segment.prefill is not None or p.segment.decode is not None
        }
        plan = AttentionPlan(
            store=self._store,
            write_slots=torch.cat([p.context.slots[p.segment.start :] for p in ordered]),
            run_groups=[self._run_group(group) for group in runs],
            decode_groups=[self._group(group, first_row[group[0].segment.turn_id]) for group in groups],
            ranked_groups=[self._ranked_group(group, first_row, measured) for group in ranked_groups],
            sparse_decodes=[self._sparse_row(p, first_row, measured) for p in sparse],
            prefills=[self._prefill(p, first_row[p.segment.turn_id], measured.get(p.segment.turn_id)) for p in chunks],
            summed=self._summed([*itertools.chain.from_iterable(ranked_groups), *sparse], first_row),
            prefill_config=self._config.prefill,
            dense_layers=frozenset(self._config.decode.dense_layers),
            stage=self._stage,
        )
        return Layout(tuple(p.segment for p in ordered), plan, measured)

    def _summed(self, sparse: Sequence[Placed], first_row: dict[TurnId, int]) -> SummedRows | None:
        sums = self._table.value_sums
        if sums is None or not sparse:
            return None
        first = first_row[sparse[0].segment.turn_id]
        turn_rows = on_device([p.row.index for p in sparse], self._loaded.device)
        return SummedRows(slice(first, first + len(sparse)), turn_rows, sums)

    def _prefill(self, placed: Placed, first_row: int, measured: Measured | None) -> PrefillRows:
        segment, loaded = placed.segment, self._loaded
        num_rows = len(segment.token_ids)
        bias = None
        if segment.prefill is None or self._config.decode.dense_layers:  # some layer computes the chunk dense
            bias = causal_bias(num_rows, segment.start, dtype=loaded.dtype, device=loaded.device)
        return PrefillRows(
            rows=slice(first_row, first_row + num_rows),
            context=placed.context,
            start=segment.start,
            order=segment.prefill,
            capture=segment.capture,
            selection=placed.row.selection,
            measured=measured,
            causal_bias=bias,
        )

    def _runs_at_equal_distances(self, runs: Sequence[Placed]) -> list[list[Placed]]:
        """Split rows whose contexts are runs so that each part can be read as one strided view."""
        parts: list[list[Placed]] = []
        for like in _groups_of_like_length(runs):
            by_start = {_run_start(placed): placed for placed in like}
            longest = max(placed.num_tokens for placed in like)
            inside = [start for start in sorted(by_start) if start + longest <= self._store.num_slots]
            parts.extend(
                [by_start[start]] for start in by_start if start not in inside
            )  # a view may not leave the pool
            parts.extend([by_start[start] for start in part] for part in equally_spaced(inside))
        return parts

    def _run_group(self, group: Sequence[Placed]) -> RunGroup:
        first, lengths = _run_start(group[0]), [placed.num_tokens for placed in group]
        spacing = _run_start(group[1]) - first if len(group) > 1 else 0
        owned = self._owned(lengths)
        bias = None
        if owned is not None:
            bias = torch.zeros(owned.shape, dtype=self._loaded.dtype, device=owned.device)
            bias = bias.masked_fill_(~owned, float("-inf"))[:, None, None]
        return RunGroup(
            first_slot=first,
            spacing_slots=spacing,
            num_rows=len(group),
            num_tokens=max(lengths),
            bias=bias,
        )

    def _group(self, group: Sequence[Placed], first_row: int) -> DecodeGroup:
        owned = self._owned([placed.num_tokens for placed in group])
        return DecodeGroup(
            rows=slice(first_row, first_row + len(group)),
            slots=self._padded_slots(group).unsqueeze(1),
            valid=None if owned is None else owned.unsqueeze(1),
        )

    def _ranked_group(
        self, group: Sequence[Placed], first_row: dict[TurnId, int], measured: dict[TurnId, Measured]
    ) -> RankedGroup:
        device, config = self._loaded.device, ranked_config(group[0])
        budgets, lengths = [_budget(placed) for placed in group], [placed.num_tokens for placed in group]
        always = config.sink_tokens + config.window_tokens
        per_row = on_device([[placed.row.index for placed in group], lengths, budgets], device)
        accounts = [measured[placed.segment.turn_id] for placed in group if measures(placed)]
        ranked = RankedRows(
            self._padded_slots(group),
            lengths=per_row[1],
            budgets=per_row[2],
            width=max(budgets),
            is_full=len(set(budgets)) == 1 and min(lengths) - always >= budgets[0],
            num_measured=len(accounts),
        )
        first = first_row[group[0].segment.turn_id]
        return RankedGroup(
            slice(first, first + len(group)), ranked, per_row[0], config, accounts, far=self._far_rows(group)
        )

    def _far_rows(self, group: Sequence[Placed]) -> FarRows | None:
        if not any(placed.row.is_far for placed in group):
            return None
        assert self._table.working_sets is not None, "only where there is a host tier, contexts are far"
        orders = [placed.segment.decode for placed in group]
        return FarRows(
            self._table.working_sets,
            turn_rows=on_device([placed.row.index for placed in group], self._loaded.device),
            contexts=[placed.context for placed in group],
            recalls_late=all(order is not None and order.recalls_late for order in orders),
        )

    def _sparse_row(
        self, placed: Placed, first_row: dict[TurnId, int], measured: dict[TurnId, Measured]
    ) -> SparseDecodeRow:
        order, selection = placed.segment.decode, placed.row.selection
        assert order is not None and selection is not None, "a sparse decode follows a captured prefill"
        turn_id = placed.segment.turn_id
        return SparseDecodeRow(
            row=first_row[turn_id],
            context=placed.context,
            selection=selection,
            order=order,
            measured=measured[turn_id],
            far=self._far_rows([placed]),
        )

    def _padded_slots(self, group: Sequence[Placed]) -> torch.Tensor:
        """Where the contexts of R rows lie, int64 [R, M], padded with slots of the null block to the longest."""
        longest = max(placed.num_tokens for placed in group)
        padded = torch.full(
            (len(group), longest), NULL_BLOCK * BLOCK_TOKENS, dtype=torch.long, device=self._loaded.device
        )
        for row, placed in zip(padded, group, strict=True):
            row[: placed.num_tokens] = placed.context.slots
        return padded

    def _owned(self, lengths: Sequence[int]) -> torch.Tensor | None:
        """Which columns each of R contexts owns when all are padded to the longest, bool [R, M]; None: nothing is padded."""
        longest, device = max(lengths), self._loaded.device
        if min(lengths) == longest:
            return None
        return torch.arange(longest, device=device) < on_device(lengths, device).unsqueeze(1)

    def _new_selection(self, row: TurnRow, decode: DecodeSparsity) -> TurnSelection:
        loaded, sums = self._loaded, self._table.value_sums
        return TurnSelection(
            loaded.num_layers,
            loaded.num_heads,
            loaded.num_kv_heads,
            loaded.head_dim,
            decode,
            DECODE_METHODS[decode.method],
            device=loaded.device,
            dtype=loaded.dtype,
            value_sums=None if sums is None else sums[row.index],
        )


def end_of(segment: Segment) -> int:
    """Position after the segment's last token."""
    return segment.start + len(segment.token_ids)


def is_plain_row(placed: Placed) -> bool:
    """One row that reads everything on the device and leaves nothing behind: a dense decode, or a prefill of a single token."""
    segment = placed.segment
    is_plain = segment.prefill is None and segment.capture is None and segment.decode is None
    return is_plain and len(segment.token_ids) == 1 and not placed.context.is_far


def is_ranked(placed: Placed) -> bool:
    """A sparse decode row that reads what it ranks by sketches now."""
    order = placed.segment.decode
    if order is None or order.dense or not order.choose:
        return False
    config = ranked_config(placed)
    return DECODE_RULES[config.method].ranks_by_sketch(config)


def measures(placed: Placed) -> bool:
    """Whether a decode row measures what it reads."""
    return placed.segment.decode is not None and placed.segment.decode.measure


def ranked_config(placed: Placed) -> DecodeSparsity:
    """How a sparse decode row's turn chooses."""
    assert placed.row.selection is not None, "a sparse decode follows a captured prefill"
    return placed.row.selection.config


def equally_spaced(starts: Sequence[int]) -> list[list[int]]:
    """Split ascending numbers into arithmetic progressions, the longest that begins with the first one, then the rest again."""
    remaining = list(starts)
    parts: list[list[int]] = []
    while remaining:
        present = set(remaining)
        first = remaining[0]
        candidates = [[first]]
        for second in remaining[1:]:
            step = second - first
            candidates.append(list(itertools.takewhile(present.__contains__, itertools.count(first, step))))
        longest = max(candidates, key=len)
        parts.append(longest)
        remaining = sorted(present.difference(longest))
    return parts


def _budget(placed: Placed) -> int:
    assert placed.segment.decode is not None, "only a sparse decode row has a budget"
    return placed.segment.decode.budget_tokens


def _run_start(placed: Placed) -> int:
    start = placed.context.run_start
    assert start is not None, "the context is no run"
    return start


def _ranked_alike(rows: Sequence[Placed]) -> list[list[Placed]]:
    """Split ranked rows by how their turns choose, by whether they are far, and so that padding wastes little; who measures comes first."""
    by_kind: dict[tuple[DecodeSparsity, bool], list[Placed]] = {}
    for placed in rows:
        by_kind.setdefault((ranked_config(placed), placed.row.is_far), []).append(placed)
    groups = [group for alike in by_kind.values() for group in _groups_of_like_length(alike)]
    return [sorted(group, key=lambda placed: not measures(placed)) for group in groups]


def _groups_of_like_length(rows: Sequence[Placed]) -> list[list[Placed]]:
    """Split decode rows so that padding each group to its longest context wastes little."""
    groups: list[list[Placed]] = []
    needed = 0
    for row in sorted(rows, key=lambda placed: placed.num_tokens):
        length = row.num_tokens
        if groups and (len(groups[-1]) + 1) * length <= _PADDING_RATIO_MAX * (needed + length):
            groups[-1].append(row)
            needed += length
        else:
            groups.append([row])
            needed = length
    return groups
