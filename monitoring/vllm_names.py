"""The same numbers under vLLM's names, for dashboards and autoscalers that know only those. Off unless asked for.

Made from the families of a replica when the page is made, so nothing is counted twice. Labels are vLLM's: `model_name`, and `engine`, which
is our replica. `vllm:kv_cache_usage_perc` is 0 to 1 and, as theirs, blind to idle sessions.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from prometheus_client.metrics_core import Metric as Family

from monitoring import catalogue as c
from monitoring.catalogue import Metric
from monitoring.exposition import Families

_FINISHED_REASONS = {"stop": "stop", "length": "length", "cancelled": "abort", "error": "error"}


@dataclass(frozen=True, slots=True)
class _Name:
    """One of vLLM's names and the metric behind it; samples are summed over the labels that vLLM does not have."""

    vllm: str
    metric: Metric
    help: str
    finished_reason: bool = False


_NAMES = (
    _Name("vllm:time_to_first_token_seconds", c.TTFT, "Time to first token."),
    _Name("vllm:inter_token_latency_seconds", c.INTER_TOKEN, "Inter-token latency."),
    _Name("vllm:e2e_request_latency_seconds", c.TURN_DURATION, "End-to-end latency."),
    _Name("vllm:request_queue_time_seconds", c.QUEUE_TIME, "Time in the queue."),
    _Name("vllm:num_requests_running", c.TURNS_RUNNING, "Requests in the batch."),
    _Name("vllm:num_requests_waiting", c.TURNS_WAITING, "Requests that wait."),
    _Name("vllm:prefix_cache_queries_total", c.PROMPT_TOKENS, "Tokens looked up in the prefix cache."),
    _Name("vllm:prefix_cache_hits_total", c.REUSED_TOKENS, "Tokens found in the prefix cache."),
    _Name("vllm:prompt_tokens_total", c.PROMPT_TOKENS, "Tokens of prompts."),
    _Name("vllm:generation_tokens_total", c.GENERATED_TOKENS, "Tokens generated."),
    _Name("vllm:num_preemptions_total", c.PREEMPTIONS, "Preemptions."),
    _Name("vllm:request_success_total", c.TURNS, "Finished requests.", finished_reason=True),
)


def vllm_families(families: Families, *, replica: str, model_name: str, block_tokens: int) -> Families:
    """vLLM's families for one replica, labels complete."""
    by_name = {family.name: family for family in families}
    labels = {"model_name": model_name, "engine": replica}
    renamed = [
        _renamed(name, by_name[_family_name(name.metric)], labels)
        for name in _NAMES
        if _family_name(name.metric) in by_name
    ]
    return (*renamed, *_memory_families(by_name, labels, block_tokens=block_tokens))


def _renamed(name: _Name, family: Family, labels: Mapping[str, str]) -> Family:
    sums: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for sample in family.samples:
        if sample.name.endswith("_created"):
            continue
        kept = {"le": sample.labels["le"]} if "le" in sample.labels else {}
        if name.finished_reason:
            kept["finished_reason"] = _FINISHED_REASONS[sample.labels["reason"]]
        suffix = sample.name.removeprefix(name.metric.name)
        key = (name.vllm + suffix, tuple({**labels, **kept}.items()))
        sums[key] = sums.get(key, 0.0) + sample.value
    result = Family(name.vllm.removesuffix("_total"), name.help, family.type)
    for (sample_name, pairs), value in sums.items():
        result.add_sample(sample_name, dict(pairs), value)
    return result


def _memory_families(
    by_name: Mapping[str, Family], labels: Mapping[str, str], *, block_tokens: int
) -> Iterable[Family]:
    if c.KV_CAPACITY.name not in by_name or c.KV_BYTES.name not in by_name:
        return ()
    capacity = by_name[c.KV_CAPACITY.name].samples[0].value
    on_device = [sample for sample in by_name[c.KV_BYTES.name].samples if sample.labels["tier"] == "device"]
    bytes_by_kind = {sample.labels["kind"]: sample.value for sample in on_device}
    used = bytes_by_kind.get("active", 0.0) + bytes_by_kind.get("shared", 0.0)
    usage = Family("vllm:kv_cache_usage_perc", "KV cache in use by running requests, 0 to 1.", "gauge")
    usage.add_sample(usage.name, dict(labels), used / capacity if capacity else 0.0)
    config = Family("vllm:cache_config_info", "Always 1; the cache's configuration.", "gauge")
    config.add_sample(
        config.name, {**labels, "block_size": str(block_tokens), "cache_size_bytes": str(int(capacity))}, 1.0
    )
    return (usage, config)


def _family_name(metric: Metric) -> str:
    return metric.name.removesuffix("_total")
