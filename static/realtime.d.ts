/**
 * An id with 128 random bits. Not `crypto.randomUUID`, which plain-http pages on a network lack.
 * @param {string} prefix
 */
export function newId(prefix: string): string;
/**
 * One session. Every server event is dispatched by its type and once more as `event`, each time a CustomEvent
 * with the event in `detail`; and besides:
 *
 * - `open`: attached, first or again; the detail is `session.created` or `session.resumed`.
 * - `disconnect`: `{code, reason, reconnectInMs}`; it will be back. `cause` is what the function `token` threw, where
 *   there was none to show.
 * - `closed`: `{code, reason}`; it won't, and "Close codes" of the protocol says why.
 *
 * It can be iterated, too: all events from then on, until it is closed. Where another code than 1000 closes it the
 * loop throws `SessionClosed`.
 */
export class RealtimeSession extends EventTarget {
    /** @param {SessionOptions} [options] */
    constructor(options?: SessionOptions);
    /** The session's id, once there is one. */
    get sessionId(): string | null;
    /** @returns {"idle" | "connecting" | "open" | "waiting" | "closed"} */
    get state(): "idle" | "connecting" | "open" | "waiting" | "closed";
    /** What carries the connection, or did last. @returns {"websocket" | "sse" | null} */
    get transport(): "websocket" | "sse" | null;
    /** Channel → last event applied, of the session and of every channel that has not ended. */
    get positions(): Map<string, number>;
    /** The answers, by id. */
    get responses(): Map<string, import("./realtime/state.js").Answer>;
    /** The background tasks, by id. */
    get tasks(): Map<string, import("./realtime/state.js").Task>;
    /** Connection id → who looks at the session now. */
    get participants(): Map<string, import("./realtime/messages.js").Participant>;
    /** The answers that wait or run. */
    get unfinished(): import("./realtime/state.js").Answer[];
    /** Opens the connection and keeps it until `close()`. Does nothing while there is one. */
    connect(): void;
    /**
     * Leaves the session for good. It lives on at the server; `send({type: "session.close"})` ends it. What was sent over
     * an open connection still goes out, for 2 s at most.
     */
    close(): void;
    /** Cuts the connection as a lost network would, and comes back after so many milliseconds. */
    drop(reconnectInMs?: number): void;
    /**
     * Sends a command now, or after the reconnect, and is carried out once either way.
     * Throws `QueueFull` where too many wait already, `MessageTooLarge`, and `SessionClosed`; `TypeError` where it has no
     * `type`.
     * @param {ClientMessage} message
     * @returns {string} the command's `event_id`, which its effects name as `for_event_id`
     */
    send(message: ClientMessage): string;
    /**
     * Says something as the user and asks for an answer, which can be iterated. Throws as `send` does.
     * @param {string} text
     * @param {Omit<import("./realtime/messages.js").ResponseCreate, "type" | "input">} [options] other fields of
     *   `response.create`, such as `multitask_strategy`
     */
    respond(text: string, options?: Omit<import("./realtime/messages.js").ResponseCreate, "type" | "input">): ResponseStream;
    /**
     * Stops an answer. Of one that is voiced the conversation keeps what was heard: `heardChars`, or else what
     * `heard()` was told last. Does nothing where the answer has ended and nothing is known to be heard of it.
     * @param {string} responseId
     * @param {{heardChars?: number}} [options]
     */
    cancel(responseId: string, { heardChars }?: {
        heardChars?: number;
    }): void;
    /**
     * Notes that the listener has heard the answer up to here, counted from its start as `String.length` counts; nothing
     * is sent. What comes after the answer was stopped is void.
     * @param {string} responseId
     * @param {number} chars
     */
    heard(responseId: string, chars: number): void;
    /** Stops whatever is being written or voiced: every answer that has not ended, or was not heard to its end. */
    interrupt(): void;
    /**
     * Starts a background task, whose events can be iterated. Throws as `send` does.
     * @param {string} name
     * @param {any} input what it has to be the task says
     */
    createTask(name: string, input: any): TaskStream;
    /** Stops a task. @param {string} taskId */
    cancelTask(taskId: string): void;
    /** Gets a result that is too large for an event. Throws `RealtimeError`. @param {string} resultUrl @returns {Promise<any>} */
    fetchResult(resultUrl: string): Promise<any>;
    /**
     * @template {keyof SessionEvents} Type
     * @param {Type} type
     * @param {((event: CustomEvent<SessionEvents[Type]>) => void) | EventListenerObject | null} listener
     * @param {boolean | AddEventListenerOptions} [options]
     */
    addEventListener<Type extends keyof SessionEvents>(type: Type, listener: ((event: CustomEvent<SessionEvents[Type]>) => void) | EventListenerObject | null, options?: boolean | AddEventListenerOptions): void;
    /** @returns {AsyncGenerator<ServerEvent, void, undefined>} */
    [Symbol.asyncIterator](): AsyncGenerator<ServerEvent, void, undefined>;
    #private;
}
export type ServerEvent = import("./realtime/messages.js").ServerEvent;
export type ClientMessage = import("./realtime/messages.js").ClientMessage;
export type Answer = import("./realtime/state.js").Answer;
export type Task = import("./realtime/state.js").Task;
export type SessionOptions = {
    /**
     * the server's address, or its endpoint `…/v1/realtime`; default the page's own host
     */
    url?: string | URL | undefined;
    /**
     * the session to attach to; without it a new one is made
     */
    sessionId?: string | null | undefined;
    /**
     * whether a first attach replays the session; default `all`
     */
    history?: "all" | "none" | undefined;
    /**
     * shortest time between two frames of one answer; default 0
     */
    deltaIntervalMs?: number | undefined;
    /**
     * a bearer token, or what gets a fresh one: called for each
     * connection, and before a token expires
     */
    token?: string | (() => string | Promise<string>) | undefined;
    /**
     * default `auto`: server-sent events where WebSockets are blocked
     */
    transport?: "auto" | "websocket" | "sse" | undefined;
    /**
     * how many commands may wait for the server's answer; default and most 1000
     */
    maxUnanswered?: number | undefined;
    /**
     * the largest command, as JSON in UTF-8, that the server takes; default 65536
     */
    maxMessageBytes?: number | undefined;
};
/**
 * What is dispatched: each event of the server by its type, and the session's own.
 */
export type SessionEvents = { [Type in ServerEvent["type"]]: Extract<ServerEvent, {
    type: Type;
}>; } & {
    event: ServerEvent;
    open: import("./realtime/messages.js").SessionCreated | import("./realtime/messages.js").SessionResumed;
    disconnect: {
        code: number;
        reason: string;
        reconnectInMs: number;
        cause?: unknown;
    };
    closed: {
        code: number;
        reason: string;
    };
};
import { MessageTooLarge } from "./realtime/errors.js";
import { QueueFull } from "./realtime/errors.js";
import { RealtimeError } from "./realtime/errors.js";
import { ResponseStream } from "./realtime/stream.js";
import { SessionClosed } from "./realtime/errors.js";
import { TaskStream } from "./realtime/stream.js";
export { MessageTooLarge, QueueFull, RealtimeError, ResponseStream, SessionClosed, TaskStream };
