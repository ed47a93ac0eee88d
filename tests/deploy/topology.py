"""In which topology this run deploys the application. test_direct.py starts a run in the other one, in a network of its own."""

import os

import pytest

VARIABLE = "DEPLOY_TESTS_TOPOLOGY"
TOPOLOGY = os.environ.get(VARIABLE, "two_hop")

needs_an_ingress = pytest.mark.skipif(
    TOPOLOGY == "direct", reason="promised by the ingress that stands before replicas"
)
needs_direct = pytest.mark.skipif(
    TOPOLOGY != "direct", reason="runs in a network of its own: see inside, in test_direct.py"
)
