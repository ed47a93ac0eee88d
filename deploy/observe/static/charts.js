// @ts-check
// All charts over one time axis: lines, steps and stacked areas by hand in SVG, and one line through all of them.

import { byId, clock, html, number, percent, setText, shortNames, svg } from "./dom.js";
import { SPAN_S } from "./timeline.js";

/** @typedef {import("./timeline.js").Point} Point */
/** @typedef {import("./timeline.js").Timeline} Timeline */

/**
 * One curve of a chart.
 * @typedef {object} Curve
 * @property {string} name
 * @property {"first" | "second"} look `second` is dashed
 * @property {(point: Point) => number | null} value
 * @property {boolean} [steps] the value holds until the next one
 */

/**
 * @typedef {object} Spec
 * @property {string} name
 * @property {number} height
 * @property {number} least the axis ends no lower
 * @property {boolean} [exact] the axis ends at the largest value, not at a round number
 * @property {Curve[]} curves
 * @property {(point: Point) => number} [faults] how many to mark at a point
 */

export const KINDS = ["active", "shared", "warm", "cached", "free"];
const LEFT = 40; // for the numbers of the axis
const RIGHT = 6;
const TOP = 3;

/** @type {Spec[]} */
const CHARTS = [
  {
    name: "Tokens/s", height: 78, least: 10,
    curves: [
      { name: "decode", look: "first", value: (point) => point.tokens_per_s.decode },
      { name: "prefill", look: "second", value: (point) => point.tokens_per_s.prefill },
    ],
  },
  {
    name: "Turns", height: 58, least: 4, faults: (point) => point.failed,
    curves: [
      { name: "running", look: "first", value: (point) => point.running, steps: true },
      { name: "waiting", look: "second", value: (point) => point.waiting, steps: true },
    ],
  },
];
/** @type {Spec[]} */
const ACTUATORS = [
  {
    name: "Budget, tokens", height: 62, least: 64, exact: true,
    curves: [
      { name: "in force", look: "first", value: (point) => point.budget, steps: true },
      { name: "ceiling", look: "second", value: (point) => point.ceiling, steps: true },
    ],
  },
  {
    name: "Replicas", height: 48, least: 2, exact: true,
    curves: [
      { name: "ready", look: "first", value: (point) => point.ready, steps: true },
      { name: "wanted", look: "second", value: (point) => point.wanted, steps: true },
    ],
  },
];

/** Where a time and a value lie in a plot. */
class Scale {
  /**
   * @param {number} end newest time
   * @param {number} width
   * @param {number} height
   * @param {number} top largest value
   */
  constructor(end, width, height, top) {
    this.end = end;
    this.width = Math.max(width - LEFT - RIGHT, 10);
    this.height = height - TOP;
    this.top = top;
  }

  /** @param {number} t */
  x(t) {
    return LEFT + this.width * (1 - Math.min(Math.max((this.end - t) / SPAN_S, 0), 1));
  }

  /** @param {number} value */
  y(value) {
    return TOP + this.height * (1 - value / this.top);
  }

  /** @param {number} x @returns {number} the time there */
  t(x) {
    return this.end - SPAN_S * (1 - Math.min(Math.max((x - LEFT) / this.width, 0), 1));
  }
}

/** A frame with a name, readouts and an empty plot. */
class Chart {
  /** @param {string} name @param {number} height @param {string} label for those who do not see it */
  constructor(name, height, label) {
    this.height = height;
    this.name = html("p", { class: "name" }, html("b", {}, name));
    this.plot = svg("svg", { height, role: "img", "aria-label": label });
    this.root = html("div", { class: "chart" }, this.name, this.plot);
  }

  /**
   * @param {number} width
   * @param {SVGElement[]} parts
   */
  draw(width, parts) {
    this.plot.setAttribute("viewBox", `0 0 ${width} ${this.height}`);
    this.plot.replaceChildren(...parts);
  }
}

/** The panel of all charts. Mutates its own elements only. */
export class Charts {
  /** @param {Timeline} timeline */
  constructor(timeline) {
    this.timeline = timeline;
    this.root = byId("charts");
    /** @type {number | null} the time that was pointed at; null: now */
    this.pointed = null;
    this.note = ""; // while nothing is pointed at
    this.lanes = html("div", { class: "lanes" });
    /** @type {Map<string, Chart>} */
    this.laneOf = new Map();
    this.axis = svg("svg", { height: 18, "aria-hidden": "true" });
    /** @type {{spec: Spec, chart: Chart, readouts: HTMLElement[]}[]} */
    this.curved = [];
    const legend = html("p", { class: "legend" }, html("b", {}, "Pool by kind, by replica"));
    for (const kind of KINDS) legend.append(html("span", {}, html("i", { class: `swatch ${kind}` }), kind));
    this.root.append(...CHARTS.map((spec) => this.curves(spec)), legend, this.lanes,
      ...ACTUATORS.map((spec) => this.curves(spec)), this.axis);
    this.root.addEventListener("pointermove", (event) => this.point(event));
    this.root.addEventListener("pointerleave", () => this.pointAt(null));
    this.root.addEventListener("keydown", (event) => this.press(event));
    new ResizeObserver(() => this.draw()).observe(this.root);
  }

  /** @param {Spec} spec */
  curves(spec) {
    const chart = new Chart(spec.name, spec.height, `${spec.name}: ${spec.curves.map((curve) => curve.name).join(" and ")}`);
    const readouts = spec.curves.map((curve) => {
      const readout = html("output", {}, "–");
      const stroke = html("i", { class: `stroke ${curve.look}${curve.look === "second" ? " dashed" : ""}` });
      chart.name.append(html("span", {}, stroke, `${curve.name} `, readout));
      return readout;
    });
    if (spec.faults) chart.name.append(html("span", {}, html("i", { class: "swatch fault" }), "failed"));
    this.curved.push({ spec, chart, readouts });
    return chart.root;
  }

  /** @param {PointerEvent} event */
  point(event) {
    const box = this.root.getBoundingClientRect();
    this.pointAt(this.scale(1, 1).t(event.clientX - box.left));
  }

  /** @param {KeyboardEvent} event */
  press(event) {
    const step = { ArrowLeft: -5, ArrowRight: 5, PageUp: -60, PageDown: 60 }[event.key];
    if (step === undefined && event.key !== "Escape") return;
    event.preventDefault();
    const end = this.timeline.end;
    const at = step === undefined ? null : Math.min(Math.max((this.pointed ?? end) + step, end - SPAN_S), end);
    this.pointAt(at);
    setText(byId("time-spoken"), this.spoken());
  }

  /** @param {number | null} at */
  pointAt(at) {
    this.pointed = at;
    this.draw();
  }

  /** The numbers at the line, as a sentence. */
  spoken() {
    const point = this.shown();
    if (!point) return "nothing is known of this time";
    const values = this.curved.flatMap(({ spec }) =>
      spec.curves.map((curve) => `${spec.name} ${curve.name} ${number(curve.value(point))}`));
    const pools = Object.entries(point.kv).map(([name, shares]) => `pool of ${name.slice(0, 4)} ${percent(1 - shares[4])} in use`);
    return `${clock(point.t)}: ${[...values, ...pools].join(", ")}`;
  }

  /** @returns {Point | null} the point whose numbers are shown */
  shown() {
    return this.timeline.near(this.pointed ?? this.timeline.end);
  }

  /** @param {number} height @param {number} top */
  scale(height, top) {
    return new Scale(this.timeline.end, this.root.clientWidth, height, top);
  }

  /** Draw everything anew. */
  draw() {
    const width = this.root.clientWidth;
    if (width === 0) return;
    const shown = this.shown();
    for (const { spec, chart, readouts } of this.curved) {
      chart.draw(width, this.curvedParts(spec));
      spec.curves.forEach((curve, index) => setText(readouts[index], number(shown && curve.value(shown))));
    }
    this.drawLanes(width, shown);
    this.axis.setAttribute("viewBox", `0 0 ${width} 18`);
    this.axis.replaceChildren(...this.ticks());
    setText(byId("time-note"), this.pointed === null || !shown ? this.note : `at ${clock(shown.t)}`);
  }

  /** @param {Spec} spec @returns {SVGElement[]} */
  curvedParts(spec) {
    const values = this.timeline.points.flatMap((point) => spec.curves.map((curve) => curve.value(point) ?? 0));
    const top = Math.max(spec.least, ...values);
    const scale = this.scale(spec.height, spec.exact ? top : rounded(top));
    const parts = grid(scale, [0, scale.top / 2, scale.top]);
    for (const curve of [...spec.curves].reverse()) {
      for (const run of this.timeline.runs(curve.value)) {
        parts.push(svg("path", { class: `curve ${curve.look}`, d: path(run, scale, curve) }));
      }
    }
    for (const point of this.timeline.points) {
      if (spec.faults && spec.faults(point) > 0) {
        const x = scale.x(point.t);
        parts.push(svg("path", { class: "fault", d: `M${x} ${scale.y(0) - 9}l5 9h-10z` }));
      }
    }
    return [...parts, ...this.line(scale)];
  }

  /** @param {number} width @param {Point | null} shown */
  drawLanes(width, shown) {
    const names = this.timeline.replicas();
    const short = shortNames(names);
    const height = Math.max(26, Math.floor(189 / Math.max(names.length, 1)) - 24);
    for (const [name, lane] of this.laneOf) {
      if (!names.includes(name) || lane.height !== height) {
        lane.root.remove();
        this.laneOf.delete(name);
      }
    }
    for (const name of names) {
      let lane = this.laneOf.get(name);
      if (!lane) {
        lane = new Chart(short.get(name) ?? name, height, `Pool of replica ${name} by kind`);
        lane.name.append(html("span", {}, html("output", {})), html("span", {}));
        this.laneOf.set(name, lane);
      }
      this.lanes.append(lane.root);
      const shares = shown?.kv[name];
      setText(/** @type {Element} */ (lane.name.querySelector("output")), shares ? `${percent(1 - shares[4])} in use` : "gone");
      setText(/** @type {Element} */ (lane.name.lastElementChild), shares ? kindsOf(shares) : "");
      lane.draw(width, this.stacked(name, this.scale(height, 1)));
    }
    if (names.length === 0 && !this.lanes.firstChild) this.lanes.append(html("p", { class: "empty" }, "No replica has reported yet."));
    else if (names.length > 0) this.lanes.querySelector(".empty")?.remove();
  }

  /** @param {string} name @param {Scale} scale @returns {SVGElement[]} */
  stacked(name, scale) {
    const parts = [];
    for (const run of this.timeline.runs((point) => point.kv[name])) {
      const box = { x: scale.x(run[0].t), width: scale.x(run[run.length - 1].t) - scale.x(run[0].t) };
      parts.push(svg("rect", { class: "base", x: box.x, y: TOP, width: Math.max(box.width, 1), height: scale.height }));
      let below = run.map(() => 0);
      KINDS.slice(0, -1).forEach((kind, index) => {
        const above = run.map((point, place) => below[place] + point.kv[name][index]);
        const there = run.map((point, place) => `${place ? "L" : "M"}${place2(scale.x(point.t))} ${place2(scale.y(above[place]))}`);
        const back = run.map((point, place) => `L${place2(scale.x(point.t))} ${place2(scale.y(below[place]))}`).reverse();
        parts.push(svg("path", { class: `area ${kind}`, d: `${there.join("")}${back.join("")}Z` }));
        below = above;
      });
    }
    return [...grid(scale, [0, 1], percent), ...parts, ...this.line(scale)];
  }

  /** @param {Scale} scale @returns {SVGElement[]} */
  line(scale) {
    if (this.pointed === null) return [];
    const x = scale.x(this.pointed);
    return [svg("line", { class: "now", x1: x, x2: x, y1: 0, y2: TOP + scale.height })];
  }

  /** @returns {SVGElement[]} */
  ticks() {
    const scale = this.scale(1, 1);
    return [5, 4, 3, 2, 1, 0].map((minutes) => {
      const x = scale.x(scale.end - 60 * minutes);
      const anchor = minutes === 0 ? "end" : minutes === 5 ? "start" : "middle";
      return svg("text", { x, y: 13, "text-anchor": anchor }, minutes === 0 ? "now" : `−${minutes}${minutes === 5 ? " min" : ""}`);
    });
  }
}

/** @param {number[]} shares of a pool */
function kindsOf(shares) {
  return KINDS.slice(0, -1).map((kind, index) => `${kind} ${percent(shares[index])}`).join(", ");
}

/** @param {number} value one decimal is enough for a pixel */
function place2(value) {
  return Math.round(10 * value) / 10;
}

/**
 * @param {Point[]} run
 * @param {Scale} scale
 * @param {Curve} curve
 */
function path(run, scale, curve) {
  let drawn = "";
  run.forEach((point, index) => {
    const [x, y] = [place2(scale.x(point.t)), place2(scale.y(curve.value(point) ?? 0))];
    drawn += index === 0 ? `M${x} ${y}` : curve.steps ? `H${x}V${y}` : `L${x} ${y}`;
  });
  return run.length === 1 ? `${drawn}h1` : drawn;
}

/**
 * Lines across the plot with their numbers.
 * @param {Scale} scale
 * @param {number[]} values
 * @param {(value: number) => string} write
 * @returns {SVGElement[]}
 */
function grid(scale, values, write = (value) => number(value, value % 1 ? 1 : 0)) {
  return values.flatMap((value, index) => {
    const y = Math.round(scale.y(value)) + 0.5;
    const line = svg("line", { class: "grid", x1: LEFT, x2: LEFT + scale.width, y1: y, y2: y });
    const isEnd = index === 0 || index === values.length - 1;
    return isEnd ? [line, svg("text", { x: LEFT - 6, y: index === 0 ? y : y + 8, "text-anchor": "end" }, write(value))] : [line];
  });
}

/** The next of 1, 1.5, 2, 3, 4, 6, 8 times a power of ten. @param {number} value */
function rounded(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * ([1, 1.5, 2, 3, 4, 6, 8, 10].find((step) => step * power >= value) ?? 10);
}
