// A typed client of the mutations that a worker sends. graphql-codegen makes the types.
import { graphql } from "./gen/gql.js";
import type { LeaseJobsInput, LeaseMutation, TypedDocumentString } from "./gen/graphql.js";

const LEASE = graphql(`
  mutation Lease($input: LeaseJobsInput!) {
    answer: leaseJobs(input: $input) {
      __typename
      ... on InputInvalid { violations { path message } }
      ... on LeaseJobsSuccess {
        waitedSeconds
        leases {
          leaseToken leaseSeconds secondsToExpiry secondsLeft
          job { id type attempt payload }
        }
      }
    }
  }
`);
const STOP_WAITING = graphql(`
  mutation StopWaiting($workerId: String!) {
    answer: stopWaiting(workerId: $workerId) { __typename }
  }
`);
const HEARTBEAT = graphql(`
  mutation Heartbeat($token: String!, $progress: JSON) {
    answer: heartbeatJob(leaseToken: $token, progress: $progress) {
      __typename
      ... on InputInvalid { violations { path message } }
      ... on HeartbeatJobSuccess { secondsToExpiry cancelRequested }
    }
  }
`);
const COMPLETE = graphql(`
  mutation Complete($token: String!, $result: JSON) {
    answer: completeJob(leaseToken: $token, result: $result) {
      __typename
      ... on InputInvalid { violations { path message } }
    }
  }
`);
const FAIL = graphql(`
  mutation Fail($token: String!, $error: JobErrorInput!, $retryable: Boolean!, $after: Int) {
    answer: failJob(
      leaseToken: $token, error: $error, retryable: $retryable, retryAfterSeconds: $after
    ) {
      __typename
      ... on InputInvalid { violations { path message } }
    }
  }
`);
const RELEASE = graphql(`
  mutation Release($token: String!) {
    answer: releaseJob(leaseToken: $token) { __typename }
  }
`);
const SNOOZE = graphql(`
  mutation Snooze($token: String!, $seconds: Int!) {
    answer: snoozeJob(leaseToken: $token, seconds: $seconds) {
      __typename
      ... on InputInvalid { violations { path message } }
    }
  }
`);

export type Leases = Extract<
  NonNullable<LeaseMutation["answer"]>,
  { __typename: "LeaseJobsSuccess" }
>["leases"];
export type Lease = Leases[number];

/** How an attempt ends. */
export type Ending =
  | { kind: "complete"; result: unknown }
  | { kind: "fail"; code: string; message: string; retryable: boolean; after?: number | undefined }
  | { kind: "release" }
  | { kind: "snooze"; seconds: number };

/** There was no answer, or one that a later request may not get. Try again. */
export class Unreachable extends Error {
  constructor(message: string, readonly retryAfter = 0) {
    super(message);
  }
}

/** The server will not execute the request: its token, or its document. */
export class Refused extends Error {}

const TRANSIENT = new Set(["queue_unavailable", "rate_limited", "internal_error"]);

type Content = {
  data?: { answer?: unknown };
  errors?: { message: string; extensions?: { code?: string } }[];
};

/** Sends mutations. Throws Unreachable or Refused. */
export class Client {
  constructor(readonly url: string, readonly token?: string | undefined) {}

  lease(input: LeaseJobsInput, signal: AbortSignal) {
    return this.#send(LEASE, { input }, (input.waitSeconds ?? 0) + 10, signal);
  }

  stopWaiting(workerId: string) {
    return this.#send(STOP_WAITING, { workerId }, 1);
  }

  heartbeat(token: string, progress: unknown, seconds: number) {
    return this.#send(HEARTBEAT, { token, progress }, seconds);
  }

  end(token: string, ending: Ending) {
    switch (ending.kind) {
      case "complete":
        return this.#send(COMPLETE, { token, result: ending.result }, 10);
      case "release":
        return this.#send(RELEASE, { token }, 10);
      case "snooze":
        return this.#send(SNOOZE, { token, seconds: ending.seconds }, 10);
      case "fail": {
        const { code, message, retryable, after } = ending;
        return this.#send(FAIL, { token, error: { code, message }, retryable, after }, 10);
      }
    }
  }

  async #send<Data extends { answer: unknown }, Variables>(
    document: TypedDocumentString<Data, Variables>,
    variables: Variables,
    seconds: number,
    signal?: AbortSignal,
  ): Promise<NonNullable<Data["answer"]>> {
    const headers: Record<string, string> = {
      "content-type": "application/json",
      accept: "application/json",
    };
    if (this.token) headers["authorization"] = `Bearer ${this.token}`;
    const body = JSON.stringify({ query: document.toString(), variables });
    const timeout = AbortSignal.timeout(seconds * 1000);
    let status = 0;
    let retryAfter = 0;
    let content: Content;
    try {
      const response = await fetch(this.url, {
        method: "POST",
        headers,
        body,
        signal: signal ? AbortSignal.any([signal, timeout]) : timeout,
      });
      status = response.status;
      retryAfter = Number(response.headers.get("retry-after")) || 0;
      content = (await response.json()) as Content;
    } catch (error) {
      // With a status, the answer is that of a proxy while the server restarts.
      throw new Unreachable(status ? `HTTP status ${status}` : `no answer: ${error}`, retryAfter);
    }
    const fault = content.errors?.[0];
    if (fault) {
      const passes = TRANSIENT.has(fault.extensions?.code ?? "") || status >= 500 || status === 429;
      throw passes ? new Unreachable(fault.message, retryAfter) : new Refused(fault.message);
    }
    if (!content.data?.answer) throw new Unreachable(`HTTP status ${status}`, retryAfter);
    return content.data.answer as NonNullable<Data["answer"]>;
  }
}
