"""Which implementation runs where."""

import importlib
import importlib.util
import inspect
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loopserve import kernels
from loopserve.kernels import KeySketch, LeftOut, dispatch
from tests.kernels.conftest import DEVICE


@pytest.fixture(autouse=True)
def fresh_decisions():
    dispatch.implementation.cache_clear()
    yield
    dispatch.implementation.cache_clear()


OPS = sorted(path.parent.name for path in Path(kernels.__file__).parent.glob("*/reference.py"))


@pytest.mark.parametrize("op", OPS)
def test_a_cpu_runs_the_reference_and_says_so_once(
    op: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("LOOPSERVE_KERNELS", raising=False)
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        chosen = dispatch.implementation(op, "cpu")
        assert dispatch.implementation(op, "cpu") is chosen
    assert chosen.__module__ == f"loopserve.kernels.{op}.reference"
    assert [r.message for r in caplog.records] == [f"{op} runs as its reference: the device is 'cpu'"]


def test_the_environment_rules_kernels_out(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOOPSERVE_KERNELS", "reference")
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        assert dispatch.implementation("store_kv", "cuda").__module__.endswith("reference")
    assert "LOOPSERVE_KERNELS" in caplog.text


def test_cuda_runs_the_kernel_where_triton_is_there_to_compile_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("LOOPSERVE_KERNELS", raising=False)
    assert dispatch.implementation("store_kv", "cuda").__module__.endswith("kernel")
    dispatch.implementation.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert dispatch.implementation("store_kv", "cuda").__module__.endswith("reference")


def test_the_environment_forces_kernels_on_a_cpu_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOOPSERVE_KERNELS", "kernel")
    assert dispatch.implementation("store_kv", "cpu").__module__.endswith("kernel")


@pytest.mark.parametrize("op", OPS)
def test_a_kernel_takes_what_its_reference_takes(op: str):
    reference, kernel = (
        getattr(importlib.import_module(f"loopserve.kernels.{op}.{part}"), op) for part in ("reference", "kernel")
    )
    assert inspect.signature(kernel) == inspect.signature(reference)


class Launches(TorchDispatchMode):
    """Names of what torch itself runs meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "lift_fresh")


def test_the_kernels_of_a_decode_step_can_be_captured(monkeypatch: pytest.MonkeyPatch):
    """A CUDA graph holds no number that the host read, no size that depends on one, and no tensor made from a Python list."""
    if DEVICE == "cpu" and not pytest.importorskip("triton").knobs.runtime.interpret:
        pytest.skip("nothing runs kernels on a CPU unless TRITON_INTERPRET=1 is set")
    monkeypatch.setenv("LOOPSERVE_KERNELS", "kernel")
    query, key, slots = torch.randn(2, 4, 16), torch.randn(2, 2, 16), torch.tensor([3, 5])
    pool, sketch = torch.randn(8, 2, 16), KeySketch.empty(8, 2, 16, query.device)
    listed, valid = torch.randint(8, (2, 2, 400)), torch.rand(2, 2, 400) < 0.9
    left_out, lengths = LeftOut(torch.zeros(2, 4), torch.randn(2, 2, 16)), torch.tensor([400, 7])
    chosen = torch.tensor([[[0, -1], [1, -1]]])
    places = chosen + 4
    with Launches() as launches:
        kernels.compact_kv(pool, pool, chosen, pool, pool, places)
        kernels.store_kv(key, key, pool, pool.clone(), slots)
        kernels.store_sketch(key, sketch, slots)
        kernels.sketch_scores(query, sketch, listed[:, 0], lengths, num_lists=2, scale=0.3)
        kernels.sketch_log_sum(query, sketch, listed, valid, scale=0.3)
        kernels.paged_decode(query, pool, pool, listed, valid, scale=0.3, left_out=left_out)
    assert not [name for name in launches.names if any(wait in name for wait in WAITS)]
    assert launches.names, "outputs are made by torch, so the mode saw something"
