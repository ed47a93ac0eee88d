"""The thin Ray side of the decision, on Serve's own objects."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import ReplicaID

import router.ray_router as ray_router
from benchmarks.cluster.ray_objects import DEPLOYMENT, QuietRouter, replica, request, router
from router.affinity import AffinityKey, encode_affinity, pack_claims
from router.ray_router import CHOICE_ONLY

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    now = {"s": 1000.0}
    monkeypatch.setattr(ray_router, "time", SimpleNamespace(monotonic=lambda: now["s"], perf_counter=time.perf_counter))
    return now


def known(**stats: dict[str, Any]) -> QuietRouter:
    made = router(spill_turns=2)
    made.update_replicas([replica(name, published) for name, published in stats.items()])
    return made


async def ranked(made: QuietRouter, key: AffinityKey, *args: Any) -> list[str]:
    ranks = await made.choose_replicas(made._replicas_list, request(encode_affinity(key), *args))
    assert all(len(rank) == 1 for rank in ranks)
    return [rank[0].replica_id.unique_id for rank in ranks]


async def test_all_replicas_are_ranked_one_by_one_and_the_owner_leads():
    made = known(a={}, b={"own": pack_claims([("k", 5.0)], limit=9)}, c={})
    for home in map(str, range(9)):
        found = await ranked(made, AffinityKey(home=home, resident=("k",)))
        assert found[0] == "b" and sorted(found) == ["a", "b", "c"]


async def test_turns_of_this_router_count_until_they_end():
    made = known(a={}, b={}, c={})
    key = AffinityKey(home="h")
    home = (await ranked(made, key))[0]
    taken = ReplicaID(unique_id=home, deployment_id=DEPLOYMENT)
    for _ in range(2):
        made.on_request_routed(request(encode_affinity(key)), taken, None)
    assert (await ranked(made, key))[0] != home
    made.on_request_completed(taken, "i")
    assert (await ranked(made, key))[0] == home


async def test_newly_published_state_is_seen_at_once():
    made = known(a={}, b={}, c={})
    key = AffinityKey(home="h", resident=("k",))
    home = (await ranked(made, key))[0]
    other = next(name for name in "abc" if name != home)
    claims = {"own": pack_claims([("k", 5.0)], limit=9)}
    made.update_replicas([replica(name, claims if name == other else {}) for name in "abc"])
    assert (await ranked(made, key))[0] == other
    made.on_replica_actor_died(ReplicaID(unique_id=other, deployment_id=DEPLOYMENT))
    assert (await ranked(made, key))[0] == home


async def test_a_choice_counts_as_a_turn_until_the_replica_has_published_anew(clock: dict[str, float]):
    made = known(a={"running": 0}, b={"running": 0}, c={"running": 0})
    key = AffinityKey(home="h")
    first = [(await ranked(made, key, CHOICE_ONLY))[0] for _ in range(3)]
    assert first[0] == first[1] != first[2]
    made.update_replicas([replica(name, {"running": 0, "own": b"new"}) for name in "abc"])
    assert (await ranked(made, key))[0] == first[0]


async def test_a_choice_is_forgotten_after_a_while(clock: dict[str, float]):
    made = known(a={}, b={}, c={})
    key = AffinityKey(home="h")
    home = (await ranked(made, key, CHOICE_ONLY))[0]
    assert (await ranked(made, key, CHOICE_ONLY))[0] == home
    assert (await ranked(made, key))[0] != home
    clock["s"] += 1.01
    assert (await ranked(made, key))[0] == home


async def test_a_choice_is_remembered_although_nobody_tells_that_it_was_taken(clock: dict[str, float]):
    made = known(a={}, b={}, c={})
    hot = AffinityKey(home="h")
    spilled = [(await ranked(made, hot, CHOICE_ONLY))[0] for _ in range(3)][2]
    goes_on = AffinityKey(home="h", resident=("said",), continues=True)
    clock["s"] += 1.01
    assert (await ranked(made, goes_on, CHOICE_ONLY))[0] == spilled


async def test_a_replica_that_just_came_is_not_chosen_for_others_to_reach(clock: dict[str, float]):
    made = known(a={}, b={})
    clock["s"] += 10
    made.update_replicas([replica(name, {}) for name in "abc"])
    keys = [AffinityKey(home=str(number)) for number in range(40)]
    homes = {(await ranked(made, key))[0] for key in keys}
    assert homes == {"a", "b", "c"}  # a handle knows its way to all of them
    for key in keys:
        assert "c" not in await ranked(made, key, CHOICE_ONLY)
    clock["s"] += 2.01
    assert {(await ranked(made, key, CHOICE_ONLY))[0] for key in keys} == {"a", "b", "c"}


async def test_where_all_replicas_just_came_they_are_chosen_all_the_same(clock: dict[str, float]):
    made = known(a={}, b={})
    assert len(await ranked(made, AffinityKey(home="h"), CHOICE_ONLY)) == 2


async def test_a_request_without_a_conversation_is_spread():
    made = known(a={}, b={}, c={})
    firsts = set()
    for number in range(30):
        plain = request("")
        plain.metadata.internal_request_id = f"request-{number}"
        firsts.add((await made.choose_replicas(made._replicas_list, plain))[0][0].replica_id.unique_id)
    assert firsts == {"a", "b", "c"}
