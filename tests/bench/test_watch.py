"""The relay that shows what clients do: it changes nothing, and what it notes is what happened."""

import asyncio
import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from threading import Thread
from urllib.parse import urlsplit

import httpx
import pytest
from fake_openai import MODEL, Answer, Asked, serve

from benchmarks.clients.clients import CLIENTS
from benchmarks.clients.environments import PINS
from benchmarks.clients.run import wire_numbers
from benchmarks.clients.watch import Conversations, Watch, WatchedTurn
from loopserve.bench import Endpoint, Given, Script, ScriptTurn, Workload, run_load, summarise


@contextmanager
def watched(url: str) -> Iterator[tuple[Watch, str]]:
    """A relay to `url`, in a thread of its own, and its address."""
    loop, watch = asyncio.new_event_loop(), Watch(url)
    server = loop.run_until_complete(watch.serve())
    thread = Thread(target=loop.run_forever)
    thread.start()
    try:
        yield watch, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()


def raw(url: str, *requests: bytes) -> bytes:
    """Everything that comes back on one connection, byte for byte."""
    parts, received = urlsplit(url), b""
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as connection:
        for request in requests:
            connection.sendall(request)
            while not received.endswith(b"0\r\n\r\n"):
                received += connection.recv(65536)
            received += b"|"
    return received


def request(*texts: str) -> bytes:
    """A completion request as bytes, oddly written on purpose."""
    messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]
    body = json.dumps({"model": MODEL, "stream": True, "messages": messages}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHOST:x\r\nx-Session-ID: s\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def test_not_a_byte_is_changed_on_the_way() -> None:
    with (
        serve(lambda asked: Answer(headers={"X-LoopServe-Replica": "r1"})) as server,
        watched(server.url) as (watch, url),
    ):
        sent = (request("hi"), request("hi", "one two", "again"))
        assert raw(url, *sent) == raw(server.url, *sent)
    assert server.asked[0].headers == server.asked[2].headers
    assert [(turn.conversation, turn.number, turn.continues) for turn in watch.turns] == [
        ("c1", 1, False),
        ("c1", 2, True),
    ]
    assert {turn.headers for turn in watch.turns} == {("x-session-id",)}
    assert watch.faults == 0


def plan(asked: Asked) -> Answer:
    """Some of everything."""
    if asked.text == "d1 t2":
        return Answer(breaks=True)
    if asked.text == "d2 t1":
        return Answer(status=429, error="full")
    if asked.text == "d3 t1":
        return Answer(error="replica died")
    replica = f"r{asked.number % 2}" if asked.text.startswith("d4") else "r0"
    return Answer(
        (asked.text, " !"), prompt_tokens=50 * asked.number, cached_tokens=40, headers={"x-loopserve-replica": replica}
    )


def test_the_relay_sees_what_the_load_generator_sees() -> None:
    scripts = [Script(f"d{d}", tuple(ScriptTurn(f"d{d} t{t}", 8) for t in (1, 2, 3))) for d in range(6)]
    with serve(plan) as server, watched(server.url) as (watch, url):
        report = summarise(asyncio.run(run_load(Workload(Given(scripts), concurrency=2), Endpoint(url, model=MODEL))))
    wire = wire_numbers(watch.turns)
    assert (wire.turns, wire.answered) == (report.turns.sent, report.turns.answered)
    assert sum(wire.errors.values()) == report.turns.failed + report.turns.rejected == 3
    assert any(kind.startswith("429") and "full" in kind for kind in wire.errors)
    assert any("replica died" in kind for kind in wire.errors)
    assert wire.cached_share == report.cache.share_of_prompt
    assert wire.cached_share_of_history == report.cache.share_of_history
    assert wire.same_replica_share == report.stickiness.same_replica_share
    assert wire.turns_by_replica == report.stickiness.turns_by_replica
    assert (wire.dialogues, wire.continued_share) == (6, 1.0)


def test_an_answer_that_does_not_stream_is_read_too() -> None:
    body = {
        "choices": [{"message": {"content": "Noted."}}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}},
    }
    seen: list[WatchedTurn] = []

    async def ask() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"}]}")
            data = json.dumps(body).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(data), data))
            await writer.drain()

        upstream = await asyncio.start_server(answer, "127.0.0.1", 0)
        watch = Watch(f"http://127.0.0.1:{upstream.sockets[0].getsockname()[1]}")
        relay = await watch.serve()
        async with httpx.AsyncClient(trust_env=False) as http:
            url = f"http://127.0.0.1:{relay.sockets[0].getsockname()[1]}/v1/chat/completions"
            got = await http.post(
                url, json={"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}
            )
        assert got.json() == body
        seen.extend(watch.turns)
        upstream.close()
        relay.close()

    asyncio.run(ask())
    assert [(turn.prompt_tokens, turn.cached_tokens, turn.completion_tokens, turn.whole) for turn in seen] == [
        (9, 4, 2, True)
    ]


def test_an_edited_history_is_no_continuation() -> None:
    conversations = Conversations()
    asked = [{"role": "user", "content": "hi"}]
    name, known = conversations.of(asked)
    conversations.answered(name, asked, "Hello")
    goes_on = [*asked, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "more"}]
    assert (name, known) == ("c1", False)
    assert conversations.of(goes_on) == ("c1", True)
    goes_on[1] = {"role": "assistant", "content": "Hello."}
    assert conversations.of(goes_on) == ("c2", False)


def test_numbers_of_a_client_that_asks_for_no_usage_are_not_made_up() -> None:
    turn = WatchedTurn("c1", 1, False, 200, "r0", True, None, None, None, None, ())
    wire = wire_numbers([turn, replace(turn, number=2, continues=True)])
    assert (wire.cached_share, wire.cached_share_of_history, wire.usage_reported) == (None, None, 0)
    assert (wire.same_replica_share, wire.dialogues_on_one_replica) == (1.0, 1)


@pytest.mark.parametrize(
    "client", [client for client in CLIENTS if client.own_environment], ids=lambda client: client.name
)
def test_every_version_in_a_clients_environment_is_pinned(client: object) -> None:
    assert hasattr(client, "name")
    lines = (PINS / f"{client.name}.txt").read_text(encoding="utf-8").split()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert any(line.startswith(f"{client.name}==") for line in lines)
