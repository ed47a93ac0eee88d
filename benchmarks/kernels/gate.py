"""No time without green tests: runs the kernel tests on the device under test, or takes the proof that they ran on these very sources.

A fast kernel that is wrong is worth nothing, so every benchmark here asks this gate first. Knows nothing about what is measured.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
KERNEL_TESTS = ("tests/kernels", "tests/engine/test_graphs.py")  # the kernels, and the engine that runs them
TEST_S_MAX = 240.0
_SOURCES = ("loopserve/kernels", "tests/kernels")
_WORKERS_MAX = 8  # Triton compiles for minutes where one process does it all
_TAIL_CHARS = 4000


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended."""

    code: int | None  # None: it ran past its time and was ended
    tail: str  # the last it said
    seconds: float


@dataclass(frozen=True, slots=True)
class Proof:
    """That the kernel tests passed, on which device and over which sources."""

    device: str
    sources: str  # fingerprint of the kernels and their tests
    commit: str
    tests: tuple[str, ...]
    summary: str  # pytest's last line

    @property
    def is_whole(self) -> bool:
        """Whether it is about all kernel tests."""
        return self.tests == KERNEL_TESTS

    def write(self, file: Path) -> None:
        """For `--tests-passed-at`."""
        file.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> Proof:
        """Raises SystemExit where the file is none."""
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            return cls(**{**record, "tests": tuple(record["tests"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise SystemExit(f"{file} does not prove that tests passed: {error}") from error


def device_label(device: torch.device) -> str:
    """What a proof calls a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def fingerprint() -> str:
    """Of every source that the kernel tests are about."""
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{file.relative_to(ROOT)}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def require_green(device: torch.device, *, proof_file: Path | None, tests: Sequence[str], commit: str) -> Proof:
    """The proof in the file, or of tests that run now. Raises SystemExit where there is none, or where it is about something else."""
    if proof_file is not None:
        proof = Proof.read(proof_file)
        if proof.sources != fingerprint() or proof.device != device_label(device):
            raise SystemExit(
                f"{proof_file} is about other sources or another device ({proof.device}): leave --tests-passed-at away, and the tests run."
            )
        return proof
    outcome = run_tests(device, tests=tests, seconds_max=TEST_S_MAX)
    if outcome.code != 0:
        raise SystemExit(
            f"The kernel tests are not green on {device}, so nothing is measured (--force measures all the same, not to be published):\n"
            f"{outcome.tail}"
        )
    return proof_of(device, outcome, tests=tests, commit=commit)


def proof_of(device: torch.device, outcome: Outcome, *, tests: Sequence[str], commit: str) -> Proof:
    """What tests that passed just now prove."""
    assert outcome.code == 0, "the tests passed"
    return Proof(device_label(device), fingerprint(), commit, tuple(tests), last_line(outcome))


def run_tests(
    device: torch.device,
    *,
    tests: Sequence[str],
    seconds_max: float,
    runner: Callable[..., Outcome] | None = None,
) -> Outcome:
    """Run the tests on the device, spread over processes where pytest-xdist is there. Raises SystemExit without pytest."""
    if importlib.util.find_spec("pytest") is None:
        raise SystemExit(
            "pytest is not installed, and nothing is measured without the kernel tests: python -m pip install pytest hypothesis"
        )
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    workers = min(_WORKERS_MAX, len(os.sched_getaffinity(0)))
    if device.type == "cuda" and workers > 1 and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(workers)]
    run = run_program if runner is None else runner
    return run(command, seconds_max=seconds_max, environment={"LOOPSERVE_TEST_DEVICE": device.type})


def run_program(command: Sequence[str], *, seconds_max: float, environment: Mapping[str, str] | None = None) -> Outcome:
    """Run a program from the root of the checkout; past its time it is ended, with every process that it started."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=max(seconds_max, 0.0))
        code: int | None = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        code = None
    return Outcome(code, said[-_TAIL_CHARS:], round(time.perf_counter() - started, 2))


def last_line(outcome: Outcome) -> str:
    """The last line that a program wrote."""
    lines = outcome.tail.strip().splitlines()
    return lines[-1] if lines else ""
