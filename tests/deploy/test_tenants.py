"""Two tenants at one server: neither sees, continues, probes or deletes what is the other's; what a tenant deletes is gone.

The same over fakes (many replicas, all the names) and over a real engine with a tiny model (what is really computed).
"""

import asyncio
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from fake_backend import MODEL
from local_fleet import LocalFleet, client_of
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from deploy.ingress import build_api
from deploy.keys import hash_key, new_key
from deploy.load import LoadMeter
from deploy.replica import Backend, Replica
from deploy.settings import DeploySettings
from loopserve.stats import StepStats, TurnStats
from monitoring.tracing import Tracing, TracingSettings

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
KEYS = {name: new_key() for name in ("acme", "rival", "boss")}
AS = {name: {"authorization": f"Bearer {key}"} for name, key in KEYS.items()}


@pytest.fixture
def settings(tmp_path: Path) -> DeploySettings:
    path = tmp_path / "keys.yaml"
    entries = [{"sha256": hash_key(key), "tenant": name} for name, key in KEYS.items()]
    entries[-1]["role"] = "operator"
    path.write_text(yaml.safe_dump({"keys": entries}))
    return DeploySettings(keys_file=str(path), conversations_max=100)


def body(*texts: str, model: str = MODEL, **fields: Any) -> dict[str, Any]:
    """A dialogue of user, assistant, user, ..."""
    messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]
    return {"model": model, "messages": messages, **fields}


def cached(response: httpx.Response) -> int:
    assert response.status_code == 200, response.text
    return int(response.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def said(response: httpx.Response) -> str:
    return str(response.json()["choices"][0]["message"]["content"])


# Over fakes.


async def test_one_name_in_two_tenants_is_two_sessions(settings: DeploySettings):
    async with client_of(LocalFleet(settings, names=("a", "b", "c"))) as client:
        named = {"x-session-id": "same"}
        first = await client.post(CHAT, json=body("hello"), headers={**AS["acme"], **named})
        theirs = await client.post(CHAT, json=body("hello", said(first), "go on"), headers={**AS["rival"], **named})
        mine = await client.post(CHAT, json=body("hello", said(first), "go on"), headers={**AS["acme"], **named})
        turns = [
            (await client.get("/v1/sessions/same", headers=AS[who])).json()["num_turns"] for who in AS if who != "boss"
        ]
    assert cached(theirs) == 0 and cached(mine) > 0
    assert turns == [2, 1]


async def test_nobody_continues_another_tenants_nameless_conversation(settings: DeploySettings):
    async with client_of(LocalFleet(settings, names=("a", "b", "c"))) as client:
        first = await client.post(CHAT, json=body("hello"), headers=AS["acme"])
        history = body("hello", said(first), "go on")
        theirs = await client.post(CHAT, json=history, headers=AS["rival"])
        mine = await client.post(CHAT, json=history, headers=AS["acme"])
        stolen = {**AS["rival"], "x-session-id": first.headers["x-session-id"]}
        by_name = await client.post(CHAT, json=history, headers=stolen)
        theirs_now = (await client.get("/v1/sessions", headers=AS["rival"])).json()["data"]
    assert mine.headers["x-session-id"] == first.headers["x-session-id"] and cached(mine) > 0
    assert theirs.headers["x-session-id"] != first.headers["x-session-id"] and cached(theirs) == 0
    assert cached(by_name) == 0
    assert [view["num_turns"] for view in theirs_now] == [1, 1]


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_another_tenants_session_and_none_at_all_get_one_answer(settings: DeploySettings, method: str):
    fleet = LocalFleet(settings, names=("a", "b"))
    async with client_of(fleet) as client:
        there = await client.post(CHAT, json=body("x"), headers={**AS["acme"], "x-session-id": "one"})
        assert there.status_code == 200
        for silent in (set(), {"b"}):
            fleet.silent = silent
            real = await client.request(method, "/v1/sessions/one", headers=AS["rival"])
            none = await client.request(method, "/v1/sessions/two", headers=AS["rival"])
            assert real.status_code == none.status_code != 200
            assert real.text.replace("one", "two") == none.text
            assert {k: v for k, v in real.headers.items() if k != "content-length"} == {
                k: v for k, v in none.headers.items() if k != "content-length"
            }
        fleet.silent = set()
        assert (await client.get("/v1/sessions/one", headers=AS["acme"])).status_code == 200
        assert (await client.get("/v1/sessions", headers=AS["rival"])).json()["data"] == []
        assert (await client.get("/v1/sessions/one", headers=AS["boss"])).status_code == 404  # nor an operator's


@pytest.mark.parametrize("salt", ["acme", "\x1facme", "acme\x1f", "\x00", "acme\x1fpepper"])
async def test_no_cache_salt_leads_into_another_tenant(settings: DeploySettings, salt: str):
    async with client_of(LocalFleet(settings)) as client:
        for own in ({}, {"cache_salt": "pepper"}):
            await client.post(CHAT, json=body("x", **own), headers={**AS["acme"], "x-session-id": "s"})
        theirs = await client.post(CHAT, json=body("x", cache_salt=salt), headers={**AS["rival"], "x-session-id": "s"})
        assert cached(theirs) == 0
        listed = await client.get("/v1/sessions", params={"cache_salt": salt}, headers=AS["rival"])
        assert [view["num_turns"] for view in listed.json()["data"]] == [1]
        await client.delete("/v1/sessions/s", params={"cache_salt": salt}, headers=AS["rival"])
        for own in ({}, {"cache_salt": "pepper"}):
            assert (await client.get("/v1/sessions/s", params=own, headers=AS["acme"])).status_code == 200


async def test_a_deleted_nameless_conversation_is_not_recognised_any_more(settings: DeploySettings):
    fleet = LocalFleet(settings)
    async with client_of(fleet) as client:
        first = await client.post(CHAT, json=body("hello"), headers=AS["acme"])
        name = first.headers["x-session-id"]
        assert (await client.delete(f"/v1/sessions/{name}", headers=AS["acme"])).json()["deleted"] is True
        assert not fleet.replicas["a"].routing_stats()["own"]
        again = await client.post(CHAT, json=body("hello", said(first), "go on"), headers=AS["acme"])
    assert again.headers["x-session-id"] != name and cached(again) == 0


async def test_a_session_deleted_while_it_streams_is_not_learned_again(settings: DeploySettings):
    fleet = LocalFleet(settings)
    async with client_of(fleet) as client:
        request = body("tokens=200 step_ms=5", stream=True)
        running = asyncio.create_task(client.post(CHAT, json=request, headers=AS["acme"]))
        while not (found := (await client.get("/v1/sessions", headers=AS["acme"])).json()["data"]):
            await asyncio.sleep(0.01)
        await client.delete(f"/v1/sessions/{found[0]['id']}", headers=AS["acme"])
        stream = (await running).text
    assert '"error"' in stream and "[DONE]" not in stream
    replica = fleet.replicas["a"]
    assert not replica.routing_stats()["own"] and not replica._open and not replica._conversations._by_continuation


SECRETS_SAID = "the locker is 4417-QUITE-SECRET"


async def test_no_key_and_no_word_of_a_conversation_is_in_logs_metrics_or_traces(
    settings: DeploySettings, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    spans = InMemorySpanExporter()
    tracing = Tracing(TracingSettings(endpoint="http://unused"), spans, instance="test")
    fleet = LocalFleet(settings, names=("a", "b"))
    api = build_api(fleet, settings, tracing=tracing)
    transport = httpx.ASGITransport(api, raise_app_exceptions=False)
    wrong = new_key()
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        orders = [
            "tokens=2",
            "refuse=Overloaded",
            "refuse=EngineUnavailable",
            "fail=1",
            "fail=0",
            "refuse=KeyError",
            "die=engine",
        ]
        for stream in (False, True):
            for order in orders:
                for headers in (AS["acme"], {"x-api-key": KEYS["acme"]}, {"authorization": f"Bearer {wrong}"}):
                    request = body(f"{SECRETS_SAID} {order}", stream=stream, cache_salt="4417-QUITE-SECRET")
                    await client.post(CHAT, json=request, headers={**headers, "x-session-id": "s"})
            fleet.lose = {"a": 1, "b": 1}
            await client.post(CHAT, json=body(SECRETS_SAID, stream=stream), headers=AS["acme"])
            fleet.replicas["a"]._chat = fleet.replicas["b"]._chat = None  # type: ignore[assignment]
            await client.post(CHAT, json=body(SECRETS_SAID, stream=stream), headers=AS["acme"])
        await client.post(CHAT, content=b'{"messages": "' + SECRETS_SAID.encode(), headers=AS["acme"])
        await client.post(CHAT, json={**body(SECRETS_SAID), "n": SECRETS_SAID}, headers=AS["acme"])
        await client.get("/v1/sessions", headers={"x-api-key": wrong})
        await client.get("/metrics", headers={"x-api-key": wrong})
        Path(settings.keys_file).write_text(f"keys: [{{sha256: {wrong}")
        metrics = await client.get("/metrics", headers=AS["boss"])
    tracing.close()
    seen = {
        "logs": caplog.text,
        "metrics": metrics.text,
        "traces": " ".join(s.to_json() for s in spans.get_finished_spans()),
    }
    assert metrics.status_code == 200 and "loopserve" in seen["metrics"] and "ingress" in seen["traces"]
    assert "stay in force" in seen["logs"]
    for place, text in seen.items():
        for secret in (*KEYS.values(), wrong, *map(hash_key, KEYS.values()), "QUITE-SECRET", "Bearer"):
            assert secret not in text, f"{place} hold a secret"


# Over a real engine.


@dataclass
class PrefillLog:
    """Counts the tokens that the engine really computed for prompts."""

    num_tokens: int = 0
    turns: list[TurnStats] = field(default_factory=list)

    def on_step(self, stats: StepStats) -> None:
        self.num_tokens += stats.num_prefill_tokens

    def on_turn(self, stats: TurnStats) -> None:
        self.turns.append(stats)

    def taken(self) -> int:
        """Tokens since the last call."""
        taken, self.num_tokens = self.num_tokens, 0
        return taken


@dataclass
class RealFleet:
    """A local fleet whose one replica has a real engine."""

    fleet: LocalFleet
    engine: Any
    chat: Any
    log: PrefillLog


@pytest.fixture
def real(settings: DeploySettings) -> Iterator[RealFleet]:
    import torch
    from tiny_models import loaded_model

    from loopserve.chat import ChatService
    from loopserve.config import EngineConfig
    from loopserve.engine import Engine

    torch.set_num_threads(1)
    log = PrefillLog()
    engine = Engine(EngineConfig(kv_blocks=256), loaded=loaded_model("llama"), stats=log)
    chat = ChatService(engine)
    fleet = LocalFleet(settings)
    fleet.engines["a"] = engine
    fleet.replicas["a"] = Replica(
        Backend(engine, chat), settings, name="a", load=LoadMeter([log], max_running_turns=32)
    )
    engine.start()
    yield RealFleet(fleet, engine, chat, log)
    engine.stop()
    engine.check()


LONG = "A conversation that nobody else should ever be able to find out about, long enough for some blocks. " * 2


def short_answer(*texts: str, **fields: Any) -> dict[str, Any]:
    return body(*texts, model="tiny-llama", max_tokens=5, temperature=0, ignore_eos=True, **fields)


async def test_anothers_exact_prompt_is_computed_in_whole_and_ones_own_is_not(real: RealFleet):
    async with client_of(real.fleet) as client:
        first = await client.post(CHAT, json=short_answer(LONG), headers=AS["acme"])
        num_prompt = first.json()["usage"]["prompt_tokens"]
        assert real.log.taken() == num_prompt > 200
        theirs = await client.post(CHAT, json=short_answer(LONG), headers=AS["rival"])
        assert (cached(theirs), real.log.taken()) == (0, num_prompt)
        mine = await client.post(CHAT, json=short_answer(LONG), headers=AS["acme"])
        assert (cached(mine), real.log.taken()) == (num_prompt - num_prompt % 16, num_prompt % 16)
        history = short_answer(LONG, said(first), "go on")
        going_on = await client.post(CHAT, json=history, headers=AS["rival"])
        assert cached(going_on) == 0 or going_on.headers["x-session-id"] == theirs.headers["x-session-id"]
        assert said(theirs) == said(first)  # the model is one


def pool_bytes(engine: Any) -> int:
    """Values in the pool that are not zero."""
    store = engine._runner.store
    return sum(int(pool.count_nonzero()) for pool in (*store.keys, *store.values))


async def test_what_is_deleted_is_nowhere_and_must_be_computed_again(real: RealFleet):
    async with client_of(real.fleet) as client:
        named = {**AS["acme"], "x-session-id": "s"}
        first = await client.post(CHAT, json=short_answer(LONG), headers=named)
        num_prompt = first.json()["usage"]["prompt_tokens"]
        await client.post(CHAT, json=short_answer(LONG, said(first), "and then?"), headers=named)
        assert pool_bytes(real.engine) > 0 and len(real.chat._history._transcripts._sessions) == 1
        refused = await client.delete("/v1/sessions/s", headers=AS["rival"])
        assert refused.status_code == 404 and pool_bytes(real.engine) > 0
        assert (await client.delete("/v1/sessions/s", headers=AS["acme"])).status_code == 200
        assert pool_bytes(real.engine) == 0
        assert not real.chat._history._transcripts._sessions
        assert not real.fleet.replicas["a"].routing_stats()["own"]
        real.log.taken()
        again = await client.post(CHAT, json=short_answer(LONG), headers=named)
        assert (cached(again), real.log.taken()) == (0, num_prompt)


async def test_a_deletion_leaves_what_another_session_of_the_tenant_holds(real: RealFleet):
    async with client_of(real.fleet) as client:
        for name in ("s", "t"):
            response = await client.post(CHAT, json=short_answer(LONG), headers={**AS["acme"], "x-session-id": name})
        assert cached(response) > 0
        await client.delete("/v1/sessions/s", headers=AS["acme"])
        going_on = short_answer(LONG, said(response), "and then?")
        more = await client.post(CHAT, json=going_on, headers={**AS["acme"], "x-session-id": "t"})
        assert cached(more) >= response.json()["usage"]["prompt_tokens"]


async def test_a_session_deleted_while_it_answers_leaves_neither_kv_nor_transcript(real: RealFleet):
    async with client_of(real.fleet) as client:
        headers = {**AS["acme"], "x-session-id": "s"}
        request = {**short_answer(LONG, stream=True), "max_tokens": 1500}
        running = asyncio.create_task(client.post(CHAT, json=request, headers=headers))
        while (await client.get("/v1/sessions/s", headers=AS["acme"])).status_code != 200:
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.2)
        assert (await client.delete("/v1/sessions/s", headers=AS["acme"])).status_code == 200
        stream = (await running).text
        last = [line for line in stream.splitlines() if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_unavailable"
        assert pool_bytes(real.engine) == 0
        assert not real.chat._history._transcripts._sessions
