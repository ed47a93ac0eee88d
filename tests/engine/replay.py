"""A `Capture` without a GPU: what a step does is written down operation by operation and done again, to the same tensors.

As with a CUDA graph, Python runs once, addresses stay, and nothing may come back to the host: an operation that would wait for a device, or
bring numbers from Python, is refused. The operations of `loopserve.kernels` count as one each, whatever their references do.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loopserve import kernels
from loopserve.graphs import Step

_aten = torch.ops.aten
WAITS_FOR_THE_DEVICE = {
    _aten._local_scalar_dense.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.is_nonzero.default,
    _aten.equal.default,
    _aten.unique_dim.default,
    _aten._unique2.default,
    _aten.lift_fresh.default,  # a tensor made from Python numbers: a graph would keep those of its capture
}
OPS = sorted(path.parent.name for path in Path(kernels.__file__).parent.glob("*/reference.py"))


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []
        self._before: list[tuple[Tensor, Tensor]] = []  # what was written in place, and what it held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in WAITS_FOR_THE_DEVICE, f"{func} cannot be captured"
        if func._schema.is_mutable:
            self.keep(args[0])
        output = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, output))
        return output

    def keep(self, tensor: Tensor) -> None:
        """Remember what a tensor holds before it is written."""
        self._before.append((tensor, tensor.clone()))

    def undo(self) -> None:
        """A capture computes nothing."""
        for written, held in reversed(self._before):
            written.copy_(held)


@dataclass
class Replays:
    """Captures steps and replays them; `num_captured` and `num_replayed` say how often."""

    num_captured: int = 0
    num_replayed: int = 0
    _recording: _Recording | None = field(default=None)

    def capture(self, step: Step) -> Step:
        with _Recording() as recording:
            self._recording = recording
            output = step()
            self._recording = None
        recording.undo()
        self.num_captured += 1

        def replay() -> tuple[Tensor, Tensor]:
            self.num_replayed += 1
            for func, args, kwargs, result in recording.done:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # else a view, or written in place
                        old.copy_(new)
            return output

        return replay

    @contextlib.contextmanager
    def whole_operations(self) -> Iterator[None]:
        """Write an operation of ours down as one."""
        with pytest.MonkeyPatch.context() as patch:
            for op in OPS:
                module = importlib.import_module(f"loopserve.kernels.{op}")
                patch.setattr(module, "implementation", self._noting(module.implementation))
            yield

    def _noting(self, implementation: Callable[[str, str], Callable[..., Any]]) -> Callable[..., Any]:
        def noting(op: str, device_type: str) -> Callable[..., Any]:
            function = implementation(op, device_type)

            def call(*args: Any, **kwargs: Any) -> Any:
                if self._recording is None:
                    return function(*args, **kwargs)
                with torch.utils._python_dispatch._disable_current_modes():
                    for tensor in _pools(args) if op.startswith("store") else ():
                        self._recording.keep(tensor)
                    output = function(*args, **kwargs)
                self._recording.done.append((function, args, kwargs, output))
                return output

            return call

        return noting


def _pools(args: tuple[Any, ...]) -> Iterator[Tensor]:
    """All tensors that a storing operation is given."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        else:
            yield from (arg.signs, arg.scales)
