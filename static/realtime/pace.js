/** How fast commands go out: a server lets a connection send so many messages a second, and refuses the others. */

const BURST = 40;
const INTERVAL_MS = 25;

export class Pace {
  /** When as many as ever may go out at once, in milliseconds since the epoch. */
  #fullAt = 0;

  /** 0 where one more may go out now, and is counted; else how many milliseconds to wait for it. */
  take() {
    const now = Date.now();
    const fullAt = Math.max(this.#fullAt, now) + INTERVAL_MS;
    const waitMs = fullAt - now - BURST * INTERVAL_MS;
    if (waitMs > 0) return waitMs;
    this.#fullAt = fullAt;
    return 0;
  }
}
