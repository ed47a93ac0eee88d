"""The inside of one replica, and how it is built. The one place of `deploy/` that names the real engine; it is imported where it runs."""

import importlib
from typing import Protocol, cast

from deploy.replica import Backend
from loopserve.config import EngineConfig
from loopserve.stats import StatsSink

REAL_BACKEND = "deploy.backend:load_backend"


class BackendFactory(Protocol):
    """Builds a backend in the replica's process. Its engine is not started yet."""

    def __call__(self, config: EngineConfig, stats: StatsSink, *, num_threads: int) -> Backend:
        """Raises UnsupportedModel and ConfigError."""


def load_backend(config: EngineConfig, stats: StatsSink, *, num_threads: int) -> Backend:
    """The real engine and chat service, computing with `num_threads` of the machine's cores. Raises UnsupportedModel and ConfigError."""
    import torch

    from loopserve.chat import ChatService
    from loopserve.engine import Engine

    torch.set_num_threads(num_threads)
    engine = Engine(config, stats=stats)
    return Backend(engine, ChatService(engine))


def resolve_factory(factory: str | BackendFactory) -> BackendFactory:
    """A factory as itself, or from its dotted path `package.module:name`."""
    if not isinstance(factory, str):
        return factory
    module, _, name = factory.partition(":")
    return cast(BackendFactory, getattr(importlib.import_module(module), name))
