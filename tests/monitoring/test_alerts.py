"""The alert rules: committed as built, reading only what the catalogue has, each tested with promtool, each with its runbook entry."""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml
from expressions import BY_SERIES, read

from deploy.settings import DeploySettings
from loopserve.config import EngineConfig
from monitoring.alerts import GROUPS, RULE_TESTS_PATH, RULES_PATH
from monitoring.alerts.rule import Rule, Severity, rule_file
from monitoring.dashboards import BOARDS
from monitoring.tools import find_tool

ROOT = Path(__file__).resolve().parents[2]
RUNBOOK = ROOT / "docs" / "runbook.md"
RULES = tuple(rule for group in GROUPS for rule in group.rules)
PROMTOOL = find_tool("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="there is no promtool; `make tools` fetches it")

each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run promtool."""
    assert PROMTOOL is not None
    return subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True, timeout=120, check=False)


def cases() -> list[dict[str, Any]]:
    """Promtool's cases."""
    found: list[dict[str, Any]] = yaml.safe_load(RULE_TESTS_PATH.read_text(encoding="utf-8"))["tests"]
    return found


def cases_of(rule: Rule, kind: str) -> list[dict[str, Any]]:
    """The cases of one rule: fires, silent or stale."""
    return [case for case in cases() if case["name"].startswith(f"{rule.name}: {kind}, ")]


def test_the_committed_rule_file_is_the_one_the_builders_make() -> None:
    assert RULES_PATH.read_text(encoding="utf-8") == rule_file(GROUPS), "run `make dashboards` and commit what changed"


@needs_promtool
def test_prometheus_accepts_the_rule_file() -> None:
    done = promtool("check", "rules", "--lint=all", "--lint-fatal", RULES_PATH)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(RULES)} rules found" in done.stdout


def run_cases(rule: Rule, directory: Path, *, expression: str | None = None) -> subprocess.CompletedProcess[str]:
    """The rule's own cases on the committed rule alone, or on one that asks something else instead."""
    document = yaml.safe_load(RULES_PATH.read_text(encoding="utf-8"))
    (found,) = [found for group in document["groups"] for found in group["rules"] if found["alert"] == rule.name]
    if expression is not None:
        found["expr"] = expression
    alone = {"groups": [{"name": "alone", "rules": [found]}]}
    own = [case for case in cases() if case["name"].startswith(f"{rule.name}: ")]
    tests = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": own}
    (directory / "rules.yaml").write_text(yaml.safe_dump(alone), encoding="utf-8")
    (directory / "tests.yaml").write_text(yaml.safe_dump(tests), encoding="utf-8")
    return promtool("test", "rules", directory / "tests.yaml")


@needs_promtool
@each_rule
def test_the_rule_does_what_its_cases_say(rule: Rule, tmp_path: Path) -> None:
    done = run_cases(rule, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
@pytest.mark.parametrize("broken", ["vector(0) == 1", "vector(1) == 1"], ids=["never fires", "always fires"])
@each_rule
def test_the_cases_of_a_rule_notice_when_it_is_broken(rule: Rule, broken: str, tmp_path: Path) -> None:
    done = run_cases(rule, tmp_path, expression=broken)
    assert done.returncode != 0
    assert "FAILED" in done.stdout + done.stderr


@each_rule
def test_every_rule_has_a_case_that_fires_one_that_is_silent_and_one_whose_series_end(rule: Rule) -> None:
    for kind in ("fires", "silent", "stale"):
        assert cases_of(rule, kind), kind
    for case in cases_of(rule, "fires"):
        assert all(check["exp_samples"] for check in case["promql_expr_test"]), case["name"]
    for case in cases_of(rule, "silent"):
        assert case["input_series"], case["name"]
        assert not any(check["exp_samples"] for check in case["promql_expr_test"]), case["name"]
    ending = [case for case in cases_of(rule, "stale") if case["input_series"]]
    assert ending
    for case in ending:
        assert any(series["values"].endswith("stale") for series in case["input_series"]), case["name"]
        before, after = (bool(check["exp_samples"]) for check in case["promql_expr_test"])
        assert before != after, f"{case['name']}: nothing changes when the series end"


def test_no_case_is_about_a_rule_that_is_not_there() -> None:
    assert {case["name"].split(":")[0] for case in cases()} == {rule.name for rule in RULES}
    for case in cases():
        kind = case["name"].split(": ")[1].split(",")[0]
        assert kind in ("fires", "silent", "stale"), case["name"]
        alert = case["name"].split(":")[0]
        assert all(f'alertname="{alert}"' in check["expr"] for check in case["promql_expr_test"]), case["name"]


@each_rule
def test_every_metric_and_label_of_every_rule_is_in_the_catalogue(rule: Rule) -> None:
    reading = read(rule.expression)
    assert reading.selectors
    assert reading.faults == ()


def test_every_series_of_a_case_is_one_that_is_exported() -> None:
    added_by_a_scrape = {"instance"}
    for case in cases():
        for series in case["input_series"]:
            selector = promql.parse(series["series"])
            metric = BY_SERIES[selector.name]
            labels = {matcher.name for matcher in selector.matchers.matchers} - added_by_a_scrape
            wanted = set(metric.all_labels) | ({"le"} if selector.name.endswith("_bucket") else set())
            assert labels == wanted, f"{case['name']}: {series['series']}"


@each_rule
def test_a_rules_texts_name_only_labels_that_its_result_has(rule: Rule) -> None:
    shown = set(re.findall(r"\$labels\.(\w+)", rule.summary + rule.description))
    assert shown <= read(rule.expression).named_labels
    assert shown <= {
        label for found in re.findall(r"by \(([^)]*)\) \(", rule.expression) for label in found.split(", ")
    }


def test_nothing_is_compared_that_disappears_when_it_should_alarm() -> None:
    """A count or a sum below a bound is silent when every series is gone, unless absence is asked for too."""
    for rule in RULES:
        if re.search(r"(sum|count)[^<]*< 1\b|(sum|count)\([^)]*\)+ == 0", rule.expression):
            assert "absent(" in rule.expression, rule.name


def test_pages_are_few_and_every_rule_waits_before_it_disturbs_anybody() -> None:
    pages = {rule.name for rule in RULES if rule.severity is Severity.PAGE}
    assert pages == {
        "LoopServeFirstByteBurnsFast",
        "LoopServeFirstByteBurnsSlowly",
        "LoopServeFailuresBurnFast",
        "LoopServeFailuresBurnSlowly",
        "LoopServeNoReplicas",
        "LoopServeMetricsAbsent",
    }
    assert {rule.name for rule in RULES if rule.holds_for == "0m"} == {"LoopServeGpuXid"}  # an event, not a state


def entries() -> dict[str, str]:
    """The runbook's entries by alert."""
    parts = re.split(r"^## (LoopServe\w+)\n", RUNBOOK.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_alert_has_its_entry_in_the_runbook_and_every_entry_its_alert() -> None:
    assert set(entries()) == {rule.name for rule in RULES}


@each_rule
def test_an_entry_says_what_it_means_why_it_happens_what_to_look_at_and_what_to_do(rule: Rule) -> None:
    entry = entries()[rule.name]
    for heading in ("**Meaning.**", "**Likely causes.**", "**Look at.**", "**Do.**"):
        assert heading in entry, heading
    severity = {Severity.PAGE: "Page.", Severity.TICKET: "Ticket."}[rule.severity]
    assert entry.strip().startswith(severity)


@each_rule
def test_an_alert_links_to_its_entry_wherever_the_runbook_is_published(rule: Rule) -> None:
    document = yaml.safe_load(rule_file(GROUPS, runbook="https://runbooks.example/loopserve"))
    links = {r["alert"]: r["annotations"]["runbook_url"] for group in document["groups"] for r in group["rules"]}
    assert links[rule.name] == f"https://runbooks.example/loopserve#{rule.name.lower()}"
    assert rule.document("docs/runbook.md")["annotations"]["runbook_url"].startswith("docs/runbook.md#")


def test_every_setting_that_the_runbook_names_is_there() -> None:
    named = set(re.findall(r"LOOPSERVE_\w+", RUNBOOK.read_text(encoding="utf-8")))
    assert named
    assert named <= set(_variables(DeploySettings, "LOOPSERVE_")) | set(_variables(EngineConfig, "LOOPSERVE_ENGINE_"))


def _variables(record: type, prefix: str) -> Iterator[str]:
    for found in fields(record):
        yield prefix + found.name.upper()
        if is_dataclass(found.type):
            yield from _variables(found.type, f"{prefix}{found.name.upper()}__")


def test_every_panel_and_metric_that_the_runbook_names_is_there() -> None:
    text = RUNBOOK.read_text(encoding="utf-8")
    named = set(re.findall(r"`(loopserve_\w+)`", text))
    assert named <= set(BY_SERIES) | {metric.name for metric in BY_SERIES.values()}
    panels = {f"{b.title.removeprefix('LoopServe / ')} > {p.title}" for b in BOARDS for r in b.rows for p in r.panels}
    shown = set(re.findall(r"_([^_`]+ > [^_`]+)_", text))
    assert shown
    assert shown <= panels
