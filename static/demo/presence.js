/** Who looks at the visit now. */

import { byId, element } from "./elements.js";

/** @typedef {import("../realtime/messages.js").Participant} Participant */

export const ANONYMOUS = "anonymous";
/** So many are shown one by one. */
const SHOWN = 5;

/** @param {Participant[]} participants @param {string | undefined} own the connection of this page @param {string} seat */
export function showPresence(participants, own, seat) {
  const isHere = (/** @type {Participant} */ { connection_id }) => Number(connection_id === own);
  const sorted = [...participants].sort((one, other) => isHere(other) - isHere(one) || one.since.localeCompare(other.since));
  const chips = sorted.slice(0, SHOWN).map(({ user, connection_id }) => {
    const isOwn = connection_id === own;
    const name = user === ANONYMOUS ? (isOwn ? "You" : "Someone") : isOwn ? `${user} (you)` : user;
    const chip = element("li", isOwn ? "own" : "", element("span", "face", [...name][0]?.toUpperCase() ?? "?"));
    chip.append(element("span", "name", isOwn ? `${name}, ${seat.toLowerCase()}` : name));
    return chip;
  });
  if (sorted.length > SHOWN) chips.push(element("li", "others", `+${sorted.length - SHOWN}`));
  const place = byId("presence");
  const words = chips.map((chip) => chip.textContent).join();
  if (place.dataset.words === words) return;
  place.dataset.words = words;
  place.replaceChildren(...chips);
  byId("present-count").textContent = sorted.length === 1 ? "1 present" : `${sorted.length} present`;
}
