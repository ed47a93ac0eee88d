"""Phase 1 of one segment from rows to output."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from loopserve.config import PrefillSparsity
from loopserve.plan import SparsePrefill
from loopserve.sparsity import (
    PREFILL_METHODS,
    LineSelection,
    PrefillMethod,
    PrefillOutcome,
    TileGrid,
    attend,
    sample_rows,
)
from loopserve.sparsity import prefill as prefill_module
from tests.sparsity.conftest import NUM_HEADS, SCALE, Context, random_context
from tests.sparsity.test_lines import read_mask

CONFIG = PrefillSparsity(tile_tokens=8, local_tokens=8, sampled_rows=32, heldout_rows=8, dense_last_rows=4)


class Recorder:
    """Passes a method's choice on and remembers it."""

    def __init__(self, method: PrefillMethod) -> None:
        self.method = method
        self.mass = method.mass
        self.settings = method.settings
        self.selection: LineSelection | None = None

    def choose(self, *args: object, **kwargs: object) -> LineSelection:
        self.selection = self.method.choose(*args, **kwargs)  # type: ignore[arg-type]
        return self.selection


def run(
    context: Context,
    method: PrefillMethod,
    *,
    alpha: float = 0.6,
    min_coverage: float | None = None,
    config: PrefillSparsity = CONFIG,
) -> PrefillOutcome:
    return attend(
        context.query,
        context.key_pool,
        context.value_pool,
        context.slots,
        start=len(context.slots) - len(context.query),
        order=SparsePrefill("named by the plan, given by the test", alpha=alpha, min_coverage=min_coverage, seed=9),
        config=config,
        method=method,
        scale=SCALE,
    )


@pytest.mark.parametrize("method", PREFILL_METHODS)
@pytest.mark.parametrize(("start", "num_rows"), [(0, 1), (0, 70), (61, 33), (130, 64)])
def test_full_alpha_through_the_sparse_path_equals_dense(method: str, start: int, num_rows: int):
    context = random_context(start, num_rows)
    outcome = run(context, PREFILL_METHODS[method], alpha=1.0)
    torch.testing.assert_close(outcome.output.double(), context.attention(), atol=1e-5, rtol=0)
    assert int(outcome.cells_computed) == outcome.cells_total
    assert outcome.coverage is None or (outcome.coverage == 1.0).all()


@pytest.mark.parametrize("method", sorted(PREFILL_METHODS.keys() - {"dense"}))
@pytest.mark.parametrize("row_sampling", ["stratified", "random", "last"])
def test_cells_and_coverage_are_those_of_the_attention_that_ran(method: str, row_sampling: str):
    start, num_rows = 93, 61
    config = PrefillSparsity(
        tile_tokens=8, local_tokens=8, sampled_rows=24, heldout_rows=8, dense_last_rows=20, row_sampling=row_sampling
    )
    context = random_context(start, num_rows, sharpness=3.0)
    recorder = Recorder(PREFILL_METHODS[method])
    outcome = run(context, recorder, config=replace(config, dense_head_share=1.0))
    config = recorder.settings(config)
    assert recorder.selection is not None
    grid = TileGrid(start, num_rows, 8)
    read = read_mask(recorder.selection, grid, dense_last_rows=20)
    assert int(outcome.cells_computed) == int(read.sum())
    assert outcome.cells_total == NUM_HEADS * grid.num_cells
    assert int(outcome.dense_heads) == 0
    heldout = torch.tensor(sample_rows(num_rows, config, 9).heldout)
    weights = context.weights(context.query[heldout], start + heldout)
    expected = (weights * read[:, heldout]).sum(dim=2).mean(dim=1)
    assert outcome.coverage is not None
    torch.testing.assert_close(outcome.coverage.double(), expected, atol=1e-5, rtol=0)


def test_a_head_below_the_least_coverage_is_computed_dense_and_counted():
    context = random_context(100, 64, sharpness=3.0)
    sparse = run(context, PREFILL_METHODS["lines"])
    assert sparse.coverage is not None
    between = float(sparse.coverage.sort().values[1:3].mean())
    outcome = run(context, PREFILL_METHODS["lines"], min_coverage=between)
    dense = sparse.coverage < between
    assert int(outcome.dense_heads) == int(dense.sum()) == 2
    assert outcome.coverage is not None
    assert (outcome.coverage[dense] == 1.0).all()
    assert torch.equal(outcome.coverage[~dense], sparse.coverage[~dense])
    torch.testing.assert_close(outcome.output[:, dense].double(), context.attention()[:, dense], atol=1e-5, rtol=0)
    assert torch.equal(outcome.output[:, ~dense], sparse.output[:, ~dense])
    assert sparse.cells_computed < outcome.cells_computed < outcome.cells_total


def test_a_head_whose_lines_cover_nearly_everything_is_computed_dense_and_counted():
    context = random_context(100, 64, sharpness=0.0)  # even weights: no line is better than another
    outcome = run(context, PREFILL_METHODS["lines"], alpha=0.97)
    assert int(outcome.dense_heads) == NUM_HEADS
    assert int(outcome.cells_computed) == outcome.cells_total
    torch.testing.assert_close(outcome.output.double(), context.attention(), atol=1e-5, rtol=0)


def test_the_last_rows_are_dense():
    context = random_context(100, 64, sharpness=3.0)
    outcome = run(context, PREFILL_METHODS["a_shape"])
    expected = context.attention()
    torch.testing.assert_close(outcome.output[-4:].double(), expected[-4:], atol=1e-5, rtol=0)
    assert (outcome.output[:-4].double() - expected[:-4]).abs().max() > 0.1


def test_a_chunk_that_holds_no_row_out_reports_no_coverage():
    assert run(random_context(50, 16), PREFILL_METHODS["lines"]).coverage is None


def test_the_same_order_computes_the_same_output():
    context = random_context(100, 64, sharpness=3.0)
    first, second = (run(context, PREFILL_METHODS["lines"]) for _ in range(2))
    assert torch.equal(first.output, second.output)


class QueueOnly(TorchDispatchMode):
    """Refuses what makes a host wait for a device, or copies to it: numbers read back, shapes that depend on data, host lists."""

    REFUSED = frozenset(
        f"aten::{name}"
        for name in (
            "_local_scalar_dense",
            "is_nonzero",
            "equal",
            "nonzero",
            "nonzero_numpy",
            "masked_select",
            "_unique2",
            "unique_dim",
            "repeat_interleave",
            "lift_fresh",
        )
    )

    def __init__(self) -> None:
        super().__init__()
        self.is_open = False

    def __torch_dispatch__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> object:
        if not self.is_open:
            assert func._schema.name not in self.REFUSED, f"{func} makes the host wait"
            if func._schema.name.startswith("aten::index"):  # a mask as an index is counted on the host
                indices = args[1] if isinstance(args[1], list | tuple) else ()
                assert all(index is None or index.dtype == torch.int64 for index in indices), "a mask as an index"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "read_back",
    [
        lambda mask: int(mask.sum()),
        lambda mask: mask.nonzero(),
        lambda mask: mask[mask],
        lambda mask: bool(mask.any()),
        lambda mask: torch.tensor([1, 2]),
    ],
)
def test_what_waits_for_a_device_is_refused(read_back: Any):
    with QueueOnly(), pytest.raises(AssertionError):
        read_back(torch.ones(3) > 0)


@pytest.mark.parametrize("method", PREFILL_METHODS)
@pytest.mark.parametrize(("alpha", "min_coverage"), [(0.6, None), (0.6, 0.7), (1.0, None)])
def test_a_layer_is_queued_without_waiting_and_only_a_chunks_first_one_copies(
    method: str, alpha: float, min_coverage: float | None, monkeypatch: pytest.MonkeyPatch
):
    queue_only = QueueOnly()
    attended: list[LineSelection] = []

    def scores(*args: Any, **kwargs: Any) -> Tensor:
        queue_only.is_open = True  # references may look at their tensors: they lie on the host
        mass = line_scores(*args, **kwargs)
        queue_only.is_open = False
        return mass

    def record(query: Tensor, *_: Tensor, tiles: Tensor, verticals: Tensor, **__: object) -> Tensor:
        attended.append(LineSelection(tiles, verticals))
        return query

    line_scores = prefill_module.line_scores
    monkeypatch.setattr(prefill_module, "line_scores", scores)
    monkeypatch.setattr(prefill_module, "sparse_prefill", record)
    layers = [random_context(93, 61, seed, sharpness=3.0) for seed in range(2)]
    run(layers[0], PREFILL_METHODS[method], alpha=alpha, min_coverage=min_coverage)
    with queue_only:
        run(layers[1], PREFILL_METHODS[method], alpha=alpha, min_coverage=min_coverage)
    assert len(attended) == 2 and attended[1].verticals.shape == (NUM_HEADS, 154)
