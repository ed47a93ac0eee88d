"""Does the autopilot keep a fleet out of trouble? Live: real replicas, router, sessions, caches and Prometheus; only the GPU sleeps.

    python -m benchmarks.cluster.autopilot                                 the load goes up fivefold and down again
    python -m benchmarks.cluster.autopilot --variant prometheus-stopped    and Prometheus is away for half a minute in the middle
    python -m benchmarks.cluster.autopilot --variant off                   the same load on a fleet that nobody steers
    python -m benchmarks.cluster.autopilot --variant all                   the three, one after the other, into one result

Every variant starts its own service and its own Prometheus. Moments and verdicts come from what Prometheus recorded, asked after the run,
and from what the clients saw.
"""

import argparse
import asyncio
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import httpx

from benchmarks.cluster.affinity import token_counter
from benchmarks.cluster.autopilot_load import Held, Part, Phases, hold
from benchmarks.cluster.autopilot_plot import draw
from benchmarks.cluster.autopilot_record import (
    Check,
    Limits,
    Moments,
    Outcome,
    Recording,
    View,
    checks_off,
    checks_on,
    checks_outage,
    moments,
    record,
)
from benchmarks.cluster.prometheus import Prometheus
from benchmarks.cluster.service import free_port, running_service
from benchmarks.cluster.sleeping_runner import THIRTEEN_BILLION
from benchmarks.machine import describe_machine, require_quiet
from benchmarks.report import RESULTS, Table, write_result
from deploy.autopilot.settings import AutopilotSettings
from loopserve.bench import Endpoint, FailureKind, TurnRecord, made_text
from monitoring import catalogue as c

_SCRAPE_S = 1.0
_SETTLE_S = 8.0  # Prometheus hears of its targets up to five seconds after its start
_LOOK_EVERY_S = 1.0
_PROBE_WORDS = 400

ENGINE: Mapping[str, str] = {  # small pools and batches, so that twenty conversations are many
    "KV_BLOCKS": "900",
    "MAX_RUNNING_TURNS": "16",
    "DECODE__BUDGET_TOKENS": "2048",
    "DECODE__BUDGET_FLOOR_TOKENS": "128",
    "DECODE__AUTO_MIN_CONTEXT_TOKENS": "512",
}
PILOT: Mapping[str, str] = {  # its own thresholds are the defaults; what is counted in minutes is shortened to seconds
    "MODE": "on",
    "MAX_REPLICAS": "4",
    "INTERVAL_S": "1",
    "SNAPSHOT_AGE_MAX_S": "5",
    "TIGHTEN_COOLDOWN_S": "3",
    "RELAX_HOLD_S": "5",
    "SCALE_UP_COOLDOWN_S": "10",
    "SCALE_DOWN_HOLD_S": "8",
    "SCALE_DOWN_COOLDOWN_S": "5",
    "WARM_PATIENCE_S": "4",
}


class Variant(StrEnum):
    """What is run."""

    ON = "on"
    STOPPED = "prometheus-stopped"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class Run:
    """One variant, over."""

    variant: Variant
    recording: Recording
    moments: Moments
    views: tuple[View, ...]
    decisions: tuple[dict[str, Any], ...]  # as the autopilot told them, oldest first; explains, proves nothing
    turns: tuple[TurnRecord, ...]  # `sent_at_s` counts from the beginning of the load
    outcome: Outcome
    outage: tuple[float, float] | None
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether all claims hold."""
        return all(check.passed for check in self.checks)


def run_variant(variant: Variant, phases: Phases, *, folder: Path) -> Run:
    """Start everything, hold the load, ask Prometheus, end everything."""
    folder.mkdir()
    port = free_port()
    with Prometheus(folder, targets=[f"127.0.0.1:{port}"], scrape_s=_SCRAPE_S) as prometheus:
        _say(f"{variant}: starting a replica")
        settings = service_settings(variant, prometheus.url)
        command = (sys.executable, "-m", "benchmarks.cluster.sleeping_runner")
        with running_service(
            settings, num_replicas=1, log=folder / "service.log", command=command, port=port
        ) as service:
            time.sleep(_SETTLE_S)
            _say(f"{variant}: load for {phases.total_s:g} s")
            watch = Watch(service.url, prometheus, phases.outage if variant is Variant.STOPPED else None)
            endpoint = Endpoint(service.url, service.model)
            held = asyncio.run(hold(endpoint, phases, tokens_per_word=tokens_per_word(), meanwhile=watch.go))
            decisions = watch.decisions()
            num_s = math.floor(time.time() - held.began_unix_s)
            recording = record(prometheus, start=held.began_unix_s, num_s=num_s)
    limits = pilot_limits()
    turns, outcome = turns_of(held), outcome_of(held)
    checks = (checks_off if variant is Variant.OFF else checks_on)(recording, limits, outcome)
    if watch.outage is not None:
        checks += checks_outage(recording, watch.views, watch.outage)
    for check in checks:
        _say(f"{variant}: {'pass' if check.passed else 'FAIL'}  {check.name}: {check.finding}")
    found = moments(recording, limits)
    return Run(variant, recording, found, tuple(watch.views), decisions, turns, outcome, watch.outage, checks)


def service_settings(variant: Variant, prometheus_url: str) -> dict[str, str]:
    """The service's environment."""
    pilot = {"MODE": "off"} if variant is Variant.OFF else {**PILOT, "PROMETHEUS_URL": prometheus_url}
    return {
        "LOOPSERVE_TORCH_THREADS": "1",
        "LOOPSERVE_STOP_TIMEOUT_S": "30",
        **{f"LOOPSERVE_ENGINE_{name}": text for name, text in ENGINE.items()},
        **{f"LOOPSERVE_AUTOPILOT__{name}": text for name, text in pilot.items()},
    }


def pilot_limits() -> Limits:
    """The thresholds in force: the autopilot's defaults."""
    settings = AutopilotSettings()
    return Limits(settings.high_ratio, settings.queue_high_ratio)


def tokens_per_word() -> float:
    """Of the made-up text, to the tokenizer that the sleeping model has."""
    text = made_text(random.Random(0), _PROBE_WORDS)
    return token_counter("")(text) / _PROBE_WORDS


class Watch:
    """Looks at the autopilot's page and at the metrics all the time, and takes Prometheus away in the variant that wants it."""

    def __init__(self, url: str, prometheus: Prometheus, planned: tuple[float, float] | None) -> None:
        self._url = url
        self._prometheus = prometheus
        self._planned = planned
        self.views: list[View] = []
        self.outage: tuple[float, float] | None = None  # as it really was

    async def go(self, began_unix_s: float) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group, httpx.AsyncClient(base_url=self._url, trust_env=False) as http:
            if self._planned is not None:
                group.create_task(self._take_away(began_unix_s, *self._planned))
            while True:
                self.views.append(await self._look(http, began_unix_s))
                await asyncio.sleep(_LOOK_EVERY_S)

    async def _take_away(self, began_unix_s: float, begin_s: float, end_s: float) -> None:
        await asyncio.sleep(began_unix_s + begin_s - time.time())
        stopped_s = time.time() - began_unix_s
        await asyncio.to_thread(self._prometheus.stop)
        await asyncio.sleep(began_unix_s + end_s - time.time())
        await asyncio.to_thread(self._prometheus.start)
        self.outage = (stopped_s, time.time() - began_unix_s)

    async def _look(self, http: httpx.AsyncClient, began_unix_s: float) -> View:
        status, page, gauge = 0, None, None
        at_s = time.time() - began_unix_s
        with suppress(httpx.HTTPError, ValueError):
            answer = await http.get("/v1/autopilot", timeout=5.0)
            status, page = answer.status_code, answer.json()
            if self.is_away(at_s):
                gauge = _gauge((await http.get("/metrics", timeout=5.0)).text, c.AUTOPILOT_HOLDING.name)
        return _view(at_s, status, page if status == httpx.codes.OK else None, gauge)

    def is_away(self, at_s: float) -> bool:
        """Whether Prometheus should be away, so that its metrics are read from the page itself."""
        return self._planned is not None and self._planned[0] <= at_s <= self._planned[1]

    def decisions(self) -> tuple[dict[str, Any], ...]:
        """The autopilot's own history, oldest first; empty where there is none."""
        with suppress(httpx.HTTPError, ValueError, LookupError, AttributeError):
            page = httpx.get(f"{self._url}/v1/autopilot", timeout=5.0, trust_env=False).json()
            return tuple(reversed(page["decisions"]))
        return ()


def _view(at_s: float, status: int, page: Any, gauge: float | None) -> View:
    page = page if isinstance(page, dict) else {}
    holding, wanted = page.get("holding"), page.get("wanted")
    return View(
        at_s=round(at_s, 2),
        status=status,
        holding_cause=holding["cause"] if holding else None,
        wanted=(wanted["budget_ceiling_tokens"], wanted["replicas"]) if wanted else None,
        holding_gauge=gauge,
    )


def _gauge(text: str, name: str) -> float | None:
    """The value of a gauge on a metrics page, the greatest of its series; None where it is not there."""
    values = [float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} "))]
    return max(values, default=None)


def turns_of(held: Held) -> tuple[TurnRecord, ...]:
    """All turns, on one clock."""
    more = [replace(turn, sent_at_s=turn.sent_at_s + held.more_at_s) for turn in held.more.turns]
    return tuple(sorted([*held.base.turns, *more], key=lambda turn: turn.sent_at_s))


def outcome_of(held: Held) -> Outcome:
    """Failures, and what is none."""
    turns = [*held.base.turns, *held.more.turns]
    failures = [turn.failure for turn in turns if turn.failure is not None]
    real = [failure for failure in failures if failure.kind is not FailureKind.CUT]
    return Outcome(
        num_turns=len(turns),
        num_failed=len(real),
        num_cut=len(failures) - len(real),
        failures=tuple(f"{failure.label}: {failure.message}" for failure in real),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The variants, the pictures, the verdict and the result files; 0 if every claim holds."""
    options = _options(arguments)
    load_before = require_quiet(forced=options.force)
    phases = Phases(**{field.name: getattr(options, field.name) for field in fields(Phases)})
    variants = list(Variant) if options.variant == "all" else [Variant(options.variant)]
    with tempfile.TemporaryDirectory(prefix="autopilot-", ignore_cleanup_errors=True) as folder:
        runs = {variant: run_variant(variant, phases, folder=Path(folder) / variant) for variant in variants}
    off = runs.get(Variant.OFF)
    options.out.mkdir(parents=True, exist_ok=True)
    for run in runs.values():
        draw(
            options.out / picture(options.name, run.variant),
            title=f"Autopilot: {run.variant}",
            recording=run.recording,
            moments=run.moments,
            phases=phases,
            limits=pilot_limits(),
            outage=run.outage,
            without=off.recording if off is not None and run is not off else None,
        )
    print(_written(options, phases, runs, load_before))
    return 0 if all(run.passed for run in runs.values()) else 1


def picture(name: str, variant: Variant) -> str:
    """File name of a variant's picture."""
    return f"{name}-{variant}.svg"


def _written(options: argparse.Namespace, phases: Phases, runs: Mapping[Variant, Run], load_before: float) -> str:
    tables = [_verdict_table(run) for run in runs.values()] + [_latency_table(phases, runs)]
    numbers: dict[str, Any] = {
        "passed": all(run.passed for run in runs.values()),
        "phases": asdict(phases),
        "device": asdict(THIRTEEN_BILLION),
        "engine": dict(ENGINE),
        "autopilot": dict(PILOT),
        "runs": {run.variant: _numbers(run) for run in runs.values()},
    }
    many = phases.num_base * phases.factor
    return write_result(
        options.out,
        options.name,
        title=f"The autopilot under {phases.factor} times the load, live",
        machine=describe_machine(load_before=load_before),
        numbers=numbers,
        tables=tables,
        notes=[
            *(f"![{run.variant}]({picture(options.name, run.variant)})" for run in runs.values()),
            f"{phases.num_base} readers all the time, {many} from {phases.base_s:g} s to {phases.base_s + phases.high_s:g} s: each opens a "
            "document of about 1,200 tokens behind a common system message, asks five questions of 100 tokens, gets 48 tokens each, thinks "
            "one to three seconds between, and begins the next document.",
            f"Real: Ray Serve with ingress, router and engine replicas in processes of their own, sessions, prefix cache, scheduler, "
            f"Prometheus (scraping every {_SCRAPE_S:g} s), the autopilot reading it. Not real: the GPU. {THIRTEEN_BILLION.sentence()}. "
            "Decode is sparse from 512 tokens on; a prefill computes every row.",
            "A pool holds 14,384 tokens, so that one replica is right for the base load. A turn's whole KV stays in the pool while it is "
            "answered: a tighter budget makes decode faster and working sets smaller, it does not make room. Room comes with replicas.",
            "Thresholds are the defaults. Shortened, because minutes are waited for in a service: "
            + ", ".join(f"{name.lower()} {text}" for name, text in PILOT.items() if name.endswith("_S"))
            + ".",
            "The crossing is the first second in which Prometheus has a signal above its threshold: working sets, live bytes, or waiting "
            "turns over places. What the autopilot says it did is in the JSON, and decides nothing here.",
            "While Prometheus is away nothing is recorded, and a replica that became ready meanwhile is seen afterwards; back, it takes "
            "up to five seconds until it scrapes again.",
            "In the JSON a series is one line: a value a second, `-` where nothing was scraped.",
        ],
    )


def _verdict_table(run: Run) -> Table:
    rows = tuple((check.name, "pass" if check.passed else "FAIL", check.finding) for check in run.checks)
    return Table(f"{run.variant}: {'pass' if run.passed else 'FAIL'}", ("claim", "verdict", "found"), rows)


def _latency_table(phases: Phases, runs: Mapping[Variant, Run]) -> Table:
    rows = []
    for run in runs.values():
        for part in Part:
            turns = [turn for turn in run.turns if phases.part(turn.sent_at_s) is part and turn.is_answered]
            firsts = sorted(turn.first_token_s for turn in turns if turn.first_token_s is not None)
            gaps = sorted(turn.inter_token_s for turn in turns if turn.inter_token_s is not None)
            cells = (_quantile(firsts, 0.5), _quantile(firsts, 0.95), _quantile(gaps, 0.5, factor=1e3))
            rows.append((run.variant, part, str(len(turns)), *cells))
    header = ("variant", "sent during", "turns", "TTFT median, s", "TTFT p95, s", "between tokens, median, ms")
    return Table("What clients saw", header, tuple(rows))


def _quantile(values: Sequence[float], share: float, *, factor: float = 1.0) -> str:
    if not values:
        return "-"
    if share == 0.5:
        return f"{statistics.median(values) * factor:.2f}"
    return f"{values[math.ceil(share * len(values)) - 1] * factor:.2f}"


def _numbers(run: Run) -> dict[str, Any]:
    return {
        "passed": run.passed,
        "checks": [asdict(check) for check in run.checks],
        "moments": asdict(run.moments),
        "outcome": asdict(run.outcome),
        "outage": run.outage,
        "views_while_away": [asdict(view) for view in run.views if view.holding_gauge is not None],
        "decisions": [_plain(decision) for decision in run.decisions],
        "series": {
            name: " ".join("-" if math.isnan(value) else f"{value:.4g}" for value in values)
            for name, values in run.recording.series.items()
        },
    }


def _plain(decision: Mapping[str, Any]) -> dict[str, Any]:
    return {name: decision.get(name) for name in ("unix_time", "actions", "reason", "cause")}


def _say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    phases = Phases()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--variant", choices=[*Variant, "all"], default=Variant.ON)
    add("--num-base", type=int, default=phases.num_base, help="readers all the time")
    add("--factor", type=int, default=phases.factor, help="times as many in the high part")
    add("--base-s", type=float, default=phases.base_s)
    add("--high-s", type=float, default=phases.high_s)
    add("--after-s", type=float, default=phases.after_s)
    add("--ramp-s", type=float, default=phases.ramp_s, help="within which readers arrive")
    add("--outage-after-s", type=float, default=phases.outage_after_s, help="of the high part")
    add("--outage-s", type=float, default=phases.outage_s)
    add("--out", type=Path, default=RESULTS, help="folder of the result files")
    add("--name", default="autopilot", help="of the result files")
    add("--force", action="store_true", help="run on a busy machine")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
