"""States what a number was measured on, and whether the machine was quiet. Every result carries it.

Knows nothing about what is measured. Reads the operating system and the versions of installed packages, nothing else.
"""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from loopserve.evaluation.machine import git
from loopserve.loading import cpu_model

MISSING = "not installed"
LOAD_MAX = 0.7  # runnable processes over the last minute: above it something else takes a core now and then


class BusyMachine(SystemExit):
    """The machine has other work; numbers taken now would be about that."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Where and when something was measured."""

    cpu: str
    cores: int  # that this process may use
    memory_gib: float
    threads: int  # of torch, within one operation
    load_before: float  # runnable processes, mean of the minute before the run
    python: str
    torch: str
    transformers: str
    loopserve: str
    commit: str  # of the checkout; "+" when files differ from it
    date: str  # ISO 8601, UTC
    triton: str = MISSING
    accelerator: str = ""  # name and memory of the device under test; "" where that is the processor
    driver: str = ""  # of the accelerator, with the CUDA that torch was built for

    def sentence(self) -> str:
        """The same for a reader."""
        accelerator = f"{self.accelerator}, driver {self.driver}, Triton {self.triton}; " if self.accelerator else ""
        return accelerator + (
            f"{self.cpu}, {self.cores} cores, {self.memory_gib:.0f} GiB, {self.threads} torch threads, "
            f"load before the run {self.load_before:.2f}; Python {self.python}, torch {self.torch}, "
            f"transformers {self.transformers}, loopserve {self.loopserve} at {self.commit}; {self.date}."
        )


def describe_machine(*, load_before: float, device: torch.device | None = None, commit: str | None = None) -> Machine:
    """This machine, now, with the accelerator where `device` is one. `commit` is for a copy of a checkout that has no history with it."""
    cuda = device if device is not None and device.type == "cuda" else None
    return Machine(
        cpu=cpu_model(),
        cores=usable_cores(),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        threads=torch.get_num_threads(),
        load_before=round(load_before, 2),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=version_of_package("transformers"),
        loopserve=version_of_package("loopserve"),
        commit=commit or _commit(Path(__file__).resolve().parent.parent),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        triton=version_of_package("triton"),
        accelerator=_accelerator(cuda) if cuda else "",
        driver=f"{_driver()}, CUDA {torch.version.cuda}" if cuda else "",
    )


def version_of_package(name: str) -> str:
    """Its installed version; a checkout that is run without having been installed has none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return MISSING


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def require_quiet(*, forced: bool, load_max: float = LOAD_MAX) -> float:
    """The load of the last minute. Raises BusyMachine when it is above `load_max` and the run is not forced."""
    load = os.getloadavg()[0]
    if load > load_max and not forced:
        raise BusyMachine(
            f"The load of the last minute is {load:.2f}, above {load_max}: wait until the machine is quiet, "
            "or pass --force for numbers that must not be published."
        )
    return load


def _accelerator(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} multiprocessors"


def _driver() -> str:
    """Version of NVIDIA's driver, as its own program tells it."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else "unknown"


def _commit(root: Path) -> str:
    head = git(root, "rev-parse", "--short=10", "HEAD")
    if head is None:
        return "unknown"
    return head + ("+" if git(root, "status", "--porcelain", "--", "loopserve", "benchmarks/*.py") else "")
