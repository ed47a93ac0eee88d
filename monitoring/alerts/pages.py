"""What somebody is woken for: promises that are being broken, and a service that is not there."""

from monitoring.alerts.rule import Group, Rule, Severity
from monitoring.catalogue import AUTOPILOT_REPLICAS_WANTED, REPLICA_UP, REQUESTS, REQUESTS_IN_FLIGHT
from monitoring.objectives import (
    COMPLETION_ROUTES,
    FAST_BURN,
    FIRST_BYTE,
    FIRST_BYTE_S,
    SLOW_BURN,
    SUCCESS,
    BurnWindow,
    Objective,
)
from monitoring.promql import Scope

REQUESTS_MIN = 20  # in the long window: a share of less says little
_NOW = Scope("5m")


def _burns(objective: Objective, window: BurnWindow) -> str:
    """Both windows burn, and enough was asked for to say so."""
    long, short = Scope(window.long), Scope(window.short)
    asked = long.rate(REQUESTS, function="increase", route=COMPLETION_ROUTES)
    parts = [f"{objective.burn(scope)} > {window.factor:g}" for scope in (short, long)]
    return "\nand\n".join([*parts, f"{asked} > {REQUESTS_MIN}"])


def _burn_rule(name: str, objective: Objective, window: BurnWindow, holds_for: str, what: str) -> Rule:
    return Rule(
        name,
        Severity.PAGE,
        _burns(objective, window),
        holds_for,
        f"{what}: the budget of a month is used up {window.factor:g} times too fast.",
        f"{what}, more than {objective.budget_ratio * window.factor:.1%} of requests over {window.long} and still over "
        f"{window.short}; {objective.budget_ratio:.1%} are allowed.",
    )


_SLOW, _FAILED = f"First bytes come later than {FIRST_BYTE_S:g} s", "Completion requests fail through our fault"

PAGES = (
    Group(
        "loopserve-objectives",
        (
            _burn_rule("LoopServeFirstByteBurnsFast", FIRST_BYTE, FAST_BURN, "2m", _SLOW),
            _burn_rule("LoopServeFirstByteBurnsSlowly", FIRST_BYTE, SLOW_BURN, "15m", _SLOW),
            _burn_rule("LoopServeFailuresBurnFast", SUCCESS, FAST_BURN, "2m", _FAILED),
            _burn_rule("LoopServeFailuresBurnSlowly", SUCCESS, SLOW_BURN, "15m", _FAILED),
        ),
    ),
    Group(
        "loopserve-presence",
        (
            Rule(
                "LoopServeNoReplicas",
                Severity.PAGE,
                f"(\n  {_NOW.now(REPLICA_UP)} < 1\n  or\n  absent({REPLICA_UP.name})\n)\n"
                f"unless on ()\n{_NOW.now(AUTOPILOT_REPLICAS_WANTED, fold='max')} == 0",
                "1m",
                "No replica can answer.",
                "No replica reports an engine that makes progress, and the autopilot has not scaled to zero.",
            ),
            Rule(
                "LoopServeMetricsAbsent",
                Severity.PAGE,
                f"absent({REQUESTS_IN_FLIGHT.name})",
                "5m",
                "No ingress of LoopServe is scraped.",
                "Prometheus has no series from any ingress: the service is down, or its target is gone. No other alert can see anything.",
            ),
        ),
    ),
)
