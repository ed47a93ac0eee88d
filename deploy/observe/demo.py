"""A whole LoopServe on this machine to watch: the service with its page, a Prometheus beside it where one is found, a load. Prints nothing.

They end in the order load, service, Prometheus, and nothing of them stays.
"""

import asyncio
import random
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from deploy.local import OnEvent, RunEvent, Stage, check_port_is_free, run
from deploy.observe.local_prometheus import local_prometheus
from deploy.settings import DeploySettings
from loopserve.bench import (
    Distribution,
    Endpoint,
    Synthetic,
    TurnRecord,
    Workload,
    made_text,
    measure_tokens_per_word,
    run_load,
    served_model,
)
from loopserve.config import EngineConfig
from loopserve.errors import LoopServeError
from monitoring.tools import find_tool

REPLICAS = 2
# Under the user's own environment: small enough for two cores, tight enough that the pool fills and the budget is seen to move.
DEMO_ENVIRONMENT: Mapping[str, str] = {
    # Sparse from where on there is something to choose; the system prompt before that is exact, and shared.
    "LOOPSERVE_ENGINE_PREFILL__AUTO_MIN_CONTEXT_TOKENS": "256",
    "LOOPSERVE_ENGINE_DECODE__AUTO_MIN_CONTEXT_TOKENS": "256",
    "LOOPSERVE_ENGINE_KV_BLOCKS": "385",
    "LOOPSERVE_ENGINE_MAX_RUNNING_TURNS": "8",
    "LOOPSERVE_ENGINE_DECODE__BUDGET_TOKENS": "512",
    "LOOPSERVE_ENGINE_DECODE__BUDGET_FLOOR_TOKENS": "32",
    "LOOPSERVE_AUTOPILOT__MODE": "on",
    "LOOPSERVE_AUTOPILOT__HIGH_RATIO": "0.40",
    "LOOPSERVE_AUTOPILOT__LOW_RATIO": "0.25",
    "LOOPSERVE_AUTOPILOT__TARGET_RATIO": "0.20",
    "LOOPSERVE_AUTOPILOT__RELAX_HOLD_S": "15",
    "LOOPSERVE_AUTOPILOT__SCALE_DOWN_HOLD_S": "60",
    "LOOPSERVE_AUTOPILOT__SCALE_DOWN_COOLDOWN_S": "30",
    "LOOPSERVE_AUTOPILOT__WARM_PATIENCE_S": "60",
}
# Dialogues as people hold them, in plain words; the shipped model's context ends long after the longest of them.
TALK = Synthetic(
    turns=Distribution.parse("uniform:3..20"),
    input_tokens=Distribution.parse("uniform:15..70"),
    output_tokens=Distribution.parse("uniform:12..48"),
    think_s=Distribution.parse("exponential:2..10"),
    system_tokens=Distribution.parse("64"),
)
_STOP_S_MAX = 15.0
_LOOK_S = 0.1


@dataclass(frozen=True, slots=True)
class DemoEvents:
    """Who is told what."""

    on_run: OnEvent
    on_prometheus: Callable[[str | None], None]  # its address; None: the program was not found
    on_load_end: Callable[[str], None]  # how it went, one line


def demo_settings(environ: Mapping[str, str], options: Mapping[str, Any]) -> tuple[DeploySettings, EngineConfig]:
    """The demo's defaults, over them the environment, over it the options. Raises ConfigError."""
    env = {**DEMO_ENVIRONMENT, "REPLICAS": str(REPLICAS), **environ}
    settings = DeploySettings.from_env(env, **{**options, "observe": True})
    bounds = {"MIN_REPLICAS": settings.replicas, "MAX_REPLICAS": settings.replicas + 1}
    env = {f"LOOPSERVE_AUTOPILOT__{name}": str(num) for name, num in bounds.items()} | env
    settings = DeploySettings.from_env(env, **{**options, "observe": True})
    named = {"model": settings.model, "device": "" if settings.device == "auto" else settings.device}
    return settings, EngineConfig.from_env(env, **{name: text for name, text in named.items() if text})


def run_demo(
    settings: DeploySettings,
    engine_config: EngineConfig,
    workload: Workload | None,
    *,
    api_key: str | None,
    events: DemoEvents,
) -> None:
    """Serve under load until SIGINT or SIGTERM. Raises what `deploy.local.run` raises."""
    check_port_is_free(settings.host, settings.port)
    load: Load | None = None

    def tell(event: RunEvent) -> None:
        nonlocal load
        events.on_run(event)
        if event.stage is Stage.READY and workload is not None:
            load = Load(workload, Endpoint(event.url, api_key=api_key), on_end=events.on_load_end)
        elif event.stage is Stage.STOPPING and load is not None:
            load.stop()

    with ExitStack() as stack:
        if not settings.autopilot.prometheus_url:
            url, program = None, find_tool("prometheus")
            if program is not None:
                target = f"{settings.host}:{settings.port}"
                url = stack.enter_context(local_prometheus(program, target=target, api_key=api_key or ""))
                settings = replace(settings, autopilot=replace(settings.autopilot, prometheus_url=url))
            events.on_prometheus(url)
        run(settings, engine_config=engine_config, on_event=tell)


class Load:
    """Dialogues in a thread of their own, from now on."""

    def __init__(self, workload: Workload, endpoint: Endpoint, *, on_end: Callable[[str], None]) -> None:
        self._workload, self._endpoint, self._on_end = workload, endpoint, on_end
        self._stop = threading.Event()
        self._num_answered = self._num_failed = 0
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Send no turn any more and give up those in flight."""
        self._stop.set()
        self._thread.join(_STOP_S_MAX)

    def _run(self) -> None:
        try:
            asyncio.run(self._hold())
        except LoopServeError as error:
            self._on_end(f"The load ended: {error.message}")
        else:
            self._on_end(f"The load is over: {self._num_answered} turns answered, {self._num_failed} failed.")

    async def _hold(self) -> None:
        stop = asyncio.Event()
        watching = asyncio.create_task(self._pass_on(stop))
        source = self._workload.source
        async with self._endpoint.client() as http:
            endpoint = replace(self._endpoint, model=await served_model(http, self._endpoint.url))
            if isinstance(source, Synthetic):
                rng = random.Random(source.seed)
                measured = await measure_tokens_per_word(http, endpoint, lambda num_words: made_text(rng, num_words))
                source = replace(source, tokens_per_word=measured or 1.0)
        # Answers as long as was drawn: the shipped model says little by itself.
        endpoint = replace(endpoint, body={"ignore_eos": True})
        await run_load(replace(self._workload, source=source), endpoint, on_turn=self._count, stop=stop)
        watching.cancel()

    async def _pass_on(self, stop: asyncio.Event) -> None:
        while not self._stop.is_set():
            await asyncio.sleep(_LOOK_S)
        stop.set()

    def _count(self, turn: TurnRecord) -> None:
        if turn.is_answered:
            self._num_answered += 1
        elif not self._stop.is_set():  # what is cut at the end has not failed
            self._num_failed += 1
