"""The one catalogue of metrics: name, kind, unit, labels, buckets, help and where the number comes from.

Exporters, dashboards, alert rules and their tests all read it, so a name exists once. Names carry their unit last (a counter `_total` after
it) and no colon: Ray's exporter rewrites those. Knows nothing about who counts; `monitoring.recorder` and its siblings do.
"""

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What a number does over time."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Origin(StrEnum):
    """Which process counts; its value is the label that tells these processes apart."""

    ENGINE = "replica"
    INGRESS = "ingress"
    AUTOPILOT = "autopilot"


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the catalogue. The label of its origin comes on top of `labels`."""

    name: str
    kind: Kind
    help: str
    source: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    origin: Origin = Origin.ENGINE

    def __post_init__(self) -> None:
        assert self.name.endswith("_total") == (self.kind is Kind.COUNTER), f"{self.name}: counters end in _total"
        assert bool(self.buckets) == (self.kind is Kind.HISTOGRAM), f"{self.name}: histograms have buckets"

    @property
    def all_labels(self) -> tuple[str, ...]:
        """Every label of an exported series."""
        return (self.origin.value, *self.labels)

    @property
    def series(self) -> tuple[str, ...]:
        """The names under which its samples are exported."""
        if self.kind is Kind.HISTOGRAM:
            return (f"{self.name}_bucket", f"{self.name}_sum", f"{self.name}_count")
        return (self.name,)


TURN_BUCKETS = (
    (1, 1),
    (2, 2),
    (3, 4),
    (5, 8),
    (9, 16),
    (17, 32),
)  # first and last turn of each value of the label `turn`

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_GAP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 5.0)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_DECISION_SECONDS = (0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.001, 0.005, 0.025)
_SHARES = (0.1, 0.25, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 1.0)
_TURNS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)


def turn_bucket(turn_number: int) -> str:
    """The value of the label `turn`: "1", "2", "3-4", ... "33+"."""
    for first, last in TURN_BUCKETS:
        if turn_number <= last:
            return str(first) if first == last else f"{first}-{last}"
    return f"{TURN_BUCKETS[-1][1] + 1}+"


def _counter(name: str, help: str, source: str, *labels: str, origin: Origin = Origin.ENGINE) -> Metric:
    return Metric(name, Kind.COUNTER, help, source, labels, origin=origin)


def _gauge(name: str, help: str, source: str, *labels: str, origin: Origin = Origin.ENGINE) -> Metric:
    return Metric(name, Kind.GAUGE, help, source, labels, origin=origin)


def _histogram(
    name: str, help: str, source: str, buckets: tuple[float, ...], *labels: str, origin: Origin = Origin.ENGINE
) -> Metric:
    return Metric(name, Kind.HISTOGRAM, help, source, labels, buckets, origin)


# Latencies of turns, by how far the conversation is.
TTFT = _histogram(
    "loopserve_time_to_first_token_seconds",
    "From a turn's submission to the engine to its first token.",
    "StepStats.first_tokens",
    _SECONDS,
    "turn",
)
INTER_TOKEN = _histogram(
    "loopserve_inter_token_latency_seconds",
    "Between two tokens of one answer that follow each other.",
    "StepStats.token_gaps",
    _GAP_SECONDS,
    "turn",
)
TURN_DURATION = _histogram(
    "loopserve_turn_duration_seconds",
    "From a turn's submission to its end.",
    "TurnStats.total_s",
    _SECONDS,
    "turn",
)
QUEUE_TIME = _histogram(
    "loopserve_queue_time_seconds",
    "From a turn's submission to its place in the batch.",
    "TurnStats.queue_s",
    _SECONDS,
    "turn",
)
PREFILL_TIME = _histogram(
    "loopserve_prefill_time_seconds",
    "From a turn's place in the batch to its first token.",
    "TurnStats.first_token_s - queue_s",
    _SECONDS,
    "turn",
)
DECODE_TIME = _histogram(
    "loopserve_decode_time_seconds",
    "From a turn's first token to its end.",
    "TurnStats.total_s - first_token_s",
    _SECONDS,
    "turn",
)

# Turns and tokens.
TURNS = _counter("loopserve_turns_total", "Ended turns by reason.", "TurnStats.reason", "reason")
TURNS_RUNNING = _gauge("loopserve_turns_running", "Turns in the batch.", "MemoryStats.num_running_turns")
TURNS_WAITING = _gauge(
    "loopserve_turns_waiting", "Turns that wait for a place in the batch.", "MemoryStats.num_waiting_turns"
)
TURNS_COMPACT = _gauge(
    "loopserve_turns_compact",
    "Turns in the batch whose KV lies in host memory, and that decode from what they chose of it.",
    "MemoryStats.num_compact_turns",
)
TURNS_MAX = _gauge("loopserve_turns_max", "Places in the batch.", "EngineConfig.max_running_turns")
SESSION_TURNS = _histogram(
    "loopserve_session_turns", "How many turns the session of an ended turn has had.", "TurnStats.turn_number", _TURNS
)
PROMPT_TOKENS = _counter("loopserve_prompt_tokens_total", "Tokens of prompts.", "TurnUsage.prompt_tokens")
GENERATED_TOKENS = _counter("loopserve_generated_tokens_total", "Tokens generated.", "TurnUsage.completion_tokens")
REUSED_TOKENS = _counter(
    "loopserve_reused_tokens_total",
    "Prompt tokens whose KV was there already, by where it lay.",
    "TurnUsage.cached_tokens",
    "source",
)
PREEMPTIONS = _counter(
    "loopserve_preemptions_total", "Turns that gave up their place for an older one.", "StepStats.num_preempted"
)
REJECTIONS = _counter(
    "loopserve_rejections_total", "Requests that a replica refused, by the error's code.", "Replica.chat", "reason"
)

# Steps of the engine thread.
STEP_TIME = _histogram(
    "loopserve_step_seconds", "One step: plan, forward, apply.", "StepStats.duration_s", _STEP_SECONDS
)
STEP_TOKENS = _counter(
    "loopserve_step_tokens_total", "Rows computed by the model, by phase.", "StepStats.num_*_tokens", "phase"
)

# Memory: what lies on which tier, what the present conversations would need of the device, and what gave way.
KV_CAPACITY = _gauge("loopserve_kv_capacity_bytes", "Size of the device pool.", "MemoryStats.capacity_bytes")
KV_BYTES = _gauge(
    "loopserve_kv_bytes",
    "Bytes of each tier's pool (device, host) by kind: active, warm, shared, cached (held by no session), free.",
    "MemoryStats.blocks, host_blocks",
    "tier",
    "kind",
)
KV_DEVICE_BYTES = _gauge(
    "loopserve_kv_device_bytes",
    "All that lies on the device beside the model for the sake of KV: the pool, sketches of every tier, maps, buffers.",
    "MemoryStats.device_bytes",
)
KV_DEMAND = _gauge(
    "loopserve_kv_demand_bytes",
    "Device bytes that the present conversations would hold at a budget, compact where they may be; 'full' is all of their tokens.",
    "MemoryStats.demand",
    "state",
    "budget_tokens",
)
KV_WORKING_SET = _gauge(
    "loopserve_kv_working_set_bytes",
    "The same at the budget in force for compact turns: the compressed cache.",
    "MemoryStats.demand",
    "state",
)
LOGICAL_TOKENS = _gauge(
    "loopserve_logical_tokens",
    "Tokens of the conversations, as their clients see them.",
    "MemoryStats.active_tokens, warm_tokens",
    "state",
)
PHYSICAL_TOKENS = _gauge(
    "loopserve_physical_tokens",
    "Token slots of each tier's pool that sessions hold, shared ones once.",
    "MemoryStats.blocks, host_blocks",
    "tier",
)
COMPRESSION = _gauge(
    "loopserve_compression_ratio",
    "Computed tokens of the active conversations over the device slots that these hold; 1 where nothing is compressed.",
    "MemoryStats.compression_ratio",
)
PRESSURE_STEPS = _counter(
    "loopserve_pressure_steps_total",
    "What gave way to a turn that found no room: reclaimed_prefix_blocks (counted in blocks), offloaded_session, dropped_session, "
    "compacted_turn, lowered_budget. Preempted turns are counted by themselves.",
    "MemoryStats.pressure",
    "step",
)
DISK_SESSIONS = _gauge(
    "loopserve_disk_sessions",
    "Sessions on disk that this replica holds, or nobody; the latter are known to all replicas that share a directory.",
    "DiskCounts.num_sessions",
)
DISK_BYTES = _gauge("loopserve_disk_bytes", "Their KV; what sessions share counts in each.", "DiskCounts.num_bytes")
DISK_OUTCOMES = _counter(
    "loopserve_disk_outcomes_total",
    "Sessions that were saved to disk or loaded from it (saved, loaded), and why others were not: not_worth_it, late, leased_elsewhere, "
    "full, failed, refused.",
    "DiskCounts",
    "outcome",
)
DISK_MOVED_BYTES = _counter(
    "loopserve_disk_moved_bytes_total",
    "Bytes of them, by direction: saved (those that were there already are not written), loaded.",
    "DiskCounts.saved_bytes, loaded_bytes",
    "direction",
)
SESSIONS = _gauge("loopserve_sessions", "Sessions by state.", "MemoryStats.num_*_sessions", "state")

# The budget.
BUDGET_IN_FORCE = _gauge(
    "loopserve_budget_tokens",
    "Tokens that a KV head may select now: the default under the ceiling.",
    "MemoryStats.budget_tokens",
)
COMPACT_BUDGET = _gauge(
    "loopserve_compact_budget_tokens",
    "The same for compact turns: the engine lowers it by itself while memory is short, never below the floor.",
    "MemoryStats.compact_budget_tokens",
)
COMPACT_ABOVE = _gauge(
    "loopserve_compact_above_ratio",
    "From which share of the device pool on admitted turns are compact: the engine's own setting, or the autopilot's word.",
    "Replica.set_budget",
)
BUDGET_CEILING = _gauge(
    "loopserve_budget_ceiling_tokens", "Ceiling that the autopilot has set; the largest rung if none.", "MemoryStats"
)
BUDGET_FLOOR = _gauge(
    "loopserve_budget_floor_tokens", "No ceiling goes below.", "EngineConfig.decode.budget_floor_tokens"
)
BUDGET_MAX = _gauge(
    "loopserve_budget_max_tokens", "The engine's own budget, without a ceiling.", "EngineConfig.decode.budget_tokens"
)

# What sparsity did.
COVERAGE = _histogram(
    "loopserve_coverage_ratio",
    "Share of the dense attention weight that a turn's selections held, mean over measured rows; dense turns are absent.",
    "QualityReport.coverage_mean",
    _SHARES,
)
COVERAGE_WORST = _histogram(
    "loopserve_coverage_worst_head_ratio",
    "The same for the worst head of the turn.",
    "QualityReport.coverage_worst_head",
    _SHARES,
)
KEPT_SHARE = _histogram(
    "loopserve_kept_tokens_ratio",
    "Tokens that a decode step read over those that a dense one would have read, mean of a turn.",
    "QualityReport.kept_tokens / context_tokens",
    _SHARES,
)
REFRESHES = _counter("loopserve_refreshes_total", "Token selections chosen again.", "QualityReport.refreshes")
DENSE_FALLBACKS = _counter(
    "loopserve_dense_fallbacks_total", "Heads and windows computed dense after all.", "QualityReport.dense_fallbacks"
)
RECTIFIED_TOKENS = _counter(
    "loopserve_rectified_tokens_total",
    "Sparsely decoded tokens computed again, dense.",
    "QualityReport.rectified_tokens",
)

# Placement, as seen where a turn arrived.
AFFINITY_TURNS = _counter(
    "loopserve_affinity_turns_total",
    "Accepted turns by what the replica knew: first (nothing came before), hit (conversation held here), miss (it was not).",
    "Replica.chat",
    "outcome",
)

# Sessions that change hands, counted by a replica that lives on: the new holder, and for one that ends any other.
HANDOFFS = _counter(
    "loopserve_handoffs_total",
    "Sessions that a replica had to give away, by result: moved, refused, failed, timed_out, busy, not_worth_it, over_limit.",
    "deploy.handoff",
    "result",
)
HANDOFF_BYTES = _counter(
    "loopserve_handoff_bytes_total", "Bytes of the images of sessions that were taken over.", "deploy.handoff.arrivals"
)
HANDOFF_TIME = _histogram(
    "loopserve_handoff_seconds",
    "From the offer of a session to its place in the new engine, of sessions that were taken over.",
    "deploy.handoff.arrivals",
    _SECONDS,
)

BUILD_INFO = _gauge("loopserve_build_info", "Always 1; what runs here.", "ReplicaStatus", "version", "model_name")
REPLICA_UP = _gauge("loopserve_replica_up", "1 where the engine makes progress.", "Engine.is_alive")

# GPU and process of a replica.
GPU_AVAILABLE = _gauge("loopserve_gpu_available", "Whether NVML answers in this process.", "monitoring.gpu")
GPU_UTILIZATION = _gauge("loopserve_gpu_utilization_ratio", "Share of time with a kernel running.", "NVML", "gpu")
GPU_MEMORY_USED = _gauge("loopserve_gpu_memory_used_bytes", "Device memory in use.", "NVML", "gpu")
GPU_MEMORY_TOTAL = _gauge("loopserve_gpu_memory_size_bytes", "Device memory.", "NVML", "gpu")
GPU_POWER = _gauge("loopserve_gpu_power_watts", "Power draw.", "NVML", "gpu")
GPU_TEMPERATURE = _gauge("loopserve_gpu_temperature_celsius", "Core temperature.", "NVML", "gpu")
GPU_XID = _counter(
    "loopserve_gpu_xid_errors_total", "Xid errors that the driver reported.", "NVML events", "gpu", "xid"
)
PROCESS_CPU = _counter("loopserve_process_cpu_seconds_total", "CPU time of the process.", "os.times")
PROCESS_MEMORY = _gauge(
    "loopserve_process_resident_memory_bytes", "Resident memory of the process.", "/proc/self/statm"
)

# The ingress: what clients see, refusals of every kind included, and the router beside it.
REQUESTS = _counter(
    "loopserve_requests_total",
    "Answered HTTP requests by route and status.",
    "deploy.metrics_page",
    "route",
    "status",
    origin=Origin.INGRESS,
)
REQUESTS_IN_FLIGHT = _gauge(
    "loopserve_requests_in_flight",
    "Completion requests that are being answered.",
    "deploy.metrics_page",
    origin=Origin.INGRESS,
)
REQUEST_TTFB = _histogram(
    "loopserve_request_first_byte_seconds",
    "From a completion request's arrival to the first byte of its answer, refusals excluded.",
    "deploy.metrics_page",
    _SECONDS,
    origin=Origin.INGRESS,
)
REQUEST_ERRORS = _counter(
    "loopserve_request_errors_total",
    "Error answers and error events by OpenAI's error code.",
    "deploy.metrics_page",
    "code",
    origin=Origin.INGRESS,
)
REQUEST_RETRIES = _counter(
    "loopserve_request_retries_total",
    "Requests sent to a second replica because the first went away.",
    "deploy.metrics_page",
    origin=Origin.INGRESS,
)
REPLICAS_SILENT = _gauge(
    "loopserve_replicas_silent",
    "Replicas that did not answer when this page was made.",
    "Fleet.ask",
    origin=Origin.INGRESS,
)
KEYS_RELOAD_FAILED = _gauge(
    "loopserve_keys_reload_failed",
    "1 while the file of API keys cannot be read; the old keys stay in force.",
    "deploy.keys",
    origin=Origin.INGRESS,
)
AFFINITY_DECISIONS = _counter(
    "loopserve_affinity_decisions_total",
    "Routing decisions by reason: owner, memo, home, spill, moved, address, unroutable.",
    "router.affinity.Reason",
    "reason",
    origin=Origin.INGRESS,
)
AFFINITY_TIME = _histogram(
    "loopserve_affinity_decision_seconds",
    "One routing decision.",
    "router.ray_router",
    _DECISION_SECONDS,
    origin=Origin.INGRESS,
)

# The autopilot.
AUTOPILOT_MODE = _gauge(
    "loopserve_autopilot_mode",
    "1 for the mode in force: off, dry-run, on.",
    "autopilot",
    "mode",
    origin=Origin.AUTOPILOT,
)
AUTOPILOT_PRESSURE = _gauge(
    "loopserve_autopilot_pressure_ratio",
    "Signals of the last snapshot over capacity: compressed (working sets), whole (all tokens), pool (live blocks), "
    "queue (waiting turns over places).",
    "autopilot",
    "signal",
    origin=Origin.AUTOPILOT,
)
AUTOPILOT_REPLICAS_WANTED = _gauge(
    "loopserve_autopilot_replicas_wanted", "Replica count decided last.", "autopilot", origin=Origin.AUTOPILOT
)
AUTOPILOT_REPLICAS_READY = _gauge(
    "loopserve_autopilot_replicas_ready", "Replicas in the last snapshot.", "autopilot", origin=Origin.AUTOPILOT
)
AUTOPILOT_REPLICAS_MAX = _gauge(
    "loopserve_autopilot_replicas_max", "Most replicas it may ask for.", "autopilot", origin=Origin.AUTOPILOT
)
AUTOPILOT_BUDGET_WANTED = _gauge(
    "loopserve_autopilot_budget_wanted_tokens", "Budget ceiling decided last.", "autopilot", origin=Origin.AUTOPILOT
)
AUTOPILOT_COMPACT = _gauge(
    "loopserve_autopilot_compact",
    "1 while it wants admitted turns to be compact.",
    "autopilot",
    origin=Origin.AUTOPILOT,
)
AUTOPILOT_DECISIONS = _counter(
    "loopserve_autopilot_decisions_total",
    "Decisions by action: tighten, relax, compact, resident, add, remove, keep, hold.",
    "autopilot",
    "action",
    origin=Origin.AUTOPILOT,
)
AUTOPILOT_HOLDS = _counter(
    "loopserve_autopilot_holds_total",
    "Rounds without a decision because the data could not be trusted, by cause.",
    "autopilot",
    "cause",
    origin=Origin.AUTOPILOT,
)
AUTOPILOT_HOLDING = _gauge("loopserve_autopilot_holding", "1 while it holds.", "autopilot", origin=Origin.AUTOPILOT)
AUTOPILOT_SNAPSHOT_AGE = _gauge(
    "loopserve_autopilot_snapshot_age_seconds",
    "Age of the snapshot decided on last.",
    "autopilot",
    origin=Origin.AUTOPILOT,
)
AUTOPILOT_ROUND_TIME = _histogram(
    "loopserve_autopilot_round_seconds",
    "One round: read, decide, apply.",
    "autopilot",
    _STEP_SECONDS,
    origin=Origin.AUTOPILOT,
)
AUTOPILOT_FAILURES = _counter(
    "loopserve_autopilot_failures_total",
    "Failed acts by actuator: budget, replicas.",
    "autopilot",
    "actuator",
    origin=Origin.AUTOPILOT,
)

CATALOGUE: tuple[Metric, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
