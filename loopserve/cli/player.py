"""Plays scripted dialogues through the chat layer (hop 4 on), several at once. Knows no terminal and no files.

Each turn brings the whole conversation, the model's own answers included, as a client of the server would. The turns of one
dialogue follow each other; a turn that fails ends its dialogue, and the others go on.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from loopserve.chat import AnswerDelta, AnswerEnded, ChatEvent, ChatRequest
from loopserve.cli.dialogue_file import ScriptedDialogue
from loopserve.dialogue import FinishReason, Message, QualityContract, SamplingParams, SessionId, TurnUsage
from loopserve.errors import EngineUnavailable, LoopServeError


class ChatLike(Protocol):
    """The part of `ChatService` that a replay needs."""

    def stream(self, request: ChatRequest) -> AsyncIterator[tuple[ChatEvent, ...]]:
        """Answer one turn."""


@dataclass(frozen=True, slots=True)
class PlayedTurn:
    """One answered turn. Times are seconds from sending; `right` is None where nothing was expected."""

    number: int  # 1 for the dialogue's first
    answer: str
    right: bool | None
    reason: FinishReason
    first_token_s: float | None
    total_s: float
    usage: TurnUsage


@dataclass(frozen=True, slots=True)
class PlayedDialogue:
    """One dialogue as far as it got; `error` says why it ended early."""

    id: str
    turns: tuple[PlayedTurn, ...]
    error: str | None


@dataclass(frozen=True, slots=True)
class Terms:
    """What every turn of a replay asks for."""

    sampling: SamplingParams
    contract: QualityContract


async def play_all(
    chat: ChatLike,
    dialogues: Sequence[ScriptedDialogue],
    *,
    terms: Terms,
    concurrency: int,
    on_turn: Callable[[], None],
    on_end: Callable[[SessionId, PlayedDialogue], None],
    clock: Callable[[], float] = time.perf_counter,
) -> list[PlayedDialogue]:
    """Play every dialogue, at most `concurrency` at a time, and return them in order. `on_end` comes as each one ends."""
    free = asyncio.Semaphore(concurrency)

    async def play_one(dialogue: ScriptedDialogue) -> PlayedDialogue:
        async with free:
            session_id = SessionId(f"replay-{dialogue.id}")
            played = await _play(chat, dialogue, session_id, terms=terms, on_turn=on_turn, clock=clock)
            on_end(session_id, played)
            return played

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(play_one(dialogue)) for dialogue in dialogues]
    return [task.result() for task in tasks]


async def _play(
    chat: ChatLike,
    dialogue: ScriptedDialogue,
    session_id: SessionId,
    *,
    terms: Terms,
    on_turn: Callable[[], None],
    clock: Callable[[], float],
) -> PlayedDialogue:
    messages = [Message("system", dialogue.system)] if dialogue.system else []
    turns: list[PlayedTurn] = []
    for number, scripted in enumerate(dialogue.turns, start=1):
        messages.append(Message("user", scripted.user))
        request = ChatRequest(
            session_id=session_id,
            messages=tuple(messages),
            sampling=terms.sampling,
            contract=terms.contract,
        )
        try:
            turn = await _take_turn(chat, request, number, is_right=scripted.is_right, clock=clock)
        except LoopServeError as error:
            return PlayedDialogue(dialogue.id, tuple(turns), f"turn {number}: {error.message}")
        turns.append(turn)
        messages.append(Message("assistant", turn.answer))
        on_turn()
    return PlayedDialogue(dialogue.id, tuple(turns), None)


async def _take_turn(
    chat: ChatLike,
    request: ChatRequest,
    number: int,
    *,
    is_right: Callable[[str], bool | None],
    clock: Callable[[], float],
) -> PlayedTurn:
    sent_at = clock()
    first_token_s: float | None = None
    parts: list[str] = []
    async for events in chat.stream(request):
        for event in events:
            if isinstance(event, AnswerDelta):
                first_token_s = clock() - sent_at if first_token_s is None else first_token_s
                parts.append(event.text)
            elif isinstance(event, AnswerEnded):
                if event.error is not None:
                    raise EngineUnavailable(event.error)
                answer = "".join(parts)
                return PlayedTurn(
                    number, answer, is_right(answer), event.reason, first_token_s, clock() - sent_at, event.usage
                )
    raise EngineUnavailable("the answer ended without its last event")
