"""The Grafana dashboards: one file each, made into JSON by `python -m monitoring.dashboards`, which is committed beside them.

Needs the extra `test` (grafana-foundation-sdk). The service never imports this package.
"""

from pathlib import Path

from monitoring.dashboards import autoscaling, compression, engine, hardware, overview, sessions
from monitoring.dashboards.panels import Board

BOARDS: tuple[Board, ...] = (
    overview.BOARD,
    engine.BOARD,
    sessions.BOARD,
    compression.BOARD,
    autoscaling.BOARD,
    hardware.BOARD,
)


def path_of(board: Board) -> Path:
    """Where its JSON lies."""
    return Path(__file__).parent / f"{board.name}.json"
