// What an application writes in TypeScript: it has to compile, and what is marked must not.

import { type Answer, QueueFull, RealtimeError, RealtimeSession, SessionClosed, type ServerEvent } from "realtime-client";
import type { TaskDone, Usage } from "realtime-client/messages";

const session = new RealtimeSession({ url: "wss://example.org/ai", token: async () => "a.b.c", transport: "auto" });
session.addEventListener("response.done", ({ detail }) => {
  const usage: Usage = detail.usage;
  console.log(usage.total_tokens, detail.error?.message);
});
session.addEventListener("disconnect", ({ detail }) => console.log(detail.reconnectInMs.toFixed()));
session.connect();

export async function converse(): Promise<string> {
  const stream = session.respond("Hello", { multitask_strategy: "interrupt", metadata: { page: 1 } });
  for await (const event of stream) {
    if (event.type === "response.output_text.delta") console.log(event.delta.length, event.seq, event.merged ?? 1);
    // @ts-expect-error an answer's stream yields nothing of tasks
    if (event.type === "task.done") console.log(event);
  }
  session.heard(stream.responseId, 3);
  session.interrupt();
  return stream.text();
}

export async function work(): Promise<TaskDone> {
  const task = session.createTask("count", { to: 3 });
  for await (const event of task) if (event.type === "task.progress") console.log(event.progress, event.total);
  return task.done();
}

export async function follow(seen: (event: ServerEvent) => void): Promise<Answer[]> {
  try {
    for await (const event of session) seen(event);
  } catch (error) {
    if (error instanceof SessionClosed) console.log(error.closeCode);
    else if (error instanceof QueueFull || error instanceof RealtimeError) console.log(error.code, error.retryAfterMs);
  }
  return session.unfinished;
}

// @ts-expect-error there is no such strategy
session.respond("Hello", { multitask_strategy: "shout" });
// @ts-expect-error there is no such message
session.send({ type: "response.created" });
// @ts-expect-error there is no such event
session.addEventListener("response.dome", () => {});
