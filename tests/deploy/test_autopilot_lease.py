"""Whose order a replica obeys."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.autopilot.lease import LEASE_MAX_S, BudgetLease
from deploy.calls import BudgetOrder


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lease(clock: Clock) -> BudgetLease:
    return BudgetLease(clock=clock)


def test_the_first_order_is_obeyed(lease: BudgetLease):
    reply = lease.take(BudgetOrder("b", 256, 4.0))
    assert (reply.obeyed, reply.ceiling_tokens, reply.holder) == (True, 256, "b")


def test_the_greater_id_is_refused_and_told_who_is_heard(lease: BudgetLease):
    lease.take(BudgetOrder("a", 256, 4.0))
    reply = lease.take(BudgetOrder("b", 64, 4.0))
    assert (reply.obeyed, reply.ceiling_tokens, reply.holder) == (False, 256, "a")


def test_the_smaller_id_is_heard_at_once(lease: BudgetLease):
    lease.take(BudgetOrder("b", 256, 4.0))
    assert lease.take(BudgetOrder("a", None, 4.0)).obeyed
    assert lease.ceiling_tokens is None
    assert not lease.take(BudgetOrder("b", 256, 4.0)).obeyed


def test_a_lease_that_is_not_renewed_ends_and_its_ceiling_stays(lease: BudgetLease, clock: Clock):
    lease.take(BudgetOrder("a", 256, 4.0))
    clock.now_s += 4.0
    assert (lease.holder, lease.ceiling_tokens) == ("", 256)
    assert lease.take(BudgetOrder("z", 512, 4.0)).obeyed


def test_when_turns_go_compact_is_ordered_for_as_long_as_the_lease_runs(lease: BudgetLease, clock: Clock):
    reply = lease.take(BudgetOrder("a", 256, 4.0, 0.0))
    assert (reply.compact_above_ratio, lease.compact_above_ratio, lease.left_s) == (0.0, 0.0, 4.0)
    refused = lease.take(BudgetOrder("b", 64, 4.0, 0.5))
    assert (refused.obeyed, refused.compact_above_ratio) == (False, 0.0)
    clock.now_s += 4.0
    assert (lease.compact_above_ratio, lease.left_s, lease.ceiling_tokens) == (None, 0.0, 256)
    lease.take(BudgetOrder("a", 256, 4.0, 0.0))
    lease.take(BudgetOrder("a", 256, 4.0))
    assert lease.compact_above_ratio is None


def test_renewing_keeps_the_other_out(lease: BudgetLease, clock: Clock):
    for _ in range(10):
        assert lease.take(BudgetOrder("a", 256, 4.0)).obeyed
        clock.now_s += 3.0
        assert not lease.take(BudgetOrder("b", 64, 4.0)).obeyed


@pytest.mark.parametrize(
    "order",
    [
        BudgetOrder("", 64, 4.0),
        BudgetOrder("a", 0, 4.0),
        BudgetOrder("a", -5, 4.0),
        BudgetOrder("a", 64, 0.0),
        BudgetOrder("a", 64, math.nan),
        BudgetOrder("a", 64, 4.0, -0.1),
        BudgetOrder("a", 64, 4.0, 1.5),
        BudgetOrder("a", 64, 4.0, math.nan),
    ],
)
def test_an_order_without_sense_changes_nothing(lease: BudgetLease, order: BudgetOrder):
    lease.take(BudgetOrder("b", 256, 4.0))
    assert not lease.take(order).obeyed
    assert (lease.holder, lease.ceiling_tokens) == ("b", 256)


def test_no_lease_is_endless(lease: BudgetLease, clock: Clock):
    lease.take(BudgetOrder("a", 256, math.inf))
    clock.now_s += LEASE_MAX_S
    assert lease.take(BudgetOrder("b", 64, 4.0)).obeyed


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 512), st.floats(0.1, 9.0), st.floats(0.0, 5.0))))
def test_an_order_is_obeyed_unless_a_smaller_id_holds_a_running_lease(orders):
    clock = Clock()
    lease = BudgetLease(clock=clock)
    ends_at: dict[str, float] = {}
    heard = ""
    for name, tokens, lease_s, pause_s in orders:
        clock.now_s += pause_s
        is_held = heard != "" and clock.now_s < ends_at[heard]
        reply = lease.take(BudgetOrder(name, tokens, lease_s))
        assert reply.obeyed == (not is_held or name <= heard)
        if reply.obeyed:
            heard, ends_at[name] = name, clock.now_s + lease_s
            assert lease.ceiling_tokens == tokens
