"""What was answered, on disk: one line for each answer, written at once, so that a run that is broken off goes on where it stopped.

    DIR/manifest.json   what the run is about, and every time it was started
    DIR/answers.jsonl   an `Answer` a line

Owns both files. Knows nothing of how answers come about.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self, TextIO

from loopserve.errors import InvalidRequest

MANIFEST, ANSWERS = "manifest.json", "answers.jsonl"

Key = tuple[str, int, str]  # dialogue, turn, variant: what one answer is about


@dataclass(frozen=True, slots=True)
class Answer:
    """One scored turn under one variant. Coverage is None where nothing was measured."""

    dialogue: str
    turn: int  # its index in the dialogue
    variant: str
    task: str
    question_at: str | None
    about: str | None
    score: float  # 0 to 1
    text: str
    answer_tokens: int
    is_cut_off: bool  # at the limit of its length
    prompt_tokens: int
    past_tokens: int  # of the prompt: told before, the same for every variant
    cached_tokens: int  # of those, what did not have to be computed again
    kv_share: float | None  # read in decode over what dense decode would have read; None: nothing was decoded
    coverage: float | None  # mean, of the question's own turn
    cells_share: float  # of the causal cells of the question's rows, computed in prefill
    past_coverage: float | None  # as the past was told
    past_cells_share: float
    budget_tokens: int | None  # asked for
    dense_fallbacks: int

    @property
    def key(self) -> Key:
        """What it is about."""
        return self.dialogue, self.turn, self.variant


class AnswerLog:
    """The answers of one run, those of before included."""

    def __init__(self, directory: Path, answers: list[Answer]) -> None:
        self.answers = answers
        self._path = directory / ANSWERS
        self._file: TextIO | None = None

    @classmethod
    def open(cls, directory: Path, settings: Mapping[str, Any], *, start: Mapping[str, Any]) -> Self:
        """Begin a run, or go on with one of the same settings. `start` is noted with this start.

        Raises InvalidRequest where the directory holds a run of other settings, or cannot be written.
        """
        digest = _digest(settings)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            before = _read_manifest(directory)
            if before is not None and before["digest"] != digest:
                raise InvalidRequest(
                    f"{directory} holds a run of other settings ({_difference(before['settings'], settings)}); "
                    "name another --out, or remove it",
                    param="out",
                )
            starts = [*(before["starts"] if before else []), dict(start)]
            manifest = {"digest": digest, "settings": settings, "starts": starts}
            (directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
            return cls(directory, _read_answers(directory))
        except OSError as error:
            raise InvalidRequest(f"{directory} cannot be used: {error}", param="out") from error

    @classmethod
    def read(cls, directory: Path) -> tuple[Self, dict[str, Any]]:
        """A run as it stands, and its manifest. Raises InvalidRequest where there is none."""
        manifest = _read_manifest(directory)
        if manifest is None:
            raise InvalidRequest(f"{directory} holds no run of `loopserve eval`", param="out")
        return cls(directory, _read_answers(directory)), manifest

    def __enter__(self) -> Self:
        cut_broken_line(self._path)
        self._file = self._path.open("a", encoding="utf-8", buffering=1)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def add(self, answer: Answer) -> None:
        """Keep an answer, on disk at once."""
        assert self._file is not None, "answers are added to an open log"
        self._file.write(json.dumps(asdict(answer), ensure_ascii=False) + "\n")
        self.answers.append(answer)


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The settings that differ, by name; values are often long."""
    names = [name for name in sorted({*before, *now}) if before.get(name) != json.loads(json.dumps(now.get(name)))]
    return ", ".join(names) or "an older form of the same"


def _read_manifest(directory: Path) -> dict[str, Any] | None:
    path = directory / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path} cannot be read: {error}", param="out") from error
    if not isinstance(manifest, dict) or not {"digest", "settings", "starts"} <= manifest.keys():
        raise InvalidRequest(f"{path} is no manifest of `loopserve eval`", param="out")
    return manifest


def _read_answers(directory: Path) -> list[Answer]:
    """The answers on disk, each once. A last line that was not written to its end is left out."""
    path = directory / ANSWERS
    if not path.exists():
        return []
    answers: dict[Key, Answer] = {}
    for number, line in _whole_lines(path):
        try:
            answer = Answer(**json.loads(line))
        except (ValueError, TypeError) as error:
            names = ", ".join(each.name for each in fields(Answer))
            raise InvalidRequest(
                f"{path}:{number} is no answer ({error}); its fields are {names}", param="out"
            ) from error
        answers[answer.key] = answer
    return list(answers.values())


def _whole_lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith("\n"):
                yield number, line


def cut_broken_line(path: Path) -> None:
    """Take away what follows the last line's end: it was being written when the run was broken off."""
    if not path.exists():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        path.write_bytes(content[: content.rfind(b"\n") + 1])
