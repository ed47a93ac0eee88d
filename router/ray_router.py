"""The affinity decision as a Ray Serve request router: a thin subclass, public hooks only. Hop 2 of a turn.

Owns nothing but the translation between Serve's objects and `router.affinity`. The handle's `session_id` carries an encoded `AffinityKey`.
Runs in every process that holds a handle; all of them decide alike because they read the same published state.
"""

import time
from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from router.affinity import (
    Affinity,
    AffinityKey,
    AffinitySettings,
    ReplicaName,
    ReplicaView,
    decode_affinity,
    load_from_stats,
)


class AffinityRouter(RequestRouter):  # type: ignore[misc]  # ray ships no types
    """Ranks replicas by ownership, memo and rendezvous hashing; keyword arguments are those of `AffinitySettings`."""

    # A dead replica answers a queue-length probe with an error at once, only a busy one takes long: with Serve's 0.1 s a replica in the
    # middle of a CPU prefill would lose a conversation that lives there.
    queue_len_response_deadline_s = 1.0

    def initialize_state(self, **settings: Any) -> None:
        """Called once by Serve, with `request_router_kwargs`."""
        self._affinity = Affinity(AffinitySettings(**settings), clock=time.monotonic)
        self._in_flight: Counter[ReplicaID] = Counter()

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Serve when membership or published state changed."""
        super().update_replicas(replicas)
        live = {replica.replica_id for replica in replicas}
        self._in_flight = Counter({name: count for name, count in self._in_flight.items() if name in live})
        self._affinity.publish({_name(replica): (replica.routing_stats or {}).get("own", b"") for replica in replicas})

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One replica a rank: inside a rank Serve would pick by queue length, and the order is the decision."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # otherwise an unroutable request spins the event loop
        by_name = {_name(replica): replica for replica in candidate_replicas}
        views = [
            ReplicaView(
                name, load=load_from_stats(replica.routing_stats or {}), in_flight=self._in_flight[replica.replica_id]
            )
            for name, replica in by_name.items()
        ]
        ranking = self._affinity.rank(_key(pending_request), views)
        return [[by_name[name]] for name in ranking.replicas]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """A replica took the request: remember it until its claim is published."""
        key = _key(pending_request)
        self._in_flight[replica_id] += 1
        if not key.address:
            self._affinity.remember(key, ReplicaName(replica_id.unique_id))

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """The request ended, in whatever way; also called for requests that no replica took."""
        if self._in_flight[replica_id] > 0:
            self._in_flight[replica_id] -= 1


def _name(replica: RunningReplica) -> ReplicaName:
    return ReplicaName(replica.replica_id.unique_id)


def _key(pending_request: PendingRequest) -> AffinityKey:
    metadata = pending_request.metadata
    if metadata.session_id:
        return decode_affinity(metadata.session_id)
    return AffinityKey(home=metadata.internal_request_id)  # no conversation: spread evenly
