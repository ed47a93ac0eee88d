"""`loopserve bench --tune`: measures on this device where sparse attention pays, shows it, and writes the engine's table. Starts no server.

What is measured, and how, is `loopserve/tuning/`; it is imported when the command runs, since it needs torch.
"""

import shlex
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loopserve.config import ENV_PREFIX, EngineConfig
from loopserve.crossover import from_where, read_table, write_entry
from loopserve.errors import InvalidRequest

if TYPE_CHECKING:
    from loopserve.tuning import Decode, Prefill, Tuning

OUT = Path("crossover.json")


def parse_contexts(text: str) -> tuple[int, ...]:
    """Lengths by comma. Raises InvalidRequest."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not all(word.isdecimal() for word in words):
        raise InvalidRequest(f"--contexts: {text!r} is no list of lengths; write 2048,4096,8192", param="contexts")
    return tuple(map(int, words))


def run_tuning(
    *, model: str, device: str, contexts: str, rows: int | None, seconds: float | None, seed: int | None, out: Path
) -> None:
    """Measure, print, write `out`. Settings of the engine come from the environment; `model` and `device` win where they are given.

    Raises ConfigError, InvalidRequest and UnsupportedModel.
    """
    chosen = parse_contexts(contexts)
    # What cannot be written is told now, not after the measurement.
    if not out.resolve().parent.is_dir():
        raise InvalidRequest(f"--out: there is no folder {out.resolve().parent}", param="out")
    if out.exists():
        read_table(out)
    given: dict[str, Any] = {name: value for name, value in (("model", model), ("device", device)) if value}
    config = EngineConfig.from_env(**given)
    notes = Console(stderr=True, soft_wrap=True, highlight=False)
    notes.print("[dim]Loading the model ...[/]")
    from loopserve.loading import load_model
    from loopserve.tuning import Decode, TuningPlan, speedup, tune

    loaded = load_model(config)
    options: dict[str, Any] = {"contexts": chosen, "rows": rows, "seconds_max": seconds, "seed": seed}
    plan = TuningPlan(**{name: value for name, value in options.items() if value is not None})

    def tell(point: "Prefill | Decode") -> None:
        phase = "decode" if isinstance(point, Decode) else "prefill"
        notes.print(f"[dim]{phase} at {point.context_tokens} tokens: {speedup(point):.2f} times as fast as dense[/]")

    found = tune(loaded, config, plan, on_point=tell)
    write_entry(out, found.entry)
    console = Console(soft_wrap=True, highlight=False)
    for table in (prefill_table(found, config.prefill.chunk_tokens), decode_table(found)):
        console.print(table)
    for line in remarks(found, plan.seconds_max):
        console.print(escape(line))
    console.print(
        f"\nWritten: {escape(str(out))}. The engine reads it with\n"
        f"  {ENV_PREFIX}CROSSOVER_FILE={escape(shlex.quote(str(out.resolve())))}"
    )


def prefill_table(found: "Tuning", chunk: int) -> Table:
    """Milliseconds a chunk, and whether sparse is worth it."""
    table = _table(f"prefill of {chunk} tokens", "cached context", "cells computed")
    for point in found.prefills:
        table.add_row(str(point.context_tokens), *_times(point), f"{point.cells_share:.0%}", _verdict(point))
    return table


def decode_table(found: "Tuning") -> Table:
    """Milliseconds a step, and whether sparse is worth it."""
    table = _table(f"decode, {found.entry.decode_rows} side by side", "context", "tokens kept")
    for point in found.decodes:
        table.add_row(str(point.context_tokens), *_times(point), str(point.kept_tokens), _verdict(point))
    return table


def remarks(found: "Tuning", seconds_max: float) -> list[str]:
    """What follows, how far it was looked, and what these numbers do not show."""
    entry = found.entry
    lines = [
        f"{entry.device}, heads {entry.shape}: with mode auto, prefill is {from_where(entry.prefill_min_context_tokens)}, "
        f"decode {from_where(entry.decode_min_context_tokens)}."
    ]
    more = (
        f"The {seconds_max:g} seconds were over: --seconds gives more."
        if found.is_out_of_time
        else f"Model and KV pool have room for {found.longest_tokens}, the pool for more with fewer --rows."
    )
    for phase, least, points in (
        ("prefill", entry.prefill_min_context_tokens, found.prefills),
        ("decode", entry.decode_min_context_tokens, found.decodes),
    ):
        if least is None:
            longest = points[-1].context_tokens
            lines.append(f"Beyond {longest} tokens {phase} was not measured, and stays dense. {more}")
    flat = (
        " Random tokens make attention nearly flat, the worst case for sparse prefill."
        if found.text == "random tokens"
        else ""
    )
    lines.append(
        f"Measured on {found.text}.{flat} These are times: how good answers are, `loopserve eval` tells. One conversation, repeated "
        "in every row; turns of unequal length were not measured."
    )
    return lines


def _table(title: str, context: str, share: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for name in (context, "dense ms", "sparse ms", "speed-up", share):
        table.add_column(name, justify="right")
    table.add_column("")
    return table


def _times(point: "Prefill | Decode") -> tuple[str, ...]:
    from loopserve.tuning import speedup

    medians = (statistics.median(seconds) for seconds in (point.dense_s, point.sparse_s))
    return (*(f"{1e3 * median:.2f}" for median in medians), f"{speedup(point):.2f}")


def _verdict(point: "Prefill | Decode") -> str:
    from loopserve.tuning import MARGIN, speedup

    if speedup(point) > MARGIN:
        return "sparse pays"
    return "sparse loses" if speedup(point) < 1.0 else f"not worth it (less than {MARGIN:g})"
