/** How the connection stands, in words beside the title. */

import { byId, element } from "./elements.js";

const TICK_MS = 100;
/** @type {ReturnType<typeof setTimeout> | undefined} */
let ticking;

/** @param {string} state @param {string} words */
export function showState(state, words) {
  clearTimeout(ticking);
  document.body.dataset.state = state;
  if (byId("state").textContent !== words) byId("state").textContent = words;
}

/**
 * Counts down to the next attempt, which itself may take long. A screen reader is not told of each tick.
 * @param {import("../realtime.js").RealtimeSession} session @param {number} waitMs
 */
export function showWait(session, waitMs) {
  showState("waiting", "");
  const until = performance.now() + waitMs;
  const left = element("span", "");
  left.ariaHidden = "true";
  byId("state").append(element("span", "", "Cut off", left));
  const tick = () => {
    // Its time is over, or the network is back before.
    if (session.state === "connecting") return showState("connecting", "Cut off, connecting again…");
    left.textContent = `, back in ${(Math.max(0, until - performance.now()) / 1_000).toFixed(1)} s`;
    ticking = setTimeout(tick, TICK_MS);
  };
  tick();
}
