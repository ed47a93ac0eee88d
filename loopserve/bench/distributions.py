"""Distributions of lengths, turns and pauses, written as one word: how to read such a word, and how to draw from it. Knows no load.

    constant:5  or  5            always 5
    uniform:40..200              anything between, both ends included
    exponential:50[..400]        mean 50; what lies above 400 becomes 400
    lognormal:120,0.6[..800]     median 120, standard deviation of the logarithm 0.6; what lies above 800 becomes 800

The last two are cut at 10 times the mean or median where no end is given: everything that is drawn has a limit.
"""

import math
import random
import re
from dataclasses import dataclass
from enum import StrEnum

from loopserve.errors import InvalidRequest

TAIL = 10.0
_NUMBER = r"\d+(?:\.\d+)?"
_GRAMMAR = re.compile(rf"(?:([a-z]+):)?({_NUMBER})(?:,({_NUMBER}))?(?:\.\.({_NUMBER}))?")


class Shape(StrEnum):
    """How draws are spread."""

    CONSTANT = "constant"
    UNIFORM = "uniform"
    EXPONENTIAL = "exponential"
    LOGNORMAL = "lognormal"


@dataclass(frozen=True, slots=True)
class Distribution:
    """Draws between 0 and `high`. `centre` is the value, the lower end, the mean or the median, as the shape has it."""

    shape: Shape
    centre: float
    high: float
    sigma: float = 0.0  # of the logarithm; lognormal only

    @classmethod
    def constant(cls, value: float) -> "Distribution":
        """Always `value`."""
        return cls(Shape.CONSTANT, value, value)

    @classmethod
    def parse(cls, text: str, *, name: str = "distribution") -> "Distribution":
        """Read a word of the grammar above. Raises InvalidRequest naming the option `name` and what would be right."""
        found = _GRAMMAR.fullmatch(text.strip())
        shape = found[1] or Shape.CONSTANT.value if found else ""
        if found is None or shape not in set(Shape):
            raise InvalidRequest(
                f"{name}: {text!r} is no distribution; write 5, constant:5, uniform:40..200, exponential:50 or lognormal:120,0.6 "
                "(the last two with ..MAX if you like)",
                param=name,
            )
        first, sigma, high = (None if number is None else float(number) for number in found.group(2, 3, 4))
        assert first is not None
        return cls._checked(Shape(shape), first, sigma, high, text=text, name=name)

    @classmethod
    def _checked(
        cls, shape: Shape, first: float, sigma: float | None, high: float | None, *, text: str, name: str
    ) -> "Distribution":
        wrong = None
        if (sigma is not None) != (shape is Shape.LOGNORMAL):
            wrong = "lognormal needs MEDIAN,SIGMA, and no other shape has a comma"
        elif (high is None and shape is Shape.UNIFORM) or (high is not None and shape is Shape.CONSTANT):
            wrong = "uniform needs LOW..HIGH, and constant is one number"
        elif high is not None and high < first:
            wrong = f"{high:g} is less than {first:g}"
        elif sigma is not None and sigma > 5:
            wrong = "a sigma above 5 spreads over six orders of magnitude"
        if wrong is not None:
            raise InvalidRequest(f"{name}: {text!r}: {wrong}", param=name)
        end = high if high is not None else first * (1 if shape is Shape.CONSTANT else TAIL)
        return cls(shape, first, end, sigma or 0.0)

    def draw(self, rng: random.Random) -> float:
        """One value."""
        match self.shape:
            case Shape.CONSTANT:
                return self.centre
            case Shape.UNIFORM:
                return rng.uniform(self.centre, self.high)
            case Shape.EXPONENTIAL:
                return min(rng.expovariate(1 / self.centre), self.high) if self.centre else 0.0
            case Shape.LOGNORMAL:
                return min(rng.lognormvariate(math.log(self.centre), self.sigma), self.high) if self.centre else 0.0

    def draw_whole(self, rng: random.Random, *, least: int) -> int:
        """One whole number, at least `least`; a uniform one is as likely at its ends as between."""
        if self.shape is Shape.UNIFORM:
            return max(least, rng.randint(round(self.centre), round(self.high)))
        return max(least, round(self.draw(rng)))

    def __str__(self) -> str:
        match self.shape:
            case Shape.CONSTANT:
                return f"constant:{self.centre:g}"
            case Shape.LOGNORMAL:
                return f"lognormal:{self.centre:g},{self.sigma:g}..{self.high:g}"
            case _:
                return f"{self.shape}:{self.centre:g}..{self.high:g}"
