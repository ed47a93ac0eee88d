"""GPU telemetry against an NVML that these tests make up: present, absent, incomplete, stuck, reporting errors."""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from monitoring import catalogue
from monitoring.catalogue import Metric
from monitoring.gpu import Gpus, HardwareWatch, visible_handles

GPU_SERIES = {
    metric.name
    for metric in catalogue.CATALOGUE
    if metric.name.startswith("loopserve_gpu_") and metric is not catalogue.GPU_AVAILABLE
}


class RecordingSink:
    """Keeps the last value of every gauge, the sum of every counter, and how often each was written."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self.writes: dict[str, int] = defaultdict(int)

    def inc(self, metric: Metric, value: float = 1.0, **labels: str) -> None:
        assert set(labels) == set(metric.labels)
        key = (metric.name, tuple(sorted(labels.items())))
        self.values[key] = self.values.get(key, 0.0) + value
        self.writes[metric.name] += 1

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        assert set(labels) == set(metric.labels)
        self.values[metric.name, tuple(sorted(labels.items()))] = value
        self.writes[metric.name] += 1

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        raise AssertionError("the hardware has no histograms")

    def of(self, metric: Metric, **labels: str) -> float | None:
        return self.values.get((metric.name, tuple(sorted(labels.items()))))

    @property
    def names(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.values)


class FakeNvml:
    """`num_gpus` devices; `failing` maps a function's name to the error it raises."""

    NVML_TEMPERATURE_GPU = 0
    nvmlEventTypeXidCriticalError = 8  # noqa: N815  # NVML's name

    class NVMLError(Exception):
        pass

    class NVMLError_LibraryNotFound(NVMLError):  # noqa: N801
        pass

    class NVMLError_NotSupported(NVMLError):  # noqa: N801
        pass

    class NVMLError_Timeout(NVMLError):  # noqa: N801
        pass

    class NVMLError_InvalidArgument(NVMLError):  # noqa: N801
        pass

    def __init__(self, num_gpus: int = 2) -> None:
        self.uuids = [f"GPU-{index}{index}aa-bb" for index in range(num_gpus)]
        self.failing: dict[str, type[Exception]] = {}
        self.xids: list[tuple[int, int]] = []
        self.stuck = threading.Event()  # cleared while a power reading should hang
        self.stuck.set()
        self.is_shut_down = False
        self.callers: set[str] = set()
        self.num_inits = 0

    def _call(self, name: str) -> None:
        self.callers.add(threading.current_thread().name)
        if name in self.failing:
            raise self.failing[name](name)

    def nvmlInit(self) -> None:
        self.num_inits += 1
        self._call("nvmlInit")

    def nvmlShutdown(self) -> None:
        self.is_shut_down = True

    def nvmlDeviceGetCount(self) -> int:
        return len(self.uuids)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index >= len(self.uuids):
            raise self.NVMLError_InvalidArgument(str(index))
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int | str:
        if uuid == "MIG-7":
            return uuid
        if uuid not in self.uuids:
            raise self.NVMLError_InvalidArgument(uuid)
        return self.uuids.index(uuid)

    def nvmlDeviceGetUUID(self, handle: int | str) -> str:
        return handle if isinstance(handle, str) else self.uuids[handle]

    def nvmlDeviceGetIndex(self, handle: int | str) -> int:
        if isinstance(handle, str):
            raise self.NVMLError_NotSupported(handle)
        return handle

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        self._call("nvmlDeviceGetUtilizationRates")
        return SimpleNamespace(gpu=50, memory=10)

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        self._call("nvmlDeviceGetMemoryInfo")
        return SimpleNamespace(used=3 << 30, total=8 << 30)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        self._call("nvmlDeviceGetPowerUsage")
        self.stuck.wait(30)
        return 250_500

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        self._call("nvmlDeviceGetTemperature")
        return 61

    def nvmlDeviceGetSupportedEventTypes(self, handle: int) -> int:
        self._call("nvmlDeviceGetSupportedEventTypes")
        return 8 | 1

    def nvmlEventSetCreate(self) -> str:
        return "events"

    def nvmlEventSetFree(self, events: str) -> None:
        assert events == "events"

    def nvmlDeviceRegisterEvents(self, handle: int, kinds: int, events: str) -> None:
        assert (kinds, events) == (8, "events")

    def nvmlEventSetWait_v2(self, events: str, timeout_ms: int) -> Any:
        assert (events, timeout_ms) == ("events", 0), "a look at the driver's queue does not wait"
        if not self.xids:
            raise self.NVMLError_Timeout
        handle, xid = self.xids.pop(0)
        return SimpleNamespace(device=handle, eventType=8, eventData=xid)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not happen"
        time.sleep(0.005)


def test_every_gauge_of_a_gpu_is_read_in_the_catalogues_units() -> None:
    sink = RecordingSink()
    assert Gpus(FakeNvml(), None).read_into(sink)
    for gpu in ("0", "1"):
        assert sink.of(catalogue.GPU_UTILIZATION, gpu=gpu) == 0.5
        assert sink.of(catalogue.GPU_MEMORY_USED, gpu=gpu) == 3 << 30
        assert sink.of(catalogue.GPU_MEMORY_TOTAL, gpu=gpu) == 8 << 30
        assert sink.of(catalogue.GPU_POWER, gpu=gpu) == 250.5
        assert sink.of(catalogue.GPU_TEMPERATURE, gpu=gpu) == 61
    assert sink.names == GPU_SERIES - {catalogue.GPU_XID.name}


@pytest.mark.parametrize("function", ["UtilizationRates", "PowerUsage", "Temperature", "MemoryInfo"])
def test_a_reading_that_a_device_does_not_support_is_absent_and_the_others_are_there(
    function: str, caplog: pytest.LogCaptureFixture
) -> None:
    nvml, sink = FakeNvml(1), RecordingSink()
    nvml.failing[f"nvmlDeviceGet{function}"] = FakeNvml.NVMLError_NotSupported
    gpus = Gpus(nvml, None)
    with caplog.at_level(logging.INFO, "monitoring.gpu"):
        assert gpus.read_into(sink)
        first = len(caplog.records)
        assert gpus.read_into(sink)
    missing = {
        "UtilizationRates": {"loopserve_gpu_utilization_ratio"},
        "PowerUsage": {"loopserve_gpu_power_watts"},
        "Temperature": {"loopserve_gpu_temperature_celsius"},
        "MemoryInfo": {"loopserve_gpu_memory_used_bytes", "loopserve_gpu_memory_size_bytes"},
    }[function]
    assert sink.names == GPU_SERIES - missing - {catalogue.GPU_XID.name}
    assert first == len(missing)
    assert len(caplog.records) == first, "what is missing is said once"


def test_xid_errors_are_counted_by_gpu_and_number() -> None:
    nvml, sink = FakeNvml(), RecordingSink()
    gpus = Gpus(nvml, None)
    gpus.read_into(sink)
    assert catalogue.GPU_XID.name not in sink.names
    nvml.xids = [(1, 79), (0, 31), (1, 79)]
    gpus.read_into(sink)
    assert sink.of(catalogue.GPU_XID, gpu="1", xid="79") == 2
    assert sink.of(catalogue.GPU_XID, gpu="0", xid="31") == 1


def test_a_device_without_events_still_has_its_gauges() -> None:
    nvml, sink = FakeNvml(), RecordingSink()
    nvml.failing["nvmlDeviceGetSupportedEventTypes"] = FakeNvml.NVMLError_NotSupported
    nvml.xids = [(0, 31)]
    assert Gpus(nvml, None).read_into(sink)
    assert sink.names == GPU_SERIES - {catalogue.GPU_XID.name}


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("2,0", [2, 0]),
        (" 1 ", [1]),
        ("0,7,1", [0]),
        ("GPU-22aa-bb", [2]),
        ("GPU-1,0", [1, 0]),
        ("GPU-", []),
        ("MIG-7", ["MIG-7"]),
        ("nonsense,0", []),
    ],
)
def test_only_gpus_that_cuda_shows_this_process_are_watched(visible: str | None, expected: list[Any]) -> None:
    assert list(visible_handles(FakeNvml(3), visible)) == expected


def test_a_part_of_a_gpu_is_named_by_its_uuid() -> None:
    sink = RecordingSink()
    Gpus(FakeNvml(1), "MIG-7").read_into(sink)
    assert sink.of(catalogue.GPU_MEMORY_USED, gpu="MIG-7") == 3 << 30


def test_without_nvml_a_zero_says_so_once_and_no_gpu_series_appears(caplog: pytest.LogCaptureFixture) -> None:
    nvml, sink = FakeNvml(), RecordingSink()
    nvml.failing["nvmlInit"] = FakeNvml.NVMLError_LibraryNotFound
    with caplog.at_level(logging.INFO, "monitoring.gpu"), HardwareWatch(sink, period_s=0.01, nvml=nvml):
        until(lambda: sink.writes[catalogue.GPU_AVAILABLE.name] > 3)
    assert sink.of(catalogue.GPU_AVAILABLE) == 0
    assert not sink.names & GPU_SERIES
    assert nvml.num_inits == 1
    assert len(caplog.records) == 1


def test_the_real_nvml_answers_or_is_absent_without_an_error_of_ours() -> None:
    sink = RecordingSink()
    with HardwareWatch(sink, period_s=0.01):
        until(lambda: sink.of(catalogue.GPU_AVAILABLE) is not None)
    assert sink.of(catalogue.GPU_AVAILABLE) == 1 or not sink.names & GPU_SERIES


def test_a_running_watch_refreshes_everything_and_lets_go_of_nvml() -> None:
    nvml, sink = FakeNvml(1), RecordingSink()
    with HardwareWatch(sink, period_s=0.01, nvml=nvml):
        until(lambda: sink.writes[catalogue.GPU_POWER.name] > 3 and sink.writes[catalogue.PROCESS_MEMORY.name] > 3)
    assert sink.of(catalogue.GPU_AVAILABLE) == 1
    assert nvml.is_shut_down
    assert nvml.callers == {"loopserve-nvml"}, "nobody else ever waits for the driver"
    assert (sink.of(catalogue.PROCESS_MEMORY) or 0) > 10 << 20
    assert 0 < (sink.of(catalogue.PROCESS_CPU) or 0) <= time.process_time() + 0.1


def test_a_stuck_driver_holds_up_neither_the_process_metrics_nor_the_stop(caplog: pytest.LogCaptureFixture) -> None:
    nvml, sink = FakeNvml(1), RecordingSink()
    nvml.stuck.clear()
    watch = HardwareWatch(sink, period_s=0.01, nvml=nvml)
    watch.start()
    until(lambda: sink.of(catalogue.GPU_AVAILABLE) == 0)
    before = sink.writes[catalogue.PROCESS_MEMORY.name]
    until(lambda: sink.writes[catalogue.PROCESS_MEMORY.name] > before + 3)
    assert catalogue.GPU_POWER.name not in sink.names
    watch.stop()
    assert not nvml.is_shut_down, "the thread in the driver was left behind, not waited for"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    nvml.stuck.set()


def test_a_gpu_that_is_lost_is_not_available_any_more() -> None:
    nvml, sink = FakeNvml(1), RecordingSink()
    with HardwareWatch(sink, period_s=0.01, nvml=nvml):
        until(lambda: sink.of(catalogue.GPU_AVAILABLE) == 1)
        for name in ("UtilizationRates", "MemoryInfo", "PowerUsage", "Temperature"):
            nvml.failing[f"nvmlDeviceGet{name}"] = FakeNvml.NVMLError
        until(lambda: sink.of(catalogue.GPU_AVAILABLE) == 0)
