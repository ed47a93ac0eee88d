"""Puts slips into the notes of a training dialogue: left out, or about the wrong word, as the model's own notes sometimes are.

A model that only ever saw right notes answers from them alone, and is wrong wherever its own note was. What bears a slip is not learned;
the questions about it are, so what the user said has to be found again. Pure, seeded.
"""

import random
import re
from dataclasses import replace

from loopserve.evaluation.dialogues.phrases import ACKNOWLEDGED
from loopserve.evaluation.items import Dialogue, Turn

_PART = re.compile(r"(Noted|Changed): (.*?)\.(?= |$)")
_LEFT_OUT, _MISNAMED = 0.3, 0.3  # of the notes of a reply that has slips


def with_slips(rng: random.Random, dialogue: Dialogue, share: float) -> tuple[Dialogue, frozenset[int]]:
    """The dialogue with slips in that share of its notes' turns, and the indices of those turns."""
    noted = [index for index, turn in enumerate(dialogue.turns) if not turn.is_scored and _PART.match(turn.answer)]
    slipped = frozenset(index for index in noted if rng.random() < share)
    turns = [
        replace(turn, answer=_slipped(rng, turn)) if index in slipped else turn
        for index, turn in enumerate(dialogue.turns)
    ]
    return replace(dialogue, turns=tuple(turns)), slipped


def _slipped(rng: random.Random, turn: Turn) -> str:
    parts = []
    for head, listed in _PART.findall(turn.answer):
        notes = [note for note in (_note(rng, note, turn.user) for note in listed.split("; ")) if note]
        if notes:
            parts.append(f"{head}: {'; '.join(notes)}.")
    return " ".join(parts) or ACKNOWLEDGED


def _note(rng: random.Random, note: str, message: str) -> str:
    """A note as it was, or about any word of the message, or nothing."""
    chance = rng.random()
    if chance < _LEFT_OUT:
        return ""
    words = re.findall(r"[A-Za-z]{3,}", message)
    if chance < _LEFT_OUT + _MISNAMED and words and " " in note:
        return f"{rng.choice(words).lower()} {note.split(' ', 1)[1]}"
    return note
