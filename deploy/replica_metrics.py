"""Everything that one replica counts, and the two exporters behind it. Hop 10's outer end; knows no Ray but its metrics API, injected.

    engine thread -> LoadMeter -> Recorder --+
    Replica.chat, HardwareWatch -------------+-> PrometheusSink -> families -> whoever makes the /metrics page
                                             '-> RaySink (if wanted) -> Ray's agent on this node

States (memory, queues) are read when somebody looks, and every `refresh_s` for Ray.
"""

import asyncio
from contextlib import suppress
from importlib.metadata import version
from typing import Any

from deploy.replica import EngineLike
from loopserve.config import BLOCK_TOKENS
from loopserve.stats import StatsSink
from monitoring import catalogue as c
from monitoring.catalogue import CATALOGUE, Origin
from monitoring.exposition import Families, PrometheusSink
from monitoring.gpu import HardwareWatch
from monitoring.ray_metrics import RaySink
from monitoring.recorder import MemoryRecorder, Recorder
from monitoring.settings import MetricsSettings
from monitoring.sinks import Fan, MetricSink
from monitoring.vllm_names import vllm_families

_ENGINE_METRICS = tuple(metric for metric in CATALOGUE if metric.origin is Origin.ENGINE)


class ReplicaMetrics:
    """The metrics of one replica. `families` may be asked for from any thread."""

    def __init__(
        self, settings: MetricsSettings, *, name: str, visible_gpus: str | None = None, ray_api: Any = None
    ) -> None:
        """`visible_gpus`: value of CUDA_VISIBLE_DEVICES, None where unset. `ray_api`: `ray.util.metrics`, used if `settings.ray_export`."""
        self._settings = settings
        self._name = name
        self._page = PrometheusSink(_ENGINE_METRICS)
        self._ray = None
        if settings.ray_export and ray_api is not None:
            self._ray = RaySink(_ENGINE_METRICS, api=ray_api, origin=Origin.ENGINE, name=name)
        self.sink: MetricSink = self._page if self._ray is None else Fan((self._page, self._ray))
        self.recorder: StatsSink = Recorder(self.sink)
        self._memory = MemoryRecorder(self.sink)
        self._hardware = HardwareWatch(self.sink, period_s=settings.gpu_period_s, visible=visible_gpus)

    def start(self) -> None:
        """Start to look at the hardware."""
        self._hardware.start()

    def stop(self) -> None:
        """Stop looking."""
        self._hardware.stop()

    def families(self, engine: EngineLike) -> Families:
        """Everything, as it is now; vLLM's names, where wanted, among it."""
        self._record_state(engine)
        families = self._page.families()
        if not self._settings.vllm_names:
            return families
        return (
            *families,
            *vllm_families(families, replica=self._name, model_name=engine.model_name, block_tokens=BLOCK_TOKENS),
        )

    async def refresh_ray(self, engine: EngineLike) -> None:
        """Keep the gauges of Ray's API alive, for ever; returns at once where they are not wanted."""
        while self._ray is not None:
            with suppress(
                Exception
            ):  # an engine that is going away has no state; the next round or the end comes anyway
                await asyncio.to_thread(self._record_state, engine)
            self._ray.refresh()
            await asyncio.sleep(self._settings.refresh_s)

    def _record_state(self, engine: EngineLike) -> None:
        self.sink.set(c.REPLICA_UP, float(engine.is_alive()))
        self.sink.set(c.BUILD_INFO, 1.0, version=version("loopserve"), model_name=engine.model_name)
        self._memory.record(engine.memory())
