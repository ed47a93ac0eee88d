"""What the autopilot is shown: readings as they came, and snapshots that can be believed. Pure.

    source -> Reading          Serve -> ReplicaCounts
                 \\              /
                  trusted(...)  ->  Snapshot, or Untrusted with its cause

A reading is believed as a whole or not at all, but for a quarter of the replicas: in a fleet of four or more, one that is silent or
says nonsense does not blind the autopilot to the others. A snapshot that lacks some is not `is_whole`, and nothing is given back on it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise

from deploy.autopilot.settings import AutopilotSettings
from deploy.calls import ReplicaSignals

_TURN_POOLS_MAX = (
    16  # one turn's working sets in pools: branches fill one at most; what is further off is no measurement
)
_MISSING_SHARE = 4  # one in so many replicas may be missing
_FREED_MIN_RATIO = 0.01  # of the pools: what frees less is not done for the sake of bytes


class Cause(StrEnum):
    """Why the autopilot holds."""

    SOURCE = "source"  # Prometheus or the replicas cannot be read: unreachable, slow, or an answer that is none
    MISSING = "missing"  # replicas run, and there is nothing about them
    STALE = "stale"
    CLOCK = "clock"  # samples from the future
    ABSURD = "absurd"  # NaN, negative, more than there is, a pool without size
    REPLICAS = "replicas"  # far from as many as Serve says
    SERVE = "serve"  # Serve does not answer; only the replica count holds
    OTHER = "other_autopilot"  # replicas obey another one


class Untrusted(Exception):
    """A reading that is not acted on."""

    def __init__(self, cause: Cause, detail: str) -> None:
        super().__init__(f"{cause}: {detail}")
        self.cause = cause
        self.detail = detail


@dataclass(frozen=True, slots=True)
class ReplicaCounts:
    """The engine deployment as Serve's controller sees it."""

    target: int
    running: int
    starting: int
    stopping: int


@dataclass(frozen=True, slots=True)
class Reading:
    """What a source found, unjudged. `rejected`: replicas of which it could make nothing, and why."""

    replicas: tuple[ReplicaSignals, ...]
    rejected: Mapping[str, Untrusted] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The fleet at one moment, believed."""

    replicas: tuple[ReplicaSignals, ...]  # that accept turns; by name
    counts: ReplicaCounts | None  # None: Serve does not say
    age_s: float  # of the oldest signals in it
    num_missing: int = 0  # replicas that run and are not in it
    in_flight: int | None = None  # completion requests at the ingresses; None: not known
    is_woken: bool = False  # a request found no replica

    @property
    def is_whole(self) -> bool:
        """Whether all that runs is in it: only then anything is given back."""
        return self.counts is not None and self.num_missing == 0 and len(self.replicas) == self.counts.running


@dataclass(frozen=True, slots=True)
class FleetLoad:
    """A snapshot, summed up."""

    replicas: tuple[ReplicaSignals, ...]

    @property
    def capacity_bytes(self) -> int:
        """Of all pools."""
        return sum(replica.capacity_bytes for replica in self.replicas)

    @property
    def live_bytes(self) -> int:
        """Blocks of turns in the batch, and shared ones: what cannot be evicted."""
        return sum(replica.active_bytes + replica.shared_bytes for replica in self.replicas)

    @property
    def warm_bytes(self) -> int:
        """Blocks of idle conversations, on the device and in host memory."""
        return sum(replica.warm_bytes + replica.host_warm_bytes for replica in self.replicas)

    def warm_room_bytes(self, num_replicas: int) -> int:
        """What so many replicas would have left for idle conversations, on both tiers; negative where they are too few for the rest."""
        capacity = sum(replica.capacity_bytes + replica.host_capacity_bytes for replica in self.replicas)
        live = self.live_bytes + sum(replica.host_live_bytes for replica in self.replicas)
        return capacity * num_replicas // len(self.replicas) - live

    @property
    def num_running(self) -> int:
        """Turns in a batch."""
        return sum(replica.num_running for replica in self.replicas)

    @property
    def num_waiting(self) -> int:
        """Turns without a place in one."""
        return sum(replica.num_waiting for replica in self.replicas)

    @property
    def num_places(self) -> int:
        """Places in all batches."""
        return sum(replica.max_running for replica in self.replicas)

    def rungs(self, floor_tokens: int | None) -> tuple[int, ...]:
        """Budgets to choose from, smallest first; the last is no ceiling. Needs at least one replica."""
        highest = max(replica.budget_max_tokens for replica in self.replicas)
        lowest = min(highest, max(floor_tokens or 1, *(replica.budget_floor_tokens for replica in self.replicas)))
        of_curves = {budget for replica in self.replicas for budget, _, _ in replica.demand if budget is not None}
        return tuple(sorted({lowest, highest} | {budget for budget in of_curves if lowest <= budget <= highest}))

    def demand_bytes(self, budget_tokens: int | None) -> int:
        """What active conversations would hold on the devices at a budget, compact where they may be; None: all of their tokens."""
        return sum(_demand_at(replica, budget_tokens) for replica in self.replicas)

    def frees(self, budget_tokens: int | None, lower_tokens: int) -> bool:
        """Whether a lower budget takes less, by enough to be worth it. Not where turns cannot be compact: there the curve is flat."""
        freed_bytes = self.demand_bytes(budget_tokens) - self.demand_bytes(lower_tokens)
        return freed_bytes >= _FREED_MIN_RATIO * self.capacity_bytes


def trusted(
    reading: Reading, counts: ReplicaCounts | None, settings: AutopilotSettings, *, unix_time: float
) -> Snapshot:
    """The reading as a snapshot. Raises Untrusted."""
    good: list[ReplicaSignals] = []
    faults = dict(reading.rejected)
    for signals in reading.replicas:
        fault = _fault(signals, settings, unix_time)
        if fault is not None:
            faults[signals.replica] = fault
        elif signals.accepting:
            good.append(signals)
    num_missing = len(faults) if counts is None else max(0, counts.running - len(good))
    if not good and (counts is None or num_missing):
        raise _first(faults, Cause.MISSING, "no replica says anything")
    num_running = len(good) + num_missing if counts is None else counts.running
    if num_missing > num_running // _MISSING_SHARE:
        raise _first(faults, Cause.REPLICAS, f"{len(good)} of {num_running} running replicas can be read")
    if counts is not None and len(good) > counts.running + counts.starting + counts.stopping:
        raise Untrusted(Cause.REPLICAS, f"{len(good)} replicas report, Serve knows of {counts.running} that run")
    ages = [unix_time - signals.unix_time for signals in good]
    good.sort(key=lambda signals: signals.replica)
    return Snapshot(tuple(good), counts, age_s=max([0.0, *ages]), num_missing=num_missing)


def _first(faults: Mapping[str, Untrusted], cause: Cause, detail: str) -> Untrusted:
    """The first fault stands for all, because it says most; without one, what is known."""
    for replica in sorted(faults):
        fault = faults[replica]
        return Untrusted(fault.cause, f"{detail}; {replica}: {fault.detail}")
    return Untrusted(cause, detail)


def _fault(signals: ReplicaSignals, settings: AutopilotSettings, unix_time: float) -> Untrusted | None:
    """Why one replica's signals cannot be believed."""
    nonsense = _nonsense(signals)
    if nonsense:
        return Untrusted(Cause.ABSURD, nonsense)
    age_s = unix_time - signals.unix_time
    if age_s > settings.snapshot_age_max_s:
        return Untrusted(Cause.STALE, f"signals are {age_s:.1f} s old, {settings.snapshot_age_max_s:g} s are allowed")
    if -age_s > settings.clock_skew_max_s:
        return Untrusted(Cause.CLOCK, f"signals are from {-age_s:.1f} s in the future")
    return None


def _nonsense(signals: ReplicaSignals) -> str:
    """What is impossible in one replica's signals; empty: nothing."""
    sizes = (signals.capacity_bytes, signals.active_bytes, signals.warm_bytes, signals.shared_bytes)
    host_sizes = (signals.host_capacity_bytes, signals.host_live_bytes, signals.host_warm_bytes)
    counts = (signals.num_running, signals.num_waiting, signals.max_running)
    budgets = (signals.budget_max_tokens, signals.budget_floor_tokens)
    if not _are_numbers(*sizes, *host_sizes, *counts, *budgets, signals.compact_above_ratio, signals.unix_time):
        return "a number is missing, negative or not finite"
    if signals.capacity_bytes == 0 or signals.max_running == 0:
        return "its pool or its batch has no size"
    if signals.active_bytes + signals.warm_bytes + signals.shared_bytes > signals.capacity_bytes:
        return "more bytes are in use than its pool has"
    if signals.host_live_bytes + signals.host_warm_bytes > signals.host_capacity_bytes:
        return "more bytes are in use than its host tier has"
    if not 1 <= signals.budget_floor_tokens <= signals.budget_max_tokens:
        return "its budget's floor is above its budget, or is 0"
    ceiling = signals.budget_ceiling_tokens
    if ceiling is not None and (not _are_numbers(ceiling) or ceiling < 1):
        return f"its budget's ceiling is {ceiling}"
    return _curve_nonsense(signals)


def _curve_nonsense(signals: ReplicaSignals) -> str:
    """What is impossible in a demand curve: it rises with the budget, to what so many turns may at most need."""
    budgets = [budget for budget, _, _ in signals.demand]
    numbers = [budget for budget in budgets[:-1] if budget is not None]
    if not budgets or budgets[-1] is not None or len(numbers) != len(budgets) - 1:
        return "its demand curve does not end with all tokens"
    active = [bytes_ for _, bytes_, _ in signals.demand]
    if not _are_numbers(*numbers, *active, *(bytes_ for _, _, bytes_ in signals.demand)):
        return "its demand curve has a number that is missing, negative or not finite"
    if not (_rises(numbers, strictly=True) and _rises(active, strictly=False)):
        return "its demand curve falls"
    num_turns = signals.num_running + signals.num_waiting
    if active[-1] > signals.capacity_bytes * (num_turns + 1) * _TURN_POOLS_MAX:
        return f"{num_turns} turns cannot need {active[-1]} bytes"
    return ""


def _are_numbers(*values: object) -> bool:
    """Whether all are finite and not negative; sources hand on what they were given, whatever its type."""
    return all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
        for value in values
    )


def _rises(values: Sequence[float], *, strictly: bool) -> bool:
    return all(a < b or (a == b and not strictly) for a, b in pairwise(values))


def _demand_at(replica: ReplicaSignals, budget_tokens: int | None) -> int:
    """One curve at a budget: of the first rung that is no smaller."""
    for rung, active_bytes, _ in replica.demand[:-1]:
        if budget_tokens is not None and rung is not None and rung >= budget_tokens:
            return active_bytes
    return replica.demand[-1][1]
