"""The kinds of questions: what is told for each, what is asked later, and the one right answer. Pure; knows nothing about a whole dialogue.

Every answer names what it is about before what it recalls ("On record: locker 4417."): small models copy what follows a name that
stands before them. A chain of two recalls says both.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from loopserve.evaluation.dialogues import phrases as said
from loopserve.evaluation.dialogues.composed import compose, is_composed
from loopserve.evaluation.dialogues.pasted import LooseText
from loopserve.evaluation.dialogues.words import Names, Split, blurred, phrases_of
from loopserve.evaluation.items import Metric


@dataclass(frozen=True, slots=True)
class Piece:
    """Something told: a text, and what the assistant notes of it, if anything."""

    text: str
    notes: tuple[str, ...] = ()
    changes: bool = False  # what was noted before


@dataclass(frozen=True, slots=True)
class Question:
    """Something asked, once all pieces before it have been told; `after` counts them."""

    text: str
    answer: str
    accepted: str
    after: int


@dataclass(frozen=True, slots=True)
class Puzzle:
    """Pieces in the order of telling, and the questions that they answer; the last question is about all of them."""

    task: str
    pieces: tuple[Piece, ...]
    questions: tuple[Question, ...]
    metric: Metric = Metric.MATCH


@dataclass(frozen=True, slots=True)
class Maker:
    """What a task draws from."""

    rng: random.Random
    split: Split
    names: Names
    text: LooseText

    def pick(self, phrases: tuple[str, ...], **slots: str) -> str:
        """One wording of the split, filled in, with a capital. In training half are `composed` and a quarter `blurred`."""
        text = self.rng.choice(phrases_of(phrases, self.split))
        if self.split is Split.TRAIN:
            if is_composed(phrases) and self.rng.random() < 0.5:
                text = compose(self.rng, phrases)
            elif phrases not in _ALL_COUNTS and self.rng.random() < 0.5:
                text = blurred(self.rng, text)
            if self.rng.random() < 0.1:
                text = self.rng.choice(said.LEAD_INS) + (text if text.startswith("I ") else text[0].lower() + text[1:])
        text = text.format(**slots)
        return text[0].upper() + text[1:]

    def code(self) -> str:
        """A number as people use for codes."""
        return self.names.number(self.rng.choice((3, 4, 4, 4, 5, 6)))


_ALL_COUNTS = (said.CORRECT_NUMBER, said.TELL_SIGN_OFF)  # wordings that say what kind of statement it is


def reply_to(pieces: Sequence[Piece]) -> str:
    """What the assistant says to a message of these pieces: all that it notes, what changed after what is new."""
    new = [note for piece in pieces if not piece.changes for note in piece.notes]
    changed = [note for piece in pieces if piece.changes for note in piece.notes]
    said_of = [f"{head}: {'; '.join(notes)}." for head, notes in (("Noted", new), ("Changed", changed)) if notes]
    return " ".join(said_of) or said.ACKNOWLEDGED


def recalled(text: str) -> str:
    """The form of every answer."""
    return f"On record: {text}."


def _facts(make: Maker) -> Puzzle:
    noun, value = make.names.noun(), make.code()
    told = Piece(make.pick(said.TELL_NUMBER, noun=noun, value=value), (f"{noun} {value}",))
    return Puzzle("facts", (told,), (_ask_number(make, noun, value, after=1),))


def _passing(make: Maker) -> Puzzle:
    noun, value = make.names.noun(), make.code()
    amid = make.rng.randint(1, 4)
    varied = make.split is Split.TRAIN  # held-out facts lie amid words in any order, as in every published result
    sentences = make.text.sentences(amid) if varied else [make.text.sentence() for _ in range(amid)]
    sentences.insert(make.rng.randint(0, len(sentences)), make.pick(said.TELL_NUMBER, noun=noun, value=value))
    return Puzzle(
        "passing", (Piece(" ".join(sentences), (f"{noun} {value}",)),), (_ask_number(make, noun, value, after=1),)
    )


def _corrections(make: Maker) -> Puzzle:
    noun, first, second = make.names.noun(), make.code(), make.code()
    pieces = (
        Piece(make.pick(said.TELL_NUMBER, noun=noun, value=first), (f"{noun} {first}",)),
        Piece(make.pick(said.CORRECT_NUMBER, noun=noun, value=second), (f"{noun} {second}",), changes=True),
    )
    questions = (_ask_number(make, noun, first, after=1), _ask_number(make, noun, second, after=2))
    return Puzzle("corrections", pieces, questions)


def _documents(make: Maker) -> Puzzle:
    number = min(make.rng.randint(2, 4), make.names.num_nouns_left)
    facts = [(make.names.noun(), make.names.invented()) for _ in range(number)]
    sentences = [make.rng.choice(said.TITLES) + ":"]
    for noun, value in facts:
        sentences += [make.pick(said.TELL_OWNER, noun=noun, value=value)]
        sentences += [make.text.sentence() for _ in range(make.rng.randint(0, 1))]
    questions = tuple(
        Question(make.pick(said.ASK_OWNER, noun=noun), recalled(f"{noun} {value}"), f"{noun} {value}", after=1)
        for noun, value in make.rng.sample(facts, min(2, number))
    )
    notes = tuple(f"{noun} {value}" for noun, value in facts)
    return Puzzle("documents", (Piece(" ".join(sentences), notes),), questions)


def _multihop(make: Maker) -> Puzzle:
    person, noun, value = make.names.person(), make.names.noun(), make.code()
    pieces = [
        Piece(make.pick(said.TELL_NUMBER, noun=noun, value=value), (f"{noun} {value}",)),
        Piece(make.pick(said.TELL_LINK, noun=noun, person=person), (f"{person} {noun}",)),
    ]
    make.rng.shuffle(pieces)
    asked = Question(
        make.pick(said.ASK_LINK, person=person),
        recalled(f"{person} {noun}, {noun} {value}"),
        f"{person} {noun} {noun} {value}",
        after=2,
    )
    return Puzzle("multihop", tuple(pieces), (asked,))


def _labels(make: Maker) -> Puzzle:
    labels = [make.names.invented() for _ in range(make.rng.randint(2, 3))]
    number = min(make.rng.randint(2, 4), make.names.num_nouns_left)
    label_of = {make.names.noun(): make.rng.choice(labels) for _ in range(number)}
    shown = list(label_of) * 2
    make.rng.shuffle(shown)
    half = len(shown) // 2
    pieces = tuple(
        Piece(
            make.pick(said.TELL_LABELS, examples="; ".join(f"{noun} -> {label_of[noun]}" for noun in part)),
            tuple(dict.fromkeys(f"{noun} {label_of[noun]}" for noun in part)),
        )
        for part in (shown[:half], shown[half:])
        if part
    )
    noun = make.rng.choice(list(label_of))
    asked = Question(
        make.pick(said.ASK_LABEL, noun=noun),
        recalled(f"{noun} {label_of[noun]}"),
        f"{noun} {label_of[noun]}",
        after=len(pieces),
    )
    return Puzzle("labels", pieces, (asked,))


def _lists(make: Maker) -> Puzzle:
    # In training half of the lists have no commas: to go on, any word of the language must then be found again by what it is,
    # not by where it stands; held-out nouns are looked up by the same circuit.
    bare = make.split is Split.TRAIN and make.rng.random() < 0.5
    noun, items = make.names.noun(), make.names.words(make.rng.randint(3, 8 if bare else 5))
    listed = (" " if bare else ", ").join(items)
    told = Piece(make.pick(said.TELL_LIST, noun=noun, items=listed), (f"{noun} {listed}",))
    asked = Question(make.pick(said.ASK_LIST, noun=noun), recalled(f"{noun} {listed}"), f"{noun} {listed}", after=1)
    return Puzzle("lists", (told,), (asked,), Metric.F1)


def _sums(make: Maker) -> Puzzle:
    pairs = [(make.names.noun(), make.rng.randrange(1, 10)) for _ in range(2)]
    pieces = tuple(
        Piece(make.pick(said.TELL_STOCK, noun=noun, value=str(count)), (f"{noun} {count}",)) for noun, count in pairs
    )
    (one, first), (two, second) = make.rng.sample(pairs, 2)
    text = f"{one} {first}, {two} {second}, together {first + second}"
    asked = Question(make.pick(said.ASK_SUM, a=one, b=two), recalled(text), f"together {first + second}", after=2)
    return Puzzle("sums", pieces, (asked,))


def _instructions(make: Maker) -> Puzzle:
    """The instruction itself is the dialogue's (`compose`); what is asked is a fact whose answer must end as instructed."""
    fact = _facts(make)
    return Puzzle("instructions", fact.pieces, fact.questions)


def _ask_number(make: Maker, noun: str, value: str, *, after: int) -> Question:
    return Question(make.pick(said.ASK_NUMBER, noun=noun), recalled(f"{noun} {value}"), f"{noun} {value}", after)


MAKERS: Mapping[str, Callable[[Maker], Puzzle]] = MappingProxyType(
    {
        "facts": _facts,
        "passing": _passing,
        "documents": _documents,
        "corrections": _corrections,
        "multihop": _multihop,
        "labels": _labels,
        "lists": _lists,
        "instructions": _instructions,
        "sums": _sums,
    }
)
TASKS: tuple[str, ...] = tuple(MAKERS)
RECALL_TASKS: tuple[str, ...] = tuple(task for task in TASKS if task != "sums")  # what needs no more than looking back
