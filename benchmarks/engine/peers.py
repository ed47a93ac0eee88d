"""Our engine against `transformers` on the same dialogues, tokens and machine: float32, greedy, CPU, every answer of full length.

Owns the pairing, the comparison of tokens and the tables; `sides.py` owns how each side is driven. Measures throughput of closed
loops of equal dialogues, prefill included. Knows nothing about HTTP, about sparse attention (contexts here are short, mode is auto)
or about latency under load.

    python -m benchmarks.engine.peers
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine.pairs import Pairs, measure
from benchmarks.engine.random_model import (
    ModelSize,
    build_weights,
    loaded_model,
    model_flags,
    num_parameters,
    stock_model,
)
from benchmarks.engine.sides import (
    BatchingSettings,
    ContinuousBatchingSide,
    GenerateSide,
    LoopServeSide,
    Workload,
    make_prompts,
)
from benchmarks.machine import describe_machine, require_quiet, usable_cores
from benchmarks.report import RESULTS, Table, write_result
from loopserve.config import BLOCK_TOKENS, EngineConfig
from loopserve.engine import Engine

_TUNING_SEED, _WARM_UP_SEED = 90_000, 80_000


def tune(
    measure_s: Callable[[BatchingSettings], float], start: BatchingSettings, axes: Sequence[tuple[str, Sequence[Any]]]
) -> tuple[BatchingSettings, dict[str, float | str]]:
    """The fastest settings found by trying one axis after the other; and the seconds, or the failure, of all that were tried."""
    tried: dict[str, float | str] = {}

    def seconds(settings: BatchingSettings) -> float:
        try:
            found = measure_s(settings)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            tried[settings.sentence()] = f"failed: {error}"
            return float("inf")
        tried[settings.sentence()] = found
        return found

    best, best_s = start, seconds(start)
    for name, values in axes:
        for settings in [replace(best, **{name: value}) for value in values]:
            if settings.sentence() in tried:
                continue
            found_s = seconds(settings)
            if found_s < best_s:
                best, best_s = settings, found_s
    return best, tried


def tuning_axes(workload: Workload, *, with_compile: bool) -> list[tuple[str, Sequence[Any]]]:
    """What continuous batching is tried with, most telling first."""
    round_tokens = workload.dialogues * (workload.prompt_tokens + 64)
    axes: list[tuple[str, Sequence[Any]]] = [
        ("attention", ("paged|eager",)),
        ("page_size", (8, 16, 64, 128)),
        ("max_batch_tokens", (256, round_tokens)),
        ("grouped_heads", (True,)),
        ("together", (False,)),
        ("scheduler", ("prefill_first",)),
    ]
    return [*axes, ("compile_level", (1,))] if with_compile else axes


def summary_table(results: Sequence[Pairs]) -> Table:
    """Throughput and ratios, a row for each peer and number of dialogues."""
    rows = []
    for pairs in results:
        tokens = pairs.workload.output_tokens
        ratios = pairs.ratios
        median = statistics.median(ratios)
        target = "" if pairs.target is None else f"{pairs.target:g} {'met' if median >= pairs.target else 'MISSED'}"
        agreement = pairs.agreement
        rows.append(
            (
                str(pairs.workload.dialogues),
                pairs.peer,
                f"{tokens / statistics.median(pairs.seconds):.1f}",
                f"{tokens / statistics.median(pairs.peer_seconds):.1f}",
                f"{median:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                target,
                f"{agreement.identical}/{agreement.dialogues}",
                str(agreement.near_ties),
                str(agreement.unexplained),
            )
        )
    header = (
        "dialogues at once",
        "peer",
        "loopserve tokens/s",
        "peer tokens/s",
        "ratio, median of pairs (range)",
        "target",
        "same answers",
        "near ties",
        "unexplained",
    )
    return Table("Output tokens per second", header, tuple(rows))


def worse_cases(results: Sequence[Pairs]) -> list[str]:
    """Sentences about the cases in which we are slower, or short of our mark."""
    found = []
    for pairs in results:
        median, number = pairs.ratio, pairs.workload.dialogues
        if median < 1.0:
            found.append(f"SLOWER than {pairs.peer} with {number} dialogues at once: {median:.2f} times its speed.")
        elif pairs.target is not None and median < pairs.target:
            found.append(
                f"SHORT of the target against {pairs.peer} with {number} dialogues at once: {median:.2f}, wanted {pairs.target:g}."
            )
        if pairs.agreement.unexplained:
            found.append(
                f"DIFFERENT answers from {pairs.peer} with {number} dialogues: {pairs.agreement.unexplained} unexplained."
            )
    return found or ["No case was slower, short of its target or different."]


def run_benchmark(args: argparse.Namespace) -> str:
    """All cases; writes the result and gives its Markdown."""
    load = require_quiet(forced=args.force)
    torch.set_num_threads(args.threads)
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # failures are reported by `tune`
    size = ModelSize(args.hidden, args.layers, args.intermediate, args.vocab, args.heads, args.kv_heads)
    weights = build_weights(size, seed=args.seed)
    cases = [Workload(number, args.turns, args.prompt_tokens, args.answer_tokens) for number in args.dialogues]
    largest = max(cases, key=lambda case: case.dialogues)
    generate = GenerateSide(stock_model(size, weights))
    batching_model = stock_model(size, weights)
    ours = LoopServeSide(_engine(size, weights, largest))
    reference = stock_model(size, weights)

    warm_up = replace(largest, turns=2, answer_tokens=min(4, args.answer_tokens))
    warm_prompts = make_prompts(warm_up, vocab=size.vocab, seed=_WARM_UP_SEED)

    def tuning_s(settings: BatchingSettings) -> float:
        side = ContinuousBatchingSide(batching_model, settings)
        side.run(warm_prompts, answer_tokens=warm_up.answer_tokens)
        prompts = make_prompts(largest, vocab=size.vocab, seed=_TUNING_SEED)
        return min(side.run(prompts, answer_tokens=largest.answer_tokens).seconds for _ in range(args.tuning_runs))

    axes = tuning_axes(largest, with_compile=args.tune_compile) if args.tuning_runs else []
    settings, tried = tune(tuning_s, BatchingSettings(), axes) if args.tuning_runs else (BatchingSettings(), {})
    batching = ContinuousBatchingSide(batching_model, settings)
    print(f"continuous batching at its best: {settings.sentence()}", flush=True)

    results: list[Pairs] = []
    for side in (ours, generate, batching):
        side.run(warm_prompts, answer_tokens=warm_up.answer_tokens)
    for case in cases:
        found = measure(
            ours,
            (generate, batching),
            case,
            pairs=args.pairs,
            vocab=size.vocab,
            reference=reference,
            seed=args.seed + 1000 * case.dialogues,
        )
        results += found
        for pairs in found:
            print(f"{case.dialogues} dialogues, {pairs.peer}: {pairs.ratio:.2f}", flush=True)

    worse = worse_cases(results)
    print("\n".join(worse), flush=True)
    tables = [summary_table(results)]
    if tried:
        rows = tuple((name, f"{s:.3f}" if isinstance(s, float) else s) for name, s in tried.items())
        tables.append(
            Table(f"Continuous batching, {largest.dialogues} dialogues, tried", ("settings", "seconds"), rows)
        )
    return write_result(
        args.results,
        args.name,
        title="LoopServe against transformers, CPU, float32, greedy",
        machine=describe_machine(load_before=load),
        numbers={
            "forced": args.force,
            "model": {**asdict(size), "parameters": num_parameters(weights), "weights": "random"},
            "pairs": args.pairs,
            "seed": args.seed,
            "continuous_batching": {"settings": asdict(settings), "tried_seconds": tried},
            "cases": [_as_record(pairs) for pairs in results],
            "worse": worse,
        },
        tables=tables,
        notes=[
            f"Model: random weights, {num_parameters(weights) / 1e6:.1f} million parameters, {size.layers} layers, hidden {size.hidden}, "
            f"{size.heads} query heads over {size.kv_heads} KV heads, vocabulary {size.vocab}.",
            f"Each dialogue: {args.turns} turns of {args.prompt_tokens} new and {args.answer_tokens} answered tokens, "
            f"{largest.context_tokens} at the end. Time is from the first turn to the last token, prefill included, {args.pairs} pairs.",
            "generate: one dialogue after the other, sdpa, DynamicCache kept over the turns; only what the cache lacks is computed.",
            f"continuous batching: {settings.sentence()}; prefix sharing on, one manager for all turns, warmed up outside the time.",
            "loopserve: mode auto, which is dense at these lengths; the whole conversation is sent every turn.",
            *worse,
            *(["FORCED on a machine that was not quiet: not to be published."] if args.force else []),
        ],
    )


def _engine(size: ModelSize, weights: dict[str, torch.Tensor], workload: Workload) -> Engine:
    blocks_a_dialogue = -(-workload.context_tokens // BLOCK_TOKENS) + 1
    config = EngineConfig(
        device="cpu",
        dtype="float32",
        kv_blocks=1 + 2 * workload.dialogues * blocks_a_dialogue,
        max_running_turns=max(32, workload.dialogues),
    )
    return Engine(config, loaded=loaded_model(size, weights))


def _as_record(pairs: Pairs) -> dict[str, Any]:
    tokens = pairs.workload.output_tokens
    return {
        "peer": pairs.peer,
        **asdict(pairs.workload),
        "output_tokens": tokens,
        "loopserve_seconds": pairs.seconds,
        "peer_seconds": pairs.peer_seconds,
        "loopserve_tokens_per_s": tokens / statistics.median(pairs.seconds),
        "peer_tokens_per_s": tokens / statistics.median(pairs.peer_seconds),
        "ratios": pairs.ratios,
        "ratio_median": pairs.ratio,
        "ratio_min": min(pairs.ratios),
        "ratio_max": max(pairs.ratios),
        "target": pairs.target,
        "agreement": asdict(pairs.agreement),
    }


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dialogues", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of dialogues at once")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=96, help="new tokens of a turn")
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=7)
    for flag, default in model_flags().items():
        parser.add_argument(flag, type=int, default=default)
    parser.add_argument("--tuning-runs", type=int, default=2, help="runs for each setting of the peer; 0: no tuning")
    parser.add_argument("--tune-compile", action="store_true", help="try the peer under torch.compile too (minutes)")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="of torch, for every side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="run on a busy machine; the result says so")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--name", default="peers")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    print(run_benchmark(parse_arguments()))
