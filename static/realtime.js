/**
 * The browser client of a realtime server: one session over a WebSocket that comes back by itself.
 *
 * What makes that safe is the `positions` map: the number of the last event applied, per channel. After any
 * loss of the connection it alone says where to go on, so an answer continues at the character where it was
 * cut, and a command that was under way is carried out once, because it is sent again under the same id.
 *
 *     const session = new RealtimeSession();
 *     session.addEventListener("response.output_text.delta", ({ detail }) => show(detail.delta));
 *     session.connect();
 *     session.respond("Hello");
 */

/**
 * A message of the server; `type` says which, docs/protocol.md says what else is in it.
 * @typedef {{type: string, seq?: number, merged?: number, reset?: boolean, replay?: boolean,
 *   response_id?: string, task_id?: string, for_event_id?: string} & Record<string, any>} ServerEvent
 */

/**
 * An answer so far. `status`: `queued`, `in_progress`, `completed`, `cancelled`, `failed` or `incomplete`.
 * @typedef {{id: string, status: string, text: string, reasoning: string}} Answer
 */

/**
 * @typedef {object} SessionOptions
 * @property {string | URL} [url] the endpoint; default `/v1/realtime` on the page's own host
 * @property {string | null} [sessionId] the session to attach to; without it a new one is made
 * @property {"all" | "none"} [history] whether a first attach replays the session; default `all`
 * @property {number} [deltaIntervalMs] shortest time between two frames of one answer; default 0
 * @property {string | (() => string | Promise<string>)} [token] a bearer token, or what gets a fresh one
 */

const SUBPROTOCOL = "realtime.v1";
const BACKOFF_FIRST_MS = 250;
const BACKOFF_LAST_MS = 10_000;
/** A connection that held for so long starts the backoff anew; a server that accepts and drops does not. */
const STEADY_MS = 5_000;
/** How often to look whether anything came: the second time that nothing did, ping; the third time, leave. */
const HEARTBEAT_MS = 15_000;
/** The server remembers so many command ids: to repeat an older command could carry it out twice. */
const MAX_UNANSWERED = 1_000;
const TOKEN_CODE = 4401;
/** What may stand in the name of a subprotocol. */
const TOKEN = /^[\w.~+-]+$/;
const LIMIT_CODE = 4429;
const RECONNECT_CODES = new Set([1001, 1005, 1006, 1011, 1012, 1013, 4408, LIMIT_CODE]);
/** Commands about one connection: void on the next one. */
const CONNECTION_COMMANDS = new Set(["ping", "auth.refresh"]);

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
 * - `disconnect`: `{code, reason, reconnectInMs}`; it will be back.
 * - `closed`: `{code, reason}`; it won't, and section 5 of the protocol says why.
 */
export class RealtimeSession extends EventTarget {
  /** @type {string | null} */
  sessionId;
  /** @type {"idle" | "connecting" | "open" | "waiting" | "closed"} */
  state = "idle";
  /** Channel → last event applied. A Map, as `__proto__` is a legal id. @type {Map<string, number>} */
  positions = new Map();
  /** @type {Map<string, Answer>} */
  responses = new Map();
  /** Connection id → who looks at the session now. @type {Map<string, Record<string, any>>} */
  participants = new Map();

  /** @type {SessionOptions} */
  #options;
  /** @type {WebSocket | null} */
  #socket = null;
  /** Counts connections: what a socket of an earlier turn still delivers is void. */
  #turn = 0;
  /** Commands not answered yet, by id: the next connection gets them again. @type {Map<string, any>} */
  #unanswered = new Map();
  #backoff = { failures: 0, openedAt: 0, retryAfterMs: 0 };
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #timer;
  /** @type {{timer?: ReturnType<typeof setInterval>, silentFor: number}} */
  #heartbeat = { silentFor: 0 };

  /** @param {SessionOptions} [options] */
  constructor(options = {}) {
    super();
    this.#options = options;
    this.sessionId = options.sessionId ?? null;
  }

  /** Opens the connection and keeps it until `close()`. Does nothing while there is one. */
  connect() {
    if (this.state === "idle" || this.state === "closed") this.#open();
  }

  /** Leaves the session for good. It lives on at the server; `send({type: "session.close"})` ends it. */
  close() {
    if (this.state !== "closed") this.#stop(1000, "left");
  }

  /** Cuts the connection as a lost network would, and comes back after so many milliseconds. */
  drop(reconnectInMs = 0) {
    if (this.#socket) this.#disconnected(1006, "dropped", reconnectInMs);
  }

  /**
   * Sends a command now, or after the reconnect, and is carried out once either way.
   * @param {{type: string, event_id?: string} & Record<string, any>} message
   * @returns {string} the command's `event_id`, which its effects name as `for_event_id`
   */
  send(message) {
    if (this.state === "closed") throw new Error("the session's connection was closed for good");
    const eventId = message.event_id ?? newId("evt");
    const command = { ...message, event_id: eventId };
    if (!CONNECTION_COMMANDS.has(command.type)) this.#unanswered.set(eventId, command);
    const [oldest] = this.#unanswered.keys();
    if (this.#unanswered.size > MAX_UNANSWERED) this.#unanswered.delete(oldest);
    if (this.state === "open") this.#socket?.send(JSON.stringify(command));
    return eventId;
  }

  /**
   * Says something as the user and asks for an answer.
   * @param {string} text
   * @param {Record<string, any>} [options] other fields of `response.create`, such as `multitask_strategy`
   * @returns {{responseId: string, eventId: string}}
   */
  respond(text, options = {}) {
    const responseId = newId("resp");
    const eventId = this.send({ type: "response.create", response_id: responseId, input: text, ...options });
    return { responseId, eventId };
  }

  /**
   * Stops an answer. With `heardChars` (voice; counted as `String.length` does) only so much of it is kept.
   * @param {string} responseId
   * @param {{heardChars?: number}} [options]
   */
  cancel(responseId, { heardChars } = {}) {
    const done = this.responses.has(responseId) && !this.positions.has(responseId);
    if (done && heardChars === undefined) return;
    this.send({ type: "response.cancel", response_id: responseId, heard_chars: heardChars });
  }

  /** The answers that wait or run. */
  get unfinished() {
    return [...this.responses.values()].filter(({ id }) => this.positions.has(id));
  }

  async #open() {
    const turn = ++this.#turn;
    this.state = "connecting";
    this.#heartbeat = { timer: setInterval(() => this.#beat(), HEARTBEAT_MS), silentFor: 0 };
    const token = await this.#token();
    if (turn !== this.#turn) return;
    const socket = new WebSocket(this.#address(), token ? [SUBPROTOCOL, `bearer.${token}`] : [SUBPROTOCOL]);
    socket.onmessage = ({ data }) => { if (turn === this.#turn) this.#receive(JSON.parse(data)); };
    socket.onclose = ({ code, reason }) => { if (turn === this.#turn) this.#disconnected(code, reason); };
    this.#socket = socket;
  }

  /** No token where getting one fails, or it is none: the server then answers 4401, and the next try asks again. */
  async #token() {
    const { token } = this.#options;
    const given = typeof token === "function" ? await Promise.resolve().then(token).catch(() => undefined) : token;
    return given && TOKEN.test(given) ? given : undefined;
  }

  #address() {
    const { url = "/v1/realtime", history, deltaIntervalMs } = this.#options;
    const query = [];
    if (this.sessionId) query.push(`session_id=${encodeURIComponent(this.sessionId)}`);
    const positions = [...this.positions].map(([channel, position]) => `${channel}:${position}`);
    if (positions.length) query.push(`after=${positions.join(",")}`);
    else if (history) query.push(`history=${history}`);
    if (deltaIntervalMs) query.push(`delta_interval_ms=${deltaIntervalMs}`);
    const address = new URL(url, globalThis.location?.href);
    address.protocol = address.protocol.replace("http", "ws");
    address.search = query.join("&");
    return address;
  }

  /** A page can't send WebSocket pings, and sees a dead peer only after minutes: hence a ping of our own. */
  #beat() {
    this.#heartbeat.silentFor += 1;
    if (this.#heartbeat.silentFor > 2) this.#disconnected(1006, "silent");
    else if (this.#heartbeat.silentFor === 2 && this.state === "open") this.send({ type: "ping" });
  }

  /** @param {number} code @param {string} reason @param {number} [reconnectInMs] */
  #disconnected(code, reason, reconnectInMs) {
    const freshToken = code === TOKEN_CODE && typeof this.#options.token === "function";
    if (!RECONNECT_CODES.has(code) && !freshToken) return this.#stop(code, reason);
    this.#detach();
    const delayMs = reconnectInMs ?? this.#delay(code);
    this.state = "waiting";
    this.#timer = setTimeout(() => this.#open(), delayMs);
    this.#dispatch("disconnect", { code, reason, reconnectInMs: delayMs });
  }

  /** Jittered, so that the thousand clients of a lost server don't come back as one. @param {number} code */
  #delay(code) {
    const { failures, openedAt, retryAfterMs } = this.#backoff;
    const power = openedAt && Date.now() - openedAt >= STEADY_MS ? 0 : failures;
    this.#backoff = { failures: power + 1, openedAt: 0, retryAfterMs: 0 };
    const longest = Math.min(BACKOFF_LAST_MS, BACKOFF_FIRST_MS * 2 ** power);
    return longest * (0.5 + Math.random() / 2) + (code === LIMIT_CODE ? retryAfterMs : 0);
  }

  /** @param {number} code @param {string} reason */
  #stop(code, reason) {
    this.#detach();
    this.state = "closed";
    this.#dispatch("closed", { code, reason });
  }

  /** Forgets the socket at once: a dead one's close handshake would take a minute. */
  #detach() {
    this.#turn += 1;
    clearTimeout(this.#timer);
    clearInterval(this.#heartbeat.timer);
    this.#socket?.close();
    this.#socket = null;
  }

  /** @param {ServerEvent} event */
  #receive(event) {
    this.#heartbeat.silentFor = 0;
    if (!this.#advance(event)) return this.#disconnected(1006, "gap");
    if (event.for_event_id) this.#unanswered.delete(event.for_event_id);
    this.#fold(event);
    this.#dispatch(event.type, event);
    this.#dispatch("event", event);
    if (event.type === "session.created" || event.type === "session.resumed") this.#opened(event);
  }

  /** Moves the channel's position; false where events are missing. @param {ServerEvent} event */
  #advance({ seq, merged = 1, reset, response_id, task_id }) {
    if (seq === undefined) return true;
    const channel = response_id ?? task_id ?? "session";
    if (reset) this.#reset(channel);
    if (seq - merged !== (this.positions.get(channel) ?? 0)) return false;
    this.positions.set(channel, seq);
    return true;
  }

  /** What was shown of the channel was lost with its instance: it starts anew. @param {string} channel */
  #reset(channel) {
    this.positions.set(channel, 0);
    const answer = this.responses.get(channel);
    if (answer) Object.assign(answer, { text: "", reasoning: "" });
  }

  /** @param {ServerEvent} event */
  #fold(event) {
    const { type, response_id = "", task_id = "", participant } = event;
    switch (type) {
      case "session.created":
      case "session.resumed": this.#attached(event); break;
      case "session.going_away": // the next instance goes on where this one is
        clearTimeout(this.#timer);
        this.#timer = setTimeout(() => this.#disconnected(1001, "going away", 0), event.reconnect_after_ms);
        break;
      case "participant.joined": this.participants.set(participant.connection_id, participant); break;
      case "participant.left": this.participants.delete(participant.connection_id); break;
      case "response.created":
        this.#startsChannel(event.response.id);
        this.#answer(event.response.id).status = event.response.status;
        break;
      case "response.in_progress": this.#answer(response_id).status = "in_progress"; break;
      case "response.output_text.delta": this.#answer(response_id).text += event.delta; break;
      case "response.reasoning.delta": this.#answer(response_id).reasoning += event.delta; break;
      case "response.done":
        this.#answer(response_id).status = event.status;
        this.#endsChannel(response_id);
        break;
      case "task.created": this.#startsChannel(event.task.id); break;
      case "task.done": this.#endsChannel(task_id); break;
      case "auth.expiring": this.#refreshToken(); break;
      case "error": this.#refused(event.error); break;
    }
  }

  /** @param {ServerEvent} first */
  #attached({ session, participants, positions }) {
    this.sessionId = session.id;
    this.participants = new Map(participants.map((/** @type {any} */ one) => [one.connection_id, one]));
    if (this.positions.size) return;
    if (this.#options.history === "none") this.positions = new Map(Object.entries(positions));
    this.#startsChannel("session");
  }

  /** What `open`'s listeners send goes before what waited for the connection. @param {ServerEvent} event */
  #opened(event) {
    if (!this.#socket) return; // a listener has closed it
    this.state = "open";
    this.#backoff.openedAt = Date.now();
    const waiting = [...this.#unanswered.values()];
    this.#dispatch("open", event);
    for (const command of waiting) this.#socket?.send(JSON.stringify(command));
  }

  /** Without the history an answer may be met in its middle. @param {string} id */
  #answer(id) {
    const answer = this.responses.get(id) ?? { id, status: "in_progress", text: "", reasoning: "" };
    this.responses.set(id, answer);
    return answer;
  }

  /** From now on it is named when resuming, even if nothing of it came yet. @param {string} channel */
  #startsChannel(channel) {
    if (!this.positions.has(channel)) this.positions.set(channel, 0);
  }

  /** Nothing comes after it: no need to name it, no answer to a late cancel. @param {string} channel */
  #endsChannel(channel) {
    this.positions.delete(channel);
    for (const [eventId, { type, response_id, task_id, heard_chars }] of this.#unanswered) {
      const cancels = type.endsWith(".cancel") && (response_id ?? task_id) === channel;
      if (cancels && heard_chars === undefined) this.#unanswered.delete(eventId);
    }
  }

  /** @param {{event_id?: string, retry_after_ms?: number}} error */
  #refused({ event_id, retry_after_ms = 0 }) {
    if (event_id) this.#unanswered.delete(event_id);
    this.#backoff.retryAfterMs = retry_after_ms;
  }

  async #refreshToken() {
    if (typeof this.#options.token !== "function") return; // it would be the same token again
    const token = await this.#token();
    if (token && this.state === "open") this.send({ type: "auth.refresh", token });
  }

  /** @param {string} type @param {any} detail */
  #dispatch(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}
