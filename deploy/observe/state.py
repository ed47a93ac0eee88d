"""One moment of the fleet, read out of samples of the catalogue's metrics, and what the page shows of it. Pure.

samples -> Moment          gauges by replica, and the odometer's counts
two Moments -> point       one place on the page's time axis
Moments of a minute        tokens reused, failures, time to first token by turn number
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploy.observe.counting import CountKey, Counts, Odometer, SampleLike, difference, quantile
from monitoring.catalogue import (
    AUTOPILOT_DECISIONS,
    AUTOPILOT_REPLICAS_WANTED,
    BUDGET_CEILING,
    BUDGET_IN_FORCE,
    BUDGET_MAX,
    BUILD_INFO,
    KV_BYTES,
    KV_CAPACITY,
    PROMPT_TOKENS,
    REJECTIONS,
    REPLICA_UP,
    REUSED_TOKENS,
    SESSIONS,
    STEP_TOKENS,
    TTFT,
    TURN_BUCKETS,
    TURNS,
    TURNS_RUNNING,
    TURNS_WAITING,
    Metric,
    Origin,
    turn_bucket,
)

KINDS = ("active", "shared", "warm", "cached", "free")  # of the pool, as they are stacked
TURN_LABELS = (*(turn_bucket(first) for first, _ in TURN_BUCKETS), turn_bucket(TURN_BUCKETS[-1][1] + 1))
FAILED = "error"  # the label `reason` of a turn that the engine could not end
_TTFT_BUCKETS = TTFT.series[0]
_COUNTED = (STEP_TOKENS, PROMPT_TOKENS, REUSED_TOKENS, TURNS, REJECTIONS)
_PHASES = ("prefill", "decode")  # counted with every step; generated tokens count when a turn ends, in one leap
_GAUGES = (
    *(KV_BYTES, KV_CAPACITY, BUDGET_IN_FORCE, BUDGET_CEILING, BUDGET_MAX, BUILD_INFO, REPLICA_UP),
    *(TURNS_RUNNING, TURNS_WAITING, SESSIONS),
    *(AUTOPILOT_DECISIONS, AUTOPILOT_REPLICAS_WANTED),
)
COUNTED_SERIES = frozenset({_TTFT_BUCKETS, *(metric.name for metric in _COUNTED)})
WATCHED_SERIES = COUNTED_SERIES | {metric.name for metric in _GAUGES}  # all that a moment is made of
LABELS = frozenset({"le", *(label for metric in (TTFT, *_COUNTED, *_GAUGES) for label in metric.all_labels)})


@dataclass(frozen=True, slots=True)
class ReplicaNow:
    """One replica's gauges. A number that it does not report is None."""

    name: str
    is_up: bool
    kv_bytes: Mapping[str, float]  # of the device, by kind
    capacity_bytes: float
    budget_tokens: float | None
    ceiling_tokens: float | None
    budget_max_tokens: float | None
    num_running: float
    num_waiting: float
    sessions: Mapping[str, float]  # by state

    def kv_shares(self) -> tuple[float, ...]:
        """The pool by kind, in the order of `KINDS`, 0 to 1."""
        total = self.capacity_bytes or sum(self.kv_bytes.values())
        return tuple(round(self.kv_bytes.get(kind, 0.0) / total, 4) if total else 0.0 for kind in KINDS)


@dataclass(frozen=True, slots=True)
class Moment:
    """The fleet at one time."""

    unix_time: float
    model: str
    replicas: tuple[ReplicaNow, ...]
    replicas_wanted: float | None  # None: no autopilot
    counts: Counts


def read_moment(unix_time: float, samples: Iterable[SampleLike], odometer: Odometer) -> Moment:
    """The moment that samples show; moves the odometer on."""
    watched = [sample for sample in samples if sample.name in WATCHED_SERIES]
    by_replica: dict[str, list[SampleLike]] = {}
    for sample in watched:
        if replica := sample.labels.get(Origin.ENGINE, ""):
            by_replica.setdefault(replica, []).append(sample)
    counted = [sample for sample in watched if sample.name in COUNTED_SERIES]
    has_decided = bool(_largest(watched, AUTOPILOT_DECISIONS))  # its gauge is 0 before
    return Moment(
        unix_time=unix_time,
        model=next((s.labels.get("model_name", "") for s in watched if s.name == BUILD_INFO.name), ""),
        replicas=tuple(_replica(name, by_replica[name]) for name in sorted(by_replica)),
        replicas_wanted=_largest(watched, AUTOPILOT_REPLICAS_WANTED) if has_decided else None,
        counts=odometer.read(counted, source_label=Origin.ENGINE),
    )


def _replica(name: str, samples: Sequence[SampleLike]) -> ReplicaNow:
    return ReplicaNow(
        name=name,
        is_up=_largest(samples, REPLICA_UP) != 0.0,
        kv_bytes={s.labels.get("kind", ""): s.value for s in samples if s.name == KV_BYTES.name and _is_on_device(s)},
        capacity_bytes=_largest(samples, KV_CAPACITY) or 0.0,
        budget_tokens=_largest(samples, BUDGET_IN_FORCE),
        ceiling_tokens=_largest(samples, BUDGET_CEILING),
        budget_max_tokens=_largest(samples, BUDGET_MAX),
        num_running=_largest(samples, TURNS_RUNNING) or 0.0,
        num_waiting=_largest(samples, TURNS_WAITING) or 0.0,
        sessions={s.labels.get("state", ""): s.value for s in samples if s.name == SESSIONS.name},
    )


def _is_on_device(sample: SampleLike) -> bool:
    return sample.labels.get("tier", "device") == "device"  # what was recorded without a tier was the device's


def _largest(samples: Iterable[SampleLike], metric: Metric) -> float | None:
    return max((sample.value for sample in samples if sample.name == metric.name), default=None)


def point(moment: Moment, *, previous: Moment | None, rate_base: Moment | None) -> dict[str, Any]:
    """One place on the time axis, as JSON. `previous` is the moment before; rates are since `rate_base`. None: no such moment."""
    rates: dict[str, float | None] = dict.fromkeys(_PHASES)
    if rate_base is not None and moment.unix_time > rate_base.unix_time:
        counted = difference(moment.counts, rate_base.counts)
        past_s = moment.unix_time - rate_base.unix_time
        rates = {phase: round(_count(counted, STEP_TOKENS, phase=phase) / past_s, 2) for phase in _PHASES}
    num_up = sum(replica.is_up for replica in moment.replicas)
    return {
        "t": round(moment.unix_time, 3),
        "tokens_per_s": rates,
        "failed": _failed(moment, previous),
        "running": sum(replica.num_running for replica in moment.replicas),
        "waiting": sum(replica.num_waiting for replica in moment.replicas),
        "budget": _least(replica.budget_tokens for replica in moment.replicas),
        "ceiling": _least(replica.ceiling_tokens for replica in moment.replicas),
        "wanted": moment.replicas_wanted,
        "ready": num_up,
        "kv": {replica.name: replica.kv_shares() for replica in moment.replicas},
    }


def now(moment: Moment, earlier: Moment) -> dict[str, Any]:
    """The present numbers, as JSON; what is counted, since `earlier`."""
    counted = difference(moment.counts, earlier.counts)
    prompt = _count(counted, PROMPT_TOKENS)
    return {
        "at": round(moment.unix_time, 3),
        "model": moment.model,
        "window_s": round(moment.unix_time - earlier.unix_time, 1),
        "reused_share": round(_count(counted, REUSED_TOKENS) / prompt, 4) if prompt else None,
        "turns": _count(counted, TURNS),
        "failed": _failed(moment, earlier),
        "refused": _count(counted, REJECTIONS),
        "ttft": first_token_times(counted),
        "budget_max": _least(replica.budget_max_tokens for replica in moment.replicas),
        "replicas": [_replica_json(replica) for replica in moment.replicas],
    }


def first_token_times(counted: Counts) -> dict[str, Any]:
    """Median and 95th percentile of the time to first token in seconds, of all turns and by turn number; None where there were none."""

    def summary(turn: str | None) -> dict[str, Any]:
        by_bound: dict[float, float] = {}
        for key, value in counted.items():
            if key.name == _TTFT_BUCKETS and turn in (None, key.label("turn")):
                bound = float(key.label("le"))
                by_bound[bound] = by_bound.get(bound, 0.0) + value
        buckets = sorted(by_bound.items())
        num = buckets[-1][1] if buckets else 0.0
        return {"turn": turn, "num": num, "p50": quantile(0.5, buckets), "p95": quantile(0.95, buckets)}

    return {"all": summary(None), "by_turn": [summary(label) for label in TURN_LABELS]}


def _replica_json(replica: ReplicaNow) -> dict[str, Any]:
    return {
        "name": replica.name,
        "up": replica.is_up,
        "kv": replica.kv_shares(),
        "capacity_bytes": replica.capacity_bytes,
        "budget": replica.budget_tokens,
        "ceiling": replica.ceiling_tokens,
        "running": replica.num_running,
        "waiting": replica.num_waiting,
        "sessions": replica.sessions,
    }


def _failed(moment: Moment, earlier: Moment | None) -> float:
    if earlier is None:
        return 0.0
    return _count(difference(moment.counts, earlier.counts), TURNS, reason=FAILED)


def _count(counts: Counts, metric: Metric, **labels: str) -> float:
    def matches(key: CountKey) -> bool:
        return key.name == metric.name and all(key.label(name) == value for name, value in labels.items())

    return sum(value for key, value in counts.items() if matches(key))


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)
