// @ts-check
// What is now: the figures, who lives where, time to first token by turn, and the autopilot's last decisions.

import { byId, bytes, clock, duration, html, number, percent, setText, shortNames, svg } from "./dom.js";
import { KINDS } from "./charts.js";

/** @typedef {{id: string, num_tokens: number, num_cached_tokens: number, num_turns: number, is_active: boolean, idle_s: number}} Conversation */
/** @typedef {{turn: string | null, num: number, p50: number | null, p95: number | null}} FirstToken */
/** @typedef {{name: string, up: boolean, kv: number[], capacity_bytes: number, budget: number | null, ceiling: number | null,
 *    running: number, waiting: number, sessions: Record<string, number>}} Replica */
/**
 * The answer of `observe/state`.
 * @typedef {object} State
 * @property {number} at
 * @property {string} model
 * @property {number} window_s
 * @property {number | null} reused_share
 * @property {number} turns
 * @property {number} failed
 * @property {number} refused
 * @property {{all: FirstToken, by_turn: FirstToken[]}} ttft
 * @property {number | null} budget_max
 * @property {Replica[]} replicas
 * @property {string[]} silent
 * @property {boolean} has_history
 * @property {import("./timeline.js").Point[]} points
 * @property {Record<string, {num: number, shown: Conversation[]}>} conversations
 * @property {{mode: string, holding: {cause: string, detail: string} | null, last: Decision | null, decisions: Decision[]} | null} autopilot
 */
/** @typedef {{unix_time: number, actions: string[], reason: string, cause: string | null, budget_ceiling_tokens: number | null,
 *    replicas: number}} Decision */

const CELLS_MAX = 90; // of one replica
const FULL_TOKENS = 2048; // a cell is full from here on; square root below, so that short conversations differ

/** The row of large numbers. */
export class Figures {
  constructor() {
    this.root = byId("figures");
    /** @type {Map<string, {root: HTMLElement, value: HTMLElement, more: HTMLElement}>} */
    this.tiles = new Map();
    for (const name of ["Tokens/s", "First token, p50", "Prompt reused", "Conversations", "Turns running", "Turns failed"]) {
      const [value, more] = [html("dd", { class: "value" }, "–"), html("dd", { class: "more" }, "\u00a0")];
      const root = html("div", { class: "figure" }, html("dl", {}, html("dt", {}, name), value, more));
      this.tiles.set(name, { root, value, more });
      this.root.append(root);
    }
  }

  /** @param {State} state @param {import("./timeline.js").Point | null} point the newest */
  show(state, point) {
    const window = `last ${number(state.window_s)} s`;
    const total = (/** @type {string} */ name) => state.replicas.reduce((sum, replica) => sum + (replica.sessions[name] ?? 0), 0);
    const all = state.ttft.all;
    this.set("Tokens/s", number(point?.tokens_per_s.decode), `prompts ${number(point?.tokens_per_s.prefill)}`);
    this.set("First token, p50", duration(all.p50), `p95 ${duration(all.p95)}`);
    this.set("Prompt reused", percent(state.reused_share), window);
    this.set("Conversations", number(total("active") + total("warm")), `${number(total("active"))} active`);
    this.set("Turns running", number(point?.running), `${number(point?.waiting)} waiting`);
    const refused = state.refused > 0 ? `, ${number(state.refused)} refused` : "";
    this.set("Turns failed", number(state.failed), `of ${number(state.turns)}${refused}`, state.failed > 0);
  }

  /** @param {string} name @param {string} value @param {string} more @param {boolean} [isBad] */
  set(name, value, more, isBad = false) {
    const tile = this.tiles.get(name);
    if (!tile) return;
    setText(tile.value, value);
    setText(tile.more, more);
    tile.root.dataset.bad = String(isBad);
  }
}

/** The replicas with their pools and conversations. */
export class Replicas {
  constructor() {
    this.root = byId("replicas");
    this.root.append(html("p", { class: "empty" }, "Waiting for the first answer of the server."));
    /** @type {Map<string, {root: HTMLElement, title: HTMLElement, facts: HTMLElement, pool: HTMLElement, cells: HTMLElement}>} */
    this.cards = new Map();
    /** @type {Map<string, number>} for how many answers in a row a replica held more than is shown */
    this.unseen = new Map();
    /** @type {Map<string, number>} when each conversation was first seen, so that cells keep their places */
    this.places = new Map();
    this.mine = "";
  }

  /** @param {State} state */
  show(state) {
    const names = [...new Set([...state.replicas.map((replica) => replica.name), ...state.silent.filter((name) => name !== "unknown")])].sort();
    const short = shortNames(names);
    for (const [name, card] of this.cards) {
      if (!names.includes(name)) {
        card.root.remove();
        this.cards.delete(name);
      }
    }
    this.root.querySelector(".empty")?.remove();
    if (names.length === 0) this.root.append(html("p", { class: "empty" }, "No replica is running."));
    for (const name of names) {
      const card = this.cards.get(name) ?? this.card(name);
      if (card.root.parentNode !== this.root) this.root.append(card.root);
      this.fill(name, card, short.get(name) ?? name, state.replicas.find((replica) => replica.name === name),
        state.conversations[name] ?? { num: 0, shown: [] }, state.silent.includes(name));
    }
    this.forget(state);
  }

  /** @param {string} name */
  card(name) {
    const [title, facts] = [html("h3", { title: name }), html("p", { class: "facts" })];
    const pool = html("div", { class: "pool", role: "img" }, ...KINDS.slice(0, -1).map((kind) => html("i", { class: kind })));
    const cells = html("ul", { class: "cells" });
    const card = { root: html("article", { class: "replica" }, title, facts, pool, cells), title, facts, pool, cells };
    this.cards.set(name, card);
    return card;
  }

  /**
   * @param {string} name
   * @param {{root: HTMLElement, title: HTMLElement, facts: HTMLElement, pool: HTMLElement, cells: HTMLElement}} card
   * @param {string} short
   * @param {Replica | undefined} replica
   * @param {{num: number, shown: Conversation[]}} found
   * @param {boolean} isSilent
   */
  fill(name, card, short, replica, found, isSilent) {
    const isUp = Boolean(replica?.up) && !isSilent;
    card.root.dataset.up = String(isUp);
    setText(card.title, `${short}${isSilent ? ": does not answer" : isUp ? "" : ": not running"}`);
    const shares = replica?.kv ?? [0, 0, 0, 0, 1];
    setText(card.facts, replica
      ? `${number(replica.running)} running, ${number(replica.waiting)} waiting · ${percent(1 - shares[4])} of ${bytes(replica.capacity_bytes)}`
      : "");
    card.pool.setAttribute("aria-label", KINDS.map((kind, index) => `${kind} ${percent(shares[index])}`).join(", "));
    [...card.pool.children].forEach((bar, index) => {
      /** @type {HTMLElement} */ (bar).style.width = `${(100 * shares[index]).toFixed(2)}%`;
    });
    const others = this.others(name, Object.values(replica?.sessions ?? {}).reduce((sum, num) => sum + num, 0) - found.num);
    const known = found.shown.slice().sort((a, b) => this.place(a.id) - this.place(b.id)).slice(0, CELLS_MAX);
    const rest = found.num - known.length;
    const words = [...(rest > 0 ? [`+ ${number(rest)} more`] : []), ...(others > 0 ? [`+ ${number(others)} of other tenants`] : [])];
    card.cells.replaceChildren(...known.map((conversation) => this.cell(conversation)),
      ...(words.length ? [html("li", { class: "rest" }, words.join(", "))] : []),
      ...(known.length + words.length === 0 ? [html("li", { class: "rest" }, "no conversation")] : []));
  }

  /**
   * How many conversations belong to others. Both numbers are counted a moment apart, so only what lasts counts.
   * @param {string} name
   * @param {number} num
   */
  others(name, num) {
    const times = num > 0 ? (this.unseen.get(name) ?? 0) + 1 : 0;
    this.unseen.set(name, times);
    return times >= 5 ? num : 0;
  }

  /** @param {Conversation} conversation */
  cell(conversation) {
    const isMine = conversation.id === this.mine;
    const state = conversation.is_active ? "being answered" : `idle for ${duration(conversation.idle_s)}`;
    const told = `${isMine ? "Yours: " : ""}${conversation.id}: ${number(conversation.num_turns)} turns, ${number(conversation.num_cached_tokens)} of ${number(conversation.num_tokens)} tokens held, ${state}`;
    const cell = html("li", { class: `cell ${conversation.is_active ? "active" : "warm"}${isMine ? " mine" : ""}`, title: told },
      html("span", { class: "unseen" }, told));
    cell.style.setProperty("--fill", `${Math.round(100 * Math.min(1, Math.sqrt(conversation.num_cached_tokens / FULL_TOKENS)))}%`);
    return cell;
  }

  /** @param {string} id */
  place(id) {
    const known = this.places.get(id) ?? this.places.size + (this.places.values().next().value ?? 0);
    this.places.set(id, known);
    return known;
  }

  /** Places of conversations that are gone are free again. @param {State} state */
  forget(state) {
    const there = new Set(Object.values(state.conversations).flatMap((home) => home.shown.map((conversation) => conversation.id)));
    for (const id of this.places.keys()) if (!there.has(id)) this.places.delete(id);
  }
}

/**
 * The table of times to first token.
 * @param {State} state
 */
export function showFirstTokens(state) {
  const body = /** @type {HTMLElement} */ (byId("ttft").querySelector("tbody"));
  const rows = state.ttft.by_turn;
  const longest = Math.max(0.1, ...rows.map((row) => row.p95 ?? 0));
  body.replaceChildren(...rows.map((row) => {
    const plot = svg("svg", { viewBox: "0 0 100 14", preserveAspectRatio: "none", "aria-hidden": "true" });
    const cell = html("td", {}, plot);
    if (row.p50 !== null && row.p95 !== null) {
      const [near, far] = [2 + (96 * row.p50) / longest, 2 + (96 * row.p95) / longest];
      plot.append(svg("line", { class: "span", x1: near, x2: far, y1: 7, y2: 7 }),
        svg("rect", { class: "p95", x: far - 1, y: 2, width: 1.4, height: 10 }),
        svg("rect", { class: "p50", x: near - 1.2, y: 2, width: 2.4, height: 10 }));
    }
    return html("tr", {}, html("th", { scope: "row" }, row.turn ?? ""), html("td", {}, number(row.num)),
      html("td", {}, duration(row.p50)), html("td", {}, duration(row.p95)), cell);
  }));
  setText(byId("ttft-note"), `last ${number(state.window_s)} s`);
}

/**
 * The autopilot's decisions, newest first, and what it has to say now.
 * @param {State} state
 */
export function showDecisions(state) {
  const pilot = state.autopilot;
  const list = byId("decisions");
  const decisions = pilot?.decisions ?? [];
  setText(byId("pilot-note"), pilot ? saidNow(pilot) : "off");
  const key = JSON.stringify([pilot === null, decisions]);
  if (list.dataset.shown === key) return;
  list.dataset.shown = key;
  if (decisions.length === 0) {
    const why = pilot ? "It has decided nothing yet." : "There is none: budget and replicas stay as they are set.";
    list.replaceChildren(html("li", { class: "plain" }, why));
    return;
  }
  list.replaceChildren(...decisions.map((decision) =>
    html("li", {}, html("time", {}, clock(decision.unix_time)), html("span", { class: "act" }, decision.actions.join(" + ")),
      html("span", {}, decision.reason))));
}

/** @param {NonNullable<State["autopilot"]>} pilot */
function saidNow(pilot) {
  if (pilot.holding) return `${pilot.mode}, holds: ${pilot.holding.cause}`;
  if (!pilot.last) return pilot.mode;
  const budget = pilot.last.budget_ceiling_tokens === null ? "no ceiling" : `${number(pilot.last.budget_ceiling_tokens)} tokens`;
  return `${pilot.mode}; wants ${budget}, ${number(pilot.last.replicas)} replicas`;
}
