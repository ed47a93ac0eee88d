"""What holds for every test: no network, no accelerator where there is none, the cluster tests last."""

import os

import pytest
from hypothesis import settings

# Read by libraries when they are first imported, and inherited by the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# A time limit per example would make a busy machine fail what is right.
settings.register_profile("loopserve", deadline=None)
settings.load_profile("loopserve")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs CUDA where there is none, and run what starts a cluster after all that does not."""
    items.sort(key=lambda item: item.get_closest_marker("serve") is not None)
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))
