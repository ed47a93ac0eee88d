"""API keys: what the file may hold, how it is read again, and what each door asks for."""

import logging
import re
from datetime import UTC, datetime
from pathlib import Path

import httpx
import openai
import pytest
import yaml
from fake_backend import MODEL
from hypothesis import given
from hypothesis import strategies as st
from local_fleet import LocalFleet, client_of
from typer.testing import CliRunner

from deploy.ingress import build_api
from deploy.keys import KeyEntry, KeyRing, Role, hash_key, load_keys, new_key, parse_keys
from deploy.settings import DeploySettings
from loopserve.cli import app
from loopserve.cli.client import ChatClient
from loopserve.errors import ConfigError

CHAT = "/v1/chat/completions"
OPEN = {"/health", "/ready", "/observe", "/observe/static/{name}"}  # the page is empty until its state may be read


def entry(key: str, **fields: object) -> dict[str, object]:
    return {"sha256": hash_key(key), "tenant": "acme", **fields}


def write(path: Path, *entries: dict[str, object]) -> Path:
    path.write_text(yaml.safe_dump({"keys": list(entries)}))
    return path


def body(text: str = "tokens=2", **fields: object) -> dict[str, object]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def guarded(path: Path, **settings: object) -> LocalFleet:
    return LocalFleet(DeploySettings(keys_file=str(path), **settings))


def test_a_key_is_256_random_bits_and_never_the_same():
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(re.fullmatch(r"ls-[A-Za-z0-9_-]{43}", key) for key in keys)


def test_yaml_and_json_say_the_same():
    as_yaml = f"""
keys:
  - sha256: {"a" * 64}
    tenant: acme
    role: operator
    label: billing
    expires: 2027-01-31
    limits: {{requests_per_minute: 6}}
  - {{sha256: {"b" * 64}, tenant: other, disabled: true}}
"""
    as_json = f"""{{"keys": [
\t{{"sha256": "{"a" * 64}", "tenant": "acme", "role": "operator", "label": "billing", "expires": "2027-01-31",
\t  "limits": {{"requests_per_minute": 6}}}},
\t{{"sha256": "{"b" * 64}", "tenant": "other", "disabled": true}}]}}"""
    first, second = parse_keys(as_yaml)
    assert parse_keys(as_json) == (first, second)
    assert (first.tenant, first.role, first.label, first.limits.requests_per_minute) == (
        "acme",
        Role.OPERATOR,
        "billing",
        6,
    )
    assert first.expires_unix_s == datetime(2027, 1, 31, tzinfo=UTC).timestamp()
    assert second.disabled and second.role is Role.USER and second.limits.tokens_per_minute is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("keys: [{tenant: acme}]", "entry 1, sha256"),
        ("keys: [{sha256: 12, tenant: acme}]", "entry 1, sha256"),
        ("keys: [{sha256: SECRETSECRET, tenant: acme}]", "entry 1, sha256"),
        ("keys: [{sha256: HASH, tenant: 'SECRET with spaces'}]", "entry 1, tenant"),
        ("keys: [{sha256: HASH, tenant: acme, role: SECRET}]", "entry 1, role"),
        ("keys: [{sha256: HASH, tenant: acme, expires: SECRET}]", "entry 1, expires"),
        ("keys: [{sha256: HASH, tenant: acme, expires: 2027-01-31T12:00:00}]", "needs its zone"),
        ("keys: [{sha256: HASH, tenant: acme, disabled: 'yes'}]", "entry 1, disabled"),
        ("keys: [{sha256: HASH, tenant: acme, limits: {requests_per_minute: 0}}]", "requests_per_minute"),
        ("keys: [{sha256: HASH, tenant: acme, limits: {requests_per_minute: true}}]", "requests_per_minute"),
        ("keys: [{sha256: HASH, tenant: acme, tennant: SECRET}]", "no field tennant"),
        ("keys: [{sha256: HASH, tenant: acme, SECRET-SECRET: 1}]", "not shown"),
        ("keys: [{sha256: HASH, tenant: a}, {sha256: HASH, tenant: b}]", "entries 1 and 2"),
        ("keys: [{sha256: HASH, tenant: a, tenant: SECRET}]", "twice"),
        ('{"keys": [{"sha256": "HASH", "tenant": "a", "tenant": "SECRET"}]}', "twice"),
        ('{"keys": [SECRET', "JSON at line 1"),
        ("keys: [SECRET", "YAML at line"),
        ("keys: {SECRET: ]\n  - x", "YAML"),
        ("keys: *SECRET", "YAML"),
        ("- SECRET", "the file"),
        ("", "the file"),
        ("keys:\n  - key: ls-SECRETSECRETSECRETSECRETSECRETSECRETSECRETS", "line 2 holds a key itself"),
    ],
)
def test_a_wrong_file_is_told_by_place_and_field_and_never_by_value(text: str, said: str):
    with pytest.raises(ConfigError, match=re.escape(said)) as told:
        parse_keys(text.replace("HASH", "c" * 64))
    assert "SECRET" not in str(told.value) and "cccc" not in str(told.value)
    assert told.value.__context__ is None or told.value.__suppress_context__, "a traceback would show the text"


@given(st.text(max_size=200))
def test_whatever_a_file_holds_is_read_or_refused_as_a_mistake_of_the_user(text: str):
    try:
        parse_keys(text)
    except ConfigError:
        return
    assert "keys" in text


def test_a_missing_or_enormous_file_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_keys(tmp_path / "none")
    (tmp_path / "big").write_bytes(b"#" * (5 << 20))
    with pytest.raises(ConfigError, match="longer than"):
        load_keys(tmp_path / "big")
    with pytest.raises(ConfigError, match="cannot be read"):
        build_api(LocalFleet(), DeploySettings(keys_file=str(tmp_path / "none")))


def test_unknown_disabled_and_expired_keys_are_not_found(tmp_path: Path):
    now = 1_000_000.0
    at = datetime.fromtimestamp
    path = write(
        tmp_path / "keys",
        entry("good"),
        entry("off", disabled=True),
        entry("old", expires=at(now - 1, UTC)),
        entry("young", expires=at(now + 1, UTC)),
    )
    ring = KeyRing(path, unix_time=lambda: now)
    assert [ring.find(key) is not None for key in ("good", "off", "old", "young", "other", "")] == [
        True,
        False,
        False,
        True,
        False,
        False,
    ]
    later = KeyRing(path, unix_time=lambda: now + 1)
    assert later.find("young") is None


def test_a_secret_that_kubernetes_swaps_by_symlink_is_read_again(tmp_path: Path):
    for version, key in (("v1", "first"), ("v2", "second")):
        (tmp_path / version).mkdir()
        write(tmp_path / version / "keys.yaml", entry(key))
    (tmp_path / "..data").symlink_to("v1")
    (tmp_path / "keys.yaml").symlink_to("..data/keys.yaml")
    ring = KeyRing(tmp_path / "keys.yaml")
    assert ring.find("first") and not ring.find("second")
    (tmp_path / "..data_tmp").symlink_to("v2")
    (tmp_path / "..data_tmp").rename(tmp_path / "..data")
    ring.refresh()
    assert ring.find("second") and not ring.find("first")


def test_a_broken_new_file_keeps_the_old_keys_is_logged_once_and_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path = write(tmp_path / "keys", entry("good"))
    ring = KeyRing(path)
    with caplog.at_level(logging.INFO):
        path.write_text("keys: [{sha256: SECRET")
        for _ in range(3):
            ring.refresh()
            assert ring.find("good") and ring.reload_failed
        path.unlink()
        for _ in range(3):
            ring.refresh()
            assert ring.find("good") and ring.reload_failed
        write(path, entry("better"))
        ring.refresh()
    assert ring.find("better") and not ring.find("good") and not ring.reload_failed
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR", "INFO"]
    assert "SECRET" not in caplog.text


def test_an_unchanged_file_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ring = KeyRing(write(tmp_path / "keys", entry("good")))
    monkeypatch.setattr("deploy.keys.load_keys", None)
    ring.refresh()
    assert ring.find("good")


def test_an_entry_shows_no_hash():
    shown = repr(KeyEntry(sha256=hash_key("good"), tenant="acme"))
    assert hash_key("good")[13:] not in shown and "acme" in shown


@pytest.mark.anyio
async def test_every_route_but_health_and_readiness_asks_for_a_key(tmp_path: Path):
    fleet = guarded(write(tmp_path / "keys", entry("good")), observe=True)
    api = build_api(fleet, fleet.settings)
    routes = {(method.upper(), path) for path, methods in api.openapi()["paths"].items() for method in methods}
    assert len(routes) >= 10 and {path for _, path in routes} >= OPEN
    async with client_of(fleet) as client:
        for method, path in sorted(routes):
            response = await client.request(method, path.replace("{name}", "x"))
            if path in OPEN:
                assert response.status_code in (200, 404), path
            else:
                assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key"), path
                assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.anyio
@pytest.mark.parametrize("key", ["wrong", "off", "old"])
async def test_every_key_that_is_not_valid_gets_the_same_answer(tmp_path: Path, key: str):
    path = write(
        tmp_path / "keys",
        entry("good"),
        entry("off", disabled=True),
        entry("old", expires=datetime(2020, 1, 1, tzinfo=UTC)),
    )
    async with client_of(guarded(path)) as client:
        response = await client.post(CHAT, json=body(), headers=bearer(key))
    assert response.status_code == 401
    assert response.json() == {
        "error": {
            "message": "The API key is not valid here; ask the operator of this server for another one.",
            "type": "invalid_request_error",
            "param": None,
            "code": "invalid_api_key",
        }
    }


@pytest.mark.anyio
@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer good"},
        {"authorization": "bearer  good "},
        {"x-api-key": "good"},
        {"authorization": "Basic of-a-proxy", "x-api-key": "good"},
        {"authorization": "Bearer", "x-api-key": "good"},
    ],
)
async def test_a_key_comes_as_bearer_or_as_x_api_key(tmp_path: Path, headers: dict[str, str]):
    async with client_of(guarded(write(tmp_path / "keys", entry("good")))) as client:
        assert (await client.post(CHAT, json=body(), headers=headers)).status_code == 200
        assert (await client.get("/v1/sessions", headers=headers)).status_code == 200


@pytest.mark.anyio
async def test_openais_client_raises_its_authentication_error(tmp_path: Path):
    fleet = guarded(write(tmp_path / "keys", entry("good")))
    transport = httpx.ASGITransport(build_api(fleet, fleet.settings))

    def client(key: str) -> openai.AsyncOpenAI:
        http = httpx.AsyncClient(transport=transport)
        return openai.AsyncOpenAI(base_url="http://test/v1", api_key=key, http_client=http)

    assert [model.id async for model in client("good").models.list()] == [MODEL]
    with pytest.raises(openai.AuthenticationError) as refused:
        await client("bad").chat.completions.create(**body())  # type: ignore[call-overload]
    assert refused.value.code == "invalid_api_key"


@pytest.mark.anyio
async def test_the_tenant_is_the_keys_and_a_header_that_names_another_is_refused(tmp_path: Path):
    path = write(tmp_path / "keys", entry("good"), entry("other", tenant="rival"))
    fleet = guarded(path)
    async with client_of(fleet) as client:
        for tenant, status in (("acme", 200), ("", 200), ("rival", 400), ("Acme", 400)):
            headers = {**bearer("good"), "x-tenant-id": tenant}
            assert (await client.post(CHAT, json=body(), headers=headers)).status_code == status
            assert (await client.get("/v1/sessions", headers=headers)).status_code == status
        listed = await client.get("/v1/sessions", headers=bearer("other"))
    assert listed.json()["data"] == []
    assert {request.cache_salt for request in fleet.chats["a"].requests} == {"acme"}


@pytest.mark.anyio
async def test_operators_pages_open_for_operators_only(tmp_path: Path):
    path = write(tmp_path / "keys", entry("user"), entry("operator", role="operator"))
    async with client_of(guarded(path)) as client:
        assert (await client.get("/metrics", headers=bearer("operator"))).status_code == 200
        refused = await client.get("/metrics", headers=bearer("user"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_permissions")
        assert (await client.post(CHAT, json=body(), headers=bearer("operator"))).status_code == 200


@pytest.mark.anyio
async def test_metrics_may_be_left_open_for_a_scraper_and_nothing_else_is(tmp_path: Path):
    path = write(tmp_path / "keys", entry("user"))
    async with client_of(guarded(path, open_metrics=True, observe=True)) as client:
        assert (await client.get("/metrics")).status_code == 200
        assert (await client.get("/observe/state")).status_code == 401
        assert "loopserve_keys_reload_failed 0" in _plain((await client.get("/metrics")).text)
        path.write_text("broken")
        assert "loopserve_keys_reload_failed 1" in _plain((await client.get("/metrics")).text)


def _plain(page: str) -> str:
    """The page without labels and decimals."""
    return re.sub(r"\{[^}]*\}", "", page).replace(".0", "")


@pytest.mark.anyio
async def test_without_a_keys_file_every_door_is_open_and_the_tenant_header_is_trusted():
    fleet = LocalFleet()
    async with client_of(fleet) as client:
        assert (await client.post(CHAT, json=body(), headers={"x-tenant-id": "t", **bearer("x")})).status_code == 200
        assert (await client.get("/metrics")).status_code == 200
        odd = await client.get("/v1/sessions", headers={"x-tenant-id": "a\x1fb"})
    assert fleet.chats["a"].requests[0].cache_salt == "t"
    assert odd.status_code == 400


# The command line.


def keys_command(*args: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["keys", *args])
    return done.exit_code, done.stdout if done.exception is None else str(done.exception)


def test_a_new_key_is_printed_once_and_its_entry_appended(tmp_path: Path):
    path = tmp_path / "keys.yaml"
    printed = []
    for args in (
        ("--tenant", "acme"),
        ("--tenant", "other", "--role", "operator", "--label", "ops: #1", "--expires", "2031-01-02"),
    ):
        code, out = keys_command("new", *args, "--file", str(path))
        assert code == 0
        printed.append(out.strip())
    first, second = load_keys(path)
    assert [hash_key(key) for key in printed] == [first.sha256, second.sha256]
    assert (second.tenant, second.role, second.label) == ("other", Role.OPERATOR, "ops: #1")
    assert not any(key in path.read_text() for key in printed)
    assert path.stat().st_mode & 0o077 == 0


def test_a_new_entry_leaves_what_people_wrote_as_it_is(tmp_path: Path):
    path = tmp_path / "keys.yaml"
    path.write_text(f"# ours\nkeys:\n- tenant: acme  # a comment\n  sha256: {'a' * 64}")
    assert keys_command("new", "--tenant", "b", "--file", str(path))[0] == 0
    assert path.read_text().startswith(f"# ours\nkeys:\n- tenant: acme  # a comment\n  sha256: {'a' * 64}\n- ")
    assert [found.tenant for found in load_keys(path)] == ["acme", "b"]


def test_a_json_file_stays_json(tmp_path: Path):
    path = tmp_path / "keys.json"
    path.write_text('{"keys": []}')
    assert keys_command("new", "--tenant", "b", "--file", str(path))[0] == 0
    assert path.read_text().startswith("{") and [found.tenant for found in load_keys(path)] == ["b"]


def test_a_file_that_cannot_be_appended_to_stays_as_it_was(tmp_path: Path):
    path = tmp_path / "keys.yaml"
    path.write_text("keys: [broken")
    code, said = keys_command("new", "--tenant", "b", "--file", str(path))
    assert code != 0 and "wrong" in said and path.read_text() == "keys: [broken"
    code, said = keys_command("new", "--tenant", "no tenant", "--file", str(tmp_path / "new.yaml"))
    assert code != 0 and "tenant" in said and not (tmp_path / "new.yaml").exists()


def test_without_a_file_the_entry_is_printed_beside_the_key():
    code, out = keys_command("new", "--tenant", "acme", "--expires", "30d")
    key, rest = out.split("\n", 1)
    (found,) = parse_keys(rest)
    assert (code, found.sha256) == (0, hash_key(key)) and found.expires_unix_s is not None


def test_list_and_check_show_who_and_never_a_hash(tmp_path: Path):
    path = write(tmp_path / "keys", entry("good", label="shop"), entry("off", disabled=True))
    code, out = keys_command("list", "--file", str(path))
    assert code == 0 and "acme" in out and "shop" in out and "disabled" in out
    assert hash_key("good")[:12] in out and hash_key("good") not in out
    assert keys_command("check", "--file", str(path)) == (0, "2 keys of 1 tenant, 1 of them valid now\n")
    path.write_text("keys: 3")
    assert keys_command("check", "--file", str(path))[0] != 0


def test_the_terminals_client_sends_its_key():
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json={"data": [{"id": MODEL}]})

    for key in ("mine", None):
        with ChatClient("http://test", api_key=key, transport=httpx.MockTransport(answer)) as client:
            assert client.served_model() == MODEL
    assert [request.headers.get("authorization") for request in seen] == ["Bearer mine", None]


def test_a_shell_with_a_clients_key_may_start_a_server():
    env = {"LOOPSERVE_API_KEY": "mine", "LOOPSERVE_KEYS_FILE": "/keys", "LOOPSERVE_OPEN_METRICS": "true"}
    settings = DeploySettings.from_env(env)
    assert (settings.keys_file, settings.open_metrics) == ("/keys", True)
    assert "mine" not in repr(settings)
