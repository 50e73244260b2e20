/** What a client knows of its session: the fold of the events that it has applied. No I/O. */

/** @typedef {import("./messages.js").ServerEvent} ServerEvent */
/** @typedef {import("./messages.js").Participant} Participant */

/**
 * An answer so far. Of what is voiced, the listener has heard `heardChars`, as `String.length` counts.
 * @typedef {object} Answer
 * @property {string} id
 * @property {"queued" | "in_progress" | "completed" | "cancelled" | "failed" | "incomplete"} status
 * @property {string} text
 * @property {string} reasoning
 * @property {number} [heardChars]
 */

/**
 * A background task so far; what it has and tells is of its newest attempt.
 * @typedef {object} Task
 * @property {string} id
 * @property {string} name
 * @property {"pending" | "running" | "complete" | "failed" | "cancelled"} status
 * @property {number} attempt
 * @property {number} [progress]
 * @property {number | null} [total]
 * @property {string | null} [message]
 * @property {string} text what it has written
 * @property {any} [result]
 * @property {string} [resultUrl] where a large result is
 * @property {import("./messages.js").Failure} [error]
 */

/** The channel that an event belongs to. @param {{response_id?: string, task_id?: string}} event */
export function channelOf({ response_id, task_id }) {
  return response_id ?? task_id ?? "session";
}

export class SessionState {
  /** @type {string | null} */
  sessionId;
  /** Channel → last event applied. A Map, as `__proto__` is a legal id. @type {Map<string, number>} */
  positions = new Map();
  /** @type {Map<string, Answer>} */
  responses = new Map();
  /** @type {Map<string, Task>} */
  tasks = new Map();
  /** Connection id → who looks at the session now. @type {Map<string, Participant>} */
  participants = new Map();

  #history;

  /** @param {string | null} sessionId @param {"all" | "none" | undefined} history */
  constructor(sessionId, history) {
    this.sessionId = sessionId;
    this.#history = history;
  }

  /** The part of a query that says where to go on. @returns {string[]} */
  resumption() {
    const positions = [...this.positions].map(([channel, position]) => `${channel}:${position}`);
    if (positions.length) return [`after=${positions.join(",")}`];
    return this.#history ? [`history=${this.#history}`] : [];
  }

  /** Moves the channel's position; false where events are missing. @param {any} event */
  advance(event) {
    const { seq, merged = 1, reset } = event;
    if (seq === undefined) return true;
    const channel = channelOf(event);
    if (reset) this.#reset(channel);
    if (seq - merged !== (this.positions.get(channel) ?? 0)) return false;
    this.positions.set(channel, seq);
    return true;
  }

  /** Takes an event in; of kinds that it does not know, nothing. @param {ServerEvent} event */
  fold(event) {
    switch (event.type) {
      case "session.created":
      case "session.resumed": this.#attached(event); break;
      case "participant.joined": this.participants.set(event.participant.connection_id, event.participant); break;
      case "participant.left": this.participants.delete(event.participant.connection_id); break;
      case "response.created":
        this.#startsChannel(event.response.id);
        this.#answer(event.response.id).status = event.response.status;
        break;
      case "response.in_progress": this.#answer(event.response_id).status = "in_progress"; break;
      case "response.output_text.delta": this.#answer(event.response_id).text += event.delta; break;
      case "response.reasoning.delta": this.#answer(event.response_id).reasoning += event.delta; break;
      case "response.done":
        this.#answer(event.response_id).status = event.status;
        this.positions.delete(event.response_id); // nothing comes after it: no need to name it
        break;
      case "task.created":
        this.#startsChannel(event.task.id);
        Object.assign(this.#task(event.task.id), { name: event.task.name, status: event.task.status });
        break;
      case "task.started":
        Object.assign(this.#task(event.task_id), unstarted(), { status: "running", attempt: event.attempt });
        break;
      case "task.progress":
        Object.assign(this.#task(event.task_id), {
          progress: event.progress, total: event.total, message: event.message,
        });
        break;
      case "task.output_text.delta": this.#task(event.task_id).text += event.delta; break;
      case "task.done":
        Object.assign(this.#task(event.task_id), {
          status: event.status, result: event.result, resultUrl: event.result_url, error: event.error,
        });
        this.positions.delete(event.task_id);
        break;
    }
  }

  /** @param {import("./messages.js").SessionCreated | import("./messages.js").SessionResumed} first */
  #attached({ session, participants, positions }) {
    this.sessionId = session.id;
    this.participants = new Map(participants.map((one) => [one.connection_id, one]));
    if (this.positions.size) return;
    if (this.#history === "none") this.positions = new Map(Object.entries(positions));
    this.#startsChannel("session");
  }

  /** What was shown of the channel was lost with its instance: it starts anew. @param {string} channel */
  #reset(channel) {
    this.positions.set(channel, 0);
    const answer = this.responses.get(channel);
    if (answer) Object.assign(answer, { text: "", reasoning: "" });
    const task = this.tasks.get(channel);
    if (task) Object.assign(task, unstarted());
  }

  /** Without the history an answer may be met in its middle. @param {string} id @returns {Answer} */
  #answer(id) {
    const answer = this.responses.get(id) ?? { id, status: "in_progress", text: "", reasoning: "" };
    this.responses.set(id, answer);
    return answer;
  }

  /** @param {string} id @returns {Task} */
  #task(id) {
    const task = this.tasks.get(id) ?? { id, name: "", status: "running", attempt: 1, text: "" };
    this.tasks.set(id, task);
    return task;
  }

  /** From now on it is named when resuming, even if nothing of it came yet. @param {string} channel */
  #startsChannel(channel) {
    if (!this.positions.has(channel)) this.positions.set(channel, 0);
  }
}

/** What a task has told before its next attempt. */
function unstarted() {
  return { progress: undefined, total: undefined, message: undefined, text: "" };
}
