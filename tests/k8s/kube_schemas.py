"""Whether an API server would take an object: built-in kinds by kubernetes-validate, custom ones by their CRDs.

A CRD is read as the API server reads it: null values are pruned, defaults applied, unknown fields are an error (as with
`--validate=strict`), lists of type map have no two entries with the same keys.
"""

import os
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

KUBERNETES = "1.34"
CRDS = {
    "RayService": "kuberay-v1.7.0/ray.io_rayservices.yaml",
    "PodMonitor": "monitoring.coreos.com_podmonitors.yaml",
    "ServiceMonitor": "monitoring.coreos.com_servicemonitors.yaml",
    "PrometheusRule": "monitoring.coreos.com_prometheusrules.yaml",
}


def schema_problems(entry: dict[str, Any]) -> list[str]:
    """What an API server would say against one object. Skips the test where the CRDs are not at hand."""
    if entry["kind"] in CRDS:
        return _custom_problems(entry)
    return _builtin_problems(entry)


def pod_problems(template: dict[str, Any]) -> list[str]:
    """The same of a pod template, as the pod that will be made of it."""
    pod = {"apiVersion": "v1", "kind": "Pod", **deepcopy(template)}
    pod["metadata"] = {**pod.get("metadata", {}), "name": "pod"}
    return _builtin_problems(pod)


def _builtin_problems(entry: dict[str, Any]) -> list[str]:
    try:
        kubernetes_validate.validate(_pruned(entry), KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{entry['kind']} at {'.'.join(map(str, error.path))}: {error.message}"]
    return []


def _custom_problems(entry: dict[str, Any]) -> list[str]:
    schema, strict = _crd(entry["kind"], entry["apiVersion"])
    filled = _with_defaults(_pruned(entry), schema)
    found = [
        f"{entry['kind']} at {'.'.join(map(str, error.path))}: {error.message[:300]}"
        for error in jsonschema.Draft7Validator(strict).iter_errors(filled)
    ]
    return found + _duplicates(filled, schema, entry["kind"])


@cache
def _crd(kind: str, api_version: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A kind's schema, as it stands and made strict."""
    folder = os.environ.get("SCHEMAS_DIR")
    if not folder or not (Path(folder) / "crds").is_dir():
        pytest.skip("SCHEMAS_DIR names no directory with the CRDs: custom resources are NOT checked")
    crd = yaml.load((Path(folder) / "crds" / CRDS[kind]).read_text(), Loader=yaml.CSafeLoader)
    assert f"{crd['spec']['group']}/" in api_version, f"{api_version} is not of {crd['spec']['group']}"
    versions = {f"{crd['spec']['group']}/{version['name']}": version for version in crd["spec"]["versions"]}
    schema = versions[api_version]["schema"]["openAPIV3Schema"]
    return schema, _strict(schema)


def _strict(schema: Any) -> Any:
    """JSON schema of a structural schema: unknown fields forbidden unless it says otherwise."""
    if isinstance(schema, list):
        return [_strict(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _strict(value) for key, value in schema.items() if key not in ("properties", "default", "format")}
    if schema.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
        made.pop("anyOf", None)
    if "properties" in schema:
        made["properties"] = {name: _strict(entry) for name, entry in schema["properties"].items()}
    is_object = schema.get("type") == "object"
    if is_object and "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        is_bare_metadata = "properties" not in schema  # `metadata: {type: object}` is the API server's own
        if not is_bare_metadata:
            made["additionalProperties"] = False
    return made


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pruned(entry) for key, entry in value.items() if entry is not None}
    return [_pruned(entry) for entry in value] if isinstance(value, list) else value


def _with_defaults(value: Any, schema: dict[str, Any]) -> Any:
    if isinstance(value, list):
        return [_with_defaults(entry, schema.get("items", {})) for entry in value]
    if not isinstance(value, dict):
        return value
    filled = dict(value)
    for name, entry in schema.get("properties", {}).items():
        if name not in filled and "default" in entry:
            filled[name] = entry["default"]
        if name in filled:
            filled[name] = _with_defaults(filled[name], entry)
    return filled


def _duplicates(value: Any, schema: dict[str, Any], path: str) -> list[str]:
    """Entries of map-like lists that have the same keys."""
    if isinstance(value, dict):
        inner = schema.get("properties", {})
        return [
            text for name, entry in value.items() for text in _duplicates(entry, inner.get(name, {}), f"{path}.{name}")
        ]
    if not isinstance(value, list):
        return []
    found = [text for entry in value for text in _duplicates(entry, schema.get("items", {}), path)]
    keys = schema.get("x-kubernetes-list-map-keys")
    if keys:
        seen = [tuple(entry.get(key) for key in keys) for entry in value]
        found += [
            f"{path}: two entries with {dict(zip(keys, key, strict=True))}" for key in set(seen) if seen.count(key) > 1
        ]
    return found
