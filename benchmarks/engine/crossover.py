"""From which context length on sparse attention is faster than dense, for each phase, at several settings and without a limit of time.

The measurement is that of `loopserve bench --tune`, which fills the table that `auto` decides by. One conversation grows to the longest
context. At every length on the way, a chunk of new rows is computed over it, and an answer decoded, dense and sparse in turns, by the
runner itself: no scheduler, no other conversations. Both start from the same KV, computed exactly. A sparse answer's time has its choices
and coverage measurements in it. Knows nothing about quality: see `quality/run.py`.

How many cells sparse prefill computes depends on how peaked attention is, so every number stands beside that share: a random model,
some of whose tokens are made heavy for all queries, shows the cost at a share, the shipped one (`--shipped`) how a trained model attends.

    python -m benchmarks.engine.crossover
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks.engine.random_model import ModelSize, build_weights, loaded_model, model_flags, num_parameters
from benchmarks.machine import describe_machine, require_quiet, usable_cores
from benchmarks.report import RESULTS, Table, settings_of, write_result
from loopserve.config import EngineConfig, PrefillSparsity
from loopserve.loading import load_model
from loopserve.tuning import (
    Conversation,
    Decode,
    Prefill,
    dialogue_ids,
    first_that_pays,
    measure_decode,
    measure_prefill,
    random_ids,
    speedup,
)


def run_benchmark(args: argparse.Namespace) -> str:
    """All lengths; writes the result and gives its Markdown."""
    load = require_quiet(forced=args.force)
    torch.set_num_threads(args.threads)
    config = engine_config(args)
    contexts = sorted(args.contexts)
    num_tokens = contexts[-1] + max(args.chunk, args.steps)
    if args.shipped:
        loaded, model, tokens = load_model(config), "shipped", "made dialogues"
        ids = dialogue_ids(loaded, num_tokens, seed=args.seed)
    else:
        size = ModelSize(
            args.hidden,
            args.layers,
            args.intermediate,
            args.vocab,
            args.heads,
            args.kv_heads,
            verticals=args.verticals,
        )
        weights = build_weights(size, seed=args.seed)
        loaded, model = loaded_model(size, weights), f"random, {num_parameters(weights) / 1e6:.1f} million parameters"
        tokens = f"random tokens, scores spread by {args.verticals:g} over the keys alike for all queries"
        ids = random_ids(size.vocab, num_tokens, seed=args.seed)
    if num_tokens > loaded.max_positions:
        raise SystemExit(
            f"The model takes {loaded.max_positions} positions, {num_tokens} are needed: shorten --contexts."
        )
    budgets = sorted({*args.budgets, config.decode.budget_tokens})
    conversation = Conversation(loaded, config, ids, rows=args.rows, scattered=args.scattered)
    prefills: list[Prefill] = []
    decodes: list[Decode] = []
    done = 0
    for context in contexts:
        conversation.extend(done, context)
        done = context
        for budget in budgets:
            decodes.append(
                measure_decode(
                    conversation,
                    context,
                    steps=args.steps,
                    budget_tokens=budget,
                    pairs=args.pairs,
                    config=config.decode,
                )
            )
        for alpha in args.alphas:
            prefill = replace(config.prefill, alpha=alpha)
            prefills.append(measure_prefill(conversation, context, chunk=args.chunk, config=prefill, pairs=args.pairs))
        print(f"{context}: measured", flush=True)
    found = verdicts(prefills, decodes)
    print("\n".join(found), flush=True)
    return write_result(
        args.results,
        args.name,
        title="Where sparse attention becomes faster than dense",
        machine=describe_machine(load_before=load),
        numbers={
            "forced": args.force,
            "settings": settings_of(args),
            "prefill": [{**asdict(p), "speedup": speedup(p)} for p in prefills],
            "decode": [{**asdict(d), "speedup": speedup(d)} for d in decodes],
            "verdicts": found,
        },
        tables=[prefill_table(prefills, args.chunk), decode_table(decodes)],
        notes=[
            f"Model: {model}, {loaded.num_layers} layers, {loaded.num_heads} query heads over {loaded.num_kv_heads} KV heads "
            f"of {loaded.head_dim}, {tokens}.",
            f"One conversation, its blocks {'scattered' if args.scattered else 'in a row'}, in decode {args.rows} times side by side; "
            f"medians of {args.pairs} pairs, dense and sparse in turns. Decode: mean of {args.steps} steps, {config.decode.method}, "
            "choices and coverage measurements included.",
            *found,
            *(["FORCED on a machine that was not quiet: not to be published."] if args.force else []),
        ],
    )


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The engine's defaults; only the chunk follows the command line."""
    prefill = PrefillSparsity(chunk_tokens=args.chunk)
    return EngineConfig(
        device="cpu",
        dtype="float32",
        prefill=prefill,
        max_step_prefill_tokens=max(args.chunk, EngineConfig().max_step_prefill_tokens),
        seed=args.seed,
    )


def verdicts(prefills: Sequence[Prefill], decodes: Sequence[Decode]) -> list[str]:
    """One sentence for each phase and setting: from where on sparse is faster."""
    sentences = []
    for alpha in sorted({point.alpha for point in prefills}, reverse=True):
        found = first_that_pays([point for point in prefills if point.alpha == alpha])
        sentences.append(f"prefill, alpha {alpha:g}: sparse is {_from(found)}.")
    for budget in sorted({point.budget_tokens for point in decodes}):
        found = first_that_pays([point for point in decodes if point.budget_tokens == budget])
        sentences.append(f"decode, B {budget}: sparse is {_from(found)}.")
    return sentences


def _from(context_tokens: int | None) -> str:
    if context_tokens is None:
        return "not faster at the longest context measured"
    return f"faster from {context_tokens} tokens of context on"


def prefill_table(points: Sequence[Prefill], chunk: int) -> Table:
    """Milliseconds a chunk."""
    header = ("context", "alpha", "dense ms", "sparse ms", "speed-up", "cells computed", "dense heads", "coverage")
    rows = tuple(
        (
            str(p.context_tokens),
            f"{p.alpha:g}",
            f"{1e3 * statistics.median(p.dense_s):.1f}",
            f"{1e3 * statistics.median(p.sparse_s):.1f}",
            f"{speedup(p):.2f}",
            f"{p.cells_share:.1%}",
            str(p.dense_heads),
            "" if p.coverage is None else f"{p.coverage:.3f}",
        )
        for p in points
    )
    return Table(f"Prefill of {chunk} tokens over a cached context", header, rows)


def decode_table(points: Sequence[Decode]) -> Table:
    """Milliseconds a step."""
    header = ("context", "B", "kept", "dense ms", "sparse ms", "speed-up", "coverage")
    rows = tuple(
        (
            str(d.context_tokens),
            str(d.budget_tokens),
            str(d.kept_tokens),
            f"{1e3 * statistics.median(d.dense_s):.2f}",
            f"{1e3 * statistics.median(d.sparse_s):.2f}",
            f"{speedup(d):.2f}",
            "" if d.coverage is None else f"{d.coverage:.3f}",
        )
        for d in points
    )
    return Table("Decode of one token", header, rows)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--chunk", type=int, default=PrefillSparsity().chunk_tokens, help="new tokens in prefill")
    parser.add_argument("--steps", type=int, default=32, help="decode steps of an answer")
    parser.add_argument("--rows", type=int, default=1, help="of decode, side by side")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--alphas", type=float, nargs="+", default=[PrefillSparsity().alpha])
    parser.add_argument("--budgets", type=int, nargs="*", default=[1024], help="beside the engine's default")
    parser.add_argument(
        "--verticals", type=float, default=3.0, help="how peaked the random model's attention is; 0: nearly flat"
    )
    parser.add_argument("--shipped", action="store_true", help="the shipped model on made dialogues")
    parser.add_argument("--scattered", action="store_true", help="blocks out of order, as in a pool long in use")
    for flag, default in model_flags().items():
        parser.add_argument(flag, type=int, default=default)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="run on a busy machine; the result says so")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--name", default="crossover")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    print(run_benchmark(parse_arguments()))
