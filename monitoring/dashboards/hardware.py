"""GPU and node: what the processes of the replicas use. GPU panels are empty where NVML does not answer."""

from monitoring.catalogue import (
    BUILD_INFO,
    GPU_AVAILABLE,
    GPU_MEMORY_TOTAL,
    GPU_MEMORY_USED,
    GPU_POWER,
    GPU_TEMPERATURE,
    GPU_UTILIZATION,
    GPU_XID,
    KV_CAPACITY,
    PROCESS_CPU,
    PROCESS_MEMORY,
)
from monitoring.dashboards.panels import BYTES, COUNT, HERE, PER_SECOND, SHARE, Board, Query, Row, lines, number
from monitoring.promql import ratio

_EACH_GPU = "{{replica}} gpu {{gpu}}"

_NODE = Row(
    "Processes",
    (
        number(
            "Version",
            "What runs here, and the model it serves.",
            COUNT,
            Query(HERE.now(BUILD_INFO, by=("version", "model_name"), fold="max"), "{{version}} {{model_name}}"),
            width=12,
            by_name=True,
        ),
        number(
            "Replicas with a GPU",
            "Replicas in whose process NVML answers.",
            COUNT,
            Query(HERE.now(GPU_AVAILABLE), "replicas"),
            width=12,
        ),
        lines(
            "CPU",
            "Cores that each replica keeps busy.",
            COUNT,
            Query(HERE.rate(PROCESS_CPU, by=("replica",)), "{{replica}}"),
        ),
        lines(
            "Memory",
            "Resident memory of each replica.",
            BYTES,
            Query(HERE.now(PROCESS_MEMORY, by=("replica",)), "{{replica}}"),
        ),
        lines(
            "KV pool",
            "Size of each replica's pool.",
            BYTES,
            Query(HERE.now(KV_CAPACITY, by=("replica",)), "{{replica}}"),
        ),
    ),
)

_GPU = Row(
    "GPU",
    (
        lines(
            "GPU utilisation",
            "Share of time with a kernel running.",
            SHARE,
            Query(HERE.now(GPU_UTILIZATION, by=("replica", "gpu")), _EACH_GPU),
            highest=1.0,
        ),
        lines(
            "GPU memory",
            "In use over the size of the device.",
            SHARE,
            Query(
                ratio(
                    HERE.now(GPU_MEMORY_USED, by=("replica", "gpu")), HERE.now(GPU_MEMORY_TOTAL, by=("replica", "gpu"))
                ),
                _EACH_GPU,
            ),
            highest=1.0,
        ),
        lines("GPU power", "Power draw.", "watt", Query(HERE.now(GPU_POWER, by=("replica", "gpu")), _EACH_GPU)),
        lines(
            "GPU temperature",
            "Core temperature.",
            "celsius",
            Query(HERE.now(GPU_TEMPERATURE, by=("replica", "gpu")), _EACH_GPU),
            width=12,
        ),
        lines(
            "GPU errors",
            "Xid errors that the driver reported, by number.",
            PER_SECOND,
            Query(HERE.rate(GPU_XID, by=("gpu", "xid")), "gpu {{gpu}}: xid {{xid}}"),
            width=12,
        ),
    ),
)

BOARD = Board(
    "hardware",
    "LoopServe / GPU and node",
    "CPU and memory of the replicas' processes, and their GPUs where there are any.",
    (_NODE, _GPU),
)
