"""What is drawn of a board is what Prometheus answers, asked as Grafana asks; and the npm project names no registry."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from monitoring.dashboards import BOARDS
from monitoring.drawing.answers import Span, answered
from monitoring.drawing.pictures import BUILT, CannotDraw, draw

ROOT = Path(__file__).resolve().parents[2]
PROJECT = ROOT / "monitoring" / "drawing"
PICTURES = ROOT / "docs" / "pictures"
SPAN = Span(1000.0, 1300.0)


def fake_prometheus(asked: list[httpx.URL], turns: tuple[str, ...] = ("17-32", "1", "9-16")) -> httpx.Client:
    """Answers every question with a series a turn."""

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url)
        series: list[dict[str, Any]] = [{"metric": {"turn": turn, "mode": "on"}} for turn in turns]
        for one in series:
            if request.url.path.endswith("query_range"):
                one["values"] = [[1000.0, "1"], [1150.0, "NaN"], [1300.0, "2.5"]]
            else:
                one["value"] = [1300.0, "7"]
        return httpx.Response(200, json={"status": "success", "data": {"result": series}})

    return httpx.Client(base_url="http://prometheus", transport=httpx.MockTransport(answer))


def test_a_rate_looks_back_over_four_scrapes_at_least_and_over_every_point_of_the_picture():
    assert Span(0.0, 60.0, scrape_s=1.0).rate_interval_s == 4
    assert Span(0.0, 60.0, scrape_s=15.0).rate_interval_s == 60
    hours = Span(0.0, 6 * 3600.0, scrape_s=1.0)
    assert hours.step_s < hours.rate_interval_s


def test_queries_are_asked_with_every_variable_filled_in_and_over_the_span():
    asked: list[httpx.URL] = []
    (sessions,) = (board for board in BOARDS if board.name == "sessions")
    answered(sessions, fake_prometheus(asked), SPAN)
    num_queries = sum(len(panel.queries) for row in sessions.rows for panel in row.panels)
    assert len(asked) == num_queries
    for url in asked:
        assert "$" not in url.params["query"]
        assert float(url.params["end"]) == SPAN.end_s


def test_series_are_named_by_their_legend_in_the_order_of_turns_and_gaps_stay_gaps():
    (sessions,) = (board for board in BOARDS if board.name == "sessions")
    drawn = answered(sessions, fake_prometheus([]), SPAN)
    (panel,) = (panel for panel in drawn["panels"] if panel["title"] == "First token by turn, median")
    assert [series["name"] for series in panel["series"]] == ["turn 1", "turn 9-16", "turn 17-32"]
    assert panel["series"][0]["points"] == [(1_000_000.0, 1.0), (1_150_000.0, None), (1_300_000.0, 2.5)]


def test_a_query_that_prometheus_refuses_is_told_in_its_words():
    def refuse(_: httpx.Request) -> httpx.Response:
        return httpx.Response(400, json={"status": "error", "error": "parse error: unexpected end"})

    with (
        httpx.Client(base_url="http://prometheus", transport=httpx.MockTransport(refuse)) as prometheus,
        pytest.raises(ValueError, match="unexpected end"),
    ):
        answered(BOARDS[0], prometheus, SPAN)


def test_without_a_browser_it_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CHROMIUM", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CannotDraw, match="chromium"):
        draw({})


@pytest.mark.skipif(not (BUILT / "board.js").is_file(), reason="the page is not built; `make pictures` does it")
@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium")
def test_every_kind_of_panel_is_drawn_by_grafanas_components(tmp_path: Path):
    boards = {tmp_path / f"{board.name}.png": answered(board, fake_prometheus([]), SPAN) for board in BOARDS}
    draw(boards)
    for path, board in boards.items():
        header = path.read_bytes()[:24]
        width, height = int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")
        lowest = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"])
        assert width == 1320
        assert math.isclose(height, lowest * 30, abs_tol=20)


def test_the_npm_project_is_locked_and_names_no_registry():
    lock = (PROJECT / "package-lock.json").read_text(encoding="utf-8")
    assert '"resolved"' not in lock
    wanted = json.loads((PROJECT / "package.json").read_text(encoding="utf-8"))
    locked = json.loads(lock)["packages"]
    for name, version in {**wanted["dependencies"], **wanted["devDependencies"]}.items():
        assert locked[f"node_modules/{name}"]["version"] == version
    assert all(package.get("integrity") for name, package in locked.items() if name and not package.get("link"))
    assert "omit-lockfile-registry-resolved=true" in (PROJECT / ".npmrc").read_text(encoding="utf-8")


def test_every_board_has_its_picture_in_the_documentation_and_no_picture_is_large():
    text = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"!\[[^]]*rendered with Grafana's UI components\]\(pictures/([\w.-]+)\)", text))
    assert shown == {f"dashboard-{board.name}.png" for board in BOARDS}
    for name in shown:
        assert 20_000 < (PICTURES / name).stat().st_size < 300_000, name
