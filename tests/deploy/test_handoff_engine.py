"""The hand-off between two real engines with a tiny model: the next turn is the one that would have been answered without it."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from local_fleet import LocalFleet, client_of
from test_handoff import LocalPeers, body, cached, counted, departures, fleet_of, gone

from deploy.handoff.records import Result
from deploy.load import LoadMeter
from deploy.replica import Backend, Replica

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
LONG = "Something was said at the beginning that takes a number of blocks, and it is said twice. " * 2


def real_fleet(disk: Path | None = None, **models: str) -> LocalFleet:
    """A fleet whose replicas have real engines, by name the kind of model, and share a disk."""
    import torch
    from tiny_models import loaded_model

    from loopserve.chat import ChatService
    from loopserve.config import DiskSettings, EngineConfig
    from loopserve.engine import Engine

    kept = DiskSettings() if disk is None else DiskSettings(str(disk), save_after_s=0.0, lease_s=60.0)
    torch.set_num_threads(1)
    fleet = fleet_of(*models)
    for name, kind in models.items():
        engine = Engine(EngineConfig(kv_blocks=128, disk=kept), loaded=loaded_model(kind))
        fleet.engines[name] = engine  # type: ignore[assignment]
        fleet.replicas[name] = Replica(
            Backend(engine, ChatService(engine)),
            fleet.settings,
            name=name,
            load=LoadMeter(max_running_turns=32),
            metrics=fleet.measured[name].sink,
        )
        if disk is not None:
            fleet.replicas[name].keep_papers()
        engine.start()
    return fleet


@pytest.fixture
def fleets() -> Iterator[list[LocalFleet]]:
    made: list[LocalFleet] = []
    yield made
    for fleet in made:
        for engine in fleet.engines.values():
            engine.stop()
            engine.check()  # type: ignore[attr-defined]


async def turn(client: httpx.AsyncClient, model: str, texts: list[str], headers: dict[str, str]) -> httpx.Response:
    asked = body(*texts, max_tokens=8, temperature=0, ignore_eos=True) | {"model": model}
    answer = await client.post(CHAT, json=asked, headers=headers)
    assert answer.status_code == 200, answer.text
    texts += [answer.json()["choices"][0]["message"]["content"], "and then?"]
    return answer


@pytest.mark.parametrize("headers", [{}, {"x-session-id": "s"}, {"x-tenant-id": "acme"}])
async def test_the_next_turn_is_that_of_a_session_that_stayed(fleets: list[LocalFleet], headers: dict[str, str]):
    found: list[tuple[str, int, int]] = []
    for moves in (False, True):
        fleets.append(fleet := real_fleet(a="llama", b="llama"))
        async with client_of(fleet) as client:
            texts = [LONG]
            for _ in range(2):
                answer = await turn(client, "tiny-llama", texts, headers)
            first = answer.headers["x-loopserve-replica"]
            if moves:
                results = await departures(fleet, first).drain(LocalPeers(fleet, first))
                assert results == {Result.MOVED: 1}
                assert fleet.engines[first].sessions() == ()
                fleet.engines[first].stop()
                gone(fleet, first)
            last = await turn(client, "tiny-llama", texts, headers)
            assert (last.headers["x-loopserve-replica"] != first) is moves
            assert last.headers["x-session-id"] == answer.headers["x-session-id"]
            usage = last.json()["usage"]
            found.append((texts[-2], cached(last), usage["prompt_tokens"]))
    assert found[0] == found[1], "another answer, or another account of what was there"
    assert found[0][1] > 200


@pytest.mark.parametrize("headers", [{}, {"x-session-id": "s"}, {"x-tenant-id": "acme"}])
async def test_a_conversation_goes_on_from_disk_in_replicas_that_come_up_anew(
    fleets: list[LocalFleet], headers: dict[str, str], tmp_path: Path
):
    fleets.append(fleet := real_fleet(disk=tmp_path, a="llama"))
    texts = [LONG]
    async with client_of(fleet) as client:
        for _ in range(2):
            before = await turn(client, "tiny-llama", texts, headers)
        stayed = list(texts)
        fleet.engines["a"].stop()  # it saves what it holds
    fleets.append(fleet := real_fleet(disk=tmp_path, b="llama", c="llama"))
    await until(lambda: all(len(replica.routing_stats()["own"]) for replica in fleet.replicas.values()))
    async with client_of(fleet) as client:
        after = await turn(client, "tiny-llama", texts, headers)
        assert after.headers["x-session-id"] == before.headers["x-session-id"]
        assert cached(after) > 200
    fleets.append(fleet := real_fleet(a="llama"))
    async with client_of(fleet) as client:
        alone = await turn(client, "tiny-llama", stayed, headers)
    assert texts == stayed and cached(alone) == 0, "what was kept changes no answer"


async def test_what_was_deleted_is_not_known_to_a_replica_that_comes_up_anew(fleets: list[LocalFleet], tmp_path: Path):
    fleets.append(fleet := real_fleet(disk=tmp_path, a="llama"))
    async with client_of(fleet) as client:
        answer = await turn(client, "tiny-llama", [LONG], {})
        await turn(client, "tiny-llama", [LONG + "!"], {"x-session-id": "kept"})
        assert (await client.delete(f"/v1/sessions/{answer.headers['x-session-id']}")).status_code == 200
    fleet.engines["a"].stop()
    fleets.append(fleet := real_fleet(disk=tmp_path, b="llama"))
    await until(lambda: len(fleet.replicas["b"].routing_stats()["own"]))
    await asyncio.sleep(0.2)
    assert len(fleet.replicas["b"]._conversations) == 1


async def until(what: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not what():
            await asyncio.sleep(0.02)


async def test_an_engine_of_another_model_refuses_and_the_session_stays(fleets: list[LocalFleet]):
    fleets.append(fleet := real_fleet(a="llama", b="qwen3"))
    async with client_of(fleet) as client:
        texts: list[str] = [LONG]
        headers: dict[str, Any] = {}
        name = next(str(n) for n in range(99) if fleet_home(fleet, str(n)) == "a")
        await turn(client, "tiny-llama", texts, headers | {"x-session-id": name})
    assert await departures(fleet, "a").drain(LocalPeers(fleet, "a")) == {Result.REFUSED: 1}
    assert len(fleet.engines["a"].sessions()) == 1 and fleet.engines["b"].sessions() == ()
    assert counted(fleet, "b") == {"refused": 1.0}


def fleet_home(fleet: LocalFleet, name: str) -> str:
    from router.affinity import ReplicaName, rendezvous
    from router.identity import home_of_name

    return rendezvous(home_of_name("", name), [ReplicaName(replica) for replica in fleet.replicas])[0]
