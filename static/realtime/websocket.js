/** A session's events and commands over one WebSocket. */

/**
 * Where a connection leads, and who asks. `query` is without the session; `url` is `…/v1/realtime`.
 * @typedef {{url: URL, sessionId: string | null, query: string[], token: string | undefined}} Target
 */

/**
 * What a transport tells. After `closed` it tells nothing more.
 * @typedef {object} Listener
 * @property {() => void} alive something came, an event or not
 * @property {(event: any) => void} event
 * @property {(eventId: string) => void} settled the server has carried a command out
 * @property {(code: number, reason: string, retryAfterMs?: number) => void} closed
 */

/**
 * @typedef {object} Transport
 * @property {(command: Record<string, any>) => void} send
 * @property {() => Promise<unknown>} sent once what was given to `send` needs this page no more
 * @property {() => void} close
 */

const LOST = 1006;
const SUBPROTOCOL = "realtime.v1";

/** A message of the server; undefined for what something on the way sends in its place. @param {unknown} data */
export function messageIn(data) {
  try {
    const message = JSON.parse(String(data));
    return typeof message.type === "string" ? message : undefined;
  } catch {
    return undefined;
  }
}

/** @implements {Transport} */
export class WebSocketTransport {
  #socket;

  /** @param {Target} target @param {Listener} listener */
  constructor({ url, sessionId, query, token }, listener) {
    const address = new URL(url);
    address.protocol = address.protocol.replace("http", "ws");
    address.search = [...(sessionId ? [`session_id=${encodeURIComponent(sessionId)}`] : []), ...query].join("&");
    this.#socket = new WebSocket(address, token ? [SUBPROTOCOL, `bearer.${token}`] : [SUBPROTOCOL]);
    let ending = ""; // what the error that comes before the end says
    this.#socket.onopen = () => { this.#socket.onerror = null; }; // its close follows, and has the code
    this.#socket.onerror = () => listener.closed(LOST, "could not be opened"); // Node 20 tells of no close then
    this.#socket.onmessage = ({ data }) => {
      listener.alive();
      const event = messageIn(data);
      if (!event) return listener.closed(LOST, "unreadable");
      ending = event.type === "error" && event.error.fatal ? event.error.code : "";
      listener.event(event);
    };
    this.#socket.onclose = ({ code, reason }) => listener.closed(code, reason || ending);
  }

  /** @param {Record<string, any>} command */
  send(command) {
    this.#socket.send(JSON.stringify(command));
  }

  /** A WebSocket closes after what it was given. */
  async sent() {}

  close() {
    this.#socket.close();
  }
}
