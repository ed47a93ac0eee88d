"""A run's report, from its answers on disk: results.json (every number), report.md and report.html (what people read).

Knows nothing of how the answers came about; it may be made of a run that is not at its end yet, and says so.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loopserve.evaluation.answers import AnswerLog
from loopserve.evaluation.machine import sentence
from loopserve.evaluation.outcomes import DRAWS, Estimate, Outcome, VariantKey, summarize
from loopserve.evaluation.page import make_page
from loopserve.evaluation.plots import NUM_COLOURS, Line, Point, line_chart
from loopserve.evaluation.tables import findings, make_tables
from loopserve.evaluation.tasks import PASTS
from loopserve.evaluation.variants import REFERENCE

RESULTS, MARKDOWN, HTML = "results.json", "report.md", "report.html"


@dataclass(frozen=True, slots=True)
class Report:
    """What a run came to."""

    settings: Mapping[str, Any]
    starts: Sequence[Mapping[str, str]]
    num_answers: int
    against: str | None
    outcomes: tuple[Outcome, ...]

    @property
    def is_complete(self) -> bool:
        """Whether every question was answered under every variant."""
        return bool(self.num_answers == self.settings["num_answers"])


def write_report(directory: Path, *, against: str | None = "loopserve", draws: int = DRAWS) -> Report:
    """Make the three files of what the directory holds. `against`: the label that others are compared with at the same budget.

    Raises InvalidRequest where there is no run.
    """
    log, manifest = AnswerLog.read(directory)
    settings = manifest["settings"]
    keys = [VariantKey(v["name"], v["label"], v["budget"]) for v in settings["variants"]]
    against = against if any(key.label == against for key in keys) else None
    outcomes = summarize(log.answers, keys, against=against, seed=settings["seed"], draws=draws)
    report = Report(settings, manifest["starts"], len(log.answers), against, tuple(outcomes))
    (directory / RESULTS).write_text(json.dumps(as_record(report), indent=1) + "\n", encoding="utf-8")
    (directory / MARKDOWN).write_text(as_markdown(report), encoding="utf-8")
    (directory / HTML).write_text(as_html(report), encoding="utf-8")
    return report


def as_record(report: Report) -> dict[str, Any]:
    """Every number."""
    return {
        "settings": dict(report.settings),
        "starts": [dict(start) for start in report.starts],
        "num_answers": report.num_answers,
        "is_complete": report.is_complete,
        "against": report.against,
        "outcomes": [asdict(outcome) for outcome in report.outcomes],
    }


def as_markdown(report: Report) -> str:
    """Facts, findings, tables."""
    parts = [f"# {_title(report)}", *_facts(report)]
    parts.append("\n".join(f"- {each}" for each in findings(report.outcomes, against=report.against)))
    parts += [table.markdown() for table in make_tables(report.outcomes, _alphas(report), against=report.against)]
    return "\n\n".join(part for part in parts if part) + "\n"


def as_html(report: Report) -> str:
    """The same, with charts."""
    return make_page(
        _title(report),
        facts=_facts(report),
        findings=findings(report.outcomes, against=report.against),
        charts=list(_charts(report)),
        tables=make_tables(report.outcomes, _alphas(report), against=report.against),
    )


def _title(report: Report) -> str:
    return f"{report.settings['model']} under sparse attention: {', '.join(report.settings['tasks'])}"


def _facts(report: Report) -> list[str]:
    settings, outcomes = report.settings, report.outcomes
    asked = max((o.whole.score.num for o in outcomes), default=0)
    tokens = max((o.prompt_tokens_mean for o in outcomes), default=0.0)
    facts = [
        f"N = {tokens:.0f} tokens, mean of the prompts; {settings['num_dialogues']} dialogues, {asked} questions for each variant. "
        f"Split {settings['split']}, seed {settings['seed']}, greedy, answers of at most {settings['max_tokens']} tokens, "
        f"{settings['dtype']}. The past holds {PASTS[settings.get('past', 'reference')]}.",
        f"{sentence(dict(report.starts[-1]))}."
        + (f" Started {len(report.starts)} times." if len(report.starts) > 1 else ""),
    ]
    if not report.is_complete:
        facts.insert(0, f"Not complete: {report.num_answers} of {settings['num_answers']} answers are there.")
    return facts


def _alphas(report: Report) -> dict[str, float | None]:
    return {variant["name"]: variant["alpha"] for variant in report.settings["variants"]}


def _charts(report: Report) -> list[tuple[str, str]]:
    charts = []
    title, x_title = "Score against the KV that decode reads", "KV read, % of what dense decode reads"
    lines = _lines(report.outcomes, lambda o: o.whole.score)
    if lines:
        charts.append((title, line_chart(lines, title=title, x_title=x_title, y_title="score, % [95 %]")))
    title = f"Difference to {REFERENCE}, paired"
    lines = _lines(report.outcomes, lambda o: o.whole.to_reference)
    if lines:
        charts.append((title, line_chart(lines, title=title, x_title=x_title, y_title="points [95 %]")))
    title = "Coverage reached against the alpha asked for"
    covered = _coverage_lines(report)
    if covered:
        charts.append((title, line_chart(covered, title=title, x_title="alpha, %", y_title="coverage, %")))
    title = "Length of the answers"
    lines = _lines(report.outcomes, _length, factor=1)
    if lines:
        charts.append((title, line_chart(lines, title=title, x_title=x_title, y_title="tokens, mean", y_factor=1)))
    return charts


def _lines(
    outcomes: Sequence[Outcome], estimate_of: Callable[[Outcome], Estimate | None], *, factor: float = 100
) -> list[Line]:
    """A line for each label that was asked at budgets, and dense across; empty where no variant has a budget."""
    by_label: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.key.budget is not None and outcome.kv_share and estimate_of(outcome) is not None:
            by_label.setdefault(outcome.key.label, []).append(outcome)
    lines = [
        Line(label, colour, tuple(_point(o, estimate_of(o), factor) for o in group))
        for colour, (label, group) in enumerate(by_label.items())
    ]
    reference = next((o for o in outcomes if o.key.name == REFERENCE), None)
    if lines and reference is not None and estimate_of(reference) is not None:
        lines.append(
            Line(REFERENCE, NUM_COLOURS - 1, (_point(reference, estimate_of(reference), factor),), is_level=True)
        )
    return lines


def _point(outcome: Outcome, estimate: Estimate | None, factor: float) -> Point:
    assert estimate is not None and outcome.kv_share is not None, "only these are drawn"
    told = (
        f"{outcome.key.name}: {factor * estimate.value:.1f} [{factor * estimate.low:.1f}, {factor * estimate.high:.1f}]"
    )
    return Point(
        outcome.kv_share, estimate.value, estimate.low, estimate.high, f"{told} at {outcome.kv_share:.1%} of the KV"
    )


def _coverage_lines(report: Report) -> list[Line]:
    """What was reached on the past (else on the questions' turns) for each alpha; empty where fewer than two were asked for."""
    reached: dict[str, dict[float, Point]] = {}
    found = {outcome.key.name: outcome for outcome in report.outcomes}
    for variant in report.settings["variants"]:
        outcome, alpha = found.get(variant["name"]), variant["alpha"]
        if outcome is None or alpha is None:
            continue
        coverage = outcome.coverage if outcome.past_coverage is None else outcome.past_coverage
        if coverage is not None:
            told = f"{outcome.key.name}: {coverage:.3f}"
            reached.setdefault(variant["method"], {})[alpha] = Point(alpha, coverage, coverage, coverage, told)
    lines = [Line(name, i, tuple(by.values())) for i, (name, by) in enumerate(reached.items()) if len(by) > 1]
    asked = sorted({point.x for line in lines for point in line.points})
    if lines:
        lines.append(Line("asked", NUM_COLOURS - 1, tuple(Point(x, x, x, x, f"asked: {x:g}") for x in asked)))
    return lines


def _length(outcome: Outcome) -> Estimate:
    mean = outcome.answer_tokens_mean
    return Estimate(mean, mean, mean, outcome.whole.score.num)
