"""Drives dialogues through an engine on the caller's thread: all at once, each its next turn when its last has ended.

Owns the order of turns. Knows nothing about what is asked or measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from loopserve.dialogue import TurnEnded, TurnEvent, TurnRequest
from loopserve.engine import Engine


class Script(Protocol):
    """One side of a dialogue: the user's."""

    def next_request(self) -> TurnRequest | None:
        """The next turn; None when the dialogue is over."""

    def turn_ended(self, ended: TurnEnded) -> None:
        """What the engine answered to the turn before."""


def drive(engine: Engine, scripts: Sequence[Script]) -> None:
    """Go through all dialogues to their ends. Raises RuntimeError when a turn fails or the engine stops short."""
    users = [_User(engine, script) for script in scripts]
    while True:
        for user in users:
            if user.error is not None:  # a listener's exception would end in the engine's log
                raise RuntimeError(user.error)
            user.go_on()
        if all(user.is_done for user in users):
            return
        if not engine.step() and not any(user.may_go_on for user in users):
            raise RuntimeError("The engine has nothing to compute, but turns have not ended.")


class _User:
    def __init__(self, engine: Engine, script: Script) -> None:
        self._engine = engine
        self._script = script
        self.may_go_on = True
        self.is_done = False
        self.error: str | None = None

    def go_on(self) -> None:
        """Submit the next turn if the last has ended."""
        if not self.may_go_on or self.is_done:
            return
        request = self._script.next_request()
        self.may_go_on = False
        if request is None:
            self.is_done = True
        else:
            self._engine.submit(request, self._on_events)

    def _on_events(self, events: Sequence[TurnEvent]) -> None:
        for event in events:
            if isinstance(event, TurnEnded):
                self.error = event.error
                self._script.turn_ended(event)
                self.may_go_on = True
