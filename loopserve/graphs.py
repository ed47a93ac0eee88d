"""Decode steps of fixed shapes, captured once and replayed: the host's part of a step is then one copy of a few numbers.

Floor 4 beside attention, whose plan it writes for these steps; used by the runner. Which steps: those whose every segment is one decode
row that reads everything, or one that ranks tokens by sketches (`loopserve.sparsity.by_sketch`). What differs from step to step lies in
tensors that never move: the input numbers here, the turn table, the store. A step is padded to the next shape:

    rows     |<- dense ->|<- padding ->|<- ranked ->|<- padding ->|     padding: row 0 of the turn table, one token in the null block
    columns  as many as the longest context of each kind may have

Knows nothing about scheduling; a `Capture` knows the device.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loopserve.attention import AttentionPlan, DecodeGroup, Measured, RankedGroup, SummedRows
from loopserve.config import BLOCK_TOKENS, DecodeSparsity, EngineConfig
from loopserve.kv.store import KVStore
from loopserve.layout import Forward, Placed, end_of, is_plain_row, is_ranked, measures, ranked_config
from loopserve.loading import LoadedModel
from loopserve.plan import NULL_BLOCK
from loopserve.sparsity.by_sketch import RankedRows
from loopserve.transfer import on_device
from loopserve.turn_table import NO_ROW, TurnTable

Step = Callable[[], tuple[Tensor, Tensor]]  # logits [rows, V], coverage [measured rows, layers x heads]
Capture = Callable[
    [Step], Step
]  # record what a step does on the device; what it gives does that again, to the same tensors

_log = logging.getLogger(__name__)
_EAGER_USES = 2  # of a shape before it is captured: these compile its kernels, and a shape that never returns is not worth a capture
_GRAPHS_MAX = 128  # least recently used ones go; each keeps the logits of its rows
_COLUMNS_MIN = 512
_PADDING_RATIO_MAX = (
    8  # rows x columns of a kind over what its contexts hold; beyond it, groups of like length are cheaper
)
_PADDING_FREE_COLUMNS = 2048  # contexts below this count as that long: so little padding costs nothing that matters


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step is padded to."""

    dense_rows: int
    dense_columns: int
    ranked_rows: int
    ranked_columns: int
    width: int  # tokens that ranked rows rank
    num_measured: int  # ranked rows that measure: the first ones
    config: DecodeSparsity | None  # how they choose


@dataclass(slots=True)
class _Prepared:
    """One shape's input numbers, and how to run it."""

    inputs: Tensor  # int64 [6, rows]: token id, position, write slot, turn row, length, budget
    num_uses: int = 0
    is_refused: bool = False  # the device could not capture it
    replay: Step | None = None


class DecodeGraphs:
    """Runs decode steps by shape: eagerly at first, then as captured. Belongs to one engine thread."""

    def __init__(
        self, loaded: LoadedModel, config: EngineConfig, store: KVStore, table: TurnTable, capture: Capture
    ) -> None:
        self._loaded = loaded
        self._config = config
        self._store = store
        self._table = table
        self._capture: Capture | None = capture
        self._prepared: OrderedDict[StepShape, _Prepared] = OrderedDict()

    def run(self, placed: Sequence[Placed]) -> Forward | None:
        """Compute one step, or None where it is not one of these steps. Mutates the store and the turn table as the step says.

        The next step of the same shape overwrites the logits.
        """
        dense = [p for p in placed if is_plain_row(p)]
        ranked = [p for p in placed if is_ranked(p) and not p.context.is_far]
        if len(dense) + len(ranked) < len(placed) or any(p.segment.sample is None for p in placed):
            return None
        shape = self.shape_of(dense, ranked)
        if shape is None:
            return None
        ranked.sort(key=lambda p: not measures(p))
        step = self._step(shape)
        step.inputs.copy_(on_device(_numbers(dense, ranked, shape), self._loaded.device))
        logits, coverage = step.replay() if step.replay is not None else self._forward(shape, step.inputs)
        measured = {p.segment.turn_id: Measured() for p in ranked}
        for placed_row, of_row in zip(filter(measures, ranked), coverage, strict=False):  # the rest measures for nobody
            measured[placed_row.segment.turn_id].coverage.append(of_row)
        return Forward(
            logits=_without_padding(logits, len(dense), len(ranked), shape),
            sampled=tuple(p.segment for p in (*dense, *ranked)),
            turn_rows=_without_padding(step.inputs[3], len(dense), len(ranked), shape),
            measured=measured,
        )

    def shape_of(self, dense: Sequence[Placed], ranked: Sequence[Placed]) -> StepShape | None:
        """The shape that a step of such rows is padded to, or None where it would be mostly padding, or its rows choose differently."""
        configs = {ranked_config(p) for p in ranked}
        dense_columns, ranked_columns = self._column_bucket(dense), self._column_bucket(ranked)
        is_padding = _is_mostly_padding(dense, dense_columns) or _is_mostly_padding(ranked, ranked_columns)
        if is_padding or len(configs) > 1 or not (dense or ranked):
            return None
        return StepShape(
            dense_rows=_row_bucket(len(dense)),
            dense_columns=dense_columns,
            ranked_rows=_row_bucket(len(ranked)),
            ranked_columns=ranked_columns,
            width=min(self._width(ranked), ranked_columns),
            num_measured=min(_row_bucket(sum(map(measures, ranked))), _row_bucket(len(ranked))),
            config=configs.pop() if configs else None,
        )

    def _step(self, shape: StepShape) -> _Prepared:
        step = self._prepared.get(shape)
        if step is None:
            num_rows = shape.dense_rows + shape.ranked_rows
            step = _Prepared(torch.zeros((6, num_rows), dtype=torch.int64, device=self._loaded.device))
            self._prepared[shape] = step
            if len(self._prepared) > _GRAPHS_MAX:
                self._prepared.popitem(last=False)
        self._prepared.move_to_end(shape)
        step.num_uses += 1
        if step.replay is None and step.num_uses > _EAGER_USES and not step.is_refused:
            self._try_to_capture(step, shape)
        return step

    def _try_to_capture(self, step: _Prepared, shape: StepShape) -> None:
        """What is captured is not run; its inputs are the last step's. A step that cannot be captured goes on as it was: eagerly."""
        if self._capture is None:
            return
        try:
            step.replay = self._capture(lambda: self._forward(shape, step.inputs))
        except RuntimeError as error:  # so says CUDA, of whatever kind
            step.is_refused = True
            if isinstance(error, torch.OutOfMemoryError):
                _log.warning("no memory to capture decode steps of %s: they are laid out by Python", shape)
            else:
                self._capture = None
                _log.warning("decode steps cannot be captured here, and are laid out by Python: %s", error)
        else:
            _log.info("captured a decode step: %s", shape)

    def _forward(self, shape: StepShape, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The whole step on the device, from its input numbers on. No value of a tensor comes to the host."""
        token_ids, positions, write_slots, turn_rows, lengths, _ = inputs
        dense, ranked = slice(0, shape.dense_rows), slice(shape.dense_rows, shape.dense_rows + shape.ranked_rows)
        accounts = [Measured() for _ in range(shape.num_measured)]
        plan = AttentionPlan(
            store=self._store,
            write_slots=write_slots,
            run_groups=(),
            decode_groups=[self._dense_group(shape, dense, turn_rows, lengths)] if shape.dense_rows else (),
            ranked_groups=[self._ranked_group(shape, ranked, inputs, accounts)] if shape.ranked_rows else (),
            sparse_decodes=(),
            prefills=(),
            summed=self._summed(ranked, turn_rows) if shape.ranked_rows else None,
            prefill_config=self._config.prefill,
            dense_layers=frozenset(self._config.decode.dense_layers),
        )
        output: Any = self._loaded.model(
            input_ids=self._table.resolved(token_ids, turn_rows)[None],
            position_ids=positions[None],
            use_cache=False,
            attention_plan=plan,
        )
        coverage = [torch.cat(account.coverage) for account in accounts if account.coverage]
        return output.logits[0], torch.stack(coverage) if coverage else inputs.new_zeros((0,))

    def _dense_group(self, shape: StepShape, rows: slice, turn_rows: Tensor, lengths: Tensor) -> DecodeGroup:
        owned = torch.arange(shape.dense_columns, device=lengths.device) < lengths[rows, None]
        slots = self._table.slots[:, : shape.dense_columns].index_select(0, turn_rows[rows])
        return DecodeGroup(rows, slots[:, None], owned[:, None])

    def _ranked_group(self, shape: StepShape, rows: slice, inputs: Tensor, accounts: Sequence[Measured]) -> RankedGroup:
        assert shape.config is not None, "ranked rows have a config"
        turn_rows, lengths, budgets = (numbers[rows] for numbers in inputs[3:])
        ranked = RankedRows(
            slots=self._table.slots[:, : shape.ranked_columns].index_select(0, turn_rows),
            lengths=lengths,
            budgets=budgets,
            width=shape.width,
            is_full=False,
            num_measured=shape.num_measured,
        )
        return RankedGroup(rows, ranked, turn_rows, shape.config, accounts)

    def _summed(self, rows: slice, turn_rows: Tensor) -> SummedRows | None:
        sums = self._table.value_sums
        return None if sums is None else SummedRows(rows, turn_rows[rows], sums)

    def _column_bucket(self, rows: Sequence[Placed]) -> int:
        """Columns for the longest context: a power of two or the middle between two, so that at most a third is padding."""
        if not rows:
            return 0
        longest, bucket = max(p.num_tokens for p in rows), _COLUMNS_MIN
        while bucket < longest:
            bucket = bucket * 3 // 2 if bucket & (bucket - 1) == 0 else bucket // 3 * 4
        return min(bucket, self._table.slots.shape[1])

    def _width(self, ranked: Sequence[Placed]) -> int:
        """A budget that all rows' budgets fit in: the least of the configured steps, or beyond them a power of two."""
        budgets = [p.segment.decode.budget_tokens for p in ranked if p.segment.decode is not None]
        largest = max(budgets, default=0)
        beyond = 1 << (largest - 1).bit_length() if largest else 0
        return min((rung for rung in self._config.decode.budget_rungs if rung >= largest), default=beyond)


class CudaCapture:
    """Records steps as CUDA graphs; see `Capture`. Other threads may go on using the device meanwhile.

    All graphs share what memory their steps need on the way: one runs after the other, and what it gives is read before the next begins.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._keeper: tuple[Any, Tensor] | None = None

    def __call__(self, step: Step) -> Step:
        """Record what it does; it is not run. Raises RuntimeError where that fails; the caller's stream is current again all the same."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()
            # A pool ends with its last graph, and could not be used again then: this one stays.
            kept = torch.zeros(1, device=self._device)
            self._keeper = self._record(lambda: kept + 1)
        output: tuple[Tensor, Tensor]
        graph, output = self._record(step)

        def replay() -> tuple[Tensor, Tensor]:
            graph.replay()
            return output

        return replay

    def _record(self, step: Callable[[], Any]) -> tuple[Any, Any]:
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.stream(
                torch.cuda.current_stream(self._device)
            ),  # made current again if the capture cannot be ended
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            output = step()
        return graph, output


def _numbers(dense: Sequence[Placed], ranked: Sequence[Placed], shape: StepShape) -> list[tuple[int, ...]]:
    """The step's input numbers, [6][rows]."""
    nobody = (0, 0, NULL_BLOCK * BLOCK_TOKENS, NO_ROW, 1, 1)
    rows = [_numbers_of(p) for p in dense]
    rows += [nobody] * (shape.dense_rows - len(dense))
    rows += [_numbers_of(p) for p in ranked]
    rows += [nobody] * (shape.ranked_rows - len(ranked))
    return list(zip(*rows, strict=True))


def _numbers_of(placed: Placed) -> tuple[int, ...]:
    segment = placed.segment
    position, budget = segment.start, 1 if segment.decode is None else segment.decode.budget_tokens
    block, offset = divmod(position, BLOCK_TOKENS)
    write_slot = segment.block_table[block] * BLOCK_TOKENS + offset
    return segment.token_ids[0], position, write_slot, placed.row.index, end_of(segment), budget


def _without_padding(per_row: Tensor, num_dense: int, num_ranked: int, shape: StepShape) -> Tensor:
    dense, ranked = per_row[:num_dense], per_row[shape.dense_rows :][:num_ranked]
    if num_ranked == 0:
        return dense
    return ranked if num_dense == 0 else torch.cat((dense, ranked))


def _is_mostly_padding(rows: Sequence[Placed], columns: int) -> bool:
    """Whether one long context beside short ones would have all of them padded to its length."""
    needed = sum(max(p.num_tokens, _PADDING_FREE_COLUMNS) for p in rows)
    return len(rows) * columns > _PADDING_RATIO_MAX * needed


def _row_bucket(num_rows: int) -> int:
    """The next of 0, 1, 2, 4, 8, 16, 24, ..."""
    if num_rows <= 8:
        return num_rows and 1 << (num_rows - 1).bit_length()
    return -(-num_rows // 8) * 8
