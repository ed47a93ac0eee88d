"""The chart, as the tests see it: the script that renders it, and its objects as Python has them."""

import importlib.util
import json
from collections.abc import Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]

_spec = importlib.util.spec_from_file_location("k8s_render", ROOT / "k8s" / "render.py")
assert _spec is not None and _spec.loader is not None
script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(script)

Objects = list[dict[str, Any]]


def objects_of(values: Mapping[str, Any], *, name: str = "loopserve") -> Objects:
    """Everything that the chart makes of `values`."""
    return deepcopy(_objects_of(json.dumps(values), name))


@cache
def _objects_of(values: str, name: str) -> Objects:
    return list(
        yaml.load_all(script.render(json.loads(values), name=name), Loader=yaml.CSafeLoader)
    )  # in C: dashboards are long


def changed(values: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of `values` with one of them set; `path` has dots, and numbers for places in a list."""
    copy = deepcopy(dict(values))
    place: Any = copy
    *way, last = path.split(".")
    for step in way:
        place = place[int(step)] if isinstance(place, list) else place.setdefault(step, {})
    place[int(last) if isinstance(place, list) else last] = value
    return copy


def only(objects: Objects, kind: str) -> dict[str, Any]:
    """The one object of a kind."""
    found = [entry for entry in objects if entry["kind"] == kind]
    assert len(found) == 1, f"{len(found)} objects of kind {kind}"
    return found[0]


def serve_config(objects: Objects) -> dict[str, Any]:
    """What the RayService sends to Serve."""
    config: dict[str, Any] = yaml.safe_load(only(objects, "RayService")["spec"]["serveConfigV2"])
    return config
