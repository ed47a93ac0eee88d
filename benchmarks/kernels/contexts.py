"""Many cached contexts in one pool, and dense attention over as many, for operations with one or few rows a context."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.kernels.dense import Dense, fastest_dense
from benchmarks.kernels.run import Case
from benchmarks.kernels.segments import LLAMA_8B, TINY, HeadShape, Sequences, measured_dtype, random_rows, scattered
from benchmarks.kernels.timing import Timing, num_copies, time_in_graph, time_in_stream


@dataclass(frozen=True, slots=True)
class ContextSize:
    """How much is cached, and which shapes are measured over it."""

    heads: HeadShape
    num_sequences: int
    sequence_tokens: int
    batches: tuple[int, ...]  # contexts that decode side by side
    lists: tuple[int, ...]  # tokens that each KV head reads of a context
    wholes: tuple[tuple[int, int], ...]  # contexts read to the end: how many, and their tokens
    scored: tuple[int, ...]  # tokens of one context that is scored
    stored: tuple[int, ...]  # new tokens of a step


REAL = ContextSize(
    LLAMA_8B,
    64,
    32_768,
    (1, 4, 16, 64),
    (1024, 2048, 4096),
    ((1, 32_768), (1, 131_072), (16, 32_768), (64, 32_768)),
    (16_384, 65_536, 131_072),
    (1, 16, 64, 512, 8192),
)
SMALL = ContextSize(TINY, 4, 256, (1, 2), (32, 64), ((1, 256), (2, 256)), (128, 512), (1, 16))


@dataclass
class Contexts:
    """The pool, made once: random keys and values fill it, and every copy of a call's inputs reads other contexts of it."""

    size: ContextSize
    device: torch.device
    seed: int
    sequences: Sequences = field(init=False)
    _dense: dict[tuple[int, int, int], Dense] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sequences = scattered(
            self.size.num_sequences,
            self.size.sequence_tokens,
            self.size.heads,
            dtype=self.dtype,
            device=self.device,
            seed=self.seed,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of queries, keys and values."""
        return measured_dtype(self.device)

    @property
    def scale(self) -> float:
        """Of the logits."""
        return float(self.size.heads.head_dim**-0.5)

    def slots(self, num_rows: int, num_tokens: int, copies: int) -> list[Tensor]:
        """Of `num_rows` contexts of `num_tokens` a copy, int64 [R, N]; copies take the next contexts, and begin again after the last."""
        flat = self.sequences.slots.flatten()  # longer contexts are several sequences in a row
        contexts = flat[: len(flat) // num_tokens * num_tokens].view(-1, num_tokens)
        assert len(contexts) >= num_rows, "the pool holds a context for every row"
        first = torch.arange(num_rows, device=self.device)
        return [contexts[(first + copy * num_rows) % len(contexts)] for copy in range(copies)]

    def queries(self, num_rows: int, copies: int) -> list[Tensor]:
        """[R, H, D] a copy."""
        size = (copies, num_rows, self.size.heads.num_heads, self.size.heads.head_dim)
        return list(random_rows(size, dtype=self.dtype, device=self.device, seed=self.seed + 1))

    def copies(self, bytes_a_copy: float) -> int:
        """So many that they do not fit the cache together."""
        return num_copies(int(bytes_a_copy), self.device)

    def dense(self, num_contexts: int, rows_each: int, num_tokens: int) -> Dense:
        """Dense attention of the last `rows_each` rows of each of so many contexts, measured once."""
        key = (num_contexts, rows_each, num_tokens)
        if key not in self._dense:
            heads = self.size.heads
            copies = self.copies(num_contexts * heads.kv_bytes(num_tokens, self.dtype))
            rows = (num_contexts, heads.num_heads, rows_each, heads.head_dim)
            cached = (num_contexts, heads.num_kv_heads, num_tokens, heads.head_dim)
            inputs = [
                (self._random(rows, copy), self._random(cached, 1000 + copy), self._random(cached, 2000 + copy))
                for copy in range(copies)
            ]
            self._dense[key] = fastest_dense(inputs, device=self.device, in_graph=True)
        return self._dense[key]

    def _random(self, size: tuple[int, ...], seed: int) -> Tensor:
        return random_rows(size, dtype=self.dtype, device=self.device, seed=self.seed + seed)

    def case(
        self,
        op: str,
        shape: str,
        settings: dict[str, int | float | str],
        call: Callable[[int], object],
        *,
        copies: int,
        num_bytes: float,
        flop: float = 0.0,
        dense: Dense | None = None,
    ) -> Case:
        """Time a call in the stream and in a graph."""
        graph, notes = self._in_graph(call, copies)
        heads = self.size.heads
        return Case(
            op=op,
            shape=shape,
            settings={
                **settings,
                "heads": heads.num_heads,
                "kv_heads": heads.num_kv_heads,
                "head_dim": heads.head_dim,
            },
            timing=time_in_stream(call, device=self.device, copies=copies),
            graph=graph,
            num_bytes=num_bytes,
            flop=flop,
            dense_s=dense.time_s if dense else None,
            dense_by=dense.name if dense else "",
            notes=notes,
        )

    def _in_graph(self, call: Callable[[int], object], copies: int) -> tuple[Timing | None, str]:
        try:
            return time_in_graph(call, device=self.device, copies=copies), ""
        except RuntimeError as error:  # it waits for the device somewhere: that cannot be captured, and is told
            torch.cuda.synchronize(self.device)
            return None, f"not captured in a graph: {str(error).splitlines()[0][:200]}"
