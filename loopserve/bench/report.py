"""What the turns of a load come to: percentiles, shares and counts, as one record that is also the JSON file. Knows no server.

The record's shape is a contract (`SCHEMA`): names are added, never changed. Times are seconds, shares 0 to 1, None where nothing was
measured or the server does not say. The warm-up counts nowhere.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from loopserve.bench.load import LoadResult
from loopserve.bench.records import FailureKind, Gaps, TurnRecord

SCHEMA = "loopserve.bench/1"
TURN_BUCKETS = ((1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32))  # those of the metrics' label `turn`


@dataclass(frozen=True, slots=True)
class Slo:
    """When a turn is good: its first text and its mean wait for each next token come within these times. None: no matter."""

    first_token_s: float | None = None
    inter_token_s: float | None = None

    @property
    def is_set(self) -> bool:
        """Whether anything is demanded."""
        return self.first_token_s is not None or self.inter_token_s is not None

    def is_met_by(self, turn: TurnRecord) -> bool:
        """Whether a turn is good. One without an answer is not; one of a single token has no wait between tokens."""
        if not turn.is_answered:
            return False
        return all(
            limit is None or value is None or value <= limit
            for limit, value in (
                (self.first_token_s, turn.first_token_s),
                (self.inter_token_s, turn.inter_token_s),
            )
        )


@dataclass(frozen=True, slots=True)
class Percentiles:
    """How values are spread; all but `num` are None where there are no values."""

    num: int
    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    max: float | None = None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Percentiles":
        """Of what is there; None is left out."""
        found = sorted(value for value in values if value is not None)
        if not found:
            return cls(0)
        p50, p90, p99 = (percentile(found, percent) for percent in (50, 90, 99))
        return cls(len(found), fmean(found), p50, p90, p99, found[-1])

    @classmethod
    def of_gaps(cls, gaps: Gaps) -> "Percentiles":
        """Of counted gaps, to 1 %."""
        if not gaps.num:
            return cls(0)
        p50, p90, p99 = (gaps.percentile(percent) for percent in (50, 90, 99))
        return cls(gaps.num, gaps.total_s / gaps.num, p50, p90, p99, gaps.longest_s)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the ordered values lie, between two of them in proportion."""
    at = percent / 100 * (len(ordered) - 1)
    below = math.floor(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (at - below)


@dataclass(frozen=True, slots=True)
class TurnCounts:
    """Turns by how they went. `sent` is the sum of the others."""

    sent: int
    answered: int
    failed: int
    rejected: int  # and not answered after the retries that were allowed
    cut: int  # by the end of the load


@dataclass(frozen=True, slots=True)
class DialogueCounts:
    """Dialogues by how far they came."""

    begun: int
    completed: int
    late: int  # begun later than the rate wanted: all places were taken


@dataclass(frozen=True, slots=True)
class ByTurn:
    """Answered turns of one number, or of one bucket of numbers."""

    turn: str
    first_token_s: Percentiles
    prompt_tokens_mean: float | None
    cached_share: float | None


@dataclass(frozen=True, slots=True)
class Throughput:
    """What came per second of the measured part."""

    output_tokens: int
    output_tokens_per_s: float
    turns_per_s: float
    tokens_counted_by: str  # usage | chunks | both


@dataclass(frozen=True, slots=True)
class Goodput:
    """Turns that met the limits, of all that were sent and not cut."""

    slo_first_token_s: float | None
    slo_inter_token_s: float | None
    share: float | None
    turns_per_s: float


@dataclass(frozen=True, slots=True)
class Cache:
    """What was not computed again, in the answered turns beyond the first of each dialogue."""

    reported: bool
    prompt_tokens: int
    cached_tokens: int
    share_of_prompt: float | None
    share_of_history: (
        float | None
    )  # of prompt and answer of the turn before, which is all that a cache can hold; at most 1


@dataclass(frozen=True, slots=True)
class Stickiness:
    """Whether conversations stay where they are, where answers name their replica."""

    reported: bool
    turns_by_replica: dict[str, int]
    same_replica_share: float | None  # of turns beyond the first: answered where the turn before was
    dialogues_on_one_replica: int
    dialogues_of_several_turns: int


@dataclass(frozen=True, slots=True)
class ErrorCount:
    """Failures that look alike, with what one of them said."""

    kind: str
    count: int
    example: str


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers to turns that expected something."""

    expected: int
    right: int


@dataclass(frozen=True, slots=True)
class Generator:
    """What making the load cost this process: near one core, the numbers are about it and not about the server."""

    cpu_s: float
    cpu_share: float  # of one core
    cpu_s_per_1000_chunks: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """All of it."""

    schema: str
    model: str
    wall_s: float
    is_interrupted: bool
    dialogues: DialogueCounts
    turns: TurnCounts
    rejections: int  # answers with 429, or 503 and Retry-After, those included that were tried again
    first_token_s: Percentiles
    first_token_by_turn: tuple[ByTurn, ...]
    first_token_by_bucket: tuple[ByTurn, ...]
    inter_token_s: Percentiles  # of the turns' means
    chunk_gap_s: Percentiles  # of all waits between two chunks with text
    turn_s: Percentiles
    throughput: Throughput
    goodput: Goodput | None
    cache: Cache
    stickiness: Stickiness
    errors: tuple[ErrorCount, ...]
    answers: Answers | None
    generator: Generator


def summarise(result: LoadResult, slo: Slo | None = None) -> Report:
    """The report of a load, also of one that is not over."""
    turns = [turn for turn in result.turns if not turn.warm_up]
    answered = [turn for turn in turns if turn.is_answered]
    wall_s = max(result.wall_s, 1e-9)
    checked = [turn.right for turn in answered if turn.right is not None]
    num_chunks = sum(turn.num_chunks for turn in turns)
    rejected = [turn for turn in turns if turn.failure and turn.failure.kind is FailureKind.REJECTED]
    return Report(
        schema=SCHEMA,
        model=result.model,
        wall_s=result.wall_s,
        is_interrupted=result.is_interrupted,
        dialogues=DialogueCounts(result.num_begun, result.num_completed, result.num_late),
        turns=_counts(turns),
        rejections=sum(turn.num_rejections for turn in turns) + len(rejected),
        first_token_s=Percentiles.of(turn.first_token_s for turn in answered),
        first_token_by_turn=_by(answered, lambda turn: (turn.number, str(turn.number))),
        first_token_by_bucket=_by(answered, lambda turn: turn_bucket(turn.number)),
        inter_token_s=Percentiles.of(turn.inter_token_s for turn in answered),
        chunk_gap_s=Percentiles.of_gaps(result.gaps),
        turn_s=Percentiles.of(turn.total_s for turn in answered),
        throughput=Throughput(
            output_tokens=sum(turn.output_tokens for turn in turns),
            output_tokens_per_s=sum(turn.output_tokens for turn in turns) / wall_s,
            turns_per_s=len(answered) / wall_s,
            tokens_counted_by=_counted_by(answered),
        ),
        goodput=_goodput(turns, slo, wall_s) if slo is not None and slo.is_set else None,
        cache=_cache(answered),
        stickiness=_stickiness(turns),
        errors=_errors(turns),
        answers=Answers(len(checked), sum(checked)) if checked else None,
        generator=Generator(
            result.generator_cpu_s,
            result.generator_cpu_s / wall_s,
            1000 * result.generator_cpu_s / num_chunks if num_chunks else None,
        ),
    )


def turn_bucket(number: int) -> tuple[int, str]:
    """The bucket of a turn number: the first number in it, and its name."""
    for first, last in TURN_BUCKETS:
        if number <= last:
            return first, str(first) if first == last else f"{first}-{last}"
    return TURN_BUCKETS[-1][1] + 1, f"{TURN_BUCKETS[-1][1] + 1}+"


def _counts(turns: Sequence[TurnRecord]) -> TurnCounts:
    kinds = Counter(turn.failure.kind for turn in turns if turn.failure)
    rejected, cut = kinds[FailureKind.REJECTED], kinds[FailureKind.CUT]
    failed = kinds.total() - rejected - cut
    return TurnCounts(len(turns), len(turns) - kinds.total(), failed, rejected, cut)


def _by(answered: Sequence[TurnRecord], key: Callable[[TurnRecord], tuple[int, str]]) -> tuple[ByTurn, ...]:
    groups: dict[tuple[int, str], list[TurnRecord]] = defaultdict(list)
    for turn in answered:
        groups[key(turn)].append(turn)
    rows = []
    for (_, name), group in sorted(groups.items()):
        prompts = [turn.prompt_tokens for turn in group if turn.prompt_tokens is not None]
        told = [turn for turn in group if turn.cached_tokens is not None and turn.prompt_tokens]
        rows.append(
            ByTurn(
                turn=name,
                first_token_s=Percentiles.of(turn.first_token_s for turn in group),
                prompt_tokens_mean=fmean(prompts) if prompts else None,
                cached_share=_share(sum(t.cached_tokens or 0 for t in told), sum(t.prompt_tokens or 0 for t in told)),
            )
        )
    return tuple(rows)


def _counted_by(answered: Sequence[TurnRecord]) -> str:
    ways = {turn.counted_by_usage for turn in answered}
    return "both" if len(ways) == 2 else "chunks" if ways == {False} else "usage"


def _goodput(turns: Sequence[TurnRecord], slo: Slo, wall_s: float) -> Goodput:
    judged = [turn for turn in turns if turn.failure is None or turn.failure.kind is not FailureKind.CUT]
    good = sum(slo.is_met_by(turn) for turn in judged)
    return Goodput(slo.first_token_s, slo.inter_token_s, _share(good, len(judged)), good / wall_s)


def _cache(answered: Sequence[TurnRecord]) -> Cache:
    later = [turn for turn in answered if turn.number > 1 and turn.cached_tokens is not None]
    prompt = sum(turn.prompt_tokens or 0 for turn in later)
    cached = sum(turn.cached_tokens or 0 for turn in later)
    history = sum(turn.history_tokens or 0 for turn in later)
    held = sum(min(turn.cached_tokens or 0, turn.history_tokens or 0) for turn in later)
    return Cache(
        reported=any(turn.cached_tokens is not None for turn in answered),
        prompt_tokens=prompt,
        cached_tokens=cached,
        share_of_prompt=_share(cached, prompt),
        share_of_history=_share(held, history),
    )


def _stickiness(turns: Sequence[TurnRecord]) -> Stickiness:
    by_dialogue: dict[str, list[str]] = defaultdict(list)
    for turn in sorted(turns, key=lambda turn: turn.number):
        if turn.replica is not None:
            by_dialogue[turn.dialogue].append(turn.replica)
    several = [replicas for replicas in by_dialogue.values() if len(replicas) > 1]
    stayed = sum(one == next_one for replicas in several for one, next_one in pairwise(replicas))
    counts = Counter(replica for replicas in by_dialogue.values() for replica in replicas)
    return Stickiness(
        reported=bool(counts),
        turns_by_replica=dict(sorted(counts.items())),
        same_replica_share=_share(stayed, sum(len(replicas) - 1 for replicas in several)),
        dialogues_on_one_replica=sum(len(set(replicas)) == 1 for replicas in several),
        dialogues_of_several_turns=len(several),
    )


def _errors(turns: Sequence[TurnRecord]) -> tuple[ErrorCount, ...]:
    failures = [turn.failure for turn in turns if turn.failure and turn.failure.kind is not FailureKind.CUT]
    examples = {failure.label: failure.message for failure in reversed(failures)}
    counts = Counter(failure.label for failure in failures)
    return tuple(ErrorCount(label, count, examples[label]) for label, count in counts.most_common())


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
