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
    /** @param {() => void} [left] called once nobody iterates any more */
    constructor(left?: () => void);
    /** @param {any} event */
    push(event: any): void;
    /** Nothing more comes; what is here can still be taken, then `error` is thrown. @param {Error} [error] */
    finish(error?: Error): void;
    /** @returns {AsyncGenerator<any, void, undefined>} */
    [Symbol.asyncIterator](): AsyncGenerator<any, void, undefined>;
    #private;
}
/**
 * An answer as it comes: `response.created`, its deltas, and `response.done`.
 * @extends {Outcome<ResponseEvent, ResponseDone>}
 */
export class ResponseStream extends Outcome<import("./messages.js").ResponseEvent, import("./messages.js").ResponseDone> {
    /** @internal @param {RealtimeSession} session @param {string} eventId @param {string} responseId */
    constructor(session: RealtimeSession, eventId: string, responseId: string);
    responseId: string;
    /** The whole text, once it has ended; of one that was stopped what there is. Throws where it failed. */
    text(): Promise<string>;
    /** Stops it, as `RealtimeSession.cancel` does. @param {{heardChars?: number}} [options] */
    cancel(options?: {
        heardChars?: number;
    }): void;
    #private;
}
/**
 * A background task as it comes: `task.created`, its progress and text, and `task.done`.
 * @extends {Outcome<TaskEvent, TaskDone>}
 */
export class TaskStream extends Outcome<import("./messages.js").TaskEvent, import("./messages.js").TaskDone> {
    /** @internal @param {RealtimeSession} session @param {string} eventId @param {string} taskId */
    constructor(session: RealtimeSession, eventId: string, taskId: string);
    taskId: string;
    /** What it came to, once it has ended; a large one is fetched. Throws where it failed or was cancelled. */
    result(): Promise<any>;
    /** Stops it. */
    cancel(): void;
    #private;
}
export type ResponseEvent = import("./messages.js").ResponseEvent;
export type TaskEvent = import("./messages.js").TaskEvent;
export type ResponseDone = import("./messages.js").ResponseDone;
export type TaskDone = import("./messages.js").TaskDone;
export type RealtimeSession = import("../realtime.js").RealtimeSession;
/**
 * What comes of one command: its events, to be iterated once, up to and with the one that ends it. To leave the loop
 * early stops nothing. It throws `RealtimeError` where the command is refused, `SessionClosed` where the session's
 * connection ends for good before.
 * @template Event
 * @template End
 */
declare class Outcome<Event, End> {
    /** @param {string} eventId */
    constructor(eventId: string);
    /** The command's, which its effects name as `for_event_id`. */
    eventId: string;
    /** The event that ends it; throws what the loop throws. @returns {Promise<End>} */
    done(): Promise<End>;
    /** @internal @param {any} event @param {boolean} isEnd */
    take(event: any, isEnd: boolean): void;
    /** @internal @param {Error} error */
    fail(error: Error): void;
    /** @returns {AsyncGenerator<Event, void, undefined>} */
    [Symbol.asyncIterator](): AsyncGenerator<Event, void, undefined>;
    #private;
}
export {};
