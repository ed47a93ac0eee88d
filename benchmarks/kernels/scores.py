"""The operations beside attention: what choosing costs (scores from keys and from sketches), and what storing costs.

Dense, for those that score, is attention of the same rows over the same context: what a choice must cost well under to be worth making.

    python -m benchmarks.kernels.scores --device cuda --out scores.json
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

import torch

from benchmarks.kernels.contexts import REAL, SMALL, Contexts
from benchmarks.kernels.decode import chosen_slots
from benchmarks.kernels.run import Case, Run, begin, parse_arguments
from benchmarks.kernels.segments import random_rows
from loopserve.config import DecodeSparsity, PrefillSparsity
from loopserve.kernels import (
    KeySketch,
    coverage_threshold,
    line_scores,
    sketch_log_sum,
    sketch_scores,
    store_kv,
    store_sketch,
    token_scores,
)
from loopserve.kernels.sketch import sketch_bytes

_PREFILL, _DECODE = PrefillSparsity(), DecodeSparsity()
_SLOT_BYTES, _SCORE_BYTES = 8, 4


def token_case(contexts: Contexts, num_tokens: int, num_rows: int) -> Case:
    """The newest rows of one context score all its tokens."""
    heads = contexts.size.heads
    num_bytes = heads.kv_bytes(num_tokens, contexts.dtype) / 2 + num_tokens * (
        _SLOT_BYTES + _SCORE_BYTES * heads.num_heads
    )
    copies = contexts.copies(num_bytes)
    queries, slots = contexts.queries(num_rows, copies), contexts.slots(1, num_tokens, copies)
    positions = torch.arange(num_tokens - num_rows, num_tokens, device=contexts.device)
    keys = contexts.sequences.keys
    return contexts.case(
        "token_scores",
        f"{num_rows} rows, {num_tokens} tokens",
        {"rows": num_rows, "context_tokens": num_tokens},
        lambda copy: token_scores(queries[copy], keys, slots[copy][0], positions, scale=contexts.scale),
        copies=copies,
        num_bytes=num_bytes,
        flop=2.0 * num_rows * num_tokens * heads.num_heads * heads.head_dim,
        dense=contexts.dense(1, num_rows, num_tokens),
    )


def line_case(contexts: Contexts, num_tokens: int) -> Case:
    """The sampled rows of a chunk of the engine's size, half its query tiles' groups to choose by and half to measure by."""
    heads = contexts.size.heads
    num_rows = min(_PREFILL.sampled_rows + _PREFILL.heldout_rows, num_tokens // 2)
    num_groups = 2 * -(-min(_PREFILL.chunk_tokens, num_tokens // 2) // _PREFILL.tile_tokens)
    scored = _SCORE_BYTES * heads.num_heads * num_groups
    num_bytes = heads.kv_bytes(num_tokens, contexts.dtype) / 2 + num_tokens * (_SLOT_BYTES + scored)
    copies = contexts.copies(num_bytes)
    queries, slots = contexts.queries(num_rows, copies), contexts.slots(1, num_tokens, copies)
    spread = torch.arange(num_rows, device=contexts.device)
    positions = num_tokens - 1 - (num_rows - 1 - spread) * (min(_PREFILL.chunk_tokens, num_tokens) // num_rows)
    groups = spread * num_groups // num_rows
    keys = contexts.sequences.keys

    def score(copy: int) -> object:
        return line_scores(
            queries[copy],
            keys,
            slots[copy][0],
            positions,
            groups=groups,
            num_groups=num_groups,
            scale=contexts.scale,
        )

    return contexts.case(
        "line_scores",
        f"{num_rows} rows in {num_groups} groups, {num_tokens} tokens",
        {"rows": num_rows, "groups": num_groups, "context_tokens": num_tokens},
        score,
        copies=copies,
        num_bytes=num_bytes,
        flop=2.0 * num_rows * num_tokens * heads.num_heads * heads.head_dim,
        dense=contexts.dense(1, num_rows, num_tokens),
    )


def threshold_case(contexts: Contexts, num_tokens: int) -> Case:
    """A threshold for each query head over weights with a heavy tail, as attention has them, to hold the default share."""
    num_rows = contexts.size.heads.num_heads
    num_bytes = num_rows * (num_tokens * _SCORE_BYTES + 2 * _SCORE_BYTES)
    copies = contexts.copies(num_bytes)
    size = (copies, num_rows, num_tokens)
    logits = random_rows(size, dtype=torch.float32, device=contexts.device, seed=contexts.seed + 4)
    weights = torch.softmax(3 * logits, dim=2)
    targets = _PREFILL.alpha * weights.sum(dim=2)
    return contexts.case(
        "coverage_threshold",
        f"{num_rows} rows, {num_tokens} tokens",
        {"rows": num_rows, "context_tokens": num_tokens},
        lambda copy: coverage_threshold(weights[copy], targets[copy]),
        copies=copies,
        num_bytes=num_bytes,
    )


def sketch_case(contexts: Contexts, sketch: KeySketch, num_rows: int, num_tokens: int) -> Case:
    """One row a context scores all its tokens by their sketches, summed over a KV head's query heads."""
    heads = contexts.size.heads
    a_token = heads.num_kv_heads * (sketch_bytes(heads.head_dim) + _SCORE_BYTES) + _SLOT_BYTES
    copies = contexts.copies(num_rows * num_tokens * a_token)
    queries, slots = contexts.queries(num_rows, copies), contexts.slots(num_rows, num_tokens, copies)
    lengths = torch.full((num_rows,), num_tokens, dtype=torch.int64, device=contexts.device)

    def score(copy: int) -> object:
        return sketch_scores(
            queries[copy], sketch, slots[copy], lengths, num_lists=heads.num_kv_heads, scale=contexts.scale
        )

    return contexts.case(
        "sketch_scores",
        f"batch {num_rows}, {num_tokens} tokens",
        {"batch": num_rows, "context_tokens": num_tokens},
        score,
        copies=copies,
        num_bytes=num_rows * num_tokens * a_token,
        flop=2.0 * num_rows * num_tokens * heads.num_heads * heads.head_dim,
        dense=contexts.dense(num_rows, 1, num_tokens),
    )


def log_sum_case(contexts: Contexts, sketch: KeySketch, num_rows: int, num_listed: int) -> Case:
    """One row a context weighs the tokens listed for each KV head."""
    heads, num_tokens = contexts.size.heads, contexts.size.sequence_tokens
    num_bytes = num_rows * num_listed * heads.num_kv_heads * (sketch_bytes(heads.head_dim) + _SLOT_BYTES)
    copies = contexts.copies(num_bytes)
    queries = contexts.queries(num_rows, copies)
    lists = [
        chosen_slots(slots, heads.num_kv_heads, num_listed, seed=contexts.seed + copy)
        for copy, slots in enumerate(contexts.slots(num_rows, num_tokens, copies))
    ]
    return contexts.case(
        "sketch_log_sum",
        f"batch {num_rows}, B {num_listed} of {num_tokens}",
        {"batch": num_rows, "listed": num_listed, "context_tokens": num_tokens},
        lambda copy: sketch_log_sum(queries[copy], sketch, lists[copy], None, scale=contexts.scale),
        copies=copies,
        num_bytes=num_bytes,
        flop=2.0 * num_rows * num_listed * heads.num_heads * heads.head_dim,
        dense=contexts.dense(num_rows, 1, num_tokens),
    )


def store_cases(contexts: Contexts, sketch: KeySketch, num_tokens: int) -> tuple[partial[Case], partial[Case]]:
    """New tokens of a step enter scattered slots of the pool, and their sketches do; told in microseconds."""
    heads, pools = contexts.size.heads, contexts.sequences
    kv_bytes = heads.kv_bytes(num_tokens, contexts.dtype)
    copies = contexts.copies(2 * kv_bytes)
    size = (copies, num_tokens, heads.num_kv_heads, heads.head_dim)
    keys, values = (
        random_rows(size, dtype=contexts.dtype, device=contexts.device, seed=contexts.seed + seed) for seed in (2, 3)
    )
    # Each new token goes to another sequence, as decode has it, until there are more tokens than sequences.
    flat = pools.slots.T.reshape(-1)
    slots = [
        flat[(copy * num_tokens + torch.arange(num_tokens, device=flat.device)) % len(flat)] for copy in range(copies)
    ]
    settings: dict[str, int | float | str] = {"new_tokens": num_tokens}
    shape = f"{num_tokens} new tokens"
    kv = partial(
        contexts.case,
        "store_kv",
        shape,
        settings,
        lambda copy: store_kv(keys[copy], values[copy], pools.keys, pools.values, slots[copy]),
        copies=copies,
        num_bytes=2 * kv_bytes + num_tokens * _SLOT_BYTES,
    )
    sketched = partial(
        contexts.case,
        "store_sketch",
        shape,
        settings,
        lambda copy: store_sketch(keys[copy], sketch, slots[copy]),
        copies=copies,
        num_bytes=kv_bytes / 2 + num_tokens * (_SLOT_BYTES + heads.num_kv_heads * sketch_bytes(heads.head_dim)),
    )
    return kv, sketched


def run_benchmark(run: Run) -> None:
    """All cases."""
    size = SMALL if run.tiny else REAL
    contexts = Contexts(size, run.device, run.args.seed)
    pools = contexts.sequences
    sketch = KeySketch.empty(len(pools.keys), size.heads.num_kv_heads, size.heads.head_dim, run.device)
    every = torch.arange(len(pools.keys), device=run.device)
    for part in torch.split(every, 1 << 16):  # the reference makes copies of what it stores
        store_sketch(pools.keys[part], sketch, part)
    for num_tokens in size.scored:
        run.measure(f"line_scores, {num_tokens} tokens", partial(line_case, contexts, num_tokens))
        run.measure(f"coverage_threshold, {num_tokens} tokens", partial(threshold_case, contexts, num_tokens))
        for num_rows in sorted({1, _DECODE.scoring_rows, 16}):
            run.measure(
                f"token_scores, {num_rows} rows, {num_tokens} tokens",
                partial(token_case, contexts, num_tokens, num_rows),
            )
    for num_rows in size.batches:
        run.measure(
            f"sketch_scores, batch {num_rows}", partial(sketch_case, contexts, sketch, num_rows, size.sequence_tokens)
        )
        for num_listed in size.lists:
            run.measure(
                f"sketch_log_sum, batch {num_rows}, B {num_listed}",
                partial(log_sum_case, contexts, sketch, num_rows, num_listed),
            )
    for num_tokens in size.stored:
        kv, sketched = store_cases(contexts, sketch, num_tokens)
        run.measure(f"store_kv, {num_tokens} new tokens", kv)
        run.measure(f"store_sketch, {num_tokens} new tokens", sketched)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 where a case failed."""
    run = begin("scores", parse_arguments(__doc__, arguments))
    with torch.inference_mode():
        run_benchmark(run)
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())
