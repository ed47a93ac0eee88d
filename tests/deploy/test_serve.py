"""The application on a real Ray: three replicas of a fake engine behind two ingresses."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from fake_backend import MODEL
from topology import needs_an_ingress

from deploy.settings import DeploySettings
from loopserve.errors import UnsupportedModel

pytestmark = pytest.mark.serve

CHAT = "/v1/chat/completions"
LIMIT_S = 60.0  # of waits that should take about a second; generous, because the machine may be busy


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    """A client that opens a connection for every request, so that each may meet another ingress."""
    with httpx.Client(
        base_url=url, timeout=LIMIT_S, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0)
    ) as client:
        yield client


@pytest.fixture
def api(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=httpx.Client(trust_env=False)
    ) as client:
        yield client


def body(*texts: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]
    return {"model": MODEL, "messages": messages, **fields}


def wait_for(condition: Callable[[], Any]) -> Any:
    """The first true value of `condition`, asked until it comes."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError("it never came true")


def names_on_two_replicas(http: httpx.Client) -> dict[str, str]:
    """Two session names that live on different replicas, with their replicas."""
    found: dict[str, str] = {}
    for number in range(40):
        name = f"somewhere-{number}"
        replica = http.post(CHAT, json=body("hello"), headers={"x-session-id": name}).headers["x-loopserve-replica"]
        if replica not in found.values():
            found[name] = replica
        if len(found) == 2:
            return found
    raise AssertionError("forty names on one replica")


def test_openai_client_parses_a_whole_answer(api: openai.OpenAI):
    answer = api.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "tokens=4"}], n=2, logprobs=True, top_logprobs=2
    )
    assert [choice.message.content for choice in answer.choices] == ["word word word word"] * 2
    assert answer.choices[0].logprobs and answer.choices[0].logprobs.content
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    assert answer.usage and answer.usage.prompt_tokens_details
    assert (answer.usage.completion_tokens, answer.usage.prompt_tokens_details.cached_tokens) == (8, 0)
    assert answer.usage.model_extra and answer.usage.model_extra["loopserve"]["mode"] == "sparse"


@pytest.mark.parametrize("include_usage", [False, True])
def test_openai_client_parses_a_stream(api: openai.OpenAI, include_usage: bool):
    options: Any = {"stream_options": {"include_usage": True}} if include_usage else {}
    chunks = list(
        api.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "tokens=4"}], stream=True, **options
        )
    )
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == "word word word word"
    assert [bool(chunk.choices) for chunk in chunks] == [True] * (len(chunks) - include_usage) + [False] * include_usage
    assert [chunk.usage is not None for chunk in chunks] == [not chunk.choices for chunk in chunks]


def test_openai_client_parses_completions_and_models(api: openai.OpenAI):
    whole = api.completions.create(model=MODEL, prompt="tokens=2", logprobs=1)
    assert whole.choices[0].text == "word word" and whole.choices[0].logprobs
    chunks = list(api.completions.create(model=MODEL, prompt="tokens=2", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "word word"
    assert [model.id for model in api.models.list()] == [MODEL]
    assert api.models.retrieve(MODEL).owned_by == "loopserve"


def test_openai_client_raises_its_own_errors(api: openai.OpenAI):
    with pytest.raises(openai.NotFoundError) as missing:
        api.chat.completions.create(model="other", messages=[{"role": "user", "content": "x"}])
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="tools"):
        api.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "x"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )


@pytest.mark.parametrize(("kind", "status"), [("Overloaded", 429), ("EngineUnavailable", 503)])
def test_refusals_of_a_stream_come_with_their_status_and_retry_after(http: httpx.Client, kind: str, status: int):
    response = http.post(CHAT, json=body(f"refuse={kind}", stream=True))
    assert response.status_code == status
    assert int(response.headers["retry-after"]) >= 1
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_over_the_limit_is_refused(http: httpx.Client):
    assert http.post(CHAT, content=b"x" * (DeploySettings().body_bytes_max + 1)).status_code == 413


@pytest.mark.parametrize("names_itself", [False, True])
def test_conversations_stay_with_their_kv_over_two_ingresses(http: httpx.Client, names_itself: bool):
    homes = set()
    for number in range(9):
        headers = {"x-session-id": f"dialogue-{number}"} if names_itself else {}
        texts, replicas, cached = [f"dialogue {number} {names_itself}"], set(), []
        for turn in range(4):
            response = http.post(CHAT, json=body(*texts), headers=headers)
            replicas.add(response.headers["x-loopserve-replica"])
            cached.append(response.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
            texts += [response.json()["choices"][0]["message"]["content"], f"turn {turn}"]
        assert len(replicas) == 1
        assert cached[0] == 0 and all(cached[1:])
        homes |= replicas
    assert len(homes) > 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_turn(http: httpx.Client, url: str, stream: bool):
    name = f"leaver-{stream}"

    def is_active() -> bool:
        found = http.get(f"/v1/sessions/{name}")
        return found.status_code == 200 and found.json()["is_active"]

    request = body("tokens=3000 step_ms=20", stream=stream)
    with (
        httpx.Client(base_url=url, trust_env=False) as leaver,
        pytest.raises(httpx.ReadTimeout),
        leaver.stream(
            "POST", CHAT, json=request, headers={"x-session-id": name}, timeout=httpx.Timeout(30, read=1.0)
        ) as response,
    ):
        assert is_active()
        for count, _ in enumerate(response.iter_bytes()):
            if count == 3:
                raise httpx.ReadTimeout("seen enough")
    wait_for(lambda: not is_active())


def test_a_released_session_is_gone_everywhere_and_its_stream_ends(http: httpx.Client):
    headers = {"x-session-id": "to-release"}
    request = body("tokens=3000 step_ms=20", stream=True)
    with http.stream("POST", CHAT, json=request, headers=headers) as response:
        lines = response.iter_lines()
        next(lines)
        assert "to-release" in [found["id"] for found in http.get("/v1/sessions").json()["data"]]
        assert http.delete("/v1/sessions/to-release").json()["replicas"] == [response.headers["x-loopserve-replica"]]
        *_, last = [line for line in lines if line]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_unavailable"
    assert http.get("/v1/sessions/to-release").status_code == 404
    assert http.delete("/v1/sessions/to-release").status_code == 404


def test_ready_names_all_replicas(http: httpx.Client, cluster: DeploySettings):
    assert len(wait_for(lambda: http.get("/ready").json().get("replicas"))) == cluster.replicas


@needs_an_ingress
def test_a_replica_that_stands_still_is_named_and_never_waited_for(http: httpx.Client):
    headers = {"x-session-id": "sleeper"}
    victim = http.post(CHAT, json=body("hello"), headers=headers).headers["x-loopserve-replica"]
    sleeper = threading.Thread(
        target=http.post, args=(CHAT,), kwargs={"json": body("block_ms=9000"), "headers": headers}
    )
    sleeper.start()
    time.sleep(0.5)
    found = http.get("/v1/sessions").json()
    assert sleeper.is_alive()
    assert found["silent"] in ([victim], ["unknown"])  # an ingress that never met it cannot know its name
    sleeper.join()


def test_a_model_that_cannot_be_served_says_why(cluster: DeploySettings, url: str):
    from ray import serve

    from deploy.app import build_app
    from deploy.local import app_progress, start_failure
    from loopserve.config import EngineConfig

    app = build_app(cluster, engine_config=EngineConfig(model="unsupported"), factory="fake_backend:fake_backend")
    target = serve.RunTarget(app, name="broken", route_prefix="/broken")
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    failure = wait_for(lambda: start_failure(app_progress("broken").message))
    assert isinstance(failure, UnsupportedModel)
    assert failure.message == "the model needs what nobody has"
    serve.delete("broken", _blocking=False)


def test_a_dead_engine_is_replaced_and_its_clients_are_served_meanwhile(http: httpx.Client, cluster: DeploySettings):
    headers = {"x-session-id": "unlucky"}
    killing = http.post(CHAT, json=body("tokens=5 kill=2", stream=True), headers=headers)
    victim = killing.headers["x-loopserve-replica"]
    assert '"error"' in killing.text and "[DONE]" not in killing.text
    again = http.post(CHAT, json=body("hello", "word", "again"), headers=headers)
    assert again.status_code == 200 and again.headers["x-loopserve-replica"] != victim
    wait_for(lambda: len(set(http.get("/ready").json().get("replicas", ())) - {victim}) == cluster.replicas)


@needs_an_ingress
def test_a_killed_replica_ends_its_stream_at_once_and_nothing_else(http: httpx.Client):
    (mine, victim), (yours, _) = names_on_two_replicas(http).items()
    process = int(
        http.post(CHAT, json=body("say=pid"), headers={"x-session-id": mine}).json()["choices"][0]["message"]["content"]
    )
    long = body("tokens=120 step_ms=20", stream=True)
    with (
        http.stream("POST", CHAT, json=long, headers={"x-session-id": mine}) as dying,
        http.stream("POST", CHAT, json=long, headers={"x-session-id": yours}) as living,
    ):
        lines = dying.iter_lines()
        assert "word" in [next(lines) for _ in range(3)][2]
        os.kill(process, signal.SIGKILL)
        *_, last = [line for line in lines if line]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_lost"
        assert [line for line in living.iter_lines() if line][-1] == "data: [DONE]"
    again = http.post(CHAT, json=body("hello", "word", "again"), headers={"x-session-id": mine})
    assert again.status_code == 200 and again.headers["x-loopserve-replica"] != victim


@needs_an_ingress
def test_a_replica_killed_before_the_first_byte_is_replaced_for_the_client(http: httpx.Client, url: str):
    name = next(iter(names_on_two_replicas(http)))
    headers = {"x-session-id": name}
    process = int(http.post(CHAT, json=body("say=pid"), headers=headers).json()["choices"][0]["message"]["content"])
    killer = threading.Timer(0.7, os.kill, (process, signal.SIGKILL))
    killer.start()
    response = http.post(CHAT, json=body("wait_ms=2000 tokens=2"), headers=headers)
    killer.join()
    assert response.status_code == 200
    assert response.json()["choices"][0]["message"]["content"] == "word word"
