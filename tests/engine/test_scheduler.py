"""Who computes what in a step: chunks, order, siblings, limits. Over a fake device that checks every plan."""

import pytest
from fake_device import Clock, Inbox, StatsLog, drain, fake_engine, small_config

from loopserve.dialogue import FinishReason, Mode, QualityContract, SamplingParams, SessionId, TurnRequest
from loopserve.errors import Overloaded
from loopserve.plan import StepPlan
from loopserve.stats import TokenGap
from loopserve.turn import Turn

ROOMY = {"kv_blocks": 200, "max_running_turns": 8, "max_waiting_turns": 32, "max_sessions": 50, "max_branches": 8}


def request(
    name: str, prompt_len: int, *, max_tokens: int = 4, mode=Mode.AUTO, num_branches: int = 1, budget_tokens=None
) -> TurnRequest:
    prompt = tuple((index * 7 + len(name)) % 20 for index in range(prompt_len))
    sampling = SamplingParams(max_tokens=max_tokens, seed=1, ignore_eos=True)
    return TurnRequest(SessionId(name), prompt, sampling, QualityContract(mode, None, budget_tokens), num_branches)


def segments_of(plans: list[StepPlan], turn_id) -> list:
    return [segment for plan in plans for segment in plan.segments if segment.turn_id == turn_id]


def chunks_of(plans: list[StepPlan], turn_id) -> list[tuple]:
    """Start, length and line selection of each prefill chunk."""
    segments = segments_of(plans, turn_id)
    return [(s.start, len(s.token_ids), s.prefill) for s in segments if s.sample is None or s.sample.output_index == 0]


@pytest.mark.parametrize("mode", [Mode.SPARSE, Mode.EXACT])
def test_chunks_are_the_same_whatever_the_load(mode):
    def chunks(num_others: int) -> tuple[list, int]:
        engine, device = fake_engine(small_config(**ROOMY))
        for index in range(num_others):
            engine.submit(request(f"other{index}", 11 + 9 * index, max_tokens=30), Inbox())
        engine.step()
        (turn_id,) = engine.submit(request("s", 75, mode=mode), Inbox())
        drain(engine)
        segments = segments_of(device.plans, turn_id)
        steps = [plan.step_index for plan in device.plans if any(s in plan.segments for s in segments[:5])]
        return chunks_of(device.plans, turn_id), steps[-1] - steps[0]

    alone, steps_alone = chunks(0)
    beside, steps_beside = chunks(6)
    assert [(start, length) for start, length, _ in alone] == [(0, 16), (16, 16), (32, 16), (48, 16), (64, 11)]
    assert alone == beside
    assert (alone[0][2] is not None) is (mode is Mode.SPARSE)
    assert steps_beside >= steps_alone == 4


def test_chunks_are_counted_from_the_first_token_that_is_not_cached():
    engine, device = fake_engine(small_config(**ROOMY))
    inbox = Inbox()
    (first,) = engine.submit(request("s", 20), inbox)
    drain(engine)
    history = request("s", 20).prompt_ids + inbox.ended[first].token_ids
    (second,) = engine.submit(TurnRequest(SessionId("s"), history + (3,) * 40, SamplingParams(max_tokens=1)), inbox)
    drain(engine)
    assert [(start, length) for start, length, _ in chunks_of(device.plans, second)] == [(23, 16), (39, 16), (55, 9)]


def test_older_turns_are_served_first_and_no_shorter_one_overtakes():
    engine, device = fake_engine(small_config(**ROOMY))  # 48 prefill rows a step, 16 a chunk
    ids = [engine.submit(request(name, 40), Inbox())[0] for name in ("a", "b", "c", "d")]
    short = engine.submit(request("short", 2), Inbox())[0]
    drain(engine)
    first_steps = [next(p.step_index for p in device.plans if segments_of([p], i)) for i in (*ids, short)]
    assert first_steps == sorted(first_steps)
    assert [s.turn_id for s in device.plans[0].segments] == ids[:3]
    for plan in device.plans:
        rows = sum(len(s.token_ids) for s in plan.segments if s.sample is None or s.sample.output_index == 0)
        assert rows <= 48


def test_siblings_wait_for_the_leaders_prompt_and_share_it():
    engine, device = fake_engine(small_config(**ROOMY))
    inbox = Inbox()
    leader, *siblings = engine.submit(request("s", 50, num_branches=3), inbox)
    later = engine.submit(request("later", 5), inbox)[0]
    drain(engine)
    assert [start for start, _, _ in chunks_of(device.plans, leader)] == [0, 16, 32, 48]
    for sibling in siblings:
        assert [(start, length) for start, length, _ in chunks_of(device.plans, sibling)] == [(49, 1)]
        assert inbox.ended[sibling].usage.cached_tokens == 49
    first_step = {
        i: next(p.step_index for p in device.plans if segments_of([p], i)) for i in (leader, *siblings, later)
    }
    assert first_step[siblings[0]] == first_step[siblings[1]] == first_step[leader] + 4
    assert first_step[later] == first_step[leader], "who waits for a leader holds up nobody"


def test_siblings_of_a_cancelled_leader_go_on_without_it():
    engine, _ = fake_engine(small_config(**ROOMY))
    inbox = Inbox()
    leader, *siblings = engine.submit(request("s", 50, num_branches=3), inbox)
    engine.step()
    engine.cancel(leader)
    drain(engine)
    assert inbox.ended[leader].reason is FinishReason.CANCELLED
    assert [inbox.ended[i].reason for i in siblings] == [FinishReason.LENGTH] * 2


def test_newest_turn_gives_way_and_the_oldest_never_does():
    log = StatsLog()
    engine, device = fake_engine(small_config(kv_blocks=9), stats=log)
    inbox = Inbox()
    ids = [engine.submit(request(name, 20, max_tokens=60), inbox)[0] for name in ("oldest", "middle", "newest")]
    drain(engine)
    by_session = {turn.session_id: turn.num_preemptions for turn in log.turns}
    assert by_session["oldest"] == 0 < by_session["newest"]
    assert [turn.session_id for turn in log.turns] == ["oldest", "middle", "newest"]
    assert len(segments_of(device.plans, ids[0])) == 2 + 59, "the oldest advances in every step"


def test_idle_sessions_give_up_their_blocks_before_a_running_turn_does_least_recently_used_first():
    clock, log = Clock(), StatsLog()
    engine, _ = fake_engine(small_config(kv_blocks=9), stats=log, clock=clock)
    for name in ("first", "second", "third"):
        clock.now_s += 1.0
        engine.submit(request(name, 20), Inbox())
        drain(engine)
    engine.submit(request("big", 70), Inbox())
    drain(engine)
    cached = {info.session_id: info.num_cached_tokens for info in engine.sessions()}
    assert (cached["first"], cached["second"]) == (0, 0)
    assert cached["third"] > 0
    assert {info.num_tokens for info in engine.sessions()} == {24, 74}, "histories stay"
    assert all(turn.num_preemptions == 0 for turn in log.turns)


def test_turn_that_does_not_fit_waits_until_another_ends():
    engine, _ = fake_engine(small_config(kv_blocks=9))
    inbox = Inbox()
    (first,) = engine.submit(request("first", 60, max_tokens=10), inbox)
    (second,) = engine.submit(request("second", 60, max_tokens=10), inbox)
    while first not in inbox.ended:
        engine.step()
        assert second not in inbox.tokens
    drain(engine)
    assert inbox.ended[second].reason is FinishReason.LENGTH


def test_no_more_turns_run_or_wait_than_configured():
    engine, device = fake_engine(small_config(**(ROOMY | {"max_running_turns": 2, "max_waiting_turns": 4})))
    inbox = Inbox()
    for index in range(4):
        engine.submit(request(f"s{index}", 5), inbox)
    with pytest.raises(Overloaded, match="4 turns are waiting and the queue takes 4"):
        engine.submit(request("late", 5), inbox)
    drain(engine)
    assert max(len(plan.segments) for plan in device.plans) == 2
    assert len(inbox.ended) == 4


def test_waiting_turn_expires_with_an_error_and_a_preempted_one_does_not():
    clock = Clock()
    engine, _ = fake_engine(small_config(kv_blocks=9, max_running_turns=2, max_queue_s=10.0), clock=clock)
    inbox = Inbox()
    older, newer = (engine.submit(request(name, 30, max_tokens=60), inbox)[0] for name in ("older", "newer"))
    waiting = engine.submit(request("waiting", 5), inbox)[0]
    engine.step()
    while engine._scheduler.num_waiting < 2:
        engine.step()
    clock.now_s = 11.0
    engine.step()
    assert inbox.ended[waiting].reason is FinishReason.ERROR
    assert "waited 10 s" in inbox.ended[waiting].error
    drain(engine)
    assert [inbox.ended[i].reason for i in (older, newer)] == [FinishReason.LENGTH] * 2


def test_turn_ends_at_the_sessions_limit_with_the_whole_pool():
    engine, _ = fake_engine(small_config(kv_blocks=6))
    inbox = Inbox()
    assert engine.max_session_tokens == 80
    (turn_id,) = engine.submit(request("s", 30, max_tokens=50), inbox)
    drain(engine)
    assert len(inbox.ended[turn_id].token_ids) == 50


def test_budget_set_while_a_turn_decodes_is_followed_at_its_next_refresh():
    engine, device = fake_engine(small_config(**ROOMY))
    (turn_id,) = engine.submit(request("s", 40, mode=Mode.SPARSE, max_tokens=12), Inbox())
    while len(segments_of(device.plans, turn_id)) < 4:
        engine.step()
    engine.set_budget(3)
    drain(engine)
    decodes = [s.decode for s in segments_of(device.plans, turn_id) if s.decode is not None]
    assert [d.choose for d in decodes] == [step in (3, 5, 10) for step in range(1, 12)]
    assert [d.budget_tokens for d in decodes] == [8, 8] + [3] * 9


def test_ceiling_bounds_turns_that_ask_for_no_budget_and_is_no_budget_of_its_own():
    engine, device = fake_engine(small_config(**ROOMY))

    def budgets(session: str, asked: int | None) -> set[int]:
        (turn_id,) = engine.submit(request(session, 40, mode=Mode.SPARSE, max_tokens=4, budget_tokens=asked), Inbox())
        drain(engine)
        return {s.decode.budget_tokens for s in segments_of(device.plans, turn_id) if s.decode is not None}

    assert (budgets("a", 20), budgets("b", 3)) == ({20}, {3})
    engine.set_budget(5)
    assert (budgets("c", 20), budgets("d", 3), budgets("e", None)) == ({20}, {3}, {5})
    engine.set_budget(30)
    assert budgets("f", None) == {8}
    engine.set_budget(None)
    assert budgets("g", 20) == {20}


def test_gaps_between_tokens_are_reported_with_the_turns_number():
    clock, stats = Clock(), StatsLog()
    engine, _ = fake_engine(clock=clock, stats=stats)
    for turn_number in (1, 2):
        stats.steps.clear()
        engine.submit(request("s", 5 * turn_number, max_tokens=3), Inbox())
        while engine.step():
            clock.now_s += 0.25
        gaps = [gap for step in stats.steps for gap in step.token_gaps]
        assert gaps == [TokenGap(turn_number, 0.25)] * 2
        assert [first for step in stats.steps for first in step.first_tokens] == [TokenGap(turn_number, 0.0)]


def test_demand_curve_counts_the_blocks_of_compact_turns_and_of_conversations_that_come_back():
    engine, _ = fake_engine(small_config(**ROOMY, host_blocks=60))
    engine.submit(request("idle", 20, max_tokens=2), Inbox())
    drain(engine)
    engine.submit(request("busy", 70, mode=Mode.SPARSE, max_tokens=4), Inbox())
    for _ in range(6):
        engine.step()
    memory = engine.memory()
    assert memory.num_running_turns == 1 and memory.num_compact_turns == 0
    assert [point.budget_tokens for point in memory.demand] == [2, 4, 8, None]
    # a block of places for 1 sink and up to 8 chosen, and one for the newest tokens, of the 5 that hold all 71 to 73
    assert [point.active_bytes // memory.block_bytes for point in memory.demand] == [2, 2, 2, 5]
    assert [point.warm_bytes // memory.block_bytes for point in memory.demand] == [2, 2, 2, 2]  # 22 tokens
    assert (memory.num_active_sessions, memory.num_warm_sessions) == (1, 1)
    assert memory.demand_at(3).budget_tokens == 4 and memory.demand_at(None).budget_tokens is None
    assert (memory.budget_tokens, memory.budget_ceiling_tokens) == (8, None)
    engine.set_budget(2)
    assert (engine.memory().budget_tokens, engine.memory().budget_ceiling_tokens) == (2, 2)
    drain(engine)


def test_without_a_host_tier_no_budget_saves_bytes_of_the_device():
    engine, _ = fake_engine(small_config(**ROOMY))
    engine.submit(request("busy", 70, mode=Mode.SPARSE, max_tokens=4), Inbox())
    engine.step()
    assert {point.active_bytes // engine.memory().block_bytes for point in engine.memory().demand} == {5}
    drain(engine)


def test_turns_are_told_apart_by_identity():
    engine, _ = fake_engine()
    engine.submit(request("s", 5, num_branches=2), Inbox())
    first, second = engine._scheduler.turns()
    assert isinstance(first, Turn) and first != second
    drain(engine)
