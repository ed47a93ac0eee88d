"""Dialogues in JSONL files, one a line, as `loopserve replay` reads them, with what an evaluation needs besides.

    {"id": "d1", "system": "...", "turns": [{"user": "My locker is 4417.", "answer": "Noted."},
                                            {"user": "What is my locker?", "answer": "4417", "value": "4417", "probe": true}]}

A turn is scored where it has `accepted` (a list) or `value` (one answer); the dialogue goes on with `answer`, else the first accepted one.
`metric` (match, f1), `task`, `question_at` (begin, middle, end), `about` (early, middle, late) and `probe` may be absent; other keys are
left alone. Knows no engine.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loopserve.errors import InvalidRequest
from loopserve.evaluation.items import Dialogue, Metric, Place, Third, Turn


class _HasId(Protocol):
    @property
    def id(self) -> str: ...


_Named = TypeVar("_Named", bound=_HasId)


class _TurnLine(BaseModel):
    """A turn as it stands in a file."""

    model_config = ConfigDict(frozen=True)

    user: str
    answer: str | None = None
    value: str | None = None
    accepted: tuple[str, ...] | None = None
    metric: Metric = Metric.MATCH
    task: str | None = None
    question_at: Place | None = None
    about: Third | None = None
    probe: bool = False

    def turn(self, task: str) -> Turn:
        """The turn. Raises ValueError where it could neither be told nor asked."""
        accepted = self.accepted or ((self.value,) if self.value else ())
        if self.answer is None and not accepted:
            raise ValueError("a turn needs an answer to go on with, or accepted ones to be scored by")
        if self.probe and not accepted:
            raise ValueError("a probe needs accepted answers: it is there to be scored")
        return Turn(
            user=self.user,
            answer=self.answer if self.answer is not None else accepted[0],
            accepted=accepted,
            metric=self.metric,
            task=self.task or task,
            question_at=self.question_at,
            about=self.about,
            probe=self.probe,
        )


class _DialogueLine(BaseModel):
    """A line of a file."""

    model_config = ConfigDict(frozen=True)

    id: str = Field(min_length=1)
    turns: tuple[_TurnLine, ...] = Field(min_length=1)
    system: str | None = None
    task: str | None = None


def read_dialogues(path: Path) -> list[Dialogue]:
    """All dialogues of a file, in order; turns without a task are of the file's name. Raises InvalidRequest naming file and line."""
    return read_each(path, lambda line: _dialogue(_DialogueLine.model_validate_json(line), default_task=path.stem))


def read_each(path: Path, parse: Callable[[str], _Named]) -> list[_Named]:
    """What `parse` makes of every line, in order. Raises InvalidRequest naming file and line where it fails, or where an id comes twice."""
    dialogues: dict[str, _Named] = {}
    for number, line in numbered_lines(path):
        try:
            dialogue = parse(line)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            raise InvalidRequest(f"{path}:{number}: {place + ': ' if place else ''}{first['msg']}") from error
        except ValueError as error:
            raise InvalidRequest(f"{path}:{number}: {error}") from error
        if dialogue.id in dialogues:
            raise InvalidRequest(
                f"{path}:{number}: the id {dialogue.id!r} was used before; every dialogue needs its own"
            )
        dialogues[dialogue.id] = dialogue
    if not dialogues:
        raise InvalidRequest(f"{path} holds no dialogue")
    return list(dialogues.values())


def write_dialogues(path: Path, dialogues: Iterable[Dialogue]) -> None:
    """Write dialogues so that `read_dialogues` and `loopserve replay` read them."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(map(line_of, dialogues))


def line_of(dialogue: Dialogue) -> str:
    """The line of a file that holds the dialogue, its end included."""
    line = _DialogueLine(
        id=dialogue.id, system=dialogue.system or None, turns=tuple(_turn_line(turn) for turn in dialogue.turns)
    )
    return json.dumps(line.model_dump(mode="json", exclude_none=True)) + "\n"


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not empty, counted from 1. Raises InvalidRequest where the file cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # a text may hold other ends of line
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} cannot be read: {error}") from error
    return ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


def _dialogue(line: _DialogueLine, *, default_task: str) -> Dialogue:
    return Dialogue(line.id, line.system or "", tuple(turn.turn(line.task or default_task) for turn in line.turns))


def _turn_line(turn: Turn) -> _TurnLine:
    extra: dict[str, Any] = {"accepted": turn.accepted, "metric": turn.metric} if turn.is_scored else {}
    if turn.is_scored and turn.metric is Metric.MATCH:
        extra["value"] = turn.accepted[0]  # what `loopserve replay` looks for
    return _TurnLine(
        user=turn.user,
        answer=turn.answer,
        task=turn.task or None,
        question_at=turn.question_at,
        about=turn.about,
        probe=turn.probe,
        **extra,
    )
