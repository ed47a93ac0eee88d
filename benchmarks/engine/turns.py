"""Whole dialogues on an 8B model: time to first token by turn, and tokens per second, sparse against dense in the same engine.

Random weights, greedy, end-of-sequence ignored, in process, no HTTP. Both modes answer the same new tokens on one engine and one
pool, in turns (dense sparse, sparse dense, ...), so that neither is always first. Their answers differ in tokens, not in number.
vLLM answers the same dialogues afterwards where it is installed; the result says where it is not. What does not fit in the time
limit is left away before the first counted run: rounds, then dialogues, then turns; the result says how much.

    python -m benchmarks.engine.turns --out FILE.json
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

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
from benchmarks.engine.random_model import ModelSize
from benchmarks.engine.shape import LLAMA_8B, TINY, build_model
from benchmarks.engine.turns_sides import (
    Collector,
    Dialogue,
    EngineSide,
    Run,
    TurnsSide,
    TurnTime,
    VllmSide,
    make_dialogues,
)
from benchmarks.machine import Machine, version_of_package
from benchmarks.report import Table
from loopserve.config import BLOCK_TOKENS, EngineConfig, PrefillSparsity
from loopserve.dialogue import Mode
from loopserve.engine import Engine
from loopserve.loading import LoadedModel
from loopserve.runner import bytes_a_block

_RESERVE_BYTES = 8 << 30  # of device memory beside weights and pool
_TURNS_MIN = 4  # fewer dialogues rather than fewer turns
_GROWTH = 1.5
_VLLM_SHARE = 1 / 3  # of the time limit that is kept for vLLM where it is installed
_VLLM_MEMORY_SHARE = 0.85
_QUEUE_S = 3600.0  # nobody is sent away
_WARM_SEED, _ROUND_SEEDS = 10_000, 20_000


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run, after what the time allows."""

    rounds: int
    dialogues: int
    turns: int
    cut: str  # why it is less than was asked for; "" where it is not


@dataclass(frozen=True, slots=True)
class Room:
    """What the device holds of what was asked for."""

    pool_tokens: int
    concurrency: int
    cut: str


@dataclass(frozen=True, slots=True)
class Ours:
    """What our engine did."""

    plan: Plan
    room: Room
    rounds: tuple[tuple[Dialogue, ...], ...]
    dense: tuple[Run, ...]
    sparse: tuple[Run, ...]


def run_benchmark(args: argparse.Namespace) -> str:
    """All sides; writes the result and gives its Markdown."""
    deadline = Deadline(args.seconds_max)
    device = device_of(args)
    machine = describe_device(device, commit=args.commit)
    size = replace(TINY if args.tiny else LLAMA_8B, verticals=args.verticals)
    has_vllm = args.vllm and importlib.util.find_spec("vllm") is not None
    ours = run_ours(args, size, deadline, kept_share=_VLLM_SHARE if has_vllm else 0.0)
    free_bytes(device)  # what our engine held is given back
    absent = "not installed on this machine" if args.vllm else "left out: --no-vllm"
    if not has_vllm:
        return _write(args, machine, ours, [], absent)
    _write(args, machine, ours, [], "had not answered yet when this was written")  # ours is not lost, whatever it does
    note, runs = run_vllm(args, size, ours, deadline)
    return _write(args, machine, ours, runs, note)


def run_ours(args: argparse.Namespace, size: ModelSize, deadline: Deadline, *, kept_share: float) -> Ours:
    """Both modes on one engine, which is gone afterwards. `kept_share` of the time left is kept for others."""
    loaded = build_model(size, device=device_of(args), dtype=dtype_of(device_of(args)), seed=args.seed)
    room = _room(loaded, args)
    collector = Collector()
    engine = Engine(_config(args, loaded, room), loaded=loaded, stats=collector)
    sides = [EngineSide(engine, collector, mode, concurrency=room.concurrency) for mode in (Mode.EXACT, Mode.SPARSE)]
    ours = deadline.part(1.0 - kept_share)
    costs = [_cost(side, args, size) for side in sides]
    plan = plan_runs(args, costs, ours.left_s)
    rounds = tuple(
        tuple(_dialogues(args, size, plan.turns, seed=_ROUND_SEEDS + index)[: plan.dialogues])
        for index in range(plan.rounds)
    )
    runs: dict[str, list[Run]] = {side.name: [] for side in sides}
    left = plan.rounds * len(sides)
    for index, dialogues in enumerate(rounds):
        for side in sides if index % 2 == 0 else reversed(sides):
            part = ours.part(1.0 / left)  # a side that is slower than planned takes none of the other's time
            run = side.run(dialogues, answer_tokens=args.answer_tokens, is_over=_over(part))
            runs[side.name].append(run)
            left -= 1
            print(f"{side.name}, round {index + 1}: {run.seconds:.1f} s, {deadline.left_s:.0f} s left", flush=True)
    dense, sparse = (tuple(runs[side.name]) for side in sides)
    return Ours(plan, room, rounds, dense, sparse)


def run_vllm(args: argparse.Namespace, size: ModelSize, ours: Ours, deadline: Deadline) -> tuple[str, list[Run]]:
    """What became of vLLM, and its runs: the same dialogues as ours, after a warm-up."""
    if deadline.is_over:
        return "installed, but no time was left", []
    try:
        side = VllmSide(
            size,
            max_tokens=longest_dialogue(args),
            concurrency=ours.room.concurrency,
            memory_share=_VLLM_MEMORY_SHARE,
            max_batch_tokens=max(args.vllm_batch_tokens, ours.room.concurrency),
        )
        _cost(side, args, size)
        runs = [
            side.run(dialogues, answer_tokens=args.answer_tokens, is_over=_over(deadline)) for dialogues in ours.rounds
        ]
        side.close()
    except Exception as error:  # another project's engine: whatever it raises, our own numbers are not lost for it
        return f"installed, but failed: {type(error).__name__}: {error}", []
    return f"version {version_of_package('vllm')}", runs


def _write(args: argparse.Namespace, machine: Machine, ours: Ours, vllm: Sequence[Run], vllm_note: str) -> str:
    rows = turn_rows(ours.dense, ours.sparse, vllm)
    sides = {"loopserve, exact": ours.dense, "loopserve, sparse": ours.sparse, VllmSide.name: vllm}
    rows += [throughput_row(name, runs) for name, runs in sides.items() if runs]
    if not vllm:
        rows.append({"kind": "throughput", "side": VllmSide.name, "skipped": vllm_note})
    return write_record(
        args,
        title="Dialogues, turn by turn, sparse against dense",
        machine=machine,
        rows=rows,
        numbers={
            "plan": asdict(ours.plan),
            "room": asdict(ours.room),
            "vllm": {"version": version_of_package("vllm"), "note": vllm_note},
            "paired_throughput_ratio": _throughput_ratios(ours.dense, ours.sparse),
            "runs": {name: [asdict(run) for run in runs] for name, runs in sides.items()},
        },
        tables=[turn_table(rows), throughput_table(rows)],
        notes=notes(args, ours, vllm_note),
    )


def longest_dialogue(args: argparse.Namespace) -> int:
    """Tokens of the longest dialogue that may be drawn, at its end."""
    return int(args.first_tokens + (args.turns - 1) * args.later_tokens[1] + args.turns * args.answer_tokens)


@dataclass(frozen=True, slots=True)
class Cost:
    """What one turn takes a side that has nothing else to do."""

    first_token_s: float
    decode_s: float


def plan_runs(args: argparse.Namespace, costs: Sequence[Cost], left_s: float) -> Plan:
    """How many rounds, dialogues and turns fit into `left_s`, if a first turn alone takes each side what `costs` say.

    Prefills follow each other, decode steps are shared; both are taken to last half as long again over longer contexts and in
    batches. Rounds go first, then dialogues, down to where a few turns fit, then turns.
    """
    new_tokens = args.first_tokens + (args.turns - 1) * statistics.fmean(args.later_tokens)
    prefill_share = new_tokens / args.turns / args.first_tokens  # of a first turn, that a mean one has to compute
    dialogues, rounds = args.dialogues, args.rounds
    while True:
        a_turn_s = sum(_GROWTH * (dialogues * prefill_share * c.first_token_s + c.decode_s) for c in costs)
        fitting = int(left_s / (rounds * a_turn_s))
        if fitting >= args.turns or (rounds == 1 and (fitting >= _TURNS_MIN or dialogues == 1)):
            break
        rounds, dialogues = (1, dialogues) if rounds > 1 else (1, dialogues // 2)
    turns = max(1, min(fitting, args.turns))
    cut = ""
    if (rounds, dialogues, turns) != (args.rounds, args.dialogues, args.turns):
        cut = f"{rounds} x {dialogues} x {turns} rounds, dialogues and turns instead of {args.rounds} x {args.dialogues} x {args.turns}"
    return Plan(rounds, dialogues, turns, cut)


def _cost(side: TurnsSide, args: argparse.Namespace, size: ModelSize) -> Cost:
    """Of one first turn alone, the second time: the first one compiles and captures."""
    for index in range(2):
        dialogues = _dialogues(args, size, 1, seed=_WARM_SEED + index)[:1]
        (turn,) = side.run(dialogues, answer_tokens=args.answer_tokens, is_over=lambda: False).turns
    return Cost(turn.first_token_s, turn.total_s - turn.first_token_s)


def _over(deadline: Deadline) -> Callable[[], bool]:
    return lambda: deadline.is_over


def _dialogues(args: argparse.Namespace, size: ModelSize, turns: int, *, seed: int) -> list[Dialogue]:
    return make_dialogues(
        args.dialogues,
        turns,
        first_tokens=args.first_tokens,
        later_tokens=(args.later_tokens[0], args.later_tokens[1]),
        vocab=size.vocab,
        seed=args.seed + seed,
    )


def _room(loaded: LoadedModel, args: argparse.Namespace) -> Room:
    """The pool and the dialogues at once: as asked for, as far as memory goes."""
    longest = longest_dialogue(args) + BLOCK_TOKENS
    wanted = args.pool_tokens or args.concurrency * longest
    free = free_bytes(loaded.device)
    most = wanted
    if free is not None:
        most = max(0, free - _RESERVE_BYTES) // bytes_a_block(loaded, EngineConfig()) * BLOCK_TOKENS
    if wanted <= most:
        return Room(wanted, args.concurrency, "")
    concurrency = args.concurrency if args.pool_tokens else max(1, min(args.concurrency, most // longest))
    return Room(
        most, concurrency, f"{wanted} tokens and {args.concurrency} dialogues at once were asked for; {most} fit"
    )


def _config(args: argparse.Namespace, loaded: LoadedModel, room: Room) -> EngineConfig:
    """The engine's defaults but for sizes; nobody is sent away for waiting."""
    return EngineConfig(
        dtype=str(loaded.dtype).removeprefix("torch."),
        kv_blocks=-(-room.pool_tokens // BLOCK_TOKENS) + 1,
        max_running_turns=room.concurrency,
        max_step_prefill_tokens=max(args.step_tokens, args.chunk_tokens),
        max_queue_s=_QUEUE_S,
        seed=args.seed,
        prefill=PrefillSparsity(chunk_tokens=args.chunk_tokens),
    )


def turn_rows(dense: Sequence[Run], sparse: Sequence[Run], vllm: Sequence[Run]) -> list[dict[str, Any]]:
    """One row a turn number: medians over dialogues and rounds, and the median of the ratios of the pairs that both sides answered."""
    ours, theirs, others = _by_turn(dense), _by_turn(sparse), _by_turn(vllm)
    rows: list[dict[str, Any]] = []
    for number in sorted({turn for _, _, turn in ours}):
        pairs = [(ours[key], theirs[key]) for key in ours if key[2] == number and key in theirs]
        if not pairs:
            continue
        answered = [turn for key, turn in others.items() if key[2] == number]
        rows.append(
            {
                "kind": "turn",
                "turn": number,
                "pairs": len(pairs),
                "new_tokens": statistics.median(a.new_tokens for a, _ in pairs),
                "context_tokens": statistics.median(a.prompt_tokens for a, _ in pairs),
                "dense_first_token_ms": 1e3 * statistics.median(a.first_token_s for a, _ in pairs),
                "sparse_first_token_ms": 1e3 * statistics.median(b.first_token_s for _, b in pairs),
                "ratio": statistics.median(a.first_token_s / b.first_token_s for a, b in pairs),
                "dense_token_ms": 1e3 * statistics.median(_token_s(a) for a, _ in pairs),
                "sparse_token_ms": 1e3 * statistics.median(_token_s(b) for _, b in pairs),
                "vllm_first_token_ms": 1e3 * statistics.median(t.first_token_s for t in answered) if answered else None,
                "vllm_token_ms": 1e3 * statistics.median(_token_s(t) for t in answered) if answered else None,
            }
        )
    return rows


def throughput_row(name: str, runs: Sequence[Run]) -> dict[str, Any]:
    """What all dialogues took one side."""
    return {
        "kind": "throughput",
        "side": name,
        "rounds": len(runs),
        "turns_answered": [len(run.turns) for run in runs],
        "seconds": [run.seconds for run in runs],
        "answer_tokens_per_s": statistics.median(run.answer_tokens / run.seconds for run in runs),
        "new_tokens_per_s": statistics.median(sum(t.new_tokens for t in run.turns) / run.seconds for run in runs),
    }


def _by_turn(runs: Sequence[Run]) -> dict[tuple[int, int, int], TurnTime]:
    return {(index, turn.dialogue, turn.turn): turn for index, run in enumerate(runs) for turn in run.turns}


def _token_s(turn: TurnTime) -> float:
    """Mean seconds of an output token after the first."""
    return (turn.total_s - turn.first_token_s) / max(1, turn.answer_tokens - 1)


def _throughput_ratios(dense: Sequence[Run], sparse: Sequence[Run]) -> list[float]:
    """How many times dense's tokens per second sparse makes, round by round."""
    return [
        (b.answer_tokens / b.seconds) / (a.answer_tokens / a.seconds)
        for a, b in zip(dense, sparse, strict=True)
        if a.answer_tokens and b.answer_tokens
    ]


def turn_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Time to first token by turn."""
    header = ("turn", "pairs", "new", "context", "dense ms", "sparse ms", "dense / sparse", "vLLM ms")
    a_token = ("dense ms a token", "sparse ms a token", "vLLM ms a token")
    return Table(
        "Time to first token, and then for each further one",
        (*header, *a_token),
        tuple(
            (
                str(row["turn"]),
                str(row["pairs"]),
                f"{row['new_tokens']:.0f}",
                f"{row['context_tokens']:.0f}",
                f"{row['dense_first_token_ms']:.0f}",
                f"{row['sparse_first_token_ms']:.0f}",
                f"{row['ratio']:.2f}",
                _ms(row["vllm_first_token_ms"], 0),
                f"{row['dense_token_ms']:.1f}",
                f"{row['sparse_token_ms']:.1f}",
                _ms(row["vllm_token_ms"], 1),
            )
            for row in rows
            if row["kind"] == "turn"
        ),
    )


def throughput_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Tokens per second by side."""
    return Table(
        "Tokens per second, prefill and decode together",
        ("side", "rounds", "turns", "answered tokens / s", "new tokens / s"),
        tuple(
            (row["side"], "-", "-", row["skipped"], "-")
            if "skipped" in row
            else (
                row["side"],
                str(row["rounds"]),
                ", ".join(map(str, row["turns_answered"])),
                f"{row['answer_tokens_per_s']:.1f}",
                f"{row['new_tokens_per_s']:.0f}",
            )
            for row in rows
            if row["kind"] == "throughput"
        ),
    )


def _ms(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def notes(args: argparse.Namespace, ours: Ours, vllm_note: str) -> list[str]:
    """What a reader must know beside the tables."""
    plan, room = ours.plan, ours.room
    low, high = args.later_tokens
    return [
        f"{plan.dialogues} dialogues of {plan.turns} turns: {args.first_tokens} new tokens in the first, {low} to {high} in each later "
        f"one, {args.answer_tokens} answered; at most {room.concurrency} at once, a pool of {room.pool_tokens} tokens.",
        *([f"CUT SHORT by the time limit: {plan.cut}."] if plan.cut else []),
        *([f"CUT SHORT by memory: {room.cut}."] if room.cut else []),
        f"Model: Llama-3.1-8B's shape unless tiny, random weights, queries biased so that scores spread by {args.verticals:g} over the "
        "keys alike for all queries: how much sparse prefill computes depends on that.",
        f"Dense: mode exact. Sparse: mode sparse, the engine's default methods, at every length. Chunks of {args.chunk_tokens} rows, "
        f"{args.step_tokens} prefill rows a step. {plan.rounds} rounds, the sides in turns on one engine and one pool.",
        "Sparse computes the last answer's rows again with each prompt (`decode.rectify`); they are not among the new tokens.",
        "All dialogues begin at once and go on as they are answered: times to first token have waiting for others in them. Graphs of "
        "shapes that the warm-up did not see are captured within the counted runs, as they are in service.",
        f"vLLM: {vllm_note}.",
    ]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line; `--tiny` changes the sizes' defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_flags(parser, seconds_max=540.0)
    parser.add_argument("--dialogues", type=int, default=None, help="16")
    parser.add_argument("--turns", type=int, default=None, help="of a dialogue; 10")
    parser.add_argument("--first-tokens", type=int, default=None, help="new tokens of a first turn; 4096")
    parser.add_argument(
        "--later-tokens", type=int, nargs=2, default=None, help="least and most of a later turn; 512 2048"
    )
    parser.add_argument("--answer-tokens", type=int, default=None, help="128")
    parser.add_argument("--concurrency", type=int, default=None, help="dialogues at once; all of them")
    parser.add_argument("--pool-tokens", type=int, default=0, help="of the KV pool; 0: what the dialogues need at once")
    parser.add_argument("--chunk-tokens", type=int, default=PrefillSparsity().chunk_tokens)
    parser.add_argument("--step-tokens", type=int, default=EngineConfig().max_step_prefill_tokens)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side")
    parser.add_argument("--verticals", type=float, default=3.0, help="how peaked attention is; 0: nearly flat")
    parser.add_argument("--vllm", action=argparse.BooleanOptionalAction, default=True, help="where it is installed")
    parser.add_argument("--vllm-batch-tokens", type=int, default=8192, help="prefill and decode rows of its step")
    args = parser.parse_args(arguments)
    tiny = {"dialogues": 3, "turns": 3, "first_tokens": 96, "later_tokens": [16, 48], "answer_tokens": 6}
    large = {"dialogues": 16, "turns": 10, "first_tokens": 4096, "later_tokens": [512, 2048], "answer_tokens": 128}
    fill_in(args, tiny if args.tiny else large)
    args.concurrency = args.dialogues if args.concurrency is None else args.concurrency
    return args


if __name__ == "__main__":
    print(run_benchmark(parse_arguments()))
