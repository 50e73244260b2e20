// The browser client against the protocol, without a browser: every frame and every second is the test's.

import assert from "node:assert/strict";
import { test } from "node:test";

import {
  MessageTooLarge, QueueFull, RealtimeError, RealtimeSession, SessionClosed, browserFor, listen, newId, settle,
} from "./browser.mjs";

/** A session that is attached. */
async function attached(browser, options = {}) {
  const session = new RealtimeSession(options);
  session.connect();
  await settle();
  browser.sockets.at(-1).attach();
  return session;
}

const created = (id, seq) => ({ type: "response.created", seq, response: { id, status: "in_progress" } });
const delta = (response_id, seq, text, more = {}) => ({
  type: "response.output_text.delta", response_id, seq, delta: text, ...more,
});
const done = (response_id, seq, status = "completed") => ({ type: "response.done", response_id, seq, status });

// --- connecting -----------------------------------------------------------------------------------------

test("the address follows the page's own", async (t) => {
  for (const [page, address] of [
    ["http://127.0.0.1:8000/", "ws://127.0.0.1:8000/v1/realtime"],
    ["https://example.org/?q#sess_2", "wss://example.org/v1/realtime"],
  ]) {
    const browser = browserFor(t, page);
    new RealtimeSession().connect();
    await settle();
    assert.equal(browser.sockets[0].url.href, address);
    assert.deepEqual(browser.sockets[0].protocols, ["realtime.v1"]);
  }
});

test("a known session is named, and replayed as the caller wants", async (t) => {
  const browser = browserFor(t);
  new RealtimeSession({ sessionId: "sess_7", history: "none", deltaIntervalMs: 40 }).connect();
  await settle();
  assert.equal(browser.sockets[0].url.search, "?session_id=sess_7&history=none&delta_interval_ms=40");
});

test("a token is offered beside the subprotocol", async (t) => {
  const browser = browserFor(t);
  new RealtimeSession({ token: async () => "a.b.c" }).connect();
  await settle();
  assert.deepEqual(browser.sockets[0].protocols, ["realtime.v1", "bearer.a.b.c"]);
});

test("a token may be a string, or come from a function that needs no promise", async (t) => {
  const browser = browserFor(t);
  for (const token of ["a.b.c", () => "a.b.c"]) new RealtimeSession({ token }).connect();
  await settle();
  assert.deepEqual(browser.sockets.map(({ protocols }) => protocols[1]), ["bearer.a.b.c", "bearer.a.b.c"]);
});

test("what can't be a token is not offered", async (t) => {
  const browser = browserFor(t);
  for (const token of ["", "a b", "a,b", "ä.b.c", "a\n", () => undefined]) new RealtimeSession({ token }).connect();
  await settle();
  assert.equal(browser.sockets.length, 6);
  for (const { protocols } of browser.sockets) assert.deepEqual(protocols, ["realtime.v1"]);
});

test("a token is asked for anew at each connect", async (t) => {
  const browser = browserFor(t);
  const tokens = ["first", "second"];
  await attached(browser, { token: async () => tokens.shift() });
  browser.sockets[0].lose(1006);
  await browser.clock.pass(1_000);
  assert.deepEqual(browser.sockets.map(({ protocols }) => protocols[1]), ["bearer.first", "bearer.second"]);
});

test("the first frame opens the session", async (t) => {
  const browser = browserFor(t);
  const session = new RealtimeSession();
  const told = listen(session, "session.created", "open");
  session.connect();
  await settle();
  assert.equal(session.state, "connecting");
  browser.sockets[0].attach({ participants: [{ connection_id: "conn_1", user: "u" }] });
  assert.equal(session.state, "open");
  assert.equal(session.sessionId, "sess_1");
  assert.deepEqual(told.map(([type]) => type), ["session.created", "open"]);
  assert.deepEqual([...session.participants.keys()], ["conn_1"]);
});

test("connecting twice makes one connection", async (t) => {
  const browser = browserFor(t);
  const session = new RealtimeSession();
  session.connect();
  session.connect();
  await settle();
  browser.sockets[0].attach();
  session.connect();
  await settle();
  assert.equal(browser.sockets.length, 1);
});

test("participants come and go, however often it is told", async (t) => {
  const browser = browserFor(t);
  const session = await attached(browser);
  const participant = { connection_id: "conn_2", user: "u" };
  browser.sockets[0].deliver({ type: "participant.joined", participant });
  browser.sockets[0].deliver({ type: "participant.joined", participant });
  assert.deepEqual([...session.participants.keys()], ["conn_2"]);
  browser.sockets[0].deliver({ type: "participant.left", participant });
  browser.sockets[0].deliver({ type: "participant.left", participant });
  assert.equal(session.participants.size, 0);
});

// --- events and positions -------------------------------------------------------------------------------

test("each event is told by its type, and once more as `event`", async (t) => {
  const browser = browserFor(t);
  const session = await attached(browser);
  const told = listen(session, "pong", "event");
  browser.sockets[0].deliver({ type: "pong" });
  assert.deepEqual(told, [["pong", { type: "pong" }], ["event", { type: "pong" }]]);
});

test("deltas are joined, merged ones counted for what they stand for", async (t) => {
  const browser = browserFor(t);
  const session = await attached(browser);
  const [socket] = browser.sockets;
  socket.deliver(created("resp_1", 1));
  socket.deliver({ type: "response.in_progress", response_id: "resp_1", seq: 1 });
  socket.deliver({ type: "response.reasoning.delta", response_id: "resp_1", seq: 2, delta: "hm" });
  socket.deliver(delta("resp_1", 3, "a"));
  socket.deliver(delta("resp_1", 7, "bcde", { merged: 4 }));
  const answer = { id: "resp_1", status: "in_progress", text: "abcde", reasoning: "hm" };
  assert.deepEqual(session.responses.get("resp_1"), answer);
  assert.deepEqual([...session.positions], [["session", 1], ["resp_1", 7]]);
  assert.deepEqual(session.unfinished, [answer]);
});

test("the channel is the response, else the task, else the session", async (t) => {
  const browser = browserFor(t);
  const session = await attached(browser);
  const [socket] = browser.sockets;
  socket.deliver({ type: "task.created", seq: 1, task: { id: "task_1", response_id: "resp_9" } });
  assert.deepEqual([...session.positions], [["session", 1], ["task_1", 0]]);
  socket.deliver({ type: "conversation.item.truncated", seq: 2, item: { response_id: "resp_9", heard_chars: 3 } });
  socket.deliver({ type: "task.started", task_id: "task_1", seq: 1, attempt: 1 });
  socket.deliver({ type: "task.progress", task_id: "task_1", seq: 5, merged: 4 });
  assert.deepEqual([...session.positions], [["session", 2], ["task_1", 5]]);
  socket.deliver({ type: "task.done", task_id: "task_1", seq: 6, status: "complete" });
  assert.deepEqual([...session.positions], [["session", 2]]);
  socket.deliver({ type: "made.up", response_id: "resp_9", task_id: "task_2", seq: 1 });
  assert.deepEqual([...session.positions], [["session", 2], ["resp_9", 1]]);
});

test("a channel that is done has no position any more", async (t) => {
  const browser = browserFor(t);
  const session = await attached(browser);
  browser.sockets[0].deliver(created("resp_1", 1));
  browser.sockets[0].deliver(done("resp_1", 1, "cancelled"));
  assert.deepEqual([...session.positions], [["session", 1]]);
  assert.equal(session.responses.get("resp_1").status, "cancelled");
  assert.deepEqual(session.unfinished, []);
});

test("an id may be any name, even one that objects have already", async (t) => {
  const browser = browserFor(t);
  const session = await attached(browser);
  browser.sockets[0].deliver(created("__proto__", 1));
  browser.sockets[0].deliver(delta("__proto__", 1, "text"));
  assert.equal(session.responses.get("__proto__").text, "text");
  browser.sockets[0].lose(1006);
  await browser.clock.pass(1_000);
  assert.equal(browser.sockets[1].after, "session:1,__proto__:1");
});

test("a gap is not applied: it reconnects with the positions that it has", async (t) => {
  const browser = browserFor(t);
  const session = await attached(browser);
  browser.sockets[0].deliver(created("resp_1", 1));
  browser.sockets[0].deliver(delta("resp_1", 1, "a"));
  const told = listen(session, "disconnect", "event");
  for (const gap of [delta("resp_1", 3, "c"), delta("resp_1", 2, "ab", { merged: 2 })]) {
    browser.sockets.at(-1).deliver(gap);
    assert.equal(browser.sockets.at(-1).closed, true);
    await browser.clock.pass(10_000);
    assert.equal(browser.sockets.at(-1).after, "session:1,resp_1:1");
    browser.sockets.at(-1).attach();
  }
  assert.equal(session.responses.get("resp_1").text, "a");
  assert.deepEqual(told.map(([type, { type: of }]) => of ?? type), [
    "disconnect", "session.resumed", "disconnect", "session.resumed",
  ]);
});

test("a reset drops what is there of the channel", async (t) => {
  const browser = browserFor(t);
  const session = await attached(browser);
  browser.sockets[0].deliver(created("resp_1", 1));
  browser.sockets[0].deliver(delta("resp_1", 9, "shown, never stored", { merged: 9 }));
  browser.sockets[0].deliver(delta("resp_1", 2, "stored", { merged: 2, reset: true }));
  assert.equal(session.responses.get("resp_1").text, "stored");
  assert.equal(session.positions.get("resp_1"), 2);
});

test("without history it starts where the session stands", async (t) => {
  const browser = browserFor(t);
  const session = new RealtimeSession({ sessionId: "sess_1", history: "none" });
  session.connect();
  await settle();
  browser.sockets[0].attach({ positions: { session: 4, resp_2: 10 } });
  browser.sockets[0].deliver(delta("resp_2", 11, "end"));
  assert.equal(session.responses.get("resp_2").text, "end");
  browser.sockets[0].lose(1006);
  await browser.clock.pass(1_000);
  assert.equal(browser.sockets[1].url.search, "?session_id=sess_1&after=session:4,resp_2:11");
  browser.sockets[1].attach({ positions: { session: 5, resp_2: 20 } });
  assert.deepEqual([...session.positions], [["session", 4], ["resp_2", 11]]);
});

test("whatever is cut wherever, the text is the one that was sent", async (t) => {
  const browser = browserFor(t);
  const random = seeded(20261122);
  const pieces = Array.from({ length: 400 }, (_, n) => (n % 7 ? `w${n} ` : "👋"));
  for (let run = 0; run < 100; run += 1) {
    browser.sockets.length = 0;
    const session = await attached(browser);
    browser.sockets[0].deliver(created("resp_1", 1));
    while (session.unfinished.length) {
      const socket = browser.sockets.at(-1);
      if (browser.sockets.length > 1) socket.attach();
      serve(socket, pieces, random);
      if (session.unfinished.length) socket.lose(1006);
      await browser.clock.pass(10_000);
    }
    assert.equal(session.responses.get("resp_1").text, pieces.join(""));
    session.close();
  }
});

/** Sends what the connection has not seen, merged by chance, until chance cuts it. */
function serve(socket, pieces, random) {
  let position = Number(/resp_1:(\d+)/.exec(socket.after ?? "")?.[1] ?? 0);
  while (random() > 0.05) {
    if (position === pieces.length) return socket.deliver(done("resp_1", position + 1));
    const merged = Math.min(1 + Math.floor(random() * 20), pieces.length - position);
    const text = pieces.slice(position, position + merged).join("");
    position += merged;
    socket.deliver(delta("resp_1", position, text, { merged }));
  }
  return undefined;
}

/** Numbers from 0 to 1 by chance that is the same each time (mulberry32). */
function seeded(seed) {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

// --- reconnecting ---------------------------------------------------------------------------------------

test("it names the session and every channel created and not done, at 0 if nothing came", async (t) => {
  const browser = browserFor(t);
  await attached(browser);
  const [socket] = browser.sockets;
  for (const [n, id] of ["resp_1", "resp_2", "resp_3"].entries()) socket.deliver(created(id, n + 1));
  socket.deliver(done("resp_1", 1));
  socket.deliver(delta("resp_2", 8, "text", { merged: 8 }));
  socket.lose(1006);
  await browser.clock.pass(1_000);
  assert.equal(browser.sockets[1].url.search, "?session_id=sess_1&after=session:3,resp_2:8,resp_3:0");
});

test("it comes back after these codes, and after no others", async (t) => {
  const back = [1001, 1005, 1006, 1011, 1012, 1013, 4408, 4429];
  const stays = [1000, 1002, 1003, 1007, 1008, 1009, 4400, 4401, 4403, 4404, 4410];
  for (const code of [...back, ...stays]) {
    const browser = browserFor(t);
    const session = await attached(browser);
    const told = listen(session, "disconnect", "closed");
    browser.sockets[0].lose(code, "why");
    assert.equal(told.length, 1);
    const [[type, detail]] = told;
    assert.equal(type, back.includes(code) ? "disconnect" : "closed");
    assert.deepEqual([detail.code, detail.reason], [code, "why"]);
    await browser.clock.pass(60_000);
    assert.equal(browser.sockets.length > 1, back.includes(code), String(code));
  }
});

test("the waits double from a quarter of a second to ten, with jitter", async (t) => {
  const browser = browserFor(t);
  const session = new RealtimeSession({ transport: "websocket" });
  const told = listen(session, "disconnect");
  session.connect();
  for (const random of [0, 0.999999]) {
    browser.random = random;
    for (let failure = 0; failure < 9; failure += 1) {
      await settle();
      browser.sockets.at(-1).lose(1006);
      await browser.clock.pass(10_000);
    }
  }
  const waits = told.map(([, { reconnectInMs }]) => reconnectInMs);
  assert.deepEqual(waits.slice(0, 9), [125, 250, 500, 1_000, 2_000, 4_000, 5_000, 5_000, 5_000]);
  assert.deepEqual(waits.slice(9).map(Math.round), Array(9).fill(10_000));
});

test("a connection that held starts the waits anew, one that was dropped at once does not", async (t) => {
  const browser = browserFor(t);
  const session = await attached(browser);
  const told = listen(session, "disconnect");
  for (const heldMs of [0, 0, 0, 6_000, 0]) {
    await browser.clock.pass(heldMs);
    browser.sockets.at(-1).lose(1013);
    await browser.clock.pass(told.at(-1)[1].reconnectInMs);
    browser.sockets.at(-1).attach();
  }
  const waits = told.map(([, { reconnectInMs }]) => reconnectInMs);
  assert.deepEqual(waits, [187.5, 375, 750, 187.5, 375]);
});

test("too many: it waits for as long as the last error said", async (t) => {
  const browser = browserFor(t);
  const session = await attached(browser);
  const told = listen(session, "disconnect");
  const error = { type: "rate_limit_error", code: "too_many_messages", retry_after_ms: 30_000, fatal: true };
  browser.sockets[0].deliver({ type: "error", error });
  browser.sockets[0].lose(4429);
  assert.equal(told[0][1].reconnectInMs, 30_187.5);
});

test("an instance that goes away is left when it says", async (t) => {
  const browser = browserFor(t);
  await attached(browser);
  browser.sockets[0].deliver({ type: "session.going_away", time_left_ms: 20_000, reconnect_after_ms: 4_000 });
  await browser.clock.pass(3_999);
  assert.equal(browser.sockets.length, 1);
  await browser.clock.pass(1);
  assert.equal(browser.sockets.length, 2);
  assert.equal(browser.sockets[0].closed, true);
  assert.equal(browser.sockets[1].after, "session:0");
});

test("one that ends before that is not left twice", async (t) => {
  const browser = browserFor(t);
  await attached(browser);
  browser.sockets[0].deliver({ type: "session.going_away", time_left_ms: 20_000, reconnect_after_ms: 4_000 });
  browser.sockets[0].lose(1012);
  await browser.clock.pass(250);
  browser.sockets[1].attach();
  await browser.clock.pass(10_000);
  assert.equal(browser.sockets.length, 2);
});

test("a refused token is replaced by a fresh one, if there is a way to get one", async (t) => {
  const browser = browserFor(t);
  const tokens = ["old", "new"];
  await attached(browser, { token: () => tokens.shift() });
  browser.sockets[0].lose(4401);
  await browser.clock.pass(1_000);
  assert.deepEqual(browser.sockets[1].protocols, ["realtime.v1", "bearer.new"]);
});

test("a refused token that is all there is ends the session", async (t) => {
  const browser = browserFor(t);
  const session = await attached(browser, { token: "only" });
  const told = listen(session, "closed");
  browser.sockets[0].lose(4401, "expired");
  await browser.clock.pass(60_000);
  assert.deepEqual(told, [["closed", { code: 4401, reason: "expired" }]]);
  assert.equal(browser.sockets.length, 1);
});

test("tokens that are refused again and again are asked for with pauses", async (t) => {
  const browser = browserFor(t);
  let asked = 0;
  new RealtimeSession({ token: () => `token-${asked += 1}` }).connect();
  await settle();
  for (let refusals = 0; refusals < 8; refusals += 1) {
    browser.sockets.at(-1).lose(4401);
    await browser.clock.pass(10_000);
  }
  assert.equal(asked, 9);
  browser.sockets.at(-1).lose(4401);
  await browser.clock.pass(4_000);
  assert.equal(asked, 9);
});

test("a token that expires is refreshed on the open connection", async (t) => {
  const browser = browserFor(t);
  const tokens = ["old", "new"];
  await attached(browser, { token: () => tokens.shift() });
  browser.sockets[0].deliver({ type: "auth.expiring", expires_at: "2026-11-22T00:01:00Z" });
  await settle();
  const [{ type, token }] = browser.sockets[0].sent;
  assert.deepEqual([type, token], ["auth.refresh", "new"]);
});

test("a fresh token that comes too late for its connection is not sent on the next", async (t) => {
  const browser = browserFor(t);
  let give;
  const tokens = ["old", new Promise((resolve) => { give = resolve; }), "new"];
  const session = await attached(browser, { token: () => tokens.shift() });
  browser.sockets[0].deliver({ type: "auth.expiring", expires_at: "2026-11-22T00:01:00Z" });
  browser.sockets[0].lose(4401);
  give("late");
  await browser.clock.pass(1_000);
  assert.deepEqual(browser.sockets[1].protocols, ["realtime.v1", "bearer.new"]);
  browser.sockets[1].attach();
  await settle();
  assert.equal(session.state, "open");
  assert.deepEqual(browser.sockets.flatMap(({ sent }) => sent), []);
});

test("a token that can't be replaced is not sent again", async (t) => {
  const browser = browserFor(t);
  await attached(browser, { token: "only" });
  browser.sockets[0].deliver({ type: "auth.expiring", expires_at: "2026-11-22T00:01:00Z" });
  await settle();
  assert.deepEqual(browser.sockets[0].sent, []);
});

test("why there was no token is told with the loss", async (t) => {
  const browser = browserFor(t);
  const session = new RealtimeSession({ token: () => { throw new Error("offline"); } });
  const told = listen(session, "disconnect");
  session.connect();
  await settle();
  browser.sockets[0].lose(4401);
  assert.equal(told[0][1].cause?.message, "offline");
});

test("a token that never comes is not waited for without end", async (t) => {
  const browser = browserFor(t);
  let asked = 0;
  const session = new RealtimeSession({ token: () => { asked += 1; return new Promise(() => {}); } });
  const told = listen(session, "disconnect");
  session.connect();
  await browser.clock.pass(46_000);
  assert.equal(told[0][1].reason, "no token");
  assert.equal(asked, 2);
});

test("a token that can't be had is asked for again", async (t) => {
  const browser = browserFor(t);
  let asked = 0;
  new RealtimeSession({ token: async () => { asked += 1; throw new Error("offline"); } }).connect();
  await settle();
  assert.deepEqual(browser.sockets[0].protocols, ["realtime.v1"]);
  browser.sockets[0].lose(4401);
  await browser.clock.pass(1_000);
  assert.equal(asked, 2);
});

test("a silent connection is asked whether it lives, then left", async (t) => {
  const browser = browserFor(t);
  await attached(browser);
  await browser.clock.pass(30_000);
  assert.deepEqual(browser.sockets[0].sent.map(({ type }) => type), ["ping"]);
  browser.sockets[0].deliver({ type: "pong" });
  await browser.clock.pass(30_000);
  assert.equal(browser.sockets[0].sent.length, 2);
  assert.equal(browser.sockets.length, 1);
  await browser.clock.pass(16_000);
  assert.equal(browser.sockets[0].closed, true);
  assert.equal(browser.sockets.length, 2);
});

test("a connection that never opens is given up", async (t) => {
  const browser = browserFor(t);
  new RealtimeSession({ transport: "websocket" }).connect();
  await settle();
  await browser.clock.pass(10_200);
  assert.equal(browser.sockets[0].closed, true);
  assert.equal(browser.sockets.length, 2);
});

test("once the network is back it is worth no more waiting", async (t) => {
  const browser = browserFor(t);
  const network = new EventTarget();
  for (const name of ["addEventListener", "removeEventListener"]) {
    globalThis[name] = network[name].bind(network);
    t.after(() => delete globalThis[name]);
  }
  const session = await attached(browser);
  browser.sockets[0].lose(1006);
  network.dispatchEvent(new Event("online"));
  await settle();
  assert.equal(browser.sockets.length, 2);
  browser.sockets[1].attach();
  network.dispatchEvent(new Event("online"));
  session.close();
  network.dispatchEvent(new Event("online"));
  await browser.clock.pass(60_000);
  assert.equal(browser.sockets.length, 2);
});

test("an address may end with a slash", async (t) => {
  const browser = browserFor(t);
  new RealtimeSession({ url: "http://127.0.0.1:1/ai/v1/realtime/" }).connect();
  await settle();
  assert.equal(browser.sockets[0].url.pathname, "/ai/v1/realtime");
});

test("dropped, it comes back when told, and hears nothing of the old connection", async (t) => {
  const browser = browserFor(t);
  const session = await attached(browser);
  const told = listen(session, "event", "disconnect");
  session.drop(1_500);
  assert.equal(session.state, "waiting");
  browser.sockets[0].deliver(created("resp_1", 1));
  browser.sockets[0].lose(1000);
  assert.deepEqual(told, [["disconnect", { code: 1006, reason: "dropped", reconnectInMs: 1_500 }]]);
  await browser.clock.pass(1_499);
  assert.equal(browser.sockets.length, 1);
  await browser.clock.pass(1);
  assert.equal(browser.sockets.length, 2);
});

test("closed, it stays away and takes no more commands", async (t) => {
  const browser = browserFor(t);
  const session = await attached(browser);
  const told = listen(session, "closed");
  session.close();
  session.close();
  assert.deepEqual(told, [["closed", { code: 1000, reason: "left" }]]);
  assert.throws(() => session.send({ type: "ping" }), /closed for good/);
  await browser.clock.pass(60_000);
  assert.equal(browser.sockets.length, 1);
  assert.equal(browser.clock.timers.size, 0);
});

test("a listener of the first frame may close it", async (t) => {
  const browser = browserFor(t);
  const session = new RealtimeSession();
  const told = listen(session, "open", "closed");
  session.addEventListener("session.created", () => session.close());
  session.connect();
  await settle();
  browser.sockets[0].attach();
  assert.equal(session.state, "closed");
  assert.deepEqual(told.map(([type]) => type), ["closed"]);
});

test("closed while its token is awaited, it never connects", async (t) => {
  const browser = browserFor(t);
  const session = new RealtimeSession({ token: async () => "token" });
  session.connect();
  session.close();
  await settle();
  assert.equal(browser.sockets.length, 0);
});

test("a task is resumed where it was, and told in its own events", async (t) => {
  const browser = browserFor(t);
  const session = await attached(browser);
  const told = listen(session, "task.progress", "task.output_text.delta", "task.done");
  const [socket] = browser.sockets;
  socket.deliver({ type: "task.created", seq: 1, task: { id: "task_1", name: "count", status: "pending" } });
  socket.lose(1006);
  await browser.clock.pass(1_000);
  assert.equal(browser.sockets[1].after, "session:1,task_1:0");
  browser.sockets[1].attach();
  const progress = { type: "task.progress", task_id: "task_1", seq: 3, merged: 3, attempt: 1, progress: 2, total: 3 };
  const written = { type: "task.output_text.delta", task_id: "task_1", seq: 4, attempt: 1, delta: "one" };
  for (const event of [progress, written]) browser.sockets[1].deliver(event);
  browser.sockets[1].lose(1006);
  await browser.clock.pass(1_000);
  assert.equal(browser.sockets[2].after, "session:1,task_1:4");
  browser.sockets[2].attach();
  const ended = { type: "task.done", task_id: "task_1", seq: 5, status: "complete", result: 3 };
  browser.sockets[2].deliver(ended);
  browser.sockets[2].lose(1006);
  await browser.clock.pass(1_000);
  assert.equal(browser.sockets[3].after, "session:1");
  assert.deepEqual(told.map(([, event]) => event), [progress, written, ended]);
});

test("a task whose store has lost what was shown of it begins anew", async (t) => {
  const browser = browserFor(t);
  const session = await attached(browser);
  const [socket] = browser.sockets;
  socket.deliver({ type: "task.created", seq: 1, task: { id: "task_1" } });
  socket.deliver({ type: "task.started", task_id: "task_1", seq: 1, attempt: 1 });
  socket.deliver({ type: "task.started", task_id: "task_1", seq: 1, attempt: 1, reset: true });
  assert.equal(session.positions.get("task_1"), 1);
  assert.equal(session.state, "open");
  assert.equal(session.responses.size, 0);
});

// --- commands -------------------------------------------------------------------------------------------

test("respond asks for an answer under an id that is known at once", async (t) => {
  const browser = browserFor(t);
  const session = await attached(browser);
  const { responseId, eventId } = session.respond("Hello", { multitask_strategy: "interrupt" });
  session.cancel(responseId, { heardChars: 12 });
  const [create, cancel] = browser.sockets[0].sent;
  assert.deepEqual(create, {
    type: "response.create",
    event_id: eventId,
    response_id: responseId,
    input: "Hello",
    multitask_strategy: "interrupt",
  });
  const { event_id, ...rest } = cancel;
  assert.notEqual(event_id, eventId);
  assert.deepEqual(rest, { type: "response.cancel", response_id: responseId, heard_chars: 12 });
});

test("what is sent while offline goes out once there is a connection, in its order", async (t) => {
  const browser = browserFor(t);
  const session = new RealtimeSession();
  const ids = [session.send({ type: "response.create", input: "1" })];
  session.connect();
  await settle();
  ids.push(session.send({ type: "response.create", input: "2" }));
  assert.deepEqual(browser.sockets[0].sent, []);
  browser.sockets[0].attach();
  assert.deepEqual(browser.sockets[0].sent.map(({ event_id }) => event_id), ids);
});

test("what `open` makes a listener send goes first", async (t) => {
  const browser = browserFor(t);
  const session = new RealtimeSession();
  session.send({ type: "response.create", input: "1" });
  session.addEventListener("open", () => session.send({ type: "session.update", session: {} }));
  session.connect();
  await settle();
  browser.sockets[0].attach();
  assert.deepEqual(browser.sockets[0].sent.map(({ type }) => type), ["session.update", "response.create"]);
});

test("a command without an answer is repeated under its id, one with an answer is not", async (t) => {
  const browser = browserFor(t);
  const session = await attached(browser);
  const [taken, refused, open] = ["1", "2", "3"].map((input) => session.send({ type: "response.create", input }));
  const item = { id: "item_1", role: "user", content: "1" };
  browser.sockets[0].deliver({ type: "conversation.item.created", seq: 1, item, for_event_id: taken });
  browser.sockets[0].deliver({ type: "error", error: { code: "no", message: "No.", event_id: refused } });
  browser.sockets[0].lose(1006);
  await browser.clock.pass(1_000);
  browser.sockets[1].attach();
  assert.deepEqual(browser.sockets[1].sent, [{ type: "response.create", input: "3", event_id: open }]);
});

test("a ping and a token belong to their connection and are not repeated", async (t) => {
  const browser = browserFor(t);
  const session = await attached(browser);
  session.send({ type: "ping" });
  session.send({ type: "auth.refresh", token: "t" });
  browser.sockets[0].lose(1006);
  await browser.clock.pass(1_000);
  browser.sockets[1].attach();
  assert.deepEqual(browser.sockets[1].sent, []);
});

test("a cancel is done with once its response is", async (t) => {
  const browser = browserFor(t);
  const session = await attached(browser);
  browser.sockets[0].deliver(created("resp_1", 1));
  session.cancel("resp_1");
  browser.sockets[0].deliver(done("resp_1", 1));
  session.cancel("resp_1");
  assert.equal(browser.sockets[0].sent.length, 1);
  browser.sockets[0].lose(1006);
  await browser.clock.pass(1_000);
  browser.sockets[1].attach();
  assert.deepEqual(browser.sockets[1].sent, []);
});

test("a cancel is done with once its task is", async (t) => {
  const browser = browserFor(t);
  const session = await attached(browser);
  browser.sockets[0].deliver({ type: "task.created", seq: 1, task: { id: "task_1" } });
  session.send({ type: "task.cancel", task_id: "task_1" });
  browser.sockets[0].deliver({ type: "task.done", task_id: "task_1", seq: 1, status: "complete" });
  browser.sockets[0].lose(1006);
  await browser.clock.pass(1_000);
  browser.sockets[1].attach();
  assert.deepEqual(browser.sockets[1].sent, []);
});

test("a cancel that also truncates has an effect of its own, and waits for it", async (t) => {
  const browser = browserFor(t);
  const session = await attached(browser);
  browser.sockets[0].deliver(created("resp_1", 1));
  session.cancel("resp_1", { heardChars: 3 });
  browser.sockets[0].deliver(done("resp_1", 1));
  browser.sockets[0].lose(1006);
  await browser.clock.pass(1_000);
  browser.sockets[1].attach();
  assert.equal(browser.sockets[1].sent[0].heard_chars, 3);
});

test("what was told to be over is not carried out by a later connection", async (t) => {
  const browser = browserFor(t);
  const session = await attached(browser);
  const lost = session.respond("pay");
  browser.sockets[0].lose(1009);
  await assert.rejects(lost.done(), SessionClosed);
  session.connect();
  await settle();
  browser.sockets[1].attach();
  session.respond("pay again");
  assert.deepEqual(browser.sockets[1].sent.map(({ input }) => input), ["pay again"]);
});

test("what was sent before it is closed goes out first, for two seconds at most", async (t) => {
  const browser = browserFor(t);
  const session = await attached(browser);
  for (let number = 0; number < 200; number += 1) session.send({ type: "session.update", session: {} });
  session.close();
  assert.equal(session.state, "closed");
  await browser.clock.pass(1_000);
  const sent = browser.sockets[0].sent.length;
  assert.ok(sent > 60 && !browser.sockets[0].closed, String(sent));
  await browser.clock.pass(1_000);
  assert.equal(browser.sockets[0].closed, true);
  assert.equal(browser.clock.timers.size, 0);
});

test("a command that no server would take is refused at once, by its bytes", async (t) => {
  const browser = browserFor(t);
  const session = await attached(browser, { maxMessageBytes: 300 });
  session.respond("x".repeat(60));
  assert.throws(() => session.respond("é".repeat(120)), (error) => error instanceof MessageTooLarge && error.code === "message_too_large");
  assert.deepEqual(browser.sockets[0].sent.map(({ input }) => input), ["x".repeat(60)]);
});

test("no more commands wait than the server remembers: one more is refused", async (t) => {
  const browser = browserFor(t);
  const session = new RealtimeSession();
  for (let n = 0; n < 1_000; n += 1) session.send({ type: "response.create", input: String(n) });
  assert.throws(() => session.respond("1001"), QueueFull);
  session.send({ type: "ping" }); // which is not kept
  session.connect();
  await settle();
  browser.sockets[0].attach();
  assert.equal(browser.sockets[0].sent.length, 40); // as many as a server takes at once
  await browser.clock.pass(1_000);
  assert.equal(browser.sockets[0].sent.length, 80);
  await browser.clock.pass(23_000);
  assert.equal(browser.sockets[0].sent.filter(({ type }) => type === "response.create").length, 1_000);
  browser.sockets[0].deliver({ type: "session.updated", seq: 1, for_event_id: browser.sockets[0].sent[0].event_id });
  session.respond("1001");
});

test("ids are legal and never the same", () => {
  const ids = Array.from({ length: 1_000 }, () => newId("resp"));
  assert.equal(new Set(ids).size, 1_000);
  for (const id of ids) assert.match(id, /^resp_[0-9a-f]{32}$/);
});

// --- iterating ------------------------------------------------------------------------------------------

/** What a loop yields until it ends, and what it throws. */
async function iterated(loop) {
  const events = [];
  try {
    for await (const event of loop) events.push(event);
  } catch (error) {
    return { events, error };
  }
  return { events };
}

test("an answer is iterated, to its end, without those of others", async (t) => {
  const browser = browserFor(t);
  const session = await attached(browser);
  const stream = session.respond("Hello");
  const { responseId } = stream;
  const all = [created(responseId, 1), delta(responseId, 1, "a"), done(responseId, 2)];
  browser.sockets[0].deliver(all[0]);
  browser.sockets[0].deliver(created("resp_2", 2));
  browser.sockets[0].deliver(all[1]);
  browser.sockets[0].deliver(delta("resp_2", 1, "other"));
  browser.sockets[0].deliver(all[2]);
  assert.deepEqual(await iterated(stream), { events: all });
  assert.equal(await stream.text(), "a");
  assert.deepEqual(await stream.done(), all[2]);
});

test("what is iterated late comes merged", async (t) => {
  const browser = browserFor(t);
  const session = await attached(browser);
  const stream = session.respond("Hello");
  const id = stream.responseId;
  browser.sockets[0].deliver(created(id, 1));
  for (const [n, piece] of ["a", "b", "👋"].entries()) browser.sockets[0].deliver(delta(id, n + 1, piece));
  browser.sockets[0].deliver({ type: "response.reasoning.delta", response_id: id, seq: 4, delta: "hm" });
  browser.sockets[0].deliver(delta(id, 6, "cd", { merged: 2 }));
  browser.sockets[0].deliver(done(id, 7));
  const { events } = await iterated(stream);
  assert.deepEqual(events.map(({ seq, merged = 1, delta: text }) => [seq, merged, text]), [
    [1, 1, undefined], [3, 3, "ab👋"], [4, 1, "hm"], [6, 2, "cd"], [7, 1, undefined],
  ]);
});

test("a refusal is thrown with its code", async (t) => {
  const browser = browserFor(t);
  const session = await attached(browser);
  const stream = session.respond("Hello");
  const error = { type: "conflict_error", code: "response_in_progress", message: "No.", event_id: stream.eventId };
  browser.sockets[0].deliver({ type: "error", error });
  const { error: thrown } = await iterated(stream);
  assert.ok(thrown instanceof RealtimeError);
  assert.deepEqual([thrown.code, thrown.type, thrown.message], ["response_in_progress", "conflict_error", "No."]);
  await assert.rejects(stream.text(), RealtimeError);
});

test("an end of the connection is thrown, but for a close", async (t) => {
  for (const [code, thrown] of [[1000, undefined], [4404, SessionClosed]]) {
    const browser = browserFor(t);
    const session = await attached(browser);
    const [whole, stream] = [session[Symbol.asyncIterator](), session.respond("Hello")];
    const looping = iterated(whole);
    await settle();
    browser.sockets[0].deliver({ type: "pong" });
    browser.sockets[0].lose(code, "why");
    const { events, error } = await looping;
    assert.deepEqual(events, [{ type: "pong" }]);
    assert.equal(error?.constructor, thrown);
    assert.equal((await iterated(stream)).error.closeCode, code);
    assert.equal((await iterated(session)).error?.closeCode, thrown && code);
  }
});

// --- voice ----------------------------------------------------------------------------------------------

test("an answer that is stopped keeps what was heard, and nothing is heard of it later", async (t) => {
  const browser = browserFor(t);
  const session = await attached(browser);
  const [socket] = browser.sockets;
  for (const [n, id] of ["told", "voiced", "running", "unseen"].entries()) socket.deliver(created(id, n + 1));
  for (const id of ["told", "voiced", "running"]) socket.deliver(delta(id, 1, "Good 👋 day"));
  for (const id of ["told", "voiced"]) socket.deliver(done(id, 2));
  session.heard("told", 11);
  session.heard("voiced", 7);
  session.heard("voiced", 5);
  session.heard("running", 0);
  session.interrupt();
  session.heard("voiced", 9);
  socket.deliver(done("running", 2, "cancelled"));
  session.interrupt();
  assert.deepEqual(socket.sent.map(({ type, response_id, heard_chars }) => [type, response_id, heard_chars]), [
    ["response.cancel", "voiced", 7],
    ["response.cancel", "running", 0],
    ["response.cancel", "unseen", undefined],
    ["response.cancel", "unseen", undefined],
  ]);
});

// --- tasks ----------------------------------------------------------------------------------------------

test("a task is iterated, and what it came to is a promise", async (t) => {
  const browser = browserFor(t);
  const session = await attached(browser);
  const stream = session.createTask("count", { to: 2 });
  const { task_id, name, input } = browser.sockets[0].sent[0];
  assert.deepEqual([task_id, name, input], [stream.taskId, "count", { to: 2 }]);
  const all = [
    { type: "task.created", seq: 1, task: { id: task_id, name, status: "pending" } },
    { type: "task.started", task_id, seq: 1, attempt: 1 },
    { type: "task.progress", task_id, seq: 2, attempt: 1, progress: 1, total: 2, message: "one" },
    { type: "task.done", task_id, seq: 3, status: "complete", result: [1, 2] },
  ];
  for (const event of all.slice(0, 3)) browser.sockets[0].deliver(event);
  const { status, progress, total, message } = session.tasks.get(task_id);
  assert.deepEqual([status, progress, total, message], ["running", 1, 2, "one"]);
  browser.sockets[0].deliver(all[3]);
  assert.deepEqual(await iterated(stream), { events: all });
  assert.deepEqual(await stream.result(), [1, 2]);
  stream.cancel();
  assert.equal(browser.sockets[0].sent.length, 1);
});

test("a task that came to nothing throws", async (t) => {
  const browser = browserFor(t);
  const session = await attached(browser);
  for (const [n, error] of [{ type: "server_error", code: "task_failed", message: "It raised." }, undefined].entries()) {
    const stream = session.createTask("count", {});
    browser.sockets[0].deliver({ type: "task.created", seq: n + 1, task: { id: stream.taskId } });
    browser.sockets[0].deliver({
      type: "task.done", task_id: stream.taskId, seq: 1, status: error ? "failed" : "cancelled", error,
    });
    await assert.rejects(stream.result(), { code: error?.code ?? "cancelled" });
  }
});

// --- server-sent events ---------------------------------------------------------------------------------

const first = { type: "session.resumed", session: { id: "sess_1" }, positions: { session: 0 }, participants: [] };

/** A server that is reached by `fetch` alone. @returns {any[]} the streams that it has opened */
function servedBy(browser, refusal) {
  const streams = [];
  browser.answer = ({ method, url }) => {
    if (url.pathname.endsWith("/v1/sessions")) return Response.json({ session: { id: "sess_1" } }, { status: 201 });
    if (method === "POST") return refusal?.() ?? Response.json({ accepted: true }, { status: 202 });
    streams.push(browser.stream());
    return streams.at(-1).response;
  };
  return streams;
}

/** Lets what is read from a stream arrive. */
const arrived = () => new Promise((resolve) => { setImmediate(() => setImmediate(resolve)); });

test("a WebSocket that can't be opened is replaced at once, for the whole page", async (t) => {
  const browser = browserFor(t);
  const streams = servedBy(browser);
  const session = new RealtimeSession({ token: "a.b.c" });
  const told = listen(session, "session.created", "open", "disconnect");
  session.connect();
  await settle();
  session.respond("Hello");
  browser.sockets[0].lose(1006);
  await arrived();
  streams[0].deliver(first);
  await arrived();
  assert.deepEqual(told.map(([type]) => type), ["session.created", "open"]);
  assert.equal(session.transport, "sse");
  assert.deepEqual(browser.requests.map(({ method, url, body }) => [method, url.pathname + url.search, body?.input]), [
    ["POST", "/v1/sessions", undefined],
    ["GET", "/v1/sessions/sess_1/events", undefined],
    ["POST", "/v1/sessions/sess_1/events", "Hello"],
  ]);
  for (const { headers } of browser.requests) assert.equal(headers.authorization, "Bearer a.b.c");
  new RealtimeSession().connect();
  await arrived();
  assert.equal(browser.sockets.length, 1);
  assert.equal(browser.requests.length, 5);
});

test("a WebSocket that nobody answers is replaced as one that is refused", async (t) => {
  const browser = browserFor(t);
  const streams = servedBy(browser);
  const session = new RealtimeSession();
  const told = listen(session, "open", "disconnect");
  session.connect();
  await settle();
  await browser.clock.pass(10_000);
  await arrived();
  streams[0].deliver(first);
  await arrived();
  assert.deepEqual(told.map(([type]) => type), ["open"]);
  assert.equal(session.transport, "sse");
  assert.equal(browser.sockets[0].closed, true);
});

test("a WebSocket by which nothing comes is replaced as one that is refused, though the upgrade went through", async (t) => {
  const ends = [(socket) => socket.lose(1006), (socket, clock) => clock.pass(10_000), (socket) => socket.receive("<html>")];
  for (const end of ends) {
    const browser = browserFor(t);
    const streams = servedBy(browser);
    const session = new RealtimeSession();
    const told = listen(session, "open", "disconnect");
    session.connect();
    await settle();
    browser.sockets[0].onopen();
    await end(browser.sockets[0], browser.clock);
    await arrived();
    streams[0].deliver(first);
    await arrived();
    assert.deepEqual(told.map(([type]) => type), ["open"]);
    assert.equal(session.transport, "sse");
    assert.equal(browser.sockets[0].closed, true);
  }
});

test("where neither gets through, the WebSocket is tried again", async (t) => {
  const browser = browserFor(t);
  const session = new RealtimeSession();
  const told = listen(session, "disconnect");
  session.connect();
  await settle();
  browser.sockets[0].lose(1006);
  await arrived();
  assert.equal(browser.requests.length, 1);
  assert.equal(told.length, 1);
  await browser.clock.pass(1_000);
  assert.equal(browser.sockets.length, 2);
});

test("a refusal, or a connection that was open, is no reason to leave WebSockets", async (t) => {
  const browser = browserFor(t);
  new RealtimeSession({ sessionId: "sess_9" }).connect();
  await settle();
  browser.sockets[0].lose(4404);
  const session = await attached(browser);
  for (let turn = 0; turn < 3; turn += 1) {
    browser.sockets.at(-1).lose(1006);
    await browser.clock.pass(10_000);
  }
  await arrived();
  assert.equal(session.transport, "websocket");
  assert.deepEqual(browser.requests, []);
});

test("a stream is resumed by positions, and read wherever it is cut into pieces", async (t) => {
  const browser = browserFor(t);
  const streams = servedBy(browser);
  const session = new RealtimeSession({ sessionId: "sess_1", transport: "sse" });
  session.connect();
  await arrived();
  streams[0].deliver(first);
  const text = [created("resp_1", 1), delta("resp_1", 1, "a👋b")].map((event) => `data: ${JSON.stringify(event)}\r\n\r\n`);
  const bytes = new TextEncoder().encode(`: a comment\n${text.join("")}`);
  for (const byte of bytes) streams[0].write(new Uint8Array([byte]));
  await arrived();
  streams[0].end();
  await arrived();
  await browser.clock.pass(1_000);
  await arrived();
  assert.equal(session.responses.get("resp_1").text, "a👋b");
  assert.equal(browser.requests.at(-1).url.search, "?after=session:1,resp_1:1");
});

test("a stream moves to a fresh token once there is one, at once", async (t) => {
  const browser = browserFor(t);
  const streams = servedBy(browser);
  const tokens = ["old", "old", "new"];
  const session = new RealtimeSession({ sessionId: "sess_1", transport: "sse", token: () => tokens.shift() });
  const told = listen(session, "disconnect");
  session.connect();
  await arrived();
  streams[0].deliver(first);
  for (const expected of [0, 1]) {
    streams[0].deliver({ type: "auth.expiring", expires_at: "2026-11-22T00:01:00Z" });
    await arrived();
    assert.equal(told.length, expected);
  }
  assert.equal(told[0][1].reconnectInMs, 0);
  await browser.clock.pass(0);
  await arrived();
  assert.deepEqual(browser.requests.map(({ headers }) => headers.authorization), ["Bearer old", "Bearer new"]);
});

test("what was learnt of WebSockets is void once three in a row did not open", async (t) => {
  const browser = browserFor(t);
  const session = await attached(browser);
  const streams = servedBy(browser);
  browser.sockets[0].lose(1006);
  for (let failure = 0; failure < 3; failure += 1) {
    assert.deepEqual(browser.requests, []);
    await browser.clock.pass(10_000);
    browser.sockets.at(-1).lose(1006);
  }
  await arrived();
  streams[0].deliver(first);
  await arrived();
  assert.equal(session.state, "open");
  assert.equal(session.transport, "sse");
});

test("what can't be read is a loss of the connection, by a WebSocket", async (t) => {
  for (const data of ["<html>", "null", "[1]", "{}", new Blob(["binary"])]) {
    const browser = browserFor(t);
    const session = await attached(browser);
    const told = listen(session, "disconnect", "event");
    browser.sockets[0].receive(data);
    assert.deepEqual(told.map(([type, { code, reason }]) => [type, code, reason]), [["disconnect", 1006, "unreadable"]]);
  }
});

test("what can't be read is a loss of the connection, by HTTP", async (t) => {
  for (const [answer, reason] of [
    [() => new Response("<html>", { status: 201 }), "unreadable"],
    [() => Response.json({}, { status: 201 }), "unreadable"],
    [() => new Response("data: <html>\n\n"), "unreadable"],
    [() => new Response("data: [1]\n\n"), "unreadable"],
    [() => Response.json({ error: "No." }, { status: 403 }), "HTTP 403"],
  ]) {
    const browser = browserFor(t);
    browser.answer = answer;
    const sessionId = answer().status === 201 ? null : "sess_1";
    const session = new RealtimeSession({ sessionId, transport: "sse" });
    const told = listen(session, "disconnect", "closed", "error");
    session.connect();
    await arrived();
    assert.deepEqual(told.map(([type, detail]) => [type, detail.reason]), [["disconnect", reason]]);
  }
});

test("what is on the way may say when to come back, but keeps nobody away for more than a minute", async (t) => {
  for (const [status, retryAfter, waitMs] of [[429, "3", 3_000], [503, "86400", 60_000], [503, "tomorrow", 0], [502, null, 0]]) {
    const browser = browserFor(t);
    const headers = retryAfter === null ? {} : { "retry-after": retryAfter };
    browser.answer = () => new Response("<html>", { status, headers });
    const session = new RealtimeSession({ sessionId: "sess_1", transport: "sse" });
    const told = listen(session, "disconnect");
    session.connect();
    await arrived();
    assert.equal(told[0][1].reconnectInMs, 187.5 + waitMs);
    assert.equal(told[0][1].code, 1013);
  }
});

test("where the close has no reason it is the error before it", async (t) => {
  const browser = browserFor(t);
  const session = await attached(browser, { token: "a.b.c" });
  const stream = session.respond("Hello");
  browser.sockets[0].deliver({
    type: "error", error: { type: "authentication_error", code: "token_expired", message: "It has expired.", fatal: true },
  });
  browser.sockets[0].lose(4401);
  await assert.rejects(stream.done(), { closeCode: 4401, reason: "token_expired", message: /\(4401 token_expired\)/ });
  assert.match(new SessionClosed(4404, "").message, /\(4404\)$/);
});

test("HTTP's refusals mean what the close codes do", async (t) => {
  const codes = { 204: 1000, 400: 4400, 401: 4401, 403: 4403, 404: 4404, 410: 4410 };
  for (const [status, code] of Object.entries(codes)) {
    const browser = browserFor(t);
    const error = { type: "t", code: "no", message: "No." };
    browser.answer = () => (status === "204" ? new Response(null, { status }) : Response.json({ error }, { status }));
    const session = new RealtimeSession({ sessionId: "sess_1", transport: "sse" });
    const told = listen(session, "closed");
    session.connect();
    await arrived();
    assert.equal(told[0]?.[1].code, code, status);
  }
});

test("a command that is refused over HTTP is told as over a WebSocket; one that got nowhere is repeated", async (t) => {
  const browser = browserFor(t);
  const error = { type: "conflict_error", code: "no", message: "No." };
  const answers = [Response.json({ error }, { status: 409 }), new Response("Bad gateway", { status: 502 })];
  const streams = servedBy(browser, () => answers.shift());
  const session = new RealtimeSession({ sessionId: "sess_1", transport: "sse" });
  const told = listen(session, "error", "disconnect");
  session.connect();
  await arrived();
  streams[0].deliver(first);
  await arrived();
  const refused = session.respond("1");
  await assert.rejects(refused.done(), { code: "no" });
  session.respond("2");
  await arrived();
  assert.deepEqual(told.map(([type, detail]) => [type, detail.error?.event_id ?? detail.code]), [
    ["error", refused.eventId], ["disconnect", 1013],
  ]);
  await browser.clock.pass(1_000);
  await arrived();
  streams[1].deliver(first);
  await arrived();
  assert.deepEqual(browser.requests.filter(({ body }) => body).map(({ body }) => body.input), ["1", "2", "2"]);
});

test("a command over HTTP that is never answered is repeated on the next connection", async (t) => {
  const browser = browserFor(t);
  const answers = [new Promise(() => {})];
  const streams = servedBy(browser, () => answers.shift());
  const session = new RealtimeSession({ sessionId: "sess_1", transport: "sse" });
  const told = listen(session, "disconnect");
  session.connect();
  await arrived();
  streams[0].deliver(first);
  await arrived();
  session.respond("1");
  session.respond("2");
  for (let seconds = 0; seconds < 45; seconds += 5) {
    streams[0].write(": alive\n\n");
    await arrived();
    await browser.clock.pass(5_000);
  }
  assert.deepEqual(told.map(([, { reason }]) => reason), ["no answer"]);
  await browser.clock.pass(1_000);
  await arrived();
  streams[1].deliver(first);
  await arrived();
  assert.deepEqual(browser.requests.filter(({ body }) => body).map(({ body }) => body.input), ["1", "1", "2"]);
});

test("what was sent over HTTP before it is closed is answered before the stream is cut", async (t) => {
  const browser = browserFor(t);
  const streams = servedBy(browser);
  const session = new RealtimeSession({ sessionId: "sess_1", transport: "sse" });
  session.connect();
  await arrived();
  streams[0].deliver(first);
  await arrived();
  session.cancel("resp_1");
  session.send({ type: "session.close" });
  session.close();
  await arrived();
  assert.deepEqual(browser.requests.filter(({ body }) => body).map(({ body }) => body.type), [
    "response.cancel", "session.close",
  ]);
  assert.equal(browser.clock.timers.size, 0);
});

test("a large result is fetched from where the server is, which may be below a path, with a fresh token", async (t) => {
  const browser = browserFor(t);
  const session = await attached(browser, { url: "wss://example.org/ai/", token: () => "a.b.c" });
  browser.answer = () => Response.json([1]);
  const stream = session.createTask("count", {});
  browser.sockets[0].deliver({ type: "task.created", seq: 1, task: { id: stream.taskId } });
  const done = { type: "task.done", task_id: stream.taskId, seq: 1, status: "complete", result_url: "/v1/tasks/x/result" };
  browser.sockets[0].deliver(done);
  assert.deepEqual(await stream.result(), [1]);
  assert.equal(browser.sockets[0].url.href, "wss://example.org/ai/v1/realtime");
  assert.equal(browser.requests[0].url.href, "https://example.org/ai/v1/tasks/x/result");
  assert.equal(browser.requests[0].headers.authorization, "Bearer a.b.c");
});

test("what is on the way in the place of a large result is an error with a code", async (t) => {
  const browser = browserFor(t);
  const session = await attached(browser);
  const error = { type: "not_found_error", code: "result_gone", message: "Gone." };
  for (const [answer, expected] of [
    [() => new Response("<html>", { status: 502 }), { code: "unreachable", message: /502/ }],
    [() => new Response("<html>"), { code: "unreachable", message: /200/ }],
    [() => Response.json({}, { status: 403 }), { code: "unreachable", message: /403/ }],
    [() => { throw new TypeError("the network is away"); }, { code: "unreachable" }],
    [() => Response.json({ error }, { status: 404 }), { code: "result_gone", message: "Gone." }],
  ]) {
    browser.answer = answer;
    await assert.rejects(session.fetchResult("/v1/tasks/x/result"), { name: "RealtimeError", ...expected });
  }
});

test("what has no type is no message", async (t) => {
  const session = await attached(browserFor(t));
  assert.throws(() => session.send({ no: "type" }), { name: "TypeError", message: /type/ });
});
