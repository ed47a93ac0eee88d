"""What somebody looks at in working hours: pressure that steering does not relieve, quality or reuse that got worse, broken parts."""

from monitoring.alerts.rule import Group, Rule, Severity
from monitoring.catalogue import (
    AFFINITY_TURNS,
    AUTOPILOT_FAILURES,
    AUTOPILOT_HOLDING,
    AUTOPILOT_PRESSURE,
    AUTOPILOT_REPLICAS_MAX,
    AUTOPILOT_REPLICAS_WANTED,
    BUDGET_FLOOR,
    BUDGET_IN_FORCE,
    BUDGET_MAX,
    COMPACT_BUDGET,
    DENSE_FALLBACKS,
    GPU_XID,
    KEYS_RELOAD_FAILED,
    KV_BYTES,
    KV_CAPACITY,
    PROMPT_TOKENS,
    REJECTIONS,
    REPLICAS_SILENT,
    REUSED_TOKENS,
    TURNS,
    TURNS_MAX,
    TURNS_WAITING,
)
from monitoring.objectives import completions
from monitoring.promql import Scope, ratio

TURNS_MIN = 50  # in the window: a share of fewer says little
_NOW, _QUARTER, _HALF, _HOUR, _DAY = (Scope(window) for window in ("5m", "15m", "30m", "1h", "1d"))


def _reuse(scope: Scope) -> str:
    return ratio(scope.rate(REUSED_TOKENS), scope.rate(PROMPT_TOKENS))


def _fallbacks(scope: Scope) -> str:
    return ratio(scope.rate(DENSE_FALLBACKS), scope.rate(TURNS))


def _enough_turns(scope: Scope) -> str:
    return f"{scope.rate(TURNS, function='increase')} > {TURNS_MIN}"


_PRESSURE = Group(
    "loopserve-pressure",
    (
        Rule(
            "LoopServeQueueGrows",
            Severity.TICKET,
            f"{_NOW.now(TURNS_WAITING)} > {_NOW.now(TURNS_MAX)}\nand\n{_QUARTER.over('deriv', TURNS_WAITING)} > 0",
            "10m",
            "More turns wait than there are places, and ever more.",
            "The queue is longer than all batches together and has grown over a quarter of an hour.",
        ),
        Rule(
            "LoopServePoolFull",
            Severity.TICKET,
            ratio(
                _NOW.now(KV_BYTES, by=("replica",), tier="device", kind="active|shared"),
                _NOW.now(KV_CAPACITY, by=("replica",)),
            )
            + " > 0.9",
            "10m",
            "The KV pool of replica {{ $labels.replica }} is full of what is in use.",
            "Running turns and shared prefixes hold over 90 % of the pool. Idle sessions are not counted: they give way.",
        ),
        Rule(
            "LoopServeHostTierFull",
            Severity.TICKET,
            ratio(
                _NOW.now(KV_BYTES, by=("replica",), tier="host", kind="active|shared"),
                _NOW.now(KV_BYTES, by=("replica",), tier="host"),
            )
            + " > 0.9",
            "10m",
            "The host tier of replica {{ $labels.replica }} is full of what is in use.",
            "Compact turns and shared prefixes hold over 90 % of it: no more turns can be compact, and idle sessions are dropped.",
        ),
        Rule(
            "LoopServeBudgetAtFloor",
            Severity.TICKET,
            f"{_NOW.now(BUDGET_IN_FORCE, fold='min')} <= {_NOW.now(BUDGET_FLOOR, fold='min')}\n"
            f"and\n{_NOW.now(BUDGET_FLOOR, fold='min')} < {_NOW.now(BUDGET_MAX, fold='min')}",
            "30m",
            "The compression budget has been at its floor for half an hour.",
            "The budget has no room left; only replicas or less load relieve it, and answers are at the lowest quality allowed.",
        ),
        Rule(
            "LoopServeCompactBudgetAtFloor",
            Severity.TICKET,
            f"{_NOW.now(COMPACT_BUDGET, by=('replica',))} <= {_NOW.now(BUDGET_FLOOR, by=('replica',))}\n"
            f"and\n{_NOW.now(COMPACT_BUDGET, by=('replica',))} < {_NOW.now(BUDGET_IN_FORCE, by=('replica',))}",
            "15m",
            "Replica {{ $labels.replica }} has lowered the budget of compact turns to its floor by itself.",
            "Turns found no room or waited long for it, so the engine went below what the autopilot allows, as far down as it may.",
        ),
        Rule(
            "LoopServeAtMostReplicas",
            Severity.TICKET,
            f"{_NOW.now(AUTOPILOT_REPLICAS_WANTED, fold='max')} >= {_NOW.now(AUTOPILOT_REPLICAS_MAX, fold='max')}\n"
            f"and\n{_NOW.now(AUTOPILOT_PRESSURE, fold='max', signal='compressed')} > 0.85",
            "15m",
            "The fleet is as large as it may be, and still under pressure.",
            "The autopilot wants its maximum of replicas, and working sets take over 85 % of the capacity.",
        ),
        Rule(
            "LoopServeRejects",
            Severity.TICKET,
            f"{ratio(_QUARTER.rate(REJECTIONS), completions(_QUARTER))} > 0.05\n"
            f"and\n{_QUARTER.rate(REJECTIONS, function='increase')} > 5",
            "10m",
            "Replicas refuse more than a twentieth of the requests.",
            "Over a quarter of an hour. Refusals by the quotas of a tenant are not counted: the ingress makes them.",
        ),
    ),
)

_QUALITY = Group(
    "loopserve-quality",
    (
        Rule(
            "LoopServeAffinityDrops",
            Severity.TICKET,
            ratio(_HALF.rate(AFFINITY_TURNS, outcome="miss"), _HALF.rate(AFFINITY_TURNS, outcome="hit|miss"))
            + f" > 0.2\nand\n{_enough_turns(_HALF)}",
            "15m",
            "One in five conversations is not found where it is continued.",
            "Turns that continue a conversation come to replicas that do not hold it, and are computed from their start.",
        ),
        Rule(
            "LoopServePrefixReuseDrops",
            Severity.TICKET,
            f"{_reuse(_HOUR)} < 0.5 * ({_reuse(_DAY)})\nand\n{_enough_turns(_HOUR)}",
            "30m",
            "Half as much of the prompts is reused as over the day.",
            "The share of prompt tokens whose KV was there already has halved within the last hour.",
        ),
        Rule(
            "LoopServeDenseFallbacks",
            Severity.TICKET,
            f"{_fallbacks(_HOUR)} > 2 * ({_fallbacks(_DAY)})\nand\n{_fallbacks(_HOUR)} > 1\nand\n{_enough_turns(_HOUR)}",
            "30m",
            "Turns are computed dense after all twice as often as over the day.",
            "Selections hold too little of the attention weight, so heads and windows fall back: correct, but slower and larger.",
        ),
    ),
)

_PARTS = Group(
    "loopserve-parts",
    (
        Rule(
            "LoopServeAutopilotHolds",
            Severity.TICKET,
            f"{_NOW.now(AUTOPILOT_HOLDING, fold='max')} == 1",
            "10m",
            "The autopilot does not trust its data and decides nothing.",
            "Budget and replica count stay as they were, whatever the load does.",
        ),
        Rule(
            "LoopServeAutopilotFails",
            Severity.TICKET,
            f"{_NOW.rate(AUTOPILOT_FAILURES, by=('actuator',))} > 0",
            "10m",
            "What the autopilot decides about {{ $labels.actuator }} is not carried out.",
            "Orders have failed for ten minutes.",
        ),
        Rule(
            "LoopServeReplicaSilent",
            Severity.TICKET,
            f"{_NOW.now(REPLICAS_SILENT, fold='max')} > 0",
            "5m",
            "A replica does not answer when it is asked for its numbers.",
            "Its turns and sessions are missing on every dashboard, and it may be stuck.",
        ),
        Rule(
            "LoopServeKeysReloadFailed",
            Severity.TICKET,
            f"{_NOW.now(KEYS_RELOAD_FAILED, fold='max')} == 1",
            "5m",
            "The file of API keys cannot be read.",
            "The keys read last stay in force: a revoked key still works, a new one does not yet.",
        ),
        Rule(
            "LoopServeGpuXid",
            Severity.TICKET,
            # The series begins with the first error, and what begins has not increased: so the second part.
            f"{_QUARTER.rate(GPU_XID, by=('replica', 'gpu', 'xid'), function='increase')} > 0\n"
            f"or\n(\n  {_NOW.total(GPU_XID, by=('replica', 'gpu', 'xid'))}\n"
            f"  unless\n  {_NOW.total(GPU_XID, by=('replica', 'gpu', 'xid'), offset='15m')}\n)",
            "0m",
            "GPU {{ $labels.gpu }} of replica {{ $labels.replica }} reports Xid {{ $labels.xid }}.",
            "The driver has reported an error of the device within the last quarter of an hour.",
        ),
    ),
)

TICKETS = (_PRESSURE, _QUALITY, _PARTS)
