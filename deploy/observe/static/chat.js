// @ts-check
// The chat box: plain OpenAI, streamed, and under each answer what the turn reused and kept.

import { byId, duration, html, number, percent, setText } from "./dom.js";

/** @typedef {{role: "user" | "assistant", content: string}} Message */
/**
 * What is told of one answer.
 * @typedef {object} Told
 * @property {number} sentAt milliseconds
 * @property {number | null} firstTokenS
 * @property {any} usage
 * @property {string} replica
 * @property {number | null} asked budget
 */

const EXAMPLES = ["Remember: locker 4417.", "What is my locker?"];

/**
 * The payloads of a stream of server-sent events.
 * @param {ReadableStream<Uint8Array>} body
 * @returns {AsyncGenerator<string>}
 */
async function* payloads(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (rest + decoder.decode(value, { stream: true })).split("\n\n");
    rest = events.pop() ?? "";
    for (const event of events) {
      if (event.startsWith("data: ")) yield event.slice(6);
    }
  }
}

export class Chat {
  /**
   * @param {object} world
   * @param {() => HeadersInit} world.headers with the key, where there is one
   * @param {() => string} world.model
   * @param {(replica: string) => {budget: number | null, ceiling: number | null} | undefined} world.replica
   * @param {() => number | null} world.budgetMax
   * @param {(session: string) => void} world.onSession
   */
  constructor(world) {
    this.world = world;
    /** @type {Message[]} */
    this.messages = [];
    /** @type {AbortController | null} */
    this.running = null;
    this.log = byId("log");
    this.input = /** @type {HTMLTextAreaElement} */ (byId("message"));
    this.send = /** @type {HTMLButtonElement} */ (byId("send"));
    byId("form").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.running) this.running.abort();
      else this.say(this.input.value.trim());
    });
    this.input.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        if (!this.running) this.say(this.input.value.trim());
      }
    });
    byId("new").addEventListener("click", () => {
      this.begin();
      this.input.focus({ preventScroll: true });
    });
    this.begin();
  }

  /** An empty conversation. */
  begin() {
    this.running?.abort();
    this.messages = [];
    this.world.onSession("");
    const hints = html("div", { class: "hints" }, html("p", {}, "A turn costs what it adds: say something, then ask for it. For example:"));
    for (const text of EXAMPLES) {
      const button = html("button", { type: "button", class: "quiet" }, text);
      button.addEventListener("click", () => {
        if (!this.running) this.say(text);
        this.input.focus();
      });
      hints.append(button);
    }
    this.log.replaceChildren(hints);
  }

  /** Send one message and show the answer as it comes. @param {string} text */
  async say(text) {
    if (!text) return;
    this.log.querySelector(".hints")?.remove();
    this.input.value = "";
    const said = html("div", { class: "turn user" }, html("p", { class: "said" }, text));
    const answer = html("p", { class: "said" });
    const told = html("dl", { class: "told" });
    const turn = html("div", { class: "turn answer", "aria-busy": "true" }, answer, told);
    this.log.append(said, turn);
    this.bottom();
    this.running = new AbortController();
    setText(this.send, "Stop");
    const messages = this.messages;
    const asked = [...messages, /** @type {Message} */ ({ role: "user", content: text })];
    let problem = "";
    try {
      await this.stream(asked, answer, told, this.running.signal);
    } catch (error) {
      problem = this.running.signal.aborted ? "Stopped." : error instanceof Error ? error.message : String(error);
    }
    this.running = null;
    setText(this.send, "Send");
    turn.removeAttribute("aria-busy");
    if (this.messages !== messages) return; // a new conversation began meanwhile
    if (answer.textContent) this.messages = [...asked, { role: "assistant", content: answer.textContent }];
    else this.input.value = text;
    if (problem) {
      turn.append(html("p", { class: "trouble", role: "alert" }, problem));
      if (!told.firstChild) told.remove();
      if (!answer.textContent) answer.remove();
    }
    this.bottom();
  }

  /**
   * @param {Message[]} messages
   * @param {HTMLElement} answer
   * @param {HTMLElement} told
   * @param {AbortSignal} signal
   */
  async stream(messages, answer, told, signal) {
    const mode = /** @type {HTMLSelectElement} */ (byId("mode")).value;
    const asked = Number.parseInt(/** @type {HTMLInputElement} */ (byId("budget")).value, 10) || null;
    const body = {
      model: this.world.model(), messages, temperature: 0, stream: true, stream_options: { include_usage: true },
      loopserve: { mode, ...(asked ? { budget_tokens: asked } : {}) },
    };
    const sentAt = performance.now();
    const response = await fetch("v1/chat/completions", {
      method: "POST", signal, body: JSON.stringify(body),
      headers: { "content-type": "application/json", ...this.world.headers() },
    }).catch((error) => {
      throw signal.aborted ? error : new Error("The server cannot be reached. Your message is still in the box.");
    });
    if (!response.ok || !response.body) throw new Error(await refusal(response));
    /** @type {Told} */
    const facts = { sentAt, firstTokenS: null, usage: null, replica: response.headers.get("x-loopserve-replica") ?? "", asked };
    this.world.onSession(response.headers.get("x-session-id") ?? "");
    let isWhole = false;
    for await (const payload of payloads(response.body)) {
      isWhole ||= payload === "[DONE]";
      if (payload === "[DONE]") continue;
      const chunk = JSON.parse(payload);
      if (chunk.error) throw new Error(chunk.error.message);
      const text = chunk.choices?.[0]?.delta?.content ?? "";
      if (text) {
        facts.firstTokenS ??= (performance.now() - sentAt) / 1000;
        answer.append(text);
        this.bottom();
      }
      facts.usage = chunk.usage ?? facts.usage;
    }
    this.tell(facts, told);
    if (!isWhole) throw new Error("The answer broke off before its end.");
  }

  /** @param {Told} facts @param {HTMLElement} told */
  tell(facts, told) {
    const { usage } = facts;
    const quality = usage?.loopserve;
    const rows = /** @type {[string, string][]} */ ([]);
    if (usage) {
      const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
      rows.push(["Reused", `${number(cached)} of ${number(usage.prompt_tokens)} prompt tokens (${percent(cached / Math.max(usage.prompt_tokens, 1))})`]);
    }
    if (quality) {
      const isDense = quality.coverage_mean === null;
      rows.push(["Kept", quality.context_tokens
        ? `${number(quality.kept_tokens)} of ${number(quality.context_tokens)} context tokens a step` : "no decode step"]);
      rows.push(["Coverage", isDense ? `all of it (dense; ${quality.mode})`
        : `${number(quality.coverage_mean, 3)}, worst head ${number(quality.coverage_worst_head, 3)}`]);
      rows.push(["Budget", isDense ? "none: dense" : this.budget(facts)]);
    }
    rows.push(["Replica", facts.replica.slice(0, 8) || "–"], ["First token", duration(facts.firstTokenS)]);
    told.replaceChildren(...rows.flatMap(([name, value]) => [html("dt", {}, name), html("dd", {}, value)]));
  }

  /** The budget of a turn: what was asked for, under the ceiling. @param {Told} facts */
  budget({ replica, asked }) {
    const there = this.world.replica(replica);
    const max = this.world.budgetMax();
    const ceiling = there && there.ceiling !== null && max !== null && there.ceiling < max ? there.ceiling : Infinity;
    if (asked === null) return there ? `${number(there.budget)} tokens, the server's` : "the server's";
    return asked > ceiling ? `${number(ceiling)} tokens, the ceiling (${number(asked)} asked for)` : `${number(asked)} tokens, as asked for`;
  }

  bottom() {
    this.log.scrollTop = this.log.scrollHeight;
  }
}

/** What a refused request says. @param {Response} response */
async function refusal(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status}.`;
  }
}
