"""What Prometheus saw of a live run of the autopilot, and what it says about the autopilot's claims. Knows no load and no picture.

Moments are taken from Prometheus' samples alone, never from what the autopilot says it did: the threshold is crossed when one of the
three ratios that it decides by is first above its limit in the recorded series.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.cluster.prometheus import Prometheus
from monitoring import catalogue as c

TIGHTEN_S_MAX = 5.0  # from the crossing to a tighter ceiling at a replica
_STALE_S = 2.5  # older than this, a sample is of a time when nothing was scraped
_CAPACITY = f"sum({c.KV_CAPACITY.name})"


def _rate(name: str) -> str:
    return f"rate({name}[10s])"


QUERIES: Mapping[str, str] = {
    "active": f'sum({c.KV_BYTES.name}{{tier="device",kind="active"}}) / {_CAPACITY}',
    "warm": f'sum({c.KV_BYTES.name}{{tier="device",kind="warm"}}) / {_CAPACITY}',
    "shared": f'sum({c.KV_BYTES.name}{{tier="device",kind="shared"}}) / {_CAPACITY}',
    "compressed": f'sum({c.KV_WORKING_SET.name}{{state="active"}}) / {_CAPACITY}',
    "full": f'sum({c.KV_DEMAND.name}{{state="active",budget_tokens="full"}}) / {_CAPACITY}',
    "waiting_ratio": f"sum({c.TURNS_WAITING.name}) / sum({c.TURNS_MAX.name})",
    "running": f"sum({c.TURNS_RUNNING.name})",
    "waiting": f"sum({c.TURNS_WAITING.name})",
    "ceiling": f"min({c.BUDGET_CEILING.name})",
    "ceiling_highest": f"max({c.BUDGET_CEILING.name})",
    "budget_max": f"max({c.BUDGET_MAX.name})",
    "ready": f"sum({c.REPLICA_UP.name})",
    "wanted": f"max({c.AUTOPILOT_REPLICAS_WANTED.name})",
    "holding": f"max({c.AUTOPILOT_HOLDING.name})",
    "holds": f"sum({c.AUTOPILOT_HOLDS.name})",
    "ttft_p95_s": f"histogram_quantile(0.95, sum by (le) ({_rate(c.TTFT.name + '_bucket')}))",
    "gap_mean_s": f"sum({_rate(c.INTER_TOKEN.name + '_sum')}) / sum({_rate(c.INTER_TOKEN.name + '_count')})",
    "tokens_per_s": f"sum({_rate(c.GENERATED_TOKENS.name)})",
    "failed": f'sum({c.TURNS.name}{{reason="error"}}) or vector(0)',
}


@dataclass(frozen=True, slots=True)
class Limits:
    """The thresholds that the autopilot was given."""

    high_ratio: float
    queue_high_ratio: float


@dataclass(frozen=True, slots=True)
class Recording:
    """One value a second of every query, from the beginning of the load on; NaN where nothing was scraped."""

    series: Mapping[str, tuple[float, ...]]

    def __getitem__(self, name: str) -> tuple[float, ...]:
        return self.series[name]

    def __len__(self) -> int:
        return len(self.series["ready"])


@dataclass(frozen=True, slots=True)
class Moments:
    """When what happened, in seconds from the beginning of the load; None: never."""

    crossed_s: int | None
    crossed_by: str  # the first signal above its limit
    tightened_s: int | None  # a replica has a lower ceiling
    tightest_tokens: int | None
    wanted_s: int | None  # more replicas are wanted
    ready_s: int | None  # more replicas are ready
    most_ready: int
    restored_s: int | None  # from here on, no replica has a ceiling below its own budget
    shrunk_s: int | None  # from here on, as few replicas as at the beginning


@dataclass(frozen=True, slots=True)
class View:
    """What `GET /v1/autopilot` and `/metrics` said at one moment."""

    at_s: float
    status: int
    holding_cause: str | None
    wanted: tuple[int | None, int] | None  # budget ceiling, replicas
    holding_gauge: float | None  # of the metrics page itself, read without Prometheus


@dataclass(frozen=True, slots=True)
class Outcome:
    """What clients saw of the whole run."""

    num_turns: int
    num_failed: int
    num_cut: int  # the load was over; nobody's fault
    failures: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Check:
    """One claim about a run, and what was found."""

    name: str
    passed: bool
    finding: str


def record(prometheus: Prometheus, *, start: float, num_s: int) -> Recording:
    """Ask Prometheus for all of it, after the run."""
    ages = prometheus.one("time() - max(timestamp(up))", start=start, num_steps=num_s)
    fresh = [not math.isnan(age) and age <= _STALE_S for age in ages]
    found = {name: prometheus.one(query, start=start, num_steps=num_s) for name, query in QUERIES.items()}
    return Recording(
        {
            name: tuple(value if is_fresh else math.nan for value, is_fresh in zip(values, fresh, strict=True))
            for name, values in found.items()
        }
    )


def moments(recording: Recording, limits: Limits) -> Moments:
    """When what happened."""
    crossed_s, crossed_by = _crossing(recording, limits)
    budget_max = max(_known(recording["budget_max"]), default=math.inf)
    ceilings = recording["ceiling"]
    since = 0 if crossed_s is None else crossed_s
    ready_before = _last_known(recording["ready"][: since + 1])
    tightened_s = _first(ceilings, lambda ceiling: ceiling < budget_max)
    return Moments(
        crossed_s=crossed_s,
        crossed_by=crossed_by,
        tightened_s=tightened_s,
        tightest_tokens=None if tightened_s is None else int(min(_known(ceilings))),
        wanted_s=_first(recording["wanted"], lambda wanted: wanted > ready_before),
        ready_s=_first(recording["ready"], lambda ready: ready > ready_before),
        most_ready=int(max(_known(recording["ready"]), default=0)),
        restored_s=None if tightened_s is None else _for_good(ceilings, lambda ceiling: ceiling >= budget_max),
        shrunk_s=_for_good(recording["ready"], lambda ready: ready <= ready_before),
    )


def checks_on(recording: Recording, limits: Limits, outcome: Outcome) -> tuple[Check, ...]:
    """The claims about a run with the autopilot on."""
    found = moments(recording, limits)
    return (
        _check_tightened(found),
        _check_follow(found, len(recording)),
        _check_restored(found),
        _check_shrunk(found),
        check_failures(recording, outcome),
    )


def checks_off(recording: Recording, limits: Limits, outcome: Outcome) -> tuple[Check, ...]:
    """Without the autopilot the threshold is crossed too, and nothing follows: else the other runs show nothing."""
    found = moments(recording, limits)
    is_still = found.tightened_s is None and found.ready_s is None
    return (
        Check("threshold is crossed", found.crossed_s is not None, _crossed(found)),
        Check("nothing follows", is_still, "budget and replicas stayed" if is_still else "something changed"),
        check_failures(recording, outcome),
    )


def checks_outage(recording: Recording, views: Sequence[View], outage: tuple[float, float]) -> tuple[Check, ...]:
    """The claims about the time without Prometheus; `outage` is when it was stopped and when it was back."""
    begin_s, end_s = outage
    during = [view for view in views if begin_s + 3 <= view.at_s <= end_s - 1]
    said = [view for view in during if view.status == 200 and view.holding_cause == "source"]
    gauges = [view.holding_gauge for view in during if view.holding_gauge is not None]
    wanted = {view.wanted for view in during}
    after = [view for view in views if view.at_s > end_s and view.status == 200 and view.holding_cause is None]
    holds = _known(recording["holds"])
    counted = max(holds) - min(holds) if holds else 0
    return (
        Check(
            "it says that it holds",
            bool(during) and len(said) == len(during),
            f"GET /v1/autopilot named the source as the cause in {len(said)} of {len(during)} looks",
        ),
        Check(
            "its metrics say so",
            bool(gauges) and min(gauges) == 1.0 and counted > 0,
            f"the gauge was 1 in {sum(gauge == 1.0 for gauge in gauges)} of {len(gauges)} looks, {counted:.0f} rounds were counted as held",
        ),
        Check("it holds", len(wanted) == 1 and None not in wanted, f"wanted all the time: {sorted(map(str, wanted))}"),
        Check(
            "it recovers",
            bool(after) and recording["holding"][-1] == 0.0,
            f"first round on fresh data {after[0].at_s - end_s:.0f} s after Prometheus was back" if after else "never",
        ),
    )


def check_failures(recording: Recording, outcome: Outcome) -> Check:
    """Neither a client nor an engine saw a turn fail."""
    engine_errors = max(_known(recording["failed"]), default=math.nan)
    told = f"{outcome.num_failed} of {outcome.num_turns} turns failed, {engine_errors:.0f} ended in error at an engine"
    passed = outcome.num_turns > 0 and outcome.num_failed == 0 and engine_errors == 0
    return Check("no turn fails", passed, "; ".join([told, *outcome.failures[:3]]))


def _check_tightened(found: Moments) -> Check:
    name = f"budget tightens within {TIGHTEN_S_MAX:g} s"
    if found.crossed_s is None or found.tightened_s is None:
        return Check(name, False, f"{_crossed(found)}; tightened at {found.tightened_s}")
    delay_s = found.tightened_s - found.crossed_s
    finding = f"{_crossed(found)}; tighter {delay_s} s later, at last to {found.tightest_tokens} tokens"
    return Check(name, 0 <= delay_s <= TIGHTEN_S_MAX, finding)


def _check_follow(found: Moments, num_s: int) -> Check:
    passed = found.crossed_s is not None and found.wanted_s is not None and found.ready_s is not None
    if not passed:
        return Check("replicas follow", False, f"in {num_s} s none came; most ready: {found.most_ready}")
    assert found.crossed_s is not None and found.wanted_s is not None and found.ready_s is not None
    finding = (
        f"wanted {found.wanted_s - found.crossed_s} s after the crossing, first one seen ready after "
        f"{found.ready_s - found.crossed_s} s, {found.most_ready} at most"
    )
    return Check("replicas follow", found.crossed_s <= found.wanted_s <= found.ready_s, finding)


def _check_restored(found: Moments) -> Check:
    passed = found.restored_s is not None
    finding = f"in full from {found.restored_s} s on" if passed else "a ceiling was still in force at the end"
    return Check("budget comes back", passed, finding)


def _check_shrunk(found: Moments) -> Check:
    passed = found.ready_s is not None and found.shrunk_s is not None and found.shrunk_s > found.ready_s
    finding = (
        f"as few as at the beginning from {found.shrunk_s} s on" if passed else "not as few as at the beginning again"
    )
    return Check("replicas go again", passed, finding)


def _crossed(found: Moments) -> str:
    if found.crossed_s is None:
        return "no threshold was crossed"
    return f"{found.crossed_by} crossed its threshold at {found.crossed_s} s"


def _crossing(recording: Recording, limits: Limits) -> tuple[int | None, str]:
    live = [active + shared for active, shared in zip(recording["active"], recording["shared"], strict=True)]
    signals = {
        "working sets": (recording["compressed"], limits.high_ratio),
        "live bytes": (live, limits.high_ratio),
        "waiting turns": (recording["waiting_ratio"], limits.queue_high_ratio),
    }
    firsts = {name: _first(values, lambda value, most=most: value > most) for name, (values, most) in signals.items()}
    crossed = {name: first for name, first in firsts.items() if first is not None}
    if not crossed:
        return None, ""
    name = min(crossed, key=lambda name: crossed[name])
    return crossed[name], name


def _first(values: Sequence[float], holds: Callable[[float], bool]) -> int | None:
    return next((index for index, value in enumerate(values) if not math.isnan(value) and holds(value)), None)


def _for_good(values: Sequence[float], holds: Callable[[float], bool]) -> int | None:
    """Where the last run of values that hold begins; None if the last known one does not."""
    begin = None
    for index, value in enumerate(values):
        if math.isnan(value):
            continue
        begin = (index if begin is None else begin) if holds(value) else None
    return begin


def _known(values: Sequence[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _last_known(values: Sequence[float]) -> float:
    return next((value for value in reversed(values) if not math.isnan(value)), math.nan)
