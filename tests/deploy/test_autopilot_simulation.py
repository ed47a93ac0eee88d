"""A whole day on paper: load rises fivefold and falls again, replicas take a minute to start."""

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
    pressed = next(d.at_s for d in day if d.pressures and max(d.pressures.pool_ratio, d.pressures.full_ratio) > 0.85)
    assert tightened - pressed <= SETTINGS.interval_s


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
    decisions = fly(FleetModel(lambda now_s: 1.15), settings, 8000.0)
    changes = times(decisions, Action.TIGHTEN, Action.RELAX)
    early = [at_s for at_s, _ in changes if at_s < 2000.0]
    late = [at_s for at_s, _ in changes if at_s >= 6000.0]
    assert len(early) >= 4, "it never had to choose"
    assert len(late) < len(early)
    assert len(late) <= 2 * (2000.0 / (16 * settings.relax_hold_s) + 1)


def test_every_turn_is_answered_in_the_end():
    fleet = FleetModel(surge, start_s=60.0)
    fly(fleet, SETTINGS, 4000.0)
    assert fleet.turns < 2 * CALM * fleet.service_s
