"""The hardware under one replica: its GPUs as NVML sees them, and what its process uses. Off the way of every turn and scrape.

Owns two daemon threads. One talks to NVML and nothing else, because a driver that hangs keeps whoever called it for good; the other reads
the process and notices when the first has fallen silent. Whatever is not known is not exported: a zero would look like an idle GPU.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pynvml  # type: ignore[import-untyped]

from monitoring import catalogue
from monitoring.catalogue import Metric
from monitoring.sinks import MetricSink

_log = logging.getLogger(__name__)

_SILENT_PERIODS = 3  # without a finished look at NVML until it counts as not answering
_XIDS_MAX = 64  # taken from the driver's queue in one look
_STOP_S = 1.0  # for each thread; one that hangs in the driver is left to the end of the process
_STATM = Path("/proc/self/statm")


@dataclass(frozen=True, slots=True)
class _Gpu:
    """One device, and the name of its series: its place in the machine, or its UUID where it is a part of a GPU."""

    label: str
    handle: Any


class Gpus:
    """The GPUs that this process may use. Every method may hang with the driver. Raises NVML's errors where there is no NVML at all."""

    def __init__(self, nvml: Any, visible: str | None) -> None:
        """`visible` is the value of CUDA_VISIBLE_DEVICES; None shows all."""
        nvml.nvmlInit()
        self._nvml = nvml
        self._gpus = tuple(_Gpu(_label(nvml, handle), handle) for handle in visible_handles(nvml, visible))
        self._events = self._registered()
        self._reported: set[tuple[str, str, str]] = set()

    def read_into(self, sink: MetricSink) -> bool:
        """Set every gauge that can be read, count new Xid errors. False where there are GPUs and none of them said anything."""
        num_answers = 0
        for gpu in self._gpus:
            for metric, read in _READINGS:
                try:
                    value = read(self._nvml, gpu.handle)
                except self._nvml.NVMLError as error:
                    self._report(gpu.label, metric.name, error)
                    continue
                sink.set(metric, value, gpu=gpu.label)
                num_answers += 1
        for label, xid in self._new_xids():
            sink.inc(catalogue.GPU_XID, gpu=label, xid=str(xid))
        return num_answers > 0 or not self._gpus

    def close(self) -> None:
        """Let go of NVML."""
        with suppress(self._nvml.NVMLError):
            if self._events is not None:
                self._nvml.nvmlEventSetFree(self._events)
            self._nvml.nvmlShutdown()

    def _registered(self) -> Any:
        """The set in which the driver leaves Xid errors of these GPUs; None where it cannot."""
        nvml = self._nvml
        events, num_registered = None, 0
        for gpu in self._gpus:
            try:
                if nvml.nvmlDeviceGetSupportedEventTypes(gpu.handle) & nvml.nvmlEventTypeXidCriticalError:
                    events = events or nvml.nvmlEventSetCreate()
                    nvml.nvmlDeviceRegisterEvents(gpu.handle, nvml.nvmlEventTypeXidCriticalError, events)
                    num_registered += 1
            except nvml.NVMLError as error:
                _log.info("Xid errors of GPU %s are not reported: %s", gpu.label, error)
        return events if num_registered else None

    def _new_xids(self) -> Iterator[tuple[str, int]]:
        """GPU and number of each Xid error since the last look; the driver queues them."""
        nvml = self._nvml
        for _ in range(_XIDS_MAX if self._events is not None else 0):
            try:
                event = nvml.nvmlEventSetWait_v2(self._events, 0)
            except nvml.NVMLError_Timeout:
                return  # no more
            except nvml.NVMLError as error:
                self._report("", "Xid", error)
                return
            yield _label(nvml, event.device), int(event.eventData)

    def _report(self, label: str, what: str, error: Exception) -> None:
        """Once per GPU, reading and kind of error: a device without a reading is no fault, and one that is lost stays lost."""
        key = (label, what, type(error).__name__)
        if key not in self._reported:
            self._reported.add(key)
            _log.info("GPU %s gives no %s: %s", label, what, error)


def visible_handles(nvml: Any, visible: str | None) -> Iterator[Any]:
    """The devices that CUDA_VISIBLE_DEVICES names, in its order. As CUDA does, stops at the first entry that names none.

    Entries are numbers, UUIDs (`GPU-...`, `MIG-...`) or beginnings of a `GPU-` UUID. Numbers count in PCI order, as NVML's do: where GPUs
    of one machine are unlike, CUDA counts so only under CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """
    if visible is None:
        visible = ",".join(map(str, range(nvml.nvmlDeviceGetCount())))
    for entry in (part.strip() for part in visible.split(",")):
        try:
            if entry.isdigit():
                yield nvml.nvmlDeviceGetHandleByIndex(int(entry))
            elif entry.startswith("MIG-"):
                yield nvml.nvmlDeviceGetHandleByUUID(entry)
            elif entry.startswith("GPU-"):
                yield _by_beginning(nvml, entry)
            else:
                return
        except nvml.NVMLError as error:
            _log.info("no telemetry of the GPU %r: %s", entry, error)
            return


def _by_beginning(nvml: Any, entry: str) -> Any:
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    found = [handle for handle in handles if nvml.nvmlDeviceGetUUID(handle).startswith(entry)]
    return found[0] if len(found) == 1 else nvml.nvmlDeviceGetHandleByUUID(entry)  # else NVML's own error


def _label(nvml: Any, handle: Any) -> str:
    try:
        return str(nvml.nvmlDeviceGetIndex(handle))
    except nvml.NVMLError:  # a MIG device has no place of its own
        return str(nvml.nvmlDeviceGetUUID(handle))


_READINGS: tuple[tuple[Metric, Callable[[Any, Any], float]], ...] = (
    (catalogue.GPU_UTILIZATION, lambda nvml, handle: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100),  # per cent
    (catalogue.GPU_MEMORY_USED, lambda nvml, handle: nvml.nvmlDeviceGetMemoryInfo(handle).used),
    (catalogue.GPU_MEMORY_TOTAL, lambda nvml, handle: nvml.nvmlDeviceGetMemoryInfo(handle).total),
    (catalogue.GPU_POWER, lambda nvml, handle: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),  # milliwatts
    (
        catalogue.GPU_TEMPERATURE,
        lambda nvml, handle: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
    ),
)


class HardwareWatch:
    """Keeps the hardware's metrics fresh from its own threads. Start once; usable with `with`."""

    def __init__(
        self,
        sink: MetricSink,
        *,
        period_s: float = 5.0,
        visible: str | None = None,
        nvml: Any = pynvml,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`visible` is the value of CUDA_VISIBLE_DEVICES; None where it is not set."""
        assert period_s > 0, "a period is longer than nothing"
        self._sink = sink
        self._period_s = period_s
        self._visible = visible
        self._nvml = nvml
        self._clock = clock
        self._stopping = threading.Event()
        self._threads = tuple(
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._watch_gpus, "loopserve-nvml"), (self._watch_process, "loopserve-process"))
        )
        self._looked_s = clock()  # when NVML was last done with; at first it gets the benefit of the doubt
        self._cpu_s = 0.0
        self._is_silence_logged = False

    def start(self) -> None:
        """Begin. Returns at once, whatever the driver does."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End, within two seconds even where the driver hangs."""
        self._stopping.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(_STOP_S)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _watch_gpus(self) -> None:
        try:
            gpus = Gpus(self._nvml, self._visible)
        except self._nvml.NVMLError as error:
            _log.info("no GPU telemetry: %s", error)
            self._is_silence_logged = True  # this was the word about it
            self._looked_s = float("-inf")
            self._sink.set(catalogue.GPU_AVAILABLE, 0.0)
            return
        while not self._stopping.is_set():
            is_answering = gpus.read_into(self._sink)
            self._looked_s = self._clock()
            self._sink.set(catalogue.GPU_AVAILABLE, float(is_answering))
            self._stopping.wait(self._period_s)
        gpus.close()

    def _watch_process(self) -> None:
        while not self._stopping.is_set():
            self._read_process()
            if self._clock() - self._looked_s > _SILENT_PERIODS * self._period_s:
                self._sink.set(catalogue.GPU_AVAILABLE, 0.0)  # again each time: some exporters drop what stands still
                if not self._is_silence_logged:
                    self._is_silence_logged = True
                    _log.warning("NVML has not answered for %d periods; GPU metrics stand still", _SILENT_PERIODS)
            self._stopping.wait(self._period_s)

    def _read_process(self) -> None:
        times = os.times()
        cpu_s = times.user + times.system
        if cpu_s > self._cpu_s:
            self._sink.inc(catalogue.PROCESS_CPU, cpu_s - self._cpu_s)
            self._cpu_s = cpu_s
        with suppress(OSError):  # no such file but on Linux: then the series is absent
            resident_pages = int(_STATM.read_text().split()[1])
            self._sink.set(catalogue.PROCESS_MEMORY, resident_pages * os.sysconf("SC_PAGE_SIZE"))
