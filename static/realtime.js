/**
 * The client of a realtime server for browsers and Node: one session, over a connection that comes back by itself.
 *
 * What makes that safe are `positions`: the number of the last event applied, per channel. After any loss of the
 * connection they alone say where to go on, so an answer continues at the character where it was cut, and a command
 * that was under way is carried out once, because it is sent again under the same id.
 *
 *     const session = new RealtimeSession();
 *     session.connect();
 *     for await (const event of session.respond("Hello")) {
 *       if (event.type === "response.output_text.delta") show(event.delta);
 *     }
 */

import { Connection } from "./realtime/connection.js";
import { MessageTooLarge, QueueFull, RealtimeError, SessionClosed } from "./realtime/errors.js";
import { fetched } from "./realtime/event_stream.js";
import { Outbox } from "./realtime/outbox.js";
import { SessionState } from "./realtime/state.js";
import { EventQueue, ResponseStream, TaskStream } from "./realtime/stream.js";

// Not `export … from`: the types that are made of this would lack what they use themselves.
export { MessageTooLarge, QueueFull, RealtimeError, ResponseStream, SessionClosed, TaskStream };

/** @typedef {import("./realtime/messages.js").ServerEvent} ServerEvent */
/** @typedef {import("./realtime/messages.js").ClientMessage} ClientMessage */
/** @typedef {import("./realtime/state.js").Answer} Answer */
/** @typedef {import("./realtime/state.js").Task} Task */

/**
 * @typedef {object} SessionOptions
 * @property {string | URL} [url] the server's address, or its endpoint `…/v1/realtime`; default the page's own host
 * @property {string | null} [sessionId] the session to attach to; without it a new one is made
 * @property {"all" | "none"} [history] whether a first attach replays the session; default `all`
 * @property {number} [deltaIntervalMs] shortest time between two frames of one answer; default 0
 * @property {string | (() => string | Promise<string>)} [token] a bearer token, or what gets a fresh one: called for each
 *   connection, and before a token expires
 * @property {"auto" | "websocket" | "sse"} [transport] default `auto`: server-sent events where WebSockets are blocked
 * @property {number} [maxUnanswered] how many commands may wait for the server's answer; default and most 1000
 * @property {number} [maxMessageBytes] the largest command, as JSON in UTF-8, that the server takes; default 65536
 */

/**
 * What is dispatched: each event of the server by its type, and the session's own.
 * @typedef {{[Type in ServerEvent["type"]]: Extract<ServerEvent, {type: Type}>} & {
 *   event: ServerEvent,
 *   open: import("./realtime/messages.js").SessionCreated | import("./realtime/messages.js").SessionResumed,
 *   disconnect: {code: number, reason: string, reconnectInMs: number, cause?: unknown},
 *   closed: {code: number, reason: string},
 * }} SessionEvents
 */

/** The server remembers so many command ids: to repeat an older command could carry it out twice. */
const MAX_UNANSWERED = 1_000;
/** What a server takes that was not told otherwise. */
const MAX_MESSAGE_BYTES = 65_536;

/**
 * An id with 128 random bits. Not `crypto.randomUUID`, which plain-http pages on a network lack.
 * @param {string} prefix
 */
export function newId(prefix) {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return `${prefix}_${Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("")}`;
}

/**
 * One session. Every server event is dispatched by its type and once more as `event`, each time a CustomEvent
 * with the event in `detail`; and besides:
 *
 * - `open`: attached, first or again; the detail is `session.created` or `session.resumed`.
 * - `disconnect`: `{code, reason, reconnectInMs}`; it will be back. `cause` is what the function `token` threw, where
 *   there was none to show.
 * - `closed`: `{code, reason}`; it won't, and "Close codes" of the protocol says why.
 *
 * It can be iterated, too: all events from then on, until it is closed. Where another code than 1000 closes it the
 * loop throws `SessionClosed`.
 */
export class RealtimeSession extends EventTarget {
  #options;
  #state;
  #outbox;
  #connection;
  /** By the id of their response or task. @type {Map<string, ResponseStream | TaskStream>} */
  #streams = new Map();
  /** Of the loops over the whole session. @type {Set<EventQueue>} */
  #queues = new Set();
  /** Answers that were stopped at what was heard of them: nothing more is heard. @type {Set<string>} */
  #silenced = new Set();
  /** @type {SessionClosed | undefined} */
  #closed;

  /** @param {SessionOptions} [options] */
  constructor(options = {}) {
    super();
    this.#options = options;
    this.#state = new SessionState(options.sessionId ?? null, options.history);
    const { maxUnanswered = MAX_UNANSWERED, maxMessageBytes = MAX_MESSAGE_BYTES } = options;
    this.#outbox = new Outbox(Math.min(maxUnanswered, MAX_UNANSWERED), maxMessageBytes);
    this.#connection = new Connection(options, {
      resumption: () => this.#resumption(),
      event: (event) => this.#receive(event),
      settled: (eventId) => this.#outbox.settle(eventId),
      lost: (code, reason, reconnectInMs, cause) => {
        this.#dispatch("disconnect", { code, reason, reconnectInMs, ...(cause === undefined ? {} : { cause }) });
      },
      ended: (code, reason) => this.#ended(code, reason),
    });
  }

  /** The session's id, once there is one. */
  get sessionId() {
    return this.#state.sessionId;
  }

  /** @returns {"idle" | "connecting" | "open" | "waiting" | "closed"} */
  get state() {
    return this.#connection.state;
  }

  /** What carries the connection, or did last. @returns {"websocket" | "sse" | null} */
  get transport() {
    return this.#connection.transport;
  }

  /** Channel → last event applied, of the session and of every channel that has not ended. */
  get positions() {
    return this.#state.positions;
  }

  /** The answers, by id. */
  get responses() {
    return this.#state.responses;
  }

  /** The background tasks, by id. */
  get tasks() {
    return this.#state.tasks;
  }

  /** Connection id → who looks at the session now. */
  get participants() {
    return this.#state.participants;
  }

  /** The answers that wait or run. */
  get unfinished() {
    return [...this.responses.values()].filter(({ id }) => this.positions.has(id));
  }

  /** Opens the connection and keeps it until `close()`. Does nothing while there is one. */
  connect() {
    if (this.state !== "idle" && this.state !== "closed") return;
    this.#closed = undefined;
    this.#connection.open();
  }

  /**
   * Leaves the session for good. It lives on at the server; `send({type: "session.close"})` ends it. What was sent over
   * an open connection still goes out, for 2 s at most.
   */
  close() {
    if (this.state !== "closed") this.#connection.leave();
  }

  /** Cuts the connection as a lost network would, and comes back after so many milliseconds. */
  drop(reconnectInMs = 0) {
    if (this.state === "connecting" || this.state === "open") this.#connection.lose(1006, "dropped", reconnectInMs);
  }

  /**
   * Sends a command now, or after the reconnect, and is carried out once either way.
   * Throws `QueueFull` where too many wait already, `MessageTooLarge`, and `SessionClosed`; `TypeError` where it has no
   * `type`.
   * @param {ClientMessage} message
   * @returns {string} the command's `event_id`, which its effects name as `for_event_id`
   */
  send(message) {
    if (this.#closed) throw this.#closed;
    if (typeof message.type !== "string") throw new TypeError("a message has a type, such as session.update");
    const command = { ...message, event_id: message.event_id ?? newId("evt") };
    this.#outbox.add(command);
    this.#connection.send(command);
    return command.event_id;
  }

  /**
   * Says something as the user and asks for an answer, which can be iterated. Throws as `send` does.
   * @param {string} text
   * @param {Omit<import("./realtime/messages.js").ResponseCreate, "type" | "input">} [options] other fields of
   *   `response.create`, such as `multitask_strategy`
   */
  respond(text, options = {}) {
    const responseId = options.response_id ?? newId("resp");
    const eventId = this.send({ type: "response.create", response_id: responseId, input: text, ...options });
    const stream = new ResponseStream(this, eventId, responseId);
    this.#streams.set(responseId, stream);
    return stream;
  }

  /**
   * Stops an answer. Of one that is voiced the conversation keeps what was heard: `heardChars`, or else what
   * `heard()` was told last. Does nothing where the answer has ended and nothing is known to be heard of it.
   * @param {string} responseId
   * @param {{heardChars?: number}} [options]
   */
  cancel(responseId, { heardChars = this.responses.get(responseId)?.heardChars } = {}) {
    const done = this.responses.has(responseId) && !this.positions.has(responseId);
    if (done && heardChars === undefined) return;
    if (heardChars !== undefined) this.#silenced.add(responseId);
    this.send({ type: "response.cancel", response_id: responseId, heard_chars: heardChars });
  }

  /**
   * Notes that the listener has heard the answer up to here, counted from its start as `String.length` counts; nothing
   * is sent. What comes after the answer was stopped is void.
   * @param {string} responseId
   * @param {number} chars
   */
  heard(responseId, chars) {
    const answer = this.responses.get(responseId);
    if (answer && !this.#silenced.has(responseId)) answer.heardChars = Math.max(chars, answer.heardChars ?? 0);
  }

  /** Stops whatever is being written or voiced: every answer that has not ended, or was not heard to its end. */
  interrupt() {
    for (const { id, text, heardChars = text.length } of this.responses.values()) {
      const isVoiced = heardChars < text.length && !this.#silenced.has(id);
      if (this.positions.has(id) || isVoiced) this.cancel(id);
    }
  }

  /**
   * Starts a background task, whose events can be iterated. Throws as `send` does.
   * @param {string} name
   * @param {any} input what it has to be the task says
   */
  createTask(name, input) {
    const taskId = newId("task");
    const stream = new TaskStream(this, this.send({ type: "task.create", task_id: taskId, name, input }), taskId);
    this.#streams.set(taskId, stream);
    return stream;
  }

  /** Stops a task. @param {string} taskId */
  cancelTask(taskId) {
    const task = this.tasks.get(taskId);
    if (!task || this.positions.has(taskId)) this.send({ type: "task.cancel", task_id: taskId });
  }

  /** Gets a result that is too large for an event. Throws `RealtimeError`. @param {string} resultUrl @returns {Promise<any>} */
  async fetchResult(resultUrl) {
    const token = await this.#connection.token();
    const { origin, pathname } = this.#connection.url;
    const base = origin.replace(/^ws/, "http") + pathname.replace(/\/v1\/realtime$/, ""); // it may be below a path
    return fetched(base + resultUrl, token);
  }

  /**
   * @template {keyof SessionEvents} Type
   * @param {Type} type
   * @param {((event: CustomEvent<SessionEvents[Type]>) => void) | EventListenerObject | null} listener
   * @param {boolean | AddEventListenerOptions} [options]
   */
  addEventListener(type, listener, options) {
    super.addEventListener(type, /** @type {EventListener} */ (listener), options);
  }

  /** @returns {AsyncGenerator<ServerEvent, void, undefined>} */
  [Symbol.asyncIterator]() {
    const queue = new EventQueue(() => this.#queues.delete(queue));
    this.#queues.add(queue);
    if (this.#closed) queue.finish(this.#closed.closeCode === 1000 ? undefined : this.#closed);
    return queue[Symbol.asyncIterator]();
  }

  #resumption() {
    const { deltaIntervalMs } = this.#options;
    const query = this.#state.resumption();
    if (deltaIntervalMs) query.push(`delta_interval_ms=${deltaIntervalMs}`);
    return { sessionId: this.sessionId, query };
  }

  /** @param {any} event */
  #receive(event) {
    if (!this.#state.advance(event)) return this.#connection.lose(1006, "gap");
    this.#outbox.settle(event.for_event_id);
    this.#state.fold(event);
    this.#heed(event);
    this.#dispatch(event.type, event);
    this.#dispatch("event", event);
    for (const queue of this.#queues) queue.push(event);
    if (event.type === "session.created" || event.type === "session.resumed") this.#opened(event);
  }

  /** What an event has the client do beside what it tells. @param {ServerEvent} event */
  #heed(event) {
    switch (event.type) {
      case "session.going_away": // the next instance goes on where this one is
        this.#connection.leaveIn(event.reconnect_after_ms, "going away");
        break;
      case "auth.expiring": this.#connection.refresh(); break;
      case "error": this.#refused(event.error); break;
      case "response.created": this.#streams.get(event.response.id)?.take(event, false); break;
      case "task.created": this.#streams.get(event.task.id)?.take(event, false); break;
      case "response.done": this.#channelEnded(event.response_id, event); break;
      case "task.done": this.#channelEnded(event.task_id, event); break;
      default: this.#passOn(event);
    }
  }

  /** @param {any} event */
  #passOn(event) {
    this.#streams.get(event.response_id ?? event.task_id)?.take(event, false);
  }

  /** @param {string} channel @param {ServerEvent} event */
  #channelEnded(channel, event) {
    this.#outbox.settleCancels(channel);
    this.#streams.get(channel)?.take(event, true);
    this.#streams.delete(channel);
  }

  /** @param {import("./realtime/messages.js").ErrorBody} error */
  #refused(error) {
    this.#outbox.settle(error.event_id);
    this.#connection.retryAfterMs = error.retry_after_ms ?? 0;
    for (const [id, stream] of this.#streams) {
      if (stream.eventId !== error.event_id) continue;
      stream.fail(new RealtimeError(error));
      this.#streams.delete(id);
    }
  }

  /** What `open`'s listeners send goes before what waited for the connection. @param {ServerEvent} event */
  #opened(event) {
    if (!this.#connection.attached()) return; // a listener has closed it
    const waiting = this.#outbox.waiting;
    this.#dispatch("open", event);
    for (const command of waiting) this.#connection.send(command);
  }

  /** @param {number} code @param {string} reason */
  #ended(code, reason) {
    this.#closed = new SessionClosed(code, reason);
    for (const stream of this.#streams.values()) stream.fail(this.#closed);
    for (const queue of this.#queues) queue.finish(code === 1000 ? undefined : this.#closed);
    this.#streams.clear();
    this.#outbox.clear(); // whoever sent them was told so: a later `connect` must not carry them out
    this.#dispatch("closed", { code, reason });
  }

  /** @param {string} type @param {any} detail */
  #dispatch(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}
