"""The ingress's side of the autopilot: what it says of itself, and how a request that finds no replica wakes one. Hop 1 of a turn.

A fleet may go to zero when nothing has been asked of it for a while (`autopilot.idle_to_zero_s`). Whoever was answered a moment ago knows
that a replica is there; else a request asks first, and where none is, the autopilot. All requests that wait share one question.
"""

import asyncio
import time
from collections.abc import Callable
from contextvars import Context
from dataclasses import asdict
from typing import Any

from deploy.autopilot.settings import IDLE_TO_ZERO_MIN_S, PilotMode
from deploy.errors import TimedOut
from deploy.fleet import Fleet
from deploy.settings import DeploySettings
from loopserve.errors import EngineUnavailable

_ASK_AGAIN_S = 0.5


class Autopilots:
    """The autopilot as one ingress knows it; None where there is none."""

    def __init__(
        self,
        engines: Fleet,
        autopilots: Fleet | None,
        settings: DeploySettings,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engines, self._autopilots, self._settings, self._clock = engines, autopilots, settings, clock
        self._met_at_s = -IDLE_TO_ZERO_MIN_S
        self._waking: asyncio.Task[None] | None = None

    async def overview(self) -> dict[str, Any]:
        """What the autopilot says of itself. Raises EngineUnavailable where it does not answer."""
        if self._autopilots is None:
            return {"object": "autopilot", "mode": str(PilotMode.OFF), "settings": asdict(self._settings.autopilot)}
        told: list[dict[str, Any]] = list((await self._autopilots.ask("overview")).by_replica.values())
        if not told:
            raise EngineUnavailable("The autopilot does not answer now; try again shortly.")
        return told[0]

    async def is_asleep(self) -> bool:
        """Whether there is no replica only because nobody needs one, and the next request will bring one."""
        return await self._said("can_wake")

    def met(self) -> None:
        """A replica has answered just now."""
        self._met_at_s = self._clock()

    async def find_replica(self) -> None:
        """Return once a replica is there, or at once where none can be woken: what follows says why. Raises TimedOut."""
        if self._autopilots is None or self._clock() - self._met_at_s < IDLE_TO_ZERO_MIN_S:
            return
        if self._waking is None or self._waking.done():
            # Not on behalf of this request: Serve would take questions with the same request id for one another's.
            self._waking = asyncio.create_task(self._wake(), context=Context())
        limit_s = self._settings.admission_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await asyncio.shield(self._waking)
        except TimeoutError as error:
            raise TimedOut(f"No replica was ready within {limit_s:g} s; try again later.") from error

    async def _wake(self) -> None:
        """Ask until a replica is there, for as long as any request may wait."""
        gives_up_at_s = self._clock() + self._settings.admission_timeout_s
        while self._clock() < gives_up_at_s:
            if (await self._engines.ask("status")).by_replica:
                self.met()
                return
            if not await self._said("wake"):
                return
            await asyncio.sleep(_ASK_AGAIN_S)

    async def _said(self, question: str) -> bool:
        if self._autopilots is None:
            return False
        return any(value is True for value in (await self._autopilots.ask(question)).by_replica.values())
