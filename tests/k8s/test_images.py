"""The images' Dockerfiles, as far as they can be read without building: what they copy is there, and they agree with package and chart."""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from rendering import ROOT, script

FILES = sorted((ROOT / "k8s" / "docker").glob("*.Dockerfile"))
INSTRUCTIONS = {"ARG", "FROM", "ENV", "WORKDIR", "RUN", "COPY", "USER", "EXPOSE", "CMD"}
VALUES = yaml.safe_load((script.CHART / "values.yaml").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@dataclass(frozen=True, slots=True)
class Instruction:
    name: str
    rest: str


def instructions(path: Path) -> list[Instruction]:
    """A Dockerfile's instructions, continued lines joined, comments left out."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines()]


def stages(path: Path) -> list[list[Instruction]]:
    """The instructions by stage; what stands before the first FROM belongs to none."""
    found: list[list[Instruction]] = []
    for entry in instructions(path):
        if entry.name == "FROM":
            found.append([])
        if found:
            found[-1].append(entry)
    return found


def all_of(entries: list[Instruction], name: str) -> list[str]:
    return [entry.rest for entry in entries if entry.name == name]


def test_there_is_an_image_for_cpus_and_one_for_gpus():
    assert [path.name for path in FILES] == ["cpu.Dockerfile", "cuda.Dockerfile"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_line_is_an_instruction_and_every_variable_is_declared(path: Path):
    assert {entry.name for entry in instructions(path)} <= INSTRUCTIONS
    assert instructions(path)[0] == Instruction("ARG", all_of(instructions(path), "ARG")[0])
    declared = {rest.split("=")[0] for rest in all_of(instructions(path), "ARG")}
    used = {name for rest in all_of(instructions(path), "FROM") for name in re.findall(r"\$\{(\w+)\}", rest)}
    assert used == {"BASE_IMAGE"} <= declared
    assert re.fullmatch(
        r"BASE_IMAGE=[\w./-]+:[\w.-]+", all_of(instructions(path), "ARG")[0]
    )  # a named tag, no digest made up


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_copied_is_there_and_travels_to_the_builder(path: Path):
    build, final = stages(path)
    copied = [source for rest in all_of(build, "COPY") for source in rest.split()[:-1]]
    assert [source for source in copied if not (ROOT / source).exists()] == []
    sent = path.with_name(path.name + ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in sent if line.startswith("!")} == set(copied)
    packages = {name.rstrip("*") for name in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages <= set(copied)
    (from_build,) = all_of(final, "COPY")
    assert from_build.startswith("--from=build /opt/loopserve ")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_packages_are_installed_as_resolved_and_from_where_the_builder_says(path: Path):
    build, final = stages(path)
    assert any("pip install --constraint constraints.txt ." in rest for rest in all_of(build, "RUN"))
    assert {"PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"} <= set(all_of(build, "ARG"))
    assert "://" not in path.read_text() and "--index-url" not in path.read_text()
    assert not any("pip" in rest for rest in all_of(final, "RUN"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_image_agrees_with_the_chart(path: Path):
    final = stages(path)[-1]
    user = VALUES["cluster"]["runAsUser"]
    assert all_of(final, "USER") == [f"{user}:{user}"]
    assert f"--uid {user}" in " ".join(all_of(final, "RUN"))
    assert f"HF_HOME={VALUES['cluster']['modelCache']['mountPath']}" in " ".join(all_of(final, "ENV"))
    assert "wget" in " ".join(all_of(final, "RUN"))  # of KubeRay's readiness probe
    assert all_of(final, "EXPOSE") == ["8000"]
    constraints = (ROOT / "constraints.txt").read_text()
    assert f"ray=={VALUES['cluster']['rayVersion']}\n" in constraints


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_python_of_the_image_is_one_that_the_package_runs_on(path: Path):
    minor = re.search(r"python:3\.(\d+)", path.read_text())
    assert minor is not None and PROJECT["project"]["requires-python"] == ">=3.11"
    assert int(minor.group(1)) in (11, 12)  # what is tested
