"""Whether bringing KV is quicker than computing it again: what was measured of both, and the length at which they meet. Host only, pure."""

_WEIGHT = 0.2  # of the newest measurement: five or so decide


class BreakEven:
    """A running estimate of what it takes to bring bytes from somewhere. Not exact: one number for all sizes beyond a fixed part."""

    def __init__(self, *, fixed_s: float, seconds_per_byte: float) -> None:
        """What is assumed until something was measured."""
        self._fixed_s = fixed_s
        self._seconds_per_byte = seconds_per_byte

    def measured(self, num_bytes: int, seconds: float) -> None:
        """So much took so long."""
        if num_bytes > 0:
            rate = max(0.0, seconds - self._fixed_s) / num_bytes
            self._seconds_per_byte += _WEIGHT * (rate - self._seconds_per_byte)

    def bring_s(self, num_bytes: int) -> float:
        """How long it will take to bring so much."""
        return self._fixed_s + num_bytes * self._seconds_per_byte

    def pays(self, num_bytes: int, *, num_tokens: int, prefill_s_per_token: float) -> bool:
        """Whether it is quicker than to compute so many tokens again; without a measured speed of computing it is taken to be."""
        return prefill_s_per_token <= 0.0 or self.bring_s(num_bytes) < num_tokens * prefill_s_per_token

    def crossover_tokens(self, bytes_per_token: float, prefill_s_per_token: float) -> float:
        """From how many tokens on it is quicker; infinite where it never is."""
        gain = prefill_s_per_token - bytes_per_token * self._seconds_per_byte
        return self._fixed_s / gain if gain > 0 else float("inf")
