"""Replicas in this process instead of behind Ray: the whole way of a request but the wire, in milliseconds."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import httpx
from fake_backend import FakeChat, FakeEngine

from deploy.calls import Item, TurnCall
from deploy.errors import ReplicaLost
from deploy.fleet import Replies
from deploy.ingress import build_api
from deploy.load import LoadMeter
from deploy.replica import Backend, Replica
from deploy.replica_metrics import ReplicaMetrics
from deploy.settings import DeploySettings
from router.affinity import Affinity, AffinityKey, AffinitySettings, ReplicaName, ReplicaView, load_from_stats


class LocalFleet:
    """Routes with the real decision; `lose[replica]` makes a replica go away after so many items of a call."""

    def __init__(self, settings: DeploySettings | None = None, *, names: tuple[str, ...] = ("a",)) -> None:
        self.settings = settings or DeploySettings()
        self.engines = {name: FakeEngine() for name in names}
        self.chats = {name: FakeChat(engine) for name, engine in self.engines.items()}
        self.measured = {name: ReplicaMetrics(self.settings.metrics, name=name) for name in names}
        self.replicas = {
            name: Replica(
                Backend(engine, self.chats[name]),
                self.settings,
                name=name,
                load=LoadMeter([self.measured[name].recorder], max_running_turns=32),
                metrics=self.measured[name].sink,
            )
            for name, engine in self.engines.items()
        }
        for engine in self.engines.values():
            engine.start()
        self.lose: dict[str, int] = {}
        self.silent: set[str] = set()
        self.calls: list[tuple[str, AffinityKey]] = []
        self._affinity = Affinity(AffinitySettings(), clock=lambda: 0.0)

    async def open(self, call: TurnCall, key: AffinityKey) -> AsyncGenerator[Item, None]:
        stats = {ReplicaName(name): replica.routing_stats() for name, replica in self.replicas.items()}
        self._affinity.publish({name: published["own"] for name, published in stats.items()})
        ranking = self._affinity.rank(key, [ReplicaView(name, load_from_stats(stats[name])) for name in stats])
        name = ranking.replicas[0]
        self._affinity.remember(key, name)
        self.calls.append((name, key))
        async with aclosing(self.replicas[name].chat(call)) as items:
            count = 0
            async for item in items:
                if count == self.lose.get(name, -1):
                    del self.lose[name]
                    raise ReplicaLost("the replica went away", replica=name)
                count += 1
                yield item

    async def ask(self, question: str, *args: Any) -> Replies[Any]:
        found = {}
        for name, replica in self.replicas.items():
            if name not in self.silent:
                if question == "metrics":
                    found[name] = self.measured[name].families(self.engines[name])
                    continue
                answer = getattr(replica, question)(*args)
                found[name] = await answer if asyncio.iscoroutine(answer) else answer
        return Replies(found, tuple(sorted(self.silent)))


@asynccontextmanager
async def client_of(fleet: LocalFleet) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client whose server is the ingress over `fleet`."""
    transport = httpx.ASGITransport(build_api(fleet, fleet.settings), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client
