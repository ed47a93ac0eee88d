"""What the engine does with turns that meet: sessions, salts, branches, preemption. No model; every read slot is checked."""

from dataclasses import replace

import pytest
from fake_device import Inbox, StatsLog, drain, fake_engine, small_config

from loopserve.dialogue import Mode, QualityContract, SamplingParams, SessionId, TurnRequest
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


def test_preempted_sparse_turn_resumes_whatever_its_length_was():
    # The resumed prefill ends in a chunk of a single row for one of these lengths: it is a prefill all the same, and keeps its queries.
    for prompt_len in range(20, 36):
        engine, _ = fake_engine(small_config(kv_blocks=7))
        inbox, stats = Inbox(), StatsLog()
        engine._stats = stats
        sampling = SamplingParams(max_tokens=60, seed=1, ignore_eos=True)
        older = TurnRequest(SessionId("older"), tuple(range(20)), sampling, QualityContract(mode=Mode.EXACT))
        newer = TurnRequest(SessionId("newer"), (9,) * prompt_len, replace(sampling, max_tokens=40))
        newer = replace(newer, contract=QualityContract(mode=Mode.SPARSE))
        (engine.submit(older, inbox), engine.submit(newer, inbox))
        drain(engine)
        assert any(turn.num_preemptions for turn in stats.turns)
        assert all(len(ended.token_ids) in (60, 40) for ended in inbox.ended.values())
