/** Why a connection has ended for good, by its close code, in words for whoever sits here. */

export const TOKEN_NEEDED = 4401;
export const UNKNOWN_SESSION = 4404;
export const CLOSINGS = new Map([
  [1000, "This visit was closed."],
  [1009, "That was more than the server takes at once."],
  [4400, "The server could not read what this page sent."],
  [4401, "The server asks for a token."],
  [4403, "Your token does not allow this."],
  [UNKNOWN_SESSION, "This visit has expired, or was never here."],
  [4410, "This visit was deleted."],
]);
