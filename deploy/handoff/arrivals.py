"""The new holder's side of a hand-off: takes sessions over, or says why not. Event loop only; knows no Ray.

What comes is put together in memory, at most `incoming_max` sessions at once; what does not go on for a while is dropped.

What was deleted must not come back. Everybody who serves is told of a deletion, but not who drains, and not who starts later. So it is
remembered for as long as a drain may last: a session that arrives all the same is refused, and who drains is told by all.
"""

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from deploy.handoff.holdings import Holdings, is_session_of, key_of
from deploy.handoff.papers import PAPERS_BYTES_MAX, Papers, PapersRefused, decode_papers
from deploy.handoff.records import PROTOCOL_VERSION, Offer, Piece, Receipt, Result, Said
from deploy.handoff.settings import HandoffSettings
from loopserve.errors import LoopServeError
from monitoring.catalogue import HANDOFF_BYTES, HANDOFF_TIME, HANDOFFS
from monitoring.sinks import MetricSink

_log = logging.getLogger(__name__)
_RELEASED_MAX = 4096  # beyond it nothing is taken for a while, because nobody could tell what was deleted
_COUNT_MAX = 1 << 20  # of one result that another replica tells; more than it can hold
_SLACK_S = 0.1  # a transfer is as old as it may be, and a little older
_GO_ON = Receipt(Said.GO_ON)


@dataclass(slots=True)
class _Incoming:
    """One transfer under way."""

    offer: Offer
    began_s: float
    num_pieces: int = 0
    num_bytes: int = 0
    pieces: list[bytes] = field(default_factory=list)  # of the papers, then of the image
    papers: Papers | None = None  # known: the image comes
    key: str = ""


class _Refused(Exception):
    """Why a session is not taken."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


class Arrivals:
    """Sessions on their way into one replica."""

    def __init__(
        self,
        holdings: Holdings,
        settings: HandoffSettings,
        *,
        accepts: Callable[[], bool],
        deaf_s: float,
        metrics: MetricSink,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`accepts`: whether this replica takes turns, too. `deaf_s`: how long one that drains may not have heard of deletions."""
        self._holdings = holdings
        self._settings = settings
        self._accepts = accepts
        self._deaf_s = deaf_s
        self._metrics = metrics
        self._clock = clock
        self._incoming: dict[str, _Incoming] = {}
        self._released: OrderedDict[str, float] = OrderedDict()  # session key -> when it was deleted, oldest first
        self._knows_all_from_s = -math.inf  # deletions before that may be forgotten
        self._imports: set[asyncio.Task[Receipt]] = set()

    async def offer(self, offer: Offer) -> Receipt:
        """Whether a session may come; nothing of it is here yet."""
        self._drop_stalled()
        try:
            self._check_offer(offer)
        except _Refused as refused:
            return self._refusal(offer.source, refused.code)
        now_s = self._clock()
        self._incoming[offer.transfer] = _Incoming(offer, began_s=now_s)
        loop = asyncio.get_running_loop()  # no other offer may ever come, and these are gigabytes
        loop.call_later(self._settings.move_timeout_s + _SLACK_S, self._drop_stalled)
        return _GO_ON

    async def piece(self, piece: Piece) -> Receipt:
        """Take the next bytes; the last ones bring the verdict."""
        incoming = self._incoming.get(piece.transfer)
        if incoming is None:
            return self._refusal("unknown", "unknown_transfer")  # it did not go on for too long
        try:
            self._take(incoming, piece)
            if incoming.num_bytes < incoming.offer.papers_bytes + incoming.offer.image_bytes:
                return _GO_ON
        except _Refused as refused:
            del self._incoming[piece.transfer]
            return self._refusal(incoming.offer.source, refused.code)
        # A sender that gives up cancels its call, but what the engine has begun it ends: so must we, or nobody would know the session.
        task = asyncio.get_running_loop().create_task(self._taken_in(incoming))
        self._imports.add(task)
        task.add_done_callback(self._imports.discard)
        return await asyncio.shield(task)

    def released(self, key: str) -> None:
        """A session was deleted: what is on its way of it is not taken."""
        self._released[key] = self._clock()
        self._released.move_to_end(key)
        if len(self._released) > _RELEASED_MAX:
            _, self._knows_all_from_s = self._released.popitem(last=False)

    def all_released(self) -> frozenset[str]:
        """The keys of all sessions that were deleted a short time ago."""
        oldest_s = self._clock() - self._deaf_s
        while self._released and next(iter(self._released.values())) < oldest_s:
            self._released.popitem(last=False)
        return frozenset(self._released)

    def was_released(self, key: str) -> bool:
        """Whether the session was deleted a short time ago, or may have been."""
        return self._clock() - max(self._released.get(key, -math.inf), self._knows_all_from_s) < self._deaf_s

    def count_left(self, counts: Mapping[str, int]) -> None:
        """Count for a replica that ends what it could not give away; who ends is not asked for its metrics any more."""
        for result in set(Result) - {Result.MOVED, Result.REFUSED}:
            count = counts.get(result, 0)
            if 0 < count <= _COUNT_MAX:
                self._metrics.inc(HANDOFFS, float(count), result=result)

    def _check_offer(self, offer: Offer) -> None:
        """Raise _Refused for what will not be taken, whatever it holds."""
        if offer.version != PROTOCOL_VERSION:
            raise _Refused("version")
        if not self._accepts():
            raise _Refused("not_accepting")
        if not 0 < offer.papers_bytes <= PAPERS_BYTES_MAX:
            raise _Refused("papers_size")
        if not 0 < offer.image_bytes <= self._settings.session_bytes_max:
            raise _Refused("image_size")
        if offer.transfer in self._incoming or len(self._incoming) >= self._settings.incoming_max:
            raise _Refused("overloaded")

    def _take(self, incoming: _Incoming, piece: Piece) -> None:
        """Add the next bytes, and read the papers once they are whole."""
        offer = incoming.offer
        end = offer.papers_bytes if incoming.papers is None else offer.papers_bytes + offer.image_bytes
        if piece.index != incoming.num_pieces or not 0 < len(piece.data) <= end - incoming.num_bytes:
            raise _Refused("out_of_order")
        incoming.pieces.append(piece.data)
        incoming.num_pieces += 1
        incoming.num_bytes += len(piece.data)
        if incoming.papers is None and incoming.num_bytes == offer.papers_bytes:
            papers = _papers(b"".join(incoming.pieces))
            incoming.pieces.clear()
            incoming.papers, incoming.key = papers, key_of(papers.session_id) or ""
            if any(other.key == incoming.key for other in self._incoming.values() if other is not incoming):
                raise _Refused("overloaded")
        if incoming.papers is not None:
            self._check_welcome(incoming.papers, incoming.key)

    def _check_welcome(self, papers: Papers, key: str) -> None:
        """Raise _Refused where the session must not replace what is here."""
        if not self._accepts():
            raise _Refused("not_accepting")
        if self.was_released(key):
            raise _Refused("released")
        if self._holdings.has_turns(key):
            raise _Refused("busy")
        known = self._holdings.record(key)
        if known is not None and known.last_used_s > papers.conversation.last_used_s:
            raise _Refused("newer_here")

    async def _taken_in(self, incoming: _Incoming) -> Receipt:
        """Have the engine take the session, and know it. Turns of it wait meanwhile."""
        papers = incoming.papers
        assert papers is not None, "the image comes behind the papers"
        image = b"".join(incoming.pieces)
        incoming.pieces.clear()
        try:
            with self._holdings.doors.closed([incoming.key, *papers.conversation.keys]):
                await self._import(papers, incoming.key, image)
        except _Refused as refused:
            return self._refusal(incoming.offer.source, refused.code)
        finally:
            self._incoming.pop(incoming.offer.transfer, None)
        self._metrics.inc(HANDOFFS, result=Result.MOVED)
        self._metrics.inc(HANDOFF_BYTES, float(len(image)))
        self._metrics.observe(HANDOFF_TIME, self._clock() - incoming.began_s)
        return Receipt(Said.MOVED)

    async def _import(self, papers: Papers, key: str, image: bytes) -> None:
        try:
            session_id = await self._holdings.import_image(image)
        except LoopServeError as error:
            raise _Refused(error.code) from error
        except (
            Exception
        ) as error:  # an image's own verdict is no error of a user's, and whatever else: the session stays where it is
            _log.warning("the image of a session was not taken: %s", error)
            raise _Refused(str(getattr(error, "reason", "failed"))) from error
        if session_id != papers.session_id:
            await self._holdings.erase(session_id)
            raise _Refused("another_session")
        if self.was_released(key):
            await self._holdings.erase(session_id)
            raise _Refused("released")
        self._holdings.adopt(key, papers, takes_over=True)

    def _drop_stalled(self) -> None:
        """A sender gives up after `move_timeout_s` in all."""
        oldest_s = self._clock() - self._settings.move_timeout_s
        for transfer, incoming in list(self._incoming.items()):
            is_importing = incoming.num_bytes == incoming.offer.papers_bytes + incoming.offer.image_bytes
            if incoming.began_s < oldest_s and not is_importing:
                del self._incoming[transfer]

    def _refusal(self, source: str, code: str) -> Receipt:
        _log.info("a session of replica %s was not taken: %s", source, code)
        self._metrics.inc(HANDOFFS, result=Result.REFUSED)
        return Receipt(Said.REFUSED, code)


def _papers(data: bytes) -> Papers:
    try:
        papers = decode_papers(data)
    except PapersRefused as refused:
        _log.warning("the papers of a session were not taken: %s", refused)
        raise _Refused(f"papers_{refused.code}") from refused
    if not is_session_of(papers):
        raise _Refused("papers_mismatch")
    return papers
