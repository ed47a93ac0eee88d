"""The chart itself: lint, what its schema and its own rules let in, and what they say to what they do not."""

import json
from typing import Any

import pytest
import yaml
from helm_python.chart import lint
from helm_python.errors import HelmError
from rendering import ROOT, changed, objects_of, only, script, serve_config

from deploy.autopilot.settings import AutopilotSettings
from deploy.direct import DIRECT_ENV
from deploy.local import SERVE_ENV

SETS = script.value_sets()
FLEET: dict[str, Any] = script.read_values("gpu-fleet")
DEFAULTS: dict[str, Any] = yaml.safe_load((script.CHART / "values.yaml").read_text())


def paths_of(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Every value by its dotted name; lists and empty maps count as values."""
    found = []
    for key, value in values.items():
        inner = paths_of(value, f"{prefix}{key}.") if isinstance(value, dict) and value else []
        found += inner or [f"{prefix}{key}"]
    return found


@pytest.mark.parametrize("name", SETS)
def test_helm_finds_nothing_to_warn_of(name: str):
    report = lint(script.CHART, script.read_values(name), strict=True)
    assert not report["errors"]
    assert [message["error"] for message in report["messages"] if message["severity"] > 1] == []


def test_the_default_values_render():
    assert only(objects_of({}), "RayService")["metadata"]["name"] == "loopserve"


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("tunables.replicas", -1, "/tunables/replicas': minimum: got -1"),
        ("tunables.replicas", "two", "/tunables/replicas': got string, want integer"),
        ("tunables.relpicas", 2, "additional properties 'relpicas' not allowed"),
        ("cluster.image.digset", "sha256:0", "additional properties 'digset' not allowed"),
        ("cluster.image.digest", "sha256:0", "/cluster/image/digest': 'sha256:0' does not match pattern"),
        ("cluster.workerGroups.0.colour", "red", "additional properties 'colour' not allowed"),
        ("cluster.workerGroups.0.roles", ["engines"], "value must be one of 'engine', 'front'"),
        ("cluster.runAsUser", 0, "/cluster/runAsUser': minimum: got 0"),
        ("cluster.upgradeStrategy", "Rolling", "value must be one of 'NewCluster'"),
        ("serving.topology", "three_hop", "value must be one of 'two_hop', 'direct'"),
        ("serving.settings", {"admission_timeout": 3}, "additional properties 'admission_timeout' not allowed"),
        ("serving.engine", {"decode": {"budget_tokens": "many"}}, "/serving/engine/decode/budget_tokens': got string"),
        ("tunables.autopilot.mode", True, "/tunables/autopilot/mode': got boolean, want string"),
        ("tunables.autopilot.mode", "maybe", "value must be one of 'off', 'dry-run', 'on'"),
        ("monitoring.interval", "often", "/monitoring/interval': 'often' does not match pattern"),
    ],
)
def test_the_schema_names_the_value_that_is_wrong(path: str, value: Any, said: str):
    with pytest.raises(HelmError) as refused:
        script.render(changed(FLEET, path, value))
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("cluster.workerGroups.0.minReplicas", 9, "worker group gpu: minReplicas is 9, more than maxReplicas (8)"),
        (
            "cluster.workerGroups.0.replicas",
            1,
            "worker group gpu: replicas is 1, not between minReplicas (2) and maxReplicas (8)",
        ),
        ("cluster.workerGroups.0.minAvailable", 3, "minAvailable is 3, more than minReplicas (2)"),
        ("cluster.workerGroups.1.name", "gpu", 'two worker groups are named "gpu"'),
        ("cluster.workerGroups", FLEET["cluster"]["workerGroups"][:1], "no worker group has the role `front`"),
        ("cluster.workerGroups", FLEET["cluster"]["workerGroups"][1:], "no worker group has the role `engine`"),
        ("cluster.workerGroups.0.resources.limits", {"cpu": 8, "memory": "9Gi"}, "its limits have no nvidia.com/gpu"),
        (
            "cluster.workerGroups.0.maxReplicas",
            4,
            "8 engine replicas may be wanted, but the worker groups for engines hold at most 4",
        ),
        ("tunables.autopilot.min_replicas", 9, "min_replicas is 9, more than max_replicas (8)"),
        ("tunables.replicas", 1, "tunables.replicas is 1, where the autopilot starts"),
        ("cluster.modelCache.accessMode", "ReadWriteOnce", "which one node can mount"),
        ("cluster.gcsFaultTolerance.redisAddress", "", "without a redisAddress"),
        ("cluster.env", [{"name": "LOOPSERVE_MODEL", "value": "x"}], "belong into serving.settings and serving.engine"),
        ("cluster.env", [{"name": "REDIS_PASSWORD", "value": "x"}], "use cluster.gcsFaultTolerance"),
        ("ingress.host", "", "ingress is enabled without a host"),
        ("fullnameOverride", "l" + "o" * 46 + "p", "maxLength: got 48, want 47"),
    ],
)
def test_values_that_do_not_fit_together_are_refused_with_a_way_out(path: str, value: Any, said: str):
    with pytest.raises(HelmError) as refused:
        script.render(changed(FLEET, path, value))
    assert said in str(refused.value)


def test_a_fleet_without_an_ingress_cannot_go_to_zero():
    direct = changed(changed(FLEET, "serving.topology", "direct"), "tunables.autopilot.min_replicas", 0)
    with pytest.raises(HelmError, match="nobody would be there to answer"):
        script.render(direct)


def test_a_release_name_that_kuberay_would_cut_is_refused():
    with pytest.raises(HelmError, match="has 48 characters; KubeRay allows 47"):
        script.render({}, name="l" * 48)


def test_every_value_is_described():
    schema = json.loads(script.SCHEMA.read_text())

    def undescribed(entry: dict[str, Any], path: str) -> list[str]:
        missing = [] if "description" in entry else [path]
        for name, inner in entry.get("properties", {}).items():
            missing += undescribed(inner, f"{path}.{name}")
        return missing

    roots = {"values": schema} | {name: schema["definitions"][name] for name in script.RECORDS} | {
        "workerGroup": schema["definitions"]["workerGroup"]
    }  # fmt: skip
    assert [path for name, entry in roots.items() for path in undescribed(entry, name)] == []


def test_nothing_is_let_in_that_the_chart_does_not_know():
    schema = json.loads(script.SCHEMA.read_text())
    closed = [schema, *schema["properties"].values(), *(schema["definitions"][name] for name in script.RECORDS)]
    assert all(entry.get("additionalProperties") is False for entry in closed if "properties" in entry)
    documented = set(paths_of(DEFAULTS))
    assert {path.split(".")[0] for path in documented} | {"global"} == schema["properties"].keys()


def test_an_unquoted_on_is_not_a_mode_so_the_values_quote_it():
    for name in SETS:
        assert isinstance(script.read_values(name).get("tunables", {}).get("autopilot", {}).get("mode", ""), str)


def test_settings_of_the_engine_become_variables_that_the_engine_reads():
    from loopserve.config import EngineConfig

    engine = {"kv_memory_ratio": 0.8, "reuse": False, "decode": {"early_refreshes": [2, 6], "method": "window"}}
    values = changed(FLEET, "serving.engine", engine)
    env = serve_config(objects_of(values))["applications"][0]["runtime_env"]["env_vars"]
    config = EngineConfig.from_env(env)
    assert (config.kv_memory_ratio, config.reuse) == (0.8, False)
    assert (config.decode.early_refreshes, config.decode.method) == ((2, 6), "window")


def test_settings_of_the_deployment_become_args_that_it_reads():
    from deploy.settings import DeploySettings

    values = changed(FLEET, "serving.settings", {"body_bytes_max": 16777216, "metrics": {"ray_export": True}})
    settings = DeploySettings.from_env({}, **serve_config(objects_of(values))["applications"][0]["args"])
    assert (settings.body_bytes_max, settings.metrics.ray_export, settings.stop_timeout_s) == (16777216, True, 120)
    assert isinstance(settings.body_bytes_max, int)  # Helm's numbers are floats
    assert settings.keys_file == "/etc/loopserve/keys/keys.yaml"


def test_thresholds_of_the_autopilot_travel_as_user_config_only():
    values = changed(FLEET, "tunables.autopilot.high_ratio", 0.9)
    application = serve_config(objects_of(values))["applications"][0]
    pilot = next(entry for entry in application["deployments"] if entry["name"] == "Autopilot")
    assert AutopilotSettings(**pilot["user_config"]).high_ratio == 0.9
    assert isinstance(pilot["user_config"]["max_replicas"], int)
    assert "high_ratio" not in str(application["args"])


TUNED = {
    "tunables.replicas": 3,
    "tunables.ongoingPerIngress": 99,
    "tunables.autopilot": {"mode": "dry-run", "min_replicas": 2, "max_replicas": 7, "high_ratio": 0.9},
}


def code_version(objects: list[dict[str, Any]]) -> str:
    """What Serve compares to decide whether all replicas restart."""
    from ray.serve._private.deploy_utils import get_app_code_version
    from ray.serve.schema import ServeDeploySchema

    return str(get_app_code_version(ServeDeploySchema.model_validate(serve_config(objects)).applications[0]))


def actor_options(objects: list[dict[str, Any]]) -> list[Any]:
    """What restarts the replicas of one deployment where it changes."""
    return [entry.get("ray_actor_options") for entry in serve_config(objects)["applications"][0]["deployments"]]


@pytest.mark.parametrize("path", TUNED)
def test_a_tunable_changes_nothing_that_restarts_a_replica(path: str):
    before, after = objects_of(FLEET), objects_of(changed(FLEET, path, TUNED[path]))
    old, new = only(before, "RayService")["spec"], only(after, "RayService")["spec"]
    assert old["serveConfigV2"] != new["serveConfigV2"]
    assert old["rayClusterConfig"] == new["rayClusterConfig"]
    assert code_version(before) == code_version(after)
    assert actor_options(before) == actor_options(after)


def test_every_tunable_is_tried():
    assert {".".join(path.split(".")[:2]) for path in paths_of({"tunables": DEFAULTS["tunables"]})} == TUNED.keys()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("serving.settings", {"admission_timeout_s": 30}),
        ("serving.engine", {"seed": 1}),
        ("serving.ingressReplicas", 3),
        ("serving.model", "other/model"),
    ],
)
def test_what_restarts_replicas_leaves_the_ray_cluster_alone(path: str, value: Any):
    before, after = objects_of(FLEET), objects_of(changed(FLEET, path, value))
    assert code_version(before) != code_version(after)
    assert (
        only(before, "RayService")["spec"]["rayClusterConfig"] == only(after, "RayService")["spec"]["rayClusterConfig"]
    )


@pytest.mark.parametrize("topology", ["two_hop", "direct"])
def test_every_node_has_the_environment_that_serve_was_measured_with(topology: str):
    wanted = dict(SERVE_ENV) | (dict(DIRECT_ENV) if topology == "direct" else {})
    cluster = only(objects_of(changed(FLEET, "serving.topology", topology)), "RayService")["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        env = {entry["name"]: entry.get("value") for entry in group["template"]["spec"]["containers"][0]["env"]}
        assert wanted.items() <= env.items()
        assert topology == "direct" or not env.keys() & DIRECT_ENV.keys()


def test_the_grace_of_a_pod_follows_from_how_long_turns_may_take_to_end():
    for drain in (5, 600):
        cluster = only(objects_of(changed(FLEET, "serving.drainSeconds", drain)), "RayService")["spec"][
            "rayClusterConfig"
        ]
        assert cluster["workerGroupSpecs"][0]["template"]["spec"]["terminationGracePeriodSeconds"] >= drain + 30


def test_only_workers_hold_the_hub_token_and_the_keys():
    head, *workers = pods_of(FLEET)
    assert "HF_TOKEN" not in str(head) and "loopserve-api-keys" not in str(head)
    assert all("HF_TOKEN" in str(worker) and "loopserve-api-keys" in str(worker) for worker in workers)


def pods_of(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod templates, the head's first."""
    cluster = only(objects_of(values), "RayService")["spec"]["rayClusterConfig"]
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_a_digest_wins_over_a_tag():
    digest = "sha256:" + "0123456789abcdef" * 4
    cluster = only(objects_of(changed(FLEET, "cluster.image.digest", digest)), "RayService")["spec"]["rayClusterConfig"]
    assert cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["image"] == f"loopserve@{digest}"


def test_the_chart_carries_the_version_of_the_package():
    import tomllib

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((script.CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == version
    assert {script.read_values(name)["cluster"]["image"]["tag"].split("-")[0] for name in SETS} == {version}
