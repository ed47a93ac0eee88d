"""Which sessions change hands, in which order, to whom, and whether that pays. Pure: nothing is moved here.

The new holder is the replica to which routers will send the session's next turn: the same decision (`router.affinity`) over the same
published loads, without an owner. So both agree without talking; and once the new holder claims the session, its claim leads.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from deploy.handoff.records import Result
from deploy.handoff.settings import HandoffSettings
from loopserve.dialogue import SessionId
from loopserve.move_cost import MoveCost
from router.affinity import (
    Affinity,
    AffinityKey,
    AffinitySettings,
    ReplicaLoad,
    ReplicaName,
    ReplicaView,
    Roster,
)


@dataclass(frozen=True, slots=True)
class HeldSession:
    """One session of this replica, as a hand-off sees it."""

    session_id: SessionId
    key: str  # see router.identity
    home: str
    num_tokens: int  # whose KV is there: what another replica would compute again
    num_kv_bytes: int
    idle_s: float
    is_active: bool


@dataclass(frozen=True, slots=True)
class Remaining:
    """What is left of the limits of one round."""

    seconds: float
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Decision:
    """`target` takes it; None: it stays here and is counted as `left`."""

    target: ReplicaName | None
    left: Result | None = None


class Places:
    """Where sessions belong, by what routers see of the replicas."""

    def __init__(
        self, loads: Mapping[str, ReplicaLoad], affinity: AffinitySettings, *, known_prefill_s: float = 0.0
    ) -> None:
        """`known_prefill_s`: seconds a token of prefill as this replica has measured it; 0 where it has not."""
        self.loads = loads
        self._roster = Roster([ReplicaView(ReplicaName(name), load) for name, load in loads.items()])
        self._affinity = Affinity(affinity, clock=lambda: 0.0)  # it owns nothing and remembers nothing
        self._known_prefill_s = max([known_prefill_s, *(load.prefill_s_per_token for load in loads.values())])

    def of(self, session: HeldSession) -> ReplicaName | None:
        """The replica that routers choose for the session where nobody claims it; None where none accepts turns."""
        key = AffinityKey(home=session.home, prompt_tokens=session.num_tokens, continues=True)
        ranked = self._affinity.rank(key, self._roster).replicas
        return ranked[0] if ranked and self.loads[ranked[0]].accepting else None

    def recompute_s(self, session: HeldSession, target: str) -> float | None:
        """How long `target` would compute the session again; None where nobody has measured that yet."""
        per_token = self.loads[target].prefill_s_per_token or self._known_prefill_s
        return session.num_tokens * per_token if per_token > 0 else None


def hottest_first(sessions: Iterable[HeldSession]) -> list[HeldSession]:
    """Those that hold KV, the most recently used first: they are the likeliest to come back, and time may run out."""
    return sorted((session for session in sessions if session.num_tokens > 0), key=lambda s: (s.idle_s, s.session_id))


def decide(
    session: HeldSession, places: Places, cost: MoveCost, *, remaining: Remaining, settings: HandoffSettings
) -> Decision:
    """Whether a session moves, and where to. Without a measured speed of computing, moving is taken to pay."""
    if session.is_active:
        return Decision(None, Result.BUSY)
    target = places.of(session)
    if target is None:
        return Decision(None, Result.REFUSED)
    move_s = cost.seconds(session.num_kv_bytes)
    recompute_s = places.recompute_s(session, target)
    if recompute_s is not None and move_s >= recompute_s:
        return Decision(None, Result.NOT_WORTH_IT)
    is_too_large = session.num_kv_bytes > min(remaining.num_bytes, settings.session_bytes_max)
    if is_too_large or move_s > min(remaining.seconds, settings.move_timeout_s):
        return Decision(None, Result.OVER_LIMIT)
    return Decision(target)


def displaced(
    sessions: Iterable[HeldSession], places: Places, *, own: str, settings: HandoffSettings
) -> list[HeldSession]:
    """What an overloaded replica should give to other homes: idle sessions that routers put here only because it holds them.

    Nothing unless a turn waits long here and not at all there; then a few of the hottest. `places` holds this replica, too.
    """
    if places.loads[own].queue_s < settings.rebalance_wait_s:
        return []
    found = []
    for session in hottest_first(sessions):
        home = None if session.is_active else places.of(session)
        if home is not None and home != own and places.loads[home].queue_s == 0.0:
            found.append(session)
    return found[: settings.rebalance_sessions_max]
