"""Contract of `mass_per_tile`: sampled attention weight summed inside tiles, as it is and as far as it exceeds what columns hold."""

from typing import NamedTuple

import torch
from torch import Tensor

from loopserve.kernels.dispatch import implementation


class TileMass(NamedTuple):
    """Sums of the tiles that `loopserve.kernels.sparse_prefill` draws; key tiles count from 0 at the oldest."""

    whole: Tensor  # float32 [H, Q, K]
    added: Tensor  # float32 [H, Q, K]


def mass_per_tile(mass: Tensor, less: Tensor | None, *, start: int, tile_tokens: int) -> TileMass:
    """Sum `mass` inside each key tile, and what of each entry is above `less`, in one pass.

    mass float32 [H, Q, N], a row a query tile of r = N - start new rows, Q = ceil(r / tile_tokens), columns contiguous; less float32 [H, N]
    or None: nothing, and `added` is `whole`. K = Q + ceil(start / tile_tokens); added sums max(mass - less, 0). Sums are float32. Does not
    wait for the device. Mutates nothing.
    """
    assert mass.dtype == torch.float32 and mass.dim() == 3, "mass is float32 [H, Q, N]"
    assert mass.shape[1] == -(-(mass.shape[2] - start) // tile_tokens), "a row of mass for each query tile"
    assert less is None or (less.dtype == torch.float32 and less.shape == (mass.shape[0], mass.shape[2])), (
        "float32 [H, N]"
    )
    sums: TileMass = implementation("mass_per_tile", mass.device.type)(mass, less, start=start, tile_tokens=tile_tokens)
    return sums
