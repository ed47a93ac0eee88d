"""The round: look, decide, act, explain. Owns the state between rounds. Knows nothing of Ray; the deployment ties it to a process.

    read the replicas and Serve, side by side  ->  trusted  ->  decide, or hold
        -> renew the budget's order at all replicas; their replies say whether another autopilot is heard
        -> only if not: tell Serve the replica count, where it has not taken it yet

Every wait of a round ends. What fails is counted, and tried again with the next round; nothing is undone because of it.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from deploy.autopilot.decision import decide, hold, take_over
from deploy.autopilot.explain import Round, Teller
from deploy.autopilot.records import Decision, PilotState
from deploy.autopilot.scaler import Scaler, ScalerFailed
from deploy.autopilot.settings import AutopilotSettings, PilotMode
from deploy.autopilot.signals import Cause, Reading, ReplicaCounts, Snapshot, Untrusted, trusted
from deploy.autopilot.sources import SignalSource
from deploy.calls import BudgetOrder, BudgetReply
from deploy.fleet import Fleet

_ROUNDS_GAP_S = 0.05  # between two rounds, however often it is woken


@dataclass(frozen=True, slots=True)
class Instruments:
    """What the settings say to read and to act with; built anew when they change."""

    source: SignalSource
    scaler: Scaler


@dataclass(frozen=True, slots=True)
class _View:
    """What one round found out; either a snapshot, or why there is none."""

    counts: ReplicaCounts | None
    snapshot: Snapshot | None
    untrusted: Untrusted | None


class Pilot:
    """One autopilot. Event loop only."""

    def __init__(
        self,
        name: str,
        settings: AutopilotSettings,
        *,
        engines: Fleet,
        ingresses: Fleet | None,
        instruments: Callable[[AutopilotSettings], Instruments],
        teller: Teller,
        clock: Callable[[], float],
        unix_time: Callable[[], float],
        log: logging.Logger,
    ) -> None:
        """`engines` obey the orders, `ingresses` know what is in flight (None: nobody does). `clock` never goes back."""
        self._name = name
        self._settings = settings
        self._engines, self._ingresses = engines, ingresses
        self._open_instruments = instruments
        self._instruments: Instruments | None = None
        self._opened_for: AutopilotSettings | None = None
        self._teller = teller
        self._clock, self._unix_time = clock, unix_time
        self._log = log
        self._state: PilotState | None = None
        self._has_ordered = False  # replicas may be under a ceiling of ours
        self._is_woken = False
        self._alarm = asyncio.Event()
        self._round_ended_at_s = clock()

    @property
    def settings(self) -> AutopilotSettings:
        """In force from the next round on."""
        return self._settings

    def set(self, settings: AutopilotSettings) -> None:
        """New settings, from the next round on."""
        if settings.mode != self._settings.mode:
            self._state = None  # whatever has happened meanwhile counts
        self._settings = settings
        self._alarm.set()

    @property
    def can_wake(self) -> bool:
        """Whether a fleet without replicas may be one that sleeps."""
        return self._settings.mode == PilotMode.ON and self._settings.min_replicas == 0

    def wake(self) -> bool:
        """A request has found no replica. Whether one will come."""
        if self.can_wake:
            self._is_woken = True
            self._alarm.set()
        return self.can_wake

    def silent_s(self) -> float:
        """Since the last round ended."""
        return self._clock() - self._round_ended_at_s

    async def run(self) -> None:
        """Round after round, until cancelled."""
        while True:
            try:
                await self.round()
            except Exception as error:  # a mistake of ours in one round must not be the end of all
                self._log.exception("the autopilot's round failed")
                self._teller.failed("round", f"{type(error).__name__}: {error}")
            self._round_ended_at_s = self._clock()
            await asyncio.sleep(min(_ROUNDS_GAP_S, self._settings.interval_s))
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.interval_s):
                    await self._alarm.wait()
            self._alarm.clear()

    async def close(self) -> None:
        """Give back what is held; the fleet stays as it is."""
        if self._instruments is not None:
            await self._instruments.source.close()
            await self._instruments.scaler.close()
            self._instruments = None

    async def round(self) -> None:
        """One round."""
        settings, began_s = self._settings, self._clock()
        self._teller.mode(settings)
        if settings.mode != PilotMode.ON and self._has_ordered:
            await self._release(settings)
        if settings.mode == PilotMode.OFF:
            return
        instruments = await self._instruments_for(settings)
        view = await self._look(instruments, settings)
        decision = self._decided(view, settings)
        if settings.mode == PilotMode.ON and self._state is not None:
            decision = await self._act(decision, view, instruments.scaler, settings)
        if self._settings.mode == settings.mode:  # else begun anew, while this round went on
            self._keep(decision, view, settings)
        duration_s = self._clock() - began_s
        self._teller.tell(Round(decision, view.snapshot, view.counts, self._unix_time(), duration_s), settings)

    # ---- look ----

    async def _look(self, instruments: Instruments, settings: AutopilotSettings) -> _View:
        reading, counts, in_flight = await asyncio.gather(
            self._read(instruments.source), self._count(instruments.scaler), self._in_flight(settings)
        )
        try:
            if isinstance(reading, Untrusted):
                raise reading
            snapshot = trusted(reading, counts, settings, unix_time=self._unix_time())
        except Untrusted as untrusted:
            return _View(counts, None, untrusted)
        return _View(counts, replace(snapshot, in_flight=in_flight, is_woken=self._is_woken), None)

    async def _read(self, source: SignalSource) -> Reading | Untrusted:
        try:
            return await source.read()
        except Untrusted as untrusted:
            return untrusted

    async def _count(self, scaler: Scaler) -> ReplicaCounts | None:
        try:
            counts = await scaler.counts()
        except ScalerFailed as failure:
            self._teller.failed("count", str(failure))
            return None
        self._teller.works("count")
        return counts

    async def _in_flight(self, settings: AutopilotSettings) -> int | None:
        """Completion requests at the ingresses; None where one does not say, or nobody needs to know."""
        if settings.min_replicas > 0 or self._ingresses is None:
            return None
        try:
            replies = await self._ingresses.ask("in_flight")
        except Exception as error:  # Ray's errors have no common root
            self._log.debug("the ingresses cannot be asked: %s", error)
            return None
        told = list(replies.by_replica.values())
        return None if replies.silent or not told else sum(told)

    # ---- decide ----

    def _decided(self, view: _View, settings: AutopilotSettings) -> Decision:
        now_s = self._clock()
        if self._state is None:
            self._state = self._first_state(view, now_s)
        if view.snapshot is not None and self._state is not None:
            return decide(view.snapshot, self._state, settings, now_s)
        assert view.untrusted is not None
        if self._state is None:  # nothing is taken over yet, so nothing is done
            return hold(view.untrusted, None, PilotState(None, settings.min_replicas), settings, now_s)
        return hold(view.untrusted, view.counts, self._state, settings, now_s, is_woken=self._is_woken)

    def _first_state(self, view: _View, now_s: float) -> PilotState | None:
        """What is in force; None until it is known. A fleet asleep has no budget that could be unknown."""
        snapshot = view.snapshot
        if snapshot is None and view.counts is not None and view.counts.target == 0:
            snapshot = Snapshot((), view.counts, age_s=0.0)
        return None if snapshot is None else take_over(snapshot, now_s)

    def _keep(self, decision: Decision, view: _View, settings: AutopilotSettings) -> None:
        """What the next round begins with."""
        if self._state is None:
            return
        self._state = decision.state
        if decision.state.replicas_wanted > 0:
            self._is_woken = False
        if settings.mode == PilotMode.DRY_RUN and view.snapshot is not None:  # nothing was done: go on from what is so
            actual = take_over(view.snapshot, self._clock())
            self._state = replace(
                decision.state,
                ceiling_tokens=actual.ceiling_tokens,
                compact_above_ratio=actual.compact_above_ratio,
                replicas_wanted=actual.replicas_wanted,
            )

    # ---- act ----

    async def _act(self, decision: Decision, view: _View, scaler: Scaler, settings: AutopilotSettings) -> Decision:
        """Order the budget; then, where no other autopilot is heard, the replicas."""
        other = await self._order(decision.state.ceiling_tokens, decision.state.compact_above_ratio, settings)
        if other:
            untrusted = Untrusted(Cause.OTHER, f"the replicas obey autopilot {other}, this one is {self._name}")
            state = decision.state if view.snapshot is None else take_over(view.snapshot, self._clock())
            return replace(hold(untrusted, None, state, settings, self._clock()), load=decision.load)
        return replace(decision, state=await self._scale(decision.state, view.counts, scaler))

    async def _order(
        self, ceiling_tokens: int | None, compact_above_ratio: float | None, settings: AutopilotSettings
    ) -> str:
        """Renew the order at all replicas. The id of the autopilot that is heard instead; empty: this one."""
        self._has_ordered = True
        order = BudgetOrder(self._name, ceiling_tokens, settings.lease_s, compact_above_ratio)
        try:
            replies = await self._engines.ask("set_budget", order)
        except Exception as error:  # Ray's errors have no common root
            self._teller.failed("budget", f"{type(error).__name__}: {error}")
            return ""
        told: dict[str, Any] = replies.by_replica
        others = {reply.holder for reply in told.values() if isinstance(reply, BudgetReply) and not reply.obeyed}
        others -= {self._name, ""}
        deaf = [name for name, reply in told.items() if not (isinstance(reply, BudgetReply) and reply.obeyed)]
        if others:
            return min(others)
        if replies.silent or deaf:
            self._teller.failed("budget", f"not obeyed by {', '.join([*replies.silent, *deaf])}")
        else:
            self._teller.works("budget")
        return ""

    async def _scale(self, state: PilotState, counts: ReplicaCounts | None, scaler: Scaler) -> PilotState:
        """Tell Serve, unless it has taken the count already. The state, acknowledged if it has."""
        if state.is_acknowledged or counts is None:
            return state
        if counts.target != state.replicas_wanted:
            try:
                await scaler.scale(state.replicas_wanted)
            except ScalerFailed as failure:
                self._teller.failed("replicas", str(failure))
                return state
        self._teller.works("replicas")
        return replace(state, is_acknowledged=True)

    async def _release(self, settings: AutopilotSettings) -> None:
        """Switched off: no ceiling of ours stays behind."""
        other = await self._order(None, None, settings)
        self._has_ordered = False
        self._log.info(
            "autopilot %s: mode is %s, the budget's ceiling is %s", self._name, settings.mode, other or "lifted"
        )

    async def _instruments_for(self, settings: AutopilotSettings) -> Instruments:
        if self._instruments is None or settings is not self._opened_for:
            await self.close()
            self._instruments = self._open_instruments(settings)
            self._opened_for = settings
        return self._instruments
