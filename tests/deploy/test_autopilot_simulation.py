"""Whole days on paper: load rises and falls again, replicas take a minute to start, compact turns hold what their budget is."""

from dataclasses import replace
from itertools import pairwise

import pytest
from fleet_model import BUDGETS, FleetModel, fly

from deploy.autopilot.records import Action, Decision
from deploy.autopilot.settings import AutopilotSettings

SETTINGS = AutopilotSettings(min_replicas=1, max_replicas=8, scale_down_hold_s=300.0)
CALM, RUSH = 0.6, 3.0  # turns a second


def surge(now_s: float) -> float:
    return RUSH if 300.0 <= now_s < 1500.0 else CALM


def first(decisions: list[Decision], action: Action, *, since_s: float = 0.0) -> float:
    return next(decision.at_s for decision in decisions if action in decision.actions and decision.at_s >= since_s)


def times(decisions: list[Decision], *actions: Action) -> list[tuple[float, Action]]:
    return [(d.at_s, action) for d in decisions for action in d.actions if action in actions]


@pytest.fixture(scope="module")
def day() -> list[Decision]:
    return fly(FleetModel(surge, start_s=60.0), SETTINGS, 4000.0)


def test_calm_needs_nothing(day: list[Decision]):
    assert not times([d for d in day if d.at_s < 300.0], *(set(Action) - {Action.KEEP}))


def test_the_budget_tightens_within_seconds_and_before_a_replica_is_ready(day: list[Decision]):
    tightened = first(day, Action.TIGHTEN)
    added = first(day, Action.ADD)
    grown = next(d.at_s for d in day if d.load and len(d.load.replicas) > 1)
    assert 300.0 < tightened <= added < grown
    pressed = next(d.at_s for d in day if d.pressures and d.pressures.queue_ratio > SETTINGS.queue_high_ratio)
    assert tightened - pressed <= SETTINGS.interval_s


def test_turns_go_compact_before_the_budget_tightens_and_are_resident_again_after_it_is_back(day: list[Decision]):
    assert 300.0 < first(day, Action.COMPACT) < first(day, Action.TIGHTEN)
    in_full = max(at_s for at_s, _ in times(day, Action.RELAX))
    assert [at_s > in_full for at_s, _ in times(day, Action.RESIDENT)] == [True]
    assert len(times(day, Action.COMPACT)) == 1


def test_the_budget_comes_back_after_replicas_have_come(day: list[Decision]):
    grown = next(d.at_s for d in day if d.load and len(d.load.replicas) > 1)
    relaxed = first(day, Action.RELAX)
    assert relaxed > grown
    in_full = [d.at_s for d in day if d.state.ceiling_tokens is None and relaxed < d.at_s < 1500.0]
    assert in_full, "the budget was not back before the surge was over"


def test_replicas_go_last_and_only_with_the_budget_back_in_full(day: list[Decision]):
    removals = [d for d in day if Action.REMOVE in d.actions]
    assert removals and all(d.state.ceiling_tokens is None for d in removals)
    assert removals[0].at_s >= 1500.0 + SETTINGS.scale_down_hold_s
    assert day[-1].state.replicas_wanted < max(d.state.replicas_wanted for d in day)


def test_bounds_hold_all_day(day: list[Decision]):
    for decision in day:
        assert 1 <= decision.state.replicas_wanted <= 8
        assert decision.state.ceiling_tokens is None or BUDGETS[0] <= decision.state.ceiling_tokens < BUDGETS[-1]


def test_replicas_rise_once_and_fall_once(day: list[Decision]):
    moves = [action for _, action in times(day, Action.ADD, Action.REMOVE)]
    assert sum(a is not b for a, b in pairwise(moves)) == 1, moves


def test_no_more_is_ordered_for_the_same_pressure_while_replicas_start():
    fleet = FleetModel(lambda now_s: RUSH, start_s=600.0)
    decisions = fly(fleet, SETTINGS, 500.0)
    orders = [d for d in decisions if Action.ADD in d.actions]
    for earlier, later in pairwise(orders):
        assert later.state.added_for > earlier.state.added_for
    assert all(d.load and len(d.load.replicas) == 1 for d in decisions)


def test_a_fleet_at_its_most_replicas_gives_and_takes_the_budget_ever_more_rarely():
    """The budget itself lowers the pressure that it answers, so relaxing fails, again and again: each failure doubles the wait."""
    settings = AutopilotSettings(min_replicas=1, max_replicas=1)
    decisions = fly(FleetModel(lambda now_s: 1.9), settings, 8000.0)
    changes = times(decisions, Action.TIGHTEN, Action.RELAX)
    early = [at_s for at_s, _ in changes if at_s < 2000.0]
    late = [at_s for at_s, _ in changes if at_s >= 6000.0]
    assert len(early) >= 4, "it never had to choose"
    assert len(late) < len(early)
    assert len(late) <= 2 * (2000.0 / (16 * settings.relax_hold_s) + 1)


# ---- where there are places enough, and memory is short ----


def fly_through(most_per_s: float, **fleet: object) -> tuple[FleetModel, list[Decision]]:
    """A rise to so many turns a second and back."""
    model = FleetModel(lambda now_s: most_per_s if 300.0 <= now_s < 1500.0 else CALM, max_running=256, **fleet)
    return model, fly(model, SETTINGS, 4000.0)


def actions(decisions: list[Decision]) -> set[Action]:
    return {action for decision in decisions for action in decision.actions} - {Action.KEEP}


def test_turns_that_fit_compact_cost_neither_budget_nor_replicas():
    fleet, decisions = fly_through(2.0)
    assert max(d.pressures.whole_ratio for d in decisions if d.pressures) > 1.5, "resident they would never fit"
    assert actions(decisions) == {Action.COMPACT, Action.RESIDENT}
    assert fleet.preempted == 0.0 and fleet.waiting == 0.0


def test_memory_follows_the_budget_within_seconds_and_one_step_is_enough():
    fleet, decisions = fly_through(6.0, host_tokens=2_000_000)
    (tightened,) = [at_s for at_s, _ in times(decisions, Action.TIGHTEN)]
    before, after = (
        next(d.pressures for d in decisions if d.at_s >= at_s)
        for at_s in (tightened, tightened + fleet.refresh_s + SETTINGS.interval_s)
    )
    assert before and after and before.pool_ratio > SETTINGS.high_ratio
    assert after.pool_ratio <= SETTINGS.target_ratio
    assert first(decisions, Action.RELAX) < 1500.0 and fleet.preempted == 0.0


def test_without_a_host_tier_no_budget_is_lowered_for_bytes_and_replicas_hold_them():
    _, decisions = fly_through(2.0, host_tokens=0)
    assert actions(decisions) == {Action.ADD, Action.REMOVE}
    assert any("a lower budget would free hardly any of it" in decision.reason for decision in decisions)
    held = [d.pressures.pool_ratio for d in decisions if d.pressures and 600.0 <= d.at_s < 1500.0]
    assert max(held) <= SETTINGS.high_ratio


def test_a_host_tier_that_is_full_calls_for_replicas_and_not_for_a_lower_budget():
    _, decisions = fly_through(2.0, host_tokens=60_000)
    assert Action.TIGHTEN not in actions(decisions)
    went = first(decisions, Action.COMPACT)
    assert went < first(decisions, Action.ADD) <= went + SETTINGS.scale_up_cooldown_s + SETTINGS.interval_s


@pytest.mark.parametrize("share", [0.6, 0.66, 0.68, 0.71, 0.8])
def test_a_constant_load_changes_the_form_once_at_most(share: float):
    fleet = FleetModel(lambda now_s: share * 25 / 20)  # of the 25 resident turns that fit, each for 20 s
    changes = times(fly(fleet, replace(SETTINGS, max_replicas=1), 2000.0), Action.COMPACT, Action.RESIDENT)
    assert len(changes) == (share > SETTINGS.low_ratio)


def test_every_turn_is_answered_in_the_end():
    fleet = FleetModel(surge, start_s=60.0)
    fly(fleet, SETTINGS, 4000.0)
    assert fleet.turns < 2 * CALM * fleet.service_s
