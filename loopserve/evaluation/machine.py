"""What numbers were measured on: machine, versions, date. Every start of a run carries it. Knows nothing about what is measured."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from loopserve.loading import device_name


def describe_machine(device: torch.device, *, now: datetime | None = None) -> dict[str, str]:
    """This machine and these versions, as a reader wants them; `now` is the start's date."""
    return {
        "date": (datetime.now(UTC) if now is None else now).isoformat(timespec="seconds"),
        "device": device_name(device),
        "cores": f"{len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} torch threads",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "loopserve": metadata.version("loopserve"),
        "commit": _commit(Path(__file__).resolve().parent),
    }


def sentence(machine: dict[str, str]) -> str:
    """The same in one line."""
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "transformers", "loopserve"))
    place = ", ".join(machine[name] for name in ("device", "cores", "memory"))
    return f"{place}; {versions} at {machine['commit']}; {machine['date']}"


def _commit(folder: Path) -> str:
    """Of the checkout that this file lies in, "+" where files of the package differ from it; "unknown" where there is none."""
    head = git(folder, "rev-parse", "--short=10", "HEAD")
    return "unknown" if head is None else head + ("+" if git(folder, "status", "--porcelain", "--", "..") else "")


def git(folder: Path, *arguments: str) -> str | None:
    """What git says in a folder; None where it says nothing good, or is not there."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
