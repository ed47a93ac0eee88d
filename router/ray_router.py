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
    Roster,
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
        self._candidates = _Candidates([], Roster([]))

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
        key, is_choice_only = _key(pending_request), pending_request.args[:1] == [CHOICE_ONLY]
        candidates = self._ready(candidate_replicas)
        if is_choice_only:
            candidates = self._settled(candidates)
        ranking = self._affinity.rank(key, candidates.roster)
        Decisions.report(ranking.reason.value, time.perf_counter() - began_s)
        ranks = [candidates.ranks[name] for name in ranking.replicas]
        if is_choice_only and ranks:
            self._chosen(key, ranks[0][0])
        return ranks

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """A replica took the request: remember it until its claim is published."""
        key = _key(pending_request)
        self._in_flight[replica_id] += 1
        self._see(replica_id)
        if not key.address:
            self._affinity.remember(key, ReplicaName(replica_id.unique_id))

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """The request ended, in whatever way; also called for requests that no replica took."""
        if self._in_flight[replica_id] > 0:
            self._in_flight[replica_id] -= 1
            self._see(replica_id)

    def _ready(self, replicas: list[RunningReplica]) -> "_Candidates":
        """The candidates as they are now; made anew only where Serve hands over another list, which it does on every change."""
        if self._candidates.replicas is not replicas:
            self._candidates = _Candidates(replicas, Roster([self._view(replica) for replica in replicas]))
        now_s = time.monotonic()
        for replica_id in [
            name for name, choices in self._choices.items() if now_s - choices.since_s >= _CHOICE_COUNTS_S
        ]:
            del self._choices[replica_id]
            self._see(replica_id)
        return self._candidates

    def _see(self, replica_id: ReplicaID) -> None:
        rank = self._candidates.ranks.get(ReplicaName(replica_id.unique_id))
        if rank is not None:
            self._candidates.roster.replace(self._view(rank[0]))

    def _view(self, replica: RunningReplica) -> ReplicaView:
        stats = replica.routing_stats or {}
        load, in_flight = load_from_stats(stats), self._in_flight[replica.replica_id]
        choices = self._choices.get(replica.replica_id)
        if choices is not None and choices.stats == stats:
            in_flight = max(in_flight, load.running + load.waiting + choices.num)
        return ReplicaView(_name(replica), load=load, in_flight=in_flight)

    def _settled(self, candidates: "_Candidates") -> "_Candidates":
        latest_s = time.monotonic() - _SETTLES_S
        if not self._seen_s or max(self._seen_s.values()) <= latest_s:
            return candidates
        settled = [r for r in candidates.replicas if self._seen_s.get(r.replica_id, latest_s) <= latest_s]
        return _Candidates(settled, Roster([self._view(replica) for replica in settled])) if settled else candidates

    def _chosen(self, key: AffinityKey, replica: RunningReplica) -> None:
        stats = replica.routing_stats or {}
        choices = self._choices.get(replica.replica_id)
        if choices is None or choices.stats != stats:
            choices = self._choices[replica.replica_id] = _Choices(stats, time.monotonic())
        choices.num += 1
        self._see(replica.replica_id)
        self._affinity.remember(key, _name(replica))


class _Candidates:
    """The replicas that Serve offers, made ready for many decisions."""

    def __init__(self, replicas: list[RunningReplica], roster: Roster) -> None:
        self.replicas = replicas
        self.roster = roster
        self.ranks = {_name(replica): [replica] for replica in replicas}


@dataclass(slots=True)
class _Choices:
    """How many requests were placed on one replica since it published `stats`; they count for a while."""

    stats: dict[str, Any]
    since_s: float
    num: int = 0


def _name(replica: RunningReplica) -> ReplicaName:
    return ReplicaName(replica.replica_id.unique_id)


def _key(pending_request: PendingRequest) -> AffinityKey:
    metadata = pending_request.metadata
    if metadata.session_id:
        return decode_affinity(metadata.session_id)
    return AffinityKey(home=metadata.internal_request_id)  # no conversation: spread evenly
