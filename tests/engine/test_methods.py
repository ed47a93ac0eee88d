"""Each turn may choose its methods, and a method changes nothing that is not its own."""

import pytest
from fake_device import Inbox, drain, fake_engine, small_config

from loopserve.dialogue import Mode, QualityContract, SamplingParams, SessionId, TurnRequest
from loopserve.errors import InvalidRequest
from loopserve.methods import DECODE_RULES, PREFILL_RULES

ROOMY = {"kv_blocks": 200, "max_running_turns": 8, "max_waiting_turns": 32, "max_sessions": 50}
PROMPT = tuple(index * 7 % 20 for index in range(90))


def request(session: str, *, prompt=PROMPT, mode=Mode.SPARSE, max_tokens=8, **methods) -> TurnRequest:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=1, ignore_eos=True)
    return TurnRequest(SessionId(session), prompt, sampling, QualityContract(mode, **methods))


def test_turns_of_one_batch_go_each_by_their_own_methods():
    engine, device = fake_engine(small_config(**ROOMY))
    asked = {("lines", "streaming"), ("a_shape", "progressive"), ("dense", "first_block"), ("lines", "dense")}
    ids = {
        engine.submit(request("-".join(pair), prefill_method=pair[0], decode_method=pair[1]), Inbox())[0]: pair
        for pair in asked
    }
    drain(engine)
    assert max(len(plan.segments) for plan in device.plans) == 4, "all four decode beside each other"
    for turn_id, (prefill, decode) in ids.items():
        segments = [s for plan in device.plans for s in plan.segments if s.turn_id == turn_id]
        chunks = [s for s in segments if s.sample is None or s.sample.output_index == 0]
        methods = {None if s.prefill is None else s.prefill.method for s in chunks}
        assert methods == {None if prefill == "dense" else prefill}
        captured = {s.capture.decode.method for s in segments if s.capture is not None}
        assert captured == (set() if decode == "dense" else {decode})
        assert all((s.decode is None) is (decode == "dense") for s in segments if s not in chunks)


def test_queries_are_watched_on_as_many_last_chunks_as_hold_the_rows_that_choose():
    engine, device = fake_engine(small_config(**ROOMY))  # 16 rows a chunk, 16 rows choose
    engine.submit(request("s", prompt=PROMPT[:85], decode_method="first_block"), Inbox())
    drain(engine)
    chunks = [s for plan in device.plans for s in plan.segments if s.decode is None]
    assert [s.start for s in chunks if s.capture is not None] == [64, 80]
    assert [s.capture.choose for s in chunks if s.capture is not None] == [False, True]


def test_a_turn_that_names_no_method_gets_the_engines_own():
    engine, device = fake_engine(small_config(**ROOMY))
    engine.submit(request("s"), Inbox())
    drain(engine)
    segments = [s for plan in device.plans for s in plan.segments]
    assert {s.prefill.method for s in segments if s.prefill is not None} == {"lines"}
    assert {s.capture.decode.method for s in segments if s.capture is not None} == {"progressive"}


def test_a_method_that_nobody_knows_is_refused_before_anything_is_accepted():
    engine, _ = fake_engine()
    with pytest.raises(InvalidRequest, match=r"loopserve\.decode_method is 'oracle'; served are .*streaming"):
        engine.submit(request("s", decode_method="oracle"), Inbox())
    assert not engine.step()


@pytest.mark.parametrize("method", sorted(DECODE_RULES))
def test_a_dense_prefill_is_exact_and_shared_whatever_decode_method_reads_it(method: str):
    engine, _ = fake_engine(small_config(**ROOMY))
    inbox = Inbox()
    engine.submit(request("first", prefill_method="dense", decode_method=method), inbox)
    drain(engine)
    (other,) = engine.submit(request("other", mode=Mode.EXACT), inbox)
    drain(engine)
    assert inbox.ended[other].usage.cached_tokens == 80, "every full block of the prompt"


@pytest.mark.parametrize("method", sorted(PREFILL_RULES))
def test_one_phase_alone_is_sparse_where_the_other_is_dense(method: str):
    engine, _ = fake_engine(small_config(**ROOMY))
    inbox = Inbox()
    (turn_id,) = engine.submit(request("s", prefill_method=method, decode_method="dense"), inbox)
    drain(engine)
    quality = inbox.ended[turn_id].usage.quality
    assert quality.kept_tokens == quality.context_tokens
    table = engine._sessions.get(SessionId("s")).branches[0].table
    assert (table.exact_tokens == table.num_tokens) is (method == "dense")


@pytest.mark.parametrize("prefill_method", sorted(PREFILL_RULES))
@pytest.mark.parametrize("decode_method", sorted(DECODE_RULES))
def test_any_pair_of_methods_answers_with_a_real_model(engine, prefill_method: str, decode_method: str):
    eng, inbox, _ = engine("qwen3")
    prompt = tuple(index * 37 % 251 for index in range(150))
    (turn_id,) = eng.submit(
        request("s", prompt=prompt, max_tokens=20, prefill_method=prefill_method, decode_method=decode_method), inbox
    )
    drain(eng)
    quality = inbox.ended[turn_id].usage.quality
    assert len(inbox.ended[turn_id].token_ids) == 20
    assert quality.prefill_cells_computed_share <= 1.0
    assert quality.kept_tokens <= quality.context_tokens
    assert (quality.kept_tokens < quality.context_tokens) is (decode_method != "dense")
