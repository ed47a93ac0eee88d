"""`loopserve eval`: options to a run of the quality suite, a bar while it goes, a table at its end.

Knows nothing of how anything is asked or scored; that is `loopserve/evaluation/`.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from loopserve.evaluation.dialogues import TASKS
from loopserve.evaluation.tasks import ASKS, PASTS, SPLITS, Wanted
from loopserve.evaluation.variants import METHODS, Budget, make_variants, parse_alpha, parse_override

if TYPE_CHECKING:
    from loopserve.evaluation.answers import Answer
    from loopserve.evaluation.report import Report

CONCURRENCY_MAX = 256
_INTERRUPTED = 130  # exit status, as shells have it


def evaluate(
    out: Annotated[Path, typer.Option(help="Answers and report go here; a run that was broken off goes on.")],
    model: Annotated[str, typer.Option(help="Hub id or directory; the shipped model if not given.")] = "",
    tasks: Annotated[
        str,
        typer.Option(
            help=f"Made dialogues ({', '.join(TASKS)}), FILE.jsonl, multiturn[:...], scbench:SUBSET; by comma."
        ),
    ] = ",".join(TASKS),
    methods: Annotated[str, typer.Option(help=f"Of {', '.join(METHODS)}; by comma.")] = "dense,loopserve,snapkv",
    budgets: Annotated[
        str,
        typer.Option(help="What decode may read: a share of dense decode's KV, or tokens for each KV head; by comma."),
    ] = "50%,25%,10%,5%",
    alphas: Annotated[str, typer.Option(help="Shares that prefill covers, by comma; the engine's if not given.")] = "",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="An engine setting, for all but dense: decode.pooling_tokens=1."
        ),
    ] = None,
    dialogues: Annotated[int, typer.Option(min=1, help="Made dialogues; of a file at most so many.")] = 400,
    tokens: Annotated[int, typer.Option(min=64, help="Length of a made dialogue, about.")] = 2048,
    seed: Annotated[int, typer.Option(help="Of the made dialogues and of all that is drawn.")] = 1,
    split: Annotated[str, typer.Option(help=f"Of the made dialogues: {', '.join(SPLITS)}.")] = SPLITS[0].value,
    ask: Annotated[
        str,
        typer.Option(
            help="probes: of a dialogue that has any, only these, over its whole past; all: every scored turn."
        ),
    ] = ASKS[0],
    past: Annotated[
        str,
        typer.Option(
            help="reference: a dialogue goes on with its reference answers; own: with what the model itself answers, densely."
        ),
    ] = next(iter(PASTS)),
    concurrency: Annotated[int, typer.Option(min=1, max=CONCURRENCY_MAX, help="Answers at a time.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    against: Annotated[
        str, typer.Option(help="A method that the others are compared with at their budget, besides dense.")
    ] = "loopserve",
) -> None:
    """Ask known questions over long dialogues, greedily, with every method at every budget, and report what each loses to dense."""
    wanted = Wanted(tasks=_listed(tasks), num=dialogues, tokens=tokens, seed=seed, split=split, ask=ask, past=past)
    variants = make_variants(
        _listed(methods),
        [Budget.parse(text) for text in _listed(budgets)],
        alphas=[parse_alpha(text) for text in _listed(alphas)],
        overrides=[parse_override(text) for text in settings or ()],
    )
    from loopserve.evaluation.answers import MANIFEST
    from loopserve.evaluation.report import HTML, write_report
    from loopserve.evaluation.suite import Settings, run

    notes = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        with _Bar(notes) as bar:
            run(Settings(model, wanted, variants, out, concurrency, max_tokens), listener=bar)
    except KeyboardInterrupt:
        notes.print("Broken off; the same command goes on.")
        if (out / MANIFEST).exists():
            write_report(out, against=against)
            notes.print(f"[dim]{escape(str(out / HTML))}[/]")
        sys.exit(_INTERRUPTED)
    report = write_report(out, against=against)
    Console().print(_table(report))
    notes.print(f"[dim]{escape(str(out / HTML))}[/]")


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part for part in (part.strip() for part in text.split(",")) if part)


class _Bar:
    """Progress in answers."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("answers"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("making dialogues", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def told(self, num_told: int, num_dialogues: int) -> None:
        """So many pasts are told."""
        self._progress.update(self._task, description="telling", total=num_dialogues, completed=num_told)

    def counted(self, num_answers: int, num_before: int) -> None:
        """So many there will be, and so many there are."""
        self._progress.update(self._task, description="asking", total=num_answers, completed=num_before)

    def answered(self, answer: "Answer") -> None:
        """One more."""
        self._progress.update(self._task, description=escape(answer.variant), advance=1)


def _table(report: "Report") -> Table:
    """The first table of the report, what fits a terminal of it."""
    from loopserve.evaluation.tables import points

    table = Table("variant", "KV read", "score", "to dense, points [95 %]", "answers", "tokens")
    for outcome in report.outcomes:
        score, to_dense = outcome.whole.score, outcome.whole.to_reference
        table.add_row(
            escape(outcome.key.name),
            "-" if outcome.kv_share is None else f"{outcome.kv_share:.1%}",
            f"{score.value:.1%}",
            escape("" if to_dense is None else points(to_dense)),
            str(score.num),
            f"{outcome.answer_tokens_mean:.1f}",
        )
    return table
