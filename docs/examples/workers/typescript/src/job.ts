// What handlers see of a job, and how each end of a handler is reported.
import type { Ending, Lease } from "./client.js";

export type Handler = (job: Job) => Promise<unknown>;

/** Throw it in a handler to fail the attempt, with a code for programs. */
export class Fail extends Error {
  constructor(
    readonly code: string,
    message: string,
    readonly options: { retryable?: boolean; after?: number } = {},
  ) {
    super(message);
  }
}

/** Throw it in a handler to run the job again in `seconds`. The attempt is not spent. */
export class Snooze extends Error {
  constructor(readonly seconds: number) {
    super(`snoozed for ${seconds} s`);
  }
}

export type StopReason = "cancelled" | "timed_out" | "lost" | "shutdown";

/** A leased job. Its handler must end, by throwing, when `signal` is aborted. */
export class Job {
  readonly token: string;
  readonly id: string;
  readonly type: string;
  readonly attempt: number;
  readonly payload: unknown;
  latestProgress: unknown = null;
  stopped: StopReason | undefined;
  readonly #abort = new AbortController();
  #expiry: NodeJS.Timeout | undefined;

  constructor(lease: Lease) {
    this.token = lease.leaseToken;
    ({ id: this.id, type: this.type, attempt: this.attempt, payload: this.payload } = lease.job);
  }

  get signal(): AbortSignal {
    return this.#abort.signal;
  }

  /** Send any JSON with the next heartbeat. */
  progress(value: unknown): void {
    this.latestProgress = JSON.parse(JSON.stringify(value));
  }

  stop(reason: StopReason): void {
    if (!this.stopped || reason === "lost") this.stopped = reason;
    this.#abort.abort();
  }

  /** Stop the job then, unless a heartbeat comes first: another worker may run it. */
  expiresIn(seconds: number): void {
    this.close();
    this.#expiry = setTimeout(() => this.stop("lost"), Math.max(0, seconds * 1000));
  }

  close(): void {
    clearTimeout(this.#expiry);
  }
}

/** Run the handler, and return what to report. */
export async function endingOf(job: Job, handler: Handler): Promise<Ending> {
  try {
    const result = (await handler(job)) ?? null;
    JSON.stringify(result);
    return { kind: "complete", result };
  } catch (error) {
    if (error instanceof Snooze) return { kind: "snooze", seconds: error.seconds };
    if (error instanceof Fail) {
      const { retryable = true, after } = error.options;
      return { kind: "fail", code: error.code, message: error.message, retryable, after };
    }
    if (job.stopped === "shutdown") return { kind: "release" };
    const message = job.stopped ? `The worker stopped the handler: ${job.stopped}.` : String(error);
    const code = job.stopped ?? "handler_failed";
    return { kind: "fail", code, message: message.slice(0, 1000), retryable: true };
  }
}
