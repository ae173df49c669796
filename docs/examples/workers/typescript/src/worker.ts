// A remote worker of Job Registry: leases jobs, runs handlers, reports how each attempt ended.
// `payouts.ts` has handlers. This file needs no changes: copy it.
import { hostname } from "node:os";
import { setTimeout as sleep } from "node:timers/promises";
import { Refused, Unreachable } from "./client.js";
import type { Client, Ending, Lease, Leases } from "./client.js";
import { Job, endingOf } from "./job.js";
import type { Handler } from "./job.js";

/** How long one `leaseJobs` waits for a job. The server takes up to 30. */
const WAIT_SECONDS = 20;
/** How long a shutdown waits for reports that the server does not answer. */
const REPORT_SECONDS = 5;

type Options = { concurrency: number; graceSeconds: number };

const now = () => performance.now() / 1000;
const log = (text: string) => console.error(`${new Date().toISOString()} ${text}`);

/** Runs up to `concurrency` jobs at once. `handlers` has a handler for each job type. */
export class Worker {
  readonly id = `${hostname()}:${process.pid}`;
  readonly #client: Client;
  readonly #handlers: Record<string, Handler>;
  readonly #options: Options;
  readonly #running = new Set<Job>();
  /** Until a lease says otherwise, for the shortest that there is. */
  #beatSeconds = 1 / 3;
  #stopping = false;
  #poll: AbortController | undefined;
  #wake = () => {};

  constructor(client: Client, handlers: Record<string, Handler>, options: Options) {
    this.#client = client;
    this.#handlers = handlers;
    this.#options = options;
  }

  /** Lease no more jobs. Running jobs have `graceSeconds` to end, and are then released. */
  stop(): void {
    if (this.#stopping) return;
    this.#stopping = true;
    this.#wake();
    void this.#endPoll();
  }

  /** Work until `stop`. Throws Refused if the server refuses to lease jobs. */
  async run(): Promise<void> {
    void this.#beat();
    let failures = 0;
    try {
      while (!this.#stopping) {
        const free = this.#options.concurrency - this.#running.size;
        if (free === 0) {
          await this.#wait(60);
          continue;
        }
        try {
          const { began, leases } = await this.#lease(free);
          for (const lease of leases) void this.#work(lease, began);
          failures = 0;
        } catch (error) {
          if (!(error instanceof Unreachable)) throw error;
          if (!this.#stopping) log(`leaseJobs: ${error.message}`);
          await this.#wait(Math.max(error.retryAfter, backoff(failures++)));
        }
      }
    } finally {
      this.#stopping = true;
      await this.#drain(this.#options.graceSeconds);
      for (const job of this.#running) job.stop("shutdown");
      await this.#drain(REPORT_SECONDS);
    }
  }

  /** Lease jobs. `began` is when their leases began, or earlier. */
  async #lease(limit: number): Promise<{ began: number; leases: Leases }> {
    const jobTypes = Object.keys(this.#handlers);
    const input = { jobTypes, workerId: this.id, limit, waitSeconds: WAIT_SECONDS };
    const sent = now();
    this.#poll = new AbortController();
    try {
      const answer = await this.#client.lease(input, this.#poll.signal);
      if (answer.__typename === "InputInvalid") {
        throw new Refused(`leaseJobs: ${JSON.stringify(answer.violations)}`);
      }
      return { began: sent + answer.waitedSeconds, leases: answer.leases };
    } finally {
      this.#poll = undefined;
    }
  }

  /** Jobs may be on their way to us. If we hung up, they would lose an attempt. */
  async #endPoll(): Promise<void> {
    for (let tries = 0; this.#poll && tries < 3; tries++) {
      await this.#client.stopWaiting(this.id).catch(() => {});
      await sleep(500);
    }
    this.#poll?.abort();
  }

  async #work(lease: Lease, began: number): Promise<void> {
    const job = new Job(lease);
    const age = now() - began;
    this.#running.add(job);
    this.#beatSeconds = lease.leaseSeconds / 3;
    job.expiresIn(lease.secondsToExpiry - age);
    if (age > this.#beatSeconds) void this.#renew(job);
    let ending: Ending = { kind: "release" };
    // A job whose lease may have ended on its way is not run, only released.
    if (!this.#stopping && age < lease.secondsToExpiry) {
      log(`${job.type} ${job.id} attempt ${job.attempt}`);
      // A second before the server does, so that the report is in time.
      const timeout = Math.max(lease.secondsLeft - 1, lease.secondsLeft / 2) - age;
      const timer = setTimeout(() => job.stop("timed_out"), timeout * 1000);
      ending = await endingOf(job, this.#handlers[job.type]!);
      clearTimeout(timer);
    }
    await this.#report(job, ending);
    job.close();
    this.#running.delete(job);
    this.#wake();
  }

  /** Report the end until the server answers, or until the lease has expired. */
  async #report(job: Job, ending: Ending): Promise<void> {
    let refused = false;
    for (let failures = 0; job.stopped !== "lost"; ) {
      try {
        const answer = await this.#client.end(job.token, ending);
        if (answer.__typename === "InputInvalid" && !refused) {
          // The result is too large, or a number of seconds is out of range.
          refused = true;
          const message = JSON.stringify(answer.violations).slice(0, 1000);
          ending = { kind: "fail", code: "report_refused", message, retryable: false };
          continue;
        }
        // LeaseLost: an earlier report has arrived, or the job runs elsewhere.
        log(`${job.id} ${ending.kind}: ${JSON.stringify(answer)}`);
        return;
      } catch (error) {
        if (!(error instanceof Unreachable)) return log(`${job.id}: ${error}`);
        await sleep(Math.max(error.retryAfter, backoff(failures++)) * 1000);
      }
    }
    log(`${job.id}: the lease is lost`);
  }

  /** Renew the leases of all running jobs, also of those whose report is not answered. */
  async #beat(): Promise<void> {
    for (;;) {
      const began = now();
      const renewed = await Promise.all([...this.#running].map((job) => this.#renew(job)));
      const pause = renewed.every(Boolean) ? this.#beatSeconds : Math.min(1, this.#beatSeconds);
      await sleep(Math.max(0, began + pause - now()) * 1000);
    }
  }

  /** Send one heartbeat. Return false if it has to be sent again soon. */
  async #renew(job: Job): Promise<boolean> {
    const sent = now();
    try {
      const progress = job.latestProgress;
      const answer = await this.#client.heartbeat(job.token, progress, this.#beatSeconds);
      switch (answer.__typename) {
        case "LeaseLost":
          job.stop("lost");
          return true;
        case "InputInvalid":
          // The progress is too large. The next heartbeat renews the lease without it.
          job.latestProgress = null;
          log(`${job.id}: ${JSON.stringify(answer.violations)}`);
          return false;
        case "HeartbeatJobSuccess":
          if (this.#running.has(job)) job.expiresIn(sent + answer.secondsToExpiry - now());
          if (answer.cancelRequested) job.stop("cancelled");
          return true;
      }
    } catch (error) {
      log(`heartbeatJob: ${error}`);
      return false;
    }
  }

  /** Wait until a job ends or the worker is stopped. */
  #wait(seconds: number): Promise<void> {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, seconds * 1000);
      this.#wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }

  /** Wait until no job runs. */
  async #drain(seconds: number): Promise<void> {
    for (const end = now() + seconds; this.#running.size && now() < end; ) {
      await this.#wait(end - now());
    }
  }
}

/** 0.25 to 15 seconds. The random part keeps workers from asking all at once. */
function backoff(failures: number): number {
  return Math.min(15, 0.5 * 2 ** failures) * (0.5 + Math.random() / 2);
}
