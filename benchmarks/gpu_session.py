"""Everything that wants a GPU, in one command of under nine minutes on a bare machine: tests, memory checks, all benchmarks, the profile.

    python -m benchmarks.gpu_session --commit HASH --out DIRECTORY

It needs a checkout and, importable, the packages in `PACKAGES`; neither Ray nor an installed `loopserve`. Every part has a budget, and
what one leaves over the next ones have. A part for which no time is left is listed as skipped, one that runs past its time is ended and
listed as not finished, with what it had measured until then. Nothing is measured on red tests. After every part `NAME-DATE.json` and `.md`
are written anew, NAME being the accelerator's, so a run that is killed loses nothing but what the part it was at had not written yet: each
part writes a file of its own, in `cuda-DATE.parts/`, after every case.

Starts with the standard library alone: that something is missing must be said before anything is imported.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.kernels.gate import Outcome

PACKAGES = (  # to import, and to install
    ("torch", "torch"),
    ("transformers", "transformers"),
    ("tokenizers", "tokenizers"),
    ("safetensors", "safetensors"),
    ("jinja2", "jinja2"),
    ("pydantic", "pydantic"),
    ("numpy", "numpy"),
    ("pytest", "pytest"),
    ("hypothesis", "hypothesis"),
)
CUDA_PACKAGES = (("triton", "triton"),)
IMPORTS = "import loopserve.kernels, loopserve.sparsity, loopserve.loading, benchmarks.kernels.run"
TESTS = ("tests/kernels", "tests/engine/test_graphs.py")  # as `benchmarks.kernels.gate` wants them
SECONDS_MAX = 515.0  # beside it, checking what can be imported takes some ten
_TO_END_S = 20.0  # a benchmark stops beginning cases so long before it would be ended
_LEAST_S = 15.0  # with less a part does not begin: importing torch takes most of it
_MEMCHECK_TESTS = (
    "tests/kernels/test_store_kv.py",
    "tests/kernels/test_compact_kv.py",
    "tests/kernels/test_paged_decode.py",
    "tests/kernels/test_sparse_prefill.py",
)
_MEMCHECK_ONLY = "tokens or poison or empty or all_tiles"  # in the names of tests
_MEMCHECK_ERROR = 9  # exit status of the checker where it found something

Runner = Callable[..., "Outcome"]  # `benchmarks.kernels.gate.run_program`


@dataclass(frozen=True, slots=True)
class Part:
    """A program of the session; `module` None: tests and memory checks, which have a way of their own."""

    name: str
    seconds: float  # its budget on a GPU
    module: str | None = None
    takes_proof: bool = False  # asks for green tests itself, and takes the session's word for it
    flags: tuple[str, ...] = ()  # at full size


PARTS = (
    Part("ceilings", 20, "benchmarks.kernels.run"),
    Part("tests", 120),
    Part("memcheck", 25),
    Part("prefill", 100, "benchmarks.kernels.prefill", takes_proof=True),
    Part("decode", 35, "benchmarks.kernels.decode", takes_proof=True),
    Part("scores", 35, "benchmarks.kernels.scores", takes_proof=True),
    Part("decode_step", 75, "benchmarks.engine.decode_step"),
    Part("turns", 65, "benchmarks.engine.turns"),
    Part("profile", 35, "benchmarks.engine.profile"),
    # Takes two minutes, which a whole session leaves it only now and then: `--parts tests capacity`. 98,304 tokens take 12 GiB.
    Part("capacity", 5, "benchmarks.memory.capacity", flags=("--contexts", "32768", "--dense-tokens", "98304")),
)


@dataclass(frozen=True, slots=True)
class Done:
    """How a part went."""

    name: str
    status: str  # "passed" | "failed" | "not finished" | "skipped" | "refused"
    why: str
    seconds: float = 0.0
    allowed_s: float = 0.0
    tail: str = ""  # the last it said


class Session:
    """The parts done so far, and what is known from them."""

    def __init__(
        self, args: argparse.Namespace, run_program: Runner, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._args, self._run_program, self._clock = args, run_program, clock
        self._started = clock()
        self._date = datetime.now(UTC).date().isoformat()
        self._written: str | None = None
        self.done: list[Done] = []
        self.results: dict[str, Mapping[str, Any]] = {}
        self._folder = args.out.resolve() / f"{args.device}-{self._date}.parts"
        self._proof = (args.tests_passed_at or self._folder / "proof.json").resolve()

    def run(self) -> int:
        """All parts asked for; 1 where one of them failed, was refused or did not finish."""
        self._folder.mkdir(parents=True, exist_ok=True)
        budget_s, asked_s = 0.0, sum(part.seconds for part in PARTS if part.name in self._args.parts)
        scale = self._args.seconds_max / asked_s
        for part in PARTS:
            if part.name not in self._args.parts:
                continue
            budget_s += part.seconds * scale
            done = self._one(part, allowed_s=budget_s - (self._clock() - self._started))
            self.done.append(done)
            print(f"{done.name}: {done.status}{f' ({done.why})' if done.why else ''}, {done.seconds:.0f} s", flush=True)
            self._write()
        self._clear()
        return 0 if all(done.status in ("passed", "skipped") for done in self.done) else 1

    def _one(self, part: Part, *, allowed_s: float) -> Done:
        red = [done.name for done in self.done if done.name in ("tests", "memcheck") and done.status == "failed"]
        if part.module is not None and part.name != "ceilings" and not self._args.force:
            if red:
                return Done(part.name, "refused", f"red: {', '.join(red)}")
            if not self._proof.is_file():
                return Done(part.name, "refused", "the kernel tests were not run to their end")
        if allowed_s < _LEAST_S:
            return Done(part.name, "skipped", f"{max(0.0, allowed_s):.0f} s were left", allowed_s=allowed_s)
        if part.name == "tests":
            return self._tests(allowed_s)
        if part.name == "memcheck":
            return self._memcheck(allowed_s)
        return self._benchmark(part, allowed_s)

    def _tests(self, allowed_s: float) -> Done:
        import torch

        from benchmarks.kernels import gate

        device = torch.device(self._args.device)
        outcome = gate.run_tests(device, tests=self._args.tests, seconds_max=allowed_s, runner=self._run_program)
        self._proof.unlink(missing_ok=True)  # of an earlier run
        if outcome.code == 0:
            commit = self._args.commit or "unknown"
            proof = gate.proof_of(device, outcome, tests=self._args.tests, commit=commit)
            proof.write(self._proof)
        return _done("tests", outcome, allowed_s, why=gate.last_line(outcome))

    def _memcheck(self, allowed_s: float) -> Done:
        program = find_sanitizer()
        if self._args.device != "cuda" or program is None:
            return Done(
                "memcheck", "skipped", "compute-sanitizer is not here" if program is None else "the device is a CPU"
            )
        command = [program, "--tool", "memcheck", "--target-processes", "all", "--error-exitcode", str(_MEMCHECK_ERROR)]
        command += [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", _MEMCHECK_ONLY]
        # Without torch's cache every tensor is an allocation of its own, and what reads past its end is seen.
        environment = {"LOOPSERVE_TEST_DEVICE": "cuda", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        outcome = self._run_program([*command, *_MEMCHECK_TESTS], seconds_max=allowed_s, environment=environment)
        if outcome.code in (0, None, _MEMCHECK_ERROR):
            return _done("memcheck", outcome, allowed_s)
        why = f"the tests ended with status {outcome.code}, no wrong access was found until then"
        return Done("memcheck", "not finished", why, outcome.seconds, allowed_s, outcome.tail)

    def _benchmark(self, part: Part, allowed_s: float) -> Done:
        assert part.module is not None, "tests are no benchmark"
        file = self._folder / f"{part.name}.json"
        command = [sys.executable, "-m", part.module, "--device", self._args.device, "--out", str(file)]
        command += ["--seconds-max", f"{max(1.0, allowed_s - _TO_END_S):.0f}"]
        command += ["--tiny"] if self._args.tiny else part.flags
        command += ["--commit", self._args.commit] if self._args.commit else []
        if part.takes_proof:
            proven = self._proof.is_file()
            command += ["--tests-passed-at", str(self._proof)] if proven else ["--force"]
        outcome = self._run_program(command, seconds_max=allowed_s)
        if file.is_file():
            self.results[part.name] = json.loads(file.read_text(encoding="utf-8"))
            return _done(part.name, outcome, allowed_s)
        return Done(part.name, "failed", "it wrote nothing", outcome.seconds, allowed_s, outcome.tail)

    def _write(self) -> None:
        from benchmarks.kernels import results
        from benchmarks.report import Table, write_result

        parts = tuple(
            (done.name, done.status, done.why, f"{done.seconds:.0f}", f"{done.allowed_s:.0f}") for done in self.done
        )
        tables = [Table("Parts", ("part", "status", "why", "seconds", "allowed"), parts)]
        slower, missing = [], []
        for name, result in self.results.items():
            tables += results.tables(name, result)
            slower += results.losing(name, result)
            missing += results.left_out(name, result)
        ceilings = self.results.get("ceilings", {}).get("ceilings")
        name = self._named()
        if self._written not in (None, name):  # written before a part had told the accelerator's name
            for ending in ("json", "md"):
                (self._args.out / f"{self._written}.{ending}").unlink(missing_ok=True)
        self._written = name
        write_result(
            self._args.out,
            name,
            title="A session on a GPU" if self._args.device == "cuda" else "A session on a CPU: not to be published",
            machine=self._machine(),
            numbers={
                "to_publish": self._to_publish(),
                "seconds": round(self._clock() - self._started, 1),
                "parts": [asdict(done) for done in self.done],
                "losing": slower,
                "left_out": missing,
                "results": self.results,
            },
            tables=tables,
            notes=[
                f"To be published: {'yes' if self._to_publish() else 'NO'}.",
                *([f"Ceilings: {json.dumps(ceilings)}."] if ceilings else []),
                *(f"SLOWER than dense: {sentence}" for sentence in slower),
                *missing,
                *(f"{name}: {note}" for name, result in self.results.items() for note in result.get("notes", ())),
            ],
        )

    def _to_publish(self) -> bool:
        """Whether nothing was forced, toy-sized or red; cases that failed are listed with the result."""
        tested = self._proof.is_file()
        red = any(done.name in ("tests", "memcheck") and done.status == "failed" for done in self.done)
        forced = self._args.tiny or self._args.force
        return self._args.device == "cuda" and tested and not red and not forced

    def _machine(self) -> Any:
        """As the first benchmark found it: this process leaves the device alone."""
        from benchmarks.machine import Machine, describe_machine

        for result in self.results.values():
            stated = result.get("machine")
            if isinstance(stated, Mapping) and "load_before" in stated:
                return Machine(**stated)
        return describe_machine(load_before=0.0, commit=self._args.commit)

    def _named(self) -> str:
        """The result's name: after the accelerator, once a part has told which that is."""
        accelerator = getattr(self._machine(), "accelerator", "").partition(",")[0]
        slug = re.sub(r"[^a-z0-9]+", "-", accelerator.lower()).strip("-")
        return f"{slug or self._args.device}-{self._date}"

    def _clear(self) -> None:
        """Remove the parts' files that the result now holds; what else they wrote, pictures and traces, stays."""
        for file in self._folder.glob("*.json"):
            file.unlink()
        if not any(self._folder.iterdir()):
            self._folder.rmdir()


def _done(name: str, outcome: Outcome, allowed_s: float, *, why: str = "") -> Done:
    status = {0: "passed", None: "not finished"}.get(outcome.code, "failed")
    return Done(name, status, why, outcome.seconds, round(allowed_s, 1), outcome.tail)


def find_sanitizer() -> str | None:
    """NVIDIA's checker of memory accesses; None where it is not installed."""
    found = shutil.which("compute-sanitizer")
    if found is None:
        paths = sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))
        found = str(paths[-1]) if paths else None
    return found


def missing_packages(device: str) -> list[str]:
    """Names to install of what cannot be imported here."""
    wanted = PACKAGES + (CUDA_PACKAGES if device == "cuda" else ())
    return [package for module, package in wanted if importlib.util.find_spec(module) is None]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    names = [part.name for part in PARTS]
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="toy sizes; the only ones that a CPU takes")
    parser.add_argument("--seconds-max", type=float, default=SECONDS_MAX, help="of the whole session")
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--tests", nargs="+", default=list(TESTS), help="tests that must be green")
    parser.add_argument(
        "--tests-passed-at",
        type=Path,
        help="proof of green tests: written by the part `tests`, read where it is left out",
    )
    parser.add_argument("--force", action="store_true", help="measure on red tests too; the result says so")
    parser.add_argument("--commit", help="of the sources, where the checkout has no history with it")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 where something is missing, red or not finished."""
    args = parse_arguments(arguments)
    missing = missing_packages(args.device)
    if missing:
        print(f"Missing here: {', '.join(missing)}. python -m pip install {' '.join(missing)}")
        return 1
    from benchmarks.kernels.gate import run_program

    check = run_program([sys.executable, "-c", IMPORTS], seconds_max=120.0)
    if check.code != 0:
        print(f"The sources cannot be imported:\n{check.tail}")
        return 1
    return Session(args, run_program).run()


if __name__ == "__main__":
    sys.exit(main())
