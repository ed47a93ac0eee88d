"""The autopilot as a Serve deployment: a thin shell that gives a `Pilot` its process, its clock and its neighbours. Decides nothing.

A deployment of its own, not a policy inside Serve's controller: there, one that raises stops the state updates of every application. It
needs no CPU of Ray's, loads no model, and finds engines and ingresses by name.
"""

import asyncio
import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ray import serve

from deploy.autopilot.explain import Teller
from deploy.autopilot.pilot import Instruments, Pilot
from deploy.autopilot.scaler import open_scaler
from deploy.autopilot.settings import AutopilotSettings
from deploy.autopilot.sources import PrometheusSource, ReplicaSource
from deploy.fleet import RayFleet
from deploy.settings import DeploySettings
from loopserve.environment import record_from
from loopserve.errors import ConfigError, EngineUnavailable
from monitoring.catalogue import CATALOGUE, Origin
from monitoring.exposition import Families, PrometheusSink

_log = logging.getLogger("ray.serve")  # the one that Serve writes to its files
_ROUNDS_LATE_MAX = 20  # a loop that is this late is stuck, and the process is replaced


class Autopilot:
    """One autopilot for the engines of its application."""

    def __init__(self, settings: DeploySettings, *, engines: str, ingresses: str | None) -> None:
        """`engines`, `ingresses`: names of deployments of the same application."""
        context = serve.get_replica_context()
        self._name = context.replica_id.unique_id
        self._app, self._engines = context.app_name, engines
        self._sink = PrometheusSink([metric for metric in CATALOGUE if metric.origin is Origin.AUTOPILOT])
        self._settings_error = ""
        self._teller = Teller(self._name, sink=self._sink, log=_log)
        self._pilot = Pilot(
            self._name,
            settings.autopilot,
            engines=self._fleet(engines, settings.autopilot),
            ingresses=None if ingresses is None else self._fleet(ingresses, settings.autopilot),
            instruments=self._instruments,
            teller=self._teller,
            clock=time.monotonic,
            unix_time=time.time,
            log=_log,
        )
        self._loop: asyncio.Task[None] | None = None

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Called by Serve with `user_config` before the first call and at every change. What is wrong with it is said, and the settings
        before stay: to raise would make Serve replace a working autopilot by none."""
        try:
            self._pilot.set(record_from(AutopilotSettings, config, name="autopilot"))
            self._settings_error = ""
        except ConfigError as error:
            self._settings_error = error.message
            _log.error("autopilot %s: settings stay as they were: %s", self._name, error.message)
        if self._loop is None:
            self._loop = asyncio.get_running_loop().create_task(self._pilot.run())

    async def wake(self) -> tuple[str, bool]:
        """A request found no replica; whether one will come."""
        return self._name, self._pilot.wake()

    async def can_wake(self) -> tuple[str, bool]:
        """Whether a fleet without replicas is only asleep."""
        return self._name, self._pilot.can_wake

    async def overview(self) -> tuple[str, dict[str, Any]]:
        """What `GET /v1/autopilot` shows."""
        return self._name, self._teller.overview(self._pilot.settings, settings_error=self._settings_error)

    async def metrics(self) -> tuple[str, Families]:
        """Everything counted here, for the page of the whole application."""
        return self._name, self._sink.families()

    def check_health(self) -> None:
        """Called by Serve; three failures and this process is replaced."""
        settings = self._pilot.settings
        limit_s = _ROUNDS_LATE_MAX * settings.interval_s + 10 * (settings.source_timeout_s + settings.act_timeout_s)
        if self._loop is not None and (self._loop.done() or self._pilot.silent_s() > limit_s):
            raise EngineUnavailable(f"autopilot {self._name} has not ended a round for {self._pilot.silent_s():.0f} s")

    async def __del__(self) -> None:
        """Called by Serve at the end. The replicas keep their ceilings: whoever comes next takes them over."""
        loop = getattr(self, "_loop", None)
        if loop is not None:
            loop.cancel()
            with suppress(asyncio.CancelledError):
                await loop
            await self._pilot.close()

    def _fleet(self, deployment: str, settings: AutopilotSettings) -> RayFleet:
        handle = serve.get_deployment_handle(deployment, app_name=self._app)
        return RayFleet(handle, ask_timeout_s=settings.source_timeout_s)

    def _instruments(self, settings: AutopilotSettings) -> Instruments:
        asked = self._fleet(self._engines, settings)
        source = PrometheusSource(settings) if settings.prometheus_url else ReplicaSource(asked)
        scaler = open_scaler(settings, app=self._app, deployment=self._engines, environ=os.environ)
        return Instruments(source, scaler)
