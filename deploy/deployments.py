"""The two Ray Serve deployments: thin shells around `deploy.replica` and `deploy.ingress`. Nothing is decided here, nothing heavy imported:
the processes of the ingress and of Serve itself never load torch.

Hop 1 lives in `Ingress`, hop 3 in `EngineReplica`; `deploy.app` binds them together.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from typing import Any

import ray.util.metrics
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from deploy.backend import BackendFactory, resolve_factory
from deploy.calls import BudgetOrder, BudgetReply, Item, ReplicaSignals, ReplicaStatus, SessionView, TurnCall
from deploy.fleet import RayFleet, RayPeers
from deploy.handoff.records import Offer, Piece, Receipt, Standing
from deploy.ingress import build_api
from deploy.load import LoadMeter
from deploy.metrics_page import IngressMetrics
from deploy.replica import Replica
from deploy.replica_metrics import ReplicaMetrics
from deploy.settings import DeploySettings
from loopserve.config import EngineConfig
from loopserve.errors import LoopServeError
from monitoring.catalogue import Origin
from monitoring.exposition import Families
from monitoring.tracing import TurnTracer, open_tracing
from router.decisions import Decisions

_CLOSE_S = 5.0  # of an engine, its last saves left aside
START_FAILED = "loopserve start failed"  # deploy.local finds the reason behind this in Serve's status message


class EngineReplica:
    """One engine. Answers `(its name, value)` to questions, so that answers of a broadcast can be told apart."""

    def __init__(self, settings: DeploySettings, config: EngineConfig, factory: str | BackendFactory) -> None:
        num_threads = settings.torch_threads or max(1, (os.cpu_count() or 1) // settings.replicas)
        self._name = serve.get_replica_context().replica_id.unique_id
        self._metrics = ReplicaMetrics(
            settings.metrics,
            name=self._name,
            visible_gpus=os.environ.get("CUDA_VISIBLE_DEVICES"),
            ray_api=ray.util.metrics,
        )
        self._tracing = open_tracing(settings.tracing, instance=self._name)
        traced = [] if self._tracing is None else [TurnTracer(self._tracing, replica=self._name)]
        load = LoadMeter([self._metrics.recorder, *traced], max_running_turns=config.max_running_turns)
        try:
            backend = resolve_factory(factory)(config, load, num_threads=num_threads)
        except LoopServeError as error:
            raise RuntimeError(f"{START_FAILED} [{type(error).__name__}] {error.message} [end]") from error
        self._engine = backend.engine
        self._replica = Replica(
            backend,
            settings,
            name=self._name,
            load=load,
            metrics=self._metrics.sink,
            compact_above_ratio=config.compact_above_ratio,
        )
        self._replica.keep_papers()
        backend.engine.start()
        self._metrics.start()
        self._ask_timeout_s = settings.ask_timeout_s
        self._close_s = _CLOSE_S + (config.disk.flush_s if config.disk.directory else 0.0)
        loop = asyncio.get_running_loop()
        self._chores = [loop.create_task(self._metrics.refresh_ray(backend.engine))]
        if settings.handoff.rebalance_period_s > 0:
            self._chores.append(loop.create_task(self._replica.rebalance_for_ever(self._peers())))

    async def chat(self, call: TurnCall) -> AsyncGenerator[Item, None]:
        """Hop 3 of a turn."""
        async with aclosing(self._replica.chat(call)) as items:
            async for item in items:
                yield item

    async def status(self) -> tuple[str, ReplicaStatus]:
        """What is served here."""
        return self._name, self._replica.status()

    async def sessions(self, tenant: str) -> tuple[str, tuple[SessionView, ...]]:
        """The tenant's sessions."""
        return self._name, await self._replica.sessions(tenant)

    async def session(self, tenant: str, name: str) -> tuple[str, SessionView | None]:
        """One session."""
        return self._name, await self._replica.session(tenant, name)

    async def release(self, tenant: str, name: str) -> tuple[str, bool]:
        """Forget one session."""
        return self._name, await self._replica.release(tenant, name)

    async def metrics(self) -> tuple[str, Families]:
        """Everything counted here, for the page of the whole application."""
        return self._name, await asyncio.to_thread(self._metrics.families, self._engine)

    async def signals(self) -> tuple[str, ReplicaSignals]:
        """What the autopilot needs to know."""
        return self._name, await self._replica.signals()

    async def set_budget(self, order: BudgetOrder) -> tuple[str, BudgetReply]:
        """An autopilot's word."""
        return self._name, await self._replica.set_budget(order)

    async def standing(self) -> tuple[str, Standing]:
        """What a replica has to know that looks for new homes."""
        return self._name, self._replica.standing()

    async def take_offer(self, offer: Offer) -> tuple[str, Receipt]:
        """Another replica has a session for this one."""
        return self._name, await self._replica.arrivals.offer(offer)

    async def take_piece(self, piece: Piece) -> tuple[str, Receipt]:
        """A part of that session."""
        return self._name, await self._replica.arrivals.piece(piece)

    async def count_left(self, counts: Mapping[str, int]) -> tuple[str, None]:
        """A replica that ends could not give these sessions away."""
        self._replica.arrivals.count_left(counts)
        return self._name, None

    def record_routing_stats(self) -> dict[str, Any]:
        """Called by Serve every `routing_stats_period_s`; routers see the result."""
        return self._replica.routing_stats()

    def check_health(self) -> None:
        """Called by Serve every `health_check_period_s`; three failures and this replica is replaced."""
        self._replica.check_health()

    async def __del__(self) -> None:
        """Called by Serve when ongoing requests have ended or their time is over."""
        replica = getattr(self, "_replica", None)
        if replica is not None:
            for chore in self._chores:
                chore.cancel()
            self._metrics.stop()
            with suppress(
                Exception
            ):  # Serve may not let a replica speak any more; its sessions are computed again then
                await replica.drain(self._peers())
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.to_thread(replica.close), timeout=self._close_s)
            if self._tracing is not None:
                await asyncio.to_thread(self._tracing.close)

    def _peers(self) -> RayPeers:
        """A handle to one's own deployment, made where it is needed: it would bring every router's news to every replica."""
        context = serve.get_replica_context()
        own = serve.get_deployment_handle(context.deployment, app_name=context.app_name)
        return RayPeers(RayFleet(own, ask_timeout_s=self._ask_timeout_s), own=self._name)


@serve.ingress()
class Ingress:
    """The HTTP surface in one process."""

    def __init__(
        self, engines: DeploymentHandle, settings: DeploySettings, autopilot: DeploymentHandle | None = None
    ) -> None:
        context = serve.get_replica_context()
        self._metrics = IngressMetrics(context.replica_id.unique_id)
        Decisions.listener = self._metrics.decided
        self._fleet = RayFleet(engines, ask_timeout_s=settings.ask_timeout_s)
        own = serve.get_deployment_handle(context.deployment, app_name=context.app_name)
        self._peers = [(Origin.INGRESS, RayFleet(own, ask_timeout_s=settings.ask_timeout_s))]
        if autopilot is not None:
            self._peers.append((Origin.AUTOPILOT, RayFleet(autopilot, ask_timeout_s=settings.ask_timeout_s)))
        self._settings = settings
        self._tracing = open_tracing(settings.tracing, instance=self._metrics.name)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve after the constructor."""
        return build_api(self._fleet, self._settings, metrics=self._metrics, peers=self._peers, tracing=self._tracing)

    async def ingress_metrics(self) -> tuple[str, Families]:
        """Everything counted here, for a page that another ingress makes."""
        return self._metrics.name, self._metrics.families()

    async def in_flight(self) -> tuple[str, int]:
        """Completion requests that are being answered here: while there are any, the last replica stays."""
        return self._metrics.name, self._metrics.in_flight

    async def __del__(self) -> None:
        """Called by Serve when ongoing requests have ended or their time is over."""
        tracing = getattr(self, "_tracing", None)
        if tracing is not None:
            await asyncio.to_thread(tracing.close)
