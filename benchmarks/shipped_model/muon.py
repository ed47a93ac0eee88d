"""The Muon optimizer in float32, for the matrices of a small model on a CPU. Source: Jordan et al., https://kellerjordan.github.io/posts/muon.

`torch.optim.Muon` makes its updates orthogonal in bfloat16 whatever it is given. On a CPU without such instructions that product is forty
times slower than in float32 (AVX2, 192 by 512: 28 ms for 0.5), and a step of the shipped model took ten seconds of it. The same otherwise:
Nesterov momentum, decay apart from the gradient, updates as long as AdamW's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_QUINTIC = (3.4445, -4.7750, 2.0315)  # steep at zero: every singular value lands between 0.7 and 1.2 after five steps
_STEPS = 5
_ADAM_RMS = 0.2  # of an update's entries, which rates for AdamW are made for


class Muon(torch.optim.Optimizer):
    """Moves matrices [m, n] along their momentum with all its singular values made about one."""

    def __init__(self, params: Iterable[Tensor], *, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": 1e-3, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        assert closure is None, "nothing is evaluated twice"
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                mean = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                mean.lerp_(matrix.grad, 1.0 - momentum)
                update = orthogonalized(matrix.grad.lerp(mean, momentum))
                matrix.mul_(1.0 - rate * group["weight_decay"])
                matrix.add_(update, alpha=-rate * _ADAM_RMS * max(matrix.shape) ** 0.5)


def orthogonalized(matrix: Tensor) -> Tensor:
    """About U V^T of a float32 matrix [m, n] = U S V^T, by Newton and Schulz's iteration; zero stays zero."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / wide.norm().clamp(min=1e-7)
    first, third, fifth = _QUINTIC
    for _ in range(_STEPS):
        gram = wide @ wide.T
        wide = first * wide + (third * gram + fifth * gram @ gram) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T
