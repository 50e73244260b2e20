/** How long each piece of an answer was awaited, as this page saw it: measured, and drawn. */

/**
 * `kind`: it came alone (`live`), joined with others (`merged`), or was caught up with after a cut (`replay`).
 * @typedef {{ms: number, kind: "live" | "merged" | "replay"}} Wait
 */

const SHOWN = 120;
/** The scale is logarithmic: a gap of a second and one of ten milliseconds are both to be seen. */
const TOP_MS = 3_000;
const LINES_MS = [10, 100, 1_000];
const LABELS_PX = 40;

export class Latency {
  /** @type {Wait[]} */
  waits = [];
  /** @type {number | undefined} */
  firstTokenMs;
  /** When this page asked for an answer whose first token is awaited. @type {Map<string, number>} */
  #askedAt = new Map();
  /** When the newest piece of an answer came. @type {Map<string, number>} */
  #lastAt = new Map();

  /** @param {string} responseId @param {number} now in milliseconds, as all times here */
  asked(responseId, now) {
    this.#askedAt.set(responseId, now);
  }

  /** @param {{response_id: string, merged?: number, replay?: boolean}} event a delta @param {number} now */
  came({ response_id, merged = 1, replay = false }, now) {
    const askedAt = this.#askedAt.get(response_id);
    const since = this.#lastAt.get(response_id) ?? askedAt;
    if (askedAt !== undefined) this.firstTokenMs = now - askedAt;
    this.#askedAt.delete(response_id);
    this.#lastAt.set(response_id, now);
    if (since === undefined) return;
    this.waits.push({ ms: now - since, kind: replay ? "replay" : merged > 1 ? "merged" : "live" });
    if (this.waits.length > SHOWN) this.waits.shift();
  }

  /** @param {string} responseId */
  ended(responseId) {
    this.#askedAt.delete(responseId);
    this.#lastAt.delete(responseId);
  }

  /** The wait that so large a part of them is not above; undefined without any. @param {number} part */
  quantile(part) {
    const sorted = this.waits.map(({ ms }) => ms).sort((one, other) => one - other);
    return sorted[Math.min(sorted.length - 1, Math.floor(part * sorted.length))];
  }
}

/** @param {HTMLCanvasElement} canvas @param {Wait[]} waits oldest first */
export function drawWaits(canvas, waits) {
  const { clientWidth: width, clientHeight: height } = canvas;
  const context = canvas.getContext("2d");
  if (!context || !width) return; // it is not in sight
  const scale = devicePixelRatio || 1;
  canvas.width = width * scale;
  canvas.height = height * scale;
  context.scale(scale, scale);
  const style = getComputedStyle(canvas);
  const level = (/** @type {number} */ ms) =>
    height - (Math.log10(Math.max(1, Math.min(ms, TOP_MS))) / Math.log10(TOP_MS)) * (height - 4);
  drawLines(context, style, width, level);
  if (!waits.length) context.fillText("Each token of an answer is drawn here.", LABELS_PX + 8, (level(1_000) + level(100)) / 2);
  const step = (width - LABELS_PX) / SHOWN;
  waits.forEach(({ ms, kind }, index) => {
    context.fillStyle = style.getPropertyValue(`--wait-${kind}`);
    const top = level(ms);
    context.fillRect(LABELS_PX + index * step, top, Math.max(1, step - 1), height - top);
  });
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {CSSStyleDeclaration} style
 * @param {number} width
 * @param {(ms: number) => number} level
 */
function drawLines(context, style, width, level) {
  context.font = `10px ${style.fontFamily}`;
  context.textBaseline = "middle";
  for (const ms of LINES_MS) {
    context.fillStyle = style.getPropertyValue("--line");
    context.fillRect(LABELS_PX, Math.round(level(ms)), width - LABELS_PX, 1);
    context.fillStyle = style.getPropertyValue("--quiet");
    context.fillText(ms < 1_000 ? `${ms} ms` : "1 s", 0, Math.round(level(ms)));
  }
}
