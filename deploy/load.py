"""How loaded this replica is, in seconds: what a new turn would wait, what a token of prefill costs. Fed by the engine, for routers.

A stats sink (floor 0's protocol): called on the engine thread, read on the event loop. Every field is one assignment, so no lock is needed.
"""

from collections.abc import Sequence

from loopserve.stats import StatsSink, StepStats, TurnStats

_SMOOTHING = 0.2  # weight of the newest of an exponential average: the last five or so count
_PREFILL_TOKENS_MIN = 32  # steps with fewer prefill rows measure decode, not prefill


class LoadMeter:
    """Keeps running means, and passes everything on to `sinks`."""

    def __init__(self, sinks: Sequence[StatsSink] = (), *, max_running_turns: int) -> None:
        self._sinks = tuple(sinks)
        self._max_running_turns = max_running_turns
        self.num_running = 0
        self.num_waiting = 0
        self.prefill_s_per_token = 0.0  # 0 until measured
        self.service_s = 0.0  # of one turn, without its wait; 0 until measured
        self.waited_s = 0.0  # by the turns that were admitted last

    @property
    def queue_s(self) -> float:
        """What a turn that arrives now would wait while others do.

        The greater of two: by Little's law, those for whom the batch has no place over the turns that a full batch ends a second; and
        what the last turns did wait, which also sees a batch that memory keeps from being full. A burst on an idle replica is neither.
        """
        if self.num_waiting == 0:
            return 0.0
        without_place = self.num_running + self.num_waiting - self._max_running_turns
        return max(self.waited_s, without_place * self.service_s / self._max_running_turns)

    def on_step(self, stats: StepStats) -> None:
        """A step was computed."""
        self.num_running, self.num_waiting = stats.num_running, stats.num_waiting
        if stats.num_prefill_tokens >= _PREFILL_TOKENS_MIN:
            self.prefill_s_per_token = _mean(self.prefill_s_per_token, stats.duration_s / stats.num_prefill_tokens)
        for sink in self._sinks:
            sink.on_step(stats)

    def on_turn(self, stats: TurnStats) -> None:
        """A turn ended."""
        if stats.queue_s is not None:
            self.service_s = _mean(self.service_s, max(0.0, stats.total_s - stats.queue_s))
            self.waited_s = _mean(self.waited_s, stats.queue_s)
        for sink in self._sinks:
            sink.on_turn(stats)


def _mean(old: float, new: float) -> float:
    return new if old == 0.0 else old + _SMOOTHING * (new - old)
