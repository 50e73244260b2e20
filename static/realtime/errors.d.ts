/** What calls and loops of a session throw. `code` tells them apart: the server's, or one of the client's own. */
export class RealtimeError extends Error {
    /** @param {{code: string, message: string, type?: string, param?: string, retry_after_ms?: number}} error */
    constructor({ code, message, type, param, retry_after_ms }: {
        code: string;
        message: string;
        type?: string;
        param?: string;
        retry_after_ms?: number;
    });
    type: string;
    code: string;
    param: string | undefined;
    retryAfterMs: number | undefined;
}
/** More commands wait for an answer than the session keeps: this one was not taken. */
export class QueueFull extends RealtimeError {
    /** @param {number} limit */
    constructor(limit: number);
}
/** A command is larger than the server takes: it was not sent. */
export class MessageTooLarge extends RealtimeError {
    /** @param {number} bytes @param {number} limit */
    constructor(bytes: number, limit: number);
}
/** The session's connection has ended for good. `closeCode` says why, as section "Close codes" of the protocol has it. */
export class SessionClosed extends RealtimeError {
    /** @param {number} closeCode @param {string} reason */
    constructor(closeCode: number, reason: string);
    closeCode: number;
    reason: string;
}
