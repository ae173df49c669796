// A worker of `payout.execute`, with a stand-in for the bank:
//   node build/payouts.js http://127.0.0.1:8000/graphql
import { setTimeout as sleep } from "node:timers/promises";
import { Client } from "./client.js";
import { Fail, Snooze } from "./job.js";
import type { Job } from "./job.js";
import { Worker } from "./worker.js";

const { BANK_SECONDS = "8", WORKER_CONCURRENCY = "5", WORKER_SHUTDOWN_SECONDS = "1" } = process.env;

/** Pay a batch from an escrow. The id of the escrow says what the bank does. */
async function pay(job: Job): Promise<unknown> {
  const { batchId, escrowId } = job.payload as { batchId: string; escrowId: string };
  if (escrowId === "unknown") {
    throw new Fail("escrow_unknown", "There is no such escrow.", { retryable: false });
  }
  if (escrowId === "closed" && job.attempt === 1) {
    throw new Fail("bank_closed", "The bank is closed.", { after: 1 });
  }
  if (escrowId === "review") throw new Snooze(3600);
  job.progress({ paying: batchId });
  // Pass the signal on: it aborts when the job is cancelled, times out or loses its lease.
  await sleep(Number(BANK_SECONDS) * 1000, undefined, { signal: job.signal });
  return { paid: batchId, attempt: job.attempt };
}

const client = new Client(process.argv[2]!, process.env["WORKER_TOKEN"]);
const worker = new Worker(
  client,
  { "payout.execute": pay },
  { concurrency: Number(WORKER_CONCURRENCY), graceSeconds: Number(WORKER_SHUTDOWN_SECONDS) },
);
for (const signal of ["SIGTERM", "SIGINT"]) process.on(signal, () => worker.stop());
worker.run().then(
  () => process.exit(0),
  (error: unknown) => {
    console.error(String(error));
    process.exit(1);
  },
);
