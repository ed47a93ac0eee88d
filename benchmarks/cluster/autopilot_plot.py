"""One picture of one live run: stacked panels over one time axis. Knows the recording and nothing of how it came about."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

from benchmarks.cluster.autopilot_load import Phases
from benchmarks.cluster.autopilot_record import Limits, Moments, Recording

matplotlib.use("svg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

_WIDTH, _PANEL_HEIGHT = 9.0, 1.75
_SHADES = {"active": "#4c78a8", "shared": "#72b7b2", "warm": "#d6d9de"}
_LINE, _OTHER, _LIMIT = "#c44e52", "#6b6b6b", "#b0a040"


def draw(
    path: Path,
    *,
    title: str,
    recording: Recording,
    moments: Moments,
    phases: Phases,
    limits: Limits,
    outage: tuple[float, float] | None,
    without: Recording | None,
) -> None:
    """Write the picture as SVG. `without`: the same load without the autopilot, drawn thinly beside it."""
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "loopserve", "font.size": 8.5, "axes.grid": True})
    plt.rcParams.update({"grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False})
    panels = (_occupancy, _budget, _replicas, _turns, _first_token, _gap)
    figure, axes = plt.subplots(
        len(panels), 1, sharex=True, figsize=(_WIDTH, _PANEL_HEIGHT * len(panels)), layout="constrained"
    )
    for panel, axis in zip(panels, axes, strict=True):
        panel(axis, recording, without)
        axis.axvspan(phases.base_s, phases.base_s + phases.high_s, color="#f3e9dc", zorder=0)
        if outage is not None:
            axis.axvspan(*outage, color="#cfcfcf", zorder=0.5)
        for at_s, style in ((moments.crossed_s, "-"), (moments.tightened_s, "--")):
            if at_s is not None:
                axis.axvline(at_s, color=_LINE, linewidth=0.7, linestyle=style)
        axis.legend(loc="upper right", fontsize=7.5, framealpha=0.85, ncols=2)
    axes[0].axhline(limits.high_ratio, color=_LIMIT, linewidth=0.9, linestyle=":")
    axes[0].text(1, limits.high_ratio + 0.03, f"threshold {limits.high_ratio:.0%}", color=_LIMIT, fontsize=7.5)
    axes[0].set_title(title, fontsize=10, loc="left")
    axes[1].text(
        phases.base_s + phases.high_s / 2,
        1.02,
        f"{phases.factor} times the load",
        fontsize=7.5,
        ha="center",
        transform=axes[1].get_xaxis_transform(),
    )
    if outage is not None:
        axes[2].text(outage[0] + 1, 0.2, "Prometheus stopped", fontsize=7.5)
    axes[-1].set_xlabel(
        "seconds from the beginning of the load (solid red: threshold crossed, dashed red: budget tightened)"
    )
    axes[-1].set_xlim(0, len(recording) - 1)
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)


def _occupancy(axis: Axes, recording: Recording, without: Recording | None) -> None:
    times = range(len(recording))
    filled = [[0.0 if math.isnan(value) else value for value in recording[kind]] for kind in _SHADES]
    axis.stackplot(
        times, *filled, labels=[f"{kind} bytes" for kind in _SHADES], colors=list(_SHADES.values()), alpha=0.8
    )
    axis.plot(times, recording["compressed"], color=_LINE, linewidth=1.6, label="working sets (compressed)")
    axis.plot(times, recording["full"], color="black", linewidth=0.8, linestyle="--", label="at the full budget")
    _label(axis, "share of the\nready pools")
    highest = max((value for value in recording["full"] if not math.isnan(value)), default=1.0)
    axis.set_ylim(0, max(1.15, min(2.5, highest * 1.1)))


def _budget(axis: Axes, recording: Recording, without: Recording | None) -> None:
    axis.step(range(len(recording)), recording["ceiling"], where="post", color=_LINE, label="lowest ceiling in force")
    axis.set_yscale("log", base=2)
    highest = max((value for value in recording["budget_max"] if not math.isnan(value)), default=2048.0)
    axis.set_yticks([highest / 2**k for k in range(5)], labels=[f"{highest / 2**k:.0f}" for k in range(5)])
    axis.set_ylim(highest / 2**4.4, highest * 2**1.6)  # room for the legend
    _label(axis, "budget ceiling,\ntokens")


def _replicas(axis: Axes, recording: Recording, without: Recording | None) -> None:
    times = range(len(recording))
    axis.step(times, recording["ready"], where="post", color=_SHADES["active"], linewidth=1.6, label="ready")
    axis.step(times, recording["wanted"], where="post", color=_LINE, linewidth=0.9, linestyle="--", label="wanted")
    axis.set_ylim(0, max(2.0, *(value for value in recording["ready"] if not math.isnan(value))) + 1.2)
    _label(axis, "replicas")


def _turns(axis: Axes, recording: Recording, without: Recording | None) -> None:
    times = range(len(recording))
    axis.plot(times, recording["running"], color=_SHADES["active"], label="in a batch")
    axis.plot(times, recording["waiting"], color=_LINE, label="waiting")
    axis.plot(times, recording["failed"], color="black", linewidth=1.6, label="failed so far")
    if without is not None:
        axis.plot(range(len(without)), without["waiting"], color=_OTHER, linewidth=0.8, label="waiting, no autopilot")
    _label(axis, "turns")


def _first_token(axis: Axes, recording: Recording, without: Recording | None) -> None:
    _with_and_without(axis, "ttft_p95_s", recording, without)
    _label(axis, "p95 time to first\ntoken, s")


def _gap(axis: Axes, recording: Recording, without: Recording | None) -> None:
    _with_and_without(axis, "gap_mean_s", recording, without, factor=1e3)
    _label(axis, "between two\ntokens, mean, ms")


def _with_and_without(
    axis: Axes, name: str, recording: Recording, without: Recording | None, *, factor: float = 1.0
) -> None:
    axis.plot(range(len(recording)), _scaled(recording[name], factor), color=_SHADES["active"], label="this run")
    if without is not None:
        axis.plot(
            range(len(without)), _scaled(without[name], factor), color=_OTHER, linewidth=0.8, label="without autopilot"
        )


def _scaled(values: Sequence[float], factor: float) -> list[float]:
    return [value * factor for value in values]


def _label(axis: Axes, text: str) -> None:
    axis.set_ylabel(text, fontsize=8)
    axis.set_ylim(bottom=None if axis.get_yscale() == "log" else 0)
