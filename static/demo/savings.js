/** What the answers have cost, and what stopping some of them has saved. No I/O. */

/** @typedef {import("../realtime/messages.js").ResponseDone} ResponseDone */

/**
 * What an answer would have come to had nobody stopped it, nobody can know. Two figures are honest: at most it would
 * have run to the longest allowed length; and about as long as this session's finished answers are on average.
 */
export class Savings {
  /** The longest that an answer may become, in tokens. */
  maxOutputTokens = 0;
  /** @type {number[]} */
  #finished = [];
  /** @type {number[]} */
  #stopped = [];
  #tokens = { output: 0, priced: 0 };
  #costUsd = 0;
  #isEstimated = false;

  /** @param {ResponseDone} done */
  add({ status, usage }) {
    this.#tokens.output += usage.output_tokens;
    this.#isEstimated ||= usage.estimated;
    if (usage.cost_usd !== undefined) {
      this.#tokens.priced += usage.total_tokens;
      this.#costUsd += usage.cost_usd;
    }
    if (status === "completed") this.#finished.push(usage.output_tokens);
    if (status === "cancelled") this.#stopped.push(usage.output_tokens);
  }

  /** Tokens that were written; `isEstimated` where the model's provider did not count all of them. */
  get written() {
    return { tokens: this.#tokens.output, isEstimated: this.#isEstimated };
  }

  /** What all of it has cost; undefined where the server knows no prices. */
  get costUsd() {
    return this.#tokens.priced ? this.#costUsd : undefined;
  }

  /**
   * Tokens that were not written. `about` is undefined as long as no answer has been finished to compare with.
   * @returns {{answers: number, atMost: number, about: number | undefined, aboutUsd: number | undefined}}
   */
  get saved() {
    const atMost = sum(this.#stopped.map((written) => Math.max(0, this.maxOutputTokens - written)));
    const about = this.#about();
    const usdPerToken = this.#tokens.priced ? this.#costUsd / this.#tokens.priced : undefined;
    const aboutUsd = about !== undefined && usdPerToken !== undefined ? about * usdPerToken : undefined;
    return { answers: this.#stopped.length, atMost, about, aboutUsd };
  }

  #about() {
    if (!this.#finished.length) return undefined;
    const usual = sum(this.#finished) / this.#finished.length;
    return Math.round(sum(this.#stopped.map((written) => Math.max(0, usual - written))));
  }
}

/** @param {number[]} numbers */
const sum = (numbers) => numbers.reduce((total, one) => total + one, 0);
