"""Owns conversations that begin with a history that is there already: computed once, and given to each of them as KV of its own.

What decode reads, and for how long, depends on how many tokens there are, where they lie and what the query finds in them. A copy has
as many tokens, lies in blocks of its own (every conversation has a cache salt of its own, so that none is shared by prefix) and holds
what a prefill of the same text would have written. What differs between real conversations is made by each one's question: it is computed
for real, and so is every row after it. Only the histories' own prefill, which is the same work again and again, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loopserve.config import BLOCK_TOKENS, DecodeSparsity, EngineConfig
from loopserve.dialogue import FinishReason, Mode, QualityContract, SamplingParams, SessionId, TurnEnded, TurnRequest
from loopserve.engine import Engine
from loopserve.kv.image import SessionImage
from loopserve.loading import LoadedModel
from loopserve.plan import BlockCopy, BlockId
from loopserve.tuning import dialogue_ids, random_ids


def text_ids(loaded: LoadedModel, num_tokens: int, *, seed: int, is_random: bool) -> list[int]:
    """What is said: made dialogues, or, for models of any vocabulary, random tokens."""
    if is_random:
        return random_ids(loaded.vocab_size, num_tokens, seed=seed)
    return dialogue_ids(loaded, num_tokens, seed=seed)


def questions_of(loaded: LoadedModel, num: int, num_tokens: int, *, seed: int, is_random: bool) -> list[list[int]]:
    """So many different questions, `num_tokens` each."""
    ids = text_ids(loaded, num * num_tokens, seed=seed, is_random=is_random)
    return [ids[at : at + num_tokens] for at in range(0, len(ids), num_tokens)]


def computed_once(loaded: LoadedModel, token_ids: Sequence[int]) -> SessionImage:
    """A session that holds the exact KV of these tokens, and nothing else. Computed densely on an engine that is gone afterwards."""
    config = EngineConfig(
        dtype=str(loaded.dtype).removeprefix("torch."),
        kv_blocks=-(-len(token_ids) // BLOCK_TOKENS) + 3,
        host_blocks=0,
        decode=DecodeSparsity(scoring="exact"),  # nobody decodes: no sketches are needed
    )
    engine = Engine(config, loaded=loaded)
    ended: list[TurnEnded] = []
    request = TurnRequest(
        SessionId("history"),
        tuple(token_ids),
        SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True),
        QualityContract(mode=Mode.EXACT),
    )
    engine.submit(request, lambda events: ended.extend(e for e in events if isinstance(e, TurnEnded)))
    while not ended:
        assert engine.step() or ended, "a turn that was accepted is computed"
    if ended[0].reason is not FinishReason.LENGTH:
        raise RuntimeError(f"the history could not be computed: {ended[0].error or ended[0].reason}")
    image = engine._porter.image_of(request.session_id)  # as `Engine.export_session` has it, without the checksums
    (branch,) = image.branches
    return replace(image, branches=(replace(branch, token_ids=branch.token_ids[: branch.num_tokens]),))


def give_to_each(engine: Engine, image: SessionImage, names: Sequence[str]) -> bool:
    """Let one idle session in under each name, the name its cache salt too, with the image's KV in blocks of its own.

    In host memory as long as there is room, else on the device. The first one's bytes come from the image; the others' are copied
    from it, block by block. False where the engine has no room for all of them. Its thread must not run.
    """
    first: dict[int, BlockId] = {}
    for name in names:
        # As `Engine.import_session` does it, without a gigabyte of checksums for each of them.
        blocks = engine._sessions.adopt(SessionId(name), salt=name, num_turns=1, branches=image.branches)
        engine._runner.copy(engine._cache.take_copies())
        if first:
            engine._runner.copy([BlockCopy(first[block], own) for block, own in blocks.items()])
        else:
            first = blocks
            assert list(first) == list(range(image.num_blocks)), "a fresh engine knows no block of it"
            engine._runner.write(list(blocks.values()), image.keys, image.values)
    held = {info.session_id: info.num_cached_tokens for info in engine.sessions()}
    return all(held.get(SessionId(name)) == image.num_tokens for name in names)
