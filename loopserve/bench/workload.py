"""What is said in a load and how fast: dialogues, made up or given, and the pace at which they come. Knows no server.

A dialogue is fixed by the seed and its number alone, so the same load can be sent to several servers, whatever they answer.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from loopserve.bench.distributions import Distribution
from loopserve.errors import InvalidRequest

CONCURRENCY_MAX = 4096
TURNS_MAX = 10_000  # of one dialogue
TEXT_TOKENS_MAX = 1_000_000  # of one message
RUN_TURNS_MAX = 1_000_000  # of one load: every turn's record is kept
_VOCABULARY = (
    "the a this that every some one two morning evening river bridge market garden window letter kitchen teacher doctor number "
    "train station winter summer mountain harbour paper bread apple coffee table chair road field forest clock music story year "
    "walks carries opens closes remembers follows paints writes reads sells buys builds leaves finds keeps turns near behind under "
    "over before after between without slowly quickly quietly always never often again small large old new bright dark warm"
)
_WORDS = tuple(_VOCABULARY.split())


@dataclass(frozen=True, slots=True)
class ScriptTurn:
    """What the user says in one turn. `think_s` passes between the answer before it and sending it."""

    user: str
    output_tokens_max: int
    think_s: float = 0.0
    is_right: Callable[[str], bool | None] | None = None


@dataclass(frozen=True, slots=True)
class Script:
    """The user's side of one dialogue."""

    id: str
    turns: tuple[ScriptTurn, ...]
    system: str | None = None


class Source(Protocol):
    """Where dialogues come from."""

    @property
    def num_scripts(self) -> int | None:
        """How many there are; None where there is no end of them."""

    def script(self, index: int) -> Script:
        """One of them; the same for the same index."""


@dataclass(frozen=True, slots=True)
class Synthetic:
    """Made-up dialogues of plain words. Lengths are tokens, turned into words by `tokens_per_word` of the model at hand."""

    turns: Distribution = field(default_factory=lambda: Distribution.constant(6))
    input_tokens: Distribution = field(default_factory=lambda: Distribution.constant(100))
    output_tokens: Distribution = field(default_factory=lambda: Distribution.constant(50))
    think_s: Distribution = field(default_factory=lambda: Distribution.constant(0))
    system_tokens: Distribution = field(default_factory=lambda: Distribution.constant(0))
    shares_system: bool = True  # one system prompt for all dialogues, else one each
    seed: int = 0
    tokens_per_word: float = 1.0

    def __post_init__(self) -> None:
        for name, drawn, limit in (
            ("turns", self.turns, TURNS_MAX),
            ("input", self.input_tokens, TEXT_TOKENS_MAX),
            ("output", self.output_tokens, TEXT_TOKENS_MAX),
            ("system", self.system_tokens, TEXT_TOKENS_MAX),
        ):
            if drawn.high > limit:
                raise InvalidRequest(f"{name}: {drawn} goes above {limit}; end it there", param=name)
        if self.tokens_per_word <= 0:
            raise InvalidRequest("tokens_per_word is not above 0", param="tokens_per_word")

    @property
    def num_scripts(self) -> int | None:
        """There is no end of them."""
        return None

    def script(self, index: int) -> Script:
        """Dialogue `index`."""
        rng = random.Random(f"{self.seed}/{index}")
        system = self._text(random.Random(f"{self.seed}/system") if self.shares_system else rng, self.system_tokens, 0)
        turns = []
        for number in range(self.turns.draw_whole(rng, least=1)):
            think_s = self.think_s.draw(rng) if number else 0.0
            user = self._text(rng, self.input_tokens, 1)
            turns.append(ScriptTurn(user, self.output_tokens.draw_whole(rng, least=1), think_s))
        return Script(f"{self.seed}-{index}", tuple(turns), system or None)

    def _text(self, rng: random.Random, tokens: Distribution, least: int) -> str:
        num_words = round(tokens.draw_whole(rng, least=least) / self.tokens_per_word)
        return made_text(rng, max(least, num_words))


@dataclass(frozen=True, slots=True)
class Given:
    """Dialogues that somebody wrote, in their order."""

    scripts: Sequence[Script]

    @property
    def num_scripts(self) -> int | None:
        """As many as were given."""
        return len(self.scripts)

    def script(self, index: int) -> Script:
        """Dialogue `index`."""
        return self.scripts[index]


@dataclass(frozen=True, slots=True)
class Workload:
    """A load: its dialogues and its pace.

    Without a rate, `concurrency` dialogues are held at any time, and the next begins when one ends. With a rate, dialogues
    begin at random (Poisson) times, `rate_per_s` of them on average, and later where `concurrency` are held already.
    Warm-up dialogues come first and end before the measured ones begin.
    """

    source: Source
    num_dialogues: int | None = None  # measured ones; None: all that are given, or until the time is over
    num_warmup: int = 0
    concurrency: int = 8
    rate_per_s: float | None = None
    duration_s: float | None = None  # of the measured part; then no turn is sent any more
    drain_s: float = 10.0  # turns that are being answered at that time have this long to end
    seed: int = 0  # of the arrival times

    def __post_init__(self) -> None:
        available = self.source.num_scripts
        wanted = self.num_warmup + (self.num_dialogues or 1)
        if available is not None and wanted > available:
            raise InvalidRequest(
                f"{wanted} dialogues are wanted (warm-up included), {available} are given; ask for fewer",
                param="num_dialogues",
            )
        if self.num_dialogues is None and self.duration_s is None and available is None:
            raise InvalidRequest("a load without end; limit its dialogues or its seconds", param="num_dialogues")
        if not 1 <= self.concurrency <= CONCURRENCY_MAX:
            raise InvalidRequest(
                f"concurrency is {self.concurrency}; between 1 and {CONCURRENCY_MAX} dialogues are held at a time",
                param="concurrency",
            )
        if self.num_warmup < 0 or (self.num_dialogues is not None and self.num_dialogues < 1):
            raise InvalidRequest("a load measures one dialogue or more", param="num_dialogues")
        for name in ("rate_per_s", "duration_s"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InvalidRequest(f"{name} is {value:g}; leave it out, or give more than 0", param=name)
        if self.drain_s < 0:
            raise InvalidRequest(f"drain_s is {self.drain_s:g}; give 0 or more", param="drain_s")

    @property
    def num_measured(self) -> int | None:
        """Dialogues of the measured part; None where time alone ends it."""
        if self.num_dialogues is not None or self.source.num_scripts is None:
            return self.num_dialogues
        return self.source.num_scripts - self.num_warmup


def made_text(rng: random.Random, num_words: int) -> str:
    """Sentences of random words."""
    words: list[str] = []
    while len(words) < num_words:
        sentence = rng.choices(_WORDS, k=min(rng.randint(5, 11), num_words - len(words)))
        sentence[0], sentence[-1] = sentence[0].capitalize(), f"{sentence[-1]}."
        words += sentence
    return " ".join(words)
