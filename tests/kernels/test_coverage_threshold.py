"""`coverage_threshold` against its definition, on sums that are exact: multiples of 2**-10 below 2**13."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loopserve.kernels import coverage_threshold
from tests.kernels.conftest import DEVICE, random_numbers


def by_definition(weights: Tensor, target: float) -> float:
    if target <= 0:
        return float("inf")
    reaching = [t for t in weights.unique().tolist() if weights[weights >= t].double().sum() >= target]
    return max(reaching, default=0.0)


def exact_weights(num_rows: int, num_columns: int, *, levels: int = 1000) -> Tensor:
    return torch.randint(levels, (num_rows, num_columns)).float() / 1024


@pytest.mark.parametrize("num_columns", [1, 2, 37, 4096, 4097, 10_000])
@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_entries_from_the_threshold_on_hold_the_target_and_no_larger_one_does(num_columns: int, levels: int):
    weights = exact_weights(6, num_columns, levels=levels)
    total = weights.sum(dim=1)
    targets = total * torch.tensor([0.01, 0.5, 0.95, 1.0, 2.0, 0.0])
    targets = (targets * 1024).round() / 1024
    found = coverage_threshold(weights, targets)
    assert found.dtype == torch.float32 and found.shape == (6,)
    wanted = [by_definition(row, target) for row, target in zip(weights, targets.tolist(), strict=True)]
    assert found.tolist() == wanted


def test_a_target_that_is_not_positive_needs_nothing_and_one_out_of_reach_takes_all():
    weights = torch.tensor([[1.0, 0.0, 3.0]] * 4)
    assert coverage_threshold(weights, torch.tensor([0.0, -2.0, 4.0, 4.5])).tolist() == [torch.inf, torch.inf, 1.0, 0.0]


def test_sizes_of_all_magnitudes_are_told_apart():
    weights = torch.tensor([[2.0**-120, 1.0, 2.0**100, 2.0**-60, 3e-39]])
    for target, wanted in ((2.0**99, 2.0**100), (2.0**-130, 2.0**100)):
        assert coverage_threshold(weights, torch.tensor([target])).tolist() == [wanted]
    small = weights[:, [0, 3, 4]]
    assert coverage_threshold(small, torch.tensor([2.0**-60 + 2.0**-80])).tolist() == [0.0], "all of it is less"
    assert coverage_threshold(small, torch.tensor([2.0**-61])).tolist() == [2.0**-60]


def test_rows_without_columns_reach_nothing():
    weights = torch.zeros((2, 0))
    assert coverage_threshold(weights, torch.tensor([1.0, 0.0])).tolist() == [0.0, torch.inf]
    assert coverage_threshold(torch.zeros((0, 5)), torch.zeros(0)).shape == (0,)


def test_strided_rows_and_targets_are_read_as_they_stand():
    wide = exact_weights(3, 80)
    targets = torch.tensor([[5.0, 0.0], [9.0, 0.0], [15.0, 0.0]])
    weights = wide[:, ::2]
    expected = [by_definition(row, target) for row, target in zip(weights, (5.0, 9.0, 15.0), strict=True)]
    assert coverage_threshold(weights, targets[:, 0]).tolist() == expected
    assert coverage_threshold(weights.contiguous(), targets[:, 0].contiguous()).tolist() == expected


def test_small_entries_are_not_lost_beside_a_large_one():
    weights = torch.full((1, 6001), 2.0**-26)
    weights[0, 17] = 1.0  # in float32, 1 + 2**-26 is 1
    target = torch.tensor([1.0 + 2.0**-14])  # 4096 of the 6000
    assert coverage_threshold(weights, target).tolist() == [2.0**-26]
    weights[0, 100:2100] = 0.0  # and now no more than 4000
    assert coverage_threshold(weights, target).tolist() == [0.0]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9000), st.floats(0.01, 1.0), st.floats(0.0, 8.0), st.integers(0, 99))
def test_softmax_weights_hold_their_share_and_no_larger_threshold_does(
    num_columns: int, alpha: float, sharpness: float, seed: int
):
    with torch.device(DEVICE):
        weights = (sharpness * random_numbers((2, num_columns), seed=seed)).softmax(dim=1)
        targets = alpha * weights.sum(dim=1)
        found = coverage_threshold(weights, targets)[:, None]
        held = weights.double().masked_fill(weights < found, 0.0).sum(dim=1)
        less = weights.double().masked_fill(weights <= found, 0.0).sum(dim=1)
    assert ((held >= targets * (1 - 1e-12)) | (found[:, 0] == 0.0)).all()  # 1e-12: the order of float64 sums
    assert (less < targets * (1 + 1e-12)).all()
    assert (found[:, 0] == 0.0).logical_or((weights == found).any(dim=1)).all()
