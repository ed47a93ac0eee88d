"""New rows over a cached context: their sizes, their inputs, and the work that dense attention has with them. Knows no operation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.kernels.segments import HeadShape, Sequences, measured_dtype, random_rows, scattered
from benchmarks.kernels.timing import num_copies
from loopserve.config import PrefillSparsity
from loopserve.sparsity.grid import TileGrid

CONFIG = PrefillSparsity()  # the engine's defaults


@dataclass(frozen=True, slots=True)
class Chunk:
    """New rows over a context, in so many segments, in copies that take turns."""

    new_tokens: int
    cached_tokens: int
    batch: int
    heads: HeadShape
    device: torch.device

    @property
    def grid(self) -> TileGrid:
        """The tiles of one segment."""
        return TileGrid(self.cached_tokens, self.new_tokens, CONFIG.tile_tokens)

    @property
    def label(self) -> str:
        """For a reader."""
        return f"{self.new_tokens} new on {self.cached_tokens}, batch {self.batch}"

    @property
    def settings(self) -> dict[str, int | float | str]:
        """For a program."""
        return {
            "new_tokens": self.new_tokens,
            "cached_tokens": self.cached_tokens,
            "batch": self.batch,
            "heads": self.heads.num_heads,
            "kv_heads": self.heads.num_kv_heads,
            "head_dim": self.heads.head_dim,
        }

    @property
    def num_bytes(self) -> int:
        """Every query, key and value read once, every output written once: the dense last rows read all columns, so no line spares any."""
        rows = 2 * self.new_tokens * self.heads.num_heads * self.heads.head_dim * measured_dtype(self.device).itemsize
        return self.batch * (rows + self.heads.kv_bytes(self.grid.num_columns, measured_dtype(self.device)))

    @property
    def dense_flop(self) -> float:
        """Two products of D multiplications and additions in each causal cell."""
        return 4.0 * self.heads.head_dim * self.grid.num_cells * self.heads.num_heads * self.batch

    @property
    def copies(self) -> int:
        """So many that they do not fit the cache together."""
        return num_copies(self.num_bytes, self.device, most=16)

    def sequences(self, seed: int) -> Sequences:
        """`batch` segments a copy."""
        dtype = measured_dtype(self.device)
        count = self.copies * self.batch
        return scattered(count, self.grid.num_columns, self.heads, dtype=dtype, device=self.device, seed=seed)

    def queries(self, seed: int) -> Tensor:
        """[copies * batch, r, H, D]."""
        size = (self.copies * self.batch, self.new_tokens, self.heads.num_heads, self.heads.head_dim)
        return random_rows(size, dtype=measured_dtype(self.device), device=self.device, seed=seed)
