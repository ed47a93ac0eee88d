"""What the users of the small clients say: facts, and later questions about them. Runs in any client's environment."""

from __future__ import annotations

FACTS = ("locker", "gate", "badge", "desk", "bus", "room")


def questions(index: int) -> list[tuple[str, str | None]]:
    """What one user says, with the number that the answer should hold."""
    noun, other = FACTS[index % len(FACTS)], FACTS[(index + 1) % len(FACTS)]
    number, second = 1000 + 37 * index, 5000 + 53 * index
    return [
        (f"Remember: {noun} {number}.", None),
        (f"Please note {other} {second}.", None),
        ("It rained all morning, so I stayed at home.", None),
        (f"What is my {noun}?", str(number)),
        (f"What is my {other}?", str(second)),
    ]
