"""Hop 7: the only room that runs the model. Turns a `StepPlan` into tensors, one forward and a `StepResult`.

Keeps per turn what only the device needs between steps: where its tokens lie, and its token selection. Anything that runs on the
device happens here or below; anything that decides happens above.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from loopserve.attention import AttentionPlan, DenseDecodeRows, Measured, PrefillRows, SparseDecodeRow
from loopserve.config import BLOCK_TOKENS, EngineConfig
from loopserve.dialogue import TurnId
from loopserve.errors import ConfigError
from loopserve.kv.store import KVStore, block_bytes
from loopserve.loading import LoadedModel
from loopserve.plan import NULL_BLOCK, SampledToken, Segment, StepPlan, StepResult
from loopserve.sampler import sample
from loopserve.sparsity import DECODE_METHODS, PREFILL_METHODS
from loopserve.sparsity.decode import TurnSelection

_PADDING_RATIO_MAX = (
    1.25  # read slots over needed slots in one group of decode rows; beyond it a second launch is cheaper
)


class Runner(Protocol):
    """Executes plans. Tests drive the scheduler with one that has no model."""

    def run(self, plan: StepPlan) -> StepResult:
        """Compute one step."""


@dataclass(slots=True)
class _TurnState:
    """What the device keeps of one turn while it is in the batch."""

    slots: torch.Tensor  # int64 [room], of the first `num_blocks` blocks of its table
    num_blocks: int
    epoch: int
    selection: TurnSelection | None = None


class ModelRunner:
    """Runs a stock model through the attention socket."""

    def __init__(self, loaded: LoadedModel, config: EngineConfig, *, num_blocks: int) -> None:
        """Allocates the KV pool."""
        self._loaded = loaded
        self._config = config
        self._store = KVStore(
            num_layers=loaded.num_layers,
            num_blocks=num_blocks,
            num_kv_heads=loaded.num_kv_heads,
            head_dim=loaded.head_dim,
            dtype=loaded.dtype,
            device=loaded.device,
        )
        self._turns: dict[TurnId, _TurnState] = {}
        self._prefill_method = PREFILL_METHODS[config.prefill.method]
        self._decode_method = DECODE_METHODS[config.decode.method]
        self._block_offsets = torch.arange(BLOCK_TOKENS, device=loaded.device)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Carry out the copies, compute all segments in one forward, draw what is to be drawn. Mutates the KV pool."""
        for turn_id in plan.ended_turns:
            self._turns.pop(turn_id, None)
        self._store.copy_blocks(plan.copies)
        attention_plan, measured = self._attention_plan(plan.segments)
        device = self._loaded.device
        token_ids = torch.tensor([t for s in plan.segments for t in s.token_ids], device=device)
        positions = [p for s in plan.segments for p in range(s.start, s.start + len(s.token_ids))]
        output = self._loaded.model(
            input_ids=token_ids.unsqueeze(0),
            position_ids=torch.tensor([positions], device=device),
            use_cache=False,
            logits_to_keep=torch.tensor(_sampled_rows(plan.segments), device=device, dtype=torch.long),
            attention_plan=attention_plan,
        )
        tokens = self._draw(output.logits[0], plan.segments)
        quality = tuple(account.summed(turn_id) for turn_id, account in measured.items())
        return StepResult(tokens=tokens, quality=quality)

    def _draw(self, logits: torch.Tensor, segments: Sequence[Segment]) -> tuple[SampledToken, ...]:
        sampled = [(segment.turn_id, segment.sample) for segment in segments if segment.sample is not None]
        draws = sample(logits, [order for _, order in sampled])
        return tuple(
            SampledToken(turn_id, draw.token_id, draw.logprobs)
            for (turn_id, _), draw in zip(sampled, draws, strict=True)
        )

    def _attention_plan(self, segments: Sequence[Segment]) -> tuple[AttentionPlan, dict[TurnId, Measured]]:
        measured: dict[TurnId, Measured] = {}
        prefills: list[PrefillRows] = []
        sparse_decodes: list[SparseDecodeRow] = []
        dense: list[tuple[int, torch.Tensor]] = []
        write_slots: list[torch.Tensor] = []
        row = 0
        for segment in segments:
            state = self._state(segment)
            end = segment.start + len(segment.token_ids)
            slots = state.slots[:end]
            write_slots.append(slots[segment.start :])
            if segment.prefill is not None or segment.decode is not None:
                measured[segment.turn_id] = Measured()
            if segment.decode is not None:
                sparse_decodes.append(self._sparse_decode(segment, state, row, slots, measured[segment.turn_id]))
            elif len(segment.token_ids) == 1 and segment.prefill is None and not segment.capture_queries:
                dense.append((row, slots))
            else:
                rows = slice(row, row + len(segment.token_ids))
                prefills.append(self._prefill(segment, state, rows, slots, measured.get(segment.turn_id)))
            row += len(segment.token_ids)
        attention_plan = AttentionPlan(
            store=self._store,
            write_slots=torch.cat(write_slots),
            prefills=prefills,
            dense_decodes=[self._dense_group(group) for group in _groups_of_like_length(dense)],
            sparse_decodes=sparse_decodes,
            prefill_config=self._config.prefill,
            prefill_method=self._prefill_method,
            dense_layers=frozenset(self._config.decode.dense_layers),
        )
        return attention_plan, measured

    def _prefill(
        self, segment: Segment, state: _TurnState, rows: slice, slots: torch.Tensor, measured: Measured | None
    ) -> PrefillRows:
        if segment.capture_queries:
            state.selection = self._new_selection()
        return PrefillRows(
            turn_id=segment.turn_id,
            rows=rows,
            slots=slots,
            start=segment.start,
            order=segment.prefill,
            capture=state.selection if segment.capture_queries else None,
            measured=measured,
        )

    def _sparse_decode(
        self, segment: Segment, state: _TurnState, row: int, slots: torch.Tensor, measured: Measured
    ) -> SparseDecodeRow:
        order = segment.decode
        assert order is not None and state.selection is not None, "a sparse decode follows a captured prefill"
        return SparseDecodeRow(
            turn_id=segment.turn_id,
            row=row,
            slots=slots,
            selection=state.selection,
            budget_tokens=order.budget_tokens,
            refresh=order.refresh,
            dense=order.dense,
            measured=measured,
        )

    def _dense_group(self, group: Sequence[tuple[int, torch.Tensor]]) -> DenseDecodeRows:
        device = self._loaded.device
        lengths = [slots.shape[0] for _, slots in group]
        longest = max(lengths)
        padded = torch.full((len(group), longest), NULL_BLOCK * BLOCK_TOKENS, dtype=torch.long, device=device)
        for index, (_, slots) in enumerate(group):
            padded[index, : slots.shape[0]] = slots
        valid = None
        if min(lengths) < longest:
            valid = torch.arange(longest, device=device) < torch.tensor(lengths, device=device).unsqueeze(1)  # [R, M]
        return DenseDecodeRows(
            rows=torch.tensor([row for row, _ in group], device=device),
            slots=padded.unsqueeze(1),
            valid=None if valid is None else valid.unsqueeze(1),
        )

    def _state(self, segment: Segment) -> _TurnState:
        state = self._turns.get(segment.turn_id)
        if state is None or state.epoch != segment.table_epoch:
            empty = torch.empty(0, dtype=torch.long, device=self._loaded.device)
            selection = state.selection if state is not None else None
            state = _TurnState(slots=empty, num_blocks=0, epoch=segment.table_epoch, selection=selection)
            self._turns[segment.turn_id] = state
        if len(segment.block_table) > state.num_blocks:
            fresh = torch.tensor(segment.block_table[state.num_blocks :], device=self._loaded.device)
            slots = (fresh.unsqueeze(1) * BLOCK_TOKENS + self._block_offsets).flatten()
            state.slots = torch.cat((state.slots, slots))
            state.num_blocks = len(segment.block_table)
        return state

    def _new_selection(self) -> TurnSelection:
        loaded = self._loaded
        return TurnSelection(
            loaded.num_layers,
            loaded.num_heads,
            loaded.num_kv_heads,
            loaded.head_dim,
            self._config.decode,
            self._decode_method,
            device=loaded.device,
            dtype=loaded.dtype,
        )


def num_pool_blocks(loaded: LoadedModel, config: EngineConfig) -> int:
    """Blocks that the pool gets: as configured, or a share of the memory that is free now. Raises ConfigError if too few."""
    if config.kv_blocks is not None:
        return config.kv_blocks
    bytes_a_block = block_bytes(
        num_layers=loaded.num_layers, num_kv_heads=loaded.num_kv_heads, head_dim=loaded.head_dim, dtype=loaded.dtype
    )
    if loaded.device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(loaded.device)
        pool_bytes = int(free_bytes * config.kv_memory_ratio)
    else:
        pool_bytes = config.kv_bytes_max
    num_blocks = pool_bytes // bytes_a_block
    if num_blocks < 2:
        raise ConfigError(
            f"The KV pool would be {pool_bytes} bytes, but one block takes {bytes_a_block}; "
            "free memory, raise kv_bytes_max or kv_memory_ratio, or use a smaller model."
        )
    return int(num_blocks)


def _sampled_rows(segments: Sequence[Segment]) -> list[int]:
    rows, row = [], -1
    for segment in segments:
        row += len(segment.token_ids)
        if segment.sample is not None:
            rows.append(row)
    return rows


def _groups_of_like_length(rows: Sequence[tuple[int, torch.Tensor]]) -> list[list[tuple[int, torch.Tensor]]]:
    """Split decode rows so that padding each group to its longest context wastes little."""
    groups: list[list[tuple[int, torch.Tensor]]] = []
    needed = 0
    for row in sorted(rows, key=lambda item: item[1].shape[0]):
        length = row[1].shape[0]
        if groups and (len(groups[-1]) + 1) * length <= _PADDING_RATIO_MAX * (needed + length):
            groups[-1].append(row)
            needed += length
        else:
            groups.append([row])
            needed = length
    return groups
