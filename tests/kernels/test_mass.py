"""Sums of sampled weight over tiles and columns against float64 sums, entry by entry."""

import pytest
import torch
from torch import Tensor

from loopserve.kernels import mass_outside_tiles, mass_per_tile
from tests.kernels.conftest import random_numbers

# start, rows, tile: one token; no past; a past that fills no tile; odd everything; a tile larger than the chunk; many blocks of columns
SHAPES = [(0, 1, 4), (0, 23, 8), (3, 9, 8), (37, 21, 8), (40, 16, 8), (11, 5, 64), (2100, 70, 7), (1024, 64, 64)]
NUM_HEADS = 3


def sampled_mass(start: int, num_rows: int, tile_tokens: int, *, sliced: bool) -> Tensor:
    """Weights [H, Q, N] with nothing in the future; as a slice, they are followed by others that must not be read."""
    num_tiles = -(-num_rows // tile_tokens)
    mass = random_numbers((NUM_HEADS, 2 * num_tiles, start + num_rows), seed=start + num_rows).abs()
    last = torch.clamp((torch.arange(num_tiles) + 1) * tile_tokens, max=num_rows) + start
    mass[:, :num_tiles].masked_fill_(torch.arange(start + num_rows) >= last[:, None], 0.0)
    mass[:, num_tiles:] = torch.nan
    return mass[:, :num_tiles] if sliced else mass[:, :num_tiles].contiguous()


def key_tile(column: int, start: int, tile_tokens: int) -> int:
    return (column - start) // tile_tokens - (-start // tile_tokens)


@pytest.mark.parametrize(("start", "num_rows", "tile_tokens"), SHAPES)
@pytest.mark.parametrize("sliced", [False, True])
def test_tiles_sum_what_is_there_and_what_is_above_the_columns(
    start: int, num_rows: int, tile_tokens: int, sliced: bool
):
    mass = sampled_mass(start, num_rows, tile_tokens, sliced=sliced)
    less = random_numbers((NUM_HEADS, mass.shape[2]), seed=1).abs()
    tile_of = torch.tensor([key_tile(column, start, tile_tokens) for column in range(mass.shape[2])])
    num_tiles = mass.shape[1] - (-start // tile_tokens)
    member = torch.nn.functional.one_hot(tile_of, num_tiles).double()  # [N, K]
    whole, added = mass_per_tile(mass, less, start=start, tile_tokens=tile_tokens)
    assert whole.dtype == added.dtype == torch.float32 and whole.shape == added.shape == (*mass.shape[:2], num_tiles)
    torch.testing.assert_close(whole.double(), mass.double() @ member, atol=1e-4, rtol=0)
    above = (mass.double() - less[:, None].double()).clamp(min=0.0)
    torch.testing.assert_close(added.double(), above @ member, atol=1e-4, rtol=0)
    plain = mass_per_tile(mass, None, start=start, tile_tokens=tile_tokens)
    assert torch.equal(plain.whole, whole) and torch.equal(plain.added, whole)


@pytest.mark.parametrize(("start", "num_rows", "tile_tokens"), SHAPES)
@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_chosen_tiles_hold_their_part_and_leave_the_rest_to_its_columns(
    start: int, num_rows: int, tile_tokens: int, sliced: bool, share: float
):
    mass = sampled_mass(start, num_rows, tile_tokens, sliced=sliced)
    num_query_tiles, num_columns = mass.shape[1:]
    num_diagonals = num_query_tiles - (-start // tile_tokens)
    tiles = torch.rand(NUM_HEADS, num_diagonals) < share
    held = torch.zeros(mass.shape, dtype=torch.bool)
    for query_tile in range(num_query_tiles):
        for column in range(num_columns):
            diagonal = query_tile + num_diagonals - num_query_tiles - key_tile(column, start, tile_tokens)
            if diagonal >= 0:
                held[:, query_tile, column] = tiles[:, diagonal]
    inside, outside = mass_outside_tiles(mass, tiles, start=start, tile_tokens=tile_tokens)
    assert inside.dtype == outside.dtype == torch.float32
    expected = mass.double().masked_fill(held, 0.0).sum(dim=1)
    torch.testing.assert_close(outside.double(), expected, atol=1e-4, rtol=0)
    # 1e-6 of the whole: the reference subtracts, and both add up thousands of entries in float32.
    whole = float(mass.double().sum(dim=(1, 2)).max())
    torch.testing.assert_close(
        inside.double(), mass.double().masked_fill(~held, 0.0).sum(dim=(1, 2)), atol=1e-4 + 1e-6 * whole, rtol=0
    )
