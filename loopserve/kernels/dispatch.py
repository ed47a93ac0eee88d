"""Decides which implementation of an operation runs on a device, once, and logs why.

Knows nothing about the operations but their names. Reads the environment: `LOOPSERVE_KERNELS=reference` forces the reference
everywhere, which is how a suspected kernel is ruled out on a running machine; `LOOPSERVE_KERNELS=kernel` forces the kernels, on a CPU
too, where Triton interprets them if `TRITON_INTERPRET=1` was set before it was imported: slow, and how tests run them.
"""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any, cast

_log = logging.getLogger(__name__)


@functools.cache
def implementation(op: str, device_type: str) -> Callable[..., Any]:
    """The function that computes `op` on `device_type`: the kernel if the device is CUDA and Triton is installed, else the reference."""
    choice, reason = _choice(device_type)
    _log.info("%s runs as its %s: %s", op, choice, reason)
    return cast(Callable[..., Any], getattr(importlib.import_module(f"loopserve.kernels.{op}.{choice}"), op))


def _choice(device_type: str) -> tuple[str, str]:
    forced = os.environ.get("LOOPSERVE_KERNELS", "")
    if forced in ("reference", "kernel"):
        return forced, "LOOPSERVE_KERNELS asks for it"
    if device_type != "cuda":
        return "reference", f"the device is {device_type!r}"
    if importlib.util.find_spec("triton") is None:
        return "reference", "Triton is not installed"
    return "kernel", "the device is CUDA"
