"""How lines are chosen, and what a selection holds and costs."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from loopserve.config import PrefillSparsity
from loopserve.sparsity import PREFILL_METHODS, LineSelection, TileGrid
from loopserve.sparsity.fixed_lines import tiles_of
from loopserve.sparsity.lines import with_columns
from loopserve.sparsity.prefill import Mass

CHUNKS = st.tuples(st.integers(0, 70), st.integers(1, 40), st.sampled_from([1, 4, 8, 64]))  # start, rows, tile


def read_mask(selection: LineSelection, grid: TileGrid, dense_last_rows: int = 0) -> Tensor:
    """The contract of `sparse_prefill`, cell by cell: bool [H, r, N]."""
    num_heads = len(selection.tiles)
    read = torch.zeros((num_heads, grid.num_rows, grid.num_columns), dtype=torch.bool)
    for head in range(num_heads):
        for row in range(grid.num_rows):
            for column in range(grid.start + row + 1):
                diagonal = row // grid.tile_tokens - (column - grid.start) // grid.tile_tokens
                dense = row >= grid.num_rows - dense_last_rows
                read[head, row, column] = (
                    dense or selection.verticals[head, column] or bool(selection.tiles[head, diagonal])
                )
    return read


def causal_mask(grid: TileGrid) -> Tensor:
    return torch.arange(grid.num_columns) <= grid.start + torch.arange(grid.num_rows)[:, None]


def random_weights(grid: TileGrid, seed: int, sharpness: float) -> Tensor:
    """Dense weights of every row, float32 [2, r, N]; each row sums to 1."""
    logits = torch.randn((2, grid.num_rows, grid.num_columns), generator=torch.Generator().manual_seed(seed))
    return (sharpness * logits).masked_fill(~causal_mask(grid), -torch.inf).softmax(dim=2)


def per_query_tile(weights: Tensor, grid: TileGrid) -> Tensor:
    return torch.stack([rows.sum(dim=1) for rows in weights.split(grid.tile_tokens, dim=1)], dim=1)


def choose(
    weights: Tensor, grid: TileGrid, method: str = "lines", *, alpha: float, **settings: object
) -> LineSelection:
    config = PrefillSparsity(**{"local_tokens": 0, "sink_tokens": 0, "tile_tokens": grid.tile_tokens, **settings})  # type: ignore[arg-type]
    chooser = PREFILL_METHODS[method]
    config = chooser.settings(config)
    mass = weights[:, -config.sampled_rows :] if chooser.mass is Mass.PER_ROW else per_query_tile(weights, grid)
    return chooser.choose(mass, start=grid.start, num_rows=grid.num_rows, alpha=alpha, config=config)


@settings(max_examples=40, deadline=None)
@given(CHUNKS, st.floats(0.05, 0.99), st.sampled_from(["lines", "flexprefill"]), st.floats(0, 6), st.integers(0, 99))
def test_chosen_lines_hold_alpha_of_the_sampled_weight(
    chunk: tuple[int, int, int], alpha: float, method: str, sharpness: float, seed: int
):
    grid = TileGrid(*chunk)
    weights = random_weights(grid, seed, sharpness)
    selection = choose(weights, grid, method, alpha=alpha)
    held = (weights * read_mask(selection, grid)).sum(dim=(1, 2))
    assert (held >= (alpha - 1e-5) * grid.num_rows).all()  # 1e-5: float32 sums over at most some thousand cells


@settings(max_examples=40, deadline=None)
@given(CHUNKS, st.integers(0, 20), st.integers(0, 99))
def test_a_selection_knows_its_cells_and_its_weight_exactly(
    chunk: tuple[int, int, int], dense_last_rows: int, seed: int
):
    grid = TileGrid(*chunk)
    generator = torch.Generator().manual_seed(seed)
    selection = LineSelection(
        torch.rand((2, grid.num_diagonals), generator=generator) < 0.3,
        torch.rand((2, grid.num_columns), generator=generator) < 0.2,
    )
    read = read_mask(selection, grid, dense_last_rows)
    assert torch.equal(selection.num_cells(grid, dense_last_rows=dense_last_rows), read.sum(dim=(1, 2)))
    weights = random_weights(grid, seed, 2.0)
    held = (weights * read_mask(selection, grid)).sum(dim=(1, 2))
    torch.testing.assert_close(selection.held_mass(per_query_tile(weights, grid), grid), held)
    assert grid.num_cells == int(causal_mask(grid).sum())


@given(CHUNKS)
@settings(max_examples=20, deadline=None)
def test_full_alpha_reads_every_cell_with_every_method(chunk: tuple[int, int, int]):
    grid = TileGrid(*chunk)
    for method in PREFILL_METHODS:
        selection = choose(random_weights(grid, 0, 1.0), grid, method, alpha=1.0)
        assert torch.equal(read_mask(selection, grid), causal_mask(grid).expand(2, -1, -1))


@pytest.mark.parametrize("method", sorted(PREFILL_METHODS.keys() - {"dense", "fixed_lines"}))
def test_sinks_and_local_diagonals_are_always_read(method: str):
    grid = TileGrid(start=45, num_rows=30, tile_tokens=8)
    selection = choose(random_weights(grid, 1, 8.0), grid, method, alpha=0.01, sink_tokens=3, local_tokens=20)
    read = read_mask(selection, grid)
    assert read[:, :, :3].all()
    offset = grid.start + torch.arange(grid.num_rows)[:, None] - torch.arange(grid.num_columns)
    assert read[:, (offset >= 0) & (offset < 20)].all()
    assert not read.all()


def planted(grid: TileGrid, *, vertical: int, slash: int) -> Tensor:
    """Head 0 looks at one column, head 1 at one offset; a tenth of the weight is spread evenly."""
    weights = causal_mask(grid).float().expand(2, -1, -1).clone()
    weights = 0.1 * weights / weights.sum(dim=2, keepdim=True)
    rows = torch.arange(grid.num_rows)
    weights[0, :, vertical] += 0.9
    weights[1, rows, grid.start + rows - slash] += 0.9
    return weights


def test_a_planted_vertical_is_found_as_one_column():
    grid = TileGrid(start=200, num_rows=64, tile_tokens=8)
    selection = choose(planted(grid, vertical=77, slash=100), grid, alpha=0.85)
    assert selection.verticals[0].nonzero()[:, 0].tolist() == [77]
    assert not selection.tiles[0].any()


def test_a_planted_slash_is_found_as_its_tile_diagonals():
    grid = TileGrid(start=200, num_rows=64, tile_tokens=8)
    selection = choose(planted(grid, vertical=77, slash=100), grid, alpha=0.85)
    assert selection.tiles[1].nonzero()[:, 0].tolist() == [12, 13]  # offset 100 lies between tiles 12 and 13 of 8
    assert not selection.verticals[1].any()


@pytest.mark.parametrize(
    ("start", "num_rows", "wanted"), [(0, 1, (1, 1)), (10, 20, (30, 30)), (700, 100, (30, 148)), (1500, 500, (61, 372))]
)
def test_fixed_lines_are_the_last_rows_heaviest_in_fixed_numbers(start: int, num_rows: int, wanted: tuple[int, int]):
    grid = TileGrid(start, num_rows, tile_tokens=1)  # a diagonal of tiles is a diagonal
    weights = random_weights(grid, 3, 4.0)
    selection = choose(weights, grid, "fixed_lines", alpha=0.5)
    num_columns, num_diagonals = wanted
    assert (selection.verticals.sum(dim=1) == num_columns).all() and (selection.tiles.sum(dim=1) == num_diagonals).all()
    last = weights[:, -64:]
    first_row = grid.num_columns - last.shape[1]
    diagonals = torch.stack(
        [torch.stack([row.diagonal(first_row - offset).sum() for offset in range(grid.num_columns)]) for row in last]
    )
    for found, forced, by_weight in (
        (selection.verticals, 30, last.sum(dim=1)),
        (selection.tiles, 100, diagonals),
    ):
        assert found[:, :forced].all()
        for read, weight in zip(found[:, forced:], by_weight[:, forced:], strict=True):
            assert not read.any() or read.all() or weight[read].min() >= weight[~read].max()


def test_a_fixed_diagonal_is_read_as_the_tiles_that_it_crosses():
    grid = TileGrid(start=200, num_rows=64, tile_tokens=8)
    tiles = tiles_of(torch.tensor([[16, 103, 263]]), grid)
    assert tiles[0].nonzero()[:, 0].tolist() == [2, 12, 13, 32]
    offset = grid.start + torch.arange(grid.num_rows)[:, None] - torch.arange(grid.num_columns)
    none = torch.zeros((1, grid.num_columns), dtype=torch.bool)
    read = read_mask(LineSelection(tiles, none), grid)[0]
    for each in (16, 103, 263):
        assert read[offset == each].all()


def test_the_union_reads_less_than_two_separate_covers():
    grid = TileGrid(start=200, num_rows=64, tile_tokens=8)
    weights = planted(grid, vertical=77, slash=100).mean(dim=0).expand(2, -1, -1)
    cells = [
        int(choose(weights, grid, method, alpha=0.85).num_cells(grid, dense_last_rows=0).sum())
        for method in ("lines", "flexprefill")
    ]
    assert cells[0] < cells[1]


@pytest.mark.parametrize("method", PREFILL_METHODS)
def test_heads_choose_alone(method: str):
    grid = TileGrid(start=190, num_rows=40, tile_tokens=8)
    weights = random_weights(grid, 4, 3.0)
    both = read_mask(choose(weights, grid, method, alpha=0.6), grid)
    for head in range(2):
        alone = read_mask(choose(weights[head : head + 1], grid, method, alpha=0.6), grid)
        assert torch.equal(both[head], alone[0])


def test_heavy_columns_do_not_pull_in_the_tiles_that_they_cross():
    grid = TileGrid(start=1536, num_rows=512, tile_tokens=64)
    generator = torch.Generator().manual_seed(0)
    logits = (3.0 * torch.randn(grid.num_columns, generator=generator)).expand(grid.num_rows, -1)
    weights = logits.masked_fill(~causal_mask(grid), float("-inf")).softmax(dim=1)[None]
    selection = choose(weights, grid, alpha=0.95)
    read = read_mask(selection, grid)
    assert (weights * read).sum() >= 0.95 * grid.num_rows
    assert read.sum() < 0.25 * grid.num_cells  # with whole tiles for single columns it was 0.86


def test_columns_that_tie_are_all_read():
    weight = torch.tensor([[0.5, 0.25, 1.0, 0.25, 0.125, 0.25]])
    for missing, wanted in ((0.0, []), (1.0, [2]), (1.1, [1, 2, 3, 5]), (9.0, [1, 2, 3, 4, 5])):
        found = with_columns(weight, torch.tensor([0.5 + missing]), torch.zeros((1, 1), dtype=torch.bool), num_sinks=1)
        assert found.verticals[0].nonzero()[:, 0].tolist() == [0, *wanted]


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that an operation gives."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> object:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            if isinstance(each, Tensor) and not each._is_view() and 0 not in each.stride():
                self.num_bytes = max(self.num_bytes, each.numel() * each.element_size())
        return made


@pytest.mark.parametrize("method", ["lines", "flexprefill", "a_shape", "dense"])
def test_no_intermediate_is_larger_than_the_scores_it_is_chosen_from(method: str):
    grid = TileGrid(start=1001, num_rows=128, tile_tokens=16)
    weights = random_weights(grid, 5, 4.0)
    mass = per_query_tile(weights, grid)
    config = PREFILL_METHODS[method].settings(PrefillSparsity(tile_tokens=16))
    with LargestTensor() as largest:
        selection = PREFILL_METHODS[method].choose(
            mass, start=grid.start, num_rows=grid.num_rows, alpha=0.9, config=config
        )
        selection.num_cells(grid, dense_last_rows=16)
        selection.held_mass(mass, grid)
    in_whole_tiles = mass.shape[0] * mass.shape[1] * grid.num_diagonals * grid.tile_tokens
    assert mass.nbytes <= largest.num_bytes <= 4 * in_whole_tiles
