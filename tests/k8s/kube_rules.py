"""What no schema says: rules of KubeRay's operator, of Kubernetes, and of ours, over all objects of one release together.

Every rule yields sentences about what is wrong; none of them reads the chart.
"""

import importlib
import re
from collections.abc import Iterator
from typing import Any

import ray
import yaml
from ray.serve.schema import (
    DeploymentSchema,
    HTTPOptionsSchema,
    RayActorOptionsSchema,
    ServeApplicationSchema,
    ServeDeploySchema,
)

from deploy.autopilot.settings import AutopilotSettings
from deploy.settings import DeploySettings
from loopserve.config import EngineConfig
from loopserve.errors import ConfigError

Object = dict[str, Any]
UPGRADES = ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")
FROM_KUBERAY = (
    "RAY_REDIS_ADDRESS",
    "REDIS_PASSWORD",
    "REDIS_USERNAME",
    "RAY_enable_autoscaler_v2",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_MODE",
)
RESERVED_LABELS = re.compile(r"^(ray\.io/|app\.kubernetes\.io/name$|app\.kubernetes\.io/created-by$)")
MONITORING = {"kubernetes.io/metadata.name": "monitoring"}
SIGTERM_SLACK_S = 15  # between the end of Ray's drain and the kill


def problems(objects: list[Object]) -> list[str]:
    """Everything that is wrong with the objects of one release."""
    services = [entry for entry in objects if entry["kind"] == "RayService"]
    found = [] if len(services) == 1 else [f"{len(services)} RayServices in one release"]
    for service in services:
        for rule in (name_rules, cluster_rules, head_rules, worker_rules, pod_rules, serve_rules, placement_rules):
            found += rule(service)
        found += neighbour_rules(service, objects)
    return found


def cluster_of(service: Object) -> Object:
    return service["spec"]["rayClusterConfig"]  # type: ignore[no-any-return]


def templates(service: Object) -> Iterator[tuple[str, Object]]:
    """Every pod template, with the name of its group."""
    cluster = cluster_of(service)
    yield "head", cluster["headGroupSpec"]["template"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]


def environment(template: Object) -> dict[str, Any]:
    return {entry["name"]: entry.get("value") for entry in template["spec"]["containers"][0].get("env", [])}


def name_rules(service: Object) -> Iterator[str]:
    """Of the RayService itself."""
    name, annotations = service["metadata"]["name"], service["metadata"].get("annotations", {})
    if len(name) > 47 or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"RayService {name}: not a name of at most 47 characters of a DNS label"
    if service["spec"].get("upgradeStrategy", {}).get("type") not in UPGRADES:
        yield f"upgradeStrategy.type is none of {', '.join(UPGRADES)}"
    if not re.fullmatch(r"([1-9]\d*[smh])+|[1-9]\d*", annotations.get("ray.io/initializing-timeout", "")):
        yield "ray.io/initializing-timeout is not a positive duration"
    if not service["spec"].get("excludeHeadPodFromServeSvc"):
        yield "clients would be sent to the head"


def cluster_rules(service: Object) -> Iterator[str]:
    """Of the Ray cluster as a whole."""
    cluster = cluster_of(service)
    if cluster.get("rayVersion") != ray.__version__:
        yield f"rayVersion {cluster.get('rayVersion')} is not the Ray that is tested ({ray.__version__})"
    if cluster.get("authOptions", {}).get("mode") != "token":
        yield "authOptions.mode is not token"
    if "upgradeStrategy" in cluster:
        yield "upgradeStrategy of the RayCluster of a RayService must be unset"
    if cluster.get("enableInTreeAutoscaling"):
        if cluster.get("autoscalerOptions", {}).get("version") != "v2":
            yield "the autoscaler is not v2"
        for group, template in templates(service):
            if template["spec"].get("restartPolicy", "Never") != "Never":
                yield f"{group}: restartPolicy with autoscaler v2 is Never or unset"
    images = {container["image"] for _, template in templates(service) for container in template["spec"]["containers"]}
    if len(images) != 1:
        yield f"head and workers have different images: {sorted(images)}"
    redis = cluster.get("gcsFaultToleranceOptions")
    if redis is not None and not redis.get("redisAddress"):
        yield "gcsFaultToleranceOptions without redisAddress"
    if redis is not None and "value" in redis.get("redisPassword", {}):
        yield "the password of Redis stands in the manifest"
    for annotation in ("ray.io/ft-enabled", "ray.io/external-storage-namespace"):
        if annotation in service["metadata"].get("annotations", {}):
            yield f"{annotation} beside gcsFaultToleranceOptions"


def head_rules(service: Object) -> Iterator[str]:
    """The head runs no replica and is no door."""
    head = cluster_of(service)["headGroupSpec"]
    if head.get("rayStartParams", {}).get("num-cpus") != "0":
        yield 'head: num-cpus is not "0"'
    resources = head["template"]["spec"]["containers"][0].get("resources", {})
    if any(name.endswith("gpu") for kind in resources.values() for name in kind):
        yield "head: asks for a GPU"
    if "name" in head.get("headService", {}).get("metadata", {}):
        yield "headService.metadata.name must be unset"
    for name in ("redis-password", "redis-username"):
        if name in head.get("rayStartParams", {}):
            yield f"head: {name} in rayStartParams beside gcsFaultToleranceOptions"
    ports = {
        port.get("name"): port["containerPort"] for port in head["template"]["spec"]["containers"][0].get("ports", [])
    }
    for name in ("gcs-server", "dashboard", "serve"):
        if name not in ports:
            yield f"head: no port {name}; KubeRay names none by itself where others are given"


def worker_rules(service: Object) -> Iterator[str]:
    """Bounds and resources of every group."""
    for group in cluster_of(service)["workerGroupSpecs"]:
        name = group["groupName"]
        low, high = group.get("minReplicas"), group.get("maxReplicas")
        if low is None or high is None:
            yield f"{name}: minReplicas and maxReplicas are not both given"
        elif not 0 <= low <= group.get("replicas", low) <= high:
            yield f"{name}: not 0 <= minReplicas <= replicas <= maxReplicas"
        doubled = {"num-cpus", "num-gpus", "memory", "resources"} & group.get("rayStartParams", {}).keys()
        if doubled and group.get("resources"):
            yield f"{name}: {', '.join(sorted(doubled))} in rayStartParams beside resources"
        if not group.get("rayStartParams"):
            yield f"{name}: rayStartParams is empty; KubeRay fills in resources there"
        limits = group["template"]["spec"]["containers"][0].get("resources", {}).get("limits", {})
        for resource in ("cpu", "memory"):
            if resource not in limits:
                yield f"{name}: no limit of {resource}, from which Ray learns what it has"


def pod_rules(service: Object) -> Iterator[str]:
    """Security, what KubeRay adds by itself, grace, environment; of head and workers alike."""
    for group, template in templates(service):
        spec = template["spec"]
        for label in template.get("metadata", {}).get("labels", {}):
            if RESERVED_LABELS.match(label):
                yield f"{group}: the label {label} belongs to KubeRay"
        if spec.get("enableServiceLinks") is not False:
            yield f"{group}: Services of the namespace would set LOOPSERVE_ variables"
        if not spec.get("securityContext", {}).get("runAsNonRoot") or not spec["securityContext"].get("runAsUser"):
            yield f"{group}: may run as root"
        for volume in spec.get("volumes", []):
            if volume.get("emptyDir", {}).get("medium") == "Memory":
                yield f"{group}: /dev/shm is KubeRay's"
        for container in spec["containers"]:
            yield from (f"{group}: {text}" for text in container_rules(container))
        drain_s = float(environment(template).get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S") or 30)
        for deployment in serve_config(service)["applications"][0]["deployments"]:
            if drain_s < deployment.get("graceful_shutdown_timeout_s", 0):
                yield f"{group}: a node drains for {drain_s:g} s, {deployment['name']} for longer"
        if spec.get("terminationGracePeriodSeconds", 30) < drain_s + SIGTERM_SLACK_S:
            yield f"{group}: terminationGracePeriodSeconds ends before Ray's drain ({drain_s:g} s)"


def container_rules(container: Object) -> Iterator[str]:
    """Of one container."""
    security = container.get("securityContext", {})
    if security.get("allowPrivilegeEscalation") is not False or security.get("capabilities", {}).get("drop") != ["ALL"]:
        yield "the container keeps capabilities"
    for probe in ("livenessProbe", "readinessProbe"):
        if probe in container:
            yield f"{probe} is KubeRay's"
    if any(port.get("name") == "metrics" for port in container.get("ports", [])):
        yield "the port metrics is KubeRay's"
    if any(mount["mountPath"] == "/dev/shm" for mount in container.get("volumeMounts", [])):
        yield "/dev/shm is KubeRay's"
    if container["image"].rpartition("/")[2].count(":") + container["image"].count("@") == 0 or container[
        "image"
    ].endswith(":latest"):
        yield f"the image {container['image']} has neither tag nor digest"
    names = [entry["name"] for entry in container.get("env", [])]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"{name} is set twice"
    for name in names:
        if name in FROM_KUBERAY:
            yield f"{name} is set by KubeRay"
    yield from settings_rules({entry["name"]: entry.get("value", "") for entry in container.get("env", [])})


def settings_rules(env: dict[str, str], args: Object | None = None) -> Iterator[str]:
    """What LoopServe would say at its start."""
    for reader in (lambda: DeploySettings.from_env(env, **(args or {})), lambda: EngineConfig.from_env(env)):
        try:
            reader()
        except (ConfigError, TypeError) as error:
            yield f"settings: {error}"


def serve_config(service: Object) -> Object:
    return yaml.safe_load(service["spec"]["serveConfigV2"])  # type: ignore[no-any-return]


def serve_rules(service: Object) -> Iterator[str]:
    """serveConfigV2 is what Serve takes, and nothing in it would be dropped silently."""
    config = serve_config(service)
    try:
        ServeDeploySchema.model_validate(config)
    except ValueError as error:
        yield f"serveConfigV2: {error}"
        return
    yield from _unknown("serveConfigV2", config, ServeDeploySchema)
    yield from _unknown("http_options", config.get("http_options", {}), HTTPOptionsSchema)
    if config.get("proxy_location") != "EveryNode":
        yield "proxy_location is not EveryNode: KubeRay's workers would never be ready"
    if config.get("http_options", {}).get("port", 8000) != 8000:
        yield "http_options.port is not the port that KubeRay checks"
    for application in config["applications"]:
        yield from _unknown(application["name"], application, ServeApplicationSchema)
        module, _, attribute = application["import_path"].partition(":")
        try:
            getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            yield f"import_path {application['import_path']}: {error}"
        yield from settings_rules(application.get("runtime_env", {}).get("env_vars", {}), application.get("args", {}))
        for deployment in application["deployments"]:
            yield from _unknown(deployment["name"], deployment, DeploymentSchema)
            yield from _unknown(deployment["name"], deployment.get("ray_actor_options", {}), RayActorOptionsSchema)
            if deployment["name"] == "Autopilot":
                try:
                    AutopilotSettings(**deployment.get("user_config", {}))
                except (ConfigError, TypeError) as error:
                    yield f"Autopilot.user_config: {error}"


def _unknown(where: str, given: Object, model: Any) -> Iterator[str]:
    for key in given.keys() - model.model_fields.keys():
        yield f"{where}: {model.__name__} knows no {key!r}"


def placement_rules(service: Object) -> Iterator[str]:
    """For every replica there is a group of workers that can hold it, and GPU engines do not share a node."""
    groups = cluster_of(service)["workerGroupSpecs"]
    for deployment in serve_config(service)["applications"][0]["deployments"]:
        options = deployment.get("ray_actor_options")
        if options is None:
            continue
        wanted = {
            "cpu": options.get("num_cpus", 0),
            "nvidia.com/gpu": options.get("num_gpus", 0),
            **options.get("resources", {}),
        }
        if not wanted["cpu"]:
            yield f"{deployment['name']}: asks for no CPU, so it may land on the head"
        if not any(_holds(group, wanted) for group in groups):
            yield f"{deployment['name']}: no worker group has {wanted}"
        if wanted["nvidia.com/gpu"] and deployment.get("max_replicas_per_node") != 1:
            yield f"{deployment['name']}: max_replicas_per_node of GPU engines is not 1"


def _holds(group: Object, wanted: dict[str, float]) -> bool:
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    offered = {name: quantity(value) for name, value in {**limits, **group.get("resources", {})}.items()}
    return all(offered.get(name, 0.0) >= amount for name, amount in wanted.items())


def quantity(value: Any) -> float:
    """A Kubernetes quantity as a number."""
    units = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "": 1.0}
    number, unit = re.fullmatch(r"([\d.]+)([A-Za-z]*)", str(value)).groups()  # type: ignore[union-attr]
    return float(number) * units[unit]


def neighbour_rules(service: Object, objects: list[Object]) -> Iterator[str]:
    """Selectors, ports and names by which the other objects mean the pods and services of this one."""
    pods = {}
    for group, template in templates(service):
        node = "head" if group == "head" else "worker"
        ports = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
        pods[group] = ({**template["metadata"]["labels"], "ray.io/node-type": node}, {**ports, "metrics": 8080})
        for constraint in template["spec"].get("topologySpreadConstraints", []):
            if not _selects(constraint["labelSelector"], pods[group][0]):
                yield f"{group}: its topology spread selects other pods"
    claims = {entry["metadata"]["name"] for entry in objects if entry["kind"] == "PersistentVolumeClaim"}
    for group, template in templates(service):
        for volume in template["spec"].get("volumes", []):
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim is not None and claims and claim not in claims:
                yield f"{group}: nobody makes the claim {claim}"
    policies = [entry["spec"] for entry in objects if entry["kind"] == "NetworkPolicy"]
    for entry in objects:
        name, spec = f"{entry['kind']} {entry['metadata']['name']}", entry.get("spec", {})
        if entry["kind"] == "PodDisruptionBudget":
            if "maxUnavailable" in spec or not isinstance(spec.get("minAvailable"), int):
                yield f"{name}: a RayCluster has no scale, so only a whole minAvailable works"
            if not any(_selects(spec["selector"], labels) for labels, _ in pods.values()):
                yield f"{name}: selects no pod"
        if entry["kind"] == "PodMonitor":
            selected = [ports for labels, ports in pods.values() if _selects(spec["selector"], labels)]
            if not selected:
                yield f"{name}: selects no pod"
            for endpoint in spec["podMetricsEndpoints"]:
                for ports in selected:
                    if endpoint["port"] not in ports:
                        yield f"{name}: a pod has no port {endpoint['port']}"
                    elif not all(_lets_in(policy, ports[endpoint["port"]]) for policy in policies):
                        yield f"{name}: the network policy keeps Prometheus from port {endpoint['port']}"
        if entry["kind"] == "NetworkPolicy" and not all(
            _selects(spec["podSelector"], labels) for labels, _ in pods.values()
        ):
            yield f"{name}: leaves pods out"
        if entry["kind"] == "Ingress":
            for path in (path for rule in spec["rules"] for path in rule["http"]["paths"]):
                backend = path["backend"]["service"]["name"]
                if backend != f"{service['metadata']['name']}-serve-svc":
                    yield f"{name}: {backend} is not the service that KubeRay makes"


def _selects(selector: Object, labels: dict[str, str]) -> bool:
    return labels.items() >= selector.get("matchLabels", {}).items()


def _lets_in(policy: Object, port: int) -> bool:
    """Whether Prometheus' namespace may reach the port."""
    for rule in policy["ingress"]:
        namespaces = [peer.get("namespaceSelector", {}).get("matchLabels", {}) for peer in rule.get("from", [])]
        if MONITORING in namespaces and port in [entry["port"] for entry in rule.get("ports", [])]:
            return True
    return False
