"""What may be set, from where, and what is refused with its reason."""

from dataclasses import replace

import pytest

from deploy.app import build_app, has_autopilot, most_replicas
from deploy.autopilot.settings import AutopilotSettings
from deploy.settings import DeploySettings
from loopserve.config import EngineConfig
from loopserve.errors import ConfigError


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mode": "auto"}, "mode"),
        ({"min_replicas": 2, "max_replicas": 1}, "min_replicas <= max_replicas"),
        ({"min_replicas": 0, "max_replicas": 0}, "max_replicas"),
        ({"target_ratio": 0.8}, "target_ratio <= low_ratio"),
        ({"high_ratio": 1.2}, "high_ratio"),
        ({"low_ratio": float("nan")}, "low_ratio"),
        ({"queue_low_ratio": 0.3}, "queue_low_ratio"),
        ({"interval_s": 0.0}, "interval_s"),
        ({"source_timeout_s": float("inf")}, "source_timeout_s"),
        ({"relax_hold_s": -1.0}, "relax_hold_s"),
        ({"warm_patience_s": float("nan")}, "warm_patience_s"),
        ({"idle_to_zero_s": 1.0}, "idle_to_zero_s"),
        ({"scale_up_step": 0}, "scale_up_step"),
        ({"budget_floor_tokens": 0}, "budget_floor_tokens"),
        ({"lease_intervals": 1.0}, "lease_intervals"),
        ({"history_max": 10**9}, "history_max"),
        ({"prometheus_url": "prometheus:9090"}, "prometheus_url"),
        ({"dashboard_url": "ftp://head"}, "dashboard_url"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(changes: dict[str, object], named: str):
    with pytest.raises(ConfigError, match=named):
        AutopilotSettings(**changes)  # type: ignore[arg-type]


def test_the_environment_sets_the_autopilot():
    environ = {"LOOPSERVE_AUTOPILOT__MODE": "dry-run", "LOOPSERVE_AUTOPILOT__MAX_REPLICAS": "4", "REPLICAS": "2"}
    settings = DeploySettings.from_env(environ)
    assert (settings.autopilot.mode, settings.autopilot.max_replicas) == ("dry-run", 4)
    assert has_autopilot(settings) and most_replicas(settings) == 4


def test_an_order_outlives_several_of_the_slowest_rounds():
    settings = AutopilotSettings()
    assert settings.lease_s >= 3 * (settings.interval_s + 2 * settings.source_timeout_s)


def test_a_fleet_that_the_autopilot_would_cut_at_once_is_not_deployed():
    settings = DeploySettings(replicas=3, autopilot=AutopilotSettings(mode="on", max_replicas=2))
    with pytest.raises(ConfigError, match=r"replicas is 3.*1 to 2"):
        build_app(settings, engine_config=EngineConfig())
    build_app(replace(settings, autopilot=AutopilotSettings(mode="dry-run")), engine_config=EngineConfig())


def test_zero_replicas_need_an_ingress_that_stays():
    pilot = AutopilotSettings(mode="on", min_replicas=0)
    settings = DeploySettings(topology="direct", local_direct=True, autopilot=pilot)
    with pytest.raises(ConfigError, match="'direct' cannot go to zero"):
        build_app(settings, engine_config=EngineConfig())
