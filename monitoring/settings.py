"""Settings of what is measured and exported."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MetricsSettings:
    """What is exported, and how often what changes by itself is looked at."""

    vllm_names: bool = False  # the same values also under the names that dashboards for vLLM read
    ray_export: bool = False  # also through Ray's metrics API, as ray_loopserve_...
    refresh_s: float = 5.0  # gauges of Ray's API vanish when not set again, so they are refreshed this often
    gpu_period_s: float = 5.0  # between two looks at NVML
