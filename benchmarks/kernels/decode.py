"""`paged_decode`: one row a context reads a list of tokens a KV head, or its whole context, out of scattered blocks.

Held against the bandwidth of a large copy, and against PyTorch's fastest dense attention over whole contexts that lie side by side.
Lists are drawn at random over the context and ascend, as chosen tokens do; every KV head has its own.

    python -m benchmarks.kernels.decode --device cuda --out decode.json
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels.contexts import REAL, SMALL, Contexts
from benchmarks.kernels.run import Case, Run, begin, parse_arguments
from loopserve.kernels import paged_decode

_SLOT_BYTES = 8  # int64


def listed_case(contexts: Contexts, num_rows: int, num_listed: int) -> Case:
    """Every KV head of every row reads `num_listed` tokens of its own."""
    size, num_tokens = contexts.size, contexts.size.sequence_tokens
    heads = size.heads
    list_bytes = num_rows * heads.num_kv_heads * num_listed * _SLOT_BYTES
    num_bytes = num_rows * heads.kv_bytes(num_listed, contexts.dtype) + list_bytes + _row_bytes(contexts, num_rows)
    copies = contexts.copies(num_bytes)
    queries = contexts.queries(num_rows, copies)
    lists = [
        chosen_slots(slots, heads.num_kv_heads, num_listed, seed=contexts.seed + copy)
        for copy, slots in enumerate(contexts.slots(num_rows, num_tokens, copies))
    ]
    return _case(
        contexts,
        f"batch {num_rows}, B {num_listed} of {num_tokens}",
        {"batch": num_rows, "listed": num_listed, "context_tokens": num_tokens},
        queries,
        lists,
        num_bytes=num_bytes,
        num_read=num_listed,
        context_tokens=num_tokens,
    )


def whole_case(contexts: Contexts, num_rows: int, num_tokens: int) -> Case:
    """Every head of a row reads its whole context: dense decode out of the pool."""
    heads = contexts.size.heads
    num_bytes = num_rows * (heads.kv_bytes(num_tokens, contexts.dtype) + num_tokens * _SLOT_BYTES)
    num_bytes += _row_bytes(contexts, num_rows)
    copies = contexts.copies(num_bytes)
    return _case(
        contexts,
        f"batch {num_rows}, the whole of {num_tokens}",
        {"batch": num_rows, "listed": num_tokens, "context_tokens": num_tokens},
        contexts.queries(num_rows, copies),
        [slots[:, None] for slots in contexts.slots(num_rows, num_tokens, copies)],
        num_bytes=num_bytes,
        num_read=num_tokens,
        context_tokens=num_tokens,
    )


def chosen_slots(slots: Tensor, num_kv_heads: int, num_listed: int, *, seed: int) -> Tensor:
    """`num_listed` of the columns of each row, drawn for each KV head and ascending: slots [R, N] -> [R, Hkv, M]."""
    num_rows, num_tokens = slots.shape
    generator = torch.Generator(slots.device).manual_seed(seed)
    rank = torch.rand((num_rows, num_kv_heads, num_tokens), generator=generator, device=slots.device)
    columns = rank.topk(num_listed, dim=2).indices.sort(dim=2).values
    return slots[:, None].expand(-1, num_kv_heads, -1).gather(2, columns)


def _row_bytes(contexts: Contexts, num_rows: int) -> int:
    """Of queries and outputs."""
    heads = contexts.size.heads
    return 2 * num_rows * heads.num_heads * heads.head_dim * contexts.dtype.itemsize


def _case(
    contexts: Contexts,
    shape: str,
    settings: dict[str, int | float | str],
    queries: list[Tensor],
    slots: list[Tensor],
    *,
    num_bytes: int,
    num_read: int,
    context_tokens: int,
) -> Case:
    keys, values = contexts.sequences.keys, contexts.sequences.values
    num_rows, num_heads, head_dim = queries[0].shape
    return contexts.case(
        "paged_decode",
        shape,
        settings,
        lambda copy: paged_decode(queries[copy], keys, values, slots[copy], None, scale=contexts.scale),
        copies=len(queries),
        num_bytes=num_bytes,
        flop=4.0 * num_rows * num_heads * head_dim * num_read,
        dense=contexts.dense(num_rows, 1, context_tokens),
    )


def run_benchmark(run: Run) -> None:
    """All cases, small batches first."""
    size = SMALL if run.tiny else REAL
    contexts = Contexts(size, run.device, run.args.seed)
    for num_rows in size.batches:
        for num_listed in size.lists:
            run.measure(
                f"paged_decode, batch {num_rows}, B {num_listed}", partial(listed_case, contexts, num_rows, num_listed)
            )
    for num_rows, num_tokens in size.wholes:
        run.measure(
            f"paged_decode, batch {num_rows}, the whole of {num_tokens}",
            partial(whole_case, contexts, num_rows, num_tokens),
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 where a case failed."""
    run = begin("decode", parse_arguments(__doc__, arguments))
    with torch.inference_mode():
        run_benchmark(run)
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())
