"""Everything under k8s/ that follows from something else, written again by `make manifests`; `--check` only says what is out of date.

    chart/values.schema.json     the names and types of settings, from the records that read them
    chart/files/                 alert rules and dashboards, copied: Helm reads only files inside of a chart
    manifests/<set>.yaml         the chart with values/<set>.yaml, for clusters without Helm
    manifests/dashboards.yaml    the dashboards, which are the same in every set

Rendering contacts no cluster. The same input gives the same bytes: name and namespace are fixed, and nothing in the chart is random.
"""

import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from helm_python.chart import Chart
from pydantic import TypeAdapter

from deploy.autopilot.settings import AutopilotSettings, PilotMode
from deploy.settings import DeploySettings
from loopserve.config import EngineConfig

HERE = Path(__file__).resolve().parent
CHART = HERE / "chart"
VALUES = HERE / "values"
MANIFESTS = HERE / "manifests"
SCHEMA = CHART / "values.schema.json"
MONITORING = HERE.parent / "monitoring"

RELEASE = "loopserve"
NAMESPACE = "loopserve"
HEADER = "# Written by `make manifests` from k8s/chart and k8s/values/{name}.yaml; change those.\n"
SHARED_TEMPLATE, SHARED_SET, SHARED = "dashboards.yaml", "gpu-fleet", "dashboards"

# What the chart sets from a value of its own, or what has no meaning in a cluster.
NOT_SERVING = ("host", "port", "replicas", "ingress_replicas", "topology", "local_direct", "model", "device", "gpus_per_replica",
               "stop_timeout_s", "autopilot", "keys_file")  # fmt: skip
NOT_ENGINE = ("model", "device")
RECORDS: Mapping[str, tuple[type, tuple[str, ...]]] = {
    "serveSettings": (DeploySettings, NOT_SERVING),
    "engineSettings": (EngineConfig, NOT_ENGINE),
    "autopilotSettings": (AutopilotSettings, ()),
}
CHOICES: Mapping[str, tuple[str, ...]] = {"AutopilotSettings.mode": tuple(PilotMode)}  # text that is one of few


def value_sets() -> list[str]:
    """The names of the value sets."""
    return sorted(path.stem for path in VALUES.glob("*.yaml"))


def read_values(name: str) -> dict[str, Any]:
    """One value set, as its file has it."""
    values: dict[str, Any] = yaml.safe_load((VALUES / f"{name}.yaml").read_text())
    return values


def render(values: Mapping[str, Any], *, name: str = RELEASE) -> str:
    """The chart's objects as one YAML text, after its schema and its own rules. Raises helm_python.errors.HelmError."""
    return "".join(render_templates(values, name=name).values())


def render_templates(values: Mapping[str, Any], *, name: str = RELEASE) -> dict[str, str]:
    """The same by template, in the order of their names; templates that make nothing are left out."""
    with Chart.load(CHART) as chart:
        chart.validate_schema(dict(values))
        rendered = chart.render(dict(values), name=name, namespace=NAMESPACE)
    texts = {Path(path).name: "".join(_objects(rendered[path])) for path in sorted(rendered) if path.endswith(".yaml")}
    return {template: text for template, text in texts.items() if text}


def _objects(rendered: str) -> Iterator[str]:
    """Every object of one rendered template, with its namespace."""
    for text in re.split(r"^---\s*$", rendered, flags=re.MULTILINE):
        if re.search(r"^\w", text, flags=re.MULTILINE):  # more than comments
            named = re.sub(r"^metadata:\n", f"metadata:\n  namespace: {NAMESPACE}\n", text.strip(), flags=re.MULTILINE)
            yield f"---\n{named}\n"


def settings_schema(record: type, excluded: tuple[str, ...] = ()) -> dict[str, Any]:
    """A settings record as JSON schema: its fields, their types, and as descriptions the comments beside them."""
    properties = {}
    comments = _comments(record)
    for entry in fields(record):
        if entry.name in excluded:
            continue
        kind: Any = entry.type
        schema = settings_schema(kind) if is_dataclass(kind) else TypeAdapter[Any](kind).json_schema()
        choices = CHOICES.get(f"{record.__name__}.{entry.name}")
        if choices:
            schema["enum"] = list(choices)
        properties[entry.name] = {"description": comments.get(entry.name, f"{record.__name__}.{entry.name}"), **schema}
    description = inspect.getdoc(record) or record.__name__
    return {"type": "object", "description": description, "additionalProperties": False, "properties": properties}


def _comments(record: type) -> dict[str, str]:
    """The trailing comment of every field."""
    found = re.findall(r"^    (\w+): [^#\n]*  # (.+)$", inspect.getsource(record), flags=re.MULTILINE)
    return dict(found)


def chart_files() -> dict[Path, str]:
    """What lies inside of the chart: every derived file and its contents."""
    schema = json.loads(SCHEMA.read_text())
    schema["definitions"] |= {name: settings_schema(*source) for name, source in RECORDS.items()}
    files = {SCHEMA: json.dumps(schema, indent=2) + "\n"}
    for source in sorted((MONITORING / "alerts").glob("*.yaml")):
        if "groups" in (yaml.safe_load(source.read_text()) or {}):  # rules, not the tests of rules
            files[CHART / "files" / "alerts" / source.name] = source.read_text()
    for source in sorted((MONITORING / "dashboards").glob("*.json")):
        files[CHART / "files" / "dashboards" / source.name] = source.read_text()
    return files


def manifests() -> dict[Path, str]:
    """The rendered value sets, and what they share."""
    files = {}
    for name in value_sets():
        templates = render_templates(read_values(name))
        shared = templates.pop(SHARED_TEMPLATE, "")
        if name == SHARED_SET and shared:
            files[MANIFESTS / f"{SHARED}.yaml"] = HEADER.format(name=name) + shared
        files[MANIFESTS / f"{name}.yaml"] = HEADER.format(name=name) + "".join(templates.values())
    return files


def stale(wanted: Mapping[Path, str]) -> list[Path]:
    """Files that differ from what they should be."""
    return [path for path, text in wanted.items() if not path.is_file() or path.read_text() != text]


def leftover(wanted: Mapping[Path, str]) -> list[Path]:
    """Files that nothing leads to any more."""
    there = [*CHART.glob("files/*/*.yaml"), *CHART.glob("files/*/*.json"), *MANIFESTS.glob("*.yaml")]
    return [path for path in there if path not in wanted]


def main(arguments: list[str]) -> int:
    """Write what is out of date, or with `--check` only name it and fail."""
    check = arguments == ["--check"]
    copied = chart_files()
    changed = stale(copied)
    if not check:
        _write(copied, changed)
    rendered = manifests()  # of the chart as it now lies there
    outdated = stale(rendered)
    if not check:
        _write(rendered, outdated)
    changed += outdated
    extra = leftover({**copied, **rendered})
    for path in extra if not check else ():
        path.unlink()
    for path in [*changed, *extra]:
        print(("out of date: " if check else "written: ") + str(path.relative_to(HERE.parent)))
    return int(check and bool(changed or extra))


def _write(wanted: Mapping[Path, str], paths: list[Path]) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted[path])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
