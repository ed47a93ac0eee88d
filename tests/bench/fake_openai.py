"""An OpenAI server that does what it is told and keeps a record of it: once as a transport under a fake clock, once on loopback.

A `Plan` says for every request what comes back. Times are then exact (`FakeTransport`: the clock moves by what was planned and by
nothing else) or real (`serve`: the connection really breaks).
"""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

MODEL = "tiny"


@dataclass
class Asked:
    """One request."""

    body: dict[str, Any]
    headers: dict[str, str]

    @property
    def number(self) -> int:
        """Of the turn."""
        return sum(message["role"] == "user" for message in self.body["messages"])

    @property
    def text(self) -> str:
        """What the user said."""
        return self.body["messages"][-1]["content"]


@dataclass
class Answer:
    """What comes back: `texts`, the first after `first_s` and each next one after `gap_s`."""

    texts: tuple[str, ...] = ("one", " two")
    first_s: float = 0.0
    gap_s: float = 0.0
    prompt_tokens: int | None = 10  # None: no usage
    cached_tokens: int | None = None
    tokens_per_chunk: int = 1
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    error: str | None = None  # the stream's last event, or the body of a refusal
    breaks: bool = False  # after the texts, without an end
    garbage: bool = False  # instead of the end

    def events(self) -> Iterator[tuple[float, bytes]]:
        """The stream: seconds to wait, then bytes."""
        for index, text in enumerate(self.texts):
            yield self.gap_s if index else self.first_s, _event({"choices": [_choice(text)]})
        if self.error is not None:
            yield 0, _event({"error": {"message": self.error}})
        elif self.garbage:
            yield 0, b"data: <html>\n\n"
        elif not self.breaks:
            yield 0, _event({"choices": [_choice(None, "stop")]})
            if self.prompt_tokens is not None:
                yield 0, _event({"choices": [], "usage": self._usage()})
            yield 0, b"data: [DONE]\n\n"

    def _usage(self) -> dict[str, Any]:
        cached = {} if self.cached_tokens is None else {"prompt_tokens_details": {"cached_tokens": self.cached_tokens}}
        completion = len(self.texts) * self.tokens_per_chunk
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": completion, **cached}

    def refusal(self) -> bytes:
        """The body of any other status but 200."""
        return json.dumps({"error": {"message": self.error or "no", "code": "told_code"}}).encode()


Plan = Callable[[Asked], Answer]


def _choice(text: str | None, finish: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": finish}


def _event(payload: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


class FakeTransport(httpx.AsyncBaseTransport):
    """In place of a network. `now` is the clock; it moves by what answers take, so one dialogue at a time is exact."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.asked: list[Asked] = []
        self.now = 100.0
        self.running = self.most_running = 0

    def clock(self) -> float:
        """Seconds."""
        return self.now

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": MODEL}]})
        asked = Asked(json.loads(request.content), dict(request.headers))
        self.asked.append(asked)
        answer = self.plan(asked)
        if answer.status != 200:
            return httpx.Response(answer.status, content=answer.refusal(), headers=answer.headers)
        return httpx.Response(200, stream=_Stream(self, answer), headers=answer.headers)


class _Stream(httpx.AsyncByteStream):
    def __init__(self, transport: FakeTransport, answer: Answer) -> None:
        self.transport, self.answer = transport, answer

    async def __aiter__(self) -> AsyncIterator[bytes]:
        transport = self.transport
        transport.running += 1
        transport.most_running = max(transport.running, transport.most_running)
        try:
            for wait_s, data in self.answer.events():
                transport.now += wait_s
                await asyncio.sleep(0)  # others may come between
                yield data
            if self.answer.breaks:
                raise httpx.RemoteProtocolError("peer closed connection")
        finally:
            transport.running -= 1


@dataclass
class LoopbackServer:
    """A server on loopback, and what it did."""

    url: str
    asked: list[Asked] = field(default_factory=list)
    chunks_written: int = 0
    connections: int = 0


@contextmanager
def serve(plan: Plan) -> Iterator[LoopbackServer]:
    """Answers on a free port of loopback, in a thread of its own, until the block ends."""
    loop = asyncio.new_event_loop()
    record = LoopbackServer("")

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        record.connections += 1
        try:
            while await _serve_one(reader, writer, plan, record):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client, or the test, is gone
        finally:
            writer.close()

    server = loop.run_until_complete(asyncio.start_server(connected, "127.0.0.1", 0))
    record.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield record
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()


async def _serve_one(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, plan: Plan, record: LoopbackServer
) -> bool:
    """One request; whether the connection stays for the next."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
    content = await reader.readexactly(int(headers.get("content-length", 0)))
    if head[0].startswith("GET /v1/models"):
        _whole(writer, 200, json.dumps({"data": [{"id": MODEL}]}).encode(), {})
        return True
    asked = Asked(json.loads(content), headers)
    record.asked.append(asked)
    answer = plan(asked)
    if answer.status != 200:
        _whole(writer, answer.status, answer.refusal(), answer.headers)
        return True
    told = "".join(f"{name}: {value}\r\n" for name, value in answer.headers.items())
    writer.write(
        f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n{told}\r\n".encode()
    )
    for wait_s, data in answer.events():
        await asyncio.sleep(wait_s)
        writer.write(b"%x\r\n%b\r\n" % (len(data), data))
        await writer.drain()
        record.chunks_written += b'"content"' in data
    if answer.breaks:
        return False
    writer.write(b"0\r\n\r\n")
    return True


def _whole(writer: asyncio.StreamWriter, status: int, body: bytes, headers: dict[str, str]) -> None:
    told = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    writer.write(f"HTTP/1.1 {status} Told\r\ncontent-length: {len(body)}\r\n{told}\r\n".encode() + body)
