"""What the engine does with turns that meet: sessions, salts, branches, preemption. No model; every read slot is checked."""

import pytest
from fake_device import Inbox, fake_engine

from loopserve.dialogue import SessionId, TurnRequest
from loopserve.errors import InvalidRequest


def test_session_refuses_another_salt_while_it_lives_and_while_its_first_turn_waits():
    engine, _ = fake_engine()
    mine = TurnRequest(SessionId("s"), (1, 2, 3), cache_salt="mine")
    other = TurnRequest(SessionId("s"), (1, 2, 3), cache_salt="other")
    inbox = Inbox()
    engine.submit(mine, inbox)
    with pytest.raises(InvalidRequest, match="salt"):
        engine.submit(other, inbox)
    while engine.step():
        pass
    with pytest.raises(InvalidRequest, match="salt"):
        engine.submit(other, inbox)
    engine.release(SessionId("s"))
    engine.submit(other, inbox)
