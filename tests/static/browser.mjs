// What of a browser the client needs, under the tests' control: the network, the clock and chance.

import { readFile } from "node:fs/promises";
import { webcrypto } from "node:crypto";

// Node 18 has neither.
globalThis.crypto ??= webcrypto;
globalThis.CustomEvent ??= class CustomEvent extends Event {
  constructor(type, { detail }) {
    super(type);
    this.detail = detail;
  }
};

// By its text: without a package.json beside it an older Node takes a .js file for CommonJS.
const source = await readFile(new URL("../../static/realtime.js", import.meta.url), "utf8");
export const { RealtimeSession, newId } = await import(`data:text/javascript,${encodeURIComponent(source)}`);

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

  /** The connection ends, by the server or on the way. */
  lose(code, reason = "") {
    this.onclose({ code, reason });
  }

  /** The server's first frame. */
  attach(more = {}) {
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

/**
 * A page at `href`, for one test: `browser.sockets`, `browser.clock`, and `browser.random`, what chance gives.
 * @param {import("node:test").TestContext} test
 */
export function browserFor(test, href = "http://127.0.0.1:8000/") {
  const clock = new FakeClock();
  const browser = { clock, sockets: [], random: 0.5 };
  FakeSocket.made = browser.sockets;
  const fakes = {
    WebSocket: FakeSocket,
    location: new URL(href),
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
