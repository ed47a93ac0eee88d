"""Turns in an engine that is stepped on the caller's thread: what each is about, and how it ended. Knows no dialogue and no variant."""

from collections.abc import Iterator
from typing import Generic, TypeVar

from loopserve.dialogue import FinishReason, TurnEnded, TurnEvent, TurnId, TurnRequest
from loopserve.engine import Engine
from loopserve.errors import EngineUnavailable

_About = TypeVar("_About")


class Turns(Generic[_About]):
    """The turns that have not ended, each with what it is about."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._events: list[TurnEvent] = []
        self._open: dict[TurnId, tuple[str, _About]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def submit(self, request: TurnRequest, about: _About, *, dialogue: str) -> None:
        """One more turn; `dialogue` is how an error names it."""
        (turn_id,) = self._engine.submit(request, self._events.extend)
        self._open[turn_id] = dialogue, about

    def step(self) -> Iterator[tuple[_About, TurnEnded]]:
        """Step the engine once where turns are open; those that ended. Raises EngineUnavailable where one failed, or none can end."""
        if self._open and not self._engine.step() and not self._events:
            raise EngineUnavailable("the engine has nothing to compute, but turns have not ended")
        events = [event for event in self._events if isinstance(event, TurnEnded)]
        self._events.clear()
        for ended in events:
            dialogue, about = self._open.pop(ended.turn_id)
            if ended.reason in (FinishReason.ERROR, FinishReason.CANCELLED):
                raise EngineUnavailable(f"dialogue {dialogue}: {ended.error or ended.reason}")
            yield about, ended
