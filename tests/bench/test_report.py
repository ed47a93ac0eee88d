"""The arithmetic of a report, on turns written by hand."""

import io
import json
import random
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from statistics import fmean, quantiles
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from loopserve.bench.load import LoadResult
from loopserve.bench.records import Failure, FailureKind, Gaps, TurnRecord
from loopserve.bench.report import Percentiles, Slo, summarise, turn_bucket
from loopserve.cli.bench_tables import tables
from monitoring import catalogue


def turn(dialogue: str = "a", number: int = 1, **other: Any) -> TurnRecord:
    """An answered turn."""
    plain = TurnRecord(
        dialogue=dialogue,
        number=number,
        num_turns=3,
        warm_up=False,
        sent_at_s=0.0,
        first_token_s=0.1,
        total_s=0.5,
        inter_token_s=0.04,
        num_chunks=10,
        output_tokens=10,
        counted_by_usage=True,
        prompt_tokens=100 * number,
        cached_tokens=None,
        history_tokens=None if number == 1 else 100 * number - 90,
        replica=None,
        finish_reason="stop",
        num_rejections=0,
        right=None,
    )
    return replace(plain, **other)


def failed(kind: FailureKind, *, status: int | None = None, message: str = "why", **other: Any) -> TurnRecord:
    """A turn without an answer."""
    return turn(failure=Failure(kind, message, status), first_token_s=None, output_tokens=0, num_chunks=0, **other)


def result_of(*turns: TurnRecord, wall_s: float = 2.0) -> LoadResult:
    """A load of these turns."""
    return LoadResult("tiny", list(turns), wall_s=wall_s, num_begun=len({t.dialogue for t in turns}))


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=300))
def test_percentiles_are_those_of_the_statistics_module(values: list[float]) -> None:
    found, cuts = Percentiles.of(values), quantiles(values, n=100, method="inclusive")
    assert [found.p50, found.p90, found.p99] == pytest.approx([cuts[49], cuts[89], cuts[98]])
    assert (found.num, found.max) == (len(values), max(values))
    assert found.mean == pytest.approx(fmean(values))


def test_nothing_measured_has_no_percentiles() -> None:
    assert Percentiles.of([None, None]) == Percentiles(0)
    assert Percentiles.of_gaps(Gaps()) == Percentiles(0)
    assert Percentiles.of([3.0]) == Percentiles(1, 3.0, 3.0, 3.0, 3.0, 3.0)


@given(st.lists(st.floats(1e-5, 1e3), min_size=1, max_size=300), st.sampled_from([1, 50, 90, 99, 100]))
def test_counted_gaps_are_exact_to_one_percent(values: list[float], percent: int) -> None:
    gaps = Gaps()
    for value in values:
        gaps.add(value)
    nearest = sorted(values)[max(-(-percent * len(values) // 100) - 1, 0)]
    assert gaps.percentile(percent) == pytest.approx(nearest, rel=0.0101)
    assert gaps.longest_s == max(values)
    assert gaps.num == len(values)


def test_a_million_gaps_are_as_small_as_ten() -> None:
    gaps, rng = Gaps(), random.Random(0)
    for _ in range(100_000):
        gaps.add(rng.lognormvariate(-4, 1))
    assert len(gaps.counts) < 1000


def test_turns_fall_into_the_buckets_of_the_metrics() -> None:
    assert [turn_bucket(n)[1] for n in range(1, 100)] == [catalogue.turn_bucket(n) for n in range(1, 100)]
    assert turn_bucket(100) == (33, "33+")


def test_first_tokens_are_told_by_turn_and_by_bucket() -> None:
    turns = [turn("a", n, first_token_s=n / 10, cached_tokens=n) for n in (1, 2, 3, 4)]
    report = summarise(result_of(*turns))
    assert [(row.turn, row.first_token_s.p50) for row in report.first_token_by_turn] == [
        ("1", 0.1), ("2", 0.2), ("3", 0.3), ("4", 0.4),
    ]  # fmt: skip
    assert [(row.turn, row.first_token_s.num) for row in report.first_token_by_bucket] == [
        ("1", 1),
        ("2", 1),
        ("3-4", 2),
    ]
    assert report.first_token_by_bucket[2].first_token_s.p50 == pytest.approx(0.35)
    assert report.first_token_by_bucket[2].prompt_tokens_mean == 350
    assert report.first_token_by_bucket[2].cached_share == pytest.approx(7 / 700)


def test_the_warm_up_counts_nowhere() -> None:
    warm = turn("w", warm_up=True, first_token_s=9.0, cached_tokens=5, replica="r")
    report = summarise(result_of(warm, turn("a")))
    assert report.turns.sent == 1
    assert report.first_token_s.max == 0.1
    assert not report.cache.reported
    assert not report.stickiness.reported


def test_goodput_counts_failures_as_bad_and_cut_turns_not_at_all() -> None:
    turns = (
        turn(first_token_s=0.1, inter_token_s=0.01),
        turn(first_token_s=0.3, inter_token_s=0.01),
        turn(first_token_s=0.1, inter_token_s=0.2),
        turn(first_token_s=0.1, inter_token_s=None),
        failed(FailureKind.HTTP, status=500),
        failed(FailureKind.REJECTED, status=429),
        failed(FailureKind.CUT),
    )
    goodput = summarise(result_of(*turns), Slo(0.2, 0.05)).goodput
    assert goodput is not None
    assert (goodput.share, goodput.turns_per_s) == (2 / 6, 1.0)
    only_first = summarise(result_of(*turns), Slo(first_token_s=0.2)).goodput
    assert only_first is not None
    assert only_first.share == 3 / 6
    assert summarise(result_of(*turns), Slo()).goodput is None


def test_the_cached_share_is_that_of_turns_beyond_the_first() -> None:
    report = summarise(
        result_of(
            turn("a", 1, cached_tokens=90),
            turn("a", 2, cached_tokens=110),  # all of the history of 110
            turn("b", 2, cached_tokens=0),
        )
    )
    assert report.cache.reported
    assert (report.cache.cached_tokens, report.cache.prompt_tokens) == (110, 400)
    assert report.cache.share_of_prompt == 110 / 400
    assert report.cache.share_of_history == 110 / 220


def test_nothing_cached_differs_from_nothing_reported() -> None:
    silent = summarise(result_of(turn("a", 1), turn("a", 2)))
    nothing = summarise(result_of(turn("a", 1, cached_tokens=0), turn("a", 2, cached_tokens=0)))
    assert (silent.cache.reported, silent.cache.share_of_prompt) == (False, None)
    assert (nothing.cache.reported, nothing.cache.share_of_prompt) == (True, 0.0)
    assert "not reported" in printed(silent)
    assert "0.0 % of the prompts" in printed(nothing)


def test_stickiness_follows_each_dialogue_in_the_order_of_its_turns() -> None:
    report = summarise(
        result_of(
            turn("a", 3, replica="x"),
            turn("a", 1, replica="x"),
            turn("a", 2, replica="x"),
            turn("b", 1, replica="x"),
            turn("b", 2, replica="y"),
            turn("c", 1, replica="y"),
        )
    )
    sticky = report.stickiness
    assert sticky.turns_by_replica == {"x": 4, "y": 2}
    assert sticky.same_replica_share == 2 / 3
    assert (sticky.dialogues_on_one_replica, sticky.dialogues_of_several_turns) == (1, 2)


def test_failures_are_counted_by_what_they_are() -> None:
    report = summarise(
        result_of(
            turn(),
            failed(FailureKind.HTTP, status=500, message="first"),
            failed(FailureKind.HTTP, status=500, message="second"),
            failed(FailureKind.HTTP, status=400),
            failed(FailureKind.REJECTED, status=429, num_rejections=2),
            failed(FailureKind.CUT),
        )
    )
    assert (report.turns.sent, report.turns.answered, report.turns.failed) == (6, 1, 3)
    assert (report.turns.rejected, report.turns.cut, report.rejections) == (1, 1, 3)
    assert [(e.kind, e.count, e.example) for e in report.errors] == [
        ("http_500", 2, "first"), ("http_400", 1, "why"), ("rejected_429", 1, "why"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("by_usage", "told", "shown"),
    [
        ((True, True), "usage", "(counted by usage)"),
        ((False, False), "chunks", "chunks: no usage"),
        ((True, False), "both", "where it is reported, else chunks"),
    ],
)
def test_it_says_how_tokens_were_counted(by_usage: tuple[bool, bool], told: str, shown: str) -> None:
    report = summarise(result_of(*(turn(counted_by_usage=way) for way in by_usage)))
    assert report.throughput.tokens_counted_by == told
    assert shown in printed(report)
    assert report.throughput.output_tokens_per_s == 10.0


def test_right_answers_are_told_where_any_were_expected() -> None:
    assert summarise(result_of(turn())).answers is None
    answers = summarise(result_of(turn(right=True), turn(right=False), turn())).answers
    assert answers is not None
    assert (answers.right, answers.expected) == (1, 2)


def test_many_turn_numbers_are_shown_by_bucket() -> None:
    few = summarise(result_of(*(turn("a", n) for n in range(1, 9))))
    many = summarise(result_of(*(turn("a", n) for n in range(1, 41))))
    assert "33+" not in printed(few)
    assert "33+" in printed(many)
    assert len(many.first_token_by_turn) == 40


def test_times_are_whole_on_a_narrow_terminal() -> None:
    turns = [turn("a", n, first_token_s=11.111 * n, total_s=111.1, cached_tokens=90) for n in range(1, 9)]
    shown = printed(summarise(result_of(*turns)), width=80)
    assert all(
        re.search(rf"^ +{n} +1 +({11111 * n} +){{5}}{100 * n} +[0-9.]+ %", shown, re.MULTILINE) for n in range(1, 9)
    )
    assert re.search(r"^ +end to end +8 +(111100 +){5}$", shown, re.MULTILINE)


def test_an_empty_load_has_a_report_too() -> None:
    report = summarise(LoadResult("tiny"))
    assert report.turns.sent == 0
    assert report.first_token_s == Percentiles(0)
    assert "0 of 0 answered" in printed(report)


def test_a_generator_that_is_the_limit_says_so() -> None:
    result = result_of(turn())
    result.generator_cpu_s = 1.9
    report = summarise(result)
    assert report.generator.cpu_share == 0.95
    assert report.generator.cpu_s_per_1000_chunks == 190.0
    assert "may be the limit" in printed(report)


SPREAD = {"num", "mean", "p50", "p90", "p99", "max"}
BY_TURN = {"turn", "prompt_tokens_mean", "cached_share"} | {f"first_token_s.{name}" for name in SPREAD}
SHAPE = (
    {"schema", "model", "wall_s", "is_interrupted", "rejections"}
    | {f"dialogues.{name}" for name in ("begun", "completed", "late")}
    | {f"turns.{name}" for name in ("sent", "answered", "failed", "rejected", "cut")}
    | {f"{times}.{n}" for times in ("first_token_s", "inter_token_s", "chunk_gap_s", "turn_s") for n in SPREAD}
    | {f"{rows}[].{name}" for rows in ("first_token_by_turn", "first_token_by_bucket") for name in BY_TURN}
    | {f"throughput.{n}" for n in ("output_tokens", "output_tokens_per_s", "turns_per_s", "tokens_counted_by")}
    | {f"goodput.{name}" for name in ("slo_first_token_s", "slo_inter_token_s", "share", "turns_per_s")}
    | {f"cache.{n}" for n in ("reported", "prompt_tokens", "cached_tokens", "share_of_prompt", "share_of_history")}
    | {"stickiness.reported", "stickiness.turns_by_replica.x", "stickiness.same_replica_share"}
    | {"stickiness.dialogues_on_one_replica", "stickiness.dialogues_of_several_turns"}
    | {f"errors[].{name}" for name in ("kind", "count", "example")}
    | {"answers.expected", "answers.right"}
    | {f"generator.{name}" for name in ("cpu_s", "cpu_share", "cpu_s_per_1000_chunks")}
)


def paths(value: Any, name: str = "") -> Iterator[str]:
    """The names of everything in a JSON value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for inner in value:
            yield from paths(inner, f"{name}[]")
    else:
        yield name


def test_the_json_keeps_its_shape() -> None:
    turns = (turn(right=True, replica="x"), failed(FailureKind.CONNECT))
    record = json.loads(json.dumps(asdict(summarise(result_of(*turns), Slo(1.0, 1.0)))))
    assert record["schema"] == "loopserve.bench/1"
    assert set(paths(record)) == SHAPE


def printed(report: Any, *, width: int = 200) -> str:
    """The tables."""
    console = Console(width=width, file=io.StringIO())
    for table in tables(report):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
