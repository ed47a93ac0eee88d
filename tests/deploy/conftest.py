"""What the deployment's tests share."""

import pytest


@pytest.fixture
def anyio_backend() -> str:
    """Async tests run on asyncio, as Serve does."""
    return "asyncio"
