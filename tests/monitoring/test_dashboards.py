"""The dashboards: committed as built, valid in Grafana's own schemas, linted, and reading only what the catalogue has."""

import json
import os
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from expressions import BY_SERIES, legend_labels, read, substituted

from deploy.errors import STATUS
from monitoring.catalogue import CATALOGUE, Metric, Origin
from monitoring.dashboards import BOARDS, path_of
from monitoring.dashboards.panels import Board
from monitoring.objectives import SERVER_FAULTS
from monitoring.promql import Scope

SCHEMAS = Path(os.environ.get("SCHEMAS_DIR") or "/nonexistent") / "grafana-schemas"
needs_schemas = pytest.mark.skipif(not SCHEMAS.is_dir(), reason="SCHEMAS_DIR names no directory with grafana-schemas/")

each_board = pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)


def document(board: Board) -> dict[str, Any]:
    """What Grafana imports."""
    found: dict[str, Any] = json.loads(path_of(board).read_text(encoding="utf-8"))
    return found


def panels(board: Board) -> list[dict[str, Any]]:
    """Every panel but the headings."""
    return [panel for panel in document(board)["panels"] if panel["type"] != "row"]


def targets(board: Board) -> list[tuple[str, dict[str, Any]]]:
    """Every query with its panel's title."""
    return [(panel["title"], target) for panel in panels(board) for target in panel["targets"]]


@each_board
def test_the_committed_dashboard_is_the_one_its_builder_makes(board: Board) -> None:
    assert path_of(board).read_text(encoding="utf-8") == board.to_json(), (
        "run `make dashboards` and commit what changed"
    )


def test_no_dashboard_is_committed_that_nothing_builds() -> None:
    assert {path.name for path in path_of(BOARDS[0]).parent.glob("*.json")} == {path_of(b).name for b in BOARDS}


def schema(name: str, definition: str | None = None) -> dict[str, Any]:
    """One of Grafana's schemas, or one definition of it.

    What an override matches and sets is of any type in Grafana; the generated schema says object.
    """
    found: dict[str, Any] = json.loads((SCHEMAS / f"{name}.jsonschema.json").read_text(encoding="utf-8"))
    if name == "dashboard":
        for record, anything in (("DynamicConfigValue", "value"), ("MatcherConfig", "options")):
            found["definitions"][record]["properties"][anything] = {}
    return found if definition is None else {**found, "$ref": f"#/definitions/{definition}"}


@needs_schemas
@each_board
def test_the_dashboard_is_valid_in_grafanas_schema(board: Board) -> None:
    jsonschema.validate(document(board), schema("dashboard"))


@needs_schemas
@each_board
def test_options_fields_and_queries_of_every_panel_are_valid_in_the_schemas_of_their_kind(board: Board) -> None:
    for panel in panels(board):
        kind = panel["type"]
        jsonschema.validate(panel["options"], schema(kind, "Options"))
        if "FieldConfig" in schema(kind)["definitions"]:
            jsonschema.validate(panel["fieldConfig"]["defaults"]["custom"], schema(kind, "FieldConfig"))
        for target in panel["targets"]:
            jsonschema.validate(target, schema("prometheus"))


@needs_schemas
def test_the_schemas_do_refuse_what_is_wrong() -> None:
    broken = document(BOARDS[0])
    broken["panels"][1]["colour"] = "green"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema("dashboard"))


@each_board
def test_the_dashboard_can_be_pointed_at_any_data_source_job_and_replica(board: Board) -> None:
    variables = {variable["name"]: variable for variable in document(board)["templating"]["list"]}
    assert list(variables) == ["datasource", "job", "replica"]
    assert variables["datasource"]["query"] == "prometheus"
    for name in ("job", "replica"):
        found = variables[name]
        assert found["multi"] and found["includeAll"] and found["allValue"] == ".+" and found["label"]
        metric, label = re.fullmatch(r"label_values\((\w+)(?:{.*})?, (\w+)\)", found["query"]).groups()
        assert metric in BY_SERIES
        assert label == name
    assert {panel["datasource"]["uid"] for panel in panels(board)} == {"${datasource}"}
    assert {target["datasource"]["uid"] for _, target in targets(board)} == {"${datasource}"}


@each_board
def test_every_panel_says_what_it_shows_and_in_which_unit(board: Board) -> None:
    for panel in panels(board):
        assert panel["title"] and len(panel["description"]) > 8 and panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]
        assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]


@each_board
def test_ids_titles_and_query_letters_are_unique(board: Board) -> None:
    found = document(board)["panels"]
    assert len({panel["id"] for panel in found}) == len(found)
    by_row: dict[str, list[str]] = {}
    for panel in found:
        if panel["type"] == "row":
            row = by_row.setdefault(panel["title"], [])
        else:
            row.append(panel["title"])
            letters = [target["refId"] for target in panel["targets"]]
            assert len(set(letters)) == len(letters), panel["title"]
    assert all(len(set(titles)) == len(titles) for titles in by_row.values())
    assert len({board.uid for board in BOARDS}) == len(BOARDS)
    assert 8 <= len(board.uid) <= 40


@each_board
def test_no_panel_lies_on_another_or_beyond_the_grid(board: Board) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in document(board)["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + dx, place["y"] + dy) for dx in range(place["w"]) for dy in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells


@each_board
def test_every_metric_and_label_of_every_query_is_in_the_catalogue(board: Board) -> None:
    for title, target in targets(board):
        reading = read(substituted(target["expr"]))
        assert reading.selectors, title
        assert reading.faults == (), f"{title}: {target['expr']}"
        assert legend_labels(target["legendFormat"]) <= reading.named_labels, title


@each_board
def test_every_query_looks_at_the_chosen_job_and_replicas_only(board: Board) -> None:
    for title, target in targets(board):
        for selector in read(substituted(target["expr"])).selectors:
            assert "job" in selector.labels, title
            from_a_replica = BY_SERIES[selector.name].origin is Origin.ENGINE
            assert ("replica" in selector.labels) == from_a_replica, f"{title}: {selector.name}"


@each_board
def test_rates_follow_the_interval_of_the_scrape_except_where_the_legend_names_the_window(board: Board) -> None:
    for title, target in targets(board):
        windows = set(re.findall(r"\[(.+?)\]", target["expr"]))
        fixed = windows - {"$__rate_interval"}
        assert all(window in target["legendFormat"] for window in fixed), f"{title}: {fixed}"


@each_board
def test_every_query_counts_each_process_once(board: Board) -> None:
    for title, target in targets(board):
        first_labels = re.findall(r"max by \((\w+)[^)]*\) \(", target["expr"])
        single = [label for label in first_labels if label in set(Origin)]
        assert len(single) == len(read(substituted(target["expr"])).selectors), title


def test_every_metric_of_the_catalogue_is_on_some_dashboard() -> None:
    shown = {
        BY_SERIES[selector.name].name
        for board in BOARDS
        for _, target in targets(board)
        for selector in read(substituted(target["expr"])).selectors
    }
    not_drawn = {"loopserve_keys_reload_failed"}  # an alert says it; a line of zeros says nothing
    assert {metric.name for metric in CATALOGUE} - shown == not_drawn


def test_the_codes_that_count_as_our_fault_are_those_that_are_answered_with_a_server_error() -> None:
    assert set(SERVER_FAULTS) == {error.code for error, (status, _) in STATUS.items() if status >= 500}


@pytest.mark.parametrize(
    ("expression", "fault"),
    [
        ("loopserve_nothing", "not in the catalogue"),
        ("rate(loopserve_turns[1m])", "not in the catalogue"),  # without _total
        ('loopserve_sessions{tenant="a"}', "has no label tenant"),
        ("sum by (turn) (loopserve_sessions)", "grouped by turn"),
        ("rate(loopserve_sessions[1m])", "is no counter"),
        ("max(loopserve_sessions) / sum by (kind) (loopserve_sessions)", "grouped by kind"),
    ],
)
def test_a_query_that_reads_what_is_not_there_is_caught(expression: str, fault: str) -> None:
    assert any(fault in found for found in read(expression).faults)


def test_a_builder_refuses_labels_buckets_and_kinds_that_a_metric_does_not_have() -> None:
    by_name: dict[str, Metric] = {metric.name: metric for metric in CATALOGUE}
    scope = Scope("5m")
    sessions, first_byte = by_name["loopserve_sessions"], by_name["loopserve_request_first_byte_seconds"]
    for wrong in (
        lambda: scope.now(sessions, tenant="a"),
        lambda: scope.now(sessions, by=("turn",)),
        lambda: scope.rate(sessions),
        lambda: scope.now(first_byte),
        lambda: scope.share_within(first_byte, 3.0),
    ):
        with pytest.raises(AssertionError):
            wrong()
