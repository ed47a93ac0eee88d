"""What the service promises, and how fast a promise may be used up. Read by the dashboards and the alert rules, so both mean the same."""

from dataclasses import dataclass

from monitoring.catalogue import REQUEST_ERRORS, REQUEST_TTFB, REQUESTS
from monitoring.promql import Scope, or_zero, ratio

COMPLETION_ROUTES = "/v1/(chat/)?completions"
SERVER_FAULTS = ("config_error", "engine_unavailable", "internal_error", "replica_lost", "timeout", "unsupported_model")
FIRST_BYTE_S = 2.5  # one of the histogram's buckets


@dataclass(frozen=True, slots=True)
class BurnWindow:
    """Two windows that must both burn too fast: the long one shows that it matters, the short one that it still goes on."""

    factor: float  # of the even use of a 30 days' budget
    long: str
    short: str


FAST_BURN = BurnWindow(14.4, "1h", "5m")  # 2 % of a month's budget in an hour
SLOW_BURN = BurnWindow(6.0, "6h", "30m")  # 5 % of it in six hours


@dataclass(frozen=True, slots=True)
class Objective:
    """A share of requests that must be good."""

    name: str
    target_ratio: float

    @property
    def budget_ratio(self) -> float:
        """The share that may be bad."""
        return round(1.0 - self.target_ratio, 6)

    def bad_ratio(self, scope: Scope) -> str:
        """PromQL: the share that was bad; absent or NaN where nothing was asked."""
        if self is FIRST_BYTE:
            return f"1 - {scope.share_within(REQUEST_TTFB, FIRST_BYTE_S)}"
        return ratio(or_zero(scope.rate(REQUEST_ERRORS, code="|".join(SERVER_FAULTS))), completions(scope))

    def burn(self, scope: Scope) -> str:
        """PromQL: how many times faster than evenly the budget is used up."""
        return f"({self.bad_ratio(scope)}) / {self.budget_ratio:g}"


FIRST_BYTE = Objective("first byte", 0.95)
SUCCESS = Objective("success", 0.995)


def completions(scope: Scope) -> str:
    """PromQL: answered completion requests a second."""
    return scope.rate(REQUESTS, route=COMPLETION_ROUTES)
