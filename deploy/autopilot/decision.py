"""The decision: budget ceiling, form of the turns and replica count together, out of one snapshot. Pure; `now_s` is any clock that never
goes back.

                 above high                        below low for a hold
    budget       down at once, to the largest      up by one rung, where the working sets stay under the target
                 rung under the target
    replicas     up, to what holds the load at     down by a step, once the budget is back in full and the rest would
                 the full budget under the target  stay under the target for a hold of its own

                 all tokens above low              below target for a hold
    form         turns that come are compact       as each engine has it: resident while there is room

`compact`, `budget` and `count` are the three parts. Each is chosen after the one before: what a form frees needs no lower budget, and no
replica is removed while a ceiling is in force.
"""

from dataclasses import replace

from deploy.autopilot.budget import choose_budget, level_of
from deploy.autopilot.compact import COMPACT_ABOVE_RATIO, choose_form
from deploy.autopilot.count import bounded, choose_count, woken
from deploy.autopilot.records import Action, Decision, PilotState, Pressures, Step
from deploy.autopilot.settings import AutopilotSettings
from deploy.autopilot.signals import Cause, FleetLoad, ReplicaCounts, Snapshot, Untrusted


def take_over(snapshot: Snapshot, now_s: float) -> PilotState:
    """The state of an autopilot that starts: what is in force in the fleet, and every cooldown begun."""
    ceilings = [signals.budget_ceiling_tokens for signals in snapshot.replicas]
    set_ceilings = [ceiling for ceiling in ceilings if ceiling is not None]
    is_compact = any(signals.compact_above_ratio <= COMPACT_ABOVE_RATIO for signals in snapshot.replicas)
    return PilotState(
        ceiling_tokens=min(set_ceilings, default=None),
        replicas_wanted=len(snapshot.replicas) if snapshot.counts is None else snapshot.counts.target,
        compact_above_ratio=COMPACT_ABOVE_RATIO if is_compact else None,
        tightened_at_s=now_s,
        compacted_at_s=now_s,
        added_at_s=now_s,
        removed_at_s=now_s,
    )


def decide(snapshot: Snapshot, state: PilotState, settings: AutopilotSettings, now_s: float) -> Decision:
    """One round on data that can be believed."""
    load = FleetLoad(snapshot.replicas)
    pressures = _pressures(load, state, settings)
    form = choose_form(snapshot, load, pressures, state, settings, now_s)
    budget = choose_budget(snapshot, load, pressures, form.state, settings, now_s)
    count = choose_count(snapshot, load, pressures, budget.state, settings, now_s)
    steps = (form, budget, count)
    actions = tuple(step.action for step in steps if step.action is not Action.KEEP) or (Action.KEEP,)
    reason = "; ".join(step.reason for step in steps if step.reason) or "nothing to change"
    cause = Cause.SERVE if snapshot.counts is None else None
    return Decision(now_s, actions, reason, count.state, load, pressures, cause)


def hold(
    untrusted: Untrusted,
    counts: ReplicaCounts | None,
    state: PilotState,
    settings: AutopilotSettings,
    now_s: float,
    *,
    is_woken: bool = False,
) -> Decision:
    """One round on data that cannot be believed: everything stays, and what has to last begins anew. A request that found no replica
    still wakes one: that needs no data."""
    waiting = replace(state, calm_since_s=None, roomy_since_s=None, spare_since_s=None, idle_since_s=None)
    step = Step(waiting) if counts is None else bounded(waiting, settings, now_s)
    if is_woken and step.state.replicas_wanted == 0:
        step = woken(step.state, settings, now_s)
    actions = (Action.HOLD,) if step.action is Action.KEEP else (Action.HOLD, step.action)
    reason = "; ".join(filter(None, (untrusted.detail, step.reason)))
    return Decision(now_s, actions, reason, step.state, cause=untrusted.cause)


def _pressures(load: FleetLoad, state: PilotState, settings: AutopilotSettings) -> Pressures:
    if not load.replicas:
        return Pressures(0.0, 0.0, 0.0, 0.0, 0.0)
    rungs = load.rungs(settings.budget_floor_tokens)
    capacity = load.capacity_bytes
    return Pressures(
        compressed_ratio=load.demand_bytes(level_of(rungs, state.ceiling_tokens)) / capacity,
        full_ratio=load.demand_bytes(rungs[-1]) / capacity,
        whole_ratio=load.demand_bytes(None) / capacity,
        pool_ratio=load.live_bytes / capacity,
        queue_ratio=load.num_waiting / load.num_places,
    )
