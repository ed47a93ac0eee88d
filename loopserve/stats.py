"""Plain measurements and where they go. Floor 0: exporters (`monitoring/`) read these records, the engine never imports an exporter."""

from dataclasses import dataclass
from typing import Protocol

from loopserve.dialogue import FinishReason, SessionId, TurnUsage


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Blocks of the device pool by kind; `active + warm + shared + cached + free == total`.

    A block held by more than one session is `shared`; else it is `active` or `warm` with its one holder; `cached` blocks are
    held by no session and are kept only because their prefix may come back.
    """

    total: int
    active: int
    warm: int
    shared: int
    cached: int
    free: int

    @property
    def used_ratio(self) -> float:
        """Share of the pool that sessions hold, 0 to 1."""
        return (self.active + self.warm + self.shared) / self.total if self.total else 0.0


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
