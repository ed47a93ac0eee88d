"""Load on any OpenAI endpoint: many dialogues of many turns at once, and what clients see of them. A client: knows no engine and no server.

workload = Workload(Synthetic(turns=Distribution.parse("uniform:4..10")), num_dialogues=50, duration_s=60)
result = await run_load(workload, Endpoint("http://127.0.0.1:8000"), on_turn=print)
report = summarise(result, Slo(first_token_s=0.5))
"""

from loopserve.bench.distributions import Distribution
from loopserve.bench.endpoint import Endpoint, measure_tokens_per_word, served_model
from loopserve.bench.load import LoadResult, run_load
from loopserve.bench.records import Failure, FailureKind, TurnRecord
from loopserve.bench.report import Report, Slo, summarise
from loopserve.bench.workload import Given, Script, ScriptTurn, Synthetic, Workload, made_text

__all__ = [
    "Distribution",
    "Endpoint",
    "Failure",
    "FailureKind",
    "Given",
    "LoadResult",
    "Report",
    "Script",
    "ScriptTurn",
    "Slo",
    "Synthetic",
    "TurnRecord",
    "Workload",
    "made_text",
    "measure_tokens_per_word",
    "run_load",
    "served_model",
    "summarise",
]
