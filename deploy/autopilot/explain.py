"""What the autopilot says of itself: a log line where something changes, the metrics, and the page behind `GET /v1/autopilot`."""

import logging
import math
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

from deploy.autopilot.records import Action, Decision
from deploy.autopilot.settings import AutopilotSettings, PilotMode
from deploy.autopilot.signals import Cause, ReplicaCounts, Snapshot
from monitoring import catalogue as c
from monitoring.sinks import MetricSink

ACTUATORS = ("budget", "replicas")
_QUIET = frozenset({Action.KEEP, Action.HOLD})
_REPEAT_S = 30.0  # the same cause is told again after so long


@dataclass(frozen=True, slots=True)
class Round:
    """One round, over."""

    decision: Decision
    snapshot: Snapshot | None
    counts: ReplicaCounts | None
    unix_time: float
    duration_s: float


class Teller:
    """Remembers what it said last, so that nothing is said twice."""

    def __init__(self, name: str, *, sink: MetricSink, log: logging.Logger) -> None:
        self._name = name
        self._sink = sink
        self._log = log
        self._history: deque[Round] = deque(maxlen=1)
        self._last: Round | None = None
        self._said_at = 0.0
        self._said_act: object = None  # the last act that was told
        self._said_hold: Cause | None = None  # the hold that was told, and goes on
        self._said_causes: dict[Cause, float] = {}  # when each cause was told
        self._troubles: dict[str, str] = {}
        # A counter that begins to exist at its first event hides that event from `rate`.
        for actuator in ACTUATORS:
            sink.inc(c.AUTOPILOT_FAILURES, 0.0, actuator=actuator)
        for action in Action:
            sink.inc(c.AUTOPILOT_DECISIONS, 0.0, action=str(action))
        for cause in Cause:
            sink.inc(c.AUTOPILOT_HOLDS, 0.0, cause=str(cause))

    def mode(self, settings: AutopilotSettings) -> None:
        """A round begins in this mode."""
        for mode in PilotMode:
            self._sink.set(c.AUTOPILOT_MODE, float(mode == settings.mode), mode=str(mode))
        self._sink.set(c.AUTOPILOT_REPLICAS_MAX, settings.max_replicas)
        if settings.mode == PilotMode.OFF:
            self._last = None
            self._sink.set(c.AUTOPILOT_HOLDING, 0.0)
            self._sink.set(c.AUTOPILOT_COMPACT, 0.0)

    def failed(self, what: str, detail: str) -> None:
        """Something did not work. Counted every time, said when it begins."""
        if what in ACTUATORS:
            self._sink.inc(c.AUTOPILOT_FAILURES, actuator=what)
        if what not in self._troubles:
            self._log.warning("autopilot %s: %s fails: %s", self._name, what, detail)
        self._troubles[what] = detail

    def works(self, what: str) -> None:
        """It does. Said when it had not."""
        if self._troubles.pop(what, None) is not None:
            self._log.warning("autopilot %s: %s works again", self._name, what)

    def tell(self, done: Round, settings: AutopilotSettings) -> None:
        """A round is over."""
        self._troubles.pop("round", None)
        self._measure(done)
        if self._history.maxlen != settings.history_max:
            self._history = deque(self._history, maxlen=settings.history_max)
        self._last = done
        hold_ended = self._said_hold is not None and done.decision.cause is None
        if hold_ended or self._is_news(done) or done.unix_time - self._said_at >= settings.log_period_s:
            self._history.append(done)
            self._said_at = done.unix_time
            self._log.info("autopilot %s (%s): %s", self._name, settings.mode, _line(done, hold_ended=hold_ended))
        self._said_hold = None if hold_ended else self._said_hold

    def overview(self, settings: AutopilotSettings, *, settings_error: str) -> dict[str, Any]:
        """Everything, as JSON's types."""
        last = self._last
        return {
            "object": "autopilot",
            "id": self._name,
            "mode": settings.mode,
            "settings": asdict(settings),
            "settings_error": settings_error or None,
            "holding": _holding(last),
            "troubles": dict(self._troubles),
            "wanted": None if last is None else _wanted(last),
            "actual": None if last is None else _actual(last),
            "snapshot": None if last is None else _figures(last),
            "last": None if last is None else _decision(last),
            "decisions": [_decision(done) for done in reversed(self._history)],
        }

    def _is_news(self, done: Round) -> bool:
        """Whether there is something to tell: an act, once; a hold when it begins, but one that comes and goes not every time."""
        decision = done.decision
        is_act = bool(set(decision.actions) - _QUIET)
        state = decision.state
        act = (decision.actions, state.ceiling_tokens, state.compact_above_ratio, state.replicas_wanted)
        is_new_act = is_act and act != self._said_act
        self._said_act = act if is_act else self._said_act
        cause = decision.cause
        if cause is None or cause == self._said_hold:
            return is_new_act
        if done.unix_time - self._said_causes.get(cause, -math.inf) < _REPEAT_S:
            return is_new_act
        self._said_hold, self._said_causes[cause] = cause, done.unix_time
        return True

    def _measure(self, done: Round) -> None:
        sink, decision = self._sink, done.decision
        sink.observe(c.AUTOPILOT_ROUND_TIME, done.duration_s)
        for action in decision.actions:
            sink.inc(c.AUTOPILOT_DECISIONS, action=str(action))
        sink.set(c.AUTOPILOT_HOLDING, float(decision.cause is not None))
        if decision.cause is not None:
            sink.inc(c.AUTOPILOT_HOLDS, cause=str(decision.cause))
        sink.set(c.AUTOPILOT_REPLICAS_WANTED, decision.state.replicas_wanted)
        sink.set(c.AUTOPILOT_COMPACT, float(decision.state.compact_above_ratio is not None))
        if done.snapshot is not None:
            sink.set(c.AUTOPILOT_SNAPSHOT_AGE, done.snapshot.age_s)
            sink.set(c.AUTOPILOT_REPLICAS_READY, len(done.snapshot.replicas))
        budget_tokens = _budget_tokens(done)
        if budget_tokens is not None:
            sink.set(c.AUTOPILOT_BUDGET_WANTED, budget_tokens)
        if decision.pressures is not None:
            sink.set(c.AUTOPILOT_PRESSURE, decision.pressures.compressed_ratio, signal="compressed")
            sink.set(c.AUTOPILOT_PRESSURE, decision.pressures.whole_ratio, signal="whole")
            sink.set(c.AUTOPILOT_PRESSURE, decision.pressures.pool_ratio, signal="pool")
            sink.set(c.AUTOPILOT_PRESSURE, decision.pressures.queue_ratio, signal="queue")


def _line(done: Round, *, hold_ended: bool) -> str:
    decision = done.decision
    actions = "+".join(decision.actions)
    if decision.cause is not None:
        return f"{actions} because of {decision.cause}: {decision.reason}"
    pressures = decision.pressures
    numbers = ""
    if pressures is not None:
        numbers = (
            f" [working sets {pressures.compressed_ratio:.0%} of {pressures.whole_ratio:.0%} in full, live {pressures.pool_ratio:.0%}, "
            f"waiting {pressures.queue_ratio:.0%} of places]"
        )
    return f"{'holds no more; ' if hold_ended else ''}{actions}: {decision.reason}{numbers}"


def _budget_tokens(done: Round) -> int | None:
    """The ceiling as a number: without one, the largest budget of the fleet."""
    ceiling = done.decision.state.ceiling_tokens
    if ceiling is None and done.snapshot is not None and done.snapshot.replicas:
        return max(replica.budget_max_tokens for replica in done.snapshot.replicas)
    return ceiling


def _holding(last: Round | None) -> dict[str, str] | None:
    if last is None or last.decision.cause is None:
        return None
    return {"cause": str(last.decision.cause), "detail": last.decision.reason}


def _wanted(last: Round) -> dict[str, Any]:
    state = last.decision.state
    return {
        "budget_ceiling_tokens": state.ceiling_tokens,
        "compact_above_ratio": state.compact_above_ratio,  # null: as each engine has it
        "replicas": state.replicas_wanted,
    }


def _actual(last: Round) -> dict[str, Any]:
    replicas = () if last.snapshot is None else last.snapshot.replicas
    ceilings = {replica.budget_ceiling_tokens for replica in replicas}
    return {
        "budget_ceiling_tokens": sorted(ceiling for ceiling in ceilings if ceiling is not None),
        "compact_above_ratio": sorted({replica.compact_above_ratio for replica in replicas}),
        "replicas": None if last.counts is None else asdict(last.counts),
    }


def _figures(last: Round) -> dict[str, Any] | None:
    snapshot, load, pressures = last.snapshot, last.decision.load, last.decision.pressures
    if snapshot is None or load is None:
        return None
    return {
        "age_s": round(snapshot.age_s, 3),
        "replicas": [replica.replica for replica in snapshot.replicas],
        "missing": snapshot.num_missing,
        "capacity_bytes": load.capacity_bytes,
        "live_bytes": load.live_bytes,
        "warm_bytes": load.warm_bytes,
        "running": load.num_running,
        "waiting": load.num_waiting,
        "places": load.num_places,
        "in_flight": snapshot.in_flight,
        "pressures": None if pressures is None else asdict(pressures),
    }


def _decision(done: Round) -> dict[str, Any]:
    decision = done.decision
    return {
        "unix_time": round(done.unix_time, 3),
        "actions": [str(action) for action in decision.actions],
        "reason": decision.reason,
        "cause": None if decision.cause is None else str(decision.cause),
        **_wanted(done),
        "pressures": None if decision.pressures is None else asdict(decision.pressures),
    }
