"""Every kernel compiles for Hopper, and fits it. No device is needed: `compiled.py` only compiles, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loopserve import kernels

ROOT = Path(__file__).resolve().parents[2]
OPS = {path.parent.name for path in Path(kernels.__file__).parent.glob("*/kernel.py")}
MODELS = ("bfloat16/128", "bfloat16/64", "float16/128", "float32/128")  # dtype and head dim
SHARED_BYTES_MAX = 227 * 1024  # of a block, compute capability 9.0

triton = pytest.importorskip("triton", reason="Triton is not installed: NO KERNEL WAS COMPILED")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set, which replaces the compiler", allow_module_level=True)
if os.environ.get("LOOPSERVE_TEST_DEVICE", "cpu") != "cpu":
    pytest.skip("a device under test compiles the kernels by itself", allow_module_level=True)
try:
    _ = triton.knobs.nvidia.ptxas, triton.knobs.nvidia.cuobjdump
except RuntimeError as error:
    pytest.skip(f"Triton has no assembler for NVIDIA ({error}): NO KERNEL WAS COMPILED", allow_module_level=True)


@pytest.fixture(scope="module", params=MODELS)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the compiler made of every operation for one model: `compiled.Compiled` as it was printed."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    program = [sys.executable, "-m", "tests.kernels.compiled", request.param]
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_of_every_operation_compiles(compiled: list[dict[str, Any]]):
    from tests.kernels.compiled import launched_kernels

    assert {line["op"] for line in compiled} == OPS, "`compiled.CALLS` names every operation"
    assert {line["kernel"] for line in compiled} == launched_kernels(), "`compiled.CALLS` reaches every kernel"


def test_no_kernel_asks_for_more_shared_memory_than_there_is(compiled: list[dict[str, Any]]):
    too_large = [line for line in compiled if line["shared_bytes"] > SHARED_BYTES_MAX]
    assert not too_large, f"{too_large}"


def test_registers_do_not_spill_in_16_bits(compiled: list[dict[str, Any]]):
    spilling = [line for line in compiled if line["dtype"] != "float32" and line["spilled_bytes"]]
    assert not spilling, f"{spilling}"


def test_products_in_16_bits_run_on_tensor_cores(compiled: list[dict[str, Any]]):
    products = [line for line in compiled if line["multiplies"]]
    assert {"paged_decode", "sparse_prefill", "line_scores", "token_scores"} <= {line["op"] for line in products}
    elsewhere = [line for line in products if line["dtype"] != "float32" and not line["tensor_cores"]]
    assert not elsewhere, f"{elsewhere}"
