"""What the compressed cache holds, what it would need at other budgets, and what sparsity left out."""

from monitoring.catalogue import (
    BUDGET_CEILING,
    BUDGET_FLOOR,
    BUDGET_IN_FORCE,
    BUDGET_MAX,
    COMPRESSION,
    COVERAGE,
    COVERAGE_WORST,
    DENSE_FALLBACKS,
    KEPT_SHARE,
    KV_BYTES,
    KV_CAPACITY,
    KV_DEMAND,
    KV_WORKING_SET,
    LOGICAL_TOKENS,
    PHYSICAL_TOKENS,
    RECTIFIED_TOKENS,
    REFRESHES,
)
from monitoring.dashboards.panels import (
    BYTES,
    COUNT,
    HERE,
    PER_SECOND,
    SHARE,
    TOKENS_PER_SECOND,
    Board,
    Query,
    Row,
    bars,
    lines,
)
from monitoring.promql import ratio

_MEMORY = Row(
    "Memory",
    (
        lines(
            "Pool by kind",
            "active: of running turns. warm: of idle sessions. shared: of several. cached: of none, kept in case its prefix comes back.",
            BYTES,
            *(Query(HERE.now(KV_BYTES, kind=kind), kind) for kind in ("active", "warm", "shared", "cached", "free")),
            stacked=True,
        ),
        lines(
            "Occupancy",
            "Held by sessions over the size of the pool, of each replica.",
            SHARE,
            Query(
                ratio(
                    HERE.now(KV_BYTES, by=("replica",), kind="active|warm|shared"),
                    HERE.now(KV_CAPACITY, by=("replica",)),
                ),
                "{{replica}}",
            ),
            highest=1.0,
        ),
        lines(
            "Logical and physical tokens",
            "Tokens of the conversations as their clients see them, and slots of the pool that they hold; shared ones count once.",
            COUNT,
            Query(HERE.now(LOGICAL_TOKENS), "logical"),
            Query(HERE.now(PHYSICAL_TOKENS), "physical"),
        ),
    ),
)

_DEMAND = Row(
    "Demand",
    (
        bars(
            "Demand by budget, now",
            "Bytes of the working sets that the present conversations would need at each budget; full: all of their tokens.",
            BYTES,
            Query(f"sort({HERE.now(KV_DEMAND, by=('budget_tokens',))})", "{{budget_tokens}}"),
        ),
        lines(
            "Demand by budget",
            "The same over time. The autopilot sets the budget whose line lies under the pools.",
            BYTES,
            Query(HERE.now(KV_DEMAND, by=("budget_tokens",)), "{{budget_tokens}}"),
            Query(HERE.now(KV_CAPACITY), "pools"),
        ),
        lines(
            "Working sets",
            "Bytes at the budget in force, of conversations in use and of idle ones: the compressed cache.",
            BYTES,
            Query(HERE.now(KV_WORKING_SET, by=("state",)), "{{state}}"),
            stacked=True,
        ),
    ),
)

_BUDGET = Row(
    "Budget and quality",
    (
        lines(
            "Budget",
            "Tokens that a KV head may select; of several replicas the lowest.",
            COUNT,
            Query(HERE.now(BUDGET_IN_FORCE, fold="min"), "in force"),
            Query(HERE.now(BUDGET_CEILING, fold="min"), "ceiling"),
            Query(HERE.now(BUDGET_FLOOR, fold="min"), "floor"),
            Query(HERE.now(BUDGET_MAX, fold="min"), "without a ceiling"),
            decimals=0,
        ),
        lines(
            "Tokens that decode reads",
            "Over those of a dense step: expected of the running conversations, and as measured in ended turns.",
            SHARE,
            Query(HERE.now(COMPRESSION, fold="avg"), "running, expected"),
            Query(HERE.mean(KEPT_SHARE), "ended, measured"),
            highest=1.0,
        ),
        lines(
            "Coverage",
            "Share of the dense attention weight that turns' selections held: mean, worst tenth, worst tenth of the worst heads.",
            SHARE,
            Query(HERE.mean(COVERAGE), "mean"),
            Query(HERE.quantile(0.1, COVERAGE), "p10"),
            Query(HERE.quantile(0.1, COVERAGE_WORST), "p10 of worst heads"),
            highest=1.0,
        ),
        lines(
            "Selections chosen again",
            "Refreshes of token selections.",
            PER_SECOND,
            Query(HERE.rate(REFRESHES, by=("replica",)), "{{replica}}"),
        ),
        lines(
            "Dense fallbacks",
            "Heads of a prefill and windows of a decode that were computed dense after all, because the selection held too little.",
            PER_SECOND,
            Query(HERE.rate(DENSE_FALLBACKS, by=("replica",)), "{{replica}}"),
        ),
        lines(
            "Rectified tokens",
            "Sparsely decoded tokens whose KV was computed again, dense, with the next prompt.",
            TOKENS_PER_SECOND,
            Query(HERE.rate(RECTIFIED_TOKENS, by=("replica",)), "{{replica}}"),
        ),
    ),
)

BOARD = Board(
    "compression",
    "LoopServe / Compression",
    "Occupancy by kind, logical and physical tokens, the demand curve, the budget in force, coverage, fallbacks and refreshes.",
    (_MEMORY, _DEMAND, _BUDGET),
)
