"""The load of the autopilot's live run: readers who open a document, ask about it, think, and ask again. Knows no server."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum

from loopserve.bench import Endpoint, LoadResult, Script, ScriptTurn, Workload, made_text, run_load


class Part(StrEnum):
    """Parts of the run, in their order."""

    BASE = "base"
    HIGH = "high"
    AFTER = "after"


@dataclass(frozen=True, slots=True)
class Phases:
    """How many readers there are when, in seconds from the beginning of the load."""

    num_base: int = 4
    factor: int = 5
    base_s: float = 30.0
    high_s: float = 80.0
    after_s: float = 100.0
    ramp_s: float = 6.0  # within which the additional readers arrive
    outage_after_s: float = 25.0  # of the high part, where Prometheus is stopped at all
    outage_s: float = 30.0

    @property
    def total_s(self) -> float:
        """All three."""
        return self.base_s + self.high_s + self.after_s

    @property
    def outage(self) -> tuple[float, float]:
        """Begin and end."""
        begin_s = self.base_s + self.outage_after_s
        return begin_s, begin_s + self.outage_s

    def part(self, at_s: float) -> Part:
        """Which part a moment belongs to."""
        if at_s < self.base_s:
            return Part.BASE
        return Part.HIGH if at_s < self.base_s + self.high_s else Part.AFTER


@dataclass(frozen=True, slots=True)
class Readers:
    """Dialogues without end: a common system message, a document of one's own with the first question, then short questions."""

    seed: str
    tokens_per_word: float
    ramp_s: float = 0.0
    num_first: int = 0  # dialogues that begin within `ramp_s` instead of at once
    num_turns: int = 5
    system_tokens: int = 200
    document_tokens: int = 1200
    question_tokens: int = 100
    answer_tokens: int = 48
    think_s: tuple[float, float] = (1.0, 3.0)

    @property
    def num_scripts(self) -> int | None:
        """There is no end of them."""
        return None

    def script(self, index: int) -> Script:
        """Dialogue `index`."""
        rng = random.Random(f"{self.seed}/{index}")
        arrival_s = rng.uniform(0.0, self.ramp_s) if index < self.num_first else 0.0
        turns = [
            ScriptTurn(
                self._text(rng, self.question_tokens if number else self.document_tokens + self.question_tokens),
                self.answer_tokens,
                rng.uniform(*self.think_s) if number else arrival_s,
            )
            for number in range(self.num_turns)
        ]
        system = self._text(random.Random("system"), self.system_tokens)
        return Script(f"{self.seed}-{index}", tuple(turns), system)

    def _text(self, rng: random.Random, num_tokens: int) -> str:
        return made_text(rng, max(1, round(num_tokens / self.tokens_per_word)))


@dataclass(frozen=True, slots=True)
class Held:
    """What the readers saw. Times of `more` begin `more_at_s` after those of `base`."""

    began_unix_s: float
    base: LoadResult
    more: LoadResult
    more_at_s: float


async def hold(
    endpoint: Endpoint, phases: Phases, *, tokens_per_word: float, meanwhile: Callable[[float], Awaitable[None]]
) -> Held:
    """The whole load: the base all the time, the rest in the high part. `meanwhile` gets the unix time of the beginning and is cancelled
    at the end."""
    num_more = phases.num_base * (phases.factor - 1)
    base = Workload(
        Readers("base", tokens_per_word, ramp_s=phases.ramp_s, num_first=phases.num_base),
        concurrency=phases.num_base,
        duration_s=phases.total_s,
        drain_s=30.0,
    )
    more = Workload(
        Readers("more", tokens_per_word, ramp_s=phases.ramp_s, num_first=num_more),
        concurrency=num_more,
        duration_s=phases.high_s,
        drain_s=60.0,
    )
    began_unix_s, began_s = time.time(), time.monotonic()
    beside = asyncio.ensure_future(meanwhile(began_unix_s))
    held_base = asyncio.ensure_future(run_load(base, endpoint))
    await asyncio.sleep(phases.base_s)
    more_at_s = time.monotonic() - began_s
    held_more = await run_load(more, endpoint)
    result = Held(began_unix_s, await held_base, held_more, more_at_s)
    beside.cancel()
    await asyncio.gather(beside, return_exceptions=True)
    return result
