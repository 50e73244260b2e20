/**
 * The conversation on the page. What people and models said becomes text nodes, never markup, so it can't do
 * anything but be read, wherever it was split on its way.
 */

import { newId } from "../realtime.js";
import { SEATS } from "./address.js";
import { failureInWords } from "./closings.js";
import { element, onceAFrame } from "./elements.js";
import { ANONYMOUS } from "./presence.js";

/** @typedef {import("./address.js").Seat} Seat */

/** What is said under an answer that is not whole, by its `stop_reason`, else by its `status`. */
const MARKS = new Map([
  ["interrupted", "Interrupted by the next message"],
  ["cancelled", "Stopped"],
  ["max_tokens", "Cut short: it reached its longest allowed length"],
  ["budget_exceeded", "Cut short: the token budget is used up"],
  ["incomplete", "Cut short"],
  ["failed", "Failed"],
]);
/** Nearer to the end than this, the reader is taken to follow it. */
const FOLLOW_PX = 96;

/** One answer, growing. */
class AnswerView {
  #text = element("div", "text");
  #thoughts = element("div", "thoughts");
  #thinking = element("details", "thinking", element("summary", "", "Thinking"), this.#thoughts);
  #mark = element("p", "mark");
  /** How much of it was heard, where it was read aloud and cut short. @type {number | undefined} */
  #heardChars;

  constructor() {
    this.#thinking.hidden = true;
    this.#mark.hidden = true;
    this.element = element("li", "answer", element("p", "who", "Assistant"));
    this.element.append(this.#thinking, this.#text, this.#mark);
    this.element.ariaBusy = "true"; // a screen reader waits for the whole answer
  }

  /** @param {string} delta @param {boolean} caughtUp whether to show that it was missed and is here now */
  add(delta, caughtUp) {
    const last = this.#text.lastChild;
    if (caughtUp) this.#text.append(element("span", "caught-up", delta));
    else if (last instanceof Text) last.appendData(delta);
    else this.#text.append(delta);
  }

  /** @param {string} delta */
  think(delta) {
    this.#thinking.hidden = false;
    this.#thoughts.append(delta);
  }

  /** What was shown is void. */
  reset() {
    this.#text.replaceChildren();
    this.#thoughts.replaceChildren();
  }

  /** Of what was read aloud only so much was heard. @param {number} chars */
  truncate(chars) {
    this.#heardChars = chars;
    if (this.element.ariaBusy === "false") this.#dimUnheard();
  }

  /** @param {any} done */
  end({ status, stop_reason, error, heard_chars }) {
    this.element.ariaBusy = "false";
    this.element.dataset.status = status;
    this.#heardChars ??= heard_chars;
    if (status !== "completed") {
      const words = MARKS.get(stop_reason) ?? MARKS.get(status) ?? "Ended early";
      this.#setMark(error ? `${words}: ${failureInWords(error)}` : words);
    }
    this.#dimUnheard();
  }

  /** Nobody knows how it went on. */
  giveUp() {
    if (this.element.ariaBusy === "false") return;
    this.element.ariaBusy = "false";
    this.element.dataset.status = "failed";
    this.#setMark("The connection ended here");
  }

  #dimUnheard() {
    const text = this.#text.textContent ?? "";
    if (this.#heardChars === undefined || this.#heardChars >= text.length) return;
    const unheard = element("span", "unheard", text.slice(this.#heardChars));
    this.#text.replaceChildren(text.slice(0, this.#heardChars), unheard);
    this.#setMark(`Interrupted: ${this.#heardChars} of ${text.length} characters were heard, and are kept`);
  }

  /** @param {string} words */
  #setMark(words) {
    this.#mark.replaceChildren(words);
    this.#mark.hidden = false;
  }
}

/** The list of what was said, in the order of the session's log. */
export class Conversation {
  #list;
  #scroller;
  /** Who sits at this page. @type {Seat} */
  #seat = "clinician";
  /** @type {Map<string, AnswerView>} */
  #answers = new Map();
  /** What the server has not confirmed yet, by command id. @type {Map<string, HTMLElement>} */
  #unsent = new Map();
  #follows = true;
  /** Where the scroller stood when it last moved. */
  #top = 0;
  #scroll = onceAFrame(() => { if (this.#follows && !this.empty) this.#scroller.scrollTop = this.#scroller.scrollHeight; });

  /** @param {HTMLElement} list @param {HTMLElement} scroller */
  constructor(list, scroller) {
    this.#list = list;
    this.#scroller = scroller;
    scroller.addEventListener("scroll", () => {
      // Much may have come since the page scrolled by itself: only who moved up has stopped following.
      const isNearEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < FOLLOW_PX;
      this.#follows = isNearEnd || (this.#follows && scroller.scrollTop >= this.#top);
      this.#top = scroller.scrollTop;
    }, { passive: true });
    new ResizeObserver(this.#scroll).observe(scroller); // a notice or a keyboard takes room
  }

  /** @param {Seat} seat who sits at this page: what they said stands on the right */
  set seat(seat) {
    this.#seat = seat;
    for (const said of this.#list.querySelectorAll("[data-seat]")) {
      said.classList.toggle("own", said instanceof HTMLElement && said.dataset.seat === seat);
    }
  }

  get empty() {
    return this.#list.childElementCount === 0;
  }

  /** Back to an empty page. */
  clear() {
    this.#list.replaceChildren();
    this.#answers.clear();
    this.#unsent.clear();
    this.#follows = true;
  }

  /** The connection has ended for good: nothing comes of what is under way. */
  giveUp() {
    for (const view of this.#answers.values()) view.giveUp();
    for (const said of this.#unsent.values()) said.classList.add("lost");
  }

  /** What may not have been sent before the connection ended for good. */
  get lost() {
    return [...this.#list.querySelectorAll(".lost .text")].map(({ textContent }) => textContent).join("\n");
  }

  /**
   * Shows at once what was said here, dimmed until the server has it.
   * @param {string} eventId @param {string} text
   */
  say(eventId, text) {
    const said = this.#message({ role: "user", content: text, user: ANONYMOUS }, eventId);
    said.classList.add("unsent");
    this.#unsent.set(eventId, said);
    this.#list.append(said);
    this.#follows = true;
    this.#scroll();
  }

  /** Takes back what the server refused, and gives its text. @param {string} [eventId] */
  takeBack(eventId = "") {
    const said = this.#unsent.get(eventId);
    this.#unsent.delete(eventId);
    said?.remove();
    return said?.querySelector(".text")?.textContent ?? "";
  }

  /** @param {any} created a `conversation.item.created` */
  addItem({ item, for_event_id = "" }) {
    const said = this.#unsent.get(for_event_id);
    this.#unsent.delete(for_event_id);
    if (!said) return this.#insert(this.#message(item, for_event_id));
    said.classList.remove("unsent");
    said.querySelector(".who")?.replaceChildren(speakerOf(item.user, for_event_id));
    this.#insert(said);
  }

  /** @param {any} created a `response.created` */
  addAnswer({ response }) {
    const view = new AnswerView();
    this.#answers.set(response.id, view);
    this.#insert(view.element);
  }

  /** @param {any} event any event of a response's channel @param {boolean} caughtUp */
  update(event, caughtUp) {
    const view = this.#answers.get(event.response_id);
    if (!view) return;
    if (event.reset) view.reset();
    if (event.type === "response.output_text.delta") view.add(event.delta, caughtUp);
    if (event.type === "response.reasoning.delta") view.think(event.delta);
    if (event.type === "response.done") view.end(event);
    this.#scroll();
  }

  /** @param {any} truncated a `conversation.item.truncated` */
  truncate({ item }) {
    this.#answers.get(item.response_id)?.truncate(item.heard_chars);
  }

  /** @param {{role: string, content: string, user: string}} item @param {string} eventId of the command that said it */
  #message({ role, content, user }, eventId) {
    if (role !== "user") return element("li", role === "system" ? "system" : "answer", element("div", "text", content));
    const seat = seatOf(eventId);
    const said = element("li", "user", element("p", "who", speakerOf(user, eventId)), element("div", "text", content));
    if (seat) said.dataset.seat = seat;
    said.classList.toggle("own", seat === this.#seat);
    return said;
  }

  /** Keeps what is unsent at the end. @param {HTMLElement} entry */
  #insert(entry) {
    const next = this.#list.querySelector(":scope > .unsent");
    // What is in its place already would flicker.
    if (!entry.isConnected || entry.nextElementSibling !== next) this.#list.insertBefore(entry, next);
    this.#scroll();
  }
}

/**
 * Who speaks is in the command's id, which everybody is told with what it did: the server has no seats.
 * @param {Seat} seat
 */
export const spokenId = (seat) => newId(seat);

/** @param {string} user @param {string} eventId of the command that said it */
function speakerOf(user, eventId) {
  const seat = seatOf(eventId);
  return [seat && SEATS[seat], user !== ANONYMOUS && user].filter(Boolean).join(" · ") || "Guest";
}

/** @param {string} eventId @returns {Seat | undefined} */
function seatOf(eventId) {
  const [name = ""] = eventId.split("_");
  return Object.hasOwn(SEATS, name) ? /** @type {Seat} */ (name) : undefined;
}
