"""How a panel and a board look: the one place that speaks Grafana's builder. Boards say what to show in `lines`, `number` and `bars`.

Ids and query letters are given here, in order, so that a board made twice is the same text.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import bargauge, stat, timeseries
from grafana_foundation_sdk.builders import common as shapes
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.builders import prometheus as prom
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from monitoring.catalogue import BUILD_INFO, REPLICA_UP
from monitoring.promql import Scope

HERE = Scope(window="$__rate_interval", job="$job", replica="$replica")
SOURCE = common.DataSourceRef(type_val="prometheus", uid="${datasource}")
TAG = "loopserve"

SECONDS, BYTES, SHARE, COUNT, PER_SECOND = "s", "bytes", "percentunit", "short", "suffix:/s"
TOKENS_PER_SECOND, REQUESTS_PER_SECOND, BYTES_PER_SECOND = "suffix:tok/s", "reqps", "Bps"
_FULL_WIDTH = 24


@dataclass(frozen=True, slots=True)
class Query:
    """One expression and what its series are called; `right` puts them on the right axis with a unit of their own."""

    expression: str
    legend: str
    right_unit: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel of a board, before it has an id."""

    kind: str
    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    width: int
    height: int
    stacked: bool = False
    lowest: float | None = 0.0
    highest: float | None = None
    decimals: int | None = None
    steps: tuple[tuple[float, str], ...] = ()  # from this value on, this colour; below the first: green
    by_name: bool = False  # a number that is told by its series' name
    logarithmic: bool = False  # for latencies, whose median and tail lie orders of magnitude apart


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]

    def __post_init__(self) -> None:
        filled = 0
        for panel in self.panels:
            filled += panel.width
            assert filled <= _FULL_WIDTH, f"{self.title}: {panel.title} goes beyond its line"
            filled %= _FULL_WIDTH
        assert filled == 0, f"{self.title}: the last line has a hole"


@dataclass(frozen=True, slots=True)
class Board:
    """One dashboard. `name` is its file, its picture, and the tail of its uid."""

    name: str
    title: str
    description: str
    rows: tuple[Row, ...]

    @property
    def uid(self) -> str:
        """Stable across Grafanas."""
        return f"loopserve-{self.name}"

    def to_json(self) -> str:
        """The text that Grafana imports."""
        return JSONEncoder(sort_keys=True, indent=2).encode(_built(self)) + "\n"


def lines(title: str, description: str, unit: str, *queries: Query, width: int = 8, **look: Any) -> Panel:
    """Series over time."""
    return Panel("lines", title, description, unit, queries, width, 8, **look)


def number(title: str, description: str, unit: str, *queries: Query, width: int = 4, **look: Any) -> Panel:
    """The last value, large."""
    return Panel("number", title, description, unit, queries, width, 4, **look)


def bars(title: str, description: str, unit: str, *queries: Query, width: int = 8, **look: Any) -> Panel:
    """The present values side by side."""
    return Panel("bars", title, description, unit, queries, width, 8, **look)


def percentiles(make: Callable[[float], str], *shares: float) -> tuple[Query, ...]:
    """One query for each share."""
    return tuple(Query(make(share), f"p{share * 100:g}") for share in shares or (0.5, 0.95, 0.99))


def _built(board: Board) -> dashboard.Dashboard:
    built = (
        build.Dashboard(board.title)
        .uid(board.uid)
        .description(board.description)
        .tags([TAG])
        .time("now-1h", "now")
        .timezone("browser")
        .refresh("10s")
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .link(
            build.DashboardLink("LoopServe").type(dashboard.DashboardLinkType.DASHBOARDS).tags([TAG]).as_dropdown(True)
        )
    )
    for variable in _variables():
        built.with_variable(variable)
    number_of = iter(range(1, 1000))
    for row in board.rows:
        built.with_row(build.Row(row.title).id(next(number_of)))
        for panel in row.panels:
            built.with_panel(_DRAW[panel.kind](panel).id(next(number_of)))
    return built.build()


def _variables() -> list[Any]:
    """Datasource, then which scrape job, then which replicas."""
    chosen = dashboard.VariableOption(text="All", value="$__all")
    job = build.QueryVariable("job").label("Job").query(f"label_values({BUILD_INFO.name}, job)")
    replica = build.QueryVariable("replica").label("Replica")
    replica.query(f'label_values({REPLICA_UP.name}{{job=~"$job"}}, {REPLICA_UP.origin.value})')
    for variable in (job, replica):
        variable.datasource(SOURCE).current(chosen).multi(True).include_all(True).all_value(".+")
        variable.refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(dashboard.VariableSort.ALPHABETICAL_ASC)
    return [build.DatasourceVariable("datasource").label("Data source").type("prometheus"), job, replica]


def _targets(panel: Panel, *, instant: bool) -> list[Any]:
    targets = []
    for letter, query in zip("ABCDEFGHIJ", panel.queries, strict=False):
        target = prom.Dataquery().expr(query.expression).legend_format(query.legend).ref_id(letter).datasource(SOURCE)
        target.format(PromQueryFormat.TIME_SERIES)
        targets.append(target.instant() if instant else target.range())
    return targets


def _dress(drawn: Any, panel: Panel, *, instant: bool) -> Any:
    """What every kind of panel has."""
    drawn.title(panel.title).description(panel.description).datasource(SOURCE).unit(panel.unit)
    drawn.targets(_targets(panel, instant=instant)).span(panel.width).height(panel.height)
    lowest = None if panel.logarithmic else panel.lowest
    for limit, put in ((lowest, drawn.min), (panel.highest, drawn.max), (panel.decimals, drawn.decimals)):
        if limit is not None:
            put(limit)
    steps = [dashboard.Threshold(value=None, color="green")]
    steps += [dashboard.Threshold(value=value, color=color) for value, color in panel.steps]
    return drawn.thresholds(build.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(steps))


def _draw_lines(panel: Panel) -> timeseries.Panel:
    drawn: timeseries.Panel = _dress(timeseries.Panel(), panel, instant=False)
    legend = shapes.VizLegendOptions().display_mode(common.LegendDisplayMode.LIST).show_legend(True)
    drawn.legend(legend.placement(common.LegendPlacement.BOTTOM).calcs([]))
    drawn.tooltip(shapes.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING))
    drawn.color_scheme(build.FieldColor().mode(dashboard.FieldColorModeId.PALETTE_CLASSIC))
    drawn.line_width(1.5).fill_opacity(40 if panel.stacked else 0 if panel.logarithmic else 8).show_points(
        common.VisibilityMode.NEVER
    )
    stacking = common.StackingMode.NORMAL if panel.stacked else common.StackingMode.NONE
    drawn.stacking(shapes.StackingConfig().mode(stacking).group("A"))
    if panel.logarithmic:
        drawn.scale_distribution(shapes.ScaleDistributionConfig().type(common.ScaleDistribution.LOG).log(10))
    if panel.unit == PER_SECOND:
        drawn.axis_soft_max(1)  # or a line of zeros would lie under an axis up to 100
    if panel.steps:
        drawn.thresholds_style(shapes.GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.DASHED))
    for query in panel.queries:
        if query.right_unit:
            right: Mapping[str, Any] = {"custom.axisPlacement": "right", "unit": query.right_unit}
            values = [dashboard.DynamicConfigValue(id_val=name, value=value) for name, value in right.items()]
            drawn.override_by_name(query.legend, values)
    return drawn


def _reduced() -> shapes.ReduceDataOptions:
    return shapes.ReduceDataOptions().calcs(["lastNotNull"]).values(False).fields("")


def _draw_number(panel: Panel) -> stat.Panel:
    drawn: stat.Panel = _dress(stat.Panel(), panel, instant=panel.by_name)
    drawn.reduce_options(_reduced()).color_mode(common.BigValueColorMode.VALUE)
    drawn.graph_mode(common.BigValueGraphMode.NONE if panel.by_name else common.BigValueGraphMode.AREA)
    several = len(panel.queries) > 1
    text = common.BigValueTextMode.VALUE_AND_NAME if several else common.BigValueTextMode.AUTO
    return drawn.text_mode(common.BigValueTextMode.NAME if panel.by_name else text)


def _draw_bars(panel: Panel) -> bargauge.Panel:
    drawn: bargauge.Panel = _dress(bargauge.Panel(), panel, instant=True)
    drawn.reduce_options(_reduced()).orientation(common.VizOrientation.HORIZONTAL)
    drawn.display_mode(common.BarGaugeDisplayMode.BASIC).value_mode(common.BarGaugeValueMode.TEXT)
    return drawn.color_scheme(build.FieldColor().mode(dashboard.FieldColorModeId.THRESHOLDS))


_DRAW: dict[str, Callable[[Panel], Any]] = {"lines": _draw_lines, "number": _draw_number, "bars": _draw_bars}
