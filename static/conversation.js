/**
 * The conversation on the page. What users and models said becomes text nodes, never markup, so it can't do
 * anything but be read, wherever it was split on its way.
 */

/** @typedef {import("./realtime.js").ServerEvent} ServerEvent */

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

/**
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {string} className
 * @param {(Node | string)[]} children strings become text nodes
 */
function element(tag, className, ...children) {
  const made = document.createElement(tag);
  made.className = className;
  made.append(...children);
  return made;
}

/** One answer, growing. */
class AnswerView {
  #text = element("div", "text");
  #thoughts = element("div", "thoughts");
  #thinking = element("details", "thinking", element("summary", "", "Thinking"), this.#thoughts);
  #mark = element("p", "mark");

  constructor() {
    this.#thinking.hidden = true;
    this.#mark.hidden = true;
    this.element = element("li", "answer", element("span", "unseen", "Answer: "));
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

  /** @param {ServerEvent} done */
  end({ status, stop_reason, error }) {
    this.element.ariaBusy = "false";
    this.element.dataset.status = status;
    if (status === "completed") return;
    const words = MARKS.get(stop_reason) ?? MARKS.get(status) ?? "Ended early";
    this.#mark.append(error ? `${words}: ${error.message}` : words);
    this.#mark.hidden = false;
  }
}

/** The list of what was said, in the order of the session's log. */
export class Conversation {
  #list;
  #scroller;
  /** @type {Map<string, AnswerView>} */
  #answers = new Map();
  /** What the server has not confirmed yet, by command id. @type {Map<string, HTMLElement>} */
  #unsent = new Map();
  #follows = true;
  /** Where the scroller stood when it last moved. */
  #top = 0;

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
    new ResizeObserver(() => this.#scroll()).observe(scroller); // a notice or a keyboard takes room
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

  /**
   * Shows at once what the user said, dimmed until the server has it.
   * @param {string} eventId
   * @param {string} text
   */
  say(eventId, text) {
    const said = this.#message("user", text);
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

  /** @param {ServerEvent} created a `conversation.item.created` */
  addItem({ item, for_event_id }) {
    this.takeBack(for_event_id);
    this.#insert(this.#message(item.role, item.content));
  }

  /** @param {ServerEvent} created a `response.created` */
  addAnswer({ response }) {
    const view = new AnswerView();
    this.#answers.set(response.id, view);
    this.#insert(view.element);
  }

  /** @param {ServerEvent} event any event of a response's channel @param {boolean} caughtUp */
  update(event, caughtUp) {
    const view = this.#answers.get(event.response_id ?? "");
    if (!view) return;
    if (event.reset) view.reset();
    if (event.type === "response.output_text.delta") view.add(event.delta, caughtUp);
    if (event.type === "response.reasoning.delta") view.think(event.delta);
    if (event.type === "response.done") view.end(event);
    this.#scroll();
  }

  /** @param {string} role @param {string} content */
  #message(role, content) {
    const who = role === "user" ? "You: " : role === "system" ? "Instruction: " : "Answer: ";
    const kind = role === "assistant" ? "answer" : role;
    return element("li", kind, element("span", "unseen", who), element("div", "text", content));
  }

  /** Keeps what is unsent at the end. @param {HTMLElement} entry */
  #insert(entry) {
    this.#list.insertBefore(entry, this.#list.querySelector(":scope > .unsent"));
    this.#scroll();
  }

  /** Once a frame, however many events came. */
  #scroll() {
    if (!this.#follows) return;
    requestAnimationFrame(() => { this.#scroller.scrollTop = this.#scroller.scrollHeight; });
  }
}
