"""Errors on the wire: the one table from `loopserve.errors` to HTTP, and the one place that writes error bodies.

Used by hop 1 (ingress) and hop 3 (replica), so that a refusal looks the same wherever it arises. Knows nothing about Ray.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from loopserve.errors import (
    ConfigError,
    ContextLengthExceeded,
    EngineUnavailable,
    InvalidRequest,
    LoopServeError,
    NotFound,
    Overloaded,
    UnsupportedField,
    UnsupportedModel,
)

UNAVAILABLE_RETRY_S = 2.0  # Serve notices a dead replica within about this time


class BodyTooLarge(InvalidRequest):
    """The request's body is longer than the server reads."""

    code = "request_too_large"


class MethodNotAllowed(InvalidRequest):
    """The path exists, the method does not."""

    code = "method_not_allowed"


class ModelNotFound(NotFound):
    """The request names a model that is not served here."""

    code = "model_not_found"


class ReplicaLost(EngineUnavailable):
    """The replica that worked on a request went away. `replica` is its id where known."""

    code = "replica_lost"

    def __init__(self, message: str, /, *, replica: str = "") -> None:
        super().__init__(message)
        self.replica = replica


class InvalidKey(LoopServeError):
    """The request brings no API key, or one that is not valid: unknown, disabled or expired, and nobody is told which."""

    code = "invalid_api_key"


class NotAllowed(LoopServeError):
    """The API key is valid, but does not open this."""

    code = "insufficient_permissions"


class LimitReached(Overloaded):
    """A limit of the API key is reached for now. `headers` say how its windows stand."""

    code = "rate_limit_exceeded"

    def __init__(self, message: str, /, *, retry_after_s: float, headers: Mapping[str, str]) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.headers = dict(headers)


class InsufficientQuota(LoopServeError):
    """The request needs more than the API key may ever use at once; waiting does not help."""

    code = "insufficient_quota"

    def __init__(self, message: str, /, *, headers: Mapping[str, str]) -> None:
        super().__init__(message)
        self.headers = {**headers, "x-should-retry": "false"}  # OpenAI's clients would try again otherwise


class TimedOut(EngineUnavailable):
    """Nothing came from a replica within the deployment's limit."""

    code = "timeout"


# class -> (HTTP status, OpenAI `type`); the nearest ancestor counts
STATUS: dict[type[LoopServeError], tuple[int, str]] = {
    InvalidRequest: (400, "invalid_request_error"),
    ContextLengthExceeded: (400, "invalid_request_error"),
    UnsupportedField: (400, "invalid_request_error"),
    BodyTooLarge: (413, "invalid_request_error"),
    MethodNotAllowed: (405, "invalid_request_error"),
    InvalidKey: (401, "invalid_request_error"),
    NotAllowed: (403, "invalid_request_error"),
    NotFound: (404, "invalid_request_error"),
    ModelNotFound: (404, "invalid_request_error"),
    Overloaded: (429, "rate_limit_error"),
    LimitReached: (429, "rate_limit_exceeded"),
    InsufficientQuota: (429, "insufficient_quota"),
    EngineUnavailable: (503, "service_unavailable_error"),
    ReplicaLost: (503, "service_unavailable_error"),
    TimedOut: (503, "service_unavailable_error"),
    UnsupportedModel: (500, "server_error"),
    ConfigError: (500, "server_error"),
    LoopServeError: (500, "server_error"),
}

INTERNAL_MESSAGE = "The server failed while it worked on this request; its log says how. Trying again may help."


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """An error as it leaves the server. `retry_after_s` is a header in whole seconds, at least 1."""

    status: int
    body: bytes
    retry_after_s: int | None = None
    code: str = ""
    more_headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def headers(self) -> dict[str, str]:
        """Headers that belong to the status and to the error."""
        found = dict(self.more_headers)
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        if self.retry_after_s is not None:
            found["retry-after"] = str(self.retry_after_s)
        return found


def status_of(error: BaseException) -> tuple[int, str]:
    """HTTP status and OpenAI type of any error; what is not ours is a 500 and says nothing of its inside."""
    for ancestor in type(error).__mro__:
        if ancestor in STATUS:
            return STATUS[ancestor]
    return STATUS[LoopServeError]


def code_of(error: BaseException) -> str:
    """OpenAI's error code of any error."""
    return error.code if isinstance(error, LoopServeError) else LoopServeError.code


def error_answer(error: BaseException) -> ErrorAnswer:
    """The whole answer for an error, in OpenAI's shape."""
    retry_after = None
    if isinstance(error, Overloaded):
        retry_after = max(1, math.ceil(error.retry_after_s))
    elif isinstance(error, EngineUnavailable):
        retry_after = math.ceil(UNAVAILABLE_RETRY_S)
    headers = error.headers if isinstance(error, LimitReached | InsufficientQuota) else {}
    return ErrorAnswer(status_of(error)[0], _body(error), retry_after, code_of(error), headers)


def error_event(error: BaseException) -> bytes:
    """The server-sent event that ends a stream which has failed; no `[DONE]` follows."""
    return b"data: " + _body(error) + b"\n\n"


def _body(error: BaseException) -> bytes:
    told = error if isinstance(error, LoopServeError) else LoopServeError(INTERNAL_MESSAGE)
    inside = {"message": told.message, "type": status_of(error)[1], "param": told.param, "code": told.code}
    return json.dumps({"error": inside}, ensure_ascii=False).encode("utf-8", "backslashreplace")
