/** The draft of the note on the page: a task's progress, and its sections as they are written. */

import { failureInWords } from "./closings.js";
import { byId, element, onceAFrame, show } from "./elements.js";

/** @typedef {import("../realtime.js").RealtimeSession} RealtimeSession */
/** @typedef {import("../realtime/state.js").Task} Task */

export const TASK = "clinical_note";
/** Nearer to the end than this, the reader is taken to follow it. */
const FOLLOW_PX = 64;
const STATES = {
  pending: "Waits for its turn",
  running: "Being written",
  complete: "Draft, to be checked",
  failed: "Failed",
  cancelled: "Stopped",
};

/** The newest note of a session. */
export class Note {
  #session;
  /** @type {string | undefined} */
  #taskId;
  /** What was asked for here, and has not begun. @type {import("../realtime.js").TaskStream | undefined} */
  #asked;
  /** Shows how it stands, in the next frame. */
  draw = onceAFrame(() => this.#show());

  /** @param {RealtimeSession} session */
  constructor(session) {
    this.#session = session;
    this.#show();
  }

  /** Whether one is being written. */
  get running() {
    return this.#session.state !== "closed" && this.#taskId !== undefined && this.#session.positions.has(this.#taskId);
  }

  /** Whether one may be asked for. */
  get canAsk() {
    return this.#session.state !== "closed" && !this.running && !this.#asked;
  }

  /** Asks for one, which may have to wait for the connection. Throws as the session's `send` does. */
  ask() {
    if (this.canAsk) this.#asked = this.#session.createTask(TASK, {});
    this.draw();
  }

  /** It will not be written, if that is what the error refuses. @param {string} [eventId] of the command that is refused */
  refused(eventId) {
    if (this.#asked?.eventId === eventId) this.#asked = undefined;
    this.draw();
  }

  /** Takes it up if it is of a note. @param {any} event any event of a task's channel, or `task.created` */
  update(event) {
    if (event.type === "task.created" && event.task.name === TASK) this.#taskId = event.task.id;
    if (event.type === "task.created" && event.task.id === this.#asked?.taskId) this.#asked = undefined;
    if (this.#taskId && (event.task?.id ?? event.task_id) === this.#taskId) this.draw();
  }

  stop() {
    if (this.running && this.#taskId) this.#session.cancelTask(this.#taskId);
  }

  /** All of it as Markdown, as it was written. */
  get text() {
    return this.#task?.text ?? "";
  }

  get #task() {
    return this.#taskId ? this.#session.tasks.get(this.#taskId) : undefined;
  }

  #show() {
    const task = this.#task;
    const isOpen = this.#asked !== undefined || task?.status === "running" || task?.status === "pending";
    const isLost = this.#session.state === "closed" && isOpen;
    byId("note").dataset.status = isLost ? "lost" : this.#asked ? "asked" : task?.status ?? "none";
    byId("note-empty").hidden = task !== undefined;
    byId("note-text").hidden = task === undefined;
    byId("draft").textContent = task ? "Draft again" : "Draft the note";
    if (this.running) byId("note-stop").hidden = false;
    show("draft", !this.running, "note-stop");
    show("note-stop", this.running, "draft");
    show("note-copy", task?.status === "complete", "draft");
    if (task) showTask(task);
    byId("note-words").textContent = isLost ? "The connection ended here" : this.#words(task);
    if (!task) byId("note-text").replaceChildren();
  }

  /** @param {Task | undefined} task */
  #words(task) {
    if (this.#asked) return this.#session.state === "open" ? STATES.pending : "Waits for the connection";
    return task ? wordsOf(task) : "";
  }
}

/** @param {Task} task */
function showTask(task) {
  const { progress = 0, total } = task;
  const bar = /** @type {HTMLProgressElement} */ (byId("note-progress"));
  bar.max = total ?? 4;
  bar.value = progress;
  showText(byId("note-text"), task.text);
}

/** @param {Task} task */
function wordsOf({ status, message, error }) {
  if (error) return `${STATES[status]}: ${failureInWords(error)}`;
  return status === "running" && message ? `${STATES[status]}, ${message} is done` : STATES[status];
}

/**
 * Sections that are shown already stay the elements that they are; who reads along is taken along.
 * @param {HTMLElement} place @param {string} text
 */
function showText(place, text) {
  const follows = place.scrollHeight - place.scrollTop - place.clientHeight < FOLLOW_PX;
  const parts = text.trimStart().split(/\n*^## /m);
  while (place.childElementCount > parts.length) place.lastElementChild?.remove();
  parts.forEach((part, index) => {
    const shown = place.children[index];
    if (shown instanceof HTMLElement && shown.dataset.text === part) return;
    const made = index ? section(part) : element("blockquote", "label", part.replace(/^> ?/gm, ""));
    made.dataset.text = part;
    if (!shown) return place.append(made);
    made.classList.add("known");
    shown.replaceWith(made);
  });
  if (follows) place.scrollTop = place.scrollHeight;
}

/** @param {string} part a heading's line, and what is under it */
function section(part) {
  const [heading = "", ...lines] = part.split("\n");
  const made = element("section", "", element("h3", "", heading));
  /** @type {HTMLElement | undefined} */
  let list;
  // A bullet that nothing follows yet is none.
  for (const line of lines.filter((one) => !/^\s*[-*]?\s*$/.test(one))) {
    const [, item] = /^\s*[-*] (.*)/.exec(line) ?? [];
    if (item === undefined) made.append(element("p", "", line));
    else if (list && list === made.lastElementChild) list.append(point(item));
    else made.append((list = element("ul", "", point(item))));
  }
  return made;
}

/** A line of the form "Heading: content". @param {string} item */
function point(item) {
  const [, heading, content] = /^([^:“"]{1,60}): (.*)/.exec(item) ?? [];
  if (heading === undefined || content === undefined) return element("li", "", item);
  return element("li", "", element("b", "", `${heading}:`), ` ${content}`);
}
