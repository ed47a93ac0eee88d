"""The Serve application: which deployments there are and how they are set. Topology `two_hop`; `direct` is in `deploy.direct`:

    Serve's proxy -> Ingress -> handle with an affinity key -> EngineReplica

Importable by a cluster's YAML as `deploy.app:application`; a local run is `deploy.local.run`.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig

from deploy.autopilot.deployment import Autopilot
from deploy.autopilot.settings import PilotMode
from deploy.backend import REAL_BACKEND, BackendFactory
from deploy.deployments import EngineReplica, Ingress
from deploy.settings import DeploySettings
from loopserve.config import EngineConfig
from loopserve.errors import ConfigError

APP_NAME = "loopserve"
ENGINE_DEPLOYMENT = "EngineReplica"
INGRESS_DEPLOYMENT = "Ingress"
AUTOPILOT_DEPLOYMENT = "Autopilot"

_ONGOING_SLACK = (
    64  # the engine's own limits must be met first: it answers 429 with a reason, Serve would only move requests around
)


def application(args: Mapping[str, Any]) -> serve.Application:
    """Builder for a cluster's YAML: settings from the environment, over them `args`."""
    return build_app(DeploySettings.from_env(**args))


def build_app(
    settings: DeploySettings,
    *,
    engine_config: EngineConfig | None = None,
    factory: str | BackendFactory = REAL_BACKEND,
) -> serve.Application:
    """The application, not yet deployed.

    `engine_config` None: from the environment. `factory` builds the inside of a replica: a picklable callable or its dotted path.
    Raises ConfigError.
    """
    config = engine_config or engine_config_for(settings)
    turns_max = config.max_running_turns + config.max_waiting_turns + _ONGOING_SLACK
    autopilot = _autopilot(settings)
    engine_options: dict[str, Any] = {
        "name": ENGINE_DEPLOYMENT,
        "num_replicas": settings.replicas,
        "max_ongoing_requests": turns_max,
        "ray_actor_options": {"num_cpus": 0, "num_gpus": _gpus(settings)},
        "health_check_period_s": settings.health_check_period_s,
        "health_check_timeout_s": max(10.0, 2 * settings.health_check_period_s),
        "graceful_shutdown_timeout_s": settings.stop_timeout_s,
        "graceful_shutdown_wait_loop_s": 0.1,
        "max_constructor_retry_count": settings.start_attempts,
        "request_router_config": RequestRouterConfig(
            request_router_class="router.ray_router.AffinityRouter",
            request_router_kwargs={
                "spill_turns": settings.spill_turns,
                "move_cost_factor": settings.move_cost_factor,
            },
            request_routing_stats_period_s=settings.routing_stats_period_s,
        ),
    }
    door_options: dict[str, Any] = {
        "max_ongoing_requests": turns_max * most_replicas(settings),
        "ray_actor_options": {"num_cpus": 0},
        "graceful_shutdown_timeout_s": settings.stop_timeout_s,
        "graceful_shutdown_wait_loop_s": 0.1,
    }
    if settings.topology == "direct":
        from deploy.direct import direct_app  # Serve's private hook: only where it was asked for

        return direct_app(
            settings, config, factory, engine_options=engine_options, router_options=door_options, autopilot=autopilot
        )
    engines = serve.deployment(EngineReplica).options(**engine_options)
    ingress = serve.deployment(Ingress).options(
        name=INGRESS_DEPLOYMENT, num_replicas=settings.ingress_replicas, **door_options
    )
    return ingress.bind(engines.bind(settings, config, factory), settings, autopilot)


def has_autopilot(settings: DeploySettings) -> bool:
    """Whether one is deployed. It then needs Serve's external scaler, and may be switched off and on while it runs."""
    return settings.autopilot.mode != PilotMode.OFF


def most_replicas(settings: DeploySettings) -> int:
    """How many replicas there may come to be."""
    return max(settings.replicas, settings.autopilot.max_replicas) if has_autopilot(settings) else settings.replicas


def _autopilot(settings: DeploySettings) -> serve.Application | None:
    """The autopilot beside the engines; its settings change in place, by `user_config`. Raises ConfigError."""
    if not has_autopilot(settings):
        return None
    pilot = settings.autopilot
    if pilot.mode == PilotMode.ON and not pilot.min_replicas <= settings.replicas <= pilot.max_replicas:
        raise ConfigError(
            f"replicas is {settings.replicas}, the autopilot may choose {pilot.min_replicas} to {pilot.max_replicas}; set REPLICAS, "
            "LOOPSERVE_AUTOPILOT__MIN_REPLICAS and LOOPSERVE_AUTOPILOT__MAX_REPLICAS so that it can begin"
        )
    is_direct = settings.topology == "direct"
    if is_direct and pilot.min_replicas == 0:
        raise ConfigError("topology 'direct' cannot go to zero: nobody would be there to answer; set min_replicas to 1")
    deployment = serve.deployment(Autopilot).options(
        name=AUTOPILOT_DEPLOYMENT,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        user_config=asdict(pilot),
        health_check_period_s=settings.health_check_period_s,
        graceful_shutdown_timeout_s=5.0,
        graceful_shutdown_wait_loop_s=0.1,
    )
    return deployment.bind(settings, engines=ENGINE_DEPLOYMENT, ingresses=None if is_direct else INGRESS_DEPLOYMENT)


def engine_config_for(settings: DeploySettings) -> EngineConfig:
    """The engine's settings from the environment, with model and device where the deployment names them. Raises ConfigError."""
    named: dict[str, Any] = {"model": settings.model, "device": "" if settings.device == "auto" else settings.device}
    return EngineConfig.from_env(**{name: value for name, value in named.items() if value})


def _gpus(settings: DeploySettings) -> float:
    """Share of a GPU per replica; Ray hides all GPUs from an actor that asks for none."""
    if settings.gpus_per_replica is not None:
        return settings.gpus_per_replica
    return 1.0 if settings.device.startswith("cuda") else 0.0
