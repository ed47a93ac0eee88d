"""`python -m monitoring.drawing PROMETHEUS_URL FOLDER [MINUTES]`: dashboard-<name>.png of every board, over the last minutes."""

import sys
import time
from pathlib import Path

import httpx

from monitoring.dashboards import BOARDS
from monitoring.drawing.answers import Span, answered
from monitoring.drawing.pictures import draw


def main(address: str, folder: Path, minutes: float) -> None:
    """Ask, then draw."""
    end_s = time.time()
    span = Span(end_s - 60 * minutes, end_s)
    with httpx.Client(base_url=address, timeout=30.0, trust_env=False) as prometheus:
        boards = {folder / f"dashboard-{b.name}.png": answered(b, prometheus, span) for b in BOARDS}
    folder.mkdir(parents=True, exist_ok=True)
    draw(boards)
    for path in boards:
        print(f"{path}: {path.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]) if len(sys.argv) > 3 else 5.0)
