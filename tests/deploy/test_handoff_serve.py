"""The hand-off on a real Ray: three replicas of a fake engine, one is taken away, and its conversations go on where they moved to."""

from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from test_serve import CHAT, LIMIT_S, body, wait_for
from topology import TOPOLOGY

from deploy.settings import DeploySettings

pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(TOPOLOGY == "direct", reason="replicas end in the same way, and speak by the same handles"),
]

APP = "handing-over"


@pytest.fixture
def http(cluster: DeploySettings) -> Iterator[httpx.Client]:
    from ray import serve

    from deploy.app import build_app
    from loopserve.config import EngineConfig

    settings = replace(cluster, stop_timeout_s=20.0)
    app = build_app(settings, engine_config=EngineConfig(), factory="fake_backend:fake_backend")
    serve.run_many([serve.RunTarget(app, name=APP, route_prefix=f"/{APP}", external_scaler_enabled=True)])
    with httpx.Client(base_url=f"http://127.0.0.1:{cluster.port}/{APP}", timeout=LIMIT_S, trust_env=False) as client:
        yield client
    serve.delete(APP, _blocking=False)


def scale_to(num_replicas: int) -> None:
    """As the external scaler does."""
    import ray
    from ray.serve._private.common import DeploymentID

    controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    target = DeploymentID(name="EngineReplica", app_name=APP)
    ray.get(controller.update_deployment_replicas.remote(target, num_replicas), timeout=LIMIT_S)


def ready(http: httpx.Client) -> set[str]:
    return set(http.get("/ready").json().get("replicas", ()))


def moved(http: httpx.Client) -> dict[str, float]:
    """Hand-offs by result, of all replicas that are there."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            if sample.name == "loopserve_handoffs_total" and sample.value:
                result = sample.labels["result"]
                found[result] = found.get(result, 0.0) + sample.value
    return found


def test_conversations_of_a_replica_that_is_taken_away_go_on_where_they_moved_to(http: httpx.Client):
    before = wait_for(lambda: len(found := ready(http)) == 3 and found)
    held: dict[str, list[tuple[dict[str, str], list[str]]]] = {}
    for number in range(200):  # replicas' names are random, and with them the places of dialogues
        headers = {"x-session-id": f"moving-{number}"} if number % 2 else {}
        texts = [f"moving dialogue {number}"]
        for turn in range(2):
            answer = http.post(CHAT, json=body(*texts), headers=headers)
            texts += [answer.json()["choices"][0]["message"]["content"], f"turn {turn}"]
        held.setdefault(answer.headers["x-loopserve-replica"], []).append((headers, texts))
        if len(held) == 3 and min(map(len, held.values())) >= 3:
            break
    assert set(held) == before
    scale_to(2)
    after = wait_for(lambda: len(found := ready(http)) == 2 and found)
    (victim,) = before - after
    counts = wait_for(lambda: moved(http))
    wait_for(lambda: sum(moved(http).values()) == len(held[victim]))
    assert set(counts) == {"moved"}
    for headers, texts in held[victim]:
        answer = http.post(CHAT, json=body(*texts), headers=headers)
        assert answer.headers["x-loopserve-replica"] in after
        words = sum(len(text.split()) for text in texts)
        assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == words - 2
