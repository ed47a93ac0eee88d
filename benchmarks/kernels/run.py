"""One benchmark's run: its flags, its deadline, its cases, and the file that is written anew after each of them.

Knows nothing about what is measured. As a program it measures the device's ceilings and nothing else, so it asks for no tests:

    python -m benchmarks.kernels.run --device cuda --out ceilings.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.ceilings import Ceilings, measure_ceilings
from benchmarks.kernels.gate import KERNEL_TESTS, Proof, require_green
from benchmarks.kernels.timing import Timing
from benchmarks.machine import describe_machine
from benchmarks.report import write_whole
from loopserve import kernels
from loopserve.kernels.dispatch import implementation

SMALL_LAUNCH_BYTES = (
    128 << 20
)  # a launch that moves less is told against the launch floor too: it is too short for bandwidth


@dataclass(frozen=True, slots=True)
class Case:
    """One operation at one shape."""

    op: str
    shape: str  # for a reader
    settings: dict[str, int | float | str]  # the same, as numbers
    timing: Timing  # in the stream
    graph: Timing | None  # in a CUDA graph; None: not captured, see `notes`
    num_bytes: float  # the fewest that it must move
    flop: float  # the fewest that it must compute
    dense_s: float | None = None  # dense attention of the same rows over the same context
    dense_by: str = ""  # what computed it
    computed_share: float | None = None  # of dense attention's cells, after rounding to tiles
    selection_share: float | None = None  # of the time
    notes: str = ""

    @property
    def time_s(self) -> float:
        """In a graph where it was captured, else in the stream."""
        return self.graph.median_s if self.graph else self.timing.median_s

    @property
    def speedup(self) -> float | None:
        """How many times as long dense takes."""
        return None if self.dense_s is None else self.dense_s / self.time_s

    @property
    def efficiency(self) -> float | None:
        """Of the speed-up that the computed share promises, how much is had."""
        if self.speedup is None or self.computed_share is None:
            return None
        return self.speedup * self.computed_share

    def record(self, ceilings: Ceilings) -> dict[str, Any]:
        """Every number, with what follows from them and the ceilings."""
        floor_s = ceilings.floor_s(num_bytes=self.num_bytes, flop=self.flop)
        launch_s = ceilings.graph_launch_s if self.graph else ceilings.launch_s
        small = self.num_bytes < SMALL_LAUNCH_BYTES
        return {
            **asdict(self),
            "time_s": self.time_s,
            "floor_s": floor_s,
            "ceiling_share": floor_s / self.time_s,
            "bytes_per_s": self.num_bytes / self.time_s,
            "flop_per_s": self.flop / self.time_s,
            "over_launch_s": self.time_s - (launch_s or 0.0) if small else None,
            "speedup": self.speedup,
            "efficiency": self.efficiency,
        }

    def sentence(self, ceilings: Ceilings) -> str:
        """The same in one line."""
        found = self.record(ceilings)
        parts = [
            f"{self.op} {self.shape}: {1e6 * self.time_s:.1f} us{'' if self.graph else ' in the stream'}",
            f"floor {1e6 * found['floor_s']:.1f} us, {found['ceiling_share']:.0%} of the ceiling",
        ]
        if found["over_launch_s"] is not None:
            parts.append(f"{1e6 * found['over_launch_s']:.1f} us over an empty launch")
        if self.speedup is not None:
            parts.append(f"{self.speedup:.2f}x dense ({self.dense_by})")
        if self.efficiency is not None:
            parts.append(f"{self.computed_share:.1%} of the cells, efficiency {self.efficiency:.0%}")
        if self.selection_share is not None:
            parts.append(f"selection {self.selection_share:.0%} of the time")
        return ", ".join(parts)


class Run:
    """What one benchmark has measured so far."""

    def __init__(self, name: str, args: argparse.Namespace, *, proof: Proof | None) -> None:
        self.name, self.args = name, args
        self.device = device_of(args)
        self.tiny: bool = args.tiny
        self._proof = proof
        self._started = time.perf_counter()
        self._machine = describe_machine(load_before=os.getloadavg()[0], device=self.device, commit=args.commit)
        self.cases: list[Case] = []
        self.skipped: list[str] = []
        self.failed: dict[str, str] = {}
        self._implementations = implementations(self.device)
        if self.device.type != "cuda":
            torch.set_num_threads(1)  # toy sizes: threads would only wait for each other
        self.ceilings = measure_ceilings(self.device)
        print(f"{name}: {self.ceilings_sentence()}", flush=True)
        self.write()

    @property
    def to_publish(self) -> bool:
        """Whether these numbers may be published: real sizes, a GPU, its kernels, and all their tests green."""
        on_gpu = self.device.type == "cuda" and not self.tiny and "reference" not in self._implementations.values()
        return on_gpu and not self.args.force and (self._proof is None or self._proof.is_whole)

    def measure(self, label: str, case: Callable[[], Case]) -> Case | None:
        """Measure a case if there is time left, and write all that is known; None where it was skipped or failed."""
        if time.perf_counter() - self._started > self.args.seconds_max:
            self.skipped.append(label)
            self.write()
            return None
        try:
            found = case()
        except Exception as error:  # one shape that does not compile, or does not fit, must not cost the others
            self.failed[label] = f"{type(error).__name__}: {error}"[:1000]
            print(f"{label}: FAILED, {self.failed[label][:300]}", flush=True)
            self.write()
            return None
        self.cases.append(found)
        print(found.sentence(self.ceilings), flush=True)
        self.write()
        return found

    def ceilings_sentence(self) -> str:
        """The ceilings for a reader."""
        found = self.ceilings
        graph = "" if found.graph_launch_s is None else f", {1e6 * found.graph_launch_s:.1f} us in a graph"
        return (
            f"copy {found.copy_bytes_per_s / 1e9:.0f} GB/s (read and written), product {found.matmul_flop_per_s / 1e12:.2f} TFLOP/s, "
            f"an empty launch {1e6 * found.launch_s:.1f} us{graph}"
        )

    def losing(self) -> list[str]:
        """The cases that take longer than dense attention of the same rows."""
        return [
            f"{case.op} {case.shape}: {case.speedup:.2f}x dense"
            for case in self.cases
            if case.speedup is not None and case.speedup < 1.0
        ]

    def write(self) -> None:
        """Write the record of all so far; a run that is killed loses nothing but the case it was at."""
        if self.args.out is None:
            return
        record = {
            "benchmark": self.name,
            "to_publish": self.to_publish,
            "machine": asdict(self._machine),
            "settings": {name: value for name, value in vars(self.args).items() if not isinstance(value, Path)},
            "tests": None if self._proof is None else asdict(self._proof),
            "seconds": round(time.perf_counter() - self._started, 2),
            "implementations": self._implementations,
            "ceilings": asdict(self.ceilings),
            "cases": [case.record(self.ceilings) for case in self.cases],
            "losing": self.losing(),
            "skipped": self.skipped,
            "failed": self.failed,
        }
        write_whole(self.args.out, json.dumps(record, indent=1) + "\n")

    def finish(self) -> int:
        """The last words, and the exit status: 1 where a case failed."""
        self.write()
        losing = self.losing()
        print(f"{self.name}: {len(self.cases)} cases, {len(self.skipped)} skipped, {len(self.failed)} failed")
        print(f"slower than dense: {'; '.join(losing) or 'none'}")
        if not self.to_publish:
            print(
                "Not to be published: not a GPU or not its kernels, not the real sizes, forced, or not all kernel tests."
            )
        return 1 if self.failed else 0


def implementations(device: torch.device) -> dict[str, str]:
    """What each operation runs as on the device: "kernel", "reference", or why not."""
    found = {}
    for op in (name for name in kernels.__all__ if name.islower()):
        try:
            found[op] = implementation(op, device.type).__module__.rpartition(".")[2]
        except ImportError as error:
            found[op] = f"missing: {error}"
    return found


def begin(name: str, args: argparse.Namespace) -> Run:
    """Ask for green tests, then measure the ceilings. Raises SystemExit where tests are red."""
    device = device_of(args)
    proof = None
    if not args.force:
        proof = require_green(
            device, proof_file=args.tests_passed_at, tests=args.tests, commit=args.commit or "unknown"
        )
    return Run(name, args, proof=proof)


def device_of(args: argparse.Namespace) -> torch.device:
    """The device under test. Raises SystemExit where it is not there, or where real sizes are asked of a CPU."""
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device: --tiny --device cpu tries the code out without one.")
    if device.type != "cuda" and not args.tiny:
        raise SystemExit("On a CPU only --tiny: the references would run for hours at these sizes.")
    return device


def parse_arguments(description: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line that all benchmarks here have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="toy sizes, in seconds on a CPU")
    parser.add_argument(
        "--seconds-max", type=float, default=180.0, help="cases that begin later are skipped and listed"
    )
    parser.add_argument("--out", type=Path, help="JSON file, written anew after every case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tests", nargs="+", default=list(KERNEL_TESTS), help="kernel tests that must be green first")
    parser.add_argument("--tests-passed-at", type=Path, help="proof that they were, as gpu_session writes it")
    parser.add_argument("--force", action="store_true", help="measure without tests; the result says so")
    parser.add_argument("--commit", help="of the sources, where the checkout has no history with it")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The ceilings alone."""
    return Run("ceilings", parse_arguments(__doc__, arguments), proof=None).finish()


if __name__ == "__main__":
    sys.exit(main())
