"""What a decision is made of: the state that rounds hand on, the pressures, the decision itself. Knows nothing of how one is made."""

import math
from dataclasses import dataclass
from enum import StrEnum

from deploy.autopilot.signals import Cause, FleetLoad


class Action(StrEnum):
    """What a round did."""

    TIGHTEN = "tighten"
    RELAX = "relax"
    COMPACT = "compact"  # admitted turns, from now on
    RESIDENT = "resident"  # no longer so
    ADD = "add"
    REMOVE = "remove"
    KEEP = "keep"
    HOLD = "hold"


@dataclass(frozen=True, slots=True)
class PilotState:
    """What one round hands on to the next. Times are `now_s` of their round; -inf: never."""

    ceiling_tokens: int | None  # None: no ceiling
    replicas_wanted: int
    compact_above_ratio: float | None = None  # None: as each engine has it
    is_acknowledged: bool = True  # Serve has taken `replicas_wanted`
    tightened_at_s: float = -math.inf
    relaxed_at_s: float = -math.inf
    num_regrets: int = 0  # relaxations that were soon taken back; each doubles the hold before the next
    compacted_at_s: float = -math.inf
    added_at_s: float = -math.inf
    removed_at_s: float = -math.inf
    added_for: int = 0  # replicas that the load called for when some were added last
    calm_since_s: float | None = None  # all pressures below low
    roomy_since_s: float | None = None  # all turns could be resident
    spare_since_s: float | None = None  # a replica could go
    idle_since_s: float | None = None  # nothing runs, waits or arrives
    vetoed_since_s: float | None = None  # idle conversations have put a removal off
    foreign_since_s: float | None = None  # Serve's target is not the one that was ordered


@dataclass(frozen=True, slots=True)
class Pressures:
    """The signals, over the capacity of the replicas that are ready."""

    compressed_ratio: float  # what active conversations would hold at the budget in force, compact where they may be
    full_ratio: float  # the same without a ceiling
    whole_ratio: float  # all of their tokens
    pool_ratio: float  # live bytes, as they are
    queue_ratio: float  # waiting turns over places


@dataclass(frozen=True, slots=True)
class Decision:
    """One round: what was done, on which numbers, and why. `state` holds what is now wanted."""

    at_s: float
    actions: tuple[Action, ...]
    reason: str
    state: PilotState
    load: FleetLoad | None = None
    pressures: Pressures | None = None
    cause: Cause | None = None  # why it holds, with one actuator or both


@dataclass(frozen=True, slots=True)
class Step:
    """What one actuator's part of the decision comes to. `reason` is empty where there is nothing to say."""

    state: PilotState
    action: Action = Action.KEEP
    reason: str = ""
