"""Session images of a tiny model, for tests of what stores and sends them."""

import torch
from hypothesis import strategies as st

from loopserve.dialogue import SessionId
from loopserve.kv.image import BranchImage, KVFormat, SessionImage, filled_tokens

FORMAT = KVFormat(fingerprint="tiny", num_layers=2, num_kv_heads=1, head_dim=4, dtype=torch.float16)
BLOCK = FORMAT.block_tokens


def pools(fmt: KVFormat, num_blocks: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of random bits, NaNs among them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*fmt.pool_shape(num_blocks)[:-1], fmt.head_dim * fmt.dtype.itemsize)
    keys, values = (
        torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).view(fmt.dtype) for _ in range(2)
    )
    return keys, values


def conversation(
    name: str, num_tokens: int, *, seed: int = 0, salt: str = "", num_turns: int = 1, fmt: KVFormat = FORMAT
) -> SessionImage:
    """A session of one exact branch. Equal seeds give equal tokens and, but for a partly filled block, equal blocks as far as both go."""
    num_blocks = -(-num_tokens // fmt.block_tokens)
    made = [pools(fmt, 1, seed * 1000 + block) for block in range(num_blocks)]
    keys, values = (
        torch.cat([pair[which] for pair in made], dim=1) if made else torch.empty(fmt.pool_shape(0), dtype=fmt.dtype)
        for which in range(2)
    )
    branch = BranchImage(
        token_ids=tuple((seed * 7 + place) % 500 for place in range(num_tokens)),
        num_tokens=num_tokens,
        exact_tokens=num_tokens,
        sparse_from=None,
        blocks=tuple(range(num_blocks)),
    )
    return SessionImage(SessionId(name), salt, num_turns, (branch,), keys, values)


@st.composite
def images(draw: st.DrawFn, fmt: KVFormat = FORMAT) -> SessionImage:
    """Any good image: branches that share leading blocks, that have none, histories that go on behind what is computed."""
    branches: list[BranchImage] = []
    num_blocks = 0
    for _ in range(draw(st.integers(0, 3))):
        num_tokens = draw(st.integers(0, 3 * fmt.block_tokens + 1))
        token_ids = tuple(draw(st.lists(st.integers(0, 2**31 - 1), max_size=3))) + (7,) * num_tokens
        num_needed = -(-num_tokens // fmt.block_tokens)
        parent = draw(st.sampled_from(branches)) if branches else None
        shared = parent.blocks[: min(num_needed, parent.num_tokens // fmt.block_tokens)] if parent else ()
        blocks = shared + tuple(range(num_blocks, num_blocks + num_needed - len(shared)))
        num_blocks += num_needed - len(shared)
        sparse_from = draw(st.none() | st.integers(0, len(token_ids)))
        branches.append(BranchImage(token_ids, num_tokens, draw(st.integers(0, num_tokens)), sparse_from, blocks))
    keys, values = pools(fmt, num_blocks, draw(st.integers(0, 5)))
    names = st.text(max_size=5) | st.sampled_from(["../../etc", "\ud800", 'a"\\\n\x00', "x" * 5000])
    return SessionImage(SessionId(draw(names)), draw(names), draw(st.integers(0, 99)), tuple(branches), keys, values)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """What is compared: NaNs are not equal to themselves."""
    return tensor.contiguous().view(torch.uint8)


def same(one: SessionImage | None, other: SessionImage | None) -> bool:
    """Whether two images say the same of every computed token; one of none is the same as none."""
    if one is None or other is None:
        return one is other
    about = [(i.session_id, i.salt, i.num_turns, i.branches, i.num_blocks) for i in (one, other)]
    if about[0] != about[1]:
        return False
    filled = filled_tokens(one.branches, one.num_blocks, one.keys.shape[2])
    return all(
        torch.equal(bits(mine[:, block, :num_filled]), bits(theirs[:, block, :num_filled]))
        for mine, theirs in ((one.keys, other.keys), (one.values, other.values))
        for block, num_filled in enumerate(filled)
    )
