"""Thresholds and bounds of the autopilot. All of them may change while it runs. Pure."""

from dataclasses import dataclass
from enum import StrEnum


class PilotMode(StrEnum):
    """How far the autopilot goes."""

    OFF = "off"  # nothing is read
    DRY_RUN = "dry-run"  # decides and says so, changes nothing
    ON = "on"


@dataclass(frozen=True, slots=True)
class AutopilotSettings:
    """All of the autopilot."""

    mode: str = "off"
    prometheus_url: str = ""  # empty: the replicas are asked directly
    interval_s: float = 1.0
    min_replicas: int = 1
    max_replicas: int = 1
