// The user's newest jobs. Events keep them up to date: the cache identifies jobs by their id.

import { useMutation, useQuery, useSubscription } from "@apollo/client/react";
import { graphql } from "./gen";
import type { JobRowFragment } from "./gen/graphql";

graphql(`
  fragment JobRow on Job {
    id
    status
    payload
    progress
    finishedAt
    cancelRequestedAt
    error { message }
  }
`);

const JOBS = graphql(`
  query Jobs {
    jobs(first: 20, filter: { types: ["thumbnail.create"] }) {
      nodes { ...JobRow }
    }
  }
`);

const EVENTS = graphql(`
  subscription Events {
    jobEvents(jobTypes: ["thumbnail.create"]) {
      name
      job { ...JobRow }
    }
  }
`);

const CANCEL = graphql(`
  mutation Cancel($id: ID!) {
    cancelJob(id: $id) {
      __typename
      ... on JobChanged { job { ...JobRow } }
      ... on Error { message }
    }
  }
`);

export function Jobs() {
  const { data, previousData, error, refetch } = useQuery(JOBS);
  useSubscription(EVENTS, {
    onData: ({ data: { data: event } }) => {
      if (event?.jobEvents.name === "job.created") void refetch();
    },
  });
  // If the jobs cannot be read again, the old ones remain. Events still update them.
  const jobs = (data ?? previousData)?.jobs?.nodes;
  return (
    <>
      {error && <p role="alert">{error.message}</p>}
      <table>
        <thead>
          <tr>
            <th>Sizes</th>
            <th>Status</th>
            <th>Progress</th>
            <th />
          </tr>
        </thead>
        <tbody>{jobs?.map((job) => <Row job={job} key={job.id} />)}</tbody>
      </table>
    </>
  );
}

function Row({ job }: { job: JobRowFragment }) {
  const [cancel, { loading }] = useMutation(CANCEL);
  // The progress that the handler of thumbnail.create reports.
  const progress = job.progress as { rendered: number; of: number } | null;
  const { sizes } = job.payload as { sizes?: number[] };
  const isEnding = loading || job.cancelRequestedAt != null;
  return (
    <tr data-status={job.status}>
      <td>{sizes?.join(", ") ?? "default"}</td>
      <td>{job.status.toLowerCase()}</td>
      <td>
        {progress && <progress value={progress.rendered} max={progress.of} />}
        {job.error?.message}
      </td>
      <td>
        {!job.finishedAt && (
          <button disabled={isEnding} onClick={() => cancel({ variables: { id: job.id } })}>
            Cancel
          </button>
        )}
      </td>
    </tr>
  );
}
