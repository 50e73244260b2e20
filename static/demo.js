/**
 * The demo page, a telehealth visit: wires a session to what is on the page. The session's id and one's seat are in
 * the address after `#`, so a reload goes on with the same visit. A token may come there, too, and is not left there.
 */

import { fragment, readAddress } from "./demo/address.js";
import { CLOSINGS, TOKEN_NEEDED, UNKNOWN_SESSION, UNSENT } from "./demo/closings.js";
import { Conversation, spokenId } from "./demo/conversation.js";
import { byId, onceAFrame, show } from "./demo/elements.js";
import { showInvitation } from "./demo/invitation.js";
import { Note } from "./demo/note.js";
import { showPresence } from "./demo/presence.js";
import { SAMPLE } from "./demo/sample.js";
import { showState, showWait } from "./demo/standing.js";
import { startTheme } from "./demo/theme.js";
import { Underneath } from "./demo/underneath.js";
import { Microphone, Speaker } from "./demo/voice.js";
import { RealtimeSession } from "./realtime.js";

/** Where the server is mounted, which need not be the root of its host. */
const ROOT = new URL("..", import.meta.url);
/** How long a dropped connection stays away, so that one can watch the answer catch up. */
const CUT_MS = 1_500;
/** The answer must survive the cut and a reload, so the server waits longer than either takes. */
const GRACE_MS = 10_000;
const INSTRUCTIONS = "You are the assistant in a telehealth visit, in which a clinician and a patient talk in writing. "
  + "Answer whoever spoke last, in a few short sentences of plain text. You diagnose and prescribe nothing: that is the "
  + "clinician's. Where something sounds like an emergency, say so first.";

const input = /** @type {HTMLTextAreaElement} */ (byId("input"));
const seatChoice = /** @type {HTMLSelectElement} */ (byId("seat"));
const conversation = new Conversation(byId("log"), byId("scroller"));
const speaker = new Speaker(heardAnswer, speechFailed);
const microphone = new Microphone({ started: stop, heard: heardUser, ended: microphoneEnded });

/** @type {RealtimeSession} */
let session;
/** @type {Note} */
let note;
/** @type {Underneath} */
let underneath;
/** The token that came in the address. @type {string | undefined} */
let token;
/** @type {import("./demo/address.js").Seat} */
let seat;
let owner = "";
let connectionId = "";

// --- the session ----------------------------------------------------------------------------------------

/** @param {string | null} sessionId the session to continue, or null for a new one */
function start(sessionId) {
  const before = session;
  session = new RealtimeSession({ url: new URL("v1/realtime", ROOT), sessionId, token });
  before?.close();
  speaker.stop();
  conversation.clear();
  note = new Note(session);
  underneath = new Underneath(session);
  byId("intro").hidden = sessionId !== null;
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
    event: received,
    "conversation.item.created": (event) => { conversation.addItem(event); byId("intro").hidden = true; },
    "conversation.item.truncated": (event) => conversation.truncate(event),
    "response.created": answerCreated,
    "response.output_text.delta": grown,
    "response.reasoning.delta": (event) => conversation.update(event, false),
    "response.in_progress": (event) => conversation.update(event, false),
    "response.done": answerDone,
  };
  for (const [type, listener] of Object.entries(listeners)) {
    one.addEventListener(/** @type {any} */ (type), (event) => {
      // A session that was left still tells that it is closed.
      if (one === session) listener(event.detail);
    });
  }
}

/** @param {any} first */
function opened(first) {
  underneath.opened(first);
  owner = first.session.owner;
  connectionId = first.connection_id;
  const created = first.type === "session.created";
  if (created) {
    session.send({
      type: "session.update", session: { disconnect_grace_ms: GRACE_MS, instructions: INSTRUCTIONS },
    });
  }
  history.replaceState(null, "", fragment(session.sessionId, seat));
  note.draw();
  if (conversation.empty) byId("intro").hidden = !created && first.positions.session > 1;
  const back = underneath.hasReconnected ? "Back" : "Connected";
  showState("open", session.transport === "sse" ? `${back}, by server-sent events` : back);
  draw();
}

/** @param {{reconnectInMs: number}} detail */
function disconnected({ reconnectInMs }) {
  underneath.disconnected();
  note.draw();
  showWait(session, reconnectInMs);
  draw();
}

/** @param {{code: number}} detail */
function closed({ code }) {
  const reason = CLOSINGS.get(code) ?? "The server ended the connection.";
  if (code === UNKNOWN_SESSION && conversation.empty) {
    start(null);
    notify(`${reason} This is a new one.`);
    return;
  }
  showState("closed", code === TOKEN_NEEDED ? "Waits for a token" : "Closed");
  conversation.giveUp();
  note.draw();
  setComposer(false);
  byId("token").hidden = code !== TOKEN_NEEDED;
  if (code === TOKEN_NEEDED) byId("token-input").focus();
  notify(code === TOKEN_NEEDED ? "" : `${reason} “New visit” starts another.`);
  draw();
}

/** @param {any} event */
function received(event) {
  underneath.received(event);
  note.update(event);
  draw();
}

/** @param {any} event */
function answerCreated(event) {
  conversation.addAnswer(event);
  if (!event.replay) speaker.begin(event.response.id);
}

/** @param {any} event */
function grown(event) {
  const caughtUp = underneath.hasReconnected && event.replay === true;
  conversation.update(event, caughtUp);
  speaker.say(event.response_id, session.responses.get(event.response_id)?.text ?? "", false);
}

/** @param {any} event */
function answerDone(event) {
  conversation.update(event, false);
  if (event.status === "cancelled" && speaker.reads === event.response_id) speaker.stop();
  speaker.say(event.response_id, session.responses.get(event.response_id)?.text ?? "", true);
}

/** @param {{error: any}} event */
function refused({ error }) {
  const wait = error.retry_after_ms ? ` Try again in ${Math.ceil(error.retry_after_ms / 1000)} s.` : "";
  notify(error.message + wait);
  if (error.fatal) session.addEventListener("open", () => notify(""), { once: true });
  note.refused(error.event_id);
  const text = conversation.takeBack(error.event_id);
  if (text && !input.value) setInput(text);
}

// --- what the user does ---------------------------------------------------------------------------------

/** @param {string} text */
function say(text) {
  if (!text || session.state === "closed") return;
  if (/** @type {HTMLInputElement} */ (byId("ask")).checked) ask(text);
  else sayAs(seat, text);
  notify("");
}

/** Without asking for an answer. @param {import("./demo/address.js").Seat} speaks @param {string} content */
function sayAs(speaks, content) {
  const eventId = spokenId(speaks);
  session.send({ type: "conversation.item.create", event_id: eventId, item: { role: "user", content } });
  showSaid(eventId, content);
}

/** @param {string} eventId @param {string} text */
function showSaid(eventId, text) {
  conversation.say(eventId, text);
  byId("intro").hidden = true;
}

/** @param {string} text */
function ask(text) {
  // Of an answer that is read aloud the conversation keeps what was heard; the others the new one interrupts.
  if (speaker.reads) session.cancel(speaker.reads);
  speaker.stop();
  const eventId = spokenId(seat);
  const { responseId } = session.respond(text, { event_id: eventId, multitask_strategy: "interrupt" });
  showSaid(eventId, text);
  underneath.latency.asked(responseId, performance.now());
}

/** Where it can't be sent, as too much waits for the connection already, the text stays where it is. */
function sayInput() {
  attempt(() => {
    say(input.value.trim());
    setInput("");
  });
}

/** @param {() => void} send */
function attempt(send) {
  try {
    send();
  } catch (error) {
    const { code = "", message = String(error) } = /** @type {{code?: string, message?: string}} */ (error);
    notify(UNSENT.get(code) ?? message);
  }
}

/** Stops what is written or read now. */
function stop() {
  speaker.stop();
  if (session.state !== "closed") session.interrupt();
  draw();
}

function fillIn() {
  for (const [speaks, content] of SAMPLE) sayAs(speaks, content);
}

/** @param {string} id @param {number | undefined} chars undefined: it is read by the eyes */
function heardAnswer(id, chars) {
  const answer = session.responses.get(id);
  if (chars !== undefined) session.heard(id, chars);
  else if (answer) delete answer.heardChars;
}

/** @param {string} text @param {boolean} isFinal */
function heardUser(text, isFinal) {
  setInput(text);
  if (isFinal) sayInput();
}

/** @param {string} [error] */
function microphoneEnded(error) {
  byId("talk").ariaPressed = "false";
  if (error && error !== "no-speech" && error !== "aborted") notify(`The browser can't listen (${error}). Typing works.`);
}

function speechFailed() {
  setVoice(false);
  notify("The browser can't read aloud: it may have no voice.");
}

/** @param {boolean} on */
function setVoice(on) {
  speaker.on = on;
  byId("voice").ariaPressed = String(on);
}

/** @param {string} text */
function setInput(text) {
  input.value = text;
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

/** @param {boolean} enabled */
function setComposer(enabled) {
  if (!enabled && document.activeElement === input) byId("new").focus();
  input.disabled = !enabled;
  /** @type {HTMLButtonElement} */ (byId("send")).disabled = !enabled;
}

/** @param {string} view what a small screen shows */
function showView(view) {
  document.body.dataset.view = view;
  for (const button of document.querySelectorAll(".views button")) {
    button.ariaPressed = String(button instanceof HTMLElement && button.dataset.view === view);
  }
  draw();
}

/** Gives the token to the server for a cookie that scripts can't read. @param {string} given */
async function signIn(given) {
  if (!await keep(given)) return notify("The server does not accept this token.");
  token = undefined;
  notify("");
  start(session.sessionId ?? readAddress(`#token=${given}`).sessionId);
  input.focus();
}

/** @param {string} given @returns {Promise<boolean>} whether the server has taken it */
async function keep(given) {
  const headers = { authorization: `Bearer ${given}` };
  return (await fetch(new URL("v1/auth/cookie", ROOT), { method: "POST", headers })).ok;
}

/** A link to a visit that is over leads nowhere. */
const canInvite = () => session.sessionId !== null && session.state !== "closed";
const canDraft = () => note.canAsk && !conversation.empty;

/** @param {string} id @param {(event: Event) => void} listener */
const onClick = (id, listener) => byId(id).addEventListener("click", listener);
/** Buttons that wait are not `disabled`: the keyboard would lose its place. @param {string} id @param {boolean} can */
const allow = (id, can) => { byId(id).ariaDisabled = String(!can); };

byId("composer").addEventListener("submit", (event) => { event.preventDefault(); sayInput(); });
input.addEventListener("input", () => setInput(input.value));
input.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  sayInput();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) stop();
});
seatChoice.addEventListener("change", () => {
  history.replaceState(null, "", fragment(session.sessionId, seatChoice.value === "patient" ? "patient" : "clinician"));
  takeSeat();
  draw();
});
onClick("stop", stop);
onClick("drop", () => { if (session.state === "open") session.drop(CUT_MS); });
onClick("share", () => { if (canInvite() && session.sessionId) showInvitation(session.sessionId, seat, owner); });
onClick("draft", () => { if (canDraft()) attempt(() => note.ask()); draw(); });
onClick("note-stop", () => note.stop());
onClick("note-copy", () => copy("note-copy", note.text));
onClick("invite-copy", () => copy("invite-copy", byId("invite-link").textContent ?? ""));
onClick("sample", () => { if (conversation.empty) attempt(fillIn); input.focus(); });
onClick("voice", () => {
  if (!Speaker.isThere) return notify("This browser can't read aloud.");
  setVoice(!speaker.on);
});
onClick("talk", () => {
  if (!Microphone.isThere) return notify("This browser can't listen. Typing works.");
  if (microphone.on) return microphone.stop();
  microphone.start();
  byId("talk").ariaPressed = "true";
});
onClick("new", () => {
  history.pushState(null, "", location.pathname + location.search + fragment(null, seat)); // Back returns to the one before
  notify("");
  if (!input.value) setInput(conversation.lost);
  start(null);
  input.focus();
});
onClick("suggestions", ({ target }) => {
  if (!(target instanceof HTMLElement) || !target.dataset.say) return;
  input.focus();
  say(target.dataset.say);
});
for (const button of document.querySelectorAll(".views button")) {
  button.addEventListener("click", () => showView(button instanceof HTMLElement ? button.dataset.view ?? "" : ""));
}
byId("token").addEventListener("submit", (event) => {
  event.preventDefault();
  const field = /** @type {HTMLInputElement} */ (byId("token-input"));
  signIn(field.value.trim()).catch(() => notify("The server can't be reached."));
  field.value = "";
});

/** @param {string} id of the button @param {string} text */
async function copy(id, text) {
  const button = byId(id);
  const words = button.textContent;
  const done = await navigator.clipboard?.writeText(text).then(() => true, () => false); // plain http has none
  button.textContent = done ? "Copied" : "Could not copy";
  setTimeout(() => { button.textContent = words; }, 1_500);
}

// --- what the page tells --------------------------------------------------------------------------------

/** @param {string} words nothing hides it */
function notify(words) {
  byId("notice").textContent = words;
  byId("notice").hidden = !words;
}

/** Events come faster than frames. */
const draw = onceAFrame(() => {
  const running = session.state !== "closed" && (session.unfinished.length > 0 || speaker.reads !== undefined);
  show("stop", running, "input");
  input.placeholder = running ? "Say something else" : "Say something";
  allow("drop", session.state === "open");
  allow("share", canInvite());
  allow("draft", canDraft());
  showPresence([...session.participants.values()], connectionId, seat);
  if (session.state === "open" && underneath.caughtUp) showState("open", `Back, ${underneath.caughtUp} tokens caught up`);
  underneath.draw();
});

// --- start ----------------------------------------------------------------------------------------------

/** Who sits here, as the address says. */
function takeSeat() {
  seat = readAddress(location.hash).seat;
  seatChoice.value = conversation.seat = seat;
}

/** A token must not stay in the address: it would be on the screen, and in the history. */
function takeAddress() {
  const address = readAddress(location.hash);
  takeSeat();
  if (address.token) {
    token = address.token;
    history.replaceState(null, "", location.pathname + location.search + fragment(address.sessionId, seat));
    keep(token).catch(() => {}); // for a reload and for other tabs; this one does without
  }
  return address;
}

addEventListener("hashchange", () => {
  const { sessionId, token: given } = takeAddress();
  if (given || sessionId !== session.sessionId) start(sessionId);
});
addEventListener("resize", () => draw());
allow("voice", Speaker.isThere);
allow("talk", Microphone.isThere);
const { sessionId } = takeAddress();
start(sessionId);
startTheme(() => draw());
