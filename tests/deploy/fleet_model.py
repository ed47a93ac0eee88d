"""A fleet on paper: replicas with pools and batches, conversations that arrive and are answered, and replicas that take their time to
start. Time is a number; nothing sleeps.

A turn holds its whole KV while it is resident and leaves the faster the smaller the budget is. Its working set grows with the budget
up to all of its tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from deploy.autopilot.decision import decide, take_over
from deploy.autopilot.records import Decision, PilotState
from deploy.autopilot.settings import AutopilotSettings
from deploy.autopilot.signals import Reading, ReplicaCounts, trusted
from deploy.calls import ReplicaSignals

TOKEN_BYTES = 1000
BUDGETS = (64, 128, 256, 512, 1024)


def signals(
    name: str = "a",
    *,
    active_tokens: int = 0,
    turns: int | None = None,
    waiting: int = 0,
    warm_bytes: int = 0,
    shared_bytes: int = 0,
    capacity_bytes: int = 100_000_000,
    max_running: int = 32,
    unix_time: float = 0.0,
    **changes: object,
) -> ReplicaSignals:
    """One replica whose `turns` turns (1 a thousand tokens unless told) have `active_tokens` tokens in all."""
    num_turns = max(1, active_tokens // 1000) if turns is None else turns
    active_tokens = min(active_tokens, (capacity_bytes - warm_bytes - shared_bytes) // TOKEN_BYTES)
    of_turn = active_tokens / max(1, num_turns)
    demand = [(budget, int(num_turns * min(budget, of_turn)) * TOKEN_BYTES) for budget in BUDGETS]
    made = ReplicaSignals(
        replica=name,
        unix_time=unix_time,
        accepting=True,
        capacity_bytes=capacity_bytes,
        active_bytes=active_tokens * TOKEN_BYTES,
        warm_bytes=warm_bytes,
        shared_bytes=shared_bytes,
        demand=(*((budget, bytes_, 0) for budget, bytes_ in demand), (None, active_tokens * TOKEN_BYTES, 0)),
        num_running=min(num_turns, max_running) if active_tokens else 0,
        num_waiting=waiting,
        max_running=max_running,
        budget_ceiling_tokens=None,
        budget_max_tokens=BUDGETS[-1],
        budget_floor_tokens=BUDGETS[0],
    )
    return replace(made, **changes)


@dataclass
class FleetModel:
    """Serve and its replicas. `arrivals(now)` turns arrive a second; each brings `turn_tokens` tokens."""

    arrivals: Callable[[float], float]
    target: int = 1
    start_s: float = 60.0
    turn_tokens: int = 4000
    service_s: float = 20.0  # of one turn at the full budget, by the batch
    pool_tokens: int = 100_000
    max_running: int = 32
    now_s: float = 0.0
    ceiling_tokens: int | None = None
    ready: int = 1
    starting: list[float] = field(default_factory=list)  # when each will be ready
    turns: float = 0.0  # present, running or waiting
    served: float = 0.0

    @property
    def budget(self) -> int:
        return BUDGETS[-1] if self.ceiling_tokens is None else self.ceiling_tokens

    @property
    def running(self) -> float:
        by_memory = self.ready * self.pool_tokens / self.turn_tokens
        return min(self.turns, self.ready * self.max_running, by_memory)

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
        self.ready += sum(at <= self.now_s for at in self.starting)
        self.starting = [at for at in self.starting if at > self.now_s]
        speed = 1.0 + (BUDGETS[-1] - self.budget) / BUDGETS[-1]  # twice as fast, nearly, at the floor
        left = min(self.turns, self.running * seconds * speed / self.service_s)
        self.served += left
        self.turns += self.arrivals(self.now_s) * seconds - left

    def scale(self, target: int) -> None:
        while self.ready + len(self.starting) < target:
            self.starting.append(self.now_s + self.start_s)
        while self.ready + len(self.starting) > target:
            if self.starting:
                self.starting.pop()
            else:
                self.ready -= 1
        self.target = target

    def reading(self) -> Reading:
        share = 1 / max(1, self.ready)
        running, waiting = self.running * share, (self.turns - self.running) * share
        working = [
            (budget, int((running + waiting) * min(budget, self.turn_tokens)) * TOKEN_BYTES) for budget in BUDGETS
        ]
        one = ReplicaSignals(
            replica="",
            unix_time=self.now_s,
            accepting=True,
            capacity_bytes=self.pool_tokens * TOKEN_BYTES,
            active_bytes=min(int(running * self.turn_tokens), self.pool_tokens) * TOKEN_BYTES,
            warm_bytes=0,
            shared_bytes=0,
            demand=(
                *((budget, bytes_, 0) for budget, bytes_ in working),
                (None, int((running + waiting) * self.turn_tokens) * TOKEN_BYTES, 0),
            ),
            num_running=round(running),
            num_waiting=round(waiting),
            max_running=self.max_running,
            budget_ceiling_tokens=self.ceiling_tokens,
            budget_max_tokens=BUDGETS[-1],
            budget_floor_tokens=BUDGETS[0],
        )
        return Reading(tuple(replace(one, replica=f"r{i}") for i in range(self.ready)))

    def counts(self) -> ReplicaCounts:
        return ReplicaCounts(self.target, self.ready, len(self.starting), 0)


def fly(fleet: FleetModel, settings: AutopilotSettings, seconds: float) -> list[Decision]:
    """The fleet under the autopilot, round after round; orders are carried out at once."""
    decisions: list[Decision] = []
    state: PilotState | None = None
    until_s = fleet.now_s + seconds
    while fleet.now_s < until_s:
        fleet.advance(settings.interval_s)
        snapshot = trusted(fleet.reading(), fleet.counts(), settings, unix_time=fleet.now_s)
        state = take_over(snapshot, fleet.now_s) if state is None else state
        decision = decide(snapshot, state, settings, fleet.now_s)
        fleet.ceiling_tokens = decision.state.ceiling_tokens
        fleet.scale(decision.state.replicas_wanted)
        state = replace(decision.state, is_acknowledged=True)
        decisions.append(decision)
    return decisions
