"""What sparse attention has to beat: the fastest of PyTorch's dense backends on the same rows and context, each checked before it is timed.

Dense gets its keys and values side by side, [B, Hkv, N, D], as it likes them best, not from a pool. New rows stand at the end of the
context, so their causal mask is aligned to the lower right: what a backend makes of `is_causal` where rows and columns differ in number
changed over versions, and one that computes something else is found out here and left aside.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.kernels.timing import Timing, time_in_graph, time_in_stream

Attention = Callable[
    [Tensor, Tensor, Tensor], Tensor
]  # query [B, H, r, D], key and value [B, Hkv, N, D] -> [B, H, r, D]

_QUICK_REPEATS = 5  # to find the fastest, which is then timed as everything else is
_ERROR_MAX = 0.02  # of the norm: bfloat16 errs by some 0.005, a mask at the wrong place by about 1


@dataclass(frozen=True, slots=True)
class Dense:
    """The fastest backend, and what became of all of them."""

    name: str
    timing: Timing
    graph: Timing | None
    tried: dict[str, str]  # milliseconds, or why not

    @property
    def time_s(self) -> float:
        """In a graph where that was asked for."""
        return self.graph.median_s if self.graph else self.timing.median_s


def fastest_dense(inputs: list[tuple[Tensor, Tensor, Tensor]], *, device: torch.device, in_graph: bool) -> Dense:
    """Time every backend on the copies of (query, key, value), whose last rows read all columns. Raises RuntimeError if none works."""
    tried: dict[str, str] = {}
    best: tuple[float, str, Callable[[int], Tensor]] | None = None
    query, key, value = inputs[0]
    by_token = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    rows = sorted({0, query.shape[2] // 2, query.shape[2] - 1})
    expected = expected_rows(by_token[0], by_token[1], by_token[2], rows, read=None)
    for name, attention, repeated in _backends(query, key, device):
        try:
            call = _call(attention, inputs, repeated=repeated)
            error = relative_error(call(0)[0].transpose(0, 1)[rows], expected)
            if error < _ERROR_MAX:
                seconds = time_in_stream(call, device=device, copies=len(inputs), repeats=_QUICK_REPEATS).median_s
                tried[name] = f"{1e3 * seconds:.3f} ms"
                best = min((seconds, name, call), best or (math.inf, "", call), key=lambda found: found[0])
            else:
                tried[name] = f"computes something else (off by {error:.2g} of the norm)"
            del call  # with the repeated heads of a backend that is not the best, before the next one repeats them
        except RuntimeError as failure:  # so says a backend that does not take these shapes, or the device that is full
            tried[name] = f"not here: {str(failure).splitlines()[0][:120]}"
    if best is None:
        raise RuntimeError(f"no dense backend works: {tried}")
    _, name, call = best
    timing = time_in_stream(call, device=device, copies=len(inputs))
    graph = None
    if in_graph:
        try:
            graph = time_in_graph(call, device=device, copies=len(inputs))
        except RuntimeError as failure:  # then its time in the stream counts, and it is told
            tried[f"{name}, in a graph"] = f"not captured: {str(failure).splitlines()[0][:120]}"
    return Dense(name, timing, graph, tried)


def expected_rows(query: Tensor, key: Tensor, value: Tensor, rows: list[int], *, read: Tensor | None) -> Tensor:
    """Attention of some rows in plain float32: query [r, H, D], key and value [N, Hkv, D]; read bool [len(rows), H, N] or causal.

    Returns [len(rows), H, D].
    """
    num_rows, num_heads, head_dim = query.shape
    num_columns, num_kv_heads = key.shape[:2]
    columns = torch.arange(num_columns, device=query.device)
    results = []
    for index, row in enumerate(rows):
        grouped = query[row].float().view(num_kv_heads, -1, head_dim)  # [Hkv, G, D]
        logits = torch.einsum("kgd,nkd->kgn", grouped, key.float()).flatten(0, 1) * head_dim**-0.5  # [H, N]
        seen = columns <= num_columns - num_rows + row
        if read is not None:
            seen = seen & read[index]
        weights = logits.masked_fill(~seen, float("-inf")).softmax(dim=1).view(num_kv_heads, -1, num_columns)
        results.append(torch.einsum("kgn,nkd->kgd", weights, value.float()).reshape(num_heads, head_dim))
    return torch.stack(results)


def relative_error(output: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((output.float() - expected).norm() / expected.norm())


def _call(
    attention: Attention, inputs: list[tuple[Tensor, Tensor, Tensor]], *, repeated: bool
) -> Callable[[int], Tensor]:
    if repeated:
        inputs = [(query, _repeated(key, query), _repeated(value, query)) for query, key, value in inputs]
    return lambda copy: attention(*inputs[copy])


def _repeated(tensor: Tensor, query: Tensor) -> Tensor:
    """A KV head for every query head, for backends that know no groups."""
    return tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1)


def _backends(query: Tensor, key: Tensor, device: torch.device) -> list[tuple[str, Attention, bool]]:
    """Name, what it runs, and whether it wants a KV head for every query head."""
    num_rows, num_columns = query.shape[2], key.shape[2]
    if device.type != "cuda":
        seen = torch.ones((num_rows, num_columns), dtype=torch.bool).tril(num_columns - num_rows)
        return [("sdpa on a CPU", lambda q, k, v: scaled_dot_product_attention(q, k, v, seen, enable_gqa=True), False)]
    if num_rows == 1:
        return [
            ("flash", _only(SDPBackend.FLASH_ATTENTION, lambda: None, grouped=True), False),
            ("cudnn", _only(SDPBackend.CUDNN_ATTENTION, lambda: None, grouped=True), False),
            ("cudnn, heads repeated", _only(SDPBackend.CUDNN_ATTENTION, lambda: None, grouped=False), True),
            ("efficient, heads repeated", _only(SDPBackend.EFFICIENT_ATTENTION, lambda: None, grouped=False), True),
        ]

    def aligned() -> Tensor:
        bias: Tensor = causal_lower_right(num_rows, num_columns)
        return bias

    return [
        ("flash", _only(SDPBackend.FLASH_ATTENTION, aligned, grouped=True), False),
        ("efficient, heads repeated", _only(SDPBackend.EFFICIENT_ATTENTION, aligned, grouped=False), True),
        ("cudnn, is_causal", _cudnn_causal, False),
        ("cudnn, past and own rows apart", _cudnn_in_two, False),
        ("cudnn, past and own rows apart, heads repeated", _cudnn_in_two, True),
    ]


def _only(backend: SDPBackend, mask: Callable[[], Tensor | None], *, grouped: bool) -> Attention:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel([backend]):
            return scaled_dot_product_attention(query, key, value, attn_mask=mask(), enable_gqa=grouped)

    return attention


def _cudnn_causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def _cudnn_in_two(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The past without a mask, the rows' own tokens with a square causal one, joined by what each part's softmax was divided by."""
    start = key.shape[2] - query.shape[2]
    past, past_sum = _cudnn(query, key[:, :, :start], value[:, :, :start], causal=False)
    own, own_sum = _cudnn(query, key[:, :, start:], value[:, :, start:], causal=True)
    share = torch.sigmoid(past_sum - own_sum).reshape(*query.shape[:3], 1).to(query.dtype)  # of the past
    return torch.lerp(own, past, share)


def _cudnn(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Output and logarithm of the softmax's sum; a mask in the form of a tensor would cost cuDNN more than the attention."""
    output, log_sum, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, causal, False
    )
    return output, log_sum
