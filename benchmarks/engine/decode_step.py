"""Milliseconds of a decode step of an 8B model at 32K tokens of context: sparse against dense in the same engine, and against
memory's speed.

Sequences lie scattered over a pool of random KV (`steps.py`), and the runner is driven by plans as the scheduler writes them:
time runs from step to step on the host's clock, all work of the host in it but the scheduler's own, which `turns.py` has. Dense
and sparse answers take turns on one runner. Every answer's steps count from its first on, refreshes and measurements of coverage
included: the time of a side is the mean over its steps of the median of their kind, so that a rare dear step weighs as often as
it comes and a hiccup does not.

What must be read, weights once and each sequence's KV by `loopserve.reads`, over the bandwidth of a copy measured here, is a
step's floor; the floors' ratio is the most that sparse reading can gain (the ceiling). Random weights and KV read as much as
trained ones.

    python -m benchmarks.engine.decode_step --out FILE.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.engine.activity import Activity, record_steps
from benchmarks.engine.device import (
    Deadline,
    add_common_flags,
    copy_bandwidth,
    describe_device,
    device_of,
    dtype_of,
    fill_in,
    free_bytes,
    write_record,
)
from benchmarks.engine.shape import LLAMA_8B, TINY, build_model, kv_bytes_a_token, step_bytes, weight_bytes
from benchmarks.engine.steps import Answers, DoneStep, FilledPool, StepKind, num_fitting
from benchmarks.report import Table
from loopserve.config import DecodeSparsity, EngineConfig
from loopserve.loading import LoadedModel

_RESERVE_BYTES = 6 << 30  # of device memory, for what a step needs beside weights and pool
_STEPS_MIN = 8  # of a side, below which there is no row
_PROFILE_SHARE = 0.2  # of the time limit, that is kept for profiles
_SPARE_STEPS = 8  # of room behind the last step: what is launched ahead, and what is profiled beyond the answer


@dataclass(frozen=True, slots=True)
class Side:
    """Decode steps of one side, dense or sparse."""

    steps: int
    ms: float  # a step: mean over the steps of the median of their kind
    median_ms: float
    mean_ms: float
    kinds: dict[str, dict[str, float]]  # what steps did beside attending: how many, and their median
    gigabytes: float  # that a step must read, mean
    floor_ms: float  # at the bandwidth of a copy
    over_floor: float
    busy_ms: float | None  # a profiled step's time in kernels; None: a CPU, not profiled, or not all was seen
    idle_share: float | None  # of `median_ms`, in which the device does nothing


@dataclass(frozen=True, slots=True)
class Row:
    """One batch under one setting, against dense decode on the same runner."""

    batch_asked: int
    batch: int
    context_tokens: int
    setting: str
    decode: dict[str, Any]
    dense: Side
    sparse: Side
    speedup: float
    ceiling: float
    share_of_ceiling: float
    note: str


@dataclass(frozen=True, slots=True)
class Timed:
    """One step."""

    kind: StepKind
    read_tokens: float
    seconds: float


def settings(budget_tokens: int) -> dict[str, DecodeSparsity]:
    """The sparse settings that are compared: what the engine does by default, and choices by all keys at every sixteenth output."""
    return {
        "default: by sketches, every output": DecodeSparsity(budget_tokens=budget_tokens),
        "by exact keys, every 16 outputs": DecodeSparsity(
            budget_tokens=budget_tokens, scoring="exact", refresh_outputs=16
        ),
    }


@dataclass(frozen=True, slots=True)
class Measured:
    """One batch under one setting, before anything is made of its steps."""

    batch_asked: int
    batch: int
    setting: str
    config: EngineConfig
    dense: tuple[Timed, ...]
    sparse: tuple[Timed, ...]


def run_benchmark(args: argparse.Namespace) -> str:
    """All batches under all settings; writes the result and gives its Markdown."""
    deadline = Deadline(args.seconds_max)
    device = device_of(args)
    machine = describe_device(device, commit=args.commit)
    bandwidth = copy_bandwidth(device, copied_bytes=args.copied_mib << 20)
    loaded = build_model(TINY if args.tiny else LLAMA_8B, device=device, dtype=dtype_of(device), seed=args.seed)
    measured: list[Measured] = []
    seen: dict[int, dict[bool, Activity]] = {}

    def written() -> str:
        rows = [
            row_of(found, seen.get(index, {}), loaded=loaded, args=args, bandwidth=bandwidth)
            for index, found in enumerate(measured)
        ]
        skipped = [
            {"batch_asked": c[0], "setting": c[1], "skipped": "no time was left"} for c in cases[len(measured) :]
        ]
        return write_record(
            args,
            title="A decode step, sparse against dense",
            machine=machine,
            rows=[*(asdict(row) for row in rows), *skipped],
            numbers={
                "model": {
                    "weight_bytes_read": weight_bytes(loaded),
                    "kv_bytes_a_token": kv_bytes_a_token(loaded),
                    "dtype": str(loaded.dtype),
                },
                "copy_bandwidth_bytes_per_s": bandwidth,
            },
            tables=[speed_table(rows), floor_table(rows)],
            notes=notes(args, loaded, bandwidth, num_skipped=len(skipped)),
        )

    # The engine's own setting at every batch comes first: the time may not be enough for all.
    cases = [(batch, name, decode) for name, decode in settings(args.budget).items() for batch in args.batches]
    timing = deadline.part(1.0 - _PROFILE_SHARE)
    for index, (batch, name, decode) in enumerate(cases):
        if timing.is_over:
            break
        part = timing.part(1.0 / (len(cases) - index))
        # The first answer of a setting goes on until it has done all that such an answer does: everything is compiled then.
        is_first = all(before.setting != name for before in measured)
        warm_steps = args.steps if is_first else min(args.steps, args.warm_steps)
        found = measure(loaded, batch, name, decode, args=args, warm_steps=warm_steps, part=part, deadline=deadline)
        if found is None:
            break
        measured.append(found)
        written()  # whatever happens to the next one, this one is kept
        print(f"batch {found.batch}, {name}: measured, {deadline.left_s:.0f} s left", flush=True)
    if device.type == "cuda" and measured:
        # After all times: a profiler slows what comes after it, too. It has to be there before graphs are captured.
        ones = torch.ones((1024, 1024), device=device)
        record_steps(lambda: ones @ ones, 1, device)
        for index, found in enumerate(measured):
            if deadline.is_over:
                break
            seen[index] = profiled(loaded, found, args)
            written()
    return written()


def measure(
    loaded: LoadedModel,
    batch: int,
    setting: str,
    decode: DecodeSparsity,
    *,
    args: argparse.Namespace,
    warm_steps: int,
    part: Deadline,
    deadline: Deadline,
) -> Measured | None:
    """Steps of both sides, of a smaller batch where memory is short; None where the time ran out before there were enough.

    The sides take turns, after some steps of each that compile and capture and do not count. Where `part` is over, the round at hand is
    the last; where `deadline` is, the step at hand.
    """
    config = EngineConfig(dtype=str(loaded.dtype).removeprefix("torch."), seed=args.seed, decode=decode)
    context, room = _sizes(args)
    free, used = free_bytes(loaded.device), batch
    if free is not None:
        pool_bytes = max(0, free - _RESERVE_BYTES)
        used = min(used, num_fitting(loaded, config, context_tokens=context, room_tokens=room, pool_bytes=pool_bytes))
    pool: FilledPool | None = None
    while used > 0:
        try:
            pool = _pool(loaded, config, used, args)
            dense, sparse = _in_turns(pool, warm_steps, args=args, part=part, deadline=deadline)
        except torch.OutOfMemoryError as error:
            print(f"batch {used} runs out of memory: {error}", flush=True)
            pool = None
            used -= max(1, used // 8)
            continue
        if min(len(dense), len(sparse)) < _STEPS_MIN:
            return None
        return Measured(batch, used, setting, config, tuple(dense), tuple(sparse))
    raise SystemExit(f"Not one sequence of {args.context_tokens} tokens fits beside the model.")


def profiled(loaded: LoadedModel, found: Measured, args: argparse.Namespace) -> dict[bool, Activity]:
    """What the profiler saw of some steps of a row, dense (False) and sparse (True); without what it could not see."""
    pool = _pool(loaded, found.config, found.batch, args)
    seen: dict[bool, Activity] = {}
    for sparse in (False, True):
        answers = Answers(pool, sparse=sparse, ahead=args.ahead)
        # To where no early refresh is due, nor what comes at an answer's 64th output: steps of the commonest kind.
        for _ in range(max(0, args.steps - args.profile_steps - 4)):
            answers.step()
        try:
            seen[sparse] = record_steps(answers.step, args.profile_steps, loaded.device)
        except ValueError as error:  # the times are there, and worth more
            print(f"batch {found.batch}, {found.setting}, not profiled: {error}", flush=True)
    return seen


def row_of(
    found: Measured, seen: dict[bool, Activity], *, loaded: LoadedModel, args: argparse.Namespace, bandwidth: float
) -> Row:
    """What one row comes to; `bandwidth` in bytes per second."""
    dense = side_of(found.dense, seen.get(False), loaded=loaded, bandwidth=bandwidth)
    sparse = side_of(found.sparse, seen.get(True), loaded=loaded, bandwidth=bandwidth)
    ceiling = dense.gigabytes / sparse.gigabytes
    notes = []
    if found.batch < found.batch_asked:
        notes.append(f"{found.batch} is the largest batch that fits")
    if min(dense.steps, sparse.steps) < args.rounds * args.steps:
        notes.append("cut short by the time limit")
    return Row(
        batch_asked=found.batch_asked,
        batch=found.batch,
        context_tokens=args.context_tokens,
        setting=found.setting,
        decode=asdict(found.config.decode),
        dense=dense,
        sparse=sparse,
        speedup=dense.ms / sparse.ms,
        ceiling=ceiling,
        share_of_ceiling=dense.ms / sparse.ms / ceiling,
        note="; ".join(notes),
    )


def side_of(steps: Sequence[Timed], seen: Activity | None, *, loaded: LoadedModel, bandwidth: float) -> Side:
    """What steps of one side come to; `bandwidth` in bytes per second.

    Where the profiler saw the device work for less than half of the floor, it missed kernels (of replayed graphs), and is not believed.
    """
    by_kind: dict[StepKind, list[float]] = {}
    for step in steps:
        by_kind.setdefault(step.kind, []).append(1e3 * step.seconds)
    ms = sum(statistics.median(times) * len(times) for times in by_kind.values()) / len(steps)
    median_ms = statistics.median(1e3 * step.seconds for step in steps)
    num_bytes = statistics.fmean(step_bytes(loaded, step.read_tokens) for step in steps)
    floor_ms = 1e3 * num_bytes / bandwidth
    busy_ms = None if seen is None else seen.busy_us / 1e3 / seen.num_steps
    if busy_ms is not None and busy_ms < 0.5 * floor_ms:
        busy_ms = None
    return Side(
        steps=len(steps),
        ms=ms,
        median_ms=median_ms,
        mean_ms=statistics.fmean(1e3 * step.seconds for step in steps),
        kinds={_name(kind): {"steps": len(t), "median_ms": statistics.median(t)} for kind, t in by_kind.items()},
        gigabytes=num_bytes / 1e9,
        floor_ms=floor_ms,
        over_floor=ms / floor_ms,
        busy_ms=busy_ms,
        idle_share=None if busy_ms is None else max(0.0, 1.0 - busy_ms / median_ms),
    )


def timed_answer(answers: Answers, num_steps: int, deadline: Deadline) -> list[Timed]:
    """Steps of one answer, from its first on, until the time is over."""
    timed: list[Timed] = []
    before = time.perf_counter()
    while len(timed) < num_steps and not deadline.is_over:
        done: DoneStep = answers.step()
        now = time.perf_counter()
        timed.append(Timed(done.kind, done.read_tokens, now - before))
        before = now
    return timed


def _sizes(args: argparse.Namespace) -> tuple[int, int]:
    """Tokens cached before an answer, and room for more."""
    return args.context_tokens - args.steps, args.steps + _SPARE_STEPS


def _pool(loaded: LoadedModel, config: EngineConfig, num_sequences: int, args: argparse.Namespace) -> FilledPool:
    free_bytes(loaded.device)  # what the pool before this one held is given back first
    context, room = _sizes(args)
    return FilledPool(loaded, config, num_sequences=num_sequences, context_tokens=context, room_tokens=room)


def _in_turns(
    pool: FilledPool, warm_steps: int, *, args: argparse.Namespace, part: Deadline, deadline: Deadline
) -> tuple[list[Timed], list[Timed]]:
    timed: dict[bool, list[Timed]] = {False: [], True: []}
    for round_index in range(args.rounds + 1):
        if round_index > 1 and part.is_over:
            break
        for sparse in (False, True):
            num_steps = args.steps if round_index else warm_steps
            steps = timed_answer(Answers(pool, sparse=sparse, ahead=args.ahead), num_steps, deadline)
            if round_index:
                timed[sparse] += steps
    return timed[False], timed[True]


def _name(kind: StepKind) -> str:
    acts = [act for act, done in (("chooses", kind.choose), ("measures", kind.measure)) if done]
    return " and ".join(acts) or "attends only"


def speed_table(rows: Sequence[Row]) -> Table:
    """Milliseconds and ratios."""
    header = ("batch", "setting", "steps", "dense ms", "sparse ms", "sparse median", "times dense", "ceiling", "of it")
    return Table(
        "Milliseconds a decode step",
        (*header, "note"),
        tuple(
            (
                str(row.batch),
                row.setting,
                f"{row.dense.steps} + {row.sparse.steps}",
                f"{row.dense.ms:.2f}",
                f"{row.sparse.ms:.2f}",
                f"{row.sparse.median_ms:.2f}",
                f"{row.speedup:.2f}",
                f"{row.ceiling:.2f}",
                f"{row.share_of_ceiling:.0%}",
                row.note,
            )
            for row in rows
        ),
    )


def floor_table(rows: Sequence[Row]) -> Table:
    """How far from the speed of memory."""
    cells: list[tuple[str, ...]] = []
    for row in rows:
        for name, side in (("dense", row.dense), ("sparse", row.sparse)):
            busy = ("-", "-") if side.busy_ms is None else (f"{side.busy_ms:.2f}", f"{side.idle_share:.0%}")
            cells.append(
                (
                    str(row.batch),
                    row.setting,
                    name,
                    f"{side.gigabytes:.2f}",
                    f"{side.floor_ms:.2f}",
                    f"{side.over_floor:.2f}",
                    *busy,
                )
            )
    header = ("batch", "setting", "side", "GB to read", "floor ms", "time over floor", "busy ms", "device idle")
    return Table("Against the bandwidth of memory", header, tuple(cells))


def notes(args: argparse.Namespace, loaded: LoadedModel, bandwidth: float, *, num_skipped: int) -> list[str]:
    """What a reader must know beside the tables."""
    return [
        f"Model: random weights, {weight_bytes(loaded) / 1e9:.2f} GB of {loaded.dtype} read a step, {loaded.num_layers} layers, "
        f"{loaded.num_heads} query heads over {loaded.num_kv_heads} KV heads of {loaded.head_dim}.",
        f"KV is random: {args.context_tokens} tokens a sequence at the answer's end, not computed, blocks scattered. Decode reads "
        "as much of it as of any other.",
        f"B {args.budget}. Time is from step to step on the host, {args.ahead} step launched ahead; {args.rounds} "
        f"times {args.steps} steps a side, in turns, after {args.warm_steps} or more that do not count. ms: mean over steps of the median "
        "of their kind (see the JSON).",
        f"Floor: bytes that a step must read over {bandwidth / 1e9:.0f} GB/s, read and written, of a copy of {args.copied_mib} MiB. "
        "Ceiling: dense bytes over sparse bytes. The copy writes, decode hardly does: reading may be a little faster than the copy.",
        f"Busy: union of kernels, copies and fills over {args.profile_steps} steps under torch.profiler, after all times; idle is what "
        "that leaves of the median step without the profiler. The steps profiled are of the commonest kind.",
        *(
            [f"{num_skipped} rows were not measured: the time limit of {args.seconds_max:g} s was reached."]
            if num_skipped
            else []
        ),
    ]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line; `--tiny` changes the sizes' defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_flags(parser, seconds_max=480.0)
    parser.add_argument("--batches", type=int, nargs="+", default=None, help="sequences at once; 1 8 24")
    parser.add_argument("--context-tokens", type=int, default=None, help="at the answer's end; 32768")
    parser.add_argument("--budget", type=int, default=None, help="B; 1024")
    parser.add_argument("--steps", type=int, default=None, help="of an answer; 64, the period of what is measured")
    parser.add_argument("--rounds", type=int, default=None, help="answers of each side that count; 2")
    parser.add_argument("--warm-steps", type=int, default=16, help="of uncounted answers, but a setting's first")
    parser.add_argument("--ahead", type=int, choices=(0, 1), default=1, help="steps launched before the one waited for")
    parser.add_argument("--profile-steps", type=int, default=6)
    parser.add_argument("--copied-mib", type=int, default=None, help="of the copy that measures bandwidth; 4096")
    args = parser.parse_args(arguments)
    tiny = {"batches": [1, 2], "context_tokens": 256, "budget": 64, "steps": 16, "rounds": 1, "copied_mib": 8}
    large = {
        "batches": [1, 8, 24],
        "context_tokens": 32_768,
        "budget": 1024,
        "steps": 64,
        "rounds": 2,
        "copied_mib": 4096,
    }
    fill_in(args, tiny if args.tiny else large)
    if not args.profile_steps < args.steps < args.context_tokens:
        parser.error("--steps must exceed --profile-steps and be less than --context-tokens")
    return args


if __name__ == "__main__":
    print(run_benchmark(parse_arguments()))
