// Follows a session's events with an `EventSource`, and writes what it dispatches to standard output, a line of JSON each:
//
//     node follow.mjs URL TYPE...
//
// `{"open": true}` and `{"error": STATUS, "state": READY_STATE}` are its own two events; the rest is `{"event", "id", "data"}`.

import { EventSource } from "eventsource";

const [url, ...types] = process.argv.slice(2);
const source = new EventSource(url);
const tell = (told) => process.stdout.write(`${JSON.stringify(told)}\n`);

source.addEventListener("open", () => tell({ open: true }));
source.addEventListener("error", ({ code }) => tell({ error: code ?? null, state: source.readyState }));
for (const type of types) {
  source.addEventListener(type, ({ lastEventId, data }) => tell({ event: type, id: lastEventId, data }));
}
