"""Traces over the whole way of a request in this process: ingress, fleet, replica, chat service and a real engine over a tiny model."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
import pytest
from local_fleet import LocalFleet
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from tiny_models import loaded_model

from deploy.errors import ReplicaLost
from deploy.ingress import build_api
from deploy.load import LoadMeter
from deploy.replica import Backend, Replica
from deploy.settings import DeploySettings
from loopserve.chat import ChatService
from loopserve.config import EngineConfig
from loopserve.engine import Engine
from monitoring.tracing import Tracing, TracingSettings, TurnTracer

pytestmark = pytest.mark.anyio

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
WORDS = "wherefore-art-thou"
NAME = "romeo-and-juliet"


@dataclass
class Traced:
    """A fleet whose first replica holds a real engine, and what was traced."""

    fleet: LocalFleet
    engine: Engine
    tracing: Tracing
    exporter: InMemorySpanExporter
    routed_headers: frozenset[str] | None = None

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        api = build_api(self.fleet, self.fleet.settings, tracing=self.tracing, routed_headers=self.routed_headers)
        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client

    def spans(self) -> tuple[ReadableSpan, ...]:
        """All of them. Ends everything first: the engine's come from its thread, after the answer."""
        self.engine.stop()
        self.tracing.close()
        return self.exporter.get_finished_spans()

    def by_name(self) -> dict[str, ReadableSpan]:
        spans = self.spans()
        assert len({span.name for span in spans}) == len(spans), [span.name for span in spans]
        return {span.name: span for span in spans}


@pytest.fixture(scope="module")
def model() -> object:
    return loaded_model("llama")


@pytest.fixture
def traced(model: object) -> Iterator[Traced]:
    exporter = InMemorySpanExporter()
    tracing = Tracing(TracingSettings(endpoint="http://unused"), exporter, instance="test")
    fleet = LocalFleet(DeploySettings(), names=("a",))
    load = LoadMeter([TurnTracer(tracing, replica="a")], max_running_turns=32)
    engine = Engine(EngineConfig(kv_blocks=64), loaded=model, stats=load)  # type: ignore[arg-type]
    fleet.replicas["a"] = Replica(Backend(engine, ChatService(engine)), fleet.settings, name="a", load=load)
    engine.start()
    yield Traced(fleet, engine, tracing, exporter)
    engine.stop()
    tracing.close()


def chat(**more: object) -> dict[str, object]:
    return {
        "model": "tiny-llama",
        "messages": [{"role": "user", "content": WORDS}],
        "max_tokens": 4,
        "metadata": {"session_id": NAME},
        **more,
    }


def parent_of(span: ReadableSpan) -> int:
    assert span.parent is not None
    return span.parent.span_id


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_is_one_trace_from_the_client_through_the_router_into_the_engine(
    traced: Traced, stream: bool
) -> None:
    async with traced.client() as client:
        answer = await client.post("/v1/chat/completions", json=chat(stream=stream), headers=PARENT)
    assert answer.status_code == 200
    spans = traced.by_name()
    assert set(spans) == {"ingress", "router", "turn", "queue", "prefill", "decode"}
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {TRACE}
    ingress = spans["ingress"]
    assert f"{parent_of(ingress):016x}" == SPAN
    assert parent_of(spans["router"]) == parent_of(spans["turn"]) == ingress.context.span_id
    assert {parent_of(spans[name]) for name in ("queue", "prefill", "decode")} == {spans["turn"].context.span_id}
    times = [(span.start_time, span.end_time) for span in spans.values()]
    assert all(ingress.start_time <= start <= end for start, end in times)  # type: ignore[operator]
    assert spans["router"].end_time <= ingress.end_time  # type: ignore[operator]
    assert (ingress.attributes or {})["loopserve.session"] == (spans["turn"].attributes or {})["loopserve.session"]
    assert (ingress.attributes or {})["http.response.status_code"] == 200
    assert (spans["turn"].attributes or {})["gen_ai.usage.output_tokens"] == 4


async def test_nothing_of_what_was_said_nor_by_whom_is_in_any_span(traced: Traced) -> None:
    headers = {**PARENT, "authorization": "Bearer sk-secret-key", "x-tenant-id": "the-tenant"}
    async with traced.client() as client:
        answers = [
            await client.post("/v1/chat/completions", json=chat(), headers=headers),
            await client.post("/v1/chat/completions", json=chat(user="a-person", model="unknown"), headers=headers),
            await client.post(
                "/v1/completions", json={"model": "tiny-llama", "prompt": WORDS, "max_tokens": 4}, headers=headers
            ),
        ]
    said = answers[0].json()["choices"][0]["message"]["content"]
    written = "".join(span.to_json() for span in traced.spans())
    for secret in (WORDS, NAME, "sk-secret-key", "the-tenant", "a-person"):
        assert secret not in written
    assert not said.strip() or json.dumps(said) not in written


async def test_each_branch_of_an_answer_has_a_span_of_its_own(traced: Traced) -> None:
    async with traced.client() as client:
        await client.post("/v1/chat/completions", json=chat(n=3, temperature=1.0))
    names = sorted(span.name for span in traced.spans())
    assert names == sorted(["ingress", "router", *["turn", "queue", "prefill", "decode"] * 3])


async def test_a_refusal_before_the_router_is_a_span_with_its_status_alone(traced: Traced) -> None:
    async with traced.client() as client:
        answer = await client.post("/v1/chat/completions", json={"model": "tiny-llama"}, headers=PARENT)
    spans = traced.by_name()
    assert set(spans) == {"ingress"}
    assert (spans["ingress"].attributes or {})["http.response.status_code"] == answer.status_code == 400
    assert spans["ingress"].status.status_code is StatusCode.UNSET, "a client's mistake is not the server's error"


async def test_a_replica_that_is_lost_on_the_way_is_an_error_of_the_router_and_the_next_try_has_its_own_span(
    traced: Traced,
) -> None:
    traced.fleet.lose["a"] = 0
    async with traced.client() as client:
        answer = await client.post("/v1/chat/completions", json=chat())
    assert answer.status_code == 200
    spans = traced.spans()
    routers = [span for span in spans if span.name == "router"]
    assert [span.status.status_code for span in routers] == [StatusCode.ERROR, StatusCode.UNSET]
    [ingress] = [span for span in spans if span.name == "ingress"]
    assert ingress.status.status_code is StatusCode.UNSET, "the client saw no error"


async def test_an_error_inside_a_stream_is_an_error_of_the_request_although_its_status_was_200(traced: Traced) -> None:
    traced.fleet.lose["a"] = 2
    async with traced.client() as client:
        answer = await client.post("/v1/chat/completions", json=chat(stream=True, max_tokens=64))
    assert answer.status_code == 200
    assert '"error"' in answer.text
    [ingress] = [span for span in traced.spans() if span.name == "ingress"]
    assert ingress.status.status_code is StatusCode.ERROR
    assert (ingress.attributes or {})["error.type"]


async def test_a_server_error_is_an_error_of_the_span(traced: Traced) -> None:
    async def lost(*_: object) -> AsyncIterator[object]:
        raise ReplicaLost("it went away", replica="a")
        yield

    traced.fleet.open = lost  # type: ignore[assignment,method-assign]
    async with traced.client() as client:
        answer = await client.post("/v1/chat/completions", json=chat())
    assert answer.status_code >= 500
    spans = traced.spans()
    assert [span.status.status_code for span in spans if span.name == "router"] == [StatusCode.ERROR] * 2
    assert [span.status.status_code for span in spans if span.name == "ingress"] == [StatusCode.ERROR]


async def test_a_client_that_goes_away_leaves_a_span_that_says_so(traced: Traced) -> None:
    api = build_api(traced.fleet, traced.fleet.settings, tracing=traced.tracing)
    body = json.dumps(chat(stream=True, max_tokens=400, ignore_eos=True)).encode()
    has_begun = asyncio.Event()
    requests = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, object]:
        if requests:
            return requests.pop()
        await has_begun.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, object]) -> None:
        if message["type"] == "http.response.body" and message.get("body"):
            has_begun.set()

    path = "/v1/chat/completions"
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http"}
    scope |= {"path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"", "headers": []}
    await api(scope | {"client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2)}, receive, send)
    [ingress] = [span for span in traced.spans() if span.name == "ingress"]
    assert (ingress.attributes or {})["loopserve.cut_short"] is True
    assert ingress.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize(
    "headers",
    [
        [("traceparent", "nonsense")],
        [("traceparent", f"00-{TRACE}-{SPAN}-01"), ("traceparent", f"00-{TRACE}-{SPAN}-01")],
        [],
    ],
)
async def test_without_one_wellformed_traceparent_a_request_begins_a_trace(
    traced: Traced, headers: list[tuple[str, str]]
) -> None:
    async with traced.client() as client:
        answer = await client.post("/v1/chat/completions", json=chat(), headers=headers)
    assert answer.status_code == 200
    spans = traced.by_name()
    assert spans["ingress"].parent is None
    assert len({span.context.trace_id for span in spans.values()}) == 1
    assert f"{spans['ingress'].context.trace_id:032x}" != TRACE


async def test_a_request_that_its_client_does_not_sample_makes_no_span_anywhere(traced: Traced) -> None:
    async with traced.client() as client:
        answer = await client.post(
            "/v1/chat/completions", json=chat(), headers={"traceparent": f"00-{TRACE}-{SPAN}-00"}
        )
    assert answer.status_code == 200
    assert traced.spans() == ()


async def test_where_the_routers_choice_was_made_elsewhere_there_is_no_span_of_it(traced: Traced) -> None:
    traced.routed_headers = frozenset({"x-session-id"})
    async with traced.client() as client:
        assert (await client.post("/v1/chat/completions", json=chat())).status_code == 200
    assert set(traced.by_name()) == {"ingress", "turn", "queue", "prefill", "decode"}


async def test_other_routes_are_not_traced(traced: Traced) -> None:
    async with traced.client() as client:
        for path in ("/health", "/ready", "/v1/models", "/v1/sessions", "/nothing"):
            await client.get(path, headers=PARENT)
    assert traced.spans() == ()


async def test_an_application_without_tracing_passes_a_request_through_no_layer_of_it(model: object) -> None:
    fleet = LocalFleet()
    api = build_api(fleet, fleet.settings)
    assert "TracedRequests" not in str(api.user_middleware)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://test") as client:
        answer = await client.post(
            "/v1/chat/completions",
            json={"model": "fake-model", "messages": [{"role": "user", "content": "hello"}]},
            headers=PARENT,
        )
    assert answer.status_code == 200
    assert [request.trace_parent for request in fleet.chats["a"].requests] == [""]
