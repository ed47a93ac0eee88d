"""The alert rules, made into `loopserve.rules.yaml` by `python -m monitoring.alerts`, which is committed beside them with its tests.

Hand-offs between replicas are not watched: one that fails costs its session a computation, and nobody an answer.
"""

from pathlib import Path

from monitoring.alerts.pages import PAGES
from monitoring.alerts.rule import Group
from monitoring.alerts.tickets import TICKETS

GROUPS: tuple[Group, ...] = (*PAGES, *TICKETS)
RULES_PATH = Path(__file__).parent / "loopserve.rules.yaml"
RULE_TESTS_PATH = Path(__file__).parent / "loopserve.rules.test.yaml"  # promtool test rules
