"""The dashboards' pictures in the documentation, over minutes of load on this machine: `make pictures`.

A service with the settings of `loopserve observe`, a Prometheus, `loopserve bench` as the load; then `monitoring.drawing` draws. The load
is there to be looked at, not to be measured.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.cluster.service import running_service
from deploy.observe.demo import DEMO_ENVIRONMENT
from deploy.observe.local_prometheus import local_prometheus
from monitoring.drawing.__main__ import main as draw
from monitoring.tools import find_tool

PICTURES = Path(__file__).resolve().parents[2] / "docs" / "pictures"
MINUTES = 5.0
# Two waves of dialogues of up to 24 turns, so that the pool fills, the budget moves, and it gets quiet in between.
WAVES_S = (150, 110)
LOAD = (
    *("--number", "1000", "--concurrency", "14", "--turns", "uniform:3..24", "--input", "uniform:15..70"),
    *("--output", "uniform:12..48", "--think", "exponential:3..12", "--system", "64"),
)
ASKED = {"LOOPSERVE_AUTOPILOT__MIN_REPLICAS": "1", "LOOPSERVE_AUTOPILOT__MAX_REPLICAS": "2"}


def main() -> None:
    """Serve, load, draw."""
    prometheus = find_tool("prometheus")
    if prometheus is None:
        sys.exit("There is no prometheus here; `make tools` fetches it, or name it with $PROMETHEUS.")
    with (
        tempfile.TemporaryDirectory() as folder,
        running_service({**DEMO_ENVIRONMENT, **ASKED}, num_replicas=1, log=Path(folder) / "service.log") as service,
        local_prometheus(prometheus, target=service.url.removeprefix("http://")) as address,
    ):
        for seconds in WAVES_S:
            bench = [sys.executable, "-m", "loopserve", "bench", "--url", service.url, *LOAD]
            subprocess.run([*bench, "--seconds", str(seconds)], check=True)
        draw(address, PICTURES, MINUTES)


if __name__ == "__main__":
    main()
