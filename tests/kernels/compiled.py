"""Compile the kernels for Hopper, sm_90, without a device, and say of each what the compiler made of it: a line of JSON on stdout.

    python -m tests.kernels.compiled bfloat16/128 float32/64        dtypes and head dims; 32 query heads, 8 KV heads

What the interpreter hides is found here: types that do not meet, branches that it never took, registers that spill, shared memory that
no multiprocessor has. Every operation is called through its contract, with tensors on the CPU in the engine's shapes; Triton compiles
instead of launching, so nothing is computed and contents do not matter. A program, because it replaces Triton's driver for good.
"""

import dis
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction, KernelInterface

from loopserve import kernels
from loopserve.kernels import KeySketch, LeftOut, tiles

NUM_HEADS, NUM_KV_HEADS = 32, 8
NUM_SLOTS = 64  # of a pool: none is read
CONTEXT, LISTED = 4096, 1029  # LISTED: sinks, a budget of 1024, and the newest token
SCALE = 0.1
MULTIPROCESSORS = 132  # of an H100 or H200
TENSOR_CORES = {"wgmma": "wgmma.mma_async", "mma": "mma.sync"}  # in PTX, the instructions that use them


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel of one operation, compiled for one dtype and head dim of the model."""

    op: str
    kernel: str  # as `launched_kernels` names it
    dtype: str
    head_dim: int
    flags: dict[str, Any]  # its constexpr arguments
    shared_bytes: int
    registers: int  # of a thread
    spilled_bytes: int  # the stack of a thread, where registers go that do not fit
    multiplies: bool  # it has a product of tiles
    tensor_cores: list[str]  # the instructions it uses them by, of "wgmma" and "mma"


def launched_kernels() -> set[str]:
    """Every kernel under `loopserve.kernels` that no other one calls, so that only the host can launch it: `module.function`."""
    found, called = {}, set()
    for module_info in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."):
        for thing in vars(importlib.import_module(module_info.name)).values():
            while isinstance(thing, KernelInterface) and not isinstance(thing, JITFunction):
                thing = thing.fn  # what chooses sizes or derives arguments stands around a kernel
            if isinstance(thing, JITFunction):
                found[_name(thing)] = thing
    for kernel in found.values():
        names = [step.argval for step in dis.get_instructions(kernel.fn) if step.opname == "LOAD_GLOBAL"]
        used = (kernel.fn.__globals__.get(name) for name in names)
        called |= {_name(thing) for thing in used if isinstance(thing, JITFunction)}
    return found.keys() - called


def _name(kernel: JITFunction) -> str:
    return f"{kernel.fn.__module__}.{kernel.fn.__name__}".removeprefix(f"{kernels.__name__}.")


def _numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def _indices(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def _flags(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bool)


def _heads(count: int, num_heads: int, dtype: torch.dtype, head_dim: int) -> Tensor:
    """[count, num_heads, D]: queries of rows, new keys of tokens, or a pool of slots."""
    return _numbers(count, num_heads, head_dim, dtype=dtype)


def _store_kv(dtype: torch.dtype, head_dim: int) -> None:
    new, pool = (_heads(count, NUM_KV_HEADS, dtype, head_dim) for count in (2, NUM_SLOTS))
    kernels.store_kv(new, new, pool, pool, _indices(2))


def _compact_kv(dtype: torch.dtype, head_dim: int) -> None:
    source, pool = (_heads(NUM_SLOTS, NUM_KV_HEADS, dtype, head_dim) for _ in range(2))
    chosen = _indices(2, NUM_KV_HEADS, LISTED)
    kernels.compact_kv(source, source, chosen, pool, pool, chosen)


def _store_sketch(dtype: torch.dtype, head_dim: int) -> None:
    kernels.store_sketch(_heads(2, NUM_KV_HEADS, dtype, head_dim), _sketch(head_dim), _indices(2))


def _sketch(head_dim: int) -> KeySketch:
    return KeySketch.empty(NUM_SLOTS, NUM_KV_HEADS, head_dim, "cpu")


def _paged_decode(dtype: torch.dtype, head_dim: int) -> None:
    """Dense and sparse, a list a KV head and a query head; few rows, whose lists are cut, and many, whose are not."""
    pool = _heads(NUM_SLOTS, NUM_KV_HEADS, dtype, head_dim)
    for num_rows, num_lists, num_listed, has_valid, has_left_out in (
        (1, 1, CONTEXT, False, False),
        (64, 1, CONTEXT, True, False),
        (1, NUM_KV_HEADS, LISTED, False, True),
        (64, NUM_KV_HEADS, LISTED, False, True),
        (64, NUM_KV_HEADS, LISTED, True, True),
        (1, NUM_HEADS, LISTED, True, False),
        (64, NUM_HEADS, LISTED, False, False),
    ):
        kernels.paged_decode(
            _heads(num_rows, NUM_HEADS, dtype, head_dim),
            pool,
            pool,
            _indices(num_rows, num_lists, num_listed),
            _flags(num_rows, num_lists, num_listed) if has_valid else None,
            scale=SCALE,
            left_out=LeftOut(_numbers(num_rows, NUM_HEADS), _numbers(num_rows, NUM_KV_HEADS, head_dim))
            if has_left_out
            else None,
        )


def _sketch_scores(dtype: torch.dtype, head_dim: int) -> None:
    for num_rows, num_lists in ((1, NUM_HEADS), (64, NUM_KV_HEADS)):
        query = _heads(num_rows, NUM_HEADS, dtype, head_dim)
        slots = _indices(num_rows, CONTEXT)
        kernels.sketch_scores(query, _sketch(head_dim), slots, _indices(num_rows), num_lists=num_lists, scale=SCALE)


def _sketch_log_sum(dtype: torch.dtype, head_dim: int) -> None:
    for num_rows, num_lists, has_valid in ((1, NUM_KV_HEADS, False), (64, NUM_KV_HEADS, True), (64, NUM_HEADS, True)):
        query = _heads(num_rows, NUM_HEADS, dtype, head_dim)
        slots, valid = _indices(num_rows, num_lists, LISTED), _flags(num_rows, num_lists, LISTED)
        kernels.sketch_log_sum(query, _sketch(head_dim), slots, valid if has_valid else None, scale=SCALE)


def _line_scores(dtype: torch.dtype, head_dim: int) -> None:
    """80 rows by query tile, for choosing and for measuring; then a group a row for choosing."""
    for num_groups in (16, 72):
        kernels.line_scores(
            _heads(80, NUM_HEADS, dtype, head_dim),
            _heads(NUM_SLOTS, NUM_KV_HEADS, dtype, head_dim),
            _indices(CONTEXT),
            _indices(80),
            groups=_indices(80),
            num_groups=num_groups,
            scale=SCALE,
        )


def _token_scores(dtype: torch.dtype, head_dim: int) -> None:
    pool = _heads(NUM_SLOTS, NUM_KV_HEADS, dtype, head_dim)
    for num_rows in (1, 64):
        query = _heads(num_rows, NUM_HEADS, dtype, head_dim)
        kernels.token_scores(query, pool, _indices(CONTEXT), _indices(num_rows), scale=SCALE)


def _sparse_prefill(dtype: torch.dtype, head_dim: int) -> None:
    """A whole chunk, and the few rows that a turn may end on: too few for a tensor core's full tile."""
    pool = _heads(NUM_SLOTS, NUM_KV_HEADS, dtype, head_dim)
    for num_rows in (512, 4):
        num_columns = CONTEXT + num_rows
        kernels.sparse_prefill(
            _heads(num_rows, NUM_HEADS, dtype, head_dim),
            pool,
            pool,
            _indices(num_columns),
            start=CONTEXT,
            tiles=_flags(NUM_HEADS, -(-num_columns // 64)),
            verticals=_flags(NUM_HEADS, num_columns),
            tile_tokens=64,
            dense_last_rows=16,
            scale=SCALE,
        )


def _coverage_threshold(dtype: torch.dtype, head_dim: int) -> None:
    kernels.coverage_threshold(_numbers(NUM_HEADS, CONTEXT), _numbers(NUM_HEADS))


def _mass_per_tile(dtype: torch.dtype, head_dim: int) -> None:
    for less in (_numbers(NUM_HEADS, CONTEXT + 512), None):
        kernels.mass_per_tile(_numbers(NUM_HEADS, 8, CONTEXT + 512), less, start=CONTEXT, tile_tokens=64)


def _mass_outside_tiles(dtype: torch.dtype, head_dim: int) -> None:
    mass, tiles_of = _numbers(NUM_HEADS, 8, CONTEXT + 512), _flags(NUM_HEADS, (CONTEXT + 512) // 64)
    kernels.mass_outside_tiles(mass, tiles_of, start=CONTEXT, tile_tokens=64)


# How the engine calls each operation, in every way that is compiled apart.
CALLS: dict[str, Callable[[torch.dtype, int], None]] = {
    "compact_kv": _compact_kv,
    "coverage_threshold": _coverage_threshold,
    "line_scores": _line_scores,
    "mass_outside_tiles": _mass_outside_tiles,
    "mass_per_tile": _mass_per_tile,
    "paged_decode": _paged_decode,
    "sketch_log_sum": _sketch_log_sum,
    "sketch_scores": _sketch_scores,
    "sparse_prefill": _sparse_prefill,
    "store_kv": _store_kv,
    "store_sketch": _store_sketch,
    "token_scores": _token_scores,
}


class _HopperDriver:
    """As much of a driver as a compilation asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _registers_and_stack(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        said = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found, f"cuobjdump names no registers: {said}"
    return int(found[1]), int(found[2])


def _compiled(op: str, dtype: str, head_dim: int, kernel: JITFunction, named: dict[str, Any], binary: Any) -> Compiled:
    """What is told of `kernel`, called with the arguments `named`, and its binary."""
    registers, spilled_bytes = _registers_and_stack(binary.asm["cubin"])
    return Compiled(
        op=op,
        kernel=_name(kernel),
        dtype=dtype,
        head_dim=head_dim,
        flags={param.name: named[param.name] for param in kernel.params if param.is_constexpr},
        shared_bytes=binary.metadata.shared,
        registers=registers,
        spilled_bytes=spilled_bytes,
        multiplies="tt.dot" in binary.asm["ttir"],
        tensor_cores=[name for name, instruction in TENSOR_CORES.items() if instruction in binary.asm["ptx"]],
    )


def main(models: list[str]) -> None:
    """Print a line for each operation and kernel that `models`, each "dtype/head dim", make compile."""
    assert not tiles.is_interpreted(), "TRITON_INTERPRET is set: nothing would be compiled"
    os.environ["LOOPSERVE_KERNELS"] = "kernel"
    driver.set_active(_HopperDriver())
    # A CPU is said to have few, and then lists would be cut otherwise than on the device. Modules of kernels are not imported yet.
    tiles.num_multiprocessors = lambda device: MULTIPROCESSORS
    compile_or_launch = JITFunction.run
    of_call: dict[str, tuple[JITFunction, dict[str, Any], Any]] = {}  # kernel, its arguments by name, its binary

    def compile_only(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        binary = compile_or_launch(kernel, *args, grid=grid, warmup=True, **named)
        of_call[binary.hash] = kernel, named, binary
        return binary

    JITFunction.run = compile_only
    for model in models:
        dtype, head_dim = model.split("/")
        for op, call in CALLS.items():
            of_call.clear()
            call(getattr(torch, dtype), int(head_dim))
            for kernel, named, binary in of_call.values():
                print(json.dumps(asdict(_compiled(op, dtype, int(head_dim), kernel, named, binary))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
