/** Keeps a connection open until it is told otherwise: chooses the transport, comes back, knows when not to. */

import { EventStreamTransport } from "./event_stream.js";
import { Sender } from "./sender.js";
import { WebSocketTransport } from "./websocket.js";

/** @typedef {import("./websocket.js").Target} Target */
/** @typedef {"idle" | "connecting" | "open" | "waiting" | "closed"} State */

/**
 * What a connection asks for and tells.
 * @typedef {object} Owner
 * @property {() => Pick<Target, "sessionId" | "query">} resumption where the next connection goes on
 * @property {(event: any) => void} event
 * @property {(eventId: string) => void} settled
 * @property {(code: number, reason: string, reconnectInMs: number, cause: unknown) => void} lost it will be back
 * @property {(code: number, reason: string) => void} ended it won't
 */

const ENDPOINT = "/v1/realtime";
const LOST = 1006;
const TOKEN_REFUSED = 4401;
const LIMITED = 4429;
const RECONNECT_CODES = new Set([1001, 1005, 1006, 1011, 1012, 1013, 4408, 4429]);
const BACKOFF_FIRST_MS = 250;
const BACKOFF_LAST_MS = 10_000;
/** A connection that held for so long starts the backoff anew; a server that accepts and drops does not. */
const STEADY_MS = 5_000;
/** How often to look whether anything came: the second time that nothing did, ping; the third time, leave. */
const HEARTBEAT_MS = 15_000;
/** A WebSocket whose first event takes longer is taken to be blocked. */
const OPEN_MS = 10_000;
/** After so many in a row that did not open, it is asked anew whether WebSockets get through. */
const DOUBTFUL = 3;
/** What may stand in the name of a subprotocol. */
const TOKEN = /^[\w.~+-]+$/;

/** Whether WebSockets get through to a host: what this page has learnt. @type {Map<string, boolean>} */
const webSocketsPass = new Map();

export class Connection {
  /** @type {State} */
  state = "idle";
  /** How long the last error said to wait. */
  retryAfterMs = 0;
  /** @type {"websocket" | "sse" | null} */
  transport = null;

  #options;
  #owner;
  /** @type {Sender | null} */
  #sender = null;
  /** Counts connections: what one of an earlier turn still tells is void. */
  #turn = 0;
  #failures = 0;
  /** WebSockets in a row that did not open. */
  #unopened = 0;
  /** What getting a token failed with. @type {unknown} */
  #tokenError;
  /** What this connection was opened with. @type {string | undefined} */
  #shown;
  /** A token for the next connection. @type {string | undefined} */
  #fresh;
  #online = () => this.open();
  #openedAt = 0;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #timer;
  /** @type {{timer?: ReturnType<typeof setInterval>, silentFor: number}} */
  #heartbeat = { silentFor: 0 };

  /** @param {import("../realtime.js").SessionOptions} options @param {Owner} owner */
  constructor(options, owner) {
    this.#options = options;
    this.#owner = owner;
  }

  /** The endpoint; what is given may be the server's address. */
  get url() {
    const url = new URL(this.#options.url ?? ENDPOINT, globalThis.location?.href);
    const path = url.pathname.replace(/\/+$/, "");
    url.pathname = path.endsWith(ENDPOINT) ? path : path + ENDPOINT;
    return url;
  }

  /** Opens one by whatever gets through. */
  open() {
    this.#stopWaiting();
    const { transport = "auto" } = this.#options;
    const isBlocked = webSocketsPass.get(this.url.host) === false || !globalThis.WebSocket;
    this.#open(transport === "auto" ? (isBlocked ? "sse" : "websocket") : transport);
  }

  /** The first event is here: from now on commands go out. False where it was left meanwhile. */
  attached() {
    if (!this.#sender) return false;
    this.state = "open";
    this.#openedAt = Date.now();
    if (this.transport === "sse" && this.#isUndecided()) webSocketsPass.set(this.url.host, false);
    return true;
  }

  /** Does nothing while there is none. @param {Record<string, any>} command */
  send(command) {
    if (this.state === "open") this.#sender?.send(command);
  }

  /** No token where getting one fails, or it is none: the server then refuses, and the next try asks again. */
  async token() {
    const { token } = this.#options;
    const given = typeof token === "function" ? await this.#ask(token) : token;
    return given && TOKEN.test(given) ? given : undefined;
  }

  /** @param {() => string | Promise<string>} token */
  async #ask(token) {
    this.#tokenError = undefined;
    try {
      return await token();
    } catch (error) {
      this.#tokenError = error;
      return undefined;
    }
  }

  /** Replaces a token that will expire, if there is a way to get another. An open stream can be shown none: the next is. */
  async refresh() {
    if (typeof this.#options.token !== "function") return;
    const turn = this.#turn;
    const token = await this.token();
    if (!token || turn !== this.#turn) return;
    if (this.transport === "websocket") return this.send({ type: "auth.refresh", token });
    if (token === this.#shown) return; // there is no other yet
    this.#fresh = token;
    this.lose(LOST, "new token", 0);
  }

  /** Leaves after so many milliseconds, and comes back at once. @param {number} delayMs @param {string} reason */
  leaveIn(delayMs, reason) {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.lose(1001, reason, 0), delayMs);
  }

  /**
   * The connection is lost, or is to be: what its code means is done.
   * @param {number} code @param {string} reason @param {number} [reconnectInMs] default: by the backoff
   * @param {number} [retryAfterMs] is added to that
   */
  lose(code, reason, reconnectInMs, retryAfterMs = 0) {
    const freshToken = code === TOKEN_REFUSED && typeof this.#options.token === "function";
    if (!RECONNECT_CODES.has(code) && !freshToken) return this.end(code, reason);
    this.#detach();
    const delayMs = reconnectInMs ?? this.#delay(code) + retryAfterMs;
    this.state = "waiting";
    this.#timer = setTimeout(() => this.open(), delayMs);
    // Where the network was away it is worth no waiting any more. Node tells nothing of it.
    if (code !== LIMITED) globalThis.addEventListener?.("online", this.#online);
    this.#owner.lost(code, reason, delayMs, code === TOKEN_REFUSED ? this.#tokenError : undefined);
  }

  /** Leaves for good, after what was sent. */
  leave() {
    const sender = this.state === "open" ? this.#sender : null;
    if (sender) this.#sender = null; // not to be cut
    this.end(1000, "left");
    sender?.leave();
  }

  /** It is over, at once. @param {number} code @param {string} reason */
  end(code, reason) {
    this.#detach();
    this.state = "closed";
    this.#owner.ended(code, reason);
  }

  /** @param {"websocket" | "sse"} transport */
  async #open(transport) {
    const turn = ++this.#turn;
    this.state = "connecting";
    this.transport = transport;
    this.#heartbeat = { timer: setInterval(() => this.#beat(), HEARTBEAT_MS), silentFor: 0 };
    const token = this.#fresh ?? (await this.token());
    if (turn !== this.#turn) return;
    this.#fresh = undefined;
    this.#shown = token;
    const target = { url: this.url, token, ...this.#owner.resumption() };
    try {
      const listener = transport === "sse" ? this.#listener(turn) : this.#webSocketListener(turn);
      this.#sender = new Sender(new (transport === "sse" ? EventStreamTransport : WebSocketTransport)(target, listener));
    } catch {
      this.#failed(LOST, "could not be opened"); // a page may be forbidden to make one
    }
  }

  /** @param {number} turn @returns {import("./websocket.js").Listener} */
  #webSocketListener(turn) {
    let passes = false;
    this.#timer = setTimeout(() => this.#failed(LOST, "nothing came"), OPEN_MS);
    const listener = this.#listener(turn);
    return {
      ...listener,
      event: (event) => {
        if (!passes && turn === this.#turn) this.#passed();
        passes = true;
        listener.event(event);
      },
      closed: (code, reason) => {
        if (turn !== this.#turn) return;
        if (passes || code !== LOST) this.lose(code, reason);
        else this.#failed(code, reason);
      },
    };
  }

  /** Not before its first event: there are networks that let the upgrade pass, and nothing after it. */
  #passed() {
    this.#unopened = 0;
    clearTimeout(this.#timer);
    webSocketsPass.set(this.url.host, true);
  }

  /** @param {number} turn @returns {import("./websocket.js").Listener} */
  #listener(turn) {
    return {
      alive: () => { if (turn === this.#turn) this.#heartbeat.silentFor = 0; },
      event: (event) => { if (turn === this.#turn) this.#owner.event(event); },
      settled: (eventId) => { if (turn === this.#turn) this.#owner.settled(eventId); },
      closed: (code, reason, retryAfterMs) => {
        if (turn === this.#turn) this.lose(code, reason, undefined, retryAfterMs);
      },
    };
  }

  /**
   * A WebSocket by which nothing came: the server is away, or something on the way lets none through. The
   * other transport, tried at once, tells which; and what the server would have refused it for.
   * @param {number} code @param {string} reason
   */
  #failed(code, reason) {
    this.#unopened += 1;
    if (this.#unopened >= DOUBTFUL && this.#isAuto) webSocketsPass.delete(this.url.host);
    if (!this.#isUndecided()) return this.lose(code, reason);
    this.#detach();
    return this.#open("sse");
  }

  get #isAuto() {
    return (this.#options.transport ?? "auto") === "auto";
  }

  #isUndecided() {
    return this.#isAuto && !webSocketsPass.has(this.url.host);
  }

  /** A page can't send WebSocket pings, and sees a dead peer only after minutes: hence a ping of our own. */
  #beat() {
    this.#heartbeat.silentFor += 1;
    if (this.#heartbeat.silentFor > 2) return this.lose(LOST, this.#sender ? "silent" : "no token");
    // An event stream has comments of its own.
    if (this.#heartbeat.silentFor === 2 && this.transport === "websocket") this.send({ type: "ping" });
  }

  /** Jittered, so that the thousand clients of a lost server don't come back as one. @param {number} code */
  #delay(code) {
    const wasSteady = this.#openedAt && Date.now() - this.#openedAt >= STEADY_MS;
    const power = wasSteady ? 0 : this.#failures;
    this.#failures = power + 1;
    this.#openedAt = 0;
    const longest = Math.min(BACKOFF_LAST_MS, BACKOFF_FIRST_MS * 2 ** power);
    const atLeast = code === LIMITED ? this.retryAfterMs : 0;
    this.retryAfterMs = 0;
    return longest * (0.5 + Math.random() / 2) + atLeast;
  }

  /** Forgets the transport at once: a dead one's close handshake would take a minute. */
  #detach() {
    this.#turn += 1;
    this.#stopWaiting();
    clearInterval(this.#heartbeat.timer);
    this.#sender?.close();
    this.#sender = null;
  }
  #stopWaiting() {
    clearTimeout(this.#timer);
    globalThis.removeEventListener?.("online", this.#online);
  }
}
