"""Every error that a user of LoopServe can meet, as one tree. Knows nothing about HTTP: `deploy/` maps classes to status codes.

LoopServeError
|-- InvalidRequest            the request can never succeed as it stands
|   |-- ContextLengthExceeded   prompt (+ max_tokens) is longer than one session may be
|   `-- UnsupportedField        the field changes the meaning and is not served here
|-- NotFound                  no such model or session
|-- Overloaded                a limit of this replica is reached; try again later
|-- EngineUnavailable         the engine is starting, draining or dead
|-- UnsupportedModel          the checkpoint cannot be served correctly; raised at start only
`-- ConfigError               a setting is wrong; raised at start only
"""


class LoopServeError(Exception):
    """Base of the tree. `code` is stable and machine-readable, `param` names the offending field where there is one."""

    code = "internal_error"

    def __init__(self, message: str, /, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(LoopServeError):
    """The request is wrong; sending it again unchanged will fail again."""

    code = "invalid_request"


class ContextLengthExceeded(InvalidRequest):
    """The prompt, or the prompt plus the answer it asks for, is longer than one session may be."""

    code = "context_length_exceeded"


class UnsupportedField(InvalidRequest):
    """A field that would change the meaning of the answer is not supported; ignoring it would answer another question."""

    code = "unsupported_parameter"


class NotFound(LoopServeError):
    """The named model or session is not here."""

    code = "not_found"


class Overloaded(LoopServeError):
    """A limit is reached. `retry_after_s` says when trying again makes sense."""

    code = "overloaded"

    def __init__(self, message: str, /, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineUnavailable(LoopServeError):
    """The engine cannot take or finish turns: it is starting, draining, or its thread has died."""

    code = "engine_unavailable"


class UnsupportedModel(LoopServeError):
    """The checkpoint needs something the engine would silently compute wrongly (sliding window, linear attention, ...)."""

    code = "unsupported_model"


class ConfigError(LoopServeError):
    """A setting contradicts another one or lies outside its range."""

    code = "config_error"
