"""Structure: who may import whom. The table below is the map in ARCHITECTURE.md, and a test holds the two together.

Imports are read from the source, so a rule holds for code that no test runs. Imports under `TYPE_CHECKING` count for the
floors (a file that names a type knows the room it comes from), not for what a host-only file drags in when it runs.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("loopserve", "router", "deploy", "monitoring")


# floor | room | room beside it. "-": a house of its own beside the floors. A trailing star: runs on the host only, so it never
# reaches torch, not even through what it imports.
MAP = """\
9 | deploy/ loopserve/__main__.py
8 | loopserve/cli/
7 | loopserve/evaluation/ loopserve/tuning/
6 | loopserve/engine.py loopserve/handoff.py loopserve/keeper.py loopserve/archive.py loopserve/chat.py \
| loopserve/bench/* loopserve/chunks.py*
5 | loopserve/runner.py | loopserve/memory.py*
4 | loopserve/attention.py loopserve/layout.py loopserve/graphs.py loopserve/turn_table.py \
loopserve/loading.py loopserve/sampler.py | loopserve/scheduler.py* loopserve/room.py* loopserve/orders.py* \
loopserve/turn.py*
3 | loopserve/sparsity/ | loopserve/sessions.py* loopserve/quality.py* loopserve/admission.py* \
loopserve/detokenizer.py* loopserve/transcripts.py* loopserve/move_cost.py*
2 | loopserve/kv/__init__.py* loopserve/kv/pool.py* loopserve/kv/cache.py* loopserve/kv/store.py loopserve/kv/stage.py \
loopserve/kv/working_set.py loopserve/kv/sealed.py loopserve/kv/image.py loopserve/kv/disk/ loopserve/transfer.py
1 | loopserve/kernels/
0 | loopserve/__init__.py* loopserve/errors.py* loopserve/environment.py* loopserve/config.py* loopserve/crossover.py* \
loopserve/methods.py* loopserve/reads.py* loopserve/dialogue.py* loopserve/plan.py* loopserve/stats.py* loopserve/notes.py*
- | router/* | monitoring/*
"""


@dataclass(frozen=True)
class Room:
    """Files that may import each other, and any room on a lower floor. `floor` None: beside the floors."""

    floor: int | None
    paths: tuple[str, ...]  # files, or folders ending in "/"
    host_only: frozenset[str]  # those of `paths` that never reach torch


def rooms_on(line: str) -> Iterator[Room]:
    """The rooms that one line of the map draws."""
    floor, *rooms = line.split("|")
    for names in (room.split() for room in rooms):
        paths = tuple(name.removesuffix("*") for name in names)
        yield Room(
            None if floor.strip() == "-" else int(floor), paths, frozenset(n[:-1] for n in names if n.endswith("*"))
        )


ROOMS = tuple(room for line in MAP.splitlines() for room in rooms_on(line))
RECORDS_FLOOR = 0
DEPLOY, CLI, KERNELS, MONITORING = (
    next(room for room in ROOMS if name in room.paths)
    for name in ("deploy/", "loopserve/cli/", "loopserve/kernels/", "monitoring/")
)

# Where a foreign package may be imported at all.
FOREIGN_HOMES = {
    "ray": ("deploy/", "router/ray_router.py"),
    "fastapi": ("deploy/",),
    "starlette": ("deploy/",),
    "uvicorn": ("deploy/",),
    "prometheus_client": ("monitoring/",),
    "opentelemetry": ("monitoring/tracing.py",),
    "pynvml": ("monitoring/gpu.py",),
    "typer": ("loopserve/cli/", "loopserve/__main__.py"),
}
TORCH_BEARING = frozenset({"torch", "triton", "transformers", "accelerate"})


@dataclass(frozen=True)
class Import:
    """One imported module, as a dotted name; for `from a import b` it is `a.b` where that is a module of ours, else `a`."""

    module: str
    line: int
    inside_function: bool
    typing_only: bool


def covers(path: str, pattern: str) -> bool:
    """Whether a pattern of the table (a file, or a folder ending in a slash) covers a path."""
    return path.startswith(pattern) if pattern.endswith("/") else path == pattern


def room_of(path: str) -> Room | None:
    """The room a file belongs to, None where the map does not know it."""
    return next((room for room in ROOMS if any(covers(path, pattern) for pattern in room.paths)), None)


def file_of(root: Path, module: str) -> str | None:
    """The path, relative to root, of one of our own modules; None for a foreign or a missing one."""
    if module.split(".")[0] not in PACKAGES:
        return None
    base = module.replace(".", "/")
    return next((path for path in (f"{base}.py", f"{base}/__init__.py") if (root / path).is_file()), None)


def imports_of(root: Path, path: str) -> Iterator[Import]:
    """Every import of one file, wherever in it it stands."""
    tree = ast.parse((root / path).read_text(encoding="utf-8"), path)
    package = path.removesuffix(".py").removesuffix("/__init__").split("/")
    if not path.endswith("/__init__.py"):
        package = package[:-1]

    def walk(node: ast.AST, inside_function: bool, typing_only: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for name in child.names:
                    yield Import(name.name, child.lineno, inside_function, typing_only)
            elif isinstance(child, ast.ImportFrom):
                above = package[: len(package) - child.level + 1] if child.level else []
                base = ".".join([*above, *([child.module] if child.module else [])])
                for name in child.names:
                    module = f"{base}.{name.name}"
                    yield Import(module if file_of(root, module) else base, child.lineno, inside_function, typing_only)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                yield from walk(ast.Module(child.body, []), inside_function, True)
                yield from walk(ast.Module(child.orelse, []), inside_function, typing_only)
            else:
                is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, inside_function or is_function, typing_only)

    return walk(tree, False, False)


def direction_fault(path: str, found: Import, target_path: str) -> str | None:
    """Why one import between our own files is not allowed; None where it is."""
    source, target = room_of(path), room_of(target_path)
    if source is None or target is None or source is target:
        return None  # files off the map are reported by themselves
    if source.floor is None:
        if source is MONITORING and target.floor == RECORDS_FLOOR:
            return None
        return f"{path}:{found.line}: {source.paths[0]} stands beside the floors, but imports {target_path}"
    if source is KERNELS:
        return f"{path}:{found.line}: kernels import nothing of ours, but this imports {target_path}"
    if target.floor is None:
        return None if source is DEPLOY else f"{path}:{found.line}: only deploy/ imports {target_path}"
    if source is CLI and target is DEPLOY and found.inside_function:
        return None  # lazily: a library user without a cluster never loads Ray
    if target.floor < source.floor:
        return None
    where = "above" if target.floor > source.floor else "beside"
    return f"{path}:{found.line}: floor {source.floor} imports {target_path} {where} it (floor {target.floor})"


def foreign_faults(path: str, imports: list[Import]) -> Iterator[str]:
    """Foreign packages imported outside their homes."""
    for found in imports:
        homes = FOREIGN_HOMES.get(found.module.split(".")[0])
        if homes is not None and not any(covers(path, home) for home in homes):
            yield f"{path}:{found.line}: {found.module} belongs in {', '.join(homes)} only"


def torch_chain(root: Path, path: str, graph: dict[str, list[Import]]) -> list[str] | None:
    """The files from `path` to the first that imports torch or what brings it, with that import last; None if there is none.

    Importing a module runs the `__init__` of every package above it, so these count as imported too.
    """
    chains, seen = [[path]], {path}
    while chains:
        chain = chains.pop(0)
        for found in graph[chain[-1]]:
            if found.typing_only:
                continue
            if found.module.split(".")[0] in TORCH_BEARING:
                return [*chain, found.module]
            parts = found.module.split(".")
            for depth in range(1, len(parts) + 1):
                target = file_of(root, ".".join(parts[:depth]))
                if target is not None and target not in seen:
                    seen.add(target)
                    chains.append([*chain, target])
    return None


def is_host_only(path: str) -> bool:
    """Whether the table forbids a file to reach torch."""
    return any(covers(path, pattern) for room in ROOMS for pattern in room.host_only)


def faults_of(root: Path) -> list[str]:
    """Everything in the tree under `root` that breaks the map, one sentence each."""
    paths = sorted(p.relative_to(root).as_posix() for package in PACKAGES for p in (root / package).rglob("*.py"))
    graph = {path: list(imports_of(root, path)) for path in paths}
    faults = [f"{path}: is on no floor; add it to the map" for path in paths if room_of(path) is None]
    for path, imports in graph.items():
        targets = [(found, file_of(root, found.module)) for found in imports]
        faults += [f for found, target in targets if target and (f := direction_fault(path, found, target))]
        faults += foreign_faults(path, imports)
        if is_host_only(path) and (chain := torch_chain(root, path, graph)):
            faults.append(f"{path}: runs on the host only, but reaches {' -> '.join(chain[1:])}")
    return faults


def write_tree(root: Path, files: dict[str, str]) -> Path:
    """A small tree with the given sources."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def test_every_file_imports_only_from_floors_below_it() -> None:
    assert faults_of(ROOT) == []


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        (
            {"loopserve/plan.py": "from loopserve.engine import Engine\n", "loopserve/engine.py": ""},
            "engine.py above it",
        ),
        (
            {"loopserve/plan.py": "from loopserve import engine\n", "loopserve/engine.py": ""},
            "loopserve/engine.py above it",
        ),
        (
            {"loopserve/plan.py": "def f():\n    import loopserve.engine\n", "loopserve/engine.py": ""},
            "engine.py above it",
        ),
        (
            {"loopserve/sessions.py": "from loopserve.sparsity import lines\n", "loopserve/sparsity/lines.py": ""},
            "lines.py beside it",
        ),
        (
            {"loopserve/scheduler.py": "from .attention import plan\n", "loopserve/attention.py": ""},
            "attention.py beside it",
        ),
        (
            {
                "loopserve/scheduler.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import loopserve.runner\n",
                "loopserve/runner.py": "",
            },
            "runner.py above it",
        ),
        (
            {"loopserve/kernels/ops.py": "import loopserve.errors\n", "loopserve/errors.py": ""},
            "kernels import nothing of ours",
        ),
        ({"loopserve/cli/serve.py": "import deploy.app\n", "deploy/app.py": ""}, "app.py above it"),
        (
            {"router/affinity.py": "from loopserve import errors\n", "loopserve/errors.py": ""},
            "stands beside the floors",
        ),
        (
            {"monitoring/gpu.py": "from loopserve import engine\n", "loopserve/engine.py": ""},
            "stands beside the floors",
        ),
        ({"loopserve/engine.py": "import monitoring.catalogue\n", "monitoring/catalogue.py": ""}, "only deploy/"),
        ({"loopserve/engine.py": "def f():\n    import ray.serve\n"}, "ray.serve belongs in"),
        ({"router/affinity.py": "import ray\n"}, "ray belongs in"),
        ({"loopserve/chat.py": "from fastapi import FastAPI\n"}, "fastapi belongs in"),
        ({"loopserve/stats.py": "import prometheus_client\n"}, "prometheus_client belongs in"),
        ({"loopserve/kv/pool.py": "import torch\n"}, "reaches torch"),
        (
            {
                "loopserve/scheduler.py": "import loopserve.kv.cache\n",
                "loopserve/kv/cache.py": "def f():\n    from loopserve.kv.store import KVStore\n",
                "loopserve/kv/store.py": "from torch import Tensor\n",
            },
            "scheduler.py: runs on the host only, but reaches loopserve/kv/cache.py -> loopserve/kv/store.py -> torch",
        ),
        (
            {
                "loopserve/scheduler.py": "import loopserve.kv.pool\n",
                "loopserve/kv/__init__.py": "import torch\n",
                "loopserve/kv/pool.py": "",
            },
            "scheduler.py: runs on the host only, but reaches loopserve/kv/__init__.py -> torch",
        ),
        ({"loopserve/helpers.py": ""}, "helpers.py: is on no floor"),
    ],
)
def test_a_file_that_breaks_the_map_is_caught(tmp_path: Path, files: dict[str, str], complaint: str) -> None:
    assert any(complaint in fault for fault in faults_of(write_tree(tmp_path, files)))


@pytest.mark.parametrize(
    "files",
    [
        {"loopserve/cli/serve.py": "def serve():\n    import deploy.app\n", "deploy/app.py": "import ray\n"},
        {"loopserve/chat.py": "from loopserve.engine import Engine\n", "loopserve/engine.py": "import torch\n"},
        {"router/ray_router.py": "import ray\nfrom router import affinity\n", "router/affinity.py": ""},
        {"monitoring/sink.py": "from loopserve.stats import StepStats\n", "loopserve/stats.py": ""},
        {"loopserve/detokenizer.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import transformers\n"},
    ],
)
def test_a_file_that_keeps_to_the_map_is_left_alone(tmp_path: Path, files: dict[str, str]) -> None:
    assert faults_of(write_tree(tmp_path, files)) == []


def test_the_map_in_the_architecture_page_is_the_table_that_is_checked() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    block = re.search(r"```floors\n(.*?)```", page, re.DOTALL)
    assert block is not None, "ARCHITECTURE.md has lost its ```floors block"
    assert block[1] == MAP


def test_every_file_that_the_architecture_page_names_is_there() -> None:
    page = re.sub(r"```floors\n.*?```", "", (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    named = set(re.findall(r"[\w/]+\.py", page)) - {"kernel.py", "reference.py"}  # of any folder in kernels/
    assert len(named) > 15
    assert [
        name for name in sorted(named) if not (ROOT / name).exists() and not (ROOT / "loopserve" / name).exists()
    ] == []
