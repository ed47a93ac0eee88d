"""Every registered method can be called as its protocol says."""

import inspect

import pytest

from loopserve.config import DecodeSparsity, PrefillSparsity
from loopserve.sparsity import DECODE_METHODS, PREFILL_METHODS, DecodeMethod, PrefillMethod


def parameters(function: object) -> list[tuple[str, object, object]]:
    return [(p.name, p.kind, p.annotation) for p in inspect.signature(function).parameters.values()]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PREFILL_METHODS)
def test_prefill_methods_keep_to_their_protocol(name: str):
    method = PREFILL_METHODS[name]
    assert parameters(type(method).choose) == parameters(PrefillMethod.choose)
    assert isinstance(method.reads_mass, bool)


@pytest.mark.parametrize("name", DECODE_METHODS)
def test_decode_methods_keep_to_their_protocol(name: str):
    method = DECODE_METHODS[name]
    assert parameters(type(method).choose) == parameters(DecodeMethod.choose)
    assert parameters(type(method).choice_due) == parameters(DecodeMethod.choice_due)
    assert method.choice_due(1, DecodeSparsity())  # nothing can be read before a first choice


def test_the_default_methods_are_registered():
    assert PrefillSparsity().method in PREFILL_METHODS
    assert DecodeSparsity().method in DECODE_METHODS
