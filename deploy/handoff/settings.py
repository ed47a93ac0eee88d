"""Limits of the hand-off. Pure."""

from dataclasses import dataclass

from loopserve.errors import ConfigError

PIECE_BYTES_MAX = 64 << 20  # Ray's object store may have 200 MiB for all that is under way on a node


@dataclass(frozen=True, slots=True)
class HandoffSettings:
    """All of the hand-off between replicas."""

    enabled: bool = True  # a replica that drains gives its idle sessions away; false: they are computed again
    time_max_s: float = 10.0  # of one drain; never more than half of stop_timeout_s, turns that still run have the rest
    move_timeout_s: float = 5.0  # of one session, from its export to its place in the other engine
    bytes_max: int = 8 << 30  # KV that one drain moves
    session_bytes_max: int = 2 << 30  # image of one session; it lies in memory on both sides
    piece_bytes: int = 8 << 20  # of one call; 219 MB/s with 2 MiB, 536 with 8, 392 with 32 (2 cores, median of 5)
    incoming_max: int = 2  # sessions that come to one replica at once: it may need as many images' memory
    assumed_fixed_s: float = 0.05  # of one move, until moves were measured: a step of the other engine is waited for
    assumed_bytes_per_s: float = 80e6  # until measured; 100 MiB took 1.3 to 1.6 s in all (2 busy cores)
    rebalance_period_s: float = 0.0  # between two looks whether this replica is overloaded; 0: never
    rebalance_wait_s: float = 3.0  # overloaded: a new turn waits so long here, and not at all at the session's home
    rebalance_sessions_max: int = 2  # given away after one look

    def __post_init__(self) -> None:
        for name in (
            "time_max_s",
            "move_timeout_s",
            "bytes_max",
            "session_bytes_max",
            "assumed_bytes_per_s",
            "rebalance_wait_s",
        ):
            _check(getattr(self, name) > 0, f"handoff.{name} is {getattr(self, name)}; it must be positive")
        for name in ("incoming_max", "rebalance_sessions_max"):
            _check(getattr(self, name) >= 1, f"handoff.{name} is {getattr(self, name)}; at least 1 is needed")
        for name in ("assumed_fixed_s", "rebalance_period_s"):
            _check(getattr(self, name) >= 0, f"handoff.{name} is {getattr(self, name)}; it must not be negative")
        _check(
            1 <= self.piece_bytes <= PIECE_BYTES_MAX,
            f"handoff.piece_bytes is {self.piece_bytes}; 1 to {PIECE_BYTES_MAX} are possible",
        )


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
