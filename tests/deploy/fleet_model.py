"""A fleet on paper: replicas with pools, host memory and batches, conversations that arrive and are answered, and replicas that take their
time to start. Time is a number, turns are counted in fractions; nothing sleeps.

A resident turn holds all of its tokens on the device. A compact one holds places for its budget, sinks and newest tokens there and the rest
in host memory; its places follow the budget a refresh later. An engine admits turns as it is told, makes resident ones compact when its
pool is full, and preempts when even that is not enough. Turns leave the faster the smaller the budget is. What a real engine also does,
lowering budgets by itself, is left out: the autopilot has to manage without.
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
SINK_TOKENS, NEWEST_TOKENS = 4, 48  # of a compact turn: three blocks that are not full, or not moved yet


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
    is_flat: bool = False,
    **changes: object,
) -> ReplicaSignals:
    """One replica whose `turns` turns (1 a thousand tokens unless told) have `active_tokens` tokens in all, and are resident.

    Compact each would hold its budget. `is_flat`: there is no host tier, so none of them can be.
    """
    num_turns = max(1, active_tokens // 1000) if turns is None else turns
    active_tokens = min(active_tokens, (capacity_bytes - warm_bytes - shared_bytes) // TOKEN_BYTES)
    of_turn = active_tokens / max(1, num_turns)
    demand = [(b, int(num_turns * min(of_turn if is_flat else b, of_turn)) * TOKEN_BYTES) for b in BUDGETS]
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
    host_tokens: int = 400_000  # 0: there is no host tier
    max_running: int = 32
    refresh_s: float = 2.0  # until places follow a budget
    now_s: float = 0.0
    ceiling_tokens: int | None = None
    compact_above_ratio: float = 1.0
    ready: int = 1
    starting: list[float] = field(default_factory=list)  # when each will be ready
    resident: float = 0.0
    compact: float = 0.0
    waiting: float = 0.0
    served: float = 0.0
    preempted: float = 0.0
    _budgets: list[tuple[float, int]] = field(
        default_factory=lambda: [(-1e9, BUDGETS[-1])]
    )  # since when each is in force

    @property
    def running(self) -> float:
        return self.resident + self.compact

    @property
    def turns(self) -> float:
        return self.running + self.waiting

    @property
    def places_budget(self) -> int:
        """The budget that places have followed by now."""
        return [budget for since_s, budget in self._budgets if since_s <= self.now_s - self.refresh_s][-1]

    @property
    def held_tokens(self) -> float:
        """On all devices."""
        return self.resident * self.turn_tokens + self.compact * self.compact_tokens(self.places_budget)

    def compact_tokens(self, budget: int) -> int:
        """On the device, of one turn; as many as it has where it cannot be compact."""
        if not self.host_tokens:
            return self.turn_tokens
        places = -(-(SINK_TOKENS + budget) // 16) * 16
        return min(self.turn_tokens, places + NEWEST_TOKENS)

    def order(self, ceiling_tokens: int | None, compact_above_ratio: float | None) -> None:
        self.ceiling_tokens = ceiling_tokens
        self.compact_above_ratio = 1.0 if compact_above_ratio is None else compact_above_ratio
        budget = BUDGETS[-1] if ceiling_tokens is None else ceiling_tokens
        if budget != self._budgets[-1][1]:
            self._budgets.append((self.now_s, budget))

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
        self.ready += sum(at <= self.now_s for at in self.starting)
        self.starting = [at for at in self.starting if at > self.now_s]
        speed = 1.0 + (BUDGETS[-1] - self._budgets[-1][1]) / BUDGETS[-1]  # twice as fast, nearly, at the floor
        done = min(1.0, seconds * speed / self.service_s)
        self.served += done * self.running
        self.resident -= done * self.resident
        self.compact -= done * self.compact
        self.waiting += self.arrivals(self.now_s) * seconds
        self._fit()
        self._admit()

    def scale(self, target: int) -> None:
        while self.ready + len(self.starting) < target:
            self.starting.append(self.now_s + self.start_s)
        while self.ready + len(self.starting) > target:
            if self.starting:
                self.starting.pop()
            else:
                self.ready -= 1
        self.target = target

    def _fit(self) -> None:
        """Resident turns become compact where the pools are too full, as far as the host has room; what is left over is preempted."""
        pool, small = self.ready * self.pool_tokens, self.compact_tokens(self.places_budget)
        if self.turn_tokens > small:
            self._make_compact((self.held_tokens - pool) / (self.turn_tokens - small))
        left_over = max(0.0, self.running - self.ready * self.max_running)
        of_each = self.held_tokens / max(self.running, 1e-9)
        left_over = max(left_over, (self.held_tokens - pool) / max(of_each, 1.0))
        share = min(1.0, left_over / max(self.running, 1e-9))
        self.preempted += share * self.running
        self.waiting += share * self.running
        self.resident, self.compact = (1 - share) * self.resident, (1 - share) * self.compact

    def _make_compact(self, turns: float) -> None:
        moved = max(0.0, min(turns, self.resident, self._host_turns()))
        self.resident, self.compact = self.resident - moved, self.compact + moved

    def _host_turns(self) -> float:
        """How many more turns the hosts have room for."""
        return max(0.0, self.ready * self.host_tokens / self.turn_tokens - self.compact)

    def _admit(self) -> None:
        """Resident up to the share that is told, then compact, for which resident ones give way; where the host is full, resident again."""
        pool, small = self.ready * self.pool_tokens, self.compact_tokens(self.places_budget)
        self._admit_resident(self.compact_above_ratio * pool)
        if self.turn_tokens > small:
            wanted = min(self.waiting, self._free_places(), self._host_turns(), pool / small - self.running)
            self._make_compact((self.held_tokens + wanted * small - pool) / (self.turn_tokens - small))
            admitted = max(0.0, min(wanted, self._host_turns(), (pool - self.held_tokens) / small))
            self.compact, self.waiting = self.compact + admitted, self.waiting - admitted
        self._admit_resident(pool)

    def _admit_resident(self, most_tokens: float) -> None:
        room = (most_tokens - self.held_tokens) / self.turn_tokens
        admitted = max(0.0, min(self.waiting, self._free_places(), room))
        self.resident, self.waiting = self.resident + admitted, self.waiting - admitted

    def _free_places(self) -> float:
        return max(0.0, self.ready * self.max_running - self.running)

    def reading(self) -> Reading:
        share = 1 / max(1, self.ready)
        held = min(int(self.held_tokens * share), self.pool_tokens)

        def demand(of_turn: int) -> int:
            return int(self.turns * share * of_turn) * TOKEN_BYTES

        one = ReplicaSignals(
            replica="",
            unix_time=self.now_s,
            accepting=True,
            capacity_bytes=self.pool_tokens * TOKEN_BYTES,
            active_bytes=held * TOKEN_BYTES,
            warm_bytes=0,
            shared_bytes=0,
            demand=(*((b, demand(self.compact_tokens(b)), 0) for b in BUDGETS), (None, demand(self.turn_tokens), 0)),
            num_running=round(self.running * share),
            num_waiting=round(self.waiting * share),
            max_running=self.max_running,
            budget_ceiling_tokens=self.ceiling_tokens,
            budget_max_tokens=BUDGETS[-1],
            budget_floor_tokens=BUDGETS[0],
            compact_above_ratio=self.compact_above_ratio,
            host_capacity_bytes=self.host_tokens * TOKEN_BYTES,
            host_live_bytes=min(int(self.compact * share * self.turn_tokens), self.host_tokens) * TOKEN_BYTES,
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
        fleet.order(decision.state.ceiling_tokens, decision.state.compact_above_ratio)
        fleet.scale(decision.state.replicas_wanted)
        state = replace(decision.state, is_acknowledged=True)
        decisions.append(decision)
    return decisions
