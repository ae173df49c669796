// Policies, pages, changes, and what happens to jobs.

import { createClient } from "graphql-sse";
import { graphql } from "../gen/graphql/gql.js";
import type { FollowSubscription } from "../gen/graphql/graphql.js";
import { present, type Send, unreachable } from "./send.js";

const POLICY = graphql(`
  query Policy($jobType: String!) {
    jobPolicy(jobType: $jobType) {
      __typename
      ... on JobPolicy {
        maxAttempts
        timeoutSeconds
        concurrencyLimit
      }
      ... on JobTypeNotFound {
        suggestions
      }
    }
  }
`);

const JOBS = graphql(`
  query Jobs($first: Int!, $after: String) {
    jobs(filter: { statuses: [QUEUED] }, first: $first, after: $after) {
      nodes {
        id
        createdAt
        waitingReason {
          __typename
        }
      }
      pageInfo {
        hasNextPage
        endCursor
      }
    }
  }
`);

const CANCEL = graphql(`
  mutation Cancel($id: ID!) {
    cancelJob(id: $id) {
      __typename
      ... on JobChanged {
        job {
          status
        }
      }
      ... on JobNotFound {
        jobId
      }
      ... on JobStateConflict {
        status
      }
    }
  }
`);

const FOLLOW = graphql(`
  subscription Follow($jobTypes: [String!]) {
    jobEvents(jobTypes: $jobTypes) {
      name
      jobId
      status
    }
  }
`);

export async function policies(send: Send): Promise<string[]> {
  const answers: string[] = [];
  for (const jobType of ["payout.execute", "payout.exec"]) {
    const jobPolicy = present((await send(POLICY, { jobType })).jobPolicy);
    switch (jobPolicy.__typename) {
      case "JobPolicy":
        answers.push(`${jobPolicy.maxAttempts} ${jobPolicy.timeoutSeconds} s`);
        break;
      case "JobTypeNotFound":
        answers.push(jobPolicy.suggestions.join());
        break;
      default:
        unreachable(jobPolicy);
    }
  }
  return answers;
}

export async function countByPages(send: Send): Promise<number> {
  let count = 0;
  let after: string | null | undefined = null;
  do {
    const jobs: Awaited<ReturnType<typeof page>> = await page(send, after);
    count += jobs.nodes.length;
    after = jobs.pageInfo.hasNextPage ? jobs.pageInfo.endCursor : null;
  } while (after);
  return count;
}

async function page(send: Send, after: string | null | undefined) {
  return present((await send(JOBS, { first: 1, after })).jobs);
}

/** Cancels the newest job, and gives what a subscriber is told of it. */
export async function cancelAndFollow(send: Send, url: string): Promise<string[]> {
  const jobs = await page(send, null);
  const id = jobs.nodes[0]?.id ?? "";
  const client = createClient({ url });
  const events = client.iterate<FollowSubscription>({
    query: FOLLOW.toString(),
    variables: { jobTypes: ["thumbnail.create"] },
  });
  const first = events.next();
  await new Promise((resolve) => setTimeout(resolve, 300));
  const answers: string[] = [];
  for (let time = 0; time < 2; time += 1) {
    const cancelJob = present((await send(CANCEL, { id })).cancelJob);
    switch (cancelJob.__typename) {
      case "JobChanged":
        answers.push(`now ${cancelJob.job.status}`);
        break;
      case "JobStateConflict":
        answers.push(`already ${cancelJob.status}`);
        break;
      case "JobNotFound":
        answers.push(`no ${cancelJob.jobId}`);
        break;
      default:
        unreachable(cancelJob);
    }
  }
  const event = (await first).value?.data?.jobEvents;
  answers.push(`${event?.name} ${event?.status} ${event?.jobId === id}`);
  client.dispose();
  return answers;
}
