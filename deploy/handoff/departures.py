"""The old holder's side of a hand-off: a replica that drains gives its idle sessions away, one that is overloaded a few. Knows no Ray.

Event loop only. One session after the other, the hottest first: whatever is cut off at the end is what comes back last, if at all.
"""

import asyncio
import logging
import math
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from deploy.handoff.decision import HeldSession, Places, Remaining, decide, displaced, hottest_first
from deploy.handoff.holdings import Holdings, Packed
from deploy.handoff.papers import encode_papers
from deploy.handoff.records import PROTOCOL_VERSION, Offer, Piece, Receipt, Result, Said, Standing
from deploy.handoff.settings import HandoffSettings
from loopserve.errors import Overloaded
from loopserve.move_cost import MoveCost
from monitoring.catalogue import HANDOFFS
from monitoring.sinks import MetricSink
from router.affinity import AffinitySettings, ReplicaLoad

_log = logging.getLogger(__name__)
_LAST_WORD_S = 1.0  # for telling another replica what is left
_COUNTED_THERE = frozenset({Result.MOVED, Result.REFUSED})


class Peers(Protocol):
    """The other replicas. Every call may fail in any way, and is cancelled where it takes too long."""

    async def standings(self) -> Mapping[str, Standing]:
        """What each of them says of itself now, by name; those that say nothing are missing."""

    async def offer(self, target: str, offer: Offer) -> Receipt:
        """See `Arrivals.offer`."""

    async def piece(self, target: str, piece: Piece) -> Receipt:
        """See `Arrivals.piece`."""

    async def count_left(self, target: str, counts: Mapping[str, int]) -> None:
        """See `Arrivals.count_left`."""


@dataclass(frozen=True, slots=True)
class _Limits:
    """When a round must be over, and how much it may move."""

    ends_s: float
    num_bytes: int


class Departures:
    """Sessions on their way out of one replica."""

    def __init__(
        self,
        holdings: Holdings,
        settings: HandoffSettings,
        affinity: AffinitySettings,
        *,
        name: str,
        drain_s: float,
        load: Callable[[], ReplicaLoad],
        metrics: MetricSink,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`drain_s`: how long a drain may take in all; `load`: what this replica publishes of itself."""
        self._holdings = holdings
        self._settings = settings
        self._affinity = affinity
        self._name = name
        self._drain_s = drain_s
        self._load = load
        self._metrics = metrics
        self._clock = clock
        self._cost = MoveCost(fixed_s=settings.assumed_fixed_s, seconds_per_byte=1 / settings.assumed_bytes_per_s)
        self.is_draining = False

    async def drain(self, peers: Peers) -> Counter[Result]:
        """Give away what pays, within the limits; what came of it, by session. Never raises: what is left is computed again."""
        self.is_draining = True
        results: Counter[Result] = Counter()
        if not self._settings.enabled or len(self._holdings) == 0:
            return results
        limits = _Limits(self._clock() + self._drain_s, self._settings.bytes_max)
        loads: Mapping[str, ReplicaLoad] = {}
        try:
            async with asyncio.timeout(self._drain_s):
                standings = await peers.standings()
                loads = {name: standing.load for name, standing in standings.items()}
                if any(load.accepting for load in loads.values()):
                    released = frozenset[str]().union(*(standing.released for standing in standings.values()))
                    sessions = await self._without(released, await self._holdings.sessions())
                    await self._give_away(hottest_first(sessions), self._places(loads), peers, limits, results)
        except TimeoutError:
            _log.warning("no time was left to give sessions away")
        except Exception:  # whatever it was, the replica ends as it should
            _log.exception("giving sessions away failed")
        if results:
            _log.info("replica %s ends; its sessions: %s", self._name, dict(results))
            await self._say_what_is_left(loads, peers, results)
        return results

    async def rebalance(self, peers: Peers) -> Counter[Result]:
        """Give a few sessions back to their homes where this replica is overloaded and these are not. Never raises."""
        results: Counter[Result] = Counter()
        if self.is_draining or self._load().queue_s < self._settings.rebalance_wait_s:
            return results
        limits = _Limits(self._clock() + self._settings.time_max_s, self._settings.bytes_max)
        try:
            async with asyncio.timeout(self._settings.time_max_s):
                loads = {name: standing.load for name, standing in (await peers.standings()).items()}
                places = self._places({**loads, self._name: self._load()})
                sessions = displaced(await self._holdings.sessions(), places, own=self._name, settings=self._settings)
                await self._give_away(sessions, places, peers, limits, results)
        except TimeoutError:
            _log.warning("no time was left to give sessions back to their homes")
        except Exception:
            _log.exception("giving sessions back to their homes failed")
        self._count_here(results)
        return results

    async def rebalance_for_ever(self, peers: Peers) -> None:
        """Look every `rebalance_period_s`; returns at once where that is 0."""
        while self._settings.rebalance_period_s > 0:
            await asyncio.sleep(self._settings.rebalance_period_s)
            await self.rebalance(peers)

    def _places(self, loads: Mapping[str, ReplicaLoad]) -> Places:
        return Places(loads, self._affinity, known_prefill_s=self._load().prefill_s_per_token)

    async def _without(self, released: frozenset[str], sessions: list[HeldSession]) -> list[HeldSession]:
        """All but those that were deleted where this replica did not hear of it; they are deleted here, too."""
        for session in sessions:
            if session.key in released and not session.is_active:
                await self._holdings.let_go(session)
        return [session for session in sessions if session.key not in released]

    async def _give_away(
        self,
        sessions: list[HeldSession],
        places: Places,
        peers: Peers,
        limits: _Limits,
        results: Counter[Result],
    ) -> None:
        """One after the other. A target that is gone or does not answer is not tried again."""
        num_bytes, lost = 0, set[str]()
        for number, session in enumerate(sessions):
            remaining = Remaining(limits.ends_s - self._clock(), limits.num_bytes - num_bytes)
            decision = decide(session, places, self._cost, remaining=remaining, settings=self._settings)
            if decision.target == self._name:
                continue  # its home after all
            if decision.target is None:
                results[decision.left or Result.REFUSED] += 1
                continue
            if decision.target in lost:
                results[Result.FAILED] += 1
                continue
            try:
                result = await self._move(session, decision.target, peers, within_s=remaining.seconds)
            except asyncio.CancelledError:  # the round is over: this one, and all that would have followed
                results[Result.TIMED_OUT] += 1
                results[Result.OVER_LIMIT] += len(sessions) - number - 1
                raise
            results[result] += 1
            if result is Result.MOVED:
                num_bytes += session.num_kv_bytes
            elif result in (Result.FAILED, Result.TIMED_OUT):
                lost.add(decision.target)

    async def _move(self, session: HeldSession, target: str, peers: Peers, *, within_s: float) -> Result:
        record = self._holdings.record(session.key)
        if record is None or not self._holdings.is_same(session.key, record):
            return Result.BUSY
        began_s = self._clock()
        try:
            async with asyncio.timeout(min(within_s, self._settings.move_timeout_s)):
                packed = await self._holdings.pack(session, record)
                if len(packed.image) > self._settings.session_bytes_max:
                    return Result.OVER_LIMIT
                receipt = await self._sent(session, packed, target, peers)
        except TimeoutError:
            spent_s = self._clock() - began_s
            if spent_s > self._cost.seconds(session.num_kv_bytes):  # it would have taken even longer
                self._cost.measured(session.num_kv_bytes, spent_s)
            return Result.TIMED_OUT
        except Overloaded:
            return Result.BUSY  # a turn of it is in the engine
        except Exception as error:
            _log.warning("a session could not be given to replica %s: %s", target, error)
            return Result.FAILED
        if receipt is None:
            return Result.BUSY
        if receipt.said is not Said.MOVED:
            _log.info("replica %s did not take a session: %s", target, receipt.code)
            return Result.REFUSED
        self._cost.measured(len(packed.image), self._clock() - began_s)
        if self._holdings.is_same(session.key, record):
            await self._holdings.let_go(session)
        # Else a turn came while it was imported there: this replica has the newer state, and its claim is the newer one.
        return Result.MOVED

    async def _sent(self, session: HeldSession, packed: Packed, target: str, peers: Peers) -> Receipt | None:
        """The verdict; None where a turn came for the session meanwhile, which goes first."""
        papers = await asyncio.to_thread(encode_papers, packed.papers)
        transfer = secrets.token_hex(16)
        offer = Offer(PROTOCOL_VERSION, transfer, self._name, len(papers), len(packed.image))
        receipt = await peers.offer(target, offer)
        for piece in _pieces(transfer, (papers, packed.image), self._settings.piece_bytes):
            if receipt.said is not Said.GO_ON:
                return receipt
            if not self._holdings.is_same(session.key, packed.papers.conversation):
                return None
            receipt = await peers.piece(target, piece)
        return receipt

    async def _say_what_is_left(self, loads: Mapping[str, ReplicaLoad], peers: Peers, results: Counter[Result]) -> None:
        """Have one that lives count what only this replica knows. One try with each of two, for one may be ending, too."""
        counts = {str(result): count for result, count in results.items() if result not in _COUNTED_THERE}
        if not counts:
            return
        for target in sorted(loads, key=lambda name: not loads[name].accepting)[:2]:
            try:
                async with asyncio.timeout(_LAST_WORD_S / 2):
                    await peers.count_left(target, counts)
                return
            except Exception as error:
                _log.info("replica %s did not count what is left: %s", target, error)

    def _count_here(self, results: Counter[Result]) -> None:
        for result, count in results.items():
            if result not in _COUNTED_THERE:
                self._metrics.inc(HANDOFFS, float(count), result=result)


def _pieces(transfer: str, parts: tuple[bytes, ...], piece_bytes: int) -> Iterator[Piece]:
    index = 0
    for part in parts:
        for number in range(math.ceil(len(part) / piece_bytes)):
            yield Piece(transfer, index, part[number * piece_bytes : (number + 1) * piece_bytes])
            index += 1
