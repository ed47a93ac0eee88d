"""Decides which implementation of an operation runs on a device, once, and logs why.

Knows nothing about the operations but their names. Reads the environment: `LOOPSERVE_KERNELS=reference` forces the reference
everywhere, which is how a suspected kernel is ruled out on a running machine.
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
    """The function that computes `op` on `device_type`: the kernel where there is one and the device is CUDA, else the reference."""
    package = f"loopserve.kernels.{op}"
    choice, reason = "reference", f"the device is {device_type!r}"
    if os.environ.get("LOOPSERVE_KERNELS") == "reference":
        reason = "LOOPSERVE_KERNELS asks for it"
    elif device_type == "cuda" and importlib.util.find_spec(f"{package}.kernel") is None:
        reason = "this operation has no kernel"
    elif device_type == "cuda":
        choice, reason = "kernel", "the device is CUDA"
    _log.info("%s runs as its %s: %s", op, choice, reason)
    return cast(Callable[..., Any], getattr(importlib.import_module(f"{package}.{choice}"), op))
