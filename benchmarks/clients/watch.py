"""A relay that a client talks through: bytes go both ways unchanged, and a copy of them is read. Knows no client and no server of ours.

    python -m benchmarks.clients.watch --to http://127.0.0.1:8000 --port 8001 --out turns.jsonl

Of every chat completion it notes which conversation and turn it was, who answered (`x-loopserve-replica`), and what usage said. A turn
belongs to the conversation whose last answer it brings back; the turn number is that of its user messages. That is how what a client
does not show becomes visible without touching it.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import h11

from loopserve.chunks import DONE, EventReader, Usage, read_chunk
from loopserve.errors import EngineUnavailable

COMPLETIONS = "/v1/chat/completions"
CONNECTIONS_MAX = 512
CONVERSATIONS_MAX = 100_000
_BLOCK_BYTES = 65536


@dataclass(frozen=True, slots=True)
class WatchedTurn:
    """One chat completion as it went over the wire. None: it was not said."""

    conversation: str
    number: int  # user messages in the request
    continues: bool  # its history ends with an answer that was given here, word for word
    status: int | None  # None: no answer came
    replica: str | None
    whole: bool  # the answer has its end
    error: str | None
    prompt_tokens: int | None
    cached_tokens: int | None
    completion_tokens: int | None
    headers: tuple[str, ...]  # of the request: names that may name a session


class Conversations:
    """Which conversation a request goes on with: the one that its messages but the last were left in."""

    def __init__(self) -> None:
        self._by_history: dict[str, str] = {}
        self._num = 0

    def of(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, bool]:
        """Name of the conversation, and whether it is known."""
        answered = [index for index, message in enumerate(messages) if message.get("role") == "assistant"]
        if answered:
            known = self._by_history.get(_key(messages[: answered[-1] + 1]))
            if known is not None:
                return known, True
        self._num += 1
        return f"c{self._num}", False

    def answered(self, name: str, messages: Sequence[Mapping[str, Any]], answer: str) -> None:
        """Note what the conversation has become."""
        if len(self._by_history) < CONVERSATIONS_MAX:
            self._by_history[_key([*messages, {"role": "assistant", "content": answer}])] = name


def _key(messages: Sequence[Mapping[str, Any]]) -> str:
    said = [(message.get("role"), _text(message.get("content"))) for message in messages]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _text(content: Any) -> str:
    """A message's text, whichever of the two ways it is written."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


class Observer:
    """Reads copies of both directions of one connection."""

    def __init__(self, conversations: Conversations, note: Callable[[WatchedTurn], None]) -> None:
        self._conversations = conversations
        self._note = note
        self._of_client = h11.Connection(h11.SERVER)
        self._of_server = h11.Connection(h11.CLIENT)
        self._request: h11.Request | None = None
        self._response: h11.Response | None = None
        self._asked, self._answered = bytearray(), bytearray()

    def from_client(self, data: bytes) -> None:
        """What the client sent."""
        self._of_client.receive_data(data)
        self._read_client()

    def _read_client(self) -> None:
        while True:
            event = self._of_client.next_event()
            if event is h11.NEED_DATA or event is h11.PAUSED:
                return
            if isinstance(event, h11.Request):
                self._request = event
            elif isinstance(event, h11.Data):
                self._asked += event.data
            elif isinstance(event, h11.EndOfMessage):
                assert self._request is not None
                method = self._request.method  # says whether the response has a body
                self._of_server.send(
                    h11.Request(method=method, target="/", headers=[("host", "x"), ("content-length", "0")])
                )
                self._of_server.send(h11.EndOfMessage())
            else:
                return

    def from_server(self, data: bytes) -> None:
        """What the server sent."""
        self._of_server.receive_data(data)
        while True:
            event = self._of_server.next_event()
            if event is h11.NEED_DATA or event is h11.PAUSED:
                return
            if isinstance(event, h11.Response):
                self._response = event
            elif isinstance(event, h11.Data):
                self._answered += event.data
            elif isinstance(event, h11.EndOfMessage):
                self._turn_over()
                self._next_cycle()
                self._read_client()  # a next request may be waiting
                return
            elif not isinstance(event, h11.InformationalResponse):
                return

    def closed(self) -> None:
        """The connection is gone; what was being answered is noted as it is."""
        if self._request is not None:
            self._turn_over()

    def _next_cycle(self) -> None:
        if self._of_server.our_state is not h11.DONE or self._of_server.their_state is not h11.DONE:
            return  # the connection ends here
        self._of_client.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
        self._of_client.send(h11.EndOfMessage())
        if self._of_client.our_state is h11.DONE and self._of_client.their_state is h11.DONE:
            self._of_client.start_next_cycle()
            self._of_server.start_next_cycle()

    def _turn_over(self) -> None:
        request, response = self._request, self._response
        asked, answered = bytes(self._asked), bytes(self._answered)
        self._request = self._response = None
        self._asked.clear()
        self._answered.clear()
        if request is not None and request.target.decode().split("?")[0] == COMPLETIONS and request.method == b"POST":
            self._note(_turn(self._conversations, request, response, asked, answered))


def _turn(
    conversations: Conversations, request: h11.Request, response: h11.Response | None, asked: bytes, answered: bytes
) -> WatchedTurn:
    body = json.loads(asked)
    messages = body["messages"]
    name, continues = conversations.of(messages)
    headers = {} if response is None else {key.decode(): value.decode() for key, value in response.headers}
    answer = _Answer()
    if response is not None and response.status_code == 200:
        answer.read(answered, streamed=headers.get("content-type", "").startswith("text/event-stream"))
        if answer.whole:
            conversations.answered(name, messages, "".join(answer.texts))
    usage = answer.usage
    return WatchedTurn(
        conversation=name,
        number=sum(message.get("role") == "user" for message in messages),
        continues=continues,
        status=None if response is None else response.status_code,
        replica=headers.get("x-loopserve-replica"),
        whole=answer.whole,
        error=answer.error or (answered.decode("utf-8", "replace")[:300] if not answer.whole else None),
        prompt_tokens=usage.prompt_tokens if usage else None,
        cached_tokens=usage.cached_tokens if usage else None,
        completion_tokens=usage.completion_tokens if usage else None,
        headers=tuple(sorted(key.decode() for key, _ in request.headers if b"session" in key or b"correlation" in key)),
    )


class _Answer:
    def __init__(self) -> None:
        self.texts: list[str] = []
        self.usage: Usage | None = None
        self.whole = False
        self.error: str | None = None

    def read(self, data: bytes, *, streamed: bool) -> None:
        try:
            if streamed:
                self._read_stream(data)
            else:
                body = json.loads(data)
                self.texts.append(body["choices"][0]["message"]["content"] or "")
                self.usage = Usage.model_validate(body["usage"]) if body.get("usage") else None
                self.whole = True
        except (EngineUnavailable, ValueError, LookupError, TypeError) as error:
            self.error = f"{type(error).__name__}: {error}"[:300]

    def _read_stream(self, data: bytes) -> None:
        reader = EventReader()
        for payload in (*reader.feed(data), *reader.end()):
            if payload == DONE:
                self.whole = True
                continue
            chunk = read_chunk(payload)
            self.texts.append(chunk.text)
            self.usage = chunk.usage or self.usage
            self.error = chunk.error or self.error


class Watch:
    """The relay: listens on loopback, and keeps what was noted in `turns`."""

    def __init__(self, to_url: str) -> None:
        parts = urlsplit(to_url)
        self._to = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._conversations = Conversations()
        self._open = asyncio.Semaphore(CONNECTIONS_MAX)
        self.turns: list[WatchedTurn] = []
        self.faults = 0  # connections whose copy could not be read; their bytes went through all the same

    async def serve(self, port: int = 0) -> asyncio.Server:
        """Begin to listen; port 0 takes a free one."""
        return await asyncio.start_server(self._connected, "127.0.0.1", port)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with self._open:
            observer = Observer(self._conversations, self.turns.append)
            try:
                from_server, to_server = await asyncio.open_connection(*self._to)
            except OSError:
                writer.close()
                return
            ways = (
                asyncio.create_task(self._relay(reader, to_server, observer.from_client)),
                asyncio.create_task(self._relay(from_server, writer, observer.from_server)),
            )
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in ways:
                    task.cancel()
                with suppress(h11.ProtocolError, ValueError, LookupError):
                    observer.closed()
                for end in (writer, to_server):
                    end.close()

    async def _relay(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, observe: Callable[[bytes], None]
    ) -> None:
        readable = True
        with suppress(ConnectionError):
            while data := await reader.read(_BLOCK_BYTES):
                writer.write(data)
                await writer.drain()
                if readable:
                    try:
                        observe(data)
                    except (h11.ProtocolError, ValueError, LookupError, AssertionError):
                        readable, self.faults = False, self.faults + 1


async def _main(to_url: str, port: int, out: Path) -> None:
    watch = Watch(to_url)
    server = await watch.serve(port)
    try:
        async with server:
            await server.serve_forever()
    finally:
        out.write_text("".join(json.dumps(asdict(turn)) + "\n" for turn in watch.turns), encoding="utf-8")


def main() -> None:
    """The relay as a command, until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", required=True, help="the server's address")
    parser.add_argument("--port", type=int, required=True, help="port of loopback to listen on")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one a turn, written at the end")
    args = parser.parse_args()
    with suppress(KeyboardInterrupt):
        asyncio.run(_main(args.to, args.port, args.out))


if __name__ == "__main__":
    main()
