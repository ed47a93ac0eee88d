"""The tables of `loopserve bench`: a report as people read it in a terminal. Knows nothing that is not in the report."""

from collections.abc import Iterator

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from loopserve.bench import Report
from loopserve.bench.report import ByTurn, Percentiles

_TURN_ROWS_MAX = 8  # more different turn numbers are shown by bucket
_BUSY_SHARE = 0.8
_SPREAD = ("mean", "p50", "p90", "p99", "max")


def tables(report: Report) -> Iterator[Table]:
    """One over everything, one of times, one of first tokens by turn, one of errors where there are any."""
    yield _whole(report)
    times = _numbers("milliseconds", "num", *_SPREAD)
    for name, spread in (
        ("time to first token", report.first_token_s),
        ("inter-token latency", report.inter_token_s),
        ("gap between chunks", report.chunk_gap_s),
        ("end to end", report.turn_s),
    ):
        times.add_row(name, *_spread(spread))
    yield times
    by_number = len(report.first_token_by_turn) <= _TURN_ROWS_MAX
    rows = report.first_token_by_turn if by_number else report.first_token_by_bucket
    yield _by_turn(rows)
    if report.errors:
        errors = Table("error", "count", "for example")
        for error in report.errors:
            errors.add_row(escape(error.kind), str(error.count), escape(error.example))
        yield errors


def _whole(report: Report) -> Table:
    turns, dialogues = report.turns, report.dialogues
    counted = {"usage": "counted by usage", "chunks": "chunks: no usage is reported"}.get(
        report.throughput.tokens_counted_by, "counted by usage where it is reported, else chunks"
    )
    table = Table(
        "", "", show_header=False, title="Interrupted: what was measured so far" if report.is_interrupted else None
    )
    rows = [
        ("model", escape(report.model)),
        ("dialogues", f"{dialogues.begun} begun, {dialogues.completed} completed" + _late(dialogues.late)),
        (
            "turns",
            f"{turns.answered} of {turns.sent} answered, {turns.failed} failed, {turns.rejected} rejected, {turns.cut} cut",
        ),
        ("rejections", f"{report.rejections}"),
        ("turns/s", f"{report.throughput.turns_per_s:.2f}"),
        (
            "output",
            f"{report.throughput.output_tokens} tokens, {report.throughput.output_tokens_per_s:.1f} tokens/s ({counted})",
        ),
        ("goodput", _goodput(report)),
        ("cached, beyond turn 1", _cached(report)),
        ("stickiness", _sticky(report)),
        ("time", f"{report.wall_s:.1f} s"),
        ("load generator", _generator(report)),
    ]
    if report.answers is not None:
        rows.insert(-2, ("right answers", f"{report.answers.right} of {report.answers.expected}"))
    for row in rows:
        table.add_row(*row)
    return table


def _late(late: int) -> str:
    return f", {late} later than the rate wanted" if late else ""


def _goodput(report: Report) -> str:
    goodput = report.goodput
    if goodput is None:
        return "no --slo-ttft, no --slo-itl"
    limits = [
        f"{name} <= {limit:g} s"
        for name, limit in (("TTFT", goodput.slo_first_token_s), ("ITL", goodput.slo_inter_token_s))
        if limit is not None
    ]
    return f"{_percent(goodput.share)} of turns, {goodput.turns_per_s:.2f} turns/s ({', '.join(limits)})"


def _cached(report: Report) -> str:
    cache = report.cache
    if not cache.reported:
        return "not reported"
    return f"{_percent(cache.share_of_prompt)} of the prompts, {_percent(cache.share_of_history)} of the turn before"


def _sticky(report: Report) -> str:
    sticky = report.stickiness
    if not sticky.reported:
        return "not reported"
    stayed = f"{sticky.dialogues_on_one_replica} of {sticky.dialogues_of_several_turns} dialogues"
    return f"{_percent(sticky.same_replica_share)} of turns, {stayed}; {len(sticky.turns_by_replica)} replicas"


def _generator(report: Report) -> str:
    used = f"{100 * report.generator.cpu_share:.0f} % of one core"
    return (
        f"[bold red]{used}: it may be the limit, not the server[/]"
        if report.generator.cpu_share > _BUSY_SHARE
        else used
    )


def _by_turn(rows: tuple[ByTurn, ...]) -> Table:
    table = _numbers(
        "turn", "num", *_SPREAD, "tokens", "cached", title="Time to first token (ms), prompt tokens, by turn"
    )
    for row in rows:
        prompt = "-" if row.prompt_tokens_mean is None else f"{row.prompt_tokens_mean:.0f}"
        table.add_row(row.turn, *_spread(row.first_token_s), prompt, _percent(row.cached_share))
    return table


def _numbers(first: str, *names: str, title: str | None = None) -> Table:
    """A table of numbers beside a name, narrow enough for a terminal of 80 columns."""
    table = Table(first, title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _spread(spread: Percentiles) -> tuple[str, ...]:
    values = (spread.mean, spread.p50, spread.p90, spread.p99, spread.max)
    return (str(spread.num), *("-" if value is None else _milliseconds(value) for value in values))


def _milliseconds(value_s: float) -> str:
    return f"{1000 * value_s:.1f}" if value_s < 1 else f"{1000 * value_s:.0f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
