"""Owns what every benchmark of an accelerator has in common: its flags, its time limit, what it ran on, and the one file it
writes.

A CPU runs the same code at tiny size, so that it can be tested; its result says that it is not to be published. Knows nothing
about what is measured. Unlike `benchmarks.machine`, it works where the package is not installed and there is no git: from a bare
copy of the checkout.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import pkgutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import Machine, describe_machine
from benchmarks.report import Table, settings_of, write_whole
from loopserve import kernels
from loopserve.kernels.dispatch import implementation

_COPY_RUNS, _COPIES_A_RUN = 5, 8


class Deadline:
    """When a benchmark has to be done; counted from its making."""

    def __init__(self, seconds_max: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end_s = clock() + seconds_max

    @property
    def left_s(self) -> float:
        """Seconds left, not below 0."""
        return max(0.0, self._end_s - self._clock())

    @property
    def is_over(self) -> bool:
        """Whether nothing new should begin."""
        return self.left_s == 0.0

    def part(self, share: float) -> Deadline:
        """The end of what begins now and may take that share of the time left."""
        return Deadline(self.left_s * share, self._clock)


def add_common_flags(parser: argparse.ArgumentParser, *, seconds_max: float) -> None:
    """What every one of these scripts is told."""
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="seconds on a CPU: to see that it works, not how fast")
    parser.add_argument("--seconds-max", type=float, default=seconds_max, help="begin nothing new after so long")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file that is written")
    parser.add_argument("--commit", default=None, help="of the checkout, where git cannot tell")
    parser.add_argument("--seed", type=int, default=0)


def fill_in(args: argparse.Namespace, defaults: Mapping[str, Any]) -> None:
    """Give the flags that were left out their values. Mutates `args`."""
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def device_of(args: argparse.Namespace) -> torch.device:
    """The device asked for. Ends the script where it is not there, or where a CPU would have to carry the large model."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("No CUDA device is here: run with --device cpu --tiny to see that the benchmark works.")
    if args.device == "cpu" and not args.tiny:
        raise SystemExit("An 8B model is not for a CPU: add --tiny.")
    return torch.device(args.device)


def dtype_of(device: torch.device) -> torch.dtype:
    """Of weights and KV: bfloat16, but float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def why_not_published(args: argparse.Namespace) -> list[str]:
    """Why the numbers must not be published; empty where they may."""
    reasons = []
    if args.device == "cpu":
        reasons.append("measured on a CPU, which is not what these benchmarks are about")
    if args.tiny:
        reasons.append("tiny sizes: a test of the script, not of speed")
    return reasons


def describe_device(device: torch.device, *, commit: str | None = None) -> Machine:
    """This machine, now; the load is recorded, not refused. `commit` is believed where it is given."""
    return describe_machine(load_before=os.getloadavg()[0], device=device, commit=commit)


def implementations(device: torch.device) -> str:
    """Which operations run as kernels on a device, and which as references."""
    by_kind: dict[str, list[str]] = {}
    for op in sorted(module.name for module in pkgutil.iter_modules(kernels.__path__) if module.ispkg):
        try:
            kind = implementation(op, device.type).__module__.rpartition(".")[2]
        except ModuleNotFoundError:
            kind = "none"  # an operation whose kernel is not written; a step that needs it fails by itself
        by_kind.setdefault(kind, []).append(op)
    return "; ".join(f"{kind}: {', '.join(ops)}" for kind, ops in sorted(by_kind.items()))


def copy_bandwidth(device: torch.device, *, copied_bytes: int) -> float:
    """Bytes per second that the device moves, read and written counted apart, when it copies one large tensor: the best of some runs."""
    source = torch.ones(copied_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    best_s = float("inf")
    for _ in range(_COPY_RUNS):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(_COPIES_A_RUN):
            target.copy_(source)
        synchronize(device)
        best_s = min(best_s, (time.perf_counter() - started) / _COPIES_A_RUN)
    return 2 * copied_bytes / best_s


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_bytes(device: torch.device) -> int | None:
    """Device memory that nobody holds, caches given back first; None: not limited here (a CPU at tiny size)."""
    gc.collect()
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return int(free)


def write_record(
    args: argparse.Namespace,
    *,
    title: str,
    machine: Machine,
    rows: Sequence[Mapping[str, Any]],
    tables: Sequence[Table],
    notes: Sequence[str],
    numbers: Mapping[str, Any] | None = None,
) -> str:
    """Write the one JSON object of a run to `args.out`, and give its Markdown."""
    reasons = why_not_published(args)
    record = {
        "title": title,
        "not_to_be_published": reasons,
        "machine": asdict(machine),
        "operations": implementations(device_of(args)),
        "settings": settings_of(args),
        **(numbers or {}),
        "rows": list(rows),
        "notes": list(notes),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(args.out, json.dumps(record, indent=1) + "\n")
    lines = [*notes, f"Operations: {record['operations']}.", *(f"NOT TO BE PUBLISHED: {reason}." for reason in reasons)]
    parts = [f"# {title}", machine.sentence(), *(table.markdown() for table in tables)]
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in lines)]) + "\n"
