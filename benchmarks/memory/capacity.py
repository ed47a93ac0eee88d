"""How many conversations one device answers at once: dense, sparse with everything on the device, and compact, on the same bytes.

Everything that an engine keeps on its device beside the model counts: pool, sketches (those of host blocks, too), turn tables, the buffer
through which histories are read, the selections' queries and choices. The bytes are those with which the dense engine answers
`--dense-tokens` tokens of conversations at once, to the byte, so that rounding is in nobody's favour but dense's; the others get as
many blocks as then fit. How many conversations an engine answers at once is found by asking it (`at_once.py`): first without a model, then
with it, and what is published is the second. Beside it stands the byte ceiling: how many would fit if each held nothing but its places (or
its whole context) and one block for the newest tokens.

Histories are computed once a length and copied, see `copies.py` for why that measures the same; questions and answers are computed.
The shipped model has 16,384 positions: longer contexts would leave what it was made for, and are refused. An accelerator gets
Llama-3.1-8B's shape with random weights.

    python -m benchmarks.memory.capacity
    python -m benchmarks.memory.capacity --device cuda --out FILE.json
"""

from __future__ import annotations

import argparse
import functools
import gc
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine.device import Deadline, describe_device, fill_in, free_bytes, write_record
from benchmarks.engine.shape import LLAMA_8B, TINY, build_model, weight_bytes
from benchmarks.machine import Machine, require_quiet, usable_cores
from benchmarks.memory.at_once import AtOnce, Load, NoModel, answer, settings_for
from benchmarks.memory.copies import computed_once, questions_of, text_ids
from benchmarks.memory.kept import Kept, host_block_bytes, kept, most_blocks
from benchmarks.report import RESULTS, Table, settings_of, write_result
from loopserve.config import BLOCK_TOKENS, DecodeSparsity, EngineConfig, PrefillSparsity
from loopserve.dialogue import Mode
from loopserve.kv.image import SessionImage
from loopserve.loading import LoadedModel, load_model
from loopserve.reads import num_places

MODELS = ("shipped", "llama-3.1-8b", "tiny")
_NEWEST_BLOCKS = 1  # of a compact turn, at the least: the one that its next token is written to
_RUNS_MAX = 3  # with the model, where it answers fewer than room and scheduler said


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to answer; `budget_share` of the context is what each KV head chooses, None: everything is read."""

    name: str
    budget_share: float | None = None
    is_compact: bool = False

    @property
    def mode(self) -> Mode:
        """What the turns ask for."""
        return Mode.EXACT if self.budget_share is None else Mode.SPARSE

    def budget_tokens(self, context_tokens: int) -> int:
        """B; of dense, which chooses nothing, the least that there is."""
        return max(1, round((self.budget_share or 0.0) * context_tokens))

    def decode(self, context_tokens: int) -> DecodeSparsity:
        """The engine's defaults at that budget; a dense engine keeps nothing to choose by."""
        budget = self.budget_tokens(context_tokens)
        settings = DecodeSparsity(budget_tokens=budget, budget_floor_tokens=min(64, budget))
        return settings if self.budget_share is not None else replace(settings, scoring="exact")


DENSE = Variant("dense")
VARIANTS = (
    DENSE,
    Variant("resident, B 10 %", 0.10),
    Variant("compact, B 10 %", 0.10, is_compact=True),
    Variant("compact, B 5 %", 0.05, is_compact=True),
)


@dataclass(frozen=True, slots=True)
class Sizing:
    """One variant's engine for so many conversations."""

    config: EngineConfig
    kept: Kept


@dataclass(frozen=True, slots=True)
class Row:
    """One variant at one length."""

    context_tokens: int
    variant: str
    budget_tokens: int | None
    bytes_max: int  # of the device, beside the model
    device_bytes: int  # kept there, found while all were answered
    kept: Kept  # by what it is for, planned
    host_bytes: int
    byte_ceiling: int
    at_once: int
    limited_by: str  # why it is not one more
    ratio: float  # to dense
    tokens_per_s: float
    step_ms: float  # median
    steps: int
    step_bytes: int | None
    compact_turns: int
    coverage: float | None


class Sizes:
    """How large the engines of one length are, on the bytes of the dense one that answers `num_dense` conversations at once."""

    def __init__(
        self, loaded: LoadedModel, load: Load, *, num_dense: int, host_bytes_max: int, chunk_tokens: int
    ) -> None:
        """`load` with any number of conversations."""
        self._loaded = loaded
        self._load = load
        self._chunk_tokens = chunk_tokens
        self._blocks_each = -(-load.context_tokens // BLOCK_TOKENS)
        self.host_max = largest(  # conversations that host memory holds
            lambda number: self.host_bytes(number * self._blocks_each) <= host_bytes_max,
            host_bytes_max // (self._blocks_each * host_block_bytes(loaded)),
        )
        # Their contexts, the null block and the tables.
        dense = replace(self._config(DENSE, num_dense), kv_blocks=1 + num_dense * self._blocks_each)
        self.bytes_max = self._kept(DENSE, dense).total

    def ceiling(self, variant: Variant) -> int:
        """How many conversations' least bytes fit beside what their engine keeps once."""

        def fits(number: int) -> bool:
            config = replace(self._config(variant, number), kv_blocks=1 + number * self._least_blocks(variant))
            return self._kept(variant, config).total <= self.bytes_max

        return largest(fits, self._most(variant))

    def sized(self, variant: Variant, number: int) -> Sizing | None:
        """The engine for so many, with all blocks that fit; None where they do not."""
        config = self._config(variant, number)
        num_blocks = most_blocks(
            self._loaded,
            config,
            sparse=variant.budget_share is not None,
            longest_tokens=self._load.context_tokens,
            bytes_max=self.bytes_max,
        )
        if num_blocks is None:
            return None
        config = replace(config, kv_blocks=num_blocks)
        return Sizing(config, self._kept(variant, config))

    def host_bytes(self, num_blocks: int) -> int:
        """What so many blocks take in host memory. For CUDA it is pinned, and torch pins a power of two for each tensor."""
        num_tensors = 2 * self._loaded.num_layers
        tensor = num_blocks * host_block_bytes(self._loaded) // num_tensors
        if self._loaded.device.type == "cuda" and tensor:
            tensor = 1 << (tensor - 1).bit_length()
        return num_tensors * tensor

    def _config(self, variant: Variant, number: int) -> EngineConfig:
        config = EngineConfig(
            dtype=str(self._loaded.dtype).removeprefix("torch."),
            host_blocks=number * self._blocks_each if variant.is_compact else 0,
            compact_above_ratio=0.0 if variant.is_compact else 1.0,
            decode=variant.decode(self._load.context_tokens),
            prefill=PrefillSparsity(chunk_tokens=self._chunk_tokens),
            max_step_prefill_tokens=max(self._chunk_tokens, EngineConfig().max_step_prefill_tokens),
        )
        return settings_for(config, replace(self._load, conversations=number))

    def _kept(self, variant: Variant, config: EngineConfig) -> Kept:
        is_sparse = variant.budget_share is not None
        return kept(self._loaded, config, sparse=is_sparse, longest_tokens=self._load.context_tokens)

    def _least_blocks(self, variant: Variant) -> int:
        """Device blocks of one conversation, at the least."""
        if not variant.is_compact:
            return self._blocks_each
        places = num_places(variant.decode(self._load.context_tokens))
        return -(-places // BLOCK_TOKENS) + _NEWEST_BLOCKS

    def _most(self, variant: Variant) -> int:
        """More than fit in any case."""
        a_block = host_block_bytes(self._loaded)
        return self.bytes_max // (self._least_blocks(variant) * a_block) + 1


def largest(holds: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to `most` for which it holds, if it holds below that, too; 0 where it holds for none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def measure(
    loaded: LoadedModel,
    history: SessionImage,
    load: Load,
    variant: Variant,
    sizes: Sizes,
    *,
    ask: Callable[[int], list[list[int]]],
) -> Row | None:
    """One variant; None where it answers not even one. `ask` makes so many questions."""
    ceiling = sizes.ceiling(variant)
    reachable = min(ceiling, sizes.host_max) if variant.is_compact else ceiling
    questions = ask(reachable + 1)

    def asked(number: int, *, with_model: bool) -> AtOnce | None:
        sizing = sizes.sized(variant, number)
        if sizing is None:
            return None
        return answer(
            loaded,
            sizing.config,
            replace(load, conversations=number),
            history,
            mode=variant.mode,
            questions=questions[:number],
            runner=None if with_model else NoModel(),
        )

    def fits(number: int) -> bool:
        found = asked(number, with_model=False)
        return found is not None and found.is_at_once

    number = largest(fits, reachable)
    if number == ceiling:
        limited_by = "bytes"
    elif number == reachable:
        limited_by = "host memory"
    else:
        one_more = asked(number + 1, with_model=False)
        limited_by = "bytes" if one_more is None else one_more.why_not
    for _ in range(_RUNS_MAX):
        if number == 0:
            return None
        _give_back(loaded)
        found, sizing = asked(number, with_model=True), sizes.sized(variant, number)
        assert found is not None and sizing is not None, "room and scheduler said so"
        problem = found.why_not or _faults(found, sizes, variant, load, number)
        if not problem:
            return _row(found, sizing, load, variant, sizes, number=number, ceiling=ceiling, limited_by=limited_by)
        print(f"{variant.name}, {number} conversations, with the model: {problem}", flush=True)
        limited_by = f"with the model: {problem}"
        number -= 1
    return None


def _faults(found: AtOnce, sizes: Sizes, variant: Variant, load: Load, number: int) -> str:
    """Why a run does not count although all were answered at once; "" where it does."""
    if found.device_bytes > sizes.bytes_max:
        return f"it kept {found.device_bytes} bytes"
    if variant.is_compact and found.compact_turns < number:
        return f"only {found.compact_turns} turns were compact"
    if found.cached_tokens_min < load.history_tokens:
        return "a history was computed again"
    return ""


def _row(
    found: AtOnce,
    sizing: Sizing,
    load: Load,
    variant: Variant,
    sizes: Sizes,
    *,
    number: int,
    ceiling: int,
    limited_by: str,
) -> Row:
    return Row(
        context_tokens=load.context_tokens,
        variant=variant.name,
        budget_tokens=None if variant.budget_share is None else variant.budget_tokens(load.context_tokens),
        bytes_max=sizes.bytes_max,
        device_bytes=found.device_bytes,
        kept=sizing.kept,
        host_bytes=sizes.host_bytes(sizing.config.host_blocks or 0),
        byte_ceiling=ceiling,
        at_once=number,
        limited_by=limited_by,
        ratio=0.0,
        tokens_per_s=number * len(found.step_s) / sum(found.step_s),
        step_ms=1e3 * statistics.median(found.step_s),
        steps=len(found.step_s),
        step_bytes=found.step_bytes,
        compact_turns=found.compact_turns,
        coverage=found.coverage,
    )


def run_benchmark(args: argparse.Namespace, command: Sequence[str] = ()) -> str:
    """All variants at all lengths; writes the result after each of them, and gives its Markdown."""
    load_before = require_quiet(forced=args.force or args.out is not None)
    torch.set_num_threads(args.threads)
    deadline, device = Deadline(args.seconds_max), torch.device(args.device)
    machine = replace(describe_device(device, commit=args.commit), load_before=round(load_before, 2))
    loaded = load(args, device)
    rows: list[Row] = []
    left = [(context, variant.name) for context in args.contexts for variant in VARIANTS]
    text = ""
    for context, variant, row in _measured(loaded, args, deadline):
        left.remove((context, variant))
        if row is not None:
            rows.append(row)
            print(f"{context} tokens, {variant}: {row.at_once} at once, {deadline.left_s:.0f} s left", flush=True)
        text = write(args, machine, loaded, with_ratios(rows), left, command)
    return text or write(args, machine, loaded, [], left, command)


def load(args: argparse.Namespace, device: torch.device) -> LoadedModel:
    """The model asked for. Ends the script where it does not go with the device."""
    if args.model_shape == "shipped":
        return load_model(EngineConfig(device=args.device, dtype="float32" if args.device == "cpu" else "auto"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("No CUDA device is here.")
    if args.model_shape == "llama-3.1-8b" and device.type == "cpu":
        raise SystemExit("An 8B model is not for a CPU: --model-shape shipped or tiny.")
    size = replace(LLAMA_8B if args.model_shape == "llama-3.1-8b" else TINY, verticals=args.verticals)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return build_model(size, device=device, dtype=dtype, seed=args.seed)


def _measured(
    loaded: LoadedModel, args: argparse.Namespace, deadline: Deadline
) -> Iterator[tuple[int, str, Row | None]]:
    for context in args.contexts:
        if context > loaded.max_positions:
            raise SystemExit(f"The model takes {loaded.max_positions} positions, {context} were asked for.")
        if deadline.is_over:
            return
        each = Load(1, context, args.question_tokens, args.answer_tokens, args.warm_steps, args.steps)
        is_random = args.model_shape != "shipped"
        ids = text_ids(loaded, each.history_tokens, seed=args.seed, is_random=is_random)
        history = computed_once(loaded, ids)
        ask = functools.partial(
            questions_of, loaded, num_tokens=args.question_tokens, seed=args.seed + 1, is_random=is_random
        )
        sizes = Sizes(
            loaded,
            each,
            num_dense=args.dense_tokens // context,
            host_bytes_max=int(args.host_gib * 2**30),
            chunk_tokens=args.chunk_tokens,
        )
        for variant in VARIANTS:
            if deadline.is_over:
                return
            yield context, variant.name, measure(loaded, history, each, variant, sizes, ask=ask)


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """The rows with their ratio to dense at their length."""
    dense = {row.context_tokens: row.at_once for row in rows if row.variant == DENSE.name}
    return [
        replace(row, ratio=row.at_once / dense[row.context_tokens] if row.context_tokens in dense else 0.0)
        for row in rows
    ]


def _give_back(loaded: LoadedModel) -> None:
    gc.collect()
    free_bytes(loaded.device)  # what the engine before this one held is given back


def write(
    args: argparse.Namespace,
    machine: Machine,
    loaded: LoadedModel,
    rows: Sequence[Row],
    left: Sequence[tuple[int, str]],
    command: Sequence[str],
) -> str:
    """The result so far: into the results, or, for a session on a GPU, into one file of its own."""
    title = "How many conversations are answered at once on the same device bytes"
    numbers: Mapping[str, Any] = {
        "forced": args.force,
        "settings": settings_of(args),
        "command": shlex.join(["python", "-m", "benchmarks.memory.capacity", *command]),
        "model": {"weight_bytes": weight_bytes(loaded), "dtype": str(loaded.dtype), "layers": loaded.num_layers},
        "not_measured": [{"context_tokens": context, "variant": variant} for context, variant in left],
    }
    said = notes(args, loaded, rows, left)
    if args.out is not None:
        return write_record(
            args,
            title=title,
            machine=machine,
            rows=[asdict(row) for row in rows],
            numbers=numbers,
            tables=[capacity_table(rows), bytes_table(rows)],
            notes=said,
        )
    return write_result(
        args.results,
        args.name,
        title=title,
        machine=machine,
        numbers={**numbers, "rows": [asdict(row) for row in rows]},
        tables=[capacity_table(rows), bytes_table(rows)],
        notes=[*said, f"`{numbers['command']}`"],
    )


def capacity_table(rows: Sequence[Row]) -> Table:
    """Conversations, and how fast they are answered."""
    header = (
        *("context", "variant", "B", "byte ceiling", "answered at once", "of the ceiling", "times dense"),
        *("limited by", "tokens/s", "ms a step", "coverage"),
    )
    return Table(
        "Conversations answered at once",
        header,
        tuple(
            (
                str(row.context_tokens),
                row.variant,
                "-" if row.budget_tokens is None else str(row.budget_tokens),
                str(row.byte_ceiling),
                str(row.at_once),
                f"{row.at_once / row.byte_ceiling:.0%}",
                f"{row.ratio:.1f}",
                row.limited_by,
                f"{row.tokens_per_s:.1f}",
                f"{row.step_ms:.1f}",
                "-" if row.coverage is None else f"{row.coverage:.3f}",
            )
            for row in rows
        ),
    )


def bytes_table(rows: Sequence[Row]) -> Table:
    """Where the bytes are."""
    header = (
        *("context", "variant", "allowed", "kept", "pool", "host sketches", "tables", "stage", "selections"),
        *("a step, more", "in host memory"),
    )
    return Table(
        "MiB on the device beside the model",
        header,
        tuple(
            (
                str(row.context_tokens),
                row.variant,
                *(
                    _mib(size)
                    for size in (
                        row.bytes_max,
                        row.device_bytes,
                        row.kept.pool,
                        row.kept.host_sketches,
                        row.kept.tables,
                        row.kept.stage,
                        row.kept.selections,
                        row.step_bytes,
                        row.host_bytes,
                    )
                ),
            )
            for row in rows
        ),
    )


def notes(
    args: argparse.Namespace, loaded: LoadedModel, rows: Sequence[Row], left: Sequence[tuple[int, str]]
) -> list[str]:
    """What a reader must know beside the tables."""
    what = {
        "shipped": "the shipped model on made dialogues; it has 16,384 positions, so that no context is longer",
        "llama-3.1-8b": f"Llama-3.1-8B's shape, random weights and tokens, scores spread by {args.verticals:g} over the keys alike for all "
        "queries: what is newly chosen at every output, and so brought from host memory, depends on that",
        "tiny": "a toy",
    }[args.model_shape]
    return [
        f"Model: {what}; {loaded.num_layers} layers, {loaded.num_heads} query heads over {loaded.num_kv_heads} KV heads of "
        f"{loaded.head_dim}, {loaded.dtype}.",
        f"Context: at the answer's end, {args.question_tokens} tokens of a question and {args.answer_tokens} of an answer "
        "included, for which every engine has room. Answered at once: all in decode in the same batch, none waits, is preempted or "
        f"gets less than B, while {args.warm_steps + args.steps} steps go by; tokens/s are of the last {args.steps}.",
        "Allowed: what the dense engine keeps that answers "
        + ", or ".join(f"{args.dense_tokens // context} conversations of {context} tokens" for context in args.contexts)
        + ". Kept: found while all were answered, selections included.",
        "Histories are computed once a length, exactly, and copied to blocks of each conversation's own; questions differ and "
        "are computed.",
        f"Chunks of {args.chunk_tokens} rows, questions computed densely; coverage is decode's, measured after every 64th output. Dense: "
        "mode exact, no sketches. Resident and compact: mode sparse, the engine's defaults at that B. Byte ceiling: conversations at "
        "their least, places or whole context and one block.",
        *(["On a CPU, the device and host memory are the same memory."] if args.device == "cpu" else []),
        "Limited by: why it is not one more conversation.",
        *([f"{len(left)} rows were not measured: no time was left, or not one conversation fits."] if left else []),
        *(["FORCED on a machine that was not quiet: not to be published."] if args.force else []),
    ]


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.1f}"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line; the defaults of sizes follow the model, and the model the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model-shape", choices=MODELS, default=None, help="shipped; on CUDA llama-3.1-8b")
    parser.add_argument("--tiny", action="store_true", help="a toy, in seconds: to see that it works")
    parser.add_argument("--contexts", type=int, nargs="+", default=None, help="8192 16384; on CUDA 8192 32768")
    parser.add_argument("--dense-tokens", type=int, default=None, help="65536; on CUDA 98304, 12 GiB of an 8B model")
    parser.add_argument("--question-tokens", type=int, default=None, help="32")
    parser.add_argument("--answer-tokens", type=int, default=None, help="room for an answer; 128")
    parser.add_argument("--chunk-tokens", type=int, default=None, help="rows of a prefill chunk; the engine's default")
    parser.add_argument("--warm-steps", type=int, default=4, help="of all at once, not counted")
    parser.add_argument("--steps", type=int, default=None, help="counted; 64, the period of what is measured")
    parser.add_argument("--host-gib", type=float, default=None, help="most host memory for KV; 12, on CUDA 64")
    parser.add_argument("--verticals", type=float, default=3.0, help="how peaked random weights' attention is")
    parser.add_argument("--seconds-max", type=float, default=3600.0, help="begin nothing new after so long")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", default=None, help="of the checkout, where git cannot tell")
    parser.add_argument("--force", action="store_true", help="run on a busy machine; the result says so")
    parser.add_argument("--out", type=Path, default=None, help="one JSON file, as a session on a GPU wants it")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--name", default="memory_capacity")
    args = parser.parse_args(arguments)
    if args.model_shape is None:
        args.model_shape = "tiny" if args.tiny else "shipped" if args.device == "cpu" else "llama-3.1-8b"
    sizes = {
        "shipped": {"contexts": [8192, 16_384], "dense_tokens": 65_536, "host_gib": 12.0},
        "llama-3.1-8b": {"contexts": [8192, 32_768], "dense_tokens": 98_304, "host_gib": 64.0},
        "tiny": {"contexts": [512], "dense_tokens": 1024, "host_gib": 1.0},
    }[args.model_shape]
    fill_in(args, sizes)
    tiny = {"question_tokens": 16, "answer_tokens": 32, "steps": 8, "chunk_tokens": 32}
    large = {"question_tokens": 32, "answer_tokens": 128, "steps": 64, "chunk_tokens": PrefillSparsity().chunk_tokens}
    fill_in(args, tiny if args.model_shape == "tiny" else large)
    if args.warm_steps < 1 or args.warm_steps + args.steps >= args.answer_tokens:
        parser.error("--warm-steps must be positive, and with --steps less than --answer-tokens")
    if args.dense_tokens < max(args.contexts):
        parser.error(f"--dense-tokens {args.dense_tokens} is less than one conversation of {max(args.contexts)} tokens")
    return args


if __name__ == "__main__":
    print(run_benchmark(parse_arguments(), sys.argv[1:]))
