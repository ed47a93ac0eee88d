"""One OpenAI endpoint, and one turn sent to it: what is asked, what comes back and when. Knows no load and no statistics.

The stream is read to its end, so that the connection serves the next turn. An answer counts as whole when the server says so: by a
finish reason or by `[DONE]`.
"""

import asyncio
import json
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from loopserve.bench.records import Failure, FailureKind, Gaps
from loopserve.chunks import DONE, Chunk, EventReader, Usage, read_chunk, told_error
from loopserve.errors import EngineUnavailable, InvalidRequest

Messages = Sequence[Mapping[str, str]]

CONNECT_S_MAX = 10.0
RETRY_S_MAX = 60.0  # longest wait for one more try, whatever the server asks for
_RETRY_S = 1.0  # where a server does not say
_MESSAGE_CHARS = 300  # of a failure
_PROBE_WORDS = (1, 129)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a load goes, and what every request of it has in common. `url` is the server's root, with or without `/v1`."""

    url: str
    model: str = ""  # empty: the first that the server lists
    api_key: str | None = field(default=None, repr=False)
    session_header: str | None = None  # sent with the dialogue's name; None: plain OpenAI
    replica_header: str = "x-loopserve-replica"  # of answers: who gave them
    body: Mapping[str, Any] = field(default_factory=dict)  # fields of every request, over ours
    limit_field: str = "max_tokens"
    silence_s_max: float = 300.0
    num_retries: int = 0  # of a rejected turn

    @property
    def root(self) -> str:
        """The address without `/v1`."""
        return self.url.rstrip("/").removesuffix("/v1")

    def tls(self) -> ssl.SSLContext | bool:
        """What clients of it check certificates with; made once for all of them, as it takes 20 ms."""
        return httpx.create_ssl_context(trust_env=False) if self.url.startswith("https:") else False

    def client(
        self, *, tls: ssl.SSLContext | bool = True, transport: httpx.AsyncBaseTransport | None = None
    ) -> httpx.AsyncClient:
        """An HTTP client for one dialogue at a time. Proxies of the environment are not used: they would be measured too.

        One connection each: a shared pool looks through all its connections with every request, which took most of the
        time at 64 dialogues.
        """
        return httpx.AsyncClient(
            base_url=self.root,
            timeout=httpx.Timeout(self.silence_s_max, connect=CONNECT_S_MAX),
            limits=httpx.Limits(max_connections=1, max_keepalive_connections=1),
            headers={"authorization": f"Bearer {self.api_key}"} if self.api_key else {},
            verify=tls,
            transport=transport,
            trust_env=False,
        )

    def request_body(self, messages: Messages, *, output_tokens_max: int) -> dict[str, Any]:
        """The body of one streamed turn."""
        return {
            "model": self.model,
            "messages": messages,
            self.limit_field: output_tokens_max,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.body,
        }


@dataclass(slots=True)
class Seen:
    """What has been seen of one turn so far; edited by `ask` only, so that a cut turn tells what it had."""

    started_at: float
    parts: list[str] = field(default_factory=list)
    num_chunks: int = 0
    first_chunk_at: float | None = None
    last_chunk_at: float | None = None
    usage: Usage | None = None
    finish_reason: str | None = None
    is_done: bool = False
    replica: str | None = None
    num_rejections: int = 0

    @property
    def text(self) -> str:
        """The answer."""
        return "".join(self.parts)

    def take(self, chunk: Chunk, at: float, gaps: Gaps) -> None:
        """Note one chunk."""
        self.usage = chunk.usage or self.usage
        self.finish_reason = chunk.finish_reason or self.finish_reason
        if not (chunk.text or chunk.reasoning):
            return
        self.parts.append(chunk.text)
        self.num_chunks += 1
        if self.last_chunk_at is None:
            self.first_chunk_at = at
        else:
            gaps.add(at - self.last_chunk_at)
        self.last_chunk_at = at


class _Failed(Exception):
    def __init__(self, failure: Failure, *, retry_after_s: float | None = None) -> None:
        super().__init__(failure)
        self.failure = failure
        self.retry_after_s = retry_after_s


async def ask(
    http: httpx.AsyncClient,
    endpoint: Endpoint,
    body: Mapping[str, Any],
    seen: Seen,
    *,
    session: str,
    gaps: Gaps,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], Any] = asyncio.sleep,
) -> Failure | None:
    """Send one turn and read its answer into `seen`; rejected ones again, as often as the endpoint's setting says."""
    headers = {"content-type": "application/json"}
    if endpoint.session_header:
        headers[endpoint.session_header] = session
    content = json.dumps(body).encode()
    while True:
        try:
            await _try(http, content, headers, seen, endpoint=endpoint, gaps=gaps, clock=clock)
            return None
        except _Failed as failed:
            if failed.retry_after_s is None or seen.num_rejections >= endpoint.num_retries:
                return failed.failure
            seen.num_rejections += 1
            await sleep(min(failed.retry_after_s, RETRY_S_MAX))


async def _try(
    http: httpx.AsyncClient,
    content: bytes,
    headers: Mapping[str, str],
    seen: Seen,
    *,
    endpoint: Endpoint,
    gaps: Gaps,
    clock: Callable[[], float],
) -> None:
    try:
        async with http.stream("POST", "/v1/chat/completions", content=content, headers=headers) as response:
            seen.replica = response.headers.get(endpoint.replica_header)
            if not response.is_success:
                raise await _refusal(response)
            await _read(response, seen, gaps, clock)
    except httpx.ConnectError as error:
        raise _failed(FailureKind.CONNECT, error) from error
    except httpx.TimeoutException as error:
        raise _failed(FailureKind.TIMEOUT, error) from error
    except httpx.HTTPError as error:
        raise _failed(FailureKind.BROKEN, error) from error
    except EngineUnavailable as error:
        raise _failed(FailureKind.MALFORMED, error) from error
    if seen.finish_reason is None and not seen.is_done:
        raise _Failed(Failure(FailureKind.BROKEN, "the answer broke off before its end"))


async def _read(response: httpx.Response, seen: Seen, gaps: Gaps, clock: Callable[[], float]) -> None:
    reader = EventReader()
    async for block in response.aiter_bytes():
        _take(reader.feed(block), clock(), seen, gaps)
    _take(reader.end(), clock(), seen, gaps)


def _take(payloads: Sequence[str], at: float, seen: Seen, gaps: Gaps) -> None:
    for payload in payloads:
        if payload == DONE:
            seen.is_done = True
            continue
        chunk = read_chunk(payload)
        if chunk.error is not None:
            raise _Failed(Failure(FailureKind.ERROR_EVENT, chunk.error[:_MESSAGE_CHARS]))
        seen.take(chunk, at, gaps)


def _failed(kind: FailureKind, error: Exception) -> _Failed:
    return _Failed(Failure(kind, f"{type(error).__name__}: {error}"[:_MESSAGE_CHARS]))


async def _refusal(response: httpx.Response) -> _Failed:
    text = (await response.aread()).decode("utf-8", "replace")
    status, told, code = response.status_code, text.strip(), None
    try:
        body = json.loads(text)
        told = told_error(body)
        code = body["error"]["code"]
    except (ValueError, LookupError, TypeError):
        pass  # not every server speaks OpenAI's errors, and some proxies speak HTML
    wait = response.headers.get("retry-after")
    code = code if isinstance(code, str) else None
    if status == httpx.codes.TOO_MANY_REQUESTS or (status == httpx.codes.SERVICE_UNAVAILABLE and wait is not None):
        failure = Failure(FailureKind.REJECTED, told[:_MESSAGE_CHARS], status, code)
        return _Failed(failure, retry_after_s=_seconds(wait))
    return _Failed(Failure(FailureKind.HTTP, told[:_MESSAGE_CHARS] or response.reason_phrase, status, code))


def _seconds(wait: str | None) -> float:
    try:
        return max(float(wait or _RETRY_S), 0.0)
    except ValueError:
        return _RETRY_S  # a date


async def served_model(http: httpx.AsyncClient, url: str) -> str:
    """The first model that the server lists. Raises EngineUnavailable where nobody, or something else, answers."""
    try:
        response = await http.get("/v1/models")
        if response.status_code in (401, 403):
            raise InvalidRequest(f"{url} wants an API key ({response.status_code}); give one with --api-key")
        return str(response.raise_for_status().json()["data"][0]["id"])
    except httpx.HTTPStatusError as error:
        raise EngineUnavailable(f"{url} does not list its models ({error.response.status_code}); name one") from error
    except httpx.HTTPError as error:
        raise EngineUnavailable(f"nobody answers at {url}: {error or type(error).__name__}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise EngineUnavailable(f"{url} answers, but not like an OpenAI-compatible server; name a model") from error


async def measure_tokens_per_word(
    http: httpx.AsyncClient, endpoint: Endpoint, text: Callable[[int], str]
) -> float | None:
    """Tokens that a word of `text(num_words)` is to the server's model, from two requests of one token; None where it reports no usage.

    Raises EngineUnavailable where the server does not answer them.
    """
    counts = []
    for num_words in _PROBE_WORDS:
        seen = Seen(0.0)
        body = endpoint.request_body([{"role": "user", "content": text(num_words)}], output_tokens_max=1)
        failure = await ask(http, endpoint, body, seen, session=f"probe-{num_words}-{id(seen)}", gaps=Gaps())
        if failure is not None:
            raise EngineUnavailable(f"{endpoint.url} does not answer ({failure.label}): {failure.message}")
        if seen.usage is None:
            return None
        counts.append(seen.usage.prompt_tokens)
    return max((counts[1] - counts[0]) / (_PROBE_WORDS[1] - _PROBE_WORDS[0]), 0.1)
