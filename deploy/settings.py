"""Settings of the deployment: what listens where, how many replicas there are, and how long anything may wait.

The engine's own settings are `loopserve.config.EngineConfig`. Read once, at the start; knows nothing about Ray.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Self

from deploy.autopilot.settings import AutopilotSettings
from deploy.handoff.settings import HandoffSettings
from loopserve.environment import read_environment, read_setting, record_from
from loopserve.errors import ConfigError
from monitoring.settings import MetricsSettings
from monitoring.tracing import TracingSettings

ENV_PREFIX = "LOOPSERVE_"
ENGINE_PREFIX = "LOOPSERVE_ENGINE_"  # belongs to EngineConfig
CLIENT_NAMES = ("LOOPSERVE_API_KEY",)  # of the command line's clients; a shell may have them and start a server
TOPOLOGIES = ("two_hop", "direct")
PLAIN_NAMES = ("host", "port", "replicas", "model", "device")  # also read without prefix, as the Makefile passes them


@dataclass(frozen=True, slots=True)
class DeploySettings:
    """All of the deployment. Every wait and every table has its limit here."""

    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    ingress_replicas: int = 1
    topology: str = "two_hop"  # or "direct", for clusters: see deploy.direct
    local_direct: bool = False  # allow "direct" on one machine, where it listens on every interface
    model: str = ""  # hub id or directory; empty: the shipped model
    device: str = "auto"
    gpus_per_replica: float | None = None  # None: 1 on "cuda"; a local run shares out the GPUs it finds
    torch_threads: int | None = None  # per replica; None: the machine's cores shared out over the replicas
    tenant_header: str = "x-tenant-id"  # set by a trusted gateway; sessions and prefixes never cross its values
    keys_file: str = ""  # see deploy.keys; empty: no keys, every door is open; set: the tenant is the key's
    open_metrics: bool = False  # /metrics without a key, for a scraper in the cluster; only read where there are keys
    observe: bool = False  # the live page at /observe; `loopserve observe` turns it on
    body_bytes_max: int = 8 << 20
    branches_max: int = 16  # OpenAI's `n`
    pieces_per_s: int = 4000  # of streams, that one ingress is sent (two_hop); beyond, one holds several tokens
    admission_timeout_s: float = 300.0  # from a request's arrival to its place in the batch
    idle_timeout_s: float = 600.0  # between two pieces of an answer; the first comes after the whole prefill
    ask_timeout_s: float = 2.0  # one question to all replicas
    start_timeout_s: float = 600.0
    stop_timeout_s: float = 20.0  # running turns may end before a replica goes
    start_attempts: int = 3  # of a replica's constructor
    routing_stats_period_s: float = 0.5  # age of what routers know, about
    health_check_period_s: float = 2.0  # three failures in a row and Serve replaces a replica
    claims_max: int = 2048  # conversations that one replica publishes: 8 bytes each, newest first
    conversations_max: int = 16_384  # header-less conversations that one replica recognises
    autopilot: AutopilotSettings = field(default_factory=AutopilotSettings)
    metrics: MetricsSettings = field(default_factory=MetricsSettings)
    tracing: TracingSettings = field(default_factory=TracingSettings)
    handoff: HandoffSettings = field(default_factory=HandoffSettings)
    spill_turns: int = 4  # see router.affinity.AffinitySettings
    move_cost_factor: float = 1.5

    def __post_init__(self) -> None:
        for name in ("replicas", "ingress_replicas", "branches_max", "claims_max", "conversations_max", "spill_turns"):
            _check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; at least 1 is needed")
        for name in ("admission_timeout_s", "idle_timeout_s", "ask_timeout_s", "start_timeout_s", "stop_timeout_s"):
            _check(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; a wait is longer than nothing")
        for name in ("routing_stats_period_s", "health_check_period_s", "move_cost_factor"):
            _check(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; it must be positive")
        _check(self.topology in TOPOLOGIES, f"topology is {self.topology!r}; there are {', '.join(TOPOLOGIES)}")
        _check(self.pieces_per_s >= 1, f"pieces_per_s is {self.pieces_per_s}; at least 1 is needed")
        _check(1 <= self.port <= 65535, f"port is {self.port}; ports are 1 to 65535")
        _check(self.body_bytes_max >= 1024, f"body_bytes_max is {self.body_bytes_max}; at least 1024 is needed")
        _check(self.torch_threads is None or self.torch_threads >= 1, "torch_threads must be at least 1")
        _check(self.gpus_per_replica is None or self.gpus_per_replica >= 0, "gpus_per_replica must not be negative")

    @property
    def drain_s(self) -> float:
        """How long a replica that ends may give sessions away: turns that still run, and the engine's end, have the other half."""
        return min(self.handoff.time_max_s, self.stop_timeout_s / 2)

    @property
    def num_doors(self) -> int:
        """Processes that take requests in, among which an API key's limits are shared out."""
        return self.replicas if self.topology == "direct" else self.ingress_replicas

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **overrides: Any) -> Self:
        """Defaults, then HOST, PORT, REPLICAS, MODEL and DEVICE, then `LOOPSERVE_<FIELD>` (of a group:
        `LOOPSERVE_<GROUP>__<FIELD>`), then `overrides`.

        Raises ConfigError for an unknown or malformed setting.
        """
        given = os.environ if environ is None else environ
        env = {name: text for name, text in given.items() if name not in CLIENT_NAMES}
        plain = {name: env[name.upper()] for name in PLAIN_NAMES if env.get(name.upper(), "")}
        values = {name: read_setting(cls, name, text, name.upper()) for name, text in plain.items()}
        prefixed = read_environment(cls, env, prefix=ENV_PREFIX, excluded_prefix=ENGINE_PREFIX)
        return cls(**{**values, **prefixed, **_built(cls, overrides)})


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _built(record: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with groups that came as mappings, from a cluster's YAML, made into their records. Raises ConfigError."""
    groups = {f.name: f.type for f in fields(record) if is_dataclass(f.type)}
    built = dict(values)
    for name in groups.keys() & values.keys():
        if isinstance(values[name], Mapping):
            built[name] = record_from(groups[name], values[name], name=name)
    return built
