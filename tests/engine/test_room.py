"""Who gives way when the device is full, in which order, and what that frees: with a device that is not there."""

import pytest
from fake_device import Clock, Inbox, drain, fake_engine, small_config

from loopserve.config import BLOCK_TOKENS, DecodeSparsity
from loopserve.dialogue import Mode, QualityContract, SamplingParams, SessionId, TurnRequest
from loopserve.errors import ConfigError
from loopserve.kv.cache import Tier

BUDGETS = DecodeSparsity(
    budget_tokens=63,
    budget_floor_tokens=15,
    sink_tokens=1,
    window_tokens=1,
    auto_min_context_tokens=24,
    measure_outputs=0,
)


def request(session: str, length: int, *, mode=Mode.SPARSE, max_tokens=40, seed=0, **contract) -> TurnRequest:
    prompt = tuple((seed + 7 * i + i * i) % 23 for i in range(length))
    sampling = SamplingParams(max_tokens=max_tokens, seed=1, ignore_eos=True)
    return TurnRequest(SessionId(session), prompt, sampling, QualityContract(mode, **contract))


def engine_of(kv_blocks: int, host_blocks: int = 100, *, clock=None, **settings):
    config = small_config(kv_blocks=kv_blocks + 1, host_blocks=host_blocks, **({"decode": BUDGETS} | settings))
    return fake_engine(config, clock=clock)


def num_places(engine) -> list[int]:
    """Blocks of places, of each running turn."""
    return [len(turn.leased_branch.places) for turn in engine._scheduler.turns()]


def steps(engine, count: int) -> None:
    for _ in range(count):
        assert engine.step()
        engine.check()


def decoding(engine) -> None:
    """Until every turn decodes."""
    for _ in range(60):
        if engine._scheduler.num_waiting == 0 and all(turn.is_decoding for turn in engine._scheduler.turns()):
            return
        steps(engine, 1)
    raise AssertionError("some turn never decodes")


def test_idle_sessions_go_to_host_memory_first_and_come_back_with_all_their_tokens():
    engine, _ = engine_of(10)
    engine.submit(request("idle", 90, mode=Mode.EXACT, max_tokens=1), Inbox())
    drain(engine)
    engine.submit(request("busy", 90, mode=Mode.EXACT, max_tokens=1, seed=3), Inbox())
    drain(engine)
    memory = engine.memory()
    assert (memory.pressure.offloaded_sessions, memory.pressure.dropped_sessions) == (1, 0)
    assert (memory.blocks.warm, memory.host_blocks.warm) == (6, 6)
    inbox = Inbox()
    (turn_id,) = engine.submit(request("idle", 96, mode=Mode.EXACT, max_tokens=1), inbox)
    drain(engine)
    assert inbox.started[turn_id].cached_tokens == 90


def test_sessions_idle_for_long_leave_the_device_unasked():
    clock = Clock()
    engine, _ = engine_of(30, offload_after_s=60.0, clock=clock)
    engine.submit(request("idle", 90, mode=Mode.EXACT, max_tokens=1), Inbox())
    drain(engine)
    for now_s, tier in ((59.0, Tier.DEVICE), (61.0, Tier.HOST)):
        clock.now_s = now_s
        engine.step()
        engine.check()
        assert engine.occupancy(tier).warm == 6
    assert engine.occupancy().warm == 0 and engine.occupancy().cached == 5, (
        "its full blocks are still there, but nobody's"
    )


def test_the_session_idle_longest_is_dropped_where_the_host_is_full():
    clock = Clock()
    engine, _ = engine_of(6, host_blocks=8, clock=clock)
    for seed, session in enumerate("abc"):
        clock.now_s += 1.0
        engine.submit(request(session, 90, mode=Mode.EXACT, max_tokens=1, seed=seed), Inbox())
        drain(engine)
    pressure = engine.memory().pressure
    assert (pressure.offloaded_sessions, pressure.dropped_sessions) == (2, 1)
    cached = {info.session_id: info.num_cached_tokens for info in engine.sessions()}
    assert cached == {"a": 0, "b": 90, "c": 90}


def test_a_turn_becomes_compact_before_another_waits_and_both_are_answered_at_once():
    engine, _ = engine_of(18)
    inbox = Inbox()
    engine.submit(request("first", 150), inbox)
    decoding(engine)
    assert engine.memory().num_compact_turns == 0
    engine.submit(request("second", 150, seed=5), inbox)
    decoding(engine)
    memory = engine.memory()
    assert memory.num_running_turns == 2 and memory.num_compact_turns >= 1
    assert memory.pressure.compacted_turns >= 1 and not any(t.num_preemptions for t in engine._scheduler.turns())
    drain(engine)
    assert all(end.error is None for end in inbox.ended.values()) and len(inbox.ended) == 2


def test_compact_turns_hold_what_the_demand_curve_says_at_every_budget():
    engine, _ = engine_of(60, compact_above_ratio=0.0)
    for seed, length in enumerate((150, 300)):
        engine.submit(request(f"s{seed}", length, seed=seed, max_tokens=60), Inbox())
    decoding(engine)
    places = []
    for budget in (None, 30, 15, 60, None):
        engine.set_budget(budget)
        steps(engine, 2)  # the choice that follows it, and one more
        memory = engine.memory()
        assert memory.num_compact_turns == 2
        assert memory.demand_at(memory.budget_tokens).active_bytes == memory.blocks.active * memory.block_bytes
        places.append(num_places(engine))
    assert places == [[4, 4], [2, 2], [1, 1], [4, 4], [4, 4]], "of 1 sink and the budget, in blocks"
    drain(engine)


def test_a_budget_that_the_request_asked_for_is_kept_under_a_ceiling():
    engine, device = engine_of(40, compact_above_ratio=0.0)
    engine.submit(request("own", 150, budget_tokens=40), Inbox())
    engine.set_budget(15)
    drain(engine)
    budgets = {s.decode.budget_tokens for plan in device.plans for s in plan.segments if s.decode is not None}
    assert budgets == {40}


def test_budgets_of_compact_turns_fall_to_the_floor_before_anybody_is_preempted_and_recover():
    clock = Clock()
    engine, device = engine_of(20, max_running_turns=4, clock=clock)
    inbox = Inbox()
    for seed in range(3):
        engine.submit(request(f"s{seed}", 100, seed=seed, max_tokens=120), inbox)
    steps(engine, 20)
    assert (engine.memory().num_running_turns, engine.memory().pressure.lowered_budgets) == (2, 0)
    clock.now_s += 11.0
    decoding(engine)
    steps(engine, 2)
    memory = engine.memory()
    assert memory.num_running_turns == 3 and memory.pressure.lowered_budgets >= 1
    asked = {s.decode.budget_tokens for plan in device.plans for s in plan.segments if s.decode is not None}
    assert BUDGETS.budget_floor_tokens <= min(asked) < BUDGETS.budget_tokens
    drain(engine)
    assert not any(turn.num_preemptions for turn in engine._scheduler.turns()) and len(inbox.ended) == 3
    engine.submit(request("later", 100), inbox)
    decoding(engine)
    steps(engine, 4)
    assert engine.memory().compact_budget_tokens == BUDGETS.budget_tokens, "there is room again"


@pytest.mark.parametrize("contract", [{"mode": Mode.EXACT}, {"mode": Mode.SPARSE, "min_coverage": 0.5}])
def test_turns_that_promised_to_read_everything_stay_resident(contract):
    engine, device = engine_of(40, compact_above_ratio=0.0)
    engine.submit(request("s", 150, **contract), Inbox())
    drain(engine)
    assert not any(segment.places for plan in device.plans for segment in plan.segments)
    assert engine.occupancy(Tier.HOST).warm == 0


def test_a_preempted_turn_is_parked_in_host_memory_and_goes_on_where_it_was():
    engine, device = engine_of(8, max_running_turns=2, prefill=small_config().prefill)
    inbox = Inbox()
    for seed, session in enumerate("ab"):
        engine.submit(request(session, 40, mode=Mode.EXACT, max_tokens=60, seed=seed), inbox)
    drain(engine)
    assert sum(end.usage.completion_tokens for end in inbox.ended.values()) == 120
    rows = sum(len(segment.token_ids) for plan in device.plans for segment in plan.segments)
    assert rows == 2 * (40 + 59), "no token was computed twice"
    assert any(copy.target in engine._cache.host_pool.ids for plan in device.plans for copy in plan.copies)


def test_a_ratio_or_a_budget_out_of_range_is_refused():
    engine, _ = engine_of(8)
    with pytest.raises(ConfigError, match="from 0 to 1"):
        engine.set_compact_above(1.5)
    with pytest.raises(ConfigError, match="floor is 15"):
        engine.set_budget(3)


def test_what_a_release_erases_lies_on_both_tiers():
    engine, device = engine_of(10)
    engine.submit(request("a", 90, mode=Mode.EXACT, max_tokens=1), Inbox())
    drain(engine)
    assert engine._sessions.evict_one()
    engine.release(SessionId("a"))
    held = {slot // BLOCK_TOKENS for slot in device.slots}
    assert not held, "what was on its way between tiers is erased, too"
