"""What a turn waits for: its phases, the queue, the steps of the engine thread, and how turns end."""

from monitoring.catalogue import (
    DECODE_TIME,
    INTER_TOKEN,
    PREEMPTIONS,
    PREFILL_TIME,
    QUEUE_TIME,
    REJECTIONS,
    STEP_TIME,
    STEP_TOKENS,
    TTFT,
    TURN_DURATION,
    TURNS,
    TURNS_MAX,
    TURNS_RUNNING,
    TURNS_WAITING,
)
from monitoring.dashboards.panels import (
    COUNT,
    HERE,
    PER_SECOND,
    SECONDS,
    TOKENS_PER_SECOND,
    Board,
    Query,
    Row,
    lines,
    percentiles,
)
from monitoring.promql import or_zero

_LATENCY = Row(
    "Latency of turns",
    (
        lines(
            "Time to first token",
            "From a turn's submission to the engine to its first token.",
            SECONDS,
            *percentiles(lambda share: HERE.quantile(share, TTFT)),
            logarithmic=True,
        ),
        lines(
            "Inter-token latency",
            "Between two tokens of one answer that follow each other; every gap counts, not the mean of an answer.",
            SECONDS,
            *percentiles(lambda share: HERE.quantile(share, INTER_TOKEN)),
            logarithmic=True,
        ),
        lines(
            "Whole turn",
            "From a turn's submission to its end.",
            SECONDS,
            *percentiles(lambda share: HERE.quantile(share, TURN_DURATION)),
            logarithmic=True,
        ),
        lines(
            "Where a turn's time goes",
            "Mean wait for a place in the batch, mean time to the first token after it, mean time from there to the end.",
            SECONDS,
            Query(HERE.mean(QUEUE_TIME), "queue"),
            Query(HERE.mean(PREFILL_TIME), "prefill"),
            Query(HERE.mean(DECODE_TIME), "decode"),
            stacked=True,
        ),
        lines(
            "Wait for a place in the batch",
            "From a turn's submission to its admission.",
            SECONDS,
            *percentiles(lambda share: HERE.quantile(share, QUEUE_TIME)),
            logarithmic=True,
        ),
        lines(
            "First token by replica",
            "The 95th percentile of each replica: one that stands out is slow, or has the long conversations.",
            SECONDS,
            Query(HERE.quantile(0.95, TTFT, by=("replica",)), "{{replica}}"),
            logarithmic=True,
        ),
    ),
)

_QUEUE = Row(
    "Queue and ends",
    (
        lines(
            "Turns",
            "In the batches, waiting for a place in them, and how many places there are.",
            COUNT,
            Query(HERE.now(TURNS_RUNNING), "running"),
            Query(HERE.now(TURNS_WAITING), "waiting"),
            Query(HERE.now(TURNS_MAX), "places"),
            decimals=0,
        ),
        lines(
            "Ended turns",
            "By reason: stop, length, cancelled by the client, error.",
            PER_SECOND,
            Query(HERE.rate(TURNS, by=("reason",)), "{{reason}}"),
            stacked=True,
        ),
        lines(
            "Refused and preempted",
            "Requests that a replica refused, by the error's code, and turns that gave up their place for an older one.",
            PER_SECOND,
            Query(HERE.rate(REJECTIONS, by=("reason",)), "refused: {{reason}}"),
            Query(or_zero(HERE.rate(PREEMPTIONS)), "preempted"),
        ),
    ),
)

_STEPS = Row(
    "Steps of the engine thread",
    (
        lines(
            "Time of a step",
            "Plan, forward and apply of one batch.",
            SECONDS,
            *percentiles(lambda share: HERE.quantile(share, STEP_TIME)),
            logarithmic=True,
        ),
        lines(
            "Rows computed",
            "Tokens that the model computed, by phase. Reused and idle tokens cost no row.",
            TOKENS_PER_SECOND,
            Query(HERE.rate(STEP_TOKENS, by=("phase",)), "{{phase}}"),
            stacked=True,
        ),
        lines(
            "Steps",
            "Steps a second of each replica; none while nothing is to do.",
            PER_SECOND,
            Query(HERE.rate(STEP_TIME, by=("replica",)), "{{replica}}"),
        ),
    ),
)

BOARD = Board(
    "engine",
    "LoopServe / Engine",
    "Latencies of turns and of their phases, queue, steps, and how turns end.",
    (_LATENCY, _QUEUE, _STEPS),
)
