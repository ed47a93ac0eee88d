// @ts-check
// The points of the last minutes, from whichever poll brought them. Knows nothing of how they are drawn.

/**
 * One second of the fleet, as the server tells it.
 * @typedef {object} Point
 * @property {number} t unix seconds
 * @property {{prefill: number | null, decode: number | null}} tokens_per_s
 * @property {number} failed turns since the point before
 * @property {number} running
 * @property {number} waiting
 * @property {number | null} budget
 * @property {number | null} ceiling
 * @property {number | null} wanted
 * @property {number} ready
 * @property {Record<string, number[]>} kv shares of each replica's pool: active, shared, warm, cached, free
 */

export const SPAN_S = 300;
export const GAP_S = 15; // a longer silence is shown as one, not bridged by a line

export class Timeline {
  constructor() {
    /** @type {Point[]} oldest first */
    this.points = [];
  }

  /** Time of the newest point; 0 without any. */
  get end() {
    return this.points.at(-1)?.t ?? 0;
  }

  /**
   * Take in points that may be known already.
   * @param {Point[]} points
   */
  add(points) {
    const known = new Set(this.points.map((point) => point.t));
    const fresh = points.filter((point) => !known.has(point.t));
    if (fresh.length === 0) return;
    this.points = [...this.points, ...fresh].sort((a, b) => a.t - b.t);
    const start = this.end - SPAN_S - GAP_S;
    this.points = this.points.filter((point) => point.t >= start);
  }

  /**
   * The point nearest to a time, null where none is near.
   * @param {number} at
   * @returns {Point | null}
   */
  near(at) {
    let best = null;
    for (const point of this.points) {
      if (best === null || Math.abs(point.t - at) < Math.abs(best.t - at)) best = point;
    }
    return best !== null && Math.abs(best.t - at) <= GAP_S ? best : null;
  }

  /**
   * Runs of points without a gap in which `value` is known.
   * @param {(point: Point) => unknown} value
   * @returns {Point[][]}
   */
  runs(value) {
    /** @type {Point[][]} */
    const runs = [];
    let last = -Infinity;
    for (const point of this.points) {
      const found = value(point);
      if (found === null || found === undefined) continue;
      if (point.t - last > GAP_S) runs.push([]);
      runs[runs.length - 1].push(point);
      last = point.t;
    }
    return runs;
  }

  /** Replicas that any point knows, in order of their names. */
  replicas() {
    return [...new Set(this.points.flatMap((point) => Object.keys(point.kv)))].sort();
  }
}
