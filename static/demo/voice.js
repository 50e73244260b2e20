/** Speaking and listening, where the browser can: what was heard of an answer, and what the user says. */

/** Ends a piece that can be spoken by itself. */
const SENTENCE = /[.!?…:]["”’)]*\s|\n+/g;

/** Reads answers aloud as they are written, and knows how far. */
export class Speaker {
  #on = false;
  #heard;
  #failed;
  /** The answer that is read. @type {string | undefined} */
  #responseId;
  /** How much of it has been handed to the synthesis. */
  #queued = 0;
  /** How many pieces of it have not been read to their end. */
  #waiting = 0;
  #isWhole = false;
  /** What was said before `stop()` still tells of its end. */
  #turn = 0;
  /** Chromium tells nothing of the end of one that nobody holds. @type {Set<SpeechSynthesisUtterance>} */
  #utterances = new Set();

  /**
   * @param {(responseId: string, chars: number | undefined) => void} heard how far the listener has heard an answer;
   *   undefined: it is not read aloud after all
   * @param {() => void} failed the browser can't speak after all
   */
  constructor(heard, failed) {
    this.#heard = heard;
    this.#failed = failed;
  }

  static get isThere() {
    return "speechSynthesis" in globalThis;
  }

  get on() {
    return this.#on;
  }

  /** Turned off in the middle of an answer, all of it counts as read by the eyes. */
  set on(on) {
    this.#on = on;
    if (on) return;
    if (this.#responseId) this.#heard(this.#responseId, undefined);
    this.stop();
  }

  /** The answer that is being read: whoever interrupts now has not heard all of it. */
  get reads() {
    return this.#responseId;
  }

  /** From now on this answer is read. @param {string} responseId */
  begin(responseId) {
    this.stop();
    if (!this.#on) return;
    this.#responseId = responseId;
    this.#heard(responseId, 0);
  }

  /** @param {string} responseId @param {string} text all that is written so far @param {boolean} isWhole */
  say(responseId, text, isWhole) {
    if (responseId !== this.#responseId) return;
    this.#isWhole = isWhole;
    const end = isWhole ? text.length : lastSentenceEnd(text, this.#queued);
    if (end > this.#queued) this.#utter(responseId, text.slice(this.#queued, end), this.#queued);
    this.#queued = end;
    this.#settle();
  }

  /** Falls silent at once. */
  stop() {
    this.#turn += 1;
    this.#responseId = undefined;
    this.#queued = this.#waiting = 0;
    this.#isWhole = false;
    this.#utterances.clear();
    if (Speaker.isThere) speechSynthesis.cancel();
  }

  /** @param {string} responseId @param {string} piece @param {number} start where it stands in the answer */
  #utter(responseId, piece, start) {
    const turn = this.#turn;
    const utterance = new SpeechSynthesisUtterance(piece);
    // A boundary is where a word begins: what stands before it was heard.
    utterance.onboundary = ({ charIndex }) => { if (turn === this.#turn) this.#heard(responseId, start + charIndex); };
    utterance.onend = () => {
      this.#utterances.delete(utterance);
      if (turn !== this.#turn) return;
      this.#heard(responseId, start + piece.length);
      this.#waiting -= 1;
      this.#settle();
    };
    utterance.onerror = () => { if (turn === this.#turn) this.#failed(); };
    this.#waiting += 1;
    this.#utterances.add(utterance);
    speechSynthesis.speak(utterance);
  }

  #settle() {
    if (this.#isWhole && !this.#waiting) this.#responseId = undefined;
  }
}

/** @param {string} text @param {number} from */
function lastSentenceEnd(text, from) {
  const ends = [...text.slice(from).matchAll(SENTENCE)];
  const last = ends.at(-1);
  return last ? from + last.index + last[0].length : from;
}

/** @typedef {{started: () => void, heard: (text: string, isFinal: boolean) => void, ended: (error?: string) => void}} Listener */

/** Writes down what the user says, until it is stopped. */
export class Microphone {
  #listener;
  /** @type {any} */
  #recognition;
  #isSpeaking = false;

  /** @param {Listener} listener `started`: the user has begun to talk */
  constructor(listener) {
    this.#listener = listener;
  }

  static get #kind() {
    const { SpeechRecognition, webkitSpeechRecognition } = /** @type {any} */ (globalThis);
    return SpeechRecognition ?? webkitSpeechRecognition;
  }

  static get isThere() {
    return Microphone.#kind !== undefined;
  }

  get on() {
    return this.#recognition !== undefined;
  }

  start() {
    const recognition = new Microphone.#kind();
    recognition.continuous = recognition.interimResults = true;
    recognition.lang = navigator.language;
    recognition.onresult = (/** @type {any} */ event) => this.#results(event);
    recognition.onerror = (/** @type {any} */ event) => this.#end(event.error);
    recognition.onend = () => this.#end();
    this.#recognition = recognition;
    recognition.start();
  }

  stop() {
    this.#recognition?.stop();
    this.#end();
  }

  /** Several may have changed at once: sentences that are over, and what is still being said. @param {any} event */
  #results({ results, resultIndex }) {
    const changed = Array.from(results).slice(resultIndex);
    for (const isFinal of [true, false]) {
      const pieces = changed.filter((one) => one.isFinal === isFinal).map(([{ transcript }]) => transcript.trim());
      this.#heard(pieces.filter(Boolean).join(" "), isFinal);
    }
  }

  /** @param {string} text @param {boolean} isFinal */
  #heard(text, isFinal) {
    if (!this.on || !text) return;
    if (!this.#isSpeaking) this.#listener.started();
    this.#isSpeaking = !isFinal;
    this.#listener.heard(text, isFinal);
  }

  /** @param {string} [error] */
  #end(error) {
    if (!this.on) return;
    this.#recognition = undefined;
    this.#isSpeaking = false;
    this.#listener.ended(error);
  }
}
