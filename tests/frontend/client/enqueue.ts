// Both doors, and every answer they have.

import { graphql } from "../gen/graphql/gql.js";
import type { EnqueueMutation } from "../gen/graphql/graphql.js";
import { present, type Send, unreachable } from "./send.js";

graphql(`
  fragment Answer on EnqueueJobResult {
    __typename
    ... on EnqueueJobSuccess {
      deduplicated
      job {
        id
        status
        payload
      }
    }
    ... on JobTypeNotFound {
      jobType
      suggestions
    }
    ... on PayloadInvalid {
      violations {
        path
        code
      }
    }
    ... on InputInvalid {
      violations {
        path
        code
      }
    }
    ... on IdempotencyConflict {
      existingJob {
        id
      }
      differingPaths
    }
  }
`);

const ENQUEUE = graphql(`
  mutation Enqueue($input: EnqueueJobInput!) {
    result: enqueueJob(input: $input) {
      ...Answer
    }
  }
`);

const ENQUEUE_TYPED = graphql(`
  mutation EnqueueTyped($job: TypedJobInput!, $options: EnqueueOptions) {
    result: enqueue(job: $job, options: $options) {
      ...Answer
    }
  }
`);

function told(answer: EnqueueMutation["result"]): string {
  const result = present(answer);
  switch (result.__typename) {
    case "EnqueueJobSuccess":
      return `${result.deduplicated ? "found" : "stored"} ${JSON.stringify(result.job.payload)}`;
    case "JobTypeNotFound":
      return `no ${result.jobType}, perhaps ${result.suggestions.join()}`;
    case "PayloadInvalid":
      return `payload ${result.violations.map((each) => `${each.path} ${each.code}`).join()}`;
    case "InputInvalid":
      return `input ${result.violations.map((each) => `${each.path} ${each.code}`).join()}`;
    case "IdempotencyConflict":
      return `conflict at ${result.differingPaths.join()}`;
    default:
      return unreachable(result);
  }
}

export async function enqueueInEveryWay(send: Send): Promise<string[]> {
  const payload = { assetId: "generic", versionNumber: 1 };
  const generic = [
    { type: "thumbnail.create", payload, idempotencyKey: "k" },
    { type: "thumbnail.create", payload, idempotencyKey: "k" },
    { type: "thumbnail.create", payload: { ...payload, assetId: "b" }, idempotencyKey: "k" },
    { type: "thumbnail.crate", payload },
    { type: "thumbnail.create", payload: { versionNumber: "1" } },
    { type: "thumbnail.create", payload, priority: 101 },
  ];
  const answers: string[] = [];
  for (const input of generic) answers.push(told((await send(ENQUEUE, { input })).result));
  const typed = await send(ENQUEUE_TYPED, {
    job: { thumbnailCreate: { assetId: "typed", versionNumber: 2 } },
    options: { priority: 60 },
  });
  answers.push(told(typed.result));
  const faulty = await send(ENQUEUE_TYPED, {
    job: { thumbnailCreate: { assetId: "no/slash", versionNumber: 0, sizes: [] } },
  });
  answers.push(told(faulty.result));
  return answers;
}
