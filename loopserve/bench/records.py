"""What a load leaves behind: one record a turn, and the waits between chunks. Knows not how they came about."""

import math
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

_STEP = math.log(1.02)
_LEAST_S = 1e-6


class FailureKind(StrEnum):
    """Why a turn has no whole answer."""

    REJECTED = "rejected"  # 429, or 503 with Retry-After: come back later
    HTTP = "http"  # any other status but 2xx
    CONNECT = "connect"  # nobody there
    TIMEOUT = "timeout"  # nothing came for too long
    BROKEN = "broken"  # the connection ended in mid-answer
    ERROR_EVENT = "error_event"  # the server ended the answer with an error
    MALFORMED = "malformed"  # what came is no OpenAI stream
    CUT = "cut"  # this load was over; not the server's doing


@dataclass(frozen=True, slots=True)
class Failure:
    """How a turn failed. `status` is that of HTTP where one came, `code` OpenAI's where the body had one."""

    kind: FailureKind
    message: str
    status: int | None = None
    code: str | None = None

    @property
    def label(self) -> str:
        """The kind, with what tells one failure from another within it."""
        return "_".join(str(part) for part in (self.kind, self.status, self.code) if part)


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """What a client saw of one turn. Times are seconds; None: there was nothing to measure, or the server does not say."""

    dialogue: str
    number: int  # 1 for the dialogue's first
    num_turns: int  # that the dialogue was to have
    warm_up: bool
    sent_at_s: float  # since its part, warm-up or measured, began
    first_token_s: float | None  # from sending, waits for retries included
    total_s: float
    inter_token_s: float | None  # mean: from the first text to the last, over the tokens in between
    num_chunks: int  # with text
    output_tokens: int
    counted_by_usage: bool  # else output_tokens are chunks
    prompt_tokens: int | None
    cached_tokens: int | None
    history_tokens: int | None  # prompt and answer of the turn before: what a perfect cache holds
    replica: str | None
    finish_reason: str | None
    num_rejections: int  # before this answer, waited for
    right: bool | None
    failure: Failure | None = None

    @property
    def is_answered(self) -> bool:
        """Whether the whole answer came."""
        return self.failure is None

    @property
    def is_last(self) -> bool:
        """Whether the dialogue is over with it."""
        return self.failure is not None or self.number == self.num_turns


@dataclass(slots=True)
class Gaps:
    """Waits between two chunks with text, counted in steps of 2 %: as small for a million as for ten."""

    counts: Counter[int] = field(default_factory=Counter)
    longest_s: float = 0.0
    total_s: float = 0.0

    def add(self, gap_s: float) -> None:
        """Count one."""
        self.counts[round(math.log(max(gap_s, _LEAST_S)) / _STEP)] += 1
        self.longest_s = max(self.longest_s, gap_s)
        self.total_s += gap_s

    @property
    def num(self) -> int:
        """How many were counted."""
        return self.counts.total()

    def percentile(self, percent: float) -> float:
        """The gap that `percent` of all do not exceed, to 1 %; 0 where there are none."""
        wanted, seen = percent / 100 * self.num, 0
        for step in sorted(self.counts):
            seen += self.counts[step]
            if seen >= wanted:
                return min(math.exp(step * _STEP), self.longest_s)
        return 0.0
