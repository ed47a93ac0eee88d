"""The replicas, as the ingress sees them: one call to the right one, or one question to all. Hop 2 of a turn.

`Fleet` is the contract; `RayFleet` keeps it with Serve's deployment handle. Every wait on another process ends: a replica that went away is
`ReplicaLost` at once, one that is silent is named.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import grpc  # type: ignore[import-untyped]
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import RayServeException, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from deploy.calls import Accepted, Item, Refusal, TurnCall
from deploy.errors import ReplicaLost
from deploy.handoff.records import Offer, Piece, Receipt, Standing
from router.affinity import AffinityKey, encode_affinity

_T = TypeVar("_T")
_GONE = (RayActorError, grpc.aio.AioRpcError, RequestCancelledError)
_LOST_MESSAGE = "The replica that worked on this request went away; send the request again, another one will answer it."
_KNOWN_MAX = 1024


@dataclass(frozen=True, slots=True)
class Replies(Generic[_T]):
    """What all replicas said, by replica, and who said nothing."""

    by_replica: dict[str, _T]
    silent: tuple[str, ...]


class Fleet(Protocol):
    """All replicas of one model."""

    def open(self, call: TurnCall, key: AffinityKey) -> AsyncGenerator[Item, None]:
        """Send a call where `key` leads; closing the generator cancels it. Raises ReplicaLost."""

    async def ask(self, question: str, *args: Any) -> Replies[Any]:
        """Put one question (a method of the replica) to all replicas, within the limit of the settings."""


class RayFleet:
    """Replicas behind a Serve deployment handle."""

    def __init__(self, handle: DeploymentHandle, *, ask_timeout_s: float) -> None:
        self._handle = handle
        self._ask_timeout_s = ask_timeout_s
        self._known: dict[str, None] = {}  # replicas that have ever answered, oldest first; names the silent ones

    async def open(self, call: TurnCall, key: AffinityKey) -> AsyncGenerator[Item, None]:
        """See `Fleet.open`."""
        replica = ""
        response = self._handle.options(method_name="chat", stream=True, session_id=encode_affinity(key)).remote(call)
        try:
            async for item in response:
                if isinstance(item, Accepted | Refusal):
                    replica = item.replica
                    self._meet(replica)
                yield item
        except _GONE as error:
            self._known.pop(replica, None)
            raise ReplicaLost(_LOST_MESSAGE, replica=replica) from error
        finally:
            response.cancel()  # dropping it would let the turn run to its end; after the end this does nothing

    async def ask(self, question: str, *args: Any) -> Replies[Any]:
        """See `Fleet.ask`. A replica's method answers `(its name, value)`."""
        is_someone_silent = False
        try:
            response = self._handle.broadcast(question, *args)
            replies = await response.results_async(timeout_s=self._ask_timeout_s, return_exceptions=True)
        except TimeoutError:  # one is stuck: a broadcast is all or nothing, so ask each by its address
            is_someone_silent = True
            # Calls made on behalf of one HTTP request share its id, and Serve's router tells pending calls apart by it: side by side they
            # would be sent to each other's replica. An empty context has no id to share.
            tasks = [
                asyncio.create_task(self._ask_one(name, question, *args), context=Context()) for name in self._known
            ]
            replies = await asyncio.gather(*tasks)
        except RayServeException:  # no replica at all
            return Replies({}, tuple(self._known))
        answered: dict[str, Any] = dict(reply for reply in replies if isinstance(reply, tuple))
        num_silent = max(len(replies) - len(answered), int(is_someone_silent))
        silent = [name for name in self._known if name not in answered][:num_silent]
        self._known = dict.fromkeys((*silent, *answered))
        return Replies(answered, (*silent, *["unknown"] * (num_silent - len(silent))))

    async def _ask_one(self, name: str, question: str, *args: Any) -> Any:
        handle = self._handle.options(method_name=question, session_id=encode_affinity(AffinityKey("", address=name)))
        with suppress(TimeoutError, RayError, *_GONE):
            async with asyncio.timeout(self._ask_timeout_s):
                return await handle.remote(*args)
        return None

    async def tell(self, replica: str, question: str, *args: Any) -> Any:
        """Call a method of one replica, and have its answer. Waits as long as the caller does; raises whatever goes wrong."""
        handle = self._handle.options(
            method_name=question,
            session_id=encode_affinity(AffinityKey("", address=replica)),
            # By Ray's object store: a gRPC message has 4 MiB at most, and 252 MB/s with 2 MiB where this has 536 with 8 (2 cores).
            _by_reference=True,
        )

        async def call() -> Any:
            response = handle.remote(*args)
            try:
                _, answer = await response
            finally:
                response.cancel()  # after the end this does nothing
            return answer

        return await asyncio.create_task(call(), context=Context())  # see `ask`

    def _meet(self, replica: str) -> None:
        self._known[replica] = None
        while len(self._known) > _KNOWN_MAX:
            self._known.pop(next(iter(self._known)))


class RayPeers:
    """The other replicas of one of them, for a hand-off: `deploy.handoff.departures.Peers`, kept with a fleet."""

    def __init__(self, fleet: RayFleet, *, own: str) -> None:
        self._fleet = fleet
        self._own = own

    async def standings(self) -> Mapping[str, Standing]:
        """See `Peers`. Serve has taken out of the fleet who is ending."""
        replies = await self._fleet.ask("standing")
        return {name: standing for name, standing in replies.by_replica.items() if name != self._own}

    async def offer(self, target: str, offer: Offer) -> Receipt:
        """See `Peers`."""
        receipt: Receipt = await self._fleet.tell(target, "take_offer", offer)
        return receipt

    async def piece(self, target: str, piece: Piece) -> Receipt:
        """See `Peers`."""
        receipt: Receipt = await self._fleet.tell(target, "take_piece", piece)
        return receipt

    async def count_left(self, target: str, counts: Mapping[str, int]) -> None:
        """See `Peers`."""
        await self._fleet.tell(target, "count_left", dict(counts))
