"""What the autopilot sees, decides and does: signals, both actuators, and when it holds."""

from monitoring.catalogue import (
    AUTOPILOT_BUDGET_WANTED,
    AUTOPILOT_COMPACT,
    AUTOPILOT_DECISIONS,
    AUTOPILOT_FAILURES,
    AUTOPILOT_HOLDING,
    AUTOPILOT_HOLDS,
    AUTOPILOT_MODE,
    AUTOPILOT_PRESSURE,
    AUTOPILOT_REPLICAS_MAX,
    AUTOPILOT_REPLICAS_READY,
    AUTOPILOT_REPLICAS_WANTED,
    AUTOPILOT_ROUND_TIME,
    AUTOPILOT_SNAPSHOT_AGE,
    BUDGET_IN_FORCE,
    REPLICA_UP,
)
from monitoring.dashboards.panels import (
    COUNT,
    HERE,
    PER_SECOND,
    SECONDS,
    SHARE,
    Board,
    Query,
    Row,
    lines,
    number,
    percentiles,
)
from monitoring.promql import or_zero

_NOW = Row(
    "Now",
    (
        number(
            "Mode",
            "off: nothing is read. dry-run: decides and says so. on: acts.",
            COUNT,
            Query(f"{HERE.now(AUTOPILOT_MODE, by=('mode',), fold='max')} == 1", "{{mode}}"),
            by_name=True,
        ),
        number(
            "Replicas wanted",
            "Decided last.",
            COUNT,
            Query(HERE.now(AUTOPILOT_REPLICAS_WANTED, fold="max"), "wanted"),
        ),
        number(
            "Replicas ready",
            "In the last snapshot.",
            COUNT,
            Query(HERE.now(AUTOPILOT_REPLICAS_READY, fold="max"), "ready"),
        ),
        number(
            "Budget wanted",
            "Ceiling decided last, in tokens a KV head.",
            COUNT,
            Query(HERE.now(AUTOPILOT_BUDGET_WANTED, fold="max"), "tokens"),
        ),
        number(
            "Holding",
            "1 while the data cannot be trusted and nothing is decided.",
            COUNT,
            Query(HERE.now(AUTOPILOT_HOLDING, fold="max"), "holding"),
            steps=((1.0, "red"),),
        ),
        number(
            "Age of its data",
            "Of the snapshot decided on last.",
            SECONDS,
            Query(HERE.now(AUTOPILOT_SNAPSHOT_AGE, fold="max"), "age"),
        ),
    ),
)

_STEERING = Row(
    "Steering",
    (
        lines(
            "Both actuators",
            "Under pressure turns go compact, the budget goes down within seconds, and replicas are added within minutes; as they come, "
            "it recovers.",
            COUNT,
            Query(HERE.now(AUTOPILOT_REPLICAS_WANTED, fold="max"), "replicas wanted"),
            Query(HERE.now(REPLICA_UP), "replicas ready"),
            Query(HERE.now(AUTOPILOT_COMPACT, fold="max"), "turns go compact (1: yes)"),
            Query(HERE.now(AUTOPILOT_BUDGET_WANTED, fold="max"), "budget ceiling (right)", right_unit=COUNT),
            Query(HERE.now(BUDGET_IN_FORCE, fold="min"), "budget in force (right)", right_unit=COUNT),
            width=12,
            decimals=0,
        ),
        lines(
            "Signals",
            "Over capacity: compressed (working sets), whole (all tokens), pool (blocks in use), queue (waiting over running places).",
            SHARE,
            Query(HERE.now(AUTOPILOT_PRESSURE, by=("signal",), fold="max"), "{{signal}}"),
            width=12,
        ),
        lines(
            "Replicas",
            "Wanted and ready between the bounds.",
            COUNT,
            Query(HERE.now(AUTOPILOT_REPLICAS_WANTED, fold="max"), "wanted"),
            Query(HERE.now(AUTOPILOT_REPLICAS_READY, fold="max"), "ready"),
            Query(HERE.now(AUTOPILOT_REPLICAS_MAX, fold="max"), "most allowed"),
            decimals=0,
        ),
        lines(
            "Decisions",
            "Rounds by what was decided: tighten or relax the budget, turns compact or resident, add or remove replicas, keep, hold.",
            PER_SECOND,
            Query(HERE.rate(AUTOPILOT_DECISIONS, by=("action",)), "{{action}}"),
            stacked=True,
        ),
        lines(
            "Holds",
            "Rounds without a decision, by cause.",
            PER_SECOND,
            Query(HERE.rate(AUTOPILOT_HOLDS, by=("cause",)), "{{cause}}"),
        ),
    ),
)

_LOOP = Row(
    "The loop itself",
    (
        lines(
            "Age of its data",
            "Of the snapshot decided on last.",
            SECONDS,
            Query(HERE.now(AUTOPILOT_SNAPSHOT_AGE, fold="max"), "age"),
        ),
        lines(
            "Time of a round",
            "Read, decide, apply.",
            SECONDS,
            *percentiles(lambda share: HERE.quantile(share, AUTOPILOT_ROUND_TIME)),
        ),
        lines(
            "Failed acts",
            "A budget that a replica did not take, or a replica count that Serve did not take.",
            PER_SECOND,
            Query(or_zero(HERE.rate(AUTOPILOT_FAILURES, actuator="budget")), "budget"),
            Query(or_zero(HERE.rate(AUTOPILOT_FAILURES, actuator="replicas")), "replicas"),
        ),
    ),
)

BOARD = Board(
    "autoscaling",
    "LoopServe / Autoscaling",
    "Signals, wanted and actual, both actuators on one time axis, holds and decisions.",
    (_NOW, _STEERING, _LOOP),
)
