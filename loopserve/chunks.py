"""A streamed answer as any OpenAI client reads it: bytes -> server-sent events -> chunks. Shared by all clients of ours; knows no HTTP.

Lines end where the format says they end, and nowhere else: an answer may hold U+2028 and its like unescaped, which text tools (and
httpx's `iter_lines`) take for line ends.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from loopserve.errors import EngineUnavailable

DONE = "[DONE]"
EVENT_BYTES_MAX = 16 * 2**20  # of one event; a longer one is not a chunk of an answer


class Quality(BaseModel):
    """`usage.loopserve`: what sparsity did in the turn."""

    mode: str = ""
    coverage_mean: float | None = None
    kept_tokens: float = 0.0
    context_tokens: float = 0.0

    @property
    def kept_share(self) -> float | None:
        """Tokens that a decode step read over those that a dense one would have read; None where nothing was decoded."""
        return self.kept_tokens / self.context_tokens if self.context_tokens else None


class PromptDetails(BaseModel):
    """`usage.prompt_tokens_details`. None: the server does not say."""

    cached_tokens: int | None = None


class Usage(BaseModel):
    """`usage` of a chunk."""

    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptDetails | None = None
    loopserve: Quality | None = None

    @property
    def cached_tokens(self) -> int | None:
        """Prompt tokens that were not computed; None where the server does not say."""
        return self.prompt_tokens_details.cached_tokens if self.prompt_tokens_details else None


@dataclass(frozen=True, slots=True)
class Chunk:
    """One event of an answer. `error` is set where the server ends the answer with one."""

    text: str = ""
    reasoning: str = ""  # of models that think aloud; no part of the conversation
    finish_reason: str | None = None
    usage: Usage | None = None
    error: str | None = None


class EventReader:
    """Puts the bytes of one response together to the payloads of its events. Comments and other fields are skipped."""

    def __init__(self) -> None:
        self._rest = b""  # of a line that has not ended
        self._held: list[bytes] = []  # data lines of an event that has not ended

    def feed(self, data: bytes) -> Sequence[str]:
        """The payloads of the events that end in `data`. Raises EngineUnavailable at one that is too long or no UTF-8."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        payloads = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._held.append(line[5:].removeprefix(b" "))
            elif not line and self._held:
                payloads.append(self._payload())
        if len(self._rest) + sum(map(len, self._held)) > EVENT_BYTES_MAX:
            raise EngineUnavailable(f"the server sent an event of more than {EVENT_BYTES_MAX} bytes")
        return payloads

    def end(self) -> Sequence[str]:
        """The payload of a last event that no blank line ends."""
        payloads = self.feed(b"\n") if self._rest else []
        return [*payloads, self._payload()] if self._held else payloads

    def _payload(self) -> str:
        data, self._held = b"\n".join(self._held), []
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise EngineUnavailable("the server sent an event that is not UTF-8") from error


def read_chunk(payload: str) -> Chunk:
    """The chunk in a payload (any but DONE). Raises EngineUnavailable where it cannot be read."""
    try:
        chunk = json.loads(payload)
        if chunk.get("error"):
            return Chunk(error=told_error(chunk))
        usage = Usage.model_validate(chunk["usage"]) if chunk.get("usage") else None
        if not chunk["choices"]:
            return Chunk(usage=usage)
        choice = chunk["choices"][0]  # the only one: no client of ours asks for more
        delta = choice["delta"]
        reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
        return Chunk(delta.get("content") or "", reasoning, choice.get("finish_reason"), usage)
    except (ValueError, LookupError, AttributeError, TypeError, ValidationError) as error:
        raise EngineUnavailable(f"the server sent a chunk that cannot be read: {payload[:200]}") from error


def told_error(body: Any) -> str:
    """What an error in OpenAI's shape says, or whatever else stands there."""
    error = body.get("error") if isinstance(body, dict) else None
    return str(error.get("message")) if isinstance(error, dict) else str(error or body)
