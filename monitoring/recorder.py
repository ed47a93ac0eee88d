"""From the engine's records to numbers of the catalogue. A stats sink: called on the engine thread, cheap, never raises.

What changes with each step or turn is counted as it happens; what is a state (memory, sessions) is set when somebody looks.
"""

import threading
from collections import Counter
from collections.abc import Mapping

from loopserve.config import BLOCK_TOKENS
from loopserve.dialogue import FinishReason, QualityReport
from loopserve.stats import DiskCounts, MemoryStats, PressureCounts, StepStats, TurnStats
from monitoring import catalogue as c
from monitoring.catalogue import Metric
from monitoring.sinks import MetricSink

_STEPS = {  # label -> field of PressureCounts, in the order in which they are tried
    "reclaimed_prefix_blocks": "reclaimed_prefix_blocks",
    "offloaded_session": "offloaded_sessions",
    "dropped_session": "dropped_sessions",
    "compacted_turn": "compacted_turns",
    "lowered_budget": "lowered_budgets",
}
_DISK_OUTCOMES = {  # label -> field of DiskCounts
    "saved": "saved_sessions",
    "loaded": "loaded_sessions",
    "not_worth_it": "not_worth_it",
    "late": "late",
    "leased_elsewhere": "leased_elsewhere",
    "full": "full",
    "failed": "failed",
}


class Recorder:
    """Counts steps and turns of one engine into a sink."""

    def __init__(self, sink: MetricSink) -> None:
        self._sink = sink
        # A counter that begins to exist at its first event hides that event from `rate`: those with known labels exist from the start.
        for reason in FinishReason:
            sink.inc(c.TURNS, 0.0, reason=reason.value)
        for phase in ("prefill", "decode"):
            sink.inc(c.STEP_TOKENS, 0.0, phase=phase)
        sink.inc(c.REUSED_TOKENS, 0.0, source="device")
        for outcome in ("first", "hit", "miss"):
            sink.inc(c.AFFINITY_TURNS, 0.0, outcome=outcome)
        for result in ("moved", "refused", "failed", "timed_out", "busy", "not_worth_it", "over_limit"):
            sink.inc(c.HANDOFFS, 0.0, result=result)

    def on_step(self, stats: StepStats) -> None:
        """A step was computed."""
        sink = self._sink
        sink.observe(c.STEP_TIME, stats.duration_s)
        sink.inc(c.STEP_TOKENS, stats.num_prefill_tokens, phase="prefill")
        sink.inc(c.STEP_TOKENS, stats.num_decode_tokens, phase="decode")
        sink.inc(c.PREEMPTIONS, stats.num_preempted)
        for first in stats.first_tokens:
            sink.observe(c.TTFT, first.gap_s, turn=c.turn_bucket(first.turn_number))
        for gap in stats.token_gaps:
            sink.observe(c.INTER_TOKEN, gap.gap_s, turn=c.turn_bucket(gap.turn_number))

    def on_turn(self, stats: TurnStats) -> None:
        """A turn ended."""
        sink, usage = self._sink, stats.usage
        sink.inc(c.TURNS, reason=stats.reason.value)
        if stats.queue_s is None:
            return  # never admitted: nothing was computed, and its turn number is unknown
        turn = c.turn_bucket(stats.turn_number)
        sink.observe(c.QUEUE_TIME, stats.queue_s, turn=turn)
        sink.observe(c.TURN_DURATION, stats.total_s, turn=turn)
        if stats.first_token_s is not None:
            sink.observe(c.PREFILL_TIME, stats.first_token_s - stats.queue_s, turn=turn)
            sink.observe(c.DECODE_TIME, stats.total_s - stats.first_token_s, turn=turn)
        sink.observe(c.SESSION_TURNS, stats.turn_number)
        sink.inc(c.PROMPT_TOKENS, usage.prompt_tokens)
        sink.inc(c.REUSED_TOKENS, usage.cached_tokens, source="device")
        sink.inc(c.GENERATED_TOKENS, usage.completion_tokens)
        self._record_quality(usage.quality)

    def _record_quality(self, quality: QualityReport) -> None:
        sink = self._sink
        if quality.coverage_mean is not None:
            sink.observe(c.COVERAGE, quality.coverage_mean)
        if quality.coverage_worst_head is not None:
            sink.observe(c.COVERAGE_WORST, quality.coverage_worst_head)
        if quality.context_tokens:
            sink.observe(c.KEPT_SHARE, quality.kept_tokens / quality.context_tokens)
        sink.inc(c.REFRESHES, quality.refreshes)
        sink.inc(c.DENSE_FALLBACKS, quality.dense_fallbacks)
        sink.inc(c.RECTIFIED_TOKENS, quality.rectified_tokens)


class MemoryRecorder:
    """Sets the gauges of queues, tiers, demand curve and budgets whenever somebody looks, and counts what was done since the last look.

    Thread-safe: several may look at once, and the one with the older numbers may come last.
    """

    def __init__(self, sink: MetricSink) -> None:
        self._sink = sink
        self._lock = threading.Lock()
        self._counted: Counter[tuple[Metric, str]] = Counter()  # the engine counts since its start, as the sink does
        self._count_pressure(PressureCounts())
        self._count_disk(DiskCounts())

    def record(self, memory: MemoryStats) -> None:
        """All numbers of one moment."""
        _record_turns(self._sink, memory)
        _record_tiers(self._sink, memory)
        _record_demand(self._sink, memory)
        _record_budgets(self._sink, memory)
        self._count_pressure(memory.pressure)
        if memory.disk is not None:
            self._sink.set(c.DISK_SESSIONS, memory.disk.num_sessions)
            self._sink.set(c.DISK_BYTES, memory.disk.num_bytes)
            self._count_disk(memory.disk)

    def _count_pressure(self, pressure: PressureCounts) -> None:
        self._count(c.PRESSURE_STEPS, {step: getattr(pressure, name) for step, name in _STEPS.items()})

    def _count_disk(self, disk: DiskCounts) -> None:
        refused = sum(count for _, count in disk.refused)
        outcomes = {outcome: getattr(disk, name) for outcome, name in _DISK_OUTCOMES.items()}
        self._count(c.DISK_OUTCOMES, outcomes | {"refused": refused})
        self._count(c.DISK_MOVED_BYTES, {"saved": disk.saved_bytes, "loaded": disk.loaded_bytes})

    def _count(self, metric: Metric, totals: Mapping[str, int]) -> None:
        """Bring a counter with one label up to these totals."""
        (label,) = metric.labels
        for value, total in totals.items():
            with self._lock:
                more = max(0, total - self._counted[metric, value])
                self._counted[metric, value] += more
            self._sink.inc(metric, more, **{label: value})


def _record_turns(sink: MetricSink, memory: MemoryStats) -> None:
    sink.set(c.TURNS_RUNNING, memory.num_running_turns)
    sink.set(c.TURNS_COMPACT, memory.num_compact_turns)
    sink.set(c.TURNS_WAITING, memory.num_waiting_turns)
    sink.set(c.TURNS_MAX, memory.max_running_turns)
    sink.set(c.SESSIONS, memory.num_active_sessions, state="active")
    sink.set(c.SESSIONS, memory.num_warm_sessions, state="warm")


def _record_tiers(sink: MetricSink, memory: MemoryStats) -> None:
    sink.set(c.KV_CAPACITY, memory.capacity_bytes)
    sink.set(c.KV_DEVICE_BYTES, memory.device_bytes)
    for tier, blocks in (("device", memory.blocks), ("host", memory.host_blocks)):
        for kind in ("active", "warm", "shared", "cached", "free"):
            sink.set(c.KV_BYTES, getattr(blocks, kind) * memory.block_bytes, tier=tier, kind=kind)
        sink.set(c.PHYSICAL_TOKENS, (blocks.active + blocks.warm + blocks.shared) * BLOCK_TOKENS, tier=tier)
    sink.set(c.LOGICAL_TOKENS, memory.active_tokens, state="active")
    sink.set(c.LOGICAL_TOKENS, memory.warm_tokens, state="warm")
    sink.set(c.COMPRESSION, memory.compression_ratio)


def _record_demand(sink: MetricSink, memory: MemoryStats) -> None:
    for point in memory.demand:
        budget = "full" if point.budget_tokens is None else str(point.budget_tokens)
        sink.set(c.KV_DEMAND, point.active_bytes, state="active", budget_tokens=budget)
        sink.set(c.KV_DEMAND, point.warm_bytes, state="warm", budget_tokens=budget)
    now = memory.demand_at(memory.compact_budget_tokens)
    sink.set(c.KV_WORKING_SET, now.active_bytes, state="active")
    sink.set(c.KV_WORKING_SET, now.warm_bytes, state="warm")


def _record_budgets(sink: MetricSink, memory: MemoryStats) -> None:
    sink.set(c.BUDGET_IN_FORCE, memory.budget_tokens)
    sink.set(c.COMPACT_BUDGET, memory.compact_budget_tokens)
    sink.set(c.BUDGET_CEILING, memory.budget_ceiling_tokens or memory.budget_max_tokens)
    sink.set(c.BUDGET_MAX, memory.budget_max_tokens)
    sink.set(c.BUDGET_FLOOR, memory.budget_floor_tokens)
