/** Dark or light: as the system is, until somebody here says otherwise. What was said before `chosen.js` has applied. */

import { byId } from "./elements.js";

const KEY = "realtime-theme";
const system = matchMedia("(prefers-color-scheme: dark)");
const root = document.documentElement;

/** @returns {"dark" | "light"} */
const shown = () => /** @type {"dark" | "light"} */ (root.dataset.theme ?? (system.matches ? "dark" : "light"));

/** @param {"dark" | "light"} theme */
function choose(theme) {
  root.dataset.theme = theme;
  try {
    localStorage.setItem(KEY, theme);
  } catch {
    // It holds for this page then.
  }
}

function tell() {
  byId("theme").ariaPressed = String(shown() === "dark");
}

/** @param {() => void} changed */
export function startTheme(changed) {
  tell();
  system.addEventListener("change", () => { tell(); changed(); });
  byId("theme").addEventListener("click", () => {
    choose(shown() === "dark" ? "light" : "dark");
    tell();
    changed();
  });
}
