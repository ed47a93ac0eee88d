"""Plain mathematics that kernels are held against: one dense masked softmax in float64, written without any of their tricks.

Tolerances, everywhere: float32 may differ from float64 by the rounding of sums over some hundred terms of size about 1, so 1e-5.
A bfloat16 output has 8 bits of significand, so it is rounded by up to 2**-9 of its size, here at most 4; inside, weights are rounded to
bfloat16 once more before they meet the values. 3e-2 leaves room for both and is far below any wrong row or column, which errs by about 1.
float16 has 11 bits, three more: 4e-3.
"""

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def logits(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Scores of one row's heads [H, D] over keys [n, Hkv, D], float64 [H, n]."""
    per_head = keys.repeat_interleave(query.shape[0] // keys.shape[1], dim=1).double()  # [n, H, D]
    return torch.einsum("hd,nhd->hn", query.double(), per_head) * scale


def weights(query: Tensor, keys: Tensor, read: Tensor, scale: float) -> Tensor:
    """Softmax of query [R, H, D] over keys [N, Hkv, D] where `read` bool [H, R, N], float64 [H, R, N]; zeros where nothing is read."""
    group = query.shape[1] // keys.shape[1]
    result = torch.zeros(read.shape, dtype=torch.float64)
    for head in range(query.shape[1]):
        for row in range(query.shape[0]):
            columns = read[head, row].nonzero()[:, 0]
            logits = keys[columns, head // group].double() @ query[row, head].double() * scale
            result[head, row, columns] = torch.softmax(logits, dim=0)
    return result


def attention(query: Tensor, keys: Tensor, values: Tensor, read: Tensor, scale: float) -> Tensor:
    """Attention with these weights, float64 [R, H, D]; a column that no row of a head reads is never multiplied."""
    group = query.shape[1] // keys.shape[1]
    per_head = weights(query, keys, read, scale)
    output = torch.zeros(query.shape, dtype=torch.float64)
    for head in range(query.shape[1]):
        columns = read[head].any(dim=0).nonzero()[:, 0]
        output[:, head] = per_head[head][:, columns] @ values[columns, head // group].double()
    return output


def causal(positions: Tensor, num_columns: int, num_heads: int) -> Tensor:
    """Rows at `positions` [R] read every column up to their own: bool [H, R, N]."""
    return (torch.arange(num_columns) <= positions[:, None]).expand(num_heads, -1, -1)
