"""`loopserve bench`: options to a load, a progress bar while it runs, tables and JSON at its end. The load itself is `loopserve/bench/`.

With `--tune` there is no load and no server: it measures this device, see `loopserve/cli/tune.py`.
"""

import asyncio
import json
import random
import secrets
import signal
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Self

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from loopserve.bench import (
    Distribution,
    Endpoint,
    Given,
    LoadResult,
    Script,
    ScriptTurn,
    Slo,
    Synthetic,
    TurnRecord,
    Workload,
    made_text,
    measure_tokens_per_word,
    run_load,
    served_model,
    summarise,
)
from loopserve.bench.workload import CONCURRENCY_MAX
from loopserve.cli.bench_tables import tables
from loopserve.cli.dialogue_file import read_dialogues
from loopserve.cli.tune import OUT, run_tuning
from loopserve.errors import InvalidRequest

DIALOGUES = 100
_TOKENS_PER_WORD = 1.3  # English words in the vocabularies of large models; where a server reports no usage
_WITH_TUNE = ("tune", "model", "seconds", "seed")  # options that mean something to both
_TUNE_ONLY = ("device", "contexts", "rows", "out")
_SHAPES = "N, uniform:A..B, exponential:MEAN[..MAX] or lognormal:MEDIAN,SIGMA[..MAX]"


def bench(
    context: typer.Context,
    url: Annotated[str, typer.Option(help="The server, with or without /v1.")] = "http://127.0.0.1:8000",
    model: Annotated[
        str, typer.Option(help="Model id; the server's first where not given. With --tune: hub id or directory.")
    ] = "",
    api_key: Annotated[
        str | None, typer.Option(envvar="LOOPSERVE_API_KEY", help="Sent as a bearer token.", show_envvar=True)
    ] = None,
    session_header: Annotated[
        str | None,
        typer.Option(help="Name every dialogue in this header, e.g. x-session-id; plain OpenAI if not given."),
    ] = None,
    dialogues: Annotated[
        Path | None, typer.Option(help="Dialogues as JSONL, as `loopserve replay` reads them, instead of made-up ones.")
    ] = None,
    number: Annotated[
        int | None,
        typer.Option("--number", "-n", min=1, help=f"Dialogues to measure; {DIALOGUES}, or all of the file."),
    ] = None,
    warmup: Annotated[int, typer.Option(min=0, help="Dialogues before them that do not count.")] = 0,
    concurrency: Annotated[
        int, typer.Option("--concurrency", "-c", min=1, max=CONCURRENCY_MAX, help="Dialogues held at a time.")
    ] = 8,
    rate: Annotated[
        float | None, typer.Option(help="Dialogues begun per second, at random times; not more are held than -c says.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Send no turn after this time. With --tune: its limit, 300 if not given.")
    ] = None,
    drain: Annotated[float, typer.Option(min=0, help="Seconds that turns have to end when the time is over.")] = 10.0,
    turns: Annotated[str, typer.Option(help=f"Turns of a dialogue: {_SHAPES}.")] = "6",
    input_tokens: Annotated[str, typer.Option("--input", help="New tokens a turn, likewise.")] = "100",
    output_tokens: Annotated[str, typer.Option("--output", help="Most tokens of an answer, likewise.")] = "50",
    think: Annotated[str, typer.Option(help="Seconds between an answer and the next turn, likewise.")] = "0",
    system: Annotated[str, typer.Option(help="Tokens of the system prompt, likewise.")] = "0",
    own_system: Annotated[
        bool, typer.Option("--own-system", help="A system prompt for each, not one for all.")
    ] = False,
    body: Annotated[
        str, typer.Option(help="Fields of every request, as JSON: '{\"ignore_eos\": true}'.", metavar="JSON")
    ] = "{}",
    limit_field: Annotated[
        str, typer.Option(help="What the request calls the longest answer; max_completion_tokens for some.")
    ] = "max_tokens",
    retry: Annotated[int, typer.Option(min=0, help="Send a rejected turn again, after Retry-After, so often.")] = 0,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds of silence after which a turn has failed.")] = 300.0,
    slo_ttft: Annotated[float | None, typer.Option(help="Goodput: seconds to the first token.")] = None,
    slo_itl: Annotated[float | None, typer.Option(help="Goodput: mean seconds between two tokens of a turn.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of all that is drawn; new in every run if not given, so that no cache knows it.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report here as well.")] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="No load: measure from which length on sparse attention pays here, and write the engine's table.",
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="--tune: auto, cpu or cuda; auto if not given.")] = "",
    contexts: Annotated[
        str, typer.Option(help="--tune: lengths, by comma; doubling from 2048 to the longest that fits if not given.")
    ] = "",
    rows: Annotated[
        int | None, typer.Option(min=1, help="--tune: turns that decode side by side; 4 if not given.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="--tune: the table; entries for other devices and models in it stay.")
    ] = OUT,
) -> None:
    """Hold many dialogues at once with any OpenAI server, and tell how it went. Ctrl-C ends it and tells what there is."""
    _check_options(context, tune=tune)
    if tune:
        run_tuning(model=model, device=device, contexts=contexts, rows=rows, seconds=seconds, seed=seed, out=out)
        return
    if dialogues is not None and system != "0":
        raise InvalidRequest(
            "--system does not go with --dialogues: the file has its own system prompts", param="system"
        )
    endpoint = Endpoint(
        url=url,
        model=model,
        api_key=api_key,
        session_header=session_header,
        body=_fields(body),
        limit_field=limit_field,
        silence_s_max=timeout,
        num_retries=retry,
    )
    seed = secrets.randbelow(2**31) if seed is None else seed
    made = Synthetic(
        turns=Distribution.parse(turns, name="--turns"),
        input_tokens=Distribution.parse(input_tokens, name="--input"),
        output_tokens=Distribution.parse(output_tokens, name="--output"),
        think_s=Distribution.parse(think, name="--think"),
        system_tokens=Distribution.parse(system, name="--system"),
        shares_system=not own_system,
        seed=seed,
    )
    workload = Workload(
        source=made if dialogues is None else _given(dialogues, made),
        num_dialogues=DIALOGUES if number is None and dialogues is None and seconds is None else number,
        num_warmup=warmup,
        concurrency=concurrency,
        rate_per_s=rate,
        duration_s=seconds,
        drain_s=drain,
        seed=seed,
    )
    notes = Console(stderr=True, soft_wrap=True, highlight=False)
    endpoint, workload, result = asyncio.run(_measure(endpoint, workload, notes))
    report = summarise(result, Slo(slo_ttft, slo_itl))
    if json_file is not None:
        record = {**asdict(report), "endpoint": _told(endpoint), "workload": _described(workload)}
        json_file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console = Console()
    for table in tables(report):
        console.print(table)
    if report.turns.answered == 0 or report.turns.failed:
        raise typer.Exit(1)


def _check_options(context: typer.Context, *, tune: bool) -> None:
    """Raise InvalidRequest for an option that would be without effect."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    lost = [name for name in given if (name not in (*_WITH_TUNE, *_TUNE_ONLY) if tune else name in _TUNE_ONLY)]
    if lost:
        option = "--" + lost[0].removesuffix("_file").replace("_", "-")
        means = "of a load, which --tune does not send" if tune else "of --tune"
        raise InvalidRequest(f"{option} is an option {means}", param=lost[0])


def _fields(body: str) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except ValueError as error:
        raise InvalidRequest(f"--body is no JSON: {error}", param="body") from error
    if not isinstance(fields, dict):
        raise InvalidRequest("--body is no JSON object; write '{\"ignore_eos\": true}'", param="body")
    return fields


def _given(path: Path, made: Synthetic) -> Given:
    """The dialogues of a file; their answers' lengths and think times are drawn as those of made-up ones."""
    scripts = []
    for dialogue in read_dialogues(path):
        rng = random.Random(f"{made.seed}/{dialogue.id}")
        turns = tuple(
            ScriptTurn(
                user=turn.user,
                output_tokens_max=made.output_tokens.draw_whole(rng, least=1),
                think_s=made.think_s.draw(rng) if number else 0.0,
                is_right=turn.is_right,
            )
            for number, turn in enumerate(dialogue.turns)
        )
        scripts.append(Script(dialogue.id, turns, dialogue.system))
    return Given(scripts)


async def _measure(endpoint: Endpoint, workload: Workload, notes: Console) -> tuple[Endpoint, Workload, LoadResult]:
    """The load, with what had to be asked first filled in: the model, and how many tokens a word is to it."""
    async with endpoint.client() as http:
        endpoint = replace(endpoint, model=endpoint.model or await served_model(http, endpoint.url))
        if isinstance(workload.source, Synthetic):
            rng = random.Random(workload.seed)
            measured = await measure_tokens_per_word(http, endpoint, lambda num_words: made_text(rng, num_words))
            if measured is None:
                notes.print(f"[dim]The server reports no usage: a word is taken for {_TOKENS_PER_WORD} tokens.[/]")
            source = replace(workload.source, tokens_per_word=measured or _TOKENS_PER_WORD)
            workload = replace(workload, source=source)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop.set)
    with _Bar(workload, endpoint, notes) as bar:
        return endpoint, workload, await run_load(workload, endpoint, on_turn=bar.take, stop=stop)


class _Bar:
    """Progress in dialogues where their number is known, else in seconds."""

    def __init__(self, workload: Workload, endpoint: Endpoint, notes: Console) -> None:
        num = workload.num_measured
        self._by_seconds = num is None
        self._told = escape(f"{endpoint.model} at {endpoint.url}")
        self._answered = self._failed = 0
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=notes, transient=True
        )
        total = workload.duration_s if num is None else num + workload.num_warmup
        self._task = self._progress.add_task(self._told, total=total)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def take(self, turn: TurnRecord) -> None:
        """Show one more turn."""
        self._answered += turn.is_answered
        self._failed += not turn.is_answered
        description = f"{self._told}: {self._answered} turns" + (f", {self._failed} failed" if self._failed else "")
        if self._by_seconds:
            self._progress.update(self._task, description=description, completed=max(turn.sent_at_s + turn.total_s, 0))
        else:
            self._progress.update(self._task, description=description, advance=turn.is_last)


def _told(endpoint: Endpoint) -> dict[str, Any]:
    """The endpoint as a report names it: without its key."""
    return {name: value for name, value in asdict(endpoint).items() if name != "api_key"}


def _described(workload: Workload) -> dict[str, Any]:
    """The load as a report names it: enough to send it again."""
    source = workload.source
    if isinstance(source, Synthetic):
        made = {name: getattr(source, name) for name in Synthetic.__dataclass_fields__}
        said = {n: str(value) if isinstance(value, Distribution) else value for n, value in made.items()}
    else:
        said = {"given": source.num_scripts}
    pace = {name: getattr(workload, name) for name in Workload.__dataclass_fields__ if name != "source"}
    return {**pace, "dialogues": said}
