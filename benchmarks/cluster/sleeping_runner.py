"""A device that sleeps as long as a GPU would compute, under the real engine, scheduler, sessions, cache and service.

    python -m benchmarks.cluster.sleeping_runner         serves it; settings from the environment, as `loopserve serve` reads them

How long a step takes is a sum of what it must read and compute: the weights, the rows of the prefill, and the keys and values that
attention reads. The last is what a budget changes, so a tighter one really makes decode faster. Nothing is allocated and no answer means
anything: tokens are drawn from plain words by turn and position.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from deploy.backend import Backend
from loopserve.chat import ChatService
from loopserve.config import DecodeSparsity, EngineConfig
from loopserve.dialogue import TokenId, TurnId
from loopserve.engine import Engine
from loopserve.loading import LoadedModel, shipped_model_dir
from loopserve.plan import BlockCopy, BlockId, SampledToken, Segment, StepPlan, StepResult
from loopserve.reads import num_kept_tokens
from loopserve.runner import Finished
from loopserve.stats import StatsSink

FACTORY = "benchmarks.cluster.sleeping_runner:sleeping_backend"
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Profile:
    """A model on a GPU, in 16 bits, and how much slower everything is here so that two cores can carry the streams."""

    name: str
    num_parameters: float
    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    memory_bytes_per_s: float
    flop_per_s: float  # that a prefill reaches
    launch_s: float  # of one step, whatever is in it
    slowed: float

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token, all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * 2

    @property
    def step_s(self) -> float:
        """Every step: reading the weights."""
        return self.slowed * (self.launch_s + 2 * self.num_parameters / self.memory_bytes_per_s)

    @property
    def row_s(self) -> float:
        """One row of a prefill."""
        return self.slowed * 2 * self.num_parameters / self.flop_per_s

    @property
    def read_s(self) -> float:
        """Reading the keys and values of one token."""
        return self.slowed * self.token_bytes / self.memory_bytes_per_s

    def sentence(self) -> str:
        """The three constants, for a reader."""
        return (
            f"{self.name}, slowed {self.slowed:g} times: a step takes {self.step_s * 1e3:.1f} ms, {self.row_s * 1e3:.2f} ms more for a row "
            f"of prefill and {self.read_s * 1e6:.2f} us for a token whose keys and values are read ({self.token_bytes >> 10} KiB)"
        )


# A model without grouped heads, so that reading its cache costs as much as reading its weights from about 32,000 tokens on: what a budget
# saves is then seen at the handful of conversations that this benchmark holds. Bandwidth and arithmetic are those of an H200, as measured
# for a copy, and 60 % of what its matrix units reach.
THIRTEEN_BILLION = Profile(
    name="a model of 13 billion parameters, 40 layers with 40 KV heads of 128, on one H200",
    num_parameters=13e9,
    num_layers=40,
    num_kv_heads=40,
    head_dim=128,
    max_positions=16_384,
    memory_bytes_per_s=4.3e12,
    flop_per_s=0.6 * 790e12,
    launch_s=0.001,
    slowed=10.0,
)


class SleepingRunner:
    """A `Runner` that sleeps instead of computing. Engine thread only."""

    device_bytes = 0

    def __init__(
        self,
        profile: Profile,
        decode: DecodeSparsity,
        words: Sequence[TokenId],
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`words` are the tokens that answers are made of."""
        self._profile = profile
        self._decode = decode
        self._words = tuple(words)
        self._sleep = sleep
        self._chosen_at: dict[TurnId, int] = {}  # context at the last choice

    def run(self, plan: StepPlan) -> StepResult:
        """One step. Coverage is not made up: nothing is measured."""
        for turn_id in plan.ended_turns:
            self._chosen_at.pop(turn_id, None)
        num_rows = sum(len(segment.token_ids) for segment in plan.segments if len(segment.token_ids) > 1)  # one: decode
        num_read = sum(self._num_read(segment) for segment in plan.segments)
        profile = self._profile
        self._sleep(profile.step_s + profile.row_s * num_rows + profile.read_s * num_read)
        return StepResult(
            tuple(
                SampledToken(segment.turn_id, self._word(segment.sample.seed, segment.sample.output_index))
                for segment in plan.segments
                if segment.sample is not None
            )
        )

    def launch(self, plan: StepPlan) -> Finished:
        """See `run`."""
        return Finished(self.run(plan))

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """There is nothing to copy."""

    def erase(self, blocks: Sequence[BlockId]) -> None:
        """There is nothing in them."""

    def read(self, blocks: Sequence[BlockId]) -> tuple[Tensor, Tensor]:
        """Raises NotImplementedError: there is nothing to hand over."""
        raise NotImplementedError("a runner that only sleeps has no KV")

    def write(self, blocks: Sequence[BlockId], keys: Tensor, values: Tensor) -> None:
        """Raises NotImplementedError: there is nowhere to put it."""
        raise NotImplementedError("a runner that only sleeps has no KV")

    def _num_read(self, segment: Segment) -> int:
        """Cached tokens that the segment's attention reads: a chunk reads what lies before it once."""
        context = segment.start + len(segment.token_ids)
        order = segment.decode
        if order is None:
            if segment.capture is not None:
                self._chosen_at[segment.turn_id] = context
            return context
        if order.choose:
            self._chosen_at[segment.turn_id] = context
        if order.dense:
            return context
        return num_kept_tokens(context, self._chosen_at[segment.turn_id], order.budget_tokens, self._decode)

    def _word(self, seed: int, output_index: int) -> TokenId:
        digest = blake2b(f"{seed}/{output_index}".encode(), digest_size=4).digest()
        return self._words[int.from_bytes(digest) % len(self._words)]


def word_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[TokenId, ...]:
    """Tokens that are a space and a plain word: any row of them reads back as it was written."""
    found = []
    for token_id in range(len(tokenizer)):
        text = tokenizer.decode([token_id])
        if text.startswith(" ") and text[1:].isascii() and text[1:].isalpha():
            found.append(token_id)
    return tuple(found)


def sleeping_model(profile: Profile, tokenizer: PreTrainedTokenizerBase) -> LoadedModel:
    """The facts of the profile's model, with another's tokenizer and no weights."""
    return LoadedModel(
        model=None,  # type: ignore[arg-type]  # the runner is another
        tokenizer=tokenizer,
        name="sleeping",
        num_layers=profile.num_layers,
        num_heads=profile.num_kv_heads,
        num_kv_heads=profile.num_kv_heads,
        head_dim=profile.head_dim,
        vocab_size=len(tokenizer),
        max_positions=profile.max_positions,
        eos_ids=(),
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        fingerprint="sleeping",
    )


def sleeping_backend(config: EngineConfig, stats: StatsSink, *, num_threads: int) -> Backend:
    """The inside of one replica, as `deploy.backend.BackendFactory` has it."""
    torch.set_num_threads(num_threads)
    tokenizer = AutoTokenizer.from_pretrained(str(shipped_model_dir()))
    profile = THIRTEEN_BILLION
    runner = SleepingRunner(profile, config.decode, word_tokens(tokenizer))
    engine = Engine(config, loaded=sleeping_model(profile, tokenizer), runner=runner, stats=stats)
    return Backend(engine, ChatService(engine))


def main() -> int:
    """Serve until told to stop."""
    from deploy.local import run
    from deploy.settings import DeploySettings
    from loopserve.errors import LoopServeError

    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    try:
        run(
            DeploySettings.from_env(),
            engine_config=EngineConfig.from_env(),
            factory=FACTORY,
            on_event=lambda event: print(event.stage, event.message, flush=True),
        )
    except LoopServeError as error:
        print(f"{type(error).__name__}: {error.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
