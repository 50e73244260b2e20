/** The live panel of what happens underneath: the connection, the events, how long tokens take, what stopping saves. */

import { byId, element, onceAFrame } from "./elements.js";
import { drawWaits, Latency } from "./latency.js";
import { Savings } from "./savings.js";

/** @typedef {import("../realtime.js").RealtimeSession} RealtimeSession */

const ROWS = 60;
/** A line ends after it, not before. */
const BETWEEN = "\u00a0· ";
const TRANSPORTS = { websocket: "WebSocket", sse: "server-sent events" };

export class Underneath {
  latency = new Latency();
  savings = new Savings();
  /** Tokens that came after the newest reconnect and were said before it. */
  caughtUp = 0;
  #session;
  #counts = { events: 0, merged: 0, opens: 0 };
  #connectionId = "";
  #cutAt = 0;
  /** How long the connection was away last. @type {number | undefined} */
  #awayMs;
  /** What the next frame adds to the list. @type {any[]} */
  #news = [];
  /** Shows how it stands, in the next frame. */
  draw = onceAFrame(() => this.#show());

  /** @param {RealtimeSession} session */
  constructor(session) {
    this.#session = session;
    byId("events").replaceChildren();
    this.draw();
  }

  /** Whether the connection was lost and is back. */
  get hasReconnected() {
    return this.#counts.opens > 1;
  }

  /** @param {any} first */
  opened(first) {
    this.#counts.opens += 1;
    this.#connectionId = first.connection_id;
    this.savings.maxOutputTokens = first.session.max_output_tokens;
    this.caughtUp = 0;
    if (this.#cutAt) this.#awayMs = performance.now() - this.#cutAt;
    this.#cutAt = 0;
    this.draw();
  }

  disconnected() {
    this.#cutAt ||= performance.now();
    this.draw();
  }

  /** @param {any} event */
  received(event) {
    this.#counts.events += 1;
    this.#counts.merged += (event.merged ?? 1) - 1;
    this.#news.push(event);
    if (this.#news.length > ROWS) this.#news.shift();
    this.#measure(event);
    this.draw();
  }

  /** @param {any} event */
  #measure(event) {
    const isDelta = event.type === "response.output_text.delta";
    if (isDelta && this.hasReconnected && event.replay) this.caughtUp += event.merged ?? 1;
    // What is told of the past says nothing of how long it took.
    if (isDelta && (this.hasReconnected || !event.replay)) this.latency.came(event, performance.now());
    if (event.type === "session.updated") this.savings.maxOutputTokens = event.session.max_output_tokens;
    if (event.type !== "response.done") return;
    this.latency.ended(event.response_id);
    this.savings.add(event);
  }

  #show() {
    this.#showConnection();
    this.#showLatency();
    this.#showSavings();
    this.#showEvents();
  }

  #showConnection() {
    const { transport, positions, participants, state } = this.#session;
    const { events, merged, opens } = this.#counts;
    const isOpen = state === "open" && transport !== null;
    tell("fact-transport", isOpen ? TRANSPORTS[transport] : "not connected");
    tell("fact-connection", isOpen ? short(this.#connectionId) : "");
    tell("fact-reconnects", this.#awayMs === undefined ? "none yet"
      : `${opens - 1}, away ${(this.#awayMs / 1_000).toFixed(1)} s, ${this.caughtUp} tokens caught up`);
    tellAll("fact-viewers", [...participants.keys()].map(short));
    tell("fact-events", events.toLocaleString());
    tell("fact-merged", merged.toLocaleString());
    tellAll("fact-positions", [...positions].map(([channel, position]) => `${short(channel)} ${position}`));
  }

  #showLatency() {
    const { firstTokenMs, waits } = this.latency;
    tell("fact-first-token", ms(firstTokenMs));
    tell("fact-median", ms(this.latency.quantile(0.5)));
    tell("fact-p95", ms(this.latency.quantile(0.95)));
    drawWaits(/** @type {HTMLCanvasElement} */ (byId("waits")), waits);
  }

  #showSavings() {
    const { written, saved, costUsd } = this.savings;
    tell("fact-written", `${written.isEstimated ? "about " : ""}${written.tokens.toLocaleString()} tokens`);
    tell("fact-cost", costUsd !== undefined ? dollars(costUsd) : written.tokens ? "no prices set" : "nothing spent yet");
    const [what, more] = savedWords(saved);
    tell("fact-saved", what);
    tell("fact-saved-more", more);
  }

  #showEvents() {
    const list = byId("events");
    list.prepend(...this.#news.map(row).reverse());
    this.#news = [];
    while (list.childElementCount > ROWS) list.lastElementChild?.remove();
  }
}

/** @param {import("./savings.js").Savings["saved"]} saved @returns {[string, string]} how much, and what more there is to say */
function savedWords({ answers, about, atMost, aboutUsd }) {
  if (!answers) return ["–", "nothing stopped yet"];
  const most = `at most ${atMost.toLocaleString()}`;
  if (about === undefined) return [`${most} tokens`, "none has finished yet"];
  if (about === 0) return [`${most} tokens`, "past the usual length"];
  return [`about ${about.toLocaleString()} tokens`, aboutUsd === undefined ? most : `${dollars(aboutUsd)}, ${most}`];
}

/** @param {any} event */
function row({ type, seq, merged, replay, ...event }) {
  const channel = event.response_id ?? event.task_id ?? (seq === undefined ? "" : "session");
  const made = element("li", replay ? "replayed" : "", element("span", "type", type));
  made.append(element("span", "channel", channel && short(channel)));
  made.append(element("span", "seq", seq === undefined ? "" : `#${seq}`));
  made.append(element("span", "merged", merged === undefined ? "" : `×${merged}`));
  return made;
}

/** Only what has changed is drawn anew. @param {string} id @param {string} words */
function tell(id, words) {
  const place = byId(id);
  if (place.textContent !== words) place.textContent = words;
}

/** The same of several, each of which stays in one line. @param {string} id @param {string[]} parts */
function tellAll(id, parts) {
  const place = byId(id);
  if (place.textContent === (parts.join(BETWEEN) || "–")) return;
  place.replaceChildren(...parts.flatMap((part, index) => [index ? BETWEEN : "", element("span", "whole", part)]));
  if (!parts.length) place.append("–");
}

/** An id as one can tell it from others: its kind, and its end. @param {string} id */
const short = (id) => (id.length > 14 ? `${id.slice(0, id.indexOf("_") + 1)}…${id.slice(-4)}` : id);
/** @param {number | undefined} value */
const ms = (value) => (value === undefined ? "–" : `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`);
/** @param {number} usd */
const dollars = (usd) => `$${usd < 0.01 ? usd.toPrecision(2) : usd.toFixed(2)}`;
