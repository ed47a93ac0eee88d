"""A session that moves to another engine goes on there as if it had stayed: same tokens, same reuse; nothing else is taken for one."""

from dataclasses import replace

import pytest
from fake_device import Clock, Inbox, drain, fake_engine, small_config
from test_tiers import DECODE, Dialogues, random_ids

from loopserve.dialogue import Mode, QualityContract, SamplingParams, SessionId, TurnRequest
from loopserve.errors import InvalidRequest, NotFound, Overloaded
from loopserve.kv.cache import Tier
from loopserve.kv.image import ImageRefused, Refusal


def moved(source, target, session: str = "a"):
    return target.import_session(source.export_session(SessionId(session)))


@pytest.mark.parametrize("mode", [Mode.SPARSE, Mode.EXACT])
@pytest.mark.parametrize(("before", "after"), [((0, 1.0), (0, 1.0)), ((200, 0.0), (0, 1.0)), ((0, 1.0), (200, 0.0))])
def test_the_next_turn_is_the_one_that_the_old_engine_would_have_answered(engine, mode, before, after):
    runs = []
    for hand_over in (False, True):
        (host_blocks, ratio), dialogues = before, None
        eng, inbox, _ = engine(decode=DECODE, host_blocks=host_blocks, compact_above_ratio=ratio)
        dialogues = Dialogues(eng, inbox, mode=mode)
        dialogues.turn({"a": 100, "b": 50}, seed=1)
        dialogues.turn({"a": 30}, seed=2)
        if hand_over:
            host_blocks, ratio = after
            other, inbox, _ = engine(decode=DECODE, host_blocks=host_blocks, compact_above_ratio=ratio)
            imported = moved(eng, other)
            assert imported.session_id == "a" and imported.num_tokens == 100 + 20 + 30 + 19
            assert imported.num_bytes == 11 * other._porter.fmt.block_bytes
            dialogues.eng, dialogues.inbox = other, inbox
        dialogues.turn({"a": 25}, seed=3)
        runs.append((dialogues.answers, list(inbox.ended.values())[-1].usage))
    assert runs[0] == runs[1], "another answer, or another account of what was reused"


def test_what_the_other_engine_has_already_is_not_brought_again(engine):
    source, inbox, _ = engine()
    target, other_inbox, _ = engine()
    opening = random_ids(64, 1)
    for eng, box, session in ((source, inbox, "a"), (target, other_inbox, "b")):
        request = TurnRequest(
            SessionId(session),
            (*opening, *random_ids(20, 2)),
            SamplingParams(max_tokens=4),
            QualityContract(Mode.EXACT),
        )
        eng.submit(request, box)
        drain(eng)
    assert moved(source, target).num_bytes == 1 * target._porter.fmt.block_bytes, "all but the part block were there"
    target.check()
    assert target.occupancy().shared + target.occupancy(Tier.HOST).shared == 5


def test_branches_move_together_and_share_as_before(engine):
    source, inbox, _ = engine(decode=DECODE)
    request = TurnRequest(
        SessionId("a"),
        tuple(random_ids(100, 1)),
        SamplingParams(max_tokens=20, seed=1),
        QualityContract(Mode.SPARSE),
        3,
    )
    turn_ids = source.submit(request, inbox)
    drain(source)
    target, other_inbox, _ = engine(decode=DECODE)
    moved(source, target)
    target.check()
    info = target.session(SessionId("a"))
    assert (info.num_branches, info.num_turns) == (3, 1)
    assert info.num_kv_bytes == source.session(SessionId("a")).num_kv_bytes
    history = (*request.prompt_ids, *inbox.ended[turn_ids[1]].token_ids)
    (next_turn,) = target.submit(replace(request, prompt_ids=(*history, 5, 6), num_branches=1), other_inbox)
    drain(target)
    assert other_inbox.ended[next_turn].usage.cached_tokens == 100, "and the answer is rectified"


def test_only_idle_sessions_move_and_only_to_where_none_of_theirs_runs():
    source, _ = fake_engine()
    target, device = fake_engine()
    device.parcels = source._runner.parcels
    with pytest.raises(NotFound):
        source.export_session(SessionId("a"))
    request = TurnRequest(SessionId("a"), tuple(range(20)), SamplingParams(max_tokens=3, seed=1))
    source.submit(request, Inbox())
    with pytest.raises(Overloaded, match="running or waits"):
        source.export_session(SessionId("a"))
    drain(source)
    data = source.export_session(SessionId("a"))
    target.submit(request, Inbox())
    with pytest.raises(Overloaded, match="running or waits"):
        target.import_session(data)
    drain(target)
    target.import_session(data)
    other, device = fake_engine()
    device.parcels = source._runner.parcels
    other.submit(replace(request, cache_salt="tenant"), Inbox())
    drain(other)
    with pytest.raises(InvalidRequest, match="another cache salt"):
        other.import_session(data)


def test_an_image_of_another_model_or_with_a_flipped_bit_is_refused(engine):
    source, inbox, _ = engine("llama")
    Dialogues(source, inbox).turn({"a": 40}, seed=1)
    data = source.export_session(SessionId("a"))
    foreign, _, _ = engine("qwen3")
    with pytest.raises(ImageRefused) as refused:
        foreign.import_session(data)
    assert refused.value.reason is Refusal.FOREIGN
    target, _, _ = engine("llama")
    for place in (len(data) // 3, len(data) // 2, len(data) - 40):
        damaged = bytearray(data)
        damaged[place] ^= 1
        with pytest.raises(ImageRefused):
            target.import_session(bytes(damaged))
    assert target.sessions() == ()


def test_a_session_for_which_there_is_no_room_is_refused_and_older_ones_give_way_in_host_memory():
    clock = Clock()
    source, _ = fake_engine(small_config(kv_blocks=40), clock=clock)
    target, device = fake_engine(small_config(kv_blocks=3, host_blocks=8), clock=clock)
    device.parcels = source._runner.parcels
    for seed, session in enumerate("abc"):
        clock.now_s += 1.0
        prompt = tuple((seed + i * 7) % 23 for i in range(70))
        source.submit(TurnRequest(SessionId(session), prompt, SamplingParams(max_tokens=1, seed=1)), Inbox())
        drain(source)
        moved(source, target, session)
        target.check()
    assert {info.session_id: info.num_cached_tokens for info in target.sessions()} == {"a": 0, "b": 70, "c": 70}
    source.submit(TurnRequest(SessionId("d"), tuple(i % 23 for i in range(250)), SamplingParams(max_tokens=1)), Inbox())
    drain(source)
    with pytest.raises(Overloaded, match="no room"):
        moved(source, target, "d")
    target.check()
    assert all(info.session_id != "d" for info in target.sessions())


def test_with_a_running_thread_sessions_move_between_steps(engine):
    source, inbox, _ = engine()
    target, _, _ = engine()
    Dialogues(source, inbox).turn({"a": 60}, seed=1)
    source.start()
    target.start()
    try:
        assert moved(source, target).num_tokens > 0
    finally:
        source.stop()
        target.stop()
