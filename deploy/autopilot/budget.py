"""The fast actuator: the budget's ceiling, within seconds. Pure.

Above a high threshold it goes down at once, to the largest rung whose working sets stay under the target; below the low ones, for a
hold, up by one rung, where the working sets stay under the target there too. Bytes are a reason only where a lower budget frees some:
what resident turns hold, no budget does.
"""

from dataclasses import dataclass, replace

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
    pressed = _pressed(load, rungs, level, pressures, settings)
    if pressed is not None:
        return _tightened(pressed, level, replace(state, calm_since_s=None), settings, now_s)
    if level == rungs[-1]:
        return Step(replace(state, calm_since_s=None), reason=_no_cure(pressures, settings))
    is_roomy = max(pressures.compressed_ratio, pressures.pool_ratio) <= settings.low_ratio
    is_calm = pressures.queue_ratio <= settings.queue_low_ratio and (is_roomy or not load.frees(rungs[-1], level))
    if not (is_calm and snapshot.is_whole):
        return Step(replace(state, calm_since_s=None), reason=_no_cure(pressures, settings))
    calm_since_s = now_s if state.calm_since_s is None else state.calm_since_s
    return _relaxed(load, rungs, level, replace(state, calm_since_s=calm_since_s), settings, now_s)


@dataclass(frozen=True, slots=True)
class _Pressure:
    """Why the budget should be lower, and which it should be; None: a lower one is not to be had, or does not help."""

    why: str
    rung: int | None


def _pressed(
    load: FleetLoad, rungs: tuple[int, ...], level: int, pressures: Pressures, settings: AutopilotSettings
) -> _Pressure | None:
    """What speaks for a lower budget; None: nothing does.

    For bytes it is the largest rung under the target, else the largest that frees all there is to free. For a queue, which a quicker decode
    shortens, one rung.
    """
    lower = [rung for rung in rungs if rung < level]
    at_floor = f", with the budget at its floor of {level}"
    found: _Pressure | None = None
    if pressures.compressed_ratio > settings.high_ratio:
        why = f"working sets are {pressures.compressed_ratio:.0%} of the pools, over {settings.high_ratio:.0%}"
        if lower and load.frees(level, lower[0]):
            fitting = [r for r in lower if load.demand_bytes(r) <= settings.target_ratio * load.capacity_bytes]
            as_good_as_least = [r for r in lower if load.demand_bytes(r) <= load.demand_bytes(lower[0])]
            return _Pressure(why, max(fitting or as_good_as_least))
        found = _Pressure(why + ("; a lower budget would free hardly any of it" if lower else at_floor), None)
    if pressures.queue_ratio > settings.queue_high_ratio:
        why = f"{pressures.queue_ratio:.0%} of the places are waited for, over {settings.queue_high_ratio:.0%}"
        if lower:
            return _Pressure(why, lower[-1])
        found = found or _Pressure(why + at_floor, None)
    return found


def _no_cure(pressures: Pressures, settings: AutopilotSettings) -> str:
    """What is said of pools that are full of resident turns; empty where they are not full."""
    if pressures.pool_ratio <= settings.high_ratio:
        return ""
    live = f"live bytes are {pressures.pool_ratio:.0%} of the pools, over {settings.high_ratio:.0%}"
    return f"{live}; no budget frees them: compact, these turns would hold {pressures.compressed_ratio:.0%}"


def _tightened(pressed: _Pressure, level: int, state: PilotState, settings: AutopilotSettings, now_s: float) -> Step:
    """Down to the rung that is called for, unless the last step down is too short a time ago to show."""
    if pressed.rung is None:
        return Step(state, reason=pressed.why)
    if now_s - state.tightened_at_s < settings.tighten_cooldown_s:
        return Step(state, reason=f"{pressed.why}; the budget was tightened {now_s - state.tightened_at_s:.1f} s ago")
    is_regret = now_s - state.relaxed_at_s < 2 * _relax_hold_s(state, settings)
    tight = replace(
        state,
        ceiling_tokens=pressed.rung,
        tightened_at_s=now_s,
        num_regrets=min(_REGRETS_MAX, state.num_regrets + 1) if is_regret else state.num_regrets,
    )
    return Step(tight, Action.TIGHTEN, f"budget {level} -> {pressed.rung}: {pressed.why}")


def _relaxed(
    load: FleetLoad, rungs: tuple[int, ...], level: int, state: PilotState, settings: AutopilotSettings, now_s: float
) -> Step:
    """Up by one rung, where it has been calm for the hold and stays so."""
    assert state.calm_since_s is not None
    hold_s = _relax_hold_s(state, settings)
    above = next(rung for rung in rungs if rung > level)
    if now_s - state.calm_since_s < hold_s:
        return Step(state)
    predicted = load.demand_bytes(above) / load.capacity_bytes
    if predicted > settings.target_ratio and load.frees(rungs[-1], level):
        return Step(
            state, reason=f"budget stays {level}: at {above} working sets would be {predicted:.0%} of the pools"
        )
    has_been_quiet = now_s - state.tightened_at_s > 4 * hold_s
    loose = replace(
        state,
        ceiling_tokens=None if above == rungs[-1] else above,
        relaxed_at_s=now_s,
        calm_since_s=now_s,  # every rung waits anew
        num_regrets=max(0, state.num_regrets - 1) if has_been_quiet else state.num_regrets,
    )
    reason = (
        f"budget {level} -> {above}: calm for {now_s - state.calm_since_s:.0f} s, working sets would be {predicted:.0%}"
    )
    return Step(loose, Action.RELAX, reason)


def _relax_hold_s(state: PilotState, settings: AutopilotSettings) -> float:
    """Longer with every relaxation that was soon taken back: what a tight budget itself brought about is not tried again and again."""
    return settings.relax_hold_s * float(2**state.num_regrets)


def level_of(rungs: tuple[int, ...], ceiling_tokens: int | None) -> int:
    """The budget that a ceiling comes to."""
    return rungs[-1] if ceiling_tokens is None else min(max(ceiling_tokens, rungs[0]), rungs[-1])
