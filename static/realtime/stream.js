/** Events to iterate: of one response, of one task, or of the whole session. */

import { RealtimeError } from "./errors.js";
import { channelOf } from "./state.js";

/** @typedef {import("./messages.js").ResponseEvent} ResponseEvent */
/** @typedef {import("./messages.js").TaskEvent} TaskEvent */
/** @typedef {import("./messages.js").ResponseDone} ResponseDone */
/** @typedef {import("./messages.js").TaskDone} TaskDone */
/** @typedef {import("../realtime.js").RealtimeSession} RealtimeSession */

/**
 * Events that wait to be iterated. Neighbours are joined by the protocol's merge rules, as the server does for a slow
 * reader, so what nobody takes is not more than what it says.
 */
export class EventQueue {
  /** @type {any[]} */
  #events = [];
  /** @type {{error?: Error} | undefined} */
  #end;
  #wake = () => {};
  #left;

  /** @param {() => void} [left] called once nobody iterates any more */
  constructor(left = () => {}) {
    this.#left = left;
  }

  /** @param {any} event */
  push(event) {
    if (this.#end) return;
    const joined = merged(this.#events.at(-1), event);
    if (joined) this.#events[this.#events.length - 1] = joined;
    else this.#events.push(event);
    this.#wake();
  }

  /** Nothing more comes; what is here can still be taken, then `error` is thrown. @param {Error} [error] */
  finish(error) {
    this.#end ??= { error };
    this.#wake();
  }

  /** @returns {AsyncGenerator<any, void, undefined>} */
  async *[Symbol.asyncIterator]() {
    try {
      for (;;) {
        while (this.#events.length) yield this.#events.shift();
        if (this.#end?.error) throw this.#end.error;
        if (this.#end) return;
        await new Promise((resolve) => { this.#wake = () => resolve(undefined); });
      }
    } finally {
      this.#left();
    }
  }
}

/** Two neighbours as one event, or undefined where their kind keeps each. @param {any} last @param {any} next */
function merged(last, next) {
  const isPair = last?.type === next.type && channelOf(last) === channelOf(next) && !next.reset
    && last.attempt === next.attempt && last.replay === next.replay;
  if (!isPair || !(next.type.endsWith(".delta") || next.type === "task.progress")) return undefined;
  const both = { ...last, ...next, merged: (last.merged ?? 1) + (next.merged ?? 1) };
  return next.type === "task.progress" ? both : { ...both, delta: last.delta + next.delta };
}

/**
 * What comes of one command: its events, to be iterated once, up to and with the one that ends it. To leave the loop
 * early stops nothing. It throws `RealtimeError` where the command is refused, `SessionClosed` where the session's
 * connection ends for good before.
 * @template Event
 * @template End
 */
class Outcome {
  /** The command's, which its effects name as `for_event_id`. */
  eventId;
  #queue = new EventQueue();
  /** @type {Promise<End>} */
  #end;
  /** @type {(end: any) => void} */
  #resolve = () => {};
  /** @type {(error: Error) => void} */
  #reject = () => {};

  /** @param {string} eventId */
  constructor(eventId) {
    this.eventId = eventId;
    this.#end = new Promise((resolve, reject) => {
      this.#resolve = resolve;
      this.#reject = reject;
    });
    this.#end.catch(() => {}); // nobody has to wait for it
  }

  /** The event that ends it; throws what the loop throws. @returns {Promise<End>} */
  done() {
    return this.#end;
  }

  /** @returns {AsyncGenerator<Event, void, undefined>} */
  [Symbol.asyncIterator]() {
    return this.#queue[Symbol.asyncIterator]();
  }

  /** @internal @param {any} event @param {boolean} isEnd */
  take(event, isEnd) {
    this.#queue.push(event);
    if (!isEnd) return;
    this.#queue.finish();
    this.#resolve(event);
  }

  /** @internal @param {Error} error */
  fail(error) {
    this.#queue.finish(error);
    this.#reject(error);
  }
}

/**
 * An answer as it comes: `response.created`, its deltas, and `response.done`.
 * @extends {Outcome<ResponseEvent, ResponseDone>}
 */
export class ResponseStream extends Outcome {
  responseId;
  #session;

  /** @internal @param {RealtimeSession} session @param {string} eventId @param {string} responseId */
  constructor(session, eventId, responseId) {
    super(eventId);
    this.#session = session;
    this.responseId = responseId;
  }

  /** The whole text, once it has ended; of one that was stopped what there is. Throws where it failed. */
  async text() {
    const { error } = await this.done();
    if (error) throw new RealtimeError(error);
    return this.#session.responses.get(this.responseId)?.text ?? "";
  }

  /** Stops it, as `RealtimeSession.cancel` does. @param {{heardChars?: number}} [options] */
  cancel(options) {
    this.#session.cancel(this.responseId, options);
  }
}

/**
 * A background task as it comes: `task.created`, its progress and text, and `task.done`.
 * @extends {Outcome<TaskEvent, TaskDone>}
 */
export class TaskStream extends Outcome {
  taskId;
  #session;

  /** @internal @param {RealtimeSession} session @param {string} eventId @param {string} taskId */
  constructor(session, eventId, taskId) {
    super(eventId);
    this.#session = session;
    this.taskId = taskId;
  }

  /** What it came to, once it has ended; a large one is fetched. Throws where it failed or was cancelled. */
  async result() {
    const { status, error, result, result_url } = await this.done();
    if (status !== "complete") throw new RealtimeError(error ?? { code: "cancelled", message: "The task was cancelled." });
    return result_url ? this.#session.fetchResult(result_url) : result;
  }

  /** Stops it. */
  cancel() {
    this.#session.cancelTask(this.taskId);
  }
}
