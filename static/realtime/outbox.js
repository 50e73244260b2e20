/** The commands that nobody has answered yet. No I/O: what it holds is sent again by whoever opens the next connection. */

import { MessageTooLarge, QueueFull } from "./errors.js";

/** Commands about one connection: void on the next one. */
const CONNECTION_COMMANDS = new Set(["ping", "auth.refresh"]);

/**
 * A command as it is sent.
 * @typedef {{type: string, event_id: string} & Record<string, any>} Command
 */

export class Outbox {
  /** @type {Map<string, Command>} */
  #commands = new Map();
  #limit;
  #maxBytes;

  /** @param {number} limit @param {number} maxBytes of each, as JSON in UTF-8 */
  constructor(limit, maxBytes) {
    this.#limit = limit;
    this.#maxBytes = maxBytes;
  }

  /** Those that wait, in their order. */
  get waiting() {
    return [...this.#commands.values()];
  }

  /** Keeps a command until it is answered. Throws `QueueFull` and `MessageTooLarge`. @param {Command} command */
  add(command) {
    const { length } = new TextEncoder().encode(JSON.stringify(command));
    if (length > this.#maxBytes) throw new MessageTooLarge(length, this.#maxBytes);
    if (CONNECTION_COMMANDS.has(command.type)) return;
    if (this.#commands.size >= this.#limit) throw new QueueFull(this.#limit);
    this.#commands.set(command.event_id, command);
  }

  /** @param {string | undefined} eventId */
  settle(eventId) {
    if (eventId) this.#commands.delete(eventId);
  }

  /** Nothing is to be sent any more. */
  clear() {
    this.#commands.clear();
  }

  /** To cancel what has ended is answered by nothing; but to truncate it is. @param {string} channel */
  settleCancels(channel) {
    for (const [eventId, { type, response_id, task_id, heard_chars }] of this.#commands) {
      const cancels = type.endsWith(".cancel") && (response_id ?? task_id) === channel;
      if (cancels && heard_chars === undefined) this.#commands.delete(eventId);
    }
  }
}
