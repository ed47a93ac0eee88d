"""`sketch_log_sum` in plain torch, all rows and lists at once."""

import torch
from torch import Tensor

from loopserve.kernels.sketch import KeySketch, sketched_products


def sketch_log_sum(query: Tensor, sketch: KeySketch, slots: Tensor, valid: Tensor | None, *, scale: float) -> Tensor:
    """See the contract in `loopserve.kernels.sketch_log_sum`."""
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads, num_lists, num_listed = sketch.signs.shape[1], slots.shape[1], slots.shape[2]
    heads_a_list = num_heads // num_lists
    kv_heads = torch.arange(num_lists, device=query.device)[:, None] // (num_lists // num_kv_heads)
    keys = slots * num_kv_heads + kv_heads  # [R, Hs, M]
    of_lists = (query.float() * scale).reshape(num_rows * num_lists, heads_a_list, head_dim)
    products = sketched_products(of_lists, sketch, keys.flatten(0, 1))
    logits = products.view(num_rows, num_lists, heads_a_list, num_listed)
    if valid is not None:
        logits = logits.masked_fill(~valid[:, :, None], float("-inf"))
    return logits.logsumexp(dim=3).flatten(1)
