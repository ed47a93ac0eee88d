"""The clients: how each is started against a server, and what it says itself about how that went. Knows no server but its address.

A client is used as it comes. No field, header or flag here exists because of LoopServe; `--tokenizer` is a directory as no hub is needed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.clients import environments

HERE = Path(__file__).resolve().parent
SEED = 5


@dataclass(frozen=True, slots=True)
class Target:
    """What a client is sent to. `work` is a directory for what it writes."""

    url: str
    model: str
    tokenizer: Path
    work: Path


@dataclass(frozen=True, slots=True)
class OwnNumbers:
    """What a client says itself; None: it does not say."""

    turns: int | None
    errors: int | None
    cached_share: float | None  # of the prompt tokens of all turns, or as `cached_of` says
    cached_of: str = "prompt tokens of all turns"


@dataclass(frozen=True, slots=True)
class Client:
    """One client. `command` are its arguments, `own` reads its results after it has ended."""

    name: str
    package: str
    command: Callable[[Path, Target], Sequence[str]]
    own: Callable[[Target, str], OwnNumbers]
    dialogues: int
    turns: int  # of a dialogue
    variables: Mapping[str, str] = field(default_factory=dict)
    own_environment: bool = True  # else LoopServe's, of which the package is a part

    def python(self) -> Path:
        """The interpreter that it runs on. Raises EnvironmentFailed."""
        return environments.python_of(self.name) if self.own_environment else Path(sys.executable)


def _small(script: str, first: int) -> Callable[[Path, Target], Sequence[str]]:
    def command(python: Path, target: Target) -> Sequence[str]:
        asked = ("--url", target.url, "--model", target.model, "--dialogues", "12", "--first", str(first))
        return (str(python), str(HERE / script), *asked)

    return command


def _small_own(target: Target, stdout: str) -> OwnNumbers:
    turns = [json.loads(line) for line in stdout.splitlines() if line.startswith("{")]
    told = [turn for turn in turns if turn.get("cached_tokens") is not None]
    prompt = sum(turn["prompt_tokens"] for turn in told)
    return OwnNumbers(
        turns=len(turns),
        errors=sum(turn["error"] is not None for turn in turns),
        cached_share=sum(turn["cached_tokens"] for turn in told) / prompt if prompt else None,
    )


def _aiperf(python: Path, target: Target) -> Sequence[str]:
    said = ("--conversation-num", "8", "--conversation-turn-mean", "4", "--conversation-turn-stddev", "0")
    sizes = ("--isl", "60", "--isl-stddev", "10", "--osl", "16", "--request-count", "32", "--concurrency", "4")
    how = (
        "--endpoint-type",
        "chat",
        "--streaming",
        "--use-server-token-count",
        "--random-seed",
        str(SEED),
        "--ui",
        "simple",
    )
    where = ("--url", target.url, "--model", target.model, "--tokenizer", str(target.tokenizer))
    out = ("--output-artifact-dir", str(target.work / "aiperf"))
    return (str(python.with_name("aiperf")), "profile", *where, *said, *sizes, *how, *out)


def _aiperf_own(target: Target, stdout: str) -> OwnNumbers:
    found = json.loads((target.work / "aiperf" / "profile_export_aiperf.json").read_text(encoding="utf-8"))
    share = found.get("overall_usage_prompt_cache_read_pct")
    return OwnNumbers(
        turns=int(found["request_count"]["avg"]),
        errors=sum(int(kind["count"]) for kind in found["error_summary"]),
        cached_share=share["avg"] / 100 if share else None,
    )


def _guidellm(python: Path, target: Target) -> Sequence[str]:
    return (
        str(python.with_name("guidellm")),
        "run",
        *(
            "--backend",
            f"kind=openai_http,target={target.url},model={target.model},request_format=/v1/chat/completions",
        ),
        *("--profile", "kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=32"),
        *("--data", "kind=synthetic_text,prompt_tokens=60,output_tokens=16,turns=4"),
        *("--tokenizer", f"kind=huggingface_auto,model={target.tokenizer}", "--seed", f"kind=static,value={SEED}"),
        *("--output", f"kind=json,path={target.work / 'guidellm.json'}", "--disable-console-interactive"),
    )


def _guidellm_own(target: Target, stdout: str) -> OwnNumbers:
    (found,) = json.loads((target.work / "guidellm.json").read_text(encoding="utf-8"))["benchmarks"]
    totals = found["metrics"]["request_totals"]
    inputs = [request["input_metrics"] for request in found["requests"]["successful"]]
    told = [tokens for tokens in inputs if tokens.get("cached_tokens") is not None]
    prompt = sum(tokens["text_tokens"] for tokens in told)
    return OwnNumbers(
        turns=totals["successful"],
        errors=totals["errored"],
        cached_share=sum(tokens["cached_tokens"] for tokens in told) / prompt if prompt else None,
    )


def _evalscope(python: Path, target: Target) -> Sequence[str]:
    where = ("--url", f"{target.url}/v1/chat/completions", "--model", target.model, "--api", "openai")
    said = ("--multi-turn", "--dataset", "random_multi_turn", "--min-turns", "4", "--max-turns", "4")
    sizes = ("--min-prompt-length", "40", "--max-prompt-length", "60", "--max-tokens", "16", "--number", "8")
    how = ("--parallel", "4", "--stream", "--temperature", "0", "--seed", str(SEED))
    out = ("--tokenizer-path", str(target.tokenizer), "--outputs-dir", str(target.work / "evalscope"), "--no-timestamp")
    return (str(python.with_name("evalscope")), "perf", *where, *said, *sizes, *how, *out)


def _evalscope_own(target: Target, stdout: str) -> OwnNumbers:
    (file,) = (target.work / "evalscope").rglob("benchmark_summary.json")
    found = json.loads(file.read_text(encoding="utf-8"))
    share: float | None = found.get("KV Cache Hit Rate (%)")
    return OwnNumbers(
        turns=int(found["Success Requests"]),
        errors=int(found["Failed Requests"]),
        cached_share=None if share is None else share / 100,
    )


def _ray(python: Path, target: Target) -> Sequence[str]:
    where = ("--base-url", target.url, "--model", target.model, "--tokenizer", str(target.tokenizer))
    said = (
        "--isl",
        "240",
        "--hit-rate",
        "0.7",
        "--shared-system-prompt-ratio",
        "0.5",
        "--num-turns",
        "4",
        "--osl",
        "16",
    )
    how = (
        "--concurrency",
        "4",
        "--num-sessions",
        "8",
        "--ramp-interval",
        "0",
        "--warmup-jitter-max",
        "1",
        "--seed",
        str(SEED),
    )
    out = ("--save-result", "ray.json", "--save-dir", str(target.work))
    return (str(python), "-m", "ray.llm._internal.serve.benchmark", *where, *said, *how, *out)


def _ray_own(target: Target, stdout: str) -> OwnNumbers:
    found: dict[str, Any] = json.loads((target.work / "ray.json").read_text(encoding="utf-8"))
    return OwnNumbers(turns=found["benchmark"]["total_requests"], errors=None, cached_share=None)


def _bench(python: Path, target: Target) -> Sequence[str]:
    said = ("--turns", "4", "--input", "60", "--output", "16", "-n", "8", "-c", "4", "--seed", str(SEED))
    out = ("--json", str(target.work / "bench.json"))
    return (str(python), "-m", "loopserve", "bench", "--url", target.url, *said, *out)


def _bench_own(target: Target, stdout: str) -> OwnNumbers:
    found: dict[str, Any] = json.loads((target.work / "bench.json").read_text(encoding="utf-8"))
    turns, share = found["turns"], found["cache"]["share_of_prompt"]
    return OwnNumbers(turns["answered"], turns["failed"], share, "prompt tokens beyond turn 1")


CLIENTS = (
    Client("openai", "openai", _small("with_openai.py", 0), _small_own, dialogues=12, turns=5),
    Client(
        "litellm",
        "litellm",
        _small("with_litellm.py", 100),
        _small_own,
        dialogues=12,
        turns=5,
        variables={"LITELLM_LOCAL_MODEL_COST_MAP": "True"},
    ),
    Client("aiperf", "aiperf", _aiperf, _aiperf_own, dialogues=8, turns=4),
    Client("guidellm", "guidellm", _guidellm, _guidellm_own, dialogues=8, turns=4),
    Client("evalscope", "evalscope", _evalscope, _evalscope_own, dialogues=8, turns=4),
    Client("ray", "ray", _ray, _ray_own, dialogues=8, turns=4, own_environment=False),
    Client("loopserve-bench", "loopserve", _bench, _bench_own, dialogues=8, turns=4, own_environment=False),
)
