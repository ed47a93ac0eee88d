"""`sparse_prefill` against PyTorch's fastest dense attention, alone on given lines and with the selection that finds them.

New rows over a cached context, one layer, heads as in Llama-3.1-8B. Three kinds of cases, told apart by `settings.kind`:

- "lines given": the pattern's lines go to the kernel as they are; its density is what was asked for, after rounding to tiles.
- "lines selected": queries and keys are made to attend in the pattern's shape, and `attend` samples, selects and computes. One selection
  covers all new rows. The share is what it computed, which is not the density that was drawn.
- "shipped model": queries, keys and values that the shipped model had over made dialogues, all its layers one after the other, at its own
  length and heads. They are not tiled to more tokens: repeated keys would share out the weight as no long dialogue does.

Efficiency is dense time x computed share / sparse time: 100% is a kernel that wastes nothing for being sparse, against a dense one as fast.

    python -m benchmarks.kernels.prefill --device cuda --out prefill.json
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from benchmarks.kernels.chunks import CONFIG, Chunk
from benchmarks.kernels.dense import Dense, expected_rows, fastest_dense, relative_error
from benchmarks.kernels.patterns import DENSITIES, Pattern, computed_cells, make_pattern, plant
from benchmarks.kernels.run import Case, Run, begin, parse_arguments
from benchmarks.kernels.segments import LLAMA_8B, TINY, HeadShape, Sequences, measured_dtype, random_rows
from benchmarks.kernels.shipped import record_shipped
from benchmarks.kernels.timing import Timing, time_in_stream
from loopserve.kernels import sparse_prefill
from loopserve.plan import SparsePrefill
from loopserve.sparsity import PREFILL_METHODS
from loopserve.sparsity import prefill as prefill_module
from loopserve.sparsity.grid import TileGrid
from loopserve.sparsity.prefill import PrefillOutcome, attend

ORDER = SparsePrefill(CONFIG.method, alpha=CONFIG.alpha, min_coverage=None, seed=0)
_ERROR_MAX = 0.02  # of the norm, as for dense backends


@dataclass(frozen=True, slots=True)
class Size:
    """Which cases there are."""

    heads: HeadShape
    new_tokens: tuple[int, ...]
    cached_tokens: tuple[int, ...]
    batches: tuple[int, ...]
    densities: tuple[float, ...]
    shipped: tuple[tuple[int, int], ...]  # new and cached tokens of the shipped model


REAL = Size(
    LLAMA_8B,
    (512, 2048, 8192),
    (16_384, 65_536, 131_072),
    (1, 4),
    DENSITIES,
    ((512, 15_872), (2048, 14_336), (8192, 8192)),  # up to the positions that it was made for
)
SMALL = Size(TINY, (128,), (512, 1024), (1, 2), (0.20, 0.50), ((64, 448),))


def measure_dense(chunk: Chunk, seed: int) -> Dense:
    """Dense attention of all segments of a copy in one launch."""
    heads, dtype, device = chunk.heads, measured_dtype(chunk.device), chunk.device
    context = (chunk.batch, heads.num_kv_heads, chunk.grid.num_columns, heads.head_dim)
    rows = (chunk.batch, heads.num_heads, chunk.new_tokens, heads.head_dim)
    inputs = []
    for copy in range(chunk.copies):
        sizes = (rows, context, context)
        query, key, value = (
            random_rows(size, dtype=dtype, device=device, seed=seed + 3 * copy + index)
            for index, size in enumerate(sizes)
        )
        inputs.append((query, key, value))
    return fastest_dense(inputs, device=device, in_graph=False)


def dense_case(chunk: Chunk, seed: int) -> Case:
    """The dense side, as a case of its own."""
    dense = measure_dense(chunk, seed)
    return Case(
        op="dense attention",
        shape=chunk.label,
        settings={**chunk.settings, "kind": "dense"},
        timing=dense.timing,
        graph=None,
        num_bytes=chunk.num_bytes,
        flop=chunk.dense_flop,
        dense_by=dense.name,
        notes="tried: " + "; ".join(f"{name}: {found}" for name, found in dense.tried.items()),
    )


def lines_given(chunk: Chunk, density: float, dense: Case | None, seed: int) -> Case:
    """The kernel alone, on the lines of the density's pattern; its output is checked first."""
    pattern = pattern_for(chunk.grid, chunk.heads.num_heads, density)
    tiles, verticals = pattern.masks(chunk.device)
    sequences, queries = chunk.sequences(seed), chunk.queries(seed)

    def compute(segment: int) -> Tensor:
        return sparse_prefill(
            queries[segment],
            sequences.keys,
            sequences.values,
            sequences.slots[segment],
            start=chunk.cached_tokens,
            tiles=tiles,
            verticals=verticals,
            tile_tokens=CONFIG.tile_tokens,
            dense_last_rows=CONFIG.dense_last_rows,
            scale=chunk.heads.head_dim**-0.5,
        )

    check_lines(compute(0), queries[0], sequences, tiles, verticals, chunk.grid)
    timing = time_in_stream(_each(compute, chunk.batch), device=chunk.device, copies=chunk.copies)
    cells = int(computed_cells(tiles, verticals, chunk.grid, dense_last_rows=CONFIG.dense_last_rows).sum())
    return Case(
        op="sparse_prefill",
        shape=f"{chunk.label}, lines given, {pattern.density:.0%} asked for",
        settings={
            **chunk.settings,
            "kind": "lines given",
            "density": pattern.density,
            "pattern_seed": pattern.seed,
            "pattern": pattern.fingerprint(),
        },
        timing=timing,
        graph=None,
        num_bytes=chunk.num_bytes,
        flop=4.0 * chunk.heads.head_dim * cells * chunk.batch,
        dense_s=dense.time_s if dense else None,
        dense_by=dense.dense_by if dense else "",
        computed_share=cells / (chunk.grid.num_cells * chunk.heads.num_heads),
    )


def check_lines(
    output: Tensor, query: Tensor, sequences: Sequences, tiles: Tensor, verticals: Tensor, grid: TileGrid
) -> None:
    """Hold a few rows of segment 0 against plain mathematics: the tests' sizes are small. Raises RuntimeError."""
    slots = sequences.slots[0]
    last_sparse = max(0, grid.num_rows - CONFIG.dense_last_rows - 1)
    rows = sorted({0, last_sparse // 2, last_sparse, grid.num_rows - 1})
    key_tile = grid.key_tile(torch.arange(grid.num_columns, device=query.device))
    read = []
    for row in rows:
        diagonal = row // grid.tile_tokens + grid.num_past_tiles - key_tile
        chosen = (tiles[:, diagonal.clamp(min=0)] & (diagonal >= 0)) | verticals
        read.append(chosen | (row >= grid.num_rows - CONFIG.dense_last_rows))
    expected = expected_rows(query, sequences.keys[slots], sequences.values[slots], rows, read=torch.stack(read))
    error = relative_error(output[rows], expected)
    if not error < _ERROR_MAX:
        raise RuntimeError(f"the output is off by {error:.3g} of its norm")


def lines_selected(chunk: Chunk, density: float, dense: Case | None, seed: int) -> Case:
    """Sampling, selection and kernel over queries and keys that attend in the shape of the density's pattern."""
    pattern = pattern_for(chunk.grid, chunk.heads.num_heads, density)
    sequences = chunk.sequences(seed)
    planted = plant(
        pattern,
        num_kv_heads=chunk.heads.num_kv_heads,
        head_dim=chunk.heads.head_dim,
        dtype=measured_dtype(chunk.device),
        device=chunk.device,
    )
    for slots in sequences.slots:
        sequences.keys[slots] = planted.key
    queries = planted.query.expand(len(sequences.slots), -1, -1, -1)
    found = _Selected.measured(queries, sequences, chunk)
    return Case(
        op="sparse_prefill with selection",
        shape=f"{chunk.label}, lines selected, {pattern.density:.0%} drawn",
        settings={
            **chunk.settings,
            "kind": "lines selected",
            "density": pattern.density,
            "pattern_seed": pattern.seed,
            "pattern": pattern.fingerprint(),
            **found.settings,
        },
        timing=found.timing,
        graph=None,
        num_bytes=chunk.num_bytes,
        flop=chunk.dense_flop * found.computed_share,
        dense_s=dense.time_s if dense else None,
        dense_by=dense.dense_by if dense else "",
        computed_share=found.computed_share,
        selection_share=found.selection_share,
    )


@dataclass(frozen=True, slots=True)
class _Selected:
    """`attend` over the segments of a copy, and its kernel alone on the lines that it selected."""

    timing: Timing
    kernel_s: float
    outcome: PrefillOutcome

    @classmethod
    def measured(cls, queries: Tensor, sequences: Sequences, chunk: Chunk) -> _Selected:
        run = partial(_attend, queries, sequences, chunk)
        with mock.patch.object(prefill_module, "sparse_prefill", mock.Mock(wraps=sparse_prefill)) as kernel:
            outcome = run(0)
        (call,) = kernel.call_args_list

        def compute(segment: int) -> Tensor:
            keys, values, slots = sequences.keys, sequences.values, sequences.slots[segment]
            return sparse_prefill(queries[segment], keys, values, slots, **call.kwargs)

        timing = time_in_stream(_each(run, chunk.batch), device=chunk.device, copies=chunk.copies)
        kernel_timing = time_in_stream(_each(compute, chunk.batch), device=chunk.device, copies=chunk.copies)
        return cls(timing, kernel_timing.median_s, outcome)

    @property
    def computed_share(self) -> float:
        """Of dense attention's cells, dense heads included."""
        return int(self.outcome.cells_computed) / self.outcome.cells_total

    @property
    def selection_share(self) -> float:
        """Of the time; what sampling, selecting and measuring take. Never below 0, where the two times differ by chance."""
        return max(0.0, 1.0 - self.kernel_s / self.timing.median_s)

    @property
    def settings(self) -> dict[str, int | float | str]:
        """What the selection came to."""
        coverage = self.outcome.coverage
        return {
            "alpha": ORDER.alpha,
            "kernel_s": self.kernel_s,
            "dense_heads": int(self.outcome.dense_heads),
            "coverage": -1.0 if coverage is None else float(coverage.mean()),
        }


def _attend(queries: Tensor, sequences: Sequences, chunk: Chunk, segment: int) -> PrefillOutcome:
    return attend(
        queries[segment],
        sequences.keys,
        sequences.values,
        sequences.slots[segment],
        start=chunk.cached_tokens,
        order=ORDER,
        config=CONFIG,
        method=PREFILL_METHODS[ORDER.method],
        scale=chunk.heads.head_dim**-0.5,
    )


def _each(compute: Callable[[int], object], batch: int) -> Callable[[int], None]:
    """The segments of a copy, one after the other: the engine's prefill takes them so."""

    def call(copy: int) -> None:
        for segment in range(copy * batch, (copy + 1) * batch):
            compute(segment)

    return call


def shipped_case(new_tokens: int, cached_tokens: int, device: torch.device, seed: int) -> Case:
    """The layers of the shipped model, one after the other, each with its own selection; dense likewise."""
    layers = record_shipped(new_tokens + cached_tokens, device=device, seed=seed)
    _, num_kv_heads, head_dim = layers[0].key.shape
    heads = HeadShape(layers[0].query.shape[1], num_kv_heads, head_dim)
    chunk = Chunk(new_tokens, cached_tokens, 1, heads, device)
    every = slice(0, chunk.grid.num_columns)
    found, dense_s, dense_by = [], 0.0, set()
    for layer in layers:
        sequences = chunk.sequences(0)
        for slots in sequences.slots:
            sequences.keys[slots], sequences.values[slots] = layer.key[every], layer.value[every]
        query = layer.query[cached_tokens : chunk.grid.num_columns]
        found.append(_Selected.measured(query.expand(chunk.copies, -1, -1, -1), sequences, chunk))
        inputs = [
            (_by_head(query), _by_head(layer.key[every]), _by_head(layer.value[every])) for _ in range(chunk.copies)
        ]
        dense = fastest_dense(inputs, device=device, in_graph=False)
        dense_s += dense.time_s
        dense_by.add(dense.name)
    share = sum(layer.computed_share for layer in found) / len(found)
    timings = [layer.timing for layer in found]
    whole = Timing(
        sum(timing.median_s for timing in timings),
        sum(timing.low_s for timing in timings),
        sum(timing.high_s for timing in timings),
        timings[0].repeats,
        chunk.copies,
    )
    return Case(
        op="sparse_prefill with selection",
        shape=f"shipped model, {new_tokens} new on {cached_tokens}, {len(layers)} layers",
        settings={
            **chunk.settings,
            "kind": "shipped model",
            "layers": len(layers),
            "alpha": ORDER.alpha,
            "dense_heads": sum(int(layer.outcome.dense_heads) for layer in found),
        },
        timing=whole,
        graph=None,
        num_bytes=chunk.num_bytes * len(layers),
        flop=chunk.dense_flop * share * len(layers),
        dense_s=dense_s,
        dense_by=", ".join(sorted(dense_by)),
        computed_share=share,
        selection_share=max(0.0, 1.0 - sum(layer.kernel_s for layer in found) / whole.median_s),
        notes="medians of each layer, added up",
    )


def _by_head(tokens: Tensor) -> Tensor:
    """A copy [1, heads, n, D] of [n, heads, D]."""
    return tokens.transpose(0, 1)[None].contiguous()


def chunks(size: Size, device: torch.device) -> Iterator[Chunk]:
    """The middle of all sizes first, then batch by batch: where time runs out, the ends and the larger batches are what is missing."""
    middle = (size.batches[0], _middle(size.cached_tokens), _middle(size.new_tokens))
    every = itertools.product(size.batches, size.cached_tokens, size.new_tokens)
    for batch, cached, new in sorted(every, key=lambda sizes: sizes != middle):
        yield Chunk(new, cached, batch, size.heads, device)


def _middle(sizes: tuple[int, ...]) -> int:
    return sizes[len(sizes) // 2]


def run_benchmark(run: Run) -> None:
    """All cases."""
    size = SMALL if run.tiny else REAL
    seed = run.args.seed
    for new, cached in size.shipped:
        run.measure(f"shipped model, {new} new on {cached}", partial(shipped_case, new, cached, run.device, seed))
    for chunk in chunks(size, run.device):
        dense = run.measure(f"dense, {chunk.label}", partial(dense_case, chunk, seed))
        for density in size.densities:
            for kind, case in (("lines given", lines_given), ("lines selected", lines_selected)):
                run.measure(f"{chunk.label}, {density:.0%}, {kind}", partial(case, chunk, density, dense, seed))


@functools.lru_cache(maxsize=64)
def pattern_for(grid: TileGrid, num_heads: int, density: float) -> Pattern:
    """The pattern of a density over a chunk: one for every way to use it, and every batch."""
    return make_pattern(
        seed=1000 + round(100 * density),
        density=density,
        grid=grid,
        num_heads=num_heads,
        dense_last_rows=CONFIG.dense_last_rows,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 where a case failed."""
    run = begin("prefill", parse_arguments(__doc__, arguments))
    with torch.inference_mode():
        run_benchmark(run)
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())
