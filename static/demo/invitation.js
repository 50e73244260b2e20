/** How a second person comes in: a link and its QR code, or, where the server asks who one is, a token of their own. */

import { generate } from "../vendor/lean-qr/nano.js";
import { fragment, otherSeat, SEATS } from "./address.js";
import { byId } from "./elements.js";
import { ANONYMOUS } from "./presence.js";

/** @typedef {import("./address.js").Seat} Seat */

const LOCAL = new Set(["localhost", "127.0.0.1", "[::1]"]);
const SVG = "http://www.w3.org/2000/svg";
const QUIET_ZONE = 4;

/** @param {string} sessionId @param {Seat} seat of whoever invites @param {string} owner of the session */
export function showInvitation(sessionId, seat, owner) {
  const invited = otherSeat(seat);
  const page = `${location.origin}${location.pathname}`;
  const isOpen = owner === ANONYMOUS;
  byId("invite-open").hidden = !isOpen;
  byId("invite-token").hidden = isOpen;
  // The link names the session, which without authentication is all that it takes. It never has a token in it.
  const link = page + fragment(sessionId, invited);
  if (isOpen) showLink(link, invited);
  byId("invite-command").textContent = `realtime token --user ben --session ${sessionId}`;
  byId("invite-address").textContent = `${page}#token=…`;
  /** @type {HTMLDialogElement} */ (byId("invite")).showModal();
}

/** @param {string} link @param {Seat} invited */
function showLink(link, invited) {
  const anchor = /** @type {HTMLAnchorElement} */ (byId("invite-link"));
  anchor.href = link;
  anchor.textContent = link;
  byId("invite-seat").textContent = SEATS[invited].toLowerCase();
  byId("invite-local").hidden = !LOCAL.has(location.hostname);
  byId("invite-code").replaceChildren(qrCode(link));
}

/** One path, so that no seam shows between its squares. @param {string} text */
function qrCode(text) {
  const code = /** @type {any} */ (generate)(text);
  let path = "";
  for (let y = 0; y < code.size; y += 1) {
    for (let x = 0; x < code.size; x += 1) {
      if (code.get(x, y)) path += `M${x} ${y}h1v1h-1z`;
    }
  }
  const svg = document.createElementNS(SVG, "svg");
  const size = code.size + 2 * QUIET_ZONE;
  svg.setAttribute("viewBox", `-${QUIET_ZONE} -${QUIET_ZONE} ${size} ${size}`);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", "QR code of the link");
  const squares = document.createElementNS(SVG, "path");
  squares.setAttribute("d", path);
  svg.append(squares);
  return svg;
}
