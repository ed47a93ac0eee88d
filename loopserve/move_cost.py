"""How long it takes to bring KV from somewhere else, as measured: beside the time to compute it again, that decides. Host only, pure."""

_SMALL_BYTES = 1 << 20  # a move of less measures what moves cost at all
_TRUSTED_BYTES = 64 << 20  # a move of so much counts as much as all before it
_FIXED_WEIGHT = 0.2  # of the newest small move


class MoveCost:
    """A running estimate of how long moves take: something for each, and something for each byte.

    By the bytes, so that many small moves do not drown what one large one tells; a large one never counts more than all before it.
    """

    def __init__(self, *, fixed_s: float, seconds_per_byte: float) -> None:
        """What is assumed until moves were measured."""
        self.fixed_s = fixed_s
        self.seconds_per_byte = seconds_per_byte

    def measured(self, num_bytes: int, seconds: float) -> None:
        """So many bytes took so long."""
        if num_bytes < _SMALL_BYTES:
            self.fixed_s += _FIXED_WEIGHT * (seconds - self.fixed_s)
            return
        weight = min(0.5, num_bytes / (num_bytes + _TRUSTED_BYTES))
        rate = max(0.0, seconds - self.fixed_s) / num_bytes
        self.seconds_per_byte += weight * (rate - self.seconds_per_byte)

    def seconds(self, num_bytes: int) -> float:
        """How long a move of so much will take."""
        return self.fixed_s + num_bytes * self.seconds_per_byte
