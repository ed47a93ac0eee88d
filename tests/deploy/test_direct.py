"""Topology `direct`: in this process its parts; in a network of its own the whole of it, with HAProxy, on the cases of test_serve.py."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
import test_serve
from local_fleet import LocalFleet
from test_serve import CHAT, body, http, wait_for  # noqa: F401  # http is a fixture
from topology import TOPOLOGY, VARIABLE, needs_direct

from deploy.app import build_app
from deploy.direct import ROUTED_HEADERS, OwnFleet, placement_key
from deploy.ingress import build_api
from deploy.local import check_topology
from deploy.settings import DeploySettings
from loopserve.config import EngineConfig
from loopserve.errors import ConfigError
from router.affinity import Affinity, AffinityKey, AffinitySettings, ReplicaName, ReplicaView, load_from_stats

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RUN_LIMIT_S = 900.0
NAMES = ("a", "b", "c")


class DirectSite:
    """HAProxy, a session router and three replicas in this process: a request's body and `ROUTED_HEADERS` place it, nothing else."""

    def __init__(self) -> None:
        self.fleet = LocalFleet(DeploySettings(topology="direct"), names=NAMES)
        self._affinity = Affinity(AffinitySettings(), clock=lambda: 0.0)
        self._clients: dict[str, httpx.AsyncClient] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        for name in NAMES:
            own = OwnFleet(name, self.fleet.replicas[name], self.fleet)
            transport = httpx.ASGITransport(build_api(own, self.fleet.settings, routed_headers=ROUTED_HEADERS))
            client = httpx.AsyncClient(transport=transport, base_url="http://test")
            self._clients[name] = await self._stack.enter_async_context(client)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def place(self, key: AffinityKey) -> str:
        stats = {ReplicaName(name): replica.routing_stats() for name, replica in self.fleet.replicas.items()}
        self._affinity.publish({name: published["own"] for name, published in stats.items()})
        return self._affinity.rank(key, [ReplicaView(n, load_from_stats(stats[n])) for n in stats]).replicas[0]

    async def post(self, request: dict[str, Any], headers: dict[str, str], *, at: str = "") -> httpx.Response:
        content = json.dumps(request).encode()
        forwarded = {name: text for name, text in headers.items() if name in ROUTED_HEADERS}
        key = placement_key(content, forwarded, branches_max=16)
        assert key is not None
        return await self._clients[at or self.place(key)].post(CHAT, content=content, headers=headers)


@pytest.mark.anyio
@pytest.mark.parametrize("header", [{}, {"x-session-id": "named"}, {"x-session-affinity": "named"}])
@pytest.mark.parametrize("tenant", [{}, {"x-tenant-id": "acme", "x-user-id": "eve"}])
async def test_conversations_stay_although_the_router_sees_no_tenant(header: dict[str, str], tenant: dict[str, str]):
    homes = set()
    async with DirectSite() as site:
        for number in range(12):
            headers = {**tenant, **{name: f"{text}-{number}" for name, text in header.items()}}
            texts, answers = [f"dialogue {number}"], []
            for turn in range(4):
                answers.append(await site.post(body(*texts), headers))
                texts += [answers[-1].json()["choices"][0]["message"]["content"], f"turn {turn}"]
            assert len({answer.headers["x-loopserve-replica"] for answer in answers}) == 1
            assert len({answer.headers["x-session-id"] for answer in answers}) == 1
            cached = [answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
            assert cached[0] == 0 and all(cached[1:])
            homes.add(answers[0].headers["x-loopserve-replica"])
    assert len(homes) > 1


@pytest.mark.anyio
@pytest.mark.parametrize("tenant", [{}, {"x-tenant-id": "acme"}])
async def test_a_conversation_is_found_where_it_is_held_and_not_only_at_its_home(tenant: dict[str, str]):
    async with DirectSite() as site:
        for name in (None, "named"):
            headers = {**tenant, **({"x-session-id": name} if name else {})}
            key = placement_key(json.dumps(body("hello")).encode(), headers, branches_max=16)
            assert key is not None
            elsewhere = next(replica for replica in NAMES if replica != site.place(key))
            await site.post(body("hello"), headers, at=elsewhere)
            again = await site.post(body("hello", "word word word", "go on"), headers)
            assert again.headers["x-loopserve-replica"] == elsewhere
            assert again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


@pytest.mark.anyio
async def test_a_name_that_was_given_leads_back_when_the_client_sends_it():
    async with DirectSite() as site:
        for number in range(12):
            first = await site.post(body(f"dialogue {number}"), {"x-tenant-id": "acme"})
            named = {"x-tenant-id": "acme", "x-session-id": first.headers["x-session-id"]}
            second = await site.post(body("x", "y", "z"), named)
            assert second.headers["x-loopserve-replica"] == first.headers["x-loopserve-replica"]


@pytest.mark.anyio
async def test_two_tenants_may_use_one_name_and_share_nothing():
    async with DirectSite() as site:
        await site.post(body("my secret"), {"x-tenant-id": "t1", "x-session-id": "s"})
        theirs = await site.post(body("my secret"), {"x-tenant-id": "t2", "x-session-id": "s"})
        assert theirs.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    kept = [session_id for engine in site.fleet.engines.values() for session_id in engine.kept]
    assert len(kept) == 2


@pytest.mark.anyio
async def test_a_replica_whose_engine_died_hands_its_request_to_another_one():
    async with DirectSite() as site:
        site.fleet.engines["a"].stop()
        response = await site.post(body("hello"), {}, at="a")
        ((taken_by, key),) = site.fleet.calls
    assert (response.status_code, response.headers["x-loopserve-replica"]) == (200, taken_by)
    assert (key.avoid, taken_by != "a") == ("a", True)


@pytest.mark.parametrize("content", [b"", b"nonsense", b'{"messages": []}', b'{"prompt": 3}', b'{"model": "m"'])
def test_what_is_no_request_is_placed_anywhere(content: bytes):
    assert placement_key(content, {}, branches_max=16) is None


def test_both_endpoints_are_placed_by_their_body_alone():
    chat = placement_key(json.dumps(body("hello")).encode(), {}, branches_max=16)
    text = placement_key(b'{"model": "m", "prompt": "with \\"messages\\" in it"}', {}, branches_max=16)
    assert chat and text and chat.home != text.home


def test_direct_is_refused_on_one_machine_unless_it_is_allowed():
    with pytest.raises(ConfigError, match="cluster setting"):
        check_topology(DeploySettings(topology="direct"))
    check_topology(DeploySettings(topology="direct", local_direct=True))
    check_topology(DeploySettings())


def test_an_unknown_topology_is_refused_by_name():
    with pytest.raises(ConfigError, match="two_hop, direct"):
        DeploySettings(topology="ring")


@pytest.mark.skipif(
    os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1", reason="the environment is as it should be here"
)
def test_direct_says_what_it_needs_in_the_environment():
    with pytest.raises(ConfigError, match="RAY_SERVE_ENABLE_HA_PROXY=1"):
        build_app(DeploySettings(topology="direct"), engine_config=EngineConfig())


@needs_direct
@pytest.mark.serve
def test_inside_there_is_no_ingress_between_proxy_and_replicas(url: str):
    from ray import serve

    found = serve.status().applications["loopserve"].deployments
    assert set(found) - {"Autopilot"} == {"EngineReplica", "SessionRouter"}


@needs_direct
@pytest.mark.serve
def test_inside_the_autopilot_reads_the_replicas_and_its_page_and_metrics_are_served_by_them(http: httpx.Client):  # noqa: F811
    def whole() -> dict[str, Any] | None:
        told = http.get("/v1/autopilot").json()
        return told if len((told.get("snapshot") or {"replicas": ()})["replicas"]) == 3 else None

    told = wait_for(whole)  # a replica that another test has ended may still be on its way back
    assert told["mode"] == "dry-run"
    assert f'loopserve_autopilot_mode{{autopilot="{told["id"]}",mode="dry-run"}} 1.0' in http.get("/metrics").text


@needs_direct
@pytest.mark.serve
@pytest.mark.parametrize("names_itself", [False, True])
def test_inside_a_tenant_keeps_its_conversations_to_itself(http: httpx.Client, names_itself: bool):  # noqa: F811
    headers = {"x-tenant-id": "acme", **({"x-session-id": "of-acme"} if names_itself else {})}
    texts, replicas, cached = [f"among us {names_itself}"], set(), []
    for turn in range(4):
        answer = http.post(CHAT, json=body(*texts), headers=headers)
        replicas.add(answer.headers["x-loopserve-replica"])
        cached.append(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
        texts += [answer.json()["choices"][0]["message"]["content"], f"turn {turn}"]
    assert len(replicas) == 1 and cached[0] == 0 and all(cached[1:])
    name = answer.headers["x-session-id"]
    assert http.get(f"/v1/sessions/{name}").status_code == 404
    assert http.delete(f"/v1/sessions/{name}", headers=headers).json()["replicas"] == list(replicas)


@needs_direct
@pytest.mark.serve
def test_inside_a_dead_replica_cuts_its_answer_and_the_next_turn_is_answered(http: httpx.Client):  # noqa: F811
    headers = {"x-session-id": "short-lived"}
    first = http.post(CHAT, json=body("say=pid"), headers=headers)
    process = int(first.json()["choices"][0]["message"]["content"])
    received: list[str] = []
    with (
        pytest.raises(httpx.RemoteProtocolError),
        http.stream("POST", CHAT, json=body("tokens=500 step_ms=20", stream=True), headers=headers) as dying,
    ):
        for line in dying.iter_lines():
            received.append(line)
            if len(received) == 3:
                os.kill(process, signal.SIGKILL)
    assert any("word" in line for line in received) and "data: [DONE]" not in received
    again = wait_for(lambda: _answered(http, headers))
    assert again.headers["x-loopserve-replica"] != first.headers["x-loopserve-replica"]


def _answered(client: httpx.Client, headers: dict[str, str]) -> httpx.Response | None:
    """HAProxy notices a dead replica when it cannot connect, or by its health check."""
    response = client.post(CHAT, json=body("say=pid", "word", "again"), headers=headers)
    return response if response.status_code == 200 else None


@dataclass(frozen=True)
class Outcomes:
    """What a run inside found, by test function."""

    passed: set[str]
    skipped: set[str]
    failed: dict[str, str]
    log: str


@pytest.fixture(scope="session")
def inside() -> Outcomes:
    """The cases of test_serve.py and those above, run against the whole topology in a network of its own."""
    assert TOPOLOGY != "direct", "such a run would start itself for ever"
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks.cluster.own_network import direct_environment, in_own_network, why_not
    finally:
        sys.path.remove(str(ROOT))
    reason = why_not()
    if reason is not None:
        pytest.skip(f"topology direct is NOT tested: {reason}")
    with tempfile.TemporaryDirectory(prefix="hap-", dir="/tmp") as folder:  # sockets allow 107 characters
        report = Path(folder) / "report.xml"
        files = [str(HERE / "test_serve.py"), str(HERE / "test_direct.py")]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "serve", *files]
        done = subprocess.run(
            in_own_network([*command, f"--junitxml={report}"]),
            cwd=ROOT,
            env={**os.environ, **direct_environment(Path(folder)), VARIABLE: "direct"},
            capture_output=True,
            text=True,
            timeout=RUN_LIMIT_S,
        )
        log = done.stdout[-20_000:] + done.stderr[-4000:]
        assert report.exists(), log
        return _outcomes(report, log)


def _outcomes(report: Path, log: str) -> Outcomes:
    found = Outcomes(set(), set(), {}, log)
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.attrib["name"].partition("[")[0]
        bad = [part.text or "" for part in case if part.tag in ("failure", "error")]
        if bad:
            found.failed[name] = "\n".join(bad)
        elif case.find("skipped") is not None:
            found.skipped.add(name)
        else:
            found.passed.add(name)
    return found


CASES = [
    *(name for name in vars(test_serve) if name.startswith("test_")),
    *(name for name in list(globals()) if name.startswith("test_inside_")),
]


@pytest.mark.skipif(TOPOLOGY == "direct", reason="this is the run inside")
@pytest.mark.serve
@pytest.mark.parametrize("case", CASES)
def test_case_in_direct(case: str, inside: Outcomes):
    assert case not in inside.failed, inside.failed[case]
    if case in inside.skipped - inside.passed:
        pytest.skip("promised by two_hop's ingress only")
    assert case in inside.passed, inside.log
