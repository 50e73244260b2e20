/** What goes wrong, in words for whoever sits here. */

export const TOKEN_NEEDED = 4401;
export const UNKNOWN_SESSION = 4404;
/** Why a connection has ended for good, by its close code. */
export const CLOSINGS = new Map([
  [1000, "This visit was closed."],
  [1009, "That was more than the server takes at once."],
  [4400, "The server could not read what this page sent."],
  [4401, "The server asks for a token."],
  [4403, "Your token does not allow this."],
  [UNKNOWN_SESSION, "The server does not know this visit: it has expired, or was lost when the server was started anew."],
  [4410, "This visit was deleted."],
]);
/** Why something can't even be sent, by the error's code. */
export const UNSENT = new Map([
  ["queue_full", "Too much waits for the connection already. Try again when it is back."],
  ["message_too_large", "That is more than the server takes at once. Say it in parts."],
]);

/** What only its programmer could do something about. */
const FAULT = "Something went wrong at the server. Try it again.";
const FAULTS = new Set(["responder_failed", "task_failed"]);

/** Why an answer or a note has failed. @param {{code: string, message: string}} error */
export const failureInWords = ({ code, message }) => (FAULTS.has(code) ? FAULT : message);
