"""The last minutes of the fleet, as one ingress process has seen them or Prometheus tells them. Asks only while somebody watches.

However many pages are open, the fleet is asked once a second. Knows nothing of HTTP, and of the fleet only where samples come from.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from deploy.observe.counting import Odometer, SampleLike
from deploy.observe.state import Moment, now, point, read_moment

KEPT_S = 330.0  # the page shows five minutes; a little more, so that its left edge is never empty
WINDOW_S = 60.0  # over which latencies are counted
RATE_S = 5.0  # over which a rate is taken: one second of tokens is mostly noise
PERIOD_S = 0.9  # pages ask once a second; a little less, so that each finds something new
GAP_S = 5.0  # a longer time without a moment is filled from Prometheus
MOMENTS_MAX = 1024


class History(Protocol):
    """Who remembers what nobody watched."""

    async def between(self, start_s: float, end_s: float) -> Sequence[tuple[float, Sequence[SampleLike]]]:
        """Samples by unix time, oldest first; empty where nothing is known."""


@dataclass(frozen=True, slots=True)
class _Kept:
    moment: Moment
    point: dict[str, Any]


class Watcher:
    """Moments and their points, oldest first. One event loop."""

    def __init__(
        self,
        read: Callable[[], Awaitable[Sequence[SampleLike]]],
        history: History | None = None,
        *,
        unix_time: Callable[[], float] = time.time,
    ) -> None:
        self._read, self._history, self._unix_time = read, history, unix_time
        self._odometer = Odometer()
        self._kept: deque[_Kept] = deque(maxlen=MOMENTS_MAX)
        self._turn = asyncio.Lock()

    async def state(self, since_s: float) -> dict[str, Any]:
        """The present numbers and every point after `since_s`, as JSON. Raises what reading raises."""
        async with self._turn:
            if not self._kept or self._unix_time() - self._kept[-1].moment.unix_time >= PERIOD_S:
                await self._look()
        moment = self._kept[-1].moment
        points = [kept.point for kept in self._kept if kept.point["t"] > since_s]
        earlier = self._at_or_before(moment.unix_time - WINDOW_S) or self._kept[0].moment
        return {
            **now(moment, earlier),
            "has_history": self._history is not None,
            "points": points,
        }

    async def _look(self) -> None:
        at = self._unix_time()
        known_until = self._kept[-1].moment.unix_time if self._kept else 0.0
        if self._history is not None and at - known_until > GAP_S:
            for past_at, samples in await self._history.between(max(known_until + 1.0, at - KEPT_S), at - 1.0):
                self._keep(read_moment(past_at, samples, self._odometer))
        samples = await self._read()
        self._keep(read_moment(self._unix_time(), samples, self._odometer))

    def _keep(self, moment: Moment) -> None:
        previous = self._kept[-1].moment if self._kept else None
        if previous is not None and moment.unix_time <= previous.unix_time:
            return  # a clock that was set back: wait until it has caught up
        base = self._at_or_before(moment.unix_time - RATE_S) or (self._kept[0].moment if self._kept else None)
        self._kept.append(_Kept(moment, point(moment, previous=previous, rate_base=base)))
        while self._kept[0].moment.unix_time < moment.unix_time - KEPT_S:
            self._kept.popleft()

    def _at_or_before(self, unix_time: float) -> Moment | None:
        """The newest moment that is no later."""
        return next((kept.moment for kept in reversed(self._kept) if kept.moment.unix_time <= unix_time), None)
