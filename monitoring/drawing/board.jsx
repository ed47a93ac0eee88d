// One board as Grafana lays it out, drawn with Grafana's own components from answers of Prometheus that the page was given.
// window.BOARD: { width, from, to (ms), title, panels: [{ ...panel of the dashboard's JSON, series: [{ refId, name, points: [[ms, value]] }] }] }

import { createDataFrame, createTheme, dateTime, FieldType, getDisplayProcessor, ThemeContext, EventBusSrv } from '@grafana/data';
import { BarGauge, BigValue, GlobalStyles, PanelContextProvider, TimeSeries } from '@grafana/ui';
import { createRoot } from 'react-dom/client';

const COLUMNS = 24;
const ROW_HEIGHT = 30;
const GAP = 8;
const TITLE_HEIGHT = 32;
const PADDING = 8;
const BAR_GAP = 6;

const theme = createTheme({ colors: { mode: 'dark' } });

// The configuration of one series: the panel's defaults, then the overrides that name it.
function configOf(panel, name) {
  const { defaults, overrides } = panel.fieldConfig;
  const config = { ...defaults, custom: { ...defaults.custom } };
  for (const { matcher, properties } of overrides) {
    if (matcher.id === 'byName' && matcher.options === name) {
      for (const { id, value } of properties) {
        if (id.startsWith('custom.')) {
          config.custom[id.slice('custom.'.length)] = value;
        } else {
          config[id] = value;
        }
      }
    }
  }
  return { ...config, displayName: name };
}

function rangeOf(values) {
  const known = values.filter((value) => value !== null);
  const [min, max] = [Math.min(...known), Math.max(...known)];
  return { min, max, delta: max - min };
}

function frameOf(panel, series, index) {
  const frame = createDataFrame({
    refId: series.refId,
    fields: [
      { name: 'Time', type: FieldType.time, values: series.points.map(([at]) => at) },
      { name: series.name, type: FieldType.number, values: series.points.map(([, value]) => value), config: configOf(panel, series.name) },
    ],
  });
  for (const field of frame.fields) {
    field.state = { seriesIndex: index, displayName: field === frame.fields[0] ? 'Time' : series.name, range: rangeOf(field.values) };
    field.display = getDisplayProcessor({ field, theme, timeZone: 'utc' });
  }
  return frame;
}

const lastOf = (points) => points.map(([, value]) => value).filter((value) => value !== null).at(-1) ?? null;

function Lines({ panel, width, height, board }) {
  const timeRange = { from: dateTime(board.from), to: dateTime(board.to), raw: { from: 'now-5m', to: 'now' } };
  return (
    <TimeSeries
      frames={panel.series.map((series, index) => frameOf(panel, series, index))}
      structureRev={1}
      timeRange={timeRange}
      timeZone="utc"
      width={width}
      height={height}
      legend={panel.options.legend}
      options={panel.options}
    />
  );
}

function Numbers({ panel, width, height }) {
  const each = width / panel.series.length;
  return panel.series.map((series, index) => {
    const frame = frameOf(panel, series, index);
    const field = frame.fields[1];
    const value = field.display(lastOf(series.points));
    const byName = panel.options.textMode === 'name';
    const shown = byName ? { ...value, text: series.name, prefix: '', suffix: '' } : value;
    const sparkline = panel.options.graphMode === 'area' ? { y: field, x: frame.fields[0] } : undefined;
    return (
      <BigValue
        key={index}
        value={{ ...shown, title: '' }}
        sparkline={sparkline}
        colorMode={panel.options.colorMode}
        graphMode={panel.options.graphMode}
        justifyMode={panel.options.justifyMode}
        textMode="value"
        width={each}
        height={height}
        theme={theme}
      />
    );
  });
}

function Bars({ panel, width, height }) {
  const values = panel.series.map((series) => lastOf(series.points));
  const each = height / panel.series.length;
  return panel.series.map((series, index) => {
    const field = { name: series.name, type: FieldType.number, values: [], config: { ...configOf(panel, series.name), max: Math.max(...values) } };
    const display = getDisplayProcessor({ field, theme });
    return (
      <div key={index} style={{ marginBottom: BAR_GAP }}>
        <BarGauge
        value={{ ...display(values[index]), title: series.name }}
        display={display}
        field={field.config}
        orientation="horizontal"
        displayMode={panel.options.displayMode}
        valueDisplayMode={panel.options.valueMode}
        showUnfilled={panel.options.showUnfilled}
        alignmentFactors={{ title: 'wwwwww', text: '0000 MiB' }}
        text={{ titleSize: 13, valueSize: 14 }}
        width={width}
        height={each - BAR_GAP}
        theme={theme}
        />
      </div>
    );
  });
}

const DRAW = { timeseries: Lines, stat: Numbers, bargauge: Bars };

function Panel({ panel, board }) {
  const column = board.width / COLUMNS;
  const place = {
    position: 'absolute',
    left: panel.gridPos.x * column + GAP / 2,
    top: panel.gridPos.y * ROW_HEIGHT + GAP / 2,
    width: panel.gridPos.w * column - GAP,
    height: panel.gridPos.h * ROW_HEIGHT - GAP,
  };
  if (panel.type === 'row') {
    return <div style={{ ...place, lineHeight: `${place.height}px`, fontWeight: 500, fontSize: 14, color: theme.colors.text.primary }}>{panel.title}</div>;
  }
  const Draw = DRAW[panel.type];
  const box = { background: theme.colors.background.primary, border: `1px solid ${theme.colors.border.weak}`, borderRadius: 2 };
  const title = { height: TITLE_HEIGHT, lineHeight: `${TITLE_HEIGHT}px`, padding: `0 ${PADDING}px`, fontSize: 13, fontWeight: 500, whiteSpace: 'nowrap', overflow: 'hidden' };
  const size = { width: place.width - 2 * PADDING - 2, height: place.height - TITLE_HEIGHT - PADDING - 2 };
  const empty = { ...size, display: 'flex', alignItems: 'center', justifyContent: 'center', color: theme.colors.text.secondary, fontSize: 13 };
  return (
    <div style={{ ...place, ...box, color: theme.colors.text.primary }} data-panel={panel.title} data-series={panel.series.length}>
      <div style={title}>{panel.title}</div>
      <div style={{ padding: `0 ${PADDING}px ${PADDING}px`, ...(panel.type === 'stat' ? { display: 'flex' } : {}) }}>
        {panel.series.length ? <Draw panel={panel} board={board} {...size} /> : <div style={empty}>No data</div>}
      </div>
    </div>
  );
}

function Board({ board }) {
  const rows = Math.max(...board.panels.map(({ gridPos }) => gridPos.y + gridPos.h));
  const context = { eventBus: new EventBusSrv(), eventsScope: 'drawing', canAddAnnotations: () => false };
  return (
    <ThemeContext.Provider value={theme}>
      <GlobalStyles />
      <PanelContextProvider value={context}>
        <div id="board" style={{ position: 'relative', width: board.width, height: rows * ROW_HEIGHT + GAP, background: theme.colors.background.canvas }}>
          {board.panels.map((panel) => (
            <Panel key={panel.id} panel={panel} board={board} />
          ))}
        </div>
      </PanelContextProvider>
    </ThemeContext.Provider>
  );
}

window.draw = (board) => createRoot(document.getElementById('root')).render(<Board board={board} />);
