"""Reads many streams at once as cheaply as Python can, in a process of its own, and says what arrived when.

    python -m benchmarks.cluster.stream_client PORT STREAMS WARM_UP_S WINDOW_S

Writes `begin` and `end` around the window, then one JSON line. While it reads it keeps pieces and moments; it takes them apart afterwards.
Knows the text of `fake_engine`'s tokens; knows nothing about the server.
"""

import asyncio
import gc
import json
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

MODEL = "step-engine"
TOKEN = re.compile(rb'(?:"content": ?|"text": ?)" (\d{9,})"')

FIRST_TOKEN_S_MAX = 60.0
_REQUEST = """POST /v1/chat/completions HTTP/1.1\r
Host: 127.0.0.1\r
Content-Type: application/json\r
Content-Length: {length}\r
\r
{body}"""


@dataclass(frozen=True, slots=True)
class Reading:
    """What came in within the window."""

    num_tokens: int
    window_s: float
    num_pieces: int  # reads of a socket; one may bring several tokens
    latency_ms_p50: float  # from a token's emission to its arrival here
    latency_ms_p99: float
    first_token_ms_p50: float  # from the request to the first token


class _Stream(asyncio.Protocol):
    def __init__(self, request: bytes) -> None:
        self._request = request
        self.pieces: list[tuple[float, bytes]] = []
        self.sent_s = 0.0
        self.has_token = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.sent_s = time.monotonic()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.monotonic(), data))
        if not self.has_token.is_set() and TOKEN.search(data):
            self.has_token.set()


async def read(port: int, *, num_streams: int, warm_up_s: float, window_s: float) -> Reading:
    """Open the streams, let them run, read for the window, hang up. Raises RuntimeError where one gives no token."""
    loop = asyncio.get_running_loop()
    streams = []
    for number in range(num_streams):
        _, stream = await loop.create_connection(lambda n=number: _Stream(_request(n)), "127.0.0.1", port)  # type: ignore[misc]
        streams.append(stream)
    try:
        async with asyncio.timeout(FIRST_TOKEN_S_MAX):
            await asyncio.gather(*(stream.has_token.wait() for stream in streams))
    except TimeoutError:
        silent = next(stream for stream in streams if not stream.has_token.is_set())
        raise RuntimeError(
            f"A stream gave no token; it said: {b''.join(d for _, d in silent.pieces)[:500]!r}"
        ) from None
    await asyncio.sleep(warm_up_s)
    print("begin", flush=True)
    begin_s = time.monotonic()
    await asyncio.sleep(window_s)
    end_s = time.monotonic()
    print("end", flush=True)
    for stream in streams:
        stream.transport.abort()
    return _reading(streams, begin_s, end_s)


def _request(number: int) -> bytes:
    talk = {"model": MODEL, "messages": [{"role": "user", "content": f"dialogue {number}"}], "stream": True}
    body = json.dumps(talk)
    return _REQUEST.format(length=len(body), body=body).encode()


def _reading(streams: Sequence[_Stream], begin_s: float, end_s: float) -> Reading:
    latencies_ms, first_ms, num_pieces = [], [], 0
    for stream in streams:
        first_ms.append((next(at for at, data in stream.pieces if TOKEN.search(data)) - stream.sent_s) * 1e3)
        for at, data in stream.pieces:
            if begin_s <= at < end_s:
                num_pieces += 1
                # A token cut in two by the socket counts in neither piece: some in a million.
                latencies_ms += [at * 1e3 - int(emitted) / 1e3 for emitted in TOKEN.findall(data)]
    if not latencies_ms:
        raise RuntimeError("No token came within the window.")
    latencies_ms.sort()
    return Reading(
        num_tokens=len(latencies_ms),
        window_s=end_s - begin_s,
        num_pieces=num_pieces,
        latency_ms_p50=statistics.median(latencies_ms),
        latency_ms_p99=latencies_ms[int(0.99 * len(latencies_ms))],
        first_token_ms_p50=statistics.median(first_ms),
    )


if __name__ == "__main__":
    port, num_streams = int(sys.argv[1]), int(sys.argv[2])
    gc.disable()
    found = asyncio.run(read(port, num_streams=num_streams, warm_up_s=float(sys.argv[3]), window_s=float(sys.argv[4])))
    print(json.dumps(asdict(found)), flush=True)
