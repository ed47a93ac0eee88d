"""The autopilot on a real Ray: real replicas obey, Serve's external scaler scales, and its controller is killed in the middle."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_backend import MODEL
from pressed_backend import PressedFactory
from test_serve import LIMIT_S, body, wait_for
from topology import TOPOLOGY

from deploy.autopilot.settings import AutopilotSettings
from deploy.settings import DeploySettings

pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(TOPOLOGY == "direct", reason="scaling is the same, and zero replicas are not possible there"),
]

APP = "piloted"
QUICK = AutopilotSettings(
    mode="on",
    interval_s=0.2,
    max_replicas=2,
    tighten_cooldown_s=0.3,
    relax_hold_s=1.0,
    scale_up_cooldown_s=0.5,
    scale_down_hold_s=1.5,
    scale_down_cooldown_s=0.5,
    source_timeout_s=1.0,
    act_timeout_s=2.0,
    idle_to_zero_s=10.0,
    lease_intervals=3.0,
)


@dataclass
class Piloted:
    """One application under an autopilot, and the load of its replicas."""

    http: httpx.Client
    file: Path

    def press(self, live: float, *, running: int = 2, waiting: int = 0) -> None:
        fresh = self.file.with_suffix(".new")
        fresh.write_text(json.dumps({"live": live, "running": running, "waiting": waiting}))
        fresh.replace(self.file)

    def overview(self) -> dict[str, Any]:
        response = self.http.get("/v1/autopilot")
        return response.json() if response.status_code == 200 else {}

    def engines(self) -> tuple[int, int]:
        """Serve's target and the replicas that run."""
        import ray

        controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        details = ray.get(controller.get_serve_instance_details.remote(), timeout=LIMIT_S)
        told = details["applications"][APP]["deployments"]["EngineReplica"]
        return told["target_num_replicas"], sum(one["state"] == "RUNNING" for one in told["replicas"])

    def ceilings(self) -> list[int | None]:
        """What every replica is under."""
        from ray import serve

        handle = serve.get_deployment_handle("EngineReplica", app_name=APP)
        replies = handle.broadcast("signals").results(timeout_s=LIMIT_S)
        return [signals.budget_ceiling_tokens for _, signals in replies]

    def compact_above(self) -> list[float]:
        """From which share of its pool on every replica admits turns as compact."""
        from ray import serve

        handle = serve.get_deployment_handle("EngineReplica", app_name=APP)
        replies = handle.broadcast("signals").results(timeout_s=LIMIT_S)
        return [signals.compact_above_ratio for _, signals in replies]

    def configure(self, settings: AutopilotSettings) -> None:
        """As a change of `user_config` does."""
        from ray import serve

        handle = serve.get_deployment_handle("Autopilot", app_name=APP)
        handle.reconfigure.remote(asdict(settings)).result(timeout_s=LIMIT_S)

    def becomes(self, condition: Callable[[], Any]) -> Any:
        """Wait, and show what the autopilot says of itself where it never comes."""
        try:
            return wait_for(condition)
        except AssertionError as error:
            raise AssertionError(json.dumps(self.overview(), indent=1)) from error


@pytest.fixture(scope="module")
def piloted(cluster: DeploySettings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Piloted]:
    from ray import serve

    from deploy.app import build_app
    from loopserve.config import EngineConfig

    file = tmp_path_factory.mktemp("load") / "load.json"
    with httpx.Client(base_url=f"http://127.0.0.1:{cluster.port}/{APP}", timeout=LIMIT_S, trust_env=False) as http:
        piloted = Piloted(http, file)
        piloted.press(0.3)
        settings = replace(cluster, replicas=1, ingress_replicas=1, autopilot=QUICK, admission_timeout_s=LIMIT_S)
        app = build_app(settings, engine_config=EngineConfig(), factory=PressedFactory(str(file)))
        serve.run_many([serve.RunTarget(app, name=APP, route_prefix=f"/{APP}", external_scaler_enabled=True)])
        yield piloted
        serve.delete(APP)


def test_the_autopilot_tells_of_itself_and_its_metrics_are_on_the_one_page(piloted: Piloted):
    told = piloted.becomes(lambda: (seen := piloted.overview()).get("last") and seen)
    wanted = {"budget_ceiling_tokens": None, "compact_above_ratio": None, "replicas": 1}
    assert told["mode"] == "on" and told["wanted"] == wanted
    assert told["snapshot"]["pressures"]["pool_ratio"] == pytest.approx(0.3)
    text = piloted.http.get("/metrics").text
    assert f'loopserve_autopilot_mode{{autopilot="{told["id"]}",mode="on"}} 1.0' in text
    assert "loopserve_autopilot_pressure_ratio" in text


def test_pressure_tightens_adds_survives_a_dead_controller_and_goes_back(piloted: Piloted):
    import ray

    piloted.press(0.95)
    piloted.becomes(lambda: piloted.compact_above() == [0.0])
    piloted.becomes(lambda: piloted.ceilings() == [8])
    piloted.becomes(lambda: piloted.engines() == (2, 2))
    piloted.becomes(lambda: piloted.ceilings() == [8, 8] and piloted.compact_above() == [0.0, 0.0])

    ray.kill(ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve"), no_restart=False)
    piloted.becomes(lambda: piloted.engines() == (2, 2))
    before = piloted.overview()["last"]["unix_time"]
    piloted.becomes(lambda: (piloted.overview().get("last") or {"unix_time": 0})["unix_time"] > before + 1.0)
    assert piloted.ceilings() == [8, 8] and piloted.engines() == (2, 2)
    actions = [done["actions"] for done in piloted.overview()["decisions"]]
    assert not any("remove" in done or "relax" in done for done in actions), actions

    piloted.press(0.1, running=1)
    piloted.becomes(lambda: piloted.ceilings() == [None, None])
    piloted.becomes(lambda: piloted.compact_above() == [1.0] * len(piloted.ceilings()))
    piloted.becomes(lambda: piloted.engines() == (1, 1))
    told = [action for done in reversed(piloted.overview()["decisions"]) for action in done["actions"]]
    moves = [action for action in told if action in ("tighten", "relax", "add", "remove")]
    assert moves[0] == "tighten" and moves[-1] == "remove" and moves.index("relax") > moves.index("add"), moves


def test_settings_change_in_place_and_wrong_ones_leave_the_old_in_force(piloted: Piloted):
    piloted.configure(replace(QUICK, log_period_s=7.0))
    name = piloted.becomes(lambda: piloted.overview()["settings"]["log_period_s"] == 7.0 and piloted.overview()["id"])
    from ray import serve

    handle = serve.get_deployment_handle("Autopilot", app_name=APP)
    handle.reconfigure.remote({"mode": "on", "max_replicas": -1}).result(timeout_s=LIMIT_S)
    told = piloted.overview()
    assert "max_replicas" in told["settings_error"] and told["settings"]["log_period_s"] == 7.0
    assert told["id"] == name


def test_an_idle_fleet_goes_to_zero_and_a_request_wakes_it_and_is_answered(piloted: Piloted):
    piloted.press(0.0, running=0)
    piloted.configure(replace(QUICK, min_replicas=0))
    piloted.becomes(lambda: piloted.engines() == (0, 0))
    ready = piloted.http.get("/ready")
    assert ready.status_code == 200 and ready.json()["status"] == "asleep"
    answer = piloted.http.post("/v1/chat/completions", json=body("tokens=2"))
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == "word word"
    assert answer.json()["model"] == MODEL and piloted.engines() == (1, 1)
