"""Every object of every value set: an API server would take it, KubeRay would, and so would LoopServe; and these checks do bite."""

from copy import deepcopy
from typing import Any

import pytest
import yaml
from kube_rules import problems
from kube_schemas import pod_problems, schema_problems
from rendering import Objects, changed, objects_of, only, script

SETS = script.value_sets()
VARIANTS: dict[str, tuple[str, str, Any]] = {
    "direct": ("gpu-fleet", "serving.topology", "direct"),
    "no autopilot": ("gpu-fleet", "serving.autopilot", False),
    "own token": ("one-gpu", "cluster.tokenAuth", {"enabled": True, "secretName": "ray-token"}),
    "existing claim": ("gpu-fleet", "cluster.modelCache.existingClaim", "weights"),
    "monitored demo": ("cpu-demo", "monitoring", {"enabled": True, "labels": {"release": "prometheus"}}),
    "demo behind TLS": ("cpu-demo", "ingress", {"enabled": True, "host": "chat.example.com", "tlsSecretName": "tls"}),
    "redis user": ("gpu-fleet", "cluster.gcsFaultTolerance.usernameKey", "username"),
}


def all_problems(objects: Objects) -> list[str]:
    found = [text for entry in objects for text in schema_problems(entry)]
    cluster = only(objects, "RayService")["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        found += pod_problems(group["template"])
    return found + problems(objects)


@pytest.mark.parametrize("name", SETS)
def test_every_object_of_a_value_set_is_valid(name: str):
    assert all_problems(objects_of(script.read_values(name))) == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_object_of_a_variant_is_valid(variant: str):
    name, path, value = VARIANTS[variant]
    assert all_problems(objects_of(changed(script.read_values(name), path, value))) == []


def test_the_fleet_has_every_kind():
    kinds = {entry["kind"] for entry in objects_of(script.read_values("gpu-fleet"))}
    assert kinds >= {
        "RayService",
        "NetworkPolicy",
        "PodDisruptionBudget",
        "PersistentVolumeClaim",
        "PodMonitor",
        "Ingress",
    }
    assert ("ConfigMap" in kinds) == any((script.CHART / "files" / "dashboards").glob("*.json"))
    assert ("PrometheusRule" in kinds) == any((script.CHART / "files" / "alerts").glob("*.yaml"))


def test_dashboards_reach_grafana_unchanged():
    maps = [entry for entry in objects_of(script.read_values("gpu-fleet")) if entry["kind"] == "ConfigMap"]
    sources = sorted((script.CHART / "files" / "dashboards").glob("*.json"))
    assert [entry["metadata"]["labels"]["grafana_dashboard"] for entry in maps] == ["1"] * len(sources)
    assert {name: text for entry in maps for name, text in entry["data"].items()} == {
        source.name: source.read_text().strip() for source in sources
    }


def test_rules_reach_prometheus_unchanged():
    rules = [entry for entry in objects_of(script.read_values("gpu-fleet")) if entry["kind"] == "PrometheusRule"]
    sources = sorted((script.CHART / "files" / "alerts").glob("*.yaml"))
    assert [entry["spec"] for entry in rules] == [yaml.safe_load(source.read_text()) for source in sources]


def test_what_is_derived_is_up_to_date():
    copied, rendered = script.chart_files(), script.manifests()
    assert script.stale({**copied, **rendered}) == [], "run `make manifests`"
    assert script.leftover({**copied, **rendered}) == [], "run `make manifests`"


def test_rendering_twice_gives_the_same_bytes():
    assert script.manifests() == script.manifests()


# --- the checks bite ---


def put(objects: Objects, kind: str, path: str, value: Any) -> Objects:
    """A copy in which one place of the first object of a kind is something else; None takes it away, `~` is a slash in a name."""
    broken = deepcopy(objects)
    place: Any = next(entry for entry in broken if entry["kind"] == kind)
    *way, last = [int(step) if step.isdigit() else step.replace("~", "/") for step in path.split("/")]
    for step in way:
        place = place[step] if isinstance(step, int) else place.setdefault(step, {})
    if value is None:
        del place[last]
    else:
        place[last] = value
    return broken


CLUSTER, HEAD, GPU = (
    "spec/rayClusterConfig",
    "spec/rayClusterConfig/headGroupSpec",
    "spec/rayClusterConfig/workerGroupSpecs/0",
)
POD = f"{GPU}/template/spec"

BY_SCHEMA = [
    ("RayService", f"{CLUSTER}/headGroupSpecs", {}, "'headGroupSpecs' was unexpected"),
    ("RayService", f"{GPU}/minReplica", 1, "'minReplica' was unexpected"),
    ("RayService", f"{GPU}/maxReplicas", "8", "'8' is not of type 'integer'"),
    ("RayService", f"{GPU}/template", None, "'template' is a required property"),
    ("RayService", f"{POD}/containers/0/imagePullPolcy", "Always", "'imagePullPolcy' was unexpected"),
    ("RayService", f"{CLUSTER}/authOptions/mode", "basic", "'basic' is not one of"),
    ("RayService", f"{HEAD}/rayStartParams/num-cpus", 0, "0 is not of type 'string'"),
    ("RayService", f"{POD}/containers/0/env/1/name", "RAY_SERVE_USE_GRPC_BY_DEFAULT", "two entries with"),
    ("RayService", f"{POD}/tolerations/0/tolerate", True, "'tolerate' was unexpected"),
    ("PodMonitor", "spec/podMetricsEndpoints/0/ports", ["metrics"], "'ports' was unexpected"),
    ("PodMonitor", "spec/podMetricsEndpoints/0/interval", "often", "does not match"),
    ("NetworkPolicy", "spec/ingress/0/form", [], "form"),
    ("PodDisruptionBudget", "spec/minAvailble", 1, "minAvailble"),
    ("PersistentVolumeClaim", "spec/accessMode", "ReadWriteMany", "accessMode"),
    ("Ingress", "spec/rules/0/http/paths/0/pathType", None, "pathType"),
    ("ConfigMap", "data/x", 3, "3 is not of type"),
]


@pytest.mark.parametrize(("kind", "path", "value", "said"), BY_SCHEMA)
def test_a_broken_object_is_rejected_by_its_schema(kind: str, path: str, value: Any, said: str):
    broken = put(objects_of(script.read_values("gpu-fleet")), kind, path, value)
    found = [text for entry in broken if entry["kind"] == kind for text in schema_problems(entry)]
    assert any(said in text for text in found), found
    assert len(found) <= 2  # and nothing else is


BY_RULE = [
    ("RayService", "metadata/name", "l" * 48, "at most 47 characters"),
    ("RayService", "spec/upgradeStrategy/type", "Rolling", "upgradeStrategy.type"),
    ("RayService", "metadata/annotations/ray.io~initializing-timeout", "0s", "not a positive duration"),
    ("RayService", "metadata/annotations/ray.io~ft-enabled", "true", "ray.io/ft-enabled beside"),
    ("RayService", f"{CLUSTER}/rayVersion", "2.52.0", "rayVersion 2.52.0"),
    ("RayService", f"{CLUSTER}/autoscalerOptions/version", "v1", "not v2"),
    ("RayService", f"{CLUSTER}/gcsFaultToleranceOptions/redisPassword", {"value": "secret"}, "stands in the manifest"),
    ("RayService", f"{HEAD}/rayStartParams/redis-password", "x", "redis-password in rayStartParams"),
    ("RayService", f"{HEAD}/rayStartParams/num-cpus", "4", 'num-cpus is not "0"'),
    ("RayService", f"{HEAD}/headService/metadata/name", "mine", "headService.metadata.name"),
    ("RayService", f"{HEAD}/template/spec/containers/0/resources/limits/nvidia.com~gpu", 1, "head: asks for a GPU"),
    ("RayService", f"{HEAD}/template/spec/containers/0/image", "loopserve:other", "different images"),
    ("RayService", f"{GPU}/minReplicas", 9, "not 0 <= minReplicas"),
    ("RayService", f"{GPU}/maxReplicas", None, "not both given"),
    ("RayService", f"{GPU}/rayStartParams/num-cpus", "8", "beside resources"),
    ("RayService", f"{GPU}/resources", {}, "EngineReplica: no worker group has"),
    ("RayService", f"{GPU}/template/metadata/labels/app.kubernetes.io~name", "x", "belongs to KubeRay"),
    ("RayService", f"{POD}/restartPolicy", "Always", "restartPolicy"),
    ("RayService", f"{POD}/enableServiceLinks", True, "LOOPSERVE_ variables"),
    ("RayService", f"{POD}/securityContext/runAsNonRoot", False, "may run as root"),
    ("RayService", f"{POD}/terminationGracePeriodSeconds", 60, "ends before Ray's drain"),
    ("RayService", f"{POD}/containers/0/securityContext/capabilities/drop", [], "keeps capabilities"),
    ("RayService", f"{POD}/containers/0/readinessProbe", {"exec": {"command": ["true"]}}, "readinessProbe is KubeRay's"),
    ("RayService", f"{POD}/containers/0/ports/0/name", "metrics", "the port metrics is KubeRay's"),
    ("RayService", f"{POD}/containers/0/env/0", {"name": "LOOPSERVE_REPLICS", "value": "2"}, "no setting 'replics'"),
    ("RayService", f"{POD}/containers/0/env/0", {"name": "LOOPSERVE_ENGINE_SEED", "value": "many"}, "'many' does not fit"),
    ("RayService", f"{POD}/containers/0/env/0", {"name": "RAY_REDIS_ADDRESS", "value": "x"}, "is set by KubeRay"),
    ("RayService", f"{POD}/volumes/0/persistentVolumeClaim/claimName", "other", "nobody makes the claim other"),
    ("PodDisruptionBudget", "spec/minAvailable", "50%", "only a whole minAvailable"),
    ("PodDisruptionBudget", "spec/selector/matchLabels/app.kubernetes.io~component", "tail", "selects no pod"),
    ("PodMonitor", "spec/podMetricsEndpoints/1/port", "autoscaler", "has no port autoscaler"),
    ("PodMonitor", "spec/selector/matchLabels/ray.io~node-type", "boss", "selects no pod"),
    ("NetworkPolicy", "spec/ingress/2/ports/0/port", 9090, "keeps Prometheus from port metrics"),
    ("NetworkPolicy", "spec/podSelector/matchLabels/app.kubernetes.io~instance", "other", "leaves pods out"),
    ("Ingress", "spec/rules/0/http/paths/0/backend/service/name", "loopserve", "not the service that KubeRay makes"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "path", "value", "said"), BY_RULE)
def test_a_broken_object_is_rejected_by_a_rule(kind: str, path: str, value: Any, said: str):
    objects = objects_of(script.read_values("gpu-fleet"))
    found = problems(put(objects, kind, path, value))
    assert any(said in text for text in found), found


ENGINES = "applications/0/deployments/0/"
SERVE: list[tuple[dict[str, Any], str]] = [
    ({"proxy_location": "HeadOnly"}, "proxy_location is not EveryNode"),
    ({"proxy_locaton": "EveryNode"}, "knows no 'proxy_locaton'"),
    ({"http_options": {"prot": 8000}}, "knows no 'prot'"),
    ({"applications/0/import_path": "deploy.app:aplication"}, "has no attribute 'aplication'"),
    ({"applications/0/args/replics": 3}, "replics"),
    ({"applications/0/args/metrics": {"ray_exprot": True}}, "no setting 'ray_exprot'"),
    ({"applications/0/external_scaler": True}, "knows no 'external_scaler'"),
    ({ENGINES + "num_replica": 3}, "knows no 'num_replica'"),
    ({ENGINES + "num_replicas": -1}, "greater than 0"),
    (
        {ENGINES + "autoscaling_config": {"min_replicas": 1}, ENGINES + "num_replicas": None},
        "external_scaler_enabled",
    ),
    ({ENGINES + "max_replicas_per_node": 2}, "max_replicas_per_node of GPU engines"),
    ({ENGINES + "ray_actor_options/num_gpus": 2}, "no worker group has"),
    ({ENGINES + "ray_actor_options/num_gpu": 1}, "knows no 'num_gpu'"),
    ({ENGINES + "graceful_shutdown_timeout_s": 900}, "EngineReplica for longer"),
    ({"applications/0/deployments/1/ray_actor_options/num_cpus": 0}, "may land on the head"),
    ({"applications/0/deployments/2/user_config/high_ratio": 0.1}, "Autopilot.user_config"),
]


@pytest.mark.parametrize(("changes", "said"), SERVE)
def test_a_broken_serve_config_is_rejected(changes: dict[str, Any], said: str):
    objects = deepcopy(objects_of(script.read_values("gpu-fleet")))
    service = only(objects, "RayService")
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    for path, value in changes.items():
        config = put([{"kind": "config", **config}], "config", path, value)[0]
        config.pop("kind")
    service["spec"]["serveConfigV2"] = yaml.safe_dump(config)
    found = problems(objects)
    assert any(said in text for text in found), found
