"""Tables of what the benchmarks of a GPU session wrote, for readers. Knows their files, not how they measure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.report import Table

_CELL_CHARS_MAX = 80
_RATIOS = ("speedup", "ratio")  # of dense over sparse, in benchmarks that list no losses of their own

Result = Mapping[str, Any]  # one benchmark's JSON object


def tables(name: str, result: Result) -> list[Table]:
    """A kernel benchmark's cases, or whatever lists of records another benchmark wrote."""
    cases = result.get("cases")
    if isinstance(cases, list) and all("op" in case and "ceiling_share" in case for case in cases):
        return [cases_table(name, cases)] if cases else []
    return list(_found_tables(name, result))


def cases_table(name: str, cases: Sequence[Mapping[str, Any]]) -> Table:
    """A row a case: floor, time, share of the ceiling, ratio to dense."""
    header = (
        "operation",
        "shape",
        "floor us",
        "time us",
        "in the stream us",
        "of the ceiling",
        "GB/s",
        "over a launch us",
        "dense us",
        "dense / time",
        "cells",
        "efficiency",
        "selection",
    )
    rows = tuple(
        (
            case["op"],
            case["shape"],
            _us(case["floor_s"]),
            _us(case["time_s"]),
            _us(case["timing"]["median_s"]),
            f"{case['ceiling_share']:.0%}",
            f"{case['bytes_per_s'] / 1e9:.0f}",
            _us(case["over_launch_s"]),
            _us(case["dense_s"]) + (f" ({case['dense_by']})" if case["dense_by"] else ""),
            _times(case["speedup"]),
            _share(case["computed_share"]),
            _share(case["efficiency"]),
            _share(case["selection_share"]),
        )
        for case in cases
    )
    return Table(name, header, rows)


def losing(name: str, result: Result) -> list[str]:
    """Every case of a benchmark that is slower than dense: as it lists them itself, or by what its rows say dense takes over sparse."""
    own = result.get("losing")
    if isinstance(own, list):
        return [f"{name}: {sentence}" for sentence in own]
    sentences = []
    for _, records in _record_lists(result):
        for record in records:
            ratio = next((record[key] for key in _RATIOS if isinstance(record.get(key), int | float)), None)
            if ratio is not None and ratio < 1.0:
                sentences.append(f"{name}: {_named(record)}: {ratio:.2f}x dense")
    return sentences


def left_out(name: str, result: Result) -> list[str]:
    """What a benchmark did not measure, and why."""
    skipped, failed = result.get("skipped"), result.get("failed")
    sentences = [f"{name}, skipped for lack of time: {label}" for label in skipped] if isinstance(skipped, list) else []
    if isinstance(failed, Mapping):
        sentences += [f"{name}, FAILED: {label}: {why}" for label, why in failed.items()]
    return sentences


def _found_tables(name: str, result: Result) -> Iterator[Table]:
    for key, records in _record_lists(result):
        plain = [{k: v for k, v in record.items() if not isinstance(v, Mapping | list)} for record in records]
        header = list(dict.fromkeys(k for record in plain for k in record))
        if header:
            rows = tuple(tuple(_cell(record.get(k)) for k in header) for record in plain)
            yield Table(f"{name}: {key}", tuple(header), rows)


def _record_lists(result: Result) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """Every list of records that a result has at its top."""
    for key, value in result.items():
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            yield key, value


def _named(record: Mapping[str, Any]) -> str:
    """What tells a record from others: its words and counts."""
    named = (f"{key} {value}" for key, value in record.items() if isinstance(value, str | int) and value != "")
    return ", ".join(named)[:_CELL_CHARS_MAX]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return (f"{value:.4g}" if isinstance(value, float) else str(value))[:_CELL_CHARS_MAX]


def _us(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e6 * seconds:.1f}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
