// Drives the JavaScript client for tests/conformance: calls come as lines of JSON on standard input, answers and whatever the
// sessions tell go to standard output. `{"id", "session", "call", "arguments"}` is answered by `{"id", "result"}` or `{"id", "error"}`.

import { createInterface } from "node:readline";

import { RealtimeSession } from "../../static/realtime.js";

const sessions = new Map();
const tell = (told) => process.stdout.write(`${JSON.stringify(told)}\n`);

/** A session, the streams that it has made, and the loop over all of it. */
class Driven {
  streams = new Map();

  constructor(name, { tokens, session_id, max_unanswered, max_message_bytes, ...options }) {
    if (tokens) options.token = () => (tokens.length > 1 ? tokens.shift() : tokens[0]);
    const limits = { maxUnanswered: max_unanswered, maxMessageBytes: max_message_bytes };
    this.session = new RealtimeSession({ ...options, ...limits, sessionId: session_id });
    this.session.addEventListener("disconnect", ({ detail }) => tell({ session: name, told: "disconnect", ...detail }));
    this.#follow(name);
    this.session.connect();
  }

  async #follow(name) {
    try {
      for await (const event of this.session) tell({ session: name, event });
      tell({ session: name, told: "end" });
    } catch ({ code, closeCode, reason }) {
      tell({ session: name, told: "end", error: code, code: closeCode, reason });
    }
  }

  respond(text, options) {
    const stream = this.session.respond(text, options);
    this.streams.set(stream.responseId, stream);
    return stream.responseId;
  }

  create_task(name, input) {
    const stream = this.session.createTask(name, input);
    this.streams.set(stream.taskId, stream);
    return stream.taskId;
  }

  async iterate(id) {
    const events = [];
    for await (const event of this.streams.get(id)) events.push(event);
    return events;
  }

  text(id) { return this.streams.get(id).text(); }
  result(id) { return this.streams.get(id).result(); }
  cancel(id, heardChars) { this.session.cancel(id, { heardChars }); }
  cancel_task(id) { this.session.cancelTask(id); }
  heard(id, chars) { this.session.heard(id, chars); }
  interrupt() { this.session.interrupt(); }
  send(message) { return this.session.send(message); }
  drop(seconds) { this.session.drop(seconds * 1000); }
  close() { this.session.close(); }

  leave_with(messages) {
    for (const message of messages) this.session.send(message);
    this.session.close();
  }

  set_position(channel, position) { this.session.positions.set(channel, position); }

  show() {
    const { state, transport, sessionId, positions, responses, tasks, participants } = this.session;
    return {
      state,
      transport,
      session_id: sessionId,
      positions: Object.fromEntries(positions),
      texts: Object.fromEntries([...responses.values(), ...tasks.values()].map(({ id, text }) => [id, text])),
      statuses: Object.fromEntries([...responses.values(), ...tasks.values()].map(({ id, status }) => [id, status])),
      participants: participants.size,
    };
  }
}

async function answer({ id, session, call, arguments: given }) {
  try {
    if (call === "open") sessions.set(session, new Driven(session, ...given));
    const result = call === "open" ? null : await sessions.get(session)[call](...given);
    tell({ id, result: result ?? null });
  } catch (error) {
    tell({ id, error: error.code ?? String(error) });
  }
}

createInterface({ input: process.stdin }).on("line", (line) => answer(JSON.parse(line)));
