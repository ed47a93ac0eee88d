"""Waits that end, and sends that keep their distance: the two clocks in a stream's way. Hops 3 and 12; event loop only, knows no HTTP.

Patience   the wait for a stream's next item, limited by one timer for the whole stream
Pace       how soon the next piece may be sent, where a reader takes only so many a second
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Generic, TypeVar

from deploy.errors import TimedOut

_T = TypeVar("_T")


class Patience(Generic[_T]):
    """The items of one stream, each within `limit_s`; to be asked by one task, and closed.

    An item comes every few milliseconds, a limit takes minutes: a timer for each would cost more than all else that is done with an item
    (4 of 14 us a token, 2 cores). One timer looks now and then how long the present wait has lasted.
    """

    def __init__(self, items: AsyncGenerator[_T, None], limit_s: float, what: str) -> None:
        """`what` did not come, says the error."""
        self._items = items
        self._limit_s = limit_s
        self._what = what
        self._loop = asyncio.get_running_loop()
        self._waits_since_s: float | None = None
        self._task: asyncio.Task[object] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_over = False

    async def next(self) -> _T | None:
        """The next item, None at the end. Raises TimedOut."""
        self._waits_since_s = self._loop.time()
        if self._timer is None:
            self._task = asyncio.current_task()
            self._timer = self._loop.call_at(self._waits_since_s + self._limit_s, self._look)
        try:
            return await self._items.__anext__()
        except StopAsyncIteration:
            return None
        except asyncio.CancelledError as error:
            if not self._is_over:
                raise
            assert self._task is not None
            if self._task.uncancel() > 0:  # somebody else cancels as well
                raise
            raise TimedOut(f"{self._what} within {self._limit_s:g} s; try again later.") from error
        finally:
            self._waits_since_s = None

    def close(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        assert self._task is not None
        now_s = self._loop.time()
        ends_s = (now_s if self._waits_since_s is None else self._waits_since_s) + self._limit_s
        if ends_s <= now_s:
            self._is_over = True
            self._task.cancel()
        else:
            self._timer = self._loop.call_at(ends_s, self._look)


class Pace:
    """Slots for pieces: `per_s` a second on the long run, `burst_s` worth of them at once. Shared by all streams of a process."""

    def __init__(self, per_s: float, *, burst_s: float, clock: Callable[[], float]) -> None:
        assert per_s > 0 and burst_s >= 0
        self._slot_s = 1.0 / per_s
        self._burst_s = burst_s
        self._clock = clock
        self._taken_until_s = clock()

    def wait_s(self) -> float:
        """Take the next slot: seconds until it may be used, 0 while there are fewer pieces than slots."""
        now_s = self._clock()
        begins_s = max(self._taken_until_s, now_s)
        self._taken_until_s = begins_s + self._slot_s
        return max(0.0, begins_s - now_s - self._burst_s)
