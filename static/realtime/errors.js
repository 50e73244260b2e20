/** What calls and loops of a session throw. `code` tells them apart: the server's, or one of the client's own. */
export class RealtimeError extends Error {
  /** @param {{code: string, message: string, type?: string, param?: string, retry_after_ms?: number}} error */
  constructor({ code, message, type = "client_error", param, retry_after_ms }) {
    super(message);
    this.name = new.target.name;
    this.type = type;
    this.code = code;
    this.param = param;
    this.retryAfterMs = retry_after_ms;
  }
}

/** More commands wait for an answer than the session keeps: this one was not taken. */
export class QueueFull extends RealtimeError {
  /** @param {number} limit */
  constructor(limit) {
    super({ code: "queue_full", message: `${limit} commands wait for the server already` });
  }
}

/** A command is larger than the server takes: it was not sent. */
export class MessageTooLarge extends RealtimeError {
  /** @param {number} bytes @param {number} limit */
  constructor(bytes, limit) {
    super({ code: "message_too_large", message: `the command has ${bytes} bytes; the limit is ${limit}` });
  }
}

/** The session's connection has ended for good. `closeCode` says why, as section "Close codes" of the protocol has it. */
export class SessionClosed extends RealtimeError {
  /** @param {number} closeCode @param {string} reason */
  constructor(closeCode, reason) {
    const why = `${closeCode} ${reason}`.trimEnd();
    super({ code: "closed", message: `the session's connection was closed for good (${why})` });
    this.closeCode = closeCode;
    this.reason = reason;
  }
}
