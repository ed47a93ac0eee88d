"""`router/` stands beside the floors."""

import ast
from pathlib import Path

ROUTER = Path(__file__).parents[2] / "router"


def imported(path: Path) -> set[str]:
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import | ast.ImportFrom)]
    return {(n.module or "") if isinstance(n, ast.ImportFrom) else n.names[0].name for n in nodes}


def test_router_imports_nothing_of_loopserve_and_ray_in_one_file_only():
    for path in ROUTER.glob("*.py"):
        roots = {name.partition(".")[0] for name in imported(path)}
        assert not roots & {"loopserve", "deploy", "monitoring"}, path
        assert "ray" not in roots or path.name == "ray_router.py", path
