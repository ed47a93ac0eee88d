"""Owns how a made dialogue is told to an engine: a history in a few long turns, then one turn for each question that is still open.

Knows nothing about sparsity or engines; renders text as the shipped model's template does, and checks that it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import dialogues as made
from loopserve.loading import LoadedModel

THIRDS = ("early", "middle", "late")


@dataclass(frozen=True, slots=True)
class Question:
    """A turn that asks for one value."""

    text: str
    value: str
    third: str  # when the fact was told, within the dialogue's facts


@dataclass(frozen=True, slots=True)
class Scenario:
    """A dialogue cut into history turns and questions, in order."""

    name: str
    history: tuple[tuple[int, ...], ...]  # ids of each turn's new tokens, up to where the assistant would speak
    questions: tuple[Question, ...]
    tail: tuple[int, ...]  # the right answer to the last history turn, which the first question follows


@dataclass(frozen=True, slots=True)
class Prompter:
    """Renders messages as the shipped model's template does, one by one."""

    loaded: LoadedModel

    def ids(self, text: str) -> tuple[int, ...]:
        """Token ids of rendered text."""
        return tuple(self.loaded.tokenizer(text, add_special_tokens=False)["input_ids"])

    def message(self, role: str, content: str) -> tuple[int, ...]:
        """A whole message."""
        return self.ids(f"<|{role}|>{content}<|end|>")

    def count(self, content: str) -> int:
        """Tokens of a message as rendered."""
        return len(self.message("user", content))


def make_scenario(dialogue: made.Dialogue, prompter: Prompter, *, history_turns: int) -> Scenario | None:
    """Cut a dialogue before its closing questions; None when it has none. Raises ValueError if the template is another one."""
    _check_template(dialogue, prompter)
    turns = list(dialogue.turns)
    num_late = 0
    while num_late < len(turns) and turns[-1 - num_late].kind == "question":
        num_late += 1
    body, late = turns[: len(turns) - num_late], turns[len(turns) - num_late :]
    if not late or not body:
        return None
    opening = prompter.ids("<|begin|>") + (prompter.message("system", dialogue.system) if dialogue.system else ())
    history: list[tuple[int, ...]] = []
    pending = opening
    for group in _split_evenly(body, history_turns, prompter):
        for turn in group[:-1]:
            pending += prompter.message("user", turn.user) + prompter.message("assistant", turn.answer)
        history.append(pending + prompter.message("user", group[-1].user) + prompter.ids("<|assistant|>"))
        pending = prompter.ids(f"{group[-1].answer}<|end|>")
    told = sorted({turn.facts[0].turn for turn in turns if turn.kind == "statement"})
    questions = tuple(
        Question(turn.user, turn.facts[0].value, THIRDS[told.index(turn.facts[0].turn) * 3 // len(told)])
        for turn in late
    )
    return Scenario(dialogue.name, tuple(history), questions, pending)


def _check_template(dialogue: made.Dialogue, prompter: Prompter) -> None:
    rendered = prompter.loaded.tokenizer.apply_chat_template(dialogue.messages(), tokenize=False)
    ours = "<|begin|>" + "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in dialogue.messages())
    if rendered != ours:
        raise ValueError(f"{prompter.loaded.name} renders messages in another way than the shipped model")


def _split_evenly(turns: Sequence[made.Turn], parts: int, prompter: Prompter) -> list[list[made.Turn]]:
    """Contiguous groups of about the same number of tokens, none empty."""
    costs = [prompter.count(turn.user) + prompter.count(turn.answer) for turn in turns]
    groups: list[list[made.Turn]] = [[] for _ in range(parts)]
    before = 0
    for turn, cost in zip(turns, costs, strict=True):
        groups[min(parts - 1, before * parts // sum(costs))].append(turn)
        before += cost
    return [group for group in groups if group]


def holds_value(answer: str, value: str) -> bool:
    """Whether the answer gives exactly this value as one of its numbers."""
    words = "".join(char if char.isdigit() else " " for char in answer).split()
    return value in words
