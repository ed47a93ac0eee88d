"""Plain measurements and where they go. Floor 0: exporters (`monitoring/`) read these records, the engine never imports an exporter."""

from dataclasses import dataclass, replace
from typing import Protocol, Self

from loopserve.config import BLOCK_TOKENS
from loopserve.dialogue import FinishReason, SessionId, TurnUsage


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Blocks of one tier by kind; `active + warm + shared + cached + free == total`.

    A block held by more than one session is `shared`; else it is `active` or `warm` with its one holder; `cached` blocks are
    held by no session and are kept only because their prefix may come back.
    """

    total: int
    active: int
    warm: int
    shared: int
    cached: int
    free: int
    shared_active: int = 0  # of the shared ones, those that a turn in the batch holds

    @property
    def used_ratio(self) -> float:
        """Share of the pool that sessions hold, 0 to 1."""
        return (self.active + self.warm + self.shared) / self.total if self.total else 0.0


@dataclass(frozen=True, slots=True)
class PressureCounts:
    """How often something gave way to a turn that found no room, since the start, in the order in which they are tried."""

    reclaimed_prefix_blocks: int = 0  # of nobody, kept for their prefix
    offloaded_sessions: int = 0  # idle branches, to host memory
    dropped_sessions: int = 0  # idle branches, for which no lower tier had room
    compacted_turns: int = 0
    lowered_budgets: int = 0  # by a rung, for all compact turns


@dataclass(frozen=True, slots=True)
class DiskCounts:
    """What the disk tier did since the start, and how much lies there now that this engine holds, or nobody."""

    saved_sessions: int = 0
    saved_bytes: int = 0  # written: blocks that were there already are not
    loaded_sessions: int = 0
    loaded_bytes: int = 0
    leased_elsewhere: int = 0  # another engine owned the session
    full: int = 0
    failed: int = 0
    late: int = 0  # came after the turn had stopped waiting
    not_worth_it: int = 0  # computing again was quicker by what is measured
    refused: tuple[tuple[str, int], ...] = ()  # by reason
    num_sessions: int = 0
    num_bytes: int = 0

    def plus(self, **more: int) -> Self:
        """With so many more of each."""
        return replace(self, **{name: getattr(self, name) + count for name, count in more.items()})

    def with_refused(self, reason: str) -> Self:
        """With one refused image more."""
        refused = dict(self.refused)
        refused[reason] = refused.get(reason, 0) + 1
        return replace(self, refused=tuple(sorted(refused.items())))

    def with_content(self, *, num_sessions: int, num_bytes: int) -> Self:
        """With what lies there now."""
        return replace(self, num_sessions=num_sessions, num_bytes=num_bytes)


@dataclass(frozen=True, slots=True)
class BudgetDemand:
    """Device bytes that conversations would hold at one budget, compact where they may be; `budget_tokens` None: of all their tokens."""

    budget_tokens: int | None
    active_bytes: int  # of turns in the batch or waiting for it
    warm_bytes: int  # of idle sessions that still hold KV


@dataclass(frozen=True, slots=True)
class MemoryStats:
    """The queues, the device pool, and what the present conversations want of it, counted at one moment.

    `demand` is a curve over the rungs of `DecodeSparsity.budget_rungs`, smallest first, `None` last. A shared prefix counts in every
    session that has it: each chooses its own tokens of it.
    """

    num_running_turns: int
    num_waiting_turns: int
    max_running_turns: int
    num_compact_turns: int  # of the running ones
    block_bytes: int
    device_bytes: int  # all that is kept on the device beside the model: pool, sketches of other tiers, maps, buffers
    blocks: Occupancy  # of the device
    host_blocks: Occupancy
    num_active_sessions: int
    num_warm_sessions: int
    active_tokens: int  # logical: as long as the conversations are
    warm_tokens: int
    computed_tokens: int  # of the active ones: those whose KV is there, on whichever tier
    demand: tuple[BudgetDemand, ...]
    budget_tokens: int  # in force: the engine's own under the ceiling
    compact_budget_tokens: int  # in force for compact turns: lower under pressure
    budget_ceiling_tokens: int | None
    budget_max_tokens: int
    budget_floor_tokens: int
    pressure: PressureCounts = PressureCounts()
    disk: DiskCounts | None = None  # None: there is no disk tier

    @property
    def active_device_tokens(self) -> int:
        """Physical: tokens' worth of device blocks that turns in the batch hold."""
        return (self.blocks.active + self.blocks.shared_active) * BLOCK_TOKENS

    @property
    def compression_ratio(self) -> float:
        """Computed tokens of the active conversations over what they hold on the device; 1 where nothing is active."""
        physical = self.active_device_tokens
        return self.computed_tokens / physical if physical and self.computed_tokens else 1.0

    @property
    def capacity_bytes(self) -> int:
        """Size of the pool."""
        return self.blocks.total * self.block_bytes

    def demand_at(self, budget_tokens: int | None) -> BudgetDemand:
        """The curve at a budget: of the first rung that is no smaller."""
        for point in self.demand[:-1]:
            if budget_tokens is not None and point.budget_tokens is not None and point.budget_tokens >= budget_tokens:
                return point
        return self.demand[-1]


@dataclass(frozen=True, slots=True)
class TokenGap:
    """The wait for one token: after the one before it, or, for a turn's first, after the turn's submission."""

    turn_number: int
    gap_s: float


@dataclass(frozen=True, slots=True)
class StepStats:
    """One step of the engine thread."""

    step_index: int
    duration_s: float
    num_prefill_tokens: int
    num_decode_tokens: int
    num_running: int
    num_waiting: int
    num_preempted: int
    num_free_blocks: int
    first_tokens: tuple[TokenGap, ...] = ()
    token_gaps: tuple[TokenGap, ...] = ()


@dataclass(frozen=True, slots=True)
class TurnStats:
    """One ended turn. Times are seconds from submission; None where the turn never got so far."""

    session_id: SessionId
    turn_number: int  # 1 for the session's first
    reason: FinishReason
    usage: TurnUsage
    queue_s: float | None
    first_token_s: float | None
    total_s: float
    num_preemptions: int
    trace_parent: str = ""  # as the turn's request brought it
    budget_tokens: int | None = None  # of its last selection; None where it chose nothing


class StatsSink(Protocol):
    """Receives measurements on the engine thread; must neither block nor raise."""

    def on_step(self, stats: StepStats) -> None:
        """A step was computed."""

    def on_turn(self, stats: TurnStats) -> None:
        """A turn ended, in whatever way."""


class NullSink:
    """Drops everything."""

    def on_step(self, stats: StepStats) -> None:
        """Drop it."""

    def on_turn(self, stats: TurnStats) -> None:
        """Drop it."""
