"""What does one routing decision cost? Many sessions, many replicas, no cluster: the decision itself, and Serve's hook around it.

    python -m benchmarks.cluster.router_decision            100,000 sessions over 100 replicas, about a minute

Three kinds of request: a resident session (some replica publishes it), a new conversation, and one without a header that goes on. Replicas
and requests are Ray Serve's own objects, but for the way to a replica's process. Also: what taking in everybody's claims costs.
"""

import argparse
import asyncio
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.cluster.ray_objects import QuietRouter, replica, request, router
from benchmarks.machine import describe_machine, require_quiet
from benchmarks.report import RESULTS, Table, settings_of, write_result
from loopserve.dialogue import Message
from router.affinity import (
    Affinity,
    AffinityKey,
    AffinitySettings,
    ReplicaName,
    ReplicaView,
    Roster,
    encode_affinity,
    load_from_stats,
    pack_claims,
)
from router.identity import continuation_key, home_key, session_key

TARGET_US = 50.0


@dataclass(frozen=True, slots=True)
class Cost:
    """One thing, measured many times."""

    what: str
    median_us: float
    p99_us: float
    target_us: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the median meets the target, if there is one."""
        return self.target_us is None or self.median_us <= self.target_us


class Fleet:
    """Replicas that publish what they hold of many sessions: the newest, as many as a replica may."""

    def __init__(self, *, num_replicas: int, num_sessions: int, claims_max: int, seed: int) -> None:
        self._rng = random.Random(seed)
        names = [ReplicaName(f"{self._rng.getrandbits(40):010x}") for _ in range(num_replicas)]
        held: dict[ReplicaName, list[tuple[str, float]]] = {name: [] for name in names}
        self.resident: list[AffinityKey] = []
        for number in range(num_sessions):
            key, claims = self._named(number) if number % 2 else self._nameless(number)
            self.resident.append(key)
            held[self._rng.choice(names)] += [(claim, 1.7e9 + number) for claim in claims]
        self.stats = {name: self._stats(pack_claims(claims, limit=claims_max)) for name, claims in held.items()}

    def requests(self, kind: str, num: int) -> list[AffinityKey]:
        """Random requests of one kind."""
        if kind == "resident":
            return self._rng.choices(self.resident, k=num)
        if kind == "new":
            return [AffinityKey(home=home_key("", self._talk(f"new {n}")[:1]), prompt_tokens=200) for n in range(num)]
        return [self._unpublished(number) for number in range(num)]

    def _named(self, number: int) -> tuple[AffinityKey, list[str]]:
        key = session_key("", f"session-{number}")
        return AffinityKey(home=key, resident=(key,), prompt_tokens=4000, continues=True), [key]

    def _nameless(self, number: int) -> tuple[AffinityKey, list[str]]:
        talk = self._talk(f"dialogue {number}")
        key = continuation_key("", talk)
        found = AffinityKey(home=home_key("", talk), resident=(key,), prompt_tokens=4000, continues=True)
        return found, [session_key("", f"conv-{number}"), key]

    def _unpublished(self, number: int) -> AffinityKey:
        return self._nameless(10**9 + number)[0]

    def _talk(self, opening: str) -> list[Message]:
        return [Message("user", opening), Message("assistant", f"about {opening}")]

    def _stats(self, own: bytes) -> dict[str, Any]:
        running = self._rng.randrange(8)
        load = {"running": running, "waiting": 0, "queue_s": 0.0, "prefill_s_per_token": 2e-4, "accepting": True}
        return {"own": own, **load}


def decision_costs(fleet: Fleet, *, num_requests: int) -> list[Cost]:
    """`Affinity.rank` over a roster that was made ready."""
    affinity = Affinity(AffinitySettings(), clock=time.monotonic)
    affinity.publish({name: stats["own"] for name, stats in fleet.stats.items()})
    roster = Roster([ReplicaView(name, load_from_stats(stats)) for name, stats in fleet.stats.items()])
    return [
        _cost(f"rank, {kind}", [_timed(affinity.rank, key, roster) for key in fleet.requests(kind, num_requests)])
        for kind in KINDS
    ]


KINDS = ("resident", "new", "goes on, not published")


async def hook_costs(fleet: Fleet, *, num_requests: int) -> list[Cost]:
    """`AffinityRouter.choose_replicas`, as Serve calls it for a request, and told of each request's begin and end."""
    warm = _router(fleet)
    return [
        _cost(f"choose_replicas, {kind}", [await _hook_s(warm, key) for key in fleet.requests(kind, num_requests)])
        for kind in KINDS
    ]


def _router(fleet: Fleet) -> QuietRouter:
    made = router()
    made.update_replicas([replica(name, stats) for name, stats in fleet.stats.items()])
    return made


async def _hook_s(router: QuietRouter, key: AffinityKey) -> float:
    asked = request(encode_affinity(key))
    began_s = time.perf_counter()
    ranks = await router.choose_replicas(router._replicas_list, asked)
    taken_s = time.perf_counter() - began_s
    taken_by = ranks[0][0].replica_id
    router.on_request_routed(asked, taken_by, None)
    router.on_request_completed(taken_by, asked.metadata.internal_request_id)
    return taken_s


def publish_costs(fleet: Fleet, *, num_times: int) -> list[Cost]:
    """Taking in all replicas' claims: the first time, when one replica's have changed, and when nothing has."""
    packed = {name: stats["own"] for name, stats in fleet.stats.items()}
    first, one, none = [], [], []
    changing = next(iter(packed))
    for number in range(num_times):
        affinity = Affinity(AffinitySettings(), clock=time.monotonic)
        first.append(_timed(affinity.publish, packed))
        changed = pack_claims([(f"key {number} {n}", float(n)) for n in range(len(packed[changing]) // 8)], limit=10**6)
        one.append(_timed(affinity.publish, {**packed, changing: changed}))
        none.append(_timed(affinity.publish, {**packed, changing: changed}))
    return [
        _cost("publish, all new", first),
        _cost("publish, one changed", one),
        _cost("publish, nothing changed", none),
    ]


def _timed(call: Callable[..., Any], *arguments: Any) -> float:
    began_s = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - began_s


def _cost(what: str, taken_s: Sequence[float]) -> Cost:
    ordered = sorted(taken_s)
    target = None if what.startswith("publish") else TARGET_US
    return Cost(what, statistics.median(ordered) * 1e6, ordered[int(0.99 * len(ordered))] * 1e6, target)


def cost_table(costs: Sequence[Cost]) -> Table:
    """All of it."""
    rows = [
        (
            cost.what,
            f"{cost.median_us:,.1f}",
            f"{cost.p99_us:,.1f}",
            "" if cost.target_us is None else f"{cost.target_us:g}",
            "" if cost.target_us is None else "yes" if cost.passed else "NO",
        )
        for cost in costs
    ]
    return Table("Microseconds", ("what", "median", "p99", "target of the median", "met"), tuple(rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the result; 1 where a target is missed."""
    options = _options(arguments)
    load_before = require_quiet(forced=options.force)
    fleet = Fleet(
        num_replicas=options.replicas,
        num_sessions=options.sessions,
        claims_max=options.claims_max,
        seed=options.seed,
    )
    gc.collect()
    gc.freeze()  # the fleet is not part of what is measured
    costs = [
        *decision_costs(fleet, num_requests=options.requests),
        *asyncio.run(hook_costs(fleet, num_requests=options.requests)),
        *publish_costs(fleet, num_times=options.publishes),
    ]
    passed = all(cost.passed for cost in costs)
    num_published = sum(len(stats["own"]) // 8 for stats in fleet.stats.values())
    print(
        write_result(
            options.out,
            options.name,
            title=f"One routing decision: {options.sessions:,} sessions, {options.replicas} replicas",
            machine=describe_machine(load_before=load_before),
            numbers={
                "settings": settings_of(options),
                "versions": {"ray": metadata.version("ray")},
                "passed": passed,
                "num_published_claims": num_published,
                "costs": [asdict(cost) for cost in costs],
            },
            tables=[cost_table(costs)],
            notes=[
                f"ray {metadata.version('ray')}; {num_published:,} claims are published, at most {options.claims_max} a replica; every "
                "second session is nameless and claims two keys.",
                f"{options.requests:,} requests of each kind, one after the other in one process, all replicas ranked; "
                f"{options.publishes} publications.",
                "choose_replicas is timed from Serve's call to its result; that the request was taken and has ended is told to the router "
                "between two timings, because it changes what the next decision reads.",
            ],
        )
    )
    return 0 if passed else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sessions", type=int, default=100_000)
    add("--replicas", type=int, default=100)
    add("--claims-max", type=int, default=2048, help="a replica publishes at most")
    add("--requests", type=int, default=20_000, help="of each kind")
    add("--publishes", type=int, default=50)
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=RESULTS, help="folder of the result files")
    add("--name", default="router_decision", help="of the result files")
    add("--force", action="store_true", help="run on a busy machine")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
