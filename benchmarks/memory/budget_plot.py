"""One picture of one live run: occupancy, budget and turns over one time axis. Knows the samples and nothing of how they came about."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from benchmarks.memory.samples import Sample
from loopserve.config import BLOCK_TOKENS

matplotlib.use("svg")

import itertools

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

_WIDTH, _PANEL_HEIGHT = 9.0, 1.9
_ACTIVE, _IDLE, _LINE = "#4c78a8", "#d6d9de", "#c44e52"


def draw(path: Path, *, title: str, samples: Sequence[Sample]) -> None:
    """Write the picture as SVG; the same samples give the same bytes."""
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "loopserve", "font.size": 8.5, "axes.grid": True})
    plt.rcParams.update({"grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False})
    panels = (_occupancy, _budget, _turns)
    figure, axes = plt.subplots(
        len(panels), 1, sharex=True, figsize=(_WIDTH, _PANEL_HEIGHT * len(panels)), layout="constrained"
    )
    changes = [after.seconds for before, after in itertools.pairwise(samples) if after.phase != before.phase]
    for panel, axis in zip(panels, axes, strict=True):
        panel(axis, samples)
        for at_s in changes:
            axis.axvline(at_s, color=_LINE, linewidth=0.7, linestyle="--")
        axis.legend(loc="upper right", fontsize=7.5, framealpha=0.85, ncols=3)
    axes[0].set_title(title, fontsize=10, loc="left")
    axes[-1].set_xlabel("seconds from the beginning of the load, a point a step (dashed red: the budget was set)")
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)


def _occupancy(axis: Axes, samples: Sequence[Sample]) -> None:
    times = [sample.seconds for sample in samples]
    active = [sample.active_blocks / sample.total_blocks for sample in samples]
    idle = [sample.used_blocks / sample.total_blocks - share for sample, share in zip(samples, active, strict=True)]
    axis.stackplot(times, active, idle, labels=["turns in the batch", "idle sessions"], colors=[_ACTIVE, _IDLE])
    axis.set_ylabel("share of the\ndevice's blocks", fontsize=8)
    axis.set_ylim(0, 1.15)


def _budget(axis: Axes, samples: Sequence[Sample]) -> None:
    times = [sample.seconds for sample in samples]
    axis.step(times, [sample.ceiling_tokens for sample in samples], where="post", color=_LINE, label="ceiling, tokens")
    a_turn = [sample.active_blocks * BLOCK_TOKENS / max(1, sample.running) for sample in samples]
    axis.plot(times, a_turn, color=_ACTIVE, linewidth=0.9, label="on the device, tokens' worth a turn")
    axis.set_ylabel("budget", fontsize=8)
    axis.set_ylim(0, 1.35 * max([*a_turn, *(sample.ceiling_tokens for sample in samples)]))


def _turns(axis: Axes, samples: Sequence[Sample]) -> None:
    times = [sample.seconds for sample in samples]
    axis.plot(times, [sample.running for sample in samples], color=_ACTIVE, linewidth=0.9, label="in the batch")
    axis.plot(times, [sample.waiting for sample in samples], color=_LINE, linewidth=0.9, label="waiting")
    axis.plot(times, [sample.decoded for sample in samples], color="#6b6b6b", linewidth=0.5, label="decoding")
    axis.set_ylabel("turns", fontsize=8)
    axis.set_ylim(0, 1.35 * max(1, *(sample.running for sample in samples)))
