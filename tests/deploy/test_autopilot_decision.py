"""What the autopilot decides: examples for every rule, and properties over random fleets and traces."""

from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest
from fleet_model import BUDGETS, TOKEN_BYTES, signals
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.autopilot.decision import decide, hold, take_over
from deploy.autopilot.records import Action, Decision, PilotState
from deploy.autopilot.settings import AutopilotSettings
from deploy.autopilot.signals import Cause, ReplicaCounts, Snapshot, Untrusted
from deploy.calls import ReplicaSignals

SETTINGS = AutopilotSettings(min_replicas=1, max_replicas=8)
FREE = PilotState(None, 1)
POOL_TOKENS = 100_000


def fleet(*replicas: ReplicaSignals, target: int | None = None, **changes: object) -> Snapshot:
    named = tuple(replace(one, replica=f"r{i}") for i, one in enumerate(replicas))
    counts = ReplicaCounts(len(named) if target is None else target, len(named), 0, 0)
    return replace(Snapshot(named, counts, age_s=0.0), **changes)


def at(ratio: float, *, turns: int | None = None, **changes: object) -> ReplicaSignals:
    """A replica whose pool is full to `ratio` with live blocks."""
    return signals(active_tokens=int(ratio * POOL_TOKENS), turns=turns, **changes)


def run(snapshot: Snapshot, state: PilotState, seconds: int, *, config: AutopilotSettings = SETTINGS, start_s: int = 0):
    """The same snapshot, once a second; orders are acknowledged, and have no effect."""
    decisions: list[Decision] = []
    for now_s in range(start_s, start_s + seconds):
        decisions.append(decide(snapshot, state, config, float(now_s)))
        state = decisions[-1].state
    return decisions


def acts(decisions: list[Decision]) -> list[tuple[int, Action]]:
    return [(int(d.at_s), a) for d in decisions for a in d.actions if a is not Action.KEEP]


# ---- the budget ----


def test_working_sets_above_high_tighten_to_the_largest_rung_under_the_target():
    crowd = replace(
        at(0.5), demand=(*((b, int(b / 1024 * 90_000) * TOKEN_BYTES, 0) for b in BUDGETS), (None, 95_000_000, 0))
    )
    decision = decide(fleet(crowd), FREE, SETTINGS, 0.0)
    assert decision.state.ceiling_tokens == 512 and Action.TIGHTEN in decision.actions
    assert "working sets are 90%" in decision.reason and "1024 -> 512" in decision.reason


def test_where_no_rung_comes_under_the_target_it_is_the_largest_that_frees_all_there_is_to_free():
    stubborn = replace(
        at(0.9), demand=((64, 88_000_000, 0), (256, 88_000_000, 0), (1024, 95_000_000, 0), (None, 99_000_000, 0))
    )
    decisions = run(fleet(stubborn), FREE, 60)
    assert [(at_s, action) for at_s, action in acts(decisions) if action is Action.TIGHTEN] == [(0, Action.TIGHTEN)]
    assert decisions[-1].state.ceiling_tokens == 256


def test_pools_full_of_resident_turns_lower_no_budget():
    decisions = run(fleet(at(0.9, turns=10)), FREE, 60)
    assert Action.TIGHTEN not in [action for _, action in acts(decisions)]
    assert "no budget frees them: compact, these turns would hold 10%" in decisions[0].reason


def test_without_a_host_tier_bytes_lower_no_budget_and_the_reason_says_so():
    decisions = run(fleet(at(0.9, is_flat=True)), FREE, 60)
    assert {action for _, action in acts(decisions)} == {Action.ADD}
    assert (
        "working sets are 90% of the pools, over 85%; a lower budget would free hardly any of it" in decisions[0].reason
    )


def test_in_a_mixed_fleet_a_lower_budget_counts_as_far_as_it_frees():
    flat, crowd = at(0.95, is_flat=True), at(0.95)
    assert decide(fleet(flat, crowd), PilotState(None, 2), SETTINGS, 0.0).state.ceiling_tokens == 256
    hardly = replace(flat, demand=((64, 94_500_000, 0), *flat.demand[1:]))
    assert decide(fleet(flat, hardly), PilotState(None, 2), SETTINGS, 0.0).state.ceiling_tokens is None


def test_a_queue_tightens_too_by_one_rung_at_a_time():
    decisions = run(fleet(at(0.3, waiting=20)), FREE, 30)
    assert "62% of the places are waited for" in decisions[0].reason
    tightened = [(int(d.at_s), d.state.ceiling_tokens) for d in decisions if Action.TIGHTEN in d.actions]
    assert tightened == [(0, 512), (5, 256), (10, 128), (15, 64)]
    assert run(fleet(at(0.9, waiting=20, is_flat=True)), FREE, 30)[-1].state.ceiling_tokens == 64, "decode is quicker"


def test_the_budget_never_goes_below_the_higher_of_both_floors():
    own_floor, queue = replace(SETTINGS, budget_floor_tokens=200), fleet(at(0.3, waiting=20))
    assert run(queue, FREE, 60, config=own_floor)[-1].state.ceiling_tokens == 200
    assert run(queue, FREE, 60)[-1].state.ceiling_tokens == 64


def test_a_budget_that_frees_nothing_comes_back_though_the_pools_are_full():
    tight = replace(FREE, ceiling_tokens=256, replicas_wanted=8)
    relaxed = [
        d.state.ceiling_tokens for d in run(fleet(at(0.8, is_flat=True)), tight, 70) if Action.RELAX in d.actions
    ]
    assert relaxed == [512, None]
    assert not [d for d in run(fleet(at(0.8)), tight, 70) if Action.RELAX in d.actions], "these would take more"


def test_calm_gives_the_budget_back_rung_by_rung():
    decisions = run(fleet(at(0.3)), replace(FREE, ceiling_tokens=128), 200)
    relaxed = [(int(d.at_s), d.state.ceiling_tokens) for d in decisions if Action.RELAX in d.actions]
    assert relaxed == [(30, 256), (60, 512), (90, None)]


def test_the_budget_stays_where_the_next_rung_would_be_too_large():
    crowd = replace(
        at(0.3), demand=((64, 30_000_000, 0), (128, 66_000_000, 0), (1024, 90_000_000, 0), (None, 99_000_000, 0))
    )
    decisions = run(fleet(crowd), replace(FREE, ceiling_tokens=64, replicas_wanted=8), 200)
    assert decisions[-1].state.ceiling_tokens == 64
    assert "at 128 working sets would be 66%" in decisions[-1].reason


def test_a_moment_of_pressure_starts_the_hold_anew():
    state = run(fleet(at(0.3)), replace(FREE, ceiling_tokens=256), 29)[-1].state
    state = decide(fleet(at(0.75)), state, SETTINGS, 29.0).state
    decisions = run(fleet(at(0.3)), state, 60, start_s=30)
    assert [at_s for at_s, action in acts(decisions) if action is Action.RELAX] == [60]


def test_warm_conversations_neither_tighten_nor_add():
    warm = at(0.0, warm_bytes=99_000_000)
    assert run(fleet(warm), FREE, 600)[-1].state == replace(run(fleet(at(0.0)), FREE, 600)[-1].state)
    assert not acts(run(fleet(warm), FREE, 600))


def test_nothing_is_relaxed_on_a_snapshot_with_a_gap():
    missing = fleet(*[at(0.1)] * 4, num_missing=1)
    assert not acts(run(missing, replace(FREE, ceiling_tokens=64, replicas_wanted=4), 600))


# ---- the form of the turns ----


def long_turns(ratio: float, **changes: object) -> ReplicaSignals:
    """Ten turns: compact they take a tenth of the pool, whatever they take in full."""
    return at(ratio, turns=10, **changes)


def test_turns_go_compact_when_all_tokens_are_above_low_and_the_budget_stays():
    assert not acts(run(fleet(long_turns(0.70)), FREE, 60))
    decision = decide(fleet(long_turns(0.71)), FREE, SETTINGS, 0.0)
    assert decision.actions == (Action.COMPACT,) and decision.state.ceiling_tokens is None
    assert decision.state.compact_above_ratio == 0.0
    assert decision.reason == "turns go compact: all tokens are 71% of the pools, over 70%; compact they would be 10%"


def test_turns_are_resident_again_after_a_hold_under_the_target():
    compact = replace(FREE, compact_above_ratio=0.0)
    between = run(fleet(long_turns(0.66)), compact, 100)
    assert not acts(between) and between[-1].state.compact_above_ratio == 0.0
    decisions = run(fleet(long_turns(0.6)), compact, 100)
    assert acts(decisions) == [(30, Action.RESIDENT)] and decisions[-1].state.compact_above_ratio is None
    assert "for 30 s all tokens have been at most 65%" in decisions[30].reason


def test_a_load_between_the_two_thresholds_changes_no_form():
    for state in (FREE, replace(FREE, compact_above_ratio=0.0)):
        assert not acts(run(fleet(long_turns(0.68)), state, 600))


def test_the_form_is_given_back_after_the_budget_and_on_whole_snapshots_only():
    tight = replace(FREE, ceiling_tokens=512, compact_above_ratio=0.0)
    assert acts(run(fleet(at(0.3)), tight, 70)) == [(30, Action.RELAX), (61, Action.RESIDENT)]
    gap = fleet(*[at(0.1)] * 4, num_missing=1)
    assert not acts(run(gap, replace(FREE, compact_above_ratio=0.0, replicas_wanted=4), 100))


def test_a_moment_without_room_or_data_starts_the_hold_of_the_form_anew():
    compact, roomy = replace(FREE, compact_above_ratio=0.0), fleet(long_turns(0.6))
    pressed = decide(fleet(long_turns(0.68)), run(roomy, compact, 29)[-1].state, SETTINGS, 29.0).state
    held = hold(Untrusted(Cause.STALE, "old"), roomy.counts, run(roomy, compact, 29)[-1].state, SETTINGS, 29.0).state
    for state in (pressed, held):
        assert acts(run(roomy, state, 60, start_s=30)) == [(60, Action.RESIDENT)]


def test_turns_that_would_take_no_less_compact_stay_as_they_are_and_the_reason_says_so():
    decision = decide(fleet(long_turns(0.8, is_flat=True)), FREE, SETTINGS, 0.0)
    assert decision.actions == (Action.KEEP,) and decision.state.compact_above_ratio is None
    assert decision.reason == "all tokens are 80% of the pools, over 70%, and compact turns would take no less"


def test_turns_that_wait_count_before_they_fill_a_pool():
    waiting = replace(long_turns(0.4), demand=((64, 2_000_000, 0), (1024, 20_000_000, 0), (None, 80_000_000, 0)))
    assert decide(fleet(waiting), FREE, SETTINGS, 0.0).actions == (Action.COMPACT,)


# ---- the replica count ----


def test_pools_full_of_resident_turns_call_for_replicas_only_when_going_compact_has_not_helped():
    decisions = run(fleet(long_turns(0.9)), FREE, 60)
    assert acts(decisions) == [(0, Action.COMPACT), (30, Action.ADD)]
    assert "live bytes are 90% of the pools, 30 s after turns went compact" in decisions[30].reason
    emptied = run(fleet(long_turns(0.9)), FREE, 10) + run(
        fleet(replace(long_turns(0.9), active_bytes=10_000_000)), decisions[9].state, 60, start_s=10
    )
    assert acts(emptied) == [(0, Action.COMPACT)], "compact turns hold it"


def test_idle_conversations_in_host_memory_put_a_removal_off_too():
    hosts = {"host_capacity_bytes": 400_000_000, "host_live_bytes": 50_000_000}
    full, roomy = (at(0.1, **hosts, host_warm_bytes=warm) for warm in (250_000_000, 100_000_000))
    removed = [
        next(at_s for at_s, action in acts(run(fleet(one, one), PilotState(None, 2), 2500)) if action is Action.REMOVE)
        for one in (full, roomy)
    ]
    assert removed == [300 + 1800, 300]


def test_pressure_adds_what_would_hold_it_under_the_target():
    decision = decide(fleet(at(0.9)), FREE, SETTINGS, 0.0)
    assert decision.state.replicas_wanted == 2 and decision.actions == (Action.TIGHTEN, Action.ADD)
    assert not decision.state.is_acknowledged


def test_working_sets_at_the_full_budget_add_though_the_budget_in_force_is_small():
    crowd = replace(at(0.5), demand=((64, 10_000_000, 0), (1024, 120_000_000, 0), (None, 130_000_000, 0)))
    decision = decide(fleet(crowd), replace(FREE, ceiling_tokens=64), SETTINGS, 0.0)
    assert decision.state.replicas_wanted == 2 and decision.state.ceiling_tokens == 64


def test_a_step_is_limited_and_so_is_the_count():
    crowd = replace(at(0.9), demand=((1024, 900_000_000, 0), (None, 900_000_000, 0)))
    assert decide(fleet(crowd), FREE, SETTINGS, 0.0).state.replicas_wanted == 5
    assert decide(fleet(crowd), FREE, replace(SETTINGS, max_replicas=3), 0.0).state.replicas_wanted == 3


def test_starting_replicas_answer_the_pressure_that_called_for_them():
    decisions = run(fleet(at(0.9), target=2), replace(FREE, replicas_wanted=1, is_acknowledged=False), 900)
    assert [action for _, action in acts(decisions)].count(Action.ADD) == 1


def test_greater_pressure_adds_more_while_the_first_are_starting():
    state = replace(decide(fleet(at(0.9)), FREE, SETTINGS, 0.0).state, is_acknowledged=True)
    crowd = replace(at(0.9), demand=((1024, 250_000_000, 0), (None, 250_000_000, 0)))
    assert decide(fleet(crowd, target=2), state, SETTINGS, 40.0).state.replicas_wanted == 4


def test_a_queue_adds_one_more_than_there_are():
    decision = decide(fleet(at(0.2, waiting=9), at(0.2, waiting=9), target=2), PilotState(None, 2), SETTINGS, 0.0)
    assert decision.state.replicas_wanted == 3


def test_while_a_ceiling_is_in_force_replicas_are_added_from_low_on():
    middling = fleet(at(0.75))
    assert decide(middling, FREE, SETTINGS, 0.0).state.replicas_wanted == 1
    assert decide(middling, replace(FREE, ceiling_tokens=512), SETTINGS, 0.0).state.replicas_wanted == 2


def test_a_replica_goes_only_after_the_budget_is_back_and_a_hold_of_its_own():
    decisions = run(fleet(at(0.1), at(0.1)), PilotState(256, 2), 900)
    removed = next(at_s for at_s, action in acts(decisions) if action is Action.REMOVE)
    relaxed = [at_s for at_s, action in acts(decisions) if action is Action.RELAX]
    assert relaxed == [30, 60] and removed == 60 + 300


def test_warm_conversations_put_a_removal_off_until_patience_is_over():
    full = at(0.1, warm_bytes=80_000_000)
    decisions = run(fleet(full, full), PilotState(None, 2), 2500)
    assert [at_s for at_s, action in acts(decisions) if action is Action.REMOVE][:1] == [300 + 1800]
    assert "idle conversations" in decisions[400].reason


def test_a_moment_of_bad_data_does_not_try_patience_anew():
    full = fleet(at(0.1, warm_bytes=80_000_000), at(0.1, warm_bytes=80_000_000))
    state = run(full, PilotState(None, 2), 1500)[-1].state
    state = hold(Untrusted(Cause.STALE, "old"), full.counts, state, SETTINGS, 1500.0).state
    decisions = run(full, state, 1000, start_s=1501)
    assert [at_s for at_s, action in acts(decisions) if action is Action.REMOVE][:1] == [300 + 1800]


def test_a_load_that_comes_back_does():
    full = fleet(at(0.1, warm_bytes=80_000_000), at(0.1, warm_bytes=80_000_000))
    state = run(full, PilotState(None, 2), 1500)[-1].state
    state = decide(fleet(at(0.5), at(0.5)), state, SETTINGS, 1500.0).state
    decisions = run(full, state, 1800, start_s=1501)
    assert not acts(decisions)


def test_warm_conversations_with_room_elsewhere_put_nothing_off():
    roomy = at(0.1, warm_bytes=30_000_000)
    decisions = run(fleet(roomy, roomy), PilotState(None, 2), 400)
    assert [at_s for at_s, action in acts(decisions) if action is Action.REMOVE][:1] == [300]


def test_ordered_replicas_that_never_start_are_given_up_when_the_load_is_gone():
    decisions = run(fleet(at(0.1), target=3), PilotState(None, 3), 301)
    assert decisions[-1].state.replicas_wanted == 2


def test_bounds_count_at_once():
    calm = fleet(at(0.3), at(0.3), at(0.3))
    assert decide(calm, PilotState(None, 3), replace(SETTINGS, max_replicas=2), 0.0).state.replicas_wanted == 2
    assert decide(calm, PilotState(None, 3), replace(SETTINGS, min_replicas=5), 0.0).state.replicas_wanted == 5


def test_the_count_holds_while_serve_does_not_answer_and_the_budget_still_tightens():
    decision = decide(fleet(at(0.9), counts=None), FREE, SETTINGS, 0.0)
    assert decision.actions == (Action.TIGHTEN,) and decision.state.replicas_wanted == 1
    assert decision.cause is Cause.SERVE


def test_a_count_set_by_another_hand_is_taken_over_once_it_stands():
    decisions = run(fleet(at(0.5), at(0.5), target=2), PilotState(None, 5), 4)
    assert [d.state.replicas_wanted for d in decisions] == [5, 5, 5, 2]
    assert "another hand" in decisions[-1].reason and not acts(decisions)


def test_an_order_that_serve_has_not_taken_is_not_mistaken_for_another_hand():
    decisions = run(fleet(at(0.5), target=1), PilotState(None, 2, is_acknowledged=False), 60)
    assert {d.state.replicas_wanted for d in decisions} == {2}


# ---- to zero and back ----

TO_ZERO = AutopilotSettings(min_replicas=0, max_replicas=4, idle_to_zero_s=60.0)


def test_an_idle_fleet_goes_to_zero_after_its_time():
    decisions = run(fleet(at(0.0), in_flight=0), PilotState(None, 1, added_at_s=-999.0), 100, config=TO_ZERO)
    assert acts(decisions)[0] == (60, Action.REMOVE) and decisions[-1].state.replicas_wanted == 0


@pytest.mark.parametrize("in_flight", [1, None])
def test_a_request_on_its_way_or_unknown_ones_keep_the_last_replica(in_flight: int | None):
    assert not acts(run(fleet(at(0.0), in_flight=in_flight), PilotState(None, 1), 500, config=TO_ZERO))


def test_the_last_replica_stays_where_one_is_the_least():
    assert not acts(run(fleet(at(0.0), in_flight=0), PilotState(None, 1), 5000))


def test_warm_conversations_put_off_the_way_to_zero():
    warm = fleet(at(0.0, warm_bytes=1_000_000), in_flight=0)
    decisions = run(warm, PilotState(None, 1), 2500, config=TO_ZERO)
    assert acts(decisions)[0] == (60 + 1800, Action.REMOVE)


@pytest.mark.parametrize("sign", [{"is_woken": True}, {"in_flight": 2}])
def test_a_request_wakes_a_fleet_asleep(sign: dict[str, object]):
    decision = decide(fleet(**sign), PilotState(None, 0, removed_at_s=-1.0), TO_ZERO, 0.0)
    assert decision.state.replicas_wanted == 1 and "a request waits" in decision.reason


def test_a_fleet_asleep_sleeps_on():
    assert not acts(run(fleet(in_flight=0), PilotState(None, 0), 500, config=TO_ZERO))


def test_data_that_cannot_be_believed_do_not_keep_a_request_from_waking_the_fleet():
    blind = Untrusted(Cause.SOURCE, "Prometheus is away")
    decision = hold(blind, ReplicaCounts(0, 0, 0, 0), PilotState(None, 0), TO_ZERO, 0.0, is_woken=True)
    assert decision.state.replicas_wanted == 1 and decision.cause is Cause.SOURCE


# ---- holding ----


def test_holding_keeps_both_and_begins_every_hold_anew():
    state = run(fleet(at(0.1), at(0.1)), PilotState(None, 2), 299)[-1].state
    held = hold(Untrusted(Cause.STALE, "old"), ReplicaCounts(2, 2, 0, 0), state, SETTINGS, 299.0)
    assert held.actions == (Action.HOLD,) and (held.state.ceiling_tokens, held.state.replicas_wanted) == (None, 2)
    decisions = run(fleet(at(0.1), at(0.1)), held.state, 400, start_s=300)
    assert [at_s for at_s, action in acts(decisions) if action is Action.REMOVE] == [600]


def test_a_restarted_autopilot_goes_on_from_what_is_in_force_with_its_cooldowns_begun():
    first = at(0.9, budget_ceiling_tokens=256, compact_above_ratio=0.0)
    tight = fleet(first, at(0.9, budget_ceiling_tokens=512), target=4)
    state = take_over(tight, 1000.0)
    assert (state.ceiling_tokens, state.compact_above_ratio, state.replicas_wanted) == (256, 0.0, 4)
    decision = decide(tight, state, SETTINGS, 1000.0)
    assert decision.actions == (Action.KEEP,)


# ---- properties ----


@st.composite
def loads(draw: st.DrawFn) -> ReplicaSignals:
    ratio = draw(st.floats(0.0, 1.0))
    return at(ratio, turns=draw(st.integers(1, 40)), waiting=draw(st.integers(0, 60)))


states = st.builds(
    PilotState,
    ceiling_tokens=st.one_of(st.none(), st.integers(1, 4000)),
    replicas_wanted=st.integers(0, 12),
    compact_above_ratio=st.sampled_from([None, 0.0]),
    compacted_at_s=st.floats(-1000.0, 0.0),
    num_regrets=st.integers(0, 4),
    added_for=st.integers(0, 9),
    tightened_at_s=st.floats(-1000.0, 0.0),
    relaxed_at_s=st.floats(-1000.0, 0.0),
    added_at_s=st.floats(-1000.0, 0.0),
    removed_at_s=st.floats(-1000.0, 0.0),
    calm_since_s=st.one_of(st.none(), st.floats(-1000.0, 0.0)),
    roomy_since_s=st.one_of(st.none(), st.floats(-1000.0, 0.0)),
    spare_since_s=st.one_of(st.none(), st.floats(-1000.0, 0.0)),
)
configs = st.builds(
    lambda least, more, floor: replace(
        SETTINGS, min_replicas=least, max_replicas=max(1, least + more), budget_floor_tokens=floor
    ),
    st.integers(0, 4),
    st.integers(0, 8),
    st.one_of(st.none(), st.integers(1, 2000)),
)


@given(st.lists(loads(), max_size=5), states, configs)
def test_bounds_are_always_kept(replicas, state, config):
    decision = decide(fleet(*replicas, target=state.replicas_wanted), state, config, 0.0)
    assert config.min_replicas <= decision.state.replicas_wanted <= config.max_replicas
    ceiling = decision.state.ceiling_tokens
    if replicas and ceiling is not None:
        assert max(64, config.budget_floor_tokens or 0) <= ceiling < 1024
    assert decision.state.compact_above_ratio in (None, 0.0)
    assert decision.reason and decision.actions


@given(loads(), st.floats(0.0, 1.0), st.integers(0, 60), states, configs)
def test_more_pressure_never_means_a_larger_budget_resident_turns_or_fewer_replicas(
    less, extra, waiting, state, config
):
    ratio = less.active_bytes / less.capacity_bytes
    num_turns = max(1, less.num_running)
    more = at(min(1.0, ratio + extra), turns=num_turns, waiting=less.num_waiting + waiting)
    less = at(ratio, turns=num_turns, waiting=less.num_waiting)
    calm, pressed = (decide(fleet(one, target=state.replicas_wanted), state, config, 0.0).state for one in (less, more))
    assert (pressed.ceiling_tokens or 9999) <= (calm.ceiling_tokens or 9999)
    assert pressed.replicas_wanted >= calm.replicas_wanted
    assert calm.compact_above_ratio is None or pressed.compact_above_ratio is not None


@settings(deadline=None, max_examples=30)
@given(loads(), st.integers(1, 6), states)
def test_a_constant_load_comes_to_rest(replica, num_ready, state):
    """Serve follows orders at once; the same load in all is spread over whatever replicas there are."""
    state = replace(state, replicas_wanted=num_ready, foreign_since_s=None)
    moves = []
    for now_s in range(0, 12_000, 20):
        ready = max(1, state.replicas_wanted)
        share = num_ready / ready
        spread = at(
            min(1.0, replica.active_bytes * share / replica.capacity_bytes),
            turns=max(1, round(replica.num_running * share)),
            waiting=round(replica.num_waiting * share),
        )
        decision = decide(fleet(*[spread] * ready), state, SETTINGS, float(now_s))
        state = replace(decision.state, is_acknowledged=True)
        moves += [(now_s, action) for action in decision.actions if action is not Action.KEEP]
    assert not [move for move in moves if move[0] > 9000], moves


@settings(deadline=None, max_examples=25)
@given(st.sampled_from([0.65, 0.70, 0.85]), st.integers(0, 10**6))
def test_noise_around_a_threshold_does_not_oscillate(threshold, seed):
    random, state, moves = Random(seed), FREE, []
    for now_s in range(900):
        shake = random.uniform(-0.04, 0.04)
        ready = state.replicas_wanted
        spread = at((threshold + shake) / ready, turns=20)
        decision = decide(fleet(*[spread] * ready), state, SETTINGS, float(now_s))
        state = replace(decision.state, is_acknowledged=True)
        moves += [action for action in decision.actions if action is not Action.KEEP]
    assert reversals(moves, Action.ADD, Action.REMOVE) == 0
    assert reversals(moves, Action.TIGHTEN, Action.RELAX) <= 1
    assert reversals(moves, Action.COMPACT, Action.RESIDENT) <= 1


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.floats(0.0, 1.0), st.integers(0, 40)), min_size=60, max_size=60), st.integers(1, 30))
def test_reversals_in_a_window_are_few_whatever_the_load_does(trace, every_s):
    """A relaxation takes a hold of calm, a removal a longer one: no load can make either faster."""
    state, turns, forms, counts = FREE, [], [], []
    for now_s in range(len(trace) * every_s):
        ratio, waiting = trace[now_s // every_s]
        ready = state.replicas_wanted
        decision = decide(fleet(*[at(ratio, waiting=waiting)] * ready), state, SETTINGS, float(now_s))
        state = replace(decision.state, is_acknowledged=True)
        turns += [(now_s, a) for a in decision.actions if a in (Action.TIGHTEN, Action.RELAX)]
        forms += [a for a in decision.actions if a in (Action.COMPACT, Action.RESIDENT)]
        counts += [(now_s, a) for a in decision.actions if a in (Action.ADD, Action.REMOVE)]
    window_s = len(trace) * every_s
    assert reversals([a for _, a in turns], Action.TIGHTEN, Action.RELAX) <= 2 * (window_s / SETTINGS.relax_hold_s) + 1
    assert reversals(forms, Action.COMPACT, Action.RESIDENT) <= 2 * (window_s / SETTINGS.relax_hold_s) + 1
    assert (
        reversals([a for _, a in counts], Action.ADD, Action.REMOVE) <= 2 * (window_s / SETTINGS.scale_down_hold_s) + 1
    )
    removed = [at_s for at_s, a in counts if a is Action.REMOVE]
    assert all(later - earlier >= SETTINGS.scale_down_hold_s for earlier, later in pairwise(removed))


def reversals(moves: list[Action], one: Action, other: Action) -> int:
    of_both = [action for action in moves if action in (one, other)]
    return sum(a is not b for a, b in pairwise(of_both))
