"""The HTTP surface over replicas in this process."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fake_backend import MODEL
from local_fleet import LocalFleet, client_of

from deploy.calls import Accepted, TurnCall
from deploy.protocol import parse_chat
from deploy.settings import DeploySettings

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"


def body(*texts: str, **fields: Any) -> dict[str, Any]:
    """A dialogue of user, assistant, user, ..."""
    messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]
    return {"model": MODEL, "messages": messages, **fields}


def error_of(response: httpx.Response) -> dict[str, Any]:
    inside = response.json()["error"]
    assert set(inside) == {"message", "type", "param", "code"}
    return inside


async def test_a_whole_answer_names_session_and_replica():
    async with client_of(LocalFleet(names=("a",))) as client:
        response = await client.post(CHAT, json=body("tokens=4"))
    assert response.status_code == 200
    assert response.json()["choices"][0]["message"]["content"] == "word word word word"
    assert response.headers["x-loopserve-replica"] == "a"
    assert response.headers["x-session-id"].startswith("conv-")


async def test_a_stream_ends_with_done():
    async with client_of(LocalFleet()) as client:
        response = await client.post(CHAT, json=body("tokens=2", stream=True), headers={"X-Session-ID": "mine"})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-session-id"] == "mine"
    assert response.text.endswith("data: [DONE]\n\n")


async def test_completions_take_text_and_ids():
    async with client_of(LocalFleet()) as client:
        for prompt in ("tokens=2", [1, 2, 3]):
            response = await client.post("/v1/completions", json={"model": MODEL, "prompt": prompt})
            assert response.json()["object"] == "text_completion"


@pytest.mark.parametrize(
    ("request_body", "status", "code"),
    [
        (body("x", tools=[{"type": "function"}]), 400, "unsupported_parameter"),
        (body("x", n=0), 400, "invalid_request"),
        (body(), 400, "invalid_request"),
        ({**body("x"), "model": "other"}, 404, "model_not_found"),
        (body("refuse=ContextLengthExceeded"), 400, "context_length_exceeded"),
        (body("refuse=Overloaded"), 429, "overloaded"),
        (body("refuse=EngineUnavailable"), 503, "engine_unavailable"),
        (body("fail=0"), 503, "engine_unavailable"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_refusals_come_before_any_byte_of_success(request_body: Any, status: int, code: str, stream: bool):
    async with client_of(LocalFleet()) as client:
        response = await client.post(CHAT, json={**request_body, "stream": stream})
    assert (response.status_code, error_of(response)["code"]) == (status, code)
    assert ("retry-after" in response.headers) == (status in (429, 503))


async def test_an_unexpected_failure_is_a_500_that_tells_nothing():
    fleet = LocalFleet()
    fleet.replicas["a"]._chat = None  # type: ignore[assignment]
    async with client_of(fleet) as client:
        response = await client.post(CHAT, json=body("x"))
    assert response.status_code == 500
    assert "NoneType" not in response.text and error_of(response)["code"] == "internal_error"


async def test_bodies_over_the_limit_are_refused_whether_announced_or_not():
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(4):
            yield b"x" * 1000

    async with client_of(LocalFleet(DeploySettings(body_bytes_max=2000))) as client:
        announced = await client.post(CHAT, content=b"x" * 2001)
        hidden = await client.post(CHAT, content=pieces())
        allowed = await client.post(CHAT, content=b" " * 1000 + json.dumps(body("x")).encode())
    assert (announced.status_code, hidden.status_code, allowed.status_code) == (413, 413, 200)
    assert error_of(announced)["code"] == "request_too_large" and "2000" in error_of(announced)["message"]


async def test_unknown_paths_and_methods_answer_in_the_same_shape():
    async with client_of(LocalFleet()) as client:
        missing, wrong = await client.get("/v1/nothing"), await client.get(CHAT)
    assert (missing.status_code, error_of(missing)["code"]) == (404, "not_found")
    assert (wrong.status_code, error_of(wrong)["code"]) == (405, "method_not_allowed")


async def test_models_are_listed_and_found():
    async with client_of(LocalFleet()) as client:
        listed = (await client.get("/v1/models")).json()
        found = await client.get(f"/v1/models/{MODEL}")
        missing = await client.get("/v1/models/org/other")
    assert [model["id"] for model in listed["data"]] == [MODEL]
    assert (found.json()["object"], missing.status_code) == ("model", 404)


async def test_ready_means_that_a_replica_can_answer():
    fleet = LocalFleet(names=("a", "b"))
    async with client_of(fleet) as client:
        ready = (await client.get("/ready")).json()
        assert ready == {"status": "ready", "models": [MODEL], "replicas": ["a", "b"], "silent": []}
        fleet.engines["a"].stop()
        assert (await client.get("/ready")).json()["replicas"] == ["b"]
        fleet.engines["b"].stop()
        unready = await client.get("/ready")
        assert (unready.status_code, error_of(unready)["code"]) == (503, "engine_unavailable")
        assert (await client.get("/health")).status_code == 200


async def converse(client: httpx.AsyncClient, opening: str, turns: int, **headers: str) -> list[httpx.Response]:
    """Some turns of one dialogue, the client echoing what it heard, stripped."""
    texts, responses = [opening], []
    for number in range(turns):
        response = await client.post(CHAT, json=body(*texts), headers=headers)
        responses.append(response)
        texts += [response.json()["choices"][0]["message"]["content"].strip(), f"and then {number}"]
    return responses


@pytest.mark.parametrize("headers", [{}, {"x-session-id": "named"}])
async def test_a_conversation_stays_where_its_kv_is_with_and_without_a_header(headers: dict[str, str]):
    async with client_of(LocalFleet(names=("a", "b", "c"))) as client:
        for number in range(12):
            own = {key: f"{value}-{number}" for key, value in headers.items()}
            responses = await converse(client, f"dialogue {number}", 4, **own)
            assert len({response.headers["x-loopserve-replica"] for response in responses}) == 1
            assert len({response.headers["x-session-id"] for response in responses}) == 1
            cached = [r.json()["usage"]["prompt_tokens_details"]["cached_tokens"] for r in responses]
            assert cached[0] == 0 and all(tokens > 0 for tokens in cached[1:])


async def test_a_client_that_starts_to_send_the_name_back_stays():
    async with client_of(LocalFleet(names=("a", "b", "c"))) as client:
        for number in range(12):
            (first,) = await converse(client, f"dialogue {number}", 1)
            name = first.headers["x-session-id"]
            second = await client.post(CHAT, json=body("x", "y", "z"), headers={"x-session-id": name})
            assert second.headers["x-loopserve-replica"] == first.headers["x-loopserve-replica"]
            assert second.headers["x-session-id"] == name


async def test_two_conversations_with_one_opening_are_two_sessions():
    async with client_of(LocalFleet()) as client:
        first, second = [(await converse(client, "hello", 1))[0] for _ in range(2)]
    assert first.headers["x-session-id"] != second.headers["x-session-id"]


async def test_who_said_and_heard_the_same_as_a_named_session_is_not_taken_into_it():
    async with client_of(LocalFleet(names=("a", "b", "c"))) as client:
        first = await client.post(CHAT, json=body("x"))
        for number in range(8):  # on all replicas, later than the first
            await client.post(CHAT, json=body("x"), headers={"x-session-id": f"theirs-{number}"})
        second = await client.post(CHAT, json=body("x", first.json()["choices"][0]["message"]["content"], "y"))
    for header in ("x-session-id", "x-loopserve-replica"):
        assert second.headers[header] == first.headers[header]


async def test_only_a_conversation_with_an_answer_goes_on():
    fleet = LocalFleet()
    async with client_of(fleet) as client:
        for headers in ({}, {"x-session-id": "named"}):
            await client.post(CHAT, json=body("x"), headers=headers)
            await client.post(CHAT, json=body("x", "y", "z"), headers=headers)
    assert [key.continues for _, key in fleet.calls] == [False, True, False, True]


async def test_an_edited_history_is_a_new_conversation():
    async with client_of(LocalFleet()) as client:
        (first,) = await converse(client, "hello", 1)
        edited = await client.post(CHAT, json=body("hello", "you said something else", "and?"))
    assert edited.headers["x-session-id"] != first.headers["x-session-id"]


async def test_sessions_are_shown_and_released_inside_their_tenant():
    fleet = LocalFleet(names=("a", "b"))
    async with client_of(fleet) as client:
        for tenant in ("t1", "t2"):
            await client.post(CHAT, json=body("x"), headers={"x-session-id": "s/1", "x-tenant-id": tenant})
        mine = {"x-tenant-id": "t1"}
        listed = (await client.get("/v1/sessions", headers=mine)).json()
        assert [found["id"] for found in listed["data"]] == ["s/1"]
        shown = (await client.get("/v1/sessions/s/1", headers=mine)).json()
        assert shown["num_turns"] == 1 and shown["replica"] in ("a", "b")
        gone = await client.delete("/v1/sessions/s/1", headers=mine)
        assert gone.json()["deleted"] is True
        again = await client.delete("/v1/sessions/s/1", headers=mine)
        assert (again.status_code, error_of(again)["code"]) == (404, "not_found")
        assert (await client.get("/v1/sessions/s/1", headers={"x-tenant-id": "t2"})).status_code == 200
        assert (await client.get("/v1/sessions")).json()["data"] == []


async def test_a_cache_salt_is_a_tenant_of_its_own():
    fleet = LocalFleet()
    async with client_of(fleet) as client:
        await client.post(CHAT, json=body("x", cache_salt="pepper"), headers={"x-session-id": "s"})
        assert (await client.get("/v1/sessions/s")).status_code == 404
        assert (await client.get("/v1/sessions/s", params={"cache_salt": "pepper"})).status_code == 200
    assert fleet.chats["a"].requests[0].cache_salt != ""


async def test_a_silent_replica_is_named_and_nothing_is_claimed_about_it():
    fleet = LocalFleet(names=("a", "b"))
    fleet.silent = {"b"}
    async with client_of(fleet) as client:
        assert (await client.get("/v1/sessions")).json()["silent"] == ["b"]
        missing = await client.delete("/v1/sessions/s")
        assert missing.status_code == 503 and "b did not answer" in error_of(missing)["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after_items", [0, 1])
async def test_a_replica_lost_before_the_first_byte_is_replaced_once(stream: bool, after_items: int):
    fleet = LocalFleet(names=("a", "b"))
    fleet.lose = {"a": after_items, "b": after_items}
    async with client_of(fleet) as client:
        both_lost = await client.post(CHAT, json=body("x", stream=stream))
        assert (both_lost.status_code, error_of(both_lost)["code"]) == (503, "replica_lost")
        fleet.lose = {fleet.calls[0][0]: after_items}
        response = await client.post(CHAT, json=body("x", stream=stream))
    assert response.status_code == 200
    tried = [name for name, _ in fleet.calls[2:]]
    assert sorted(tried) == ["a", "b"] and response.headers["x-loopserve-replica"] == tried[1]


async def test_a_replica_lost_in_mid_stream_ends_the_stream_with_an_error_event():
    fleet = LocalFleet()
    fleet.lose = {"a": 3}
    async with client_of(fleet) as client:
        response = await client.post(CHAT, json=body("tokens=9", stream=True))
    *events, last, rest = response.text.split("\n\n")
    assert (response.status_code, rest) == (200, "")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_lost"
    assert "word" in "".join(events) and "[DONE]" not in response.text


async def test_a_dead_engine_hands_the_request_to_another_replica():
    fleet = LocalFleet(names=("a", "b"))
    async with client_of(fleet) as client:
        response = await client.post(CHAT, json=body("die=engine"))
        assert response.status_code == 503  # the order kills the second one as well
        assert sorted(name for name, _ in fleet.calls) == ["a", "b"]
        fleet.engines["a"].start()
        assert (await client.post(CHAT, json=body("hello"))).headers["x-loopserve-replica"] == "a"


async def test_a_refusal_for_load_is_the_clients_to_retry():
    fleet = LocalFleet(names=("a", "b"))
    async with client_of(fleet) as client:
        response = await client.post(CHAT, json=body("refuse=Overloaded"))
    assert (response.status_code, response.headers["retry-after"], len(fleet.calls)) == (429, "8", 1)
    assert all(not replica.routing_stats()["own"] for replica in fleet.replicas.values())


@pytest.mark.parametrize(
    ("orders", "settings"),
    [
        ("wait_ms=2000", DeploySettings(admission_timeout_s=0.05)),
        ("step_ms=2000", DeploySettings(idle_timeout_s=0.05)),
    ],
)
async def test_every_wait_ends(orders: str, settings: DeploySettings):
    fleet = LocalFleet(settings)
    async with client_of(fleet) as client:
        response = await client.post(CHAT, json=body(orders))
    assert (response.status_code, error_of(response)["code"]) == (503, "timeout")
    assert fleet.replicas["a"].routing_stats()["running"] == 0


async def test_a_stream_that_falls_silent_ends_with_an_error_event():
    fleet = LocalFleet(DeploySettings(idle_timeout_s=0.3))
    fleet.replicas["a"]._chat = Silent(fleet.chats["a"])
    async with client_of(fleet) as client:
        response = await client.post(CHAT, json=body("x", stream=True))
    assert json.loads(response.text.split("\n\n")[-2].removeprefix("data: "))["error"]["code"] == "timeout"


class Silent:
    """A chat service that stops speaking after some events."""

    def __init__(self, chat: Any) -> None:
        self._chat = chat

    async def stream(self, request: Any):
        count = 0
        async for events in self._chat.stream(request):
            yield events
            count += 1
            if count == 2:
                await asyncio.sleep(60)


async def test_an_abandoned_stream_cancels_its_turn_and_what_was_said_is_remembered():
    fleet = LocalFleet()
    replica = fleet.replicas["a"]
    parsed = parse_chat(json.dumps(body("tokens=50 step_ms=1", stream=True)).encode(), branches_max=1)
    items = replica.chat(TurnCall(parsed, "", None, "0" * 32, None, "id", 0))
    accepted = await anext(items)
    assert isinstance(accepted, Accepted)
    assert b"word" in await anext(items)  # type: ignore[operator]
    assert replica.routing_stats()["running"] == 1
    await items.aclose()
    assert replica.routing_stats()["running"] == 0
    assert len(fleet.chats["a"].cancelled) == 1
    said = body("tokens=50 step_ms=1", "word", "go on")
    async with client_of(fleet) as client:
        assert (await client.post(CHAT, json=said)).headers["x-session-id"] == accepted.session_name


async def test_a_whole_answer_lets_its_turn_come_to_an_end():
    fleet = LocalFleet()
    async with client_of(fleet) as client:
        await client.post(CHAT, json=body("hello"))
    assert fleet.chats["a"].cancelled == []
