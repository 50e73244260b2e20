/**
 * A session's events as server-sent events, its commands each by a POST: for where WebSockets don't get through.
 * Read by `fetch`, not by `EventSource`, which can show no token and tells nothing of why it was refused.
 */

import { RealtimeError } from "./errors.js";
import { messageIn } from "./websocket.js";

/** @typedef {import("./websocket.js").Target} Target */
/** @typedef {import("./websocket.js").Listener} Listener */
/** @typedef {import("./websocket.js").Transport} Transport */

const LOST = 1006;
/** A command that has no answer for so long is lost. */
const ANSWER_MS = 45_000;
/** What is on the way may say when to come back, but not keep a session away for good. */
const LONGEST_RETRY_AFTER_MS = 60_000;
const TOKEN_REFUSED = 4401;
const OVERLOADED = 1013;
const DELETED = 4410;
/** What the WebSocket's close code would be. @type {Record<number, number>} */
const CODE_OF_STATUS = { 204: 1000, 400: 4400, 401: TOKEN_REFUSED, 403: 4403, 404: 4404, 410: 4410, 429: 4429 };
/** The same for the error that ends a stream. @type {Record<string, number>} */
const CODE_OF_ERROR = {
  invalid_request_error: 4400,
  authentication_error: TOKEN_REFUSED,
  permission_error: 4403,
  not_found_error: 4404,
  rate_limit_error: 4429,
};

/** @implements {Transport} */
export class EventStreamTransport {
  #target;
  #listener;
  #abort = new AbortController();
  /** Commands go one after the other, to keep their order. */
  #posts = Promise.resolve();
  /** Where events come from and commands go. */
  #address = "";
  /** What the end of the stream means. */
  #end = { code: LOST, reason: "the stream ended" };

  /** @param {Target} target @param {Listener} listener */
  constructor(target, listener) {
    this.#target = target;
    this.#listener = listener;
    this.#run().catch(() => this.#closed(LOST, "lost"));
  }

  /** @param {Record<string, any>} command */
  send(command) {
    this.#posts = this.#posts.then(() => this.#inTime(this.#post(command))).catch(() => this.#closed(LOST, "lost"));
  }

  /** Each command is answered. */
  sent() {
    return this.#posts;
  }

  close() {
    this.#abort.abort();
  }

  async #run() {
    const made = this.#target.sessionId === null;
    const sessionId = this.#target.sessionId ?? (await this.#makeSession());
    if (!sessionId) return;
    this.#address = `${this.#sessions()}/${encodeURIComponent(sessionId)}/events`;
    const answer = await this.#fetch(`${this.#address}?${this.#target.query.join("&")}`);
    if (answer.status !== 200 || !answer.body) return this.#refused(answer);
    for await (const event of this.#events(answer.body)) {
      this.#note(event);
      // To the caller it is one step: a session that this client has made.
      if (made && event.type === "session.resumed") event.type = "session.created";
      this.#listener.event(event);
    }
    this.#closed(this.#end.code, this.#end.reason);
  }

  async #makeSession() {
    const answer = await this.#fetch(this.#sessions(), { method: "POST" });
    if (answer.status !== 201) return this.#refused(answer);
    const id = (await bodyOf(answer))?.session?.id;
    return id ?? this.#closed(LOST, "unreadable");
  }

  #sessions() {
    const { origin, pathname } = this.#target.url;
    return `${origin.replace(/^ws/, "http")}${pathname.replace(/\/realtime$/, "/sessions")}`;
  }

  /** @param {string} address @param {RequestInit} [options] */
  #fetch(address, options = {}) {
    const headers = headersFor(this.#target.token);
    return fetch(address, { ...options, headers, cache: "no-store", signal: this.#abort.signal });
  }

  /** @param {ReadableStream<Uint8Array>} body @returns {AsyncGenerator<any>} */
  async *#events(body) {
    let data = "";
    for await (const line of this.#lines(body)) {
      if (line.startsWith("data:")) data += line.slice(5);
      if (line || !data) continue;
      const event = messageIn(data);
      if (!event) return this.#closed(LOST, "unreadable");
      yield event;
      data = "";
    }
  }

  /** @param {ReadableStream<Uint8Array>} body */
  async *#lines(body) {
    const reader = body.getReader(); // not `for await`, which Safari lacks
    const decoder = new TextDecoder();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      this.#listener.alive();
      const lines = (rest + decoder.decode(value, { stream: true })).split(/\r?\n/);
      rest = lines.pop() ?? "";
      yield* lines;
    }
  }

  /** @param {any} event */
  #note(event) {
    if (event.type === "session.closed") this.#end = { code: 1000, reason: event.reason };
    if (event.type === "error" && event.error.fatal) this.#end = { code: codeOf(event.error), reason: event.error.code };
  }

  /** @param {Response} answer */
  async #refused(answer) {
    const error = errorIn(await bodyOf(answer));
    if (!error && answer.status !== 204) return this.#strange(answer);
    if (error) this.#listener.event({ type: "error", error: { ...error, fatal: true } });
    this.#closed(CODE_OF_STATUS[answer.status] ?? OVERLOADED, error?.code ?? "");
  }

  /** Not the server's answer, but of something on the way. @param {Response} answer */
  #strange(answer) {
    const retryAfterS = Number.parseInt(answer.headers.get("retry-after") ?? "0", 10) || 0;
    this.#closed(OVERLOADED, `HTTP ${answer.status}`, Math.min(retryAfterS * 1_000, LONGEST_RETRY_AFTER_MS));
  }

  /** One that is never answered would hold up all that follow. @param {Promise<void>} posting */
  async #inTime(posting) {
    const timer = setTimeout(() => this.#closed(LOST, "no answer"), ANSWER_MS);
    await posting.finally(() => clearTimeout(timer));
  }

  /** @param {Record<string, any>} command */
  async #post(command) {
    if (this.#abort.signal.aborted) return; // the next connection sends it
    const answer = await this.#fetch(this.#address, { method: "POST", body: JSON.stringify(command) });
    if (answer.status === 202) return this.#listener.settled(command.event_id);
    const error = errorIn(await bodyOf(answer));
    if (answer.status === 401) return this.#closed(TOKEN_REFUSED, error?.code ?? "");
    const isLeaving = answer.status === 503 && error?.type === "rate_limit_error"; // the session's instance
    if (!error || isLeaving) return this.#strange(answer);
    this.#listener.event({ type: "error", error: { ...error, event_id: command.event_id, fatal: false } });
  }

  /** @param {number} code @param {string} reason @param {number} [retryAfterMs] */
  #closed(code, reason, retryAfterMs) {
    if (this.#abort.signal.aborted) return;
    this.#abort.abort();
    this.#listener.closed(code, reason, retryAfterMs);
  }
}

/** @param {{type: string, code: string}} error what has ended a stream */
function codeOf({ type, code }) {
  return code === "session_deleted" ? DELETED : CODE_OF_ERROR[type] ?? LOST;
}

/**
 * What is at an address of the server. Throws `RealtimeError`: the server's, or `unreachable`.
 * @param {string} address @param {string | undefined} token
 */
export async function fetched(address, token) {
  const answer = await fetch(address, { headers: headersFor(token) }).catch(() => undefined);
  const body = answer && (await bodyOf(answer));
  if (answer?.ok && body !== undefined) return body;
  const message = answer ? `unreadable (HTTP ${answer.status})` : "lost";
  throw new RealtimeError(errorIn(body) ?? { code: "unreachable", message });
}

/** @param {string | undefined} token @returns {Record<string, string>} */
function headersFor(token) {
  return token ? { authorization: `Bearer ${token}` } : {};
}

/** What an answer says in JSON; undefined where it is something else. @param {Response} answer @returns {Promise<any>} */
function bodyOf(answer) {
  return answer.json().catch(() => undefined);
}

/** The error in a body; undefined for what is no answer of the server. @param {any} body */
function errorIn(body) {
  const error = body?.error;
  return [error?.type, error?.code, error?.message].every((text) => typeof text === "string") ? error : undefined;
}
