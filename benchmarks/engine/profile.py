"""Where the time of a step goes: a profile of one prefill step and of decode steps, dense and sparse, with every pause of the
device.

Each case is profiled twice. The first time without Python's functions: its times, gaps and kernels are the result. The second
time with them, which slows the host down: it tells what the host did while the device waited. Beside FILE.json lie FILE.svg, a
picture of all cases, and each case's Chrome trace (for chrome://tracing or Perfetto) where it is small enough. The contexts are
random (`steps.py`); a bias on the queries makes attention peaked, without which sparse prefill would have nothing to leave out.

    python -m benchmarks.engine.profile --out FILE.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.engine.activity import Activity, record_steps
from benchmarks.engine.device import (
    Deadline,
    add_common_flags,
    describe_device,
    device_of,
    dtype_of,
    fill_in,
    free_bytes,
    write_record,
)
from benchmarks.engine.shape import LLAMA_8B, TINY, build_model
from benchmarks.engine.steps import Answers, FilledPool, num_fitting
from benchmarks.engine.timeline import draw_timelines
from benchmarks.report import Table
from loopserve.config import DecodeSparsity, EngineConfig, PrefillSparsity
from loopserve.loading import LoadedModel
from loopserve.plan import SparsePrefill

_RESERVE_BYTES = 8 << 30  # of device memory: a prefill of thousands of rows needs some beside the pool
_WARM_STEPS = 10  # before a profile: they compile and capture, and pass the early refreshes
_TRACE_BYTES_MAX = 8 << 20
_TOP_KERNELS, _TOP_GAPS, _TOP_FUNCTIONS = 12, 8, 12


def run_benchmark(args: argparse.Namespace) -> str:
    """All cases; writes the result, the traces and the picture, and gives the Markdown."""
    deadline = Deadline(args.seconds_max)
    device = device_of(args)
    machine = describe_device(device, commit=args.commit)
    size = replace(TINY if args.tiny else LLAMA_8B, verticals=args.verticals)
    loaded = build_model(size, device=device, dtype=dtype_of(device), seed=args.seed)
    config = EngineConfig(
        dtype=str(loaded.dtype).removeprefix("torch."),
        seed=args.seed,
        prefill=PrefillSparsity(chunk_tokens=args.rows),
        max_step_prefill_tokens=max(args.rows, EngineConfig().max_step_prefill_tokens),
        decode=DecodeSparsity(budget_tokens=args.budget),
        cuda_graphs=args.graphs,
    )
    batch = _fitting_batch(loaded, config, args)
    pool = FilledPool(
        loaded, config, num_sequences=batch, context_tokens=args.context_tokens, room_tokens=_room_tokens(args)
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    picture = args.out.with_suffix(".svg")
    rows: dict[str, dict[str, Any]] = {}
    seen: dict[str, Activity] = {}
    found = cases(pool, args)

    def written() -> str:
        picture.write_text(draw_timelines(seen), encoding="utf-8")
        done = [rows.get(name, {"case": name, "skipped": "no time was left"}) for name, _, _ in found]
        return write_record(
            args,
            title="Where the time of a step goes",
            machine=machine,
            rows=done,
            numbers={"picture": picture.name, "batch": batch},
            tables=tables([row for row in done if "skipped" not in row]),
            notes=notes(args, batch),
        )

    for name, begin, num_steps in found:
        if deadline.is_over:
            break
        trace = args.out.with_name(f"{args.out.stem}.{name.replace(' ', '_')}.trace.json.gz")
        try:
            seen[name] = record_steps(begin(), num_steps, device, keep_trace=trace)
        except ValueError as error:
            rows[name] = {"case": name, "skipped": str(error)}
            continue
        rows[name] = row_of(name, seen[name], trace=_kept(trace), batch=_batch_of(name, batch))
        written()  # whatever happens to the next one, this one is kept
        print(f"{name}: {seen[name].wall_us / 1e3 / num_steps:.2f} ms a step, {deadline.left_s:.0f} s left", flush=True)
    for name, begin, num_steps in found:
        if name in seen and not deadline.is_over:
            with_python = record_steps(begin(), num_steps, device, stacks=True)
            rows[name]["functions_while_idle"] = _function_shares(with_python)
            written()
    return written()


def cases(pool: FilledPool, args: argparse.Namespace) -> list[tuple[str, Callable[[], Callable[[], object]], int]]:
    """Name, what begins a case and gives its step, and how many steps are profiled. What begins it also warms up."""

    def prefill(*, sparse: bool) -> Callable[[], Callable[[], object]]:
        settings = pool.config.prefill
        order = SparsePrefill(settings.method, alpha=settings.alpha, min_coverage=None, seed=args.seed)

        def step() -> object:
            return pool.prefill(args.rows, order if sparse else None)

        def begin() -> Callable[[], object]:
            step()
            return step

        return begin

    def decode(*, sparse: bool) -> Callable[[], Callable[[], object]]:
        def begin() -> Callable[[], object]:
            answers = Answers(pool, sparse=sparse, ahead=args.ahead)
            for _ in range(_WARM_STEPS):
                answers.step()
            return answers.step

        return begin

    return [  # a prefill first: the profiler has to be there before graphs are captured
        ("prefill sparse", prefill(sparse=True), 1),
        ("decode sparse", decode(sparse=True), args.steps),
        ("decode dense", decode(sparse=False), args.steps),
        ("prefill dense", prefill(sparse=False), 1),
    ]


def row_of(name: str, seen: Activity, *, trace: str | None, batch: int) -> dict[str, Any]:
    """One case's numbers; times are milliseconds of one step, but for single gaps and calls."""
    steps = seen.num_steps
    return {
        "case": name,
        "batch": batch,
        "steps": steps,
        "wall_ms": seen.wall_us / 1e3 / steps,
        "busy_ms": seen.busy_us / 1e3 / steps,
        "idle_share": seen.idle_share,
        "device_calls": len(seen.device) / steps,
        "gap_classes": [
            {**found, "count": found["count"] / steps, "total_us": found["total_us"] / steps}  # type: ignore[operator]
            for found in seen.gap_classes()
        ],
        "largest_gaps": [asdict(gap) for gap in seen.gaps()[:_TOP_GAPS]],
        "top_kernels": [
            {"name": kernel, "ms": us / 1e3 / steps, "calls": calls / steps, "share_of_busy": us / seen.busy_us}
            for kernel, us, calls in seen.top_work(_TOP_KERNELS)
        ],
        "functions_while_idle": [],
        "trace": trace,
    }


def _function_shares(with_python: Activity) -> list[dict[str, Any]]:
    idle_us = with_python.wall_us - with_python.busy_us
    return [
        {"name": name, "share_of_idle": us / idle_us if idle_us else 0.0}
        for name, us in with_python.functions_while_idle(_TOP_FUNCTIONS)
    ]


def _kept(trace: Path) -> str | None:
    """The trace's name, where it is small enough to be kept; else it is deleted."""
    if trace.stat().st_size < _TRACE_BYTES_MAX:
        return trace.name
    trace.unlink()
    return None


def _batch_of(name: str, batch: int) -> int:
    return batch if name.startswith("decode") else 1


def _room_tokens(args: argparse.Namespace) -> int:
    decode = _WARM_STEPS + args.steps + 1 + args.ahead  # one more inside the profiler, which is not counted
    return int(max(args.rows, decode))


def _fitting_batch(loaded: LoadedModel, config: EngineConfig, args: argparse.Namespace) -> int:
    free = free_bytes(loaded.device)
    if free is None:
        return int(args.batch)
    fitting = num_fitting(
        loaded,
        config,
        context_tokens=args.context_tokens,
        room_tokens=_room_tokens(args),
        pool_bytes=max(0, free - _RESERVE_BYTES),
    )
    if fitting < 1:
        raise SystemExit(f"Not one sequence of {args.context_tokens} tokens fits beside the model.")
    return int(min(args.batch, fitting))


def tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """The steps side by side, then the details of each case."""
    classes = [found["size"] for found in rows[0]["gap_classes"]] if rows else []
    steps = Table(
        "A step",
        (
            "case",
            "batch",
            "wall ms",
            "device busy ms",
            "idle",
            "device calls",
            *(f"gaps of {size}" for size in classes),
        ),
        tuple(
            (
                row["case"],
                str(row["batch"]),
                f"{row['wall_ms']:.2f}",
                f"{row['busy_ms']:.2f}",
                f"{row['idle_share']:.0%}",
                f"{row['device_calls']:.0f}",
                *(f"{g['count']:.0f}, {g['total_us'] / 1e3:.2f} ms" for g in row["gap_classes"]),
            )
            for row in rows
        ),
    )
    return [steps, *(table for row in rows for table in _details(row))]


def _details(row: dict[str, Any]) -> list[Table]:
    name = row["case"]
    kernels = Table(
        f"{name}: what the device did",
        ("name", "ms a step", "calls a step", "of busy"),
        tuple(
            (_short(k["name"]), f"{k['ms']:.3f}", f"{k['calls']:.0f}", f"{k['share_of_busy']:.1%}")
            for k in row["top_kernels"]
        ),
    )
    gaps = Table(
        f"{name}: the longest gaps",
        ("at ms", "us", "the host meanwhile", "then"),
        tuple(
            (
                f"{gap['start_us'] / 1e3:.2f}",
                f"{gap['length_us']:.0f}",
                "; ".join(f"{_short(act, 40)} {us:.0f}" for act, us in gap["host"][:3]),
                _short(gap["next_work"], 40) or "the step's end",
            )
            for gap in row["largest_gaps"]
        ),
    )
    host = Table(
        f"{name}: the host while the device waits",
        ("function of ours", "of idle time"),
        tuple((_short(act["name"]), f"{act['share_of_idle']:.1%}") for act in row["functions_while_idle"]),
    )
    return [kernels, gaps, host]


def _short(name: str, length: int = 80) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def notes(args: argparse.Namespace, batch: int) -> list[str]:
    """What a reader must know beside the tables."""
    return [
        f"Model: Llama-3.1-8B's shape unless tiny, random weights, queries biased so that scores spread by {args.verticals:g} over the "
        f"keys alike for all queries; {args.context_tokens} tokens of random KV a sequence, blocks scattered, B {args.budget}.",
        f"Prefill: the last chunk of a prompt, {args.rows} new rows, the first token drawn; a sparse one makes the first choice of decode. "
        f"Decode: {args.steps} steps after {_WARM_STEPS} others, {args.ahead} launched ahead"
        f"{'' if args.graphs else ', not from graphs'}.",
        *(
            [f"Decode: batch {batch}, the largest that fits; {args.batch} were asked for."]
            if batch < args.batch
            else []
        ),
        "Wall time is under torch.profiler, which slows the host: decode_step has it without. Busy: union of kernels, copies and fills; on "
        "a CPU, of operators.",
        "The host while the device waits: from a second profile with Python's functions, in which gaps are longer; read its shares only. A "
        "function's share has in it what it calls of others, not what it calls of ours.",
    ]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line; `--tiny` changes the sizes' defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_flags(parser, seconds_max=240.0)
    parser.add_argument("--batch", type=int, default=None, help="sequences in decode; 8")
    parser.add_argument("--context-tokens", type=int, default=None, help="cached; 32640: 32K with the answer")
    parser.add_argument("--rows", type=int, default=None, help="new rows in prefill; 2048")
    parser.add_argument("--budget", type=int, default=None, help="B; 1024")
    parser.add_argument("--steps", type=int, default=4, help="decode steps that are profiled")
    parser.add_argument("--ahead", type=int, choices=(0, 1), default=1, help="steps launched before the one waited for")
    parser.add_argument("--verticals", type=float, default=3.0, help="how peaked attention is; 0: nearly flat")
    parser.add_argument(
        "--graphs", action=argparse.BooleanOptionalAction, default=True, help="replayed; some CUDA hides their kernels"
    )
    args = parser.parse_args(arguments)
    tiny = {"batch": 2, "context_tokens": 256, "rows": 64, "budget": 64}
    large = {"batch": 8, "context_tokens": 32_640, "rows": 2048, "budget": 1024}
    fill_in(args, tiny if args.tiny else large)
    return args


if __name__ == "__main__":
    print(run_benchmark(parse_arguments()))
