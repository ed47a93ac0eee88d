"""Owns what a variant's answers add up to: accuracy with its interval against dense, and what the engine reported of its sparsity.

Knows nothing about how the answers came about.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.quality.scenarios import THIRDS
from benchmarks.report import Table
from loopserve.dialogue import TurnUsage

BOOTSTRAP_DRAWS = 10_000


@dataclass(frozen=True, slots=True)
class Answered:
    """One turn as it went. `is_right` is None for a history turn."""

    is_right: bool | None
    third: str
    answer: str
    usage: TurnUsage

    @property
    def prefill_cells(self) -> int:
        """Causal cells of the turn's new rows, for one layer and head."""
        start, rows = self.usage.cached_tokens, self.usage.prompt_tokens - self.usage.cached_tokens
        return rows * start + rows * (rows + 1) // 2


@dataclass(frozen=True, slots=True)
class Outcome:
    """One row, summed up."""

    name: str
    questions: int
    accuracy: float
    difference: float  # to dense, in accuracy
    difference_low: float  # 95% interval, dialogues drawn with replacement, paired
    difference_high: float
    accuracy_by_third: dict[str, float]
    same_answers: float  # share of questions answered word for word as under dense
    coverage_mean: float | None
    coverage_worst_head: float | None
    kept_tokens: float  # decode, questions
    context_tokens: float
    kept_share: float
    cells_share: float  # prefill, all turns, weighted by cells
    cells_share_history: float
    cells_share_questions: float
    refreshes_per_answer: float
    answer_tokens: float
    dense_fallbacks: int
    rectified_tokens: int


def summarize(
    name: str, answered: Sequence[Sequence[Answered]], dense: Sequence[Sequence[Answered]], *, seed: int
) -> Outcome:
    """Sum up one variant against dense, which met the same dialogues."""
    turns = [turn for dialogue in answered for turn in dialogue]
    asked = [turn for turn in turns if turn.is_right is not None]
    asked_dense = [turn for dialogue in dense for turn in dialogue if turn.is_right is not None]
    low, high = paired_interval([_rights(d) for d in answered], [_rights(d) for d in dense], seed=seed)
    accuracy = _mean([float(bool(turn.is_right)) for turn in asked])
    coverages = [t.usage.quality.coverage_mean for t in turns if t.usage.quality.coverage_mean is not None]
    worst = [t.usage.quality.coverage_worst_head for t in turns if t.usage.quality.coverage_worst_head is not None]
    kept, context = (
        _mean([t.usage.quality.kept_tokens for t in asked]),
        _mean([t.usage.quality.context_tokens for t in asked]),
    )
    return Outcome(
        name=name,
        questions=len(asked),
        accuracy=accuracy,
        difference=accuracy - _mean([float(bool(turn.is_right)) for turn in asked_dense]),
        difference_low=low,
        difference_high=high,
        accuracy_by_third={
            third: _mean([float(bool(turn.is_right)) for turn in asked if turn.third == third]) for third in THIRDS
        },
        same_answers=_mean([float(a.answer == b.answer) for a, b in zip(asked, asked_dense, strict=True)]),
        coverage_mean=_mean(coverages) if coverages else None,
        coverage_worst_head=min(worst, default=None),
        kept_tokens=kept,
        context_tokens=context,
        kept_share=kept / context if context else 1.0,
        cells_share=_cells_share(turns),
        cells_share_history=_cells_share([turn for turn in turns if turn.is_right is None]),
        cells_share_questions=_cells_share(asked),
        refreshes_per_answer=_mean([float(turn.usage.quality.refreshes) for turn in asked]),
        answer_tokens=_mean([float(turn.usage.completion_tokens) for turn in asked]),
        dense_fallbacks=sum(turn.usage.quality.dense_fallbacks for turn in turns),
        rectified_tokens=sum(turn.usage.quality.rectified_tokens for turn in turns),
    )


def paired_interval(
    ours: Sequence[Sequence[bool]], theirs: Sequence[Sequence[bool]], *, seed: int, draws: int = BOOTSTRAP_DRAWS
) -> tuple[float, float]:
    """95% bootstrap interval of the difference in accuracy; whole dialogues are drawn, since their questions hang together."""
    assert [len(a) for a in ours] == [len(b) for b in theirs], "both met the same questions"
    gains = [sum(a) - sum(b) for a, b in zip(ours, theirs, strict=True)]
    counts = [len(a) for a in ours]
    rng = random.Random(seed)
    found = []
    for _ in range(draws):
        drawn = rng.choices(range(len(gains)), k=len(gains))
        found.append(sum(gains[i] for i in drawn) / max(1, sum(counts[i] for i in drawn)))
    found.sort()
    return found[int(0.025 * (draws - 1))], found[int(0.975 * (draws - 1))]


def _rights(dialogue: Sequence[Answered]) -> list[bool]:
    return [turn.is_right for turn in dialogue if turn.is_right is not None]


def _cells_share(turns: Sequence[Answered]) -> float:
    total = sum(turn.prefill_cells for turn in turns)
    computed = sum(turn.prefill_cells * turn.usage.quality.prefill_cells_computed_share for turn in turns)
    return computed / total if total else 1.0


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0


def outcome_table(outcomes: Sequence[Outcome]) -> Table:
    """What users read."""
    header = (
        "variant",
        "value right",
        "difference to dense (95%)",
        "early / middle / late facts",
        "same words",
        "coverage mean",
        "worst head",
        "kept tokens",
        "kept share",
        "prefill cells",
        "in history / questions",
        "choices per answer",
        "dense fallbacks",
        "re-prefilled tokens",
    )
    rows = tuple(
        (
            o.name,
            f"{o.accuracy:.1%}",
            f"{o.difference:+.1%} ({o.difference_low:+.1%} to {o.difference_high:+.1%})",
            " / ".join(f"{o.accuracy_by_third[third]:.0%}" for third in THIRDS),
            f"{o.same_answers:.1%}",
            "" if o.coverage_mean is None else f"{o.coverage_mean:.3f}",
            "" if o.coverage_worst_head is None else f"{o.coverage_worst_head:.3f}",
            f"{o.kept_tokens:.0f} of {o.context_tokens:.0f}",
            f"{o.kept_share:.1%}",
            f"{o.cells_share:.1%}",
            f"{o.cells_share_history:.1%} / {o.cells_share_questions:.1%}",
            f"{o.refreshes_per_answer:.2f}",
            str(o.dense_fallbacks),
            str(o.rectified_tokens),
        )
        for o in outcomes
    )
    return Table("Answers under sparsity", header, rows)
