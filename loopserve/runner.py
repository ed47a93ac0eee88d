"""Hop 7: the only room that runs the model. Turns a `StepPlan` into tensors, one forward and a `StepResult`.

Anything that runs on the device happens here or below; anything that decides happens above. Each step is laid out anew (`layout.py`),
or, where there is a `Capture` and only decode rows are due, replayed (`graphs.py`).
"""

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from loopserve.attention import Measured
from loopserve.config import BLOCK_TOKENS, EngineConfig
from loopserve.dialogue import TurnId
from loopserve.errors import ConfigError
from loopserve.graphs import Capture, CudaCapture, DecodeGraphs
from loopserve.kv.stage import Stage
from loopserve.kv.store import KVStore, block_bytes
from loopserve.kv.working_set import WorkingSets
from loopserve.layout import Forward, LayoutBuilder, Placed, end_of
from loopserve.loading import LoadedModel
from loopserve.methods import DECODE_RULES
from loopserve.plan import BlockCopy, BlockId, SampledToken, Segment, StepPlan, StepResult
from loopserve.reads import num_places
from loopserve.sampler import PendingDraws, draw
from loopserve.transfer import HostCopy, on_device
from loopserve.turn_table import TurnTable


class Launched(Protocol):
    """A step that the device may still be computing."""

    def result(self) -> StepResult:
        """Wait for it."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A step that was computed while it was launched."""

    step: StepResult

    def result(self) -> StepResult:
        """See `Launched`."""
        return self.step


class Runner(Protocol):
    """Executes plans. Tests drive the scheduler with one that has no model."""

    @property
    def device_bytes(self) -> int:
        """All that is kept on the device beside the model."""

    def launch(self, plan: StepPlan) -> Launched:
        """Begin to compute one step; the steps launched before it come first."""

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Carry out copy orders that belong to no step."""

    def erase(self, blocks: Sequence[BlockId]) -> None:
        """Zero blocks that nobody holds."""

    def read(self, blocks: Sequence[BlockId]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of B whole blocks, on the CPU: [L, B, 16, Hkv, D] each."""

    def write(self, blocks: Sequence[BlockId], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Fill whole blocks with what `read` gave somewhere."""


class _LaunchedStep:
    """What the device gives of one step, on its way to the host."""

    def __init__(self, sampled: Sequence[Segment], draws: PendingDraws, measured: dict[TurnId, Measured]) -> None:
        self._sampled = tuple(segment.turn_id for segment in sampled)
        self._draws = draws
        self._measured = measured
        reduced = {turn_id: account.reduced() for turn_id, account in measured.items()}
        self._reduced = {turn_id: HostCopy(sums) for turn_id, sums in reduced.items() if sums is not None}

    def result(self) -> StepResult:
        """See `Launched`."""
        tokens = tuple(
            SampledToken(turn_id, drawn.token_id, drawn.logprobs)
            for turn_id, drawn in zip(self._sampled, self._draws.result(), strict=True)
        )
        sums = {turn_id: copy.wait().tolist() for turn_id, copy in self._reduced.items()}
        quality = tuple(account.quality(turn_id, sums.get(turn_id)) for turn_id, account in self._measured.items())
        return StepResult(tokens, quality)


class ModelRunner:
    """Runs a stock model through the attention socket."""

    def __init__(
        self,
        loaded: LoadedModel,
        config: EngineConfig,
        *,
        num_blocks: int,
        num_host_blocks: int = 0,
        capture: Capture | None = None,
    ) -> None:
        """Allocates the KV pools and the turn table. `capture` None: CUDA graphs on CUDA, if the config wants them, else none."""
        self._loaded = loaded
        # Triton launches on the device that is current, whatever its tensors lie on.
        is_cuda = loaded.device.type == "cuda"
        self._on_device = torch.cuda.device(loaded.device) if is_cuda else contextlib.nullcontext()
        self.store = KVStore(  # of every turn; tests and benchmarks look at it, too
            num_layers=loaded.num_layers,
            num_blocks=num_blocks,
            num_kv_heads=loaded.num_kv_heads,
            head_dim=loaded.head_dim,
            dtype=loaded.dtype,
            device=loaded.device,
            sketch=config.decode.scoring == "sketch",
            num_host_blocks=num_host_blocks,
        )
        self._stage = Stage(self.store) if num_host_blocks else None
        working_sets = None
        if num_host_blocks:
            working_sets = WorkingSets(self.store, config.max_running_turns, num_places(config.decode))
        wants_means = any(rule.estimates_left_out(config.decode) for rule in DECODE_RULES.values())
        longest = min(config.max_session_tokens or loaded.max_positions, loaded.max_positions)
        self._table = TurnTable(
            config.max_running_turns,
            min(longest, num_blocks * BLOCK_TOKENS) + BLOCK_TOKENS,
            first_host_slot=self.store.num_slots,
            value_shape=(loaded.num_layers, loaded.num_kv_heads, loaded.head_dim) if wants_means else None,
            device=loaded.device,
            working_sets=working_sets,
        )
        self._layouts = LayoutBuilder(loaded, config, self.store, self._table, self._stage)
        if capture is None and is_cuda and config.cuda_graphs:
            capture = CudaCapture(loaded.device)
        self._graphs = None if capture is None else DecodeGraphs(loaded, config, self.store, self._table, capture)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        """Carry out the copies, compute all segments in one forward, draw what is to be drawn. Mutates the KV pool.

        On CUDA this returns as soon as all of it is queued.
        """
        with self._on_device:
            return self._launch(plan)

    def _launch(self, plan: StepPlan) -> Launched:
        self._table.release(plan.ended_turns)
        self.store.copy_blocks(plan.copies)
        placed = [self._layouts.place(segment) for segment in plan.segments]
        forward = None if self._graphs is None else self._graphs.run(placed)
        if forward is None:
            forward = self._forward(placed)
        orders = [segment.sample for segment in forward.sampled if segment.sample is not None]
        assert len(orders) == len(forward.sampled), "every row with logits is sampled"
        draws = draw(forward.logits, orders)
        self._table.note_tokens(forward.turn_rows, draws.token_ids)
        return _LaunchedStep(forward.sampled, draws, forward.measured)

    def run(self, plan: StepPlan) -> StepResult:
        """Launch one step and wait for it."""
        return self.launch(plan).result()

    @property
    def device_bytes(self) -> int:
        """All that is kept on the device beside the model: pools, sketches, maps, and the stage as far as it has grown."""
        stage = 0 if self._stage is None else self._stage.device_bytes
        return self.store.device_bytes + self._table.device_bytes + stage

    @torch.inference_mode()
    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Carry out copy orders that belong to no step. Mutates the KV pools."""
        self.store.copy_blocks(copies)

    @torch.inference_mode()
    def erase(self, blocks: Sequence[BlockId]) -> None:
        """Zero blocks that nobody holds, after all that was launched. Mutates the KV pool."""
        self.store.erase_blocks(blocks)

    @torch.inference_mode()
    def read(self, blocks: Sequence[BlockId]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of B whole blocks, after all that was launched, on the CPU: [L, B, 16, Hkv, D] each."""
        self.store.settle()
        return self.store.read_blocks(blocks)

    @torch.inference_mode()
    def write(self, blocks: Sequence[BlockId], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Fill whole blocks with what `read` gave somewhere. Mutates the KV pools."""
        self.store.settle()
        self.store.write_blocks(blocks, keys, values)

    def _forward(self, placed: Sequence[Placed]) -> Forward:
        layout = self._layouts.build(placed)
        device = self._loaded.device
        token_ids = [token_id for segment in layout.segments for token_id in segment.token_ids]
        positions = [p for segment in layout.segments for p in range(segment.start, end_of(segment))]
        input_ids = on_device(token_ids, device)
        row_of = {p.segment.turn_id: p.row.index for p in placed}
        if min(token_ids) < 0:  # some are drawn by the step before, which may still run
            rows = [row_of[segment.turn_id] for segment in layout.segments for _ in segment.token_ids]
            input_ids = self._table.resolved(input_ids, on_device(rows, device))
        sampled = tuple(segment for segment in layout.segments if segment.sample is not None)
        output = self._loaded.model(
            input_ids=input_ids[None],
            position_ids=on_device([positions], device),
            use_cache=False,
            logits_to_keep=on_device(_sampled_rows(layout.segments), device, dtype=torch.long),
            attention_plan=layout.plan,
        )
        turn_rows = on_device([row_of[segment.turn_id] for segment in sampled], device, dtype=torch.long)
        return Forward(output.logits[0], sampled, turn_rows, layout.measured)


def bytes_a_block(loaded: LoadedModel, config: EngineConfig) -> int:
    """Bytes of the pool that one block takes: keys, values and, where the engine scores by them, sketches of all layers."""
    return block_bytes(
        num_layers=loaded.num_layers,
        num_kv_heads=loaded.num_kv_heads,
        head_dim=loaded.head_dim,
        dtype=loaded.dtype,
        sketch=config.decode.scoring == "sketch",
    )


def num_pool_blocks(loaded: LoadedModel, config: EngineConfig) -> int:
    """Blocks that the pool gets: as configured, or a share of the memory that is free now. Raises ConfigError if too few."""
    if config.kv_blocks is not None:
        return config.kv_blocks
    if loaded.device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(loaded.device)
        pool_bytes = int(free_bytes * config.kv_memory_ratio)
    else:
        pool_bytes = config.kv_bytes_max
    num_blocks = pool_bytes // bytes_a_block(loaded, config)
    if num_blocks < 2:
        raise ConfigError(
            f"The KV pool would be {pool_bytes} bytes, but one block takes {bytes_a_block(loaded, config)}; "
            "free memory, raise kv_bytes_max or kv_memory_ratio, or use a smaller model."
        )
    return int(num_blocks)


def num_host_pool_blocks(loaded: LoadedModel, config: EngineConfig, num_blocks: int) -> int:
    """Blocks of the host tier beside so many on the device, as configured."""
    if config.host_blocks is not None:
        return config.host_blocks
    return min(int(config.kv_host_ratio * num_blocks), config.kv_host_bytes_max // bytes_a_block(loaded, config))


def _sampled_rows(segments: Sequence[Segment]) -> list[int]:
    last_rows = itertools.accumulate(len(segment.token_ids) for segment in segments)
    return [row - 1 for segment, row in zip(segments, last_rows, strict=True) if segment.sample is not None]
