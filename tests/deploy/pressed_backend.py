"""A fake backend whose pool is as full as a file says: {"live": share of the pool, "running": turns, "waiting": turns}.

Its turns are compact and hold just that at the full budget; at the floor half of it, with all of their tokens twice as much.
"""

import json
from dataclasses import replace
from pathlib import Path

from fake_backend import FakeChat, FakeEngine

from deploy.replica import Backend
from loopserve.config import EngineConfig
from loopserve.stats import BudgetDemand, MemoryStats, Occupancy, StatsSink

NUM_BLOCKS = 1000


class PressedEngine(FakeEngine):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = Path(path)

    def memory(self) -> MemoryStats:
        load = json.loads(self.path.read_text())
        active = int(load["live"] * NUM_BLOCKS)
        live_bytes = active * 1600
        return replace(
            super().memory(),
            num_running_turns=load["running"],
            num_waiting_turns=load["waiting"],
            blocks=Occupancy(total=NUM_BLOCKS, active=active, warm=0, shared=0, cached=0, free=NUM_BLOCKS - active),
            host_blocks=Occupancy(total=NUM_BLOCKS, active=0, warm=0, shared=0, cached=0, free=NUM_BLOCKS),
            demand=(
                BudgetDemand(8, live_bytes // 2, 0),
                BudgetDemand(16, live_bytes, 0),
                BudgetDemand(None, 2 * live_bytes, 0),
            ),
        )


class PressedFactory:
    """A picklable factory; the path is that of the file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, config: EngineConfig, stats: StatsSink, *, num_threads: int) -> Backend:
        engine = PressedEngine(self.path)
        return Backend(engine, FakeChat(engine))
