"""Thresholds and bounds of the autopilot. All of them may change while it runs. Pure."""

from dataclasses import dataclass
from enum import StrEnum

from loopserve.errors import ConfigError


class PilotMode(StrEnum):
    """How far the autopilot goes."""

    OFF = "off"  # nothing is read
    DRY_RUN = "dry-run"  # decides and says so, changes nothing
    ON = "on"


IDLE_TO_ZERO_MIN_S = 10.0  # an ingress relies on it: who was answered so short a time ago finds a replica


@dataclass(frozen=True, slots=True)
class AutopilotSettings:
    """All of the autopilot. Ratios are of the capacity of the replicas that are ready.

    `target_ratio <= low_ratio < high_ratio`: where added replicas bring the load (at most target) the budget may come back (below
    low), and both are a gap away from where something is done again (above high).
    """

    mode: str = "off"
    interval_s: float = 1.0  # of a round
    min_replicas: int = 1  # 0: to zero when idle, woken by the first request
    max_replicas: int = 1

    high_ratio: float = 0.85  # of working sets: above, the budget tightens and replicas are added
    low_ratio: float = (
        0.70  # below, for relax_hold_s, the budget comes back by one rung; of all tokens: above, turns go compact
    )
    target_ratio: float = (
        0.65  # what a new budget or replica count is chosen for; of all tokens: below, turns are resident again
    )
    queue_high_ratio: float = 0.25  # waiting turns over places in the batch
    queue_low_ratio: float = 0.05

    budget_floor_tokens: int | None = None  # None: the engine's; a lower one counts for nothing
    tighten_cooldown_s: float = 5.0
    relax_hold_s: float = 30.0  # doubles, up to 16 times, while relaxing turns out to have been a mistake

    scale_up_step: int = 4
    scale_up_cooldown_s: float = 30.0
    scale_down_step: int = 1
    scale_down_hold_s: float = 300.0  # counted from when the budget is back in full
    scale_down_cooldown_s: float = 120.0  # after any change of the replica count
    warm_patience_s: float = 1800.0  # how long idle conversations without room elsewhere put off a removal
    idle_to_zero_s: float = 900.0  # nothing running, waiting or arriving

    prometheus_url: str = ""  # empty: the replicas are asked directly
    prometheus_matchers: str = (
        ""  # further PromQL matchers, where one Prometheus knows several installations: 'namespace="a"'
    )
    prometheus_prefix: str = ""  # "ray_" where Ray's own exporter is what is scraped
    prometheus_token_file: str = ""  # bearer token, read anew for every query
    prometheus_token_env: str = ""  # name of a variable that holds it
    source_timeout_s: float = 2.0
    snapshot_age_max_s: float = 15.0  # older data are not acted on; three scrapes, at 5 s
    clock_skew_max_s: float = 5.0  # samples further in the future mean that a clock is wrong

    dashboard_url: str = ""  # Serve's REST; empty: RAY_DASHBOARD_ADDRESS, else Serve's controller is called
    dashboard_token_env: str = "RAY_AUTH_TOKEN"  # name of the variable with its bearer token, where it wants one
    act_timeout_s: float = 5.0  # of one call to Serve
    lease_intervals: float = 4.0  # an order binds a replica for so many rounds

    history_max: int = 64  # decisions that GET /v1/autopilot shows
    log_period_s: float = 300.0  # a line even where nothing changes

    def __post_init__(self) -> None:
        _check(self.mode in set(PilotMode), f"mode is {self.mode!r}; there are {', '.join(PilotMode)}")
        _check(0 <= self.min_replicas <= self.max_replicas, "0 <= min_replicas <= max_replicas is needed")
        _check(self.max_replicas >= 1, f"max_replicas is {self.max_replicas}; at least 1 is needed")
        _check(
            0.0 < self.target_ratio <= self.low_ratio < self.high_ratio <= 1.0,
            f"0 < target_ratio <= low_ratio < high_ratio <= 1 is needed, not {self.target_ratio}, {self.low_ratio}, {self.high_ratio}",
        )
        _check(
            0.0 <= self.queue_low_ratio < self.queue_high_ratio,
            f"0 <= queue_low_ratio < queue_high_ratio is needed, not {self.queue_low_ratio}, {self.queue_high_ratio}",
        )
        for name in ("interval_s", "source_timeout_s", "act_timeout_s", "snapshot_age_max_s", "log_period_s"):
            _check(0.01 <= getattr(self, name) <= 3600.0, f"{name} is {getattr(self, name)}; 0.01 to 3600 is allowed")
        for name in (
            *(
                "tighten_cooldown_s",
                "relax_hold_s",
                "scale_up_cooldown_s",
                "scale_down_hold_s",
                "scale_down_cooldown_s",
            ),
            *("warm_patience_s", "clock_skew_max_s"),
        ):
            _check(0.0 <= getattr(self, name) < float("inf"), f"{name} is {getattr(self, name)}; 0 or more is needed")
        _check(
            self.idle_to_zero_s >= IDLE_TO_ZERO_MIN_S,
            f"idle_to_zero_s is {self.idle_to_zero_s}; at least {IDLE_TO_ZERO_MIN_S:g} is needed",
        )
        for name in ("prometheus_url", "dashboard_url"):
            text = getattr(self, name)
            _check(
                not text or text.startswith(("http://", "https://")),
                f"{name} is {text!r}; http:// or https:// is needed",
            )
        for name in ("scale_up_step", "scale_down_step", "history_max"):
            _check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; at least 1 is needed")
        _check(
            self.budget_floor_tokens is None or self.budget_floor_tokens >= 1, "budget_floor_tokens must be at least 1"
        )
        _check(2.0 <= self.lease_intervals <= 60.0, f"lease_intervals is {self.lease_intervals}; 2 to 60 is allowed")
        _check(self.history_max <= 4096, f"history_max is {self.history_max}; at most 4096 are kept")

    @property
    def lease_s(self) -> float:
        """How long an order binds: long enough for the slowest round."""
        return self.lease_intervals * (self.interval_s + 2 * self.source_timeout_s)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(f"autopilot: {message}")
