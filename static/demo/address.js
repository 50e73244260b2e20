/**
 * What the page's address says after `#`: the session, who sits here, and perhaps a token. A fragment is sent to no
 * server. In `#sess_…&seat=patient` the first part is the session; a token is given as `#token=…`.
 */

/** @typedef {"clinician" | "patient"} Seat */

/** @type {Record<Seat, string>} */
export const SEATS = { clinician: "Clinician", patient: "Patient" };

/** @param {string} hash @returns {{sessionId: string | null, seat: Seat, token: string | undefined}} */
export function readAddress(hash) {
  const parts = hash.replace(/^#/, "").split("&");
  const value = (/** @type {string} */ name) =>
    parts.find((part) => part.startsWith(`${name}=`))?.slice(name.length + 1);
  const token = value("token") || undefined;
  const named = parts.find((part) => /^sess_[\w-]+$/.test(part)) ?? null;
  return {
    sessionId: named ?? (token ? sessionOfToken(token) : null),
    seat: value("seat") === "patient" ? "patient" : "clinician",
    token,
  };
}

/** Without any token: it is what stands in the address, and in links. @param {string | null} sessionId @param {Seat} seat */
export function fragment(sessionId, seat) {
  const parts = [...(sessionId ? [sessionId] : []), ...(seat === "patient" ? ["seat=patient"] : [])];
  return `#${parts.join("&")}`;
}

/** @param {Seat} seat @returns {Seat} */
export const otherSeat = (seat) => (seat === "patient" ? "clinician" : "patient");

/** The only session that a guest's token is good for. @param {string} token @returns {string | null} */
function sessionOfToken(token) {
  try {
    const claims = atob((token.split(".")[1] ?? "").replace(/-/g, "+").replace(/_/g, "/"));
    const { session_id } = JSON.parse(claims);
    return typeof session_id === "string" ? session_id : null;
  } catch {
    return null; // the server says what is wrong with it
  }
}
