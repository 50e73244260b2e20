/**
 * The demo page: wires a session to the conversation, the composer and the line of facts. The session's id
 * is in the address after `#`, so a reload and a second tab continue the same one. A token may come there as
 * `#token=…`, and is not left there.
 */

import { Conversation } from "./conversation.js";
import { RealtimeSession } from "./realtime.js";

/** How long a dropped connection stays away, so that one can watch the answer catch up. */
const CUT_MS = 1_500;
/** The answer must survive the cut and a reload, so the server waits longer than either takes. */
const GRACE_MS = 10_000;
const TOKEN_MARK = "#token=";
const TOKEN_NEEDED = 4401;
const UNKNOWN_SESSION = 4404;
const CLOSINGS = new Map([
  [1000, "This session was closed."],
  [1009, "That was more than the server takes at once."],
  [4400, "The server could not read what this page sent."],
  [4401, "The server asks for a token."],
  [4403, "Your token does not allow this."],
  [UNKNOWN_SESSION, "This session has expired, or was never here."],
  [4410, "This session was deleted."],
]);

/** @template {HTMLElement} T @param {string} id @returns {T} */
const byId = (id) => /** @type {T} */ (document.getElementById(id));

const input = /** @type {HTMLTextAreaElement} */ (byId("input"));
const sendButton = /** @type {HTMLButtonElement} */ (byId("send"));
const dropButton = byId("drop");
const conversation = new Conversation(byId("log"), byId("scroller"));

/** @type {RealtimeSession} */
let session;
/** The token that came in the address. @type {string | undefined} */
let token;
let facts = newFacts();

function newFacts() {
  return {
    events: 0,
    merged: 0,
    opens: 0,
    caughtUp: 0,
    /** When this page asked for an answer whose first token is awaited. @type {Map<string, number>} */
    askedAt: new Map(),
    firstTokenMs: /** @type {number | undefined} */ (undefined),
  };
}

// --- the session ----------------------------------------------------------------------------------------

/** @param {string | null} sessionId the session to continue, or null for a new one */
function start(sessionId) {
  const before = session;
  session = new RealtimeSession({ url: new URL("v1/realtime", document.baseURI), sessionId, token });
  before?.close();
  conversation.clear();
  facts = newFacts();
  byId("intro").hidden = true;
  byId("token").hidden = true;
  setComposer(true);
  listen(session);
  session.connect();
  showState("connecting", "Connecting…");
}

/** @param {RealtimeSession} one */
function listen(one) {
  /** @type {Record<string, (detail: any) => void>} */
  const listeners = {
    open: opened,
    disconnect: disconnected,
    closed,
    error: refused,
    event: count,
    "conversation.item.created": (event) => { conversation.addItem(event); byId("intro").hidden = true; },
    "response.created": (event) => conversation.addAnswer(event),
    "response.output_text.delta": grown,
    "response.reasoning.delta": (event) => conversation.update(event, false),
    "response.in_progress": (event) => conversation.update(event, false),
    "response.done": (event) => conversation.update(event, false),
  };
  for (const [type, listener] of Object.entries(listeners)) {
    one.addEventListener(type, (event) => {
      // A session that was left still tells that it is closed.
      if (one === session) listener(/** @type {CustomEvent} */ (event).detail);
    });
  }
}

/** @param {any} first */
function opened(first) {
  facts.opens += 1;
  facts.caughtUp = 0;
  const created = first.type === "session.created";
  if (created) session.send({ type: "session.update", session: { disconnect_grace_ms: GRACE_MS } });
  history.replaceState(null, "", `#${session.sessionId}`);
  if (conversation.empty) byId("intro").hidden = !created && first.positions.session > 1;
  showState("open", "Connected");
  schedule();
}

/** @param {{reconnectInMs: number}} detail */
function disconnected({ reconnectInMs }) {
  showState("waiting", `Cut off, back in ${(reconnectInMs / 1000).toFixed(1)} s`);
  schedule();
}

/** @param {{code: number}} detail */
function closed({ code }) {
  const reason = CLOSINGS.get(code) ?? "The server ended the connection.";
  if (code === UNKNOWN_SESSION && conversation.empty) {
    start(null);
    notify(`${reason} This is a new one.`);
    return;
  }
  showState("closed", "Closed");
  setComposer(false);
  byId("token").hidden = code !== TOKEN_NEEDED;
  notify(code === TOKEN_NEEDED ? "" : `${reason} “New session” starts another.`);
  schedule();
}

/** @param {any} event */
function grown(event) {
  const caughtUp = facts.opens > 1 && event.replay === true;
  if (caughtUp) {
    facts.caughtUp += event.merged ?? 1;
    showState("open", `Back, ${facts.caughtUp} tokens caught up`);
  }
  const askedAt = facts.askedAt.get(event.response_id);
  if (askedAt !== undefined) facts.firstTokenMs = performance.now() - askedAt;
  facts.askedAt.delete(event.response_id);
  conversation.update(event, caughtUp);
}

/** @param {{error: any}} event */
function refused({ error }) {
  const wait = error.retry_after_ms ? ` Try again in ${Math.ceil(error.retry_after_ms / 1000)} s.` : "";
  notify(error.message + wait);
  if (error.fatal) session.addEventListener("open", () => notify(""), { once: true });
  const text = conversation.takeBack(error.event_id);
  if (text && !input.value) setInput(text);
}

// --- what the user does ---------------------------------------------------------------------------------

function say() {
  const text = input.value.trim();
  if (!text || session.state === "closed") return;
  const { responseId, eventId } = session.respond(text, { multitask_strategy: "interrupt" });
  facts.askedAt.set(responseId, performance.now());
  conversation.say(eventId, text);
  byId("intro").hidden = true;
  notify("");
  setInput("");
}

function stop() {
  for (const { id } of session.unfinished) session.cancel(id);
}

/** @param {string} text */
function setInput(text) {
  input.value = text;
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

/** @param {boolean} enabled */
function setComposer(enabled) {
  input.disabled = !enabled;
  sendButton.disabled = !enabled;
}

/** Gives the token to the server for a cookie that scripts can't read. @param {string} given */
async function signIn(given) {
  if (!await keep(given)) return notify("The server does not accept this token.");
  token = undefined;
  notify("");
  start(session.sessionId);
}

/** @param {string} given @returns {Promise<boolean>} whether the server has taken it */
async function keep(given) {
  const headers = { authorization: `Bearer ${given}` };
  return (await fetch("v1/auth/cookie", { method: "POST", headers })).ok;
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (session.unfinished.length) stop();
  else say();
});

input.addEventListener("input", () => setInput(input.value));
input.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  say();
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});

dropButton.addEventListener("click", () => {
  if (session.state === "open") session.drop(CUT_MS);
});

byId("new").addEventListener("click", () => {
  history.pushState(null, "", location.pathname + location.search); // Back returns to the session before
  notify("");
  start(null);
  input.focus();
});

byId("intro").addEventListener("click", ({ target }) => {
  if (!(target instanceof HTMLButtonElement)) return;
  setInput(target.textContent ?? "");
  input.focus();
  say();
});

byId("token").addEventListener("submit", (event) => {
  event.preventDefault();
  const field = /** @type {HTMLInputElement} */ (byId("token-input"));
  signIn(field.value.trim()).catch(() => notify("The server can't be reached."));
  field.value = "";
});

// --- what the page tells --------------------------------------------------------------------------------

/** @param {string} state @param {string} words */
function showState(state, words) {
  document.body.dataset.state = state;
  byId("state").textContent = words;
}

/** @param {string} words nothing hides it */
function notify(words) {
  byId("notice").textContent = words;
  byId("notice").hidden = !words;
}

/** @param {any} event */
function count(event) {
  facts.events += 1;
  facts.merged += event.merged ?? 0;
  schedule();
}

let scheduled = false;

/** Events come faster than frames; the facts are drawn once a frame. */
function schedule() {
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(draw);
}

function draw() {
  scheduled = false;
  const running = session.state !== "closed" && session.unfinished.length > 0;
  sendButton.textContent = running ? "Stop" : "Send";
  sendButton.classList.toggle("stop", running);
  // Not `disabled`: the keyboard would lose its place.
  dropButton.ariaDisabled = String(session.state !== "open");
  input.placeholder = running ? "Say something else" : "Ask something";
  drawFacts();
}

/** @param {string} id */
const short = (id) => (id.length > 14 ? `${id.slice(0, 9)}…${id.slice(-3)}` : id);

function drawFacts() {
  const link = /** @type {HTMLAnchorElement} */ (byId("fact-session"));
  link.textContent = session.sessionId ? short(session.sessionId) : "–";
  if (session.sessionId) link.href = `#${session.sessionId}`;
  const { events, merged, firstTokenMs } = facts;
  byId("fact-participants").textContent = String(session.participants.size);
  byId("fact-events").textContent = events.toLocaleString();
  byId("fact-merged").textContent = merged.toLocaleString();
  byId("fact-first-token").textContent = firstTokenMs === undefined ? "–" : `${Math.round(firstTokenMs)} ms`;
  byId("fact-positions").textContent =
    [...session.positions].map(([channel, position]) => `${short(channel)} ${position}`).join(" · ") || "–";
}

// --- start ----------------------------------------------------------------------------------------------

const sessionInAddress = () => /^#(sess_[\w-]+)$/.exec(location.hash)?.[1] ?? null;

/** Whether a token came in the address, where it must not stay: it would be on the screen, and in the history. */
function takeToken() {
  if (!location.hash.startsWith(TOKEN_MARK)) return false;
  token = location.hash.slice(TOKEN_MARK.length);
  history.replaceState(null, "", location.pathname + location.search);
  keep(token).catch(() => {}); // for a reload and for other tabs; this one does without
  return true;
}

addEventListener("hashchange", () => {
  if (takeToken()) start(null);
  else if (sessionInAddress() !== session.sessionId) start(sessionInAddress());
});

takeToken();
start(sessionInAddress());
