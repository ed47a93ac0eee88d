"""Does a long conversation stay cheap? Turns a session, latency by how far it is, where it was answered and what was there already."""

from monitoring.catalogue import (
    AFFINITY_DECISIONS,
    AFFINITY_TIME,
    AFFINITY_TURNS,
    DISK_BYTES,
    DISK_MOVED_BYTES,
    DISK_OUTCOMES,
    DISK_SESSIONS,
    HANDOFF_BYTES,
    HANDOFF_TIME,
    HANDOFFS,
    INTER_TOKEN,
    PREFILL_TIME,
    PROMPT_TOKENS,
    REQUEST_RETRIES,
    REUSED_TOKENS,
    SESSION_TURNS,
    SESSIONS,
    TTFT,
)
from monitoring.dashboards.panels import (
    BYTES,
    BYTES_PER_SECOND,
    COUNT,
    HERE,
    PER_SECOND,
    SECONDS,
    SHARE,
    TOKENS_PER_SECOND,
    Board,
    Query,
    Row,
    lines,
    number,
    percentiles,
)
from monitoring.promql import or_zero, ratio

_LATER = HERE.rate(AFFINITY_TURNS, outcome="hit|miss")
_HIT_RATIO = ratio(HERE.rate(AFFINITY_TURNS, outcome="hit"), _LATER)
_REUSED_RATIO = ratio(HERE.rate(REUSED_TOKENS), HERE.rate(PROMPT_TOKENS))

_NOW = Row(
    "Now",
    (
        number(
            "Sessions in use",
            "Conversations with a turn in the batch or waiting for it.",
            COUNT,
            Query(HERE.now(SESSIONS, state="active"), "active"),
            width=6,
        ),
        number(
            "Sessions idle",
            "Conversations that hold KV and wait for their next turn.",
            COUNT,
            Query(HERE.now(SESSIONS, state="warm"), "warm"),
            width=6,
        ),
        number(
            "Turns that found their conversation",
            "Of the turns that continue a conversation, those that came to the replica that holds it.",
            SHARE,
            Query(_HIT_RATIO, "hits"),
            width=6,
            highest=1.0,
        ),
        number(
            "Prompt tokens reused",
            "Prompt tokens whose KV was there already, over all prompt tokens.",
            SHARE,
            Query(_REUSED_RATIO, "reused"),
            width=6,
            highest=1.0,
        ),
    ),
)

_TURNS = Row(
    "By turn of the conversation",
    (
        lines(
            "First token by turn, median",
            "A conversation stays cheap where later turns are no slower than the second.",
            SECONDS,
            Query(HERE.quantile(0.5, TTFT, by=("turn",)), "turn {{turn}}"),
            logarithmic=True,
        ),
        lines(
            "First token by turn, p95",
            "The same for the slowest of twenty.",
            SECONDS,
            Query(HERE.quantile(0.95, TTFT, by=("turn",)), "turn {{turn}}"),
            logarithmic=True,
        ),
        lines(
            "Prefill by turn, mean",
            "From a place in the batch to the first token: what a turn adds, not what came before.",
            SECONDS,
            Query(HERE.mean(PREFILL_TIME, by=("turn",)), "turn {{turn}}"),
            logarithmic=True,
        ),
        lines(
            "Inter-token latency by turn, median",
            "Flat over the turns where decode reads a selection instead of the whole past.",
            SECONDS,
            Query(HERE.quantile(0.5, INTER_TOKEN, by=("turn",)), "turn {{turn}}"),
            logarithmic=True,
        ),
        lines(
            "Turns a session",
            "How many turns the sessions of ended turns have had.",
            COUNT,
            *percentiles(lambda share: HERE.quantile(share, SESSION_TURNS), 0.5, 0.9),
            Query(HERE.mean(SESSION_TURNS), "mean"),
        ),
        lines(
            "Sessions",
            "By state: active (a turn computes or waits), warm (idle, KV held).",
            COUNT,
            Query(HERE.now(SESSIONS, by=("state",)), "{{state}}"),
            stacked=True,
        ),
    ),
)

_PLACE = Row(
    "Affinity and reuse",
    (
        lines(
            "Turns by affinity",
            "first: nothing came before. hit: the conversation is held here. miss: it is held elsewhere or nowhere.",
            PER_SECOND,
            Query(HERE.rate(AFFINITY_TURNS, by=("outcome",)), "{{outcome}}"),
            stacked=True,
        ),
        lines(
            "Hits and reuse",
            "Turns that found their conversation, and prompt tokens that were there already.",
            SHARE,
            Query(_HIT_RATIO, "turns hit"),
            Query(_REUSED_RATIO, "tokens reused"),
            highest=1.0,
        ),
        lines(
            "Prefix reuse by source",
            "Prompt tokens that were not computed, by where their KV lay.",
            TOKENS_PER_SECOND,
            Query(HERE.rate(REUSED_TOKENS, by=("source",)), "{{source}}"),
            stacked=True,
        ),
        lines(
            "Routing decisions",
            "Why a replica was chosen. moved: waiting would have cost more than moving the conversation. spill: a new one, home loaded.",
            PER_SECOND,
            Query(HERE.rate(AFFINITY_DECISIONS, by=("reason",)), "{{reason}}"),
            stacked=True,
        ),
        lines(
            "Time of a decision",
            "One routing decision, without the wait for the replica.",
            SECONDS,
            *percentiles(lambda share: HERE.quantile(share, AFFINITY_TIME)),
            logarithmic=True,
        ),
        lines(
            "Sent to a second replica",
            "Requests whose first replica went away before it answered.",
            PER_SECOND,
            Query(or_zero(HERE.rate(REQUEST_RETRIES)), "retries"),
        ),
    ),
)

_HANDOFFS = Row(
    "Hand-offs",
    (
        lines(
            "Hand-offs by result",
            "Sessions that replicas had to give away. moved: where the next turn is sent. Of all others the next turn computes its past.",
            PER_SECOND,
            Query(HERE.rate(HANDOFFS, by=("result",)), "{{result}}"),
            stacked=True,
        ),
        lines(
            "Handed over",
            "Bytes of the sessions that were taken over.",
            BYTES_PER_SECOND,
            Query(HERE.rate(HANDOFF_BYTES), "bytes"),
        ),
        lines(
            "Time of a hand-off",
            "From the offer of a session to its place in the new engine; empty while none is taken over.",
            SECONDS,
            *percentiles(lambda share: HERE.quantile(share, HANDOFF_TIME), 0.5, 0.95),
            logarithmic=True,
        ),
    ),
)

_DISK = Row(
    "Disk",
    (
        lines(
            "Sessions on disk",
            "Held by each replica, or by nobody: those are known to all that share a directory. Empty where there is no disk tier.",
            COUNT,
            Query(HERE.now(DISK_SESSIONS, by=("replica",)), "{{replica}}"),
            width=6,
            decimals=0,
        ),
        lines(
            "KV on disk",
            "Bytes of them; what sessions share counts in each.",
            BYTES,
            Query(HERE.now(DISK_BYTES, by=("replica",)), "{{replica}}"),
            width=6,
        ),
        lines(
            "Saved, loaded, and not",
            "Sessions by what came of it. Of all but saved and loaded the next turn computes its past, or what memory still has of it.",
            PER_SECOND,
            Query(HERE.rate(DISK_OUTCOMES, by=("outcome",)), "{{outcome}}"),
            width=6,
        ),
        lines(
            "To and from disk",
            "Bytes written and read; blocks that were there already are not written.",
            BYTES_PER_SECOND,
            Query(HERE.rate(DISK_MOVED_BYTES, by=("direction",)), "{{direction}}"),
            width=6,
        ),
    ),
)

BOARD = Board(
    "sessions",
    "LoopServe / Sessions",
    "Turns a session, latency by turn, affinity hits, misses and moves, prefix reuse by source, hand-offs, disk.",
    (_NOW, _TURNS, _PLACE, _HANDOFFS, _DISK),
)
