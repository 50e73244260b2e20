// What the demo page works out for itself, without a browser.

import assert from "node:assert/strict";
import { test } from "node:test";

import { fragment, otherSeat, readAddress } from "../../static/demo/address.js";
import { Latency } from "../../static/demo/latency.js";
import { Savings } from "../../static/demo/savings.js";

const done = (status, output_tokens, cost_usd) => ({
  status, usage: { input_tokens: 10, output_tokens, total_tokens: 10 + output_tokens, estimated: status === "cancelled", cost_usd },
});

// --- the address ----------------------------------------------------------------------------------------

test("an address names the session and the seat, and reads back", () => {
  for (const seat of ["clinician", "patient"]) {
    const read = readAddress(fragment("sess_1f-", seat));
    assert.deepEqual(read, { sessionId: "sess_1f-", seat, token: undefined });
  }
  assert.equal(fragment("sess_1", "clinician"), "#sess_1");
  assert.equal(otherSeat(otherSeat("patient")), "patient");
});

test("an address that says nothing means a new session, for the clinician", () => {
  for (const hash of ["", "#", "#other", "#seat=nobody", "#sess", "#token="]) {
    assert.deepEqual(readAddress(hash), { sessionId: null, seat: "clinician", token: undefined });
  }
});

test("a guest's token leads to its session, whatever else is no token", () => {
  const payload = Buffer.from(JSON.stringify({ sub: "ben", session_id: "sess_9" })).toString("base64url");
  assert.equal(readAddress(`#token=a.${payload}.c`).sessionId, "sess_9");
  assert.equal(readAddress(`#sess_1&token=a.${payload}.c`).sessionId, "sess_1");
  for (const token of ["abc", "a.b.c", "..", `a.${Buffer.from("7").toString("base64url")}.c`]) {
    assert.deepEqual(readAddress(`#token=${token}`), { sessionId: null, seat: "clinician", token });
  }
});

// --- what stopping saves --------------------------------------------------------------------------------

test("nothing is saved while nothing was stopped", () => {
  const savings = new Savings();
  savings.add(done("completed", 100));
  assert.deepEqual(savings.saved, { answers: 0, atMost: 0, about: 0, aboutUsd: undefined });
  assert.deepEqual(savings.written, { tokens: 100, isEstimated: false });
  assert.equal(savings.costUsd, undefined);
});

test("without a finished answer there is only an upper bound", () => {
  const savings = new Savings();
  savings.maxOutputTokens = 1000;
  savings.add(done("cancelled", 40));
  assert.deepEqual(savings.saved, { answers: 1, atMost: 960, about: undefined, aboutUsd: undefined });
  assert.equal(savings.written.isEstimated, true);
});

test("about as much is saved as finished answers are longer, and never less than nothing", () => {
  const savings = new Savings();
  savings.maxOutputTokens = 1000;
  savings.add(done("completed", 100));
  savings.add(done("completed", 200));
  savings.add(done("cancelled", 40));
  savings.add(done("cancelled", 400));
  savings.add(done("failed", 7));
  assert.deepEqual(savings.saved, { answers: 2, atMost: 1560, about: 110, aboutUsd: undefined });
});

test("a price that the server knows is put on what was saved", () => {
  const savings = new Savings();
  savings.maxOutputTokens = 1000;
  savings.add(done("completed", 90, 0.01));
  savings.add(done("cancelled", 40, 0.005));
  assert.equal(savings.costUsd, 0.015);
  assert.equal(savings.saved.about, 50);
  assert.ok(Math.abs(savings.saved.aboutUsd - 50 * (0.015 / 150)) < 1e-12);
});

// --- how long tokens take -------------------------------------------------------------------------------

test("the first token is measured from the question, the others from the one before", () => {
  const latency = new Latency();
  latency.asked("r", 1000);
  latency.came({ response_id: "r" }, 1300);
  latency.came({ response_id: "r", merged: 3 }, 1340);
  latency.came({ response_id: "r", merged: 9, replay: true }, 2840);
  assert.equal(latency.firstTokenMs, 300);
  assert.deepEqual(latency.waits, [
    { ms: 300, kind: "live" }, { ms: 40, kind: "merged" }, { ms: 1500, kind: "replay" },
  ]);
  assert.equal(latency.quantile(0.5), 300);
  assert.equal(latency.quantile(0.95), 1500);
});

test("of an answer that another asked for the first token was awaited by nobody here", () => {
  const latency = new Latency();
  latency.came({ response_id: "r" }, 1300);
  assert.deepEqual(latency.waits, []);
  assert.equal(latency.firstTokenMs, undefined);
  assert.equal(latency.quantile(0.5), undefined);
  latency.came({ response_id: "r" }, 1350);
  assert.deepEqual(latency.waits, [{ ms: 50, kind: "live" }]);
});

test("only the newest waits are kept", () => {
  const latency = new Latency();
  for (let now = 0; now < 1_000; now += 1) latency.came({ response_id: "r" }, now);
  assert.equal(latency.waits.length, 120);
});
