// What of a browser the client needs, under the tests' control: the network, the clock and chance.

import { webcrypto } from "node:crypto";

// Node 18 has neither.
globalThis.crypto ??= webcrypto;
globalThis.CustomEvent ??= class CustomEvent extends Event {
  constructor(type, { detail }) {
    super(type);
    this.detail = detail;
  }
};

// Here, as an import would come before what is put in its place above.
export const {
  MessageTooLarge, QueueFull, RealtimeError, RealtimeSession, SessionClosed, newId,
} = await import("../../static/realtime.js");

/** A WebSocket whose other end is the test. */
class FakeSocket {
  sent = [];
  closed = false;

  constructor(url, protocols) {
    this.url = new URL(url);
    this.protocols = protocols;
    FakeSocket.made.push(this);
  }

  send(text) {
    this.sent.push(JSON.parse(text));
  }

  close() {
    this.closed = true;
  }

  /** The server sends an event. */
  deliver(event) {
    this.onmessage({ data: JSON.stringify(event) });
  }

  /** Something comes that may be no event. */
  receive(data) {
    this.onmessage({ data });
  }

  /** The connection ends, by the server or on the way. */
  lose(code, reason = "") {
    this.onclose({ code, reason });
  }

  /** The server's first frame. */
  attach(more = {}) {
    this.onopen();
    const type = this.url.searchParams.has("session_id") ? "session.resumed" : "session.created";
    const session = { id: this.url.searchParams.get("session_id") ?? "sess_1" };
    this.deliver({ type, session, connection_id: "conn_1", positions: { session: 0 }, participants: [], ...more });
  }

  get after() {
    return this.url.searchParams.get("after");
  }
}

/** Time that passes when the test says so. */
class FakeClock {
  now = 1_000_000;
  timers = new Map();
  #last = 0;

  set(callback, delayMs, everyMs) {
    this.#last += 1;
    this.timers.set(this.#last, { callback, at: this.now + delayMs, everyMs });
    return this.#last;
  }

  /** Lets so many milliseconds pass, and what became due, in its order. */
  async pass(ms) {
    const until = this.now + ms;
    for (;;) {
      const [id, next] = [...this.timers].sort((a, b) => a[1].at - b[1].at)[0] ?? [];
      if (!next || next.at > until) break;
      this.now = next.at;
      if (next.everyMs) next.at += next.everyMs;
      else this.timers.delete(id);
      next.callback();
      await settle();
    }
    this.now = until;
  }
}

/** Lets pending promises run. */
export async function settle() {
  for (let turn = 0; turn < 10; turn += 1) await null;
}

/** A stream of server-sent events whose other end is the test. */
class FakeStream {
  #bytes;

  constructor() {
    const body = new ReadableStream({ start: (bytes) => { this.#bytes = bytes; } });
    this.response = new Response(body, { headers: { "content-type": "text/event-stream" } });
  }

  /** The server sends bytes. */
  write(text) {
    this.#bytes.enqueue(typeof text === "string" ? new TextEncoder().encode(text) : text);
  }

  /** The server sends an event. */
  deliver(event) {
    this.write(`event: ${event.type}\ndata: ${JSON.stringify(event)}\n\n`);
  }

  end() {
    this.#bytes.close();
  }
}

let port = 10_000;

/**
 * A page at `href`, for one test: `browser.sockets`, `browser.requests` (those of `fetch`, which fails unless
 * `browser.answer` is set), `browser.clock`, and `browser.random`, what chance gives. By default each has a host of its
 * own, as what a client has learnt of one it remembers.
 * @param {import("node:test").TestContext} test
 */
export function browserFor(test, href = `http://127.0.0.1:${port += 1}/`) {
  const clock = new FakeClock();
  const browser = {
    clock,
    sockets: [],
    requests: [],
    random: 0.5,
    answer: () => { throw new TypeError("the network is away"); },
    stream: () => new FakeStream(),
  };
  FakeSocket.made = browser.sockets;
  const fakes = {
    WebSocket: FakeSocket,
    location: new URL(href),
    fetch: async (url, { method = "GET", headers = {}, body } = {}) => {
      const request = { method, url: new URL(url), headers, body: body && JSON.parse(body) };
      browser.requests.push(request);
      return browser.answer(request);
    },
    setTimeout: (callback, ms) => clock.set(callback, ms),
    setInterval: (callback, ms) => clock.set(callback, ms, ms),
    clearTimeout: (id) => clock.timers.delete(id),
    clearInterval: (id) => clock.timers.delete(id),
  };
  const real = Object.fromEntries(Object.keys(fakes).map((name) => [name, globalThis[name]]));
  const { now } = Date;
  const { random } = Math;
  Object.assign(globalThis, fakes);
  Date.now = () => clock.now;
  Math.random = () => browser.random;
  test.after(() => {
    Object.assign(globalThis, real);
    Date.now = now;
    Math.random = random;
  });
  return browser;
}

/** Collects what a session dispatches of these types: a list of `[type, detail]`. */
export function listen(session, ...types) {
  const told = [];
  for (const type of types) session.addEventListener(type, ({ detail }) => told.push([type, detail]));
  return told;
}
