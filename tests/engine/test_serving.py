"""What the engine does with turns that meet: sessions, salts, branches, preemption. No model; every read slot is checked."""

from dataclasses import replace

import pytest
from fake_device import Inbox, StatsLog, drain, fake_engine, small_config

from loopserve.dialogue import FinishReason, Mode, QualityContract, SamplingParams, SessionId, TurnRequest
from loopserve.errors import InvalidRequest, NotFound


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


def answer(engine, inbox, session: str, prompt, *, contract=QualityContract(), num_branches=1, **sampling):
    """Submit, drain, and what came of each branch."""
    params = SamplingParams(**({"max_tokens": 5, "seed": 1, "ignore_eos": True} | sampling))
    turn_ids = engine.submit(TurnRequest(SessionId(session), tuple(prompt), params, contract, num_branches), inbox)
    drain(engine)
    ends = [inbox.ended[turn_id] for turn_id in turn_ids]
    return ends[0] if num_branches == 1 else ends


def test_continuing_one_of_several_short_answers_leaves_the_others_as_they_were():
    engine, _ = fake_engine(small_config(kv_blocks=64))
    inbox = Inbox()
    prompt = list(range(20))
    answers = [list(end.token_ids) for end in answer(engine, inbox, "s", prompt, num_branches=3)]
    assert len({tuple(a) for a in answers}) == 3
    histories = []
    for index, chosen in enumerate(answers):
        end = answer(engine, inbox, "s", [*prompt, *chosen, 7, 8], seed=index)
        assert end.usage.cached_tokens == len(prompt) + len(chosen) - 1
        histories.append([*prompt, *chosen, 7, 8, *end.token_ids])
    assert sorted(b.token_ids for b in engine._sessions.get(SessionId("s")).branches) == sorted(histories)
    assert engine.session(SessionId("s")).num_branches == 3
    engine.check()


def test_preempted_sparse_answer_has_nothing_left_to_rectify_before_its_preemption():
    # The resumed turn prefills what it had decoded sparsely, so only what came after is computed again with the next prompt.
    engine, _ = fake_engine(small_config(kv_blocks=64))
    inbox, contract = Inbox(), QualityContract(mode=Mode.SPARSE)
    params = SamplingParams(max_tokens=20, seed=1, ignore_eos=True)
    (turn_id,) = engine.submit(TurnRequest(SessionId("s"), tuple(range(20)), params, contract), inbox)
    while len(inbox.tokens.get(turn_id, ())) < 8:
        engine.step()
    engine._scheduler._preempt(next(engine._scheduler.turns()))
    drain(engine)
    history = [*range(20), *inbox.ended[turn_id].token_ids]
    usage = answer(engine, inbox, "s", [*history, 3], contract=contract).usage
    assert (usage.cached_tokens, usage.quality.rectified_tokens) == (28, 11)


def test_releasing_a_session_ends_its_first_turn_while_that_still_waits():
    engine, _ = fake_engine()
    inbox = Inbox()
    engine.submit(TurnRequest(SessionId("s"), (1, 2, 3)), inbox)
    engine.release(SessionId("s"))
    assert [ended.reason for ended in inbox.ended.values()] == [FinishReason.CANCELLED]
    with pytest.raises(NotFound):
        engine.release(SessionId("s"))
