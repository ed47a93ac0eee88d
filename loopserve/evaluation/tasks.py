"""What is asked: names on the command line to dialogues. Knows the sources by name and nothing of engines.

passing, corrections, ...   made dialogues (`dialogues/`)
FILE.jsonl                  dialogues on disk (`loaders.py`)
multiturn[:...], scbench:.. public sets (`public_sets.py`)
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loopserve.errors import InvalidRequest
from loopserve.evaluation.dialogues import TASKS, Split, make_dialogues
from loopserve.evaluation.items import Dialogue
from loopserve.evaluation.loaders import read_dialogues
from loopserve.evaluation.public_sets import PUBLIC_SETS, load_public

ASKS = ("probes", "all")
OWN = "own"
PASTS = {"reference": "the reference answers", OWN: "the model's own answers"}  # what a past may hold, in words
SPLITS = (Split.VALIDATION, Split.TEST)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which dialogues, as asked for. `tokens` and `split` are of the made ones.

    `ask`: "probes" asks the probes of a dialogue that has any, so that all of them meet its whole past, and tells its other turns;
    "all" asks every scored turn. `past`: "reference" tells a dialogue with its reference answers, "own" with those that the model gives
    when it is told turn by turn, densely.
    """

    tasks: tuple[str, ...]
    num: int = 400  # made dialogues, and at most so many of every other source
    tokens: int = 2048
    seed: int = 1
    split: str = Split.VALIDATION
    ask: str = ASKS[0]
    past: str = next(iter(PASTS))

    def __post_init__(self) -> None:
        if not self.tasks:
            raise InvalidRequest(f"no task is named; known: {choices()}", param="tasks")
        if self.split not in SPLITS:
            raise InvalidRequest(f"there is no split {self.split!r}; known: {', '.join(SPLITS)}", param="split")
        if self.ask not in ASKS:
            raise InvalidRequest(f"--ask {self.ask!r} is unknown; known: {', '.join(ASKS)}", param="ask")
        if self.past not in PASTS:
            raise InvalidRequest(f"--past {self.past!r} is unknown; known: {', '.join(PASTS)}", param="past")
        for task in self.tasks:
            if not (task in TASKS or _is_public(task) or _is_file(task)):
                raise InvalidRequest(f"there is no task {task!r}; known: {choices()}", param="tasks")

    @property
    def made(self) -> tuple[str, ...]:
        """The built-in tasks among them."""
        return tuple(task for task in self.tasks if task in TASKS)


def load_given(wanted: Wanted) -> list[Dialogue]:
    """The dialogues that need no tokenizer: files and public sets, in the order named. Raises InvalidRequest."""
    dialogues: list[Dialogue] = []
    for task in wanted.tasks:
        if _is_public(task):
            dialogues += load_public(task, num=wanted.num)
        elif task not in TASKS:
            dialogues += read_dialogues(Path(task))[: wanted.num]
    return dialogues


def load_made(wanted: Wanted, count_tokens: Callable[[str], int]) -> list[Dialogue]:
    """The made dialogues; `count_tokens` counts one message, markers included."""
    if not wanted.made:
        return []
    return list(
        make_dialogues(
            wanted.made,
            split=Split(wanted.split),
            num=wanted.num,
            tokens=wanted.tokens,
            seed=wanted.seed,
            count_tokens=count_tokens,
        )
    )


def as_asked(dialogue: Dialogue, wanted: Wanted) -> Dialogue:
    """The dialogue with those turns scored that are to be asked."""
    if wanted.ask == "all" or not any(turn.probe for turn in dialogue.turns):
        return dialogue
    return replace(dialogue, turns=tuple(t if t.probe else replace(t, accepted=()) for t in dialogue.turns))


def check_dialogues(dialogues: Sequence[Dialogue]) -> None:
    """Raise InvalidRequest where ids are not distinct or nothing is asked."""
    seen: set[str] = set()
    for dialogue in dialogues:
        if dialogue.id in seen:
            raise InvalidRequest(f"the id {dialogue.id!r} comes twice; every dialogue needs its own", param="tasks")
        seen.add(dialogue.id)
    if not any(turn.is_scored for dialogue in dialogues for turn in dialogue.turns):
        raise InvalidRequest("no turn of these dialogues is scored: give some a value", param="tasks")


def dialogues_digest(dialogues: Sequence[Dialogue]) -> str:
    """A name for exactly these dialogues: a run goes on with no others."""
    digest = hashlib.blake2b(digest_size=16)
    for dialogue in dialogues:
        digest.update(repr(dialogue).encode())
    return digest.hexdigest()


def choices() -> str:
    """Every task that can be named."""
    return f"{', '.join(TASKS)}, a .jsonl file, {', '.join(f'{name}:...' for name in PUBLIC_SETS)}"


def _is_public(task: str) -> bool:
    return task.partition(":")[0] in PUBLIC_SETS


def _is_file(task: str) -> bool:
    return task.endswith(".jsonl") or Path(task).is_file()
