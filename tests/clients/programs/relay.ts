import type { DocumentNode } from "graphql";
import {
  commitMutation,
  fetchQuery,
  type GraphQLTaggedNode,
  graphql,
  requestSubscription,
  type Variables,
} from "relay-runtime";
import { environment } from "../relay.js";
import { type Answer, type Execute, type Failure, runScenario } from "./scenario.js";
import type { FollowSubscription } from "../gen/graphql.js";

const ENQUEUE = graphql`
  mutation relayEnqueueMutation($input: EnqueueJobInput!) {
    result: enqueueJob(input: $input) {
      __typename
      ... on EnqueueJobSuccess { job { id type status priority payload createdBy createdAt } }
      ... on PayloadInvalid { violations { path code } }
      ... on Error { code message }
    }
  }
`;

const ENQUEUE_TYPED = graphql`
  mutation relayEnqueueTypedMutation($job: TypedJobInput!, $options: EnqueueOptions) {
    result: enqueue(job: $job, options: $options) {
      __typename
      ... on EnqueueJobSuccess { job { id type status priority payload createdBy createdAt } }
      ... on Error { code message }
    }
  }
`;

const JOB = graphql`
  query relayJobQuery($id: ID!) {
    job(id: $id) {
      __typename
      ... on Job { id type status priority payload createdBy createdAt }
      ... on Error { code message }
    }
  }
`;

const JOBS = graphql`
  query relayJobsQuery($first: Int, $after: String, $last: Int, $before: String) {
    jobs(first: $first, after: $after, last: $last, before: $before) {
      totalCount
      nodes { id type status priority payload createdBy createdAt }
      pageInfo { hasNextPage hasPreviousPage startCursor endCursor }
    }
  }
`;

const JOB_AND_PAGE = graphql`
  query relayJobAndPageQuery($id: ID!, $after: String!) {
    job(id: $id) {
      __typename
      ... on Job { id type status priority payload createdBy createdAt }
    }
    jobs(after: $after) @catch { nodes { id } }
  }
`;

const CANCEL = graphql`
  mutation relayCancelMutation($id: ID!) {
    result: cancelJob(id: $id) {
      __typename
      ... on JobChanged { job { id status } }
      ... on Error { code message }
    }
  }
`;

const FOLLOW = graphql`
  subscription relayFollowSubscription($id: ID!) {
    jobEvents(jobId: $id) { name status job { id status } }
  }
`;

const QUERIES: Record<string, GraphQLTaggedNode> = {
  Job: JOB,
  Jobs: JOBS,
  JobAndPage: JOB_AND_PAGE,
};
const MUTATIONS: Record<string, GraphQLTaggedNode> = {
  Enqueue: ENQUEUE,
  EnqueueTyped: ENQUEUE_TYPED,
  Cancel: CANCEL,
};

/** Returns Relay's document for a document of the scenario. */
function ours(documents: Record<string, GraphQLTaggedNode>, theirs: DocumentNode) {
  const [operation] = theirs.definitions;
  const name = operation?.kind === "OperationDefinition" ? operation.name?.value : undefined;
  return documents[name ?? ""] as GraphQLTaggedNode;
}

/** Returns the errors of a request that was not executed: Relay's error has the answer as its `source`. */
function refused(error: unknown): { errors: readonly Failure[] } {
  const { source } = error as { source?: { errors: readonly Failure[] } };
  if (!source) throw error;
  return { errors: source.errors };
}

/** The scenario's field with `@catch`: its value, or its errors. */
type Caught = { jobs?: { ok: false; errors: Failure[] } | { ok: true; value: unknown } };

const query: Execute = async <Data>(
  document: DocumentNode,
  variables: Variables,
): Promise<Answer<Data>> => {
  const data = await fetchQuery(environment, ours(QUERIES, document), variables).toPromise();
  const { jobs } = data as Caught;
  if (jobs?.ok !== false) return { data: data as Data };
  const errors = jobs.errors.map((error) => ({ ...error, path: ["jobs"] }));
  return { data: { ...(data as Data), jobs: null }, errors };
};

const mutate: Execute = <Data>(document: DocumentNode, variables: Variables) =>
  new Promise<Answer<Data>>((resolve) => {
    commitMutation(environment, {
      mutation: ours(MUTATIONS, document),
      variables,
      onCompleted: (data, errors) => resolve({ data: data as Data, errors: errors ?? [] }),
      onError: (error) => resolve(refused(error)),
    });
  });

await runScenario({
  query,
  mutate,
  follow: (_document, variables, next, fail) =>
    requestSubscription(environment, {
      subscription: FOLLOW,
      variables,
      onNext: (data) => next(data as FollowSubscription),
      onError: fail,
      onCompleted: () => fail("complete"),
    }).dispose,
});
process.exit();
