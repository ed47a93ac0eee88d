"""Dialogues in a JSONL file, one a line, and what counts as a right answer. Knows no engine.

    {"id": "d1", "system": "...", "turns": [{"user": "My locker is 4417.", "answer": "Noted."},
                                            {"user": "What is my locker?", "value": "4417"}]}

`system`, `answer` and `value` may be absent or null; other keys are left alone.
"""

import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loopserve.errors import InvalidRequest


class ScriptedTurn(BaseModel):
    """What the user says in one turn, and what is expected back where anything is."""

    model_config = ConfigDict(frozen=True)

    user: str
    answer: str | None = None
    value: str | None = None

    def is_right(self, answer: str) -> bool | None:
        """Whether an answer is right: it holds every word of `value`, else it is `answer`. None where nothing is expected.

        A word counts where it stands alone: 441 is not found in 4417.
        """
        if self.value is not None:
            return all(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer) for word in self.value.split())
        return None if self.answer is None else answer.strip() == self.answer.strip()


class ScriptedDialogue(BaseModel):
    """One conversation to replay."""

    model_config = ConfigDict(frozen=True)

    id: str = Field(min_length=1)
    turns: tuple[ScriptedTurn, ...] = Field(min_length=1)
    system: str | None = None


def read_dialogues(path: Path) -> list[ScriptedDialogue]:
    """All dialogues of a file, in order. Raises InvalidRequest naming file and line; ids must differ."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} cannot be read: {error}") from error
    dialogues: dict[str, ScriptedDialogue] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            dialogue = ScriptedDialogue.model_validate_json(line)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            raise InvalidRequest(f"{path}:{number}: {place + ': ' if place else ''}{first['msg']}") from error
        if dialogue.id in dialogues:
            raise InvalidRequest(
                f"{path}:{number}: the id {dialogue.id!r} was used before; every dialogue needs its own"
            )
        dialogues[dialogue.id] = dialogue
    if not dialogues:
        raise InvalidRequest(f"{path} holds no dialogue")
    return list(dialogues.values())
