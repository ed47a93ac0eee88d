"""What the compressed cache holds on which tier, what gives way when memory is short, what other budgets would need, and what sparsity
left out."""

from monitoring.catalogue import (
    BUDGET_CEILING,
    BUDGET_FLOOR,
    BUDGET_IN_FORCE,
    BUDGET_MAX,
    COMPACT_ABOVE,
    COMPACT_BUDGET,
    COMPRESSION,
    COVERAGE,
    COVERAGE_WORST,
    DENSE_FALLBACKS,
    KEPT_SHARE,
    KV_BYTES,
    KV_CAPACITY,
    KV_DEMAND,
    KV_DEVICE_BYTES,
    KV_WORKING_SET,
    LOGICAL_TOKENS,
    PHYSICAL_TOKENS,
    PREEMPTIONS,
    PRESSURE_STEPS,
    RECTIFIED_TOKENS,
    REFRESHES,
    TURNS_COMPACT,
    TURNS_RUNNING,
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
from monitoring.promql import or_zero, ratio

_KINDS = ("active", "warm", "shared", "cached", "free")

_MEMORY = Row(
    "Memory",
    (
        lines(
            "Pool by kind",
            "The device's. active: of running turns. warm: of idle sessions. shared: of several. cached: of none, kept for its prefix.",
            BYTES,
            *(Query(HERE.now(KV_BYTES, tier="device", kind=kind), kind) for kind in _KINDS),
            stacked=True,
        ),
        lines(
            "Host memory by kind",
            "The host tier's: active is the KV of compact turns, warm that of idle sessions which gave way on the device.",
            BYTES,
            *(Query(HERE.now(KV_BYTES, tier="host", kind=kind), kind) for kind in _KINDS),
            stacked=True,
        ),
        lines(
            "Occupancy",
            "Held by sessions over the size of the tier, of each replica.",
            SHARE,
            Query(
                ratio(
                    HERE.now(KV_BYTES, by=("replica", "tier"), kind="active|warm|shared"),
                    HERE.now(KV_BYTES, by=("replica", "tier")),
                ),
                "{{replica}}: {{tier}}",
            ),
            highest=1.0,
        ),
        lines(
            "Logical and physical tokens",
            "Tokens of the conversations as their clients see them, and slots of each tier that they hold; shared ones count once.",
            COUNT,
            Query(HERE.now(LOGICAL_TOKENS), "logical"),
            Query(HERE.now(PHYSICAL_TOKENS, by=("tier",)), "physical: {{tier}}"),
        ),
        lines(
            "Compression ratio",
            "Computed tokens of the active conversations over the device slots that these hold. Above 1 turns are compact.",
            COUNT,
            Query(HERE.now(COMPRESSION, by=("replica",)), "{{replica}}"),
        ),
        lines(
            "Compact turns",
            "Turns in the batches, and those of them whose KV lies in host memory.",
            COUNT,
            Query(HERE.now(TURNS_RUNNING), "running"),
            Query(HERE.now(TURNS_COMPACT), "compact"),
            decimals=0,
        ),
    ),
)

_PRESSURE = Row(
    "Pressure",
    (
        lines(
            "Pressure steps",
            "What gave way to turns that found no room, in the order in which it is tried: blocks of prefixes, idle sessions (to host "
            "memory, or away), resident turns, budgets of compact turns, and at last the newest turn.",
            PER_SECOND,
            Query(HERE.rate(PRESSURE_STEPS, by=("step",)), "{{step}}"),
            Query(or_zero(HERE.rate(PREEMPTIONS)), "preempted_turn"),
        ),
        lines(
            "Device memory for KV",
            "All that lies on the devices beside the model: pools, sketches, maps and buffers; and the pools alone.",
            BYTES,
            Query(HERE.now(KV_DEVICE_BYTES), "in all"),
            Query(HERE.now(KV_CAPACITY), "pools"),
        ),
        lines(
            "Turns are compact above",
            "From which share of its pool on a replica admits turns as compact; 1: only when it is full, 0: all that may be.",
            SHARE,
            Query(HERE.now(COMPACT_ABOVE, by=("replica",)), "{{replica}}"),
            highest=1.0,
        ),
    ),
)

_DEMAND = Row(
    "Demand",
    (
        bars(
            "Demand by budget, now",
            "Device bytes that the present conversations would hold at each budget, compact where they may be; full: all of their tokens.",
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
            "The same at the budget in force, of conversations in use and of idle ones: the compressed cache.",
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
            Query(HERE.now(COMPACT_BUDGET, fold="min"), "in force, compact turns"),
            Query(HERE.now(BUDGET_CEILING, fold="min"), "ceiling"),
            Query(HERE.now(BUDGET_FLOOR, fold="min"), "floor"),
            Query(HERE.now(BUDGET_MAX, fold="min"), "without a ceiling"),
            decimals=0,
        ),
        lines(
            "Tokens that decode reads",
            "Over those of a dense step, as measured in ended turns: mean and median.",
            SHARE,
            Query(HERE.mean(KEPT_SHARE), "mean"),
            Query(HERE.quantile(0.5, KEPT_SHARE), "p50"),
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
    "Occupancy by tier and kind, logical and physical tokens, what gives way, demand by budget, coverage, fallbacks, refreshes.",
    (_MEMORY, _PRESSURE, _DEMAND, _BUDGET),
)
