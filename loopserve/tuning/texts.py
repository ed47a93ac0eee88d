"""What a measured conversation says, as token ids. How peaked attention is decides how much sparse prefill computes, so it matters."""

import random

from loopserve.evaluation.dialogues import TASKS, Split, make_dialogues
from loopserve.loading import LoadedModel


def dialogue_ids(loaded: LoadedModel, num_tokens: int, *, seed: int) -> list[int]:
    """Made dialogues, rendered one after the other by the model's own template, until there are enough tokens."""
    ids: list[int] = []

    def count(text: str) -> int:
        return len(loaded.tokenizer.encode(text, add_special_tokens=False)) + 2

    num = -(-num_tokens // 256)
    for dialogue in make_dialogues(TASKS, split=Split.TEST, num=num, tokens=1024, seed=seed, count_tokens=count):
        pairs = ((("user", turn.user), ("assistant", turn.answer)) for turn in dialogue.turns)
        messages = [{"role": role, "content": text} for pair in pairs for role, text in pair]
        ids += loaded.tokenizer(
            loaded.tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False
        )["input_ids"]
        if len(ids) >= num_tokens:
            return ids[:num_tokens]
    raise ValueError(f"the dialogues have {len(ids)} tokens, {num_tokens} are needed")


def random_ids(vocab_size: int, num_tokens: int, *, seed: int) -> list[int]:
    """Tokens drawn alike from the whole vocabulary. Attention over them is nearly flat: the worst case of sparse prefill."""
    rng = random.Random(seed)
    return [rng.randrange(vocab_size) for _ in range(num_tokens)]
