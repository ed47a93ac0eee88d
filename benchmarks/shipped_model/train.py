"""Trains the shipped model: tokenizer, curriculum, export. `python -m benchmarks.shipped_model.train --checkpoint FILE`.

The model is a small Llama that recalls what was told many turns earlier. Training climbs a curriculum of dialogue lengths: recall
appears in dialogues of a few facts first, and each longer stage starts from it. Only the assistant's tokens bear loss,
because what the user says is not predictable. A run is resumed from its checkpoint. `--tiny` goes the whole way in seconds.

Each worker is a process with one thread and its share of every batch; gradients are averaged (gloo). Two such processes see a third more
tokens a second than one process with two threads. How far a run is follows from counts over all workers, so all agree without a leader.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor, distributed, multiprocessing
from transformers import GenerationConfig, LlamaForCausalLM

from benchmarks.shipped_model.batches import Batch, BatchKey, batches
from benchmarks.shipped_model.model import build_model
from benchmarks.shipped_model.muon import Muon
from benchmarks.shipped_model.recipe import Recipe, full_recipe, further, tiny_recipe
from benchmarks.shipped_model.text import (
    BEGIN,
    CHAT_TEMPLATE,
    END,
    FIRST_TASK,
    IGNORE,
    PAD,
    REPLY,
    ROLES,
    build_tokenizer,
    special_id,
)
from loopserve.evaluation.dialogues import TASKS

TOKENIZER_FILE = "tokenizer.json"
_SMOOTHING = 0.97  # of running shares


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    right: float = 0.0  # running share of answer tokens of the stage that were right
    right_by_task: dict[str, float] = field(default_factory=dict)

    def saw(self, recipe: Recipe, tokens: int, seconds: float, right: dict[str, float]) -> None:
        """Count a step and, by task, the share of this stage's answer tokens that were right; leave the stage where it is time."""
        self.step += 1
        self.stage_step += 1
        self.tokens += tokens
        self.seconds += seconds
        if right:
            mean = sum(right.values()) / len(right)
            self.right = _SMOOTHING * self.right + (1 - _SMOOTHING) * mean
            for task, share in right.items():
                self.right_by_task[task] = _SMOOTHING * self.right_by_task.get(task, share) + (1 - _SMOOTHING) * share
        stage = recipe.stages[self.stage]
        enough = self.right >= stage.enough and self.stage_step >= stage.least_steps
        late = self.tokens >= stage.until * recipe.tokens
        if (enough or late) and self.stage + 1 < len(recipe.stages):
            self.stage, self.stage_step, self.right, self.right_by_task = self.stage + 1, 0, 0.0, {}


def learning_rate(recipe: Recipe, progress: Progress) -> float:
    """Warm-up by steps, then level, then a straight fall to a fiftieth over the last tokens."""
    done = min(1.0, progress.tokens / recipe.tokens)
    fall = (1.0 - done) / (1.0 - recipe.decay_from) if done > recipe.decay_from else 1.0
    return recipe.rate * min(1.0, (progress.step + 1) / recipe.warmup_steps) * max(0.02, fall)


def hidden_states(model: LlamaForCausalLM, ids: Tensor, positions: Tensor) -> Tensor:
    """The last layer's states [rows, T, hidden], causal, at any ascending positions.

    The stock forward takes a jump in the positions for the begin of another packed sequence and would hide what lies before it.
    """
    base = model.model
    hidden: Tensor = base.embed_tokens(ids)
    rotary = base.rotary_emb(hidden, position_ids=positions)
    for layer in base.layers:
        hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
    normed: Tensor = base.norm(hidden)
    return normed


class Optimizers:
    """Muon for the matrices inside the layers, AdamW for the rest, as one.

    Muon learned the tasks of 400 tokens from about 0.7 times the tokens that AdamW needed at the same rate, at 1.1 times the time a token.
    """

    def __init__(self, model: LlamaForCausalLM, weight_decay: float) -> None:
        inner, outer = [], []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            (inner if parameter.ndim == 2 and "embed" not in name else outer).append(parameter)
        self._parts: tuple[torch.optim.Optimizer, ...] = (
            Muon(inner, weight_decay=weight_decay),
            torch.optim.AdamW(outer, betas=(0.9, 0.98), weight_decay=weight_decay),
        )

    def step(self, rate: float) -> None:
        """One update at a rate; gradients are gone afterwards."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad()

    def state_dict(self) -> list[dict[str, Any]]:
        """Of both."""
        return [part.state_dict() for part in self._parts]

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Of both."""
        for part, state in zip(self._parts, states, strict=True):
            part.load_state_dict(state)


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices itself; where it does not, they are forty times slower than float32 ones."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def gradients(model: LlamaForCausalLM, batch: Batch, reply_weight: float) -> tuple[float, Tensor]:
    """Leave the batch's gradients in the model; gives the loss and, by task, how many answer tokens there are and are right, [2, tasks]."""
    learned = batch.kinds[:, 1:] != IGNORE
    wanted, kinds = batch.ids[:, 1:][learned], batch.kinds[:, 1:][learned]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_bfloat16()):
        hidden = hidden_states(model, batch.ids[:, :-1], batch.positions[:, :-1])
        logits = model.lm_head(hidden[learned]).float()
    losses = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
    weights = torch.where(kinds == REPLY, reply_weight, 1.0)
    loss = (losses * weights).sum() / weights.sum()
    loss.backward()  # type: ignore[no-untyped-call]
    hits = (logits.detach().argmax(-1) == wanted).double()
    marked = torch.stack([kinds == FIRST_TASK + index for index in range(len(TASKS))]).double()
    return loss.item(), torch.stack([marked.sum(1), marked @ hits])


def average(model: LlamaForCausalLM, counts: Tensor) -> Tensor:
    """Average the gradients over all workers, and add up the counts."""
    if not distributed.is_initialized():
        return counts
    held = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([grad.flatten() for grad in held])
    distributed.all_reduce(flat)
    for grad, mean in zip(held, flat.div_(distributed.get_world_size()).split([g.numel() for g in held]), strict=True):
        grad.copy_(mean.view_as(grad))
    distributed.all_reduce(counts)
    return counts


def train(
    recipe: Recipe, model: LlamaForCausalLM, tokenizer: Tokenizer, checkpoint: Path, log: Callable[[str], None]
) -> Progress:
    """Trains until all tokens were seen, resuming from `checkpoint` where it exists; the first worker saves to it now and then.

    A new run begins with the recipe's `first_stage`.
    """
    rank, workers = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    optimizers = Optimizers(model, recipe.weight_decay)
    at = load_checkpoint(checkpoint, model, optimizers) if checkpoint.exists() else Progress(stage=recipe.first_stage)

    def order() -> Iterator[BatchKey]:
        step = at.step
        while True:
            yield BatchKey(step * workers + rank, at.stage, workers)
            step += 1

    model.train()
    stream = batches(recipe, tokenizer, order)
    while at.tokens < recipe.tokens:
        started = time.monotonic()
        batch = next(stream)
        loss, found = gradients(model, batch, recipe.reply_weight)
        own = torch.tensor([batch.num_tokens], dtype=torch.float64)
        counts = average(model, torch.cat([own, *(found if batch.stage == at.stage else torch.zeros_like(found))]))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(learning_rate(recipe, at))
        asked, right = counts[1:].view(2, len(TASKS)).tolist()
        shares = {task: hit / all_ for task, all_, hit in zip(TASKS, asked, right, strict=True) if all_}
        at.saw(recipe, int(counts[0]), time.monotonic() - started, shares)
        if rank == 0 and at.step % 50 == 0:
            tasks = " ".join(f"{task[:5]} {share:.3f}" for task, share in at.right_by_task.items())
            log(
                f"step {at.step} stage {at.stage} tokens {at.tokens} seconds {at.seconds:.0f} "
                f"loss {loss:.4f} right {at.right:.3f} | {tasks}"
            )
        if rank == 0 and at.step % 250 == 0:
            save_checkpoint(checkpoint, model, optimizers, at)
    if rank == 0:
        save_checkpoint(checkpoint, model, optimizers, at)
    return at


def tokenizer_of(recipe: Recipe, checkpoint: Path, trained: Path | None) -> Tokenizer:
    """The tokenizer that stands beside the checkpoint; where there is none, that of a `trained` model or a new one is put there first."""
    path = checkpoint.with_suffix(".tokenizer.json")
    if path.exists():
        return Tokenizer.from_file(str(path))
    if trained is not None:
        tokenizer = Tokenizer.from_file(str(trained / TOKENIZER_FILE))
    else:
        tokenizer = build_tokenizer(recipe.seed, recipe.model.vocab, recipe.tokenizer_dialogues)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return tokenizer


def save_checkpoint(path: Path, model: LlamaForCausalLM, optimizers: Optimizers, at: Progress) -> None:
    """Writes beside the target and renames, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save({"model": model.state_dict(), "optimizers": optimizers.state_dict(), "progress": asdict(at)}, partial)
    partial.replace(path)


def load_checkpoint(path: Path, model: LlamaForCausalLM, optimizers: Optimizers | None = None) -> Progress:
    """Restores weights, and the optimizers where they are given."""
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    if optimizers is not None:
        optimizers.load_state_dict(saved["optimizers"])
    return Progress(**saved["progress"])


def export(directory: Path, model: LlamaForCausalLM, tokenizer: Tokenizer) -> int:
    """Writes the Hugging Face files and gives their size in bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        bos_token_id=special_id(tokenizer, BEGIN),
        eos_token_id=special_id(tokenizer, END),
        pad_token_id=special_id(tokenizer, PAD),
        do_sample=False,
    )
    model.save_pretrained(directory)
    tokenizer.save(str(directory / TOKENIZER_FILE))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": list(ROLES),
        "model_max_length": model.config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (directory / "model.safetensors").chmod(0o644)
    return sum(path.stat().st_size for path in directory.iterdir())


def describe(recipe: Recipe, at: Progress, model: LlamaForCausalLM, *, size_bytes: int, workers: int) -> dict[str, Any]:
    """What a run was, for the results."""
    return {
        "machine": f"{platform.machine()} CPU, {workers} processes of one thread, {'bfloat16 autocast' if has_bfloat16() else 'float32'}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "recipe": asdict(recipe),
        "steps": at.step,
        "tokens_seen": at.tokens,
        "training_seconds": round(at.seconds, 1),
        "stage_reached": at.stage,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": size_bytes,
    }


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("loopserve/assets/loopserve-recall"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/shipped_model_training.json"))
    parser.add_argument("--checkpoint", type=Path, required=True, help="resumed from where it exists")
    parser.add_argument(
        "--trained", type=Path, help="directory of a model to train further, late stages only, at a lower rate"
    )
    parser.add_argument("--tokens", type=float, default=24e6, help="tokens seen in all, resumed parts included")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--skip-training", action="store_true", help="export the checkpoint as it is")
    parser.add_argument("--tiny", action="store_true", help="the whole way in seconds, nothing learned")
    return parser.parse_args()


def run_worker(rank: int, args: argparse.Namespace, recipe: Recipe, rendezvous: str) -> None:
    """One of the processes; the first also exports."""
    torch.set_num_threads(1)
    if args.workers > 1:
        distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=args.workers)
    tokenizer = tokenizer_of(recipe, args.checkpoint, args.trained)
    model = build_model(recipe.model, tokenizer, recipe.seed)
    if args.trained is not None:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(args.trained, dtype=torch.float32).state_dict())
    if args.skip_training:
        at = load_checkpoint(args.checkpoint, model)
    else:
        at = train(recipe, model, tokenizer, args.checkpoint, lambda line: print(line, flush=True))
    if rank == 0:
        size_bytes = export(args.out, model, tokenizer)
        record = describe(recipe, at, model, size_bytes=size_bytes, workers=args.workers)
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        print(f"{args.out}: {size_bytes} bytes after {at.tokens} tokens")


def main() -> None:
    """Tokenizer, training, export, results."""
    args = parse_arguments()
    recipe = tiny_recipe(args.seed) if args.tiny else full_recipe(int(args.tokens), args.seed)
    if args.trained is not None:
        recipe = further(recipe)
    tokenizer_of(recipe, args.checkpoint, args.trained)  # made once, before the workers look for it
    if args.workers == 1 or args.skip_training:
        args.workers = 1
        run_worker(0, args, recipe, "")
        return
    with tempfile.TemporaryDirectory() as directory:
        rendezvous = (Path(directory) / "workers").as_uri()
        multiprocessing.spawn(run_worker, args=(args, recipe, rendezvous), nprocs=args.workers)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
