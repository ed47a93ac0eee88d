"""The verdict on conversations whose replica went: what a client saw of its turns, counted and held against claims. Pure.

Each claim can fail; the case without hand-off must fail the one about moving, or it measures something else.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from benchmarks.cluster.dialogue_load import Turn
from loopserve.config import BLOCK_TOKENS
from loopserve.evaluation.items import Turn as Said
from loopserve.evaluation.scoring import score

TURNS_BEFORE = 2  # the event
TRIES = 2  # of a turn
_ENDED_S_MAX = 30.0  # after the kill: a turn that is neither answered nor told why by then hangs
_REUSED_SHARE_MIN = 0.95
_NOT_CHOSEN = ("not_worth_it", "over_limit")  # results of a hand-off that was never begun
_WITHOUT_REASON = ("the stream broke off", "the stream ended without")


class Event(StrEnum):
    """What happens between the turns that tell and those that ask."""

    NOTHING = "nothing"
    DRAIN = "drain"
    KILL = "kill"
    KILL_IN_TURNS = "kill in turns"


@dataclass(frozen=True, slots=True)
class Case:
    """One way in which a replica goes."""

    name: str
    event: Event = Event.NOTHING
    hands_off: bool = True
    has_disk: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What one client says: the past that it brings, two turns, and two questions after the event."""

    name: str
    session_id: str | None
    past: tuple[tuple[str, str], ...]  # role and text
    texts: tuple[str, ...]
    asked: tuple[Said, ...]  # the last of the texts, with what is accepted


@dataclass(slots=True)
class Talk:
    """One client, as far as it came."""

    plan: Plan
    messages: list[dict[str, str]]
    turns: list[Turn] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  # what was said of turns that broke off
    ended_at_s: float = 0.0  # the last try, whatever came of it
    is_open: bool = False  # a turn is under way
    has_failed: bool = False  # a turn was not answered even when it was asked again

    @classmethod
    def of(cls, plan: Plan) -> Talk:
        """Nothing said yet but what the client brings."""
        return cls(plan, [{"role": role, "content": text} for role, text in plan.past])


@dataclass(frozen=True, slots=True)
class Outcome:
    """One case, over."""

    case: Case
    talks: tuple[Talk, ...]
    gone: str  # the replica that went; empty: none
    handoffs: dict[str, int]  # by result
    event_s: float  # a drain's, until its process is gone; of a kill in turns, until all of these were answered
    moved_bytes: int = 0
    moving_s: float = 0.0  # of all hand-offs together, as the new holders saw them
    caught: tuple[str, ...] = ()  # dialogues of the killed replica that were under way
    longest_s: float = 0.0  # from the kill until the last of these was answered or told why


@dataclass(frozen=True, slots=True)
class Check:
    """One claim about a case, and what was found."""

    name: str
    passed: bool
    finding: str


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of the dialogues of the replica that went, and of all."""

    held: int  # by the replica that went
    reused: int  # of these: the next turn found all that was said before
    recomputed: int
    held_named: int  # of those held: with a header
    reused_named: int
    failed: int  # of all dialogues
    broke_off: int  # turns that were answered only when they were asked again
    others_reused: int  # dialogues of the other replicas that stayed as they were
    others: int
    other_answers: int  # dialogues whose first answer unlike the undisturbed one came after the event
    other_before: int  # ... or before it, so that the event has nothing to do with it
    right: float  # share of the questions with the answer that is known
    first_token_reused_s: float | None  # median of the next turn
    first_token_recomputed_s: float | None

    @classmethod
    def of(cls, outcome: Outcome, undisturbed: Outcome) -> Tally:
        """Count."""
        held = [talk for talk in outcome.talks if _holder(talk) == outcome.gone != ""]
        others = [talk for talk in outcome.talks if talk not in held]
        next_turns = [(_is_reused(talk), talk.turns[TURNS_BEFORE].first_token_s) for talk in held if _went_on(talk)]
        named = [talk for talk in held if talk.plan.session_id is not None]
        wanted = {talk.plan.name: talk for talk in undisturbed.talks}
        differing = [_first_other_answer(talk, wanted[talk.plan.name]) for talk in outcome.talks]
        scores = [share for talk in outcome.talks for share in _scores(talk)]
        return cls(
            held=len(held),
            reused=sum(is_reused for is_reused, _ in next_turns),
            recomputed=sum(not is_reused for is_reused, _ in next_turns),
            held_named=len(named),
            reused_named=sum(_went_on(talk) and _is_reused(talk) for talk in named),
            failed=sum(talk.has_failed for talk in outcome.talks),
            broke_off=sum(len(talk.broken) - talk.has_failed * TRIES for talk in outcome.talks),
            others_reused=sum(_went_on(talk) and _is_reused(talk) for talk in others),
            others=len(others),
            other_answers=sum(index is not None and index >= TURNS_BEFORE for index in differing),
            other_before=sum(index is not None and index < TURNS_BEFORE for index in differing),
            right=statistics.fmean(scores) if scores else 0.0,
            first_token_reused_s=_median([seconds for is_reused, seconds in next_turns if is_reused]),
            first_token_recomputed_s=_median([seconds for is_reused, seconds in next_turns if not is_reused]),
        )


def checks(outcome: Outcome, tally: Tally) -> list[Check]:
    """The claims about a case."""
    num = len(outcome.talks)
    comparable = num - tally.other_before
    finding = f"{tally.other_answers} of {comparable} dialogues differ, {tally.other_before} differed before anything happened"
    stayed = f"{tally.others_reused} of {tally.others} dialogues of the other replicas found theirs"
    found = [
        Check("none fails", tally.failed == 0, f"{tally.failed} of {num} dialogues"),
        Check("same answers", tally.other_answers == 0 < comparable, finding),
        Check("others stay", tally.others_reused == tally.others, stayed),
    ]
    if outcome.case.event is Event.DRAIN:
        found += _drain_checks(outcome, tally)
    if outcome.case.event is Event.KILL_IN_TURNS:
        found += _broken_checks(outcome)
    if outcome.case.has_disk:
        share = tally.reused / tally.held if tally.held else 0.0
        finding = (
            f"{tally.reused} of {tally.held} went on with their KV; with a header {tally.reused_named} of {tally.held_named}, "
            f"without {tally.reused - tally.reused_named} of {tally.held - tally.held_named}"
        )
        found.append(Check("saved sessions go on", share >= _REUSED_SHARE_MIN, finding))
    elif outcome.case.event in (Event.KILL, Event.KILL_IN_TURNS):
        finding = f"{tally.recomputed} of {tally.held}"
        found.append(Check("all computed again", tally.recomputed == tally.held > 0, finding))
    return found


def _drain_checks(outcome: Outcome, tally: Tally) -> list[Check]:
    """Chosen is whatever was tried, also where that failed: only then does the share tell what a hand-off is worth."""
    told = sum(outcome.handoffs.values())
    chosen = told - sum(outcome.handoffs.get(result, 0) for result in _NOT_CHOSEN)
    share = tally.reused / chosen if chosen else 0.0
    moving = f"{tally.reused} went on with their KV, {chosen} were to move, {outcome.handoffs.get('moved', 0)} moved"
    if not outcome.case.hands_off:
        return [
            Check("moved sessions go on", share >= _REUSED_SHARE_MIN, moving),
            Check("nothing reused", tally.reused == 0 < tally.held, f"{tally.reused} of {tally.held}"),
        ]
    return [
        Check("moved sessions go on", share >= _REUSED_SHARE_MIN, moving),
        Check("all accounted for", told == tally.held, f"{told} results told of {tally.held} sessions"),
    ]


def _broken_checks(outcome: Outcome) -> list[Check]:
    broken = [text for talk in outcome.talks for text in talk.broken]
    unclear = [text for text in broken if "TurnFailed" not in text or any(part in text for part in _WITHOUT_REASON)]
    num = len(outcome.caught)
    return [
        Check("turns were under way", num > 0, f"{num} at the kill"),
        Check("none hangs", outcome.longest_s <= _ENDED_S_MAX, f"the last was over {outcome.longest_s:.1f} s after it"),
        Check("told why", not unclear, f"{len(broken)} broke off, {len(unclear)} of them without a reason"),
    ]


def _holder(talk: Talk) -> str:
    """The replica that answered last before the event; empty where the dialogue did not come so far."""
    return talk.turns[TURNS_BEFORE - 1].replica if len(talk.turns) >= TURNS_BEFORE else ""


def _went_on(talk: Talk) -> bool:
    return len(talk.turns) > TURNS_BEFORE


def _is_reused(talk: Talk) -> bool:
    """Whether the turn after the event found the whole conversation, but for at most one block."""
    before, after = talk.turns[TURNS_BEFORE - 1 : TURNS_BEFORE + 1]
    left = before.prompt_tokens + before.completion_tokens
    return left - after.cached_tokens - after.rectified_tokens <= BLOCK_TOKENS


def _first_other_answer(talk: Talk, wanted: Talk) -> int | None:
    """Of the turns: what follows another answer is another dialogue."""
    pairs = zip(talk.turns, wanted.turns, strict=False)
    return next((index for index, (turn, other) in enumerate(pairs) if not _is_same_answer(turn, other)), None)


def _is_same_answer(turn: Turn, other: Turn) -> bool:
    """By text and number of tokens: the service tells no token ids."""
    return (turn.answer, turn.completion_tokens) == (other.answer, other.completion_tokens)


def _scores(talk: Talk) -> list[float]:
    """Of the questions; one that was not answered is wrong."""
    answers = [turn.answer for turn in talk.turns[TURNS_BEFORE:]]
    answers += [""] * (len(talk.plan.asked) - len(answers))
    return [score(answer, said.accepted, said.metric) for answer, said in zip(answers, talk.plan.asked, strict=True)]


def _median(seconds: Sequence[float]) -> float | None:
    return statistics.median(seconds) if seconds else None


def is_control(case: Case, check: Check) -> bool:
    """Whether a check must fail, or it measures something else."""
    return not case.hands_off and check.name == "moved sessions go on"
