"""Makes a whole dialogue of puzzles, small talk and pasted text, of a wanted length in tokens and turns. Pure, seeded.

Every event stands at a moment between 0 and 1; sorted by it they are the past. What is told between two questions is cut into
messages, so that a fact may be a message of its own, one of several in a message, or lie amid pasted text:

    told  told  filler  ASKED  filler  told | filler  filler  told  ASKED     events
    |---- one ----|---- two    |---- one ----|------ two ------|              messages, cut at random to give the wanted turns
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from loopserve.evaluation.dialogues import phrases as said
from loopserve.evaluation.dialogues.pasted import LooseText
from loopserve.evaluation.dialogues.tasks import MAKERS, Maker, Piece, Puzzle, Question, recalled, reply_to
from loopserve.evaluation.dialogues.words import Names, Split
from loopserve.evaluation.items import Dialogue, Metric, Place, Third, Turn

CountTokens = Callable[[str], int]  # tokens of one message, its markers included
_PLACES = (*[Place.BEGIN] * 3, *[Place.MIDDLE] * 2, Place.END)  # of past questions: the more often, the harder to find


@dataclass(frozen=True, slots=True)
class Shape:
    """How a dialogue is built; what is not asked distracts."""

    tokens: int  # of the whole dialogue, a probe included
    turns: tuple[int, int] = (2, 40)
    tasks: tuple[str, ...] = tuple(MAKERS)  # of the puzzles that are not probes
    tokens_a_puzzle: tuple[int, int] = (90, 220)  # one such puzzle for so many tokens, if it finds room
    asked: float = 0.3  # chance that each question of them is asked in the past
    asked_again: float = 0.0
    surrounded: float = 0.3  # chance that a question of the past stands amid other text
    sign_off: float = 0.05  # chance of an instruction about all answers to come
    unknown: float = 0.1  # chance of a question that nothing told answers
    greeting: float = 0.1
    system: float = 0.3
    careless: float = 0.05  # chance that a message has no capital and no final mark


@dataclass(frozen=True, slots=True)
class Probe:
    """What to ask: a task, about what was told last in a part of the past, at a place of the question's turn."""

    task: str
    about: Third
    question_at: Place


@dataclass(frozen=True, slots=True)
class _Event:
    moment: float
    told: Piece | None = None  # else a question
    question: Question | None = None
    task: str = ""
    metric: Metric = Metric.MATCH
    signs_off: bool = False


def make_past(rng: random.Random, split: Split, shape: Shape, *, count_tokens: CountTokens, id_: str) -> Dialogue:
    """A dialogue whose questions are asked on the way, none of them a probe."""
    builder = _Builder(rng, split, shape, count_tokens)
    return Dialogue(id_, builder.system, builder.past())


def make_probed(
    rng: random.Random,
    split: Split,
    shape: Shape,
    probes: Sequence[Probe],
    *,
    count_tokens: CountTokens,
    id_: str,
) -> Dialogue:
    """A dialogue that ends in the probes, each over the same past."""
    builder = _Builder(rng, split, shape, count_tokens)
    asked = [builder.probe(probe) for probe in probes]
    longest = max(count_tokens(turn.user) + count_tokens(turn.answer) for turn in asked)
    past = builder.past(reserved=longest)
    return Dialogue(id_, builder.system, (*past, *map(builder.signed, asked)))


def _accepted(metric: Metric, words: str, answer: str) -> tuple[str, ...]:
    """What counts as right: the words wherever they stand in an answer, or for the overlap of words the whole answer."""
    if metric is Metric.F1:
        return (answer,)
    return (words,) if words else ()


def _tellings(puzzle: Puzzle, moments: Sequence[float]) -> list[_Event]:
    return [_Event(at, told=piece) for at, piece in zip(moments, puzzle.pieces, strict=True)]


def _asking_turn(event: _Event, signed: str) -> Turn:
    question = event.question
    assert question is not None, "the event asks"
    answer = f"{question.answer} {signed}" if signed and event.task != "greeting" else question.answer
    return Turn(
        question.text,
        answer,
        accepted=_accepted(event.metric, question.accepted, answer),
        metric=event.metric,
        task=event.task,
    )


class _Builder:
    def __init__(self, rng: random.Random, split: Split, shape: Shape, count_tokens: CountTokens) -> None:
        self._rng = rng
        self._split = split
        self._shape = shape
        self._count = count_tokens
        names = Names(rng, split)
        self._make = Maker(rng, split, names, LooseText(rng, split, names.taken))
        self._events: list[_Event] = []
        self._sign_off = ""
        self.system = rng.choice(said.SYSTEM_PROMPTS) if rng.random() < shape.system else ""
        self._room = shape.tokens - 1 - (count_tokens(self.system) if self.system else 0)

    def probe(self, asked: Probe) -> Turn:
        """Tell a puzzle's pieces in the past, the last in a third of it, and ask at the end."""
        task = asked.task
        puzzle = MAKERS[task](self._make)
        last = (list(Third).index(asked.about) + self._rng.random()) / 3
        if task == "instructions":
            self._instruct(last)
            last = self._rng.random()
        self._add(*_tellings(puzzle, self._moments(puzzle, last)))
        question = puzzle.questions[-1]
        accepted = question.accepted
        if task == "instructions":
            accepted = f"{accepted} {self._sign_off}"
        return Turn(
            user=self._surround(question.text, asked.question_at, self._rng.randint(3, 5)),
            answer=question.answer,
            accepted=(accepted,),
            metric=puzzle.metric,
            task=task,
            question_at=asked.question_at,
            about=asked.about,
            probe=True,
        )

    def past(self, *, reserved: int = 0) -> tuple[Turn, ...]:
        """All events in order, as turns of about as many tokens as the dialogue has, but for those reserved."""
        self._room -= reserved
        self._distract()
        self._fill()
        return tuple(self._turns(sorted(self._events, key=lambda event: event.moment)))

    def signed(self, turn: Turn) -> Turn:
        """A probe at the end of the past, where an instruction about all answers may have been told."""
        answer = f"{turn.answer} {self._sign_off}" if self._sign_off else turn.answer
        return replace(turn, answer=answer, accepted=_accepted(turn.metric, turn.accepted[0], answer))

    def _instruct(self, moment: float) -> None:
        if self._sign_off:
            return
        self._sign_off = self._make.names.invented()
        text = self._make.pick(said.TELL_SIGN_OFF, word=self._sign_off)
        self._add(_Event(moment, told=Piece(text, (f"end {self._sign_off}",)), signs_off=True))

    def _add(self, *events: _Event) -> None:
        """Whether there is room for them or not."""
        self._events += events
        self._room -= sum(map(self._cost, events))

    def _distract(self) -> None:
        """Puzzles that are no probes, with the questions of the past, as long as there is room for them."""
        shape, rng, names = self._shape, self._rng, self._make.names
        if rng.random() < shape.sign_off:
            self._instruct(rng.random())
        if rng.random() < shape.unknown and names.num_nouns_left:
            self._add(self._as_said(self._unknown()))
        if rng.random() < shape.greeting:
            text, reply = rng.choice(said.GREETINGS)
            self._add(self._as_said(_Event(rng.random(), question=Question(text, reply, "", 0), task="greeting")))
        room, puzzles = self._room, []
        while room > 0 and names.num_nouns_left >= 4 and names.num_people_left >= 1:
            room -= rng.randint(*shape.tokens_a_puzzle)
            task = rng.choice(shape.tasks)
            if task != "instructions":
                puzzles.append(self._events_of(MAKERS[task](self._make)))
        for events in puzzles:  # only now: what a question stands amid holds no name of any of them
            said_so = [self._as_said(event) for event in events]
            cost = sum(map(self._cost, said_so))
            if cost <= self._room:
                self._events += said_so
                self._room -= cost

    def _events_of(self, puzzle: Puzzle) -> list[_Event]:
        rng, shape = self._rng, self._shape
        moments = self._moments(puzzle, rng.random() ** 0.7)
        events = _tellings(puzzle, moments)
        for question in puzzle.questions:
            again = 1 + (rng.random() < shape.asked_again)
            for _ in range(again if rng.random() < shape.asked else 0):
                events.append(self._asking(puzzle, question, moments))
        return events

    def _moments(self, puzzle: Puzzle, last: float) -> list[float]:
        """When the pieces are told, the last at moment `last`."""
        return [*sorted(self._rng.random() * last for _ in puzzle.pieces[1:]), last]

    def _asking(self, puzzle: Puzzle, question: Question, moments: Sequence[float]) -> _Event:
        rng = self._rng
        begin = moments[question.after - 1]
        end = moments[question.after] if question.after < len(moments) else 1.0
        at = begin + (end - begin) * (rng.random() * 0.999 + 0.001)
        return _Event(at, question=question, task=puzzle.task, metric=puzzle.metric)

    def _unknown(self) -> _Event:
        noun = self._make.names.noun()
        text = self._make.pick(said.ASK_NUMBER, noun=noun)
        question = Question(text, recalled(f"{noun} {said.NOT_GIVEN}"), f"{noun} {said.NOT_GIVEN}", 0)
        return _Event(self._rng.random(), question=question, task="unknown")

    def _as_said(self, event: _Event) -> _Event:
        """The event, its question as the user puts it, some amid other text.

        What nobody told is asked about alone: amid other text, what was told before is what is asked about.
        """
        if event.question is None:
            return event
        text = self._carelessly(event.question.text)
        if event.task not in ("greeting", "unknown") and self._rng.random() < self._shape.surrounded:
            num_sentences = self._rng.randint(1, self._rng.choice((3, 6, 12)))
            text = self._surround(text, self._rng.choice(_PLACES), num_sentences)
        return replace(event, question=replace(event.question, text=text))

    def _fill(self) -> None:
        """Text that no question is about, until even a sentence alone was too long for what is left."""
        most = 6  # sentences
        while most:
            text = self._make.text.message(self._rng.randint(1, most))
            cost = self._count(text) - 2  # most share a message with others
            if cost > self._room:
                most //= 2
                continue
            self._room -= cost
            self._events.append(_Event(self._rng.random(), told=Piece(text)))

    def _surround(self, text: str, place: Place, num_sentences: int) -> str:
        """The question amid other text, on a line of its own. At the begin and in the middle it is not the newest that was read."""
        around = self._make.text.sentences(num_sentences)
        at = {Place.BEGIN: 0, Place.MIDDLE: (len(around) + 1) // 2, Place.END: len(around)}[place]
        between = "\n" if self._split is not Split.TRAIN or self._rng.random() < 0.7 else " "
        return between.join(part for part in (" ".join(around[:at]), text, " ".join(around[at:])) if part)

    def _cost(self, event: _Event) -> int:
        if event.told is not None:
            return self._count(event.told.text) + self._count("; ".join(event.told.notes))
        assert event.question is not None, "an event tells or asks"
        return self._count(event.question.text) + self._count(event.question.answer)

    def _turns(self, events: Sequence[_Event]) -> Iterator[Turn]:
        num_asked = sum(event.question is not None for event in events)
        low, high = self._shape.turns
        wanted = round(math.exp(self._rng.uniform(math.log(low), math.log(high + 1))))
        num_gaps = max(1, len(events) - num_asked)
        cut = min(1.0, max(0.0, (wanted - num_asked) / num_gaps))  # chance that a message ends after a told event
        signed = ""
        pending: list[Piece] = []
        for event in events:
            if event.question is not None:
                yield from self._telling_turn(pending)
                pending = []
                yield _asking_turn(event, signed)
                continue
            assert event.told is not None, "an event tells or asks"
            pending.append(event.told)
            signed = self._sign_off if event.signs_off else signed
            if self._rng.random() < cut:
                yield from self._telling_turn(pending)
                pending = []
        yield from self._telling_turn(pending)

    def _telling_turn(self, pieces: Sequence[Piece]) -> Iterator[Turn]:
        if not pieces:
            return
        between = "\n\n" if self._rng.random() < 0.2 else " "
        text = between.join(piece.text for piece in pieces)
        yield Turn(self._carelessly(text), reply_to(pieces))

    def _carelessly(self, text: str) -> str:
        if self._rng.random() >= self._shape.careless:
            return text
        return (text[0].lower() + text[1:]).rstrip(".?!")
