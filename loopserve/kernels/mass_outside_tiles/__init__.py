"""Contract of `mass_outside_tiles`: sampled attention weight that chosen tiles hold, and what they leave to each column."""

from typing import NamedTuple

import torch
from torch import Tensor

from loopserve.kernels.dispatch import implementation


class SplitMass(NamedTuple):
    """Weight by whether a chosen tile holds it; together it is all of it."""

    inside: Tensor  # float32 [H]
    outside: Tensor  # float32 [H, N], by column


def mass_outside_tiles(mass: Tensor, tiles: Tensor, *, start: int, tile_tokens: int) -> SplitMass:
    """Split `mass` into what lies in tiles on chosen diagonals and, column by column, what does not, in one pass.

    mass float32 [H, Q, N], a row a query tile of r = N - start new rows, Q = ceil(r / tile_tokens), columns contiguous, zero in a query
    tile's future; tiles bool [H, T], T = Q + ceil(start / tile_tokens): chosen tile-diagonals, as `loopserve.kernels.sparse_prefill` draws
    them. Sums are float32. Does not wait for the device. Mutates nothing.
    """
    num_query_tiles = -(-(mass.shape[2] - start) // tile_tokens)
    assert mass.dtype == torch.float32 and mass.dim() == 3, "mass is float32 [H, Q, N]"
    assert mass.shape[1] == num_query_tiles, "a row of mass for each query tile"
    assert tiles.dtype == torch.bool and tiles.shape == (len(mass), num_query_tiles - (-start // tile_tokens)), (
        "bool [H, T]"
    )
    split: SplitMass = implementation("mass_outside_tiles", mass.device.type)(
        mass, tiles, start=start, tile_tokens=tile_tokens
    )
    return split
