"""The guide agrees with the chart: its commands render, its values and files exist, its names are those that come out."""

import json
import re
import shlex
from itertools import pairwise
from typing import Any

import pytest
import yaml
from rendering import ROOT, objects_of, script

GUIDE = (ROOT / "docs" / "kubernetes.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", GUIDE, flags=re.DOTALL | re.MULTILINE)
COMMANDS = [line for block in BLOCKS for line in re.sub(r"\\\n", " ", block).splitlines() if line.strip()]
CHART_COMMANDS = [line for line in COMMANDS if "k8s/chart" in line]
SCHEMA = json.loads(script.SCHEMA.read_text())


def is_value(path: str) -> bool:
    """Whether the chart's schema knows a dotted name."""
    place: Any = SCHEMA
    for step in path.split("."):
        while "allOf" in place:
            place = SCHEMA["definitions"][place["allOf"][0]["$ref"].rsplit("/")[-1]]
        if isinstance(place.get("additionalProperties"), dict):
            return True
        if step not in place.get("properties", {}):
            return False
        place = place["properties"][step]
    return True


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """As helm merges values: maps by key, everything else replaced."""
    both = {key: merged(base[key], over[key]) for key in base.keys() & over.keys() if isinstance(base[key], dict)}
    return {**base, **over, **both}


def values_of(command: str) -> dict[str, Any]:
    """What a helm command of the guide gives to the chart; shell variables stand for some text."""
    words = shlex.split(re.sub(r"\$DIGEST", "sha256:" + "0" * 64, command).replace("$REGISTRY", "registry.example.com"))
    values: dict[str, Any] = {}
    for flag, word in pairwise(words):
        if flag == "-f":
            values = merged(values, yaml.safe_load((ROOT / word).read_text()))
        if flag in ("--set", "--set-string"):
            path, _, text = word.partition("=")
            value: Any = text if flag == "--set-string" else yaml.safe_load(text)
            for step in reversed(path.split(".")):
                value = {step: value}
            values = merged(values, value)
    return values


def test_the_guide_installs_and_upgrades():
    assert {line.split()[1] for line in CHART_COMMANDS} == {"install", "upgrade"}


@pytest.mark.parametrize("command", CHART_COMMANDS)
def test_every_helm_command_of_the_guide_renders(command: str):
    values = values_of(command)
    assert values["cluster"]["image"]["repository"] == "registry.example.com/loopserve"
    (service,) = [entry for entry in objects_of(values) if entry["kind"] == "RayService"]
    assert service["metadata"]["name"] == command.split()[2] == "loopserve"


def test_every_value_that_the_guide_names_exists():
    parts = "|".join(name for name in SCHEMA["properties"] if name != "global")
    named = set(re.findall(rf"(?:`|--set(?:-string)? )((?:{parts})\.[\w.]+)", GUIDE))
    assert len(named) > 15
    assert [name for name in sorted(named) if not is_value(name)] == []
    assert not is_value("cluster.imag") and not is_value("tunables.autopilot.high")


def test_every_file_that_the_guide_names_exists():
    named = set(re.findall(r"(?:k8s|deploy|monitoring)/[\w./-]+\w", GUIDE))
    assert {"k8s/values/cpu-demo.yaml", "k8s/docker/cuda.Dockerfile"} <= named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_secrets_are_made_under_the_names_that_the_value_sets_use():
    made = dict(re.findall(r"create secret generic ([\w-]+) --from-(?:literal|file)=([\w.]+)", GUIDE))
    wanted = {}
    for name in script.value_sets():
        cluster = merged(yaml.safe_load((script.CHART / "values.yaml").read_text()), script.read_values(name))[
            "cluster"
        ]
        wanted |= {cluster[group]["secretName"]: cluster[group]["key"] for group in ("hubToken", "apiKeys")}
        wanted |= {cluster["gcsFaultTolerance"]["secretName"]: cluster["gcsFaultTolerance"]["passwordKey"]}
    assert made == {secret: key for secret, key in wanted.items() if secret}


def test_services_and_claims_have_the_names_that_kuberay_and_the_chart_give():
    assert set(re.findall(r"service/([\w-]+)", GUIDE)) == {"loopserve-serve-svc", "loopserve-head-svc"}
    claims = {
        entry["metadata"]["name"]
        for entry in objects_of(script.read_values("gpu-fleet"))
        if entry["kind"] == "PersistentVolumeClaim"
    }
    assert set(re.findall(r"delete persistentvolumeclaim ([\w-]+)", GUIDE)) == claims


def test_the_model_that_is_asked_is_the_one_that_is_shipped():
    shipped = {path.name for path in (ROOT / "loopserve" / "assets").iterdir() if path.is_dir()}
    assert set(re.findall(r'"model": "([\w-]+)"', GUIDE)) <= shipped
