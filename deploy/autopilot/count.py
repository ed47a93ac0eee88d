"""The slow actuator: how many replicas there are, within minutes. Pure.

What is wanted follows from the load alone, never from what was wanted before: the same pressure does not add replicas twice while the
first ones are starting. A replica goes only when the budget is back in full, the rest would hold the load under the target for a hold of
its own, and no idle conversation would be lost to it; the last one only when nothing arrives.
"""

import math
from dataclasses import replace

from deploy.autopilot.records import Action, PilotState, Pressures, Step
from deploy.autopilot.settings import AutopilotSettings
from deploy.autopilot.signals import FleetLoad, ReplicaCounts, Snapshot

_ADOPT_ROUNDS = 3  # a replica count that another hand has set counts once it has stood for so many rounds


def choose_count(
    snapshot: Snapshot,
    load: FleetLoad,
    pressures: Pressures,
    state: PilotState,
    settings: AutopilotSettings,
    now_s: float,
) -> Step:
    """The replica count of the next minutes."""
    if snapshot.counts is None:
        return Step(replace(state, spare_since_s=None, idle_since_s=None), reason="Serve does not answer")
    foreign = _followed(snapshot.counts, state, settings, now_s)
    if foreign.reason:
        return foreign
    within = bounded(foreign.state, settings, now_s)
    if within.action is not Action.KEEP:
        return within
    state = within.state
    if not load.replicas:
        is_needed = snapshot.is_woken or bool(snapshot.in_flight)
        if is_needed and state.replicas_wanted == 0:
            return woken(state, settings, now_s)
        return Step(replace(state, spare_since_s=None, idle_since_s=None))
    added = _added(load, pressures, state, settings, now_s)
    if added.action is Action.ADD:
        return added
    removed = _removed(snapshot, load, added.state, settings, now_s)
    return removed if removed.reason or not added.reason else replace(removed, reason=added.reason)


def _followed(counts: ReplicaCounts, state: PilotState, settings: AutopilotSettings, now_s: float) -> Step:
    """Where another hand has set Serve's target, that is where to go on from; a moment's answer of a restarting Serve is not."""
    if counts.target == state.replicas_wanted or not state.is_acknowledged:
        return Step(replace(state, foreign_since_s=None))
    since_s = now_s if state.foreign_since_s is None else state.foreign_since_s
    if now_s - since_s < _ADOPT_ROUNDS * settings.interval_s:
        differs = f"Serve's target is {counts.target}, {state.replicas_wanted} were ordered"
        return Step(replace(state, foreign_since_s=since_s, spare_since_s=None), reason=differs)
    followed = replace(
        state,
        replicas_wanted=counts.target,
        foreign_since_s=None,
        added_at_s=now_s,
        removed_at_s=now_s,
        added_for=0,
        spare_since_s=None,
    )
    return Step(followed, reason=f"{counts.target} replicas were set by another hand, {state.replicas_wanted} ordered")


def bounded(state: PilotState, settings: AutopilotSettings, now_s: float) -> Step:
    """Bounds count at once, whatever the load is."""
    wanted = min(max(state.replicas_wanted, settings.min_replicas), settings.max_replicas)
    if wanted == state.replicas_wanted:
        return Step(state)
    reason = (
        f"replicas {state.replicas_wanted} -> {wanted}: {settings.min_replicas} to {settings.max_replicas} are allowed"
    )
    return _ordered(state, wanted, reason, now_s)


def woken(state: PilotState, settings: AutopilotSettings, now_s: float) -> Step:
    """The first replica of a fleet without any."""
    wanted = max(1, settings.min_replicas)
    return _ordered(state, wanted, f"replicas 0 -> {wanted}: a request waits for one", now_s)


def _ordered(state: PilotState, wanted: int, reason: str, now_s: float) -> Step:
    is_more = wanted > state.replicas_wanted
    ordered = replace(
        state,
        replicas_wanted=wanted,
        is_acknowledged=False,
        added_at_s=now_s if is_more else state.added_at_s,
        removed_at_s=state.removed_at_s if is_more else now_s,
        spare_since_s=None,
        idle_since_s=None,
        vetoed_since_s=None,
    )
    return Step(ordered, Action.ADD if is_more else Action.REMOVE, reason)


def _added(load: FleetLoad, pressures: Pressures, state: PilotState, settings: AutopilotSettings, now_s: float) -> Step:
    """Up to what the load calls for."""
    why, called_for = _called_for(load, pressures, state, settings, now_s)
    wanted = min(called_for, state.replicas_wanted + settings.scale_up_step, settings.max_replicas)
    if called_for <= state.replicas_wanted:
        return Step(state)
    if wanted <= state.replicas_wanted:
        return Step(state, reason=f"{why}, and no more than {settings.max_replicas} replicas are allowed")
    is_starting = len(load.replicas) < state.replicas_wanted
    if is_starting and called_for <= state.added_for:
        return Step(state, reason=f"{why}; of {state.replicas_wanted} replicas {len(load.replicas)} are ready")
    if now_s - state.added_at_s < settings.scale_up_cooldown_s:
        return Step(state, reason=f"{why}; replicas were added {now_s - state.added_at_s:.0f} s ago")
    reason = f"replicas {state.replicas_wanted} -> {wanted}: {why}; {called_for} would hold it"
    return _ordered(replace(state, added_for=called_for), wanted, reason, now_s)


def _called_for(
    load: FleetLoad, pressures: Pressures, state: PilotState, settings: AutopilotSettings, now_s: float
) -> tuple[str, int]:
    """Why more is needed, and how many replicas would do, given those that are ready; ("", 0) where they are enough.

    While a ceiling is in force, more is needed from `low_ratio` on: between low and high the budget would never come back. Pools full of
    resident turns need no more while compact ones would fit: these come first, and only what they leave full is a need.
    """
    num_ready = len(load.replicas)
    limit = settings.high_ratio if state.ceiling_tokens is None else settings.low_ratio
    needs = [
        (f"at the full budget working sets are {pressures.full_ratio:.0%} of the pools", pressures.full_ratio, limit)
    ]
    compact_s = now_s - state.compacted_at_s
    if state.compact_above_ratio is not None and compact_s >= settings.scale_up_cooldown_s:
        why = f"live bytes are {pressures.pool_ratio:.0%} of the pools, {compact_s:.0f} s after turns went compact"
        needs.append((why, pressures.pool_ratio, limit))
    found = [(why, math.ceil(num_ready * ratio / settings.target_ratio)) for why, ratio, most in needs if ratio > most]
    if pressures.queue_ratio > settings.queue_high_ratio:
        num_turns = load.num_running + load.num_waiting
        why = f"{load.num_waiting} turns wait for {load.num_places} places"
        found.append((why, max(num_ready + 1, math.ceil(num_ready * num_turns / load.num_places))))
    return max(found, key=lambda need: need[1], default=("", 0))


def _removed(snapshot: Snapshot, load: FleetLoad, state: PilotState, settings: AutopilotSettings, now_s: float) -> Step:
    """Down by a step, or to zero, when that has been possible for long enough and no warm conversation would be lost to it."""
    is_settled = snapshot.is_whole and len(load.replicas) <= state.replicas_wanted and state.ceiling_tokens is None
    is_idle = load.num_running + load.num_waiting == 0 and snapshot.in_flight == 0
    fewest = max(1, settings.min_replicas, state.replicas_wanted - settings.scale_down_step)
    fitting = [n for n in range(fewest, state.replicas_wanted) if _fits(load, n, settings)] if is_settled else []
    state = replace(
        state,
        spare_since_s=_since(state.spare_since_s, bool(fitting), now_s),
        idle_since_s=_since(state.idle_since_s, is_settled and is_idle, now_s),
    )
    if state.spare_since_s is not None:
        wanted, held_s, hold_s = fitting[0], now_s - state.spare_since_s, settings.scale_down_hold_s
    elif settings.min_replicas == 0 and state.replicas_wanted == 1 and state.idle_since_s is not None:
        wanted, held_s, hold_s = 0, now_s - state.idle_since_s, settings.idle_to_zero_s
    else:  # patience goes on over data that cannot be believed, not over a load that has come back
        return Step(replace(state, vetoed_since_s=None) if is_settled else state)
    changed_at_s = max(state.added_at_s, state.removed_at_s)
    if held_s < hold_s or now_s - changed_at_s < settings.scale_down_cooldown_s:
        return Step(state)
    return _unless_warm(load, wanted, held_s, state, settings, now_s)


def _unless_warm(
    load: FleetLoad, wanted: int, held_s: float, state: PilotState, settings: AutopilotSettings, now_s: float
) -> Step:
    """A removal, put off while idle conversations have no room elsewhere, until patience is over. Which replica goes is Serve's choice,
    so all of them count."""
    room_bytes = load.warm_room_bytes(wanted)
    vetoed_since_s = _since(state.vetoed_since_s, load.warm_bytes > room_bytes, now_s)
    why = "nothing arrives" if wanted == 0 else f"{wanted} would hold the load"
    if vetoed_since_s is not None and now_s - vetoed_since_s < settings.warm_patience_s:
        reason = (
            f"replicas stay {state.replicas_wanted}, though {why}: {load.warm_bytes} bytes of idle conversations, "
            f"room for {max(0, room_bytes)} elsewhere"
        )
        return Step(replace(state, vetoed_since_s=vetoed_since_s), reason=reason)
    return _ordered(state, wanted, f"replicas {state.replicas_wanted} -> {wanted}: {why}, for {held_s:.0f} s", now_s)


def _fits(load: FleetLoad, num_replicas: int, settings: AutopilotSettings) -> bool:
    """Whether so many replicas would stay under the target, at the full budget."""
    share = num_replicas / len(load.replicas) * settings.target_ratio
    full_bytes = load.demand_bytes(load.rungs(settings.budget_floor_tokens)[-1])
    return (
        max(full_bytes, load.live_bytes) <= share * load.capacity_bytes
        and load.num_running + load.num_waiting <= share * load.num_places
        and load.num_waiting <= settings.queue_low_ratio * load.num_places
    )


def _since(since_s: float | None, is_so: bool, now_s: float) -> float | None:
    """Since when something has been so without a break."""
    if not is_so:
        return None
    return now_s if since_s is None else since_s
