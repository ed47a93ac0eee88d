"""Whose word about the budget counts at one replica, and until when. Pure; knows neither engine nor autopilot.

An autopilot renews its order every round. Of two by mistake, the one with the smaller id is heard; the other is told who is. An
order that is not renewed loses its holder, never its ceiling: a vanished autopilot says nothing about the load that it answered, and to
lift every ceiling at once would be the largest jump in pressure there is. Whoever comes next takes the ceiling over.
"""

import math
from collections.abc import Callable

from deploy.calls import BudgetOrder, BudgetReply

LEASE_MAX_S = 600.0  # an order that would bind for longer binds for this


class BudgetLease:
    """The ceiling that was ordered last, and by whom. Event loop only."""

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._holder = ""
        self._ends_at = -math.inf
        self._ceiling_tokens: int | None = None

    @property
    def ceiling_tokens(self) -> int | None:
        """Ceiling ordered last, its lease over or not; None: none."""
        return self._ceiling_tokens

    @property
    def holder(self) -> str:
        """Autopilot whose lease runs; empty: whoever comes next is heard."""
        return self._holder if self._clock() < self._ends_at else ""

    def take(self, order: BudgetOrder) -> BudgetReply:
        """Obey an order, or name the autopilot that is heard instead. An order without sense is not obeyed and changes nothing."""
        holder = self.holder
        if not _makes_sense(order) or (holder and holder < order.autopilot):
            return BudgetReply(False, self._ceiling_tokens, holder)
        self._holder = order.autopilot
        self._ends_at = self._clock() + min(order.lease_s, LEASE_MAX_S)
        self._ceiling_tokens = order.ceiling_tokens
        return BudgetReply(True, self._ceiling_tokens, order.autopilot)


def _makes_sense(order: BudgetOrder) -> bool:
    is_ceiling = order.ceiling_tokens is None or order.ceiling_tokens >= 1
    return bool(order.autopilot) and is_ceiling and order.lease_s > 0.0  # not so for NaN
