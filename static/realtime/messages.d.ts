// Written by scripts/update_types.py out of the protocol's structs. Kinds that are not here may come, too.

/** A session's settings as a client may set them; `None` means: not given. Empty `instructions` clear them. */
export interface Overrides {
  instructions?: string;
  model?: string;
  max_output_tokens?: number;
  on_disconnect?: "cancel" | "continue";
  disconnect_grace_ms?: number;
  multitask_strategy?: "enqueue" | "interrupt" | "reject";
}

/** A conversation item as a client gives it. */
export interface NewItem {
  role: "assistant" | "system" | "user";
  content: string;
  id?: string;
}

/** A session as clients see it: who owns it, how long it lives, its settings. */
export interface Session {
  id: string;
  owner: string;
  created_at: string;
  expires_at: string;
  instructions: string;
  model: string;
  max_output_tokens: number;
  on_disconnect: "cancel" | "continue";
  disconnect_grace_ms: number;
  multitask_strategy: "enqueue" | "interrupt" | "reject";
}

/** One connection that looks at the session. */
export interface Participant {
  user: string;
  connection_id: string;
  since: string;
}

/** An item of the conversation. */
export interface Item {
  id: string;
  role: "assistant" | "system" | "user";
  content: string;
  user: string;
  created_at: string;
}

/** How much of an answer was heard, in UTF-16 code units. */
export interface Truncation {
  response_id: string;
  heard_chars: number;
}

/** A response at its creation. */
export interface Response {
  id: string;
  status: "in_progress" | "queued";
  model: string;
  created_at: string;
  metadata: Record<string, string | number | boolean | null>;
  user: string;
}

/** A task at its creation; `response_id` names the response whose tool call made it. */
export interface Task {
  id: string;
  name: string;
  status: "pending";
  created_at: string;
  response_id?: string;
}

/** Tokens of a response or a task; `estimated` where the provider gave no final count and they were counted here. */
export interface Usage {
  input_tokens: number;
  output_tokens: number;
  total_tokens: number;
  estimated: boolean;
  cache_read_input_tokens?: number;
  cache_creation_input_tokens?: number;
  cost_usd?: number;
}

/** How much of something is left, and in how many seconds all of it will be again. */
export interface RateLimit {
  name: string;
  limit: number;
  remaining: number;
  reset_s: number;
}

/** An error in words and codes; `fatal` means that the connection is closed after it. */
export interface ErrorBody {
  type: string;
  code: string;
  message: string;
  fatal: boolean;
  param?: string;
  event_id?: string;
  retry_after_ms?: number;
}

/** Why a response or a task failed. */
export interface Failure {
  type: string;
  code: string;
  message: string;
}

/** Changes the session's settings. Owner only. */
export interface SessionUpdate {
  type: "session.update";
  event_id?: string;
  session: Overrides;
}

/** Adds an item to the conversation. */
export interface ItemCreate {
  type: "conversation.item.create";
  event_id?: string;
  item: NewItem;
}

/** The listener heard only so much of that answer: the conversation keeps that much. */
export interface ItemTruncate {
  type: "conversation.item.truncate";
  event_id?: string;
  response_id: string;
  heard_chars: number;
}

/** Stops a response; with `heard_chars` also truncates it. */
export interface ResponseCancel {
  type: "response.cancel";
  event_id?: string;
  response_id: string;
  heard_chars?: number;
}

/** Starts a background task; what its `input` must be, the task of that `name` says. */
export interface TaskCreate {
  type: "task.create";
  event_id?: string;
  task_id?: string;
  name: string;
  input: any;
}

/** Stops a task. */
export interface TaskCancel {
  type: "task.cancel";
  event_id?: string;
  task_id: string;
}

/** Ends the session for everyone. Owner only. */
export interface SessionClose {
  type: "session.close";
  event_id?: string;
}

/** Replaces the connection's token before it expires. */
export interface AuthRefresh {
  type: "auth.refresh";
  event_id?: string;
  token: string;
}

/** Asks for a `pong`. */
export interface Ping {
  type: "ping";
  event_id?: string;
}

/** Starts a response, with `input` as a user item before it where given. */
export interface ResponseCreate {
  type: "response.create";
  instructions?: string;
  model?: string;
  max_output_tokens?: number;
  on_disconnect?: "cancel" | "continue";
  disconnect_grace_ms?: number;
  multitask_strategy?: "enqueue" | "interrupt" | "reject";
  event_id?: string;
  response_id?: string;
  input?: string;
  metadata?: Record<string, string | number | boolean | null>;
}

/** The first frame of the connection that made the session. */
export interface SessionCreated {
  type: "session.created";
  session: Session;
  connection_id: string;
  positions: Record<string, number>;
  participants: Participant[];
}

/** The first frame of a connection to a session that was there before. */
export interface SessionResumed {
  type: "session.resumed";
  session: Session;
  connection_id: string;
  positions: Record<string, number>;
  participants: Participant[];
}

/** The instance is shutting down: its connections end in `time_left_ms`; reconnect after `reconnect_after_ms`. */
export interface SessionGoingAway {
  type: "session.going_away";
  reason: string;
  time_left_ms: number;
  reconnect_after_ms: number;
}

/** Another connection looks at the session. */
export interface ParticipantJoined {
  type: "participant.joined";
  participant: Participant;
}

/** Another connection is gone. */
export interface ParticipantLeft {
  type: "participant.left";
  participant: Participant;
}

/** What this client may still do. */
export interface RateLimitsUpdated {
  type: "rate_limits.updated";
  rate_limits: RateLimit[];
}

/** The connection's token expires soon, and the connection with it. */
export interface AuthExpiring {
  type: "auth.expiring";
  expires_at: string;
}

/** The connection has a new token. */
export interface AuthRefreshed {
  type: "auth.refreshed";
  expires_at: string;
}

/** Something was refused or went wrong; the connection lives on unless `error.fatal`. */
export interface ErrorMessage {
  type: "error";
  error: ErrorBody;
}

/** The answer to a `ping`. */
export interface Pong {
  type: "pong";
  event_id?: string;
}

/** The session's settings changed. */
export interface SessionUpdated {
  type: "session.updated";
  seq: number;
  merged?: number;
  replay?: boolean;
  reset?: boolean;
  for_event_id?: string;
  session: Session;
}

/** The session is over; nothing comes after this. */
export interface SessionClosed {
  type: "session.closed";
  seq: number;
  merged?: number;
  replay?: boolean;
  reset?: boolean;
  for_event_id?: string;
  reason: string;
}

/** The conversation has a new item. */
export interface ItemCreated {
  type: "conversation.item.created";
  seq: number;
  merged?: number;
  replay?: boolean;
  reset?: boolean;
  for_event_id?: string;
  item: Item;
}

/** The conversation keeps only what was heard of an answer. */
export interface ItemTruncated {
  type: "conversation.item.truncated";
  seq: number;
  merged?: number;
  replay?: boolean;
  reset?: boolean;
  for_event_id?: string;
  item: Truncation;
}

/** A response was accepted. Its `overrides`, its `bill`, and the `traceparent` of what has made it stay in the log and are not sent. */
export interface ResponseCreated {
  type: "response.created";
  seq: number;
  merged?: number;
  replay?: boolean;
  reset?: boolean;
  for_event_id?: string;
  response: Response;
}

/** The response runs now. Appended with `expect=0` it is the claim to run it, by an `instance` that clients are not told. */
export interface ResponseInProgress {
  type: "response.in_progress";
  seq: number;
  merged?: number;
  replay?: boolean;
  reset?: boolean;
  for_event_id?: string;
  response_id: string;
}

/** The next piece of the answer. */
export interface OutputTextDelta {
  type: "response.output_text.delta";
  seq: number;
  merged?: number;
  replay?: boolean;
  reset?: boolean;
  for_event_id?: string;
  response_id: string;
  delta: string;
}

/** The next piece of the model's reasoning. */
export interface ReasoningDelta {
  type: "response.reasoning.delta";
  seq: number;
  merged?: number;
  replay?: boolean;
  reset?: boolean;
  for_event_id?: string;
  response_id: string;
  delta: string;
}

/** The response's one end. `output_chars` and `heard_chars` are UTF-16 code units. */
export interface ResponseDone {
  type: "response.done";
  seq: number;
  merged?: number;
  replay?: boolean;
  reset?: boolean;
  for_event_id?: string;
  response_id: string;
  status: "cancelled" | "completed" | "failed" | "incomplete";
  stop_reason: string | null;
  usage: Usage;
  output_chars: number;
  error?: Failure;
  heard_chars?: number;
}

/** A task was accepted. Its `input`, as JSON, the `user` who asked for it, the `payer` whose limits count, and the `traceparent` of what has made it stay in the log and are not sent. */
export interface TaskCreated {
  type: "task.created";
  seq: number;
  merged?: number;
  replay?: boolean;
  reset?: boolean;
  for_event_id?: string;
  task: Task;
}

/** An attempt at the task runs now: what earlier ones told is void. It is the claim to run it, by an `instance` that clients are not told; nor are they told, of this and what follows, `at` what time it was. */
export interface TaskStarted {
  type: "task.started";
  seq: number;
  merged?: number;
  replay?: boolean;
  reset?: boolean;
  for_event_id?: string;
  task_id: string;
  attempt: number;
}

/** How far the attempt is: `progress` of `total`, in units of the task's own; `total` is `null` if nobody knows. */
export interface TaskProgress {
  type: "task.progress";
  seq: number;
  merged?: number;
  replay?: boolean;
  reset?: boolean;
  for_event_id?: string;
  task_id: string;
  attempt: number;
  progress: number;
  total: number | null;
  message: string | null;
}

/** The next piece of the text that the task writes. */
export interface TaskOutputTextDelta {
  type: "task.output_text.delta";
  seq: number;
  merged?: number;
  replay?: boolean;
  reset?: boolean;
  for_event_id?: string;
  task_id: string;
  attempt: number;
  delta: string;
}

/** The task's one end. A result of up to 128 KiB is in it, a larger one at `result_url`; in the log it stands as `result_json`, which is not sent. */
export interface TaskDone {
  type: "task.done";
  seq: number;
  merged?: number;
  replay?: boolean;
  reset?: boolean;
  for_event_id?: string;
  task_id: string;
  status: "cancelled" | "complete" | "failed";
  result: any;
  result_url?: string;
  error?: Failure;
}

export type ClientMessage =
  | SessionUpdate
  | ItemCreate
  | ItemTruncate
  | ResponseCancel
  | TaskCreate
  | TaskCancel
  | SessionClose
  | AuthRefresh
  | Ping
  | ResponseCreate;

export type ServerEvent =
  | SessionCreated
  | SessionResumed
  | SessionGoingAway
  | ParticipantJoined
  | ParticipantLeft
  | RateLimitsUpdated
  | AuthExpiring
  | AuthRefreshed
  | ErrorMessage
  | Pong
  | SessionUpdated
  | SessionClosed
  | ItemCreated
  | ItemTruncated
  | ResponseCreated
  | ResponseInProgress
  | OutputTextDelta
  | ReasoningDelta
  | ResponseDone
  | TaskCreated
  | TaskStarted
  | TaskProgress
  | TaskOutputTextDelta
  | TaskDone;

export type ResponseEvent =
  | ResponseCreated
  | ResponseInProgress
  | OutputTextDelta
  | ReasoningDelta
  | ResponseDone;

export type TaskEvent =
  | TaskCreated
  | TaskStarted
  | TaskProgress
  | TaskOutputTextDelta
  | TaskDone;
