"""A kernel that does nothing: what is left of its time is the cost of a launch. Imported on CUDA only, where Triton is."""

import torch
import triton


@triton.jit
def _nothing(pointer):  # noqa: ANN001, ANN202 - a Triton function
    pass


def launch_nothing(pointer: torch.Tensor) -> None:
    """Launch one program that reads and writes nothing."""
    _nothing[(1,)](pointer)
