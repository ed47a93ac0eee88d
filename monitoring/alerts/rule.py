"""What an alert rule is, and how rules become a Prometheus rule file. Knows nothing about what they watch."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import yaml

RUNBOOK = "docs/runbook.md"  # put a browsable address in front of it with `python -m monitoring.alerts ADDRESS`


class Severity(StrEnum):
    """Who is disturbed."""

    PAGE = "page"  # somebody, now: users notice
    TICKET = "ticket"  # somebody, in working hours


@dataclass(frozen=True, slots=True)
class Rule:
    """One alert. `holds_for` is how long the expression must be true before it fires; `summary` may use labels of the expression."""

    name: str
    severity: Severity
    expression: str
    holds_for: str
    summary: str
    description: str

    def document(self, runbook: str) -> dict[str, Any]:
        """The rule as Prometheus reads it."""
        return {
            "alert": self.name,
            "expr": _Text(self.expression),
            "for": self.holds_for,
            "labels": {"severity": str(self.severity), "service": "loopserve"},
            "annotations": {
                "summary": self.summary,
                "description": self.description,
                "runbook_url": f"{runbook}#{self.name.lower()}",
            },
        }


@dataclass(frozen=True, slots=True)
class Group:
    """Rules that are evaluated together, one after the other."""

    name: str
    rules: tuple[Rule, ...]


def rule_file(groups: tuple[Group, ...], *, runbook: str = RUNBOOK) -> str:
    """The text of a rule file, `groups:` at its top."""
    documents = [{"name": g.name, "rules": [rule.document(runbook) for rule in g.rules]} for g in groups]
    return yaml.dump({"groups": documents}, Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True)


class _Text(str):
    """Written as a block, so that a long expression stays as it is."""


class _Dumper(yaml.SafeDumper):
    """Lists are indented under their key."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _block(dumper: yaml.SafeDumper, text: _Text) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", str(text), style="|" if "\n" in text else None)


_Dumper.add_representer(_Text, _block)
