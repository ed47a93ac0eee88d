"""The affinity decision as a Ray Serve request router: a thin subclass, public hooks only. Hop 2 of a turn.

Owns nothing but the translation between Serve's objects and `router.affinity`. The handle's `session_id` carries an encoded `AffinityKey`.
Runs in every process that holds a handle; all of them decide alike because they read the same published state.

A request whose first argument is `CHOICE_ONLY` is only placed: it will reach the replica on another way, so Serve tells this router neither
that it was taken nor that it ended. It then counts as taken until the replica has published its load anew. The other way learns of a new
replica a little later than this router, so such a replica is not chosen at once.
"""

import time
from collections import Counter
from dataclasses import dataclass
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
from router.decisions import Decisions

CHOICE_ONLY = "choice only"
_SETTLES_S = 2.0  # from a replica's first sight until HAProxy serves it, too: its configuration is collected, written, loaded, checked
_CHOICE_COUNTS_S = 1.0  # about as late as published state is; it may also stay as it was


class AffinityRouter(RequestRouter):  # type: ignore[misc]  # ray ships no types
    """Ranks replicas by ownership, memo and rendezvous hashing; keyword arguments are those of `AffinitySettings`."""

    # A dead replica answers a queue-length probe with an error at once, only a busy one takes long: with Serve's 0.1 s a replica in the
    # middle of a CPU prefill would lose a conversation that lives there.
    queue_len_response_deadline_s = 1.0

    def initialize_state(self, **settings: Any) -> None:
        """Called once by Serve, with `request_router_kwargs`."""
        self._affinity = Affinity(AffinitySettings(**settings), clock=time.monotonic)
        self._in_flight: Counter[ReplicaID] = Counter()
        self._choices: dict[ReplicaID, _Choices] = {}
        self._seen_s: dict[ReplicaID, float] = {}

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Serve when membership or published state changed."""
        super().update_replicas(replicas)
        live = {replica.replica_id for replica in replicas}
        self._in_flight = Counter({name: count for name, count in self._in_flight.items() if name in live})
        self._choices = {name: choices for name, choices in self._choices.items() if name in live}
        now_s = time.monotonic()
        self._seen_s = {name: self._seen_s.get(name, now_s) for name in live}
        self._affinity.publish({_name(replica): (replica.routing_stats or {}).get("own", b"") for replica in replicas})

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One replica a rank: inside a rank Serve would pick by queue length, and the order is the decision."""
        if pending_request is None:
            return [candidate_replicas]
        began_s = time.perf_counter()
        pending_request.routing_context.should_backoff = True  # otherwise an unroutable request spins the event loop
        is_choice_only = pending_request.args[:1] == [CHOICE_ONLY]
        if is_choice_only:
            candidate_replicas = self._settled(candidate_replicas) or candidate_replicas
        by_name = {_name(replica): replica for replica in candidate_replicas}
        views = [self._view(name, replica) for name, replica in by_name.items()]
        key = _key(pending_request)
        ranking = self._affinity.rank(key, views)
        Decisions.report(ranking.reason.value, time.perf_counter() - began_s)
        if is_choice_only and ranking.replicas:
            self._chosen(key, by_name[ranking.replicas[0]])
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

    def _view(self, name: ReplicaName, replica: RunningReplica) -> ReplicaView:
        stats = replica.routing_stats or {}
        load, in_flight = load_from_stats(stats), self._in_flight[replica.replica_id]
        choices = self._choices.get(replica.replica_id)
        if choices is not None and choices.counts(stats, time.monotonic()):
            in_flight = max(in_flight, load.running + load.waiting + choices.num)
        return ReplicaView(name, load=load, in_flight=in_flight)

    def _settled(self, replicas: list[RunningReplica]) -> list[RunningReplica]:
        latest_s = time.monotonic() - _SETTLES_S
        return [replica for replica in replicas if self._seen_s.get(replica.replica_id, latest_s) <= latest_s]

    def _chosen(self, key: AffinityKey, replica: RunningReplica) -> None:
        stats, now_s = replica.routing_stats or {}, time.monotonic()
        choices = self._choices.get(replica.replica_id)
        if choices is None or not choices.counts(stats, now_s):
            choices = self._choices[replica.replica_id] = _Choices(stats, now_s)
        choices.num += 1
        self._affinity.remember(key, _name(replica))


@dataclass(slots=True)
class _Choices:
    """How many requests were placed on one replica since it published `stats`."""

    stats: dict[str, Any]
    since_s: float
    num: int = 0

    def counts(self, stats: dict[str, Any], now_s: float) -> bool:
        """Whether the number still adds to what the replica publishes now."""
        return stats == self.stats and now_s - self.since_s < _CHOICE_COUNTS_S


def _name(replica: RunningReplica) -> ReplicaName:
    return ReplicaName(replica.replica_id.unique_id)


def _key(pending_request: PendingRequest) -> AffinityKey:
    metadata = pending_request.metadata
    if metadata.session_id:
        return decode_affinity(metadata.session_id)
    return AffinityKey(home=metadata.internal_request_id)  # no conversation: spread evenly
