"""The actuator between the two: whether turns that are admitted are compact, so that they hold on the device what they chose. Pure.

Resident turns are quicker, so turns are resident while there is room for all of their tokens. An engine whose pool is full makes turns
compact by itself; this comes before: where all tokens of all turns would take more than `low_ratio` of the pools, and would take less
compact. Back below `target_ratio`, for a hold, and after the budget: a tight one makes turns quicker, so that fewer are there than would
be without it. Running turns stay as they are, so nothing is moved for it.
"""

from dataclasses import replace

from deploy.autopilot.budget import level_of
from deploy.autopilot.records import Action, PilotState, Pressures, Step
from deploy.autopilot.settings import AutopilotSettings
from deploy.autopilot.signals import FleetLoad, Snapshot

COMPACT_ABOVE_RATIO = 0.0  # ordered where turns go compact: every turn that may be; else nothing is ordered


def choose_form(
    snapshot: Snapshot,
    load: FleetLoad,
    pressures: Pressures,
    state: PilotState,
    settings: AutopilotSettings,
    now_s: float,
) -> Step:
    """How the turns of the next seconds are admitted."""
    if not load.replicas:
        return Step(replace(state, roomy_since_s=None))
    if state.compact_above_ratio is None:
        return _compact(load, pressures, replace(state, roomy_since_s=None), settings, now_s)
    is_roomy = pressures.whole_ratio <= settings.target_ratio and state.ceiling_tokens is None and snapshot.is_whole
    if not is_roomy:
        return Step(replace(state, roomy_since_s=None))
    since_s = now_s if state.roomy_since_s is None else state.roomy_since_s
    if now_s - since_s < settings.relax_hold_s:
        return Step(replace(state, roomy_since_s=since_s))
    reason = f"turns are resident: for {now_s - since_s:.0f} s all tokens have been at most {settings.target_ratio:.0%} of the pools"
    return Step(replace(state, compact_above_ratio=None, roomy_since_s=None), Action.RESIDENT, reason)


def _compact(
    load: FleetLoad, pressures: Pressures, state: PilotState, settings: AutopilotSettings, now_s: float
) -> Step:
    """From resident to compact, where there is reason to, and something to be had by it."""
    if pressures.whole_ratio <= settings.low_ratio:
        return Step(state)
    why = f"all tokens are {pressures.whole_ratio:.0%} of the pools, over {settings.low_ratio:.0%}"
    level = level_of(load.rungs(settings.budget_floor_tokens), state.ceiling_tokens)
    if not load.frees(None, level):
        return Step(state, reason=f"{why}, and compact turns would take no less")
    since_s = now_s - state.compacted_at_s
    if since_s < settings.tighten_cooldown_s:
        return Step(state, reason=f"{why}; turns were to go compact {since_s:.1f} s ago")
    compacted = replace(state, compact_above_ratio=COMPACT_ABOVE_RATIO, compacted_at_s=now_s)
    return Step(
        compacted, Action.COMPACT, f"turns go compact: {why}; compact they would be {pressures.compressed_ratio:.0%}"
    )
