// The requests that every client sends. `runScenario` prints the results that it got as a line of JSON.

import type { TypedDocumentNode } from "@graphql-typed-document-node/core";
import {
  CancelDocument,
  EnqueueDocument,
  type EnqueueMutation,
  EnqueueTypedDocument,
  FollowDocument,
  type FollowSubscription,
  JobAndPageDocument,
  JobDocument,
  JobsDocument,
  type JobsQueryVariables,
} from "../gen/graphql.js";

export type Failure = {
  message: string;
  path?: readonly (string | number)[] | undefined;
  extensions?: Record<string, unknown> | undefined;
};

/** The answer to a request: data, errors, or both. */
export type Answer<Data> = { data?: Data | null | undefined; errors?: readonly Failure[] };

export type Execute = <Data, Variables extends Record<string, unknown>>(
  document: TypedDocumentNode<Data, Variables>,
  variables: Variables,
) => Promise<Answer<Data>>;

/** The client under test. `follow` is missing where it has no subscriptions. */
export type Client = {
  query: Execute;
  mutate: Execute;
  follow?: (
    document: typeof FollowDocument,
    variables: { id: string },
    next: (data: FollowSubscription) => void,
    fail: (error: unknown) => void,
  ) => () => void;
};

export async function runScenario({ query, mutate, follow }: Client): Promise<void> {
  const generic = await mutate(EnqueueDocument, {
    input: { type: "payout.execute", payload: { batchId: "b-1", escrowId: "e-1" } },
  });
  const typed = await mutate(EnqueueTypedDocument, {
    job: { payoutExecute: { batchId: "b-2", escrowId: "e-1" } },
    options: { priority: 80 },
  });
  const third = await mutate(EnqueueTypedDocument, {
    job: { payoutExecute: { batchId: "b-3", escrowId: "e-1", isRetry: true } },
  });
  const id = idOf(generic);
  const mine = [idOf(third), idOf(typed), id];

  const read = present((await query(JobDocument, { id: idOf(typed) })).data?.job);
  const foreign = present((await query(JobDocument, { id: process.argv[2] ?? "" })).data?.job);

  const page = async (variables: JobsQueryVariables) =>
    present((await query(JobsDocument, variables)).data?.jobs);
  const first = await page({ first: 2 });
  const second = await page({ first: 2, after: first.pageInfo.endCursor });
  const last = await page({ last: 2 });
  const beforeIt = await page({ last: 2, before: last.pageInfo.startCursor });

  const refused = await mutate(EnqueueDocument, {
    input: { type: "thumbnail.create", payload: { assetId: "no/slash", sizes: [128, 0] } },
  });
  const wrongType = await mutate(EnqueueTypedDocument, {
    job: { payoutExecute: { batchId: 1 as unknown as string, escrowId: "e-1" } },
  });
  const partial = await query(JobAndPageDocument, { id, after: "no cursor" });

  const events: string[] = [];
  const cancel = async () => present((await mutate(CancelDocument, { id })).data?.result);
  if (follow) {
    await new Promise<void>((resolve, reject) => {
      const stop = follow(
        FollowDocument,
        { id },
        ({ jobEvents }) => {
          events.push(`${jobEvents.name} ${jobEvents.status}`);
          // The second `job.current` is the first event after the restart.
          if (events.length === 1) console.log("restart the server");
          else if (events.length === 2) cancel().catch(reject);
          else resolve(stop());
        },
        reject,
      );
    });
  } else {
    await cancel();
  }
  const again = await cancel();
  const cancelled = present((await query(JobDocument, { id })).data?.job);

  const report = {
    read: read.__typename === "Job" && {
      type: read.type,
      status: read.status,
      priority: read.priority,
      payload: read.payload,
      createdBy: read.createdBy,
      createdAt: /^20\d\d-\d\d-\d\dT.*Z$/.test(read.createdAt),
    },
    "the job of another": read.__typename === foreign.__typename ? "seen" : codeOf(foreign),
    pages: [first, second, last, beforeIt].map((each) => ({
      jobs: each.nodes.map((job) => mine.indexOf(job.id)),
      next: each.pageInfo.hasNextPage,
      previous: each.pageInfo.hasPreviousPage,
      total: each.totalCount,
    })),
    violations: violationsOf(refused),
    "a wrong type": failuresOf(wrongType).map((each) => each.message),
    "beside a failed field": {
      data: { job: partial.data?.job?.__typename, jobs: partial.data?.jobs },
      errors: failuresOf(partial).map((each) => [each.path, each.extensions?.code]),
    },
    events,
    "cancelled twice": codeOf(again),
    "read again": cancelled.__typename === "Job" && cancelled.status,
  };
  console.log(JSON.stringify(report));
}

function idOf(answer: Answer<EnqueueMutation>): string {
  const result = present(answer.data?.result);
  if (result.__typename === "EnqueueJobSuccess") return result.job.id;
  throw new Error(`not stored: ${result.code} ${result.message}`);
}

function violationsOf(answer: Answer<EnqueueMutation>): string[] {
  const result = present(answer.data?.result);
  if (result.__typename !== "PayloadInvalid") return [];
  return result.violations.map((each) => `${each.path} ${each.code}`);
}

function failuresOf(answer: Answer<unknown>): readonly Failure[] {
  return answer.errors ?? [];
}

function codeOf(result: { __typename: string; code?: string }): string | undefined {
  return result.code;
}

function present<Value>(value: Value | null | undefined): Value {
  if (value === null || value === undefined) throw new Error("the field was not answered");
  return value;
}
