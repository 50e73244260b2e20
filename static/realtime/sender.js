/** Sends commands over one connection, no faster than a server takes them. */

import { Pace } from "./pace.js";

/** How long what was sent may take to go out once the session is left. */
const FAREWELL_MS = 2_000;

export class Sender {
  #wire;
  #pace = new Pace();
  /** Commands that wait for their turn. @type {Record<string, any>[]} */
  #waiting = [];
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #flushing;
  #isLeaving = false;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #farewell;

  /** @param {import("./websocket.js").Transport} wire */
  constructor(wire) {
    this.#wire = wire;
  }

  /** @param {Record<string, any>} command */
  send(command) {
    this.#waiting.push(command);
    if (this.#waiting.length === 1) this.#flush();
  }

  /** Closes once what was sent has gone out, or would take too long. */
  leave() {
    this.#isLeaving = true;
    this.#farewell = setTimeout(() => this.close(), FAREWELL_MS);
    if (!this.#waiting.length) this.#leaveWire();
  }

  /** Closes at once. */
  close() {
    clearTimeout(this.#flushing);
    clearTimeout(this.#farewell);
    this.#waiting = [];
    this.#wire.close();
  }

  #flush() {
    for (let command; (command = this.#waiting[0]); this.#waiting.shift()) {
      const waitMs = this.#pace.take();
      if (waitMs) {
        this.#flushing = setTimeout(() => this.#flush(), waitMs);
        return;
      }
      this.#wire.send(command);
    }
    if (this.#isLeaving) this.#leaveWire();
  }

  #leaveWire() {
    this.#wire.sent().then(() => this.close());
  }
}
