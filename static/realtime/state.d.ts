/** What a client knows of its session: the fold of the events that it has applied. No I/O. */
/** @typedef {import("./messages.js").ServerEvent} ServerEvent */
/** @typedef {import("./messages.js").Participant} Participant */
/**
 * An answer so far. Of what is voiced, the listener has heard `heardChars`, as `String.length` counts.
 * @typedef {object} Answer
 * @property {string} id
 * @property {"queued" | "in_progress" | "completed" | "cancelled" | "failed" | "incomplete"} status
 * @property {string} text
 * @property {string} reasoning
 * @property {number} [heardChars]
 */
/**
 * A background task so far; what it has and tells is of its newest attempt.
 * @typedef {object} Task
 * @property {string} id
 * @property {string} name
 * @property {"pending" | "running" | "complete" | "failed" | "cancelled"} status
 * @property {number} attempt
 * @property {number} [progress]
 * @property {number | null} [total]
 * @property {string | null} [message]
 * @property {string} text what it has written
 * @property {any} [result]
 * @property {string} [resultUrl] where a large result is
 * @property {import("./messages.js").Failure} [error]
 */
/** The channel that an event belongs to. @param {{response_id?: string, task_id?: string}} event */
export function channelOf({ response_id, task_id }: {
    response_id?: string;
    task_id?: string;
}): string;
export class SessionState {
    /** @param {string | null} sessionId @param {"all" | "none" | undefined} history */
    constructor(sessionId: string | null, history: "all" | "none" | undefined);
    /** @type {string | null} */
    sessionId: string | null;
    /** Channel → last event applied. A Map, as `__proto__` is a legal id. @type {Map<string, number>} */
    positions: Map<string, number>;
    /** @type {Map<string, Answer>} */
    responses: Map<string, Answer>;
    /** @type {Map<string, Task>} */
    tasks: Map<string, Task>;
    /** Connection id → who looks at the session now. @type {Map<string, Participant>} */
    participants: Map<string, Participant>;
    /** The part of a query that says where to go on. @returns {string[]} */
    resumption(): string[];
    /** Moves the channel's position; false where events are missing. @param {any} event */
    advance(event: any): boolean;
    /** Takes an event in; of kinds that it does not know, nothing. @param {ServerEvent} event */
    fold(event: ServerEvent): void;
    #private;
}
export type ServerEvent = import("./messages.js").ServerEvent;
export type Participant = import("./messages.js").Participant;
/**
 * An answer so far. Of what is voiced, the listener has heard `heardChars`, as `String.length` counts.
 */
export type Answer = {
    id: string;
    status: "queued" | "in_progress" | "completed" | "cancelled" | "failed" | "incomplete";
    text: string;
    reasoning: string;
    heardChars?: number | undefined;
};
/**
 * A background task so far; what it has and tells is of its newest attempt.
 */
export type Task = {
    id: string;
    name: string;
    status: "pending" | "running" | "complete" | "failed" | "cancelled";
    attempt: number;
    progress?: number | undefined;
    total?: number | null | undefined;
    message?: string | null | undefined;
    /**
     * what it has written
     */
    text: string;
    result?: any;
    /**
     * where a large result is
     */
    resultUrl?: string | undefined;
    error?: import("./messages.js").Failure | undefined;
};
