/** What is on the page, and what is put there. Text becomes text nodes, never markup. */

/** @template {HTMLElement} T @param {string} id @returns {T} */
export const byId = (id) => /** @type {T} */ (document.getElementById(id));

/**
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {string} className
 * @param {(Node | string)[]} children strings become text nodes
 */
export function element(tag, className, ...children) {
  const made = document.createElement(tag);
  made.className = className;
  made.append(...children);
  return made;
}

/** Shows or hides; a focus that would be lost with it goes to `next`. @param {string} id @param {boolean} shown @param {string} next */
export function show(id, shown, next) {
  const hadFocus = document.activeElement === byId(id);
  byId(id).hidden = !shown;
  if (hadFocus && !shown) byId(next).focus();
}

/** Calls `draw` at most once a frame, however often it is asked to. @param {() => void} draw */
export function onceAFrame(draw) {
  let asked = false;
  return () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      draw();
    });
  };
}
