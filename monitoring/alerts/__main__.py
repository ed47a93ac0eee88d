"""Write the rule file: `python -m monitoring.alerts [RUNBOOK_ADDRESS]`. With an address, print it with links to there instead."""

import sys

from monitoring.alerts import GROUPS, RULES_PATH
from monitoring.alerts.rule import rule_file

if len(sys.argv) > 1:
    print(rule_file(GROUPS, runbook=sys.argv[1]), end="")
else:
    RULES_PATH.write_text(rule_file(GROUPS), encoding="utf-8")
