// @ts-check
// Asks the server once a second and hands the answer to those who show it. Says when there is no answer, and tries again.

import { byId, setText } from "./dom.js";
import { Charts } from "./charts.js";
import { Chat } from "./chat.js";
import { Figures, Replicas, showDecisions, showFirstTokens } from "./fleet.js";
import { Timeline } from "./timeline.js";

/** @typedef {import("./fleet.js").State} State */

const PERIOD_MS = 1000;
const ANSWER_MS_MAX = 8000;
const RETRIES_MS = [1000, 2000, 4000, 5000];
const KEY = "loopserve-key"; // kept as long as this tab

const timeline = new Timeline();
const charts = new Charts(timeline);
const figures = new Figures();
const replicas = new Replicas();
const keyInput = /** @type {HTMLInputElement} */ (byId("key"));
/** @type {State | null} */
let latest = null;
let failures = 0;
let timer = 0;

keyInput.value = sessionStorage.getItem(KEY) ?? "";
keyInput.addEventListener("change", () => {
  sessionStorage.setItem(KEY, keyInput.value.trim());
  again(0);
});

/** @returns {Record<string, string>} */
function headers() {
  const key = keyInput.value.trim();
  return key ? { authorization: `Bearer ${key}` } : {};
}

new Chat({
  headers,
  model: () => latest?.model ?? "",
  replica: (name) => latest?.replicas.find((replica) => replica.name === name),
  budgetMax: () => latest?.budget_max ?? null,
  onSession: (session) => {
    replicas.mine = session;
    if (latest) replicas.show(latest);
  },
});

/** @param {"wait" | "live" | "lost" | "key"} kind @param {string} text */
function say(kind, text) {
  document.body.dataset.link = kind;
  byId("link").dataset.kind = kind;
  setText(byId("link"), text);
}

/** @param {State} state */
function show(state) {
  latest = state;
  timeline.add(state.points);
  setText(byId("model"), state.model);
  figures.show(state, timeline.points.at(-1) ?? null);
  replicas.show(state);
  showFirstTokens(state);
  showDecisions(state);
  charts.note = state.has_history ? "" : "no Prometheus: known since it is watched";
  charts.draw();
}

/** Ask once. @returns {Promise<void>} rejected where there is no state to show */
async function ask() {
  const response = await fetch(`observe/state?since=${timeline.end}`, { headers: headers(), signal: AbortSignal.timeout(ANSWER_MS_MAX) });
  if (response.status === 401 || response.status === 403) {
    byId("key-field").hidden = false;
    const isWrong = keyInput.value.trim() !== "";
    setText(byId("key-why"), !isWrong ? "(an operator's)" : response.status === 401 ? "(this one is not valid)" : "(this one is no operator's)");
    throw new Refused("key", isWrong ? "key not accepted" : "needs an API key");
  }
  if (!response.ok) throw new Refused("lost", "no replica answers");
  const state = /** @type {State} */ (await response.json());
  show(state);
}

class Refused extends Error {
  /** @param {"lost" | "key"} kind @param {string} text */
  constructor(kind, text) {
    super(text);
    this.kind = kind;
  }
}

async function poll() {
  if (document.hidden) return; // asked again when somebody looks
  const began = performance.now();
  try {
    await ask();
    failures = 0;
    say("live", latest && latest.silent.length > 0 ? `live, ${latest.silent.length} silent` : "live");
    again(Math.max(0, PERIOD_MS - (performance.now() - began)));
  } catch (error) {
    const wait = RETRIES_MS[Math.min(failures, RETRIES_MS.length - 1)];
    failures += 1;
    if (error instanceof Refused) say(error.kind, error.kind === "key" ? error.message : `${error.message}, trying again`);
    else say("lost", "disconnected, trying again");
    again(wait);
  }
}

/** Ask again after a while; an earlier plan is dropped. @param {number} wait milliseconds */
function again(wait) {
  clearTimeout(timer);
  timer = window.setTimeout(poll, wait);
}

document.addEventListener("visibilitychange", () => again(0));
charts.draw();
poll();
