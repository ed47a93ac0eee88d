"""The fast actuator: the budget's ceiling, within seconds. Pure.

Above a high threshold it goes down at once, to the largest rung whose working sets stay under the target; below the low ones, for a
hold, up by one rung, where the working sets stay under the target there too.
"""

from dataclasses import replace

from deploy.autopilot.records import Action, PilotState, Pressures, Step
from deploy.autopilot.settings import AutopilotSettings
from deploy.autopilot.signals import FleetLoad, Snapshot

_REGRETS_MAX = 4  # doublings of relax_hold_s


def choose_budget(
    snapshot: Snapshot,
    load: FleetLoad,
    pressures: Pressures,
    state: PilotState,
    settings: AutopilotSettings,
    now_s: float,
) -> Step:
    """The ceiling of the next seconds."""
    if not load.replicas:
        return Step(replace(state, calm_since_s=None))
    rungs = load.rungs(settings.budget_floor_tokens)
    level = level_of(rungs, state.ceiling_tokens)
    state = replace(state, ceiling_tokens=None if level == rungs[-1] else level)  # within what is now allowed
    why = _above(pressures, settings)
    if why:
        return _tightened(load, rungs, level, why, replace(state, calm_since_s=None), settings, now_s)
    is_calm = (
        max(pressures.compressed_ratio, pressures.pool_ratio) <= settings.low_ratio
        and pressures.queue_ratio <= settings.queue_low_ratio
    )
    if not (is_calm and snapshot.is_whole):
        return Step(replace(state, calm_since_s=None))
    calm_since_s = now_s if state.calm_since_s is None else state.calm_since_s
    return _relaxed(load, rungs, level, replace(state, calm_since_s=calm_since_s), settings, now_s)


def _tightened(
    load: FleetLoad,
    rungs: tuple[int, ...],
    level: int,
    why: str,
    state: PilotState,
    settings: AutopilotSettings,
    now_s: float,
) -> Step:
    """Down to the largest rung under the target; where another pressure is the cause, that is one rung at least."""
    if level == rungs[0]:
        return Step(state, reason=f"{why}, with the budget at its floor of {level}")
    if now_s - state.tightened_at_s < settings.tighten_cooldown_s:
        return Step(state, reason=f"{why}; the budget was tightened {now_s - state.tightened_at_s:.1f} s ago")
    lower = [rung for rung in rungs if rung < level]
    fitting = [rung for rung in lower if load.demand_bytes(rung) <= settings.target_ratio * load.capacity_bytes]
    chosen = max(fitting, default=lower[0])
    is_regret = now_s - state.relaxed_at_s < 2 * _relax_hold_s(state, settings)
    tight = replace(
        state,
        ceiling_tokens=chosen,
        tightened_at_s=now_s,
        num_regrets=min(_REGRETS_MAX, state.num_regrets + 1) if is_regret else state.num_regrets,
    )
    return Step(tight, Action.TIGHTEN, f"budget {level} -> {chosen}: {why}")


def _relaxed(
    load: FleetLoad,
    rungs: tuple[int, ...],
    level: int,
    state: PilotState,
    settings: AutopilotSettings,
    now_s: float,
) -> Step:
    """Up by one rung, where it has been calm for the hold and stays so."""
    assert state.calm_since_s is not None
    hold_s = _relax_hold_s(state, settings)
    if level == rungs[-1] or now_s - state.calm_since_s < hold_s:
        return Step(state)
    chosen = next(rung for rung in rungs if rung > level)
    predicted = load.demand_bytes(chosen) / load.capacity_bytes
    if predicted > settings.target_ratio:
        return Step(
            state, reason=f"budget stays {level}: at {chosen} working sets would be {predicted:.0%} of the pools"
        )
    has_been_quiet = now_s - state.tightened_at_s > 4 * hold_s
    loose = replace(
        state,
        ceiling_tokens=None if chosen == rungs[-1] else chosen,
        relaxed_at_s=now_s,
        calm_since_s=now_s,  # every rung waits anew
        num_regrets=max(0, state.num_regrets - 1) if has_been_quiet else state.num_regrets,
    )
    reason = f"budget {level} -> {chosen}: calm for {now_s - state.calm_since_s:.0f} s, working sets would be {predicted:.0%}"
    return Step(loose, Action.RELAX, reason)


def _relax_hold_s(state: PilotState, settings: AutopilotSettings) -> float:
    """Longer with every relaxation that was soon taken back: what a tight budget itself brought about is not tried again and again."""
    return settings.relax_hold_s * float(2**state.num_regrets)


def level_of(rungs: tuple[int, ...], ceiling_tokens: int | None) -> int:
    """The budget that a ceiling comes to."""
    return rungs[-1] if ceiling_tokens is None else min(max(ceiling_tokens, rungs[0]), rungs[-1])


def _above(pressures: Pressures, settings: AutopilotSettings) -> str:
    """Which of the pressures is above its high threshold, as a sentence; empty: none."""
    high = settings.high_ratio
    if pressures.compressed_ratio > high:
        return f"working sets are {pressures.compressed_ratio:.0%} of the pools, over {high:.0%}"
    if pressures.pool_ratio > high:
        return f"live bytes are {pressures.pool_ratio:.0%} of the pools, over {high:.0%}"
    if pressures.queue_ratio > settings.queue_high_ratio:
        return f"{pressures.queue_ratio:.0%} of the places are waited for, over {settings.queue_high_ratio:.0%}"
    return ""
