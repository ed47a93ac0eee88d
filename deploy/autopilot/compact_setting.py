"""From which share of its pool on an engine admits turns as compact: an autopilot's word while its lease runs, else the engine's own.

The word ends with its lease even where nobody comes to say so, hence the alarm. Knows the engine as one function.
"""

import asyncio
from collections.abc import Callable

from deploy.autopilot.lease import BudgetLease
from monitoring.catalogue import COMPACT_ABOVE
from monitoring.sinks import MetricSink


class CompactSetting:
    """Keeps one engine at what a lease says. Event loop only; `put` is called in a thread, once at a time."""

    def __init__(
        self, lease: BudgetLease, put: Callable[[float], None], *, own_ratio: float, metrics: MetricSink
    ) -> None:
        """`put` sets the engine, which has `own_ratio` now."""
        self._lease, self._put, self._metrics = lease, put, metrics
        self._own_ratio = self._ratio = own_ratio
        self._one_at_a_time = asyncio.Lock()
        self._alarm: asyncio.TimerHandle | None = None
        self._returning: asyncio.Task[None] | None = None
        metrics.set(COMPACT_ABOVE, own_ratio)

    @property
    def ratio(self) -> float:
        """In force."""
        return self._ratio

    async def follow(self) -> None:
        """Set the engine as the lease has it now, and again when the lease ends. Raises ConfigError where the engine does."""
        async with self._one_at_a_time:
            ordered = self._lease.compact_above_ratio
            ratio = self._own_ratio if ordered is None else ordered
            if ratio != self._ratio:
                await asyncio.to_thread(self._put, ratio)
                self._ratio = ratio
                self._metrics.set(COMPACT_ABOVE, ratio)
        self._set_alarm()

    def _set_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = None
        if self._lease.compact_above_ratio is not None:
            self._alarm = asyncio.get_running_loop().call_later(self._lease.left_s, self._lease_ended)

    def _lease_ended(self) -> None:
        self._returning = asyncio.get_running_loop().create_task(self.follow())
