"""Limits of an API key: what is charged, what is given back, and what the client is told."""

import asyncio
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from fake_backend import MODEL
from hypothesis import given
from hypothesis import strategies as st
from local_fleet import LocalFleet, client_of
from starlette.requests import ClientDisconnect

from deploy.errors import InsufficientQuota, LimitReached
from deploy.ingress import build_api
from deploy.keys import Caller, KeyLimits, Role, hash_key
from deploy.limits import Limiter, duration, with_max_tokens
from deploy.protocol import CompletionCall, parse_chat
from deploy.settings import DeploySettings
from loopserve.errors import InvalidRequest

CHAT = "/v1/chat/completions"
MINE = {"authorization": "Bearer mine"}
NOW = 1_700_000_000.0


class Minute:
    """Time that a test moves by hand, for the library as well."""

    def __init__(self) -> None:
        self.now = NOW

    def time(self) -> float:
        return self.now


@pytest.fixture
def minute(monkeypatch: pytest.MonkeyPatch) -> Minute:
    clock = Minute()
    monkeypatch.setattr("limits.storage.memory.time", clock)
    return clock


def caller(**limits: int) -> Caller:
    return Caller("acme", "id", Role.USER, KeyLimits(**limits))


def call(text: str = "x" * 400, **fields: Any) -> CompletionCall:
    """A request whose prompt is estimated at 100 tokens."""
    asked = {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}
    return parse_chat(json.dumps(asked).encode(), branches_max=16)


def limiter(clock: Minute, num_processes: int = 1) -> Limiter:
    return Limiter(num_processes=num_processes, unix_time=clock.time)


def test_requests_are_counted_by_the_minute(minute: Minute):
    windows, mine = limiter(minute), caller(requests_per_minute=3)
    for left in (2, 1, 0):
        admission = windows.admit(mine, call())
        assert admission.headers() == {
            "x-ratelimit-limit-requests": "3",
            "x-ratelimit-remaining-requests": str(left),
            "x-ratelimit-reset-requests": "1m0s",
        }
        admission.close()
    minute.now += 20
    with pytest.raises(LimitReached, match=r"3 requests a minute.*Try again in 40s") as full:
        windows.admit(mine, call())
    assert full.value.retry_after_s == pytest.approx(40)
    windows.admit(replace(mine, key_id="other"), call()).close()
    minute.now += 41
    windows.admit(mine, call()).close()


def test_tokens_are_charged_by_estimate_and_settled_with_what_was_used(minute: Minute):
    windows, mine = limiter(minute), caller(tokens_per_minute=1000)

    def remaining() -> int:
        return int(windows.headers(mine)["x-ratelimit-remaining-tokens"])

    admission = windows.admit(mine, call())
    assert remaining() == 900
    admission.accept(prompt_tokens=150)
    admission.finish(generated_tokens=200)
    assert remaining() == 900  # while the turn runs
    admission.close()
    assert remaining() == 650
    admission.close()
    assert remaining() == 650
    cheaper = windows.admit(mine, call())
    cheaper.accept(prompt_tokens=10)
    cheaper.finish(generated_tokens=0)
    cheaper.close()
    assert remaining() == 640


def test_what_a_running_turn_generates_beyond_the_window_is_owed_and_the_turn_goes_on(minute: Minute):
    windows, mine = limiter(minute), caller(tokens_per_minute=1000)
    admission = windows.admit(mine, call())
    admission.accept(100)
    for _ in range(3000):
        admission.forward(b"data: {}\n\n")
    admission.close()
    assert windows.headers(mine)["x-ratelimit-remaining-tokens"] == "0"
    with pytest.raises(LimitReached, match="tokens a minute"):
        windows.admit(mine, call())


def test_a_stream_that_is_given_up_is_charged_by_its_pieces_and_a_failed_turn_costs_no_tokens(minute: Minute):
    windows, mine = limiter(minute), caller(tokens_per_minute=1000, requests_per_minute=9)
    admission = windows.admit(mine, call())
    admission.accept(100)
    admission.forward(b"data: 1\n\ndata: 2\n\n")
    admission.close()
    failed = windows.admit(mine, call())
    failed.accept(100)
    failed.refund()
    failed.close()
    told = windows.headers(mine)
    assert (told["x-ratelimit-remaining-tokens"], told["x-ratelimit-remaining-requests"]) == ("898", "7")


def test_a_refusal_charges_nothing(minute: Minute):
    windows, mine = limiter(minute), caller(requests_per_minute=5, tokens_per_minute=150)
    windows.admit(mine, call()).close()  # never accepted: its tokens come back
    held = windows.admit(mine, call())
    for _ in range(10):
        with pytest.raises(LimitReached):
            windows.admit(mine, call())
    held.close()
    assert windows.headers(mine)["x-ratelimit-remaining-requests"] == "3"
    assert windows.num_running(mine) == 0


def test_what_no_window_can_ever_hold_is_no_matter_of_waiting(minute: Minute):
    windows = limiter(minute)
    with pytest.raises(InsufficientQuota, match=r"about 100 tokens.*50 tokens a minute.*Shorten"):
        windows.admit(caller(tokens_per_minute=50), call())
    with pytest.raises(InsufficientQuota, match=r"3 answers at a time.*may have 2"):
        windows.admit(caller(concurrent_turns=2), call(n=3))


def test_turns_at_a_time_count_every_branch(minute: Minute):
    windows, mine = limiter(minute), caller(concurrent_turns=3)
    first, second = windows.admit(mine, call(n=2)), windows.admit(mine, call())
    with pytest.raises(LimitReached, match="3 turns of this API key are running and 3 may"):
        windows.admit(mine, call())
    first.close()
    windows.admit(mine, call(n=2)).close()
    second.close()
    assert windows.num_running(mine) == 0


def test_processes_share_a_limit_out_and_none_gets_nothing(minute: Minute):
    shares = [limiter(minute, 3).headers(caller(requests_per_minute=limit)) for limit in (10, 3, 1)]
    assert [share["x-ratelimit-limit-requests"] for share in shares] == ["3", "1", "1"]
    assert DeploySettings(ingress_replicas=4).num_doors == 4


def test_a_key_without_limits_is_told_of_none(minute: Minute):
    admission = limiter(minute).admit(caller(), call())
    assert admission.headers() == {}


def test_answers_are_bounded_by_the_keys_max_tokens():
    limits = KeyLimits(max_tokens=50)
    assert with_max_tokens(call(), limits).sampling.max_tokens == 50
    assert with_max_tokens(call(max_tokens=20), limits).sampling.max_tokens == 20
    assert with_max_tokens(call(), KeyLimits()).sampling.max_tokens is None
    with pytest.raises(InvalidRequest, match="max_tokens is 51; the API key allows answers of at most 50"):
        with_max_tokens(call(max_tokens=51), limits)


@given(st.floats(0, 10_000))
def test_durations_read_as_openais_and_never_promise_too_early(seconds: float):
    text = duration(seconds)
    if text.endswith("ms"):
        told = int(text[:-2]) / 1000
    else:
        minutes, _, rest = text.rpartition("m")
        told = int(minutes or 0) * 60 + int(rest[:-1])
    assert seconds <= told <= math.ceil(seconds)


# Over HTTP.


def guarded(tmp_path: Path, **limits: int) -> LocalFleet:
    path = tmp_path / "keys.yaml"
    entries = [{"sha256": hash_key(key), "tenant": "acme", "limits": limits} for key in ("mine", "other")]
    path.write_text(yaml.safe_dump({"keys": entries}))
    return LocalFleet(DeploySettings(keys_file=str(path), idle_timeout_s=5.0))


def body(text: str = "tokens=4", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
async def test_answers_say_how_the_windows_stand_and_a_full_one_says_when_to_come_back(tmp_path: Path, stream: bool):
    async with client_of(guarded(tmp_path, requests_per_minute=2, tokens_per_minute=500)) as client:
        first = await client.post(CHAT, json=body(stream=stream), headers=MINE)
        second = await client.post(CHAT, json=body(stream=stream), headers=MINE)
        full = await client.post(CHAT, json=body(stream=stream), headers=MINE)
        other = await client.post(CHAT, json=body(stream=stream), headers={"x-api-key": "other"})
    assert [r.status_code for r in (first, second, full, other)] == [200, 200, 429, 200]
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    # "tokens=4" is one token for the fake, and two by the estimate; it answers four.
    assert second.headers["x-ratelimit-remaining-tokens"] == ("493" if stream else "490")
    error = full.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_exceeded", "rate_limit_exceeded")
    assert "2 requests a minute" in error["message"]
    assert 1 <= int(full.headers["retry-after"]) <= 60
    assert full.headers["x-ratelimit-remaining-requests"] == "0"
    assert "x-ratelimit-reset-tokens" in full.headers


@pytest.mark.anyio
async def test_openais_client_sees_a_rate_limit_and_does_not_retry_what_never_fits(tmp_path: Path):
    fleet = guarded(tmp_path, tokens_per_minute=50)
    transport = httpx.ASGITransport(build_api(fleet, fleet.settings))
    asked = 0

    async def count(_: httpx.Request) -> None:
        nonlocal asked
        asked += 1

    http = httpx.AsyncClient(transport=transport, event_hooks={"request": [count]})
    client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="mine", http_client=http, max_retries=2)
    with pytest.raises(openai.RateLimitError) as refused:
        await client.chat.completions.create(**body("x" * 400))  # type: ignore[call-overload]
    assert (refused.value.code, refused.value.type, asked) == ("insufficient_quota", "insufficient_quota", 1)


ENDS: dict[str, tuple[dict[str, Any], int]] = {
    "answered": (body(), 200),
    "refused": (body("refuse=Overloaded"), 429),
    "not possible": (body("refuse=ContextLengthExceeded"), 400),
    "engine unavailable": (body("refuse=EngineUnavailable"), 503),
    "failed at once": (body("fail=0"), 503),
    "failed on the way": (body("tokens=5 fail=3"), 503),
    "several answers": (body(n=2), 200),
    "unexpected": (body("break"), 500),
}


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("end", ENDS)
async def test_a_turn_frees_its_place_however_it_ends(tmp_path: Path, end: str, stream: bool):
    fleet = guarded(tmp_path, concurrent_turns=2)
    asked, status = ENDS[end]
    if end == "unexpected":
        fleet.replicas["a"]._chat = None  # type: ignore[assignment]
    async with client_of(fleet) as client:
        for _ in range(4):
            response = await client.post(CHAT, json={**asked, "stream": stream}, headers=MINE)
            assert response.status_code == (200 if stream and end == "failed on the way" else status), response.text


@pytest.mark.anyio
@pytest.mark.parametrize("replica_is_lost_after", [0, 1, 2, 3])
async def test_a_lost_replica_frees_the_place(tmp_path: Path, replica_is_lost_after: int):
    fleet = guarded(tmp_path, concurrent_turns=1)
    async with client_of(fleet) as client:
        for _ in range(3):
            fleet.lose = {"a": replica_is_lost_after}
            await client.post(CHAT, json=body(stream=True), headers=MINE)
        fleet.lose = {}
        assert (await client.post(CHAT, json=body(), headers=MINE)).status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize("leaves", ["before the first byte", "while it streams", "before the stream is sent", "whole"])
async def test_a_client_that_goes_away_frees_its_place(tmp_path: Path, leaves: str):
    fleet = guarded(tmp_path, concurrent_turns=1)
    api = build_api(fleet, fleet.settings)
    order = "tokens=500 step_ms=10 wait_ms=400" if leaves == "before the first byte" else "tokens=500 step_ms=10"
    sent: list[dict[str, Any]] = []
    started = asyncio.Event()

    async def send(message: dict[str, Any]) -> None:
        if leaves == "before the stream is sent" and message["type"] == "http.response.start":
            raise OSError("the client is gone")
        sent.append(message)
        if len(sent) == 4:
            started.set()

    request = json.dumps(body(order, stream=leaves != "whole")).encode()
    task = asyncio.create_task(_post(api, request, send))
    if leaves == "while it streams":
        await asyncio.wait_for(started.wait(), 20)
    elif leaves != "before the stream is sent":
        await asyncio.sleep(0.15)
    busy = leaves != "before the stream is sent"
    async with client_of_api(api) as client:
        if busy:
            full = await client.post(CHAT, json=body(), headers=MINE)
            assert (full.status_code, full.json()["error"]["code"]) == (429, "rate_limit_exceeded")
            task.cancel()
        (ended,) = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(ended, asyncio.CancelledError if busy else OSError | ClientDisconnect)
        assert fleet.replicas["a"].routing_stats()["running"] == 0
        assert (await client.post(CHAT, json=body(), headers=MINE)).status_code == 200
    assert len(fleet.chats["a"].requests) == 2


def client_of_api(api: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://test")


async def _post(api: Any, request: bytes, send: Any) -> None:
    """One request as a server hands it to the application; cancelled where the client goes, as Serve does."""
    is_read = False

    async def receive() -> dict[str, Any]:
        nonlocal is_read
        if is_read:
            await asyncio.sleep(3600)
        is_read = True
        return {"type": "http.request", "body": request, "more_body": False}

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "method": "POST",
        "path": CHAT,
        "raw_path": CHAT.encode(),
        "query_string": b"",
        "headers": [(b"x-api-key", b"mine"), (b"content-type", b"application/json")],
        "http_version": "1.1",
        "scheme": "http",
        "server": ("test", 80),
        "client": ("test", 1),
    }
    await api(scope, receive, send)
