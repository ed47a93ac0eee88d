"""Tiny random models, built once a session, and engines over them that a test drives step by step."""

import functools

import pytest
import torch
from fake_device import Inbox, StatsLog
from tiny_models import FAMILIES, loaded_model, reference_model

from loopserve.config import DecodeSparsity, EngineConfig, PrefillSparsity
from loopserve.engine import Engine


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny tensors gain nothing from more, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    """Each served family."""
    return request.param


_reference = functools.cache(reference_model)
_loaded = functools.cache(loaded_model)


@pytest.fixture(scope="session")
def reference():
    """The stock model of a family."""
    return _reference


@pytest.fixture
def engine():
    """Build an engine over a tiny model, with its inbox and stats; checked for lost blocks at the end."""
    built: list[Engine] = []

    def build(family: str = "llama", **overrides) -> tuple[Engine, Inbox, StatsLog]:
        settings = {
            "kv_blocks": 128,
            "max_step_prefill_tokens": 64,
            "prefill": PrefillSparsity(chunk_tokens=32),
            "decode": DecodeSparsity(budget_tokens=64, budget_floor_tokens=1),
        }
        stats = StatsLog()
        built.append(Engine(EngineConfig(**(settings | overrides)), loaded=_loaded(family), stats=stats))
        return built[-1], Inbox(), stats

    yield build
    for each in built:
        each.check()
