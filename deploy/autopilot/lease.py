"""Whose word about the budget, and about when turns go compact, counts at one replica, and until when. Pure; knows neither engine nor
autopilot.

An autopilot renews its order every round. Of two by mistake, the one with the smaller id is heard; the other is told who is. An
order that is not renewed loses its holder, never its ceiling: a vanished autopilot says nothing about the load that it answered, and to
lift every ceiling at once would be the largest jump in pressure there is. Whoever comes next takes the ceiling over. When turns go
compact is the engine's own choice again: that changes the turns that come, not those that run, and a full pool makes turns compact in any
case.
"""

import math
from collections.abc import Callable

from deploy.calls import BudgetOrder, BudgetReply

LEASE_MAX_S = 600.0  # an order that would bind for longer binds for this


class BudgetLease:
    """What was ordered last, and by whom. Event loop only."""

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._holder = ""
        self._ends_at = -math.inf
        self._ceiling_tokens: int | None = None
        self._compact_above_ratio: float | None = None

    @property
    def ceiling_tokens(self) -> int | None:
        """Ceiling ordered last, its lease over or not; None: none."""
        return self._ceiling_tokens

    @property
    def compact_above_ratio(self) -> float | None:
        """Ordered while a lease runs; None: as the engine has it."""
        return self._compact_above_ratio if self.holder else None

    @property
    def holder(self) -> str:
        """Autopilot whose lease runs; empty: whoever comes next is heard."""
        return self._holder if self.left_s > 0.0 else ""

    @property
    def left_s(self) -> float:
        """Until the lease ends; 0: none runs."""
        return max(0.0, self._ends_at - self._clock())

    def take(self, order: BudgetOrder) -> BudgetReply:
        """Obey an order, or name the autopilot that is heard instead. An order without sense is not obeyed and changes nothing."""
        holder = self.holder
        if not _makes_sense(order) or (holder and holder < order.autopilot):
            return BudgetReply(False, self._ceiling_tokens, holder, self.compact_above_ratio)
        self._holder = order.autopilot
        self._ends_at = self._clock() + min(order.lease_s, LEASE_MAX_S)
        self._ceiling_tokens = order.ceiling_tokens
        self._compact_above_ratio = order.compact_above_ratio
        return BudgetReply(True, self._ceiling_tokens, order.autopilot, self._compact_above_ratio)


def _makes_sense(order: BudgetOrder) -> bool:
    is_ceiling = order.ceiling_tokens is None or order.ceiling_tokens >= 1
    is_share = order.compact_above_ratio is None or 0.0 <= order.compact_above_ratio <= 1.0  # not so for NaN
    return bool(order.autopilot) and is_ceiling and is_share and order.lease_s > 0.0
