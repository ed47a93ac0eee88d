"""`sparse_prefill` in plain torch.

One attention per (query tile, head) over exactly the columns that this head reads there. Heads differ widely in how much they
read, and one of them may be dense: padding all to the widest would compute what the others leave out.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from loopserve.kernels.pool import gather_head


def sparse_prefill(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    slots: Tensor,
    *,
    start: int,
    tiles: Tensor,
    verticals: Tensor,
    tile_tokens: int,
    dense_last_rows: int,
    scale: float,
) -> Tensor:
    """See the contract in `loopserve.kernels.sparse_prefill`."""
    num_rows, num_heads = query.shape[:2]
    group = num_heads // key_pool.shape[1]
    num_sparse_rows = max(0, num_rows - dense_last_rows)
    output = torch.zeros_like(query, memory_format=torch.contiguous_format)
    key_tile = (torch.arange(slots.shape[0], device=slots.device) - start).div(tile_tokens, rounding_mode="floor")
    for first in range(0, num_sparse_rows, tile_tokens):
        last = min(first + tile_tokens, num_sparse_rows)
        end = start + last  # columns from here on lie in the future of every row of this tile
        diagonal = first // tile_tokens - key_tile[:end]
        read = tiles.index_select(1, diagonal) | verticals[:, :end]  # [H, end]: a crossing counts once
        for head in range(num_heads):
            listed = read[head].nonzero().squeeze(1)  # [M]
            output[first:last, head] = _attend(
                query[first:last, head, None],
                gather_head(key_pool, slots[listed], head=head // group),
                gather_head(value_pool, slots[listed], head=head // group),
                positions=torch.arange(start + first, end, device=slots.device),
                columns=listed,
                scale=scale,
            ).squeeze(1)
    if num_sparse_rows < num_rows:
        every = torch.arange(slots.shape[0], device=slots.device)
        for kv_head in range(key_pool.shape[1]):
            heads = slice(kv_head * group, (kv_head + 1) * group)
            output[num_sparse_rows:, heads] = _attend(
                query[num_sparse_rows:, heads],
                gather_head(key_pool, slots, head=kv_head),
                gather_head(value_pool, slots, head=kv_head),
                positions=every[start + num_sparse_rows :],
                columns=every,
                scale=scale,
            )
    return output


def _attend(query: Tensor, key: Tensor, value: Tensor, *, positions: Tensor, columns: Tensor, scale: float) -> Tensor:
    """Causal attention of rows [n, G, D] at `positions` [n] over the gathered `columns` [M] of one KV head, [M, D] each."""
    if columns.shape[0] == 0:
        return torch.zeros_like(query)
    visible = columns <= positions[:, None]  # [n, M]
    bias = query.new_zeros(visible.shape).masked_fill_(~visible, float("-inf"))
    group = query.shape[1]
    # In four dimensions, or torch leaves its fused kernel, which accumulates in float32, for softmax and bmm: 1.5x slower here.
    keys, values = (cached.expand(1, group, -1, -1) for cached in (key, value))
    output = scaled_dot_product_attention(query.transpose(0, 1)[None], keys, values, attn_mask=bias, scale=scale)[0]
    # What a fused kernel gives for a row that sees nothing differs by device. `columns` ascend: such a row does not see the first.
    return output.transpose(0, 1).masked_fill(~visible[:, :1, None], 0.0)
