"""The rendered serveConfigV2 on a real Ray, sent as KubeRay's operator sends it: a PUT to the head's dashboard, with the token.

What is shown: it deploys, a chat works, and neither the same configuration again nor one with other tunables costs a conversation its KV.
"""

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from rendering import ROOT, changed, objects_of, only, script, serve_config

pytestmark = pytest.mark.serve

APPLICATIONS = "/api/serve/applications/"
SCALE = "/api/v1/applications/loopserve/deployments/EngineReplica/scale"
START_LIMIT_S = 480.0  # loads a model three times; generous, because the machine may be busy
LIMIT_S = 60.0
VARIABLE = "K8S_TESTS_TOPOLOGY"
TOPOLOGY = os.environ.get(VARIABLE, "two_hop")
FRONT = "SessionRouter" if TOPOLOGY == "direct" else "Ingress"
DEPLOYMENTS = ("EngineReplica", FRONT, "Autopilot")
DEMO: dict[str, Any] = changed(
    changed(script.read_values("cpu-demo"), "tunables.replicas", 1), "serving.topology", TOPOLOGY
)


@dataclass
class Head:
    """A running Ray with its dashboard, and the way to what it serves."""

    rest: httpx.Client
    http: httpx.Client
    port: int
    history: list[dict[str, Any]] = field(default_factory=list)

    def put(self, values: dict[str, Any], **engine_options: Any) -> None:
        """As the operator does; only the address differs, so that nothing outside of this machine reaches it."""
        config = serve_config(objects_of(values))
        config["http_options"] |= {"host": "127.0.0.1", "port": self.port}
        config["applications"][0]["deployments"][0].update(engine_options)
        self.rest.put(APPLICATIONS, json=config).raise_for_status()

    def application(self) -> dict[str, Any]:
        answer = self.rest.get(APPLICATIONS).raise_for_status().json()
        found: dict[str, Any] = answer["applications"].get("loopserve", {})
        assert found.get("status") != "DEPLOY_FAILED", found.get("message")
        return found

    def replicas(self, deployment: str) -> dict[str, str]:
        """Actor id by replica id, of the replicas that run."""
        entries = self.application().get("deployments", {}).get(deployment, {}).get("replicas", [])
        return {entry["replica_id"]: entry["actor_id"] for entry in entries if entry["state"] == "RUNNING"}

    def option(self, deployment: str, name: str) -> Any:
        return self.application()["deployments"][deployment]["deployment_config"][name]

    def settled(self) -> bool:
        return self.application().get("status") == "RUNNING"

    def is_ready(self) -> bool:
        try:
            return self.http.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    def say(self, text: str) -> tuple[dict[str, Any], str]:
        """One more turn of one conversation: its usage, and the replica that answered."""
        self.history.append({"role": "user", "content": text})
        answer = self.http.post(
            "/v1/chat/completions",
            json={"model": self.model(), "messages": self.history, "max_tokens": 24, "seed": 1},
            headers={"x-session-id": "kept"},
        )
        assert answer.status_code == 200, answer.text
        self.history.append({"role": "assistant", "content": answer.json()["choices"][0]["message"]["content"]})
        return answer.json()["usage"], answer.headers["x-loopserve-replica"]

    def model(self) -> str:
        return str(self.http.get("/v1/models").json()["data"][0]["id"])

    def sessions(self) -> list[str]:
        return [entry["id"] for entry in self.http.get("/v1/sessions").json()["data"]]


def wait_for(condition: Callable[[], Any], limit_s: float = LIMIT_S) -> Any:
    """The first true value of `condition`, asked until it comes."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.25)
    raise AssertionError("it never came true")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def haproxy_files() -> Iterator[dict[str, str]]:
    """Where HAProxy of topology direct keeps its files, apart from others on this machine; nothing in two_hop."""
    from benchmarks.cluster.own_network import direct_environment

    with tempfile.TemporaryDirectory(prefix="hap-", dir="/tmp") as folder:  # sockets allow 107 characters
        found = direct_environment(Path(folder)) if TOPOLOGY == "direct" else {}
        yield {name: text for name, text in found.items() if "HAPROXY" in name}


@pytest.fixture(scope="module")
def head(haproxy_files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    cluster = only(objects_of(DEMO), "RayService")["spec"]["rayClusterConfig"]
    container = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    token = secrets.token_hex(32)
    inherited = {name: text for name, text in os.environ.items() if not name.startswith(("RAY_", "LOOPSERVE_"))}
    env = {
        **inherited,
        **{entry["name"]: entry["value"] for entry in container["env"]},
        **haproxy_files,
        "RAY_AUTH_MODE": cluster["authOptions"]["mode"],
        "RAY_AUTH_TOKEN": token,
        "RAY_raylet_start_wait_time_s": "180",  # the machine may be busy
    }
    log = tmp_path_factory.mktemp("ray") / "stderr"
    program = Path(__file__).with_name("served_with_dashboard.py")
    process = subprocess.Popen(
        [sys.executable, str(program), str(free_port())],
        env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        assert address, f"Ray did not start: {log.read_text()[-2000:]}"
        port = free_port()
        bearer = {"authorization": f"Bearer {token}"}
        with (
            httpx.Client(base_url=f"http://{address}", headers=bearer, timeout=LIMIT_S, trust_env=False) as rest,
            httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=LIMIT_S, trust_env=False) as http,
        ):
            found = Head(rest, http, port)
            found.put(DEMO)
            wait_for(lambda: found.settled() and found.is_ready(), START_LIMIT_S)
            yield found
    finally:
        process.stdin.close()
        try:
            process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()


def test_the_head_wants_its_token(head: Head):
    answer = httpx.get(f"{head.rest.base_url}{APPLICATIONS}", timeout=LIMIT_S, trust_env=False)
    assert answer.status_code in (401, 403)


def test_a_chat_works_and_the_conversation_is_listed(head: Head):
    usage, _ = head.say("Remember: the code of the red box is 7351. Say yes.")
    assert usage["completion_tokens"] > 0 and usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert head.sessions() == ["kept"]


def test_neither_the_same_configuration_nor_other_tunables_cost_a_conversation_its_kv(head: Head):
    before_usage, home = head.say("And the blue box has 9922.")
    scaled = head.rest.post(SCALE, json={"target_num_replicas": 2})
    assert scaled.status_code == 200, scaled.text
    wait_for(lambda: len(head.replicas("EngineReplica")) == 2 and head.settled(), START_LIMIT_S)
    before = {name: head.replicas(name) for name in DEPLOYMENTS}
    assert home in before["EngineReplica"] and all(before.values())

    head.put(DEMO)  # what a restarted operator does
    tuned = changed(changed(DEMO, "tunables.ongoingPerIngress", 5000), "tunables.autopilot.high_ratio", 0.9)
    head.put(tuned)
    wait_for(lambda: head.option(FRONT, "max_ongoing_requests") == 5000 and head.settled())
    wait_for(lambda: head.http.get("/v1/autopilot").json()["settings"]["high_ratio"] == 0.9)
    head.put(changed(tuned, "tunables.replicas", 2))
    wait_for(lambda: head.option("EngineReplica", "num_replicas") == 2 and head.settled())

    assert {name: head.replicas(name) for name in DEPLOYMENTS} == before
    assert head.sessions() == ["kept"]
    usage, replica = head.say("What is the code of the red box?")
    assert replica == home
    assert (
        usage["prompt_tokens_details"]["cached_tokens"] >= before_usage["total_tokens"] - 1
    )  # the last token is never computed


def test_any_other_option_of_a_deployment_sets_its_number_of_replicas_again(head: Head):
    """Serve's own behaviour, and why `tunables` has nothing of EngineReplica but that number."""
    head.rest.post(SCALE, json={"target_num_replicas": 2}).raise_for_status()
    wait_for(lambda: len(head.replicas("EngineReplica")) == 2 and head.settled(), START_LIMIT_S)
    head.put(DEMO, health_check_period_s=3)
    wait_for(lambda: len(head.replicas("EngineReplica")) == 1)


@pytest.mark.slow
@pytest.mark.skipif(TOPOLOGY == "direct", reason="is what runs inside")
def test_the_same_holds_in_topology_direct():
    """In a network of its own: HAProxy and the replicas listen on every interface."""
    from benchmarks.cluster.own_network import in_own_network, why_not

    if why_not():
        pytest.skip(str(why_not()))
    pytest_again = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "serve", str(Path(__file__))]
    done = subprocess.run(
        in_own_network(pytest_again),
        cwd=ROOT,
        env={**os.environ, VARIABLE: "direct"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "4 passed" in done.stdout
